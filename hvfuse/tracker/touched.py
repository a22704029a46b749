"""Which ranges of a disk the active log covers: what was written since the last barrier.

Whoever compares a disk with the replica of its last sealed cycle asks this of every range that differs: if it
was touched, the difference says nothing; if not, the replica is wrong there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvfuse.errors import UsageError
from hvfuse.extent import Extent
from hvfuse.formats.companion import Kind
from hvfuse.tracker.log import ReplicationLog

MAX_OFFSET = 1 << 62
"""Bytes; no disk goes further."""

Ranges = Mapping[bytes, Sequence[Extent]]
"""Disk id to ranges of the disk, none empty, in any order."""


@dataclass(frozen=True, slots=True)
class Covered:
    """What a log covered at one instant; shape (n,), in bytes, in any order."""

    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def among(self, asked: Sequence[Extent]) -> list[Extent]:
        """Those of `asked`, whole and in their order, of which at least one byte is covered."""
        if not len(self.offsets) or not asked:
            return []
        order = np.argsort(self.offsets)
        starts = self.offsets[order]
        reached = np.maximum.accumulate((self.offsets + self.lengths)[order])
        before = np.searchsorted(starts, np.array([extent.end for extent in asked], np.int64))
        # Of the ranges that begin before the extent's end, one ends behind its beginning.
        found = (before > 0) & (reached[before - 1] > np.array([extent.offset for extent in asked], np.int64))
        return [asked[number] for number in np.flatnonzero(found).tolist()]


def covered(log: ReplicationLog) -> Covered:
    """What the log says of the disk: writes, zeroes, trims, and the resize that it began with. Caller holds the gate.

    A write's entry is there before the image changes, and both happen under the gate: whatever anybody has read of
    the image by now is covered if it was not there at the log's beginning.
    """
    entries = log.index.entries()
    entries = entries[(entries["kind"] != Kind.FLUSH) & (entries["length"] > 0)]
    sizes = sorted((log.head.previous_size, log.head.start_size))
    resized = np.array([sizes[0]] if sizes[1] > sizes[0] else [], np.int64)
    return Covered(
        np.concatenate([entries["offset"].astype(np.int64), resized]),
        np.concatenate([entries["length"].astype(np.int64), resized * 0 + (sizes[1] - sizes[0])]),
    )


def ranges(field: object) -> Ranges:
    """The ranges of a request: {disk id in hexadecimal: [[offset, length], ...]}. Raises UsageError."""
    if not isinstance(field, Mapping):
        raise UsageError("a request needs the disks' ranges: {disk id: [[offset, length], ...]}")
    try:
        return {bytes.fromhex(disk): [_extent(pair) for pair in pairs] for disk, pairs in field.items()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"{error!r} among the disks' ranges: {{disk id: [[offset, length], ...]}}") from None


def _extent(pair: Sequence[object]) -> Extent:
    offset, length = pair
    if type(offset) is not int or type(length) is not int:
        raise ValueError(pair)
    if not 0 <= offset < offset + length <= MAX_OFFSET:
        raise ValueError(pair)
    return Extent(offset, length)


def as_field(found: Ranges) -> dict[str, list[list[int]]]:
    """The reverse of `ranges`."""
    return {disk.hex(): [[each.offset, each.length] for each in extents] for disk, extents in found.items()}
