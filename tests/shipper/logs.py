"""Sealed logs made by hand, a replica in memory, and a tracker that is no process: for tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from hvfuse import frames, spool
from hvfuse.consistency import Consistency
from hvfuse.errors import CorruptError, ResyncRequiredError
from hvfuse.extent import Extent
from hvfuse.formats import companion
from hvfuse.formats.companion import APPLICATION, AddressSpace, CompanionHeader, Kind
from hvfuse.formats.digests import BLOCK, DigestKey, Digests, digest_blocks, summary
from hvfuse.frames import Fill
from hvfuse.manifest import CycleKind, CycleManifest, RecoveryPoint, point_id
from hvfuse.position import NO_DIGEST, Position, PositionMismatchError
from hvfuse.reconcile import plan
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.source import Regions, ResyncScope, SourceDisk, SourceStatus
from hvfuse.spool import SealedCycle
from hvfuse.states import Event, ReplicationState, next_state


@dataclass(frozen=True)
class Op:
    """What a guest did: `data` for a write, `length` for the rest."""

    kind: Kind
    offset: int = 0
    length: int = 0
    data: bytes = b""

    def apply(self, disk: bytearray) -> None:
        if self.kind is Kind.FLUSH:
            return
        data = self.data if self.kind is Kind.WRITE else bytes(self.length)
        if self.offset + len(data) > len(disk):
            disk.extend(bytes(self.offset + len(data) - len(disk)))
        disk[self.offset : self.offset + len(data)] = data


def write(offset: int, data: bytes) -> Op:
    return Op(Kind.WRITE, offset, len(data), data)


@dataclass
class Disk:
    """A disk's image in memory and the thread of its logs."""

    name: str
    disk_id: bytes
    image: bytearray
    serial: int = 0
    seq: int = 0
    digest: bytes = NO_DIGEST
    unique_id: bytes = bytes(16)
    previous_size: int = 0
    start_size: int = 0
    ops: list[Op] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.previous_size = self.start_size = len(self.image)

    def do(self, op: Op) -> None:
        op.apply(self.image)
        self.ops.append(op)

    def resize(self, size: int) -> None:
        """To be called right after a rotation, as the tracker does it."""
        assert not self.ops
        if size < len(self.image):
            del self.image[size:]
        else:
            self.image.extend(bytes(size - len(self.image)))
        self.start_size = size

    def seal(
        self, folder: str, *, generation: bytes, cycle: int, sealed_ns: int, disk_count: int, flags: int = 0
    ) -> None:
        """Write log and companion, and begin the next log."""
        self.serial += 1
        unique_id = os.urandom(16)
        entries = []
        payload = bytearray(b"\xee" * 8192)  # header and first metadata block: not the shipper's business
        first = self.seq
        for op in self.ops:
            entries.append(self._entry(op, len(payload), companion.entry_seed(unique_id)))
            payload += op.data if op.kind is Kind.WRITE else bytes(min(op.length, 512))
            if len(entries) % 127 == 0:
                payload += b"\xee" * 4096
        body = b"".join(entries)
        header = CompanionHeader(
            entry_count=len(entries), unique_id=unique_id, previous_unique_id=self.unique_id,
            generation=generation, cycle=cycle, serial=self.serial, first_seq=first, disk_id=self.disk_id,
            previous_digest=self.digest, previous_size=self.previous_size, start_size=self.start_size,
            end_size=len(self.image), eol=len(payload), opened_ns=0, sealed_ns=sealed_ns,
            disk_count=disk_count, address_space=AddressSpace.LOGICAL, flags=flags,
            stored_bytes=sum(op.length for op in self.ops if op.kind is Kind.WRITE),
            entries_digest=xxhash.xxh3_128_digest(body),
        )  # fmt: skip
        with open(os.path.join(folder, spool.log_name(self.name, self.serial)), "wb") as file:
            file.write(payload)
        with open(os.path.join(folder, spool.companion_name(self.name, self.serial)), "wb") as file:
            file.write(header.pack() + body)
        self.ops = []
        self.digest, self.unique_id = header.digest(), unique_id
        self.previous_size = self.start_size = len(self.image)

    def _entry(self, op: Op, location: int, seed: int) -> bytes:
        self.seq += 1
        return companion.pack_entry(
            seed, self.seq - 1, op.offset, location, xxhash.xxh3_64_intdigest(op.data), op.length,
            sum(op.data), 0, op.kind,
        )  # fmt: skip


REGION = 1 << 16
"""Bytes; what `Tracked` marks at once."""


@dataclass
class Tracked:
    """A source without a process: disks in memory, their images and logs in `folder`."""

    folder: str
    disks: list[Disk]
    vm: str = "vm1"
    generation: bytes | None = None
    cycle: int = 0
    resync_required: str | None = None
    scope: ResyncScope | None = None
    resyncing: bool = False
    acknowledged: int = 0
    bases: list[tuple[bytes, int]] = field(default_factory=list)
    dirty: dict[bytes, set[int]] = field(default_factory=dict)
    comparing: dict[bytes, set[int]] = field(default_factory=dict)
    now_ns: int = 1_700_000_000_000_000_000
    barriers: dict[tuple[bytes, int], list[bytes]] = field(default_factory=dict)

    def status(self) -> SourceStatus:
        return SourceStatus(
            vm=self.vm, generation=self.generation, cycle=self.cycle,
            resync_required=self.resync_required, resync_scope=self.scope, resyncing=self.resyncing,
            resync_bases=tuple(self.bases), acknowledged=self.acknowledged, dirty_bytes=self.dirty_bytes(),
            disks=tuple(
                SourceDisk(name=d.name, disk_id=d.disk_id, format="raw", size=len(d.image), log_bytes=0)
                for d in self.disks
            ),
        )  # fmt: skip

    def begin(self, generation: bytes, scope: ResyncScope) -> SourceStatus:
        if scope is ResyncScope.REGIONS:
            if self.scope is not scope:
                raise ResyncRequiredError("the marked regions are not enough")
            self.lose_logs()
            old = self.bases[:1] if self.resyncing else [(self.generation, self.acknowledged)]
            self.bases = [*old, (generation, 0)]
            for disk in self.disks:
                self.comparing.setdefault(disk.disk_id, set()).update(self.dirty.pop(disk.disk_id, ()))
        else:
            self.bases, self.dirty, self.comparing = [], {}, {}
        self.generation, self.cycle, self.acknowledged, self.resync_required = generation, 1, 0, None
        self.scope, self.resyncing = scope, True
        for disk in self.disks:
            disk.ops, disk.digest, disk.unique_id = [], NO_DIGEST, bytes(16)
            disk.previous_size = disk.start_size = len(disk.image)
        self.flush()
        return self.status()

    def lose_logs(self) -> None:
        """Mark what the logs hold, and let them go."""
        logs = [log for cycle in self.cycles() if cycle.generation == self.generation for log in cycle.logs]
        for disk in self.disks:
            for log in logs:
                if log.header.disk_id == disk.disk_id:
                    entries = log.entries()
                    changes = entries[entries["kind"] != Kind.FLUSH]
                    self._mark(disk, zip(changes["offset"].tolist(), changes["length"].tolist(), strict=True))
        self.mark_written()
        spool.release(self.cycles())

    def mark_written(self) -> None:
        for disk in self.disks:
            self._mark(disk, [(op.offset, op.length) for op in disk.ops if op.kind is not Kind.FLUSH])
            disk.ops = []

    def _mark(self, disk: Disk, written: Iterable[tuple[int, int]]) -> None:
        for offset, length in written:
            self.dirty.setdefault(disk.disk_id, set()).update(range(offset // REGION, -(-(offset + length) // REGION)))

    def end_logging(self, reason: str) -> None:
        """What a full disk does to the tracker: from here on, writes are only marked. A copy goes on."""
        self.lose_logs()
        if self.scope is None:
            self.scope, self.bases = ResyncScope.REGIONS, [(self.generation, self.acknowledged)]
        self.resync_required = reason

    def dirty_bytes(self) -> int:
        if not self.resync_required or (self.scope is ResyncScope.FULL and not self.resyncing):
            return 0
        self.mark_written()  # as the tracker does at once
        marks = [self.dirty] if self.resyncing else [self.dirty, self.comparing]
        return sum(extent.length for extents in self._extents(marks).values() for extent in extents)

    def crash(self, reason: str, *, hot: Sequence[int] = ()) -> None:
        """The host dies: sealed cycles stay, the active one is lost; its regions, and `hot` ones, are marked."""
        kept = self.cycles()
        self.cycles = lambda: []
        self.end_logging(reason)
        self.cycles = lambda: [c for c in spool.list_cycles(self.folder) if c.cycle <= kept[-1].cycle] if kept else []
        for disk in self.disks:
            self.dirty.setdefault(disk.disk_id, set()).update(hot)

    def regions(self) -> Regions:
        return self._extents([self.comparing] if self.resyncing else [self.dirty, self.comparing])

    def _extents(self, marks: list[dict[bytes, set[int]]]) -> Regions:
        return {
            disk.disk_id: [
                Extent(region * REGION, min(REGION, len(disk.image) - region * REGION))
                for region in sorted(set().union(*(each.get(disk.disk_id, ()) for each in marks)))
                if region * REGION < len(disk.image)
            ]
            for disk in self.disks
        }

    def resynced(self, generation: bytes) -> None:
        assert generation == self.generation
        if self.resyncing:
            self.comparing = {}
        if self.resyncing and not self.resync_required:
            self.scope, self.bases, self.dirty = None, [], {}
        elif self.resyncing:
            self.scope, self.bases = ResyncScope.REGIONS, [(generation, 0)]
        self.resyncing = False

    def flush(self) -> None:
        for disk in self.disks:
            with open(os.path.join(self.folder, disk.name), "wb") as file:
                file.write(disk.image)

    def rotate(self, consistency: Consistency = Consistency.CRASH, *, proof: str | None = None) -> int:
        assert self.generation is not None
        if self.resync_required:
            raise ResyncRequiredError(self.resync_required)
        self.now_ns += 1_000_000_000
        self.flush()
        for disk in self.disks:
            disk.seal(
                self.folder, generation=self.generation, cycle=self.cycle, sealed_ns=self.now_ns,
                disk_count=len(self.disks), flags=APPLICATION if consistency is Consistency.APPLICATION else 0,
            )  # fmt: skip
        self.barriers[self.generation, self.cycle] = [bytes(disk.image) for disk in self.disks]
        self.cycle += 1
        return self.cycle - 1

    def cycles(self) -> list[SealedCycle]:
        return spool.list_cycles(self.folder)

    def release(self, generation: bytes, cycle: int) -> None:
        if generation == self.generation:
            self.acknowledged = max(self.acknowledged, cycle)
        spool.release([c for c in self.cycles() if c.generation != generation or c.cycle <= cycle])

    def discard_damaged(self) -> list[str]:
        return []


def tracked(folder: str, sizes: Sequence[int] = (1 << 20,), *, begun: bool = True) -> Tracked:
    disks = [Disk(f"disk{n}.raw", bytes([n + 1]) * 16, bytearray(size)) for n, size in enumerate(sizes)]
    source = Tracked(folder, disks)
    source.flush()
    if begun:
        source.begin(b"G" * 16, ResyncScope.FULL)
        source.resynced(b"G" * 16)
    return source


class Killed(BaseException):
    """What a test raises where a process would have been killed."""


@dataclass
class MemoryReplica:
    """Applies frames to bytearrays, and holds the shipper to the protocol.

    `die_at`: the number of the put, counted over the replica's life, at which `Killed` is raised:
    before the frame is kept when negative, after it when positive.
    """

    images: dict[bytes, bytearray] = field(default_factory=dict)
    stands: Position | None = None
    staged_for: tuple[bytes, int] | None = None
    previous: Position | None = None
    asked: list[tuple[bytes, int, int]] = field(default_factory=list)
    made_from: bytes = NO_DIGEST
    staged: dict[int, bytes] = field(default_factory=dict)
    all_points: list[RecoveryPoint] = field(default_factory=list)
    puts: list[tuple[bytes, int, int]] = field(default_factory=list)
    die_at: int | None = None
    die_at_commit: bool = False
    fail_with: Exception | None = None

    def position(self) -> Position | None:
        if self.fail_with is not None:
            raise self.fail_with
        return self.stands

    def keeps_frames(self) -> bool:
        return True

    def begin(self, manifest: CycleManifest) -> frozenset[int]:
        if manifest.previous != self.stands and (manifest.kind is CycleKind.DELTA or manifest.previous is not None):
            raise PositionMismatchError(f"the replica stands at {self.stands}", theirs=self.stands)
        key = manifest.generation, manifest.cycle
        if (self.staged_for, self.made_from) != (key, manifest.made_from):
            self.staged_for, self.made_from, self.staged = key, manifest.made_from, {}
        self.previous = manifest.previous
        return frozenset(self.staged)

    def extent(self, disk_id: bytes) -> int:
        return len(self.images.get(disk_id, b""))

    def abandon(self) -> None:
        self.staged_for, self.staged = None, {}

    def occupied(self, disk_id: bytes, low: int, high: int) -> Sequence[Extent]:
        assert self.previous is not None and self.previous == self.stands
        image = bytes(self.images.get(disk_id, b""))
        found = [at for at in range(low, min(high, len(image)), BLOCK) if image[at : at + BLOCK].strip(b"\0")]
        return [Extent(at, min(BLOCK, high - at)) for at in found]

    def summaries(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        assert all(extent.offset // plan.SPAN == (extent.end - 1) // plan.SPAN for extent in extents)
        return np.array([summary(self.digests(disk_id, [extent], key), key) for extent in extents])

    def digests(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        assert self.previous is not None and self.previous == self.stands
        image = bytes(self.images.get(disk_id, b""))
        found = []
        for extent in extents:
            assert extent.offset % BLOCK == extent.length % BLOCK == 0
            self.asked.append((disk_id, extent.offset, extent.length))
            found.append(digest_blocks(image[extent.offset : extent.end].ljust(extent.length, b"\0"), key))
        return np.concatenate(found)

    def put(self, frame: bytes) -> None:
        decoded = frames.decode(frame)
        header = decoded.header
        assert (header.generation, header.cycle) == self.staged_for
        number = len(self.puts) + 1
        if self.die_at == -number:
            raise Killed
        assert header.number not in self.staged, "sent twice"
        self.puts.append((header.generation, header.cycle, header.number))
        self.staged[header.number] = frame
        if self.die_at == number:
            raise Killed

    def commit(self, manifest: CycleManifest, frame_count: int) -> RecoveryPoint | None:
        position = manifest.position()
        if self.stands == position:
            return self.all_points[-1] if self.all_points else None
        assert (self.staged_for, self.made_from) == ((manifest.generation, manifest.cycle), manifest.made_from)
        if len(self.staged) != frame_count:
            raise CorruptError(f"{len(self.staged)} frames are staged, {frame_count} were promised")
        for disk in manifest.disks:
            image = self.images.setdefault(disk.disk_id, bytearray())
            _resize(image, disk.size)
        self._apply({disk.disk_id: disk.size for disk in manifest.disks})
        self.stands, self.staged_for, self.staged = position, None, {}
        if self.die_at_commit:
            self.die_at_commit = False
            raise Killed
        return None if manifest.kind is CycleKind.COPY else self._point(manifest)

    def _apply(self, sizes: dict[bytes, int]) -> None:
        for number in sorted(self.staged):
            frame = frames.decode(self.staged[number])
            disk_id = frame.header.disk_id
            apply_frame(self.images[disk_id], frame)
            del self.images[disk_id][sizes[disk_id] :]

    def _point(self, manifest: CycleManifest) -> RecoveryPoint:
        point = RecoveryPoint(
            id=point_id(manifest.generation, manifest.cycle), vm=manifest.vm,
            generation=manifest.generation, cycle=manifest.cycle, time_ns=manifest.sealed_ns,
            consistency=manifest.consistency, disks=manifest.disks, stored_bytes=0,
        )  # fmt: skip
        self.all_points.append(point)
        return point

    def points(self) -> Sequence[RecoveryPoint]:
        return self.all_points


def _resize(image: bytearray, size: int) -> None:
    if len(image) > size:
        del image[size:]
    image.extend(bytes(size - len(image)))


def apply_frame(image: bytearray, frame: frames.Frame) -> None:
    for extent, place in zip(frame.table, frame.positions().tolist(), strict=True):
        offset, length = int(extent["offset"]), int(extent["length"])
        if extent["kind"] == Fill.ZERO:
            length = max(0, min(length, len(image) - offset))
            image[offset : offset + length] = bytes(length)
        else:
            if offset + length > len(image):
                image.extend(bytes(offset + length - len(image)))
            image[offset : offset + length] = frame.data[place : place + length]


def random_bytes(seed: int, length: int) -> bytes:
    return np.random.default_rng(seed).bytes(length)


class NoRecords:
    """Records that nobody looks at; only the orders of this process are kept."""

    def __init__(self) -> None:
        self._orders = Orders()
        self.state = ReplicationState.READY_FOR_INITIAL_REPLICATION

    def apply(self, *events: Event, **fields: object) -> ReplicationState:
        for event in events:
            self.state = next_state(self.state, event)
        self.update(**fields)
        return self.state

    def update(self, **fields: object) -> None:
        self._orders = fields.get("orders", self._orders)

    def orders(self) -> Orders:
        return self._orders

    def change_orders(self, change: Callable[[Orders], Orders]) -> Orders:
        self._orders = change(self._orders)
        return self._orders

    def copy_progress(self) -> None:
        return None

    def last_app_consistent_ns(self) -> None:
        return None

    def cycle(self, report: object, *events: Event, **fields: object) -> ReplicationState:
        return self.apply(*events, **fields)

    def copied(self, report: object) -> None: ...

    def resume(self) -> None: ...

    def missed(self, count: int) -> None: ...

    def failed(self, error: object) -> None: ...
