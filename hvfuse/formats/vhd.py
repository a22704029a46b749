"""What is done with VHDs: finding and checking their structures, making them, reading and writing
dynamic ones. (A fixed one is a `RawImage` over its data.) The layout is `vhd_layout`'s.

**A new block.** Blocks come one after the other, the footer behind the last; a new block takes the
footer's place. In this order, which leaves a whole file wherever it is cut short:

1. the footer is written where it will stand, behind the new block, and synced: now the file is longer
   and ends with a footer, and the space in between reads as zeroes;
2. the block's bitmap (all ones, over the old footer) and its data are written and synced;
3. its entry in the block table is written: from here on the block belongs to the disk.

A crash after 1 or 2 costs the space of one block, which nothing names, and no data. What was not yet
flushed may be lost, as on any disk.

**Bitmaps.** Sectors whose bit is 0 read as zeroes here, as the specification has it; qemu and libvhdi do
not look at the bitmaps of dynamic disks when they read. So that all see the same, hvfuse makes a block's
bitmap all ones before it first writes to that block, and before that zeroes the sectors whose bit was 0,
should they hold anything.

**Trim and zero** leave a block in its place and deallocate its data within the file.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvfuse import system
from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.extent import Buffer, is_zero, round_up
from hvfuse.formats.raw import check_range
from hvfuse.formats.vhd_layout import (
    DEFAULT_BLOCK_SIZE,
    EPOCH,
    FOOTER_COOKIE,
    FOOTER_SIZE,
    HEADER_SIZE,
    MAX_GEOMETRY,
    NOWHERE,
    SECTOR,
    SIZE_TRUSTED,
    UNUSED,
    DiskType,
    Footer,
    Header,
    Table,
    blocks_end,
    geometry,
    unpack_footer,
    unpack_header,
    unpack_table,
    validate_table,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Structures:
    """A VHD's structures, all of them verified.

    `header` and `table` are None in a fixed disk. `end`: where the footer stands, in bytes.
    `footer_missing`: the growth of the file was interrupted; the footer is the one from the start and
    belongs at `end`.
    """

    footer: Footer
    footer_bytes: bytes
    header: Header | None
    table: Table | None
    end: int
    footer_missing: bool


def load(fd: int, path: str, file_size: int) -> Structures | None:
    """Find and verify the structures of a VHD; None for a file that has no footer at either end.

    Raises CorruptError naming the damaged structure, UnsupportedError.
    """
    end = file_size - FOOTER_SIZE
    last = system.pread(fd, FOOTER_SIZE, max(end, 0))
    if last.startswith(FOOTER_COOKIE):
        footer = unpack_footer(last, f"{path}: the footer at its end")
        if footer.disk_type is DiskType.FIXED:
            return _load_fixed(footer, last, path, end)
        copy = unpack_footer(system.pread(fd, FOOTER_SIZE, 0), f"{path}: the footer's copy at its start")
        _demand_agreement(footer, copy, path)
        return _load_dynamic(fd, path, last, end, footer_missing=False)
    first = system.pread(fd, FOOTER_SIZE, 0)
    if not first.startswith(FOOTER_COOKIE):
        return None
    return _load_dynamic(fd, path, first, file_size, footer_missing=True)


def _load_fixed(footer: Footer, footer_bytes: bytes, path: str, end: int) -> Structures:
    if footer.current_size > end:
        raise CorruptError(f"{path}: truncated: {end} bytes of data of a disk of {footer.current_size}")
    return Structures(footer=footer, footer_bytes=footer_bytes, header=None, table=None, end=end, footer_missing=False)


def _demand_agreement(footer: Footer, copy: Footer, path: str) -> None:
    """What the two may differ in is what does not matter here (saved state, creator)."""
    for name in ("disk_type", "current_size", "data_offset"):
        here, there = getattr(footer, name), getattr(copy, name)
        if here != there:
            what = name.replace("_", " ")
            raise CorruptError(f"{path}: the footer says {what} {here}, its copy at the start {there}")


def _load_dynamic(fd: int, path: str, footer_bytes: bytes, have: int, *, footer_missing: bool) -> Structures:
    """`have`: bytes of the file, without the footer at its end."""
    footer = unpack_footer(footer_bytes, f"{path}: the footer's copy at its start")
    if footer.disk_type is DiskType.FIXED:
        raise CorruptError(f"{path}: truncated: a fixed VHD's footer at its start and none at its end")
    at = footer.data_offset
    if at + HEADER_SIZE > have:
        raise CorruptError(f"{path}: truncated: its header at byte {at} is not there")
    header = unpack_header(
        system.pread(fd, HEADER_SIZE, at), f"{path}: the dynamic header", disk_size=footer.current_size
    )
    if header.table_end > have:
        raise CorruptError(f"{path}: truncated: its block table ends at byte {header.table_end}, the file at {have}")
    table = unpack_table(system.pread(fd, header.max_table_entries * 4, header.table_offset))
    if footer_missing:
        needed = blocks_end(table, header) + FOOTER_SIZE
        if have < needed:
            raise CorruptError(f"{path}: truncated: no footer at its end, and {have} bytes of {needed} or more")
    validate_table(table, header, header_at=at, end=have, where=path)
    return Structures(
        footer=footer, footer_bytes=footer_bytes, header=header, table=table,
        end=round_up(have, SECTOR) if footer_missing else have, footer_missing=footer_missing,
    )  # fmt: skip


def restore_footer(fd: int, structures: Structures) -> None:
    """Put back the footer that an interrupted growth left out, before anything else is written."""
    if structures.footer_missing:
        system.pwrite("vhd:footer", fd, structures.footer_bytes, structures.end)


def damage(structures: Structures) -> tuple[str, ...]:
    """What `check` reports as corrupt, although every byte of the disk can be read."""
    if not structures.footer_missing:
        return ()
    return ("no footer at its end: its growth was interrupted; all data is there",)


def warnings(structures: Structures) -> tuple[str, ...]:
    """What is unusual but allowed."""
    footer, header, table = structures.footer, structures.header, structures.table
    found = []
    if footer.saved_state:
        found.append("a machine is suspended upon this disk")
    shown = footer.geometry.size
    if footer.creator not in SIZE_TRUSTED and footer.geometry != MAX_GEOMETRY and shown != footer.current_size:
        found.append(f"qemu takes its size for {shown} bytes, from the geometry, unless told force_size")
    data_end = footer.current_size
    if header is not None and table is not None:
        data_end = round_up(header.table_end, SECTOR) + allocated_blocks(table) * header.stride
    if structures.end > data_end:
        found.append(f"{structures.end - data_end} bytes of the file belong to nothing")
    return tuple(found)


def allocated_blocks(table: Table) -> int:
    """How many blocks are in the file."""
    return int(np.count_nonzero(table != UNUSED))


def new_footer(disk_type: DiskType, size: int) -> Footer:
    """The footer of a new disk of `size` bytes."""
    return Footer(
        disk_type=disk_type,
        current_size=size,
        original_size=size,
        data_offset=NOWHERE if disk_type is DiskType.FIXED else FOOTER_SIZE,
        geometry=geometry(size),
        created=max(0, system.SystemClock().now_ns() // 10**9 - EPOCH),
        unique_id=uuid.uuid4().bytes,
    )


def write_fixed(fd: int, size: int) -> None:
    """Make the empty file `fd` a fixed VHD that reads as zeroes; sparse, and not synced."""
    system.pwrite("vhd:footer", fd, new_footer(DiskType.FIXED, size).pack(), size)


def write_dynamic(fd: int, size: int, *, block_size: int = DEFAULT_BLOCK_SIZE) -> None:
    """Make the empty file `fd` a dynamic VHD without blocks; not synced."""
    footer = new_footer(DiskType.DYNAMIC, size).pack()
    table_offset = FOOTER_SIZE + HEADER_SIZE
    header = Header(table_offset=table_offset, max_table_entries=-(-size // block_size), block_size=block_size)
    end = round_up(header.table_end, SECTOR)
    system.pwrite("vhd:footer", fd, footer, 0)
    system.pwrite("vhd:header", fd, header.pack(), FOOTER_SIZE)
    system.pwrite("vhd:table", fd, b"\xff" * (end - table_offset), table_offset)
    system.pwrite("vhd:footer", fd, footer, end)


class DynamicVhd:
    """A dynamic VHD as an `Image`. Owns `fd`. One thread at a time.

    `ordered` false leaves the syncs between the steps of a new block out: for a file that nobody
    trusts before it was flushed as a whole.
    """

    def __init__(self, fd: int, path: str, structures: Structures, *, ordered: bool = True) -> None:
        assert structures.header is not None
        assert structures.table is not None
        self._fd = fd
        self._path = path
        self._size = structures.footer.current_size
        self._footer = structures.footer_bytes
        self._header = structures.header
        self._table = structures.table
        self._end = round_up(structures.end, SECTOR)
        self._ordered = ordered
        self._whole = bytearray(len(self._table))
        """Per block: 1 once its bitmap is known to be all ones."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def pread(self, offset: int, length: int) -> bytes:
        """The bytes of a range."""
        check_range(self._path, offset, length, self.size)
        return b"".join(self._read(*piece) for piece in self._pieces(offset, length))

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of `data`. Zeroes to a block that is not there change nothing."""
        check_range(self._path, offset, len(data), self.size)
        view = memoryview(data)
        for index, within, count in self._pieces(offset, len(view)):
            piece, view = view[:count], view[count:]
            if self._table[index] != UNUSED:
                self._make_whole(index)
                system.pwrite("vhd:data", self._fd, piece, self._data_at(index) + within)
            elif not is_zero(piece):
                self._add_block(index, within, piece)

    def trim(self, offset: int, length: int) -> None:
        """Give a range's space back; it reads as zeroes."""
        self._clear("vhd:trim", offset, length)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes."""
        self._clear("vhd:zero", offset, length)

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the ranges within [start, end) that may hold data, ascending."""
        check_range(self._path, start, end - start, self.size)
        for index, within, count in self._pieces(start, end - start):
            if self._table[index] == UNUSED:
                continue
            data_at = self._data_at(index)
            logical = index * self._header.block_size - data_at
            for data, hole in system.data_extents(self._fd, data_at + within, data_at + within + count):
                yield logical + data, hole - data

    def flush(self) -> None:
        """Make everything written so far durable."""
        system.fdatasync("vhd:sync", self._fd)

    def close(self) -> None:
        """Close the file. Does not flush."""
        os.close(self._fd)

    # Within ------------------------------------------------------------------------------------

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Split a range at the blocks' borders: (block, offset within it, bytes)."""
        end = offset + length
        while offset < end:
            index, within = divmod(offset, self._header.block_size)
            count = min(self._header.block_size - within, end - offset)
            yield index, within, count
            offset += count

    def _block_at(self, index: int) -> int:
        return int(self._table[index]) * SECTOR

    def _data_at(self, index: int) -> int:
        return self._block_at(index) + self._header.bitmap_size

    def _pread(self, offset: int, length: int) -> bytes:
        data = system.pread(self._fd, length, offset)
        if len(data) < length:
            raise CorruptError(f"{self._path}: cut off at byte {offset + len(data)} while it was open")
        return data

    def _read(self, index: int, within: int, count: int) -> bytes:
        if self._table[index] == UNUSED:
            return bytes(count)
        data = self._pread(self._data_at(index) + within, count)
        absent = self._absent_sectors(index)
        if absent is None:
            return data
        first, last = within // SECTOR, -(-(within + count) // SECTOR)
        mask = np.repeat(absent[first:last], SECTOR)[within - first * SECTOR :][:count]
        return np.where(mask, np.uint8(0), np.frombuffer(data, np.uint8)).tobytes()

    def _absent_sectors(self, index: int) -> NDArray[np.bool_] | None:
        """Which of a block's sectors read as zeroes by its bitmap; None if none does."""
        if self._whole[index]:
            return None
        bitmap = self._pread(self._block_at(index), self._header.bitmap_size)
        present = np.unpackbits(np.frombuffer(bitmap, np.uint8))[: self._header.block_size // SECTOR]
        if present.all():
            self._whole[index] = 1
            return None
        absent: NDArray[np.bool_] = present == 0
        return absent

    def _make_whole(self, index: int) -> None:
        """Make a block's bitmap all ones, so that the sectors which it hid still read as zeroes."""
        absent = self._absent_sectors(index)
        if absent is None:
            return
        data_at = self._data_at(index)
        sectors = np.frombuffer(self._pread(data_at, self._header.block_size), np.uint8).reshape(-1, SECTOR)
        stale = np.flatnonzero(absent & sectors.any(axis=1))
        for sector in stale.tolist():
            system.pwrite("vhd:data", self._fd, bytes(SECTOR), data_at + sector * SECTOR)
        if len(stale):
            self._order("vhd:data-sync")
        system.pwrite("vhd:bitmap", self._fd, b"\xff" * self._header.bitmap_size, self._block_at(index))
        self._whole[index] = 1

    def _add_block(self, index: int, within: int, data: memoryview) -> None:
        """Put a block where the footer stands; the module's docstring says why in this order."""
        block_at = self._end
        sector = block_at // SECTOR
        if sector >= UNUSED:
            raise UnsupportedError(f"{self._path}: a block at byte {block_at} is beyond what a VHD can name")
        self._move_footer(block_at + self._header.stride)
        bitmap = b"\xff" * self._header.bitmap_size
        system.pwrite("vhd:bitmap", self._fd, bitmap, block_at)
        system.pwrite("vhd:data", self._fd, data, block_at + len(bitmap) + within)
        self._order("vhd:block-sync")
        system.pwrite("vhd:entry", self._fd, struct.pack(">I", sector), self._header.table_offset + index * 4)
        self._table[index] = sector
        self._whole[index] = 1

    def _move_footer(self, end: int) -> None:
        """Lengthen the file. Should the block then fail, its space is lost, but never used half-written."""
        file_size = os.fstat(self._fd).st_size
        try:
            system.pwrite("vhd:footer", self._fd, self._footer, end)
        except OSError:
            system.truncate("vhd:undo", self._fd, file_size)
            raise
        self._end = end
        self._order("vhd:footer-sync")

    def _order(self, label: str) -> None:
        """What was written before is durable before what is written after."""
        if self._ordered:
            system.fdatasync(label, self._fd)

    def _clear(self, label: str, offset: int, length: int) -> None:
        check_range(self._path, offset, length, self.size)
        for index, within, count in self._pieces(offset, length):
            if self._table[index] != UNUSED:
                system.write_zeroes(label, self._fd, self._data_at(index) + within, count)
