"""From the sealed logs of one disk to the contents of frames: the newest write of each byte, once.

Planning looks at companions alone and cuts the outcome into frames, so the frames' numbers are the
same whenever and wherever they are planned, and a cycle that was interrupted goes on by skipping the
numbers that the replica holds without reading or compressing them again. Contents are read from the
logs frame by frame; every payload of which a byte is used is checked whole against its digest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from hvfuse import system
from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.extent import newest_wins
from hvfuse.formats.companion import Entries, Kind
from hvfuse.frames import EXTENT_DTYPE, MAX_OFFSET
from hvfuse.shipper.content import NOWHERE, Content, Int64s, Pieces, compose, join, split, starts_within
from hvfuse.spool import SealedCycle, SealedLog

FRAME_PLAIN = 1 << 20
"""Bytes of table and data that a frame is planned for; it may have up to twice as many. Part of the
frames' numbering: to change it is to make interrupted cycles unable to resume."""
READ_SPAN = 4 << 20
"""Bytes of log read at once, plus at most one payload."""
READ_GAP = 32 << 10
"""Bytes of log between two wanted payloads that are rather read than skipped."""

RANGE_DTYPE = np.dtype(
    [("start", "<i8"), ("end", "<i8"), ("log", "<i8"), ("location", "<i8"), ("size", "<i8"), ("xxh3", "<u8")]
)
Ranges = NDArray[np.void]
"""Shape (n,), dtype `RANGE_DTYPE`, oldest first: what was written to [start, end) of the disk. The
payload of `size` bytes lies at `location` of log number `log`; `NOWHERE` for zeroes."""

PICK_DTYPE = np.dtype(
    [(name, "<u8" if name == "xxh3" else "<i8")
     for name in ("log", "location", "size", "xxh3", "skip", "length", "place")]
)  # fmt: skip
Picks = NDArray[np.void]
"""Shape (n,), dtype `PICK_DTYPE`: of the payload of `size` bytes at `location` of log number `log`,
the `length` bytes from `skip` on go to `place` in the frame's data."""


class DamagedLogError(CorruptError):
    """A sealed log is missing or cannot be read back as it was written: only a new copy helps."""


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What one disk's logs come to. Frame k of the disk holds pieces bounds[k] to bounds[k + 1].

    `pieces.origins` index `ranges`. `log_bytes`: payload in the logs. `coalesced_bytes`: what is left
    of it where newer writes, zeroes and trims took the place of older ones.
    """

    logs: tuple[SealedLog, ...]
    ranges: Ranges
    pieces: Pieces
    bounds: Int64s
    log_bytes: int
    coalesced_bytes: int

    @property
    def frame_count(self) -> int:
        """Frames that the disk takes in this cycle."""
        return len(self.bounds) - 1

    def content(self, frame: int, files: Sequence[int]) -> Content:
        """Read, verify and compose one frame. `files`: descriptors of `logs`, in their order.

        Raises DamagedLogError naming log and offset. Holds at most a few MiB, whatever is in the log.
        """
        pieces = self.pieces[slice(int(self.bounds[frame]), int(self.bounds[frame + 1]))]
        data = bytearray(int(pieces.data_lengths().sum()))
        view = memoryview(data)
        picks = self._picks(pieces)
        rows = list(zip(*(picks[field].tolist() for field in PICK_DTYPE.names or ()), strict=True))
        for first, last, begin, end in _runs(picks):
            log, _, size, xxh3, _, length, place = rows[first]
            if length == end - begin:  # one payload, all of it: no need to copy it
                payload = view[place : place + length]
                self._check(log, begin, xxh3, payload[: self._read(log, files[log], begin, payload)], size)
                continue
            raw = memoryview(bytearray(end - begin))
            raw = raw[: self._read(log, files[log], begin, raw)]
            checked = -1
            for _, location, size, xxh3, skip, length, place in rows[first:last]:
                at = location - begin
                if location != checked:
                    self._check(log, location, xxh3, raw[at : at + size], size)
                    checked = location
                view[place : place + length] = raw[at + skip : at + skip + length]
        return compose(pieces, data)

    def _read(self, log: int, file: int, begin: int, buffer: memoryview) -> int:
        """Returns the bytes read, fewer only at the log's end."""
        try:
            return system.pread_into(file, buffer, begin)
        except OSError as error:
            path = self.logs[log].log_path
            raise DamagedLogError(f"{path}: cannot be read at {begin}: {error.strerror}") from error

    def _check(self, log: int, location: int, xxh3: int, payload: memoryview, size: int) -> None:
        if len(payload) != size or xxhash.xxh3_64_intdigest(payload) != xxh3:
            path = self.logs[log].log_path
            raise DamagedLogError(f"{path}: payload at {location} does not match its checksum")

    def _picks(self, pieces: Pieces) -> Picks:
        """What to read for `pieces`, in the order of the logs."""
        lengths = pieces.data_lengths()
        wanted = np.flatnonzero(~pieces.holes)
        owners = self.ranges[pieces.origins[wanted]]
        picks = np.empty(len(wanted), PICK_DTYPE)
        for field in ("log", "location", "size", "xxh3"):
            picks[field] = owners[field]
        picks["skip"] = pieces.starts[wanted] - owners["start"]
        picks["length"] = lengths[wanted]
        picks["place"] = starts_within(lengths)[wanted]
        return np.take(picks, np.lexsort((picks["location"], picks["log"])))


def _runs(picks: Picks) -> Iterator[tuple[int, int, int, int]]:
    """Cut picks, in the order of the logs, into runs that are each worth one read: the indexes
    [first, last) of its picks, and the bytes [begin, end) of the log.

    Picks of one payload stay together, so that it is checked once.
    """
    if not len(picks):
        return iter(())
    log, location, end = picks["log"], picks["location"], picks["location"] + picks["size"]
    far = location[1:] - end[:-1] > READ_GAP
    enough = location[1:] // READ_SPAN != location[:-1] // READ_SPAN
    apart = (log[1:] != log[:-1]) | ((location[1:] != location[:-1]) & (far | enough))
    first = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(apart) + 1])
    last = np.append(first[1:], len(picks))
    ends = np.maximum.reduceat(end, first)
    return zip(first.tolist(), last.tolist(), location[first].tolist(), ends.tolist(), strict=True)


def logs_by_disk(cycles: Sequence[SealedCycle]) -> list[list[SealedLog]]:
    """The logs of consecutive cycles disk by disk, each disk's oldest first; disks in the last cycle's order.

    Disks are told apart by their ids: their place in a cycle says nothing. Raises DamagedLogError naming a log
    of the last cycle whose disk has none in an earlier one.
    """
    by_id = [{log.header.disk_id: log for log in cycle.logs} for cycle in cycles]
    for disk_id, log in by_id[-1].items():
        if any(disk_id not in logs for logs in by_id):
            raise DamagedLogError(f"{log.companion_path}: an earlier cycle has no log of the disk")
    return [[logs[disk_id] for logs in by_id] for disk_id in by_id[-1]]


def plan(logs: Sequence[SealedLog]) -> DiskPlan:
    """Plan the frames of one disk from its consecutive sealed logs, oldest first; at least one.

    Raises DamagedLogError naming the companion (also of a log that is another disk's), UnsupportedError for
    an entry of unknown kind.
    """
    for log in logs:
        if log.header.disk_id != logs[0].header.disk_id:
            raise DamagedLogError(f"{log.companion_path}: is not of the same disk as {logs[0].companion_path}")
    ranges = np.concatenate([_ranges(log, index) for index, log in enumerate(logs)])
    resolved = newest_wins(np.ascontiguousarray(ranges["start"]), np.ascontiguousarray(ranges["end"]))
    origins = np.where(ranges["location"][resolved.owners] == NOWHERE, NOWHERE, resolved.owners)
    newest = Pieces(resolved.starts, resolved.ends, origins)
    pieces = split(join(newest, newest.holes[1:] & newest.holes[:-1]), FRAME_PLAIN)
    written = ranges["location"] != NOWHERE
    return DiskPlan(
        logs=tuple(logs),
        ranges=ranges,
        pieces=pieces,
        bounds=_frame_bounds(pieces),
        log_bytes=int(ranges["size"][written].sum()),
        coalesced_bytes=int(pieces.data_lengths().sum()),
    )


def _ranges(log: SealedLog, index: int) -> Ranges:
    """A log's writes, zeroes and trims; first of all, what an explicit shrink before it cut off.

    Those bytes become zeroes, the oldest of the cycle: should the disk grow again, a reader that goes
    from newer cycles to older ones stops here and does not see them a second time. What was logged for
    beyond the disk's end never came to be: the write failed for want of space.
    """
    entries = _changes(log)
    header = log.header
    cut_off = int(header.start_size < header.previous_size)
    ranges = np.empty(cut_off + len(entries), RANGE_DTYPE)
    ranges["log"] = index
    if cut_off:
        ranges[0] = (header.start_size, header.previous_size, index, NOWHERE, 0, 0)
    changes = ranges[cut_off:]
    changes["start"] = entries["offset"]
    changes["size"] = entries["length"]
    written = entries["kind"] == Kind.WRITE
    end = changes["start"] + changes["size"]
    changes["end"] = np.where(written, np.minimum(end, header.end_size), end)
    changes["location"] = np.where(written, entries["location"].astype(np.int64), NOWHERE)
    changes["xxh3"] = entries["xxh3"]
    return ranges


def _changes(log: SealedLog) -> Entries:
    """The entries that change the disk, verified to lie within bounds."""
    try:
        entries = log.entries()
    except FileNotFoundError:
        raise DamagedLogError(f"{log.companion_path}: missing") from None
    except CorruptError as error:
        raise DamagedLogError(str(error)) from None
    kind = entries["kind"]
    if not np.isin(kind, list(Kind)).all():
        raise UnsupportedError(f"{log.companion_path}: an entry of unknown kind")
    beyond = (entries["location"] > log.header.eol) | (entries["location"] + entries["length"] > log.header.eol)
    if (beyond & (kind == Kind.WRITE)).any() or (entries["offset"] > MAX_OFFSET).any():
        raise DamagedLogError(f"{log.companion_path}: an entry points outside the log or the disk")
    changes: Entries = entries[kind != Kind.FLUSH]
    return changes


def _frame_bounds(pieces: Pieces) -> Int64s:
    """Cut pieces (none with more than FRAME_PLAIN of data) into frames; shape (frames + 1,)."""
    if not len(pieces):
        return np.zeros(1, np.int64)
    frame = starts_within(pieces.data_lengths() + EXTENT_DTYPE.itemsize) // FRAME_PLAIN
    edges = np.flatnonzero(frame[1:] != frame[:-1]) + 1
    return np.concatenate([np.zeros(1, np.int64), edges, np.array([len(pieces)], np.int64)])


def open_logs(plan: DiskPlan) -> list[int]:
    """Descriptors of a plan's logs, in their order. Raises DamagedLogError when one is missing."""
    files: list[int] = []
    try:
        for log in plan.logs:
            files.append(os.open(log.log_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except FileNotFoundError:
        close_logs(files)
        raise DamagedLogError(f"{log.log_path}: missing") from None
    return files


def close_logs(files: Sequence[int]) -> None:
    """Close what `open_logs` opened."""
    for file in files:
        os.close(file)
