"""How a VM's replication is doing: what the tracker, the folder, the records and the store say, in one.

Nothing is remembered here; a process that does not answer is reported as such. Health, by the worst
reason (thresholds are the constants below):

    Critical   the logs or the store cannot be read; verification found that the replica differs from the
               disks; the tracker cannot start; the tracker or the shipper does not run, or the folder is
               gone, although the VM is protected; state Error; a resynchronisation is required and not
               under way (it waits, is suspended, was cancelled); replication fails and is two intervals late
    Warning    initial replication is not complete (it is under way, waits, is suspended, was cancelled);
               what verification found to differ was copied anew, and is not proved yet;
               copies are suspended although none is needed now; replication fails; the last cycle is older
               than an hour, or than two intervals if that is more, or lies in the future; a disk in the
               folder is not tracked; a process is there, but busy; a test failover was forgotten; a disk
               that is to be excluded does not exist
    Normal     none of these; a copy that is not needed is ordered for later
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

from hvfuse import spool, wire
from hvfuse.control.config import VmPolicy
from hvfuse.control.copying import copy_text
from hvfuse.control.daemon import serving_pid
from hvfuse.control.home import Home
from hvfuse.control.instants import instant_text
from hvfuse.control.records import VmRecord
from hvfuse.errors import HvfuseError, UnreachableError
from hvfuse.formats import hrl
from hvfuse.formats.image import is_disk_name, probe_for_tracking
from hvfuse.shipper import proofs
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.proofs import Mismatch, Verified
from hvfuse.states import ReplicationState

STALE_SECONDS = 3600.0
STALE_INTERVALS = 2
ANSWER_SECONDS = 3.0
"""How long to wait for a process to say how it is."""
FUTURE_SECONDS = 60.0
"""So far clocks may differ; a point that lies further ahead tells nothing of its age."""
_EMPTY_LOG = hrl.HEADER_SIZE + hrl.METADATA_SIZE
"""Bytes of a log in which nothing was written."""

_Answer = TypeVar("_Answer")

_COPYING = (ReplicationState.INITIAL_REPLICATION_IN_PROGRESS, ReplicationState.RESYNCHRONIZING)
_BEFORE_FIRST_COPY = (
    ReplicationState.READY_FOR_INITIAL_REPLICATION,
    ReplicationState.WAITING_FOR_INITIAL_REPLICATION,
    ReplicationState.SUSPENDED,
)
_BEFORE_RESYNC = (ReplicationState.WAITING_FOR_START_RESYNCHRONIZE, ReplicationState.RESYNCHRONIZE_SUSPENDED)
_WHEN_SUSPENDED = {
    ReplicationState.READY_FOR_INITIAL_REPLICATION: ReplicationState.SUSPENDED,
    ReplicationState.WAITING_FOR_INITIAL_REPLICATION: ReplicationState.SUSPENDED,
    ReplicationState.INITIAL_REPLICATION_IN_PROGRESS: ReplicationState.SUSPENDED,
    ReplicationState.WAITING_FOR_START_RESYNCHRONIZE: ReplicationState.RESYNCHRONIZE_SUSPENDED,
    ReplicationState.RESYNCHRONIZING: ReplicationState.RESYNCHRONIZE_SUSPENDED,
}
_WHEN_CANCELLED = {
    ReplicationState.SUSPENDED: ReplicationState.READY_FOR_INITIAL_REPLICATION,
    ReplicationState.INITIAL_REPLICATION_IN_PROGRESS: ReplicationState.READY_FOR_INITIAL_REPLICATION,
    ReplicationState.RESYNCHRONIZE_SUSPENDED: ReplicationState.WAITING_FOR_START_RESYNCHRONIZE,
    ReplicationState.RESYNCHRONIZING: ReplicationState.WAITING_FOR_START_RESYNCHRONIZE,
}
_COPY_NAMES = {
    ReplicationState.INITIAL_REPLICATION_IN_PROGRESS: "copying the disks",
    ReplicationState.RESYNCHRONIZING: "resynchronizing",
}
_STOPPED = (ReplicationState.ERROR, *_BEFORE_RESYNC)


class Health(IntEnum):
    """The worse, the higher."""

    NORMAL = 0
    WARNING = 1
    CRITICAL = 2

    def __str__(self) -> str:
        return self.name.capitalize()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why the health is not Normal; or what is to come, if that is Normal. `id` never changes; `next_command` is what
    to type, if anything."""

    id: str
    health: Health
    text: str
    next_command: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStatus:
    """A disk. `size`: bytes of the image file; `log_bytes`: of its logs that the target lacks yet."""

    name: str
    format: str
    size: int
    log_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VmStatus:
    """What there is to say of a VM now.

    `rpo_seconds`: age of what the target has, None when unknown. `pending_bytes`: what the logs hold
    that the target lacks, and what has to be compared with it. `points`: recovery points in the store.
    `copy`, `copy_due_ns`, `orders`: as in the VM's record. `verified`: None if it never was. `tracker`,
    `shipper`: whether they answer.
    """

    name: str
    state: ReplicationState
    reasons: tuple[Reason, ...]
    last_cycle: int
    last_replication_time_ns: int | None
    rpo_seconds: float | None
    pending_bytes: int
    points: int
    latest_point: str | None
    copy: Mapping[str, Any] | None
    copy_due_ns: int | None
    orders: Orders
    verified: Verified | None = None
    disks: tuple[DiskStatus, ...]
    tracker: bool
    shipper: bool

    @property
    def health(self) -> Health:
        """The worst reason's."""
        return max((reason.health for reason in self.reasons), default=Health.NORMAL)


@dataclass(frozen=True, slots=True)
class _Process:
    """A tracker or a shipper: `answer` is its own, None without one; `busy`: it is there all the same."""

    answer: Mapping[str, Any] | None
    busy: bool = False

    @property
    def is_there(self) -> bool:
        return self.busy or self.answer is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What was found out, at `now_ns`. `age`: seconds since the last point, negative if the clock was set back.
    `names`: what the folder holds, None without one. `forgotten`: test failovers that nobody serves."""

    vm: str
    now_ns: int
    record: VmRecord
    orders: Orders
    policy: VmPolicy
    tracker: _Process
    shipper: _Process
    names: frozenset[str] | None
    age: float | None
    forgotten: Sequence[int]
    verified: Verified | None

    @property
    def awaits_seed(self) -> bool:
        """Whether nothing is copied over the network because another way was ordered."""
        return self.orders.seed is not None or (self.policy.initial.how == "seed" and self.record.point is None)

    @property
    def is_from_future(self) -> bool:
        return self.age is not None and self.age < -FUTURE_SECONDS

    @property
    def rpo(self) -> float | None:
        return None if self.age is None or self.is_from_future else max(0.0, self.age)


def is_protected(record: VmRecord) -> bool:
    """Whether the VM is to be replicated, so that processes must run for it."""
    return record.state is not ReplicationState.DISABLED


def vm_status(
    home: Home,
    vm: str,
    *,
    record: VmRecord,
    policy: VmPolicy,
    points: Callable[[str], int],
    forgotten: Callable[[str], Sequence[int]] = lambda _: (),
    now_ns: int,
) -> VmStatus:
    """Ask everybody how `vm` is doing. `points`: how many the store has; `forgotten`: the ids of the test
    failovers whose processes are gone. What cannot be had because it is damaged becomes a reason; raises
    OSError alone."""
    folder = home.folder(vm)
    troubles: list[Reason] = []
    nobody = _Process(None)
    tracker = _tried(troubles, "tracker-damaged", lambda: _ask(home.tracker_socket(vm)), nobody)
    shipper = _tried(troubles, "shipper-damaged", lambda: _ask(home.shipper_socket(vm)), nobody)
    nothing: dict[str, int] = {}
    sealed = _tried(troubles, "logs-damaged", lambda: _sealed_bytes(folder), nothing)
    count = _tried(troubles, "store-damaged", lambda: points(vm), 0)
    nowhere: Sequence[int] = ()
    unproved: Verified | None = None
    last = record.last_replication_time_ns
    facts = _Facts(
        vm=vm,
        now_ns=now_ns,
        record=record,
        orders=Orders.from_json(record.orders),
        policy=policy,
        tracker=tracker,
        shipper=shipper,
        names=frozenset(os.listdir(folder)) if os.path.isdir(folder) else None,
        age=None if last is None else (now_ns - last) / 1e9,
        forgotten=_tried(troubles, "store-damaged", lambda: forgotten(vm), nowhere),
        verified=_tried(troubles, "proofs-damaged", lambda: proofs.load(home.proofs(vm)).verified(now_ns), unproved),
    )
    disks = tracker.answer["disks"] if tracker.answer else ()
    active = sum(max(0, disk["log_bytes"] - _EMPTY_LOG) for disk in disks)
    in_doubt = sum(disk.get("resync_bytes", 0) for disk in disks)
    return VmStatus(
        name=vm,
        state=_state(facts),
        reasons=(*troubles, *_reasons(facts)),
        last_cycle=record.cycle,
        last_replication_time_ns=last,
        rpo_seconds=facts.rpo,
        pending_bytes=active + sum(sealed.values()) + in_doubt,
        points=count,
        latest_point=record.point,
        copy=record.copy,
        copy_due_ns=record.copy_due_ns,
        orders=facts.orders,
        verified=facts.verified,
        disks=_disks(folder, tracker.answer, sealed, policy.exclude),
        tracker=tracker.answer is not None,
        shipper=shipper.answer is not None,
    )


def _tried(troubles: list[Reason], reason_id: str, ask: Callable[[], _Answer], otherwise: _Answer) -> _Answer:
    """The answer; or, if what is asked is damaged, a Critical reason in `troubles` and `otherwise`."""
    try:
        return ask()
    except HvfuseError as error:
        troubles.append(Reason(id=reason_id, health=Health.CRITICAL, text=str(error), next_command=error.hint))
        return otherwise


def _ask(socket_path: str) -> _Process:
    try:
        return _Process(wire.request(socket_path, "status", timeout=ANSWER_SECONDS))
    except UnreachableError:
        return _Process(None, busy=_is_served(socket_path))


def _is_served(socket_path: str) -> bool:
    try:
        return serving_pid(socket_path) is not None
    except UnreachableError:
        return True


def _sealed_bytes(folder: str) -> dict[str, int]:
    """What the sealed logs hold, by disk."""
    found: dict[str, int] = {}
    if os.path.isdir(folder):
        for log in spool.list_logs(folder):
            found[log.disk] = found.get(log.disk, 0) + max(0, log.header.eol - _EMPTY_LOG)
    return found


def _disks(
    folder: str, tracker: Mapping[str, Any] | None, sealed: Mapping[str, int], exclude: frozenset[str]
) -> tuple[DiskStatus, ...]:
    if tracker is not None:
        return tuple(
            DiskStatus(
                name=disk["name"],
                format=disk["format"],
                size=disk["size"],
                log_bytes=disk["log_bytes"] + sealed.get(disk["name"], 0),
            )
            for disk in tracker["disks"]
        )
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    disks = (name for name in names if is_disk_name(name) and name not in exclude)
    return tuple(_disk_at_rest(folder, name, sealed.get(name, 0)) for name in disks)


def _disk_at_rest(folder: str, name: str, log_bytes: int) -> DiskStatus:
    path = os.path.join(folder, name)
    try:
        image_format = probe_for_tracking(path).format.value
    except HvfuseError:
        image_format = "unreadable"
    return DiskStatus(name=name, format=image_format, size=os.stat(path).st_size, log_bytes=log_bytes)


def _state(facts: _Facts) -> ReplicationState:
    """The recorded state, unless the tracker knows better, or there is no shipper that could have heeded the orders."""
    recorded = facts.record.state
    if not facts.tracker.is_there and facts.record.tracker_error is not None:
        return ReplicationState.ERROR
    if recorded is ReplicationState.DISABLED and facts.shipper.is_there:
        return ReplicationState.READY_FOR_INITIAL_REPLICATION
    if recorded is ReplicationState.REPLICATING and facts.tracker.answer and facts.tracker.answer["resync_required"]:
        recorded = ReplicationState.WAITING_FOR_START_RESYNCHRONIZE
    if not facts.shipper.is_there and facts.orders.suspended:
        return _WHEN_SUSPENDED.get(recorded, recorded)
    if not facts.shipper.is_there and facts.orders.cancelled:
        return _WHEN_CANCELLED.get(recorded, recorded)
    return recorded


def _reasons(facts: _Facts) -> Iterator[Reason]:
    state = _state(facts)
    yield from _process_reasons(facts)
    yield from _failure_reasons(facts, state)
    yield from _copy_reasons(facts, state)
    yield from _order_reasons(facts)
    yield from _verify_reasons(facts, state)
    limit = max(STALE_SECONDS, STALE_INTERVALS * facts.policy.frequency)
    if facts.age is not None and facts.age > limit:
        text = f"the last recovery point is {facts.age / 60:.0f} minutes old"
        yield _warning("stale", text, f"hvfuse replicate {facts.vm}")
    if facts.is_from_future:
        text = "the last recovery point lies in the future: the clock was set back, so its age is not known"
        yield _warning("clock-set-back", text, "date")
    for name in facts.tracker.answer["untracked"] if facts.tracker.answer else ():
        text = f"{name} came while the folder was mounted and is not tracked; restart `hvfuse run` when it may be"
        yield _warning("untracked-disk", text)
    for name in sorted(facts.policy.exclude - facts.names) if facts.names is not None else ():
        yield _warning("exclude-unknown", f"hvfuse.toml excludes {name}, but there is no such disk in the folder")
    for trial in facts.forgotten:
        text = f"test failover {trial} is not mounted any more, and still holds back its recovery point"
        yield _warning("trial-forgotten", text, f"hvfuse failover cleanup {facts.vm} {trial}")


def _warning(reason_id: str, text: str, next_command: str | None = None) -> Reason:
    return Reason(id=reason_id, health=Health.WARNING, text=text, next_command=next_command)


def _critical(reason_id: str, text: str, next_command: str | None = None) -> Reason:
    return Reason(id=reason_id, health=Health.CRITICAL, text=text, next_command=next_command)


def _verify_reasons(facts: _Facts, state: ReplicationState) -> Iterator[Reason]:
    """What verification found to differ. While a resynchronisation is needed, that comes first, and nothing can be
    verified."""
    found = facts.verified.mismatches if facts.verified is not None else ()
    copied = [each for each in found if each.is_copied(facts.record.generation)]
    differing = [each for each in found if each not in copied]
    comes_first = state in _COPYING or state in _BEFORE_RESYNC or _resync_reason(facts) is not None
    verify = f"hvfuse verify {facts.vm}"
    if differing:
        text = f"the replica differs from the disks, as verification found, {_places(facts, differing)}"
        yield _critical("verify-mismatch", text, None if comes_first else f"{verify} --repair")
    if copied:
        text = f"copied anew, and not proved yet, is what verification found to differ, {_places(facts, copied)}"
        yield _warning("repair-unproved", text, None if comes_first else verify)


def _places(facts: _Facts, found: Sequence[Mismatch]) -> str:
    """When it was found first, and where."""
    first = found[0]
    when = instant_text(min(each.found_ns for each in found), now_ns=facts.now_ns)
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{when}: {first.disk}: offset {first.extent.offset}, length {first.extent.length}{more}"


def _resync_reason(facts: _Facts) -> str | None:
    """Why a resynchronisation is required, if one is."""
    return facts.record.resync_reason or (facts.tracker.answer or {}).get("resync_required")


def _process_reasons(facts: _Facts) -> Iterator[Reason]:
    record = facts.record
    if facts.names is None:
        if record.point is None:
            yield _critical("folder-gone", "its folder is gone, and nothing of it was replicated")
        else:
            text = "its folder is gone; what was replicated is in the store"
            yield _critical("folder-gone", text, f"hvfuse failover test {facts.vm} --mount DIR")
        return
    if facts.tracker.busy:
        yield _warning("tracker-busy", f"the tracker runs, but did not answer within {ANSWER_SECONDS:.0f} s")
    elif facts.tracker.answer is None and record.tracker_error is not None:
        yield _critical("tracker-failed", record.tracker_error, record.tracker_hint)
    elif facts.tracker.answer is None and is_protected(record):
        yield _critical("tracker-down", "the VM is protected but not mounted: nothing tracks its writes", "hvfuse run")
    if facts.shipper.busy:
        yield _warning("shipper-busy", f"the shipper runs, but did not answer within {ANSWER_SECONDS:.0f} s")
    elif facts.shipper.answer is None and is_protected(record):
        why = f": {record.shipper_error}" if record.shipper_error is not None else ""
        yield _critical("shipper-down", f"no shipper runs, so no recovery points are made{why}", "hvfuse run")


def _copy_reasons(facts: _Facts, state: ReplicationState) -> Iterator[Reason]:
    """What there is to say of a copy that is under way or has to be made, or of orders not to make any."""
    record = facts.record
    resync = _resync_reason(facts)
    if state in _COPYING:
        done = copy_text(record.copy) if record.copy is not None else "not complete yet"
        yield _warning("copying", f"{_COPY_NAMES[state]}: {done}")
    elif state in _BEFORE_FIRST_COPY:
        yield _waiting(facts, "the first copy of the disks", Health.WARNING, "initial-replication")
    elif state in _BEFORE_RESYNC or resync:
        why = resync or "the logs no longer continue the replica"
        yield _waiting(facts, f"a resynchronisation is required: {why}; it", Health.CRITICAL, "resync-required")
    elif facts.orders.suspended:
        text = "copies are suspended: should one be needed, replication will stop"
        yield _warning("copies-suspended", text, f"hvfuse resync {facts.vm} --resume")


def _order_reasons(facts: _Facts) -> Iterator[Reason]:
    """What was ordered for later although no copy is needed."""
    orders = facts.orders
    if orders.is_beyond_need and orders.at_ns is not None:
        what = "a full resynchronisation" if orders.full else "the repair of what verification found to differ"
        text = f"{what} is ordered for {instant_text(orders.at_ns, now_ns=facts.now_ns)}"
        yield Reason(id="copy-ordered", health=Health.NORMAL, text=text)


def _waiting(facts: _Facts, what: str, health: Health, reason_id: str) -> Reason:
    """A copy that is not under way: what it waits for, and what ends that."""
    orders, due = facts.orders, facts.record.copy_due_ns
    command: str | None = f"hvfuse resync {facts.vm} --now"
    if orders.suspended:
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


def _failure_reasons(facts: _Facts, state: ReplicationState) -> Iterator[Reason]:
    record = facts.record
    if record.error is not None:
        late = facts.rpo is None or facts.rpo > STALE_INTERVALS * facts.policy.frequency
        critical = late or state in _STOPPED
        yield Reason(
            id="replication-failing",
            health=Health.CRITICAL if critical else Health.WARNING,
            text=record.error,
            next_command=record.hint,
        )
