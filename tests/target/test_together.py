"""Readers, writers and merges of one store at the same time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hvfuse import system
from hvfuse.errors import NotFoundError
from hvfuse.target import index, journal, merge
from hvfuse.target.check import check
from hvfuse.target.journal import PointReader
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store
from tests.target.model import Source, check_points

LATEST_ONLY = RetentionPolicy(keep_all_seconds=0, hourly=0)

SHIPPER = """
import sys
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store
from tests.target.model import Source, check_points
path, vm, seed = sys.argv[1:]
source = Source(vm, {"a.raw": 100_000}, seed=int(seed))
with Store(path, map_size=64 << 10) as store:
    replica = LocalReplica(store, vm)
    source.copy_to(replica)
    for number in range(12):
        source.write("a.raw", 5000 * number, source.random.randbytes(30_000))
        source.ship_to(replica)
        replica.housekeep(RetentionPolicy(keep_all_seconds=120, hourly=0), source.now_ns)
    check_points(store, source)
    assert store.vm(vm).base_seq > 5
"""


def test_several_processes_ship_merge_and_read_in_one_store(tmp_path):
    path = str(tmp_path / "store")
    Store(path, map_size=64 << 10).close()
    shippers = [
        subprocess.Popen(
            [sys.executable, "-c", SHIPPER, path, f"vm{number}", str(number)],
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        for number in range(3)
    ]
    with Store(path, map_size=64 << 10) as store:
        while any(shipper.poll() is None for shipper in shippers):
            for vm in store.vms():
                store.points(vm.name)
            assert check(store).findings == ()
        assert [shipper.returncode for shipper in shippers] == [0, 0, 0]
        assert [len(store.points(vm.name)) for vm in store.vms()] == [4, 4, 4]


@pytest.fixture
def story(tmp_path):
    """A store with five points over each other, one of them after a new whole copy."""
    source = Source("vm", {"a.raw": 40_000, "b.raw": 500})
    with Store(str(tmp_path / "store")) as store:
        replica = LocalReplica(store, "vm")
        source.write("a.raw", 0, source.random.randbytes(20_000))
        source.copy_to(replica)
        for number in range(5):
            if number == 3:
                source.zero("a.raw", 0, 8000)
                source.copy_to(replica)
            source.write("a.raw", 3000 * number, source.random.randbytes(9000))
            source.zero("a.raw", 15_000, 5000)
            source.resize("b.raw", 500 - number)
            source.ship_to(replica)
        yield store, source, replica
        system.install(None)


def test_a_reader_in_the_middle_of_a_merge_reads_what_was_there_or_says_that_it_is_gone(story):
    """At every step that a merge of all but the newest point takes."""
    store, source, replica = story
    points = [point.id for point in store.points("vm")]
    warm = {point: PointReader(store, "vm", point) for point in points}
    for point, reader in warm.items():
        assert reader.pread("a.raw", 0, 40_000) == source.history[point]["a.raw"]
    seen: set[tuple[str, bool]] = set()

    def reads(reader: PointReader) -> bool:
        """Whether everything could be read; it is right then."""
        try:
            for name, data in source.history[reader.point.id].items():
                assert reader.pread(name, 0, len(data)) == data, reader.point.id
                rest = bytearray(data)
                for low, high in reader.extents(name, 0, len(data)):
                    rest[low:high] = bytes(high - low)
                assert not any(rest)
        except NotFoundError:
            return False
        return True

    def injector(label: str, call: str, size: int) -> int | None:
        if label.endswith(":before"):  # in the middle of a transaction
            return None
        system.install(None)
        for point in points:
            seen.add((point, reads(warm[point])))
            try:
                cold = PointReader(store, "vm", point)
            except NotFoundError:
                continue
            reads(cold)
            cold.close()
        system.install(injector)
        return None

    system.install(injector)
    replica.housekeep(LATEST_ONLY, source.now_ns)
    system.install(None)
    assert {point for point, could in seen if could} == set(points)
    assert {point for point, could in seen if not could} == set(points[:-1])
    check_points(store, source)


def test_pinned_in_the_middle_of_thinning_a_point_stays_whole(story):
    """A pin comes before the merge is announced, or too late; there is nothing between."""
    store, source, replica = story
    first, second, *_ = [point.id for point in store.points("vm")]
    pinned = []

    def injector(label: str, call: str, size: int) -> int | None:
        if label == "store:thin:after":
            system.install(None)
            with pytest.raises(NotFoundError):
                store.pin("vm", first, {})
            pinned.append(store.pin("vm", second, {}))
            system.install(injector)
        return None

    store.pin("vm", second, {})
    system.install(injector)
    replica.housekeep(LATEST_ONLY, source.now_ns)
    system.install(None)
    assert pinned
    assert store.points("vm")[0].id == second
    check_points(store, source)


def test_what_a_reader_knows_of_long_zeroes_does_not_hide_what_was_merged_since(tmp_path, monkeypatch):
    for module in (index, journal, merge):
        monkeypatch.setattr(module, "REGION", 4096)
    source = Source("vm", {"a.raw": 40_000})
    source.write("a.raw", 0, source.random.randbytes(40_000))
    with Store(str(tmp_path / "store")) as store:
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        source.zero("a.raw", 0, 39_000)
        source.ship_to(replica)
        source.write("a.raw", 20_000, b"newer")
        point = source.ship_to(replica)
        reader = PointReader(store, "vm", point)
        assert reader.pread("a.raw", 0, 10) == bytes(10)
        replica.housekeep(LATEST_ONLY, source.now_ns)
        assert reader.pread("a.raw", 20_000, 5) == b"newer"
        assert reader.pread("a.raw", 0, 40_000) == source.disks["a.raw"]
        reader.close()
