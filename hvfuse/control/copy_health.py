"""What a copy that is needed, under way, ordered or suspended adds to a VM's health, and what verification found. Pure.

Critical   resync-required       a resynchronisation is required and not under way: it waits, is suspended, was
                                 cancelled
           verify-mismatch       verification found that the replica differs from the disks
Warning    copying               a copy is under way
           initial-replication   the first copy is not under way: it waits, is suspended, was cancelled
           copies-suspended      copies are suspended although none is needed now
           repair-unproved       what verification found to differ was copied anew, and is not proved yet
Normal     copy-ordered          a copy that is not needed is ordered for later
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hvfuse.control.copying import copy_text
from hvfuse.control.facts import Facts
from hvfuse.control.instants import instant_text
from hvfuse.control.reason import Health, Reason, critical, warning
from hvfuse.shipper.proofs import Mismatch
from hvfuse.states import BEFORE_FIRST_COPY, COPYING, OF_RESYNC, TABLE, Event, ReplicationState

_COPY_NAMES = {
    ReplicationState.INITIAL_REPLICATION_IN_PROGRESS: "copying the disks",
    ReplicationState.RESYNCHRONIZING: "resynchronizing",
}


def shown_state(facts: Facts) -> ReplicationState:
    """The recorded state, unless the tracker knows better, or there is no shipper that could have heeded the orders. A
    VM whose record cannot be read counts as one that was to be replicated."""
    recorded = facts.record.state
    if facts.is_replica and facts.target is not None:
        return facts.target.state or ReplicationState.WAITING_FOR_INITIAL_REPLICATION
    if not facts.has_record or (not facts.tracker.is_there and facts.record.tracker_error is not None):
        return ReplicationState.ERROR
    if recorded is ReplicationState.DISABLED and facts.shipper.is_there and facts.record.enabled is not False:
        return ReplicationState.READY_FOR_INITIAL_REPLICATION
    if recorded is ReplicationState.REPLICATING and facts.tracker.answer and facts.tracker.answer["resync_required"]:
        recorded = ReplicationState.WAITING_FOR_START_RESYNCHRONIZE
    if facts.shipper.is_there:
        return recorded
    needs_copy = recorded in BEFORE_FIRST_COPY | OF_RESYNC
    if facts.orders.paused or (facts.orders.suspended and needs_copy):
        return TABLE.get((recorded, Event.SUSPEND), recorded)
    return TABLE.get((recorded, Event.CANCEL), recorded) if facts.orders.cancelled else recorded


def copy_reasons(facts: Facts, state: ReplicationState) -> Iterator[Reason]:
    """All reasons that have to do with copies. `state`: as it is shown."""
    if facts.record.state is ReplicationState.DISABLED and facts.record.enabled is False:
        return  # what it lacks is meant to be lacking
    if facts.is_replica:
        return  # that is its source's to say
    yield from _needed(facts, state)
    yield from _ordered(facts)
    yield from _verified(facts, state)


def _needed(facts: Facts, state: ReplicationState) -> Iterator[Reason]:
    """What there is to say of a copy that is under way or has to be made, or of orders not to make any."""
    record = facts.record
    resync = facts.resync_reason
    if state in COPYING:
        done = copy_text(record.copy) if record.copy is not None else "not complete yet"
        yield warning("copying", f"{_COPY_NAMES[state]}: {done}")
    elif state in BEFORE_FIRST_COPY or (state is ReplicationState.SUSPENDED and record.point is None):
        yield _waiting(facts, "the first copy of the disks", Health.WARNING, "initial-replication")
    elif state in OF_RESYNC or resync:
        why = resync or "the logs no longer continue the replica"
        yield _waiting(facts, f"a resynchronisation is required: {why}; it", Health.CRITICAL, "resync-required")
    elif facts.orders.suspended:
        text = "copies are suspended: should one be needed, replication will stop"
        yield warning("copies-suspended", text, f"hvfuse resync {facts.vm} --resume")


def _ordered(facts: Facts) -> Iterator[Reason]:
    """What was ordered for later although no copy is needed."""
    orders = facts.orders
    if orders.is_beyond_need and orders.at_ns is not None:
        what = "a full resynchronisation" if orders.full else "the repair of what verification found to differ"
        text = f"{what} is ordered for {instant_text(orders.at_ns, now_ns=facts.now_ns)}"
        yield Reason(id="copy-ordered", health=Health.NORMAL, text=text)


def _waiting(facts: Facts, what: str, health: Health, reason_id: str) -> Reason:
    """A copy that is not under way: what it waits for, and what ends that."""
    orders, due = facts.orders, facts.record.copy_due_ns
    command: str | None = f"hvfuse resync {facts.vm} --now"
    if orders.paused:
        why, command = "is suspended", f"hvfuse replication resume {facts.vm}"
    elif orders.suspended:
        why, command = "is suspended", f"hvfuse resync {facts.vm} --resume"
    elif orders.cancelled:
        why = "was cancelled, and does not begin by itself"
    elif facts.awaits_seed:
        is_exported = orders.seed is not None
        why, command = "waits for its seed", f"hvfuse seed {'import' if is_exported else f'export {facts.vm}'} DIR"
    elif due is not None and due > facts.now_ns:
        why = f"begins at {instant_text(due, now_ns=facts.now_ns)}"
    elif due is None and not orders.now and health is Health.CRITICAL and not facts.policy.resync.automatic:
        why = 'does not begin by itself (hvfuse.toml says resync = "manual")'
    else:
        why = "has not begun yet"
        command = command if health is Health.CRITICAL else None
    return Reason(id=reason_id, health=health, text=f"{what} {why}", next_command=command)


def _verified(facts: Facts, state: ReplicationState) -> Iterator[Reason]:
    """What verification found to differ. While a resynchronisation is needed, that comes first, and nothing can be
    verified."""
    found = facts.verified.mismatches if facts.verified is not None else ()
    copied = [each for each in found if each.is_copied(facts.record.generation)]
    differing = [each for each in found if each not in copied]
    comes_first = state in COPYING | OF_RESYNC or facts.resync_reason is not None
    verify = f"hvfuse verify {facts.vm}"
    if differing:
        text = f"the replica differs from the disks, as verification found, {_places(facts, differing)}"
        yield critical("verify-mismatch", text, None if comes_first else f"{verify} --repair")
    if copied:
        text = f"copied anew, and not proved yet, is what verification found to differ, {_places(facts, copied)}"
        yield warning("repair-unproved", text, None if comes_first else verify)


def _places(facts: Facts, found: Sequence[Mismatch]) -> str:
    """When it was found first, and where."""
    first = found[0]
    when = instant_text(min(each.found_ns for each in found), now_ns=facts.now_ns)
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{when}: {first.disk}: offset {first.extent.offset}, length {first.extent.length}{more}"
