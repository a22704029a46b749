"""The replication log of one disk while it takes writes, and its sealing.

On disk it is an [MS-HRL] file (`hvfuse.formats.hrl`): payloads appended back to back, and after
every 127 of them, or at a flush, the metadata block that describes them. Beside it stands the index
map (`hvfuse.tracker.index`), which knows every entry at once and with a strong checksum. An entry is
stored only after its payload was written, so whatever the index holds is in the log.

A log usually overwrites an earlier log's file: its stale bytes lie beyond the end and never count,
but a zero or trim, which is a hole in the log, has to be punched into them.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from stringzilla import bytesum
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from hvfuse import spool, system
from hvfuse.errors import CorruptError, HvfuseError
from hvfuse.extent import Buffer
from hvfuse.formats import companion, hrl
from hvfuse.formats.companion import MAX_ENTRY_LENGTH, AddressSpace, CompanionHeader, Entries, Kind
from hvfuse.formats.tracking import IndexHead
from hvfuse.tracker.index import IndexMap

FIRST_DATA = hrl.HEADER_SIZE + hrl.METADATA_SIZE
"""Bytes; where payloads begin: behind the header and the first, empty, metadata block."""
MAX_LOG_SIZE = 4 << 40
"""Bytes; a log that has come this far (by holes) is rotated: file systems end at 16 TiB."""

_HOLE_XXH3 = xxh3_64_intdigest(b"")
_AHEAD = 4 << 20
"""Bytes of a log that are read at once where it is read in order."""
_WRITE = Kind.WRITE  # looking a member up takes long enough to be seen in the time of a small write


Payload = tuple[Kind, int, bytes | int]
"""(kind, offset, the bytes written or, for a hole, their number)."""


class ReplicationLog:
    """An open log. The owner's gate guards everything but `sync` and `seal`, which run outside of it
    and exclude each other by `_durable`: a log is not closed while somebody syncs it."""

    def __init__(self, folder: str, disk: str, head: IndexHead, index: IndexMap) -> None:
        self.folder = folder
        self.disk = disk
        self.head = head
        self.path = os.path.join(folder, spool.log_name(disk, head.serial))
        self.index = index
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self.path, flags, 0o600)
        system.keep_pages_small(self._fd)
        self._stale_end = os.fstat(self._fd).st_size
        self._end = FIRST_DATA
        self._next_seq = head.first_seq
        self._block = hrl.HEADER_SIZE
        self.stored = 0
        """Bytes of payload; holes do not count."""
        self.budget_check = 0
        """What `stored` may come to before the VM's budget is looked at again."""
        self._pending_from = 0
        self._pending = 0
        self._described = 0
        self._marked = 0
        self._durable = threading.Lock()
        self._sealed = False
        self._asked = -_AHEAD

    @classmethod
    def prepare(cls, folder: str, disk: str, head: IndexHead, index: IndexMap) -> ReplicationLog:
        """Make a log that stands by, over a spare if there is one. Raises OSError."""
        spool.take_spare(folder, disk, os.path.join(folder, spool.log_name(disk, head.serial)))
        try:
            log = cls(folder, disk, head, index)
        except OSError:
            spool.discard_log(folder, disk, os.path.join(folder, spool.log_name(disk, head.serial)))
            raise
        try:
            index.begin(head)
            empty = hrl.pack_metadata_block(np.empty(0, companion.ENTRY_DTYPE), 0)
            system.pwrite("log:prepare", log._fd, log._header(eol=0).pack() + empty, 0)
            # A guest's sync promises that the log is found again, by its name and beside its index map.
            system.fsync_directory("log:prepare-directory", folder)
        except OSError:
            log.close()
            spool.discard_log(folder, disk, log.path)
            raise
        return log

    @classmethod
    def recover(cls, folder: str, disk: str, head: IndexHead, index: IndexMap) -> ReplicationLog:
        """Take up a log whose process died while the host lived on: all that the index holds counts.

        Raises CorruptError when the entries' places contradict each other.
        """
        log = cls(folder, disk, head, index)
        entries = index.recover(head)
        log._next_seq += len(entries)
        numbers = np.flatnonzero(entries["kind"] != Kind.FLUSH)
        payloads = entries[numbers]
        ends = np.concatenate([[FIRST_DATA], (payloads["location"] + payloads["length"]).astype(np.int64)])
        gaps = payloads["location"].astype(np.int64) - ends[:-1]
        if not np.isin(gaps, (0, hrl.METADATA_SIZE)).all():
            raise CorruptError(f"{log.path}: the index does not say where the payloads lie")
        blocks = np.flatnonzero(gaps)
        log._end = int(ends[-1])
        if len(blocks):
            log._block = int(ends[blocks[-1]])
            log._described = int(blocks[-1])
            log._pending_from = int(numbers[blocks[-1]])
        log._pending = len(payloads) - log._described
        log.stored = int(payloads["length"][payloads["kind"] == Kind.WRITE].sum())
        return log

    @property
    def size(self) -> int:
        """Logical bytes so far; holes count."""
        return self._end

    @property
    def next_seq(self) -> int:
        """Sequence number that the next entry will get."""
        return self._next_seq

    @property
    def entry_count(self) -> int:
        """Entries so far, flush marks included."""
        return self.index.count

    def activate(self, *, opened_ns: int, first_seq: int, previous_size: int, start_size: int) -> None:
        """From now on this log takes the writes. No system call: it happens within the barrier."""
        self.head = replace(
            self.head,
            active=True,
            opened_ns=opened_ns,
            first_seq=first_seq,
            previous_size=previous_size,
            start_size=start_size,
        )
        self._next_seq = first_seq
        self.index.store_head(self.head)

    def append_write(self, data: Buffer, offset: int) -> None:
        """Log that `data` goes to `offset`. Raises OSError; the entry is then not in the log."""
        location, length = self._end, len(data)
        system.pwrite_small("log:append", self._fd, data, location)
        byte_sum = ~bytesum(data) & 0xFFFFFFFF
        self._append(offset, location, xxh3_64_intdigest(data), length, byte_sum, _WRITE)
        self.stored += length

    def append_hole(self, kind: Kind, offset: int, length: int) -> None:
        """Log that a range reads as zeroes from now on. Raises OSError."""
        while length > 0:
            piece = min(length, MAX_ENTRY_LENGTH)
            if self._end < self._stale_end:
                system.write_zeroes("log:hole", self._fd, self._end, piece)
            self._append(offset, self._end, _HOLE_XXH3, piece, hrl.ZERO_CHECKSUM, kind)
            offset += piece
            length -= piece

    def _append(  # noqa: PLR0917 - hot path
        self, offset: int, location: int, xxh3: int, length: int, byte_sum: int, kind: Kind
    ) -> None:
        timestamp = hrl.hrl_time(time.time_ns())
        self.index.append(self._next_seq, offset, location, xxh3, length, byte_sum, timestamp, kind)
        self._next_seq += 1
        self._end = location + length
        self._pending += 1
        if self._pending == hrl.ENTRIES_PER_BLOCK:
            self.describe()

    def describe(self) -> None:
        """Write the metadata block of the entries that have none yet. Raises OSError."""
        if not self._pending:
            return
        entries = self.index.entries(self._pending_from)
        block = hrl.pack_metadata_block(entries[entries["kind"] != Kind.FLUSH], self._end - self._block)
        system.pwrite("log:describe", self._fd, block, self._end)
        self._block = self._end
        self._end += len(block)
        self._described += self._pending
        self._pending_from = self.index.count
        self._pending = 0

    def mark_flush(self) -> None:
        """Note that everything before is durable, on the log and on the image."""
        if self._marked == self.index.count:
            return
        timestamp = hrl.hrl_time(time.time_ns())
        self.index.append(self._next_seq, 0, self._end, _HOLE_XXH3, 0, hrl.ZERO_CHECKSUM, timestamp, Kind.FLUSH)
        self._next_seq += 1
        self._marked = self.index.count

    def sync(self) -> None:
        """Make the log and its index durable; nothing to do once sealed. Raises OSError: final."""
        with self._durable:
            if not self._sealed:
                refused = system.at_once(lambda: system.fdatasync("log:sync", self._fd), self.index.sync)
                for error in filter(None, refused):
                    raise error

    def seal(
        self,
        *,
        sealed_ns: int,
        end_size: int,
        disk_count: int,
        previous_digest: bytes,
        space: AddressSpace,
        flags: int = 0,
    ) -> CompanionHeader:
        """Close the log for good and put its companion beside it; returns the companion's header.

        The ritual: last metadata block, header with the end, sync; then the companion, which is
        whole and durable or absent. The caller has made the image durable, so that a companion
        proves both. Raises OSError: final, the disk must be resynchronised.
        """
        with self._durable:
            if self._sealed:
                raise OSError(errno.EBADF, "the log was given up")
            self.describe()
            system.pwrite("seal:header", self._fd, self._header(eol=self._end).pack(), 0)
            system.fsync("seal:log", self._fd)
            entries = self.index.entries()
            header = self._companion_header(entries, sealed_ns, end_size, disk_count, previous_digest, space, flags)
            path = os.path.join(self.folder, spool.companion_name(self.disk, self.head.serial))
            system.replace_file("seal:companion", path, b"".join((header.pack(), entries.view(np.uint8).data)))
            self._sealed = True
            os.close(self._fd)
        return header

    def _companion_header(  # noqa: PLR0917 - internal
        self,
        entries: Entries,
        sealed_ns: int,
        end_size: int,
        disk_count: int,
        previous_digest: bytes,
        space: AddressSpace,
        flags: int,
    ) -> CompanionHeader:
        head = self.head
        return CompanionHeader(
            entry_count=len(entries),
            unique_id=head.unique_id,
            previous_unique_id=head.previous_unique_id,
            generation=head.generation,
            cycle=head.cycle,
            serial=head.serial,
            first_seq=head.first_seq,
            disk_id=head.disk_id,
            previous_digest=previous_digest,
            previous_size=head.previous_size,
            start_size=head.start_size,
            end_size=end_size,
            eol=self._end,
            opened_ns=head.opened_ns,
            sealed_ns=sealed_ns,
            disk_count=disk_count,
            address_space=space,
            flags=flags,
            stored_bytes=self.stored,
            entries_digest=xxh3_128_digest(entries.view(np.uint8).data),
        )

    def _header(self, *, eol: int) -> hrl.LogHeader:
        now = hrl.hrl_time(time.time_ns())
        return hrl.LogHeader(
            timestamp=hrl.hrl_time(self.head.opened_ns) if self.head.opened_ns else now,
            original_size=FIRST_DATA,
            current_size=self._end,
            eol_location=eol,
            unique_id=self.head.unique_id,
            previous_unique_id=self.head.previous_unique_id,
            last_modified_timestamp=now,
            total_metadata_entries=self._described,
        )

    def payloads(self, first: int, last: int) -> Iterator[Payload]:
        """What the entries first <= number < last wrote, in log order, flush marks left out.

        Raises CorruptError where a payload is not what it was.
        """
        for entry in self.index.entries(first)[: max(0, last - first)]:
            payload = self._payload(entry)
            if payload is not None:
                yield payload

    def proven_entries(self) -> int:
        """How many entries, from the first, have the payload that they had: what a crash of the host left.

        0 if the file is not the log that the index belongs to.
        """
        header = system.pread(self._fd, hrl.HEADER_SIZE, 0)
        try:
            if hrl.unpack_header(header).unique_id != self.head.unique_id:
                return 0
        except HvfuseError:
            return 0
        for number, entry in enumerate(self.index.entries()):
            try:
                self._payload(entry)
            except CorruptError:
                return number
        return self.index.count

    def _payload(self, entry: np.void) -> Payload | None:
        """What an entry wrote, verified; None for a flush mark. Raises CorruptError."""
        kind, offset, length = Kind(int(entry["kind"])), int(entry["offset"]), int(entry["length"])
        if kind is Kind.FLUSH:
            return None
        if kind is not Kind.WRITE:
            return kind, offset, length
        location = int(entry["location"])
        if not self._asked <= location < self._asked + _AHEAD:
            system.read_ahead(self._fd, location, _AHEAD)
            self._asked = location
        data = system.pread(self._fd, length, location)
        if xxh3_64_intdigest(data) != int(entry["xxh3"]):
            raise CorruptError(f"{self.path}: the payload at {location} does not match its checksum")
        return kind, offset, data

    def close(self) -> None:
        """Let go of the file without sealing it; the file stays."""
        with self._durable:
            if not self._sealed:
                self._sealed = True
                os.close(self._fd)


def new_log_id() -> bytes:
    """A fresh unique_id, 16 bytes."""
    return uuid.uuid4().bytes
