"""The configuration file: read, and read again when it has changed.

A change takes effect without a restart. Nobody is told of it: who needs the configuration asks for it each time, which
costs a `stat` or two as long as the file stays the same.

So do the definitions that were adopted here (`hvfuse.control.definition`): they lie beneath the file, and a change
of them is told by the time of the directory out of which they are put in place.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hvfuse.control import definition
from hvfuse.control.config import TEMPLATE, Config
from hvfuse.control.config_layers import with_definitions
from hvfuse.control.config_text import parse
from hvfuse.control.definition import Definition
from hvfuse.control.home import CONFIG_NAME, Home
from hvfuse.errors import HvfuseError, NotFoundError, UsageError

SETTLED_SECONDS = 1.0
"""So long a changed file has to stay as it is before it is read. An editor that empties a file and fills it again must
not be taken at its word in between: with the default retention, recovery points would go."""

KEPT_NAME = ".hvfuse.toml.applied"
"""Beside the file: its last text without fault, as `hvfuse run` took it over."""

_TICK_NS = 100_000_000
"""More than the times of files are coarse."""

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
    """The configuration of the home at `root`, with the definitions that were adopted there; all defaults if it has no
    file yet. Raises as `read`."""
    try:
        found, data = read(os.path.join(root, CONFIG_NAME))
    except FileNotFoundError:
        found, data = Config(), b""
    definitions, _ = adopted(found.home(root))
    return with_definitions(found, data.decode(), definitions).config


def adopted(home: Home) -> tuple[dict[str, tuple[str, Definition]], dict[str, str]]:
    """The definitions that were adopted on a home, with their paths, by VM; and of those that cannot be read, why."""
    found, faults = {}, {}
    for vm in definition.vms_with(home):
        path = definition.path_of(home, vm)
        try:
            found[vm] = path, definition.load(home, vm)
        except NotFoundError:
            continue  # it has gone meanwhile
        except HvfuseError as error:
            faults[vm] = f"{path}: {error}"
        except OSError as error:
            faults[vm] = f"{path}: {error.strerror}"
    return found, faults


@dataclass(frozen=True, slots=True)
class Applied:
    """What applies. `text`: of the file. `definitions`: those beneath it that are sound, by VM."""

    config: Config
    text: str
    definitions: Mapping[str, Definition]


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
        self._applied: Applied | None = None
        self._base: Config | None = None  # of the file, and what was beneath it, when `_applied` was made
        self._found: tuple[dict[str, tuple[str, Definition]], dict[str, str]] = ({}, {})
        self._adopted_at: int | None = None
        self._adopted_faults: Mapping[str, str] = {}

    @property
    def fault(self) -> str | None:
        """Why the file as it is now is not what applies, with its line, or an adopted definition is not; None if all
        is."""
        return self._fault or next(iter(self._adopted_faults.values()), None)

    def current(self) -> Config:
        """What applies now. Raises UsageError, OSError only as long as the file was never read without fault."""
        return self.applied().config

    def applied(self) -> Applied:
        """As `current`, and what it comes from. The same object as long as nothing changes."""
        with self._guard:
            config = self._current_file()
            home = replace(config, paths=self._first_paths).home(self._root)
            changed_at = _time_of(os.path.join(home.state, "vms"))
            # A second change within the clock's tick would not tell: what has just changed is looked at again.
            is_new = changed_at is not None and abs(time.time_ns() - changed_at) < _TICK_NS
            if self._applied is None or self._base is not config or is_new or changed_at != self._adopted_at:
                self._apply(config, *adopted(home))
                self._adopted_at = changed_at
            assert self._applied is not None
            return self._applied

    def _apply(self, config: Config, found: dict[str, tuple[str, Definition]], faults: dict[str, str]) -> None:
        """Lay definitions beneath the file."""
        if self._applied is not None and self._base is config and (found, faults) == self._found:
            return
        self._base, self._found = config, (found, faults)
        layers = with_definitions(config, self._text.decode(), found)
        faults = {**faults, **layers.faults}
        for vm, fault in faults.items():
            if self._adopted_faults.get(vm) != fault:
                _log.warning("%s; %s is as if it had no definition", fault, vm)
        for vm, keys in layers.unknown.items():
            _log.info("%s: its definition says %s, which a newer hvfuse knows", vm, ", ".join(keys))
        self._adopted_faults = faults
        sound = {vm: each for vm, (_, each) in found.items() if vm not in faults}
        self._applied = Applied(layers.config, self._text.decode(), sound)

    def _current_file(self) -> Config:
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


def _time_of(path: str) -> int | None:
    """When a directory changed, ns since 1970; None if there is none."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None
