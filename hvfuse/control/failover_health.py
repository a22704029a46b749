"""What a failover, a prepared one, or reverse replication adds to a VM's health, on either side. Pure.

Critical   failover-not-served     it was failed over to here, and nobody serves its disks
           replica-suspended       as of any VM, here by what the target itself knows
           held                    its disks are read-only as the store could not be asked, and the fence is strict
Warning    failover-unprepared     a planned failover was begun on this side, and is not prepared yet
           failover-prepared       a planned failover is prepared: the target has to fail over, or this be cancelled
           fenced                  another side has the VM: its disks are read-only here
           failover-open           it was failed over to here, which is neither committed nor cancelled
           hydrating               it was failed over to here for good, and its disks are not plain ones yet
           hydration-paused        and they do not become any, for a reason
           failed-over             it was failed over to here for good, and is not replicated in the other direction yet
           reverse-unfinished      this side has begun to give way, and not ended
           test-standing           a test failover was not cleaned up for a day, or its process is gone
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hvfuse.control.facts import Facts
from hvfuse.control.reason import Reason, critical, warning
from hvfuse.states import AFTER_FAILOVER, FAILOVER_DONE, FAILOVER_OPEN, ReplicationState
from hvfuse.words import duration_text

TEST_SECONDS = 86400.0

_SUSPENDED = (ReplicationState.SUSPENDED, ReplicationState.RESYNCHRONIZE_SUSPENDED)


def source_reasons(facts: Facts, state: ReplicationState) -> Iterator[Reason]:
    """Of a VM that this home has, or had."""
    vm, record = facts.vm, facts.record
    reverse = f"hvfuse replication reverse {vm}"
    if record.giving_way is not None:
        yield warning("reverse-unfinished", "this side has begun to give way, and its disks are on the move", reverse)
    elif state is ReplicationState.PREPARED_FOR_FAILOVER:
        yield _prepared(facts)
    elif state in AFTER_FAILOVER and record.held is not None:
        yield _fenced(facts, state)
    elif state in FAILOVER_DONE:
        yield from _taken_over(facts)
    elif record.held is None and (held := (facts.tracker.answer or {}).get("held")) is not None:
        yield critical("held", f"its disks are read-only here: {held}", "hvfuse run")


def _prepared(facts: Facts) -> Reason:
    vm, proof = facts.vm, facts.record.prepared
    if proof is None:
        text = "a planned failover was begun, and is not prepared yet; the disks are read-only meanwhile"
        return warning("failover-unprepared", text, f"hvfuse failover planned {vm}")
    text = (
        f"a planned failover is prepared at recovery point {proof['point']}, and the disks are read-only here; next, "
        f"on the target: hvfuse failover planned {vm}. The command below takes it back"
    )
    return warning("failover-prepared", text, f"hvfuse failover cancel {vm}", point=proof["point"])


def _fenced(facts: Facts, state: ReplicationState) -> Reason:
    vm, held = facts.vm, facts.record.held
    if state in FAILOVER_DONE:
        text = (
            f"{held}: its disks are read-only here. To make them the replica of what the VM has become: "
            f"hvfuse replication reverse {vm}; to keep them apart from it, writable: hvfuse replication disable {vm}"
        )
        return warning("fenced", text, f"hvfuse replication reverse {vm}")
    there = _there(facts)
    text = (
        f"{held}: its disks are read-only here. There, `hvfuse failover commit {vm}` keeps what the VM has become, and "
        f"`hvfuse failover cancel {vm}` gives it back"
    )
    # What is typed next drops, or makes final, what the other side has: here it is only looked at.
    return warning("fenced", text, f"{there} status {vm}" if there else None)


def _there(facts: Facts) -> str | None:
    """What begins a command on the other side, if it is on this host."""
    replica = facts.target.replica if facts.target is not None else None
    side: Any = replica.failover if replica is not None else None
    return f"hvfuse --home {side['root']}" if side and side.get("host") == facts.host else None


def _taken_over(facts: Facts) -> Iterator[Reason]:
    """The VM is here for good."""
    vm, hydration = facts.vm, (facts.tracker.answer or {}).get("hydration")
    if facts.tracker.answer is not None and facts.tracker.answer.get("standing") and hydration is not None:
        done, total = int(hydration["done"]), int(hydration["total"])
        share = f"{100 * done // total if total else 100} %"
        if hydration.get("error"):
            text = f"its disks are hydrated to {share}, and not further: {hydration['error']}; it is tried again"
            yield warning("hydration-paused", text, None, done=done, total=total)
        else:
            text = f"its disks are being hydrated: {share}; it can be used meanwhile"
            yield warning("hydrating", text, f"hvfuse failover commit {vm} --wait", done=done, total=total)
    text = "it was failed over to here, and is not replicated in the other direction yet: it is not protected"
    yield warning("failed-over", text, f"hvfuse replication reverse {vm}")


def replica_reasons(facts: Facts) -> Iterator[Reason]:
    """Of a VM that another home has, or that was failed over to here and not committed."""
    vm, replica = facts.vm, facts.target.replica if facts.target is not None else None
    if replica is None or facts.target is None:
        return
    state, failover = facts.target.state, replica.failover
    is_here = failover is not None and failover["home"] == facts.home_id
    if state in FAILOVER_OPEN and failover is not None and is_here:
        if not facts.tracker.is_there:
            text = "it was failed over to here, and nobody serves its disks"
            yield critical("failover-not-served", text, f"hvfuse mount {vm}")
        text = (
            f"it was failed over to here at recovery point {failover['point']}, which is neither committed nor "
            "cancelled"
        )
        yield warning("failover-open", text, f"hvfuse failover commit {vm}", point=failover["point"])
    elif state in FAILOVER_DONE and is_here:
        yield warning("failover-open", "its failover is committed, and not taken over", f"hvfuse failover commit {vm}")
    elif state in FAILOVER_OPEN and failover is not None:
        yield warning("failover-open", f"it was failed over to {failover['root']} on {failover['host']}")
    elif state is ReplicationState.PREPARED_FOR_FAILOVER:
        text = "its source has prepared a planned failover: it waits for this side"
        yield warning("failover-prepared", text, f"hvfuse failover planned {vm}")
    elif state in _SUSPENDED:
        text = "the replica is suspended here, and takes nothing in"
        yield critical("replica-suspended", text, f"hvfuse replication resume {vm} --replica")


def replica_commands(facts: Facts) -> tuple[str, ...]:
    """What may be ordered of a VM here that another home has, or that was failed over to here."""
    vm, target = facts.vm, facts.target
    state = target.state if target is not None else None
    flows: tuple[str, ...] = ()
    if state in FAILOVER_OPEN:
        flows = ("commit {}", "change-point {} --point P", "cancel {}")
    elif state is ReplicationState.PREPARED_FOR_FAILOVER:
        flows = ("planned {}", "test {}", "unplanned {}")
    elif target is not None and target.points:
        flows = ("test {}", "unplanned {}")
    return tuple(f"hvfuse failover {flow.format(vm)}" for flow in flows)


def test_reasons(facts: Facts) -> Iterator[Reason]:
    """Test failovers that stand for too long, or are not served any more."""
    for test in facts.target.tests if facts.target is not None else ():
        age = (facts.now_ns - test.since_ns) / 1e9
        command = f"hvfuse failover cleanup {facts.vm} {test.id}"
        if not test.is_served:
            text = f"test failover {test.id} is not mounted any more, and still holds back its recovery point"
            yield warning("test-standing", text, command)
        elif age > TEST_SECONDS:
            text = f"test failover {test.id} has stood for {duration_text(age)}, and holds back its recovery point"
            yield warning("test-standing", text, command, seconds=age)
