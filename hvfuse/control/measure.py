"""How a VM's replication did over a stretch of time: what `Measure-VMReplication` tells, and a little more. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvfuse.control.instants import parse_span
from hvfuse.control.records import VmRecord, uncounted
from hvfuse.control.statistics import STRETCH, Sums, spread, total
from hvfuse.errors import UsageError

LEAST_SECONDS, MOST_SECONDS = float(STRETCH), 7 * 86400.0
"""How short and how long a window may be: sums are kept by the stretch, for some days more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """From the second `begin` to `end`, since 1970."""

    begin: int
    end: int


def parse_window(text: str) -> float:
    """ "12h" as seconds. Raises UsageError."""
    seconds = parse_span(text) or 0
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        raise UsageError(f"{text!r} is not a window of time", hint='write "5m" to "7d", such as "12h"')
    return float(seconds)


def window(record: VmRecord, seconds: float, now_ns: int) -> Window:
    """The last `seconds`, or less if measuring was begun anew since."""
    begin_ns = max(now_ns - int(seconds * 1e9), record.measured_since_ns or 0)
    return Window(begin=min(begin_ns, now_ns) // 10**9, end=now_ns // 10**9)


def with_absence(sums: Sums, record: VmRecord, span: Window, *, frequency: float, now_ns: int) -> Sums:
    """With the misses that nobody counted, as no process ran; those within `span`. `frequency`: seconds."""
    missed = uncounted(record, now_ns, frequency)
    if not missed:
        return sums
    assert record.counted_ns is not None
    absent = spread(missed, first=record.counted_ns // 10**9, last=span.end)
    return total([sums, *(one for one in absent if one.begin > span.begin - STRETCH)], begin=sums.begin)


def fields(sums: Sums, record: VmRecord, span: Window) -> dict[str, Any]:
    """The figures by name, as JSON and CSV have them but for times, which are ns since 1970 and end in `_ns`. Sizes in
    bytes, `_seconds` in seconds."""
    test: Mapping[str, Any] = record.last_test or {}
    return {
        "window_begin_ns": span.begin * 10**9,
        "window_end_ns": span.end * 10**9,
        "successful_cycles": sums.successful,
        "missed_cycles": sums.missed,
        "network_failures": sums.network_failures,
        "replication_failures": sums.replication_failures,
        "app_consistent_failures": sums.app_failures,
        "app_consistent_points": sums.app_consistent,
        "mean_bytes": round(sums.mean_size),
        "max_bytes": sums.max_size,
        "mean_latency_seconds": round(sums.mean_latency, 3),
        "max_latency_seconds": round(sums.max_latency, 3),
        "mean_frozen_seconds": round(sums.mean_frozen_seconds, 3),
        "max_frozen_seconds": round(sums.max_frozen_seconds, 3),
        "saved_by_overwriting_bytes": sums.saved_by_overwriting,
        "saved_by_zeroes_bytes": sums.bytes_zero,
        "saved_by_compression_bytes": sums.saved_by_compression,
        "last_replication_time_ns": record.last_replication_time_ns,
        "last_applied_time_ns": record.last_applied_time_ns,
        "last_test_failover_ns": test.get("started_ns"),
        "last_test_failover_point": test.get("point"),
        "last_test_failover_note": test.get("note"),
        "late_cycles": sums.late,
        "last_test_failover_validation": _verdict(test),
    }


def _verdict(test: Mapping[str, Any]) -> str | None:
    """What the validation of a test failover came to; None if there was none."""
    found = test.get("validation")
    return None if found is None else "passed" if found["ok"] else "failed"
