"""Reading recovery points: what is covered, what is not, what is damaged."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hvfuse.errors import CorruptError, NotFoundError
from hvfuse.frames import Fill
from hvfuse.target import schema
from hvfuse.target.check import check
from hvfuse.target.index import Layer, enter, resolve
from hvfuse.target.journal import PointReader
from hvfuse.target.kept import ByteLru
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store
from tests.target.model import Source, check_points, contents

MIB = 1 << 20
REGION = schema.REGION


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store")) as store:
        yield store


@pytest.fixture
def source():
    return Source("vm", {"a.raw": 30_000, "b.raw": 9_000}, seed=3)


@pytest.fixture
def replica(store, source):
    source.write("a.raw", 0, source.random.randbytes(30_000))
    replica = LocalReplica(store, "vm")
    source.copy_to(replica)
    return replica


def change(store: Store, database: bytes, key: bytes, value: bytes | None) -> None:
    """Put or delete a value behind the store's back."""

    def act(txn):
        db = store.env.db(database)
        return txn.delete(key, db=db) if value is None else txn.put(key, value, db=db)

    store.env.write("test", act)


def stored(store: Store, database: bytes) -> list[tuple[bytes, bytes]]:
    with store.env.read() as txn:
        return list(txn.cursor(db=store.env.db(database)))


def test_reads_end_at_the_disks_end_at_that_point(store, source, replica):
    small = source.ship_to(replica)
    source.resize("a.raw", 50_000)
    large = source.ship_to(replica)
    for point, size in ((small, 30_000), (large, 50_000)):
        reader = PointReader(store, "vm", point)
        assert len(reader.pread("a.raw", size - 10, 100)) == 10
        assert reader.pread("a.raw", size, 100) == b""
        assert reader.pread("a.raw", 5, 0) == b""
        assert reader.pread("a.raw", -5, 10) == b""
        assert {disk.name: disk.size for disk in reader.disks}["a.raw"] == size
        reader.close()


def test_what_a_shrink_cut_off_does_not_come_back(store, source, replica):
    source.resize("a.raw", 100)
    source.ship_to(replica)
    source.resize("a.raw", 30_000)
    source.ship_to(replica)
    check_points(store, source)


def test_an_unknown_point_disk_or_vm_is_not_found(store, source, replica):
    point = source.ship_to(replica)
    with pytest.raises(NotFoundError, match="'nope'"):
        PointReader(store, "vm", "nope")
    with pytest.raises(NotFoundError, match="'nope'"):
        PointReader(store, "nope", point)
    with pytest.raises(NotFoundError, match="'nope'"):
        PointReader(store, "vm", point).pread("nope", 0, 1)
    with pytest.raises(NotFoundError, match="has no recovery point 'x"):
        PointReader(store, "vm", "x" * 1000)
    with pytest.raises(NotFoundError):
        store.vm("x" * 1000)


def test_extents_leave_out_what_is_zero_for_sure(store):
    source = Source("vm", {"a.raw": 3 * REGION})
    replica = LocalReplica(store, "vm")
    source.write("a.raw", REGION + MIB, b"x" * MIB)
    source.copy_to(replica)
    source.write("a.raw", REGION - 4096, b"y" * 8192)
    source.zero("a.raw", REGION + MIB, MIB // 2)
    reader = PointReader(store, "vm", source.ship_to(replica))
    found = list(reader.extents("a.raw", 0, 3 * REGION))
    assert found[0] == (REGION - 4096, REGION + 4096)
    assert sum(end - start for start, end in found) < 8192 + MIB // 2 + 4 * 4096  # images have blocks
    assert found[-1][0] == REGION + MIB + MIB // 2
    assert found[-1][1] >= REGION + 2 * MIB
    assert list(reader.extents("a.raw", REGION, REGION + 10)) == [(REGION, REGION + 10)]
    assert list(reader.extents("a.raw", 2 * REGION, 9 * REGION)) == []
    reader.close()


def test_zeroes_over_a_whole_large_disk_take_one_entry_of_the_index(store):
    source = Source("vm", {"a.raw": 40_000})
    replica = LocalReplica(store, "vm")
    source.copy_to(replica)
    source.disks["a.raw"] = Large(1 << 40)
    source.changes["a.raw"] = [(0, 1 << 40, None)]
    source.cycle += 1
    extents = {"a.raw": [(0, 1 << 40, None)]}
    manifest = source.manifest(schema.CycleKind.DELTA, previous=source.position)
    replica.begin(manifest)
    for frame in source.frames(extents):
        replica.put(frame)
    point = replica.commit(manifest, 1)
    assert (len(stored(store, b"wide")), stored(store, b"index")) == (1, [])
    reader = PointReader(store, "vm", point.id)
    assert reader.pread("a.raw", (1 << 40) - 5, 100) == bytes(5)
    assert reader.pread("a.raw", 77, 100) == bytes(100)
    reader.close()
    replica.housekeep(RetentionPolicy(keep_all_seconds=0, hourly=0), 0)
    assert check(store).findings == ()


class Large(bytearray):
    """A disk of which only the length counts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize("byte", [0, 30, 127, 128, 150, -1])
def test_a_damaged_frame_is_named_and_only_what_depends_on_it_is_refused(store, source, replica, byte):
    good = source.ship_to(replica)
    source.write("a.raw", 1000, source.random.randbytes(500))
    source.write("a.raw", 9000, source.random.randbytes(500))
    source.write("a.raw", 20_000, source.random.randbytes(500))
    bad = source.ship_to(replica)
    key, raw = stored(store, b"frames")[0]
    damaged = bytearray(raw)
    damaged[byte] ^= 4
    change(store, b"frames", key, bytes(damaged))
    (finding,) = check(store).findings
    assert f"frame 0 of point {bad}" in str(finding)
    assert contents(store, "vm", good) == source.history[good]
    reader = PointReader(store, "vm", bad)
    with pytest.raises(CorruptError, match=f"vm: point {bad}: frame 0 of"):
        reader.pread("a.raw", 1000, 10)
    expected = source.history[bad]["a.raw"]
    assert reader.pread("a.raw", 20_000, 500) == expected[20_000:20_500]
    assert reader.pread("a.raw", 0, 1000) == expected[:1000]
    assert reader.pread("b.raw", 0, 9000) == source.history[bad]["b.raw"]
    reader.close()
    with pytest.raises(CorruptError, match="frame 0"):
        replica.housekeep(RetentionPolicy(keep_all_seconds=0, hourly=0), source.now_ns)
    assert replica.points()[-1].id == bad


def test_every_value_with_a_flipped_bit_is_found(store, source, replica):
    first = source.ship_to(replica)
    source.write("a.raw", 1000, source.random.randbytes(500))
    source.ship_to(replica)
    store.pin("vm", first, {})
    dice = random.Random(1)
    for database in (b"vms", b"points", b"point-ids", b"frames", b"placements", b"index", b"pins"):
        for key, raw in stored(store, database):
            damaged = bytearray(raw)
            damaged[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
            change(store, database, key, bytes(damaged))
            assert check(store).findings, (database, key)
            change(store, database, key, raw)
            assert check(store).findings == ()


@pytest.mark.parametrize("database", [b"points", b"point-ids", b"frames", b"placements", b"index"])
def test_every_value_that_is_missing_is_found(store, source, replica, database):
    source.write("a.raw", 1000, source.random.randbytes(500))
    source.ship_to(replica)
    for key, raw in stored(store, database):
        change(store, database, key, None)
        assert check(store).findings, key
        change(store, database, key, raw)
    assert check(store).findings == ()


def test_a_missing_frame_is_no_endless_search(store, source, replica):
    source.write("a.raw", 1000, source.random.randbytes(500))
    point = source.ship_to(replica)
    change(store, b"frames", stored(store, b"frames")[0][0], None)
    with pytest.raises(CorruptError, match="a frame is missing"):
        contents(store, "vm", point)


def test_an_image_that_was_cut_is_found(store, source, replica):
    source.ship_to(replica)
    with open(store.image_path("vm", "a.raw"), "r+b") as image:
        image.truncate(5)
    (finding,) = check(store).findings
    assert "a.raw has 5 bytes, the disk 30000" in str(finding)


def test_frames_are_entered_in_every_region_they_touch_and_resolve_to_what_was_written(monkeypatch):
    monkeypatch.setattr("hvfuse.target.index.REGION", 100)
    source = Source("vm", {"a": 2000})
    source.generation = bytes(16)
    (raw,) = source.frames({"a": [(0, 5, b"A" * 5), (90, 30, b"B" * 30), (150, 600, None)]}, per_frame=9)
    from hvfuse.frames import decode

    frame = decode(raw)
    entered = enter(frame)
    assert entered.regions.tolist() == [0, 1]
    assert [part["offset"].tolist() for part in np.split(entered.entries, entered.bounds[1:-1])] == [[0, 90], [90]]
    assert entered.wide["offset"].tolist() == [150]
    assert entered.data_end == 120
    ones = Layer(entered.entries[2:], np.array([4]), np.array([0]))
    wide = Layer(entered.wide, np.array([3]), np.array([0]))
    found = resolve(ones, wide, start=100, end=200)
    assert list(zip(found.starts.tolist(), found.ends.tolist(), found.kinds.tolist(), strict=True)) == [
        (100, 120, Fill.DATA), (150, 200, Fill.ZERO),
    ]  # fmt: skip
    assert found.positions[0] == 5 + 10


def test_keys_and_values_that_are_packed_together_are_those_packed_one_by_one():
    regions = np.array([0, 7, 2**32 - 1])
    entries = np.arange(5 * 6, dtype="<u4").view(schema.ENTRY_DTYPE)
    alone = [schema.index_key(3, 2**31, int(region), 2**63, 9) for region in regions]
    assert schema.index_keys(3, 2**31, regions, 2**63, 9) == alone == sorted(alone)
    parts = [entries[:1], entries[1:4], entries[4:]]
    assert schema.pack_each(entries, np.array([0, 1, 4, 5])) == [schema.pack_entries(part) for part in parts]
    assert schema.pack_each(entries[:0], np.array([0])) == schema.index_keys(3, 1, regions[:0], 1, 9) == []


def test_the_newer_of_a_wide_and_a_narrow_extent_wins():
    def layer(seq, offset, length, kind):
        entries = np.array([(offset, length, 0, kind)], schema.ENTRY_DTYPE)
        return Layer(entries, np.array([seq]), np.array([0]))

    narrow = layer(5, 10, 10, Fill.DATA)
    older, newer = layer(4, 0, 100, Fill.ZERO), layer(6, 0, 100, Fill.ZERO)
    assert resolve(narrow, older, start=0, end=50).kinds.tolist() == [Fill.ZERO, Fill.DATA, Fill.ZERO]
    assert resolve(narrow, newer, start=0, end=50).kinds.tolist() == [Fill.ZERO]


def test_what_was_used_longest_ago_goes_first():
    kept = ByteLru(10, len)
    kept.put("a", b"aaaa")
    kept.put("b", b"bbbb")
    assert kept.get("a") == b"aaaa"
    kept.put("c", b"cccc")
    assert kept.get("b") is None
    assert kept.get("a") == b"aaaa"
    kept.put("d", b"d" * 20)
    assert kept.get("d") == b"d" * 20
    assert kept.get("a") is None


def test_opening_a_point_of_thousands_looks_at_none_of_the_others(store, source, replica, monkeypatch):
    points = [source.ship_to(replica) for _ in range(30)]
    monkeypatch.setattr(Store, "scan_cycles", None)
    reader = PointReader(store, "vm", points[7])
    assert reader.pread("b.raw", 0, 5) == source.history[points[7]]["b.raw"][:5]
    reader.close()
