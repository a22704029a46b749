"""When the shipper acts next: the table of its module row by row, and its misses against a model."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvfuse.shipper.retry import LADDER
from hvfuse.shipper.schedule import BUSY_PAUSE, PASSING, Schedule

EVERY = 30.0


def schedule(due: float = 100.0) -> Schedule:
    return Schedule(EVERY, due=due)


def test_what_succeeds_in_time_is_next_due_on_the_grid() -> None:
    planned = schedule()
    assert planned.wait(60.0) == 40.0
    assert planned.succeeded(100.4, 129.0) == 0
    assert planned.due == 130.0
    assert planned.succeeded(130.2, 131.0) == 0
    assert planned.due == 160.0


def test_what_overruns_its_interval_is_next_due_at_once_and_the_grid_moves() -> None:
    planned = schedule()
    assert planned.succeeded(100.0, 195.0) == 3
    assert (planned.due, planned.wait(195.0)) == (195.0, 0.0)
    assert planned.succeeded(195.0, 196.0) == 0
    assert planned.due == 225.0


def test_what_was_asked_for_early_leaves_the_grid_as_it_is() -> None:
    planned = schedule()
    assert planned.succeeded(80.0, 82.0) == 0
    assert planned.due == 100.0
    assert planned.succeeded(90.0, 110.0) == 0
    assert planned.wait(110.0) == 0.0


def test_what_was_asked_for_early_and_overran_has_its_misses_told_once() -> None:
    planned = schedule()
    assert planned.succeeded(90.0, 195.0) == 3
    assert planned.due == 195.0
    assert planned.missed(196.0) == 0


@pytest.mark.parametrize("step", range(len(LADDER)))
def test_what_fails_and_may_pass_is_tried_again_by_the_ladder(step: int) -> None:
    planned = schedule()
    now = 100.0
    for _ in range(step + 1):
        planned.failed(now, now, lasting=False)
        now = planned.due
    assert planned.due == 100.0 + LADDER[step]


def test_what_fails_and_will_last_is_not_tried_before_somebody_asks() -> None:
    planned = schedule()
    planned.failed(100.0, 101.0, lasting=True)
    assert planned.wait(10**9) == math.inf
    assert planned.succeeded(500.0, 501.0) == 13
    assert planned.failing_since is None
    assert planned.due == 530.0


def test_somebody_else_at_the_replica_is_no_trouble_for_a_while() -> None:
    planned, now = schedule(), 100.0
    while planned.is_passing(now, now):
        assert planned.due == now + BUSY_PAUSE
        now = planned.due
    assert now == 100.0 + PASSING
    planned.failed(now, now, lasting=False)
    assert planned.due > now


def test_a_copy_that_waits_is_looked_at_every_interval_or_earlier() -> None:
    planned = schedule()
    planned.failed(100.0, 100.0, lasting=False)
    planned.waits(200.0)
    assert (planned.due, planned.failing_since) == (230.0, None)
    planned.waits(200.0, pause=10.0)
    assert planned.due == 210.0
    planned.waits(200.0, pause=99.0)
    assert planned.due == 230.0


def test_none_is_missed_while_a_copy_waits_or_is_made() -> None:
    planned, told = schedule(), 0
    for now in range(100, 4000, 30):
        planned.waits(float(now))
        told += planned.missed(now + 29.0)
    assert told == 0
    assert planned.succeeded(4000.0, 9000.0, copied=True) == 0
    assert planned.missed(9001.0) == 0
    assert planned.wait(9001.0) == 0.0


def test_a_failure_does_not_hide_what_is_missed_meanwhile() -> None:
    planned = schedule()
    planned.failed(100.0, 100.0, lasting=True)
    told = [planned.missed(now) for now in (129.0, 130.0, 159.0, 160.0, 400.0, 400.0)]
    assert told == [0, 1, 0, 1, 8, 0]


class TestAChangeOfFrequency:
    def test_brings_the_next_one_forward_and_never_puts_it_off(self) -> None:
        planned = schedule()
        planned.change_frequency(5.0, 82.0, begun=80.0)
        assert planned.due == 85.0
        planned.change_frequency(3600.0, 82.0, begun=80.0)
        assert planned.due == 85.0
        assert planned.succeeded(85.0, 86.0) == 0
        assert planned.due == 3685.0

    def test_that_shortens_what_has_passed_already_has_the_next_one_begin_at_once(self) -> None:
        planned = schedule()
        planned.change_frequency(5.0, 90.0, begun=70.0)
        assert planned.wait(90.0) == 0.0

    def test_tells_nothing_again_that_was_told(self) -> None:
        planned = schedule()
        assert planned.missed(200.0) == 3
        planned.change_frequency(10.0, 200.0, begun=70.0)
        assert planned.missed(201.0) == 0
        assert planned.missed(221.0) == 2

    def test_leaves_the_ladder_alone(self) -> None:
        planned = schedule()
        planned.failed(100.0, 100.0, lasting=False)
        planned.change_frequency(1.0, 110.0, begun=70.0)
        assert planned.due == 100.0 + LADDER[0]
        assert planned.missed(115.0) == 5


QUARTERS = st.integers(0, 1600).map(lambda number: number / 4)  # exact, however they are added up
STEPS = st.lists(
    st.tuples(st.sampled_from(["look", "succeed", "ask", "fail", "last", "busy"]), QUARTERS, QUARTERS),
    max_size=30,
)


@given(STEPS)
def test_misses_told_in_all_are_the_intervals_that_passed(steps: list[tuple[str, float, float]]) -> None:
    planned = schedule()
    now, told, passed, since = 0.0, 0, 0, planned.due
    for what, pause, took in steps:
        now += pause
        told += planned.missed(now)
        started, now = now, now + (0.0 if what == "look" else took)
        match what:
            case "succeed" | "ask":
                # What passed since the last success or the first due time, whole intervals of it.
                passed += max(0, int((now - since) // EVERY))
                told += planned.succeeded(started, now)
                since = planned.due
            case "fail" | "last":
                planned.failed(started, now, lasting=what == "last")
                assert planned.due > now
            case "busy":
                if planned.is_passing(started, now):
                    assert planned.due == now + BUSY_PAUSE
        assert planned.wait(now) >= 0
    told += planned.missed(now)
    assert told == passed + max(0, int((now - since) // EVERY))


@given(STEPS)
def test_a_success_is_followed_by_another_within_an_interval(steps: list[tuple[str, float, float]]) -> None:
    planned, now = schedule(), 0.0
    for what, pause, took in steps:
        now += pause
        started, now = now, now + took
        if what in ("fail", "last"):
            planned.failed(started, now, lasting=what == "last")
            continue
        planned.succeeded(started, now)
        assert planned.wait(now) <= EVERY or started < 100.0
