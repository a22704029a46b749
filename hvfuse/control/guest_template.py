"""Texts with placeholders, as `[vm.NAME.guest]` and a domain's XML have them. Pure.

    {disk:NAME}         absolute path of that disk, where the guest is to use it
    {network:LOGICAL}   what [network.LOGICAL] is called where the guest is booted
    {name}              the guest's name
    {state}             a private directory of the guest, for sockets
    {{  }}              a brace

Whatever else stands in braces is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hvfuse.errors import UsageError

DISK, NETWORK, NAME, STATE = "disk", "network", "name", "state"
_TAKES_A_NAME = (DISK, NETWORK)
_KNOWN = "known are {disk:NAME}, {network:NAME}, {name}, {state}, and {{ and }} for braces"
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


@dataclass(frozen=True, slots=True)
class Placeholder:
    """`kind`: one of DISK, NETWORK, NAME, STATE; `of`: which disk or network, "" for the others."""

    kind: str
    of: str = ""

    def __str__(self) -> str:
        return f"{{{self.kind}:{self.of}}}" if self.of else f"{{{self.kind}}}"


def pieces(text: str) -> Iterator[str | Placeholder]:
    """What a text consists of: literal parts, braces as themselves, and placeholders. Raises UsageError, whose text
    completes "KEY: …"."""
    for match in _PIECE.finditer(text):
        piece = match[0]
        if piece in ("{{", "}}"):
            yield piece[0]
        elif match[1] is not None:
            yield _placeholder(match[1])
        elif piece in "{}":
            raise UsageError(f"a brace {piece} without its other half in {text!r}; {_KNOWN}")
        else:
            yield piece


def _placeholder(inner: str) -> Placeholder:
    kind, colon, name = inner.partition(":")
    if kind in _TAKES_A_NAME and name:
        return Placeholder(kind, name)
    if kind in (NAME, STATE) and not colon:
        return Placeholder(kind)
    raise UsageError(f"unknown placeholder {{{inner}}}; {_KNOWN}")


def placeholders(text: str) -> list[Placeholder]:
    """Those in a text. Raises UsageError."""
    return [piece for piece in pieces(text) if isinstance(piece, Placeholder)]


def is_network(text: str) -> bool:
    """Whether a text is one {network:LOGICAL}, and nothing besides. Raises UsageError."""
    found = list(pieces(text))
    return len(found) == 1 and isinstance(found[0], Placeholder) and found[0].kind == NETWORK


def fill(text: str, value: Callable[[Placeholder], str]) -> str:
    """The text with its placeholders replaced. Raises UsageError, and what `value` raises."""
    return "".join(piece if isinstance(piece, str) else value(piece) for piece in pieces(text))
