"""Tells somebody outside: a command of the administrator's, run with an event as JSON on its standard input.

The events that are told are changes of health, and jobs that failed. Which were told already is kept, so that a restart
tells none twice and leaves none out; killed while the command runs, its event is told again. A command that fails is
tried again, and given up with an event of its own, which is not told.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from hvfuse.control.events import EventRecord, Severity
from hvfuse.control.job import JobState
from hvfuse.control.records import Records
from hvfuse.errors import HvfuseError
from hvfuse.system import Clock

_log = logging.getLogger(__name__)

CURSOR = "notified"
LIMIT_SECONDS = 30.0
"""How long the command may take; then it is killed."""
PAUSES = (1.0, 10.0)
"""Seconds before it is tried again."""
LOOK_SECONDS = 1.0
_SAID = 300
"""Characters of what a failed command said that are kept."""


def is_told(event: EventRecord) -> bool:
    """Whether somebody outside is to know of an event."""
    return event.kind == "health" or (event.kind == "job" and event.data.get("state") == JobState.FAILED.value)


class Notifier:
    """Runs `command()`, if that is any, for each event that is to be told; in a thread of its own within `with`."""

    def __init__(self, records: Records, command: Callable[[], Sequence[str]], *, clock: Clock) -> None:
        self._records = records
        self._command = command
        self._clock = clock
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, once a command under way has."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            try:
                self.turn()
            except HvfuseError as error:  # the records are full or damaged: `run` tells that of them, too
                _log.warning("nobody could be told of events: %s", error)

    def turn(self) -> None:
        """Tell what has happened since the last turn."""
        events = self._records.events
        cursor = events.cursor(CURSOR)
        if cursor is None:  # what was before anybody could be told is no news
            events.set_cursor(CURSOR, events.last())
            return
        seen = cursor
        for event in events.after(cursor):
            seen = event.number
            command = self._command() if is_told(event) else ()
            if command:
                self._tell(command, event)
                events.set_cursor(CURSOR, seen)
                if self._ended.is_set():
                    return
        if seen != cursor:
            events.set_cursor(CURSOR, seen)

    def _tell(self, command: Sequence[str], event: EventRecord) -> None:
        told = json.dumps({"output_version": 1, **event.as_json()}) + "\n"
        for pause in (*PAUSES, None):
            failed = _failure(command, told)
            if failed is None:
                return
            if pause is None or self._ended.wait(pause):
                break
        self._records.events.add(
            kind="notification",
            vm=event.vm,
            severity=Severity.WARNING,
            text=f"{command[0]} could not be told of event {event.number}: {failed}",
            data={"event": event.number, "command": list(command)},
            now_ns=self._clock.now_ns(),
        )


def _failure(command: Sequence[str], told: str) -> str | None:
    """Run the command; why it failed, None if it did not."""
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return str(error.strerror or error)
    with process:
        try:
            said, _ = process.communicate(told, timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started, which holds its output open
            return f"it took longer than {LIMIT_SECONDS:.0f} s"
    if process.returncode == 0:
        return None
    last = said.strip()[-_SAID:]
    return f"it ended with {process.returncode}" + (f": {last}" if last else "")
