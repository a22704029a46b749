"""Writing a whole replication log at once, with what its companion needs to know of it.

For logs that are made after the fact. The tracker, which logs while the guest writes and has to survive
its death at any instant, has its own way (`hvfuse.tracker.log`); the file that comes of it is the same.
"""

from __future__ import annotations

import numpy as np
import xxhash

from hvfuse import system
from hvfuse.extent import Buffer
from hvfuse.formats import companion, hrl
from hvfuse.formats.companion import MAX_ENTRY_LENGTH, Entries, Kind

MAX_PAYLOAD = 1 << 20
"""Bytes of one write; longer ones become several. A payload is checked as a whole whenever any byte of it
is wanted."""
BUFFER = 4 << 20
"""Bytes that are written at once."""


class LogWriter:
    """Writes a log into the empty file open at `fd`, which stays the caller's. Raises OSError.

    `unique_id`, `previous_unique_id`: 16 bytes each; `opened_ns`, `written_ns`: ns since 1970. Until
    `close`, the file has no header and is no log.
    """

    def __init__(
        self, fd: int, *, unique_id: bytes, previous_unique_id: bytes, opened_ns: int, written_ns: int
    ) -> None:
        self._fd = fd
        self._unique_id = unique_id
        self._previous_unique_id = previous_unique_id
        self._opened = hrl.hrl_time(opened_ns)
        self._written = hrl.hrl_time(written_ns)
        self._raw = bytearray()  # the entries so far, yet without sequence numbers and checks
        self._described = 0
        self._block = hrl.HEADER_SIZE
        self._buffer = bytearray(hrl.pack_metadata_block(np.empty(0, companion.ENTRY_DTYPE), 0))
        self._buffer_at = hrl.HEADER_SIZE
        self.stored_bytes = 0
        """Of payload; holes do not count."""

    @property
    def end(self) -> int:
        """Logical bytes so far; after `close`, those of the log."""
        return self._buffer_at + len(self._buffer)

    def write(self, offset: int, data: Buffer) -> None:
        """Log that `data` goes to `offset` of the disk."""
        view = memoryview(data)
        for start in range(0, len(view), MAX_PAYLOAD):
            piece = view[start : start + MAX_PAYLOAD]
            location = self.end
            self._buffer += piece
            self.stored_bytes += len(piece)
            self._enter(offset + start, location, len(piece), piece, Kind.WRITE)
            if len(self._buffer) >= BUFFER:
                self._flush()

    def zero(self, offset: int, length: int) -> None:
        """Log that a range reads as zeroes: a hole of the log."""
        for start in range(0, length, MAX_ENTRY_LENGTH):
            piece = min(length - start, MAX_ENTRY_LENGTH)
            location = self.end
            self._flush()
            self._buffer_at += piece
            self._enter(offset + start, location, piece, b"", Kind.ZERO)

    def _enter(self, offset: int, location: int, length: int, payload: Buffer, kind: Kind) -> None:
        xxh3 = xxhash.xxh3_64_intdigest(payload)
        self._raw += companion.ENTRY.pack(
            0, offset, location, xxh3, length, hrl.checksum(payload), self._written, kind, 0
        )  # fmt: skip
        if self._count - self._described == hrl.ENTRIES_PER_BLOCK:
            self._describe()

    @property
    def _count(self) -> int:
        return len(self._raw) // companion.ENTRY_SIZE

    def _describe(self) -> None:
        """Append the metadata block of the entries that have none yet."""
        if self._count > self._described:
            entries = np.frombuffer(self._raw[self._described * companion.ENTRY_SIZE :], companion.ENTRY_DTYPE)
            at = self.end
            self._buffer += hrl.pack_metadata_block(entries, at - self._block)
            self._block = at
            self._described = self._count

    def _flush(self) -> None:
        if self._buffer:
            system.pwrite_small("hrl:append", self._fd, self._buffer, self._buffer_at)
            self._buffer_at += len(self._buffer)
            self._buffer.clear()

    def close(self, *, next_seq: int) -> Entries:
        """Finish the log and make its file durable; returns the companion's entries.

        The entry after the last would have the sequence number `next_seq`, if there is room below it for
        all of them; otherwise they count from 0.
        """
        self._describe()
        self._flush()
        header = hrl.LogHeader(
            timestamp=self._opened,
            original_size=self.end,
            current_size=self.end,
            eol_location=self.end,
            unique_id=self._unique_id,
            previous_unique_id=self._previous_unique_id,
            last_modified_timestamp=self._written,
            total_metadata_entries=self._count,
        )
        system.pwrite("hrl:header", self._fd, header.pack(), 0)
        system.fsync("hrl:sync", self._fd)
        return self._numbered(max(0, next_seq - self._count))

    def _numbered(self, first_seq: int) -> Entries:
        """All entries, whole."""
        entries = np.frombuffer(self._raw, companion.ENTRY_DTYPE)
        entries["seq"] = np.arange(first_seq, first_seq + len(entries), dtype=np.uint64)
        raw, seed = memoryview(self._raw), companion.entry_seed(self._unique_id)
        checks = (xxhash.xxh3_64_intdigest(raw[at : at + 56], seed) for at in range(0, len(raw), companion.ENTRY_SIZE))
        entries["check"] = np.fromiter(checks, np.uint64, len(entries))
        return entries
