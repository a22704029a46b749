"""Deleting a VM's replica: all keys of it in every database, its images, its note.

The first transaction takes the VM's record away and leaves a mark in its place: from then on there is no replica, and
no new one of that name before what is left of the old one is gone. That goes in transactions of bounded size. The
mark goes last: killed anywhere, `remove` goes on where it was.

A new replica gets a number of its own, so no key of the old one can be taken for one of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

from hvfuse import system
from hvfuse.errors import BusyError, NotFoundError
from hvfuse.states import FAILOVER_DONE
from hvfuse.target import schema, unsynced
from hvfuse.target.environment import Txn, file_faults
from hvfuse.target.images import ReplicaImages
from hvfuse.target.index import scan
from hvfuse.target.schema import VmRecord
from hvfuse.target.store import Store, holder_is_alive

BATCH = 512
"""Keys deleted in one transaction."""

_OF_VM = (
    schema.POINTS, schema.POINT_IDS, schema.FRAMES, schema.PLACEMENTS, schema.INDEX, schema.WIDE, schema.STAGING,
    schema.HELD, schema.DEFINITIONS,
)  # fmt: skip
"""Databases whose keys begin with the number of a VM."""
_HELD_BY_LIFE = "reader"
"""Kind of a pin that means nothing once its process is gone."""


def remove(store: Store, vm_name: str) -> bool:
    """Delete the replica of a VM, or go on with that. Returns whether there was anything to delete.

    Of a VM that was failed over for good the record stays, as if it was emptied: without it, its old source would be
    let in again, while another home has the VM. Nobody else may take anything in for it meanwhile. Raises BusyError
    while a recovery point is pinned (a test failover stands) or the images are being written.
    """
    with store.env.read() as txn:
        vm = store.find_vm(txn, vm_name)
        is_gone = vm is None or (vm.state in FAILOVER_DONE and _is_empty(vm))
        if is_gone and not store.half_deleted(txn, vm_name):
            return False
    _remove(store, vm_name, lambda txn: _mark(txn, store, vm_name))
    return True


def empty(
    store: Store, vm_name: str, keep: Callable[[VmRecord], VmRecord], *, own_pin: Callable[[VmRecord], int]
) -> None:
    """Delete what a replica holds but for its record, as `keep` makes it, and with it the pin `own_pin`; or go on with
    that. As `remove`. Both are asked within the transaction, while nobody else writes the images, and may raise:
    nothing happens then. Raises NotFoundError."""

    def renew(txn: Txn) -> None:
        vm = store.load_vm(txn, vm_name)
        pin = own_pin(vm)
        if not _is_empty(vm):
            store.delete_pin(txn, pin)
            _renew(txn, store, vm, keep)

    _remove(store, vm_name, renew)


def _remove(store: Store, vm_name: str, mark: Callable[[Txn], None]) -> None:
    folder = store.replica_folder(vm_name)
    with file_faults(folder):
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
    with ReplicaImages(folder) as images, images.lock():
        store.write("removal:mark", mark)
        with store.env.read() as txn:
            numbers = store.half_deleted(txn, vm_name)
        unsynced.drop(store.unsynced_path(vm_name))
        with file_faults(folder):
            system.passing("removal:images")
            shutil.rmtree(folder)
            system.fsync_directory("removal:folder", os.path.dirname(folder))
    store.env.ensure(schema.DEFINITIONS)
    for number in numbers:
        for database in _OF_VM:
            while store.write("removal:keys", partial(_drop, store, database, number)):
                pass
        store.write("removal:end", partial(_forget, store, number))


def is_half_done(store: Store, vm_name: str) -> bool:
    """Whether a deletion was begun and has not ended."""
    with store.env.read() as txn:
        return bool(store.half_deleted(txn, vm_name))


def holders(store: Store, vm_name: str) -> list[schema.Pin]:
    """The pins that keep the replica from being deleted: all but those of readers that are gone."""
    with store.env.read() as txn:
        return list(_holders(txn, store, vm_name))


def _mark(txn: Txn, store: Store, vm_name: str) -> None:
    vm = store.find_vm(txn, vm_name)
    if vm is None:
        return
    if vm.state in FAILOVER_DONE:
        if not _is_empty(vm):
            _renew(txn, store, vm, lambda kept: kept)
        return
    _end(txn, store, vm)


def _end(txn: Txn, store: Store, vm: VmRecord) -> None:
    """Take the record away, and leave a mark."""
    vm_name = vm.name
    for pin in _holders(txn, store, vm_name):
        raise BusyError(
            f"{vm_name}: recovery point {pin.point_id} is in use ({pin.owner.get('kind')} {pin.id}): the replica stays",
            hint=f"hvfuse failover cleanup {vm_name}",
        )
    for pin in [pin for pin in store.scan_pins(txn) if pin.vm == vm_name]:
        txn.delete(schema.u64(pin.id), db=store.env.db(schema.PINS))
    txn.delete(schema.vm_key(vm_name), db=store.env.db(schema.VMS))
    txn.put(schema.PREFIX_GONE + schema.u32(vm.id), os.fsencode(vm_name), db=store.env.db(schema.META))


def _renew(txn: Txn, store: Store, vm: VmRecord, keep: Callable[[VmRecord], VmRecord]) -> None:
    """The record goes on under another number: nothing that hangs on the old one is the VM's any more."""
    _end(txn, store, vm)
    number = store.next_vm_number(txn)
    blank = VmRecord(id=number, name=vm.name)
    kept = replace(
        vm, id=number, position=None, head_seq=blank.head_seq, base_seq=blank.base_seq, floor_seq=blank.floor_seq,
        next_disk=blank.next_disk, disks=(), definition="",
    )  # fmt: skip
    store.save_vm(txn, keep(kept))


def _is_empty(vm: VmRecord) -> bool:
    return vm.position is None and not vm.head_seq


def _holders(txn: Txn, store: Store, vm_name: str) -> Iterator[schema.Pin]:
    for pin in store.scan_pins(txn):
        if pin.vm == vm_name and (pin.owner.get("kind") != _HELD_BY_LIFE or holder_is_alive(pin)):
            yield pin


def _drop(store: Store, database: bytes, number: int, txn: Txn) -> bool:
    """Delete some of the VM's keys of one database. Returns whether there may be more."""
    start, stop = schema.u32(number), schema.u32(number + 1)
    keys = [key for key, _ in islice(scan(txn, store.env, database, start, stop), BATCH)]
    for key in keys:
        txn.delete(key, db=store.env.db(database))
    return len(keys) == BATCH


def _forget(store: Store, number: int, txn: Txn) -> None:
    txn.delete(schema.PREFIX_GONE + schema.u32(number), db=store.env.db(schema.META))


def exists(store: Store, vm_name: str) -> bool:
    """Whether there is a replica of that name, or what is left of one."""
    try:
        store.vm(vm_name)
    except NotFoundError:
        return is_half_done(store, vm_name)
    return True
