"""Compaction: whatever happens in it, what can be shipped afterwards is right."""

from __future__ import annotations

import errno
import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvfuse import spool, system
from hvfuse.errors import CorruptError, NoSpaceError
from hvfuse.formats.companion import Kind
from hvfuse.formats.hrl_reader import open_log
from hvfuse.position import NO_DIGEST, Position, PositionMismatchError
from hvfuse.shipper import compact
from hvfuse.shipper.coalesce import DamagedLogError, plan
from hvfuse.shipper.compact import Compaction, Compactor
from hvfuse.shipper.cycle import ship
from hvfuse.shipper.decide import Action, decide, pending
from hvfuse.spool import SealedCycle
from hvfuse.system import SystemClock
from tests import independent_hrl

from .logs import Killed, MemoryReplica, Op, Tracked, random_bytes, tracked, write

KIB = 1024
MIB = 1 << 20
SIZE = 64 * KIB
FORMATS = {"disk0.raw": "raw", "disk1.raw": "raw"}


def scribble(source: Tracked, dice: random.Random, *, resize: bool = False) -> None:
    """Some writes, zeroes, trims and perhaps a resize on every disk, mostly at the same places."""
    for disk in source.disks:
        if resize and dice.randrange(2):
            disk.resize(dice.randrange(8, 80) * KIB)
        for _ in range(dice.randrange(8)):
            offset = dice.randrange(len(disk.image)) // 1000 * 1000
            length = min(dice.choice([1, 512, 4096, 20_000]), len(disk.image) - offset)
            if dice.randrange(4):
                disk.do(write(offset, random_bytes(dice.randrange(99), length)))
            else:
                disk.do(Op(dice.choice([Kind.ZERO, Kind.TRIM]), offset, length))


def outage(folder: Path, seed: int = 1, *, cycles: int = 4, disks: int = 2, resize: bool = False) -> Tracked:
    """A source with whole cycles that no replica has seen."""
    folder.mkdir(exist_ok=True)
    dice = random.Random(seed)
    source = tracked(str(folder), [SIZE] * disks)
    for disk in source.disks:
        disk.image[:] = random_bytes(seed, SIZE)
    source.barriers[source.generation, 0] = [bytes(disk.image) for disk in source.disks]
    for _ in range(cycles):
        scribble(source, dice, resize=resize)
        source.rotate()
    return source


def copied(source: Tracked) -> MemoryReplica:
    """A replica that holds what the disks held when the generation began."""
    start = source.barriers[source.generation, 0]
    images = {disk.disk_id: bytearray(image) for disk, image in zip(source.disks, start, strict=True)}
    return MemoryReplica(images=images, stands=Position(source.generation, 0, NO_DIGEST))


def copied_empty(source: Tracked) -> MemoryReplica:
    """A replica of disks that were all zeroes when the generation began."""
    source.barriers[source.generation, 0] = [bytes(len(disk.image)) for disk in source.disks]
    return copied(source)


def ship_one(replica: MemoryReplica, cycle: SealedCycle) -> None:
    ship([cycle], vm="vm1", formats=FORMATS, replica=replica, level=1, clock=SystemClock())


def ship_all(source: Tracked, replica: MemoryReplica, *, most: int = 99) -> list[int]:
    """Ship and release one cycle after the other; every point is what the disks were. Returns their numbers."""
    points: list[int] = []
    while len(points) < most and (waiting := pending(replica.stands, source.cycles())):
        ship_one(replica, waiting[0])
        points.append(waiting[0].cycle)
        assert_right(source, replica)
        source.release(source.generation, waiting[0].cycle)
    return points


def assert_right(source: Tracked, replica: MemoryReplica) -> None:
    wanted = source.barriers[source.generation, replica.stands.cycle]
    assert [bytes(replica.images[disk.disk_id]) for disk in source.disks] == wanted


def relieved(source: Tracked, *, soft_limit: float = 0, **options) -> Compaction | None:
    return Compactor(**options).relieve(source.cycles(), soft_limit=soft_limit)


@pytest.fixture(autouse=True)
def anything_is_worth_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "WORTHWHILE", 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.lists(st.sampled_from(["rotate", "resize", "compact", "ship"]), max_size=12))
def test_whatever_is_compacted_when_every_point_is_what_the_disks_were(tmp_path_factory, seed, steps):
    source = outage(tmp_path_factory.mktemp("vm"), seed, cycles=1)
    replica, dice = copied(source), random.Random(seed)
    for step in [*steps, "rotate"]:
        if step == "compact":
            relieved(source)
        elif step == "ship":
            ship_all(source, replica, most=1)
        else:
            scribble(source, dice, resize=step == "resize")
            source.rotate()
    ship_all(source, replica)
    assert replica.stands.cycle == source.cycle - 1
    assert not [name for name in os.listdir(source.folder) if ".hr" in name and "spare" not in name]


def test_the_points_between_are_given_up_and_the_chain_goes_on(tmp_path):
    source = outage(tmp_path, cycles=3)
    replica = copied(source)
    before = sum(cycle.stored_bytes for cycle in source.cycles())
    done = relieved(source)
    assert (done.first, done.last, done.bytes_before) == (1, 3, before)
    scribble(source, random.Random(2))
    source.rotate()
    assert decide(source.status(), replica.stands, source.cycles()).action is Action.SHIP
    assert ship_all(source, replica) == [3, 4]


def test_a_compacted_cycle_is_compacted_again(tmp_path):
    source = outage(tmp_path, cycles=2)
    replica = copied(source)
    for seed in range(3):
        assert relieved(source).first == 1
        scribble(source, random.Random(seed))
        source.rotate()
    relieved(source)
    (cycle,) = source.cycles()
    assert (cycle.first_cycle, cycle.cycle) == (1, 5)
    assert relieved(source) is None
    assert ship_all(source, replica) == [5]


def test_a_compacted_log_is_a_log_for_every_reader(tmp_path):
    source = outage(tmp_path, seed=7, cycles=5, resize=True)
    old = source.cycles()
    assert len({log.header.start_size for cycle in old for log in cycle.logs}) > 5
    relieved(source)
    for number, log in enumerate(source.cycles()[0].logs):
        with open_log(log.log_path) as reader:
            verified = reader.verify()
            reader.verify_companion(log.header, log.entries())
            assert not verified.unverified
        (tmp_path / "image").write_bytes(source.barriers[source.generation, 0][number])
        independent_hrl.replay(log.log_path, str(tmp_path / "image"))
        os.truncate(tmp_path / "image", log.header.end_size)
        assert (tmp_path / "image").read_bytes() == source.barriers[source.generation, 5][number]
        first, last = old[0].logs[number].header, old[-1].logs[number].header
        assert independent_hrl.ids(log.log_path) == (last.unique_id, first.previous_unique_id)
        assert log.header.digest() == last.digest()
        for field in ("previous_digest", "previous_size", "start_size", "opened_ns"):
            assert getattr(log.header, field) == getattr(first, field)
        for field in ("serial", "end_size", "sealed_ns", "generation", "disk_id"):
            assert getattr(log.header, field) == getattr(last, field)
        assert log.header.first_seq + log.header.entry_count >= last.first_seq + last.entry_count


def test_what_was_acknowledged_unheard_is_no_obstacle(tmp_path):
    for known in range(4):
        source = outage(tmp_path / str(known), cycles=4)
        replica = copied(source)
        for cycle in source.cycles()[:known]:
            ship_one(replica, cycle)
        relieved(source)
        assert decide(source.status(), replica.stands, source.cycles()).action is Action.SHIP
        assert ship_all(source, replica) == [4]


def test_a_compacted_cycle_is_refused_where_it_does_not_begin(tmp_path):
    source = outage(tmp_path, cycles=4)
    replica = copied(source)
    ship_all(source, replica, most=2)
    relieved(source)
    (cycle,) = source.cycles()
    for position in (
        Position(source.generation, 1, b"d" * 16),
        Position(b"O" * 16, 2, replica.stands.digest),
        Position(source.generation, 2, b"d" * 16),
    ):
        behind = MemoryReplica(images=copied(source).images, stands=position)
        assert decide(source.status(), position, [cycle]).action is not Action.SHIP
        with pytest.raises(PositionMismatchError):
            ship_one(behind, cycle)
    assert ship_all(source, replica) == [4]


@pytest.mark.parametrize("first", [1, 4])
def test_frames_staged_before_a_compaction_do_not_count_after_it(tmp_path, first):
    source = tracked(str(tmp_path), [2 * MIB])
    for seed in range(4):
        # Compacted, the first half takes no room any more, and the frames are cut elsewhere.
        source.disks[0].do(write(0, random_bytes(seed, MIB)))
        source.disks[0].do(write(0, bytes(MIB)))
        source.disks[0].do(write(MIB, random_bytes(seed, MIB)))
        source.rotate()
    replica = copied_empty(source)
    for cycle in source.cycles()[: first - 1]:
        ship_one(replica, cycle)
    run = source.cycles()[first - 1 :]
    replica.die_at = len(replica.puts) + 1
    with pytest.raises(Killed):
        ship(run, vm="vm1", formats=FORMATS, replica=replica, level=1, clock=SystemClock())
    replica.die_at = None
    relieved(source)
    assert replica.staged
    assert ship_all(source, replica) == [4]


def test_logs_that_piled_up_during_a_copy_travel_as_one_with_compacted_ones_among_them(tmp_path):
    source = outage(tmp_path, cycles=3)
    replica = copied(source)
    relieved(source)
    scribble(source, random.Random(5))
    source.rotate()
    ship(source.cycles(), vm="vm1", formats=FORMATS, replica=replica, level=1, clock=SystemClock())
    assert_right(source, replica)


# Interruptions -----------------------------------------------------------------------------------------


def killed_at(call: int, source: Tracked) -> bool:
    """Compact in a child that dies at its nth labelled call; whether it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(label: str, name: str, size: int) -> None:
            nonlocal count
            count += 1
            if count == call:
                os._exit(9)

        system.install(die)
        try:
            relieved(source)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def go_on_at_once(source: Tracked, replica: MemoryReplica) -> None:
    """Ship what there is."""


def compact_again(source: Tracked, replica: MemoryReplica) -> None:
    relieved(source)


def rotate_and_compact_again(source: Tracked, replica: MemoryReplica) -> None:
    scribble(source, random.Random(9))
    source.rotate()
    relieved(source)


def ship_some_and_compact_again(source: Tracked, replica: MemoryReplica) -> None:
    ship_all(source, replica, most=2)
    rotate_and_compact_again(source, replica)


@pytest.mark.parametrize("go_on", [go_on_at_once, compact_again, rotate_and_compact_again, ship_some_and_compact_again])
def test_killed_at_every_labelled_call_every_point_that_appears_is_right(tmp_path, go_on):
    call, killed = 0, True
    while killed:
        call += 1
        source = outage(tmp_path / str(call), cycles=4, resize=call % 2 == 0)
        replica = copied(source)
        killed = killed_at(call, source)
        assert decide(source.status(), replica.stands, source.cycles()).action is Action.SHIP
        go_on(source, replica)
        ship_all(source, replica)
        assert replica.stands.cycle == source.cycle - 1
        assert not [
            name for name in os.listdir(source.folder) if name.endswith((".hrc", ".hrl")) and "spare" not in name
        ]
    assert call > 20


def failing(nth: int, code: int, seen: list[str]) -> system.Injector:
    def fail(label: str, call: str, size: int) -> None:
        if label.startswith(("hrl:", "compact:")) and not label.endswith("discard"):
            seen.append(label)
            if len(seen) == nth:
                raise OSError(code, os.strerror(code))

    return fail


def test_a_full_disk_at_any_write_leaves_what_can_be_shipped_and_nothing_beside(tmp_path):
    nth, failed = 0, True
    while failed:
        nth += 1
        source = outage(tmp_path / str(nth), cycles=4)
        seen: list[str] = []
        system.install(failing(nth, errno.ENOSPC, seen))
        try:
            relieved(source)
            failed = False
        except OSError:
            failed = True
        finally:
            system.install(None)
        folder = os.listdir(source.folder)
        counting = {os.path.basename(log.log_path) for cycle in source.cycles() for log in cycle.logs}
        assert {name for name in folder if name.endswith(".c.hrl")} <= counting
        replica = copied(source)
        points = ship_all(source, replica)
        assert points == ([1, 2, 3, 4] if failed else [4])
    assert "compact:companion:rename" in seen


def test_without_room_for_the_result_nothing_is_written(tmp_path, monkeypatch):
    source = outage(tmp_path, cycles=4)
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(compact, "HEADROOM", 1 << 60)
    with pytest.raises(NoSpaceError, match="free"):
        relieved(source)
    assert sorted(os.listdir(tmp_path)) == before


def test_told_to_stop_it_leaves_everything_as_it_was(tmp_path):
    source = outage(tmp_path, cycles=4)
    before = sorted(os.listdir(tmp_path))

    def stop() -> None:
        raise Killed

    with pytest.raises(Killed):
        relieved(source, between=stop)
    assert sorted(os.listdir(tmp_path)) == before
    assert ship_all(source, copied(source)) == [1, 2, 3, 4]


def damage(path: str, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 4]))


def test_a_flipped_bit_in_a_log_is_named_and_compacts_nothing(tmp_path):
    source = tracked(str(tmp_path), [SIZE])
    for seed in range(3):
        source.disks[0].do(write(seed * 4096, random_bytes(seed, 8192)))
        source.rotate()
    log = source.cycles()[1].logs[0]
    for path, at in ((log.log_path, 8192 + 100), (log.companion_path, 300)):
        damage(path, at)
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(DamagedLogError, match=os.path.basename(path)):
            relieved(source)
        assert sorted(os.listdir(tmp_path)) == before
        damage(path, at)
    assert relieved(source) is not None


def test_a_flipped_bit_in_a_compacted_log_is_named(tmp_path):
    source = outage(tmp_path, seed=3, cycles=3)
    relieved(source)
    log = source.cycles()[0].logs[0]
    written = log.entries()[log.entries()["kind"] == Kind.WRITE]
    damage(log.log_path, int(written[0]["location"]))
    with pytest.raises(DamagedLogError, match=r"\.c\.hrl"):
        ship_one(copied(source), source.cycles()[0])


def test_logs_that_do_not_continue_each_other_are_not_made_one(tmp_path):
    source = outage(tmp_path, cycles=2)
    source.disks[0].digest = b"x" * 16
    source.rotate()
    with pytest.raises(DamagedLogError, match="does not continue"):
        relieved(source)


@pytest.mark.parametrize("give_up", [spool.clear, lambda folder: spool.release(spool.list_cycles(folder))])
def test_logs_that_are_given_up_meanwhile_do_not_come_back(tmp_path, give_up: Callable[[str], None]):
    source = outage(tmp_path, cycles=4)

    def meanwhile(label: str, call: str, size: int) -> None:
        if label == "compact:directory":
            system.install(None)
            give_up(source.folder)

    system.install(meanwhile)
    try:
        with pytest.raises(CorruptError, match="given up"):
            relieved(source)
    finally:
        system.install(None)
    assert source.cycles() == []
    assert not [name for name in os.listdir(tmp_path) if ".c." in name]


# When --------------------------------------------------------------------------------------------------


def test_it_waits_until_the_logs_hold_more_than_the_soft_limit(tmp_path):
    source = tracked(str(tmp_path), [SIZE, SIZE])
    for seed in range(4):
        assert relieved(source, soft_limit=0.25) is None
        source.disks[0].do(write(0, random_bytes(seed, 8 * KIB)))
        source.disks[0].do(Op(Kind.ZERO, 0, SIZE))  # holes take no room
        source.disks[0].do(write(0, random_bytes(seed, 1 * KIB)))
        source.rotate()
    done = relieved(source, soft_limit=0.25)
    assert (done.bytes_before, done.bytes_after) == (36 * KIB, 1 * KIB)
    assert relieved(source, soft_limit=0.25) is None


def test_points_are_not_given_up_for_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "WORTHWHILE", 0.75)
    source = tracked(str(tmp_path), [SIZE])
    for number in range(4):
        source.disks[0].do(write(number * 8 * KIB, random_bytes(number, 8 * KIB)))
        source.rotate()
    assert relieved(source) is None
    source.disks[0].do(write(0, random_bytes(1, 16 * KIB)))
    source.rotate()
    assert relieved(source).bytes_after == 32 * KIB


def test_what_was_of_no_use_is_not_looked_at_again_before_the_logs_have_grown(tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "WORTHWHILE", 0.75)
    source = tracked(str(tmp_path), [SIZE])
    looks: list[int] = []
    monkeypatch.setattr(compact, "plan", lambda logs: looks.append(len(logs)) or plan(logs))
    compactor = Compactor()
    lengths = [4096, 4096, 100, 4096, 100]
    for number, length in enumerate(lengths):
        source.disks[0].do(write(number * 4096, random_bytes(number, length)))
        source.rotate()
        assert compactor.relieve(source.cycles(), soft_limit=0.1) is None
    assert looks == [2, 4]
    ship_all(source, copied_empty(source), most=2)
    assert compactor.relieve(source.cycles(), soft_limit=0.1) is None
    assert looks == [2, 4], "below the limit"
    source.disks[0].do(write(0, random_bytes(1, 4096)))
    source.rotate()
    assert compactor.relieve(source.cycles(), soft_limit=0.1) is None
    assert looks == [2, 4, 4]


def test_a_cycle_that_is_being_sealed_and_those_before_a_gap_are_left_alone(tmp_path):
    source = outage(tmp_path, cycles=6)
    cycles = source.cycles()
    os.unlink(cycles[1].logs[0].companion_path)
    os.unlink(cycles[5].logs[1].companion_path)
    done = relieved(source)
    assert (done.first, done.last) == (3, 5)
    assert [(c.cycle, c.is_whole) for c in source.cycles()] == [(1, True), (2, False), (5, True), (6, False)]
    assert Compactor().relieve([], soft_limit=0) is None
