"""What has to be compared with the replica again, and for which replicas that comparison is enough.

The dirty marks of a disk say where it differs from a replica without a log that tells how. They add to
a known position: everything up to it is on the replica, everything after it is marked. So a replica can
be brought up by comparing the marked regions alone if it stands at

- a cycle of this generation that it has acknowledged, or a later one (what it has beyond that only
  makes marks superfluous); or,
- while the copy that began this generation is not acknowledged, where that copy found it.

Anywhere else (a store that was rolled back to an older copy, a foreign one), or when the marks cannot be
relied on, the whole disks have to be compared.
"""

from __future__ import annotations

import contextlib
from typing import Any

from hvfuse import spool
from hvfuse.errors import CorruptError, HvfuseError
from hvfuse.formats.tracking import NOT_TRACKED, Scope, TrackingRecord
from hvfuse.spool import SealedLog
from hvfuse.tracker.disk import TrackedDisk
from hvfuse.tracker.regions import DIRTY, RegionMap
from hvfuse.tracker.state import TrackingState

Tracked = tuple[TrackedDisk, TrackingState]


def scope(disks: list[Tracked]) -> Scope:
    """What has to be compared, or is being compared; FULL also before the first copy."""
    if any(not state.record.is_tracked for _, state in disks):
        return Scope.FULL
    return max((state.record.scope for _, state in disks), default=Scope.NONE)


def bases(disks: list[Tracked]) -> list[tuple[bytes, int]]:
    """(generation, least cycle) of the positions that the dirty marks add to."""
    if not disks or scope(disks) is not Scope.REGIONS:
        return []
    records = [state.record for _, state in disks]
    generation, cycle = _origin(disks)
    found = [(generation, cycle)]
    own = (records[0].generation, max(record.acknowledged for record in records))
    if own[0] != generation and all(record.generation == own[0] for record in records):
        found.append(own)
    return found


def origin_generation(record: TrackingRecord) -> bytes:
    """The generation that a disk's marks add to. Death within `begin` leaves some disks in the new generation
    already, and the others in the old one; this is the same for all of them."""
    return record.base_generation if record.resyncing and record.scope is Scope.REGIONS else record.generation


def _origin(disks: list[Tracked]) -> tuple[bytes, int]:
    """(generation, least cycle) that the marks of all disks add to."""
    records = [state.record for _, state in disks]
    cycles = [record.base_cycle if record.resyncing else record.acknowledged for record in records]
    return origin_generation(records[0]), max(cycles)


def lose_logs(disks: list[Tracked], reason: str, *, full: bool) -> Scope:
    """Give up every log that the target has not acknowledged: mark what they hold dirty, and note durably
    that a resynchronisation is required. The files go, which gives a full disk its space back.

    Caller holds the gate. Never raises OSError: what cannot be marked widens the scope to full.
    """
    found = Scope.FULL if full or any(_needs_all(state) for _, state in disks) else Scope.REGIONS
    if found is Scope.REGIONS:
        try:
            logs = spool.list_logs(disks[0][0].folder)
            if not any(state.record.resync_reason for _, state in disks):
                _check_all_there(disks, logs)
            _mark_lost(disks, logs)
        except (OSError, HvfuseError):
            found = Scope.FULL
    for disk, state in disks:
        try:
            state.update(resync_reason=reason, scope=found)
        except OSError:
            # With neither log nor mark the disk would look whole at the next attach; without a
            # state file it looks new, which means a full copy as well.
            state.give_up()
            found = Scope.FULL
        disk.drop_logs()
    for disk, _ in disks[:1]:
        with contextlib.suppress(OSError):  # they are in nobody's way but the disk's space
            spool.clear(disk.folder)
    return found


def _needs_all(state: TrackingState) -> bool:
    """The replica has no complete copy yet, or one is to be made of everything."""
    record = state.record
    return not record.is_tracked or record.scope is Scope.FULL


def _check_all_there(disks: list[Tracked], logs: list[SealedLog]) -> None:
    """Raises CorruptError if a sealed log that the target has not acknowledged is gone: nobody knows what it held."""
    for disk, state in disks:
        record = state.record
        have = {
            cycle
            for log in _logs_of(disk, state, logs)
            for cycle in range(log.header.first_cycle, log.header.cycle + 1)
        }
        missing = set(range(record.acknowledged + 1, record.cycle + 1)) - have
        if missing:
            raise CorruptError(f"{disk.name}: the log of cycle {min(missing)} is missing")


def _mark_lost(disks: list[Tracked], logs: list[SealedLog]) -> None:
    """Raises OSError, CorruptError."""
    for disk, state in disks:
        regions = regions_of(disk)
        regions.mark_hot_dirty()
        for log in _logs_of(disk, state, logs):
            try:
                header, entries = spool.read_companion(log.companion_path)
            except FileNotFoundError:
                # Compacted since it was listed: a later log, which is still to be read, holds it too.
                continue
            regions.mark_entries(entries)
            regions.mark_cut(header.previous_size, header.start_size)
        regions.save()


def _logs_of(disk: TrackedDisk, state: TrackingState, logs: list[SealedLog]) -> list[SealedLog]:
    """The disk's own logs of its generation, by serial."""
    return [log for log in logs if log.disk == disk.name and log.header.generation == state.record.generation]


def begin(disks: list[Tracked], generation: bytes, found: Scope) -> None:
    """Note that `generation` begins with a resynchronisation of scope `found`. Raises OSError."""
    base = _origin(disks) if found is Scope.REGIONS else (NOT_TRACKED, 0)
    for _, state in disks:
        state.update(
            generation=generation,
            cycle=0,
            acknowledged=0,
            digest=bytes(16),
            unique_id=bytes(16),
            disk_count=len(disks),
            scope=found,
            resyncing=True,
            base_generation=base[0],
            base_cycle=base[1],
        )


def finish(disks: list[Tracked]) -> None:
    """The target has the copy that began the generation. Raises OSError.

    If logging has ended again meanwhile, the marks stay: they hold what was lost since, too. The state
    is noted before the marks go; marks too many do no harm.
    """
    required = any(state.record.resync_reason for _, state in disks)
    for _, state in disks:
        state.update(
            resyncing=False,
            scope=state.record.scope if required else Scope.NONE,
            base_generation=NOT_TRACKED,
            base_cycle=0,
        )
    if not required:
        for disk, _ in disks:
            regions_of(disk).clear(DIRTY)


def acknowledge(disks: list[Tracked], cycle: int) -> None:
    """The target has the generation up to `cycle`; durable before any of its logs goes. Raises OSError."""
    for _, state in disks:
        if cycle > state.record.acknowledged:
            state.update(acknowledged=cycle)


def extents(disk: TrackedDisk, found: Scope) -> list[list[int]]:
    """[offset, length] of what has to be compared of a disk."""
    size = disk.size()
    if found is Scope.REGIONS:
        return [[extent.offset, extent.length] for extent in regions_of(disk).extents(DIRTY, size)]
    return [[0, size]] if found is Scope.FULL and size else []


def status(disks: list[Tracked]) -> dict[str, Any]:
    """The fields of the control socket's status that are about resynchronisation."""
    found = scope(disks)
    return {
        "resync_scope": None if found is Scope.NONE else found.name.lower(),
        "resyncing": any(state.record.resyncing for _, state in disks),
        "acknowledged": min((state.record.acknowledged for _, state in disks), default=0),
        "resync_bases": [[generation.hex(), cycle] for generation, cycle in bases(disks)],
    }


def regions_of(disk: TrackedDisk) -> RegionMap:
    """The region map of a tracked disk."""
    assert disk.regions is not None, "only tracked disks have a region map"
    return disk.regions
