"""Verification against the real tracker and the real store, with a guest that writes at every step of it."""

import contextlib
import dataclasses
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvfuse.errors import BusyError, HvfuseError, NotFoundError, ResyncRequiredError, UnreachableError, UsageError
from hvfuse.extent import Extent
from hvfuse.formats.digests import BLOCK
from hvfuse.position import Position
from hvfuse.shipper import proofs, slots, verify, written
from hvfuse.shipper.policy import CurrentPolicy, ShippingPolicy
from hvfuse.shipper.proofs import Proofs
from hvfuse.shipper.source import Touched, TrackerSource
from hvfuse.shipper.verifier import PAUSE, RESTED, Verifier
from hvfuse.target.digests import HeldBlocks
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy

from .logs import random_bytes
from .test_service import Clock
from .test_with_store import StoredHost
from .test_with_tracker import SIZES

MIB = 1 << 20
Act = Callable[[], object]


class Inline(Executor):
    """Does at once what it is given, so that a test says what comes before what."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        done: Future = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class Watched(TrackerSource):
    """The tracker, and a guest that may do something at each question."""

    def __init__(self, socket: str, folder: str, at: Callable[[str], None]) -> None:
        super().__init__(socket, folder)
        self.at = at

    def status(self):
        self.at("status")
        return super().status()

    def touched(self, asked):
        self.at("before touched")
        found = super().touched(asked)
        self.at("after touched")
        return found

    def cycles(self):
        self.at("before cycles")
        found = super().cycles()
        self.at("after cycles")
        return found


class Verified(StoredHost):
    """A VM that is replicated and can be verified. `at`: what happens at the named steps, once each."""

    def __init__(self, tmp_path) -> None:
        super().__init__(tmp_path)
        self.acts: dict[str, list[Act]] = {}
        self.path = str(tmp_path / "proofs")
        self.clock = Clock()
        self.ship = self.shipper()
        self.ship.cycle_now()
        self.source = Watched(self.socket, self.folder, self.at_step)

    def at_step(self, step: str) -> None:
        waiting = self.acts.get(step)
        if waiting:
            waiting.pop(0)()

    def verifier(self) -> Verifier:
        made = Verifier(
            vm="vm1", folder=self.folder, path=self.path, source=self.source, replica=LocalReplica(self.store, "vm1"),
            clock=self.clock, ship=self.ship.cycle_now, allow_copy=self.allow_copy,
            policy=CurrentPolicy(ShippingPolicy()),
        )  # fmt: skip
        made._workers.shutdown()
        made._workers = Inline()
        return made

    def allow_copy(self) -> None:
        order = getattr(self.ship, "order_copy", None)
        if order is not None:
            order()

    def write(self, name: str, offset: int, data: bytes) -> None:
        self.vm.disks[name].write(data, offset)

    def image_path(self, name: str) -> str:
        return self.store.image_path("vm1", name)

    def damage(self, name: str, offset: int) -> None:
        """Flip a byte in the replica's image, where no journal covers it."""
        with open(self.image_path(name), "r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))


@pytest.fixture
def host(tmp_path) -> Iterator[Verified]:
    found = Verified(tmp_path)
    yield found
    found.detach()
    found.store.close()


def verify_all(verifier: Verifier, **fields: object) -> dict:
    told = verifier.handle({"do": "begin", "share": 1.0, "seed": 1, **fields})
    while not told["report"]["done"]:
        told = verifier.handle({"do": "step", "run": told["run"]})
    return told["report"]


def told(report: dict) -> list[tuple[str, int, int]]:
    return [(each["disk"], each["offset"], each["length"]) for each in report["mismatches"]]


def test_a_vm_at_rest_is_proved_wholly(host: Verified) -> None:
    verifier = host.verifier()
    report = verify_all(verifier)
    assert (report["mismatches"], report["bytes_unproved"], report["rounds"]) == ([], 0, 0)
    assert report["bytes_compared"] == report["bytes_total"] == 3 * MIB + MIB + BLOCK
    verified = proofs.load(host.path).verified(host.clock.now_ns())
    assert verified is not None
    assert verified.proved_30d == 1
    assert verified.last_run is not None
    assert verified.last_run["seed"] == 1


def test_what_was_written_since_the_cycle_is_no_mismatch_and_is_proved_after_the_next(host: Verified) -> None:
    before = host.replica.position()
    host.write("a.raw", 70_000, random_bytes(5, 5000))
    host.vm.rotate()
    host.vm.disks["a.raw"].trim(0, 4096)
    host.write("b.raw", MIB + 511, b"x")
    report = verify_all(host.verifier())
    assert (report["mismatches"], report["bytes_unproved"], report["rounds"]) == ([], 0, 1)
    assert host.replica.position().cycle > before.cycle, "it has shipped a cycle to take up what was left out"
    verified = proofs.load(host.path).verified(host.clock.now_ns())
    assert verified is not None
    assert verified.proved_30d == 1


@pytest.mark.parametrize("name", sorted(SIZES))
def test_one_flipped_byte_is_found_by_its_offset_and_stays_on_the_list_until_it_is_equal(host: Verified, name) -> None:
    host.damage(name, SIZES[name] - 10)
    place = (SIZES[name] - 10) // BLOCK * BLOCK
    report = verify_all(host.verifier())
    assert told(report) == [(name, place, BLOCK)]
    kept = proofs.load(host.path)
    assert [mismatch.extent for mismatch in kept.mismatches] == [Extent(place, BLOCK)]
    verified = kept.verified(host.clock.now_ns())
    assert verified is not None
    assert 0 < verified.proved_30d < 1
    assert told(verify_all(host.verifier())) == [(name, place, BLOCK)]
    host.damage(name, SIZES[name] - 10)  # back as it was
    assert told(verify_all(host.verifier())) == []
    assert proofs.load(host.path).mismatches == []


def test_a_mismatch_beside_a_write_is_told_and_one_under_a_write_waits_for_the_next_cycle(host: Verified) -> None:
    host.damage("a.raw", 5 * BLOCK + 9)
    host.damage("a.raw", 9 * BLOCK + 9)
    host.write("a.raw", 5 * BLOCK + 100, b"just beside")
    report = verify_all(host.verifier())
    assert told(report) == [("a.raw", 9 * BLOCK, BLOCK), ("a.raw", 5 * BLOCK, BLOCK)]
    assert report["rounds"] == 1


def test_a_damaged_frame_of_the_journal_is_a_mismatch(host: Verified) -> None:
    host.write("a.raw", 3 * BLOCK, random_bytes(9, BLOCK))
    host.ship.cycle_now()
    from hvfuse.target import schema

    with host.store.env.read() as txn, txn.cursor(db=host.store.env.db(schema.FRAMES)) as cursor:
        frames = [(bytes(key), bytes(value)) for key, value in cursor]
    key, value = max(frames)
    broken = bytearray(value)
    broken[-1] ^= 1
    host.store.write("test", lambda txn: txn.put(key, bytes(broken), db=host.store.env.db(schema.FRAMES)))
    assert told(verify_all(host.verifier())) == [("a.raw", 3 * BLOCK, BLOCK)]


# The guest writes at every step -------------------------------------------------------------------

STEPS = ("status", "before touched", "after touched", "before cycles", "after cycles", "ours", "theirs")


@contextlib.contextmanager
def guest_at_reads(host: Verified) -> Iterator[None]:
    """Have `host.at` called before and after either side is read, too."""
    ours, theirs = slots.Group.read_into, HeldBlocks.summaries

    def read_into(self, view, offset):
        host.at_step("ours")
        found = ours(self, view, offset)
        host.at_step("ours")
        return found

    def summaries(self, disk_id, extents, key):
        host.at_step("theirs")
        found = theirs(self, disk_id, extents, key)
        host.at_step("theirs")
        return found

    slots.Group.read_into, HeldBlocks.summaries = read_into, summaries
    try:
        yield
    finally:
        slots.Group.read_into, HeldBlocks.summaries = ours, theirs


def do(host: Verified, seed: int, what: str) -> None:
    """One thing that a guest does, or the tracker by itself."""
    dice = random.Random(seed)
    name = dice.choice(sorted(SIZES))
    disk = host.vm.disks[name]
    offset = dice.randrange(max(disk.size(), 1))
    length = min(dice.choice([1, 512, 4096, BLOCK, 200_000]), disk.size() - offset)
    match what:
        case "write" if length:
            disk.write(random_bytes(seed, length), offset)
        case "trim" if length:
            disk.trim(offset, length)
        case "zero" if length:
            disk.zero(offset, length)
        case "grow":
            disk.write(b"grown", disk.size() + dice.choice([0, 1, 90_000]))
        case "resize":
            disk.truncate(dice.choice([0, BLOCK, MIB // 2 + 77, 2 * MIB, 5 * MIB]))
        case "rotate":
            host.vm.rotate()
        case "sync":
            disk.sync(datasync=True)


WHATS = ("write", "write", "write", "trim", "zero", "grow", "resize", "rotate", "sync", "nothing")
deeds = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 1 << 20), st.sampled_from(WHATS)), min_size=1, max_size=30
)


def plan_deeds(host: Verified, found: list[tuple[str, int, str]]) -> None:
    for step, seed, what in found:
        host.acts.setdefault(step, []).append(lambda seed=seed, what=what: do(host, seed, what))


@pytest.fixture(scope="module")
def quick() -> Iterator[Verified]:
    """One host for many examples, where syncing costs nothing."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="hvfuse-verify-", dir=memory) as directory:
        found = Verified(Path(directory))
        yield found
        found.detach()
        found.store.close()


@settings(max_examples=int(os.environ.get("HVFUSE_VERIFY_EXAMPLES", "12")), deadline=None, derandomize=True)
@given(deeds, st.integers(0, 1 << 22))
def test_whatever_the_guest_does_at_any_step_no_block_is_told_wrongly_and_none_is_missed(quick, found, place) -> None:
    quick.acts.clear()
    plan_deeds(quick, found)
    with guest_at_reads(quick):
        assert verify_all(quick.verifier())["mismatches"] == []
    quick.acts.clear()
    report = verify_all(quick.verifier())
    assert (report["mismatches"], report["bytes_unproved"]) == ([], 0)
    quick.ship.cycle_now()
    quick.replica.housekeep(NO_POINTS, quick.clock.now_ns())
    size = quick.vm.disks["a.raw"].size()
    if size:
        quick.damage("a.raw", place % size)
        plan_deeds(quick, found)
        with guest_at_reads(quick):
            seen = told(verify_all(quick.verifier()))
        assert set(seen) <= {("a.raw", place % size // BLOCK * BLOCK, BLOCK)}
        wrong = differing_blocks(quick, "a.raw")
        assert told(verify_all(quick.verifier())) == [("a.raw", at, BLOCK) for at in wrong]
        for at in wrong:
            quick.write("a.raw", at, random_bytes(1, BLOCK))  # as good as a repair
        assert told(verify_all(quick.verifier())) == []


NO_POINTS = RetentionPolicy(keep_all_seconds=0, hourly=0, daily=0)


def differing_blocks(host: Verified, name: str) -> list[int]:
    """Where the image and the replica at this instant, with all that was written shipped, differ."""
    host.acts.clear()
    point = host.ship.cycle_now().point
    ours, theirs = host.images()[name], host.at(point)[name]
    assert len(ours) == len(theirs)
    return [at for at in range(0, len(ours), BLOCK) if ours[at : at + BLOCK] != theirs[at : at + BLOCK]]


def touched_left_out(monkeypatch) -> None:
    def touched(self, asked):
        told = TrackerSource.touched(self, asked)
        return Touched(told.generation, told.cycle, {})

    monkeypatch.setattr(Watched, "touched", touched)


def asked_before_reading(monkeypatch) -> None:
    """Ask of every block when the sides are opened, and believe that for as long as they are."""
    check, ask = verify.Run.advance, written.Since.written

    def advance(self, sides, **options):
        known = {
            disk.disk_id: ask(sides.since, disk.disk_id, np.arange(-(-disk.size // BLOCK) + 64))
            for disk in sides.disks.values()
        }
        sides.since.written = lambda disk_id, blocks: known[disk_id][blocks]
        return check(self, sides, **options)

    monkeypatch.setattr(verify.Run, "advance", advance)


def sealed_logs_left_out(monkeypatch) -> None:
    monkeypatch.setattr(written.Since, "_by", lambda self, log: written._Covered(np.empty(0), np.array([-1])))


def sealed_logs_asked_for_first_and_gaps_believed(monkeypatch) -> None:
    def since(self, disk_id, blocks):
        if not len(blocks):
            return np.zeros(0, np.bool_)
        waiting = written.pending(self._position, self._source.cycles())
        active = self._source.touched({disk_id: [Extent(int(b) * BLOCK, BLOCK) for b in blocks]})
        found = np.isin(blocks, [extent.offset // BLOCK for extent in active.disks[disk_id]])
        for cycle in waiting:
            for log in cycle.logs:
                if log.header.disk_id == disk_id:
                    found |= self._by(log).touches(blocks)
        return found

    monkeypatch.setattr(written.Since, "written", since)


def resizes_left_out(monkeypatch) -> None:
    by = written._Covered.by

    def without(log):
        kept = dataclasses.replace(log.header, previous_size=log.header.start_size)
        return by(SimpleNamespace(header=kept, entries=log.entries))

    monkeypatch.setattr(written._Covered, "by", staticmethod(without))


def a_guest_that_writes_at_every_step(host: Verified) -> bool:
    """Whether any of some runs, during which a guest does things, tells a mismatch that is none."""
    for seed in range(60):
        dice = random.Random(seed)
        host.acts.clear()
        plan_deeds(host, [(dice.choice(STEPS), dice.getrandbits(20), dice.choice(WHATS)) for _ in range(30)])
        with guest_at_reads(host):
            if verify_all(host.verifier())["mismatches"]:
                return True
    return False


def a_rotation_between_the_questions(host: Verified) -> bool:
    host.write("a.raw", 0, random_bytes(1, BLOCK))
    host.ship.cycle_now()
    host.write("a.raw", 0, random_bytes(2, BLOCK))
    host.acts = {"after cycles": [lambda: None, lambda: None, host.vm.rotate]}
    return bool(verify_all(host.verifier())["mismatches"])


def a_disk_cut_and_grown_in_sealed_cycles(host: Verified) -> bool:
    host.vm.disks["a.raw"].truncate(3 * MIB)
    host.write("a.raw", 2 * MIB, random_bytes(1, BLOCK))
    host.ship.cycle_now()
    host.vm.disks["a.raw"].truncate(MIB)
    host.vm.disks["a.raw"].truncate(3 * MIB)
    host.vm.rotate()
    return bool(verify_all(host.verifier())["mismatches"])


BUGS = {
    touched_left_out: a_guest_that_writes_at_every_step,
    asked_before_reading: a_guest_that_writes_at_every_step,
    sealed_logs_left_out: a_guest_that_writes_at_every_step,
    sealed_logs_asked_for_first_and_gaps_believed: a_rotation_between_the_questions,
    resizes_left_out: a_disk_cut_and_grown_in_sealed_cycles,
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_each_planted_bug_cries_wolf(quick: Verified, monkeypatch, bug) -> None:
    quick.acts.clear()
    if BUGS[bug] is not a_guest_that_writes_at_every_step:  # which is what the test above does
        assert not BUGS[bug](quick)
    with monkeypatch.context() as planted:
        bug(planted)
        assert BUGS[bug](quick), "the test above would not have found it"
    quick.acts.clear()
    assert verify_all(quick.verifier())["mismatches"] == []


def test_what_is_written_to_all_the_time_is_told_as_not_proved_and_never_as_a_mismatch(host: Verified) -> None:
    host.write("a.raw", 7 * BLOCK, b"some data")
    host.ship.cycle_now()
    for _ in range(60):
        host.acts.setdefault("ours", []).append(lambda: host.write("a.raw", 7 * BLOCK, os.urandom(512)))
    with guest_at_reads(host):
        report = verify_all(host.verifier())
    assert (report["mismatches"], report["rounds"]) == ([], verify.ROUNDS)
    assert report["hot"] == [{"disk": "a.raw", "offset": 7 * BLOCK, "length": BLOCK}]
    assert report["bytes_unproved"] == BLOCK
    verified = proofs.load(host.path).verified(host.clock.now_ns())
    assert verified is not None
    assert 0 < verified.proved_30d < 1


# What it refuses ----------------------------------------------------------------------------------


def test_without_a_copy_there_is_nothing_to_verify(tmp_path) -> None:
    bare = StoredHost(tmp_path)
    host = SimpleNamespace(store=bare.store)
    verifier = Verifier(
        vm="vm1", folder=bare.folder, path=str(tmp_path / "proofs"), source=TrackerSource(bare.socket, bare.folder),
        replica=LocalReplica(host.store, "vm1"), clock=Clock(), ship=lambda: None, allow_copy=lambda: None,
        policy=CurrentPolicy(ShippingPolicy()),
    )  # fmt: skip
    with pytest.raises(ResyncRequiredError, match="was not copied yet"):
        verifier.handle({"do": "begin"})
    verifier.close()
    bare.detach()
    bare.store.close()


def test_while_a_resynchronisation_is_required_or_under_way_it_refuses_and_names_the_next_command(
    host: Verified,
) -> None:
    host.lose_logs()
    with pytest.raises(ResyncRequiredError, match="the disk is full") as caught:
        host.verifier().handle({"do": "begin"})
    assert caught.value.hint == "hvfuse resync vm1"
    host.vm.begin(b"N" * 16)
    with pytest.raises(ResyncRequiredError) as caught:
        host.verifier().handle({"do": "begin"})
    assert caught.value.hint == "hvfuse status vm1"


def test_another_replica_is_not_verified(host: Verified) -> None:
    host.ship.cycle_now()
    stands = host.replica.position()

    class Elsewhere(LocalReplica):
        def inspect(self, *, from_medium: bool):
            found = super().inspect(from_medium=from_medium)
            assert found is not None
            found.position = Position(b"F" * 16, stands.cycle, stands.digest)
            return found

    verifier = host.verifier()
    verifier._replica = Elsewhere(host.store, "vm1")
    with pytest.raises(ResyncRequiredError):
        verifier.handle({"do": "begin"})


def test_logging_that_ends_in_the_middle_ends_the_run_before_it_tells_anything_wrong(host: Verified) -> None:
    host.acts["theirs"] = [lambda: None, lambda: host.lose_logs() or host.write("b.raw", 100, b"unlogged")]
    host.write("a.raw", 100, b"logged")
    host.write("a.raw", 2 * MIB, b"logged")
    with guest_at_reads(host), pytest.raises(ResyncRequiredError):
        verify_all(host.verifier())
    assert proofs.load(host.path).mismatches == []


def test_logging_that_ends_between_the_question_and_the_verdict_is_noticed(host: Verified, monkeypatch) -> None:
    """The tracker answers, logging ends: marks alone would tell of the next write."""
    monkeypatch.setattr(Watched, "touched", lambda self, asked: Touched(host.replica.position().generation, 2, {}))
    host.acts["before cycles"] = [lambda: None] * 2 + [host.lose_logs]
    host.write("a.raw", 100, b"logged")
    with pytest.raises(ResyncRequiredError):
        verify_all(host.verifier())
    assert proofs.load(host.path).mismatches == []


# At rest ------------------------------------------------------------------------------------------


def test_disks_that_were_detached_cleanly_are_verified_with_the_logs_that_wait(host: Verified) -> None:
    host.write("a.raw", 100, b"waits in a log")
    host.damage("b.raw", 10)
    host.detach()
    report = verify_all(host.verifier())
    assert told(report) == [("b.raw", 0, BLOCK)]
    assert (report["bytes_unproved"], report["rounds"]) == (0, 1)
    host.attach()


def test_disks_at_rest_that_somebody_changed_are_not_verified(host: Verified) -> None:
    host.detach()
    with open(os.path.join(host.folder, "a.raw"), "r+b") as file:
        file.write(b"behind the mount's back")
    with pytest.raises(ResyncRequiredError, match=r"a\.raw was changed while it was not mounted"):
        host.verifier().handle({"do": "begin"})
    host.attach()


def test_disks_whose_tracker_died_are_not_verified_before_they_are_mounted(host: Verified) -> None:
    host.listener.close()
    with pytest.raises(UnreachableError, match="not detached cleanly") as caught:
        host.verifier().handle({"do": "begin"})
    assert caught.value.hint == "hvfuse mount vm1"
    host.vm.detach()
    host.attach()


def test_disks_at_rest_that_are_mounted_meanwhile_are_not_judged_by_what_they_were(host: Verified) -> None:
    host.detach()
    verifier = host.verifier()
    begun = verifier.handle({"do": "begin"})

    def mount() -> None:
        host.attach()
        host.write("a.raw", 100, b"logged by the new tracker")

    host.acts["ours"] = [mount]
    with guest_at_reads(host), pytest.raises(UnreachableError, match="mounted or changed meanwhile"):
        verifier.handle({"do": "step", "run": begun["run"]})
    assert proofs.load(host.path).mismatches == []
    assert verify_all(verifier)["mismatches"] == []


# Runs, samples, idle time ---------------------------------------------------------------------------


def test_a_sample_is_a_share_of_the_bytes_least_recently_proved_first_and_the_same_for_a_seed() -> None:
    kept = Proofs()
    kept.follow([(b"\1" * 16, "a.raw", 400 * MIB), (b"\2" * 16, "b.raw", 400 * MIB)])
    some = verify.choose(kept, share=0.1, dice=random.Random(3))
    assert len(some) == 20
    assert some == verify.choose(kept, share=0.1, dice=random.Random(3))
    assert some != verify.choose(kept, share=0.1, dice=random.Random(4))
    assert len({disk_id for disk_id, _ in some}) == 2
    seen: set[verify.Region] = set()
    for run in range(10):
        chosen = verify.choose(kept, share=0.1, dice=random.Random(run))
        assert not seen & set(chosen), "what was proved must wait for all that was not"
        seen |= set(chosen)
        for disk_id, region in chosen:
            kept.prove(disk_id, region, now_ns=(1000 + run) * 10**9)
    assert len(seen) == 200
    assert set(verify.choose(kept, share=0.1, dice=random.Random(0))) <= {
        (disk_id, int(region))
        for disk_id, disk in kept.disks.items()
        for region in np.flatnonzero(disk.dates == disk.dates[disk.dates > 0].min())
    } | {(disk_id, region) for disk_id, region in seen if kept.disks[disk_id].dates[region] == 1000}


def test_the_smallest_sample_is_one_region_and_mismatches_are_always_in_it() -> None:
    kept = Proofs()
    kept.follow([(b"\1" * 16, "a.raw", 400 * MIB)])
    assert len(verify.choose(kept, share=0.0001, dice=random.Random(1))) == 1
    kept.differ(b"\1" * 16, [Extent(41 * MIB, BLOCK), Extent(80 * MIB - BLOCK, 2 * BLOCK)], now_ns=1)
    assert set(verify.choose(kept, share=0.0001, dice=random.Random(1))) == {
        (b"\1" * 16, region) for region in (10, 19, 20)
    }


def test_a_run_goes_on_in_slices_and_ends_equal(host: Verified, monkeypatch) -> None:
    monkeypatch.setattr(verify, "SPANS_AT_ONCE", 1)
    host.vm.disks["a.raw"].truncate(40 * MIB)
    for at in range(0, 40 * MIB, 3 * MIB):
        host.write("a.raw", at, random_bytes(at, 70_000))
    host.ship.cycle_now()
    ticks = iter(range(10**6))
    monkeypatch.setattr(Clock, "monotonic", lambda self: float(next(ticks)))
    verifier = host.verifier()
    told = verifier.handle({"do": "begin", "share": 1.0, "seed": 1})
    done = []
    while not told["report"]["done"]:
        host.write("b.raw", 5, bytes([len(done)]))
        told = verifier.handle({"do": "step", "run": told["run"]})
        done.append(told["report"]["bytes_compared"])
        assert told["report"]["bytes_compared"] <= told["report"]["bytes_total"]
    assert len(done) > 5
    assert done == sorted(done)
    assert (told["report"]["mismatches"], told["report"]["bytes_unproved"]) == ([], 0)
    assert told["verified"]["proved_30d"] == 1


def test_a_disk_that_grows_or_shrinks_during_a_run_is_proved_as_far_as_it_was_looked_at(
    host: Verified, monkeypatch
) -> None:
    monkeypatch.setattr(verify, "SPANS_AT_ONCE", 1)
    host.vm.disks["a.raw"].truncate(18 * MIB)
    for at in range(0, 18 * MIB, MIB):
        host.write("a.raw", at, b"data everywhere")
    host.ship.cycle_now()
    ticks = iter(range(10**6))
    monkeypatch.setattr(Clock, "monotonic", lambda self: float(next(ticks)))
    for size, whole in ((23 * MIB, 4), (9 * MIB, 0)):
        verifier = host.verifier()
        answer = verifier.handle({"do": "begin", "share": 1.0, "seed": 1})
        answer = verifier.handle({"do": "step", "run": answer["run"]})
        host.vm.disks["a.raw"].truncate(size)
        while not answer["report"]["done"]:
            answer = verifier.handle({"do": "step", "run": answer["run"]})
        assert answer["report"]["mismatches"] == []
        (dates,) = [disk.dates for disk in proofs.load(host.path).disks.values() if disk.name == "a.raw"]
        assert len(dates) == -(-size // (4 * MIB))
        assert int((dates > 0).sum()) >= whole
        assert dates[-1] == 0
    assert verify_all(host.verifier())["mismatches"] == []


def test_one_command_at_a_time_and_a_dead_ones_run_does_not_keep_others_out(host: Verified) -> None:
    verifier = host.verifier()
    first = verifier.handle({"do": "begin"})
    with pytest.raises(BusyError):
        verifier.handle({"do": "begin"})
    host.clock.seconds += 31
    second = verifier.handle({"do": "begin"})
    with pytest.raises(NotFoundError):
        verifier.handle({"do": "step", "run": first["run"]})
    assert verifier.handle({"do": "step", "run": second["run"]})["report"]["done"]
    for nonsense in ({"do": "what"}, {"do": "begin", "share": 0}, {"do": "begin", "share": 2}, {"do": "budget"}):
        with pytest.raises(UsageError):
            verifier.handle(nonsense)


def test_idle_time_is_used_within_its_budget_and_what_it_finds_is_kept(host: Verified, monkeypatch) -> None:
    monkeypatch.setattr(verify, "SPANS_AT_ONCE", 1)
    host.vm.disks["a.raw"].truncate(32 * MIB)
    for at in range(0, 32 * MIB, MIB):
        host.write("a.raw", at, random_bytes(at, MIB))
    host.ship.cycle_now()
    host.damage("b.raw", 3)
    verifier = host.verifier()
    verifier.idle()
    assert proofs.load(host.path).disks == {}, "nothing was allowed yet"
    verifier.handle({"do": "budget", "budget": MIB})
    assert proofs.load(host.path).budget == MIB
    verifier = host.verifier()  # a restart
    proved, seconds = [], 0
    while not proofs.load(host.path).last_run:
        host.clock.seconds += 1
        seconds += 1
        verifier.idle()
        proved.append(
            sum(int((disk.dates > 0).sum()) for disk in verifier.proofs.disks.values() if disk.name == "a.raw")
        )
        assert proved[-1] * 4 <= seconds + 4, "more than the budget, and a span that was begun within it"
    assert 28 <= seconds < 50
    kept = proofs.load(host.path)
    assert [(m.disk, m.extent) for m in kept.mismatches] == [("b.raw", Extent(0, BLOCK))]
    dates = {disk.name: disk.dates.copy() for disk in kept.disks.values()}
    assert (dates["a.raw"] > 0).all()
    host.clock.seconds += PAUSE * 2
    verifier.idle()
    assert (verifier.proofs.disks[kept.mismatches[0].disk_id].dates == 0).all()
    host.clock.seconds += RESTED + PAUSE
    for _ in range(60):
        host.clock.seconds += 1
        verifier.idle()
    assert (proofs.load(host.path).disks[next(d.disk_id for d in kept.disks.values() if d.name == "a.raw")].dates
            > dates["a.raw"]).all(), "after an hour's rest it is proved again"  # fmt: skip


def test_idle_time_takes_up_what_was_written_when_a_cycle_has_come(host: Verified) -> None:
    host.write("a.raw", 5, b"written")
    verifier = host.verifier()
    verifier.handle({"do": "budget", "budget": 100 * MIB})
    for _ in range(5):
        host.clock.seconds += 1
        verifier.idle()
    assert host.replica.position().cycle == 1, "it makes no cycles of its own"
    assert verifier.proofs.last_run is None
    host.ship.cycle_now()
    host.clock.seconds += 1
    verifier.idle()
    assert verifier.proofs.last_run is not None
    assert all((disk.dates > 0).all() for disk in verifier.proofs.disks.values())


def test_idle_time_complains_once_and_pauses_where_it_cannot_verify(host: Verified, caplog) -> None:
    verifier = host.verifier()
    verifier.handle({"do": "budget", "budget": 100 * MIB})
    host.lose_logs()
    with caplog.at_level("INFO", logger="hvfuse.shipper.verifier"):
        for _ in range(300):
            host.clock.seconds += 1
            verifier.idle()
    assert len([line for line in caplog.messages if "not verified in idle time" in line]) == 1


def test_damaged_proofs_are_told_and_begun_anew(host: Verified, caplog) -> None:
    verify_all(host.verifier())
    with open(host.path, "r+b") as file:
        file.truncate(20)
    assert verify_all(host.verifier())["mismatches"] == []
    assert any("counts as not proved" in line for line in caplog.messages)
    assert proofs.load(host.path).mismatches == []


# Repair -------------------------------------------------------------------------------------------


def test_a_mismatch_is_repaired_and_then_proved(host: Verified) -> None:
    host.write("b.raw", 5000, b"an older point")
    older = host.ship.cycle_now().point
    was = host.at(older)
    host.damage("a.raw", 5 * BLOCK)
    assert host.at(older)["a.raw"] != was["a.raw"]
    verifier = host.verifier()
    assert len(verify_all(verifier)["mismatches"]) == 1
    host.write("a.raw", MIB, b"still in the active log")
    repaired = verifier.handle({"do": "repair"})["mismatches"]
    assert [(each["disk"], each["offset"], each["length"]) for each in repaired] == [("a.raw", 5 * BLOCK, BLOCK)]
    assert len(proofs.load(host.path).mismatches) == 1, "it is over only when the blocks were found equal"
    report = verify_all(verifier, only_mismatches=True)
    assert report["mismatches"] == []
    assert report["bytes_total"] == 3 * MIB, "just the region that it was in"
    assert proofs.load(host.path).mismatches == []
    newest = LocalReplica(host.store, "vm1").points()[-1].id
    assert host.at(newest) == host.images()
    assert host.at(older)["b.raw"] == was["b.raw"], "earlier points stay"
    assert verifier.handle({"do": "repair"}) == {"mismatches": []}


def test_a_repair_needs_the_tracker(host: Verified) -> None:
    host.damage("a.raw", 5 * BLOCK)
    verifier = host.verifier()
    verify_all(verifier)
    host.detach()
    with pytest.raises(HvfuseError):
        verifier.handle({"do": "repair"})
    assert len(proofs.load(host.path).mismatches) == 1
    host.attach()
