"""What a guest does to its disks, drawn at random, and a model of what its disks must hold afterwards.

An `Operation` is drawn from the model alone, so a process that was killed can be followed by another
that knows only the seed and how many operations were answered.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from hvfuse.extent import round_up
from hvfuse.formats.vhd_layout import FOOTER_COOKIE, FOOTER_SIZE, SECTOR, UNUSED, Header, unpack_header, unpack_table

MIN_SIZE, MAX_SIZE = 256 << 10, 1280 << 10
"""Bytes that a raw disk has at least and at most."""
_HEADER_AT = FOOTER_SIZE
_HEADER_END = _HEADER_AT + 1024


class Action(Enum):
    """What is asked of the disks, of the tracker, or of the shipper."""

    WRITE = auto()
    ZERO = auto()
    TRIM = auto()
    RESIZE = auto()
    SYNC = auto()
    ROTATE = auto()
    CYCLE = auto()
    RESTART = auto()


@dataclass(frozen=True, slots=True)
class Operation:
    """`length`: bytes; of a RESIZE the new size. `data`: of a WRITE. Without a disk: of the whole VM."""

    action: Action
    disk: str = ""
    offset: int = 0
    length: int = 0
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Floor:
    """A promise: from `content` on, only the changes from number `first` on may be found on the disk."""

    content: bytes
    first: int


@dataclass(frozen=True, slots=True)
class _Change:
    """[offset, offset + len(data)) became `data`; the disk was `size` bytes then."""

    offset: int
    data: bytes
    size: int


@dataclass(slots=True)
class DiskModel:
    """One disk: what it holds, what it may hold at worst after a crash of the host.

    `synced`: promised by the last answered fsync. `sealed`: by the last answered rotation, which is to
    have made the image durable, too.
    """

    now: bytearray
    changes: list[_Change] = field(default_factory=list)
    synced: Floor = field(init=False)
    sealed: Floor = field(init=False)

    def __post_init__(self) -> None:
        self.synced = self.sealed = self.floor()

    def floor(self) -> Floor:
        """What a sync answered at this moment promises."""
        return Floor(bytes(self.now), len(self.changes))

    def apply(self, operation: Operation) -> None:
        """The operation was answered."""
        for change in self._changes_of(operation):
            self._put(change)
            self.changes.append(change)
        if operation.action is Action.SYNC:
            self.synced = self.floor()

    def seal(self) -> None:
        """A rotation was answered. What no promise speaks of any more is forgotten."""
        self.sealed = self.floor()
        first = min(self.synced.first, self.sealed.first)
        del self.changes[:first]
        self.synced = Floor(self.synced.content, self.synced.first - first)
        self.sealed = Floor(self.sealed.content, self.sealed.first - first)

    def attempt(self, operation: Operation) -> None:
        """The operation was not answered: it may show, wholly or in part. `found` tells, afterwards."""
        self.changes += self._changes_of(operation)

    def found(self, content: bytes) -> None:
        """This is what the disk holds now; promises stay as they are."""
        self.now = bytearray(content)

    def settle(self, content: bytes) -> None:
        """This is what the disk holds, durably."""
        self.now = bytearray(content)
        self.changes.clear()
        self.synced = self.sealed = self.floor()

    def _changes_of(self, operation: Operation) -> list[_Change]:
        size = len(self.now)
        match operation.action:
            case Action.WRITE:
                end = operation.offset + len(operation.data)
                return [_Change(operation.offset, operation.data, max(size, end))]
            case Action.ZERO | Action.TRIM:
                length = max(min(operation.length, size - operation.offset), 0)
                return [_Change(operation.offset, bytes(length), size)]
            case Action.RESIZE:
                cut = max(size - operation.length, 0)
                return [_Change(min(size, operation.length), bytes(cut), operation.length)]
        return []

    def _put(self, change: _Change) -> None:
        if change.size > len(self.now):
            self.now.extend(bytes(change.size - len(self.now)))
        self.now[change.offset : change.offset + len(change.data)] = change.data
        del self.now[change.size :]

    def first_wrong(self, disk: bytes, floor: Floor) -> int | None:
        """The first byte of `disk` that breaks the promise `floor`; None if it is kept.

        A byte may be what it was, or what any write since has made of it.
        """
        later = self.changes[floor.first :]
        sizes = {len(floor.content)} | {change.size for change in later}
        if len(disk) not in sizes:
            return min(len(disk), *sizes)
        have = np.frombuffer(disk, np.uint8)
        right = have == np.frombuffer(floor.content.ljust(len(disk), b"\0")[: len(disk)], np.uint8)
        for change in later:
            piece = slice(change.offset, min(change.offset + len(change.data), len(disk)))
            wanted = np.frombuffer(change.data, np.uint8)[: max(piece.stop - piece.start, 0)]
            right[piece] |= have[piece] == wanted
        return None if right.all() else int(np.argmin(right))


def draw(dice: random.Random, disks: dict[str, DiskModel], count: int, *, ships: bool) -> Iterator[Operation]:
    """About `count` operations, each drawn when the one before was applied to `disks`. The last is a CYCLE
    if it `ships`."""
    drawn = 0
    while drawn < count:
        name = dice.choice(sorted(disks))
        for operation in _some(dice, name, disks[name], ships=ships):
            yield operation
            drawn += 1
    if ships:
        yield Operation(Action.CYCLE)


_RAW = [Action.WRITE] * 20 + [Action.ZERO, Action.TRIM] * 2 + [Action.SYNC] * 4 + [Action.RESIZE]
_VM = [Action.ROTATE] * 3 + [Action.RESTART] + [Action.CYCLE] * 2


def _some(dice: random.Random, name: str, disk: DiskModel, *, ships: bool) -> Sequence[Operation]:
    if dice.randrange(16) == 0:
        action = dice.choice(_VM)
        return [Operation(action if ships or action is not Action.CYCLE else Action.ROTATE)]
    action = dice.choice(_RAW)
    if action is Action.SYNC:
        return [Operation(action, name)]
    if name.endswith(".vhd"):
        return _on_vhd(dice, name, disk, action)
    size = len(disk.now)
    if action is Action.RESIZE:
        return [Operation(action, name, length=dice.randrange(MIN_SIZE, MAX_SIZE))]
    offset = dice.randrange(size)
    length = dice.choice([1, 511, 512, 4096, 4096, 70_000])
    if dice.randrange(4):
        offset -= offset % 4096
    if size + length > MAX_SIZE or dice.randrange(16):
        length = min(length, size - offset)
    return [_of(dice, action, name, offset, length)]


def _of(dice: random.Random, action: Action, name: str, offset: int, length: int) -> Operation:
    data = b""
    if action is Action.WRITE:
        data = bytes(length) if dice.randrange(16) == 0 else dice.randbytes(length)
    return Operation(action, name, offset, length, data)


def _on_vhd(dice: random.Random, name: str, disk: DiskModel, action: Action) -> list[Operation]:
    """On a dynamic VHD, as a driver that orders its writes does it; blocks that are there see all kinds."""
    image = disk.now
    header = unpack_header(bytes(image[_HEADER_AT:_HEADER_END]), name, disk_size=0)
    table = unpack_table(bytes(image[header.table_offset : header.table_end]))
    index = dice.randrange(len(table))
    offset = dice.randrange(header.block_size) // SECTOR * SECTOR
    length = min(dice.choice([512, 1024, 4096, 30_000]), header.block_size - offset)
    if table[index] == UNUSED:
        return _new_block(dice, name, image, header, index)
    at = int(table[index]) * SECTOR + header.bitmap_size + offset
    return [_of(dice, Action.WRITE if action is Action.RESIZE else action, name, at, length)]


def _new_block(dice: random.Random, name: str, image: bytearray, header: Header, index: int) -> list[Operation]:
    """The footer is moved and synced, then the block is filled and synced, then the table names it."""
    end = len(image) - FOOTER_SIZE
    if not image[end:].startswith(FOOTER_COOKIE):  # an earlier growth was cut short
        end = round_up(len(image), SECTOR)
    block = b"\xff" * header.bitmap_size + dice.randbytes(dice.choice([512, 5000]))
    entry = (end // SECTOR).to_bytes(4, "big")
    return [
        Operation(Action.WRITE, name, end + header.stride, FOOTER_SIZE, bytes(image[:FOOTER_SIZE])),
        Operation(Action.SYNC, name),
        Operation(Action.WRITE, name, end, len(block), block),
        Operation(Action.SYNC, name),
        Operation(Action.WRITE, name, header.table_offset + index * 4, 4, entry),
    ]
