"""How well a VM's replication is, by the worst of the reasons that the facts give. Pure.

Hyper-V Replica's rules are for cycles of 5 minutes. Here they scale with the VM's frequency: its hour is LATE_INTERVALS
intervals. Each row is a reason's id; what a copy that is needed adds is in `hvfuse.control.copy_health`, what a
failover adds in `hvfuse.control.failover_health`.

    Critical   record-damaged, tracker-damaged, shipper-damaged, logs-damaged, store-damaged, proofs-damaged,
               folder-damaged         what is asked cannot be read
               store-unreachable      the store does not answer, and the newest point is HUNG_INTERVALS old
               folder-gone            the folder of a VM that is protected is gone
               tracker-failed, tracker-down, shipper-down
                                      a process that has to run does not
               replication-failing    in state Error; or attempts fail, and the newest point is HUNG_INTERVALS old
               no-progress            the processes live, nothing fails, and nothing moves for HUNG_INTERVALS
               store-rolled-back      the store lacks a point that it had acknowledged
               replica-suspended      an administrator suspended it at the target
               guest-stuck            a guest that was frozen for a point could not be thawed
    Warning    replication-failing, store-unreachable
                                      the same for less than that
               cycles-missed          more than MISSED_PART of the cycles in the monitoring interval
               stale                  the newest point is older than LATE_INTERVALS
               latency                cycles take longer than an interval on average until the target has them
               suspended              replication is suspended here
               log-limit              the logs will reach the hard limit within one interval
               tracker-busy, shipper-busy
                                      a process is there, and does not answer in time
               app-consistent-failed  the last attempt at an app-consistent point failed
               config-fault           hvfuse.toml has a mistake: the policy of before is in effect
               clock-set-back         the newest point lies in the future
               untracked-disk, exclude-unknown
                                      the folder's disks are not those that the configuration means
    Normal     none of these
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hvfuse.control.facts import ANSWER_SECONDS, Facts, Process
from hvfuse.control.failover_health import replica_reasons, source_reasons, test_reasons
from hvfuse.control.reason import Health, Reason, critical, warning
from hvfuse.control.records import VmRecord
from hvfuse.states import AFTER_FAILOVER, COPYING, OF_RESYNC, Event, ReplicationState, allowed_commands
from hvfuse.words import bytes_text, duration_text

__all__ = ["Health", "Reason", "commands", "critical", "is_protected", "reasons", "warning"]

LATE_INTERVALS = 12
HUNG_INTERVALS = 2
LEAST_SECONDS = 10.0
"""Less is nothing to worry about, however short the interval is."""
MISSED_PART = 0.2
MISSED_LEAST = 5
"""Cycles; fewer that are missed are a hiccup, whatever part they are of the few that there were."""

_COMMANDS: Mapping[Event, str] = {
    Event.ENABLE: "hvfuse replication enable {vm}",
    Event.RESUME: "hvfuse replication resume {vm}",
    Event.START: "hvfuse replication start {vm}",
    Event.SUSPEND: "hvfuse replication suspend {vm}",
    Event.CANCEL: "hvfuse resync {vm} --cancel",
    Event.PREPARE_FAILOVER: "hvfuse failover planned {vm}",
    Event.CANCEL_FAILOVER: "hvfuse failover cancel {vm}",
    Event.REVERSE: "hvfuse replication reverse {vm}",
    Event.DISABLE: "hvfuse replication disable {vm}",
}
"""How an event is ordered, what is meant most often first."""


def is_protected(record: VmRecord) -> bool:
    """Whether the VM is to be replicated, so that processes must run for it."""
    return record.state is not ReplicationState.DISABLED


def commands(vm: str, state: ReplicationState, *, paused: bool = False) -> tuple[str, ...]:
    """What may be ordered of a VM in that state. `paused`: replication is suspended, and first of all to be resumed."""
    allowed = {Event.RESUME, Event.DISABLE} if paused else _COMMANDS.keys()
    possible = set(allowed_commands(state))
    if state is not ReplicationState.PREPARED_FOR_FAILOVER:
        possible.discard(Event.CANCEL_FAILOVER)  # that is the other side's, once it has failed over
    return tuple(text.format(vm=vm) for event, text in _COMMANDS.items() if event in possible and event in allowed)


def reasons(facts: Facts, state: ReplicationState) -> Iterator[Reason]:
    """All reasons but those of copies. `state`: as it is shown."""
    found = list(_all(facts, state))
    hung = next((reason.text for reason in found if reason.id == "no-progress"), "")
    return (one for one in found if one.id not in ("tracker-busy", "shipper-busy") or one.text not in hung)


def _all(facts: Facts, state: ReplicationState) -> Iterator[Reason]:
    for trouble in facts.troubles:
        if facts.names is None and trouble.id == "tracker-damaged":
            continue  # it stumbles over the folder that is gone, which is told below
        passing = trouble.id == "store-unreachable" and not _is_late(facts)
        yield (warning if passing else critical)(trouble.id, trouble.text, trouble.hint)
    if facts.is_replica:
        yield from replica_reasons(facts)
        yield from test_reasons(facts)
        yield from _surroundings(facts)
        return
    yield from _processes(facts, state)
    if not is_protected(facts.record) and facts.record.enabled is False:
        return  # then it is meant to be behind
    yield from _failures(facts, state)
    yield from _progress(facts, state)
    yield from _target(facts)
    yield from _pauses(facts, state)
    yield from _past(facts, state)
    if state not in AFTER_FAILOVER:
        yield from _limits(facts)
    yield from _guest(facts)
    yield from source_reasons(facts, state)
    yield from test_reasons(facts)
    yield from _surroundings(facts)


def _hung(facts: Facts) -> float:
    """Seconds without any progress that are too many."""
    return max(HUNG_INTERVALS * facts.policy.frequency, LEAST_SECONDS)


def _is_late(facts: Facts) -> bool:
    """Whether too much would be lost by now, as far as one knows here."""
    return facts.age is None or facts.is_from_future or facts.age > _hung(facts)


def _processes(facts: Facts, state: ReplicationState) -> Iterator[Reason]:
    record, vm = facts.record, facts.vm
    if facts.names is None:
        if record.point is None:
            text = "its folder is gone, and nothing of it was replicated"
            yield critical("folder-gone", text, f"hvfuse replication disable {vm}")
        else:
            text = "its folder is gone; what was replicated is in the store"
            yield critical("folder-gone", text, f"hvfuse failover test {vm} --mount DIR")
        return
    if facts.tracker.is_busy:
        yield warning("tracker-busy", _busy_text("tracker", facts.tracker), _wake(facts.tracker))
    elif facts.tracker.answer is None and record.tracker_error is not None:
        yield critical("tracker-failed", record.tracker_error, record.tracker_hint)
    elif facts.tracker.answer is None and is_protected(record):
        text = f"the VM is protected but not mounted: nothing tracks its writes{_again(facts)}"
        yield critical("tracker-down", text, _starts(facts))
    if facts.shipper.is_busy:
        yield warning("shipper-busy", _busy_text("shipper", facts.shipper), _wake(facts.shipper))
    elif facts.shipper.answer is None and is_protected(record):
        why = f": {record.shipper_error.removeprefix(f'{vm}: ')}" if record.shipper_error is not None else ""
        text = f"no shipper runs, so no recovery points are made{why}{_again(facts)}"
        if state not in AFTER_FAILOVER:
            yield critical("shipper-down", text, _starts(facts))


def _again(facts: Facts) -> str:
    return "; `hvfuse run` is starting it" if facts.is_supervised else ""


def _starts(facts: Facts) -> str | None:
    """What starts the processes: not what says that it runs already."""
    return None if facts.is_supervised else "hvfuse run"


def _busy_text(role: str, process: Process) -> str:
    if process.is_stopped:
        return f"the {role} (pid {process.pid}) was stopped by a signal, and does nothing"
    return f"the {role} runs, but did not answer within {ANSWER_SECONDS:.0f} s"


def _wake(process: Process) -> str | None:
    return f"kill -CONT {process.pid}" if process.is_stopped else None


def _failures(facts: Facts, state: ReplicationState) -> Iterator[Reason]:
    record = facts.record
    if (
        record.error is None
        or facts.names is None
        or (_is_held_at_target(facts) and record.hint == _resume_replica(facts.vm))
        or (record.held is not None and state in AFTER_FAILOVER)
    ):
        return  # `_target` says it, or `source_reasons`
    is_stuck = state is ReplicationState.ERROR
    is_critical = _is_late(facts) or is_stuck or state in OF_RESYNC - COPYING
    yield Reason(
        id="replication-failing",
        health=Health.CRITICAL if is_critical else Health.WARNING,
        text=record.error.removeprefix(f"{facts.vm}: "),
        next_command=record.hint or (_COMMANDS[Event.RESUME].format(vm=facts.vm) if is_stuck else None),
        evidence={"seconds": facts.age, "limit": _hung(facts)},
    )


def _progress(facts: Facts, state: ReplicationState) -> Iterator[Reason]:
    """The watchdog: everybody is there, nobody complains, and nothing moves."""
    if state in AFTER_FAILOVER or not facts.shipper.is_there or facts.record.error is not None:
        return
    told = facts.shipper.answer or {}
    doing, since = told.get("doing"), told.get("doing_seconds")
    limit, age = _hung(facts), facts.age
    stands: float | None = None
    if since is not None:
        stands, why = since, f"the shipper {doing}, for {duration_text(since)} now"
    elif age is not None and state is ReplicationState.REPLICATING:
        stands, why = age, f"no recovery point was made for {duration_text(age)}, and the shipper does not say why"
        if facts.shipper.is_busy:
            why = f"no recovery point was made for {duration_text(age)}: {_busy_text('shipper', facts.shipper)}"
    if stands is not None and stands > limit:
        process = facts.tracker if facts.tracker.is_stopped else facts.shipper
        if process is facts.tracker:
            why += f"; {_busy_text('tracker', process)}"
        command = _wake(process) or f"tail {facts.shipper_log}"
        yield critical("no-progress", why, command, seconds=stands, limit=limit, doing=doing)


def _target(facts: Facts) -> Iterator[Reason]:
    if facts.is_rolled_back and facts.target is not None and facts.record.state not in AFTER_FAILOVER:
        newest = facts.target.newest_id
        what = f"its newest point is {newest}" if newest is not None else "it has none; was it moved, or not mounted?"
        text = f"the store lacks recovery point {facts.record.point}, which it had acknowledged: {what}"
        yield critical("store-rolled-back", text, f"hvfuse replicate {facts.vm}", newest=newest)
    if _is_held_at_target(facts):
        text = "the replica is suspended at the target, and takes nothing in"
        yield critical("replica-suspended", text, _resume_replica(facts.vm))


def _is_held_at_target(facts: Facts) -> bool:
    suspended = (ReplicationState.SUSPENDED, ReplicationState.RESYNCHRONIZE_SUSPENDED)
    return facts.target is not None and facts.target.state in suspended


def _resume_replica(vm: str) -> str:
    return f"hvfuse replication resume {vm} --replica"


def _pauses(facts: Facts, state: ReplicationState) -> Iterator[Reason]:
    if facts.orders.paused and state not in AFTER_FAILOVER and is_protected(facts.record):
        text = "replication is suspended: writes are logged, and nothing is sent"
        yield warning("suspended", text, f"hvfuse replication resume {facts.vm}")


def _past(facts: Facts, state: ReplicationState) -> Iterator[Reason]:
    """What the monitoring interval and the newest point tell."""
    if state not in (ReplicationState.REPLICATING, ReplicationState.ERROR) or facts.orders.paused:
        return
    frequency, sums, interval = facts.policy.frequency, facts.past.sums, facts.past.interval
    if sums.missed >= MISSED_LEAST and sums.missed_part > MISSED_PART:
        text = (
            f"{sums.missed} of {sums.due} cycles in the last {duration_text(interval)} were missed "
            f"({sums.missed_part:.0%}, {MISSED_PART:.0%} is tolerable)"
        )
        yield warning("cycles-missed", text, f"hvfuse measure {facts.vm}", missed=sums.missed, due=sums.due)
    late = max(LATE_INTERVALS * frequency, LEAST_SECONDS)
    if facts.age is not None and facts.age > late:
        text = f"the newest recovery point is {duration_text(facts.age)} old"
        yield warning("stale", text, f"hvfuse replicate {facts.vm}", seconds=facts.age, limit=late)
    slow = max(frequency, LEAST_SECONDS)
    if sums.mean_latency > slow:
        text = (
            f"in the last {duration_text(interval)}, it took {duration_text(sums.mean_latency)} on average until the "
            f"target had a cycle; cycles are due every {duration_text(frequency)}"
        )
        yield warning("latency", text, f"hvfuse measure {facts.vm}", seconds=sums.mean_latency, limit=slow)


def _limits(facts: Facts) -> Iterator[Reason]:
    forecast = facts.forecast
    seconds = forecast.seconds_to_hard_limit
    if seconds is None or forecast.rate is None or seconds >= facts.policy.frequency or not is_protected(facts.record):
        return
    text = (
        f"the logs hold {bytes_text(forecast.used)} of {bytes_text(forecast.hard_limit or 0)} and grow by "
        f"{bytes_text(round(forecast.rate))}/s: in {duration_text(seconds)} they are given up, and a "
        "resynchronisation is required"
    )
    verb = "replication resume" if facts.orders.paused else "replicate"
    yield warning(
        "log-limit", text, f"hvfuse {verb} {facts.vm}", seconds=seconds, used=forecast.used, limit=forecast.hard_limit
    )


def _guest(facts: Facts) -> Iterator[Reason]:
    if facts.record.guest_stuck is not None:
        text = f"the guest may be standing still, frozen: it could not be thawed: {facts.record.guest_stuck}"
        yield critical("guest-stuck", text, f"hvfuse replicate {facts.vm} --app-consistent")
    if facts.record.guest_error is not None and facts.policy.app_consistent:
        text = f"the last attempt at an app-consistent point failed: {facts.record.guest_error}"
        yield warning("app-consistent-failed", text, f"hvfuse replicate {facts.vm} --app-consistent")


def _surroundings(facts: Facts) -> Iterator[Reason]:
    if facts.config_fault is not None:
        text = f"hvfuse.toml has a fault, and what it said before still applies: {facts.config_fault}"
        yield warning("config-fault", text, "hvfuse policy check")
    if facts.is_from_future:
        text = "the newest recovery point lies in the future: the clock was set back, so its age is not known"
        yield warning("clock-set-back", text, "date")
    for name in facts.tracker.answer["untracked"] if facts.tracker.answer else ():
        text = f"{name} is not protected yet: it is taken in when nobody has it open, and no copy is under way"
        yield warning("untracked-disk", text, None, disk=name)
    for name in sorted(facts.policy.exclude - facts.names) if facts.names is not None and not facts.is_replica else ():
        text = f"hvfuse.toml excludes {name}, but there is no such disk in the folder"
        yield warning("exclude-unknown", text, f"hvfuse policy show {facts.vm}", disk=name)
