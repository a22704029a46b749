"""The simulator of power cuts keeps what was synced, and may lose, tear and reorder the rest."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hvfuse import system
from tests.crash.powerloss import BypassError, PowerLoss

CUTS = 60
OLD, NEW, NEWER = b"o" * 512, b"n" * 512, b"N" * 512


def left(tmp_path: Path, work: Callable[[str], None], *, cuts: int = CUTS) -> list[dict[str, bytes]]:
    """What `work` in a folder with the file "a", two sectors of OLD, can leave: names and contents."""
    found = []
    for seed in range(cuts):
        folder, after = tmp_path / f"before{seed}", tmp_path / f"after{seed}"
        folder.mkdir()
        (folder / "a").write_bytes(OLD * 2)
        with PowerLoss(str(folder), seed=seed) as power:
            work(str(folder))
            power.cut(str(after))
        found.append({path.name: path.read_bytes() for path in after.iterdir()})
    return found


def opened(folder: str, name: str = "a") -> int:
    return os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT, 0o600)


def test_what_was_synced_is_there_after_every_cut(tmp_path: Path) -> None:
    def work(folder: str) -> None:
        fd = opened(folder)
        system.pwrite("x", fd, NEW * 3, 0)
        system.fdatasync("x", fd)
        os.close(fd)

    assert all(files == {"a": NEW * 3} for files in left(tmp_path, work))


def test_each_sector_is_torn_from_its_neighbour_and_keeps_any_of_its_versions(tmp_path: Path) -> None:
    def work(folder: str) -> None:
        fd = opened(folder)
        system.pwrite("x", fd, NEW * 2, 0)
        system.pwrite("x", fd, NEWER * 2, 0)
        os.close(fd)

    found = {(files["a"][:512], files["a"][512:]) for files in left(tmp_path, work, cuts=600)}
    assert found == {(a, b) for a in (OLD, NEW, NEWER) for b in (OLD, NEW, NEWER)}


def test_half_of_a_sector_is_never_lost_alone(tmp_path: Path) -> None:
    def work(folder: str) -> None:
        fd = opened(folder)
        system.pwrite("x", fd, b"n" * 512, 256)
        os.close(fd)

    halves = {files["a"][:512] for files in left(tmp_path, work)}
    assert halves == {OLD, b"o" * 256 + b"n" * 256}


def test_later_writes_to_another_file_may_survive_earlier_ones(tmp_path: Path) -> None:
    def work(folder: str) -> None:
        first, second = opened(folder), opened(folder, "b")
        system.fsync("x", second)
        system.fsync_directory("x", folder)
        system.pwrite("x", first, NEW, 0)
        system.pwrite("x", second, NEW, 0)
        os.close(first)
        os.close(second)

    found = {(files["a"][:512], files["b"]) for files in left(tmp_path, work)}
    assert {(OLD, NEW), (NEW, b""), (OLD, b""), (NEW, NEW)} <= found


def test_a_file_has_its_length_of_the_last_sync_or_one_it_had_since(tmp_path: Path) -> None:
    def work(folder: str) -> None:
        fd = opened(folder)
        system.truncate("x", fd, 100)
        system.allocate("x", fd, 0, 2048)
        os.close(fd)

    found = left(tmp_path, work, cuts=100)
    assert {len(files["a"]) for files in found} == {1024, 100, 2048}
    assert all(not files["a"][1024:].strip(b"\0") for files in found)


def test_holes_and_zeroes_may_be_lost_as_writes_are(tmp_path: Path) -> None:
    def work(folder: str) -> None:
        fd = opened(folder)
        system.punch_hole("x", fd, 0, 512)
        os.close(fd)

    assert {files["a"][:512] for files in left(tmp_path, work)} == {OLD, bytes(512)}


def test_a_synced_file_may_lose_its_new_name_until_the_directory_is_synced(tmp_path: Path) -> None:
    def work(folder: str) -> None:
        fd = opened(folder, "b.tmp")
        system.pwrite("x", fd, NEW, 0)
        system.fsync("x", fd)
        os.close(fd)
        system.rename("x", os.path.join(folder, "b.tmp"), os.path.join(folder, "b"))

    found = left(tmp_path, work)
    assert {tuple(sorted(files)) for files in found} == {("a",), ("a", "b.tmp"), ("a", "b")}
    assert all(files.get("b", NEW) == NEW for files in found)


def test_a_file_replaced_by_the_book_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    def work(folder: str) -> None:
        system.replace_file("x", os.path.join(folder, "a"), NEW)

    assert all(files["a"] == NEW for files in left(tmp_path, work))


def test_a_removed_file_may_come_back(tmp_path: Path) -> None:
    def work(folder: str) -> None:
        system.unlink("x", os.path.join(folder, "a"))

    assert {tuple(files) for files in left(tmp_path, work)} == {(), ("a",)}


def test_stores_into_a_map_survive_by_sectors_and_wholly_once_synced(tmp_path: Path) -> None:
    page = mmap.PAGESIZE

    def work(folder: str) -> None:
        fd = opened(folder)
        system.allocate("x", fd, 0, 2 * page)
        shared = mmap.mmap(fd, 2 * page)
        shared[:512] = NEW
        shared[page : page + 1024] = NEW * 2
        system.sync_map("x", shared, 0, page)
        shared.close()
        os.close(fd)

    found = left(tmp_path, work)
    assert all(files["a"][:1024] == NEW + OLD for files in found)
    torn = {(files["a"][page : page + 512], files["a"][page + 512 : page + 1024]) for files in found}
    assert torn == {(a, b) for a in (bytes(512), NEW) for b in (bytes(512), NEW)}


def test_the_image_is_the_same_inode_and_its_mtime_is_durable_with_fsync(tmp_path: Path) -> None:
    for seed in range(CUTS // 4):
        folder, after = tmp_path / f"before{seed}", tmp_path / f"after{seed}"
        folder.mkdir()
        (folder / "a").write_bytes(OLD)
        with PowerLoss(str(folder), seed=seed) as power:
            fd = opened(str(folder))
            system.pwrite("x", fd, NEW, 0)
            system.fsync("x", fd)
            was = os.fstat(fd)
            os.close(fd)
            power.cut(str(after))
        now = os.stat(after / "a")
        assert (now.st_ino, now.st_mtime_ns) == (was.st_ino, was.st_mtime_ns)


def test_the_same_seed_gives_the_same_folder(tmp_path: Path) -> None:
    def work(folder: str) -> None:
        fd = opened(folder, "b")
        for number in range(20):
            system.pwrite("x", fd, bytes([number]) * 700, number * 300)
        os.close(fd)

    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    assert left(tmp_path / "1", work) == left(tmp_path / "2", work)


@pytest.mark.parametrize("change", ["content", "gone"])
def test_what_goes_past_the_seam_is_not_passed_over(tmp_path: Path, change: str) -> None:
    (tmp_path / "before").mkdir()
    path = tmp_path / "before" / "a"
    path.write_bytes(OLD)
    with PowerLoss(str(tmp_path / "before"), seed=1) as power:
        if change == "content":
            path.write_bytes(NEW)
        else:
            path.unlink()
        with pytest.raises(BypassError):
            power.cut(str(tmp_path / "after"))
