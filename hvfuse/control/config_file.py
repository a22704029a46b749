"""The configuration file: read, and read again when it has changed.

A change takes effect without a restart. Nobody is told of it: who needs the configuration asks for it each time, which
costs one `stat` as long as the file stays the same.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from hvfuse.control.config import TEMPLATE, Config
from hvfuse.control.config_text import parse
from hvfuse.control.home import CONFIG_NAME
from hvfuse.errors import UsageError

SETTLED_SECONDS = 1.0
"""So long a changed file has to stay as it is before it is read. An editor that empties a file and fills it again must
not be taken at its word in between: with the default retention, recovery points would go."""

_log = logging.getLogger(__name__)

_Seen = tuple[int, int, int] | None
"""By what a change is noticed: mtime (ns), size, inode; None: there is no file."""


def read(path: str) -> Config:
    """The configuration in the file at `path`. Raises UsageError for what it holds, OSError if it cannot be read."""
    with open(path, "rb") as file:
        data = file.read()
    return parse(path, decoded(path, data))


def decoded(path: str, data: bytes) -> str:
    """The file's text. Raises UsageError naming the line that is none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: this is not UTF-8 text") from None


def load(root: str) -> Config:
    """The configuration of the home at `root`; all defaults if it has no file yet. Raises as `read`."""
    try:
        return read(os.path.join(root, CONFIG_NAME))
    except FileNotFoundError:
        return Config()


def write_template(root: str) -> None:
    """Write the commented configuration if the home has none. Raises OSError."""
    path = os.path.join(root, CONFIG_NAME)
    if not os.path.exists(path):
        from hvfuse import system  # brings numpy, which most commands can do without

        system.replace_file("config:template", path, TEMPLATE.encode(), mode=0o644)


class ConfigFile:
    """The configuration of the home at `root` as it is now. For any thread.

    A file that turns out faulty, or that goes, changes nothing: what was read last still applies, and `fault` says so.
    """

    def __init__(self, root: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._path = os.path.join(root, CONFIG_NAME)
        self._monotonic = monotonic
        self._guard = threading.Lock()  # of all below: two threads that read at once could go back to the older text
        self._config: Config | None = None
        self._first_paths: dict[str, str] = {}
        self._told_paths: dict[str, str] = {}
        self._read: _Seen = None  # of what was read last, faulty or not
        self._seen: _Seen = None
        self._seen_at = 0.0
        self._fault: str | None = None

    @property
    def fault(self) -> str | None:
        """Why the file as it is now is not what applies, with its line; None if it is."""
        return self._fault

    def current(self) -> Config:
        """What applies now. Raises UsageError, OSError only as long as the file was never read without fault."""
        with self._guard:
            seen = self._look()
            if self._config is None:
                self._config = load(self._root)
                self._read = self._seen = seen
                self._first_paths = self._told_paths = dict(self._config.paths)
            elif seen != self._read and self._is_settled(seen):
                self._config = self._read_again(self._config, seen)
            return self._config

    def _look(self) -> _Seen:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _is_settled(self, seen: _Seen) -> bool:
        now = self._monotonic()
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        return now - self._seen_at >= SETTLED_SECONDS

    def _read_again(self, before: Config, seen: _Seen) -> Config:
        """What applies now that the file has changed."""
        found, fault = None, ""
        try:
            found = read(self._path)
        except UsageError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{self._path}: {error.strerror}"
        if self._look() != seen:  # it changed while it was read: what was found is neither the one nor the other
            return before
        self._read = seen
        if found is None:
            self._fault = fault
            _log.warning("%s; what was read before still applies", fault)
            return before
        self._fault = None
        _log.info("%s was read again", self._path)
        if found.paths not in (self._first_paths, self._told_paths):
            _log.warning("%s: a change of [paths] takes effect with the next `hvfuse run`", self._path)
        self._told_paths = dict(found.paths)
        return found
