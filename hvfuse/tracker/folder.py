"""A folder served as it is: every operation is passed on to the directory beneath.

Names are resolved relative to a descriptor of the folder, taken before anything is mounted over it, and
never through a symlink: the kernel resolves those, so one that is met here was swapped in meanwhile. What
has no descriptor-relative system call is done to `/proc/self/fd/N`, N being an O_PATH descriptor.

Files that are removed while they are open are really removed. libfuse asks for them to be renamed to a
`.fuse_hidden…` name instead; that name exists only here (`_hidden`) and leads to an open descriptor.
(A rename over an open file is thus a removal and a rename: a crash exactly between the two leaves the old
file removed and the new one still under its old name.)
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from hvfuse import fuse, system
from hvfuse.filesystem import Filesystem, Node, OpenFile, TimeSpec, is_hiding_name

_AT_FDCWD = -100

_NOT_PASSED_ON = os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_APPEND | os.O_DIRECT | os.O_ASYNC
"""Flags of open(2) that the file beneath must not get. O_APPEND: the kernel gives us the offset, and
pwrite(2) on such a file would ignore it. O_DIRECT: it has done its work above (the kernel caches nothing);
beneath, it would demand that libfuse's buffers be aligned, and refuse 512 bytes on a 4 KiB device."""
_ALWAYS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""O_NONBLOCK: a FIFO that is swapped in must not hang the mount."""

_PERMISSIONS = 0o7777

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _drop_privileges(fd: int) -> None:
    """Content is about to change: take set-user-id and set-group-id away, unless root changes it.

    The kernel was promised that (`hvfuse.handshake`); file capabilities go by themselves.
    """
    mode = os.fstat(fd).st_mode
    if mode & (stat.S_ISUID | stat.S_ISGID) and fuse.caller_uid() != 0:
        mode &= ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            mode &= ~stat.S_ISGID
        os.chmod(f"/proc/self/fd/{fd}", mode & _PERMISSIONS)


class HeldFile(OpenFile, Protocol):
    """An open file on a descriptor. `inode`: (device, inode)."""

    @property
    def fd(self) -> int: ...

    @property
    def inode(self) -> tuple[int, int]: ...


class PlainFile:
    """An open file of the folder, on a descriptor of its own."""

    def __init__(self, folder: Folder, fd: int) -> None:
        self.fd = fd
        status = os.fstat(fd)
        self.inode = (status.st_dev, status.st_ino)
        self._folder = folder

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return system.pread_into(self.fd, buffer, offset)

    def write(self, data: memoryview, offset: int) -> int:
        _drop_privileges(self.fd)
        return os.pwrite(self.fd, data, offset)

    def fsync(self, datasync: bool) -> None:
        (system.fdatasync if datasync else system.fsync)("folder:sync", self.fd)

    def truncate(self, size: int) -> None:
        _drop_privileges(self.fd)
        os.ftruncate(self.fd, size)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        _drop_privileges(self.fd)
        system.fallocate("folder:fallocate", self.fd, mode, offset, length)

    def lseek(self, offset: int, whence: int) -> int:
        return os.lseek(self.fd, offset, whence)

    def stat(self) -> os.stat_result:
        return os.fstat(self.fd)

    def release(self) -> None:
        self._folder.forget(self)
        os.close(self.fd)


class PlainDirectory:
    """An open directory of the folder; `skip` are names that are not shown."""

    def __init__(self, fd: int, skip: Iterable[str]) -> None:
        self._fd = fd
        self._skip = frozenset(skip)

    def entries(self) -> Iterator[tuple[str, int, int]]:
        own = os.fstat(self._fd).st_ino
        yield ".", own, stat.S_IFDIR
        yield "..", own, stat.S_IFDIR
        with os.scandir(self._fd) as entries:
            for entry in entries:
                if entry.name not in self._skip:
                    yield entry.name, entry.inode(), _type_of(entry)

    def fsync(self, datasync: bool) -> None:
        (system.fdatasync if datasync else system.fsync)("folder:sync-directory", self._fd)

    def release(self) -> None:
        os.close(self._fd)


def _type_of(entry: os.DirEntry[str]) -> int:
    """The type's bits as far as they are known without a stat; 0 is "ask"."""
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return stat.S_IFLNK if entry.is_symlink() else 0


class Folder(Filesystem):
    """Passes everything on to the directory `fd`, which stays the caller's.

    `is_hidden(name)` of a subclass says which names directly in the folder are neither shown nor accepted.
    """

    def __init__(self, fd: int) -> None:
        self._root = fd
        self._open: dict[tuple[int, int], list[HeldFile]] = {}
        self._hidden: dict[str, tuple[int, int]] = {}

    def is_hidden(self, name: str) -> bool:
        return False

    # Resolving names

    @contextmanager
    def _at(self, path: str) -> Iterator[tuple[int, str]]:
        """(descriptor of the parent, name) of what exists, or may, at `path`."""
        *parents, name = path[1:].split("/")
        if not parents:
            if self.is_hidden(name):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            yield self._root, name or "."
            return
        fd = self._walk(parents)
        try:
            yield fd, name
        finally:
            os.close(fd)

    @contextmanager
    def _at_new(self, path: str) -> Iterator[tuple[int, str]]:
        """As `_at`, for a name that is to be made: a hidden one is EPERM."""
        if "/" not in path[1:] and self.is_hidden(path[1:]):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
        with self._at(path) as found:
            yield found

    def _walk(self, names: Sequence[str]) -> int:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(names[0], flags, dir_fd=self._root)
        for name in names[1:]:
            try:
                below = os.open(name, flags, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd

    def _removed(self, path: str) -> HeldFile | None:
        """The open file to which a hiding name leads, if `path` is one."""
        inode = self._hidden.get(path.rpartition("/")[2])
        return self._open[inode][0] if inode is not None else None

    @contextmanager
    def _pinned(self, node: Node) -> Iterator[int]:
        """A descriptor (perhaps an O_PATH one) of `node` itself, wherever its names are by now."""
        file = self._removed(node) if isinstance(node, str) else node
        if file is not None:
            yield self.descriptor_of(file)
            return
        assert isinstance(node, str)
        with self._at(node) as (parent, name):
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _proc(self, node: Node) -> Iterator[str]:
        """A path of procfs that leads to `node` itself."""
        with self._pinned(node) as fd:
            yield f"/proc/self/fd/{fd}"

    def descriptor_of(self, file: OpenFile) -> int:
        assert isinstance(file, PlainFile)
        return file.fd

    # Attributes

    def stat(self, node: Node) -> os.stat_result:
        file = self._removed(node) if isinstance(node, str) else node
        if file is not None:
            return file.stat()
        assert isinstance(node, str)
        with self._at(node) as (parent, name):
            return os.stat(name, dir_fd=parent, follow_symlinks=False)

    def statfs(self) -> os.statvfs_result:
        return os.fstatvfs(self._root)

    def chmod(self, node: Node, mode: int) -> None:
        with self._proc(node) as path:
            os.chmod(path, mode & _PERMISSIONS)

    def chown(self, node: Node, uid: int, gid: int) -> None:
        with self._proc(node) as path:
            os.chown(path, uid, gid)

    def utimens(self, node: Node, accessed: TimeSpec, modified: TimeSpec) -> None:
        times = (ctypes.c_long * 4)(*accessed, *modified)
        with self._proc(node) as path:
            _check(_libc.utimensat(_AT_FDCWD, os.fsencode(path), times, 0))

    def truncate(self, path: str, size: int) -> None:
        with self._pinned(path) as fd:
            _drop_privileges(fd)
            os.truncate(f"/proc/self/fd/{fd}", size)

    def getxattr(self, path: str, name: str) -> bytes:
        with self._proc(path) as target:
            return os.getxattr(target, name)

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        with self._proc(path) as target:
            os.setxattr(target, name, value, flags)

    def listxattr(self, path: str) -> Iterable[str]:
        with self._proc(path) as target:
            return os.listxattr(target)

    def removexattr(self, path: str, name: str) -> None:
        with self._proc(path) as target:
            os.removexattr(target, name)

    # Open files

    def open(self, path: str, flags: int) -> OpenFile:
        flags = flags & ~_NOT_PASSED_ON | _ALWAYS
        removed = self._removed(path)
        if removed is not None:
            return self._remember(os.open(f"/proc/self/fd/{removed.fd}", flags & ~os.O_NOFOLLOW))
        with self._at(path) as (parent, name):
            fd = os.open(name, flags, dir_fd=parent)
        if flags & os.O_TRUNC:
            _drop_privileges(fd)
        return self._remember(fd)

    def _remember(self, fd: int) -> PlainFile:
        file = self.opened_as(fd)
        self.hold(file)
        return file

    def opened_as(self, fd: int) -> PlainFile:
        """What an open file is served as, if a subclass does not serve it otherwise."""
        return PlainFile(self, fd)

    def hold(self, file: HeldFile) -> None:
        """Know that `file` is open, until `forget`."""
        self._open.setdefault(file.inode, []).append(file)

    def is_open(self, inode: tuple[int, int]) -> bool:
        """Whether there is an open file of that inode. For any thread."""
        return inode in self._open

    def forget(self, file: HeldFile) -> None:
        """`file` is being closed; the names that hid a removed file go with its last descriptor."""
        files = self._open[file.inode]
        files.remove(file)
        if not files:
            del self._open[file.inode]
            for name in [name for name, inode in self._hidden.items() if inode == file.inode]:
                del self._hidden[name]

    def open_directory(self, path: str) -> PlainDirectory:
        with self._at(path) as (parent, name):
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        return PlainDirectory(fd, filter(self.is_hidden, os.listdir(fd)) if path == "/" else ())

    # New names. Modes come with the caller's umask applied. They are set after the owner, which clears
    # bits of them, and until then nobody else may use what was made.

    def create(self, path: str, flags: int, mode: int, *, uid: int, gid: int) -> OpenFile:
        with self._at_new(path) as (parent, name):
            passed = flags & ~_NOT_PASSED_ON | _ALWAYS
            try:
                fd = os.open(name, passed | os.O_CREAT | os.O_EXCL, 0, dir_fd=parent)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                return self.open(path, flags)
            try:
                os.fchown(fd, uid, _group(parent, gid))
                os.fchmod(fd, mode & _PERMISSIONS)
                return self._remember(fd)
            except OSError:
                os.close(fd)
                os.unlink(name, dir_fd=parent)
                raise

    def mknod(self, path: str, mode: int, device: int, *, uid: int, gid: int) -> None:
        with self._at_new(path) as (parent, name):
            os.mknod(name, stat.S_IFMT(mode), device, dir_fd=parent)
            os.chown(name, uid, _group(parent, gid), dir_fd=parent, follow_symlinks=False)
        self.chmod(path, mode)

    def mkdir(self, path: str, mode: int, *, uid: int, gid: int) -> None:
        with self._at_new(path) as (parent, name):
            os.mkdir(name, 0o700, dir_fd=parent)
            inherited = os.stat(parent).st_mode & stat.S_ISGID
            os.chown(name, uid, _group(parent, gid), dir_fd=parent, follow_symlinks=False)
        self.chmod(path, mode | inherited)

    def symlink(self, target: str, path: str, *, uid: int, gid: int) -> None:
        with self._at_new(path) as (parent, name):
            os.symlink(target, name, dir_fd=parent)
            os.chown(name, uid, _group(parent, gid), dir_fd=parent, follow_symlinks=False)

    def readlink(self, path: str) -> str:
        with self._at(path) as (parent, name):
            return os.readlink(name, dir_fd=parent)

    def link(self, existing: str, path: str) -> None:
        with self._at(existing) as (parent, name), self._at_new(path) as (new_parent, new_name):
            os.link(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent, follow_symlinks=False)

    # Names that go

    def unlink(self, path: str) -> None:
        name = path.rpartition("/")[2]
        if self._hidden.pop(name, None) is not None:
            return  # removed long since; now its last descriptor is closed
        with self._at(path) as (parent, name):
            os.unlink(name, dir_fd=parent)

    def rmdir(self, path: str) -> None:
        with self._at(path) as (parent, name):
            os.rmdir(name, dir_fd=parent)

    def rename(self, old: str, new: str, flags: int) -> None:
        new_name = new.rpartition("/")[2]
        with self._at(old) as (old_parent, old_name):
            if is_hiding_name(new_name) and self._hide(old_parent, old_name, new_name):
                return
            with self._at_new(new) as (new_parent, new_name):
                names = (old_parent, os.fsencode(old_name), new_parent, os.fsencode(new_name))
                _check(_libc.renameat2(*names, flags))

    def _hide(self, parent: int, name: str, hiding: str) -> bool:
        """Remove a file that is open and let `hiding` lead to it; False when it is not open."""
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        inode = (status.st_dev, status.st_ino)
        if inode not in self._open:
            return False
        os.unlink(name, dir_fd=parent)
        self._hidden[hiding] = inode
        return True


def _group(parent: int, gid: int) -> int:
    """The group of what is made in `parent`: its own if it hands that down (setgid)."""
    status = os.stat(parent)
    return status.st_gid if status.st_mode & stat.S_ISGID else gid
