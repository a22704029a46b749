"""Which recovery points to keep: a pure function of points, policy and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_NS = 10**9
_HOUR = 3600 * _NS
_DAY = 24 * _HOUR


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """`keep_all_seconds`: points younger than this all stay. `hourly`, `daily`: so many whole hours and
    days (of UTC) before the one under way keep their newest point each. Zero turns a rule off; the
    newest point stays whatever the policy."""

    keep_all_seconds: int = 3600
    hourly: int = 24
    daily: int = 0


def retain(points: Sequence[tuple[int, int]], policy: RetentionPolicy, now_ns: int) -> frozenset[int]:
    """The seqs to keep of `points`, (seq, time in ns since 1970) each, in any order.

    "Newest" means the greatest seq: clocks jump. A point from the future counts as just made. What is
    let go now would not be wanted at any later `now_ns` either.
    """
    if not points:
        return frozenset()
    ascending = sorted(points)
    keep = {ascending[-1][0]}
    if policy.keep_all_seconds:
        limit = now_ns - policy.keep_all_seconds * _NS
        keep.update(seq for seq, time_ns in ascending if time_ns > limit)
    for count, period in ((policy.hourly, _HOUR), (policy.daily, _DAY)):
        if count:
            oldest = now_ns // period - count
            newest = {time_ns // period: seq for seq, time_ns in ascending}
            keep.update(seq for slot, seq in newest.items() if slot >= oldest)
    return frozenset(keep)
