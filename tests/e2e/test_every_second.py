"""A cycle every second under load: none is lost, and nothing grows for ever.

`HVFUSE_SECONDS=600 tools/test tests/e2e/test_every_second.py -s` runs it for ten minutes and prints what it saw.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvfuse.control.daemon import serving_pid

from .conftest import Installation, identical

pytestmark = pytest.mark.mount

SECONDS = int(os.environ.get("HVFUSE_SECONDS", "15"))
KEPT = max(5, SECONDS // 10)
"""Seconds for which points are kept: short, so that it can be seen that the store stops growing."""
SIZE = 64 << 20
CONFIG = f"""
[replication]
frequency = "1s"
hard_limit = 1000
[retention]
keep_all = "{KEPT}s"
hourly = 0
"""


@dataclass(frozen=True)
class Sample:
    """Bytes: of each process's memory, of the store and of the records on disk."""

    shipper: int
    tracker: int
    supervisor: int
    store: int
    records: int


def memory(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS"))


def disk_usage(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())


def sample(installation: Installation, supervisor: int) -> Sample:
    sockets = installation.root / "state" / "vms" / "vm1"
    shipper, tracker = (serving_pid(str(sockets / f"{role}.sock")) for role in ("shipper", "tracker"))
    assert shipper is not None
    assert tracker is not None
    return Sample(
        shipper=memory(shipper),
        tracker=memory(tracker),
        supervisor=memory(supervisor),
        store=disk_usage(installation.root / "store" / "store.lmdb"),
        records=disk_usage(installation.root / "state" / "records"),
    )


def test_a_cycle_every_second_is_never_lost_and_nothing_grows_for_ever(
    installation: Installation, tmp_path: Path
) -> None:
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    with open(folder / "os.raw", "wb") as file:
        file.truncate(SIZE)
    (installation.root / "hvfuse.toml").write_text(CONFIG)
    installation.start()
    supervisor = installation.running_pid
    first = installation.wait_for_state("vm1")["last_cycle"]
    disk = installation.mnt / "vm1" / "os.raw"
    load = [
        "fio", "--name=load", f"--filename={disk}", "--rw=randwrite", "--bs=4k", f"--size={SIZE}", "--direct=1",
        "--ioengine=libaio", "--iodepth=4", "--rate_iops=500", "--time_based", f"--runtime={SECONDS}",
    ]  # fmt: skip
    begun = time.monotonic()
    seen: list[Sample] = []
    cycles: list[int] = []
    with subprocess.Popen(load, stdout=subprocess.DEVNULL) as fio:
        while fio.poll() is None:
            seen.append(sample(installation, supervisor))
            cycles += [number for number in points(installation) if not cycles or number > cycles[-1]]
            time.sleep(min(1.0, SECONDS / 30))
        assert fio.returncode == 0
    took = time.monotonic() - begun
    measured = installation.json("measure", "vm1")["vms"][0]

    last = installation.status("vm1")["last_cycle"]
    missed = measured["missed_cycles"]
    print(f"{last - first} cycles in {took:.0f} s, {missed} missed; {len(seen)} samples, last: {seen[-1]}")
    assert cycles == list(range(cycles[0], cycles[-1] + 1)), "each cycle was a point"
    assert last - first + missed >= took - 3, "what was not made was counted as missed"
    assert last - first >= 0.8 * took
    for name in Sample.__dataclass_fields__:
        values = [getattr(one, name) for one in seen]
        middle, end = max(values[len(values) // 3 : 2 * len(values) // 3]), max(values[2 * len(values) // 3 :])
        assert end <= 1.1 * middle + (4 << 20), f"{name} grows: {middle} → {end}"

    installation.hvfuse("replicate", "vm1")
    installation.test_failover("vm1", tmp_path / "view")
    assert identical(disk, tmp_path / "view" / "os.raw", "raw")


def points(installation: Installation) -> list[int]:
    """The cycles of which there are points now, in order."""
    found = installation.json("point", "list", "vm1")["points"]
    return [int(point["id"].rpartition("-")[2]) for point in found]
