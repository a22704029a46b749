"""The medium on which a first copy travels to its target: a directory of plain files, for any file system. Pure.

    DIR/manifest.json       what the medium is; says whether it is complete
    DIR/frames-NNNNN.hvs    data files from 00000, at most `FILE_LIMIT` bytes each

Written in this order: the manifest (not complete), the data files one after the other, the manifest (complete).
Each step is durable before the next, and within a data file its frames before its table. So a manifest that says
"complete" proves that everything is there; a data file that ends with a tail, that its frames are.

Data files are little-endian, packed, and made of *units*: the head, one for each frame, the table, the tail. A
unit lies on the file as *pieces*, one after the other: at most 65,520 bytes of it and 16 of digest, so that each
piece but a unit's last is 64 KiB long. A piece's digest is the xxh3-128 of its bytes with the seed

    (first 8 bytes of the generation, as a number, ^ NNNNN << 40) + the piece's offset in the file, modulo 2^64

so nothing counts in another place or another export than its own. Units:

    Head, 32 bytes, at 0
         0    8 magic "HVFSEED\\0"
         8    4 version, 1
        12    4 number of the file, NNNNN
        16   16 generation

    Frame: as in `hvfuse.frames`, of cycle 0 of the generation

    Table, 16 bytes a frame, in the order of the file
         0    8 offset of the frame's unit in the file
         8    4 number of the frame
        12    4 length of the frame, bytes

    Tail, 64 bytes, the file's last unit
         0    8 magic "HVFSEND\\0"
         8    4 version, 1
        12    4 number of the file
        16   16 generation
        32    8 frame_count
        40    8 offset of the table's unit
        48   16 xxh3-128 over the digests of all pieces before the tail, in the order of the file

The manifest is one JSON object in ASCII. Its last line but one is `"check": "D D … D E"`: each D is the xxh3-64, 16
hexadecimal digits, of 64 KiB (the last one of what is left) of the text before that line, E that of the line
itself up to E. Other keys:

    hvfuse_seed   version, 1
    complete      false while the export is under way; the rest of the keys may then tell of an earlier state
    vm            name of the VM
    generation    32 hexadecimal digits
    time_ns       when the export began, ns since 1970
    disks         of each: id (32 hexadecimal digits), name, format, size (bytes)
    frames        how many there are
    frame_bytes   their bytes, as encoded
    files         of each data file: size (bytes), frames, digest (hexadecimal; the one in its tail)

An export that was interrupted is taken up so: files with a tail count as they are; of the last one, which may
have none, the frames up to the first that is not whole, and the rest is cut off.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.extent import Buffer
from hvfuse.manifest import CycleKind, CycleManifest, DiskManifest

MANIFEST = "manifest.json"
VERSION = 1
FILE_LIMIT = 1 << 30
"""Bytes of a data file; only a single frame may make one longer."""
PIECE = 1 << 16
MAX_MANIFEST = 64 << 20
"""Bytes; no export has a longer one."""

_DIGEST = 16
_ROOM = PIECE - _DIGEST
_HEAD = struct.Struct("<8sII16s")
_TAIL = struct.Struct("<8sII16sQQ16s")
_HEAD_MAGIC, _TAIL_MAGIC = b"HVFSEED\0", b"HVFSEND\0"
HEAD_SIZE, TAIL_SIZE = _HEAD.size, _TAIL.size
ENTRY_DTYPE = np.dtype([("offset", "<u8"), ("number", "<u4"), ("length", "<u4")])
_CHECK = b'\n "check": "'

Table = NDArray[np.void]
"""Shape (n,), dtype as in the table above."""


class DamagedSeedError(CorruptError):
    """Bytes of a medium are not what was written. `path`, `offset`: where the damaged piece begins, at most
    `PIECE` bytes long."""

    def __init__(self, path: str, offset: int, what: str) -> None:
        super().__init__(
            f"{path}: damaged at byte {offset}: {what}",
            hint="copy this file from the original medium again, or export again into an empty directory",
        )
        self.path = path
        self.offset = offset


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What the manifest tells of a data file. `digest`: 16 bytes, that in its tail."""

    size: int
    frames: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedManifest:
    """The manifest's fields. `cycle`: the COPY that the medium holds, without `previous`."""

    cycle: CycleManifest
    complete: bool = False
    frames: int = 0
    frame_bytes: int = 0
    files: tuple[FileFacts, ...] = ()

    @property
    def file_bytes(self) -> int:
        """Bytes of all data files."""
        return sum(file.size for file in self.files)

    def pack(self) -> bytes:
        """The manifest's text."""
        fields = {
            "hvfuse_seed": VERSION,
            "complete": self.complete,
            "vm": self.cycle.vm,
            "generation": self.cycle.generation.hex(),
            "time_ns": self.cycle.sealed_ns,
            "disks": [
                {"id": disk.disk_id.hex(), "name": disk.name, "format": disk.format, "size": disk.size}
                for disk in self.cycle.disks
            ],
            "frames": self.frames,
            "frame_bytes": self.frame_bytes,
            "files": [{"size": file.size, "frames": file.frames, "digest": file.digest.hex()} for file in self.files],
        }
        body = json.dumps(fields, indent=1).removesuffix("\n}").encode() + b","
        sums = [xxhash.xxh3_64_hexdigest(body[low : low + PIECE]) for low in range(0, len(body), PIECE)]
        line = _CHECK + " ".join(sums).encode() + b" "
        return body + line + xxhash.xxh3_64_hexdigest(line).encode() + b'"\n}\n'

    @staticmethod
    def unpack(raw: bytes, path: str) -> SeedManifest:
        """Verify and parse. Raises DamagedSeedError, UnsupportedError, CorruptError (verified nonsense)."""
        _check_text(raw, path)
        try:
            fields = json.loads(raw)
            if fields["hvfuse_seed"] != VERSION:
                version = fields["hvfuse_seed"]
                raise UnsupportedError(f"{path}: an export of version {version}; this hvfuse reads {VERSION}")
            return _manifest_of(fields)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CorruptError(f"{path}: makes no sense: {error!r}") from None


def _check_text(raw: bytes, path: str) -> None:
    """Raises DamagedSeedError unless the text is what was written."""
    cut = raw.rfind(_CHECK)
    told = re.fullmatch(rb"((?:[0-9a-f]{16} )+)([0-9a-f]{16})\"\n}\n", raw[cut + len(_CHECK) :]) if cut >= 0 else None
    line = _CHECK + told[1] if told else b""
    if told is None or xxhash.xxh3_64_hexdigest(line).encode() != told[2]:
        raise DamagedSeedError(path, max(0, len(raw) - PIECE), "its end does not match its checksum")
    sums = told[1].split()
    for number in range(max(len(sums), -(-cut // PIECE))):
        block = raw[number * PIECE : min((number + 1) * PIECE, cut)]
        if number >= len(sums) or xxhash.xxh3_64_hexdigest(block).encode() != sums[number]:
            raise DamagedSeedError(path, number * PIECE, "does not match its checksum")


def _manifest_of(fields: dict[str, Any]) -> SeedManifest:
    """Raises KeyError, TypeError, ValueError."""
    disks = tuple(
        DiskManifest(
            disk_id=bytes.fromhex(disk["id"]),
            name=str(disk["name"]),
            format=str(disk["format"]),
            size=int(disk["size"]),
        )
        for disk in fields["disks"]
    )
    files = tuple(
        FileFacts(size=int(file["size"]), frames=int(file["frames"]), digest=bytes.fromhex(file["digest"]))
        for file in fields["files"]
    )
    cycle = CycleManifest(
        vm=str(fields["vm"]),
        kind=CycleKind.COPY,
        generation=bytes.fromhex(fields["generation"]),
        cycle=0,
        previous=None,
        sealed_ns=int(fields["time_ns"]),
        disks=disks,
    )
    if len(cycle.generation) != 16:
        raise ValueError("the generation is not 16 bytes long")
    return SeedManifest(
        cycle=cycle,
        complete=bool(fields["complete"]),
        frames=int(fields["frames"]),
        frame_bytes=int(fields["frame_bytes"]),
        files=files,
    )


def file_name(number: int) -> str:
    """The name of a data file."""
    return f"frames-{number:05}.hvs"


def is_data_file(name: str) -> bool:
    """Whether a file of that name is a data file of an export."""
    return re.fullmatch(r"frames-\d{5,}\.hvs", name) is not None


def stored_length(length: int) -> int:
    """Bytes that a unit of `length` bytes takes in a data file."""
    return length + -(-length // _ROOM) * _DIGEST


def ends(table: Table) -> NDArray[np.uint64]:
    """Where the unit of each frame ends, bytes; shape (n,)."""
    lengths = table["length"].astype(np.uint64)
    pieces = (lengths + np.uint64(_ROOM - 1)) // np.uint64(_ROOM)
    return np.asarray(table["offset"] + lengths + pieces * np.uint64(_DIGEST), np.uint64)


class Pieces:
    """The units of data file `number`, as they lie on the file at `path`: sealed and opened.

    `chain` has taken in the digests of all pieces that were passed.
    """

    def __init__(self, path: str, *, number: int, generation: bytes) -> None:
        self.path = path
        self.number = number
        self.chain = xxhash.xxh3_128()
        self._generation = generation
        self._key = int.from_bytes(generation[:8], "little") ^ number << 40

    def seal(self, unit: Buffer, offset: int) -> bytes:
        """A unit as it goes to `offset` of the file."""
        view = memoryview(unit)
        parts: list[Buffer] = []
        for low in range(0, len(view), _ROOM):
            part = view[low : low + _ROOM]
            digest = self._digest(part, offset + low // _ROOM * PIECE)
            self.chain.update(digest)
            parts += [part, digest]
        return b"".join(parts)

    def open(self, raw: Buffer, length: int, offset: int, *, chained: bool = True) -> bytes:
        """The unit of `length` bytes that lies at `offset`. `raw`: what is there, `stored_length(length)` bytes.

        Raises DamagedSeedError, also where `raw` is too short.
        """
        view, stored = memoryview(raw), stored_length(length)
        parts, digests = [], []
        for low in range(0, stored, PIECE):
            piece = view[low : min(low + PIECE, stored)]
            part, digest = piece[:-_DIGEST], bytes(piece[-_DIGEST:])
            if len(piece) != min(PIECE, stored - low) or self._digest(part, offset + low) != digest:
                raise DamagedSeedError(self.path, offset + low, "does not match its checksum")
            parts.append(part)
            digests.append(digest)
        if chained:
            self.chain.update(b"".join(digests))
        return b"".join(parts)

    def _digest(self, part: Buffer, offset: int) -> bytes:
        return bytes(xxhash.xxh3_128_digest(part, seed=(self._key + offset) % (1 << 64)))

    def head(self) -> bytes:
        """The head, as a unit."""
        return _HEAD.pack(_HEAD_MAGIC, VERSION, self.number, self._generation)

    def check_head(self, unit: bytes) -> None:
        """Raises DamagedSeedError unless this is the file's head."""
        if unit != self.head():
            raise DamagedSeedError(self.path, 0, "this is not the head of a data file of this export")

    def tail(self, count: int, offset: int) -> bytes:
        """The tail, as a unit, after the table was sealed. `count`: of frames; `offset`: of the table."""
        magic = _TAIL_MAGIC
        return _TAIL.pack(magic, VERSION, self.number, self._generation, count, offset, self.chain.digest())

    def unpack_tail(self, unit: bytes, at: int) -> tuple[int, int, bytes]:
        """(count of frames, offset of the table, chain) of the tail at `at`. Raises DamagedSeedError."""
        *identity, count, offset, digest = _TAIL.unpack(unit)
        if identity != [_TAIL_MAGIC, VERSION, self.number, self._generation]:
            raise DamagedSeedError(self.path, at, "this is not the tail of a data file of this export")
        if offset + stored_length(count * ENTRY_DTYPE.itemsize) != at:
            raise DamagedSeedError(self.path, at, "it does not tell where the table is")
        return count, offset, digest

    def unpack_table(self, unit: bytes, at: int) -> Table:
        """The table at `at`, whose frames fill the file from head to table. Raises DamagedSeedError."""
        table: Table = np.frombuffer(unit, ENTRY_DTYPE)
        first = stored_length(HEAD_SIZE)
        if not len(table) or not np.array_equal(np.append(table["offset"], at), np.append(first, ends(table))):
            raise DamagedSeedError(self.path, at, "the table does not tell where the frames are")
        return table
