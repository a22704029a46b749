"""The store's LMDB schema: every database, key and value, packed and unpacked here and nowhere else.

Integers in keys are big-endian, so that keys sort by number. Every VM counts its committed cycles in
`seq`, over all generations, from 1; seq and nothing else orders them. A *record* is a JSON object
behind the xxh3-64 (8 bytes, little-endian) of its text: LMDB itself checks nothing. A listing is the
point's u64 seq and u64 time (ns since 1970), and entries are an array, each behind an xxh3-64 too.

    database    key                              value
    meta        "format"                         u32: FORMAT
                "epoch"                          u64: the highest epoch of any VM: raised by every failover
                "next-vm", "next-pin"            u64: the next number to give out
                "gone/", vm u32                  name of a VM that is being deleted (`hvfuse.target.removal`)
    vms         name of the VM, bytes            VmRecord
    points      vm u32, seq u64                  PointRecord, of every cycle from the base on
    point-ids   vm u32, id of the point          listing: of the recovery points alone
    frames      vm u32, seq u64, number u32      the frame as it came (`hvfuse.frames`)
    placements  vm u32, seq u64, number u32      Placement: where in the index the frame is entered
    index       vm u32, disk u32, region u32,    entries of the frame's extents that touch the region,
                seq u64, number u32              in ascending order
    wide        vm u32, disk u32, seq u64,       entries of the frame's extents that touch more than
                number u32                       WIDE_SPAN regions (zeroes, for data are never so long)
    staging     vm u32                           StagingRecord of the unfinished cycle
    held        vm u32, number u32               empty: this frame of a direct copy is durably in the image;
                                                 for those not yet durable see `hvfuse.target.unsynced`
    pins        pin u64                          Pin
    definitions vm u32, xxh3-128 of it           a definition behind an xxh3-64: the bytes that the source gave
                                                 (`hvfuse.target.definitions`). Stores of before lack the database
                                                 until the first one comes.

A *disk* in a key is a number that the VM gives out: a disk gets a new one with every whole copy, so that
a copy begins on a blank disk although older points of the same image live on.

What must hold, in every snapshot:

    1  base_seq <= floor_seq <= head_seq; the replica images are the state of base_seq, or, while a
       merge is under way, of some mixture up to floor_seq. No point below floor_seq can be read.
    2  The cycles base_seq < seq <= head_seq, all of them, make up the journal.
    3  Frames of seq head_seq + 1 belong to the staging record; there are no others beyond.
    4  A frame, its placement and its index entries come and go in the same transaction.
    5  position None: nothing was copied yet, or a direct copy is under way; then there are no points.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from hvfuse.consistency import Consistency
from hvfuse.errors import CorruptError
from hvfuse.extent import Buffer
from hvfuse.manifest import CycleKind, DiskManifest, RecoveryPoint, point_id
from hvfuse.position import Position

FORMAT = 1
META, VMS, POINTS, POINT_IDS = b"meta", b"vms", b"points", b"point-ids"
FRAMES, PLACEMENTS, INDEX, WIDE = b"frames", b"placements", b"index", b"wide"
STAGING, HELD, PINS, DEFINITIONS = b"staging", b"held", b"pins", b"definitions"
DATABASES = (META, VMS, POINTS, POINT_IDS, FRAMES, PLACEMENTS, INDEX, WIDE, STAGING, HELD, PINS, DEFINITIONS)
LATER = (DEFINITIONS,)
"""Databases that stores of before do not have."""

PREFIX_GONE = b"gone/"
KEY_FORMAT, KEY_EPOCH, KEY_NEXT_VM, KEY_NEXT_PIN = b"format", b"epoch", b"next-vm", b"next-pin"

REGION = 64 << 20
"""Bytes of a disk that one index key stands for. Fully scattered 4 KiB writes give 16,384 pieces, so a
resolved region stays under 1 MiB, and a day of 2,880 points is one scan over at most as many keys."""
MAX_SEQ = (1 << 64) - 1
STAGE_ID_SIZE = 8
UNKNOWN_DISK = bytes(16)
"""Id of a disk in an adopted copy (`hvfuse.target.adopt`): its name alone tells which one it is."""
WIDE_SPAN = 4
"""Regions; an extent that touches more is entered once, in `wide`."""

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_VM_SEQ = struct.Struct(">IQ")
_VM_SEQ_NUMBER = struct.Struct(">IQI")
_VM_NUMBER = struct.Struct(">II")
_INDEX_KEY = struct.Struct(">IIIQI")
_INDEX_KEYS = np.dtype([("vm", ">u4"), ("disk", ">u4"), ("region", ">u4"), ("seq", ">u8"), ("number", ">u4")])
_WIDE_KEY = struct.Struct(">IIQI")
_LISTING = struct.Struct(">QQ")
_PLACEMENT = struct.Struct("<IIQQ16s")

ENTRY_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u8"), ("position", "<u4"), ("kind", "<u4")])
"""One extent as the index has it, 24 bytes: `position` is where its bytes begin in the frame's data,
`kind` is `hvfuse.frames.Fill`."""

Entries = NDArray[np.void]
"""Shape (n,), dtype `ENTRY_DTYPE`."""


# Keys


def u32(value: int) -> bytes:
    """A number as 4 bytes that sort."""
    return _U32.pack(value)


def u64(value: int) -> bytes:
    """A number as 8 bytes that sort."""
    return _U64.pack(value)


def number_of(raw: bytes | None) -> int:
    """The number in a u32 or u64 value; 0 if there is none."""
    return int.from_bytes(raw or b"", "big")


def vm_key(name: str) -> bytes:
    """Key in `vms`."""
    return os.fsencode(name)


def point_key(vm: int, seq: int) -> bytes:
    """Key in `points`; prefix of a cycle's keys in `frames` and `placements`."""
    return _VM_SEQ.pack(vm, seq)


def point_id_key(vm: int, name: str) -> bytes:
    """Key in `point-ids`. Longer names than a point can have are cut: they are found nowhere."""
    return u32(vm) + os.fsencode(name)[:255]


def frame_key(vm: int, seq: int, number: int) -> bytes:
    """Key in `frames` and `placements`."""
    return _VM_SEQ_NUMBER.pack(vm, seq, number)


def seq_and_number(key: bytes) -> tuple[int, int]:
    """What a key of `frames`, `placements`, `index` or `wide` ends with."""
    return int.from_bytes(key[-12:-4], "big"), int.from_bytes(key[-4:], "big")


def index_key(vm: int, disk: int, region: int, seq: int, number: int = 0) -> bytes:
    """Key in `index`."""
    return _INDEX_KEY.pack(vm, disk, region, seq, number)


def index_keys(vm: int, disk: int, regions: NDArray[np.int64], seq: int, number: int) -> list[bytes]:
    """Keys in `index`, one for each of `regions`, shape (n,)."""
    keys = np.empty(len(regions), _INDEX_KEYS)
    keys["vm"], keys["disk"], keys["region"], keys["seq"], keys["number"] = vm, disk, regions, seq, number
    raw, size = keys.tobytes(), _INDEX_KEYS.itemsize
    return [raw[at : at + size] for at in range(0, len(raw), size)]


def unpack_index_key(key: bytes) -> tuple[int, int, int, int, int]:
    """vm, disk, region, seq, number."""
    vm, disk, region, seq, number = _INDEX_KEY.unpack(key)
    return vm, disk, region, seq, number


def wide_key(vm: int, disk: int, seq: int, number: int = 0) -> bytes:
    """Key in `wide`."""
    return _WIDE_KEY.pack(vm, disk, seq, number)


def unpack_wide_key(key: bytes) -> tuple[int, int, int, int]:
    """vm, disk, seq, number."""
    vm, disk, seq, number = _WIDE_KEY.unpack(key)
    return vm, disk, seq, number


def definition_name(definition: bytes) -> str:
    """What records name a definition by: 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(definition)


def definition_key(vm: int, name: str) -> bytes:
    """Key in `definitions`; `name`: 32 hexadecimal digits."""
    return u32(vm) + bytes.fromhex(name)


def held_key(vm: int, number: int) -> bytes:
    """Key in `held`."""
    return _VM_NUMBER.pack(vm, number)


# Values


def _sealed(body: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") + body


def _opened(raw: Buffer, what: str) -> memoryview:
    """The bytes behind the checksum. Raises CorruptError naming `what`."""
    body = memoryview(raw)[8:]
    if len(raw) < 8 or xxhash.xxh3_64_intdigest(body) != int.from_bytes(bytes(memoryview(raw)[:8]), "little"):
        raise CorruptError(f"{what} does not match its checksum")
    return body


def _pack_record(record: Any, *, without: str = "") -> bytes:
    """A record's fields, but for the one that its key holds."""
    names = [field.name for field in fields(record) if field.name != without]
    text = json.dumps({name: _plain(getattr(record, name)) for name in names}, separators=(",", ":"))
    return _sealed(text.encode())


def _unpack_record(raw: Buffer, what: str) -> dict[str, Any]:
    """The fields by name. Raises CorruptError naming `what`."""
    values = json.loads(bytes(_opened(raw, what)))
    for name in values.keys() & _PARSERS.keys():
        values[name] = _PARSERS[name](values[name])
    return dict(values)


def _plain(value: Any) -> Any:
    """A field's value as JSON."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Position | DiskRecord):
        return [_plain(getattr(value, field.name)) for field in fields(value)]
    return dict(value) if isinstance(value, Mapping) else value


def _position(values: list[Any] | None) -> Position | None:
    if values is None:
        return None
    generation, cycle, digest = values
    return Position(bytes.fromhex(generation), cycle, bytes.fromhex(digest))


def _disks(values: list[list[Any]]) -> tuple[DiskRecord, ...]:
    return tuple(
        DiskRecord(
            number=number, disk_id=bytes.fromhex(disk_id), name=name, format=image_format, size=size,
            digest=bytes.fromhex(digest),
        )
        for number, disk_id, name, image_format, size, digest in values
    )  # fmt: skip


_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    "position": _position,
    "previous": _position,
    "disks": _disks,
    "kind": CycleKind,
    "consistency": Consistency,
    "generation": bytes.fromhex,
    "made_from": bytes.fromhex,
    "stage_id": bytes.fromhex,
    "data_ends": lambda ends: None if ends is None else tuple(ends),
}
"""How fields that are no plain JSON are read back, in whichever record they are."""


def pack_listing(seq: int, time_ns: int) -> bytes:
    """A value of `point-ids`."""
    return _sealed(_LISTING.pack(seq, time_ns))


def unpack_listing(raw: Buffer) -> tuple[int, int]:
    """Seq and time in ns. Raises CorruptError."""
    seq, time_ns = _LISTING.unpack(_opened(raw, "the listing of a recovery point"))
    return seq, time_ns


def pack_definition(definition: bytes) -> bytes:
    """A value of `definitions`."""
    return _sealed(definition)


def unpack_definition(raw: Buffer, what: str) -> bytes:
    """A definition's bytes. Raises CorruptError naming `what`."""
    return bytes(_opened(raw, what))


def pack_entries(entries: Entries) -> bytes:
    """A value of `index` or `wide`."""
    return _sealed(entries.tobytes())


def pack_each(entries: Entries, bounds: NDArray[np.int64]) -> list[bytes]:
    """Values of `index`: of the entries from `bounds[i]` to `bounds[i + 1]` each."""
    raw, edges = entries.tobytes(), (bounds * ENTRY_DTYPE.itemsize).tolist()
    return [_sealed(raw[low:high]) for low, high in itertools.pairwise(edges)]


def unpack_entries(raw: Buffer, what: str) -> memoryview:
    """The bytes of an array of `ENTRY_DTYPE`, verified. Raises CorruptError naming `what`."""
    body = _opened(raw, what)
    if len(body) % ENTRY_DTYPE.itemsize:
        raise CorruptError(f"{what} has a wrong length")
    return body


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What the store must know of a frame without decoding it.

    `disk`: its number. `regions`: where the index has entries of it, ascending. `wide`: whether `wide`
    has some too. `stored_length`: bytes of the frame. `data_end`: first byte on the disk after its last
    DATA extent, 0 without any. `digest`: xxh3-128 of its content.
    """

    disk: int
    regions: tuple[int, ...]
    wide: bool
    stored_length: int
    data_end: int
    digest: bytes

    def pack(self) -> bytes:
        """The value: u32 disk, u32 wide, u64 stored_length, u64 data_end, digest, u32 of each region."""
        head = _PLACEMENT.pack(self.disk, self.wide, self.stored_length, self.data_end, self.digest)
        return _sealed(head + np.array(self.regions, "<u4").tobytes())

    @classmethod
    def unpack(cls, raw: Buffer) -> Placement:
        """Raises CorruptError."""
        body = _opened(raw, "the placement of a frame")
        disk, wide, stored_length, data_end, digest = _PLACEMENT.unpack_from(body)
        regions = np.frombuffer(body[_PLACEMENT.size :], "<u4")
        return cls(
            disk=disk, regions=tuple(regions.tolist()), wide=bool(wide), stored_length=stored_length,
            data_end=data_end, digest=digest,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRecord:
    """One disk at one cycle. `number`: see the module's docstring; the rest as in DiskManifest."""

    number: int
    disk_id: bytes
    name: str
    format: str
    size: int
    digest: bytes

    @classmethod
    def of(cls, disk: DiskManifest, number: int) -> DiskRecord:
        """The record of a disk as a manifest tells of it."""
        return cls(
            number=number, disk_id=disk.disk_id, name=disk.name, format=disk.format, size=disk.size,
            digest=disk.digest,
        )  # fmt: skip

    def manifest(self) -> DiskManifest:
        """The disk without its number."""
        return DiskManifest(
            disk_id=self.disk_id, name=self.name, format=self.format, size=self.size, digest=self.digest
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRecord:
    """One VM's replica. `state`: `hvfuse.target.relation`; empty in stores of before. `next_disk`: the next number to
    give to a disk.

    `disks` are those of head_seq. The three seqs are explained in the module's docstring; 0: none yet. `definition`:
    name of the one given last, "" for none.
    What says who has the VM is kept by `hvfuse.target.failing_over`: `primary`, the id of the home that may write and
    ship it, empty before anybody did; `epoch`, raised by every failover and by what takes one back; `source`, which
    home that is, `prepared`, `failover`, `returns_to`: see there. `moving`: disks are being moved to where the images
    are to be (`hvfuse.target.handed_over`).
    """

    id: int
    name: str
    state: str = ""
    position: Position | None = None
    head_seq: int = 0
    base_seq: int = 0
    floor_seq: int = 0
    next_disk: int = 1
    disks: tuple[DiskRecord, ...] = ()
    definition: str = ""
    primary: str = ""
    epoch: int = 0
    source: Mapping[str, Any] | None = None
    prepared: Mapping[str, Any] | None = None
    failover: Mapping[str, Any] | None = None
    returns_to: Mapping[str, Any] | None = None
    moving: Mapping[str, Any] | None = None

    def pack(self) -> bytes:
        """The value in `vms`."""
        return _pack_record(self)

    @classmethod
    def unpack(cls, raw: Buffer) -> VmRecord:
        """Raises CorruptError."""
        return cls(**_unpack_record(raw, "the record of a VM"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PointRecord:
    """One committed cycle. `is_point`: whether it is listed as a recovery point: copies are not, nor are
    cycles that retention let go. `previous`: the position it continues. `frame_count`, `stored_bytes`:
    of its frames; both 0 for a copy that went straight into the images. `data_ends`: of a copy in the
    journal, by disk, the byte from which on there are zeroes alone, in it and in what it lies over; otherwise None.
    That may lie beyond the disk's size: of a disk that became shorter while the copy was interrupted.
    `definition`: name of the one that was in force when it was committed; "" for none, and for what is no point.
    """

    seq: int
    kind: CycleKind
    position: Position
    previous: Position | None
    time_ns: int
    consistency: Consistency
    is_point: bool
    frame_count: int
    stored_bytes: int
    disks: tuple[DiskRecord, ...]
    data_ends: tuple[int, ...] | None = None
    definition: str = ""

    @property
    def id(self) -> str:
        """The recovery point's name."""
        return point_id(self.position.generation, self.position.cycle)

    def recovery_point(self, vm: str) -> RecoveryPoint:
        """The cycle as the rest of the program knows it."""
        return RecoveryPoint(
            id=self.id,
            vm=vm,
            generation=self.position.generation,
            cycle=self.position.cycle,
            time_ns=self.time_ns,
            consistency=self.consistency,
            disks=tuple(disk.manifest() for disk in self.disks),
            stored_bytes=self.stored_bytes,
            definition=self.definition,
        )

    def unlisted(self) -> PointRecord:
        """The same cycle, no longer a recovery point."""
        return replace(self, is_point=False, definition="")

    def pack(self) -> bytes:
        """The value in `points`."""
        return _pack_record(self, without="seq")

    @classmethod
    def unpack(cls, raw: Buffer, seq: int) -> PointRecord:
        """Raises CorruptError."""
        return cls(seq=seq, **_unpack_record(raw, f"the record of cycle {seq}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingRecord:
    """The unfinished cycle of a VM. `direct`: its frames go straight into the images, not the journal.

    `stage_id`: STAGE_ID_SIZE bytes that it has alone, whatever was staged before under the same names.
    `opened`: how often a direct one was begun, so that whoever began it earlier is put out.
    """

    seq: int
    direct: bool
    kind: CycleKind
    generation: bytes
    cycle: int
    previous: Position | None
    made_from: bytes
    disks: tuple[DiskRecord, ...]
    stage_id: bytes = bytes(STAGE_ID_SIZE)
    opened: int = 0

    def pack(self) -> bytes:
        """The value in `staging`."""
        return _pack_record(self)

    @classmethod
    def unpack(cls, raw: Buffer) -> StagingRecord:
        """Raises CorruptError."""
        return cls(**_unpack_record(raw, "the record of an unfinished cycle"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """What holds a recovery point: merging stops at its seq until the pin is taken away.

    It outlives whoever made it. `owner`: "kind" (such as "test-failover"), "pid", "boot_id" and
    "process_start" (clock ticks since boot) of the holder, and what else the holder wants to find again
    ("mountpoint", "overlay"): JSON values.
    """

    id: int
    vm: str
    point_id: str
    seq: int
    created_ns: int
    owner: Mapping[str, Any]

    def pack(self) -> bytes:
        """The value in `pins`."""
        return _pack_record(self, without="id")

    @classmethod
    def unpack(cls, raw: Buffer, pin: int) -> Pin:
        """Raises CorruptError."""
        return cls(id=pin, **_unpack_record(raw, f"the record of pin {pin}"))
