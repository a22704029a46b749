"""Reads through the mount of what is in the page cache: all contenders on the disk, some in memory."""

from __future__ import annotations

from .contenders import EVERYBODY, OURS, UNTRACKED, Load, contenders, rounds
from .scene import MIB, Scene
from .table import Row
from .write import compare

_DIRECT = ("--rw=randread", "--direct=1", "--ioengine=libaio", "--bs=4k")
LOADS = {
    Load("4k random read, O_DIRECT, depth 1", (*_DIRECT, "--iodepth=1")): 1.2,
    Load("4k random read, O_DIRECT, depth 16", (*_DIRECT, "--iodepth=16")): 1.2,
    Load("1M sequential read", ("--rw=read", "--bs=1M"), size=256 * MIB, unit="MB/s"): 1.2,
}
_MEMORY = ("passthrough_ll", "passthrough_fh", "qemu", UNTRACKED, OURS)


def measure(scene: Scene) -> list[Row]:
    rows = []
    with contenders(scene) as among:
        rows += compare("disk", rounds(among, EVERYBODY, list(LOADS), scene.rounds(3)), LOADS, tracked=None)
    with contenders(scene, _MEMORY, memory=True) as among:
        rows += compare("tmpfs", rounds(among, _MEMORY, list(LOADS), scene.rounds(3)), None, tracked=None)
    return rows
