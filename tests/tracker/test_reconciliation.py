"""What the tracker answers to those who compare: passes, touched ranges, doubts, and states of earlier versions."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvfuse import spool, system
from hvfuse.errors import ResyncRequiredError, UsageError
from hvfuse.extent import Extent
from hvfuse.formats import tracking
from hvfuse.formats.tracking import COMPARING, DIRTY, HOT, MAP_OFFSET, RECORD_SIZE, Scope, TrackingRecord
from hvfuse.tracker import regions, resync
from hvfuse.tracker.regions import MAX_REGIONS, MIN_REGION, RegionMap
from hvfuse.tracker.service import TrackerControl
from hvfuse.tracker.touched import MAX_OFFSET, Covered
from hvfuse.tracker.vm import TrackedVm
from tests.tracker.test_vm import GENERATION, MIB, attached, is_within, kill, make_folder, marked

NEXT = uuid.UUID(int=8).bytes


@pytest.fixture(autouse=True)
def marks_nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Marks are counted here."""
    monkeypatch.setattr(regions, "_SOON", -1)
    yield
    system.install(None)


def failing(label: str, code: int = errno.EIO) -> None:
    def fail(seen: str, _call: str, _size: int) -> None:
        if seen == label:
            raise OSError(code, "broken")

    system.install(fail)


def lose(vm: TrackedVm, *, full: bool = False) -> None:
    with vm.gate:
        vm.degrade("for the test", full=full)


def dirty(vm: TrackedVm, disk: str = "a.raw") -> list[list[int]]:
    found = resync.regions_of(vm.disks[disk]).extents(DIRTY, vm.disks[disk].size())
    return [[extent.offset, extent.length] for extent in found]


def disk_id(vm: TrackedVm, name: str = "a.raw") -> str:
    return next(str(disk["disk_id"]) for disk in vm.status()["disks"] if disk["name"] == name)


def asked(vm: TrackedVm, op: str, **fields: object) -> dict[str, object]:
    return TrackerControl(vm, "/none").handle({"op": op, **fields})


def copying(tmp_path: Path, scope: Scope, **options: object) -> TrackedVm:
    """A copy of that scope is under way; region 10 MiB was lost before it began."""
    vm = attached(make_folder(tmp_path, a=64 * MIB), **options)
    vm.resynced(GENERATION)
    vm.release(GENERATION, vm.rotate().cycle)
    vm.disks["a.raw"].write(b"before", 10 * MIB)
    vm.begin(NEXT, scope)
    return vm


# Passes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [Scope.REGIONS, Scope.FULL])
def test_a_copy_outlives_its_logs_and_a_pass_compares_just_what_was_written_since(tmp_path: Path, scope: Scope) -> None:
    vm = copying(tmp_path, scope)
    disk = vm.disks["a.raw"]
    compared = marked(vm, "a.raw")
    bases = vm.status()["resync_bases"]
    disk.write(b"logged", 20 * MIB)
    disk.trim(30 * MIB, 4096)
    assert vm.status()["dirty_bytes"] == 0
    lose(vm)
    disk.write(b"marked", 40 * MIB)
    status = vm.status()
    assert (status["resyncing"], status["logging"], status["resync_required"]) == (True, False, "for the test")
    assert (status["resync_scope"], status["resync_bases"]) == (scope.name.lower(), bases)
    assert marked(vm, "a.raw") == compared
    assert status["dirty_bytes"] == 3 * MIN_REGION
    assert dirty(vm) == [[at * MIB, MIN_REGION] for at in (20, 30, 40)]
    with pytest.raises(ResyncRequiredError):
        vm.rotate()
    vm.release(NEXT, 0)
    kill(vm)
    vm = attached(vm.folder, begin=False)
    assert {**vm.status(), "pid": 0} == {**status, "pid": 0, "disks": vm.status()["disks"]}
    vm.begin(NEXT, Scope.FULL)
    assert vm.status()["resyncing"], "the generation in progress is not begun again"
    vm.resynced(NEXT)
    status = vm.status()
    assert (status["resyncing"], status["resync_required"], status["resync_scope"]) == (
        False,
        "for the test",
        "regions",
    )
    assert status["resync_bases"] == [[NEXT.hex(), 0]]
    assert marked(vm, "a.raw") == [[at * MIB, MIN_REGION] for at in (20, 30, 40)]
    third = uuid.uuid4().bytes
    vm.begin(third, Scope.REGIONS)
    assert marked(vm, "a.raw") == [[at * MIB, MIN_REGION] for at in (20, 30, 40)]
    assert vm.status()["resync_bases"] == [[NEXT.hex(), 0], [third.hex(), 0]]
    vm.resynced(third)
    status = vm.status()
    assert (status["resyncing"], status["resync_required"], status["resync_scope"]) == (False, None, None)
    assert (status["dirty_bytes"], status["logging"]) == (0, True)
    vm.detach()


def test_a_copy_of_regions_that_is_abandoned_is_compared_again_with_what_was_lost_since(tmp_path: Path) -> None:
    vm = copying(tmp_path, Scope.REGIONS)
    base = vm.status()["resync_bases"][0]
    vm.disks["a.raw"].write(b"logged", 20 * MIB)
    third = uuid.uuid4().bytes
    vm.begin(third, Scope.REGIONS)
    assert marked(vm, "a.raw") == [[10 * MIB, MIN_REGION], [20 * MIB, MIN_REGION]]
    assert vm.status()["resync_bases"] == [base, [third.hex(), 0]]
    with pytest.raises(UsageError):
        vm.resynced(NEXT)
    vm.detach()


def test_a_copy_of_everything_is_not_replaced_by_one_of_regions(tmp_path: Path) -> None:
    vm = copying(tmp_path, Scope.FULL)
    with pytest.raises(ResyncRequiredError, match="everything"):
        vm.begin(uuid.uuid4().bytes, Scope.REGIONS)
    assert vm.is_logging, "nothing was given up for it"
    vm.detach()


def test_a_generation_begins_once(tmp_path: Path) -> None:
    vm = copying(tmp_path, Scope.FULL)
    vm.resynced(NEXT)
    lose(vm)
    with pytest.raises(UsageError, match="begun before"):
        vm.begin(NEXT, Scope.REGIONS)
    vm.detach()


WIDENINGS: dict[str, Callable[[TrackedVm], None]] = {
    "the map cannot be relied on": lambda vm: lose(vm, full=True),
    "the map cannot be written": lambda vm: fail_while("regions:sync", lambda: vm.disks["a.raw"].write(b"x", 50 * MIB)),
    "the map cannot be written when logs are lost": lambda vm: fail_while("regions:write", lambda: lose(vm)),
    "the image could not be synced": lambda vm: fail_while("disk:sync", lambda: vm.disks["a.raw"].sync(datasync=True)),
    "the image could not be sealed": lambda vm: fail_while("seal:image", vm.rotate),
}


def fail_while(label: str, action: Callable[[], object]) -> None:
    failing(label)
    try:
        action()
    except (OSError, ResyncRequiredError):
        pass
    finally:
        system.install(None)


@pytest.mark.parametrize("scope", [Scope.REGIONS, Scope.FULL])
@pytest.mark.parametrize("widening", WIDENINGS)
def test_what_makes_a_copy_doubtful_ends_it(tmp_path: Path, widening: str, scope: Scope) -> None:
    vm = copying(tmp_path, scope)
    vm.disks["a.raw"].write(b"logged", 20 * MIB)
    WIDENINGS[widening](vm)
    for _ in range(2):
        status = vm.status()
        assert (status["resyncing"], status["resync_scope"], status["dirty_bytes"]) == (False, "full", 0)
        assert status["resync_required"] is not None
        vm.resynced(NEXT)
        assert vm.status()["resync_scope"] == "full", "whatever the target has by now"
        kill(vm)
        vm = attached(vm.folder, begin=False)
    vm.begin(uuid.uuid4().bytes, Scope.FULL)
    assert vm.status()["resyncing"]
    vm.detach()


@pytest.mark.parametrize("scope", [Scope.REGIONS, Scope.FULL])
def test_a_disk_that_was_changed_behind_the_mount_ends_the_copy_under_way(tmp_path: Path, scope: Scope) -> None:
    vm = copying(tmp_path, scope)
    lose(vm)
    vm.detach()
    with open(os.path.join(vm.folder, "a.raw"), "r+b") as file:
        file.write(b"x")
    vm = attached(vm.folder, begin=False)
    status = vm.status()
    assert (status["resyncing"], status["resync_scope"]) == (False, scope.name.lower())
    assert marked(vm, "a.raw") == [[0, 64 * MIB]]
    vm.detach()


@pytest.mark.parametrize("scope", [Scope.REGIONS, Scope.FULL])
def test_after_a_power_cut_a_copy_goes_on_and_hot_regions_are_left_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: Scope
) -> None:
    vm = copying(tmp_path, scope)
    compared = marked(vm, "a.raw")
    vm.disks["a.raw"].write(b"hot", 20 * MIB)
    kill(vm)
    monkeypatch.setattr(system, "boot_id", lambda: b"another boot id!")
    vm = attached(vm.folder, begin=False)
    status = vm.status()
    assert (status["resyncing"], status["resync_scope"]) == (True, scope.name.lower())
    assert str(status["resync_required"]).endswith("once the copy under way is complete")
    assert marked(vm, "a.raw") == compared
    assert dirty(vm) == [[20 * MIB, MIN_REGION]]
    vm.detach()


def test_lost_logs_mark_what_they_held_and_not_what_was_marked_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_SOON", 1e9)
    vm = attached(make_folder(tmp_path, a=512 * MIB))
    for number in range(20):
        vm.disks["a.raw"].write(b"x", 4 * MIB * number)
    hot = resync.regions_of(vm.disks["a.raw"]).count(HOT)
    assert hot > 1000, "a writer in a hurry"
    lose(vm)
    assert dirty(vm) == [[4 * MIB * number, MIN_REGION] for number in range(20)]
    vm.detach()


def test_dirty_marks_go_a_few_regions_ahead_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_SOON", 1e9)
    saved: list[bytes] = []
    found = RegionMap(bytes(MAX_REGIONS), size=MIN_REGION, store=saved.append, sync=lambda: None)
    for number in range(0, MAX_REGIONS, 64):
        found.cover(number * MIN_REGION, 512, DIRTY)
    assert MAX_REGIONS // 64 < found.count(DIRTY) <= 9 * MAX_REGIONS // 64


def test_past_the_soft_limit_a_copy_costs_its_logs_and_nothing_else_does(tmp_path: Path) -> None:
    vm = copying(tmp_path, Scope.FULL, soft_limit=0.25, hard_limit=0.5)
    disk = vm.disks["a.raw"]
    for number in range(16):
        disk.write(os.urandom(MIB), (number + 20) * MIB)
    assert vm.is_logging
    for number in range(2):
        disk.write(os.urandom(MIB), (number + 36) * MIB)
    assert vm.resync_reason == (
        "the logs reached 25% of the disks' size before the copy was complete: what is written from now on is marked, "
        "and compared in another pass"
    )
    assert vm.status()["resyncing"]
    assert is_within(dirty(vm), 20 * MIB, 18 * MIB)
    vm.resynced(NEXT)
    third = uuid.uuid4().bytes
    vm.begin(third, Scope.REGIONS)
    for number in range(24):
        disk.write(os.urandom(MIB), (number + 20) * MIB)
    assert vm.is_logging, "the pass that follows has the hard limit"
    vm.resynced(third)
    for number in range(4):
        disk.write(os.urandom(MIB), (number + 20) * MIB)
    assert vm.is_logging, "as everything has once there is no copy under way"
    vm.detach()


# Touched ranges ----------------------------------------------------------------------------------------


def touched(vm: TrackedVm, *ranges: tuple[int, int]) -> list[list[int]]:
    answer = asked(vm, "touched", disks={disk_id(vm): [list(each) for each in ranges]})
    assert (answer["generation"], answer["cycle"]) == (vm.status()["generation"], vm.status()["cycle"])
    return answer["disks"][disk_id(vm)]  # type: ignore[index, no-any-return]


def test_ranges_are_touched_from_the_write_until_the_next_rotation(tmp_path: Path) -> None:
    vm = attached(make_folder(tmp_path, a=MIB))
    disk = vm.disks["a.raw"]
    assert touched(vm, (0, MIB)) == []
    disk.write(b"1" * 1000, 5000)
    disk.sync(datasync=True)
    disk.trim(20_000, 1)
    disk.zero(30_000, 10)
    for offset, length, expected in [
        (0, 5000, False), (0, 5001, True), (5999, 1, True), (6000, 100, False), (5100, 3, True),
        (20_000, 1, True), (20_001, 1, False), (19_999, 1, False), (30_009, 1, True), (0, MIB, True),
    ]:  # fmt: skip
        assert touched(vm, (offset, length)) == ([[offset, length]] if expected else []), (offset, length)
    assert touched(vm, (5500, 1), (0, 10), (0, 6000)) == [[5500, 1], [0, 6000]], "whole, and in their order"
    vm.rotate()
    assert touched(vm, (0, MIB)) == []
    vm.detach()


@pytest.mark.parametrize(("size", "expected"), [(MIB // 2, [[MIB // 2, 1]]), (2 * MIB, [[3 * MIB // 2, 1]])])
def test_what_a_resize_changed_is_touched(tmp_path: Path, size: int, expected: list[list[int]]) -> None:
    vm = attached(make_folder(tmp_path, a=MIB))
    vm.disks["a.raw"].truncate(size)
    assert touched(vm, (0, 1), (MIB // 2 - 1, 1), (MIB // 2, 1), (3 * MIB // 2, 1)) == expected
    vm.detach()


def test_touched_says_nothing_where_nothing_is_logged_or_asked_right(tmp_path: Path) -> None:
    vm = attached(make_folder(tmp_path, a=MIB))
    own = disk_id(vm)
    assert asked(vm, "touched", disks={})["disks"] == {}
    for wrong in (
        None, [], {"zz": []}, {own: [[0]]}, {own: [[0, 0]]}, {own: [[-1, 5]]}, {own: [["0", 1]]}, {own: [[0, 1.5]]},
        {own: 5}, {own: [[0, True]]}, {own: [[MAX_OFFSET, 1]]}, {"00" * 16: [[0, 1]]}, {own: [None]},
    ):  # fmt: skip
        for op in ("touched", "doubt"):
            with pytest.raises(UsageError):
                asked(vm, op, disks=wrong, generation=GENERATION.hex(), reason="r")
    assert vm.is_logging
    lose(vm)
    with pytest.raises(ResyncRequiredError, match="for the test"):
        touched(vm, (0, 1))
    vm.detach()


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12)


@given(RANGES, RANGES)
def test_ranges_are_found_among_others_as_byte_by_byte(
    written: list[tuple[int, int]], ranges: list[tuple[int, int]]
) -> None:
    covered = Covered(*(np.array([each[n] for each in written], np.int64) for n in (0, 1)))
    bytes_written = {at for offset, length in written for at in range(offset, offset + length)}
    expected = [Extent(o, n) for o, n in ranges if bytes_written.intersection(range(o, o + n))]
    assert covered.among([Extent(*each) for each in ranges]) == expected


# Doubts ------------------------------------------------------------------------------------------------


def test_a_doubt_is_durable_and_compared_with_what_the_logs_held(tmp_path: Path) -> None:
    vm = attached(make_folder(tmp_path, a=64 * MIB))
    vm.resynced(GENERATION)
    vm.release(GENERATION, vm.rotate().cycle)
    vm.disks["a.raw"].write(b"logged", 20 * MIB)
    assert asked(
        vm, "doubt", generation=GENERATION.hex(), reason="the replica differs",
        disks={disk_id(vm): [[30 * MIB + 5, 1], [64 * MIB - 1, 100], [70 * MIB, 5]]},
    ) == {}  # fmt: skip
    kill(vm)
    vm = attached(vm.folder, begin=False)
    assert vm.resync_reason == "the replica differs"
    assert vm.status()["resync_bases"] == [[GENERATION.hex(), 1]]
    assert marked(vm, "a.raw") == [[at, MIN_REGION] for at in (20 * MIB, 30 * MIB, 64 * MIB - MIN_REGION)]
    assert vm.status()["dirty_bytes"] == 3 * MIN_REGION
    vm.disks["a.raw"].write(b"marked", 40 * MIB)
    assert is_within(marked(vm, "a.raw"), 40 * MIB, 6)
    vm.detach()


def test_a_doubt_during_a_copy_is_left_to_the_next(tmp_path: Path) -> None:
    vm = copying(tmp_path, Scope.REGIONS)
    compared = marked(vm, "a.raw")
    doubtful = {bytes.fromhex(disk_id(vm)): [Extent(50 * MIB, 1)]}
    with pytest.raises(UsageError, match="not the one in progress"):
        vm.doubt(GENERATION, "the replica differs", doubtful)
    vm.doubt(NEXT, "the replica differs", doubtful)
    assert vm.status()["resyncing"] and marked(vm, "a.raw") == compared
    vm.resynced(NEXT)
    assert marked(vm, "a.raw") == [[50 * MIB, MIN_REGION]]
    vm.detach()


def test_a_doubt_where_the_disk_outgrew_its_map_is_marked(tmp_path: Path) -> None:
    vm = attached(make_folder(tmp_path, a=MIB))
    vm.resynced(GENERATION)
    vm.disks["a.raw"].truncate(2 << 30)
    vm.doubt(GENERATION, "the replica differs", {bytes.fromhex(disk_id(vm)): [Extent((2 << 30) - 10, 3)]})
    assert is_within(marked(vm, "a.raw"), (2 << 30) - 10, 3)
    assert not is_within(marked(vm, "a.raw"), 1 << 30, 3)
    vm.detach()


def test_a_doubt_before_anything_is_protected_or_without_a_reason_is_refused(tmp_path: Path) -> None:
    vm = attached(make_folder(tmp_path, a=MIB), begin=False)
    with pytest.raises(UsageError):
        asked(vm, "doubt", generation=GENERATION.hex(), reason="r", disks={})
    vm.begin(GENERATION)
    for reason in (None, "", 5):
        with pytest.raises(UsageError, match="reason"):
            asked(vm, "doubt", generation=GENERATION.hex(), reason=reason, disks={})
    assert vm.is_logging
    vm.detach()


# States of version 1 -----------------------------------------------------------------------------------


def as_version_1(folder: str, disk: str, *, marks: bytes, **changes: object) -> TrackingRecord:
    """Have the earlier version have written the state."""
    path = os.path.join(folder, spool.state_name(disk))
    with open(path, "r+b") as file:
        record = replace(tracking.unpack_state(file.read()), **changes)  # type: ignore[arg-type]
        packed = bytearray(record.pack())
        packed[8:12] = (1).to_bytes(4, "little")
        packed[456:472] = tracking.xxhash.xxh3_128_digest(bytes(packed[:456]))
        file.seek(0)
        file.write(packed * 2)
        file.seek(MAP_OFFSET)
        file.write(marks)
    return record


@pytest.mark.parametrize(
    ("scope", "reason", "resyncing", "compared", "left"),
    [
        (Scope.REGIONS, None, True, [[2 * MIN_REGION, MIN_REGION]], 0),
        (Scope.FULL, None, True, [[0, MIB]], 0),
        (Scope.REGIONS, "the disk is full", False, [[2 * MIN_REGION, MIN_REGION]], MIN_REGION),
        (Scope.FULL, "the disk is full", False, [[0, MIB]], 0),
    ],
)
def test_a_copy_that_version_1_began_goes_on_unless_logs_were_lost(
    tmp_path: Path, scope: Scope, reason: str | None, resyncing: bool, compared: list[list[int]], left: int
) -> None:
    folder = make_folder(tmp_path, a=MIB)
    kill(attached(folder))
    base = (NEXT, 7) if scope is Scope.REGIONS else (tracking.NOT_TRACKED, 0)
    marks = bytes([0, HOT, DIRTY | HOT]).ljust(MAX_REGIONS, b"\0")
    as_version_1(
        folder, "a.raw", marks=marks, scope=scope, resync_reason=reason, resyncing=True, base_generation=base[0],
        base_cycle=base[1],
    )  # fmt: skip
    vm = attached(folder, begin=False)
    for _ in range(2):
        status = vm.status()
        assert (status["resyncing"], status["resync_required"]) == (resyncing, reason)
        assert status["resync_scope"] == scope.name.lower()
        expected = list(compared)
        if reason is not None and scope is Scope.REGIONS:
            expected = [[MIN_REGION, 2 * MIN_REGION]]  # what is hot became dirty: nobody took up the logs
            left = 2 * MIN_REGION
        assert marked(vm, "a.raw") == expected
        assert status["dirty_bytes"] == left
        if scope is Scope.REGIONS:
            assert status["resync_bases"][0] == [NEXT.hex(), 7]
        kill(vm)
        vm = attached(folder, begin=False)
    with open(os.path.join(folder, spool.state_name("a.raw")), "rb") as file:
        assert tracking.unpack_state(file.read()).version == tracking.VERSION
    vm.detach()


def test_upgrading_twice_changes_nothing_and_a_present_state_is_left_alone() -> None:
    marks = bytes(range(8)) * (MAX_REGIONS // 8)
    record = TrackingRecord(disk_id=b"d" * 16, generation=GENERATION, scope=Scope.REGIONS, resyncing=True)
    assert tracking.upgraded(record) is record and tracking.upgraded_marks(record, marks) is marks
    old = replace(record, version=1)
    once = tracking.upgraded_marks(old, marks)
    assert once != marks and tracking.upgraded_marks(old, once) == once
    assert all(bool(now & COMPARING) == bool(was & (DIRTY | COMPARING)) for was, now in zip(marks, once, strict=True))
    assert all(now & HOT == was & HOT and not now & DIRTY for was, now in zip(marks, once, strict=True))


def test_a_record_survives_packing_and_a_torn_copy_counts_for_nothing() -> None:
    record = TrackingRecord(
        disk_id=b"d" * 16, generation=GENERATION, cycle=3, acknowledged=2, serial=9, next_seq=77, digest=b"x" * 16,
        unique_id=b"u" * 16, disk_count=2, scope=Scope.REGIONS, base_generation=NEXT, base_cycle=4,
        region_size=MIN_REGION, boot_id=b"b" * 16, detached_cleanly=True, image_size=5, image_mtime_ns=-6,
        image_inode=7, resync_reason="because", resyncing=True, disks_changed=True, write_number=8,
    )  # fmt: skip
    older = replace(record, write_number=7, cycle=2).pack()
    assert tracking.unpack_state(older + record.pack()) == record
    for at in range(0, 472, 7):
        torn = bytearray(record.pack())
        torn[at] ^= 1
        assert tracking.unpack_state(older + bytes(torn)).cycle == 2
    assert len(older) == RECORD_SIZE
