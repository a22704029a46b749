"""Compaction beside the real tracker and before the real store."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator

import pytest

from hvfuse import spool, system
from hvfuse.errors import HvfuseError
from hvfuse.shipper import compact
from hvfuse.shipper.compact import Compactor

from .test_with_store import StoredHost


@pytest.fixture
def host(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoredHost]:
    """A VM with one point at the store, and four cycles that wait."""
    monkeypatch.setattr(compact, "WORTHWHILE", 2)
    host = StoredHost(tmp_path)
    host.shipper().cycle_now()
    for seed in range(4):
        write_and_rotate(host, seed)
    yield host
    host.replica.close()
    host.store.close()
    host.detach()


def write_and_rotate(host: StoredHost, seed: int) -> None:
    dice = random.Random(seed)
    host.scribble(dice, 15)
    host.vm.disks["a.raw"].truncate(dice.randrange(1 << 20, 4 << 20))
    host.scribble(dice, 15)
    host.vm.rotate()


def compacted(host: StoredHost) -> bool:
    return Compactor().relieve(spool.list_cycles(host.folder), soft_limit=0) is not None


def assert_ships(host: StoredHost) -> None:
    """All that waits, and what is written now, becomes a point that equals the disks."""
    host.scribble(random.Random(77), 10)
    report = host.shipper().cycle_now()
    assert host.at(report.point) == host.images()
    assert report.notes == (), "no resynchronisation"
    assert not [name for name in os.listdir(host.folder) if name.endswith(".hrc") or ".c." in name]


def test_what_was_compacted_arrives_and_the_next_cycles_continue_it(host):
    assert compacted(host)
    was = host.images()
    write_and_rotate(host, 9)
    assert_ships(host)
    points = host.replica.points()
    assert any(host.at(point.id) == was for point in points)
    assert len(points) == 5, "the first, the compacted one, two for a resize and a rotation, and the last"


def test_the_tracker_counts_again_what_waits(host):
    before = host.vm._budget.sealed
    assert compacted(host)
    host.vm.release(host.vm._generation, 0)
    assert 0 < host.vm._budget.sealed < before


@pytest.mark.parametrize("cleanly", [True, False])
def test_a_new_attachment_continues_after_a_compaction(host, cleanly):
    compacted(host)
    host.scribble(random.Random(5), 10)
    host.listener.close()
    (host.vm.detach if cleanly else host.vm.close)()
    compacted(host)
    host.attach()
    assert_ships(host)


def test_a_compacted_companion_that_is_ahead_of_the_trackers_state_is_taken_up(host, tmp_path):
    before = {name: os.path.join(host.folder, spool.state_name(name)) for name in host.vm.disks}
    for name, path in before.items():
        shutil.copy(path, tmp_path / name)
    host.scribble(random.Random(5), 10)
    host.vm.rotate()
    host.listener.close()
    host.vm.close()
    for name, path in before.items():
        shutil.copy(tmp_path / name, path)
    assert compacted(host)
    host.attach()
    assert host.vm.resync_reason is None
    assert_ships(host)


@pytest.mark.parametrize("at", ["hrl:sync", "compact:companion:rename", "compact:companion:directory", "spool:release"])
def test_logs_that_are_lost_during_a_compaction_are_marked_and_nothing_more_is(host, at):
    done = False

    def lose(label: str, call: str, size: int) -> None:
        nonlocal done
        if label == at and not done:
            done = True
            host.lose_logs()

    system.install(lose)
    try:
        with contextlib.suppress(HvfuseError, OSError):  # it may notice or not
            compacted(host)
    finally:
        system.install(None)
    assert done
    assert host.vm.status()["resync_scope"] == "regions"
    host.scribble(random.Random(6), 10)
    report = host.shipper().cycle_now()
    assert host.at(report.point) == host.images()


def test_logs_that_are_compacted_while_the_tracker_marks_what_they_hold_are_marked_all_the_same(host, monkeypatch):
    listed = spool.list_logs

    def list_and_compact(folder: str) -> list[spool.SealedLog]:
        found = listed(folder)
        monkeypatch.setattr(spool, "list_logs", listed)
        assert compacted(host)
        return found

    monkeypatch.setattr(spool, "list_logs", list_and_compact)
    host.lose_logs()
    assert host.vm.status()["resync_scope"] == "regions"
    report = host.shipper().cycle_now()
    assert host.at(report.point) == host.images()
