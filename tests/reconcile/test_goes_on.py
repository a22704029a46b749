"""A run that is killed anywhere is gone on with; what cannot be known is compared again."""

import dataclasses
import os
import random
import time

import pytest

from hvfuse import system
from hvfuse.errors import HvfuseError
from hvfuse.formats.digests import BLOCK
from hvfuse.reconcile import plan
from hvfuse.reconcile.checkpoint import Checkpoint, start_of
from hvfuse.reconcile.ends import STATE_SUFFIX, Identity, Kind

from .both_sides import WAYS, resync, settle
from .test_equal_afterwards import unequal_blocks

FILE = Identity(kind=Kind.FILE, size=100 * plan.SPAN, device=1, inode=2, mtime_ns=10**18, settled=True, boot="b")
OTHER = dataclasses.replace(FILE, inode=3)
DEVICE = dataclasses.replace(FILE, kind=Kind.DEVICE, inode=0, mtime_ns=0, settled=False)


def start(kept: Checkpoint, source=FILE, replica=OTHER, *, unaltered=True, believed=False) -> int:
    return start_of((kept.pack(), unaltered), source=source, replica=replica, believed=believed)


def test_a_state_is_believed_where_nothing_was_written_to_since():
    kept = Checkpoint(FILE, OTHER, 7 * plan.SPAN)
    assert Checkpoint.unpack(kept.pack()) == kept
    assert start(kept) == 7 * plan.SPAN
    assert start(kept, replica=dataclasses.replace(OTHER, mtime_ns=5)) == 7 * plan.SPAN


@pytest.mark.parametrize("field", ["size", "device", "inode", "mtime_ns", "boot"])
def test_a_state_of_another_source_is_not_believed(field):
    kept = Checkpoint(FILE, OTHER, 7 * plan.SPAN)
    assert start(kept, dataclasses.replace(FILE, **{field: 2 * getattr(FILE, field)}), believed=True) == 0


@pytest.mark.parametrize("field", ["size", "device", "inode", "boot"])
def test_a_state_of_another_replica_is_not_believed(field):
    kept = Checkpoint(FILE, OTHER, 7 * plan.SPAN)
    assert start(kept, replica=dataclasses.replace(OTHER, **{field: 2 * getattr(OTHER, field)}), believed=True) == 0


def test_a_state_is_not_believed_if_somebody_wrote_to_the_replica_or_could_have_to_the_source():
    kept = Checkpoint(FILE, OTHER, 7 * plan.SPAN)
    assert start(kept, unaltered=False, believed=True) == 0
    assert start(Checkpoint(dataclasses.replace(FILE, settled=False), OTHER, 7 * plan.SPAN), believed=True) == 0


@pytest.mark.parametrize(("source", "replica"), [(DEVICE, OTHER), (FILE, DEVICE), (DEVICE, DEVICE)])
def test_a_state_of_block_devices_is_believed_only_if_the_user_says_so(source, replica):
    kept = Checkpoint(source, replica, 7 * plan.SPAN)
    assert start(kept, source, replica) == 0
    assert start(kept, source, replica, believed=True) == 7 * plan.SPAN
    assert start(kept, source, dataclasses.replace(replica, device=9), believed=True) == 0


def test_no_cut_or_flipped_state_is_believed():
    whole = Checkpoint(FILE, OTHER, 7 * plan.SPAN).pack()
    for length in range(len(whole)):
        assert Checkpoint.unpack(whole[:length]) is None
    dice = random.Random(1)
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        assert Checkpoint.unpack(bytes(damaged)) is None
    assert Checkpoint.unpack(whole + b"x") is None
    assert start(Checkpoint(FILE, OTHER, FILE.size + plan.SPAN)) == 0


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two files that differ in most blocks; spans of two blocks."""
    monkeypatch.setattr(plan, "SPAN", 2 * BLOCK)
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    one.write_bytes(random.Random(1).randbytes(60 * BLOCK + 123))
    other.write_bytes(random.Random(2).randbytes(50 * BLOCK))
    settle(one)
    return one, other


def stop_at(label: str, nth: int):
    """An injector that stops the run at the nth call."""
    calls = 0

    def inject(here, call, size):
        nonlocal calls
        calls += here == label
        if here == label and calls >= nth:
            raise HvfuseError("stopped here")

    return inject


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("label", ["resync:write", "resync:sync", "resync:state:rename", "resync:truncate"])
def test_wherever_a_run_ends_the_next_sends_only_what_still_differs(pair, way, label):
    one, other = pair
    for nth in (1, 2, 5, 15):
        system.install(stop_at(label, nth))
        try:
            resync(one, other, way, state_seconds=0)
        except HvfuseError:
            pass
        finally:
            system.install(None)
    state = other.with_name(other.name + STATE_SUFFIX)
    kept = Checkpoint.unpack(b"".join(state.read_bytes().splitlines(True)[:2])) if state.exists() else None
    held, wanted = other.read_bytes(), one.read_bytes()
    unequal = sum(
        len(wanted[at : at + BLOCK])
        for at in range(0, len(wanted), BLOCK)
        if wanted[at : at + BLOCK] != held[at : at + BLOCK].ljust(len(wanted[at : at + BLOCK]), b"\0")
    )
    done = resync(one, other, way, state_seconds=0)
    assert other.read_bytes() == wanted
    assert done.differing == unequal
    assert done.start in (0, kept.offset if kept is not None else 0)
    assert held[: done.start] == wanted[: done.start]
    assert done.compared <= len(wanted) - done.start
    assert [name for name in os.listdir(one.parent) if STATE_SUFFIX in name] == []


def stopped_with_state(one, other) -> int:
    """Run until there is a state, and no further; returns its offset."""
    state = other.with_name(other.name + STATE_SUFFIX)

    def stop(report, passed):
        limit = time.monotonic() + 20
        while passed >= 20 * BLOCK and time.monotonic() < limit:
            if state.exists():
                raise HvfuseError("stopped here")
            time.sleep(0.002)

    with pytest.raises(HvfuseError, match="stopped here"):
        resync(one, other, state_seconds=0, progress=stop)
    return offset_in(state)


def offset_in(state) -> int:
    """What a state file says, without the line of the end's own."""
    kept = Checkpoint.unpack(b"".join(state.read_bytes().splitlines(True)[:2]))
    assert kept is not None
    return kept.offset


def test_what_a_state_says_to_be_equal_is_equal_and_is_not_read_again(pair):
    one, other = pair
    offset = stopped_with_state(one, other)
    assert offset > 0
    assert other.read_bytes()[:offset] == one.read_bytes()[:offset]
    done = resync(one, other)
    assert (done.start, done.compared) == (offset, one.stat().st_size - offset)
    assert other.read_bytes() == one.read_bytes()


def test_a_source_that_changed_since_is_compared_from_its_beginning(pair):
    one, other = pair
    stopped_with_state(one, other)
    with open(one, "r+b") as file:
        file.write(b"changed")
    assert resync(one, other).start == 0
    assert other.read_bytes() == one.read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_a_replica_that_was_written_to_at_once_after_is_compared_from_its_beginning(pair, way):
    one, other = pair
    assert stopped_with_state(one, other) > 0
    with open(other, "r+b") as file:
        file.write(b"changed")
    done = resync(one, other, way)
    assert done.start == 0
    assert other.read_bytes() == one.read_bytes()


def test_a_replica_whose_last_write_may_be_anybodys_is_compared_from_its_beginning_and_nothing_is_sent_twice(pair):
    one, other = pair
    state = other.with_name(other.name + STATE_SUFFIX)
    marks = 0

    def stop(label, call, size):
        nonlocal marks
        marks += label == "resync:mark"
        if label == "resync:mark" and state.exists():  # as a kill between the write and this would
            raise HvfuseError("stopped here")

    system.install(stop)
    try:
        with pytest.raises(HvfuseError, match="stopped here"):
            resync(one, other, state_seconds=0, workers=1, progress=lambda report, passed: time.sleep(0.02))
    finally:
        system.install(None)
    assert marks > 1 and offset_in(state) > 0
    unequal = unequal_blocks(one.read_bytes(), other.read_bytes())
    done = resync(one, other)
    assert (done.start, done.differing, done.sent) == (0, unequal, unequal)
    assert 0 < unequal < one.stat().st_size
    assert other.read_bytes() == one.read_bytes()


def test_a_file_system_that_sets_no_times_has_nothing_believed(pair):
    one, other = pair

    def refuse(label, call, size):
        if label == "resync:mark":
            raise OSError(1, "Operation not permitted")

    system.install(refuse)
    try:
        stopped_with_state(one, other)
    finally:
        system.install(None)
    assert resync(one, other).start == 0
    assert other.read_bytes() == one.read_bytes()


def test_a_state_does_not_outlive_a_run_from_another_source(pair, tmp_path):
    one, other = pair
    third = tmp_path / "third.raw"
    third.write_bytes(random.Random(3).randbytes(one.stat().st_size))
    assert stopped_with_state(one, other) > 0
    mark = other.stat().st_mtime_ns
    system.install(stop_at("resync:write", 3))
    try:
        with pytest.raises(HvfuseError, match="stopped here"):
            resync(third, other, workers=1)
    finally:
        system.install(None)
    assert offset_in(other.with_name(other.name + STATE_SUFFIX)) == 0
    os.utime(other, ns=(mark, mark))  # even if nobody could tell by the time
    assert resync(one, other).start == 0
    assert other.read_bytes() == one.read_bytes()


def test_an_equal_replica_keeps_its_time_of_change_and_another_gets_the_present(pair):
    one, other = pair
    before = time.time_ns()
    assert resync(one, other).changed
    assert other.stat().st_mtime_ns > before - 10**9
    settle(other)
    kept = other.stat().st_mtime_ns
    assert not resync(one, other).changed
    assert other.stat().st_mtime_ns == kept


def test_a_dry_run_and_a_folder_that_cannot_be_written_keep_no_state(pair):
    one, other = pair
    resync(one, other, dry_run=True, state_seconds=0)
    assert not other.with_name(other.name + STATE_SUFFIX).exists()

    def fail(label, call, size):
        if label.startswith("resync:state"):
            raise OSError(30, "Read-only file system")

    system.install(fail)
    try:
        assert not resync(one, other, state_seconds=0).keeps_state
    finally:
        system.install(None)
    assert other.read_bytes() == one.read_bytes()
