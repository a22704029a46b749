"""Rounds of work, death and recovery against a model: tracker, shipper and store, in worlds of some rounds.

A world is a VM with its store. In each round something dies at a random labelled call: the tracker, the
whole host (power cut), or the shipper with the store's code. Then all is started again, and checked:

- I1: every byte that a guest synced is on its disk; after the death of a process, every byte that was
  answered at all.
- I2: after the next cycle the newest recovery point equals the disks.
- I3: each recovery point equals the model at its barrier, for all disks, byte for byte.
- Sealed is sealed: the logs of a rotation that was answered are there after a power cut, whole, and the
  image holds what they hold.
- Nobody copies the disks anew, but for a first copy that was interrupted: a process's death compares nothing,
  a power cut marked regions only.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from hvfuse import spool
from hvfuse.errors import HvfuseError, UnreachableError
from hvfuse.target.check import check
from hvfuse.target.journal import PointReader
from hvfuse.tracker.vm import TrackedVm
from tests.crash.host import VM, Death, Host, Reaper, Side
from tests.crash.remains import durable_entries, lost_seal
from tests.crash.workload import Action, DiskModel, Floor, Operation, draw

WORLD = 12
"""Rounds until a new world begins."""


class Fault(Enum):
    """What dies. The values are what the verdict calls it."""

    TRACKER = "tracker deaths"
    POWER = "power cuts"
    SHIPPER = "shipper deaths"


VICTIMS = {
    Fault.TRACKER: frozenset({Side.TRACKER}),
    Fault.POWER: frozenset(Side),
    Fault.SHIPPER: frozenset({Side.SHIPPER}),
}


class Violation(AssertionError):
    """A promise was broken."""


@dataclass(slots=True)
class Tally:
    """What was done and compared. `deaths`: by kind of fault; `labels`: where they struck."""

    rounds: int = 0
    deaths: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    points: int = 0
    copies: int = 0
    resyncs: int = 0
    bytes_in_doubt: int = 0
    bytes_compared: int = 0

    def add(self, other: Tally) -> None:
        """Sum both up."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Tally:
        """From the fields by their names."""
        return cls(**{**kept, "deaths": Counter(kept["deaths"]), "labels": Counter(kept["labels"])})


def barrier_at(request: str, vm: TrackedVm) -> tuple[bytes, int] | None:
    """The cycle, (generation, number), that this request to a tracker ends; None if it ends none."""
    if request not in ("rotate", "resize", "detach") or not vm.is_logging:
        return None
    status = vm.status()
    return bytes.fromhex(status["generation"]), int(status["cycle"])


class World:
    """One VM, its store and the model of both. `seed` decides everything but ids and clocks."""

    def __init__(self, root: str, *, seed: str, faults: Sequence[Fault] = tuple(Fault), records: bool = True) -> None:
        self.tally = Tally()
        self._dice = random.Random(seed)
        self._reaper = Reaper()
        self.host = Host(
            root,
            self._reaper,
            seed=self._dice.getrandbits(64),
            on_request=self._asked,
            on_answer=self._answered,
            records=records,
        )
        self._faults = faults
        self._disks: dict[str, DiskModel] = {}
        self._barriers: dict[tuple[bytes, int], dict[str, bytes]] = {}
        self._barrier: tuple[bytes, int] | None = None
        self._unreleased: set[tuple[bytes, int]] = set()
        self._logged: dict[str, tuple[bytes, int]] = {}
        self._may_copy = True
        self._in_doubt = False

    # Rounds -----------------------------------------------------------------------------------

    def run(self, rounds: int = WORLD) -> Tally:
        """Live and die. Raises Violation."""
        try:
            with self.host:
                self._live(rounds)
        except (HvfuseError, OSError) as error:
            raise Violation(f"{type(error).__name__}: {error}") from error
        return self.tally

    def _live(self, rounds: int) -> None:
        self.host.attach()
        self._disks = {name: DiskModel(bytearray(content)) for name, content in self.host.images().items()}
        self._ship()
        for _ in range(rounds):
            self._round(self._dice.choice(self._faults))
            self.tally.rounds += 1
        self._ship()
        self._check_store()

    def _round(self, fault: Fault) -> None:
        self._reaper.arm(VICTIMS[fault], self._dice)
        in_flight = None
        for _ in range(self._dice.choice([1, 3])):  # again, should nobody have died
            in_flight = in_flight or self._work(ships=fault is Fault.SHIPPER or self._dice.randrange(2) == 0)
        self._count(fault)
        match fault:
            case Fault.TRACKER:
                self._tracker_died(in_flight)
            case Fault.POWER:
                self._power_was_cut(in_flight)
            case Fault.SHIPPER:
                self._reaper.disarm()
                self._restart_shipper()
        if self._dice.randrange(4):
            self._ship()

    def _count(self, fault: Fault) -> None:
        self.tally.deaths[fault.value] += 1
        self.tally.labels[self._reaper.killed_at or "at rest"] += 1

    def _work(self, *, ships: bool) -> Operation | None:
        """Operations until somebody dies or they are all done; returns the one that was not answered."""
        count = self._dice.randrange(3, 40)
        for operation in draw(self._dice, self._disks, count, ships=ships):
            if operation.action is Action.ROTATE and not self._vm.is_logging:
                continue
            try:
                self.host.perform(operation)
            except Death:
                return operation
            except HvfuseError:
                if self._reaper.killed_at is None:
                    raise
                return operation
            if self._reaper.killed_at is not None:
                return operation  # answered by the shipper, which survived
            self._apply(operation)
        return None

    def _apply(self, operation: Operation) -> None:
        """The operation was answered."""
        match operation.action:
            case Action.RESIZE | Action.RESTART:
                self._sealed()
            case Action.CYCLE:
                self._may_copy = False
        if not operation.disk:
            return
        self._disks[operation.disk].apply(operation)
        log = self.host.vm.disks[operation.disk].log if self.host.vm is not None else None
        if operation.action is Action.SYNC and log is not None:
            # The mark that everything before it is durable need not be durable itself.
            self._logged[operation.disk] = (log.head.unique_id, log.entry_count - 1)

    @property
    def _vm(self) -> TrackedVm:
        assert self.host.vm is not None
        return self.host.vm

    def _ship(self) -> None:
        """A cycle that nothing disturbs. I2: its point equals the disks."""
        report = self.host.replication.cycle_now()
        self._apply(Operation(Action.CYCLE))
        found = self._check_disks({name: disk.floor() for name, disk in self._disks.items()})
        key = (report.generation, report.cycle)
        if self._barriers.get(key) != found:
            raise Violation(f"the model of cycle {report.cycle} is not what the disks hold")
        self._check_point(report.point, found)

    # What the tracker is asked, and answers -------------------------------------------------------

    def _asked(self, request: str, fields: dict[str, Any], vm: TrackedVm) -> None:
        barrier = barrier_at(request, vm)
        if barrier is not None:
            self._note_barrier(barrier)
        if request == "begin":
            if fields["scope"] == "regions":
                self.tally.resyncs += 1
                self.tally.bytes_in_doubt += sum(disk["resync_bytes"] for disk in vm.status()["disks"])
            elif self._may_copy:
                self.tally.copies += 1
            else:
                raise Violation(f"the disks are copied anew: {vm.resync_reason or 'logs are missing'}")
            self._unreleased.clear()
            self._logged.clear()
        if request == "release":
            generation, cycle = bytes.fromhex(fields["generation"]), int(fields["cycle"])
            self._unreleased = {key for key in self._unreleased if key[0] == generation and key[1] > cycle}

    def _note_barrier(self, barrier: tuple[bytes, int]) -> None:
        """Nobody writes until the barrier that is to come, so what the cycle will hold is known now."""
        self._barrier = barrier
        self._barriers[barrier] = {name: bytes(disk.now) for name, disk in self._disks.items()}

    def _answered(self, request: str) -> None:
        if request == "rotate":
            self._sealed()
        if request == "resynced":
            self._in_doubt = self._vm.resync_reason is not None  # then another one follows

    def _sealed(self) -> None:
        """A rotation was answered: its logs and the images are durable."""
        if self._barrier is not None:
            self._unreleased.add(self._barrier)
            self._barrier = None
            self._logged.clear()
            for disk in self._disks.values():
                disk.seal()

    # Recovery -----------------------------------------------------------------------------------

    def _tracker_died(self, in_flight: Operation | None) -> None:
        floors = {name: disk.floor() for name, disk in self._disks.items()}
        self._attempted(in_flight)
        self.host.kill()
        self._reaper.disarm()
        if self._dice.randrange(2):
            self._restart_shipper()
        if self._dice.randrange(2):
            with contextlib.suppress(UnreachableError):
                self.host.replication.cycle_now()  # what was sealed goes over all the same
        self._attach(Fault.TRACKER)
        if self._vm.resync_reason is not None and not (self._may_copy or self._in_doubt):
            raise Violation(f"no process's death costs a copy: {self._vm.resync_reason}")
        found = self._check_disks(floors)
        for name, disk in self._disks.items():
            disk.found(found[name])
        self._note_recovered()

    def _attach(self, fault: Fault) -> None:
        """Start the tracker again; now and then it dies over its recovery, too."""
        while self._dice.randrange(4) == 0:
            self._reaper.arm(VICTIMS[fault], self._dice)
            try:
                self.host.attach()
            except Death:
                self._count(fault)
            self._reaper.disarm()
            if fault is Fault.POWER:
                self.host.cut_power()
            else:
                self.host.kill()
        self.host.attach()

    def _note_recovered(self) -> None:
        """Cycles that recovery sealed hold what the disks hold now; a cycle cut off within its barrier is
        known already. What a surviving shipper released of its own accord is gone."""
        present = {(cycle.generation, cycle.cycle) for cycle in spool.list_cycles(self.host.folder)}
        if self._vm.resync_reason is None:
            for key in present:
                self._barriers.setdefault(key, {name: bytes(disk.now) for name, disk in self._disks.items()})
        self._unreleased &= present
        self._barrier = None

    def _power_was_cut(self, in_flight: Operation | None) -> None:
        self._attempted(in_flight)
        self.host.kill()
        self.host.close_target()
        self._reaper.disarm()
        self.host.cut_power()
        self._check_left()
        self.host.open_target()
        self._in_doubt = True
        self._attach(Fault.POWER)
        self._restart_shipper()  # the folder is another one after each cut
        found = self._check_disks({name: disk.synced for name, disk in self._disks.items()})
        for name, disk in self._disks.items():
            disk.settle(found[name])
        self._logged.clear()
        self._note_recovered()

    def _restart_shipper(self) -> None:
        self.host.close_target()
        self.host.open_target()

    def _attempted(self, operation: Operation | None) -> None:
        if operation is not None and operation.disk:
            self._disks[operation.disk].attempt(operation)

    # Checks -------------------------------------------------------------------------------------

    def _check_disks(self, floors: dict[str, Floor]) -> dict[str, bytes]:
        """I1. Returns what is on the disks."""
        found = self.host.images()
        for name, disk in self._disks.items():
            self.tally.bytes_compared += len(found[name])
            wrong = disk.first_wrong(found[name], floors[name])
            if wrong is not None:
                raise Violation(f"I1: byte {wrong} of {name} is not what was promised")
        return found

    def _check_left(self) -> None:
        """What the power cut left, before anybody recovers it."""
        self._check_disks({name: disk.synced for name, disk in self._disks.items()})
        self._check_disks({name: disk.sealed for name, disk in self._disks.items()})
        lost = lost_seal(self.host.folder, self._unreleased, list(self._disks))
        if lost is not None:
            raise Violation(f"sealed, but {lost}")
        for name, (unique_id, count) in self._logged.items():
            have = durable_entries(self.host.folder, name, unique_id)
            if have is not None and have < count:
                raise Violation(f"{have} of {count} entries that a sync made durable are in the log of {name}")

    def _check_point(self, point_id: str, wanted: dict[str, bytes]) -> None:
        reader = PointReader(self.host.store, VM, point_id)
        try:
            if {disk.name for disk in reader.disks} != wanted.keys():
                raise Violation(f"I3: point {point_id} has other disks than the VM had")
            for disk in reader.disks:
                content = reader.pread(disk.name, 0, disk.size)
                self.tally.bytes_compared += len(content)
                if content != wanted[disk.name]:
                    raise Violation(f"I3: {disk.name} at point {point_id} is not what it was at the barrier")
        finally:
            reader.close()
        self.tally.points += 1

    def _check_store(self) -> None:
        """I3, for all that the store has."""
        for point in self.host.replica.points():
            wanted = self._barriers.get((point.generation, point.cycle))
            if wanted is None:
                raise Violation(f"point {point.id} was never a barrier")
            self._check_point(point.id, wanted)
        findings = check(self.host.store).findings
        if findings:
            raise Violation(f"the store is not whole: {findings[0]}")
