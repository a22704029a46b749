"""The disks of a side that gave way become the replica images of its store: moved, not copied.

Like what was adopted (`hvfuse.target.adopt`), they are a copy of a generation that no source knows: the side that has
the VM now compares, and only differences travel.

The caller names the disks, and names the same ones again after a crash, when some of them were moved already. In this
order: the images that were there before go; each disk is renamed to its image (or, on another file system, copied,
synced and removed last); one transaction makes them the replica. Until then the store has no position for the VM.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from hvfuse import system
from hvfuse.consistency import Consistency
from hvfuse.errors import BusyError, NotFoundError
from hvfuse.formats.image import probe_for_tracking
from hvfuse.formats.image_copy import copy_disk
from hvfuse.formats.raw import RawImage
from hvfuse.manifest import CycleKind
from hvfuse.position import NO_DIGEST, Position
from hvfuse.target import failing_over, staging, unsynced
from hvfuse.target.admission import check_name
from hvfuse.target.environment import Txn, file_faults
from hvfuse.target.failing_over import Party
from hvfuse.target.images import ReplicaImages
from hvfuse.target.schema import UNKNOWN_DISK, DiskRecord, PointRecord, VmRecord
from hvfuse.target.store import Store

Progress = Callable[[int, int], None]
"""(bytes, bytes in all) of a disk that has to be copied."""


def take(
    store: Store,
    vm_name: str,
    folder: str,
    names: Sequence[str],
    *,
    primary: Party,
    epoch: int,
    progress: Progress = lambda done, total: None,
) -> Position:
    """Make the disks `names` in `folder` the replica of a VM that `primary` will ship. Returns where it stands.

    Idempotent: done again it goes on, and where it was done it says so. Raises NotFoundError (a disk is neither here
    nor there), BusyError (the VM's recovery points are in use, or what it had before is not wholly deleted),
    UnsupportedError, NoSpaceError.
    """
    check_name(vm_name, "VM")
    stands = _stands(store, vm_name, primary)
    if stands is not None:
        return stands
    with ReplicaImages(store.replica_folder(vm_name)) as images, images.lock():
        store.write("handed-over:begin", lambda txn: _begin(txn, store, vm_name, primary, epoch))
        before = {disk.name for disk in store.vm(vm_name).disks}
        copied = [name for name in names if _move(store, vm_name, folder, name, progress)]
        images.sync()
        system.fsync_directory("handed-over:folder", folder)
        records = [_disk(store, vm_name, name) for name in names]
        position = Position(os.urandom(16), 0, NO_DIGEST)
        store.write("handed-over:commit", lambda txn: _commit(txn, store, vm_name, records, position))
        for name in copied:
            system.unlink("handed-over:copied", os.path.join(folder, name), missing_ok=True)
        for name in before - set(names):
            images.remove(name)
    unsynced.drop(store.unsynced_path(vm_name))
    return position


def _stands(store: Store, vm_name: str, primary: Party) -> Position | None:
    """Where the replica stands, if this was done before."""
    try:
        vm = store.vm(vm_name)
    except NotFoundError:
        return None
    return vm.position if vm.primary == primary.home and vm.failover is None else None


def _begin(txn: Txn, store: Store, vm_name: str, primary: Party, epoch: int) -> None:
    if store.half_deleted(txn, vm_name):
        raise BusyError(f"{vm_name}: what its store had of it is not wholly deleted yet", hint="try again in a moment")
    if staging.is_pinned(txn, store, vm_name):
        raise BusyError(
            f"{vm_name}: a recovery point of it is in use in {store.path}", hint=f"hvfuse failover cleanup {vm_name}"
        )
    vm = store.find_vm(txn, vm_name) or store.create_vm(txn, vm_name)
    vm = staging.clear(txn, store, staging.drop(txn, store, vm))
    store.save_vm(txn, failing_over.awaiting(txn, store, vm, primary, epoch=epoch))


def _move(store: Store, vm_name: str, folder: str, name: str, progress: Progress) -> bool:
    """Bring one disk to where its image is to be. Returns whether it had to be copied."""
    source, image = os.path.join(folder, name), store.image_path(vm_name, name)
    if not os.path.lexists(source):
        if os.path.exists(image):
            return False  # moved before
        raise NotFoundError(f"{source}: the disk is gone", hint=f"put it back, or to {image}")
    with file_faults(image):
        if os.stat(folder).st_dev == os.stat(os.path.dirname(image)).st_dev:
            system.rename("handed-over:rename", source, image)
            return False
        _copy(source, image, progress)
    return True


def _copy(source: str, image: str, progress: Progress) -> None:
    size = os.stat(source).st_size
    from_fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    to_fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.ftruncate(to_fd, size)
    disk, copy = RawImage(from_fd, source, size=size), RawImage(to_fd, image, size=size)
    try:
        copy_disk(disk, copy, lambda at: progress(at, size))
        system.fsync("handed-over:copy", to_fd)
    finally:
        disk.close()
        copy.close()


def _disk(store: Store, vm_name: str, name: str) -> DiskRecord:
    path = store.image_path(vm_name, name)
    with open(path, "rb") as file:
        system.fsync("handed-over:image", file.fileno())
    info = probe_for_tracking(path)
    return DiskRecord(
        number=0, disk_id=UNKNOWN_DISK, name=name, format=info.format, size=info.file_size, digest=NO_DIGEST
    )


def _commit(txn: Txn, store: Store, vm_name: str, disks: Sequence[DiskRecord], position: Position) -> None:
    vm: VmRecord = store.load_vm(txn, vm_name)
    seq = vm.head_seq + 1
    numbered = tuple(replace(disk, number=number) for number, disk in enumerate(disks, vm.next_disk))
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
    store.save_vm(
        txn,
        replace(
            vm, position=position, head_seq=seq, base_seq=seq, floor_seq=seq, disks=numbered,
            next_disk=vm.next_disk + len(numbered),
        ),
    )  # fmt: skip
