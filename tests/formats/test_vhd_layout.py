"""The structures of VHD by themselves: geometry, checksums, and what a parser must refuse."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvfuse.errors import CorruptError, HvfuseError, UnsupportedError
from hvfuse.formats.vhd import new_footer
from hvfuse.formats.vhd_layout import (
    FOOTER_SIZE,
    HEADER_SIZE,
    MAX_SIZE,
    UNUSED,
    DiskType,
    Geometry,
    Header,
    checksum,
    geometry,
    unpack_footer,
    unpack_header,
    validate_table,
)

GEOMETRIES = [  # disk size in sectors, cylinders, heads, sectors per track: the branches and their borders
    (0, 0, 4, 17),
    (20_480, 301, 4, 17),
    (4 * 17 * 1024 - 1, 1023, 4, 17),
    (204_800, 1003, 12, 17),
    (16 * 17 * 1024 - 1, 1023, 16, 17),
    (16 * 17 * 1024, 561, 16, 31),
    (16 * 31 * 1024 - 1, 1023, 16, 31),
    (16 * 31 * 1024, 503, 16, 63),
    (65535 * 16 * 63 - 1, 65534, 16, 63),
    (65535 * 16 * 63, 16191, 16, 255),
    (65535 * 16 * 255, 65535, 16, 255),
    (MAX_SIZE // 512, 65535, 16, 255),
]


@pytest.mark.parametrize(("sectors", "cylinders", "heads", "per_track"), GEOMETRIES)
def test_geometry_is_the_specifications(sectors: int, cylinders: int, heads: int, per_track: int) -> None:
    assert geometry(sectors * 512) == Geometry(cylinders, heads, per_track)


def test_a_footer_comes_back_as_it_was_packed() -> None:
    footer = new_footer(DiskType.DYNAMIC, 10 << 20)
    raw = footer.pack()
    assert len(raw) == FOOTER_SIZE
    assert unpack_footer(raw, "f") == footer


def test_a_header_comes_back_as_it_was_packed() -> None:
    header = Header(table_offset=1536, max_table_entries=5, parent_name="Elternteil ä.vhd", parent_unique_id=b"p" * 16)
    raw = header.pack()
    assert len(raw) == HEADER_SIZE
    assert unpack_header(raw, "h", disk_size=10 << 20) == header


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_any_flipped_byte_of_a_footer_or_header_is_noticed(mask: int) -> None:
    footer = new_footer(DiskType.FIXED, 10 << 20).pack()
    header = Header(table_offset=1536, max_table_entries=5).pack()
    for at in range(FOOTER_SIZE):
        with pytest.raises(CorruptError):
            unpack_footer(footer[:at] + bytes([footer[at] ^ mask]) + footer[at + 1 :], "f")
    for at in [*range(120), HEADER_SIZE - 1]:
        with pytest.raises(CorruptError):
            unpack_header(header[:at] + bytes([header[at] ^ mask]) + header[at + 1 :], "h", disk_size=0)


def test_a_footer_or_header_of_any_other_length_is_refused() -> None:
    footer = new_footer(DiskType.FIXED, 10 << 20).pack()
    header = Header(table_offset=1536, max_table_entries=5).pack()
    for length in [*range(FOOTER_SIZE), FOOTER_SIZE + 1]:
        with pytest.raises(CorruptError):
            unpack_footer((footer + b"\0")[:length], "f")
    for length in [*range(HEADER_SIZE), HEADER_SIZE + 1]:
        with pytest.raises(CorruptError):
            unpack_header((header + b"\0")[:length], "h", disk_size=0)


def _sealed(raw: bytes, at: int, value: bytes, checksum_at: int) -> bytes:
    """`raw` with `value` at `at` and a checksum that is right again."""
    changed = bytearray(raw)
    changed[at : at + len(value)] = value
    struct.pack_into(">I", changed, checksum_at, checksum(changed, checksum_at))
    return bytes(changed)


@pytest.mark.parametrize(
    ("at", "value"), [(12, b"\0\2\0\0"), (60, b"\0\0\0\1"), (60, b"\0\0\0\7"), (48, struct.pack(">Q", MAX_SIZE + 512))]
)
def test_a_whole_footer_of_what_hvfuse_does_not_know_is_unsupported(at: int, value: bytes) -> None:
    with pytest.raises(UnsupportedError):
        unpack_footer(_sealed(new_footer(DiskType.FIXED, 10 << 20).pack(), at, value, 64), "f")


@given(st.integers(8, 510), st.binary(min_size=1, max_size=8))
def test_a_footer_made_up_with_a_right_checksum_parses_or_is_refused(at: int, value: bytes) -> None:
    raw = _sealed(new_footer(DiskType.DYNAMIC, 10 << 20).pack(), at, value[: FOOTER_SIZE - at], 64)
    try:
        assert unpack_footer(raw, "f").current_size <= MAX_SIZE
    except HvfuseError:
        pass


@given(st.integers(8, 1022), st.binary(min_size=1, max_size=8), st.integers(0, MAX_SIZE))
def test_a_header_made_up_with_a_right_checksum_parses_or_is_refused(at: int, value: bytes, size: int) -> None:
    raw = _sealed(Header(table_offset=1536, max_table_entries=5).pack(), at, value[: HEADER_SIZE - at], 36)
    try:
        header = unpack_header(raw, "h", disk_size=size)
        assert header.block_size * header.max_table_entries >= size
    except HvfuseError:
        pass


@pytest.mark.parametrize(
    ("entries", "cause"),
    [
        ([0, UNUSED], "block 0 overlaps"),
        ([UNUSED, 2], "block 1 overlaps"),
        ([3, UNUSED], "block 0 overlaps"),
        ([4, 12], "blocks 0 and 1 overlap"),
        ([12, 4], "blocks 0 and 1 overlap"),
        ([4, 4], "blocks 0 and 1 overlap"),
        ([UNUSED, 14], "block 1 reaches past"),
        ([UNUSED, UNUSED - 1], "block 1 reaches past"),
    ],
)
def test_a_table_whose_blocks_collide_is_refused_by_the_blocks_name(entries: list[int], cause: str) -> None:
    header = Header(table_offset=1536, max_table_entries=2, block_size=4096)
    table = np.array(entries, np.uint32)
    with pytest.raises(CorruptError, match=cause):
        validate_table(table, header, header_at=512, end=(4 + 2 * 9) * 512, where="t")


def test_a_table_of_blocks_side_by_side_is_good_in_any_order() -> None:
    header = Header(table_offset=1536, max_table_entries=2, block_size=4096)
    for entries in ([4, 13], [13, 4], [UNUSED, 4], [UNUSED, UNUSED]):
        validate_table(np.array(entries, np.uint32), header, header_at=512, end=(4 + 2 * 9) * 512, where="t")
