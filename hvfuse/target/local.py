"""The replica of one VM in a local store: takes cycles in, keeps house.

A cycle's frames go into the journal as they come, under the seq that the cycle will have; nobody looks
there until the one transaction that adds the cycle's record and moves the position. A crash before it
leaves a staged cycle to be taken up again, a crash after it a committed one.

The first copy of a VM that has no recovery points goes straight into the replica images instead
(`hvfuse.target.direct`). Meanwhile there is no position.

A COPY that says no `previous` is whole: what its frames do not cover is zeroes, whatever an earlier copy
had there. One that names the replica's position lies over what that has (differences only), and over zeroes
for a disk that the replica does not know yet. While it is open, digests tell what it lies over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from hvfuse.errors import CorruptError, HvfuseError
from hvfuse.extent import Extent
from hvfuse.formats.digests import DigestKey, Digests
from hvfuse.frames import FrameHeader, unpack_header
from hvfuse.manifest import CycleKind, CycleManifest, RecoveryPoint
from hvfuse.position import Position, PositionMismatchError
from hvfuse.states import AFTER_FAILOVER
from hvfuse.target import cycles, definitions, failing_over, relation, schema, staging, unsynced
from hvfuse.target.admission import admit_frame, check_manifest, check_name, is_same
from hvfuse.target.digests import HeldBlocks, held_ends
from hvfuse.target.direct import DirectCopy
from hvfuse.target.environment import Txn
from hvfuse.target.failing_over import Claim
from hvfuse.target.index import Entered, enter
from hvfuse.target.merge import merge
from hvfuse.target.retention import RetentionPolicy, retain
from hvfuse.target.schema import DiskRecord, Placement, PointRecord, StagingRecord, VmRecord
from hvfuse.target.store import Store
from hvfuse.target.verify import Inspection, inspect

SMALL_FRAME = 512
"""Bytes; a staged frame of a copy that is no larger, such as the closing one of a group without data, need not
have a transaction of its own."""
SMALL_FRAMES = 256
"""How many of them wait at most."""
WAITING_BYTES = 16 << 20
"""Bytes of a cycle's frames that wait at most, the one that ends the waiting not counted."""
WAITING_PERIOD = 0.25
"""Seconds since the last transaction within which a frame waits: what a death repeats is what was done that
quickly."""


class IncompleteCycleError(HvfuseError):
    """A commit came before all of the cycle's frames. Begin it again and put what is missing."""

    recoverable = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Housekeeping:
    """What keeping house did: points taken off the list, cycles merged into the images."""

    points_dropped: int
    cycles_merged: int


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A frame that was verified, as it came, and where it goes."""

    header: FrameHeader
    disk: DiskRecord
    raw: bytes
    entered: Entered


class LocalReplica:
    """The replica of VM `vm` in `store`. For one thread at a time; several processes may each have one.

    `claim`: asked for who ships, each time that something is taken in; it has to have the VM, or get it
    (`hvfuse.target.failing_over`). None: nobody says who.

    What is asked of it, and what it raises, is the shipper's `Replica`; beyond that BusyError when
    another process takes in the same VM's cycle, IncompleteCycleError, and from whatever takes something in
    SuspendedError, while an administrator has suspended the replica, and FencedError.
    """

    def __init__(self, store: Store, vm: str, *, claim: Callable[[], Claim] | None = None) -> None:
        check_name(vm, "VM")
        self._claim: Callable[[], Claim | None] = claim or (lambda: None)
        self._store = store
        self._env = store.env
        self._vm = vm
        self._open: StagingRecord | None = None
        self._direct: DirectCopy | None = None
        self._blocks: HeldBlocks | None = None
        # Frames that wait for the next transaction, by number, and when (monotonic, seconds) there was one.
        self._waiting: dict[int, _Admitted] = {}
        self._written_at = 0.0

    def close(self) -> None:
        """Let files go. What waits to be staged counts as never put."""
        self._open = None
        self._waiting = {}
        if self._direct is not None:
            self._direct.close()
            self._direct = None
        if self._blocks is not None:
            self._blocks.close()
            self._blocks = None

    def keeps_frames(self) -> bool:
        """See `Replica`: a first copy goes into the images."""
        return self._direct is None

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

    def define(self, definition: bytes) -> None:
        """See `Replica`. Raises as `definitions.define`."""
        definitions.define(self._store, self._vm, definition, self._claim())

    def inspect(self, *, from_medium: bool) -> Inspection | None:
        """See `Replica`."""
        return inspect(self._store, self._vm, from_medium=from_medium)

    # Taking a cycle in

    def begin(self, manifest: CycleManifest) -> frozenset[int]:
        """Open a cycle, or take an interrupted one up again. Returns the numbers of the frames held.

        Raises PositionMismatchError, ResyncRequiredError (a disk that the replica does not know), and
        CorruptError (an impossible manifest).
        """
        self._check_manifest(manifest)
        if self._open is not None and is_same(self._open, manifest):
            with suppress(HvfuseError):  # they are to be put again, then
                self._stage()
        self.close()
        opened, held = self._store.write(
            "store:begin", lambda txn: staging.begin(txn, self._store, self._vm, manifest, self._claim())
        )
        try:
            if opened is not None:
                held = self._prepare(opened, held)
        except BaseException:
            self.close()
            raise
        self._open = opened
        self._written_at = self._store.clock.monotonic()
        return held

    def _prepare(self, opened: StagingRecord, held: frozenset[int]) -> frozenset[int]:
        """Open what the cycle needs. Returns the frames that count as held."""
        if opened.direct:
            self._direct = DirectCopy(self._store, self._vm, opened)
            return self._direct.take_up(held)
        if opened.kind is CycleKind.COPY:
            unsynced.drop(self._store.unsynced_path(self._vm))  # of a first copy that was given up
            if opened.previous is not None:
                self._blocks = HeldBlocks(self._store, self._vm, {disk.disk_id: disk.number for disk in opened.disks})
        return held

    def abandon(self) -> None:
        """See `Replica`. What a first copy has put into the images stays there, unseen, until the next one."""
        self.close()
        with self._env.read() as txn:
            vm = self._store.find_vm(txn, self._vm)
            staged = vm is not None and self._store.load_staging(txn, vm) is not None
        if staged:
            self._store.write("store:abandon", self._abandon)
        unsynced.drop(self._store.unsynced_path(self._vm))

    def _abandon(self, txn: Txn) -> None:
        vm = self._store.load_vm(txn, self._vm)
        failing_over.demand_claim(vm, self._claim())
        self._store.save_vm(txn, relation.abandoned(staging.drop(txn, self._store, vm)))

    def extent(self, disk_id: bytes) -> int:
        """See `Replica`: of a disk of the open COPY."""
        return self._held_blocks().extent(disk_id)

    def occupied(self, disk_id: bytes, low: int, high: int) -> Sequence[Extent]:
        """See `Replica`: of a disk of the open COPY. For any thread."""
        return self._held_blocks().occupied(disk_id, low, high)

    def summaries(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """See `Replica`: of a disk of the open COPY. For any thread."""
        return self._held_blocks().summaries(disk_id, extents, key)

    def digests(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """See `Replica`: of a disk of the open COPY. For any thread."""
        return self._held_blocks().digests(disk_id, extents, key)

    def _held_blocks(self) -> HeldBlocks:
        if self._blocks is None:
            raise HvfuseError(f"{self._vm}: no copy of differences is open")
        return self._blocks

    def put(self, frame: bytes) -> None:
        """Stage one encoded frame of the open cycle. Verified before it is kept; durable with one of those that follow,
        at the latest when the cycle is committed.

        Raises CorruptError, UnsupportedError; nothing of a refused frame is kept.
        """
        if self._open is None:
            self._check_repeated(frame)
            return
        admitted, disk = admit_frame(frame, self._open)
        if self._direct is not None:
            self._direct.put(admitted, disk)
            return
        number = admitted.header.number
        if not self._is_known(admitted.header):
            self._waiting[number] = _Admitted(admitted.header, disk, frame, enter(admitted))
        if not self._may_wait(frame):
            self._stage()

    def _is_known(self, header: FrameHeader) -> bool:
        """Whether the frame came before, be it staged or waiting. Raises CorruptError for one with other contents, and
        whatever keeps frames of the cycle from being staged."""
        assert self._open is not None
        with self._env.read() as txn:
            vm = staging.load_open(txn, self._store, self._vm, self._open, self._claim())
            staged = self._staged_digest(txn, vm, header.number)
        waiting = self._waiting.get(header.number)
        digest = staged if waiting is None else waiting.header.digest
        if self._open.kind is CycleKind.DELTA and digest not in (None, header.digest):
            raise CorruptError(f"{self._vm}: frame {header.number} came before with other contents")
        return digest is not None

    def _staged_digest(self, txn: Txn, vm: VmRecord, number: int) -> bytes | None:
        assert self._open is not None
        key = schema.frame_key(vm.id, self._open.seq, number)
        raw = txn.get(key, db=self._env.db(schema.PLACEMENTS))
        return None if raw is None else Placement.unpack(raw).digest

    def _may_wait(self, frame: bytes) -> bool:
        """Whether the frames that wait, with the one that came last, may share a transaction with those to come."""
        assert self._open is not None
        if self._store.clock.monotonic() - self._written_at >= WAITING_PERIOD:
            return False
        if self._open.kind is CycleKind.COPY:
            return len(frame) <= SMALL_FRAME and len(self._waiting) <= SMALL_FRAMES
        return sum(len(each.raw) for each in self._waiting.values()) < WAITING_BYTES

    def _stage(self) -> None:
        """Put those that wait, in one transaction."""
        if self._waiting:
            self._store.write("store:put", self._stage_waiting)
            self._waiting = {}
            self._written_at = self._store.clock.monotonic()

    def _stage_waiting(self, txn: Txn) -> None:
        vm = staging.load_open(txn, self._store, self._vm, self._open, self._claim())
        assert self._open is not None
        for each in self._waiting.values():
            cycles.store_frame(
                txn, self._env, vm, seq=self._open.seq, disk=each.disk.number, header=each.header, raw=each.raw,
                entered=each.entered,
            )  # fmt: skip

    def _check_repeated(self, frame: bytes) -> None:
        """Without an open cycle, a frame is nothing new only if it is of the cycle just committed."""
        header, position = unpack_header(frame), self.position()
        if position is None or (header.generation, header.cycle) != (position.generation, position.cycle):
            raise HvfuseError(f"{self._vm}: a frame came while no cycle was open")

    def commit(self, manifest: CycleManifest, frame_count: int) -> RecoveryPoint | None:
        """Make the cycle durable, wholly or not at all. Returns its recovery point, None for a COPY.

        Raises IncompleteCycleError, PositionMismatchError (the cycle is not open here or there),
        CorruptError (data beyond a disk's end).
        """
        self._check_manifest(manifest)
        if self._open is None or not is_same(self._open, manifest):
            self._waiting = {}
        elif self._direct is not None:
            self._direct.finish(manifest)
        cycle = self._store.write("store:commit", lambda txn: self._commit(txn, manifest, frame_count))
        if self._direct is not None:
            self._direct.forget()
        self.close()
        return cycle.recovery_point(self._vm) if manifest.kind is CycleKind.DELTA else None

    def _commit(self, txn: Txn, manifest: CycleManifest, frame_count: int) -> PointRecord:
        if self._waiting:
            self._stage_waiting(txn)
        vm = self._store.load_vm(txn, self._vm)
        relation.demand_open(vm)
        failing_over.demand_claim(vm, self._claim())
        if vm.position == manifest.position():
            return self._store.load_cycle(txn, vm, vm.head_seq)
        opened = self._store.load_staging(txn, vm)
        if opened is None or not is_same(opened, manifest) or opened != self._open:
            raise PositionMismatchError(
                f"{self._vm}: cycle {manifest.cycle} was not begun; the replica is at {vm.position or 'no position'}",
                theirs=vm.position,
            )
        stored_bytes = self._check_complete(txn, vm, opened, manifest, frame_count)
        numbers = {disk.disk_id: disk.number for disk in opened.disks}
        ends = None
        if manifest.kind is CycleKind.COPY and not opened.direct:
            found = cycles.data_ends(txn, self._env, vm, seq=opened.seq)
            below = {} if opened.previous is None else held_ends(self._store, txn, vm)
            ends = tuple(
                max(found.get(numbers[disk.disk_id], 0), below.get(numbers[disk.disk_id], 0)) for disk in manifest.disks
            )
        cycle = PointRecord(
            seq=opened.seq,
            kind=manifest.kind,
            position=manifest.position(),
            previous=manifest.previous,
            time_ns=manifest.sealed_ns,
            consistency=manifest.consistency,
            is_point=manifest.kind is CycleKind.DELTA,
            frame_count=0 if opened.direct else frame_count,
            stored_bytes=stored_bytes,
            disks=tuple(DiskRecord.of(disk, numbers[disk.disk_id]) for disk in manifest.disks),
            data_ends=ends,
            definition=vm.definition if manifest.kind is CycleKind.DELTA else "",
        )
        self._store.save_cycle(txn, vm, cycle)
        vm = relation.committed(txn, self._store, vm, manifest)
        vm = replace(vm, position=cycle.position, head_seq=cycle.seq, disks=cycle.disks)
        if opened.direct:
            vm = replace(vm, base_seq=cycle.seq, floor_seq=cycle.seq)
            cycles.drop_held(txn, self._env, vm)
        self._store.save_vm(txn, vm)
        txn.delete(schema.u32(vm.id), db=self._env.db(schema.STAGING))
        return cycle

    def _check_complete(
        self, txn: Txn, vm: VmRecord, opened: StagingRecord, manifest: CycleManifest, frame_count: int
    ) -> int:
        """All frames are there, and within their disks. Returns their bytes in the journal."""
        sizes = {disk.number: disk for disk in opened.disks}
        ends = {disk.disk_id: disk.size for disk in manifest.disks}
        count = stored_bytes = last = 0
        if opened.direct:
            count = sum(1 for _ in cycles.held_numbers(txn, self._env, vm))
        for _, number, placed in cycles.placements(txn, self._env, vm, first=opened.seq, last=opened.seq):
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

        Nothing is let go while a failover stands. Raises BusyError while another process merges, FencedError where
        `claim` must not ship the VM.
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
        claim = self._claim()
        if claim is None and failing_over.state_of(vm) in AFTER_FAILOVER:
            return 0, None
        failing_over.demand_claim(vm, claim)
        listed = self._store.listed(txn, vm)
        keep = retain(listed, policy, now_ns)
        keep |= {pin.seq for pin in self._store.scan_pins(txn) if pin.vm == self._vm}
        gone = {seq for seq, _ in listed} - keep
        for seq in gone:
            self._store.save_cycle(txn, vm, self._store.load_cycle(txn, vm, seq).unlisted())
        definitions.drop_unnamed(txn, self._store, vm)
        return len(gone), min((seq for seq, _ in listed if seq in keep), default=None)
