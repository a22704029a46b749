"""`hvfuse failover planned`, `unplanned`, `change-point`, `commit`, `cancel`: a failover's flows, on both sides."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from hvfuse.cli import wiring
from hvfuse.cli.main import Session
from hvfuse.cli.output import emit_json, json_option, time_text
from hvfuse.cli.progress import showing
from hvfuse.cli.sites import open_site
from hvfuse.control import flows, trial
from hvfuse.control.job import JobKind
from hvfuse.errors import StateError, UsageError
from hvfuse.states import AFTER_FAILOVER, ReplicationState
from hvfuse.words import bytes_text

if TYPE_CHECKING:
    from hvfuse.control.failed_over import Failover, Options
    from hvfuse.control.site import Site
    from hvfuse.manifest import RecoveryPoint

POINT_HELP = (
    "The recovery point: latest, latest-app-consistent, an id (see `hvfuse point list`), or a time such as "
    "2026-11-22T18:30, which means the last one not after it."
)

_yes = click.option("--yes", is_flag=True, help="Do not ask.")
_dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
_force = click.option("--force", is_flag=True, help="End the mount although programs use it.")
_boot = click.option("--boot", is_flag=True, help="Start the guest that [vm.NAME.guest] describes.")
_validate = click.option(
    "--validate", is_flag=True, help="Run the validation hook of [vm.NAME.guest], and keep its verdict."
)


def consent(what: str, question: str, *, yes: bool, command: str) -> None:
    """Name what is going to happen, and ask. Raises UsageError where nobody can answer, click.Abort for a no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(what, hint=f"if that is meant: {command} --yes")
    click.confirm(f"{what}. {question}", abort=True, err=True)


def show_plan(kind: JobKind, vm: str, steps: tuple[flows.FlowStep, ...], *, as_json: bool) -> None:
    """What `--dry-run` prints."""
    if as_json:
        emit_json(flows.as_json(kind, vm, steps))
        return
    for line in flows.as_text(kind, vm, steps):
        click.echo(line)


def is_source(site: Site) -> bool:
    """Whether this home has the VM, or had it until it was failed over."""
    return site.records.read(site.vm).state is not ReplicationState.DISABLED


@click.command()
@click.argument("vm")
@_boot
@_validate
@_yes
@_dry_run
@json_option
@click.pass_obj
def planned(session: Session, vm: str, *, boot: bool, validate: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Fail VM over without any loss: first on its source, then on the target.

    On the source, nobody may use its disks any more: they become read-only, the last cycle is sent, and all disks are
    compared with the replica. On the target, the disks then appear under mnt/VM. Nothing is final before
    `hvfuse failover commit`.
    """
    from hvfuse.control.failed_over import Options

    with open_site(session, vm) as site:
        if is_source(site):
            if dry_run:
                return show_plan(JobKind.PLANNED_FAILOVER, vm, flows.PREPARE, as_json=as_json)
            return _prepare(session, site, yes=yes, as_json=as_json)
        options = Options(boot=boot, validate=validate)
        return _fail_over(site, "planned", options, yes=yes, dry_run=dry_run, as_json=as_json)


def _prepare(session: Session, site: Site, *, yes: bool, as_json: bool) -> None:
    from hvfuse.control import planned as source

    vm = site.vm
    what = f"this makes the disks of {vm} read-only here, until the failover is cancelled"
    consent(what, "Go on?", yes=yes, command=f"hvfuse failover planned {vm}")
    with showing(f"{vm}: comparing both sides", quiet=as_json) as progress:
        point = source.prepare(
            site,
            wiring.party(site.home),
            ship=lambda: wiring.shipper(site.home, session.config_file, vm, site.records),
            progress=progress,
        )
    proved = site.records.read(vm).prepared or {}
    following = f"hvfuse failover planned {vm}"
    if as_json:
        state = ReplicationState.PREPARED_FOR_FAILOVER
        emit_json(
            {"vm": vm, "state": state, "point": point, "proved": proved, "next_command": f"on the target: {following}"}
        )
        return
    click.echo(
        f"{vm} is prepared at recovery point {point}: {bytes_text(proved['bytes'])} compared, equal on both sides"
    )
    click.echo(f"its disks are read-only here; next, on the target: {following}")
    click.echo(f"to go back instead: hvfuse failover cancel {vm}")


@click.command()
@click.argument("vm")
@click.option("--point", default=trial.LATEST, show_default=True, metavar="P", help=POINT_HELP)
@_boot
@_validate
@_yes
@_dry_run
@json_option
@click.pass_obj
def unplanned(
    session: Session, vm: str, *, point: str, boot: bool, validate: bool, yes: bool, dry_run: bool, as_json: bool
) -> None:
    """Fail VM over at a recovery point, on the target, as its source is lost.

    Its disks appear under mnt/VM at once. What is written to them is kept apart: until `hvfuse failover commit`,
    the VM can be failed over at another point (`change-point`), or given back to its source (`cancel`).
    """
    from hvfuse.control.failed_over import Options

    with open_site(session, vm) as site:
        options = Options(point=point, boot=boot, validate=validate)
        _fail_over(site, "unplanned", options, yes=yes, dry_run=dry_run, as_json=as_json)


def _fail_over(
    site: Site,
    kind: str,
    options: Options,
    *,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from hvfuse.control.failed_over import KINDS

    vm = site.vm
    if dry_run:
        steps = flows.failover(boot=options.boot, validate=options.validate)
        return show_plan(KINDS[kind], vm, steps, as_json=as_json)
    with _failover(site) as here:
        if kind == "unplanned":
            what = f"this fails {vm} over; what its source wrote after the recovery point is not in it"
            consent(what, "Go on?", yes=yes, command=f"hvfuse failover unplanned {vm}")
        chosen = here.begin(kind, options)
    return _told_standing(site, chosen, as_json=as_json)


def _told_standing(site: Site, chosen: RecoveryPoint, *, as_json: bool) -> None:
    from hvfuse.control.fence import read_replica

    vm, replica = site.vm, read_replica(site.store_path, site.vm)
    assert replica is not None
    commands = {
        "commit": f"hvfuse failover commit {vm}",
        "change_point": f"hvfuse failover change-point {vm} --point P",
        "cancel": f"hvfuse failover cancel {vm}",
    }
    if as_json:
        emit_json({
            "vm": vm, "state": replica.state, "point": chosen.id, "time": time_text(chosen.time_ns),
            "mountpoint": site.home.mountpoint(vm), "epoch": replica.epoch, "next_commands": commands,
        })  # fmt: skip
        return
    click.echo(f"{vm} is failed over at recovery point {chosen.id} ({time_text(chosen.time_ns)})")
    click.echo(f"its disks are in {site.home.mountpoint(vm)}, writable")
    click.echo(f"to keep it: {commands['commit']}")
    click.echo(f"to try another point: {commands['change_point']}; to give it back: {commands['cancel']}")


@click.command("change-point")
@click.argument("vm")
@click.option("--point", required=True, metavar="P", help=POINT_HELP)
@_boot
@_validate
@_force
@_yes
@_dry_run
@json_option
@click.pass_obj
def change_point(
    session: Session,
    vm: str,
    *,
    point: str,
    boot: bool,
    validate: bool,
    force: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Have VM failed over at another recovery point instead. What was written since the failover is dropped."""
    from hvfuse.control.failed_over import Options

    with open_site(session, vm) as site:
        if dry_run:
            steps = flows.change_point(boot=boot, validate=validate)
            return show_plan(JobKind.UNPLANNED_FAILOVER, vm, steps, as_json=as_json)
        with _failover(site) as here:
            what = f"this drops what was written to the disks of {vm} since the failover"
            consent(what, "Go on?", yes=yes, command=f"hvfuse failover change-point {vm} --point {point}")
            chosen = here.change_point(Options(point=point, boot=boot, validate=validate, force=force))
        return _told_standing(site, chosen, as_json=as_json)


@click.command()
@click.argument("vm")
@click.option("--wait", is_flag=True, help="Wait until the disks are hydrated.")
@_yes
@_dry_run
@json_option
@click.pass_obj
def commit(session: Session, vm: str, *, wait: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Keep VM where it was failed over to, for good. Its other recovery points are let go.

    Its disks become plain, tracked images in the background, while the VM runs on. Then it can be replicated in the
    other direction: `hvfuse replication reverse`.
    """
    with open_site(session, vm) as site:
        if dry_run:
            return show_plan(JobKind.COMMIT, vm, flows.COMMIT, as_json=as_json)
        with _failover(site) as here:
            what = f"this makes the failover of {vm} final, and lets its other recovery points go"
            consent(what, "Commit?", yes=yes, command=f"hvfuse failover commit {vm}")
            here.commit()
        if wait:
            wait_hydrated(site, quiet=as_json)
        following = f"hvfuse replication reverse {vm}"
        if as_json:
            emit_json({"vm": vm, "state": ReplicationState.FAILED_OVER, "next_command": following})
            return None
        click.echo(f"{vm} is this home's now; its disks are hydrated" + _hydrated_by(site, wait=wait))
        click.echo(f"to protect it again, first on the side that it came from, then here: {following}")
        return None


def _hydrated_by(site: Site, *, wait: bool) -> str:
    """Who does it."""
    if wait:
        return ""
    return " in the background" if site.is_mounted else f" once it is mounted: hvfuse mount {site.vm}"


def wait_hydrated(site: Site, *, quiet: bool) -> None:
    """Wait, with progress, until the disks of a VM that is committed are plain and tracked. Raises UnreachableError if
    nobody serves it."""
    from hvfuse.control.hydrating import hydration

    with showing(f"{site.vm}: hydrating", quiet=quiet) as progress:
        while (left := hydration(site.home, site.vm)) is not None:
            progress(left.done, left.total)
            site.clock.sleep(0.2)


@click.command()
@click.argument("vm")
@_force
@_yes
@_dry_run
@json_option
@click.pass_obj
def cancel(session: Session, vm: str, *, force: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Take VM's failover back: on the target one that is not committed, on the source one that is prepared.

    On the target, what was written to the disks since the failover is dropped, and the source goes on as before.
    """
    from hvfuse.control import planned as source

    with open_site(session, vm) as site:
        at_source = is_source(site)
        if dry_run:
            steps = flows.REOPEN if at_source else flows.CANCEL
            return show_plan(JobKind.CANCEL_FAILOVER, vm, steps, as_json=as_json)
        if at_source:
            source.cancel(site, wiring.party(site.home))
            state = site.records.read(vm).state
        else:
            with _failover(site) as here:
                what = f"this drops what was written to the disks of {vm} since the failover"
                consent(what, "Cancel the failover?", yes=yes, command=f"hvfuse failover cancel {vm}")
                here.cancel(force=force)
            state = ReplicationState.REPLICATING
        if as_json:
            emit_json({"vm": vm, "state": state, "side": "source" if at_source else "replica"})
            return None
        click.echo(
            f"{vm}: the failover is cancelled; "
            + ("its disks are writable again" if at_source else "it is its source's again")
        )
        return None


@contextmanager
def _failover(site: Site) -> Iterator[Failover]:
    """The flows of the target. Raises NotFoundError, StateError at the source of the VM."""
    from hvfuse.control.failed_over import Failover

    record = site.records.read(site.vm)
    if record.state in AFTER_FAILOVER and record.held is not None:
        is_prepared = record.state is ReplicationState.PREPARED_FOR_FAILOVER
        hint = f"on the target; or take it back: hvfuse failover cancel {site.vm}" if is_prepared else "do it there"
        raise StateError(f"{site.vm} is {record.state}: {record.held}", hint=hint)
    with site.location.open() as store:
        store.vm(site.vm)  # raises NotFoundError
        home, came_home = site.home, record.gave_way_ns is not None
        guest = wiring.guest_of(home, site.vm, directory=home.mountpoint(site.vm), comes_home=came_home)
        yield Failover(site, wiring.party(home), store, guest=guest, adopt=wiring.adopter(site, store))
