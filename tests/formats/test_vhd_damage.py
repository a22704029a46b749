"""Damaged VHDs: refused with the damage's name, or read as they were; never anything else."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvfuse.errors import CorruptError, HvfuseError
from hvfuse.formats.image import ImageFormat, open_image, probe
from hvfuse.formats.vhd_layout import FOOTER_SIZE, HEADER_SIZE, checksum
from tests.formats.disk_samples import BLOCK, content, make, pattern, qemu_content, qemu_io, small_dynamic

TABLE_AT = FOOTER_SIZE + HEADER_SIZE
FIRST_BLOCK = TABLE_AT + 512


def read_or_refusal(path: Path, raw: bytes) -> bytes | None:
    """What a file of these bytes reads as; None when it is refused by one of hvfuse's own errors."""
    path.write_bytes(raw)
    try:
        return content(path)
    except HvfuseError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return None


@dataclass(frozen=True, repr=False)
class Sample:
    """What a disk holds, and its file's bytes."""

    model: bytes
    raw: bytes


@pytest.fixture(name="fixed")
def _fixed(tmp_path: Path) -> Sample:
    """A small fixed VHD."""
    path = tmp_path / "whole.vhd"
    make(path, 2048, ImageFormat.VHD_FIXED)
    disk = open_image(str(path), writable=True)
    disk.pwrite(100, pattern(1500))
    disk.close()
    return Sample(content(path), path.read_bytes())


@pytest.fixture(name="dynamic")
def _dynamic(tmp_path: Path) -> Sample:
    """A small dynamic VHD."""
    path = tmp_path / "whole.vhd"
    return Sample(small_dynamic(path), path.read_bytes())


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_no_flipped_byte_of_a_structure_is_ever_read_past(tmp_path: Path, dynamic: Sample, mask: int) -> None:
    model, raw = dynamic.model, dynamic.raw
    refused = 0
    structures = [*range(FIRST_BLOCK), *range(len(raw) - FOOTER_SIZE, len(raw))]
    for at in structures:
        damaged = bytearray(raw)
        damaged[at] ^= mask
        read = read_or_refusal(tmp_path / "damaged.vhd", bytes(damaged))
        assert read in (None, model), f"byte {at} flipped by {mask:#x} gave a wrong read"
        refused += read is None
    table_padding = 512 - 10 * 4
    cookie_at_the_end = 8  # the copy at the start stands in for a footer that is not one
    assert refused == len(structures) - table_padding - cookie_at_the_end


def test_no_flipped_byte_of_a_fixed_disks_footer_is_ever_read_past(tmp_path: Path, fixed: Sample) -> None:
    model, raw = fixed.model, fixed.raw
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 0xFF
        read = read_or_refusal(tmp_path / "damaged.vhd", bytes(damaged))
        expected = None if at >= len(model) else bytes(damaged[: len(model)])
        assert read == expected


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_a_vhd_cut_off_at_any_byte_is_corrupt(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    raw = request.getfixturevalue(kind).raw
    path = tmp_path / "cut.vhd"
    path.write_bytes(raw)
    for length in range(len(raw) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(CorruptError, match=r"truncated|not a VHD"):
            probe(str(path))


def test_bytes_appended_to_a_dynamic_disk_do_not_hide_its_data(tmp_path: Path, dynamic: Sample) -> None:
    model, raw = dynamic.model, dynamic.raw
    for tail in (b"\0", b"conectix"[:-1], bytes(511), bytes(512), bytes(5000), b"\xff" * 512):
        assert read_or_refusal(tmp_path / "longer.vhd", raw + tail) == model


def test_bytes_appended_to_a_fixed_disk_make_it_none(tmp_path: Path, fixed: Sample) -> None:
    raw = fixed.raw
    for length in (1, 511, 512, 5000):
        assert read_or_refusal(tmp_path / "longer.vhd", raw + bytes(length)) is None


@pytest.mark.qemu
def test_the_next_write_repairs_what_an_interrupted_growth_left(tmp_path: Path, dynamic: Sample) -> None:
    """qemu writes the new block's bitmap over the footer before it writes the footer anew."""
    model, raw = dynamic.model, dynamic.raw
    path = tmp_path / "interrupted.vhd"
    path.write_bytes(raw[:-FOOTER_SIZE] + b"\xff" * 512)
    assert content(path) == model
    assert "footer" in probe(str(path)).damage[0]
    disk = open_image(str(path), writable=True)
    assert not probe(str(path)).damage
    disk.pwrite(0, b"new block")
    disk.close()
    expected = b"new block" + model[9:]
    assert content(path) == expected
    assert qemu_content(path, ImageFormat.VHD_DYNAMIC) == expected
    qemu_io(path, ImageFormat.VHD_DYNAMIC, f"write -P 5 {BLOCK} {BLOCK}")
    assert content(path) == expected[:BLOCK] + b"\5" * BLOCK + expected[2 * BLOCK :]


@pytest.mark.parametrize(
    ("at", "structure"),
    [(20, "copy at its start"), (600, "dynamic header"), (-100, "footer at its end")],
)
def test_the_damaged_structure_is_named(tmp_path: Path, dynamic: Sample, at: int, structure: str) -> None:
    damaged = bytearray(dynamic.raw)
    damaged[at] ^= 1
    path = tmp_path / "damaged.vhd"
    path.write_bytes(damaged)
    with pytest.raises(CorruptError, match=rf"damaged\.vhd: the .*{structure} does not match its checksum"):
        probe(str(path))


def test_a_footer_and_a_copy_that_contradict_each_other_are_corrupt(tmp_path: Path, dynamic: Sample) -> None:
    damaged = bytearray(dynamic.raw)
    struct.pack_into(">Q", damaged, 48, 9 * BLOCK)
    struct.pack_into(">I", damaged, 64, checksum(damaged[:FOOTER_SIZE], 64))
    path = tmp_path / "torn.vhd"
    path.write_bytes(damaged)
    with pytest.raises(CorruptError, match="the footer says current size 40960, its copy at the start 36864"):
        probe(str(path))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(
        st.tuples(st.integers(0, FIRST_BLOCK - 9), st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8))),
        min_size=1,
        max_size=3,
    ),
    cut=st.integers(0, 20_000),
)
def test_a_hostile_file_with_right_checksums_is_refused_or_read(
    dynamic: Sample, tmp_path: Path, changes: list[tuple[int, bytes]], cut: int
) -> None:
    raw = bytearray(dynamic.raw)
    for at, value in changes:
        raw[at : at + len(value)] = value
    struct.pack_into(">I", raw, 64, checksum(raw[:FOOTER_SIZE], 64))
    struct.pack_into(">I", raw, FOOTER_SIZE + 36, checksum(raw[FOOTER_SIZE:TABLE_AT], 36))
    raw[-FOOTER_SIZE:] = raw[:FOOTER_SIZE]
    path = tmp_path / "hostile.vhd"
    path.write_bytes(raw[: max(cut, 1)] if cut < 15_000 else raw)
    try:
        disk = open_image(str(path))
    except HvfuseError:
        return
    try:
        for offset in (0, 7 * BLOCK, disk.size // 2, disk.size - BLOCK):
            start = max(0, min(offset, disk.size))
            length = min(BLOCK, disk.size - start)
            assert len(disk.pread(start, length)) == length
    finally:
        disk.close()
