"""What hvfuse makes, others read and write, and the other way round; and what a file is taken for."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from hvfuse.errors import BusyError, CorruptError, HvfuseError, NotFoundError, UnsupportedError, UsageError
from hvfuse.formats.image import (
    ImageFormat,
    check_creatable,
    create_image,
    is_disk_name,
    named,
    open_image,
    probe,
    probe_for_tracking,
)
from hvfuse.formats.vhd_layout import FOOTER_SIZE, HEADER_SIZE, MAX_SIZE, SECTOR, checksum, geometry
from tests.formats.disk_samples import (
    BLOCK,
    QEMU_FORMAT,
    content,
    make,
    pattern,
    qemu_content,
    qemu_io,
    run,
    small_dynamic,
)

MIB = 1 << 20
WRITABLE = [ImageFormat.RAW, ImageFormat.VHD_FIXED, ImageFormat.VHD_DYNAMIC]
VHDS = {"dynamic": ImageFormat.VHD_DYNAMIC, "fixed": ImageFormat.VHD_FIXED}


@pytest.mark.qemu
@pytest.mark.parametrize("image_format", WRITABLE)
@pytest.mark.parametrize("size", [MIB, 5 * MIB + SECTOR, 130 << 30, 2040 << 30])
def test_qemu_sees_a_disk_of_ours_in_its_exact_size_and_writes_into_it(
    tmp_path: Path, image_format: ImageFormat, size: int
) -> None:
    path = tmp_path / "ours"
    create_image(str(path), size, image_format)
    told = json.loads(run("qemu-img", "info", "--output=json", "-f", QEMU_FORMAT[image_format], path))
    assert told["virtual-size"] == size
    qemu_io(path, image_format, "write -P 170 512k 1k", f"write -P 187 {size - 512} 512", f"read -P 0 0 {512 << 10}")
    disk = open_image(str(path), writable=True)
    assert disk.size == size
    assert disk.pread((512 << 10) - 1, 1026) == b"\0" + b"\xaa" * 1024 + b"\0"
    assert disk.pread(size - 513, 513) == b"\0" + b"\xbb" * 512
    disk.pwrite(size - 400, b"\x11" * 400)
    disk.trim(512 << 10, 512)
    disk.close()
    qemu_io(
        path, image_format, "read -P 0 512k 512", f"read -P 17 {size - 400} 400", f"read -P 170 {(512 << 10) + 512} 512"
    )


@pytest.mark.qemu
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("force_size", ["on", "off"])
def test_a_disk_of_qemus_is_read_and_written_as_qemu_does(tmp_path: Path, subformat: str, force_size: str) -> None:
    path = tmp_path / "theirs.vhd"
    options = f"subformat={subformat},force_size={force_size}"
    run("qemu-img", "create", "-q", "-f", "vpc", "-o", options, path, "9M")
    told = json.loads(run("qemu-img", "info", "--output=json", "-f", "vpc", path))
    qemu_io(path, VHDS[subformat], "write -P 1 1M 64k", "write -P 2 7M 2M")
    info = probe(str(path))
    assert (info.format, info.virtual_size) == (VHDS[subformat], told["virtual-size"])
    assert not info.damage
    assert content(path) == qemu_content(path, VHDS[subformat])
    disk = open_image(str(path), writable=True)
    disk.pwrite(4 * MIB - 9, pattern(3 * MIB))
    disk.zero(MIB + 1000, 5000)
    expected = disk.pread(0, disk.size)
    disk.close()
    assert qemu_content(path, VHDS[subformat]) == expected


@pytest.mark.qemu
@pytest.mark.parametrize("size", ["1M", "10M", "300M", "700M", "3G", "40G"])
def test_our_geometry_is_qemus(tmp_path: Path, size: str) -> None:
    path = tmp_path / "theirs.vhd"
    run("qemu-img", "create", "-q", "-f", "vpc", "-o", "subformat=dynamic", path, size)
    info = probe(str(path))
    assert info.virtual_size is not None
    assert info.details["geometry"] == str(geometry(info.virtual_size))


@pytest.mark.qemu
@pytest.mark.parametrize("image_format", [ImageFormat.VHD_DYNAMIC, ImageFormat.VHD_FIXED])
def test_libvhdi_sees_what_we_wrote(tmp_path: Path, image_format: ImageFormat) -> None:
    path = tmp_path / "ours.vhd"
    create_image(str(path), 5 * MIB, image_format)
    told = run("vhdiinfo", path)
    assert "Dynamic" in told if image_format is ImageFormat.VHD_DYNAMIC else "Fixed" in told
    assert f"({5 * MIB} bytes)" in told


def test_a_sector_whose_bit_is_clear_reads_as_zeroes_until_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "partial.vhd"
    model = bytearray(small_dynamic(path))
    with path.open("r+b") as file:  # the first block in the file is the disk's block 7
        file.seek(FOOTER_SIZE + HEADER_SIZE + 512)
        file.write(bytes([0b10110111]))
    for sector in (1, 4):
        model[7 * BLOCK + sector * 512 : 7 * BLOCK + sector * 512 + 512] = bytes(512)
    assert content(path) == model
    disk = open_image(str(path), writable=True)
    assert disk.pread(7 * BLOCK + 700, 500) == model[7 * BLOCK + 700 :][:500]
    disk.pwrite(7 * BLOCK + 600, b"x")
    model[7 * BLOCK + 600] = ord("x")
    assert disk.pread(0, disk.size) == model
    disk.close()
    assert content(path) == model == qemu_content(path, ImageFormat.VHD_DYNAMIC)


def test_zeroes_written_where_no_block_is_take_no_block(tmp_path: Path) -> None:
    path = tmp_path / "empty.vhd"
    make(path, 10 * BLOCK, ImageFormat.VHD_DYNAMIC)
    before = path.read_bytes()
    disk = open_image(str(path), writable=True)
    disk.pwrite(0, bytes(10 * BLOCK))
    disk.zero(0, 10 * BLOCK)
    disk.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("image_format", WRITABLE)
def test_a_range_outside_the_disk_is_refused_by_every_verb(tmp_path: Path, image_format: ImageFormat) -> None:
    path = tmp_path / "disk"
    make(path, 2 * BLOCK, image_format)
    disk = open_image(str(path), writable=True)
    for offset, length in ((-1, 1), (2 * BLOCK, 1), (BLOCK, BLOCK + 1), (1 << 62, 1 << 62), (0, -1)):
        for verb in (disk.pread, disk.trim, disk.zero, lambda at, n: list(disk.extents(at, at + n))):
            with pytest.raises(UsageError):
                verb(offset, length)
        if length >= 0:
            with pytest.raises(UsageError):
                disk.pwrite(offset, bytes(min(length, 3 * BLOCK)))
    assert disk.pread(2 * BLOCK, 0) == b""
    disk.close()
    assert content(path) == bytes(2 * BLOCK)


FOREIGN = [
    ("qcow2", "a qcow2"),
    ("qed", "a QED"),
    ("vmdk", "a VMDK"),
    ("vdi", "a VDI"),
    ("parallels", "a Parallels"),
]


@pytest.mark.qemu
@pytest.mark.parametrize(("qemu_format", "named_as"), FOREIGN)
@pytest.mark.parametrize("suffix", [".img", ".vhd", ".vhdx", ""])
def test_a_foreign_image_is_refused_by_its_name_whatever_the_files(
    tmp_path: Path, qemu_format: str, named_as: str, suffix: str
) -> None:
    path = tmp_path / f"foreign{suffix}"
    run("qemu-img", "create", "-q", "-f", qemu_format, path, "1M")
    for look in (probe, probe_for_tracking, open_image):
        with pytest.raises(UnsupportedError, match=named_as) as raised:
            look(str(path))
        assert raised.value.hint


@pytest.mark.qemu
def test_a_vhdx_is_recognised_and_tracked_but_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    run("qemu-img", "create", "-q", "-f", "vhdx", path, "1M")
    info = probe_for_tracking(str(path))
    assert (info.format, info.virtual_size, info.file_size) == (ImageFormat.VHDX, None, path.stat().st_size)
    with pytest.raises(UnsupportedError, match="VHDX"):
        open_image(str(path))


def test_a_differencing_vhd_is_told_with_its_parent_but_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "child.vhd"
    small_dynamic(path)
    raw = bytearray(path.read_bytes())
    struct.pack_into(">I", raw, 60, 4)
    struct.pack_into(">I", raw, 64, checksum(raw[:FOOTER_SIZE], 64))
    raw[-FOOTER_SIZE:] = raw[:FOOTER_SIZE]
    name = "parent\n.vhd".encode("utf-16-be")
    raw[FOOTER_SIZE + 64 : FOOTER_SIZE + 64 + len(name)] = name
    struct.pack_into(">I", raw, FOOTER_SIZE + 36, checksum(raw[FOOTER_SIZE : FOOTER_SIZE + HEADER_SIZE], 36))
    path.write_bytes(raw)
    info = probe_for_tracking(str(path))
    assert (info.format, info.details["parent"]) == (ImageFormat.VHD_DIFFERENCING, "parent.vhd")
    with pytest.raises(UnsupportedError, match=r"differencing VHD \(its parent is 'parent.vhd'\)"):
        open_image(str(path))


@pytest.mark.parametrize("suffix", [".vhd", ".vhdx", ".VHD"])
@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 100_000])
def test_a_name_that_promises_more_than_the_content_holds_is_corrupt(tmp_path: Path, suffix: str, length: int) -> None:
    path = tmp_path / f"zeroes{suffix}"
    path.write_bytes(bytes(length))
    with pytest.raises(CorruptError, match="not a VHD") as raised:
        probe(str(path))
    assert raised.value.hint is not None
    assert "zeroes.raw" in raised.value.hint


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 100_000])
def test_anything_else_is_raw_and_odd_sizes_are_mentioned(tmp_path: Path, length: int) -> None:
    path = tmp_path / "zeroes.img"
    path.write_bytes(bytes(length))
    info = probe(str(path))
    assert (info.format, info.virtual_size) == (ImageFormat.RAW, length)
    assert bool(info.warnings) == bool(length % 512)


def test_what_a_guest_writes_at_the_start_of_a_fixed_vhd_does_not_change_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "fixed.vhd"
    make(path, 64 * 1024, ImageFormat.VHD_FIXED)
    small_dynamic(tmp_path / "other.vhd")
    for trick in ((tmp_path / "other.vhd").read_bytes()[:8192], b"QFI\xfb", b"vhdxfile", b"conectix"):
        disk = open_image(str(path), writable=True)
        disk.pwrite(0, trick)
        disk.close()
        assert probe(str(path)).format is ImageFormat.VHD_FIXED
        assert content(path)[: len(trick)] == trick


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", UsageError), (tmp_path, UsageError), (tmp_path / "none", NotFoundError)):
        with pytest.raises(kind, match=str(path)):
            probe(str(path))


@pytest.mark.parametrize(
    ("name", "image_format", "size", "kind"),
    [
        ("a.vhd", ImageFormat.RAW, MIB, UsageError),
        ("a.vhdx", ImageFormat.VHD_DYNAMIC, MIB, UsageError),
        ("a.vhdx", ImageFormat.VHDX, MIB, UnsupportedError),
        ("a.vhd", ImageFormat.VHD_DIFFERENCING, MIB, UnsupportedError),
        ("a.vhd", ImageFormat.VHD_FIXED, 0, UsageError),
        ("a.vhd", ImageFormat.VHD_FIXED, 1000, UsageError),
        ("a.vhd", ImageFormat.VHD_DYNAMIC, MAX_SIZE + SECTOR, UsageError),
    ],
)
def test_what_cannot_be_made_is_refused(
    name: str, image_format: ImageFormat, size: int, kind: type[HvfuseError]
) -> None:
    with pytest.raises(kind):
        check_creatable(image_format, size, name)


def test_a_disk_is_never_made_over_another(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        create_image(str(path), MIB, ImageFormat.RAW)
    assert path.read_bytes() == b"precious"


def test_a_disk_that_could_not_be_made_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with pytest.raises(OSError, match="too large"):
        create_image(str(path), 1 << 62, ImageFormat.RAW)
    assert not path.exists()


def test_disks_are_told_by_their_suffix_in_any_case_of_letters() -> None:
    assert [name for name in ("a.vhd", "B.VHDX", "c.Raw", "d.img") if not is_disk_name(name)] == []
    assert [name for name in ("a.hrl", "vhd", ".vhd", ".a.raw", "a.vhd.hvt", "notes.txt") if is_disk_name(name)] == []


def test_errors_of_the_system_become_ours_and_name_the_file() -> None:
    with pytest.raises(BusyError, match=r"x\.vhd: device or resource busy"), named("x.vhd"):
        raise OSError(16, "Device or resource busy")


@pytest.mark.mount
def test_a_block_device_is_a_raw_disk(tmp_path: Path) -> None:
    backing = tmp_path / "backing.img"
    backing.write_bytes(pattern(MIB))
    device = run("losetup", "--find", "--show", backing).strip()
    try:
        disk = open_image(device, writable=True)
        assert probe(device).virtual_size == disk.size == MIB
        assert list(disk.extents(0, MIB)) == [(0, MIB)]
        disk.zero(1000, 100)
        disk.trim(8192, 4096)
        disk.flush()
        expected = bytearray(pattern(MIB))
        expected[1000:1100], expected[8192:12288] = bytes(100), bytes(4096)
        assert disk.pread(0, MIB) == expected
        disk.close()
    finally:
        run("losetup", "--detach", device)
