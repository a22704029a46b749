"""What logs cannot tell any more: a full disk, damaged, missing or foreign logs, a store from yesterday.

Each is detected by name, nothing wrong is applied, the way out works, and older points stay right.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse import wire
from tests.e2e.conftest import Installation, identical, qemu_io, run
from tests.e2e.test_main_job import make_disk

MIB = 1 << 20


def socket(installation: Installation) -> str:
    return str(installation.root / "state" / "vms" / "vm1" / "tracker.sock")


def mounted(installation: Installation, size: str = "64M") -> Path:
    """VM vm1 with one raw disk, mounted and replicated once; limits out of the way."""
    name, _ = make_disk(installation.disks / "vm1", "raw", size=size)
    (installation.root / "hvfuse.toml").write_text(
        '[replication]\nhard_limit = 100000\nsoft_limit = 100000\nresync_window = "always"\n'
    )
    installation.hvfuse("mount", "vm1")
    return installation.mnt / "vm1" / name


def check_view(installation: Installation, disk: Path, directory: Path) -> None:
    installation.test_failover("vm1", directory)
    assert identical(disk, directory / disk.name, "raw")
    installation.hvfuse("store", "check")


@pytest.fixture
def small_ext4(installation: Installation) -> Iterator[Path]:
    """An ext4 of 256 MiB for the disks and their logs."""
    image = installation.root / "ext4"
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    with open(image, "wb") as file:
        file.truncate(256 * MIB)
    run("mkfs.ext4", "-q", image)
    run("mount", "-o", "loop", image, folder)
    (folder / "lost+found").rmdir()
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_logs_that_fill_the_disk_cost_no_guest_error_no_point_and_no_full_copy(
    installation: Installation, small_ext4: Path, tmp_path: Path
) -> None:
    name, fmt = make_disk(small_ext4, "raw", size="100M")
    run("fallocate", "-l", "100M", small_ext4 / name)
    (installation.root / "hvfuse.toml").write_text(
        '[replication]\nfrequency = "1s"\nhard_limit = 100000\nsoft_limit = 100000\nresync_window = "always"\n'
    )
    installation.hvfuse("mount", "vm1")
    disk = installation.mnt / "vm1" / name
    qemu_io(disk, fmt, "write -P 7 60M 8M")
    old = installation.json("replicate", "vm1")["point"]
    fio = [
        "fio", "--name=fill", f"--filename={disk}", "--size=40M", "--bs=64k", "--rw=randwrite", "--direct=1",
        "--ioengine=libaio", "--iodepth=4", "--io_size=400M", "--norandommap", "--randseed=3", "--end_fsync=1",
        "--output-format=json",
    ]  # fmt: skip
    answer = json.loads(run(*fio))
    assert answer["jobs"][0]["error"] == 0
    assert answer["jobs"][0]["write"]["io_kbytes"] >= 400 * 1024
    tracker = wire.request(socket(installation), "status")
    assert tracker["resync_scope"] == "regions"
    assert "No space left" in tracker["resync_required"]
    assert installation.status("vm1")["state"] == "WaitingForStartResynchronize"
    assert installation.status("vm1")["health"] == "Critical"
    installation.start()
    installation.wait_for_state("vm1")
    view, older = tmp_path / "view", tmp_path / "older"
    installation.hvfuse("replicate", "vm1")
    installation.test_failover("vm1", view)
    assert identical(disk, view / name, fmt)
    installation.test_failover("vm1", older, point=old)
    qemu_io(older / name, fmt, "read -P 7 60M 8M", "read -P 0 0 60M")
    installation.hvfuse("failover", "cleanup", "vm1")


def sealed_logs(installation: Installation, disk: Path) -> list[Path]:
    folder = installation.disks / "vm1"
    return [path for path in sorted(folder.glob(f"{disk.name}.0*.hrl")) if path.with_suffix(".hrc").exists()]


def test_a_log_missing_in_the_middle_is_named(installation: Installation, tmp_path: Path) -> None:
    disk = mounted(installation)
    qemu_io(disk, "raw", "write -P 1 0 1M")
    old = installation.json("replicate", "vm1")
    for byte in (2, 3, 4):
        qemu_io(disk, "raw", f"write -P {byte} {byte}M 1M")
        wire.request(socket(installation), "rotate")
    middle = sealed_logs(installation, disk)[1]
    middle.with_suffix(".hrc").unlink()
    middle.unlink()
    said = installation.hvfuse("replicate", "vm1")
    assert f"the logs of cycle {old['cycle'] + 2} are missing" in said, said
    check_view(installation, disk, tmp_path / "view")
    installation.test_failover("vm1", tmp_path / "older", point=old["point"])
    qemu_io(tmp_path / "older" / disk.name, "raw", "read -P 1 0 1M", "read -P 0 2M 8M")
    installation.hvfuse("failover", "cleanup", "vm1")
    installation.hvfuse("umount", "vm1")


def test_a_log_of_another_generation_is_never_applied(installation: Installation, tmp_path: Path) -> None:
    disk = mounted(installation)
    qemu_io(disk, "raw", "write -P 1 0 1M")
    installation.hvfuse("replicate", "vm1")
    qemu_io(disk, "raw", "write -P 9 0 1M")
    wire.request(socket(installation), "rotate")
    (foreign,) = sealed_logs(installation, disk)
    for suffix in (".hrl", ".hrc"):
        shutil.copy(foreign.with_suffix(suffix), tmp_path / f"kept{suffix}")
    qemu_io(disk, "raw", "write -P 2 0 1M")
    wire.request(socket(installation), "begin", generation=bytes(range(1, 17)).hex())
    for suffix in (".hrl", ".hrc"):
        shutil.copy(tmp_path / f"kept{suffix}", foreign.with_suffix(suffix))
    installation.hvfuse("replicate", "vm1")
    check_view(installation, disk, tmp_path / "view")
    qemu_io(tmp_path / "view" / disk.name, "raw", "read -P 2 0 1M")
    assert not foreign.with_suffix(".hrc").exists(), "it is of no use to anybody"
    installation.hvfuse("failover", "cleanup", "vm1")
    installation.hvfuse("umount", "vm1")


def test_a_store_rolled_back_to_an_older_copy_is_named_and_brought_up(
    installation: Installation, tmp_path: Path
) -> None:
    disk = mounted(installation)
    store, yesterday = installation.root / "store", tmp_path / "yesterday"
    qemu_io(disk, "raw", "write -P 1 0 1M")
    old = installation.json("replicate", "vm1")
    run("cp", "-a", store, yesterday)
    for byte in (2, 3):
        qemu_io(disk, "raw", f"write -P {byte} {byte}M 1M")
        installation.hvfuse("replicate", "vm1")
    shutil.rmtree(store)
    yesterday.rename(store)
    qemu_io(disk, "raw", "write -P 4 4M 1M")
    said = installation.hvfuse("replicate", "vm1")
    assert "the store was rolled back to an older copy" in said, said
    check_view(installation, disk, tmp_path / "view")
    points = [point["id"] for point in installation.json("point", "list", "vm1")["points"]]
    assert old["point"] in points, "what the older store had stays"
    installation.hvfuse("failover", "cleanup", "vm1")
    installation.hvfuse("umount", "vm1")


def test_after_the_host_died_only_the_hot_regions_of_a_huge_disk_are_compared(
    installation: Installation, tmp_path: Path
) -> None:
    """The death of the host is played by another boot id in the tracking state."""
    disk = mounted(installation, size="100G")
    qemu_io(disk, "raw", "write -P 1 5G 4M")
    installation.hvfuse("replicate", "vm1")
    qemu_io(disk, "raw", "write -P 2 50G 64M")
    status = wire.request(socket(installation), "status")
    os.kill(status["pid"], 9)
    subprocess.run(["umount", "-l", str(disk.parent)], check=False)
    pretend_another_boot(installation.disks / "vm1" / f"{disk.name}.hvt")
    installation.hvfuse("mount", "vm1")
    found = wire.request(socket(installation), "status")
    assert "the host stopped while the VM was attached" in found["resync_required"]
    assert "of 100.0 GiB to compare" in found["resync_required"]
    in_doubt = sum(entry["resync_bytes"] for entry in found["disks"])
    assert 64 * MIB <= in_doubt <= 4 * 64 * MIB + 64 * MIB
    said = installation.hvfuse("replicate", "vm1")
    assert "compared" in said, said
    view = tmp_path / "view"
    installation.test_failover("vm1", view)
    qemu_io(view / disk.name, "raw", "read -P 1 5G 4M", "read -P 2 50G 64M")
    installation.hvfuse("failover", "cleanup", "vm1")
    installation.hvfuse("umount", "vm1")


def pretend_another_boot(state: Path) -> None:
    from dataclasses import replace

    from hvfuse.formats import tracking

    raw = state.read_bytes()
    record = tracking.unpack_state(raw)
    older = replace(record, boot_id=b"another boot id!").pack()
    state.write_bytes(older + older + raw[2 * tracking.RECORD_SIZE :])
