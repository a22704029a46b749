"""Does hvfuse stay what it is on large disks, and on hosts with many VMs?

Everything lies in memory (tmpfs): files end at 16 TiB on ext4, and what is compared has to lie on the same file system.
The peer is hvfuse itself, with the small disk or with one VM.

**cycles.** Three VMs of one home, with a sparse disk of 10 GiB, 1 TiB and 60 TiB. In each round each VM gets the same
churn through its mount: 128 MiB in writes of 4 KiB and 128 MiB in writes of 64 KiB, no two of which touch, spread over
the whole disk; at the same relative places in each round, with new content, half of it zeroes. Then `hvfuse replicate
VM`. The time is what hvfuse keeps of each cycle as its latency: from the rotation's instant until the point is
committed and the logs are let go; neither the start of the command nor the churn counts. Retention keeps all points, so
nothing is merged.

**many VMs.** 16 VMs, each mounted by a process of its own, and tracked. One fio writes 4 KiB at random places with
O_DIRECT, 16 writes outstanding in all: to the disk of one VM (16), of four (4 each), of all 16 (1 each), one job, a
thread, for each. What is written to is 1 GiB in all, and was written before. Trackers that have nothing to do in a turn
sleep. IOPS are of all jobs together.

**memory.** VmHWM of the tracker of a VM with eight disks of 1 TiB: its greatest resident size so far. That counts
everything: what other trackers share with it (programs, libraries), and the mapped indexes of its logs, which the
kernel could take back. Taken after the first copy and two cycles of 1 GiB each, written in blocks of 4 KiB at random
places of all eight disks: 64 bytes of index for each.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hvfuse.control.records import Records

from .scene import GIB, KIB, MIB, TIB, Home, Scene, data, fill, fio, peak_memory, run, sparse
from .table import Row, at_most, in_turns, rates, times

DISKS = {"10 GiB": 10 * GIB, "1 TiB": TIB, "60 TiB": 60 * TIB}
COUNTS = (1, 4, 16)
DEPTH = 16
CHURN = 256 * MIB
TRACKED_DISKS = 8
MEMORY_LIMIT = 100.0
SIZE_TARGET = 1 / 1.1
VMS_TARGET = 0.9


def measure(scene: Scene) -> list[Row]:
    """All rows."""
    return [*_cycles(scene), *_many_vms(scene), _memory(scene)]


def _cycles(scene: Scene) -> list[Row]:
    disks = dict(list(DISKS.items())[:2]) if scene.quick else DISKS
    with _home(scene, list(disks)) as home:
        for vm, size in disks.items():
            sparse(home.folder(vm) / "disk.raw", size)
            _track(home, vm)
        content = data(32 * MIB, compressible=True)
        turns = {vm: partial(_cycle, home, vm, scene.bytes(CHURN), content) for vm in disks}
        found = in_turns(scene.rounds(5), turns)
    small, *larger = disks
    return [
        times(f"a cycle of equal churn, disk of {size}", {small: found[small]}, found[size], target=SIZE_TARGET)
        for size in larger
    ]


def _cycle(home: Home, vm: str, size: int, content: bytes) -> float:
    """Seconds from rotation to point."""
    _churn(home.mountpoint(vm) / "disk.raw", size, content)
    home.do("replicate", vm)
    with Records(str(home.root / "state" / "records")) as records:
        return records.cycles(vm)[-1].latency


def _churn(path: Path, size: int, content: bytes) -> None:
    """Half of it in writes of 4 KiB, half in 64 KiB, in an order and at places that depend on `size` alone."""
    lengths = [4 * KIB] * (size // 2 // (4 * KIB)) + [64 * KIB] * (size // 2 // (64 * KIB))
    slots = min(DISKS.values()) // (128 * KIB)
    dice = random.Random(1)
    slot_size = path.stat().st_size // slots // KIB * KIB
    with open(path, "r+b", buffering=0) as file:
        for slot, length in zip(dice.sample(range(slots), len(lengths)), lengths, strict=True):
            start = random.randrange(len(content) - length) & -4096
            os.pwrite(file.fileno(), memoryview(content)[start : start + length], slot * slot_size & -4096)


def _many_vms(scene: Scene) -> list[Row]:
    counts = COUNTS[:2] if scene.quick else COUNTS
    names = [f"vm{number:02}" for number in range(max(counts))]
    size = scene.bytes(GIB)
    with _home(scene, names) as home:
        for number, vm in enumerate(names):
            least = min(count for count in counts if number < count)
            fill(home.folder(vm) / "disk.raw", size // least)
            _track(home, vm)
        disks = [home.mountpoint(vm) / "disk.raw" for vm in names]
        seconds = 1 if scene.quick else 2
        turns = {_vms(count): partial(_iops, disks[:count], size, seconds) for count in counts}
        found = in_turns(scene.rounds(5), turns)
    one, *more = map(_vms, counts)
    return [
        rates(f"4k random writes, {DEPTH} outstanding in all, {vms}", {one: found[one]}, found[vms], "IOPS", VMS_TARGET)
        for vms in more
    ]


def _vms(count: int) -> str:
    return "1 VM" if count == 1 else f"{count} VMs"


def _iops(disks: Sequence[Path], size: int, seconds: int) -> float:
    """Of all disks together, each in `size` divided by their number."""
    words = [
        "--group_reporting", "--thread", "--ioengine=libaio", "--direct=1",
        "--rw=randwrite", "--bs=4k", "--norandommap", f"--iodepth={DEPTH // len(disks)}",
        f"--size={size // len(disks)}", "--time_based", f"--runtime={seconds}", "--ramp_time=500ms",
    ]  # fmt: skip
    for number, disk in enumerate(disks):
        words += [f"--name=vm{number}", f"--filename={disk}"]
    return float(fio(*words)[0]["write"]["iops"])


def _memory(scene: Scene) -> Row:
    with _home(scene, ["vm"]) as home:
        for number in range(TRACKED_DISKS):
            sparse(home.folder("vm") / f"disk{number}.raw", TIB)
        mountpoint = _track(home, "vm")
        for _ in range(2):
            _write_to_all(sorted(mountpoint.glob("*.raw")), scene.bytes(GIB))
            home.do("replicate", "vm")
        peak = peak_memory(int(home.json("mount", "vm")["pid"]))
    return at_most(f"memory of a tracker with {TRACKED_DISKS} disks of 1 TiB", MEMORY_LIMIT, [peak / MIB], "MiB")


def _write_to_all(disks: Sequence[Path], size: int) -> None:
    words = [
        "fio", "--thread", "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bs=4k", "--iodepth=4",
        "--norandommap", "--randrepeat=0", f"--size={TIB}", f"--io_size={size // len(disks)}",
    ]  # fmt: skip
    for number, disk in enumerate(disks):
        words += [f"--name=disk{number}", f"--filename={disk}"]
    run(*words)


@contextmanager
def _home(scene: Scene, vms: Sequence[str]) -> Iterator[Home]:
    """A home in memory, whose VMs may be replicated without being enabled."""
    with scene.place(memory=True) as place:
        yield Home(place, config="".join(f'[vm."{vm}"]\nprotect = "auto"\n' for vm in vms))


def _track(home: Home, vm: str) -> Path:
    """Serve a VM and make its first copy. It is not enabled: that would look for room for the logs of such disks."""
    mountpoint = home.mount(vm)
    home.do("replicate", vm)
    return mountpoint
