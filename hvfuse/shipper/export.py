"""The first copy of a VM, written to a medium instead of sent to the target.

The copy is the one that goes over the network otherwise, resumed as that is; the medium takes the replica's place.
It begins a generation, so that from then on every write is logged while the medium travels. Once the target has
the medium's contents, the replica stands at the generation's copy, and what follows are cycles. Until then, the
order `seed` says durably that nothing is to be copied over the network.

Any number of media may be made of one generation, one after the other: each is a copy that the logs make whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import zstandard

from hvfuse import medium, system
from hvfuse.errors import HvfuseError, NoSpaceError, UsageError
from hvfuse.extent import Extent
from hvfuse.formats.digests import DigestKey, Digests
from hvfuse.frames import unpack_header
from hvfuse.manifest import CycleManifest, RecoveryPoint
from hvfuse.medium import SeedWriter
from hvfuse.position import Position
from hvfuse.seed import SeedManifest
from hvfuse.shipper.coalesce import DamagedLogError
from hvfuse.shipper.copy import CopyReport, copy
from hvfuse.shipper.decide import Action, decide
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.policy import CurrentPolicy, Records
from hvfuse.shipper.progress import CopyKind, CopyProgress, Meter
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.retry import refusal
from hvfuse.shipper.slots import open_disk
from hvfuse.shipper.source import ResyncScope, Source, SourceDisk, SourceStatus
from hvfuse.states import Event
from hvfuse.system import Clock
from hvfuse.words import bytes_text

SAMPLES = 64
SAMPLE = 64 << 10
DOUBT = 0.8
"""Part of the room that samples foretell, with less than which an export is not begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export took. `bytes_total`: of the disks; `bytes_sent`, `frames_sent`: encoded, in this run;
    `frames_held`: what was on the medium before; `frames`, `medium_bytes`, `files`: what is there now, the manifest
    left out. `already`: the medium was complete before."""

    vm: str
    directory: str
    generation: bytes
    bytes_total: int
    bytes_sent: int
    frames_sent: int
    frames_held: int
    frames: int
    medium_bytes: int
    files: int
    seconds: float
    already: bool

    def as_json(self) -> dict[str, object]:
        """The fields, as they are answered over the control socket."""
        return {**dataclasses.asdict(self), "generation": self.generation.hex()}


class SeedReplica:
    """A medium in `directory` in the place of a replica that has no position: takes one whole copy."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._writer: SeedWriter | None = None
        self.manifest: SeedManifest | None = None
        """Of the complete medium, after `commit`."""

    def close(self) -> None:
        """Let files go."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def keeps_frames(self) -> bool:
        """See `Replica`."""
        return True

    def position(self) -> Position | None:
        """See `Replica`: none."""
        return None

    def points(self) -> Sequence[RecoveryPoint]:
        """See `Replica`: none."""
        return ()

    def begin(self, manifest: CycleManifest) -> frozenset[int]:
        """See `Replica`. Raises what `SeedWriter` raises."""
        self.close()
        self._writer = SeedWriter(self._directory, manifest)
        return self._writer.held

    def define(self, definition: bytes) -> None:
        """See `Replica`: a copy makes no points."""

    def put(self, frame: bytes) -> None:
        """See `Replica`."""
        self._open().append(unpack_header(frame).number, frame)

    def commit(self, manifest: CycleManifest, frame_count: int) -> RecoveryPoint | None:
        """See `Replica`."""
        self.manifest = self._open().complete(manifest)
        self.close()
        if self.manifest.frames != frame_count:
            raise HvfuseError(f"{self._directory}: {self.manifest.frames} of {frame_count} frames are there")
        return None

    def abandon(self) -> None:
        """See `Replica`."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None

    def extent(self, disk_id: bytes) -> int:
        """See `Replica`: there is nothing that a copy could lie over."""
        raise self._nothing()

    def occupied(self, disk_id: bytes, low: int, high: int) -> Sequence[Extent]:
        """As `extent`."""
        raise self._nothing()

    def summaries(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """As `extent`."""
        raise self._nothing()

    def digests(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """As `extent`."""
        raise self._nothing()

    def inspect(self, *, from_medium: bool) -> None:
        """See `Replica`: there is nothing to compare."""

    def _nothing(self) -> HvfuseError:
        return HvfuseError(f"{self._directory}: no copy of differences is open")

    def _open(self) -> SeedWriter:
        if self._writer is None:
            raise HvfuseError(f"{self._directory}: no copy is open")
        return self._writer


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporter:
    """Exports a VM, in the thread that ships it. Fields as of `hvfuse.shipper.replication.Replication`."""

    vm: str
    folder: str
    source: Source
    replica: Replica
    records: Records
    policy: CurrentPolicy
    clock: Clock
    between: Callable[[], None] = lambda: None

    def export(self, directory: str) -> ExportReport:
        """Write the first copy of the VM into `directory`, or go on with that.

        Raises UsageError (the VM has a replica, the directory holds something else), NoSpaceError, UnreachableError
        (the tracker does not run, or `between` says stop), HvfuseError (the order was taken back, or the export
        suspended), and what
        reading the disks raises. Called again with the same directory, it goes on; nothing but the frame in flight
        is repeated.
        """
        started = self.clock.monotonic()
        self._demand_no_replica()
        status = self.source.status()
        found = medium.read_manifest(directory)
        status = self._begin(status, directory) if found is None else self._continue(status, found, directory)
        if found is not None and found.complete:
            self._show_end(found.cycle.generation)
            return self._report(directory, found, started=started, frames_held=found.frames, already=True)
        done, manifest = self._copy(status, directory, goes_on=found is not None)
        return replace(
            self._report(directory, manifest, started=started, frames_held=done.frames_held),
            bytes_sent=done.bytes_sent,
            frames_sent=done.frames_sent,
        )

    def _copy(self, status: SourceStatus, directory: str, *, goes_on: bool) -> tuple[CopyReport, SeedManifest]:
        generation = status.generation
        assert generation is not None
        self.source.release(generation, 0)  # logs that no copy will ever need fill up the disk
        meter = self._meter(generation, goes_on=goes_on)
        begun = {"error": None, "hint": None, "copy_due_ns": None, "copy": meter.now.as_json()}
        self.records.apply(Event.NEED_FIRST_COPY, Event.START, **begun)

        def tell(done: int, total: int, sent: int) -> None:
            self.between()
            if meter.tell(done, total, sent):
                self._obey(generation, directory)

        try:
            with contextlib.closing(SeedReplica(directory)) as target:
                done = copy(
                    status.disks,
                    vm=self.vm,
                    folder=self.folder,
                    generation=generation,
                    replica=target,
                    level=max(1, self.policy.now.level),
                    clock=self.clock,
                    progress=tell,
                )
        finally:
            self._show_end(generation)
        self.records.update(copy=None)
        assert target.manifest is not None
        return done, target.manifest

    def _obey(self, generation: bytes, directory: str) -> None:
        """Raises HvfuseError if the export is not to go on."""
        orders = self.records.orders()
        again = f"hvfuse seed export {self.vm} {directory}"
        if orders.seed != generation.hex():
            raise HvfuseError(
                f"{self.vm}: the export was cancelled; what is in {directory} stays there",
                hint=f"to export all the same, which goes on from it: {again}",
            )
        if orders.suspended:
            raise HvfuseError(
                f"{self.vm}: the export was suspended; what is in {directory} stays there", hint=f"to go on: {again}"
            )

    def _show_end(self, generation: bytes) -> None:
        """No export is under way any more. How far it came is kept only as long as it is wanted, so that it is not
        taken for the progress of a copy over the network."""
        orders = self.records.orders()
        if orders.seed != generation.hex():
            self.records.apply(Event.NEED_FIRST_COPY, progress=None, copy=None)
            return
        suspended = (Event.SUSPEND,) if orders.suspended else ()
        self.records.apply(Event.AWAIT_FIRST_COPY, *suspended, error=None, hint=None, progress=None)

    def _meter(self, generation: bytes, *, goes_on: bool) -> Meter:
        kept = CopyProgress.from_json(self.records.copy_progress())
        if kept is None or not goes_on or (kept.kind, kept.generation) != (CopyKind.EXPORT, generation.hex()):
            kept = CopyProgress(kind=CopyKind.EXPORT, generation=generation.hex())
        keep = self.records.update
        return Meter(kept, clock=self.clock, keep=lambda now: keep(copy=now.as_json(), progress=now.part))

    def _demand_no_replica(self) -> None:
        position = self.replica.position()
        if position is not None or self.replica.points():
            raise UsageError(
                f"{self.vm}: the target has a replica already, at {position}; an export is for a first copy",
                hint=f"hvfuse resync {self.vm} sends only what differs",
            )

    def _continue(self, status: SourceStatus, found: SeedManifest, directory: str) -> SourceStatus:
        """Go on with what is in `directory`, if the logs still add to it. Raises UsageError."""
        generation = status.generation if self._is_of_use(status) else None
        disks = [(disk.disk_id, disk.name) for disk in status.disks]
        medium.demand_same(found, directory, vm=self.vm, generation=generation, disks=disks)
        assert generation is not None
        self._order(generation)
        return status

    def _begin(self, status: SourceStatus, directory: str) -> SourceStatus:
        """Begin a generation, unless an earlier export did and the logs still add to it."""
        medium.demand_empty(directory)
        self._demand_room(status.disks, directory)
        before = self.records.orders()
        if status.generation is not None and status.generation.hex() == before.seed and self._is_of_use(status):
            self._order(status.generation)
            return status
        generation = os.urandom(16)
        # First the order: no shipper that starts in between is to copy the new generation over the network.
        self._order(generation)
        try:
            self.source.discard_damaged()
            return self.source.begin(generation, ResyncScope.FULL)
        except HvfuseError:
            self.records.change_orders(lambda orders: before)
            raise

    def _is_of_use(self, status: SourceStatus) -> bool:
        """Whether a first copy of the generation in progress is what the logs add to."""
        try:
            decision = decide(status, None, self.source.cycles())
        except DamagedLogError:
            return False
        return decision.action is Action.RESUME_COPY and decision.scope is ResyncScope.FULL

    def _order(self, generation: bytes) -> None:
        """In the place of what was ordered before: a copy that was suspended or cancelled is exported instead."""
        self.records.change_orders(lambda orders: Orders(seed=generation.hex()))

    def _demand_room(self, disks: Sequence[SourceDisk], directory: str) -> None:
        """Raises NoSpaceError where the disks will hardly fit, as far as samples tell."""
        needed, free = estimate(disks, self.folder, level=self.policy.now.level), _free_bytes(directory)
        if free < DOUBT * needed:
            raise NoSpaceError(
                f"{directory}: {bytes_text(free)} are free; {self.vm} will take about {bytes_text(needed)}",
                hint="make room, use a larger medium, or raise [replication] compression",
            )

    def _report(
        self, directory: str, manifest: SeedManifest, *, started: float, frames_held: int, already: bool = False
    ) -> ExportReport:
        return ExportReport(
            vm=self.vm,
            directory=directory,
            generation=manifest.cycle.generation,
            bytes_total=sum(disk.size for disk in manifest.cycle.disks),
            bytes_sent=0,
            frames_sent=0,
            frames_held=frames_held,
            frames=manifest.frames,
            medium_bytes=manifest.file_bytes,
            files=len(manifest.files),
            seconds=self.clock.monotonic() - started,
            already=already,
        )


def without_seed(orders: Orders) -> Orders:
    """The first copy is to go over the network, although it was exported."""
    return replace(orders, seed=None)


def estimate(disks: Sequence[SourceDisk], folder: str, *, level: int) -> int:
    """Bytes that an export will about take: of what is allocated, some samples are compressed.

    Raises HvfuseError when an image cannot be read.
    """
    compressor = zstandard.ZstdCompressor(level=max(1, level))
    needed = 0.0
    for disk in disks:
        path = os.path.join(folder, disk.name)
        fd = open_disk(path)
        try:
            needed += _estimate(fd, disk.size, compressor)
        except OSError as error:
            raise refusal(error, path) from error
        finally:
            os.close(fd)
    return int(needed)


def _estimate(fd: int, size: int, compressor: zstandard.ZstdCompressor) -> float:
    extents = list(system.data_extents(fd, 0, size))
    allocated = sum(end - start for start, end in extents)
    plain = packed = passed = 0
    due = step = max(SAMPLE, allocated / SAMPLES)
    due /= 2
    for start, end in extents:
        while due < passed + end - start:
            data = system.pread(fd, SAMPLE, start + int(due - passed))
            plain += len(data)
            packed += len(compressor.compress(data)) if data.strip(b"\0") else 0
            due += step
        passed += end - start
    return allocated * packed / plain if plain else 0.0


def _free_bytes(directory: str) -> int:
    """What can be written into a directory, which may be missing yet."""
    path = os.path.abspath(directory)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
