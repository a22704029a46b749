"""The files that pass from the tracker to the shipper, beside each disk in the VM's folder.

    DISK.0000000017.hrl    the log with serial 17: active, standby or sealed
    DISK.0000000017.hrc    its companion index; there only once the log is sealed
    DISK.0000000017.c.hrl  a compacted log: what that log and some before it come to, newest write wins
    DISK.spare0.hrl        an acknowledged log that waits to be overwritten by a coming one
    DISK.hvt               the tracking state
    DISK.hvt0, DISK.hvt1   the index maps of the active log and of the one being sealed or standing by

Beside them, a folder in which no disk is tracked yet:

    .failover/             what a failed-over VM is served from (`hvfuse.target.standing`)

These names are reserved: the mount neither shows nor accepts them.

A cycle is whole when as many sealed logs carry its (generation, cycle) as each of them says that
there are (`disk_count`). Releasing a log removes the companion first: a log without a companion that
is not in use by the tracker is rubbish, never data.

While the target is away, the shipper may replace whole cycles by one compacted log for each disk. The
companion says which of the two logs of its serial it describes (its flag "compacted"); the other one is
rubbish. Companions are replaced by renaming, disk by disk, and what they replaced is released only
afterwards. So a death in between leaves cycles that overlap: one disk's log of a cycle may go back further
than another's, and cycles that it stands for may still be there, wholly or in part. All of that can be
shipped: a compacted log gives the same disk on any of the states that it went through.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvfuse import system
from hvfuse.consistency import Consistency
from hvfuse.errors import CorruptError, HvfuseError
from hvfuse.formats import companion
from hvfuse.formats.companion import CompanionHeader, Entries

SPARES_KEPT = 2
"""Logs that a disk keeps for overwriting: one active and one standby may be wanted at once."""
SPARE_SIZE = 1 << 30
"""Bytes; what a longer spare is cut to."""

FAILOVER = ".failover"

_RESERVED = re.compile(
    rb"^(?P<disk>.+)\.(?:\d{10}(?:\.c)?\.hrl|\d{10}\.hrc(?:\.tmp)?|spare\d+\.hrl|hvt[01]?(?:\.tmp)?)\Z", re.DOTALL
)
_COMPANION = re.compile(r"^(?P<disk>.+)\.(?P<serial>\d{10})\.hrc\Z", re.DOTALL | re.ASCII)
_COMPACTED = re.compile(r"^.+\.\d{10}\.c\.hrl\Z", re.DOTALL | re.ASCII)
_SPARE = re.compile(r"^.+\.spare\d+\.hrl\Z", re.DOTALL | re.ASCII)
_ANY_LOG = re.compile(r"^(?P<disk>.+)\.(?P<serial>\d{10})(?:\.c)?\.hrl\Z", re.DOTALL | re.ASCII)
_LOG = re.compile(r"^(?P<disk>.+)\.(?P<serial>\d{10})\.hrl\Z", re.DOTALL | re.ASCII)


def log_name(disk: str, serial: int) -> str:
    """Name of a log that is not a spare."""
    return f"{disk}.{serial:010d}.hrl"


def compacted_name(disk: str, serial: int) -> str:
    """Name of a log that stands for several, the last of which has the serial."""
    return f"{disk}.{serial:010d}.c.hrl"


def companion_name(disk: str, serial: int) -> str:
    """Name of a sealed log's companion."""
    return f"{disk}.{serial:010d}.hrc"


def spare_name(disk: str, number: int) -> str:
    """Name of a log that waits to be overwritten."""
    return f"{disk}.spare{number}.hrl"


def state_name(disk: str) -> str:
    """Name of the tracking state."""
    return f"{disk}.hvt"


def index_name(disk: str, slot: int) -> str:
    """Name of one of the two index maps."""
    return f"{disk}.hvt{slot}"


def disk_of(name: str) -> str | None:
    """The disk to which a reserved name belongs; None for any other name."""
    match = _RESERVED.match(os.fsencode(name))
    return os.fsdecode(match["disk"]) if match is not None else None


def is_reserved(name: str) -> bool:
    """Whether `name` (no directory part) is hvfuse's own."""
    return name == FAILOVER or _RESERVED.match(os.fsencode(name)) is not None


def forget(folder: str, disk: str) -> None:
    """Remove everything that belongs to a disk which is not in its folder any more. Raises OSError."""
    for name in os.listdir(folder):
        if disk_of(name) == disk:
            system.unlink("spool:forget", os.path.join(folder, name), missing_ok=True)


@dataclass(frozen=True, slots=True)
class SealedLog:
    """One sealed log. `folder`: absolute path of the VM's folder; `disk`: the image's file name."""

    folder: str
    disk: str
    serial: int
    header: CompanionHeader

    @property
    def log_path(self) -> str:
        """Path of the `.hrl` that the companion describes."""
        name = compacted_name if self.header.is_compacted else log_name
        return os.path.join(self.folder, name(self.disk, self.serial))

    @property
    def companion_path(self) -> str:
        """Path of the `.hrc`."""
        return os.path.join(self.folder, companion_name(self.disk, self.serial))

    def entries(self) -> Entries:
        """The log's index, verified. Raises CorruptError naming the file."""
        header, entries = read_companion(self.companion_path)
        if header != self.header:
            raise CorruptError(f"{self.companion_path}: changed since it was listed")
        return entries


@dataclass(frozen=True, slots=True)
class SealedCycle:
    """All sealed logs of one cycle, in the order of the disks' names."""

    generation: bytes
    cycle: int
    logs: tuple[SealedLog, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every disk's log is there."""
        return len(self.logs) == self.logs[0].header.disk_count

    @property
    def sealed_ns(self) -> int:
        """The barrier's instant, ns since 1970."""
        return max(log.header.sealed_ns for log in self.logs)

    @property
    def consistency(self) -> Consistency:
        """What the point promises: of all disks, or of none. A disk whose log recovery sealed, although the others
        of its cycle had been sealed by a rotation, makes it crash-consistent."""
        held = all(log.header.is_application_consistent for log in self.logs)
        return Consistency.APPLICATION if held else Consistency.CRASH

    @property
    def first_cycle(self) -> int:
        """The first cycle that all logs stand for; `cycle` itself unless they were compacted."""
        return max(log.header.first_cycle for log in self.logs)

    @property
    def log_bytes(self) -> int:
        """Logical bytes of the logs."""
        return sum(log.header.eol for log in self.logs)

    @property
    def stored_bytes(self) -> int:
        """Bytes of payload in the logs."""
        return sum(log.header.stored_bytes for log in self.logs)


def read_companion(path: str) -> tuple[CompanionHeader, Entries]:
    """Read and verify a companion. Raises CorruptError naming the file, or FileNotFoundError."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        return companion.unpack(data)
    except HvfuseError as error:
        raise type(error)(f"{path}: {error}") from None


def list_logs(folder: str) -> list[SealedLog]:
    """All sealed logs in a VM's folder, by disk and serial; headers verified (CorruptError)."""
    found = []
    for name in sorted(os.listdir(folder)):
        match = _COMPANION.match(name)
        if match is None:
            continue
        path = os.path.join(folder, name)
        try:
            with open(path, "rb") as file:
                header = companion.unpack_header(file.read(companion.HEADER_SIZE))
        except FileNotFoundError:  # released since the listing
            continue
        except HvfuseError as error:
            raise type(error)(f"{path}: {error}") from None
        found.append(SealedLog(os.path.abspath(folder), match["disk"], int(match["serial"]), header))
    return found


def list_cycles(folder: str) -> list[SealedCycle]:
    """The sealed cycles in a VM's folder, oldest first; possibly of several generations."""
    cycles: dict[tuple[bytes, int], list[SealedLog]] = {}
    for log in list_logs(folder):
        cycles.setdefault((log.header.generation, log.header.cycle), []).append(log)
    grouped = [
        SealedCycle(generation, cycle, tuple(sorted(logs, key=lambda log: log.disk)))
        for (generation, cycle), logs in cycles.items()
    ]
    return sorted(grouped, key=lambda cycle: max(log.serial for log in cycle.logs))


def release(cycles: Sequence[SealedCycle]) -> None:
    """Let acknowledged logs go: each becomes a spare, or is removed when there are enough.

    Idempotent; a log that is gone already is no error. What an earlier release left half done is finished.
    """
    for cycle in cycles:
        for log in cycle.logs:
            system.unlink("spool:release", log.companion_path, missing_ok=True)
            discard_logs(log.folder, log.disk, log.serial)
    for folder in {log.folder for cycle in cycles for log in cycle.logs}:
        serials = sorted((log.disk, log.serial) for cycle in cycles for log in cycle.logs if log.folder == folder)
        _drop_strays(folder, dict(serials))


def _drop_strays(folder: str, released: Mapping[str, int]) -> None:
    """Let logs without a companion go whose serial is not above the last released one of their disk. The
    tracker seals in the order of the serials, so it is not at any of them."""
    for name in sorted(os.listdir(folder)):
        match = _ANY_LOG.match(name)
        if match is not None and int(match["serial"]) <= released.get(match["disk"], -1):
            companion_path = os.path.join(folder, companion_name(match["disk"], int(match["serial"])))
            if not os.path.exists(companion_path):
                discard_log(folder, match["disk"], os.path.join(folder, name))


def clear(folder: str) -> None:
    """Remove all sealed logs, whatever they hold, damaged ones too, and all spares: what they held has to be
    compared, and their space may be wanted. Raises OSError, after having tried them all."""
    failed: OSError | None = None
    names = os.listdir(folder)
    sealed = {match["disk"] + "." + match["serial"] for match in map(_COMPANION.match, names) if match is not None}
    # A companion goes before its log: a log without one is rubbish, a companion without its log a puzzle.
    for name in sorted(names, key=lambda name: _COMPANION.match(name) is None):
        log = _LOG.match(name)
        is_sealed_log = log is not None and f"{log['disk']}.{log['serial']}" in sealed
        if not (is_sealed_log or any(kind.match(name) for kind in (_COMPANION, _COMPACTED, _SPARE))):
            continue
        try:
            system.unlink("spool:clear", os.path.join(folder, name), missing_ok=True)
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


def greatest_serial(folder: str, disk: str) -> int:
    """The greatest serial that any file of the disk carries; 0 if none does."""
    found = [match for name in os.listdir(folder) for match in (_LOG.match(name), _COMPANION.match(name))]
    return max((int(match["serial"]) for match in found if match is not None and match["disk"] == disk), default=0)


def discard_logs(folder: str, disk: str, serial: int) -> None:
    """Recycle or remove the logs of a serial whose companion is gone."""
    for name in (log_name(disk, serial), compacted_name(disk, serial)):
        discard_log(folder, disk, os.path.join(folder, name))


def discard_log(folder: str, disk: str, path: str) -> None:
    """Recycle the log at `path` if the disk has room for a spare, else remove it."""
    for number in range(SPARES_KEPT):
        spare = os.path.join(folder, spare_name(disk, number))
        if os.path.exists(spare):
            continue
        try:
            if os.stat(path).st_size > SPARE_SIZE:
                os.truncate(path, SPARE_SIZE)
            system.rename("spool:recycle", path, spare)
        except FileNotFoundError:
            pass
        return
    system.unlink("spool:remove", path, missing_ok=True)


def take_spare(folder: str, disk: str, path: str) -> bool:
    """Give a spare the name `path`; False when there is none."""
    for number in range(SPARES_KEPT):
        try:
            system.rename("spool:reuse", os.path.join(folder, spare_name(disk, number)), path)
        except FileNotFoundError:
            continue
        return True
    return False


def unsealed_logs(folder: str, disk: str) -> list[tuple[int, str]]:
    """(serial, path) of the disk's logs that have no companion, by serial."""
    names = set(os.listdir(folder))
    found = []
    for name in names:
        match = _LOG.match(name)
        if match is not None and match["disk"] == disk:
            serial = int(match["serial"])
            if companion_name(disk, serial) not in names:
                found.append((serial, os.path.join(folder, name)))
    return sorted(found)
