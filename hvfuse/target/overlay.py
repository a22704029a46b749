"""What was written to a view's disk: whole blocks in a sparse file, and which blocks those are.

A disk's overlay is two files:

    DISK.data     the block of 4,096 bytes at offset n * 4096 of the disk lies at the same offset; sparse
    DISK.blocks   the header, and from offset 4,096 on the block map: bit n % 8 of byte n // 8 is set
                  once block n belongs to the overlay (a block that is set but a hole reads as zeroes)

Header (little-endian, 64 bytes; the rest of the 4,096 is zeroes):

    offset  size
         0     8  magic "HVOVERLY"
         8     4  version, 1
        12     4  block size, 4096
        16    16  identity of what lies below; an overlay makes sense over nothing else
        32     8  size of the disk, bytes
        40     8  bytes of the disk below that can still be seen: the least size that the disk ever had
        48     8  zeroes
        56     8  xxh3-64 of the 56 bytes before

The block map is kept in memory, and goes to the file in `flush` alone, after the data was synced. So a block
is never claimed whose data could be lost with the host; after a crash the disk is as at the last flush, in any
unflushed block perhaps newer, as with any disk. A resize is durable at once: shrunk first in the header, then
in the data, which is cut to the header's size when an overlay is opened. The block map goes first when an overlay is
removed: a map without its data would claim zeroes.

Below a block that the map does not claim, the data file may hold anything: what was written and not flushed before a
crash, or half a write that failed. It is never read, and `hold_zeroes` takes it away.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import xxhash

from hvfuse import system
from hvfuse.errors import CorruptError, HvfuseError, UnsupportedError, UsageError
from hvfuse.extent import Buffer, round_up
from hvfuse.turns import Turns

BLOCK = 4096
"""Bytes."""

_MAGIC = b"HVOVERLY"
_VERSION = 1
_HEADER = struct.Struct("<8sII16sQQ8x")
_CHECKSUM = struct.Struct("<Q")
_MAP_START = 4096
_PAGE = 4096
_PAGE_BITS = _PAGE * 8
"""Blocks in one page of the map: 128 MiB of the disk."""


_FULL = (1 << _PAGE_BITS) - 1
"""A page with all of its blocks, one object for all pages that are full."""


class BlockMap:
    """A set of block numbers; a page without a block takes no memory, and all full pages are one."""

    def __init__(self) -> None:
        self._pages: dict[int, int] = {}
        self._dirty: set[int] = set()

    def add(self, first: int, end: int) -> None:
        """Put the blocks first <= n < end into the set."""
        while first < end:
            page, bit = divmod(first, _PAGE_BITS)
            count = min(end - first, _PAGE_BITS - bit)
            before = self._pages.get(page, 0)
            after = _FULL if count == _PAGE_BITS else before | ((1 << count) - 1) << bit
            if after != before:
                self._pages[page] = _FULL if after == _FULL else after
                self._dirty.add(page)
            first += count

    def runs(self, first: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Cut first <= n < end into (first, end, in the set); neighbours may be alike."""
        while first < end:
            page, bit = divmod(first, _PAGE_BITS)
            count = min(end - first, _PAGE_BITS - bit)
            bits = self._pages.get(page, 0) >> bit
            held = bool(bits & 1)
            if held:
                bits = ~bits
            if bits:
                count = min(count, (bits & -bits).bit_length() - 1)
            yield first, first + count, held
            first += count

    def has_any(self, first: int, end: int) -> bool:
        """Whether one of the blocks first <= n < end is in the set."""
        page, bit = divmod(first, _PAGE_BITS)
        if bit + end - first <= _PAGE_BITS:
            bits = self._pages.get(page)
            return bits is not None and bool(bits >> bit & (1 << end - first) - 1)
        return any(held for _, _, held in self.runs(first, end))

    def __contains__(self, block: int) -> bool:
        page, bit = divmod(block, _PAGE_BITS)
        return bool(self._pages.get(page, 0) >> bit & 1)

    def load(self, fd: int, start: int) -> None:
        """Take the set from a file, in which it begins at `start`, a multiple of the page."""
        for offset, end in system.data_extents(fd, start, os.fstat(fd).st_size):
            for at in range(offset - offset % _PAGE, end, _PAGE):
                bits = int.from_bytes(system.pread(fd, _PAGE, at), "little")
                self._pages[(at - start) // _PAGE] = _FULL if bits == _FULL else bits

    def count(self, end: int) -> int:
        """How many of the blocks 0 <= n < end are in the set."""
        last, bits = divmod(end, _PAGE_BITS)
        whole = sum(
            _PAGE_BITS if found is _FULL else found.bit_count()
            for page, found in list(self._pages.items())
            if page < last
        )
        return whole + (self._pages.get(last, 0) & (1 << bits) - 1).bit_count()

    def changed(self) -> dict[int, int]:
        """The pages that changed since the last time that one was `saved`, as they are now."""
        return {page: self._pages[page] for page in sorted(self._dirty)}

    def save(self, pages: dict[int, int], fd: int, start: int) -> None:
        """Write `changed` pages. Raises OSError; what was not written stays changed."""
        for page, bits in pages.items():
            system.pwrite("overlay:map", fd, bits.to_bytes(_PAGE, "little"), start + page * _PAGE)
            if self._pages[page] == bits:
                self._dirty.discard(page)


class Overlay:
    """One disk's overlay, for one thread that uses the disk, and one beside it that copies up what lies below.

    `turns`: whoever changes which blocks there are, or the size, holds it: that thread as the one that goes first, the
    other one `behind`. So a block is looked for and taken in one turn. `flush` takes its turns itself. Only the first
    writes to blocks that the overlay has, and blocks are never given back: it reads without a turn.
    `size` is the disk's, in bytes; `visible`: the bytes of the disk below that still show where the overlay
    has no block.
    """

    def __init__(self, prefix: str, *, identity: bytes, lower_size: int) -> None:
        """Open the overlay `prefix`.data and .blocks, or make an empty one over a disk of `lower_size`.

        `identity` is 16 bytes. Raises CorruptError, UnsupportedError, UsageError when it belongs over
        something else, OSError.
        """
        self._paths = (f"{prefix}.data", f"{prefix}.blocks")
        self._identity = identity
        self._blocks = BlockMap()
        self._failure: OSError | None = None
        # Taken before a turn: one flush at a time, else an older page of the map could be written over a newer one.
        self._flushing = threading.Lock()
        self.turns = Turns()
        self.size = lower_size
        self.visible = lower_size
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._data = os.open(self._paths[0], flags, 0o600)
        self._map = -1
        try:
            self._map = os.open(self._paths[1], flags, 0o600)
            if os.fstat(self._map).st_size:
                self._load(lower_size)
            else:
                self._write_header()
            os.ftruncate(self._data, self.size)
        except BaseException:
            self.close()
            raise

    def _load(self, lower_size: int) -> None:
        path = self._paths[1]
        raw = system.pread(self._map, _HEADER.size + _CHECKSUM.size, 0)
        if len(raw) < _HEADER.size + _CHECKSUM.size or not raw.startswith(_MAGIC):
            raise CorruptError(f"{path}: not an overlay")
        if _CHECKSUM.unpack_from(raw, _HEADER.size) != (xxhash.xxh3_64_intdigest(raw[: _HEADER.size]),):
            raise CorruptError(f"{path}: the header's checksum is wrong")
        _, version, block, identity, self.size, self.visible = _HEADER.unpack_from(raw)
        if (version, block) != (_VERSION, BLOCK):
            raise UnsupportedError(f"{path}: an overlay of version {version}, this hvfuse reads {_VERSION}")
        if identity != self._identity or self.visible > lower_size:
            raise UsageError(f"{path}: the overlay belongs over another recovery point or disk")
        self._blocks.load(self._map, _MAP_START)

    def _write_header(self) -> None:
        self._put_header()
        self._sync("overlay:header-sync", self._map)

    def _put_header(self) -> None:
        header = _HEADER.pack(_MAGIC, _VERSION, BLOCK, self._identity, self.size, self.visible)
        header += _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header))
        system.pwrite("overlay:header", self._map, header, 0)

    @property
    def held_bytes(self) -> int:
        """Bytes of the disk that are in the overlay."""
        return min(self._blocks.count(round_up(self.size, BLOCK) // BLOCK) * BLOCK, self.size)

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Cut the bytes start <= b < end into (start, end, whether they are in the overlay)."""
        for first, last, held in self._blocks.runs(start // BLOCK, round_up(end, BLOCK) // BLOCK):
            yield max(first * BLOCK, start), min(last * BLOCK, end), held

    def holds(self, offset: int) -> bool:
        """Whether the block around `offset` is in the overlay."""
        return offset // BLOCK in self._blocks

    def holds_any(self, start: int, end: int) -> bool:
        """Whether a block that the bytes start <= b < end touch is in the overlay."""
        return self._blocks.has_any(start // BLOCK, -(-end // BLOCK))

    def pread_into(self, offset: int, out: memoryview) -> int:
        """Fill `out` with bytes within blocks that the overlay has, which lie within the disk; returns the bytes
        read, all of them."""
        return system.pread_into(self._data, out, offset)

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write, taking all blocks that are touched into the overlay. Extends the disk.

        The rest of a block that is touched in part must be there already, unless it is past the end.
        """
        system.pwrite("overlay:write", self._data, data, offset)
        end = offset + len(data)
        self.size = max(self.size, end)
        self._blocks.add(offset // BLOCK, round_up(end, BLOCK) // BLOCK)

    def clear(self, start: int, end: int) -> None:
        """Make whole blocks read as zeroes; `end` is a multiple of the block or the disk's size."""
        system.write_zeroes("overlay:clear", self._data, start, end - start)
        self._blocks.add(start // BLOCK, round_up(end, BLOCK) // BLOCK)

    def hold_zeroes(self, start: int, end: int) -> None:
        """Take whole blocks that the overlay has not into it, as zeroes; `end` as in `clear`. Writes nothing where the
        data file has a hole."""
        for low, high in list(system.data_extents(self._data, start, end)):
            system.write_zeroes("overlay:clear", self._data, low, high - low)
        self._blocks.add(start // BLOCK, round_up(end, BLOCK) // BLOCK)

    def resize(self, size: int) -> None:
        """Give the disk another size; what is cut off is gone, what is added is zeroes."""
        self.size = size
        self.visible = min(self.visible, size)
        self._write_header()
        system.truncate("overlay:truncate", self._data, size)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, end) of what is not a hole among blocks that the overlay has."""
        return system.data_extents(self._data, start, end)

    def flush(self, *, behind: bool = False) -> None:
        """Make everything durable that was written before. A failed sync is final: every later flush fails as well.
        `behind`: it is not the first thread that asks; that one does not wait for the syncs unless it flushes itself.
        Raises OSError."""
        with self._flushing:
            if self._failure is not None:
                raise OSError(self._failure.errno, f"{self._paths[0]}: an earlier sync failed")
            with self._turn(behind):
                pages = self._blocks.changed()
            self._sync("overlay:data-sync", self._data)
            with self._turn(behind):
                self._blocks.save(pages, self._map, _MAP_START)
                self._put_header()
            self._sync("overlay:header-sync", self._map)

    def _turn(self, behind: bool) -> AbstractContextManager[None]:
        return self.turns.behind() if behind else self.turns

    def _sync(self, label: str, fd: int) -> None:
        try:
            system.fdatasync(label, fd)
        except OSError as error:
            self._failure = error
            raise

    def close(self) -> None:
        """Let the files go as they are; `flush` comes first if the overlay is to be kept."""
        for fd in (self._data, self._map):
            if fd >= 0:
                os.close(fd)
        self._data = self._map = -1

    def drop(self) -> None:
        """Close, and remove the files."""
        self.close()
        for path in reversed(self._paths):
            system.unlink("overlay:drop", path, missing_ok=True)


def drop_overlays(directory: str) -> None:
    """Remove a directory of overlays. Raises HvfuseError when there is anything else in it."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    strangers = [name for name in names if not name.endswith((".data", ".blocks"))]
    if strangers:
        raise HvfuseError(f"{directory}: holds more than overlays ({strangers[0]}), not removed")
    for name in sorted(names, key=lambda name: name.endswith(".data")):
        system.unlink("overlay:drop", os.path.join(directory, name), missing_ok=True)
    os.rmdir(directory)
