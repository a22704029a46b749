"""What a change of state means for the copy's job: the table of the module, row by row; and over restarts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvfuse.control.database import numbered
from hvfuse.control.job import Job, JobKind, JobState
from hvfuse.control.records import Records
from hvfuse.errors import StateError
from hvfuse.states import Event, ReplicationState

from ..state_paths import leading_to

COPY = {"kind": "initial", "pass": 1, "bytes_total": 100, "bytes_done": 25}
SUSPENDED, CANCELLED, SUCCEEDED, FAILED, IN_PROGRESS = (
    JobState.SUSPENDED, JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED, JobState.IN_PROGRESS,
)  # fmt: skip


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with Records(str(tmp_path)) as records:
        yield records


def begun(records: Records, *, resync: bool = False) -> Job:
    """A copy under way."""
    if resync:
        records.apply("vm", Event.ENABLE, Event.COMMIT_POINT)
        records.apply("vm", Event.NEED_RESYNC, Event.START, progress=0.25, copy={**COPY, "kind": "resync"})
    else:
        records.apply("vm", Event.ENABLE)
        records.apply("vm", Event.NEED_FIRST_COPY, Event.START, progress=0.25, copy=COPY)
    (job,) = records.jobs.all()
    return job


@pytest.mark.parametrize(
    ("resync", "cause", "kind"),
    [
        (False, None, JobKind.INITIAL),
        (True, None, JobKind.RESYNC),
        (True, "disks", JobKind.UPDATE_DISKS),
    ],
)
def test_a_copy_that_begins_has_a_job_of_its_kind(
    records: Records, resync: bool, cause: str | None, kind: JobKind
) -> None:
    records.update("vm", resync_cause=cause)
    job = begun(records, resync=resync)
    assert (job.kind, job.state, job.percent, job.vm) == (kind, IN_PROGRESS, 25, "vm")
    assert [(step.name, step.state.value) for step in job.steps] == [
        ("copy", "InProgress"), ("first recovery point after it", "NotStarted"),
    ]  # fmt: skip
    assert records.read("vm").copy_job == job.id


ROWS: list[tuple[bool, tuple[Event, ...], JobState]] = [
    (False, (Event.START,), IN_PROGRESS),
    (True, (Event.NEED_RESYNC, Event.START), IN_PROGRESS),
    (False, (Event.COMMIT_POINT,), SUCCEEDED),
    (True, (Event.COMMIT_POINT,), SUCCEEDED),
    (False, (Event.SUSPEND,), SUSPENDED),
    (True, (Event.SUSPEND,), SUSPENDED),
    (False, (Event.FAIL,), FAILED),
    (True, (Event.FAIL,), FAILED),
    (False, (Event.CANCEL,), CANCELLED),
    (True, (Event.CANCEL,), CANCELLED),
    (True, (Event.NEED_RESYNC, Event.CANCEL), CANCELLED),
    (False, (Event.NEED_FIRST_COPY,), SUSPENDED),
    (False, (Event.AWAIT_FIRST_COPY,), SUSPENDED),
    (True, (Event.NEED_RESYNC,), SUSPENDED),
    (False, (Event.DISABLE,), CANCELLED),
    (True, (Event.DISABLE,), CANCELLED),
    (True, (Event.FAIL_OVER,), CANCELLED),
    (False, (Event.NEED_RESYNC, Event.START), CANCELLED),
    (True, (Event.NEED_FIRST_COPY, Event.START), CANCELLED),
]


@pytest.mark.parametrize(
    ("resync", "events", "state"),
    ROWS,
    ids=[f"{'resync' if resync else 'first copy'}: {', then '.join(events)}" for resync, events, _ in ROWS],
)
def test_the_job_follows_the_state(records: Records, resync: bool, events: tuple[Event, ...], state: JobState) -> None:
    job = begun(records, resync=resync)
    record = records.apply("vm", *events)
    after = records.jobs.get(job.id)
    assert after.state is state
    assert (after.owner is not None) == (state is IN_PROGRESS)
    if not after.has_ended:
        assert record.copy_job == job.id
    elif record.state in (ReplicationState.INITIAL_REPLICATION_IN_PROGRESS, ReplicationState.RESYNCHRONIZING):
        assert record.copy_job == job.id + 1
        assert records.jobs.get(job.id + 1).state is IN_PROGRESS
    else:
        assert record.copy_job is None


def test_a_copy_that_goes_on_after_it_waited_is_the_same_job(records: Records) -> None:
    job = begun(records, resync=True)
    for held in (Event.SUSPEND, Event.NEED_RESYNC):
        records.apply("vm", held)
        assert records.jobs.get(job.id).state is SUSPENDED
        records.apply("vm", Event.START)
        again = records.jobs.get(job.id)
        assert (again.state, again.started_ns) == (IN_PROGRESS, job.started_ns)
    assert len(records.jobs.all()) == 1


def test_what_ended_does_not_begin_again_but_as_another_job(records: Records) -> None:
    first = begun(records)
    records.apply("vm", Event.CANCEL)
    records.apply("vm", Event.START)
    records.apply("vm", Event.COMMIT_POINT)
    assert [job.state for job in records.jobs.all()] == [CANCELLED, SUCCEEDED]
    records.apply("vm", Event.COMMIT_POINT)
    assert records.jobs.get(first.id).state is CANCELLED
    assert len(records.jobs.all()) == 2


def test_replication_without_a_copy_has_no_job(records: Records) -> None:
    records.apply("vm", Event.ENABLE)
    for event in (
        Event.AWAIT_FIRST_COPY,
        Event.COMMIT_POINT,
        Event.SUSPEND,
        Event.RESUME,
        Event.FAIL,
        Event.COMMIT_POINT,
    ):
        records.apply("vm", event)
    assert records.jobs.all() == []


def test_an_export_leaves_its_job_to_its_command(records: Records) -> None:
    records.apply("vm", Event.ENABLE)
    records.apply("vm", Event.NEED_FIRST_COPY, Event.START, copy={**COPY, "kind": "export"}, progress=0.0)
    records.update("vm", copy={**COPY, "kind": "export", "report": {}}, progress=1.0)
    assert records.jobs.all() == []


def test_figures_move_the_percentage_and_a_complete_copy_the_step(records: Records) -> None:
    job = begun(records)
    records.update("vm", copy={**COPY, "bytes_done": 60}, progress=0.6)
    assert records.jobs.get(job.id).percent == 60
    records.update("vm", copy={**COPY, "bytes_done": 100}, progress=1.0)
    assert records.jobs.get(job.id).percent == 99
    report = {"bytes_total": 4096, "bytes_compared": None, "bytes_sent": 1024}
    records.update("vm", copy={**COPY, "report": report}, progress=1.0)
    after = records.jobs.get(job.id)
    assert [step.state.value for step in after.steps] == ["Succeeded", "InProgress"]
    assert [step.text for step in after.steps] == ["4 KiB copied, 1 KiB sent", None]
    records.apply("vm", Event.COMMIT_POINT, copy=None, progress=None)
    assert [step.state.value for step in records.jobs.get(job.id).steps] == ["Succeeded", "Succeeded"]


def test_another_pass_is_under_way_alone(records: Records) -> None:
    job = begun(records)
    records.update("vm", copy={**COPY, "report": {}}, progress=1.0)
    records.apply("vm", Event.NEED_FIRST_COPY, Event.START, copy={**COPY, "pass": 2}, progress=0.1)
    after = records.jobs.get(job.id)
    assert [step.state.value for step in after.steps].count("InProgress") == 1


def test_failures_on_the_way_are_told_once_each_and_the_last_one_is_why_it_failed(records: Records) -> None:
    job = begun(records)
    for message in ("no answer", "no answer", "no room"):
        records.update("vm", error=message, hint=f"see to: {message}")
    records.update("vm", error=None, hint=None)
    records.apply("vm", Event.FAIL, error="the disk is dying", hint="replace it")
    failed = records.jobs.get(job.id)
    assert [error.message for error in failed.errors] == ["no answer", "no room", "the disk is dying"]
    assert (failed.state, failed.next_command) == (FAILED, "replace it")


def test_each_change_of_state_and_each_trouble_is_an_event(records: Records) -> None:
    begun(records, resync=True)
    records.update("vm", error="no answer", hint="look")
    records.update("vm", error="no answer")
    records.apply("vm", Event.COMMIT_POINT, error=None)
    told = [(event.kind, event.severity.value, event.text) for event in records.events.after(0)]
    assert told == [
        ("state", "info", "Disabled → Replicating"),
        ("state", "info", "Replicating → Resynchronizing"),
        ("job", "info", "job 1, Resynchronize: InProgress"),
        ("failure", "warning", "no answer"),
        ("state", "info", "Resynchronizing → Replicating"),
        ("failure", "info", "over: no answer"),
        ("job", "info", "job 1, Resynchronize: Succeeded"),
    ]


def test_what_is_refused_changes_nothing_and_tells_nothing(records: Records) -> None:
    job = begun(records)
    before, events = records.read("vm"), records.events.after(0)
    with pytest.raises(StateError):
        records.apply("vm", Event.SUSPEND, Event.PREPARE_FAILOVER, error="x")
    assert (records.read("vm"), records.events.after(0), records.jobs.all()) == (before, events, [job])


SHIPPER = """
import os, signal, sys
from hvfuse.control.records import Records
from hvfuse.states import Event
with Records(sys.argv[1]) as records:
    for word in sys.argv[2:]:
        events = [Event(name) for name in word.split("+")]
        copy = {"kind": "initial", "pass": 1, "bytes_total": 9, "bytes_done": 3}
        records.apply("vm", *events, copy=copy, progress=0.3)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def shipper(path: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-c", SHIPPER, str(path), *words])


def test_however_often_its_process_is_killed_a_copy_stays_one_job(tmp_path: Path) -> None:
    shipper(tmp_path, "enable", "need first copy+start")
    for _ in range(3):
        with Records(str(tmp_path)) as records:
            assert [job.state for job in records.jobs.bury()] == [SUSPENDED]
            (job,) = records.jobs.all()
            assert "its process ended" in str(job.steps[0].text)
        shipper(tmp_path, "need first copy+start")
    shipper(tmp_path, "need first copy+start", "commit point")
    with Records(str(tmp_path)) as records:
        assert records.jobs.bury() == []
        (job,) = records.jobs.all()
        assert (job.state, job.percent) == (SUCCEEDED, 100)


def test_a_job_that_was_suspended_is_given_up_by_whoever_changes_the_state(tmp_path: Path) -> None:
    shipper(tmp_path, "enable", "need first copy+start")
    with Records(str(tmp_path)) as records:
        records.jobs.bury()
        records.apply("vm", Event.CANCEL, copy=None, progress=None)
        (job,) = records.jobs.all()
        assert (job.state, records.read("vm").copy_job) == (CANCELLED, None)


@pytest.mark.parametrize("state", ReplicationState)
def test_on_no_way_to_any_state_is_more_than_one_copy_open(records: Records, state: ReplicationState) -> None:
    begun(records)
    fields: dict[str, Any] = {"copy": COPY, "progress": 0.5}
    for event in leading_to(state, records.read("vm").state):
        records.apply("vm", event, **fields)
        open_jobs = [job.id for job in records.jobs.all() if not job.has_ended]
        assert open_jobs == [job for job in (records.read("vm").copy_job,) if job is not None]


def test_a_first_copy_that_is_done_again_is_not_done_because_it_is_resumed(records: Records) -> None:
    """The store of a VM that had recovery points is gone."""
    records.apply("vm", Event.ENABLE, Event.COMMIT_POINT, point="p-7")
    records.apply("vm", Event.NEED_FIRST_COPY, Event.START, progress=0.25, copy=COPY)
    records.apply("vm", Event.NEED_FIRST_COPY, Event.SUSPEND)
    records.of("vm").resume()
    assert records.read("vm").state is ReplicationState.READY_FOR_INITIAL_REPLICATION
    assert [job.state for job in records.jobs.all()] == [SUSPENDED]


def test_the_damaged_job_of_a_copy_does_not_stop_the_replication(records: Records) -> None:
    job = begun(records)
    records.jobs._database.write(lambda txn: txn.put(numbered(b"job/", job.id), {"kind": "Dance"}))
    records.apply("vm", Event.COMMIT_POINT, point="p-1")
    record = records.read("vm")
    assert (record.state, record.copy_job) == (ReplicationState.REPLICATING, None)
