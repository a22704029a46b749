"""Contiguity as a type: what two sides compare to prove that one continues the other."""

from __future__ import annotations

from dataclasses import dataclass

from hvfuse.errors import HvfuseError

NO_DIGEST = bytes(16)


@dataclass(frozen=True, slots=True)
class Position:
    """How far a replica has come.

    `generation`: 16 bytes, identity of an unbroken run of cycles. `cycle`: the last cycle that is
    wholly contained, counted from 1; 0 means the whole copy that begins a generation and no cycle
    yet. `digest`: 16 bytes over that cycle's sealed logs, each of which holds its predecessor's, so
    equal digests mean equal histories; zeroes for cycle 0.
    """

    generation: bytes
    cycle: int
    digest: bytes

    def __str__(self) -> str:
        return f"{self.generation.hex()[:8]}:{self.cycle}"


class PositionMismatchError(HvfuseError):
    """A cycle does not continue the replica's position. `theirs` is where the replica stands."""

    exit_code = 12

    def __init__(self, message: str, *, theirs: Position | None) -> None:
        super().__init__(message)
        self.theirs = theirs
