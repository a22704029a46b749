"""Which blocks of a disk were written since the cycle at which its replica stands: these may differ, others not.

Every write is in a log before it is in the image. So whoever has read the image finds whatever that showed
beyond the replica's cycle in the logs, if they are looked at in this order:

    1. read the image
    2. ask what the active log covers; that names the cycle it is of
    3. list the sealed logs since the replica's cycle: all cycles before the one named must be there

A log that was active when the image was read is either still so at 2, or sealed by then and listed at 3. No log is
let go meanwhile: that happens in the shipper's thread alone, which is the one that asks.

Where no tracker runs, the disks are taken as its state files tell: detached cleanly, and not touched since.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hvfuse import spool
from hvfuse.errors import CorruptError, ResyncRequiredError, UnreachableError
from hvfuse.extent import Extent
from hvfuse.formats import tracking
from hvfuse.formats.digests import BLOCK
from hvfuse.formats.tracking import Scope, TrackingRecord
from hvfuse.position import Position
from hvfuse.shipper.coalesce import DamagedLogError
from hvfuse.shipper.decide import pending
from hvfuse.shipper.retry import refusal
from hvfuse.shipper.source import Regions, ResyncScope, SourceDisk, SourceStatus, Touched
from hvfuse.spool import SealedCycle, SealedLog

Blocks = NDArray[np.int64]
"""Numbers of blocks (`hvfuse.formats.digests`), ascending; shape (n,)."""
Flags = NDArray[np.bool_]


class Tracking(Protocol):
    """The part of `Source` that tells what was written."""

    def status(self) -> SourceStatus: ...

    def cycles(self) -> list[SealedCycle]: ...

    def touched(self, asked: Regions) -> Touched: ...


@dataclass(frozen=True, slots=True)
class _Covered:
    """What a log covers. `starts`: ascending, shape (n,); `reached`: the greatest end so far, and for index -1 none
    at all, shape (n + 1,). Bytes."""

    starts: NDArray[np.int64]
    reached: NDArray[np.int64]

    @classmethod
    def by(cls, log: SealedLog) -> _Covered:
        """All that a sealed log tells of: writes, zeroes, trims, and what its beginning with another size cut off
        or added. Raises CorruptError."""
        entries = log.entries()
        sizes = sorted((log.header.previous_size, log.header.start_size))
        starts = np.append(entries["offset"].astype(np.int64), sizes[0])
        ends = np.append(entries["offset"].astype(np.int64) + entries["length"].astype(np.int64), sizes[1])
        starts, ends = starts[ends > starts], ends[ends > starts]  # no flush, no size that stayed
        order = np.argsort(starts)
        return cls(starts[order], np.append(np.maximum.accumulate(ends[order]), -1))

    def touches(self, blocks: Blocks) -> Flags:
        """Which blocks have at least one byte that is covered."""
        before = np.searchsorted(self.starts, (blocks + 1) * BLOCK)  # ranges that begin before the block's end
        found: Flags = self.reached[before - 1] > blocks * BLOCK
        return found


class Since:
    """What was written since `position`, at which the replica stands. For the shipper's thread."""

    def __init__(self, source: Tracking, position: Position) -> None:
        self._source = source
        self._position = position
        self._covered: dict[str, _Covered] = {}

    def written(self, disk_id: bytes, blocks: Blocks) -> Flags:
        """Which of a disk's blocks, all read before this is called, were perhaps written since.

        Raises ResyncRequiredError when nothing is logged any more, DamagedLogError, and as `Source.status`.
        """
        if not len(blocks):
            return np.zeros(0, np.bool_)
        asked = [Extent(int(block) * BLOCK, BLOCK) for block in blocks]
        active = self._source.touched({disk_id: asked})
        if active.generation != self._position.generation:
            raise ResyncRequiredError("a new generation of logs has begun meanwhile")
        waiting = pending(self._position, self._source.cycles())
        reached = waiting[-1].cycle if waiting else self._position.cycle
        if reached < active.cycle - 1:  # a log that is not there may tell of any block
            return np.ones(len(blocks), np.bool_)
        touched = [extent.offset // BLOCK for extent in active.disks.get(disk_id, ())]
        found: Flags = np.isin(blocks, np.array(touched, np.int64))
        for cycle in waiting:
            for log in cycle.logs:
                if log.header.disk_id == disk_id:
                    found |= self._by(log).touches(blocks)
        return found

    def _by(self, log: SealedLog) -> _Covered:
        found = self._covered.get(log.companion_path)
        if found is None:
            try:
                found = self._covered[log.companion_path] = _Covered.by(log)
            except (CorruptError, OSError) as error:
                raise DamagedLogError(str(error)) from None
        return found


class RestingDisks:
    """The disks of a VM that no tracker has: those with `disk_ids`, in `folder`.

    Raises UnreachableError if a tracker has them, or its end was not a clean detach; ResyncRequiredError if the disks
    are not as it left them.
    """

    def __init__(self, vm: str, folder: str, disk_ids: Collection[bytes]) -> None:
        self._vm = vm
        self._folder = os.path.abspath(folder)
        self._disk_ids = disk_ids
        self._records = self._read()

    def status(self) -> SourceStatus:
        """See `Source`: as the tracker would find the disks now."""
        records = list(self._records.values())
        scope = max((record.scope for record in records), default=Scope.NONE)
        return SourceStatus(
            vm=self._vm,
            generation=records[0].generation if records[0].is_tracked else None,
            cycle=records[0].cycle + 1,
            resync_required=next((record.resync_reason for record in records if record.resync_reason), None),
            resync_scope=None if scope is Scope.NONE else ResyncScope(scope.name.lower()),
            resyncing=any(record.resyncing for record in records),
            acknowledged=min(record.acknowledged for record in records),
            disks=tuple(
                SourceDisk(name=name, disk_id=record.disk_id, format="", size=record.image_size, log_bytes=0)
                for name, record in self._records.items()
            ),
        )

    def cycles(self) -> list[SealedCycle]:
        """See `Source`."""
        try:
            return spool.list_cycles(self._folder)
        except CorruptError as error:
            raise DamagedLogError(str(error)) from None

    def touched(self, asked: Regions) -> Touched:
        """Nothing, if the disks are still as they were when this was made. Raises UnreachableError otherwise."""
        try:
            stands = self._read() == self._records
        except (UnreachableError, ResyncRequiredError):
            stands = False
        if not stands:
            raise UnreachableError(f"{self._vm} was mounted or changed meanwhile", hint="do it again")
        first = next(iter(self._records.values()))
        return Touched(first.generation, first.cycle + 1, {})

    def _read(self) -> dict[str, TrackingRecord]:
        """The state of each disk, by name."""
        found = {}
        try:
            for file in sorted(os.listdir(self._folder)):
                name = file.removesuffix(".hvt")
                if file == spool.state_name(name) and os.path.exists(os.path.join(self._folder, name)):
                    record = self._record(name)
                    if record.disk_id in self._disk_ids:
                        found[name] = record
        except OSError as error:
            raise refusal(error, self._folder) from error
        if len(found) != len(self._disk_ids) or len({record.generation for record in found.values()}) != 1:
            raise ResyncRequiredError(
                f"{self._vm}: its disks are not those of the replica", hint=f"hvfuse mount {self._vm}"
            )
        return found

    def _record(self, name: str) -> TrackingRecord:
        path = os.path.join(self._folder, name)
        with open(os.path.join(self._folder, spool.state_name(name)), "rb") as file:
            record = tracking.upgraded(tracking.unpack_state(file.read(tracking.STATE_SIZE)))
        if record.disk_id not in self._disk_ids:
            return record
        if not record.detached_cleanly:
            raise UnreachableError(
                f"{self._vm} is not mounted, and was not detached cleanly", hint=f"hvfuse mount {self._vm}"
            )
        stat = os.stat(path, follow_symlinks=False)
        if (stat.st_size, stat.st_mtime_ns, stat.st_ino) != (
            record.image_size,
            record.image_mtime_ns,
            record.image_inode,
        ):
            raise ResyncRequiredError(f"{path} was changed while it was not mounted", hint=f"hvfuse mount {self._vm}")
        return record
