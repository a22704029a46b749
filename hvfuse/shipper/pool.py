"""A few threads that make frames, ahead of whoever gives them away, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from hvfuse import system
from hvfuse.frames import FrameWriter
from hvfuse.shipper.content import Content

WORKERS = 2
AHEAD = 2 * WORKERS
"""Frames under way at once, unless more are asked for: bounds the memory however slow the replica is."""


@dataclass(frozen=True, slots=True)
class Job:
    """One frame to be made. `build` runs in a worker; it returns None when there is nothing to send."""

    number: int
    disk_id: bytes
    build: Callable[[], Content | None]


@dataclass(frozen=True, slots=True)
class Made:
    """A job's outcome. `frame`: encoded; empty when there was nothing to send. `told_bytes`: of the disk, that
    it tells of, `zero_bytes` of them as zeroes."""

    number: int
    frame: bytes
    zero_bytes: int = 0
    told_bytes: int = 0


class FramePool:
    """Builds and compresses the frames of one cycle. `level`: zstd level; 0 does not compress. `ahead`: frames under
    way at once; enough of them keep the workers busy while the replica makes some durable."""

    def __init__(self, *, generation: bytes, cycle: int, level: int, ahead: int = AHEAD) -> None:
        self._generation = generation
        self._cycle = cycle
        self._level = level
        self._ahead = ahead
        self._executor = ThreadPoolExecutor(WORKERS, "hvfuse-frames")
        self._own = threading.local()
        system.keep_freed_memory()

    def __enter__(self) -> FramePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def make(self, jobs: Iterable[Job]) -> Generator[Made]:
        """The outcomes in the order of the jobs; raises what a job raised.

        Close the iterator (`contextlib.closing`) before what the jobs read from is closed: only then
        is no worker at it any more.
        """
        ahead: deque[Future[Made]] = deque()
        try:
            for job in jobs:
                ahead.append(self._executor.submit(self._work, job))
                if len(ahead) == self._ahead:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                if not future.cancel():
                    future.exception()

    def _work(self, job: Job) -> Made:
        content = job.build()
        if content is None:
            return Made(job.number, b"")
        writer = getattr(self._own, "writer", None)
        if writer is None:
            writer = FrameWriter(generation=self._generation, cycle=self._cycle, level=self._level)
            self._own.writer = writer
        frame = writer.encode(disk_id=job.disk_id, number=job.number, table=content.table, data=content.data)
        return Made(job.number, frame, content.zero_bytes, int(content.table["length"].sum()))
