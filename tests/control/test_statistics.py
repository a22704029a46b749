"""Sums over stretches of time, against a list of what happened."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hvfuse.control import statistics
from hvfuse.control.database import MAP_SIZE, Database, Transaction, numbered
from hvfuse.control.records import Records
from hvfuse.control.statistics import (
    CYCLES_KEPT,
    KEPT_SECONDS,
    STRETCH,
    CycleRecord,
    Statistics,
    Sums,
    spread,
    uncounted,
)
from hvfuse.states import Event

from .children import HandClock

NOW = 1_800_000_000
SECOND = 10**9
# Floats whose sums are exact, so that the order of adding cannot show.
SMALL = st.integers(0, 10_000)
EXACT = SMALL.map(lambda number: number / 4)
VALUES = {one.name: EXACT if one.type == "float" else SMALL for one in dataclasses.fields(Sums) if one.name != "begin"}
SUMS = st.builds(Sums, begin=st.integers(0, 10**6), **VALUES)


@given(SUMS, SUMS, SUMS)
def test_adding_up_does_not_depend_on_order(one: Sums, two: Sums, three: Sums) -> None:
    assert one.plus(two) == two.plus(one)
    assert one.plus(two).plus(three) == one.plus(two.plus(three))


@given(SUMS)
def test_nothing_added_changes_nothing(one: Sums) -> None:
    assert one.plus(Sums(begin=one.begin)) == one


def test_every_figure_is_summed_or_the_greatest() -> None:
    one = Sums(begin=0, **dict.fromkeys(VALUES, 3))
    two = Sums(begin=9, **dict.fromkeys(VALUES, 5))
    both = dataclasses.asdict(one.plus(two))
    assert {name for name, value in both.items() if value == 5} == {"max_size", "max_latency", "max_frozen_seconds"}
    assert {value for name, value in both.items() if not name.startswith("max") and name != "begin"} == {8}


CYCLES = st.builds(
    CycleRecord,
    cycle=st.just(1), point=st.none(), time_ns=st.just(0), seconds=EXACT,
    bytes_logged=SMALL, bytes_coalesced=SMALL, bytes_sent=SMALL, bytes_zero=SMALL, latency=EXACT, frozen_seconds=EXACT,
    consistency=st.sampled_from(["crash-consistent", "application-consistent"]),
)  # fmt: skip
HAPPENED = st.lists(st.tuples(st.integers(0, 3 * 3600), CYCLES), max_size=20)


@settings(max_examples=40, deadline=None)
@given(HAPPENED, st.integers(0, 3 * 3600), st.integers(0, 3 * 3600))
def test_what_is_told_of_a_window_is_what_happened_in_its_stretches(
    happened: list[tuple[int, CycleRecord]], one: int, other: int
) -> None:
    first, last = NOW + min(one, other), NOW + max(one, other)
    with tempfile.TemporaryDirectory() as path:
        database = Database(path)
        for at, cycle in happened:
            database.write(
                lambda txn, at=at, cycle=cycle: statistics.add_cycle(
                    txn, "vm", cycle, now_ns=at * SECOND + NOW * SECOND
                )
            )
        database.write(lambda txn: statistics.add_cycle(txn, "other", _cycle(1), now_ns=first * SECOND))
        told = Statistics(database).over("vm", first=first, last=last)
        database.close()
    seen = [
        cycle
        for at, cycle in happened
        if (NOW + at) // STRETCH * STRETCH <= last and (NOW + at) // STRETCH * STRETCH + STRETCH > first
    ]
    consistent = sum(cycle.consistency != "crash-consistent" for cycle in seen)
    assert (told.begin, told.successful, told.app_consistent) == (first, len(seen), consistent)
    assert told.size == sum(cycle.bytes_sent for cycle in seen)
    assert told.max_size == max((cycle.bytes_sent for cycle in seen), default=0)
    assert told.mean_size == (told.size / len(seen) if seen else 0)
    assert told.latency == sum(cycle.latency for cycle in seen)
    assert told.max_latency == max((cycle.latency for cycle in seen), default=0)
    assert told.saved_by_overwriting == sum(cycle.bytes_logged - cycle.bytes_coalesced for cycle in seen)
    assert told.bytes_zero == sum(cycle.bytes_zero for cycle in seen)


@given(st.integers(0, 10**6), st.integers(0, NOW), st.integers(0, 2 * KEPT_SECONDS))
def test_misses_that_are_spread_stay_within_their_time_and_keep_their_number(
    missed: int, first: int, span: int
) -> None:
    last = first + span
    found = spread(missed, first=first, last=last)
    kept_from = max(first, last - KEPT_SECONDS)
    assert all(kept_from - STRETCH < one.begin <= last and one.begin % STRETCH == 0 for one in found)
    assert len({one.begin for one in found}) == len(found)
    counts = [one.missed for one in found]
    assert not counts or max(counts) - min(counts) <= 1
    if span <= KEPT_SECONDS:
        assert sum(counts) == missed
    else:
        assert sum(counts) == missed * KEPT_SECONDS // span


def test_a_month_without_a_process_is_no_worse_in_the_last_hour_than_a_day_without_one() -> None:
    day, month = (
        sum(one.missed for one in spread(days * 2880, first=NOW - days * 86400, last=NOW) if one.begin > NOW - 3600)
        for days in (1, 30)
    )
    assert abs(day - month) <= 12
    assert 100 <= day <= 132


def test_a_cycle_that_is_just_due_is_not_missed_yet() -> None:
    def at(seconds: float) -> int:
        return uncounted(NOW * SECOND, NOW * SECOND + int(seconds * SECOND), 30.0)

    assert [at(0), at(29), at(59.9), at(60), at(89), at(90), at(3600), at(-100)] == [0, 0, 0, 1, 1, 2, 119, 0]
    assert uncounted(None, NOW * SECOND, 30.0) == 0


def test_sums_of_long_ago_go_and_cycles_beyond_the_bound(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    for day in range(20):
        now_ns = (NOW + day * 86400) * SECOND
        database.write(lambda txn, now_ns=now_ns: statistics.add_cycle(txn, "vm", _cycle(1), now_ns=now_ns))
    with database.read() as txn:
        kept = txn.numbers(b"sums/vm/")
    assert (len(kept), kept[0]) == (9, (NOW + 11 * 86400) // STRETCH * STRETCH)
    assert Statistics(database).over("vm", first=0, last=2 * NOW).successful == 9
    for number in range(statistics.CYCLES_KEPT + 3):
        database.write(lambda txn, number=number: txn.put(numbered(b"cycle/vm/", number + 21), _fields(number)))
    database.write(lambda txn: statistics.add_cycle(txn, "vm", _cycle(9), now_ns=NOW * SECOND))
    with database.read() as txn:
        assert len(txn.numbers(b"cycle/vm/")) == statistics.CYCLES_KEPT
    assert [one.cycle for one in Statistics(database).cycles("vm", newest=2)] == [statistics.CYCLES_KEPT + 2, 9]


def _cycle(number: int) -> CycleRecord:
    return CycleRecord(
        cycle=number, point=None, time_ns=0, bytes_logged=3, bytes_coalesced=2, bytes_sent=1, seconds=0.5
    )


def _fields(number: int) -> dict[str, object]:
    return dataclasses.asdict(_cycle(number))


# Misses that nobody counts ------------------------------------------------------------------------------


def missed(records: Records, clock: HandClock) -> int:
    return records.statistics.over("vm", first=0, last=int(clock.at)).missed


def test_a_time_without_a_shipper_is_counted_when_the_next_one_begins_and_once(tmp_path: Path) -> None:
    clock = HandClock()
    with Records(str(tmp_path), clock=clock) as records:
        mine = records.of("vm")
        mine.apply(Event.ENABLE, Event.COMMIT_POINT)
        clock.at += 3600
        mine.count_absence(30.0)
        assert missed(records, clock) == 119
        mine.count_absence(30.0)
        assert missed(records, clock) == 119


def test_restarts_in_a_row_do_not_hide_that_nothing_is_shipped(tmp_path: Path) -> None:
    clock = HandClock()
    with Records(str(tmp_path), clock=clock) as records:
        mine = records.of("vm")
        mine.apply(Event.ENABLE, Event.COMMIT_POINT)
        for _ in range(80):
            clock.at += 45
            mine.count_absence(30.0)
        assert missed(records, clock) == 119


def test_no_cycle_is_missed_where_none_is_expected_or_one_was_made(tmp_path: Path) -> None:
    clock = HandClock()
    with Records(str(tmp_path), clock=clock) as records:
        mine = records.of("vm")
        mine.apply(Event.ENABLE)
        clock.at += 3600
        mine.count_absence(30.0)
        mine.missed(5)
        mine.apply(Event.START)
        clock.at += 3600
        mine.apply(Event.COMMIT_POINT)
        mine.count_absence(30.0)
        assert missed(records, clock) == 0
        for _ in range(100):
            clock.at += 30
            records.add_cycle("vm", _cycle(1))
        mine.count_absence(30.0)
        assert missed(records, clock) == 0
        mine.missed(2)
        assert missed(records, clock) == 2


def test_counting_anew_forgets_the_sums_and_keeps_the_cycles(tmp_path: Path) -> None:
    clock = HandClock()
    with Records(str(tmp_path), clock=clock) as records:
        records.of("vm").apply(Event.ENABLE, Event.COMMIT_POINT)
        records.add_cycle("vm", _cycle(1))
        clock.at += 3600
        records.reset("vm")
        record = records.read("vm")
        assert record.measured_since_ns == record.counted_ns == clock.now_ns()
        assert records.statistics.over("vm", first=0, last=int(clock.at)) == Sums(begin=0)
        assert len(records.cycles("vm")) == 1


def test_what_is_kept_of_a_thousand_vms_has_room_in_the_records(tmp_path: Path) -> None:
    big = 2**40
    cycle = CycleRecord(
        cycle=10**6, point="73a4ac11-000001", time_ns=NOW * SECOND, bytes_logged=big, bytes_coalesced=big,
        bytes_sent=big, seconds=12.3456789, bytes_zero=big, latency=23.456789, frozen_seconds=1.2345678,
    )  # fmt: skip
    database = Database(str(tmp_path))

    def keep(txn: Transaction) -> None:
        for number in range(CYCLES_KEPT):
            now_ns = (NOW + number * KEPT_SECONDS // CYCLES_KEPT) * SECOND
            statistics.add_cycle(txn, "vm", cycle, now_ns=now_ns)

    database.write(keep)
    database.close()
    assert 1000 * (tmp_path / "data.mdb").stat().st_size < MAP_SIZE / 2
