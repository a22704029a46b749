"""Bad input to the whole: a one-line error that names the cause, the documented exit code, nothing lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse import wire
from tests.e2e.conftest import Installation, identical, qemu_io, run, wait_until
from tests.e2e.test_main_job import make_disk


def only_line(output: str) -> str:
    """The error, without a hint below it; fails if it is more than a line (or shows a traceback)."""
    lines = [line for line in output.splitlines() if not line.startswith("  hint: ")]
    assert len(lines) == 1, output
    assert lines[0].startswith("hvfuse: "), output
    return lines[0]


def test_a_truncated_vhd_is_named_and_the_other_vms_go_on(installation: Installation) -> None:
    make_disk(installation.disks / "good", "raw")
    name, fmt = make_disk(installation.disks / "bad", "vhd-dynamic")
    broken = installation.disks / "bad" / name
    qemu_io(broken, fmt, "write -P 1 0 4M")
    os.truncate(broken, broken.stat().st_size - 700)
    before = broken.read_bytes()
    error = only_line(installation.hvfuse("mount", "bad", code=7))
    assert str(broken) in error
    installation.start()
    installation.wait_for_state("good")
    wait_until(lambda: installation.status("bad")["state"] == "Error", installation.logs)
    text = subprocess.run(
        installation.command("status", "bad"), env=installation.environment(), capture_output=True, text=True
    )
    assert str(broken) in text.stdout + text.stderr
    assert broken.read_bytes() == before


def test_a_foreign_file_is_named_with_its_format(installation: Installation) -> None:
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "disk.img", "10M")
    assert "qcow2" in only_line(installation.hvfuse("mount", "vm1", code=8))


def test_a_vm_without_disks_or_without_a_folder_is_not_found(installation: Installation) -> None:
    assert "no hvfuse home" in only_line(installation.hvfuse("mount", "vm1", code=5))
    installation.disks.mkdir(parents=True)
    assert "vm1" in only_line(installation.hvfuse("mount", "vm1", code=5))
    (installation.disks / "vm2").mkdir(parents=True)
    assert "no disk" in only_line(installation.hvfuse("mount", "vm2", code=5))
    assert "vm1" in only_line(installation.hvfuse("replicate", "vm1", code=5))
    assert "no store" in only_line(installation.hvfuse("point", "list", "vm1", code=5))


def test_a_second_run_on_the_same_home_is_refused(installation: Installation) -> None:
    make_disk(installation.disks / "vm1", "raw")
    installation.start()
    installation.wait_for_state("vm1")
    assert "already" in only_line(installation.hvfuse("run", code=6))


def test_a_mount_point_in_use_is_refused(installation: Installation, tmp_path: Path) -> None:
    make_disk(installation.disks / "vm1", "raw")
    target = installation.mnt / "vm1"
    target.mkdir(parents=True)
    (target / "precious").write_text("mine")
    assert str(target) in only_line(installation.hvfuse("mount", "vm1", code=6))
    assert (target / "precious").read_text() == "mine"
    (target / "precious").unlink()
    installation.start()
    installation.wait_for_state("vm1")
    full = tmp_path / "view"
    full.mkdir()
    (full / "file").write_text("mine")
    assert str(full) in only_line(installation.hvfuse("failover", "test", "vm1", "--mount", str(full), code=6))
    assert installation.json("store", "info")
    assert "no recovery point" in only_line(
        installation.hvfuse("failover", "test", "vm1", "--point", "feed-1", "--mount", str(tmp_path / "v"), code=5)
    )


def test_a_mount_in_use_is_not_taken_away(installation: Installation) -> None:
    name, _ = make_disk(installation.disks / "vm1", "raw")
    installation.hvfuse("mount", "vm1")
    with open(installation.mnt / "vm1" / name, "rb"):
        error = only_line(installation.hvfuse("umount", "vm1", code=6))
        assert str(os.getpid()) in error
    installation.hvfuse("umount", "vm1")


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("suffix", ["hrl", "hrc"])
def test_a_flipped_bit_in_a_sealed_log_never_reaches_the_replica(
    installation: Installation, tmp_path: Path, suffix: str
) -> None:
    name, fmt = make_disk(installation.disks / "vm1", "raw")
    installation.hvfuse("mount", "vm1")
    disk = installation.mnt / "vm1" / name
    qemu_io(disk, fmt, "write -P 1 0 1M")
    old = installation.json("replicate", "vm1")["point"]
    qemu_io(disk, fmt, "write -P 2 0 64k", "write -P 3 2M 64k")
    socket = str(installation.root / "state" / "vms" / "vm1" / "tracker.sock")
    wire.request(socket, "rotate")
    (sealed,) = (installation.disks / "vm1").glob(f"{name}.*.{suffix}") if suffix == "hrc" else [
        path for path in (installation.disks / "vm1").glob(f"{name}.0*.hrl") if path.with_suffix(".hrc").exists()
    ]  # fmt: skip
    flip(sealed, 8192 + 100 if suffix == "hrl" else 300)
    if suffix == "hrl":
        assert str(sealed) in installation.hvfuse("log", "verify", str(sealed), code=7)
    # The damage is found, and the way out is taken: the disks are copied anew, and the old point stays.
    installation.hvfuse("replicate", "vm1")
    view, older = tmp_path / "view", tmp_path / "older"
    installation.test_failover("vm1", view)
    assert identical(disk, view / name, fmt)
    installation.test_failover("vm1", older, point=old)
    qemu_io(older / name, fmt, "read -P 1 0 1M", "read -P 0 2M 64k")
    installation.hvfuse("failover", "cleanup", "vm1")
    installation.hvfuse("umount", "vm1")


def test_a_store_of_a_newer_version_is_left_alone(installation: Installation) -> None:
    import lmdb

    make_disk(installation.disks / "vm1", "raw")
    installation.hvfuse("mount", "vm1")
    installation.hvfuse("replicate", "vm1")
    from hvfuse.target import schema

    environment = lmdb.open(str(installation.root / "store" / "store.lmdb"), max_dbs=32)
    with environment.begin(write=True) as txn:
        meta = environment.open_db(schema.META.encode() if isinstance(schema.META, str) else schema.META, txn=txn)
        version = int.from_bytes(txn.get(schema.KEY_FORMAT, db=meta), "big")
        txn.put(schema.KEY_FORMAT, schema.u64(version + 1), db=meta)
    environment.close()
    error = only_line(installation.hvfuse("replicate", "vm1", code=8))
    assert str(version + 1) in error
    only_line(installation.hvfuse("point", "list", "vm1", code=8))
    only_line(installation.hvfuse("store", "check", code=8))
    installation.hvfuse("umount", "vm1")


@pytest.fixture
def small_store(installation: Installation) -> Iterator[Path]:
    store = installation.root / "store"
    store.mkdir(parents=True, mode=0o700)
    (installation.root / "hvfuse.toml").write_text("[replication]\nhard_limit = 1000\n")
    run("mount", "-t", "tmpfs", "-o", "size=24M,mode=700", "tmpfs", store)
    yield store
    subprocess.run(["umount", "-l", str(store)], check=False)


def test_a_full_store_fails_the_cycle_and_loses_nothing(
    installation: Installation, small_store: Path, tmp_path: Path
) -> None:
    name, fmt = make_disk(installation.disks / "vm1", "raw")
    installation.hvfuse("mount", "vm1")
    disk = installation.mnt / "vm1" / name
    qemu_io(disk, fmt, "write -P 1 0 1M")
    installation.hvfuse("replicate", "vm1")
    with open(disk, "r+b") as file:
        file.write(os.urandom(40 << 20))
    only_line(installation.hvfuse("replicate", "vm1", code=9))
    points = installation.json("point", "list", "vm1")["points"]
    assert len(points) == 1
    installation.hvfuse("store", "check")
    run("mount", "-o", "remount,size=400M", small_store)
    assert installation.json("replicate", "vm1")["bytes_logged"] >= 40 << 20
    view = tmp_path / "view"
    installation.test_failover("vm1", view)
    assert identical(disk, view / name, fmt)
    installation.hvfuse("failover", "cleanup", "vm1")
    installation.hvfuse("umount", "vm1")


@pytest.fixture
def small_disks(installation: Installation) -> Iterator[Path]:
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", "size=80M", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_log_that_fills_the_disk_never_fails_the_guest(
    installation: Installation, small_disks: Path, tmp_path: Path
) -> None:
    """32 MiB of disk and 80 MiB of room: the log of 60 MiB of writes does not fit."""
    name, fmt = make_disk(small_disks, "raw", size="32M")
    (installation.root / "hvfuse.toml").write_text("[replication]\nhard_limit = 1000\n")
    run("fallocate", "-l", "32M", small_disks / name)
    installation.hvfuse("mount", "vm1")
    old = installation.json("replicate", "vm1")["point"]
    disk = installation.mnt / "vm1" / name
    for byte in range(1, 5):
        qemu_io(disk, fmt, f"write -P {byte} 0 20M", "flush", f"read -P {byte} 0 20M")
    assert installation.status("vm1")["health"] == "Critical"
    installation.hvfuse("replicate", "vm1")
    assert installation.status("vm1")["state"] == "Replicating"
    view, older = tmp_path / "view", tmp_path / "older"
    installation.test_failover("vm1", view)
    assert identical(disk, view / name, fmt)
    installation.test_failover("vm1", older, point=old)
    qemu_io(older / name, fmt, "read -P 0 0 32M")
    installation.hvfuse("failover", "cleanup", "vm1")
    installation.hvfuse("umount", "vm1")
