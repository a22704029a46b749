"""Quantities in words, the same ones wherever a person reads them."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime


def bytes_text(count: int) -> str:
    """A size in words: "0 B", "512 B", "1.5 KiB", "20 GiB"."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        size /= 1024
        if size < 1023.95 or unit == "PiB":
            break
    return f"{size:.1f} {unit}".replace(".0 ", " ")


def duration_text(seconds: float) -> str:
    """A span of time in words: "0.4 s", "12 s", "3 min 5 s", "2 h 10 min", "3 d 4 h"."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // part
            return f"{whole // unit} {name}" + (f" {rest} {part_name}" if rest else "")
    return f"{whole} s"


def time_text(time_ns: int) -> str:
    """An instant (ns since 1970) as ISO 8601 in UTC, to the millisecond: what JSON and text show."""
    instant = datetime.fromtimestamp(time_ns // 10**9, UTC).replace(microsecond=time_ns % 10**9 // 1000)
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def room_hint(path: str) -> str:
    """What to do about a full disk: the command tells which one it is."""
    return f"make room: df -h {shlex.quote(path)}"
