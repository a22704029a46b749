"""The mount of a VM's folder: its disks through their logs, everything else as it is.

What is refused for the sake of tracking, always with EBUSY: removing a disk, renaming it or over it, a hard
link to it (a second name that would bypass the log), and opening it with O_TRUNC. Giving a disk another size
is allowed. A disk that is not tracked is a file like any other. The files of `hvfuse.spool` are not shown (ENOENT)
and such names cannot be made (EPERM).

While the VM is held (`hvfuse.tracker.holding`), EROFS refuses what would change the content or the size of a disk file,
tracked or not, and that such a name is made, removed, renamed, renamed over or linked; opening one for writing, too.
Attributes can be changed, and files that are no disks.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

from hvfuse import fuse, spool, system
from hvfuse.filesystem import Node, OpenFile, read_only
from hvfuse.tracker.folder import Folder, PlainFile
from hvfuse.tracker.holding import Hold, is_disk_path

_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_IN_ORDER = 512 << 10
"""Bytes read in order, after which it is believed that it goes on like that."""
_STEP, _AHEAD = 1 << 20, 4 << 20
"""Bytes that are asked for at once; how far it is read ahead."""
_FALLOC_SERVED = system.FALLOC_FL_KEEP_SIZE | system.FALLOC_FL_PUNCH_HOLE | system.FALLOC_FL_ZERO_RANGE


class Disk(Protocol):
    """What a mount needs of a tracked disk; `fd` is open for reading and writing."""

    @property
    def fd(self) -> int: ...

    def size(self) -> int: ...

    def write(self, data: memoryview, offset: int, /) -> int: ...

    def zero(self, offset: int, length: int) -> None: ...

    def trim(self, offset: int, length: int) -> None: ...

    def truncate(self, size: int) -> None: ...

    def allocate(self, offset: int, length: int) -> None: ...

    def sync(self, *, datasync: bool) -> None: ...

    def opened(self) -> None: ...

    def closed(self) -> None: ...


class DiskFile:
    """An open disk: reads go straight to the image, everything that changes it goes through the log."""

    def __init__(self, folder: Folder, disk: Disk, flags: int) -> None:
        self.fd = disk.fd
        status = os.fstat(self.fd)
        self.inode = (status.st_dev, status.st_ino)
        self._folder = folder
        self._disk = disk
        self._sync_each = flags & os.O_SYNC == os.O_SYNC
        self._expected = self._in_order = self._asked = 0
        self.write: Callable[[memoryview, int], int] = self._write_and_sync if flags & os.O_DSYNC else disk.write

    def read_into(self, buffer: memoryview, offset: int) -> int:
        end = offset + len(buffer)
        if offset == self._expected:
            self._read_on(offset, end)
        elif self._in_order:
            self._in_order = 0
        self._expected = end
        return system.pread_into(self.fd, buffer, offset)

    def _read_on(self, offset: int, end: int) -> None:
        """Somebody reads in order: have what follows read, too, since the kernel does not do it by itself any more
        (`system.keep_pages_small`)."""
        self._in_order += end - offset
        if self._in_order < _IN_ORDER:
            return
        if not end <= self._asked <= end + _AHEAD:
            self._asked = end
        if self._asked + _STEP <= end + _AHEAD:
            system.read_ahead(self.fd, self._asked, _STEP)
            self._asked += _STEP

    def _write_and_sync(self, data: memoryview, offset: int) -> int:
        written = self._disk.write(data, offset)
        self._disk.sync(datasync=not self._sync_each)
        return written

    def fsync(self, datasync: bool) -> None:
        self._disk.sync(datasync=datasync)

    def truncate(self, size: int) -> None:
        self._disk.truncate(size)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Without KEEP_SIZE a range past the end is an explicit resize; allocating alone changes no content."""
        if mode & ~_FALLOC_SERVED:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if mode & system.FALLOC_FL_PUNCH_HOLE:
            self._disk.trim(offset, length)
            return
        if not mode & system.FALLOC_FL_ZERO_RANGE:  # first, so that a full disk leaves the size as it was
            self._disk.allocate(offset, length)
        if not mode & system.FALLOC_FL_KEEP_SIZE and offset + length > self._disk.size():
            self._disk.truncate(offset + length)
        if mode & system.FALLOC_FL_ZERO_RANGE:
            self._disk.zero(offset, length)

    def lseek(self, offset: int, whence: int) -> int:
        return os.lseek(self.fd, offset, whence)

    def stat(self) -> os.stat_result:
        return os.fstat(self.fd)

    def release(self) -> None:
        self._folder.forget(self)
        self._disk.closed()


class Vm(Protocol):
    """What a mount needs of a tracked VM: its disks by their names in the folder, which change only under `names`;
    whether it is held, which changes under `names` and the gate; and somewhere to say which files are open."""

    is_open: Callable[[tuple[int, int]], bool]

    @property
    def disks(self) -> Mapping[str, Disk]: ...

    @property
    def names(self) -> AbstractContextManager[Any]: ...

    @property
    def gate(self) -> AbstractContextManager[Any]: ...

    @property
    def held(self) -> Hold | None: ...


class FileBeside(PlainFile):
    """An open file that is no tracked disk. It may be another one all the same, and held."""

    def __init__(self, folder: Folder, fd: int, vm: Vm) -> None:
        super().__init__(folder, fd)
        self._vm = vm

    def write(self, data: memoryview, offset: int) -> int:
        with self._vm.gate:
            self._refuse_held()
            return super().write(data, offset)

    def truncate(self, size: int) -> None:
        with self._vm.gate:
            self._refuse_held()
            super().truncate(size)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        with self._vm.gate:
            self._refuse_held()
            super().fallocate(mode, offset, length)

    def _refuse_held(self) -> None:
        held = self._vm.held
        if held is not None and self.inode in held.disks:
            raise read_only()


class VmFolder(Folder):
    """The VM's folder `fd`. Whatever makes a name lead to an open file, or to another file, holds the VM's `names`;
    nobody who does waits for a disk."""

    def __init__(self, fd: int, vm: Vm) -> None:
        super().__init__(fd)
        self._vm = vm
        vm.is_open = self.is_open

    def is_hidden(self, name: str) -> bool:
        return spool.is_reserved(name)

    def descriptor_of(self, file: OpenFile) -> int:
        assert isinstance(file, PlainFile | DiskFile)
        return file.fd

    def opened_as(self, fd: int) -> PlainFile:
        return FileBeside(self, fd, self._vm)

    def _refuse(self, *paths: str) -> None:
        """Names of disks are not to be made, removed or given away."""
        if self._vm.held is not None and any(map(is_disk_path, paths)):
            raise read_only()
        if any(path[1:] in self._vm.disks for path in paths):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def _refuse_change(self, path: str) -> None:
        """The content of a held disk is not to change, whatever name leads to it."""
        held = self._vm.held
        if held is None:
            return
        if is_disk_path(path):
            raise read_only()
        with suppress(FileNotFoundError):
            status = super().stat(path)
            if (status.st_dev, status.st_ino) in held.disks:
                raise read_only()

    def stat(self, node: Node) -> os.stat_result:
        if not isinstance(node, str):
            return super().stat(node)
        with self._vm.names:
            disk = self._vm.disks.get(node[1:])
            return super().stat(node) if disk is None else os.fstat(disk.fd)

    def open(self, path: str, flags: int) -> OpenFile:
        with self._vm.names:
            if flags & _CHANGES:
                self._refuse_change(path)
            disk = self._vm.disks.get(path[1:])
            if disk is None:
                return super().open(path, flags)
            if flags & os.O_TRUNC:
                self._refuse(path)
            file = DiskFile(self, disk, flags)
            self.hold(file)
            disk.opened()
            return file

    def create(self, path: str, flags: int, mode: int, *, uid: int, gid: int) -> OpenFile:
        with self._vm.names:
            self._refuse(path)
            return super().create(path, flags, mode, uid=uid, gid=gid)

    def mknod(self, path: str, mode: int, device: int, *, uid: int, gid: int) -> None:
        with self._vm.names:
            self._refuse(path)
            super().mknod(path, mode, device, uid=uid, gid=gid)

    def symlink(self, target: str, path: str, *, uid: int, gid: int) -> None:
        with self._vm.names:
            self._refuse(path)
            super().symlink(target, path, uid=uid, gid=gid)

    def truncate(self, path: str, size: int) -> None:
        with self._vm.names:
            self._refuse_change(path)
            disk = self._vm.disks.get(path[1:])
            if disk is None:
                super().truncate(path, size)
                return
            disk.opened()  # so that it is not closed meanwhile, should it be tracked no more
        try:
            disk.truncate(size)
        finally:
            disk.closed()

    def link(self, existing: str, path: str) -> None:
        with self._vm.names:
            self._refuse(existing, path)
            super().link(existing, path)

    def unlink(self, path: str) -> None:
        with self._vm.names:
            self._refuse(path)
            super().unlink(path)

    def rename(self, old: str, new: str, flags: int) -> None:
        with self._vm.names:
            self._refuse(old, new)
            super().rename(old, new, flags)


def serve(vm: Vm, *, folder: str, mountpoint: str, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve the VM's `folder` at `mountpoint` until it is unmounted; call this in the main thread.

    `on_ready`, signals and what is raised: see `fuse.mount`.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fuse.mount(VmFolder(fd, vm), mountpoint, on_ready=on_ready)
    finally:
        os.close(fd)
