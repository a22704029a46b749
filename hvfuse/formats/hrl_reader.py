"""Reading closed replication logs, ours and foreign ones: back from the end, then forward, verifying.

Nothing is believed before it is checked: blocks lie apart and in order within the file, payloads fill
the room between them exactly, and every checksum that the writer made matches. What is held at a time
is one metadata block, one piece of payload, and 8 bytes for each block of the log.
"""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import stringzilla
import xxhash
from numpy.typing import NDArray

from hvfuse import system
from hvfuse.errors import CorruptError, HvfuseError, NotFoundError, UnsupportedError
from hvfuse.extent import Buffer
from hvfuse.formats import hrl
from hvfuse.formats.companion import CompanionHeader, Entries, Kind
from hvfuse.formats.hrl import LogEntries, LogHeader
from hvfuse.formats.image import Image

PIECE = 1 << 20
"""Bytes; the most of a payload that is held at a time."""

_HOLE_XXH3 = xxhash.xxh3_64_intdigest(b"")
_NOT_CLOSED = "a log in use is closed by the next cycle; one that a crash left open is not complete"


def _ignore(_: int) -> None:
    """Nobody wants to know of the progress."""


class Source(Protocol):
    """Where a log's bytes come from."""

    @property
    def size(self) -> int:
        """Bytes."""

    def pread(self, length: int, offset: int) -> Buffer:
        """`length` bytes at `offset`, fewer only at the end."""

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges [offset, end) within [start, end) that may hold other bytes than zeroes."""


class FileSource:
    """An open file; sees its holes. Does not close it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    def pread(self, length: int, offset: int) -> bytes:
        return system.pread(self._fd, length, offset)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        return system.data_extents(self._fd, start, end)


class BytesSource:
    """Bytes in memory."""

    def __init__(self, data: Buffer) -> None:
        self._view = memoryview(data)
        self.size = len(self._view)

    def pread(self, length: int, offset: int) -> memoryview:
        return self._view[offset : offset + length]

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        if start < min(end, self.size):
            yield start, min(end, self.size)


@dataclass(frozen=True, slots=True)
class Block:
    """A verified metadata block. `offset`: where it lies in the log; `locations`: where the payload of
    each entry begins, shape (n,)."""

    offset: int
    entries: LogEntries
    locations: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One write: `length` bytes at `byte_offset` of the disk, which lie at `location` in the log.

    `timestamp`: seconds since 2000. `checksum`: of the payload; 0 when the writer made none.
    """

    byte_offset: int
    length: int
    timestamp: int
    location: int
    checksum: int

    @property
    def end(self) -> int:
        """First byte of the disk behind the write."""
        return self.byte_offset + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a verification went through. `unverified`: entries for which the writer made no checksum."""

    blocks: int
    entries: int
    payload_bytes: int
    unverified: int


@dataclass(frozen=True, slots=True)
class IndexedEntry:
    """An entry of the companion with what the log says of it. A flush mark has length 0 and
    stands in the companion alone."""

    seq: int
    kind: Kind
    xxh3: int
    entry: LogEntry


class LogReader:
    """A closed log. Raises CorruptError or UnsupportedError, whose messages begin with `name`."""

    def __init__(self, source: Source, *, name: str) -> None:
        self.name = name
        self._source = source
        with self._at(0):
            self.header: LogHeader = hrl.unpack_header(source.pread(hrl.HEADER_SIZE, 0))
        self._offsets = self._walk_back()

    @property
    def eol(self) -> int:
        """Logical bytes of the log."""
        return self.header.eol_location

    @contextmanager
    def _at(self, offset: int) -> Iterator[None]:
        """Errors from within name the log and the place."""
        try:
            yield
        except HvfuseError as error:
            raise type(error)(f"{self.name}: at {offset}: {error}", hint=error.hint) from None

    def _walk_back(self) -> array[int]:
        """Where the metadata blocks lie, ascending."""
        size = self.header.metadata_size
        if self.eol == 0:
            raise CorruptError(f"{self.name}: not closed properly: it has no end mark", hint=_NOT_CLOSED)
        if self.eol > self._source.size:
            raise CorruptError(
                f"{self.name}: truncated: ends at {self._source.size}, but its header says at {self.eol}"
            )
        offsets = array("Q")
        at = self.eol - size
        while True:
            if at < hrl.HEADER_SIZE:
                raise CorruptError(f"{self.name}: the chain of metadata blocks leads out of the log, to {at}")
            offsets.append(at)
            with self._at(at):
                distance, _ = hrl.unpack_block_header(self._source.pread(hrl.BLOCK_HEADER_SIZE, at))
                if 0 < distance < size:
                    raise CorruptError(f"the metadata block overlaps its predecessor, {distance} bytes before it")
            if distance == 0:
                break
            at -= distance
        offsets.reverse()
        return offsets

    def blocks(self) -> Iterator[Block]:
        """The metadata blocks in the order in which they were written."""
        size = self.header.metadata_size
        start, entry_count = hrl.HEADER_SIZE, 0
        for at in self._offsets:
            with self._at(at):
                _, entries = hrl.unpack_metadata_block(self._source.pread(size, at), size)
                ends = start + np.cumsum(entries["data_length"], dtype=np.int64)
                end = int(ends[-1]) if len(ends) else start
                if end != at:
                    raise CorruptError(f"the payloads end at {end} and not where their metadata block begins")
            yield Block(at, entries, ends - entries["data_length"])
            start = at + size
            entry_count += len(entries)
        promised = self.header.total_metadata_entries
        if self.header.is_ours and entry_count != promised:
            raise CorruptError(f"{self.name}: {entry_count} entries, but its header says {promised}")

    def __iter__(self) -> Iterator[LogEntry]:
        """The entries in the order of the writes."""
        for block in self.blocks():
            entries = block.entries
            for offset, length, timestamp, location, check in zip(
                entries["byte_offset"].tolist(),
                entries["data_length"].tolist(),
                entries["timestamp"].tolist(),
                block.locations.tolist(),
                entries["data_checksum"].tolist(),
                strict=True,
            ):
                yield LogEntry(offset, length, timestamp, location, check)

    def pieces(self, entry: LogEntry) -> Iterator[tuple[int, Buffer | int]]:
        """The payload in order, without gaps: (offset on the disk, bytes), or for a hole of the log
        (offset on the disk, number of zeroes)."""
        shift = entry.byte_offset - entry.location
        at, payload_end = entry.location, entry.location + entry.length
        for data, end in self._source.data_extents(entry.location, payload_end):
            if data > at:
                yield at + shift, data - at
            for start in range(data, end, PIECE):
                length = min(PIECE, end - start)
                piece = self._source.pread(length, start)
                if len(piece) != length:
                    raise CorruptError(f"{self.name}: at {start}: the payload ends early: the log was cut")
                yield start + shift, piece
            at = end
        if at < payload_end:
            yield at + shift, payload_end - at

    def verify(self, advance: Callable[[int], object] = _ignore) -> Verified:
        """Go through the whole log, payloads included. Raises CorruptError naming the first fault.

        `advance` is told of every payload's bytes once they are verified.
        """
        entries = payload_bytes = unverified = 0
        for entry in self:
            self._verify_payload(entry)
            advance(entry.length)
            entries += 1
            payload_bytes += entry.length
            unverified += entry.checksum == 0
        return Verified(blocks=len(self._offsets), entries=entries, payload_bytes=payload_bytes, unverified=unverified)

    def _verify_payload(self, entry: LogEntry) -> None:
        if entry.checksum == 0:
            return
        pieces = (piece for _, piece in self.pieces(entry) if not isinstance(piece, int))
        byte_sum = sum(int(stringzilla.bytesum(piece)) for piece in pieces)
        if hrl.data_checksum(byte_sum) != entry.checksum:
            raise CorruptError(
                f"{self.name}: at {entry.location}: the payload for bytes {entry.byte_offset} to {entry.end} "
                "of the disk does not match its checksum"
            )

    def with_companion(self, header: CompanionHeader, entries: Entries) -> Iterator[IndexedEntry]:
        """The companion's entries, each compared with the log's. Raises CorruptError where they differ.

        `header`, `entries`: what `companion.unpack` gave.
        """
        ids = (header.unique_id, header.previous_unique_id, header.eol)
        if ids != (self.header.unique_id, self.header.previous_unique_id, self.eol):
            raise CorruptError(f"{self.name}: the companion beside it belongs to another log")
        logged, kinds = iter(self), frozenset(Kind)
        names = ["seq", "kind", "offset", "length", "timestamp", "location", "byte_sum", "xxh3"]
        rows = zip(*(entries[name].tolist() for name in names), strict=True)
        for number, (seq, kind, *fields, xxh3) in enumerate(rows):
            wanted = LogEntry(*fields)
            if seq != header.first_seq + number or kind not in kinds:
                raise CorruptError(f"{self.name}: entry {number} of its companion is out of sequence")
            if kind != Kind.FLUSH and next(logged, None) != wanted:
                raise CorruptError(f"{self.name}: at {wanted.location}: log and companion disagree on entry {seq}")
            yield IndexedEntry(seq, Kind(kind), xxh3, wanted)
        if next(logged, None) is not None:
            raise CorruptError(f"{self.name}: the log has entries that its companion lacks")

    def verify_companion(self, header: CompanionHeader, entries: Entries) -> None:
        """Compare with the companion, payloads included. Raises CorruptError naming the first fault.

        That holes hold zeroes, `verify` has shown.
        """
        for indexed in self.with_companion(header, entries):
            entry = indexed.entry
            if indexed.kind is Kind.WRITE:
                is_right = self._xxh3(entry) == indexed.xxh3
            else:
                is_right = (entry.checksum, indexed.xxh3) == (hrl.ZERO_CHECKSUM, _HOLE_XXH3)
            if not is_right:
                raise CorruptError(
                    f"{self.name}: at {entry.location}: the payload of entry {indexed.seq} does not match "
                    "its companion's checksum"
                )

    def _xxh3(self, entry: LogEntry) -> int:
        digest = xxhash.xxh3_64()
        for start in range(entry.location, entry.location + entry.length, PIECE):
            length = min(PIECE, entry.location + entry.length - start)
            digest.update(self._source.pread(length, start))
        return digest.intdigest()

    def check_fits(self, disk_size: int) -> None:
        """Raises CorruptError when an entry reaches beyond a disk of `disk_size` bytes."""
        for entry in self:
            if entry.end > disk_size:
                raise CorruptError(
                    f"{self.name}: at {entry.location}: an entry writes bytes {entry.byte_offset} to "
                    f"{entry.end}, but the disk ends at {disk_size}: the log is corrupt or another disk's"
                )


def replay(log: LogReader, image: Image, advance: Callable[[int], object] = _ignore) -> None:
    """Write a log's entries in their order onto a disk, then make it durable.

    Whoever calls has verified the log and that it fits: payloads are not checked here. Holes of the
    log become zeroes. `advance` is told of every payload's bytes. Raises OSError.
    """
    for entry in log:
        for offset, piece in log.pieces(entry):
            if isinstance(piece, int):
                image.zero(offset, piece)
            else:
                image.pwrite(offset, piece)
        advance(entry.length)
    image.flush()


@contextmanager
def open_log(path: str) -> Iterator[LogReader]:
    """A closed log's reader, for as long as the context lasts.

    Raises NotFoundError, UnsupportedError, CorruptError, or HvfuseError when it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise HvfuseError(f"{path}: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnsupportedError(f"{path}: not a regular file")
        yield LogReader(FileSource(fd), name=path)
    finally:
        os.close(fd)
