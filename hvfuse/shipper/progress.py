"""How far a copy is: measured while it runs, kept once a second, and taken up again by the next process."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from hvfuse.shipper.copy import CopyReport
from hvfuse.system import Clock

SMALLER = 0.9
"""A pass that sends this part of what the one before it sent, or more, has hardly become smaller."""
INTERVAL = 1.0
"""Seconds between durable records of a copy's progress."""
_REMEMBERED = 30
"""Intervals over which the rate is taken."""


class CopyKind(StrEnum):
    """What a copy is for."""

    INITIAL = "initial"
    """There is no recovery point before it."""
    RESYNC = "resync"
    EXPORT = "export"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyProgress:
    """One pass of a copy, over all its runs.

    `generation`: hex. `number`: of the pass, from 1; told as "pass". `bytes_total`: to be copied or compared;
    `bytes_done` of them are, and took `bytes_sent`. `seconds`: of work. `bytes_per_second`: done lately, 0 if
    unknown. `seconds_left`: None if unknown.

    What the passes after it need to know: `earlier`, what all passes before this one took; `previous_sent` and
    `previous_seconds`, what the last of them did; `stalled_before`, how many of them in a row had hardly become
    smaller. `report`: what all took with this one, once only its commit is left; `is_told`: it is in the records.
    """

    kind: CopyKind
    generation: str
    number: int = 1
    bytes_total: int = 0
    bytes_done: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0
    bytes_per_second: float = 0.0
    seconds_left: float | None = None
    earlier: CopyReport | None = None
    previous_sent: int | None = None
    previous_seconds: float = 0.0
    stalled_before: int = 0
    report: CopyReport | None = None
    is_told: bool = False

    @property
    def part(self) -> float:
        """Done, 0 to 1."""
        return min(1.0, self.bytes_done / self.bytes_total) if self.bytes_total else 1.0

    @property
    def stalled(self) -> int:
        """How many passes in a row, with this one, had hardly become smaller than the one before them."""
        if self.previous_sent is None or not self.bytes_sent or self.bytes_sent < SMALLER * self.previous_sent:
            return 0
        return self.stalled_before + 1

    def next_pass(self, generation: str) -> CopyProgress:
        """The pass that follows this one, which is complete."""
        return CopyProgress(
            kind=self.kind,
            generation=generation,
            number=self.number + 1,
            earlier=self.report or self.earlier,
            previous_sent=self.bytes_sent,
            previous_seconds=self.seconds,
            stalled_before=self.stalled,
        )

    def as_json(self) -> dict[str, Any]:
        """As it is kept in the records and shown."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["pass"] = values.pop("number")
        for name in ("earlier", "report"):
            values[name] = None if values[name] is None else values[name].as_json()
        return {**values, "kind": str(self.kind), "bytes_saved": max(0, self.bytes_done - self.bytes_sent)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> CopyProgress | None:
        """From `as_json`; None if there was none, or it is not understood: nothing but figures depends on it."""
        known = {field.name for field in dataclasses.fields(cls)}
        with contextlib.suppress(KeyError, TypeError, ValueError):
            if values is None:
                return None
            found = {name: value for name, value in values.items() if name in known}
            for name in ("earlier", "report"):
                found[name] = None if values[name] is None else CopyReport.from_json(values[name])
            return cls(**found | {"number": int(values["pass"]), "kind": CopyKind(values["kind"])})
        return None


class Meter:
    """Measures one run of a copy. `kept`: how far the runs before it came; `keep`: makes it durable."""

    def __init__(self, kept: CopyProgress, *, clock: Clock, keep: Callable[[CopyProgress], None]) -> None:
        self.now = kept
        self._before = kept
        self._clock = clock
        self._keep = keep
        self._started = self._kept_at = clock.monotonic()
        self._samples: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)

    def tell(self, done: int, total: int, sent: int) -> bool:
        """`done`: by all runs as far as this one knows; `sent`: in this run. Returns whether it was kept."""
        at = self._clock.monotonic()
        self.now = replace(
            self.now,
            bytes_total=total,
            bytes_done=max(done, min(self._before.bytes_done, total)),
            bytes_sent=self._before.bytes_sent + sent,
            seconds=self._before.seconds + at - self._started,
        )
        if at - self._kept_at < INTERVAL:
            return False
        self._samples.append((at, done))
        self.save()
        return True

    def save(self) -> None:
        """Keep it now."""
        self._kept_at = self._clock.monotonic()
        rate = self._rate()
        left = (self.now.bytes_total - self.now.bytes_done) / rate if rate else None
        self.now = replace(self.now, bytes_per_second=rate, seconds_left=left)
        self._keep(self.now)

    def complete(self, run: CopyReport) -> None:
        """Only the commit is left of this pass, whose last run took `run`."""
        compared = None if run.bytes_compared is None else self.now.bytes_total
        report = replace(
            run,
            bytes_compared=compared,
            bytes_sent=self._before.bytes_sent + run.bytes_sent,
            frames_sent=run.frames_held + run.frames_sent,
            seconds=self._before.seconds + run.seconds,
        )
        self.now = replace(self.now, bytes_sent=report.bytes_sent, seconds=report.seconds)
        if self._before.earlier is not None:
            report = self._before.earlier.followed_by(report)
        self.now = replace(self.now, report=report)
        self.save()

    def _rate(self) -> float:
        """Of what was done lately. Where an earlier run's work is passed over, that is no rate: it is left out."""
        if len(self._samples) > 1:
            (first, before), (last, done) = self._samples[0], self._samples[-1]
            return (done - before) / (last - first)
        is_whole = self._before.seconds == 0 and self.now.seconds > 0
        return self.now.bytes_done / self.now.seconds if is_whole else 0.0
