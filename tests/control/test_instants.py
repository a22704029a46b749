"""Instants as an administrator names them, also where clocks are set forward or back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from hvfuse.control.instants import instant_text, is_too_far, next_time, parse_date, parse_instant, parse_past
from hvfuse.errors import UsageError

BERLIN = ZoneInfo("Europe/Berlin")


def utc(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 10**9


# What is typed at what instant (UTC), and what it means (UTC); local is Berlin: UTC+1, in summer UTC+2.
MEANT = {
    "later today": ("18:30", "2026-11-22 12:00", "2026-11-22 17:30"),
    "one digit": ("6:05", "2026-11-22 04:00", "2026-11-22 05:05"),
    "tomorrow": ("12:59", "2026-11-22 12:00", "2026-11-23 11:59"),
    "this very minute is tomorrow's": ("13:00", "2026-11-22 12:00", "2026-11-23 12:00"),
    "midnight": ("00:00", "2026-11-22 22:59", "2026-11-22 23:00"),
    "tomorrow by local time, today by UTC": ("00:30", "2026-11-22 22:59", "2026-11-22 23:30"),
    "over the end of the year": ("01:00", "2026-12-31 12:00", "2027-01-01 00:00"),
    "an hour that comes twice, before it": ("02:30", "2026-10-24 22:00", "2026-10-25 00:30"),
    "an hour that comes twice, within it": ("02:30", "2026-10-25 00:31", "2026-10-25 01:30"),
    "an hour that comes twice, after it": ("02:30", "2026-10-25 01:31", "2026-10-26 01:30"),
    "an hour that is left out": ("02:30", "2026-03-28 23:00", "2026-03-29 01:30"),
    "the day after one was left out": ("02:30", "2026-03-29 12:00", "2026-03-30 00:30"),
    "just before the gap": ("03:00", "2026-03-29 00:59", "2026-03-29 01:00"),
    "across the change": ("18:30", "2026-10-24 17:00", "2026-10-25 17:30"),
    "a date": ("2026-11-23 18:30", "2026-11-22 12:00", "2026-11-23 17:30"),
    "a date in summer": ("2026-07-01 18:30", "2026-06-30 12:00", "2026-07-01 16:30"),
    "a date with its T": ("2026-11-23T18:30", "2026-11-22 12:00", "2026-11-23 17:30"),
    "a date with a zone": ("2026-11-23T18:30:00+05:30", "2026-11-22 12:00", "2026-11-23 13:00"),
    "a date in UTC": ("2026-11-23T18:30Z", "2026-11-22 12:00", "2026-11-23 18:30"),
    "just seven days ahead": ("2026-11-29 13:00", "2026-11-22 12:00", "2026-11-29 12:00"),
}


@pytest.mark.parametrize("case", MEANT)
def test_what_is_typed_means_that_instant(case: str) -> None:
    text, now, meant = MEANT[case]
    assert parse_instant(text, now_ns=utc(now), zone=BERLIN) == utc(meant)


REFUSED = {
    "a second ago": ("2026-11-22 12:59:59", "lies in the past: it is 2026-11-22 13:00 now"),
    "now": ("2026-11-22T12:00Z", "lies in the past"),
    "a minute too far": ("2026-11-29 13:01", "lies more than 7 days ahead: it is 2026-11-22 13:00 now"),
    "the end of time": ("9999-12-31T23:59-11:00", "lies more than 7 days ahead"),
    "the beginning": ("0001-01-01 00:00", "lies in the past"),
    "an hour that no day has": ("24:00", "is not a time"),
    "a minute that no hour has": ("12:60", "is not a time"),
    "seconds": ("12:30:05", "is not a time"),
    "words": ("tomorrow", "is not a time"),
    "a day that no month has": ("2026-02-30 12:00", "is not a time"),
    "nothing": ("", "is not a time"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_saying_why(case: str) -> None:
    text, why = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        parse_instant(text, now_ns=utc("2026-11-22 12:00"), zone=BERLIN)
    assert why in str(caught.value)


@pytest.fixture
def berlin() -> Iterator[None]:
    """The machine itself is in Berlin."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Europe/Berlin"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize("case", MEANT)
def test_the_machines_own_zone_means_the_same_as_that_zone_by_name(case: str) -> None:
    text, now, meant = MEANT[case]
    assert parse_instant(text, now_ns=utc(now)) == utc(meant)


def test_every_minute_of_a_day_is_found_once_within_a_day_and_an_hour() -> None:
    for now in ("2026-03-28 12:00", "2026-10-24 12:00", "2026-11-22 12:00"):
        found = {next_time(k // 60, k % 60, now_ns=utc(now), zone=BERLIN) for k in range(1440)}
        assert all(utc(now) < instant <= utc(now) + 25 * 3600 * 10**9 for instant in found)


def test_an_instant_is_told_in_local_time_with_its_date_unless_it_is_today() -> None:
    now = utc("2026-11-22 12:00")
    assert instant_text(utc("2026-11-22 17:30"), now_ns=now, zone=BERLIN) == "18:30"
    assert instant_text(utc("2026-11-22 23:30"), now_ns=now, zone=BERLIN) == "2026-11-23 00:30"
    assert instant_text(utc("2026-11-22 17:30"), now_ns=None, zone=BERLIN) == "2026-11-22 18:30"


def test_how_far_a_copy_may_be_put_off() -> None:
    assert not is_too_far(utc("2026-11-29 12:00"), now_ns=utc("2026-11-22 12:00"))
    assert is_too_far(utc("2026-11-29 12:00") + 1, now_ns=utc("2026-11-22 12:00"))
    assert parse_date("18:30") is None


@pytest.mark.parametrize(
    ("text", "past"),
    [
        ("0s", "2026-11-22 12:00"),
        ("90s", "2026-11-22 11:58:30"),
        ("2h", "2026-11-22 10:00"),
        ("3d", "2026-11-19 12:00"),
        ("11:59", "2026-11-22 11:59"),
        ("12:00", "2026-11-22 12:00"),
        ("12:01", "2026-11-21 12:01"),
        ("2026-11-22 06:30", "2026-11-22 06:30"),
    ],
)
def test_a_time_in_the_past_is_so_long_ago_or_the_last_one_that_late(text: str, past: str) -> None:
    now_ns = int(datetime(2026, 11, 22, 12, tzinfo=BERLIN).timestamp()) * 10**9
    expected = datetime.fromisoformat(past).replace(tzinfo=BERLIN)
    assert parse_past(text, now_ns=now_ns, zone=BERLIN) == int(expected.timestamp()) * 10**9


def test_the_last_time_that_late_is_found_on_days_of_any_length() -> None:
    for day in (datetime(2026, 3, 29, tzinfo=BERLIN), datetime(2026, 10, 25, tzinfo=BERLIN)):
        for minutes in range(0, 3 * 1440, 97):
            now_ns = (int(day.timestamp()) - 86400 + minutes * 60) * 10**9
            for hour in (0, 4, 12, 23):
                found = parse_past(f"{hour:02}:30", now_ns=now_ns, zone=BERLIN)
                assert found <= now_ns < found + 25 * 3600 * 10**9
                shown = datetime.fromtimestamp(found // 10**9, BERLIN)
                assert (shown.hour, shown.minute) == (hour, 30)
