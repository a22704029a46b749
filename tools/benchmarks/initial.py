"""The first copy of a disk against `qemu-img convert`, in turns, medians.

The disk is a sparse raw image of 10 GiB with 2 GiB of data on it, in runs of 1 MiB; half of each 4 KiB are zeroes,
so that it compresses to a half. It is in the page cache, and everything before was synced.

    qemu-img   qemu-img convert -f raw -O raw DISK COPY; sync COPY
    ours       hvfuse replicate VM

Both take what is no hole, and both end with a sparse raw image on the same file system that is durable: hvfuse syncs
the replica as it goes and before it commits, so the peer's copy is synced, too (`convert` does not, by itself).
hvfuse besides makes the first recovery point, and its writes to the store and to the records are durable. Its time is
that of the command, its start-up included; before it, the VM is mounted in a new home, as whose disk the image is
renamed, and replication is enabled. Each round begins without a copy.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from .scene import GIB, MIB, Home, Place, Scene, data, seconds_of, settle
from .table import Row, in_turns, times

SIZE, DATA, RUN = 10 * GIB, 2 * GIB, MIB
ROUNDS = 3
TARGET = 1.0
_VM = "vm"


def measure(scene: Scene) -> list[Row]:
    """One row."""
    size, amount = scene.bytes(SIZE), scene.bytes(DATA)
    with scene.place() as place:
        image = place.path / "disk.raw"
        scatter(image, size, amount)
        turns = {"qemu-img": partial(convert, place, image), "hvfuse": partial(replicate, scene, image)}
        found = in_turns(scene.rounds(ROUNDS), turns)
    subject = f"{amount // MIB:,} MiB of data on {size // MIB:,} MiB, half compressible, durable"
    return [times(subject, {"qemu-img convert": found["qemu-img"]}, found["hvfuse"], target=TARGET)]


def scatter(image: Path, size: int, amount: int) -> None:
    """A sparse file with `amount` bytes of data in runs that lie equally far from each other."""
    with open(image, "wb") as file:
        for start in range(0, size, size // (amount // RUN)):
            file.seek(start)
            file.write(data(RUN, compressible=True))
        file.truncate(size)


def convert(place: Place, image: Path) -> float:
    """The peer's turn."""
    copy = place.path / "copy.raw"
    settle()
    seconds = seconds_of("sh", "-c", 'qemu-img convert -f raw -O raw "$1" "$2" && sync "$2"', "sh", image, copy)
    copy.unlink()
    return seconds


def replicate(scene: Scene, image: Path) -> float:
    """Our turn, in a new home."""
    with scene.place() as place:
        home = Home(place, config=f"\n[vm.{_VM}]\nsoft_limit = 25\nhard_limit = 50\n")
        disk = home.folder(_VM) / image.name
        os.rename(image, disk)
        home.mount(_VM)
        home.do("replication", "enable", _VM)
        settle()
        seconds = seconds_of(*home.command("replicate", _VM))
        home.unmount(_VM)
        os.rename(disk, image)
    return seconds
