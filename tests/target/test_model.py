"""Whatever happens to a store, every recovery point equals the disks as they were at that instant."""

from __future__ import annotations

import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from hvfuse.manifest import CycleKind
from hvfuse.target import index, schema
from hvfuse.target.check import check
from hvfuse.target.journal import PointReader
from hvfuse.target.local import WAITING_PERIOD, LocalReplica
from hvfuse.target.merge import merge
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store
from tests.target.clock import Hand
from tests.target.model import Source, check_points, send

SIZE = 40_000
REGION = 4096  # so that extents cross regions, and long zeroes are wide ones
DISKS = st.sampled_from(["a.raw", "b.raw"])
OFFSETS = st.integers(0, SIZE)
LENGTHS = st.integers(1, 9000) | st.integers(1, SIZE)
NEVER = RetentionPolicy(keep_all_seconds=0, hourly=0)


class StoreAgainstBytearrays(RuleBasedStateMachine):
    """Two disks, any order of writes, cycles, copies, house-keeping, pins and restarts."""

    pins = Bundle("pins")

    @initialize(seed=st.integers(0, 1000), copy=st.booleans())
    def start(self, seed, copy):
        self.folder = tempfile.mkdtemp(prefix="hvfuse-store-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.regions = index.REGION
        self.source = Source("vm", {"a.raw": SIZE, "b.raw": 100}, seed=seed)
        self.pinned: dict[int, str] = {}
        self.clock = Hand()
        self.store = Store(self.folder, map_size=1 << 20, clock=self.clock)
        self.replica = LocalReplica(self.store, "vm")
        self.source.write("a.raw", 5000, self.source.random.randbytes(20_000))
        self.source.copy_to(self.replica)

    @rule(disk=DISKS, offset=OFFSETS, length=LENGTHS, seed=st.integers(0, 255))
    def write(self, disk, offset, length, seed):
        offset = min(offset, len(self.source.disks[disk]))
        length = min(length, len(self.source.disks[disk]) - offset)
        if length:
            self.source.write(disk, offset, self.source.random.randbytes(length))

    @rule(disk=DISKS, offset=OFFSETS, length=LENGTHS)
    def zero(self, disk, offset, length):
        offset = min(offset, len(self.source.disks[disk]))
        length = min(length, len(self.source.disks[disk]) - offset)
        if length:
            self.source.zero(disk, offset, length)

    @rule(disk=DISKS, size=st.integers(0, SIZE))
    def resize(self, disk, size):
        self.source.resize(disk, size)

    @rule()
    def cycle(self):
        self.source.ship_to(self.replica)

    @rule(late=st.lists(st.booleans(), max_size=3))
    def an_interrupted_cycle_is_taken_up_again(self, late):
        """A frame that comes a while after the last transaction is durable at once, with those that waited for it."""
        manifest, frames = self.source.begin_cycle()
        self.replica.begin(manifest)
        durable = 0
        for number, (frame, is_late) in enumerate(zip(frames, late, strict=False), 1):
            if is_late:
                self.clock.sleep(WAITING_PERIOD)
                durable = number
            self.replica.put(frame)
        self.reopen()
        assert self.replica.begin(manifest) == frozenset(range(durable))
        self.source.end_cycle(manifest, send(self.replica, manifest, frames))

    @rule(sent=st.integers(0, 3))
    def a_cycle_is_begun_and_given_up_for_a_copy(self, sent):
        manifest, frames = self.source.begin_cycle()
        self.replica.begin(manifest)
        for frame in frames[:sent]:
            self.replica.put(frame)
        self.source.copy_to(self.replica)

    @rule()
    def copy(self):
        self.source.copy_to(self.replica)

    @rule(sent=st.integers(0, 3), given_up=st.booleans())
    def a_copy_of_differences(self, sent, given_up):
        source = self.source
        before = source.generation, source.cycle, source.changes
        previous, changes = source.position, source.coalesced()
        source.begin_copy()
        manifest, frames = source.manifest(CycleKind.COPY, previous=previous), source.frames(changes)
        self.replica.begin(manifest)
        for frame in frames[:sent]:
            self.replica.put(frame)
        if given_up:
            self.replica.abandon()
            source.generation, source.cycle, source.changes = before
        else:
            send(self.replica, manifest, frames)
            source.end_copy(manifest)

    @rule(hourly=st.integers(0, 2), keep_all=st.sampled_from([0, 60, 120]))
    def housekeep(self, hourly, keep_all):
        before = {point.id for point in self.store.points("vm")}
        policy = RetentionPolicy(keep_all_seconds=keep_all, hourly=hourly)
        self.replica.housekeep(policy, self.source.now_ns)
        left = {point.id for point in self.store.points("vm")}
        assert set(self.pinned.values()) <= left <= before
        assert bool(left) == bool(before)

    @rule(upto=st.integers(0, 20))
    def merge(self, upto):
        merge(self.store, "vm", upto)

    @precondition(lambda self: self.store.points("vm"))
    @rule(target=pins, which=st.integers(0, 100))
    def pin(self, which):
        points = self.store.points("vm")
        point = points[which % len(points)].id
        pin = self.store.pin("vm", point, {"kind": "test-failover"})
        self.pinned[pin] = point
        return pin

    @rule(pin=consumes(pins))
    def unpin(self, pin):
        self.store.unpin(pin)
        del self.pinned[pin]

    @rule()
    def reopen(self):
        self.replica.close()
        self.store.close()
        self.store = Store(self.folder, create=False, clock=self.clock)
        self.replica = LocalReplica(self.store, "vm")

    @precondition(lambda self: self.store.points("vm"))
    @rule(which=st.integers(0, 100), offset=OFFSETS, length=LENGTHS)
    def a_reader_reads_on_while_the_base_moves_up_to_its_point(self, which, offset, length):
        points = self.store.points("vm")
        point = points[which % len(points)]
        pin = self.store.pin("vm", point.id, {})
        reader = PointReader(self.store, "vm", point.id)
        expected = self.source.history[point.id]
        for name, data in expected.items():
            assert reader.pread(name, offset, length) == data[offset : offset + length]
        self.replica.housekeep(NEVER, self.source.now_ns)
        for name, data in expected.items():
            assert reader.pread(name, offset, length) == data[offset : offset + length]
            assert reader.pread(name, 0, len(data)) == data
            rest = bytearray(data)
            for low, high in reader.extents(name, 0, len(data)):
                rest[low:high] = bytes(high - low)
            assert not any(rest)
        reader.close()
        self.store.unpin(pin)

    @invariant()
    def every_point_equals_the_model(self):
        check_points(self.store, self.source)

    @invariant()
    def check_finds_nothing(self):
        assert check(self.store).findings == ()

    def teardown(self):
        if hasattr(self, "store"):
            self.replica.close()
            self.store.close()
            shutil.rmtree(self.folder)


def test_every_point_equals_the_model_whatever_happens(monkeypatch):
    from hvfuse.target import journal
    from hvfuse.target import merge as merge_module

    for module in (index, journal, merge_module, schema):
        monkeypatch.setattr(module, "REGION", REGION)
    monkeypatch.setattr(merge_module, "STEP_BYTES", 20_000)
    monkeypatch.setattr(merge_module, "STEP_CYCLES", 3)
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        StoreAgainstBytearrays,
        settings=settings(
            max_examples=80,
            stateful_step_count=30,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
