"""One process that serves a VM in the background, kept alive.

The process is a child in a session of its own, so that neither the terminal's Ctrl-C nor the death of
the supervisor reaches it: a tracker must go on serving its guest. A later supervisor adopts what still
lives, found by who listens at the process's socket.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import hvfuse
from hvfuse.control.home import Home
from hvfuse.errors import HvfuseError, UnreachableError
from hvfuse.system import Clock

STABLE_SECONDS = 60.0
"""A process that lived so long had started well: its death is the first in a row."""
LONGEST_DELAY = 60.0
LOG_LIMIT = 4 << 20
"""Bytes; a longer log is put aside (as .1) when its process starts again."""
_HINT = "  hint: "


@dataclass(slots=True)
class Restarts:
    """How long to wait before a dead process is started again: 1, 2, 4 … 60 seconds."""

    deaths: int = 0

    def delay_after(self, lived: float) -> float:
        """Note a death after `lived` seconds. Returns the seconds to wait."""
        if lived >= STABLE_SECONDS:
            self.deaths = 0
        self.deaths += 1
        return min(LONGEST_DELAY, 2.0 ** min(self.deaths - 1, 10))


def command(home: Home, *arguments: str) -> list[str]:
    """The command line that runs hvfuse itself for this home."""
    return [sys.executable, "-P", "-m", "hvfuse", "--home", home.root, *arguments]


def serving_pid(socket_path: str) -> int | None:
    """The pid of the process that listens at `socket_path`; None if none does.

    Does not wait for an answer: a process that is busy for long is there all the same. Raises
    UnreachableError when so many wait for it that it cannot even be asked.
    """
    folder, name = os.path.split(socket_path)
    try:
        directory = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(5)
            sock.connect(f"/proc/self/fd/{directory}/{name}")  # sun_path is short, the path may be long
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return int(struct.unpack("3i", credentials)[0])
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (BlockingIOError, TimeoutError):  # so many wait for an answer that no more are let in
        raise UnreachableError(
            f"the process behind {socket_path} is there, but does not answer", hint="try again in a moment"
        ) from None
    finally:
        os.close(directory)


class Daemon:
    """Starts `command` unless a process listens at `socket_path`, and again whenever it ends.

    `name` is what it is called in messages; `log_path` takes its output.
    """

    def __init__(self, name: str, command: Sequence[str], *, socket_path: str, log_path: str, clock: Clock) -> None:
        self.name = name
        self.socket_path = socket_path
        self.failure: HvfuseError | None = None
        """Why the process ended last; None once it is ready again."""
        self.has_ended_well = False
        """Whether the process ended last by itself, with exit code 0."""
        self._command = command
        self._log_path = log_path
        self._clock = clock
        self._restarts = Restarts()
        self._process: subprocess.Popen[bytes] | None = None
        self._pid_fd: int | None = None
        self._pid = 0
        self._ready = False
        self._started_at = 0.0
        self._due_at = 0.0
        self._log_start = 0

    @property
    def is_running(self) -> bool:
        """Whether a process is there, ready or not, as of the last `tick`."""
        return self._pid_fd is not None

    @property
    def is_ready(self) -> bool:
        """Whether the process has answered on its socket since it was started."""
        return self.is_running and self._ready

    @property
    def pid(self) -> int:
        """The process, while there is one."""
        return self._pid

    def tick(self) -> None:
        """Notice a death, start what is due, notice readiness. Called a few times a second."""
        self.check()
        if not self.is_running and self._clock.monotonic() >= self._due_at and not self.adopt():
            self._start()
        if self.is_running and not self._ready and self._serves():
            self._ready = True
            self.failure = None

    def adopt(self) -> bool:
        """Take over the process that listens at the socket, if there is one and none is held yet.

        Returns whether there is one. Raises UnreachableError if it cannot be asked who it is.
        """
        pid = serving_pid(self.socket_path)
        if pid is not None and not self.is_running:
            self._watch(pid)
        return pid is not None

    def _serves(self) -> bool:
        try:
            return serving_pid(self.socket_path) == self._pid
        except UnreachableError:  # then it is asked again
            return False

    def check(self) -> None:
        """Notice a death, without starting anything."""
        if self._pid_fd is None or not _has_ended(self._pid_fd):
            return
        code = self._process.wait() if self._process is not None else None
        os.close(self._pid_fd)
        self._process = self._pid_fd = None
        self._ready = False
        self.failure = self._failure(code)
        self.has_ended_well = code == 0
        now = self._clock.monotonic()
        self._due_at = now + self._restarts.delay_after(now - self._started_at)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it lives."""
        if self._pid_fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pid_fd, number)

    def _start(self) -> None:
        rotate_log(self._log_path)
        with open(self._log_path, "ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment(),
            )
        self._watch(self._process.pid)

    def _watch(self, pid: int) -> None:
        try:
            self._pid_fd = os.pidfd_open(pid)
        except ProcessLookupError:  # it answered, and ended before we could hold on to it
            return
        self._pid = pid
        self._ready = self.has_ended_well = False
        self._started_at = self._clock.monotonic()

    def _failure(self, code: int | None) -> HvfuseError:
        """What the process said last, as the error that its exit code names, or else how it ended."""
        kinds = {kind.exit_code: kind for kind in HvfuseError.__subclasses__() if kind.__init__ is HvfuseError.__init__}
        kind = kinds.get(code or 0, HvfuseError)
        lines = self._said()
        for at in reversed(range(len(lines))):
            if lines[at].startswith("hvfuse: "):
                hint = (
                    lines[at + 1].removeprefix(_HINT) if lines[at + 1 :] and lines[at + 1].startswith(_HINT) else None
                )
                return kind(lines[at].removeprefix("hvfuse: "), hint=hint)
        if code is not None and code < 0:
            return kind(f"the {self.name} was killed by {signal.Signals(-code).name}", hint=f"tail {self._log_path}")
        exit_text = f" with exit code {code}" if code is not None else ""
        return kind(f"the {self.name} ended{exit_text}", hint=f"tail {self._log_path}")

    def _said(self) -> list[str]:
        try:
            with open(self._log_path, "rb") as log:
                log.seek(self._log_start)
                return log.read(1 << 16).decode(errors="replace").splitlines()
        except OSError:
            return []


def start_and_wait(daemon: Daemon, *, clock: Clock, seconds: float = 30.0) -> None:
    """Start the process once and wait until it answers.

    Raises the error that it ended with, or UnreachableError when it stays silent.
    """
    deadline = clock.monotonic() + seconds
    while clock.monotonic() < deadline:
        daemon.tick()
        if daemon.is_ready:
            return
        if not daemon.is_running:
            raise daemon.failure or UnreachableError(f"the {daemon.name} ended")
        clock.sleep(0.02)
    raise UnreachableError(f"the {daemon.name} does not answer at {daemon.socket_path} after {seconds:.0f} s")


def wait_for_end(pid: int, seconds: float) -> bool:
    """Wait until the process `pid` is gone. Returns whether it is."""
    try:
        pid_fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return _has_ended(pid_fd, seconds)
    finally:
        os.close(pid_fd)


def _has_ended(pid_fd: int, seconds: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(pid_fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def rotate_log(path: str) -> None:
    """Put a log that has grown too long aside."""
    try:
        if os.stat(path).st_size > LOG_LIMIT:
            os.replace(path, f"{path}.1")
    except FileNotFoundError:
        pass


def environment() -> dict[str, str]:
    """Ours, with the package findable from any directory."""
    top = os.path.dirname(os.path.dirname(os.path.abspath(hvfuse.__file__)))
    return {**os.environ, "PYTHONPATH": top}
