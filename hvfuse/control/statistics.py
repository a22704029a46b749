"""What replication did and took: a record of every cycle, and sums over stretches of time.

    "cycle/NAME/" + u64 BE     the fields of `CycleRecord`; numbered upwards, the oldest beyond CYCLES_KEPT go
    "sums/NAME/" + u64 BE      the fields of `Sums` but the beginning, which is the number: seconds since 1970, a
                               multiple of STRETCH; those older than KEPT_SECONDS go

Cycles are records of their own as long as somebody may want to see them one by one; sums are what `hvfuse measure`
and the health rules look back on, over an hour or over a week. Arithmetic is pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from hvfuse.control.database import Database, Transaction, numbered

CYCLES_KEPT = 2880
"""A day's cycles at one every 30 seconds."""
STRETCH = 300
"""Seconds that one record of sums is about."""
KEPT_SECONDS = 8 * 86400
"""More than the longest interval over which anybody looks back."""
_CYCLES, _SUMS = b"cycle/", b"sums/"
_MAXIMA = ("max_size", "max_latency", "max_frozen_seconds")


class Failure(StrEnum):
    """What a cycle failed for, as Measure-VMReplication tells failures apart."""

    NETWORK = "network"
    """The other side, or a process on the way to it, did not answer."""
    REPLICATION = "replication"
    """Anything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleRecord:
    """One cycle that was committed. `bytes_logged`: payload the guest wrote; `bytes_coalesced`: what of it was the
    newest; `bytes_zero`: what of that travelled as zeroes; `bytes_sent`: as it travelled. `time_ns`: the barrier's
    instant; `latency`: seconds from there until the target had it. `seconds`: that shipping took. `consistency`: of the
    point. `frozen_seconds`: for which the guest stood still for it; `freeze_error`: why the point is crash-consistent
    although it was to be more, None if that is not so. `is_late`: it came behind with others, for an interval
    that counts as missed, or in which none was due."""

    cycle: int
    point: str | None
    time_ns: int
    bytes_logged: int
    bytes_coalesced: int
    bytes_sent: int
    seconds: float
    bytes_zero: int = 0
    latency: float = 0.0
    consistency: str = "crash-consistent"
    frozen_seconds: float = 0.0
    freeze_error: str | None = None
    is_late: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What happened in a stretch of time that begins at `begin`, seconds since 1970.

    `late`: of the successful cycles, those that came behind with others, and so are no more cycles that were due.
    `size`, `max_size`: bytes sent. `latency`: seconds, summed over the successful cycles. `app_consistent`: points,
    `app_failures`: failed attempts at one. `frozen_seconds`: for which the guest stood still, summed.
    """

    begin: int
    successful: int = 0
    missed: int = 0
    network_failures: int = 0
    replication_failures: int = 0
    app_consistent: int = 0
    app_failures: int = 0
    size: int = 0
    max_size: int = 0
    latency: float = 0.0
    max_latency: float = 0.0
    frozen_seconds: float = 0.0
    max_frozen_seconds: float = 0.0
    bytes_logged: int = 0
    bytes_coalesced: int = 0
    bytes_zero: int = 0
    late: int = 0

    def plus(self, other: Sums) -> Sums:
        """Both stretches as one."""
        values: dict[str, Any] = {}
        for one in dataclasses.fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            values[one.name] = max(mine, theirs) if one.name in _MAXIMA else mine + theirs
        return Sums(**{**values, "begin": min(self.begin, other.begin)})

    @property
    def due(self) -> int:
        """Cycles that were due, or were asked for: made in time, or missed."""
        return self.successful - self.late + self.missed

    @property
    def missed_part(self) -> float:
        """Of the cycles that were due, 0 to 1."""
        return self.missed / self.due if self.due else 0.0

    @property
    def mean_size(self) -> float:
        """Bytes sent by a cycle."""
        return self.size / self.successful if self.successful else 0.0

    @property
    def mean_latency(self) -> float:
        """Seconds."""
        return self.latency / self.successful if self.successful else 0.0

    @property
    def mean_frozen_seconds(self) -> float:
        """For which the guest stood still for an app-consistent point."""
        return self.frozen_seconds / self.app_consistent if self.app_consistent else 0.0

    @property
    def saved_by_overwriting(self) -> int:
        """Bytes that did not travel because they were overwritten within a cycle."""
        return self.bytes_logged - self.bytes_coalesced

    @property
    def saved_by_compression(self) -> int:
        """Bytes that did not travel because what travelled was compressed."""
        return max(0, self.bytes_coalesced - self.bytes_zero - self.size)


def sums_of(cycle: CycleRecord, *, now_ns: int) -> Sums:
    """One cycle, in the stretch of that instant. Its misses are told when they happen."""
    is_consistent = cycle.consistency != "crash-consistent"
    return Sums(
        begin=stretch(now_ns),
        successful=1,
        late=int(cycle.is_late),
        app_consistent=int(is_consistent),
        app_failures=int(cycle.freeze_error is not None),
        size=cycle.bytes_sent,
        max_size=cycle.bytes_sent,
        latency=cycle.latency,
        max_latency=cycle.latency,
        frozen_seconds=cycle.frozen_seconds,
        max_frozen_seconds=cycle.frozen_seconds,
        bytes_logged=cycle.bytes_logged,
        bytes_coalesced=cycle.bytes_coalesced,
        bytes_zero=cycle.bytes_zero,
    )


def total(sums: Iterable[Sums], *, begin: int) -> Sums:
    """All of them as one, which began at `begin`."""
    found = Sums(begin=begin)
    for one in sums:
        found = found.plus(one)
    return replace(found, begin=begin)


def spread(missed: int, *, first: int, last: int) -> list[Sums]:
    """Misses of a time in which nobody counted, from the second `first` to `last`, each in the stretch in which it
    happened; those that lie too far back are left out."""
    kept_from = max(first, last - KEPT_SECONDS)
    if kept_from > first:
        missed, first = missed * (last - kept_from) // (last - first), kept_from
    stretches = range(stretch(first * 10**9), last + 1, STRETCH)
    if not missed or not stretches:
        return []
    each, more = divmod(missed, len(stretches))
    counts = [each + (place < more) for place in range(len(stretches))]
    return [Sums(begin=begin, missed=count) for begin, count in zip(stretches, counts, strict=True) if count]


def uncounted(counted_ns: int | None, now_ns: int, frequency: float) -> int:
    """Cycles missed since misses were counted last, as nobody did; one that is just due is none yet. `frequency`:
    seconds."""
    passed = 0 if counted_ns is None else max(0, now_ns - counted_ns) / 1e9
    return max(0, int(passed // frequency) - 1)


def stretch(now_ns: int) -> int:
    """The beginning, seconds since 1970, of the stretch in which an instant lies."""
    return max(0, now_ns // 10**9) // STRETCH * STRETCH


def add_cycle(txn: Transaction, vm: str, cycle: CycleRecord, *, now_ns: int) -> None:
    """Keep a cycle's record, and count it."""
    prefix = _key(_CYCLES, vm)
    number = txn.last(prefix) + 1
    txn.put(numbered(prefix, number), dataclasses.asdict(cycle))
    txn.drop_below(prefix, number - CYCLES_KEPT + 1)
    add_sums(txn, vm, sums_of(cycle, now_ns=now_ns))


def add_sums(txn: Transaction, vm: str, sums: Sums) -> None:
    """Count something in its stretch."""
    prefix = _key(_SUMS, vm)
    key = numbered(prefix, sums.begin)
    kept = txn.get(key)
    if kept is None:
        txn.drop_below(prefix, sums.begin - KEPT_SECONDS)
    values = dataclasses.asdict(sums if kept is None else _sums(sums.begin, kept).plus(sums))
    del values["begin"]
    txn.put(key, values)


def drop_sums(txn: Transaction, vm: str) -> None:
    """Begin to count anew. The records of cycles stay."""
    for number in txn.numbers(_key(_SUMS, vm)):
        txn.delete(numbered(_key(_SUMS, vm), number))


def _sums(begin: int, values: Mapping[str, Any]) -> Sums:
    known = {one.name: values[one.name] for one in dataclasses.fields(Sums) if one.name in values}
    return Sums(**known | {"begin": begin})


def _key(kind: bytes, vm: str) -> bytes:
    return kind + vm.encode() + b"/"


class Statistics:
    """What is kept of the VMs of a home."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def cycles(self, vm: str, *, newest: int = CYCLES_KEPT) -> list[CycleRecord]:
        """The last cycles of a VM, oldest first, `newest` of them at most."""
        known = {one.name for one in dataclasses.fields(CycleRecord)}
        found: list[CycleRecord] = []
        with self._database.read() as txn:
            for _, values in txn.under(_key(_CYCLES, vm), backwards=True):
                found.append(CycleRecord(**{name: value for name, value in values.items() if name in known}))
                if len(found) >= newest:
                    break
        return found[::-1]

    def over(self, vm: str, *, first: int, last: int) -> Sums:
        """What happened between two instants, seconds since 1970: in all stretches that begin before `last` and do not
        end before `first`."""
        start = max(0, first - STRETCH + 1)
        with self._database.read() as txn:
            found = [_sums(at, values) for at, values in txn.under(_key(_SUMS, vm), first=start) if at <= last]
        return total(found, begin=first)
