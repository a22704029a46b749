"""The tracker's core without a mount: what a write leaves behind, rotations, attach and detach."""

from __future__ import annotations

import errno
import os
import threading
import uuid
from pathlib import Path

import pytest

from hvfuse import spool, system
from hvfuse.errors import BusyError, ResyncRequiredError, UnsupportedError
from hvfuse.formats.companion import Kind
from hvfuse.formats.tracking import Scope
from hvfuse.tracker.vm import TrackedVm
from tests import independent_hrl

MIB = 1 << 20
GENERATION = uuid.UUID(int=7).bytes


def make_folder(tmp_path: Path, **sizes: int) -> str:
    folder = tmp_path / "vm"
    folder.mkdir()
    for name, size in sizes.items():
        with open(folder / f"{name}.raw", "wb") as file:
            file.truncate(size)
    return str(folder)


def attached(folder: str, *, begin: bool = True, **options: object) -> TrackedVm:
    vm = TrackedVm("vm", folder, **options)  # type: ignore[arg-type]
    vm.attach()
    if begin:
        vm.begin(GENERATION)
    return vm


def kill(vm: TrackedVm) -> None:
    """What a SIGKILL leaves: descriptors closed, nothing sealed, nothing recorded."""
    vm.close()


def replayed(folder: str, disk: str, base: bytes, *, after: int = 0) -> bytes:
    """`base` with the sealed logs of the cycles later than `after` replayed over it."""
    image = os.path.join(folder, "copy")
    with open(image, "wb") as file:
        file.write(base)
    for log in spool.list_logs(folder):
        if log.disk == disk and log.header.cycle > after:
            independent_hrl.replay(log.log_path, image)
    with open(image, "rb") as file:
        return file.read()


def resident(folder: str) -> int:
    """Bytes of memory that this process has of index maps."""
    found, inside = 0, False
    with open("/proc/self/smaps", encoding="ascii") as file:
        for line in file:
            if "-" in line.split()[0]:
                inside = f"{folder}/os.raw.hvt" in line
            elif inside and line.startswith("Rss:"):
                found += int(line.split()[1]) * 1024
    return found


def contents(folder: str, disk: str) -> bytes:
    with open(os.path.join(folder, disk), "rb") as file:
        return file.read()


def test_writes_zeroes_and_trims_replayed_from_sealed_logs_give_the_disk(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=4 * MIB)
    vm = attached(folder)
    disk = vm.disks["a.raw"]
    for number in range(300):
        disk.write(os.urandom(512 + number), 7 * number * 512)
    disk.trim(4096, 100_000)
    disk.write(b"x" * 4096, 8192)
    disk.zero(9000, 5)
    vm.rotate()
    disk.write(b"second cycle", MIB + 3)
    vm.rotate()
    assert replayed(folder, "a.raw", bytes(4 * MIB)) == contents(folder, "a.raw")
    vm.detach()


def test_a_recycled_log_shows_none_of_its_stale_bytes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    disk = vm.disks["a.raw"]
    for round_ in range(6):
        disk.write(bytes([round_ + 1]) * (300_000 - 40_000 * round_), 0)
        disk.trim(10_000, 200_000)
        rotation = vm.rotate()
        if round_ < 5:
            with open(os.path.join(folder, "a.raw"), "rb") as file:
                before = file.read()
            vm.release(GENERATION, rotation.cycle)
            assert contents(folder, "a.raw") == before
    (log,) = spool.list_logs(folder)
    assert os.stat(log.log_path).st_size > log.header.eol
    image = os.path.join(folder, "copy")
    with open(image, "wb") as file:
        file.truncate(MIB)
    independent_hrl.replay(log.log_path, image)
    assert contents(folder, "copy")[:100_000] == contents(folder, "a.raw")[:100_000]
    vm.detach()


def test_the_memory_of_a_sealed_logs_index_is_given_back(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, os=MIB)
    vm = attached(folder)
    for number in range(20_000):
        vm.disks["os.raw"].write(b"x" * 8, 8 * number)
    assert resident(folder) > 128 << 10  # what was stored since the map was last made larger
    vm.rotate()
    assert resident(folder) < 64 << 10
    for number in range(100):
        vm.disks["os.raw"].write(b"y" * 8, 8 * number)
    vm.rotate()
    (first, second), base = spool.list_logs(folder), bytes(MIB)
    assert (len(first.entries()), len(second.entries())) == (20_000, 100)
    assert replayed(folder, "os.raw", base) == contents(folder, "os.raw")
    vm.detach()


def test_the_companion_tells_kinds_sizes_and_the_chain(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB, b=MIB)
    vm = attached(folder)
    vm.disks["a.raw"].write(b"1" * 512, 0)
    vm.disks["a.raw"].sync(datasync=True)
    vm.disks["a.raw"].trim(0, 4096)
    vm.rotate()
    vm.disks["a.raw"].zero(0, 512)
    vm.rotate()
    first, second = (log for log in spool.list_logs(folder) if log.disk == "a.raw")
    kinds = [Kind(int(kind)) for kind in first.entries()["kind"]]
    assert kinds == [Kind.WRITE, Kind.FLUSH, Kind.TRIM]
    assert second.header.previous_digest == first.header.digest()
    assert second.header.previous_unique_id == first.header.unique_id
    assert second.header.first_seq == first.header.first_seq + 3
    assert first.header.disk_count == 2
    cycles = spool.list_cycles(folder)
    assert [cycle.cycle for cycle in cycles] == [1, 2]
    assert all(cycle.is_whole for cycle in cycles)
    assert len({log.header.sealed_ns for log in cycles[0].logs}) == 1
    vm.detach()


def test_a_resize_begins_a_cycle_and_its_companion_says_so(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    disk = vm.disks["a.raw"]
    disk.write(b"1" * 4096, MIB - 4096)
    disk.truncate(MIB // 2)
    disk.truncate(2 * MIB)
    vm.rotate()
    headers = [log.header for log in spool.list_logs(folder)]
    assert [(h.previous_size, h.start_size, h.end_size) for h in headers] == [
        (MIB, MIB, MIB),
        (MIB, MIB // 2, MIB // 2),
        (MIB // 2, 2 * MIB, 2 * MIB),
    ]
    vm.detach()


def test_a_write_past_the_end_extends_the_image_within_its_cycle(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    vm.disks["a.raw"].write(b"tail" * 128, MIB)
    vm.rotate()
    (log,) = spool.list_logs(folder)
    assert (log.header.start_size, log.header.end_size) == (MIB, MIB + 512)
    vm.detach()


def test_a_clean_detach_is_continued_without_a_copy(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    vm.disks["a.raw"].write(b"1" * 512, 0)
    vm.detach()
    again = attached(folder, begin=False)
    assert again.is_logging
    assert again.resync_reason is None
    again.disks["a.raw"].write(b"2" * 512, 512)
    again.rotate()
    assert [c.cycle for c in spool.list_cycles(folder)] == [1, 2]
    assert replayed(folder, "a.raw", bytes(MIB)) == contents(folder, "a.raw")
    again.detach()


@pytest.mark.parametrize("change", ["content", "size", "replaced"])
def test_a_disk_changed_behind_the_mount_asks_for_a_resynchronisation(tmp_path: Path, change: str) -> None:
    folder = make_folder(tmp_path, a=MIB)
    attached(folder).detach()
    path = os.path.join(folder, "a.raw")
    if change == "content":
        with open(path, "r+b") as file:
            file.write(b"x")
    elif change == "size":
        os.truncate(path, 2 * MIB)
    else:
        stat = os.stat(path)
        os.rename(path, path + ".old")
        with open(path, "wb") as file:
            file.truncate(MIB)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    vm = attached(folder, begin=False)
    assert vm.resync_reason is not None
    assert not vm.is_logging
    vm.detach()


def test_a_disk_that_came_or_went_asks_for_a_resynchronisation(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB, b=MIB)
    attached(folder).detach()
    with open(os.path.join(folder, "c.raw"), "wb") as file:
        file.truncate(MIB)
    vm = attached(folder, begin=False)
    assert "c.raw was added" in str(vm.resync_reason)
    vm.begin(uuid.uuid4().bytes)
    assert vm.resync_reason is None
    vm.detach()
    os.unlink(os.path.join(folder, "b.raw"))
    vm = attached(folder, begin=False)
    assert "b.raw was removed" in str(vm.resync_reason)
    vm.detach()


def test_after_the_death_of_the_process_every_logged_write_is_taken_up(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=2 * MIB, b=MIB)
    vm = attached(folder)
    for number in range(200):
        vm.disks["a.raw"].write(os.urandom(4096), number * 4096)
        if number == 150:
            vm.disks["a.raw"].sync(datasync=True)
    vm.rotate()
    vm.disks["b.raw"].write(b"last words", 100)
    kill(vm)
    again = attached(folder, begin=False)
    assert again.resync_reason is None
    assert again.recovered is not None
    again.disks["b.raw"].write(b"new words", 4000)
    again.rotate()
    assert [c.cycle for c in spool.list_cycles(folder)] == [1, 2, 3]
    assert all(c.is_whole for c in spool.list_cycles(folder))
    for disk, size in (("a.raw", 2 * MIB), ("b.raw", MIB)):
        assert replayed(folder, disk, bytes(size)) == contents(folder, disk)
    again.detach()


class Death(BaseException):
    """Stands for SIGKILL: not an Exception, so nothing in the code under test handles it."""


LABELS = (
    "log:append log:describe disk:write disk:trim disk:zero disk:truncate log:hole state:write state:sync seal:image "
    "seal:header seal:log seal:companion:write seal:companion:sync seal:companion:rename seal:companion:directory "
    "spool:reuse spool:recycle log:prepare index:sync log:sync disk:sync"
).split()


def scenario(vm: TrackedVm, done: int) -> None:
    a, b = vm.disks["a.raw"], vm.disks["b.raw"]
    for number in range(130):
        a.write(bytes([number + 1]) * 700, number * 1000)
    vm.release(GENERATION, done)
    vm.rotate()
    b.trim(0, 5000)
    b.zero(6000, 5000)
    a.sync(datasync=True)
    b.write(b"b" * 3000, 500)
    a.truncate(MIB // 4)
    a.write(b"after" * 100, 77)
    b.sync(datasync=False)
    vm.rotate()


@pytest.mark.parametrize("label", LABELS)
def test_killed_at_every_labelled_call_the_logs_still_give_the_disk(tmp_path: Path, label: str, injector: None) -> None:
    """For each call with the label: die there, attach again, and replay all logs over the first state."""
    for nth in range(1, 8 if label in ("log:append", "disk:write") else 40):
        base = tmp_path / str(nth)
        base.mkdir()
        folder = make_folder(base, a=MIB, b=MIB)
        vm = attached(folder)
        for _ in range(2):  # so that the scenario's logs overwrite earlier ones
            vm.disks["b.raw"].write(b"stale" * 10_000, MIB // 2)
            vm.release(GENERATION, vm.rotate().cycle)
        done = vm.rotate().cycle
        before = {disk: contents(folder, disk) for disk in vm.disks}
        calls = 0

        def die(seen: str, _call: str, _size: int, nth: int = nth) -> None:
            nonlocal calls
            calls += seen == label
            if seen == label and calls == (nth if label not in ("log:append", "disk:write") else nth * 19):
                raise Death

        system.install(die)
        try:
            scenario(vm, done)
            died = False
        except Death:
            died = True
        system.install(None)
        if not died:
            vm.detach()
            break
        kill(vm)
        again = attached(folder, begin=False)
        assert again.resync_reason is None, (label, nth, again.resync_reason)
        again.rotate()
        for disk in ("a.raw", "b.raw"):
            size = os.stat(os.path.join(folder, disk)).st_size
            copy = replayed(folder, disk, before[disk], after=done)[:size]
            assert copy == contents(folder, disk), (label, nth, disk)
        cycles = spool.list_cycles(folder)
        numbers = [c.cycle for c in cycles if c.cycle > done]
        assert numbers == list(range(done + 1, done + 1 + len(numbers)))
        assert all(c.is_whole for c in cycles if c.cycle > done)
        again.detach()
    assert nth > 1 or label in ("log:append", "disk:write"), f"{label} was never reached"


@pytest.mark.parametrize("label", ["log:append", "log:describe", "log:hole", "log:sync", "index:sync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_log_that_cannot_be_written_never_fails_the_guest(
    tmp_path: Path, label: str, code: int, injector: None
) -> None:
    folder = make_folder(tmp_path, a=2 * MIB)
    vm = attached(folder)
    disk = vm.disks["a.raw"]
    for _ in range(4):  # so that the log in use overwrites a longer one
        disk.write(b"0" * 300_000, 0)
        vm.release(GENERATION, vm.rotate().cycle)

    def fail(seen: str, _call: str, _size: int) -> None:
        if seen == label:
            raise OSError(code, os.strerror(code))

    system.install(fail)
    expected = bytearray(2 * MIB)
    expected[:300_000] = b"0" * 300_000
    for number in range(140):
        disk.write(b"%04d" % number * 128, 512 * number)
        expected[512 * number : 512 * number + 512] = b"%04d" % number * 128
    disk.trim(0, 1000)
    expected[:1000] = bytes(1000)
    disk.sync(datasync=True)
    system.install(None)
    assert contents(folder, "a.raw") == expected
    assert vm.resync_reason is not None
    with pytest.raises(ResyncRequiredError):
        vm.rotate()
    kill(vm)
    again = attached(folder, begin=False)
    assert again.resync_reason is not None, "the state must say so durably"
    again.begin(uuid.uuid4().bytes)
    assert again.is_logging
    again.detach()


def test_an_image_that_cannot_be_written_fails_the_guest_and_the_log_holds_what_stands(
    tmp_path: Path, injector: None
) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    disk = vm.disks["a.raw"]
    disk.write(b"old" * 1000, 0)

    def fail(seen: str, _call: str, _size: int) -> int | None:
        return 700 if seen == "disk:write" else None

    system.install(fail)
    with pytest.raises(OSError):
        disk.write(b"new" * 1000, 0)
    system.install(None)
    vm.rotate()
    assert contents(folder, "a.raw")[:700] == (b"new" * 1000)[:700]
    assert replayed(folder, "a.raw", bytes(MIB)) == contents(folder, "a.raw")
    vm.detach()


def test_a_write_past_the_end_that_failed_is_not_in_the_log_once_the_image_grows(
    tmp_path: Path, injector: None
) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    disk = vm.disks["a.raw"]
    broken = OSError(errno.EIO, "broken")

    def fail(seen: str, _call: str, _size: int) -> None:
        if seen == "disk:write":
            raise broken

    system.install(fail)
    with pytest.raises(OSError):
        disk.write(b"lost" * 1000, MIB - 1000)
    system.install(None)
    disk.write(b"end", MIB + 8000)
    vm.rotate()
    assert replayed(folder, "a.raw", bytes(MIB)) == contents(folder, "a.raw")
    vm.detach()


def marked(vm: TrackedVm, disk: str) -> list[list[int]]:
    """What has to be compared of a disk: [offset, length]."""
    answer = vm.regions()
    number = list(vm.disks).index(disk)
    return list(answer["disks"][number]["extents"])


def is_within(extents: list[list[int]], offset: int, length: int) -> bool:
    return any(start <= offset and offset + length <= start + size for start, size in extents)


def test_every_unlogged_write_is_marked_durably_before_it_is_answered(tmp_path: Path, injector: None) -> None:
    folder = make_folder(tmp_path, a=64 * MIB, b=64 * MIB)
    vm = attached(folder)
    vm.resynced(GENERATION)
    a, b = vm.disks["a.raw"], vm.disks["b.raw"]
    a.write(b"sealed and acknowledged", 0)
    vm.release(GENERATION, vm.rotate().cycle)
    for _ in range(2):  # regions that are left alone go cold
        vm.release(GENERATION, vm.rotate().cycle)
    a.write(b"sealed, not acknowledged", 10 * MIB)
    vm.rotate()
    b.write(b"in the active log", 20 * MIB)

    def fail(seen: str, _call: str, _size: int) -> None:
        if seen == "log:append":
            raise OSError(errno.ENOSPC, "no space")

    system.install(fail)
    a.write(b"the write that did not fit", 30 * MIB)
    system.install(None)
    b.write(b"unlogged", 40 * MIB)
    b.trim(50 * MIB, MIB)
    assert vm.status()["resync_scope"] == "regions"
    assert vm.status()["resync_bases"] == [[GENERATION.hex(), 3]]
    kill(vm)
    again = attached(folder, begin=False)
    assert again.status()["resync_scope"] == "regions"
    assert is_within(marked(again, "a.raw"), 10 * MIB, 100)
    assert is_within(marked(again, "a.raw"), 30 * MIB, 100)
    assert not is_within(marked(again, "a.raw"), 0, 100)
    for offset, length in ((20 * MIB, 100), (40 * MIB, 100), (50 * MIB, MIB)):
        assert is_within(marked(again, "b.raw"), offset, length)
    again.disks["b.raw"].write(b"still marked after a restart", 60 * MIB)
    generation = uuid.uuid4().bytes
    again.begin(generation, Scope.REGIONS)
    assert is_within(marked(again, "b.raw"), 60 * MIB, 100)
    assert again.resync_reason is None
    assert again.is_logging
    assert again.status()["resync_bases"] == [[GENERATION.hex(), 3], [generation.hex(), 0]]
    again.resynced(generation)
    assert again.status()["resync_scope"] is None
    assert marked(again, "b.raw") == []
    again.detach()


@pytest.mark.parametrize("label", ["regions:write", "regions:sync"])
def test_a_map_that_cannot_be_written_asks_for_a_full_resynchronisation(
    tmp_path: Path, label: str, injector: None
) -> None:
    folder = make_folder(tmp_path, a=4 * MIB)
    vm = attached(folder)
    vm.resynced(GENERATION)

    def fail(seen: str, _call: str, _size: int) -> None:
        if seen == label:
            raise OSError(errno.EIO, "broken")

    system.install(fail)
    vm.disks["a.raw"].write(b"goes on", 0)
    system.install(None)
    assert vm.status()["resync_scope"] == "full"
    kill(vm)
    again = attached(folder, begin=False)
    assert again.status()["resync_scope"] == "full"
    again.detach()


def test_after_the_death_of_the_host_only_hot_regions_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path, a=1024 * MIB, b=MIB)
    vm = attached(folder)
    vm.resynced(GENERATION)
    vm.disks["a.raw"].write(b"1" * 4096, 500 * MIB)
    vm.rotate()
    for _ in range(2):
        vm.rotate()
    vm.disks["a.raw"].write(b"2" * 4096, 700 * MIB)
    kill(vm)
    monkeypatch.setattr(system, "boot_id", lambda: b"another boot id!")
    again = attached(folder, begin=False)
    assert "the host stopped" in str(again.resync_reason)
    assert "of 1.0 GiB to compare" in str(again.recovered)
    assert "1 logged writes done again" in str(again.recovered)
    assert is_within(marked(again, "a.raw"), 700 * MIB, 4096)
    assert not is_within(marked(again, "a.raw"), 500 * MIB, 4096)
    assert [cycle.cycle for cycle in spool.list_cycles(folder)] == [1, 2, 3], "sealed cycles are still shipped"
    again.detach()


def test_a_disk_that_outgrows_its_region_map_gets_larger_regions(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    vm.resynced(GENERATION)
    disk = vm.disks["a.raw"]
    disk.write(b"near", 0)
    disk.truncate(2 << 30)
    disk.write(b"far", (2 << 30) - 100)
    kill(vm)
    vm = attached(folder, begin=False)
    assert vm.resync_reason is None
    regions = vm.disks["a.raw"].regions
    assert regions is not None and regions.reach >= 2 << 30
    with vm.gate:
        vm.degrade("for the test")
    assert is_within(marked(vm, "a.raw"), 0, 4)
    assert is_within(marked(vm, "a.raw"), (2 << 30) - 100, 3)
    vm.detach()


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("count", [2, 8])
def test_logs_pass_their_limit_by_a_mib_each_however_the_writes_are_spread(
    tmp_path: Path, count: int, size: int
) -> None:
    """All but one are idle while much is left, and make up for it when nearly nothing is."""
    vm = attached(make_folder(tmp_path, **{f"d{number}": size * MIB for number in range(count)}), hard_limit=0.5)
    vm.resynced(GENERATION)
    first, *others = vm.disks.values()
    limit, piece, written = count * size * MIB // 2, 64 << 10, 0
    for disk in others:
        written += disk.write(bytes(4096), 0)
    while written + piece <= limit:
        written += first.write(bytes(piece), written % (size * MIB // 2))
    assert vm.resync_reason is None
    for turn in range(1000):
        for disk in others:
            if vm.resync_reason is None:
                written += disk.write(bytes(4096), turn * 4096)
    assert limit < written <= limit + count * MIB
    vm.detach()


def test_logs_that_reach_the_hard_limit_are_given_up_and_the_guest_goes_on(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=32 * MIB)
    vm = attached(folder, hard_limit=0.5)
    vm.resynced(GENERATION)
    disk = vm.disks["a.raw"]
    for number in range(14):
        disk.write(os.urandom(MIB), number * MIB)
    vm.rotate()
    assert vm.resync_reason is None
    for number in range(6):
        disk.write(os.urandom(MIB), number * MIB)
    assert "50%" in str(vm.resync_reason)
    assert spool.list_cycles(folder) == []
    assert is_within(marked(vm, "a.raw"), 0, 14 * MIB)
    vm.detach()


def test_where_image_and_logs_fill_the_disk_the_logs_go_before_the_guests_write_does(
    tmp_path: Path, injector: None
) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    vm.resynced(GENERATION)
    disk = vm.disks["a.raw"]
    disk.write(b"1" * 5000, 0)
    vm.rotate()

    def fail(seen: str, _call: str, _size: int) -> None:
        if seen == "disk:write" and any(name.endswith(".hrl") for name in os.listdir(folder)):
            raise OSError(errno.ENOSPC, "no space")

    system.install(fail)
    disk.write(b"2" * 5000, 200_000)
    system.install(None)
    assert contents(folder, "a.raw")[200_000:205_000] == b"2" * 5000
    assert is_within(marked(vm, "a.raw"), 0, 5000)
    assert is_within(marked(vm, "a.raw"), 200_000, 5000)
    vm.detach()


def test_a_failed_sync_is_told_to_everybody_who_asks_from_then_on(tmp_path: Path, injector: None) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    vm.disks["a.raw"].write(b"1" * 512, 0)

    def fail(seen: str, _call: str, _size: int) -> None:
        if seen == "seal:image":
            raise OSError(errno.EIO, "broken")

    system.install(fail)
    with pytest.raises(ResyncRequiredError):
        vm.rotate()
    system.install(None)
    for _ in range(2):
        with pytest.raises(OSError):
            vm.disks["a.raw"].sync(datasync=True)
    kill(vm)


def test_a_disk_with_another_name_or_another_writer_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    path = os.path.join(folder, "a.raw")
    os.link(path, tmp_path / "other")
    with pytest.raises(UnsupportedError, match="hard link"):
        attached(folder)
    os.unlink(tmp_path / "other")
    with open(path, "r+b"), pytest.raises(BusyError, match="open for writing"):
        attached(folder)
    attached(folder).detach()


@pytest.mark.parametrize("lost", ["active", "sealed", "before"])
def test_what_a_shrink_cut_off_is_marked_when_its_log_is_lost(tmp_path: Path, lost: str) -> None:
    folder = make_folder(tmp_path, a=64 * MIB)
    vm = attached(folder)
    vm.resynced(GENERATION)
    disk = vm.disks["a.raw"]
    disk.write(b"old data" * 1000, 50 * MIB)
    vm.release(GENERATION, vm.rotate().cycle)
    for _ in range(3):
        vm.release(GENERATION, vm.rotate().cycle)
    assert marked(vm, "a.raw") == []
    if lost == "before":
        with vm.gate:
            vm.degrade("for the test")
    disk.truncate(40 * MIB)
    disk.truncate(64 * MIB)
    if lost == "sealed":
        for _ in range(3):
            vm.rotate()
    if lost != "before":
        with vm.gate:
            vm.degrade("for the test")
    assert is_within(marked(vm, "a.raw"), 50 * MIB, 8000)
    vm.detach()


def test_a_disk_changed_behind_the_mount_while_a_resynchronisation_was_required_is_compared_whole(
    tmp_path: Path,
) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    vm.resynced(GENERATION)
    with vm.gate:
        vm.degrade("for the test")
    vm.detach()
    with open(os.path.join(folder, "a.raw"), "r+b") as file:
        file.write(b"x")
    again = attached(folder, begin=False)
    assert marked(again, "a.raw") == [[0, MIB]]
    assert "for the test; a.raw was written to" in str(again.resync_reason)
    again.detach()


def test_a_size_that_the_file_system_refuses_leaves_replication_as_it_was(tmp_path: Path, injector: None) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)

    def fail(seen: str, _call: str, _size: int) -> None:
        if seen == "disk:truncate":
            raise OSError(errno.EFBIG, "too large")

    system.install(fail)
    with pytest.raises(OSError, match="too large"):
        vm.disks["a.raw"].truncate(1 << 62)
    system.install(None)
    assert vm.is_logging
    vm.rotate()
    assert [log.header.start_size for log in spool.list_logs(folder)] == [MIB, MIB]
    vm.detach()


def test_a_second_tracker_on_the_same_disks_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    with pytest.raises(BusyError):
        attached(folder)
    vm.detach()


def test_rotations_race_with_writers_and_no_write_is_torn_between_cycles(tmp_path: Path) -> None:
    """A writer stamps a counter to the disks in turn; at every barrier the counters differ by one at most."""
    folder = make_folder(tmp_path, **{f"d{n}": MIB for n in range(4)})
    vm = attached(folder, hard_limit=1000, soft_limit=1000)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            for disk in vm.disks.values():
                disk.write(number.to_bytes(8, "little") * 64, 0)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            vm.rotate()
    finally:
        stop.set()
        writer.join()
    vm.detach()
    state = dict.fromkeys(vm.disks, 0)
    for cycle in spool.list_cycles(folder):
        for log in cycle.logs:
            entries = log.entries()
            if len(entries):
                with open(log.log_path, "rb") as file:
                    file.seek(int(entries[-1]["location"]))
                    state[log.disk] = int.from_bytes(file.read(8), "little")
        if len(state) == 4:
            stamps = [state[f"d{n}.raw"] for n in range(4)]
            assert stamps == sorted(stamps, reverse=True), stamps
            assert stamps[0] - stamps[-1] <= 1, stamps


def test_begin_is_idempotent_and_forgets_earlier_generations(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    vm.disks["a.raw"].write(b"x" * 512, 0)
    vm.rotate()
    vm.begin(GENERATION)
    assert len(spool.list_cycles(folder)) == 1
    other = uuid.uuid4().bytes
    vm.begin(other)
    assert spool.list_cycles(folder) == []
    assert vm.rotate().cycle == 1
    assert spool.list_cycles(folder)[0].generation == other
    vm.detach()
