"""The copy that begins a generation, read while the VM runs: of whole disks, or of their differences only.

Writes that happen meanwhile are in the generation's logs, so what is read of a block may be older or
newer than its neighbour: the logs up to any barrier after the copy's end make it consistent. How it is
resumed: `hvfuse.shipper.slots`.

The first copy of a VM is whole: a slot with data is a frame, and a group's closing frame says zeroes wherever
the group has no frame of its own, so an empty disk of 64 TiB takes 16,384 small frames. Any later one
lies over what the replica holds: `hvfuse.shipper.differences`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvfuse.errors import UnsupportedError
from hvfuse.extent import Extent
from hvfuse.formats.digests import Algorithm
from hvfuse.manifest import CycleKind, CycleManifest, DiskManifest
from hvfuse.position import Position
from hvfuse.shipper import slots
from hvfuse.shipper.content import NOWHERE, Content, Flags, Pieces, compose, zeroes
from hvfuse.shipper.differences import Differences
from hvfuse.shipper.pool import FramePool, Job
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.slots import Group, Outlet, Progress
from hvfuse.shipper.source import SourceDisk
from hvfuse.system import Clock
from hvfuse.words import bytes_text


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """What a copy took.

    `regions`: how many were to be compared; None if all of the disks was. `bytes_total`: of the disks.
    `bytes_compared`: of them, with the replica; None in a whole copy that no pass followed. `bytes_differing`: of
    what the run that completed it compared. `bytes_sent`, `frames_sent`: encoded frames. `frames_held`: what the
    replica had from earlier runs. `passes`: this copy and those that followed it at once. `is_whole`: the first of
    them was of whole disks.

    From `copy`: of that run alone; as it is kept (`hvfuse.shipper.copies`): of all runs and all passes.
    """

    regions: int | None
    bytes_total: int
    bytes_compared: int | None
    bytes_differing: int
    bytes_sent: int
    frames_sent: int
    frames_held: int
    seconds: float
    passes: int = 1
    is_whole: bool = False

    @property
    def text(self) -> str:
        """The report in plain words."""
        total, sent = bytes_text(self.bytes_total), bytes_text(self.bytes_sent)
        passes = f" in {self.passes} passes" if self.passes > 1 else ""
        if self.is_whole or self.bytes_compared is None:
            return f"copied: {total}, {sent} sent{passes}"
        parts = [f"{bytes_text(self.bytes_compared)} of {total} compared", f"{sent} sent"]
        if self.regions is not None:
            parts.insert(0, f"{self.regions} region{'' if self.regions == 1 else 's'}")
        return f"resynchronised: {', '.join(parts)}{passes}"

    def followed_by(self, other: CopyReport) -> CopyReport:
        """Of a pass and the next one together."""
        regions = None if self.regions is None or other.regions is None else self.regions + other.regions
        return CopyReport(
            regions=regions,
            bytes_total=other.bytes_total,
            bytes_compared=(self.bytes_compared or 0) + (other.bytes_compared or 0),
            bytes_differing=self.bytes_differing + other.bytes_differing,
            bytes_sent=self.bytes_sent + other.bytes_sent,
            frames_sent=self.frames_sent + other.frames_sent,
            frames_held=self.frames_held + other.frames_held,
            seconds=self.seconds + other.seconds,
            passes=self.passes + other.passes,
            is_whole=self.is_whole,
        )

    def as_json(self) -> dict[str, object]:
        """The fields and the text, as they are kept in the records."""
        return {**dataclasses.asdict(self), "text": self.text}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CopyReport:
        """From `as_json`. Raises TypeError if fields are missing."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """What a copy of differences lies over. `previous`: where the replica stands. `regions`: by disk id, what
    may differ from that, ascending; None: anything."""

    previous: Position
    regions: Mapping[bytes, Sequence[Extent]] | None = None


def copy(
    disks: Sequence[SourceDisk],
    *,
    vm: str,
    folder: str,
    generation: bytes,
    replica: Replica,
    level: int,
    clock: Clock,
    over: Over | None = None,
    algorithm: Algorithm = Algorithm.XXH3,
    progress: Progress = lambda done, total, sent: None,
    before_commit: Callable[[CopyReport], None] = lambda report: None,
) -> CopyReport:
    """Copy disks, in the order of their names, whose generation has begun; or go on with that.

    `over` None: whole disks. `level`: of frames that the replica keeps; others are not compressed. Raises HvfuseError
    when an image cannot be read, and whatever the replica raises; called again with the same `over` it goes on where
    it was. `before_commit` is told what the run took when all is there, and only the commit is left.
    """
    started = clock.monotonic()
    manifest = _manifest(disks, vm=vm, generation=generation, over=over, now_ns=clock.now_ns())
    outlet = Outlet(replica, replica.begin(manifest))
    with contextlib.ExitStack() as stack:
        level = level if replica.keeps_frames() else 0
        pool = stack.enter_context(FramePool(generation=generation, cycle=0, level=level))
        run: _Whole | Differences = _Whole(disks, outlet, pool, progress)
        if over is not None:
            run = stack.enter_context(
                Differences(
                    disks, over.regions, replica=replica, outlet=outlet, pool=pool, progress=progress,
                    algorithm=algorithm,
                )
            )  # fmt: skip
        _check_numbers(vm, run.ends)
        for index, disk in enumerate(disks):
            with contextlib.closing(slots.groups(disk, folder, index=index, end=run.ends[index])) as groups:
                for group in groups:
                    if group.closing_number not in outlet.held:
                        run.copy_group(group)
                    run.passed(group)
    report = CopyReport(
        regions=None if over is None or over.regions is None else sum(map(len, over.regions.values())),
        bytes_total=sum(disk.size for disk in disks),
        bytes_compared=run.compared,
        bytes_differing=run.differing,
        bytes_sent=outlet.sent,
        frames_sent=outlet.frames,
        frames_held=len(outlet.held),
        seconds=clock.monotonic() - started,
        is_whole=over is None,
    )
    before_commit(report)
    replica.commit(manifest, len(outlet.held) + outlet.frames)
    return report


def _manifest(
    disks: Sequence[SourceDisk], *, vm: str, generation: bytes, over: Over | None, now_ns: int
) -> CycleManifest:
    return CycleManifest(
        vm=vm,
        kind=CycleKind.COPY,
        generation=generation,
        cycle=0,
        previous=None if over is None else over.previous,
        sealed_ns=now_ns,
        disks=tuple(
            DiskManifest(disk_id=disk.disk_id, name=disk.name, format=disk.format, size=disk.size) for disk in disks
        ),
    )


def _check_numbers(vm: str, ends: Sequence[int]) -> None:
    if len(ends) > slots.MAX_DISKS or any(end > slots.MAX_DISK for end in ends):
        raise UnsupportedError(f"{vm}: more than {slots.MAX_DISKS} disks, or one of more than {slots.MAX_DISK} bytes")


class _Whole:
    """Copies all of the disks. `ends`: bytes to look at, by disk."""

    compared = None
    differing = 0

    def __init__(self, disks: Sequence[SourceDisk], outlet: Outlet, pool: FramePool, progress: Progress) -> None:
        self.ends = [disk.size for disk in disks]
        self._outlet = outlet
        self._pool = pool
        self._progress = progress
        self._done = 0

    def copy_group(self, group: Group) -> None:
        """Send the slots that have data, then zeroes for the others."""
        occupied = group.occupied_slots()
        covered = np.array([group.first + slot in self._outlet.held for slot in range(len(occupied))])
        missing = np.flatnonzero(occupied & ~covered).tolist()
        jobs = (
            Job(group.first + slot, group.disk.disk_id, functools.partial(_content, group, slot)) for slot in missing
        )
        with contextlib.closing(self._pool.make(jobs)) as all_made:
            for made in all_made:
                slot = made.number - group.first
                if made.frame:
                    self._outlet.put(made.frame)
                    covered[slot] = True
                self._tell(min((slot + 1) * slots.SLOT, group.end - group.start))
        if not covered.all():
            closing = Job(group.closing_number, group.disk.disk_id, functools.partial(_closing, group, covered))
            for made in self._pool.make([closing]):
                self._outlet.put(made.frame)

    def passed(self, group: Group) -> None:
        """The group is done."""
        self._done += group.end - group.start
        self._tell(0)

    def _tell(self, within: int) -> None:
        self._progress(self._done + within, sum(self.ends), self._outlet.sent)


def _content(group: Group, slot: int) -> Content | None:
    """What is on a slot, holes as zeroes; None if it is nothing but zeroes."""
    low = group.start + slot * slots.SLOT
    high = min(low + slots.SLOT, group.end)
    edges, origins, parts = [low], [], []
    for begin, end in group.data(low, high):
        data = group.read(begin, end)  # short where the image was just cut
        edges += [begin, begin + len(data)]
        origins += [NOWHERE, begin]
        parts.append(data)
    edges.append(high)
    origins.append(NOWHERE)
    bounds = np.array(edges, np.int64)
    real = bounds[1:] > bounds[:-1]
    pieces = Pieces(bounds[:-1][real], bounds[1:][real], np.array(origins, np.int64)[real])
    content = compose(pieces, b"".join(parts))
    return content if content.data else None


def _closing(group: Group, covered: Flags) -> Content:
    """Zeroes for the slots that have no frame; there is at least one."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], covered, [True]])))
    bounds = np.minimum(group.start + edges * slots.SLOT, group.end)
    return zeroes(bounds[::2], bounds[1::2])
