"""The note of the frames that a direct copy has put into the images, but not synced yet.

A process that dies leaves the page cache whole, so its successor under the same boot need not be sent these
frames again: it syncs the images first, and only then counts them as held. The note is a small file, which
is never synced itself: after a loss of power it says nothing, whatever is left of it.

    STORE/unsynced/VM, little-endian, packed

    Head, 64 bytes
    offset size field
         0    4 magic "HVFU"
         4    2 version, 1
         6    2 zero
         8   16 boot_id: of the host
        24   16 generation: of the copy
        40    8 seq: which the copy will have
        48    8 stage_id: of its staging record, so that a copy that was dropped and begun again is another
        56    8 xxh3-64 of bytes 0 to 55

    Entry i, 16 bytes at 64 + 16 * i, appended after all that frame `number` says was written
         0    4 number
         4    4 i
         8    8 xxh3-64 of bytes 0 to 7, its seed being the head's checksum

Whatever does not check out ends the note: the entries before it count, none after it. What is noted counts
only with a head that names this boot and this very copy.

What must hold: an image's bytes are written before their frame is noted, and the note is gone before anybody
is told that a sync failed; the kernel reports such a failure once, and calls the next sync a success.
"""

from __future__ import annotations

import os
import stat
import struct

import xxhash

from hvfuse import system
from hvfuse.target.environment import file_faults
from hvfuse.target.schema import StagingRecord
from hvfuse.target.store import Store

MAGIC = b"HVFU"
VERSION = 1
MAX_SIZE = 16 << 20
"""Bytes; more than a note ever has."""

_HEAD = struct.Struct("<4sH2x16s16sQ8s")
_ENTRY = struct.Struct("<II")
_CHECKSUM = struct.Struct("<Q")
HEAD_SIZE = _HEAD.size + _CHECKSUM.size
ENTRY_SIZE = _ENTRY.size + _CHECKSUM.size
assert (HEAD_SIZE, ENTRY_SIZE) == (64, 16)


class UnsyncedFrames:
    """The note of the copy `staging` of VM `vm`. Whoever uses it holds the images' lock.

    Raises NoSpaceError, and HvfuseError naming the file.
    """

    def __init__(self, store: Store, vm: str, staging: StagingRecord) -> None:
        self._path = store.unsynced_path(vm)
        body = _HEAD.pack(MAGIC, VERSION, system.boot_id(), staging.generation, staging.seq, staging.stage_id)
        self._seed = xxhash.xxh3_64_intdigest(body)
        self._head = body + _CHECKSUM.pack(self._seed)
        self._fd = -1
        self._count = 0

    def close(self) -> None:
        """Let the file go; it stays valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self) -> frozenset[int]:
        """The frames noted for this copy under this boot; none if the note is another's."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return frozenset()
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return frozenset()
            raw = system.pread(fd, MAX_SIZE, 0)
        except OSError:
            return frozenset()
        finally:
            os.close(fd)
        if raw[:HEAD_SIZE] != self._head:
            return frozenset()
        found = set()
        for index, at in enumerate(range(HEAD_SIZE, len(raw) - ENTRY_SIZE + 1, ENTRY_SIZE)):
            number = _ENTRY.unpack_from(raw, at)[0]
            if raw[at : at + ENTRY_SIZE] != self._entry(number, index):
                break
            found.add(number)
        return frozenset(found)

    def start(self) -> None:
        """Begin an empty note, whatever was there."""
        self.close()
        with file_faults(self._path):
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o600)
            system.pwrite("store:unsynced-start", self._fd, self._head, 0)
        self._count = 0

    def append(self, number: int) -> None:
        """Note a frame, all of which is in the images."""
        with file_faults(self._path):
            at = HEAD_SIZE + self._count * ENTRY_SIZE
            system.pwrite("store:unsynced", self._fd, self._entry(number, self._count), at)
        self._count += 1

    def empty(self) -> None:
        """Forget the frames: they are durable, and known to be."""
        with file_faults(self._path):
            system.truncate("store:unsynced-empty", self._fd, HEAD_SIZE)
        self._count = 0

    def drop(self) -> None:
        """Remove the note: no frame counts any more."""
        self.close()
        drop(self._path)

    def _entry(self, number: int, index: int) -> bytes:
        body = _ENTRY.pack(number, index)
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, self._seed))


def drop(path: str) -> None:
    """Remove the note at `path`, if there is one."""
    with file_faults(path):
        system.unlink("store:unsynced-drop", path, missing_ok=True)
