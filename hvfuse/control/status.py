"""How a VM's replication is doing: what the tracker, the folder, the records and the store say, in one.

Nothing is remembered here; a process that does not answer is reported as such. Health, by the worst
reason (thresholds are the constants below):

    Critical   the logs or the store cannot be read; the tracker cannot start; the tracker or the shipper
               does not run, or the folder is gone, although the VM is protected; state Error or
               WaitingForStartResynchronize; replication fails and is two intervals late
    Warning    initial replication is not complete; replication fails; the last cycle is older than an
               hour, or than two intervals if that is more; a disk in the folder is not tracked
    Normal     none of these
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

from hvfuse import spool, wire
from hvfuse.control.config import VmPolicy
from hvfuse.control.home import Home
from hvfuse.control.records import VmRecord
from hvfuse.errors import HvfuseError, UnreachableError
from hvfuse.formats import hrl
from hvfuse.formats.image import is_disk_name, probe_for_tracking
from hvfuse.manifest import ReplicationState

STALE_SECONDS = 3600.0
STALE_INTERVALS = 2
ANSWER_SECONDS = 3.0
"""How long to wait for a process to say how it is."""
_EMPTY_LOG = hrl.HEADER_SIZE + hrl.METADATA_SIZE
"""Bytes of a log in which nothing was written."""

_Answer = TypeVar("_Answer")

_COPYING = (
    ReplicationState.READY_FOR_INITIAL_REPLICATION,
    ReplicationState.INITIAL_REPLICATION_IN_PROGRESS,
    ReplicationState.RESYNCHRONIZING,
)
_STOPPED = (ReplicationState.ERROR, ReplicationState.WAITING_FOR_START_RESYNCHRONIZE)


class Health(IntEnum):
    """The worse, the higher."""

    NORMAL = 0
    WARNING = 1
    CRITICAL = 2

    def __str__(self) -> str:
        return self.name.capitalize()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why the health is not Normal. `id` never changes; `next_command` is what to type, if anything."""

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
    `tracker`, `shipper`: whether they answer.
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
    progress: float | None
    disks: tuple[DiskStatus, ...]
    tracker: bool
    shipper: bool

    @property
    def health(self) -> Health:
        """The worst reason's."""
        return max((reason.health for reason in self.reasons), default=Health.NORMAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What was found out; `tracker` is the tracker's own answer, None without one."""

    vm: str
    record: VmRecord
    policy: VmPolicy
    tracker: Mapping[str, Any] | None
    shipper: bool
    has_folder: bool
    age: float | None

    @property
    def is_protected(self) -> bool:
        return self.record.generation is not None


def vm_status(
    home: Home, vm: str, *, record: VmRecord, policy: VmPolicy, points: Callable[[str], int], now_ns: int
) -> VmStatus:
    """Ask everybody how `vm` is doing. `points`: how many the store has. What cannot be had because it is
    damaged becomes a reason; raises OSError alone."""
    folder = home.folder(vm)
    troubles: list[Reason] = []
    tracker = _tried(troubles, "tracker-damaged", lambda: _ask(home.tracker_socket(vm)), None)
    shipper = _tried(troubles, "shipper-damaged", lambda: _ask(home.shipper_socket(vm)), None) is not None
    nothing: dict[str, int] = {}
    sealed = _tried(troubles, "logs-damaged", lambda: _sealed_bytes(folder), nothing)
    count = _tried(troubles, "store-damaged", lambda: points(vm), 0)
    last = record.last_replication_time_ns
    facts = _Facts(
        vm=vm,
        record=record,
        policy=policy,
        tracker=tracker,
        shipper=shipper,
        has_folder=os.path.isdir(folder),
        age=None if last is None else max(0.0, (now_ns - last) / 1e9),
    )
    active = sum(max(0, disk["log_bytes"] - _EMPTY_LOG) for disk in tracker["disks"]) if tracker else 0
    in_doubt = sum(disk.get("resync_bytes", 0) for disk in tracker["disks"]) if tracker else 0
    return VmStatus(
        name=vm,
        state=_state(facts),
        reasons=(*troubles, *_reasons(facts)),
        last_cycle=record.cycle,
        last_replication_time_ns=last,
        rpo_seconds=facts.age,
        pending_bytes=active + sum(sealed.values()) + in_doubt,
        points=count,
        latest_point=record.point,
        progress=record.progress,
        disks=_disks(folder, tracker, sealed, policy.exclude),
        tracker=tracker is not None,
        shipper=shipper,
    )


def _tried(troubles: list[Reason], reason_id: str, ask: Callable[[], _Answer], otherwise: _Answer) -> _Answer:
    """The answer; or, if what is asked is damaged, a Critical reason in `troubles` and `otherwise`."""
    try:
        return ask()
    except HvfuseError as error:
        troubles.append(Reason(id=reason_id, health=Health.CRITICAL, text=str(error), next_command=error.hint))
        return otherwise


def _ask(socket_path: str) -> Mapping[str, Any] | None:
    try:
        return wire.request(socket_path, "status", timeout=ANSWER_SECONDS)
    except UnreachableError:
        return None


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
    """The recorded state, unless the tracker knows better."""
    if facts.tracker is None and facts.record.tracker_error is not None:
        return ReplicationState.ERROR
    if facts.record.state is ReplicationState.DISABLED and facts.shipper:
        return ReplicationState.READY_FOR_INITIAL_REPLICATION
    if facts.record.state is ReplicationState.REPLICATING and facts.tracker and facts.tracker["resync_required"]:
        return ReplicationState.WAITING_FOR_START_RESYNCHRONIZE
    return facts.record.state


def _reasons(facts: _Facts) -> Iterator[Reason]:
    state = _state(facts)
    yield from _process_reasons(facts)
    yield from _failure_reasons(facts, state)
    if state in _COPYING:
        done = f", {facts.record.progress:.0%} done" if facts.record.progress is not None else ""
        yield Reason(id="copying", health=Health.WARNING, text=f"the copy of the disks is not complete{done}")
    limit = max(STALE_SECONDS, STALE_INTERVALS * facts.policy.frequency)
    if facts.age is not None and facts.age > limit:
        text = f"the last recovery point is {facts.age / 60:.0f} minutes old"
        yield Reason(id="stale", health=Health.WARNING, text=text, next_command=f"hvfuse replicate {facts.vm}")
    for name in facts.tracker["untracked"] if facts.tracker else ():
        text = f"{name} came while the folder was mounted and is not tracked; restart `hvfuse run` when it may be"
        yield Reason(id="untracked-disk", health=Health.WARNING, text=text)


def _process_reasons(facts: _Facts) -> Iterator[Reason]:
    if not facts.has_folder:
        text = "its folder is gone; what was replicated is in the store"
        command = f"hvfuse failover test {facts.vm} --mount DIR"
        yield Reason(id="folder-gone", health=Health.CRITICAL, text=text, next_command=command)
        return
    if facts.tracker is None and facts.record.tracker_error is not None:
        yield Reason(
            id="tracker-failed",
            health=Health.CRITICAL,
            text=facts.record.tracker_error,
            next_command=facts.record.tracker_hint,
        )
    elif facts.tracker is None and facts.is_protected:
        text = "the VM is protected but not mounted: nothing tracks its writes"
        yield Reason(id="tracker-down", health=Health.CRITICAL, text=text, next_command="hvfuse run")
    if not facts.shipper and facts.is_protected:
        why = f": {facts.record.shipper_error}" if facts.record.shipper_error is not None else ""
        text = f"no shipper runs, so no recovery points are made{why}"
        yield Reason(id="shipper-down", health=Health.CRITICAL, text=text, next_command="hvfuse run")


def _failure_reasons(facts: _Facts, state: ReplicationState) -> Iterator[Reason]:
    record = facts.record
    resync = record.resync_reason or (facts.tracker or {}).get("resync_required")
    if state is ReplicationState.WAITING_FOR_START_RESYNCHRONIZE or (resync and state not in _COPYING):
        yield Reason(
            id="resync-required",
            health=Health.CRITICAL,
            text=f"a resynchronisation is required: {resync or 'the logs no longer continue the replica'}",
            next_command=f"hvfuse replicate {facts.vm}",
        )
    if record.error is not None:
        late = facts.age is None or facts.age > STALE_INTERVALS * facts.policy.frequency
        critical = late or state in _STOPPED
        yield Reason(
            id="replication-failing",
            health=Health.CRITICAL if critical else Health.WARNING,
            text=record.error,
            next_command=record.hint,
        )
