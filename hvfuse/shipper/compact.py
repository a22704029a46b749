"""Compaction: the logs of an outage, made into one cycle when they take up too much room.

While the target is away, sealed cycles pile up beside the disks. Once they hold more than the soft limit,
whole cycles a to b are replaced by one that continues what a continued and ends where b ended, newest
write wins. The points between are given up; what b's point holds is kept exactly.

    1. For each disk, write the compacted log beside the log of cycle b. Sync files and directory.
    2. For each disk, replace b's companion by that of the compacted log, durably.
    3. Release the cycles a to b-1, and b's own logs.

A death in 1 leaves rubbish, one in 2 a cycle b in which some disks' logs go back further than others', one
in 3 some cycles that are superseded. The spool can be shipped from at every instant (`hvfuse.spool`), and
the next compaction takes up what it finds. Only the shipper compacts and ships, one at a time; the
tracker meanwhile adds younger cycles, or gives all up, which is noticed before a companion is replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import xxhash

from hvfuse import spool, system
from hvfuse.errors import CorruptError, HvfuseError, NoSpaceError
from hvfuse.formats.companion import COMPACTED, CompanionHeader, Entries
from hvfuse.formats.hrl_writer import LogWriter
from hvfuse.frames import Fill
from hvfuse.shipper.coalesce import DiskPlan, close_logs, logs_by_disk, open_logs, plan
from hvfuse.shipper.cycle import check_chain
from hvfuse.spool import SealedCycle, SealedLog
from hvfuse.words import bytes_text

WORTHWHILE = 0.75
"""A compaction that would leave more than this part of the payload is not made: it would cost recovery
points and a lot of writing for little room."""
GROWTH = 0.1
"""Part by which logs have to grow before it is looked again whether compacting them is of any use."""
HEADROOM = 16 << 20
"""Bytes that have to be free beyond what the compacted logs take: the guest's own writes need some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """Cycles `first` to `last` became one. Bytes of payload before and after."""

    generation: bytes
    first: int
    last: int
    bytes_before: int
    bytes_after: int

    @property
    def text(self) -> str:
        """In words for an administrator."""
        return (
            f"cycles {self.first} to {self.last} were compacted, {bytes_text(self.bytes_before)} of logs to "
            f"{bytes_text(self.bytes_after)}: the recovery points before the last of them are given up"
        )


@dataclass(frozen=True, slots=True)
class _Compacted:
    """A compacted log that is written and durable. `old`: the log that it takes the place of."""

    old: SealedLog
    header: CompanionHeader
    entries: Entries


class Compactor:
    """Compacts one VM's logs when they hold too much. `between` is called now and then and may raise to end it."""

    def __init__(self, *, between: Callable[[], None] = lambda: None) -> None:
        self._between = between
        self._futile = 0  # what the logs held when a compaction was last of no use

    def relieve(self, cycles: Sequence[SealedCycle], *, soft_limit: float) -> Compaction | None:
        """Compact the newest generation's whole cycles if they hold too much, and if that is worth while.

        `cycles`: all that are sealed, oldest first. `soft_limit`: a fraction of the disks' size. Raises DamagedLogError
        naming the log, NoSpaceError, HvfuseError, OSError: shipping goes on then as if nothing had happened. What was
        of no use is tried again once the logs have grown by a part `GROWTH`.
        """
        run = _compactable(_drop_superseded(cycles))
        stored = _stored(run)
        if stored < self._futile:
            self._futile = 0
        limit = soft_limit * sum(log.header.end_size for log in run[-1].logs) if run else 0
        if len(run) < 2 or stored <= max(limit, self._futile * (1 + GROWTH)):
            return None
        self._futile = stored
        done = _compact(run, self._between)
        if done is not None:
            self._futile = 0
        return done


def _compact(run: Sequence[SealedCycle], between: Callable[[], None]) -> Compaction | None:
    """Make one of several cycles; None if that would not be worth while."""
    # An interrupted compaction may have come as far as some of the disks.
    done = [log.header for log in run[-1].logs if log.header.is_compacted]
    if any(header.first_cycle > run[0].first_cycle for header in done):
        return None
    check_chain(run)
    plans = [plan(logs) for logs in logs_by_disk(run)]
    left = sum(planned.coalesced_bytes for planned in plans)
    if left > WORTHWHILE * _stored(run):
        return None
    to_do = [planned for planned in plans if not planned.logs[-1].header.is_compacted]
    _require_room(run[-1].logs[0].folder, sum(planned.coalesced_bytes for planned in to_do))
    _replace(to_do, between)
    spool.release(run[:-1])
    for log in run[-1].logs:
        spool.discard_log(log.folder, log.disk, os.path.join(log.folder, spool.log_name(log.disk, log.serial)))
    return Compaction(
        generation=run[-1].generation,
        first=run[0].first_cycle,
        last=run[-1].cycle,
        bytes_before=_stored(run),
        bytes_after=left,
    )


def _stored(cycles: Iterable[SealedCycle]) -> int:
    return sum(cycle.stored_bytes for cycle in cycles)


def _compactable(cycles: Sequence[SealedCycle]) -> list[SealedCycle]:
    """The whole cycles of the newest generation that follow each other without a gap, up to the newest."""
    found: list[SealedCycle] = []
    for cycle in cycles:
        if cycle.is_whole and cycle.generation == cycles[-1].generation:
            if found and cycle.first_cycle > found[-1].cycle + 1:
                found.clear()
            found.append(cycle)
    return found


def _drop_superseded(cycles: Sequence[SealedCycle]) -> list[SealedCycle]:
    """Finish what an interrupted compaction left: release the cycles that a later, whole one stands for."""
    compacted = [cycle for cycle in cycles if cycle.is_whole and cycle.first_cycle < cycle.cycle]
    superseded = [
        old
        for old in cycles
        for new in compacted
        if new.generation == old.generation and new.first_cycle <= old.first_cycle and old.cycle < new.cycle
    ]
    spool.release(superseded)
    return [cycle for cycle in cycles if cycle not in superseded]


def _require_room(folder: str, needed: int) -> None:
    """Raises NoSpaceError: running into the full disk would take the room from the guest's own writes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if free < needed + HEADROOM:
        raise NoSpaceError(
            f"{folder}: {bytes_text(free)} free, compacting the logs takes {bytes_text(needed + HEADROOM)}"
        )


def _replace(plans: Sequence[DiskPlan], between: Callable[[], None]) -> None:
    """Steps 1 and 2. What has not replaced a companion is removed again if something goes wrong."""
    written: list[_Compacted] = []
    try:
        for planned in plans:
            written.append(_write(planned, between))
        system.fsync_directory("compact:directory", plans[0].logs[-1].folder)
        for compacted in written:
            _swap(compacted)
    except BaseException:
        for planned in plans:
            _discard_unless_swapped(planned.logs[-1])
        raise


def _write(planned: DiskPlan, between: Callable[[], None]) -> _Compacted:
    """Write one disk's compacted log, durably."""
    first, last = planned.logs[0].header, planned.logs[-1].header
    path = _new_path(planned.logs[-1])
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        writer = LogWriter(
            fd,
            unique_id=last.unique_id,
            previous_unique_id=first.previous_unique_id,
            opened_ns=first.opened_ns,
            written_ns=last.sealed_ns,
        )
        _fill(writer, planned, between)
        entries = writer.close(next_seq=last.first_seq + last.entry_count)
    finally:
        os.close(fd)
    header = replace(
        last,
        entry_count=len(entries),
        previous_unique_id=first.previous_unique_id,
        first_seq=max(0, last.first_seq + last.entry_count - len(entries)),
        previous_digest=first.previous_digest,
        previous_size=first.previous_size,
        start_size=first.start_size,
        eol=writer.end,
        opened_ns=first.opened_ns,
        flags=last.flags | COMPACTED,
        stored_bytes=writer.stored_bytes,
        entries_digest=xxhash.xxh3_128_digest(entries.tobytes()),
        earlier_cycles=last.cycle - first.first_cycle,
        carried_digest=last.digest(),
    )
    return _Compacted(planned.logs[-1], header, entries)


def _fill(writer: LogWriter, planned: DiskPlan, between: Callable[[], None]) -> None:
    files = open_logs(planned)
    try:
        for frame in range(planned.frame_count):
            content = planned.content(frame, files)
            data = iter(content.data)
            for offset, length, kind in content.table.tolist():
                if kind == Fill.DATA:
                    writer.write(offset, next(data))
                else:
                    writer.zero(offset, length)
            between()
    finally:
        close_logs(files)


def _swap(compacted: _Compacted) -> None:
    """Let the compacted log be the one that counts. Raises CorruptError if the tracker gave up the old one."""
    old = compacted.old
    if _companion_of(old) != old.header:
        raise CorruptError(f"{old.companion_path}: was given up while the logs were being compacted")
    system.replace_file("compact:companion", old.companion_path, compacted.header.pack() + compacted.entries.tobytes())


def _discard_unless_swapped(log: SealedLog) -> None:
    companion = _companion_of(log)
    if companion is None or not companion.is_compacted:
        system.unlink("compact:discard", _new_path(log), missing_ok=True)


def _companion_of(log: SealedLog) -> CompanionHeader | None:
    """What stands in the spool at the moment; None if nothing that can be read."""
    try:
        header, _ = spool.read_companion(log.companion_path)
    except (FileNotFoundError, HvfuseError):
        return None
    return header


def _new_path(log: SealedLog) -> str:
    return os.path.join(log.folder, spool.compacted_name(log.disk, log.serial))
