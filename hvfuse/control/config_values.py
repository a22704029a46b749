"""What the keys of `hvfuse.toml` may be: for each table its keys, their defaults, and what reads their values. Pure.

A parser takes a value as TOML has it and raises BadValueError, whose text completes "X is not …".
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hvfuse.control import instants
from hvfuse.control.home import name_fault
from hvfuse.shipper.throttle import EVERY_DAY, Limit, Throttle
from hvfuse.shipper.window import ALWAYS, Initial, Window

Parser = Callable[[Any], Any]

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
HOUR = 3600.0
DAY = 24 * HOUR
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SLOWEST = 100_000
_FASTEST = 100 * 10**9


class BadValueError(Exception):
    """A value does not fit; the text says what would."""


@dataclass(frozen=True, slots=True)
class Key:
    """`default`: as the file would say it; None where there is no value that says it."""

    parse: Parser
    default: Any = None


# Quantities -----------------------------------------------------------------------------------------------------


def _seconds(value: Any) -> float | None:
    seconds = instants.parse_span(value) if isinstance(value, str) else None
    return None if seconds is None else float(seconds)


def duration(low: float, high: float, span: str, *, word: str | None = None) -> Parser:
    """Seconds between both, included, which `span` says in words; `word` stands for 0."""

    def parse(value: Any) -> float:
        seconds = 0.0 if word is not None and value == word else _seconds(value)
        if seconds is None or not (low <= seconds <= high or value == word):
            raise BadValueError(f'"{word}" or a duration {span}' if word is not None else f"a duration {span}")
        return seconds

    return parse


def whole(low: int, high: int) -> Parser:
    """A number between both, included."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadValueError(f"a whole number from {low} to {high}")
        return value

    return parse


# Names ----------------------------------------------------------------------------------------------------------


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise BadValueError("the path of a directory, in quotes")
    return value


def _target(value: Any) -> str | None:
    if value == "own":
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise BadValueError('"own", or the directory of another home\'s store, such as "/srv/target/store"')
    return value


def _socket(value: Any) -> str:
    if not isinstance(value, str) or not os.path.isabs(value) or "\0" in value:
        raise BadValueError('the absolute path of the guest agent\'s socket, such as "/run/web01/qga.sock"')
    return value


def _texts(value: Any) -> tuple[str, ...] | None:
    """A list of texts that can be arguments of a program."""
    if not isinstance(value, list) or not all(isinstance(text, str) and "\0" not in text for text in value):
        return None
    return tuple(value)


def command(*, optional: bool = False) -> Parser:
    """A program and its arguments; `optional`: also none."""

    def parse(value: Any) -> tuple[str, ...]:
        words = _texts(value)
        if words == () and optional:
            return words
        # Whoever runs it has a working directory of its own: a relative path would be another one there.
        if not words or not words[0] or ("/" in words[0] and not os.path.isabs(words[0])):
            raise BadValueError('a command and its arguments, such as ["/usr/local/bin/tell", "now"]')
        return words

    return parse


def _names(value: Any) -> frozenset[str]:
    names = _texts(value)
    if names is None or any(name_fault(name) is not None for name in names):
        raise BadValueError('a list of disks\' file names, such as ["swap.vhd"]')
    return frozenset(names)


def _policy_name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise BadValueError("the name of a policy, in quotes")
    return value


def _one_of(*known: str) -> Parser:
    def parse(value: Any) -> str:
        if value not in known:
            raise BadValueError(" or ".join(f'"{one}"' for one in known))
        return str(value)

    return parse


# Times ----------------------------------------------------------------------------------------------------------

_MINUTE = r"([01]\d|2[0-3]):([0-5]\d)"


def _times(text: str) -> Window | None:
    """ "18:30-06:00" as a window; None if it is not one, or empty."""
    match = re.fullmatch(rf"{_MINUTE}-{_MINUTE}", text, re.ASCII)
    start, end = (int(match[k]) * 60 + int(match[k + 1]) for k in (1, 3)) if match else (0, 0)
    return Window(start, end) if start != end else None


def _window(value: Any) -> Window:
    window = ALWAYS if value == "always" else _times(value) if isinstance(value, str) else None
    if window is None:
        raise BadValueError('"always" or two different times of the day, such as "18:30-06:00"')
    return window


def _initial(value: Any) -> Initial:
    if value in ("now", "seed"):
        return Initial(how=value)
    at = instants.parse_date(value) if isinstance(value, str) and " " in value else None
    if at is None:
        raise BadValueError('"now", "seed", or a local time such as "2026-11-22 18:30"')
    if instants.is_too_far(at, now_ns=time.time_ns()):
        raise BadValueError(f"a time at most {instants.DAYS_AHEAD} days ahead")
    return Initial(at_ns=at)  # one that is over means now: the file stays as it is when it has come


def _days(text: str) -> frozenset[int] | None:
    """ "mon-fri,sun" as numbers of days, 0 for Monday; over the week's end too; None if it is not that."""
    days: set[int] = set()
    for part in text.lower().split(","):
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            return None
        begin = DAYS.index(first)
        end = DAYS.index(last) if dash else begin
        days.update((begin + step) % 7 for step in range((end - begin) % 7 + 1))
    return frozenset(days)


# Rates ----------------------------------------------------------------------------------------------------------


def _rate(text: str) -> float | None:
    """ "10MB/s" as bytes a second; "none" as None. Raises BadValueError."""
    if text == "none":
        return None
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([kmg]i?)?b/s", text.lower(), re.ASCII)
    rate = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if not _SLOWEST <= rate <= _FASTEST:
        raise BadValueError('"none", a rate from "100KB/s" to "100GB/s", or a list such as ' + _THROTTLE_EXAMPLE)
    return rate


_THROTTLE_EXAMPLE = '["mon-fri 08:00-18:00 10MB/s", "50MB/s"]'


def _limit(text: Any) -> Limit:
    """ "mon-fri 08:00-18:00 10MB/s", without days or times every day or always. Raises BadValueError."""
    words = text.split() if isinstance(text, str) else []
    rate = _rate(words[-1] if words else "")
    days = _days(words[0]) if len(words) > 1 else None
    window = _times(words[-2]) if len(words) > 1 + (days is not None) else None
    if len(words) != 1 + (days is not None) + (window is not None):
        raise BadValueError(f'"DAYS TIMES RATE", such as in {_THROTTLE_EXAMPLE}')
    return Limit(rate, days or EVERY_DAY, window or ALWAYS)


def _throttle(value: Any) -> Throttle:
    if not isinstance(value, list):
        rate = _rate(value if isinstance(value, str) else "")
        return Throttle((Limit(rate),) if rate is not None else ())
    return Throttle(tuple(_limit(entry) for entry in value))


# The tables -----------------------------------------------------------------------------------------------------

PATHS: Mapping[str, Key] = {name: Key(_path, name) for name in ("disks", "mnt", "store", "state")}
REPLICATION: Mapping[str, Key] = {
    "protect": Key(_one_of("auto", "manual"), "auto"),
    "target": Key(_target, "own"),
    "fence": Key(_one_of("local", "strict"), "local"),
    "frequency": Key(duration(1, HOUR, 'from "1s" to "1h", such as "30s" or "5m"'), "30s"),
    "compression": Key(whole(0, 22), 1),
    "throttle": Key(_throttle, "none"),
    "soft_limit": Key(whole(1, 100_000), 25),
    "hard_limit": Key(whole(1, 100_000), 50),
    "initial": Key(_initial, "now"),
    "resync": Key(_one_of("auto", "manual"), "auto"),
    "resync_window": Key(_window, "18:30-06:00"),
    "digest": Key(_one_of("xxh3", "blake3"), "xxh3"),
    "app_consistent": Key(duration(HOUR, 12 * HOUR, 'from "1h" to "12h"', word="off"), "off"),
}
RETENTION: Mapping[str, Key] = {
    "keep_all": Key(duration(0, 366 * DAY, 'from "0s" to "366d", such as "1h"'), "1h"),
    "hourly": Key(whole(0, 8784), 24),
    "daily": Key(whole(0, 3660), 0),
}
POLICY: Mapping[str, Key] = {**REPLICATION, **RETENTION}
VM: Mapping[str, Key] = {**POLICY, "exclude": Key(_names, [])}
"""Without "policy", and the tables, which say nothing by themselves."""
VM_POLICY = Key(_policy_name)
GUEST: Mapping[str, Key] = {
    "agent": Key(_socket),
    "freeze": Key(command()),
    "thaw": Key(command()),
    "freeze_timeout": Key(duration(1, 60, 'from "1s" to "60s"'), "10s"),
}
MONITORING: Mapping[str, Key] = {
    "interval": Key(duration(HOUR, 7 * DAY, 'from "1h" to "7d"'), "12h"),
    "notify": Key(command(optional=True), []),
    "keep_events": Key(duration(DAY, 366 * DAY, 'from "1d" to "366d"'), "30d"),
}
