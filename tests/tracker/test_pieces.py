"""Large writes go to log and image in pieces, and both are kept in small pages: what may come of that."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from hvfuse import system
from hvfuse.filesystem import OpenFile
from hvfuse.tracker.mount import VmFolder
from hvfuse.tracker.vm import TrackedVm
from tests.tracker.test_vm import (
    GENERATION,
    Death,
    attached,
    contents,
    is_within,
    kill,
    make_folder,
    marked,
    replayed,
)

MIB = 1 << 20
LENGTH = 5 * system.SMALL
PIECES = LENGTH // system.SMALL + 1
"""Of a write that does not begin at one's boundary."""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="/proc/kpageflags is for root")
_TAIL = 1 << 16
"""Of /proc/kpageflags: the page is not the first of a large one."""


class Nth:
    """An injector that does something at the nth call with a label."""

    def __init__(self, label: str, nth: int, error: BaseException) -> None:
        self.label, self.nth, self.error, self.seen = label, nth, error, 0

    def __call__(self, label: str, _call: str, size: int) -> None:
        assert size <= system.SMALL or label not in {"log:append", "disk:write"}
        self.seen += label == self.label
        if self.seen == self.nth:
            self.seen += 1
            raise self.error


@pytest.mark.parametrize("nth", range(1, PIECES + 1))
def test_a_log_that_fails_within_a_large_write_fails_no_write_and_claims_nothing(
    tmp_path: Path,
    nth: int,
    injector: None,
) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    vm.resynced(GENERATION)
    log = vm.disks["a.raw"].log
    assert log is not None
    data = os.urandom(LENGTH)
    system.install(Nth("log:append", nth, OSError(errno.ENOSPC, "no space")))
    assert vm.disks["a.raw"].write(data, 1000) == LENGTH
    system.install(None)
    assert contents(folder, "a.raw")[1000 : 1000 + LENGTH] == data
    assert log.entry_count == 0
    assert vm.status()["resync_scope"] == "regions"
    assert is_within(marked(vm, "a.raw"), 1000, LENGTH)
    vm.detach()


@pytest.mark.parametrize("nth", range(1, PIECES + 1))
def test_an_image_that_fails_within_a_large_write_has_what_the_log_says(
    tmp_path: Path,
    nth: int,
    injector: None,
) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    data = os.urandom(LENGTH)
    system.install(Nth("disk:write", nth, OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        vm.disks["a.raw"].write(data, 1000)
    system.install(None)
    assert contents(folder, "a.raw")[1000 : 1000 + LENGTH] != data
    vm.rotate()
    assert replayed(folder, "a.raw", bytes(MIB)) == contents(folder, "a.raw")
    vm.detach()


@pytest.mark.parametrize("nth", range(1, PIECES + 1))
@pytest.mark.parametrize("label", ["log:append", "disk:write"])
def test_a_death_within_a_large_write_leaves_no_difference_uncovered(
    tmp_path: Path,
    label: str,
    nth: int,
    injector: None,
) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    vm.disks["a.raw"].write(b"before", 0)
    before = contents(folder, "a.raw")
    system.install(Nth(label, nth, Death()))
    with pytest.raises(Death):
        vm.disks["a.raw"].write(os.urandom(LENGTH), 1000)
    system.install(None)
    kill(vm)
    again = attached(folder, begin=False)
    assert again.resync_reason is None
    again.rotate()
    copy, disk = replayed(folder, "a.raw", bytes(MIB)), contents(folder, "a.raw")
    assert copy == disk
    assert (disk == before) is (label == "log:append")
    again.detach()


def test_writes_far_beyond_what_the_disk_was_when_it_was_attached(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    vm = attached(folder)
    for at in (77 * MIB, 2 * MIB - 3, 0):
        vm.disks["a.raw"].write(b"beyond", at)
    vm.rotate()
    assert replayed(folder, "a.raw", bytes(MIB)) == contents(folder, "a.raw")
    log = vm.disks["a.raw"].log
    assert log is not None
    with pytest.raises(OSError, match="File too large"):
        vm.disks["a.raw"].write(b"beyond what the file system can", 1 << 60)
    assert log.entry_count == 2, "the write, and that it did not come to anything"
    vm.detach()


@needs_root
def test_pages_that_others_have_read_ahead_are_split_where_the_guest_writes(tmp_path: Path) -> None:
    folder, path = in_large_pages(tmp_path)
    vm = attached(folder)
    for at in range(0, 16 * MIB, 128 << 10):
        vm.disks["a.raw"].write(os.urandom(4096), at)
    assert max(pages(path)) <= system.SMALL
    vm.detach()


@needs_root
def test_a_write_across_the_boundary_of_large_pages_splits_both(tmp_path: Path) -> None:
    folder, path = in_large_pages(tmp_path)
    vm = attached(folder)
    for at in range(2 * MIB, 16 * MIB, 2 * MIB):
        vm.disks["a.raw"].write(os.urandom(128 << 10), at - (64 << 10))
    assert max(pages(path)) <= system.SMALL
    vm.detach()


@needs_root
def test_what_the_guest_itself_has_read_stays_cached_where_it_writes(tmp_path: Path) -> None:
    folder, path = in_large_pages(tmp_path)
    forget(path)
    vm = attached(folder)
    with opened(folder, vm) as file:
        file.read_into(memoryview(bytearray(16 * MIB)), 0)
        for at in range(0, 16 * MIB, 2 * MIB):
            file.write(memoryview(os.urandom(4096)), at)
    assert sum(pages(path)) > 11 * MIB, "all but the first and the last room: the format was looked up there"
    assert max(pages(path)) <= system.SMALL
    vm.detach()


@needs_root
def test_large_writes_make_no_large_pages(tmp_path: Path) -> None:
    folder, path = in_large_pages(tmp_path)
    vm = attached(folder, hard_limit=10, soft_limit=10)
    disk = vm.disks["a.raw"]
    for at in range(0, 16 * MIB, MIB):
        disk.write(os.urandom(MIB), at)
    assert disk.log is not None
    assert max(pages(disk.log.path)) <= system.SMALL
    assert max(pages(path)) <= system.SMALL
    vm.detach()


@needs_root
def test_who_reads_in_order_has_the_disk_read_ahead_in_small_pages_and_nobody_else(tmp_path: Path) -> None:
    folder, path = written(tmp_path, 32 * MIB)
    if sum(pages(path)):
        pytest.skip("this file system keeps everything in memory")
    vm = attached(folder)
    buffer = memoryview(bytearray(128 << 10))
    with opened(folder, vm) as file:
        for at in random.Random(3).sample(range(128, 256), 16):
            file.read_into(buffer, at << 17)
        assert sum(pages(path)) < 3 * MIB
        for at in range(0, 2 * MIB, len(buffer)):
            file.read_into(buffer, at)
        deadline = time.monotonic() + 30
        while sum(pages(path)) < 6 * MIB:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert sum(pages(path)) < 12 * MIB
        assert max(pages(path)) <= system.SMALL
    vm.detach()


@needs_root
def test_what_is_cached_of_a_disk_is_not_believed_where_somebodys_sync_may_have_failed(
    tmp_path: Path,
) -> None:
    folder = make_folder(tmp_path, a=4 * MIB)
    path = os.path.join(folder, "a.raw")
    vm = attached(folder)
    vm.disks["a.raw"].write(os.urandom(3 * MIB), 0)
    vm.detach()
    vm = attached(folder, begin=False)
    assert vm.resync_reason is None
    assert sum(pages(path)) >= 3 * MIB
    vm.detach()

    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"behind its back", 0)
        os.fsync(file.fileno())  # what is dirty cannot be dropped
    vm = attached(folder, begin=False)
    assert "written to while it was not mounted" in str(vm.resync_reason)
    assert sum(pages(path)) < MIB
    kill(vm)


def written(tmp_path: Path, size: int) -> tuple[str, str]:
    """A VM's folder, and its disk in it, full of data, none of which is in the page cache."""
    folder = make_folder(tmp_path, a=size)
    path = os.path.join(folder, "a.raw")
    with open(path, "r+b", buffering=0) as file:
        for at in range(0, size, MIB):
            os.pwrite(file.fileno(), os.urandom(MIB), at)
        os.fsync(file.fileno())
    forget(path)
    return folder, path


def forget(path: str) -> None:
    """Let the page cache let go of a file."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_large_pages(tmp_path: Path) -> tuple[str, str]:
    """As `written`, 16 MiB, and read as others do. Skips the test where that makes no large pages."""
    folder, path = written(tmp_path, 16 * MIB)
    with open(path, "rb", buffering=0) as file:
        for at in range(0, 16 * MIB, MIB):
            os.pread(file.fileno(), MIB, at)
    if max(pages(path)) <= system.SMALL:
        pytest.skip("this file system keeps no large pages")
    return folder, path


@contextmanager
def opened(folder: str, vm: TrackedVm) -> Iterator[OpenFile]:
    """The disk as the mount opens it."""
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    file = VmFolder(root, vm).open("/a.raw", os.O_RDWR)
    try:
        yield file
    finally:
        file.release()
        os.close(root)


def pages(path: str) -> list[int]:
    """The sizes in bytes of the pages that a file has in the page cache."""
    with (
        open(path, "rb") as file,
        open("/proc/self/pagemap", "rb", buffering=0) as pagemap,
        open("/proc/kpageflags", "rb", buffering=0) as flags,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as mapped,
    ):
        view = ctypes.c_char.from_buffer(mapped)
        start, count = ctypes.addressof(view), len(mapped) // mmap.PAGESIZE
        resident = (ctypes.c_ubyte * count)()
        ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), resident)
        mapped.madvise(mmap.MADV_RANDOM)
        there = [number for number in range(count) if resident[number] & 1]
        for number in there:
            mapped[number * mmap.PAGESIZE]
        heads = []
        for place, number in enumerate(there):
            (entry,) = struct.unpack("Q", os.pread(pagemap.fileno(), 8, (start // mmap.PAGESIZE + number) * 8))
            (flag,) = struct.unpack("Q", os.pread(flags.fileno(), 8, (entry & (1 << 55) - 1) * 8))
            if not flag & _TAIL:
                heads.append(place)
        del view
    return [(after - before) * mmap.PAGESIZE for before, after in pairwise([*heads, len(there)])]
