"""The extent index: where a frame is entered in it, and what a region of a disk consists of. Pure but
for reading through the transaction that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvfuse.extent import newest_wins
from hvfuse.frames import Fill, Frame, FrameHeader
from hvfuse.target import schema
from hvfuse.target.environment import Environment, Txn
from hvfuse.target.schema import ENTRY_DTYPE, REGION, WIDE_SPAN, Entries, Placement

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Entered:
    """How a frame is entered: `entries`, in ascending order, of which region `regions[i]` has those from `bounds[i]` to
    `bounds[i + 1]`; and those for `wide`, None if there are none. A frame of small writes to a large disk may have as
    many regions as entries."""

    regions: Numbers
    bounds: Numbers
    entries: Entries
    wide: Entries | None
    data_end: int

    def placement(self, header: FrameHeader, *, disk: int, stored_length: int) -> Placement:
        """The placement of the frame with that header, on the disk with that number."""
        return Placement(
            disk=disk,
            regions=tuple(self.regions.tolist()),
            wide=self.wide is not None,
            stored_length=stored_length,
            data_end=self.data_end,
            digest=header.digest,
        )


def enter(frame: Frame) -> Entered:
    """Sort a frame's extents into regions. Their ends must be below 2**58."""
    table = frame.table
    entries = np.empty(len(table), ENTRY_DTYPE)
    for field in ("offset", "length", "kind"):
        entries[field] = table[field]
    entries["position"] = frame.positions()
    ends = table["offset"] + table["length"]
    first = (table["offset"] // REGION).astype(np.int64)
    span = ((ends - 1) // REGION).astype(np.int64) - first + 1
    is_wide = span > WIDE_SPAN
    data = table["kind"] == Fill.DATA
    return Entered(
        *_by_region(entries[~is_wide], first[~is_wide], span[~is_wide]),
        entries[is_wide] if is_wide.any() else None,
        int(ends[data].max()) if data.any() else 0,
    )


def _by_region(entries: Entries, first: Numbers, span: Numbers) -> tuple[Numbers, Numbers, Entries]:
    """The first three fields of `Entered`; entry i belongs to the `span[i]` regions from `first[i]` on."""
    which = np.repeat(np.arange(len(entries)), span)
    within = np.arange(len(which)) - np.repeat(np.cumsum(span) - span, span)
    regions = first[which] + within  # ascends, because extents do and are disjoint
    starts = np.flatnonzero(np.diff(regions, prepend=-1))
    return regions[starts], np.append(starts, len(which)), entries[which]


@dataclass(frozen=True, slots=True)
class Layer:
    """Entries with the cycle and frame that each is from; all arrays of shape (n,)."""

    entries: Entries
    seqs: Numbers
    numbers: Numbers

    def select(self, which: NDArray[np.bool_]) -> Layer:
        """Those entries for which `which`, shape (n,), is true."""
        return Layer(self.entries[which], self.seqs[which], self.numbers[which])


EMPTY = Layer(np.empty(0, ENTRY_DTYPE), np.empty(0, np.int64), np.empty(0, np.int64))


def read_wide(txn: Txn, env: Environment, *, vm: int, disk: int, after: int, upto: int) -> Layer:
    """The disk's wide entries of the cycles after < seq <= upto."""
    return _read_layer(txn, env, schema.WIDE, schema.wide_key(vm, disk, after + 1), schema.wide_key(vm, disk, upto + 1))


def read_region(txn: Txn, env: Environment, *, vm: int, disk: int, region: int, after: int, upto: int) -> Layer:
    """The region's own entries of the cycles after < seq <= upto."""
    return _read_layer(
        txn,
        env,
        schema.INDEX,
        schema.index_key(vm, disk, region, after + 1),
        schema.index_key(vm, disk, region, upto + 1),
    )


def occupied_regions(txn: Txn, env: Environment, *, vm: int, disk: int, low: int, high: int, upto: int) -> list[int]:
    """The regions low <= region < high that have entries of their own of cycles seq <= upto, ascending. Takes a
    look-up for each of them, however many entries they have."""
    found = []
    with txn.cursor(db=env.db(schema.INDEX)) as cursor:
        region = low
        while region < high and cursor.set_range(schema.index_key(vm, disk, region, 0)):
            its_vm, its_disk, its_region, seq, _ = schema.unpack_index_key(cursor.key())
            if (its_vm, its_disk) != (vm, disk) or its_region >= high:
                break
            if seq <= upto:  # those of one region are in the order of their cycles
                found.append(its_region)
            region = its_region + 1
    return found


def _read_layer(txn: Txn, env: Environment, database: bytes, start: bytes, stop: bytes) -> Layer:
    values, seqs, numbers, counts = [], [], [], []
    for key, value in scan(txn, env, database, start, stop):
        seq, number = schema.seq_and_number(key)
        body = schema.unpack_entries(value, "an entry of the extent index")
        values.append(body)
        seqs.append(seq)
        numbers.append(number)
        counts.append(len(body) // ENTRY_DTYPE.itemsize)
    return Layer(
        np.frombuffer(b"".join(values), ENTRY_DTYPE),
        np.repeat(np.array(seqs, np.int64), counts),
        np.repeat(np.array(numbers, np.int64), counts),
    )


def scan(txn: Txn, env: Environment, database: bytes, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values with start <= key < stop, in order."""
    with txn.cursor(db=env.db(database)) as cursor:
        if not cursor.set_range(start):
            return
        for key, value in cursor.iternext():
            if key >= stop:
                return
            yield key, value


@dataclass(frozen=True, slots=True)
class RegionMap:
    """What the journal says of a range: disjoint pieces in ascending order.

    Arrays of shape (n,): piece i, the bytes `starts[i] <= b < ends[i]`, is filled as `kinds[i]` says;
    DATA begins at `positions[i]` in the data of frame `numbers[i]` of cycle `seqs[i]`.
    """

    starts: Numbers
    ends: Numbers
    kinds: Numbers
    seqs: Numbers
    numbers: Numbers
    positions: Numbers

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take."""
        return 6 * self.starts.nbytes

    def __len__(self) -> int:
        return len(self.starts)


def resolve(region: Layer, wide: Layer, *, start: int, end: int) -> RegionMap:
    """The newest state of the bytes [start, end): later cycles win, within one cycle later frames."""
    reaches = (wide.entries["offset"] < end) & (wide.entries["offset"] + wide.entries["length"] > start)
    wide = wide.select(reaches)
    entries = np.concatenate([wide.entries, region.entries])
    seqs = np.concatenate([wide.seqs, region.seqs])
    numbers = np.concatenate([wide.numbers, region.numbers])
    if len(wide.entries):
        order = np.lexsort((numbers, seqs))
        entries, seqs, numbers = entries[order], seqs[order], numbers[order]
    offsets = entries["offset"].astype(np.int64)
    ends = offsets + entries["length"].astype(np.int64)
    newest = newest_wins(np.maximum(offsets, start), np.minimum(ends, end))
    own = newest.owners
    positions = entries["position"].astype(np.int64)[own] + newest.starts - offsets[own]
    kinds = entries["kind"].astype(np.int64)[own]
    return RegionMap(newest.starts, newest.ends, kinds, seqs[own], numbers[own], positions)
