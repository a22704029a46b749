"""Watches healths over time: what changes, and stays so for a moment or comes back again and again, becomes an event.

A health is compared with the one that was told last, which is kept in the VM's record: so a change is told once,
whoever watches, and also if it came while nobody did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hvfuse.control.events import Severity
from hvfuse.control.records import Records
from hvfuse.control.status import Health, VmStatus
from hvfuse.errors import CorruptError, HvfuseError
from hvfuse.system import Clock

HOLD_SECONDS = 5.0
"""So long a health has to stay before it is told: processes that start, and one answer that is late, are no news."""
CALM_SECONDS = 600.0
COMINGS = 3
"""What is worse than what was told, and comes back so often, each time within CALM_SECONDS, is told even if it never
stays: a process that dies once a minute is gone for a moment only."""
PRUNE_SECONDS = 3600.0
KEEP_EVENTS = 30 * 86400.0

_SEVERITY = {Health.NORMAL: Severity.INFO, Health.WARNING: Severity.WARNING, Health.CRITICAL: Severity.ERROR}


@dataclass(slots=True)
class _Seen:
    """What was seen of a VM. `since`: when its health became what it is. `comings`: how often it became worse than
    what was told, the last time at `came`."""

    health: Health
    since: float
    comings: int = 0
    came: float = 0.0


class Monitor:
    """For one thread. To be called every second or so with the statuses of all VMs. `keep_events`: how many seconds
    events are kept."""

    def __init__(
        self, records: Records, *, clock: Clock, keep_events: Callable[[], float] = lambda: KEEP_EVENTS
    ) -> None:
        self._records = records
        self._clock = clock
        self._keep_events = keep_events
        self._prune_due = clock.monotonic()
        self._seen: dict[str, _Seen] = {}
        self._unkept: dict[str, str] = {}  # what was told of VMs whose record cannot be read

    def look(self, found: Iterable[VmStatus]) -> None:
        """Tell of the healths that have changed. What goes wrong with one VM keeps nobody from hearing of the others;
        the first such error is raised at the end."""
        now = self._clock.monotonic()
        failures: list[HvfuseError] = []
        for status in found:
            try:
                self._look_at(status, now)
            except HvfuseError as error:
                failures.append(error)
        if now >= self._prune_due:
            self._prune_due = now + PRUNE_SECONDS
            self._records.events.prune(before_ns=self._clock.now_ns() - int(self._keep_events() * 1e9))
        if failures:
            raise failures[0]

    def _look_at(self, status: VmStatus, now: float) -> None:
        if not status.is_protected:
            self._seen.pop(status.name, None)
            return
        before = self._told(status.name)
        seen = self._seen.setdefault(status.name, _Seen(status.health, now))
        if seen.health is not status.health:
            seen.health, seen.since = status.health, now
            if before is not None and status.health > Health[before.upper()]:
                seen.comings = 1 if now - seen.came > CALM_SECONDS else seen.comings + 1
                seen.came = now
        stays = now - seen.since >= HOLD_SECONDS
        if str(status.health) != before and (stays or (seen.comings >= COMINGS and seen.since == now)):
            self._tell(status, comes_back=not stays)
            seen.comings = 0

    def _told(self, vm: str) -> str | None:
        try:
            return self._records.read(vm).health
        except CorruptError:
            return self._unkept.get(vm)

    def _tell(self, status: VmStatus, *, comes_back: bool) -> None:
        worst = [reason for reason in status.reasons if reason.health is status.health and status.health]
        why = f": {worst[0].text}" if worst else ""
        why += ", and that again and again" if comes_back else ""
        now_ns = self._clock.now_ns()

        def event(before: str | None) -> dict[str, Any]:
            return {
                "severity": _SEVERITY[status.health],
                "text": f"{before or 'unknown'} → {status.health}{why}",
                "data": {
                    "from": before,
                    "to": str(status.health),
                    "state": status.state.value,
                    "reasons": [reason.as_json() for reason in status.reasons],
                },
                "now_ns": now_ns,
            }

        ids = tuple(reason.id for reason in status.reasons)
        try:
            self._records.tell_health(status.name, str(status.health), ids, event)
        except CorruptError:
            self._records.events.add(kind="health", vm=status.name, **event(self._unkept.get(status.name)))
            self._unkept[status.name] = str(status.health)
