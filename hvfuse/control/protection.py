"""Protection as an administrator orders it: enable, suspend, resume, disable.

Enable and disable are jobs with a step for each check and each act. Every act is durable before the next begins, and
none minds being done again: killed anywhere, the same command goes on to the end.

Whoever ships a VM looks at its record once it has the VM's lock, and disabling writes the record before it takes that
lock: so once a VM was disabled, nobody ships it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from hvfuse import spool, system, wire
from hvfuse.control.daemon import serving_pid, wait_for_end
from hvfuse.control.fence import tell_tracker
from hvfuse.control.guest import GuardedGuest
from hvfuse.control.home import Home
from hvfuse.control.job import INTERRUPTED, JobError, JobKind, JobState
from hvfuse.control.jobs import Running
from hvfuse.control.location import opened
from hvfuse.control.prerequisites import Check, Outcome, demand, make_checks, names
from hvfuse.control.records import resuming
from hvfuse.control.site import Site
from hvfuse.errors import BusyError, HvfuseError, NotFoundError, StateError, UnreachableError
from hvfuse.shipper.orders import Orders
from hvfuse.states import Event, ReplicationState, next_state
from hvfuse.target import relation, removal
from hvfuse.target.usage import usage
from hvfuse.tracker.vm import TrackedVm

ANSWER_SECONDS = 60.0
END_SECONDS = 20.0
"""So long a shipper may take to end; it may be killed at any time without loss."""
LOCK_SECONDS = 30.0
LOOK_SECONDS = 0.1

MAKE_STEP = "make the relationship"
DISABLE_STEP, END_STEP, LOGS_STEP, DELETE_STEP = (
    "disable replication", "end the shipper", "give up the logs", "delete the replica",
)  # fmt: skip

_SUSPENDED = (ReplicationState.SUSPENDED, ReplicationState.RESYNCHRONIZE_SUSPENDED)
_log = logging.getLogger(__name__)


# Enable -------------------------------------------------------------------------------------------------------


def enable(site: Site, *, tell: Callable[[list[Check]], None] = lambda checks: None) -> list[Check]:
    """Protect a VM, if every prerequisite is met. `tell` gets the checks in any case. Returns them. Raises what
    `demand` raises."""
    goes_on = was_interrupted(site, JobKind.ENABLE)
    is_made = site.records.read(site.vm).enabled and goes_on
    command = ("replication", "enable", site.vm)
    with site.records.jobs.run(JobKind.ENABLE, site.vm, steps=(*names(), MAKE_STEP), command=command) as job:
        if is_made:  # and then it is no reason to refuse that it is protected
            job.step(MAKE_STEP, "an earlier command had done so")
            return []
        checks = make_checks(site, begin=job.step, made=partial(_note, job))
        tell(checks)
        job.step(MAKE_STEP)
        demand(site, checks)
        # To compare with a replica that was kept is asked for hereby; when a first copy begins, the policy says.
        orders = Orders(now=_has_position(site))
        site.records.apply(site.vm, Event.ENABLE, enabled=True, orders=orders, error=None, hint=None)
    return checks


def _note(job: Running, check: Check) -> None:
    if check.error is not None:
        job.step_failed(check.name, JobError.of(check.error))
    else:
        job.note(check.text if check.outcome is Outcome.PASSED else f"{check.outcome}: {check.text}")


def _has_position(site: Site) -> bool:
    with contextlib.suppress(NotFoundError), site.location.open(read_only=True) as store:
        return store.vm(site.vm).position is not None
    return False


def was_interrupted(site: Site, kind: JobKind) -> bool:
    """Whether the last job of that kind was cut off in the middle."""
    site.records.jobs.bury()
    last = next((job for job in reversed(site.records.jobs.all()) if job.vm == site.vm and job.kind is kind), None)
    return (
        last is not None
        and last.state in (JobState.FAILED, JobState.CANCELLED)
        and (last.state is JobState.CANCELLED or any(error.id == INTERRUPTED for error in last.errors))
    )


# Suspend and resume -------------------------------------------------------------------------------------------


def suspend(site: Site) -> ReplicationState:
    """Ship nothing until `resume`; writes are logged. Returns the state. Raises StateError."""
    next_state(site.records.read(site.vm).state, Event.SUSPEND, what=site.vm)
    if not _told_shipper(site, "pause"):
        site.records.apply(site.vm, Event.SUSPEND)
        site.records.change_orders(site.vm, Orders.pause)
        return site.records.read(site.vm).state
    # The shipper shows it when it comes to it; a frame may be under way.
    return next_state(site.records.read(site.vm).state, Event.SUSPEND, what=site.vm)


def resume(site: Site) -> ReplicationState:
    """Go on with all that was suspended, or try again what failed. Returns the state. Raises StateError."""
    record, orders = site.records.read(site.vm), site.records.orders(site.vm)
    has_something = orders.paused or orders.suspended or record.error is not None
    if record.state is ReplicationState.DISABLED or not has_something:
        next_state(record.state, Event.RESUME, what=site.vm)
    if _told_shipper(site, "unpause"):  # it shows it when it comes to it; a frame may be under way
        state = record.state
        for event in resuming(record, orders.unpause()):
            state = next_state(state, event, what=site.vm)
        return state
    site.records.change_orders(site.vm, Orders.unpause)
    site.records.of(site.vm).resume()
    return site.records.read(site.vm).state


def _told_shipper(site: Site, op: str) -> bool:
    """Have the VM's shipper carry an order out; whether one runs."""
    socket = site.home.shipper_socket(site.vm)
    if not os.path.exists(socket) or serving_pid(socket) is None:
        return False
    wire.request(socket, op, timeout=ANSWER_SECONDS)
    return True


def suspend_replica(site: Site) -> ReplicationState:
    """Have the store take nothing in for the VM. Returns the replica's state. Raises NotFoundError, StateError."""
    with site.location.open() as store:
        return relation.suspend(store, site.vm)


def resume_replica(site: Site) -> ReplicationState:
    """Take that back, and have a shipper that runs here know at once. As `suspend_replica`."""
    with site.location.open() as store:
        state = relation.resume(store, site.vm)
    with contextlib.suppress(UnreachableError):  # it comes back by itself, if later
        _told_shipper(site, "wake")
    return state


# Disable ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """What the store has of a VM. `bytes`: of images and journal."""

    points: int
    bytes: int
    is_half_deleted: bool = False


def replica(site: Site) -> Replica | None:
    """What would be deleted with the VM's replica; None if there is none. Raises StoreMissingError, UnreachableError
    where nobody can tell."""
    with opened(site.location, read_only=True) as store:
        if store is None:
            return None
        found = next((vm for vm in usage(store).vms if vm.name == site.vm), None)
        if found is not None:
            return Replica(points=found.points, bytes=found.journal_bytes + found.base_bytes)
        return Replica(points=0, bytes=0, is_half_deleted=True) if removal.is_half_done(store, site.vm) else None


def demand_disablable(site: Site, *, delete_replica: bool) -> None:
    """Raises StateError where there is nothing to disable, BusyError where a recovery point is in use that would be
    deleted."""
    record = site.records.read(site.vm)
    is_off = record.state is ReplicationState.DISABLED and record.enabled is False
    has_more_to_do = was_interrupted(site, JobKind.DISABLE) or (delete_replica and replica(site) is not None)
    if is_off and not has_more_to_do:
        raise StateError(f"{site.vm}: replication was disabled before; allowed: enable")
    if not delete_replica:
        return
    with opened(site.location, read_only=True) as store:
        for pin in removal.holders(store, site.vm) if store is not None else ():
            raise BusyError(
                f"{site.vm}: recovery point {pin.point_id} is in use ({pin.owner.get('kind')} {pin.id}): the "
                "replica stays",
                hint=f"hvfuse failover cleanup {site.vm}",
            )


def disable(site: Site, *, delete_replica: bool) -> None:
    """End the replication of a VM; its disks are served as before. Raises what `demand_disablable` raises, and
    BusyError, UnreachableError: then the same command goes on."""
    demand_disablable(site, delete_replica=delete_replica)
    steps = (DISABLE_STEP, END_STEP, LOGS_STEP, *((DELETE_STEP,) if delete_replica else ()))
    command = ("replication", "disable", site.vm, *(("--delete-replica", "--yes") if delete_replica else ()))
    with site.records.jobs.run(JobKind.DISABLE, site.vm, steps=steps, command=command) as job:
        job.step(DISABLE_STEP)
        _write_off(site)
        job.step(END_STEP)
        end_shipper(site)
        with nobody_ships(site):
            GuardedGuest(site.vm, lambda: site.policy.guest, site.home.guest(site.vm)).thaw_leftover()
            job.step(LOGS_STEP)
            _give_up_logs(site, job)
            if delete_replica:
                job.step(DELETE_STEP)
                _delete_replica(site)


def _write_off(site: Site) -> None:
    """From here on neither supervisor nor shipper brings it back."""
    record = site.records.read(site.vm)
    events = () if record.state is ReplicationState.DISABLED else (Event.DISABLE,)
    site.records.apply(
        site.vm, *events, enabled=False, orders=Orders(paused=True), error=None, hint=None, copy=None, progress=None,
        copy_due_ns=None, resync_reason=None, resync_cause=None, shipper_error=None, protected_since_ns=None, held=None,
        prepared=None, giving_way=None,
    )  # fmt: skip


def end_shipper(site: Site) -> None:
    """End the VM's shipper, if one runs here."""
    pid = _serving(site.home, site.home.shipper_socket(site.vm))
    if pid is None:
        return
    with contextlib.suppress(UnreachableError):
        wire.request(site.home.shipper_socket(site.vm), "stop", timeout=END_SECONDS)
    if not wait_for_end(pid, END_SECONDS):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_for_end(pid, END_SECONDS)


def _serving(home: Home, socket: str) -> int | None:
    return serving_pid(socket) if os.path.exists(socket) else None


@contextlib.contextmanager
def nobody_ships(site: Site) -> Iterator[None]:
    """Hold the lock of whoever ships the VM. Raises BusyError."""
    if not os.path.isdir(site.home.state_dir(site.vm)):  # nobody ever did
        yield
        return
    deadline = site.clock.monotonic() + LOCK_SECONDS
    while True:
        with system.exclusive_lock(site.home.shipper_lock(site.vm)) as had:
            if had:
                yield
                return
        if site.clock.monotonic() >= deadline:
            raise BusyError(
                f"{site.vm}: another process is replicating it just now",
                hint="the same command goes on once that has ended",
            )
        site.clock.sleep(LOOK_SECONDS)


def _give_up_logs(site: Site, job: Running) -> None:
    """Have the tracker stop logging; where none runs, do it in its place. One that begins meanwhile does it by itself,
    as the record says so."""
    deadline = site.clock.monotonic() + LOCK_SECONDS
    while True:
        if _serving(site.home, site.home.tracker_socket(site.vm)) is not None:
            wire.request(site.home.tracker_socket(site.vm), "end", timeout=ANSWER_SECONDS)
            tell_tracker(site.home, site.vm, None)  # what another side has of the VM concerns this one no more
            return None
        try:
            return _give_up_at_rest(site, job)
        except BusyError:
            if site.clock.monotonic() >= deadline:
                raise
        site.clock.sleep(LOOK_SECONDS)


def _give_up_at_rest(site: Site, job: Running) -> None:
    folder = site.home.folder(site.vm)
    found = os.listdir(folder) if os.path.isdir(folder) else []
    if not any(spool.state_name(name) in found for name in found):
        return job.note("it was never tracked")
    vm = TrackedVm(site.vm, folder, exclude=site.policy.exclude)
    try:
        vm.attach()
        vm.end()
        vm.detach()
    except BusyError:
        raise
    except (HvfuseError, OSError) as error:
        job.note(f"not now, but when it is mounted next: {error}")
    finally:
        vm.close()
    return None


def _delete_replica(site: Site) -> None:
    with opened(site.location) as store, contextlib.suppress(NotFoundError):
        if store is not None:
            removal.remove(store, site.vm)
    site.records.update(
        site.vm, point=None, cycle=0, generation=None, last_replication_time_ns=None, last_applied_time_ns=None,
        last_copy=None, last_app_consistent_ns=None,
    )  # fmt: skip
