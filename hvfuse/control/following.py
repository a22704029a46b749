"""What a change of a VM's record means for its jobs and events, kept in the same transaction.

A copy has a job from when it begins until it is complete, given up or beyond help; which process is at it, and how
often it is interrupted, makes no difference:

    the state becomes                                      the job
    InitialReplicationInProgress, Resynchronizing          begins, or goes on
    Replicating                                            has succeeded
    Suspended, ResynchronizeSuspended                      is suspended
    Error                                                  has failed
    any before the copy: given up                          is cancelled
    any before the copy: it waits for a time, say          is suspended
    Disabled, or that of another copy                      is cancelled
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvfuse import system
from hvfuse.control.database import Transaction
from hvfuse.control.events import Severity, add_event
from hvfuse.control.job import Job, JobError, JobKind
from hvfuse.control.jobs import add_job, put_job, readable_job
from hvfuse.states import BEFORE_FIRST_COPY, COPYING, OF_RESYNC, Event, ReplicationState
from hvfuse.words import bytes_text

if TYPE_CHECKING:
    from hvfuse.control.records import VmRecord

COPY_STEP, POINT_STEP = "copy", "first recovery point after it"
"""Steps of a copy's job."""

_BAD = {
    ReplicationState.ERROR: Severity.ERROR,
    ReplicationState.WAITING_FOR_START_RESYNCHRONIZE: Severity.WARNING,
    ReplicationState.SUSPENDED: Severity.WARNING,
    ReplicationState.RESYNCHRONIZE_SUSPENDED: Severity.WARNING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of a VM's record, by `events` or of fields alone, that this process makes."""

    vm: str
    before: VmRecord
    after: VmRecord
    events: tuple[Event, ...]
    now_ns: int


def follow(txn: Transaction, change: Change) -> int | None:
    """Keep what follows from a change. Returns the id of the copy's job, None if there is none any more."""
    _tell_state(txn, change)
    _tell_error(txn, change)
    open_job = change.before.copy_job
    job = readable_job(txn, open_job) if open_job is not None else None
    if job is not None and job.has_ended:
        job = None
    changed = _job_after(job, change) if change.events else job
    if changed is None:
        return None
    changed = _with_figures(changed, change)
    if changed.id == 0:
        changed = add_job(txn, changed, now_ns=change.now_ns)
    elif changed != job:
        put_job(txn, changed, now_ns=change.now_ns)
    if job is not None and changed.id != job.id:
        put_job(txn, job.cancel(change.now_ns), now_ns=change.now_ns)
    return None if changed.has_ended else changed.id


def _job_after(job: Job | None, change: Change) -> Job | None:
    """The copy's job after the events."""
    state, now_ns = change.after.state, change.now_ns
    if state in COPYING:
        return _copying(job, change)
    if job is None:
        return None
    match state:
        case ReplicationState.REPLICATING:
            after = job.succeed(now_ns)
        case ReplicationState.SUSPENDED | ReplicationState.RESYNCHRONIZE_SUSPENDED:
            after = job.suspend("suspended")
        case ReplicationState.ERROR:
            after = job.attempt_failed(_error(change.after)).fail(None, now_ns)
        case _:
            waits = state in BEFORE_FIRST_COPY | OF_RESYNC and Event.CANCEL not in change.events
            after = job.suspend("it waits") if waits else job.cancel(now_ns)
    return after


def _copying(job: Job | None, change: Change) -> Job | None:
    """The job of the copy that is under way; as it is during an export, whose command has a job of its own."""
    kind = JobKind.UPDATE_DISKS if change.after.resync_cause == "disks" else JobKind.RESYNC
    if change.after.state is ReplicationState.INITIAL_REPLICATION_IN_PROGRESS:
        kind = JobKind.INITIAL
        if change.after.copy is not None and change.after.copy["kind"] == "export":
            return job
    if job is None or job.kind is not kind:
        command = ("replication", "start", change.vm)
        job = Job(id=0, kind=kind, vm=change.vm, command=command).planned((COPY_STEP, POINT_STEP))
    step = POINT_STEP if _is_complete(change.after) else COPY_STEP
    return job.begin(system.process_identity(os.getpid()), change.now_ns).step(step, change.now_ns)


def _is_complete(record: VmRecord) -> bool:
    """Whether only the commit is left of the copy, or the first point after it."""
    return record.copy is not None and record.copy.get("report") is not None


def _with_figures(job: Job, change: Change) -> Job:
    """How far it is, and what went wrong on the way."""
    before, after = change.before, change.after
    if job.has_ended:
        return job
    if after.copy is not None and after.copy != before.copy and after.copy["kind"] != "export":
        is_complete = _is_complete(after)
        job = job.advanced(100 if is_complete else min(99, int(100 * (after.progress or 0.0))))
        if is_complete:
            job = (job if _is_complete(before) else _told(job, after.copy)).step(POINT_STEP, change.now_ns)
    if after.error is not None and after.error != before.error:
        job = job.attempt_failed(_error(after))
    return job


def _told(job: Job, copy: Mapping[str, Any]) -> Job:
    """With what the copy took, as its step tells it."""
    report = copy["report"]
    if not {"bytes_total", "bytes_sent"} <= report.keys():  # of before
        return job
    compared = report.get("bytes_compared")
    done = f"{bytes_text(report['bytes_total'])} copied" if compared is None else f"{bytes_text(compared)} compared"
    return job.note(f"{done}, {bytes_text(report['bytes_sent'])} sent")


def _error(record: VmRecord) -> JobError:
    return JobError(id="attempt-failed", message=record.error or "it failed", recommendation=record.hint)


def _tell_state(txn: Transaction, change: Change) -> None:
    before, after = change.before, change.after
    if after.state is before.state:
        return
    why = after.resync_reason if after.state in OF_RESYNC else None
    add_event(
        txn,
        kind="state",
        vm=change.vm,
        severity=_BAD.get(after.state, Severity.INFO),
        text=f"{before.state} → {after.state}" + (f": {why}" if why else ""),
        data={"from": before.state.value, "to": after.state.value, "reason": why},
        now_ns=change.now_ns,
    )


def _tell_error(txn: Transaction, change: Change) -> None:
    before, after = change.before, change.after
    if after.error == before.error:
        return
    is_over = after.error is None
    add_event(
        txn,
        kind="failure",
        vm=change.vm,
        severity=Severity.INFO if is_over else Severity.WARNING,
        text=f"over: {before.error}" if is_over else str(after.error),
        data={"error": after.error, "next_command": after.hint},
        now_ns=change.now_ns,
    )
