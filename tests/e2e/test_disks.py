"""Disks that are added to a protected VM's folder or taken from it: real mounts, `hvfuse run`, fio and qemu."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hvfuse import wire
from hvfuse.errors import UnreachableError
from tests.e2e.conftest import Installation, identical, qemu_io, wait_until
from tests.e2e.test_copies import MIB, fill, load

OLD = 512 * MIB
NEW = 64 * MIB
WRITTEN = 24 * MIB
"""What fio writes to of the old disk."""


def protected(installation: Installation, *others: str) -> None:
    """A VM with a disk full of data, and perhaps others; its first copy is done."""
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    fill(folder / "os.raw", size=OLD, extents=[(0, OLD)], seed=1)
    for name in others:
        fill(folder / name, size=NEW, extents=[(0, NEW)], seed=2)
    installation.start("1s")
    installation.wait_for_state("vm1")
    installation.hvfuse("replicate", "vm1")


def updated(installation: Installation, *, disks: list[str]) -> dict[str, Any]:
    """What the copy took after which the VM has these disks and no others."""

    def is_done() -> bool:
        try:
            status = asked(installation, "tracker", "status")
        except UnreachableError:
            return False  # it is being started
        names = [disk["name"] for disk in status["disks"]]
        return names == disks and status["logging"] and not status["resyncing"]

    wait_until(is_done, installation.logs)
    installation.wait_for_state("vm1")
    report = asked(installation, "shipper", "status")["last_copy"]
    assert isinstance(report, dict)
    return report


def check_point(installation: Installation, tmp_path: Path, *, disks: list[str]) -> None:
    """The latest point has just these disks as they are now."""
    installation.hvfuse("replicate", "vm1")
    view = tmp_path / f"view{time.monotonic_ns()}"
    installation.test_failover("vm1", view)
    assert sorted(os.listdir(view)) == disks
    for name in disks:
        assert identical(installation.mnt / "vm1" / name, view / name, "raw")
    installation.hvfuse("failover", "cleanup", "vm1")


def asked(installation: Installation, process: str, op: str, **fields: object) -> dict[str, Any]:
    socket = installation.root / "state" / "vms" / "vm1" / f"{process}.sock"
    return dict(wire.request(str(socket), op, **fields))


def configure(installation: Installation, *exclude: str) -> None:
    """In the file, as an administrator would."""
    path = installation.root / "hvfuse.toml"
    text, _, _ = path.read_text().partition("[vm.vm1]")
    path.write_text(f"{text}[vm.vm1]\nexclude = {json.dumps(list(exclude))}\n")


@pytest.mark.timeout(300)
def test_a_disk_is_added_under_load_and_the_old_one_is_hardly_looked_at(
    installation: Installation, tmp_path: Path
) -> None:
    protected(installation)
    mnt = installation.mnt / "vm1"
    points = installation.json("point", "list", "vm1")["points"]
    with load(mnt / "os.raw", WRITTEN):
        time.sleep(1)
        fill(mnt / "data.raw", size=NEW, extents=[(0, NEW // 2)], seed=3)
        report = updated(installation, disks=["data.raw", "os.raw"])
    print(report)
    assert not report["is_whole"] and report["regions"]
    # All of the new disk, what fio wrote meanwhile, and what is marked ahead of it: 8 regions of 64 KiB each time.
    assert NEW <= report["bytes_compared"] < NEW + 2 * WRITTEN < (OLD + NEW) // 4
    assert NEW // 2 <= report["bytes_sent"] < NEW // 2 + 2 * WRITTEN
    qemu_io(mnt / "data.raw", "raw", "write -P 0xaa 40M 1M", "flush")
    check_point(installation, tmp_path, disks=["data.raw", "os.raw"])
    left = {point["id"] for point in installation.json("point", "list", "vm1")["points"]}
    assert points[-1]["id"] in left, "recovery points stay"
    assert installation.json("store", "check")


@pytest.mark.timeout(300)
def test_a_copy_that_is_under_way_is_not_taken_in(installation: Installation, tmp_path: Path) -> None:
    protected(installation)
    new = installation.mnt / "vm1" / "new.raw"
    with open(new, "wb") as file:
        for _ in range(16):
            file.write(os.urandom(MIB))
            file.flush()
            time.sleep(0.4)
            status = asked(installation, "tracker", "status")
            assert status["untracked"] == ["new.raw"] and status["logging"]
        time.sleep(4)  # it stands still, but may go on
        assert asked(installation, "tracker", "status")["untracked"] == ["new.raw"]
    report = updated(installation, disks=["new.raw", "os.raw"])
    assert report["bytes_compared"] < 32 * MIB
    check_point(installation, tmp_path, disks=["new.raw", "os.raw"])


@pytest.mark.timeout(300)
def test_an_excluded_disk_can_be_removed_while_the_vm_runs(installation: Installation, tmp_path: Path) -> None:
    protected(installation, "data.raw")
    mnt = installation.mnt / "vm1"
    with pytest.raises(OSError, match="busy"):
        (mnt / "data.raw").unlink()
    with load(mnt / "os.raw", WRITTEN):
        configure(installation, "data.raw")
        report = updated(installation, disks=["os.raw"])
        assert report["bytes_compared"] < 2 * WRITTEN
        found = installation.json("job", "list", "vm1", "--all")["jobs"]
        assert [(job["kind"], job["state"]) for job in found][-1] == ("Update disks", "Succeeded")
        (mnt / "data.raw").unlink()
        wait_until(
            lambda: not list((installation.disks / "vm1").glob("data.raw*")),
            lambda: str(list((installation.disks / "vm1").iterdir())),
        )
        configure(installation)
    check_point(installation, tmp_path, disks=["os.raw"])


@pytest.mark.timeout(300)
def test_a_disk_that_goes_and_one_that_comes_at_rest(installation: Installation, tmp_path: Path) -> None:
    protected(installation, "data.raw")
    folder = installation.disks / "vm1"
    qemu_io(installation.mnt / "vm1" / "os.raw", "raw", "write -P 0xbb 5M 64k", "flush")
    assert installation.stop() == 0
    shutil.move(folder / "data.raw", tmp_path / "data.raw")
    installation.start()
    report = updated(installation, disks=["os.raw"])
    assert report["bytes_compared"] < 4 * MIB
    check_point(installation, tmp_path, disks=["os.raw"])
    assert installation.stop() == 0
    subprocess.run(["cp", "--sparse=always", tmp_path / "data.raw", folder / "data.raw"], check=True)
    installation.start()
    report = updated(installation, disks=["data.raw", "os.raw"])
    assert NEW <= report["bytes_compared"] < NEW + 4 * MIB
    check_point(installation, tmp_path, disks=["data.raw", "os.raw"])
    assert installation.json("store", "check")
