"""The whole way in one process, against a bytearray: tracker, shipper, store, merge, views.

A hypothesis state machine writes, zeroes, trims, resizes, flushes, rotates, ships, merges and reopens
at random; a bytearray for each disk and one for each recovery point is the model. 2,000 steps; the seed
is printed, and HVFUSE_SEED repeats a run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hvfuse import wire
from hvfuse.shipper.replication import CurrentPolicy, Replication, ShippingPolicy
from hvfuse.shipper.source import TrackerSource
from hvfuse.system import SystemClock
from hvfuse.target.journal import PointReader
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store
from hvfuse.target.view import View
from hvfuse.tracker.service import TrackerControl
from hvfuse.tracker.vm import TrackedVm
from tests.shipper.logs import NoRecords

STEPS = 50
EXAMPLES = int(os.environ.get("HVFUSE_EXAMPLES", "60"))
MAX_SIZE = 1 << 20
DISKS = ("a.raw", "b.img")


class InProcess(TrackerSource):
    """The tracker as a source, without its socket."""

    def __init__(self, machine: Machine) -> None:
        super().__init__("/none", machine.folder)
        self._machine = machine

    def ask(self, op: str, **fields: object) -> wire.Message:
        answer = json.loads(json.dumps(TrackerControl(self._machine.vm, "/none").handle({"op": op, **fields})))
        if op == "rotate":
            self._machine.note_barrier(bytes.fromhex(answer["generation"]), answer["cycle"])
        return dict(answer)


class Clock(SystemClock):
    """Wall time that a rule moves on, so that retention has something to let go."""

    ahead_ns = 0

    def now_ns(self) -> int:
        return super().now_ns() + self.ahead_ns


payloads = st.integers(1, 20_000).flatmap(
    lambda length: st.one_of(
        st.just(bytes(length)),
        st.integers(0, 255).map(lambda byte: bytes([byte]) * length),
        st.integers(0, 1 << 30).map(lambda seed: random.Random(seed).randbytes(length)),
    )
)
names = st.sampled_from(DISKS)
fractions = st.floats(0, 1, exclude_max=True)


class Machine(RuleBasedStateMachine):
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp(prefix="hvfuse-model-")
        self.folder = os.path.join(self.root, "vm")
        os.mkdir(self.folder)
        self.disks = {name: bytearray(size) for name, size in zip(DISKS, (256 << 10, 100 << 10), strict=True)}
        self.barriers: dict[tuple[bytes, int], dict[str, bytes]] = {}
        self.points: dict[str, dict[str, bytes]] = {}
        for name, model in self.disks.items():
            with open(os.path.join(self.folder, name), "wb") as file:
                file.truncate(len(model))
        self.clock = Clock()
        self.store = Store(os.path.join(self.root, "store"), map_size=64 << 20, clock=self.clock)
        self.attach()

    def attach(self) -> None:
        self.vm = TrackedVm("vm", self.folder, hard_limit=1000, clock=self.clock)
        self.vm.attach()
        self.replica = LocalReplica(self.store, "vm")
        self.replication = Replication(
            vm="vm",
            folder=self.folder,
            source=InProcess(self),
            replica=self.replica,
            records=NoRecords(),
            policy=CurrentPolicy(ShippingPolicy()),
            clock=self.clock,
            housekeep=lambda: None,
        )

    def note_barrier(self, generation: bytes, cycle: int) -> None:
        self.barriers[generation, cycle] = {name: bytes(model) for name, model in self.disks.items()}

    def place(self, name: str, fraction: float) -> int:
        return int(fraction * len(self.disks[name]))

    @initialize()
    def protect(self) -> None:
        self.ship()

    @rule(name=names, where=fractions, payload=payloads, sector=st.booleans())
    def write(self, name: str, where: float, payload: bytes, sector: bool) -> None:
        offset = self.place(name, where)
        if sector:
            offset -= offset % 512
        model = self.disks[name]
        self.vm.disks[name].write(payload, offset)
        if offset + len(payload) > len(model):
            model.extend(bytes(offset + len(payload) - len(model)))
        model[offset : offset + len(payload)] = payload

    @rule(name=names, where=fractions, length=st.integers(1, 300_000), trim=st.booleans())
    def clear(self, name: str, where: float, length: int, trim: bool) -> None:
        offset = self.place(name, where)
        model = self.disks[name]
        disk = self.vm.disks[name]
        (disk.trim if trim else disk.zero)(offset, length)
        end = min(offset + length, len(model))
        model[offset:end] = bytes(end - offset)

    @rule(name=names, size=st.integers(0, MAX_SIZE // 512).map(lambda sectors: sectors * 512))
    def resize(self, name: str, size: int) -> None:
        """A resize is a rotation: the cycle before it holds the old size."""
        before = self.vm.status()["cycle"], bytes.fromhex(self.vm.status()["generation"])
        if size != len(self.disks[name]):
            self.note_barrier(before[1], before[0])
        self.vm.disks[name].truncate(size)
        model = self.disks[name]
        del model[size:]
        model.extend(bytes(size - len(model)))

    @rule(name=names, datasync=st.booleans())
    def flush(self, name: str, datasync: bool) -> None:
        self.vm.disks[name].sync(datasync=datasync)

    @rule()
    def rotate(self) -> None:
        rotation = self.vm.rotate()
        self.note_barrier(rotation.generation, rotation.cycle)

    @rule()
    def ship(self) -> None:
        self.replication.cycle_now()
        for point in self.replica.points():
            if point.id not in self.points:
                self.points[point.id] = self.barriers[point.generation, point.cycle]

    @rule(hours=st.sampled_from([0, 1, 30]), policy=st.sampled_from([(0, 0), (3600, 2), (3600, 24)]))
    def merge(self, hours: int, policy: tuple[int, int]) -> None:
        self.clock.ahead_ns += hours * 3600 * 10**9
        keep_all, hourly = policy
        self.replica.housekeep(RetentionPolicy(keep_all_seconds=keep_all, hourly=hourly), self.clock.now_ns())

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        """The tracker ends, or dies with the page cache left whole; then it attaches again."""
        vm = self.vm
        generation, cycle = bytes.fromhex(vm.status()["generation"]), vm.status()["cycle"]
        if clean:
            vm.detach()
        else:
            vm.close()
        self.note_barrier(generation, cycle)
        self.replica.close()
        self.attach()
        assert self.vm.resync_reason is None
        assert self.vm.status()["cycle"] > cycle

    @rule(choice=st.randoms(use_true_random=False), where=fractions, payload=payloads)
    def view(self, choice: random.Random, where: float, payload: bytes) -> None:
        """A view equals its point; what is written into it stays in it."""
        point = choice.choice(self.replica.points())
        view = View(PointReader(self.store, "vm", point.id), overlays=os.path.join(self.root, "overlay"))
        for name, disk in view.disks.items():
            expected = bytearray(self.points[point.id][name])
            assert disk.pread(0, MAX_SIZE * 2) == expected, (point.id, name)
            offset = int(where * len(expected))
            disk.pwrite(offset, payload)
            expected.extend(bytes(max(0, offset + len(payload) - len(expected))))
            expected[offset : offset + len(payload)] = payload
            disk.trim(offset // 2, 5000)
            expected[offset // 2 : offset // 2 + 5000] = bytes(min(5000, len(expected) - offset // 2))
            assert disk.pread(0, MAX_SIZE * 2) == expected, (point.id, name)
        view.drop()
        self.compare(point.id)

    def compare(self, point: str) -> None:
        reader = PointReader(self.store, "vm", point)
        for disk in reader.disks:
            expected = self.points[point][disk.name]
            assert disk.size == len(expected), (point, disk.name)
            assert reader.pread(disk.name, 0, disk.size) == expected, (point, disk.name)
        reader.close()

    @precondition(lambda self: self.points)
    @invariant()
    def images_equal_the_model(self) -> None:
        Machine.steps += 1
        for name, model in self.disks.items():
            with open(os.path.join(self.folder, name), "rb") as file:
                assert file.read() == model, name

    def teardown(self) -> None:
        try:
            self.ship()
            for point in self.replica.points():
                self.compare(point.id)
            newest = self.points[self.replica.points()[-1].id]
            assert newest == {name: bytes(model) for name, model in self.disks.items()}
        finally:
            self.vm.close()
            self.replica.close()
            self.store.close()
            shutil.rmtree(self.root)


def test_a_random_life_of_a_vm_agrees_with_the_model_at_every_point() -> None:
    seed = int(os.environ.get("HVFUSE_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"HVFUSE_SEED={seed} repeats this run")
    hypothesis.seed(seed)(Machine)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            stateful_step_count=STEPS,
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{Machine.steps} steps")
    assert Machine.steps >= 2000
