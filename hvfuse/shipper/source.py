"""Where sealed logs come from: the tracker, asked over its socket, and the folder that it fills.

The tracker need not run: logs that it sealed before it ended are shipped and released all the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hvfuse import spool, system, wire
from hvfuse.errors import CorruptError, HvfuseError, UnreachableError
from hvfuse.formats import companion
from hvfuse.shipper.coalesce import DamagedLogError
from hvfuse.spool import SealedCycle

ROTATE_TIMEOUT = 600.0
"""Seconds: sealing waits for the disks to sync their logs."""

_log = logging.getLogger(__name__)


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
    """

    vm: str
    generation: bytes | None
    cycle: int
    resync_required: str | None
    disks: tuple[SourceDisk, ...]


class Source(Protocol):
    """What the shipper asks of the side that tracks."""

    def status(self) -> SourceStatus:
        """How the VM's disks stand. Raises UnreachableError when the tracker does not run."""

    def begin(self, generation: bytes) -> SourceStatus:
        """Begin a generation at one instant for all disks; cycle 1 is active. As `status` otherwise."""

    def rotate(self) -> int:
        """Seal the active cycle and return its number. It, and every one before it, is now durable and
        in `cycles`. As `status` otherwise."""

    def cycles(self) -> list[SealedCycle]:
        """The sealed cycles, oldest first, perhaps of several generations. Raises DamagedLogError."""

    def release(self, generation: bytes, cycle: int) -> None:
        """Let go the logs of the generation up to the cycle, and those of all other generations."""

    def discard_damaged(self) -> Sequence[str]:
        """Let go the logs whose companion cannot be read at all; returns the companions' paths."""


class TrackerSource:
    """The tracker that listens at `socket_path` and keeps its logs in `folder`."""

    def __init__(self, socket_path: str, folder: str) -> None:
        self._socket = socket_path
        self._folder = os.path.abspath(folder)

    def status(self) -> SourceStatus:
        return _status(wire.request(self._socket, "status"))

    def begin(self, generation: bytes) -> SourceStatus:
        answer = wire.request(self._socket, "begin", timeout=ROTATE_TIMEOUT, generation=generation.hex())
        return _status(answer)

    def rotate(self) -> int:
        return int(wire.request(self._socket, "rotate", timeout=ROTATE_TIMEOUT)["cycle"])

    def cycles(self) -> list[SealedCycle]:
        try:
            return spool.list_cycles(self._folder)
        except CorruptError as error:
            raise DamagedLogError(str(error)) from None

    def release(self, generation: bytes, cycle: int) -> None:
        try:
            wire.request(self._socket, "release", generation=generation.hex(), cycle=cycle)
        except UnreachableError:
            # Nobody else will. Should the tracker start at this moment: releasing twice is harmless.
            spool.release([c for c in self.cycles() if c.generation != generation or c.cycle <= cycle])

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
        generation = answer["generation"]
        return SourceStatus(
            vm=answer["vm"],
            generation=None if generation is None else bytes.fromhex(generation),
            cycle=int(answer["cycle"]),
            resync_required=answer["resync_required"],
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
        raise UnreachableError(f"the tracker's answer makes no sense: {error!r}") from None
