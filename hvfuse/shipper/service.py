"""The shipper of one VM as a process: when to ship, what to do when it fails, and who may ask.

Everything that touches source or replica happens in the one thread that calls `run` (or `cycle_now`,
where there is no loop). The control socket's threads hand a request over and wait for its answer; only an
administrator's orders they take themselves, as a long copy has to obey them too.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from hvfuse import errors, wire
from hvfuse.errors import (
    BusyError,
    FencedError,
    HvfuseError,
    ResyncRequiredError,
    StateError,
    UnreachableError,
    UsageError,
)
from hvfuse.position import PositionMismatchError
from hvfuse.shipper.copies import WaitingError
from hvfuse.shipper.cycle import CycleReport
from hvfuse.shipper.doing import Doing
from hvfuse.shipper.export import Exporter, ExportReport, without_seed
from hvfuse.shipper.guest import Guest
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.permission import Cause
from hvfuse.shipper.policy import CurrentPolicy, Records
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.replication import RESYNC_ERRORS, Replication
from hvfuse.shipper.retry import refusal
from hvfuse.shipper.schedule import Schedule
from hvfuse.shipper.shown import ShownRecords
from hvfuse.shipper.source import Source
from hvfuse.shipper.throttle import ThrottledReplica
from hvfuse.shipper.verifier import Verifier
from hvfuse.states import Event
from hvfuse.system import Clock

LOOK_UP = 0.5
"""Seconds after which a waiting loop looks at its stop event, which a signal may have set."""

SEED_LOOK = 10.0
"""Seconds between two looks at a replica that is to be imported."""

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")


class StoppedError(UnreachableError):
    """The shipper was told to stop; what it was at resumes with its next start."""


class Shipper:
    """Ships one VM at its policy's frequency, and when asked to.

    `folder`: where the disks' images lie. `housekeep` is called after cycles were committed,
    `on_point` once they are shown in the records, and when `run` begins. `proofs_path`: of the
    file of what verification proved; without one nothing can be verified. `guest`, `definition`: see
    `Replication`. `on_fenced`: called when the target refuses the VM as another side's; looks what became of it, and
    returns whether another side has it. If not, it is tried again at once, once.
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
        housekeep: Callable[[], None] = lambda: None,
        on_point: Callable[[], None] = lambda: None,
        proofs_path: str | None = None,
        guest: Guest | None = None,
        on_fenced: Callable[[], bool] = lambda: False,
        definition: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        self._vm = vm
        self._on_fenced = on_fenced
        self._was_fenced = False
        self._source = source
        self._shown = ShownRecords(records)
        self._doing = Doing(clock)
        replica = ThrottledReplica(replica, policy=policy, clock=clock, between=self._hold_back)
        self._replication = Replication(
            vm=vm,
            folder=folder,
            source=source,
            replica=replica,
            records=self._shown,
            policy=policy,
            clock=clock,
            housekeep=housekeep,
            between=self.check_stop,
            doubt_mismatches=self._doubt,
            full_begun=self._full_begun,
            doing=self._doing,
            guest=guest,
            definition=definition,
        )
        self._exporter = Exporter(
            vm=vm,
            folder=folder,
            source=source,
            replica=replica,
            records=self._shown,
            policy=policy,
            clock=clock,
            between=self.check_stop,
        )
        self._on_point = on_point
        self._verifier: Verifier | None = None
        if proofs_path is not None:
            self._verifier = Verifier(
                vm=vm,
                folder=folder,
                path=proofs_path,
                source=source,
                replica=replica,
                clock=clock,
                ship=partial(self._attempt, asked=False),
                allow_copy=self._allow_repair,
                policy=policy,
            )
        self._policy = policy
        self._followed = policy.now
        self._clock = clock
        self._begun = clock.monotonic()  # the last attempt
        self._schedule = Schedule(policy.now.frequency_seconds, due=self._begun)
        self._holds_out = False  # the target is away, but will be back; or replication is suspended
        self._waits = False  # a copy does
        self._complaint = ""
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._guard = threading.Lock()  # of the two fields below: no request may slip in after the last turn
        self._requests: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._ended = False
        self._answers: dict[str, Callable[[wire.Message], Mapping[str, object]]] = {
            "cycle": lambda message: self.request_cycle(application=bool(message.get("application"))).as_json(),
            "status": lambda message: self._status(),
            "stop": lambda message: self._stop_soon(),
            "resync": lambda message: _told(
                self.order_resync(full=bool(message.get("full")), at_ns=_resync_at(message))
            ),
            "suspend": lambda message: _told(self.suspend()),
            "resume": lambda message: _told(self.resume()),
            "cancel": lambda message: _told(self.cancel()),
            "pause": lambda message: _told(self._order(Orders.pause)),
            "unpause": lambda message: _told(self._order(Orders.unpause)),
            "wake": lambda message: self._wake_up(),
            "export": lambda message: self.request(partial(self.export, str(message.get("directory")))).as_json(),
            "unseed": lambda message: _told(self.unseed()),
            "verify": lambda message: self.request(partial(self.verify, message)),
        }
        self.missed = 0
        """Cycles that were due and did not come, since this process began."""

    def synchronise(self) -> None:
        """Make sure that logs can continue the replica; copy the disks if they cannot. Raises HvfuseError."""
        self._replication.synchronise()

    def thaw_leftover(self) -> None:
        """Thaw the guest if an earlier shipper died while it stood still. Comes before anything else."""
        self._replication.freezing.thaw_leftover()

    def cycle_now(self, *, application: bool = False) -> CycleReport:
        """One cycle, at once, in this thread. Raises HvfuseError; see `Replication.cycle_now`."""
        return self._cycle(asked=True, application=application)

    def _cycle(self, *, asked: bool, application: bool = False) -> CycleReport:
        try:
            report = self._replication.cycle_now(asked=asked, application=application)
        except OSError as error:
            raise refusal(error) from error
        self._tell_point()
        return report

    def _tell_point(self) -> None:
        """The point is safe whatever happens here."""
        try:
            self._on_point()
        except (HvfuseError, OSError) as error:
            _log.warning("%s: after the recovery point: %s", self._vm, error)

    def run(self, stop_event: threading.Event) -> None:
        """Ship until `stop_event` is set, by anybody, or somebody asks over the socket to stop."""
        self._stop = stop_event
        self._tell_point()
        try:
            while not stop_event.is_set():
                wait = self.turn()
                self._wake.wait(min(wait, LOOK_UP))
                self._wake.clear()
        finally:
            self._end()

    def turn(self) -> float:
        """Do what is due or asked for. Returns the seconds until something is due again (may be inf)."""
        self._follow_policy()
        self._serve_requests()
        if self._schedule.wait(self._clock.monotonic()) == 0 or self._until_copy() == 0:
            with contextlib.suppress(HvfuseError):  # told, and shown
                self._attempt(asked=False)
        if self._holds_out:
            self._meanwhile("the target is away", self._replication.hold_out)
        elif self._waits:
            self._meanwhile("a copy waits", self._replication.rest)
        if self._verifier is not None:
            self._verifier.idle()
        self._count(self._schedule.missed(self._clock.monotonic()))
        return min(self._schedule.wait(self._clock.monotonic()), self._until_copy())

    def _count(self, missed: int) -> None:
        if missed:
            self.missed += missed
            self._shown.missed(missed)

    def _follow_policy(self) -> None:
        """Take over what has changed of the policy.

        With a shorter frequency the next cycle is due one new interval after the last began; a longer one applies from
        the next cycle on. A copy that waits looks at once whether it still has to.
        """
        self._policy.refresh()
        policy, before = self._policy.now, self._followed
        if policy is before:
            return
        self._followed, now = policy, self._clock.monotonic()
        if policy.frequency_seconds != before.frequency_seconds:
            self._count(self._schedule.missed(now))
            self._schedule.change_frequency(policy.frequency_seconds, now, begun=self._begun)
        if self._waits:
            self._schedule.due = now

    def _until_copy(self) -> float:
        """Seconds until a copy that waits may start by itself; inf if none does, or attempts fail anyway."""
        due_ns = self._replication.copies.due_ns
        if due_ns is None or self._schedule.failing_since is not None:
            return math.inf
        return max(0.0, (due_ns - self._clock.now_ns()) / 1e9)

    def _serve_requests(self) -> None:
        """Do what was asked for; once for all that asked for the same."""
        with self._guard:
            requests, self._requests = self._requests, []
        asked: dict[Callable[[], Any], list[Future[Any]]] = {}
        for action, answer in requests:
            asked.setdefault(action, []).append(answer)
        for action, answers in asked.items():
            try:
                outcome = action()
            except BaseException as error:
                for answer in answers:
                    answer.set_exception(error)
                if not isinstance(error, Exception):
                    raise
                if not isinstance(error, (HvfuseError, OSError)):
                    _log.exception("%s: a request failed", self._vm)
            else:
                for answer in answers:
                    answer.set_result(outcome)

    def _meanwhile(self, what: str, do: Callable[[], None]) -> None:
        """Look after the logs. What keeps failing here is told once, not twice a minute."""
        try:
            do()
            self._complaint = ""
        except UnreachableError:
            pass  # told to stop; or it is the tracker that is away, and then nothing grows
        except (HvfuseError, OSError) as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                _log.warning("%s: while %s: %s", self._vm, what, error)

    def _attempt(self, *, asked: bool, application: bool = False) -> CycleReport:
        started, copies = self._clock.monotonic(), self._replication.copies.committed
        self._begun = started
        self._holds_out = self._waits = False
        try:
            report = self._cycle(asked=asked, application=application)
        except StoppedError:
            raise
        except WaitingError as waiting:
            # No failure. Both sides are looked at again and again: what is waited for may come from elsewhere.
            self._holds_out = waiting.wait.cause is Cause.PAUSED
            self._waits = not self._holds_out
            pause = SEED_LOOK if waiting.wait.cause is Cause.SEED else None
            self._schedule.waits(self._clock.monotonic(), pause)
            raise
        except HvfuseError as error:
            self._failed(error, started)
            raise
        finally:
            self._doing.rest()
        self._was_fenced = False
        copied = self._replication.copies.committed != copies
        self._count(self._schedule.succeeded(started, self._clock.monotonic(), copied=copied))
        return report

    def _failed(self, error: HvfuseError, started: float) -> None:
        """Say so, and set when to try again: by the ladder, or not before somebody asks."""
        now = self._clock.monotonic()
        if isinstance(error, BusyError) and self._schedule.is_passing(started, now):
            # Two who take turns at the replica, such as an import. That is over in a moment, and no trouble.
            _log.info("%s: %s", self._vm, error)
            self._holds_out = True
            return
        _log.warning("%s: %s", self._vm, error)
        if isinstance(error, FencedError) and self._is_explained(now):
            return
        lost = isinstance(error, RESYNC_ERRORS)
        self._holds_out = error.recoverable and not lost
        self._replication.copies.show_again()
        self._schedule.failed(started, now, lasting=not (lost or error.recoverable))
        if isinstance(error, StateError):
            return  # replication was ended, or failed over: there is nothing to tell of that
        self._shown.failed(error)
        fields: dict[str, object] = {"error": str(error), "hint": error.hint}
        if lost:
            self._shown.apply(Event.NEED_RESYNC, resync_reason=str(error), resync_cause=None, **fields)
        elif not error.recoverable:
            self._shown.apply(Event.FAIL, **fields)
        else:
            self._shown.update(**fields)

    def _is_explained(self, now: float) -> bool:
        """Whether there is nothing to tell of being fenced: the state says that another side has the VM; or had it for
        a while, which was not known here yet."""
        if self._on_fenced():
            self._schedule.failed(now, now, lasting=True)
            return True
        self._was_fenced = not self._was_fenced
        if self._was_fenced:
            self._schedule.waits(now, LOOK_UP)
        return self._was_fenced

    def check_stop(self) -> None:
        """Raises StoppedError once the shipper was told to stop."""
        if self._stop.is_set():
            raise StoppedError(f"{self._vm}: the shipper was told to stop")

    def _hold_back(self) -> None:
        """A frame waits, as the throttle says: the shipper does not hang. Raises StoppedError."""
        self.check_stop()
        self._doing.begin("holds a frame back, as the throttle says")

    def _end(self) -> None:
        with self._guard:
            self._ended = True
            requests, self._requests = self._requests, []
        if self._verifier is not None:
            self._verifier.close()
        for _, answer in requests:
            answer.set_exception(StoppedError(f"{self._vm}: the shipper has stopped"))

    def listen(self, path: str) -> wire.Listener:
        """Serve the control socket at `path`. Close it after `run`.

        cycle   application  -> the fields of `CycleReport`, once the cycle is committed
        resync  full, at_ns  -> "orders"; `order_resync`
        suspend              -> "orders"
        resume               -> "orders"
        pause                -> "orders"; nothing is shipped any more, writes are logged
        unpause              -> "orders"; takes back both kinds of suspension
        cancel               -> "orders"
        wake                 -> {}; what is due or failed is tried at once
        export  directory    -> the fields of `ExportReport`, once the medium is complete
        unseed               -> "orders"
        verify  ...          -> `hvfuse.shipper.verifier`
        status               -> what is in the records
        stop                 -> {}
        """
        return wire.Listener(path, self._handle, name=f"shipper-{self._vm}", concurrent=True)

    def _handle(self, message: wire.Message) -> Mapping[str, object]:
        answer = self._answers.get(str(message.get("op")))
        if answer is None:
            raise UsageError(f"the shipper does not know the request {message.get('op')!r}")
        try:
            return answer(message)
        except HvfuseError as error:
            raise _for_the_wire(error) from error

    def _status(self) -> Mapping[str, object]:
        return {"vm": self._vm, "missed": self.missed, **self._doing.as_json(), **self._shown.fields}

    def _stop_soon(self) -> Mapping[str, object]:
        self._stop.set()
        self._wake.set()
        return {}

    def _wake_up(self) -> Mapping[str, object]:
        self._hand_over(self._look_again)
        return {}

    def request_cycle(self, *, application: bool = False) -> CycleReport:
        """Have the loop's thread do a cycle, and wait for it. For any other thread."""
        return self.request(self._asked_application_cycle if application else self._asked_cycle)

    def _asked_cycle(self) -> CycleReport:
        return self._attempt(asked=True)

    def _asked_application_cycle(self) -> CycleReport:
        return self._attempt(asked=True, application=True)

    def _look_again(self) -> None:
        with contextlib.suppress(HvfuseError):
            self._attempt(asked=False)

    def request(self, action: Callable[[], _Answer]) -> _Answer:
        """Have the loop's thread do something between two cycles, and wait for it. For any other thread.

        Raises what it raised, and StoppedError if it does not come to it any more. Equal actions that wait at the
        same time are done once. A long one has to look for a stop by itself (`check_stop`).
        """
        return self._hand_over(action).result()

    def _hand_over(self, action: Callable[[], _Answer]) -> Future[_Answer]:
        answer: Future[_Answer] = Future()
        with self._guard:
            if self._ended:
                raise StoppedError(f"{self._vm}: the shipper has stopped")
            self._requests.append((action, answer))
        self._wake.set()
        return answer

    def export(self, directory: str) -> ExportReport:
        """Write the first copy to a medium, in this thread. Raises HvfuseError; see `Exporter.export`."""
        try:
            return self._exporter.export(directory)
        except OSError as error:
            raise refusal(error, directory) from error
        finally:
            self._replication.copies.show_again()

    def verify(self, message: wire.Message) -> Mapping[str, object]:
        """A request of `hvfuse.shipper.verifier`, in this thread. Raises HvfuseError."""
        if self._verifier is None:
            raise UsageError(f"{self._vm}: nothing is kept of what is verified here")
        try:
            return self._verifier.handle(message)
        except OSError as error:
            raise refusal(error) from error

    # An administrator's orders ----------------------------------------------------------------------------------

    def prove(self, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Mapping[str, Any]:
        """Compare all blocks of all disks with the replica: the VM is not written to. Returns "bytes" and "disks".
        Raises CorruptError naming a difference, and as `verify`; for the thread of `run`, where that is not used."""
        assert self._verifier is not None
        return self._verifier.prove(progress)

    def order_resync(self, *, full: bool, at_ns: int | None) -> Orders:
        """Have a copy start at `at_ns`, or now; `full`: of everything, whatever is in doubt. For any thread.

        Raises UsageError if there is nothing to do, or the time makes no sense.
        """
        repair = False
        if not full and not self._shown.orders().full and not self._is_copy_needed():
            repair = self._verifier is not None and self.request(self._has_mismatches)
            if not repair:
                raise UsageError(
                    f"{self._vm}: the replica is up to date: there is nothing to resynchronise",
                    hint=f"hvfuse resync {self._vm} --full",
                )
        if at_ns is not None and self._replication.copies.is_copying:
            raise UsageError(f"{self._vm}: a copy is under way already", hint=f"hvfuse resync {self._vm} --cancel")
        now_ns = self._clock.now_ns()
        if repair and at_ns is None:
            self.request(self._doubt)
        return self._order(lambda orders: orders.resynchronise(full=full, at_ns=at_ns, now_ns=now_ns, repair=repair))

    def suspend(self) -> Orders:
        """Hold the copy up that is under way or needed. For any thread. Raises UsageError if there is none."""
        self._check_copy("suspend")
        return self._order(Orders.suspend)

    def resume(self) -> Orders:
        """Let a suspended copy go on. For any thread."""
        return self._order(Orders.resume)

    def cancel(self) -> Orders:
        """Give up the copy that is under way, needed or ordered. For any thread. Raises UsageError if there is none.

        An order for later, of a VM that needs no copy, is taken back: cycles go on.
        """
        self._check_copy("cancel")
        return self._order(Orders.cancel if self._is_copy_needed() else Orders.withdraw)

    def unseed(self) -> Orders:
        """Let the first copy go over the network, although it was exported. For any thread."""
        return self._order(without_seed)

    def _check_copy(self, what: str) -> None:
        if not self._shown.orders().is_beyond_need and not self._is_copy_needed():
            raise UsageError(f"{self._vm}: there is no copy to {what}")

    def _is_copy_needed(self) -> bool:
        """As far as one can tell without waiting for the loop's thread."""
        if not self._replication.is_joined:
            return True
        try:
            status = self._source.status()
        except UnreachableError:
            return True
        return status.resync_required is not None or status.resyncing

    def _has_mismatches(self) -> bool:
        """Whether verification found any that were not copied anew since. For the loop's thread."""
        if self._verifier is None or not self._verifier.proofs.mismatches:
            return False
        generation = self._source.status().generation
        return bool(self._verifier.proofs.mismatched(generation.hex() if generation else None))

    def _allow_repair(self) -> None:
        """Let what is to be repaired be copied now. Raises HvfuseError where an administrator suspended copies: that
        is taken back only by name."""
        if self._shown.orders().suspended:
            raise HvfuseError(f"{self._vm}: copies are suspended", hint=f"hvfuse resync {self._vm} --resume")
        self._shown.change_orders(Orders.allow_repair)

    def _doubt(self) -> bool:
        """Have what verification found to differ be in doubt from now on. For the loop's thread."""
        return self._verifier is not None and self._verifier.doubt()

    def _full_begun(self, generation: bytes) -> None:
        """What verification found to differ is copied anew with everything. Nothing depends on that being kept."""
        if self._verifier is not None:
            try:
                self._verifier.doubted(generation)
            except HvfuseError as error:
                _log.warning("%s: %s", self._vm, error)

    def _order(self, change: Callable[[Orders], Orders]) -> Orders:
        orders = self._shown.change_orders(change)
        self._replication.copies.look_at_orders()
        self._hand_over(self._look_again)
        return orders


def _told(orders: Orders) -> Mapping[str, object]:
    return {"orders": orders.as_json()}


def _resync_at(message: wire.Message) -> int | None:
    at_ns = message.get("at_ns")
    if at_ns is not None and (not isinstance(at_ns, int) or isinstance(at_ns, bool)):
        raise UsageError("at_ns is a number of nanoseconds since 1970")
    return at_ns


def _for_the_wire(error: HvfuseError) -> HvfuseError:
    """The same error as a class of `hvfuse.errors`, which is all that the other end knows."""
    if isinstance(error, PositionMismatchError):
        return ResyncRequiredError(str(error), hint=error.hint)
    known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    assert issubclass(known, HvfuseError)
    return known(str(error), hint=error.hint)
