"""A view against a bytearray, over a disk that must never change."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hvfuse.manifest import DiskManifest
from hvfuse.target.overlay import BLOCK, Overlay
from hvfuse.target.view import View, ViewDisk

IDENTITY = b"i" * 16
LIMIT = 12 * BLOCK


class Bytes:
    """A lower disk in memory that counts how it is read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return len(self.data)

    def pread(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return self.data[offset : offset + length]

    def pread_into(self, offset: int, out: memoryview) -> None:
        assert offset + len(out) <= self.size
        out[:] = self.pread(offset, len(out)).ljust(len(out), b"\0")

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for at in range(start - start % 512, min(end, self.size), 512):
            if any(self.data[at : at + 512]):
                yield max(at, start), min(at + 512, end, self.size)


class BytesPoint:
    """A recovery point in memory."""

    def __init__(self, disks: dict[str, bytes], digest: bytes = b"d" * 16) -> None:
        self._lowers = {name: Bytes(data) for name, data in disks.items()}
        self.disks = tuple(
            DiskManifest(disk_id=name.encode().ljust(16), name=name, format="raw", size=len(data), digest=digest)
            for name, data in disks.items()
        )

    def pread(self, disk_name: str, offset: int, length: int) -> bytes:
        return self._lowers[disk_name].pread(offset, length)

    def pread_into(self, disk_name: str, offset: int, out: memoryview) -> None:
        self._lowers[disk_name].pread_into(offset, out)

    def extents(self, disk_name: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        return self._lowers[disk_name].extents(start, end)

    def close(self) -> None:
        pass


positions = st.integers(0, LIMIT - 1) | st.integers(0, 11).map(lambda block: block * BLOCK)
lengths = st.integers(0, 3 * BLOCK) | st.sampled_from([BLOCK, 2 * BLOCK])


class ViewAgainstBytearray(RuleBasedStateMachine):
    """Every verb in any order, with the overlay closed and continued at times."""

    @initialize(size=st.integers(6 * BLOCK, LIMIT) | st.integers(0, LIMIT), seed=st.integers(1, 255))
    def begin(self, size: int, seed: int) -> None:
        self.directory = tempfile.TemporaryDirectory()
        # A hole in the middle third.
        data = bytearray((seed + at // 100) % 251 + 1 for at in range(size))
        data[size // 3 : size // 3 * 2] = bytes(size // 3 * 2 - size // 3)
        self.lower = Bytes(bytes(data))
        self.model = bytearray(data)
        self.flushed = True
        self._open()

    def _open(self) -> None:
        self.overlay = Overlay(f"{self.directory.name}/disk", identity=IDENTITY, lower_size=self.lower.size)
        self.disk = ViewDisk(self.lower, self.overlay)

    @rule(offset=positions, length=lengths, byte=st.integers(0, 255))
    def write(self, offset: int, length: int, byte: int) -> None:
        data = bytes([byte]) * length
        self.disk.pwrite(offset, data)
        if length:
            self.model.extend(bytes(max(0, offset + length - len(self.model))))
            self.model[offset : offset + length] = data

    @rule(offset=positions, length=lengths, trims=st.booleans())
    def clear(self, offset: int, length: int, trims: bool) -> None:
        (self.disk.trim if trims else self.disk.zero)(offset, length)
        end = min(offset + length, len(self.model))
        self.model[offset:end] = bytes(max(0, end - offset))

    @rule(size=st.integers(0, LIMIT))
    def truncate(self, size: int) -> None:
        self.disk.truncate(size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    @rule(offset=positions, length=lengths)
    def read(self, offset: int, length: int) -> None:
        assert self.disk.pread(offset, length) == self.model[offset : offset + length]

    @rule()
    def close_and_continue(self) -> None:
        self.disk.flush()
        self.overlay.close()
        self._open()

    @invariant()
    def is_the_model(self) -> None:
        if not hasattr(self, "disk"):
            return
        assert self.disk.size == len(self.model)
        assert self.disk.pread(0, len(self.model) + 1) == self.model
        shown = bytearray(len(self.model))
        before = -1
        for start, end in self.disk.extents(0, len(self.model)):
            assert before < start < end <= len(self.model), "extents are not ascending and apart"
            shown[start:end] = self.model[start:end]
            before = end
        assert shown == self.model, "an extent is missing"

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.overlay.close()
            self.directory.cleanup()


TestViewAgainstBytearray = ViewAgainstBytearray.TestCase
TestViewAgainstBytearray.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


EDGES = [edge for n in range(4) for edge in (n * BLOCK - 1, n * BLOCK, n * BLOCK + 1) if edge >= 0]


@pytest.mark.parametrize("verb", ["pwrite", "trim"])
def test_what_lies_around_a_change_stays(tmp_path: Path, verb: str) -> None:
    lower = Bytes(bytes(n % 251 + 1 for n in range(3 * BLOCK + 700)))
    for offset in EDGES:
        for end in [edge for edge in [*EDGES, lower.size - 1, lower.size] if edge > offset]:
            overlay = Overlay(str(tmp_path / f"{offset}-{end}"), identity=IDENTITY, lower_size=lower.size)
            disk = ViewDisk(lower, overlay)
            if verb == "pwrite":
                disk.pwrite(offset, b"\xff" * (end - offset))
            else:
                disk.trim(offset, end - offset)
            changed = (b"\xff" if verb == "pwrite" else b"\0") * (end - offset)
            assert disk.pread(0, 4 * BLOCK) == lower.data[:offset] + changed + lower.data[end:]
            overlay.drop()


def test_a_whole_block_is_written_without_reading_the_point(tmp_path: Path) -> None:
    lower = Bytes(b"x" * (4 * BLOCK))
    disk = ViewDisk(lower, Overlay(str(tmp_path / "d"), identity=IDENTITY, lower_size=lower.size))
    disk.pwrite(BLOCK, b"y" * BLOCK)
    assert lower.reads == []
    disk.pwrite(3 * BLOCK + 1, b"y")
    assert lower.reads == [(3 * BLOCK, BLOCK)]


def test_what_was_not_flushed_is_gone_and_what_lay_below_shows_again(tmp_path: Path) -> None:
    lower = Bytes(b"x" * (2 * BLOCK))
    prefix = str(tmp_path / "d")
    overlay = Overlay(prefix, identity=IDENTITY, lower_size=lower.size)
    disk = ViewDisk(lower, overlay)
    disk.pwrite(0, b"kept" + bytes(BLOCK - 4))
    disk.flush()
    disk.pwrite(BLOCK, b"lost" + bytes(BLOCK - 4))
    overlay.close()  # as a death of the process leaves it
    disk = ViewDisk(lower, Overlay(prefix, identity=IDENTITY, lower_size=lower.size))
    assert disk.pread(0, 4) == b"kept"
    assert disk.pread(BLOCK, 4) == b"xxxx"


def test_a_view_keeps_or_drops_what_was_written(tmp_path: Path) -> None:
    disks = {"a.raw": b"a" * 5000, "b.raw": b"b" * 9000}
    overlays = tmp_path / "overlays"
    view = View(BytesPoint(disks), overlays=str(overlays))
    view.disks["a.raw"].pwrite(4990, b"over the end")
    view.close()
    view = View(BytesPoint(disks), overlays=str(overlays))
    assert view.disks["a.raw"].pread(4980, 100) == b"a" * 10 + b"over the end"
    assert view.disks["b.raw"].pread(0, 9000) == disks["b.raw"]
    view.drop()
    assert not overlays.exists()


def test_a_read_only_view_has_no_files_and_reads_the_point(tmp_path: Path) -> None:
    view = View(BytesPoint({"a.raw": b"a" * 5000}), overlays=None)
    assert view.read_only
    assert view.disks["a.raw"].pread(0, 9999) == b"a" * 5000
    assert list(view.disks["a.raw"].extents(0, 5000)) == [(0, 5000)]
    view.drop()


@pytest.mark.parametrize("offset", [0, 1 << 40])
def test_a_huge_disk_takes_no_space_and_no_time(tmp_path: Path, offset: int) -> None:
    class Huge(Bytes):
        size = 2 << 40  # type: ignore[assignment]

        def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
            return iter(())

    disk = ViewDisk(Huge(b""), Overlay(str(tmp_path / "d"), identity=IDENTITY, lower_size=2 << 40))
    disk.pwrite(offset, b"1")
    disk.flush()
    assert sum(os.stat(tmp_path / name).st_blocks for name in ("d.data", "d.blocks")) * 512 < 64 << 10
    assert disk.pread(offset, 2) == b"1\0"
