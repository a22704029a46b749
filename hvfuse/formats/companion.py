"""The companion index of a sealed log (`DISK.NNNNNNNNNN.hrc`), and the entries it shares with the
index of an active log.

[MS-HRL] cannot say where an unclosed log ends, knows no zeroes, trims or sizes, and its byte sums do
not notice swapped bytes. What it cannot say stands here. A companion is immutable: it is written
whole, synced and renamed into place after the log's own trailer is durable, so a companion that
exists and checks out proves that its log is complete.

Little-endian, packed. The file is the header followed by `entry_count` entries and nothing else.

    Header, 256 bytes
    offset size field
         0    8 magic "HVFHRC1\\0"
         8    4 version, 1
        12    4 entry size, 64
        16    8 entry_count
        24   16 unique_id of the log (as in its [MS-HRL] header)
        40   16 previous_unique_id: of the log before it; zeroes in the first of a generation
        56   16 generation
        72    8 cycle, from 1
        80    8 serial: the number in the file's name; grows by one a log, never reset
        88    8 first_seq: sequence number of the first entry; entries count up by one
        96   16 disk_id
       112   16 previous_digest: digest of the log before it; zeroes in the first of a generation
       128    8 previous_size: the image's bytes when the log before it ended
       136    8 start_size: the image's bytes when this log began (differs after an explicit resize)
       144    8 end_size: the image's bytes when this log ended
       152    8 eol: length of the log in bytes ([MS-HRL] eol_location)
       160    8 opened, ns since 1970
       168    8 sealed, ns since 1970: the barrier's instant, equal for all disks of a cycle
       176    4 disk_count: how many logs make up this cycle of the VM
       180    1 address_space: 0 offsets on the logical disk, 1 offsets in the image file
       181    1 flags: bit 0 "unclean": sealed by recovery, not by a rotation; bit 1 "compacted", see below;
                bit 2 "application": the guest stood still at the barrier, with clean file systems
       182    2 zeroes
       184    8 stored_bytes: of payload in the log; holes and metadata do not count
       192    8 earlier_cycles: cycles before this one that a compacted log holds too; otherwise 0
       200   16 carried_digest: of a compacted log, the digest that the cycle's own log had; otherwise zeroes
       216    8 zeroes
       224   16 xxh3-128 of all entries
       240   16 xxh3-128 of bytes 0 to 239

    Entry, 64 bytes (never straddles a page)
         0    8 seq
         8    8 offset on the disk, bytes
        16    8 location of the payload in the log, bytes
        24    8 xxh3-64 of the payload; of a hole, of no bytes at all
        32    4 length, bytes
        36    4 byte sum of the payload, the [MS-HRL] data checksum
        40    4 timestamp, seconds since 2000-01-01 UTC
        44    1 kind: 1 write, 2 zero, 3 trim, 4 flush
        45   11 zeroes
        56    8 check: xxh3-64 of bytes 0 to 55, seeded by the log (see `entry_seed`)

Zero and trim are holes in the log, as long as the range they stand for. A flush has length 0 and
says that all entries before it were durable, on log and image, when it was written.

The digest of a sealed log is the xxh3-128 of its header's 256 bytes. It covers every payload (through
the entries' own digests) and, through `previous_digest`, the whole history of the generation.

A compacted log stands for the cycles from `first_cycle` to `cycle`, newest write wins. Whatever says
where it begins (previous_unique_id, previous_digest, previous_size, start_size, opened) is that of the
first cycle's log; whatever says where it ends (unique_id, serial, end_size, sealed, disk_count) that of
the last's, as is whether the guest stood still there. It carries the last log's digest: the log after it
names that one. So the chain is the same as before.
Its entries are in ascending order of the disk, without flushes and trims (which are zeroes now), and
their sequence numbers end where those of the last log ended, or begin at 0 if they are too many for that.
It lies in a file of its own name (`hvfuse.spool`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash
from numpy.typing import NDArray

from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.extent import Buffer

MAGIC = b"HVFHRC1\0"
VERSION = 1
HEADER_SIZE = 256
ENTRY_SIZE = 64
MAX_ENTRY_LENGTH = 1 << 31
"""Bytes; longer zeroes and trims are split, since [MS-HRL] lengths are 32 bits."""

ENTRY = struct.Struct("<QQQQIIIB11xQ")
_HEADER = struct.Struct("<8sIIQ16s16s16sQQQ16s16sQQQQqqIBB2xQQ16s8x16s")
assert _HEADER.size == HEADER_SIZE - 16
assert ENTRY.size == ENTRY_SIZE

ENTRY_DTYPE = np.dtype(
    {
        "names": [
            "seq", "offset", "location", "xxh3", "length", "byte_sum", "timestamp", "kind", "check",
        ],
        "formats": ["<u8", "<u8", "<u8", "<u8", "<u4", "<u4", "<u4", "u1", "<u8"],
        "offsets": [0, 8, 16, 24, 32, 36, 40, 44, 56],
        "itemsize": ENTRY_SIZE,
    }
)  # fmt: skip

Entries = NDArray[np.void]
"""Shape (n,), dtype `ENTRY_DTYPE`."""


class Kind(IntEnum):
    """What an entry records."""

    WRITE = 1
    ZERO = 2
    TRIM = 3
    FLUSH = 4


class AddressSpace(IntEnum):
    """What an entry's offset counts from."""

    LOGICAL = 0
    IMAGE_FILE = 1


UNCLEAN = 1
COMPACTED = 2
APPLICATION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CompanionHeader:
    """The header's fields, as in the table above. Sizes in bytes, times in ns since 1970."""

    entry_count: int
    unique_id: bytes
    previous_unique_id: bytes
    generation: bytes
    cycle: int
    serial: int
    first_seq: int
    disk_id: bytes
    previous_digest: bytes
    previous_size: int
    start_size: int
    end_size: int
    eol: int
    opened_ns: int
    sealed_ns: int
    disk_count: int
    address_space: AddressSpace
    flags: int
    stored_bytes: int
    entries_digest: bytes
    earlier_cycles: int = 0
    carried_digest: bytes = bytes(16)

    @property
    def is_compacted(self) -> bool:
        """Whether the log stands for several cycles."""
        return bool(self.flags & COMPACTED)

    @property
    def is_application_consistent(self) -> bool:
        """Whether the guest stood still when the log's last cycle ended."""
        return bool(self.flags & APPLICATION)

    @property
    def first_cycle(self) -> int:
        """The first of the cycles that the log stands for; `cycle` is the last."""
        return self.cycle - self.earlier_cycles

    def pack(self) -> bytes:
        """The 256 bytes of the header."""
        body = _HEADER.pack(
            MAGIC, VERSION, ENTRY_SIZE, self.entry_count, self.unique_id, self.previous_unique_id,
            self.generation, self.cycle, self.serial, self.first_seq, self.disk_id,
            self.previous_digest, self.previous_size, self.start_size, self.end_size, self.eol,
            self.opened_ns, self.sealed_ns, self.disk_count, self.address_space, self.flags,
            self.stored_bytes, self.earlier_cycles, self.carried_digest, self.entries_digest,
        )  # fmt: skip
        return body + xxhash.xxh3_128_digest(body)

    def digest(self) -> bytes:
        """16 bytes: the digest of the sealed log, by which the one after it names it."""
        if self.is_compacted:
            return self.carried_digest
        return bytes(xxhash.xxh3_128_digest(self.pack()))


def entry_seed(unique_id: bytes) -> int:
    """The seed of an entry's check: ties an entry to its log, so that a recycled index's stale
    entries never pass for new ones."""
    return int.from_bytes(unique_id[:8], "little")


def unpack_header(data: Buffer) -> CompanionHeader:
    """Parse and verify the first 256 bytes. Raises CorruptError or UnsupportedError."""
    head = bytes(memoryview(data)[:HEADER_SIZE])
    if len(head) < HEADER_SIZE:
        raise CorruptError(f"companion is truncated: {len(head)} of {HEADER_SIZE} header bytes")
    if not head.startswith(MAGIC):
        raise CorruptError("not a companion index: wrong magic")
    if xxhash.xxh3_128_digest(head[: _HEADER.size]) != head[_HEADER.size :]:
        raise CorruptError("companion header does not match its checksum")
    (_, version, entry_size, entry_count, unique_id, previous_unique_id, generation, cycle, serial,
     first_seq, disk_id, previous_digest, previous_size, start_size, end_size, eol, opened_ns,
     sealed_ns, disk_count, address_space, flags, stored_bytes, earlier_cycles, carried_digest,
     entries_digest) = _HEADER.unpack(head[: _HEADER.size])  # fmt: skip
    if version != VERSION or entry_size != ENTRY_SIZE:
        raise UnsupportedError(f"companion of version {version}; this hvfuse reads version {VERSION}")
    try:
        space = AddressSpace(address_space)
    except ValueError:
        raise UnsupportedError(f"companion with unknown address space {address_space}") from None
    if earlier_cycles >= cycle or (earlier_cycles and not flags & COMPACTED):
        raise CorruptError(f"companion claims {earlier_cycles} cycles before cycle {cycle}")
    return CompanionHeader(
        entry_count=entry_count, unique_id=unique_id, previous_unique_id=previous_unique_id,
        generation=generation, cycle=cycle, serial=serial, first_seq=first_seq, disk_id=disk_id,
        previous_digest=previous_digest, previous_size=previous_size, start_size=start_size,
        end_size=end_size, eol=eol, opened_ns=opened_ns, sealed_ns=sealed_ns, disk_count=disk_count,
        address_space=space, flags=flags, stored_bytes=stored_bytes, entries_digest=entries_digest,
        earlier_cycles=earlier_cycles, carried_digest=carried_digest,
    )  # fmt: skip


def unpack(data: Buffer) -> tuple[CompanionHeader, Entries]:
    """Parse and verify a whole companion. Raises CorruptError or UnsupportedError."""
    header = unpack_header(data)
    expected = HEADER_SIZE + header.entry_count * ENTRY_SIZE
    if len(data) != expected:
        raise CorruptError(f"companion has {len(data)} bytes, its header promises {expected}")
    body = memoryview(data)[HEADER_SIZE:]
    if xxhash.xxh3_128_digest(body) != header.entries_digest:
        raise CorruptError("companion entries do not match their checksum")
    return header, np.frombuffer(body, ENTRY_DTYPE)


def pack_entry(  # noqa: PLR0917 - the fields in their order on disk
    seed: int,
    seq: int,
    offset: int,
    location: int,
    xxh3: int,
    length: int,
    byte_sum: int,
    timestamp: int,
    kind: int,
) -> bytes:
    """One entry of 64 bytes, its check included."""
    raw = ENTRY.pack(seq, offset, location, xxh3, length, byte_sum, timestamp, kind, 0)
    return raw[:56] + xxhash.xxh3_64_intdigest(raw[:56], seed).to_bytes(8, "little")


def entry_is_valid(raw: Buffer, seed: int) -> bool:
    """Whether 64 bytes are an entry of the log with that seed."""
    view = memoryview(raw)
    return xxhash.xxh3_64_intdigest(view[:56], seed) == int.from_bytes(view[56:64], "little")
