"""What a replica holds, as digests of blocks: its newest committed state, which need not be a recovery point.

Frames staged for a cycle that is not committed are not seen. A block that cannot be read back, because a
stored frame is damaged, gets a digest that no other block has: it counts as different from whatever the
source has there, and so the next copy replaces it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hvfuse.errors import CorruptError
from hvfuse.extent import Extent
from hvfuse.formats.digests import BLOCK, DIGEST_SIZE, Digests, digest_blocks, sparse_digests, zero_digests
from hvfuse.manifest import CycleKind
from hvfuse.target import cycles
from hvfuse.target.environment import Txn
from hvfuse.target.journal import CycleReader, base_image
from hvfuse.target.schema import DiskRecord, PointRecord, VmRecord
from hvfuse.target.store import Store

READ_SPAN = 4 << 20
"""Bytes read at once."""

_log = logging.getLogger(__name__)


class HeldBlocks:
    """The blocks of the disks of VM `vm_name` in its newest committed cycle. Safe for use by several threads.

    `numbers`: the number that each disk has in the store, by disk id; a disk of which the cycle has no copy
    under that number reads as zeroes. Raises NotFoundError.
    """

    def __init__(self, store: Store, vm_name: str, numbers: dict[bytes, int]) -> None:
        with store.env.read() as txn:
            vm = store.load_vm(txn, vm_name)
            cycle = store.load_cycle(txn, vm, vm.head_seq)
            # What lies beyond a disk's end is told as well: it would be seen again if the disk grew.
            disks = tuple(replace(disk, size=_extent(store, txn, vm, cycle, disk)) for disk in cycle.disks)
        self._reader = CycleReader(store, vm, replace(cycle, disks=disks))
        by_number = {disk.number: disk for disk in disks}
        self._disks = {disk_id: by_number.get(number) for disk_id, number in numbers.items()}

    def close(self) -> None:
        """Let files and memory go."""
        self._reader.close()

    def extent(self, disk_id: bytes) -> int:
        """Bytes from the start of the disk, beyond which there are zeroes alone."""
        disk = self._disks[disk_id]
        return 0 if disk is None else disk.size

    def digests(self, disk_id: bytes, extents: Sequence[Extent], seed: int) -> Digests:
        """The digests of the blocks of aligned extents, ascending; see `hvfuse.formats.digests`."""
        disk = self._disks[disk_id]
        if disk is None:
            return zero_digests(sum(extent.length for extent in extents) // BLOCK, seed)
        return sparse_digests(
            extents,
            seed,
            data=lambda low, high: self._reader.extents(disk.name, low, high),
            digest=lambda low, high: np.concatenate(
                [self._digest(disk.name, at, min(at + READ_SPAN, high), seed) for at in range(low, high, READ_SPAN)]
            ),
        )

    def _digest(self, name: str, low: int, high: int, seed: int) -> Digests:
        try:
            data = self._reader.pread(name, low, high - low)
        except CorruptError as error:
            if high - low > BLOCK:
                return np.concatenate([self._digest(name, at, at + BLOCK, seed) for at in range(low, high, BLOCK)])
            _log.warning("%s: counts as different at %d: %s", name, low, error)
            return np.frombuffer(os.urandom(DIGEST_SIZE), "<u8").astype(np.uint64).reshape(1, 2)
        return digest_blocks(data.ljust(high - low, b"\0"), seed)


def _extent(store: Store, txn: Txn, vm: VmRecord, cycle: PointRecord, disk: DiskRecord) -> int:
    """Where the disk's last byte may be that is not zero. A cycle has nothing beyond its disks' ends; a copy
    may, of a disk that became shorter while it was made."""
    if cycle.kind is CycleKind.DELTA:
        return disk.size
    placed = cycles.placements(txn, store.env, vm, first=cycle.seq, last=cycle.seq)
    ends = [placement.data_end for _, _, placement in placed if placement.disk == disk.number]
    image = base_image(store, txn, vm, disk.number)
    if image is not None:
        try:
            ends.append(os.stat(store.image_path(vm.name, image)).st_size)
        except FileNotFoundError:
            _log.warning("%s: the replica image is missing", store.image_path(vm.name, image))
    return max([disk.size, *ends])
