"""What has to happen so that logs can continue the replica. Pure.

Logs continue the replica when every cycle after its position, up to the active one, is there, and
the first of them names the replica's own digest as its predecessor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from hvfuse.position import NO_DIGEST, Position
from hvfuse.shipper.cycle import continued_position
from hvfuse.shipper.source import SourceStatus
from hvfuse.spool import SealedCycle


class Action(Enum):
    """The next thing to do."""

    START_COPY = "begin a generation and copy the disks"
    RESUME_COPY = "copy the disks, going on where an earlier copy of this generation ended"
    SHIP = "bring the sealed cycles to the replica"
    NOTHING = "wait for the next cycle"


@dataclass(frozen=True, slots=True)
class Decision:
    """`reason`: why, in words for an administrator; empty for SHIP and NOTHING."""

    action: Action
    reason: str = ""


def pending(position: Position, cycles: Sequence[SealedCycle]) -> list[SealedCycle]:
    """The whole sealed cycles that follow a position without a gap, oldest first.

    Where cycles and the one that they were compacted into are both there, all of them.
    """
    whole = [c for c in cycles if c.generation == position.generation and c.is_whole]
    found: list[SealedCycle] = []
    reached = position.cycle
    for cycle in sorted(whole, key=lambda cycle: cycle.cycle):
        if cycle.first_cycle <= reached + 1 <= cycle.cycle:
            found.append(cycle)
            reached = cycle.cycle
    return found


def decide(status: SourceStatus, position: Position | None, cycles: Sequence[SealedCycle]) -> Decision:
    """Compare where the source stands with where the replica stands. `cycles` are listed after `status`."""
    if status.generation is None:
        return Decision(Action.START_COPY, "the disks were never copied")
    joins = position is not None and position.generation == status.generation
    base = position if position is not None and joins else Position(status.generation, 0, NO_DIGEST)
    found = pending(base, cycles)
    broken = status.resync_required or _gap(base, found, sealed=status.cycle - 1)
    if broken:
        return Decision(Action.START_COPY, broken)
    if not joins:
        return Decision(Action.RESUME_COPY, "the copy is not complete")
    return Decision(Action.SHIP if found else Action.NOTHING)


def _gap(base: Position, found: Sequence[SealedCycle], *, sealed: int) -> str:
    """Why logs up to cycle `sealed` do not continue `base`; empty if they do.

    The last of them may be missing: the tracker may be at sealing it. A rotation waits for that, so
    whoever rotates knows.
    """
    if base.cycle > sealed:
        return f"the replica is at cycle {base.cycle}, ahead of the disks, which are at {sealed}"
    reached = found[-1].cycle if found else base.cycle
    if reached < sealed - 1:
        return f"the logs of cycle {reached + 1} are missing"
    if found and continued_position(found[0], base) != base:
        return f"the logs of cycle {base.cycle + 1} do not continue what the replica holds"
    return ""
