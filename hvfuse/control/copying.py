"""How far a copy is, in words, from the `copy` of a VM's record (`hvfuse.control.records`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvfuse.words import bytes_text, duration_text

_DONE = {"initial": "copied", "resync": "compared", "export": "exported"}


def percent(copy: Mapping[str, Any]) -> int:
    """How much is done, 0 to 100; 100 only at the end."""
    total = copy["bytes_total"]
    return min(100, int(100 * copy["bytes_done"] / total)) if total else 100


def copy_text(copy: Mapping[str, Any]) -> str:
    """A copy in one line: "37 %, 1.2 GiB of 3.3 GiB compared, 15 MiB sent, 210 MiB/s, 9.0 s left"."""
    again = f"pass {copy['pass']}, " if copy["pass"] > 1 else ""
    return f"{again}{percent(copy)} %, {figures_text(copy)}"


def figures_text(copy: Mapping[str, Any], *, saved: bool = False) -> str:
    """The figures alone, maybe with what did not have to be sent."""
    done, total, sent = (bytes_text(copy[name]) for name in ("bytes_done", "bytes_total", "bytes_sent"))
    parts = [f"{done} of {total} {_DONE.get(copy['kind'], 'done')}", f"{sent} sent"]
    if saved:
        parts.append(f"{bytes_text(copy['bytes_saved'])} saved")
    parts.append(f"{bytes_text(round(copy['bytes_per_second']))}/s")
    if copy["seconds_left"] is not None:
        parts.append(f"{duration_text(copy['seconds_left'])} left")
    return ", ".join(parts)
