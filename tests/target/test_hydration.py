"""Copying up what an overlay lacks, while it is used: against a bytearray, across crashes, faults, and a full disk."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hvfuse import system
from hvfuse.errors import CorruptError
from hvfuse.target import hydration
from hvfuse.target.hydration import DiskHydration, Hydration, HydrationState, Progress
from hvfuse.target.journal import PointReader
from hvfuse.target.overlay import BLOCK, Overlay
from hvfuse.target.view import View, ViewDisk
from tests.shipper.test_with_store import StoredHost
from tests.target.test_view import IDENTITY, LIMIT, Bytes, BytesPoint, lengths, positions

MIB = 1 << 20


class Overtaken(Bytes):
    """A lower disk during whose reading something else may happen."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def pread(self, offset: int, length: int) -> bytes:
        data = super().pread(offset, length)
        self.meanwhile()
        return data


class HydrationAgainstBytearray(RuleBasedStateMachine):
    """Every verb, pieces of hydration, flushes of either side and kills, in any order."""

    @initialize(size=st.integers(6 * BLOCK, LIMIT) | st.integers(0, LIMIT), seed=st.integers(1, 255))
    def begin(self, size: int, seed: int) -> None:
        self.directory = tempfile.TemporaryDirectory()
        data = bytearray((seed + at // 100) % 251 + 1 for at in range(size))
        data[size // 3 : size // 3 * 2] = bytes(size // 3 * 2 - size // 3)
        self.lower = Overtaken(bytes(data))
        self.model = bytearray(data)
        self.flushed = bytearray(data)  # as it was then, and resized since, which is durable at once
        self._open()

    def _open(self) -> None:
        self.overlay = Overlay(f"{self.directory.name}/disk", identity=IDENTITY, lower_size=self.lower.size)
        self.disk = ViewDisk(self.lower, self.overlay)
        self.hydration = DiskHydration(self.disk, piece=2 * BLOCK)

    @rule(offset=positions, length=lengths, fill=st.integers(1, 255))
    def write(self, offset: int, length: int, fill: int) -> None:
        data = bytes([fill]) * length
        self.disk.pwrite(offset, data)
        if data:
            self.model.extend(bytes(max(0, offset + length - len(self.model))))
            self.model[offset : offset + length] = data

    @rule(offset=positions, length=lengths, zero=st.booleans())
    def trim(self, offset: int, length: int, zero: bool) -> None:
        (self.disk.zero if zero else self.disk.trim)(offset, length)
        end = min(offset + length, len(self.model))
        self.model[offset:end] = bytes(max(0, end - offset))

    @rule(size=st.integers(0, LIMIT) | st.integers(0, 12).map(lambda n: n * BLOCK))
    def truncate(self, size: int) -> None:
        self.disk.truncate(size)
        for model in (self.model, self.flushed):
            del model[size:]
            model.extend(bytes(size - len(model)))

    @rule(offset=positions, length=lengths, what=st.sampled_from(["write", "trim", "cut", "cut and grow"]))
    def hydrate_while_the_disk_changes(self, offset: int, length: int, what: str) -> None:
        """Between the reading of a piece and its turn."""

        def meanwhile() -> None:
            self.lower.meanwhile = lambda: None
            match what:
                case "write":
                    self.write(offset, length, 7)
                case "trim":
                    self.trim(offset, length, False)
                case _:
                    self.truncate(offset)
                    if what == "cut and grow":
                        self.truncate(min(offset + length, LIMIT))

        self.lower.meanwhile = meanwhile
        self.hydration.step()
        self.lower.meanwhile = lambda: None

    @rule(steps=st.integers(1, 4))
    def hydrate(self, steps: int) -> None:
        for _ in range(steps):
            self.hydration.step()

    @rule(behind=st.booleans())
    def flush(self, behind: bool) -> None:
        self.disk.flush_behind() if behind else self.disk.flush()
        self.flushed = bytearray(self.model)

    @rule()
    def be_killed(self) -> None:
        """Each block is as it was when it was flushed last, or newer."""
        self.overlay.close()
        self._open()
        found = self.disk.pread(0, self.disk.size)
        assert len(found) == len(self.flushed)
        newest = self.model[: len(found)].ljust(len(found), b"\0")
        for at in range(0, len(found), BLOCK):
            block = slice(at, at + BLOCK)
            assert found[block] in (bytes(newest[block]), bytes(self.flushed[block]))
        self.model, self.flushed = bytearray(found), bytearray(found)

    @rule()
    def complete(self) -> None:
        while not self.hydration.is_complete():
            self.hydration.step()
        self.flush(behind=True)
        assert Path(f"{self.directory.name}/disk.data").read_bytes() == self.model

    @invariant()
    def reads_the_model(self) -> None:
        if hasattr(self, "model"):
            assert self.disk.size == len(self.model)
            assert self.disk.pread(0, LIMIT * 2) == self.model

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.overlay.close()
            self.directory.cleanup()


TestHydrationAgainstBytearray = HydrationAgainstBytearray.TestCase
TestHydrationAgainstBytearray.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


class Sparse:
    """A point with one disk that is a hole but for some ranges."""

    def __init__(self, size: int, data: dict[int, bytes]) -> None:
        self._inner = BytesPoint({"os.raw": b""})
        self.disks = tuple(type(disk)(**{**_fields(disk), "size": size}) for disk in self._inner.disks)
        self.data = data
        self.refused: Callable[[int], None] = lambda offset: None

    def pread(self, _name: str, offset: int, length: int) -> bytes:
        self.refused(offset)
        out = bytearray(length)
        for at, piece in self.data.items():
            low, high = max(at, offset), min(at + len(piece), offset + length)
            if low < high:
                out[low - offset : high - offset] = piece[low - at : high - at]
        return bytes(out)

    def pread_into(self, name: str, offset: int, out: memoryview) -> None:
        out[:] = self.pread(name, offset, len(out))

    def extents(self, _name: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        for at, piece in sorted(self.data.items()):
            low, high = max(at, start), min(at + len(piece), end)
            if low < high:
                yield low, high

    def close(self) -> None:
        pass


def _fields(disk: object) -> dict[str, object]:
    return {name: getattr(disk, name) for name in disk.__dataclass_fields__}  # type: ignore[attr-defined]


class World:
    def __init__(self, path: Path, point: Sparse, **options: float) -> None:
        self.told: list[Progress] = []
        self.view = View(point, overlays=str(path))
        self.disk = self.view.disks["os.raw"]
        self.file = path / "os.raw.data"
        self.hydration = Hydration([self.disk], str(path), tell=self.told.append, **options)
        self.stop = threading.Event()

    @property
    def states(self) -> list[HydrationState]:
        seen = [progress.state for progress in self.told]
        return [state for at, state in enumerate(seen) if not at or state != seen[at - 1]]


@pytest.fixture(autouse=True)
def no_injector() -> Iterator[None]:
    yield
    system.install(None)


def test_a_sparse_disk_is_there_in_moments_and_stays_sparse(tmp_path: Path) -> None:
    data = {0: b"a" * MIB, 3 << 30: b"b" * (6 * MIB), (10 << 30) - MIB: b"c" * MIB}
    world = World(tmp_path / "o", Sparse(10 << 30, data))
    began = time.monotonic()
    assert world.hydration.run(world.stop)
    assert time.monotonic() - began < 5
    status = world.file.stat()
    assert status.st_size == 10 << 30
    assert status.st_blocks * 512 < 9 * MIB
    with world.file.open("rb") as file:
        for at, piece in data.items():
            assert os.pread(file.fileno(), len(piece), at) == piece
    assert world.hydration.progress.done == world.hydration.progress.total == 10 << 30


def test_zeroes_that_the_point_holds_as_data_are_not_written(tmp_path: Path) -> None:
    world = World(tmp_path / "o", Sparse(16 * MIB, {0: bytes(8 * MIB) + b"x" + bytes(8 * MIB - 1)}))
    assert world.hydration.run(world.stop)
    assert world.file.stat().st_blocks * 512 < MIB
    assert world.file.read_bytes() == bytes(8 * MIB) + b"x" + bytes(8 * MIB - 1)


def test_what_was_written_and_never_flushed_does_not_show_up_where_the_point_has_zeroes(tmp_path: Path) -> None:
    """A killed process leaves it in the data file, unclaimed; the guest has seen zeroes there since."""
    point = Sparse(64 * BLOCK, {})
    view = View(point, overlays=str(tmp_path / "o"))
    view.disks["os.raw"].pwrite(8 * BLOCK, b"lost" * BLOCK)
    world = World(tmp_path / "o", point)
    assert b"lost" in world.file.read_bytes()
    assert world.disk.pread(0, 64 * BLOCK) == bytes(64 * BLOCK)
    assert world.hydration.run(world.stop)
    assert world.disk.pread(0, 64 * BLOCK) == bytes(64 * BLOCK) == world.file.read_bytes()


def test_a_damaged_frame_pauses_it_and_what_is_written_over_it_lets_it_go_on(tmp_path: Path) -> None:
    point = Sparse(4 * MIB, {0: b"a" * (4 * MIB)})
    world = World(tmp_path / "o", point, retry_seconds=0.01)

    def damaged(offset: int) -> None:
        if offset == 2 * MIB:
            raise CorruptError("frame 7 is damaged")

    point.refused = damaged
    thread = threading.Thread(target=world.hydration.run, args=(world.stop,))
    thread.start()
    until(lambda: world.hydration.progress.state is HydrationState.PAUSED)
    assert world.hydration.progress.error == "frame 7 is damaged"
    assert world.disk.pread(0, MIB) == b"a" * MIB
    world.disk.pwrite(2 * MIB, b"new" * MIB)
    thread.join(10)
    assert world.hydration.is_complete()
    assert world.states == ["copying", "paused", "copying"]
    assert world.file.read_bytes() == b"a" * (2 * MIB) + (b"new" * MIB)[: 3 * MIB]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_copy_that_cannot_be_written_leaves_the_guest_alone_and_is_tried_again(tmp_path: Path, code: int) -> None:
    world = World(tmp_path / "o", Sparse(4 * MIB, {0: b"a" * (4 * MIB)}), retry_seconds=0.01)
    main = threading.get_ident()

    def refuse(label: str, _call: str, _size: int) -> int | None:
        if label == "overlay:write" and threading.get_ident() != main:
            raise OSError(code, os.strerror(code))
        return None

    system.install(refuse)
    thread = threading.Thread(target=world.hydration.run, args=(world.stop,))
    thread.start()
    until(lambda: world.hydration.progress.state is HydrationState.PAUSED)
    world.disk.pwrite(100, b"guest")
    world.disk.flush()
    assert os.strerror(code) in (world.hydration.progress.error or "")
    system.install(None)
    thread.join(10)
    assert world.hydration.is_complete()
    assert world.file.read_bytes()[:200] == b"a" * 100 + b"guest" + b"a" * 95


def test_the_last_space_is_left_to_the_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "o", Sparse(4 * MIB, {0: b"a" * (4 * MIB)}), retry_seconds=0.01)
    monkeypatch.setattr(hydration, "RESERVE", 1 << 60)
    thread = threading.Thread(target=world.hydration.run, args=(world.stop,))
    thread.start()
    until(lambda: world.hydration.progress.state is HydrationState.PAUSED)
    assert "for the guest" in (world.hydration.progress.error or "")
    assert world.file.stat().st_blocks == 0
    world.stop.set()
    thread.join(10)


def test_a_guest_that_asks_all_the_time_waits_for_one_piece_and_the_copy_goes_on(tmp_path: Path) -> None:
    size = 64 * MIB
    point = Sparse(size, {0: b"a" * size})
    world = World(tmp_path / "o", point)
    turns, slow = [], threading.get_ident()

    def slowly(label: str, _call: str, _size: int) -> None:
        if label == "overlay:write" and threading.get_ident() != slow:
            turns.append(time.monotonic())
            time.sleep(0.005)

    system.install(slowly)
    thread = threading.Thread(target=world.hydration.run, args=(world.stop,))
    thread.start()
    most = 0
    while thread.is_alive():
        before = len(turns)
        world.disk.pwrite(len(turns) % 64 * MIB, b"guest")
        most = max(most, len(turns) - before)
    assert most <= 2  # the one under way, and one that began just before the guest came to wait
    assert world.hydration.is_complete()


def test_a_guests_write_does_not_wait_for_the_flush_of_the_copy(tmp_path: Path) -> None:
    world = World(tmp_path / "o", Sparse(MIB, {0: b"a" * MIB}))
    syncing, go_on = threading.Event(), threading.Event()

    def hang(label: str, _call: str, _size: int) -> None:
        if label == "overlay:data-sync":
            syncing.set()
            assert go_on.wait(10)

    system.install(hang)
    thread = threading.Thread(target=world.hydration.run, args=(world.stop,))
    thread.start()
    assert syncing.wait(10)
    world.disk.pwrite(0, b"guest")
    go_on.set()
    thread.join(10)
    system.install(None)
    world.view.close()
    assert World(tmp_path / "o", Sparse(MIB, {0: b"a" * MIB})).disk.pread(0, 6) == b"guesta"


def test_a_page_of_the_map_that_changed_during_a_flush_is_written_by_the_next(tmp_path: Path) -> None:
    overlay = Overlay(str(tmp_path / "d"), identity=IDENTITY, lower_size=64 * BLOCK)
    overlay.pwrite(0, b"a" * BLOCK)

    def write_more(label: str, _call: str, _size: int) -> None:
        system.install(None)
        assert label == "overlay:data-sync"
        overlay.pwrite(8 * BLOCK, b"b" * BLOCK)

    system.install(write_more)
    overlay.flush()
    assert claims(tmp_path) == [0]
    overlay.flush()
    assert claims(tmp_path) == [0, 8]


def claims(path: Path) -> list[int]:
    overlay = Overlay(str(path / "d"), identity=IDENTITY, lower_size=64 * BLOCK)
    found = [n for n in range(64) if overlay.holds(n * BLOCK)]
    overlay.close()
    return found


def test_any_point_of_a_store_becomes_plain_disks(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    host = StoredHost(tmp_path / "host")
    shipper = host.shipper()
    were = {}
    for seed in range(3):
        host.scribble(random.Random(seed), 30)
        shipper.cycle_now()
        were[host.store.points("vm1")[-1].id] = host.images()
    for point, images in were.items():
        view = View(PointReader(host.store, "vm1", point), overlays=str(tmp_path / point))
        copying = Hydration(view.disks.values(), str(tmp_path / point))
        assert copying.run(threading.Event())
        view.close()
        assert {name: (tmp_path / point / f"{name}.data").read_bytes() for name in images} == images
    host.replica.close()
    host.store.close()
    host.detach()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
