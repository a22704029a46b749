"""The configuration file `hvfuse.toml`: what it may hold, and its faults by name and line.

Every key has a default; TEMPLATE, which is written on first use, shows them all. A key or table that
is not known, or a value that does not fit, is refused, so that a misspelt policy cannot be taken for
the default one.
"""

from __future__ import annotations

import difflib
import os
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hvfuse.control import instants
from hvfuse.control.guest_settings import GuestSettings
from hvfuse.control.home import CONFIG_NAME, Home, name_fault
from hvfuse.errors import UsageError
from hvfuse.shipper.window import ALWAYS, Initial, Resync, Window
from hvfuse.target.retention import RetentionPolicy

TEMPLATE = """\
# Configuration of hvfuse. Every line that is commented out shows the default.
# A change takes effect when `hvfuse run` is started again.

[paths]                       # relative to the directory that holds this file
# disks = "disks"             # one folder for each VM, with its disks in it
# mnt = "mnt"                 # where the folders are mounted: let the guest use its disks here
# store = "store"             # the target store: replica images and the journal of recovery points
# state = "state"             # what the processes need to know across a restart

[replication]
# frequency = "30s"           # how often a recovery point is made: "1s" to "1h"
# compression = 1             # zstd level, 1 to 22; 0 = off
# soft_limit = 25             # percent of the disks' size in unsent logs: then they are compacted
# hard_limit = 50             # then they are given up, and a resynchronisation compares what changed
# initial = "now"             # the first copy of the disks: "now", at a time at most 7 days ahead such as
                              # "2026-11-22 18:30", or "seed": from a medium (`hvfuse seed`), not over the network
# resync = "auto"             # a resynchronisation that is needed begins by itself; "manual": when it is asked
                              # for with `hvfuse resync VM`; until then, no recovery points are made
# resync_window = "18:30-06:00" # when one of everything, or of much, may begin by itself (local time);
                              # "always": at once, as one of a quarter of the disks or 1 GiB always does
# app_consistent = "0s"       # how often a point is made with the guest standing still, its file systems clean: up
                              # to "12h"; "0s": never. It takes a [vm.NAME.guest]
# digest = "xxh3"             # how blocks are compared: "xxh3" is fast; "blake3" cannot be fooled by a guest
                              # that chooses what it writes

[retention]                   # which recovery points are kept
# keep_all = "1h"             # every one for so long
# hourly = 24                 # then one an hour, for so many hours
# daily = 0                   # then one a day, for so many days

# [vm.web01]                  # anything of the two tables above, for one VM only, and:
# frequency = "5m"
# exclude = ["swap.vhd"]      # disks that are not replicated

# [vm.web01.guest]            # how the guest is made to stand still: by its qemu guest agent, behind this socket
# agent = "/run/qemu/web01.agent"
# freeze_timeout = 10         # seconds after which the guest is let go in any case
"""

Path = tuple[str, ...]
"""Where a value stands in the file: ("vm", "web01", "frequency")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmPolicy:
    """How one VM is replicated. `frequency`: seconds from cycle to cycle. `compression`: zstd level,
    0 = off. `soft_limit`, `hard_limit`: percent of the disks' size that logs may take before they are
    compacted or given up. `initial`: how the first copy begins. `resync`: when resynchronisations do.
    `digest`: by what blocks are compared. `exclude`: file names of disks that are not replicated. `app_consistent`:
    seconds from one application-consistent point to the next, 0 = off. `guest`: how the guest is frozen for it."""

    frequency: float = 30.0
    compression: int = 1
    soft_limit: int = 25
    hard_limit: int = 50
    initial: Initial = field(default_factory=Initial)
    resync: Resync = field(default_factory=Resync)
    digest: Literal["xxh3", "blake3"] = "xxh3"
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    exclude: frozenset[str] = frozenset()
    app_consistent: float = 0.0
    guest: GuestSettings | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The file's contents. `paths` as written; `default`: the policy of a VM that has no table."""

    paths: Mapping[str, str] = field(default_factory=dict)
    default: VmPolicy = field(default_factory=VmPolicy)
    vms: Mapping[str, VmPolicy] = field(default_factory=dict)

    def policy(self, vm: str) -> VmPolicy:
        """How `vm` is replicated."""
        return self.vms.get(vm, self.default)

    def home(self, root: str) -> Home:
        """The paths of the installation at the absolute path `root`."""
        return Home(
            root=root,
            **{key: os.path.abspath(os.path.join(root, self.paths.get(key, key))) for key in _PATHS},
        )


class _BadValueError(Exception):
    """A value does not fit; the text says what would."""


def _duration(low: float, high: float, span: str) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        match = re.fullmatch(r"(\d+)(s|m|h|d)", value) if isinstance(value, str) else None
        seconds = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else -1
        if not low <= seconds <= high:
            raise _BadValueError(f"a duration {span}")
        return float(seconds)

    return parse


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _BadValueError(f"a whole number from {low} to {high}")
        return value

    return parse


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _BadValueError("the path of a directory, in quotes")
    return value


def _names(value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name_fault(name) is None for name in value):
        raise _BadValueError('a list of disks\' file names, such as ["swap.vhd"]')
    return frozenset(value)


def _guest(value: Any) -> GuestSettings:
    known = ("agent", "freeze", "thaw", "freeze_timeout")
    wanted = 'a table with agent = "SOCKET", or with freeze = ["COMMAND", …] and thaw = ["COMMAND", …]'
    if not isinstance(value, dict) or not value.keys() <= set(known):
        raise _BadValueError(wanted)
    agent, timeout = value.get("agent"), value.get("freeze_timeout", 10)
    commands = [value.get(key, []) for key in ("freeze", "thaw")]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in commands):
        raise _BadValueError(wanted)
    if not isinstance(agent, str | None) or (isinstance(agent, str) and not os.path.isabs(agent)):
        raise _BadValueError(wanted)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= 60:
        raise _BadValueError("right: freeze_timeout is a number of seconds up to 60")
    settings = GuestSettings(agent, tuple(commands[0]), tuple(commands[1]), float(timeout))
    if settings.fault is not None:
        raise _BadValueError(f"right: {settings.fault}")
    return settings


def _one_of(*known: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in known:
            raise _BadValueError(" or ".join(f'"{one}"' for one in known))
        return str(value)

    return parse


def _window(value: Any) -> Window:
    match = re.fullmatch(rf"{_MINUTE}-{_MINUTE}", value) if isinstance(value, str) else None
    if value == "always":
        return ALWAYS
    minutes = [int(match[k]) * 60 + int(match[k + 1]) for k in (1, 3)] if match else [0, 0]
    if minutes[0] == minutes[1]:
        raise _BadValueError('"always" or two different times of the day, such as "18:30-06:00"')
    return Window(*minutes)


def _initial(value: Any) -> Initial:
    if value in ("now", "seed"):
        return Initial(how=value)
    at = instants.parse_date(value) if isinstance(value, str) and " " in value else None
    if at is None:
        raise _BadValueError('"now", "seed", or a local time such as "2026-11-22 18:30"')
    if instants.is_too_far(at, now_ns=time.time_ns()):
        raise _BadValueError(f"a time at most {instants.DAYS_AHEAD} days ahead")
    return Initial(at_ns=at)  # one that is over means now: the file stays as it is when it has come


_MINUTE = r"([01]\d|2[0-3]):([0-5]\d)"
_PATHS: Mapping[str, Callable[[Any], Any]] = dict.fromkeys(("disks", "mnt", "store", "state"), _path)
_REPLICATION: Mapping[str, Callable[[Any], Any]] = {
    "frequency": _duration(1, 3600, 'from "1s" to "1h", such as "30s" or "5m"'),
    "compression": _whole(0, 22),
    "soft_limit": _whole(1, 100_000),
    "hard_limit": _whole(1, 100_000),
    "initial": _initial,
    "resync": _one_of("auto", "manual"),
    "resync_window": _window,
    "digest": _one_of("xxh3", "blake3"),
    "app_consistent": _duration(0, 12 * 3600, 'from "0s" (off) to "12h", such as "1h"'),
}
_RETENTION: Mapping[str, Callable[[Any], Any]] = {
    "keep_all": _duration(0, 366 * 86400, 'from "0s" to "366d", such as "1h"'),
    "hourly": _whole(0, 8784),
    "daily": _whole(0, 3660),
}
_VM: Mapping[str, Callable[[Any], Any]] = {**_REPLICATION, **_RETENTION, "exclude": _names, "guest": _guest}
_TABLES: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "paths": _PATHS,
    "replication": _REPLICATION,
    "retention": _RETENTION,
}


class _Reader:
    """Reads one file's text. Raises UsageError "FILE:LINE: [table] key: what is wrong"."""

    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self._text = text

    def read(self) -> Config:
        try:
            document = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            raise self._syntax_error(str(error)) from None
        self._refuse_unknown((), document, (*_TABLES, "vm"))
        values = {name: self._table((name,), document.get(name, {}), keys) for name, keys in _TABLES.items()}
        default = _with_values(VmPolicy(), {**values["replication"], **values["retention"]})
        vms = {}
        for name, table in self._as_table(("vm",), document.get("vm", {})).items():
            fault = name_fault(name)
            if fault is not None:
                raise self._error(("vm", name), f"this cannot be a VM's name: it {fault}")
            vms[name] = _with_values(default, self._table(("vm", name), table, _VM))
        return Config(paths=values["paths"], default=default, vms=vms)

    def _table(self, path: Path, table: Any, keys: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
        self._refuse_unknown(path, self._as_table(path, table), keys)
        values = {}
        for key, value in table.items():
            try:
                values[key] = keys[key](value)
            except _BadValueError as error:
                raise self._error((*path, key), f"{_shown(value)} is not {error}") from None
        return values

    def _as_table(self, path: Path, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._error(path, f"this is a table: write [{path[-1]}] on a line of its own")
        return value

    def _refuse_unknown(self, path: Path, table: dict[str, Any], known: Iterable[str]) -> None:
        for key, value in table.items():
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                guess = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
                kind = "table" if isinstance(value, dict) else "key"
                raise self._error((*path, key), f"unknown {kind}; {guess}")

    def _error(self, path: Path, what: str) -> UsageError:
        table = f"[{'.'.join(path[:-1])}] " if len(path) > 1 else ""
        return UsageError(f"{self._path}:{self._line_of(path)}: {table}{path[-1]}: {what}")

    def _line_of(self, path: Path) -> int:
        """The first line after which the text so far holds `path`. Slow and exact: for errors only."""
        lines = self._text.splitlines()
        for count in range(1, len(lines) + 1):
            try:
                value: Any = tomllib.loads("\n".join(lines[:count]))
            except tomllib.TOMLDecodeError:  # within a value of several lines
                continue
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                return count
        return len(lines)

    def _syntax_error(self, message: str) -> UsageError:
        match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
        line = match[1] if match and match[1] else len(self._text.splitlines()) or 1
        return UsageError(f"{self._path}:{line}: {message[: match.start()] if match else message}")


def _shown(value: Any) -> str:
    """A value as the file's author would know it again."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return "a table" if isinstance(value, dict) else repr(value)


def _with_values(policy: VmPolicy, values: Mapping[str, Any]) -> VmPolicy:
    kept = {key: values[key] for key in _RETENTION if key in values}
    if "keep_all" in kept:
        kept["keep_all_seconds"] = int(kept.pop("keep_all"))
    resync = policy.resync
    if "resync" in values:
        resync = replace(resync, automatic=values["resync"] == "auto")
    if "resync_window" in values:
        resync = replace(resync, window=values["resync_window"])
    own = {key: value for key, value in values.items() if key not in (*_RETENTION, "resync", "resync_window")}
    return replace(policy, retention=replace(policy.retention, **kept), resync=resync, **own)


def parse(path: str, text: str) -> Config:
    """The configuration in `text`; `path` is what errors name. Raises UsageError."""
    return _Reader(path, text).read()


def load(root: str) -> Config:
    """The configuration of the home at `root`; all defaults if it has no file yet.

    Raises UsageError for what the file holds, OSError if it cannot be read.
    """
    path = os.path.join(root, CONFIG_NAME)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return Config()
    try:
        return parse(path, data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: this is not UTF-8 text") from None


def write_template(root: str) -> None:
    """Write the commented configuration if the home has none. Raises OSError."""
    path = os.path.join(root, CONFIG_NAME)
    if not os.path.exists(path):
        from hvfuse import system  # brings numpy, which most commands can do without

        system.replace_file("config:template", path, TEMPLATE.encode(), mode=0o644)
