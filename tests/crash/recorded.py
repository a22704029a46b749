"""One recorded file: what of it is durable, what was changed since, and what a crash may make of that."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np

from hvfuse.extent import round_up

SECTOR = 512
_HOLE = 1 << 16
"""Bytes; zeroes of that length and place are left out when a file is written."""


class Fate(Enum):
    """How much of what was not synced survives."""

    LOST = auto()
    KEPT = auto()
    ORDERED = auto()
    SECTORS = auto()


@dataclass(frozen=True, slots=True)
class Verdict:
    """One file's fate. `until`: the instant for ORDERED; `share`: of what SECTORS lets survive."""

    fate: Fate
    until: int
    share: float
    dice: np.random.Generator

    def takes(self, time: int, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of `count` sectors (or names) hold what was written to them at `time`."""
        if self.fate is Fate.SECTORS:
            return self.dice.random(count) < self.share
        kept = self.fate is Fate.KEPT or (self.fate is Fate.ORDERED and time <= self.until)
        return np.full(count, kept)


@dataclass(frozen=True, slots=True)
class Change:
    """At `time`, [offset, offset + length) became `data`, None for zeroes; the file was `size` bytes then."""

    time: int
    offset: int
    length: int
    data: bytes | None
    size: int

    def apply(self, content: bytearray) -> None:
        if self.size > len(content):
            content.extend(bytes(self.size - len(content)))
        content[self.offset : self.offset + self.length] = self.data if self.data is not None else bytes(self.length)
        del content[self.size :]


@dataclass(slots=True, eq=False)
class File:
    """`fd` is our own, and keeps the inode's number from being given to another file."""

    fd: int
    durable: bytearray
    durable_mtime_ns: int
    now: bytearray = field(default_factory=bytearray)
    changes: list[Change] = field(default_factory=list)
    is_mapped: bool = False

    def note(self, change: Change) -> None:
        change.apply(self.now)
        self.changes.append(change)

    def settle(self) -> None:
        """All of it is durable."""
        for change in self.changes:
            change.apply(self.durable)
        self.changes.clear()

    def settle_range(self, start: int, end: int) -> None:
        """The sectors of a range are durable as they are; the others stay open."""
        first, last = start // SECTOR * SECTOR, round_up(end, SECTOR)
        if len(self.durable) < len(self.now):
            self.durable.extend(bytes(len(self.now) - len(self.durable)))
        self.durable[first:last] = self.now[first:last]
        self.changes = [piece for change in self.changes for piece in _outside(change, first, last)]

    def left_by(self, verdict: Verdict) -> bytes:
        """The contents after a crash."""
        room = round_up(max([len(self.durable), *(change.size for change in self.changes)]), SECTOR)
        now, kept = bytearray(room), bytearray(room)
        now[: len(self.durable)] = kept[: len(self.durable)] = self.durable
        # Views as sectors: writing to them writes to the bytearrays.
        seen, left = (np.frombuffer(raw, np.uint8).reshape(-1, SECTOR) for raw in (now, kept))
        size = len(self.durable)
        for change in self.changes:
            end = change.offset + change.length
            now[change.offset : end] = change.data if change.data is not None else bytes(change.length)
            first, last = change.offset // SECTOR, -(-end // SECTOR)
            taken = verdict.takes(change.time, last - first)
            left[first:last][taken] = seen[first:last][taken]
            if verdict.takes(change.time, 1)[0]:
                size = change.size
        return bytes(kept[:size])


def _outside(change: Change, first: int, last: int) -> list[Change]:
    """What of a change lies outside of the sectors [first, last)."""
    end = change.offset + change.length
    pieces = []
    for low, high in ((change.offset, min(end, first)), (max(change.offset, last), end)):
        if low < high:
            data = None if change.data is None else change.data[low - change.offset : high - change.offset]
            pieces.append(Change(change.time, low, high - low, data, change.size))
    return pieces


def fill(path: str, content: bytes) -> None:
    """Give a file, which is made if missing, other contents."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, len(content))
        for at in range(0, len(content), _HOLE):
            piece = content[at : at + _HOLE]
            if piece.count(0) != len(piece):
                os.pwrite(fd, piece, at)
    finally:
        os.close(fd)
