"""The main job, with the programs a user would use: mount, write, replicate, fail over on trial, compare."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse import wire
from tests import independent_hrl
from tests.e2e.conftest import REPOSITORY, Installation, identical, qemu_io, run, wait_until

MAKERS = {
    "vhd-dynamic": ("vpc", ["-o", "subformat=dynamic,force_size=on"], "os.vhd"),
    "vhd-fixed": ("vpc", ["-o", "subformat=fixed,force_size=on"], "os.vhd"),
    "raw": ("raw", [], "os.raw"),
}


def make_disk(folder: Path, kind: str, name: str | None = None, size: str = "64M") -> tuple[str, str]:
    """Returns (file name, qemu's name of the format)."""
    image_format, options, default = MAKERS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    run("qemu-img", "create", "-q", "-f", image_format, *options, folder / (name or default), size)
    return name or default, image_format


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_a_view_equals_the_disk_at_its_point_and_stays_apart(
    installation: Installation, tmp_path: Path, kind: str
) -> None:
    name, fmt = make_disk(installation.disks / "vm1", kind)
    installation.start()
    installation.wait_for_state("vm1")
    disk = installation.mnt / "vm1" / name
    qemu_io(disk, fmt, "write -P 0xaa 0 1M", "write -P 0xbb 7M 64k", "flush", "read -P 0xaa 0 1M")
    first = installation.json("replicate", "vm1")
    assert first["vm"] == "vm1"
    assert first["bytes_logged"] > 0
    assert {"point", "cycle", "bytes_coalesced", "bytes_sent", "seconds"} <= first.keys()
    view = tmp_path / "view"
    installation.test_failover("vm1", view)
    assert identical(disk, view / name, fmt)

    qemu_io(disk, fmt, "write -P 0xcc 0 64k", "write -z 7M 64k", "write -P 0xdd 40M 128k")
    assert not identical(disk, view / name, fmt), "what was written after the point must not be in the view"
    second = installation.json("replicate", "vm1")
    assert second["cycle"] == first["cycle"] + 1
    older, newer = tmp_path / "older", tmp_path / "newer"
    installation.test_failover("vm1", older, point=first["point"])
    installation.test_failover("vm1", newer, point=second["point"])
    qemu_io(older / name, fmt, "read -P 0xaa 0 1M", "read -P 0xbb 7M 64k")
    assert identical(disk, newer / name, fmt)

    qemu_io(newer / name, fmt, "write -P 0x11 0 2M", "write -P 0x22 50M 64k", "flush", "read -P 0x11 0 2M")
    qemu_io(older / name, fmt, "read -P 0xaa 0 1M")
    assert not identical(disk, newer / name, fmt)
    installation.hvfuse("failover", "cleanup", "vm1")
    for directory in (view, older, newer):
        assert not os.path.ismount(directory)
    again = tmp_path / "again"
    installation.test_failover("vm1", again)
    assert identical(disk, again / name, fmt), "writes into a view must reach neither replica nor source"
    installation.hvfuse("failover", "cleanup", "vm1")
    points = installation.json("point", "list", "vm1")["points"]
    assert [p["id"] for p in points[-2:]] == [first["point"], second["point"]]
    assert installation.json("store", "check")
    assert installation.stop() == 0
    assert not os.path.ismount(installation.mnt / "vm1")


def test_a_vm_with_three_disks_is_one_point(installation: Installation, tmp_path: Path) -> None:
    folder = installation.disks / "vm1"
    disks = [
        make_disk(folder, "vhd-dynamic", "system.vhd"),
        make_disk(folder, "vhd-fixed", "data.vhd"),
        make_disk(folder, "raw", "swap.img"),
    ]
    installation.start()
    installation.wait_for_state("vm1")
    for number, (name, fmt) in enumerate(disks):
        qemu_io(installation.mnt / "vm1" / name, fmt, f"write -P {number + 1} {number}M 3M")
    installation.hvfuse("replicate", "vm1")
    view = tmp_path / "view"
    installation.test_failover("vm1", view)
    assert sorted(os.listdir(view)) == ["data.vhd", "swap.img", "system.vhd"]
    for name, fmt in disks:
        assert identical(installation.mnt / "vm1" / name, view / name, fmt)
    installation.hvfuse("failover", "cleanup", "vm1")


@pytest.fixture
def loop() -> Iterator[list[str]]:
    attached: list[str] = []
    yield attached
    for device in attached:
        subprocess.run(["umount", device], capture_output=True, check=False)
        subprocess.run(["losetup", "-d", device], capture_output=True, check=False)


def attach_loop(image: Path, loop: list[str]) -> str:
    device = run("losetup", "--find", "--show", image).strip()
    loop.append(device)
    return device


def checksums(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_file_system_on_a_tracked_disk_arrives_clean_and_whole(
    installation: Installation, tmp_path: Path, loop: list[str]
) -> None:
    make_disk(installation.disks / "vm1", "raw", "data.raw", "256M")
    installation.start()
    installation.wait_for_state("vm1")
    device = attach_loop(installation.mnt / "vm1" / "data.raw", loop)
    run("mkfs.ext4", "-q", device)
    source = tmp_path / "fs"
    source.mkdir()
    run("mount", device, source)
    run("cp", "-r", REPOSITORY / "hvfuse", REPOSITORY / "tests", source)
    run("sync", "-f", source)
    expected = checksums(source)
    assert expected
    installation.hvfuse("replicate", "vm1")
    view = tmp_path / "view"
    installation.test_failover("vm1", view)
    # The point was taken under a mounted file system: its journal is replayed in the view's overlay.
    copy = attach_loop(view / "data.raw", loop)
    replica = tmp_path / "replica"
    replica.mkdir()
    run("mount", copy, replica)
    assert checksums(replica) == expected
    run("umount", replica)
    run("e2fsck", "-fn", copy)
    run("umount", source)
    run("e2fsck", "-fn", device)
    installation.hvfuse("replicate", "vm1")
    last = tmp_path / "last"
    installation.test_failover("vm1", last)
    run("e2fsck", "-fn", last / "data.raw")
    for used in (copy, device):
        run("losetup", "-d", used)
    loop.clear()
    installation.hvfuse("failover", "cleanup", "vm1")


def test_fio_verifies_its_writes_while_cycles_ship(installation: Installation, tmp_path: Path) -> None:
    make_disk(installation.disks / "vm1", "raw", "data.raw", "128M")
    installation.start(frequency="1s")
    installation.wait_for_state("vm1")
    disk = installation.mnt / "vm1" / "data.raw"
    common = [
        "--name=verify", f"--filename={disk}", "--size=128M", "--bsrange=512-256k", "--blockalign=512",
        "--verify=crc32c", "--verify_fatal=1", "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--norandommap=0",
        "--iodepth=8", "--randseed=20", "--io_size=256M", "--output-format=terse", "--verify_state_save=0",
    ]  # fmt: skip
    run("fio", *common)
    installation.hvfuse("replicate", "vm1")
    points = installation.json("point", "list", "vm1")["points"]
    assert len(points) >= 3, "cycles must have shipped meanwhile"
    view = tmp_path / "view"
    installation.test_failover("vm1", view)
    run("cmp", disk, view / "data.raw")
    installation.hvfuse("failover", "cleanup", "vm1")


def test_logs_sealed_under_a_real_mount_are_valid_for_an_independent_reader(installation: Installation) -> None:
    make_disk(installation.disks / "vm1", "raw", "data.raw", "64M")
    installation.hvfuse("mount", "vm1")
    socket = str(installation.root / "state" / "vms" / "vm1" / "tracker.sock")
    wire.request(socket, "begin", generation=bytes(range(16)).hex())
    disk = installation.mnt / "vm1" / "data.raw"
    for cycle in range(3):
        qemu_io(
            disk, "raw", f"write -P {cycle + 1} {cycle}M 2M", "write -z 1M 512k", "discard 0 64k", "flush",
            *(f"write -P {n} {n * 130 * 512} 1536" for n in range(1, 150)),
        )  # fmt: skip
        wire.request(socket, "rotate")
    installation.hvfuse("umount", "vm1")
    folder = installation.disks / "vm1"
    copy = installation.root / "copy.raw"
    with open(copy, "wb") as file:
        file.truncate(64 << 20)
    for log in sorted(folder.glob("data.raw.*.hrl")):
        if log.with_suffix(".hrc").exists():
            independent_hrl.replay(str(log), str(copy))
            installation.hvfuse("log", "verify", str(log))
    run("cmp", copy, folder / "data.raw")


def test_run_makes_a_sample_for_a_newcomer_and_shows_it_replicating(installation: Installation) -> None:
    installation.root.mkdir()
    (installation.root / "hvfuse.toml").write_text('[replication]\nfrequency = "1s"\n')
    installation.start()
    installation.wait_for_state("sample")
    wait_until(lambda: installation.status("sample").get("points", 0) > 0, installation.logs)
    status = installation.status("sample")
    assert status["health"] == "Normal"
    assert {
        "name",
        "state",
        "health",
        "last_cycle",
        "last_replication_time",
        "rpo_seconds",
        "pending_bytes",
        "points",
    } <= (status.keys())
    assert [sorted(disk) for disk in status["disks"]] == [["format", "log_bytes", "name", "size"]]
    assert installation.stop() == 0


def test_a_tracker_and_a_shipper_that_die_are_started_again_and_nothing_is_lost(
    installation: Installation, tmp_path: Path
) -> None:
    name, fmt = make_disk(installation.disks / "vm1", "raw")
    installation.start()
    installation.wait_for_state("vm1")
    disk = installation.mnt / "vm1" / name
    qemu_io(disk, fmt, "write -P 1 0 4M", "flush")
    socket = str(installation.root / "state" / "vms" / "vm1" / "tracker.sock")
    before = wire.request(socket, "status")
    os.kill(before["pid"], 9)

    def is_back() -> bool:
        try:
            return bool(wire.request(socket, "status")["pid"] != before["pid"]) and os.path.ismount(disk.parent)
        except Exception:
            return False

    wait_until(is_back, installation.logs)
    qemu_io(disk, fmt, "read -P 1 0 4M", "write -P 2 1M 1M")
    after = wire.request(socket, "status")
    assert after["generation"] == before["generation"], "no new copy may be needed"
    installation.hvfuse("replicate", "vm1")
    view = tmp_path / "view"
    installation.test_failover("vm1", view)
    assert identical(disk, view / name, fmt)
    installation.hvfuse("failover", "cleanup", "vm1")
