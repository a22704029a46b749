"""`hvfuse measure`: how replication did over the last hours."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from typing import Any

import click

from hvfuse.cli.main import Session
from hvfuse.cli.output import counted, emit_json, json_option, note, one_line, time_text
from hvfuse.cli.status import health_field, statuses
from hvfuse.control import measure as measuring
from hvfuse.control.records import Records
from hvfuse.control.status import VmStatus
from hvfuse.errors import CorruptError, NotFoundError, UsageError
from hvfuse.words import bytes_text, duration_text


@click.command()
@click.argument("vm", required=False)
@click.option(
    "--window", "window_text", metavar="TIME", help='How far to look back: "5m" to "7d".  [as [monitoring] says]'
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV (RFC 4180): a header, and a line for each VM.")
@click.option("--reset", is_flag=True, help="Begin to count anew from now on. The records of cycles stay.")
@json_option
@click.pass_obj
def measure(
    session: Session, vm: str | None, *, window_text: str | None, as_csv: bool, reset: bool, as_json: bool
) -> None:
    """Tell how replication of VM, or of all VMs, did: cycles made and missed, sizes, latencies, failures.

    Cycles that were due while no process ran are missed, too. Sums are kept by stretches of 5 minutes, for
    8 days.
    """
    if as_csv and as_json:
        raise UsageError("--csv and --json do not go together", hint="hvfuse measure --help")
    if reset and (as_csv or window_text is not None):
        raise UsageError("--reset shows nothing: it stands alone, or with --json", hint="hvfuse measure --help")
    seconds = session.config.monitoring.interval if window_text is None else measuring.parse_window(window_text)
    home = session.home
    session.prepare()
    with Records(home.records) as records, statuses(session, records) as ask:
        found = [one for one in ask() if vm is None or one.name == vm]
        if vm is not None and not found:
            raise NotFoundError(f"there is no VM {vm} in {home.disks}", hint="hvfuse measure")
        if reset:
            for one in found:
                records.reset(one.name)
            _tell_reset([one.name for one in found], as_json=as_json)
            return
        rows = []
        for one in found:
            try:
                rows.append(_row(session, records, one, seconds))
            except CorruptError as error:  # no reason to keep silent of the others
                if vm is not None:
                    raise
                note(f"hvfuse: {one_line(str(error))}")
    if as_json:
        emit_json({"window_seconds": seconds, "vms": rows})
    elif as_csv:
        click.echo(_csv(rows), nl=False)
    else:
        for row in rows:
            _tell(row)


def _tell_reset(vms: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        emit_json({"reset": list(vms)})
        return
    for vm in vms:
        click.echo(f"{one_line(vm)}: counted anew from now on")


def _row(session: Session, records: Records, status: VmStatus, seconds: float) -> dict[str, Any]:
    """One VM's figures, as they stand in JSON."""
    now_ns, record = time.time_ns(), records.read(status.name)
    span = measuring.window(record, seconds, now_ns)
    sums = records.statistics.over(status.name, first=span.begin, last=span.end)
    frequency = session.config.policy(status.name).frequency
    sums = measuring.with_absence(sums, record, span, frequency=frequency, now_ns=now_ns)
    figures = measuring.fields(sums, record, span)
    return {
        "name": status.name,
        "state": status.state.value,
        "health": health_field(status),
        "health_details": [reason.text for reason in status.reasons],
        "pending_bytes": status.pending_bytes,
        **{name.removesuffix("_ns"): _shown(name, value) for name, value in figures.items()},
    }


def _shown(name: str, value: Any) -> Any:
    return time_text(value) if name.endswith("_ns") and value is not None else value


_COLUMNS = (
    "name", "state", "health", "health_details", "pending_bytes", "window_begin", "window_end", "successful_cycles",
    "missed_cycles", "network_failures", "replication_failures", "app_consistent_failures", "app_consistent_points",
    "mean_bytes", "max_bytes", "mean_latency_seconds", "max_latency_seconds", "mean_frozen_seconds",
    "max_frozen_seconds", "saved_by_overwriting_bytes", "saved_by_zeroes_bytes", "saved_by_compression_bytes",
    "last_replication_time", "last_applied_time", "last_test_failover", "last_test_failover_point",
    "last_test_failover_note", "late_cycles", "last_test_failover_validation",
)  # fmt: skip
"""Of the CSV: a new one goes to the end."""


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\r\n", extrasaction="raise")
    writer.writeheader()
    for row in rows:
        plain = {**row, "health_details": "; ".join(row["health_details"])}
        writer.writerow({name: one_line(value) if isinstance(value, str) else value for name, value in plain.items()})
    return text.getvalue()


def _tell(row: dict[str, Any]) -> None:
    """One VM for a person: a headline, and a line for each kind of figure."""
    due = row["successful_cycles"] - row["late_cycles"] + row["missed_cycles"]
    part = f" ({round(100 * row['missed_cycles'] / due)} % of those due)" if due else ""
    late = f", {row['late_cycles']} of them late" if row["late_cycles"] else ""
    failures = f"{row['network_failures']} of the network, {row['replication_failures']} others"
    points = counted(row["app_consistent_points"], "app-consistent point")
    saved = ", ".join(
        f"{bytes_text(row[f'saved_by_{how}_bytes'])} by {how}" for how in ("overwriting", "zeroes", "compression")
    )
    click.echo(
        f"{one_line(row['name'])}: {row['state']}, {row['health']}, {row['window_begin']} to {row['window_end']}"
    )
    for title, text in (
        ("cycles", f"{row['successful_cycles']} made{late}, {row['missed_cycles']} missed{part}"),
        ("failures", failures),
        ("size", f"mean {bytes_text(row['mean_bytes'])}, greatest {bytes_text(row['max_bytes'])}"),
        ("latency", _mean_and_greatest(row, "latency")),
        ("saved", saved),
        ("guest", f"{points}, {row['app_consistent_failures']} failed; frozen: {_mean_and_greatest(row, 'frozen')}"),
        ("pending", "unknown" if row["pending_bytes"] is None else bytes_text(row["pending_bytes"])),
        ("replicated", f"{row['last_replication_time'] or 'never'}, applied {row['last_applied_time'] or 'never'}"),
        ("test", _test_text(row)),
        *(("health", detail) for detail in row["health_details"]),
    ):
        click.echo(f"  {title:10}  {one_line(text)}")


def _mean_and_greatest(row: dict[str, Any], what: str) -> str:
    mean, greatest = (duration_text(row[f"{which}_{what}_seconds"]) for which in ("mean", "max"))
    return f"mean {mean}, greatest {greatest}"


def _test_text(row: dict[str, Any]) -> str:
    if row["last_test_failover"] is None:
        return "none was ever cleaned up"
    verdict = row["last_test_failover_validation"]
    validated = f", validation {verdict}" if verdict else ""
    note = f": {row['last_test_failover_note']}" if row["last_test_failover_note"] else ""
    return f"{row['last_test_failover']}, of point {row['last_test_failover_point']}{validated}{note}"
