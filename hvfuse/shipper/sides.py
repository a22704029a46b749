"""Source and replica, joined by logs and open to be compared while no copy is under way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hvfuse.errors import ResyncRequiredError, UnreachableError
from hvfuse.extent import Extent, round_up
from hvfuse.formats.digests import BLOCK, DigestKey, Digests
from hvfuse.reconcile.compare import Comparison
from hvfuse.shipper.decide import Action, decide
from hvfuse.shipper.replica import Inspection, Replica
from hvfuse.shipper.slots import Group, open_disk
from hvfuse.shipper.source import Source, SourceDisk
from hvfuse.shipper.written import RestingDisks, Since, Tracking


@dataclass(frozen=True, slots=True)
class HeldDisk:
    """One disk of the replica, as the other side of a comparison."""

    inspection: Inspection
    disk_id: bytes

    def occupied(self, low: int, high: int) -> Sequence[Extent]:
        return self.inspection.occupied(self.disk_id, low, high)

    def summaries(self, extents: Sequence[Extent], key: DigestKey) -> Digests:
        return self.inspection.summaries(self.disk_id, extents, key)

    def digests(self, extents: Sequence[Extent], key: DigestKey) -> Digests:
        return self.inspection.digests(self.disk_id, extents, key)


class Sides:
    """Both sides, joined by logs and open to be compared. `position`: of the replica; `disks`: by id."""

    def __init__(
        self, vm: str, folder: str, inspection: Inspection, tracking: Tracking, images: contextlib.ExitStack
    ) -> None:
        self._vm = vm
        self._folder = folder
        self._tracking = tracking
        self._images = images
        self._comparisons: dict[bytes, tuple[Group, HeldDisk, Comparison]] = {}
        self.inspection = inspection
        self.position = inspection.position
        self.since = Since(tracking, inspection.position)
        self.disks: Mapping[bytes, SourceDisk] = {disk.disk_id: disk for disk in self.check()}

    def check(self) -> Sequence[SourceDisk]:
        """The source's disks. Raises ResyncRequiredError if logs do not join the sides (any more)."""
        status = self._tracking.status()
        decision = decide(status, self.position, self._tracking.cycles())
        if status.resyncing or status.resync_required or decision.action not in (Action.SHIP, Action.NOTHING):
            why = status.resync_required or decision.reason or "a copy is under way"
            raise ResyncRequiredError(
                f"{self._vm} cannot be verified before it is resynchronised: {why}",
                hint=f"hvfuse status {self._vm}" if status.resyncing else f"hvfuse resync {self._vm}",
            )
        unknown = [disk.name for disk in status.disks if disk.disk_id not in self.inspection.disk_ids]
        if unknown:
            raise ResyncRequiredError(f"{self._vm}: the replica has no copy of {unknown[0]}")
        return status.disks

    def of(self, disk_id: bytes, key: DigestKey) -> tuple[Group, HeldDisk, Comparison]:
        """One disk on both sides."""
        found = self._comparisons.get(disk_id)
        if found is None:
            disk = self.disks[disk_id]
            path = os.path.join(self._folder, disk.name)
            fd = open_disk(path)
            self._images.callback(os.close, fd)
            group = Group(fd, path, disk, 0, 0, round_up(disk.size, BLOCK))
            other = HeldDisk(self.inspection, disk_id)
            found = self._comparisons[disk_id] = (group, other, Comparison(group, other, key))
        return found


@contextlib.contextmanager
def open_sides(vm: str, folder: str, source: Source, replica: Replica, *, from_medium: bool) -> Iterator[Sides]:
    """Both sides, which are closed at the end.

    Raises ResyncRequiredError where logs do not join them, UnreachableError where no tracker runs and the disks were
    not detached cleanly.
    """
    inspection = replica.inspect(from_medium=from_medium)
    if inspection is None:
        raise ResyncRequiredError(f"{vm} was not copied yet", hint=f"hvfuse replicate {vm}")
    with contextlib.closing(inspection), contextlib.ExitStack() as images:
        tracking: Tracking = source
        try:
            source.status()
        except UnreachableError:
            tracking = RestingDisks(vm, folder, inspection.disk_ids)
        yield Sides(vm, folder, inspection, tracking, images)
