"""Who has a VM: the fence between two sides, and the replica's part of a failover. All in the VM's record.

What must hold, whoever dies when, and whoever acts at the same time:

    1  `primary` names the one home that may write the VM's disks and ship them. Nothing is taken in from another, and
       nothing from anybody while the VM is failed over, or just about to be.
    2  `epoch` rises with every failover, and with what takes one back. A source that ships has to know it: one that was
       away while it rose has to look at what became of the VM first (FencedError), and take the new one over.
    3  A failover belongs to the one home that began it (`failover["home"]`). Until it is committed nothing of the
       replica goes, not even by retention, and `primary` is who it was: to cancel it is one transaction. Once it is
       committed, `primary` is that home, for good.
    4  What says so outlives the replica: neither `let_go` nor the deletion of a replica (`hvfuse.target.removal`) takes
       the record of a committed failover away; only another home's disks that are handed over do.

Every act is one transaction, and does nothing where it was done before: what asks for it may die and ask again. The
record's fields:

    source       {"home", "root", "host"}: the home that ships, for messages
    prepared     a planned failover was prepared: {"point", "epoch", "since_ns", "proof"}; `proof`: what was compared
    failover     {"kind", "point", "point_ns", "pin", "epoch", "home", "root", "host", "since_ns", "committed_ns",
                 "hydrated_ns"}
    returns_to   where the VM may be shipped to from here on: {"store", "home", "root", "host"}; put there by the side
                 that gave way
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hvfuse.errors import FencedError, NotFoundError, StateError
from hvfuse.states import AFTER_FAILOVER, FAILOVER_DONE, FAILOVER_OPEN, Event, ReplicationState, next_state
from hvfuse.target import relation, removal
from hvfuse.target.environment import Txn
from hvfuse.target.schema import VmRecord
from hvfuse.target.store import Store

PIN_KIND = "failover"
"""Of the pin that holds the point of a failover."""

PLANNED, UNPLANNED = "planned", "unplanned"
"""Kinds of a failover."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """A home as others know it. `home`: its id; `root`: its directory, on `host`."""

    home: str
    root: str
    host: str

    def as_json(self) -> dict[str, str]:
        return {"home": self.home, "root": self.root, "host": self.host}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Who ships, and the epoch under which it believes to have the VM."""

    party: Party
    epoch: int = 0


def state_of(vm: VmRecord) -> ReplicationState:
    """The replica's state; of stores of before, which know of no failover, Replicating. Raises CorruptError."""
    return relation.known(vm) if vm.state else ReplicationState.REPLICATING


def where(party: Mapping[str, Any] | None) -> str:
    """A home in words."""
    return f"{party['root']} on {party['host']}" if party else "another home"


# Who ships ----------------------------------------------------------------------------------------------------


def demand_claim(vm: VmRecord, claim: Claim | None) -> None:
    """Raises FencedError if nothing is taken in, or if whoever claims the VM must not ship it. None: nobody says who
    ships, so that the state alone counts."""
    if vm.failover is not None and state_of(vm) in AFTER_FAILOVER:
        raise FencedError(
            f"{vm.name} was failed over to {where(vm.failover)}: nothing is taken in", hint=f"hvfuse status {vm.name}"
        )
    if state_of(vm) is ReplicationState.PREPARED_FOR_FAILOVER:
        raise FencedError(f"{vm.name}: a planned failover is prepared: nothing is taken in any more")
    if state_of(vm) in AFTER_FAILOVER:
        raise FencedError(f"{vm.name}: the replica is {vm.state}: nothing is taken in")
    if claim is None:
        return
    if vm.primary not in ("", claim.party.home):
        raise FencedError(
            f"{vm.name}: the store has the replica of a VM of that name that belongs to {where(vm.source)}",
            hint="ship it into another store ([replication] target), or under another name",
        )
    if claim.epoch < vm.epoch:
        raise FencedError(
            f"{vm.name}: it was failed over meanwhile (epoch {vm.epoch}, {claim.epoch} is known here)",
            hint=f"hvfuse status {vm.name}",
        )


def claimed(txn: Txn, store: Store, vm: VmRecord, claim: Claim | None) -> VmRecord:
    """The VM once `claim` ships it; to be saved. Raises FencedError."""
    demand_claim(vm, claim)
    if claim is None:
        return vm
    if claim.epoch > vm.epoch:  # it was failed over by way of another store
        store.raise_epoch(txn, above=claim.epoch - 1)
    epoch = max(vm.epoch, claim.epoch)
    return replace(vm, primary=claim.party.home, source=claim.party.as_json(), epoch=epoch)


# Planned failover: the source's part ---------------------------------------------------------------------------


def prepare(store: Store, vm_name: str, claim: Claim, *, point_id: str, proof: Mapping[str, Any]) -> None:
    """From now on nothing is taken in: the point is the last one, and holds all that the source has. The VM is
    `claim`'s, if it was nobody's yet.

    Raises FencedError, StateError, NotFoundError (the newest point is another one).
    """

    def act(txn: Txn) -> None:
        vm = store.load_vm(txn, vm_name)
        state = relation.state(txn, store, vm)
        done = vm.prepared is not None and vm.prepared["point"] == point_id
        if state is ReplicationState.PREPARED_FOR_FAILOVER and done and vm.primary == claim.party.home:
            return
        vm = claimed(txn, store, vm, claim)
        after = next_state(state, Event.PREPARE_FAILOVER, what=f"the replica of {vm_name}")
        point = store.load_point(txn, vm, point_id)
        if point.seq != vm.head_seq:
            raise NotFoundError(f"{vm_name}: {point_id} is not the newest cycle at the target")
        kept = {"point": point_id, "epoch": vm.epoch, "since_ns": store.clock.now_ns(), "proof": dict(proof)}
        store.save_vm(txn, replace(vm, state=after.value, prepared=kept))

    store.write("failover:prepare", act)


def withdraw(store: Store, vm_name: str, claim: Claim) -> None:
    """Take a preparation back. Raises FencedError if the VM was failed over by now; StateError, NotFoundError."""

    def act(txn: Txn) -> None:
        vm = store.load_vm(txn, vm_name)
        state = relation.state(txn, store, vm)
        if state is not ReplicationState.PREPARED_FOR_FAILOVER:
            demand_claim(vm, claim)
            return
        if vm.primary not in ("", claim.party.home):
            raise FencedError(f"{vm_name}: it belongs to {where(vm.source)}")
        after = next_state(state, Event.CANCEL_FAILOVER, what=f"the replica of {vm_name}")
        store.save_vm(txn, replace(vm, state=after.value, prepared=None))

    store.write("failover:withdraw", act)


# Failover: the target's part -----------------------------------------------------------------------------------


def fail_over(
    store: Store,
    vm_name: str,
    me: Party,
    *,
    kind: str,
    point_id: str,
    comes_home: bool = False,
    is_newest: bool = False,
) -> VmRecord:
    """Fail the VM over to the home `me` at a recovery point, which is pinned. Returns the VM's record. `is_newest`: at
    the newest point by now, whichever that is: one that the source was told of must not be left out.

    Idempotent for the same home and point. Raises StateError (not possible now, or another failover stands),
    NotFoundError.
    """
    event = Event.FAIL_BACK if comes_home else Event.FAIL_OVER

    def act(txn: Txn) -> VmRecord:
        vm = store.load_vm(txn, vm_name)
        state = relation.state(txn, store, vm)
        if state in FAILOVER_OPEN:
            return _demand_same(vm, me, point_id)
        after = next_state(state, event, what=f"the replica of {vm_name}")
        if kind == PLANNED:
            _demand_prepared(vm, state, point_id)
        newest = store.newest_point(txn, vm) if is_newest else None
        point = newest or store.load_point(txn, vm, point_id)
        epoch = store.raise_epoch(txn, above=vm.epoch)
        failover = {
            "kind": kind, "point": point.id, "pin": _put_pin(txn, store, vm, point.id, me), "epoch": epoch,
            **me.as_json(), "since_ns": store.clock.now_ns(), "point_ns": point.time_ns,
        }  # fmt: skip
        vm = replace(vm, state=after.value, epoch=epoch, prepared=None, failover=failover, returns_to=None)
        store.save_vm(txn, vm)
        return vm

    return store.write("failover:begin", act)


def _demand_same(vm: VmRecord, me: Party, point_id: str) -> VmRecord:
    demand_mine(vm, me)
    assert vm.failover is not None
    if vm.failover["point"] != point_id:
        raise StateError(
            f"{vm.name} is failed over at recovery point {vm.failover['point']}",
            hint=f"hvfuse failover change-point {vm.name} --point {point_id}",
        )
    return vm


def _demand_prepared(vm: VmRecord, state: ReplicationState, point_id: str) -> None:
    if state is not ReplicationState.PREPARED_FOR_FAILOVER or vm.prepared is None:
        raise StateError(
            f"the replica of {vm.name} is {state}: its source has not prepared a planned failover",
            hint=f"on the source: hvfuse failover planned {vm.name}; "
            f"if the source is lost: hvfuse failover unplanned {vm.name}",
        )
    if vm.prepared["point"] != point_id:
        raise StateError(f"{vm.name}: a planned failover is at the last point, {vm.prepared['point']}")


def _put_pin(txn: Txn, store: Store, vm: VmRecord, point_id: str, me: Party) -> int:
    return store.put_pin(txn, vm, store.load_point(txn, vm, point_id), {"kind": PIN_KIND, **me.as_json()})


def demand_mine(vm: VmRecord, me: Party) -> Mapping[str, Any]:
    """The VM's failover. Raises StateError if there is none, or it is another home's."""
    if vm.failover is None:
        raise StateError(
            f"the replica of {vm.name} is {state_of(vm)}: it is not failed over",
            hint=f"hvfuse status {vm.name}",
        )
    if vm.failover["home"] != me.home:
        raise StateError(f"{vm.name} is failed over to {where(vm.failover)}", hint="do it there")
    return vm.failover


def change_point(store: Store, vm_name: str, me: Party, point_id: str) -> VmRecord:
    """Have the VM failed over at another point instead. What was written meanwhile is the caller's to drop, before.
    Idempotent. Raises StateError, NotFoundError."""

    def act(txn: Txn) -> VmRecord:
        vm = store.load_vm(txn, vm_name)
        failover = demand_mine(vm, me)
        after = next_state(state_of(vm), Event.CHANGE_POINT, what=f"the replica of {vm_name}")
        if failover["point"] == point_id:
            return vm
        point = store.load_point(txn, vm, point_id)
        pin = _put_pin(txn, store, vm, point_id, me)
        store.delete_pin(txn, int(failover["pin"]))
        vm = replace(
            vm, state=after.value, failover={**failover, "point": point_id, "pin": pin, "point_ns": point.time_ns}
        )
        store.save_vm(txn, vm)
        return vm

    return store.write("failover:point", act)


def cancel(store: Store, vm_name: str, me: Party) -> VmRecord:
    """The VM is its source's again; the epoch rises, so that the source looks. Idempotent. Raises StateError."""

    def act(txn: Txn) -> VmRecord:
        vm = store.load_vm(txn, vm_name)
        if vm.failover is None and state_of(vm) not in AFTER_FAILOVER:
            return vm
        failover = demand_mine(vm, me)
        after = next_state(state_of(vm), Event.CANCEL_FAILOVER, what=f"the replica of {vm_name}")
        store.delete_pin(txn, int(failover["pin"]))
        vm = replace(vm, state=after.value, epoch=store.raise_epoch(txn, above=vm.epoch), failover=None)
        store.save_vm(txn, vm)
        return vm

    return store.write("failover:cancel", act)


def commit(store: Store, vm_name: str, me: Party) -> VmRecord:
    """The VM is this home's for good, and its other recovery points are let go, but for those that somebody else still
    holds: these go with the replica. Idempotent. Raises StateError."""

    def act(txn: Txn) -> VmRecord:
        vm = store.load_vm(txn, vm_name)
        failover = demand_mine(vm, me)
        if state_of(vm) in FAILOVER_DONE:
            return vm
        after = next_state(state_of(vm), Event.COMMIT_FAILOVER, what=f"the replica of {vm_name}")
        held = {pin.seq for pin in store.scan_pins(txn) if pin.vm == vm_name}
        for point in list(store.scan_points(txn, vm)):
            if point.seq not in held:
                store.save_cycle(txn, vm, point.unlisted())
        kept = {**failover, "committed_ns": store.clock.now_ns()}
        vm = replace(vm, state=after.value, primary=me.home, source=me.as_json(), failover=kept)
        store.save_vm(txn, vm)
        return vm

    return store.write("failover:commit", act)


def let_go(store: Store, vm_name: str, me: Party) -> None:
    """The disks are hydrated: delete the replica's data. What says who has the VM stays, so that whoever comes back
    is told. Idempotent, goes on where it was killed. Raises StateError, BusyError (a test failover stands, or the
    images are being written)."""
    _demand_committed(store.vm(vm_name), me)

    def keep(vm: VmRecord) -> VmRecord:
        failover = _demand_committed(vm, me)  # again: by now it may have been handed over
        return replace(vm, failover={**failover, "hydrated_ns": failover.get("hydrated_ns") or store.clock.now_ns()})

    removal.empty(store, vm_name, keep, own_pin=lambda vm: int(_demand_committed(vm, me)["pin"]))


def _demand_committed(vm: VmRecord, me: Party) -> Mapping[str, Any]:
    failover = demand_mine(vm, me)
    if state_of(vm) not in FAILOVER_DONE:
        raise StateError(
            f"{vm.name}: its failover is not committed, the replica is {state_of(vm)}",
            hint=f"hvfuse failover commit {vm.name}",
        )
    return failover


# Reverse replication -------------------------------------------------------------------------------------------


def invite(store: Store, vm_name: str, returns_to: Mapping[str, Any]) -> None:
    """Put down where the VM may be shipped to by who has it now. Durable. Raises NotFoundError, StateError (nobody has
    it by a committed failover)."""

    def act(txn: Txn) -> None:
        vm = store.load_vm(txn, vm_name)
        if state_of(vm) not in FAILOVER_DONE:
            raise StateError(f"the replica of {vm_name} is {state_of(vm)}: no failover is committed")
        store.save_vm(txn, replace(vm, returns_to=dict(returns_to)))

    store.write("failover:invite", act)


def awaiting(txn: Txn, store: Store, vm: VmRecord, primary: Party, *, epoch: int) -> VmRecord:
    """The VM once this store has become its target, or has again; to be saved. `primary`: who will ship it. Raises
    StateError (a failover stands that is not committed, or is prepared)."""
    state = relation.state(txn, store, vm)
    if state in AFTER_FAILOVER:
        state = next_state(state, Event.GIVE_WAY, what=f"the replica of {vm.name}")
    state = next_state(state, Event.AWAIT_FIRST_COPY, what=f"the replica of {vm.name}")
    above = max(vm.epoch, epoch)
    if above > vm.epoch:
        store.raise_epoch(txn, above=above - 1)
    return replace(
        vm, state=state.value, primary=primary.home, source=primary.as_json(), epoch=above, prepared=None,
        failover=None, returns_to=None,
    )  # fmt: skip
