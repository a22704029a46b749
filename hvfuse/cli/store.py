"""`hvfuse store`: what the target store holds, and whether it is whole."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from hvfuse.cli.output import counted, emit_json, json_option, note, print_table, time_text
from hvfuse.cli.wiring import kept_records
from hvfuse.errors import CorruptError, NotFoundError
from hvfuse.words import bytes_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hvfuse.cli.main import Session
    from hvfuse.target.store import Store
    from hvfuse.target.usage import StoreUsage, VmUsage

_COLUMNS = ("VM", "STATE", "POSITION", "NEWEST POINT", "POINTS", "JOURNAL", "BASE", "PINS")


@click.group()
def store() -> None:
    """Examine the home's own store.

    VMs whose `target` is another home's store lie there: ask that home.
    """


def _own(session: Session, elsewhere: Mapping[str, str]) -> Store:
    """The home's own store. Raises NotFoundError, which tells of the VMs that lie elsewhere."""
    from hvfuse.target.store import Store

    try:
        return Store(session.home.store, create=False, read_only=True)
    except NotFoundError as error:
        if elsewhere:
            error.hint = "; ".join(_elsewhere_lines(elsewhere))
        raise


def _elsewhere(session: Session) -> dict[str, str]:
    """The VMs of this home whose replicas lie in other stores, and in which."""
    from hvfuse.control.location import all_vms, location_of

    with kept_records(session.home) as records:
        places = [location_of(session.home, session.config, records, vm) for vm in all_vms(session.home, records)]
    return {place.vm: place.path for place in places if not place.is_own}


def _elsewhere_lines(elsewhere: Mapping[str, str]) -> list[str]:
    return [f"{vm} lies elsewhere: in {path}" for vm, path in elsewhere.items()]


@store.command()
@json_option
@click.pass_obj
def info(session: Session, as_json: bool) -> None:
    """Show the VMs in the store, their recovery points, and the room they take."""
    from hvfuse.target.usage import usage

    elsewhere = _elsewhere(session)
    with _own(session, elsewhere) as opened:
        found = usage(opened)
    if as_json:
        emit_json({**_usage_fields(found), "elsewhere": elsewhere})
        return
    _print_usage(found)
    for line in _elsewhere_lines(elsewhere):
        click.echo(line)


@store.command()
@json_option
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Verify every frame, the extent index, the chain of cycles, images and pins. Changes nothing.

    Ends with 7 when something is damaged; everything is looked at in any case.
    """
    from hvfuse.target.check import check as check_store
    from hvfuse.target.usage import usage

    with _own(ctx.obj, _elsewhere(ctx.obj)) as opened:
        expected = sum(vm.journal_bytes for vm in usage(opened).vms)
        with click.progressbar(
            length=expected, label="Verifying", file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as bar:
            report = check_store(opened, progress=bar.update)
    if as_json:
        emit_json(
            {
                "ok": not report.findings,
                "vms": report.vms,
                "points": report.points,
                "frames": report.frames,
                "frame_bytes": report.frame_bytes,
                "findings": [{"vm": finding.vm, "what": finding.what} for finding in report.findings],
            }
        )
    else:
        what = ", ".join(
            (counted(report.vms, "VM"), counted(report.points, "recovery point"), counted(report.frames, "frame"))
        )
        click.echo(f"{what}, {bytes_text(report.frame_bytes)}: {len(report.findings) or 'nothing'} wrong")
    for finding in report.findings:
        note(f"hvfuse: {finding}")
    ctx.exit(CorruptError.exit_code if report.findings else 0)


def _usage_fields(found: StoreUsage) -> dict[str, object]:
    return {
        "path": found.path,
        "format": found.format,
        "epoch": found.epoch,
        "map_size": found.map_size,
        "database_bytes": found.database_bytes,
        "free_bytes": found.free_bytes,
        "vms": [_vm_fields(vm) for vm in found.vms],
    }


def _vm_fields(vm: VmUsage) -> dict[str, object]:
    return {
        "name": vm.name,
        "state": vm.state,
        "position": vm.position,
        "disks": vm.disks,
        "points": vm.points,
        "oldest_point": vm.oldest and {"id": vm.oldest.id, "time": time_text(vm.oldest.time_ns)},
        "newest_point": vm.newest and {"id": vm.newest.id, "time": time_text(vm.newest.time_ns)},
        "cycles_in_journal": vm.cycles,
        "journal_bytes": vm.journal_bytes,
        "base_bytes": vm.base_bytes,
        "pins": vm.pins,
    }


def _print_usage(found: StoreUsage) -> None:
    click.echo(f"store     {found.path}, format {found.format}, epoch {found.epoch}")
    click.echo(
        f"database  {bytes_text(found.database_bytes)} on disk, map of {bytes_text(found.map_size)}; "
        f"{bytes_text(found.free_bytes)} free"
    )
    if not found.vms:
        click.echo("no VMs yet")
        return
    rows = [
        (
            vm.name,
            vm.state,
            vm.position or "none yet",
            time_text(vm.newest.time_ns) if vm.newest else "-",
            str(vm.points),
            bytes_text(vm.journal_bytes),
            bytes_text(vm.base_bytes),
            str(vm.pins),
        )
        for vm in found.vms
    ]
    print_table(_COLUMNS, rows, right=_COLUMNS[4:])
