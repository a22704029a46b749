"""Every codec under attack: cut at each byte, grown byte by byte, each byte changed, bytes appended.

Two things must hold: nothing but hvfuse's own exceptions comes out, and what is read without an
exception is what was written.
"""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hvfuse import frames
from hvfuse.errors import CorruptError, HvfuseError, UnsupportedError
from hvfuse.formats import companion, hrl
from hvfuse.formats.hrl_reader import BytesSource, LogReader
from hvfuse.frames import EXTENT_DTYPE, Codec, Fill, Frame, FrameHeader, FrameWriter
from tests.log_samples import FLUSH, foreign, sealed, trim, write, zero

Reader = Callable[[bytes], object]

RNG = random.Random(5)
SAMPLE = sealed([write(512, RNG.randbytes(700)), zero(0, 512), FLUSH, trim(4096, 300), write(0, b"end")])
FOREIGN = foreign([[(0, RNG.randbytes(512)), (1024, b"x" * 512)], [(512, RNG.randbytes(512))]])


def read_log(data: bytes) -> object:
    """All that the log says: entries and payloads, wholly verified."""
    reader = LogReader(BytesSource(data), name="log")
    reader.verify()
    return [
        (entry, [piece if isinstance(piece, int) else bytes(piece) for _, piece in reader.pieces(entry)])
        for entry in reader
    ]


def read_companion(data: bytes) -> object:
    header, entries = companion.unpack(data)
    return header, entries.tobytes()


def read_frame(data: bytes) -> object:
    frame = frames.decode(data)
    return frame.header, frame.table.tobytes(), bytes(frame.data)


def a_frame(*, level: int = 1) -> bytes:
    table = np.array([(0, 300, 1), (4096, 1 << 20, 2), (1 << 40, 200, 1)], EXTENT_DTYPE)
    data = [b"abc" * 100, RNG.randbytes(200)]
    writer = FrameWriter(generation=b"g" * 16, cycle=7, level=level)
    return writer.encode(disk_id=b"d" * 16, number=3, table=table, data=data)


STORED, PACKED = a_frame(level=0), a_frame()
CODECS: dict[str, tuple[Reader, bytes]] = {
    "log": (read_log, SAMPLE.log),
    "foreign log": (read_log, FOREIGN),
    "companion": (read_companion, SAMPLE.companion),
    "stored frame": (read_frame, STORED),
    "compressed frame": (read_frame, PACKED),
}
every_codec = pytest.mark.parametrize(("read", "whole"), CODECS.values(), ids=CODECS.keys())


def outcome(read: Reader, data: bytes) -> object:
    """What a reader makes of `data`; None for one of hvfuse's own exceptions. Others pass through."""
    try:
        return read(data)
    except HvfuseError as error:
        assert "\n" not in str(error)
        return None


@every_codec
def test_the_whole_is_read(read: Reader, whole: bytes) -> None:
    assert outcome(read, whole) is not None
    assert read(bytearray(whole)) == read(memoryview(whole)) == read(whole)  # type: ignore[arg-type]


@every_codec
def test_growing_byte_by_byte_it_is_refused_until_it_is_whole(read: Reader, whole: bytes) -> None:
    grown = bytearray()
    for byte in whole[:-1]:
        grown.append(byte)
        assert outcome(read, bytes(grown)) is None, f"accepted with {len(grown)} of {len(whole)} bytes"


@every_codec
def test_bytes_before_it_are_refused(read: Reader, whole: bytes) -> None:
    for junk in (b"\0", b"\xff", bytes(4096), whole[:1]):
        assert outcome(read, junk + whole) is None


@pytest.mark.parametrize("name", ["companion", "stored frame", "compressed frame"])
def test_trailing_bytes_are_refused(name: str) -> None:
    read, whole = CODECS[name]
    for tail in (b"\0", b"\xff", bytes(64), whole, whole[:1]):
        assert outcome(read, whole + tail) is None


@pytest.mark.parametrize("name", ["log", "foreign log"])
def test_trailing_bytes_of_a_recycled_log_change_nothing(name: str) -> None:
    read, whole = CODECS[name]
    for tail in (b"\0", b"\xff", bytes(4096), whole, whole[-4096:]):
        assert read(whole + tail) == read(whole)


def flips(whole: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """`whole` with each single bit of the bytes [start, end) inverted."""
    changed = bytearray(whole)
    for at in range(start, end):
        for bit in range(8):
            changed[at] ^= 1 << bit
            yield at, bytes(changed)
            changed[at] ^= 1 << bit


def changes(whole: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """`whole` with each of the bytes [start, end) changed in three ways, one byte at a time."""
    changed = bytearray(whole)
    for at in range(start, end):
        old = changed[at]
        for new in {old ^ (1 << at % 8), old ^ 0xFF, 0} - {old}:
            changed[at] = new
            yield at, bytes(changed)
        changed[at] = old


@pytest.mark.parametrize("name", ["companion", "stored frame"])
def test_each_flipped_bit_is_noticed(name: str) -> None:
    read, whole = CODECS[name]
    for at, changed in flips(whole, 0, len(whole)):
        assert outcome(read, changed) is None, f"byte {at} changed and nobody noticed"


def test_each_flipped_bit_of_a_compressed_frame_is_noticed_or_unpacks_to_the_same() -> None:
    right = read_frame(PACKED)
    for at, changed in flips(PACKED, 0, len(PACKED)):
        got = outcome(read_frame, changed)
        assert got is None or (got == right and at >= frames.HEADER_SIZE)


def test_each_flipped_bit_of_our_logs_header_is_noticed() -> None:
    for at, changed in flips(SAMPLE.log[:4096], 0, 4096):
        if outcome(hrl.unpack_header, changed) is not None:
            assert at in range(16, 20), f"byte {at} changed and nobody noticed"


def test_a_log_whose_creator_was_changed_reads_as_a_foreign_one_with_the_same_entries() -> None:
    for _, changed in flips(SAMPLE.log, 16, 20):
        assert read_log(changed) == read_log(SAMPLE.log)


def unused(whole: bytes, metadata_size: int) -> set[int]:
    """The bytes of a log's metadata blocks behind their last entry: the format gives them no meaning."""
    reader = LogReader(BytesSource(whole), name="log")
    return {
        at
        for block in reader.blocks()
        for at in range(block.offset + 32 + 32 * len(block.entries), block.offset + metadata_size)
    }


def test_each_changed_byte_of_our_log_behind_the_header_is_noticed() -> None:
    meaningless = unused(SAMPLE.log, 4096)
    right = read_log(SAMPLE.log)
    for at, changed in changes(SAMPLE.log, 4096, len(SAMPLE.log)):
        if at in meaningless:
            if at % 97 == 0:
                assert outcome(read_log, changed) == right
        else:
            assert outcome(read_log, changed) is None, f"byte {at} changed and nobody noticed"


def test_a_changed_byte_of_a_foreign_log_is_noticed_wherever_the_format_has_a_checksum() -> None:
    """Hyper-V leaves payloads and header without a checksum that we could verify: a change there may
    be read, but never as another layout, since the blocks and entries are verified."""
    meaningless, right = unused(FOREIGN, 512), read_log(FOREIGN)
    layout = [entry for entry, _ in right]  # type: ignore[attr-defined]
    payloads = {at for entry in layout for at in range(entry.location, entry.location + entry.length)}
    for at, changed in changes(FOREIGN, 4096, len(FOREIGN)):
        got = outcome(read_log, changed)
        if at in payloads:
            assert [entry for entry, _ in got] == layout  # type: ignore[attr-defined]
        else:
            assert got == (right if at in meaningless else None)
    for at, changed in flips(FOREIGN, 0, 130):
        got = outcome(read_log, changed)
        if at in range(44, 52) and got is not None:  # the end mark may come to point at an earlier block
            assert got == right[: len(got)]  # type: ignore[arg-type,index]
        else:
            assert got is None or got == right


@every_codec
@given(noise=st.binary(max_size=400), keep=st.integers(0, 140))
def test_noise_is_refused(read: Reader, whole: bytes, noise: bytes, keep: int) -> None:
    changed = whole[:keep] + noise + whole[keep + len(noise) :]
    assert changed[:4200] == whole[:4200] or outcome(read, changed) in (None, read(whole))


# Frames that are well made and lie.


def forged(plain: bytes, *, body: bytes | None = None, **fields: object) -> bytes:
    """A frame with valid checksums around whatever is given."""
    values: dict[str, object] = {
        "codec": Codec.STORED,
        "disk_id": b"d" * 16,
        "generation": b"g" * 16,
        "cycle": 1,
        "number": 0,
        "extent_count": 1,
        "plain_length": len(plain),
        "stored_length": len(body if body is not None else plain),
        "digest": xxhash.xxh3_128_digest(plain),
    }
    return FrameHeader(**(values | fields)).pack() + (plain if body is None else body)  # type: ignore[arg-type]


def table(*rows: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QQI4x", *row) for row in rows)


def refused(frame: bytes, match: str) -> None:
    with pytest.raises(CorruptError, match=match):
        frames.decode(frame)


def test_a_frame_forged_without_a_lie_is_read() -> None:
    frame = frames.decode(forged(table((5, 3, Fill.DATA)) + b"abc"))
    assert isinstance(frame, Frame)
    assert bytes(frame.data) == b"abc"


@pytest.mark.parametrize(
    ("rows", "data"),
    [
        ([(0, 0, 1)], b""),
        ([(0, 3, 3)], b"abc"),
        ([(0, 3, 0)], b"abc"),
        ([(0, 2, 1)], b"abc"),
        ([(0, 4, 1)], b"abc"),
        ([(0, 3, 2)], b"abc"),
        ([((1 << 64) - 1, 3, 1)], b"abc"),
        ([((1 << 62), 3, 1)], b"abc"),
        ([(0, (1 << 64) - 1, 2)], b""),
        ([(0, 1 << 63, 2)], b""),
        ([((1 << 62) - 1, (1 << 62) - 1, 2)], b""),
        ([(0, (1 << 64) - 1, 1), (1 << 61, 4, 1)], b"abc"),
        ([(0, 1 << 63, 1), (1 << 61, (1 << 63) + 3, 1)], b"abc"),
        ([(4, 4, 2), (0, 4, 2)], b""),
        ([(0, 5, 2), (4, 4, 2)], b""),
        ([(0, 4, 2), (0, 4, 2)], b""),
    ],
)
def test_a_frame_whose_extents_are_impossible_is_refused(rows: list[tuple[int, int, int]], data: bytes) -> None:
    refused(forged(table(*rows) + data, extent_count=len(rows)), "extent")


@pytest.mark.parametrize("count", [2, 1000, 0xFFFFFFFF])
def test_a_frame_that_claims_more_extents_than_it_has_is_refused(count: int) -> None:
    refused(forged(table((0, 3, 1)) + b"abc", extent_count=count), "declares")


def test_a_frame_whose_lengths_contradict_each_other_is_refused() -> None:
    plain = table((0, 3, 1)) + b"abc"
    refused(forged(plain, plain_length=len(plain) + 1), "lengths differ")
    refused(forged(plain, stored_length=1 << 63), "lengths differ")
    refused(forged(plain, plain_length=1 << 63, stored_length=1 << 63), "declares")
    refused(forged(plain, digest=bytes(16)), "checksum")


def test_a_frame_of_unknown_version_or_codec_is_unsupported() -> None:
    for at, value in ((4, 2), (6, 9)):
        head = bytearray(forged(table((0, 3, 1)) + b"abc"))
        head[at] = value
        head[120:128] = xxhash.xxh3_64_intdigest(bytes(head[:120])).to_bytes(8, "little")
        with pytest.raises(UnsupportedError):
            frames.decode(head)


def compressed(plain: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(plain)  # type: ignore[arg-type]


def packed_frame(plain: bytes, body: bytes) -> bytes:
    return forged(plain, body=body, codec=Codec.ZSTD)


def test_a_body_that_is_not_exactly_one_zstd_frame_is_refused() -> None:
    plain = table((0, 3000, 1)) + b"abc" * 1000
    good = compressed(plain)
    assert bytes(frames.decode(packed_frame(plain, good)).data) == plain[24:]
    refused(packed_frame(plain, good + compressed(b"more")), "decompress")
    refused(packed_frame(plain, good + b"\0"), "decompress")
    refused(packed_frame(plain, good[:-1]), "decompress")
    refused(packed_frame(plain, b""), "frame body")
    refused(forged(plain, body=good, codec=Codec.ZSTD, stored_length=len(good) + 1), "promises")
    refused(packed_frame(plain, plain), "decompress")
    refused(packed_frame(plain, compressed(plain, write_content_size=False)), "declares")
    refused(packed_frame(plain, compressed(plain + b"x")), "declares")


def test_a_dictionary_or_a_huge_window_is_refused() -> None:
    plain = table((0, 3000, 1)) + b"abc" * 1000
    samples = [RNG.randbytes(40) + b"a few common words" for _ in range(2000)]
    trained = zstandard.train_dictionary(4096, samples)
    with_dictionary = zstandard.ZstdCompressor(dict_data=trained).compress(plain)
    refused(packed_frame(plain, with_dictionary), "decompress")
    magic, single_segment_8_bytes = b"\x28\xb5\x2f\xfd", b"\xe0"
    declared = struct.pack("<Q", len(plain))
    refused(packed_frame(plain, magic + b"\xc0\xff" + declared + b"\x01\0\0"), "decompress|unpacks")
    refused(packed_frame(plain, magic + single_segment_8_bytes + declared + b"\x01\0\0"), "decompress|unpacks")


def with_declared_size(body: bytes, declared: int) -> bytes:
    """A zstd frame whose declared content size (4 bytes behind the window descriptor) is replaced."""
    assert body[4] == 0x80
    return body[:6] + struct.pack("<I", declared) + body[10:]


@pytest.mark.parametrize("declared", [256 << 20, frames.MAX_PLAIN, 100])
def test_a_decompression_bomb_is_refused_without_holding_what_it_unpacks_to(declared: int) -> None:
    compressor = zstandard.ZstdCompressor().compressobj(size=256 << 20)
    zeroes = bytes(1 << 20)
    bomb = b"".join([*(compressor.compress(zeroes) for _ in range(256)), compressor.flush()])
    bomb = with_declared_size(bomb, declared)
    assert zstandard.get_frame_parameters(bomb).content_size == declared
    plain = bytes(min(declared, frames.MAX_PLAIN))
    frame = forged(plain, body=bomb, codec=Codec.ZSTD, extent_count=1)
    tracemalloc.start()
    try:
        refused(frame, "frame body")
        assert tracemalloc.get_traced_memory()[1] < 2 * frames.MAX_PLAIN
    finally:
        tracemalloc.stop()
