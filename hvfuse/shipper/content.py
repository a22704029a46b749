"""What goes into one frame: pieces of a disk in order, their bytes, and the zeroes among them.

Pure: reads nothing. Shared by the cycles that come from logs and by the copy that comes from images,
so that both find zeroes and join neighbours in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvfuse.extent import ZERO_BLOCK, Buffer, is_zero
from hvfuse.frames import EXTENT_DTYPE, Fill, Table

Int64s = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Content:
    """A frame's extents before encoding. `data`: the bytes of the DATA extents of `table`, in its order."""

    table: Table
    data: Sequence[Buffer]

    @property
    def zero_bytes(self) -> int:
        """Bytes of the extents that carry none."""
        return int(self.table["length"][self.table["kind"] == Fill.ZERO].sum())


@dataclass(frozen=True, slots=True)
class Pieces:
    """Disjoint, non-empty ranges of a disk in ascending order.

    `starts`, `ends`: bytes, shape (n,), `ends` exclusive. `origins`: shape (n,), where each piece's
    bytes come from, in whatever the maker of the pieces counts; `NOWHERE` for zeroes.
    """

    starts: Int64s
    ends: Int64s
    origins: Int64s

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, part: slice) -> Pieces:
        return Pieces(self.starts[part], self.ends[part], self.origins[part])

    @property
    def holes(self) -> Flags:
        """Which of the pieces are zeroes, shape (n,)."""
        return np.equal(self.origins, NOWHERE)

    def data_lengths(self) -> Int64s:
        """Bytes that each piece brings along, shape (n,): 0 for zeroes."""
        return np.where(self.holes, 0, self.ends - self.starts)


NOWHERE = -1


def starts_within(lengths: Int64s) -> Int64s:
    """Where each item begins when items of `lengths`, shape (n,), lie back to back."""
    return np.cumsum(lengths) - lengths


def split(pieces: Pieces, grain: int) -> Pieces:
    """Cut the pieces that have data wherever a multiple of `grain` on the disk lies inside them."""
    first = pieces.starts // grain
    cuts = np.where(pieces.holes, 0, (pieces.ends - 1) // grain - first)
    whole = np.repeat(np.arange(len(pieces)), cuts + 1)
    nth = np.arange(len(whole)) - starts_within(cuts + 1)[whole]
    cell = first[whole] + nth
    starts = np.where(nth == 0, pieces.starts[whole], cell * grain)
    ends = np.where(nth == cuts[whole], pieces.ends[whole], (cell + 1) * grain)
    return Pieces(starts, ends, pieces.origins[whole])


def join(pieces: Pieces, same: Flags) -> Pieces:
    """Make one of pieces that touch on the disk; the origin is the first one's.

    `same`: shape (n - 1,), whether pieces i and i + 1 may be one.
    """
    if not len(pieces):
        return pieces
    apart = ~(same & (pieces.starts[1:] == pieces.ends[:-1]))
    first = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(apart) + 1])
    last = np.append(first[1:], len(pieces)) - 1
    return Pieces(pieces.starts[first], pieces.ends[last], pieces.origins[first])


def join_kinds(pieces: Pieces) -> Pieces:
    """Join what touches: data with data, zeroes with zeroes."""
    return join(pieces, pieces.holes[1:] == pieces.holes[:-1])


def compose(pieces: Pieces, data: Buffer) -> Content:
    """Find the zero blocks in `data` (the pieces' bytes back to back) and join what touches.

    Zeroes are looked for in whole blocks of `ZERO_BLOCK` bytes, aligned on the disk, exactly.
    """
    cells = split(join_kinds(pieces), ZERO_BLOCK)
    lengths = cells.data_lengths()
    origins = np.where(cells.holes, NOWHERE, starts_within(lengths))
    blocks = np.flatnonzero(lengths == ZERO_BLOCK)
    # Hardly any block of non-zero data begins with a zero byte: this one comparison spares most of them.
    blocks = blocks[np.frombuffer(data, np.uint8)[origins[blocks]] == 0]
    view = memoryview(data)
    for block, place in zip(blocks.tolist(), origins[blocks].tolist(), strict=True):
        if is_zero(view[place : place + ZERO_BLOCK]):
            origins[block] = NOWHERE

    extents = join_kinds(Pieces(cells.starts, cells.ends, origins))
    table = np.zeros(len(extents), EXTENT_DTYPE)
    table["offset"] = extents.starts
    table["length"] = extents.ends - extents.starts
    table["kind"] = np.where(extents.holes, Fill.ZERO, Fill.DATA)
    kept = zip(extents.origins.tolist(), extents.data_lengths().tolist(), strict=True)
    return Content(table, [view[place : place + length] for place, length in kept if place != NOWHERE])


def zeroes(starts: Int64s, ends: Int64s) -> Content:
    """Extents of zeroes alone."""
    return compose(Pieces(starts, ends, np.full(len(starts), NOWHERE, np.int64)), b"")
