"""A pipe to the other side: messages out, messages in, and the certainty to notice when nobody is there.

Each side says ALIVE when it has said nothing for a quarter of the time limit. Who hears nothing for the whole of it
takes the other side for dead, as after the end of its output.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import threading
import time
from collections.abc import Iterator

from hvfuse.errors import UnreachableError
from hvfuse.reconcile.messages import Kind, Message, Receiver, greeting, pack

PIECE = 1 << 20
POLL_SECONDS = 0.5
SILENCE_SECONDS = 60.0


class Line:
    """One side's two descriptors. It owns neither. `silence`: seconds without a byte after which the other
    side counts as dead. `drained`: the other side always reads, so it is dead, too, if it takes nothing for so long."""

    def __init__(self, from_fd: int, to_fd: int, *, silence: float = SILENCE_SECONDS, drained: bool = False) -> None:
        self._from = from_fd
        self._to = to_fd
        self._silence = silence
        self._drained = drained
        self._sending = threading.Lock()  # guards what is being written: messages must not mix
        self._said = time.monotonic()
        self._closed = threading.Event()
        self._receiver = Receiver()
        self.greeted = threading.Event()
        """The other side has said that it is one of ours."""
        self.bytes_out = 0
        self.bytes_in = 0
        for fd in (from_fd, to_fd):
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIECE)
        self._alive = threading.Thread(target=self._stay_alive, name="resync-alive", daemon=True)

    def start(self) -> None:
        """Greet. Raises UnreachableError."""
        with self._sending:
            self._write(greeting())
        self._alive.start()

    def close(self) -> None:
        """Say nothing any more; whoever is in `send` fails."""
        self._closed.set()

    def send(self, kind: Kind, number: int, payload: bytes = b"") -> None:
        """Send a message. For any thread. Raises UnreachableError."""
        with self._sending:
            for piece in pack(kind, number, payload):
                self._write(piece)

    def messages(self) -> Iterator[Message]:
        """What the other side says until it ends between two messages. For one thread.

        Raises UnreachableError, CorruptError, UnsupportedError.
        """
        while data := self._read():
            for message in self._receiver.receive(data):
                if message.kind is not Kind.ALIVE:
                    yield message
            if self._receiver.greeted:
                self.greeted.set()
        if not self._receiver.greeted:
            raise UnreachableError("the other side ended without a word")
        if not self._receiver.idle:
            raise UnreachableError("the other side ended in the middle of a message")

    def _read(self) -> bytes:
        heard = time.monotonic()
        poll = select.poll()
        poll.register(self._from, select.POLLIN)
        while not self._closed.is_set():
            if poll.poll(POLL_SECONDS * 1000):
                with contextlib.suppress(BlockingIOError):
                    try:
                        data = os.read(self._from, PIECE)
                    except OSError as error:
                        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
                            continue
                        raise UnreachableError(f"the other side cannot be heard: {error.strerror}") from error
                    self.bytes_in += len(data)
                    return data
            elif time.monotonic() - heard > self._silence:
                raise UnreachableError(
                    f"nothing was heard of the other side for {self._silence:g} seconds",
                    hint="see whether the connection still works; --timeout allows for a longer silence",
                )
        return b""

    def _write(self, data: bytes) -> None:
        """Caller holds `_sending`."""
        view = memoryview(data)
        since = time.monotonic()
        while view:
            if self._closed.is_set():
                raise UnreachableError("the connection was ended")
            try:
                count = os.write(self._to, view[:PIECE])
            except BlockingIOError:
                if self._drained and time.monotonic() - since > self._silence:
                    self._closed.set()
                poll = select.poll()
                poll.register(self._to, select.POLLOUT)
                poll.poll(POLL_SECONDS * 1000)
                continue
            except OSError as error:
                raise UnreachableError(f"the other side went away: {error.strerror}") from error
            view = view[count:]
            self.bytes_out += count
            self._said = since = time.monotonic()

    def _stay_alive(self) -> None:
        while not self._closed.wait(self._silence / 8):
            if time.monotonic() - self._said > self._silence / 4:
                try:
                    self.send(Kind.ALIVE, 0)
                except UnreachableError:
                    return
