"""The served side of a pipe: does what the driving side asks, to the one file that it names and nothing else.

Requests are worked at by a few threads. At most `UNDER_WAY` of them are held at once; the pipe is read no further
meanwhile, so memory is bounded whatever the other side sends.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hvfuse.errors import CorruptError, HvfuseError, UnreachableError, UsageError
from hvfuse.extent import Extent, round_up
from hvfuse.formats.digests import BLOCK, Algorithm, DigestKey, touched_blocks
from hvfuse.reconcile import messages, plan
from hvfuse.reconcile.changes import changes
from hvfuse.reconcile.ends import STATE_LIMIT, LocalEnd, ReplicaEnd, open_replica, open_source
from hvfuse.reconcile.line import Line
from hvfuse.reconcile.messages import Kind, Message

WORKERS = 3
UNDER_WAY = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Permission:
    """What the driving side may name. `path`: this file alone; `root`: what lies below this directory, with
    symbolic links resolved; neither: anything. `read_only`: it may not be written to."""

    path: str | None = None
    root: str | None = None
    read_only: bool = False

    def check(self, asked: str, *, write: bool) -> None:
        """Raise UsageError if it may not be used so."""
        if self.read_only and write:
            raise UsageError(f"{asked}: may only be read here")
        real = os.path.realpath(asked)
        if self.path is not None and real != os.path.realpath(self.path):
            raise UsageError(f"{asked}: only {self.path} is served here")
        if self.root is not None and os.path.commonpath([real, os.path.realpath(self.root)]) != os.path.realpath(
            self.root
        ):
            raise UsageError(f"{asked}: only what is below {self.root} is served here")


class Server:
    """One connection. `run` returns when the other side is done. Raises HvfuseError."""

    def __init__(self, line: Line, permission: Permission) -> None:
        self._line = line
        self._permission = permission
        self._end: LocalEnd | None = None
        self._key: DigestKey | None = None
        self._level = 1
        self._finished = False
        self._room = threading.BoundedSemaphore(UNDER_WAY)

    def run(self) -> None:
        """Serve until the other side ends its output."""
        self._line.start()
        try:
            with ThreadPoolExecutor(WORKERS, "resync-serve") as pool:
                for message in self._line.messages():
                    if message.kind is Kind.FAILED:  # it gives up, and says why where its user is
                        self._finished = True
                        continue
                    if message.kind in (Kind.OPEN, Kind.BEGIN, Kind.RESIZE):
                        self._answer(message)  # whatever comes later stands on it
                        continue
                    self._room.acquire()
                    pool.submit(self._answer, message).add_done_callback(lambda _: self._room.release())
            if isinstance(self._end, ReplicaEnd) and self._end.writes and not self._finished:
                raise UnreachableError("the other side ended before it was done")
        except HvfuseError as error:
            with contextlib.suppress(HvfuseError):
                self._line.send(Kind.FAILED, 0, messages.pack_error(error))
            raise
        finally:
            self._line.close()
            if self._end is not None:
                self._end.close()

    def _answer(self, message: Message) -> None:
        try:
            kind, reply = Kind.REPLY, self._reply(message)
        except HvfuseError as error:
            kind, reply = Kind.FAILED, messages.pack_error(error)
        except Exception as error:
            known = HvfuseError(f"internal error: {type(error).__name__}: {error}")
            kind, reply = Kind.FAILED, messages.pack_error(known)
        with contextlib.suppress(UnreachableError):  # the reader finds out, too
            self._line.send(kind, message.number, reply)

    def _reply(self, message: Message) -> bytes:
        handlers: Mapping[Kind, Callable[[bytes], bytes]] = {
            Kind.OPEN: self._open, Kind.BEGIN: self._begin, Kind.OCCUPIED: self._occupied,
            Kind.SUMMARIES: self._summaries, Kind.DIGESTS: self._digests, Kind.FETCH: self._fetch,
            Kind.APPLY: self._apply, Kind.RESIZE: self._resize, Kind.IDENTIFY: self._identify,
            Kind.SYNC: self._sync, Kind.FINISH: self._finish,
        }  # fmt: skip
        handler = handlers.get(message.kind)
        if handler is None:
            raise CorruptError(f"the other side asked for {message.kind.name}")
        return handler(message.payload)

    def _open(self, payload: bytes) -> bytes:
        fields = messages.unpack_json(payload)
        path, role, write = fields.get("path"), fields.get("role"), fields.get("write")
        if not isinstance(path, str) or not path or "\0" in path or role not in ("source", "replica"):
            raise CorruptError("the other side did not say what to open")
        if self._end is not None:
            raise CorruptError("the other side asked for a second file")
        self._permission.check(path, write=role == "replica" and write is True)
        reply: dict[str, object] = {"created": False, "state": None, "unaltered": False}
        if role == "source":
            self._end = open_source(path)
        else:
            there = os.path.exists(path)
            self._end = replica = open_replica(path, write=write is True)
            state = replica.state()
            if state is not None:
                reply |= {"state": state[0].decode("ascii", "replace"), "unaltered": state[1]}
            reply["created"] = not there
        return messages.pack_json({"identity": self._end.identify().as_json(), **reply})

    def _begin(self, payload: bytes) -> bytes:
        fields = messages.unpack_json(payload)
        end, seed, level = (fields.get(name) for name in ("end", "seed", "level"))
        if type(end) is not int or type(seed) is not int or type(level) is not int:
            raise CorruptError("the other side did not say how to compare")
        if fields.get("algorithm") not in list(Algorithm) or not (
            0 <= end <= plan.MAX_SIZE and 0 <= seed < 1 << 64 and 0 <= level <= 22
        ):
            raise CorruptError("the other side asked for a comparison out of bounds")
        self._key, self._level = DigestKey(Algorithm(str(fields["algorithm"])), seed), level
        self._opened().begin(end, self._key)
        return b""

    def _occupied(self, payload: bytes) -> bytes:
        end = self._opened()
        [asked] = self._extents(payload, single=True)
        ranges = ((part.offset, part.end) for part in end.occupied(asked.offset, asked.end))
        return messages.pack_extents(Extent(low, high - low) for low, high in touched_blocks(ranges))

    def _summaries(self, payload: bytes) -> bytes:
        return messages.pack_digests(self._opened().summaries(self._extents(payload), self._agreed()))

    def _digests(self, payload: bytes) -> bytes:
        return messages.pack_digests(self._opened().digests(self._extents(payload), self._agreed()))

    def _fetch(self, payload: bytes) -> bytes:
        end, blocks = self._opened(), self._extents(payload)
        base = plan.SPAN * (blocks[0].offset // plan.SPAN)
        if blocks[-1].end > base + plan.SPAN:
            raise CorruptError("the other side asked for more than a span")
        whole = end.read(Extent(base, blocks[-1].end - base))
        data = [whole[block.offset - base : block.end - base] for block in blocks]
        return messages.pack_changes(changes(blocks, data, end=end.end), level=self._level)

    def _apply(self, payload: bytes) -> bytes:
        replica = self._replica()
        replica.apply(messages.unpack_changes(payload, end=replica.end))
        return b""

    def _resize(self, payload: bytes) -> bytes:
        size = messages.unpack_json(payload).get("size")
        if type(size) is not int or not 0 <= size <= plan.MAX_SIZE:
            raise CorruptError("the other side asked for a size out of bounds")
        self._replica().resize(size)
        return b""

    def _identify(self, payload: bytes) -> bytes:
        return messages.pack_json(self._opened().identify().as_json())

    def _sync(self, payload: bytes) -> bytes:
        if len(payload) > STATE_LIMIT:
            raise CorruptError("the other side sent a state that is too long")
        return messages.pack_json({"kept": self._replica().sync(payload or None)})

    def _finish(self, payload: bytes) -> bytes:
        if isinstance(self._end, ReplicaEnd):
            self._end.finish()
        self._finished = True
        return b""

    def _opened(self) -> LocalEnd:
        if self._end is None:
            raise CorruptError("the other side named no file")
        return self._end

    def _replica(self) -> ReplicaEnd:
        end = self._opened()
        if not isinstance(end, ReplicaEnd) or not end.writes:
            raise CorruptError("the other side may not write here")
        return end

    def _agreed(self) -> DigestKey:
        if self._key is None:
            raise CorruptError("the other side did not say how to compare")
        return self._key

    def _extents(self, payload: bytes, *, single: bool = False) -> list[Extent]:
        """Extents of the disk, at least one; each within a span, unless there is but a `single` one."""
        extents = messages.unpack_extents(payload, end=round_up(self._opened().end, BLOCK))
        if not extents or (single and len(extents) > 1):
            raise CorruptError("the other side asked for nothing in particular")
        if not single and any(extent.offset // plan.SPAN != (extent.end - 1) // plan.SPAN for extent in extents):
            raise CorruptError("the other side asked for an extent across spans")
        return extents
