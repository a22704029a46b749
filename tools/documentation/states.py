"""Keep what docs/states.md tells of hvfuse/states.py as the table has it.

A section of the page stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is one of SECTIONS.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hvfuse import states

PAGE = Path(__file__).resolve().parents[2] / "docs" / "states.md"
SECTIONS: Mapping[str, Callable[[], str]] = {
    "diagram": lambda: f"```mermaid\n{states.diagram()}\n```",
    "rules": states.rules,
    "cells": states.cells,
}


def renewed(page: str) -> str:
    """The page with its sections as they have to be. Raises ValueError if it lacks one."""
    for name, text in SECTIONS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        section = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(section.findall(page)) != 1:
            raise ValueError(f"there has to be one section {begin} … {end}")
        whole = f"{begin}\n{text()}\n{end}"
        page = section.sub(lambda _, whole=whole: whole, page)
    return page


def main(arguments: Sequence[str]) -> int:
    """`--write` renews the page; `--check` ends with 1 if it is stale."""
    if list(arguments) not in (["--write"], ["--check"]):
        print("usage: tools/states --write|--check", file=sys.stderr)
        return 2
    page = PAGE.read_text(encoding="utf-8")
    after = renewed(page)
    if arguments[0] == "--write":
        PAGE.write_text(after, encoding="utf-8")
    elif after != page:
        print(f"{PAGE} is stale: run tools/states --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
