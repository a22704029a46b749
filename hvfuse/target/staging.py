"""Cycles that are not committed yet: begun, taken up again, dropped. All within transactions of the caller's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hvfuse.consistency import Consistency
from hvfuse.errors import BusyError, ResyncRequiredError
from hvfuse.manifest import CycleKind, CycleManifest
from hvfuse.position import Position, PositionMismatchError
from hvfuse.target import cycles, failing_over, relation, schema
from hvfuse.target.admission import is_same
from hvfuse.target.environment import Txn
from hvfuse.target.failing_over import Claim
from hvfuse.target.schema import STAGE_ID_SIZE, UNKNOWN_DISK, DiskRecord, PointRecord, StagingRecord, VmRecord
from hvfuse.target.store import Store


def begin(
    txn: Txn, store: Store, vm_name: str, manifest: CycleManifest, claim: Claim | None = None
) -> tuple[StagingRecord | None, frozenset[int]]:
    """Open a cycle, or take an interrupted one up again. Returns its record, None if the replica stands at it
    already, and the numbers of the frames held. From then on the VM is `claim`'s.

    Raises PositionMismatchError, ResyncRequiredError (a disk that the replica does not know), SuspendedError,
    FencedError, StateError, and BusyError (the replica before it is not wholly deleted).
    """
    kept = store.find_vm(txn, vm_name) or store.create_vm(txn, vm_name)
    relation.demand_open(kept)
    vm = failing_over.claimed(txn, store, kept, claim)
    if vm != kept:
        store.save_vm(txn, vm)
    if vm.position == manifest.position():
        return None, _staged_numbers(txn, store, vm, vm.head_seq)
    if manifest.previous is not None and manifest.previous != vm.position:
        raise PositionMismatchError(
            f"{vm_name}: cycle {manifest.cycle} continues {manifest.previous}, the replica is at "
            f"{vm.position or 'no position'}",
            theirs=vm.position,
        )
    vm, before = relation.begun(txn, store, vm, manifest), vm
    staging = store.load_staging(txn, vm)
    if staging is not None and is_same(staging, manifest):
        if vm != before:
            store.save_vm(txn, vm)
        if not staging.direct:
            return staging, _staged_numbers(txn, store, vm, staging.seq)
        staging = replace(staging, opened=staging.opened + 1)
        _save(txn, store, vm, staging)
        return staging, frozenset(cycles.held_numbers(txn, store.env, vm))
    return _stage(txn, store, drop(txn, store, vm), manifest), frozenset()


def drop(txn: Txn, store: Store, vm: VmRecord) -> VmRecord:
    """Drop what is staged, if anything is. Returns the VM's record as it is then; it may not be saved yet."""
    staging = store.load_staging(txn, vm)
    cycles.drop_frames(txn, store.env, vm, first=vm.head_seq + 1, last=vm.head_seq + 1)
    cycles.drop_held(txn, store.env, vm)
    txn.delete(schema.u32(vm.id), db=store.env.db(schema.STAGING))
    if staging is None or not staging.direct:
        return vm
    return replace(vm, disks=by_name([*vm.disks, *staging.disks]))  # those that may have an image by now


def load_open(
    txn: Txn, store: Store, vm_name: str, opened: StagingRecord | None, claim: Claim | None = None
) -> VmRecord:
    """The VM, whose staged cycle must still be the one that was opened. Raises BusyError, SuspendedError,
    FencedError."""
    vm = store.load_vm(txn, vm_name)
    relation.demand_open(vm)
    failing_over.demand_claim(vm, claim)
    staging = store.load_staging(txn, vm)
    if staging is None or staging != opened:
        raise BusyError(
            f"{vm_name}: another process has taken over; begin the cycle again", hint="try again in a moment"
        )
    return vm


def is_pinned(txn: Txn, store: Store, vm_name: str) -> bool:
    """Whether anybody reads a recovery point of the VM."""
    return any(pin.vm == vm_name for pin in store.scan_pins(txn))


def by_name(disks: Iterable[DiskRecord]) -> tuple[DiskRecord, ...]:
    """One record for each name, the last."""
    return tuple({disk.name: disk for disk in disks}.values())


def _staged_numbers(txn: Txn, store: Store, vm: VmRecord, seq: int) -> frozenset[int]:
    return frozenset(number for _, number, _ in cycles.placements(txn, store.env, vm, first=seq, last=seq))


def _save(txn: Txn, store: Store, vm: VmRecord, staging: StagingRecord) -> None:
    txn.put(schema.u32(vm.id), staging.pack(), db=store.env.db(schema.STAGING))


def _stage(txn: Txn, store: Store, vm: VmRecord, manifest: CycleManifest) -> StagingRecord:
    """Note that a cycle is begun, and how: straight into the images if nobody can read them."""
    whole = manifest.previous is None
    direct = whole and not store.listed(txn, vm) and not is_pinned(txn, store, vm.name)
    numbers = {} if whole else _known_disks(vm, manifest)
    for disk in manifest.disks:
        if disk.disk_id not in numbers:
            numbers[disk.disk_id] = vm.next_disk
            vm = replace(vm, next_disk=vm.next_disk + 1)
    if direct:
        vm = clear(txn, store, vm)
    store.save_vm(txn, vm)
    staging = StagingRecord(
        seq=vm.head_seq + 1,
        direct=direct,
        kind=manifest.kind,
        generation=manifest.generation,
        cycle=manifest.cycle,
        previous=manifest.previous,
        made_from=manifest.made_from,
        disks=tuple(DiskRecord.of(disk, numbers[disk.disk_id]) for disk in manifest.disks),
        stage_id=os.urandom(STAGE_ID_SIZE),
    )
    _save(txn, store, vm, staging)
    return staging


def clear(txn: Txn, store: Store, vm: VmRecord) -> VmRecord:
    """Forget all cycles of a VM without recovery points. Returns its record, not saved: without a position, and
    with the disks that may have an image, so that those of them that are not wanted can go."""
    merged = store.scan_cycles(txn, vm, first=vm.base_seq, last=vm.floor_seq)
    images = by_name([*vm.disks, *(disk for cycle in merged for disk in cycle.disks)])
    cycles.drop_frames(txn, store.env, vm, first=0, last=vm.head_seq)
    cycles.drop_records(txn, store.env, vm, before=vm.head_seq + 1)
    return replace(vm, position=None, base_seq=vm.head_seq, floor_seq=vm.head_seq, disks=images)


def stand_at_copy(txn: Txn, store: Store, vm: VmRecord, disks: Sequence[DiskRecord], position: Position) -> VmRecord:
    """The VM once its images, as they are, are its replica: a copy of a generation that no source knows, so that the
    next one compares. The disks get numbers of their own. Saves the cycle; the VM is to be saved."""
    numbered = tuple(replace(disk, number=number) for number, disk in enumerate(disks, vm.next_disk))
    seq = vm.head_seq + 1
    cycle = PointRecord(
        seq=seq,
        kind=CycleKind.COPY,
        position=position,
        previous=None,
        time_ns=store.clock.now_ns(),
        consistency=Consistency.CRASH,
        is_point=False,
        frame_count=0,
        stored_bytes=0,
        disks=numbered,
    )
    store.save_cycle(txn, vm, cycle)
    return replace(
        vm, position=position, head_seq=seq, base_seq=seq, floor_seq=seq, disks=numbered,
        next_disk=vm.next_disk + len(numbered),
    )  # fmt: skip


def _known_disks(vm: VmRecord, manifest: CycleManifest) -> dict[bytes, int]:
    """The numbers of those of the manifest's disks that continue disks of the replica: all of a cycle's."""
    known = {(disk.disk_id, disk.name): disk.number for disk in vm.disks}
    adopted = {disk.name: disk.number for disk in vm.disks if disk.disk_id == UNKNOWN_DISK}
    numbers = {}
    for disk in manifest.disks:
        number = known.get((disk.disk_id, disk.name))
        if number is None and manifest.kind is CycleKind.DELTA:
            raise ResyncRequiredError(
                f"{vm.name}: the replica has no copy of disk {disk.name}; its log alone does not make one"
            )
        if number is None:
            number = adopted.get(disk.name)
        if number is not None:
            numbers[disk.disk_id] = number
    return numbers
