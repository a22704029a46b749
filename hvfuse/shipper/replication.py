"""One VM's way from source to replica: decides, copies, ships. Knows no schedule and no sockets."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from hvfuse.errors import HvfuseError, ResyncRequiredError, UnreachableError
from hvfuse.position import Position, PositionMismatchError
from hvfuse.shipper.coalesce import DamagedLogError
from hvfuse.shipper.compact import Compactor
from hvfuse.shipper.copies import FULL_ORDERED, Copies
from hvfuse.shipper.cycle import CycleReport, manifest, ship, total
from hvfuse.shipper.decide import Action, Decision, decide, pending
from hvfuse.shipper.doing import Doing
from hvfuse.shipper.freezing import Freezing
from hvfuse.shipper.guest import Guest
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.policy import CurrentPolicy, Records, ShippingPolicy
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.source import ResyncScope, Source, SourceStatus
from hvfuse.spool import SealedCycle
from hvfuse.states import COPYING, Event
from hvfuse.system import Clock

__all__ = ["RESYNC_ERRORS", "CurrentPolicy", "Records", "Replication", "ShippingPolicy"]

RESTING_SECONDS = 900.0
"""At least so far apart are the rotations while a copy waits: their logs travel as one."""

RESYNC_ERRORS = (PositionMismatchError, ResyncRequiredError, DamagedLogError)
"""What only a new copy helps against."""

_log = logging.getLogger(__name__)


class Replication:
    """Joins a source to a replica and keeps them joined. For one thread.

    `folder`: where the disks' images lie. `housekeep` is called after cycles were committed (merging,
    retention). `between` is called between frames and may raise to stop; what was under way resumes.
    `doubt_mismatches` has the source require a resynchronisation of what verification found to differ, and returns
    whether there is any. `full_begun` is told the generation at whose end everything is copied. `guest`: what can be
    frozen for application-consistent points, None where nothing can. `definition`: what the home's configuration says
    of the VM, as it is now, for the replica to keep; None for nothing.
    """

    def __init__(
        self,
        *,
        vm: str,
        folder: str,
        source: Source,
        replica: Replica,
        records: Records,
        policy: CurrentPolicy,
        clock: Clock,
        housekeep: Callable[[], None],
        between: Callable[[], None] = lambda: None,
        doubt_mismatches: Callable[[], bool] = lambda: False,
        full_begun: Callable[[bytes], None] = lambda generation: None,
        doing: Doing | None = None,
        guest: Guest | None = None,
        definition: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        self._vm = vm
        self._definition = definition
        self._source = source
        self._replica = replica
        self._records = records
        self._policy = policy
        self._clock = clock
        self._housekeep = housekeep
        self._between = between
        self._doubt_mismatches = doubt_mismatches
        self._doing = doing or Doing(clock)
        self._formats: dict[str, str] = {}
        self._rotated_at = -math.inf
        self._house_fault: tuple[str, str | None] | None = None  # why the target could not keep house, and its hint
        # Why everything has to be compared, although neither side says so, and the generation of which that is true.
        self._doubt: tuple[str, bytes | None] | None = None
        self._copies = Copies(
            vm=vm,
            folder=folder,
            source=source,
            replica=replica,
            records=records,
            policy=policy,
            clock=clock,
            between=between,
            full_begun=full_begun,
            doing=self._doing,
        )
        self.is_joined: bool | None = None
        """Whether logs could continue the replica when that was last looked at; None: not yet."""
        self.freezing = Freezing(
            vm=vm, guest=guest, every=lambda: policy.now.app_consistent, source=source, records=records, clock=clock
        )
        """What makes points application-consistent."""
        self._compactor = Compactor(between=between)

    @property
    def copies(self) -> Copies:
        """The copies of the VM."""
        return self._copies

    def cycle_now(self, *, asked: bool = True, application: bool = False) -> CycleReport:
        """Seal what was written until now and bring it, and all that waits, to the replica.

        Copies first where logs alone cannot do it; `asked`: at once, as somebody asked for the cycle, or else when
        the policy wants it; `application`: with the guest frozen at its barrier, if that can be done, whether it is
        due or not. Returns the last cycle's report with sums over all that went over. Raises WaitingError
        when a copy has to wait, UnreachableError when the tracker does not run and nothing waits.
        """
        self._copies.notes.clear()
        self._copies.demand_not_paused()
        self.freezing.asked = application
        try:
            report = self._cycle_or_copy(asked)
            if self._begin_order(self._copies.due_order()):
                report = total([report, self._cycle_or_copy(asked)])
        finally:
            self.freezing.asked = False
        self._keep_house()
        return replace(report, notes=tuple(self._copies.notes))

    def _begin_order(self, order: Orders) -> bool:
        """Begin a copy that was ordered beyond what is needed. Returns whether there is one."""
        if order.full:
            self._copies.start(self._source.status(), FULL_ORDERED, ResyncScope.FULL)
            return True
        if not order.repair:
            return False
        is_doubtful = self._doubt_mismatches()
        # In this order: killed in between, there is less in doubt the next time, but nothing is forgotten.
        self._records.change_orders(Orders.begin_repair if is_doubtful else Orders.withdraw)
        return is_doubtful

    def _cycle_or_copy(self, asked: bool) -> CycleReport:
        """A cycle, after a new copy if source and replica turn out not to be joined any more.

        After a failure both sides are asked again, as they may say more now; if they do not, everything is
        compared, once.
        """
        tries, committed, was_forced = 0, self._copies.committed, False
        while True:
            try:
                return self._cycle(asked)
            except RESYNC_ERRORS as error:
                if self._copies.committed != committed:
                    tries, committed = 0, self._copies.committed
                tries += 1
                if tries > 1 or isinstance(error, DamagedLogError):
                    if was_forced:
                        raise
                    self._doubt, was_forced = (str(error), self._source.status().generation), True
                _log.info("%s: %s", self._vm, error)

    def synchronise(self, *, asked: bool = True) -> None:
        """Make sure that logs can continue the replica; copy the disks if they cannot. Raises as `cycle_now`."""
        self._synchronise(asked)

    def _synchronise(self, asked: bool) -> list[CycleReport]:
        """As `synchronise`. Returns the reports of the cycles that went over on the way."""
        reports = []
        while True:
            self._between()
            self._doing.begin("asks both sides where they stand")
            status, decision = self._decide()
            self.is_joined = decision.action in (Action.SHIP, Action.NOTHING)
            match decision.action:
                case Action.SHIP_REST:
                    # These are whole points, and what is marked adds to the last of them.
                    self._copies.announce(decision.reason, status.resync_cause)
                    self._recall_formats()
                    waiting = pending(self._position(), self._source.cycles())
                    reports += [self._ship([cycle], joined=False, is_late=True) for cycle in waiting]
                case Action.START_COPY:
                    self._copies.start(status, decision.reason, decision.scope, asked=asked)
                case Action.RESUME_COPY:
                    self._copies.go_on(status, decision.reason, decision.scope, asked=asked)
                case Action.ACKNOWLEDGE_COPY:
                    self._copies.acknowledge(status)
                case _:
                    self._copies.settle()
                    return reports

    def _decide(self) -> tuple[SourceStatus, Decision]:
        status = self._settled(self._source.status())
        self._formats = {disk.name: disk.format for disk in status.disks}
        if self._doubt is not None and self._doubt[1] == status.generation:
            return status, Decision(Action.START_COPY, self._doubt[0])
        return status, decide(status, self._replica.position(), self._source.cycles())

    def _settled(self, status: SourceStatus) -> SourceStatus:
        """The source's status once it has taken in the disks that came, as far as it can now. From then on nothing is
        logged until a copy begins, so that has to be possible. Raises UnreachableError."""
        orders = self._records.orders()
        if not status.unsettled or orders.suspended or orders.paused:
            return status
        self._replica.position()
        try:
            self._source.take_in()
        except UnreachableError:
            raise
        except HvfuseError as error:
            _log.warning("%s: %s cannot be taken in: %s", self._vm, ", ".join(status.unsettled), error)
            return status
        return self._source.status()

    def _recall_formats(self) -> None:
        """What was sealed may be of disks of which the tracker cannot tell: they are gone, or it is."""
        for point in self._replica.points()[-1:]:
            self._formats = {disk.name: disk.format for disk in point.disks} | self._formats

    def _cycle(self, asked: bool) -> CycleReport:
        try:
            reports = self._synchronise(asked)
        except UnreachableError as error:
            return self._ship_what_waits(error)
        position = self._position()
        if position.cycle == 0:
            self._begin_first_point()
            reports += self._take_up_first()
            position = self._position()
        self._rotate_to(position)
        waiting = pending(position, self._source.cycles())
        # After a copy, only a barrier after its end is consistent: all logs up to it go as one cycle.
        runs = [waiting] if position.cycle == 0 else [[cycle] for cycle in waiting]
        return total([*reports, *(self._ship(run, is_late=run is not runs[-1]) for run in runs)])

    def _begin_first_point(self) -> None:
        """The copy is complete, and goes on with the point that makes it consistent: by this process, if the one that
        copied has ended."""
        if self._records.apply() in COPYING:
            self._records.apply(Event.START)

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
        if now - self._rotated_at < self._policy.now.frequency_seconds:
            return
        self._rotated_at = now
        status = self._source.status()
        if status.cycle > 1 and not status.resync_required and not status.resyncing:
            self.freezing.rotate()
        done = self._compactor.relieve(self._source.cycles(), soft_limit=self._policy.now.soft_limit)
        if done is not None:
            _log.info("%s: %s", self._vm, done.text)
            self._source.release(done.generation, 0)  # has the tracker count again what waits

    def rest(self) -> None:
        """While a copy waits, to be called again and again: seal a cycle now and then if writes are logged, so that
        a crash finds few regions hot. Raises HvfuseError; nothing depends on it."""
        now = self._clock.monotonic()
        if now - self._rotated_at < max(self._policy.now.frequency_seconds, RESTING_SECONDS):
            return
        self._rotated_at = now
        status = self._source.status()
        if status.generation is not None and not status.resync_required:
            self._source.rotate()

    def _rotate_to(self, position: Position) -> None:
        """Seal the active cycle. Raises ResyncRequiredError if logs since `position` are missing."""
        self._rotated_at = self._clock.monotonic()
        self._doing.begin("waits for the tracker to seal the cycle's logs")
        sealed = self.freezing.rotate()
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
        self._recall_formats()
        return total([self._ship([cycle], is_late=True) for cycle in waiting])

    def _position(self) -> Position:
        position = self._replica.position()
        if position is None:
            raise HvfuseError(f"{self._vm}: the replica does not know of the copy that was committed")
        return position

    def _ship(self, run: Sequence[SealedCycle], *, joined: bool = True, is_late: bool = False) -> CycleReport:
        """Bring a run of cycles over as one. `joined` false: a resynchronisation has to follow all the same.
        `is_late`: as `CycleReport` tells it."""
        definition = self._definition()
        if definition is not None:  # each time: the replica may be another one by now
            self._replica.define(definition)
        report = ship(
            run,
            vm=self._vm,
            formats=self._formats,
            replica=self._replica,
            level=self._policy.now.level,
            clock=self._clock,
            between=self._between,
            doing=self._doing.begin,
            consistency=self.freezing.promised(run[-1]),
        )
        report = replace(self.freezing.told(report), is_late=is_late)
        self._doing.begin("waits for the tracker to let the logs go")
        self._source.release(report.generation, report.cycle)
        joins: dict[str, object] = {"resync_reason": None, "resync_cause": None} if joined else {}
        error, hint = self._house_fault or (None, None)
        self._records.cycle(
            report,
            *((Event.COMMIT_POINT,) if joined else ()),
            error=error,
            hint=hint,
            progress=None,
            copy=None,
            generation=report.generation.hex(),
            cycle=report.cycle,
            point=report.point,
            last_replication_time_ns=report.sealed_ns,
            **joins,
        )
        return report

    def _keep_house(self) -> None:
        """The cycle is safe whatever happens here, so a failure is told but does not fail it. It stays shown until this
        succeeds: cycles that succeed meanwhile say nothing of it."""
        self._doing.begin("has the target merge what retention lets go")
        before, self._house_fault = self._house_fault, None
        try:
            self._housekeep()
        except HvfuseError as error:
            self._house_fault = str(error), error.hint
        if self._house_fault == before:
            return
        text, hint = self._house_fault or (None, None)
        if text is not None:
            _log.warning("%s: after the cycle: %s", self._vm, text)
        self._records.update(error=text, hint=hint)
