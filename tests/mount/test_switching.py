"""A file system that becomes another one under whoever has files open."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse.switching import Switching
from hvfuse.tracker.folder import Folder
from tests.mount.test_disks import code


class Two:
    """Two folders with a `disk` in each, and the file system that is one of them."""

    def __init__(self, root: Path) -> None:
        self.first, self.second = self._folder(root / "first", b"first"), self._folder(root / "second", b"second")
        self.fs = Switching(self.first)

    def _folder(self, path: Path, content: bytes) -> Folder:
        path.mkdir()
        (path / "disk").write_bytes(content)
        return Folder(os.open(path, os.O_RDONLY | os.O_DIRECTORY))

    def switch(self) -> None:
        with self.fs.standstill():
            self.fs.switch(self.second)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    yield Two(tmp_path)


def content(file: object) -> bytes:
    buffer = bytearray(10)
    return bytes(buffer[: file.read_into(memoryview(buffer), 0)])  # type: ignore[attr-defined]


def test_an_open_file_is_the_second_ones_afterwards(two: Two, tmp_path: Path) -> None:
    file = two.fs.open("/disk", os.O_RDWR)
    assert content(file) == b"first"
    two.switch()
    assert content(file) == b"second"
    assert file.write(memoryview(b"S"), 0) == 1
    file.fsync(True)
    file.truncate(3)
    file.fallocate(0, 0, 8)
    assert (file.stat().st_size, file.lseek(0, os.SEEK_DATA)) == (8, 0)
    assert (tmp_path / "second/disk").read_bytes() == b"Sec" + bytes(5)
    assert (tmp_path / "first/disk").read_bytes() == b"first"


def test_what_made_or_emptied_a_file_is_not_done_again(two: Two, tmp_path: Path) -> None:
    (tmp_path / "second/new").write_bytes(b"there")
    emptied = two.fs.open("/disk", os.O_WRONLY | os.O_TRUNC)
    made = two.fs.create("/new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, uid=0, gid=0)
    two.switch()
    assert (content(made), (tmp_path / "second/disk").read_bytes()) == (b"there", b"second")
    assert code(lambda: content(emptied)) == errno.EBADF  # it was opened for writing, and is so again


def test_a_file_that_is_not_there_any_more_gives_eio(
    two: Two, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = two.fs.open("/disk", os.O_RDWR)
    other = two.fs.open("/disk", os.O_RDWR)
    (tmp_path / "second/disk").unlink()
    two.switch()
    assert code(lambda: content(file)) == errno.EIO
    assert code(lambda: file.fsync(True)) == errno.EIO
    file.release()
    other.release()
    assert "cannot be opened again" in caplog.text


def test_an_open_directory_lists_the_second_one(two: Two, tmp_path: Path) -> None:
    (tmp_path / "second/more").touch()
    directory = two.fs.open_directory("/")
    assert sorted(name for name, _, _ in directory.entries()) == [".", "..", "disk"]
    two.switch()
    assert sorted(name for name, _, _ in directory.entries()) == [".", "..", "disk", "more"]
    directory.fsync(False)
    directory.release()


def test_attributes_of_an_open_file_are_those_of_the_one_beneath(two: Two, tmp_path: Path) -> None:
    file = two.fs.open("/disk", os.O_RDWR)
    for name in ("first", "second"):
        two.fs.chmod(file, 0o640)
        two.fs.chown(file, 107, -1)
        two.fs.utimens(file, (5, 0), (6, 0))
        found = two.fs.stat(file)
        assert found == two.fs.stat("/disk")
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_mtime) == (0o640, 107, 6)
        assert (tmp_path / name / "disk").stat().st_uid == 107
        if name == "first":
            two.switch()


def test_nothing_is_between_a_request_and_the_second_one_afterwards(two: Two) -> None:
    file = two.fs.open("/disk", os.O_RDWR)
    two.switch()
    later = two.fs.open("/disk", os.O_RDWR)
    assert file.write.__self__ is file.file  # type: ignore[attr-defined]
    assert file.release.__self__ is file.file  # type: ignore[attr-defined]
    assert type(later) is type(file.file)  # type: ignore[attr-defined]
    assert two.fs.open.__self__ is two.second  # type: ignore[attr-defined]
    assert two.fs.unlink.__self__ is two.second  # type: ignore[attr-defined]


def test_files_that_were_closed_before_are_not_opened_again(two: Two) -> None:
    two.fs.open("/disk", os.O_RDWR).release()
    two.fs.open_directory("/").release()
    two.switch()
    assert not two.second._open


@pytest.mark.parametrize("kind", ["open file", "path", "opening"])
def test_a_request_that_comes_meanwhile_waits_and_gets_the_second_one(two: Two, kind: str) -> None:
    file = two.fs.open("/disk", os.O_RDWR)
    found: list[object] = []
    requests = {
        "open file": lambda: found.append(content(file)),
        "path": lambda: found.append(b"x" * two.fs.stat("/disk").st_size),
        "opening": lambda: found.append(content(two.fs.open("/disk", os.O_RDONLY))),
    }
    with two.fs.standstill():
        thread = threading.Thread(target=requests[kind])
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        two.fs.switch(two.second)
    thread.join(10)
    assert found == [b"xxxxxx" if kind == "path" else b"second"]
    assert not two.fs.files


def test_a_request_under_way_is_waited_for(two: Two) -> None:
    entered, go_on, order = threading.Event(), threading.Event(), []
    inner = two.first.stat

    def slowly(node: object) -> object:
        entered.set()
        assert go_on.wait(10)
        order.append("request")
        return inner(node)  # type: ignore[arg-type]

    two.first.stat = slowly  # type: ignore[assignment,method-assign]
    thread = threading.Thread(target=two.fs.stat, args=("/disk",))
    thread.start()
    assert entered.wait(10)

    def switch() -> None:
        two.switch()
        order.append("switch")

    switcher = threading.Thread(target=switch)
    switcher.start()
    switcher.join(0.05)
    assert switcher.is_alive()
    go_on.set()
    thread.join(10)
    switcher.join(10)
    assert order == ["request", "switch"]
