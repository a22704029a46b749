"""The note of the frames that a direct copy has put into the images, but not synced yet.

A process that dies leaves the page cache whole, so its successor under the same boot need not be sent these
frames again: it syncs the images, and counts as held what it then reads back from them. The same boot is not
always the same page cache: a device that goes away takes what was not written with it, and when it is back and
mounted anew, every sync succeeds. Hence the checksum of what each frame left in its image. The note is a small
file, which is never synced itself: after a loss of power it says nothing, whatever is left of it.

    STORE/unsynced/VM, little-endian, packed

    Head, 64 bytes
    offset size field
         0    4 magic "HVFU"
         4    2 version, 2
         6    2 zero
         8   16 boot_id: of the host
        24   16 generation: of the copy
        40    8 seq: which the copy will have
        48    8 stage_id: of its staging record, so that a copy that was dropped and begun again is another
        56    8 xxh3-64 of bytes 0 to 55

    Entry i, 40 bytes at 64 + 40 * i, appended after all that frame `number` says was written
         0    4 number
         4    4 i
         8    4 disk: its number in the store
        12    4 length: bytes of the frame's hull, from its first extent's begin to its last one's end; not 0
        16    8 offset: of the hull on the disk, bytes
        24    8 xxh3-64 of the hull's bytes; beyond the image's end they are zeroes
        32    8 xxh3-64 of bytes 0 to 31, its seed being the head's checksum

Whatever does not check out ends the note: the entries before it count, none after it. What is noted counts
only with a head that names this boot and this very copy, and if the hull's bytes are on the medium. A note of
another version counts nothing.

Frames without data are not noted, nor are those with a hull of more than `MAX_HULL`: they are put again, which
is cheap, for there is hardly anything in them.

What must hold: an image's bytes are written before their frame is noted, and the note is gone before anybody
is told that a sync failed; the kernel reports such a failure once, and calls the next sync a success. (Where
it cannot be removed either, the checksums are left.)
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from dataclasses import dataclass
from typing import Self

import xxhash

from hvfuse import system
from hvfuse.extent import round_down, round_up
from hvfuse.frames import MAX_PLAIN, Fill, Frame
from hvfuse.target.environment import file_faults
from hvfuse.target.schema import StagingRecord
from hvfuse.target.store import Store

MAGIC = b"HVFU"
VERSION = 2
MAX_SIZE = 16 << 20
"""Bytes; more than a note ever has."""
MAX_HULL = MAX_PLAIN
"""Bytes; no frame that is made of a disk's data spans more."""

_HEAD = struct.Struct("<4sH2x16s16sQ8s")
_ENTRY = struct.Struct("<IIIIQQ")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_ZEROES = memoryview(bytes(1 << 18))
_CHECKSUM = struct.Struct("<Q")
HEAD_SIZE = _HEAD.size + _CHECKSUM.size
ENTRY_SIZE = _ENTRY.size + _CHECKSUM.size
assert (HEAD_SIZE, ENTRY_SIZE) == (64, 40)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFrame:
    """What frame `number` left in the image of disk number `disk`. The fields are those of an entry."""

    number: int
    disk: int
    offset: int
    length: int
    checksum: int

    @classmethod
    def of(cls, frame: Frame, disk: int, image: int) -> Self | None:
        """What a frame left in the image open at `image`, where it was just written; None if it is not to be
        noted. Raises OSError."""
        table = frame.table
        if not len(frame.data):
            return None
        offset = int(table["offset"][0])
        length = int(table["offset"][-1] + table["length"][-1]) - offset
        if length > MAX_HULL:
            return None
        if _is_gapless(frame):
            checksum = _checksum(frame)
        else:
            checksum = xxhash.xxh3_64_intdigest(_composed(frame, _hull(image, offset, length)))
        return cls(number=frame.header.number, disk=disk, offset=offset, length=length, checksum=checksum)

    def is_in(self, image: int) -> bool:
        """Whether the medium has it, if the image open at `image` was synced before. Raises OSError."""
        low, high = round_down(self.offset, _PAGE), round_up(self.offset + self.length, _PAGE)
        # What a failed write left in memory is not on the medium, but it could be read.
        os.posix_fadvise(image, low, high - low, os.POSIX_FADV_DONTNEED)
        return xxhash.xxh3_64_intdigest(_hull(image, self.offset, self.length)) == self.checksum


def _is_gapless(frame: Frame) -> bool:
    """Whether the frame says all of its hull, as those of a copy of whole disks do."""
    table = frame.table
    return bool((table["offset"][1:] == table["offset"][:-1] + table["length"][:-1]).all())


def _checksum(frame: Frame) -> int:
    """Of the hull of a frame that says all of it: what is in the image need not be read."""
    digest = xxhash.xxh3_64()
    for (_, length, kind), at in zip(frame.table.tolist(), frame.positions().tolist(), strict=True):
        if kind == Fill.DATA:
            digest.update(frame.data[at : at + length])
        else:
            for done in range(0, length, len(_ZEROES)):
                digest.update(_ZEROES[: length - done])
    return digest.intdigest()


def _hull(image: int, offset: int, length: int) -> bytearray:
    """The bytes of a hull; those beyond the image's end are zeroes."""
    buffer = bytearray(length)
    system.pread_into(image, memoryview(buffer), offset)
    return buffer


def _composed(frame: Frame, hull: bytearray) -> bytearray:
    """`hull` with the frame laid over it: not even memory is believed where the frame itself says what is there."""
    first = int(frame.table["offset"][0])
    for (offset, length, kind), at in zip(frame.table.tolist(), frame.positions().tolist(), strict=True):
        data = frame.data[at : at + length] if kind == Fill.DATA else bytes(length)
        hull[offset - first : offset - first + length] = data
    return hull


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

    def read(self) -> tuple[WrittenFrame, ...]:
        """What is noted for this copy under this boot, oldest first; nothing if the note is another's."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return ()
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return ()
            raw = system.pread(fd, MAX_SIZE, 0)
        except OSError:
            return ()
        finally:
            os.close(fd)
        if raw[:HEAD_SIZE] != self._head:
            return ()
        found: list[WrittenFrame] = []
        for at in range(HEAD_SIZE, len(raw) - ENTRY_SIZE + 1, ENTRY_SIZE):
            number, _, disk, length, offset, checksum = _ENTRY.unpack_from(raw, at)
            frame = WrittenFrame(number=number, disk=disk, offset=offset, length=length, checksum=checksum)
            if raw[at : at + ENTRY_SIZE] != self._entry(frame, len(found)):
                break
            found.append(frame)
        return tuple(found)

    def start(self) -> None:
        """Begin an empty note, whatever was there."""
        self.close()
        with file_faults(self._path):
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o600)
            system.pwrite("store:unsynced-start", self._fd, self._head, 0)
        self._count = 0

    def append(self, frame: WrittenFrame) -> None:
        """Note a frame, all of which is in the images."""
        with file_faults(self._path):
            at = HEAD_SIZE + self._count * ENTRY_SIZE
            system.pwrite("store:unsynced", self._fd, self._entry(frame, self._count), at)
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

    def _entry(self, frame: WrittenFrame, index: int) -> bytes:
        body = _ENTRY.pack(frame.number, index, frame.disk, frame.length, frame.offset, frame.checksum)
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, self._seed))


def drop(path: str) -> None:
    """Remove the note at `path`, if there is one. It is emptied first, in case its name cannot be removed."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        fd = os.open(path, flags)
        try:
            system.truncate("store:unsynced-cut", fd, 0)
        finally:
            os.close(fd)
    with file_faults(path):
        system.unlink("store:unsynced-drop", path, missing_ok=True)
