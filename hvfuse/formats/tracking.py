"""The tracking state of a disk (`DISK.hvt`) and the head of an index map (`DISK.hvt0`, `DISK.hvt1`).

Tracking state, 16,384 bytes, little-endian, never longer:

    offset  size
         0 4,096 record, first copy
     4,096 4,096 record, second copy
     8,192 8,192 region map: one byte a region (`hvfuse.tracker.regions`): bit 0 hot, bit 1 dirty,
                 bit 2 comparing

A record is written to the copy that does not hold the newest one, then synced; the valid copy with
the higher `write_number` counts. A torn write therefore costs at most the record being written. The map
has no checksum: each of its bytes is written alone, and any mix of an older and a newer map marks at
least what the older one did until that was settled.

    Record (the rest of its 4,096 bytes is zero)
    offset size field
         0    8 magic "HVFTRK1\0"
         8    4 version, 3
        12    4 flags: bit 0 detached cleanly, bit 1 resynchronisation required, bit 2 resynchronising:
                  the copy that began the generation is not acknowledged yet. Both: the copy is valid, and
                  another one has to follow it. Bit 3 disks changed: nothing but that disks were added or removed
                  made that resynchronisation necessary, or the one whose copy is under way
        16    8 write_number, from 1
        24   16 disk_id
        40   16 generation; zeroes: not tracked
        56    8 cycle: the last sealed one of the generation; 0: none yet
        64    8 acknowledged: the last cycle of the generation that the target has
        72    8 serial: of the newest log made for this disk
        80    8 next_seq: a lower bound for the next entry's sequence number
        88   16 digest of the last sealed log of the generation; zeroes: none yet
       104   16 unique_id of that log
       120    8 zeroes
       128    4 disk_count: disks of the VM tracked together
       132    2 address_space, as in the companion
       134    2 scope: 0 none, 1 marked regions, 2 full. While resynchronising, of the copy under way; what has to
                  be compared after that is the dirty regions. Otherwise of the copy that is required
       136   16 base_generation: while a copy of regions is under way, or its generation is being begun, the
                  generation that the regions were marked against; zeroes: they are marked against this one
       152    8 base_cycle: the least cycle of it that the marks add to
       160    8 region_size, bytes
       168   16 boot_id of the host that has the disk attached, or had it last
       184    8 image size at the clean detach, bytes
       192    8 image mtime at the clean detach, ns since 1970
       200    8 image inode number at the clean detach
       208  248 reason for the resynchronisation, UTF-8, padded with zeroes
       456   16 xxh3-128 of bytes 0 to 455

Version 1 had no mark "comparing": the dirty regions were those of the copy under way and what was lost since,
together. `upgraded` and `upgraded_marks` say what such a state comes to. Offset 120 had a size that nobody read.
Version 2 had no flag "disks changed": whatever it requires has other causes.

An index map is a head of 4,096 bytes and entries of 64 bytes as in `hvfuse.formats.companion`, stored
through a shared map: a process that dies leaves them in the page cache. The entries of the log end
where the sequence numbers stop counting up or a check fails; the checks are seeded with the log's
unique id, so that what an earlier log left in the map never counts.

    Head (the rest of its 4,096 bytes is zero)
         0    8 magic "HVFIDX1\\0"
         8    4 version, 1
        12    4 state: 0 standing by, 1 active
        16   16 unique_id of the log
        32   16 previous_unique_id
        48   16 generation
        64   16 disk_id
        80    8 cycle
        88    8 serial
        96    8 first_seq
       104    8 previous_size, bytes
       112    8 start_size, bytes
       120    8 opened, ns since 1970: the barrier at which the log became active
       128    8 xxh3-64 of bytes 0 to 127
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum

import xxhash

from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.extent import Buffer
from hvfuse.formats.companion import AddressSpace

STATE_SIZE = 16384
RECORD_SIZE = 4096
MAP_OFFSET = 2 * RECORD_SIZE
MAP_SIZE = STATE_SIZE - MAP_OFFSET
HEAD_SIZE = 4096
MAX_REASON = 248

VERSION = 3
HOT = 1
DIRTY = 2
COMPARING = 4
"""Marks of a region; what they mean: `hvfuse.tracker.regions`."""

_HEAD_VERSION = 1
_RECORD_MAGIC = b"HVFTRK1\0"
_HEAD_MAGIC = b"HVFIDX1\0"
_RECORD = struct.Struct("<8sIIQ16s16sQQQQ16s16s8xIHH16sQQ16sQqQ248s")
_HEAD = struct.Struct("<8sII16s16s16s16sQQQQQq")
assert _RECORD.size == 456
assert _HEAD.size == 128

NOT_TRACKED = bytes(16)

_CLEAN = 1
_RESYNC = 2
_RESYNCING = 4
_DISKS_CHANGED = 8
_NO_COMPARING = 1
"""The last version without that mark."""


class Scope(IntEnum):
    """What has to be compared with the replica."""

    NONE = 0
    REGIONS = 1
    FULL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingRecord:
    """The record's fields, as in the table above. `resync_reason` is None unless one is required. `version`
    is what was read; what is written is always of the present one."""

    disk_id: bytes
    generation: bytes = NOT_TRACKED
    cycle: int = 0
    acknowledged: int = 0
    serial: int = 0
    next_seq: int = 1
    digest: bytes = bytes(16)
    unique_id: bytes = bytes(16)
    disk_count: int = 0
    address_space: AddressSpace = AddressSpace.LOGICAL
    scope: Scope = Scope.NONE
    base_generation: bytes = NOT_TRACKED
    base_cycle: int = 0
    region_size: int = 0
    boot_id: bytes = bytes(16)
    detached_cleanly: bool = False
    image_size: int = 0
    image_mtime_ns: int = 0
    image_inode: int = 0
    resync_reason: str | None = None
    resyncing: bool = False
    disks_changed: bool = False
    write_number: int = 0
    version: int = VERSION

    @property
    def is_tracked(self) -> bool:
        """Whether a generation has begun for this disk."""
        return self.generation != NOT_TRACKED

    def pack(self) -> bytes:
        """One copy of the record, 4,096 bytes."""
        flags = _CLEAN * self.detached_cleanly | _RESYNCING * self.resyncing
        flags |= _RESYNC * (self.resync_reason is not None) | _DISKS_CHANGED * self.disks_changed
        reason = (self.resync_reason or "").encode(errors="backslashreplace")[:MAX_REASON]
        body = _RECORD.pack(
            _RECORD_MAGIC, VERSION, flags, self.write_number, self.disk_id, self.generation,
            self.cycle, self.acknowledged, self.serial, self.next_seq, self.digest, self.unique_id,
            self.disk_count, self.address_space, self.scope, self.base_generation,
            self.base_cycle, self.region_size, self.boot_id, self.image_size, self.image_mtime_ns,
            self.image_inode, reason,
        )  # fmt: skip
        return (body + xxhash.xxh3_128_digest(body)).ljust(RECORD_SIZE, b"\0")


def _unpack_record(data: bytes) -> TrackingRecord | None:
    """One copy; None when it is not a record or torn. Raises UnsupportedError."""
    if not is_record(data):
        return None
    (_, version, flags, write_number, disk_id, generation, cycle, acknowledged, serial, next_seq, log_digest,
     unique_id, disk_count, space, scope, base_generation, base_cycle, region_size, boot_id,
     image_size, mtime, inode, reason) = _RECORD.unpack(data[: _RECORD.size])  # fmt: skip
    if not 1 <= version <= VERSION:
        raise UnsupportedError(f"tracking state of version {version}; this hvfuse reads versions 1 to {VERSION}")
    return TrackingRecord(
        disk_id=disk_id, generation=generation, cycle=cycle, acknowledged=acknowledged, serial=serial,
        next_seq=next_seq, digest=log_digest, unique_id=unique_id,
        disk_count=disk_count, address_space=AddressSpace(space), scope=Scope(scope),
        base_generation=base_generation, base_cycle=base_cycle, region_size=region_size, boot_id=boot_id,
        detached_cleanly=bool(flags & _CLEAN), image_size=image_size, image_mtime_ns=mtime,
        image_inode=inode, resyncing=bool(flags & _RESYNCING), disks_changed=bool(flags & _DISKS_CHANGED),
        resync_reason=reason.rstrip(b"\0").decode(errors="replace") if flags & _RESYNC else None,
        write_number=write_number, version=version,
    )  # fmt: skip


def is_record(data: bytes) -> bool:
    """Whether one copy of the record, 4,096 bytes, is whole, of whatever version."""
    body, digest = data[: _RECORD.size], data[_RECORD.size : _RECORD.size + 16]
    return body.startswith(_RECORD_MAGIC) and xxhash.xxh3_128_digest(body) == digest


def unpack_state(data: Buffer) -> TrackingRecord:
    """The newest valid record of a tracking-state file. Raises CorruptError or UnsupportedError."""
    raw = bytes(data)
    copies = (_unpack_record(raw[:RECORD_SIZE]), _unpack_record(raw[RECORD_SIZE : 2 * RECORD_SIZE]))
    valid = [copy for copy in copies if copy is not None]
    if not valid:
        raise CorruptError("neither copy of the tracking state's record matches its checksum")
    return max(valid, key=lambda record: record.write_number)


def upgraded(record: TrackingRecord) -> TrackingRecord:
    """A record as if the present version had written it; for the marks that go with it see `upgraded_marks`.

    Where version 1 had lost logs during a copy, the copy counted for nothing: it is not under way any more,
    and what is marked adds to its base; or everything has to be compared.
    """
    if record.version > _NO_COMPARING:
        return record if record.version == VERSION else replace(record, version=VERSION)
    given_up = record.resyncing and record.resync_reason is not None
    has_base = record.resyncing and record.scope is Scope.REGIONS
    return replace(
        record,
        version=VERSION,
        resyncing=record.resyncing and not given_up,
        base_generation=record.base_generation if has_base else NOT_TRACKED,
        base_cycle=record.base_cycle if has_base else 0,
    )


def upgraded_marks(record: TrackingRecord, marks: bytes) -> bytes:
    """The region map that goes with `upgraded(record)`, `record` being as it was read. Doing it again to the
    result changes nothing."""
    if record.version > _NO_COMPARING or upgraded(record).resyncing is False or record.scope is not Scope.REGIONS:
        return marks
    return bytes(mark & ~DIRTY | COMPARING if mark & DIRTY else mark for mark in marks)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexHead:
    """The head's fields, as in the table above."""

    active: bool
    unique_id: bytes
    previous_unique_id: bytes
    generation: bytes
    disk_id: bytes
    cycle: int
    serial: int
    first_seq: int
    previous_size: int
    start_size: int
    opened_ns: int

    def pack(self) -> bytes:
        """The 136 bytes that count of the head."""
        body = _HEAD.pack(
            _HEAD_MAGIC, _HEAD_VERSION, int(self.active), self.unique_id, self.previous_unique_id,
            self.generation, self.disk_id, self.cycle, self.serial, self.first_seq,
            self.previous_size, self.start_size, self.opened_ns,
        )  # fmt: skip
        return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def unpack_head(data: Buffer) -> IndexHead | None:
    """The head of an index map; None when it is not one, torn, or of another version."""
    raw = bytes(memoryview(data)[: _HEAD.size + 8])
    body, check = raw[: _HEAD.size], int.from_bytes(raw[_HEAD.size :], "little")
    if not body.startswith(_HEAD_MAGIC) or xxhash.xxh3_64_intdigest(body) != check:
        return None
    (_, version, state, unique_id, previous_unique_id, generation, disk_id, cycle, serial, first_seq,
     previous_size, start_size, opened_ns) = _HEAD.unpack(body)  # fmt: skip
    if version != _HEAD_VERSION:
        return None
    return IndexHead(
        active=state == 1, unique_id=unique_id, previous_unique_id=previous_unique_id,
        generation=generation, disk_id=disk_id, cycle=cycle, serial=serial, first_seq=first_seq,
        previous_size=previous_size, start_size=start_size, opened_ns=opened_ns,
    )  # fmt: skip
