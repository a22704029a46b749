"""How far a copy is, in words, from the `copy` of a VM's record (`hvfuse.control.records`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvfuse.words import bytes_text, duration_text

_DONE = {"initial": "copied", "resync": "compared", "export": "exported"}


def percent(copy: Mapping[str, Any]) -> int:
    """How much is done, 0 to 100; 100 only at the end, 0 while it is not known yet how much there is to do."""
    total = copy["bytes_total"]
    return min(100, int(100 * copy["bytes_done"] / total)) if total else 0


def copy_text(copy: Mapping[str, Any], *, is_under_way: bool = True) -> str:
    """A copy in one line: "37 %, 1.2 GiB of 3.3 GiB compared, 15 MiB sent, 210 MiB/s, 9.0 s left"; without rate and
    time left if it is not under way."""
    again = f"pass {copy['pass']}, " if copy["pass"] > 1 else ""
    if not copy["bytes_total"]:
        return f"{again}just begun"
    rate = f", {rate_text(copy)}" if is_under_way else ""
    return f"{again}{percent(copy)} %, {done_text(copy)}{rate}"


def done_text(copy: Mapping[str, Any]) -> str:
    """What is done, and was sent for it."""
    done, total, sent = (bytes_text(copy[name]) for name in ("bytes_done", "bytes_total", "bytes_sent"))
    return f"{done} of {total} {_DONE.get(copy['kind'], 'done')}, {sent} sent"


def rate_text(copy: Mapping[str, Any]) -> str:
    """How fast it goes, and how long it will take if that is known."""
    rate = f"{bytes_text(round(copy['bytes_per_second']))}/s"
    left = copy["seconds_left"]
    return rate if left is None else f"{rate}, {duration_text(left)} left"
