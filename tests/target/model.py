"""A source in memory: a VM whose disks are bytearrays, that tells of its cycles in manifests and frames."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import numpy as np

from hvfuse.consistency import Consistency
from hvfuse.frames import EXTENT_DTYPE, Fill, FrameWriter
from hvfuse.manifest import CycleKind, CycleManifest, DiskManifest
from hvfuse.position import Position
from hvfuse.target.journal import PointReader
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store

SECOND = 10**9
Change = tuple[int, int, bytes | None]
"""Offset, length, bytes; None for zeroes."""


class Source:
    """`disks`: the current contents by name. `history`: what they were at each recovery point, by id."""

    def __init__(self, vm: str, sizes: Mapping[str, int], *, seed: int = 0) -> None:
        self.vm = vm
        self.random = random.Random(seed)
        self.disks = {name: bytearray(size) for name, size in sizes.items()}
        self.ids = {name: self.random.randbytes(16) for name in sizes}
        self.generation = b""
        self.cycle = 0
        self.position: Position | None = None
        self.now_ns = 1_700_000_000 * SECOND
        self.history: dict[str, dict[str, bytes]] = {}
        self.changes: dict[str, list[Change]] = {name: [] for name in sizes}

    # What the guest does

    def write(self, name: str, offset: int, data: bytes) -> None:
        self.disks[name][offset : offset + len(data)] = data
        self.changes[name].append((offset, len(data), data))

    def zero(self, name: str, offset: int, length: int) -> None:
        self.disks[name][offset : offset + length] = bytes(length)
        self.changes[name].append((offset, length, None))

    def resize(self, name: str, size: int) -> None:
        old = len(self.disks[name])
        if size < old:
            self.changes[name] = [c for c in (_cut(c, size) for c in self.changes[name]) if c]
            self.changes[name].append((size, old - size, None))
            del self.disks[name][size:]
        else:
            self.disks[name] += bytes(size - old)

    # What the shipper makes of it

    def manifest(self, kind: CycleKind, *, previous: Position | None, digests: bool = True) -> CycleManifest:
        return CycleManifest(
            vm=self.vm,
            kind=kind,
            generation=self.generation,
            cycle=self.cycle,
            previous=previous,
            sealed_ns=self.now_ns,
            consistency=Consistency.CRASH,
            disks=tuple(
                DiskManifest(
                    disk_id=self.ids[name],
                    name=name,
                    format="raw",
                    size=len(data),
                    digest=self.random.randbytes(16) if kind is CycleKind.DELTA else bytes(16),
                )
                for name, data in self.disks.items()
            ),
        )

    def frames(self, extents: Mapping[str, Sequence[Change]], *, per_frame: int = 2, level: int = 1) -> list[bytes]:
        """Frames of disjoint ascending extents, by disk."""
        writer = FrameWriter(generation=self.generation, cycle=self.cycle, level=level)
        made = []
        for name, changes in extents.items():
            for first in range(0, len(changes), per_frame):
                part = changes[first : first + per_frame]
                table = np.zeros(len(part), EXTENT_DTYPE)
                for row, (offset, length, data) in zip(table, part, strict=True):
                    row["offset"], row["length"] = offset, length
                    row["kind"] = Fill.ZERO if data is None else Fill.DATA
                data = [data for _, _, data in part if data is not None]
                made.append(writer.encode(disk_id=self.ids[name], number=len(made), table=table, data=data))
        return made

    def coalesced(self) -> dict[str, list[Change]]:
        """What changed since the last cycle, newest write wins, ascending."""
        found: dict[str, list[Change]] = {}
        for name, changes in self.changes.items():
            bounds = sorted({edge for at, length, _ in changes for edge in (at, at + length)})
            pieces: list[Change] = []
            for low, high in itertools.pairwise(bounds):
                owner = next((c for c in reversed(changes) if c[0] <= low and high <= c[0] + c[1]), None)
                if owner is not None:
                    offset, _, data = owner
                    pieces.append((low, high - low, data and data[low - offset : high - offset]))
            found[name] = pieces
        return found

    def begin_copy(self) -> tuple[CycleManifest, list[bytes]]:
        """A new generation; zeroes are not sent."""
        self.generation, self.cycle = self.random.randbytes(16), 0
        self.now_ns += SECOND
        self.changes = {name: [] for name in self.disks}
        extents = {
            name: [
                (at, len(data[at : at + 3000]), bytes(data[at : at + 3000]))
                for at in range(0, len(data), 3000)
                if any(data[at : at + 3000])
            ]
            for name, data in self.disks.items()
        }
        return self.manifest(CycleKind.COPY, previous=None), self.frames(extents)

    def end_copy(self, manifest: CycleManifest) -> None:
        self.position = manifest.position()

    def begin_cycle(self) -> tuple[CycleManifest, list[bytes]]:
        self.cycle += 1
        self.now_ns += 30 * SECOND
        frames = self.frames(self.coalesced())
        return self.manifest(CycleKind.DELTA, previous=self.position), frames

    def end_cycle(self, manifest: CycleManifest, point_id: str) -> None:
        self.position = manifest.position()
        self.changes = {name: [] for name in self.disks}
        self.history[point_id] = {name: bytes(data) for name, data in self.disks.items()}

    # All at once

    def copy_to(self, replica: LocalReplica) -> None:
        manifest, frames = self.begin_copy()
        assert send(replica, manifest, frames) is None
        self.end_copy(manifest)

    def ship_to(self, replica: LocalReplica) -> str:
        """One cycle. Returns the recovery point's id."""
        manifest, frames = self.begin_cycle()
        point = send(replica, manifest, frames)
        assert point is not None
        self.end_cycle(manifest, point)
        return point


def send(replica: LocalReplica, manifest: CycleManifest, frames: Sequence[bytes]) -> str | None:
    """A whole cycle, leaving out what the replica holds. Returns the recovery point's id."""
    held = replica.begin(manifest)
    for number, frame in enumerate(frames):
        if number not in held:
            replica.put(frame)
    point = replica.commit(manifest, len(frames))
    return None if point is None else point.id


def _cut(change: Change, size: int) -> Change | None:
    """A change to a disk that ends at `size` now; None: nothing of it is left. Zeroes stay: an earlier shrink
    may have told them of what must not be seen again when the disk grows."""
    offset, length, data = change
    if data is None:
        return change
    length = min(length, size - offset)
    return (offset, length, data[:length]) if length > 0 else None


def contents(store: Store, vm: str, point_id: str) -> dict[str, bytes]:
    """All disks of a point, read in one go each."""
    reader = PointReader(store, vm, point_id)
    try:
        return {disk.name: reader.pread(disk.name, 0, disk.size + 1) for disk in reader.disks}
    finally:
        reader.close()


def check_points(store: Store, source: Source) -> None:
    """Every listed point equals the model."""
    for point in store.points(source.vm):
        assert contents(store, source.vm, point.id) == source.history[point.id], point.id
