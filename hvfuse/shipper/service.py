"""The shipper of one VM as a process: when to ship, what to do when it fails, and who may ask.

Everything that touches source or replica happens in the one thread that calls `run` (or `cycle_now`,
where there is no loop). The control socket's threads hand a request over and wait for its answer.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from hvfuse import errors, wire
from hvfuse.errors import HvfuseError, ResyncRequiredError, UnreachableError, UsageError
from hvfuse.manifest import ReplicationState
from hvfuse.position import PositionMismatchError
from hvfuse.shipper.copy import CopyReport
from hvfuse.shipper.cycle import CycleReport
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.replication import RESYNC_ERRORS, Records, Replication, ShippingPolicy
from hvfuse.shipper.retry import next_attempt, next_interval, refusal
from hvfuse.shipper.source import Source
from hvfuse.system import Clock

LOOK_UP = 0.5
"""Seconds after which a waiting loop looks at its stop event, which a signal may have set."""

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")


class StoppedError(UnreachableError):
    """The shipper was told to stop; what it was at resumes with its next start."""


class _Shown:
    """Records that also remember their last values, for the control socket to show."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._changing = threading.Lock()  # of `fields`, which is replaced as a whole: any thread may read it
        self.fields: Mapping[str, object] = {}

    def update(self, **fields: object) -> None:
        told = {name: value.as_json() if isinstance(value, Orders) else value for name, value in fields.items()}
        with self._changing:
            self.fields = {**self.fields, **told}
        self._records.update(**fields)

    def orders(self) -> Orders:
        return self._records.orders()

    def change_orders(self, change: Callable[[Orders], Orders]) -> Orders:
        orders = self._records.change_orders(change)
        with self._changing:
            self.fields = {**self.fields, "orders": orders.as_json()}
        return orders

    def copy_progress(self) -> Mapping[str, object] | None:
        return self._records.copy_progress()

    def cycle(self, report: CycleReport) -> None:
        self._records.cycle(report)

    def copied(self, report: CopyReport) -> None:
        with self._changing:
            self.fields = {**self.fields, "last_copy": report.as_json()}
        self._records.copied(report)


class Shipper:
    """Ships one VM at its policy's frequency, and when asked to.

    `folder`: where the disks' images lie. `housekeep` is called after cycles were committed.
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
        housekeep: Callable[[], None] = lambda: None,
    ) -> None:
        self._vm = vm
        self._shown = _Shown(records)
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
        )
        self._frequency = policy.frequency_seconds
        self._clock = clock
        self._due = clock.monotonic()
        self._failing_since: float | None = None
        self._holds_out = False
        self._complaint = ""
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._guard = threading.Lock()  # of the two fields below: no request may slip in after the last turn
        self._requests: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._ended = False
        self._answers: dict[str, Callable[[wire.Message], Mapping[str, object]]] = {
            "cycle": lambda message: self.request_cycle().as_json(),
            "status": lambda message: self._status(),
            "stop": lambda message: self._stop_soon(),
        }
        self.missed = 0
        """Cycles that were due while an earlier one still ran."""

    def synchronise(self) -> None:
        """Make sure that logs can continue the replica; copy the disks if they cannot."""
        self._replication.synchronise()

    def cycle_now(self) -> CycleReport:
        """One cycle, at once, in this thread. Raises HvfuseError; see `Replication.cycle_now`."""
        try:
            return self._replication.cycle_now()
        except OSError as error:
            raise refusal(error) from error

    def run(self, stop_event: threading.Event) -> None:
        """Ship until `stop_event` is set, by anybody, or somebody asks over the socket to stop."""
        self._stop = stop_event
        try:
            while not stop_event.is_set():
                wait = self.turn()
                self._wake.wait(min(wait, LOOK_UP))
                self._wake.clear()
        finally:
            self._end()

    def turn(self) -> float:
        """Do what is due or asked for. Returns the seconds until something is due again (may be inf)."""
        self._serve_requests()
        if self._clock.monotonic() >= self._due:
            with contextlib.suppress(HvfuseError):  # told, and shown
                self._attempt()
        if self._holds_out:
            self._hold_out()
        return max(0.0, self._due - self._clock.monotonic())

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

    def _hold_out(self) -> None:
        """The target is away, but will be back. What keeps failing here is told once, not twice a minute."""
        try:
            self._replication.hold_out()
            self._complaint = ""
        except UnreachableError:
            pass  # told to stop; or it is the tracker that is away, and then nothing grows
        except (HvfuseError, OSError) as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                _log.warning("%s: while the target is away: %s", self._vm, error)

    def _attempt(self) -> CycleReport:
        started = self._clock.monotonic()
        self._holds_out = False
        try:
            report = self.cycle_now()
        except StoppedError:
            raise
        except HvfuseError as error:
            self._failed(error, started)
            raise
        finished = self._clock.monotonic()
        if self._failing_since is not None:
            self._failing_since, self._due = None, started
        if started >= self._due:
            self._due, missed = next_interval(self._due, finished, self._frequency)
            self.missed += missed
        return report

    def _failed(self, error: HvfuseError, started: float) -> None:
        """Say so, and set when to try again: by the ladder, or not before somebody asks."""
        _log.warning("%s: %s", self._vm, error)
        if self._failing_since is None:
            self._failing_since = started
        lost = isinstance(error, RESYNC_ERRORS)
        if lost:
            self._shown.update(state=ReplicationState.WAITING_FOR_START_RESYNCHRONIZE, resync_reason=str(error))
        elif not error.recoverable:
            self._shown.update(state=ReplicationState.ERROR)
        self._shown.update(error=str(error), hint=error.hint)
        self._holds_out = error.recoverable and not lost
        if lost or error.recoverable:
            elapsed = self._clock.monotonic() - self._failing_since
            self._due = self._failing_since + next_attempt(elapsed)
        else:
            self._due = math.inf

    def check_stop(self) -> None:
        """Raises StoppedError once the shipper was told to stop."""
        if self._stop.is_set():
            raise StoppedError(f"{self._vm}: the shipper was told to stop")

    def _end(self) -> None:
        with self._guard:
            self._ended = True
            requests, self._requests = self._requests, []
        for _, answer in requests:
            answer.set_exception(StoppedError(f"{self._vm}: the shipper has stopped"))

    def listen(self, path: str) -> wire.Listener:
        """Serve the control socket at `path`: ops "cycle", "status", "stop". Close it after `run`.

        "cycle" answers with the fields of `CycleReport` once the cycle is committed.
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
        return {"vm": self._vm, "missed": self.missed, **self._shown.fields}

    def _stop_soon(self) -> Mapping[str, object]:
        self._stop.set()
        self._wake.set()
        return {}

    def request_cycle(self) -> CycleReport:
        """Have the loop's thread do a cycle, and wait for it. For any other thread."""
        return self.request(self._attempt)

    def request(self, action: Callable[[], _Answer]) -> _Answer:
        """Have the loop's thread do something between two cycles, and wait for it. For any other thread.

        Raises what it raised, and StoppedError if it does not come to it any more. Equal actions that wait at the
        same time are done once. A long one has to look for a stop by itself (`check_stop`).
        """
        answer: Future[_Answer] = Future()
        with self._guard:
            if self._ended:
                raise StoppedError(f"{self._vm}: the shipper has stopped")
            self._requests.append((action, answer))
        self._wake.set()
        return answer.result()


def _for_the_wire(error: HvfuseError) -> HvfuseError:
    """The same error as a class of `hvfuse.errors`, which is all that the other end knows."""
    if isinstance(error, PositionMismatchError):
        return ResyncRequiredError(str(error), hint=error.hint)
    known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    assert issubclass(known, HvfuseError)
    return known(str(error), hint=error.hint)
