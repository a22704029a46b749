"""Which recovery points to keep: a pure function of points, policy and time.

To take a point off the list frees no room by itself. A later point may need what the cycle wrote, so the
frames stay in the journal until no older point is left and the cycle is merged into the replica images. How
much the journal holds is therefore a matter of how old the oldest point is that stays (by the policy, or
because it is pinned), and of what was written since then; the number of points in between hardly counts. And
LMDB's file never shrinks: what merging frees is used again by the cycles that come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_NS = 10**9
_MINUTE = 60 * _NS
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR

_Timed = list[tuple[int, int]]
"""(seq, time in ns since 1970), by seq."""


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

    "Newest" means the greatest seq: clocks jump. What stays is what the policy wants of the points by the
    clock, and what it wants of them by the time that the VM was being replicated: a clock that is wrong for
    a while then neither thins all that was before nor keeps anything for ever. Without jumps and long
    breaks the two are the same, and what is let go now would not be wanted at any later `now_ns` either.
    """
    if not points:
        return frozenset()
    ascending = sorted(points)
    longest = max(2 * _DAY if policy.daily else _DAY, 10 * policy.keep_all_seconds * _NS)
    keep = {ascending[-1][0]}
    if policy.keep_all_seconds:
        limit = now_ns - policy.keep_all_seconds * _NS
        for times in _views(ascending, now_ns, longest=longest, step=_MINUTE):
            keep.update(seq for seq, time_ns in times if time_ns > limit)
    for count, period in ((policy.hourly, _HOUR), (policy.daily, _DAY)):
        if count:
            oldest = now_ns // period - count
            for times in _views(ascending, now_ns, longest=longest, step=period):
                newest = {time_ns // period: seq for seq, time_ns in times}
                keep.update(seq for slot, seq in newest.items() if slot >= oldest)
    return frozenset(keep)


def _views(ascending: _Timed, now_ns: int, *, longest: int, step: int) -> tuple[_Timed, _Timed]:
    """The points with both kinds of time; none is from the future. See the functions."""
    return _by_the_clock(ascending, now_ns), _by_time_replicated(ascending, now_ns, longest=longest, step=step)


def _by_the_clock(ascending: _Timed, now_ns: int) -> _Timed:
    """A point from the future was made no later than the next one that is not, or than now."""
    times: _Timed = []
    latest = now_ns
    for seq, time_ns in reversed(ascending):
        if time_ns <= now_ns:
            latest = time_ns
        times.append((seq, latest))
    return times[::-1]


def _by_time_replicated(ascending: _Timed, now_ns: int, *, longest: int, step: int) -> _Timed:
    """What lies between neighbours, counted back from now: `step` where the clock went back, or on by more
    than `longest`, which no thinning explains. It was set then, or the VM was away.

    `step` is the period of the rule that is applied. With less, the last point before a jump would share
    its slot with the first one after it and go, and then the next, which takes its place, and so on.
    """
    times: _Timed = []
    time_ns = later_ns = now_ns
    for seq, own_ns in reversed(ascending):
        gap = later_ns - own_ns
        time_ns -= gap if 0 <= gap <= longest else step
        times.append((seq, time_ns))
        later_ns = own_ns
    return times[::-1]
