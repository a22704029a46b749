"""A store that cannot be reached for a day: everything is the real thing but the clock, and the way to the store."""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hvfuse import wire
from hvfuse.control.config import Config, VmPolicy
from hvfuse.control.facts import Past, TargetFacts
from hvfuse.control.records import Records
from hvfuse.control.status import Health, VmStatus, vm_status
from hvfuse.errors import UnreachableError
from hvfuse.shipper.policy import CurrentPolicy, ShippingPolicy
from hvfuse.shipper.retry import LADDER, LAST_STEP
from hvfuse.shipper.service import Shipper
from hvfuse.shipper.source import TrackerSource
from hvfuse.states import Event, ReplicationState
from hvfuse.target.journal import PointReader
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store
from hvfuse.target.view import View
from hvfuse.tracker.service import TrackerControl
from hvfuse.tracker.vm import TrackedVm

MIB = 1 << 20
DAY = 86400
FREQUENCY = 300.0
STEP = 60.0
SIZE = 64 * MIB
WRITTEN = 300_000
"""Bytes that are written in each interval, mostly over what was written before."""


class Clock:
    """One clock for all; a test lets it go on."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def now_ns(self) -> int:
        return int(self.seconds * 1e9)

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class Way:
    """The way to a real replica, which can be cut. `tried`: when it was asked for in vain."""

    def __init__(self, replica: LocalReplica, clock: Clock) -> None:
        self._replica = replica
        self._clock = clock
        self.is_cut = False
        self.tried: list[float] = []

    def __getattr__(self, name: str) -> Any:
        if self.is_cut:
            self.tried.append(self._clock.seconds)
            raise UnreachableError("the store does not answer", hint="see to the network")
        return getattr(self._replica, name)


class Site:
    """A VM that is replicated into a store, and what anybody can see of it."""

    def __init__(self, root: Path, records: Records, store: Store, clock: Clock) -> None:
        self.home = Config().home(str(root))
        self.clock, self.records, self.store = clock, records, store
        self.folder = self.home.folder("vm")
        os.makedirs(self.folder)
        with open(os.path.join(self.folder, "os.raw"), "wb") as file:
            file.write(random.Random(1).randbytes(MIB))
            file.truncate(SIZE)
        self.home.make()
        self.home.make_vm("vm")
        self.tracked = TrackedVm("vm", self.folder, clock=clock)
        self.tracked.attach()
        self.control = wire.Listener(
            self.home.tracker_socket("vm"), TrackerControl(self.tracked, "/none").handle, name="control"
        )
        self.replica = LocalReplica(store, "vm")
        self.way = Way(self.replica, clock)
        records.apply("vm", Event.ENABLE)
        self.shipper = Shipper(
            vm="vm",
            folder=self.folder,
            source=TrackerSource(self.home.tracker_socket("vm"), self.folder),
            replica=self.way,  # type: ignore[arg-type]
            records=records.of("vm"),
            policy=CurrentPolicy(ShippingPolicy(frequency_seconds=FREQUENCY)),
            clock=clock,
            housekeep=lambda: self.replica.housekeep(RetentionPolicy(), clock.now_ns()) and None,
        )
        self.listener = self.shipper.listen(self.home.shipper_socket("vm"))
        self._dice = random.Random(2)

    def close(self) -> None:
        self.listener.close()
        self.control.close()
        self.replica.close()
        self.tracked.detach()

    def live(self, seconds: float) -> Iterator[VmStatus]:
        """Let time pass: the guest writes, the shipper turns, somebody looks."""
        for step in range(int(seconds / STEP)):
            if step % int(FREQUENCY / STEP) == 0:
                offset = self._dice.randrange(8) * WRITTEN
                self.tracked.disks["os.raw"].write(self._dice.randbytes(WRITTEN), offset)
            self.clock.seconds += STEP
            self.shipper.turn()
            yield self.status()

    def status(self) -> VmStatus:
        now = int(self.clock.seconds)
        return vm_status(
            self.home,
            "vm",
            record=self.records.read("vm"),
            policy=VmPolicy(frequency=FREQUENCY),
            target=self.target,
            past=Past(sums=self.records.statistics.over("vm", first=now - 43200, last=now)),
            now_ns=self.clock.now_ns(),
        )

    def target(self, vm: str) -> TargetFacts:
        if self.way.is_cut:
            raise UnreachableError("the store does not answer", hint="see to the network")
        count, newest, _ = self.store.summary(vm)
        assert newest is not None
        return TargetFacts(points=count, newest_id=newest.id, newest_ns=newest.time_ns)

    def newest(self) -> bytes:
        """The disk at the newest point, through a view."""
        point = self.store.points("vm")[-1]
        with closing(
            View(PointReader(self.store, "vm", point.id), overlays=os.path.join(self.home.state, "o"))
        ) as view:
            disk = view.disks["os.raw"]
            data = bytearray(SIZE)
            assert disk.read_into(memoryview(data), 0) == SIZE
            return bytes(data)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    clock = Clock()
    with (
        Records(str(tmp_path / "records"), clock=clock) as records,
        Store(str(tmp_path / "store"), clock=clock) as store,
        closing(Site(tmp_path, records, store, clock)) as site,
    ):
        yield site


def test_a_day_without_the_store_is_told_is_survived_and_is_caught_up_with(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = list(site.live(2 * FREQUENCY * 10))
    assert {status.health for status in before[10:]} == {Health.NORMAL}
    made = site.records.statistics.over("vm", first=0, last=int(site.clock.seconds)).successful

    site.way.is_cut = True
    outage = list(site.live(DAY))

    # Health: by the rules, and in this order.
    healths = [health for health, _ in itertools.groupby(status.health for status in outage)]
    assert healths[-2:] == [Health.WARNING, Health.CRITICAL]
    told = [{reason.id: reason.health for reason in status.reasons} for status in outage]
    failing = [each["replication-failing"] for each in told if "replication-failing" in each]
    assert [health for health, _ in itertools.groupby(failing)] == [Health.WARNING, Health.CRITICAL]
    assert "stale" in told[-1]
    assert "cycles-missed" in told[-1]
    assert all(status.state is ReplicationState.REPLICATING for status in outage), "no copy is needed, all the same"
    assert all(status.rpo_seconds is None for status in outage), "nobody can ask the store"

    # Attempts: by the ladder.
    first = site.way.tried[0]
    due = [0.0, *LADDER, *(LADDER[-1] + LAST_STEP * step for step in range(1, 48))]
    tried = sorted({time - first for time in site.way.tried})
    assert tried == [after for after in due if after <= site.clock.seconds - first]

    # Logs: compacted at the soft limit, never given up.
    assert "were compacted" in caplog.text
    held = sum(cycle.stored_bytes for cycle in TrackerSource("", site.folder).cycles())
    assert held <= 0.25 * SIZE + 2 * WRITTEN

    # What was missed is counted.
    sums = site.records.statistics.over("vm", first=0, last=int(site.clock.seconds))
    assert DAY / FREQUENCY - 2 <= sums.missed <= DAY / FREQUENCY
    assert (sums.successful, sums.network_failures) == (made, len(tried))

    site.way.is_cut = False
    after = list(site.live(LAST_STEP + FREQUENCY))
    assert after[-1].state is ReplicationState.REPLICATING
    assert site.records.read("vm").error is None
    left = {reason.id for reason in after[-1].reasons}
    assert left == {"cycles-missed", "latency"}, "that it was away is still told: the points of the outage came late"
    assert list(TrackerSource("", site.folder).cycles()) == []
    site.clock.seconds += FREQUENCY
    site.shipper.turn()
    with open(os.path.join(site.folder, "os.raw"), "rb") as file:
        assert site.newest() == file.read()
    assert "resynchronis" not in caplog.text.lower().replace("resynchronisation is required", "")

    # Half a day later nothing is left of it.
    later = list(site.live(43200 + FREQUENCY))
    assert (later[-1].health, later[-1].reasons) == (Health.NORMAL, ())


def test_a_clock_that_jumps_neither_loses_nor_doubles_cycles(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    skew = [0]
    monkeypatch.setattr(Clock, "now_ns", lambda self: int(self.seconds * 1e9) + skew[0])
    list(site.live(10 * FREQUENCY))
    for jump in (-3600, DAY, 13 * 365 * DAY, -14 * 365 * DAY, 0):
        skew[0] = jump * 10**9
        made = site.records.read("vm").cycle
        missed = site.shipper.missed
        list(site.live(10 * FREQUENCY))
        assert site.records.read("vm").cycle == made + 10
        assert site.shipper.missed == missed
    cycles = [point.cycle for point in site.store.points("vm")]
    assert cycles == sorted(set(cycles))
