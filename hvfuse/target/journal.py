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
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from hvfuse import system
from hvfuse.errors import CorruptError, NotFoundError
from hvfuse.extent import round_down
from hvfuse.frames import Fill
from hvfuse.manifest import DiskManifest, RecoveryPoint
from hvfuse.target import schema
from hvfuse.target.environment import Txn, file_faults
from hvfuse.target.index import EMPTY, Layer, RegionMap, occupied_regions, read_region, read_wide, resolve
from hvfuse.target.kept import FRAME_CACHE, ByteLru, FrameGoneError, FrameReader
from hvfuse.target.schema import REGION, DiskRecord, PointRecord, VmRecord
from hvfuse.target.store import Store

MAP_CACHE = 32 << 20
"""Bytes that resolved regions of one reader may take."""
POINT_FRAME_CACHE = 128 << 20
"""Bytes that decoded frames may take where a guest reads here and there."""
_MAP_OVERHEAD = 2048
_SCAN_REGIONS = 64
"""Regions that are looked for in the index at once: 4 GiB of disk."""
_SCAN_RANGES = 256
"""Ranges of an image that are looked up at once."""
_ATTEMPTS = 8
"""Times that a region is resolved anew for one read: each takes another merge in between."""

_DATA = Fill.DATA.value

_Value = TypeVar("_Value")


class _Region:
    """What a region consists of: what the journal says, `map`, and for the rest the image of that file name; None:
    zeroes. `starts`, `ends`: of the map's pieces, in a form from which single numbers are had sooner."""

    __slots__ = ("ends", "image", "map", "starts")

    def __init__(self, found: RegionMap, image: str | None) -> None:
        self.map = found
        self.image = image
        self.starts = found.starts.data
        self.ends = found.ends.data

    def pieces(self, start: int, end: int) -> Iterable[tuple[int, int, int, int]]:
        """(start, end, kind, index in the map) of the pieces that meet [start, end), cut to it."""
        first = bisect_right(self.ends, start)
        if first == len(self.starts) or self.starts[first] >= end:
            return ()
        last = bisect_left(self.starts, end, first)
        kinds = self.map.kinds[first:last].tolist()
        bounds = zip(self.starts[first:last], self.ends[first:last], kinds, range(first, last), strict=True)
        return ((max(low, start), min(high, end), kind, index) for low, high, kind, index in bounds)


class CycleReader:
    """The disks as a committed cycle left them, read-only. Safe for use by several threads.

    Nothing holds the cycle: see `PointReader`. `frame_cache`: bytes that decoded frames may take. Raises NotFoundError,
    CorruptError.
    """

    def __init__(self, store: Store, vm: VmRecord, cycle: PointRecord, *, frame_cache: int = FRAME_CACHE) -> None:
        self._store = store
        self.point: RecoveryPoint = cycle.recovery_point(vm.name)
        self._vm_id = vm.id
        self._seq = cycle.seq
        self._disks = {disk.name: disk for disk in cycle.disks}
        self._frames = FrameReader(store, vm.id, f"{vm.name}: point {self.point.id}", limit=frame_cache)
        self._maps: ByteLru[tuple[int, int], _Region] = ByteLru(
            MAP_CACHE, lambda region: region.map.nbytes + _MAP_OVERHEAD
        )
        self._wide: dict[int, Layer] = {}
        self._images: dict[str, int] = {}
        self._vm_key = schema.vm_key(vm.name)
        self._seen: tuple[bytes, VmRecord] | None = None  # the VM's record as it was last, packed and unpacked
        self._good: bytes | None = None  # a packed record of the VM with which the cycle is there still
        self._base: tuple[int, dict[int, str]] = (-1, {})  # a base's seq, and its images by disk number
        # Guards all of the above; taken before a transaction, never within one. `_users`: reads that are using
        # descriptors; they do so without the lock, and `close` waits for them.
        self._lock = threading.RLock()
        self._unused = threading.Condition(self._lock)
        self._users = 0
        self._is_closing = False

    @property
    def disks(self) -> tuple[DiskManifest, ...]:
        """The disks, with their sizes at the point."""
        return self.point.disks

    def pread(self, disk_name: str, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length) of a disk; fewer only at its end.

        Raises NotFoundError (no such disk, or the point was let go), CorruptError naming the damaged
        frame; other ranges stay readable.
        """
        end = min(offset + length, self._disk(disk_name).size)
        if offset < 0 or end <= offset:
            return b""
        out = bytearray(end - offset)
        self.pread_into(disk_name, offset, memoryview(out))
        return bytes(out)

    def pread_into(self, disk_name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with a disk's bytes from `offset` on, and zeroes beyond its end. Raises as `pread`."""
        disk = self._disk(disk_name)
        end = offset + len(out)
        if end > disk.size:
            end = max(disk.size, offset)
            out[end - offset :] = bytes(len(out) - (end - offset))
        elif self._read_at_once(disk, offset, end, out):
            return
        at = offset
        while at < end:
            stop = min(end, at - at % REGION + REGION)
            whole = stop - at == len(out)
            self._retried(self._fill, disk, at, stop, out if whole else out[at - offset : stop - offset])
            at = stop

    def extents(self, disk_name: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges (offset, end) within [start, end) that may hold data, ascending and apart; the rest is
        zeroes. Reads no data."""
        disk = self._disk(disk_name)
        low = high = max(start, 0)
        for begin, finish in self._data_ranges(disk, low, min(end, disk.size)):
            if begin != high:
                if high > low:
                    yield low, high
                low = begin
            high = finish
        if high > low:
            yield low, high

    def close(self) -> None:
        """Let files and memory go, once the reads under way are done."""
        with self._lock:
            self._is_closing = True
            self._unused.wait_for(lambda: not self._users)
            self._is_closing = False
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
        with self._lock:
            self._maps.clear()
            self._wide.clear()

    def _retried(self, act: Callable[..., _Value], *arguments: object) -> _Value:
        """Run `act` again with everything resolved anew while merges take frames away under it. Descriptors that it
        looks up stay open as long as it runs."""
        for _ in range(_ATTEMPTS):
            with self._lock:
                self._users += 1
            try:
                return act(*arguments)
            except FrameGoneError:
                self._forget()
            finally:
                self._let_go()
        raise CorruptError(f"{self.point.vm}: point {self.point.id}: a frame is missing", hint="hvfuse store check")

    def _let_go(self) -> None:
        """A read uses descriptors no more."""
        with self._lock:
            self._users -= 1
            if self._is_closing:
                self._unused.notify_all()

    def _read_at_once(self, disk: DiskRecord, start: int, end: int, out: memoryview) -> bool:
        """What `_fill` does, in a fraction of its time, for most reads: those of bytes that lie in one place, in a
        region that is resolved. Returns whether that was so; if not, `out` may hold anything."""
        number = start // REGION
        with self._lock:
            region = self._maps.get((disk.number, number))
            if region is None or end > (number + 1) * REGION:
                return False
            piece = bisect_right(region.ends, start)
            if piece < len(region.starts) and region.starts[piece] < end:
                if region.starts[piece] > start or region.ends[piece] < end or region.map.kinds.item(piece) != _DATA:
                    return False
                try:
                    out[:] = self._piece_data(region, piece, start, end)
                except FrameGoneError:
                    return False
                return True
            fd = None if region.image is None else self._images.get(region.image)
            if fd is None:
                return False
            self._users += 1
        try:
            _read_image(fd, start, out)
        finally:
            self._let_go()
        return self._is_still_there()

    def _fill(self, disk: DiskRecord, start: int, end: int, out: memoryview) -> None:
        """Fill `out` with the bytes [start, end), which lie in one region."""
        with self._lock:
            region = self._region(disk, start // REGION)
            pieces = [
                (low - start, high - start, self._piece_data(region, piece, low, high) if kind == _DATA else None)
                for low, high, kind, piece in region.pieces(start, end)
            ]
            fd = self._image(region.image)
        gaps = _gaps(pieces, end - start)
        if fd is None:
            for low, high in gaps:
                out[low:high] = bytes(high - low)
        elif 2 * sum(high - low for low, high in gaps) > end - start:
            _read_image(fd, start, out)  # one call, and what the journal has over it
        else:
            for low, high in gaps:
                _read_image(fd, start + low, out[low:high])
        for low, high, data in pieces:
            out[low:high] = bytes(high - low) if data is None else data
        if gaps and fd is not None:
            self._check_still_there()

    def _piece_data(self, region: _Region, piece: int, low: int, high: int) -> memoryview:
        found = region.map
        position = found.positions.item(piece) + low - region.starts[piece]
        return self._frames.data(found.seqs.item(piece), found.numbers.item(piece), position, high - low)

    def _data_ranges(self, disk: DiskRecord, start: int, end: int) -> Iterator[tuple[int, int]]:
        """What may hold data within [start, end), ascending; neighbours may touch. Looked up bit by bit."""
        at = start
        while at < end:
            stop = min(end, round_down(at, _SCAN_REGIONS * REGION) + _SCAN_REGIONS * REGION)
            for region in self._own_regions(disk, at, stop):
                low, high = max(region * REGION, at), min((region + 1) * REGION, stop)
                yield from self._ranges_between(disk, at, low)
                yield from self._retried(self._region_ranges, disk, low, high)
                at = high
            yield from self._ranges_between(disk, at, stop)
            at = stop

    def _own_regions(self, disk: DiskRecord, start: int, end: int) -> list[int]:
        """The regions within [start, end) of which the journal has more to say than wide entries do. (Merges
        make them fewer; what is not among them stays so.)"""
        low, high = start // REGION, -(-end // REGION)
        with self._store.env.read() as txn:
            vm = self._load_vm(txn)
            return occupied_regions(
                txn, self._store.env, vm=vm.id, disk=disk.number, low=low, high=high, upto=self._seq
            )

    def _ranges_between(self, disk: DiskRecord, start: int, end: int) -> Iterator[tuple[int, int]]:
        """What may hold data within [start, end), where there are no own regions."""
        while start < end:
            found, start = self._retried(self._image_ranges, disk, start, end)
            yield from found

    def _image_ranges(self, disk: DiskRecord, start: int, end: int) -> tuple[list[tuple[int, int]], int]:
        """The first of those, and where to go on."""
        with self._lock, self._store.env.read() as txn:
            vm = self._load_vm(txn)
            wide = self._wide_layer(txn, vm, disk.number)
            fd = self._image(self._base_image(txn, vm, disk.number))
        covered = _Region(resolve(EMPTY, wide, start=start, end=end), None) if len(wide.seqs) else None
        found = list(islice(_ranges(covered, fd, start, end), _SCAN_RANGES))
        self._check_still_there()
        return found, end if len(found) < _SCAN_RANGES else found[-1][1]

    def _region_ranges(self, disk: DiskRecord, start: int, end: int) -> list[tuple[int, int]]:
        """What may hold data within [start, end), which lies in one region."""
        with self._lock:
            region = self._region(disk, start // REGION)
            fd = self._image(region.image)
        ranges = list(_ranges(region, fd, start, end))
        self._check_still_there()
        return ranges

    def _image(self, name: str | None) -> int | None:
        if name is None:
            return None
        fd = self._images.get(name)
        if fd is None:
            path = self._store.image_path(self.point.vm, name)
            fd = self._images[name] = open_image(path)
        return fd

    def _region(self, disk: DiskRecord, region: int) -> _Region:
        """What a region of a disk consists of."""
        known = self._maps.get((disk.number, region))
        if known is not None:
            return known
        env, number = self._store.env, disk.number
        with env.read() as txn:
            vm = self._load_vm(txn)
            own = read_region(
                txn, env, vm=vm.id, disk=number, region=region, after=vm.base_seq, upto=self._seq
            )  # fmt: skip
            wide = self._wide_layer(txn, vm, number)
            image = self._base_image(txn, vm, number)
        found = _Region(resolve(own, wide, start=region * REGION, end=(region + 1) * REGION), image)
        self._maps.put((number, region), found)
        return found

    def _wide_layer(self, txn: Txn, vm: VmRecord, disk: int) -> Layer:
        if disk not in self._wide:
            env, after = self._store.env, vm.base_seq
            self._wide[disk] = read_wide(txn, env, vm=vm.id, disk=disk, after=after, upto=self._seq)
        # A merge since then has taken away entries that were newer than some of these.
        wide = self._wide[disk]
        return wide.select(wide.seqs > vm.base_seq) if len(wide.seqs) else wide

    def _base_image(self, txn: Txn, vm: VmRecord, disk: int) -> str | None:
        """File name of the image that holds the disk of that number at the base point; None if none does."""
        if self._base[0] != vm.base_seq:
            base = self._store.load_cycle(txn, vm, vm.base_seq)
            self._base = (vm.base_seq, {record.number: record.name for record in base.disks})
        return self._base[1].get(disk)

    def _load_vm(self, txn: Txn) -> VmRecord:
        raw = txn.get(self._vm_key, db=self._store.env.db(schema.VMS))
        seen = self._seen
        if seen is None or seen[0] != raw:
            vm = self._store.load_vm(txn, self.point.vm)
            self._seen = None if raw is None else (raw, vm)
        else:
            vm = seen[1]
        if vm.id != self._vm_id or vm.floor_seq > self._seq:
            raise NotFoundError(
                f"{self.point.vm}: recovery point {self.point.id} was let go by retention",
                hint=f"hvfuse point list {self.point.vm}",
            )
        self._good = raw
        return vm

    def _check_still_there(self) -> None:
        """What was just read from an image was the point's."""
        if self._is_still_there():
            return
        with self._store.env.read() as txn:
            self._load_vm(txn)

    def _is_still_there(self) -> bool:
        """As `_check_still_there`, where the VM's record is the one of the last time: then it takes no time."""
        return self._good is not None and self._store.env.peek(schema.VMS, self._vm_key) == self._good


class PointReader(CycleReader):
    """The disks of recovery point `point_id` of a VM.

    Does not hold the point: pin it, or be ready for NotFoundError from any read once retention has let
    it go. Raises NotFoundError, CorruptError.
    """

    def __init__(self, store: Store, vm_name: str, point_id: str) -> None:
        with store.env.read() as txn:
            vm = store.load_vm(txn, vm_name)
            cycle = store.load_point(txn, vm, point_id)
        super().__init__(store, vm, cycle, frame_cache=POINT_FRAME_CACHE)


def _gaps(pieces: Sequence[tuple[int, int, memoryview | None]], length: int) -> list[tuple[int, int]]:
    """What ascending pieces leave free of [0, length)."""
    gaps, at = [], 0
    for low, high, _ in pieces:
        if low > at:
            gaps.append((at, low))
        at = high
    if length > at:
        gaps.append((at, length))
    return gaps


def _read_image(fd: int, offset: int, out: memoryview) -> None:
    """Fill `out` from a replica image, zeroes beyond its end."""
    done = system.pread_into(fd, out, offset)
    out[done:] = bytes(len(out) - done)


def _ranges(region: _Region | None, fd: int | None, start: int, end: int) -> Iterator[tuple[int, int]]:
    """What may hold data within [start, end), of which the journal says `region`; `fd`: of the image below."""
    at = start
    for low, high, kind, _ in () if region is None else region.pieces(start, end):
        if low > at and fd is not None:
            yield from system.data_extents(fd, at, low)
        if kind == _DATA:
            yield low, high
        at = high
    if end > at and fd is not None:
        yield from system.data_extents(fd, at, end)


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
