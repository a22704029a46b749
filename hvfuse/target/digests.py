"""What a replica holds, as digests of blocks: its newest committed state, which need not be a recovery point.

Frames staged for a cycle that is not committed are not seen. A block that cannot be read back, because a
stored frame is damaged, gets a digest that no other block has: it counts as different from whatever the
source has there, and so the next copy replaces it.
"""

from __future__ import annotations

import bisect
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter

import numpy as np

from hvfuse.errors import CorruptError
from hvfuse.extent import Extent
from hvfuse.formats.digests import (
    BLOCK,
    DIGEST_SIZE,
    DigestKey,
    Digests,
    block_count,
    digest_blocks,
    sparse_digests,
    summary,
    zero_digests,
)
from hvfuse.manifest import CycleKind
from hvfuse.reconcile import plan
from hvfuse.target import cycles
from hvfuse.target.environment import Txn
from hvfuse.target.journal import CycleReader
from hvfuse.target.schema import REGION, DiskRecord, PointRecord, VmRecord
from hvfuse.target.store import Store

READ_SPAN = 4 << 20
"""Bytes read at once. Smaller ones hand the interpreter lock over too often where another thread digests, too."""
KEPT_SPANS = 4096
"""Spans whose digests are kept: some 4 MiB. Where a summary differs, they are asked for right afterwards."""
KEPT_REGIONS = 64
"""Regions of which it is kept where they may have data."""

Ranges = list[tuple[int, int]]
"""(offset, end), ascending and apart."""

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
            ends = _ends(store, txn, vm, cycle)
        disks = tuple(replace(disk, size=end) for disk, end in zip(cycle.disks, ends, strict=True))
        self._reader = CycleReader(store, vm, replace(cycle, disks=disks))
        by_number = {disk.number: disk for disk in disks}
        self._disks = {disk_id: by_number.get(number) for disk_id, number in numbers.items()}
        self._buffers = threading.local()
        # By disk number and span: the key, where the run of blocks begins, and their digests.
        self._kept: OrderedDict[tuple[int, int], tuple[DigestKey, int, Digests]] = OrderedDict()
        self._ranges: OrderedDict[tuple[int, int], Ranges] = OrderedDict()
        self._lock = threading.Lock()  # guards both

    def close(self) -> None:
        """Let files and memory go."""
        self._reader.close()
        with self._lock:
            self._kept.clear()
            self._ranges.clear()

    def extent(self, disk_id: bytes) -> int:
        """Bytes from the start of the disk, beyond which there are zeroes alone."""
        disk = self._disks[disk_id]
        return 0 if disk is None else disk.size

    def occupied(self, disk_id: bytes, low: int, high: int) -> list[Extent]:
        """The ranges within [low, high) that may hold anything but zeroes; ascending and apart. Reads no data."""
        disk = self._disks[disk_id]
        found = () if disk is None else self._reader.extents(disk.name, low, high)
        return [Extent(start, end - start) for start, end in found]

    def summaries(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """The summary of the blocks of each of the aligned extents, ascending, each within a span
        (`hvfuse.reconcile.plan`): shape (len(extents), 2)."""
        disk = self._disks[disk_id]
        found = np.empty((len(extents), 2), np.uint64)
        for row, extent in zip(found, extents, strict=True):
            if disk is None:
                row[:] = summary(zero_digests(block_count([extent]), key), key)
                continue
            digests = self._span_digests(disk, extent, key)
            self._keep(disk, extent, key, digests)
            row[:] = summary(digests, key)
        return found

    def digests(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """The digests of the blocks of aligned extents, ascending; see `hvfuse.formats.digests`."""
        disk = self._disks[disk_id]
        if disk is None or not extents:
            return zero_digests(block_count(extents), key)
        pieces = [piece for span in plan.spans(extents) for piece in span]
        return np.concatenate([self._span_digests(disk, piece, key) for piece in pieces])

    def _span_digests(self, disk: DiskRecord, extent: Extent, key: DigestKey) -> Digests:
        """The digests of an extent within a span, as they are kept if they are."""
        with self._lock:
            kept = self._kept.get((disk.number, extent.offset // plan.SPAN))
        if kept is not None and kept[0] == key:
            first = (extent.offset - kept[1]) // BLOCK
            digests = kept[2][first : first + extent.length // BLOCK] if first >= 0 else kept[2][:0]
            if len(digests) == extent.length // BLOCK:
                return digests
        return sparse_digests(
            [extent],
            key,
            data=lambda low, high: self._data(disk, low, high),
            digest=lambda low, high: np.concatenate(
                [self._digest(disk.name, at, min(at + READ_SPAN, high), key) for at in range(low, high, READ_SPAN)]
            ),
        )

    def _keep(self, disk: DiskRecord, extent: Extent, key: DigestKey, digests: Digests) -> None:
        with self._lock:
            self._kept[disk.number, extent.offset // plan.SPAN] = (key, extent.offset, digests)
            if len(self._kept) > KEPT_SPANS:
                self._kept.popitem(last=False)

    def _data(self, disk: DiskRecord, low: int, high: int) -> Iterator[tuple[int, int]]:
        """The ranges within [low, high) that may hold anything but zeroes."""
        for region in range(low // REGION, -(-high // REGION)):
            ranges = self._region_ranges(disk, region)
            for start, end in ranges[bisect.bisect_right(ranges, low, key=itemgetter(1)) :]:
                if start >= high:
                    break
                yield max(start, low), min(end, high)

    def _region_ranges(self, disk: DiskRecord, region: int) -> Ranges:
        with self._lock:
            ranges = self._ranges.get((disk.number, region))
        if ranges is None:
            ranges = list(self._reader.extents(disk.name, region * REGION, (region + 1) * REGION))
            with self._lock:
                self._ranges[disk.number, region] = ranges
                if len(self._ranges) > KEPT_REGIONS:
                    self._ranges.popitem(last=False)
        return ranges

    def _digest(self, name: str, low: int, high: int, key: DigestKey) -> Digests:
        """The digests of whole blocks."""
        view = self._buffer()[: high - low]
        try:
            self._reader.pread_into(name, low, view)
        except CorruptError as error:
            if high - low > BLOCK:
                return np.concatenate([self._digest(name, at, at + BLOCK, key) for at in range(low, high, BLOCK)])
            _log.warning("%s: counts as different at %d: %s", name, low, error)
            return np.frombuffer(os.urandom(DIGEST_SIZE), "<u8").astype(np.uint64).reshape(1, 2)
        return digest_blocks(view, key)

    def _buffer(self) -> memoryview:
        """This thread's own."""
        buffer: memoryview | None = getattr(self._buffers, "view", None)
        if buffer is None:
            buffer = self._buffers.view = memoryview(bytearray(READ_SPAN))
        return buffer


def held_ends(store: Store, txn: Txn, vm: VmRecord) -> dict[int, int]:
    """Where the last byte of each disk may be, by number, that is not zero in the newest committed cycle."""
    cycle = store.load_cycle(txn, vm, vm.head_seq)
    return {disk.number: end for disk, end in zip(cycle.disks, _ends(store, txn, vm, cycle), strict=True)}


def _ends(store: Store, txn: Txn, vm: VmRecord, cycle: PointRecord) -> list[int]:
    """Where the last byte of each disk may be that is not zero. A cycle has nothing beyond its disks' ends; a
    copy may, of a disk that became shorter while it was made."""
    if cycle.kind is CycleKind.DELTA:
        return [disk.size for disk in cycle.disks]
    data_ends = cycle.data_ends
    if data_ends is None:
        found = cycles.data_ends(txn, store.env, vm, seq=cycle.seq)
        data_ends = tuple(found.get(disk.number, 0) for disk in cycle.disks)
    images = {record.number: record.name for record in store.load_cycle(txn, vm, vm.base_seq).disks}
    return [
        max(disk.size, end, _image_size(store, vm, images.get(disk.number)))
        for disk, end in zip(cycle.disks, data_ends, strict=True)
    ]


def _image_size(store: Store, vm: VmRecord, name: str | None) -> int:
    if name is None:
        return 0
    try:
        return os.stat(store.image_path(vm.name, name)).st_size
    except FileNotFoundError:
        _log.warning("%s: the replica image is missing", store.image_path(vm.name, name))
        return 0
