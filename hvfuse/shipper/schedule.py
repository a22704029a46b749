"""When a VM's shipper acts next. Pure: every instant is given, in seconds of a clock that only ever grows.

A cycle is due every `frequency` seconds, counted from when the one before was due. What happened to an attempt decides
about the next:

    it succeeded in time             the next is due on the grid
    it overran its interval          the next begins at once, and the grid moves with it
    it failed, and that may pass     again by the ladder (`hvfuse.shipper.retry`)
    it failed, and that will last    not before somebody asks
    somebody else is at the replica  again in BUSY_PAUSE; after PASSING seconds of that, it is a failure like others
    a copy waits                     it is looked again every interval, or earlier where the wait may end any moment

An interval that passed since a cycle was due, and in which it did not come, is *missed*; none is while a copy waits or
is made, as there can be no cycle then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hvfuse.shipper.retry import next_attempt, next_interval

PASSING = 300.0
"""Seconds for which it is not told as a failure that somebody else is at the replica."""
BUSY_PAUSE = 5.0
"""Seconds between attempts meanwhile."""


@dataclass(slots=True)
class Schedule:
    """`due`: when the next attempt is; inf: not before somebody asks. `failing_since`: when the first of the failed
    attempts in a row began, None if the last one did not fail."""

    frequency: float
    due: float
    failing_since: float | None = None
    _wanted: float = field(init=False)
    _told: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._wanted = self.due

    def wait(self, now: float) -> float:
        """Seconds until an attempt is due; 0 if one is."""
        return max(0.0, self.due - now)

    def missed(self, now: float) -> int:
        """How many cycles were missed since this was asked last."""
        passed = max(0, int((now - self._wanted) // self.frequency))
        news, self._told = passed - self._told, max(passed, self._told)
        return max(0, news)

    def succeeded(self, started: float, finished: float, *, copied: bool = False) -> int:
        """An attempt made a cycle; `copied`: after a copy. Returns the cycles missed since `missed` was asked last."""
        missed = 0 if copied else self.missed(finished)
        if self.failing_since is not None:
            self.failing_since, self.due = None, started
        if started >= self.due or finished >= self.due + self.frequency:
            self.due, _ = next_interval(self.due, finished, self.frequency)
        self._expect(self.due)
        return missed

    def waits(self, now: float, pause: float | None = None) -> None:
        """A copy waits: look again after `pause` seconds, or an interval."""
        self.failing_since = None
        self.due = now + min(self.frequency, pause or math.inf)
        self._expect(self.due)

    def is_passing(self, started: float, now: float) -> bool:
        """Somebody else is at the replica since `started` at the latest: whether that is no trouble yet. Then the next
        attempt is set."""
        self._begin_failing(started)
        assert self.failing_since is not None
        if now - self.failing_since >= PASSING:
            return False
        self.due = now + BUSY_PAUSE
        return True

    def failed(self, started: float, now: float, *, lasting: bool) -> None:
        """An attempt failed; `lasting`: trying again is of no use."""
        self._begin_failing(started)
        assert self.failing_since is not None
        self.due = math.inf if lasting else self.failing_since + next_attempt(now - self.failing_since)

    def change_frequency(self, frequency: float, now: float, *, begun: float) -> None:
        """From now on, cycles are due so often: the next one no later than one new interval after `begun`, when the
        last one began. What was missed until now has been asked for (`missed`)."""
        self.frequency = frequency
        if self.failing_since is None:
            self.due = min(self.due, max(begun + frequency, now))
            self._expect(max(self.due, now))
        else:
            self._expect(now)

    def _begin_failing(self, started: float) -> None:
        if self.failing_since is None:
            self.failing_since = started

    def _expect(self, at: float) -> None:
        self._wanted, self._told = at, 0
