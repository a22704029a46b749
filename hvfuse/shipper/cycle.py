"""One cycle on its way: manifest, the frames that the replica lacks, commit.

Several consecutive cycles may travel as one, under the number of the last: what lies between their
barriers is given up, newest write wins. That is how the logs travel that piled up during a copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import xxhash

from hvfuse.consistency import Consistency
from hvfuse.errors import HvfuseError
from hvfuse.manifest import CycleKind, CycleManifest, DiskManifest, cycle_digest
from hvfuse.position import NO_DIGEST, Position
from hvfuse.shipper.coalesce import DamagedLogError, DiskPlan, close_logs, logs_by_disk, open_logs, plan
from hvfuse.shipper.pool import FramePool, Job, Made
from hvfuse.shipper.replica import Replica
from hvfuse.spool import SealedCycle
from hvfuse.system import Clock

AHEAD = 24
"""Frames of at most 2 MiB, mostly 1 MiB before compression, that are made ahead of the replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleReport:
    """What shipping took.

    `point`: id of the recovery point. `bytes_logged`: payload in the logs. `bytes_coalesced`: what was
    left of it after newest-write-wins. `bytes_zero`: bytes that the frames sent in this run told as
    zeroes. `bytes_sent`, `frames_sent`: encoded frames, this run. `frames_held`: frames that the
    replica had from an earlier run. `seconds`: from begin to commit. `sealed_ns`: the point's time.
    `notes`: what else had to be done first, in plain words. `consistency`: what the point promises.
    `frozen_seconds`: how long the guest stood still for it, 0.0 if it did not. `freeze_error`: why the point is
    crash-consistent although it was to be more, None if that is not so. `is_late`: it was sealed in an interval of
    which nothing came in time, and came behind with others.
    """

    vm: str
    point: str
    generation: bytes
    cycle: int
    sealed_ns: int
    bytes_logged: int
    bytes_coalesced: int
    bytes_zero: int
    bytes_sent: int
    frames_sent: int
    frames_held: int
    seconds: float
    notes: tuple[str, ...] = ()
    consistency: Consistency = Consistency.CRASH
    frozen_seconds: float = 0.0
    freeze_error: str | None = None
    is_late: bool = False

    def as_json(self) -> dict[str, object]:
        """The fields, as they are answered over the control socket."""
        return {**dataclasses.asdict(self), "generation": self.generation.hex()}


SUMMED = ("bytes_logged", "bytes_coalesced", "bytes_zero", "bytes_sent", "frames_sent", "frames_held", "seconds")


def total(reports: Sequence[CycleReport]) -> CycleReport:
    """The last of the reports, with what can be added up summed over all of them."""
    sums = {field: sum(getattr(report, field) for report in reports) for field in SUMMED}
    return dataclasses.replace(reports[-1], **sums)


@dataclass(slots=True)
class _Tally:
    """What went over so far. `planned`: frames planned for the disks that are finished."""

    planned: int = 0
    logged: int = 0
    coalesced: int = 0
    zero: int = 0
    sent: int = 0
    frames: int = 0

    def add(self, made: Made) -> None:
        self.sent += len(made.frame)
        self.zero += made.zero_bytes
        self.frames += 1

    def finish(self, disk: DiskPlan) -> None:
        self.planned += disk.frame_count
        self.logged += disk.log_bytes
        self.coalesced += disk.coalesced_bytes


def previous_position(cycle: SealedCycle) -> Position:
    """The position that a cycle continues, as its own logs tell it."""
    if cycle.first_cycle == 1:
        return Position(cycle.generation, 0, NO_DIGEST)
    digests = {log.header.disk_id: log.header.previous_digest for log in cycle.logs}
    return Position(cycle.generation, cycle.first_cycle - 1, cycle_digest(digests))


def continued_position(cycle: SealedCycle, position: Position | None) -> Position:
    """The position that a cycle continues for a replica that stands at `position`.

    That is what the cycle's own logs tell. They know only where they begin, though: where one of them was
    compacted and goes back further than `position`, it gives the right disk from there on too.
    """
    if position is not None and position.generation == cycle.generation:
        goes_back = any(log.header.first_cycle <= position.cycle for log in cycle.logs)
        if goes_back and cycle.first_cycle - 1 <= position.cycle < cycle.cycle:
            return position
    return previous_position(cycle)


def manifest(
    cycles: Sequence[SealedCycle], *, vm: str, formats: Mapping[str, str], position: Position | None = None
) -> CycleManifest:
    """The manifest of consecutive cycles that travel as one. `formats`: by disk name. `position`: where the
    replica stands.

    Raises DamagedLogError when a log is missing or does not continue the one before it.
    """
    check_chain(cycles)
    last = cycles[-1]
    unknown = [log.disk for log in last.logs if log.disk not in formats]
    if unknown:
        raise HvfuseError(f"{vm}: the format of {unknown[0]} is not known")
    return CycleManifest(
        vm=vm,
        kind=CycleKind.DELTA,
        generation=last.generation,
        cycle=last.cycle,
        previous=continued_position(cycles[0], position),
        sealed_ns=last.sealed_ns,
        disks=tuple(
            DiskManifest(
                disk_id=log.header.disk_id,
                name=log.disk,
                format=formats[log.disk],
                size=log.header.end_size,
                digest=log.header.digest(),
            )
            for log in last.logs
        ),
        consistency=last.consistency,
        made_from=_made_from(cycles),
    )


def _made_from(cycles: Sequence[SealedCycle]) -> bytes:
    logs = [log for cycle in cycles for log in cycle.logs]
    if not any(log.header.is_compacted for log in logs):
        return NO_DIGEST
    return bytes(xxhash.xxh3_128_digest(b"".join(log.header.pack() for log in logs)))


def check_chain(cycles: Sequence[SealedCycle]) -> None:
    """Raises DamagedLogError unless the cycles are whole and each continues the one before it."""
    for cycle in cycles:
        if not cycle.is_whole:
            raise DamagedLogError(f"{cycle.logs[0].folder}: logs of cycle {cycle.cycle} are missing")
    for before, after in itertools.pairwise(cycles):
        follows = after.generation == before.generation and after.first_cycle <= before.cycle + 1 <= after.cycle
        digests = {log.header.disk_id: log.header.digest() for log in before.logs}
        for log in after.logs:
            digest = digests.get(log.header.disk_id)
            if log.header.first_cycle <= before.cycle and digest is not None:
                digest = log.header.previous_digest  # compacted: it tells of an earlier cycle than `before`
            if not follows or digest != log.header.previous_digest:
                raise DamagedLogError(f"{log.companion_path}: does not continue the log before it")


def ship(
    cycles: Sequence[SealedCycle],
    *,
    vm: str,
    formats: Mapping[str, str],
    replica: Replica,
    level: int,
    clock: Clock,
    between: Callable[[], None] = lambda: None,
    doing: Callable[[str], None] = lambda what: None,
    consistency: Consistency | None = None,
) -> CycleReport:
    """Bring consecutive cycles (mostly one) to the replica as one, and commit.

    Sends nothing that the replica holds from an earlier, interrupted run. `between` is called after
    each frame and may raise to end the run; `doing` is told each step. `consistency`: of the point, None for
    what the logs say. Raises DamagedLogError naming the log, PositionMismatchError, and whatever the replica
    raises; all but the first leave the way open to calling again.
    """
    started = clock.monotonic()
    told = manifest(cycles, vm=vm, formats=formats, position=replica.position())
    told = dataclasses.replace(told, consistency=consistency or told.consistency)
    doing(f"waits for the target to take cycle {told.cycle}")
    held = replica.begin(told)
    tally = _Tally()
    with FramePool(generation=told.generation, cycle=told.cycle, level=level, ahead=AHEAD) as pool:
        for logs in logs_by_disk(cycles):
            planned = plan(logs)
            for made in _missing(planned, first=tally.planned, held=held, pool=pool):
                doing(f"sends cycle {told.cycle}, frame {tally.frames + 1}")
                replica.put(made.frame)
                tally.add(made)
                between()
            tally.finish(planned)
    doing(f"waits for the target to commit cycle {told.cycle}")
    point = replica.commit(told, tally.planned)
    if point is None:
        raise HvfuseError(f"{vm}: the replica made no recovery point of cycle {told.cycle}")
    return CycleReport(
        vm=vm,
        point=point.id,
        generation=told.generation,
        cycle=told.cycle,
        sealed_ns=told.sealed_ns,
        bytes_logged=tally.logged,
        bytes_coalesced=tally.coalesced,
        bytes_zero=tally.zero,
        bytes_sent=tally.sent,
        frames_sent=tally.frames,
        frames_held=tally.planned - tally.frames,
        seconds=clock.monotonic() - started,
        consistency=told.consistency,
    )


def _missing(disk: DiskPlan, *, first: int, held: frozenset[int], pool: FramePool) -> Iterator[Made]:
    """The frames of one disk that the replica lacks. `first`: the number of the disk's frame 0."""
    files = open_logs(disk)
    try:
        jobs = (
            Job(
                number=first + frame,
                disk_id=disk.logs[0].header.disk_id,
                build=functools.partial(disk.content, frame, files),
            )
            for frame in range(disk.frame_count)
            if first + frame not in held
        )
        with contextlib.closing(pool.make(jobs)) as made:
            yield from made
    finally:
        close_logs(files)
