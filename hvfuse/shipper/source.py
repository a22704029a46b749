"""Where sealed logs come from: the tracker, asked over its socket, and the folder that it fills.

The tracker need not run: logs that it sealed before it ended are shipped all the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from hvfuse import spool, system, wire
from hvfuse.consistency import Consistency
from hvfuse.errors import CorruptError, HvfuseError, UnreachableError
from hvfuse.extent import Extent
from hvfuse.formats import companion
from hvfuse.position import Position
from hvfuse.shipper.coalesce import DamagedLogError
from hvfuse.spool import SealedCycle

PATIENCE = 600.0
"""Seconds: sealing waits for the disks to sync their logs."""

_log = logging.getLogger(__name__)


Regions = Mapping[bytes, Sequence[Extent]]
"""Disk id to what of the disk has to be compared, ascending and apart."""


class ResyncScope(StrEnum):
    """What has to be compared with the replica before logs can continue it."""

    REGIONS = "regions"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceDisk:
    """A tracked disk. `size`: bytes of the image file; `log_bytes`: logical length of its active log."""

    name: str
    disk_id: bytes
    format: str
    size: int
    log_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStatus:
    """The tracker's word. `generation`: None before the first one began; `cycle`: of the active logs.

    `resync_required`: why the logs cannot tell the difference between disk and replica any more.
    `resyncing`: the copy that began the generation is not acknowledged (`Source.resynced`). `resync_scope`:
    of the resynchronisation required or under way, None when there is neither. Both may be: then logs were lost
    during the copy, which goes on all the same; once it is acknowledged, the marked regions have to follow.
    `resync_bases`: (generation, least cycle) of the replicas for which REGIONS is enough. `acknowledged`: the last
    cycle of the generation that the target is known to have. `dirty_bytes`: what a copy that is required and has not
    begun has to compare; 0 if that is everything. `resync_cause`: "disks" if nothing but disks that were added or
    removed made the resynchronisation necessary that is required or under way. `unsettled`: disks that are to be
    tracked and are not yet, or the reverse (`Source.take_in`).
    """

    vm: str
    generation: bytes | None
    cycle: int
    resync_required: str | None
    disks: tuple[SourceDisk, ...]
    resync_scope: ResyncScope | None = None
    resyncing: bool = False
    resync_bases: tuple[tuple[bytes, int], ...] = ()
    acknowledged: int = 0
    dirty_bytes: int = 0
    resync_cause: str | None = None
    unsettled: tuple[str, ...] = ()

    @property
    def bytes_total(self) -> int:
        """Of the disks."""
        return sum(disk.size for disk in self.disks)

    def scope_for(self, position: Position | None) -> ResyncScope:
        """What has to be compared with a replica that stands at `position`."""
        if self.resync_scope is not ResyncScope.REGIONS or position is None:
            return ResyncScope.FULL
        is_ahead = position.generation == self.generation and position.cycle >= self.cycle
        is_base = any(position.generation == base and position.cycle >= least for base, least in self.resync_bases)
        return ResyncScope.REGIONS if is_base and not is_ahead else ResyncScope.FULL


@dataclass(frozen=True, slots=True)
class Touched:
    """What was written in the cycle in progress. `generation`, `cycle`: of the active logs; all cycles before it
    are sealed. `disks`: those of the ranges asked for that they cover, wholly or in part."""

    generation: bytes
    cycle: int
    disks: Regions


class Source(Protocol):
    """What the shipper asks of the side that tracks."""

    def status(self) -> SourceStatus:
        """How the VM's disks stand. Raises UnreachableError when the tracker does not run."""

    def begin(self, generation: bytes, scope: ResyncScope) -> SourceStatus:
        """Begin a generation at one instant for all disks; cycle 1 is active. A copy of `scope` is to follow.

        Raises ResyncRequiredError when that scope is too narrow. As `status` otherwise.
        """

    def regions(self) -> Regions:
        """What has to be compared now. From `begin` to `resynced` it stays the same. As `status` otherwise."""

    def resynced(self, generation: bytes) -> None:
        """The target has the copy that began the generation, which is the one in progress. Idempotent.
        As `status` otherwise."""

    def take_in(self) -> None:
        """Have the disks tracked that came, as far as nobody is at them any more, and those no more that are excluded.
        That makes a resynchronisation of regions necessary. Waits for nothing. As `status` otherwise."""

    def configure(self, *, exclude: frozenset[str], hard_limit: float, soft_limit: float) -> None:
        """Take a new policy: names of disks that are not to be tracked, and what part of the disks' size logs may take
        before they are given up, ever and while everything is being copied. As `status` otherwise."""

    def rotate(self, consistency: Consistency = Consistency.CRASH, *, proof: str | None = None) -> int:
        """Seal the active cycle and return its number. It, and every one before it, is now durable and
        in `cycles`. `consistency`: what the guest was brought to for it; `proof`: path of a file that goes before
        the guest moves again, without which the cycle is sealed as crash-consistent. As `status` otherwise."""

    def cycles(self) -> list[SealedCycle]:
        """The sealed cycles, oldest first, perhaps of several generations. Raises DamagedLogError."""

    def release(self, generation: bytes, cycle: int) -> None:
        """Let go the logs of the generation up to the cycle, and those of all other generations."""

    def discard_damaged(self) -> Sequence[str]:
        """Let go the logs whose companion cannot be read at all; returns the companions' paths."""

    def touched(self, asked: Regions) -> Touched:
        """Which of the given ranges were written to since the cycle in progress began. Whatever was read of the
        images before this is accounted for. Raises ResyncRequiredError when nothing is logged; as `status`
        otherwise."""

    def doubt(self, generation: bytes, reason: str, regions: Regions) -> None:
        """The replica is wrong there: a resynchronisation of regions is required, of these and of what the logs
        held, which go. Durable. As `status` otherwise."""


class TrackerSource:
    """The tracker that listens at `socket_path` and keeps its logs in `folder`."""

    def __init__(self, socket_path: str, folder: str) -> None:
        self._socket = socket_path
        self._folder = os.path.abspath(folder)

    def ask(self, op: str, **fields: object) -> wire.Message:
        """One request to the tracker. Raises UnreachableError, and what the tracker raised."""
        return wire.request(self._socket, op, timeout=PATIENCE, **fields)

    def status(self) -> SourceStatus:
        return _status(self.ask("status"))

    def begin(self, generation: bytes, scope: ResyncScope) -> SourceStatus:
        return _status(self.ask("begin", generation=generation.hex(), scope=scope.value))

    def regions(self) -> Regions:
        answer = self.ask("regions")
        try:
            return {
                bytes.fromhex(disk["disk_id"]): [Extent(int(offset), int(length)) for offset, length in disk["extents"]]
                for disk in answer["disks"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise _nonsense(error) from None

    def resynced(self, generation: bytes) -> None:
        self.ask("resynced", generation=generation.hex())

    def take_in(self) -> None:
        self.ask("take_in")

    def configure(self, *, exclude: frozenset[str], hard_limit: float, soft_limit: float) -> None:
        self.ask("configure", exclude=sorted(exclude), hard_limit=hard_limit, soft_limit=soft_limit)

    def rotate(self, consistency: Consistency = Consistency.CRASH, *, proof: str | None = None) -> int:
        return int(self.ask("rotate", consistency=consistency.name.lower(), proof=proof)["cycle"])

    def cycles(self) -> list[SealedCycle]:
        try:
            return spool.list_cycles(self._folder)
        except CorruptError as error:
            raise DamagedLogError(str(error)) from None

    def release(self, generation: bytes, cycle: int) -> None:
        # Without the tracker they stay: it notes what was acknowledged before any log goes, and makes
        # no new ones meanwhile. The next release lets them go too.
        with contextlib.suppress(UnreachableError):
            self.ask("release", generation=generation.hex(), cycle=cycle)

    def touched(self, asked: Regions) -> Touched:
        answer = self.ask("touched", disks=_ranges(asked))
        try:
            found = {
                bytes.fromhex(disk_id): [Extent(int(offset), int(length)) for offset, length in extents]
                for disk_id, extents in answer["disks"].items()
            }
            return Touched(bytes.fromhex(answer["generation"]), int(answer["cycle"]), found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _nonsense(error) from None

    def doubt(self, generation: bytes, reason: str, regions: Regions) -> None:
        self.ask("doubt", generation=generation.hex(), reason=reason, disks=_ranges(regions))

    def discard_damaged(self) -> list[str]:
        discarded = []
        for name in sorted(os.listdir(self._folder)):
            path = os.path.join(self._folder, name)
            if not name.endswith(".hrc") or not spool.is_reserved(name) or _is_readable(path):
                continue
            system.unlink("spool:discard", path, missing_ok=True)
            disk, serial = name.removesuffix(".hrc").rsplit(".", 1)
            spool.discard_logs(self._folder, disk, int(serial))
            _log.warning("%s: damaged, discarded", path)
            discarded.append(path)
        return discarded


def _ranges(regions: Regions) -> dict[str, list[list[int]]]:
    """As they stand in a request."""
    return {
        disk_id.hex(): [[extent.offset, extent.length] for extent in extents] for disk_id, extents in regions.items()
    }


def _is_readable(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            companion.unpack_header(file.read(companion.HEADER_SIZE))
    except FileNotFoundError:
        return True
    except HvfuseError:
        return False
    return True


def _status(answer: wire.Message) -> SourceStatus:
    try:
        generation, scope = answer["generation"], answer["resync_scope"]
        return SourceStatus(
            vm=answer["vm"],
            generation=None if generation is None else bytes.fromhex(generation),
            cycle=int(answer["cycle"]),
            resync_required=answer["resync_required"],
            resync_scope=None if scope is None else ResyncScope(scope),
            resyncing=bool(answer["resyncing"]),
            resync_bases=tuple((bytes.fromhex(base), int(least)) for base, least in answer["resync_bases"]),
            acknowledged=int(answer["acknowledged"]),
            dirty_bytes=int(answer["dirty_bytes"]),
            resync_cause=answer["resync_cause"],
            unsettled=tuple(answer["unsettled"]),
            disks=tuple(
                SourceDisk(
                    name=disk["name"],
                    disk_id=bytes.fromhex(disk["disk_id"]),
                    format=disk["format"],
                    size=int(disk["size"]),
                    log_bytes=int(disk["log_bytes"]),
                )
                for disk in sorted(answer["disks"], key=lambda disk: str(disk["name"]))
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _nonsense(error) from None


def _nonsense(error: Exception) -> UnreachableError:
    return UnreachableError(f"the tracker's answer makes no sense: {error!r}")
