"""A view as a directory of disk files: they can be read, and written if the view has overlays; nothing can
be made or removed beside them.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator

from hvfuse import fuse, system
from hvfuse.filesystem import UTIME_NOW, UTIME_OMIT, Filesystem, Node, OpenFile, TimeSpec
from hvfuse.target.view import View, ViewDisk

_FALLOC_SERVED = system.FALLOC_FL_KEEP_SIZE | system.FALLOC_FL_PUNCH_HOLE | system.FALLOC_FL_ZERO_RANGE

_ROOT_INODE = 1
_SECOND = 1_000_000_000


def _failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class DiskNode:
    """A disk as a file of the view: what the file system keeps about it. Times are ns since 1970."""

    def __init__(self, disk: ViewDisk, inode: int, now_ns: int) -> None:
        self.disk = disk
        self.inode = inode
        self.mode = stat.S_IFREG | (0o400 if disk.read_only else 0o600)
        self.owner = (0, 0)
        self.accessed_ns = self.modified_ns = self.changed_ns = now_ns

    def stat(self) -> os.stat_result:
        times = (self.accessed_ns, self.modified_ns, self.changed_ns)
        return _status(self.mode, self.inode, self.owner, self.disk.size, times)

    def touch(self) -> None:
        self.modified_ns = self.changed_ns = time.time_ns()

    def truncate(self, size: int) -> None:
        self.disk.truncate(size)
        self.touch()


def _status(mode: int, inode: int, owner: tuple[int, int], size: int, times_ns: tuple[int, int, int]) -> os.stat_result:
    links = 2 if stat.S_ISDIR(mode) else 1
    seconds = [ns // _SECOND for ns in times_ns]
    # What a disk takes is not known without looking at all of it. It counts as full but for one block:
    # copying programs look for holes in files that say they have some.
    more = {"st_blksize": 4096, "st_blocks": max(1, size // 512 - 1) if size else 0, "st_rdev": 0}
    more |= {f"st_{name}time_ns": ns for name, ns in zip("amc", times_ns, strict=True)}
    return os.stat_result((mode, inode, 0, links, *owner, size, *seconds), more)


class ViewFile:
    """An open disk of a view."""

    def __init__(self, node: DiskNode, flags: int) -> None:
        self.node = node
        self._disk = node.disk
        self._sync_each = bool(flags & os.O_DSYNC)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return self._disk.read_into(buffer, offset)

    def write(self, data: memoryview, offset: int) -> int:
        self._disk.pwrite(offset, data)
        self.node.touch()
        if self._sync_each:
            self._disk.flush()
        return len(data)

    def fsync(self, datasync: bool) -> None:
        self._disk.flush()

    def truncate(self, size: int) -> None:
        self.node.truncate(size)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Allocating alone only extends: the overlay takes its space when it is written."""
        if mode & ~_FALLOC_SERVED:
            raise _failure(errno.EOPNOTSUPP)
        if not mode & system.FALLOC_FL_KEEP_SIZE and offset + length > self._disk.size:
            self._disk.truncate(offset + length)
        if mode & system.FALLOC_FL_PUNCH_HOLE:
            self._disk.trim(offset, length)
        elif mode & system.FALLOC_FL_ZERO_RANGE:
            self._disk.zero(offset, length)
        self.node.touch()

    def lseek(self, offset: int, whence: int) -> int:
        size = self._disk.size
        if offset >= size:
            raise _failure(errno.ENXIO)
        for start, end in self._disk.extents(offset, size):
            if whence == os.SEEK_DATA:
                return max(start, offset)
            return end if start <= offset else offset
        if whence == os.SEEK_DATA:
            raise _failure(errno.ENXIO)
        return offset

    def stat(self) -> os.stat_result:
        return self.node.stat()

    def release(self) -> None:
        pass


class ViewDirectory:
    """The view's only directory, opened."""

    def __init__(self, nodes: dict[str, DiskNode]) -> None:
        self._nodes = nodes

    def entries(self) -> Iterator[tuple[str, int, int]]:
        yield ".", _ROOT_INODE, stat.S_IFDIR
        yield "..", _ROOT_INODE, stat.S_IFDIR
        for name, node in self._nodes.items():
            yield name, node.inode, stat.S_IFREG

    def fsync(self, datasync: bool) -> None:
        pass

    def release(self) -> None:
        pass


class ViewFilesystem(Filesystem):
    """The disks of `view` by their names; owners, modes and times last as long as the mount."""

    def __init__(self, view: View) -> None:
        now = time.time_ns()
        self._root = _status(stat.S_IFDIR | 0o755, _ROOT_INODE, (0, 0), 0, (now, now, now))
        self._space = view.overlays or "/"
        self._nodes = {
            name: DiskNode(disk, inode, now)
            for inode, (name, disk) in enumerate(sorted(view.disks.items()), _ROOT_INODE + 1)
        }

    def attributes(self) -> dict[str, tuple[int, tuple[int, int]]]:
        """Permissions and (user, group) of each disk, as they were set through the mount."""
        return {name: (stat.S_IMODE(node.mode), node.owner) for name, node in self._nodes.items()}

    def _node(self, node: Node) -> DiskNode:
        if not isinstance(node, str):
            assert isinstance(node, ViewFile)
            return node.node
        found = self._nodes.get(node[1:])
        if found is None:
            raise _failure(errno.EROFS if node == "/" else errno.ENOENT)
        return found

    def _writable(self, node: Node) -> DiskNode:
        found = self._node(node)
        if found.disk.read_only:
            raise _failure(errno.EROFS)
        return found

    def stat(self, node: Node) -> os.stat_result:
        return self._root if node == "/" else self._node(node).stat()

    def statfs(self) -> os.statvfs_result:
        return os.statvfs(self._space)

    def open(self, path: str, flags: int) -> OpenFile:
        writes = flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC
        node = self._writable(path) if writes else self._node(path)
        if flags & os.O_TRUNC:
            node.truncate(0)
        return ViewFile(node, flags)

    def open_directory(self, path: str) -> ViewDirectory:
        return ViewDirectory(self._nodes)

    def truncate(self, path: str, size: int) -> None:
        self._writable(path).truncate(size)

    def chmod(self, node: Node, mode: int) -> None:
        found = self._writable(node)
        found.mode = stat.S_IFREG | mode & 0o7777
        found.changed_ns = time.time_ns()

    def chown(self, node: Node, uid: int, gid: int) -> None:
        found = self._writable(node)
        found.owner = (found.owner[0] if uid == -1 else uid, found.owner[1] if gid == -1 else gid)
        found.changed_ns = time.time_ns()

    def utimens(self, node: Node, accessed: TimeSpec, modified: TimeSpec) -> None:
        found = self._writable(node)
        now = time.time_ns()
        found.accessed_ns = _resolved(accessed, found.accessed_ns, now)
        found.modified_ns = _resolved(modified, found.modified_ns, now)
        found.changed_ns = now


def _resolved(wanted: TimeSpec, before_ns: int, now_ns: int) -> int:
    seconds, nanoseconds = wanted
    if nanoseconds == UTIME_OMIT:
        return before_ns
    return now_ns if nanoseconds == UTIME_NOW else seconds * _SECOND + nanoseconds


def serve_view(view: View, mountpoint: str, *, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve `view` at `mountpoint` until it is unmounted; call this in the main thread.

    The view stays open: `close` or `drop` it afterwards. `on_ready`, signals and what is raised: see
    `fuse.mount`.
    """
    fuse.mount(ViewFilesystem(view), mountpoint, on_ready=on_ready, read_only=view.read_only)
