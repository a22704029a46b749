"""What must be so before a VM can be protected: named checks, each of which says what it found and what mends it.

All are made, whatever one of them finds: an administrator wants to know everything at once. A check passes with a
text, or raises: what it raises is why it failed; `_WarningError`, `_SkippedError`: it stands in nobody's way.

    name              fails for
    VM name           a name that no VM can have
    disks             no folder, no disk in it
    disk structures   a disk that is damaged, of a foreign format, or whose parent is not there
    other ways in     a hard link, a program that has a disk open for writing
    machine           no root, no /dev/fuse, no libfuse 3
    room for logs     less room beside the disks than the soft limit lets logs take; a warning below the hard limit
    target            a store that cannot be opened, or lies where it is not safe
    room at target    less room than the first copy takes; a warning where it is tight
    protection        a VM that is protected already
    replica           a replica of other disks under this name, or one that was failed over or is half deleted
    clock             nothing; a warning for a clock that was set back
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hvfuse import spool, system
from hvfuse.control.home import check_vm_name
from hvfuse.control.instants import instant_text
from hvfuse.control.site import Site
from hvfuse.control.supervisor import require_mountable
from hvfuse.errors import (
    BusyError,
    CorruptError,
    HvfuseError,
    NoSpaceError,
    NotFoundError,
    PrerequisiteError,
    StateError,
    UnsupportedError,
    UsageError,
)
from hvfuse.formats import tracking
from hvfuse.formats.image import ImageInfo, is_disk_name, probe_for_tracking
from hvfuse.shipper.retry import refusal
from hvfuse.states import AFTER_FAILOVER, ReplicationState, allowed_commands
from hvfuse.target import relation
from hvfuse.target.schema import UNKNOWN_DISK, VmRecord
from hvfuse.tracker.ways_in import refuse_other_ways_in
from hvfuse.words import bytes_text

TIGHT = 0.8
"""Part of what is allocated of the disks: with less room than that, a first copy is not begun."""
LEAST_LOGS = 8 << 20
"""Bytes that logs may take however small the disks are (`hvfuse.tracker.budget`)."""
_FIRST_YEAR_NS = 1_577_836_800 * 10**9
"""2020: a clock that stands before it was never set."""


class Outcome(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    WARNED = "warned"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A check that was made. `text`: what was found, or why it was skipped. `next_command`: what mends it. `error`: why
    it failed."""

    name: str
    outcome: Outcome
    text: str
    next_command: str | None = None
    error: HvfuseError | None = None

    def as_json(self) -> dict[str, object]:
        """The fields but the error, with its class's name."""
        kind = type(self.error).__name__ if self.error is not None else None
        fields = {"name": self.name, "outcome": self.outcome.value, "text": self.text}
        return {**fields, "next_command": self.next_command, "error": kind}


class _WarningError(Exception):
    """It is no hindrance, but somebody should know."""

    def __init__(self, text: str, next_command: str | None = None) -> None:
        super().__init__(text)
        self.next_command = next_command


class _SkippedError(Exception):
    """It cannot be checked, or need not be; the text says why."""


def make_checks(
    site: Site,
    *,
    begin: Callable[[str], None] = lambda name: None,
    made: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Make all checks, in order; `begin` is told the name of each before, `made` how it ended. Raises nothing that a
    check can find."""
    found = []
    for name, check in _CHECKS.items():
        begin(name)
        found.append(_made(name, check, site))
        made(found[-1])
    return found


def names() -> tuple[str, ...]:
    """The names of all checks, in order."""
    return tuple(_CHECKS)


def demand(site: Site, checks: Sequence[Check]) -> None:
    """Raises what failed: the error itself if it is one, PrerequisiteError if there are several."""
    failed = [check for check in checks if check.error is not None]
    if len(failed) == 1 and failed[0].error is not None:
        raise failed[0].error
    if failed:
        told = "; ".join(f"{check.name}: {check.text}" for check in failed)
        raise PrerequisiteError(
            f"{site.vm}: {len(failed)} of {len(checks)} prerequisites are missing: {told}",
            hint=next((check.next_command for check in failed if check.next_command), None),
        )


def _made(name: str, check: Callable[[Site], str], site: Site) -> Check:
    try:
        return Check(name=name, outcome=Outcome.PASSED, text=check(site))
    except _WarningError as warning:
        return Check(name=name, outcome=Outcome.WARNED, text=str(warning), next_command=warning.next_command)
    except _SkippedError as skipped:
        return Check(name=name, outcome=Outcome.SKIPPED, text=str(skipped))
    except OSError as error:
        return _failed(name, refusal(error))
    except HvfuseError as error:
        return _failed(name, error)


def _failed(name: str, error: HvfuseError) -> Check:
    return Check(name=name, outcome=Outcome.FAILED, text=str(error), next_command=error.hint, error=error)


# The source ---------------------------------------------------------------------------------------------------


def _name(site: Site) -> str:
    return check_vm_name(site.vm)


def _folder(site: Site) -> str:
    try:
        folder = site.home.folder(site.vm)
    except UsageError:
        raise _SkippedError("no VM has such a name") from None
    if not os.path.isdir(folder):
        raise NotFoundError(
            f"there is no VM {site.vm}: no directory {folder}", hint=f"put its disks into a folder of its own: {folder}"
        )
    disks = _disks(site)
    if not disks:
        raise NotFoundError(
            f"{folder}: no disk (.vhd, .vhdx, .raw or .img) in it that is to be replicated",
            hint="put its disks there; `exclude` in hvfuse.toml leaves disks out",
        )
    return ", ".join(disks)


def _disks(site: Site) -> list[str]:
    """The names of the disks that are to be replicated. Raises _SkippedError if there is no folder of them."""
    try:
        names = sorted(os.listdir(site.home.folder(site.vm)))
    except (OSError, UsageError):
        raise _SkippedError("there is no folder of it") from None
    folder = site.home.folder(site.vm)
    wanted = (name for name in names if is_disk_name(name) and name not in site.policy.exclude)
    return [name for name in wanted if os.path.isfile(os.path.join(folder, name))]


def _paths(site: Site) -> list[str]:
    """The paths of the disks. Raises _SkippedError if there are none."""
    found = [os.path.join(site.home.folder(site.vm), name) for name in _disks(site)]
    if not found:
        raise _SkippedError("there are no disks")
    return found


def _probed(site: Site) -> Iterator[ImageInfo]:
    """The disks that can be read. Raises _SkippedError if there are none."""
    readable = False
    for path in _paths(site):
        try:
            yield probe_for_tracking(path)
            readable = True
        except HvfuseError:
            continue
    if not readable:
        raise _SkippedError("no disk can be read")


def _structures(site: Site) -> str:
    formats = []
    for path in _paths(site):
        info = probe_for_tracking(path)
        parent = str(info.details.get("parent", "")).replace("\\", "/").rpartition("/")[2]
        if parent and not os.path.exists(os.path.join(os.path.dirname(path), parent)):
            raise CorruptError(f"{path}: its parent {parent} is not there", hint=f"put {parent} beside it")
        if info.damage and site.is_mounted:
            raise _WarningError(
                f"{path}: {info.damage[0]}; the guest may be at it just now", f"hvfuse disk check {path}"
            )
        if info.damage:
            raise CorruptError(f"{path}: {info.damage[0]}", hint=f"hvfuse disk check {path} --repair")
        formats.append(info.format.value)
    return ", ".join(formats)


def _ways_in(site: Site) -> str:
    for path in _paths(site):
        if not site.is_mounted:
            refuse_other_ways_in(path)
        elif os.stat(path).st_nlink > 1:
            raise UnsupportedError(
                f"{path}: has a hard link; what is written through the other name would not be logged",
                hint="remove the other name, or make it a copy",
            )
    return "the mount is the only one" if site.is_mounted else "none"


def _machine(site: Site) -> str:
    require_mountable()
    importlib.import_module("hvfuse.fuse")
    return "root, /dev/fuse, libfuse 3"


def _log_room(site: Site) -> str:
    size = sum(max(info.virtual_size or 0, info.file_size) for info in _probed(site))
    soft, hard = (max(LEAST_LOGS, size * part // 100) for part in (site.policy.soft_limit, site.policy.hard_limit))
    folder = site.home.folder(site.vm)
    free = _free(folder)
    text = f"{bytes_text(free)} are free beside the disks"
    if free < soft:
        raise NoSpaceError(
            f"{folder}: {text}; its logs may take {bytes_text(soft)} (soft_limit)",
            hint="make room, or lower soft_limit in hvfuse.toml",
        )
    if free < hard:
        raise _WarningError(
            f"{text}; logs may take {bytes_text(hard)} (hard_limit): they would be given up before that",
            "make room, or lower hard_limit in hvfuse.toml",
        )
    return f"{text}; logs may take {bytes_text(soft)}"


# The target ---------------------------------------------------------------------------------------------------


def _target(site: Site) -> str:
    with site.location.open(create=True) as store:
        return store.path


def _target_room(site: Site) -> str:
    record = _replica_record(site)
    if record is not None and record.position is not None:
        raise _SkippedError("the target has a replica: only what differs travels")
    needed = sum(_allocated(path) for path in _paths(site))
    free = _free(site.store_path)
    text = f"{bytes_text(free)} are free at the target; the first copy takes about {bytes_text(needed)}"
    if free < TIGHT * needed:
        raise NoSpaceError(f"{site.store_path}: {text}", hint="make room, or put the store elsewhere (target)")
    if free < needed:
        raise _WarningError(text, "make room at the target")
    return text


def _replica(site: Site) -> str:
    record = _replica_record(site)
    with site.location.open(read_only=True) as store, store.env.read() as txn:
        if record is None and store.half_deleted(txn, site.vm):
            raise BusyError(
                f"the replica that {site.vm} had is not wholly deleted yet",
                hint=f"hvfuse replication disable {site.vm} --delete-replica",
            )
        if record is None:
            return "none yet"
        state = relation.state(txn, store, record)
    if state in AFTER_FAILOVER:
        raise StateError(f"the replica of {site.vm} is {state}: it takes nothing in", hint="hvfuse store info")
    known = {disk.disk_id for disk in record.disks} - {UNKNOWN_DISK}
    names, own = {disk.name for disk in record.disks}, _tracked_ids(site)
    if record.position is not None and not known & own and not names & set(_disks(site)):
        raise UsageError(
            f"the store has a replica called {site.vm} already, of other disks: {', '.join(sorted(names))}",
            hint=f"give the folder another name; or delete that one: hvfuse replication disable {site.vm} "
            "--delete-replica",
        )
    if state in relation.SUSPENDED:
        raise _WarningError("it is suspended at the target", f"hvfuse replication resume {site.vm} --replica")
    if record.position is None:
        return "its first copy is not complete"
    return f"it stands at {record.position}: only what differs travels"


def _replica_record(site: Site) -> VmRecord | None:
    """What the store has of the VM. Raises _SkippedError if that cannot be told."""
    try:
        with site.location.open(read_only=True) as store, store.env.read() as txn:
            return store.find_vm(txn, site.vm)
    except (HvfuseError, OSError) as error:
        raise _SkippedError(f"the target cannot be asked: {error}") from None


def _tracked_ids(site: Site) -> set[bytes]:
    """The ids under which the disks were tracked before."""
    found = set()
    for path in _paths(site):
        state = os.path.join(os.path.dirname(path), spool.state_name(os.path.basename(path)))
        try:
            with open(state, "rb") as file:
                found.add(tracking.unpack_state(file.read(tracking.STATE_SIZE)).disk_id)
        except (OSError, HvfuseError):
            continue
    return found


# The relationship ---------------------------------------------------------------------------------------------


def _protection(site: Site) -> str:
    state = site.records.read(site.vm).state
    if state is not ReplicationState.DISABLED:
        allowed = ", ".join(allowed_commands(state))
        raise StateError(
            f"{site.vm} is protected already: it is {state}; allowed: {allowed}", hint=f"hvfuse status {site.vm}"
        )
    return "not protected"


def _clock(site: Site) -> str:
    now_ns, last_ns = site.clock.now_ns(), site.records.read(site.vm).last_replication_time_ns or 0
    if now_ns < max(last_ns, _FIRST_YEAR_NS):
        raise _WarningError(f"the clock says {instant_text(now_ns, now_ns=last_ns)}: it was set back", "date")
    return "it goes forward"


_CHECKS: dict[str, Callable[[Site], str]] = {
    "VM name": _name,
    "disks": _folder,
    "disk structures": _structures,
    "other ways in": _ways_in,
    "machine": _machine,
    "room for logs": _log_room,
    "target": _target,
    "room at target": _target_room,
    "protection": _protection,
    "replica": _replica,
    "clock": _clock,
}


def _free(path: str) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _allocated(path: str) -> int:
    """Bytes of a disk that a first copy has to put into its image: what is not a hole."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return sum(end - start for start, end in system.data_extents(fd, 0, os.fstat(fd).st_size))
    finally:
        os.close(fd)
