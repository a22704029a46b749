"""What commands have in common towards the user: `--json`, numbers in words, plain progress.

With `--json` a command prints exactly one JSON object on stdout, with an `output_version` that grows
when a field changes its meaning or goes; new fields may come at any time. Everything else (progress,
notes) goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from hvfuse.words import time_text

__all__ = [
    "OUTPUT_VERSION", "counted", "emit_json", "is_terminal", "json_option", "note", "one_line", "print_table",
    "time_text",
]  # fmt: skip

OUTPUT_VERSION = 1

_Command = TypeVar("_Command", bound=Callable[..., Any])


def json_option(command: _Command) -> _Command:
    """Add `--json`; the command receives it as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


def emit_json(fields: Mapping[str, Any]) -> None:
    """Print the command's one JSON object, in ASCII: a file name that is not UTF-8 has no other form."""
    click.echo(json.dumps({"output_version": OUTPUT_VERSION, **fields}))


def one_line(text: str) -> str:
    """`text` with whatever would not print (a newline in a path, say) escaped as Python does."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def note(text: str) -> None:
    """Tell the user something on the way, without touching stdout."""
    click.echo(text, err=True)


def counted(count: int, name: str) -> str:
    """A number of things: "1 VM", "2 VMs"."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def is_terminal() -> bool:
    """Whether a person looks at stdout."""
    return sys.stdout.isatty()


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print rows aligned below their titles, and cut nothing: what stands there may be wanted for the next command.
    `right`: the titles of columns of numbers."""
    shown = [titles, *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in shown) for column in range(len(titles))]
    for row in shown:
        cells = (
            cell.rjust(width) if title in right else cell.ljust(width)
            for title, cell, width in zip(titles, row, widths, strict=True)
        )
        click.echo("  ".join(cells).rstrip())
