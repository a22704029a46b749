"""What has to be compared with the replica again, and for which replicas that comparison is enough.

The marks of a disk say where it may differ from a replica without a log that tells how. They add to a known
position: everything up to it is on the replica, everything after it is marked. So a replica can be brought
up by comparing the marked regions alone if it stands at

- a cycle of this generation that it has acknowledged, or a later one (what it has beyond that only
  makes marks superfluous); or,
- while the copy that began this generation is not acknowledged, where that copy found it.

Anywhere else (a store that was rolled back to an older copy, a foreign one), or when the marks cannot be
relied on, the whole disks have to be compared.

A copy outlives the logs of its generation. Whatever it reads of a block was on the disk at or after the instant
at which it began; so once the replica has it, disk and replica differ in nothing but what was written since then. If
logs are lost meanwhile, what they held becomes dirty, what is written from then on too, and the copy goes on: it
compares what is COMPARING. When it is acknowledged, what is DIRTY adds to cycle 0 of its generation, and is compared
by the next copy: a pass. What a disk's record and marks say:

    resyncing  reason  scope           meaning
    no         none    none            the logs continue the replica
    no         given   regions         compare DIRTY and COMPARING; they add to the base, or to the generation itself
    no         given   full            compare everything
    yes        none    regions, full   a copy of COMPARING, of everything, is under way; the logs hold what is written
    yes        given   regions, full   the same, but logs were lost: after it, compare DIRTY
    no         none    regions         does not occur, nor does full

The disks of a VM change one after the other, so a death may leave some of them one step behind. What is the VM's
state then is told by these rules, so that it is either the state before or the one after, or asks for more:

- A reason that any disk has is the VM's; so is the widest scope.
- A copy is under way if any disk says so, provided that all are of one generation and none requires everything.
- A base that any disk has is the VM's.
- Disks that came or went are what made it necessary if all say so that give a reason.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from hvfuse import spool
from hvfuse.errors import CorruptError, HvfuseError
from hvfuse.extent import Extent
from hvfuse.formats.tracking import COMPARING, DIRTY, HOT, NOT_TRACKED, Scope, TrackingRecord
from hvfuse.spool import SealedLog
from hvfuse.tracker.disk import TrackedDisk
from hvfuse.tracker.regions import RegionMap
from hvfuse.tracker.state import TrackingState

Tracked = tuple[TrackedDisk, TrackingState]

EVERYTHING: dict[str, Any] = {
    "scope": Scope.FULL,
    "resyncing": False,
    "base_generation": NOT_TRACKED,
    "base_cycle": 0,
    "disks_changed": False,
}
"""The changes to a record that make it require a comparison of everything; a copy under way ends with it."""


# What the records say ------------------------------------------------------------------------------


def _records(disks: list[Tracked]) -> list[TrackingRecord]:
    return [state.record for _, state in disks]


def _is_any_untracked(records: list[TrackingRecord]) -> bool:
    return any(not record.is_tracked for record in records)


def is_resyncing(disks: list[Tracked]) -> bool:
    """Whether a copy is under way, from the moment at which all that it may read is durable."""
    records = _records(disks)
    return (
        any(record.resyncing for record in records)
        and not _is_any_untracked(records)
        and len({record.generation for record in records}) == 1
        and not any(record.scope is Scope.FULL and not record.resyncing for record in records)
    )


def scope(disks: list[Tracked]) -> Scope:
    """What the copy under way compares; if there is none, what is required. FULL also before the first copy."""
    records = _records(disks)
    if _is_any_untracked(records):
        return Scope.FULL
    return max((record.scope for record in records), default=Scope.NONE)


def next_scope(disks: list[Tracked]) -> Scope:
    """What a copy that is still to begin has to compare should there have to be one; the one under way is taken
    as done."""
    return Scope.REGIONS if is_resyncing(disks) else max(scope(disks), Scope.REGIONS)


def bases(disks: list[Tracked]) -> list[tuple[bytes, int]]:
    """(generation, least cycle) of the positions over which the copy may lie that is under way or required."""
    if not disks or scope(disks) is not Scope.REGIONS:
        return []
    found = [_origin(disks)]
    if is_resyncing(disks):
        own = (disks[0][1].record.generation, _acknowledged(disks))
        if own[0] != found[0][0]:
            found.append(own)
    return found


def _acknowledged(disks: list[Tracked]) -> int:
    return max((record.acknowledged for record in _records(disks)), default=0)


def _origin(disks: list[Tracked]) -> tuple[bytes, int]:
    """(generation, least cycle) that the marks of all disks add to."""
    records = _records(disks)
    based = [(r.base_generation, r.base_cycle) for r in records if r.base_generation != NOT_TRACKED]
    return based[0] if based else (records[0].generation, _acknowledged(disks))


def is_for_disks(disks: list[Tracked]) -> bool:
    """Whether the resynchronisation that is required, or else the one under way, is needed only as disks were added
    or removed."""
    records = _records(disks)
    told = [record for record in records if record.resync_reason is not None]
    told = told or [record for record in records if record.resyncing]
    return bool(told) and all(record.disks_changed for record in told)


# Losing logs -----------------------------------------------------------------------------------------


def lose_logs(
    disks: list[Tracked],
    reason: str,
    *,
    full: bool,
    sealed_stay: bool = False,
    disks_changed: bool = False,
    disk_count: int | None = None,
) -> Scope:
    """Give up every log that the target has not acknowledged: mark what they hold dirty, and note durably
    that a resynchronisation is required. The files go, which gives a full disk its space back. A copy under way
    stays valid unless everything has to be compared. Returns what has to be: `next_scope` from now on.

    `sealed_stay`: only the active logs are given up; what was sealed is still shipped, or marked when the next
    generation begins. `disks_changed`: nothing else is the reason. `disk_count`: how many the VM has from now on.

    Caller holds the gate. Never raises OSError: what cannot be marked widens the scope to full.
    """
    found = Scope.FULL if full or _is_copy_in_doubt(disks) else next_scope(disks)
    if found is Scope.REGIONS:
        try:
            _mark_lost(disks, sealed_stay=sealed_stay)
        except (OSError, HvfuseError):
            found = Scope.FULL
    changes = EVERYTHING
    if found is Scope.REGIONS:
        goes_on = is_resyncing(disks)
        changes = {
            "resyncing": goes_on,
            "scope": scope(disks) if goes_on else found,
            "disks_changed": disks_changed,
        }
    if disk_count is not None:
        changes = {**changes, "disk_count": disk_count}
    if not _note_lost(disks, reason, changes) and found is Scope.REGIONS:
        # One disk's writes cannot be marked any more, so nobody's are: the others' marks must not look enough.
        _note_lost(disks, reason, EVERYTHING)
        found = Scope.FULL
    for disk, _ in disks:
        disk.drop_logs()
    for disk, _ in disks[: 0 if sealed_stay and found is Scope.REGIONS else 1]:
        with contextlib.suppress(OSError):  # they are in nobody's way but the disk's space
            spool.clear(disk.folder)
    return found


def _note_lost(disks: list[Tracked], reason: str, changes: dict[str, Any]) -> bool:
    """Note for each disk what is required. Returns whether all could be told."""
    told = True
    for _, state in disks:
        try:
            state.update(resync_reason=reason, **changes)
        except OSError:
            # With neither log nor mark the disk would look whole at the next attach; without a
            # state file it is a new one.
            state.give_up()
            told = False
    return told


def _is_copy_in_doubt(disks: list[Tracked]) -> bool:
    """Where a sync failed, a copy under way may have read what the disk does not hold."""
    return is_resyncing(disks) and any(disk.sync_failed for disk, _ in disks)


def _mark_lost(disks: list[Tracked], *, sealed_stay: bool) -> None:
    """Mark what no log will tell, durably. Raises OSError, CorruptError.

    The logs tell exactly what was written; what is hot says the same, with what was marked ahead, and counts
    only where a sync failed: then what is on an image is not what its log's end promises.
    """
    unsealed = [disk.unsealed() for disk, _ in disks]  # before the listing: whichever is sealed now is in both
    sealed = [state.record.cycle for _, state in disks]
    logs = [] if sealed_stay else spool.list_logs(disks[0][0].folder)
    if not sealed_stay and not any(state.record.resync_reason for _, state in disks):
        _check_all_there(disks, sealed, logs)
    for (disk, state), own in zip(disks, unsealed, strict=True):
        regions = regions_of(disk)
        if disk.sync_failed:
            regions.mark_hot_dirty()
        regions.forget_hot()
        for log in own:
            regions.mark_entries(log.index.entries())
            regions.mark_cut(log.head.previous_size, log.head.start_size)
        for sealed_log in _logs_of(disk, state, logs):
            try:
                header, entries = spool.read_companion(sealed_log.companion_path)
            except FileNotFoundError:
                # Compacted since it was listed: a later log, which is still to be read, holds it too.
                continue
            regions.mark_entries(entries)
            regions.mark_cut(header.previous_size, header.start_size)
        regions.save()


def _check_all_there(disks: list[Tracked], sealed: list[int], logs: list[SealedLog]) -> None:
    """`sealed`: the disks' last sealed cycles, from before `logs` were listed. Raises CorruptError if a log that
    the target has not acknowledged is gone: nobody knows what it held."""
    for (disk, state), last in zip(disks, sealed, strict=True):
        have = {
            cycle
            for log in _logs_of(disk, state, logs)
            for cycle in range(log.header.first_cycle, log.header.cycle + 1)
        }
        missing = set(range(state.record.acknowledged + 1, last + 1)) - have
        if missing:
            raise CorruptError(f"{disk.name}: the log of cycle {min(missing)} is missing")


def _logs_of(disk: TrackedDisk, state: TrackingState, logs: list[SealedLog]) -> list[SealedLog]:
    """The disk's own logs of its generation, by serial."""
    return [log for log in logs if log.disk == disk.name and log.header.generation == state.record.generation]


# A generation's copy ---------------------------------------------------------------------------------


def open_generation(disks: list[Tracked], generation: bytes, found: Scope) -> None:
    """Note that `generation` is to begin with a copy of scope `found`; the logs of the one before are lost, and
    no copy is under way. Caller holds the gate. Raises OSError."""
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
            resyncing=False,
            base_generation=base[0],
            base_cycle=base[1],
        )


def abandon(disks: list[Tracked], reason: str) -> None:
    """Give a copy of regions up that is under way. What it compares is compared by the one that is required from now
    on, with what the logs of its generation hold: they are marked when the next one begins. Raises OSError."""
    for _, state in disks:
        state.update(resyncing=False, resync_reason=reason, scope=Scope.REGIONS)


def start_comparing(disks: list[Tracked], found: Scope) -> None:
    """Tell what the copy is to compare from what gets dirty from now on: the logs take over at this instant.
    Caller holds the gate. Raises OSError."""
    for disk, _ in disks:
        if found is Scope.REGIONS:
            regions_of(disk).start_comparing()
        else:
            regions_of(disk).clear(HOT | DIRTY | COMPARING)


def start_copy(disks: list[Tracked]) -> None:
    """The generation's logs hold what is written, and all that was written before is durable: from here on the
    copy counts, and nothing is required any more. Caller holds the gate. Raises OSError."""
    for _, state in disks:
        state.update(resyncing=True, resync_reason=None)


def finish(disks: list[Tracked]) -> None:
    """The target has the copy that began the generation; if logs were lost meanwhile, the dirty regions are what is
    required now. Caller holds the gate. Raises OSError.

    The state is noted before the marks go; marks too many do no harm.
    """
    required = any(state.record.resync_reason for _, state in disks)
    for _, state in disks:
        state.update(
            resyncing=False,
            scope=Scope.REGIONS if required else Scope.NONE,
            base_generation=NOT_TRACKED,
            base_cycle=0,
            disks_changed=required and state.record.disks_changed,
        )
    for disk, _ in disks:
        regions_of(disk).clear(COMPARING if required else COMPARING | DIRTY)


def acknowledge(disks: list[Tracked], cycle: int) -> None:
    """The target has the generation up to `cycle`; durable before any of its logs goes. Raises OSError."""
    for _, state in disks:
        if cycle > state.record.acknowledged:
            state.update(acknowledged=cycle)


# What is told of it ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is to be compared of each disk: `scope`, and for REGIONS what carries any of `marks`."""

    scope: Scope
    marks: int

    def extents(self, disk: TrackedDisk) -> list[Extent]:
        """Of a disk as it is, in bytes; ascending and apart."""
        size = disk.size()
        if self.scope is Scope.REGIONS:
            return regions_of(disk).extents(self.marks, size)
        return [Extent(0, size)] if self.scope is Scope.FULL and size else []

    def total(self, disks: list[Tracked]) -> int:
        """Bytes of all disks."""
        return sum(extent.length for disk, _ in disks for extent in self.extents(disk))


def comparison(disks: list[Tracked]) -> Comparison:
    """What the copy under way compares; if there is none, what the one that is required has to."""
    return Comparison(scope(disks), COMPARING if is_resyncing(disks) else DIRTY | COMPARING)


def next_comparison(disks: list[Tracked]) -> Comparison:
    """What a copy that is still to begin has to compare; nothing if none is required."""
    if not any(state.record.resync_reason for _, state in disks):
        return Comparison(Scope.NONE, 0)
    return Comparison(next_scope(disks), DIRTY if is_resyncing(disks) else DIRTY | COMPARING)


def status(disks: list[Tracked]) -> dict[str, Any]:
    """The fields of the control socket's status that are about resynchronisation."""
    found, coming = scope(disks), next_comparison(disks)
    return {
        "resync_scope": None if found is Scope.NONE else found.name.lower(),
        "resyncing": is_resyncing(disks),
        "acknowledged": _acknowledged(disks),
        "resync_bases": [[generation.hex(), cycle] for generation, cycle in bases(disks)],
        "resync_cause": "disks" if is_for_disks(disks) else None,
        "dirty_bytes": coming.total(disks) if coming.scope is Scope.REGIONS else 0,
    }


def regions_of(disk: TrackedDisk) -> RegionMap:
    """The region map of a tracked disk."""
    assert disk.regions is not None, "only tracked disks have a region map"
    return disk.regions
