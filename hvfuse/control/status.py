"""How a VM's replication is doing, in one: what everybody says (`hvfuse.control.facts`), and what that means
(`hvfuse.control.health`). Nothing is remembered here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hvfuse.control.config import VmPolicy
from hvfuse.control.copy_health import copy_reasons, shown_state
from hvfuse.control.facts import Facts, Past, TargetFacts, Trouble, gather
from hvfuse.control.failover_health import replica_commands
from hvfuse.control.forecast import Forecast
from hvfuse.control.health import Health, Reason, commands, is_protected, reasons
from hvfuse.control.home import Home
from hvfuse.control.records import VmRecord
from hvfuse.errors import HvfuseError
from hvfuse.formats.image import is_disk_name, probe_for_tracking
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.proofs import Verified
from hvfuse.states import ReplicationState

__all__ = ["DiskStatus", "Health", "Reason", "VmStatus", "is_protected", "vm_status"]


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

    `rpo_seconds`: age of what the target has; `pending_bytes`: what the logs hold that the target lacks, and what has
    to be compared with it: together, what would be lost with the source. None where nobody can tell. `points`: recovery
    points in the store. `allowed`: the commands that its state allows.
    `copy`, `copy_due_ns`, `orders`: as in the VM's record. `verified`: None if it never was. `tracker`,
    `shipper`: whether they answer. `excluded`: disks that are there and, as hvfuse.toml says, not replicated.
    `frequency`: seconds from cycle to cycle. `role`: "source" of a VM that this home has, or had; "replica" of one of
    which its store holds the replica, whether or not it is failed over.
    """

    name: str
    state: ReplicationState
    reasons: tuple[Reason, ...]
    allowed: tuple[str, ...]
    last_cycle: int
    last_replication_time_ns: int | None
    rpo_seconds: float | None
    pending_bytes: int | None
    doubtful_bytes: int
    points: int | None
    latest_point: str | None
    replica_state: ReplicationState | None
    tests: int
    frequency: float
    past: Past
    forecast: Forecast
    copy: Mapping[str, Any] | None
    copy_due_ns: int | None
    orders: Orders
    verified: Verified | None = None
    disks: tuple[DiskStatus, ...]
    excluded: tuple[str, ...] = ()
    tracker: bool
    shipper: bool
    role: Literal["source", "replica"] = "source"

    @property
    def health(self) -> Health:
        """The worst reason's."""
        return max((reason.health for reason in self.reasons), default=Health.NORMAL)

    @property
    def is_protected(self) -> bool:
        """Whether it is to be replicated from here; of any other VM there is no health."""
        return self.state is not ReplicationState.DISABLED and self.role == "source"


def vm_status(
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
) -> VmStatus:
    """Ask everybody how `vm` is doing, and judge it. `target`: asks the store. What cannot be had becomes a reason.
    `record_fault`: `record` could not be read."""
    facts = gather(
        home,
        vm,
        record=record,
        policy=policy,
        target=target,
        past=past,
        now_ns=now_ns,
        config_fault=config_fault,
        record_fault=record_fault,
    )
    state = shown_state(facts)
    return VmStatus(
        name=vm,
        state=state,
        reasons=tuple(sorted((*reasons(facts, state), *copy_reasons(facts, state)), key=lambda one: -one.health)),
        allowed=_allowed(facts, state),
        last_cycle=record.cycle,
        last_replication_time_ns=facts.newest_ns,
        rpo_seconds=facts.rpo_seconds,
        pending_bytes=facts.rpo_bytes,
        doubtful_bytes=facts.doubtful_bytes,
        points=None if facts.target is None else facts.target.points,
        latest_point=facts.target.newest_id if facts.is_replica and facts.target is not None else record.point,
        replica_state=None if facts.target is None else facts.target.state,
        tests=0 if facts.target is None else len(facts.target.tests),
        frequency=policy.frequency,
        past=past,
        forecast=facts.forecast,
        copy=record.copy,
        copy_due_ns=record.copy_due_ns,
        orders=facts.orders,
        verified=facts.verified,
        excluded=tuple(sorted(facts.policy.exclude & (facts.names or frozenset()))),
        disks=_disks(home.folder(vm), facts),
        tracker=facts.tracker.answer is not None,
        shipper=facts.shipper.answer is not None,
        role="replica" if facts.is_replica else "source",
    )


def _allowed(facts: Facts, state: ReplicationState) -> tuple[str, ...]:
    """What may be ordered: by the recorded state where that says that the VM is not replicated, whatever is shown."""
    if not facts.has_record:
        return ()
    if facts.is_replica:
        return replica_commands(facts)
    return commands(facts.vm, state if is_protected(facts.record) else facts.record.state, paused=facts.orders.paused)


def _disks(folder: str, facts: Facts) -> tuple[DiskStatus, ...]:
    if facts.tracker.answer is not None:
        return tuple(
            DiskStatus(
                name=disk["name"],
                format=disk["format"],
                size=disk["size"],
                log_bytes=disk["log_bytes"] + facts.sealed.get(disk["name"], 0),
            )
            for disk in facts.tracker.answer["disks"]
        )
    disks = (name for name in sorted(facts.names or ()) if is_disk_name(name) and name not in facts.policy.exclude)
    return tuple(_disk_at_rest(folder, name, facts.sealed.get(name, 0)) for name in disks)


def _disk_at_rest(folder: str, name: str, log_bytes: int) -> DiskStatus:
    path = os.path.join(folder, name)
    image_format, size = "unreadable", 0
    with contextlib.suppress(HvfuseError, OSError):
        size = os.stat(path).st_size
        image_format = probe_for_tracking(path).format.value
    return DiskStatus(name=name, format=image_format, size=size, log_bytes=log_bytes)
