"""The store's digests are those of the newest committed state, and a copy of differences lies over it."""

from __future__ import annotations

import dataclasses
import os
import random
import tempfile
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hvfuse.errors import HvfuseError, ResyncRequiredError
from hvfuse.extent import Extent
from hvfuse.formats.digests import BLOCK, Algorithm, DigestKey, digest_blocks, summary, zero_digests
from hvfuse.frames import EXTENT_DTYPE, FrameWriter
from hvfuse.manifest import CycleKind
from hvfuse.reconcile import plan
from hvfuse.target import digests, index, journal, merge, schema
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


# What is occupied, and summaries

SMALL = {"REGION": BLOCK + BLOCK // 2, "SPAN": 2 * BLOCK}
END = 7 * BLOCK + 77
CHANGES = st.tuples(
    st.sampled_from(["write", "write", "zero", "resize", "cycle", "cycle", "copy", "merge"]),
    st.integers(0, END) | st.integers(0, 8).map(lambda block: block * BLOCK),
    st.integers(1, 9000) | st.integers(1, END),
)


@pytest.fixture
def small_regions(monkeypatch):
    """So that extents cross regions, long zeroes are wide, and a disk has several spans."""
    for module in (index, journal, merge, schema, digests):
        monkeypatch.setattr(module, "REGION", SMALL["REGION"])
    monkeypatch.setattr(journal, "_SCAN_REGIONS", 3)
    monkeypatch.setattr(journal, "_SCAN_RANGES", 2)
    monkeypatch.setattr(digests, "READ_SPAN", BLOCK)
    monkeypatch.setattr(digests, "KEPT_SPANS", 3)
    monkeypatch.setattr(digests, "KEPT_REGIONS", 2)
    monkeypatch.setattr(plan, "SPAN", SMALL["SPAN"])


def happen(source: Source, replica: LocalReplica, changes) -> None:
    for kind, at, upto in changes:
        offset = min(at, len(source.disks["a.raw"]))
        length = min(upto, len(source.disks["a.raw"]) - offset)
        if kind == "write" and length:
            source.write("a.raw", offset, source.random.randbytes(length))
        elif kind == "zero" and length:
            source.zero("a.raw", offset, length)
        elif kind == "resize":
            source.resize("a.raw", offset)
        elif kind == "cycle":
            source.ship_to(replica)
        elif kind == "copy":
            source.copy_to(replica)
        elif kind == "merge":
            replica.housekeep(RetentionPolicy(keep_all_seconds=0, hourly=0), source.now_ns)


# Several examples share the patched modules, which is what is wanted.
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(CHANGES, max_size=14), last=st.sampled_from(["cycle", "copy"]), merged=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@example(changes=[("write", 0, END), ("cycle", 0, 1), ("zero", 0, END)], last="cycle", merged=False, seed=0)
@example(changes=[("zero", 0, END), ("cycle", 0, 1), ("write", 0, 9000)], last="cycle", merged=True, seed=0)
def test_no_byte_but_zero_is_missed_and_summaries_are_of_the_digests(small_regions, changes, last, merged, seed):
    source = Source("web01", {"a.raw": END}, seed=seed)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder,
        Store(folder) as store,
    ):
        replica = LocalReplica(store, "web01")
        source.write("a.raw", BLOCK, source.random.randbytes(BLOCK))
        source.copy_to(replica)
        happen(source, replica, [*changes, (last, 0, 1)])
        state = bytes(source.disks["a.raw"]).ljust(9 * BLOCK, b"\0")
        open_copy(source, replica)
        if merged:
            assert_occupied(replica, source.ids["a.raw"], state, random.Random(seed))
            happen(source, LocalReplica(store, "web01"), [("merge", 0, 1)])
        assert_occupied(replica, source.ids["a.raw"], state, random.Random(seed))
        assert_summaries(replica, source.ids["a.raw"], state, random.Random(seed))
        replica.close()


def assert_occupied(replica: LocalReplica, disk_id: bytes, state: bytes, dice: random.Random) -> None:
    bounds = [(0, len(state)), (0, 0), *(sorted(dice.choices(range(len(state) + 1), k=2)) for _ in range(6))]
    for low, high in bounds:
        rest, at = bytearray(state[low:high]), low
        for extent in replica.occupied(disk_id, low, high):
            assert at <= extent.offset < extent.end <= high
            assert extent.offset > at or at == low
            at = extent.end
            rest[extent.offset - low : extent.end - low] = bytes(extent.length)
        assert not any(rest)


def assert_summaries(replica: LocalReplica, disk_id: bytes, state: bytes, dice: random.Random) -> None:
    for algorithm in Algorithm:
        key = DigestKey.fresh(algorithm)
        expected = digest_blocks(state, key)
        for _ in range(2):
            blocks = sorted(dice.sample(range(9), k=dice.randrange(1, 9)))
            extents = [extent for span in plan.spans(runs(blocks)) for extent in span]
            for act in dice.sample(["summaries", "digests"], 2):
                if act == "digests":
                    assert np.array_equal(replica.digests(disk_id, runs(blocks), key), expected[blocks])
                else:
                    ours = [summary(expected[e.offset // BLOCK : e.end // BLOCK], key) for e in extents]
                    assert np.array_equal(replica.summaries(disk_id, extents, key), np.array(ours))


def runs(blocks: list[int]) -> list[Extent]:
    """The extents of ascending blocks, neighbours joined."""
    edges = [at for at in range(len(blocks)) if at == 0 or blocks[at] != blocks[at - 1] + 1]
    return [
        Extent(blocks[first] * BLOCK, (stop - first) * BLOCK)
        for first, stop in zip(edges, [*edges[1:], len(blocks)], strict=True)
    ]


def test_a_hole_of_any_size_is_not_occupied_and_takes_no_reading(store, monkeypatch):
    source, replica = Source("web01", {"a.raw": 100}), LocalReplica(store, "web01")
    source.copy_to(replica)
    source.ship_to(replica)
    os.truncate(store.image_path("web01", "a.raw"), size := 8 << 40)
    source.generation, source.cycle = b"n" * 16, 0
    replica.begin(source.manifest(CycleKind.COPY, previous=source.position))
    reader = replica._blocks._reader
    reader._disks["a.raw"] = dataclasses.replace(reader._disks["a.raw"], size=size)
    monkeypatch.setattr(journal, "_read_image", None)
    assert replica.occupied(source.ids["a.raw"], 0, size) == []
    with open(store.image_path("web01", "a.raw"), "r+b") as image:
        os.pwrite(image.fileno(), b"x", 7 << 40)
    (found,) = replica.occupied(source.ids["a.raw"], 0, size)
    assert found.offset <= 7 << 40 < found.end < (7 << 40) + (1 << 20)


def test_digests_of_a_span_just_summed_up_are_not_read_again(site, monkeypatch):
    source, replica = site
    open_copy(source, replica)
    disk_id, whole = source.ids["a.raw"], Extent(0, 10 * BLOCK)
    expected = replica.digests(disk_id, [whole], KEY)
    replica.summaries(disk_id, [whole], KEY)
    monkeypatch.setattr(journal, "_read_image", None)
    monkeypatch.setattr(journal.CycleReader, "pread_into", None)
    assert np.array_equal(replica.digests(disk_id, [whole], KEY), expected)
    assert np.array_equal(replica.digests(disk_id, [Extent(3 * BLOCK, 4 * BLOCK)], KEY), expected[3:7])
    with pytest.raises(TypeError):  # another run's key: read after all
        replica.digests(disk_id, [whole], DigestKey.fresh())


def test_several_threads_are_told_the_same_while_frames_come_in_and_the_base_moves(store):
    source, replica = Source("web01", {"a.raw": 40 * BLOCK}), LocalReplica(store, "web01")
    source.write("a.raw", 0, random.Random(1).randbytes(40 * BLOCK))
    source.copy_to(replica)
    for seed in range(6):
        scribble(source, seed)
        source.ship_to(replica)
    open_copy(source, replica)
    disk_id, extents = source.ids["a.raw"], [Extent(at * BLOCK, 4 * BLOCK) for at in range(0, 40, 4)]
    blocks = digest_blocks(bytes(source.disks["a.raw"]), KEY)
    expected = np.array([summary(blocks[at : at + 4], KEY) for at in range(0, 40, 4)])
    wrong: list[str] = []
    done = threading.Event()

    def ask(number: int) -> None:
        while not done.is_set():
            try:
                replica._blocks._kept.clear()
                if not np.array_equal(replica.summaries(disk_id, extents[number::2], KEY), expected[number::2]):
                    wrong.append("summaries")
                if not np.array_equal(replica.digests(disk_id, [Extent(0, 40 * BLOCK)], KEY), blocks):
                    wrong.append("digests")
            except BaseException as error:
                wrong.append(repr(error))
                return

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for asker in askers:
        asker.start()
    frames = source.frames({"a.raw": [(at * 3000, 3000, b"z" * 3000) for at in range(100)]})
    keeper = LocalReplica(store, "web01")
    for number, frame in enumerate(frames):
        replica.put(frame)
        if number % 10 == 0:
            seqs = [seq for seq, _ in listed(store)]
            merge.merge(store, "web01", min(seqs) + number // 10)
            keeper.housekeep(RetentionPolicy(keep_all_seconds=30 * (6 - number // 10), hourly=0), source.now_ns)
    done.set()
    for asker in askers:
        asker.join()
    assert wrong == []
    assert store.vm("web01").base_seq > 1


def listed(store: Store) -> list[tuple[int, int]]:
    with store.env.read() as txn:
        return store.listed(txn, store.load_vm(txn, "web01"))
