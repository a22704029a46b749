"""The table of states: each cell by hand, what is refused, what can be reached; and the page that is made from it."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvfuse import states
from hvfuse.errors import StateError
from hvfuse.states import OBSERVED, TABLE, Event, ReplicationState, allowed_commands, next_state

from .state_paths import leading_to

REPOSITORY = Path(__file__).resolve().parents[1]

LETTERS = {
    "D": "Disabled",
    "R": "ReadyForInitialReplication",
    "I": "InitialReplicationInProgress",
    "A": "WaitingForInitialReplication",
    "N": "Replicating",
    "P": "PreparedForFailover",
    "W": "FailedOverWaitingCompletion",
    "F": "FailedOver",
    "S": "Suspended",
    "E": "Error",
    "X": "WaitingForStartResynchronize",
    "Y": "Resynchronizing",
    "Z": "ResynchronizeSuspended",
    "B": "FailbackInProgress",
    "C": "FailbackComplete",
}
CELLS = """
                  D R I A N P W F S E X Y Z B C
enable            R . . . . . . . . . . . . . .
disable           . D D D D D D D D D D D D D D
need first copy   . R R R R . . . R R R R R . .
await first copy  A A A A A . . . A A A A A . .
need resync       . X X X X . . . X X X X X . .
start             . I I I . . . . I . Y Y Y . .
suspend           . S S S S . . . S S Z Z Z . .
resume            . . . . . . . . N E . . X . .
cancel            . R R R . . . . R . X X X . .
commit point      . N N N N P . . N N N N N . .
fail              . E E E E . . . E E E E E . .
prepare failover  . . . . P P . . . . . . . . .
fail over         . W W W W W . . W W W W W . .
change point      . . . . . . W . . . . . . B .
fail back         . B B B B B . . B B B B B . .
cancel failover   . . . . . N N . . . . . . N .
commit failover   . . . . . . F . . . . . . C .
take over         F . . . . . . . . . . . . . .
reverse           . . . . . . . X . . . . . . X
give way          . . . . . . . D . . . . . . D
"""
"""An event a row, a state a column: the state after it; a point: it is refused."""


def cells() -> dict[tuple[str, str], str]:
    head, *rows = CELLS.strip("\n").splitlines()
    columns = head.split()
    found = {}
    for row in rows:
        event, after = row[:18].strip(), row[18:].split()
        assert len(after) == len(columns), row
        found.update({(LETTERS[at], event): to for at, to in zip(columns, after, strict=True)})
    return found


EXPECTED = cells()


def test_the_table_by_hand_names_every_state_and_every_event() -> None:
    pairs = itertools.product((state.value for state in ReplicationState), (event.value for event in Event))
    assert set(EXPECTED) == set(pairs)


@pytest.mark.parametrize(("state", "event"), [pair for pair, after in EXPECTED.items() if after != "."])
def test_an_event_leads_to_the_state_of_its_cell(state: str, event: str) -> None:
    assert next_state(ReplicationState(state), Event(event)) == LETTERS[EXPECTED[state, event]]


@pytest.mark.parametrize(("state", "event"), [pair for pair, after in EXPECTED.items() if after == "."])
def test_what_has_no_cell_is_refused_and_what_is_allowed_is_named(state: str, event: str) -> None:
    with pytest.raises(StateError) as refused:
        next_state(ReplicationState(state), Event(event), what="web01")
    hidden = {other.value for other in OBSERVED}
    possible = [other.value for other in Event if EXPECTED[state, other.value] != "." and other.value not in hidden]
    assert str(refused.value) == (
        f"web01 is {state}: {event} is not possible now; allowed: {', '.join(possible) or 'nothing'}"
    )
    assert refused.value.exit_code == 13


def test_what_somebody_may_order_is_never_what_nobody_orders() -> None:
    for state in ReplicationState:
        assert not OBSERVED & set(allowed_commands(state))


@pytest.mark.parametrize("state", ReplicationState)
def test_every_state_is_reached_and_is_no_dead_end(state: ReplicationState) -> None:
    at = ReplicationState.DISABLED
    for event in leading_to(state):
        at = next_state(at, event)
    assert at is state
    onward = {event for event in Event if TABLE.get((state, event), state) is not state}
    assert onward - {Event.DISABLE}, "nothing but the end leads on"
    for event in leading_to(ReplicationState.REPLICATING, state):
        at = next_state(at, event)
    assert at is ReplicationState.REPLICATING


@pytest.mark.parametrize("state", [state for state in ReplicationState if state is not ReplicationState.DISABLED])
def test_protection_can_be_ended_in_every_state(state: ReplicationState) -> None:
    assert next_state(state, Event.DISABLE) is ReplicationState.DISABLED


def test_what_the_shipper_finds_has_a_cell_in_every_state_in_which_it_ships() -> None:
    shipping = set(ReplicationState) - states.AFTER_FAILOVER - {ReplicationState.DISABLED}
    found = OBSERVED - {Event.TAKE_OVER}
    for state, event in itertools.product(shipping, found):
        assert (state, event) in TABLE
    for state, event in itertools.product(states.AFTER_FAILOVER - {ReplicationState.PREPARED_FOR_FAILOVER}, found):
        assert (state, event) not in TABLE
    held = {event for event in found if (ReplicationState.PREPARED_FOR_FAILOVER, event) in TABLE}
    assert held == {Event.COMMIT_POINT}, "the last cycles of a planned failover go over"


def edges() -> set[tuple[str, str]]:
    return set(re.findall(r"^ +(\w+) --> (\w+): ", states.diagram(), re.MULTILINE))


def test_the_diagram_draws_true_edges_and_leads_to_every_state() -> None:
    for before, after in edges():
        assert after in {TABLE.get((ReplicationState(before), event)) for event in Event}
    assert {after for _, after in edges()} | {"Disabled"} == {state.value for state in ReplicationState}
    assert len(edges()) <= 34, "nobody can read that"


def test_what_the_diagram_leaves_out_is_told_in_words() -> None:
    told = states.rules()
    for (state, event), after in TABLE.items():
        if state is not after and (state.value, after.value) not in edges():
            assert f"- *{event}* leads to {after.value} from " in told, (state, event)


def test_the_page_is_what_the_table_says() -> None:
    script = REPOSITORY / "tools" / "documentation" / "states.py"
    done = subprocess.run([sys.executable, script, "--check"], cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0


def test_a_stale_page_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "hvfuse").symlink_to(REPOSITORY / "hvfuse")
    (tmp_path / "tools" / "documentation").mkdir(parents=True)
    script = tmp_path / "tools" / "documentation" / "states.py"
    script.write_text((REPOSITORY / "tools" / "documentation" / "states.py").read_text())
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "states.md"
    page.write_text(
        (REPOSITORY / "docs" / "states.md").read_text().replace("| 3 | Replicating |", "| 4 | Replicating |")
    )
    run = [sys.executable, str(script)]
    assert subprocess.run([*run, "--check"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}).returncode == 1
    assert subprocess.run([*run, "--write"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}).returncode == 0
    assert page.read_text() == (REPOSITORY / "docs" / "states.md").read_text()
