"""Stored cycles as a whole: entering a frame, dropping frames with all that hangs on them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from hvfuse.frames import FrameHeader
from hvfuse.target import schema
from hvfuse.target.environment import Environment, Txn
from hvfuse.target.index import Entered, scan
from hvfuse.target.schema import Placement, PointRecord, VmRecord

_BATCH = 1024
"""Frames looked at before they are deleted: bounds memory, whatever the size of a cycle."""


def placements(
    txn: Txn, env: Environment, vm: VmRecord, *, first: int, last: int
) -> Iterator[tuple[int, int, Placement]]:
    """(seq, number, placement) of the frames of the cycles first <= seq <= last, in that order."""
    start, stop = schema.point_key(vm.id, first), schema.point_key(vm.id, last + 1)
    for key, value in scan(txn, env, schema.PLACEMENTS, start, stop):
        seq, number = schema.seq_and_number(key)
        yield seq, number, Placement.unpack(value)


def data_ends(txn: Txn, env: Environment, vm: VmRecord, *, seq: int) -> dict[int, int]:
    """By disk number, the first byte after what the frames of a cycle have of DATA; disks without any are not
    told. Looks at all of the cycle's placements."""
    ends: dict[int, int] = {}
    for _, _, placed in placements(txn, env, vm, first=seq, last=seq):
        ends[placed.disk] = max(ends.get(placed.disk, 0), placed.data_end)
    return ends


def store_frame(
    txn: Txn, env: Environment, vm: VmRecord, *, seq: int, disk: int, header: FrameHeader, raw: bytes, entered: Entered
) -> None:
    """Put a frame, its placement and its index entries. `raw`: the frame as it came."""
    number = header.number
    key = schema.frame_key(vm.id, seq, number)
    placement = entered.placement(header, disk=disk, stored_length=len(raw))
    txn.put(key, raw, db=env.db(schema.FRAMES))
    txn.put(key, placement.pack(), db=env.db(schema.PLACEMENTS))
    with txn.cursor(db=env.db(schema.INDEX)) as cursor:
        cursor.putmulti(region_items(vm, seq=seq, disk=disk, number=number, entered=entered))
    if entered.wide is not None:
        index_key = schema.wide_key(vm.id, disk, seq, number)
        txn.put(index_key, schema.pack_entries(entered.wide), db=env.db(schema.WIDE))


def region_items(vm: VmRecord, *, seq: int, disk: int, number: int, entered: Entered) -> Iterator[tuple[bytes, bytes]]:
    """Key and value of everything that the index has of a frame in single regions; keys ascend."""
    keys = schema.index_keys(vm.id, disk, entered.regions, seq, number)
    return zip(keys, schema.pack_each(entered.entries, entered.bounds), strict=True)


def index_items(
    vm: VmRecord, *, seq: int, disk: int, number: int, entered: Entered
) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Database, key and value of everything that the index has of a frame."""
    for key, value in region_items(vm, seq=seq, disk=disk, number=number, entered=entered):
        yield schema.INDEX, key, value
    if entered.wide is not None:
        yield schema.WIDE, schema.wide_key(vm.id, disk, seq, number), schema.pack_entries(entered.wide)


def drop_frames(txn: Txn, env: Environment, vm: VmRecord, *, first: int, last: int) -> None:
    """Delete the frames of the cycles first <= seq <= last, their placements and index entries."""
    while batch := list(islice(placements(txn, env, vm, first=first, last=last), _BATCH)):
        for seq, number, placement in batch:
            _drop_frame(txn, env, vm, schema.frame_key(vm.id, seq, number), placement)


def _drop_frame(txn: Txn, env: Environment, vm: VmRecord, key: bytes, placement: Placement) -> None:
    seq, number = schema.seq_and_number(key)
    txn.delete(key, db=env.db(schema.FRAMES))
    txn.delete(key, db=env.db(schema.PLACEMENTS))
    for region in placement.regions:
        txn.delete(schema.index_key(vm.id, placement.disk, region, seq, number), db=env.db(schema.INDEX))
    if placement.wide:
        txn.delete(schema.wide_key(vm.id, placement.disk, seq, number), db=env.db(schema.WIDE))


def drop_records(txn: Txn, env: Environment, vm: VmRecord, *, before: int) -> None:
    """Delete the records of the cycles seq < before, and their names."""
    start, stop = schema.point_key(vm.id, 0), schema.point_key(vm.id, before)
    points, ids = env.db(schema.POINTS), env.db(schema.POINT_IDS)
    for key, value in list(scan(txn, env, schema.POINTS, start, stop)):
        record = PointRecord.unpack(value, int.from_bytes(key[-8:], "big"))
        if record.is_point:
            txn.delete(schema.point_id_key(vm.id, record.id), db=ids)
        txn.delete(key, db=points)


def drop_held(txn: Txn, env: Environment, vm: VmRecord) -> None:
    """Forget which frames of a direct copy are in the images."""
    held = env.db(schema.HELD)
    for number in list(held_numbers(txn, env, vm)):
        txn.delete(schema.held_key(vm.id, number), db=held)


def held_numbers(txn: Txn, env: Environment, vm: VmRecord) -> Iterator[int]:
    """The frames of a direct copy that are durably in the images."""
    for key, _ in scan(txn, env, schema.HELD, schema.u32(vm.id), schema.u32(vm.id + 1)):
        yield int.from_bytes(key[-4:], "big")
