"""A recovery point as disks that can be read: the journal, newest cycle first, over the replica images.

Nothing is looked up before it is read. A region of a disk is resolved when it is first touched, in one
scan over the index; opening a point takes the same time whatever the size of disks and journal.

Merging may go on meanwhile. It moves the base up to some cycle M and writes to the images only what the
journal up to M covers. Hence, for a reader of point P >= M, what the journal does not cover never
changes in an image, and what it does cover is found in a frame or, once that is gone, in the image: a
missing frame means that the region is to be resolved anew. M > P is announced (floor_seq) before the
first byte is written, and every read from an image is followed by a look at that.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

import numpy as np

from hvfuse import system
from hvfuse.errors import CorruptError, HvfuseError, NotFoundError
from hvfuse.frames import Fill, Frame, decode
from hvfuse.manifest import DiskManifest, RecoveryPoint
from hvfuse.target import schema
from hvfuse.target.environment import Txn, file_faults
from hvfuse.target.index import Layer, RegionMap, read_region, read_wide, resolve
from hvfuse.target.schema import REGION, DiskRecord, PointRecord, VmRecord
from hvfuse.target.store import Store

FRAME_CACHE = 64 << 20
MAP_CACHE = 32 << 20
"""Bytes that decoded frames and resolved regions of one reader may take."""
_MAP_OVERHEAD = 2048
_ATTEMPTS = 8
"""Times that a region is resolved anew for one read: each takes another merge in between."""

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class ByteLru(Generic[_Key, _Value]):
    """Keeps what was used last, within `limit` bytes; `cost` tells the bytes of a value."""

    def __init__(self, limit: int, cost: Callable[[_Value], int]) -> None:
        self._limit = limit
        self._cost = cost
        self._held = 0
        self._values: OrderedDict[_Key, _Value] = OrderedDict()

    def get(self, key: _Key) -> _Value | None:
        """The value, now the one used last; None if it is not kept."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: _Key, value: _Value) -> None:
        """Keep a value; what was not used for longest goes. The newest stays even if it is too large."""
        self._values[key] = value
        self._held += self._cost(value)
        while self._held > self._limit and len(self._values) > 1:
            self._held -= self._cost(self._values.popitem(last=False)[1])

    def clear(self) -> None:
        """Keep nothing."""
        self._values.clear()
        self._held = 0


class FrameGoneError(Exception):
    """The frame was merged into an image meanwhile."""


class FrameReader:
    """Decoded frames of one VM, those used last kept. Errors name `what`, such as the point."""

    def __init__(self, store: Store, vm_id: int, what: str) -> None:
        self._store = store
        self._vm_id = vm_id
        self._what = what
        self._kept: ByteLru[tuple[int, int], Frame] = ByteLru(FRAME_CACHE, lambda frame: frame.header.plain_length)

    def data(self, seq: int, number: int, position: int, length: int) -> memoryview:
        """`length` bytes at `position` in a frame's data. Raises FrameGoneError, CorruptError."""
        frame = self._kept.get((seq, number))
        if frame is None:
            frame = self._load(seq, number)
            self._kept.put((seq, number), frame)
        piece = frame.data[position : position + length]
        if len(piece) != length:
            raise CorruptError(f"{self._what}: frame {number} is shorter than its index entries say")
        return piece

    def _load(self, seq: int, number: int) -> Frame:
        key = schema.frame_key(self._vm_id, seq, number)
        with self._store.env.read() as txn:
            raw = txn.get(key, db=self._store.env.db(schema.FRAMES))
        if raw is None:
            raise FrameGoneError
        try:
            frame = decode(raw)
        except HvfuseError as error:
            raise CorruptError(
                f"{self._what}: frame {number} of stored cycle {seq} is damaged: {error}",
                hint="hvfuse store check",
            ) from None
        if frame.header.number != number:
            raise CorruptError(f"{self._what}: frame {number} of stored cycle {seq} is another frame")
        return frame


class CycleReader:
    """The disks as a committed cycle left them, read-only. Safe for use by several threads.

    Nothing holds the cycle: see `PointReader`. Raises NotFoundError, CorruptError.
    """

    def __init__(self, store: Store, vm: VmRecord, cycle: PointRecord) -> None:
        self._store = store
        self.point: RecoveryPoint = cycle.recovery_point(vm.name)
        self._vm_id = vm.id
        self._seq = cycle.seq
        self._disks = {disk.name: disk for disk in cycle.disks}
        self._frames = FrameReader(store, vm.id, f"{vm.name}: point {self.point.id}")
        self._maps: ByteLru[tuple[int, int], tuple[RegionMap, str | None]] = ByteLru(
            MAP_CACHE, lambda found: found[0].nbytes + _MAP_OVERHEAD
        )
        self._wide: dict[int, Layer] = {}
        self._images: dict[str, int] = {}
        self._lock = threading.RLock()  # guards the caches and descriptors above

    @property
    def disks(self) -> tuple[DiskManifest, ...]:
        """The disks, with their sizes at the point."""
        return self.point.disks

    def pread(self, disk_name: str, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length) of a disk; fewer only at its end.

        Raises NotFoundError (no such disk, or the point was let go), CorruptError naming the damaged
        frame; other ranges stay readable.
        """
        disk = self._disk(disk_name)
        end = min(offset + length, disk.size)
        if offset < 0 or end <= offset:
            return b""
        out = bytearray(end - offset)
        with self._lock:
            at = offset
            while at < end:
                stop = min(end, at - at % REGION + REGION)
                self._retried(self._fill, disk, at, stop, memoryview(out)[at - offset : stop - offset])
                at = stop
        return bytes(out)

    def extents(self, disk_name: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges (offset, end) within [start, end) that may hold data, ascending; the rest is zeroes."""
        disk = self._disk(disk_name)
        end = min(end, disk.size)
        low = high = at = max(start, 0)
        while at < end:
            stop = min(end, at - at % REGION + REGION)
            with self._lock:
                found = self._retried(self._data_ranges, disk, at, stop)
            for begin, finish in found:
                if begin != high:
                    if high > low:
                        yield low, high
                    low = begin
                high = finish
            at = stop
        if high > low:
            yield low, high

    def close(self) -> None:
        """Let files and memory go."""
        with self._lock:
            for fd in self._images.values():
                os.close(fd)
            self._images.clear()
            self._forget()

    def _disk(self, name: str) -> DiskRecord:
        disk = self._disks.get(name)
        if disk is None:
            raise NotFoundError(f"{self.point.vm}: point {self.point.id} has no disk {name!r}")
        return disk

    def _forget(self) -> None:
        self._maps.clear()
        self._wide.clear()

    def _retried(self, act: Callable[..., _Value], *arguments: object) -> _Value:
        """Run `act` again with everything resolved anew while merges take frames away under it."""
        for _ in range(_ATTEMPTS):
            try:
                return act(*arguments)
            except FrameGoneError:
                self._forget()
        raise CorruptError(f"{self.point.vm}: point {self.point.id}: a frame is missing", hint="hvfuse store check")

    def _fill(self, disk: DiskRecord, start: int, end: int, out: memoryview) -> None:
        """Fill `out` with the bytes [start, end), which lie in one region."""
        found, image = self._map(disk, start // REGION)
        from_image = False
        at = start
        for low, high, kind, piece in _pieces(found, start, end):
            if low > at:
                from_image |= self._read_image(image, at, out[at - start : low - start])
            if kind == Fill.DATA:
                seq, number = int(found.seqs[piece]), int(found.numbers[piece])
                position = int(found.positions[piece]) + low - int(found.starts[piece])
                out[low - start : high - start] = self._frames.data(seq, number, position, high - low)
            else:
                out[low - start : high - start] = bytes(high - low)
            at = high
        if end > at:
            from_image |= self._read_image(image, at, out[at - start :])
        if from_image:
            self._check_still_there()

    def _data_ranges(self, disk: DiskRecord, start: int, end: int) -> list[tuple[int, int]]:
        """What may hold data within one region."""
        found, image = self._map(disk, start // REGION)
        fd = self._image(image)
        ranges: list[tuple[int, int]] = []
        at = start
        for low, high, kind, _ in _pieces(found, start, end):
            if low > at and fd is not None:
                ranges.extend(system.data_extents(fd, at, low))
            if kind == Fill.DATA:
                ranges.append((low, high))
            at = high
        if end > at and fd is not None:
            ranges.extend(system.data_extents(fd, at, end))
        self._check_still_there()
        return ranges

    def _read_image(self, image: str | None, offset: int, out: memoryview) -> bool:
        """Fill `out` from a replica image, zeroes beyond its end. Returns whether there is an image."""
        fd = self._image(image)
        data = b"" if fd is None else system.pread(fd, len(out), offset)
        out[: len(data)] = data
        out[len(data) :] = bytes(len(out) - len(data))
        return fd is not None

    def _image(self, name: str | None) -> int | None:
        if name is None:
            return None
        fd = self._images.get(name)
        if fd is None:
            path = self._store.image_path(self.point.vm, name)
            fd = self._images[name] = open_image(path)
        return fd

    def _map(self, disk: DiskRecord, region: int) -> tuple[RegionMap, str | None]:
        """What the journal says of a region, and the image to look at for the rest; None: zeroes."""
        known = self._maps.get((disk.number, region))
        if known is not None:
            return known
        with self._store.env.read() as txn:
            vm = self._load_vm(txn)
            own, wide = self._layers(txn, vm, disk.number, region)
            image = base_image(self._store, txn, vm, disk.number)
        found = resolve(own, wide, start=region * REGION, end=(region + 1) * REGION)
        self._maps.put((disk.number, region), (found, image))
        return found, image

    def _layers(self, txn: Txn, vm: VmRecord, disk: int, region: int) -> tuple[Layer, Layer]:
        env, after = self._store.env, vm.base_seq
        if disk not in self._wide:
            self._wide[disk] = read_wide(txn, env, vm=vm.id, disk=disk, after=after, upto=self._seq)
        # A merge since then has taken away entries that were newer than some of these.
        wide = self._wide[disk].select(self._wide[disk].seqs > after)
        return read_region(txn, env, vm=vm.id, disk=disk, region=region, after=after, upto=self._seq), wide

    def _load_vm(self, txn: Txn) -> VmRecord:
        vm = self._store.load_vm(txn, self.point.vm)
        if vm.id != self._vm_id or vm.floor_seq > self._seq:
            raise NotFoundError(
                f"{self.point.vm}: recovery point {self.point.id} was let go by retention",
                hint=f"hvfuse point list {self.point.vm}",
            )
        return vm

    def _check_still_there(self) -> None:
        """What was just read from an image was the point's."""
        with self._store.env.read() as txn:
            self._load_vm(txn)


class PointReader(CycleReader):
    """The disks of recovery point `point_id` of a VM.

    Does not hold the point: pin it, or be ready for NotFoundError from any read once retention has let
    it go. Raises NotFoundError, CorruptError.
    """

    def __init__(self, store: Store, vm_name: str, point_id: str) -> None:
        with store.env.read() as txn:
            vm = store.load_vm(txn, vm_name)
            cycle = store.load_point(txn, vm, point_id)
        super().__init__(store, vm, cycle)


def _pieces(found: RegionMap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, kind, index in the map) of the pieces that meet [start, end), cut to it."""
    first = int(np.searchsorted(found.ends, start, "right"))
    last = int(np.searchsorted(found.starts, end, "left"))
    pieces = slice(first, last)
    rows = zip(found.starts[pieces].tolist(), found.ends[pieces].tolist(), found.kinds[pieces].tolist(), strict=True)
    for index, (low, high, kind) in enumerate(rows, first):
        yield max(low, start), min(high, end), kind, index


def base_image(store: Store, txn: Txn, vm: VmRecord, disk: int) -> str | None:
    """File name of the image that holds the disk of that number at the base point; None if none does."""
    base = store.load_cycle(txn, vm, vm.base_seq)
    return next((record.name for record in base.disks if record.number == disk), None)


def open_image(path: str) -> int:
    """A descriptor for reading a replica image. Raises CorruptError if it is missing or no plain file."""
    with file_faults(path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CorruptError(f"{path}: the replica image is missing") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptError(f"{path}: not a plain file")
    return fd
