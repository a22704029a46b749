"""How much the logs of a VM may take before they are given up and regions marked instead."""

from __future__ import annotations

from hvfuse.formats.tracking import Scope
from hvfuse.tracker import resync
from hvfuse.tracker.resync import Tracked

HARD_LIMIT = 0.5
"""Part of the disks' size that logs may take before they are given up, as in Hyper-V Replica."""
SOFT_LIMIT = 0.25
"""The same while a copy of everything is under way. Logs are of no use before it is complete: past this, it is
cheaper to compare in another pass what they tell. That pass has the hard limit: it must have a chance to fit."""
LEAST_LIMIT = 8 << 20
"""Bytes that the logs may always take, however small the disks."""
_LEAST_STEP, _MOST_STEP = 1 << 20, 16 << 20
"""Bytes by which a log grows before the limits are looked at again: a part of what is left, within these."""


class Budget:
    """The limits of one VM. `sealed`: bytes of payload in sealed logs, as far as known."""

    def __init__(self, *, hard_limit: float, soft_limit: float) -> None:
        self.sealed = 0
        self.set_limits(hard_limit=hard_limit, soft_limit=soft_limit)

    def set_limits(self, *, hard_limit: float, soft_limit: float) -> None:
        """Parts of the disks' size. Caller holds the gate, or is the first."""
        self._hard_limit = hard_limit
        self._soft_limit = min(soft_limit, hard_limit)

    def look(self, disks: list[Tracked]) -> int | str:
        """How many bytes each log may take before this is asked again, or why they must not grow any more. Caller holds
        the gate; there is a disk."""
        copying = resync.is_resyncing(disks)
        limit = self._soft_limit if copying and resync.scope(disks) is Scope.FULL else self._hard_limit
        left = int(_bytes(limit, disks)) - self.used(disks)
        if left >= 0:
            return min(max(left // (2 * len(disks)), _LEAST_STEP), _MOST_STEP)
        if not copying:
            return f"the logs that the target has not taken have reached {limit:.0%} of the disks' size"
        return (
            f"the logs reached {limit:.0%} of the disks' size before the copy was complete: what is written from "
            "now on is marked, and compared in another pass"
        )

    def used(self, disks: list[Tracked]) -> int:
        """Bytes that the logs hold. A log that is given up at this moment counts or not."""
        logs = [disk.log for disk, _ in disks]
        return self.sealed + sum(log.stored for log in logs if log is not None)

    def status(self, disks: list[Tracked]) -> dict[str, int]:
        """For the control socket, in bytes."""
        return {
            "log_bytes": self.used(disks),
            "soft_limit_bytes": int(_bytes(self._soft_limit, disks)),
            "hard_limit_bytes": int(_bytes(self._hard_limit, disks)),
        }


def _bytes(limit: float, disks: list[Tracked]) -> float:
    """What a limit, part of the disks' size, comes to."""
    capacity = sum(max(disk.capacity, disk.size()) for disk, _ in disks)
    return max(limit * capacity, LEAST_LIMIT)
