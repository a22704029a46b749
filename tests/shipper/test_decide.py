import os
from dataclasses import replace

import pytest

from hvfuse.position import NO_DIGEST, Position
from hvfuse.shipper.cycle import manifest
from hvfuse.shipper.decide import Action, decide, pending
from hvfuse.shipper.source import ResyncScope, SourceStatus

from .logs import tracked

GENERATION = b"G" * 16


@pytest.fixture
def source(tmp_path):
    """Five sealed cycles of two disks; cycle 6 is active."""
    source = tracked(str(tmp_path), [4096, 4096])
    for _ in range(5):
        source.rotate()
    return source


def at(source, cycle: int, generation: bytes = GENERATION) -> Position:
    if cycle == 0:
        return Position(generation, 0, NO_DIGEST)
    found = source.cycles()[cycle - 1]
    return manifest([found], vm="vm1", formats={log.disk: "raw" for log in found.logs}).position()


@pytest.mark.parametrize(
    ("position", "kept", "expected"),
    [
        (None, range(1, 6), Action.RESUME_COPY),
        (None, range(2, 6), Action.START_COPY),
        (None, (1, 2, 4, 5), Action.START_COPY),
        ("other", range(1, 6), Action.RESUME_COPY),
        ("other", range(3, 6), Action.START_COPY),
        (0, range(1, 6), Action.SHIP),
        (2, range(1, 6), Action.SHIP),
        (2, range(3, 6), Action.SHIP),
        (2, range(4, 6), Action.START_COPY),
        (2, (3, 5), Action.START_COPY),
        (4, (5,), Action.SHIP),
        (5, (), Action.NOTHING),
        (5, range(1, 6), Action.NOTHING),
        # The last sealed cycle may still be on its way into the folder.
        (4, (), Action.NOTHING),
        (3, (4,), Action.SHIP),
        (3, (), Action.START_COPY),
    ],
)
def test_what_happens_follows_from_where_both_sides_stand(source, position, kept, expected):
    cycles = [cycle for cycle in source.cycles() if cycle.cycle in kept]
    if position == "other":
        position = Position(b"O" * 16, 7, b"d" * 16)
    elif position is not None:
        position = at(source, position)
    source.resyncing = position is None or position.generation != GENERATION
    assert decide(source.status(), position, cycles).action is expected


def test_disks_that_never_began_a_generation_are_copied(source):
    status = replace(source.status(), generation=None, cycle=0)
    assert decide(status, None, []).action is Action.START_COPY


def test_a_required_resync_is_a_copy_and_says_why(source):
    status = replace(source.status(), resync_required="the log could not be written")
    decision = decide(status, at(source, 5), source.cycles())
    assert (decision.action, decision.reason) == (Action.START_COPY, "the log could not be written")


def test_a_replica_that_is_ahead_of_the_disks_needs_a_copy(source):
    decision = decide(source.status(), Position(GENERATION, 6, b"d" * 16), [])
    assert decision.action is Action.START_COPY and "ahead" in decision.reason


def test_logs_with_another_history_than_the_replicas_need_a_copy(source):
    decision = decide(source.status(), Position(GENERATION, 2, b"d" * 16), source.cycles())
    assert decision.action is Action.START_COPY and "do not continue" in decision.reason


def test_a_cycle_that_lacks_a_disk_is_not_pending(source):
    os.unlink(source.cycles()[3].logs[1].companion_path)
    assert [cycle.cycle for cycle in pending(at(source, 0), source.cycles())] == [1, 2, 3]
    assert decide(source.status(), at(source, 0), source.cycles()).action is Action.START_COPY


def lost(source, *, bases, scope=ResyncScope.REGIONS, **changes) -> SourceStatus:
    changes = {"resync_required": "the disk is full", "resync_scope": scope, "resync_bases": bases} | changes
    return replace(source.status(), **changes)


@pytest.mark.parametrize(
    ("cycle", "kept", "action", "scope"),
    [
        (5, (), Action.START_COPY, ResyncScope.REGIONS),
        (4, (), Action.START_COPY, ResyncScope.REGIONS),
        (3, (), Action.START_COPY, ResyncScope.FULL),
        (3, (4, 5), Action.SHIP_REST, ResyncScope.FULL),
        (3, (5,), Action.START_COPY, ResyncScope.FULL),
        (4, (5,), Action.SHIP_REST, ResyncScope.FULL),
        # Only a barrier after a copy's end is consistent, and nobody knows which of these were.
        (0, (1, 2, 3, 4, 5), Action.START_COPY, ResyncScope.FULL),
    ],
)
def test_a_resync_ships_what_is_whole_and_compares_regions_only_over_what_they_add_to(
    source, cycle, kept, action, scope
):
    cycles = [found for found in source.cycles() if found.cycle in kept]
    decision = decide(lost(source, bases=((GENERATION, 4),)), at(source, cycle), cycles)
    assert decision.action is action
    if action is Action.START_COPY:
        assert decision.scope is scope
        assert ("rolled back" in decision.reason) is (scope is ResyncScope.FULL)


def test_a_full_resync_is_never_narrowed(source):
    status = lost(source, bases=((GENERATION, 4),), scope=ResyncScope.FULL)
    assert decide(status, at(source, 5), []).scope is ResyncScope.FULL
    assert decide(lost(source, bases=()), at(source, 5), []).scope is ResyncScope.FULL


@pytest.mark.parametrize(
    ("position", "action", "scope"),
    [
        (Position(b"O" * 16, 7, b"d" * 16), Action.RESUME_COPY, ResyncScope.REGIONS),
        (Position(b"O" * 16, 6, b"d" * 16), Action.START_COPY, ResyncScope.FULL),
        (Position(b"X" * 16, 7, b"d" * 16), Action.START_COPY, ResyncScope.FULL),
        (None, Action.START_COPY, ResyncScope.FULL),
        (Position(GENERATION, 0, NO_DIGEST), Action.ACKNOWLEDGE_COPY, ResyncScope.FULL),
    ],
)
def test_a_resync_under_way_is_resumed_over_what_it_began_with_and_acknowledged_once_committed(
    source, position, action, scope
):
    status = lost(source, bases=((b"O" * 16, 7), (GENERATION, 0)), resync_required=None, resyncing=True)
    decision = decide(status, position, source.cycles())
    assert (decision.action, decision.scope) == (action, scope)


def test_a_copy_that_arrived_is_acknowledged_even_if_logging_ended_meanwhile(source):
    status = lost(source, bases=((GENERATION, 0),), resyncing=True)
    assert decide(status, at(source, 0), []).action is Action.ACKNOWLEDGE_COPY


@pytest.mark.parametrize("position", [None, Position(b"X" * 16, 3, b"d" * 16), Position(GENERATION, 2, b"d" * 16)])
def test_a_store_that_was_rolled_back_or_exchanged_is_named(source, position):
    status = replace(source.status(), acknowledged=4)
    decision = decide(status, position, source.cycles()[4:])
    assert (decision.action, decision.scope) == (Action.START_COPY, ResyncScope.FULL)
    assert "rolled back" in decision.reason
    assert (str(position) if position and position.generation != GENERATION else "4") in decision.reason
