"""Requests between processes of one host: JSON lines over a unix socket, one answer to each.

A request is one line `{"op": NAME, ...}`; the answer one line, `{"ok": true, ...}` or
`{"ok": false, "error": TYPE, "message": TEXT, "hint": TEXT|null}`. Sockets have mode 0600, and the
peer's uid must be root's or ours (SO_PEERCRED).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hvfuse import errors
from hvfuse.errors import BusyError, HvfuseError, UnreachableError

MAX_LINE = 16 << 20
"""Bytes; a longer request or answer is refused."""

_PAUSE = 0.1
"""Seconds."""
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_PASSING = (errno.ECONNABORTED, errno.EINTR, errno.EAGAIN, errno.EPROTO, errno.EPERM)

_log = logging.getLogger(__name__)

Message = dict[str, Any]
Handler = Callable[[Message], Mapping[str, Any]]


@contextlib.contextmanager
def _short_address(path: str) -> Iterator[str]:
    """An address for `path` that fits into sockaddr_un's 108 bytes however deep the directory lies."""
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def request(path: str, op: str, *, timeout: float = 60.0, **fields: Any) -> Message:
    """Ask the process that listens at `path`. Raises UnreachableError, or the error it answered with."""
    line = json.dumps({"op": op, **fields}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, _short_address(path) as address:
            sock.settimeout(timeout)
            sock.connect(address)
            sock.sendall(line)
            answer = _read_line(sock)
    except OSError as error:
        raise UnreachableError(f"no answer from {path}: {error.strerror or error}") from None
    message = _parse(answer)
    if not message.get("ok"):
        raise _error_from(message)
    return message


def _read_line(sock: socket.socket) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        part = sock.recv(1 << 16)
        if not part:
            raise ConnectionResetError("the connection was closed in the middle of a line")
        parts.append(part)
        size += len(part)
        if part.endswith(b"\n"):
            return b"".join(parts)
        if size > MAX_LINE:
            raise ConnectionAbortedError("the line is too long")


def _parse(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise UnreachableError("the line is not JSON") from None
    if not isinstance(message, dict):
        raise UnreachableError("the line is not a JSON object")
    return message


def _error_from(message: Message) -> HvfuseError:
    """The exception that the other side raised, by its class's name in `hvfuse.errors`."""
    kind = getattr(errors, str(message.get("error")), None)
    if not (isinstance(kind, type) and issubclass(kind, HvfuseError)):
        kind = HvfuseError
    return kind(str(message.get("message")), hint=message.get("hint"))


class Listener:
    """Serves requests at `path`, each connection one request, in a thread of its own.

    The handler runs in the listener's single thread, so handlers never overlap; `concurrent` gives each
    request a thread of its own instead, for a handler that may wait long. Raises BusyError when
    a live process already listens there; a socket that a dead one left behind is replaced.
    """

    def __init__(self, path: str, handler: Handler, *, name: str, concurrent: bool = False) -> None:
        self._path = path
        self._concurrent = concurrent
        self._handler = handler
        self._socket = self._bind(path)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @staticmethod
    def _bind(path: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _short_address(path) as address:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    probe.connect(address)
                sock.close()
                raise BusyError(f"another process already serves {path}")
            except (FileNotFoundError, ConnectionRefusedError):
                pass
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            previous = os.umask(0o177)
            try:
                sock.bind(address)
            finally:
                os.umask(previous)
        sock.listen(16)
        return sock

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if self._closed.is_set():
                    return
                # No descriptor or memory left, or a caller that gave up: who is still there waits in the queue.
                if error.errno in _SHORTAGES:
                    self._closed.wait(_PAUSE)
                elif error.errno not in _PASSING:
                    _log.error("%s: does not listen any more: %s", self._path, error)
                    return
                continue
            if self._concurrent:
                threading.Thread(target=self._serve_one, args=(connection,), daemon=True).start()
            else:
                self._serve_one(connection)

    def _serve_one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(10)
            if _peer_uid(connection) in (0, os.getuid()):
                connection.sendall(self._answer(_read_line(connection)))

    def _answer(self, line: bytes) -> bytes:
        try:
            return json.dumps({"ok": True, **self._handler(_parse(line))}).encode() + b"\n"
        except HvfuseError as error:
            answer = {"ok": False, "error": type(error).__name__, "message": str(error), "hint": error.hint}
        except Exception as error:  # a bug in a handler must not end the listener
            answer = {
                "ok": False,
                "error": "HvfuseError",
                "message": _message(error),
                "hint": None,
            }
        return json.dumps(answer).encode() + b"\n"

    def close(self) -> None:
        """Stop listening and remove the socket; a request that is being served in the listener's own thread is
        finished first. Safe from within a handler."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        # Only then the descriptor: its number may be another socket's at once, and that would be accepted on.
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def _message(error: Exception) -> str:
    """What whoever asked is told of an error that nobody foresaw."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


def _peer_uid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])
