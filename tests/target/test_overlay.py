"""The overlay's files: their layout, damage, and the order in which they become durable."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvfuse import system
from hvfuse.errors import CorruptError, HvfuseError, UnsupportedError, UsageError
from hvfuse.target.overlay import BLOCK, BlockMap, Overlay, drop_overlays

IDENTITY = b"i" * 16
PAGE_BLOCKS = 32768


def opened(directory: Path, *, identity: bytes = IDENTITY, lower_size: int = 64 * BLOCK) -> Overlay:
    return Overlay(str(directory / "disk"), identity=identity, lower_size=lower_size)


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """The labels of all system calls, in order."""
    seen: list[str] = []
    system.install(lambda label, _call, _size: seen.append(label))
    yield seen
    system.install(None)


near_a_page = st.integers(0, 70) | st.integers(PAGE_BLOCKS - 40, PAGE_BLOCKS + 40)


@given(ranges=st.lists(st.tuples(near_a_page, near_a_page), max_size=12), window=st.tuples(near_a_page, near_a_page))
def test_a_block_map_is_a_set(ranges: list[tuple[int, int]], window: tuple[int, int]) -> None:
    blocks, model = BlockMap(), set()
    for first, end in ranges:
        blocks.add(first, end)
        model |= set(range(first, end))
    first, end = sorted(window)
    runs = list(blocks.runs(first, end))
    assert [n for start, stop, held in runs for n in range(start, stop) if held] == sorted(
        model & set(range(first, end))
    )
    assert [n for start, stop, _ in runs for n in range(start, stop)] == list(range(first, end))
    assert all((n in blocks) == (n in model) for n in (first, end, 0, PAGE_BLOCKS))
    assert first == end or blocks.has_any(first, end) is not model.isdisjoint(range(first, end))


def test_a_trim_of_16_tib_takes_no_memory_to_speak_of(tmp_path: Path) -> None:
    blocks = BlockMap()
    tracemalloc.start()
    try:
        blocks.add(1, 1 << 32)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    assert 0 not in blocks
    assert 1 in blocks
    assert (1 << 32) - 1 in blocks
    blocks = BlockMap()
    blocks.add(0, PAGE_BLOCKS - 1)
    blocks.add(PAGE_BLOCKS - 1, 5 * PAGE_BLOCKS)
    fd = os.open(tmp_path / "map", os.O_RDWR | os.O_CREAT)
    try:
        blocks.save(blocks.changed(), fd, 4096)
        again = BlockMap()
        again.load(fd, 4096)
    finally:
        os.close(fd)
    assert len({id(page) for page in again._pages.values()} | {id(page) for page in blocks._pages.values()}) == 1


def test_the_block_map_stands_where_the_layout_says(tmp_path: Path) -> None:
    overlay = opened(tmp_path)
    overlay.pwrite(9 * BLOCK, b"x" * BLOCK)
    overlay.flush()
    raw = (tmp_path / "disk.blocks").read_bytes()
    assert raw[:8] == b"HVOVERLY"
    assert int.from_bytes(raw[32:40], "little") == 64 * BLOCK
    assert raw[4096:4099] == bytes([0, 0b10, 0])
    assert (tmp_path / "disk.data").read_bytes()[9 * BLOCK : 10 * BLOCK] == b"x" * BLOCK


def test_the_data_is_durable_before_the_map_claims_it(tmp_path: Path, calls: list[str]) -> None:
    overlay = opened(tmp_path)
    overlay.pwrite(0, b"x" * BLOCK)
    calls.clear()
    overlay.flush()
    assert calls == ["overlay:data-sync", "overlay:map", "overlay:header", "overlay:header-sync"]


def test_a_failed_sync_is_final(tmp_path: Path) -> None:
    overlay = opened(tmp_path)
    overlay.pwrite(0, b"x" * BLOCK)

    def fail(label: str, _call: str, _size: int) -> None:
        if label == "overlay:data-sync":
            raise OSError(errno.EIO, "injected")

    system.install(fail)
    try:
        with pytest.raises(OSError, match="injected"):
            overlay.flush()
    finally:
        system.install(None)
    with pytest.raises(OSError, match="an earlier sync failed"):
        overlay.flush()
    overlay.close()
    assert not opened(tmp_path).holds(0), "the map claims what may not be on the disk"


def test_a_shrink_is_in_the_header_before_data_is_cut(tmp_path: Path, calls: list[str]) -> None:
    overlay = opened(tmp_path)
    calls.clear()
    overlay.resize(BLOCK)
    assert calls == ["overlay:header", "overlay:header-sync", "overlay:truncate"]


def test_data_past_the_headers_size_does_not_come_back(tmp_path: Path) -> None:
    overlay = opened(tmp_path)
    overlay.pwrite(0, b"x" * (3 * BLOCK))
    overlay.flush()

    def die(label: str, _call: str, _size: int) -> None:
        if label == "overlay:truncate":
            raise OSError(errno.EIO, "died before the data was cut")

    system.install(die)
    try:
        with pytest.raises(OSError, match="died"):
            overlay.resize(BLOCK)
    finally:
        system.install(None)
    overlay.close()
    overlay = opened(tmp_path)
    overlay.resize(3 * BLOCK)
    found = bytearray(3 * BLOCK)
    assert overlay.pread_into(0, memoryview(found)) == len(found)
    assert found == b"x" * BLOCK + bytes(2 * BLOCK)


def test_an_overlay_is_refused_over_another_point(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(UsageError, match=r"disk\.blocks: .*another recovery point"):
        opened(tmp_path, identity=b"j" * 16)


@pytest.mark.parametrize("position", range(64))
def test_any_flipped_byte_of_the_header_is_found(tmp_path: Path, position: int) -> None:
    opened(tmp_path).close()
    path = tmp_path / "disk.blocks"
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptError, match=r"disk\.blocks"):
        opened(tmp_path)


def test_a_newer_version_is_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("hvfuse.target.overlay._VERSION", 2)
        opened(tmp_path).close()
    with pytest.raises(UnsupportedError, match="version 2"):
        opened(tmp_path)


def test_a_truncated_header_is_corrupt(tmp_path: Path) -> None:
    opened(tmp_path).close()
    os.truncate(tmp_path / "disk.blocks", 40)
    with pytest.raises(CorruptError):
        opened(tmp_path)


def test_only_overlays_are_dropped(tmp_path: Path) -> None:
    opened(tmp_path).close()
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(HvfuseError, match=r"letters\.txt"):
        drop_overlays(str(tmp_path))
    assert (tmp_path / "disk.data").exists()
    (tmp_path / "letters.txt").unlink()
    drop_overlays(str(tmp_path))
    assert not tmp_path.exists()
    drop_overlays(str(tmp_path))
