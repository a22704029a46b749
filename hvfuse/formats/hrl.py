"""The replication log of one disk (`.hrl`): Microsoft's public format [MS-HRL], version 2.

Pure: packs, unpacks and validates; `hvfuse.formats.hrl_reader` walks files. Little-endian, packed;
timestamps are seconds since 2000-01-01 00:00:00 UTC.

A log is a header, a first metadata block, and then payloads back to back with a metadata block
behind each group of them:

    | header 4,096 | block 0 (empty) | payload … payload | block 1 | payload … | block n |
                                                                                        ^ eol_location

    Header, 4,096 bytes
    offset size field
         0    8 cookie "msctlog "
         8    4 log_format_version, 0x00020000 (0x00010000 is read too)
        12    4 timestamp: when the log was opened
        16    4 creator_application: "hvfs" in ours, "ct  " in Hyper-V's
        20    4 creator_version
        24    8 original_size of the log when it was made, bytes
        32    8 current_size of the log, bytes; what lies behind it in a recycled file does not count
        40    4 checksum, see below
        44    8 eol_location: the log's end, bytes; 0 while it is open: "not closed properly"
        52    4 error_code, signed
        56    4 metadata_size: bytes of a metadata block, a multiple of 512; 4,096 in ours
        60   16 unique_id
        76   16 previous_unique_id: of the log that this one continues; zeroes: none
        92    4 last_modified_timestamp
        96    8 total_metadata_entries
       104    4 file_type, 0
       108    2 flags, 0
       110   16 vhd2_data_write_guid: of a VHDX; zeroes otherwise; zeroes in version 1, which lacks it
       126 3970 zeroes

    Metadata block, metadata_size bytes
         0    8 previous_distance: from here back to the block before this one, bytes; 0 in the first
         8    4 entry_count
        12    4 checksum of these 32 bytes
        16   16 zeroes
        32      entries of 32 bytes: 127 in a block of 4,096; what follows the last one is ignored

    Entry, 32 bytes
         0    8 byte_offset on the disk
         8    4 checksum of these 32 bytes
        12    4 data_length, bytes
        16    4 timestamp
        20    1 meta_operation: 1 write, the only one
        21    4 data_checksum of the payload; 0: none was made, as Hyper-V may leave it
        25    1 location, 0
        26    6 zeroes

GUIDs are 16 opaque bytes here. Read as Windows does (`uuid.UUID(bytes_le=…)`) their first three
fields are little-endian.

Every checksum is the one's complement of the sum of all bytes modulo 2**32, the checksum itself
taken as 0. It notices any single changed byte, but not bytes that changed places; whoever needs that
has the companion (`hvfuse.formats.companion`). The header's checksum covers its 4,096 bytes; how
other writers make theirs is not known for certain, so it is verified in our own logs only.

Reading: the last block ends at `eol_location`; from there `previous_distance` leads back to the first.
A block is written after the payloads that it describes, so what a crash leaves behind the last
written block is not described by anything, and `eol_location` 0 says that this happened. Payloads of
one block lie in the order of its entries and fill the room between the block before and itself
exactly. Entries are in the order of the writes; that order, not the timestamp, is what counts.

Zeroes and trims are entries whose payload is a hole in the log. Flush marks have no entry here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import stringzilla
from numpy.typing import NDArray

from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.extent import Buffer
from hvfuse.formats import companion

COOKIE = b"msctlog "
VERSION = 0x00020000
VERSION_1 = 0x00010000
CREATOR = b"hvfs"
CREATOR_VERSION = 0x00010000
HEADER_SIZE = 4096
METADATA_SIZE = 4096
ENTRY_SIZE = 32
BLOCK_HEADER_SIZE = 32
ENTRIES_PER_BLOCK = (METADATA_SIZE - BLOCK_HEADER_SIZE) // ENTRY_SIZE
MAX_METADATA_SIZE = 1 << 20
"""Bytes; a greater metadata block is refused, since a reader has to hold one."""
MAX_OFFSET = 1 << 62
"""Bytes; no disk is as large, and sums of offset and length stay within 64 signed bits."""
OPERATION_WRITE = 1
EPOCH = 946_684_800
"""2000-01-01 00:00:00 UTC in seconds since 1970."""
ZERO_CHECKSUM = 0xFFFFFFFF
"""Data checksum of any number of zeroes, and so of a hole."""

_HEADER = struct.Struct("<8sII4sIQQIQiI16s16sIQIH16s3970x")
_BLOCK_HEADER = struct.Struct("<QII16x")
_CHECKSUM_AT = 40
assert _HEADER.size == HEADER_SIZE
assert _BLOCK_HEADER.size == BLOCK_HEADER_SIZE
assert ENTRIES_PER_BLOCK == 127

ENTRY_DTYPE = np.dtype(
    {
        "names": [
            "byte_offset", "checksum", "data_length", "timestamp", "meta_operation", "data_checksum",
            "location",
        ],
        "formats": ["<u8", "<u4", "<u4", "<u4", "u1", "<u4", "u1"],
        "offsets": [0, 8, 12, 16, 20, 21, 25],
        "itemsize": ENTRY_SIZE,
    }
)  # fmt: skip

LogEntries = NDArray[np.void]
"""Shape (n,), dtype `ENTRY_DTYPE`."""


def hrl_time(ns_since_1970: int) -> int:
    """The format's seconds since 2000, held within its 32 bits (which end in 2136)."""
    seconds = ns_since_1970 // 1_000_000_000 - EPOCH
    return seconds if 0 <= seconds <= 0xFFFFFFFF else 0 if seconds < 0 else 0xFFFFFFFF


def unix_seconds(timestamp: int) -> int:
    """Seconds since 1970 of a timestamp of the format."""
    return timestamp + EPOCH


def checksum(*parts: Buffer) -> int:
    """One's complement of the sum of all bytes of all parts, modulo 2**32."""
    return data_checksum(sum(int(stringzilla.bytesum(part)) for part in parts))


def data_checksum(byte_sum: int) -> int:
    """The checksum of bytes of which the plain sum is known."""
    return ~byte_sum & 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class LogHeader:
    """The header's fields, as in the table above."""

    timestamp: int
    original_size: int
    current_size: int
    eol_location: int
    unique_id: bytes
    previous_unique_id: bytes
    last_modified_timestamp: int
    total_metadata_entries: int
    version: int = VERSION
    creator_application: bytes = CREATOR
    creator_version: int = CREATOR_VERSION
    error_code: int = 0
    metadata_size: int = METADATA_SIZE
    file_type: int = 0
    flags: int = 0
    vhd2_data_write_guid: bytes = bytes(16)

    @property
    def is_ours(self) -> bool:
        """Whether hvfuse wrote the log; then everything in it can be verified."""
        return self.creator_application == CREATOR

    def pack(self) -> bytes:
        """The 4,096 bytes of the header, checksum included."""
        packed = self._pack(0)
        return self._pack(checksum(packed))

    def _pack(self, check: int) -> bytes:
        return _HEADER.pack(
            COOKIE, self.version, self.timestamp, self.creator_application, self.creator_version,
            self.original_size, self.current_size, check, self.eol_location, self.error_code,
            self.metadata_size, self.unique_id, self.previous_unique_id, self.last_modified_timestamp,
            self.total_metadata_entries, self.file_type, self.flags, self.vhd2_data_write_guid,
        )  # fmt: skip


def unpack_header(data: Buffer) -> LogHeader:
    """Parse and verify the first 4,096 bytes. Raises CorruptError or UnsupportedError.

    An open log is accepted here (`eol_location` 0): whether that matters is the reader's business.
    """
    head = bytes(memoryview(data)[:HEADER_SIZE])
    if not head.startswith(COOKIE):
        raise CorruptError("not a replication log: wrong cookie")
    if len(head) < HEADER_SIZE:
        raise CorruptError(f"truncated: {len(head)} of {HEADER_SIZE} header bytes")
    (_, version, timestamp, creator, creator_version, original_size, current_size, check, eol, error_code,
     metadata_size, unique_id, previous_unique_id, modified, total, file_type, flags,
     guid) = _HEADER.unpack(head)  # fmt: skip
    if creator == CREATOR and check != checksum(head[:_CHECKSUM_AT], head[_CHECKSUM_AT + 4 :]):
        raise CorruptError("the header does not match its checksum")
    if version not in (VERSION, VERSION_1):
        raise UnsupportedError(f"log format version {version:#x}; this hvfuse reads {VERSION:#x}")
    if metadata_size % 512 or not 0 < metadata_size <= MAX_METADATA_SIZE:
        raise CorruptError(f"the header declares metadata blocks of {metadata_size} bytes")
    return LogHeader(
        version=version, timestamp=timestamp, creator_application=creator, creator_version=creator_version,
        original_size=original_size, current_size=current_size, eol_location=eol, error_code=error_code,
        metadata_size=metadata_size, unique_id=unique_id, previous_unique_id=previous_unique_id,
        last_modified_timestamp=modified, total_metadata_entries=total, file_type=file_type, flags=flags,
        vhd2_data_write_guid=guid if version == VERSION else bytes(16),
    )  # fmt: skip


def pack_metadata_block(entries: companion.Entries, previous_distance: int) -> bytes:
    """The block of `METADATA_SIZE` bytes that describes `entries`, at most 127 of them.

    `entries`: shape (n,), `companion.ENTRY_DTYPE`, whose `byte_sum` is the data checksum; flush marks
    are left out. `previous_distance`: bytes back to the block before, 0 for the first.
    """
    described = entries[entries["kind"] != companion.Kind.FLUSH]
    if len(described) > ENTRIES_PER_BLOCK:
        raise ValueError(f"{len(described)} entries in a block of {ENTRIES_PER_BLOCK}")
    packed = np.zeros(len(described), ENTRY_DTYPE)
    packed["byte_offset"] = described["offset"]
    packed["data_length"] = described["length"]
    packed["timestamp"] = described["timestamp"]
    packed["meta_operation"] = OPERATION_WRITE
    packed["data_checksum"] = described["byte_sum"]
    packed["checksum"] = _entry_checksums(packed)
    head = _BLOCK_HEADER.pack(previous_distance, len(packed), 0)
    head = _BLOCK_HEADER.pack(previous_distance, len(packed), checksum(head))
    return (head + packed.tobytes()).ljust(METADATA_SIZE, b"\0")


def unpack_block_header(data: Buffer) -> tuple[int, int]:
    """`previous_distance` and `entry_count` of the block that begins with `data`. Raises CorruptError."""
    head = memoryview(data)[:BLOCK_HEADER_SIZE]
    if len(head) < BLOCK_HEADER_SIZE:
        raise CorruptError(f"truncated: {len(head)} of {BLOCK_HEADER_SIZE} bytes of a metadata block's header")
    previous_distance, count, check = _BLOCK_HEADER.unpack(head)
    if check != checksum(head[:12], head[16:]):
        raise CorruptError("the metadata block does not match its checksum")
    return previous_distance, count


def unpack_metadata_block(data: Buffer, metadata_size: int) -> tuple[int, LogEntries]:
    """`previous_distance` and the entries of a block. Raises CorruptError or UnsupportedError.

    `data`: the block's `metadata_size` bytes; the entries are a view of them.
    """
    view = memoryview(data)
    if len(view) != metadata_size:
        raise CorruptError(f"truncated: {len(view)} of {metadata_size} bytes of a metadata block")
    previous_distance, count = unpack_block_header(view)
    if count > (metadata_size - BLOCK_HEADER_SIZE) // ENTRY_SIZE:
        raise CorruptError(f"the metadata block claims {count} entries")
    entries = np.frombuffer(view, ENTRY_DTYPE, count, BLOCK_HEADER_SIZE)
    wrong = np.flatnonzero(entries["checksum"] != _entry_checksums(entries))
    if len(wrong):
        raise CorruptError(f"entry {wrong[0]} of the metadata block does not match its checksum")
    if (entries["meta_operation"] != OPERATION_WRITE).any() or entries["location"].any():
        raise UnsupportedError("the metadata block holds an operation other than a write")
    ends = entries["byte_offset"] + entries["data_length"]
    if (entries["byte_offset"] > MAX_OFFSET).any() or (ends > MAX_OFFSET).any():
        raise CorruptError("the metadata block holds an entry out of bounds")
    return previous_distance, entries


def _entry_checksums(entries: LogEntries) -> NDArray[np.uint32]:
    """What each entry's checksum has to be; shape (n,). The stored ones count as 0."""
    raw = np.frombuffer(entries.tobytes(), np.uint8).reshape(-1, ENTRY_SIZE)
    sums: NDArray[np.uint32] = raw.sum(axis=1, dtype=np.uint32) - raw[:, 8:12].sum(axis=1, dtype=np.uint32)
    return np.invert(sums)
