"""A source host and its target in one process, which can die at any labelled call.

The tracker is the real one without its mount, the shipper the real one without its socket, the store
the real one. Whoever dies, dies by an exception that no handler handles; from then on each of its
labelled calls fails the same way, so nothing that runs while the stack unwinds reaches a file.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from struct import Struct
from typing import Any

from hvfuse import system, wire
from hvfuse.errors import UnreachableError
from hvfuse.formats import vhd
from hvfuse.formats.tracking import IndexHead
from hvfuse.shipper.replication import CurrentPolicy, Replication, ShippingPolicy
from hvfuse.shipper.source import TrackerSource
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store
from hvfuse.tracker import index
from hvfuse.tracker.service import TrackerControl
from hvfuse.tracker.vm import TrackedVm
from tests.crash.powerloss import PowerLoss
from tests.crash.workload import Action, Operation
from tests.shipper.logs import NoRecords

VM = "vm"
DISKS = {"a.raw": 640 << 10, "b.raw": (512 << 10) + 512, "c.vhd": 1 << 20}
FAST_FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where worlds are made: syncs are simulated, so real ones would only take time. None: wherever it is usual."""
_VHD_BLOCK = 64 << 10
_KEPT_SECONDS = 300


class Death(BaseException):
    """Stands for SIGKILL, or for the power cut: not an Exception, so nothing under test handles it."""


class Side(StrEnum):
    """Whose process makes a call."""

    TRACKER = "tracker"
    SHIPPER = "shipper"


@dataclass(slots=True)
class Reaper:
    """The injector: counts labelled calls by side, and kills at one of them."""

    seen: dict[Side, Counter[str]] = field(default_factory=lambda: {side: Counter() for side in Side})
    inside: bool = False
    killed_at: str | None = None
    _victims: frozenset[Side] = frozenset()
    _label: str | None = None
    _countdown: int = 0

    def arm(self, victims: frozenset[Side], dice: random.Random) -> None:
        """Have the victims die at a call to come: at any, or at one of a label that is drawn first, so that
        rare calls have their turn."""
        known = sorted({label for side in victims for label in self.seen[side]})
        if known and dice.randrange(3):
            self.die_at(victims, dice.choice(known), nth=dice.choice([1, 1, 1, 2, 3, 5, 9, 17]))
        else:
            self.die_at(victims, None, nth=dice.randrange(1, 100))

    def die_at(self, victims: frozenset[Side], label: str | None, *, nth: int) -> None:
        """Have the victims die at their nth call from now on with that label; None: with any."""
        self._victims, self._label, self._countdown, self.killed_at = victims, label, nth, None

    def disarm(self) -> None:
        """Let everybody live."""
        self._countdown, self.killed_at = 0, None

    def is_dead(self, side: Side) -> bool:
        """Whether that process has died."""
        return self.killed_at is not None and side in self._victims

    def __call__(self, label: str, _call: str, _size: int) -> None:
        side = Side.TRACKER if self.inside else Side.SHIPPER
        self.seen[side][label] += 1
        if self.is_dead(side):
            raise Death(label)
        if self._countdown and side in self._victims and self._label in (None, label):
            self._countdown -= 1
            if self._countdown == 0:
                self.killed_at = label
                raise Death(label)


class _TornStores:
    """In the place of a `Struct` that stores into a map: a death in there leaves the first bytes only."""

    def __init__(self, real: Struct, label: str, reaper: Reaper) -> None:
        self._real = real
        self._label = label
        self._reaper = reaper
        self.size = real.size
        self.unpack_from = real.unpack_from

    def pack_into(self, buffer: memoryview, at: int, *values: int) -> None:
        data = self._real.pack(*values)
        try:
            self._reaper(self._label, "store", len(data))
        except Death:
            buffer[at : at + len(data) // 2] = data[: len(data) // 2]
            raise
        buffer[at : at + len(data)] = data


def _torn_heads(reaper: Reaper) -> Callable[[index.IndexMap, IndexHead], None]:
    """In the place of `IndexMap.store_head`, the only thing that the barrier changes outside of this process."""

    def store_head(self: index.IndexMap, head: IndexHead) -> None:
        raw = head.pack()
        try:
            reaper("index:head", "store", len(raw))
        except Death:
            self._view[: len(raw) // 2] = raw[: len(raw) // 2]
            raise
        self._view[: len(raw)] = raw

    return store_head


class _Clock(system.SystemClock):
    """Half a minute passes with each look."""

    def __init__(self) -> None:
        self._now_ns = 1_700_000_000 * 10**9

    def now_ns(self) -> int:
        self._now_ns += 30 * 10**9
        return self._now_ns


class Host:
    """Everything below `root`. Enter it, then `attach`.

    `on_request` is told (request, its fields, VM) before the tracker gets it, `on_answer` the request
    afterwards. `records`: whether power cuts shall be possible.
    """

    def __init__(
        self,
        root: str,
        reaper: Reaper,
        *,
        seed: int,
        on_request: Callable[[str, dict[str, Any], TrackedVm], None] = lambda request, fields, vm: None,
        on_answer: Callable[[str], None] = lambda request: None,
        records: bool = True,
    ) -> None:
        self.root = root
        self.seed = seed
        self.reaper = reaper
        self.lives = 0
        self.vm: TrackedVm | None = None
        self._dice = random.Random(seed)
        self._clock = _Clock()
        self._on_request = on_request
        self._on_answer = on_answer
        self._power: PowerLoss | None = None
        self._records = records
        self._boot = self._dice.randbytes(16)
        self._originals: list[tuple[Any, str, Any]] = []

    @property
    def folder(self) -> str:
        """Where the disks lie; another one after each power cut."""
        return os.path.join(self.root, f"disks{self.lives}")

    def __enter__(self) -> Host:
        self._replace(system, "_injector", self.reaper)
        self._replace(system, "boot_id", lambda: self._boot)
        self._replace(wire, "request", self._request)
        self._replace(index, "_BODY", _TornStores(index._BODY, "index:body", self.reaper))
        self._replace(index, "_CHECK", _TornStores(index._CHECK, "index:check", self.reaper))
        self._replace(index.IndexMap, "store_head", _torn_heads(self.reaper))
        if not os.path.isdir(self.folder):
            os.mkdir(self.folder)
            self._make_disks()
        self._watch()
        self.open_target()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.close_target()
        self._unwatch()
        for module, name, original in reversed(self._originals):
            setattr(module, name, original)

    def _replace(self, module: Any, name: str, value: Any) -> None:
        self._originals.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def _make_disks(self) -> None:
        for name, size in DISKS.items():
            fd = os.open(os.path.join(self.folder, name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            if name.endswith(".vhd"):
                vhd.write_dynamic(fd, size, block_size=_VHD_BLOCK)
            else:
                os.ftruncate(fd, size)
                os.pwrite(fd, self._dice.randbytes(100_000), 50_000)
            os.close(fd)

    def _watch(self) -> None:
        if self._records:
            self._power = PowerLoss(self.folder, seed=self._dice.getrandbits(64))
            self._power.__enter__()

    def _unwatch(self) -> None:
        if self._power is not None:
            self._power.__exit__()
            self._power = None

    # The tracker ------------------------------------------------------------------------------

    @contextmanager
    def _tracker(self) -> Iterator[None]:
        self.reaper.inside = True
        try:
            yield
        finally:
            self.reaper.inside = False

    def attach(self) -> TrackedVm:
        """Start the tracker."""
        with self._tracker():
            self.vm = TrackedVm(VM, self.folder, hard_limit=1000, clock=self._clock)
            self.vm.attach()
        return self.vm

    def detach(self) -> None:
        """End the tracker, cleanly."""
        assert self.vm is not None
        with self._tracker():
            self._on_request("detach", {}, self.vm)
            self.vm.detach()
        self.vm = None

    def kill(self) -> None:
        """What a SIGKILL leaves of the tracker: descriptors closed, nothing sealed, nothing recorded."""
        if self.vm is None:
            return
        for disk in self.vm.disks.values():
            retired = disk._retired[0] if disk._retired else None
            for log in (disk.log, disk._standby, retired):
                if log is not None:
                    log.close()
        self.vm.close()
        self.vm = None

    def cut_power(self) -> None:
        """Everybody here dies, and the page cache with them; `attach` is the next boot."""
        self.kill()
        assert self._power is not None
        before = self.folder
        self.lives += 1
        self._power.cut(self.folder)
        self._unwatch()
        shutil.rmtree(before)
        self._boot = self._dice.randbytes(16)
        self._watch()

    def images(self) -> dict[str, bytes]:
        """What is on the disks."""
        found = {}
        for name in DISKS:
            with open(os.path.join(self.folder, name), "rb") as file:
                found[name] = file.read()
        return found

    # The shipper and the store ------------------------------------------------------------------

    def open_target(self) -> None:
        """Start the shipper."""
        self.store = Store(os.path.join(self.root, "store"), map_size=1 << 28, clock=self._clock)
        self.replica = LocalReplica(self.store, VM)
        self.replication = Replication(
            vm=VM,
            folder=self.folder,
            source=TrackerSource("tracker.sock", self.folder),
            replica=self.replica,
            records=NoRecords(),
            policy=CurrentPolicy(ShippingPolicy()),
            clock=self._clock,
            housekeep=self._keep_house,
        )

    def _keep_house(self) -> None:
        self.replica.housekeep(RetentionPolicy(keep_all_seconds=_KEPT_SECONDS, hourly=1), self._clock.now_ns())

    def close_target(self) -> None:
        """What the shipper's death leaves: LMDB drops what was not committed, the kernel the locks."""
        self.replica.close()
        self.store.close()

    def _request(self, _socket: str, op: str, *, timeout: float = 0, **fields: Any) -> dict[str, Any]:
        """In the place of `wire.request`: what the tracker answers, if it lives."""
        del timeout
        if self.vm is None or self.reaper.is_dead(Side.TRACKER):
            raise UnreachableError("the tracker does not run")
        self._on_request(op, fields, self.vm)
        try:
            with self._tracker():
                answer = TrackerControl(self.vm, "/none").handle({"op": op, **fields})
        except Death:
            if self.reaper.is_dead(Side.SHIPPER):
                raise
            raise UnreachableError("the tracker died") from None
        self._on_answer(op)
        return answer

    # What is asked of them ------------------------------------------------------------------------

    def perform(self, operation: Operation) -> None:
        """One operation. Raises Death where it strikes, and UnreachableError to a shipper that survives it."""
        if operation.action is Action.CYCLE:
            self.replication.cycle_now()
        elif operation.action is Action.RESTART:
            self.detach()
            self.attach()
        elif operation.action is Action.ROTATE:
            self._request("", "rotate")
        else:
            with self._tracker():
                self._on_disk(operation)

    def _on_disk(self, operation: Operation) -> None:
        assert self.vm is not None
        disk = self.vm.disks[operation.disk]
        match operation.action:
            case Action.WRITE:
                disk.write(operation.data, operation.offset)
            case Action.ZERO:
                disk.zero(operation.offset, operation.length)
            case Action.TRIM:
                disk.trim(operation.offset, operation.length)
            case Action.SYNC:
                disk.sync(datasync=True)
            case Action.RESIZE:
                if operation.length != disk.size():
                    self._on_request("resize", {}, self.vm)
                disk.truncate(operation.length)
