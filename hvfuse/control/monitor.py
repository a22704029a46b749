"""Watches healths over time: what changes, and stays so for a moment, becomes an event.

A health is compared with the one that was told last, which is kept in the VM's record: so a change is told once,
whoever watches, and also if it came while nobody did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hvfuse.control.events import Severity
from hvfuse.control.records import Records
from hvfuse.control.status import Health, VmStatus
from hvfuse.system import Clock

HOLD_SECONDS = 5.0
"""So long a health has to stay before it is told: processes that start, and one answer that is late, are no news."""
PRUNE_SECONDS = 3600.0
KEEP_EVENTS = 30 * 86400.0

_SEVERITY = {Health.NORMAL: Severity.INFO, Health.WARNING: Severity.WARNING, Health.CRITICAL: Severity.ERROR}


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
        self._seen: dict[str, tuple[Health, float]] = {}

    def look(self, found: Iterable[VmStatus]) -> None:
        """Tell of the healths that have changed."""
        now = self._clock.monotonic()
        if now >= self._prune_due:
            self._prune_due = now + PRUNE_SECONDS
            self._records.events.prune(before_ns=self._clock.now_ns() - int(self._keep_events() * 1e9))
        for status in found:
            if not status.is_protected:
                self._seen.pop(status.name, None)
                continue
            health, since = self._seen.get(status.name, (status.health, now))
            if health is not status.health:
                since = now
            self._seen[status.name] = (status.health, since)
            if now - since >= HOLD_SECONDS:
                self._tell(status)

    def _tell(self, status: VmStatus) -> None:
        before = self._records.read(status.name).health
        if before == str(status.health):
            return
        worst = [reason for reason in status.reasons if reason.health is status.health and status.health]
        why = f": {worst[0].text}" if worst else ""
        now_ns = self._clock.now_ns()
        self._records.update(
            status.name, health=str(status.health), health_reasons=tuple(reason.id for reason in status.reasons)
        )
        self._records.events.add(
            kind="health",
            vm=status.name,
            severity=_SEVERITY[status.health],
            text=f"{before or 'unknown'} → {status.health}{why}",
            data={
                "from": before,
                "to": str(status.health),
                "state": status.state.value,
                "reasons": [
                    {
                        "id": reason.id,
                        "health": str(reason.health),
                        "text": reason.text,
                        "next_command": reason.next_command,
                    }
                    for reason in status.reasons
                ],
            },
            now_ns=now_ns,
        )
