"""A lock that two sides take in turns, one of which goes first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOOK_AGAIN = 0.0002
"""Seconds."""


class Turns:
    """`with turns:` is for one thread, which goes first; `with turns.behind():` for one other.

    `threading.Lock` is not fair: whoever lets it go and takes it again at once may keep the other out for as long as
    it likes. Here whoever is behind does not begin while the first waits, so the first never waits for more than the
    one turn that is under way. Not to be taken twice by one thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first_waits = False
        self.taken = 0
        """How often the first has had its turn."""

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._first_waits = True
            self._lock.acquire()
            self._first_waits = False
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextmanager
    def behind(self) -> Iterator[None]:
        """A turn of the side that lets the other go first."""
        while self._first_waits:
            time.sleep(_LOOK_AGAIN)
        with self._lock:
            yield
