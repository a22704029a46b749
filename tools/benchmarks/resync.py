"""tools/resync, and `hvfuse resync` of a VM, against rsync and cmp, on equal images, in turns; medians.

Every program runs as its user would run it, start-up included, with the images in the page cache:

    rsync   rsync -I --inplace --no-whole-file SOURCE REPLICA
            -I, since it would otherwise believe that files of the same size and time are equal
    cmp     cmp SOURCE REPLICA: reads both images once and compares them
    ours    tools/resync SOURCE REPLICA

The images hold 2 GiB of random bytes. Each program runs on a small pair first, which is not counted: Python's compiled
modules are there then, as they are for a user. Before each run on changed images the same blocks of the replica are
changed anew, 4 KiB in each, and synced; afterwards the pair is compared.

`hvfuse resync VM` has the same image as the disk of a VM, mounted and replicated to the store of its own home, in the
same turns as rsync. Unchanged, it is asked for everything (--full). Changed, the disk was written to while it was not
mounted, other blocks each time, so that everything has to be compared; mounting is not counted. The command makes what
differs durable, and a recovery point; tools/resync syncs what it wrote; rsync syncs nothing.

The rows on sparse disks copy one GiB of data to a file that does not exist yet. Bytes read are what the process asked
the kernel for, its own program included (rchar of /proc/PID/io); memory is its peak resident size (VmHWM).
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .scene import (
    ENVIRONMENT,
    GIB,
    KIB,
    MIB,
    REPOSITORY,
    TIB,
    Home,
    Place,
    Scene,
    fill,
    peak_until_end,
    seconds_of,
    settle,
)
from .table import Row, at_most, in_turns, times

RESYNC = REPOSITORY / "tools" / "resync"
ROUNDS = 3
SIZE, DATA = 2 * GIB, GIB
BLOCK = 64 * KIB
TARGET = 3.0
TARGET_CMP = round(1 / 1.5, 3)
TARGET_SPARSE = round(1 / 1.2, 3)
MEMORY = 300.0
"""MiB."""


def measure(scene: Scene) -> list[Row]:
    """Unchanged images, changed ones, sparse disks."""
    with scene.place() as place:
        warm_up(place.path)
        rows = equal_and_changed(scene, place)
    with scene.place() as place:
        return rows + sparse(scene, place)


def warm_up(folder: Path) -> None:
    """Run everything once."""
    pair = Pair(folder / "small", MIB)
    for program in (pair.rsync, pair.cmp, pair.ours):
        program()
    pair.remove()


@dataclass(frozen=True)
class Run:
    """What one process took. `read`, `peak`: bytes."""

    seconds: float
    read: int
    peak: int


def run(*command: str | Path, expected: int) -> Run:
    """Run a command; ends the benchmark if it ends with another code than `expected`."""
    words = [str(word) for word in command]
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    peak = peak_until_end(process, 0.002)
    seconds = time.perf_counter() - started
    with open(f"/proc/{process.pid}/io", encoding="ascii") as file:  # it has ended, but is not yet reaped
        read = int(file.readline().split()[1])
    process.wait()
    if process.returncode != expected:
        sys.exit(f"{' '.join(words)}: ended with {process.returncode}, not {expected}")
    return Run(seconds, read, peak)


class Pair:
    """Two equal images, of which one block in a hundred can be made to differ."""

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir()
        self.source, self.replica = folder / "source.raw", folder / "replica.raw"
        fill(self.source, size)
        shutil.copyfile(self.source, self.replica)
        self._blocks = random.Random(1).sample(range(size // BLOCK), max(1, size // BLOCK // 100))
        settle()

    def spoil(self) -> None:
        """Change the replica."""
        change(self.replica, self._blocks)

    def remove(self) -> None:
        """Make room in the page cache."""
        self.source.unlink()
        self.replica.unlink()

    def ours(self, expected: int = 0) -> float:
        return run(RESYNC, self.source, self.replica, expected=expected).seconds

    def rsync(self) -> float:
        return run("rsync", "-I", "--inplace", "--no-whole-file", self.source, self.replica, expected=0).seconds

    def cmp(self) -> float:
        """The limit of reading."""
        return run("cmp", self.source, self.replica, expected=0).seconds


def change(image: Path, blocks: list[int]) -> None:
    """Write 4 KiB in each of the blocks."""
    with open(image, "r+b") as file:
        for block in blocks:
            file.seek(block * BLOCK + 8 * KIB)
            file.write(os.urandom(4 * KIB))
    settle()


class Vm:
    """A VM whose disk begins as a copy of an image, and its replica in the home's own store."""

    NAME = "vm"

    def __init__(self, place: Place, image: Path) -> None:
        self.home = Home(place)
        self.disk = self.home.folder(self.NAME) / "disk.raw"
        shutil.copyfile(image, self.disk)
        self._dice = random.Random(2)
        self.home.track(self.NAME)
        settle()

    def unchanged(self) -> float:
        return seconds_of(*self.home.command("resync", self.NAME, "--full"))

    def changed(self) -> float:
        """Once one block in a hundred was changed behind the mount."""
        self.home.do("umount", self.NAME)
        blocks = self.disk.stat().st_size // BLOCK
        change(self.disk, self._dice.sample(range(blocks), max(1, blocks // 100)))
        self.home.do("mount", self.NAME)
        return seconds_of(*self.home.command("resync", self.NAME))


def equal_and_changed(scene: Scene, place: Place) -> list[Row]:
    """Unchanged images, and 1 % of the blocks changed."""
    size, rounds = scene.bytes(SIZE), scene.rounds(ROUNDS)
    pair = Pair(place.path / "pair", size)
    vm = Vm(place, pair.source)
    name = f"{size // MIB:,} MiB, unchanged"
    found = in_turns(rounds, {"rsync": pair.rsync, "cmp": pair.cmp, "ours": pair.ours, "vm": vm.unchanged})
    rsync = {"rsync": found["rsync"]}
    rows = [
        times(f"{name}: tools/resync", rsync, found["ours"], target=TARGET),
        times(f"{name}: tools/resync", {"cmp": found["cmp"]}, found["ours"], target=TARGET_CMP),
        times(f"{name}: hvfuse resync VM --full", rsync, found["vm"], target=TARGET),
    ]

    def after_spoiling(program: Callable[[], float]) -> float:
        pair.spoil()
        seconds = program()
        pair.cmp()  # ends the benchmark unless they are equal
        return seconds

    found = in_turns(
        rounds,
        {
            "rsync": partial(after_spoiling, pair.rsync),
            "ours": partial(after_spoiling, partial(pair.ours, 1)),
            "vm": vm.changed,
        },
    )
    name, rsync = f"{size // MIB:,} MiB, 1 % of the blocks changed", {"rsync": found["rsync"]}
    return [
        *rows,
        times(f"{name}: tools/resync", rsync, found["ours"], target=TARGET),
        times(f"{name}: hvfuse resync VM", rsync, found["vm"], target=TARGET),
    ]


def sparse(scene: Scene, place: Place) -> list[Row]:
    """The same data on a small and a large sparse disk, copied to a new file."""
    data = scene.bytes(DATA)
    sources = {f"{data // MIB:,} MiB on {name}": (place.path / f"{name}.raw", size) for name, size in SPARSE.items()}
    replica = place.path / "replica.raw"
    chunks = data // (8 * MIB)
    for source, size in sources.values():
        dice = random.Random(1)
        with open(source, "wb") as file:
            for nth in range(chunks):
                file.seek(size // chunks * nth // BLOCK * BLOCK)
                file.write(dice.randbytes(data // chunks))
            file.truncate(size)
    runs: dict[str, list[Run]] = {name: [] for name in sources}

    def copy(name: str) -> float:
        replica.unlink(missing_ok=True)
        settle()
        runs[name].append(run(RESYNC, sources[name][0], replica, expected=1))
        return runs[name][-1].seconds

    found = in_turns(scene.rounds(ROUNDS), {name: partial(copy, name) for name in sources})
    small, large = sources
    rows = [times(f"{large} copied", {small: found[small]}, found[large], target=TARGET_SPARSE)]
    for name, each in runs.items():
        read, peak = [one.read / MIB for one in each], [one.peak / MIB for one in each]
        rows.append(at_most(f"{name} copied: bytes read, replica's included", 1.1 * data / MIB, read, "MiB"))
        rows.append(at_most(f"{name} copied: peak memory", MEMORY, peak, "MiB"))
    return rows


SPARSE = {"10 GiB": 10 * GIB, "1 TiB": TIB}
