"""One resynchronisation of one disk: drives the comparison, has what differs written, and keeps how far it came.

The *near* end is a file on this machine that the comparison reads; the *far* end gives digests. Of the two one is
the source and one the replica, in whichever way the data is to go:

    local   near: source    far: replica, on this machine too
    push    near: source    far: replica, behind a pipe
    pull    near: replica   far: source, behind a pipe

Spans are compared by a few workers, in any order, and each worker at once has applied what it found. How far the
run has come is counted in order. Every few seconds the replica is synced up to there, and only then the state
(`hvfuse.reconcile.checkpoint`) says so.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, Self

from hvfuse.errors import BusyError, UsageError
from hvfuse.extent import Extent, round_up
from hvfuse.formats.digests import BLOCK, Algorithm, DigestKey
from hvfuse.reconcile import plan
from hvfuse.reconcile.changes import Change, changes
from hvfuse.reconcile.checkpoint import Checkpoint, start_of
from hvfuse.reconcile.compare import Candidate, Comparison, Other, candidates
from hvfuse.reconcile.ends import Identity, Kind, LocalEnd

WINDOW = 16 << 30
"""Bytes of disk whose holes are looked for at once: bounds the lists of them. A multiple of `plan.SPAN`."""
WRITES_ON_SECONDS = 5.0
"""For so long data goes on being written while the replica is synced: so much is compared again at most."""


class Source(Protocol):
    """The end that counts, where it is the far one."""

    def identify(self) -> Identity:
        """What it is now."""

    def fetch(self, blocks: Sequence[Extent]) -> tuple[list[Change], int]:
        """What the blocks, all on one span, have, and how many bytes that took to tell."""


class Replica(Protocol):
    """The end that becomes the same, as its user sees it. Raises HvfuseError."""

    def identify(self) -> Identity:
        """What it is now."""

    def state(self) -> tuple[bytes, bool] | None:
        """As `ReplicaEnd.state`."""

    def resize(self, size: int) -> None:
        """As `ReplicaEnd.resize`."""

    def apply(self, wanted: Sequence[Change]) -> int:
        """Write and punch. Returns the bytes that were sent or written for it."""

    def sync(self, state: bytes | None = None) -> bool:
        """As `ReplicaEnd.sync`."""

    def finish(self) -> None:
        """As `ReplicaEnd.finish`."""


class Far(Other, Protocol):
    """The end that gives digests."""

    def begin(self, end: int, key: DigestKey) -> None:
        """It is compared up to byte `end`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`workers`: threads that compare. `askers`: requests for summaries at once. `at_once`: spans that a
    worker is given together. `state_seconds`: how often a state is kept. `believed`: see `start_of`."""

    algorithm: Algorithm = Algorithm.XXH3
    dry_run: bool = False
    believed: bool = False
    workers: int = 2
    askers: int = 1
    at_once: int = 8
    state_seconds: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run did, in bytes. `size`: of the source. `start`: it went on from here. `compared`: looked at, which
    holes on both sides are not. `differing`: in blocks of 64 KiB that differ. `sent`: given to the pipe, or
    written. `left_alone`: of a larger device. `keeps_state`: False if the state file could not be written."""

    size: int
    start: int = 0
    compared: int = 0
    differing: int = 0
    sent: int = 0
    left_alone: int = 0
    resized: bool = False
    created: bool = False
    keeps_state: bool = True
    seconds: float = 0.0

    @property
    def changed(self) -> bool:
        """Whether the replica was not equal (and is now, unless it was a dry run)."""
        return bool(self.differing) or self.resized or self.created

    @property
    def saved(self) -> int:
        """Bytes of the source that did not have to be sent."""
        return max(0, self.size - self.sent)


Progress = Callable[[Report, int], None]
"""Told now and then: the report so far, and the bytes of the source that are passed."""


def prepare(source: Identity, replica: Identity, *, replica_path: str) -> int:
    """Check that the one can be made the other. Returns the bytes of a device that will be left alone.

    Raises UsageError.
    """
    if source.is_same_file(replica):
        raise UsageError(f"{replica_path}: SOURCE and REPLICA are the same")
    if replica.kind is not Kind.DEVICE:
        return 0
    if replica.size < source.size:
        raise UsageError(
            f"{replica_path}: has {replica.size} bytes, too few for the {source.size} of SOURCE",
            hint="name a device that is as large or larger: lsblk --bytes",
        )
    return replica.size - source.size


class Resync:
    """One run. `source`: the far end, if it is the source; None if the near end is."""

    def __init__(
        self,
        near: LocalEnd,
        far: Far,
        *,
        source: Source | None = None,
        replica: Replica,
        options: Options,
        progress: Progress,
    ) -> None:
        self._near = near
        self._far = far
        self._source = source or near
        self._fetch = source.fetch if source is not None else None
        self._replica = replica
        self._options = options
        self._progress = progress
        self._end = 0

    def run(self, *, replica_path: str, created: bool = False) -> Report:
        """Make the replica equal, or find out what that would take. Raises HvfuseError."""
        started = time.monotonic()
        source, replica = self._source.identify(), self._replica.identify()
        left = prepare(source, replica, replica_path=replica_path)
        self._end = source.size
        resized = replica.kind is not Kind.DEVICE and replica.size != source.size
        state = self._replica.state()
        if not self._options.dry_run:
            self._replica.resize(source.size)
            replica = self._replica.identify()
        start = start_of(state, source=source, replica=replica, believed=self._options.believed)
        if state is not None and not start and not self._options.dry_run:
            # Or it would be believed once more if this run is killed and the former source comes back.
            self._replica.sync(Checkpoint(source, replica, 0).pack())
        report = Report(
            size=source.size, start=start, left_alone=left, resized=resized,
            created=created or replica.kind is Kind.MISSING,
        )  # fmt: skip
        report = self._compare(report, Checkpoint(source, replica, start))
        now = self._source.identify()
        if (now.size, now.mtime_ns) != (source.size, source.mtime_ns):
            raise BusyError("SOURCE was written to meanwhile, so REPLICA may be equal to none of its states",
                            hint="run it again when nobody writes to SOURCE, or on a snapshot")  # fmt: skip
        if not self._options.dry_run:
            self._replica.finish()
        return replace(report, seconds=time.monotonic() - started)

    def _compare(self, report: Report, begun: Checkpoint) -> Report:
        """The report after comparing everything from its start on."""
        key = DigestKey.fresh(self._options.algorithm)
        self._near.end = self._end
        self._far.begin(self._end, key)
        comparison = Comparison(self._near, self._far, key)
        ahead: deque[tuple[list[Candidate], Future[tuple[int, int]]]] = deque()
        workers = self._options.workers
        with contextlib.ExitStack() as stack:
            keeper = stack.enter_context(_Keeper(self._replica, begun, self._options))
            asker = stack.enter_context(ThreadPoolExecutor(self._options.askers, "resync-ask"))
            pool = stack.enter_context(ThreadPoolExecutor(workers, "resync-compare"))
            doubtful = stack.enter_context(contextlib.closing(self._candidates(report.start, asker, key)))
            stack.callback(_let_go, ahead)
            while some := list(itertools.islice(doubtful, self._options.at_once)):
                ahead.append((some, pool.submit(self._work, comparison, some)))
                if len(ahead) > workers + 2:
                    report = self._passed(report, *ahead.popleft(), keeper)
            while ahead:
                report = self._passed(report, *ahead.popleft(), keeper)
        return replace(report, keeps_state=keeper.works)

    def _candidates(self, start: int, asker: ThreadPoolExecutor, key: DigestKey) -> Generator[Candidate]:
        end = round_up(self._end, BLOCK)
        for low in range(start, end, WINDOW):
            wanted = [Extent(low, min(WINDOW, end - low))]
            found = candidates(wanted, source=self._near, other=self._far, key=key, asker=asker)
            with contextlib.closing(found):
                yield from found

    def _passed(
        self, report: Report, done: Sequence[Candidate], outcome: Future[tuple[int, int]], keeper: _Keeper
    ) -> Report:
        """Some spans are done, and so is everything before them."""
        differing, sent = outcome.result()
        extents = [extent for candidate in done for extent in candidate.extents]
        report = replace(
            report,
            compared=report.compared + sum(min(extent.end, self._end) - extent.offset for extent in extents),
            differing=report.differing + differing,
            sent=report.sent + sent,
        )
        passed = (done[-1].place + 1) * plan.SPAN
        if passed < self._end:
            keeper.passed(passed)
        self._progress(report, min(passed, self._end))
        return report

    def _work(self, comparison: Comparison, some: Sequence[Candidate]) -> tuple[int, int]:
        """Compare spans and apply what differs. Returns the bytes that differ and those sent."""
        done = [self._work_on(comparison, candidate) for candidate in some]
        return sum(differing for differing, _ in done), sum(sent for _, sent in done)

    def _work_on(self, comparison: Comparison, candidate: Candidate) -> tuple[int, int]:
        found = comparison.differences(candidate)
        if found is None:
            return 0, 0
        differing = sum(min(block.end, self._end) - block.offset for block in found.blocks)
        if self._options.dry_run:
            return differing, 0
        if self._fetch is not None:
            wanted, sent = self._fetch(found.blocks)
            self._replica.apply(wanted)
        else:
            sent = self._replica.apply(changes(found.blocks, found.data, end=self._end))
        return differing, sent


def _let_go(ahead: Sequence[tuple[list[Candidate], Future[tuple[int, int]]]]) -> None:
    """Leave no worker behind that reads or writes; what it raises is not what matters any more."""
    for _, future in ahead:
        if not future.cancel():
            future.exception()


class _Keeper:
    """Syncs the replica now and then, in a thread of its own, and keeps the state. For the driver's thread.

    `works`: False once the state file could not be written: then there is none.
    """

    def __init__(self, replica: Replica, begun: Checkpoint, options: Options) -> None:
        self._replica = replica
        self._begun = begun
        self._seconds = options.state_seconds
        self._runs = not options.dry_run
        self._thread = ThreadPoolExecutor(1, "resync-sync")
        self._pending: Future[bool] | None = None
        self._since = time.monotonic()
        self.works = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self._take()

    def passed(self, offset: int) -> None:
        """Everything before `offset` is equal, though not yet durable. Raises what an earlier sync raised."""
        if not self._runs or not self.works:
            return
        age = time.monotonic() - self._since
        if self._pending is not None:
            if not self._pending.done() and age < WRITES_ON_SECONDS:
                return
            self._take()
        if age >= self._seconds:
            self._since = time.monotonic()
            self._pending = self._thread.submit(self._replica.sync, replace(self._begun, offset=offset).pack())

    def _take(self) -> None:
        if self._pending is not None:
            self.works = self._pending.result()
            self._pending = None
