"""When the shipper acts next: the policy's interval, and the ladder after a recoverable error. Pure."""

from __future__ import annotations

import math

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
