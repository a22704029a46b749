"""The region map: where a disk may differ from its replica without a durable log record that says so.

A disk is cut into at most 8,192 regions of equal size, a power of two. Before the first write to a
region that is not marked, the mark is made durable; so after a crash of the host, only marked regions
have to be compared with the replica, whatever the page cache lost.

Three marks, one byte a region on disk (`hvfuse.formats.tracking`):

- HOT: written to since log and image were last synced together. Set before the write, cleared after a
  sealing for regions that have been left alone for a whole cycle: a region in use would only be
  marked again at once; and cleared where what it stands for has become dirty.
- DIRTY: may differ from the replica with no log that says how. Set when logging ends, and from then on before
  each write.
- COMPARING: the copy under way compares it. A copy of regions begins by making the dirty ones comparing, at the
  very instant at which logging begins; so what is dirty while it runs became so since, and is left to the next.
  Cleared when the target has acknowledged the copy.

No mark is taken before something else stands for it: until a copy is under way, dirty and comparing
regions count alike; once it is, `hvfuse.tracker.resync` says which count for what.

Marking costs a sync, so it is done ahead for a writer in a hurry: a miss that comes soon after another marks
four times as many regions as that did, from the missed one upward and around. A writer over a whole
disk, sequential or random, pays a handful of syncs; one that writes here and there now and then, whose
regions a crash would have to compare, marks just these. Dirty marks go a few regions ahead at most: each will
be compared, and copies follow each other until what gets dirty meanwhile is little.

The map in memory is never behind the one on disk: a byte is set in memory first, then written and synced,
and only then may the write go on. Clearing is written without a sync: what a crash brings back is a mark
too many.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hvfuse.extent import Extent
from hvfuse.formats.companion import Entries, Kind
from hvfuse.formats.image import ImageFormat, ImageInfo
from hvfuse.formats.tracking import COMPARING, DIRTY, HOT

MAX_REGIONS = 8192
MIN_REGION = 64 << 10
"""Bytes; the block in which source and replica are compared."""

_MARK_AHEAD = 4
_MOST_AHEAD = {HOT: MAX_REGIONS, DIRTY: 8}
_SOON = 0.1
"""Seconds."""


def region_size(disk_size: int) -> int:
    """The least power of two, in bytes, at which a disk of that size has at most 8,192 regions."""
    size = MIN_REGION
    while size * MAX_REGIONS < disk_size:
        size *= 2
    return size


def greatest_size(info: ImageInfo) -> int:
    """A size in bytes that the image file will hardly outgrow: a dynamic one grows up to its disk's size and
    a little for its own structures. (One that does outgrow it gets larger regions.)"""
    if info.format in (ImageFormat.RAW, ImageFormat.VHD_FIXED):
        return info.file_size
    disk = info.virtual_size if info.virtual_size is not None else 64 * info.file_size
    return max(info.file_size, disk + disk // 1024 + (4 << 20))


class RegionMap:
    """The map of one disk. `store` puts the map's bytes on disk; `sync` then makes them durable.

    `size`: bytes of a region; `reach`: bytes of disk that the map can tell of; `used`: regions that the disk
    has. The VM's gate guards all that changes a map; both callables raise OSError.
    """

    def __init__(self, marks: bytes, *, size: int, store: Callable[[bytes], None], sync: Callable[[], None]) -> None:
        self.size = size
        self.reach = size * MAX_REGIONS
        self.used = MAX_REGIONS
        self._shift = size.bit_length() - 1
        self._marks = bytearray(marks)
        self._store = store
        self._sync = sync
        self._ahead = 1
        self._missed_at = 0.0
        self._now = bytearray(MAX_REGIONS)
        self._before = bytearray(MAX_REGIONS)

    def cover(self, offset: int, length: int, mark: int = HOT) -> None:
        """Make sure that every region of a range carries `mark`, durably, before it is written to.

        The range ends at `reach` at the latest. Raises OSError: it must not be written to as if it did.
        """
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        if first == last:
            self._now[first] = 1
            if not self._marks[first] & mark:
                self._mark(first, first, mark)
            return
        self._now[first : last + 1] = b"\1" * (last - first + 1)
        if not np.bitwise_and.reduce(self._array()[first : last + 1]) & mark:
            self._mark(first, last, mark)

    def _mark(self, first: int, last: int, mark: int) -> None:
        marks = self._array()
        marks[first : last + 1] |= mark
        now = time.monotonic()
        most = _MOST_AHEAD[mark]
        self._ahead = min(self._ahead * _MARK_AHEAD, most) if now - self._missed_at < _SOON else 1
        self._missed_at = now
        if self._ahead > 1:
            marks[np.arange(last, last + self._ahead) % max(self.used, last + 1)] |= mark
        self.save()

    def save(self) -> None:
        """Make the map durable as it is. Raises OSError."""
        self._store(self.marks)
        self._sync()

    def _array(self) -> NDArray[np.uint8]:
        return np.frombuffer(self._marks, np.uint8)

    @property
    def marks(self) -> bytes:
        """The map as it is stored."""
        return bytes(self._marks)

    def switched(self) -> None:
        """A cycle begins: what is touched from now on counts for it."""
        self._before, self._now = self._now, bytearray(MAX_REGIONS)

    def settle(self) -> None:
        """Log and image of all the VM's disks are synced up to the last switch: let the regions go cold
        that were left alone since the switch before it. Raises OSError."""
        touched = np.frombuffer(self._now, np.uint8) | np.frombuffer(self._before, np.uint8)
        marks = self._array()
        cold = (touched == 0) & (marks & HOT != 0)
        if cold.any():
            marks[cold] &= np.uint8(~HOT & 0xFF)
            self._store(self.marks)

    def mark_entries(self, entries: Entries) -> None:
        """Mark dirty, in memory, what a log's entries cover: the log is about to be given up."""
        entries = entries[entries["kind"] != Kind.FLUSH]
        self.mark_ranges(entries["offset"].astype(np.int64), entries["length"].astype(np.int64))

    def mark_ranges(self, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Mark dirty, in memory, what ranges cover: shape (n,), in bytes; none is empty. What lies beyond `reach`
        counts for the last region."""
        edges = np.zeros(MAX_REGIONS + 1, np.int64)
        np.add.at(edges, np.minimum(offsets >> self._shift, MAX_REGIONS - 1), 1)
        np.add.at(edges, np.minimum((offsets + lengths - 1 >> self._shift) + 1, MAX_REGIONS), -1)
        self._array()[np.cumsum(edges)[:-1] > 0] |= DIRTY

    def mark_cut(self, before: int, after: int) -> None:
        """Mark dirty, in memory, what a resize cut off: it reads as zeroes should the disk grow again."""
        if after < before:
            self._array()[after >> self._shift : ((before - 1) >> self._shift) + 1] |= DIRTY

    def mark_hot_dirty(self) -> None:
        """Make dirty, in memory, whatever is hot: no log will tell what happened there."""
        marks = self._array()
        marks[marks & HOT != 0] |= DIRTY

    def forget_hot(self) -> None:
        """Let all regions be cold, in memory: what was written to them is sealed and synced, or marked dirty."""
        self._array()[:] &= np.uint8(~HOT & 0xFF)

    def start_comparing(self) -> None:
        """Make comparing what is dirty, or was to be compared before, and all else unmarked. Durable. Raises
        OSError. Caller holds the gate, and lets logging begin before it lets go."""
        marks = self._array()
        marks[:] = np.where(marks & (DIRTY | COMPARING), np.uint8(COMPARING), np.uint8(0))
        self.save()

    def clear(self, mark: int) -> None:
        """Take marks from all regions: COMPARING, or all that say "differs", once the target has acknowledged a
        copy, HOT when everything is synced and sealed. Durable. Raises OSError."""
        self._array()[:] &= np.uint8(~mark & 0xFF)
        self.save()

    def doubt_all(self) -> None:
        """Mark every region dirty, durably: nothing is known of the replica's copy, or it has none. Raises OSError."""
        self._array()[:] |= np.uint8(DIRTY)
        self.save()

    def blanket(self) -> None:
        """Mark every region, durably, with every mark that any region has, and HOT: the safe state while
        the size of regions changes. Raises OSError."""
        marks = self._array()
        marks[:] = np.bitwise_or.reduce(marks) | HOT
        self.save()

    def coarser(self, size: int, marks: bytes) -> RegionMap:
        """A map of `marks`, given in this map's regions, for regions of `size` bytes; not stored yet."""
        factor = size // self.size
        made = RegionMap(_merged(marks, factor), size=size, store=self._store, sync=self._sync)
        made._now = bytearray(_merged(bytes(self._now), factor))
        made._before = bytearray(_merged(bytes(self._before), factor))
        return made

    def extents(self, mark: int, disk_size: int) -> list[Extent]:
        """The ranges of a disk of that size, in bytes, that carry any of the marks in `mark`; ascending and apart."""
        marked = np.concatenate([[0], (self._array() & mark != 0).astype(np.int8), [0]])
        edges = np.flatnonzero(np.diff(marked))
        found = []
        for first, after in zip(edges[::2], edges[1::2], strict=True):
            start, end = int(first) * self.size, min(int(after) * self.size, disk_size)
            if start < end:
                found.append(Extent(start, end - start))
        return found

    def count(self, mark: int) -> int:
        """How many regions carry any of the marks in `mark`."""
        return int(np.count_nonzero(self._array() & mark))


def _merged(marks: bytes, factor: int) -> bytes:
    """The map for regions `factor` times as long: a region is what any of its parts was."""
    parts = np.frombuffer(marks, np.uint8).reshape(-1, min(factor, MAX_REGIONS))
    return bytes(np.bitwise_or.reduce(parts, axis=1)).ljust(MAX_REGIONS, b"\0")
