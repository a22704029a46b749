"""The fixed grid on which copies number their frames, and what a disk has in a part of it.

A disk is looked at in *slots* of `SLOT` bytes, `SLOTS` of which make a *group*. A slot that has something to
send is one frame. A group's last frame closes it: whoever finds it held knows that the group is done. Numbers
follow from the place on the disk alone, not from sizes or data, and a group's closing frame goes last. Hence
an interrupted copy goes on so: closed groups are left out; of any other group the held slots are left out and
the closing frame is made anew. No number is sent twice. What a slot had when its frame was made may be out of
date by then: all that was written since is in the generation's logs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

from hvfuse import system
from hvfuse.extent import Extent
from hvfuse.reconcile import plan
from hvfuse.shipper.content import Flags
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.retry import refusal
from hvfuse.shipper.source import SourceDisk

SLOT = plan.SPAN
SLOTS = 1024
GROUP = SLOT * SLOTS
NUMBERS_PER_DISK = 1 << 25
MAX_DISK = NUMBERS_PER_DISK // (SLOTS + 1) * GROUP
"""Bytes, over 127 TiB: what the numbers of a disk suffice for."""
MAX_DISKS = (1 << 32) // NUMBERS_PER_DISK

Progress = Callable[[int, int, int], None]
"""(bytes looked at, bytes in all, bytes sent in this run); may raise to end the copy for now."""


@dataclass(frozen=True, slots=True)
class Group:
    """The bytes [start, end) of a disk, whose image at `path` is open at `fd`. `first`: the number of the
    first slot. What lies beyond the disk's size, `disk.size`, is zeroes, whatever is in the file."""

    fd: int
    path: str
    disk: SourceDisk
    first: int
    start: int
    end: int

    @property
    def closing_number(self) -> int:
        return self.first + SLOTS

    def number(self, place: int) -> int:
        """The number of the slot that begins at byte `place * SLOT` of the disk."""
        return self.first + place - self.start // SLOT

    def occupied(self, low: int, high: int) -> list[Extent]:
        """As `data`, as extents."""
        return [Extent(begin, end - begin) for begin, end in self.data(low, high)]

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view`; returns the bytes read, fewer where the image was just cut. Raises HvfuseError."""
        try:
            system.read_ahead(self.fd, offset + len(view), len(view))
            return system.pread_into(self.fd, view, offset)
        except OSError as error:
            raise refusal(error, self.path) from error

    def occupied_slots(self) -> Flags:
        """Which slots have anything allocated, shape (slots,)."""
        flags = np.zeros(-(-(self.end - self.start) // SLOT), np.bool_)
        for low, high in self.data(self.start, self.end):
            flags[(low - self.start) // SLOT : -(-(high - self.start) // SLOT)] = True
        return flags

    def data(self, low: int, high: int) -> list[tuple[int, int]]:
        """The ranges (offset, end) within [low, high) that may hold anything but zeroes. Raises HvfuseError."""
        try:
            return list(system.data_extents(self.fd, low, min(high, self.disk.size)))
        except OSError as error:
            raise refusal(error, self.path) from error

    def read(self, low: int, high: int) -> bytes:
        """The bytes of a range; fewer where the image was just cut. Raises HvfuseError."""
        try:
            system.read_ahead(self.fd, high, high - low)
            return system.pread(self.fd, high - low, low)
        except OSError as error:
            raise refusal(error, self.path) from error


def open_disk(path: str) -> int:
    """A descriptor to read the image of a disk in use by. Raises HvfuseError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise refusal(error, path) from error
    system.keep_pages_small(fd)  # the guest goes on writing to them
    return fd


def groups(disk: SourceDisk, folder: str, *, index: int, end: int) -> Generator[Group]:
    """The groups of the bytes [0, end) of the disk that is number `index` of the VM's. To be closed."""
    path = os.path.join(folder, disk.name)
    fd = open_disk(path)
    try:
        for number, start in enumerate(range(0, end, GROUP)):
            first = index * NUMBERS_PER_DISK + number * (SLOTS + 1)
            yield Group(fd, path, disk, first, start, min(start + GROUP, end))
    finally:
        os.close(fd)


class Outlet:
    """Gives frames to the replica. `held`: the numbers that it had before; `sent` bytes, `frames`: in this run."""

    def __init__(self, replica: Replica, held: frozenset[int]) -> None:
        self._replica = replica
        self.held = held
        self.sent = self.frames = 0

    def put(self, frame: bytes) -> None:
        self._replica.put(frame)
        self.sent += len(frame)
        self.frames += 1
