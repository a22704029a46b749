"""Which recovery point a user means."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from hvfuse.consistency import Consistency
from hvfuse.control.trial import choose, find_point, parse_id
from hvfuse.errors import NotFoundError, UsageError
from hvfuse.manifest import RecoveryPoint
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.target.model import Source


def point(cycle: int, moment: str, ms: int = 0) -> RecoveryPoint:
    return RecoveryPoint(
        id=f"ab-{cycle}", vm="vm", generation=bytes(16), cycle=cycle, consistency=Consistency.CRASH, disks=(),
        stored_bytes=0, time_ns=int(datetime.fromisoformat(moment).timestamp()) * 10**9 + ms * 10**6,
    )  # fmt: skip


POINTS = [point(1, "2026-03-01T10:00:00Z"), point(2, "2026-03-01T10:00:30Z", 700), point(3, "2026-03-01T11:00:00Z")]


def test_the_newest_point_and_one_with_an_id_are_found_without_the_others(tmp_path, monkeypatch) -> None:
    source = Source("vm", {"a.raw": 10_000})
    with Store(str(tmp_path / "store")) as store:
        with pytest.raises(NotFoundError, match="no VM"):
            find_point(store, "vm", "latest")
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        with pytest.raises(NotFoundError, match="no recovery point yet"):
            find_point(store, "vm", "latest")
        ids = [source.ship_to(replica) for _ in range(3)]
        assert find_point(store, "vm", "2100-01-01").id == ids[-1]
        with pytest.raises(NotFoundError, match="no recovery point nonsense"):
            find_point(store, "vm", "nonsense")
        monkeypatch.setattr(Store, "points", None)
        assert find_point(store, "vm", "latest").id == ids[-1]
        assert [find_point(store, "vm", each).id for each in ids] == ids


@pytest.mark.parametrize(
    ("wanted", "cycle"),
    [
        ("latest", 3),
        ("ab-1", 1),
        ("2026-03-01T10:00:00Z", 1),
        ("2026-03-01T10:00:29+00:00", 1),
        ("2026-03-01T10:00:30Z", 2),
        ("2026-03-01T10:00:30.699Z", 1),
        ("2026-03-01T10:00:30.000Z", 1),
        ("2026-03-01T10:00:30.700Z", 2),
        ("2026-03-01 12:59+02:00", 2),
        ("2030-01-01", 3),
    ],
)
def test_a_point_is_named_by_latest_id_or_time(wanted: str, cycle: int) -> None:
    assert choose(POINTS, wanted, vm="vm").cycle == cycle


def test_a_time_without_a_zone_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC-3")
    time.tzset()
    try:
        assert choose(POINTS, "2026-03-01T13:00:10", vm="vm").cycle == 1
    finally:
        monkeypatch.undo()
        time.tzset()
    assert datetime.fromtimestamp(0, UTC).hour == 0


@pytest.mark.parametrize("wanted", ["2026-03-01T09:59:59Z", "ab-9", "", "latest ", "ab-", "yesterday"])
def test_what_names_no_point_is_not_found(wanted: str) -> None:
    with pytest.raises(NotFoundError):
        choose(POINTS, wanted, vm="vm")


def test_without_points_even_the_latest_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="no recovery point yet"):
        choose([], "latest", vm="vm")


def test_an_id_is_a_number() -> None:
    assert parse_id("12") == 12
    for text in ("", "-1", "1.5", "x"):
        with pytest.raises(UsageError):
            parse_id(text)


def test_the_latest_application_consistent_point_is_found_by_that_name() -> None:
    kinds = (Consistency.APPLICATION, Consistency.APPLICATION, Consistency.CRASH)
    points = [replace(each, consistency=kind) for each, kind in zip(POINTS, kinds, strict=True)]
    assert choose(points, "latest-app-consistent", vm="vm").cycle == 2
    assert choose(points, "latest", vm="vm").cycle == 3
    with pytest.raises(NotFoundError, match="no application-consistent"):
        choose(points[2:], "latest-app-consistent", vm="vm")
