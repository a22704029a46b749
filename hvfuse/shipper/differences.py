"""The differences between disks and what the replica holds of them, as frames (`hvfuse.reconcile` finds them).

A group's spans are compared by the pool's workers, which make frames of the blocks that differ; a span is a
slot. Equal slots have no frame. A group's closing frame is empty: it says that the group was compared.

What is compared must not grow while a generation's copy is interrupted, since closed groups are not looked at
again. It does not: from the generation's begin on, what changes on the disks is in its logs.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from hvfuse.extent import Extent, round_up
from hvfuse.formats.digests import BLOCK, Algorithm, DigestKey, Digests, aligned
from hvfuse.reconcile import plan
from hvfuse.reconcile.compare import Candidate, Comparison, candidates
from hvfuse.shipper.content import NOWHERE, Content, Pieces, compose, zeroes
from hvfuse.shipper.pool import FramePool, Job
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.slots import Group, Outlet, Progress
from hvfuse.shipper.source import SourceDisk


@dataclass(frozen=True, slots=True)
class HeldDisk:
    """What the replica holds of one disk, as the other side of a comparison."""

    replica: Replica
    disk_id: bytes

    def occupied(self, low: int, high: int) -> Sequence[Extent]:
        return self.replica.occupied(self.disk_id, low, high)

    def summaries(self, extents: Sequence[Extent], key: DigestKey) -> Digests:
        return self.replica.summaries(self.disk_id, extents, key)

    def digests(self, extents: Sequence[Extent], key: DigestKey) -> Digests:
        return self.replica.digests(self.disk_id, extents, key)


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
        algorithm: Algorithm = Algorithm.XXH3,
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
        self._key = DigestKey.fresh(algorithm)
        self._asker = ThreadPoolExecutor(1, "hvfuse-digests")
        self._done = 0  # bytes of groups that are done, in this run or an earlier one
        self.compared = self.differing = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._asker.shutdown(wait=True, cancel_futures=True)

    def copy_group(self, group: Group) -> None:
        """Compare what is wanted of a group and not held, send what differs, and close the group."""
        wanted = self._wanted(group)
        if not wanted:
            return
        spans = {group.number(span[0].offset // plan.SPAN): span for span in plan.spans(wanted)}
        spans = {number: span for number, span in spans.items() if number not in self._outlet.held}
        missing = [extent for span in spans.values() for extent in span]
        ahead = deque((number, _length(span, group.disk.size)) for number, span in spans.items())
        within = 0
        with contextlib.closing(self._pool.make(self._jobs(group, missing))) as all_made:
            for made in all_made:
                if made.frame:
                    self._outlet.put(made.frame)
                    self.differing += made.told_bytes
                while ahead and ahead[0][0] <= made.number:  # with those on which both sides have a hole
                    within += ahead.popleft()[1]
                self._tell(within)
        self.compared += _length(missing, group.disk.size)
        empty = np.empty(0, np.int64)
        closing = Job(group.closing_number, group.disk.disk_id, lambda: zeroes(empty, empty))
        for made in self._pool.make([closing]):
            self._outlet.put(made.frame)

    def passed(self, group: Group) -> None:
        """The group is done, in this run or an earlier one."""
        self._done += _length(self._wanted(group), group.disk.size)
        self._tell(0)

    def _wanted(self, group: Group) -> list[Extent]:
        whole = Extent(group.start, group.end - group.start)
        return list(plan.intersect(self._extents[group.disk.disk_id], [whole]))

    def _tell(self, within: int) -> None:
        self._progress(self._done + within, self._total, self._outlet.sent)

    def _jobs(self, group: Group, missing: Sequence[Extent]) -> Iterator[Job]:
        """One for each slot on which there may be a difference."""
        other = HeldDisk(self._replica, group.disk.disk_id)
        comparison = Comparison(group, other, self._key)
        doubtful = candidates(missing, source=group, other=other, key=self._key, asker=self._asker)
        with contextlib.closing(doubtful):
            for candidate in doubtful:
                build = functools.partial(_content, comparison, candidate, group.disk.size)
                yield Job(group.number(candidate.place), group.disk.disk_id, build)


def _content(comparison: Comparison, candidate: Candidate, size: int) -> Content | None:
    """The blocks of a slot that differ, cut at the disk's end; None if none does."""
    found = comparison.differences(candidate)
    if found is None:
        return None
    starts: list[int] = []
    ends: list[int] = []
    origins: list[int] = []
    data: list[memoryview] = []
    for block, view in zip(found.blocks, found.data, strict=True):
        cut = min(max(size, block.offset), block.end)
        starts += [block.offset, cut]
        ends += [cut, block.end]
        origins += [block.offset, NOWHERE]
        data.append(view[: cut - block.offset])
    bounds = np.array([starts, ends], np.int64)
    real = bounds[1] > bounds[0]
    pieces = Pieces(bounds[0][real], bounds[1][real], np.array(origins, np.int64)[real])
    return compose(pieces, b"".join(data))


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


def _length(extents: Sequence[Extent], size: int) -> int:
    """Bytes of extents within a disk."""
    return sum(max(0, min(extent.end, size) - extent.offset) for extent in extents)
