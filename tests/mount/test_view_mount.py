"""A recovery point's disks in a mount: whole file systems on them, and the point beneath left alone."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from hvfuse import mountpoint
from tests.mount.conftest import Mounted, world
from tests.mount.test_disks import (
    INSERT,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    Exercised,
    code,
    fallocate,
    steps,
)

pytestmark = pytest.mark.mount

MIB = 1 << 20


class ViewWorld:
    """Files that stand for a point's disks, and the mount of their view."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted = mounted
        self.point, self.mnt, self.overlays = mounted.folder, mounted.mnt, mounted.root / "overlays"

    def start(self, *, overlays: bool = True, afterwards: str = "keep") -> None:
        place = self.overlays if overlays else "none"
        self.mounted.run("tests.mount.serving_view", self.point, self.mnt, place, afterwards)

    def stop(self) -> None:
        mountpoint.unmount(str(self.mnt))
        self.mounted.expect("ended")

    @contextmanager
    def point_unchanged(self) -> Iterator[None]:
        before = self._digests()
        yield
        assert self._digests() == before

    def _digests(self) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.point.iterdir()}


@pytest.fixture
def view() -> Iterator[ViewWorld]:
    """Not yet mounted: `os.raw`, 32 MiB with data in its second and third, and `small.raw` of 5000 bytes."""
    with world() as mounted:
        point = ViewWorld(mounted)
        with (point.point / "os.raw").open("wb") as file:
            file.truncate(32 * MIB)
            os.pwrite(file.fileno(), b"\x11" * (2 * MIB), MIB)
        (point.point / "small.raw").write_bytes(b"s" * 5000)
        yield point
        assert "Traceback" not in mounted.errors(), mounted.errors()


def test_the_disks_are_shown_as_the_point_holds_them(view: ViewWorld) -> None:
    view.start()
    assert sorted(os.listdir(view.mnt)) == ["os.raw", "small.raw"]
    status = (view.mnt / "small.raw").stat()
    assert (status.st_size, stat.S_ISREG(status.st_mode)) == (5000, True)
    for name in ("os.raw", "small.raw"):
        assert (view.mnt / name).read_bytes() == (view.point / name).read_bytes()


def test_writes_stay_in_the_view_and_are_kept_for_the_next_one(view: ViewWorld) -> None:
    with view.point_unchanged():
        view.start(afterwards="keep")
        with (view.mnt / "os.raw").open("r+b") as file:
            os.pwrite(file.fileno(), b"changed", MIB + 1)
        view.stop()
    view.start(afterwards="drop")
    assert (view.mnt / "os.raw").read_bytes()[MIB : MIB + 9] == b"\x11changed\x11"
    view.stop()
    assert not view.overlays.exists()
    view.start()
    assert (view.mnt / "os.raw").read_bytes() == (view.point / "os.raw").read_bytes()


def test_what_was_synced_survives_a_kill(view: ViewWorld) -> None:
    view.start()
    fd = os.open(view.mnt / "os.raw", os.O_RDWR)
    os.pwrite(fd, b"synced", 0)
    os.fsync(fd)
    os.close(fd)
    assert view.mounted.process is not None
    view.mounted.process.kill()
    view.mounted.process.wait()
    assert mountpoint.clear_dead_mount(str(view.mnt))
    view.start()
    assert (view.mnt / "os.raw").read_bytes()[:6] == b"synced"


def test_nothing_can_be_made_or_removed_beside_the_disks(view: ViewWorld) -> None:
    view.start()
    disk, new = view.mnt / "os.raw", view.mnt / "new"
    actions: list[Callable[[], object]] = [
        new.touch,
        new.mkdir,
        disk.unlink,
        lambda: disk.rename(new),
        lambda: disk.rename(view.mnt / "small.raw"),
        lambda: os.link(disk, new),
        lambda: os.symlink("x", new),
        lambda: os.mkfifo(new),
        lambda: os.chmod(view.mnt, 0o700),
    ]
    assert {code(action) for action in actions} == {errno.EROFS}
    assert code(new.stat) == errno.ENOENT
    assert code(lambda: os.setxattr(disk, "user.a", b"")) == errno.EOPNOTSUPP
    with disk.open("rb"):
        assert code(disk.unlink) == errno.EROFS


def test_a_read_only_view_refuses_writes(view: ViewWorld) -> None:
    view.start(overlays=False)
    disk = view.mnt / "os.raw"
    assert code(lambda: os.open(disk, os.O_RDWR)) == errno.EROFS
    assert code(lambda: os.truncate(disk, 0)) == errno.EROFS
    assert code(lambda: disk.chmod(0o600)) == errno.EROFS
    assert disk.read_bytes() == (view.point / "os.raw").read_bytes()
    assert not view.overlays.exists()


def test_owner_mode_and_times_can_be_set_for_the_mount(view: ViewWorld) -> None:
    view.start()
    disk = view.mnt / "os.raw"
    disk.chmod(0o640)
    os.chown(disk, 107, -1)
    os.utime(disk, ns=(5, 6))
    status = disk.stat()
    assert (oct(status.st_mode), status.st_uid, status.st_gid) == ("0o100640", 107, 0)
    assert (status.st_atime_ns, status.st_mtime_ns) == (5, 6)
    with disk.open("r+b", buffering=0) as file:
        file.write(b"x")
    assert disk.stat().st_mtime_ns > 6


def test_holes_are_found_in_point_and_overlay(view: ViewWorld) -> None:
    view.start()
    disk = view.mnt / "os.raw"
    assert fallocate(disk, PUNCH_HOLE | KEEP_SIZE, MIB, MIB) == 0
    with disk.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"y" * 4096, 16 * MIB)
        found = [
            os.lseek(file.fileno(), 0, os.SEEK_DATA),
            os.lseek(file.fileno(), 2 * MIB, os.SEEK_HOLE),
            os.lseek(file.fileno(), 3 * MIB, os.SEEK_DATA),
            os.lseek(file.fileno(), 16 * MIB, os.SEEK_HOLE),
            os.lseek(file.fileno(), 20 * MIB, os.SEEK_HOLE),
        ]
        assert found == [2 * MIB, 3 * MIB, 16 * MIB, 16 * MIB + 4096, 20 * MIB]
        assert code(lambda: os.lseek(file.fileno(), 20 * MIB, os.SEEK_DATA)) == errno.ENXIO
    assert fallocate(disk, INSERT, 0, MIB) == errno.EOPNOTSUPP
    assert fallocate(disk, ZERO_RANGE, 31 * MIB, 2 * MIB) == 0
    assert fallocate(disk, 0, 33 * MIB, MIB) == 0
    assert disk.stat().st_size == 34 * MIB


def test_direct_io_and_the_disks_odd_end(view: ViewWorld) -> None:
    view.start()
    fd = os.open(view.mnt / "small.raw", os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as buffer:
        assert os.preadv(fd, [buffer], 4096) == 904
        assert buffer[:904] == b"s" * 904
        assert os.pwritev(fd, [memoryview(buffer)[:512]], 4608) == 512
    os.close(fd)
    assert (view.mnt / "small.raw").stat().st_size == 5120


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=steps)
def test_any_order_of_operations_gives_the_same_bytes(
    shared_view: ViewWorld, steps: list[tuple[str, int, int, int]]
) -> None:
    file = Exercised(shared_view.mnt / "os.raw")
    try:
        for step in steps:
            file.step(*step)
        os.fsync(file.fd)
        assert file.path.read_bytes() == file.model
    finally:
        os.close(file.fd)


@pytest.fixture(scope="module")
def shared_view() -> Iterator[ViewWorld]:
    with world() as mounted:
        (mounted.folder / "os.raw").write_bytes(bytes(range(256)) * 1024)
        view = ViewWorld(mounted)
        view.start()
        yield view


@pytest.mark.qemu
@pytest.mark.parametrize(("name", "driver"), [("disk.img", "raw"), ("disk.vhd", "vpc")])
def test_qemu_reads_and_writes_a_view(view: ViewWorld, name: str, driver: str) -> None:
    point, disk = view.point / name, view.mnt / name

    def qemu_io(path: Path, *commands: str) -> None:
        arguments = [part for command in commands for part in ("-c", command)]
        done = subprocess.run(
            ["qemu-io", "-f", driver, "-t", "none", *arguments, str(path)], capture_output=True, text=True, check=True
        )
        assert "verification failed" not in done.stdout, done.stdout

    subprocess.run(["qemu-img", "create", "-q", "-f", driver, str(point), "64M"], check=True)
    qemu_io(point, "write -P 0x11 1M 1M", "flush")
    with view.point_unchanged():
        view.start()
        compare = ["qemu-img", "compare", "-q", "-f", driver, "-F", driver, str(point), str(disk)]
        subprocess.run(compare, check=True)
        qemu_io(disk, "write -P 0x22 1536k 2M", "discard 1M 64k", "write -z 40M 1M", "flush")
        qemu_io(disk, "read -P 0x11 1088k 448k", "read -P 0x22 1536k 2M", "read -P 0 40M 1M")
        assert subprocess.run(compare, check=False).returncode == 1


def run(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


@contextmanager
def loop_device(path: Path) -> Iterator[str]:
    device = run("losetup", "--find", "--show", path).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


def test_a_file_system_lives_on_a_view(view: ViewWorld) -> None:
    files, disk = view.mounted.root / "files", view.mnt / "os.raw"
    files.mkdir()
    contents = {f"{n:03}": os.urandom(n * 997) for n in range(120)}
    with view.point_unchanged():
        view.start()
        run("mkfs.ext4", "-q", "-F", disk)
        with loop_device(disk) as device:
            run("mount", device, files)
            try:
                for name, content in contents.items():
                    (files / name).write_bytes(content)
                for name in list(contents)[::3]:
                    (files / name).unlink()
                    del contents[name]
                run("fstrim", files)
            finally:
                run("umount", files)
        run("e2fsck", "-fn", disk)
        view.stop()
    view.start()
    with loop_device(disk) as device:
        run("mount", "-o", "ro", device, files)
        try:
            assert {name: (files / name).read_bytes() for name in contents} == contents
        finally:
            run("umount", files)
    run("e2fsck", "-fn", disk)
