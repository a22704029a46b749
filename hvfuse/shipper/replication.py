"""One VM's way from source to replica: decides, copies, ships. Knows no schedule and no sockets."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from hvfuse.errors import HvfuseError, ResyncRequiredError, UnreachableError
from hvfuse.formats.digests import Algorithm
from hvfuse.manifest import ReplicationState
from hvfuse.position import Position, PositionMismatchError
from hvfuse.shipper.coalesce import DamagedLogError
from hvfuse.shipper.compact import Compactor
from hvfuse.shipper.copy import CopyReport, Over, copy
from hvfuse.shipper.cycle import CycleReport, manifest, ship, total
from hvfuse.shipper.decide import Action, Decision, decide, pending
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.source import ResyncScope, Source, SourceStatus
from hvfuse.shipper.window import AT_NIGHT, AT_ONCE, Initial, Resync
from hvfuse.spool import SealedCycle
from hvfuse.system import Clock

PROGRESS_INTERVAL = 1.0
"""Seconds between durable records of a copy's progress."""

RESYNC_ERRORS = (PositionMismatchError, ResyncRequiredError, DamagedLogError)
"""What only a new copy helps against."""

_log = logging.getLogger(__name__)


class Records(Protocol):
    """Where a VM's replication stands, kept for others to see and for after a restart."""

    def update(self, **fields: object) -> None:
        """Keep new values, durably, of any of: `state` (ReplicationState); `error`, `hint`,
        `resync_reason` (text or None); `generation` (hex); `cycle`; `point` (id);
        `last_replication_time_ns`; `progress` (of a copy, 0 to 1, None when there is none); `copy`
        (`CopyProgress.as_json`, None when there is no copy); `copy_due_ns` (when a copy that waits starts by
        itself, ns since 1970, None when it does not); `orders` (Orders)."""

    def orders(self) -> Orders:
        """What an administrator ordered, as it was kept last."""

    def change_orders(self, change: Callable[[Orders], Orders]) -> Orders:
        """Replace the orders by what `change` makes of them, durably, in one step whoever else changes them.
        Returns the new ones; raises what `change` raises. For any thread."""

    def copy_progress(self) -> Mapping[str, object] | None:
        """What `copy` was kept last."""

    def cycle(self, report: CycleReport) -> None:
        """Keep the statistics of a committed cycle."""

    def copied(self, report: CopyReport) -> None:
        """Keep the statistics of a committed copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippingPolicy:
    """`frequency_seconds`: from one cycle's begin to the next's. `level`: zstd level, 0 for none.
    `soft_limit`: part of the disks' size; what sealed logs may hold before those of an outage are compacted.
    `algorithm`: of the digests by which copies compare. `resync`, `initial`: when copies start."""

    frequency_seconds: float = 30.0
    level: int = 1
    soft_limit: float = 0.25
    algorithm: Algorithm = Algorithm.XXH3
    resync: Resync = AT_NIGHT
    initial: Initial = AT_ONCE


class Replication:
    """Joins a source to a replica and keeps them joined. For one thread.

    `folder`: where the disks' images lie. `housekeep` is called after cycles were committed (merging,
    retention). `between` is called between frames and may raise to stop; what was under way resumes.
    """

    def __init__(
        self,
        *,
        vm: str,
        folder: str,
        source: Source,
        replica: Replica,
        records: Records,
        policy: ShippingPolicy,
        clock: Clock,
        housekeep: Callable[[], None],
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._vm = vm
        self._folder = folder
        self._source = source
        self._replica = replica
        self._records = records
        self._policy = policy
        self._clock = clock
        self._housekeep = housekeep
        self._between = between
        self._formats: dict[str, str] = {}
        self._recorded_at = clock.monotonic()
        self._notes: list[str] = []
        self._rotated_at = -math.inf
        self._compactor = Compactor(soft_limit=policy.soft_limit, between=between)

    def cycle_now(self) -> CycleReport:
        """Seal what was written until now and bring it, and all that waits, to the replica.

        Copies first where logs alone cannot do it. Returns the last cycle's report with sums over all
        that went over. Raises UnreachableError when the tracker does not run and nothing waits.
        """
        self._notes.clear()
        report = self._cycle_or_copy()
        self._keep_house()
        return replace(report, notes=tuple(self._notes))

    def _cycle_or_copy(self) -> CycleReport:
        """A cycle, after a new copy if source and replica turn out not to be joined any more."""
        try:
            return self._cycle()
        except DamagedLogError as error:
            self._start_copy(str(error))
            return self._cycle()
        except (PositionMismatchError, ResyncRequiredError) as error:
            _log.info("%s: %s", self._vm, error)
        try:
            return self._cycle()  # decides again, now that both sides may say more
        except RESYNC_ERRORS as error:
            self._start_copy(str(error))
            return self._cycle()

    def synchronise(self) -> None:
        """Make sure that logs can continue the replica; copy the disks if they cannot."""
        self._synchronise()

    def _synchronise(self) -> list[CycleReport]:
        """As `synchronise`. Returns the reports of the cycles that went over on the way."""
        status, decision = self._decide()
        reports = []
        while decision.action is Action.SHIP_REST:
            # These are whole points, and what is marked adds to the last of them.
            self._wait_for_resync(decision.reason)
            waiting = pending(self._position(), self._source.cycles())
            reports += [self._ship([cycle], joined=False) for cycle in waiting]
            status, decision = self._decide()
        match decision.action:
            case Action.START_COPY:
                self._start_copy(decision.reason, decision.scope)
            case Action.RESUME_COPY:
                self._copy(status, decision.scope)
            case Action.ACKNOWLEDGE_COPY:
                assert status.generation is not None
                self._source.resynced(status.generation)
        return reports

    def _decide(self) -> tuple[SourceStatus, Decision]:
        status = self._source.status()
        self._formats = {disk.name: disk.format for disk in status.disks}
        return status, decide(status, self._replica.position(), self._source.cycles())

    def _cycle(self) -> CycleReport:
        try:
            reports = self._synchronise()
        except UnreachableError as error:
            return self._ship_what_waits(error)
        reports += self._take_up_first()
        position = self._position()
        self._rotate_to(position)
        waiting = pending(position, self._source.cycles())
        # After a copy, only a barrier after its end is consistent: all logs up to it go as one cycle.
        runs = [waiting] if position.cycle == 0 else [[cycle] for cycle in waiting]
        return total([*reports, *(self._ship(run) for run in runs)])

    def _take_up_first(self) -> list[CycleReport]:
        """Finish the first cycle after a copy if an earlier run was interrupted at it.

        Frames that the replica holds of just the logs that wait prove that there was a rotation after
        the copy's end, so these logs are enough; otherwise there has to be one.
        """
        position = self._position()
        run = pending(position, self._source.cycles()) if position.cycle == 0 else []
        if run and self._replica.begin(manifest(run, vm=self._vm, formats=self._formats)):
            return [self._ship(run)]
        return []

    def hold_out(self) -> None:
        """While the target cannot be reached, to be called again and again: seal cycles at the policy's
        frequency, so that there are points of that time too, and compact them when they take up too much.

        Raises HvfuseError, OSError; nothing depends on it.
        """
        now = self._clock.monotonic()
        if now - self._rotated_at < self._policy.frequency_seconds:
            return
        self._rotated_at = now
        status = self._source.status()
        if status.cycle > 1 and not status.resync_required and not status.resyncing:
            self._source.rotate()
        done = self._compactor.relieve(self._source.cycles())
        if done is not None:
            _log.info("%s: %s", self._vm, done.text)
            self._source.release(done.generation, 0)  # has the tracker count again what waits

    def _rotate_to(self, position: Position) -> None:
        """Seal the active cycle. Raises ResyncRequiredError if logs since `position` are missing."""
        self._rotated_at = self._clock.monotonic()
        sealed = self._source.rotate()
        waiting = pending(position, self._source.cycles())
        if not waiting or waiting[-1].cycle < sealed:
            missing = waiting[-1].cycle + 1 if waiting else position.cycle + 1
            raise ResyncRequiredError(f"{self._vm}: the logs of cycle {missing} are missing")

    def _ship_what_waits(self, unreachable: UnreachableError) -> CycleReport:
        """While the tracker does not run: the sealed logs. Raises `unreachable` when there are none."""
        position = self._replica.position()
        # A fresh copy needs a barrier after its end, which only the tracker can make.
        waiting = pending(position, self._source.cycles()) if position and position.cycle else []
        if not waiting:
            raise unreachable
        for point in self._replica.points()[-1:]:
            self._formats = {disk.name: disk.format for disk in point.disks} | self._formats
        return total([self._ship([cycle]) for cycle in waiting])

    def _position(self) -> Position:
        position = self._replica.position()
        if position is None:
            raise HvfuseError(f"{self._vm}: the replica does not know of the copy that was committed")
        return position

    def _ship(self, run: Sequence[SealedCycle], *, joined: bool = True) -> CycleReport:
        """Bring a run of cycles over as one. `joined` false: a resynchronisation has to follow all the same."""
        report = ship(
            run,
            vm=self._vm,
            formats=self._formats,
            replica=self._replica,
            level=self._policy.level,
            clock=self._clock,
            between=self._between,
        )
        self._source.release(report.generation, report.cycle)
        self._records.cycle(report)
        self._records.update(
            error=None,
            hint=None,
            progress=None,
            generation=report.generation.hex(),
            cycle=report.cycle,
            point=report.point,
            last_replication_time_ns=report.sealed_ns,
        )
        if joined:
            self._records.update(state=ReplicationState.REPLICATING, resync_reason=None)
        return report

    def _wait_for_resync(self, reason: str) -> None:
        _log.info("%s: resynchronising: %s", self._vm, reason)
        if reason not in self._notes:
            self._notes.append(reason)
        self._records.update(state=ReplicationState.WAITING_FOR_START_RESYNCHRONIZE, resync_reason=reason)

    def _start_copy(self, reason: str, scope: ResyncScope = ResyncScope.FULL) -> None:
        """Begin a generation and copy. What the old generation's logs hold comes with the copy."""
        if self._replica.position() is not None:
            self._wait_for_resync(reason)
        else:
            _log.info("%s: copying: %s", self._vm, reason)
        if scope is ResyncScope.FULL:
            self._source.discard_damaged()  # for REGIONS the tracker has yet to mark what is in the logs
        status = self._source.begin(os.urandom(16), scope)
        self._formats = {disk.name: disk.format for disk in status.disks}
        self._copy(status, scope)

    def _copy(self, status: SourceStatus, scope: ResyncScope) -> None:
        """Copy, or go on with it: to a replica that has a position, the differences alone."""
        assert status.generation is not None
        position = self._replica.position()
        state = ReplicationState.RESYNCHRONIZING if position else ReplicationState.INITIAL_REPLICATION_IN_PROGRESS
        self._records.update(state=state, progress=0.0)
        # Also after an interruption: logs that no copy will ever need fill up the disk.
        self._source.release(status.generation, 0)
        regions = self._source.regions() if scope is ResyncScope.REGIONS else None
        report = copy(
            status.disks,
            vm=self._vm,
            folder=self._folder,
            generation=status.generation,
            replica=self._replica,
            level=self._policy.level,
            clock=self._clock,
            over=Over(previous=position, regions=regions) if position else None,
            progress=self._progress,
        )
        _log.info("%s: %s", self._vm, report.text)
        self._notes.append(report.text)
        self._records.copied(report)
        self._source.resynced(status.generation)
        self._records.update(progress=1.0)

    def _progress(self, done: int, total_bytes: int, sent: int) -> None:
        del sent
        self._between()
        now = self._clock.monotonic()
        if now - self._recorded_at >= PROGRESS_INTERVAL:
            self._recorded_at = now
            self._records.update(progress=done / total_bytes if total_bytes else 1.0)

    def _keep_house(self) -> None:
        """The cycle is safe whatever happens here, so a failure is told but does not fail it."""
        try:
            self._housekeep()
        except HvfuseError as error:
            _log.warning("%s: after the cycle: %s", self._vm, error)
            self._records.update(error=str(error), hint=error.hint)
