"""`hvfuse replication`: protect a VM, hold its replication up, go on with it, end it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from hvfuse.cli.main import Session
from hvfuse.cli.output import counted, emit_json, json_option, note
from hvfuse.cli.progress import showing_copy
from hvfuse.cli.replicate import make_cycle
from hvfuse.cli.resync import order_copy
from hvfuse.cli.sites import open_site
from hvfuse.control.instants import FORMS, parse_instant
from hvfuse.control.supervisor import is_supervised
from hvfuse.errors import HvfuseError, StateError, UnreachableError, UsageError
from hvfuse.states import Event, ReplicationState, next_state
from hvfuse.words import bytes_text

if TYPE_CHECKING:
    from hvfuse.control.prerequisites import Check
    from hvfuse.control.site import Site

_MARKS = {"passed": "ok", "warned": "!!", "failed": "NO", "skipped": "--"}


@click.group()
def replication() -> None:
    """Protect a VM, hold its replication up, end it.

    `hvfuse run` protects a new VM by itself, unless hvfuse.toml says protect = "manual".
    """


@replication.command()
@click.argument("vm")
@click.option("--wait/--no-wait", default=False, help="Wait for the first recovery point; the VM has to be mounted.")
@json_option
@click.pass_context
def enable(ctx: click.Context, vm: str, wait: bool, as_json: bool) -> None:
    """Protect VM: check everything that it needs, then begin.

    Where `hvfuse run` runs, the first copy begins at once. A replica that was kept when replication was
    disabled is brought up to date: only what differs travels.
    """
    from hvfuse.control import protection

    checks: list[Check] = []
    with open_site(ctx.obj, vm) as site:
        try:
            protection.enable(site, tell=lambda found: _tell(checks, found, quiet=as_json))
        except HvfuseError as error:
            if not as_json or not checks:
                raise
            _end_with(ctx, vm, checks, error)
        following = None
        point = _first_point(ctx.obj, site) if wait else None
        if point is None:
            following = _next_command(site)
    if as_json:
        fields = {"vm": vm, "enabled": True, "checks": [check.as_json() for check in checks]}
        emit_json({**fields, "point": point, "next_command": following})
        return
    click.echo(f"{vm} is protected" + (f"; its first recovery point is {point}" if point else ""))
    if following is not None:
        click.echo(f"to begin with its first copy: {following}")


@replication.command()
@click.argument("vm")
@json_option
@click.pass_context
def check(ctx: click.Context, vm: str, as_json: bool) -> None:
    """Check everything that protecting VM needs. Changes nothing of it."""
    from hvfuse.control.prerequisites import demand, make_checks

    with open_site(ctx.obj, vm) as site:
        checks = make_checks(site)
        if not as_json:
            _print(checks)
        try:
            demand(site, checks)
        except HvfuseError as error:
            if not as_json:
                raise
            _end_with(ctx, vm, checks, error)
    if as_json:
        emit_json({"vm": vm, "checks": [each.as_json() for each in checks]})
    else:
        click.echo(f"{vm} can be protected: hvfuse replication enable {vm}")


@replication.command()
@click.argument("vm")
@click.option("--at", metavar="TIME", help=f"At a time at most 7 days ahead: {FORMS}.")
@json_option
@click.pass_obj
def start(session: Session, vm: str, at: str | None, as_json: bool) -> None:
    """Begin the copy that VM needs, now or at TIME, whatever else it waits for.

    The same as `hvfuse resync VM --no-wait`, with --now or --at TIME.
    """
    if at is not None and not at:
        raise UsageError("--at needs a time", hint=f"write {FORMS}")
    at_ns = None if at is None else parse_instant(at, now_ns=time.time_ns())
    session.home_with(vm)
    with open_site(session, vm) as site:
        if site.records.orders(vm).paused:
            state = site.records.read(vm).state
            raise StateError(
                f"{vm} is {state}: nothing begins; allowed: resume", hint=f"hvfuse replication resume {vm}"
            )
        next_state(site.records.read(vm).state, Event.START, what=vm)
        lines, fields = order_copy(session, vm, site.records, at_ns=at_ns)
    if as_json:
        emit_json({"vm": vm, **fields})
        return
    for line in lines:
        click.echo(f"{vm}: {line}")


_replica_option = click.option(
    "--replica", is_flag=True, help="At the target: its store takes nothing in for VM, whoever sends it."
)


@replication.command()
@click.argument("vm")
@_replica_option
@json_option
@click.pass_obj
def suspend(session: Session, vm: str, replica: bool, as_json: bool) -> None:
    """Send nothing any more until `hvfuse replication resume VM`.

    Writes are logged, and each cycle stays a recovery point to be, until the logs pass soft_limit: then they
    are compacted.
    """
    from hvfuse.control import protection

    with open_site(session, vm) as site:
        _demand_known(session, site)
        state = protection.suspend_replica(site) if replica else protection.suspend(site)
    side = " --replica" if replica else ""
    _told(vm, state, as_json=as_json, replica=replica, more=f"; to go on: hvfuse replication resume {vm}{side}")


@replication.command()
@click.argument("vm")
@_replica_option
@json_option
@click.pass_obj
def resume(session: Session, vm: str, replica: bool, as_json: bool) -> None:
    """Go on with what was suspended, or try again at once what failed.

    Everything that was written meanwhile is sent, each sealed cycle as a recovery point of its own.
    """
    from hvfuse.control import protection

    with open_site(session, vm) as site:
        _demand_known(session, site)
        state = protection.resume_replica(site) if replica else protection.resume(site)
        is_served = is_supervised(site.home)
    if replica or as_json:
        _told(vm, state, as_json=as_json, replica=replica)
    else:
        click.echo(f"{vm}: replication goes on" + ("" if is_served else "; it needs: hvfuse run"))


@replication.command()
@click.argument("vm")
@click.option("--delete-replica", is_flag=True, help="Delete the replica too, with all its recovery points.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def disable(session: Session, vm: str, delete_replica: bool, yes: bool, as_json: bool) -> None:
    """End the replication of VM. Its disks are served on, and its recovery points stay.

    Nothing is logged any more: should it be enabled again, everything is compared, and what differs is sent.
    --delete-replica destroys the recovery points, and asks before it does.
    """
    from hvfuse.control import protection

    with open_site(session, vm) as site:
        _demand_known(session, site)
        there = protection.replica(site)
        protection.demand_disablable(site, delete_replica=delete_replica)
        if delete_replica and there is not None and not yes:
            _demand_consent(vm, there)
        protection.disable(site, delete_replica=delete_replica)
    deleted = there if delete_replica else None
    if as_json:
        gone = None if deleted is None else {"points": deleted.points, "bytes": deleted.bytes}
        emit_json({"vm": vm, "state": ReplicationState.DISABLED, "deleted": gone})
        return
    click.echo(f"{vm}: replication is disabled; its disks are served as before")
    if deleted is not None:
        click.echo(f"{vm}: the replica is deleted: {_what(deleted)}")
    elif there is not None:
        click.echo(f"{vm}: the replica stays: {_what(there)}")


@replication.command()
@click.argument("vm")
@click.option("--to", metavar="STORE", help="Replicate into this store, instead of where the other side gave way to.")
@click.option("--into", metavar="STORE", help="On the old source: its store that takes the disks.  [default: its own]")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@json_option
@click.pass_obj
def reverse(
    session: Session, vm: str, to: str | None, into: str | None, *, yes: bool, dry_run: bool, as_json: bool
) -> None:
    """Replicate VM in the other direction after a failover: first on the old source, then where it runs now.

    On the old source, its disks become the replica; what it wrote that never arrived is dropped. On the other side,
    replication to there begins: both sides are compared, and only what differs is sent.
    """
    from hvfuse.cli.reversal import give_way, turn_round
    from hvfuse.control.reversing import has_turned
    from hvfuse.states import FAILOVER_DONE

    with open_site(session, vm) as site:
        _demand_known(session, site)
        record = site.records.read(vm)
        has_it = record.state in FAILOVER_DONE and record.held is None and record.giving_way is None
        if has_it or has_turned(site):
            turn_round(session, site, to=to, dry_run=dry_run, as_json=as_json)
        else:
            give_way(session, site, into=into, yes=yes, dry_run=dry_run, as_json=as_json)


def _demand_consent(vm: str, there: object) -> None:
    """Name what goes, and ask. Raises UsageError where nobody can answer, click.Abort for a no."""
    what = f"this deletes the replica of {vm}: {_what(there)}; there is no way back"
    if not sys.stdin.isatty():
        raise UsageError(what, hint=f"if that is meant: hvfuse replication disable {vm} --delete-replica --yes")
    click.confirm(f"{what}. Delete it?", abort=True, err=True)


def _what(there: object) -> str:
    from hvfuse.control.protection import Replica

    assert isinstance(there, Replica)
    if there.is_half_deleted:
        return "what is left of one that was being deleted"
    return f"{counted(there.points, 'recovery point')}, {bytes_text(there.bytes)}"


def _demand_known(session: Session, site: Site) -> None:
    """Raises NotFoundError for a VM that has neither folder nor record nor replica."""
    from hvfuse.control import protection

    if site.vm not in site.records.names() and protection.replica(site) is None:
        session.home_with(site.vm)


def _told(vm: str, state: ReplicationState, *, as_json: bool, replica: bool, more: str = "") -> None:
    if as_json:
        emit_json({"vm": vm, "side": "replica" if replica else "source", "state": state})
    else:
        click.echo(f"{f'the replica of {vm}' if replica else vm}: {state}{more}")


def _tell(kept: list[Check], found: Sequence[Check], *, quiet: bool) -> None:
    kept += found
    if not quiet:
        for each in found:
            if each.outcome in ("warned", "failed"):
                note(f"{each.name}: {each.text}" + (f"; {each.next_command}" if each.next_command else ""))


def _print(checks: Sequence[Check]) -> None:
    for each in checks:
        click.echo(f"{_MARKS[each.outcome]}  {each.name:<16} {each.text}")
        if each.next_command is not None:
            click.echo(f"    {'':<16} {each.next_command}")


def _end_with(ctx: click.Context, vm: str, checks: Sequence[Check], error: HvfuseError) -> None:
    """One JSON object for a refusal too, with the checks in it."""
    told = {"type": type(error).__name__, "message": str(error), "hint": error.hint, "exit_code": error.exit_code}
    emit_json({"vm": vm, "checks": [each.as_json() for each in checks], "error": told})
    ctx.exit(error.exit_code)


def _first_point(session: Session, site: Site) -> str | None:
    """Make the first recovery point, or have it made. Raises UnreachableError if the VM is not mounted."""
    if not site.is_mounted:
        raise UnreachableError(
            f"{site.vm} is protected, but not mounted, so its first copy cannot begin", hint=f"hvfuse mount {site.vm}"
        )
    with showing_copy(site.records, site.vm):
        return str(make_cycle(session, site.home, site.vm, site.records)["point"])


def _next_command(site: Site) -> str | None:
    """What begins the first copy; None if `hvfuse run` does."""
    if is_supervised(site.home):
        return None
    return f"hvfuse replicate {site.vm}" if site.is_mounted else "hvfuse run"
