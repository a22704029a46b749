"""Verification under load: no false mismatch in any run, one flipped byte found and repaired, planted bugs seen.

HVFUSE_VERIFY_RUNS: runs under load (5). HVFUSE_VERIFY_IOPS: writes a second (400; 0: as many as there can be).
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvfuse.cli import wiring
from hvfuse.cli.main import Session
from hvfuse.control.records import Records
from hvfuse.formats.digests import BLOCK
from hvfuse.shipper import verify, written
from hvfuse.shipper.service import Shipper
from hvfuse.shipper.source import Touched, TrackerSource
from tests.e2e.conftest import Installation, run, wait_until
from tests.e2e.test_main_job import make_disk

RUNS = int(os.environ.get("HVFUSE_VERIFY_RUNS", "5"))
IOPS = int(os.environ.get("HVFUSE_VERIFY_IOPS", "400"))
MIB = 1 << 20
SIZE = 32 * MIB


@contextmanager
def load(disk: Path) -> Iterator[None]:
    """4 KiB random writes to the whole disk, for as long as the block lasts."""
    fio = subprocess.Popen(
        [
            "fio", "--name=load", f"--filename={disk}", f"--size={SIZE}", "--rw=randwrite", "--bs=4k", "--direct=1",
            "--ioengine=libaio", "--iodepth=4", "--time_based", "--runtime=3600", "--norandommap", "--randrepeat=0",
            "--output=/dev/null", "--thread", *([f"--rate_iops={IOPS}"] if IOPS else []),
        ],
        cwd=disk.parents[2],
    )  # fmt: skip
    try:
        before = os.stat(disk).st_mtime_ns
        wait_until(lambda: os.stat(disk).st_mtime_ns != before, lambda: "fio does not write")
        assert fio.poll() is None
        yield
        assert fio.poll() is None, "the load ended too early"
    finally:
        fio.kill()
        fio.wait()


def make_vm(installation: Installation) -> Path:
    """A VM whose one disk is full of data. Returns where the disk is once it is mounted."""
    make_disk(installation.disks / "vm1", "raw", "data.raw", str(SIZE))
    with open(installation.disks / "vm1" / "data.raw", "r+b") as file:
        file.write(os.urandom(SIZE))
    return installation.mnt / "vm1" / "data.raw"


def flip(installation: Installation, offset: int) -> None:
    """One bit of the replica's image, which holds what was there at the first copy."""
    with open(installation.root / "store" / "replicas" / "vm1" / "data.raw", "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def reasons(installation: Installation) -> set[str]:
    return {reason["id"] for reason in installation.status("vm1")["reasons"]}


def test_under_constant_load_no_run_tells_a_mismatch(installation: Installation) -> None:
    disk = make_vm(installation)
    installation.start(frequency="1s")
    installation.wait_for_state("vm1")
    proved, unproved, rounds, began = [], [], [], time.monotonic()
    with load(disk):
        for _ in range(RUNS):
            found = installation.json("verify", "vm1", "--all")
            assert found["mismatches"] == []
            assert found["bytes_compared"] == found["bytes_total"] == SIZE
            proved.append(found["proved_30d"])
            unproved.append(found["bytes_unproved"])
            rounds.append(found["rounds"])
    assert max(rounds) > 0, "the load did not touch what was compared"
    print(
        f"{RUNS} runs in {time.monotonic() - began:.0f} s, no mismatch; rounds {np.mean(rounds):.1f}, "
        f"left unproved {np.mean(unproved) / SIZE:.1%} of the disk, proved in the end {proved[-1]:.0%}"
    )
    still = installation.json("verify", "vm1", "--all")
    assert (still["mismatches"], still["bytes_unproved"], still["proved_30d"]) == ([], 0, 1.0)
    assert len(installation.json("point", "list", "vm1")["points"]) > RUNS, "cycles went on meanwhile"


def test_one_flipped_byte_is_found_by_its_offset_and_repaired(installation: Installation, tmp_path: Path) -> None:
    disk = make_vm(installation)
    installation.start(frequency="1s")
    installation.wait_for_state("vm1")
    place = SIZE // 2 + 12345
    with open(disk, "r+b") as file:
        file.write(b"an older point")
    older = installation.json("replicate", "vm1")["point"]
    flip(installation, place)
    told = installation.hvfuse("verify", "vm1", "--all", code=7)
    assert f"data.raw: offset {place // BLOCK * BLOCK}, length {BLOCK}" in told
    assert "verify-mismatch" in reasons(installation)
    with open(disk, "r+b") as file:
        file.write(b"something newer")
    told = installation.hvfuse("verify", "vm1", "--repair")
    assert "recovery points from before may have the fault still" in told
    assert "verify-mismatch" not in reasons(installation)
    record = installation.status("vm1")
    assert record["verified"]["mismatches"] == []
    assert installation.json("verify", "vm1", "--all")["proved_30d"] == 1.0
    installation.hvfuse("replicate", "vm1")
    view, before = tmp_path / "view", tmp_path / "before"
    installation.test_failover("vm1", view)
    run("cmp", disk, view / "data.raw")
    installation.test_failover("vm1", before, point=older)
    with open(before / "data.raw", "rb") as file:
        assert file.read(14) == b"an older point"
    installation.hvfuse("failover", "cleanup", "vm1")


def test_idle_time_finds_it_too_and_a_resynchronisation_that_is_asked_for_takes_it_up(
    installation: Installation,
) -> None:
    make_vm(installation)
    installation.start(frequency="1s")
    installation.wait_for_state("vm1")
    wait_until(lambda: installation.status("vm1")["points"] > 0, installation.logs)
    flip(installation, 7 * MIB)
    installation.hvfuse("verify", "vm1", "--continuous", "500MB/s")
    wait_until(lambda: "verify-mismatch" in reasons(installation), installation.logs)
    wait_until(lambda: installation.status("vm1")["verified"]["proved_30d"] == 1 - 4 * MIB / SIZE, installation.logs)
    installation.hvfuse("verify", "vm1", "--continuous", "0")
    installation.hvfuse("resync", "vm1")
    assert "repair-unproved" in reasons(installation), "it is over when it is proved"
    installation.hvfuse("verify", "vm1")
    assert not {"verify-mismatch", "repair-unproved"} & reasons(installation)
    installation.hvfuse("resync", "vm1", code=2)


# Planted bugs ---------------------------------------------------------------------------------------


def touched_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = TrackerSource.touched

    def nothing(self: TrackerSource, asked: Any) -> Touched:
        told = touched(self, asked)
        return Touched(told.generation, told.cycle, {})

    monkeypatch.setattr(TrackerSource, "touched", nothing)


def asked_before_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = verify.Run._compare

    def asking_first(self: verify.Run, sides: Any, **options: Any) -> int:
        everything = np.arange(SIZE // BLOCK)
        known = {disk_id: written.Since.written(sides.since, disk_id, everything) for disk_id in sides.disks}
        sides.since.written = lambda disk_id, blocks: known[disk_id][blocks]
        return compare(self, sides, **options)

    monkeypatch.setattr(verify.Run, "_compare", asking_first)


@pytest.mark.parametrize("plant", [touched_left_out, asked_before_reading])
def test_under_the_same_load_a_planted_bug_cries_wolf(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """The shipper is in this process; mount, tracker and load are real. Thirty runs at most."""
    disk = make_vm(installation)
    (installation.root / "hvfuse.toml").write_text("[replication]\nhard_limit = 1000\nsoft_limit = 1000\n")
    installation.hvfuse("mount", "vm1")
    installation.hvfuse("replicate", "vm1")
    session = Session(str(installation.root))
    home = session.home
    plant(monkeypatch)
    with (
        Records(home.records) as records,
        wiring.shipper(home, session.config_file, "vm1", records) as shipper,
        load(disk),
    ):
        assert any(verify_all(shipper)["mismatch_bytes"] for _ in range(30)), "the load test cannot fail"
    installation.hvfuse("umount", "vm1")


def verify_all(shipper: Shipper) -> Any:
    shipper.cycle_now()
    answer: Any = shipper.verify({"do": "begin", "share": 1.0})
    while not answer["report"]["done"]:
        answer = shipper.verify({"do": "step", "run": answer["run"]})
    return answer["report"]
