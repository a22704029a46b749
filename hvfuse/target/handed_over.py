"""The disks of a side that gave way become the replica images of its store: moved, not copied.

Like what was adopted (`hvfuse.target.adopt`), they are a copy of a generation that no source knows: the side that has
the VM now compares, and only differences travel.

The caller names the disks, and names the same ones again after a crash, when some of them were moved already. In this
order, each step durable before the next one begins:

    1  the VM's record says that they are being moved (`moving`): from now on nothing is taken in, and the store has no
       position for the VM
    2  the images that were there before go, and the record says that they are gone: from now on an image is a disk that
       was moved
    3  each disk is renamed to its image; on another file system it is copied under another name, synced, renamed, and
       removed last
    4  one transaction makes them the replica

So every disk is whole at one of its two places, at each instant. Nothing is begun while one is at neither.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from hvfuse import system
from hvfuse.errors import BusyError, NotFoundError, StateError, UsageError
from hvfuse.formats.image import is_disk_name, probe_for_tracking
from hvfuse.formats.image_copy import copy_disk, first_difference
from hvfuse.formats.raw import RawImage
from hvfuse.position import NO_DIGEST, Position
from hvfuse.states import FAILOVER_DONE
from hvfuse.target import failing_over, staging, unsynced
from hvfuse.target.admission import MAX_DISKS, check_name
from hvfuse.target.environment import Txn, file_faults
from hvfuse.target.failing_over import Party, state_of, where
from hvfuse.target.images import ReplicaImages
from hvfuse.target.schema import UNKNOWN_DISK, DiskRecord
from hvfuse.target.store import Store

COPYING = ".moving"
"""What the name of an image ends in while its disk is copied from another file system."""

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
    nor there), StateError (the store has another replica of that name, or a failover stands there, or a disk is in both
    places), BusyError (the VM's recovery points are in use, or what it had before is not wholly deleted),
    UsageError, UnsupportedError, CorruptError, NoSpaceError.
    """
    check_name(vm_name, "VM")
    _check_names(names)
    stands = _stands(store, vm_name, folder, names, primary)
    if stands is not None:
        return stands
    with ReplicaImages(store.replica_folder(vm_name)) as images, images.lock():
        _survey(store, vm_name, folder, names)
        is_cleared = store.write(
            "handed-over:begin", lambda txn: _begin(txn, store, vm_name, folder, names, primary=primary, epoch=epoch)
        )
        if not is_cleared:
            _clear(store, vm_name, images, names)
        for name in names:
            _move(store, vm_name, folder, name, progress)
        images.sync()
        with file_faults(folder):
            system.fsync_directory("handed-over:folder", folder)
        records = [_disk(store, vm_name, name) for name in names]
        position = Position(os.urandom(16), 0, NO_DIGEST)
        store.write("handed-over:commit", lambda txn: _commit(txn, store, vm_name, records, position))
    return position


def _check_names(names: Sequence[str]) -> None:
    strange = [name for name in names if not is_disk_name(name) or "/" in name]
    if strange or not 0 < len(set(names)) == len(names) <= MAX_DISKS:
        raise UsageError(f"{strange[0]!r}: not the name of a disk" if strange else f"{len(names)} disks, or one twice")


def _stands(store: Store, vm_name: str, folder: str, names: Sequence[str], primary: Party) -> Position | None:
    """Where the replica stands, if this was done before."""
    try:
        vm = store.vm(vm_name)
    except NotFoundError:
        return None
    if vm.primary != primary.home or vm.failover is not None or vm.moving is not None or vm.position is None:
        return None
    for name in names:
        if os.path.lexists(os.path.join(folder, name)):
            raise StateError(
                f"{os.path.join(folder, name)}: is there, although {store.path} has the replica of {vm_name} already",
                hint="move it away, or delete that replica",
            )
    return vm.position


def _survey(store: Store, vm_name: str, folder: str, names: Sequence[str]) -> None:
    """Every disk is here, or was moved: looked at before anything is changed."""
    with store.env.read() as txn:
        vm = store.find_vm(txn, vm_name)
    was_cleared = vm is not None and vm.moving is not None and vm.moving["cleared"]
    for name in names:
        source, image = os.path.join(folder, name), store.image_path(vm_name, name)
        is_here = os.path.lexists(source)
        if not is_here and not (was_cleared and os.path.lexists(image)):
            raise NotFoundError(f"{source}: the disk is gone", hint="put it back")
        path = source if is_here else image
        with file_faults(path):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise UsageError(f"{path}: not a plain file")
            probe_for_tracking(path)


def _begin(
    txn: Txn, store: Store, vm_name: str, folder: str, names: Sequence[str], *, primary: Party, epoch: int
) -> bool:
    """Note what is being done. Returns whether the images of before have gone, as it was begun earlier."""
    if store.half_deleted(txn, vm_name):
        raise BusyError(f"{vm_name}: what its store had of it is not wholly deleted yet", hint="try again in a moment")
    for pin in store.scan_pins(txn):
        if pin.vm == vm_name:
            own = pin.owner.get("kind") == failing_over.PIN_KIND
            raise BusyError(
                f"{vm_name}: recovery point {pin.point_id} of it is in use in {store.path}",
                hint="wait until the disks that were failed over are whole"
                if own
                else f"hvfuse failover cleanup {vm_name}",
            )
    vm = store.find_vm(txn, vm_name) or store.create_vm(txn, vm_name)
    if vm.moving is not None and vm.primary == primary.home:
        if set(vm.moving["names"]) != set(names):
            raise StateError(
                f"{vm_name}: the disks {', '.join(vm.moving['names'])} of {vm.moving['folder']} come first"
            )
        return bool(vm.moving["cleared"])
    is_taken = vm.position is not None or vm.primary not in ("", primary.home)
    if vm.moving is not None or (is_taken and state_of(vm) not in FAILOVER_DONE):
        raise StateError(
            f"{vm_name}: {store.path} has another replica of that name, which {where(vm.source)} ships",
            hint=f"hvfuse replication disable {vm_name} --delete-replica, or give another store",
        )
    vm = failing_over.awaiting(txn, store, vm, primary, epoch=epoch)
    vm = staging.clear(txn, store, staging.drop(txn, store, vm))
    store.save_vm(txn, replace(vm, moving={"folder": folder, "names": list(names), "cleared": False}))
    return False


def _clear(store: Store, vm_name: str, images: ReplicaImages, names: Sequence[str]) -> None:
    """Remove the images that were there before, whoever left them. None of them is one of the disks yet."""
    for name in sorted({disk.name for disk in store.vm(vm_name).disks} | set(names)):
        images.remove(name)
    unsynced.drop(store.unsynced_path(vm_name))
    images.sync()

    def note(txn: Txn) -> None:
        vm = store.load_vm(txn, vm_name)
        assert vm.moving is not None
        store.save_vm(txn, replace(vm, disks=(), moving={**vm.moving, "cleared": True}))

    store.write("handed-over:cleared", note)


def _move(store: Store, vm_name: str, folder: str, name: str, progress: Progress) -> None:
    """Bring one disk to where its image is to be."""
    source, image = os.path.join(folder, name), store.image_path(vm_name, name)
    if not os.path.lexists(source):
        return  # moved before
    with file_faults(image):
        if os.path.lexists(image):
            _demand_equal(source, image)  # it was copied, and not removed any more
        else:
            try:
                system.rename("handed-over:rename", source, image)
                return
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
            _copy(source, image, progress)
        system.fsync_directory("handed-over:image-folder", os.path.dirname(image))
        system.unlink("handed-over:remove", source)


def _copy(source: str, image: str, progress: Progress) -> None:
    """Copy a disk: under its name it is there wholly and durably, or not at all."""
    part = image + COPYING
    try:
        with (
            _opened(source, os.O_RDONLY) as disk,
            _opened(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, disk.size) as copy,
        ):
            copy_disk(disk, copy, lambda at: progress(at, disk.size))
            copy.flush()
        system.rename("handed-over:copied", part, image)
    except OSError:
        with contextlib.suppress(OSError):  # what it takes up may be what lacks
            os.unlink(part)
        raise


def _demand_equal(source: str, image: str) -> None:
    with _opened(source, os.O_RDONLY) as disk, _opened(image, os.O_RDONLY) as copy:
        at = first_difference(disk, copy, lambda at: None)
    if at is not None:
        raise StateError(
            f"{source} and {image} are both there, and differ at byte {at}", hint="move the wrong one away"
        )


@contextmanager
def _opened(path: str, flags: int, size: int | None = None) -> Iterator[RawImage]:
    """A file's bytes. `size`: made as long."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if size is not None:
            system.truncate("handed-over:size", fd, size)
        image = RawImage(fd, path, size=os.fstat(fd).st_size)
        yield image
    finally:
        os.close(fd)


def _disk(store: Store, vm_name: str, name: str) -> DiskRecord:
    path = store.image_path(vm_name, name)
    with file_faults(path), open(path, "rb") as file:
        system.fsync("handed-over:image", file.fileno())
    info = probe_for_tracking(path)
    return DiskRecord(
        number=0, disk_id=UNKNOWN_DISK, name=name, format=info.format, size=info.file_size, digest=NO_DIGEST
    )


def _commit(txn: Txn, store: Store, vm_name: str, disks: Sequence[DiskRecord], position: Position) -> None:
    vm = staging.stand_at_copy(txn, store, store.load_vm(txn, vm_name), disks, position)
    store.save_vm(txn, replace(vm, moving=None))
