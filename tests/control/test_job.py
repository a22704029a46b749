"""A job: what happens to it, what may be done with it, how it is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvfuse.control.job import (
    ENDED,
    ERRORS_KEPT,
    GOES_ON,
    INTERRUPTED,
    Action,
    Job,
    JobError,
    JobKind,
    JobState,
    Step,
)
from hvfuse.errors import NoSpaceError

OWNER = {"pid": 7, "boot_id": "ab", "process_start": 9}
TROUBLE = JobError(id="NoSpaceError", message="the disk is full", recommendation="make room")
NEW = Job(id=3, kind=JobKind.VERIFY, vm="vm", command=("verify", "vm")).planned(("one", "two", "three"))
RUNNING = NEW.begin(OWNER, 10).step("one", 11).step("two", 12)


def states(job: Job) -> list[str]:
    return [step.state.value for step in job.steps]


def test_a_planned_job_has_begun_nothing() -> None:
    assert NEW.state is JobState.NOT_STARTED
    assert states(NEW) == ["NotStarted"] * 3
    assert (NEW.owner, NEW.started_ns, NEW.percent) == (None, None, 0)


def test_a_step_that_begins_ends_those_before_it() -> None:
    assert states(RUNNING) == ["Succeeded", "InProgress", "NotStarted"]
    assert [(step.started_ns, step.ended_ns) for step in RUNNING.steps] == [(11, 12), (12, None), (None, None)]
    skipped = NEW.begin(OWNER, 10).step("three", 20)
    assert states(skipped) == ["Succeeded", "Succeeded", "InProgress"]
    assert [(step.started_ns, step.ended_ns) for step in skipped.steps] == [(20, 20), (20, 20), (20, None)]


def test_a_step_that_goes_on_keeps_its_beginning_and_its_text() -> None:
    again = RUNNING.note("half of it").step("two", 30)
    assert again.steps[1] == Step(name="two", state=JobState.IN_PROGRESS, started_ns=12, text="half of it")


def test_a_step_that_begins_again_has_those_behind_it_still_to_come() -> None:
    back = RUNNING.step("three", 20).step("one", 30)
    assert states(back) == ["InProgress", "Succeeded", "NotStarted"]
    assert back.steps[2] == Step(name="three")


def test_a_step_that_nobody_planned_comes_last() -> None:
    assert [step.name for step in RUNNING.step("four", 20).steps] == ["one", "two", "three", "four"]
    assert states(RUNNING.step("four", 20)) == ["Succeeded"] * 3 + ["InProgress"]


def test_a_failed_step_stays_failed_whatever_the_next_ones_do() -> None:
    job = RUNNING.fail_step("two", TROUBLE, 20).step("three", 21).succeed(22)
    assert states(job) == ["Succeeded", "Failed", "Succeeded"]
    assert (job.steps[1].text, job.errors) == ("the disk is full", (TROUBLE,))


ENDINGS: dict[str, tuple[Callable[[Job], Job], JobState, list[str]]] = {
    "succeeds": (lambda job: job.succeed(20), JobState.SUCCEEDED, ["Succeeded"] * 3),
    "fails": (lambda job: job.fail(TROUBLE, 20), JobState.FAILED, ["Succeeded", "Failed", "NotStarted"]),
    "is cancelled": (lambda job: job.cancel(20), JobState.CANCELLED, ["Succeeded", "Cancelled", "NotStarted"]),
    "is interrupted": (lambda job: job.interrupt(20), JobState.FAILED, ["Succeeded", "Failed", "NotStarted"]),
}


@pytest.mark.parametrize("how", ENDINGS)
@pytest.mark.parametrize("begun", [RUNNING, RUNNING.suspend("it waits")], ids=["in progress", "suspended"])
def test_a_job_that_ends_belongs_to_nobody_and_no_step_of_it_is_under_way(how: str, begun: Job) -> None:
    end, state, after = ENDINGS[how]
    job = end(begun)
    assert (job.state, states(job), job.owner, job.ended_ns) == (state, after, None, 20)
    assert job.has_ended
    assert not {"InProgress", "Suspended"} & set(states(job))


def test_only_what_succeeds_is_wholly_done() -> None:
    job = RUNNING.advanced(40)
    assert [job.advanced(30).percent, job.advanced(101).percent] == [40, 100]
    assert [job.succeed(20).percent, job.fail(TROUBLE, 20).percent, job.cancel(20).percent] == [100, 40, 40]


def test_a_suspended_job_goes_on_where_it_was() -> None:
    held = RUNNING.suspend("suspended")
    assert (held.state, held.owner, states(held)) == (
        JobState.SUSPENDED, None, ["Succeeded", "Suspended", "NotStarted"],
    )  # fmt: skip
    on = held.begin(OWNER, 50).step("two", 50)
    assert (on.state, on.started_ns, on.owner, states(on)) == (JobState.IN_PROGRESS, 10, OWNER, states(RUNNING))
    assert on.steps[1].started_ns == 12


@pytest.mark.parametrize("kind", JobKind)
def test_whose_process_is_gone_is_interrupted_by_its_kind(kind: JobKind) -> None:
    job = replace(RUNNING, kind=kind, command=("failover", "cleanup", "vm", "--note", "it works")).interrupt(20)
    if kind in GOES_ON:
        assert (job.state, job.errors) == (JobState.SUSPENDED, ())
        assert job.steps[1].text == "its process ended at “two”; the next one goes on with it"
        assert job.next_command == "hvfuse job resume 3"
    else:
        assert job.state is JobState.FAILED
        assert (job.errors[-1].id, job.errors[-1].message) == (INTERRUPTED, "its process ended at “two”")
        assert job.next_command == "hvfuse failover cleanup vm --note 'it works'"


ALLOWED = """
                      InProgress  NotStarted     Suspended      Failed   Cancelled  Succeeded
Enable protection     -           resume,cancel  resume,cancel  restart  restart    -
Initial replication   cancel      resume,cancel  resume,cancel  restart  restart    -
Finalize protection   -           resume,cancel  resume,cancel  restart  restart    -
Resynchronize         cancel      resume,cancel  resume,cancel  restart  restart    -
Update disks          cancel      resume,cancel  resume,cancel  restart  restart    -
Test failover         -           resume,cancel  resume,cancel  restart  restart    -
Cleanup test failover -           resume,cancel  resume,cancel  restart  restart    -
Planned failover      -           resume,cancel  resume,cancel  restart  restart    -
Unplanned failover    -           resume,cancel  resume,cancel  restart  restart    -
Commit                -           resume,cancel  resume,cancel  restart  restart    -
Cancel failover       -           resume,cancel  resume,cancel  restart  restart    -
Reverse replicate     -           resume,cancel  resume,cancel  restart  restart    -
Hydrate disks         -           resume,cancel  resume,cancel  restart  restart    -
Disable protection    -           resume,cancel  resume,cancel  restart  restart    -
Verify                cancel      resume,cancel  resume,cancel  restart  restart    -
Export                cancel      resume,cancel  resume,cancel  restart  restart    -
Import                cancel      resume,cancel  resume,cancel  restart  restart    -
Recovery plan         -           resume,cancel  resume,cancel  restart  restart    -
"""


def allowed_by_hand() -> dict[tuple[str, str], tuple[str, ...]]:
    head, *rows = ALLOWED.strip("\n").splitlines()
    cells = {}
    for row in rows:
        for state, told in zip(head.split(), row[22:].split(), strict=True):
            cells[row[:22].strip(), state] = () if told == "-" else tuple(told.split(","))
    return cells


def test_what_may_be_done_with_a_job_is_what_the_table_says() -> None:
    table = allowed_by_hand()
    assert set(table) == {(kind.value, state.value) for kind in JobKind for state in JobState}
    for (kind, state), allowed in table.items():
        job = replace(NEW, kind=JobKind(kind), state=JobState(state))
        assert tuple(action.value for action in job.allowed) == allowed, (kind, state)


def test_a_job_that_has_no_command_cannot_be_done_again_and_names_none() -> None:
    job = replace(RUNNING, command=()).fail(JobError(id="X", message="x"), 20)
    assert (job.allowed, job.next_command) == ((), None)
    assert RUNNING.fail(JobError(id="X", message="x"), 20).next_command == "hvfuse job restart 3"
    assert RUNNING.fail(TROUBLE, 20).next_command == "make room"
    assert Action.RESTART in RUNNING.fail(TROUBLE, 20).allowed


def test_the_same_trouble_again_and_again_is_told_once_and_not_without_bound() -> None:
    job = RUNNING.attempt_failed(TROUBLE).attempt_failed(TROUBLE)
    assert job.errors == (TROUBLE,)
    for number in range(ERRORS_KEPT + 5):
        job = job.attempt_failed(replace(TROUBLE, message=str(number)))
    assert [error.message for error in job.errors] == [str(number) for number in range(5, ERRORS_KEPT + 5)]


def test_an_exception_becomes_an_error_with_its_cause_and_what_to_do() -> None:
    error = NoSpaceError("the store is full", hint="make room")
    error.__cause__ = OSError(28, "No space left on device")
    assert JobError.of(error, otherwise="hvfuse x") == JobError(
        id="NoSpaceError", message="the store is full", causes=("[Errno 28] No space left on device",),
        recommendation="make room",
    )  # fmt: skip
    assert JobError.of(KeyError(), otherwise="hvfuse x") == JobError(
        id="KeyError", message="KeyError", recommendation="hvfuse x"
    )


TEXTS = st.text(max_size=5)
MAYBE = st.none() | TEXTS
TIMES = st.none() | st.integers(0, 2**62)
STEPS = st.builds(
    Step, name=TEXTS, state=st.sampled_from(JobState), started_ns=TIMES, ended_ns=TIMES, text=MAYBE
)  # fmt: skip
ERRORS = st.builds(JobError, id=TEXTS, message=TEXTS, causes=st.lists(TEXTS).map(tuple), recommendation=MAYBE)
JOBS = st.builds(
    Job,
    id=st.integers(1, 2**32),
    kind=st.sampled_from(JobKind),
    vm=TEXTS,
    state=st.sampled_from(JobState),
    steps=st.lists(STEPS, max_size=3).map(tuple),
    errors=st.lists(ERRORS, max_size=3).map(tuple),
    started_ns=TIMES,
    ended_ns=TIMES,
    percent=st.integers(0, 100),
    owner=st.none() | st.just(OWNER),
    command=st.lists(TEXTS, max_size=3).map(tuple),
)


@given(JOBS)
def test_a_job_survives_being_kept(job: Job) -> None:
    assert Job.from_json(job.id, json.loads(json.dumps(job.as_json()))) == job


def test_a_job_of_another_version_is_read_for_what_is_known_of_it() -> None:
    kept = RUNNING.as_json()
    kept["colour"], kept["steps"][0]["colour"] = "blue", "blue"
    assert Job.from_json(3, kept) == RUNNING
    assert Job.from_json(3, {"kind": "Verify", "vm": "vm"}) == Job(id=3, kind=JobKind.VERIFY, vm="vm")


OPERATIONS: list[Callable[[Job, int], Job]] = [
    lambda job, now: job.begin(OWNER, now),
    lambda job, now: job.step("one", now),
    lambda job, now: job.step("three", now),
    lambda job, now: job.suspend("it waits"),
    lambda job, now: job.succeed(now),
    lambda job, now: job.fail(TROUBLE, now),
    lambda job, now: job.cancel(now),
    lambda job, now: job.interrupt(now),
    lambda job, now: job.advanced(now),
]


@given(st.lists(st.sampled_from(OPERATIONS), max_size=12), st.sampled_from(JobKind))
def test_whatever_happens_a_job_is_worked_at_by_somebody_or_by_nobody(
    operations: list[Callable[[Job, int], Job]], kind: JobKind
) -> None:
    job, percent = replace(NEW, kind=kind), 0
    for now, operation in enumerate(operations, start=1):
        if not job.has_ended:
            job = operation(job, now)
        assert (job.owner is not None) == (job.state is JobState.IN_PROGRESS)
        assert (job.ended_ns is not None) == (job.state in ENDED)
        assert sum(step.state is JobState.IN_PROGRESS for step in job.steps) <= 1
        assert percent <= job.percent <= 100
        percent = job.percent
