"""Requests between processes, over real sockets."""

from __future__ import annotations

import json
import os
import resource
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hvfuse import wire
from hvfuse.errors import BusyError, CorruptError, HvfuseError, NoSpaceError, UnreachableError
from hvfuse.wire import Listener, Message


@contextmanager
def serving(path: Path, handler: wire.Handler) -> Iterator[Listener]:
    listener = Listener(str(path), handler, name="test")
    try:
        yield listener
    finally:
        listener.close()


def echo(message: Message) -> Message:
    return {"heard": message}


def raw_request(path: Path, line: bytes) -> bytes:
    """Whatever comes back for these bytes until the connection ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(line)
        sock.shutdown(socket.SHUT_WR)
        parts = []
        while part := sock.recv(1 << 16):
            parts.append(part)
        return b"".join(parts)


def test_a_request_brings_its_fields_there_and_the_answer_back(tmp_path: Path) -> None:
    with serving(tmp_path / "s", echo):
        for number in range(20):
            answer = wire.request(str(tmp_path / "s"), "rotate", number=number, text='"\n\0ä', deep=[{"a": None}])
            assert answer["heard"] == {"op": "rotate", "number": number, "text": '"\n\0ä', "deep": [{"a": None}]}


def test_large_answers_arrive_whole(tmp_path: Path) -> None:
    text = "x" * (3 << 20)
    with serving(tmp_path / "s", echo):
        assert wire.request(str(tmp_path / "s"), "big", text=text)["heard"]["text"] == text


def test_a_path_longer_than_a_socket_address_serves(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["deep" * 12] * 5)
    folder.mkdir(parents=True)
    path = folder / "control.sock"
    assert len(str(path)) > 250
    with serving(path, echo):
        assert wire.request(str(path), "status")["ok"]
        with pytest.raises(BusyError):
            Listener(str(path), echo, name="second")
    assert not path.exists()


def test_a_relative_path_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(Path("s"), echo):
        assert wire.request("s", "status")["ok"]


def test_the_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        with serving(tmp_path / "s", echo):
            mode = os.stat(tmp_path / "s").st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
        assert os.umask(0) == 0, "the process's umask is as it was"
    finally:
        os.umask(umask)


@pytest.mark.parametrize("kind", [CorruptError, NoSpaceError, BusyError, HvfuseError])
def test_an_error_arrives_as_the_type_it_was_raised_as(tmp_path: Path, kind: type[HvfuseError]) -> None:
    def fail(_: Message) -> Message:
        raise kind("what went wrong", hint="what to do")

    with serving(tmp_path / "s", fail):
        with pytest.raises(kind, match="what went wrong") as caught:
            wire.request(str(tmp_path / "s"), "rotate")
        assert type(caught.value) is kind
        assert caught.value.hint == "what to do"


def test_a_bug_in_a_handler_is_told_and_does_not_end_the_listener(tmp_path: Path) -> None:
    def handle(message: Message) -> Message:
        return {"answer": {"raise": lambda: 1 // 0, "unspeakable": object, "fine": int}[message["op"]]()}

    with serving(tmp_path / "s", handle):
        for op in ("raise", "unspeakable", "no such op"):
            with pytest.raises(HvfuseError, match="Error"):
                wire.request(str(tmp_path / "s"), op)
        assert wire.request(str(tmp_path / "s"), "fine")["answer"] == 0


@pytest.mark.parametrize(
    "answer", [{"ok": False, "error": "SystemExit"}, {"ok": False, "error": "Any"}, {"ok": False}, {}]
)
def test_an_error_of_a_type_that_is_not_ours_is_a_plain_one(tmp_path: Path, answer: Message) -> None:
    thread = answers_with(tmp_path / "s", json.dumps(answer).encode() + b"\n")
    with pytest.raises(HvfuseError) as caught:
        wire.request(str(tmp_path / "s"), "x")
    assert type(caught.value) is HvfuseError
    thread.join()


def answers_with(path: Path, answer: bytes) -> threading.Thread:
    """A peer that reads a request, answers with these bytes and hangs up."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen(1)

    def serve() -> None:
        connection, _ = server.accept()
        with server, connection:
            connection.recv(1 << 16)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "answer", [b"", b"{", b'{"ok": true}', b"[]\n", b"null\n", b"\xff\xfe\n", b"{}{}\n", b"[" * 200_000 + b"\n"]
)
def test_a_peer_that_answers_rubbish_counts_as_unreachable(tmp_path: Path, answer: bytes) -> None:
    thread = answers_with(tmp_path / "s", answer)
    with pytest.raises(UnreachableError):
        wire.request(str(tmp_path / "s"), "x")
    thread.join()


@pytest.mark.parametrize("line", [b"", b"\n", b"nonsense\n", b"[]\n", b'{"op"', b"\xff\n", b"[" * 200_000 + b"\n"])
def test_rubbish_does_not_end_the_listener(tmp_path: Path, line: bytes) -> None:
    with serving(tmp_path / "s", echo):
        answer = raw_request(tmp_path / "s", line)
        assert not answer or not json.loads(answer)["ok"]
        assert wire.request(str(tmp_path / "s"), "status")["ok"]


def test_a_line_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_LINE", 1 << 20)
    with serving(tmp_path / "s", echo):
        with pytest.raises(OSError):  # reset or broken pipe, as it falls
            raw_request(tmp_path / "s", b"x" * (8 << 20))
        assert wire.request(str(tmp_path / "s"), "status")["ok"]


def test_nobody_there_is_unreachable(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "no" / "folder", tmp_path):
        with pytest.raises(UnreachableError, match=str(path)):
            wire.request(str(path), "status")


def test_a_peer_that_does_not_answer_in_time_is_unreachable(tmp_path: Path) -> None:
    released = threading.Event()

    def wait(_: Message) -> Message:
        released.wait(10)
        return {}

    with serving(tmp_path / "s", wait):
        with pytest.raises(UnreachableError, match="timed out"):
            wire.request(str(tmp_path / "s"), "status", timeout=0.05)
        released.set()


def test_a_socket_of_a_dead_process_is_replaced_but_not_that_of_a_live_one(tmp_path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(tmp_path / "s"))
    dead.close()
    with serving(tmp_path / "s", echo):
        with pytest.raises(BusyError, match="already serves"):
            Listener(str(tmp_path / "s"), echo, name="second")
        assert wire.request(str(tmp_path / "s"), "status")["ok"]


def test_requests_of_many_at_once_are_served_one_by_one(tmp_path: Path) -> None:
    inside = threading.Lock()
    overlaps: list[Message] = []
    answers: list[int] = []

    def handle(message: Message) -> Message:
        if not inside.acquire(blocking=False):
            overlaps.append(message)
            return {}
        try:
            return {"number": message["number"]}
        finally:
            inside.release()

    def ask(number: int) -> None:
        answers.append(wire.request(str(tmp_path / "s"), "x", number=number)["number"])

    with serving(tmp_path / "s", handle):
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not overlaps
    assert sorted(answers) == list(range(40))


def test_a_handler_may_end_its_own_listener(tmp_path: Path) -> None:
    def stop(_: Message) -> Message:
        listener.close()
        return {"stopped": True}

    listener = Listener(str(tmp_path / "s"), stop, name="test")
    assert wire.request(str(tmp_path / "s"), "stop")["stopped"]
    with pytest.raises(UnreachableError):
        wire.request(str(tmp_path / "s"), "stop")


def test_a_shortage_of_descriptors_is_outlived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noticed = threading.Event()

    class Noticing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            noticed.set()
            return super().wait(timeout)

    monkeypatch.chdir(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (
        serving(Path("s"), echo) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as second,
    ):
        listener._closed = Noticing()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            for sock in (first, second):
                sock.settimeout(10)
                sock.connect("s")
                sock.sendall(b'{"op": "status"}\n')
            assert noticed.wait(10)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert json.loads(first.recv(1 << 16))["ok"]
        assert json.loads(second.recv(1 << 16))["ok"]


def test_closing_ends_the_thread_before_the_descriptor_is_free(tmp_path: Path) -> None:
    listener = Listener(str(tmp_path / "s"), echo, name="test")
    listener.close()
    listener.close()
    assert not listener._thread.is_alive()
    assert listener._socket.fileno() == -1
