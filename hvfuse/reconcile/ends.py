"""The two ends of a resynchronisation on this machine: an image file or block device that is read, and one that
is made the same.

What is known of an end is its `Identity`. A regular file's mtime tells whether it was written to; a block
device has nothing of the kind.

Nobody else may use a replica while it is written to. Checked as far as the kernel can tell: a block device is
opened O_EXCL, which fails if it is mounted, swap, or part of another device; of a regular file nobody else may
have a descriptor (a write lease is asked for); and both are locked whole (OFD), the lock that qemu and
this tool itself take.

A run that is killed must find out later whether anybody else wrote to the replica, though its own last writes are
in no state file. So a replica has one mtime for as long as a run lasts, its *mark*, which each of the run's
own writes puts back; the state file says which. Any other mtime is somebody else's write, or one of the run's
own in the middle of which it was killed, and nobody can tell which: then nothing is believed. The mark lies in the
past, so that no clock gives it to a later write, and `finish` sets the time at which the run was done.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import stat
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Self

import numpy as np

from hvfuse import system
from hvfuse.errors import BusyError, HvfuseError, NoSpaceError, NotFoundError, UsageError
from hvfuse.extent import Extent
from hvfuse.formats.digests import DigestKey, Digests, digest_blocks, sparse_digests, summary
from hvfuse.reconcile import plan
from hvfuse.reconcile.changes import Change

KEPT_SPANS = 4096
"""Spans whose digests are kept after their summary was asked for: some 4 MiB."""
SETTLED_NS = 10**9
"""A file whose mtime is younger than this may be written to once more without its mtime telling."""
MARK_AGE_NS = 10 * 10**9
"""A mark is so much older than the run's first write: more than the grain of any file system's times."""
STATE_SUFFIX = ".resync-state"
STATE_LIMIT = 16 << 10
"""Bytes that a state file has at most."""

_KINDS: Mapping[int, type[HvfuseError]] = {
    errno.ENOENT: NotFoundError,
    errno.ENOTDIR: NotFoundError,
    errno.ENOSPC: NoSpaceError,
    errno.EDQUOT: NoSpaceError,
    errno.EBUSY: BusyError,
    errno.ETXTBSY: BusyError,
}


class Kind(StrEnum):
    """What an end is. `MISSING`: a replica that is still to be made."""

    FILE = "file"
    DEVICE = "device"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What an end is recognised by. `device`, `inode`: of the file system's; of a block device its number and 0.
    `size`: bytes. `mtime_ns`: 0 for a block device. `settled`: any later write will show in `mtime_ns`.
    `boot`: hex, of the machine it is on: on the same boot the same device and inode are the same file."""

    kind: Kind
    size: int
    device: int
    inode: int
    mtime_ns: int
    settled: bool
    boot: str

    def as_json(self) -> dict[str, object]:
        """The fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: object) -> Self:
        """From what `as_json` gave, on whatever side. Raises ValueError."""
        if not isinstance(fields, dict) or fields.keys() != cls.__dataclass_fields__.keys():
            raise ValueError("not an identity")
        kind, boot, settled = Kind(fields.pop("kind")), fields.pop("boot"), fields.pop("settled")
        if not isinstance(boot, str) or len(boot) > 64 or not isinstance(settled, bool):
            raise ValueError("not an identity")
        if not all(type(value) is int and 0 <= value < 1 << 64 for value in fields.values()):
            raise ValueError("an identity out of bounds")
        if fields["size"] > plan.MAX_SIZE:
            raise ValueError("a disk larger than any")
        return cls(kind=kind, boot=boot, settled=settled, **fields)

    def is_same_file(self, other: Identity) -> bool:
        """Whether both are one file or device of one machine."""
        mine, others = (self.kind, self.boot, self.device, self.inode), (
            other.kind, other.boot, other.device, other.inode,
        )  # fmt: skip
        return self.kind is not Kind.MISSING and mine == others


@contextlib.contextmanager
def named(path: str, doing: str = "") -> Iterator[None]:
    """Turns an OSError into one of ours that names `path`."""
    try:
        yield
    except OSError as error:
        kind = _KINDS.get(error.errno or 0, HvfuseError)
        hint = None
        if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
            hint = "run it as root"
        elif kind is NoSpaceError:
            folder = shlex.quote(os.path.dirname(os.path.abspath(path)))
            hint = f"free space there (df -h {folder}), then run it again: what is equal by now is not sent again"
        raise kind(f"{path}: {doing}{error.strerror or error}", hint=hint) from error


class LocalEnd:
    """An open file or block device, read as a disk of `end` bytes: as `Source` and `Other` of a comparison.
    `fd` None: nothing, which reads as zeroes. Owns `fd`. For any thread."""

    def __init__(self, path: str, fd: int | None) -> None:
        self.path = path
        self._fd = fd
        self.end = 0
        self._kept: OrderedDict[Extent, Digests] = OrderedDict()
        self._lock = threading.Lock()  # guards `_kept`
        self._own = threading.local()

    def close(self) -> None:
        """Let go of the file, and of its locks."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def identify(self) -> Identity:
        """What it is now."""
        boot = system.boot_id().hex()
        if self._fd is None:
            return Identity(kind=Kind.MISSING, size=0, device=0, inode=0, mtime_ns=0, settled=False, boot=boot)
        with named(self.path):
            found = os.fstat(self._fd)
            if stat.S_ISBLK(found.st_mode):
                size = os.lseek(self._fd, 0, os.SEEK_END)
                return Identity(
                    kind=Kind.DEVICE, size=size, device=found.st_rdev, inode=0, mtime_ns=0, settled=False, boot=boot
                )
        return Identity(
            kind=Kind.FILE, size=found.st_size, device=found.st_dev, inode=found.st_ino, mtime_ns=found.st_mtime_ns,
            settled=time.time_ns() - found.st_mtime_ns > SETTLED_NS, boot=boot,
        )  # fmt: skip

    def begin(self, end: int, key: DigestKey) -> None:
        """It is compared up to byte `end`, with `key` alone."""
        self.end = end

    def occupied(self, low: int, high: int) -> list[Extent]:
        """The ranges within [low, high) that may hold anything but zeroes; ascending and apart."""
        if self._fd is None:
            return []
        with named(self.path):
            ranges = system.data_extents(self._fd, low, min(high, self.end))
            return [Extent(start, end - start) for start, end in ranges]

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view`; returns the bytes read, fewer only where the disk ends."""
        wanted = max(0, min(len(view), self.end - offset))
        if self._fd is None or not wanted:
            return 0
        with named(self.path, f"reading at {offset}: "):
            return system.pread_into(self._fd, view[:wanted], offset)

    def summaries(self, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """As `Other.summaries`. The digests are kept for a while: where a summary differs they are asked for."""
        found = np.empty((len(extents), 2), np.uint64)
        for row, extent in zip(found, extents, strict=True):
            digests = self._digests(extent, key)
            with self._lock:
                self._kept[extent] = digests
                if len(self._kept) > KEPT_SPANS:
                    self._kept.popitem(last=False)
            row[:] = summary(digests, key)
        return found

    def digests(self, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """As `Other.digests`; each of the extents within a span."""
        with self._lock:
            kept = [self._kept.pop(extent, None) for extent in extents]
        return np.concatenate(
            [
                self._digests(extent, key) if digests is None else digests
                for extent, digests in zip(extents, kept, strict=True)
            ]
        )

    def _digests(self, extent: Extent, key: DigestKey) -> Digests:
        return sparse_digests(
            [extent],
            key,
            data=lambda low, high: [(part.offset, part.end) for part in self.occupied(low, high)],
            digest=lambda low, high: digest_blocks(self.read(Extent(low, high - low)), key),
        )

    def read(self, extent: Extent) -> memoryview:
        """The bytes of an extent of at most a span, zeroes beyond the end; valid until this thread reads again."""
        buffer: memoryview | None = getattr(self._own, "buffer", None)
        if buffer is None:
            buffer = self._own.buffer = system.page_buffer(plan.SPAN)
        view = buffer[: extent.length]
        got = self.read_into(view, extent.offset)
        view[got:] = bytes(extent.length - got)
        return view


def open_source(path: str) -> LocalEnd:
    """The end that counts. Raises HvfuseError."""
    with named(path):
        _refuse_other_kinds(path, os.stat(path))
        end = LocalEnd(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    try:
        _advise(end)
        end.end = end.identify().size
    except BaseException:
        end.close()
        raise
    return end


class ReplicaEnd(LocalEnd):
    """The end that becomes the same. Besides the file itself, only its state file is ever touched: `path` and
    `STATE_SUFFIX`, which holds whatever the run that drives wants to know if it is killed, and a last line that is
    this class's: the replica's mark in decimal, 0 if it has none. `writes`: it is open for writing.
    `created`: it was made just now. `marks`: the file system keeps mtimes as they are set."""

    def __init__(
        self, path: str, fd: int | None, *, writes: bool = False, created: bool = False, marks: bool = False
    ) -> None:
        super().__init__(path, fd)
        self.writes = writes
        self.created = created
        self._sync_error: HvfuseError | None = None
        self._marks = marks
        self._marking = threading.Lock()  # guards the two below
        self._wrote = False
        self._mark = self.identify().mtime_ns if marks else 0

    def resize(self, size: int) -> None:
        """Make a file's length `size`; a block device stays as it is."""
        fd = self._writable()
        if self.identify().kind is Kind.FILE and os.fstat(fd).st_size != size:
            with named(self.path):
                system.truncate("resync:truncate", fd, size)
            self._put_mark_back(fd)

    def apply(self, wanted: Sequence[Change]) -> int:
        """Write and punch. Returns the bytes written."""
        fd = self._writable()
        written = 0
        with named(self.path):
            for change in wanted:
                if change.data is None:
                    system.write_zeroes("resync:zero", fd, change.offset, change.length)
                else:
                    system.pwrite("resync:write", fd, change.data, change.offset)
                    written += change.length
        self._put_mark_back(fd)
        return written

    def _put_mark_back(self, fd: int) -> None:
        """After writes of ours. The first ones choose a new mark: the old one says that nothing was written."""
        with self._marking:
            if not self._wrote:
                self._wrote = True
                self._mark = time.time_ns() - MARK_AGE_NS if self._marks else 0
            if not self._mark:
                return
            try:
                system.set_mtime("resync:mark", fd, self._mark)
            except OSError:
                self._mark = 0

    def _mark_to_keep(self) -> int:
        with self._marking:
            return self._mark if time.time_ns() - self._mark > SETTLED_NS else 0

    def sync(self, state: bytes | None = None) -> bool:
        """Make everything written so far durable; then, durably, the state file.

        A failed sync is final: what the page cache holds is no longer what is on the disk. Its pages are dropped, the
        state is removed, and every later call fails. Returns False if the state file cannot be written.
        """
        fd = self._writable()
        if self._sync_error is not None:
            raise self._sync_error
        try:
            system.fdatasync("resync:sync", fd)
        except OSError as error:
            self._sync_error = HvfuseError(
                f"{self.path}: could not be made durable: {error.strerror}",
                hint="see the kernel's log; then run it again: everything is compared anew",
            )
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with contextlib.suppress(OSError):
                system.unlink("resync:forget", self._state_path, missing_ok=True)
            raise self._sync_error from error
        if state is not None:
            try:
                system.replace_file("resync:state", self._state_path, state + b"%d\n" % self._mark_to_keep())
            except OSError:
                return False
        return True

    def state(self) -> tuple[bytes, bool] | None:
        """What `sync` was given last, and whether nobody has written to the file since, this run's forerunner
        included: its mtime is the mark, exactly."""
        if self._fd is None:
            return None
        try:
            with open(os.open(self._state_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
                found = os.fstat(file.fileno())
                data = file.read(STATE_LIMIT + 1)
        except OSError:
            return None
        if len(data) > STATE_LIMIT or not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()):
            return None
        state, newline, mark = data.removesuffix(b"\n").rpartition(b"\n")
        mtime = self.identify().mtime_ns
        return state + newline, mtime > 0 and mark == b"%d" % mtime

    def finish(self) -> None:
        """Make everything durable, the file's name too, and remove the state file."""
        if self._wrote and self._mark:
            with contextlib.suppress(OSError):
                system.set_mtime("resync:unmark", self._writable(), time.time_ns())
        self.sync()
        with named(self.path):
            if self.created:
                system.fsync_directory("resync:directory", os.path.dirname(os.path.abspath(self.path)))
            for path in (self._state_path, f"{self._state_path}.tmp"):  # a killed run may have left the second
                system.unlink("resync:done", path, missing_ok=True)

    @property
    def _state_path(self) -> str:
        return os.path.abspath(self.path) + STATE_SUFFIX

    def _writable(self) -> int:
        if self._fd is None or not self.writes:
            raise UsageError(f"{self.path}: is not open for writing")
        return self._fd


def open_replica(path: str, *, write: bool) -> ReplicaEnd:
    """The end that becomes the same. If `write`, it is made when it is missing, and nobody else may use it.

    Raises HvfuseError.
    """
    with named(path):
        try:
            found = os.stat(path)
        except FileNotFoundError:
            if os.path.islink(path):
                raise NotFoundError(
                    f"{path}: is a symbolic link to {os.readlink(path)}, which does not exist",
                    hint="name the file that is to be made, or remove the link",
                ) from None
            return _create(path) if write else _missing(path)
        _refuse_other_kinds(path, found)
        if not write:
            end = ReplicaEnd(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        else:
            exclusive = os.O_EXCL if stat.S_ISBLK(found.st_mode) else 0
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | exclusive)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise BusyError(f"{path}: is mounted, or part of a device that is in use") from None
            end = ReplicaEnd(path, fd, writes=True, marks=stat.S_ISREG(found.st_mode) and _is_local(fd))
    try:
        if write:
            _claim(path, fd)
        _advise(end)
    except BaseException:
        end.close()
        raise
    return end


def _missing(path: str) -> ReplicaEnd:
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise NotFoundError(f"{path}: there is no directory {folder}")
    if os.stat(folder).st_dev == os.stat("/dev").st_dev:
        raise NotFoundError(f"{path}: there is no such device", hint="ls /dev")
    return ReplicaEnd(path, None)


def _create(path: str) -> ReplicaEnd:
    _missing(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    end = ReplicaEnd(path, fd, writes=True, created=True, marks=_is_local(fd))
    try:
        _claim(path, fd)
    except BaseException:
        end.close()
        raise
    return end


def _refuse_other_kinds(path: str, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{path}: is a directory", hint="name an image file or a block device")
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISBLK(found.st_mode):
        raise UsageError(f"{path}: is neither a regular file nor a block device")


def _advise(end: LocalEnd) -> None:
    if end._fd is not None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(end._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def _claim(path: str, fd: int) -> None:
    """Refuse what others use, and keep those who ask away until `fd` is closed. Raises BusyError, OSError."""
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BusyError(f"{path}: is locked by another program, such as qemu or another resync") from None
        if error.errno not in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    if not stat.S_ISREG(os.fstat(fd).st_mode) or not _is_local(fd):
        return
    try:
        # The kernel grants a write lease only where no other descriptor is open.
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        raise BusyError(
            f"{path}: another program has it open", hint=f"see which: fuser -v {path}; losetup -a"
        ) from None
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _is_local(fd: int) -> bool:
    """Whether this kernel alone has the file: over a network, a lease that is refused tells nothing of other
    users, and an mtime that is set costs a write to the server and may be overtaken by one."""
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            if fields[2] == number:
                return not fields[fields.index("-") + 1].startswith(("nfs", "cifs", "smb", "9p", "fuse", "ceph"))
    return True
