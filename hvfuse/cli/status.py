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
from hvfuse.cli.screen import detail, reason_lines, summary, table
from hvfuse.cli.wiring import StoreFacts, store_facts
from hvfuse.control import measure
from hvfuse.control.config import Config
from hvfuse.control.facts import RECORD_DAMAGED, Past, Trouble
from hvfuse.control.forecast import LOOK_BACK, Forecast
from hvfuse.control.records import Records, VmRecord
from hvfuse.control.status import Health, VmStatus, is_protected, vm_status
from hvfuse.control.supervisor import find_vms
from hvfuse.errors import CorruptError, HvfuseError, NotFoundError, UsageError

if TYPE_CHECKING:
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


@click.command()
@click.argument("vm", required=False)
@click.option("--watch", is_flag=True, help="Show it again every 2 seconds, until Ctrl-C.")
@json_option
@click.pass_obj
def status(session: Session, vm: str | None, watch: bool, as_json: bool) -> None:
    """Show how replication is doing: state, health, and what would be lost if the source were gone now.

    Of all VMs, or everything there is to know of one. RPO is the age of the newest recovery point; pending is what
    was written and the store lacks. Below a VM that is not well stand the reasons, each with the next command to type.

    Ends with 0 if all is well, 3 if the worst health is Warning, 4 if it is Critical.
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
            show(found, as_json=as_json, disks=session.home.disks, whole=vm is not None)
            if not watch:
                break
            time.sleep(WATCH_SECONDS)
    worst = max((one.health for one in found), default=Health.NORMAL)
    click.get_current_context().exit(_EXIT_CODES[worst])


@contextmanager
def statuses(session: Session, records: Records | None = None) -> Iterator[Callable[[], list[VmStatus]]]:
    """What asks all VMs of the home how they are, again whenever it is called.

    `records`: those that this process has open already.
    """
    home = session.home
    with ExitStack() as stack:
        kept = records
        facts = stack.enter_context(store_facts(session, lambda: kept))

        def ask() -> list[VmStatus]:
            nonlocal kept
            if kept is None and os.path.isdir(home.records):  # maybe only since this is watched
                kept = stack.enter_context(Records(home.records))
            now_ns = time.time_ns()
            known = {} if kept is None else {vm: _read(kept, vm, session.config, now_ns) for vm in kept.names()}
            shown = {vm for vm, (record, _, fault) in known.items() if is_protected(record) or fault is not None}
            found = []
            for vm in sorted({*shown, *find_vms(home), *_failed_over(facts, session)}):
                record, past, fault = known.get(vm, (VmRecord(), Past(), None))
                found.append(
                    vm_status(
                        home,
                        vm,
                        record=record,
                        policy=session.config.policy(vm),
                        target=facts.facts,
                        past=past,
                        now_ns=now_ns,
                        config_fault=session.config_file.fault,
                        record_fault=fault,
                    )
                )
            return found

        yield ask


def _failed_over(facts: StoreFacts, session: Session) -> list[str]:
    """The VMs of the home's own store that it does not have itself: replicas, and what was failed over to here."""
    try:
        return facts.held(session.home.store)
    except (HvfuseError, OSError):  # told of each VM that it is asked for
        return []


def _read(records: Records, vm: str, config: Config, now_ns: int) -> tuple[VmRecord, Past, Trouble | None]:
    """What is kept of a VM; that it cannot be read concerns no other."""
    try:
        record = records.read(vm)
        return record, _past(records, vm, record, config, now_ns=now_ns), None
    except CorruptError as error:
        hint = "move state/records away while nothing runs: it is made anew, without orders, jobs, events and figures"
        return VmRecord(), Past(), Trouble(id=RECORD_DAMAGED, text=str(error), hint=hint)


def _past(records: Records, vm: str, record: VmRecord, config: Config, *, now_ns: int) -> Past:
    """What the monitoring interval tells of a VM."""
    interval, frequency = config.monitoring.interval, config.policy(vm).frequency
    span = measure.window(record, interval, now_ns)
    sums = records.statistics.over(vm, first=span.begin, last=span.end)
    return Past(
        interval=interval,
        sums=measure.with_absence(sums, record, span, frequency=frequency, now_ns=now_ns),
        cycles=records.statistics.cycles(vm, newest=LOOK_BACK),
    )


def show(found: Sequence[VmStatus], *, as_json: bool, disks: str, whole: bool = False) -> None:
    """Print statuses: JSON, or a table with the reasons below it; `whole`: everything there is to know."""
    if as_json:
        emit_json({"vms": [as_fields(one) for one in found]})
        return
    if not found:
        click.echo(f"There is no VM yet. Put a disk into {disks}/NAME/, or start `hvfuse run` to get a sample.")
        return
    from rich.console import Console

    console = Console(width=None if is_terminal() else PIPE_WIDTH)
    if whole:
        lines = [line for one in found for line in detail(one)]
    else:
        console.print(table(found))
        lines = [*reason_lines(found), *_verified_lines(found), *summary(found)]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def as_fields(status: VmStatus) -> dict[str, Any]:
    """A status as it stands in JSON. Times are ISO 8601 in UTC; what is not known is null."""
    last = status.last_replication_time_ns
    return {
        "name": status.name,
        "role": status.role,
        "state": status.state.value,
        "health": health_field(status),
        "allowed": list(status.allowed),
        "last_cycle": status.last_cycle,
        "last_replication_time": None if last is None else time_text(last),
        "rpo_seconds": None if status.rpo_seconds is None else round(status.rpo_seconds, 3),
        "pending_bytes": status.pending_bytes,
        "doubtful_bytes": status.doubtful_bytes,
        "points": status.points,
        "latest_point": status.latest_point,
        "replica_state": None if status.replica_state is None else status.replica_state.value,
        "tests": status.tests,
        "frequency": status.frequency,
        "monitoring": _monitoring_fields(status.past),
        "forecast": _forecast_fields(status.forecast),
        "copy": copy_fields(status.copy),
        "copy_due": None if status.copy_due_ns is None else time_text(status.copy_due_ns),
        "orders": orders_fields(status.orders),
        "verified": None if status.verified is None else _verified_fields(status.verified),
        "disks": [
            {"name": disk.name, "format": disk.format, "size": disk.size, "log_bytes": disk.log_bytes}
            for disk in status.disks
        ],
        "excluded": list(status.excluded),
        "reasons": [
            {
                **reason.as_json(),
                "allowed": list(status.allowed),
                "evidence": dict(reason.evidence),
            }
            for reason in status.reasons
        ],
    }


def health_field(status: VmStatus) -> str:
    """The health as it stands in JSON."""
    return str(status.health) if status.is_protected or status.reasons else "NotApplicable"


def _monitoring_fields(past: Past) -> dict[str, Any]:
    """What the monitoring interval tells, as it stands in JSON."""
    sums = past.sums
    return {
        "interval_seconds": past.interval,
        "successful": sums.successful,
        "missed": sums.missed,
        "network_failures": sums.network_failures,
        "replication_failures": sums.replication_failures,
        "mean_latency_seconds": round(sums.mean_latency, 3),
        "mean_bytes": round(sums.mean_size),
    }


def _forecast_fields(forecast: Forecast) -> dict[str, Any]:
    """How the logs grow, as it stands in JSON."""
    return {
        "bytes_per_second": None if forecast.rate is None else round(forecast.rate),
        "log_bytes": forecast.used,
        "soft_limit_bytes": forecast.soft_limit,
        "hard_limit_bytes": forecast.hard_limit,
        "seconds_to_soft_limit": forecast.seconds_to_soft_limit,
        "seconds_to_hard_limit": forecast.seconds_to_hard_limit,
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
