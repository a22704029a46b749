"""Drives a comparison of one disk: asks the other side ahead of need, reads ours, and finds what differs.

    candidates   in the driver's thread: the spans in doubt, with the other side's summaries. A thread of
                 its own asks for the next batches meanwhile.
    Comparison.differences
                 in a worker's thread: reads one span's blocks, digests them, and, if the summaries are not
                 the same, asks for the other side's digests and tells the blocks that differ

Memory is bounded: `BATCH` spans' summaries twice, and one span of data for each worker.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hvfuse.extent import Extent
from hvfuse.formats.digests import DigestKey, Digests, differ, digest_blocks, sparse_digests, summary
from hvfuse.reconcile import plan
from hvfuse.system import page_buffer

BATCH = 32
"""Spans whose summaries are asked for at once: 128 MiB of disk, mostly 512 bytes of summaries."""


class Source(Protocol):
    """The side whose contents count."""

    def occupied(self, low: int, high: int) -> Sequence[Extent]:
        """The ranges within [low, high) that may hold anything but zeroes; ascending and apart."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from the disk at `offset`. Returns the bytes read; fewer only where the disk ends.
        For any thread. Raises HvfuseError."""


class Other(Protocol):
    """The side that is to become the same; its state does not change while it is compared. For any thread."""

    def occupied(self, low: int, high: int) -> Sequence[Extent]:
        """As `Source.occupied`."""

    def summaries(self, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """The summary of each of the aligned extents, ascending, each within a span: shape (len(extents), 2)."""

    def digests(self, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """The digests of the blocks of aligned extents, ascending."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A span in doubt: its extents, and the other side's summary of each, shape (n, 2)."""

    extents: tuple[Extent, ...]
    theirs: Digests

    @property
    def place(self) -> int:
        """The number of the span on the disk."""
        return self.extents[0].offset // plan.SPAN


@dataclass(frozen=True, slots=True)
class Found:
    """What differs on a span. `blocks`: whole blocks, ascending, neighbours joined; `data`: their bytes,
    zeroes in holes and beyond the disk's end, valid until the same thread compares again."""

    blocks: Sequence[Extent]
    data: Sequence[memoryview]


def candidates(
    wanted: Sequence[Extent], *, source: Source, other: Other, key: DigestKey, asker: Executor
) -> Generator[Candidate]:
    """The spans of the aligned extents `wanted`, ascending, on which there may be a difference.

    `asker` runs what asks the other side: with several threads, several batches at once. Close the generator
    before either side is closed. Raises whatever the sides raise.
    """
    if not wanted:
        return
    low, high = wanted[0].offset, wanted[-1].end
    in_doubt = plan.in_doubt(wanted, source.occupied(low, high), other.occupied(low, high))
    asked: deque[tuple[list[tuple[Extent, ...]], Future[Digests]]] = deque()
    order = plan.spans(in_doubt)
    size = 1  # small at first, so that those who compare need not wait
    try:
        while batch := list(itertools.islice(order, size)):
            size = min(2 * size, BATCH)
            extents = [extent for span in batch for extent in span]
            asked.append((batch, asker.submit(other.summaries, extents, key)))
            if len(asked) > 2:
                yield from _answered(*asked.popleft())
        while asked:
            yield from _answered(*asked.popleft())
    finally:
        for _, future in asked:
            if not future.cancel():
                future.exception()


def _answered(batch: Iterable[tuple[Extent, ...]], answer: Future[Digests]) -> Generator[Candidate]:
    summaries, first = answer.result(), 0
    for span in batch:
        yield Candidate(span, summaries[first : first + len(span)])
        first += len(span)


class Comparison:
    """Compares candidates of one disk with the other side. Safe for use by several threads."""

    def __init__(self, source: Source, other: Other, key: DigestKey) -> None:
        self._source = source
        self._other = other
        self._key = key
        self._own = threading.local()

    def differences(self, candidate: Candidate) -> Found | None:
        """What differs on a span; None if nothing does. Raises whatever the sides raise."""
        extents = candidate.extents
        views = self._read(extents)
        ours = [self._digests(extent, view, occupied) for extent, (view, occupied) in zip(extents, views, strict=True)]
        summaries = np.array([summary(digests, self._key) for digests in ours])
        unequal = np.flatnonzero(differ(summaries, candidate.theirs)).tolist()
        if not unequal:
            return None
        doubtful = [extents[nth] for nth in unequal]
        theirs = self._other.digests(doubtful, self._key)
        blocks = plan.differing(doubtful, np.concatenate([ours[nth] for nth in unequal]), theirs)
        if not blocks:  # the other side's summary was of something that it does not have any more
            return None
        base = candidate.place * plan.SPAN
        buffer = self._buffer()
        return Found(blocks, [buffer[block.offset - base : block.end - base] for block in blocks])

    def _read(self, extents: Sequence[Extent]) -> list[tuple[memoryview, Sequence[Extent]]]:
        """The bytes of extents, at their place in this thread's buffer, and what of them is occupied."""
        buffer = self._buffer()
        base = extents[0].offset - extents[0].offset % plan.SPAN
        found = []
        for extent in extents:
            view = buffer[extent.offset - base : extent.end - base]
            occupied = self._source.occupied(extent.offset, extent.end)
            at = extent.offset
            for part in occupied:
                _blank(view, at - extent.offset, part.offset - extent.offset)
                got = self._source.read_into(view[part.offset - extent.offset : part.end - extent.offset], part.offset)
                at = part.offset + got
                _blank(view, at - extent.offset, part.end - extent.offset)
                at = part.end
            _blank(view, at - extent.offset, extent.length)
            found.append((view, occupied))
        return found

    def _digests(self, extent: Extent, view: memoryview, occupied: Sequence[Extent]) -> Digests:
        if len(occupied) == 1 and occupied[0].length == extent.length:
            return digest_blocks(view, self._key)
        return sparse_digests(
            [extent],
            self._key,
            data=lambda low, high: [(part.offset, part.end) for part in occupied],
            digest=lambda low, high: digest_blocks(view[low - extent.offset : high - extent.offset], self._key),
        )

    def _buffer(self) -> memoryview:
        buffer: memoryview | None = getattr(self._own, "buffer", None)
        if buffer is None:
            buffer = self._own.buffer = page_buffer(plan.SPAN)
        return buffer


_ZERO = bytes(plan.SPAN)


def _blank(view: memoryview, low: int, high: int) -> None:
    if low < high:
        view[low:high] = _ZERO[: high - low]
