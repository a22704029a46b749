"""What the region map costs a guest's writes: the same writes with and without marking, in turns, medians.

Each round writes 4 KiB at random places of a cold 1 GiB disk through the tracker's write path (no mount),
once with the map as it is and once with marking left out, and counts the syncs that marking took.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
import uuid

from hvfuse import system
from hvfuse.tracker.regions import RegionMap
from hvfuse.tracker.vm import TrackedVm

DISK = 1 << 30
WRITES = 20_000
ROUNDS = 5


def measure(folder: str, *, marking: bool) -> tuple[float, int]:
    """(writes per second, syncs of the map) of one round."""
    vm = TrackedVm("vm", folder, hard_limit=1000, soft_limit=1000)
    vm.attach()
    vm.begin(uuid.uuid4().bytes)
    disk = vm.disks["disk.raw"]
    dice = random.Random(1)
    data = os.urandom(4096)
    syncs = 0

    def count(label: str, _call: str, _size: int) -> None:
        nonlocal syncs
        syncs += label == "regions:sync"

    cover = RegionMap.cover
    if not marking:
        RegionMap.cover = lambda self, *range_: None  # type: ignore[method-assign]
    system.install(count)
    started = time.perf_counter()
    for _ in range(WRITES):
        disk.write(data, dice.randrange(DISK // 4096) * 4096)
    seconds = time.perf_counter() - started
    system.install(None)
    RegionMap.cover = cover  # type: ignore[method-assign]
    vm.detach()
    return WRITES / seconds, syncs


def main() -> None:
    """Print one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", choices=["marks"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rates: dict[bool, list[float]] = {True: [], False: []}
    syncs = 0
    for _ in range(ROUNDS):
        for marking in (False, True):
            with tempfile.TemporaryDirectory(prefix="hvfuse-bench-") as folder:
                with open(os.path.join(folder, "disk.raw"), "wb") as file:
                    file.truncate(DISK)
                rate, syncs = measure(folder, marking=marking)
            rates[marking].append(rate)
    peer, ours = statistics.median(rates[False]), statistics.median(rates[True])
    row = {
        "subject": f"{WRITES} random 4k writes to a cold disk: unmarked / marked, {syncs} syncs of the map",
        "peer": round(peer),
        "hvfuse": round(ours),
        "unit": "writes/s",
        "ratio": round(ours / peer, 3),
        "target": None,
    }
    if arguments.json:
        print(json.dumps({"rows": [row]}))
    else:
        print(f"{row['subject']}\n  {row['peer']} / {row['hvfuse']} {row['unit']}, ratio {row['ratio']}")


if __name__ == "__main__":
    main()
