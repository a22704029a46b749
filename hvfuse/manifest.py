"""What a cycle is made of, as it is told from one side to the other: plain records, no behaviour.

A cycle travels as a manifest, any number of frames (`hvfuse.frames`) and a commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import xxhash

from hvfuse.consistency import Consistency
from hvfuse.position import NO_DIGEST, Position


class CycleKind(StrEnum):
    """How a cycle's frames relate to what the replica holds."""

    COPY = "copy"
    """Cycle 0 of a generation: the whole disks, or their differences from what the replica holds, read
    while they were in use. Consistent only once cycle 1 is applied too, hence never a recovery point."""
    DELTA = "delta"
    """What was written during one cycle: gives a recovery point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskManifest:
    """One disk within a cycle.

    `disk_id`: 16 bytes, given when tracking of the disk began. `name`: file name in the VM's folder.
    `format`: "raw", "vhd-fixed", "vhd-dynamic", "vhd-differencing", "vhdx". `size`: bytes of the
    image file at the end of the cycle. `digest`: 16 bytes, of the disk's sealed log; zeroes in a copy.
    """

    disk_id: bytes
    name: str
    format: str
    size: int
    digest: bytes = NO_DIGEST


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleManifest:
    """One cycle of a VM.

    `previous` is the position that this cycle continues (None for a copy of whole disks). `sealed_ns` is the
    barrier's instant, ns since 1970: the time of the recovery point; the order of cycles is their number
    and nothing else. `made_from`: 16 bytes that tell apart the same cycle's frames when they are made from
    other logs than its own and those before it (compacted ones), and so are cut differently: what is staged
    under one value is of no use under another. Zeroes otherwise.
    """

    vm: str
    kind: CycleKind
    generation: bytes
    cycle: int
    previous: Position | None
    sealed_ns: int
    disks: tuple[DiskManifest, ...]
    consistency: Consistency = Consistency.CRASH
    made_from: bytes = NO_DIGEST

    def position(self) -> Position:
        """Where a replica stands once it has this cycle."""
        if self.kind is CycleKind.COPY:
            return Position(self.generation, 0, NO_DIGEST)
        return Position(self.generation, self.cycle, cycle_digest({d.disk_id: d.digest for d in self.disks}))


def cycle_digest(digests: Mapping[bytes, bytes]) -> bytes:
    """16 bytes over the sealed logs of all disks of a cycle; `digests` maps disk id to log digest."""
    return bytes(xxhash.xxh3_128_digest(b"".join(key + digests[key] for key in sorted(digests))))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPoint:
    """A state of the VM that can be failed over to.

    `id` is unique within the VM and stable; `time_ns` the barrier's instant, ns since 1970. `definition`: digest, in
    hexadecimal digits, of what the source said of the VM when the point was committed; "" where it said nothing.
    """

    id: str
    vm: str
    generation: bytes
    cycle: int
    time_ns: int
    consistency: Consistency
    disks: tuple[DiskManifest, ...]
    stored_bytes: int
    """Bytes of the cycle's frames as stored."""
    definition: str = ""


def point_id(generation: bytes, cycle: int) -> str:
    """The name of the recovery point that a cycle makes, for example "1f3b9c2e-000017"."""
    return f"{generation.hex()[:8]}-{cycle:06d}"
