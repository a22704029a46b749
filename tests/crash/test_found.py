"""What the campaign has found, each at its smallest."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from hvfuse.errors import UnreachableError
from hvfuse.target.journal import PointReader
from tests.crash.campaign import VICTIMS, Fault
from tests.crash.host import FAST_FOLDER, VM, Death, Host, Reaper
from tests.crash.workload import Action, Operation


@pytest.fixture
def host() -> Iterator[Host]:
    """Attached, and with a first recovery point."""
    root = tempfile.mkdtemp(prefix="hvfuse-crash-", dir=FAST_FOLDER)
    with Host(root, Reaper(), seed=1) as host:
        host.attach()
        host.replication.cycle_now()
        yield host
    shutil.rmtree(root)


def die(host: Host, operation: Operation, label: str, *, nth: int) -> None:
    """The tracker dies over an operation, at its nth call with that label."""
    host.reaper.die_at(VICTIMS[Fault.TRACKER], label, nth=nth)
    with contextlib.suppress(Death, UnreachableError):
        host.perform(operation)
    assert host.reaper.killed_at == label
    host.kill()
    host.reaper.disarm()


def replicated(host: Host) -> dict[str, bytes]:
    """What the newest point holds after one more cycle."""
    reader = PointReader(host.store, VM, host.replication.cycle_now().point)
    try:
        return {disk.name: reader.pread(disk.name, 0, disk.size) for disk in reader.disks}
    finally:
        reader.close()


def test_logs_are_taken_up_although_an_earlier_death_within_the_barrier_left_other_heads(host: Host) -> None:
    """The first death leaves heads that say active for a cycle that never was; it begins anew, and the second
    death must find its logs, and only those."""
    host.perform(Operation(Action.ROTATE))
    die(host, Operation(Action.ROTATE), "index:head", nth=3)
    host.attach()
    host.perform(Operation(Action.WRITE, "a.raw", 1000, 5, b"words"))
    host.kill()
    host.attach()
    assert replicated(host) == host.images()


def test_a_shipper_that_goes_on_after_the_tracker_died_at_sealing_costs_no_copy(host: Host) -> None:
    """The tracker dies when all companions are in place, but the last disk's state does not say so yet."""
    die(host, Operation(Action.ROTATE), "seal:companion:directory", nth=3)
    generation = host.replication.cycle_now().generation
    host.attach()
    assert host.replication.cycle_now().generation == generation
