"""How a VM's status is shown to a person: is it safe, how much would be lost now, what is to be done next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hvfuse.cli.output import counted, one_line
from hvfuse.control.copying import copy_text, percent
from hvfuse.control.status import Health, VmStatus
from hvfuse.words import bytes_text, duration_text

if TYPE_CHECKING:
    from rich.table import Table

_COLOURS = {Health.NORMAL: "green", Health.WARNING: "yellow", Health.CRITICAL: "red"}
NO_HEALTH = "-"
"""Of a VM that is not replicated."""
_LABEL = 9
_ENOUGH = 30 * 86400.0
"""Seconds; what lies further ahead is not worth a forecast."""


def health_text(status: VmStatus) -> str:
    """The health in a word."""
    return str(status.health) if status.is_protected or status.reasons else NO_HEALTH


def table(found: Sequence[VmStatus]) -> Table:
    """The statuses for a terminal."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    # A narrow terminal cuts what it must, but never what tells the VMs apart and how they are.
    shown.add_column("VM", no_wrap=True, min_width=max((cell_len(one.name) for one in found), default=0))
    shown.add_column("STATE", no_wrap=True, min_width=max((len(state_text(one)) for one in found), default=0))
    for column in ("HEALTH", "LATEST POINT", "RPO", "PENDING", "POINTS"):
        shown.add_column(column, no_wrap=True, justify="right" if column in ("PENDING", "POINTS") else "left")
    for one in found:
        health = health_text(one)
        shown.add_row(
            Text(one.name),
            state_text(one),
            health if health == NO_HEALTH else f"[{_COLOURS[one.health]}]{health}[/]",
            one.latest_point or "-",
            _seconds(one.rpo_seconds),
            _bytes(one.pending_bytes),
            "unknown" if one.points is None else str(one.points),
        )
    return shown


def state_text(status: VmStatus) -> str:
    """The state, with how far a copy is."""
    progress = f" {percent(status.copy)}%" if status.copy is not None else ""
    return f"{status.state}{progress}"


def reason_lines(found: Sequence[VmStatus]) -> Iterator[str]:
    """Why VMs are not well, and what to type."""
    for one in found:
        for reason in one.reasons:
            yield one_line(f"{one.name}: {reason.health}: {reason.text}")
            if reason.next_command:
                yield f"    next: {reason.next_command}"


def summary(found: Sequence[VmStatus]) -> Iterator[str]:
    """What it comes to, for somebody who reads only one line."""
    protected = [one for one in found if one.is_protected]
    others = [one.name for one in found if not one.is_protected and one.role == "source"]
    replicas = [one for one in found if one.role == "replica"]
    if replicas:
        yield one_line(f"replicas of other homes' VMs: {_several([one.name for one in replicas])}")
    if not protected:
        if others:
            yield f"nothing is replicated; next: hvfuse replication enable {one_line(others[0])}"
        return
    yield from _summed_up(protected)
    if others:
        yield one_line(f"not replicated: {_several(others)}; next: hvfuse replication enable {others[0]}")


def _summed_up(protected: Sequence[VmStatus]) -> Iterator[str]:
    """What it comes to of those that are replicated."""
    safe = [one for one in protected if one.health is Health.NORMAL]
    worst = max(protected, key=lambda one: (one.rpo_seconds is None, one.rpo_seconds or 0.0))
    loss = at_risk(worst)
    if len(protected) == 1:
        verdict = "is safe" if safe else "needs attention"
        yield one_line(f"{worst.name} {verdict}; what losing its disks now would cost: {loss}")
        return
    verdict = f"{len(safe)} of {counted(len(protected), 'VM')} {'is' if len(safe) == 1 else 'are'} safe"
    unsafe = [one.name for one in protected if one not in safe]
    attention = f"; see to {_several(unsafe)}" if unsafe else ""
    yield one_line(f"{verdict}{attention}; the most that would be lost now: of {worst.name}, {loss}")


def _several(names: Sequence[str]) -> str:
    """The first few of them."""
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def at_risk(status: VmStatus) -> str:
    """What would be lost if the source were gone this moment."""
    if status.latest_point is None:
        return "everything: there is no recovery point yet"
    if status.points == 0:
        return "everything: the store has no recovery point"
    if status.rpo_seconds is None:
        return "nobody can tell how much: the age of what the store has is not known"
    last = f"the last {duration_text(status.rpo_seconds)}"
    if status.pending_bytes is None:
        return f"{last}, how much was written is not known"
    if status.doubtful_bytes:
        logged = bytes_text(status.pending_bytes - status.doubtful_bytes)
        return f"{last}, {logged}, and what differs in {bytes_text(status.doubtful_bytes)} that are to be compared"
    return f"{last}, {bytes_text(status.pending_bytes)}"


def detail(status: VmStatus) -> Iterator[str]:
    """Everything that a person wants to know of one VM."""
    yield one_line(f"{status.name}: {state_text(status)}, health {health_text(status)}")
    yield ""
    yield _line("safe", _verdict(status))
    if status.is_protected:
        yield _line("at risk", at_risk(status))
    steps = [reason.next_command for reason in status.reasons if reason.next_command]
    if not status.is_protected and status.role == "source":
        steps = [f"hvfuse replication enable {one_line(status.name)}"]
    nothing = "nothing to do" if status.health is Health.NORMAL else "nothing to type: it is under way, or see below"
    yield _line("next", steps[0] if steps else nothing)
    for more in dict.fromkeys(steps[1:]):
        if more != steps[0]:
            yield _line("", more)
    for reason in status.reasons:
        yield ""
        yield from _reason(reason.health, reason.text, reason.next_command)
    yield ""
    yield from _figures(status)


def _verdict(status: VmStatus) -> str:
    if status.role == "replica":
        return "its source says: here lies its replica"
    if not status.is_protected:
        return "no: it is not replicated"
    gravest = next((reason for reason in status.reasons if reason.health is status.health), None)
    point = f"recovery point {status.latest_point} is in the store"
    if status.health is Health.NORMAL:
        return f"yes: {point}"
    assert gravest is not None
    is_there = status.latest_point is not None and bool(status.points) and gravest.id != "store-rolled-back"
    known = f"; {point}" if is_there else ""
    return one_line(f"{'no' if status.health is Health.CRITICAL else 'yes, but'}: {gravest.text}{known}")


def _reason(health: Health, text: str, next_command: str | None) -> Iterator[str]:
    yield one_line(f"  {health}: {text}")
    if next_command:
        yield f"    next: {next_command}"


def _figures(status: VmStatus) -> Iterator[str]:
    points = "unknown" if status.points is None else f"{status.points} in the store"
    due = f"a new one is due every {duration_text(status.frequency)}" if status.is_protected else "no new ones are made"
    if status.role == "replica":  # how old it may be, only its source can tell
        age = _seconds(status.rpo_seconds)
        due = f"the newest is {status.latest_point}, its age {age}" if status.latest_point else "the first is awaited"
    yield _line("points", f"{points}; {due}")
    sums = status.past.sums
    if sums.successful or sums.missed:
        yield _line(
            "cycles",
            f"in the last {duration_text(status.past.interval)}: {sums.successful} made, {sums.missed} missed "
            f"({sums.missed_part:.0%}); mean latency {duration_text(sums.mean_latency)}, "
            f"mean size {bytes_text(round(sums.mean_size))}",
        )
    if status.is_protected:
        yield _line("logs", _logs(status))
    if status.copy is not None:
        yield _line("copy", copy_text(status.copy))
    if status.tests:
        yield _line("tests", f"{counted(status.tests, 'test failover')} not cleaned up: hvfuse failover list")
    if status.verified is not None:
        yield _line("proved", one_line(status.verified.text))
    for number, disk in enumerate(status.disks):
        yield _line("" if number else "disks", one_line(f"{disk.name}  {disk.format}  {bytes_text(disk.size)}"))
    for number, name in enumerate(status.excluded, len(status.disks)):
        yield _line("" if number else "disks", one_line(f"{name}  not replicated: hvfuse.toml excludes it"))
    for number, command in enumerate(status.allowed):
        yield _line("" if number else "allowed", command)


def _logs(status: VmStatus) -> str:
    forecast = status.forecast
    held = f"{bytes_text(forecast.used)} held"
    if forecast.hard_limit is None:
        return held
    limit = f"{held}, of {bytes_text(forecast.hard_limit)} before they are given up"
    seconds = forecast.seconds_to_hard_limit
    if seconds is None or forecast.rate is None:
        return limit
    if seconds >= _ENOUGH:
        return limit
    # What was written in the last cycles: not what is written at this moment.
    return f"{limit}: in {duration_text(seconds)} without sending, at {bytes_text(round(forecast.rate))}/s as of late"


def _line(label: str, text: str) -> str:
    return f"  {label:<{_LABEL}}{text}"


def plain_line(status: VmStatus) -> str:
    """One line for a log: "sample: Replicating, point 1f3b9c2e-000001, 0 B pending"."""
    point = f"point {status.latest_point}" if status.latest_point else "no point yet"
    worst = next((reason.text for reason in status.reasons if reason.health is status.health), None)
    trouble = f"; {status.health}: {worst}" if worst is not None else ""
    return f"{status.name}: {state_text(status)}, {point}, {_bytes(status.pending_bytes)} pending{trouble}"


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else bytes_text(count)


def _seconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration_text(seconds)
