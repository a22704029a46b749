"""Where the time of one 4k write goes.

Through the mount, as one over the writes a second that fio gets at depth 1, O_DIRECT, in microseconds: to a file whose
writes do nothing (`nothing`), to an untracked file, to a tracked disk. What the first one takes is the floor: fio, the
kernel's way to us and back, and our loop.

Within the process, without a mount: `TrackedDisk.write` as a whole ("peer"), and what it calls ("hvfuse"), each alone
and many times over. All else are the calls themselves, the lock, and looking whether there is a log.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import stringzilla
import xxhash

from hvfuse.formats import hrl
from hvfuse.formats.companion import Kind
from hvfuse.tracker.index import IndexMap
from hvfuse.tracker.vm import TrackedVm

from . import nothing
from .contenders import OURS, UNTRACKED, Load, contenders, figures
from .scene import MIB, Place, Scene, unmount
from .table import Row

_WRITE = Load("", ("--rw=randwrite", "--direct=1", "--ioengine=libaio", "--bs=4k", "--iodepth=1"))
_SIZE = 256 * MIB
_TIMES = 20_000
_DISK = "disk.raw"


def measure(scene: Scene) -> list[Row]:
    return [row for memory in (False, True) for row in (*_through(scene, memory), *_within(scene, memory))]


def _through(scene: Scene, memory: bool) -> list[Row]:
    where = "tmpfs" if memory else "disk"
    found: dict[str, list[float]] = {"nothing": [], UNTRACKED: [], OURS: []}
    with contenders(scene, (UNTRACKED, OURS), memory=memory) as among, scene.place(memory=memory) as place:
        among.warm([_WRITE])
        empty = _nothing(place)
        for _ in range(scene.rounds(5)):
            for name, micros in found.items():
                path = empty if name == "nothing" else among.files[name]
                size = _SIZE if name == "nothing" else path.stat().st_size
                micros.append(1e6 / float(figures(path, size, [_WRITE], quick=scene.quick)[0]["write"]["iops"]))
            among.ship()
    floor = statistics.median(found["nothing"])
    rows = []
    for name, text in (("nothing", "nothing is done"), (UNTRACKED, "untracked"), (OURS, "tracked")):
        micros = statistics.median(found[name])
        rows.append(
            Row(f"{where}, through the mount: {text} (nothing is done)", floor, micros, "us", floor / micros, None)
        )
    return rows


def _nothing(place: Place) -> Path:
    mountpoint = place.path / "nothing"
    mountpoint.mkdir()
    place.stack.callback(unmount, mountpoint)
    place.start(
        sys.executable, "-m", nothing.__name__, mountpoint, str(_SIZE), until=lambda: os.path.ismount(mountpoint)
    )
    return mountpoint / nothing.NAME


def _within(scene: Scene, memory: bool) -> list[Row]:
    where = "tmpfs" if memory else "disk"
    with scene.place(memory=memory) as place:
        with open(place.path / _DISK, "wb") as file:
            for _ in range(_SIZE // MIB):
                file.write(os.urandom(MIB))
        vm = TrackedVm("vm", str(place.path), hard_limit=1000, soft_limit=1000)
        vm.attach()
        vm.begin(uuid.uuid4().bytes)
        try:
            for _ in range(3):
                _cycle(vm)
            found = _parts(vm, scene.rounds(5))
        finally:
            vm.detach()
    whole = statistics.median(found.pop("TrackedDisk.write"))
    parts = {name: statistics.median(times) for name, times in found.items()}
    parts["all else"] = max(whole - sum(parts.values()), 0.01)
    return [
        Row(f"{where}, in process: {name} (write)", whole, us, "us", whole / us, None) for name, us in parts.items()
    ]


def _cycle(vm: TrackedVm) -> None:
    """Let it have logs to recycle."""
    data = os.urandom(MIB)
    for offset in range(0, _SIZE, MIB):
        vm.disks[_DISK].write(data, offset)
    rotation = vm.rotate()
    vm.release(rotation.generation, rotation.cycle)


def _parts(vm: TrackedVm, rounds: int) -> dict[str, list[float]]:
    """Microseconds."""
    disk, data, dice = vm.disks[_DISK], memoryview(os.urandom(4096)), random.Random(1)
    log, regions = disk.log, disk.regions
    assert log is not None and regions is not None
    index, stamp = IndexMap(f"{vm.folder}/index"), hrl.hrl_time(time.time_ns())
    places = [dice.randrange(_SIZE // 4096) * 4096 for _ in range(_TIMES)]
    ends = iter(range(1 << 30, 1 << 40, 4096))
    scratch = os.open(log.path, os.O_RDWR)
    acts: dict[str, Callable[[int], object]] = {
        "TrackedDisk.write": lambda at: disk.write(data, at),
        "pwrite to the image": lambda at: os.pwrite(disk.fd, data, at),
        "pwrite to the log": lambda at: os.pwrite(scratch, data, next(ends) - (1 << 30)),
        "xxh3 and sum of the bytes": lambda at: (stringzilla.bytesum(data), xxhash.xxh3_64_intdigest(data)),
        "entry in the index": lambda at: index.append(1, at, 0, 0, 4096, 0, stamp, Kind.WRITE),
        "region is hot": lambda at: regions.cover(at, 4096),
        "time": lambda at: hrl.hrl_time(time.time_ns()),
    }
    found: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, act in acts.items():
            idle = _microseconds(lambda at: None, places)
            found[name].append(_microseconds(act, places) - idle)
    os.close(scratch)
    index.close()
    return found


def _microseconds(act: Callable[[int], object], places: list[int]) -> float:
    started = time.perf_counter_ns()
    for at in places:
        act(at)
    return (time.perf_counter_ns() - started) / len(places) / 1000
