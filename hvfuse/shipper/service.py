"""The shipper of one VM as a process: when to ship, what to do when it fails, and who may ask.

Everything that touches source or replica happens in the one thread that calls `run` (or `cycle_now`,
where there is no loop). The control socket's threads hand a request over and wait for its answer.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping

from hvfuse import errors, wire
from hvfuse.errors import HvfuseError, ResyncRequiredError, UnreachableError, UsageError
from hvfuse.manifest import ReplicationState
from hvfuse.position import PositionMismatchError
from hvfuse.shipper.copy import CopyReport
from hvfuse.shipper.cycle import CycleReport
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.replication import RESYNC_ERRORS, Records, Replication, ShippingPolicy
from hvfuse.shipper.retry import next_attempt, next_interval, refusal
from hvfuse.shipper.source import Source
from hvfuse.system import Clock

LOOK_UP = 0.5
"""Seconds after which a waiting loop looks at its stop event, which a signal may have set."""

_log = logging.getLogger(__name__)


class StoppedError(UnreachableError):
    """The shipper was told to stop; what it was at resumes with its next start."""


class _Request:
    """A wish for a cycle: waited for in one thread, answered in another."""

    def __init__(self) -> None:
        self._answered = threading.Event()
        self._outcome: CycleReport | HvfuseError | None = None

    def answer(self, outcome: CycleReport | HvfuseError) -> None:
        self._outcome = outcome
        self._answered.set()

    def wait(self) -> CycleReport:
        self._answered.wait()
        if isinstance(self._outcome, CycleReport):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome


class _Shown:
    """Records that also remember their last values, for the control socket to show."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.fields: Mapping[str, object] = {}  # replaced as a whole, so that any thread may read it

    def update(self, **fields: object) -> None:
        self.fields = {**self.fields, **fields}
        self._records.update(**fields)

    def cycle(self, report: CycleReport) -> None:
        self._records.cycle(report)

    def copied(self, report: CopyReport) -> None:
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
            between=self._check_stop,
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
        self._requests: list[_Request] = []
        self._ended = False
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
        with self._guard:
            requests, self._requests = self._requests, []
        started = self._clock.monotonic()
        if requests or started >= self._due:
            outcome = self._attempt(started)
            for request in requests:
                request.answer(outcome)
        if self._holds_out:
            self._hold_out()
        return max(0.0, self._due - self._clock.monotonic())

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

    def _attempt(self, started: float) -> CycleReport | HvfuseError:
        self._holds_out = False
        try:
            report = self.cycle_now()
        except StoppedError as error:
            return error
        except HvfuseError as error:
            self._failed(error, started)
            return error
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

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise StoppedError(f"{self._vm}: the shipper was told to stop")

    def _end(self) -> None:
        with self._guard:
            self._ended = True
            requests, self._requests = self._requests, []
        for request in requests:
            request.answer(StoppedError(f"{self._vm}: the shipper has stopped"))

    def listen(self, path: str) -> wire.Listener:
        """Serve the control socket at `path`: ops "cycle", "status", "stop". Close it after `run`.

        "cycle" answers with the fields of `CycleReport` once the cycle is committed.
        """
        return wire.Listener(path, self._handle, name=f"shipper-{self._vm}", concurrent=True)

    def _handle(self, message: wire.Message) -> Mapping[str, object]:
        match message.get("op"):
            case "cycle":
                try:
                    return self.request_cycle().as_json()
                except HvfuseError as error:
                    raise _for_the_wire(error) from error
            case "status":
                return {"vm": self._vm, "missed": self.missed, **self._shown.fields}
            case "stop":
                self._stop.set()
                self._wake.set()
                return {}
            case op:
                raise UsageError(f"the shipper does not know the request {op!r}")

    def request_cycle(self) -> CycleReport:
        """Have the loop's thread do a cycle, and wait for it. For any other thread."""
        request = _Request()
        with self._guard:
            if self._ended:
                raise StoppedError(f"{self._vm}: the shipper has stopped")
            self._requests.append(request)
        self._wake.set()
        return request.wait()


def _for_the_wire(error: HvfuseError) -> HvfuseError:
    """The same error as a class of `hvfuse.errors`, which is all that the other end knows."""
    if isinstance(error, PositionMismatchError):
        return ResyncRequiredError(str(error), hint=error.hint)
    known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    assert issubclass(known, HvfuseError)
    return known(str(error), hint=error.hint)
