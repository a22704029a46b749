"""Quantities in words, the same ones wherever a person reads them."""

from __future__ import annotations


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
