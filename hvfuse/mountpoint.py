"""Mount points: whether one is free, who holds it, how it is let go. Nothing here needs libfuse."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hvfuse.errors import BusyError, HvfuseError, NotFoundError, PrerequisiteError, UsageError

logger = logging.getLogger(__name__)

_MNT_FORCE = 1
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_LOOK_AGAIN = 0.2
"""Seconds after which a loop that should have ended is told again."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process (or, with pid 0, a loop device) that keeps a mount busy."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})" if self.pid else self.command


def _canonical(path: str) -> str:
    """Absolute, with the symlinks of the parents resolved; the last name is not touched (it may be dead)."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name)


def _mounts() -> dict[str, str]:
    """File system type by mount point; the topmost where several are stacked."""
    found = {}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, after = line.rstrip("\n").split(" - ", 1)
            path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split(" ")[4])
            found[path] = after.split(" ")[0]
    return found


def is_mounted(path: str) -> bool:
    """Whether something is mounted at `path`; never touches it, so a dead mount is no trouble."""
    return _canonical(path) in _mounts()


def check_mountpoint(path: str) -> str:
    """Make sure that `path` can be mounted on, creating it if need be; returns it absolute.

    Raises BusyError when it is a mount point already or has contents, UsageError when it is no directory.
    """
    path = _canonical(path)
    if path in _mounts():
        raise BusyError(f"{path}: something is mounted here already", hint=f"umount {path}")
    try:
        os.makedirs(path, exist_ok=True)
        if os.listdir(path):
            raise BusyError(f"{path}: the directory to mount on is not empty")
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{path}: is not a directory") from None
    except OSError as error:
        raise HvfuseError(f"{path}: {error.strerror}") from None
    return path


def clear_dead_mount(path: str) -> bool:
    """Detach what a killed process left mounted at `path`; returns whether there was something.

    Programs that hold files in the dead mount keep them, and go on getting ENOTCONN.
    """
    path = _canonical(path)
    cleared = False
    while _mounts().get(path, "").startswith("fuse") and _is_dead(path):
        unmount(path, lazy=True)
        cleared = True
    return cleared


def _is_dead(path: str) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount; `lazy` detaches at once and lets open files live on until they are closed.

    Raises BusyError naming who holds it, NotFoundError when nothing is mounted there, PrerequisiteError.
    """
    path = _canonical(mountpoint)
    code = _umount2(path, _MNT_DETACH if lazy else 0)
    if code == errno.EBUSY:
        held = ", ".join(str(holder) for holder in holders(path)) or "a process that cannot be seen from here"
        raise BusyError(f"{path}: in use by {held}", hint="end what uses it, then unmount again")
    if code in (errno.EINVAL, errno.ENOENT):
        raise NotFoundError(f"{path}: nothing is mounted here")
    if code == errno.EPERM:
        raise PrerequisiteError("unmounting needs root", hint="use sudo")
    if code:
        raise HvfuseError(f"{path}: cannot be unmounted: {os.strerror(code)}")


def _umount2(path: str, flags: int) -> int:
    if _libc.umount2(os.fsencode(path), flags | _UMOUNT_NOFOLLOW) == 0:
        return 0
    return ctypes.get_errno()


def holders(*paths: str) -> list[Holder]:
    """Who keeps these mounts, or files of mounts, busy: by open files, working directory, maps or loop devices on
    what is there."""
    wanted = [_canonical(path) for path in paths]
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if any(_is_within(used, path) for used in _used_by(pid) for path in wanted):
            found.append(Holder(pid, _command(pid)))
    for name in sorted(os.listdir("/sys/block")):
        with contextlib.suppress(OSError), open(f"/sys/block/{name}/loop/backing_file") as file:
            backing = file.read().rstrip("\n")
            if any(_is_within(backing, path) for path in wanted):
                found.append(Holder(0, f"/dev/{name}"))
    return found


def _is_within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory + "/")


def _used_by(pid: int) -> Iterator[str]:
    """Paths that a process holds. One that ends meanwhile, or may not be looked into, holds nothing."""
    links = [f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe")]
    with contextlib.suppress(OSError):
        links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    for link in links:
        with contextlib.suppress(OSError):
            yield os.readlink(link)
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", errors="surrogateescape") as file:
        for line in file:
            yield line.rstrip("\n").partition("/")[1] + line.rstrip("\n").partition("/")[2]


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return "?"


Arm = Callable[[Callable[[], None]], None]
"""Takes what makes the serving loop end as soon as it looks up from its work."""


@contextlib.contextmanager
def stopped_by_signals(mountpoint: str) -> Iterator[Arm]:
    """Let SIGTERM, SIGINT and SIGHUP unmount `mountpoint` while the main thread is busy serving it.

    Yields the function that installs the handlers, to be called in the main thread once mounted. A thread
    does the unmounting, because the mount has to be served meanwhile: what programs have mapped and changed
    is written back first. A process that was told to end goes on ignoring these signals, for what it still
    has to put in order must not be cut short by the second of them; one that was not gets its own handlers
    back. In another than the main thread nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda leave: None
        return
    watcher = _Watcher(mountpoint)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield watcher.begin
    finally:
        watcher.end()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if watcher.told.is_set() else handler)


class _Watcher:
    """The thread that unmounts. All methods but `_watch` belong to the main thread."""

    def __init__(self, mountpoint: str) -> None:
        self.told = threading.Event()
        self._mountpoint = mountpoint
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._pipe: tuple[int, int] = (-1, -1)
        self._wakeup_before = -1

    def begin(self, leave: Callable[[], None]) -> None:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        # Python's handlers run only between bytecodes, and the main thread sits in libfuse; the descriptor
        # is written by the C handler at once.
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _noted)
        self._thread = threading.Thread(target=self._watch, args=(leave,), name="unmounter", daemon=True)
        self._thread.start()

    def end(self) -> None:
        if self._thread is None:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        self._ended.set()
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for fd in self._pipe:
            os.close(fd)

    def _watch(self, leave: Callable[[], None]) -> None:
        """Stop the mount at the first signal that stops; a zero says that there is nothing left to stop."""
        number = -1
        while number not in (0, *_SIGNALS):
            number = os.read(self._pipe[0], 1)[0]
        if number == 0:
            return
        self.told.set()
        stop(self._mountpoint)
        # The mount may live on in another mount namespace. The loop looks up when a signal interrupts its
        # read, and may just have looked, hence again.
        while not self._ended.wait(_LOOK_AGAIN):
            leave()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGHUP)


def _noted(_number: int, _frame: object) -> None:
    """The wake-up descriptor has told the watcher already."""


def stop(mountpoint: str) -> None:
    """End the mount whoever uses it: politely if nobody does, else after writing back what is dirty.

    Files that are still open in it give ENOTCONN from then on.
    """
    path = _canonical(mountpoint)
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _libc.syncfs(fd)
        os.close(fd)
    try:
        unmount(path)
    except NotFoundError:
        return
    except HvfuseError as error:
        logger.warning("%s; ended nevertheless", error)
        _umount2(path, _MNT_FORCE)  # ends the connection, hence the serving loop
        _umount2(path, _MNT_DETACH)
