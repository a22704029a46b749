"""Writes that are made durable now and then, as a database does: all contenders, on the disk."""

from __future__ import annotations

from .contenders import EVERYBODY, Load, contenders, rounds
from .scene import Scene
from .table import Row
from .write import compare

LOADS = {Load("4k random write, fdatasync every 32", ("--rw=randwrite", "--bs=4k", "--fdatasync=32"), seconds=1): 1.2}


def measure(scene: Scene) -> list[Row]:
    with contenders(scene) as among:
        among.warm(LOADS)
        return compare("disk", rounds(among, EVERYBODY, list(LOADS), scene.rounds(5)), LOADS, tracked=0.8)
