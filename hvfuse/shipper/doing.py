"""What a shipper is at, and since when: what tells one that is busy from one that hangs."""

from __future__ import annotations

from hvfuse.system import Clock


class Doing:
    """Set by the shipper's thread, read by any."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._now: tuple[str, float] | None = None  # replaced as a whole

    def begin(self, what: str) -> None:
        """From now on this is done, in words that follow "the shipper"; also when it goes on and on: each frame, say,
        is something new."""
        self._now = (what, self._clock.monotonic())

    def rest(self) -> None:
        """Nothing is done until something is due."""
        self._now = None

    def as_json(self) -> dict[str, object]:
        """ "doing": in words, null if nothing; "doing_seconds": for how long it has made no step forward."""
        now = self._now
        if now is None:
            return {"doing": None, "doing_seconds": None}
        return {"doing": now[0], "doing_seconds": self._clock.monotonic() - now[1]}
