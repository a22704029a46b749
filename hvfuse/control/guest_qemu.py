"""A guest as a qemu process of ours: started, found again, ended.

Nobody may ever start a second one on the same disks, whatever died when. So what is started carries two marks before it
is anything else: a lock, whose descriptor is handed down to it, and which the kernel keeps until the last
process that has it ends; and a token in its environment. The lock says that there is a guest, without any gap; the
token, which process it is, also where a shell script stands between. Whoever starts a guest must have the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from hvfuse import system
from hvfuse.control.daemon import rotate_log
from hvfuse.control.guest_monitor import Monitor
from hvfuse.control.guest_plan import MONITOR, BootPlan
from hvfuse.control.guest_record import Ending, GuestRecord, log_path
from hvfuse.errors import BusyError, HvfuseError, PrerequisiteError, UnreachableError

TOKEN_VARIABLE = "HVFUSE_GUEST_TOKEN"
READY_SECONDS = 60.0
"""For a qemu to answer after its start."""
APPEAR_SECONDS = 5.0
"""For a process to get from fork to exec, after which its token can be seen."""
LOOK_SECONDS = 1.0
"""Whoever only looks whether a guest runs has its lock for an instant."""
PRESS_SECONDS = 10.0
"""Then the power button is pressed again: a guest that was still booting had not heard it."""
QUIT_SECONDS = 20.0
KILL_SECONDS = 10.0
_SAID = 600
"""Characters of what a qemu said that a message holds."""


class QemuGuest:
    """The qemu of one state directory, which `record` tells of."""

    def __init__(self, state_dir: str, record: GuestRecord) -> None:
        self._state_dir = state_dir
        self._token = record.token
        self._process = record.process
        self._monitor = Monitor(state_dir, MONITOR)

    @staticmethod
    def token(_plan: BootPlan) -> str:
        """For a guest that is about to be started."""
        return secrets.token_hex(16)

    def is_running(self) -> bool:
        """Whether it runs, or is just starting."""
        return self.process() is not None

    def process(self) -> Mapping[str, Any] | None:
        """The process's identity; None if there is none. Raises BusyError where the lock is held by nobody known."""
        if self._process is not None and system.is_running(self._process):
            return self._process
        until = time.monotonic() + APPEAR_SECONDS
        while True:
            if found := self._processes():
                return found[0]
            with self._lock() as fd:
                if fd is not None:
                    return None
            if time.monotonic() > until:
                raise BusyError(
                    f"somebody holds {self._lock_path}: a guest may run there, whose process cannot be found",
                    hint=f"fuser -v {self._lock_path}",
                )
            time.sleep(0.02)

    @staticmethod
    def check(plan: BootPlan) -> None:
        """Raises PrerequisiteError if it could not be started."""
        if shutil.which(plan.command[0]) is None:
            raise PrerequisiteError(f"[vm.{plan.vm}.guest] qemu: there is no program {plan.command[0]}")

    def start(self, plan: BootPlan) -> Mapping[str, Any] | None:
        """Start what does not run, and return its process. Raises PrerequisiteError if it cannot be run, BusyError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._state_dir, MONITOR))
        path = log_path(self._state_dir)
        rotate_log(path)
        with self._lock(LOOK_SECONDS) as fd, open(path, "ab") as log:
            if fd is None:
                raise BusyError(f"a guest of {plan.vm} is there already: {self._lock_path} is held")
            try:
                process = subprocess.Popen(
                    plan.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    cwd=self._state_dir,
                    env={**os.environ, **plan.environment, TOKEN_VARIABLE: self._token},
                    pass_fds=(fd,),
                )
            except OSError as error:
                raise PrerequisiteError(f"{plan.command[0]} cannot be run: {error.strerror}") from None
        system.passing("boot:forked")
        threading.Thread(target=process.wait, name="guest", daemon=True).start()  # so that it leaves no zombie
        self._process = system.process_identity(process.pid)
        return self._process

    def wait_until_ready(self, plan: BootPlan) -> None:
        """Wait until it answers. Raises HvfuseError with what it said if it ends, UnreachableError."""
        until = time.monotonic() + READY_SECONDS
        while True:
            try:
                self._monitor.status()
                return
            except UnreachableError as error:
                if not self.is_running():
                    raise HvfuseError(
                        f"the guest {plan.name} ended at once: {self._last_words()}",
                        hint=f"tail {log_path(self._state_dir)}",
                    ) from None
                if time.monotonic() > until:
                    raise UnreachableError(f"the guest {plan.name} runs, but {error}") from None
            time.sleep(0.02)

    def shut_down(self, seconds: float) -> Ending:
        """End it: by its power button, for which it has so long; then by its monitor; then by a kill. Raises
        UnreachableError if even that does not help."""
        try:
            until = time.monotonic() + seconds
            # A guest that is paused cannot react, and one that has shut down while qemu stays has reacted.
            while (left := until - time.monotonic()) > 0 and self._monitor.status() == "running":
                self._monitor.power_down()
                if self._ends_within(min(left, PRESS_SECONDS)):
                    return Ending.SHUT_DOWN
            self._monitor.quit()
            if self._ends_within(QUIT_SECONDS):
                return Ending.QUIT
        except UnreachableError:
            # It may be on its way out, having closed its monitor already.
            if self._ends_within(0.5):
                return Ending.SHUT_DOWN
        self._kill()
        return Ending.KILLED

    def pid(self) -> int | None:
        """Of its process."""
        process = self.process()
        return int(process["pid"]) if process is not None else None

    def _kill(self) -> None:
        """The recorded process, and whatever else carries its token: never a process that merely has its number."""
        until = time.monotonic() + KILL_SECONDS
        while time.monotonic() < until:
            for process in [*self._processes(), *([self._process] if self._process is not None else [])]:
                system.signal_process(process, signal.SIGKILL)
            if self._ends_within(0.2):
                return
        raise UnreachableError(f"the guest's process does not end although it was killed; see {self._state_dir}")

    def _ends_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def _processes(self) -> list[Mapping[str, Any]]:
        """Those that carry the token, the one that was started first."""
        found = [identity for identity in map(_identity, filter(str.isdecimal, os.listdir("/proc"))) if identity]
        mine = [identity for identity in found if self._carries_token(int(identity["pid"]))]
        return sorted(
            mine, key=lambda identity: (not _leads_a_session(int(identity["pid"])), identity["process_start"])
        )

    def _carries_token(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                return f"{TOKEN_VARIABLE}={self._token}".encode() in file.read().split(b"\0")
        except OSError:  # it has ended, or is another user's
            return False

    @property
    def _lock_path(self) -> str:
        return os.path.join(self._state_dir, "guest.lock")

    @contextlib.contextmanager
    def _lock(self, seconds: float = 0.0) -> Iterator[int | None]:
        """The locked descriptor of `guest.lock`; None if it is held for longer. Let go at the end, unless it was handed
        down."""
        until = time.monotonic() + seconds
        fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not (had := _locked(fd)) and time.monotonic() < until:
                time.sleep(0.01)
            yield fd if had else None
        finally:
            os.close(fd)

    def _last_words(self) -> str:
        with contextlib.suppress(OSError), open(log_path(self._state_dir), "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _SAID))
            lines = log.read().decode(errors="replace").strip().splitlines()
            return lines[-1] if lines else "it said nothing"
        return "it said nothing"


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _identity(pid: str) -> Mapping[str, Any] | None:
    identity = system.process_identity(int(pid))
    return identity if identity["process_start"] is not None else None


def _leads_a_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except OSError:
        return False
