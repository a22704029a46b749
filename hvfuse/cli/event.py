"""`hvfuse event`: what happened in a home, and what happens."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Sequence

import click

from hvfuse.cli.main import Session
from hvfuse.cli.output import emit_json, json_option, one_line, time_text
from hvfuse.cli.wiring import kept_records, require_known
from hvfuse.control.events import KINDS, EventRecord, Events
from hvfuse.control.instants import PAST_FORMS, parse_past
from hvfuse.control.records import Records
from hvfuse.errors import UsageError

NEWEST = 50
POLL_SECONDS = 0.5
"""Between two looks for what is new: one read transaction, which finds by number that there is nothing."""

Wanted = Callable[[EventRecord], bool]


@click.group()
def event() -> None:
    """Show what happened: changes of state and health, jobs, failures."""


@event.command("list")
@click.argument("vm", required=False)
@click.option("--follow", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@click.option(
    "--newest", type=click.IntRange(min=0), metavar="N", help=f"At most so many.  [{NEWEST}, or all with --since]"
)
@click.option("--since", metavar="TIME", help=f"Only from then on: {PAST_FORMS}.")
@click.option("--kind", metavar="K", help=f"Only of that kind: {', '.join(KINDS)}.")
@json_option
@click.pass_obj
def list_events(
    session: Session,
    vm: str | None,
    *,
    follow: bool,
    newest: int | None,
    since: str | None,
    kind: str | None,
    as_json: bool,
) -> None:
    """List what happened, to VM or to all, the newest last.

    With --json and --follow, each event is a JSON object on a line of its own.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"there are no events of the kind {kind!r}", hint=f"one of: {', '.join(KINDS)}")
    since_ns = None if since is None else parse_past(since, now_ns=time.time_ns())

    def wanted(found: EventRecord) -> bool:
        is_of_vm = vm is None or found.vm == vm
        return is_of_vm and (kind is None or found.kind == kind) and (since_ns is None or found.time_ns >= since_ns)

    count = newest if newest is not None or since is not None else NEWEST
    home = session.home
    if follow:
        session.prepare()
        with Records(home.records) as records:
            records.jobs.bury()
            if not _last(records.events.after(0), wanted, None):
                require_known(home, records, vm)
            _follow(records.events, wanted, count, as_json=as_json)
        return
    with kept_records(home) as kept:
        found = [] if kept is None else _last(kept.events.after(0), wanted, count)
        if not found:
            require_known(home, kept, vm)
    if as_json:
        emit_json({"events": [each.as_json() for each in found]})
    else:
        _show(found, as_json=False)


def _last(events: Sequence[EventRecord], wanted: Wanted, count: int | None) -> list[EventRecord]:
    """The last `count` of those that are wanted, oldest first; None: all."""
    found = [each for each in events if wanted(each)]
    return found if count is None else found[len(found) - min(count, len(found)) :]


def _follow(events: Events, wanted: Wanted, count: int | None, *, as_json: bool) -> None:
    """Show what there is, and what comes, until Ctrl-C or until nobody reads any more."""
    there = events.after(0)
    last = there[-1].number if there else 0
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # told of without being asked for: that the reader is gone
    try:
        _show(_last(there, wanted, count), as_json=as_json)
        while not output.poll(POLL_SECONDS * 1000):
            news = events.after(last)
            _show(_last(news, wanted, None), as_json=as_json)
            last = news[-1].number if news else last
    except BrokenPipeError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has no reader


def _show(events: Sequence[EventRecord], *, as_json: bool) -> None:
    for each in events:
        if as_json:
            emit_json(each.as_json())
        else:
            click.echo(f"{time_text(each.time_ns)}  {each.severity:7}  {one_line(f'{each.vm}: {_text(each)}')}")


def _text(event: EventRecord) -> str:
    """What happened, without the VM's name before it."""
    return event.text.removeprefix(f"{event.vm}: ")
