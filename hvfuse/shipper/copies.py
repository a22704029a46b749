"""The copies of one VM: which may start and when, each in passes until one fits into the logs, over any number of
runs.

A copy is of whole disks or of differences (`hvfuse.shipper.copy`). Before each step it is asked whether it may go on
(`hvfuse.shipper.permission`), between its frames too; if not, WaitingError says what it waits for. What it took is
kept while it runs (`hvfuse.shipper.progress`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from hvfuse.errors import HvfuseError
from hvfuse.position import Position
from hvfuse.shipper.copy import CopyReport, Over, copy
from hvfuse.shipper.doing import Doing
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.permission import Cause, Need, Wait, permission
from hvfuse.shipper.policy import CurrentPolicy, Records
from hvfuse.shipper.progress import CopyKind, CopyProgress, Meter
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.source import ResyncScope, Source, SourceStatus
from hvfuse.states import Event
from hvfuse.system import Clock
from hvfuse.words import bytes_text

STALLED_PASSES = 3
"""So many in a row that have hardly become smaller are told of."""

FULL_ORDERED = "a comparison of everything was ordered"

_log = logging.getLogger(__name__)


class WaitingError(HvfuseError):
    """A copy is needed, and waits."""

    recoverable = True

    def __init__(self, message: str, wait: Wait, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.wait = wait


class Copies:
    """Makes the copies of one VM. For one thread; `look_at_orders` for any.

    Arguments as for `Replication`. `notes`: in words, what was done, for whoever waits for it.
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
        between: Callable[[], None],
        full_begun: Callable[[bytes], None],
        doing: Doing,
    ) -> None:
        self._vm = vm
        self._folder = folder
        self._source = source
        self._replica = replica
        self._records = records
        self._policy = policy
        self._clock = clock
        self._between = between
        self._full_begun = full_begun
        self._doing = doing
        self._told_wait: tuple[object, ...] | None = None
        self._is_paused: bool | None = None  # None: not known yet whether it was before
        self._last_note: str | None = None
        self._orders_changed = False
        self._is_due_told = False
        self._is_stalled = False  # and it was told
        self.notes: list[str] = []
        self.due_ns: int | None = None
        """When a copy that waits goes on by itself, ns since 1970."""
        self.committed = 0
        """Copies, of this process."""
        self.is_copying = False

    def look_at_orders(self) -> None:
        """The orders have changed: a copy under way is to notice."""
        self._orders_changed = True

    def show_again(self) -> None:
        """Something else has changed what is shown, a failure, say: a copy that waits is to be told of anew."""
        self._told_wait = None

    def demand_not_paused(self) -> None:
        """Raises WaitingError if an administrator suspended replication; says once that it is not any more."""
        if self._records.orders().paused:
            if not self._is_paused:
                _log.info("%s: replication is suspended", self._vm)
            self._is_paused, self._told_wait = True, None
            self._records.apply(Event.SUSPEND, error=None, hint=None)
            self._set_due(None)  # nothing begins by itself, whatever waited for its time
            raise WaitingError(
                f"{self._vm}: {Cause.PAUSED.value}", Wait(Cause.PAUSED), hint=_hint(self._vm, Cause.PAUSED)
            )
        if self._is_paused is not False:
            self._is_paused = False
            self._records.resume()

    # When --------------------------------------------------------------------------------------------------

    def permit(self, status: SourceStatus, reason: str, scope: ResyncScope, *, asked: bool) -> ResyncScope:
        """What a copy of `scope` that is needed, or under way, is to compare. Raises WaitingError if it has to wait."""
        self._forget_other_seed()
        orders = self._orders_for(scope)
        if orders.full and not status.resyncing:
            scope = ResyncScope.FULL
        need = self._need(status, scope)
        wait = self._permission(need, orders, asked=asked)
        if wait is not None:
            self._wait(need, wait, reason, cause=status.resync_cause)
        if asked and (orders.cancelled or orders.at_ns is not None):
            self._records.change_orders(Orders.ask)
        return ResyncScope.FULL if orders.full else scope

    def _forget_other_seed(self) -> None:
        """Take back the order to wait for a medium where something else was imported, or adopted, in its place."""
        seed, position = self._records.orders().seed, self._replica.position()
        if seed is None or position is None or seed == _hex(position):
            return
        text = f"the replica stands at {position}, not at the seed that was exported: what differs is sent"
        _log.warning("%s: %s", self._vm, text)
        self._note(text)
        self._records.change_orders(lambda orders: replace(orders, seed=None))

    def _orders_for(self, scope: ResyncScope) -> Orders:
        """What is needed in the meantime does not wait for what was ordered beyond it, for later."""
        orders = self._records.orders()
        is_later = orders.at_ns is not None and orders.at_ns > self._clock.now_ns()
        if orders.is_beyond_need and is_later and scope is ResyncScope.REGIONS:
            return replace(orders, full=False, repair=False, at_ns=None)
        return orders.later

    def due_order(self) -> Orders:
        """What was ordered of a VM that needs no copy, and may start now: `full` or `repair`; else nothing."""
        orders = self._records.orders().later
        wait = None
        if orders.is_beyond_need:
            wait = self._permission(Need(is_first=False, stands_at=_hex(self._replica.position())), orders)
        self._set_due(wait.until_ns if wait else None)
        return orders if orders.is_beyond_need and wait is None else Orders()

    def settle(self) -> None:
        """No copy is needed: what was ordered is done."""
        orders = self._records.orders()
        if orders != orders.done():
            self._records.change_orders(Orders.done)
        self._told_wait = None

    def _need(self, status: SourceStatus, scope: ResyncScope) -> Need:
        position = self._replica.position()
        is_whole = scope is ResyncScope.FULL or not status.bytes_total
        follows = position is not None and position.generation == status.generation and position.cycle == 0
        return Need(
            is_first=not self._replica.points(),
            is_under_way=status.resyncing,
            is_pass=follows and scope is ResyncScope.REGIONS,
            part=1.0 if is_whole else status.dirty_bytes / status.bytes_total,
            length=None if is_whole else status.dirty_bytes,
            stands_at=_hex(position),
            is_for_disks=not is_whole and status.resync_cause == "disks",
        )

    def _permission(self, need: Need, orders: Orders, *, asked: bool = False) -> Wait | None:
        return permission(
            need,
            orders,
            resync=self._policy.now.resync,
            initial=self._policy.now.initial,
            now_ns=self._clock.now_ns(),
            asked=asked,
        )

    def _wait(self, need: Need, wait: Wait, reason: str, *, cause: str | None) -> NoReturn:
        """Show that a copy waits, and say so to whoever asked."""
        told = (_waiting_events(need, wait), wait, reason)
        if told != self._told_wait:
            if wait.cause is Cause.CANCELLED:
                self._replica.abandon()
            self._told_wait = told
            _log.info("%s: %s", self._vm, _waiting_text(need, wait))
            dropped: dict[str, object] = {"progress": None, "copy": None} if wait.cause is Cause.CANCELLED else {}
            dropped |= {"error": None, "hint": None, "resync_reason": None if need.is_first else reason}
            dropped["resync_cause"] = None if need.is_first else cause
            self._records.apply(*_waiting_events(need, wait), **dropped)
        self._set_due(wait.until_ns)
        text = f"{self._vm}: {_waiting_text(need, wait)}"
        raise WaitingError(text, wait, hint=_hint(self._vm, wait.cause))

    def _set_due(self, due_ns: int | None) -> None:
        if due_ns != self.due_ns or not self._is_due_told:
            self.due_ns, self._is_due_told = due_ns, True
            self._records.update(copy_due_ns=due_ns)

    # What --------------------------------------------------------------------------------------------------

    def start(self, status: SourceStatus, reason: str, scope: ResyncScope, *, asked: bool = False) -> None:
        """Begin a generation and copy. What the old generation's logs hold comes with the copy.

        Raises WaitingError, ResyncRequiredError (`scope` is too narrow), and as `Replication.cycle_now`.
        """
        self._begin(status, reason, self.permit(status, reason, scope, asked=asked))

    def _begin(self, status: SourceStatus, reason: str, scope: ResyncScope) -> None:
        need = self._need(status, scope)
        _log.info("%s: %s: %s", self._vm, "copying" if need.is_first else "resynchronising", reason)
        if not need.is_first and not need.is_pass:
            self._announce(reason, status.resync_cause if scope is ResyncScope.REGIONS else None)
        if scope is ResyncScope.FULL:
            self._source.discard_damaged()  # for REGIONS the tracker has yet to mark what is in the logs
        before, status = status, self._source.begin(os.urandom(16), scope)
        if scope is ResyncScope.FULL and before.generation is not None:
            self._full_begun(before.generation)
        self._copy(status, scope)

    def announce(self, reason: str, cause: str | None) -> None:
        """A copy is to start as soon as what was sealed before has gone over. Raises WaitingError if not even that
        is to be sent."""
        if self._records.orders().suspended:
            self._wait(Need(is_first=not self._replica.points()), Wait(Cause.SUSPENDED), reason, cause=cause)
        self._announce(reason, cause)

    def _announce(self, reason: str, cause: str | None) -> None:
        self._note(reason)
        self._records.apply(Event.NEED_RESYNC, resync_reason=reason, resync_cause=cause)

    def go_on(self, status: SourceStatus, reason: str, scope: ResyncScope, *, asked: bool) -> None:
        """Go on with the copy that is under way; or begin one of everything, if that was ordered. Raises as `start`."""
        wanted = self.permit(status, reason, scope, asked=asked)
        if wanted is scope:
            self._copy(status, scope)
        else:
            self._begin(status, FULL_ORDERED, wanted)

    def acknowledge(self, status: SourceStatus) -> None:
        """The replica has the copy; its last run ended before it could say so."""
        assert status.generation is not None
        kept = CopyProgress.from_json(self._records.copy_progress())
        if kept is not None and kept.generation == status.generation.hex() and kept.report and not kept.is_told:
            self._tell(kept, kept.report)
        self._source.resynced(status.generation)

    def _copy(self, status: SourceStatus, scope: ResyncScope) -> None:
        """Copy, or go on with it: to a replica that has a position, the differences alone."""
        assert status.generation is not None
        self._take_full_back(scope)
        position = self._replica.position()
        need = replace(self._need(status, scope), is_under_way=True)
        meter = self._meter(status.generation, position, need)
        self._set_due(None)
        self._told_wait = None
        needed = Event.NEED_FIRST_COPY if meter.now.kind is CopyKind.INITIAL else Event.NEED_RESYNC
        # What an earlier attempt failed at is over; that passes do not get smaller is not.
        over_now = {} if meter.now.stalled_before >= STALLED_PASSES else {"error": None, "hint": None}
        self._records.apply(needed, Event.START, progress=meter.now.part, copy=meter.now.as_json(), **over_now)
        # Also after an interruption: logs that no copy will ever need fill up the disk.
        self._source.release(status.generation, 0)
        regions = self._source.regions() if scope is ResyncScope.REGIONS else None
        over = Over(previous=position, regions=regions) if position else None
        self._run(status, meter, need, scope, over)
        self.committed += 1
        assert meter.now.report is not None
        self._tell(meter.now, meter.now.report)
        self._source.resynced(status.generation)
        self._look_at_pace(meter.now)

    def _take_full_back(self, scope: ResyncScope) -> None:
        """A copy of everything is what was ordered, whyever it began."""
        if scope is ResyncScope.FULL and self._records.orders().full:
            self._records.change_orders(lambda orders: replace(orders, full=False))

    def _run(self, status: SourceStatus, meter: Meter, need: Need, scope: ResyncScope, over: Over | None) -> None:
        assert status.generation is not None
        self.is_copying = True
        self._doing.begin("begins a copy at the target")
        try:
            copy(
                status.disks,
                vm=self._vm,
                folder=self._folder,
                generation=status.generation,
                replica=self._replica,
                level=self._policy.now.level,
                clock=self._clock,
                over=over,
                algorithm=self._policy.now.algorithm,
                progress=lambda *figures: self._obey(need, scope, kept=meter.tell(*figures)),
                before_commit=meter.complete,
            )
        except HvfuseError as error:
            meter.save()
            if isinstance(error, _HeldUpError):
                self._wait(need, error.wait, "the copy is not complete", cause=status.resync_cause)
            raise
        finally:
            self.is_copying = False

    def _meter(self, generation: bytes, position: Position | None, need: Need) -> Meter:
        """Goes on counting where an earlier run of this copy, or the pass before it, ended."""
        kept = CopyProgress.from_json(self._records.copy_progress())
        kind = CopyKind.INITIAL if need.is_first else CopyKind.RESYNC
        if kept is not None and kept.kind is CopyKind.EXPORT:
            kept = None
        if kept is not None and kept.generation == generation.hex():
            now = replace(kept, report=None)
        elif kept is not None and kept.report and position is not None and kept.generation == _hex(position):
            now = kept.next_pass(generation.hex())
        else:
            now = CopyProgress(kind=kind, generation=generation.hex())
        return Meter(now, clock=self._clock, keep=self._keep)

    def _keep(self, now: CopyProgress) -> None:
        self._records.update(progress=now.part, copy=now.as_json())

    def _obey(self, need: Need, scope: ResyncScope, *, kept: bool) -> None:
        """Between two frames. `kept`: that is the moment to look whether orders came past this process, too."""
        self._between()
        self._doing.begin("compares and sends what differs")
        if kept or self._orders_changed:
            self._orders_changed = False
            self._take_full_back(scope)
            wait = self._permission(need, self._orders_for(scope))
            if wait is not None:
                raise _HeldUpError(f"{self._vm}: {wait.text}", wait)

    # How it went -------------------------------------------------------------------------------------------

    def _tell(self, now: CopyProgress, report: CopyReport) -> None:
        """Once for each pass: what it took, with those before it."""
        _log.info("%s: %s", self._vm, report.text)
        if self._last_note in self.notes and now.number > 1:
            self.notes.remove(self._last_note)
        self._last_note = report.text
        self._note(report.text)
        self._records.copied(report)
        self._records.update(progress=1.0, copy=replace(now, is_told=True).as_json())

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _look_at_pace(self, now: CopyProgress) -> None:
        """Say that the guest is faster than the copy, and take it back when it is not any more."""
        if now.stalled >= STALLED_PASSES:
            text = _stalled_text(now)
            _log.log(logging.INFO if self._is_stalled else logging.WARNING, "%s: %s", self._vm, text)
            self._is_stalled = True
            self._records.update(error=text, hint=_STALLED_HINT)
            if text not in self.notes:
                self.notes[:] = [note for note in self.notes if not note.startswith(_STALLED)] + [text]
        elif now.stalled_before >= STALLED_PASSES:
            self._is_stalled = False
            self._records.update(error=None, hint=None)


class _HeldUpError(WaitingError):
    """Raised between two frames; what is to follow has to wait until nobody uses the replica any more."""


_STALLED = "the guest writes faster than the copy gets over"
_STALLED_HINT = "let the guest write less for a while, or give the copy more bandwidth or the logs a higher soft_limit"


def _stalled_text(now: CopyProgress) -> str:
    """What a pass sent was written during the pass before it."""
    written = bytes_text(round(now.bytes_sent / max(now.previous_seconds, 1e-3)))
    sent = bytes_text(round(now.bytes_sent / max(now.seconds, 1e-3)))
    return f"{_STALLED}: {written}/s against {sent}/s in pass {now.number}; it goes on trying"


def _hint(vm: str, cause: Cause) -> str:
    match cause:
        case Cause.SUSPENDED:
            return f"hvfuse resync {vm} --resume"
        case Cause.PAUSED:
            return f"hvfuse replication resume {vm}"
        case Cause.SEED:
            return f"at the target: hvfuse seed import DIR; over the network instead: hvfuse resync {vm} --now"
        case _:
            return f"hvfuse resync {vm} --now"


def _hex(position: Position | None) -> str | None:
    return None if position is None else position.generation.hex()


def _waiting_text(need: Need, wait: Wait) -> str:
    return f"the {'first copy' if need.is_first else 'resynchronisation'} {wait.text}"


def _waiting_events(need: Need, wait: Wait) -> tuple[Event, ...]:
    """What it means for the state that a copy waits."""
    needed = Event.NEED_FIRST_COPY if need.is_first else Event.NEED_RESYNC
    if wait.cause is Cause.SEED and need.is_first:
        needed = Event.AWAIT_FIRST_COPY
    match wait.cause:
        case Cause.SUSPENDED | Cause.PAUSED:
            return needed, Event.SUSPEND
        case Cause.CANCELLED:
            return needed, Event.CANCEL
        case _:
            return (needed,)
