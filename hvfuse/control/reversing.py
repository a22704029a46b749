"""Reverse replication: the side that was failed over from gives way, and the side that has the VM replicates to it.

Two commands, one on each side, as neither can reach the other but by the store that they share:

    old source      its disks become the replica in its own store, and the shared store says where that is
    new source      looks there, and ships the VM to that store, or to one that it is told of

Nothing is copied whole: the disks are moved, and the resynchronisation compares them with what the VM has become. What
the old source wrote that never arrived at the target goes with it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from hvfuse import spool
from hvfuse.control import flows
from hvfuse.control.fence import Fence, read_replica
from hvfuse.control.job import JobKind
from hvfuse.control.protection import end_shipper, nobody_ships, was_interrupted
from hvfuse.control.records import VmRecord
from hvfuse.control.site import Site
from hvfuse.control.sole_server import nobody_serves
from hvfuse.errors import HvfuseError, NotFoundError, StateError, UsageError
from hvfuse.formats.image import is_disk_name
from hvfuse.shipper.orders import Orders
from hvfuse.states import AFTER_FAILOVER, Event, ReplicationState, next_state
from hvfuse.target import failing_over, handed_over
from hvfuse.target.failing_over import Party
from hvfuse.target.store import Store


def demand_taken_over(site: Site, party: Party) -> None:
    """Raises StateError where the VM was failed over to this home, and that is not committed, or not to its end."""
    if site.records.read(site.vm).state is not ReplicationState.DISABLED:
        return
    replica = read_replica(site.store_path, site.vm)
    if replica is not None and replica.failover is not None and replica.failover["home"] == party.home:
        raise StateError(
            f"{site.vm} was failed over to here, and is not this home's yet", hint=f"hvfuse failover commit {site.vm}"
        )


def give_way(site: Site, party: Party, fence: Fence, *, into: str, progress: handed_over.Progress) -> None:
    """Make this side the target: its disks become the replica in the store `into`.

    Idempotent: goes on where it was killed. Raises StateError (the VM was not failed over, or that is not committed),
    BusyError naming who uses a disk, NotFoundError, NoSpaceError.
    """
    before = site.records.read(site.vm)
    is_done = before.giving_way is None and before.gave_way_ns is not None and was_interrupted(site, JobKind.REVERSE)
    shared = site.store_path if before.giving_way is None else None

    def check() -> None:
        if shared is not None:
            _note_giving_way(site, fence, shared, into)
        alone.enter_context(nobody_serves(site.home, site.vm, clock=site.clock))

    def release() -> None:
        end_shipper(site)
        with nobody_ships(site), contextlib.suppress(OSError):  # they take up room, and nothing else
            spool.clear(site.home.folder(site.vm))

    def hand_over() -> str:
        kept = _kept(site)
        with Store(str(kept["store"])) as store:
            position = handed_over.take(
                store, site.vm, site.home.folder(site.vm), kept["disks"], primary=_party(kept["primary"]),
                epoch=int(kept["epoch"]), progress=progress,
            )  # fmt: skip
        for name in kept["disks"]:
            spool.forget(site.home.folder(site.vm), name)
        return f"{len(kept['disks'])} disks, at {position}"

    def invite() -> str:
        kept = _kept(site)
        with Store(str(kept["shared"]), create=False) as store:
            failing_over.invite(store, site.vm, {"store": kept["store"], **party.as_json()})
        site.records.apply(
            site.vm, Event.GIVE_WAY, enabled=None, held=None, prepared=None, giving_way=None, orders=Orders(),
            store=str(kept["store"]), gave_way_ns=site.clock.now_ns(), error=None, hint=None, point=None, cycle=0,
            generation=None, copy=None, progress=None, resync_reason=None, resync_cause=None, protected_since_ns=None,
            last_replication_time_ns=None, last_applied_time_ns=None,
        )  # fmt: skip
        with contextlib.suppress(FileNotFoundError):
            os.unlink(site.home.proofs(site.vm))  # of a replica that is none any more
        return str(kept["store"])

    acts: dict[flows.FlowStep, Callable[[], str | None]] = {
        flows.UNUSED: check,
        flows.RELEASE: release,
        flows.HAND_OVER: hand_over,
        flows.INVITE: invite,
    }
    steps = [step.name for step in flows.GIVE_WAY]
    command = ("replication", "reverse", site.vm, "--yes")
    with (
        contextlib.ExitStack() as alone,
        site.records.jobs.run(JobKind.REVERSE, site.vm, steps=steps, command=command) as job,
    ):
        if is_done:
            job.note("an earlier command had done so")
        else:
            flows.drive(job, flows.GIVE_WAY, acts)


def _note_giving_way(site: Site, fence: Fence, shared: str, into: str) -> None:
    """Put down what is to be done, before anything is: what is moved is not found in the folder any more."""
    fence.enforce()
    record = site.records.read(site.vm)
    if record.state not in AFTER_FAILOVER - {ReplicationState.PREPARED_FOR_FAILOVER}:
        raise _not_from_here(site.vm, record)
    next_state(record.state, Event.GIVE_WAY, what=site.vm)
    replica = read_replica(shared, site.vm)
    if replica is None or record.held is None:
        raise _not_from_here(site.vm, record)
    if os.path.realpath(shared) == os.path.realpath(into):
        raise UsageError(
            f"{into}: is the store of the other side: the disks need one of this home's own",
            hint=f"hvfuse replication reverse {site.vm} --into DIR",
        )
    disks = _disks(site)
    if not disks:
        raise NotFoundError(f"{site.home.folder(site.vm)}: there is no disk to hand over")
    side = replica.failover or replica.source or {}
    primary = {key: side[key] for key in ("home", "root", "host")}
    site.records.update(
        site.vm,
        giving_way={
            "disks": disks, "store": into, "shared": shared, "primary": primary, "epoch": replica.epoch,
        },
    )  # fmt: skip


def _not_from_here(vm: str, record: VmRecord) -> StateError:
    """Why there is nothing to reverse."""
    if record.state is ReplicationState.DISABLED and record.gave_way_ns is not None:
        hint = f"where the VM is: hvfuse replication reverse {vm}"
        return StateError(f"{vm}: its disks here have been made the replica already", hint=hint)
    what = "it was neither failed over from here nor, for good, to here"
    return StateError(f"{vm} is {record.state}: {what}", hint=f"hvfuse status {vm}")


def _disks(site: Site) -> list[str]:
    folder = site.home.folder(site.vm)
    found = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in found if is_disk_name(name) and name not in site.policy.exclude)


def _kept(site: Site) -> dict[str, Any]:
    kept = site.records.read(site.vm).giving_way
    assert kept is not None
    return kept


def _party(fields: dict[str, str]) -> Party:
    return Party(home=fields["home"], root=fields["root"], host=fields["host"])


def unsent_bytes(site: Site) -> int | None:
    """What the old source's logs hold that the other side never got, a lower bound of what goes with its disks; None if
    nobody can tell."""
    try:
        logs = spool.list_logs(site.home.folder(site.vm))
        return sum(log.header.stored_bytes for log in logs)
    except (OSError, HvfuseError):
        return None


# The side that has the VM --------------------------------------------------------------------------------------


def reverse(
    site: Site,
    party: Party,
    *,
    own: str,
    to: str | None,
    wait: Callable[[], None],
) -> str:
    """Replicate the VM from here on to where the old source gave way, or into the store `to`. Returns that store.

    `own`: the store by which it was failed over to here; `wait`: until its disks are hydrated.
    Raises StateError (not failed over to here; the old source has not given way), NotFoundError, UsageError,
    FencedError.
    """
    record = site.records.read(site.vm)
    is_turned = has_turned(site)
    if not is_turned:
        next_state(record.state, Event.REVERSE, what=site.vm)
    kept: dict[str, str] = {}

    def choose() -> str:
        with contextlib.suppress(NotFoundError, StateError), Store(own, create=False) as store:
            failing_over.let_go(store, site.vm, party)  # where the one who hydrated the disks had died before that
        kept["to"] = to or _invited(site, own)
        _demand_store(site, party, kept["to"], own=own, epoch=record.epoch)
        return kept["to"]

    def turn() -> None:
        site.records.apply(site.vm, Event.REVERSE, store=kept["to"], enabled=True, orders=Orders(now=True))

    acts: dict[flows.FlowStep, Callable[[], str | None]] = {flows.TARGET: choose, flows.WAIT: wait, flows.TURN: turn}
    steps = [step.name for step in flows.REVERSE]
    command = ("replication", "reverse", site.vm, *(("--to", to) if to else ()), "--yes")
    with site.records.jobs.run(JobKind.REVERSE, site.vm, steps=steps, command=command) as job:
        if is_turned:
            job.note("an earlier command had done so")
            return str(record.store)
        flows.drive(job, flows.REVERSE, acts)
    return kept["to"]


def has_turned(site: Site) -> bool:
    """Whether replication was turned round, and whoever had done so died at once."""
    record = site.records.read(site.vm)
    is_source = record.state not in AFTER_FAILOVER | {ReplicationState.DISABLED}
    return is_source and record.store is not None and was_interrupted(site, JobKind.REVERSE)


def _invited(site: Site, own: str) -> str:
    """Where the old source gave way to."""
    with Store(own, create=False, read_only=True) as store:
        vm = store.vm(site.vm)
    if vm.returns_to is None:
        raise StateError(
            f"{site.vm}: the side that it was failed over from has not given way yet",
            hint=f"there: hvfuse replication reverse {site.vm}; "
            f"to another place: hvfuse replication reverse {site.vm} --to STORE",
        )
    return str(vm.returns_to["store"])


def _demand_store(site: Site, party: Party, path: str, *, own: str, epoch: int) -> None:
    """Raises UsageError, NotFoundError, FencedError if the VM cannot be shipped there."""
    if os.path.realpath(path) == os.path.realpath(own):
        raise UsageError(f"{path}: is this home's own store; a replica there would be lost together with the VM")
    try:
        replica = read_replica(path, site.vm)
    except NotFoundError:
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise
        return
    if replica is not None:
        failing_over.demand_claim(replica, failing_over.Claim(party=party, epoch=epoch))
