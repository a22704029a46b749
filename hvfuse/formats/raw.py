"""Plain images: a raw disk, and the data of a fixed VHD, which is a raw disk with a footer behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from hvfuse import system
from hvfuse.errors import CorruptError, UsageError
from hvfuse.extent import Buffer


def check_range(path: str, offset: int, length: int, size: int) -> None:
    """Raise UsageError unless [offset, offset + length) lies within a disk of `size` bytes."""
    if offset < 0 or length < 0 or offset + length > size:
        raise UsageError(f"{path}: {length} bytes at {offset} do not lie within the disk's {size}")


class RawImage:
    """The first `size` bytes of a file, as an `Image`. Owns `fd`. Safe to use from several threads."""

    def __init__(self, fd: int, path: str, *, size: int) -> None:
        self._fd = fd
        self._path = path
        self._size = size

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def pread(self, offset: int, length: int) -> bytes:
        """The bytes of a range."""
        check_range(self._path, offset, length, self._size)
        data = system.pread(self._fd, length, offset)
        if len(data) < length:
            raise CorruptError(f"{self._path}: cut off at byte {offset + len(data)} while it was open")
        return data

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of `data`."""
        check_range(self._path, offset, len(data), self._size)
        system.pwrite("image:write", self._fd, data, offset)

    def trim(self, offset: int, length: int) -> None:
        """Give a range's space back; it reads as zeroes."""
        check_range(self._path, offset, length, self._size)
        system.write_zeroes("image:trim", self._fd, offset, length)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes."""
        check_range(self._path, offset, length, self._size)
        system.write_zeroes("image:zero", self._fd, offset, length)

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the ranges within [start, end) that are not holes, ascending."""
        check_range(self._path, start, end - start, self._size)
        for data, hole in system.data_extents(self._fd, start, end):
            yield data, hole - data

    def flush(self) -> None:
        """Make everything written so far durable."""
        system.fdatasync("image:sync", self._fd)

    def close(self) -> None:
        """Close the file. Does not flush."""
        os.close(self._fd)
