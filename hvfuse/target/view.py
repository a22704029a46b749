"""A recovery point as disks to read and write: what was written to the view over what the point holds.

A read takes each block from the overlay if it is there, else from the point; a write goes to the overlay
alone, copying up the rest of a block that it touches in part. The point is never changed.

One thread uses a view. Another one may copy up beside it what the overlays lack (`hvfuse.target.hydration`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import xxhash

from hvfuse.extent import Buffer, is_zero, round_down, round_up
from hvfuse.manifest import DiskManifest
from hvfuse.target.overlay import BLOCK, Overlay, drop_overlays


class Lower(Protocol):
    """A disk that is read only. Ranges are bytes."""

    @property
    def size(self) -> int: ...

    def pread(self, offset: int, length: int) -> bytes:
        """Bytes of a range; fewer only at the end."""

    def pread_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `offset` on, which lie within the disk."""

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, end) of the ranges within [start, end) that may hold anything but zeroes, ascending."""


class Point(Protocol):
    """A recovery point that can be read: `hvfuse.target.journal.PointReader`."""

    @property
    def disks(self) -> tuple[DiskManifest, ...]: ...

    def pread(self, disk_name: str, offset: int, length: int) -> bytes: ...

    def pread_into(self, disk_name: str, offset: int, out: memoryview) -> None: ...

    def extents(self, disk_name: str, start: int, end: int) -> Iterator[tuple[int, int]]: ...

    def close(self) -> None: ...


class PointDisk:
    """One disk of a recovery point."""

    def __init__(self, point: Point, disk: DiskManifest) -> None:
        self._point = point
        self._name = disk.name
        self.size = disk.size
        self.pread_into = partial(point.pread_into, disk.name)

    def pread(self, offset: int, length: int) -> bytes:
        return self._point.pread(self._name, offset, length)

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        return self._point.extents(self._name, start, end)


class ViewDisk:
    """A disk of a view. Offsets and lengths are bytes; what lies past the end is ignored by `trim` and
    `zero` and not read; writing there extends the disk. Without an overlay it must not be changed.

    For one thread; but `unheld`, `take_up` and `flush_behind` are for one other beside it. What changes the disk
    takes a turn at the overlay. Reading does not: the lower disk never changes, and a block that comes into the
    overlay meanwhile is the same there.

    Raises OSError of the overlay's files, and what the lower disk raises.
    """

    def __init__(self, lower: Lower, overlay: Overlay | None) -> None:
        self._lower = lower
        self._overlay = overlay
        self._reads = 0

    @property
    def read_only(self) -> bool:
        """Whether there is no overlay to take writes."""
        return self._overlay is None

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._lower.size if self._overlay is None else self._overlay.size

    def pread(self, offset: int, length: int) -> bytes:
        """The bytes of a range, fewer only at the end of the disk."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer`; returns the bytes read, fewer only at the end of the disk."""
        self._reads += 1
        overlay = self._overlay
        end = offset + len(buffer)
        if overlay is None:
            is_below = end <= self._lower.size
        else:
            is_below = end <= overlay.visible and not overlay.holds_any(offset, end)
        if is_below:  # as most are
            self._lower.pread_into(offset, buffer)
            return len(buffer)
        end = min(end, self.size)
        for start, stop, held in self._pieces(offset, end):
            into = buffer[start - offset : stop - offset]
            done = overlay.pread_into(start, into) if held and overlay is not None else self._below_into(start, into)
            into[done:] = bytes(len(into) - done)
        return max(0, end - offset)

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        if start >= end:
            return iter(())
        return iter([(start, end, False)]) if self._overlay is None else self._overlay.pieces(start, end)

    @property
    def _visible(self) -> int:
        """Bytes of the lower disk that can still be seen."""
        return self._lower.size if self._overlay is None else self._overlay.visible

    def _below_into(self, offset: int, out: memoryview) -> int:
        """Of the lower disk; returns the bytes read, fewer where it has ended: the rest reads as zeroes."""
        length = max(0, min(len(out), self._visible - offset))
        if length:
            self._lower.pread_into(offset, out[:length])
        return length

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of `data`; durable after `flush`."""
        if not len(data):
            return
        overlay = self._writable()
        with overlay.turns:
            self._write(overlay, offset, data)

    def _write(self, overlay: Overlay, offset: int, data: Buffer) -> None:
        end = offset + len(data)
        if not len(data):
            return
        if offset % BLOCK:
            self._copy_up(overlay, round_down(offset, BLOCK))
        if end % BLOCK and end < self.size:
            self._copy_up(overlay, round_down(end, BLOCK))
        overlay.pwrite(offset, data)

    def _copy_up(self, overlay: Overlay, block: int) -> None:
        """Take the block at offset `block` into the overlay as it is."""
        if block < self.size and not overlay.holds(block):
            overlay.pwrite(block, self.pread(block, BLOCK))

    def _writable(self) -> Overlay:
        assert self._overlay is not None, "a read-only view is not written to"
        return self._overlay

    def trim(self, offset: int, length: int) -> None:
        """Make a range read as zeroes and give back the space that it takes in the overlay."""
        overlay = self._writable()
        end = min(offset + length, self.size)
        first = round_up(offset, BLOCK)
        last = end if end == self.size else round_down(end, BLOCK)
        with overlay.turns:
            if first >= last:
                self._write(overlay, offset, bytes(max(0, end - offset)))
                return
            self._write(overlay, offset, bytes(first - offset))
            overlay.clear(first, last)
            self._write(overlay, last, bytes(end - last))

    zero = trim
    """A hole in the overlay is the cheapest way to hold zeroes."""

    def truncate(self, size: int) -> None:
        """Set the size; what is added reads as zeroes."""
        overlay = self._writable()
        with overlay.turns:
            overlay.resize(size)

    def flush(self) -> None:
        """Make everything written durable. A failed sync is final. Raises OSError."""
        if self._overlay is not None:
            self._overlay.flush()

    # For the thread beside ----------------------------------------------------------------------------

    @property
    def lower(self) -> Lower:
        """What lies below; it may be longer than what is still to be seen of it."""
        return self._lower

    @property
    def uses(self) -> int:
        """How often the disk was read or changed; only ever grows."""
        return self._reads + self._writable().turns.taken

    @property
    def unheld_bytes(self) -> int:
        """Bytes that the overlay lacks."""
        return self.size - self._writable().held_bytes

    def unheld(self, start: int, length: int) -> tuple[int, int] | None:
        """The first range (offset, end) at or after `start`, on a block, that the overlay lacks, or so much of it that
        it is at least `length` long; None: it lacks none."""
        overlay = self._writable()
        with overlay.turns.behind():
            low = high = -1
            for begin, end, held in overlay.pieces(start, overlay.size):
                if high >= 0 and (held or high - low >= length):
                    break
                if not held:
                    low, high = begin if low < 0 else low, end
            return (low, high) if high >= 0 else None

    def take_up(self, start: int, end: int, data: bytes | None) -> None:
        """Take a range of the lower disk, on blocks, into the overlay, where that lacks it still. `data`: what stands
        there, fewer bytes at the end of the disk; None: zeroes. Blocks of zeroes are not written. Durable after
        `flush_behind`. Raises OSError."""
        overlay = self._writable()
        with overlay.turns.behind():
            for low, high, held in list(overlay.pieces(start, min(end, overlay.size))):
                if held:
                    continue
                # The lower disk may have been cut off since it was read.
                shown = b"" if data is None else data[low - start : max(low, min(high, overlay.visible)) - start]
                done = low
                for first, last in _data_runs(shown):
                    _hold_zeroes(overlay, done, low + first)
                    done = min(low + last, high)
                    overlay.pwrite(low + first, shown[first:last].ljust(done - low - first, b"\0"))
                _hold_zeroes(overlay, done, high)

    def flush_behind(self) -> None:
        """As `flush`, and the thread that uses the disk does not wait for it."""
        self._writable().flush(behind=True)

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, end) of the ranges within [start, end) that may hold anything but zeroes, ascending and apart."""
        low = high = -1
        for begin, finish in self._raw_extents(start, min(end, self.size)):
            if begin != high:
                if high > low:
                    yield low, high
                low = begin
            high = finish
        if high > low:
            yield low, high

    def _raw_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for begin, finish, held in self._pieces(start, end):
            if held:
                yield from self._writable().data_extents(begin, finish)
            else:
                yield from self._lower.extents(begin, min(finish, self._visible))


def _hold_zeroes(overlay: Overlay, start: int, end: int) -> None:
    if start < end:
        overlay.hold_zeroes(start, end)


def _data_runs(data: bytes) -> Iterator[tuple[int, int]]:
    """[start, end) of the runs of blocks in `data` that are not all zeroes; the ends on blocks."""
    view, start = memoryview(data), -1
    for at in range(0, len(data), BLOCK):
        if not is_zero(view[at : at + BLOCK]):
            start = at if start < 0 else start
        elif start >= 0:
            yield start, at
            start = -1
    if start >= 0:
        yield start, round_up(len(data), BLOCK)


class View:
    """All disks of a recovery point, by name.

    `overlays` is the directory for what is written, made if it is missing; an earlier view's overlays of
    the same point in it are continued. None makes the view read-only.
    """

    def __init__(self, point: Point, *, overlays: str | None) -> None:
        self._point = point
        self.overlays = os.path.abspath(overlays) if overlays is not None else None
        self._kept: list[Overlay] = []
        self.disks: dict[str, ViewDisk] = {}
        if self.overlays is not None:
            os.makedirs(self.overlays, mode=0o700, exist_ok=True)
        try:
            for disk in point.disks:
                self.disks[disk.name] = ViewDisk(PointDisk(point, disk), self._overlay(disk))
        except BaseException:
            self.close()
            raise

    def _overlay(self, disk: DiskManifest) -> Overlay | None:
        if self.overlays is None:
            return None
        # The digest of the sealed log is that of all logs before it: it names the contents.
        identity = xxhash.xxh3_128_digest(disk.disk_id + disk.digest)
        overlay = Overlay(os.path.join(self.overlays, disk.name), identity=identity, lower_size=disk.size)
        self._kept.append(overlay)
        return overlay

    @property
    def read_only(self) -> bool:
        """Whether the view takes no writes."""
        return self.overlays is None

    def close(self) -> None:
        """Make what was written durable and let everything go; the overlays stay. Raises OSError."""
        self._end(lambda overlay: overlay.flush())

    def drop(self) -> None:
        """Let everything go, and what was written with it."""
        self._end(lambda overlay: None)
        if self.overlays is not None:
            drop_overlays(self.overlays)

    def _end(self, before: Callable[[Overlay], None]) -> None:
        kept, self._kept = self._kept, []
        try:
            for overlay in kept:
                before(overlay)
        finally:
            for overlay in kept:
                overlay.close()
            self.disks.clear()
            self._point.close()
