"""Protection is finalized once, after the first recovery point, whoever was killed at it before."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvfuse.control import database
from hvfuse.control.config import Config
from hvfuse.control.home import Home
from hvfuse.control.job import JobKind, JobState
from hvfuse.control.protected import FINALIZE_AGAIN, Finalizer
from hvfuse.control.records import Records
from hvfuse.errors import HvfuseError
from hvfuse.manifest import RecoveryPoint
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.source import SourceDisk, SourceStatus
from hvfuse.states import Event
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.control.children import HandClock
from tests.target.model import Source


@dataclass
class Tracked:
    """A tracker's word. `extra`: names of disks that no recovery point has."""

    point: RecoveryPoint
    extra: list[str] = field(default_factory=list)

    def status(self) -> SourceStatus:
        known = [SourceDisk(name=d.name, disk_id=d.disk_id, format="raw", size=d.size, log_bytes=0) for d in self.disks]
        more = [SourceDisk(name=name, disk_id=b"x" * 16, format="raw", size=1, log_bytes=0) for name in self.extra]
        return SourceStatus(vm="vm", generation=None, cycle=1, resync_required=None, disks=(*known, *more))

    @property
    def disks(self) -> tuple[object, ...]:
        return self.point.disks


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home whose store has a first recovery point of "vm", and whose records say so."""
    made = Config().home(str(tmp_path / "home"))
    made.make()
    source = Source("vm", {"a.raw": 50_000, "b.raw": 512})
    with Store(made.store) as store, Records(made.records) as records:
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        point = source.ship_to(replica)
        replica.close()
        records.apply("vm", Event.ENABLE, Event.COMMIT_POINT, point=point, orders=Orders(now=True))
    return made


def finalize(home: Home, *, clock: HandClock | None = None) -> None:
    with Store(home.store) as store, Records(home.records) as records:
        clock = clock or HandClock()
        source = Tracked(store.point("vm"))
        Finalizer(records, "vm", store=store, source=source, housekeep=lambda: None, clock=clock)()


def is_protected(home: Home) -> bool:
    with Records(home.records) as records:
        records.jobs.bury()
        found = records.read("vm")
        states = [job.state for job in records.jobs.all() if job.kind is JobKind.FINALIZE]
        return (
            found.protected_since_ns is not None
            and Orders.from_json(found.orders) == Orders()
            and JobState.IN_PROGRESS not in states
        )


def finalized_until(home: Home, step: int) -> bool:
    """Finalize in a process that is killed before the transaction of the records of that number; whether it came to
    the end."""
    child = os.fork()
    if child == 0:
        calls, real = itertools.count(1), database.Database.write

        def write(self: database.Database, act: object) -> object:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, act)

        database.Database.write = write
        try:
            finalize(home)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0


def test_killed_at_every_step_it_is_done_by_the_next_one(home: Home, tmp_path: Path) -> None:
    pristine = tmp_path / "pristine"
    shutil.copytree(home.root, pristine)
    for step in itertools.count(1):
        shutil.rmtree(home.root)
        shutil.copytree(pristine, home.root)
        ended = finalized_until(home, step)
        finalize(home)
        assert is_protected(home), step
        if ended:
            break
    assert step > 6


def test_it_is_done_once_and_not_before_there_is_a_point(home: Home) -> None:
    with Records(home.records) as records:
        records.apply("vm", Event.NEED_RESYNC)
    finalize(home)
    assert not is_protected(home)
    with Records(home.records) as records:
        records.apply("vm", Event.COMMIT_POINT)
    finalize(home)
    finalize(home)
    assert is_protected(home)
    with Records(home.records) as records:
        assert [job.kind for job in records.jobs.all()] == [JobKind.FINALIZE]
        assert [step.name for step in records.jobs.all()[0].steps] == ["first recovery point", "orders", "retention"]


def test_a_point_of_other_disks_is_told_of_and_looked_at_again_later(home: Home) -> None:
    clock = HandClock()
    with Store(home.store) as store, Records(home.records) as records:
        source = Tracked(store.point("vm"), extra=["new.raw"])
        finalizer = Finalizer(records, "vm", store=store, source=source, housekeep=lambda: None, clock=clock)
        with pytest.raises(HvfuseError, match=r"not of the disks that are tracked: new\.raw"):
            finalizer()
        source.extra.clear()
        finalizer()
        assert [job.state for job in records.jobs.all()] == [JobState.FAILED]
        clock.at += FINALIZE_AGAIN
        finalizer()
        assert [job.state for job in records.jobs.all()] == [JobState.FAILED, JobState.SUCCEEDED]
        assert records.read("vm").protected_since_ns is not None
