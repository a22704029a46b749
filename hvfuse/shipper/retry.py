"""When the shipper acts next: the policy's interval, the ladder after a recoverable error, and which of the
operating system's refusals are that. Pure."""

from __future__ import annotations

import errno
import math

from hvfuse.errors import HvfuseError, NoSpaceError
from hvfuse.words import room_hint

LADDER = (60.0, 120.0, 240.0, 480.0, 600.0)
"""Seconds after the first failed attempt at which it is tried again."""
LAST_STEP = 1800.0
"""Seconds between attempts after the ladder's end."""


def next_attempt(elapsed: float) -> float:
    """When to try again, in seconds after the first failed attempt, `elapsed` seconds after it.

    Always later than `elapsed`, however many attempts there were and however long they took.
    """
    for step in LADDER:
        if step > elapsed:
            return step
    steps = math.floor((elapsed - LADDER[-1]) / LAST_STEP) + 1
    return LADDER[-1] + steps * LAST_STEP


def next_interval(due: float, finished: float, frequency: float) -> tuple[float, int]:
    """When the next cycle is due, and how many were missed meanwhile.

    The one due at `due` ended at `finished`; cycles are due every `frequency` seconds. After an
    overrun the next one begins at once, and the grid moves with it.
    """
    following = due + frequency
    if finished < following:
        return following, 0
    return finished, int((finished - due) // frequency)


_LASTING = (errno.EIO, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EROFS)


class RefusedError(HvfuseError):
    """The operating system refused something that it may grant later."""

    recoverable = True


def refusal(error: OSError, path: str | None = None) -> HvfuseError:
    """One of our errors for one of the operating system's, about the file at `path`.

    Want of descriptors or memory, a file that is being moved, a network file system that is away: all of it
    may be over soon, so it is tried again by the ladder. Not so a disk that fails to read, or what is not
    allowed: only an administrator can help there, and trying again would be asking a dying disk for more.
    """
    name = path or error.filename
    text = f"{name}: {error.strerror}" if name else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(text, hint=room_hint(name) if name else None)
    return HvfuseError(text) if error.errno in _LASTING else RefusedError(text)
