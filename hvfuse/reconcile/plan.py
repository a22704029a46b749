"""What is to be compared, in which order, and what differs. Pure.

The tree of digests (`hvfuse.formats.digests`) has two levels: the lower one a digest for each block of 64 KiB,
the upper one a summary for each extent to be compared on a *span*, `SPAN` bytes of the disk. Summaries are
compared first; only where they differ are the digests of the blocks looked at, and only blocks that differ
travel. Where both sides have a hole, nothing is looked at at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from hvfuse.extent import Extent
from hvfuse.formats.digests import BLOCK, Digests, differ, touched_blocks

SPAN = 4 << 20
"""Bytes; a multiple of a block."""
MAX_SIZE = 1 << 62
"""Bytes; no disk is larger, so that offsets, lengths and their sums fit 64 signed bits."""


def intersect(one: Iterable[Extent], other: Iterable[Extent]) -> Iterator[Extent]:
    """The bytes that are in both of two lists of extents, each ascending and apart."""
    ones, others = iter(one), iter(other)
    first, second = next(ones, None), next(others, None)
    while first is not None and second is not None:
        low, high = max(first.offset, second.offset), min(first.end, second.end)
        if low < high:
            yield Extent(low, high - low)
        if first.end <= second.end:
            first = next(ones, None)
        else:
            second = next(others, None)


def union_blocks(one: Iterable[Extent], other: Iterable[Extent]) -> list[Extent]:
    """The whole blocks that extents of either list touch; aligned, ascending and apart. Each list is ascending."""
    ranges = sorted([(extent.offset, extent.end) for extent in (*one, *other) if extent.length])
    merged: list[tuple[int, int]] = []
    for low, high in ranges:
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return [Extent(low, high - low) for low, high in touched_blocks(merged)]


def in_doubt(wanted: Sequence[Extent], ours: Iterable[Extent], theirs: Iterable[Extent]) -> list[Extent]:
    """Of the aligned extents `wanted`, the blocks where either side may have anything but zeroes.

    All lists are ascending and apart. `ours`, `theirs`: what is occupied on the two sides.
    """
    return list(intersect(wanted, union_blocks(ours, theirs)))


def spans(extents: Iterable[Extent]) -> Iterator[tuple[Extent, ...]]:
    """Aligned extents, ascending and apart, cut at the multiples of `SPAN`; those on one span together."""
    here: list[Extent] = []
    for extent in extents:
        at = extent.offset
        while at < extent.end:
            stop = min(extent.end, at - at % SPAN + SPAN)
            if here and here[0].offset // SPAN != at // SPAN:
                yield tuple(here)
                here = []
            here.append(Extent(at, stop - at))
            at = stop
    if here:
        yield tuple(here)


def differing(extents: Sequence[Extent], ours: Digests, theirs: Digests) -> list[Extent]:
    """The blocks of aligned extents whose digests differ, neighbours within an extent joined. Ascending."""
    found: list[Extent] = []
    first = 0
    for extent in extents:
        count = extent.length // BLOCK
        unequal = differ(ours[first : first + count], theirs[first : first + count])
        edges = np.flatnonzero(np.diff(np.concatenate([[False], unequal, [False]])))
        for low, high in edges.reshape(-1, 2).tolist():
            found.append(Extent(extent.offset + low * BLOCK, (high - low) * BLOCK))
        first += count
    return found
