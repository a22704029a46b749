"""Protection held up, ended and begun again, while guests write."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse import spool
from hvfuse.control.daemon import serving_pid
from hvfuse.control.job import JobKind, JobState
from hvfuse.control.records import Records
from hvfuse.target.journal import PointReader
from hvfuse.target.store import Store
from tests.e2e.conftest import Installation, identical, run, wait_until
from tests.e2e.test_main_job import attach_loop, loop  # noqa: F401

pytestmark = pytest.mark.mount
MIB = 1 << 20
SIZE = 48 * MIB


def add_vm(installation: Installation, vm: str = "vm1") -> Path:
    """A VM with one raw disk that has something in it; returns where the guest finds the disk."""
    folder = installation.disks / vm
    folder.mkdir(parents=True)
    with open(folder / "data.raw", "wb") as file:
        file.write(os.urandom(16 * MIB))
        file.truncate(SIZE)
    return installation.mnt / vm / "data.raw"


def overwrite(disk: Path, offset: int, data: bytes) -> None:
    with open(disk, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)
        os.fsync(file.fileno())


def points(installation: Installation, vm: str = "vm1") -> list[str]:
    with Store(str(installation.root / "store"), create=False, read_only=True) as store:
        return [point.id for point in store.points(vm)]


def first_bytes(installation: Installation, vm: str = "vm1") -> set[bytes]:
    """What the recovery points have at the disk's begin."""
    found = set()
    with Store(str(installation.root / "store"), create=False, read_only=True) as store:
        for point in store.points(vm):
            reader = PointReader(store, vm, point.id)
            found.add(bytes(reader.pread("data.raw", 0, 8)))
            reader.close()
    return found


def sealed(installation: Installation, vm: str = "vm1") -> int:
    return len(spool.list_cycles(str(installation.disks / vm)))


def jobs(installation: Installation, kind: JobKind) -> list[JobState]:
    with Records(str(installation.root / "state" / "records")) as records:
        return [job.state for job in records.jobs.all() if job.kind is kind]


def shipper(installation: Installation, vm: str = "vm1") -> int | None:
    return serving_pid(str(installation.root / "state" / "vms" / vm / "shipper.sock"))


def tracker(installation: Installation, vm: str = "vm1") -> int | None:
    return serving_pid(str(installation.root / "state" / "vms" / vm / "tracker.sock"))


def equal_at_latest(installation: Installation, disk: Path, view: Path) -> bool:
    installation.hvfuse("replicate", "vm1")
    installation.test_failover("vm1", view)
    return identical(disk, view / "data.raw", "raw")


def test_while_suspended_cycles_pile_up_and_each_of_them_becomes_a_point_afterwards(
    installation: Installation, tmp_path: Path
) -> None:
    disk = add_vm(installation)
    installation.start(frequency="1s")
    installation.wait_for_state("vm1")
    wait_until(lambda: jobs(installation, JobKind.FINALIZE) == [JobState.SUCCEEDED], installation.logs)
    assert installation.json("replication", "suspend", "vm1")["state"] == "Suspended"
    installation.wait_for_state("vm1", "Suspended")
    before = points(installation)
    patterns = [bytes([65 + number]) * 8 for number in range(3)]
    for pattern in patterns:
        overwrite(disk, 0, pattern)
        count = sealed(installation)
        wait_until(lambda count=count: sealed(installation) >= count + 2, installation.logs)
    assert points(installation) == before
    assert installation.hvfuse("replicate", "vm1", code=1)
    waiting = sealed(installation)
    installation.hvfuse("replication", "resume", "vm1")
    installation.wait_for_state("vm1", "Replicating")
    wait_until(lambda: len(points(installation)) >= len(before) + waiting, installation.logs)
    assert set(patterns) <= first_bytes(installation)
    assert equal_at_latest(installation, disk, tmp_path / "view")
    assert jobs(installation, JobKind.FINALIZE) == [JobState.SUCCEEDED]


def test_while_the_replica_is_suspended_the_source_holds_out_and_goes_on_at_once(
    installation: Installation, tmp_path: Path
) -> None:
    disk = add_vm(installation)
    installation.start(frequency="1s")
    installation.wait_for_state("vm1")
    assert installation.json("replication", "suspend", "vm1", "--replica")["state"] == "Suspended"
    wait_until(lambda: "suspended at the target" in str(installation.status("vm1")), installation.logs)
    before = points(installation)
    overwrite(disk, 0, b"B" * 8)
    count = sealed(installation)
    wait_until(lambda: sealed(installation) >= count + 2, installation.logs)
    assert points(installation) == before
    installation.test_failover("vm1", tmp_path / "meanwhile")
    waiting, began = sealed(installation), time.monotonic()
    assert installation.json("replication", "resume", "vm1", "--replica")["state"] == "Replicating"
    wait_until(lambda: len(points(installation)) >= len(before) + waiting, installation.logs)
    assert time.monotonic() - began < 30  # the ladder of retries would have had it wait for a minute
    assert equal_at_latest(installation, disk, tmp_path / "view")


class Guest:
    """Writes files into a mounted file system until it is told to stop; `errors`: what went wrong."""

    def __init__(self, directory: Path) -> None:
        self.errors: list[OSError] = []
        self.written = 0
        self._directory = directory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with open(self._directory / f"file{self.written % 50}", "wb") as file:
                    file.write(os.urandom(20_000))
                    file.flush()
                    os.fsync(file.fileno())
                self.written += 1
            except OSError as error:
                self.errors.append(error)
                return

    def goes_on(self) -> None:
        count = self.written
        wait_until(lambda: self.written > count + 5 or bool(self.errors), lambda: "the guest stands still")
        assert self.errors == []

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def mounts() -> Iterator[list[Path]]:
    made: list[Path] = []
    yield made
    for path in made:
        subprocess.run(["umount", str(path)], capture_output=True, check=False)


def test_disabled_under_a_guest_that_writes_and_enabled_again_only_differences_travel(
    installation: Installation,
    tmp_path: Path,
    loop: list[str],  # noqa: F811
    mounts: list[Path],
) -> None:
    disk = add_vm(installation)
    installation.start(frequency="1s")
    installation.wait_for_state("vm1")
    device = attach_loop(disk, loop)
    run("mkfs.ext4", "-q", device)
    guest_view = tmp_path / "guest"
    guest_view.mkdir()
    run("mount", device, guest_view)
    mounts.append(guest_view)
    guest = Guest(guest_view)
    try:
        guest.goes_on()
        served = tracker(installation)
        installation.hvfuse("replication", "disable", "vm1")
        guest.goes_on()
        assert shipper(installation) is None
        assert installation.status("vm1")["state"] == "Disabled"
        assert installation.status("vm1")["reasons"] == []
        kept = points(installation)
        logs = [name for name in os.listdir(installation.disks / "vm1") if name.endswith((".hrl", ".hrc"))]
        assert logs == []
        time.sleep(2)  # twice the time after which a supervisor would have brought the shipper back
        guest.goes_on()
        assert (tracker(installation), shipper(installation)) == (served, None)
        assert points(installation) == kept
        installation.hvfuse("replicate", "vm1", code=13)
        installation.hvfuse("replication", "enable", "vm1")
        installation.wait_for_state("vm1")
        guest.goes_on()
    finally:
        guest.stop()
    with Records(str(installation.root / "state" / "records")) as records:
        copied = records.read("vm1").last_copy
    assert copied is not None and 0 < copied["bytes_sent"] < 8 * MIB, copied
    assert set(kept) <= set(points(installation))
    wait_until(lambda: jobs(installation, JobKind.FINALIZE) == [JobState.SUCCEEDED] * 2, installation.logs)
    run("umount", guest_view)
    run("losetup", "-d", device)
    loop.remove(device)
    assert equal_at_latest(installation, disk, tmp_path / "view")


def test_run_serves_a_disabled_vm_and_never_ships_it(installation: Installation, tmp_path: Path) -> None:
    disk = add_vm(installation)
    add_vm(installation, "other")
    installation.root.mkdir(exist_ok=True)
    installation.hvfuse("replication", "disable", "vm1")
    installation.start(frequency="1s")
    installation.wait_for_state("other")
    wait_until(disk.exists, installation.logs)
    overwrite(disk, 0, b"C" * 8)
    assert (installation.status("vm1")["state"], shipper(installation)) == ("Disabled", None)
    assert not [name for name in os.listdir(installation.disks / "vm1") if name.endswith(".hrl")]
    run("umount", installation.mnt / "vm1")
    wait_until(lambda: tracker(installation) is None, installation.logs)
    time.sleep(2)
    assert tracker(installation) is None  # whoever unmounts it means it
    installation.hvfuse("replication", "enable", "vm1")
    installation.wait_for_state("vm1")
    assert equal_at_latest(installation, disk, tmp_path / "view")


def test_the_replica_of_a_vm_that_runs_is_deleted_and_made_anew(installation: Installation, tmp_path: Path) -> None:
    disk = add_vm(installation)
    installation.start(frequency="1s")
    installation.wait_for_state("vm1")
    installation.hvfuse("replication", "disable", "vm1", "--delete-replica", "--yes")
    assert installation.json("store", "info")["vms"] == []
    assert os.listdir(installation.root / "store" / "replicas") == []
    overwrite(disk, 0, b"D" * 8)
    assert installation.hvfuse("replication", "enable", "vm1", "--wait")
    assert equal_at_latest(installation, disk, tmp_path / "view")


def test_logs_of_a_suspension_are_compacted_at_the_soft_limit(installation: Installation, tmp_path: Path) -> None:
    disk = add_vm(installation)
    config = '[replication]\nfrequency = "1s"\nsoft_limit = 10\nhard_limit = 1000\nresync_window = "always"\n'
    (installation.root / "hvfuse.toml").write_text(config)
    installation.start()
    installation.wait_for_state("vm1")
    installation.hvfuse("replication", "suspend", "vm1")
    before = points(installation)
    for _ in range(6):
        overwrite(disk, 4 * MIB, os.urandom(2 * MIB))
        count = sealed(installation)
        wait_until(lambda count=count: sealed(installation) != count, installation.logs)
    folder = str(installation.disks / "vm1")
    wait_until(lambda: any(cycle.first_cycle < cycle.cycle for cycle in spool.list_cycles(folder)), installation.logs)
    assert sum(log.header.stored_bytes for log in spool.list_logs(folder)) < 8 * MIB
    assert points(installation) == before
    installation.hvfuse("replication", "resume", "vm1")
    installation.wait_for_state("vm1", "Replicating")
    assert equal_at_latest(installation, disk, tmp_path / "view")


KILLED = """
import itertools, os, signal, sys
from hvfuse.cli.main import main
from hvfuse.control import database

calls, real, step = itertools.count(1), database.Database.write, int(sys.argv.pop(1))

def write(self, act):
    result = real(self, act)
    if next(calls) == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

database.Database.write = write
main()
"""
"""`hvfuse`, killed after the transaction of the records with the number argv[1]."""


def test_disable_killed_under_a_supervisor_ends_well_when_it_is_repeated(
    installation: Installation, tmp_path: Path
) -> None:
    disk = add_vm(installation)
    installation.start(frequency="1s")
    installation.wait_for_state("vm1")
    for step in (
        2,
        3,
        4,
        5,
    ):  # "disable replication" begins, the record is written, "end the shipper", "give up the logs"
        command = installation.command("replication", "disable", "vm1")[3:]
        done = subprocess.run(
            [installation.command()[0], "-c", KILLED, str(step), *command], cwd="/", env=installation.environment()
        )
        assert done.returncode == -9
        installation.hvfuse("replication", "disable", "vm1")
        assert shipper(installation) is None
        assert jobs(installation, JobKind.DISABLE)[-2:] == [JobState.FAILED, JobState.SUCCEEDED]
        overwrite(disk, 0, bytes([step]) * 8)
        installation.hvfuse("replication", "enable", "vm1")
        installation.wait_for_state("vm1")
    assert equal_at_latest(installation, disk, tmp_path / "view")


def test_whoever_enables_and_waits_leaves_the_shipping_to_hvfuse_run(installation: Installation) -> None:
    add_vm(installation)
    installation.start(frequency="1s")
    installation.wait_for_state("vm1")
    for _ in range(3):
        installation.hvfuse("replication", "disable", "vm1", "--delete-replica", "--yes")
        assert installation.json("replication", "enable", "vm1", "--wait")["point"] is not None
        assert installation.status("vm1")["health"] != "Critical"
    events = installation.json("event", "list", "vm1")["events"]
    assert not [event["text"] for event in events if "another process" in event["text"]]
