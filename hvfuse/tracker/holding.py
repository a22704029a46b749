"""A VM that is held: its disks refuse every change with EROFS, through the mount, until it is let go.

All disk files of the folder are held, tracked or not, with those that would come; other files are not. Reads and syncs
go on, and so does what the tracker does for its own sake: rotations, copies, taking in. What a disk refuses does not
count on how a handle was opened: one that could write gets EROFS from then on. There is no writeback cache
(`hvfuse.fuse`), so that a write is refused while it is made. What a program changes in a map of a held disk is refused
when it is written back (msync tells an error), and may be read through the mount until the kernel forgets the page.
What it had changed before is written by `write_back`.

How nothing slips through: `TrackedVm.held` changes under `names` and the gate. Whatever opens a name, or has it lead
elsewhere, looks at it under `names`; whatever changes content through a handle looks at it under the gate, and has
changed log and image before it lets that go. A resize is a rotation, and ends before a hold can begin.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvfuse.errors import HvfuseError
from hvfuse.formats.image import is_disk_name
from hvfuse.mountpoint import Holder, holders

if TYPE_CHECKING:
    from hvfuse.tracker.vm import TrackedVm

Inode = tuple[int, int]
"""(device, inode)."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a VM is held, in words. `disks`: the disk files that there were when that began, whatever else leads to them:
    a handle from before they had their names, a hard link."""

    reason: str
    disks: frozenset[Inode]


def is_disk_path(path: str) -> bool:
    """Whether what is at `path`, from the mount's root, is a disk if it is a file at all."""
    return "/" not in path[1:] and is_disk_name(path[1:])


def hold(vm: TrackedVm, reason: str, *, only_if_unused: bool = False) -> bool:
    """Hold the VM, or, if it is held, replace the reason. What was acknowledged before is then on the disks and in
    their logs, and synced; nothing is acknowledged any more. Caller holds `_rotation`.

    False, and nothing is changed, if it is to be held only while no handle on a disk is open, and one is. Raises
    HvfuseError where a disk could not be synced, OSError; the former holds the VM all the same.
    """
    with vm.names:
        if only_if_unused and open_disks(vm):
            return False
        begun = Hold(reason, frozenset(inode for _, inode in _disk_files(vm.folder)))
        with vm.gate:
            vm.held = begun
    _sync(vm)
    return True


def _sync(vm: TrackedVm) -> None:
    failed = []
    for disk, _ in vm.tracked():
        try:
            disk.sync(datasync=False)
        except OSError as error:
            failed.append(f"{disk.name} could not be synced: {error.strerror}")
    if failed:
        raise HvfuseError(f"{vm.name}: is held, but {', '.join(failed)}")


def open_disks(vm: TrackedVm) -> int:
    """How many handles on disks are open through the mount; those on a disk that is not tracked count as one. While
    the caller holds `names`, none is opened."""
    tracked = vm.disks
    others = (inode for name, inode in _disk_files(vm.folder) if name not in tracked)
    return sum(disk.open_handles for disk in tracked.values()) + sum(map(vm.is_open, others))


def write_back(vm: TrackedVm, mountpoint: str) -> None:
    """Have the kernel write what programs have changed in maps of the disks, as far as it can; syncfs(2) would not wait
    for that. Caller holds no lock: the mount has to serve it."""
    for name, _ in _disk_files(vm.folder):
        with contextlib.suppress(OSError):
            fd = os.open(os.path.join(mountpoint, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def users(vm: TrackedVm, mountpoint: str) -> list[Holder]:
    """Who has a disk open, as far as can be seen. Caller holds no lock: looking at a process may wait for the mount."""
    return holders(*(os.path.join(mountpoint, name) for name, _ in _disk_files(vm.folder)))


def status(vm: TrackedVm) -> dict[str, Any]:
    """For the control socket."""
    held = vm.held
    return {"held": held.reason if held is not None else None, "open_disks": open_disks(vm)}


def _disk_files(folder: str) -> Iterator[tuple[str, Inode]]:
    """Names of the disk files, and what they lead to. Raises OSError."""
    for name in filter(is_disk_name, os.listdir(folder)):
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(os.path.join(folder, name))
            if stat.S_ISREG(found.st_mode):
                yield name, (found.st_dev, found.st_ino)
