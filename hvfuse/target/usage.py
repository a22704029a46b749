"""What a store holds and how much room it takes, at a glance: nothing is verified."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hvfuse.manifest import RecoveryPoint
from hvfuse.target import cycles, relation, schema
from hvfuse.target.environment import Txn, file_faults
from hvfuse.target.schema import VmRecord
from hvfuse.target.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class VmUsage:
    """One VM. `journal_bytes`: its frames, those of an unfinished cycle too. `base_bytes`: what the
    replica images take on the disk."""

    name: str
    state: str
    position: str | None
    disks: int
    points: int
    oldest: RecoveryPoint | None
    newest: RecoveryPoint | None
    cycles: int
    journal_bytes: int
    base_bytes: int
    pins: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreUsage:
    """The store. `database_bytes`: what the LMDB file takes; it never shrinks. `map_size`: the address
    space kept for it. `free_bytes`: what is left on the file system."""

    path: str
    format: int
    epoch: int
    map_size: int
    database_bytes: int
    free_bytes: int
    vms: tuple[VmUsage, ...]


def usage(store: Store) -> StoreUsage:
    """Look through the records of a store. Raises CorruptError."""
    pins = [pin.vm for pin in store.pins()]
    with file_faults(store.path):
        statistics = os.statvfs(store.path)
        database = os.stat(os.path.join(store.env.path, "data.mdb"))
    vms = []
    for vm in store.vms():
        with store.env.read() as txn:
            vms.append(_vm_usage(store, txn, store.load_vm(txn, vm.name), pins.count(vm.name)))
    return StoreUsage(
        path=store.path,
        format=schema.FORMAT,
        epoch=store.epoch(),
        map_size=store.env.map_size(),
        database_bytes=database.st_blocks * 512,
        free_bytes=statistics.f_bavail * statistics.f_frsize,
        vms=tuple(vms),
    )


def _vm_usage(store: Store, txn: Txn, vm: VmRecord, pins: int) -> VmUsage:
    records = list(store.scan_cycles(txn, vm))
    points = [record.recovery_point(vm.name) for record in records if record.is_point]
    staged = cycles.placements(txn, store.env, vm, first=vm.head_seq + 1, last=vm.head_seq + 1)
    return VmUsage(
        name=vm.name,
        state=relation.state(txn, store, vm).value,
        position=None if vm.position is None else str(vm.position),
        disks=len(vm.disks),
        points=len(points),
        oldest=points[0] if points else None,
        newest=points[-1] if points else None,
        cycles=vm.head_seq - vm.base_seq,
        journal_bytes=sum(record.stored_bytes for record in records if record.seq > vm.base_seq)
        + sum(placed.stored_length for _, _, placed in staged),
        base_bytes=_allocated(store.replica_folder(vm.name)),
        pins=pins,
    )


def _allocated(folder: str) -> int:
    try:
        with os.scandir(folder) as found:
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in found)
    except FileNotFoundError:
        return 0
