"""The control plane's records: where each VM's replication stands, what was done, and how it went.

    key                          value
    "version"                    {"version": 1}; a higher one is refused
    "vm/NAME"                    the fields of VmRecord
    "cycle/", "sums/"            `hvfuse.control.statistics`
    "job/", "next/job"           `hvfuse.control.jobs`
    "event/", "cursor/"          `hvfuse.control.events`
    "plan/", "next/plan"         `hvfuse.control.plan_records`

A VM without a record was never replicated. Fields that are missing have their defaults; fields that are
not known are kept as they are. A VM's state changes by the events of `hvfuse.states` alone, and what follows from
that for its jobs is kept in the same transaction (`hvfuse.control.following`). Everything is durable when it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import TracebackType
from typing import Any, Self

from hvfuse.control import following, statistics
from hvfuse.control.database import Database, Transaction
from hvfuse.control.events import Events, add_event
from hvfuse.control.jobs import Jobs
from hvfuse.control.plan_records import PlanRuns
from hvfuse.control.statistics import CycleRecord, Failure, Statistics, Sums
from hvfuse.errors import CorruptError, HvfuseError, StateError, UnreachableError
from hvfuse.shipper.copy import CopyReport
from hvfuse.shipper.cycle import CycleReport
from hvfuse.shipper.orders import Orders
from hvfuse.states import Event, ReplicationState, next_state
from hvfuse.system import Clock, SystemClock


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRecord:
    """Where a VM's replication stands.

    `enabled`: whether an administrator said that it is to be replicated; None: nobody said anything.
    `error`, `hint`: why the last attempt failed and what to do; None when it did not. `tracker_error`,
    `shipper_error`: why that process ended or could not start, None while it runs; `tracker_hint`: what to do
    about it. `tracker_process`, `shipper_process`: `system.process_identity` of the one that served last.
    `generation`: hex.
    `cycle`, `point`: the last one that the target has (0 and None: none yet).
    `last_replication_time_ns`: instant of that cycle's barrier, ns since 1970; `last_applied_time_ns`: when the target
    had it. `progress`: of the copy
    under way, 0 to 1; `copy`: how far it is, as `CopyProgress` tells it, None when there is none.
    `resync_reason`: why one is required; `resync_cause`: "disks" if only the set of disks changed. `last_copy`: what
    the last copy or
    resynchronisation took, as `CopyReport` tells it; "text" says it in words. `orders`: what an administrator
    ordered of copies, as `Orders` tells it; empty: nothing. `copy_due_ns`: when the copy that waits begins by
    itself, ns since 1970; None: not before it is asked for, or none waits.
    `copy_job`: id of the job of the copy that is under way or waits. `protected_since_ns`: when protection was
    finalized. `last_app_consistent_ns`: instant of the last app-consistent cycle's barrier, shipped
    or not. `guest_error`: why the last attempt at one failed. `guest_stuck`: why the guest may be standing still,
    frozen, although nobody needs it to; None: it does not.
    `counted_ns`: until when missed cycles were counted. `measured_since_ns`: when that was begun anew.
    `health`, `health_reasons`: as they were last told of, with the reasons' ids. `last_test`: the last test failover,
    for `hvfuse measure`.
    `store`: directory of the store where the VM's replica lies as this home uses it; None: as hvfuse.toml says.
    `shipped_to`: directory of the store that it was last shipped to, which holds `point`; None: the home's own.
    `epoch`: the one under which this side has the VM (`hvfuse.target.failing_over`). `held`: why its disks are
    read-only; None: they are not. `prepared`: what a planned failover proved: {"point", "bytes", "disks"}.
    `giving_way`: what this side is about to hand over to its own store: {"disks", "store", "primary", "epoch"};
    `gave_way_ns`: when it had done so: then the VM comes home when it is failed over to here.
    """

    state: ReplicationState = ReplicationState.DISABLED
    enabled: bool | None = None
    error: str | None = None
    hint: str | None = None
    tracker_error: str | None = None
    tracker_hint: str | None = None
    shipper_error: str | None = None
    tracker_process: dict[str, Any] | None = None
    shipper_process: dict[str, Any] | None = None
    generation: str | None = None
    cycle: int = 0
    point: str | None = None
    last_replication_time_ns: int | None = None
    last_applied_time_ns: int | None = None
    progress: float | None = None
    resync_reason: str | None = None
    resync_cause: str | None = None
    last_copy: dict[str, object] | None = None
    copy: dict[str, Any] | None = None
    orders: dict[str, Any] = field(default_factory=dict)
    copy_due_ns: int | None = None
    copy_job: int | None = None
    protected_since_ns: int | None = None
    last_app_consistent_ns: int | None = None
    guest_error: str | None = None
    guest_stuck: str | None = None
    counted_ns: int | None = None
    measured_since_ns: int | None = None
    health: str | None = None
    health_reasons: tuple[str, ...] = ()
    last_test: dict[str, Any] | None = None
    store: str | None = None
    shipped_to: str | None = None
    epoch: int = 0
    held: str | None = None
    prepared: dict[str, Any] | None = None
    giving_way: dict[str, Any] | None = None
    gave_way_ns: int | None = None


class Records:
    """The records at directory `path`, made if missing. Open them once in a process. Raises CorruptError,
    UnsupportedError."""

    def __init__(self, path: str, *, clock: Clock | None = None) -> None:
        self._path = path
        self._clock: Clock = clock or SystemClock()
        self._database = Database(path)
        self.jobs = Jobs(self._database, clock=self._clock)
        self.events = Events(self._database)
        self.plans = PlanRuns(self._database, clock=self._clock)
        self.statistics = Statistics(self._database)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the records go."""
        self._database.close()

    def names(self) -> list[str]:
        """The VMs that have a record."""
        with self._database.read() as txn:
            return txn.names(b"vm/")

    def read(self, vm: str) -> VmRecord:
        """The VM's record; the default one if there is none."""
        with self._database.read() as txn:
            return self._record(vm, txn.get(_vm_key(vm)))

    def update(self, vm: str, **changes: Any) -> VmRecord:
        """Change fields of the VM's record but its state, in one transaction: what others changed meanwhile stays.
        `orders` may be given as `Orders`. Returns the new record; durable."""
        return self.apply(vm, **changes)

    def apply(self, vm: str, *events: Event, **changes: Any) -> VmRecord:
        """Change the VM's state by events in a row, and fields as `update` does, in one transaction. Returns the new
        record; durable. Raises StateError, and changes nothing, where the state does not allow one of them."""
        if isinstance(changes.get("orders"), Orders):
            changes["orders"] = changes["orders"].as_json()
        assert "state" not in changes, "the state changes by events"
        return self._change(vm, lambda _: changes, events)

    def orders(self, vm: str) -> Orders:
        """What an administrator ordered of the VM's copies."""
        return Orders.from_json(self.read(vm).orders)

    def change_orders(self, vm: str, change: Callable[[Orders], Orders]) -> Orders:
        """Replace the VM's orders by what `change` makes of them, in one transaction: of two who change them at
        once, the second sees what the first made. Returns the new ones; durable."""
        record = self._change(vm, lambda now: {"orders": change(Orders.from_json(now.orders)).as_json()})
        return Orders.from_json(record.orders)

    def _change(
        self,
        vm: str,
        changes: Callable[[VmRecord], Mapping[str, Any]],
        events: tuple[Event, ...] = (),
        *,
        cycle: CycleRecord | None = None,
    ) -> VmRecord:
        """What does not change anything is not written: it costs no sync."""
        now_ns = self._clock.now_ns()

        def act(txn: Transaction) -> VmRecord:
            kept = txn.get(_vm_key(vm))
            before = self._record(vm, kept)
            state = before.state
            for event in events:
                if state is ReplicationState.DISABLED and before.enabled is False and event not in _BEGIN:
                    raise StateError(
                        f"{vm}: replication was disabled; allowed: enable", hint=f"hvfuse replication enable {vm}"
                    )
                state = next_state(state, event, what=vm)
            record = replace(before, **changes(before), state=state)
            if state in COUNTED and before.state not in COUNTED:
                record = replace(record, counted_ns=now_ns)
            change = following.Change(vm=vm, before=before, after=record, events=events, now_ns=now_ns)
            record = replace(record, copy_job=following.follow(txn, change))
            if cycle is not None:
                statistics.add_cycle(txn, vm, cycle, now_ns=now_ns)
                record = replace(record, counted_ns=now_ns, last_applied_time_ns=now_ns)
            if kept is None or record != before:
                txn.put(_vm_key(vm), {**(kept or {}), **asdict(record)})
            return record

        return self._database.write(act)

    def add_cycle(self, vm: str, cycle: CycleRecord, /, *events: Event, **changes: Any) -> VmRecord:
        """Keep the statistics of a cycle that the target has just got, and what changes with it, as `apply` does, in
        one transaction: until now, none is missed that was not told of. Returns the new record; durable."""
        return self._change(vm, lambda _: changes, events, cycle=cycle)

    def count(self, vm: str, *sums: Sums, until_ns: int | None = None) -> None:
        """Count what happened; `until_ns`: until when missed cycles are counted with it. Durable."""

        def act(txn: Transaction) -> None:
            for one in sums:
                statistics.add_sums(txn, vm, one)
            if until_ns is not None:
                _change_kept(txn, vm, counted_ns=until_ns)

        self._database.write(act)

    def reset(self, vm: str) -> None:
        """Begin to measure anew: the sums go, the records of cycles stay. Durable."""
        now_ns = self._clock.now_ns()

        def act(txn: Transaction) -> None:
            statistics.drop_sums(txn, vm)
            _change_kept(txn, vm, counted_ns=now_ns, measured_since_ns=now_ns)

        self._database.write(act)

    def tell_health(
        self, vm: str, health: str, reasons: tuple[str, ...], event: Callable[[str | None], Mapping[str, Any]]
    ) -> None:
        """Keep how a VM was told to be, and the event that tells it, in one transaction, if that is news. `event`: its
        other fields, given the health that was told before. Durable."""

        def act(txn: Transaction) -> None:
            kept = txn.get(_vm_key(vm)) or {}
            if kept.get("health") != health:
                add_event(txn, kind="health", vm=vm, **event(kept.get("health")))
                txn.put(_vm_key(vm), {**kept, "health": health, "health_reasons": reasons})

        self._database.write(act)

    def of(self, vm: str) -> VmRecords:
        """The part of one VM, as its shipper uses it."""
        return VmRecords(self, vm, self._clock)

    def cycles(self, vm: str) -> list[CycleRecord]:
        """The kept cycles of a VM, oldest first."""
        return self.statistics.cycles(vm)

    def _record(self, vm: str, values: Mapping[str, Any] | None) -> VmRecord:
        if values is None:
            return VmRecord()
        known = {one.name: values[one.name] for one in fields(VmRecord) if one.name in values}
        try:
            known["state"] = ReplicationState(known.get("state", ReplicationState.DISABLED))
        except ValueError:
            raise CorruptError(f"{self._path}: {vm}: unknown state {known['state']!r}") from None
        known["health_reasons"] = tuple(known.get("health_reasons", ()))
        return VmRecord(**known)


_BEGIN = (Event.ENABLE, Event.TAKE_OVER)
"""What is possible although replication was disabled."""
COUNTED = frozenset({ReplicationState.REPLICATING, ReplicationState.ERROR})
"""States in which a cycle that is due and does not come is missed."""


@dataclass(frozen=True, slots=True)
class VmRecords:
    """One VM's part of the records."""

    records: Records
    vm: str
    clock: Clock

    def read(self) -> VmRecord:
        """The VM's record."""
        return self.records.read(self.vm)

    def apply(self, *events: Event, **changes: Any) -> ReplicationState:
        """As `Records.apply`. Returns the state."""
        return self.records.apply(self.vm, *events, **changes).state

    def update(self, **changes: Any) -> None:
        """As `Records.update`."""
        self.records.update(self.vm, **changes)

    def orders(self) -> Orders:
        """What an administrator ordered of the VM's copies."""
        return self.records.orders(self.vm)

    def change_orders(self, change: Callable[[Orders], Orders]) -> Orders:
        """As `Records.change_orders`."""
        return self.records.change_orders(self.vm, change)

    def copy_progress(self) -> dict[str, Any] | None:
        """The record's `copy`."""
        return self.read().copy

    def last_app_consistent_ns(self) -> int | None:
        """The record's `last_app_consistent_ns`."""
        return self.read().last_app_consistent_ns

    def cycle(self, report: CycleReport, *events: Event, **changes: Any) -> ReplicationState:
        """Keep the statistics of a committed cycle, and what changes with it; durable, in one step."""
        now_ns = self.clock.now_ns()
        return self.records.add_cycle(
            self.vm,
            CycleRecord(
                cycle=report.cycle,
                point=report.point,
                time_ns=report.sealed_ns,
                bytes_logged=report.bytes_logged,
                bytes_coalesced=report.bytes_coalesced,
                bytes_sent=report.bytes_sent,
                seconds=report.seconds,
                bytes_zero=report.bytes_zero,
                latency=max(0.0, (now_ns - report.sealed_ns) / 1e9),
                consistency=report.consistency,
                frozen_seconds=report.frozen_seconds,
                freeze_error=report.freeze_error,
                is_late=report.is_late,
            ),
            *events,
            **changes,
        ).state

    def copied(self, report: CopyReport) -> None:
        """Keep the statistics of a committed copy; durable."""
        self.records.update(self.vm, last_copy=report.as_json())

    def resume(self) -> None:
        """The state of a VM that is not suspended any more, if its orders say so: as it was before."""
        record = self.read()
        self.apply(*resuming(record, Orders.from_json(record.orders)))

    def missed(self, count: int) -> None:
        """Cycles were due and did not come; 0: none until now. Counted where one could be expected."""
        now_ns = self.clock.now_ns()
        counts = count and self.read().state in COUNTED
        sums = [Sums(begin=statistics.stretch(now_ns), missed=count)] if counts else []
        self.records.count(self.vm, *sums, until_ns=now_ns)

    def count_absence(self, frequency: float) -> None:
        """Count the cycles that were missed while no process was there to count them; before anything is shipped.
        `frequency`: seconds."""
        record, now_ns = self.read(), self.clock.now_ns()
        missed = uncounted(record, now_ns, frequency)
        if missed:
            assert record.counted_ns is not None
            sums = statistics.spread(missed, first=record.counted_ns // 10**9, last=now_ns // 10**9)
            # The rest of the time counts on: else restarts in a row would hide that nothing is shipped.
            self.records.count(self.vm, *sums, until_ns=record.counted_ns + round(missed * frequency * 1e9))

    def failed(self, error: HvfuseError) -> None:
        """An attempt at a cycle failed: count it."""
        now_ns = self.clock.now_ns()
        kind = Failure.NETWORK if isinstance(error, UnreachableError) else Failure.REPLICATION
        sums = Sums(begin=statistics.stretch(now_ns))
        if kind is Failure.NETWORK:
            self.records.count(self.vm, replace(sums, network_failures=1))
        else:
            self.records.count(self.vm, replace(sums, replication_failures=1))


def resuming(record: VmRecord, orders: Orders) -> tuple[Event, ...]:
    """What happens to a suspended VM whose orders are these; nothing if they suspend it still."""
    if orders.paused or orders.suspended:
        return ()
    match record.state:
        case ReplicationState.RESYNCHRONIZE_SUSPENDED:
            return (Event.RESUME,)
        # With the job of a copy that is not done, that is a first one, whatever points there were before.
        case ReplicationState.SUSPENDED if record.point is not None and record.copy_job is None:
            return (Event.RESUME,)
        case ReplicationState.SUSPENDED:
            return (Event.NEED_FIRST_COPY if orders.seed is None else Event.AWAIT_FIRST_COPY,)
        case _:
            return ()


def uncounted(record: VmRecord, now_ns: int, frequency: float) -> int:
    """Cycles that a VM missed since somebody last counted them: nobody ran, or what ran stood still."""
    if record.state not in COUNTED or record.orders.get("paused"):
        return 0
    return statistics.uncounted(record.counted_ns, now_ns, frequency)


def _change_kept(txn: Transaction, vm: str, **fields: Any) -> None:
    """Change plain fields of a VM's record, if it has one."""
    kept = txn.get(_vm_key(vm))
    if kept is not None:
        txn.put(_vm_key(vm), {**kept, **fields})


def _vm_key(vm: str) -> bytes:
    return b"vm/" + vm.encode()
