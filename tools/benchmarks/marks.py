"""What the region map costs a guest's writes: the same writes with and without marking, in turns, medians.

Each round writes 4 KiB at random places of a cold 1 GiB disk, which lies sparse on the disk, through the tracker's
write path (no mount): once with the map as it is, and once with marking left out, which is the peer. The rate counts
from the first write to the last; nothing is synced but what marking syncs, and those syncs are counted.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from functools import partial
from pathlib import Path

from hvfuse import system
from hvfuse.tracker.regions import RegionMap
from hvfuse.tracker.vm import TrackedVm

from .scene import GIB, Scene, sparse
from .table import Row, in_turns, rates

WRITES = 20_000
ROUNDS = 5


def measure(scene: Scene) -> list[Row]:
    """One row."""
    writes = WRITES // 10 if scene.quick else WRITES
    syncs = 0

    def rate(*, marking: bool) -> float:
        nonlocal syncs
        with scene.place() as place:
            found, counted = written(place.path, writes, marking=marking)
        syncs = max(syncs, counted)
        return found

    found = in_turns(
        scene.rounds(ROUNDS), {"unmarked": partial(rate, marking=False), "marked": partial(rate, marking=True)}
    )
    subject = f"{writes:,} random 4k writes to a cold disk, {syncs} syncs of the map"
    return [rates(subject, {"unmarked": found["unmarked"]}, found["marked"], "writes/s")]


def written(folder: Path, writes: int, *, marking: bool) -> tuple[float, int]:
    """(writes per second, syncs of the map) of one round."""
    sparse(folder / "disk.raw", GIB)
    vm = TrackedVm("vm", str(folder), hard_limit=1000, soft_limit=1000)
    vm.attach()
    vm.begin(uuid.uuid4().bytes)
    disk = vm.disks["disk.raw"]
    dice = random.Random(1)
    data = os.urandom(4096)
    syncs = 0

    def count(label: str, _call: str, _size: int) -> None:
        nonlocal syncs
        syncs += label == "regions:sync"

    cover = RegionMap.cover
    if not marking:
        RegionMap.cover = lambda self, *range_: None  # type: ignore[method-assign]
    system.install(count)
    started = time.perf_counter()
    for _ in range(writes):
        disk.write(data, dice.randrange(GIB // 4096) * 4096)
    seconds = time.perf_counter() - started
    system.install(None)
    RegionMap.cover = cover  # type: ignore[method-assign]
    vm.detach()
    return writes / seconds, syncs
