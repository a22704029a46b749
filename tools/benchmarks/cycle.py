"""From a rotation to the recovery point: how fast, with how much memory, and at what cost to the guest's writes.

Disks and store lie on the disk. Cycles are made when they are asked for, and at no other time.

**A cycle.** fio writes 1 GiB in blocks of 4 KiB at random places of a sparse disk of 4 GiB, none twice, through the
mount, O_DIRECT at depth 16; half of each block is zeroes. That is not timed. Then `hvfuse replicate VM` is, as a
command: Python starts; logs and image are sealed, read, verified, compressed, stored, committed durably; the logs are
released. The rate is of the 1 GiB. All of it is in the page cache; in one row it has also been written back by then
(sync), in the other nothing of it has, so that sealing writes 2 GiB. The memory is the greatest that the command had
(VmHWM).

The peer is qemu's incremental backup: the same writes through the FUSE export of a storage daemon with a dirty bitmap
on the disk, then `blockdev-backup` of what the bitmap has, to a new qcow2 file, from the command until the file is
closed and flushed. qemu copies clusters of 64 KiB, hence nearly the whole disk; its rate, too, is of the 1 GiB. It does
not sync the disk that it backs up. Uncompressed, which was several times as fast as with compression (zlib, zstd).

**The barrier.** What the tracker says of 300 rotations: from the first of eight disks that switches its log to the
last, during which no write gets through; fio writes to all of them meanwhile (4 KiB, random, O_DIRECT, depth 4 each).

**Merging.** Cycles of 128 MiB, made as above, expire all at once. Timed is the store's housekeeping: their points go,
what they hold is written into the replica image, that is synced, and their frames go. The rate is of what was written.

**Writes while cycles ship.** fio's 99th percentile of 4 KiB random writes, O_DIRECT, depth 1, over two seconds: while
nothing ships, and while the VM's shipper process ships this very disk's cycles, one after the other without a pause.
Before either, fio writes 768 MiB, which are synced: the first cycle has them all, so that there is something to ship.
(Writes can be quicker while something ships: processors that have something to do need not be woken up.)
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from hvfuse import wire
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store

from .peers import qemu_backup, qemu_export
from .scene import ENVIRONMENT, GIB, MIB, Home, Place, Scene, fio, peak_until_end, run, settle, sparse
from .table import Row, at_least, at_most, in_turns, rates

VM = "vm"
DISKS = 8
ROTATIONS = 300
MERGED = 6
CONFIG = '[vm.vm]\nfrequency = "1h"\nhard_limit = 100\nsoft_limit = 100\n'
"""Nothing comes by itself; logs may take as much as the disk: enough for what is written here."""


def measure(scene: Scene) -> list[Row]:
    """All rows."""
    return [*cycles(scene), barrier(scene), merging(scene), interference(scene)]


def cycles(scene: Scene) -> list[Row]:
    """What a cycle takes, against qemu's backup; and the memory."""
    size, disk = scene.bytes(GIB), scene.bytes(4 * GIB)
    peaks: list[float] = []
    with scene.place() as place:
        home, ours = _tracked(place, disk)
        theirs = qemu_export(place, sparse(place.path / "peer.raw", disk), bitmap=True)
        seeds = iter(range(1, 1000))

        def cycle(*, synced: bool) -> float:
            _burst(ours, size, next(seeds))
            if synced:
                settle()
            seconds, peak = _replicate(home)
            peaks.append(peak / MIB)
            settle()
            return size / seconds / 1e6

        def backup() -> float:
            _burst(theirs, size, next(seeds))
            settle()
            target = place.path / "backup.qcow2"
            seconds = qemu_backup(theirs, target)
            target.unlink()
            return size / seconds / 1e6

        found = in_turns(scene.rounds(3), {"synced": lambda: cycle(synced=True), "qemu": backup})
        found |= in_turns(1, {"dirty": lambda: cycle(synced=False)})
    what = f"a cycle of {size // MIB} MiB in 4k writes"
    return [
        at_least(what, 300, found["synced"], "MB/s"),
        rates(what, {"qemu's incremental backup": found["qemu"]}, found["synced"], "MB/s"),
        rates(f"{what}, not written back yet", {"qemu's incremental backup": found["qemu"]}, found["dirty"], "MB/s"),
        at_most("memory that it took", 400, peaks, "MiB"),
    ]


def barrier(scene: Scene) -> Row:
    """How long writes wait at a rotation of many disks."""
    times: list[float] = []
    with scene.place() as place:
        home = Home(place, config=CONFIG)
        for number in range(DISKS):
            sparse(home.folder(VM) / f"disk{number}.raw", 256 * MIB)
        mountpoint = home.track(VM)
        socket = _socket(home, "tracker")
        load = [
            word
            for number in range(DISKS)
            for word in (f"--name=disk{number}", f"--filename={mountpoint}/disk{number}.raw")
        ]
        options = (
            "--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=4", "--time_based",
            "--runtime=600",
        )  # fmt: skip
        place.start("fio", *options, *load, until=lambda: True)
        time.sleep(1)
        for number in range(ROTATIONS // 10 if scene.quick else ROTATIONS):
            rotation = wire.request(socket, "rotate")
            times.append(rotation["barrier_ns"] / 1e6)
            if number % 8 == 7:
                wire.request(socket, "release", generation=rotation["generation"], cycle=rotation["cycle"])
    times.sort()
    p99 = times[len(times) * 99 // 100]
    return at_most(f"rotation barrier of {DISKS} disks under load, p99 of {len(times)}", 5, [p99], "ms")


def merging(scene: Scene) -> Row:
    """Whether what expires is merged as fast as it is written."""
    size, found = scene.bytes(128 * MIB), []
    with scene.place() as place:
        home, ours = _tracked(place, scene.bytes(4 * GIB))
        for number in range(MERGED):
            _burst(ours, size, number + 1)
            home.do("replicate", VM)
        settle()
        with Store(str(home.root / "store")) as store, contextlib.closing(LocalReplica(store, VM)) as replica:
            started = time.perf_counter()
            replica.housekeep(RetentionPolicy(keep_all_seconds=0, hourly=0), time.time_ns())
            found.append(MERGED * size / (time.perf_counter() - started) / 1e6)
    return at_least(f"merging {MERGED} expired cycles of {size // MIB} MiB", 100, found, "MB/s")


def interference(scene: Scene) -> Row:
    """What the guest's writes notice of the shipping."""
    size, seconds = scene.bytes(768 * MIB), 0.5 if scene.quick else 2.0
    with scene.place() as place:
        home, ours = _tracked(place, scene.bytes(4 * GIB))
        socket = _socket(home, "shipper")
        place.start(*home.command("run"), until=socket.exists)
        seeds = iter(range(1, 1000))

        def p99(*, ships: bool) -> float:
            _burst(ours, size, next(seeds))
            settle()
            with _shipping(socket) if ships else contextlib.nullcontext():
                microseconds = _latency(ours, seconds, next(seeds))
            wire.request(socket, "cycle")
            settle()
            return microseconds

        found = in_turns(scene.rounds(2), {"idle": lambda: p99(ships=False), "ships": lambda: p99(ships=True)})
    idle, shipping = found["idle"], found["ships"]
    times = f"{statistics.median(idle):.0f} us, then {statistics.median(shipping):.0f} us"
    ratios = [with_it / without for with_it, without in zip(shipping, idle, strict=True)]
    return at_most(f"p99 of 4k writes while cycles ship ({times})", 2, ratios, "times")


def _tracked(place: Place, size: int) -> tuple[Home, Path]:
    """A home with a VM of one empty disk, whose first copy is made. Returns the disk in the mount, too."""
    home = Home(place, config=CONFIG)
    sparse(home.folder(VM) / "disk.raw", size)
    return home, home.track(VM) / "disk.raw"


def _socket(home: Home, name: str) -> Path:
    return home.root / "state" / "vms" / VM / f"{name}.sock"


def _burst(path: Path, size: int, seed: int) -> None:
    """Writes of 4 KiB at random places, none twice, compressible by half."""
    run(
        "fio", "--name=burst", f"--filename={path}", "--rw=randwrite", "--bs=4k", f"--size={path.stat().st_size}",
        f"--io_size={size}", "--direct=1", "--ioengine=libaio", "--iodepth=16", f"--randseed={seed}",
        "--buffer_compress_percentage=50", "--buffer_compress_chunk=4k", "--refill_buffers",
    )  # fmt: skip


def _latency(path: Path, seconds: float, seed: int) -> float:
    """The 99th percentile of 4 KiB random writes one after the other, in microseconds."""
    (job,) = fio(
        "--name=guest", f"--filename={path}", "--rw=randwrite", "--bs=4k", f"--size={path.stat().st_size}",
        "--direct=1", "--ioengine=psync", "--norandommap", f"--randseed={seed}", "--time_based",
        f"--runtime={round(seconds * 1000)}ms",
    )  # fmt: skip
    return float(job["write"]["clat_ns"]["percentile"]["99.000000"]) / 1e3


def _replicate(home: Home) -> tuple[float, int]:
    """Seconds that a cycle takes as a command, and the most memory that this had, in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(home.command("replicate", VM), stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    peak = peak_until_end(process, 0.01)
    seconds = time.perf_counter() - started
    if process.wait():
        raise SystemExit(f"hvfuse replicate ended with {process.returncode}")
    return seconds, peak


@contextlib.contextmanager
def _shipping(socket: Path) -> Iterator[None]:
    """One cycle after the other until the end."""
    ended = threading.Event()

    def ship() -> None:
        while not ended.is_set():
            wire.request(str(socket), "cycle")

    thread = threading.Thread(target=ship)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
