"""The copy that begins a generation: all of every disk, read while the VM runs.

Writes that happen meanwhile are in the generation's logs, so what is read of a block may be older or
newer than its neighbour: the logs up to any barrier after the copy's end make it consistent.

A disk is looked at in *slots* of `SLOT` bytes, `SLOTS` of which make a *group*. A slot with data is one
frame. A group's last frame closes it: zeroes wherever the group has no frame of its own. Numbers
follow from the place on the disk alone, not from sizes or data, and a group's closing frame goes last.
Hence an interrupted copy goes on so: a group whose closing frame is held is complete; of any other
group the held slots are left out and the closing frame is made anew for what is left. Nothing is sent
twice, no byte is covered twice, and an empty disk of 64 TiB takes 16,384 small frames.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hvfuse import system
from hvfuse.errors import HvfuseError, UnsupportedError
from hvfuse.manifest import CycleKind, CycleManifest, DiskManifest
from hvfuse.shipper.content import NOWHERE, Content, Flags, Pieces, compose, zeroes
from hvfuse.shipper.pool import FramePool, Job
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.source import SourceDisk
from hvfuse.system import Clock

SLOT = 4 << 20
SLOTS = 1024
GROUP = SLOT * SLOTS
NUMBERS_PER_DISK = 1 << 25
MAX_DISK = NUMBERS_PER_DISK // (SLOTS + 1) * GROUP
"""Bytes, over 127 TiB: what the numbers of a disk suffice for."""
MAX_DISKS = (1 << 32) // NUMBERS_PER_DISK

Progress = Callable[[int, int, int], None]
"""(bytes looked at, bytes in all, bytes sent in this run); may raise to end the copy for now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """What a copy took, in the run that completed it. `bytes_total`: of the disks."""

    bytes_total: int
    bytes_sent: int
    frames_sent: int
    frames_held: int
    seconds: float


def copy(
    disks: Sequence[SourceDisk],
    *,
    vm: str,
    folder: str,
    generation: bytes,
    replica: Replica,
    level: int,
    clock: Clock,
    progress: Progress = lambda done, total, sent: None,
) -> CopyReport:
    """Copy disks, in the order of their names, whose generation has begun; or go on with that.

    Raises HvfuseError when an image cannot be read, and whatever the replica raises; called again
    it goes on where it was.
    """
    started = clock.monotonic()
    if len(disks) > MAX_DISKS or any(disk.size > MAX_DISK for disk in disks):
        raise UnsupportedError(f"{vm}: more than {MAX_DISKS} disks, or one of more than {MAX_DISK} bytes")
    manifest = CycleManifest(
        vm=vm,
        kind=CycleKind.COPY,
        generation=generation,
        cycle=0,
        previous=None,
        sealed_ns=clock.now_ns(),
        disks=tuple(
            DiskManifest(disk_id=disk.disk_id, name=disk.name, format=disk.format, size=disk.size) for disk in disks
        ),
    )
    held = replica.begin(manifest)
    with FramePool(generation=generation, cycle=0, level=level) as pool:
        run = _Copy(replica, pool, held, sum(disk.size for disk in disks), progress)
        done = 0
        for index, disk in enumerate(disks):
            run.copy_disk(disk, os.path.join(folder, disk.name), index=index, done=done)
            done += disk.size
    replica.commit(manifest, len(held) + run.frames)
    return CopyReport(
        bytes_total=run.total,
        bytes_sent=run.sent,
        frames_sent=run.frames,
        frames_held=len(held),
        seconds=clock.monotonic() - started,
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """The bytes [start, end) of the disk open at `fd`; `first` is the number of its first slot."""

    fd: int
    path: str
    disk_id: bytes
    first: int
    start: int
    end: int

    @property
    def closing_number(self) -> int:
        return self.first + SLOTS

    def occupied(self) -> Flags:
        """Which slots have anything allocated, shape (slots,)."""
        flags = np.zeros(-(-(self.end - self.start) // SLOT), np.bool_)
        for low, high in self._data(self.start, self.end):
            flags[(low - self.start) // SLOT : -(-(high - self.start) // SLOT)] = True
        return flags

    def content(self, slot: int) -> Content | None:
        """What is on a slot, holes as zeroes; None if it is nothing but zeroes."""
        low = self.start + slot * SLOT
        high = min(low + SLOT, self.end)
        edges, origins, parts = [low], [], []
        for begin, end in self._data(low, high):
            data = self._read(begin, end)  # short where the image was just cut
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

    def _data(self, low: int, high: int) -> list[tuple[int, int]]:
        try:
            return list(system.data_extents(self.fd, low, high))
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _read(self, low: int, high: int) -> bytes:
        try:
            return system.pread(self.fd, high - low, low)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def closing(self, covered: Flags) -> Content:
        """Zeroes for the slots that have no frame; there is at least one."""
        edges = np.flatnonzero(np.diff(np.concatenate([[True], covered, [True]])))
        bounds = np.minimum(self.start + edges * SLOT, self.end)
        return zeroes(bounds[::2], bounds[1::2])


class _Copy:
    """One run over all disks. `sent` bytes and `frames` count up."""

    def __init__(self, replica: Replica, pool: FramePool, held: frozenset[int], total: int, progress: Progress) -> None:
        self._replica = replica
        self._pool = pool
        self._held = held
        self._progress = progress
        self.total = total
        self.sent = self.frames = 0

    def copy_disk(self, disk: SourceDisk, path: str, *, index: int, done: int) -> None:
        """Copy the disk that is number `index` of the VM's, `done` bytes of which are behind us."""
        fd = _open_image(path)
        try:
            for number, start in enumerate(range(0, disk.size, GROUP)):
                first = index * NUMBERS_PER_DISK + number * (SLOTS + 1)
                group = _Group(fd, path, disk.disk_id, first, start, min(start + GROUP, disk.size))
                if group.closing_number not in self._held:
                    self._copy_group(group, done=done)
                self._progress(done + group.end, self.total, self.sent)
        finally:
            os.close(fd)

    def _copy_group(self, group: _Group, *, done: int) -> None:
        occupied = group.occupied()
        covered = np.array([group.first + slot in self._held for slot in range(len(occupied))])
        slots = np.flatnonzero(occupied & ~covered).tolist()
        jobs = (Job(group.first + slot, group.disk_id, functools.partial(group.content, slot)) for slot in slots)
        with contextlib.closing(self._pool.make(jobs)) as all_made:
            for made in all_made:
                slot = made.number - group.first
                if made.frame:
                    self._put(made.frame)
                    covered[slot] = True
                self._progress(done + min(group.start + (slot + 1) * SLOT, group.end), self.total, self.sent)
        if not covered.all():
            closing = Job(group.closing_number, group.disk_id, functools.partial(group.closing, covered))
            for made in self._pool.make([closing]):
                self._put(made.frame)

    def _put(self, frame: bytes) -> None:
        self._replica.put(frame)
        self.sent += len(frame)
        self.frames += 1


def _open_image(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> HvfuseError:
    return HvfuseError(f"{path}: {error.strerror}")
