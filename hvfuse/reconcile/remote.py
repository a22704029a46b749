"""The other side of a pipe as an end: source or replica. Speaks `hvfuse.reconcile.messages`."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from hvfuse.errors import CorruptError, HvfuseError, NotFoundError, UnreachableError
from hvfuse.extent import Extent
from hvfuse.formats.digests import DigestKey, Digests, block_count
from hvfuse.reconcile import messages
from hvfuse.reconcile.changes import Change, refuse_unasked
from hvfuse.reconcile.ends import Identity
from hvfuse.reconcile.line import SILENCE_SECONDS, Line
from hvfuse.reconcile.messages import Kind

END_SECONDS = 10.0
"""A command has so long to end by itself after the last message."""
_NO_GREETING = "--via takes a command that runs tools/resync --serve on the other side: docs/resync.md"


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command that serves. Its standard error stays the user's. Raises NotFoundError."""
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as error:
        raise NotFoundError(f"{command[0]}: {error.strerror}", hint=_NO_GREETING) from error


class Peer:
    """A process that serves, and the requests that it has not answered. Owns the process. For any thread."""

    def __init__(self, process: subprocess.Popen[bytes], *, silence: float = SILENCE_SECONDS) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self.line = Line(process.stdout.fileno(), process.stdin.fileno(), silence=silence)
        self._lock = threading.Lock()  # guards the three below
        self._asked: dict[int, Future[bytes]] = {}
        self._number = 0
        self._broken: HvfuseError | None = None
        self._reader = threading.Thread(target=self._read, name="resync-read", daemon=True)

    def __enter__(self) -> Self:
        self._reader.start()
        with contextlib.suppress(UnreachableError):  # the reader knows better why
            self.line.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the command: it ends by itself at the end of its input."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if isinstance(error, HvfuseError) and self._broken is None:
            with contextlib.suppress(HvfuseError):
                self.line.send(Kind.FAILED, 0, messages.pack_error(error))
        self.line.close()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS if error is None else 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    def ask(self, kind: Kind, payload: bytes = b"") -> bytes:
        """The reply to a request. Raises what the other side raised, UnreachableError, CorruptError.

        Nothing is asked before the other side has greeted: a request may make a file, and who is refused for
        what it says first must not have made one.
        """
        self.line.greeted.wait()  # `_read` ends the wait, too
        answer: Future[bytes] = Future()
        with self._lock:
            if self._broken is not None:
                raise self._broken
            self._number += 1
            number = self._number
            self._asked[number] = answer
        try:
            self.line.send(kind, number, payload)
        except UnreachableError:  # if the other side said why, the reader comes to it
            self._reader.join(END_SECONDS)
            with self._lock:
                if self._broken is not None:
                    raise self._broken from None
            raise
        return answer.result()

    def _read(self) -> None:
        try:
            for message in self.line.messages():
                self._take(message)
            error: HvfuseError = UnreachableError("the other side ended before it was done")
        except HvfuseError as found:
            error = found
        except Exception as found:
            error = HvfuseError(f"internal error: {type(found).__name__}: {found}")
        error = self._explained(error)
        with self._lock:
            self._broken = error
            waiting = list(self._asked.values())
            self._asked.clear()
        self.line.greeted.set()
        self.line.close()
        for answer in waiting:
            answer.set_exception(error)

    def _take(self, message: messages.Message) -> None:
        error = messages.unpack_error(message.payload) if message.kind is Kind.FAILED else None
        if error is not None and message.number == 0:
            raise error
        with self._lock:
            known = message.kind in (Kind.REPLY, Kind.FAILED)
            answer = self._asked.pop(message.number, None) if known else None
        if answer is None:  # whoever waits is told by `_read`
            raise CorruptError("the other side answered what it was not asked")
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(message.payload)

    def _explained(self, error: HvfuseError) -> HvfuseError:
        """With what to do next, and the exit status of the command, if it has ended."""
        if not isinstance(error, UnreachableError):
            return error
        hint = "run it again: what is equal by now is not sent again"
        if not self.line.greeted.is_set():  # nothing has begun
            hint = _NO_GREETING
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return UnreachableError(str(error), hint=f"{hint}; --timeout allows for a longer silence")
        ended = f"its command ended with {code}" if code >= 0 else f"its command was killed by signal {-code}"
        return UnreachableError(f"{error} ({ended})", hint=hint)


class RemoteEnd:
    """A disk on the other side: a far end of `hvfuse.reconcile.run`, source or replica. For any thread.

    `level`: of compression, for what travels either way. `created`: the replica was made just now.
    """

    def __init__(self, peer: Peer, path: str, *, role: str, write: bool, level: int) -> None:
        self._peer = peer
        self._level = level
        self._end = 0
        request = {"path": path, "role": role, "write": write}
        fields = messages.unpack_json(peer.ask(Kind.OPEN, messages.pack_json(request)))
        self._identity(fields.get("identity"))
        state, unaltered = fields.get("state"), fields.get("unaltered")
        self._state = (state.encode("ascii", "replace"), unaltered is True) if isinstance(state, str) else None
        self.created = fields.get("created") is True

    def begin(self, end: int, key: DigestKey) -> None:
        """As `Far.begin`."""
        self._end = end
        fields = {"end": end, "algorithm": key.algorithm, "seed": key.seed, "level": self._level}
        self._peer.ask(Kind.BEGIN, messages.pack_json(fields))

    def occupied(self, low: int, high: int) -> list[Extent]:
        """As `Other.occupied`, in whole blocks."""
        reply = self._peer.ask(Kind.OCCUPIED, messages.pack_extents([Extent(low, high - low)]))
        return messages.unpack_extents(reply, end=self._end)

    def summaries(self, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """As `Other.summaries`."""
        reply = self._peer.ask(Kind.SUMMARIES, messages.pack_extents(extents))
        return messages.unpack_digests(reply, count=len(extents))

    def digests(self, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """As `Other.digests`."""
        reply = self._peer.ask(Kind.DIGESTS, messages.pack_extents(extents))
        return messages.unpack_digests(reply, count=block_count(extents))

    def fetch(self, blocks: Sequence[Extent]) -> tuple[list[Change], int]:
        """What the source has in blocks of one span, and the bytes that travelled."""
        reply = self._peer.ask(Kind.FETCH, messages.pack_extents(blocks))
        found = messages.unpack_changes(reply, end=self._end)
        refuse_unasked(found, blocks, end=self._end)
        return found, len(reply)

    def apply(self, wanted: Sequence[Change]) -> int:
        """As `Replica.apply`."""
        frame = messages.pack_changes(wanted, level=self._level)
        self._peer.ask(Kind.APPLY, frame)
        return len(frame)

    def identify(self) -> Identity:
        """What it is now."""
        return self._identity(messages.unpack_json(self._peer.ask(Kind.IDENTIFY)))

    def state(self) -> tuple[bytes, bool] | None:
        """As `Replica.state`, when it was opened."""
        return self._state

    def resize(self, size: int) -> None:
        """As `Replica.resize`."""
        self._peer.ask(Kind.RESIZE, messages.pack_json({"size": size}))

    def sync(self, state: bytes | None = None) -> bool:
        """As `Replica.sync`."""
        return messages.unpack_json(self._peer.ask(Kind.SYNC, state or b"")).get("kept") is True

    def finish(self) -> None:
        """As `Replica.finish`."""
        self._peer.ask(Kind.FINISH)

    def _identity(self, fields: object) -> Identity:
        try:
            return Identity.from_json(fields)
        except ValueError as error:
            raise CorruptError(f"the other side sent {error}") from None
