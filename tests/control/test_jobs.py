"""Jobs as they are kept: real processes work at them, and are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hvfuse import system
from hvfuse.control import jobs as jobs_module
from hvfuse.control.database import Database, numbered
from hvfuse.control.job import INTERRUPTED, Job, JobError, JobKind, JobState
from hvfuse.control.jobs import JOBS_KEPT, KEPT_SECONDS, Jobs, add_job
from hvfuse.control.records import Records
from hvfuse.errors import CorruptError, NoSpaceError, NotFoundError

from .children import HandClock

STEPS = ("one", "two", "three")
WORDS = ("verify", "vm", "--sample", "5%")


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def jobs(tmp_path: Path, clock: HandClock) -> Jobs:
    return Jobs(Database(str(tmp_path / "r")), clock=clock)


def test_a_job_succeeds_with_its_block(jobs: Jobs, clock: HandClock) -> None:
    with jobs.run(JobKind.VERIFY, "vm", steps=STEPS, command=WORDS) as job:
        assert jobs.get(job.id).owner == system.process_identity(os.getpid())
        for name in STEPS:
            clock.at += 1
            job.step(name)
        job.note("almost")
        (seen,) = jobs.all()
        assert [step.state.value for step in seen.steps] == ["Succeeded", "Succeeded", "InProgress"]
        assert (seen.state, seen.steps[2].text) == (JobState.IN_PROGRESS, "almost")
    done = jobs.get(job.id)
    assert (done.state, done.percent, done.owner, done.errors) == (JobState.SUCCEEDED, 100, None, ())
    assert (done.started_ns, done.ended_ns) == (1000 * 10**9, 1003 * 10**9)
    assert [step.state for step in done.steps] == [JobState.SUCCEEDED] * 3


def test_a_job_fails_with_what_its_block_raises_and_says_what_to_do(jobs: Jobs) -> None:
    for hint, recommended in (("make room", "make room"), (None, "hvfuse verify vm --sample 5%")):
        with (
            pytest.raises(NoSpaceError),
            jobs.run(JobKind.VERIFY, "vm", steps=STEPS, command=WORDS) as job,
        ):
            job.step("two")
            raise NoSpaceError("the store is full", hint=hint)
        failed = jobs.get(job.id)
        assert (failed.state, failed.next_command) == (JobState.FAILED, recommended)
        assert failed.errors == (JobError(id="NoSpaceError", message="the store is full", recommendation=recommended),)
        assert [step.state.value for step in failed.steps] == ["Succeeded", "Failed", "NotStarted"]


def test_ctrl_c_cancels_a_job(jobs: Jobs) -> None:
    with pytest.raises(KeyboardInterrupt), jobs.run(JobKind.VERIFY, "vm", steps=STEPS) as job:
        job.step("one")
        raise KeyboardInterrupt
    assert jobs.get(job.id).state is JobState.CANCELLED


def test_a_job_that_came_out_badly_has_failed_although_nothing_was_raised(jobs: Jobs) -> None:
    trouble = JobError(id="CorruptError", message="it differs", recommendation="repair it")
    with jobs.run(JobKind.VERIFY, "vm", command=WORDS) as job:
        job.fail(trouble)
    assert (jobs.get(job.id).state, jobs.get(job.id).errors) == (JobState.FAILED, (trouble,))


def test_what_a_job_failed_with_is_not_hidden_by_a_full_disk(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Job:
        raise NoSpaceError("no room for the records")

    with pytest.raises(ValueError, match="the trouble itself"), jobs.run(JobKind.VERIFY, "vm"):
        monkeypatch.setattr(jobs, "change", full)
        raise ValueError("the trouble itself")


def test_progress_is_kept_once_a_second_at_most(jobs: Jobs, clock: HandClock) -> None:
    kept = []
    with jobs.run(JobKind.IMPORT, "vm") as job:
        for percent in range(1, 31):
            clock.at += 0.25
            job.progress(percent)
            kept.append(jobs.get(job.id).percent)
    assert sorted(set(kept)) == [1, 5, 9, 13, 17, 21, 25, 29]


def test_a_job_that_does_not_exist_is_named(jobs: Jobs) -> None:
    for ask in (lambda: jobs.get(7), lambda: jobs.change(7, lambda job: job)):
        with pytest.raises(NotFoundError, match="there is no job 7") as caught:
            ask()
        assert caught.value.hint == "hvfuse job list"


WORKER = """
import os, signal, sys
from hvfuse.control.job import JobKind
from hvfuse.control.records import Records

path, kind, last = sys.argv[1:]
with Records(path) as records:
    with records.jobs.run(JobKind(kind), "vm", steps=("one", "two", "three"), command=("verify", "vm")) as job:
        for name in ("one", "two", "three"):
            if last == "before " + name:
                os.kill(os.getpid(), signal.SIGKILL)
            job.step(name)
            if last == "in " + name:
                os.kill(os.getpid(), signal.SIGKILL)
    if last == "wait":
        print("done", flush=True)
        sys.stdin.read()
"""


def worker(path: Path, last: str, kind: JobKind = JobKind.VERIFY) -> int:
    return subprocess.run(
        [sys.executable, "-c", WORKER, str(path), kind.value, last], stdin=subprocess.DEVNULL
    ).returncode


@pytest.mark.parametrize(
    ("last", "steps", "where"),
    [
        ("before one", ["NotStarted"] * 3, ""),
        ("in one", ["Failed", "NotStarted", "NotStarted"], " at “one”"),
        ("before two", ["Failed", "NotStarted", "NotStarted"], " at “one”"),
        ("in two", ["Succeeded", "Failed", "NotStarted"], " at “two”"),
        ("in three", ["Succeeded", "Succeeded", "Failed"], " at “three”"),
    ],
)
def test_a_command_that_is_killed_leaves_a_failed_job_with_its_next_command(
    tmp_path: Path, last: str, steps: list[str], where: str
) -> None:
    assert worker(tmp_path, last) == -signal.SIGKILL
    with Records(str(tmp_path)) as records:
        assert records.jobs.get(1).state is JobState.IN_PROGRESS
        assert [job.id for job in records.jobs.bury()] == [1]
        job = records.jobs.get(1)
        assert job.state is JobState.FAILED
        assert [step.state.value for step in job.steps] == steps
        assert [(error.id, error.message) for error in job.errors] == [(INTERRUPTED, f"its process ended{where}")]
        assert job.next_command == "hvfuse verify vm"
        assert records.jobs.bury() == []
        last_event = records.events.newest(1)[0]
        assert (last_event.kind, last_event.severity.value, last_event.data["state"]) == ("job", "error", "Failed")


def test_a_copy_that_is_killed_waits_for_the_next_process(tmp_path: Path) -> None:
    assert worker(tmp_path, "in two", JobKind.RESYNC) == -signal.SIGKILL
    with Records(str(tmp_path)) as records:
        records.jobs.bury()
        job = records.jobs.get(1)
        assert (job.state, job.owner, job.errors) == (JobState.SUSPENDED, None, ())


def test_only_what_is_dead_is_buried_even_before_its_parent_knows(tmp_path: Path) -> None:
    with Records(str(tmp_path)) as records, records.jobs.run(JobKind.EXPORT, "alive") as mine:
        child = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), JobKind.VERIFY.value, "in two"], stdin=subprocess.DEVNULL
        )
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        assert [job.vm for job in records.jobs.bury()] == ["vm"]
        assert records.jobs.get(mine.id).state is JobState.IN_PROGRESS
        assert child.wait() == -signal.SIGKILL


def test_a_pid_that_was_given_away_does_not_pass_for_the_old_process(jobs: Jobs) -> None:
    other = {**system.process_identity(os.getpid()), "process_start": 1}
    elsewhere = {**system.process_identity(os.getpid()), "boot_id": "00" * 16}
    for owner in (other, elsewhere, None):
        job = Job(id=0, kind=JobKind.VERIFY, vm="vm", state=JobState.IN_PROGRESS, owner=owner)
        added = jobs._database.write(lambda txn, job=job: add_job(txn, job, now_ns=1))
        assert [buried.id for buried in jobs.bury()] == [added.id]


def test_a_signal_reaches_exactly_the_process_that_is_meant() -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        identity = system.process_identity(child.pid)
        assert not system.signal_process({**identity, "process_start": 1}, signal.SIGKILL)
        assert child.poll() is None
        assert system.signal_process(identity, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert not system.signal_process(identity, signal.SIGKILL)


def test_jobs_that_ended_long_ago_go_and_those_that_wait_stay(jobs: Jobs, clock: HandClock) -> None:
    waiting = Job(id=0, kind=JobKind.INITIAL, vm="vm", state=JobState.SUSPENDED)
    jobs._database.write(lambda txn: add_job(txn, waiting, now_ns=clock.now_ns()))
    for _ in range(3):
        with jobs.run(JobKind.VERIFY, "vm"):
            pass
    clock.at += KEPT_SECONDS - 10
    with jobs.run(JobKind.VERIFY, "vm"):
        pass
    assert [job.id for job in jobs.all()] == [1, 2, 3, 4, 5]
    clock.at += 20
    with jobs.run(JobKind.VERIFY, "vm"):
        pass
    assert [job.id for job in jobs.all()] == [1, 5, 6]


def test_jobs_are_bounded_in_number_and_ids_are_never_given_twice(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert JOBS_KEPT >= 1000
    monkeypatch.setattr(jobs_module, "JOBS_KEPT", 4)
    for _ in range(9):
        with jobs.run(JobKind.VERIFY, "vm"):
            pass
    assert [job.id for job in jobs.all()] == [6, 7, 8, 9]
    monkeypatch.setattr(jobs_module, "KEPT_SECONDS", -1)
    with jobs.run(JobKind.VERIFY, "vm") as job:
        assert [kept.id for kept in jobs.all()] == [job.id] == [10]


def test_open_jobs_are_found_by_vm_and_kind(jobs: Jobs) -> None:
    with jobs.run(JobKind.VERIFY, "vm") as mine, jobs.run(JobKind.VERIFY, "other"), jobs.run(JobKind.EXPORT, "vm"):
        assert [job.id for job in jobs.open("vm", {JobKind.VERIFY})] == [mine.id]
    assert jobs.open("vm", frozenset(JobKind)) == []


def test_a_job_that_is_damaged_or_of_a_later_version_keeps_nobody_from_the_others(jobs: Jobs, tmp_path: Path) -> None:
    with jobs.run(JobKind.VERIFY, "vm", steps=STEPS) as job:
        put_raw(jobs, 98, {"kind": "Dance", "vm": "vm", "state": "InProgress"})
        put_raw(jobs, 99, {})
        assert [each.id for each in jobs.all()] == [job.id]
        assert jobs.bury() == []
    with pytest.raises(CorruptError, match="98"):
        jobs.get(98)
    with jobs.run(JobKind.VERIFY, "vm", steps=STEPS) as another:
        assert [each.id for each in jobs.all()] == [job.id, another.id]


def put_raw(jobs: Jobs, job_id: int, values: dict[str, object]) -> None:
    jobs._database.write(lambda txn: txn.put(numbered(b"job/", job_id), values))
