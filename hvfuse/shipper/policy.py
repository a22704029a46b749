"""What the shipper is told of a VM: how to ship it, and where to keep how that goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from hvfuse.errors import HvfuseError
from hvfuse.formats.digests import Algorithm
from hvfuse.shipper.copy import CopyReport
from hvfuse.shipper.cycle import CycleReport
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.throttle import UNTHROTTLED, Throttle
from hvfuse.shipper.window import AT_NIGHT, AT_ONCE, Initial, Resync
from hvfuse.states import Event, ReplicationState


class Records(Protocol):
    """Where a VM's replication stands, kept for others to see and for after a restart."""

    def apply(self, *events: Event, **fields: object) -> ReplicationState:
        """Change the state by events in a row, and fields as `update` does, durably and in one step. Returns the
        state. Raises StateError, and changes nothing, where `hvfuse.states` does not allow one of the events: then
        an administrator ended or changed what the shipper was at."""

    def update(self, **fields: object) -> None:
        """Keep new values, durably, of any of: `error`, `hint`,
        `resync_reason`, `resync_cause` (text or None); `generation` (hex); `cycle`; `point` (id);
        `last_replication_time_ns`; `progress` (of a copy, 0 to 1, None when there is none); `copy`
        (`CopyProgress.as_json`, None when there is no copy); `copy_due_ns` (when a copy that waits starts by
        itself, ns since 1970, None when it does not); `orders` (Orders); `last_app_consistent_ns` (instant of the
        last such cycle's barrier, shipped or not); `guest_error` (why the guest could not be
        frozen the last time, None if it could); `guest_stuck` (why it may be standing still, None if it does not)."""

    def orders(self) -> Orders:
        """What an administrator ordered, as it was kept last."""

    def change_orders(self, change: Callable[[Orders], Orders]) -> Orders:
        """Replace the orders by what `change` makes of them, durably, in one step whoever else changes them.
        Returns the new ones; raises what `change` raises. For any thread."""

    def copy_progress(self) -> Mapping[str, object] | None:
        """What `copy` was kept last."""

    def last_app_consistent_ns(self) -> int | None:
        """What was kept last under that name."""

    def cycle(self, report: CycleReport, *events: Event, **fields: object) -> ReplicationState:
        """Keep the statistics of a committed cycle, and what changes with it, as `apply` does: all in one step."""

    def copied(self, report: CopyReport) -> None:
        """Keep the statistics of a committed copy."""

    def resume(self) -> None:
        """Nothing is suspended any more, if the orders say so: the state is as it was before, until it is known how
        things are."""

    def missed(self, count: int) -> None:
        """So many cycles were due since this was told last, and did not come."""

    def failed(self, error: HvfuseError) -> None:
        """An attempt at a cycle failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippingPolicy:
    """`frequency_seconds`: from one cycle's begin to the next's. `level`: zstd level, 0 for none.
    `soft_limit`: part of the disks' size; what sealed logs may hold before those of an outage are compacted.
    `algorithm`: of the digests by which copies compare. `resync`, `initial`: when copies start.
    `throttle`: how fast frames travel. `app_consistent`: seconds from one application-consistent point to the next,
    0 for none."""

    frequency_seconds: float = 30.0
    level: int = 1
    soft_limit: float = 0.25
    algorithm: Algorithm = Algorithm.XXH3
    resync: Resync = AT_NIGHT
    initial: Initial = AT_ONCE
    throttle: Throttle = UNTHROTTLED
    app_consistent: float = 0.0


class CurrentPolicy:
    """The policy of a VM that is being shipped, as it is now: who needs a value reads it from `now` each time, so that
    a change takes effect without a restart. Only in the shipper's thread.

    `look` says what it is by now; asked only by `refresh`. Without it, the policy stays as it is.
    """

    def __init__(self, first: ShippingPolicy, *, look: Callable[[], ShippingPolicy] | None = None) -> None:
        self.now = first
        self._look = look

    def refresh(self) -> None:
        """Take over what has changed. Cheap: called between two turns, and for each frame."""
        if self._look is not None:
            self.now = self._look()
