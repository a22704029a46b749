"""A recovery point shows all disks at one instant: proved by a writer that stamps a counter to them in turn.

HVFUSE_ROTATIONS=1000 makes a campaign of it; the barrier's times are printed either way.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

from hvfuse import wire
from hvfuse.control.home import Home
from hvfuse.shipper.replication import CurrentPolicy, Replication, ShippingPolicy
from hvfuse.shipper.source import TrackerSource
from hvfuse.system import SystemClock
from hvfuse.target.journal import PointReader
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.e2e.conftest import Installation
from tests.shipper.logs import NoRecords

DISKS = 8
ROTATIONS = int(os.environ.get("HVFUSE_ROTATIONS", "60"))

WRITER = """
import mmap, os, sys
page = mmap.mmap(-1, 4096)
files = [os.open(path, os.O_RDWR | os.O_DIRECT) for path in sys.argv[1:]]
number = 0
while True:
    number += 1
    page[:8] = number.to_bytes(8, "little")
    for file in files:
        os.pwrite(file, page, 4096 * (number % 64))
        os.pwrite(file, page, 0)
"""


def test_no_point_ever_shows_one_disk_ahead_of_the_one_before_it(installation: Installation) -> None:
    assert mmap.PAGESIZE == 4096
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    names = [f"disk{number}.raw" for number in range(DISKS)]
    for name in names:
        with open(folder / name, "wb") as file:
            file.truncate(1 << 20)
    (installation.root / "hvfuse.toml").write_text("[replication]\nhard_limit = 100000\n")
    installation.hvfuse("mount", "vm1")
    home = Home(
        root=str(installation.root),
        disks=str(installation.disks),
        mnt=str(installation.mnt),
        store=str(installation.root / "store"),
        state=str(installation.root / "state"),
    )
    paths = [str(Path(home.mountpoint("vm1")) / name) for name in names]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, *paths])
    try:
        with Store(home.store) as store:
            barriers = _ship_and_look(store, home, names)
    finally:
        writer.kill()
        writer.wait()
    installation.hvfuse("umount", "vm1")
    barriers.sort()
    p50, p99 = barriers[len(barriers) // 2], barriers[len(barriers) * 99 // 100]
    print(
        f"{len(barriers)} rotations of {DISKS} disks under load: barrier p50 {p50 / 1000:.0f} us, "
        f"p99 {p99 / 1000:.0f} us, max {barriers[-1] / 1000:.0f} us"
    )


def _ship_and_look(store: Store, home: Home, names: list[str]) -> list[int]:
    replica = LocalReplica(store, "vm1")
    socket = home.tracker_socket("vm1")
    replication = Replication(
        vm="vm1",
        folder=home.folder("vm1"),
        source=TrackerSource(socket, home.folder("vm1")),
        replica=replica,
        records=NoRecords(),
        policy=CurrentPolicy(ShippingPolicy()),
        clock=SystemClock(),
        housekeep=lambda: None,
    )
    barriers = []
    last = 0
    for _ in range(ROTATIONS):
        report = replication.cycle_now()
        reader = PointReader(store, "vm1", report.point)
        stamps = [int.from_bytes(reader.pread(name, 0, 8), "little") for name in names]
        reader.close()
        assert stamps == sorted(stamps, reverse=True), stamps
        assert stamps[0] - stamps[-1] <= 1, stamps
        assert stamps[0] >= last
        last = stamps[0]
        barriers.append(int(wire.request(socket, "rotate")["barrier_ns"]))
    assert last > ROTATIONS, "the writer must have been at it all the time"
    replica.close()
    return barriers
