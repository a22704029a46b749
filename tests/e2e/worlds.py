"""What has to be true of two homes that fail a VM over to each other, whatever happens.

A `World` has a model: the bytes that each side's disks have to hold, the bytes of each recovery point, and who has the
VM. `World.observe` is called after everything that happens: it reads the stores' and homes' records, says what may have
become of what, and fails on anything else.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from hvfuse.control.daemon import serving_pid
from hvfuse.control.records import Records
from hvfuse.errors import FencedError
from hvfuse.states import FAILOVER_DONE, FAILOVER_OPEN, ReplicationState
from hvfuse.target import schema
from hvfuse.target.failing_over import Claim, demand_claim, state_of
from hvfuse.target.journal import PointReader
from hvfuse.target.store import Store
from tests.e2e.two_homes import BLOCK, DISKS, VM, Content, Side, TwoHomes, Version, started_at, write_direct

NOTICE_SECONDS = 10.0
"""Within which `hvfuse run` has seen that the VM is another's: it looks every 2 s."""
NOTHING_DONE = (2, 5, 10, 13)
"""Those after which all is as it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failover:
    """`vm.failover` as far as it must not change by itself."""

    home: str
    point: str
    is_done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a store says."""

    vm: schema.VmRecord | None = None
    failover: Failover | None = None
    points: tuple[tuple[str, int], ...] = ()

    @property
    def who(self) -> tuple[object, ...]:
        """What a refused command must leave as it was."""
        return (self.failover, self.vm and self.vm.primary, self.vm and self.vm.prepared)


class World(TwoHomes):
    """See the module."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(root, seed)
        self.stores = {"A": Seen(), "B": Seen(), "C": Seen()}
        self.points: dict[tuple[str, str], Content] = {}
        self.owner = self.a

    def write(self, side: Side) -> None:
        """A guest writes a few blocks, if it can."""
        name = self.random.choice(list(DISKS))
        blocks = self.random.randint(1, 16)
        offset = self.random.randrange(DISKS[name] // BLOCK - blocks) * BLOCK
        data = bytes(blocks * BLOCK) if self.random.random() < 0.1 else self.random.randbytes(blocks * BLOCK)
        began_ns, fenced_at = time.time_ns(), side.fenced_at
        try:
            write_direct(side.mnt / name, offset, data)
        except OSError as error:
            self.tell(f"{side.name}: write {name} {offset}+{len(data)}: {error}")
            return
        self.tell(f"{side.name}: write {name} {offset}+{len(data)}")
        assert side.content is not None, f"{side.name} has no VM, and its mount takes a write"
        self._demand_unfenced(side, fenced_at)
        assert not side.others, "settled by what was seen of the mount before"
        disk = bytearray(side.content[name])
        disk[offset : offset + len(data)] = data
        side.content = {**side.content, name: bytes(disk)}
        side.versions.append(Version(began_ns, time.time_ns(), side.content))

    def _demand_unfenced(self, side: Side, fenced_at: float | None) -> None:
        """The mount has taken a write: nobody could have known by then that the VM is another's."""
        if fenced_at is None or side.fenced_at is None:
            return
        now = time.monotonic()
        pid = serving_pid(side.socket)
        assert pid is not None
        started = started_at(pid)
        assert started < fenced_at, f"{side.name}: mounted writable {started - fenced_at:.2f} s after it was fenced"
        if side.runs:
            known = min(now - fenced_at, now - side.run_at)
            assert known < NOTICE_SECONDS, f"{side.name}: writable {known:.1f} s after it was fenced"

    # What is seen -------------------------------------------------------------------------------------------

    def observe(self, actor: Side | None = None, verb: str = "", code: int | None = 0) -> None:
        """Whatever has happened: `actor` did `verb`, which ended with `code` (None: killed)."""
        before = dict(self.stores)
        for name in self.stores:
            self.stores[name] = self._look(name)
        for side in self.sides.values():
            self._read_record(side)
        if code in NOTHING_DONE:
            for name in self.stores:
                assert before[name].who == self.stores[name].who, f"{verb} was refused, and changed {name}'s store"
        for name, seen in self.stores.items():
            self._learn_points(name, before[name], seen)
            self._follow(name, before[name], seen, actor, verb, code)
        for side in self.sides.values():
            self._follow_giving_way(side, actor, verb)
        self._demand_one_primary()
        for side in self.sides.values():
            self._note_fence(side)
            self._compare(side)

    def _look(self, name: str) -> Seen:
        path = self.root / "C" / "store" if name == "C" else self.sides[name].store
        if not (path / "store.lmdb").is_dir():
            return Seen()
        with Store(str(path), create=False, read_only=True) as store:
            with store.env.read() as txn:
                vm = store.find_vm(txn, VM)
            if vm is None:
                return Seen()
            state, failover = state_of(vm), None
            if vm.failover is not None and state in FAILOVER_OPEN | FAILOVER_DONE:
                failover = Failover(
                    home=str(vm.failover["home"]), point=str(vm.failover["point"]), is_done=state in FAILOVER_DONE
                )
            points = tuple((point.id, point.time_ns) for point in store.points(VM))
            return Seen(vm=vm, failover=failover, points=points)

    def _read_record(self, side: Side) -> None:
        if not side.is_away and (side.root / "state" / "records").is_dir():
            with Records(str(side.root / "state" / "records")) as records:
                side.record = records.read(VM)
        if not side.home and (side.place / "state" / "home-id").exists():
            side.home = (side.place / "state" / "home-id").read_text().strip()

    def _learn_points(self, name: str, before: Seen, seen: Seen) -> None:
        new = [point for point in seen.points if (name, point[0]) not in self.points]
        known = [point for point in seen.points if (name, point[0]) in self.points]
        again = self.random.sample(known, min(2, len(known)))
        path = self.root / "C" / "store" if name == "C" else self.sides[name].store
        if not new and not again:
            return
        with Store(str(path), create=False, read_only=True) as store:
            for point_id, time_ns in new:
                assert seen.vm is not None
                writer = self._side_of(before.vm.primary if before.vm and before.vm.primary else seen.vm.primary)
                content = _read_point(store, point_id)
                possible = _at(writer.versions, time_ns)
                assert content in possible, (
                    f"{name}: {point_id} of {writer.name}: {_differences(content, possible)} at {time_ns}"
                )
                self.points[name, point_id] = content
            for point_id, _ in again:
                content = _read_point(store, point_id)
                assert content == self.points[name, point_id], f"{name}: {point_id} is not what it was"

    def _side_of(self, home: str) -> Side:
        return next(side for side in self.sides.values() if side.home == home)

    def _follow(self, name: str, before: Seen, seen: Seen, actor: Side | None, verb: str, code: int | None) -> None:
        """What one step may have made of a failover."""
        old, new = before.failover, seen.failover
        if old is None and new is not None:
            side = self._side_of(new.home)
            assert (actor, new.is_done) == (side, False) and verb in ("planned", "unplanned"), (verb, new)
            assert side.content is None and side is not self.owner, f"{side.name} has the VM already"
            side.holds(self.points[name, new.point])
        elif old is not None and new is not None:
            side = self._side_of(old.home)
            assert old.home == new.home
            is_changed = actor is side and verb == "change-point" and code == 0
            if old.point != new.point or is_changed:
                assert (actor, verb, old.is_done) == (side, "change-point", False), (verb, old, new)
                side.holds(self.points[name, new.point])
            if old.is_done != new.is_done:
                assert (actor, verb, new.is_done) == (side, "commit", True), (verb, old, new)
                self.owner = side
            if actor is side and verb in ("change-point", "cancel") and code != 0 and not new.is_done:
                side.others.append(self.points[name, new.point])
        elif old is not None and new is None:
            side = self._side_of(old.home)
            assert (actor, verb) == (side, "reverse" if old.is_done else "cancel"), (verb, old)
            if not old.is_done:
                side.holds_nothing()

    def _follow_giving_way(self, side: Side, actor: Side | None, verb: str) -> None:
        gave_way_ns, side.gave_way_ns = side.gave_way_ns, side.record.gave_way_ns
        is_new = side.gave_way_ns is not None and side.gave_way_ns != gave_way_ns
        if side.content is None or (side.record.giving_way is None and not is_new):
            return
        assert (actor, verb) == (side, "reverse"), f"{side.name} gave way by {verb}"
        assert side is not self.owner, f"{side.name} has the VM, and gives way"
        side.holds_nothing()

    def _demand_one_primary(self) -> None:
        """Whoever can ship is who has the VM; nobody can while somebody can commit. As if all had looked."""
        ships, commits = set(), set()
        for name, seen in self.stores.items():
            if seen.failover is not None and not seen.failover.is_done:
                commits.add(self._side_of(seen.failover.home).name)
            for side in self.sides.values():
                if seen.vm is not None and self._ships_to(side) == name and _is_let_in(seen.vm, side):
                    ships.add(side.name)
        assert ships <= {self.owner.name}, f"{ships} can ship, and {self.owner.name} has the VM"
        assert len(commits) + len(ships) <= 1, f"{ships} can ship, {commits} can commit"

    def _ships_to(self, side: Side) -> str | None:
        """The store that a side ships to, if it ships."""
        if side.record.state in (ReplicationState.DISABLED, *FAILOVER_DONE) and side.record.held is None:
            return None
        return self._store_of(side)

    def _store_of(self, side: Side) -> str:
        if side.record.store is None:
            return "B"
        return Path(os.path.realpath(side.record.store)).parent.name.removesuffix(".away")

    def _note_fence(self, side: Side) -> None:
        """Whether the side can know that the VM is another's."""
        name = self._store_of(side)
        seen = self.stores[name]
        is_reachable = name == "C" or not self.sides[name].is_away
        if side is self.a and side.record.store is None:
            is_reachable = is_reachable and self.link.exists()
        theirs = seen.vm is not None and (
            (seen.failover is not None and seen.failover.home != side.home)
            or (seen.vm.primary not in ("", side.home) and side.record.state is not ReplicationState.DISABLED)
        )
        if not (theirs and is_reachable and not side.is_away):
            side.fenced_at = None
        elif side.fenced_at is None:
            side.fenced_at = time.monotonic()

    def _compare(self, side: Side) -> None:
        """What the side's disks hold, as far as it can be seen, is what they have to."""
        found = self.read(side)
        if found is None or side.content is None:
            return
        if found in side.others:
            side.holds(found)
        differences = _differences(found, [side.content])
        assert found == side.content, f"{side.name}: its disks are not what they have to be: {differences}"
        side.others = []

    def read(self, side: Side) -> Content | None:
        """The side's disks, by its mount, or else by its folder; None where neither shows them."""
        with contextlib.suppress(OSError):
            if not side.is_away and os.path.ismount(side.mnt):
                return {name: (side.mnt / name).read_bytes() for name in DISKS}
        with contextlib.suppress(OSError):
            if not (side.folder / ".failover").exists():
                return {name: (side.folder / name).read_bytes() for name in DISKS}
        return None


def _is_let_in(vm: schema.VmRecord, side: Side) -> bool:
    try:
        demand_claim(vm, Claim(party=side.party, epoch=1 << 40))
    except FencedError:
        return False
    return True


def _at(versions: list[Version], time_ns: int) -> list[Content]:
    """What the disks may have held at that instant."""
    return [
        one.content
        for one, following in zip(versions, [*versions[1:], None], strict=True)
        if one.begun_ns <= time_ns and (following is None or time_ns <= following.ended_ns)
    ]


def _read_point(store: Store, point_id: str) -> Content:
    reader = PointReader(store, VM, point_id)
    with contextlib.closing(reader):
        return {disk.name: bytes(reader.pread(disk.name, 0, disk.size)) for disk in reader.disks}


def _differences(found: Content, expected: list[Content]) -> str:
    """In how many blocks they differ, for messages."""
    told = []
    for one in expected:
        for name in one:
            blocks = [
                at // BLOCK
                for at in range(0, len(one[name]), BLOCK)
                if found.get(name, b"")[at : at + BLOCK] != one[name][at : at + BLOCK]
            ]
            if blocks:
                told.append(f"{name}: {len(blocks)} blocks, {blocks[:20]}")
    return f"{len(expected)} possible; {'; '.join(told)}"
