"""Where a replication relationship stands, and what may happen to it: one table of (state, event) → state. Pure.

The table knows neither roles nor I/O: source and target each keep a state of their own and change it through it. States
bear Hyper-V Replica's names, with its numbers in the table of `docs/states.md`, which is generated from here. A test
failover is a mode beside the state, as replication goes on meanwhile.

Commands are refused where the table has no cell for what they ask. What the shipper finds to be so (`OBSERVED`) has a
cell wherever it can be found: a replica may be lost, or turn out to differ, in any state of replication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from hvfuse.errors import StateError


class ReplicationState(StrEnum):
    """Where a relationship stands, in the words that the CLI and JSON use."""

    DISABLED = "Disabled"
    READY_FOR_INITIAL_REPLICATION = "ReadyForInitialReplication"
    INITIAL_REPLICATION_IN_PROGRESS = "InitialReplicationInProgress"
    WAITING_FOR_INITIAL_REPLICATION = "WaitingForInitialReplication"
    REPLICATING = "Replicating"
    PREPARED_FOR_FAILOVER = "PreparedForFailover"
    FAILED_OVER_WAITING_COMPLETION = "FailedOverWaitingCompletion"
    FAILED_OVER = "FailedOver"
    SUSPENDED = "Suspended"
    ERROR = "Error"
    WAITING_FOR_START_RESYNCHRONIZE = "WaitingForStartResynchronize"
    RESYNCHRONIZING = "Resynchronizing"
    RESYNCHRONIZE_SUSPENDED = "ResynchronizeSuspended"
    FAILBACK_IN_PROGRESS = "FailbackInProgress"
    FAILBACK_COMPLETE = "FailbackComplete"


class Event(StrEnum):
    """What can happen to a relationship. The values are what the diagram and refusals say."""

    ENABLE = "enable"
    DISABLE = "disable"
    NEED_FIRST_COPY = "need first copy"
    """The disks have to be copied, which has not begun."""
    AWAIT_FIRST_COPY = "await first copy"
    """It is to come on a medium; at a target, it is to come at all."""
    NEED_RESYNC = "need resync"
    """Source and replica are not known to be equal, and no log says how they differ."""
    START = "start"
    """The copy that is needed, of whole disks or of differences, begins or goes on."""
    SUSPEND = "suspend"
    RESUME = "resume"
    CANCEL = "cancel"
    """The copy is given up; the next one has to be asked for."""
    COMMIT_POINT = "commit point"
    """A recovery point is complete at the target, and logs continue it."""
    FAIL = "fail"
    """Nothing goes on without an administrator."""
    PREPARE_FAILOVER = "prepare failover"
    FAIL_OVER = "fail over"
    CHANGE_POINT = "change point"
    FAIL_BACK = "fail back"
    """The same as `fail over`, of a VM that comes home: to where it was replicated from before."""
    CANCEL_FAILOVER = "cancel failover"
    COMMIT_FAILOVER = "commit failover"
    TAKE_OVER = "take over"
    """A side that was the target of a committed failover has the disks now."""
    REVERSE = "reverse"
    """It begins to ship them in the other direction."""
    GIVE_WAY = "give way"
    """The side that was failed over from becomes the target: its disks are a replica from now on."""


OBSERVED = frozenset({
    Event.NEED_FIRST_COPY, Event.AWAIT_FIRST_COPY, Event.NEED_RESYNC, Event.COMMIT_POINT, Event.FAIL,
    Event.TAKE_OVER,
})  # fmt: skip
"""Events that nobody orders."""

_S = ReplicationState
_READY, _INITIAL, _AWAITING = (
    _S.READY_FOR_INITIAL_REPLICATION, _S.INITIAL_REPLICATION_IN_PROGRESS, _S.WAITING_FOR_INITIAL_REPLICATION,
)  # fmt: skip
_NEEDED, _RESYNCING, _HELD_UP = (
    _S.WAITING_FOR_START_RESYNCHRONIZE, _S.RESYNCHRONIZING, _S.RESYNCHRONIZE_SUSPENDED,
)  # fmt: skip

BEFORE_FIRST_COPY = frozenset({_READY, _INITIAL, _AWAITING})
"""States in which no recovery point can be expected."""
OF_RESYNC = frozenset({_NEEDED, _RESYNCING, _HELD_UP})
"""States in which logs do not continue the replica."""
COPYING = frozenset({_INITIAL, _RESYNCING})
FAILOVER_OPEN = frozenset({_S.FAILED_OVER_WAITING_COMPLETION, _S.FAILBACK_IN_PROGRESS})
"""States of a failover that can still be cancelled."""
FAILOVER_DONE = frozenset({_S.FAILED_OVER, _S.FAILBACK_COMPLETE})
"""States of a failover from which nothing leads back but reverse replication."""
AFTER_FAILOVER = frozenset({_S.PREPARED_FOR_FAILOVER, *FAILOVER_OPEN, *FAILOVER_DONE})
"""States in which nothing is shipped, as a failover is under way or done."""

_SHIPPING = (_READY, _INITIAL, _AWAITING, _S.REPLICATING, _S.SUSPENDED, _S.ERROR, _NEEDED, _RESYNCING, _HELD_UP)

_CAN_FAIL_OVER = (*_SHIPPING, _S.PREPARED_FOR_FAILOVER)


def _to(state: ReplicationState, *froms: ReplicationState) -> dict[ReplicationState, ReplicationState]:
    return dict.fromkeys(froms, state)


_BY_EVENT: Mapping[Event, Mapping[ReplicationState, ReplicationState]] = {
    Event.ENABLE: _to(_READY, _S.DISABLED),
    Event.DISABLE: _to(_S.DISABLED, *(state for state in _S if state is not _S.DISABLED)),
    Event.NEED_FIRST_COPY: _to(_READY, *_SHIPPING),
    Event.AWAIT_FIRST_COPY: _to(_AWAITING, _S.DISABLED, *_SHIPPING),
    Event.NEED_RESYNC: _to(_NEEDED, *_SHIPPING),
    Event.START: _to(_INITIAL, _READY, _INITIAL, _AWAITING, _S.SUSPENDED)
    | _to(_RESYNCING, _NEEDED, _RESYNCING, _HELD_UP),
    Event.SUSPEND: (
        _to(_S.SUSPENDED, _READY, _INITIAL, _AWAITING, _S.REPLICATING, _S.SUSPENDED, _S.ERROR)
        | _to(_HELD_UP, _NEEDED, _RESYNCING, _HELD_UP)
    ),
    # What failed is tried again at once, and whether that helps is seen then.
    Event.RESUME: _to(_S.REPLICATING, _S.SUSPENDED) | _to(_NEEDED, _HELD_UP) | _to(_S.ERROR, _S.ERROR),
    Event.CANCEL: _to(_READY, _READY, _INITIAL, _AWAITING, _S.SUSPENDED) | _to(_NEEDED, _NEEDED, _RESYNCING, _HELD_UP),
    # The last cycles of a planned failover go over while the source is prepared.
    Event.COMMIT_POINT: _to(_S.REPLICATING, *_SHIPPING) | _to(_S.PREPARED_FOR_FAILOVER, _S.PREPARED_FOR_FAILOVER),
    Event.FAIL: _to(_S.ERROR, *_SHIPPING),
    Event.PREPARE_FAILOVER: _to(_S.PREPARED_FOR_FAILOVER, _S.REPLICATING, _S.PREPARED_FOR_FAILOVER),
    Event.FAIL_OVER: _to(_S.FAILED_OVER_WAITING_COMPLETION, *_CAN_FAIL_OVER),
    Event.CHANGE_POINT: {state: state for state in FAILOVER_OPEN},
    Event.FAIL_BACK: _to(_S.FAILBACK_IN_PROGRESS, *_CAN_FAIL_OVER),
    Event.CANCEL_FAILOVER: _to(_S.REPLICATING, _S.PREPARED_FOR_FAILOVER, *FAILOVER_OPEN),
    Event.COMMIT_FAILOVER: (
        _to(_S.FAILED_OVER, _S.FAILED_OVER_WAITING_COMPLETION) | _to(_S.FAILBACK_COMPLETE, _S.FAILBACK_IN_PROGRESS)
    ),
    Event.TAKE_OVER: _to(_S.FAILED_OVER, _S.DISABLED),
    Event.REVERSE: _to(_NEEDED, *FAILOVER_DONE),
    Event.GIVE_WAY: _to(_S.DISABLED, *FAILOVER_DONE),
}

TABLE: Mapping[tuple[ReplicationState, Event], ReplicationState] = {
    (state, event): row[state] for state in _S for event, row in _BY_EVENT.items() if state in row
}
"""The state after an event; a pair that it does not hold cannot happen."""


def next_state(state: ReplicationState, event: Event, *, what: str = "replication") -> ReplicationState:
    """The state after `event`. Raises StateError saying what is allowed in `state`; `what` is what is in it."""
    after = TABLE.get((state, event))
    if after is None:
        allowed = ", ".join(allowed_commands(state)) or "nothing"
        raise StateError(f"{what} is {state}: {event} is not possible now; allowed: {allowed}")
    return after


def allowed_commands(state: ReplicationState) -> tuple[Event, ...]:
    """What somebody may order in `state`, in the order of `Event`."""
    ordered = (event for event in Event if event not in OBSERVED)
    return tuple(event for event in ordered if (state, event) in TABLE)


_NUMBERS: Mapping[ReplicationState, str] = {
    _S.DISABLED: "0", _READY: "1", _INITIAL: "2", _AWAITING: "2", _S.REPLICATING: "3", _S.PREPARED_FOR_FAILOVER: "4",
    _S.FAILED_OVER_WAITING_COMPLETION: "5", _S.FAILED_OVER: "6", _S.SUSPENDED: "7", _S.ERROR: "8", _NEEDED: "9",
    _RESYNCING: "10", _HELD_UP: "11", _S.FAILBACK_IN_PROGRESS: "12", _S.FAILBACK_COMPLETE: "13",
}  # fmt: skip


_ALIKE: Mapping[Event, frozenset[ReplicationState]] = {
    Event.DISABLE: frozenset(),
    Event.NEED_FIRST_COPY: frozenset(),
    Event.AWAIT_FIRST_COPY: frozenset({_S.DISABLED, _READY}),
    Event.NEED_RESYNC: frozenset({_S.REPLICATING}),
    Event.START: frozenset({_READY, _AWAITING, _S.SUSPENDED, _NEEDED}),
    Event.SUSPEND: frozenset({_INITIAL, _S.REPLICATING, _RESYNCING}),
    Event.CANCEL: frozenset(COPYING),
    Event.COMMIT_POINT: frozenset({*COPYING, _S.ERROR}),
    Event.FAIL: frozenset({_S.REPLICATING}),
    Event.FAIL_OVER: frozenset({_S.REPLICATING, _S.PREPARED_FOR_FAILOVER}),
    Event.FAIL_BACK: frozenset({_S.PREPARED_FOR_FAILOVER}),
    Event.GIVE_WAY: frozenset({_S.FAILED_OVER}),
}
"""Events that mean the same in many states, and from which of these the diagram draws them; `rules` tells the rest."""


def diagram() -> str:
    """The main flow as a Mermaid state diagram: an edge for each pair of states, labelled with its events. Events that
    leave a state as it is are not drawn."""
    edges: dict[tuple[str, str], list[str]] = {}
    for (state, event), after in TABLE.items():
        if state is not after and state in _ALIKE.get(event, {state}):
            edges.setdefault((state.value, after.value), []).append(event.value)
    lines = [f"    {before} --> {after}: {', '.join(events)}" for (before, after), events in edges.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {_S.DISABLED.value}", *lines])


def rules() -> str:
    """What the diagram does not draw, in Markdown: a line for each event that means the same in many states."""
    lines = [
        f"- *{event}* leads to {after.value} from {_named(froms)}."
        for event in _ALIKE
        for after in dict.fromkeys(_BY_EVENT[event].values())
        if len(froms := [state for state in _S if TABLE.get((state, event)) is after and state is not after]) > 1
    ]
    named = ", ".join(state.value for state in _SHIPPING)
    return "\n".join([f"The states of replication are {named}.", "", *lines])


def _named(states: Sequence[ReplicationState]) -> str:
    shipping = [state for state in _SHIPPING if state in states]
    others = [state.value for state in states if state not in _SHIPPING]
    if len(states) == len(_S) - 1:
        return "every other state"
    if len(shipping) >= len(_SHIPPING) - 1:
        return " and ".join([*others, "every other state of replication"])
    return ", ".join(state.value for state in states)


def cells() -> str:
    """The table in Markdown: a row for each state, with its number in Hyper-V Replica, and what each event leads to."""
    rows = ["| # | state | event → state |", "|---|---|---|"]
    for state in _S:
        by_after: dict[ReplicationState, list[str]] = {}
        for event in Event:
            if (state, event) in TABLE:
                by_after.setdefault(TABLE[state, event], []).append(event.value)
        told = "; ".join(f"{', '.join(events)} → {after.value}" for after, events in by_after.items())
        rows.append(f"| {_NUMBERS[state]} | {state.value} | {told} |")
    return "\n".join(rows)
