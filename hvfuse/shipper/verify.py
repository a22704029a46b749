"""Compares the disks with the replica while they are in use, and never takes a write for a fault of the replica.

The replica stands at some cycle. A block that is the same on both sides is proved. One that differs may have been
written since that cycle (`hvfuse.shipper.written`): then it is left out, and taken up again when the replica has
come further, as soon after a cycle as can be. A block that differs and that no log tells of is a mismatch.
What is written to again and again may stay left out to the end: it is told as not proved, never as a mismatch.

A run goes on in slices of a second or so, in the shipper's thread, so that cycles ship in between. It opens
both sides anew for each.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from hvfuse.extent import Extent, round_up
from hvfuse.formats.digests import BLOCK, Algorithm, DigestKey
from hvfuse.position import Position
from hvfuse.reconcile import plan
from hvfuse.reconcile.compare import Candidate, Comparison
from hvfuse.shipper.proofs import Mismatch, Proofs, subtract
from hvfuse.shipper.sides import HeldDisk, Sides
from hvfuse.shipper.written import Blocks
from hvfuse.system import Clock

STRETCH = 256 << 20
"""Bytes of a disk that are looked through for data at once; a multiple of a span."""
WORKERS = min(4, os.cpu_count() or 1)
SPANS_AT_ONCE = 2 * WORKERS
"""Between two looks at the clock."""
ROUNDS = 8
"""Times that blocks which were written to meanwhile are taken up again."""
TOLD = 100
"""Ranges that a report lists at most of each kind."""

Region = tuple[bytes, int]
"""Disk id, and the number of a region of its proofs."""


def choose(
    proofs: Proofs,
    *,
    share: float,
    dice: random.Random,
    most: int | None = None,
    before: int | None = None,
) -> list[Region]:
    """Which regions to verify: that share of the bytes, and at least one region. Pure.

    Those with mismatches come first; then the least recently proved, at random among those of the same date.
    `most`: bytes; `before`: only what was proved last before then, seconds since 1970.
    """
    suspect = {
        (disk_id, number)
        for disk_id, extents in proofs.mismatched().items()
        for extent in extents
        for number in _numbers(extent, proofs.disks[disk_id].region)
    }
    found: list[tuple[tuple[bool, int, float], Region, int]] = []
    for disk_id, disk in proofs.disks.items():
        dates, lengths = disk.dates.tolist(), disk.lengths().tolist()
        for number, (date, length) in enumerate(zip(dates, lengths, strict=True)):
            region = (disk_id, number)
            if before is None or date < before:
                found.append(((region not in suspect, date, dice.random()), region, length))
    limit = share * sum(disk.size for disk in proofs.disks.values())
    if most is not None:
        limit = min(limit, most)
    chosen: list[Region] = []
    taken = 0
    for (is_proved_or_unknown, _, _), region, length in sorted(found):
        if chosen and is_proved_or_unknown and taken >= limit:
            break
        chosen.append(region)
        taken += length
    return chosen


def _numbers(extent: Extent, region: int) -> range:
    return range(extent.offset // region, (extent.end - 1) // region + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How far a run is, or what it found.

    `bytes_total`: of the regions chosen. `bytes_compared`: of them, at least once. `bytes_unproved`: of these, what
    was written to whenever it was compared. `rounds`: how often such blocks were taken up again. `seconds`: since it
    began; `seconds_left`: None if unknown. `mismatches`: what differs, and no write says why; `hot`: (disk, range)
    of what is unproved; both cut at `TOLD`. `mismatch_bytes`: of all mismatches. `wants_cycle`: it goes on once a
    cycle was shipped. `resized`: disks that became smaller, or much larger, meanwhile: the rest of them is left to
    another run.
    """

    seed: int
    done: bool
    wants_cycle: bool
    bytes_total: int
    bytes_compared: int
    bytes_unproved: int
    rounds: int
    seconds: float
    seconds_left: float | None
    mismatch_bytes: int
    mismatches: tuple[Mismatch, ...]
    hot: tuple[tuple[str, Extent], ...]
    resized: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """The fields, as they are told over the control socket and kept with the proofs."""
        fields: dict[str, object] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["mismatches"] = [mismatch.as_json() for mismatch in self.mismatches]
        fields["resized"] = list(self.resized)
        fields["hot"] = [{"disk": name, "offset": at.offset, "length": at.length} for name, at in self.hot]
        return fields


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Aligned extents of a disk, ascending and apart, within `STRETCH` bytes of it."""

    disk_id: bytes
    extents: tuple[Extent, ...]


def _stretches(disk_id: bytes, extents: Sequence[Extent]) -> Iterator[_Stretch]:
    """Aligned extents, ascending and apart, cut into stretches; neighbours joined."""
    cut = (
        Extent(at, min(extent.end, at - at % STRETCH + STRETCH) - at)
        for extent in extents
        for at in (extent.offset, *range(round_up(extent.offset + 1, STRETCH), extent.end, STRETCH))
    )
    for _, here in itertools.groupby(cut, key=lambda extent: extent.offset // STRETCH):
        yield _Stretch(disk_id, tuple(_joined(here)))


def _joined(extents: Iterator[Extent]) -> Iterator[Extent]:
    last: Extent | None = None
    for extent in extents:
        if last is not None and extent.offset == last.end:
            last = Extent(last.offset, last.length + extent.length)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last


def _blocks(extents: Sequence[Extent]) -> Blocks:
    """The numbers of the blocks of aligned extents."""
    if not extents:
        return np.empty(0, np.int64)
    return np.concatenate([np.arange(extent.offset // BLOCK, extent.end // BLOCK) for extent in extents])


def _extents(blocks: Blocks) -> list[Extent]:
    """Blocks as extents, neighbours joined."""
    if not len(blocks):
        return []
    runs = np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1)
    return [Extent(int(run[0]) * BLOCK, len(run) * BLOCK) for run in runs]


def _total(extents: Sequence[Extent]) -> int:
    return sum(extent.length for extent in extents)


class Run:
    """One verification of some regions. For one thread; `workers` reads and digests.

    `proofs` follows the disks already; it is told what is found, and to be saved by the caller.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        *,
        proofs: Proofs,
        seed: int,
        clock: Clock,
        workers: Executor,
        algorithm: Algorithm = Algorithm.XXH3,
    ) -> None:
        self._proofs = proofs
        self._seed = seed
        self._clock = clock
        self._workers = workers
        self._key = DigestKey.fresh(algorithm)
        self._began = clock.monotonic()
        self._sizes = {disk_id: proofs.disks[disk_id].size for disk_id, _ in regions}
        self._awaited = {(disk_id, number): proofs.disks[disk_id].extent(number).length for disk_id, number in regions}
        self._total = sum(self._awaited.values())
        self._compared = 0
        self._todo: deque[_Stretch] = deque(_by_disk(regions, proofs))
        self._left: dict[bytes, list[Extent]] = {}
        self._left_at: Position | None = None
        self.position: Position | None = None
        """Where the replica stood when something was compared last."""
        self._rounds = 0
        self._mismatches: list[Mismatch] = []
        self._resized: list[str] = []
        self.is_fresh = True
        """Whether nothing was compared yet."""

    @property
    def wants_cycle(self) -> bool:
        """Whether there is nothing to do before the replica has come further."""
        return not self._todo and bool(self._left) and self._rounds < ROUNDS and self.position == self._left_at

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to do any more."""
        return not self._todo and (not self._left or self._rounds >= ROUNDS)

    def advance(self, sides: Sides, *, seconds: float, most: int | None = None) -> int:
        """Compare for about that long, or about that many bytes. Returns the bytes that had to be read of each side.

        Raises what opening the sides raises, and whatever reading does; may be called again all the same.
        """
        self.is_fresh = False
        self.position = sides.position
        self._follow(sides)
        if not self._todo and self._left and self._left_at != self.position and self._rounds < ROUNDS:
            self._take_up_again()
        deadline, read = self._clock.monotonic() + seconds, 0
        while self._todo and (most is None or read < most):
            read += self._compare(sides, deadline=deadline, most=None if most is None else most - read)
            if self._clock.monotonic() >= deadline:
                break
        return read

    def _take_up_again(self) -> None:
        self._rounds += 1
        for disk_id, extents in self._left.items():
            ordered = sorted(extents, key=lambda extent: extent.offset)
            self._todo.extend(_stretches(disk_id, ordered))
        self._left = {}

    def _follow(self, sides: Sides) -> None:
        """Adapt to disks that have another size by now, or are gone."""
        before = {disk_id: disk.region for disk_id, disk in self._proofs.disks.items()}
        self._proofs.follow((disk.disk_id, disk.name, disk.size) for disk in sides.disks.values())
        for disk_id, size in list(self._sizes.items()):
            disk = self._proofs.disks.get(disk_id)
            if disk is None or disk.size < size or disk.region != before[disk_id]:
                self._forget(disk_id)
                self._resized += [disk.name] if disk is not None else []
            elif disk.size > size:  # there is more of the last region now than was chosen
                self._awaited.pop((disk_id, size // disk.region), None)
                self._sizes[disk_id] = disk.size

    def _forget(self, disk_id: bytes) -> None:
        """The disk's regions are not what they were: leave the rest of it to another run."""
        del self._sizes[disk_id]
        if not self._rounds:
            self._total -= sum(_total(stretch.extents) for stretch in self._todo if stretch.disk_id == disk_id)
        self._todo = deque(stretch for stretch in self._todo if stretch.disk_id != disk_id)
        self._left.pop(disk_id, None)
        self._awaited = {region: length for region, length in self._awaited.items() if region[0] != disk_id}

    def _compare(self, sides: Sides, *, deadline: float, most: int | None) -> int:
        """Compare the next stretch, or a part of it. Returns the bytes that had to be read."""
        stretch = self._todo[0]
        source, other, comparison = sides.of(stretch.disk_id, self._key)
        low, reached = stretch.extents[0].offset, stretch.extents[-1].end
        doubtful = plan.in_doubt(stretch.extents, source.occupied(low, reached), other.occupied(low, reached))
        spans, found, read = plan.spans(doubtful), list[Extent](), 0
        while batch := list(itertools.islice(spans, SPANS_AT_ONCE)):
            for blocks in self._workers.map(lambda span: _differences(other, comparison, span, self._key), batch):
                found += blocks
            read += sum(_total(span) for span in batch)
            if self._clock.monotonic() >= deadline or (most is not None and read >= most):
                reached = min(reached, round_up(batch[-1][-1].end, plan.SPAN))
                break
        done = list(plan.intersect(stretch.extents, [Extent(low, reached - low)]))
        self._settle(sides, stretch.disk_id, done, found)
        self._todo.popleft()
        rest = subtract(stretch.extents, done)
        if rest:
            self._todo.appendleft(_Stretch(stretch.disk_id, tuple(rest)))
        return read

    def _settle(self, sides: Sides, disk_id: bytes, done: Sequence[Extent], found: Sequence[Extent]) -> None:
        """Note what was compared, and that of it which was `found` to differ. All of it has been read by now."""
        blocks = _blocks(found)
        written = sides.since.written(disk_id, blocks)
        wrong = _extents(blocks[~written])
        if wrong:
            sides.check()  # had logging ended, no log would have told of what was written
            now_ns = self._clock.now_ns()
            self._mismatches += self._proofs.differ(disk_id, wrong, now_ns=now_ns)
        if written.any():
            self._left.setdefault(disk_id, []).extend(_extents(blocks[written]))
            self._left_at = sides.position
        self._equal(disk_id, subtract(done, found))
        if not self._rounds:
            self._compared += _total(done)

    def _equal(self, disk_id: bytes, extents: Sequence[Extent]) -> None:
        """Blocks are the same on both sides; regions of which all are, are proved."""
        self._proofs.equal(disk_id, extents)
        region = self._proofs.disks[disk_id].region
        for extent in extents:
            for number in _numbers(extent, region):
                awaited = self._awaited.get((disk_id, number))
                if awaited is None:
                    continue
                low, high = max(extent.offset, number * region), min(extent.end, (number + 1) * region)
                self._awaited[disk_id, number] = awaited - (high - low)
                if awaited == high - low:
                    del self._awaited[disk_id, number]
                    self._proofs.prove(disk_id, number, now_ns=self._clock.now_ns())

    def report(self) -> Report:
        """How far it is."""
        seconds = self._clock.monotonic() - self._began
        names = {disk_id: disk.name for disk_id, disk in self._proofs.disks.items()}
        hot = [(names[disk_id], extent) for disk_id, extents in self._left.items() for extent in extents]
        left = self._total - self._compared
        return Report(
            seed=self._seed,
            done=self.is_done,
            wants_cycle=self.wants_cycle,
            bytes_total=self._total,
            bytes_compared=self._compared,
            bytes_unproved=_total([extent for _, extent in hot]),
            rounds=self._rounds,
            seconds=seconds,
            seconds_left=seconds * left / self._compared if self._compared else None,
            mismatch_bytes=_total([mismatch.extent for mismatch in self._mismatches]),
            mismatches=tuple(self._mismatches[:TOLD]),
            hot=tuple(hot[:TOLD]),
            resized=tuple(self._resized),
        )


def _differences(other: HeldDisk, comparison: Comparison, span: tuple[Extent, ...], key: DigestKey) -> Sequence[Extent]:
    """The blocks of a span that differ. For any thread."""
    found = comparison.differences(Candidate(span, other.summaries(span, key)))
    return () if found is None else found.blocks


def _by_disk(regions: Sequence[Region], proofs: Proofs) -> Iterator[_Stretch]:
    """All of the regions, disk by disk and ascending."""
    for disk_id, ours in itertools.groupby(sorted(regions), key=lambda region: region[0]):
        yield from _stretches(disk_id, [proofs.disks[disk_id].extent(number) for _, number in ours])
