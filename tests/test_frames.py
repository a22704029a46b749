"""Frames: what goes in comes out, within the limits that a reader relies on."""

from __future__ import annotations

import random

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hvfuse import frames
from hvfuse.frames import EXTENT_DTYPE, Codec, Fill, FrameWriter

DISK, GENERATION = b"d" * 16, b"g" * 16


def writer(level: int = 1) -> FrameWriter:
    return FrameWriter(generation=GENERATION, cycle=9, level=level)


EXTENTS = st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 5000), st.sampled_from(list(Fill))), max_size=40)


@settings(deadline=None)
@given(rows=EXTENTS, level=st.sampled_from([0, 1, 3]), seed=st.integers(0, 9))
def test_a_frame_gives_back_every_extent(rows: list[tuple[int, int, Fill]], level: int, seed: int) -> None:
    rng = random.Random(seed)
    placed, at = [], 0
    for gap, length, fill in rows:
        at += gap
        placed.append((at, length, fill))
        at += length
    table = np.array(placed, EXTENT_DTYPE)
    data = [rng.choice([rng.randbytes(n), b"x" * n]) for _, n, fill in placed if fill is Fill.DATA]
    frame = frames.decode(writer(level).encode(disk_id=DISK, number=5, table=table, data=data))
    assert [(int(e["offset"]), int(e["length"]), int(e["kind"])) for e in frame.table] == placed
    assert bytes(frame.data) == b"".join(data)
    header = frame.header
    assert (header.disk_id, header.generation, header.cycle, header.number) == (DISK, GENERATION, 9, 5)
    pieces = [
        bytes(frame.data[start : start + int(e["length"])])
        for start, e in zip(frame.positions().tolist(), frame.table, strict=True)
        if e["kind"] == Fill.DATA
    ]
    assert pieces == data


def test_bytes_that_do_not_compress_are_stored() -> None:
    table = np.array([(0, 4096, Fill.DATA)], EXTENT_DTYPE)
    noise = random.Random(1).randbytes(4096)
    assert frames.unpack_header(writer().encode(disk_id=DISK, number=0, table=table, data=[noise])).codec is (
        Codec.STORED
    )
    packed = writer().encode(disk_id=DISK, number=0, table=table, data=[bytes(4096)])
    assert frames.unpack_header(packed).codec is Codec.ZSTD


def test_a_frame_holds_at_most_what_a_reader_is_ready_for() -> None:
    room = frames.MAX_PLAIN - EXTENT_DTYPE.itemsize
    for length, fits in ((room, True), (room + 1, False)):
        table = np.array([(0, length, Fill.DATA)], EXTENT_DTYPE)
        if fits:
            encoded = writer().encode(disk_id=DISK, number=0, table=table, data=[bytes(length)])
            assert len(frames.decode(encoded).data) == length
        else:
            with pytest.raises(ValueError, match="at most"):
                writer().encode(disk_id=DISK, number=0, table=table, data=[bytes(length)])


@pytest.mark.parametrize("level", [9, 19, 22])
def test_a_full_frame_of_a_high_level_keeps_within_the_window_that_readers_allow(level: int) -> None:
    length = frames.MAX_PLAIN - EXTENT_DTYPE.itemsize
    table = np.array([(0, length, Fill.DATA)], EXTENT_DTYPE)
    encoded = writer(level).encode(disk_id=DISK, number=0, table=table, data=[bytes(length)])
    assert bytes(frames.decode(encoded).data) == bytes(length)


def test_the_body_is_a_frame_that_any_zstd_reads() -> None:
    table = np.array([(7, 3000, Fill.DATA)], EXTENT_DTYPE)
    encoded = writer().encode(disk_id=DISK, number=0, table=table, data=[b"abc" * 1000])
    plain = zstandard.ZstdDecompressor().decompress(encoded[frames.HEADER_SIZE :])
    assert plain == table.tobytes() + b"abc" * 1000


def test_zeroes_travel_as_a_table_row_alone() -> None:
    table = np.array([(0, 1 << 50, Fill.ZERO)], EXTENT_DTYPE)
    encoded = writer().encode(disk_id=DISK, number=0, table=table, data=[])
    assert len(encoded) <= frames.HEADER_SIZE + EXTENT_DTYPE.itemsize
    assert len(frames.decode(encoded).data) == 0


def test_a_frame_without_extents_is_read() -> None:
    frame = frames.decode(writer().encode(disk_id=DISK, number=0, table=np.empty(0, EXTENT_DTYPE), data=[]))
    assert len(frame.table) == 0
    assert len(frame.positions()) == 0
