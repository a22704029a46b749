"""Which disks belong to one history, and how a disk joins or leaves it.

A disk's record carries the history in which its logs and marks count: the generation, and while one is being begun
the one before. What logs and marks say of a disk is true whatever happens to its neighbours. So where a disk comes or
goes, all that is new is that disk:

- One that joins has all its regions dirty, durably, before its record says that it belongs to the VM.
- One that leaves is forgotten, durably, before it may be written to past its log: should it come back, it is new.
- Either way a generation with the other set of disks has to follow. Until it begins, writes are marked, not logged;
  cycles that were sealed before are shipped as the points they are, of the disks that there were.

A death between two of these steps leaves records that disagree on the number of disks, or a disk that is still new.
The next attach goes through the same steps again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hvfuse import spool, system
from hvfuse.errors import BusyError, HvfuseError
from hvfuse.formats.companion import AddressSpace
from hvfuse.formats.image import is_disk_name
from hvfuse.formats.tracking import NOT_TRACKED, Scope, TrackingRecord
from hvfuse.tracker import resync
from hvfuse.tracker.resync import Tracked
from hvfuse.tracker.state import TrackingState


@dataclass(frozen=True, slots=True)
class Split:
    """Disks of one VM. `members`: those of its history; `strangers`: all others. `generations`: either of them in a
    member's record makes it one."""

    members: list[Tracked]
    strangers: list[Tracked]
    generations: frozenset[bytes]

    @property
    def disk_count(self) -> int:
        """How many disks the history has, by its members' records."""
        return max((state.record.disk_count for _, state in self.members), default=0)

    def has(self, record: TrackingRecord) -> bool:
        """Whether a disk with that record belongs to the history."""
        return bool(_generations(record) & self.generations)


def _generations(record: TrackingRecord) -> frozenset[bytes]:
    return frozenset({record.generation, record.base_generation} - {NOT_TRACKED})


def split(disks: list[Tracked]) -> Split | None:
    """Tell a VM's disks from strangers: the history is that of more than half of the disks that have one. None if
    there is no such history though some have one."""
    known = [_generations(state.record) for _, state in disks if state.record.is_tracked]
    if not known:
        return Split([], list(disks), frozenset())
    found = max(frozenset.union(*known), key=lambda each: sum(each in generations for generations in known))
    if 2 * sum(found in generations for generations in known) <= len(known):
        return None
    members = [(disk, state) for disk, state in disks if found in _generations(state.record)]
    strangers = [(disk, state) for disk, state in disks if found not in _generations(state.record)]
    return Split(members, strangers, frozenset({found}))


def join(newcomer: Tracked, members: list[Tracked], *, reason: str, disks_changed: bool, disk_count: int) -> None:
    """Make a disk part of its neighbours' history; all its regions become dirty first. Both durable. `members` are in
    no copy, and have to be told the reason next. Caller holds the gate, or nobody writes. Raises OSError."""
    disk, state = newcomer
    if state.record.is_tracked:
        state.forget()  # of another history: its marks are of no use here
    disk.doubt_all()
    records = [each.record for _, each in members]
    based = next((record for record in records if record.base_generation != NOT_TRACKED), records[0])
    state.update(
        generation=records[0].generation,
        cycle=records[0].cycle,
        acknowledged=max(record.acknowledged for record in records),
        digest=bytes(16),
        unique_id=bytes(16),
        disk_count=disk_count,
        scope=Scope.REGIONS,
        resyncing=False,
        base_generation=based.base_generation,
        base_cycle=based.base_cycle,
        boot_id=system.boot_id(),
        detached_cleanly=False,
        resync_reason=reason,
        disks_changed=disks_changed,
    )


def forget_absent(folder: str, present: Collection[str]) -> list[tuple[str, TrackingRecord]]:
    """Forget every disk that has a tracking state in the folder and is not among those present, durably. Returns
    (name, record as it was) of those that had a history. Raises OSError, BusyError."""
    found = []
    for name in sorted(os.listdir(folder)):
        disk = name.removesuffix(spool.state_name(""))
        if name != spool.state_name(disk) or not is_disk_name(disk) or disk in present:
            continue
        try:
            state = TrackingState(folder, disk, address_space=AddressSpace.LOGICAL, region_size=0)
        except BusyError:
            raise
        except HvfuseError:  # a state that cannot be read makes no disk whole again
            system.unlink("state:forget", os.path.join(folder, name), missing_ok=True)
            system.fsync_directory("state:forget-directory", folder)
            continue
        with contextlib.closing(state):
            if state.record.is_tracked:
                found.append((disk, state.record))
                state.forget()
    return found


def sweep(folder: str, present: Collection[str]) -> None:
    """Remove what is left of disks that are not tracked any more: nobody has to know it now. Never raises."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            disk = spool.disk_of(name)
            if disk is not None and is_disk_name(disk) and disk not in present:
                with contextlib.suppress(OSError):
                    system.unlink("spool:sweep", os.path.join(folder, name), missing_ok=True)


# In words -----------------------------------------------------------------------------------------------------


def added(names: Sequence[str]) -> str:
    """Why the disks have to be looked at."""
    return f"{_listed(names)} {'was' if len(names) == 1 else 'were'} added"


def removed(names: Sequence[str]) -> str:
    """Why a generation without them has to follow."""
    return f"{_listed(names)} {'was' if len(names) == 1 else 'were'} removed"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def reason_with(disks: list[Tracked], texts: Sequence[str]) -> tuple[str, bool]:
    """The reason, and whether nothing else is one, when disks that came or went add to what is required already."""
    known = next((state.record.resync_reason for _, state in disks if state.record.resync_reason), None)
    return "; ".join([known, *texts] if known else texts), known is None or resync.is_for_disks(disks)
