"""Drives a comparison of one disk: asks the other side ahead of need, reads ours, and finds what differs.

    candidates   in the driver's thread: the spans in doubt, with the other side's summaries. A thread of
                 its own asks for the next batches meanwhile.
    Comparison.differences
                 in a worker's thread: reads one span's blocks, digests them, and, if the summaries are not
                 the same, asks for the other side's digests and tells the blocks that differ

Memory is bounded: `BATCH` spans' summaries twice, and one span of data for each worker.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hvfuse.extent import Extent
from hvfuse.formats.digests import (
    BLOCK,
    DigestKey,
    Digests,
    differ,
    digest_blocks,
    sparse_digests,
    summary,
    zero_digests,
)
from hvfuse.reconcile import plan
from hvfuse.system import page_buffer

BATCH = 32
"""Spans whose summaries are asked for at once: 128 MiB of disk, mostly 512 bytes of summaries."""

PIECE = 256 << 10
"""Bytes read and digested at once; whole blocks. Half of a core's own cache, mostly."""


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
    """Compares candidates of one disk with the other side. Safe for use by several threads.

    Where little differs a span is read in pieces, into a buffer that stays in the processor's cache, and only the
    blocks that differ are read once more. Where much is expected to differ the span is read once and kept:
    where the other side has zeroes, and after a span of which much differed.
    """

    def __init__(self, source: Source, other: Other, key: DigestKey) -> None:
        self._source = source
        self._other = other
        self._key = key
        self._own = threading.local()
        self._zero_summary = functools.cache(lambda count: summary(zero_digests(count, key), key))

    def differences(self, candidate: Candidate) -> Found | None:
        """What differs on a span; None if nothing does. Raises whatever the sides raise."""
        extents = candidate.extents
        keeps = self._expects_much(candidate)
        ours = [self._digests(extent, keeps=keeps) for extent in extents]
        summaries = np.array([summary(digests, self._key) for digests in ours])
        unequal = np.flatnonzero(differ(summaries, candidate.theirs)).tolist()
        blocks: Sequence[Extent] = ()
        if unequal:
            doubtful = [extents[nth] for nth in unequal]
            theirs = self._other.digests(doubtful, self._key)
            blocks = plan.differing(doubtful, np.concatenate([ours[nth] for nth in unequal]), theirs)
        self._own.much = 4 * sum(block.length for block in blocks) > sum(extent.length for extent in extents)
        if not blocks:  # nor where the other side's summary was of something that it does not have any more
            return None
        data = [self._at(block) for block in blocks]
        if not keeps:
            for block, view in zip(blocks, data, strict=True):
                self._fill(view, block.offset, self._source.occupied(block.offset, block.end))
        return Found(blocks, data)

    def _expects_much(self, candidate: Candidate) -> bool:
        if getattr(self._own, "much", False):
            return True
        zeroes = np.array([self._zero_summary(extent.length // BLOCK) for extent in candidate.extents])
        return not differ(zeroes, candidate.theirs).any()

    def _digests(self, extent: Extent, *, keeps: bool) -> Digests:
        """The digests of an extent's blocks. `keeps`: its bytes are in this thread's buffer, at their place."""
        occupied = self._source.occupied(extent.offset, extent.end)
        if keeps:
            whole = self._at(extent)
            self._fill(whole, extent.offset, occupied)

        def digest(low: int, high: int) -> Digests:
            if keeps:
                return digest_blocks(whole[low - extent.offset : high - extent.offset], self._key)
            pieces = []
            for at in range(low, high, PIECE):
                view = self._own_buffer("piece", PIECE)[: min(PIECE, high - at)]
                self._fill(view, at, occupied)
                pieces.append(digest_blocks(view, self._key))
            return np.concatenate(pieces)

        ranges = [(part.offset, part.end) for part in occupied]
        return sparse_digests([extent], self._key, data=lambda low, high: ranges, digest=digest)

    def _fill(self, view: memoryview, offset: int, occupied: Iterable[Extent]) -> None:
        """Make `view` the bytes at `offset`: those of the ranges `occupied`, and zeroes."""
        done = 0
        for part in occupied:
            low, high = max(part.offset - offset, 0), min(part.end - offset, len(view))
            if low < high:
                _blank(view, done, low)
                done = low + self._source.read_into(view[low:high], offset + low)
                _blank(view, done, high)
                done = high
        _blank(view, done, len(view))

    def _at(self, extent: Extent) -> memoryview:
        """An extent's place in this thread's buffer."""
        low = extent.offset % plan.SPAN
        return self._own_buffer("span", plan.SPAN)[low : low + extent.length]

    def _own_buffer(self, name: str, size: int) -> memoryview:
        """This thread's own."""
        buffer: memoryview | None = getattr(self._own, name, None)
        if buffer is None:
            buffer = page_buffer(size)
            setattr(self._own, name, buffer)
        return buffer


_ZERO = bytes(plan.SPAN)


def _blank(view: memoryview, low: int, high: int) -> None:
    if low < high:
        view[low:high] = _ZERO[: high - low]
