import os
import tracemalloc

import numpy as np
import pytest

from hvfuse import frames, system
from hvfuse.errors import UnsupportedError
from hvfuse.position import NO_DIGEST, Position
from hvfuse.reconcile import plan
from hvfuse.shipper import slots
from hvfuse.shipper.copy import Over, copy
from hvfuse.shipper.slots import GROUP, MAX_DISK, SLOT, SLOTS
from hvfuse.shipper.source import SourceDisk
from hvfuse.system import SystemClock

from .logs import Killed, MemoryReplica, random_bytes

MIB = 1 << 20
GENERATION = b"G" * 16


def image(folder, name: str, size: int, *pieces: tuple[int, bytes]) -> SourceDisk:
    """A sparse image with data at the given offsets."""
    with open(folder / name, "wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
    return SourceDisk(name=name, disk_id=name.encode().ljust(16), format="raw", size=size, log_bytes=0)


def run(folder, disks, replica, **options):
    return copy(
        disks, vm="vm1", folder=str(folder), generation=GENERATION, replica=replica, level=1,
        clock=SystemClock(), **options,
    )  # fmt: skip


def assert_equal(folder, disks, replica) -> None:
    for disk in disks:
        with open(folder / disk.name, "rb") as file:
            assert replica.images[disk.disk_id] == file.read(), disk.name


def test_an_image_that_is_cut_while_its_holes_are_looked_for_is_taken_as_far_as_it_goes(tmp_path, monkeypatch):
    image(tmp_path, "a.raw", 4 * MIB, (0, b"x" * 4096), (2 * MIB, b"y" * 4096))
    lseek = os.lseek

    def cut(fd, at, how):
        if how == os.SEEK_HOLE and at == 2 * MIB:
            os.truncate(tmp_path / "a.raw", MIB)
        return lseek(fd, at, how)

    monkeypatch.setattr(os, "lseek", cut)
    fd = os.open(tmp_path / "a.raw", os.O_RDONLY)
    try:
        assert list(system.data_extents(fd, 0, 4 * MIB)) == [(0, 4096)]
    finally:
        os.close(fd)


def test_a_replica_that_held_other_data_equals_the_disks_after_a_copy(tmp_path):
    disks = [
        image(tmp_path, "a.raw", 21 * MIB + 77, (5, random_bytes(1, 3000)), (9 * MIB, random_bytes(2, 5 * MIB))),
        image(tmp_path, "b.raw", 0),
        image(tmp_path, "c.raw", 4096, (0, random_bytes(3, 4096))),
        image(tmp_path, "d.raw", 8 * MIB, (0, bytes(6 * MIB)), (7 * MIB, b"x")),
    ]
    replica = MemoryReplica(images={disk.disk_id: bytearray(b"\xaa" * (25 * MIB)) for disk in disks})
    report = run(tmp_path, disks, replica)
    assert_equal(tmp_path, disks, replica)
    assert replica.stands == Position(GENERATION, 0, NO_DIGEST)
    assert report.bytes_total == sum(disk.size for disk in disks)
    assert report.frames_sent == len(replica.puts)


def test_holes_and_zero_blocks_are_not_sent_as_data(tmp_path):
    disks = [image(tmp_path, "a.raw", 64 * MIB, (0, bytes(8 * MIB)), (20 * MIB, random_bytes(1, 4096)))]
    replica = MemoryReplica()
    report = run(tmp_path, disks, replica)
    assert report.frames_sent == 2
    assert report.bytes_sent < 4096 + 1000


def test_an_empty_disk_of_many_terabytes_takes_one_small_frame_for_each_group(tmp_path, monkeypatch):
    disks = [image(tmp_path, "a.raw", 40 * GROUP)]
    sent = []
    monkeypatch.setattr(MemoryReplica, "put", lambda self, frame: sent.append(frame))
    monkeypatch.setattr(MemoryReplica, "commit", lambda self, manifest, count: None)
    report = run(tmp_path, disks, MemoryReplica())
    assert report.frames_sent == 40
    covered = [(int(e["offset"]), int(e["length"])) for raw in sent for e in frames.decode(raw).table]
    assert covered == [(n * GROUP, GROUP) for n in range(40)]


def test_killed_at_every_put_and_resumed_no_number_is_sent_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "GROUP", 2 * SLOT)
    monkeypatch.setattr(slots, "SLOTS", 2)
    disks = [
        image(tmp_path, "a.raw", 5 * SLOT, (0, b"1"), (3 * SLOT, b"2"), (4 * SLOT, b"3")),
        image(tmp_path, "b.raw", 2 * SLOT, (SLOT, b"4")),
    ]
    frame_count = run(tmp_path, disks, MemoryReplica()).frames_sent
    assert frame_count == 7
    for kill in [*range(1, frame_count + 1), *range(-frame_count, 0)]:
        replica = MemoryReplica(images={disk.disk_id: bytearray(b"\xaa" * (5 * SLOT)) for disk in disks}, die_at=kill)
        with pytest.raises(Killed):
            run(tmp_path, disks, replica)
        replica.die_at = None
        held = len(replica.staged)
        report = run(tmp_path, disks, replica)
        assert (report.frames_held, report.frames_sent) == (held, frame_count - held)
        assert_equal(tmp_path, disks, replica)


def test_a_disk_that_changed_and_grew_while_the_copy_was_interrupted_is_covered_once(tmp_path):
    disks = [image(tmp_path, "a.raw", 5 * SLOT, (0, b"1"), (2 * SLOT, b"2"), (4 * SLOT, b"3"))]
    replica = MemoryReplica(images={disks[0].disk_id: bytearray(b"\xaa" * (9 * SLOT))}, die_at=2)
    with pytest.raises(Killed):
        run(tmp_path, disks, replica)
    replica.die_at = None
    # The slot with "3" was not copied yet and is punched away; another is filled; the disk grows.
    disks = [image(tmp_path, "a.raw", 6 * SLOT + 9, (0, b"1"), (2 * SLOT, b"2"), (SLOT, b"5"), (6 * SLOT, b"6"))]
    staged = dict(replica.staged)
    run(tmp_path, disks, replica)
    assert len(staged) == 2 and len(replica.puts) == 5
    assert_equal(tmp_path, disks, replica)


def test_a_disk_that_was_cut_shorter_reads_as_zeroes_beyond_its_end(tmp_path):
    disks = [image(tmp_path, "a.raw", 3 * SLOT, (0, random_bytes(1, 3 * SLOT)))]
    os.truncate(tmp_path / "a.raw", SLOT + 100)
    replica = MemoryReplica()
    run(tmp_path, disks, replica)
    with open(tmp_path / "a.raw", "rb") as file:
        assert replica.images[disks[0].disk_id] == file.read() + bytes(2 * SLOT - 100)


def test_progress_only_grows_and_ends_at_the_total(tmp_path):
    disks = [
        image(tmp_path, "a.raw", 3 * SLOT + 5, (0, b"1"), (3 * SLOT, b"2")),
        image(tmp_path, "b.raw", SLOT, (9, b"3")),
    ]
    seen = []
    run(tmp_path, disks, MemoryReplica(), progress=lambda *now: seen.append(now))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert [sent for _, _, sent in seen] == sorted(sent for _, _, sent in seen)
    assert seen[-1][:2] == (4 * SLOT + 5, 4 * SLOT + 5)


def test_progress_may_stop_the_copy_which_then_resumes(tmp_path):
    disks = [image(tmp_path, "a.raw", 3 * SLOT, (0, random_bytes(1, 3 * SLOT)))]
    replica = MemoryReplica()

    def stop(done: int, total: int, sent: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(tmp_path, disks, replica, progress=stop)
    assert run(tmp_path, disks, replica).frames_held == 1
    assert_equal(tmp_path, disks, replica)


@pytest.mark.parametrize("over", [False, True])
def test_a_resumed_copy_reads_nothing_of_what_is_held(tmp_path, monkeypatch, over):
    slot, per_group = 1 << 16, 4
    for module, name in ((slots, "SLOT"), (plan, "SPAN")):
        monkeypatch.setattr(module, name, slot)
    monkeypatch.setattr(slots, "GROUP", per_group * slot)
    monkeypatch.setattr(slots, "SLOTS", per_group)
    size = 11 * slot + 700
    disks = [image(tmp_path, "a.raw", size, (0, random_bytes(1, size)))]
    options = {"over": Over(previous=Position(b"P" * 16, 3, NO_DIGEST))} if over else {}
    read: set[int] = set()
    pread, pread_into = system.pread, system.pread_into
    monkeypatch.setattr(system, "pread", lambda fd, length, at: (read.add(at // slot), pread(fd, length, at))[1])
    monkeypatch.setattr(system, "pread_into", lambda fd, view, at: (read.add(at // slot), pread_into(fd, view, at))[1])
    for kill in range(1, 13):
        replica = MemoryReplica(die_at=kill)
        if over:
            replica.stands, replica.images = options["over"].previous, {disks[0].disk_id: bytearray(size)}
        with pytest.raises(Killed):
            run(tmp_path, disks, replica, **options)
        replica.die_at = None
        groups, within = np.divmod(list(replica.staged), per_group + 1)
        held = {group * per_group + place for group, place in zip(groups, within, strict=True) if place < per_group}
        read.clear()
        run(tmp_path, disks, replica, **options)
        assert not read & held and read == set(range(12)) - held, kill
        assert_equal(tmp_path, disks, replica)


class Nowhere(MemoryReplica):
    """Counts what it is given, and keeps none of it."""

    def put(self, frame: bytes) -> None:
        self.staged[len(self.staged)] = b""

    def commit(self, manifest, frame_count):
        assert len(self.staged) == frame_count


def test_the_memory_that_a_copy_takes_does_not_grow_with_the_disk(tmp_path):
    block = random_bytes(1, 8 * MIB)
    disk = image(tmp_path, "a.raw", 256 * MIB, *((at * 8 * MIB, block) for at in range(32)))
    tracemalloc.start()
    try:
        report = run(tmp_path, [disk], Nowhere())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.bytes_sent > 256 * MIB
    assert peak < 96 * MIB


def test_disks_for_which_the_numbers_do_not_suffice_are_refused(tmp_path):
    disk = SourceDisk(name="a.raw", disk_id=bytes(16), format="raw", size=MAX_DISK + 1, log_bytes=0)
    assert MAX_DISK > 127 << 40 and MAX_DISK // GROUP * (SLOTS + 1) <= slots.NUMBERS_PER_DISK
    with pytest.raises(UnsupportedError):
        run(tmp_path, [disk], MemoryReplica())
