"""Frames: the unit on the wire and in the store. Pure: packs, unpacks, verifies; opens nothing.

A frame holds extents of one disk in one cycle, in ascending order and disjoint, at most
`MAX_PLAIN` bytes of them. Little-endian, packed:

    Header, 128 bytes
    offset size field
         0    4 magic "HVFF"
         4    2 version, 1
         6    1 codec: 0 stored, 1 zstd
         7    1 zero
         8   16 disk_id
        24   16 generation
        40    8 cycle
        48    4 number: of the frame within the cycle, over all disks, from 0
        52    4 extent_count
        56    8 plain_length: bytes of table and data before compression
        64    8 stored_length: bytes of the body as it follows
        72   16 digest: xxh3-128 of table and data before compression
        88   32 zeroes
       120    8 xxh3-64 of bytes 0 to 119

    Body, stored_length bytes: the table and the data, stored or as one zstd frame that declares its size

    Table, 24 bytes an extent
         0    8 offset on the disk, bytes
         8    8 length, bytes; never 0
        16    4 kind: 1 data, 2 zeroes
        20    4 zeroes

The data of the extents of kind 1 follow the table back to back, in its order. Zeroes carry none.

Whoever decodes a frame gets it whole and verified, or an exception: lengths are checked against
the limits before anything is allocated, and against each other before anything is believed.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.extent import Buffer

MAGIC = b"HVFF"
VERSION = 1
HEADER_SIZE = 128
MAX_PLAIN = 8 << 20
"""Bytes of table and data that a frame may unpack to: what a reader must be ready to hold."""
MAX_OFFSET = 1 << 62
"""Bytes; no extent ends beyond it, so that offsets, lengths and their sums fit 64 signed bits."""

_HEADER = struct.Struct("<4sHBx16s16sQIIQQ16s32x")
assert _HEADER.size == HEADER_SIZE - 8

EXTENT_DTYPE = np.dtype(
    {
        "names": ["offset", "length", "kind"],
        "formats": ["<u8", "<u8", "<u4"],
        "offsets": [0, 8, 16],
        "itemsize": 24,
    }
)

Table = NDArray[np.void]
"""Shape (n,), dtype `EXTENT_DTYPE`."""


class Codec(IntEnum):
    """How the body is stored."""

    STORED = 0
    ZSTD = 1


class Fill(IntEnum):
    """What an extent is filled with."""

    DATA = 1
    ZERO = 2


_DATA, _ZERO = Fill.DATA.value, Fill.ZERO.value


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """The header's fields, as in the table above."""

    codec: Codec
    disk_id: bytes
    generation: bytes
    cycle: int
    number: int
    extent_count: int
    plain_length: int
    stored_length: int
    digest: bytes

    def pack(self) -> bytes:
        """The 128 bytes of the header."""
        body = _HEADER.pack(
            MAGIC, VERSION, self.codec, self.disk_id, self.generation, self.cycle, self.number,
            self.extent_count, self.plain_length, self.stored_length, self.digest,
        )  # fmt: skip
        return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


@dataclass(frozen=True, slots=True)
class Frame:
    """A verified frame. `table`: shape (n,), `EXTENT_DTYPE`; `data`: the extents' bytes, back to back."""

    header: FrameHeader
    table: Table
    data: memoryview

    def positions(self) -> NDArray[np.int64]:
        """Where each extent's bytes begin in `data`; shape (n,); meaningless for zeroes."""
        return data_positions(self.table)


def data_positions(table: Table) -> NDArray[np.int64]:
    """Where each extent's bytes begin in the data that follow `table`; shape (n,)."""
    lengths = np.where(table["kind"] == Fill.DATA, table["length"], 0).astype(np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)[:-1]]) if len(table) else lengths


class FrameWriter:
    """Makes frames of one cycle. Not for use by two threads at once: give each its own.

    `level`: zstd level from 1 to 22; 0 stores without compression.
    """

    def __init__(self, *, generation: bytes, cycle: int, level: int = 1) -> None:
        self._generation = generation
        self._cycle = cycle
        self._compressor = zstandard.ZstdCompressor(level=level) if level else None

    def encode(self, *, disk_id: bytes, number: int, table: Table, data: Sequence[Buffer]) -> bytes:
        """One frame. `data`: the bytes of the DATA extents of `table`, in its order."""
        body: list[Buffer] = [table.tobytes(), *data]
        plain_length = stored_length = sum(map(len, body))
        if plain_length > MAX_PLAIN:
            raise ValueError(f"a frame of {plain_length} bytes; at most {MAX_PLAIN} are allowed")
        digest = xxhash.xxh3_128()
        for part in body:
            digest.update(part)
        codec = Codec.STORED
        if self._compressor is not None:
            packed = self._compressor.compress(b"".join(body))
            if len(packed) < plain_length:
                body, codec, stored_length = [packed], Codec.ZSTD, len(packed)
        header = FrameHeader(
            codec=codec,
            disk_id=disk_id,
            generation=self._generation,
            cycle=self._cycle,
            number=number,
            extent_count=len(table),
            plain_length=plain_length,
            stored_length=stored_length,
            digest=digest.digest(),
        )
        return b"".join((header.pack(), *body))


def unpack_header(data: Buffer) -> FrameHeader:
    """Parse and verify the first 128 bytes. Raises CorruptError or UnsupportedError."""
    head = bytes(memoryview(data)[:HEADER_SIZE])
    if len(head) < HEADER_SIZE:
        raise CorruptError(f"frame is truncated: {len(head)} of {HEADER_SIZE} header bytes")
    if not head.startswith(MAGIC):
        raise CorruptError("not a frame: wrong magic")
    if xxhash.xxh3_64_intdigest(head[: _HEADER.size]) != int.from_bytes(head[_HEADER.size :], "little"):
        raise CorruptError("frame header does not match its checksum")
    (_, version, codec, disk_id, generation, cycle, number, extent_count, plain_length, stored_length,
     digest) = _HEADER.unpack(head[: _HEADER.size])  # fmt: skip
    if version != VERSION:
        raise UnsupportedError(f"frame of version {version}; this hvfuse reads version {VERSION}")
    if codec not in (Codec.STORED, Codec.ZSTD):
        raise UnsupportedError(f"frame with unknown codec {codec}")
    if plain_length > MAX_PLAIN or extent_count * EXTENT_DTYPE.itemsize > plain_length:
        raise CorruptError(f"frame declares {plain_length} bytes and {extent_count} extents")
    if codec == Codec.STORED and stored_length != plain_length:
        raise CorruptError("frame's stored and plain lengths differ although it is not compressed")
    return FrameHeader(
        codec=Codec(codec), disk_id=disk_id, generation=generation, cycle=cycle, number=number,
        extent_count=extent_count, plain_length=plain_length, stored_length=stored_length, digest=digest,
    )  # fmt: skip


def decode(data: Buffer) -> Frame:
    """Unpack and verify a whole frame. Raises CorruptError or UnsupportedError."""
    header = unpack_header(data)
    body = memoryview(data)[HEADER_SIZE:]
    if len(body) != header.stored_length:
        raise CorruptError(f"frame body has {len(body)} bytes, its header promises {header.stored_length}")
    plain = body if header.codec is Codec.STORED else _decompress(body, header.plain_length)
    if xxhash.xxh3_128_digest(plain) != header.digest:
        raise CorruptError(f"frame {header.number} of cycle {header.cycle} does not match its checksum")
    table_length = header.extent_count * EXTENT_DTYPE.itemsize
    table = np.frombuffer(plain[:table_length], EXTENT_DTYPE)
    _check_table(table, data_length=len(plain) - table_length)
    return Frame(header, table, plain[table_length:])


def _decompress(body: memoryview, plain_length: int) -> memoryview:
    """The plain bytes, in a buffer of the declared size: a body that unpacks to more never gets it."""
    try:
        declared = zstandard.get_frame_parameters(body).content_size
        if declared != plain_length or declared == 0:
            raise CorruptError(f"frame body declares {declared} bytes, its header {plain_length}")
        plain = _unpacker().decompress(body, read_across_frames=False, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptError(f"frame body does not decompress: {error}") from None
    if len(plain) != plain_length:
        raise CorruptError(f"frame body unpacks to {len(plain)} bytes, its header promises {plain_length}")
    return memoryview(plain)


def _unpacker() -> zstandard.ZstdDecompressor:
    """One for each thread: to make one takes longer than to unpack a small frame, and two threads cannot share it."""
    found: zstandard.ZstdDecompressor | None = getattr(_own, "unpacker", None)
    if found is None:
        found = _own.unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_PLAIN)
    return found


_own = threading.local()


def _check_table(table: Table, *, data_length: int) -> None:
    """Extents lie in order, apart, within bounds, and account for every byte of data."""
    offset, length, kind = table["offset"], table["length"], table["kind"]
    is_data = kind == _DATA
    if not (is_data | (kind == _ZERO)).all():
        raise CorruptError("frame holds an extent of unknown kind")
    end = offset + length  # where that is too much for 64 bits, one of the two is out of bounds itself
    if not length.all() or np.maximum(np.maximum(offset, length), end).max(initial=0) > MAX_OFFSET:
        raise CorruptError("frame holds an extent out of bounds")
    if (offset[1:] < end[:-1]).any():
        raise CorruptError("frame holds extents that overlap or are out of order")
    if int(length[is_data].sum()) != data_length:
        raise CorruptError("frame's extents do not account for its data")
