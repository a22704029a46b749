"""A tracker without its mount, and a model of shipper and replica that follows what the tracker says.

The model compares and copies as told by `status`, `regions` and the logs, and by nothing else. After whatever
happens to the tracker, `check` asks for the promise that the tracker makes: each byte in which a disk may differ from
its replica is covered by a log that the replica has not had, or by a region that a coming comparison looks at;
or everything has to be compared.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from hvfuse import spool, system
from hvfuse.errors import ResyncRequiredError
from hvfuse.extent import Extent
from hvfuse.formats import tracking
from hvfuse.formats.companion import Entries, Kind
from hvfuse.formats.tracking import DIRTY, Scope
from hvfuse.tracker import budget, membership, resync
from hvfuse.tracker.vm import TrackedVm
from tests.crash.host import Death, Reaper, Side
from tests.crash.powerloss import PowerLoss

BLOCK = 64 << 10
DISKS = {"a.raw": 6 * BLOCK, "b.raw": 2 * BLOCK + 512}
LARGEST = 9 * BLOCK
VISITORS = ("b.raw", "c.raw", "d.raw")
"""Disks that come and go."""

Position = tuple[bytes, int]
"""(generation, cycle)."""
Contents = dict[str, bytearray]


@dataclass
class Copy:
    """One under way. `remaining`: of each disk, blocks that are still to be read."""

    generation: bytes
    base: Position | None
    staged: Contents
    remaining: dict[str, list[Extent]]


@dataclass
class Replica:
    """What the target holds, and a copy of it from earlier."""

    position: Position | None = None
    content: Contents = field(default_factory=dict)
    copy: Copy | None = None
    older: tuple[Position | None, Contents] = (None, {})


class Violation(AssertionError):
    """The promise was broken."""


def blocks(extents: list[list[int]]) -> list[Extent]:
    """The extents, cut into blocks."""
    return [
        Extent(at, min(BLOCK, offset + length - at))
        for offset, length in extents
        for at in range(offset, offset + length, BLOCK)
    ]


def paste(into: bytearray, offset: int, data: bytes) -> None:
    """Put data there; what lies between the old end and it is zeroes."""
    into.extend(bytes(max(0, offset + len(data) - len(into))))
    into[offset : offset + len(data)] = data


def touched_by(entries: Entries) -> list[Extent]:
    """What entries write to."""
    return [
        Extent(int(entry["offset"]), int(entry["length"]))
        for entry in entries
        if Kind(int(entry["kind"])) != Kind.FLUSH
    ]


def resized_by(previous: int, start: int) -> list[Extent]:
    """What a resize changes."""
    return [Extent(min(previous, start), abs(previous - start))] if previous != start else []


class Site:
    """Below `root`. `seed` decides everything but ids."""

    def __init__(self, root: str, *, seed: int, soft_limit: float = 0.25) -> None:
        self.dice = random.Random(seed)
        self.replica = Replica()
        self.reaper = Reaper(inside=True)
        self.passes = self.full_copies = self.deaths = 0
        self.happened: list[str] = []
        self.compared: dict[str, set[int]] = defaultdict(set)
        """Offsets of the blocks that copies looked at."""
        self._root = root
        self._lives = 0
        self._boot = self.dice.randbytes(16)
        self._soft_limit = soft_limit
        self.vm: TrackedVm | None = None
        self.exclude: frozenset[str] = frozenset()
        os.mkdir(self.folder)
        for name, size in DISKS.items():
            with open(os.path.join(self.folder, name), "wb") as file:
                file.write(self.dice.randbytes(size))

    @property
    def folder(self) -> str:
        return os.path.join(self._root, f"disks{self._lives}")

    def __enter__(self) -> Site:
        self._patched = pytest.MonkeyPatch()
        self._patched.setattr(system, "boot_id", lambda: self._boot)
        self._patched.setattr(budget, "LEAST_LIMIT", 4 * BLOCK)
        self._patched.setattr(membership, "STILL_SECONDS", 0.0)
        self._patched.setattr(budget, "_LEAST_STEP", BLOCK)
        self._patched.setattr(budget, "_MOST_STEP", BLOCK)
        system.install(self.reaper)
        self._watch()
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._power.__exit__()
        system.install(None)
        self._patched.undo()

    def _watch(self) -> None:
        self._power = PowerLoss(self.folder, seed=self.dice.getrandbits(64))
        self._power.__enter__()

    # The tracker's lives ------------------------------------------------------------------------

    def attach(self) -> None:
        self.vm = TrackedVm("vm", self.folder, exclude=self.exclude, hard_limit=1000, soft_limit=self._soft_limit)
        self.vm.attach()

    @property
    def names(self) -> list[str]:
        """Of the tracked disks."""
        return sorted(self.tracker.disks)

    def detach(self) -> None:
        self.tracker.detach()
        self.vm = None

    @property
    def tracker(self) -> TrackedVm:
        assert self.vm is not None
        return self.vm

    def kill(self) -> None:
        """What a SIGKILL leaves."""
        if self.vm is None:
            return
        for each in self.vm.disks.values():
            retired = each._retired[0] if each._retired else None
            for log in (each.log, each._standby, retired):
                if log is not None:
                    log.close()
        self.vm.close()
        self.vm = None

    def cut_power(self) -> None:
        """The host dies, and boots again."""
        self.kill()
        before = self.folder
        self._lives += 1
        self._power.cut(self.folder)
        self._power.__exit__()
        shutil.rmtree(before)
        self._boot = self.dice.randbytes(16)
        self._watch()

    def restart(self) -> None:
        """End the tracker cleanly, and start it again."""
        self.detach()
        self.attach()

    def die(self) -> None:
        """The tracker dies between two calls."""
        self.kill()
        self.attach()

    def reboot(self) -> None:
        """So does the host."""
        self.cut_power()
        self.attach()

    def dying(self, action: Callable[[], None]) -> None:
        """Do it; the tracker may die over it, at any labelled call, and over its recovery, too."""
        known = sorted(self.reaper.seen[Side.TRACKER])
        victims = frozenset({Side.TRACKER})
        if known and self.dice.randrange(3):
            self.reaper.die_at(victims, self.dice.choice(known), nth=self.dice.choice([1, 1, 1, 2, 3, 5]))
        else:
            self.reaper.die_at(victims, None, nth=self.dice.randrange(1, 25))
        died = self._dies_in(action)
        while died:
            self.kill() if self.dice.randrange(2) else self.cut_power()
            if self.dice.randrange(3) == 0:
                self.reaper.die_at(victims, None, nth=self.dice.randrange(1, 25))
            died = self._dies_in(self.attach)

    def _dies_in(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Death:
            self.deaths += 1
            self.happened.append(f"died at {self.reaper.killed_at}")
        died = self.reaper.killed_at is not None
        self.reaper.disarm()
        return died

    # What guests do -----------------------------------------------------------------------------

    def scribble(self) -> None:
        name = self.dice.choice(self.names)
        target, size = self.tracker.disks[name], self.size(name)
        offset = self.dice.randrange(max(1, size)) // 512 * 512
        length = self.dice.choice([512, 4096, BLOCK + 1024])
        match self.dice.randrange(8):
            case 0:
                target.trim(offset, length)
            case 1:
                target.zero(offset, length)
            case 2:
                target.truncate(self.dice.randrange(2 * BLOCK, LARGEST) // 512 * 512)
            case 3:
                with contextlib.suppress(OSError):  # once failed, failed
                    target.sync(datasync=True)
            case _:
                target.write(self.dice.randbytes(min(length, LARGEST - offset)), offset)

    def fill_up(self) -> None:
        """Write more than the soft limit allows."""
        for _ in range(6):
            self.tracker.disks["a.raw"].write(self.dice.randbytes(BLOCK), BLOCK // 2)

    def rotate(self) -> None:
        if self.tracker.is_logging and not any(each.sync_failed for each in self.tracker.disks.values()):
            self.tracker.rotate()

    def lose_logs(self) -> None:
        with self.tracker.gate:
            self.tracker.degrade("for the test")

    def fail(self, label: str, action: Callable[[], None]) -> None:
        """Do it while calls with that label fail."""

        def broken(seen: str, _call: str, _size: int) -> None:
            if seen == label:
                raise OSError(errno.EIO, "broken")

        system.install(broken)
        try:
            action()
        except (OSError, ResyncRequiredError):
            pass
        finally:
            system.install(self.reaper)

    def fail_sync(self) -> None:
        """Of another disk than `change_offline` changes: one that was not detached cleanly is not looked at."""
        other = self.tracker.disks.get("b.raw")
        if other is not None:
            self.fail("disk:sync", lambda: other.sync(datasync=True))

    def change_offline(self) -> None:
        """Somebody writes to an image behind the mount."""
        self.detach()
        with open(os.path.join(self.folder, "a.raw"), "r+b") as file:
            system.pwrite("test:offline", file.fileno(), self.dice.randbytes(512), 512 * self.dice.randrange(50))
            os.utime(file.fileno(), ns=(1, self.dice.getrandbits(60)))
            system.fsync("test:offline", file.fileno())
        self.attach()

    # Disks that come and go -----------------------------------------------------------------------

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def create(self, name: str) -> None:
        """Put a file there that is whole when it appears, in the place of another if there is one."""
        made = self.path("coming.tmp")
        with open(made, "wb") as file:
            system.pwrite("test:create", file.fileno(), self.dice.randbytes(self.dice.randrange(1, 5) * BLOCK), 0)
            system.fsync("test:create", file.fileno())
        system.rename("test:create", made, self.path(name))
        system.fsync_directory("test:create", self.folder)

    def remove(self, name: str) -> None:
        system.unlink("test:remove", self.path(name))
        system.fsync_directory("test:remove", self.folder)

    def come(self) -> None:
        """A disk comes while the VM is mounted, or one that waited is asked about again."""
        self.bring()
        self.tracker.take_in()

    def bring(self) -> None:
        """A disk comes, and nobody asks."""
        missing = [name for name in VISITORS if not os.path.exists(self.path(name))]
        if missing:
            self.create(self.dice.choice(missing))

    def choose(self, exclude: frozenset[str]) -> None:
        """What is to be tracked changes; it is written down before the tracker hears of it."""
        self.exclude = exclude
        self.tracker.configure(exclude=exclude, hard_limit=1000, soft_limit=self._soft_limit)

    def exclude_one(self) -> None:
        self.choose(frozenset({self.dice.choice(VISITORS)}))

    def include_all(self) -> None:
        self.choose(frozenset())

    def write_untracked(self) -> None:
        """Somebody writes to a disk that is not tracked, as to any file."""
        for name in VISITORS:
            if name not in self.tracker.disks and os.path.exists(self.path(name)):
                with open(self.path(name), "r+b") as file:
                    system.pwrite("test:untracked", file.fileno(), self.dice.randbytes(512), 0)
                    system.fsync("test:untracked", file.fileno())

    def change_set_offline(self) -> None:
        """While nothing is mounted a disk comes, goes or is replaced by another."""
        self.kill() if self.dice.randrange(3) == 0 else self.detach()
        name = self.dice.choice(VISITORS)
        if os.path.exists(self.path(name)) and self.dice.randrange(2):
            self.remove(name)
        elif not os.path.exists(self.path(name)) or self._is_left_clean(name):
            self.create(name)
        self.attach()

    def _is_left_clean(self, name: str) -> bool:
        """What is done behind a mount that died cannot be noticed, and nothing is promised."""
        try:
            with open(self.path(f"{name}.hvt"), "rb") as file:
                return tracking.unpack_state(file.read()).detached_cleanly
        except FileNotFoundError:
            return True

    def size(self, name: str) -> int:
        return os.stat(os.path.join(self.folder, name)).st_size

    def image(self, name: str) -> bytes:
        with open(os.path.join(self.folder, name), "rb") as file:
            return file.read()

    # What a shipper does ------------------------------------------------------------------------

    def ship(self) -> None:
        """One step towards a replica that equals the disks."""
        try:
            self._ship()
        except ResyncRequiredError:
            if not any(each.sync_failed for each in self.tracker.disks.values()):
                raise
            self.happened.append("restart")
            self.restart()

    def converge(self) -> None:
        """Ship until the replica equals the disks. Raises Violation if it never does."""
        for _ in range(200):
            self.ship()
            status, position = self.tracker.status(), self.replica.position
            if not status["resyncing"] and not status["resync_required"] and position is not None and position[1]:
                return
        raise Violation("the replica never caught up")

    def _ship(self) -> None:
        vm, status = self.tracker, self.tracker.status()
        generation = bytes.fromhex(status["generation"]) if status["generation"] else None
        joined = self.replica.position is not None and self.replica.position[0] == generation
        if status["resyncing"]:
            assert generation is not None
            if joined:
                vm.resynced(generation)
            elif self.dice.randrange(12) == 0:
                self._begin(status)  # a shipper that lost its patience
            else:
                self._copy_on(generation, status)
        elif status["resync_required"] and joined and self.replica.position[1] and self.dice.randrange(2):  # type: ignore[index]
            self._send_rest()
            self._begin(self.tracker.status())
        elif status["resync_required"] or not joined or self._is_rolled_back(status):
            self._begin(status)
        else:
            self._send_logs(vm)

    def _is_rolled_back(self, status: dict[str, Any]) -> bool:
        return self.replica.position is None or self.replica.position[1] < status["acknowledged"]

    def _applies(self, status: dict[str, Any]) -> bool:
        """Whether the regions that are marked are enough for the replica as it stands."""
        bases = [(bytes.fromhex(generation), cycle) for generation, cycle in status["resync_bases"]]
        position = self.replica.position
        return (
            status["resync_scope"] == "regions"
            and position is not None
            and any(position[0] == base and position[1] >= least for base, least in bases)
        )

    def _begin(self, status: dict[str, Any]) -> None:
        scope = Scope.REGIONS if self._applies(status) else Scope.FULL
        if scope is Scope.REGIONS and status["resyncing"] and self.replica.position == (self._generation(status), 0):
            return
        self.passes += scope is Scope.REGIONS
        self.full_copies += scope is Scope.FULL
        self.tracker.begin(self.dice.randbytes(16), scope)

    @staticmethod
    def _generation(status: dict[str, Any]) -> bytes:
        return bytes.fromhex(status["generation"])

    def _copy_on(self, generation: bytes, status: dict[str, Any]) -> None:
        copy = self.replica.copy
        if status["resync_scope"] == "regions" and not self._applies(status):
            self._begin(status)
            return
        if copy is None or copy.generation != generation:
            answer = self.tracker.regions()
            extents = {disk["disk_id"]: blocks(disk["extents"]) for disk in answer["disks"]}
            ids = {disk["name"]: disk["disk_id"] for disk in status["disks"]}
            copy = self.replica.copy = Copy(
                generation,
                self.replica.position,
                self._as_large(self.replica.content),
                {name: extents[disk_id] for name, disk_id in ids.items()},
            )
        for _ in range(self.dice.randrange(1, 12)):
            left = [name for name in copy.remaining if copy.remaining[name]]
            if not left:
                self.replica.content, self.replica.position = copy.staged, (generation, 0)
                self.replica.copy = None
                return
            name = self.dice.choice(left)
            extent = copy.remaining[name].pop(self.dice.randrange(len(copy.remaining[name])))
            paste(copy.staged[name], extent.offset, self.image(name)[extent.offset : extent.end])
            self.compared[name].add(extent.offset)

    def _send_logs(self, vm: TrackedVm) -> None:
        if self.dice.randrange(3) == 0:
            self.replica.older = self.replica.position, {k: bytearray(v) for k, v in self.replica.content.items()}
        rotation = vm.rotate()
        assert self.replica.position is not None
        generation = self.replica.position[0]
        reached = self._send_sealed()
        if reached != rotation.cycle:
            raise Violation(f"cycle {rotation.cycle} was sealed, but the logs end at {reached}")
        for name in self.names:
            if self.replica.content[name] != self.image(name):
                raise Violation(f"{name} at cycle {reached} is not what the disk is")
        if self.dice.randrange(4):
            vm.release(generation, reached)

    def _send_sealed(self) -> int:
        """Bring the whole cycles over that continue the replica; returns the last cycle that it has then."""
        assert self.replica.position is not None
        generation, reached = self.replica.position
        for cycle in spool.list_cycles(self.folder):
            is_next = cycle.generation == generation and cycle.cycle == reached + 1 and cycle.is_whole
            if is_next and {log.disk for log in cycle.logs} == self.replica.content.keys():
                for log in cycle.logs:
                    self._apply(log)
                reached = cycle.cycle
        self.replica.position = generation, reached
        return reached

    def _send_rest(self) -> None:
        """What was sealed before a resynchronisation became necessary."""
        before = self.replica.position
        reached = self._send_sealed()
        assert before is not None
        if reached > before[1]:
            self.tracker.release(before[0], reached)

    def _apply(self, log: spool.SealedLog) -> None:
        content = self.replica.content[log.disk]
        self._resize(content, log.header.start_size)
        with open(log.log_path, "rb") as file:
            for entry in log.entries():
                kind, length = Kind(int(entry["kind"])), int(entry["length"])
                file.seek(int(entry["location"]))
                if kind is not Kind.FLUSH:
                    paste(content, int(entry["offset"]), file.read(length) if kind is Kind.WRITE else bytes(length))
        self._resize(content, log.header.end_size)

    @staticmethod
    def _resize(content: bytearray, size: int) -> None:
        content.extend(bytes(max(0, size - len(content))))
        del content[size:]

    def roll_back(self) -> None:
        """The store is put back to an older copy of itself."""
        self.replica.position, content = self.replica.older
        self.replica.content = {name: bytearray(each) for name, each in content.items()}
        self.replica.copy = None

    def damage(self) -> None:
        """The replica is not what it was, and somebody finds that."""
        position, name = self.replica.position, self.dice.choice(self.names)
        status = self.tracker.status()
        if position is None or status["generation"] != position[0].hex() or not self.replica.content.get(name):
            return
        at = self.dice.randrange(len(self.replica.content[name]))
        self.replica.content[name][at] ^= 0xFF
        disk_id = next(bytes.fromhex(disk["disk_id"]) for disk in status["disks"] if disk["name"] == name)
        try:
            self.tracker.doubt(position[0], "found to differ", {disk_id: [Extent(at, 1)]})
        except Death:
            self.replica.content[name][at] ^= 0xFF  # it was not answered, so nothing is promised
            raise

    # The promise --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises Violation."""
        vm, status = self.tracker, self.tracker.status()
        position = self.replica.position
        if status["generation"] is None:
            return
        generation = self._generation(status)
        if status["resyncing"]:
            self._check_copy(generation, position, status)
        elif status["resync_required"]:
            if status["resync_scope"] == "regions" and self._applies(status):
                assert position is not None
                looked_at = self._marked(vm.regions())
                after = position[1] if position[0] == generation else 0
                self._check_covered(self.replica.content, looked_at, generation, after)
        elif position is not None and position[0] == generation and position[1] >= status["acknowledged"]:
            self._check_covered(self.replica.content, {}, generation, position[1])

    def _check_copy(self, generation: bytes, position: Position | None, status: dict[str, Any]) -> None:
        """The copy taken as done at this moment: what may differ then is in the logs, or left to the next pass."""
        dirty = {}
        if status["resync_required"]:
            for each, _ in self.tracker.tracked():
                dirty[each.name] = resync.regions_of(each).extents(DIRTY, each.size())
        coming = sum(extent.length for extents in dirty.values() for extent in extents)
        if coming != status["dirty_bytes"]:
            raise Violation(f"{coming} bytes are dirty, the status says {status['dirty_bytes']}")
        if position == (generation, 0):
            content = self.replica.content
        elif status["resync_scope"] == "full" or self._applies(status):
            content = self._completed(generation)
        else:
            return
        self._check_covered(content, dirty, generation, 0)

    def _completed(self, generation: bytes) -> Contents:
        copy = self.replica.copy
        remaining = self._marked(self.tracker.regions())
        content = self._as_large(self.replica.content)
        if copy is not None and copy.generation == generation:
            remaining, content = copy.remaining, {name: bytearray(each) for name, each in copy.staged.items()}
        for name, extents in remaining.items():
            for extent in extents:
                paste(content[name], extent.offset, self.image(name)[extent.offset : extent.end])
        return content

    def _as_large(self, content: Contents) -> Contents:
        """A copy of them, as large as the disks are now: a copy gives the replica their sizes."""
        found = {name: bytearray(content.get(name, b"")) for name in self.names}
        for name, each in found.items():
            self._resize(each, self.size(name))
        return found

    def _marked(self, answer: dict[str, Any]) -> dict[str, list[Extent]]:
        names = {state.record.disk_id.hex(): disk.name for disk, state in self.tracker.tracked()}
        return {names[disk["disk_id"]]: blocks(disk["extents"]) for disk in answer["disks"]}

    def _logged(self, name: str, generation: bytes, after: int) -> list[Extent]:
        found: list[Extent] = []
        for sealed in spool.list_logs(self.folder):
            header = sealed.header
            if sealed.disk == name and header.generation == generation and header.cycle > after:
                found += touched_by(sealed.entries()) + resized_by(header.previous_size, header.start_size)
        log = self.tracker.disks[name].log
        if log is not None:
            found += touched_by(log.index.entries()) + resized_by(log.head.previous_size, log.head.start_size)
        return found

    def _check_covered(
        self, replica: Contents, looked_at: dict[str, list[Extent]], generation: bytes, after: int
    ) -> None:
        for name in self.names:
            stands = self.image(name)
            held = bytes(replica.get(name, b"")[: len(stands)]).ljust(len(stands), b"\0")
            if held == stands:
                continue
            differs = np.frombuffer(stands, np.uint8) != np.frombuffer(held, np.uint8)
            for extent in looked_at.get(name, []) + self._logged(name, generation, after):
                differs[extent.offset : extent.end] = False
            if differs.any():
                raise Violation(f"byte {int(np.argmax(differs))} of {name} differs, and nothing tells of it")
