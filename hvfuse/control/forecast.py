"""How fast a VM's logs grow, and when they reach their limits. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LOOK_BACK = 20
"""Cycles from which the growth is taken: the newest."""

Grown = Sequence[tuple[int, int]]
"""(instant at which a cycle ended, ns since 1970; bytes that were logged in it), oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """`rate`: bytes a second that are logged, None if too little is known. `used`: bytes that the logs hold and the
    target lacks. `soft_limit`, `hard_limit`: bytes at which they are compacted, and given up; None if nobody says."""

    rate: float | None = None
    used: int = 0
    soft_limit: int | None = None
    hard_limit: int | None = None

    @property
    def seconds_to_soft_limit(self) -> float | None:
        """None if they do not grow, or nobody knows."""
        return self._seconds(self.soft_limit)

    @property
    def seconds_to_hard_limit(self) -> float | None:
        """None if they do not grow, or nobody knows."""
        return self._seconds(self.hard_limit)

    def _seconds(self, limit: int | None) -> float | None:
        if limit is None or not self.rate:
            return None
        return max(0.0, (limit - self.used) / self.rate)


def growth(cycles: Grown) -> float | None:
    """Bytes a second that were logged in the newest cycles; None of fewer than two, or where the clock stood or was
    set back in between."""
    newest = cycles[-LOOK_BACK:]
    if len(newest) < 2 or newest[-1][0] <= newest[0][0]:
        return None
    return sum(size for _, size in newest[1:]) * 1e9 / (newest[-1][0] - newest[0][0])
