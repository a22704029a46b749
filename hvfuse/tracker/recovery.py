"""What the tracker makes of its files when it attaches: continue, recover, or ask for a resynchronisation.

- Detached cleanly, and the image is as it was left: nothing to do.
- The process died but the host lived on (same boot id): the page cache is whole. What the index maps
  hold is sealed, and the tail of the newest log is done again on the image, since the process may
  have died between log and image. Nothing is resynchronised.
- The host died: sealed logs are durable and stay; of an unsealed one counts the prefix whose entries and
  payloads check out. It is done again on the image and then given up, and the hot regions become dirty:
  only they are compared with the replica. What was synced by the guest is on the image already, and
  in that prefix, so doing it again cannot take it back. A copy under way goes on; they are left to the next.
- An image changed behind our back, or was replaced: that disk is compared as a whole. One that came is, too; one
  that went has nothing to be compared. What is known of the others stays as it was (`hvfuse.tracker.history`).
- The same while a copy is under way: it is given up, as it goes by the set of disks with which it began; another one
  compares what it was for. That is everything if it was a copy of everything.
- Disks of which no history has the greater part, or logs that contradict themselves: everything is compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from hvfuse import spool, system
from hvfuse.errors import CorruptError, HvfuseError
from hvfuse.formats.companion import UNCLEAN, Kind
from hvfuse.formats.tracking import DIRTY, IndexHead, Scope, TrackingRecord
from hvfuse.tracker import history, resync
from hvfuse.tracker.disk import TrackedDisk
from hvfuse.tracker.index import IndexMap
from hvfuse.tracker.log import ReplicationLog
from hvfuse.tracker.resync import Tracked, regions_of
from hvfuse.tracker.state import TrackingState

REDONE = 128
"""Entries at a log's tail that are done again. Writes are handled one at a time, so one would do."""

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`reason`: why a resynchronisation is required, None if it is not; `scope`: of what; `report`: what
    was recovered, in words, None if there was nothing to recover. For scope REGIONS: `joining` are disks that are to
    join the others, `changed` those that have to be marked as a whole; `abandons`: the copy under way has to be given
    up before that. `disks_changed`: disks that came or went are
    all that made it necessary."""

    reason: str | None = None
    scope: Scope = Scope.NONE
    report: str | None = None
    joining: list[Tracked] = field(default_factory=list)
    changed: list[TrackedDisk] = field(default_factory=list)
    abandons: bool = False
    disks_changed: bool = False


def recover(disks: list[Tracked], *, folder: str, now_ns: int) -> Finding:
    """Bring the disks to a state from which their generation continues, or say what is required.

    Disks that are gone, or not to be tracked any more, are forgotten. Raises OSError, BusyError.
    """
    absent = history.forget_absent(folder, {disk.name for disk, _ in disks})
    known = next((state.record.resync_reason for _, state in disks if state.record.resync_reason), None)
    if any(state.record.scope is Scope.FULL and not state.record.resyncing for _, state in disks) and known:
        return Finding(reason=known, scope=Scope.FULL)
    found = history.split(disks)
    if found is None:
        return Finding(reason="disks of different histories were put together", scope=Scope.FULL)
    if not found.members:
        return Finding(reason=known, scope=Scope.FULL if known else Scope.NONE)
    gone = [name for name, record in absent if found.has(record)]
    came_or_went = _came_or_went(found, gone)
    changed = _changed_offline(found.members)
    is_resyncing = resync.is_resyncing(found.members)
    if is_resyncing and resync.scope(found.members) is Scope.FULL and (came_or_went or changed):
        during = "; ".join([*came_or_went, *changed.values()])
        return Finding(reason=f"{during} while everything was being copied", scope=Scope.FULL)
    kept = _recover_members(found.members, disk_count=found.disk_count, now_ns=now_ns)
    return _with_changes(kept, found, came_or_went, changed, abandons=is_resyncing)


def _came_or_went(found: history.Split, gone: Sequence[str]) -> list[str]:
    """What became of the set of disks since it was recorded, in words."""
    texts = [history.added([disk.name for disk, _ in found.strangers])] if found.strangers else []
    if gone:
        texts.append(history.removed(gone))
    elif found.disk_count > len(found.members) and not found.strangers:
        texts.append("a disk was removed")
    return texts


def _with_changes(
    kept: Finding,
    found: history.Split,
    came_or_went: list[str],
    changed: dict[TrackedDisk, str],
    *,
    abandons: bool,
) -> Finding:
    """`kept`: what is to be done if nothing but the members were there, as they were left."""
    if not came_or_went and not changed:
        return kept
    is_known_for_disks = kept.reason is None or kept.disks_changed
    return replace(
        kept,
        reason="; ".join(text for text in (kept.reason, *changed.values(), *came_or_went) if text),
        scope=max(kept.scope, Scope.REGIONS),
        joining=found.strangers,
        changed=list(changed),
        abandons=abandons,
        disks_changed=is_known_for_disks and not changed and kept.scope is not Scope.FULL,
    )


def _recover_members(disks: list[Tracked], *, disk_count: int, now_ns: int) -> Finding:
    """`disk_count`: how many disks each cycle has; some may be gone."""
    known = next((state.record.resync_reason for _, state in disks if state.record.resync_reason), None)
    if known is not None:
        scope = _still_to_compare(disks)
        is_for_disks = scope is Scope.REGIONS and resync.is_for_disks(disks)
        return Finding(reason=known, scope=scope, disks_changed=is_for_disks)
    if all(state.record.detached_cleanly for _, state in disks):
        return Finding()
    boot = system.boot_id()
    stopped = [disk.name for disk, state in disks if not state.record.detached_cleanly and state.record.boot_id != boot]
    try:
        if stopped:
            return _recover_from_power_loss(disks)
        return Finding(report=_recover_logs(disks, disk_count=disk_count, now_ns=now_ns))
    except (HvfuseError, OSError) as error:
        return Finding(reason=f"the logs left by a crash could not be taken up: {error}", scope=Scope.FULL)


def _still_to_compare(disks: list[Tracked]) -> Scope:
    """Where a generation was being begun, writes were logged before the reason went: their regions are hot, and
    those logs are not taken up."""
    found = resync.next_scope(disks)
    if found is Scope.REGIONS:
        try:
            for disk, _ in disks:
                regions_of(disk).mark_hot_dirty()
                regions_of(disk).save()
        except OSError:
            found = Scope.FULL
    return found


def _changed_offline(disks: list[Tracked]) -> dict[TrackedDisk, str]:
    """The disks that are not as they were left, and how that is known."""
    found = {}
    for disk, state in disks:
        text = _change(disk, state.record)
        if text is not None:
            found[disk] = text
    return found


def _change(disk: TrackedDisk, record: TrackingRecord) -> str | None:
    if not record.detached_cleanly:
        return None
    stat = os.fstat(disk.fd)
    if stat.st_ino != record.image_inode:
        return f"{disk.name} was replaced while it was not mounted"
    if stat.st_size != record.image_size:
        return f"{disk.name} changed its size from {record.image_size} to {stat.st_size} bytes behind the mount"
    if stat.st_mtime_ns != record.image_mtime_ns:
        return f"{disk.name} was written to while it was not mounted"
    return None


# Unsealed logs ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Unsealed:
    disk: TrackedDisk
    state: TrackingState
    index: IndexMap
    head: IndexHead


def _unsealed(disk: TrackedDisk, state: TrackingState) -> list[_Unsealed]:
    """The disk's logs that took writes and were not sealed, oldest first."""
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
    return sorted(found, key=lambda log: log.head.cycle)


def _catch_up_with_companions(disk: TrackedDisk, state: TrackingState) -> None:
    """A companion that became durable just before the death is ahead of the state."""
    for log in spool.list_logs(disk.folder):
        header = log.header
        if log.disk == disk.name and header.generation == state.record.generation and header.cycle > state.record.cycle:
            header, _ = spool.read_companion(log.companion_path)  # verified; perhaps compacted since it was listed
            disk.note_sealed(header)


def _drop_rest(disks: list[Tracked]) -> None:
    """No log is in use any more. A head that is left over would be taken for that of the log which gets its
    cycle and serial next."""
    for disk, _ in disks:
        for index in disk.index_maps():
            index.forget()
        disk.drop_strays()


# The host died ------------------------------------------------------------------------------------


def _recover_from_power_loss(disks: list[Tracked]) -> Finding:
    """Redo what the logs prove, keep the cycles that are whole, mark the rest for comparison."""
    redone = 0
    for disk, state in disks:
        _catch_up_with_companions(disk, state)
        redone += _redo_durable_tail(_unsealed(disk, state))
        system.fdatasync("recovery:image", disk.fd)
        regions_of(disk).mark_hot_dirty()
    _give_up_partial_cycles(disks)
    _drop_rest(disks)
    marked = sum(regions_of(disk).count(DIRTY) for disk, _ in disks)
    doubtful = sum(extent.length for disk, _ in disks for extent in regions_of(disk).extents(DIRTY, disk.size()))
    total = sum(disk.size() for disk, _ in disks)
    reason = (
        f"the host stopped while the VM was attached: {marked} regions, {_size(doubtful)} of {_size(total)} to compare"
    )
    if resync.is_resyncing(disks):
        reason += " once the copy under way is complete"
    return Finding(reason=reason, scope=Scope.REGIONS, report=f"{reason}; {redone} logged writes done again")


def _redo_durable_tail(logs: Sequence[_Unsealed]) -> int:
    """Do again what the unsealed logs prove. An older log only if it is complete: beyond its first damaged
    entry lie newer writes that may be on the image, and that a sync during a later log may have promised."""
    recovered = [ReplicationLog.recover(log.disk.folder, log.disk.name, log.head, log.index) for log in logs]
    proven = [log.proven_entries() for log in recovered]
    first = 0
    for number in range(len(logs) - 1):
        if logs[number].head.first_seq + proven[number] != logs[number + 1].head.first_seq:
            first = number + 1
    for left, log, count in list(zip(logs, recovered, proven, strict=True))[first:]:
        if left.head.start_size != left.head.previous_size:
            system.truncate("recovery:truncate", left.disk.fd, left.head.start_size)
        for payload in log.payloads(0, count):
            _redo(left.disk.fd, *payload)
    for log in recovered:
        log.close()
    return sum(proven[first:])


def _give_up_partial_cycles(disks: list[Tracked]) -> None:
    """A cycle that not all disks had sealed cannot be shipped: what it holds is marked instead."""
    partial = [cycle for cycle in spool.list_cycles(disks[0][0].folder) if not cycle.is_whole]
    for disk, _ in disks:
        for log in (log for cycle in partial for log in cycle.logs if log.disk == disk.name):
            regions_of(disk).mark_entries(log.entries())
            regions_of(disk).mark_cut(log.header.previous_size, log.header.start_size)
        regions_of(disk).save()
    spool.release(partial)


def _size(count: int) -> str:
    return f"{count / _MIB:.1f} MiB" if count < 1024 * _MIB else f"{count / _MIB / 1024:.1f} GiB"


# The process died ---------------------------------------------------------------------------------


def _recover_logs(disks: list[Tracked], *, disk_count: int, now_ns: int) -> str:
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
            entries += _seal(log, sealed_ns=sealed_ns, disk_count=disk_count, is_newest=cycle == newest, left=left)
    _drop_rest(disks)
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
        if recovered.entry_count == 0 and log.disk.size() != log.head.start_size:
            system.truncate("recovery:truncate", log.disk.fd, log.head.start_size)
        for payload in recovered.payloads(max(0, recovered.entry_count - REDONE), recovered.entry_count):
            _redo(log.disk.fd, *payload)
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


def _redo(fd: int, kind: Kind, offset: int, payload: bytes | int) -> None:
    """Do a logged write again; doing it twice changes nothing."""
    if isinstance(payload, bytes):
        system.pwrite_small("recovery:redo", fd, payload, offset)
    else:
        assert kind is not Kind.WRITE
        system.write_zeroes("recovery:redo", fd, offset, payload)
