"""Cycles go into a local store, and recovery points come out of it."""

from __future__ import annotations

import pytest

from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.target.model import Source, check_points


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store")) as store:
        yield store


def filled(vm="web01", sizes=None, *, seed=1) -> Source:
    """A source whose disks hold something."""
    source = Source(vm, sizes or {"os.raw": 50_000, "data.raw": 20_000}, seed=seed)
    for name, data in source.disks.items():
        source.write(name, 0, source.random.randbytes(len(data) // 2))
    return source


def test_a_cycle_after_the_first_copy_is_a_point_that_equals_the_disks(store):
    source, replica = filled(), LocalReplica(store, "web01")
    assert replica.position() is None
    source.copy_to(replica)
    assert replica.position() == source.position
    assert replica.points() == ()
    source.write("os.raw", 40_000, b"x" * 5000)
    source.zero("data.raw", 10, 5000)
    source.ship_to(replica)
    source.write("os.raw", 41_000, b"y" * 100)
    source.ship_to(replica)
    assert len(replica.points()) == 2
    check_points(store, source)
