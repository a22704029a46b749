"""Whether a copy that is needed may start or go on now, or what it waits for. Pure.

The first of these that applies decides:

    replication or its copies suspended    waits to be resumed
    exported to a medium                   waits until the replica stands anywhere: then there is no need to wait
    asked for                              goes
    ordered for a time                     waits until then, and goes
    cancelled                              waits to be asked for
    under way, or the next pass of a copy  goes
    the first copy                         goes, or waits, as the policy says
    only disks were added or removed       goes: somebody did that on purpose, and the VM is unprotected meanwhile
    resyncs are not automatic              waits to be asked for
    of marked regions: at most a quarter
    of the disks, or AT_ONCE_BYTES         goes: a crash must not leave a VM unprotected until the evening
    anything else                          goes while the window is open, else waits for it
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, tzinfo
from enum import Enum

from hvfuse.shipper.orders import Orders
from hvfuse.shipper.window import Initial, Resync

AT_ONCE_PART = 0.25
"""Of the disks' size: as much of marked regions may be resynchronised at any time of the day."""
AT_ONCE_BYTES = 1 << 30
"""So much may be, whatever the size of the disks."""


class Cause(Enum):
    """What is so of a copy that waits, in words for an administrator."""

    PAUSED = "replication is suspended"
    SUSPENDED = "is suspended"
    SEED = "waits for a seed to be imported"
    TIME = "waits for the time that was set"
    CANCELLED = "was cancelled, and waits to be asked for"
    MANUAL = "waits to be asked for"
    WINDOW = "waits for the window of resynchronisations"


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """A copy that is needed. `is_first`: there is no recovery point yet. `is_under_way`: it has begun. `is_pass`: it
    compares what got dirty during a copy that no recovery point followed yet. `part`: of the disks' size, to be
    compared; 1 for everything. `length`: of marked regions, in bytes; None for everything. `stands_at`: generation
    (hex) at which the replica stands, None if nowhere. `is_for_disks`: only marked regions are to be compared, and only
    since disks came or went."""

    is_first: bool
    is_under_way: bool = False
    is_pass: bool = False
    part: float = 1.0
    length: int | None = None
    stands_at: str | None = None
    is_for_disks: bool = False

    @property
    def is_small(self) -> bool:
        """Whether there is no need to wait for a quiet hour."""
        return self.length is not None and (self.part <= AT_ONCE_PART or self.length <= AT_ONCE_BYTES)


@dataclass(frozen=True, slots=True)
class Wait:
    """Why a copy waits. `until_ns`: when it goes on by itself, ns since 1970; None: not before somebody acts."""

    cause: Cause
    until_ns: int | None = None

    @property
    def text(self) -> str:
        """The cause in words; the time is in local time."""
        if self.until_ns is None:
            return self.cause.value
        return f"{self.cause.value}: {datetime.fromtimestamp(self.until_ns // 10**9):%Y-%m-%d %H:%M}"


def permission(
    need: Need,
    orders: Orders,
    *,
    resync: Resync,
    initial: Initial,
    now_ns: int,
    asked: bool = False,
    tz: tzinfo | None = None,
) -> Wait | None:
    """What the copy waits for; None: it may go. `asked`: somebody waits for it now. `tz`: the window's."""
    barred = _barred(need, orders)
    if barred is not None:
        return Wait(barred)
    if asked or orders.now:
        return None
    if orders.at_ns is not None:
        return _until(orders.at_ns, now_ns)
    if orders.cancelled:
        return Wait(Cause.CANCELLED)
    if need.is_under_way or need.is_pass or (need.is_for_disks and not need.is_first):
        return None
    return _first(need, initial, now_ns) if need.is_first else _another(need, resync, now_ns, tz)


def _barred(need: Need, orders: Orders) -> Cause | None:
    """What no wish for a copy comes against."""
    if orders.paused or orders.suspended:
        return Cause.PAUSED if orders.paused else Cause.SUSPENDED
    return Cause.SEED if orders.seed is not None and need.stands_at is None else None


def _first(need: Need, initial: Initial, now_ns: int) -> Wait | None:
    if initial.how == "seed" and need.stands_at is None:
        return Wait(Cause.SEED)
    return None if initial.at_ns is None else _until(initial.at_ns, now_ns)


def _another(need: Need, resync: Resync, now_ns: int, tz: tzinfo | None) -> Wait | None:
    if not resync.automatic:
        return Wait(Cause.MANUAL)
    if need.is_small or resync.window.is_open(now_ns, tz):
        return None
    return Wait(Cause.WINDOW, resync.window.next_opening_ns(now_ns, tz))


def _until(at_ns: int, now_ns: int) -> Wait | None:
    return None if now_ns >= at_ns else Wait(Cause.TIME, at_ns)
