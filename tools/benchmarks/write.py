"""Writes through the mount: all contenders on the disk; in memory (tmpfs), where only the processor counts, some of
those that serve through FUSE.

A row for each load against the best peer in C, against the peer that notes what was changed, against the image itself,
and against an untracked file in the same mount.
"""

from __future__ import annotations

from .contenders import BARE, EVERYBODY, OURS, PEERS, UNTRACKED, Load, contenders, rounds
from .scene import MIB, Scene
from .table import Row, rates

_DIRECT = ("--rw=randwrite", "--direct=1", "--ioengine=libaio")
LOADS = {
    Load("4k random write, O_DIRECT, depth 1", (*_DIRECT, "--bs=4k", "--iodepth=1")): 1.2,
    Load("4k random write, O_DIRECT, depth 16", (*_DIRECT, "--bs=4k", "--iodepth=16")): 1.1,
    Load("4k random write, buffered", ("--rw=randwrite", "--bs=4k")): 0.9,
    Load(
        "64k random write, O_DIRECT, depth 4", (*_DIRECT, "--bs=64k", "--iodepth=4"), size=128 * MIB, unit="MB/s"
    ): 1.2,
    Load("1M sequential write", ("--rw=write", "--bs=1M"), size=128 * MIB, unit="MB/s"): 1.0,
}
"""With the target against the peers."""
_MEMORY = ("passthrough_ll", "qemu, bitmap", UNTRACKED, OURS)


def measure(scene: Scene) -> list[Row]:
    rows = []
    with contenders(scene) as among:
        among.warm(LOADS)
        rows += compare("disk", rounds(among, EVERYBODY, list(LOADS), scene.rounds(5)), LOADS, tracked=0.8)
    with contenders(scene, _MEMORY, memory=True) as among:
        among.warm(LOADS)
        rows += compare("tmpfs", rounds(among, _MEMORY, list(LOADS), scene.rounds(3)), None, tracked=0.6)
    return rows


def compare(
    where: str, found: dict[Load, dict[str, list[float]]], targets: dict[Load, float] | None, *, tracked: float | None
) -> list[Row]:
    """Against the best peer with the targets of the loads; against the one that notes what was changed, and the bare
    file; tracked against untracked."""
    rows = []
    for load, measured in found.items():
        ours = measured[OURS]
        peers = {name: measured[name] for name in PEERS if name in measured}
        rows.append(rates(f"{where}: {load.name}", peers, ours, load.unit, targets[load] if targets else None))
    shown = {row.subject for row in rows}
    for load, measured in found.items():
        for name in ("qemu, bitmap", BARE):
            if name in measured and f"{where}: {load.name} ({name})" not in shown:
                rows.append(rates(f"{where}: {load.name}", {name: measured[name]}, measured[OURS], load.unit))
    if tracked is not None:
        for load, measured in found.items():
            beside = {UNTRACKED: measured[UNTRACKED]}
            rows.append(rates(f"{where}: {load.name}", beside, measured[OURS], load.unit, tracked))
    return rows
