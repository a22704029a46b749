"""From where each flow of a failover begins: homes at rest, made once by going through all flows, there and back."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .failover_sites import SIZES, VM, Side, Sites, copy_homes, wait_for


@dataclass
class Stage:
    """Homes at rest, what the disks of who has the VM hold, and what else has to be known."""

    path: Path
    model: dict[str, bytearray]
    notes: dict[str, Any] = field(default_factory=dict)


class Stages:
    """Made when first asked for, each from the one before it. All are used at one path, `root`/w."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Stage] = {}

    def begin(self, name: str) -> Sites:
        """The homes of a stage, to be used up."""
        stage = self._stage(name)
        sites = Sites(self._root / "w")
        copy_homes(stage.path, sites.root)
        sites.model, sites.notes = copy.deepcopy(stage.model), dict(stage.notes)
        return sites

    def _stage(self, name: str) -> Stage:
        if name not in self._made:
            before, act = STAGES[name]
            if before is None:
                sites = Sites(self._root / "w")
                sites.make()
            else:
                sites = self.begin(before)
            try:
                act(sites)
                sites.stop()
            except BaseException as error:
                error.add_note(sites.logs())
                sites.close()
                raise
            path = self._root / name
            copy_homes(sites.root, path)
            self._made[name] = Stage(path, sites.model, sites.notes)
        return self._made[name]


def _done(side: Side, *words: str) -> None:
    answer = side.do(*words)
    assert answer.code == 0, (words, answer)


def _reaches(side: Side, state: str) -> None:
    wait_for(lambda: side.status()["state"] == state, lambda: f"{side.name}: {side.status()}")


def shipped(side: Side) -> str:
    """Have all that was written arrive; the point's id."""
    answer = side.do("replicate", VM, "--json")
    assert answer.code == 0, answer
    return str(side.json("point", "list", VM)["points"][-1]["id"])


def _protected(sites: Sites) -> None:
    sites.s.start()
    _reaches(sites.s, "Replicating")
    for number in (1, 2):
        for disk in SIZES:
            assert sites.write(sites.s, disk, number << 18, os.urandom(200_000))
        sites.notes[f"point{number}"] = shipped(sites.s)
        sites.notes[f"model{number}"] = copy.deepcopy(sites.model)


def _prepared(source: str) -> Callable[[Sites], None]:
    def act(sites: Sites) -> None:
        side = sites.side(source)
        side.start()
        wait_for(lambda: side.serves("tracker"), side.logs)
        assert sites.write(side, "os.raw", 3 << 18, os.urandom(100_000))
        _done(side, "failover", "planned", VM, "--yes")

    return act


def _failed_over(kind: str, source: str, target: str) -> Callable[[Sites], None]:
    """Both sides know, and the target was written to. "source": what the source has."""

    def act(sites: Sites) -> None:
        there = sites.side(target)
        sites.s.start()
        sites.t.start()
        _done(there, "failover", kind, VM, "--yes")
        sites.notes["source"] = copy.deepcopy(sites.model)
        assert sites.write(there, "os.raw", 5 << 18, os.urandom(70_000))
        assert sites.write(there, "data.raw", 3 << 18, os.urandom(70_000))
        state = "FailbackInProgress" if target == "S" else "FailedOverWaitingCompletion"
        _reaches(sites.side(source), state)

    return act


def _committed(source: str, target: str) -> Callable[[Sites], None]:
    def act(sites: Sites) -> None:
        there = sites.side(target)
        sites.s.start()
        sites.t.start()
        wait_for(lambda: there.serves("tracker"), there.logs)
        _done(there, "failover", "commit", VM, "--yes", "--wait")
        _reaches(sites.side(source), "FailbackComplete" if target == "S" else "FailedOver")
        wait_for(lambda: not (there.folder / ".failover").exists(), there.logs)

    return act


def _gave_way(source: str) -> Callable[[Sites], None]:
    def act(sites: Sites) -> None:
        _done(sites.side(source), "replication", "reverse", VM, "--yes")

    return act


def _turned(target: str) -> Callable[[Sites], None]:
    def act(sites: Sites) -> None:
        there = sites.side(target)
        there.start()
        wait_for(lambda: there.serves("tracker"), there.logs)
        _done(there, "replication", "reverse", VM, "--yes")
        _reaches(there, "Replicating")
        assert sites.write(there, "os.raw", 7 << 18, os.urandom(70_000))
        sites.notes["point2"] = shipped(there)

    return act


STAGES: dict[str, tuple[str | None, Callable[[Sites], None]]] = {
    "protected": (None, _protected),
    "prepared": ("protected", _prepared("S")),
    "failed over": ("protected", _failed_over("unplanned", "S", "T")),
    "failed over as planned": ("prepared", _failed_over("planned", "S", "T")),
    "committed": ("failed over", _committed("S", "T")),
    "given way": ("committed", _gave_way("S")),
    "turned round": ("given way", _turned("T")),
    "prepared there": ("turned round", _prepared("T")),
    "failed back": ("prepared there", _failed_over("planned", "T", "S")),
    "committed here": ("failed back", _committed("T", "S")),
    "given way there": ("committed here", _gave_way("T")),
}
