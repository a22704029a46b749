"""The progress of a VM's copy while a command waits for it: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hvfuse.cli.output import note
from hvfuse.control.copying import copy_text, done_text, percent, rate_text
from hvfuse.control.records import Records
from hvfuse.words import bytes_text

if TYPE_CHECKING:
    from rich.console import RenderableType

POLL_SECONDS = 0.5
_DOING = {"initial": "copying", "resync": "comparing", "export": "exporting"}

Copy = Mapping[str, Any]
"""A copy's progress, as a VM's record has it."""


@contextmanager
def showing_copy(records: Records, vm: str, *, tell: Callable[[int], None] = lambda _: None) -> Iterator[None]:
    """Show on stderr how far the copy of `vm` is, as its record tells, until the block ends. `tell` is told the
    percentage, in a thread of its own."""
    done = threading.Event()
    watch = _bar if sys.stderr.isatty() else _lines

    def look() -> Copy | None:
        copy = records.read(vm).copy
        if copy is not None:
            tell(percent(copy))
        return copy

    thread = threading.Thread(target=watch, args=(look, vm, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def showing(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how far something is, as it tells (done, total) of itself: a bar on a terminal, else a line every
    tenth. `quiet`: nothing."""
    if quiet:
        yield lambda done, total: None
        return
    told = -1

    def tell(done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // total if total else 10
        if tenth != told and not sys.stderr.isatty():
            note(f"{what}: {10 * tenth} %")
        elif sys.stderr.isatty():
            sys.stderr.write(f"\r{what}: {100 * done // total if total else 100} % ")
            sys.stderr.flush()
        told = tenth

    yield tell
    if sys.stderr.isatty() and told >= 0:
        sys.stderr.write("\n")


def _bar(progress: Callable[[], Copy | None], vm: str, done: threading.Event) -> None:
    from rich.console import Console
    from rich.live import Live

    while progress() is None:  # no copy is under way: show nothing
        if done.wait(POLL_SECONDS):
            return
    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        while True:
            copy = progress()
            if copy is not None:
                live.update(bar(vm, copy), refresh=True)
            if done.wait(POLL_SECONDS):
                return


def bar(vm: str, copy: Copy) -> RenderableType:
    """Two lines: the bar, and the figures below it."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 1))
    again = f", pass {copy['pass']}" if copy["pass"] > 1 else ""
    line.add_row(
        Text(f"{vm}: {_DOING.get(copy['kind'], 'working')}{again}"),
        ProgressBar(total=100, completed=percent(copy), width=40),
        Text(f"{percent(copy)} %"),
    )
    figures = f"{done_text(copy)}, {bytes_text(copy['bytes_saved'])} saved, {rate_text(copy)}"
    return Group(line, Text(f"  {figures if copy['bytes_total'] else 'just begun'}"))


def _lines(progress: Callable[[], Copy | None], vm: str, done: threading.Event) -> None:
    told: object = None
    while not done.wait(POLL_SECONDS):
        copy = progress()
        if copy is None:
            continue
        stage = (copy["kind"], copy["pass"], percent(copy) // 10)
        if stage != told:
            told = stage
            note(f"{vm}: {_DOING.get(copy['kind'], 'working')}, {copy_text(copy)}")
