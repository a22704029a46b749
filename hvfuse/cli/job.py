"""`hvfuse job`: what was done and what is under way; end it, go on with it, do it again."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Sequence
from typing import Any

import click

from hvfuse import system
from hvfuse.cli.main import Session, cli
from hvfuse.cli.output import emit_json, json_option, one_line, print_table, time_text
from hvfuse.cli.wiring import kept_records, require_known
from hvfuse.control.job import COPY_KINDS, Action, Job, JobKind, JobState
from hvfuse.control.records import Records
from hvfuse.errors import BusyError, NotFoundError, StateError
from hvfuse.words import duration_text

RECENT_SECONDS = 86400
"""What ended longer ago is only listed with --all."""
END_SECONDS = 30.0
"""How long to wait for a process that was asked to end."""
_LOOK_SECONDS = 0.1
_COLUMNS = ("ID", "KIND", "VM", "STATE", "STARTED", "TOOK")


@click.group()
def job() -> None:
    """Show jobs: copies, test failovers, verifications, exports, imports. End them, or go on with them."""


@job.command("list")
@click.argument("vm", required=False)
@click.option("--all", "everything", is_flag=True, help="Also those that ended more than a day ago.")
@json_option
@click.pass_obj
def list_jobs(session: Session, vm: str | None, everything: bool, as_json: bool) -> None:
    """List the jobs of VM, or of all VMs, the newest last."""
    now_ns = time.time_ns()
    with kept_records(session.home) as records:
        jobs = [] if records is None else records.jobs.all()
        if not any(vm in (None, each.vm) for each in jobs):
            require_known(session.home, records, vm)
    found = [
        each
        for each in jobs
        if (vm is None or each.vm == vm)
        and (everything or each.ended_ns is None or each.ended_ns > now_ns - RECENT_SECONDS * 10**9)
    ]
    if as_json:
        emit_json({"jobs": [_fields(each, now_ns) for each in found]})
    elif found:
        _print_list(found, now_ns)
    else:
        click.echo("There is no job." if everything else "There is no job of the last day.")


@job.command()
@click.argument("job_id", metavar="ID", type=int)
@json_option
@click.pass_obj
def show(session: Session, job_id: int, as_json: bool) -> None:
    """Show a job's steps, what went wrong, and what may be done now."""
    with kept_records(session.home) as records:
        found = _job(records, job_id)
    if as_json:
        emit_json(_fields(found, time.time_ns()))
        return
    for line in _lines(found, time.time_ns()):
        click.echo(line)


@job.command()
@click.argument("job_id", metavar="ID", type=int)
@json_option
@click.pass_obj
def cancel(session: Session, job_id: int, as_json: bool) -> None:
    """Give a job up.

    A copy is cancelled as by `hvfuse resync VM --cancel`; a command that is under way is interrupted.
    """
    lines: tuple[str, ...] = ()
    with kept_records(session.home) as records:
        found = _allowed(records, job_id, Action.CANCEL)
        assert records is not None
        if found.kind in COPY_KINDS:
            lines = _resync(session, records, found.vm, "cancel")
        elif found.kind is JobKind.PLAN:
            from hvfuse.control.plan_run import give_up

            give_up(session.home, records, found.vm)
            records.jobs.change(job_id, lambda job: job if job.has_ended else job.cancel(time.time_ns()))
        elif found.state is JobState.IN_PROGRESS:
            lines = _interrupt(session, records, found)
        else:
            records.jobs.change(job_id, lambda job: job.cancel(time.time_ns()))
        after = records.jobs.get(job_id)
    if as_json:
        emit_json(_fields(after, time.time_ns()))
        return
    for line in lines or (f"job {job_id} is {after.state}",):
        click.echo(f"{one_line(found.vm)}: {line}")


@job.command()
@click.argument("job_id", metavar="ID", type=int)
@json_option
@click.pass_context
def resume(ctx: click.Context, job_id: int, as_json: bool) -> None:
    """Go on with a job that is held up.

    A copy goes on as by `hvfuse resync VM --resume`, or begins as by `--now` if it only waits.
    """
    _again(ctx, job_id, Action.RESUME, as_json=as_json)


@job.command()
@click.argument("job_id", metavar="ID", type=int)
@json_option
@click.pass_context
def restart(ctx: click.Context, job_id: int, as_json: bool) -> None:
    """Do again, as a new job, what failed or was cancelled, and wait for it."""
    _again(ctx, job_id, Action.RESTART, as_json=as_json)


# What is done -------------------------------------------------------------------------------------------


def _job(records: Records | None, job_id: int) -> Job:
    if records is None:
        raise NotFoundError(f"there is no job {job_id}", hint="hvfuse job list")
    return records.jobs.get(job_id)


def _allowed(records: Records | None, job_id: int, action: Action) -> Job:
    """The job, if it allows that. Raises NotFoundError, StateError saying what it allows."""
    found = _job(records, job_id)
    if action not in found.allowed:
        allowed = ", ".join(found.allowed) or "nothing"
        hint = f"hvfuse job {found.allowed[0]} {job_id}" if found.allowed else f"hvfuse job show {job_id}"
        raise StateError(
            f"job {job_id}, {found.kind} of {found.vm}, is {found.state}: {action} is not possible now; "
            f"allowed: {allowed}",
            hint=hint,
        )
    return found


def _resync(session: Session, records: Records, vm: str, verb: str) -> tuple[str, ...]:
    from hvfuse.cli.resync import carry_out

    return carry_out(session, records, vm, verb).lines


def _interrupt(session: Session, records: Records, found: Job) -> tuple[str, ...]:
    """Do to the job's process what Ctrl-C does, and wait until it has ended. Raises BusyError if it does not."""
    owner = found.owner or {}
    system.signal_process(owner, signal.SIGINT)
    deadline = time.monotonic() + END_SECONDS
    while True:
        records.jobs.bury()
        if records.jobs.get(found.id).has_ended:
            break
        if time.monotonic() > deadline:
            raise BusyError(
                f"job {found.id}: its process (pid {owner['pid']}) was asked to end, and has not yet",
                hint=f"hvfuse job show {found.id}",
            )
        time.sleep(_LOOK_SECONDS)
    copy = records.read(found.vm).copy
    if found.kind is JobKind.EXPORT and copy is not None and copy["kind"] == "export":
        return _resync(session, records, found.vm, "cancel")  # the command only waited for the shipper
    return ()


def _again(ctx: click.Context, job_id: int, action: Action, *, as_json: bool) -> None:
    """Go on with a job, or do it again, in this process."""
    session: Session = ctx.obj
    with kept_records(session.home) as records:
        found = _allowed(records, job_id, action)
        assert records is not None
        if found.kind in COPY_KINDS:
            is_held_up = action is Action.RESUME and records.orders(found.vm).suspended
            lines = _resync(session, records, found.vm, "resume" if is_held_up else "now")
            if as_json:
                emit_json(_fields(records.jobs.get(job_id), time.time_ns()))
            for line in () if as_json else lines:
                click.echo(f"{one_line(found.vm)}: {line}")
            return
    # The records are closed: they must not be opened twice in one process.
    debug = ("--debug",) if session.debug else ()
    words = ["--home", session.root, *debug, *found.command, *(("--json",) if as_json else ())]
    code = cli.main(words, prog_name="hvfuse", standalone_mode=False)
    ctx.exit(code if isinstance(code, int) else 0)


# How it is shown ----------------------------------------------------------------------------------------


def _print_list(jobs: Sequence[Job], now_ns: int) -> None:
    rows = []
    for each in jobs:
        took = _seconds(each, now_ns)
        is_open = each.state in (JobState.IN_PROGRESS, JobState.SUSPENDED)
        rows.append(
            (
                str(each.id),
                each.kind.value,
                each.vm,
                f"{each.state} {each.percent}%" if is_open else each.state.value,
                "-" if each.started_ns is None else time_text(each.started_ns),
                "-" if took is None else duration_text(took),
            )
        )
    print_table(_COLUMNS, rows, right=("ID",))
    for each in jobs:
        if where := _where(each):
            click.echo(one_line(f"job {each.id}: {where}"))


def _where(job: Job) -> str:
    """The step that it is at, or why it is at none."""
    if job.state is JobState.FAILED and job.errors:
        return job.errors[-1].message
    at = next((step for step in job.steps if step.state in (JobState.IN_PROGRESS, JobState.SUSPENDED)), None)
    return "" if at is None else f"{at.name}: {at.text}" if at.text else at.name


def _seconds(job: Job, now_ns: int) -> float | None:
    """From when it began until it ended, or until now."""
    return None if job.started_ns is None else max(0, (job.ended_ns or now_ns) - job.started_ns) / 1e9


def _lines(job: Job, now_ns: int) -> list[str]:
    took = _seconds(job, now_ns)
    lines = [one_line(f"job {job.id}: {job.kind} of {job.vm}: {job.state}, {job.percent} %")]
    if job.started_ns is not None and took is not None:
        ended = "" if job.ended_ns is None else f", ended {time_text(job.ended_ns)}"
        lines.append(f"started {time_text(job.started_ns)}{ended}, {duration_text(took)}")
    for step in job.steps:
        times = [time_text(at) for at in (step.started_ns, step.ended_ns) if at is not None]
        text = f": {step.text}" if step.text else ""
        lines.append(one_line(f"  {step.state:11}  {step.name}{text}  {' to '.join(times)}".rstrip()))
    for error in job.errors:
        lines.append(one_line(f"error {error.id}: {error.message}"))
        lines += [one_line(f"  cause: {cause}") for cause in error.causes]
        lines += [one_line(f"  to do: {error.recommendation}")] if error.recommendation else []
    lines.append(f"allowed: {', '.join(job.allowed) or 'nothing'}")
    return [*lines, f"next: {job.next_command}"] if job.next_command else lines


def _fields(job: Job, now_ns: int) -> dict[str, Any]:
    took = _seconds(job, now_ns)
    return {
        "id": job.id,
        "kind": job.kind.value,
        "vm": job.vm,
        "state": job.state.value,
        "percent": job.percent,
        "started": _time(job.started_ns),
        "ended": _time(job.ended_ns),
        "seconds": None if took is None else round(took, 3),
        "steps": [
            {
                "name": step.name,
                "state": step.state.value,
                "started": _time(step.started_ns),
                "ended": _time(step.ended_ns),
                "text": step.text,
            }
            for step in job.steps
        ],
        "errors": [
            {
                "id": error.id,
                "message": error.message,
                "causes": list(error.causes),
                "recommendation": error.recommendation,
            }
            for error in job.errors
        ],
        "allowed": [action.value for action in job.allowed],
        "next_command": job.next_command,
        "command": f"hvfuse {shlex.join(job.command)}" if job.command else None,
    }


def _time(time_ns: int | None) -> str | None:
    return None if time_ns is None else time_text(time_ns)
