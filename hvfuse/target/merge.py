"""Moving the base point: the oldest cycles of the journal are written into the replica images.

In steps. Each takes the next few cycles, resolves them (newest write wins), writes the result, syncs the
images, and in one transaction moves the base and deletes the cycles' frames. Before the first byte is
written a transaction announces where the step goes (`floor_seq`). A crash leaves images that are
somewhere between base and floor; the next merge goes at least as far and writes every byte that the
first might have written, so the result does not depend on the crash.

A disk that began with a whole copy after the base gets its image blanked first, every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from hvfuse.errors import CorruptError
from hvfuse.frames import Fill
from hvfuse.manifest import CycleKind
from hvfuse.target import cycles
from hvfuse.target.environment import Txn
from hvfuse.target.images import ReplicaImages
from hvfuse.target.index import Layer, RegionMap, read_region, read_wide, resolve
from hvfuse.target.kept import FrameGoneError, FrameReader
from hvfuse.target.schema import REGION, DiskRecord, PointRecord, VmRecord
from hvfuse.target.store import Store

STEP_BYTES = 64 << 20
"""Bytes of frames that one step takes at most, if it is more than one cycle: about what `FrameReader`
keeps decoded, so that frames spread over many regions are not decoded again for each."""
STEP_CYCLES = 64
"""Cycles that one step takes at most. The frames of a cycle follow each other on the disk, so there are one or two of
each cycle that are wanted for a region and for the next: `FrameReader` has to keep these of all of them."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One step: the VM as it is, and the base's record before and after."""

    vm: VmRecord
    before: PointRecord
    after: PointRecord

    @property
    def span(self) -> dict[str, int]:
        """The step's cycles, after < seq <= upto."""
        return {"after": self.before.seq, "upto": self.after.seq}

    def is_blank(self, disk: DiskRecord) -> bool:
        """Whether the disk, which is there afterwards, has no image yet."""
        return all(old.number != disk.number for old in self.before.disks)


def merge(store: Store, vm_name: str, upto_seq: int) -> int:
    """Move the base of a VM to `upto_seq`, or as near as its listed points and pins allow.

    Returns the number of cycles merged. Raises BusyError while another process writes the images,
    CorruptError (a damaged frame: the base stays before it), NoSpaceError.
    """
    merged = 0
    with ReplicaImages(store.replica_folder(vm_name)) as images, images.lock():
        while True:
            step = store.write("merge:announce", partial(_announce, store, vm_name, upto_seq))
            if step is None:
                return merged
            _StepWriter(store, step, images).write()
            store.write("merge:base", partial(_move_base, store, step))
            for name in {disk.name for disk in step.before.disks} - {disk.name for disk in step.after.disks}:
                images.remove(name)
            merged += step.after.seq - step.before.seq


def _announce(store: Store, vm_name: str, upto_seq: int, txn: Txn) -> _Step | None:
    """Settle how far the next step goes and keep readers of what lies before out; None: all is done."""
    vm = store.load_vm(txn, vm_name)
    if vm.position is None:
        return None
    held = [seq for seq, _ in store.listed(txn, vm)]
    held += [pin.seq for pin in store.scan_pins(txn) if pin.vm == vm_name]
    limit = max(vm.floor_seq, min([upto_seq, *held]) if held else vm.floor_seq)
    if limit <= vm.base_seq:
        return None
    target, size = vm.base_seq, 0
    for cycle in store.scan_cycles(txn, vm, first=vm.base_seq + 1, last=limit):
        size += cycle.stored_bytes
        is_much = size > STEP_BYTES or cycle.seq > vm.base_seq + STEP_CYCLES
        if target >= max(vm.floor_seq, vm.base_seq + 1) and is_much:
            break
        target = cycle.seq
    store.save_vm(txn, replace(vm, floor_seq=max(vm.floor_seq, target)))
    return _Step(vm, store.load_cycle(txn, vm, vm.base_seq), store.load_cycle(txn, vm, target))


class _StepWriter:
    """Brings the images from the state before a step to that after it."""

    def __init__(self, store: Store, step: _Step, images: ReplicaImages) -> None:
        self._store = store
        self._step = step
        self._images = images
        self._frames = FrameReader(store, step.vm.id, step.vm.name)

    def write(self) -> None:
        """Do it, durably."""
        step, images = self._step, self._images
        images.blank(disk.name for disk in step.after.disks if step.is_blank(disk))
        regions = self._regions()
        for disk in step.after.disks:
            self._write_disk(disk, sorted(regions.get(disk.number, ())))
            size = disk.size
            if step.after.kind is CycleKind.COPY:
                size = max(size, images.size(disk.name))  # cycles after it may need what lies beyond
            images.resize(disk.name, size)
        images.sync()

    def _regions(self) -> dict[int, set[int]]:
        """By disk number, the regions in which the step's cycles have entries of their own."""
        found: dict[int, set[int]] = {}
        first, last = self._step.before.seq + 1, self._step.after.seq
        with self._store.env.read() as txn:
            for _, _, placed in cycles.placements(txn, self._store.env, self._step.vm, first=first, last=last):
                found.setdefault(placed.disk, set()).update(placed.regions)
        return found

    def _write_disk(self, disk: DiskRecord, regions: Sequence[int]) -> None:
        """Write what the step's cycles make of one disk, region by region."""
        env = self._store.env
        span = {"vm": self._step.vm.id, "disk": disk.number} | self._step.span
        with env.read() as txn:
            wide = read_wide(txn, env, **span)
        for region in _with_wide(regions, wide):
            with env.read() as txn:
                own = read_region(txn, env, region=region, **span)
            found = resolve(own, wide, start=region * REGION, end=(region + 1) * REGION)
            for low, high, kind, seq, number, position in _rows(found):
                if kind == Fill.ZERO:
                    self._images.zero(disk.name, low, high - low)
                else:
                    self._images.write(disk.name, low, self._data(seq, number, position, high - low))

    def _data(self, seq: int, number: int, position: int, length: int) -> memoryview:
        """`FrameReader.data`, where nobody else can have merged the frame."""
        try:
            return self._frames.data(seq, number, position, length)
        except FrameGoneError:
            raise CorruptError(
                f"{self._step.vm.name}: frame {number} of stored cycle {seq} is missing",
                hint="hvfuse store check",
            ) from None


def _with_wide(regions: Sequence[int], wide: Layer) -> list[int]:
    """The regions, and those that wide entries meet; ascending."""
    starts = wide.entries["offset"].astype(np.int64)
    ends = starts + wide.entries["length"].astype(np.int64)
    spans = [np.arange(low // REGION, -(-high // REGION)) for low, high in zip(starts, ends, strict=True)]
    return [int(region) for region in np.unique(np.concatenate([np.array(regions, np.int64), *spans]))]


def _rows(found: RegionMap) -> Iterator[list[int]]:
    """start, end, kind, seq, number, position of each piece."""
    columns = (found.starts, found.ends, found.kinds, found.seqs, found.numbers, found.positions)
    yield from np.stack(columns, axis=1).tolist()


def _move_base(store: Store, step: _Step, txn: Txn) -> None:
    vm = store.load_vm(txn, step.vm.name)
    assert (vm.base_seq, vm.floor_seq) == (step.before.seq, max(step.vm.floor_seq, step.after.seq))
    store.save_vm(txn, replace(vm, base_seq=step.after.seq))
    cycles.drop_frames(txn, store.env, vm, first=0, last=step.after.seq)
    cycles.drop_records(txn, store.env, vm, before=step.after.seq)
