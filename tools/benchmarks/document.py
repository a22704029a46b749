"""docs/benchmarks.md: where it was measured, how, the tables, and why what is missed is missed.

The reasons stand in missed.toml: a table for each subject, in it glob patterns (or beginnings) of rows' subjects.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from hvfuse import __version__

from . import contenders
from .scene import GIB, REPOSITORY, run
from .table import COLUMNS, Row, cells

PAGE = REPOSITORY / "docs" / "benchmarks.md"
REASONS = Path(__file__).with_name("missed.toml")
UNEXPLAINED = "not explained"
INTRODUCTION = """\
# Benchmarks

`tools/bench --write` wrote this page; `tools/bench SUBJECT` measures one subject anew, on any machine. hvfuse and what
a user would run instead (in parentheses) run side by side in one run, in turns. Figures are medians; the spread is the
range of what they were taken of. A ratio says how many times better hvfuse is, whatever the unit: of rates it is ours
to theirs, of times theirs to ours. A target is met if the ratio reaches it. Where there is no peer but a limit, the
ratio is of the limit."""


@dataclass(frozen=True)
class Section:
    """What one subject found. `how`: what exactly was measured, as its module says."""

    subject: str
    title: str
    how: str
    seconds: float
    rows: Sequence[Row]


def write(sections: Sequence[Section], *, folder: str | None) -> None:
    """Write the page. `folder`: where the benchmarks' files were. Says on stderr which reasons explain nothing."""
    reasons = tomllib.loads(REASONS.read_text(encoding="utf-8"))
    today = datetime.datetime.now(datetime.UTC).date()
    page = render(sections, reasons, machine(folder or tempfile.gettempdir()), today)
    PAGE.write_text(page, encoding="utf-8")
    for subject, pattern in idle(sections, reasons):
        print(f"{REASONS.name}: [{subject}] {pattern!r} is of no row that is missed", file=sys.stderr)


def render(
    sections: Sequence[Section],
    reasons: Mapping[str, Mapping[str, str]],
    where: Mapping[str, str],
    day: datetime.date,
) -> str:
    """The page. `reasons`: by subject, then by pattern; `where`: what to know of the machine."""
    parts = [INTRODUCTION, f"## Where and when\n\nOn {day}, on one machine:\n\n{_table(('', ''), where.items())}"]
    parts += ["## Who takes part in write, fsync and read", (contenders.__doc__ or "").strip()]
    for section in sections:
        parts += [
            f"## {section.subject}: {section.title}",
            f"```sh\ntools/bench {section.subject}    # took {section.seconds:.0f} s\n```",
            section.how.strip(),
            _table(COLUMNS, map(cells, section.rows)),
            *_missed(section, reasons.get(section.subject, {})),
        ]
    return "\n\n".join(parts) + "\n"


def _missed(section: Section, reasons: Mapping[str, str]) -> Iterator[str]:
    for row in section.rows:
        if row.is_met is False:
            why = next((why for pattern, why in reasons.items() if matches(pattern, row)), UNEXPLAINED)
            yield f"**Missed: {_plain(row.subject)}.** {why.strip()}"


def idle(sections: Sequence[Section], reasons: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Subject and pattern of the reasons for what is not missed, or not there."""
    missed = {each.subject: [row for row in each.rows if row.is_met is False] for each in sections}
    for subject, patterns in reasons.items():
        for pattern in patterns:
            if not any(matches(pattern, row) for row in missed.get(subject, ())):
                yield subject, pattern


def matches(pattern: str, row: Row) -> bool:
    """Whether a reason's pattern is of that row."""
    return row.subject.startswith(pattern) or fnmatchcase(row.subject, pattern)


def _table(header: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """As Markdown, within a table too."""
    return text.replace("|", "\\|")


def machine(folder: str) -> dict[str, str]:
    """What the figures depend on."""
    lines: Mapping[str, Callable[[], str]] = {
        "processor": lambda: f"{_field('/proc/cpuinfo', 'model name')}, {len(os.sched_getaffinity(0))} cores",
        "memory": lambda: f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) * 1024 / GIB:.0f} GiB",
        "system": lambda: f"{platform.freedesktop_os_release()['PRETTY_NAME']}, Linux {platform.release()}",
        "file system": lambda: run("findmnt", "-n", "-o", "FSTYPE", "--target", folder).split()[0],
        "hvfuse": lambda: f"{__version__}, Python {platform.python_version()}",
        "libfuse": lambda: run("fusermount3", "--version").split()[-1],
        "qemu": lambda: run("qemu-img", "--version").split()[2],
        "fio": lambda: run("fio", "--version").strip().removeprefix("fio-"),
        "rsync": lambda: run("rsync", "--version").split()[2],
    }
    return {name: value() for name, value in lines.items()}


def _field(path: str, name: str) -> str:
    """The first of that name in a file of `name : value`."""
    with open(path, encoding="ascii", errors="replace") as file:
        found = (line.partition(":")[2].strip() for line in file if line.partition(":")[0].strip() == name)
        return next(found, "unknown")
