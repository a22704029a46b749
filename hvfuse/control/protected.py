"""Who may ship a VM, and when it counts as protected: what every shipper asks."""

from __future__ import annotations

from collections.abc import Callable

from hvfuse.control.config import VmPolicy
from hvfuse.control.job import JobKind
from hvfuse.control.jobs import Running
from hvfuse.control.records import Records
from hvfuse.control.supervisor import is_standing
from hvfuse.errors import FencedError, HvfuseError, StateError
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.source import Source
from hvfuse.states import AFTER_FAILOVER, Event, ReplicationState
from hvfuse.system import Clock
from hvfuse.target.store import Store

FINALIZE_AGAIN = 600.0
"""Seconds after which it is tried again to finalize protection."""
FINAL_STEPS = ("first recovery point", "orders", "retention")


def is_automatic(policy: VmPolicy) -> bool:
    """Whether a VM is replicated although nobody enabled it."""
    return policy.protect == "auto"


def begin(records: Records, vm: str, policy: VmPolicy, *, folder: str) -> None:
    """A VM about which nobody said anything is replicated from when somebody first asks for it. Raises StateError for
    one that was disabled, or that the policy leaves to an administrator; or that was failed over to here, and is not
    this home's before that is committed, nor has disks in `folder` before they are hydrated."""
    if is_standing(folder):
        raise StateError(
            f"{vm} was failed over to here, and has no disks of its own yet that could be replicated",
            hint=f"hvfuse failover commit {vm} --wait; then: hvfuse replication reverse {vm}",
        )
    record = records.read(vm)
    if record.held is not None and record.state in AFTER_FAILOVER - {ReplicationState.PREPARED_FOR_FAILOVER}:
        raise FencedError(f"{vm}: {record.held}", hint=f"hvfuse status {vm}")
    if record.state is not ReplicationState.DISABLED:
        return
    if record.gave_way_ns is not None:
        raise StateError(
            f"{vm}: this home holds its replica, and another one has the VM", hint=f"hvfuse failover planned {vm}"
        )
    if record.enabled is False or (record.enabled is None and not is_automatic(policy)):
        was = "was disabled" if record.enabled is False else 'was never enabled, and hvfuse.toml says "manual" of it'
        raise StateError(f"{vm}: replication {was}; allowed: enable", hint=f"hvfuse replication enable {vm}")
    records.apply(vm, Event.ENABLE)


class Finalizer:
    """Finalizes the protection of a VM once it has its first recovery point. To be called after every point, and when
    a shipper begins; does nothing where there is nothing to do. For one thread.

    `housekeep`: has the store apply what the policy keeps.
    """

    def __init__(
        self, records: Records, vm: str, *, store: Store, source: Source, housekeep: Callable[[], None], clock: Clock
    ) -> None:
        self._records = records
        self._vm = vm
        self._store = store
        self._source = source
        self._housekeep = housekeep
        self._clock = clock
        self._is_done = False
        self._due = -FINALIZE_AGAIN

    def __call__(self) -> None:
        """Raises HvfuseError where something is not as it should be; it is looked at again later."""
        if self._is_done or self._clock.monotonic() < self._due:
            return
        record = self._records.read(self._vm)
        self._is_done = record.protected_since_ns is not None
        if self._is_done or record.state is not ReplicationState.REPLICATING or record.point is None:
            return
        self._due = self._clock.monotonic() + FINALIZE_AGAIN
        command = ("replicate", self._vm)
        with self._records.jobs.run(JobKind.FINALIZE, self._vm, steps=FINAL_STEPS, command=command) as job:
            self._finalize(job, record.point)
        self._is_done = True

    def _finalize(self, job: Running, point_id: str) -> None:
        job.step(FINAL_STEPS[0])
        point = self._store.point(self._vm, point_id)
        held = {(disk.name, disk.disk_id) for disk in point.disks}
        tracked = {(disk.name, disk.disk_id) for disk in self._source.status().disks}
        if held != tracked:
            different = ", ".join(sorted({name for name, _ in held ^ tracked}))
            raise HvfuseError(
                f"{self._vm}: recovery point {point.id} is not of the disks that are tracked: {different}",
                hint=f"hvfuse replicate {self._vm}",
            )
        job.note(f"{point.id}, {len(held)} disks")
        job.step(FINAL_STEPS[1])
        self._records.change_orders(self._vm, Orders.done)
        job.step(FINAL_STEPS[2])
        self._housekeep()
        self._records.update(self._vm, protected_since_ns=self._clock.now_ns())
