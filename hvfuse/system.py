"""The seam for system calls: labelled, so that a test can break exactly one of them.

Every write, sync, rename and removal that a promise rests on goes through here with a label such as
"log:append". In production `_injector` is None and a call costs one comparison more than `os`'s own.
A test installs an injector, which sees (label, call, size) before the call happens and may raise
`OSError`, kill the process, wait, or return a number of bytes after which the call shall fall short.

Clocks live here too, for the same reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from hvfuse.extent import Buffer

Injector = Callable[[str, str, int], int | None]

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
_FICLONE = 0x40049409
_SYNC_FILE_RANGE_WRITE = 2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MS_SYNC = 4
_CACHESTAT = 451  # the same on all machines
SMALL = 64 << 10
"""Bytes; see `keep_pages_small`."""
LARGE_SHIFT = 21
"""The largest pages of the page cache have 2 MiB."""

_injector: Injector | None = None


def install(injector: Injector | None) -> None:
    """Set (or with None remove) the injector of this process."""
    global _injector  # noqa: PLW0603 - one seam per process is the point
    _injector = injector


def _before(label: str, call: str, size: int) -> int | None:
    return _injector(label, call, size) if _injector is not None else None


def passing(label: str) -> None:
    """Tell the injector that the program has come here: before and after steps such as LMDB's commit,
    which make their system calls themselves."""
    if _injector is not None:
        _before(label, "pass", 0)


def pwrite(label: str, fd: int, data: Buffer, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError; part of the data may then be on the file."""
    short = _before(label, "pwrite", len(data)) if _injector is not None else None
    if short is not None:
        os.pwrite(fd, memoryview(data)[:short], offset)
        raise OSError(errno.EIO, f"short write at {label}")
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        more = os.pwrite(fd, memoryview(data)[written:], offset + written)
        if more == 0:
            raise OSError(errno.EIO, f"no progress at {label}")
        written += more


def pwrite_small(label: str, fd: int, data: Buffer, offset: int) -> None:
    """Write all of `data` at `offset`, at most SMALL bytes at once; see `keep_pages_small`. Raises OSError; part of the
    data may then be on the file."""
    length = len(data)
    if length <= SMALL:
        pwrite(label, fd, data, offset)
        return
    data = memoryview(data)
    done = 0
    while done < length:
        after = min(length, done + SMALL - (offset + done) % SMALL)
        pwrite(label, fd, data[done:after], offset + done)
        done = after


def keep_pages_small(fd: int) -> None:
    """Have what is read of a guest's disk, or of a log, be kept in the page cache by single pages, for the sake of
    small writes. To be said by all who look at a VM's disk: a page that was read ahead harms what is read after it.

    Since Linux 6.16 ext4 keeps what is read ahead, or written at once, in pages of up to 2 MiB, and each write of 4 KiB
    to such a page looks at all of its blocks: ten times the work. So whoever writes such a file writes at most SMALL
    bytes at once. The kernel does not read ahead then: who reads in order says so (`read_ahead`).
    """
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def cached_rooms(fd: int, size: int) -> set[int]:
    """The rooms of large pages, numbers of 2 MiB each, of which the page cache has anything, among the first `size`
    bytes of a file. None where the kernel cannot tell: before Linux 6.5, which has no large pages of ext4 either."""
    found: set[int] = set()
    if size > 0:
        _look_for_rooms(fd, 0, max((size - 1).bit_length(), LARGE_SHIFT), found)
    return found


def _look_for_rooms(fd: int, start: int, shift: int, found: set[int]) -> None:
    """Among the `1 << shift` bytes from `start` on. Where nothing is cached, one call tells it."""
    where, counted = (ctypes.c_uint64 * 2)(start, 1 << shift), (ctypes.c_uint64 * 5)()
    refused = _libc().syscall(ctypes.c_long(_CACHESTAT), ctypes.c_uint(fd), where, counted, ctypes.c_uint(0))
    if refused or not counted[0]:
        return
    if shift == LARGE_SHIFT:
        found.add(start >> LARGE_SHIFT)
        return
    below = max(shift - 6, LARGE_SHIFT)
    for at in range(start, start + (1 << shift), 1 << below):
        _look_for_rooms(fd, at, below, found)


def drop_large_page(fd: int, number: int) -> None:
    """Have the kernel forget what it keeps of the room of that number, in a large page or in many small ones; what is
    not on the medium yet stays. See `keep_pages_small`."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, number << LARGE_SHIFT, 1 << LARGE_SHIFT, os.POSIX_FADV_DONTNEED)


def read_ahead(fd: int, offset: int, length: int) -> None:
    """Have a range read into the page cache, in small pages, at once. Returns when the device was asked for all of it,
    which takes its time, too: nobody else should have to wait for more than a MiB."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)


def pread(fd: int, length: int, offset: int) -> bytes:
    """Read `length` bytes at `offset`, fewer only at the end of the file."""
    data = os.pread(fd, length, offset)
    if len(data) == length or not data:
        return data
    parts = [data]
    have = len(data)
    while have < length:
        data = os.pread(fd, length - have, offset + have)
        if not data:
            break
        parts.append(data)
        have += len(data)
    return b"".join(parts)


def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; returns the bytes read, fewer only at the end of the file."""
    done = os.preadv(fd, (buffer,), offset)
    while done < len(buffer):
        more = os.preadv(fd, [buffer[done:]], offset + done)
        if more == 0:
            break
        done += more
    return done


@functools.cache
def keep_freed_memory() -> None:
    """Have this process keep up to 64 MiB that it frees for what it allocates next: else the C library gives buffers
    of a MiB back to the kernel, which has to zero new ones. Does nothing where the C library is not GNU's."""
    if hasattr(_libc(), "mallopt"):
        _libc().mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        _libc().mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def page_buffer(size: int) -> memoryview:
    """Zeroes to read into, on a page of their own. The kernel copies several times as fast to aligned memory on
    some processors, and a bytearray begins 16 bytes off."""
    return memoryview(mmap.mmap(-1, size))


def fsync(label: str, fd: int) -> None:
    """Make a file's data and metadata durable. A failure is final: never call again and believe it."""
    if _injector is not None:
        _before(label, "fsync", 0)
    os.fsync(fd)


def fdatasync(label: str, fd: int) -> None:
    """Make a file's data (and its size) durable. A failure is final, as with `fsync`."""
    if _injector is not None:
        _before(label, "fdatasync", 0)
    os.fdatasync(fd)


def sync_map(label: str, shared: mmap.mmap, start: int, end: int) -> None:
    """Make the bytes [start, end) of a shared map durable; `start` on a page. A failure is final. (`mmap.flush` would
    keep the interpreter's lock meanwhile.)"""
    if _injector is not None:
        _before(label, "msync", end - start)
    if end > start:
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        _succeed(_libc().msync(ctypes.c_void_p(address + start), ctypes.c_size_t(end - start), _MS_SYNC))


def at_once(first: Callable[[], None], second: Callable[[], None]) -> tuple[OSError | None, OSError | None]:
    """Do both at the same time, and return what refused each. Two syncs take no longer than one then: the device's
    cache is emptied for both. Where an injector looks, one comes after the other, as tests have to be repeatable."""
    if _injector is not None:
        return refusal_of(first), refusal_of(second)
    other = _others().submit(refusal_of, second)
    refused = refusal_of(first)
    return refused, refusal_of(second) if other.cancel() else other.result()


def refusal_of(act: Callable[[], None]) -> OSError | None:
    """What OSError an act raises; None if it does not."""
    try:
        act()
    except OSError as error:
        return error
    return None


@functools.cache
def _others() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="at_once")


def fsync_directory(label: str, path: str) -> None:
    """Make the names in directory `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(label, fd)
    finally:
        os.close(fd)


def syncfs(label: str, fd: int) -> None:
    """Make all of the file system that `fd` lies on durable. Fails also for what could not be written back since
    the last time that this was asked, of whatever file (Linux 5.8). A failure is final, as with `fsync`."""
    if _injector is not None:
        _before(label, "syncfs", 0)
    _succeed(_libc().syncfs(fd))


def begin_writing(fd: int) -> None:
    """Have the kernel begin to write what a file has in memory alone to the medium, so that the sync that follows takes
    less. No promise rests on it: nothing is durable before that sync, which also tells what this failed at."""
    _libc().sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def clone(label: str, fd: int, source_fd: int) -> None:
    """Make a file share all of another's blocks, copied when written to. Raises OSError where the file system
    cannot (EOPNOTSUPP, EXDEV and so on); nothing happened then."""
    if _injector is not None:
        _before(label, "clone", 0)
    fcntl.ioctl(fd, _FICLONE, source_fd)


def truncate(label: str, fd: int, size: int) -> None:
    """Set a file's length in bytes."""
    if _injector is not None:
        _before(label, "truncate", size)
    os.ftruncate(fd, size)


def set_mtime(label: str, fd: int, mtime_ns: int) -> None:
    """Set a file's time of change, in nanoseconds since 1970; its time of access stays. Raises OSError (EPERM if it
    is another user's)."""
    if _injector is not None:
        _before(label, "utimens", 0)
    os.utime(fd, ns=(os.fstat(fd).st_atime_ns, mtime_ns))


def rename(label: str, old: str, new: str) -> None:
    """Rename, replacing `new`. Durable only after `fsync_directory`."""
    if _injector is not None:
        _before(label, "rename", 0)
    os.rename(old, new)


def unlink(label: str, path: str, *, missing_ok: bool = False) -> None:
    """Remove a name."""
    if _injector is not None:
        _before(label, "unlink", 0)
    try:
        os.unlink(path)
    except FileNotFoundError:
        if not missing_ok:
            raise


def allocate(label: str, fd: int, offset: int, length: int) -> None:
    """Reserve space, so that later stores through a map cannot meet a full disk (SIGBUS)."""
    if _injector is not None:
        _before(label, "fallocate", length)
    os.posix_fallocate(fd, offset, length)


def fallocate(label: str, fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with any mode (`os` offers none of them). Raises OSError (EOPNOTSUPP and so on)."""
    if _injector is not None:
        _before(label, "fallocate", length)
    _succeed(_libc().fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _succeed(result: int) -> None:
    """Raises OSError for what a function of the C library returned, unless it is 0."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def punch_hole(label: str, fd: int, offset: int, length: int) -> None:
    """Deallocate a range, which then reads as zeroes; the file's length stays."""
    fallocate(label, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def write_zeroes(label: str, fd: int, offset: int, length: int) -> None:
    """Make a range read as zeroes without changing the file's length: a hole if the file system can."""
    end = min(offset + length, os.lseek(fd, 0, os.SEEK_END))  # fstat gives 0 for a block device
    if end <= offset:
        return
    try:
        punch_hole(label, fd, offset, end - offset)
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL):
            raise
    zeroes = bytes(min(end - offset, 1 << 20))
    for at in range(offset, end, len(zeroes)):
        pwrite(label, fd, memoryview(zeroes)[: end - at], at)


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The allocated ranges [offset, end) of a file within [start, end), by SEEK_DATA and SEEK_HOLE.

    Of a file that is cut meanwhile, what is left. Raises OSError.
    """
    at = start
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno == errno.EINVAL:  # block devices know no holes
                yield at, end
                return
            raise
        if data >= end:
            return
        try:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # the file was cut before `data` since the last call
                return
            raise
        yield data, hole
        at = hole


def replace_file(label: str, path: str, data: Buffer, *, mode: int = 0o600) -> None:
    """Put a whole file in place durably: write beside, sync, rename, sync the directory."""
    temporary = f"{path}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        pwrite(f"{label}:write", fd, data, 0)
        fsync(f"{label}:sync", fd)
    finally:
        os.close(fd)
    rename(f"{label}:rename", temporary, path)
    fsync_directory(f"{label}:directory", os.path.dirname(path) or ".")


@contextmanager
def exclusive_lock(path: str) -> Iterator[bool]:
    """Try for an advisory lock on `path` (created if missing); yields whether it was had.

    The kernel drops it with the process, so a lock left behind by a kill is no lock.
    """
    with inheritable_lock(path) as fd:
        yield fd is not None


@contextmanager
def inheritable_lock(path: str) -> Iterator[int | None]:
    """Try for an advisory lock as `exclusive_lock` does; yields its descriptor, None if it was not had.

    A child process that is given the descriptor holds the lock as well, for as long as it lives.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield fd
    finally:
        os.close(fd)


def is_locked(path: str) -> bool:
    """Whether a process has the lock on `path`. Several may ask at once; none of them passes for one that has it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def boot_id() -> bytes:
    """16 bytes that change with every boot of this host."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none, or it is dead and not buried yet."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def process_is_stopped(pid: int) -> bool:
    """Whether a process is there and stands still by a signal (SIGSTOP), or under a debugger."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (FileNotFoundError, ProcessLookupError):
        return False


def process_identity(pid: int) -> dict[str, Any]:
    """What tells a process from every other, even after its pid was given away: JSON values."""
    return {"pid": pid, "boot_id": boot_id().hex(), "process_start": process_start(pid)}


def is_running(identity: Mapping[str, Any]) -> bool:
    """Whether the process of that `process_identity` runs."""
    if identity.get("boot_id") != boot_id().hex():
        return False
    started = process_start(int(identity["pid"]))
    return started is not None and started == identity.get("process_start")


def signal_process(identity: Mapping[str, Any], number: int) -> bool:
    """Send a signal to exactly the process of that `process_identity`; False, and none is sent, if it is gone."""
    try:
        handle = os.pidfd_open(int(identity["pid"]))
    except ProcessLookupError:
        return False
    try:
        # The descriptor stays with the process that it was opened for, so what is compared now is what gets it.
        if not is_running(identity):
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


class Clock(Protocol):
    """Time as the program sees it."""

    def now_ns(self) -> int:
        """Wall clock: nanoseconds since 1970-01-01 UTC. May jump; never used to order things."""

    def monotonic(self) -> float:
        """Seconds that only ever grow; for intervals."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""


class SystemClock:
    """The machine's own clocks."""

    def now_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
