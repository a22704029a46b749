"""The process that freezes a guest and thaws it again, whatever becomes of the shipper that asked for it.

A guest that nobody thaws stands still for good, so the one who thaws must depend on nobody. The guard is started
for one freeze, in a session of its own. It lets the guest go when its standard input ends or has anything to be read,
so also when the shipper dies, when `freeze_timeout` has passed, or at SIGTERM. On standard output it says, a JSON
object a line:

    {"event": "frozen"}
    {"event": "failed", "error": TEXT}                        the guest was not frozen, or is not any more
    {"event": "stuck", "error": TEXT}                         it could not be thawed; that is tried again
    {"event": "thawed", "seconds": NUMBER, "broken": TEXT|null}
                                                              since the freezing began; broken: why it had moved before

What stands of a freeze lies in a directory of the VM:

    note    JSON: whom to thaw and how. Durable before the guest is asked to freeze, removed once it moves again. If the
            guard dies too, the next one to look finds it
    proof   there as long as the guest certainly stands still: made once it does, removed before it is let go
    lock    held by the guard
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Protocol

from hvfuse import system
from hvfuse.control.guest_settings import GuestSettings
from hvfuse.errors import CorruptError
from hvfuse.shipper.guest import FreezeError, GoneError

THAW_SECONDS = 5.0
"""What one attempt to thaw may take."""
THAW_FOR = 600.0
"""Seconds for which it is tried; then the note is left to the next start, or the next freeze."""
LONGEST_PAUSE = 5.0
LOCK_SECONDS = 5.0
"""How long a guard that has only to thaw waits for the one that froze, which may be just doing it."""

_log = logging.getLogger(__name__)


class Freezer(Protocol):
    """A way to freeze a guest. All raise FreezeError."""

    may_be_frozen: bool
    """Whether it takes a thaw to be sure that the guest moves."""

    def freeze(self, seconds: float) -> None:
        """Freeze the guest within that time."""

    def thaw(self, seconds: float) -> bool:
        """Thaw it within that time. Returns whether it had still been frozen."""


def note_path(directory: str) -> str:
    """Where it is noted that a guest may be frozen."""
    return os.path.join(directory, "note")


def proof_path(directory: str) -> str:
    """What is there as long as the guest certainly stands still."""
    return os.path.join(directory, "proof")


def pack(vm: str, settings: GuestSettings) -> str:
    """Whom to freeze and how, as the guard is told, and as the note keeps it."""
    return json.dumps({"vm": vm, **asdict(settings)})


def _unpack(text: str) -> tuple[Freezer, float]:
    """Returns the way to freeze and the seconds after which the guest is let go. Raises CorruptError."""
    from hvfuse.control.guest_agent import AgentFreezer  # the shipper, which has to know our files, can do without
    from hvfuse.control.guest_hooks import HookFreezer

    try:
        fields = json.loads(text)
        vm, limit = str(fields["vm"]), float(fields["freeze_timeout"])
        if fields["agent"] is not None:
            return AgentFreezer(str(fields["agent"])), limit
        return HookFreezer(vm, [*map(str, fields["freeze"])], [*map(str, fields["thaw"])]), limit
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"the note of a frozen guest makes no sense: {error!r}") from None


@contextmanager
def told_to_end() -> Iterator[int]:
    """A descriptor that can be read from once SIGTERM came. What a terminal sends does not reach the guest."""
    ended, end = os.pipe()
    os.set_blocking(end, False)

    def note(_number: int, _frame: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(end, b"!")

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, note)
    yield ended


def hold(directory: str, told: str, ended: int) -> None:
    """Freeze the guest that `told` (`pack`) names, and thaw it when it is time. `ended`: see `told_to_end`."""
    freezer, limit = _unpack(told)
    with system.exclusive_lock(os.path.join(directory, "lock")) as had:
        if not had:
            _say("failed", error="an earlier freeze of the guest has not ended yet")
            return
        _remove(proof_path(directory))
        try:
            system.replace_file("guest:note", note_path(directory), told.encode())
        except OSError as error:
            _say("failed", error=f"{note_path(directory)}: {error.strerror}")
            return
        began = time.monotonic()
        failure = "the guard failed"
        is_frozen = False
        try:
            freezer.freeze(limit)
            is_frozen = True
            os.close(os.open(proof_path(directory), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            _say("frozen")
            _wait(began + limit - time.monotonic(), ended)
        except (FreezeError, OSError) as error:
            failure, is_frozen = str(error), False
            _say("failing", error=failure)  # to thaw it may take long
        finally:
            _remove(proof_path(directory))
            broken = _let_go(directory, freezer)
        if is_frozen:
            _say("thawed", seconds=time.monotonic() - began, broken=broken)
        else:
            _say("failed", error=failure)


def thaw_leftover(directory: str) -> None:
    """Thaw whom the note tells of, if there is one; says "thawed"."""
    began = time.monotonic()
    while time.monotonic() < began + LOCK_SECONDS:
        with system.exclusive_lock(os.path.join(directory, "lock")) as had:
            if had:
                _thaw_noted(directory)
                _say("thawed", seconds=time.monotonic() - began, broken=None)
                return
        time.sleep(0.05)
    _say("stuck", error="the process that froze the guest is still trying to thaw it")


def _thaw_noted(directory: str) -> None:
    _remove(proof_path(directory))
    try:
        with open(note_path(directory), encoding="utf-8") as file:
            freezer, _ = _unpack(file.read())
    except FileNotFoundError:
        return
    freezer.may_be_frozen = True
    _let_go(directory, freezer)


def _let_go(directory: str, freezer: Freezer) -> str | None:
    """Thaw until it is done, or THAW_FOR has passed, and the note stays. Returns why the guest had moved before."""
    pause, until, failures = 0.1, time.monotonic() + THAW_FOR, 0
    was_frozen = True
    while freezer.may_be_frozen:
        try:
            was_frozen = freezer.thaw(THAW_SECONDS)
        except GoneError as error:
            _log.warning("%s: there is nothing to thaw any more", error)
            break
        except FreezeError as error:
            failures += 1
            _log.warning("the guest could not be thawed: %s", error)
            _say("stuck", error=str(error))
            if time.monotonic() >= until:
                return None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
    _remove(note_path(directory))
    # After a failure, it may have been the attempt before that thawed.
    return None if was_frozen or failures else "the guest had thawed by itself"


def _wait(seconds: float, ended: int) -> None:
    """Wait until whoever asked for the freeze says anything or ends, SIGTERM comes, or the time has passed."""
    poll = select.poll()
    for fd in (sys.stdin.fileno(), ended):
        poll.register(fd, select.POLLIN)
    poll.poll(max(0.0, seconds) * 1000)


def _say(event: str, **fields: object) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(sys.stdout.fileno(), json.dumps({"event": event, **fields}).encode() + b"\n")


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        system.unlink("guest:remove", path, missing_ok=True)
