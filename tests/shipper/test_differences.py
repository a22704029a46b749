"""Copies of differences: equal afterwards, nothing compared outside the regions, nothing sent twice."""

import os
import random

import pytest

from hvfuse import frames, system
from hvfuse.extent import Extent
from hvfuse.formats.digests import BLOCK
from hvfuse.position import NO_DIGEST, Position
from hvfuse.reconcile import plan
from hvfuse.shipper import slots
from hvfuse.shipper.copy import CopyReport, Over, copy
from hvfuse.shipper.slots import GROUP, SLOT
from hvfuse.shipper.source import SourceDisk
from hvfuse.system import SystemClock

from .logs import Killed, MemoryReplica, random_bytes
from .test_copy import assert_equal, image

MIB = 1 << 20
GENERATION = b"N" * 16
BEFORE = Position(b"G" * 16, 7, b"d" * 16)


def run(folder, disks, replica, regions=None, **options) -> CopyReport:
    return copy(
        disks, vm="vm1", folder=str(folder), generation=GENERATION, replica=replica, level=1,
        clock=SystemClock(), over=Over(previous=BEFORE, regions=regions), **options,
    )  # fmt: skip


def replica_of(folder, disks, **options) -> MemoryReplica:
    """A replica that equals the disks."""
    held = {disk.disk_id: bytearray((folder / disk.name).read_bytes()) for disk in disks}
    return MemoryReplica(images=held, stands=BEFORE, **options)


def whole(disk: SourceDisk) -> dict[bytes, list[Extent]]:
    return {disk.disk_id: [Extent(0, disk.size)]}


@pytest.mark.parametrize("seed", range(25))
def test_whatever_differs_within_the_regions_is_equal_afterwards_and_nothing_else_is_looked_at(
    tmp_path, monkeypatch, seed
):
    dice = random.Random(seed)
    slot_blocks = dice.choice([2, 4, 64])
    monkeypatch.setattr(slots, "SLOT", slot_blocks * BLOCK)
    monkeypatch.setattr(plan, "SPAN", slot_blocks * BLOCK)
    monkeypatch.setattr(slots, "SLOTS", dice.choice([2, 3, 1024]))
    monkeypatch.setattr(slots, "GROUP", slots.SLOT * slots.SLOTS)
    disks, regions, outside = [], {}, {}
    replica = MemoryReplica(stands=BEFORE)
    for name in ("a.raw", "b.raw"):
        disk = image(tmp_path, name, dice.randrange(1, 40 * BLOCK), *somewhere(dice, 40 * BLOCK))
        os.truncate(tmp_path / name, disk.size)
        held = bytearray((tmp_path / name).read_bytes())
        regions[disk.disk_id], unmarked = some_regions(dice, disk.size)
        for region in regions[disk.disk_id]:
            change(dice, held, region)
        # What lies outside may differ as well: nobody has to find that.
        outside[disk.disk_id] = [(at, change(dice, held, Extent(at, 1))) for at in unmarked[:1]]
        del held[dice.choice([disk.size, disk.size, disk.size // 2]) :]
        if len(held) < disk.size:  # shorter: what is missing is zeroes, and must be marked if it is not
            regions[disk.disk_id] = [Extent(0, disk.size)]
        replica.images[disk.disk_id] = held
        disks.append(disk)
    report = run(tmp_path, disks, replica, regions)
    marked = sum(extent.length for extents in regions.values() for extent in extents)
    assert report.bytes_compared == marked
    assert report.bytes_differing <= marked + 2 * BLOCK
    for disk in disks:
        expected = bytearray((tmp_path / disk.name).read_bytes())
        for at, value in outside[disk.disk_id]:
            if not any(extent.offset <= at < extent.end for extent in regions[disk.disk_id]):
                expected[at : at + 1] = value
        assert replica.images[disk.disk_id] == expected
    for disk_id, offset, length in replica.asked:
        assert all(
            any(extent.offset <= at < extent.end for extent in regions[disk_id])
            for at in range(offset, offset + length, BLOCK)
        )


def somewhere(dice: random.Random, end: int) -> list[tuple[int, bytes]]:
    """Data at a few places, some of it zeroes."""
    made = []
    for _ in range(dice.randrange(5)):
        length = dice.randrange(1, 5 * BLOCK)
        at = dice.randrange(end - length)
        made.append((at, bytes(length) if dice.randrange(4) == 0 else dice.randbytes(length)))
    return made


def some_regions(dice: random.Random, size: int) -> tuple[list[Extent], list[int]]:
    """Aligned regions, and where other ones begin."""
    marked, unmarked = [], []
    for at in range(0, size, BLOCK):
        if dice.randrange(3) == 0:
            marked.append(Extent(at, min(BLOCK, size - at)))
        else:
            unmarked.append(at)
    return marked, unmarked


def change(dice: random.Random, held: bytearray, extent: Extent) -> bytes:
    """Make a range differ, or leave it, or empty it. Returns what it is now."""
    match dice.randrange(4):
        case 0:
            held[extent.offset : extent.end] = bytes(extent.length)
        case 1:
            held[extent.offset : extent.end] = dice.randbytes(extent.length)
        case 2:
            held[extent.offset] ^= 1
    return bytes(held[extent.offset : extent.end])


def test_equal_disks_send_nothing_but_that_they_were_compared(tmp_path):
    disks = [image(tmp_path, "a.raw", 21 * MIB + 77, (5, random_bytes(1, 9 * MIB))), image(tmp_path, "b.raw", 0)]
    replica = replica_of(tmp_path, disks)
    report = run(tmp_path, disks, replica)
    assert_equal(tmp_path, disks, replica)
    assert (report.frames_sent, report.bytes_sent) == (1, frames.HEADER_SIZE)
    assert (report.bytes_compared, report.bytes_differing) == (21 * MIB + 77, 0)
    assert replica.stands == Position(GENERATION, 0, NO_DIGEST)


def test_one_changed_byte_sends_its_block_alone(tmp_path):
    disks = [image(tmp_path, "a.raw", 8 * MIB, (0, random_bytes(1, 8 * MIB)))]
    replica = replica_of(tmp_path, disks)
    replica.images[disks[0].disk_id][5 * MIB + 12345] ^= 1
    report = run(tmp_path, disks, replica)
    assert_equal(tmp_path, disks, replica)
    assert report.bytes_differing == BLOCK
    assert BLOCK < report.bytes_sent < BLOCK + 1000


def test_holes_are_not_read_and_zeroes_not_sent(tmp_path, monkeypatch):
    disks = [image(tmp_path, "a.raw", 64 * MIB, (0, bytes(BLOCK)), (40 * MIB, random_bytes(1, BLOCK)))]
    replica = replica_of(tmp_path, disks)
    replica.images[disks[0].disk_id][20 * MIB : 21 * MIB] = random_bytes(2, MIB)
    read, pread_into = [], system.pread_into

    def counted(fd: int, view: memoryview, offset: int) -> int:
        read.append(len(view))
        return pread_into(fd, view, offset)

    monkeypatch.setattr(system, "pread_into", counted)
    report = run(tmp_path, disks, replica)
    monkeypatch.undo()
    assert_equal(tmp_path, disks, replica)
    assert sum(read) == 2 * BLOCK
    assert report.bytes_sent < 1000


def test_an_empty_disk_of_many_terabytes_takes_no_reading_and_few_frames(tmp_path, monkeypatch):
    disks = [image(tmp_path, "a.raw", 3 * GROUP)]
    replica = MemoryReplica(stands=BEFORE)
    monkeypatch.setattr(MemoryReplica, "commit", lambda self, manifest, count: None)
    report = run(tmp_path, disks, replica, {disks[0].disk_id: [Extent(GROUP, SLOT), Extent(2 * GROUP, SLOT)]})
    assert report.frames_sent == 2


def test_a_disk_that_became_shorter_leaves_nothing_behind_that_would_be_seen_once_it_grew(tmp_path):
    disks = [image(tmp_path, "a.raw", 3 * BLOCK + 100, (0, random_bytes(1, 3 * BLOCK + 100)))]
    replica = replica_of(tmp_path, disks)
    replica.images[disks[0].disk_id] += random_bytes(2, 9 * BLOCK)
    sent, put = [], MemoryReplica.put
    replica.put = lambda frame: (sent.append(frames.decode(frame)), put(replica, frame))
    report = run(tmp_path, disks, replica, {disks[0].disk_id: []})
    assert_equal(tmp_path, disks, replica)
    zeroes = [e for frame in sent for e in frame.table if e["kind"] == frames.Fill.ZERO]
    assert int(zeroes[0]["offset"]) == 3 * BLOCK + 100
    assert int(zeroes[-1]["offset"] + zeroes[-1]["length"]) >= 12 * BLOCK + 100
    assert report.bytes_compared <= 100


def test_a_disk_that_the_replica_does_not_know_is_compared_with_zeroes(tmp_path):
    disks = [image(tmp_path, "a.raw", 5 * BLOCK), image(tmp_path, "b.raw", 9 * BLOCK, (BLOCK, random_bytes(1, BLOCK)))]
    replica = replica_of(tmp_path, disks[:1])
    report = run(tmp_path, disks, replica)
    assert_equal(tmp_path, disks, replica)
    assert report.bytes_differing == BLOCK


def small(monkeypatch) -> None:
    monkeypatch.setattr(plan, "SPAN", 2 * BLOCK)
    monkeypatch.setattr(slots, "SLOT", 2 * BLOCK)
    monkeypatch.setattr(slots, "SLOTS", 2)
    monkeypatch.setattr(slots, "GROUP", 4 * BLOCK)


def test_killed_at_every_put_and_resumed_no_number_is_sent_twice_and_closed_groups_rest(tmp_path, monkeypatch):
    small(monkeypatch)
    disks = [
        image(tmp_path, "a.raw", 10 * BLOCK, (0, random_bytes(1, 10 * BLOCK))),
        image(tmp_path, "b.raw", 3 * BLOCK, (0, random_bytes(2, 3 * BLOCK))),
    ]
    other = {disk.disk_id: bytearray(b"\xaa" * disk.size) for disk in disks}
    frame_count = run(tmp_path, disks, MemoryReplica(images=copied(other), stands=BEFORE)).frames_sent
    assert frame_count == 5 + 3 + 2 + 1
    for kill in [*range(1, frame_count + 1), *range(-frame_count, 0)]:
        replica = MemoryReplica(images=copied(other), stands=BEFORE, die_at=kill)
        with pytest.raises(Killed):
            run(tmp_path, disks, replica)
        replica.die_at, replica.asked = None, []
        held = len(replica.staged)
        report = run(tmp_path, disks, replica)
        assert (report.frames_held, report.frames_sent) == (held, frame_count - held)
        assert_equal(tmp_path, disks, replica)
        if held >= 3:
            assert (disks[0].disk_id, 0, 2 * BLOCK) not in replica.asked


def copied(images: dict[bytes, bytearray]) -> dict[bytes, bytearray]:
    return {key: bytearray(value) for key, value in images.items()}


def test_progress_only_grows_and_ends_at_what_there_was_to_compare(tmp_path, monkeypatch):
    small(monkeypatch)
    disks = [image(tmp_path, "a.raw", 50 * BLOCK + 5, (0, random_bytes(1, 20 * BLOCK)))]
    regions = {disks[0].disk_id: [Extent(0, 7 * BLOCK), Extent(13 * BLOCK, BLOCK), Extent(48 * BLOCK, 2 * BLOCK + 5)]}
    seen = []
    run(tmp_path, disks, replica_of(tmp_path, disks), regions, progress=lambda *now: seen.append(now))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (10 * BLOCK + 5, 10 * BLOCK + 5)


def test_progress_may_stop_the_comparison_which_then_resumes(tmp_path):
    disks = [image(tmp_path, "a.raw", 3 * SLOT, (0, random_bytes(1, 3 * SLOT)))]
    replica = MemoryReplica(stands=BEFORE)

    def stop(done: int, total: int, sent: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(tmp_path, disks, replica, progress=stop)
    assert run(tmp_path, disks, replica).frames_held == 1
    assert_equal(tmp_path, disks, replica)


def test_an_error_of_the_replica_while_it_is_asked_ahead_ends_the_run(tmp_path, monkeypatch):
    disks = [image(tmp_path, "a.raw", 40 * SLOT, (0, b"1"), (39 * SLOT, b"2"))]
    replica, asked = replica_of(tmp_path, disks), []

    def fail(disk_id, extents, key):
        asked.append(len(extents))
        raise Killed

    replica.summaries = fail
    with pytest.raises(Killed):
        run(tmp_path, disks, replica)
    assert asked and replica.stands == BEFORE


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"regions": 3, "bytes_compared": 48 * MIB},
            "resynchronised: 3 regions, 48 MiB of 20 GiB compared, 12 MiB sent",
        ),
        ({"regions": 1, "bytes_compared": 65536}, "resynchronised: 1 region, 64 KiB of 20 GiB compared, 12 MiB sent"),
        ({"regions": None, "bytes_compared": 20 << 30}, "resynchronised: 20 GiB of 20 GiB compared, 12 MiB sent"),
        ({"regions": None, "bytes_compared": None}, "copied: 20 GiB, 12 MiB sent"),
    ],
)
def test_the_report_says_in_plain_words_what_was_done(fields, text):
    report = CopyReport(
        bytes_total=20 << 30,
        bytes_differing=0,
        bytes_sent=12 * MIB,
        frames_sent=3,
        frames_held=0,
        seconds=1.0,
        **fields,
    )
    assert report.text == text
    assert report.as_json()["text"] == text
