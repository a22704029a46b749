"""A replica opened to be compared, with no copy under way: what the newest committed cycle left."""

from __future__ import annotations

import contextlib
import os

from hvfuse.position import Position
from hvfuse.target.digests import HeldBlocks
from hvfuse.target.store import Store


class Inspection(HeldBlocks):
    """The blocks of a VM's replica at `position`; see the shipper's `Inspection`.

    They stay what they are until another cycle is committed; then close it. `disk_ids`: of the disks that it has.
    """

    def __init__(self, store: Store, vm_name: str, position: Position, numbers: dict[bytes, int]) -> None:
        super().__init__(store, vm_name, numbers)
        self.position = position
        self.disk_ids = frozenset(numbers)


def inspect(store: Store, vm_name: str, *, from_medium: bool) -> Inspection | None:
    """Open the replica of a VM; None if it has no position. For the one process that commits its cycles.

    `from_medium`: have the images read from their disk and not from memory, which may have what the disk lost.
    """
    with store.env.read() as txn:
        vm = store.find_vm(txn, vm_name)
        if vm is None or vm.position is None:
            return None
        numbers = {disk.disk_id: disk.number for disk in store.load_cycle(txn, vm, vm.head_seq).disks}
        images = [disk.name for disk in store.load_cycle(txn, vm, vm.base_seq).disks]
    if from_medium:
        for name in images:
            _forget_pages(store.image_path(vm_name, name))
    return Inspection(store, vm_name, vm.position, numbers)


def _forget_pages(path: str) -> None:
    with contextlib.suppress(OSError):  # reading it will tell
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
