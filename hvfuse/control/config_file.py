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

KEPT_NAME = ".hvfuse.toml.applied"
"""Beside the file: its last text without fault, as `hvfuse run` took it over."""

_log = logging.getLogger(__name__)

_Seen = tuple[int, int, int] | None
"""By what a change is noticed: mtime (ns), size, inode; None: there is no file."""


def read(path: str) -> tuple[Config, bytes]:
    """The configuration in the file at `path`, and its text. Raises UsageError for what it holds, OSError if it cannot
    be read."""
    with open(path, "rb") as file:
        data = file.read()
    return parse(path, decoded(path, data)), data


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
        return read(os.path.join(root, CONFIG_NAME))[0]
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
    `uses_kept`: also for a process that begins with a faulty file, what another one read last and kept.
    """

    def __init__(self, root: str, *, uses_kept: bool = False, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._path = os.path.join(root, CONFIG_NAME)
        self._uses_kept = uses_kept
        self._keeps = False
        self._text = b""  # of `_config`
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
                self._config = self._read_first()
                self._read = self._seen = seen
                self._first_paths = self._told_paths = dict(self._config.paths)
            elif seen != self._read and self._is_settled(seen):
                self._config = self._read_again(self._config, seen)
            return self._config

    def keep(self) -> None:
        """Keep what applies now, and each change of it, for processes that begin while the file is faulty. Raises as
        `current`."""
        self.current()
        with self._guard:
            self._keeps = True
            self._keep()

    def _keep(self) -> None:
        from hvfuse import system

        try:
            system.replace_file("config:keep", os.path.join(self._root, KEPT_NAME), self._text, mode=0o644)
        except OSError as error:  # nothing of what runs needs it
            _log.warning("%s: %s", error.filename or self._root, error.strerror)

    def _read_first(self) -> Config:
        try:
            found, self._text = read(self._path)
            return found
        except FileNotFoundError:
            return Config()
        except UsageError as error:
            error.hint = error.hint or "mend that line; hvfuse policy check proves the file"
            if not self._uses_kept:
                raise
            try:
                kept, self._text = read(os.path.join(self._root, KEPT_NAME))
            except (UsageError, OSError):
                raise error from None
            self._fault = str(error)
            return kept

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
        found, text, fault = None, b"", ""
        try:
            found, text = read(self._path)
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
        self._fault, self._text = None, text
        if self._keeps:
            self._keep()
        _log.info("%s was read again", self._path)
        if found.paths not in (self._first_paths, self._told_paths):
            _log.warning("%s: a change of [paths] takes effect with the next `hvfuse run`", self._path)
        self._told_paths = dict(found.paths)
        return found
