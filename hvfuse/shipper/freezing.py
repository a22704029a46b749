"""Which cycles are application-consistent: when the guest is frozen for a rotation, and what comes of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from hvfuse.consistency import Consistency
from hvfuse.shipper.cycle import CycleReport
from hvfuse.shipper.guest import FreezeError, Guest
from hvfuse.shipper.policy import Records
from hvfuse.shipper.source import Source
from hvfuse.spool import SealedCycle
from hvfuse.system import Clock

PAUSE = 600.0
"""Seconds after a guest that could not be frozen until it is tried again, or a quarter of the policy's interval if that
is less: a guest whose agent is sick should not be held up at every cycle."""

_log = logging.getLogger(__name__)


def is_due(*, every: float, last_ns: int | None, now_ns: int, failed_ago: float | None) -> bool:
    """Whether the next point has to be application-consistent.

    `every`: the policy's interval in seconds, 0 for off. `last_ns`: instant of the last such point, None if there was
    none. `failed_ago`: seconds since the guest could not be frozen, None if it could. A last point that lies in the
    future was made before the clock was set back: it tells nothing.
    """
    if every <= 0 or (failed_ago is not None and failed_ago < min(PAUSE, every / 4)):
        return False
    return last_ns is None or now_ns < last_ns or now_ns - last_ns >= every * 1e9


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt to freeze for a cycle. `seconds`: how long the guest stood still; `error`: why the point is
    crash-consistent all the same, None if it is not."""

    seconds: float
    error: str | None


class Freezing:
    """Rotates one VM, frozen where that is due. For one thread. `every`: what it is at the moment; see `is_due`."""

    def __init__(
        self,
        *,
        vm: str,
        guest: Guest | None,
        every: Callable[[], float],
        source: Source,
        records: Records,
        clock: Clock,
    ) -> None:
        self._vm = vm
        self._guest = guest
        self._every = every
        self._source = source
        self._records = records
        self._clock = clock
        self._failed_at: float | None = None
        self._attempts: dict[tuple[bytes, int], Attempt] = {}
        self._is_told_stuck = True  # what an earlier shipper told is to be taken back
        self.asked = False
        """Whether an administrator wants cycles application-consistent, due or not. Ends with the first failure."""

    def thaw_leftover(self) -> None:
        """Thaw the guest if an earlier shipper died while it stood still. Raises nothing."""
        if self._guest is not None:
            self._guest.thaw_leftover()
            self._tell_stuck()

    def rotate(self) -> int:
        """Seal the active cycle, with the guest frozen if that is due, and return its number. Raises as
        `Source.rotate`: where the guest cannot be frozen, the point is crash-consistent."""
        if not self.asked and not self._is_due():
            return self._source.rotate()
        if self._guest is None:
            cycle = self._source.rotate()
            self._note(cycle, 0.0, "nothing says how to freeze the guest")
            return cycle
        try:
            with self._guest.frozen() as stillness:
                cycle = self._source.rotate(Consistency.APPLICATION, proof=stillness.proof)
        except FreezeError as error:
            cycle = self._source.rotate()
            self._note(cycle, 0.0, str(error))
        else:
            self._note(cycle, stillness.seconds, stillness.broken)
        self._tell_stuck()
        return cycle

    def _is_due(self) -> bool:
        failed_ago = None if self._failed_at is None else self._clock.monotonic() - self._failed_at
        every = self._every()
        return every > 0 and is_due(
            every=every,
            last_ns=self._records.last_app_consistent_ns(),
            now_ns=self._clock.now_ns(),
            failed_ago=failed_ago,
        )

    def _note(self, number: int, seconds: float, error: str | None) -> None:
        """Keep what came of an attempt until the cycle is shipped. Without an error, the logs have the last word."""
        cycle = next((each for each in reversed(self._source.cycles()) if each.cycle == number), None)
        if cycle is None:  # given up in the same moment
            return
        if error is None and cycle.consistency is not Consistency.APPLICATION:
            error = "the guest was let go before all disks had stopped"
        self._attempts[cycle.generation, number] = Attempt(seconds, error)
        if error is None:
            self._failed_at = None
            self._records.update(last_app_consistent_ns=cycle.sealed_ns, guest_error=None)
        else:
            self._failed_at, self.asked = self._clock.monotonic(), False
            self._records.update(guest_error=error)
            _log.warning("%s: cycle %d is crash-consistent only: %s", self._vm, number, error)

    def _tell_stuck(self) -> None:
        """Show that the guest may be standing still, and that it is not any more."""
        stuck = self._guest.stuck() if self._guest is not None else None
        if stuck is not None or self._is_told_stuck:
            self._records.update(guest_stuck=stuck)
        self._is_told_stuck = stuck is not None

    def promised(self, cycle: SealedCycle) -> Consistency:
        """What the cycle's point promises: less than its logs say where the guest turned out to have moved."""
        attempt = self._attempts.get((cycle.generation, cycle.cycle))
        return Consistency.CRASH if attempt is not None and attempt.error is not None else cycle.consistency

    def told(self, report: CycleReport) -> CycleReport:
        """The report of a shipped cycle, with what came of the attempt to freeze for it."""
        attempt = self._attempts.get((report.generation, report.cycle))
        self._attempts = {
            (generation, cycle): each
            for (generation, cycle), each in self._attempts.items()
            if generation == report.generation and cycle > report.cycle
        }
        if attempt is None:
            return report
        return replace(report, frozen_seconds=attempt.seconds, freeze_error=attempt.error)
