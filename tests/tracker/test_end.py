"""Replication that was disabled: nothing is logged or marked, and that everything has to be compared is never lost."""

from __future__ import annotations

import itertools
import os
import uuid
from pathlib import Path

import pytest

from hvfuse import spool
from hvfuse.errors import ResyncRequiredError
from hvfuse.formats.tracking import Scope
from hvfuse.tracker.service import TrackerControl
from hvfuse.tracker.vm import TrackedVm
from tests.dying import done_until
from tests.tracker.test_vm import GENERATION, MIB, attached, make_folder, marked

NEXT = uuid.UUID(int=8).bytes


def logs(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith((".hrl", ".hrc"))]


def test_after_it_writes_go_to_the_image_and_nowhere_else_over_any_restart(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder, begin=False)
    vm.begin(GENERATION)
    vm.resynced(GENERATION)
    name = next(iter(vm.disks))
    vm.disks[name].write(b"logged", 0)
    vm.rotate()
    TrackerControl(vm, "/nowhere").handle({"op": "end"})
    before = marked(vm, name)
    for _ in range(2):
        vm.disks[name].write(b"plain", 200_000)
        assert os.pread(vm.disks[name].fd, 5, 200_000) == b"plain"
        assert marked(vm, name) == before
        assert not vm.is_logging and vm.resync_reason == "replication was disabled"
        assert vm.status()["resync_scope"] == "full"
        assert logs(folder) == [] and spool.list_cycles(folder) == []
        with pytest.raises(ResyncRequiredError):
            vm.begin(NEXT, Scope.REGIONS)
        vm.detach()
        vm = attached(folder, begin=False)
        vm.end()
    vm.begin(NEXT)
    assert vm.is_logging and vm.resync_reason is None
    vm.detach()


def test_a_disk_that_was_never_tracked_stays_so(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder, begin=False)
    vm.end()
    assert vm.resync_reason is None and vm.status()["generation"] is None
    vm.detach()


def test_killed_at_every_step_the_logs_go_on_or_everything_is_compared(tmp_path: Path) -> None:
    for step in itertools.count(1):
        (tmp_path / str(step)).mkdir()
        folder = make_folder(tmp_path / str(step), a=MIB)
        vm = attached(folder, begin=False)
        vm.begin(GENERATION)
        vm.resynced(GENERATION)
        name = next(iter(vm.disks))
        vm.disks[name].write(b"sealed", 0)
        vm.rotate()
        vm.disks[name].write(b"active", 100_000)
        vm.detach()
        ended = ended_until(folder, step)
        vm = attached(folder, begin=False)
        has_logs = {cycle.cycle for cycle in spool.list_cycles(folder) if cycle.is_whole}
        if vm.resync_reason is None:
            assert not ended and {1, 2} <= has_logs, step
        else:
            assert vm.status()["resync_scope"] == "full", step
        vm.end()
        assert logs(folder) == [] and vm.resync_reason == "replication was disabled", step
        vm.detach()
        if ended:
            break
    assert step > 5


def ended_until(folder: str, step: int) -> bool:
    """Disable in a process that dies at the labelled call of that number; whether it came to the end."""
    vms: list[TrackedVm] = []

    def end() -> None:
        vms[0].end()

    return done_until(step, end, prepare=lambda: vms.append(attached(folder, begin=False)))
