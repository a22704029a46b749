"""Small sealed logs for tests: made by hvfuse's packers as the tracker does, and as Hyper-V does."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from hvfuse.formats import companion, hrl
from hvfuse.formats.companion import AddressSpace, CompanionHeader, Kind

UNIQUE_ID = bytes(range(16))
PREVIOUS_ID = bytes(range(16, 32))
GENERATION = b"g" * 16
SECOND = 539842382
"""A timestamp of the format."""


@dataclass(frozen=True, slots=True)
class Op:
    """One entry to be: `data` for a write, `length` for zeroes and trims, neither for a flush."""

    kind: Kind
    offset: int = 0
    data: bytes = b""
    length: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """A sealed log and its companion, whole."""

    log: bytes
    companion: bytes
    ops: tuple[Op, ...]

    def applied(self, disk: bytes) -> bytes:
        """What the disk must be after the log."""
        image = bytearray(disk)
        for op in self.ops:
            if op.kind is not Kind.FLUSH:
                data = op.data or bytes(op.length)
                image[op.offset : op.offset + len(data)] = data
        return bytes(image)


def write(offset: int, data: bytes) -> Op:
    return Op(Kind.WRITE, offset, data)


def zero(offset: int, length: int) -> Op:
    return Op(Kind.ZERO, offset, length=length)


def trim(offset: int, length: int) -> Op:
    return Op(Kind.TRIM, offset, length=length)


FLUSH = Op(Kind.FLUSH)


def sealed(ops: Sequence[Op], *, first_seq: int = 1, space: AddressSpace = AddressSpace.LOGICAL) -> Sample:
    """The log that the tracker would leave of `ops`: a block at every flush and every 127 entries."""
    body = bytearray(hrl.pack_metadata_block(np.empty(0, companion.ENTRY_DTYPE), 0))
    raws: list[bytes] = []
    pending: list[bytes] = []
    block, described = 0, 0

    def describe() -> None:
        nonlocal block, described
        if pending:
            entries = np.frombuffer(b"".join(pending), companion.ENTRY_DTYPE)
            packed = hrl.pack_metadata_block(entries, len(body) - block)
            block = len(body)
            body.extend(packed)
            described += len(pending)
            pending.clear()

    for number, op in enumerate(ops):
        data = op.data or bytes(op.length)
        stored = data if op.kind is Kind.WRITE else b""
        raw = companion.pack_entry(
            companion.entry_seed(UNIQUE_ID),
            first_seq + number,
            op.offset,
            hrl.HEADER_SIZE + len(body),
            xxhash.xxh3_64_intdigest(stored),
            len(data),
            hrl.checksum(data),
            SECOND,
            op.kind,
        )
        raws.append(raw)
        if op.kind is Kind.FLUSH:
            describe()
            continue
        body.extend(data)
        pending.append(raw)
        if len(pending) == hrl.ENTRIES_PER_BLOCK:
            describe()
    describe()
    eol = hrl.HEADER_SIZE + len(body)
    log = header(eol_location=eol, current_size=eol, total_metadata_entries=described).pack() + body
    return Sample(bytes(log), _companion(raws, eol, first_seq, space), tuple(ops))


def header(**fields: object) -> hrl.LogHeader:
    """A log header; whatever is not given is plausible."""
    values: dict[str, object] = {
        "timestamp": SECOND,
        "original_size": 8192,
        "current_size": 8192,
        "eol_location": 8192,
        "unique_id": UNIQUE_ID,
        "previous_unique_id": PREVIOUS_ID,
        "last_modified_timestamp": SECOND + 1,
        "total_metadata_entries": 0,
    }
    return hrl.LogHeader(**(values | fields))  # type: ignore[arg-type]


def _companion(raws: Sequence[bytes], eol: int, first_seq: int, space: AddressSpace) -> bytes:
    entries = b"".join(raws)
    return (
        CompanionHeader(
            entry_count=len(raws),
            unique_id=UNIQUE_ID,
            previous_unique_id=PREVIOUS_ID,
            generation=GENERATION,
            cycle=3,
            serial=17,
            first_seq=first_seq,
            disk_id=b"d" * 16,
            previous_digest=b"p" * 16,
            previous_size=1 << 16,
            start_size=1 << 16,
            end_size=1 << 16,
            eol=eol,
            opened_ns=1_700_000_000_000_000_000,
            sealed_ns=1_700_000_001_000_000_000,
            disk_count=1,
            address_space=space,
            flags=0,
            stored_bytes=0,
            entries_digest=xxhash.xxh3_128_digest(entries),
        ).pack()
        + entries
    )


def complement(data: bytes) -> int:
    """The format's checksum, the slow way."""
    return 0xFFFFFFFF - sum(data) % (1 << 32)


def foreign_block(
    entries: Sequence[tuple[int, int]], *, distance: int, size: int, operation: int = 1, checksums: Sequence[int] = ()
) -> bytes:
    """A metadata block as another writer makes it; `entries`: (offset, length), without data checksums
    unless `checksums` gives them."""
    block = struct.Struct("<QII16x")
    layout = struct.Struct("<QIIIBIB6x")
    raw = block.pack(distance, len(entries), complement(block.pack(distance, len(entries), 0)))
    for number, (offset, length) in enumerate(entries):
        data_check = checksums[number] if checksums else 0
        check = complement(layout.pack(offset, 0, length, SECOND, operation, data_check, 0))
        raw += layout.pack(offset, check, length, SECOND, operation, data_check, 0)
    return raw.ljust(size, b"\0")


def foreign(groups: Sequence[Sequence[tuple[int, bytes]]], *, size: int = 512, version: int = hrl.VERSION) -> bytes:
    """A log as Hyper-V leaves it: no data checksums, a header whose checksum is its own affair.

    `groups`: one metadata block each, of (offset, payload).
    """
    body = bytearray(foreign_block([], distance=0, size=size))
    block = 0
    for group in groups:
        for _, data in group:
            body.extend(data)
        packed = foreign_block([(offset, len(data)) for offset, data in group], distance=len(body) - block, size=size)
        block = len(body)
        body.extend(packed)
    eol = hrl.HEADER_SIZE + len(body)
    head = bytearray(header(eol_location=eol, metadata_size=size, creator_application=b"ct  ", version=version).pack())
    head[40:44] = b"\x12\x34\x56\x78"
    return bytes(head + body)
