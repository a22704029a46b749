"""What a sealed cycle says of the guest: whether it stood still at the barrier, and after which deaths that is told."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse import spool, system, wire
from hvfuse.consistency import Consistency
from hvfuse.errors import UsageError
from hvfuse.shipper.source import TrackerSource
from hvfuse.tracker.service import TrackerControl
from hvfuse.tracker.vm import TrackedVm
from tests.tracker.test_vm import GENERATION, MIB, attached, kill, make_folder

CRASH, APPLICATION = Consistency.CRASH, Consistency.APPLICATION


class Death(BaseException):
    """Where a SIGKILL would have struck."""


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[TrackedVm]:
    vm = attached(make_folder(tmp_path, a=MIB, b=MIB))
    yield vm
    system.install(None)
    vm.detach()


def consistencies(vm: TrackedVm) -> list[Consistency]:
    return [cycle.consistency for cycle in spool.list_cycles(vm.folder)]


def test_only_the_cycle_that_was_asked_to_be_is_application_consistent(vm: TrackedVm) -> None:
    assert vm.rotate().consistency is CRASH
    assert vm.rotate(APPLICATION).consistency is APPLICATION
    vm.rotate()
    vm.rotate_for(vm.disks["a.raw"], None)
    assert consistencies(vm) == [CRASH, APPLICATION, CRASH, CRASH]


def test_a_guest_that_was_let_go_before_the_barrier_makes_the_cycle_crash_consistent(
    vm: TrackedVm, tmp_path: Path
) -> None:
    proof = tmp_path / "proof"
    proof.touch()
    assert vm.rotate(APPLICATION, proof=str(proof)).consistency is APPLICATION
    proof.unlink()
    assert vm.rotate(APPLICATION, proof=str(proof)).consistency is CRASH
    assert consistencies(vm) == [APPLICATION, CRASH]


def test_a_guest_that_is_let_go_within_the_barrier_is_not_believed_to_have_stood_still(
    vm: TrackedVm, tmp_path: Path
) -> None:
    proof = tmp_path / "proof"
    proof.touch()
    disk = vm.disks["b.raw"]
    switch = type(disk).switch

    def let_go(self: object, **fields: int) -> None:
        switch(disk, **fields)
        proof.unlink()

    disk.switch = let_go.__get__(disk)  # type: ignore[attr-defined, method-assign]
    assert vm.rotate(APPLICATION, proof=str(proof)).consistency is CRASH


def test_a_death_while_sealing_never_leaves_more_than_what_all_disks_carry(tmp_path: Path) -> None:
    seen = set()
    for nth in itertools.count(1):
        (tmp_path / str(nth)).mkdir()
        folder = make_folder(tmp_path / str(nth), a=MIB, b=MIB)
        vm = attached(folder)
        for disk in vm.disks.values():
            disk.write(b"x" * 4096, 0)
        calls = itertools.count(1)

        def die(label: str, call: str, size: int, calls: Iterator[int] = calls, nth: int = nth) -> None:
            if label.startswith("seal:") and next(calls) == nth:
                raise Death

        system.install(die)
        try:
            vm.rotate(APPLICATION)
        except Death:
            died = True
        else:
            died = False
        system.install(None)
        kill(vm)
        whole = all(os.path.exists(os.path.join(folder, f"{name}.raw.0000000001.hrc")) for name in "ab")
        again = attached(folder, begin=False)
        (first, *_) = spool.list_cycles(folder)
        assert first.is_whole
        assert first.consistency is (APPLICATION if whole else CRASH)
        seen.add(first.consistency)
        again.detach()
        if not died:
            break
    assert seen == {CRASH, APPLICATION}
    assert nth > 6


def test_the_tracker_is_asked_for_it_over_its_socket(vm: TrackedVm, tmp_path: Path) -> None:
    path = str(tmp_path / "tracker.sock")
    listener = wire.Listener(path, TrackerControl(vm, "/none").handle, name="control")
    try:
        source = TrackerSource(path, vm.folder)
        assert source.rotate() == 1
        assert source.rotate(APPLICATION) == 2
        assert source.rotate(APPLICATION, proof=str(tmp_path / "nothing")) == 3
        assert [cycle.consistency for cycle in source.cycles()] == [CRASH, APPLICATION, CRASH]
        assert wire.request(path, "rotate", consistency="application")["consistency"] == "application"
        for wrong in ({"consistency": "perfect"}, {"consistency": 1}, {"proof": 7}):
            with pytest.raises(UsageError):
                wire.request(path, "rotate", **wrong)
        source.release(GENERATION, 9)
    finally:
        listener.close()
