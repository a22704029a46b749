"""A policy that changes while a VM is being shipped."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from hvfuse.errors import UnreachableError
from hvfuse.formats.digests import Algorithm
from hvfuse.shipper import copies, cycle, export
from hvfuse.shipper.policy import CurrentPolicy, ShippingPolicy
from hvfuse.shipper.service import Shipper
from hvfuse.shipper.throttle import LOOK_SECONDS, Limit, Throttle
from hvfuse.shipper.window import ALWAYS, Initial, Resync
from hvfuse.states import ReplicationState

from .logs import tracked
from .test_service import MIB, Site, random_bytes


@dataclass
class Changing(Site):
    """A site whose policy a test changes as it goes along."""

    policy: ShippingPolicy = field(default_factory=lambda: ShippingPolicy(frequency_seconds=30))

    def shipper(self) -> Shipper:
        return Shipper(
            vm="vm1", folder=self.source.folder, source=self.source, replica=self.replica, records=self.records,
            policy=CurrentPolicy(self.policy, look=lambda: self.policy), clock=self.clock, housekeep=self.keep_house,
        )  # fmt: skip

    def change(self, **values: object) -> None:
        self.policy = replace(self.policy, **values)


@pytest.fixture
def site(tmp_path: Path) -> Changing:
    site = Changing(tracked(str(tmp_path), [2 * MIB, MIB], begun=False))
    for disk in site.source.disks:
        disk.image[:5000] = random_bytes(1, 5000)
    site.source.flush()
    return site


def test_a_shorter_frequency_applies_from_the_last_begin_on(site: Changing) -> None:
    shipper = site.shipper()
    assert shipper.turn() == 30
    site.clock.seconds += 4
    site.change(frequency_seconds=10)
    assert shipper.turn() == 6
    site.clock.seconds += 6
    assert shipper.turn() == 10
    assert [report.cycle for report in site.records.reports] == [1, 2]


def test_a_shorter_frequency_that_would_have_been_due_is_due_at_once_and_missed_nothing(site: Changing) -> None:
    site.change(frequency_seconds=3600)
    shipper = site.shipper()
    assert shipper.turn() == 3600
    site.clock.seconds += 600
    site.change(frequency_seconds=5)
    assert shipper.turn() == 5
    assert len(site.records.reports) == 2
    assert shipper.missed == 0


def test_a_longer_frequency_applies_after_the_cycle_that_is_due(site: Changing) -> None:
    shipper = site.shipper()
    shipper.turn()
    site.change(frequency_seconds=600)
    assert shipper.turn() == 30
    site.clock.seconds += 30
    assert shipper.turn() == 600


def test_a_policy_that_changes_back_and_forth_makes_no_more_cycles_than_the_shorter_one(site: Changing) -> None:
    shipper = site.shipper()
    for second in range(100):
        site.change(frequency_seconds=(10, 600)[second % 2])
        shipper.turn()
        site.clock.seconds += 1
    assert 10 <= len(site.records.reports) <= 11


def test_a_shorter_frequency_does_not_hurry_what_fails(site: Changing) -> None:
    shipper = site.shipper()
    shipper.turn()
    site.replica.fail_with = UnreachableError("away")
    site.clock.seconds += 30
    assert shipper.turn() == 60
    site.change(frequency_seconds=1)
    assert shipper.turn() == 60
    site.replica.fail_with = None
    site.clock.seconds += 60
    assert shipper.turn() == 1


def test_a_first_copy_that_waits_begins_when_the_policy_lets_it(site: Changing) -> None:
    site.change(frequency_seconds=3600, initial=Initial(at_ns=site.clock.now_ns() + 86400 * 10**9))
    shipper = site.shipper()
    assert shipper.turn() == 3600
    assert site.records.states[-1] is ReplicationState.READY_FOR_INITIAL_REPLICATION
    site.change(initial=Initial())
    site.clock.seconds += 1
    shipper.turn()
    assert site.records.states[-1] is ReplicationState.REPLICATING


def test_a_resynchronisation_that_waits_begins_when_the_policy_lets_it(site: Changing) -> None:
    site.change(resync=Resync(automatic=False))
    shipper = site.shipper()
    shipper.turn()
    site.write(5)
    site.source.rotate()
    site.source.lose_logs()
    site.clock.seconds += 30
    shipper.turn()
    assert site.records.states[-1] is ReplicationState.WAITING_FOR_START_RESYNCHRONIZE
    site.change(resync=Resync(window=ALWAYS))
    shipper.turn()
    assert site.records.states[-1] is ReplicationState.REPLICATING


def test_level_digest_and_soft_limit_are_those_of_the_moment(site: Changing, monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[tuple[str, int]] = []
    pool = cycle.FramePool
    monkeypatch.setattr(cycle, "FramePool", lambda **made: levels.append(made["level"]) or pool(**made))
    digests: list[Algorithm] = []
    copy = copies.copy
    monkeypatch.setattr(
        copies, "copy", lambda *disks, **made: digests.append(made["algorithm"]) or copy(*disks, **made)
    )
    limits: list[float] = []
    shipper = site.shipper()
    shipper.turn()
    compactor = shipper._replication._compactor
    monkeypatch.setattr(compactor, "relieve", lambda found, *, soft_limit: limits.append(soft_limit))
    for level, soft_limit in ((3, 0.5), (9, 0.75)):
        site.change(level=level, soft_limit=soft_limit, algorithm=Algorithm.BLAKE3, resync=Resync(window=ALWAYS))
        site.write(level)
        site.clock.seconds += 30
        shipper.turn()
        site.replica.fail_with = UnreachableError("away")
        site.clock.seconds += 30
        shipper.turn()
        site.replica.fail_with = None
        site.clock.seconds += 60
        shipper.turn()
    assert [level for level, before in zip(levels, [None, *levels], strict=False) if level != before] == [1, 3, 9]
    assert limits == [0.5, 0.75]
    site.write(5)
    site.source.rotate()
    site.source.lose_logs()
    site.clock.seconds += 60
    shipper.turn()
    assert digests == [Algorithm.XXH3, Algorithm.BLAKE3]
    site.assert_equal()


def test_an_export_is_compressed_as_the_policy_of_the_moment_says(
    tmp_path: Path, site: Changing, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[int] = []
    copy = export.copy
    monkeypatch.setattr(export, "copy", lambda *disks, **made: levels.append(made["level"]) or copy(*disks, **made))
    site.change(initial=Initial(how="seed"))
    shipper = site.shipper()
    shipper.turn()
    site.change(level=7)
    shipper.turn()
    (tmp_path / "medium").mkdir()
    shipper.export(str(tmp_path / "medium"))
    assert levels == [7]


def test_a_throttle_that_is_set_slows_the_next_cycle_down_and_one_that_is_lifted_does_not(site: Changing) -> None:
    shipper = site.shipper()
    shipper.turn()
    site.change(throttle=Throttle((Limit(1000.0),)))
    site.write(1)
    site.clock.seconds += 30
    before = site.clock.seconds
    shipper.turn()
    report = site.records.reports[-1]
    assert site.clock.seconds - before == pytest.approx(report.seconds)
    assert (report.frames_sent, report.bytes_sent > 18000) == (2, True)
    assert report.bytes_sent / 2 / report.seconds <= 1000, "the second frame waited until the first was paid for"
    site.change(throttle=Throttle())
    site.write(2)
    site.clock.seconds += 30
    shipper.turn()
    assert site.records.reports[-1].seconds == 0
    site.assert_equal()


def test_a_stop_ends_a_throttled_cycle_that_resumes_with_the_next_start(site: Changing) -> None:
    shipper = site.shipper()
    shipper.turn()
    site.change(throttle=Throttle((Limit(10.0),)))
    site.write(1)
    stop = threading.Event()
    asleep = site.clock.sleep
    end = site.clock.seconds + 50
    doing: list[tuple[object, object]] = []

    def sleep(seconds: float) -> None:
        asleep(seconds)
        doing.append((shipper._status()["doing"], shipper._status()["doing_seconds"]))
        if site.clock.seconds > end:
            stop.set()

    site.clock.sleep = sleep  # type: ignore[method-assign]
    site.clock.seconds += 30
    shipper.run(stop)
    assert site.clock.seconds < end + 1
    assert {what for what, _ in doing} == {"holds a frame back, as the throttle says"}
    assert max(seconds for _, seconds in doing) <= LOOK_SECONDS + 1e-6, "it does not pass for one that hangs"
    assert len(site.records.reports) == 1
    site.change(throttle=Throttle())
    site.clock.sleep = asleep  # type: ignore[method-assign]
    site.shipper().cycle_now()
    site.assert_equal()
