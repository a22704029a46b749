from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvfuse.shipper.window import ALWAYS, NIGHT, Window

BERLIN = ZoneInfo("Europe/Berlin")
PLACES = [BERLIN, ZoneInfo("America/New_York"), ZoneInfo("Australia/Lord_Howe"), ZoneInfo("Asia/Kolkata")]
MINUTE = 60 * 10**9


def ns(text: str, place: ZoneInfo = BERLIN, *, fold: int = 0) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=place, fold=fold).timestamp()) * 10**9


def window(text: str) -> Window:
    (start, end) = ([int(part) for part in half.split(":")] for half in text.split("-"))
    return Window(start[0] * 60 + start[1], end[0] * 60 + end[1])


@pytest.mark.parametrize(
    ("times", "now", "is_open"),
    [
        ("18:30-06:00", "2026-05-04T18:29:59", False),
        ("18:30-06:00", "2026-05-04T18:30:00", True),
        ("18:30-06:00", "2026-05-05T00:00:00", True),
        ("18:30-06:00", "2026-05-05T05:59:59", True),
        ("18:30-06:00", "2026-05-05T06:00:00", False),
        ("08:00-17:00", "2026-05-05T07:59:59", False),
        ("08:00-17:00", "2026-05-05T08:00:00", True),
        ("08:00-17:00", "2026-05-05T17:00:00", False),
        ("22:00-00:00", "2026-05-05T23:59:59", True),
        ("22:00-00:00", "2026-05-06T00:00:00", False),
        ("00:00-00:00", "2026-05-06T12:00:00", True),
    ],
)
def test_a_window_is_open_from_its_start_until_before_its_end_by_the_clock_on_the_wall(times, now, is_open):
    assert window(times).is_open(ns(now), BERLIN) is is_open


@pytest.mark.parametrize(
    ("times", "now", "opening"),
    [
        ("18:30-06:00", ns("2026-05-04T12:00:00"), ns("2026-05-04T18:30:00")),
        ("18:30-06:00", ns("2026-05-04T18:30:01") + 5, ns("2026-05-04T18:30:01") + 5),
        ("08:00-17:00", ns("2026-05-04T17:00:00"), ns("2026-05-05T08:00:00")),
        # On 2026-03-29 the clocks skip 02:00 to 03:00.
        ("02:30-04:00", ns("2026-03-29T01:00:00"), ns("2026-03-29T03:00:00")),
        ("02:10-02:50", ns("2026-03-29T01:00:00"), ns("2026-03-30T02:10:00")),
        ("18:30-06:00", ns("2026-03-28T12:00:00"), ns("2026-03-28T18:30:00")),
        # On 2026-10-25 they show 02:00 to 03:00 twice.
        ("02:30-02:40", ns("2026-10-25T02:40:00"), ns("2026-10-25T02:30:00", fold=1)),
        ("18:30-06:00", ns("2026-10-25T12:00:00"), ns("2026-10-25T18:30:00")),
    ],
)
def test_the_next_opening_is_right_on_every_day_of_the_year(times, now, opening):
    assert window(times).next_opening_ns(now, BERLIN) == opening


MINUTES = st.integers(0, 1439)
INSTANTS = st.integers(ns("2024-01-01T00:00:00"), ns("2027-12-31T00:00:00"))


@settings(max_examples=150, deadline=None)
@given(st.builds(Window, MINUTES, MINUTES), INSTANTS, st.sampled_from(PLACES), st.data())
def test_the_next_opening_is_open_and_nothing_before_it_is(found, now, place, data):
    opening = found.next_opening_ns(now, place)
    assert opening >= now and found.is_open(opening, place)
    if opening > now:
        assert opening % MINUTE == 0 and not found.is_open(opening - 1, place)
        assert not found.is_open(data.draw(st.integers(now, opening - 1)), place)
        assert opening - now <= timedelta(days=2, hours=2) / timedelta(microseconds=1) * 1000


@settings(max_examples=150, deadline=None)
@given(st.builds(Window, MINUTES, MINUTES), INSTANTS, st.sampled_from(PLACES))
def test_a_window_and_the_rest_of_the_day_are_never_open_at_once(found, now, place):
    rest = Window(found.end_minute, found.start_minute)
    assert (found.is_open(now, place) != rest.is_open(now, place)) or found.start_minute == found.end_minute


def test_always_is_always_and_minutes_are_checked():
    assert all(ALWAYS.is_open(hour * 3600 * 10**9) for hour in range(48))
    assert window("18:30-06:00") == NIGHT
    for wrong in ((-1, 0), (0, 1440)):
        with pytest.raises(ValueError, match="between 0 and 1439"):
            Window(*wrong)


def test_without_a_place_the_machines_own_clock_counts():
    local = int(datetime(2026, 5, 4, 12, 0).timestamp()) * 10**9
    assert window("12:00-12:01").is_open(local)
    assert not window("12:01-12:00").is_open(local)
