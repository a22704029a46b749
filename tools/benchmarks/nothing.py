"""A mount of one file whose reads and writes do nothing: python -m benchmarks.nothing MOUNTPOINT SIZE.

What is left is the round trip through the kernel and our loop.
"""

from __future__ import annotations

import os
import sys
import tempfile

from hvfuse import fuse
from hvfuse.filesystem import Filesystem, Node, OpenFile

NAME = "nothing"


class Nothing(Filesystem):
    """Both the file system and its only file."""

    def __init__(self, size: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - for its attributes
        self._file.truncate(size)

    def stat(self, node: Node | None = None) -> os.stat_result:
        return os.stat("/") if node == "/" else os.fstat(self._file.fileno())

    def open(self, path: str, flags: int) -> OpenFile:
        return self  # type: ignore[return-value]

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return len(buffer)

    def write(self, data: memoryview, offset: int) -> int:
        return len(data)

    def release(self) -> None:
        pass


if __name__ == "__main__":
    fuse.mount(Nothing(int(sys.argv[2])), sys.argv[1])
