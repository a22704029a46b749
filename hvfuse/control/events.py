"""What happened, in order: changes of state and health, jobs, failures, processes, policies.

    "event/" + u64 BE    the fields of `EventRecord` but its number, which goes up by one
    "cursor/NAME"        {"number": N}: a reader has come so far

The oldest beyond EVENTS_KEPT go, and what `Events.prune` is told to.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hvfuse.control.database import Database, Transaction, numbered
from hvfuse.words import time_text

EVENTS_KEPT = 20_000
KINDS = ("state", "health", "job", "failure", "process", "policy", "notification")
_PRUNED_AT_ONCE = 8
_PREFIX = b"event/"
_CURSOR = b"cursor/"


class Severity(StrEnum):
    """How bad it is."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """One event. `number`: orders them, whatever the clock does. `time_ns`: ns since 1970. `kind`: one of KINDS.
    `data`: the same as `text` for programs, JSON values."""

    number: int
    time_ns: int
    kind: str
    vm: str
    severity: Severity
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As it is told to programs: the time is ISO 8601 in UTC."""
        return {
            "number": self.number,
            "time": time_text(self.time_ns),
            "kind": self.kind,
            "vm": self.vm,
            "severity": self.severity.value,
            "text": self.text,
            "data": dict(self.data),
        }


def add_event(
    txn: Transaction,
    *,
    kind: str,
    vm: str,
    text: str,
    now_ns: int,
    severity: Severity = Severity.INFO,
    data: Mapping[str, Any] | None = None,
) -> int:
    """Keep an event; what is too many goes, a few with each. Returns its number."""
    number = txn.last(_PREFIX) + 1
    value = {
        "time_ns": now_ns, "kind": kind, "vm": vm, "severity": severity.value, "text": text, "data": dict(data or {}),
    }  # fmt: skip
    txn.put(numbered(_PREFIX, number), value)
    for old, _ in list(itertools.islice(txn.under(_PREFIX), _PRUNED_AT_ONCE)):
        if number - old >= EVENTS_KEPT:
            txn.delete(numbered(_PREFIX, old))
    return number


class Events:
    """The events of a home."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, **fields: Any) -> int:
        """Keep an event; fields as for `add_event`. Durable. Returns its number."""
        return self._database.write(lambda txn: add_event(txn, **fields))

    def last(self) -> int:
        """The number of the newest event; 0 if there is none."""
        with self._database.read() as txn:
            return txn.last(_PREFIX)

    def cursor(self, name: str) -> int | None:
        """How far a reader of that name has come; None if it never read."""
        with self._database.read() as txn:
            found = txn.get(_CURSOR + name.encode())
        return None if found is None else int(found["number"])

    def set_cursor(self, name: str, number: int) -> None:
        """Keep how far a reader has come; durable."""
        self._database.write(lambda txn: txn.put(_CURSOR + name.encode(), {"number": number}))

    def prune(self, *, before_ns: int) -> int:
        """Let the events go that lie before that instant, ns since 1970. Returns how many did. The newest stays: it
        is what numbers go on from, and whoever follows them must not meet one twice."""

        def act(txn: Transaction) -> int:
            newest = txn.last(_PREFIX)
            old = [number for number, _ in itertools.takewhile(is_old, txn.under(_PREFIX)) if number != newest]
            for number in old:
                txn.delete(numbered(_PREFIX, number))
            return len(old)

        def is_old(found: tuple[int, Mapping[str, Any]]) -> bool:
            return bool(found[1]["time_ns"] < before_ns)

        return self._database.write(act)

    def after(self, number: int, *, vm: str | None = None) -> list[EventRecord]:
        """The events that came after the one of that number, oldest first; of one VM, or of all."""
        with self._database.read() as txn:
            found = [_record(at, value) for at, value in txn.under(_PREFIX, first=number + 1)]
        return [event for event in found if vm is None or event.vm == vm]

    def newest(self, count: int, *, vm: str | None = None) -> list[EventRecord]:
        """The last `count` events, oldest first; of one VM, or of all."""
        found: list[EventRecord] = []
        with self._database.read() as txn:
            for at, value in txn.under(_PREFIX, backwards=True):
                if vm is None or value["vm"] == vm:
                    found.append(_record(at, value))
                if len(found) >= count:
                    break
        return found[::-1]


def _record(number: int, value: Mapping[str, Any]) -> EventRecord:
    known = {one.name: value[one.name] for one in dataclasses.fields(EventRecord) if one.name in value}
    return EventRecord(**known | {"number": number, "severity": Severity(value["severity"])})
