"""The progress of a VM's copy while a command waits for it: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hvfuse.cli.output import note
from hvfuse.control.records import Records

POLL_SECONDS = 0.5


@contextmanager
def showing_copy(records: Records, vm: str) -> Iterator[None]:
    """Show on stderr how far the copy of `vm` is, as its record tells, until the block ends."""
    done = threading.Event()
    watch = _bar if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=watch, args=(lambda: records.read(vm).progress, vm, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _bar(progress: Callable[[], float | None], vm: str, done: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import Progress

    while progress() is None:  # no copy is under way: show nothing
        if done.wait(POLL_SECONDS):
            return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{vm}: copying", total=1.0)
        while not done.wait(POLL_SECONDS):
            part = progress()
            bar.update(task, completed=1.0 if part is None else part)


def _lines(progress: Callable[[], float | None], vm: str, done: threading.Event) -> None:
    told = -1
    while not done.wait(POLL_SECONDS):
        part = progress()
        tenth = told if part is None else int(part * 10)
        if tenth > told:
            told = tenth
            note(f"{vm}: copying, {told * 10} %")
