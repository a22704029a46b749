"""Copying and comparing disks, whatever their formats: only what may hold data is read."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator

from hvfuse.extent import ZERO_BLOCK, is_zero, round_down, round_up
from hvfuse.formats.image import Image

Progress = Callable[[int], None]
"""Told, in bytes from the disk's start, how far the work has come."""

_PIECE = 1 << 20
"""Bytes read at once."""


def copy_disk(source: Image, target: Image, progress: Progress) -> int:
    """Copy `source` into `target`, which is at least as large and reads as zeroes.

    Blocks of zeroes are not written. Returns the bytes written. Does not flush.
    """
    written = 0
    for offset, length in _pieces(source.extents(0, source.size), source.size):
        data = memoryview(source.pread(offset, length))
        for start, end in _runs(data):
            target.pwrite(offset + start, data[start:end])
            written += end - start
        progress(offset + length)
    return written


def first_difference(one: Image, other: Image, progress: Progress) -> int | None:
    """The first byte in which two disks differ, or None.

    Where one disk is a longer copy of the other, that is the byte after the shorter one's last.
    """
    common = min(one.size, other.size)
    for offset, length in _pieces(heapq.merge(one.extents(0, common), other.extents(0, common)), common):
        here, there = one.pread(offset, length), other.pread(offset, length)
        if here != there:
            return offset + next(at for at in range(length) if here[at] != there[at])
        progress(offset + length)
    return None if one.size == other.size else common


def _pieces(extents: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """The union of extents in ascending order, widened to whole blocks of a disk of `size` bytes and
    cut into pieces that are not too large for memory."""
    done = 0
    for offset, length in extents:
        at = max(round_down(offset, ZERO_BLOCK), done)
        end = min(round_up(offset + length, ZERO_BLOCK), size)
        while at < end:
            stop = min(round_down(at, _PIECE) + _PIECE, end)
            yield at, stop - at
            at = stop
        done = max(done, end)


def _runs(data: memoryview) -> Iterator[tuple[int, int]]:
    """[start, end) of the runs of blocks in `data` that are not all zeroes."""
    start: int | None = None
    for at in range(0, len(data), ZERO_BLOCK):
        if is_zero(data[at : at + ZERO_BLOCK]):
            if start is not None:
                yield start, at
                start = None
        elif start is None:
            start = at
    if start is not None:
        yield start, len(data)
