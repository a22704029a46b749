"""A guest that is frozen by a guard process, and who thaws it when what dies: real processes, real kills."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvfuse.control import guest
from hvfuse.control.guest import GuardedGuest
from hvfuse.control.guest_settings import GuestSettings
from hvfuse.shipper.guest import FreezeError
from tests.control.fake_agent import FakeAgent

REPOSITORY = Path(__file__).resolve().parents[2]

HOOK = """
import os, sys, time
event, state, log = os.environ["HVFUSE_EVENT"], sys.argv[1], sys.argv[2]
with open(log, "a") as file:
    file.write(f"{os.environ['HVFUSE_VM']} {event} {os.path.exists(sys.argv[3])}\\n")
if os.path.exists(f"{state}.fail-{event}"):
    sys.exit(3)
with open(state, "w") as file:
    file.write("frozen" if event == "freeze" else "thawed")
if os.path.exists(f"{state}.hang-{event}"):
    time.sleep(60)
"""

SHIPPER = """
import json, sys, time
from hvfuse.control.guest import GuardedGuest
from hvfuse.control.guest_settings import GuestSettings
fields = json.loads(sys.argv[1])
settings = GuestSettings(fields[0], tuple(fields[1]), tuple(fields[2]), fields[3])
with GuardedGuest("vm1", lambda: settings, sys.argv[2]).frozen() as stillness:
    print("frozen", flush=True)
    time.sleep(60)
"""


class Place:
    """A guest by hooks whose state is a file, and the directory where a freeze leaves its traces."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory = root / "guest"
        self.state = root / "state"
        self.log = root / "log"
        self.note = self.directory / "note"
        self.proof = self.directory / "proof"
        self.state.write_text("thawed")
        script = root / "hook.py"
        script.write_text(HOOK)
        self.words = (sys.executable, str(script), str(self.state), str(self.log), str(self.note))

    def settings(self, freeze_timeout: float = 10.0) -> GuestSettings:
        return GuestSettings(None, self.words, self.words, freeze_timeout)

    def guest(self, freeze_timeout: float = 10.0) -> GuardedGuest:
        return GuardedGuest("vm1", lambda: self.settings(freeze_timeout), str(self.directory))

    def make(self, fault: str) -> Path:
        path = Path(f"{self.state}.{fault}")
        path.touch()
        return path

    @property
    def is_frozen(self) -> bool:
        return self.state.read_text() == "frozen"

    def events(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def guards(self) -> list[int]:
        """The guard processes of this place that live."""
        found = []
        for entry in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                if b"_guard" in words and os.fsencode(self.directory) in words:
                    found.append(int(entry))
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for fault in tmp_path.glob("state.*"):
        fault.unlink()
    wait_until(lambda: not made.guards(), 20)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    made = FakeAgent(tmp_path / "qga.sock", tmp_path / "state")
    yield made
    made.close()


def wait_until(holds: Callable[[], object], seconds: float) -> float:
    """Returns how long it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began


def start_shipper(place: Place, settings: GuestSettings) -> subprocess.Popen[bytes]:
    """A process that holds the guest frozen, in a process group of its own."""
    told = json.dumps([settings.agent, settings.freeze, settings.thaw, settings.freeze_timeout])
    process = subprocess.Popen(
        [sys.executable, "-c", SHIPPER, told, str(place.directory)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"frozen\n"
    assert place.is_frozen
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_guest_stands_still_within_the_body_and_moves_after_it(place: Place) -> None:
    with place.guest().frozen() as stillness:
        assert place.is_frozen
        assert place.note.exists()
        assert stillness.proof == str(place.proof)
        assert place.proof.exists()
        time.sleep(0.1)
    assert not place.is_frozen
    assert not place.note.exists()
    assert not place.proof.exists()
    assert 0.1 < stillness.seconds < 5
    assert stillness.broken is None
    assert place.events() == ["vm1 freeze True", "vm1 thaw True"], "the note is there before and until after"


def test_a_guest_is_frozen_by_its_agent(place: Place, agent: FakeAgent, tmp_path: Path) -> None:
    made = GuardedGuest("vm1", lambda: GuestSettings(agent=str(tmp_path / "qga.sock")), str(place.directory))
    with made.frozen():
        assert agent.is_frozen
    assert not agent.is_frozen
    with made.frozen() as stillness:
        agent.is_frozen = False  # as Windows does when its ten seconds are over
    assert stillness.broken == "the guest had thawed by itself"
    assert made.stuck() is None


def test_a_failure_in_the_body_thaws(place: Place) -> None:
    with pytest.raises(ZeroDivisionError), place.guest().frozen():
        assert place.is_frozen
        _ = 1 / 0
    assert not place.is_frozen


def test_a_freeze_that_fails_is_thawed_all_the_same(place: Place) -> None:
    place.make("fail-freeze")
    with pytest.raises(FreezeError, match="exit code 3"), place.guest().frozen():
        raise AssertionError
    assert [line.split()[1] for line in place.events()] == ["freeze", "thaw"]
    assert not place.note.exists()


def test_a_freeze_that_fails_is_told_by_its_own_cause_although_the_guest_cannot_be_thawed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "THAW_SECONDS", 0.5)
    place.make("fail-freeze")
    fault = place.make("fail-thaw")
    began = time.monotonic()
    one = place.guest()
    with pytest.raises(FreezeError, match=r"the freeze command .* exit code 3"), one.frozen():
        pass
    assert time.monotonic() - began < guest.START_SECONDS
    assert "the thaw command" in str(one.stuck())
    fault.unlink()
    wait_until(lambda: not place.note.exists(), 15)  # the guard went on trying
    assert one.stuck() is None


def test_a_freeze_that_takes_too_long_is_given_up_and_thawed(place: Place) -> None:
    place.make("hang-freeze")
    began = time.monotonic()
    with pytest.raises(FreezeError, match="did not end within"), place.guest(0.5).frozen():
        raise AssertionError
    assert time.monotonic() - began < 5
    assert not place.is_frozen


def test_an_agent_that_hangs_while_freezing_is_thawed_once_it_answers(
    place: Place, agent: FakeAgent, tmp_path: Path
) -> None:
    agent.faults["guest-fsfreeze-freeze"] = "hang"
    agent.late = 1.5
    settings = GuestSettings(agent=str(tmp_path / "qga.sock"), freeze_timeout=0.5)
    with pytest.raises(FreezeError), GuardedGuest("vm1", lambda: settings, str(place.directory)).frozen():
        raise AssertionError
    assert "guest-fsfreeze-thaw" in agent.said
    assert not agent.is_frozen
    assert not place.note.exists()


def test_a_command_that_does_not_exist_freezes_nothing(place: Place) -> None:
    settings = GuestSettings(freeze=("/does/not/exist",), thaw=place.words)
    made = GuardedGuest("vm1", lambda: settings, str(place.directory))
    with pytest.raises(FreezeError, match="cannot be run"), made.frozen():
        raise AssertionError
    assert place.events() == []
    assert not place.note.exists()


def test_the_guest_is_let_go_when_its_time_is_over_whoever_still_needs_it(place: Place) -> None:
    with place.guest(0.7).frozen():
        assert place.proof.exists()
        wait_until(lambda: not place.is_frozen, 3)
        assert not place.proof.exists(), "nobody must believe any more that it stands still"


@pytest.mark.parametrize("by_agent", [False, True])
def test_the_guest_moves_within_a_second_of_the_shippers_death(
    place: Place, agent: FakeAgent, tmp_path: Path, by_agent: bool
) -> None:
    settings = GuestSettings(agent=str(tmp_path / "qga.sock")) if by_agent else place.settings()
    shipper = start_shipper(place, settings)
    os.kill(shipper.pid, signal.SIGKILL)
    took = wait_until(lambda: not place.is_frozen, 5)
    print(f"thawed {took:.3f} s after the shipper's death")
    assert took < 1.5
    end(shipper)
    wait_until(lambda: not place.note.exists(), 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_signals_to_the_shippers_process_group_do_not_keep_the_guest_from_moving(
    place: Place, number: signal.Signals
) -> None:
    shipper = start_shipper(place, place.settings())
    os.killpg(shipper.pid, number)
    wait_until(lambda: not place.is_frozen, 5)
    end(shipper)
    wait_until(lambda: not place.note.exists(), 2)


def test_a_guard_that_is_told_to_end_thaws_first(place: Place) -> None:
    with place.guest().frozen():
        (guard,) = place.guards()
        os.kill(guard, signal.SIGTERM)
        wait_until(lambda: not place.is_frozen, 3)
    assert not place.note.exists()


def test_where_the_guard_dies_the_shipper_thaws_in_its_place(place: Place) -> None:
    made = place.guest()
    with made.frozen():
        (guard,) = place.guards()
        os.kill(guard, signal.SIGKILL)
    assert not place.is_frozen
    assert not place.note.exists()
    assert made.stuck() is None


def test_where_both_die_the_next_start_thaws(place: Place) -> None:
    shipper = start_shipper(place, place.settings())
    (guard,) = place.guards()
    os.kill(guard, signal.SIGKILL)
    os.kill(shipper.pid, signal.SIGKILL)
    end(shipper)
    time.sleep(0.3)
    assert place.is_frozen, "nobody is left to thaw"
    assert place.note.exists()
    # The settings are gone from the configuration meanwhile: the note says how to thaw.
    made = GuardedGuest("vm1", lambda: None, str(place.directory))
    made.thaw_leftover()
    assert not place.is_frozen
    assert not place.note.exists()
    assert not place.proof.exists()
    assert made.stuck() is None


def test_a_guest_that_does_not_run_any_more_has_nothing_to_thaw(place: Place, agent: FakeAgent, tmp_path: Path) -> None:
    made = GuardedGuest("vm1", lambda: GuestSettings(agent=str(tmp_path / "qga.sock")), str(place.directory))
    with made.frozen():
        agent.close()
        (tmp_path / "qga.sock").unlink()
    assert made.stuck() is None
    assert not place.note.exists()


def test_a_guest_that_cannot_be_thawed_is_told_and_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guest, "THAW_SECONDS", 1.0)
    made = place.guest()
    fault = place.make("fail-thaw")
    with made.frozen():
        pass
    assert "exit code 3" in str(made.stuck())
    assert "THE GUEST MAY STAND STILL" in caplog.text
    assert place.is_frozen
    with pytest.raises(FreezeError, match="has not ended"), made.frozen():
        raise AssertionError
    fault.unlink()
    wait_until(lambda: not place.is_frozen, 15)
    wait_until(lambda: made.stuck() is None, 2)
    with made.frozen():
        assert place.is_frozen


@pytest.mark.parametrize(
    "settings", [None, GuestSettings(), GuestSettings("/a", ("b",), ("c",)), GuestSettings(freeze=("b",))]
)
def test_settings_that_cannot_work_freeze_nothing(tmp_path: Path, settings: GuestSettings | None) -> None:
    made = GuardedGuest("vm1", lambda: settings, str(tmp_path))
    with pytest.raises(FreezeError, match=r"\[vm\.vm1\.guest\]"), made.frozen():
        raise AssertionError
    assert os.listdir(tmp_path) == []
