"""Who may serve a VM: one process at a time, and nobody while its files are being moved or thrown away.

The process holds a lock from before it looks at the VM's folder until it has ended; the kernel drops it with the
process. So two that start one at the same time, `hvfuse run` and a command, say, end up with the same one; and whoever
has the lock knows that none is being started, which nobody can tell from a socket that is not there yet.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from hvfuse import system
from hvfuse.control.daemon import serving_pid, start_and_wait, wait_for_end
from hvfuse.control.home import Home
from hvfuse.control.supervisor import stop_tracker, tracker_daemon
from hvfuse.errors import BusyError, UnreachableError
from hvfuse.mountpoint import clear_dead_mount
from hvfuse.system import Clock

END_SECONDS = 60.0
"""How long a process may take to seal its logs after it has unmounted, or to come so far as to be asked."""
PROBE_SECONDS = 0.5
"""Far longer than `is_served` holds the lock."""
_LOOK_SECONDS = 0.02


@contextlib.contextmanager
def serving(home: Home, vm: str, *, clock: Clock) -> Iterator[None]:
    """Be the process that serves the VM. Raises BusyError if there is another, or its files are on the move."""
    with contextlib.ExitStack() as stack:
        if not _had(stack, home, vm, clock=clock, seconds=PROBE_SECONDS):
            raise BusyError(f"{vm}: another process serves it, or moves its files", hint=f"hvfuse status {vm}")
        yield


@contextlib.contextmanager
def nobody_serves(home: Home, vm: str, *, clock: Clock, force: bool = False) -> Iterator[None]:
    """End the process that serves the VM, unmount it, and let none begin meanwhile. `force`: although programs use it.
    Raises BusyError naming who uses the mount, UnreachableError if the process does not end."""
    with contextlib.ExitStack() as stack:
        if os.path.isdir(home.state_dir(vm)):  # else nobody ever served it
            deadline = clock.monotonic() + END_SECONDS
            while True:
                _end(home, vm, force=force)
                if _had(stack, home, vm, clock=clock, seconds=_LOOK_SECONDS):
                    break
                if clock.monotonic() >= deadline:
                    raise BusyError(f"{vm}: a process that is to serve it is being started", hint=f"hvfuse status {vm}")
        clear_dead_mount(home.mountpoint(vm))
        yield


def start_tracker(home: Home, vm: str, *, clock: Clock) -> int:
    """Have the VM served, by a process that is there or by a new one. Returns its pid. Raises what ended it, or
    UnreachableError."""
    deadline = clock.monotonic() + END_SECONDS
    while True:
        pid = serving_pid(home.tracker_socket(vm))
        if pid is not None:
            return pid
        if not is_served(home, vm):
            daemon = tracker_daemon(home, vm, clock=clock)
            try:
                start_and_wait(daemon, clock=clock)
                return daemon.pid
            except BusyError:
                if not is_served(home, vm):
                    raise
        if clock.monotonic() >= deadline:
            raise UnreachableError(f"{vm}: the process that is to serve it does not answer", hint=f"hvfuse status {vm}")
        clock.sleep(_LOOK_SECONDS)


def is_served(home: Home, vm: str) -> bool:
    """Whether a process serves the VM, or is about to; or its files are on the move."""
    return system.is_locked(home.tracker_lock(vm))


def _end(home: Home, vm: str, *, force: bool) -> None:
    pid = serving_pid(home.tracker_socket(vm))
    if pid is None:
        return
    if force:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    else:
        stop_tracker(home, vm)
    if not wait_for_end(pid, END_SECONDS):
        raise UnreachableError(f"{vm}: the process that serves it (pid {pid}) does not end")


def _had(stack: contextlib.ExitStack, home: Home, vm: str, *, clock: Clock, seconds: float) -> bool:
    """Try for the lock for so long; it is let go with `stack`."""
    deadline = clock.monotonic() + seconds
    while True:
        with contextlib.ExitStack() as attempt:
            if attempt.enter_context(system.exclusive_lock(home.tracker_lock(vm))):
                stack.enter_context(attempt.pop_all())
                return True
        if clock.monotonic() >= deadline:
            return False
        clock.sleep(_LOOK_SECONDS)
