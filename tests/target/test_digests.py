"""The store's digests are those of the newest committed state, and a copy of differences lies over it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hvfuse.errors import HvfuseError, ResyncRequiredError
from hvfuse.extent import Extent
from hvfuse.formats.digests import BLOCK, Algorithm, DigestKey, digest_blocks, zero_digests
from hvfuse.frames import EXTENT_DTYPE, FrameWriter
from hvfuse.manifest import CycleKind
from hvfuse.target import schema
from hvfuse.target.check import check
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store
from tests.target.model import Source, check_points, contents, send

KEY = DigestKey(Algorithm.XXH3, 0x123456789ABCDEF)
SIZES = {"a.raw": 9 * BLOCK + 77, "b.raw": 100}


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store")) as store:
        yield store


@pytest.fixture
def site(store) -> tuple[Source, LocalReplica]:
    """A VM with a copy and three points."""
    source, replica = Source("web01", SIZES, seed=1), LocalReplica(store, "web01")
    source.write("a.raw", 5, random.Random(1).randbytes(3 * BLOCK))
    source.copy_to(replica)
    for seed in range(3):
        scribble(source, seed)
        source.ship_to(replica)
    return source, replica


def scribble(source: Source, seed: int) -> None:
    dice = random.Random(seed)
    for name, disk in source.disks.items():
        for _ in range(3):
            offset = dice.randrange(len(disk))
            length = min(dice.randrange(1, 2 * BLOCK), len(disk) - offset)
            if dice.randrange(3):
                source.write(name, offset, dice.randbytes(length))
            else:
                source.zero(name, offset, length)


def open_copy(source: Source, replica: LocalReplica):
    """Begin a copy of differences. Returns its manifest."""
    source.generation, source.cycle = source.random.randbytes(16), 0
    manifest = source.manifest(CycleKind.COPY, previous=source.position)
    replica.begin(manifest)
    return manifest


def assert_digests(source: Source, replica: LocalReplica) -> None:
    for name, data in source.disks.items():
        whole = Extent(0, 12 * BLOCK)
        expected = digest_blocks(bytes(data).ljust(whole.length, b"\0"), KEY)
        assert np.array_equal(replica.digests(source.ids[name], [whole], KEY), expected)
        some = [Extent(2 * BLOCK, BLOCK), Extent(4 * BLOCK, 3 * BLOCK)]
        assert np.array_equal(replica.digests(source.ids[name], some, KEY), expected[[2, 4, 5, 6]])
        assert replica.extent(source.ids[name]) == len(data)


@pytest.mark.parametrize("merged", [False, True])
def test_digests_are_those_of_the_newest_cycle_from_journal_and_image_alike(site, merged):
    source, replica = site
    if merged:
        replica.housekeep(RetentionPolicy(keep_all_seconds=0, hourly=0), 2 << 60)
    open_copy(source, replica)
    assert_digests(source, replica)


def test_a_state_that_is_no_recovery_point_has_digests_too(store):
    source, replica = Source("web01", SIZES), LocalReplica(store, "web01")
    scribble(source, 1)
    source.copy_to(replica)
    open_copy(source, replica)
    assert_digests(source, replica)


def test_what_is_staged_is_not_seen_and_after_the_commit_it_is(site):
    source, replica = site
    manifest = open_copy(source, replica)
    was = bytes(source.disks["a.raw"])
    changed = random.Random(9).randbytes(BLOCK)
    (frame,) = source.frames({"a.raw": [(BLOCK, BLOCK, changed)]})
    replica.put(frame)
    assert_digests(source, replica)
    assert replica.commit(manifest, 1) is None
    source.end_copy(manifest)
    source.disks["a.raw"][BLOCK : 2 * BLOCK] = changed
    assert was != source.disks["a.raw"]
    open_copy(source, replica)
    assert_digests(source, replica)
    check_points(store_of(replica), source)


def test_a_copy_of_differences_may_bring_along_a_new_disk(site):
    source, replica = site
    source.disks["c.raw"], source.ids["c.raw"], source.changes["c.raw"] = bytearray(2 * BLOCK), b"c" * 16, []
    manifest = open_copy(source, replica)
    assert replica.extent(b"c" * 16) == 0
    assert np.array_equal(replica.digests(b"c" * 16, [Extent(0, 2 * BLOCK)], KEY), zero_digests(2, KEY))
    source.write("c.raw", 10, b"new")
    send(replica, manifest, source.frames({"c.raw": [(10, 3, b"new")]}))
    source.end_copy(manifest)
    point = source.ship_to(replica)
    check_points(store_of(replica), source)
    replica.housekeep(RetentionPolicy(keep_all_seconds=0, hourly=0), 2 << 60)
    assert contents(store_of(replica), "web01", point) == source.history[point]
    assert check(store_of(replica)).findings == ()


def test_a_cycle_with_a_disk_that_the_replica_does_not_know_is_refused(site):
    source, replica = site
    source.disks["c.raw"], source.ids["c.raw"], source.changes["c.raw"] = bytearray(100), b"c" * 16, []
    with pytest.raises(ResyncRequiredError, match=r"c\.raw"):
        source.ship_to(replica)


def test_frames_that_say_nothing_can_be_staged_and_committed(site):
    source, replica = site
    manifest = open_copy(source, replica)
    send(replica, manifest, source.frames({"a.raw": []}) or [empty_frame(source)])
    source.end_copy(manifest)
    source.ship_to(replica)
    check_points(store_of(replica), source)
    assert check(store_of(replica)).findings == ()


def empty_frame(source: Source) -> bytes:
    writer = FrameWriter(generation=source.generation, cycle=0)
    return writer.encode(disk_id=source.ids["a.raw"], number=0, table=np.zeros(0, EXTENT_DTYPE), data=[])


def test_what_a_disk_that_shrank_during_its_copy_left_behind_is_told(store):
    source, replica = Source("web01", {"a.raw": 4 * BLOCK}), LocalReplica(store, "web01")
    source.write("a.raw", 3 * BLOCK, b"left behind")
    manifest, frames = source.begin_copy()
    replica.begin(manifest)
    for frame in frames:
        replica.put(frame)
    source.resize("a.raw", BLOCK)
    manifest = source.manifest(CycleKind.COPY, previous=None)
    replica.commit(manifest, len(frames))
    source.end_copy(manifest)
    open_copy(source, replica)
    assert replica.extent(source.ids["a.raw"]) >= 3 * BLOCK + 11
    found = replica.digests(source.ids["a.raw"], [Extent(0, 4 * BLOCK)], KEY)
    assert not np.array_equal(found, zero_digests(4, KEY))


def test_blocks_of_a_damaged_frame_count_as_different_and_others_stay_as_they_are(site, caplog):
    source, replica = site
    store = store_of(replica)
    source.write("a.raw", 6 * BLOCK, random.Random(5).randbytes(BLOCK))
    source.ship_to(replica)
    vm = store.vm("web01")
    key = schema.frame_key(vm.id, vm.head_seq, 0)

    def damage(txn) -> None:
        raw = bytearray(txn.get(key, db=store.env.db(schema.FRAMES)))
        raw[-5] ^= 1
        txn.put(key, bytes(raw), db=store.env.db(schema.FRAMES))

    store.write("test", damage)
    open_copy(source, replica)
    expected = digest_blocks(bytes(source.disks["a.raw"]), KEY)
    found = replica.digests(source.ids["a.raw"], [Extent(0, 10 * BLOCK)], KEY)
    assert np.flatnonzero((found != expected).any(axis=1)).tolist() == [6]
    assert "counts as different" in caplog.text


def test_without_an_open_copy_of_differences_there_are_no_digests(site):
    source, replica = site
    with pytest.raises(HvfuseError, match="no copy"):
        replica.digests(source.ids["a.raw"], [Extent(0, BLOCK)], KEY)


def store_of(replica: LocalReplica) -> Store:
    return replica._store
