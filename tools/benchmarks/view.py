"""A recovery point as a disk: how soon it is there, and how fast it is read.

The store holds a day of one VM: a copy of its disk of 1 GiB, full of data, and 2,880 recovery points, one every 30
seconds. Each cycle wrote 64 KiB: 16 blocks of 4 KiB at random places, so that the newest point has a sixth of the disk
in the journal. Half of each block compresses to nothing. The store is made through the product's own replica, in
memory, as every point would be synced otherwise, and then moved to the disk; it is in the page cache.

- The time to the first byte is that from the start of the command

      hvfuse failover test VM --point P --mount DIR

  to the end of a read of 4 KiB from the mounted disk, which begins once the command has ended; of points and places
  chosen at random, in a process of its own each. It counts Python's start-up, twice: the view's server is a process.
  The test is cleaned up before the next; that is not counted.
- Reads are fio's, 4 KiB with O_DIRECT towards the mount, at random places of the view of the newest point, and of an
  equal file in the folder of a VM that hvfuse has mounted, in turns. O_DIRECT does not pass through to the images:
  both sides read the page cache. The view keeps its caches from round to round; nothing of its disk was written to.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np

from hvfuse.frames import EXTENT_DTYPE, Fill, FrameWriter
from hvfuse.manifest import CycleKind, CycleManifest, DiskManifest
from hvfuse.position import Position
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store

from .scene import GIB, KIB, MIB, Home, Place, Scene, data, fio, run, settle
from .table import Row, at_most, in_turns, rates

POINTS, SIZE = 2880, GIB
BLOCK, WRITES = 4 * KIB, 16
PERIOD_NS = 30 * 10**9
SLOT = 4 * MIB
FIRST_BYTE = 1.0
"""Seconds."""
TARGET = 0.5
_VM, _PLAIN, _DISK = "vm", "plain", "disk.raw"


def measure(scene: Scene) -> list[Row]:
    """The first byte, then the rates."""
    points, size = (96 if scene.quick else POINTS), scene.bytes(SIZE)
    with scene.place() as place:
        home = Home(place)
        with scene.place(memory=True) as memory:
            fill_store(memory.path / "store", points, size)
            shutil.move(memory.path / "store", home.root / "store")
        home.folder(_PLAIN)
        settle()
        shown = [point["id"] for point in home.json("point", "list", _VM)["points"]]
        seconds = first_bytes(scene, home, random.Random(1).sample(shown, 2 if scene.quick else 7))
        rows = [at_most(f"{points:,} points: from the command to the first byte", FIRST_BYTE, seconds, "s")]
        return rows + read_rates(scene, place, home)


def fill_store(path: Path, points: int, size: int) -> None:
    """A store with that many recovery points of a disk of `size` bytes."""
    source = Source(size, now_ns=time.time_ns() - points * PERIOD_NS)
    with Store(str(path)) as store:
        replica = LocalReplica(store, _VM)
        source.ship(replica, source.copy())
        for _ in range(points):
            source.ship(replica, source.cycle())


class Source:
    """What a shipper says to a replica, without a disk: what is written is random."""

    def __init__(self, size: int, *, now_ns: int) -> None:
        self._size = size
        self._now_ns = now_ns
        self._dice = random.Random(1)
        self._generation, self._disk_id = os.urandom(16), os.urandom(16)
        self._number = 0
        self._position: Position | None = None

    def copy(self) -> list[tuple[list[int], int]]:
        """What the frames are of: the offsets and the length of their extents."""
        return [([at], SLOT) for at in range(0, self._size, SLOT)]

    def cycle(self) -> list[tuple[list[int], int]]:
        """The same of one more cycle."""
        self._number += 1
        self._now_ns += PERIOD_NS
        return [([block * BLOCK for block in sorted(self._dice.sample(range(self._size // BLOCK), WRITES))], BLOCK)]

    def ship(self, replica: LocalReplica, frames: list[tuple[list[int], int]]) -> None:
        """One cycle, or the copy."""
        manifest = self._manifest()
        replica.begin(manifest)
        writer = FrameWriter(generation=self._generation, cycle=self._number)
        for number, (offsets, length) in enumerate(frames):
            table = np.zeros(len(offsets), EXTENT_DTYPE)
            table["offset"], table["length"], table["kind"] = offsets, length, Fill.DATA
            body = data(len(offsets) * length, compressible=True)
            replica.put(writer.encode(disk_id=self._disk_id, number=number, table=table, data=[body]))
        replica.commit(manifest, len(frames))
        self._position = manifest.position()

    def _manifest(self) -> CycleManifest:
        is_copy = not self._number
        disk = DiskManifest(
            disk_id=self._disk_id, name=_DISK, format="raw", size=self._size,
            digest=bytes(16) if is_copy else os.urandom(16),
        )  # fmt: skip
        return CycleManifest(
            vm=_VM,
            kind=CycleKind.COPY if is_copy else CycleKind.DELTA,
            generation=self._generation,
            cycle=self._number,
            previous=self._position,
            sealed_ns=self._now_ns,
            disks=(disk,),
        )


def first_bytes(scene: Scene, home: Home, points: list[str]) -> list[float]:
    """Seconds, of a test at each of the points."""
    dice = random.Random(2)
    found = []
    for number, point in enumerate([points[0], *points]):  # the first one is not counted: Python compiles its modules
        directory = home.place.path / "view"
        started = time.perf_counter()
        run(*home.command("failover", "test", _VM, "--point", point, "--mount", str(directory)))
        with open(directory / _DISK, "rb", buffering=0) as file:
            file.seek(dice.randrange(scene.bytes(SIZE) // BLOCK) * BLOCK)
            file.read(BLOCK)
        if number:
            found.append(time.perf_counter() - started)
        home.do("failover", "cleanup", _VM)
    return found


def read_rates(scene: Scene, place: Place, home: Home) -> list[Row]:
    """Random reads of the newest point's view and of an equal file in a mount."""
    view = place.path / "view"
    home.do("failover", "test", _VM, "--mount", str(view))
    place.stack.callback(home.do, "failover", "cleanup", _VM, "--force")
    shutil.copyfile(view / _DISK, home.folder(_PLAIN) / _DISK)
    plain = home.mount(_PLAIN)
    settle()
    rows = []
    for depth in (1, 16):
        read = partial(reads, scene, depth=depth)
        found = in_turns(scene.rounds(3), {"plain": partial(read, plain / _DISK), "view": partial(read, view / _DISK)})
        peers = {"an equal file in a mount": found["plain"]}
        rows.append(rates(f"4k random read, depth {depth}, of the newest point", peers, found["view"], "IOPS", TARGET))
    return rows


def reads(scene: Scene, path: Path, *, depth: int) -> float:
    """fio's rate."""
    (job,) = fio(
        "--name=reads", f"--filename={path}", "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=libaio",
        f"--iodepth={depth}", "--thread", "--allow_file_create=0", "--norandommap", "--randrepeat=0", "--time_based",
        f"--runtime={500 if scene.quick else 3000}ms",
    )  # fmt: skip
    return float(job["read"]["iops"])
