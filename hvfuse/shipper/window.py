"""When copies may start by themselves: times of the day, and what a policy says of them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Literal

DAY_MINUTES = 1440
_MINUTE_NS = 60 * 10**9
_SEARCH = 4 * DAY_MINUTES
"""Minutes: more than there can be between openings, as a window may lie wholly in an hour that a day skips."""


@dataclass(frozen=True, slots=True)
class Window:
    """From `start_minute` until before `end_minute`, in minutes after midnight (0 to 1,439) by the clock on the
    wall; over midnight if the end is not after the start, all day if both are the same. Raises ValueError.

    `tz`: where the wall is; None: where the machine is. What a change to or from summer time skips is skipped; what
    it repeats, is repeated.
    """

    start_minute: int
    end_minute: int

    def __post_init__(self) -> None:
        if not (0 <= self.start_minute < DAY_MINUTES and 0 <= self.end_minute < DAY_MINUTES):
            raise ValueError("a window's minutes lie between 0 and 1439")

    def is_open(self, now_ns: int, tz: tzinfo | None = None) -> bool:
        """Whether the instant, ns since 1970, lies in the window."""
        wall = datetime.fromtimestamp(now_ns // 10**9, tz)
        minute = wall.hour * 60 + wall.minute
        if self.start_minute < self.end_minute:
            return self.start_minute <= minute < self.end_minute
        return minute >= self.start_minute or minute < self.end_minute

    def next_opening_ns(self, now_ns: int, tz: tzinfo | None = None) -> int:
        """The first instant from `now_ns` on at which the window is open; `now_ns` itself if it is."""
        if self.is_open(now_ns, tz):
            return now_ns
        # Minute by minute: only so is it right on every day, and there are at most some thousands.
        minute = now_ns // _MINUTE_NS + 1
        return next(at * _MINUTE_NS for at in range(minute, minute + _SEARCH) if self.is_open(at * _MINUTE_NS, tz))


ALWAYS = Window(0, 0)
NIGHT = Window(18 * 60 + 30, 6 * 60)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resync:
    """Whether resynchronisations start by themselves, and those of much of the disks when."""

    automatic: bool = True
    window: Window = NIGHT


AT_NIGHT = Resync()


@dataclass(frozen=True, slots=True, kw_only=True)
class Initial:
    """How the first copy begins. "now": over the network, at `at_ns` (ns since 1970) if that is given. "seed": not at
    all; the replica has to get a position in another way (a medium, an existing copy) before anything is sent."""

    how: Literal["now", "seed"] = "now"
    at_ns: int | None = None


AT_ONCE = Initial()
