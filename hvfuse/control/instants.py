"""Instants as an administrator names them: local wall-clock time, unless a zone is told. Pure.

`zone` is the local one; None: the machine's. Where clocks are set back, an hour comes twice: "02:30" is the
first of the two that is still ahead, a date's is the first. An hour that is left out means as much later.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, tzinfo

from hvfuse.errors import UsageError
from hvfuse.shipper.orders import MAX_AHEAD_NS

DAYS_AHEAD = MAX_AHEAD_NS // (86400 * 10**9)
"""How far ahead a copy may be put off."""
FORMS = '"18:30" (the next time it is that late), "2026-11-22 18:30", or ISO 8601 such as 2026-11-22T18:30:00+01:00'
PAST_FORMS = (
    '"2h" (so long ago; s, m, h or d), "18:30" (the last time it was that late), "2026-11-22 18:30", or ISO 8601'
)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_SPAN = re.compile(r"(\d{1,9})([smhd])", re.ASCII)
_TIME = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")


def parse_instant(text: str, *, now_ns: int, zone: tzinfo | None = None) -> int:
    """The instant that `text` (see FORMS) names, ns since 1970. Raises UsageError unless it lies ahead, and by
    at most DAYS_AHEAD days."""
    match = _TIME.fullmatch(text)
    if match:
        return next_time(int(match[1]), int(match[2]), now_ns=now_ns, zone=zone)
    instant = parse_date(text, zone=zone)
    if instant is None:
        raise UsageError(f"{text!r} is not a time", hint=f"write {FORMS}")
    now = instant_text(now_ns, now_ns=None, zone=zone)
    if instant <= now_ns:
        raise UsageError(f"{text!r} lies in the past: it is {now} now", hint="--now starts at once")
    if is_too_far(instant, now_ns=now_ns):
        raise UsageError(f"{text!r} lies more than {DAYS_AHEAD} days ahead: it is {now} now")
    return instant


def parse_span(text: str) -> int | None:
    """ "30s", "5m", "12h" or "7d" in seconds; None if `text` is no span of time."""
    match = _SPAN.fullmatch(text)
    return int(match[1]) * _SECONDS[match[2]] if match else None


def parse_past(text: str, *, now_ns: int, zone: tzinfo | None = None) -> int:
    """The instant that `text` (see PAST_FORMS) names, ns since 1970. Raises UsageError unless it names one."""
    ago = parse_span(text)
    if ago is not None:
        return now_ns - ago * 10**9
    match = _TIME.fullmatch(text)
    if match:
        day_ns = 86400 * 10**9
        ahead = next_time(int(match[1]), int(match[2]), now_ns=now_ns - 1, zone=zone)
        # A day is 23 to 25 hours long: from two of them back, the one before `ahead` comes first or second.
        past = [ahead] + [
            next_time(int(match[1]), int(match[2]), now_ns=now_ns - back * day_ns, zone=zone) for back in (1, 2)
        ]
        return max(instant for instant in past if instant <= now_ns)
    instant = parse_date(text, zone=zone)
    if instant is None:
        raise UsageError(f"{text!r} is not a time", hint=f"write {PAST_FORMS}")
    return instant


def parse_date(text: str, *, zone: tzinfo | None = None) -> int | None:
    """The instant of a date and time in ISO 8601, a space allowed for its T; None if it is not one."""
    try:
        named = datetime.fromisoformat(text)
    except ValueError:
        return None
    if named.tzinfo is None:
        named = named.replace(tzinfo=zone)
    try:
        return round(named.timestamp()) * 10**9
    except (ValueError, OverflowError, OSError):  # the year 1, or 9999, in some zones
        return 0 if named.year < 1970 else 1 << 63


def is_too_far(instant_ns: int, *, now_ns: int) -> bool:
    """Whether a copy may not be put off until then."""
    return instant_ns > now_ns + MAX_AHEAD_NS


def next_time(hour: int, minute: int, *, now_ns: int, zone: tzinfo | None = None) -> int:
    """The first instant after `now_ns` at which local clocks show that time."""
    today = datetime.fromtimestamp(now_ns // 10**9, zone).replace(hour=hour, minute=minute, second=0, microsecond=0)
    named = [(today + timedelta(days=day)).replace(tzinfo=zone, fold=fold) for day in (0, 1, 2) for fold in (0, 1)]
    # In an hour that is left out, fold 1 tells an instant before the gap, at which clocks show another time.
    instants = [round(one.timestamp()) * 10**9 for one in named if one.fold == 0 or _exists(one, zone)]
    return min(instant for instant in instants if instant > now_ns)


def _exists(named: datetime, zone: tzinfo | None) -> bool:
    shown = datetime.fromtimestamp(named.timestamp(), zone)
    return shown.replace(tzinfo=None) == named.replace(tzinfo=None)


def instant_text(instant_ns: int, *, now_ns: int | None, zone: tzinfo | None = None) -> str:
    """Local time to the minute: "18:30" if that is today, else "2026-11-22 18:30"; always so without `now_ns`."""
    instant = datetime.fromtimestamp(instant_ns // 10**9, zone)
    today = now_ns is not None and instant.date() == datetime.fromtimestamp(now_ns // 10**9, zone).date()
    return instant.strftime("%H:%M" if today else "%Y-%m-%d %H:%M")
