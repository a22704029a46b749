"""Two homes and a stranger, two stores, any order of acts, each of which may die anywhere and be done again: at most
one home ever has the VM, and nothing is lost of what a committed failover was at."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

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

from hvfuse.errors import FencedError, HvfuseError
from hvfuse.manifest import CycleKind, CycleManifest
from hvfuse.states import FAILOVER_DONE, FAILOVER_OPEN
from hvfuse.target import failing_over, handed_over, relation, removal
from hvfuse.target.check import check
from hvfuse.target.failing_over import PLANNED, UNPLANNED, Claim, Party
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.schema import VmRecord
from hvfuse.target.store import Store
from tests.dying import done_until
from tests.target.model import Source, contents, send

EXAMPLES = int(os.environ.get("HVFUSE_EXAMPLES", "4"))
SIZE, DISK = 3_000, "a.raw"
OTHER = {"s": "t", "t": "s"}
HOMES, STORES = st.sampled_from("st"), st.sampled_from("st")
DEATHS = st.sampled_from([0, 0, 0, *range(1, 14)])
"""At which labelled call an act dies the first time; 0: at none."""
LATEST_ONLY = RetentionPolicy(keep_all_seconds=0, hourly=0)


def party(home: str) -> Party:
    return Party(home=home, root=f"/{home}", host=home)


@dataclass
class Held:
    """What a store holds. `phase`: "live" (of `home`, which ships), "prepared", "open" and "done" (a failover to
    `home`), "let go". `points`: contents by id, of those listed; `at`: the failover's point."""

    home: str
    source: str
    epoch: int
    phase: str = "live"
    points: dict[str, bytes] = field(default_factory=dict)
    at: str = ""


class Fence(RuleBasedStateMachine):
    """Each home ships to the other one's store. `knows`: the epoch that it has seen. `disk`: what a home's disk is,
    None where it has none. `noted`: the epoch under which a home is giving way. What a home does that has lost the VM
    is refused, except that it goes on writing its own disk until it looks."""

    @initialize(seed=st.integers(0, 1000), turns=st.integers(0, 2), points=st.integers(0, 2))
    def start(self, seed: int, turns: int, points: int) -> None:
        """After so many whole turns, and with so many points since."""
        self.folder = tempfile.mkdtemp(prefix="hvfuse-fence-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.random = random.Random(seed)
        self.stores: dict[str, Held | None] = {"s": None, "t": None}
        self.knows = {"s": 0, "t": 0}
        self.disk: dict[str, bytes | None] = {"s": bytes(SIZE), "t": None}
        self.noted: dict[str, int] = {}
        self.sources = {home: Source("vm", {DISK: SIZE}, seed=seed + ord(home)) for home in "st"}
        for home in "st":
            os.makedirs(self.disks(home))
        self.put_disk("s", self.random.randbytes(SIZE))
        for home in "st"[:turns]:
            self.look(home)
            self.ship(home, 0, False)
            self.fail_over(OTHER[home], False, 0, 0)
            self.commit(OTHER[home], 0)
            self.let_go(OTHER[home], 0)
            self.note_giving_way(home)
            self.give_way(home, 0)
        for _ in range(points):
            self.write("st"[turns % 2])
            self.look("st"[turns % 2])
            self.ship("st"[turns % 2], 0, False)

    def path(self, store: str) -> str:
        return os.path.join(self.folder, store, "store")

    def disks(self, home: str) -> str:
        return os.path.join(self.folder, home, "disks")

    def put_disk(self, home: str, data: bytes) -> None:
        self.disk[home] = data
        with open(os.path.join(self.disks(home), DISK), "wb") as file:
            file.write(data)

    def record(self, store: str) -> VmRecord | None:
        if not os.path.exists(self.path(store)):
            return None
        with Store(self.path(store), create=False) as opened, opened.env.read() as txn:
            return opened.find_vm(txn, "vm")

    def act(self, store: str, act: Callable[[Store], Any], *, allowed: bool, dies: int = 0) -> Any:
        """Do it, perhaps die in the middle and do it again, perhaps once more. What is not allowed changes nothing."""
        before = self.record(store)

        def once() -> Any:
            with Store(self.path(store)) as opened:
                return act(opened)

        def quietly() -> None:
            try:
                once()
            except HvfuseError:
                assert not allowed

        if dies:
            done_until(dies, quietly)
        if not allowed:
            quietly()
            assert self.record(store) == before
            return None
        result = once()
        if dies % 2:
            once()
        return result

    # What homes do -------------------------------------------------------------------------------------------

    @rule(home=HOMES)
    def write(self, home: str) -> None:
        """By whoever has a disk: one that has lost the VM may not know yet."""
        if self.disk[home] is not None and home not in self.noted:
            data = bytearray(self.disk[home] or b"")
            at = self.random.randrange(SIZE - 100)
            data[at : at + 100] = self.random.randbytes(100)
            self.put_disk(home, bytes(data))

    @rule(home=HOMES)
    def look(self, home: str) -> None:
        held = self.stores[OTHER[home]]
        if held is not None:
            self.knows[home] = max(self.knows[home], held.epoch)

    def may_ship(self, home: str) -> bool:
        held = self.stores[OTHER[home]]
        if held is None:
            return home == "s"
        return held.phase == "live" and held.home == home and self.knows[home] >= held.epoch

    @rule(home=HOMES, dies=DEATHS, part=st.booleans())
    def ship(self, home: str, dies: int, part: bool) -> None:
        """A copy of everything where it has to be, then a cycle: whole, or begun and left."""
        store, source = OTHER[home], self.sources[home]
        if self.disk[home] is None or (self.stores[store] is None and home == "t"):
            return
        source.disks[DISK] = bytearray(self.disk[home] or b"")
        allowed, record = self.may_ship(home), self.record(store)
        at = None if record is None else record.position
        if at is None or at != source.position:
            source.begin_copy()
            whole = {DISK: [(0, SIZE, bytes(source.disks[DISK]))]}
            manifest, frames = source.manifest(CycleKind.COPY, previous=at), source.frames(whole)
            self.send(home, manifest, frames, allowed=allowed, dies=dies)
            if not allowed:
                source.position = None
                return
            source.end_copy(manifest)
        source.changes = {DISK: [(0, SIZE, bytes(source.disks[DISK]))]}
        manifest, frames = source.begin_cycle()
        if part and allowed:
            self.act(store, lambda opened: self.begin(opened, home, manifest, frames), allowed=True, dies=dies)
            source.cycle -= 1
            self.took(store, home)
            return
        point = self.send(home, manifest, frames, allowed=allowed, dies=dies)
        if not allowed:
            source.cycle -= 1
            return
        source.end_cycle(manifest, point)
        self.took(store, home).points[point] = bytes(source.disks[DISK])

    def took(self, store: str, home: str) -> Held:
        held = self.stores[store]
        if held is None:
            held = self.stores[store] = Held(home=home, source=home, epoch=self.knows[home])
        held.epoch = max(held.epoch, self.knows[home])
        return held

    def replica(self, opened: Store, home: str) -> LocalReplica:
        return LocalReplica(opened, "vm", claim=lambda: Claim(party=party(home), epoch=self.knows[home]))

    def send(self, home: str, manifest: CycleManifest, frames: list[bytes], *, allowed: bool, dies: int) -> Any:
        def act(opened: Store) -> Any:
            return send(self.replica(opened, home), manifest, frames)

        return self.act(OTHER[home], act, allowed=allowed, dies=dies)

    def begin(self, opened: Store, home: str, manifest: CycleManifest, frames: list[bytes]) -> None:
        replica = self.replica(opened, home)
        replica.begin(manifest)
        replica.put(frames[0])
        replica.close()

    @rule(home=HOMES, dies=DEATHS)
    def keep_house(self, home: str, dies: int) -> None:
        held = self.stores[OTHER[home]]
        if held is not None:
            allowed = self.may_ship(home)
            self.act(
                OTHER[home],
                lambda opened: self.replica(opened, home).housekeep(LATEST_ONLY, 4 * 10**18),
                allowed=allowed or held.phase == "let go" or not held.points,
                dies=dies,
            )
            if allowed:
                held.points = dict(list(held.points.items())[-1:])

    # Failover ------------------------------------------------------------------------------------------------

    @rule(home=HOMES, dies=DEATHS)
    def prepare(self, home: str, dies: int) -> None:
        held = self.stores[OTHER[home]]
        if held is None or not held.points:
            return
        claim, last = Claim(party=party(home), epoch=self.knows[home]), list(held.points)[-1]
        record = self.record(OTHER[home])
        ready = record is not None and record.position is not None and record.state == "Replicating"
        again = held.phase == "prepared" and held.home == home
        allowed = again or (self.may_ship(home) and ready)
        self.act(
            OTHER[home],
            lambda opened: failing_over.prepare(opened, "vm", claim, point_id=last, proof={}),
            allowed=allowed,
            dies=dies,
        )
        if allowed:
            held.phase = "prepared"

    @rule(home=HOMES, dies=DEATHS)
    def withdraw(self, home: str, dies: int) -> None:
        held = self.stores[OTHER[home]]
        if held is not None:
            claim = Claim(party=party(home), epoch=self.knows[home])
            allowed = self.may_ship(home) or (held.phase == "prepared" and held.home == home)
            self.act(OTHER[home], lambda opened: failing_over.withdraw(opened, "vm", claim), allowed=allowed, dies=dies)
            if allowed:
                held.phase = "live"

    @rule(store=STORES, planned=st.booleans(), which=st.integers(0, 9), dies=DEATHS)
    def fail_over(self, store: str, planned: bool, which: int, dies: int) -> None:
        """By the home whose store it is, if it has no disk of its own."""
        held = self.stores[store]
        if held is None or not held.points or self.disk[store] is not None:
            return
        last = list(held.points)[-1]
        point = last if planned else list(held.points)[which % len(held.points)]
        again = held.phase == "open" and held.at == point
        fresh = held.phase == "prepared" or (held.phase == "live" and not planned)
        vm = self.act(
            store,
            lambda opened: failing_over.fail_over(
                opened,
                "vm",
                party(store),
                kind=PLANNED if planned else UNPLANNED,
                point_id=point,
                comes_home=store == "s",
            ),
            allowed=again or fresh,
            dies=dies,
        )
        if fresh and not again:
            assert vm.epoch > held.epoch
            held.phase, held.source, held.home, held.at, held.epoch = "open", held.home, store, point, vm.epoch

    @rule(store=STORES, which=st.integers(0, 9), dies=DEATHS)
    def change_point(self, store: str, which: int, dies: int) -> None:
        held = self.stores[store]
        if held is not None and held.points:
            point = list(held.points)[which % len(held.points)]
            allowed = held.phase == "open"
            self.act(
                store,
                lambda opened: failing_over.change_point(opened, "vm", party(store), point),
                allowed=allowed,
                dies=dies,
            )
            held.at = point if allowed else held.at

    @rule(store=STORES, dies=DEATHS)
    def cancel(self, store: str, dies: int) -> None:
        held = self.stores[store]
        if held is not None:
            allowed = held.phase in ("open", "live")
            vm = self.act(
                store, lambda opened: failing_over.cancel(opened, "vm", party(store)), allowed=allowed, dies=dies
            )
            if held.phase == "open":
                assert vm.epoch > held.epoch
                held.phase, held.home, held.epoch = "live", held.source, vm.epoch

    @rule(store=STORES, dies=DEATHS)
    def commit(self, store: str, dies: int) -> None:
        held = self.stores[store]
        if held is not None:
            allowed = held.phase in ("open", "done", "let go")
            self.act(store, lambda opened: failing_over.commit(opened, "vm", party(store)), allowed=allowed, dies=dies)
            if held.phase == "open":
                held.phase, held.points = "done", {held.at: held.points[held.at]}
                self.knows[store] = held.epoch

    @rule(store=STORES, dies=DEATHS)
    def let_go(self, store: str, dies: int) -> None:
        """Once the home has hydrated its disk."""
        held = self.stores[store]
        if held is None:
            return
        if held.phase == "done":
            with Store(self.path(store)) as opened:
                found = contents(opened, "vm", held.at)[DISK]
            assert found == held.points[held.at]
            self.put_disk(store, found)
        allowed = held.phase in ("done", "let go")
        self.act(store, lambda opened: failing_over.let_go(opened, "vm", party(store)), allowed=allowed, dies=dies)
        if allowed:
            held.phase, held.points = "let go", {}

    @rule(store=STORES, dies=DEATHS)
    def delete_replica(self, store: str, dies: int) -> None:
        """Of a VM that is its home's for good: nothing is left to delete, and the fence stays."""
        held = self.stores[store]
        if held is not None and held.phase == "let go":
            self.act(store, lambda opened: removal.remove(opened, "vm"), allowed=True, dies=dies)

    # Reverse replication -------------------------------------------------------------------------------------

    @rule(home=HOMES)
    def note_giving_way(self, home: str) -> None:
        """The old source sees in the shared store that the failover is committed."""
        held = self.stores[OTHER[home]]
        has_disk = self.disk[home] is not None and home not in self.noted
        if held is not None and has_disk and held.phase in ("done", "let go") and held.home != home:
            self.noted[home] = held.epoch

    @rule(home=HOMES, dies=DEATHS)
    def give_way(self, home: str, dies: int) -> None:
        """Its disk becomes the replica in its own store, and the shared store says so."""
        if home not in self.noted:
            return
        epoch, other, before = self.noted[home], OTHER[home], self.disk[home]
        self.act(
            home,
            lambda opened: handed_over.take(opened, "vm", self.disks(home), [DISK], primary=party(other), epoch=epoch),
            allowed=True,
            dies=dies,
        )
        assert os.listdir(self.disks(home)) == []
        with open(os.path.join(self.path(home), "replicas", "vm", DISK), "rb") as image:
            assert image.read() == before
        self.act(
            other,
            lambda opened: failing_over.invite(opened, "vm", {"store": self.path(home), **party(home).as_json()}),
            allowed=True,
            dies=dies,
        )
        record = self.record(home)
        assert record is not None and record.epoch >= epoch
        self.stores[home] = Held(home=other, source=other, epoch=record.epoch)
        self.disk[home] = None
        del self.noted[home]

    # Whoever has no part in it -------------------------------------------------------------------------------

    @precondition(lambda self: any(self.stores.values()))
    @rule(store=STORES, which=st.integers(0, 7), who=st.sampled_from("xxst"), epoch=st.integers(0, 99))
    def meddle(self, store: str, which: int, who: str, epoch: int) -> None:
        """A stranger, or a home by the wrong store, or with an epoch of its own invention where it is not its turn."""
        held = self.stores[store]
        if held is None or (held.phase in ("live", "prepared") and held.home == who):
            return
        if held.home == who and held.phase not in ("live", "prepared"):
            which %= 4
        source, me, claim = Source("vm", {DISK: SIZE}, seed=epoch), party(who), Claim(party=party(who), epoch=epoch)
        point = next(iter(held.points), "none")
        acts: list[Callable[[Store], Any]] = [
            lambda opened: LocalReplica(opened, "vm", claim=lambda: claim).begin(source.begin_copy()[0]),
            lambda opened: LocalReplica(opened, "vm", claim=lambda: claim).abandon(),
            lambda opened: failing_over.prepare(opened, "vm", claim, point_id=point, proof={}),
            lambda opened: failing_over.withdraw(opened, "vm", claim),
            lambda opened: failing_over.change_point(opened, "vm", me, point),
            lambda opened: failing_over.cancel(opened, "vm", me),
            lambda opened: failing_over.commit(opened, "vm", me),
            lambda opened: failing_over.let_go(opened, "vm", me),
        ]
        self.act(store, acts[which], allowed=False)

    # What must hold ------------------------------------------------------------------------------------------

    @invariant()
    def at_most_one_home_has_the_vm(self) -> None:
        if not hasattr(self, "folder"):
            return
        able = {who for store in "st" for who in self.able(store)}
        assert len(able) <= 1, able
        owners = {held.home for held in self.stores.values() if held is not None and held.phase in ("live", "prepared")}
        assert len(owners) <= 1

    def able(self, store: str) -> set[str]:
        """Who could have a cycle accepted, whatever epoch it knew, or commit a failover."""
        record = self.record(store)
        if record is None:
            return set()
        if failing_over.state_of(record) in FAILOVER_OPEN:
            assert record.failover is not None
            return {record.failover["home"]}
        found = set()
        for who in "stx":
            try:
                relation.demand_open(record)
                failing_over.demand_claim(record, Claim(party=party(who), epoch=10**6))
                found.add(who)
            except FencedError:
                pass
        return found

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "folder"):
            return
        for store, held in self.stores.items():
            if held is None:
                continue
            with Store(self.path(store), create=False) as opened:
                assert check(opened).findings == ()
                assert [point.id for point in opened.points("vm")] == list(held.points)
                for point, data in held.points.items():
                    assert contents(opened, "vm", point)[DISK] == data
                vm = opened.vm("vm")
                assert (vm.epoch, vm.primary) == (held.epoch, held.source if held.phase == "open" else held.home)
                assert (failing_over.state_of(vm) in FAILOVER_DONE) == (held.phase in ("done", "let go"))
                assert len(opened.pins("vm")) == (held.phase in ("open", "done"))
        for home, data in self.disk.items():
            if data is not None:
                with open(os.path.join(self.disks(home), DISK), "rb") as file:
                    assert file.read() == data

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


def test_at_most_one_home_has_the_vm_whatever_happens_and_nothing_is_lost() -> None:
    seed = int(os.environ.get("HVFUSE_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"HVFUSE_SEED={seed} repeats this run")
    hypothesis.seed(seed)(Fence)
    run_state_machine_as_test(
        Fence,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_whole_way_there_and_back_again() -> None:
    """What chance seldom gets to: twice in each direction, planned and not, each act dying somewhere, and everything
    that has to be refused on the way."""
    for dies in (1, 4, 7):
        machine = Fence()
        machine.start(seed=dies, turns=0, points=0)
        try:
            for turn, (home, store) in enumerate([("s", "t"), ("t", "s")] * 2):
                go_over(machine, home, store, turn, dies)
        finally:
            machine.teardown()


def go_over(machine: Fence, home: str, store: str, turn: int, dies: int) -> None:
    def refused_to_others() -> None:
        for which, who in itertools.product(range(8), "xst"):
            machine.meddle(store, which, who, 99)
        machine.at_most_one_home_has_the_vm()
        machine.nothing_is_lost()

    machine.look(home)
    for _ in range(3):
        machine.write(home)
        machine.ship(home, dies, False)
    machine.prepare(home, dies) if turn % 2 else None
    machine.fail_over(store, bool(turn % 2), 0, dies)
    machine.change_point(store, 0, dies)
    machine.change_point(store, 1, 1)
    machine.keep_house(home, 0)
    refused_to_others()
    machine.cancel(store, dies)
    machine.write(home)
    machine.ship(home, 0, False)  # it has not looked yet
    machine.keep_house(home, 0)
    machine.look(home)
    machine.ship(home, 0, True)
    refused_to_others()
    machine.ship(home, dies, False)
    machine.fail_over(store, False, 1, dies)
    machine.commit(store, dies)
    refused_to_others()
    machine.let_go(store, dies)
    machine.delete_replica(store, dies)
    machine.write(home)
    machine.ship(home, 0, False)
    refused_to_others()
    machine.note_giving_way(home)
    machine.give_way(home, dies)
    refused_to_others()
    assert machine.disk[home] is None and machine.disk[store] is not None
    held = machine.stores[home]
    assert held is not None and replace(held, points={}) == Held(home=store, source=store, epoch=held.epoch)
