"""The qemu guest agent's protocol, spoken to an agent that may be silent, sick or somebody else's."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse.control import guest_agent
from hvfuse.control.guest_agent import AgentFreezer
from hvfuse.shipper.guest import FreezeError, GoneError
from tests.control.fake_agent import FakeAgent


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    made = FakeAgent(tmp_path / "qga.sock")
    yield made
    made.close()


@pytest.fixture
def freezer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AgentFreezer:
    monkeypatch.setattr(guest_agent, "PATIENCE", 0.3)
    return AgentFreezer(str(tmp_path / "qga.sock"))


def test_a_guest_is_frozen_and_thawed(agent: FakeAgent, freezer: AgentFreezer) -> None:
    freezer.freeze(5)
    assert agent.is_frozen
    assert freezer.may_be_frozen
    assert freezer.thaw(5) is True
    assert not agent.is_frozen
    assert not freezer.may_be_frozen
    sync = "guest-sync-delimited"
    status, freeze, thaw = "guest-fsfreeze-status", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"
    assert agent.said == [sync, status, sync, freeze, sync, thaw]


def test_a_guest_that_had_thawed_by_itself_is_told(agent: FakeAgent, freezer: AgentFreezer) -> None:
    freezer.freeze(5)
    agent.is_frozen = False
    assert freezer.thaw(5) is False


@pytest.mark.parametrize(
    "stale",
    [
        b'{"return": 2}\n',
        b'{"error": {"class": "GenericError", "desc": "of somebody else\'s"}}\n',
        b'\xff{"return": 77}\n{"retu',
        b"\x00\x01rubbish without an end",
        b"\xfe\xfd\n" * 50,
    ],
)
def test_what_an_earlier_client_left_in_the_channel_is_dropped(
    agent: FakeAgent, freezer: AgentFreezer, stale: bytes
) -> None:
    agent.stale = stale
    freezer.freeze(5)
    assert agent.is_frozen


@pytest.mark.parametrize("command", ["guest-sync-delimited", "guest-fsfreeze-status"])
@pytest.mark.parametrize("fault", ["silence", "error", "garbage", "close"])
def test_an_agent_that_fails_before_it_is_asked_to_freeze_needs_no_thaw(
    agent: FakeAgent, freezer: AgentFreezer, command: str, fault: str
) -> None:
    agent.faults[command] = fault
    with pytest.raises(FreezeError):
        freezer.freeze(1)
    assert not freezer.may_be_frozen
    assert "guest-fsfreeze-freeze" not in agent.said


@pytest.mark.parametrize("fault", ["silence", "error", "garbage", "close", "nothing"])
def test_an_agent_that_fails_at_freezing_may_have_frozen(agent: FakeAgent, freezer: AgentFreezer, fault: str) -> None:
    agent.faults["guest-fsfreeze-freeze"] = fault
    began = time.monotonic()
    with pytest.raises(FreezeError):
        freezer.freeze(0.8)
    assert time.monotonic() - began < 3
    assert freezer.may_be_frozen
    assert freezer.thaw(5) is False


def test_a_freeze_that_ends_after_it_was_given_up_is_undone(agent: FakeAgent, freezer: AgentFreezer) -> None:
    agent.faults["guest-fsfreeze-freeze"] = "hang"
    agent.late = 1.0
    with pytest.raises(FreezeError, match="does not answer"):
        freezer.freeze(0.4)
    while True:  # the agent is busy freezing, and does not answer until it is done
        try:
            assert freezer.thaw(5)
        except FreezeError:
            continue
        break
    assert not agent.is_frozen


def test_a_guest_that_another_program_froze_is_left_alone(agent: FakeAgent, freezer: AgentFreezer) -> None:
    agent.is_frozen = True
    with pytest.raises(FreezeError, match="another program"):
        freezer.freeze(5)
    assert not freezer.may_be_frozen
    assert agent.is_frozen


def test_an_agent_that_nobody_serves_is_gone(tmp_path: Path, freezer: AgentFreezer) -> None:
    with pytest.raises(GoneError, match="No such file"):
        freezer.freeze(5)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "qga.sock"))
    with pytest.raises(GoneError, match="Connection refused"):
        freezer.thaw(5)
    assert not freezer.may_be_frozen


def test_an_agent_whose_only_place_is_taken_is_given_up_in_time(tmp_path: Path, freezer: AgentFreezer) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "qga.sock"))
        sock.listen(1)
        began = time.monotonic()
        with pytest.raises(FreezeError, match="does not answer"):
            freezer.freeze(5)
        assert time.monotonic() - began < 3
