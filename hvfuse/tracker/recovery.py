"""What the tracker makes of its files when it attaches: continue, recover, or ask for a copy.

- Detached cleanly, and the image is as it was left: nothing to do.
- The process died but the host lived on (same boot id): the page cache is whole. What the index maps
  hold is sealed, and the tail of the newest log is done again on the image, since the process may
  have died between log and image.
- Anything else (the host died, the image changed behind our back, a disk came or went) cannot be
  continued by logs: a reason for a resynchronisation is returned.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from hvfuse import spool, system
from hvfuse.errors import CorruptError, HvfuseError
from hvfuse.formats.companion import UNCLEAN, Kind
from hvfuse.formats.tracking import IndexHead
from hvfuse.tracker.disk import TrackedDisk
from hvfuse.tracker.index import IndexMap
from hvfuse.tracker.log import ReplicationLog
from hvfuse.tracker.state import TrackingState

REDONE = 128
"""Entries at a log's tail that are done again. Writes are handled one at a time, so one would do."""

Tracked = tuple[TrackedDisk, TrackingState]


def recover(disks: list[Tracked], *, now_ns: int) -> tuple[str | None, str | None]:
    """Bring the disks to a state from which their generation continues.

    Returns (reason why a resynchronisation is required or None, what was recovered in words or None).
    """
    if not any(state.record.is_tracked for _, state in disks):
        return _known_reason(disks), None
    reason = _known_reason(disks) or _membership_changed(disks) or _cannot_continue(disks)
    if reason is not None:
        return reason, None
    if all(state.record.detached_cleanly for _, state in disks):
        return None, None
    try:
        return None, _recover_logs(disks, now_ns=now_ns)
    except (HvfuseError, OSError) as error:
        return f"the logs left by a crash could not be taken up: {error}", None


def _known_reason(disks: list[Tracked]) -> str | None:
    return next((state.record.resync_reason for _, state in disks if state.record.resync_reason), None)


def _membership_changed(disks: list[Tracked]) -> str | None:
    generations = {state.record.generation for _, state in disks}
    if len(generations) > 1:
        added = [disk.name for disk, state in disks if not state.record.is_tracked]
        return f"{', '.join(added) or 'a disk'} was added or exchanged while the VM was not mounted"
    expected = disks[0][1].record.disk_count
    if expected != len(disks):
        return f"the VM has {len(disks)} disks, it had {expected} when it was protected"
    return None


def _cannot_continue(disks: list[Tracked]) -> str | None:
    boot = system.boot_id()
    for disk, state in disks:
        record = state.record
        if not record.detached_cleanly:
            if record.boot_id != boot:
                return f"the host stopped while {disk.name} was attached"
            continue
        stat = os.fstat(disk.fd)
        if stat.st_ino != record.image_inode:
            return f"{disk.name} was replaced while it was not mounted"
        if stat.st_size != record.image_size:
            return f"{disk.name} changed its size from {record.image_size} to {stat.st_size} bytes behind the mount"
        if stat.st_mtime_ns != record.image_mtime_ns:
            return f"{disk.name} was written to while it was not mounted"
    return None


@dataclass(frozen=True, slots=True)
class _Unsealed:
    disk: TrackedDisk
    state: TrackingState
    index: IndexMap
    head: IndexHead


def _recover_logs(disks: list[Tracked], *, now_ns: int) -> str:
    """Seal, cycle by cycle, what the death left unsealed; only the newest can lack on the image."""
    for disk, state in disks:
        _catch_up_with_companions(disk, state)
    left = [log for disk, state in disks for log in _unsealed(disk, state)]
    cycles = [cycle for cycle in sorted({log.head.cycle for log in left}) if _is_switched(cycle, left, disks)]
    _demand_empty(log for log in left if log.head.cycle not in cycles)
    newest = cycles[-1] if cycles else 0
    entries = 0
    for cycle in cycles:
        logs = [log for log in left if log.head.cycle == cycle]
        later = [log.head.opened_ns for log in left if log.head.cycle == cycle + 1]
        sealed_ns = later[0] if later else _sealed_instant(disks, cycle) or now_ns
        for log in logs:
            entries += _seal(log, sealed_ns=sealed_ns, disk_count=len(disks), is_newest=cycle == newest, left=left)
    for disk, _ in disks:
        # A head that is left over would be taken for that of the log which gets its cycle and serial next.
        for index in disk.index_maps():
            index.forget()
        disk.drop_strays()
    return f"the tracker had died; {entries} logged writes were taken up"


def _is_switched(cycle: int, left: list[_Unsealed], disks: list[Tracked]) -> bool:
    """Whether all disks had come to `cycle`. If not, the death came within the barrier, and no write
    has reached that cycle's logs."""
    unsealed = sum(log.head.cycle == cycle for log in left)
    sealed = sum(state.record.cycle >= cycle for _, state in disks)
    return unsealed + sealed == len(disks)


def _demand_empty(given_up: Iterable[_Unsealed]) -> None:
    """Logs are given up only because nothing can be in them. Raises CorruptError."""
    for log in given_up:
        if len(log.index.recover(log.head)):
            raise CorruptError(f"{log.index.path}: writes were logged for a cycle to which not all disks had come")


def _catch_up_with_companions(disk: TrackedDisk, state: TrackingState) -> None:
    """A companion that became durable just before the death is ahead of the state."""
    for log in spool.list_logs(disk.folder):
        header = log.header
        if log.disk == disk.name and header.generation == state.record.generation and header.cycle > state.record.cycle:
            log.entries()
            disk.note_sealed(header)


def _unsealed(disk: TrackedDisk, state: TrackingState) -> list[_Unsealed]:
    files = {serial for serial, _ in spool.unsealed_logs(disk.folder, disk.name)}
    found = []
    for index in disk.index_maps():
        head = index.head()
        if (
            head is not None
            and head.active
            and head.generation == state.record.generation
            and head.disk_id == state.record.disk_id
            and head.cycle > state.record.cycle
            and head.serial in files
        ):
            found.append(_Unsealed(disk, state, index, head))
    return found


def _sealed_instant(disks: list[Tracked], cycle: int) -> int | None:
    """The barrier of a cycle that some disks sealed before the death."""
    for log in spool.list_logs(disks[0][0].folder):
        if log.header.cycle == cycle and log.header.generation == disks[0][1].record.generation:
            return log.header.sealed_ns
    return None


def _seal(log: _Unsealed, *, sealed_ns: int, disk_count: int, is_newest: bool, left: list[_Unsealed]) -> int:
    """Returns how many entries the log held."""
    recovered = ReplicationLog.recover(log.disk.folder, log.disk.name, log.head, log.index)
    if is_newest:
        _redo(log, recovered)
        end_size = log.disk.size()
    else:
        after = [other.head for other in left if other.disk is log.disk and other.head.cycle == log.head.cycle + 1]
        end_size = after[0].previous_size if after else log.disk.size()
    system.fdatasync("recovery:image", log.disk.fd)
    header = recovered.seal(
        sealed_ns=sealed_ns,
        end_size=end_size,
        disk_count=disk_count,
        previous_digest=log.state.record.digest,
        space=log.disk.space,
        flags=UNCLEAN if is_newest else 0,
    )
    log.disk.note_sealed(header)
    return header.entry_count


def _redo(log: _Unsealed, recovered: ReplicationLog) -> None:
    """Do the log's tail again on the image, in order; doing it twice changes nothing."""
    fd = log.disk.fd
    if recovered.entry_count == 0 and log.disk.size() != log.head.start_size:
        system.truncate("recovery:truncate", fd, log.head.start_size)
    for kind, offset, payload in recovered.last_payloads(REDONE):
        if kind is Kind.WRITE:
            assert isinstance(payload, bytes)
            system.pwrite("recovery:redo", fd, payload, offset)
        else:
            assert isinstance(payload, int)
            system.write_zeroes("recovery:redo", fd, offset, payload)
