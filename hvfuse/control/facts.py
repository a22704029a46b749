"""What there is to know of how a VM's replication is doing, asked of tracker, shipper, folder, records and store.

Nothing is judged here (`hvfuse.control.health` does that) and nothing is remembered. What cannot be had because it is
damaged, or does not answer, is a trouble of its own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from hvfuse import spool, system, wire
from hvfuse.control.config import VmPolicy
from hvfuse.control.daemon import serving_pid
from hvfuse.control.forecast import Forecast, growth
from hvfuse.control.home import Home
from hvfuse.control.records import VmRecord
from hvfuse.control.statistics import CycleRecord, Sums
from hvfuse.control.supervisor import is_supervised
from hvfuse.errors import CorruptError, HvfuseError, UnreachableError
from hvfuse.formats import hrl
from hvfuse.formats.image import is_disk_name
from hvfuse.shipper import proofs
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.proofs import Verified
from hvfuse.spool import SealedLog
from hvfuse.states import ReplicationState

if TYPE_CHECKING:
    from hvfuse.target import schema

ANSWER_SECONDS = 3.0
"""How long to wait for a process to say how it is."""
FUTURE_SECONDS = 60.0
"""So far clocks may differ; a point that lies further ahead tells nothing of its age."""
RECORD_DAMAGED = "record-damaged"
"""Id of the trouble of a VM whose record cannot be read."""
_EMPTY_LOG = hrl.HEADER_SIZE + hrl.METADATA_SIZE
"""Bytes of a log in which nothing was written."""

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingTest:
    """A test failover that was not cleaned up. `is_served`: its process runs."""

    id: int
    since_ns: int
    is_served: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """What the store tells of a VM. `points`: how many recovery points it has; `newest_ns`: the instant of the newest,
    None if there is none. `state`: the replica's own, None if it has none. `replica`: its record: who has the VM."""

    points: int = 0
    newest_id: str | None = None
    newest_ns: int | None = None
    state: ReplicationState | None = None
    tests: tuple[StandingTest, ...] = ()
    replica: schema.VmRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What the records tell of the time that is looked back on. `interval`: seconds. `cycles`: the newest ones, oldest
    first."""

    interval: float = 43200.0
    sums: Sums = field(default_factory=lambda: Sums(begin=0))
    cycles: Sequence[CycleRecord] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A tracker or a shipper. `answer`: its own, None without one; `pid`: of whoever listens at its socket, None if
    nobody does; `is_stopped`: it stands still by a signal."""

    answer: Mapping[str, Any] | None = None
    pid: int | None = None
    is_busy: bool = False
    is_stopped: bool = False

    @property
    def is_there(self) -> bool:
        return self.is_busy or self.answer is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Something that could not be asked, or is damaged. `id`: as the reason's that it becomes."""

    id: str
    text: str
    hint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was found out, at `now_ns`. `names`: what the folder holds, None without one. `target`: None if the store
    could not be asked. `sealed`: bytes in sealed logs, by disk. `shipper_log`: path of what the shipper said.
    `is_supervised`: `hvfuse run` runs, and starts again what has died. `home_id`: of this home, None if it has none
    yet; `host`: the name of this machine."""

    vm: str
    now_ns: int
    record: VmRecord
    orders: Orders
    policy: VmPolicy
    tracker: Process
    shipper: Process
    names: frozenset[str] | None
    target: TargetFacts | None
    verified: Verified | None
    past: Past
    forecast: Forecast
    sealed: Mapping[str, int]
    shipper_log: str
    config_fault: str | None
    is_supervised: bool = False
    home_id: str | None = None
    host: str = ""
    troubles: tuple[Trouble, ...]

    @property
    def is_replica(self) -> bool:
        """Whether another home has the VM, or it was failed over to here and not taken over: this one has neither its
        disks nor a say in its replication."""
        record, replica = self.record, self.target.replica if self.target is not None else None
        is_ours = record.state is not ReplicationState.DISABLED or (record.enabled is not None)
        has_disks = any(is_disk_name(name) for name in self.names or ())  # those left out stay where a side gave way
        return replica is not None and not is_ours and (record.gave_way_ns is not None or not has_disks)

    @property
    def has_record(self) -> bool:
        """Whether the VM's record could be read; else it says nothing."""
        return all(trouble.id != RECORD_DAMAGED for trouble in self.troubles)

    @property
    def age(self) -> float | None:
        """Seconds since the instant of the newest point; negative if the clock was set back; None without one."""
        last = self.newest_ns
        return None if last is None else (self.now_ns - last) / 1e9

    @property
    def newest_ns(self) -> int | None:
        """Instant of the newest point, as this side knows it."""
        if self.is_replica and self.target is not None:
            return self.target.newest_ns
        return self.record.last_replication_time_ns

    @property
    def is_from_future(self) -> bool:
        return self.age is not None and self.age < -FUTURE_SECONDS

    @property
    def is_rolled_back(self) -> bool:
        """Whether the store lacks what it had acknowledged."""
        last = self.record.last_replication_time_ns
        if self.target is None or last is None or self.record.point is None:
            return False
        return self.target.newest_ns is None or self.target.newest_ns < last

    @property
    def rpo_seconds(self) -> float | None:
        """Age of what the target has; None where nobody can tell: the store does not answer, the clock was set back."""
        if self.target is None or self.age is None or self.is_from_future:
            return None
        if self.is_rolled_back:
            return None if self.target.newest_ns is None else max(0.0, (self.now_ns - self.target.newest_ns) / 1e9)
        return max(0.0, self.age)

    @property
    def rpo_bytes(self) -> int | None:
        """What was written and the target lacks, or is not known to have; None where the tracker does not say."""
        if self.tracker.answer is None:
            return None
        return self.logged_bytes + self.doubtful_bytes

    @property
    def tracked(self) -> Sequence[Mapping[str, Any]]:
        """The disks as the tracker tells of them; none where it does not answer."""
        return self.tracker.answer["disks"] if self.tracker.answer is not None else ()

    @property
    def doubtful_bytes(self) -> int:
        """What has to be compared with the replica, or is being compared, as far as the tracker says: how much of it
        differs, nobody knows."""
        return sum(disk.get("resync_bytes", 0) for disk in self.tracked)

    @property
    def logged_bytes(self) -> int:
        """What the logs hold that the target lacks; of those being written, as far as the tracker says."""
        active: int = sum(max(0, disk["log_bytes"] - _EMPTY_LOG) for disk in self.tracked)
        return active + sum(self.sealed.values())

    @property
    def awaits_seed(self) -> bool:
        """Whether nothing is copied over the network because another way was ordered."""
        return self.orders.seed is not None or (self.policy.initial.how == "seed" and self.record.point is None)

    @property
    def resync_reason(self) -> str | None:
        """Why a resynchronisation is required, if one is."""
        return self.record.resync_reason or (self.tracker.answer or {}).get("resync_required")


def gather(
    home: Home,
    vm: str,
    *,
    record: VmRecord,
    policy: VmPolicy,
    target: Callable[[str], TargetFacts],
    past: Past,
    now_ns: int,
    config_fault: str | None = None,
    record_fault: Trouble | None = None,
) -> Facts:
    """Ask everybody how `vm` is doing. `target`: asks the store. `record_fault`: `record` could not be read."""
    folder = home.folder(vm)
    troubles: list[Trouble] = [] if record_fault is None else [record_fault]
    unlisted: frozenset[str] | None = frozenset()
    nobody = Process()
    tracker = _tried(troubles, "tracker-damaged", lambda: _ask(home.tracker_socket(vm), record.tracker_process), nobody)
    shipper = _tried(troubles, "shipper-damaged", lambda: _ask(home.shipper_socket(vm), record.shipper_process), nobody)
    nothing: Sequence[SealedLog] = ()
    sealed = _tried(troubles, "logs-damaged", lambda: _sealed_logs(folder), nothing)
    unproved: Verified | None = None
    unknown: TargetFacts | None = None
    facts = Facts(
        vm=vm,
        now_ns=now_ns,
        record=record,
        orders=Orders.from_json(record.orders),
        policy=policy,
        tracker=tracker,
        shipper=shipper,
        names=_tried(troubles, "folder-damaged", lambda: _listed(folder), unlisted),
        target=_tried(troubles, "store-damaged", lambda: target(vm), unknown),
        verified=_tried(troubles, "proofs-damaged", lambda: proofs.load(home.proofs(vm)).verified(now_ns), unproved),
        past=past,
        forecast=Forecast(),
        sealed=_by_disk(sealed),
        shipper_log=home.log(vm, "shipper"),
        config_fault=config_fault,
        is_supervised=is_supervised(home),
        home_id=home.known_identity(),
        host=socket.gethostname(),
        troubles=(),
    )
    return replace(facts, troubles=tuple(troubles), forecast=_forecast(facts, sealed))


def _tried(troubles: list[Trouble], trouble_id: str, ask: Callable[[], _Answer], otherwise: _Answer) -> _Answer:
    """The answer; or, if it cannot be had, a trouble and `otherwise`."""
    try:
        return ask()
    except (HvfuseError, OSError) as error:
        if trouble_id == "store-damaged" and not isinstance(error, CorruptError):
            trouble_id = "store-unreachable"
        troubles.append(Trouble(id=trouble_id, text=str(error), hint=getattr(error, "hint", None)))
        return otherwise


def _ask(socket_path: str, last: Mapping[str, Any] | None) -> Process:
    try:
        answer = wire.request(socket_path, "status", timeout=ANSWER_SECONDS)
    except UnreachableError:
        return _silent(socket_path, last)
    return Process(answer=answer, pid=answer.get("pid"))


def _silent(socket_path: str, last: Mapping[str, Any] | None) -> Process:
    """A process that does not answer, if there is one. `last`: the identity of the one that served last."""
    try:
        pid = serving_pid(socket_path)
    except UnreachableError:  # so many wait for it that nobody can even ask who it is
        if last is None or not system.is_running(last):
            return Process(is_busy=True)
        pid = int(last["pid"])
    if pid is None:
        return Process()
    return Process(is_busy=True, pid=pid, is_stopped=system.process_is_stopped(pid))


def _listed(folder: str) -> frozenset[str] | None:
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else None


def _sealed_logs(folder: str) -> Sequence[SealedLog]:
    return spool.list_logs(folder) if os.path.isdir(folder) else ()


def _by_disk(logs: Sequence[SealedLog]) -> dict[str, int]:
    """Bytes in sealed logs, by disk."""
    found: dict[str, int] = {}
    for log in logs:
        found[log.disk] = found.get(log.disk, 0) + max(0, log.header.eol - _EMPTY_LOG)
    return found


def _forecast(facts: Facts, logs: Sequence[SealedLog]) -> Forecast:
    answer = facts.tracker.answer or {}
    waiting: dict[int, int] = {}
    for log in logs:
        waiting[log.header.sealed_ns] = waiting.get(log.header.sealed_ns, 0) + log.header.stored_bytes
    # While nothing is shipped, the logs that wait tell how fast they grow; else the cycles that were.
    rate = growth(sorted(waiting.items()))
    if rate is None:
        rate = growth([(cycle.time_ns, cycle.bytes_logged) for cycle in facts.past.cycles])
    return Forecast(
        rate=rate,
        used=answer.get("log_bytes", facts.logged_bytes),
        soft_limit=answer.get("soft_limit_bytes"),
        hard_limit=answer.get("hard_limit_bytes"),
    )
