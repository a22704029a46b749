"""The index of an active log: entries stored through a shared map, without a system call.

A store into the map is in the page cache at once, so it survives the death of this process; it
survives the host only after `sync`. Space is reserved before it is mapped: a store into a map over a
full disk would be a SIGBUS.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import replace

import numpy as np
import xxhash

from hvfuse import system
from hvfuse.formats.companion import ENTRY_DTYPE, ENTRY_SIZE, Entries, entry_is_valid, entry_seed
from hvfuse.formats.tracking import HEAD_SIZE, IndexHead, unpack_head

_FIRST_ENTRIES = 4096
_BODY = struct.Struct("<QQQQIIIB11x")
_CHECK = struct.Struct("<Q")
assert _BODY.size + _CHECK.size == ENTRY_SIZE


class IndexMap:
    """One index-map file. Not thread-safe: the owner of the log guards it.

    Raises OSError (ENOSPC and so on) from the constructor, `append` and `sync`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._size = os.fstat(self._fd).st_size
        self._seed = 0
        self._end = HEAD_SIZE
        self._synced = HEAD_SIZE
        self._map: mmap.mmap | None = None
        self._view = memoryview(b"")
        minimum = HEAD_SIZE + _FIRST_ENTRIES * ENTRY_SIZE
        try:
            self._remap(max(self._size - self._size % mmap.PAGESIZE, minimum))
        except BaseException:
            os.close(self._fd)
            raise

    def _remap(self, size: int) -> None:
        system.allocate("index:allocate", self._fd, 0, size)
        fresh = mmap.mmap(self._fd, size)
        self._release()
        self._map, self._view, self._size = fresh, memoryview(fresh), size

    def _release(self) -> None:
        self._view.release()
        if self._map is not None:
            self._map.close()

    @property
    def count(self) -> int:
        """Entries of the current log."""
        return (self._end - HEAD_SIZE) // ENTRY_SIZE

    def head(self) -> IndexHead | None:
        """The head as stored; None when there is none."""
        return unpack_head(self._view[:HEAD_SIZE])

    def begin(self, head: IndexHead) -> None:
        """Forget the entries and belong to the log that `head` names. What they took in memory is the page cache's."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
        self.store_head(head)
        self._seed = entry_seed(head.unique_id)
        self._end = self._synced = HEAD_SIZE

    def store_head(self, head: IndexHead) -> None:
        """Replace the head by plain stores; the entries stay."""
        raw = head.pack()
        self._view[: len(raw)] = raw

    def forget(self) -> None:
        """Let the head name no active log any more: the log was sealed after a death, or given up."""
        head = self.head()
        if head is not None and head.active:
            self.store_head(replace(head, active=False))

    def append(  # noqa: PLR0917 - the fields in their order on disk, on the hot path
        self,
        seq: int,
        offset: int,
        location: int,
        xxh3: int,
        length: int,
        byte_sum: int,
        timestamp: int,
        kind: int,
    ) -> None:
        """Store one entry. A process that dies in here leaves an entry whose check fails."""
        at = self._end
        if at == self._size:
            self._remap(HEAD_SIZE + 2 * (self._size - HEAD_SIZE))
        _BODY.pack_into(self._view, at, seq, offset, location, xxh3, length, byte_sum, timestamp, kind)
        check = xxhash.xxh3_64_intdigest(self._view[at : at + _BODY.size], self._seed)
        _CHECK.pack_into(self._view, at + _BODY.size, check)
        self._end = at + ENTRY_SIZE

    def entries(self, first: int = 0) -> Entries:
        """A copy of the entries from number `first` on; shape (count - first,)."""
        start = HEAD_SIZE + first * ENTRY_SIZE
        return np.frombuffer(self._view[start : self._end], ENTRY_DTYPE).copy()

    def recover(self, head: IndexHead) -> Entries:
        """Take up the log that `head` names after a death: find the valid entries, which then count."""
        self._seed = entry_seed(head.unique_id)
        self._end = HEAD_SIZE
        seq = head.first_seq
        while self._end < self._size and self._holds(self._end, seq):
            self._end += ENTRY_SIZE
            seq += 1
        self._synced = HEAD_SIZE
        return self.entries()

    def _holds(self, at: int, seq: int) -> bool:
        stored = int(_CHECK.unpack_from(self._view, at)[0])
        return stored == seq and entry_is_valid(self._view[at : at + ENTRY_SIZE], self._seed)

    def sync(self) -> None:
        """Make the head and the entries durable. A failure is final."""
        if self._map is None:
            return
        system.sync_map("index:sync", self._map, self._synced - self._synced % mmap.PAGESIZE, self._end)
        if self._synced == HEAD_SIZE:
            system.sync_map("index:sync-head", self._map, 0, HEAD_SIZE)
        self._synced = self._end

    def close(self) -> None:
        """Unmap and close."""
        self._release()
        self._map = None
        self._view = memoryview(b"")
        os.close(self._fd)
