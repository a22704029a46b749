"""The fence, as the source sees it: whether it still has the VM, or another side does.

The store decides (`hvfuse.target.failing_over`). A source looks there before it serves the disks, again and again while
`hvfuse run` runs, and whenever the store refuses what it ships. What it finds becomes the state of its record, and its
disks are held, read-only, for as long as another side has the VM, or a planned failover is prepared:

    the store says                             the record becomes                          the disks
    failed over, not committed                 FailedOverWaitingCompletion                 held
    failed over, committed; or another home's  FailedOver                                  held
    cancelled                                  Replicating                                 let go
    nothing of the kind                        stays as it is                              held if PreparedForFailover

What the record says of another side holds until the store takes it back. When the store cannot be asked, it is up to
the policy: "local" serves the disks as the record says; "strict" holds them until the store has been asked once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from hvfuse import system, wire
from hvfuse.control.home import Home
from hvfuse.control.records import Records, VmRecord
from hvfuse.errors import BusyError, HvfuseError, NotFoundError, StateError, UnreachableError
from hvfuse.states import AFTER_FAILOVER, FAILOVER_DONE, FAILOVER_OPEN, Event, ReplicationState
from hvfuse.target import schema
from hvfuse.target.failing_over import state_of, where
from hvfuse.target.store import Store

ANSWER_SECONDS = 30.0
LOOK_SECONDS = 2.0
"""How often a source looks whether it still has its VMs."""
END_SECONDS = 5.0
LOCK_SECONDS = 30.0
WAIT_SECONDS = 0.02

_S = ReplicationState
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the store's word means for the source. `events`: of its record; `held`: why its disks are read-only, None if
    they are not; `epoch`: under which it has the VM. `is_asked`: whether the store could be asked."""

    events: tuple[Event, ...] = ()
    held: str | None = None
    epoch: int = 0
    is_asked: bool = True


def judge(record: VmRecord, replica: schema.VmRecord | None, home: str) -> Verdict:
    """What to make of what the store tells. `home`: the id of the one that asks. Pure."""
    state, epoch = record.state, record.epoch
    if state is _S.DISABLED:
        return Verdict(epoch=epoch)
    theirs = _theirs(record, replica, home)
    if theirs is None:
        if state in FAILOVER_DONE:  # this side has it, or the store is not what it was
            return Verdict(epoch=epoch, held=record.held)
        taken_back = replica is not None and replica.epoch > epoch and state_of(replica) not in AFTER_FAILOVER
        known = epoch if replica is None else max(epoch, replica.epoch)
        if state in FAILOVER_OPEN or (state is _S.PREPARED_FOR_FAILOVER and taken_back):
            return Verdict(events=(Event.CANCEL_FAILOVER,), epoch=known)
        held = record.held if state is _S.PREPARED_FOR_FAILOVER else None
        return Verdict(epoch=known, held=held)
    assert replica is not None
    is_done = theirs in FAILOVER_DONE
    events: tuple[Event, ...] = ()
    if state not in FAILOVER_OPEN | FAILOVER_DONE:
        events = (Event.FAIL_BACK if theirs in (_S.FAILBACK_IN_PROGRESS, _S.FAILBACK_COMPLETE) else Event.FAIL_OVER,)
    if is_done and state not in FAILOVER_DONE:
        events = (*events, Event.COMMIT_FAILOVER)
    return Verdict(events=events, held=_why(replica, is_done=is_done), epoch=epoch)


def _theirs(record: VmRecord, replica: schema.VmRecord | None, home: str) -> ReplicationState | None:
    """The state of the failover by which another side has the VM; None if this one has it."""
    if replica is None:
        return None
    state = state_of(replica)
    if replica.failover is not None and replica.failover["home"] != home and state in FAILOVER_OPEN | FAILOVER_DONE:
        return state
    if replica.primary in ("", home) or record.point is None:
        return None  # a stranger that has the name alone is refused when it ships, and nothing else
    return _S.FAILED_OVER


def _why(replica: schema.VmRecord, *, is_done: bool) -> str:
    failover = replica.failover
    side = where(failover or replica.source)
    if failover is None:
        return f"{side} has the VM now"
    what = "that is committed" if is_done else "that is not committed yet"
    return f"it was failed over to {side}, at recovery point {failover['point']}; {what}"


def read_replica(store_path: str, vm: str) -> schema.VmRecord | None:
    """What the store says of a VM; None if it knows of none. Raises NotFoundError (there is no store), HvfuseError."""
    with Store(store_path, create=False, read_only=True) as store, store.env.read() as txn:
        return store.find_vm(txn, vm)


class Fence:
    """The fence of one VM at its source. `store_path`: of the store that the VM is shipped to; `is_strict`: the policy,
    asked each time."""

    def __init__(
        self, home: Home, vm: str, records: Records, *, store_path: Callable[[], str], is_strict: Callable[[], bool]
    ) -> None:
        self._home = home
        self._vm = vm
        self._records = records
        self._store_path = store_path
        self._is_strict = is_strict

    def look(self) -> Verdict:
        """Ask the store, and have the record say what it said. Durable. Where it cannot be asked, the policy says
        whether a process that begins may serve the disks. Raises HvfuseError of the records alone."""
        return self._decide(lambda verdict: None)

    def _decide(self, then: Callable[[Verdict], None]) -> Verdict:
        """Look, and act on it, before anybody else decides."""
        try:
            with deciding(self._home, self._vm):
                verdict = self._look()
                then(verdict)
                return verdict
        except BusyError as error:
            return self._unasked(self._records.read(self._vm), error)

    def _look(self) -> Verdict:
        """As `look`; the caller decides."""
        record = self._records.read(self._vm)
        try:
            replica = read_replica(self._store_path(), self._vm)
        except (HvfuseError, OSError) as error:
            return self._unasked(record, error)
        verdict = judge(record, replica, self._home.identity())
        if verdict.events or verdict.held != record.held or verdict.epoch != record.epoch:
            prepared = record.prepared if verdict.held is not None else None
            with contextlib.suppress(StateError):  # somebody else has changed it meanwhile: the next look tells
                self._records.apply(
                    self._vm, *verdict.events, held=verdict.held, epoch=verdict.epoch, prepared=prepared
                )
        return verdict

    def _unasked(self, record: VmRecord, error: Exception) -> Verdict:
        held = None if record.state is _S.DISABLED else record.held
        is_first = isinstance(error, NotFoundError) and record.point is None  # nothing was ever shipped
        if held is None and record.state is not _S.DISABLED and self._is_strict() and not is_first:
            held = f'the store cannot be asked, and fence is "strict": {error}'
        return Verdict(epoch=record.epoch, held=held, is_asked=False)

    def enforce(self) -> Verdict:
        """Look, and have the tracker that runs hold the disks, or let them go; as long as the store cannot be asked,
        it goes on as it does. Raises as `look`."""
        return self._decide(self._tell)

    def _tell(self, verdict: Verdict) -> None:
        if not verdict.is_asked:
            return
        try:
            tell_tracker(self._home, self._vm, verdict.held)
        except HvfuseError as error:
            if not isinstance(error, UnreachableError):
                _log.warning("%s: the tracker cannot be told: %s", self._vm, error)


@contextlib.contextmanager
def deciding(home: Home, vm: str) -> Iterator[None]:
    """Be the one who decides whether the VM's disks are held, and says so to record and tracker: a decision by what was
    read before would undo another's, and let go what a planned failover holds. Raises BusyError."""
    deadline = time.monotonic() + LOCK_SECONDS
    while os.path.isdir(home.state_dir(vm)):
        with system.exclusive_lock(home.fence_lock(vm)) as had:
            if had:
                yield
                return
        if time.monotonic() >= deadline:
            raise BusyError(
                f"{vm}: another process is asking who has it, and gets no answer", hint=f"hvfuse status {vm}"
            )
        time.sleep(WAIT_SECONDS)
    yield  # nobody ever served it


def tell_tracker(home: Home, vm: str, held: str | None) -> None:
    """Have a tracker that runs hold its disks, for that reason, or let them go. Raises HvfuseError."""
    socket = home.tracker_socket(vm)
    status = wire.request(socket, "status", timeout=ANSWER_SECONDS)
    if status.get("standing") or status.get("held") == held:
        return
    if held is None:
        wire.request(socket, "unhold", timeout=ANSWER_SECONDS)
    else:
        wire.request(socket, "hold", timeout=ANSWER_SECONDS, reason=held)


class FenceWatch:
    """Enforces the fences of a home's VMs every LOOK_SECONDS, in a thread of its own: asking a store that hangs takes
    long. `fences`: asked for each time."""

    def __init__(self, fences: Callable[[], list[Fence]]) -> None:
        self._fences = fences
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fence", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            try:
                fences = self._fences()
            except (HvfuseError, OSError) as error:
                _log.warning("%s", error)
                continue
            for fence in fences:
                if self._ended.is_set():
                    return
                try:
                    fence.enforce()
                except (HvfuseError, OSError) as error:  # told by the statuses, too; and no other VM's trouble
                    _log.warning("%s", error)
