"""The replica's own state: where the relationship stands as its target sees it, through the table of `hvfuse.states`.

It stands in the VM's record in the store, and changes in the transactions that change what it tells of:

    begun, a copy where there is no replica      WaitingForInitialReplication
    begun, any other copy                        Resynchronizing
    abandoned, any other copy                    WaitingForStartResynchronize
    committed, a cycle                           Replicating
    suspended here by an administrator           Suspended, ResynchronizeSuspended

A suspended replica takes nothing in (SuspendedError); its recovery points are read as ever. Stores of before have no
state: what it would be follows from position and points.
"""

from __future__ import annotations

from dataclasses import replace

from hvfuse.errors import BusyError, CorruptError, StateError, SuspendedError
from hvfuse.manifest import CycleKind, CycleManifest
from hvfuse.states import Event, ReplicationState, next_state
from hvfuse.target.environment import Txn
from hvfuse.target.schema import VmRecord
from hvfuse.target.store import Store

SUSPENDED = frozenset({ReplicationState.SUSPENDED, ReplicationState.RESYNCHRONIZE_SUSPENDED})

_RESYNCING = ReplicationState.RESYNCHRONIZING


def state(txn: Txn, store: Store, vm: VmRecord) -> ReplicationState:
    """Where the replica stands. Raises CorruptError for a state that nobody knows."""
    if vm.state:
        return known(vm)
    if vm.position is None or (vm.position.cycle == 0 and not store.listed(txn, vm)):
        return ReplicationState.WAITING_FOR_INITIAL_REPLICATION
    return ReplicationState.RESYNCHRONIZING if vm.position.cycle == 0 else ReplicationState.REPLICATING


def known(vm: VmRecord) -> ReplicationState:
    """The state that a VM's record has. Raises CorruptError for one that nobody knows."""
    try:
        return ReplicationState(vm.state)
    except ValueError:
        raise CorruptError(f"{vm.name}: the store knows of no state {vm.state!r}") from None


def demand_open(vm: VmRecord) -> None:
    """Raises SuspendedError if the replica takes nothing in, and as `demand_settled`."""
    demand_settled(vm)
    if vm.state in SUSPENDED:
        raise SuspendedError(
            f"{vm.name}: the replica is suspended at the target, and takes nothing in",
            hint=f"hvfuse replication resume {vm.name} --replica",
        )


def demand_settled(vm: VmRecord) -> None:
    """Raises BusyError while disks are being moved to where the images are to be."""
    if vm.moving is not None:
        raise BusyError(
            f"{vm.name}: the disks in {vm.moving['folder']} are being handed over, and not all of them have been",
            hint=f"where they are: hvfuse replication reverse {vm.name}",
        )


def begun(txn: Txn, store: Store, vm: VmRecord, manifest: CycleManifest) -> VmRecord:
    """The VM once the manifest's cycle was begun; to be saved. Raises SuspendedError, and StateError where a replica
    that was failed over takes nothing in."""
    demand_open(vm)
    before = state(txn, store, vm)
    if manifest.kind is not CycleKind.COPY:
        _after(vm, before, Event.COMMIT_POINT)
        return vm
    is_first = manifest.previous is None and vm.position is None
    events = (Event.AWAIT_FIRST_COPY,) if is_first else (Event.NEED_RESYNC, Event.START)
    return _after(vm, before, *events)


def committed(txn: Txn, store: Store, vm: VmRecord, manifest: CycleManifest) -> VmRecord:
    """The VM once the manifest's cycle is committed; to be saved. Raises as `begun`."""
    demand_open(vm)
    if manifest.kind is CycleKind.COPY:  # its first recovery point has yet to come
        return vm
    return _after(vm, state(txn, store, vm), Event.COMMIT_POINT)


def abandoned(vm: VmRecord) -> VmRecord:
    """The VM once what was staged is dropped; to be saved."""
    return _after(vm, ReplicationState(vm.state), Event.CANCEL) if vm.state == _RESYNCING else vm


def suspend(store: Store, vm_name: str) -> ReplicationState:
    """Have the replica take nothing in until `resume`. Durable. Returns its state. Raises NotFoundError, StateError."""

    def act(txn: Txn) -> ReplicationState:
        vm = store.load_vm(txn, vm_name)
        return _saved(txn, store, _after(vm, state(txn, store, vm), Event.SUSPEND))

    return store.write("store:suspend", act)


def resume(store: Store, vm_name: str) -> ReplicationState:
    """Let the replica take cycles in again. As `suspend`."""

    def act(txn: Txn) -> ReplicationState:
        vm = store.load_vm(txn, vm_name)
        before = state(txn, store, vm)
        if before not in SUSPENDED:
            raise StateError(f"the replica of {vm_name} is {before}, and not suspended", hint="hvfuse store info")
        awaits = before is ReplicationState.SUSPENDED and not store.listed(txn, vm)
        return _saved(txn, store, _after(vm, before, Event.AWAIT_FIRST_COPY if awaits else Event.RESUME))

    return store.write("store:resume", act)


def _after(vm: VmRecord, before: ReplicationState, *events: Event) -> VmRecord:
    now = before
    for event in events:
        now = next_state(now, event, what=f"the replica of {vm.name}")
    return replace(vm, state=now.value)


def _saved(txn: Txn, store: Store, vm: VmRecord) -> ReplicationState:
    store.save_vm(txn, vm)
    return ReplicationState(vm.state)
