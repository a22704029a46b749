"""Planned failover as the source does it: nothing is lost, and that is proved before the other side takes over.

The state becomes PreparedForFailover with the first step that changes anything; from then on the disks are read-only,
and stay so over any crash, until `hvfuse failover cancel` or the target's failover. The last thing is one transaction
in the store: it takes nothing in any more, and says what was proved. Until then the same command goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from hvfuse import wire
from hvfuse.control import flows
from hvfuse.control.fence import ANSWER_SECONDS, deciding, read_replica, tell_tracker
from hvfuse.control.job import JobKind
from hvfuse.control.protection import LOCK_SECONDS, LOOK_SECONDS, end_shipper, was_interrupted
from hvfuse.control.records import VmRecord
from hvfuse.control.site import Site
from hvfuse.control.sole_server import start_tracker
from hvfuse.control.supervisor import require_mountable
from hvfuse.errors import BusyError, StateError, UnreachableError
from hvfuse.shipper.cycle import CycleReport
from hvfuse.states import AFTER_FAILOVER, FAILOVER_DONE, FAILOVER_OPEN, Event, ReplicationState, next_state
from hvfuse.target import failing_over
from hvfuse.target.failing_over import Claim, Party

HELD = "a planned failover is prepared"


class Shipping(Protocol):
    """What ships the VM in this process: `hvfuse.shipper.service.Shipper`."""

    def cycle_now(self) -> CycleReport: ...

    def prove(self, *, progress: Callable[[int, int], None]) -> Mapping[str, Any]:
        """Compare all blocks of all disks with the replica. Returns "bytes" and "disks". Raises CorruptError."""


def prepare(
    site: Site,
    party: Party,
    *,
    ship: Callable[[], AbstractContextManager[Shipping]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Prepare a planned failover. Returns the id of the last recovery point. Idempotent; raises BusyError naming who
    uses a disk, StateError, CorruptError (the sides differ), UnreachableError, FencedError."""
    record = site.records.read(site.vm)
    next_state(record.state, Event.PREPARE_FAILOVER, what=site.vm)
    kept: dict[str, Any] = {}

    def ship_last() -> str:
        end_shipper(site)
        if _is_closed(site, party, kept):
            return f"recovery point {kept['point']}, before"
        with _patiently(site, ship) as shipping:
            report = shipping.cycle_now()
            kept["point"] = report.point
        return f"recovery point {report.point}"

    def prove() -> str:
        if "proof" in kept:
            return "they were equal, and nothing was written or taken in since"
        with _patiently(site, ship) as shipping:
            kept["proof"] = dict(shipping.prove(progress=progress))
        return f"{kept['proof']['bytes']} bytes of {kept['proof']['disks']} disks are equal"

    def close() -> str:
        with site.location.open() as store:
            claim = Claim(party=party, epoch=site.records.read(site.vm).epoch)
            failing_over.prepare(store, site.vm, claim, point_id=kept["point"], proof=kept["proof"])
        site.records.update(site.vm, prepared={"point": kept["point"], **kept["proof"]})
        return f"at recovery point {kept['point']}"

    acts: dict[flows.FlowStep, Callable[[], str | None]] = {
        flows.UNUSED: lambda: _hold_if_unused(site),
        flows.HOLD: lambda: _hold(site),
        flows.LAST: ship_last,
        flows.PROVE: prove,
        flows.CLOSE: close,
    }
    steps = [step.name for step in flows.PREPARE]
    command = ("failover", "planned", site.vm, "--yes")
    with site.records.jobs.run(JobKind.PLANNED_FAILOVER, site.vm, steps=steps, command=command) as job:
        flows.drive(job, flows.PREPARE, acts)
    return str(kept["point"])


def _is_closed(site: Site, party: Party, kept: dict[str, Any]) -> bool:
    """Whether the replica is closed already, as whoever had done so died at once; then "point" and "proof" are `kept`.
    It is opened before the disks are let go: nothing was written since."""
    replica = read_replica(site.store_path, site.vm)
    if replica is None or replica.prepared is None or replica.primary != party.home:
        return False
    kept.update(point=replica.prepared["point"], proof=dict(replica.prepared["proof"]))
    return True


def _hold_if_unused(site: Site) -> None:
    """The disks refuse writes from here on, and nobody had one open."""
    if not site.is_mounted:
        require_mountable()
        site.home.make_vm(site.vm)
        start_tracker(site.home, site.vm, clock=site.clock)
    wire.request(site.home.tracker_socket(site.vm), "hold", timeout=ANSWER_SECONDS, reason=HELD, only_if_unused=True)


def _hold(site: Site) -> None:
    """Durably. Whoever looked at the fence in between has let them go again."""
    with deciding(site.home, site.vm):
        record = site.records.apply(site.vm, Event.PREPARE_FAILOVER, held=HELD, error=None, hint=None)
        tell_tracker(site.home, site.vm, record.held)


@contextlib.contextmanager
def _patiently(site: Site, ship: Callable[[], AbstractContextManager[Shipping]]) -> Any:
    """Ship as soon as whoever did so until now has ended."""
    deadline = site.clock.monotonic() + LOCK_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                shipping = stack.enter_context(ship())
                break
            except BusyError:
                if site.clock.monotonic() >= deadline:
                    raise
            site.clock.sleep(LOOK_SECONDS)
        yield shipping


def _nothing_to_cancel(vm: str, record: VmRecord) -> StateError:
    if record.state in FAILOVER_DONE and record.held is None:
        what, hint = "its failover is committed, from which nothing leads back", f"hvfuse replication reverse {vm}"
    elif record.state in FAILOVER_OPEN | FAILOVER_DONE:
        what, hint = f"{record.held or 'another side has it'}", "do it there"
    else:
        what, hint = "no failover is prepared", f"hvfuse status {vm}"
    return StateError(f"{vm} is {record.state}: {what}", hint=hint)


def cancel(site: Site, party: Party) -> None:
    """Take a preparation back: the VM is replicated as before. Idempotent. Raises StateError where there is none,
    FencedError if the target has failed over by now."""
    record = site.records.read(site.vm)
    # One that died before it had written anything down may have left the disks held, and a cancel its job unended.
    is_left = record.state not in AFTER_FAILOVER and any(
        was_interrupted(site, kind) for kind in (JobKind.PLANNED_FAILOVER, JobKind.CANCEL_FAILOVER)
    )
    if record.state is not ReplicationState.PREPARED_FOR_FAILOVER and not is_left:
        raise _nothing_to_cancel(site.vm, record)

    def reopen() -> None:
        with site.location.open() as store:
            claim = Claim(party=party, epoch=site.records.read(site.vm).epoch)
            failing_over.withdraw(store, site.vm, claim)

    def let_go() -> None:
        with deciding(site.home, site.vm):
            if not is_left:
                site.records.apply(site.vm, Event.CANCEL_FAILOVER, held=None, prepared=None)
            with contextlib.suppress(UnreachableError):  # one that does not run holds nothing
                tell_tracker(site.home, site.vm, None)

    steps = [step.name for step in flows.REOPEN]
    command = ("failover", "cancel", site.vm, "--yes")
    with site.records.jobs.run(JobKind.CANCEL_FAILOVER, site.vm, steps=steps, command=command) as job:
        flows.drive(job, flows.REOPEN, dict(zip(flows.REOPEN, (reopen, let_go), strict=True)))
