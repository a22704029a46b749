"""`hvfuse status`, and how a VM's status is shown wherever it is shown."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from hvfuse.cli.main import Session
from hvfuse.cli.output import emit_json, is_terminal, json_option, one_line, time_text
from hvfuse.cli.wiring import store_facts
from hvfuse.control.copying import percent
from hvfuse.control.records import Records, VmRecord
from hvfuse.control.status import Health, VmStatus, is_protected, vm_status
from hvfuse.control.supervisor import find_vms
from hvfuse.errors import NotFoundError, UsageError
from hvfuse.words import bytes_text, duration_text

if TYPE_CHECKING:
    from rich.table import Table

    from hvfuse.shipper.orders import Orders
    from hvfuse.shipper.proofs import Verified

WATCH_SECONDS = 2.0
PIPE_WIDTH = 10_000
"""Columns where no terminal limits them: nothing is cut."""
_EXIT_CODES = {Health.NORMAL: 0, Health.WARNING: 3, Health.CRITICAL: 4}
_COPY_FIELDS = (
    "kind", "generation", "pass", "bytes_total", "bytes_done", "bytes_sent", "bytes_saved", "seconds",
    "bytes_per_second", "seconds_left",
)  # fmt: skip
_COLOURS = {Health.NORMAL: "green", Health.WARNING: "yellow", Health.CRITICAL: "red"}


@click.command()
@click.argument("vm", required=False)
@click.option("--watch", is_flag=True, help="Show it again every 2 seconds, until Ctrl-C.")
@click.option("--check", is_flag=True, help="Exit with 3 if the worst health is Warning, 4 if Critical.")
@json_option
@click.pass_obj
def status(session: Session, vm: str | None, watch: bool, check: bool, as_json: bool) -> None:
    """Show how replication is doing: state, health, and what the target lacks.

    RPO is the age of the newest recovery point; pending is what the logs hold that the store lacks.
    Below a VM that is not well stand the reasons, each with the next command to type.
    """
    if watch and as_json:
        raise UsageError("--watch shows text: it does not go together with --json", hint="hvfuse status --help")
    with statuses(session) as ask:
        while True:
            found = ask()
            if vm is not None:
                found = [one for one in found if one.name == vm]
                if not found:
                    raise NotFoundError(f"there is no VM {vm} in {session.home.disks}", hint="hvfuse status")
            if watch:
                click.clear()
            show(found, as_json=as_json, disks=session.home.disks)
            if not watch:
                break
            time.sleep(WATCH_SECONDS)
    if check:
        worst = max((one.health for one in found), default=Health.NORMAL)
        click.get_current_context().exit(_EXIT_CODES[worst])


@contextmanager
def statuses(session: Session, records: Records | None = None) -> Iterator[Callable[[], list[VmStatus]]]:
    """What asks all VMs of the home how they are, again whenever it is called.

    `records`: those that this process has open already.
    """
    home = session.home
    with ExitStack() as stack:
        if records is None and os.path.isdir(home.records):
            records = stack.enter_context(Records(home.records))
        facts = stack.enter_context(store_facts(home))

        def ask() -> list[VmStatus]:
            known = {vm: records.read(vm) for vm in records.names()} if records is not None else {}
            protected = {vm for vm, record in known.items() if is_protected(record)}
            return [
                vm_status(
                    home,
                    vm,
                    record=known.get(vm, VmRecord()),
                    policy=session.config.policy(vm),
                    points=facts.points,
                    forgotten=facts.forgotten,
                    now_ns=time.time_ns(),
                )
                for vm in sorted({*protected, *find_vms(home)})
            ]

        yield ask


def show(found: Sequence[VmStatus], *, as_json: bool, disks: str) -> None:
    """Print statuses: JSON, or a table with the reasons below it."""
    if as_json:
        emit_json({"vms": [as_fields(one) for one in found]})
        return
    if not found:
        click.echo(f"There is no VM yet. Put a disk into {disks}/NAME/, or start `hvfuse run` to get a sample.")
        return
    from rich.console import Console

    console = Console(width=None if is_terminal() else PIPE_WIDTH)
    console.print(table(found))
    for line in (*reason_lines(found), *_verified_lines(found)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def as_fields(status: VmStatus) -> dict[str, Any]:
    """A status as it stands in JSON. Times are ISO 8601 in UTC; what is not known is null."""
    last = status.last_replication_time_ns
    return {
        "name": status.name,
        "state": status.state.value,
        "health": str(status.health),
        "last_cycle": status.last_cycle,
        "last_replication_time": None if last is None else time_text(last),
        "rpo_seconds": None if status.rpo_seconds is None else round(status.rpo_seconds, 3),
        "pending_bytes": status.pending_bytes,
        "points": status.points,
        "copy": copy_fields(status.copy),
        "copy_due": None if status.copy_due_ns is None else time_text(status.copy_due_ns),
        "orders": orders_fields(status.orders),
        "verified": None if status.verified is None else _verified_fields(status.verified),
        "disks": [
            {"name": disk.name, "format": disk.format, "size": disk.size, "log_bytes": disk.log_bytes}
            for disk in status.disks
        ],
        "reasons": [
            {
                "id": reason.id,
                "health": str(reason.health),
                "text": reason.text,
                "next_command": reason.next_command,
            }
            for reason in status.reasons
        ],
    }


def copy_fields(copy: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How far a copy is, as it stands in JSON."""
    return None if copy is None else {name: copy[name] for name in _COPY_FIELDS}


def _verified_fields(verified: Verified) -> dict[str, Any]:
    """What verification proved, as it stands in JSON. `continuous`: bytes a second in idle time, 0 for none."""
    last = verified.last_run
    return {
        "proved_30d": round(verified.proved_30d, 4),
        "oldest": None if verified.oldest_ns is None else time_text(verified.oldest_ns),
        "continuous": verified.budget,
        "last_run": None if last is None else {"finished": time_text(last["finished_ns"]), **_run_fields(last)},
        "mismatches": [
            {
                "disk": mismatch.disk,
                "offset": mismatch.extent.offset,
                "length": mismatch.extent.length,
                "found": time_text(mismatch.found_ns),
            }
            for mismatch in verified.mismatches
        ],
    }


def _run_fields(run: Mapping[str, Any]) -> dict[str, Any]:
    names = ("seed", "bytes_compared", "bytes_unproved", "mismatch_bytes", "seconds")
    return {name: run[name] for name in names}


def _verified_lines(found: Sequence[VmStatus]) -> Iterator[str]:
    """How much of the VMs is proved, of those that ever were verified."""
    for one in found:
        if one.verified is not None:
            yield one_line(f"{one.name}: {one.verified.text}")


def orders_fields(orders: Orders) -> dict[str, Any]:
    """What an administrator ordered of copies, as it stands in JSON."""
    fields = orders.as_json()
    at_ns = fields.pop("at_ns")
    return {"at": None if at_ns is None else time_text(at_ns), **fields}


def table(found: Sequence[VmStatus]) -> Table:
    """The statuses for a terminal."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    # A narrow terminal cuts what it must, but never what tells the VMs apart and how they are.
    shown.add_column("VM", no_wrap=True, min_width=max((cell_len(one.name) for one in found), default=0))
    shown.add_column("STATE", no_wrap=True, min_width=max((len(_state_text(one)) for one in found), default=0))
    for column in ("HEALTH", "LATEST POINT", "RPO", "PENDING", "POINTS"):
        shown.add_column(column, no_wrap=True, justify="right" if column in ("PENDING", "POINTS") else "left")
    for one in found:
        shown.add_row(
            Text(one.name),
            _state_text(one),
            f"[{_COLOURS[one.health]}]{one.health}[/]",
            one.latest_point or "-",
            "unknown" if one.rpo_seconds is None else duration_text(one.rpo_seconds),
            bytes_text(one.pending_bytes),
            str(one.points),
        )
    return shown


def _state_text(status: VmStatus) -> str:
    progress = f" {percent(status.copy)}%" if status.copy is not None else ""
    return f"{status.state}{progress}"


def reason_lines(found: Sequence[VmStatus]) -> Iterator[str]:
    """Why VMs are not well, and what to type."""
    for one in found:
        for reason in one.reasons:
            yield one_line(f"{one.name}: {reason.health}: {reason.text}")
            if reason.next_command:
                yield f"    next: {reason.next_command}"


def plain_line(status: VmStatus) -> str:
    """One line for a log: "sample: Replicating, point 1f3b9c2e-000001, 0 B pending"."""
    point = f"point {status.latest_point}" if status.latest_point else "no point yet"
    worst = next((reason.text for reason in status.reasons if reason.health is status.health), None)
    trouble = f"; {status.health}: {worst}" if worst is not None else ""
    return f"{status.name}: {_state_text(status)}, {point}, {bytes_text(status.pending_bytes)} pending{trouble}"
