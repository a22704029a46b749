"""The FUSE binding: the one module that knows mfusepy and libfuse 3.

What is here only translates between `hvfuse.filesystem`'s interfaces and libfuse's C structures, and turns
exceptions into errnos in one place (`_wrapper`).

What must hold, and why:

- libfuse 3 only. mfusepy prefers libfuse 2 where both are installed, and its structures differ.
- One thread (`nothreads`). libfuse's thread pool fights over the interpreter's lock and is several times slower.
- libfuse mounts, and speaks the protocol of names and attributes; our own loop takes the requests, and answers reads
  and writes of open files by itself (`hvfuse.requests`). Their payload is not copied: the loop's buffer is lent to
  `read_into` and `write` as a memoryview, valid only during that call.
- The kernel's writeback cache stays off, and passthrough is never asked for: a write must have been seen
  here before it is acknowledged.
- `copy_file_range` is left out: the kernel then copies with reads and writes, which are logged as such. So
  are `lock` and `flock` (the kernel's own locks are right for a local filesystem), `ioctl`, `access`
  (`default_permissions`: the kernel decides), and `flush` (a close is not an fsync).
- Attributes are not cached by the kernel. libfuse gives every name its own inode, so the link count of
  one name would be stale after another was removed. Data in the page cache is trusted instead of
  compared with the attributes at each read (no AUTO_INVAL_DATA): nothing but this mount writes.
- Files unlinked while open: libfuse first "hides" them by a rename to `.fuse_hidden…`, so that
  `fstat`, `fchmod` and the like, which reach us by name only, still have one
  (`hvfuse.filesystem.is_hiding_name`).
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
import types
from collections.abc import Callable
from typing import Any

from hvfuse import handshake
from hvfuse.errors import HvfuseError, NoSpaceError, PrerequisiteError
from hvfuse.filesystem import Filesystem, Node, OpenDirectory, OpenFile
from hvfuse.mountpoint import check_mountpoint, stopped_by_signals
from hvfuse.requests import MAX_REQUEST, Requests

_HINT = "apt-get install fuse3"

os.environ["FUSE_LIBRARY_NAME"] = "fuse3"
os.environ.pop("FUSE_LIBRARY_PATH", None)
try:
    import mfusepy
except OSError as error:
    raise PrerequisiteError(f"libfuse 3 is not installed ({error})", hint=_HINT) from None
if mfusepy.fuse_version_major != 3:
    raise PrerequisiteError(f"libfuse {mfusepy.fuse_version_major} was loaded, 3 is needed", hint=_HINT)

_libfuse = mfusepy._libfuse


class _Arguments(ctypes.Structure):
    """libfuse's `fuse_args`."""

    _fields_ = (("argc", ctypes.c_int), ("argv", ctypes.c_void_p), ("allocated", ctypes.c_int))


class _Buffer(ctypes.Structure):
    """libfuse's `fuse_buf`, of memory, as long as the later versions have it."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("mem", ctypes.c_void_p),
        ("fd", ctypes.c_int),
        ("pos", ctypes.c_int64),
        ("mem_size", ctypes.c_size_t),
    )


_libfuse.fuse_new.restype = _libfuse.fuse_get_session.restype = ctypes.c_void_p
_libfuse.fuse_new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libfuse.fuse_mount.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_libfuse.fuse_session_process_buf.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
for _function in ("fuse_get_session", "fuse_session_fd", "fuse_session_exited", "fuse_unmount", "fuse_destroy"):
    getattr(_libfuse, _function).argtypes = [ctypes.c_void_p]

_mounting = threading.local()


def _main(*arguments: Any) -> int:
    """What mfusepy calls as libfuse's main function: that of the binding that this thread makes."""
    code: int = _mounting.binding.main(*arguments)
    return code


mfusepy.fuse_main_real = _main

logger = logging.getLogger(__name__)

_ENTRY_TIMEOUT = 1.0
"""Seconds for which the kernel trusts a name."""

_MAX_BACKGROUND = 64
"""Asynchronous requests that the kernel sends ahead."""

_WANTED = (
    handshake.ASYNC_READ
    | handshake.ATOMIC_O_TRUNC
    | handshake.EXPORT_SUPPORT
    | handshake.ASYNC_DIO
    | handshake.PARALLEL_DIROPS
)
"""Nothing else: no splicing (a detour for what ends in memory), no writeback cache, no passthrough."""

_SERVED = (
    "getattr readlink mknod mkdir unlink rmdir symlink rename link chmod chown truncate open read write statfs "
    "release fsync setxattr getxattr listxattr removexattr opendir readdir releasedir fsyncdir init create "
    "utimens fallocate lseek"
).split()


def caller_uid() -> int:
    """The user on whose behalf the current operation is done."""
    uid: int = mfusepy.fuse_get_context()[0]
    return uid


def _hand_out(value: bytes, buffer: Any, size: int) -> int:
    """The protocol of getxattr and listxattr: size 0 asks how long the value is."""
    if size:
        if len(value) > size:
            return -errno.ERANGE
        ctypes.memmove(buffer, value, len(value))
    return len(value)


def _fill_stat(buffer: Any, status: os.stat_result) -> None:
    st = buffer.contents
    st.st_ino = status.st_ino
    st.st_mode = status.st_mode
    st.st_nlink = status.st_nlink
    st.st_uid = status.st_uid
    st.st_gid = status.st_gid
    st.st_rdev = status.st_rdev
    st.st_size = status.st_size
    st.st_blksize = status.st_blksize
    st.st_blocks = status.st_blocks
    for field, ns in (
        (st.st_atimespec, status.st_atime_ns),
        (st.st_mtimespec, status.st_mtime_ns),
        (st.st_ctimespec, status.st_ctime_ns),
    ):
        field.tv_sec, field.tv_nsec = divmod(ns, 1_000_000_000)


def _errno_of(name: str, error: Exception) -> int:
    """The one place where exceptions become errnos."""
    if isinstance(error, OSError) and isinstance(error.errno, int) and error.errno > 0:
        return error.errno
    if isinstance(error, NoSpaceError):
        return errno.ENOSPC
    if isinstance(error, HvfuseError):
        logger.error("%s: %s", name, error)
    else:
        logger.exception("%s failed", name)
    return errno.EIO


class _Binding(mfusepy.FUSE):  # type: ignore[misc]
    """One method for each operation of libfuse; those named `…_fuse_3` differ from libfuse 2 in their arguments."""

    def __init__(
        self, filesystem: Filesystem, on_init: Callable[[Callable[[], None]], None], mountpoint: str, **options: Any
    ) -> None:
        """`on_init` gets what makes the loop end."""
        self._fs = filesystem
        self._on_init = on_init
        self._files: dict[int, OpenFile] = {}
        self._directories: dict[int, OpenDirectory] = {}
        self._next_handle = 1
        self._requests: Requests | None = None
        self.failure: OSError | None = None
        # mfusepy serves the operations that this object has; the methods below never look at it.
        served = types.SimpleNamespace(use_ns=True, **dict.fromkeys(_SERVED, True))
        _mounting.binding = self
        super().__init__(served, mountpoint, **options)

    def main(self, argc: int, argv: Any, operations: Any, size: int, data: Any) -> int:
        """In place of libfuse's own main function, with what mfusepy has for that: the program's name, -o, the options,
        the mount point. Returns 0, or another number if nothing could be mounted."""
        arguments = _Arguments(argc - 1, ctypes.cast(argv, ctypes.c_void_p), 0)
        fuse = _libfuse.fuse_new(ctypes.byref(arguments), operations, size, data)
        if not fuse:
            return _NOT_MOUNTED
        try:
            if _libfuse.fuse_mount(fuse, argv[argc - 1]) != 0:
                return _NOT_MOUNTED
            try:
                self._serve(_libfuse.fuse_get_session(fuse))
            except OSError as error:
                self.failure = error
            finally:
                _libfuse.fuse_unmount(fuse)
        finally:
            _libfuse.fuse_destroy(fuse)
        return 0

    def _serve(self, session: int) -> None:
        def hand_on(length: int) -> bool:
            buffer = _Buffer(length, 0, address)
            _libfuse.fuse_session_process_buf(session, ctypes.byref(buffer))
            return not _libfuse.fuse_session_exited(session)

        self._device = _libfuse.fuse_session_fd(session)
        self._requests = Requests(self._device, self._files, hand_on=hand_on, errno_of=_errno_of)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._requests.buffer))
        try:
            self._requests.serve()
        finally:
            self._requests.close()

    def _wrapper(self, function: Callable[..., int | None], *args: Any) -> int:
        try:
            return function(*args) or 0
        except Exception as error:
            return -_errno_of(function.__name__, error)
        except BaseException:
            # It must not unwind into C. Whoever wants the process to end sends it a signal.
            logger.exception("%s was interrupted", function.__name__)
            return -errno.EINTR

    def init_fuse_3(self, connection: Any, config: Any) -> None:
        conn, conf = connection.contents, config.contents
        conn.max_write = MAX_REQUEST
        conn.max_background = _MAX_BACKGROUND
        conn.want = conn.capable & _WANTED
        conf.use_ino = 1
        conf.nullpath_ok = 1
        conf.entry_timeout = _ENTRY_TIMEOUT
        conf.attr_timeout = 0.0
        conf.negative_timeout = 0.0
        self._answer_first(conn)
        assert self._requests is not None
        self._on_init(self._requests.leave)

    def _answer_first(self, conn: Any) -> None:
        """Answer FUSE_INIT before libfuse does; `hvfuse.handshake` says why."""
        reply = handshake.init_reply(
            flags=conn.want | handshake.BIG_WRITES | handshake.MAX_PAGES | handshake.HANDLE_KILLPRIV_V2,
            max_write=MAX_REQUEST,
            max_readahead=conn.max_readahead,
            max_background=_MAX_BACKGROUND,
        )
        try:
            os.write(self._device, reply)
        except OSError as error:
            logger.warning("the kernel did not take our own FUSE_INIT reply: %s", error.strerror)

    # Open files

    def _handle(self, info: Any) -> int:
        info.contents.fh = handle = self._next_handle
        self._next_handle += 1
        return handle

    def _node(self, path: bytes | None, info: Any) -> Node:
        """libfuse gives no path when it gives an open file (`nullpath_ok`)."""
        return self._files[info.contents.fh] if info else os.fsdecode(path or b"")

    def open(self, path: bytes, info: Any) -> None:
        file = self._fs.open(os.fsdecode(path), info.contents.flags)
        self._files[self._handle(info)] = file

    def create(self, path: bytes, mode: int, info: Any) -> None:
        uid, gid, _pid = mfusepy.fuse_get_context()
        file = self._fs.create(os.fsdecode(path), info.contents.flags, mode, uid=uid, gid=gid)
        self._files[self._handle(info)] = file

    def read(self, _path: bytes | None, _buffer: Any, size: int, _offset: int, _info: Any) -> int:
        assert not size, "answered by `Requests`"
        return 0

    def write(self, _path: bytes | None, _buffer: Any, size: int, _offset: int, _info: Any) -> int:
        assert not size, "answered by `Requests`"
        return 0

    def fsync(self, _path: bytes | None, datasync: int, info: Any) -> None:
        self._files[info.contents.fh].fsync(bool(datasync))

    def fallocate(self, _path: bytes | None, mode: int, offset: int, length: int, info: Any) -> None:
        self._files[info.contents.fh].fallocate(mode, offset, length)

    def lseek(self, _path: bytes | None, offset: int, whence: int, info: Any) -> int:
        return self._files[info.contents.fh].lseek(offset, whence)

    def release(self, _path: bytes | None, info: Any) -> None:
        self._files.pop(info.contents.fh).release()

    # Attributes

    def getattr_fuse_3(self, path: bytes | None, buffer: Any, info: Any) -> None:
        node = self._node(path, info)
        _fill_stat(buffer, self._fs.stat(node) if isinstance(node, str) else node.stat())

    def truncate_fuse_3(self, path: bytes | None, size: int, info: Any) -> None:
        node = self._node(path, info)
        if isinstance(node, str):
            self._fs.truncate(node, size)
        else:
            node.truncate(size)

    def chmod_fuse_3(self, path: bytes | None, mode: int, info: Any) -> None:
        self._fs.chmod(self._node(path, info), mode)

    def chown_fuse_3(self, path: bytes | None, uid: int, gid: int, info: Any) -> None:
        self._fs.chown(self._node(path, info), ctypes.c_int(uid).value, ctypes.c_int(gid).value)

    def utimens_fuse_3(self, path: bytes | None, times: Any, info: Any) -> None:
        accessed, modified = times.contents.actime, times.contents.modtime
        self._fs.utimens(
            self._node(path, info),
            (accessed.tv_sec, accessed.tv_nsec),
            (modified.tv_sec, modified.tv_nsec),
        )

    def getxattr(self, path: bytes, name: bytes, buffer: Any, size: int) -> int:
        return _hand_out(self._fs.getxattr(os.fsdecode(path), os.fsdecode(name)), buffer, size)

    def setxattr(self, path: bytes, name: bytes, value: Any, size: int, flags: int) -> None:
        self._fs.setxattr(os.fsdecode(path), os.fsdecode(name), ctypes.string_at(value, size), flags)

    def listxattr(self, path: bytes, buffer: Any, size: int) -> int:
        uid, _gid, _pid = mfusepy.fuse_get_context()
        # As on any Linux filesystem, trusted attributes are shown to root alone.
        names = [n for n in self._fs.listxattr(os.fsdecode(path)) if uid == 0 or not n.startswith("trusted.")]
        return _hand_out(b"".join(os.fsencode(name) + b"\0" for name in names), buffer, size)

    def removexattr(self, path: bytes, name: bytes) -> None:
        self._fs.removexattr(os.fsdecode(path), os.fsdecode(name))

    def statfs(self, _path: bytes, buffer: Any) -> None:
        status, out = self._fs.statfs(), buffer.contents
        for field in "bsize frsize blocks bfree bavail files ffree favail namemax".split():
            setattr(out, f"f_{field}", getattr(status, f"f_{field}"))

    # Names

    def readlink(self, path: bytes, buffer: Any, size: int) -> None:
        target = os.fsencode(self._fs.readlink(os.fsdecode(path)))[: size - 1] + b"\0"
        ctypes.memmove(buffer, target, len(target))

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        uid, gid, _pid = mfusepy.fuse_get_context()
        self._fs.mknod(os.fsdecode(path), mode, device, uid=uid, gid=gid)

    def mkdir(self, path: bytes, mode: int) -> None:
        uid, gid, _pid = mfusepy.fuse_get_context()
        self._fs.mkdir(os.fsdecode(path), mode, uid=uid, gid=gid)

    def symlink(self, target: bytes, path: bytes) -> None:
        uid, gid, _pid = mfusepy.fuse_get_context()
        self._fs.symlink(os.fsdecode(target), os.fsdecode(path), uid=uid, gid=gid)

    def link(self, existing: bytes, path: bytes) -> None:
        self._fs.link(os.fsdecode(existing), os.fsdecode(path))

    def unlink(self, path: bytes) -> None:
        self._fs.unlink(os.fsdecode(path))

    def rmdir(self, path: bytes) -> None:
        self._fs.rmdir(os.fsdecode(path))

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> None:
        self._fs.rename(os.fsdecode(old), os.fsdecode(new), flags)

    # Directories

    def opendir(self, path: bytes, info: Any) -> None:
        directory = self._fs.open_directory(os.fsdecode(path))
        self._directories[self._handle(info)] = directory

    def readdir_fuse_3(self, _path: bytes | None, buffer: Any, fill: Any, _offset: int, info: Any, _flags: int) -> int:
        # Offset 0 for every entry: libfuse keeps the whole listing and serves it in pieces.
        st = mfusepy.c_stat()
        for name, inode, mode in self._directories[info.contents.fh].entries():
            st.st_ino, st.st_mode = inode, mode
            if fill(buffer, os.fsencode(name), st, 0, 0) != 0:
                return -errno.ENOMEM
        return 0

    def fsyncdir(self, _path: bytes | None, datasync: int, info: Any) -> None:
        self._directories[info.contents.fh].fsync(bool(datasync))

    def releasedir(self, _path: bytes | None, info: Any) -> None:
        self._directories.pop(info.contents.fh).release()


def mount(
    filesystem: Filesystem,
    mountpoint: str,
    *,
    on_ready: Callable[[], None] = lambda: None,
    read_only: bool = False,
) -> None:
    """Serve `filesystem` at `mountpoint` and return once it is unmounted, or a signal ended it.

    To be called in the main thread: SIGTERM, SIGINT and SIGHUP then unmount first (so that what programs
    have mapped is written back) and let the call return; from then on the process ignores them. `on_ready`
    is called when the kernel has accepted the mount; it must not touch the mount itself, which is served
    only after it returned, and what it raises ends the mount and is raised from here. The working directory
    of the process becomes "/".

    Raises PrerequisiteError, BusyError (mount point in use) or HvfuseError.
    """
    if not os.path.exists("/dev/fuse"):
        raise PrerequisiteError("/dev/fuse does not exist", hint="modprobe fuse")
    if os.geteuid() != 0:
        raise PrerequisiteError("mounting needs root", hint="use sudo")
    mountpoint = check_mountpoint(mountpoint)
    options = {"fsname": "hvfuse", "subtype": "hvfuse", "allow_other": True, "default_permissions": True}
    failure: list[BaseException] = []
    with stopped_by_signals(mountpoint) as arm:

        def ready(leave: Callable[[], None]) -> None:
            try:
                arm(leave)
                on_ready()
            except BaseException as error:
                failure.append(error)
                leave()

        try:
            binding = _Binding(filesystem, ready, mountpoint, ro=read_only, **options)
        except RuntimeError:
            raise HvfuseError(f"{mountpoint}: cannot be mounted; libfuse has said why") from None
    if binding.failure is not None:
        raise HvfuseError(f"{mountpoint}: the mount ended: {binding.failure.strerror}")
    if failure:
        raise failure[0]


_NOT_MOUNTED = 1
