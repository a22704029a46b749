"""A guest agent on a unix socket that speaks the real one's protocol, and can be made to misbehave. Also a program:

python fake_agent.py SOCKET STATE      STATE is a file that holds "frozen" while the guest stands still
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any


class FakeAgent:
    """One client at a time, as qemu serves them. `said`: the commands that came.

    `faults`: by command, what to do instead of answering: "silence", "hang" (freezes `late` seconds later, when nobody
    waits any more), "error", "garbage", "close", "nothing" (freezes no file system).
    """

    def __init__(self, path: Path, state: Path | None = None, *, with_ids: bool = True) -> None:
        self.said: list[str] = []
        self.faults: dict[str, str] = {}
        self.late = 0.5
        self.stale = b""
        self.is_frozen = False
        self._state = state
        self._with_ids = with_ids
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(4)
        self._ended = threading.Event()
        self._connection: socket.socket | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self._ended.set()
        for sock in (self._socket, self._connection):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        self.thread.join()

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                self._connection, _ = self._socket.accept()
            except OSError:
                return
            with self._connection, contextlib.suppress(OSError):
                self._connection.sendall(self.stale)
                self.stale = b""
                self._talk(self._connection)

    def _talk(self, connection: socket.socket) -> None:
        pending = b""
        while more := connection.recv(4096):
            pending += more
            # A lexer: 0xff resets it, a whole object ends a request; lines do not matter.
            pending = pending.rpartition(b"\xff")[2]
            try:
                request = json.loads(pending)
            except ValueError:
                continue
            pending = b""
            self._answer(connection, request)

    def _answer(self, connection: socket.socket, request: dict[str, Any]) -> None:
        command = request["execute"]
        self.said.append(command)
        fault = self.faults.get(command)
        named = {"id": request["id"]} if self._with_ids and "id" in request else {}
        match fault:
            case "silence":
                return
            case "close":
                connection.shutdown(socket.SHUT_RDWR)
                return
            case "garbage":
                connection.sendall(b'\x00\xfe{"return": [}\n')
                return
            case "error":
                told = {"error": {"class": "GenericError", "desc": "it will not"}, **named}
                connection.sendall(json.dumps(told).encode() + b"\n")
                return
            case "hang":
                self._ended.wait(self.late)
        told = {"return": 0 if fault == "nothing" else self._do(command, request.get("arguments", {})), **named}
        prefix = b"\xff" if command == "guest-sync-delimited" else b""
        connection.sendall(prefix + json.dumps(told).encode() + b"\n")

    def _do(self, command: str, arguments: dict[str, Any]) -> object:
        was_frozen = self.is_frozen
        match command:
            case "guest-sync-delimited":
                return arguments["id"]
            case "guest-fsfreeze-status":
                return "frozen" if was_frozen else "thawed"
            case "guest-fsfreeze-freeze":
                self._set(True)
                return 2
            case "guest-fsfreeze-thaw":
                self._set(False)
                return 2 if was_frozen else 0
        raise AssertionError(command)

    def _set(self, is_frozen: bool) -> None:
        self.is_frozen = is_frozen
        if self._state is not None:
            beside = self._state.with_suffix(".new")
            beside.write_text("frozen" if is_frozen else "thawed")
            os.replace(beside, self._state)


if __name__ == "__main__":
    FakeAgent(Path(sys.argv[1]), Path(sys.argv[2]))
    while True:
        time.sleep(3600)
