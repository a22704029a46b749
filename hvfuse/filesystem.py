"""What a mounted filesystem has to answer; `hvfuse.fuse` carries it to the kernel. No libfuse in here."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from typing import Protocol

UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

_HIDING = re.compile(r"\.fuse_hidden[0-9a-f]{16,}")

TimeSpec = tuple[int, int]
"""(seconds since 1970, nanoseconds); the latter may be UTIME_NOW or UTIME_OMIT."""


def is_hiding_name(name: str) -> bool:
    """Whether libfuse made up this name, to keep a removed file that is still open."""
    return _HIDING.fullmatch(name) is not None


class OpenFile(Protocol):
    """An open file. Offsets and lengths are bytes; all methods raise OSError."""

    def read_into(self, buffer: memoryview, offset: int, /) -> int:
        """Fill `buffer`; returns the bytes read, fewer than its length only at the end of the file."""

    def write(self, data: memoryview, offset: int, /) -> int:
        """Write `data`, which is valid only during the call; returns the bytes written."""

    def fsync(self, datasync: bool) -> None:
        """Make what was written durable."""

    def truncate(self, size: int) -> None:
        """Set the length."""

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2); EOPNOTSUPP for modes that are not served."""

    def lseek(self, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE; ENXIO past the end."""

    def stat(self) -> os.stat_result:
        """Attributes."""

    def release(self) -> None:
        """The last descriptor was closed."""


class OpenDirectory(Protocol):
    """An open directory."""

    def entries(self) -> Iterable[tuple[str, int, int]]:
        """(name, inode, mode with the type's bits or 0) of each entry, "." and ".." included."""

    def fsync(self, datasync: bool) -> None:
        """Make the names durable."""

    def release(self) -> None:
        """The last descriptor was closed."""


Node = str | OpenFile
"""What an operation is about: a path from the mount's root ("/a/b"), or an open file."""


def read_only() -> OSError:
    """EROFS."""
    return OSError(errno.EROFS, os.strerror(errno.EROFS))


class Filesystem:
    """Operations on names; a base in which nothing can be changed and there are no extended attributes.

    Paths are absolute within the mount and free of ".", ".." and symlinks (the kernel resolved them).
    All methods raise OSError; `uid` and `gid` are the caller's.
    """

    def stat(self, node: Node) -> os.stat_result:
        raise FileNotFoundError(errno.ENOENT, node)

    def statfs(self) -> os.statvfs_result:
        raise OSError(errno.ENOSYS, "statfs")

    def open(self, path: str, flags: int) -> OpenFile:
        raise FileNotFoundError(errno.ENOENT, path)

    def open_directory(self, path: str) -> OpenDirectory:
        raise FileNotFoundError(errno.ENOENT, path)

    def readlink(self, path: str) -> str:
        raise OSError(errno.EINVAL, path)

    def create(self, path: str, flags: int, mode: int, *, uid: int, gid: int) -> OpenFile:
        raise read_only()

    def mknod(self, path: str, mode: int, device: int, *, uid: int, gid: int) -> None:
        raise read_only()

    def mkdir(self, path: str, mode: int, *, uid: int, gid: int) -> None:
        raise read_only()

    def symlink(self, target: str, path: str, *, uid: int, gid: int) -> None:
        raise read_only()

    def link(self, existing: str, path: str) -> None:
        raise read_only()

    def unlink(self, path: str) -> None:
        raise read_only()

    def rmdir(self, path: str) -> None:
        raise read_only()

    def rename(self, old: str, new: str, flags: int) -> None:
        """renameat2(2): `flags` may hold RENAME_NOREPLACE or RENAME_EXCHANGE."""
        raise read_only()

    def truncate(self, path: str, size: int) -> None:
        raise read_only()

    def chmod(self, node: Node, mode: int) -> None:
        raise read_only()

    def chown(self, node: Node, uid: int, gid: int) -> None:
        """-1 leaves the user or the group as it is."""
        raise read_only()

    def utimens(self, node: Node, accessed: TimeSpec, modified: TimeSpec) -> None:
        raise read_only()

    def getxattr(self, path: str, name: str) -> bytes:
        raise OSError(errno.EOPNOTSUPP, name)

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        raise OSError(errno.EOPNOTSUPP, name)

    def listxattr(self, path: str) -> Iterable[str]:
        return ()

    def removexattr(self, path: str, name: str) -> None:
        raise OSError(errno.EOPNOTSUPP, name)
