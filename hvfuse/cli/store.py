"""`hvfuse store`: what the target store holds, and whether it is whole."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from hvfuse.cli.output import counted, emit_json, is_terminal, json_option, note, time_text
from hvfuse.errors import CorruptError
from hvfuse.words import bytes_text

if TYPE_CHECKING:
    from hvfuse.target.usage import StoreUsage, VmUsage


WIDTH = 160
"""Columns of the table where no terminal says how many there are."""


def store_path(ctx: click.Context) -> str:
    """The directory of the installation's store."""
    return str(ctx.obj.home.store)


@click.group()
def store() -> None:
    """Examine the target store."""


@store.command()
@json_option
@click.pass_context
def info(ctx: click.Context, as_json: bool) -> None:
    """Show the VMs in the store, their recovery points, and the room they take."""
    from hvfuse.target.store import Store
    from hvfuse.target.usage import usage

    with Store(store_path(ctx), create=False, read_only=True) as opened:
        found = usage(opened)
    if as_json:
        emit_json(_usage_fields(found))
    else:
        _print_usage(found)


@store.command()
@json_option
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Verify every frame, the extent index, the chain of cycles, images and pins. Changes nothing.

    Ends with 7 when something is damaged; everything is looked at in any case.
    """
    from hvfuse.target.check import check as check_store
    from hvfuse.target.store import Store
    from hvfuse.target.usage import usage

    with Store(store_path(ctx), create=False, read_only=True) as opened:
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
    from rich.console import Console
    from rich.table import Table

    click.echo(f"store     {found.path}, format {found.format}, epoch {found.epoch}")
    click.echo(
        f"database  {bytes_text(found.database_bytes)} on disk, map of {bytes_text(found.map_size)}; "
        f"{bytes_text(found.free_bytes)} free"
    )
    if not found.vms:
        click.echo("no VMs yet")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("VM", "state", "position", "newest point"):
        table.add_column(title)
    for title in ("points", "journal", "base", "pins"):
        table.add_column(title, justify="right")
    for vm in found.vms:
        newest = time_text(vm.newest.time_ns) if vm.newest else "-"
        row = (vm.name, vm.state, vm.position or "first copy not complete", newest, str(vm.points))
        table.add_row(*row, bytes_text(vm.journal_bytes), bytes_text(vm.base_bytes), str(vm.pins))
    width = None if is_terminal() else WIDTH
    Console(markup=False, highlight=False, width=width).print(table)
