"""What is to be done to a replica: data to write and zeroes to punch, found in blocks that differ. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvfuse.errors import CorruptError
from hvfuse.extent import ZERO_BLOCK, Extent, is_zero, round_down


@dataclass(frozen=True, slots=True)
class Change:
    """The bytes [offset, offset + length) become `data`; zeroes if it is None."""

    offset: int
    length: int
    data: memoryview | None

    @property
    def end(self) -> int:
        """First byte after it."""
        return self.offset + self.length


def changes(blocks: Iterable[Extent], data: Iterable[memoryview], *, end: int) -> list[Change]:
    """The changes that make a replica of `end` bytes have these blocks. `data`: each one's bytes.

    Zeroes are found in whole pieces of `ZERO_BLOCK` bytes, and the disk's last one, exactly.
    """
    found: list[Change] = []
    for block, view in zip(blocks, data, strict=True):
        length = min(block.end, end) - block.offset
        if length > 0:
            found.extend(_runs(block.offset, view[:length]))
    return found


def _runs(offset: int, view: memoryview) -> Iterator[Change]:
    zero = _zero_pieces(view)
    edges = np.flatnonzero(np.diff(zero)) + 1
    bounds = [0, *(edges * ZERO_BLOCK).tolist(), len(view)]
    nothing = bool(zero[0])
    for low, high in itertools.pairwise(bounds):
        yield Change(offset + low, high - low, None if nothing else view[low:high])
        nothing = not nothing


def _zero_pieces(view: memoryview) -> NDArray[np.bool_]:
    """Which pieces of `ZERO_BLOCK` bytes, the last of which may be short, are zeroes."""
    whole = round_down(len(view), ZERO_BLOCK)
    # Hardly any piece of real data begins with eight zeroes: this one comparison spares most of them.
    zero: NDArray[np.bool_] = np.frombuffer(view[:whole], np.uint64)[:: ZERO_BLOCK // 8] == 0
    for piece in np.flatnonzero(zero).tolist():
        zero[piece] = is_zero(view[piece * ZERO_BLOCK : (piece + 1) * ZERO_BLOCK])
    if whole < len(view):
        zero = np.append(zero, is_zero(view[whole:]))
    return zero


def refuse_unasked(found: Sequence[Change], asked: Sequence[Extent], *, end: int) -> None:
    """Raise CorruptError unless the changes are of exactly the blocks asked for, cut at `end`."""
    covered: list[list[int]] = []
    for change in found:
        if covered and covered[-1][1] == change.offset:
            covered[-1][1] = change.end
        else:
            covered.append([change.offset, change.end])
    wanted: list[list[int]] = []
    for extent in asked:
        if wanted and wanted[-1][1] == extent.offset:
            wanted[-1][1] = min(extent.end, end)
        else:
            wanted.append([extent.offset, min(extent.end, end)])
    if covered != wanted:
        raise CorruptError("the other side sent other blocks than it was asked for")
