"""The byte layout of VHD, version 1.0: pack, unpack, validate. Opens nothing.

Everything is big-endian; a sector is 512 bytes.

    fixed      data, as long as the disk; footer
    dynamic    copy of the footer; header; block allocation table (BAT); blocks; footer
    (differencing: a dynamic disk whose absent sectors are to be read from its parent)

    Footer, 512 bytes: the last of the file. Valid when cookie, version and checksum are right.
    offset size field
         0    8 cookie "conectix"
         8    4 features: 2 is always set; 1 marks a temporary disk
        12    4 version 0x00010000
        16    8 data offset: where the header is; all ones in a fixed disk
        24    4 created, seconds since 2000-01-01 UTC
        28    4 creator application (see `CREATOR`)
        32    4 creator version
        36    4 creator host: "Wi2k", "Mac "
        40    8 original size, bytes
        48    8 current size, bytes: the size of the disk
        56    4 geometry: cylinders (2), heads (1), sectors per track (1)
        60    4 disk type: 2 fixed, 3 dynamic, 4 differencing
        64    4 checksum: complement of the sum of the footer's other bytes
        68   16 unique id
        84    1 saved state: 1 when a machine is suspended upon the disk
        85  427 zeroes

    Header, 1024 bytes. Valid when cookie, version and checksum are right.
         0    8 cookie "cxsparse"
         8    8 next structure: all ones
        16    8 table offset: where the BAT is
        24    4 version 0x00010000
        28    4 max table entries: length of the BAT, at least the disk's size in blocks
        32    4 block size, bytes: a power of two, as a rule 2 MiB
        36    4 checksum, as in the footer
        40   16 unique id of the parent
        56    4 modification time of the parent, seconds since 2000-01-01 UTC
        60    4 zeroes
        64  512 name of the parent, UTF-16
       576  192 parent locators, 8 of 24 bytes
       768  256 zeroes

    BAT: an entry of 4 bytes for each block: the sector at which it begins, or all ones for a block
    that is not there and reads as zeroes. No checksum; but no two blocks may share a byte with each
    other or with another structure, and all of them lie whole in the file (the last one too, even if
    the disk ends in its midst). In a file without gaps, as hvfuse and qemu make them, any one wrong
    entry breaks that rule.

    Block: a bitmap, one bit for each sector (the first in the highest bit) and filled up to whole
    sectors, then the data. In a dynamic disk a sector whose bit is 0 reads as zeroes. Neither bitmap
    nor data have a checksum.

How a reader goes about it: the footer at the end says what the file is. Where it is missing, the copy
at the start of a dynamic disk stands in, but only as far as the blocks are all there and the file goes
on beyond them: that is what a crash in the midst of growing leaves (qemu overwrites the footer with
the new block before it writes the footer anew). Otherwise the file was cut off.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.extent import Buffer, round_up

SECTOR = 512
FOOTER_SIZE = 512
HEADER_SIZE = 1024
FOOTER_COOKIE = b"conectix"
HEADER_COOKIE = b"cxsparse"
VERSION = 0x00010000
NOWHERE = 0xFFFF_FFFF_FFFF_FFFF
UNUSED = 0xFFFF_FFFF
"""BAT entry of a block that is not there."""

MAX_SIZE = 2040 << 30
"""Bytes; the greatest disk that the format is defined for."""
DEFAULT_BLOCK_SIZE = 2 << 20
MIN_BLOCK_SIZE = 4096
"""Bytes; below it qemu computes an empty bitmap."""
MAX_TABLE_ENTRIES = 1 << 24
"""Four times what the greatest disk has in blocks of 512 KiB; bounds what a hostile header costs."""
EPOCH = 946_684_800
"""2000-01-01 UTC in seconds since 1970."""

CREATOR = b"win "
CREATOR_VERSION = 0x000A0000
CREATOR_HOST = b"Wi2k"
SIZE_TRUSTED = (b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0")
"""Creators whose current size qemu believes; of the others it shows what the geometry comes to."""

_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
_HEADER = struct.Struct(">8sQQIIII16sI4x512s192s256x")
_FOOTER_CHECKSUM_AT = 64
_HEADER_CHECKSUM_AT = 36
assert _FOOTER.size == FOOTER_SIZE
assert _HEADER.size == HEADER_SIZE

Table = NDArray[np.uint32]
"""A BAT in the machine's byte order, shape (max table entries,)."""


class DiskType(IntEnum):
    """What the footer says the file is."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a disk tells those who ask in cylinders, heads and sectors per track."""

    cylinders: int
    heads: int
    sectors: int

    @property
    def size(self) -> int:
        """Bytes; at most a little less than the disk."""
        return self.cylinders * self.heads * self.sectors * SECTOR

    def __str__(self) -> str:
        return f"{self.cylinders}/{self.heads}/{self.sectors}"


MAX_GEOMETRY = Geometry(65535, 16, 255)
"""About 127 GiB; says no more than that the disk is at least as large."""


def geometry(size: int) -> Geometry:
    """The geometry that the VHD specification computes for a disk of `size` bytes."""
    sectors = min(size, MAX_GEOMETRY.size) // SECTOR
    if sectors >= 65535 * 16 * 63:
        return Geometry(sectors // 255 // 16, 16, 255)
    tracks = sectors // 17
    heads = max(-(-tracks // 1024), 4)
    if heads <= 16 and tracks < heads * 1024:
        return Geometry(tracks // heads, heads, 17)
    tracks = sectors // 31
    if tracks < 16 * 1024:
        return Geometry(tracks // 16, 16, 31)
    return Geometry(sectors // 63 // 16, 16, 63)


def checksum(structure: Buffer, at: int) -> int:
    """The complement of the sum of a structure's bytes, without the four of the checksum at `at`."""
    return ~(sum(structure) - sum(memoryview(structure)[at : at + 4])) & 0xFFFF_FFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """The footer's fields, as in the table above. Sizes in bytes, `created` in seconds since 2000."""

    disk_type: DiskType
    current_size: int
    original_size: int
    data_offset: int
    geometry: Geometry
    created: int
    unique_id: bytes
    creator: bytes = CREATOR
    creator_version: int = CREATOR_VERSION
    creator_host: bytes = CREATOR_HOST
    features: int = 2
    saved_state: int = 0

    def pack(self) -> bytes:
        """The footer's 512 bytes."""
        raw = bytearray(_FOOTER.pack(
            FOOTER_COOKIE, self.features, VERSION, self.data_offset, self.created, self.creator,
            self.creator_version, self.creator_host, self.original_size, self.current_size,
            self.geometry.cylinders, self.geometry.heads, self.geometry.sectors, self.disk_type, 0,
            self.unique_id, self.saved_state,
        ))  # fmt: skip
        struct.pack_into(">I", raw, _FOOTER_CHECKSUM_AT, checksum(raw, _FOOTER_CHECKSUM_AT))
        return bytes(raw)


def unpack_footer(data: bytes, where: str) -> Footer:
    """Parse and verify a footer or its copy. `where` names it in messages: "a.vhd: the footer".

    Raises CorruptError; UnsupportedError for another version, type or a disk beyond `MAX_SIZE`.
    """
    if len(data) != FOOTER_SIZE:
        raise CorruptError(f"{where} is truncated: {len(data)} of {FOOTER_SIZE} bytes")
    (cookie, features, version, data_offset, created, creator, creator_version, creator_host,
     original_size, current_size, cylinders, heads, sectors, disk_type, stored, unique_id,
     saved_state) = _FOOTER.unpack(data)  # fmt: skip
    if cookie != FOOTER_COOKIE:
        raise CorruptError(f"{where} is missing: no {FOOTER_COOKIE.decode()!r} there")
    if stored != checksum(data, _FOOTER_CHECKSUM_AT):
        raise CorruptError(f"{where} does not match its checksum")
    if version != VERSION:
        raise UnsupportedError(f"{where} is of VHD version {version >> 16}.{version & 0xFFFF}, not 1.0")
    if disk_type not in tuple(DiskType):
        raise UnsupportedError(f"{where} says disk type {disk_type}, which is neither fixed, dynamic nor differencing")
    if current_size % SECTOR:
        raise CorruptError(f"{where} gives a size of {current_size} bytes, not a multiple of {SECTOR}")
    if current_size > MAX_SIZE:
        raise UnsupportedError(f"{where} gives a size of {current_size} bytes; VHD ends at 2040 GiB")
    return Footer(
        disk_type=DiskType(disk_type), current_size=current_size, original_size=original_size,
        data_offset=data_offset, geometry=Geometry(cylinders, heads, sectors), created=created,
        unique_id=unique_id, creator=creator, creator_version=creator_version,
        creator_host=creator_host, features=features, saved_state=saved_state,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header of a dynamic or differencing disk, as in the table above. Sizes in bytes."""

    table_offset: int
    max_table_entries: int
    block_size: int = DEFAULT_BLOCK_SIZE
    parent_unique_id: bytes = bytes(16)
    parent_modified: int = 0
    parent_name: str = ""
    parent_locators: bytes = bytes(192)

    @property
    def bitmap_size(self) -> int:
        """Bytes of the bitmap before each block's data."""
        return round_up(self.block_size // SECTOR // 8, SECTOR)

    @property
    def stride(self) -> int:
        """Bytes that a block takes in the file."""
        return self.bitmap_size + self.block_size

    @property
    def table_end(self) -> int:
        """First byte after the BAT."""
        return self.table_offset + self.max_table_entries * 4

    def pack(self) -> bytes:
        """The header's 1,024 bytes."""
        raw = bytearray(_HEADER.pack(
            HEADER_COOKIE, NOWHERE, self.table_offset, VERSION, self.max_table_entries,
            self.block_size, 0, self.parent_unique_id, self.parent_modified,
            self.parent_name.encode("utf-16-be"), self.parent_locators,
        ))  # fmt: skip
        struct.pack_into(">I", raw, _HEADER_CHECKSUM_AT, checksum(raw, _HEADER_CHECKSUM_AT))
        return bytes(raw)


def unpack_header(data: bytes, where: str, *, disk_size: int) -> Header:
    """Parse and verify the header of a disk of `disk_size` bytes. `where` as in `unpack_footer`.

    Raises CorruptError; UnsupportedError for another version, or a block size or table that no VHD
    in use has.
    """
    if len(data) != HEADER_SIZE:
        raise CorruptError(f"{where} is truncated: {len(data)} of {HEADER_SIZE} bytes")
    (cookie, _, table_offset, version, max_table_entries, block_size, stored, parent_unique_id,
     parent_modified, parent_name, parent_locators) = _HEADER.unpack(data)  # fmt: skip
    if cookie != HEADER_COOKIE:
        raise CorruptError(f"{where} is missing: no {HEADER_COOKIE.decode()!r} there")
    if stored != checksum(data, _HEADER_CHECKSUM_AT):
        raise CorruptError(f"{where} does not match its checksum")
    if version != VERSION:
        raise UnsupportedError(f"{where} is of version {version >> 16}.{version & 0xFFFF}, not 1.0")
    if block_size < MIN_BLOCK_SIZE or block_size & (block_size - 1):
        raise UnsupportedError(f"{where} gives a block size of {block_size} bytes")
    if max_table_entries > MAX_TABLE_ENTRIES:
        raise UnsupportedError(f"{where} gives a table of {max_table_entries} entries")
    if max_table_entries * block_size < disk_size:
        raise CorruptError(f"{where} gives a table too short for a disk of {disk_size} bytes")
    name = parent_name.decode("utf-16-be", errors="replace").partition("\0")[0]
    return Header(
        table_offset=table_offset, max_table_entries=max_table_entries, block_size=block_size,
        parent_unique_id=parent_unique_id, parent_modified=parent_modified,
        parent_name="".join(c for c in name if c.isprintable()), parent_locators=parent_locators,
    )  # fmt: skip


def unpack_table(data: bytes) -> Table:
    """The BAT's entries; a copy that may be changed."""
    return np.frombuffer(data, ">u4").astype(np.uint32)


def blocks_end(table: Table, header: Header) -> int:
    """The first byte after the BAT and every block that it names."""
    used = table[table != UNUSED]
    after_table = round_up(header.table_end, SECTOR)
    return max(after_table, int(used.max()) * SECTOR + header.stride) if len(used) else after_table


def validate_table(table: Table, header: Header, *, header_at: int, end: int, where: str) -> None:
    """Check that all structures and blocks lie apart from each other and before `end`.

    `header_at`: the header's offset; `end`: the footer's. Raises CorruptError that names the block.
    """
    fixed = ((0, FOOTER_SIZE), (header_at, header_at + HEADER_SIZE), (header.table_offset, header.table_end))
    for (_, stop), (start, _) in zip(sorted(fixed), sorted(fixed)[1:], strict=False):
        if start < stop:
            raise CorruptError(f"{where}: the copy of the footer, the header and the block table overlap")
    if max(stop for _, stop in fixed) > end:
        raise CorruptError(f"{where}: the block table reaches past byte {end}, where the footer stands")
    blocks = np.flatnonzero(table != UNUSED)
    starts = table[blocks].astype(np.int64) * SECTOR
    ends = starts + header.stride
    for wrong, cause in (
        (ends > end, f"reaches past byte {end}, where the file's data ends"),
        *(((starts < stop) & (ends > start), f"overlaps the structures at byte {start}") for start, stop in fixed),
    ):
        if wrong.any():
            raise CorruptError(f"{where}: block {blocks[np.argmax(wrong)]} {cause}")
    order = np.argsort(starts, kind="stable")
    crowded = np.diff(starts[order]) < header.stride
    if crowded.any():
        first = int(np.argmax(crowded))
        pair = sorted((int(blocks[order[first]]), int(blocks[order[first + 1]])))
        raise CorruptError(f"{where}: blocks {pair[0]} and {pair[1]} overlap")
