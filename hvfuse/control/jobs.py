"""The jobs that are kept, and what works at them.

    "next/job"         {"number": the last id given out}
    "job/" + u64 BE    the fields of `Job`

Those that ended longer ago than `KEPT_SECONDS` go, and the oldest beyond JOBS_KEPT. One whose record is damaged, or
was written by a later version, is left as it is, and keeps nobody from the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence

from hvfuse import system
from hvfuse.control.database import Database, Transaction, numbered
from hvfuse.control.events import Severity, add_event
from hvfuse.control.job import Job, JobError, JobKind, JobState
from hvfuse.errors import CorruptError, HvfuseError, NotFoundError
from hvfuse.system import Clock

_log = logging.getLogger(__name__)

KEPT_SECONDS = 30 * 86400
JOBS_KEPT = 2000
PROGRESS_SECONDS = 1.0
"""Between two times that the percentage of a job is kept: each is a sync of the disk."""

_PREFIX = b"job/"
_NEXT = b"next/job"


def add_job(txn: Transaction, job: Job, *, now_ns: int) -> Job:
    """Keep a job under a new id, and let the old ones go. Returns it with that id."""
    number = int((txn.get(_NEXT) or {"number": 0})["number"]) + 1
    txn.put(_NEXT, {"number": number})
    added = Job.from_json(number, job.as_json())
    put_job(txn, added, now_ns=now_ns)
    _prune(txn, now_ns)
    return added


def put_job(txn: Transaction, job: Job, *, now_ns: int) -> None:
    """Keep a job as it is now; that it began or ended is an event."""
    before = txn.get(numbered(_PREFIX, job.id))
    was = None if before is None else before["state"]
    txn.put(numbered(_PREFIX, job.id), job.as_json())
    if job.state == was:
        return
    severity = Severity.ERROR if job.state is JobState.FAILED else Severity.INFO
    why = f": {job.errors[-1].message}" if job.state is JobState.FAILED and job.errors else ""
    add_event(
        txn, kind="job", vm=job.vm, severity=severity, text=f"job {job.id}, {job.kind}: {job.state}{why}",
        data={"job": job.id, "kind": job.kind.value, "state": job.state.value}, now_ns=now_ns,
    )  # fmt: skip


def find_job(txn: Transaction, job_id: int) -> Job | None:
    """The job of that id, if it is kept. Raises CorruptError."""
    values = txn.get(numbered(_PREFIX, job_id))
    return None if values is None else Job.from_json(job_id, values)


def _prune(txn: Transaction, now_ns: int) -> None:
    numbers = txn.numbers(_PREFIX)
    for place, number in enumerate(numbers):
        job = readable_job(txn, number)
        if job is None or not job.has_ended:
            continue  # one that waits for months must not keep those behind it; few do
        is_old = job.ended_ns is not None and now_ns - job.ended_ns > KEPT_SECONDS * 10**9
        is_beyond = place < len(numbers) - JOBS_KEPT
        if not is_old and not is_beyond:
            return  # they began in this order, and end in about the same
        txn.delete(numbered(_PREFIX, number))


def readable_job(txn: Transaction, job_id: int) -> Job | None:
    """The job of that id, if it is kept and can be read."""
    try:
        return find_job(txn, job_id)
    except CorruptError as error:
        _log.debug("%s", error)
        return None


class Jobs:
    """The jobs of a home. `clock`: for their times."""

    def __init__(self, database: Database, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def all(self) -> list[Job]:
        """All jobs that can be read, oldest first, as their processes left them (`bury` first)."""
        with self._database.read() as txn:
            found = [readable_job(txn, number) for number in txn.numbers(_PREFIX)]
        return [job for job in found if job is not None]

    def get(self, job_id: int) -> Job:
        """One job. Raises NotFoundError, CorruptError."""
        with self._database.read() as txn:
            job = find_job(txn, job_id)
        if job is None:
            raise NotFoundError(f"there is no job {job_id}", hint="hvfuse job list")
        return job

    def open(self, vm: str, kinds: Sequence[JobKind] | frozenset[JobKind]) -> list[Job]:
        """The VM's jobs of these kinds that have not ended, oldest first."""
        return [job for job in self.all() if job.vm == vm and job.kind in kinds and not job.has_ended]

    def change(self, job_id: int, change: Callable[[Job], Job]) -> Job:
        """Replace a job by what `change` makes of it, in one step. Raises NotFoundError."""
        now_ns = self._clock.now_ns()

        def act(txn: Transaction) -> Job | None:
            job = find_job(txn, job_id)
            if job is None:
                return None
            changed = change(job)
            if changed != job:
                put_job(txn, changed, now_ns=now_ns)
            return changed

        changed = self._database.write(act)
        if changed is None:
            raise NotFoundError(f"there is no job {job_id}", hint="hvfuse job list")
        return changed

    def bury(self) -> list[Job]:
        """Interrupt the jobs in progress whose process is gone, so that none passes for worked at. Returns them."""
        now_ns = self._clock.now_ns()

        def interrupt(job: Job) -> Job:
            return job.interrupt(now_ns) if _is_abandoned(job) else job

        # Looked at again when it is changed: somebody else may have taken it up, or buried it, meanwhile.
        return [self.change(job.id, interrupt) for job in self.all() if _is_abandoned(job)]

    @contextlib.contextmanager
    def run(
        self,
        kind: JobKind,
        vm: str,
        *,
        steps: Sequence[str] = (),
        command: Sequence[str] = (),
        takes_up: int | None = None,
    ) -> Iterator[Running]:
        """Do a job in this process: it succeeds with the block unless that suspends it, and fails with what the block
        raises. `takes_up`: id of a suspended job to go on with, instead of a new one."""
        self.bury()
        now_ns = self._clock.now_ns()
        job = Job(id=0, kind=kind, vm=vm, command=tuple(command)).planned(steps)
        owner = system.process_identity(os.getpid())
        job = job.begin(owner, now_ns)
        if takes_up is None:
            added = self._database.write(lambda txn: add_job(txn, job, now_ns=now_ns))
        else:
            added = self.change(takes_up, lambda now: now.begin(owner, now_ns))
        running = Running(self, added.id, self._clock)
        try:
            yield running
        except KeyboardInterrupt:
            self._end(added.id, lambda now: now.cancel(self._clock.now_ns()))
            raise
        except BaseException as error:
            failed = JobError.of(error, otherwise=f"hvfuse {shlex.join(command)}" if command else None)
            self._end(added.id, lambda now: now.fail(failed, self._clock.now_ns()))
            raise
        self.change(
            added.id, lambda now: now.succeed(self._clock.now_ns()) if now.state is JobState.IN_PROGRESS else now
        )

    def take_up(self, kind: JobKind, vm: str, *, steps: Sequence[str], command: Sequence[str]) -> int:
        """Work, in this process, at the VM's job of that kind that waits, or at a new one. Returns its id; whoever
        takes it up ends it."""
        self.bury()
        now_ns, owner = self._clock.now_ns(), system.process_identity(os.getpid())
        for job in self.open(vm, (kind,)):
            return self.change(job.id, lambda one: one.begin(owner, now_ns).step(steps[0], now_ns)).id
        job = Job(id=0, kind=kind, vm=vm, command=tuple(command)).planned(steps)
        job = job.begin(owner, now_ns).step(steps[0], now_ns)
        return self._database.write(lambda txn: add_job(txn, job, now_ns=now_ns)).id

    def _end(self, job_id: int, change: Callable[[Job], Job]) -> None:
        """End a job for what its block raised. Where not even that can be kept, a full disk, say, what was raised is
        what matters: `bury` ends the job once this process is gone."""
        with contextlib.suppress(HvfuseError):
            self.change(job_id, lambda now: now if now.has_ended else change(now))


class Running:
    """A job that this process is at."""

    def __init__(self, jobs: Jobs, job_id: int, clock: Clock) -> None:
        self.id = job_id
        self._jobs = jobs
        self._clock = clock
        self._told: tuple[float, int] | None = None  # when progress was kept last, and which

    def step(self, name: str, text: str | None = None) -> None:
        """The step of that name begins; those before it are done."""
        self._jobs.change(self.id, lambda job: job.step(name, self._clock.now_ns(), text))

    def note(self, text: str) -> None:
        """Say something of the step under way."""
        self._jobs.change(self.id, lambda job: job.note(text))

    def step_failed(self, name: str, error: JobError) -> None:
        """A step failed, and the next ones are tried all the same."""
        self._jobs.change(self.id, lambda job: job.fail_step(name, error, self._clock.now_ns()))

    def progress(self, percent: int) -> None:
        """So much is done, 0 to 100. May be told as often as one likes: it is kept once in PROGRESS_SECONDS."""
        now = self._clock.monotonic()
        if self._told is not None and (now - self._told[0] < PROGRESS_SECONDS or percent <= self._told[1]):
            return
        self._told = (now, percent)
        self._jobs.change(self.id, lambda job: job.advanced(percent))

    def suspend(self, text: str) -> None:
        """The job waits for somebody, after this process too; `text`: for what."""
        self._jobs.change(self.id, lambda job: job.suspend(text))

    def fail(self, error: JobError) -> None:
        """The job is done, and did not come out as it should, although nothing was raised."""
        self._jobs.change(self.id, lambda job: job.fail(error, self._clock.now_ns()))


def _is_abandoned(job: Job) -> bool:
    """Whether it passes for being worked at, and is not."""
    return job.state is JobState.IN_PROGRESS and (job.owner is None or not system.is_running(job.owner))
