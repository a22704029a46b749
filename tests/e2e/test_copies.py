"""First copies and full resynchronisations of a VM in use: killed, continued, measured.

HVFUSE_COPY_SIZE: MiB of data that the copies move (default: enough to be cut into pieces, and quick).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hvfuse import wire
from tests.e2e import watched
from tests.e2e.conftest import Installation, identical, qemu_io

MIB = 1 << 20
BLOCK = 64 << 10
SIZE = int(os.environ.get("HVFUSE_COPY_SIZE", "512"))
SEED = int(os.environ.get("HVFUSE_SEED", random.SystemRandom().randrange(1 << 32)))
KILLS = 10


def fill(path: Path, *, size: int, extents: Iterator[tuple[int, int]] | list[tuple[int, int]], seed: int) -> None:
    """A sparse file with random bytes at (offset, length)."""
    dice = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, length in extents:
            file.seek(offset)
            for at in range(0, length, 4 * MIB):
                file.write(dice.randbytes(min(length - at, 4 * MIB)))


def start(installation: Installation, **settings: str) -> None:
    installation.root.mkdir(exist_ok=True)
    lines = {"hard_limit": "100000", "soft_limit": "100000", "resync_window": '"always"', **settings}
    text = "".join(f"{key} = {value}\n" for key, value in lines.items())
    (installation.root / "hvfuse.toml").write_text(f"[replication]\n{text}")
    installation.hvfuse("mount", "vm1")


@contextmanager
def load(disk: Path, size: int, rate: str = "8m") -> Iterator[subprocess.Popen[bytes]]:
    """fio's random writes until the block ends; what its disk's tracker does to it is not looked at."""
    command = [
        "fio", "--name=load", f"--filename={disk}", f"--size={size}", "--bs=4k", "--rw=randwrite", "--direct=1",
        "--ioengine=psync", "--time_based", "--runtime=600", f"--rate={rate}", "--randrepeat=0",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def watched_replicate(
    installation: Installation, trace: Path, label: str, nth: int, victim: int = 0
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, watched.__file__, str(trace), label, str(nth), str(victim)]
    return subprocess.run(
        [*command, "--home", str(installation.root), "replicate", "vm1"],
        cwd="/", env=installation.environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def traced(trace: Path, label: str, *, until: str) -> list[int]:
    """The sizes of the calls with a label, over all runs, before the first one labelled `until`."""
    lines = [line.split() for line in trace.read_text().splitlines()]
    before = itertools.takewhile(lambda line: line[0] != until, lines)
    return [int(size) for called, size in before if called == label]


def tracker(installation: Installation) -> dict[str, Any]:
    socket = installation.root / "state" / "vms" / "vm1" / "tracker.sock"
    return dict(wire.request(str(socket), "status"))


def mount_again(installation: Installation) -> None:
    subprocess.run(["umount", "-l", str(installation.mnt / "vm1")], capture_output=True, check=False)
    installation.hvfuse("mount", "vm1")


@pytest.mark.timeout(600)
def test_a_first_copy_under_load_killed_ten_times_sends_hardly_anything_twice(
    installation: Installation, tmp_path: Path
) -> None:
    print(f"HVFUSE_SEED={SEED}")
    dice = random.Random(SEED)
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    size = SIZE * MIB
    fill(folder / "os.raw", size=size, extents=[(0, size)], seed=SEED)
    start(installation)
    disk, trace = installation.mnt / "vm1" / "os.raw", tmp_path / "trace"
    slots = size // (4 * MIB)
    for kill in range(KILLS):
        share = max(2, slots // (KILLS + 1))
        nth = dice.randrange(share // 2, share) + 1
        with load(disk, size):
            label, victim = "store:image", 0
            match ("shipper", "tracker", "store")[kill % 3]:
                case "tracker":
                    victim = tracker(installation)["pid"]
                case "store":
                    label, nth = [("store:unsynced", nth), ("store:held", 1), ("store:image-sync", 1)][kill // 3]
            done = watched_replicate(installation, trace, label, nth, victim)
            assert done.returncode == -9, (label, nth, done.stderr + done.stdout)
        if victim:
            mount_again(installation)
    done = watched_replicate(installation, trace, "nothing", 0)
    assert done.returncode == 0, done.stderr
    assert installation.status("vm1")["state"] == "Replicating"
    # What comes after the first commit is not the copy's.
    written = sum(traced(trace, "store:image", until="store:commit:after"))
    twice = written - size
    print(f"{written} bytes written for {size}: {twice / size:.3%} twice")
    assert 0 <= twice < size / 100
    installation.hvfuse("replicate", "vm1")
    installation.test_failover("vm1", tmp_path / "view")
    assert identical(disk, tmp_path / "view" / "os.raw", "raw")
    installation.hvfuse("failover", "cleanup", "vm1")
    installation.hvfuse("umount", "vm1")


def measured(installation: Installation, *arguments: str) -> tuple[int, int]:
    """Bytes that a command read, and its peak memory in bytes."""
    with open(os.devnull, "wb") as nothing:
        process = subprocess.Popen(
            installation.command(*arguments), cwd="/", env=installation.environment(), stdout=nothing, stderr=nothing
        )
    read = memory = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, KeyError):  # it ends just now
            read = max(read, int(facts(process.pid, "io")["rchar"]))
            memory = max(memory, int(facts(process.pid, "status")["VmHWM"].split()[0]) << 10)
        time.sleep(0.005)
    assert process.returncode == 0
    return read, memory


def facts(pid: int, name: str) -> dict[str, str]:
    with open(f"/proc/{pid}/{name}", encoding="ascii") as file:
        return dict(line.rstrip().split(":", 1) for line in file)


@pytest.mark.parametrize("size", [10 << 30, 1 << 40])
def test_a_sparse_disk_costs_what_is_on_it(installation: Installation, tmp_path: Path, size: int) -> None:
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    data = SIZE // 2 * MIB
    pieces = 64
    step = size // pieces // (4 * MIB) * 4 * MIB
    extents = [(at * step, data // pieces) for at in range(pieces)]
    fill(folder / "os.raw", size=size, extents=extents, seed=7)
    start(installation)
    read, memory = measured(installation, "replicate", "vm1")
    read -= measured(installation, "replicate", "vm1")[0]  # what the program itself is made of
    print(
        f"{size >> 30} GiB with {data >> 20} MiB of data: {read / MIB:.0f} MiB read, {memory / MIB:.0f} MiB of memory"
    )
    assert data <= read < 1.1 * data
    assert memory < 300 * MIB
    before = installation.json("point", "list", "vm1")["points"]
    installation.hvfuse("resync", "vm1", "--full")
    report = installation.status("vm1")
    assert report["state"] == "Replicating"
    assert installation.json("point", "list", "vm1")["points"][: len(before)] == before
    installation.hvfuse("umount", "vm1")


def test_a_full_resync_sends_what_differs_and_leaves_every_point_right_while_and_after(
    installation: Installation, tmp_path: Path
) -> None:
    print(f"HVFUSE_SEED={SEED}")
    dice = random.Random(SEED)
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    size = SIZE // 2 * MIB
    image = folder / "os.raw"
    fill(image, size=size, extents=[(0, size)], seed=SEED)
    start(installation)
    disk = installation.mnt / "vm1" / "os.raw"
    points: dict[str, Path] = {}
    for byte in (1, 2, 3):
        qemu_io(disk, "raw", f"write -P {byte} {byte * 16}M 1M")
        point = installation.json("replicate", "vm1")["point"]
        points[point] = tmp_path / f"point{byte}"
        shutil.copyfile(image, points[point])
        last = points[point]
    installation.hvfuse("umount", "vm1")
    blocks = size // BLOCK
    changed = dice.sample(range(blocks), blocks // 100)
    with open(image, "r+b") as file:
        for block in changed:
            file.seek(block * BLOCK + dice.randrange(BLOCK - 16))
            file.write(dice.randbytes(16))
    installation.hvfuse("mount", "vm1")
    assert "not mounted" in tracker(installation)["resync_required"]

    trace = tmp_path / "trace"
    done = watched_replicate(installation, trace, "store:put", max(2, len(changed) // 16))
    assert done.returncode == -9, done.stderr + done.stdout
    assert installation.status("vm1")["state"] == "Resynchronizing"
    # What was sealed before the change is a point as well; half of the differences are staged, and shown nowhere.
    check_points(installation, tmp_path, points, others=last)

    command = installation.command("resync", "vm1", "--now", "--json")
    with open(tmp_path / "said", "wb") as said:
        going_on = subprocess.Popen(command, cwd="/", env=installation.environment(), stdout=said, stderr=said)
        check_points(installation, tmp_path, points)  # while the rest arrives
        assert going_on.wait(240) == 0, (tmp_path / "said").read_text()
    copy = json.loads((tmp_path / "said").read_text().splitlines()[-1])["last_copy"]
    print(copy["text"])
    assert len(changed) * 1000 < copy["bytes_sent"] < 0.012 * size
    newest = installation.json("point", "list", "vm1")["points"][-1]["id"]
    shutil.copyfile(image, tmp_path / "newest")
    check_points(installation, tmp_path, {**points, newest: tmp_path / "newest"}, others=last)
    installation.hvfuse("umount", "vm1")


def check_points(
    installation: Installation, tmp_path: Path, points: dict[str, Path], *, others: Path | None = None
) -> None:
    """Every point is listed, and mounts as what it was; any other as `others`, if it is given."""
    listed = [point["id"] for point in installation.json("point", "list", "vm1")["points"]]
    assert set(points) <= set(listed)
    expected = {point: points.get(point, others) for point in listed}
    view = tmp_path / "view"
    for point, image in expected.items():
        if image is not None:
            installation.test_failover("vm1", view, point=point)
            assert identical(image, view / "os.raw", "raw"), point
            installation.hvfuse("failover", "cleanup", "vm1")


def test_a_guest_that_outwrites_the_logs_during_the_first_copy_is_caught_up_with_in_passes(
    installation: Installation, tmp_path: Path
) -> None:
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    size = SIZE * MIB
    fill(folder / "os.raw", size=size, extents=[(0, size)], seed=3)
    start(installation, soft_limit="4")
    disk = installation.mnt / "vm1" / "os.raw"
    with load(disk, size, rate="40m"):
        time.sleep(0.5)  # fio is at it
        done = watched_replicate(installation, tmp_path / "trace", "nothing", 0)
        assert done.returncode == 0, done.stderr
    assert "passes" in done.stdout
    status = installation.status("vm1")
    assert status["state"] == "Replicating"
    assert status["points"] == 1, "nothing in between is a recovery point"
    installation.hvfuse("replicate", "vm1")
    installation.test_failover("vm1", tmp_path / "view")
    assert identical(disk, tmp_path / "view" / "os.raw", "raw")
    installation.hvfuse("failover", "cleanup", "vm1")
    installation.hvfuse("umount", "vm1")
