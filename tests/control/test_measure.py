"""What is told of a window of time, and what a window is."""

from __future__ import annotations

import pytest

from hvfuse.control.measure import fields, parse_window, window, with_absence
from hvfuse.control.records import VmRecord
from hvfuse.control.statistics import Sums
from hvfuse.errors import UsageError
from hvfuse.states import ReplicationState

NOW = 1_800_000_000
SECOND = 10**9


@pytest.mark.parametrize(("text", "seconds"), [("5m", 300), ("300s", 300), ("12h", 43200), ("7d", 604800)])
def test_a_window_is_a_span_of_time(text: str, seconds: int) -> None:
    assert parse_window(text) == seconds


@pytest.mark.parametrize("text", ["", "12", "4m", "8d", "-1h", "1 h", "1.5h", "99999999999d"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a window of time"):
        parse_window(text)


def test_a_window_reaches_back_no_further_than_measuring_does() -> None:
    assert window(VmRecord(), 3600, NOW * SECOND).begin == NOW - 3600
    assert window(VmRecord(measured_since_ns=(NOW - 60) * SECOND), 3600, NOW * SECOND).begin == NOW - 60
    assert window(VmRecord(measured_since_ns=(NOW - 7200) * SECOND), 3600, NOW * SECOND).begin == NOW - 3600
    ahead = window(VmRecord(measured_since_ns=(NOW + 60) * SECOND), 3600, NOW * SECOND)
    assert (ahead.begin, ahead.end) == (NOW, NOW)


def absent(state: ReplicationState, ago: float | None, span: float = 3600.0) -> int:
    counted = None if ago is None else int((NOW - ago) * SECOND)
    record = VmRecord(state=state, counted_ns=counted)
    seen = window(record, span, NOW * SECOND)
    return with_absence(Sums(begin=seen.begin, missed=1), record, seen, frequency=30.0, now_ns=NOW * SECOND).missed - 1


@pytest.mark.parametrize("state", ReplicationState)
def test_what_nobody_counts_is_missed_only_where_a_cycle_is_expected(state: ReplicationState) -> None:
    expected = state in (ReplicationState.REPLICATING, ReplicationState.ERROR)
    assert absent(state, 600) == (19 if expected else 0)


def test_only_what_lies_in_the_window_is_missed_in_it() -> None:
    state = ReplicationState.REPLICATING
    assert [absent(state, None), absent(state, 20), absent(state, 45)] == [0, 0, 0]
    assert absent(state, 86400) == pytest.approx(120, abs=11)
    assert absent(state, 20 * 86400, span=86400) == pytest.approx(2880, abs=11)


def test_figures_are_told_per_cycle_and_what_was_saved_by_cause() -> None:
    sums = Sums(
        begin=0, successful=4, missed=1, network_failures=2, replication_failures=3, app_consistent=2, app_failures=5,
        size=400, max_size=300, latency=2.0, max_latency=1.25, frozen_seconds=0.5, max_frozen_seconds=0.375,
        bytes_logged=10_000, bytes_coalesced=8_000, bytes_zero=1_000,
    )  # fmt: skip
    record = VmRecord(
        last_test={"point": "p-1", "started_ns": 5, "ended_ns": 9, "note": "it boots", "validation": {"ok": False}}
    )
    told = fields(sums, record, window(record, 3600, NOW * SECOND))
    assert told == {
        "window_begin_ns": (NOW - 3600) * SECOND,
        "window_end_ns": NOW * SECOND,
        "successful_cycles": 4,
        "missed_cycles": 1,
        "late_cycles": 0,
        "network_failures": 2,
        "replication_failures": 3,
        "app_consistent_failures": 5,
        "app_consistent_points": 2,
        "mean_bytes": 100,
        "max_bytes": 300,
        "mean_latency_seconds": 0.5,
        "max_latency_seconds": 1.25,
        "mean_frozen_seconds": 0.25,
        "max_frozen_seconds": 0.375,
        "saved_by_overwriting_bytes": 2_000,
        "saved_by_zeroes_bytes": 1_000,
        "saved_by_compression_bytes": 6_600,
        "last_replication_time_ns": None,
        "last_applied_time_ns": None,
        "last_test_failover_ns": 5,
        "last_test_failover_point": "p-1",
        "last_test_failover_note": "it boots",
        "last_test_failover_validation": "failed",
    }
