"""When a new VM folder may be taken up: not while somebody still copies disks into it.

A disk that is tracked half-way through its copy would go on changing below the mount, unlogged. So a
folder has to stand still first. Nothing tells a copy that has stalled from one that is complete; moving a
complete folder in is the way that never errs.
"""

from __future__ import annotations

import os

from hvfuse import spool
from hvfuse.control.home import Home
from hvfuse.system import Clock

STILL_SECONDS = 3.0
"""So long names, sizes and mtimes in a folder must not have changed."""

_Contents = frozenset[tuple[str, int, int]]
"""(name, bytes, mtime in ns) of everything in a folder but what hvfuse serves a failed-over VM from."""


class Arrivals:
    """Watches folders that are not taken up yet. Single-threaded."""

    def __init__(self, home: Home, *, clock: Clock) -> None:
        self._home = home
        self._clock = clock
        self._seen: dict[str, tuple[_Contents, float]] = {}

    def is_settled(self, vm: str, *, at_start: bool) -> bool:
        """Whether the folder of `vm` has stood still long enough, as observed by the calls so far.

        `at_start`: mtimes of the past are as good as observation, as nobody could observe before.
        """
        contents = self._contents(vm)
        if contents is None:
            return False
        now = self._clock.monotonic()
        newest = max((mtime_ns for _, _, mtime_ns in contents), default=0)
        if at_start and self._clock.now_ns() - newest > STILL_SECONDS * 1e9:
            return True
        before, since = self._seen.get(vm, (None, now))
        if contents != before:
            since = now
        self._seen[vm] = (contents, since)
        return now - since >= STILL_SECONDS

    def _contents(self, vm: str) -> _Contents | None:
        """What the folder holds; None if that changes while it is read."""
        try:
            with os.scandir(self._home.folder(vm)) as entries:
                found = [(entry.name, entry.stat()) for entry in entries if entry.name != spool.FAILOVER]
        except OSError:
            return None
        return frozenset((name, status.st_size, status.st_mtime_ns) for name, status in found)
