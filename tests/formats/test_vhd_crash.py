"""A new block of a dynamic disk, stopped at every step: by a kill, a failed call, a power cut."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvfuse import system
from hvfuse.errors import CorruptError
from hvfuse.formats.image import Image, ImageFormat, open_image, probe
from tests.formats.disk_samples import BLOCK, content, pattern, qemu_content, small_dynamic

NEW = (0, 5, 9)
"""Blocks that get allocated."""


class Killed(BaseException):
    """The process ends here; no handler may help."""


@pytest.fixture(autouse=True)
def _no_injector_stays() -> Iterator[None]:
    yield
    system.install(None)


def grow(disk: Image) -> None:
    """Write into blocks that are not there yet, and into one that is."""
    for index in NEW:
        disk.pwrite(index * BLOCK + 10, pattern(2000, index))
    disk.pwrite(2 * BLOCK, pattern(100, 77))
    disk.flush()


def grown(model: bytes) -> bytes:
    """What a disk that held `model` holds after `grow`."""
    after = bytearray(model)
    for index in NEW:
        after[index * BLOCK + 10 : index * BLOCK + 2010] = pattern(2000, index)
    after[2 * BLOCK : 2 * BLOCK + 100] = pattern(100, 77)
    return bytes(after)


def calls(folder: Path) -> list[tuple[str, str]]:
    """(label, call) of everything that `grow` does, in order."""
    path = folder / "counted.vhd"
    small_dynamic(path)
    seen: list[tuple[str, str]] = []
    disk = open_image(str(path), writable=True)
    system.install(lambda label, call, _: seen.append((label, call)))
    grow(disk)
    system.install(None)
    disk.close()
    return seen


def assert_old_or_new(read: bytes, before: bytes, after: bytes) -> None:
    """Each byte is the old one or the new one, and what was not written is as it was."""
    wrong = [at for at in range(len(before)) if read[at] not in (before[at], after[at])]
    assert not wrong, f"{len(wrong)} bytes are neither old nor new, the first at {wrong[0]}"


def test_a_new_block_is_written_in_the_order_that_its_docstring_gives(tmp_path: Path) -> None:
    assert calls(tmp_path)[:6] == [
        ("vhd:footer", "pwrite"),
        ("vhd:footer-sync", "fdatasync"),
        ("vhd:bitmap", "pwrite"),
        ("vhd:data", "pwrite"),
        ("vhd:block-sync", "fdatasync"),
        ("vhd:entry", "pwrite"),
    ]


@pytest.mark.qemu
def test_a_kill_at_any_step_leaves_a_whole_disk(tmp_path: Path) -> None:
    for step in range(len(calls(tmp_path))):
        path = tmp_path / f"killed-{step}.vhd"
        before = small_dynamic(path)
        disk = open_image(str(path), writable=True)
        system.install(_at_step(step, Killed()))
        with pytest.raises(Killed):
            grow(disk)
        system.install(None)
        disk.close()
        assert not probe(str(path)).damage
        read = content(path)
        assert_old_or_new(read, before, grown(before))
        assert qemu_content(path, ImageFormat.VHD_DYNAMIC) == read
        again = open_image(str(path), writable=True)
        grow(again)
        again.close()
        assert content(path) == grown(before) == qemu_content(path, ImageFormat.VHD_DYNAMIC)


@pytest.mark.parametrize("short", [False, True])
def test_a_call_that_fails_once_spoils_nothing_and_the_write_can_be_repeated(tmp_path: Path, short: bool) -> None:
    for step, (_, call) in enumerate(calls(tmp_path)):
        path = tmp_path / f"failed-{step}.vhd"
        before = small_dynamic(path)
        disk = open_image(str(path), writable=True)
        system.install(_at_step(step, 3 if short and call == "pwrite" else OSError(errno.ENOSPC, "no space")))
        with pytest.raises(OSError):
            grow(disk)
        system.install(None)
        assert_old_or_new(disk.pread(0, disk.size), before, grown(before))
        assert not probe(str(path)).damage
        grow(disk)
        assert disk.pread(0, disk.size) == grown(before)
        disk.close()
        assert content(path) == grown(before)
        assert not probe(str(path)).damage


def _at_step(step: int, outcome: BaseException | int) -> system.Injector:
    """Break the call of that number, counted from 0."""
    count = itertools.count()

    def inject(label: str, call: str, size: int) -> int | None:
        if next(count) != step:
            return None
        if isinstance(outcome, BaseException):
            raise outcome
        if size <= 4:  # a table entry lies within one sector: it is written, or it is not
            raise OSError(errno.EIO, "no byte written")
        return outcome

    return inject


@dataclass(frozen=True)
class Step:
    """What one call made of the file; `sync` calls change nothing."""

    call: str
    before: bytes
    after: bytes


def steps_of(path: Path, *, ordered: bool) -> list[Step]:
    """Every call of `grow`, with the file as it was and as it became."""
    names: list[str] = []
    states: list[bytes] = []

    def record(label: str, call: str, size: int) -> None:
        names.append(call)
        states.append(path.read_bytes())

    disk = open_image(str(path), writable=True, ordered=ordered)
    system.install(record)
    grow(disk)
    system.install(None)
    disk.close()
    states.append(path.read_bytes())
    return [Step(name, *pair) for name, pair in zip(names, itertools.pairwise(states), strict=True)]


def after_power_cuts(steps: list[Step]) -> Iterator[bytes]:
    """The files that a power cut may leave: of the writes since the last sync, any may be missing."""
    durable, pending = steps[0].before, list[Step]()
    for step in steps:
        if step.call != "pwrite":
            durable, pending = step.before, []
            continue
        pending.append(step)
        assert len(pending) < 15
        for kept in itertools.product((False, True), repeat=len(pending) - 1):
            yield _apply(durable, [*itertools.compress(pending, kept), step])


def _apply(durable: bytes, writes: list[Step]) -> bytes:
    file = bytearray(durable)
    for write in writes:
        file.extend(bytes(max(0, len(write.after) - len(file))))
        old = write.before.ljust(len(write.after), b"\0")
        for at in range(0, len(write.after), 512):
            if write.after[at : at + 512] != old[at : at + 512]:
                file[at : at + 512] = write.after[at : at + 512]
    return bytes(file)


def survives_power_cuts(folder: Path, *, ordered: bool) -> bool:
    """Whether each file that a power cut may leave is whole, and holds the old or the new disk."""
    before = small_dynamic(folder / "start.vhd")
    path = folder / "cut.vhd"
    for file in after_power_cuts(steps_of(folder / "start.vhd", ordered=ordered)):
        path.write_bytes(file)
        try:
            assert not probe(str(path)).damage
            assert_old_or_new(content(path), before, grown(before))
        except (AssertionError, CorruptError):
            return False
    return True


def test_a_power_cut_at_any_step_leaves_a_whole_disk(tmp_path: Path) -> None:
    assert survives_power_cuts(tmp_path, ordered=True)


def test_without_the_syncs_between_the_steps_a_power_cut_would_not(tmp_path: Path) -> None:
    """The judge of the test above finds what it is there to find."""
    assert not survives_power_cuts(tmp_path, ordered=False)
