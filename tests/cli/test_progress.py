"""How far a copy is, as people see it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hvfuse.cli.progress import bar, showing_copy
from hvfuse.control.copying import copy_text, percent
from hvfuse.control.records import Records
from tests.control.children import until

COPY: Mapping[str, Any] = {
    "kind": "resync",
    "pass": 1,
    "bytes_total": 4 << 30,
    "bytes_done": 1 << 30,
    "bytes_sent": 15 << 20,
    "bytes_saved": (1 << 30) - (15 << 20),
    "seconds": 5.0,
    "bytes_per_second": 205.5 * (1 << 20),
    "seconds_left": 14.9,
}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "25 %, 1 GiB of 4 GiB compared, 15 MiB sent, 205.5 MiB/s, 15 s left"),
        ({"kind": "initial", "pass": 2}, "pass 2, 25 %, 1 GiB of 4 GiB copied, 15 MiB sent, 205.5 MiB/s, 15 s left"),
        ({"kind": "export", "seconds_left": None}, "25 %, 1 GiB of 4 GiB exported, 15 MiB sent, 205.5 MiB/s"),
        ({"kind": "of a later version"}, "25 %, 1 GiB of 4 GiB done, 15 MiB sent, 205.5 MiB/s, 15 s left"),
    ],
)
def test_a_copy_is_told_in_one_line(changes: Mapping[str, Any], text: str) -> None:
    assert copy_text({**COPY, **changes}) == text


@pytest.mark.parametrize(
    ("done", "total", "shown"), [(0, 0, 0), (0, 9, 0), (999, 1000, 99), (1000, 1000, 100), (1001, 1000, 100)]
)
def test_a_hundred_percent_is_told_only_at_the_end(done: int, total: int, shown: int) -> None:
    assert percent({**COPY, "bytes_done": done, "bytes_total": total}) == shown


def test_the_bar_has_all_figures_on_a_terminal_of_80_columns() -> None:
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True, color_system=None).print(bar("web01", {**COPY, "pass": 3}))
    first, second = (line.rstrip() for line in out.getvalue().splitlines())
    assert first.startswith("web01: comparing, pass 3 ")
    assert first.endswith(" 25 %")
    assert second == "  1 GiB of 4 GiB compared, 15 MiB sent, 1009 MiB saved, 205.5 MiB/s, 15 s left"


def test_without_a_terminal_there_is_a_line_for_each_tenth_and_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def has_told(*lines: str) -> bool:
        told.extend(capsys.readouterr().err.splitlines())
        return [line.split(", 15 MiB")[0] for line in told] == list(lines)

    with Records(str(tmp_path)) as records, showing_copy(records, "vm"):
        records.update("vm", copy=COPY)
        first = "vm: comparing, 25 %, 1 GiB of 4 GiB compared"
        until(lambda: has_told(first))
        records.update("vm", copy={**COPY, "bytes_done": 1153 << 20})
        records.update("vm", copy=None)
        records.update("vm", copy={**COPY, "bytes_done": 3 << 30})
        second = "vm: comparing, 75 %, 3 GiB of 4 GiB compared"
        until(lambda: has_told(first, second))
        records.update("vm", copy={**COPY, "bytes_done": 3 << 30, "pass": 2})
        until(lambda: has_told(first, second, "vm: comparing, pass 2, 75 %, 3 GiB of 4 GiB compared"))
