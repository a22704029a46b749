"""What the shipper does while the target is away: seal, compact, and catch up when it is back."""

from __future__ import annotations

import logging

import pytest

from hvfuse.errors import NoSpaceError, ResyncRequiredError, UnreachableError
from hvfuse.shipper import compact
from hvfuse.shipper.service import Shipper

from .logs import random_bytes, tracked, write
from .test_service import Site

MIB = 1 << 20


@pytest.fixture
def site(tmp_path):
    return Site(tracked(str(tmp_path), [2 * MIB, MIB], begun=False))


def go_away(site: Site) -> None:
    site.replica.fail_with = UnreachableError("no answer from the target")


def turn(site: Site, shipper: Shipper, *, length: int = 100) -> None:
    """Half a minute, in which the same places are written to again."""
    site.clock.seconds += 30
    for number, disk in enumerate(site.source.disks):
        disk.do(write(0, random_bytes(int(site.clock.seconds) + number, length)))
    shipper.turn()


def come_back(site: Site, shipper: Shipper) -> list[int]:
    """The target is there again. Returns the cycles that became points now."""
    before = len(site.replica.all_points)
    site.replica.fail_with = None
    site.clock.seconds += 1800
    shipper.turn()
    site.assert_equal()
    assert site.source.cycles() == []
    return [point.cycle for point in site.replica.all_points[before:]]


def test_an_outage_has_points_at_the_policys_frequency(site, caplog):
    shipper = site.shipper()
    shipper.turn()
    go_away(site)
    for _ in range(5):
        turn(site, shipper)
        shipper.turn()
        site.clock.seconds += 1
        shipper.turn()
    assert [cycle.cycle for cycle in site.source.cycles()] == [2, 3, 4, 5, 6]
    assert come_back(site, shipper) == [2, 3, 4, 5, 6, 7]
    turn(site, shipper)
    assert site.replica.all_points[-1].cycle == 8
    assert "no answer" in caplog.text


def test_cycles_that_come_behind_are_no_more_cycles_that_were_due(site):
    shipper = site.shipper()
    shipper.turn()
    go_away(site)
    begun = site.clock.seconds
    for _ in range(5):
        turn(site, shipper)
    site.replica.fail_with = None
    site.clock.seconds += 30
    shipper.resume()
    shipper.turn()
    intervals = (site.clock.seconds - begun) // 30
    reports = site.records.reports[1:]
    assert [report.is_late for report in reports] == [True] * (len(reports) - 1) + [False]
    assert len(reports) > 4
    assert sum(not report.is_late for report in reports) + site.records.misses == intervals


def test_a_shipper_that_is_started_during_an_outage_seals_too(site, caplog):
    site.shipper().turn()
    go_away(site)
    shipper = site.shipper()
    for _ in range(3):
        turn(site, shipper)
    assert [cycle.cycle for cycle in site.source.cycles()] == [2, 3, 4]
    assert come_back(site, shipper) == [2, 3, 4, 5]
    assert "no answer" in caplog.text


def test_logs_of_an_outage_stay_near_the_soft_limit_and_what_is_given_up_is_told(site, caplog):
    caplog.set_level(logging.INFO)
    shipper = site.shipper()
    shipper.turn()
    go_away(site)
    held = []
    for _ in range(40):
        turn(site, shipper, length=100_000)
        held.append(sum(cycle.stored_bytes for cycle in site.source.cycles()))
    assert 0.25 * 3 * MIB - 200_000 < max(held) <= 0.25 * 3 * MIB + 200_000
    assert "cycles 2 to 5 were compacted" in caplog.text
    assert come_back(site, shipper) == [41, 42], "what was compacted last, and what was sealed since"


def test_nothing_is_sealed_before_the_first_copy_is_complete(site, caplog):
    shipper = site.shipper()
    shipper.synchronise()
    go_away(site)
    for _ in range(3):
        turn(site, shipper)
    assert site.source.cycles() == []
    assert len(come_back(site, shipper)) == 1
    assert "no answer" in caplog.text


def test_a_compaction_that_fails_is_told_now_and_then_and_harms_nothing(site, caplog, monkeypatch):
    monkeypatch.setattr(compact, "HEADROOM", 1 << 60)
    shipper = site.shipper()
    shipper.turn()
    go_away(site)
    for _ in range(12):
        turn(site, shipper, length=100_000)
    assert 0 < caplog.text.count("compacting the logs takes") < 6, "only when the logs have grown"
    assert come_back(site, shipper) == list(range(2, 15))


@pytest.mark.parametrize("error", [ResyncRequiredError("no way"), NoSpaceError("the store is full")])
def test_only_what_passes_by_itself_is_waited_for_with_logs(site, caplog, error):
    shipper = site.shipper()
    shipper.turn()
    site.replica.fail_with = error
    turn(site, shipper)
    turn(site, shipper)
    assert bool(site.source.cycles()) == error.recoverable
    assert str(error) in caplog.text
