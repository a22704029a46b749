"""`hvfuse point`: the recovery points of a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hvfuse.cli import wiring
from hvfuse.cli.main import Session
from hvfuse.cli.output import emit_json, json_option, print_table, time_text
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
@click.pass_obj
def list_points(session: Session, vm: str, as_json: bool) -> None:
    """List a VM's recovery points, the newest last."""
    with wiring.kept_records(session.home) as records:
        place = wiring.location_of(session, vm, records)
    with place.open(read_only=True) as store:
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
