"""The replica of one VM in a local store: takes cycles in, keeps house.

A cycle's frames go into the journal as they come, under the seq that the cycle will have; nobody looks
there until the one transaction that adds the cycle's record and moves the position. A crash before it
leaves a staged cycle to be taken up again, a crash after it a committed one.

The first copy of a VM that has no recovery points goes straight into the replica images instead. Its
frames count as held only once they are durable there. Meanwhile there is no position.

A COPY that says no `previous` is whole: what its frames do not cover is zeroes, whatever an earlier copy
had there. One that names the replica's position lies over what that has (differences only), and over zeroes
for a disk that the replica does not know yet. While it is open, digests tell what it lies over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hvfuse.errors import BusyError, CorruptError, HvfuseError, ResyncRequiredError
from hvfuse.extent import Extent
from hvfuse.formats.digests import Digests
from hvfuse.frames import Fill, Frame, unpack_header
from hvfuse.manifest import CycleKind, CycleManifest, RecoveryPoint
from hvfuse.position import Position, PositionMismatchError
from hvfuse.target import cycles, schema
from hvfuse.target.admission import admit_frame, check_manifest, check_name, is_same
from hvfuse.target.digests import HeldBlocks
from hvfuse.target.environment import Txn
from hvfuse.target.images import ReplicaImages
from hvfuse.target.index import enter
from hvfuse.target.merge import merge
from hvfuse.target.retention import RetentionPolicy, retain
from hvfuse.target.schema import DiskRecord, Placement, PointRecord, StagingRecord, VmRecord
from hvfuse.target.store import Store

DIRECT_BATCH = 128 << 20
"""Bytes put straight into images before they are synced and noted as held: what a crash repeats."""
PENDING_OVERHEAD = 64 << 10
"""Bytes that any frame stands for, however small: bounds the number in a batch."""


class IncompleteCycleError(HvfuseError):
    """A commit came before all of the cycle's frames. Begin it again and put what is missing."""

    recoverable = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Housekeeping:
    """What keeping house did: points taken off the list, cycles merged into the images."""

    points_dropped: int
    cycles_merged: int


class LocalReplica:
    """The replica of VM `vm` in `store`. For one thread at a time; several processes may each have one.

    What is asked of it, and what it raises, is the shipper's `Replica`; beyond that BusyError when
    another process takes in the same VM's cycle, and IncompleteCycleError.
    """

    def __init__(self, store: Store, vm: str) -> None:
        check_name(vm, "VM")
        self._store = store
        self._env = store.env
        self._vm = vm
        self._open: StagingRecord | None = None
        self._images: ReplicaImages | None = None
        self._blocks: HeldBlocks | None = None
        # Frames of a direct copy that are in the images, but not yet durably, and what they stand for.
        self._pending: set[int] = set()
        self._pending_bytes = 0

    def close(self) -> None:
        """Let files go. What was put but is not durable counts as never put."""
        self._open = None
        self._pending.clear()
        self._pending_bytes = 0
        if self._images is not None:
            self._images.close()
            self._images = None
        if self._blocks is not None:
            self._blocks.close()
            self._blocks = None

    def position(self) -> Position | None:
        """Where the replica stands; None before its first copy was committed."""
        with self._env.read() as txn:
            vm = self._store.find_vm(txn, self._vm)
        return None if vm is None else vm.position

    def points(self) -> tuple[RecoveryPoint, ...]:
        """The recovery points, oldest first."""
        with self._env.read() as txn:
            vm = self._store.find_vm(txn, self._vm)
            if vm is None:
                return ()
            return tuple(cycle.recovery_point(self._vm) for cycle in self._store.scan_points(txn, vm))

    # Taking a cycle in

    def begin(self, manifest: CycleManifest) -> frozenset[int]:
        """Open a cycle, or take an interrupted one up again. Returns the numbers of the frames held.

        Raises PositionMismatchError, ResyncRequiredError (a disk that the replica does not know), and
        CorruptError (an impossible manifest).
        """
        self._check_manifest(manifest)
        self.close()
        staging, held = self._store.write("store:begin", lambda txn: self._begin(txn, manifest))
        self._open = staging
        if staging is not None and staging.direct:
            self._images = ReplicaImages(self._store.replica_folder(self._vm))
            if not held:
                with self._images.lock():
                    self._images.blank(disk.name for disk in staging.disks)
        if staging is not None and staging.kind is CycleKind.COPY and staging.previous is not None:
            numbers = {disk.disk_id: disk.number for disk in staging.disks}
            self._blocks = HeldBlocks(self._store, self._vm, numbers)
        return held

    def _begin(self, txn: Txn, manifest: CycleManifest) -> tuple[StagingRecord | None, frozenset[int]]:
        vm = self._store.find_vm(txn, self._vm) or self._store.create_vm(txn, self._vm)
        if vm.position == manifest.position():
            return None, self._staged_numbers(txn, vm, vm.head_seq)
        if manifest.previous is not None and manifest.previous != vm.position:
            raise PositionMismatchError(
                f"{self._vm}: cycle {manifest.cycle} continues {manifest.previous}, the replica is at "
                f"{vm.position or 'no position'}",
                theirs=vm.position,
            )
        staging = self._store.load_staging(txn, vm)
        if staging is not None and is_same(staging, manifest):
            held = cycles.held_numbers(txn, self._env, vm) if staging.direct else ()
            return staging, frozenset(held) or self._staged_numbers(txn, vm, staging.seq)
        self._drop_staged(txn, vm)
        if staging is not None and staging.direct:
            vm = replace(vm, disks=_by_name([*vm.disks, *staging.disks]))
        return self._stage(txn, vm, manifest), frozenset()

    def _staged_numbers(self, txn: Txn, vm: VmRecord, seq: int) -> frozenset[int]:
        return frozenset(number for _, number, _ in cycles.placements(txn, self._env, vm, first=seq, last=seq))

    def _drop_staged(self, txn: Txn, vm: VmRecord) -> None:
        cycles.drop_frames(txn, self._env, vm, first=vm.head_seq + 1, last=vm.head_seq + 1)
        cycles.drop_held(txn, self._env, vm)
        txn.delete(schema.u32(vm.id), db=self._env.db(schema.STAGING))

    def _stage(self, txn: Txn, vm: VmRecord, manifest: CycleManifest) -> StagingRecord:
        """Note that a cycle is begun, and how: straight into the images if nobody can read them."""
        whole = manifest.previous is None
        direct = whole and not self._store.listed(txn, vm) and not self._is_pinned(txn)
        numbers = {} if whole else self._known_disks(vm, manifest)
        for disk in manifest.disks:
            if disk.disk_id not in numbers:
                numbers[disk.disk_id] = vm.next_disk
                vm = replace(vm, next_disk=vm.next_disk + 1)
        if direct:
            # Until the commit, these are the disks that may have an image: it says which of them can go.
            merged = self._store.scan_cycles(txn, vm, first=vm.base_seq, last=vm.floor_seq)
            images = _by_name([*vm.disks, *(disk for cycle in merged for disk in cycle.disks)])
            cycles.drop_frames(txn, self._env, vm, first=0, last=vm.head_seq)
            cycles.drop_records(txn, self._env, vm, before=vm.head_seq + 1)
            vm = replace(vm, position=None, base_seq=vm.head_seq, floor_seq=vm.head_seq, disks=images)
        self._store.save_vm(txn, vm)
        staging = StagingRecord(
            seq=vm.head_seq + 1,
            direct=direct,
            kind=manifest.kind,
            generation=manifest.generation,
            cycle=manifest.cycle,
            previous=manifest.previous,
            made_from=manifest.made_from,
            disks=tuple(DiskRecord.of(disk, numbers[disk.disk_id]) for disk in manifest.disks),
        )
        txn.put(schema.u32(vm.id), staging.pack(), db=self._env.db(schema.STAGING))
        return staging

    def _is_pinned(self, txn: Txn) -> bool:
        return any(pin.vm == self._vm for pin in self._store.scan_pins(txn))

    def _known_disks(self, vm: VmRecord, manifest: CycleManifest) -> dict[bytes, int]:
        """The numbers of those of the manifest's disks that continue disks of the replica: all of a cycle's."""
        known = {(disk.disk_id, disk.name): disk.number for disk in vm.disks}
        for disk in manifest.disks:
            if manifest.kind is CycleKind.DELTA and (disk.disk_id, disk.name) not in known:
                raise ResyncRequiredError(
                    f"{self._vm}: the replica has no copy of disk {disk.name}; its log alone does not make one"
                )
        found = ((disk.disk_id, known.get((disk.disk_id, disk.name))) for disk in manifest.disks)
        return {disk_id: number for disk_id, number in found if number is not None}

    def extent(self, disk_id: bytes) -> int:
        """See `Replica`: of a disk of the open COPY."""
        return self._held_blocks().extent(disk_id)

    def digests(self, disk_id: bytes, extents: Sequence[Extent], seed: int) -> Digests:
        """See `Replica`: of a disk of the open COPY. For any thread."""
        return self._held_blocks().digests(disk_id, extents, seed)

    def _held_blocks(self) -> HeldBlocks:
        if self._blocks is None:
            raise HvfuseError(f"{self._vm}: no copy of differences is open")
        return self._blocks

    def put(self, frame: bytes) -> None:
        """Stage one encoded frame of the open cycle. Verified before it is kept.

        Raises CorruptError, UnsupportedError; nothing of a refused frame is kept.
        """
        if self._open is None:
            self._check_repeated(frame)
            return
        admitted, disk = admit_frame(frame, self._open)
        if self._open.direct:
            self._put_direct(admitted, disk)
            return
        entered = enter(admitted)

        def act(txn: Txn) -> None:
            vm, staging = self._load_open(txn)
            key = schema.frame_key(vm.id, staging.seq, admitted.header.number)
            known = txn.get(key, db=self._env.db(schema.PLACEMENTS))
            if known is None:
                cycles.store_frame(
                    txn, self._env, vm, seq=staging.seq, disk=disk.number, frame=admitted, raw=frame,
                    entered=entered,
                )  # fmt: skip
            elif staging.kind is CycleKind.DELTA and Placement.unpack(known).digest != admitted.header.digest:
                raise CorruptError(f"{self._vm}: frame {admitted.header.number} came before with other contents")

        self._store.write("store:put", act)

    def _check_repeated(self, frame: bytes) -> None:
        """Without an open cycle, a frame is nothing new only if it is of the cycle just committed."""
        header, position = unpack_header(frame), self.position()
        if position is None or (header.generation, header.cycle) != (position.generation, position.cycle):
            raise HvfuseError(f"{self._vm}: a frame came while no cycle was open")

    def _load_open(self, txn: Txn) -> tuple[VmRecord, StagingRecord]:
        """The VM and its staged cycle, which must still be the one that was opened here."""
        vm = self._store.load_vm(txn, self._vm)
        staging = self._store.load_staging(txn, vm)
        if staging is None or staging != self._open:
            raise BusyError(f"{self._vm}: another process has taken over; begin the cycle again")
        return vm, staging

    def _put_direct(self, frame: Frame, disk: DiskRecord) -> None:
        """Apply a frame to the image, unless it is there already."""
        number = frame.header.number
        assert self._images is not None
        with self._images.lock():
            with self._env.read() as txn:
                vm, _ = self._load_open(txn)
                held = txn.get(schema.held_key(vm.id, number), db=self._env.db(schema.HELD)) is not None
            if held or number in self._pending:
                return
            rows = zip(frame.table.tolist(), frame.positions().tolist(), strict=True)
            for (offset, length, kind), at in rows:
                if kind == Fill.DATA:
                    self._images.write(disk.name, offset, frame.data[at : at + length])
                else:
                    self._images.zero(disk.name, offset, length)
        self._pending.add(number)
        self._pending_bytes += frame.header.plain_length + PENDING_OVERHEAD
        if self._pending_bytes >= DIRECT_BATCH:
            self._flush_direct()

    def _flush_direct(self) -> None:
        """Make the images durable, then note the frames in them as held."""
        assert self._images is not None
        self._images.sync()

        def act(txn: Txn) -> None:
            vm, _ = self._load_open(txn)
            for number in self._pending:
                txn.put(schema.held_key(vm.id, number), b"", db=self._env.db(schema.HELD))

        self._store.write("store:held", act)
        self._pending.clear()
        self._pending_bytes = 0

    def commit(self, manifest: CycleManifest, frame_count: int) -> RecoveryPoint | None:
        """Make the cycle durable, wholly or not at all. Returns its recovery point, None for a COPY.

        Raises IncompleteCycleError, PositionMismatchError (the cycle is not open here or there),
        CorruptError (data beyond a disk's end).
        """
        self._check_manifest(manifest)
        if self._open is not None and self._open.direct and is_same(self._open, manifest):
            self._finish_images(manifest)
        cycle = self._store.write("store:commit", lambda txn: self._commit(txn, manifest, frame_count))
        self.close()
        return cycle.recovery_point(self._vm) if manifest.kind is CycleKind.DELTA else None

    def _finish_images(self, manifest: CycleManifest) -> None:
        """Make the images as long as the disks, and durable. What was copied beyond a disk that became
        shorter meanwhile stays: cycles between may need it, and the one that cut it off says so. The images
        of disks that the VM has no more go."""
        assert self._images is not None
        with self._images.lock(), self._env.read() as txn:
            vm, _ = self._load_open(txn)
            for name in {disk.name for disk in vm.disks} - {disk.name for disk in manifest.disks}:
                self._images.remove(name)
            for disk in manifest.disks:
                self._images.resize(disk.name, max(disk.size, self._images.size(disk.name)))
        self._flush_direct()

    def _commit(self, txn: Txn, manifest: CycleManifest, frame_count: int) -> PointRecord:
        vm = self._store.load_vm(txn, self._vm)
        if vm.position == manifest.position():
            return self._store.load_cycle(txn, vm, vm.head_seq)
        staging = self._store.load_staging(txn, vm)
        if staging is None or not is_same(staging, manifest) or staging != self._open:
            raise PositionMismatchError(
                f"{self._vm}: cycle {manifest.cycle} was not begun; the replica is at {vm.position or 'no position'}",
                theirs=vm.position,
            )
        stored_bytes = self._check_complete(txn, vm, staging, manifest, frame_count)
        numbers = {disk.disk_id: disk.number for disk in staging.disks}
        cycle = PointRecord(
            seq=staging.seq,
            kind=manifest.kind,
            position=manifest.position(),
            previous=manifest.previous,
            time_ns=manifest.sealed_ns,
            consistency=manifest.consistency,
            is_point=manifest.kind is CycleKind.DELTA,
            frame_count=0 if staging.direct else frame_count,
            stored_bytes=stored_bytes,
            disks=tuple(DiskRecord.of(disk, numbers[disk.disk_id]) for disk in manifest.disks),
        )
        self._store.save_cycle(txn, vm, cycle)
        vm = replace(vm, position=cycle.position, head_seq=cycle.seq, disks=cycle.disks)
        if staging.direct:
            vm = replace(vm, base_seq=cycle.seq, floor_seq=cycle.seq)
            cycles.drop_held(txn, self._env, vm)
        self._store.save_vm(txn, vm)
        txn.delete(schema.u32(vm.id), db=self._env.db(schema.STAGING))
        return cycle

    def _check_complete(
        self, txn: Txn, vm: VmRecord, staging: StagingRecord, manifest: CycleManifest, frame_count: int
    ) -> int:
        """All frames are there, and within their disks. Returns their bytes in the journal."""
        sizes = {disk.number: disk for disk in staging.disks}
        ends = {disk.disk_id: disk.size for disk in manifest.disks}
        count = stored_bytes = last = 0
        if staging.direct:
            count = sum(1 for _ in cycles.held_numbers(txn, self._env, vm))
        for _, number, placed in cycles.placements(txn, self._env, vm, first=staging.seq, last=staging.seq):
            disk = sizes[placed.disk]
            if manifest.kind is CycleKind.DELTA and placed.data_end > ends[disk.disk_id]:
                raise CorruptError(f"{self._vm}: frame {number} holds data beyond the end of {disk.name}")
            count, last, stored_bytes = count + 1, number, stored_bytes + placed.stored_length
        # The frames of a copy are numbered by their place, with gaps; those of a cycle without.
        gaps = manifest.kind is CycleKind.DELTA and count and last != count - 1
        if count != frame_count or gaps:
            raise IncompleteCycleError(
                f"{self._vm}: {count} of {frame_count} frames of cycle {manifest.cycle} are there"
            )
        return stored_bytes

    def _check_manifest(self, manifest: CycleManifest) -> None:
        check_manifest(manifest)
        if manifest.vm != self._vm:
            raise CorruptError(f"{self._vm}: a manifest of VM {manifest.vm!r}")

    # Keeping house

    def housekeep(self, policy: RetentionPolicy, now_ns: int) -> Housekeeping:
        """Let go of the points that the policy does not keep and no pin holds, and merge their cycles.

        Raises BusyError while another process merges.
        """
        self._env.reader_check()
        with self._env.read() as txn:
            vm = self._store.find_vm(txn, self._vm)
        if vm is None or vm.position is None:
            return Housekeeping(points_dropped=0, cycles_merged=0)
        dropped, oldest = self._store.write("store:thin", lambda txn: self._thin(txn, policy, now_ns))
        merged = merge(self._store, self._vm, oldest) if oldest is not None else 0
        return Housekeeping(points_dropped=dropped, cycles_merged=merged)

    def _thin(self, txn: Txn, policy: RetentionPolicy, now_ns: int) -> tuple[int, int | None]:
        """Take points off the list. Returns how many, and the seq of the oldest that stays."""
        vm = self._store.load_vm(txn, self._vm)
        listed = self._store.listed(txn, vm)
        keep = retain(listed, policy, now_ns)
        keep |= {pin.seq for pin in self._store.scan_pins(txn) if pin.vm == self._vm}
        gone = {seq for seq, _ in listed} - keep
        for seq in gone:
            self._store.save_cycle(txn, vm, self._store.load_cycle(txn, vm, seq).unlisted())
        return len(gone), min((seq for seq, _ in listed if seq in keep), default=None)


def _by_name(disks: Iterable[DiskRecord]) -> tuple[DiskRecord, ...]:
    return tuple({disk.name: disk for disk in disks}.values())
