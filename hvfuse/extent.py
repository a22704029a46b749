"""Byte ranges: rounding, zero detection, and "newest write wins" over many ranges at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import stringzilla
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview

ZERO_BLOCK = 4096
"""Bytes; the grain in which runs of zeroes are looked for."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes `offset <= b < offset + length`."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """First byte after the extent."""
        return self.offset + self.length


def round_down(value: int, grain: int) -> int:
    """The greatest multiple of `grain` that is <= `value`."""
    return value - value % grain


def round_up(value: int, grain: int) -> int:
    """The least multiple of `grain` that is >= `value`."""
    return -(-value // grain) * grain


def is_zero(data: Buffer) -> bool:
    """Whether every byte is zero; exact, never by sampling. True for no bytes at all.

    Unsigned bytes add up to zero only when each of them is zero, and the sum is 64 bits wide.
    """
    return int(stringzilla.bytesum(data)) == 0


@dataclass(frozen=True, slots=True)
class Resolved:
    """Disjoint pieces in ascending order, each owned by the newest range that covers it.

    `starts`, `ends`: int64, shape (n,), `ends` exclusive. `owners`: int64, shape (n,), index of the
    owning range in the input.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    owners: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)


def newest_wins(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Resolved:
    """Resolve ranges given oldest first, so that each byte belongs to the last range covering it.

    `starts`, `ends`: int64, shape (n,), `ends` exclusive; empty ranges own nothing. Takes
    O((n + m) log m) whatever the overlaps, m being the number of distinct boundaries: each range is
    painted as two overlapping power-of-two spans, and the spans are then pushed down level by level.
    """
    keep = np.flatnonzero(ends > starts)
    if not len(keep):
        empty = np.empty(0, np.int64)
        return Resolved(empty, empty, empty)
    bounds, inverse = np.unique(np.concatenate([starts[keep], ends[keep]]), return_inverse=True)
    low, high = inverse[: len(keep)], inverse[len(keep) :]
    level = np.frexp((high - low).astype(np.float64))[1] - 1
    cells = len(bounds) - 1
    above: NDArray[np.int64] | None = None
    for k in range(int(level.max()), -1, -1):
        here = np.full(cells, -1, np.int64)
        if above is not None:
            half = 1 << k
            np.maximum(here, above, out=here)
            if cells > half:
                np.maximum(here[half:], above[: cells - half], out=here[half:])
        painted = np.flatnonzero(level == k)
        np.maximum.at(here, low[painted], keep[painted])
        np.maximum.at(here, high[painted] - (1 << k), keep[painted])
        above = here
    assert above is not None
    return _merge_cells(bounds, above)


def _merge_cells(bounds: NDArray[np.int64], owner: NDArray[np.int64]) -> Resolved:
    """Join neighbouring elementary cells of one owner and drop those that nobody owns."""
    changes = np.flatnonzero(owner[1:] != owner[:-1]) + 1
    first = np.concatenate([np.zeros(1, np.int64), changes])
    last = np.concatenate([changes, np.array([len(owner)], np.int64)])
    owned = owner[first] >= 0
    first, last = first[owned], last[owned]
    return Resolved(bounds[first], bounds[last], owner[first])
