"""The same file through everything that a guest's disk may be written and read through, and fio to do it.

Every contender has an image of its own, all of the same size and full of data, on the same file system. What serves
them is left as its user would start it:

    bare            the image itself, nothing in between
    passthrough_ll  libfuse's example on its lower interface, passthrough_fh that on its higher one: both in C, both
                    track nothing
    qemu            qemu-storage-daemon's FUSE export, and "qemu, bitmap" the same with a dirty bitmap
    untracked       a file in a VM's folder that hvfuse serves and does not track
    hvfuse          a tracked disk in the same mount: its first copy is made, each write is logged

O_DIRECT is between the program and FUSE; whatever serves the file reads and writes the image through the page cache.
libfuse's examples are built so that they, too, do: as they are, they hand O_DIRECT on to the image, and ext4 refuses
what they write (EINVAL). The bare image alone is written and read on the device itself, where O_DIRECT is asked for.
None makes a write durable; the subject `fsync` does. The images are read into the page cache once, from end to end,
through whatever serves them: that of hvfuse into small pages, the others into those of up to 2 MiB that the kernel
chooses, to which small writes take longer.

Before it is measured, hvfuse has gone through enough cycles to write over logs that it recycles, as it does in all its
life but the first minute. Between rounds its cycle is shipped, and everything synced. fio's data cannot be compressed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .peers import passthrough, qemu_export
from .scene import MIB, Home, Place, Scene, fill, fio, settle

PEERS = ("passthrough_ll", "passthrough_fh", "qemu", "qemu, bitmap")
BARE, UNTRACKED, OURS = "bare", "untracked", "hvfuse"
EVERYBODY = (BARE, *PEERS, UNTRACKED, OURS)
_VM = "vm"


@dataclass(frozen=True)
class Load:
    """What fio does. `seconds`: or less, once `size` bytes are done."""

    name: str
    options: tuple[str, ...]
    size: int = 64 * MIB
    seconds: float = 0.4
    unit: str = "IOPS"

    @property
    def is_read(self) -> bool:
        return any("read" in option for option in self.options)


class Contenders:
    """Files by the names of who serves them."""

    def __init__(self, scene: Scene, place: Place, names: Sequence[str]) -> None:
        self.scene = scene
        self._home = Home(place, config='\n[vm.vm]\nexclude = ["plain.raw"]\n')
        self._size = scene.bytes(128 * MIB)
        folder = self._home.folder(_VM)
        images = place.path / "images"
        images.mkdir()
        self.files: dict[str, Path] = {}
        for name in names:
            image = images / f"{name.replace(', ', '-')}.raw"
            self.files[name] = {OURS: folder / "disk.raw", UNTRACKED: folder / "plain.raw"}.get(name, image)
            fill(self.files[name], self._size)
        settle()
        for name in names:
            if name.startswith("passthrough"):
                self.files[name] = passthrough(scene, place, name, images) / f"{name}.raw"
            elif name.startswith("qemu"):
                self.files[name] = qemu_export(place, self.files[name], bitmap="bitmap" in name)
        mountpoint = self._home.track(_VM)
        self.files.update({OURS: mountpoint / "disk.raw", UNTRACKED: mountpoint / "plain.raw"})
        for path in self.files.values():
            figures(path, self._size, [Load("", ("--rw=read", "--bs=1M"), size=self._size, seconds=20)], quick=False)

    def warm(self, loads: Iterable[Load]) -> None:
        """Have logs to recycle, such as `loads` make them."""
        for _ in range(3):
            self.measure(OURS, list(loads))
            self.ship()

    def ship(self) -> None:
        """Between rounds."""
        self._home.do("replicate", _VM)
        settle()

    def measure(self, name: str, loads: Sequence[Load]) -> list[float]:
        """Of one contender, in each load's unit."""
        measured = []
        for load, found in zip(
            loads, figures(self.files[name], self._size, loads, quick=self.scene.quick), strict=True
        ):
            kind = found["read" if load.is_read else "write"]
            measured.append(float(kind["iops"]) if load.unit == "IOPS" else float(kind["bw_bytes"]) / 1e6)
        return measured


def figures(path: Path, size: int, loads: Sequence[Load], *, quick: bool) -> list[dict[str, dict[str, float]]]:
    """fio's own figures of loads, one after the other, on one file that is there."""
    words = [
        f"--filename={path}", f"--size={size}", "--allow_file_create=0", "--overwrite=1", "--fallocate=none",
        "--thread", "--randrepeat=0", "--norandommap",
    ]  # fmt: skip
    for load in loads:
        words += ["--name=load", "--stonewall", f"--io_size={load.size // 32 if quick else load.size}"]
        words += [f"--runtime={round(load.seconds * 1000)}ms", *load.options]
    return fio(*words)


@contextmanager
def contenders(scene: Scene, names: Sequence[str] = EVERYBODY, *, memory: bool = False) -> Iterator[Contenders]:
    """All of `names`, served until the end; on the disk or in memory."""
    with scene.place(memory=memory) as place:
        yield Contenders(scene, place, names)


def rounds(
    among: Contenders, names: Sequence[str], loads: Sequence[Load], number: int
) -> dict[Load, dict[str, list[float]]]:
    """What each of `names` makes of each load, in turns: one contender after the other, every other round backwards."""
    found: dict[Load, dict[str, list[float]]] = {load: {name: [] for name in names} for load in loads}
    for turn in range(number):
        for name in names[:: -1 if turn % 2 else 1]:
            for load, measured in zip(loads, among.measure(name, loads), strict=True):
                found[load][name].append(measured)
            settle()
        if not loads[0].is_read:
            among.ship()
    return found
