"""Copying up, while a guest uses a view, all that its overlays lack: until each one's data file is the whole disk.

A piece of at most 1 MiB is read from the point, which needs no lock, and taken into the overlay in one turn
(`hvfuse.turns`): blocks that the guest has written meanwhile are left alone. So the guest never waits for more than one
write of 1 MiB to the page cache. Holes of the point stay holes. As long as the guest is busy, each piece is followed by
a pause of up to three times what it took, at most `_LONGEST_PAUSE`.

Only what was flushed counts after a crash: at the latest every 32 MiB or 5 seconds. A fault, of the point or of the
overlay's file system, pauses the copying and is told; it is tried again after a while. Space is left to the guest: the
copying pauses before it takes the last 64 MiB.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from hvfuse.errors import HvfuseError, NoSpaceError
from hvfuse.extent import round_down, round_up
from hvfuse.target.overlay import BLOCK
from hvfuse.target.view import ViewDisk

PIECE = 1 << 20
"""Bytes."""
RETRY_SECONDS = 10.0
"""How long a pause after a fault lasts."""
RESERVE = 64 << 20
"""Bytes of the overlays' file system that are left to the guest."""

_WINDOW = 256 << 20
"""Bytes of a disk of which it is found out at once where there is data."""
_FLUSH_BYTES = 32 << 20
_FLUSH_SECONDS = 5.0
_PAUSE_FACTOR = 3.0
_LONGEST_PAUSE = 0.05
"""Seconds; at least 10 MiB per second are copied, however busy the guest is, if the disks can do that."""

_log = logging.getLogger(__name__)


class HydrationState(StrEnum):
    """What the copying is doing. WAITING: it has not been allowed yet; PAUSED: see `error`."""

    WAITING = "waiting"
    COPYING = "copying"
    PAUSED = "paused"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`total`: bytes that the overlays lacked when this process began, or lack now if that is more; `done`: how many of
    them they have, copied or written by the guest. `error`: why it pauses, or what failed afterwards."""

    state: HydrationState
    done: int = 0
    total: int = 0
    error: str | None = None


class DiskHydration:
    """Copies up one disk, piece by piece. For the thread beside the one that uses the disk."""

    def __init__(self, disk: ViewDisk, *, piece: int = PIECE) -> None:
        self.disk = disk
        self._piece_size = piece
        self._at = 0  # Blocks are never given back: what lies before is in the overlay.
        self._window = (0, 0)
        self._starts: list[int] = []
        self._ends: list[int] = []

    def step(self) -> int:
        """Take up the next piece, or hole. Returns the bytes that were read for it. Raises HvfuseError, OSError."""
        found = self.disk.unheld(self._at, _WINDOW)
        if found is None:
            return 0
        start, end = found
        end, is_data = self._piece(start, end)
        data = self.disk.lower.pread(start, end - start) if is_data else None
        self.disk.take_up(start, end, data)
        self._at = end
        return len(data or b"")

    def is_complete(self) -> bool:
        """Whether the overlay has the whole disk, flushed or not."""
        found = self.disk.unheld(self._at, _WINDOW)
        if found is not None:
            self._at = found[0]
        return found is None

    def _piece(self, start: int, end: int) -> tuple[int, bool]:
        """Where the piece at `start` ends, at most at `end`, and whether there may be data in it."""
        if not self._window[0] <= start < self._window[1]:
            self._look(start)
        end = min(end, self._window[1])
        index = bisect_right(self._ends, start)
        if index == len(self._ends) or self._starts[index] >= end:
            return end, False
        first = round_down(self._starts[index], BLOCK)
        if first > start:
            return min(first, end), False
        return min(end, round_up(self._ends[index], BLOCK), start + self._piece_size), True

    def _look(self, start: int) -> None:
        lower, end = self.disk.lower, start + _WINDOW
        extents = list(lower.extents(start, min(end, lower.size))) if start < lower.size else []
        self._window = (start, end)
        self._starts, self._ends = [low for low, _ in extents], [high for _, high in extents]


class Hydration:
    """Copies up all disks of a view whose overlays lie in `directory`. `tell` is told of progress, in the thread of
    `run`; `progress` may be read by any thread."""

    def __init__(
        self,
        disks: Iterable[ViewDisk],
        directory: str,
        *,
        tell: Callable[[Progress], None] = lambda progress: None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._disks = [DiskHydration(disk) for disk in disks]
        self._directory = directory
        self._tell = tell
        self._retry_seconds = retry_seconds
        self._total = self._lacking()
        self._uses = self._unflushed = 0
        self._flushed = time.monotonic()
        self.progress = Progress(state=HydrationState.WAITING, total=self._total)

    def _lacking(self) -> int:
        return sum(each.disk.unheld_bytes for each in self._disks)

    def is_complete(self) -> bool:
        """Whether all disks are wholly in their overlays, flushed or not."""
        return all(each.is_complete() for each in self._disks)

    def run(self, stop: threading.Event) -> bool:
        """Copy until all is there and flushed, or `stop` is set. Returns whether it is."""
        while not stop.is_set():
            try:
                if self.progress.error is None:
                    self.note(HydrationState.COPYING)
                for each in self._disks:
                    self._copy(each, stop)
                self._flush()
                if self.is_complete():
                    self.note(HydrationState.COPYING)
                    return True
            except (HvfuseError, OSError) as error:
                self.pause(error, stop)
        return False

    def pause(self, error: Exception, stop: threading.Event) -> None:
        """Tell of a fault, and wait before it is tried again."""
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        if text != self.progress.error:
            _log.warning("hydration pauses: %s", text)
        self.note(HydrationState.PAUSED, error=text)
        stop.wait(self._retry_seconds)

    def note(self, state: HydrationState, *, error: str | None = None) -> None:
        """Tell how far it is."""
        lacking = self._lacking() if state is not HydrationState.DONE else 0
        self._total = max(self._total, lacking)
        self.progress = Progress(state=state, done=self._total - lacking, total=self._total, error=error)
        try:
            self._tell(self.progress)
        except (HvfuseError, OSError) as failed:
            _log.warning("progress could not be told: %s", failed)

    def _copy(self, each: DiskHydration, stop: threading.Event) -> None:
        """Copy up one disk, as far as it is not stopped."""
        while not stop.is_set() and not each.is_complete():
            started = time.monotonic()
            self._demand_room()
            self._unflushed += each.step()
            if self.progress.error is not None:
                self.note(HydrationState.COPYING)
            if self._unflushed >= _FLUSH_BYTES or time.monotonic() - self._flushed >= _FLUSH_SECONDS:
                self._flush()
                self.note(HydrationState.COPYING)
            uses = sum(each.disk.uses for each in self._disks)
            if uses != self._uses:
                self._uses = uses
                stop.wait(min(_PAUSE_FACTOR * (time.monotonic() - started), _LONGEST_PAUSE))

    def _demand_room(self) -> None:
        found = os.statvfs(self._directory)
        free = found.f_bavail * found.f_frsize
        if free < RESERVE + PIECE:
            raise NoSpaceError(f"{self._directory}: {free >> 20} MiB free; the last {RESERVE >> 20} are for the guest")

    def _flush(self) -> None:
        for each in self._disks:
            each.disk.flush_behind()
        self._unflushed, self._flushed = 0, time.monotonic()
