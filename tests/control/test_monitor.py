"""Changes of health become events, once, and a command is told of them."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import pytest

from hvfuse.control import notify
from hvfuse.control import records as records_module
from hvfuse.control.events import EventRecord, Severity
from hvfuse.control.health import Health, Reason
from hvfuse.control.job import JobKind
from hvfuse.control.monitor import CALM_SECONDS, COMINGS, HOLD_SECONDS, Monitor
from hvfuse.control.notify import Notifier
from hvfuse.control.records import Records
from hvfuse.errors import HvfuseError, NoSpaceError
from hvfuse.states import ReplicationState
from hvfuse.system import SystemClock

from .children import HandClock, until


@dataclass(frozen=True)
class Seen:
    """What a monitor needs of a status."""

    name: str
    health: Health
    is_protected: bool = True
    state: ReplicationState = ReplicationState.REPLICATING

    @property
    def reasons(self) -> tuple[Reason, ...]:
        if self.health is Health.NORMAL:
            return ()
        return (Reason(id="stale", health=self.health, text="it is old", next_command="hvfuse replicate vm"),)


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with Records(str(tmp_path / "records")) as records:
        yield records


def told(records: Records) -> list[str]:
    return [event.text for event in records.events.after(0) if event.kind == "health"]


def look(monitor: Monitor, clock: HandClock, *healths: Health) -> None:
    """So many looks, a second apart."""
    for health in healths:
        clock.at += 1
        monitor.look([Seen("vm", health)])  # type: ignore[list-item]


def test_a_health_that_stays_is_told_once_with_its_worst_reason(records: Records) -> None:
    clock = HandClock()
    monitor = Monitor(records, clock=clock)
    look(monitor, clock, *[Health.NORMAL] * 10, *[Health.CRITICAL] * 20, *[Health.NORMAL] * 10)
    assert told(records) == ["unknown → Normal", "Normal → Critical: it is old", "Critical → Normal"]
    event = records.events.after(0)[1]
    assert (event.severity, event.data["from"], event.data["to"]) == (Severity.ERROR, "Normal", "Critical")
    assert event.data["reasons"][0]["next_command"] == "hvfuse replicate vm"


def test_what_lasts_but_a_moment_is_not_told(records: Records) -> None:
    clock = HandClock()
    monitor = Monitor(records, clock=clock)
    look(monitor, clock, *[Health.NORMAL] * 10)
    for _ in range(10):
        look(monitor, clock, *[Health.CRITICAL] * int(HOLD_SECONDS), *[Health.NORMAL] * 8)
        clock.at += CALM_SECONDS
    assert told(records) == ["unknown → Normal"]


def test_what_lasts_but_a_moment_and_comes_back_again_and_again_is_told(records: Records) -> None:
    clock = HandClock()
    monitor = Monitor(records, clock=clock)
    look(monitor, clock, *[Health.NORMAL] * 10)
    for _ in range(COMINGS):
        assert told(records) == ["unknown → Normal"]
        look(monitor, clock, Health.CRITICAL, *[Health.NORMAL] * 60)
    assert told(records)[1:] == ["Normal → Critical: it is old, and that again and again", "Critical → Normal"]


def test_killed_while_it_tells_a_monitor_leaves_a_change_that_the_next_one_tells(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = HandClock()
    look(Monitor(records, clock=clock), clock, *[Health.NORMAL] * 10)
    with monkeypatch.context() as patch:
        patch.setattr(records_module, "add_event", full)
        with pytest.raises(NoSpaceError):
            look(Monitor(records, clock=clock), clock, *[Health.CRITICAL] * 10)
    assert told(records) == ["unknown → Normal"]
    look(Monitor(records, clock=clock), clock, *[Health.CRITICAL] * 10)
    assert told(records) == ["unknown → Normal", "Normal → Critical: it is old"]


def full(*_: object, **__: object) -> None:
    raise NoSpaceError("the disk is full")


def test_a_vm_whose_record_is_damaged_is_told_of_and_keeps_nobody_from_hearing_of_others(tmp_path: Path) -> None:
    Records(str(tmp_path / "r")).close()
    with lmdb.open(str(tmp_path / "r"), map_size=1 << 20) as env, env.begin(write=True) as txn:
        txn.put(b"vm/a", b"{")
    clock = HandClock()
    with Records(str(tmp_path / "r")) as records:
        monitor = Monitor(records, clock=clock)
        for _ in range(20):
            clock.at += 1
            monitor.look([Seen("a", Health.CRITICAL), Seen("b", Health.WARNING)])  # type: ignore[list-item]
        assert told(records) == ["unknown → Critical: it is old", "unknown → Warning: it is old"]


def test_a_change_that_came_while_nobody_watched_is_told_and_nothing_twice(records: Records) -> None:
    clock = HandClock()
    look(Monitor(records, clock=clock), clock, *[Health.NORMAL] * 10)
    look(Monitor(records, clock=clock), clock, *[Health.NORMAL] * 10)
    look(Monitor(records, clock=clock), clock, *[Health.WARNING] * 10)
    assert told(records) == ["unknown → Normal", "Normal → Warning: it is old"]


def test_events_that_are_older_than_they_are_kept_go(records: Records) -> None:
    clock = HandClock()
    clock.at = 1e9
    records.events.add(kind="state", vm="vm", text="old", now_ns=int(clock.at * 1e9) - 101 * 10**9)
    records.events.add(kind="state", vm="vm", text="young", now_ns=int(clock.at * 1e9) - 90 * 10**9)
    Monitor(records, clock=clock, keep_events=lambda: 100.0).look([])
    assert [event.text for event in records.events.after(0)] == ["young"]


def test_of_a_vm_that_is_not_replicated_nothing_is_told(records: Records) -> None:
    clock = HandClock()
    monitor = Monitor(records, clock=clock)
    for _ in range(10):
        clock.at += 1
        monitor.look([Seen("vm", Health.NORMAL, is_protected=False)])  # type: ignore[list-item]
    assert told(records) == []


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    """Makes a command that appends what it reads to "told", after `first`."""

    def make(first: str = "") -> list[str]:
        script = tmp_path / "notify.sh"
        script.write_text(f"#!/bin/sh\n{first}\ncat >>{tmp_path}/told\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return [str(script)]

    return make


def heard(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_health(records: Records, text: str) -> None:
    records.events.add(kind="health", vm="vm", text=text, data={"to": "Critical"}, now_ns=7)


def fail_a_job(records: Records) -> None:
    with pytest.raises(HvfuseError), records.jobs.run(JobKind.VERIFY, "vm", command=("verify", "vm")):
        raise HvfuseError("it went wrong", hint="mend it")


def test_changes_of_health_and_failed_jobs_are_told_as_json_and_nothing_else(
    records: Records, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    notifier = Notifier(records, command, clock=SystemClock())
    add_health(records, "before anybody listened")
    notifier.turn()
    add_health(records, "Normal → Critical")
    records.events.add(kind="state", vm="vm", text="Replicating → Error", now_ns=8)
    with records.jobs.run(JobKind.VERIFY, "vm"):
        pass
    fail_a_job(records)
    notifier.turn()
    notifier.turn()
    assert [event["text"] for event in heard(tmp_path)] == ["Normal → Critical", "job 2, Verify: Failed: it went wrong"]
    first = heard(tmp_path)[0]
    assert {
        "output_version": 1,
        "kind": "health",
        "vm": "vm",
        "severity": "info",
        "time": "1970-01-01T00:00:00.000Z",
    }.items() <= first.items()
    assert first["data"] == {"to": "Critical"}


def test_a_restart_tells_what_came_meanwhile_and_nothing_twice(
    records: Records, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    Notifier(records, command, clock=SystemClock()).turn()
    add_health(records, "one")
    Notifier(records, command, clock=SystemClock()).turn()
    add_health(records, "two")
    Notifier(records, command, clock=SystemClock()).turn()
    assert [event["text"] for event in heard(tmp_path)] == ["one", "two"]


def test_a_command_that_fails_is_tried_again_and_then_given_up_with_an_event(
    records: Records, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "PAUSES", (0.01, 0.01))
    refuses = command(f"echo x >>{tmp_path}/tries; echo no mail today >&2; exit 3")
    notifier = Notifier(records, lambda: refuses, clock=SystemClock())
    notifier.turn()
    add_health(records, "one")
    notifier.turn()
    assert (tmp_path / "tries").read_text() == "x\nx\nx\n"
    (given_up,) = [event for event in records.events.after(0) if event.kind == "notification"]
    assert "could not be told of event 1: it ended with 3: no mail today" in given_up.text
    notifier.turn()
    assert (tmp_path / "tries").read_text() == "x\nx\nx\n", "that it was given up is not told"


@pytest.mark.parametrize("missing", [["/does/not/exist"], ["/dev/null"]])
def test_a_command_that_cannot_be_run_is_an_event(
    records: Records, missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "PAUSES", ())
    notifier = Notifier(records, lambda: missing, clock=SystemClock())
    notifier.turn()
    add_health(records, "one")
    notifier.turn()
    assert [event.kind for event in records.events.after(0)] == ["health", "notification"]


def test_a_command_that_hangs_is_killed(
    records: Records, command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "PAUSES", ())
    monkeypatch.setattr(notify, "LIMIT_SECONDS", 0.2)
    hangs = command("sleep 600 & wait")
    notifier = Notifier(records, lambda: hangs, clock=SystemClock())
    notifier.turn()
    add_health(records, "one")
    notifier.turn()
    assert "longer than" in records.events.after(1)[0].text


def test_the_thread_tells_while_others_work_and_ends_when_asked(
    records: Records, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "LOOK_SECONDS", 0.01)
    notifier = Notifier(records, command, clock=SystemClock())
    with notifier:
        until(lambda: records.events.cursor(notify.CURSOR) is not None)
        add_health(records, "one")
        until(lambda: heard(tmp_path))
    add_health(records, "two")
    threading.Event().wait(0.1)
    assert [event["text"] for event in heard(tmp_path)] == ["one"]
    assert os.path.exists(tmp_path)


def test_only_what_matters_outside_is_told() -> None:
    def event(kind: str, **data: Any) -> EventRecord:
        return EventRecord(number=1, time_ns=0, kind=kind, vm="vm", severity=Severity.INFO, text="", data=data)

    assert notify.is_told(event("health"))
    assert notify.is_told(event("job", state="Failed"))
    assert not notify.is_told(event("job", state="Succeeded"))
    for kind in ("state", "failure", "process", "policy", "notification"):
        assert not notify.is_told(event(kind))
