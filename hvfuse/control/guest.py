"""A VM's guest, frozen by a guard process (`hvfuse.control.guest_guard`) for each time that it has to stand still."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from hvfuse.control.daemon import environment
from hvfuse.control.guest_guard import note_path, pack, proof_path
from hvfuse.control.guest_settings import GuestSettings
from hvfuse.shipper.guest import FreezeError, Stillness

START_SECONDS = 20.0
"""What a guard may take beyond the guest's own time, to start and to thaw what did not freeze in time."""
THAW_SECONDS = 15.0
"""What the shipper waits for a guest to thaw. The guard goes on trying."""

END_SECONDS = 1.0
"""For a guard that has said its last to end."""

_log = logging.getLogger(__name__)

_ENDED = {"event": "ended", "error": "the process that freezes the guest has ended"}
_SILENT = {"event": "silent", "error": "the process that freezes the guest does not answer"}


class GuardedGuest:
    """The guest of `vm`. `directory`: where what stands of a freeze is kept, made at need. `settings`: what they
    are at the moment; None where nothing says how to freeze it, and yet an earlier freeze may have been left.
    """

    def __init__(self, vm: str, settings: Callable[[], GuestSettings | None], directory: str) -> None:
        self._vm = vm
        self._settings = settings
        self._directory = directory
        self._stuck: str | None = None

    @contextmanager
    def frozen(self) -> Iterator[Stillness]:
        """See `Guest.frozen`."""
        settings = self._settings()
        if settings is None or settings.fault is not None:
            why = settings.fault if settings is not None else "nothing says how to freeze the guest"
            raise FreezeError(f"[vm.{self._vm}.guest]: {why}", hint="see docs/guests.md")
        self.thaw_leftover()
        if self.stuck() is not None:
            raise FreezeError(f"an earlier freeze of the guest has not ended: {self._stuck}")
        stillness = Stillness(proof_path(self._directory))
        with closing(self._start(pack(self._vm, settings))) as guard:
            try:
                said = self._listen(guard, settings.freeze_timeout + START_SECONDS)
                if said["event"] != "frozen":
                    raise FreezeError(str(said.get("error")))
                yield stillness
            finally:
                guard.let_go()
                self._see_off(guard, stillness)

    def thaw_leftover(self) -> None:
        """See `Guest.thaw_leftover`."""
        if not os.path.exists(note_path(self._directory)):
            return
        _log.warning("%s: the guest was left frozen, or as good as; thawing it", self._vm)
        try:
            with closing(self._start()) as guard:
                said = self._listen(guard, THAW_SECONDS)
        except FreezeError as error:
            said = {"event": "failed", "error": str(error)}
        if said["event"] == "thawed":
            _log.warning("%s: the guest moves again", self._vm)
        else:
            self._stuck = self._stuck or str(said.get("error"))

    def stuck(self) -> str | None:
        """See `Guest.stuck`."""
        if not os.path.exists(note_path(self._directory)):
            self._stuck = None
        return self._stuck

    def _start(self, *settings: str) -> _Guard:
        """Raises FreezeError."""
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            return _Guard(self._directory, *settings)
        except OSError as error:
            raise FreezeError(f"the process that freezes the guest cannot be started: {error.strerror}") from None

    def _listen(self, guard: _Guard, seconds: float) -> dict[str, Any]:
        """What comes of a freeze, or of a thaw; if the guest could not be thawed so far, that is kept. One that did not
        freeze and cannot be thawed is not waited for: the guard goes on trying."""
        until = time.monotonic() + seconds
        failure: str | None = None
        while True:
            said = guard.next(until - time.monotonic())
            if said["event"] == "failing":
                failure = str(said["error"])
            elif said["event"] == "stuck":
                self._stuck = str(said.get("error"))
                if failure is not None:
                    return {"event": "failed", "error": failure}
            else:
                return said

    def _see_off(self, guard: _Guard, stillness: Stillness) -> None:
        """Wait until the guest moves, and note how long it stood."""
        said = self._listen(guard, THAW_SECONDS)
        stillness.seconds = float(said.get("seconds", guard.age))
        stillness.broken = said.get("broken")
        if said is _ENDED and os.path.exists(note_path(self._directory)):
            self.thaw_leftover()
            stillness.seconds = guard.age
        if self.stuck() is not None:
            _log.error("%s: THE GUEST MAY STAND STILL: it could not be thawed: %s", self._vm, self._stuck)


class _Guard:
    """A guard process and what it says."""

    def __init__(self, *arguments: str) -> None:
        self._began = time.monotonic()
        self._said = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hvfuse", "_guard", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env=environment(),
        )

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._began

    def let_go(self) -> None:
        """Tell it to thaw the guest."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        """Listen no more. One that still tries to thaw lives on, and thaws whatever happens here."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)

    def next(self, seconds: float) -> dict[str, Any]:
        """What it says next; `_ENDED` or `_SILENT` if there is nothing within that time."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while b"\n" not in self._said:
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                return _SILENT
            more = os.read(fd, 1 << 16)
            if not more:
                self._process.wait()
                return _ENDED
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        said = json.loads(line)
        assert isinstance(said, dict)
        return said
