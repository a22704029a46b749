"""How fast frames may travel: by day and time, as a token bucket, and as a replica that waits before it takes one.

The schedule goes by the clock on the wall, as an administrator does; the bucket by the monotonic clock alone, so that
a clock that is set neither stops the shipping nor opens the line.

The promise, for a rate that stays: in any span of t seconds, at most `rate * t` bytes and one burst; a burst is what
one second lets through, or one frame if that is more. A frame larger than a second's worth goes as soon as a
whole second's worth is saved, and the next ones wait for the rest of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import TYPE_CHECKING

from hvfuse.shipper.window import ALWAYS, Window

if TYPE_CHECKING:
    from hvfuse.extent import Extent
    from hvfuse.formats.digests import DigestKey, Digests
    from hvfuse.manifest import CycleManifest, RecoveryPoint
    from hvfuse.position import Position
    from hvfuse.shipper.policy import CurrentPolicy
    from hvfuse.shipper.replica import Inspection, Replica
    from hvfuse.system import Clock

EVERY_DAY = frozenset(range(7))
BURST_SECONDS = 1.0
"""What may be saved up while nothing is sent."""
LOOK_SECONDS = 0.2
"""At least so often a frame that waits looks whether it is to stop, and whether the policy has changed."""
_LEAST = 0.001
"""Seconds: so short a sleep still moves a clock of large numbers on."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One entry of a throttle. `rate`: bytes a second, None for as fast as it goes. `days`: on which `window` begins,
    0 for Monday to 6 for Sunday: what lies after midnight belongs to the evening before."""

    rate: float | None
    days: frozenset[int] = EVERY_DAY
    window: Window = ALWAYS

    def applies(self, now_ns: int, tz: tzinfo | None = None) -> bool:
        """Whether the instant, ns since 1970, lies in the window of such a day. `tz` as for `Window`."""
        if not self.window.is_open(now_ns, tz):
            return False
        wall = datetime.fromtimestamp(now_ns // 10**9, tz)
        start, end = self.window.start_minute, self.window.end_minute
        is_morning_after = end <= start and wall.hour * 60 + wall.minute < end
        return (wall.weekday() - is_morning_after) % 7 in self.days


@dataclass(frozen=True, slots=True)
class Throttle:
    """The limits in the order in which they are asked; the first that applies decides. None does: no limit."""

    limits: tuple[Limit, ...] = ()

    def rate(self, now_ns: int, tz: tzinfo | None = None) -> float | None:
        """Bytes a second at an instant, ns since 1970; None for as fast as it goes."""
        return next((limit.rate for limit in self.limits if limit.applies(now_ns, tz)), None)


UNTHROTTLED = Throttle()


class Bucket:
    """A token bucket; pure: it is told the time, in seconds that only grow."""

    def __init__(self, now: float) -> None:
        self._rate: float | None = None
        self._tokens = 0.0  # bytes; below zero while a frame that was larger than a burst is paid off
        self._at = now

    def delay(self, size: int, rate: float | None, now: float) -> float:
        """Seconds until `size` bytes may go at `rate` (None: no limit), 0 if they may now."""
        self._fill(rate, now)
        if rate is None:
            return 0.0
        return max(0.0, min(size, rate * BURST_SECONDS) - self._tokens) / rate

    def take(self, size: int) -> None:
        """So many bytes go now."""
        if self._rate is not None:
            self._tokens -= size

    def _fill(self, rate: float | None, now: float) -> None:
        """What has passed, passed at the old rate; the new one says how much of it may be saved."""
        if rate is None:
            self._tokens = 0.0
        else:
            if self._rate is not None:
                self._tokens += self._rate * max(0.0, now - self._at)
            self._tokens = min(self._tokens, rate * BURST_SECONDS)
        self._rate, self._at = rate, max(now, self._at)


class ThrottledReplica:
    """A replica that takes frames no faster than the policy lets them travel. Nothing else waits: what is asked of a
    replica is small, or (digests) is computed where it lies.

    `between` is called while a frame waits, and may raise to stop. A policy that changes meanwhile is obeyed.
    """

    def __init__(self, replica: Replica, *, policy: CurrentPolicy, clock: Clock, between: Callable[[], None]) -> None:
        self._replica = replica
        self._policy = policy
        self._clock = clock
        self._between = between
        self._bucket = Bucket(clock.monotonic())

    def keeps_frames(self) -> bool:
        """See `Replica`. Where bytes are counted, fewer of them go sooner."""
        return bool(self._policy.now.throttle.limits) or self._replica.keeps_frames()

    def put(self, frame: bytes) -> None:
        while (wait := self._delay(len(frame))) > 0:
            self._between()
            self._clock.sleep(min(max(wait, _LEAST), LOOK_SECONDS))
        self._bucket.take(len(frame))
        self._replica.put(frame)

    def _delay(self, size: int) -> float:
        self._policy.refresh()
        rate = self._policy.now.throttle.rate(self._clock.now_ns())
        return self._bucket.delay(size, rate, self._clock.monotonic())

    def position(self) -> Position | None:
        return self._replica.position()

    def begin(self, manifest: CycleManifest) -> frozenset[int]:
        return self._replica.begin(manifest)

    def define(self, definition: bytes) -> None:
        self._replica.define(definition)

    def extent(self, disk_id: bytes) -> int:
        return self._replica.extent(disk_id)

    def occupied(self, disk_id: bytes, low: int, high: int) -> Sequence[Extent]:
        return self._replica.occupied(disk_id, low, high)

    def summaries(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        return self._replica.summaries(disk_id, extents, key)

    def digests(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        return self._replica.digests(disk_id, extents, key)

    def commit(self, manifest: CycleManifest, frame_count: int) -> RecoveryPoint | None:
        return self._replica.commit(manifest, frame_count)

    def abandon(self) -> None:
        self._replica.abandon()

    def inspect(self, *, from_medium: bool) -> Inspection | None:
        return self._replica.inspect(from_medium=from_medium)

    def points(self) -> Sequence[RecoveryPoint]:
        return self._replica.points()
