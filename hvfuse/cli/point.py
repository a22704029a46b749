"""`hvfuse point`: the recovery points of a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hvfuse.cli.output import emit_json, json_option, print_table, time_text
from hvfuse.cli.store import store_path
from hvfuse.words import bytes_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hvfuse.manifest import RecoveryPoint


@click.group()
def point() -> None:
    """List recovery points."""


@point.command(name="list")
@click.argument("vm", metavar="VM")
@json_option
@click.pass_context
def list_points(ctx: click.Context, vm: str, as_json: bool) -> None:
    """List a VM's recovery points, the newest last."""
    from hvfuse.target.store import Store

    with Store(store_path(ctx), create=False, read_only=True) as store:
        points = store.points(vm)
        pinned = {pin.point_id for pin in store.pins(vm)}
    if as_json:
        emit_json({"vm": vm, "points": [_fields(point, pinned) for point in points]})
    elif points:
        _print(points, pinned)
    else:
        click.echo(f"{vm} has no recovery points yet")


def _fields(point: RecoveryPoint, pinned: set[str]) -> dict[str, object]:
    return {
        "id": point.id,
        "time": time_text(point.time_ns),
        "kind": point.consistency.value,
        "cycle": point.cycle,
        "stored_bytes": point.stored_bytes,
        "pinned": point.id in pinned,
        "definition": point.definition or None,
    }


def _print(points: Sequence[RecoveryPoint], pinned: set[str]) -> None:
    rows = [
        (
            each.id,
            time_text(each.time_ns),
            each.consistency.value,
            bytes_text(each.stored_bytes),
            "in use" if each.id in pinned else "",
        )
        for each in points
    ]
    print_table(("POINT", "TIME", "KIND", "SIZE", ""), rows, right=("SIZE",))
