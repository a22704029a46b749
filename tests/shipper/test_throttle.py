"""How fast frames may travel: the schedule, the bucket, and the replica that waits."""

from __future__ import annotations

import itertools
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvfuse.shipper.policy import CurrentPolicy, ShippingPolicy
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.throttle import BURST_SECONDS, LOOK_SECONDS, Bucket, Limit, Throttle, ThrottledReplica
from hvfuse.shipper.window import Window
from tests.shipper.logs import MemoryReplica

BERLIN = ZoneInfo("Europe/Berlin")
WEEKDAYS = frozenset(range(5))
OFFICE = Window(8 * 60, 18 * 60)
NIGHT = Window(22 * 60, 6 * 60)
THROTTLE = Throttle((Limit(10.0, WEEKDAYS, OFFICE), Limit(20.0, frozenset({5, 6})), Limit(30.0, frozenset({4}), NIGHT)))

TIMES = {
    "2026-11-23 08:00": 10.0,  # a Monday
    "2026-11-23 07:59": None,
    "2026-11-23 17:59": 10.0,
    "2026-11-23 18:00": None,
    "2026-11-28 12:00": 20.0,
    "2026-11-29 23:59": 20.0,
    "2026-11-30 00:00": None,
    "2026-11-27 21:59": None,  # the Friday
    "2026-11-27 22:00": 30.0,
    "2026-11-28 03:00": 20.0,  # the first that fits, not the closest
    "2026-11-27 03:00": None,  # that belongs to the night of Thursday
}


@pytest.mark.parametrize("at", TIMES)
def test_the_first_limit_that_fits_decides(at: str) -> None:
    now_ns = round(datetime.fromisoformat(at).replace(tzinfo=BERLIN).timestamp()) * 10**9
    assert THROTTLE.rate(now_ns, BERLIN) == TIMES[at]


def test_the_hours_after_midnight_belong_to_the_evening_before() -> None:
    friday = Throttle((Limit(30.0, frozenset({4}), NIGHT),))
    for at, rate in (("2026-11-28 05:59", 30.0), ("2026-11-28 06:00", None), ("2026-11-28 22:30", None)):
        now_ns = round(datetime.fromisoformat(at).replace(tzinfo=BERLIN).timestamp()) * 10**9
        assert friday.rate(now_ns, BERLIN) == rate, at


def test_without_a_limit_it_goes_as_fast_as_it_can() -> None:
    assert Throttle().rate(0) is None
    assert Bucket(0).delay(1 << 40, None, 0) == 0


def paced(bucket: Bucket, now: float, frames: list[tuple[float, int, float | None]]) -> list[tuple[float, float, int]]:
    """Send frames, each after an idle time, at a rate. Returns when each went: (asked for, sent, size)."""
    sent = []
    for idle, size, rate in frames:
        asked = now = now + idle
        while (wait := bucket.delay(size, rate, now)) > 0:
            now += min(max(wait, 0.001), LOOK_SECONDS)
        bucket.take(size)
        sent.append((asked, now, size))
    return sent


RATES = st.sampled_from([1e5, 1e6, 123_456.0, 1e8])
IDLE = st.one_of(st.just(0.0), st.floats(0, 5), st.floats(0, 1e6))
SIZES = st.one_of(st.integers(128, 9000), st.integers(1, 9 << 20))


@given(rate=RATES, frames=st.lists(st.tuples(IDLE, SIZES), min_size=1, max_size=40))
def test_no_span_lets_more_through_than_the_rate_and_one_burst(rate: float, frames: list[tuple[float, int]]) -> None:
    sent = paced(Bucket(7.0), 7.0, [(idle, size, rate) for idle, size in frames])
    for first in range(len(sent)):
        for last in range(first, len(sent)):
            span = sent[last][1] - sent[first][1]
            through = [size for _, _, size in sent[first : last + 1]]
            assert sum(through) <= rate * span * (1 + 1e-9) + max(rate * BURST_SECONDS, *through) + 1


@given(rate=RATES, frames=st.lists(st.tuples(IDLE, SIZES), min_size=1, max_size=40))
def test_no_frame_waits_longer_than_what_went_before_it_takes(rate: float, frames: list[tuple[float, int]]) -> None:
    sent = paced(Bucket(7.0), 7.0, [(idle, size, rate) for idle, size in frames])
    before = 0
    for asked, at, size in sent:
        assert at - asked <= (before + min(size, rate)) / rate + 0.002
        before = max(0, size - rate)  # what a frame is larger than a burst, the next one waits for
    total = sum(size for *_, size in sent)
    idle = sum(idle for idle, _ in frames)
    assert sent[-1][1] - 7.0 <= idle + total / rate + BURST_SECONDS + 0.002 * len(sent)


@given(frames=st.lists(st.tuples(IDLE, SIZES, st.one_of(st.none(), RATES)), min_size=1, max_size=40))
def test_rates_that_change_let_through_no_more_than_each_allows_and_stop_nothing(
    frames: list[tuple[float, int, float | None]],
) -> None:
    sent = paced(Bucket(7.0), 7.0, frames)
    for first in range(len(frames)):
        saved, rates = 0.0, [0.0]
        through = 0
        for last in range(first, len(frames)):
            rate = frames[last][2]
            if rate is None:
                break
            if last > first:
                asked, at, _ = sent[last]
                # Until the frame was asked for, the rate before it applied; from then on its own.
                saved += (asked - sent[last - 1][1]) * (frames[last - 1][2] or 0) + (at - asked) * rate
            rates.append(rate)
            through += sent[last][2]
            # What was saved at the fastest rate, and what the largest frame goes beyond a burst of its own.
            most = max(rates) + max(0.0, *(size - its for _, size, its in frames[first : last + 1]))
            assert through <= saved * (1 + 1e-9) + most + 1
    for (asked, at, size), (_, _, rate) in zip(sent, frames, strict=True):
        if rate is None:
            assert at == asked
        else:
            assert at - asked <= (9 * (1 << 20) + size) / rate + 0.01


def test_a_clock_that_goes_back_neither_stops_nor_opens_the_line() -> None:
    bucket = Bucket(1000.0)
    assert bucket.delay(1, 1e6, 1000.0) > 0
    bucket.delay(10**6, 1e6, 1001.0)
    bucket.take(10**6)
    assert bucket.delay(10**6, 1e6, 5.0) == pytest.approx(1.0), "nothing is saved by going back"
    assert bucket.delay(10**6, 1e6, 1001.5) == pytest.approx(0.5)


class Clock:
    """Both clocks, by hand; sleeping lets time pass."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.wall_ns = round(datetime(2026, 11, 23, 12).timestamp()) * 10**9  # a Monday, where the tests run
        self.slept: list[float] = []

    def now_ns(self) -> int:
        return self.wall_ns

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds


class Counting:
    """Counts what is put; answers every other call with what it was asked."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def put(self, frame: bytes) -> None:
        self.frames.append(frame)

    def __getattr__(self, name: str) -> object:
        return lambda *arguments, **options: (name, arguments, options)


def throttled(clock: Clock, look=None, between=lambda: None, rate: float | None = 1e6) -> ThrottledReplica:
    first = ShippingPolicy(throttle=Throttle((Limit(rate),)))
    return ThrottledReplica(Counting(), policy=CurrentPolicy(first, look=look), clock=clock, between=between)  # type: ignore[arg-type]


def test_a_frame_waits_until_it_may_go_and_is_then_put_once() -> None:
    clock = Clock()
    replica = throttled(clock)
    for _ in range(10):
        replica.put(bytes(500_000))
    assert len(replica._replica.frames) == 10
    assert clock.seconds - 1000.0 == pytest.approx(5.0, abs=0.05)
    assert max(clock.slept) <= LOOK_SECONDS


def test_a_frame_that_waits_looks_for_a_stop_and_is_not_put() -> None:
    clock, looks = Clock(), []

    def between() -> None:
        looks.append(clock.seconds)
        if clock.seconds > 1003:
            raise InterruptedError

    replica = throttled(clock, between=between)
    replica.put(bytes(5_000_000))
    with pytest.raises(InterruptedError):
        replica.put(bytes(1))
    assert len(replica._replica.frames) == 1
    assert max(after - before for before, after in itertools.pairwise(looks)) <= LOOK_SECONDS + 1e-9


def test_a_limit_that_is_lifted_lets_a_frame_go_that_waits() -> None:
    clock = Clock()
    free, slow = ShippingPolicy(), ShippingPolicy(throttle=Throttle((Limit(1e5),)))
    replica = throttled(clock, look=lambda: free if clock.seconds >= 1012 else slow)
    replica.put(bytes(5_000_000))
    replica.put(bytes(5_000_000))
    assert clock.seconds == pytest.approx(1012, abs=LOOK_SECONDS)
    replica.put(bytes(5_000_000))
    assert clock.seconds == pytest.approx(1012, abs=LOOK_SECONDS)


def test_a_limit_that_is_set_applies_to_the_next_frame() -> None:
    clock, now = Clock(), [ShippingPolicy()]
    replica = throttled(clock, look=lambda: now[0])
    replica.put(bytes(5_000_000))
    assert clock.slept == []
    now[0] = ShippingPolicy(throttle=Throttle((Limit(1e6),)))
    replica.put(bytes(500_000))
    assert clock.seconds == pytest.approx(1000.5, abs=0.01)


def test_a_window_that_opens_while_a_frame_waits_is_seen() -> None:
    clock = Clock()
    day = Throttle((Limit(1e5, window=Window(8 * 60, 12 * 60 + 1)),))
    replica = throttled(clock, look=lambda: ShippingPolicy(throttle=day))
    replica.put(bytes(100_000))
    clock.sleep = lambda seconds: setattr(clock, "wall_ns", clock.wall_ns + 61 * 10**9)  # type: ignore[method-assign]
    replica.put(bytes(100_000))
    assert len(replica._replica.frames) == 2


def test_a_wall_clock_that_jumps_changes_the_rate_and_nothing_else() -> None:
    clock = Clock()
    replica = throttled(clock)
    for jump in (0, 10**18, -(10**18), 3600 * 10**9, -10):
        clock.wall_ns += jump
        before = clock.seconds
        replica.put(bytes(1_000_000))
        assert clock.seconds - before == pytest.approx(1.0, abs=0.02)


def test_frames_that_are_counted_are_worth_compressing() -> None:
    clock = Clock()
    inner = MemoryReplica()
    inner.keeps_frames = lambda: False  # type: ignore[method-assign]
    for throttle in (Throttle((Limit(1e6),)), Throttle()):
        policy = CurrentPolicy(ShippingPolicy(throttle=throttle))
        replica = ThrottledReplica(inner, policy=policy, clock=clock, between=lambda: None)
        assert replica.keeps_frames() is bool(throttle.limits)


VERBS = sorted(name for name in vars(Replica) if not name.startswith("_"))


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("put", "keeps_frames")])
def test_what_is_asked_of_the_replica_is_passed_on_at_once(verb: str) -> None:
    clock = Clock()
    replica = throttled(clock, rate=1e5)
    replica.put(bytes(9_000_000))
    asleep = len(clock.slept)
    takes = {
        "begin": ("m",), "extent": (b"d",), "occupied": (b"d", 0, 1), "summaries": (b"d", (), "k"),
        "digests": (b"d", (), "k"), "commit": ("m", 3), "define": (b"d",),
    }.get(verb, ())  # fmt: skip
    options = {"from_medium": True} if verb == "inspect" else {}
    answer = getattr(replica, verb)(*takes, **options)
    assert answer == (verb, takes, options) if verb not in ("abandon", "define") else answer is None
    assert len(clock.slept) == asleep
