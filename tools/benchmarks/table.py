"""What is measured becomes rows, and rows a table.

A ratio says how many times better hvfuse is than its peer, whatever the unit: of rates it is ours to theirs, of times
theirs to ours. A ratio of at least its target is met.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.table import Table

COLUMNS = ("subject (peer)", "peer", "hvfuse", "unit", "ratio", "target", "", "spread: peer / hvfuse")


@dataclass(frozen=True)
class Row:
    """`peer`, `hvfuse`: medians, or of a row with a limit the limit and what was measured. `spread`: the range of what
    the medians were taken of, in words."""

    subject: str
    peer: float
    hvfuse: float
    unit: str
    ratio: float
    target: float | None
    spread: str = ""

    @property
    def is_met(self) -> bool | None:
        """None: there is no target."""
        return None if self.target is None else self.ratio >= self.target


def rates(
    subject: str, peers: Mapping[str, Sequence[float]], ours: Sequence[float], unit: str, target: float | None = None
) -> Row:
    """More is better; against the best of some peers, by their medians."""
    name = max(peers, key=lambda each: statistics.median(peers[each]))
    peer, mine = statistics.median(peers[name]), statistics.median(ours)
    return Row(f"{subject} ({name})", peer, mine, unit, mine / peer, target, _spread(peers[name], ours))


def times(
    subject: str,
    peers: Mapping[str, Sequence[float]],
    ours: Sequence[float],
    unit: str = "s",
    target: float | None = None,
) -> Row:
    """Less is better; against the best of some peers, by their medians."""
    name = min(peers, key=lambda each: statistics.median(peers[each]))
    peer, mine = statistics.median(peers[name]), statistics.median(ours)
    return Row(f"{subject} ({name})", peer, mine, unit, peer / mine, target, _spread(peers[name], ours))


def at_most(subject: str, limit: float, measured: Sequence[float], unit: str) -> Row:
    """Less is better, and no peer: a limit."""
    mine = statistics.median(measured)
    return Row(f"{subject} (limit)", limit, mine, unit, limit / mine, 1.0, _spread(measured))


def at_least(subject: str, limit: float, measured: Sequence[float], unit: str) -> Row:
    """More is better, and no peer: a limit."""
    mine = statistics.median(measured)
    return Row(f"{subject} (limit)", limit, mine, unit, mine / limit, 1.0, _spread(measured))


def in_turns(rounds: int, turns: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each of `turns` returns in each round. Every other round goes backwards, so that none is always first."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in list(turns)[:: -1 if number % 2 else 1]:
            found[name].append(turns[name]())
    return found


def as_json(rows: Sequence[Row]) -> str:
    """One object, {"rows": [...]}."""
    return json.dumps({"rows": [asdict(row) for row in rows]})


def show(title: str, rows: Sequence[Row], console: Console) -> None:
    """One table."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    table.add_column(COLUMNS[0], no_wrap=False)
    for name in COLUMNS[1:]:
        table.add_column(name, justify="left" if name in ("unit", "") or name.startswith("spread") else "right")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)


def cells(row: Row) -> tuple[str, ...]:
    """A row in words."""
    target = "" if row.target is None else f"≥ {row.target:.3g}"
    verdict = {None: "", True: "met", False: "missed"}[row.is_met]
    return row.subject, number(row.peer), number(row.hvfuse), row.unit, f"{row.ratio:.2f}", target, verdict, row.spread


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _spread(*sides: Sequence[float]) -> str:
    return " / ".join(f"{number(min(side))}–{number(max(side))}" for side in sides)
