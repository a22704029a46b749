"""What a target lets in: names, manifests and frames from outside, checked before anything is done.

All of it raises CorruptError: a source that speaks the truth never says such things.
"""

from __future__ import annotations

import os

from hvfuse import spool
from hvfuse.errors import CorruptError
from hvfuse.frames import HEADER_SIZE, MAX_PLAIN, Frame, decode
from hvfuse.manifest import CycleKind, CycleManifest
from hvfuse.target.schema import DiskRecord, StagingRecord

MAX_DISK_SIZE = 1 << 50
MAX_DISKS = 1024
NAME_BYTES = 255
MAX_FRAME = HEADER_SIZE + MAX_PLAIN
_MAX_U63 = (1 << 63) - 1


def check_name(name: str, what: str) -> None:
    """`name` can be the name of a file directly in a directory of ours."""
    raw = os.fsencode(name)
    if not raw or raw in (b".", b"..") or b"/" in raw or b"\0" in raw or len(raw) > NAME_BYTES:
        raise CorruptError(f"{name[:80]!r} cannot be the name of a {what}")


def check_manifest(manifest: CycleManifest) -> None:
    """A manifest is possible in itself."""
    check_name(manifest.vm, "VM")
    for disk in manifest.disks:
        check_name(disk.name, "disk")
        if spool.is_reserved(disk.name):
            raise CorruptError(f"{disk.name!r} is the name of a log, not of a disk")
        if len(disk.disk_id) != 16 or len(disk.digest) != 16 or not 0 <= disk.size <= MAX_DISK_SIZE:
            raise CorruptError(f"{manifest.vm}: manifest of {disk.name} is out of bounds")
    ids, names = {disk.disk_id for disk in manifest.disks}, {disk.name for disk in manifest.disks}
    if not 0 < len(manifest.disks) == len(ids) == len(names) <= MAX_DISKS:
        raise CorruptError(f"{manifest.vm}: a manifest without disks, with too many, or with one twice")
    is_copy = manifest.kind is CycleKind.COPY
    if len(manifest.generation) != 16 or len(manifest.made_from) != 16 or not 0 <= manifest.sealed_ns <= _MAX_U63:
        raise CorruptError(f"{manifest.vm}: manifest is out of bounds")
    if (manifest.cycle == 0) != is_copy or not 0 <= manifest.cycle <= _MAX_U63:
        raise CorruptError(f"{manifest.vm}: cycle {manifest.cycle} cannot be a {manifest.kind.value}")
    if manifest.previous is None and not is_copy:
        raise CorruptError(f"{manifest.vm}: cycle {manifest.cycle} does not say what it continues")


def admit_frame(raw: bytes, staging: StagingRecord) -> tuple[Frame, DiskRecord]:
    """Decode a frame of the open cycle, and find its disk. UnsupportedError: a newer kind of frame."""
    if len(raw) > MAX_FRAME:
        raise CorruptError(f"a frame of {len(raw)} bytes; at most {MAX_FRAME} are allowed")
    frame = decode(raw)
    header = frame.header
    if (header.generation, header.cycle) != (staging.generation, staging.cycle):
        raise CorruptError(
            f"a frame of {header.generation.hex()[:8]}:{header.cycle} in cycle "
            f"{staging.generation.hex()[:8]}:{staging.cycle}"
        )
    disk = next((disk for disk in staging.disks if disk.disk_id == header.disk_id), None)
    if disk is None:
        raise CorruptError(f"frame {header.number} is of a disk that is not in the cycle's manifest")
    ends = frame.table["offset"] + frame.table["length"]
    if len(ends) and int(ends.max()) > MAX_DISK_SIZE:
        raise CorruptError(f"frame {header.number} reaches beyond {MAX_DISK_SIZE} bytes of {disk.name}")
    return frame, disk


def is_same(staging: StagingRecord, manifest: CycleManifest) -> bool:
    """Whether frames staged for one belong to the other: a COPY may give other sizes and another time."""

    def identity(cycle: StagingRecord | CycleManifest) -> tuple[object, ...]:
        return (cycle.kind, cycle.generation, cycle.cycle, cycle.previous, cycle.made_from)

    is_copy = manifest.kind is CycleKind.COPY
    return identity(staging) == identity(manifest) and {
        (disk.disk_id, disk.name, disk.digest, 0 if is_copy else disk.size) for disk in staging.disks
    } == {(disk.disk_id, disk.name, disk.digest, 0 if is_copy else disk.size) for disk in manifest.disks}
