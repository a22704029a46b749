"""Cycles go into a local store, and recovery points come out of it."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

from hvfuse.errors import BusyError, CorruptError, HvfuseError, NotFoundError, ResyncRequiredError
from hvfuse.frames import EXTENT_DTYPE, MAX_PLAIN, Fill, FrameWriter
from hvfuse.manifest import CycleKind, DiskManifest
from hvfuse.position import PositionMismatchError
from hvfuse.target.check import check
from hvfuse.target.journal import PointReader
from hvfuse.target.local import WAITING_PERIOD, IncompleteCycleError, LocalReplica
from hvfuse.target.merge import merge
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store, holder_is_alive
from tests.target.clock import Hand
from tests.target.model import SECOND, Source, check_points, contents, send

LATEST_ONLY = RetentionPolicy(keep_all_seconds=0, hourly=0)


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store")) as store:
        yield store


@pytest.fixture
def replica(store):
    replica = LocalReplica(store, "web01")
    yield replica
    replica.close()


@pytest.fixture
def source():
    """A source whose disks hold something."""
    source = Source("web01", {"os.raw": 50_000, "data.raw": 20_000}, seed=1)
    for name, data in source.disks.items():
        source.write(name, 0, source.random.randbytes(len(data) // 2))
    return source


def everything(store: Store) -> list[tuple[bytes, bytes, bytes]]:
    """All that the database holds."""
    with store.env.read() as txn:
        return [
            (name, key, value) for name, database in store.env._db.items() for key, value in txn.cursor(db=database)
        ]


def test_a_cycle_after_the_first_copy_is_a_point_that_equals_the_disks(store, replica, source):
    assert replica.position() is None
    source.copy_to(replica)
    assert replica.position() == source.position
    assert replica.points() == ()
    source.write("os.raw", 40_000, b"x" * 5000)
    source.zero("data.raw", 10, 5000)
    source.ship_to(replica)
    source.write("os.raw", 41_000, b"y" * 100)
    source.ship_to(replica)
    assert [point.cycle for point in replica.points()] == [1, 2]
    assert store.point("web01") == replica.points()[-1]
    check_points(store, source)


def test_the_first_copy_is_in_the_images_and_not_in_the_journal(store, replica, source):
    source.copy_to(replica)
    for name, data in source.disks.items():
        with open(store.image_path("web01", name), "rb") as image:
            assert image.read() == data
    assert not [key for database, key, _ in everything(store) if database in (b"frames", b"held")]


def test_an_interrupted_first_copy_goes_on_without_what_is_held(store, source):
    manifest, frames = source.begin_copy()
    first = LocalReplica(store, "web01")
    assert first.begin(manifest) == frozenset()
    for frame in frames[:3]:
        first.put(frame)
    first.close()
    again = LocalReplica(store, "web01")
    assert again.position() is None
    held = again.begin(dataclasses.replace(manifest, sealed_ns=manifest.sealed_ns + 5))
    assert held == {0, 1, 2}
    for frame in frames[2:]:
        again.put(frame)
    assert again.commit(manifest, len(frames)) is None
    source.end_copy(manifest)
    source.ship_to(again)
    check_points(store, source)


def test_another_first_copy_begins_on_blank_images(store, replica, source):
    manifest, frames = source.begin_copy()
    replica.begin(manifest)
    for frame in frames:
        replica.put(frame)
    for name, data in source.disks.items():
        source.zero(name, 0, len(data))
        source.write(name, 100, b"new")
    source.copy_to(replica)
    source.ship_to(replica)
    check_points(store, source)


def test_a_first_copy_removes_the_images_of_disks_that_the_vm_has_no_more(store, replica):
    old = Source("web01", {"kept.raw": 5000, "gone.raw": 5000})
    old.copy_to(replica)
    strange = store.image_path("web01", "letters.txt")
    open(strange, "w").close()
    interrupted = Source("web01", {"kept.raw": 5000, "passing.raw": 5000})
    replica.begin(interrupted.begin_copy()[0])
    new = Source("web01", {"kept.raw": 5000, "new.raw": 5000}, seed=2)
    replica.begin(new.begin_copy()[0])
    assert os.path.exists(store.image_path("web01", "gone.raw"))
    new.copy_to(replica)
    assert sorted(os.listdir(store.replica_folder("web01"))) == ["kept.raw", "letters.txt", "new.raw"]
    new.ship_to(replica)
    check_points(store, new)
    assert check(store).findings == ()


def test_the_position_is_unknown_while_another_first_copy_is_under_way(replica, source):
    source.copy_to(replica)
    old = source.begin_cycle()[0]
    replica.begin(source.begin_copy()[0])
    assert replica.position() is None
    with pytest.raises(PositionMismatchError) as caught:
        replica.begin(old)
    assert caught.value.theirs is None


def test_a_disk_that_shrank_while_it_was_copied_keeps_what_the_next_cycle_still_needs(store, replica, source):
    manifest, frames = source.begin_copy()
    shrunk = dataclasses.replace(manifest, disks=tuple(dataclasses.replace(disk, size=1000) for disk in manifest.disks))
    replica.begin(manifest)
    for frame in frames:
        replica.put(frame)
    replica.commit(shrunk, len(frames))
    source.end_copy(manifest)
    source.ship_to(replica)
    for name in source.disks:
        source.resize(name, 1000)
    source.ship_to(replica)
    check_points(store, source)
    replica.housekeep(LATEST_ONLY, source.now_ns)
    check_points(store, source)
    assert os.path.getsize(store.image_path("web01", "os.raw")) == 1000


def test_points_stay_usable_while_and_after_a_whole_copy_comes_over_them(store, replica, source):
    source.copy_to(replica)
    source.ship_to(replica)
    for name, data in source.disks.items():
        source.zero(name, 0, len(data))  # a copy does not send zeroes, and there was something else
        source.write(name, 0, b"other")
    manifest, frames = source.begin_copy()
    replica.begin(manifest)
    for frame in frames:
        replica.put(frame)
    check_points(store, source)
    assert replica.commit(manifest, len(frames)) is None
    source.end_copy(manifest)
    assert len(replica.points()) == 1
    replica.housekeep(LATEST_ONLY, source.now_ns)
    check_points(store, source)
    source.ship_to(replica)
    assert len(replica.points()) == 2
    check_points(store, source)
    replica.housekeep(LATEST_ONLY, source.now_ns)
    assert len(replica.points()) == 1
    check_points(store, source)


def test_a_copy_that_continues_the_replica_lies_over_what_it_has(store, replica, source):
    source.copy_to(replica)
    source.ship_to(replica)
    source.write("os.raw", 5, b"difference")
    position, changes = source.position, source.coalesced()
    source.begin_copy()
    manifest = source.manifest(CycleKind.COPY, previous=position)
    send(replica, manifest, source.frames(changes))
    source.end_copy(manifest)
    source.ship_to(replica)
    check_points(store, source)


def test_a_disk_that_is_gone_after_a_copy_loses_its_image_with_the_last_point_that_has_it(store, replica, source):
    source.copy_to(replica)
    source.ship_to(replica)
    del source.disks["data.raw"]
    source.copy_to(replica)
    source.ship_to(replica)
    check_points(store, source)
    assert os.path.exists(store.image_path("web01", "data.raw"))
    replica.housekeep(LATEST_ONLY, source.now_ns)
    check_points(store, source)
    assert not os.path.exists(store.image_path("web01", "data.raw"))


def test_a_disk_without_a_copy_is_refused(replica, source):
    source.copy_to(replica)
    source.disks["late.raw"] = bytearray(100)
    source.ids["late.raw"] = bytes(16)
    source.changes["late.raw"] = []
    with pytest.raises(ResyncRequiredError, match=r"late\.raw"):
        source.ship_to(replica)


def test_a_cycle_that_does_not_continue_the_replica_is_told_where_that_stands(replica, source):
    source.copy_to(replica)
    manifest, _ = source.begin_cycle()
    elsewhere = dataclasses.replace(source.position, cycle=5)
    with pytest.raises(PositionMismatchError) as caught:
        replica.begin(dataclasses.replace(manifest, previous=elsewhere))
    assert caught.value.theirs == source.position


def test_nothing_of_an_open_cycle_is_seen_before_its_commit(store, replica, source):
    source.copy_to(replica)
    point = source.ship_to(replica)
    source.write("os.raw", 0, b"z" * 20_000)
    manifest, frames = source.begin_cycle()
    replica.begin(manifest)
    for frame in frames:
        replica.put(frame)
        assert [each.id for each in replica.points()] == [point]
        check_points(store, source)
    replica.commit(manifest, len(frames))
    assert len(replica.points()) == 2


def test_saying_everything_twice_changes_nothing(store, replica, source):
    source.copy_to(replica)
    source.write("os.raw", 0, b"z" * 20_000)
    manifest, frames = source.begin_cycle()
    replica.begin(manifest)
    for frame in [*frames, *frames]:
        replica.put(frame)
    assert replica.begin(manifest) == frozenset(range(len(frames)))  # those that waited, too
    staged = everything(store)
    for frame in frames:
        replica.put(frame)
    assert replica.begin(manifest) == frozenset(range(len(frames)))
    assert everything(store) == staged
    point = replica.commit(manifest, len(frames))
    committed = everything(store)
    assert replica.commit(manifest, len(frames)) == point
    assert replica.begin(manifest) == frozenset(range(len(frames)))
    for frame in frames:
        replica.put(frame)
    assert replica.commit(manifest, len(frames)) == point
    assert everything(store) == committed


def test_saying_a_committed_copy_again_changes_nothing(store, replica, source):
    manifest, frames = source.begin_copy()
    send(replica, manifest, frames)
    committed = everything(store)
    send(replica, manifest, frames)
    assert everything(store) == committed


def test_a_commit_without_all_frames_is_refused_and_can_be_made_up_for(store, replica, source):
    source.copy_to(replica)
    source.write("os.raw", 0, source.random.randbytes(100))
    source.write("os.raw", 300, source.random.randbytes(100))
    source.write("os.raw", 600, source.random.randbytes(100))
    manifest, frames = source.begin_cycle()
    assert len(frames) == 2
    replica.begin(manifest)
    replica.put(frames[1])
    for count in (2, 1):  # frame 0 is missing, whatever the count
        with pytest.raises(IncompleteCycleError) as caught:
            replica.commit(manifest, count)
        assert caught.value.recoverable
    assert replica.points() == ()
    replica.put(frames[0])
    point = replica.commit(manifest, 2)
    source.end_cycle(manifest, point.id)
    check_points(store, source)


def test_frames_staged_for_a_cycle_go_when_another_is_begun(store, replica, source):
    source.copy_to(replica)
    empty = everything(store)
    source.write("os.raw", 0, b"z" * 20_000)
    manifest, frames = source.begin_cycle()
    replica.begin(manifest)
    replica.put(frames[0])
    other = dataclasses.replace(manifest, cycle=manifest.cycle + 1)
    assert replica.begin(other) == frozenset()
    assert {database for database, *_ in set(everything(store)) - set(empty)} <= {b"staging", b"vms"}


def test_cycles_that_travelled_as_one_are_one_point(store, replica, source):
    source.copy_to(replica)
    source.write("os.raw", 0, b"z" * 200)
    source.cycle += 3
    source.ship_to(replica)
    assert [point.cycle for point in replica.points()] == [4]
    assert check(store).findings == ()


def test_a_second_process_that_begins_the_cycle_anew_puts_the_first_one_out(store, replica, source):
    source.copy_to(replica)
    source.write("os.raw", 0, b"z" * 200)
    manifest, frames = source.begin_cycle()
    replica.begin(manifest)
    LocalReplica(store, "web01").begin(dataclasses.replace(manifest, cycle=9))
    with pytest.raises(BusyError):
        replica.put(frames[0])


# Retention, pins


def test_the_latest_only_means_that_the_images_are_always_at_the_latest_point(store, replica, source):
    source.copy_to(replica)
    for number in range(5):
        source.write("os.raw", number * 1000, source.random.randbytes(3000))
        source.ship_to(replica)
        replica.housekeep(LATEST_ONLY, source.now_ns)
        assert len(replica.points()) == 1
        for name, data in source.disks.items():
            with open(store.image_path("web01", name), "rb") as image:
                assert image.read() == data
    assert not [key for database, key, _ in everything(store) if database in (b"frames", b"index")]


def test_merged_zeroes_are_holes(store, replica, source):
    source.write("os.raw", 0, b"x" * 40_960)
    source.copy_to(replica)
    source.zero("os.raw", 0, 40_960)
    source.ship_to(replica)
    replica.housekeep(LATEST_ONLY, source.now_ns)
    assert os.stat(store.image_path("web01", "os.raw")).st_blocks <= 2 * 8


def test_a_pin_holds_its_point_and_its_bytes(store, replica, source):
    source.copy_to(replica)
    first = source.ship_to(replica)
    pin = store.pin("web01", first, {"kind": "test-failover", "mountpoint": "/mnt/t"})
    for _ in range(3):
        source.write("os.raw", 0, source.random.randbytes(3000))
        source.ship_to(replica)
    replica.housekeep(LATEST_ONLY, source.now_ns)
    assert replica.points()[0].id == first
    assert len(replica.points()) == 2
    check_points(store, source)
    (held,) = store.pins("web01")
    assert (held.id, held.point_id, held.owner["mountpoint"]) == (pin, first, "/mnt/t")
    assert holder_is_alive(held)
    assert holder_is_alive(store.update_pin(pin, {"pid": 1}))
    assert not holder_is_alive(store.update_pin(pin, {"pid": 1, "process_start": 0}))
    store.unpin(pin)
    store.unpin(pin)
    replica.housekeep(LATEST_ONLY, source.now_ns)
    assert len(replica.points()) == 1
    with pytest.raises(NotFoundError, match=first):
        store.pin("web01", first, {})


def test_a_reader_of_a_point_that_was_let_go_says_so_instead_of_reading_something_else(store, replica, source):
    source.copy_to(replica)
    first = source.ship_to(replica)
    reader = PointReader(store, "web01", first)
    assert reader.pread("os.raw", 0, 10) == source.disks["os.raw"][:10]
    source.write("os.raw", 0, b"later" * 100)
    source.ship_to(replica)
    replica.housekeep(LATEST_ONLY, source.now_ns)
    with pytest.raises(NotFoundError, match="let go"):
        reader.pread("os.raw", 0, 10)
    reader.close()


def test_merging_goes_no_further_than_the_oldest_listed_point(store, replica, source):
    source.copy_to(replica)
    for _ in range(3):
        source.ship_to(replica)
    assert merge(store, "web01", 1000) == 1
    check_points(store, source)
    assert merge(store, "web01", 1000) == 0


def test_many_small_cycles_that_expire_at_once_are_not_decoded_again_for_every_region(monkeypatch, store, replica):
    from hvfuse.target import index, journal, kept, schema
    from hvfuse.target import merge as merge_module

    for module in (index, journal, merge_module, schema):
        monkeypatch.setattr(module, "REGION", 4096)
    monkeypatch.setattr(merge_module, "STEP_CYCLES", 4)
    monkeypatch.setattr(kept, "FRAME_CACHE", 8 * 2000)  # bytes: a few steps' frames, and not all cycles'
    decode, decoded = kept.decode, []
    monkeypatch.setattr(kept, "decode", lambda raw: decoded.append(raw) or decode(raw))
    source = Source("web01", {"os.raw": 80_000}, seed=2)
    source.copy_to(replica)
    for number in range(20):
        for region in range(15):
            source.write("os.raw", region * 4096 + number * 100, source.random.randbytes(100))
        manifest, _ = source.begin_cycle()
        frames = source.frames(source.coalesced(), per_frame=100)
        source.end_cycle(manifest, send(replica, manifest, frames))
    replica.housekeep(LATEST_ONLY, source.now_ns)
    assert len(decoded) == 20
    check_points(store, source)


def test_only_one_process_merges_at_a_time(store, replica, source):
    from hvfuse.target.images import ReplicaImages

    source.copy_to(replica)
    source.ship_to(replica)
    with ReplicaImages(store.replica_folder("web01")) as images, images.lock(), pytest.raises(BusyError):
        replica.housekeep(LATEST_ONLY, source.now_ns)
    replica.housekeep(LATEST_ONLY, source.now_ns)


# What comes from outside


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/etc/passwd", "a\0b", "x" * 256, "os.raw.0000000001.hrl", "../x"]
)
def test_a_disk_name_that_is_no_plain_file_name_is_refused(store, replica, source, name):
    manifest, _ = source.begin_copy()
    disk = dataclasses.replace(manifest.disks[0], name=name)
    with pytest.raises(CorruptError):
        replica.begin(dataclasses.replace(manifest, disks=(disk,)))
    assert store.vms() == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 256])
def test_a_vm_name_that_is_no_plain_file_name_is_refused(store, name):
    with pytest.raises(CorruptError):
        LocalReplica(store, name)


@pytest.mark.parametrize(
    "change",
    [
        {"vm": "other"},
        {"generation": b"short"},
        {"cycle": 1},
        {"cycle": -1},
        {"sealed_ns": -1},
        {"disks": ()},
        {"disks": 2 * (DiskManifest(disk_id=bytes(16), name="a", format="raw", size=1),)},
        {"disks": (DiskManifest(disk_id=bytes(15), name="a", format="raw", size=1),)},
        {"disks": (DiskManifest(disk_id=bytes(16), name="a", format="raw", size=-1),)},
        {"disks": (DiskManifest(disk_id=bytes(16), name="a", format="raw", size=1 << 51),)},
        {"kind": CycleKind.DELTA},
        {"kind": CycleKind.DELTA, "cycle": 1},
    ],
)
def test_an_impossible_manifest_is_refused(store, replica, source, change):
    manifest, _ = source.begin_copy()
    with pytest.raises(CorruptError):
        replica.begin(dataclasses.replace(manifest, **change))
    assert store.vms() == []


def encoded(source: Source, extents, **changes) -> bytes:
    """A frame of the open cycle with the given extents (offset, length, kind), changed."""
    table = np.array([(*extent,) for extent in extents], EXTENT_DTYPE)
    writer = FrameWriter(
        generation=changes.get("generation", source.generation), cycle=changes.get("cycle", source.cycle)
    )
    data = [bytes(length) for _, length, kind in extents if kind == Fill.DATA]
    return writer.encode(disk_id=changes.get("disk_id", source.ids["os.raw"]), number=0, table=table, data=data)


def hostile_frames(source: Source) -> dict[str, bytes]:
    good = encoded(source, [(0, 10, Fill.DATA)])
    return {
        "another generation": encoded(source, [(0, 10, Fill.DATA)], generation=bytes(16)),
        "another cycle": encoded(source, [(0, 10, Fill.DATA)], cycle=77),
        "another disk": encoded(source, [(0, 10, Fill.DATA)], disk_id=bytes(16)),
        "out of bounds": encoded(source, [((1 << 50) - 5, 10, Fill.DATA)]),
        "far out of bounds": encoded(source, [(1 << 62, 1 << 62, Fill.ZERO)]),
        "empty": b"",
        "truncated": good[:-1],
        "longer": good + b"\0",
        "too long": good + bytes(MAX_PLAIN),
        "flipped": good[:140] + bytes([good[140] ^ 1]) + good[141:],
    }


@pytest.mark.parametrize("name", list(hostile_frames(Source("web01", {"os.raw": 10}))))
@pytest.mark.parametrize("first_copy", [True, False])
def test_a_frame_that_is_not_the_open_cycles_changes_neither_store_nor_images(store, replica, source, name, first_copy):
    if not first_copy:
        source.copy_to(replica)
        source.ship_to(replica)
    manifest, _ = source.begin_copy() if first_copy else source.begin_cycle()
    replica.begin(manifest)
    before = everything(store)
    with pytest.raises(CorruptError):
        replica.put(hostile_frames(source)[name])
    assert everything(store) == before
    for disk in source.disks:
        expected = b"" if first_copy else contents(store, "web01", replica.points()[0].id)[disk]
        with open(store.image_path("web01", disk), "rb") as image:
            assert image.read() == expected


def test_data_beyond_the_end_of_a_disk_is_not_committed(store, replica, source):
    source.copy_to(replica)
    manifest, _ = source.begin_cycle()
    replica.begin(manifest)
    replica.put(encoded(source, [(49_995, 10, Fill.DATA)]))
    with pytest.raises(CorruptError, match=r"beyond the end of os\.raw"):
        replica.commit(manifest, 1)
    assert replica.points() == ()


def test_a_frame_with_other_contents_under_a_number_that_is_held_is_refused(replica, source):
    source.copy_to(replica)
    manifest, _ = source.begin_cycle()
    replica.begin(manifest)
    replica.put(encoded(source, [(0, 10, Fill.DATA)]))
    with pytest.raises(CorruptError, match="other contents"):
        replica.put(encoded(source, [(0, 11, Fill.DATA)]))


def test_what_is_refused_is_refused_at_once_although_frames_wait_for_each_other(store, replica, source):
    source.copy_to(replica)
    manifest, _ = source.begin_cycle()
    replica.begin(manifest)
    replica.put(encoded(source, [(0, 10, Fill.DATA)]))
    assert not [key for database, key, _ in everything(store) if database == b"frames"]
    with pytest.raises(CorruptError, match="other contents"):
        replica.put(encoded(source, [(0, 11, Fill.DATA)]))
    replica.commit(manifest, 1)
    assert contents(store, "web01", store.point("web01").id)["os.raw"][:11] == bytes(10) + source.disks["os.raw"][10:11]


def test_a_cycles_frames_are_durable_by_the_time_and_by_the_bytes(tmp_path, monkeypatch, source):
    clock = Hand()
    monkeypatch.setattr("hvfuse.target.local.WAITING_BYTES", 20_000)
    source.write("os.raw", 0, source.random.randbytes(50_000))

    def is_durable() -> bool:
        with Store(str(tmp_path / "store"), create=False) as another:
            return LocalReplica(another, "web01").begin(manifest) == frozenset(range(put))

    with Store(str(tmp_path / "store"), clock=clock) as store:
        replica = LocalReplica(store, "web01")
        source.copy_to(replica)
        manifest, _ = source.begin_cycle()
        frames = source.frames(
            {"os.raw": [(at, 6000, source.random.randbytes(6000)) for at in range(0, 48_000, 6000)]}, per_frame=1
        )
        replica.begin(manifest)
        found = []
        for put, frame in enumerate(frames, 1):
            clock.sleep(WAITING_PERIOD if put == 2 else 0)
            replica.put(frame)
            found.append(is_durable())
        assert found == [False, True, False, False, False, True, False, False]
        assert replica.commit(manifest, len(frames)) is not None


def test_a_frame_without_an_open_cycle_is_refused(replica, source):
    source.copy_to(replica)
    source.cycle = 5
    with pytest.raises(HvfuseError, match="no cycle was open"):
        replica.put(encoded(source, [(0, 10, Fill.DATA)]))


def test_an_image_replaced_by_a_link_is_not_followed(tmp_path, store, replica, source):
    source.copy_to(replica)
    source.write("os.raw", 0, b"evil")
    source.ship_to(replica)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    image = store.image_path("web01", "os.raw")
    os.unlink(image)
    os.symlink(victim, image)
    with pytest.raises(HvfuseError):
        replica.housekeep(LATEST_ONLY, source.now_ns)
    assert victim.read_bytes() == b"precious"


def test_an_image_that_is_missing_is_not_taken_for_zeroes(store, replica, source):
    source.copy_to(replica)
    source.write("os.raw", 0, b"something")
    point = source.ship_to(replica)
    os.unlink(store.image_path("web01", "os.raw"))
    with pytest.raises(CorruptError, match="missing"):
        contents(store, "web01", point)
    with pytest.raises(CorruptError, match="missing"):
        replica.housekeep(LATEST_ONLY, source.now_ns)


def test_points_have_the_time_of_their_barrier(replica, source):
    source.copy_to(replica)
    source.ship_to(replica)
    assert replica.points()[0].time_ns == source.now_ns
    assert source.now_ns % SECOND == 0
