"""Whether a store is whole: every frame decoded, the index held against the frames both ways, the chain
of cycles, images, pins. Reads only; what is wrong comes back as findings, named."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from hvfuse.errors import HvfuseError
from hvfuse.frames import Frame, decode
from hvfuse.manifest import CycleKind
from hvfuse.target import cycles, definitions, schema
from hvfuse.target.admission import MAX_DISK_SIZE
from hvfuse.target.environment import Txn
from hvfuse.target.index import enter, scan
from hvfuse.target.schema import DiskRecord, Placement, PointRecord, VmRecord
from hvfuse.target.store import Store

Progress = Callable[[int], None]
"""Told the bytes of each frame verified."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `vm`: the VM concerned, or "pins"."""

    vm: str
    what: str

    def __str__(self) -> str:
        return f"{self.vm}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What a check saw. The store is whole if there are no findings."""

    vms: int
    points: int
    frames: int
    frame_bytes: int
    findings: tuple[Finding, ...]


def check(store: Store, *, progress: Progress = lambda frame_bytes: None) -> CheckReport:
    """Examine the whole store. Damage is reported, not raised."""
    store.env.ensure(schema.DEFINITIONS)
    with store.env.read() as txn, txn.cursor(db=store.env.db(schema.VMS)) as cursor:
        names = [os.fsdecode(key) for key, _ in cursor]
    run = _Run(progress)
    for name in names:
        with store.env.read() as txn:
            try:
                _VmCheck(store, txn, store.load_vm(txn, name), run).check()
            except HvfuseError as error:
                run.found(name, str(error))
        _check_images(store, name, run)
    _check_pins(store, run)
    return CheckReport(
        vms=len(names),
        points=run.points,
        frames=run.frames,
        frame_bytes=run.frame_bytes,
        findings=tuple(run.findings),
    )


class _Run:
    """What adds up over the VMs."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.findings: list[Finding] = []
        self.points = self.frames = self.frame_bytes = 0

    def found(self, vm: str, what: str) -> None:
        """Note that something is wrong."""
        self.findings.append(Finding(vm, what))


class _VmCheck:
    """One VM, in one snapshot. `_records`: its committed cycles. `_placed`: placements by frame key."""

    def __init__(self, store: Store, txn: Txn, vm: VmRecord, run: _Run) -> None:
        self._store = store
        self._env = store.env
        self._txn = txn
        self._vm = vm
        self._run = run
        self._staging = store.load_staging(txn, vm)
        self._records = list(store.scan_cycles(txn, vm, last=schema.MAX_SEQ - 1))
        self._journal = {record.seq: record for record in self._records if record.seq > vm.base_seq}
        self._placed: dict[bytes, Placement] = {}

    def check(self) -> None:
        """All of it but what lies outside the database."""
        self._check_chain()
        self._check_names()
        self._check_placements()
        first, last = schema.point_key(self._vm.id, 0), schema.point_key(self._vm.id, schema.MAX_SEQ)
        for key, raw in scan(self._txn, self._env, schema.FRAMES, first, last):
            self._check_frame(key, raw)
        self._check_index()
        self._check_definitions()

    def _found(self, what: str) -> None:
        self._run.found(self._vm.name, what)

    def _check_chain(self) -> None:
        """Every cycle from the base to the newest is there and continues the one before it."""
        vm, records = self._vm, self._records
        if not vm.base_seq <= vm.floor_seq <= vm.head_seq:
            self._found(f"base {vm.base_seq}, floor {vm.floor_seq}, head {vm.head_seq}: out of order")
        expected = range(vm.base_seq, vm.head_seq + 1) if vm.position is not None else range(0)
        if [record.seq for record in records] != list(expected):
            self._found(f"the cycles {vm.base_seq} to {vm.head_seq} are not all there, or more are")
        if records and records[-1].position != vm.position:
            self._found(f"its position is {vm.position}, its newest cycle's {records[-1].position}")
        if records and records[-1].disks != vm.disks:
            self._found("its disks are not those of its newest cycle")
        for before, after in itertools.pairwise(records):
            if after.previous is not None and after.previous != before.position:
                self._found(f"cycle {after.position} does not continue {before.position}")

    def _check_names(self) -> None:
        """The listed points, and only they, are found by their names."""
        vm = self._vm
        listed = {record.id: (record.seq, record.time_ns) for record in self._records if record.is_point}
        self._run.points += len(listed)
        if any(seq < vm.floor_seq for seq, _ in listed.values()):
            self._found("a recovery point is listed that was merged already")
        named = scan(self._txn, self._env, schema.POINT_IDS, schema.u32(vm.id), schema.u32(vm.id + 1))
        if {os.fsdecode(key[4:]): schema.unpack_listing(raw) for key, raw in named} != listed:
            self._found("the names of its recovery points are not those of its cycles")

    def _check_placements(self) -> None:
        """Every cycle has as many frames, and bytes of them, as its record says; no others have any."""
        first, last = schema.point_key(self._vm.id, 0), schema.point_key(self._vm.id, schema.MAX_SEQ)
        sums = {seq: [0, 0] for seq in self._journal}
        staged = None if self._staging is None or self._staging.direct else self._staging.seq
        for key, raw in scan(self._txn, self._env, schema.PLACEMENTS, first, last):
            seq, number = schema.seq_and_number(key)
            self._placed[key] = placement = Placement.unpack(raw)
            if seq in sums:
                sums[seq][0] += 1
                sums[seq][1] += placement.stored_length
            elif seq != staged:
                self._found(f"frame {number} of stored cycle {seq} belongs to no cycle")
        for seq, record in self._journal.items():
            if sums[seq] != [record.frame_count, record.stored_bytes]:
                self._found(
                    f"{_name(record)}: {sums[seq][0]} of {record.frame_count} frames, "
                    f"{sums[seq][1]} of {record.stored_bytes} bytes are there"
                )

    def _check_frame(self, key: bytes, raw: bytes) -> None:
        """One frame: whole, where it belongs, and all of it in the index."""
        seq, number = schema.seq_and_number(key)
        record = self._journal.get(seq)
        where = f"frame {number} of {_name(record) if record else f'unfinished cycle {seq}'}"
        self._run.frames += 1
        self._run.frame_bytes += len(raw)
        self._run.progress(len(raw))
        try:
            frame = decode(raw)
        except HvfuseError as error:
            self._found(f"{where} is damaged: {error}")
            return
        placement = self._placed.get(key)
        if placement is None or (record and not _belongs(frame, number, record, placement)):
            self._found(f"{where} is another disk's or cycle's")
            return
        entered = enter(frame)
        if entered.placement(frame.header, disk=placement.disk, stored_length=len(raw)) != placement:
            self._found(f"{where} is placed wrongly")
        items = cycles.index_items(self._vm, seq=seq, disk=placement.disk, number=number, entered=entered)
        if any(self._txn.get(item, db=self._env.db(database)) != value for database, item, value in items):
            self._found(f"{where} and the extent index disagree")

    def _check_index(self) -> None:
        """Every entry of the index is of a frame that is there."""
        vm, strays = self._vm, 0
        span = schema.u32(vm.id), schema.u32(vm.id + 1)
        for key, _ in scan(self._txn, self._env, schema.INDEX, *span):
            _, disk, region, seq, number = schema.unpack_index_key(key)
            frame = self._placed.get(schema.frame_key(vm.id, seq, number))
            strays += frame is None or frame.disk != disk or region not in frame.regions
        for key, _ in scan(self._txn, self._env, schema.WIDE, *span):
            _, disk, seq, number = schema.unpack_wide_key(key)
            frame = self._placed.get(schema.frame_key(vm.id, seq, number))
            strays += frame is None or frame.disk != disk or not frame.wide
        for key in self._placed:
            strays += self._txn.get(key, db=self._env.db(schema.FRAMES)) is None
        if strays:
            self._found(f"{strays} entries of the extent index are of frames that are not there")

    def _check_definitions(self) -> None:
        """Every definition is whole, and every one that is named is there."""
        names = {name for name, _ in definitions.stored(self._txn, self._store, self._vm)}
        names |= {record.definition for record in self._records} | {self._vm.definition}
        for name in sorted(names - {""}):
            try:
                self._store.load_definition(self._txn, self._vm, name)
            except HvfuseError as error:
                self._run.found(self._vm.name, str(error).removeprefix(f"{self._vm.name}: "))


def _belongs(frame: Frame, number: int, record: PointRecord, placement: Placement) -> bool:
    """Whether a frame is the one that its key says, and within bounds."""
    header, position = frame.header, record.position
    ids = {disk.number: disk.disk_id for disk in record.disks}
    ends = frame.table["offset"] + frame.table["length"]
    return (
        header.number == number
        and (header.generation, header.cycle) == (position.generation, position.cycle)
        and ids.get(placement.disk) == header.disk_id
        and not (ends > MAX_DISK_SIZE).any()
    )


def _check_images(store: Store, name: str, run: _Run) -> None:
    """The images are there, and as long as the base's disks, unless they are being written."""
    before = _base(store, name)
    if before is None:
        return
    vm, base = before
    faults = [fault for disk in base.disks if (fault := _image_fault(store, name, disk, base.kind))]
    after = _base(store, name)
    if after is not None and after[0].floor_seq == vm.floor_seq == vm.base_seq:
        for fault in faults:
            run.found(name, fault)


def _base(store: Store, name: str) -> tuple[VmRecord, PointRecord] | None:
    try:
        with store.env.read() as txn:
            vm = store.load_vm(txn, name)
            return None if vm.position is None else (vm, store.load_cycle(txn, vm, vm.base_seq))
    except HvfuseError:  # was found before
        return None


def _image_fault(store: Store, vm: str, disk: DiskRecord, kind: CycleKind) -> str | None:
    """What is wrong with an image; None if nothing is. A copy may leave one longer than the disk."""
    try:
        info = os.lstat(store.image_path(vm, disk.name))
    except OSError as error:
        return f"replica image {disk.name}: {error.strerror}"
    if not stat.S_ISREG(info.st_mode):
        return f"replica image {disk.name} is not a plain file"
    if info.st_size < disk.size or (info.st_size > disk.size and kind is not CycleKind.COPY):
        return f"replica image {disk.name} has {info.st_size} bytes, the disk {disk.size}"
    return None


def _check_pins(store: Store, run: _Run) -> None:
    """Every pin holds a recovery point that is there."""
    try:
        pins = store.pins()
    except HvfuseError as error:
        run.found("pins", str(error))
        return
    for pin in pins:
        try:
            with store.env.read() as txn:
                held = store.load_point(txn, store.load_vm(txn, pin.vm), pin.point_id)
        except HvfuseError as error:
            run.found(pin.vm, f"pin {pin.id}: {error}")
            continue
        if held.seq != pin.seq:
            run.found(pin.vm, f"pin {pin.id} holds another point than it says")


def _name(record: PointRecord) -> str:
    return f"point {record.id}" if record.kind is CycleKind.DELTA else f"copy {record.id}"
