"""The differences between disks and what the replica holds of them, found by digests of their blocks.

The replica is asked for the digests of a few slots at a time, ahead of their being needed and in a thread of its
own, while the pool's workers read the source's blocks, digest them, and make frames of those that differ.
Holes are not read on either side; where both have one nothing happens at all. Equal slots have no frame. A
group's closing frame is empty: it says that the group was compared.

What is compared must not grow while a generation's copy is interrupted, since closed groups are not looked at
again. It does not: from the generation's begin on, what changes on the disks is in its logs.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from hvfuse.extent import Extent, round_up
from hvfuse.formats.digests import (
    BLOCK,
    Digests,
    aligned,
    block_count,
    differ,
    digest_blocks,
    sparse_digests,
    zero_digests,
)
from hvfuse.shipper import slots
from hvfuse.shipper.content import NOWHERE, Content, Pieces, compose, zeroes
from hvfuse.shipper.pool import FramePool, Job
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.slots import Group, Outlet, Progress
from hvfuse.shipper.source import SourceDisk

BATCH = 32
"""Slots whose digests are asked for at once: 128 MiB of disk, 32 KiB of digests."""

Wanted = dict[int, list[Extent]]
"""Slot of a group to the aligned extents on it that are to be compared; ascending."""


class Differences:
    """Compares disks with the replica, where a COPY over its position is open, and sends what differs.

    `regions`: as in `Over`. `ends`: bytes to look at, by disk. `compared`, `differing`: bytes, of this run.
    """

    def __init__(
        self,
        disks: Sequence[SourceDisk],
        regions: Mapping[bytes, Sequence[Extent]] | None,
        *,
        replica: Replica,
        outlet: Outlet,
        pool: FramePool,
        progress: Progress,
    ) -> None:
        # What was cut off a disk is compared, too: it would be seen again if the disk grew.
        held = [max(disk.size, replica.extent(disk.disk_id)) for disk in disks]
        self.ends = [round_up(end, BLOCK) for end in held]
        self._extents = {
            disk.disk_id: _to_compare(disk, None if regions is None else regions.get(disk.disk_id, ()), end)
            for disk, end in zip(disks, held, strict=True)
        }
        self._total = sum(_length(self._extents[disk.disk_id], disk.size) for disk in disks)
        self._replica = replica
        self._outlet = outlet
        self._pool = pool
        self._progress = progress
        self._seed = int.from_bytes(os.urandom(8), "little")
        self._zero = zero_digests(1, self._seed)
        self._asker = ThreadPoolExecutor(1, "hvfuse-digests")
        self._done = self._within = 0  # bytes compared: in groups that are done, in the one under way
        self.compared = self.differing = 0

    def __enter__(self) -> Differences:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._asker.shutdown(wait=True, cancel_futures=True)

    def copy_group(self, group: Group) -> None:
        """Compare what is wanted of a group and not held, send what differs, and close the group."""
        by_slot = _by_slot(self._extents[group.disk.disk_id], group)
        if not by_slot:
            return
        wanted = {slot: runs for slot, runs in by_slot.items() if group.first + slot not in self._outlet.held}
        with contextlib.closing(self._pool.make(self._jobs(group, wanted))) as all_made:
            for made in all_made:
                if made.frame:
                    self._outlet.put(made.frame)
                    self.differing += made.told_bytes
                self._tell()
        empty = np.empty(0, np.int64)
        closing = Job(group.closing_number, group.disk.disk_id, lambda: zeroes(empty, empty))
        for made in self._pool.make([closing]):
            self._outlet.put(made.frame)

    def passed(self, group: Group) -> None:
        """The group is done, in this run or an earlier one."""
        self._done += sum(
            _length(extents, group.disk.size) for extents in _by_slot(self._extents[group.disk.disk_id], group).values()
        )
        self._within = 0
        self._tell()

    def _tell(self) -> None:
        self._progress(self._done + self._within, self._total, self._outlet.sent)

    def _jobs(self, group: Group, wanted: Wanted) -> Iterator[Job]:
        """One for each slot on which there may be a difference."""
        occupied = group.occupied()
        with contextlib.closing(self._theirs(group, wanted)) as all_theirs:
            for slot, theirs in all_theirs:
                if occupied[slot] or differ(theirs, self._zero).any():
                    build = functools.partial(self._content, group, wanted[slot], theirs)
                    yield Job(group.first + slot, group.disk.disk_id, build)
                length = _length(wanted[slot], group.disk.size)
                self.compared += length
                self._within += length

    def _theirs(self, group: Group, wanted: Wanted) -> Generator[tuple[int, Digests]]:
        """Slot by slot the replica's digests; the next batch is asked for while one is being used."""
        asked: deque[tuple[list[int], Future[Digests]]] = deque()
        order = list(wanted)
        try:
            for first in range(0, len(order), BATCH):
                batch = order[first : first + BATCH]
                extents = aligned((extent for slot in batch for extent in wanted[slot]), end=group.end)
                future = self._asker.submit(self._replica.digests, group.disk.disk_id, extents, self._seed)
                asked.append((batch, future))
                if len(asked) == 2:
                    yield from _cut(*asked.popleft(), wanted)
            while asked:
                yield from _cut(*asked.popleft(), wanted)
        finally:
            for _, future in asked:
                if not future.cancel():
                    future.exception()

    def _content(self, group: Group, extents: Sequence[Extent], theirs: Digests) -> Content | None:
        """The blocks of a slot's extents that differ; None if none does."""
        starts: list[int] = []
        ends: list[int] = []
        origins: list[int] = []
        data: list[memoryview] = []
        first = 0
        for extent in extents:
            blocks, ours = self._ours(group, extent)
            count = block_count([extent])
            for block in np.flatnonzero(differ(ours, theirs[first : first + count])).tolist():
                low = extent.offset + block * BLOCK
                cut = min(max(group.disk.size, low), low + BLOCK)
                starts += [low, cut]
                ends += [cut, low + BLOCK]
                origins += [low, NOWHERE]
                data.append(blocks[block * BLOCK : block * BLOCK + cut - low])
            first += count
        bounds = np.array([starts, ends], np.int64)
        real = bounds[1] > bounds[0]
        if not real.any():
            return None
        pieces = Pieces(bounds[0][real], bounds[1][real], np.array(origins, np.int64)[real])
        return compose(pieces, b"".join(data))

    def _ours(self, group: Group, extent: Extent) -> tuple[memoryview, Digests]:
        """The source's bytes of an aligned extent, zeroes in holes and beyond the end, and their digests."""
        blocks = memoryview(bytearray(extent.length))
        ranges = group.data(extent.offset, extent.end)
        for low, high in ranges:
            data = group.read(low, high)
            blocks[low - extent.offset : low - extent.offset + len(data)] = data
        return blocks, sparse_digests(
            [extent],
            self._seed,
            data=lambda low, high: ranges,
            digest=lambda low, high: digest_blocks(blocks[low - extent.offset : high - extent.offset], self._seed),
        )


def _to_compare(disk: SourceDisk, regions: Sequence[Extent] | None, end: int) -> list[Extent]:
    """The blocks to be compared, ascending; `regions` None: all of them. `end`: of the disk, or of what the
    replica has of it if that is more."""
    if regions is None:
        return aligned([Extent(0, end)], end=end)
    inside = [
        Extent(region.offset, min(region.end, disk.size) - region.offset)
        for region in regions
        if region.offset < disk.size
    ]
    return aligned([*inside, Extent(disk.size, end - disk.size)], end=end)


def _by_slot(extents: Sequence[Extent], group: Group) -> Wanted:
    """Cut what lies within a group at the slots' edges."""
    found: Wanted = {}
    first = bisect.bisect_right(extents, group.start, key=lambda extent: extent.end)
    last = bisect.bisect_left(extents, group.end, key=lambda extent: extent.offset)
    for extent in extents[first:last]:
        at, end = max(extent.offset, group.start), min(extent.end, group.end)
        while at < end:
            slot = (at - group.start) // slots.SLOT
            stop = min(end, group.start + (slot + 1) * slots.SLOT)
            found.setdefault(slot, []).append(Extent(at, stop - at))
            at = stop
    return found


def _cut(batch: Sequence[int], asked: Future[Digests], wanted: Wanted) -> Iterator[tuple[int, Digests]]:
    """The answer for a batch of slots, by slot."""
    digests, first = asked.result(), 0
    for slot in batch:
        count = block_count(wanted[slot])
        yield slot, digests[first : first + count]
        first += count


def _length(extents: Sequence[Extent], size: int) -> int:
    """Bytes of extents within a disk."""
    return sum(max(0, min(extent.end, size) - extent.offset) for extent in extents)
