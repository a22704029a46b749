"""What has to happen so that logs can continue the replica. Pure.

Logs continue the replica when every cycle after its position, up to the active one, is there, and
the first of them names the replica's own digest as its predecessor's. Where they do not, a copy begins a new
generation: of the regions that the source has marked if that is enough for a replica that stands there, of
everything otherwise. Either way only differences travel to a replica that has a position.

Where a guest writes more during a copy than its logs may hold, they are lost, and the copy goes on: what got
dirty meanwhile adds to it, and is a copy of its own, a *pass*, which begins once the one before is acknowledged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from hvfuse.position import NO_DIGEST, Position
from hvfuse.shipper.cycle import continued_position
from hvfuse.shipper.source import ResyncScope, SourceStatus
from hvfuse.spool import SealedCycle


class Action(Enum):
    """The next thing to do."""

    START_COPY = "begin a generation and copy the disks"
    RESUME_COPY = "copy the disks, going on where an earlier copy of this generation ended"
    ACKNOWLEDGE_COPY = "tell the source that the replica has the copy"
    SHIP_REST = "bring what was sealed before a resynchronisation became necessary to the replica"
    SHIP = "bring the sealed cycles to the replica"
    NOTHING = "wait for the next cycle"


@dataclass(frozen=True, slots=True)
class Decision:
    """`reason`: why there has to be a copy, in words for an administrator. `scope`: what it has to look at."""

    action: Action
    reason: str = ""
    scope: ResyncScope = ResyncScope.FULL


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
    if joins and status.resyncing:
        return Decision(Action.ACKNOWLEDGE_COPY)
    found = pending(base, cycles)
    if status.resyncing:
        return _resume(status, position, base, found)
    if status.resync_required:
        return _resync(status, position, found)
    broken = _broken(status, base, found) if joins else _exchanged(status, position)
    if broken:
        return Decision(Action.START_COPY, broken)
    return Decision(Action.SHIP if found else Action.NOTHING)


_ROLLED_BACK = "the store was rolled back to an older copy, or is another one"


def _broken(status: SourceStatus, base: Position, found: Sequence[SealedCycle]) -> str:
    """Why the logs do not continue `base`, a position in the generation in progress; empty if they do."""
    broken = _gap(base, found, sealed=status.cycle - 1)
    if broken and base.cycle < status.acknowledged:
        return f"the replica is at cycle {base.cycle} and has had cycle {status.acknowledged}: {_ROLLED_BACK}"
    return broken


def _exchanged(status: SourceStatus, position: Position | None) -> str:
    """Why a replica that had a position in the generation in progress is not in it any more."""
    assert status.generation is not None
    where = f"is at {position}" if position else "has no copy of the disks"
    had = Position(status.generation, status.acknowledged, NO_DIGEST)
    return f"the replica {where} and has had {had}: {_ROLLED_BACK}"


def _resync(status: SourceStatus, position: Position | None, found: Sequence[SealedCycle]) -> Decision:
    """The source asks for a resynchronisation. `found`: the cycles that follow `position`."""
    reason = status.resync_required or ""
    if position is not None and position.cycle and found and continued_position(found[0], position) == position:
        return Decision(Action.SHIP_REST, reason)
    scope = status.scope_for(position)
    if status.resync_scope is ResyncScope.REGIONS and scope is ResyncScope.FULL:
        reason += f"; {_unmarked(position)}"
    return Decision(Action.START_COPY, reason, scope)


def _resume(status: SourceStatus, position: Position | None, base: Position, found: Sequence[SealedCycle]) -> Decision:
    """A copy is under way; of marked regions only if they still apply. That logs were lost meanwhile is no reason
    to begin anew if the source knows of it: what they held is left for the next copy, which follows this one."""
    broken = "" if status.resync_required else _broken(status, base, found)
    if status.resync_scope is ResyncScope.REGIONS and status.scope_for(position) is ResyncScope.FULL:
        broken = _unmarked(position)
    if broken:
        return Decision(Action.START_COPY, broken)
    return Decision(Action.RESUME_COPY, "the copy is not complete", status.resync_scope or ResyncScope.FULL)


def _unmarked(position: Position | None) -> str:
    where = f"the replica is at {position}" if position else "the replica has no copy of the disks"
    return f"{where}, which is not what regions were marked against: {_ROLLED_BACK}"


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
