"""The layout of replication logs: the published vectors, and packing against unpacking."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.formats import companion, hrl
from hvfuse.formats.companion import Kind
from tests.log_samples import complement, foreign_block, header

VECTORS = [
    (139058688, 512, 539842382, 4294966747),
    (139058688, 512, 539842381, 4294966748),
    (3626340352, 4096, 539842382, 4294966639),
    (3626348544, 8192, 539842382, 4294966591),
    (3673764352, 31232, 539842382, 4294966413),
]
"""byte_offset, data_length, timestamp, checksum: from the example of the format's specification."""


def companion_entries(count: int, **fields: int) -> companion.Entries:
    entries = np.zeros(count, companion.ENTRY_DTYPE)
    entries["kind"] = Kind.WRITE
    for name, value in fields.items():
        entries[name] = value
    return entries


@pytest.mark.parametrize(("offset", "length", "timestamp", "expected"), VECTORS)
def test_an_entry_has_the_checksum_of_the_published_example(
    offset: int, length: int, timestamp: int, expected: int
) -> None:
    entries = companion_entries(1, offset=offset, length=length, timestamp=timestamp)
    packed = hrl.pack_metadata_block(entries, 4096)
    assert struct.unpack("<QIIIBIB6x", packed[32:64]) == (offset, expected, length, timestamp, 1, 0, 0)


def test_an_empty_block_has_the_checksum_of_the_published_example() -> None:
    block = hrl.pack_metadata_block(companion_entries(0), 0)
    assert struct.unpack("<QII16x", block[:32]) == (0, 0, 4294967295)
    assert len(block) == 4096


def test_a_block_header_has_the_checksum_of_the_published_example() -> None:
    block = hrl.pack_metadata_block(companion_entries(58), 324096)
    assert struct.unpack("<QII16x", block[:32]) == (324096, 58, 4294966991)


def test_the_header_lies_where_the_format_says() -> None:
    raw = header(
        eol_location=0x1122334455,
        current_size=77,
        original_size=66,
        total_metadata_entries=9,
        vhd2_data_write_guid=b"v" * 16,
        error_code=-5,
    ).pack()
    assert len(raw) == 4096
    assert raw[:8] == b"msctlog "
    assert raw[8:12] == b"\0\0\x02\0"
    assert raw[16:20] == b"hvfs"
    assert struct.unpack_from("<QQ", raw, 24) == (66, 77)
    assert struct.unpack_from("<I", raw, 40)[0] == complement(raw[:40] + raw[44:])
    assert struct.unpack_from("<QiI", raw, 44) == (0x1122334455, -5, 4096)
    assert raw[60:92] == bytes(range(32))
    assert struct.unpack_from("<IQIH", raw, 92) == (539842383, 9, 0, 0)
    assert raw[110:126] == b"v" * 16
    assert not any(raw[126:])


def test_a_header_is_read_as_it_was_written() -> None:
    written = header(eol_location=4096 << 20, vhd2_data_write_guid=b"v" * 16, error_code=-1)
    assert hrl.unpack_header(written.pack()) == written


def test_a_foreign_header_is_read_whatever_its_checksum_is() -> None:
    written = header(creator_application=b"ct  ")
    raw = bytearray(written.pack())
    raw[40:44] = b"\0\0\0\0"
    assert hrl.unpack_header(raw) == written


def test_a_header_of_version_1_has_no_vhdx_guid() -> None:
    written = header(creator_application=b"ct  ", version=hrl.VERSION_1, vhd2_data_write_guid=b"x" * 16)
    assert hrl.unpack_header(written.pack()).vhd2_data_write_guid == bytes(16)


def test_a_newer_version_is_refused_as_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="version"):
        hrl.unpack_header(header(version=0x00030000).pack())


@pytest.mark.parametrize("size", [0, 511, 4097, 1 << 31, 0xFFFFFE00])
def test_an_impossible_metadata_size_is_refused_before_anything_is_read(size: int) -> None:
    with pytest.raises(CorruptError, match="metadata blocks of"):
        hrl.unpack_header(header(metadata_size=size).pack())


@pytest.mark.parametrize("data", [b"", b"conectix" + bytes(4088), bytes(4096)])
def test_something_else_is_not_taken_for_a_log(data: bytes) -> None:
    with pytest.raises(CorruptError, match="not a replication log"):
        hrl.unpack_header(data)


ENTRY = st.tuples(
    st.integers(0, (1 << 62) - (1 << 32)),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1),
    st.sampled_from(list(Kind)),
)


@given(st.lists(ENTRY, max_size=127), st.integers(0, (1 << 64) - 1))
def test_a_block_is_read_as_it_was_written_without_its_flush_marks(
    rows: list[tuple[int, int, int, int, Kind]], distance: int
) -> None:
    entries = companion_entries(len(rows))
    for number, row in enumerate(rows):
        for name, value in zip(("offset", "length", "timestamp", "byte_sum", "kind"), row, strict=True):
            entries[name][number] = value
    block = hrl.pack_metadata_block(entries, distance)
    assert len(block) == 4096
    back, unpacked = hrl.unpack_metadata_block(block, 4096)
    assert back == distance
    assert [
        (int(e["byte_offset"]), int(e["data_length"]), int(e["timestamp"]), int(e["data_checksum"])) for e in unpacked
    ] == [row[:4] for row in rows if row[4] is not Kind.FLUSH]
    for at in range(32, 32 + 32 * len(unpacked), 32):
        raw = block[at : at + 32]
        assert struct.unpack_from("<I", raw, 8)[0] == complement(raw[:8] + bytes(4) + raw[12:])


def test_more_entries_than_a_block_holds_are_a_callers_mistake() -> None:
    with pytest.raises(ValueError, match="128 entries"):
        hrl.pack_metadata_block(companion_entries(128), 4096)


def test_a_block_that_claims_more_entries_than_it_can_hold_is_corrupt() -> None:
    block = bytearray(foreign_block([(0, 1)] * 16, distance=0, size=1024)[:512])
    with pytest.raises(CorruptError, match="claims 16 entries"):
        hrl.unpack_metadata_block(block, 512)


def test_an_unknown_operation_is_refused_as_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="other than a write"):
        hrl.unpack_metadata_block(foreign_block([(0, 1)], distance=0, size=512, operation=2), 512)


@pytest.mark.parametrize("offset", [(1 << 62) + 1, (1 << 64) - 1, (1 << 63)])
def test_an_entry_beyond_every_disk_is_corrupt(offset: int) -> None:
    with pytest.raises(CorruptError, match="out of bounds"):
        hrl.unpack_metadata_block(foreign_block([(offset, 512)], distance=0, size=512), 512)


@given(st.binary(max_size=5000))
def test_the_checksum_is_the_complement_of_the_byte_sum(data: bytes) -> None:
    assert hrl.checksum(data) == complement(data)
    assert hrl.checksum(data[:7], data[7:]) == complement(data)
    assert hrl.data_checksum(sum(data)) == complement(data)
    assert hrl.checksum(bytes(len(data))) == hrl.ZERO_CHECKSUM


def test_times_count_from_the_year_2000_and_stay_within_32_bits() -> None:
    assert hrl.hrl_time(hrl.EPOCH * 10**9) == 0
    assert hrl.hrl_time((hrl.EPOCH + 539842382) * 10**9 + 999_999_999) == 539842382
    assert hrl.unix_seconds(539842382) == 1486527182
    assert hrl.hrl_time(0) == 0
    assert hrl.hrl_time(10**19) == 0xFFFFFFFF
