"""What verification has proved of a VM's replica, and what it found to differ: one small file for each VM.

A disk is cut into regions, at most `MAX_REGIONS` of a power of two. A region's date says when all its blocks
were last found equal on both sides. A mismatch stays on the list until its blocks are found equal again.

    offset size field
         0    8 magic "HVFPRF1\\0"
         8    4 version, 1
        12    4 n: bytes of the object that follows the head
        16   16 xxh3-128 of all bytes from 32 on
        32    n JSON object, UTF-8:
                "budget"      bytes a second that may be verified in idle time; 0: none
                "last_run"    what the last complete run found (`hvfuse.shipper.verify.Report`), or null
                "disks"       [{"disk_id": hex, "name", "size": bytes, "region": bytes}]
                "mismatches"  [{"disk_id": hex, "disk", "offset", "length", "found_ns", "doubted": hex or null}],
                              by disk and offset
      32+n      for each disk of the object, in its order, one u32 for each region: the date in seconds
                since 1970, 0 where the region was never proved

Replaced as a whole by renaming. It is not needed for anything but verification: who removes it has every
block unproved.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from hvfuse import system
from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.extent import Buffer, Extent, round_up
from hvfuse.formats.digests import BLOCK
from hvfuse.reconcile import plan

MAX_REGIONS = 8192
RECENT_SECONDS = 30 * 86400
MAX_MISMATCHES = 1000
"""Beyond, those of a region are told as one."""

_MAGIC = b"HVFPRF1\0"
_VERSION = 1
_HEAD = struct.Struct("<8sII16s")


def region_size(size: int) -> int:
    """The least power of two, in bytes, from a span up, of which a disk of that size has at most 8,192."""
    region = plan.SPAN
    while region * MAX_REGIONS < size:
        region *= 2
    return region


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Blocks of a disk that differ from the replica, and no write says why.

    `doubted`: the generation (hex) at whose end they are copied anew, as they were put in doubt in it; None: they
    were not.
    """

    disk_id: bytes
    disk: str
    extent: Extent
    found_ns: int
    doubted: str | None = None

    def is_copied(self, generation: str | None) -> bool:
        """Whether a replica of that generation (hex) has them copied anew; it is not proved yet."""
        return self.doubted is not None and generation is not None and self.doubted != generation

    def as_json(self) -> dict[str, object]:
        """The fields, as they are kept and told."""
        return {
            "disk_id": self.disk_id.hex(),
            "disk": self.disk,
            "offset": self.extent.offset,
            "length": self.extent.length,
            "found_ns": self.found_ns,
            "doubted": self.doubted,
        }


@dataclass(slots=True, kw_only=True)
class DiskProofs:
    """The proofs of one disk. `size`: bytes it had; `region`: bytes; `dates`: seconds since 1970, uint32, 0: never."""

    disk_id: bytes
    name: str
    size: int
    region: int
    dates: NDArray[np.uint32]

    @classmethod
    def new(cls, disk_id: bytes, name: str, size: int) -> DiskProofs:
        """Nothing proved yet."""
        region = region_size(size)
        return cls(disk_id=disk_id, name=name, size=size, region=region, dates=np.zeros(-(-size // region), np.uint32))

    def extent(self, number: int) -> Extent:
        """What of the disk is the region of that number, in whole blocks."""
        start = number * self.region
        return Extent(start, round_up(min(self.region, self.size - start), BLOCK))

    def lengths(self) -> NDArray[np.int64]:
        """Bytes of each region; the last may be cut off."""
        found = np.full(len(self.dates), self.region, np.int64)
        if len(found):
            found[-1] = self.size - (len(found) - 1) * self.region
        return found

    def resized(self, size: int) -> DiskProofs:
        """The same disk at another size. What was proved of whole regions stays so as long as it grows."""
        fresh = DiskProofs.new(self.disk_id, self.name, size)
        if size >= self.size and fresh.region == self.region:
            whole = self.size // self.region
            fresh.dates[:whole] = self.dates[:whole]
        return fresh


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What there is to say. `proved_30d`: part of the blocks proved in the last 30 days, 0 to 1. `oldest_ns`:
    when the region was proved that waits longest, ns since 1970; None if one never was."""

    proved_30d: float
    oldest_ns: int | None
    last_run: Mapping[str, Any] | None
    budget: int
    mismatches: tuple[Mismatch, ...]

    @property
    def text(self) -> str:
        """How much is proved, in plain words. Never more than it is."""
        return f"{int(100 * self.proved_30d)} % of blocks proved in the last 30 days"

    def as_json(self) -> dict[str, object]:
        """The fields, as they are told over the control socket."""
        return {
            "proved_30d": round(self.proved_30d, 4),
            "oldest_ns": self.oldest_ns,
            "last_run": None if self.last_run is None else dict(self.last_run),
            "continuous": self.budget,
            "mismatches": [mismatch.as_json() for mismatch in self.mismatches],
        }


@dataclass(slots=True)
class Proofs:
    """The file's contents. For one thread."""

    disks: dict[bytes, DiskProofs] = field(default_factory=dict)
    mismatches: list[Mismatch] = field(default_factory=list)
    budget: int = 0
    last_run: Mapping[str, Any] | None = None

    def follow(self, disks: Iterable[tuple[bytes, str, int]]) -> None:
        """Have just these disks (id, name, size in bytes). New ones begin unproved; those that are gone, and
        what was wrong with them, are forgotten."""
        found: dict[bytes, DiskProofs] = {}
        for disk_id, name, size in disks:
            known = self.disks.get(disk_id)
            if known is None:
                known = DiskProofs.new(disk_id, name, size)
            elif known.size != size:
                known = known.resized(size)
            known.name = name
            found[disk_id] = known
        self.disks = found
        self.mismatches = [
            mismatch
            for mismatch in self.mismatches
            if mismatch.disk_id in found and mismatch.extent.offset < found[mismatch.disk_id].size
        ]

    def prove(self, disk_id: bytes, region: int, *, now_ns: int) -> None:
        """All blocks of a region were found equal, in one run."""
        self.disks[disk_id].dates[region] = min(max(now_ns // 10**9, 1), (1 << 32) - 1)

    def equal(self, disk_id: bytes, extents: Sequence[Extent]) -> None:
        """Blocks were found equal: what was wrong with them is over. `extents`: ascending and apart."""
        if any(mismatch.disk_id == disk_id for mismatch in self.mismatches):
            kept = []
            for mismatch in self.mismatches:
                rest = subtract([mismatch.extent], extents) if mismatch.disk_id == disk_id else [mismatch.extent]
                kept += [_with(mismatch, extent) for extent in rest]
            self.mismatches = kept

    def differ(self, disk_id: bytes, extents: Sequence[Extent], *, now_ns: int) -> list[Mismatch]:
        """Blocks differ, and no write says why. Those that are on the list keep the instant at which they were
        found first. Returns them all, as they were found."""
        disk = self.disks[disk_id]
        for extent in extents:
            disk.dates[extent.offset // disk.region : (extent.end - 1) // disk.region + 1] = 0
        self.mismatches = [piece for mismatch in self.mismatches for piece in _again(mismatch, disk_id, extents)]
        known = self.mismatched().get(disk_id, [])
        name = disk.name
        self.mismatches += [
            Mismatch(disk_id=disk_id, disk=name, extent=extent, found_ns=now_ns) for extent in subtract(extents, known)
        ]
        self.mismatches.sort(key=lambda mismatch: (mismatch.disk, mismatch.extent.offset))
        if len(self.mismatches) > MAX_MISMATCHES:
            self._coarsen()
        return [Mismatch(disk_id=disk_id, disk=name, extent=extent, found_ns=now_ns) for extent in extents]

    def doubt(self, generation: str) -> None:
        """All of them are in doubt, in that generation (hex): the next one begins with a copy of them."""
        self.mismatches = [
            each if each.is_copied(generation) else replace(each, doubted=generation) for each in self.mismatches
        ]

    def mismatched(self, generation: str | None = None) -> dict[bytes, list[Extent]]:
        """The blocks on the list, by disk id; ascending and apart. `generation`: without those that a replica of that
        generation (hex) has copied anew."""
        found: dict[bytes, list[Extent]] = {}
        for mismatch in self.mismatches:
            if mismatch.is_copied(generation):
                continue
            found.setdefault(mismatch.disk_id, []).append(mismatch.extent)
        return {disk_id: sorted(extents, key=lambda extent: extent.offset) for disk_id, extents in found.items()}

    def verified(self, now_ns: int) -> Verified | None:
        """What there is to say now; None if nothing was ever verified."""
        if not self.disks:
            return None
        dates = np.concatenate([disk.dates for disk in self.disks.values()])
        lengths = np.concatenate([disk.lengths() for disk in self.disks.values()])
        total = int(lengths.sum())
        recent = dates >= max(1, now_ns // 10**9 - RECENT_SECONDS)
        oldest = int(dates.min()) if len(dates) else 0
        return Verified(
            proved_30d=int(lengths[recent].sum()) / total if total else 1.0,
            oldest_ns=oldest * 10**9 or None,
            last_run=self.last_run,
            budget=self.budget,
            mismatches=tuple(self.mismatches),
        )

    def _coarsen(self) -> None:
        """One mismatch for each region that has any."""
        found: dict[tuple[bytes, int], Mismatch] = {}
        for mismatch in self.mismatches:
            disk = self.disks[mismatch.disk_id]
            number = mismatch.extent.offset // disk.region
            while number * disk.region < mismatch.extent.end:
                whole = _with(mismatch, disk.extent(number))
                first = found.setdefault((mismatch.disk_id, number), whole)
                found[mismatch.disk_id, number] = replace(
                    first,
                    found_ns=min(first.found_ns, mismatch.found_ns),
                    doubted=first.doubted if first.doubted == mismatch.doubted else None,
                )
                number += 1
        self.mismatches = list(found.values())

    def pack(self) -> bytes:
        """The file's bytes."""
        told = {
            "budget": self.budget,
            "last_run": self.last_run,
            "disks": [
                {"disk_id": disk.disk_id.hex(), "name": disk.name, "size": disk.size, "region": disk.region}
                for disk in self.disks.values()
            ],
            "mismatches": [mismatch.as_json() for mismatch in self.mismatches],
        }
        raw = json.dumps(told).encode()
        body = raw + b"".join(disk.dates.astype("<u4").tobytes() for disk in self.disks.values())
        return _HEAD.pack(_MAGIC, _VERSION, len(raw), xxhash.xxh3_128_digest(body)) + body

    def save(self, path: str) -> None:
        """Put the file in place, durably. Raises OSError."""
        system.replace_file("proofs", path, self.pack())


def subtract(extents: Sequence[Extent], other: Sequence[Extent]) -> list[Extent]:
    """What of `extents` is not in `other`; each ascending and apart."""
    found: list[Extent] = []
    rest = list(reversed(other))
    for extent in extents:
        at = extent.offset
        while rest and rest[-1].end <= at:
            rest.pop()
        for hole in reversed(rest):
            if hole.offset >= extent.end:
                break
            if hole.offset > at:
                found.append(Extent(at, hole.offset - at))
            at = max(at, hole.end)
        if at < extent.end:
            found.append(Extent(at, extent.end - at))
    return found


def unpack(data: Buffer) -> Proofs:
    """Parse and verify a file. Raises CorruptError, UnsupportedError."""
    raw = bytes(data)
    if len(raw) < _HEAD.size or not raw.startswith(_MAGIC):
        raise CorruptError("not a file of proofs")
    _, version, length, digest = _HEAD.unpack_from(raw)
    if version != _VERSION:
        raise UnsupportedError(f"proofs of version {version}; this hvfuse reads version {_VERSION}")
    body = raw[_HEAD.size :]
    if xxhash.xxh3_128_digest(body) != digest:
        raise CorruptError("the proofs do not match their checksum")
    try:
        return _parse(json.loads(body[:length]), body[length:])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"the proofs make no sense: {error!r}") from None


def _parse(told: Any, dates: bytes) -> Proofs:
    disks: dict[bytes, DiskProofs] = {}
    at = 0
    for disk in told["disks"]:
        size, region = int(disk["size"]), int(disk["region"])
        count = -(-size // region)
        found = np.frombuffer(dates, "<u4", count, at).astype(np.uint32) if count else np.empty(0, np.uint32)
        at += 4 * count
        disk_id = bytes.fromhex(disk["disk_id"])
        disks[disk_id] = DiskProofs(disk_id=disk_id, name=disk["name"], size=size, region=region, dates=found)
    if at != len(dates):
        raise ValueError(f"{len(dates)} bytes of dates where {at} are told")
    mismatches = [
        Mismatch(
            disk_id=bytes.fromhex(told_one["disk_id"]),
            disk=told_one["disk"],
            extent=Extent(int(told_one["offset"]), int(told_one["length"])),
            found_ns=int(told_one["found_ns"]),
            doubted=told_one.get("doubted"),
        )
        for told_one in told["mismatches"]
    ]
    return Proofs(disks, mismatches, int(told["budget"]), told["last_run"])


def load(path: str) -> Proofs:
    """The file's contents; nothing proved if there is none. Raises CorruptError naming the file, UnsupportedError,
    OSError."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return Proofs()
    try:
        return unpack(data)
    except (CorruptError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}", hint=f"rm {path}; then every block counts as not proved yet") from None


def _again(mismatch: Mismatch, disk_id: bytes, extents: Sequence[Extent]) -> list[Mismatch]:
    """What is on the list, where `extents` of a disk were found to differ: what was done about them did not help."""
    if mismatch.disk_id != disk_id or mismatch.doubted is None:
        return [mismatch]
    rest = subtract([mismatch.extent], extents)
    again = [replace(_with(mismatch, extent), doubted=None) for extent in subtract([mismatch.extent], rest)]
    return [*(_with(mismatch, extent) for extent in rest), *again]


def _with(mismatch: Mismatch, extent: Extent) -> Mismatch:
    return replace(mismatch, extent=extent)
