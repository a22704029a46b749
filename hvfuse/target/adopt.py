"""Plain copies of a VM's disks, brought to the target by other means, become its replica images.

What was adopted is a copy like any that begins a generation, but of a generation that no source knows. So
the next copy compares, over the position that `adopt` leaves, and only differences travel. Which of the source's
disks an image is, its name alone tells until then (`hvfuse.target.schema.UNKNOWN_DISK`).

Killed anywhere, the VM is as it was before, or the copies are adopted wholly.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hvfuse import system
from hvfuse.errors import BusyError, HvfuseError, NotFoundError, UsageError
from hvfuse.formats.image import DISK_SUFFIXES, is_disk_name, probe_for_tracking
from hvfuse.formats.image_copy import copy_disk
from hvfuse.formats.raw import RawImage
from hvfuse.position import NO_DIGEST, Position
from hvfuse.target import failing_over, relation, staging, unsynced
from hvfuse.target.admission import MAX_DISK_SIZE, MAX_DISKS, check_name
from hvfuse.target.environment import Txn, file_faults
from hvfuse.target.images import ReplicaImages
from hvfuse.target.schema import UNKNOWN_DISK, DiskRecord, VmRecord
from hvfuse.target.store import Store

Progress = Callable[[int, int], None]
"""(bytes looked at, bytes in all), of all disks."""

_CANNOT_CLONE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.EPERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptReport:
    """What was adopted. `bytes_total`: of the disks; `bytes_written`: of the images, without holes and zeroes;
    `cloned`: how many disks share the blocks of their copies, so that nothing of them was written."""

    vm: str
    position: Position
    disks: tuple[str, ...]
    bytes_total: int
    bytes_written: int
    cloned: int


@dataclass(frozen=True, slots=True)
class _Copy:
    """A file to be adopted. `size`: bytes."""

    name: str
    path: str
    format: str
    size: int


def adopt(store: Store, vm: str, folder: str, *, progress: Progress = lambda done, total: None) -> AdoptReport:
    """Take the disk images in `folder` as the replica of a VM that has no position in the store.

    The files are copied; they may be removed afterwards. All of them must be disks by name. Raises UsageError
    (the folder or what is in it will not do, or the VM has a replica), NotFoundError, BusyError (a first copy is
    being written), CorruptError (a disk's structures), UnsupportedError, NoSpaceError.
    """
    check_name(vm, "VM")
    copies = _survey(store, folder)
    with store.env.read() as txn:
        _vacant(store, txn, vm)
    total, done, written, cloned = sum(copy.size for copy in copies), 0, 0, 0
    with ReplicaImages(store.replica_folder(vm)) as images, images.lock():
        store.write("adopt:begin", lambda txn: _begin(store, vm, copies, txn))
        for copy in copies:
            count = _take(copy, images, partial(_tell, progress, done, total))
            written += count or 0
            cloned += count is None
            done += copy.size
            progress(done, total)
        images.sync()
        for name in {disk.name for disk in store.vm(vm).disks} - {copy.name for copy in copies}:
            images.remove(name)
        position = Position(os.urandom(16), 0, NO_DIGEST)
        store.write("adopt:commit", lambda txn: _commit(store, vm, copies, position, txn))
    unsynced.drop(store.unsynced_path(vm))  # of a first copy that was given up
    return AdoptReport(
        vm=vm,
        position=position,
        disks=tuple(copy.name for copy in copies),
        bytes_total=total,
        bytes_written=written,
        cloned=cloned,
    )


def _survey(store: Store, folder: str) -> list[_Copy]:
    """The files to be adopted, by name; nothing else may be there."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{folder}: there is no such folder") from None
    except OSError as error:
        raise HvfuseError(f"{folder}: {error.strerror}") from error
    real, own = os.path.realpath(folder), os.path.realpath(store.path)
    if os.path.commonpath([real, own]) == own:
        raise UsageError(f"{folder}: lies in the store", hint="give a folder of plain copies outside it")
    strange = [entry.name for entry in entries if not is_disk_name(entry.name)]
    odd = [entry.name for entry in entries if not entry.is_file(follow_symlinks=False)]
    for names, what in ((strange, "not the name of a disk"), (odd, "not a plain file")):
        if names:
            raise UsageError(
                f"{os.path.join(folder, names[0])}: {what}{f' (nor are {len(names) - 1} more)' if names[1:] else ''}",
                hint=f"leave only the disks of one VM there: {', '.join(DISK_SUFFIXES)}",
            )
    if not 0 < len(entries) <= MAX_DISKS:
        raise UsageError(f"{folder}: {len(entries)} disks", hint="put copies of the VM's disks there, names unchanged")
    copies = []
    for entry in entries:
        info = probe_for_tracking(entry.path)
        if info.file_size > MAX_DISK_SIZE:
            raise UsageError(f"{entry.path}: more than {MAX_DISK_SIZE} bytes")
        copies.append(_Copy(entry.name, entry.path, info.format, info.file_size))
    return copies


def _begin(store: Store, vm_name: str, copies: Sequence[_Copy], txn: Txn) -> None:
    """Drop what is staged, and note which images there may be from now on: a later copy removes them."""
    vm = _vacant(store, txn, vm_name) or store.create_vm(txn, vm_name)
    vm = staging.clear(txn, store, staging.drop(txn, store, vm))
    store.save_vm(txn, replace(vm, disks=staging.by_name([*vm.disks, *_records(copies, first=0)])))


def _records(copies: Sequence[_Copy], *, first: int) -> tuple[DiskRecord, ...]:
    """The disks; `first`: number of the first."""
    return tuple(
        DiskRecord(
            number=number, disk_id=UNKNOWN_DISK, name=copy.name, format=copy.format, size=copy.size, digest=NO_DIGEST
        )
        for number, copy in enumerate(copies, first)
    )


def _vacant(store: Store, txn: Txn, vm_name: str) -> VmRecord | None:
    """The VM, if there is one of that name; raises UsageError if it has a replica."""
    vm = store.find_vm(txn, vm_name)
    if vm is None:
        return None
    relation.demand_settled(vm)
    failing_over.demand_claim(vm, None)
    if vm.position is not None or store.listed(txn, vm) or staging.is_pinned(txn, store, vm_name):
        raise UsageError(
            f"{vm_name}: the store has a replica of it already, at {vm.position}",
            hint=f"bring it up to date instead (only differences travel): hvfuse resync {vm_name}; "
            "or adopt the copies under another VM's name or into another store",
        )
    return vm


def _take(copy: _Copy, images: ReplicaImages, progress: Callable[[int], None]) -> int | None:
    """Make one image the same as a file, not yet durably. Returns the bytes written, None if it was cloned."""
    with file_faults(copy.path):
        source = os.open(copy.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(source)
        if not stat.S_ISREG(info.st_mode) or info.st_size != copy.size:
            raise BusyError(f"{copy.path}: changed just now", hint="adopt copies that nobody writes to")
        images.blank([copy.name])
        if _clone(copy, images, source):
            return None
        return _copy(copy, images, source, progress)
    finally:
        os.close(source)


def _clone(copy: _Copy, images: ReplicaImages, source: int) -> bool:
    """Share the file's blocks, where the file system can do that."""
    try:
        system.clone("adopt:clone", images.descriptor(copy.name), source)
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        with file_faults(copy.path):
            raise
    return True


def _copy(copy: _Copy, images: ReplicaImages, source: int, progress: Callable[[int], None]) -> int:
    """Copy what is neither hole nor zeroes. Returns the bytes written."""
    images.resize(copy.name, copy.size)
    disk = RawImage(os.dup(source), copy.path, size=copy.size)
    image = RawImage(os.dup(images.descriptor(copy.name)), copy.name, size=copy.size)
    try:
        with file_faults(copy.path):
            return copy_disk(disk, image, progress)
    finally:
        disk.close()
        image.close()


def _tell(progress: Progress, before: int, total: int, at: int) -> None:
    progress(before + at, total)


def _commit(store: Store, vm_name: str, copies: Sequence[_Copy], position: Position, txn: Txn) -> None:
    vm = _vacant(store, txn, vm_name)
    if vm is None or store.load_staging(txn, vm) is not None:
        raise BusyError(f"{vm_name}: another process began to copy it meanwhile")
    store.save_vm(txn, staging.stand_at_copy(txn, store, vm, _records(copies, first=vm.next_disk), position))
