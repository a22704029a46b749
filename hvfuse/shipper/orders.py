"""What an administrator ordered of a VM's copies. Durable, so that a restart changes nothing. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hvfuse.errors import UsageError

MAX_AHEAD_NS = 7 * 86400 * 10**9
"""So far ahead a copy may be ordered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What was ordered; the default is nothing.

    `now`: start whatever the window says; taken back when the copy is complete. With `at_ns` too: that is leave for
    what is in doubt, and not for what was ordered for then. `at_ns`: start at this instant, ns
    since 1970, and not before; taken back likewise. `full`: compare everything, although nothing or little is in
    doubt; taken back when that copy has begun. `suspended`: do not begin or go on; nothing is shipped while a copy is
    needed. `cancelled`: what was staged was dropped, and nothing starts by itself before `now` or `at_ns` is ordered.
    `repair`: at `at_ns`, copy anew what verification found to differ; nothing is in doubt before that.
    `seed`: generation (hex) that was exported to a medium: copy nothing over the network before the replica
    stands at it, or anywhere else, as only differences travel from then on. `paused`: ship nothing at all, neither
    cycles nor copies; nothing but `unpause` takes that back.
    """

    now: bool = False
    at_ns: int | None = None
    full: bool = False
    suspended: bool = False
    cancelled: bool = False
    seed: str | None = None
    repair: bool = False
    paused: bool = False

    @property
    def is_beyond_need(self) -> bool:
        """Whether a copy was ordered of a VM that may need none."""
        return self.full or self.repair

    def resynchronise(self, *, full: bool, at_ns: int | None, now_ns: int, repair: bool = False) -> Orders:
        """A copy is to start at `at_ns`, or now if that is None. Takes back what stood against it.

        `repair`: what it is to copy becomes doubtful only then. A comparison of everything includes that.
        Raises UsageError if that is more than 7 days after `now_ns`, or before it.
        """
        if at_ns is not None and at_ns < now_ns:
            raise UsageError("the time for a copy to start is over already")
        if at_ns is not None and at_ns > now_ns + MAX_AHEAD_NS:
            raise UsageError("a copy can be ordered for a time at most 7 days ahead")
        full = full or self.full
        repair = (repair or self.repair) and at_ns is not None and not full
        return Orders(now=at_ns is None, at_ns=at_ns, full=full, repair=repair, paused=self.paused)

    def ask(self) -> Orders:
        """Somebody waits for a copy: it is to start now, unless it is suspended or waits for its seed."""
        return replace(self, now=True, at_ns=None, cancelled=False)

    def suspend(self) -> Orders:
        """Hold the copy up, or do not begin one, until `resume`."""
        return replace(self, suspended=True)

    def resume(self) -> Orders:
        """Go on with what was suspended."""
        return replace(self, suspended=False)

    def cancel(self) -> Orders:
        """Give the copy up; the next one has to be ordered."""
        return Orders(cancelled=True, paused=self.paused)

    def pause(self) -> Orders:
        """Suspend replication as a whole."""
        return replace(self, paused=True)

    def unpause(self) -> Orders:
        """Go on with everything that was suspended."""
        return replace(self, paused=False, suspended=False)

    def withdraw(self) -> Orders:
        """Take back an order for a copy that is not needed and has not begun."""
        return replace(self, now=False, at_ns=None, full=False, repair=False)

    def allow_repair(self) -> Orders:
        """What is in doubt may be copied now. What was ordered for later beyond that stays."""
        return replace(self, now=True, at_ns=self.at_ns if self.full else None, cancelled=False, repair=False)

    @property
    def later(self) -> Orders:
        """These orders for what is not in doubt: leave for a repair is none for that."""
        return self if self.at_ns is None else replace(self, now=False)

    def begin_repair(self) -> Orders:
        """What the repair is to copy is in doubt from now on: a copy is needed, and may start."""
        return replace(self, now=True, at_ns=None, repair=False) if self.repair else self

    def done(self) -> Orders:
        """What is left when no copy is needed any more. An order for one beyond that stays: it has not begun."""
        if self.is_beyond_need:
            return replace(self.later, cancelled=False, seed=None)
        return Orders(suspended=self.suspended, paused=self.paused)

    def as_json(self) -> dict[str, Any]:
        """The fields, as they are kept in the records."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> Orders:
        """From `as_json`; None is no orders, missing fields have their defaults, unknown ones are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in (values or {}).items() if name in known})
