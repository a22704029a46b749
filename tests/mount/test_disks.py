"""A VM's disks in the mount: what reaches the log, what is refused, what is not shown."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.mount.conftest import Mounted, world

pytestmark = pytest.mark.mount

MIB = 1 << 20
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT, UNSHARE = 1, 2, 8, 16, 32, 64
HIDDEN = ("os.vhd.0000000001.hrl", "os.vhd.0000000001.hrc", "os.vhd.spare0.hrl", "os.vhd.hvt", "os.vhd.hvt1")


@pytest.fixture
def disk(mounted: Mounted) -> Path:
    """The disk `os.vhd`, all zeroes, and its journal empty."""
    path = mounted.mnt / "os.vhd"
    os.truncate(path, 0)
    os.truncate(path, 8 * MIB)
    mounted.clear_journal("os.vhd")
    return path


def fallocate(path: Path, mode: int, offset: int, length: int) -> int:
    """fallocate(2); returns the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file:
        done = libc.fallocate(file.fileno(), mode, ctypes.c_int64(offset), ctypes.c_int64(length))
        return ctypes.get_errno() if done else 0


def code(action: Callable[[], object]) -> int:
    with pytest.raises(OSError) as caught:
        action()
    return caught.value.errno or 0


def test_writes_go_through_the_log_and_reads_do_not(mounted: Mounted, disk: Path) -> None:
    with disk.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x" * 4096, 8192)
        assert os.pread(file.fileno(), 4096, 8192) == b"x" * 4096
        os.fdatasync(file.fileno())
        os.fsync(file.fileno())
    assert mounted.journal("os.vhd") == ["write 8192 4096", "sync True", "sync False"]
    assert (mounted.folder / "os.vhd").read_bytes()[8192 : 8192 + 4096] == b"x" * 4096


def test_a_write_of_a_mebibyte_is_one_write(mounted: Mounted, disk: Path) -> None:
    with disk.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), b"x" * MIB, 0) == MIB
    assert mounted.journal("os.vhd") == [f"write 0 {MIB}"]


@pytest.mark.parametrize("flag", ["O_SYNC", "O_DSYNC"])
def test_a_synchronous_descriptor_syncs_each_write(mounted: Mounted, disk: Path, flag: str) -> None:
    fd = os.open(disk, os.O_WRONLY | getattr(os, flag))
    os.write(fd, b"x" * 512)
    os.close(fd)
    assert mounted.journal("os.vhd")[0] == "write 0 512"
    assert any(line.startswith("sync") for line in mounted.journal("os.vhd")[1:])


def test_closing_is_not_syncing(mounted: Mounted, disk: Path) -> None:
    with disk.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x", 0)
    assert mounted.journal("os.vhd") == ["write 0 1"]


def test_mapped_changes_reach_the_log_at_msync(mounted: Mounted, disk: Path) -> None:
    with disk.open("r+b") as file, mmap.mmap(file.fileno(), 8 * MIB) as view:
        view[4096:4100] = b"abcd"
        view.flush()
        assert mounted.journal("os.vhd")[0] == "write 4096 4096"
    assert (mounted.folder / "os.vhd").read_bytes()[4096:4100] == b"abcd"


def test_growing_by_a_write_is_no_resize(mounted: Mounted, disk: Path) -> None:
    with disk.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x" * 512, 8 * MIB)
    assert mounted.journal("os.vhd") == [f"write {8 * MIB} 512"]
    assert disk.stat().st_size == 8 * MIB + 512


def test_truncate_and_ftruncate_are_resizes(mounted: Mounted, disk: Path) -> None:
    os.truncate(disk, 4 * MIB)
    with disk.open("r+b") as file:
        os.ftruncate(file.fileno(), 6 * MIB)
    assert mounted.journal("os.vhd") == [f"truncate {4 * MIB}", f"truncate {6 * MIB}"]


@pytest.mark.parametrize(
    ("mode", "offset", "expected"),
    [
        (PUNCH_HOLE | KEEP_SIZE, MIB, [f"trim {MIB} {MIB}"]),
        (PUNCH_HOLE | KEEP_SIZE, 512, [f"trim 512 {MIB}"]),
        (ZERO_RANGE, MIB, [f"zero {MIB} {MIB}"]),
        (ZERO_RANGE | KEEP_SIZE, 8 * MIB - 512, [f"zero {8 * MIB - 512} {MIB}"]),
        (ZERO_RANGE, 8 * MIB, [f"truncate {9 * MIB}", f"zero {8 * MIB} {MIB}"]),
        (0, MIB, []),
        (KEEP_SIZE, MIB, []),
        (0, 8 * MIB, [f"truncate {9 * MIB}"]),
    ],
)
def test_what_fallocate_means_for_the_log(
    mounted: Mounted, disk: Path, mode: int, offset: int, expected: list[str]
) -> None:
    with disk.open("r+b", buffering=0) as file:
        for at in range(0, 8 * MIB, MIB):
            os.pwrite(file.fileno(), b"\xaa" * MIB, at)
    mounted.clear_journal("os.vhd")
    size = 8 * MIB if mode & KEEP_SIZE else max(8 * MIB, offset + MIB)
    model = bytearray(b"\xaa" * 8 * MIB + bytes(size - 8 * MIB))
    if mode & (PUNCH_HOLE | ZERO_RANGE):
        end = min(offset + MIB, size)
        model[offset:end] = bytes(end - offset)
    assert fallocate(disk, mode, offset, MIB) == 0
    assert mounted.journal("os.vhd") == expected
    assert disk.read_bytes() == model


@pytest.mark.parametrize("mode", [COLLAPSE, INSERT, UNSHARE])
def test_other_modes_of_fallocate_are_not_supported(mounted: Mounted, disk: Path, mode: int) -> None:
    assert fallocate(disk, mode, MIB, MIB) == errno.EOPNOTSUPP
    assert mounted.journal("os.vhd") == []


def test_discarding_frees_the_space_of_the_image(mounted: Mounted, disk: Path) -> None:
    disk_in_folder = mounted.folder / "os.vhd"
    with disk.open("r+b") as file:
        file.write(b"x" * MIB)
    assert disk.stat().st_blocks * 512 >= MIB
    fallocate(disk, PUNCH_HOLE | KEEP_SIZE, 0, MIB)
    assert disk.stat().st_blocks == disk_in_folder.stat().st_blocks == 0


def test_holes_of_a_disk_are_found(disk: Path) -> None:
    with disk.open("r+b") as file:
        os.pwrite(file.fileno(), b"x" * 4096, MIB)
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == MIB
        assert os.lseek(file.fileno(), MIB, os.SEEK_HOLE) == MIB + 4096
        assert code(lambda: os.lseek(file.fileno(), 2 * MIB, os.SEEK_DATA)) == errno.ENXIO


@pytest.mark.parametrize("size", [512, 4096])
def test_direct_io_works_in_small_sectors(mounted: Mounted, disk: Path, size: int) -> None:
    fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, size) as buffer:
        buffer[:] = b"d" * size
        assert os.pwritev(fd, [buffer], 3 * size) == size
        buffer[:] = bytes(size)
        assert os.preadv(fd, [buffer], 3 * size) == size
        assert buffer[:] == b"d" * size
        assert os.preadv(fd, [buffer], 8 * MIB) == 0
    os.close(fd)
    assert mounted.journal("os.vhd") == [f"write {3 * size} {size}"]


def test_several_descriptors_see_one_disk(mounted: Mounted, disk: Path) -> None:
    with disk.open("r+b", buffering=0) as one, disk.open("r+b", buffering=0) as two:
        one.write(b"from one")
        assert two.read(8) == b"from one"
        assert mounted.journals.joinpath("os.vhd").read_text().count("opened") == 2
    assert disk.read_bytes()[:8] == b"from one"


def test_a_disk_cannot_be_lost_or_bypassed(mounted: Mounted, disk: Path) -> None:
    plain = mounted.mnt / "plain"
    plain.write_text("x")
    assert code(disk.unlink) == errno.EBUSY
    assert code(lambda: os.rename(disk, mounted.mnt / "elsewhere")) == errno.EBUSY
    assert code(lambda: os.rename(plain, disk)) == errno.EBUSY
    assert code(lambda: os.rename(disk, mounted.mnt / "data.raw")) == errno.EBUSY
    assert code(lambda: os.link(disk, mounted.mnt / "second")) == errno.EBUSY
    assert code(lambda: os.open(disk, os.O_WRONLY | os.O_TRUNC)) == errno.EBUSY
    assert code(lambda: os.open(disk, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)) == errno.EBUSY
    with disk.open("rb"):  # libfuse treats a file that is open in another way
        assert code(disk.unlink) == errno.EBUSY
        assert code(lambda: os.rename(plain, disk)) == errno.EBUSY
    assert disk.stat().st_size == 8 * MIB
    assert mounted.journal("os.vhd") == []


def test_a_disk_has_owner_mode_times_and_attributes(mounted: Mounted, disk: Path) -> None:
    disk.chmod(0o640)
    os.chown(disk, 12, 34)
    os.utime(disk, ns=(5, 6))
    os.setxattr(disk, "user.label", b"web01")
    status = (mounted.folder / "os.vhd").stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid, status.st_mtime_ns) == (0o640, 12, 34, 6)
    assert os.getxattr(disk, "user.label") == b"web01"
    assert disk.stat().st_mtime_ns == 6
    os.chown(disk, 0, 0)


@pytest.mark.parametrize("name", HIDDEN)
def test_the_trackers_files_are_not_there(mounted: Mounted, name: str) -> None:
    (mounted.folder / name).write_text("log")
    path, plain = mounted.mnt / name, mounted.mnt / "plain"
    plain.write_text("x")
    assert name not in os.listdir(mounted.mnt)
    assert code(path.read_text) == errno.ENOENT
    assert code(path.stat) == errno.ENOENT
    assert code(path.unlink) == errno.ENOENT
    assert code(lambda: os.rename(path, mounted.mnt / "shown")) == errno.ENOENT
    assert code(lambda: path.write_text("x")) == errno.EPERM
    assert code(path.mkdir) == errno.EPERM
    assert code(lambda: os.symlink("x", path)) == errno.EPERM
    assert code(lambda: os.mkfifo(path)) == errno.EPERM
    assert code(lambda: os.link(plain, path)) == errno.EPERM
    assert code(lambda: os.rename(plain, path)) == errno.EPERM
    assert (mounted.folder / name).read_text() == "log"


def test_below_a_subfolder_no_name_is_reserved(mounted: Mounted) -> None:
    folder = mounted.mnt / "sub"
    folder.mkdir()
    (folder / "a.vhd.hvt").write_text("x")
    assert os.listdir(folder) == ["a.vhd.hvt"]
    assert code(lambda: os.rename(folder / "a.vhd.hvt", mounted.mnt / "a.vhd.hvt")) == errno.EPERM
    shutil.rmtree(folder)


def test_a_symlink_to_a_disk_leads_to_its_log(mounted: Mounted, disk: Path) -> None:
    link = mounted.mnt / "link.vhd"
    link.symlink_to("os.vhd")
    with link.open("r+b", buffering=0) as file:
        file.write(b"x")
    link.unlink()
    assert mounted.journal("os.vhd") == ["write 0 1"]


@pytest.mark.qemu
@pytest.mark.parametrize(("name", "driver"), [("data.raw", "raw"), ("vpc.vhd", "vpc")])
def test_qemu_reads_back_what_it_wrote(name: str, driver: str) -> None:
    with world() as fresh:
        create = ["qemu-img", "create", "-q", "-f", driver, str(fresh.folder / name), "64M"]
        subprocess.run(create, check=True)
        fresh.start()
        commands = ["write -P 0xaa 64k 256k", "write -z 100k 8k", "discard 128k 64k", "write -P 0x5c 33M 1M", "flush"]
        checks = ["read -P 0xaa 64k 36k", "read -P 0 100k 8k", "read -P 0x5c 33M 1M", "read -P 0 40M 4k"]
        for batch in (commands, checks):
            for cache in ("none", "writeback"):
                arguments = [part for command in batch for part in ("-c", command)]
                done = subprocess.run(
                    ["qemu-io", "-f", driver, "-t", cache, *arguments, str(fresh.mnt / name)],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                assert "verification failed" not in done.stdout, done.stdout
        paths = (str(path / name) for path in (fresh.mnt, fresh.folder))
        subprocess.run(["qemu-img", "compare", "-q", "-f", driver, "-F", driver, *paths], check=True)


SIZE = 256 << 10

offsets = st.integers(0, SIZE) | st.integers(0, SIZE // 4096).map(lambda n: n * 4096)
counts = st.integers(1, 20_000) | st.sampled_from([512, 4096, 65536])
steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "read", "punch", "zero", "truncate", "map", "map_read", "reopen", "append"]),
        offsets,
        counts,
        st.integers(1, 255),
    ),
    min_size=5,
    max_size=40,
)


class Exercised:
    """A file in the mount and what it should hold."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = bytearray()
        os.truncate(path, 0)
        self.fd = os.open(path, os.O_RDWR)

    def step(self, what: str, offset: int, length: int, byte: int) -> None:
        model, data = self.model, bytes([byte]) * length
        inside = min(offset, len(model)), min(offset + length, len(model))
        if what == "append":
            offset, what = len(model), "write"
        if what == "write":
            assert os.pwrite(self.fd, data, offset) == length
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = data
        elif what == "read":
            assert os.pread(self.fd, length, offset) == model[offset : offset + length]
        elif what in ("punch", "zero"):
            mode = KEEP_SIZE | (PUNCH_HOLE if what == "punch" else ZERO_RANGE)
            assert fallocate(self.path, mode, offset, length) == 0
            model[slice(*inside)] = bytes(inside[1] - inside[0])
        elif what == "truncate":
            os.ftruncate(self.fd, offset)
            del model[offset:]
            model.extend(bytes(offset - len(model)))
        elif what == "reopen":
            os.close(self.fd)
            self.fd = os.open(self.path, os.O_RDWR)
        elif inside[0] < inside[1]:
            with mmap.mmap(self.fd, len(model)) as view:
                if what == "map":
                    view[slice(*inside)] = data[: inside[1] - inside[0]]
                    model[slice(*inside)] = data[: inside[1] - inside[0]]
                else:
                    assert view[slice(*inside)] == model[slice(*inside)]


@pytest.fixture(scope="module")
def names(mounted: Mounted) -> Iterator[tuple[Path, Path]]:
    (mounted.mnt / "fsx").touch()
    yield mounted.mnt / "fsx", mounted.mnt / "data.raw"


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=steps, tracked=st.booleans())
def test_any_order_of_operations_gives_the_same_bytes(
    mounted: Mounted, names: tuple[Path, Path], steps: list[tuple[str, int, int, int]], tracked: bool
) -> None:
    file = Exercised(names[tracked])
    try:
        for step in steps:
            file.step(*step)
        os.fsync(file.fd)
        beneath = (mounted.folder / file.path.name).read_bytes()
        assert file.path.read_bytes() == file.model == beneath
        assert os.fstat(file.fd).st_size == len(file.model)
    finally:
        os.close(file.fd)
