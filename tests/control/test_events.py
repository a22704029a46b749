"""What happened, in order, whatever the clock does; and not without bound."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hvfuse.control import events as events_module
from hvfuse.control.database import Database
from hvfuse.control.events import KINDS, EventRecord, Events, Severity


@pytest.fixture
def events(tmp_path: Path) -> Events:
    return Events(Database(str(tmp_path)))


def add(events: Events, time_ns: int, **fields: Any) -> int:
    return events.add(**{"kind": "job", "vm": "vm", "text": f"at {time_ns}", "now_ns": time_ns, **fields})


def test_numbers_go_up_whatever_the_clock_does(events: Events) -> None:
    times = [10**18, 5, 10**18 + 1, 0, 2**60]
    assert [add(events, at) for at in times] == [1, 2, 3, 4, 5]
    assert [event.time_ns for event in events.after(0)] == times


def test_an_event_is_kept_with_all_its_fields(events: Events) -> None:
    add(events, 7, kind="state", severity=Severity.ERROR, text="Replicating → Error", data={"to": "Error"})
    assert events.after(0) == [
        EventRecord(
            number=1, time_ns=7, kind="state", vm="vm", severity=Severity.ERROR, text="Replicating → Error",
            data={"to": "Error"},
        )
    ]  # fmt: skip


def test_events_are_found_by_number_and_by_vm(events: Events) -> None:
    for number in range(1, 7):
        add(events, number, vm="even" if number % 2 == 0 else "odd")
    assert [event.number for event in events.after(3)] == [4, 5, 6]
    assert [event.number for event in events.after(3, vm="even")] == [4, 6]
    assert events.after(6) == []
    assert [event.number for event in events.newest(2)] == [5, 6]
    assert [event.number for event in events.newest(2, vm="odd")] == [3, 5]
    assert [event.number for event in events.newest(99)] == [1, 2, 3, 4, 5, 6]


def test_what_lies_before_an_instant_goes_up_to_the_first_that_does_not(events: Events) -> None:
    for at in (1, 2, 9, 3, 10):
        add(events, at)
    assert events.prune(before_ns=5) == 2
    assert [event.time_ns for event in events.after(0)] == [9, 3, 10]


def test_numbers_go_on_when_everything_was_pruned(events: Events) -> None:
    for at in (1, 2, 3):
        add(events, at)
    events.prune(before_ns=100)
    assert add(events, 4) == 4
    assert [event.number for event in events.after(3)] == [4]


def test_there_are_never_more_than_the_bound(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(30):
        add(events, at)
    monkeypatch.setattr(events_module, "EVENTS_KEPT", 10)
    for at in range(10):
        add(events, at)
    assert [event.number for event in events.after(0)] == list(range(31, 41))
    for at in range(25):
        add(events, at)
        assert len(events.after(0)) == 10


def test_what_a_later_version_added_is_left_out(events: Events, tmp_path: Path) -> None:
    add(events, 1)
    database = events._database
    with database.read() as txn:
        (number, value), *_ = txn.under(b"event/")
    database.write(lambda txn: txn.put(b"event/" + number.to_bytes(8), {**value, "colour": "blue"}))
    assert events.after(0)[0].text == "at 1"


def test_all_kinds_that_are_told_of_can_be_asked_for() -> None:
    package = Path(events_module.__file__).parents[1]
    told = {
        kind
        for file in package.rglob("*.py")
        for kind in re.findall(r'(?:add_event|events\.add)\([^)]*?\bkind="(\w+)"', file.read_text())
    }
    assert {"state", "failure", "job", "health"} <= told
    assert told <= set(KINDS)
