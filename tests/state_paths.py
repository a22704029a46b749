"""How a state is reached, by the table itself."""

from __future__ import annotations

from hvfuse.states import TABLE, Event, ReplicationState


def leading_to(state: ReplicationState, start: ReplicationState = ReplicationState.DISABLED) -> tuple[Event, ...]:
    """The fewest events that lead from `start` to `state`."""
    paths: dict[ReplicationState, tuple[Event, ...]] = {start: ()}
    ends = [start]
    while state not in paths:
        assert ends, f"nothing leads from {start} to {state}"
        ends = [
            paths.setdefault(after, (*paths[before], event)) and after
            for before in ends
            for (at, event), after in TABLE.items()
            if at is before and after not in paths
        ]
    return paths[state]
