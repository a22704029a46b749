"""A process in the background: started, missed, started again, adopted."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hvfuse.control import daemon as daemon_module
from hvfuse.control.daemon import Daemon, Restarts, rotate_log, serving_pid, start_and_wait, wait_for_end
from hvfuse.errors import CorruptError, HvfuseError, UnreachableError
from tests.control.children import REFUSER, HandClock, server, until

Make = Callable[..., Daemon]


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def make(tmp_path: Path, clock: HandClock) -> Iterator[Make]:
    made: list[Daemon] = []

    def factory(command: list[str] | None = None) -> Daemon:
        path = str(tmp_path / "tracker.sock")
        daemon = Daemon(
            "tracker",
            command or server(path, str(tmp_path / "story")),
            socket_path=path,
            log_path=str(tmp_path / "tracker.log"),
            clock=clock,
        )
        made.append(daemon)
        return daemon

    yield factory
    for daemon in made:
        daemon.send(signal.SIGKILL)
        until(lambda daemon=daemon: daemon.check() or not daemon.is_running)


def ready(daemon: Daemon) -> bool:
    daemon.tick()
    return daemon.is_ready


def ended(daemon: Daemon) -> bool:
    daemon.check()
    return not daemon.is_running


def test_the_delay_doubles_up_to_a_minute_and_begins_anew_after_a_stable_life() -> None:
    restarts = Restarts()
    assert [restarts.delay_after(0.1) for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert restarts.delay_after(59.9) == 60
    assert [restarts.delay_after(lived) for lived in (60.0, 3.0, 3.0)] == [1, 2, 4]


def test_the_delay_stays_finite_after_very_many_deaths() -> None:
    restarts = Restarts(deaths=100_000)
    assert restarts.delay_after(0.0) == 60


def test_a_killed_process_is_started_again_when_its_time_has_come(make: Make, clock: HandClock) -> None:
    daemon = make()
    until(lambda: ready(daemon))
    first = daemon.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: ended(daemon))
    assert str(daemon.failure) == "the tracker was killed by SIGKILL"
    daemon.tick()
    assert not daemon.is_running, "one second has not passed yet"
    clock.at += 1.0
    until(lambda: ready(daemon))
    assert daemon.pid != first
    assert daemon.failure is None


def test_the_error_that_ended_a_process_is_told_as_its_own(make: Make) -> None:
    daemon = make([sys.executable, "-c", REFUSER])
    daemon.tick()
    until(lambda: ended(daemon))
    assert isinstance(daemon.failure, CorruptError)
    assert str(daemon.failure) == "os.vhd: footer checksum does not match"
    assert daemon.failure.hint == "hvfuse disk check os.vhd"


def test_only_what_the_last_process_said_counts(make: Make, clock: HandClock, tmp_path: Path) -> None:
    (tmp_path / "tracker.log").write_text("hvfuse: something of last week\n")
    daemon = make([sys.executable, "-c", "raise SystemExit(3)"])
    daemon.tick()
    until(lambda: ended(daemon))
    assert str(daemon.failure) == "the tracker ended with exit code 3"


def test_a_process_that_serves_already_is_adopted_and_missed_like_a_child(make: Make, clock: HandClock) -> None:
    first, second = make(), make()
    until(lambda: ready(first))
    until(lambda: ready(second))
    assert second.pid == first.pid
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: ended(first) and ended(second))
    assert str(second.failure) == "the tracker ended"
    clock.at += 1.0
    until(lambda: ready(second))


def test_nobody_serves_a_socket_that_a_dead_process_left(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    assert serving_pid(path) is None
    assert serving_pid(str(tmp_path / "no" / "directory")) is None
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        assert serving_pid(path) == os.getpid()
    assert serving_pid(path) is None


def test_a_socket_deep_below_is_found(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    assert serving_pid(str(folder / "tracker.sock")) is None


def test_starting_waits_until_it_serves_and_fails_as_it_fails(make: Make, clock: HandClock) -> None:
    daemon = make()
    start_and_wait(daemon, clock=clock)
    assert daemon.is_ready
    daemon.send(signal.SIGTERM)
    assert wait_for_end(daemon.pid, 20)
    with pytest.raises(CorruptError, match="footer checksum"):
        start_and_wait(make([sys.executable, "-c", REFUSER]), clock=clock)


def test_a_process_that_never_serves_is_reported_as_unreachable(make: Make, clock: HandClock) -> None:
    with pytest.raises(HvfuseError, match="does not answer"):
        start_and_wait(make(["sleep", "60"]), clock=clock, seconds=1.0)


def test_a_process_that_is_gone_has_ended() -> None:
    assert wait_for_end(2**22 + 1, 0.0)
    assert not wait_for_end(os.getpid(), 0.0)


def test_a_log_that_is_too_long_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "LOG_LIMIT", 10)
    log = tmp_path / "x.log"
    rotate_log(str(log))
    log.write_text("short")
    rotate_log(str(log))
    assert log.exists()
    log.write_text("much longer than that")
    rotate_log(str(log))
    assert not log.exists()
    assert (tmp_path / "x.log.1").read_text() == "much longer than that"


def test_a_process_that_lets_nobody_in_any_more_is_told_from_one_that_is_gone(tmp_path: Path) -> None:
    path = str(tmp_path / "busy.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        waiting.connect(path)
        with pytest.raises(UnreachableError, match=path):
            serving_pid(path)
    assert serving_pid(path) is None
