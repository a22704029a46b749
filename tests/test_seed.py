"""The medium of a first copy: what is written comes back, whatever ended the writing; what was changed is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from hvfuse import seed, system
from hvfuse.errors import (
    BusyError,
    CorruptError,
    HvfuseError,
    NoSpaceError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from hvfuse.frames import EXTENT_DTYPE, FrameWriter
from hvfuse.manifest import CycleKind, CycleManifest, DiskManifest
from hvfuse.medium import SeedReader, SeedWriter, read_manifest
from hvfuse.seed import PIECE, DamagedSeedError, SeedManifest, stored_length

GENERATION = bytes(range(16))
LIMIT = 400_000


def cycle(**changes: object) -> CycleManifest:
    made = CycleManifest(
        vm="web01",
        kind=CycleKind.COPY,
        generation=GENERATION,
        cycle=0,
        previous=None,
        sealed_ns=1_700_000_000_000_000_000,
        disks=(DiskManifest(disk_id=b"D" * 16, name="os.raw", format="raw", size=1 << 30),),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def frame(number: int, length: int) -> bytes:
    """One that does not compress."""
    writer = FrameWriter(generation=GENERATION, cycle=0, level=0)
    table = np.array([(number << 20, length, 1)], EXTENT_DTYPE)
    return writer.encode(disk_id=b"D" * 16, number=number, table=table, data=[random.Random(number).randbytes(length)])


LENGTHS = [
    1,
    200_000,
    65_520 - 128 - 24,
    65_521 - 128 - 24,
    3 * 65_520 - 128 - 24,
    5000,
    300_000,
    8,
    90_000,
    500_000,
    77,
]
FRAMES = {3 * number + 1: frame(3 * number + 1, length) for number, length in enumerate(LENGTHS)}


def write(directory: Path, frames: dict[int, bytes] = FRAMES, *, complete: bool = True) -> None:
    with SeedWriter(str(directory), cycle(), file_limit=LIMIT) as writer:
        for number, raw in frames.items():
            if number not in writer.held:
                writer.append(number, raw)
        if complete:
            writer.complete(cycle())


def read(directory: Path) -> dict[int, bytes]:
    reader = SeedReader(str(directory))
    numbers = reader.verify()
    found = dict(reader.frames())
    assert found.keys() == numbers
    return found


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine") / "medium"
    write(directory)
    return directory


@pytest.fixture
def medium(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "medium"))


def test_what_is_written_is_read_back_in_files_of_bounded_size(pristine: Path) -> None:
    assert read(pristine) == FRAMES
    names = sorted(os.listdir(pristine))
    assert names == [*(f"frames-{number:05}.hvs" for number in range(len(names) - 1)), "manifest.json"]
    assert len(names) > 4
    largest = stored_length(max(map(len, FRAMES.values())))
    assert all(os.path.getsize(pristine / name) < max(LIMIT, largest + 200) for name in names)
    facts = SeedReader(str(pristine)).manifest
    assert (facts.frames, facts.frame_bytes) == (len(FRAMES), sum(map(len, FRAMES.values())))
    assert facts.file_bytes == sum(os.path.getsize(pristine / name) for name in names[:-1])
    told = json.loads((pristine / "manifest.json").read_bytes())
    assert (told["vm"], told["generation"], told["complete"]) == ("web01", GENERATION.hex(), True)
    assert told["disks"] == [{"id": (b"D" * 16).hex(), "name": "os.raw", "format": "raw", "size": 1 << 30}]


def test_frames_lie_on_the_file_as_the_layout_says(pristine: Path) -> None:
    raw = (pristine / "frames-00000.hvs").read_bytes()
    assert raw[:8] == b"HVFSEED\0"
    first = FRAMES[1]
    assert raw[48 : 48 + len(first)] == first
    second = 48 + stored_length(len(first))
    assert raw[second : second + 65_520] == FRAMES[4][:65_520]
    assert raw[second + PIECE : second + PIECE + 100] == FRAMES[4][65_520:65_620]


def test_frames_that_are_held_already_are_left_out(pristine: Path) -> None:
    but = {1, 10, 31}
    assert dict(SeedReader(str(pristine)).frames(but=but)) == {n: raw for n, raw in FRAMES.items() if n not in but}


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ 1 << bit % 8
        file.seek(bit // 8)
        file.write(bytes([byte]))


def interesting_bits(path: Path, dice: random.Random) -> Iterator[int]:
    size = os.path.getsize(path)
    yield from (bit for bit in range(0, min(size, 200) * 8, 67))
    yield from (bit for bit in range(max(0, size - 600) * 8, size * 8, 211))
    yield from (dice.randrange(size * 8) for _ in range(20))


def test_a_flipped_bit_anywhere_is_refused_by_file_and_offset(medium: Path) -> None:
    dice = random.Random(1)
    for name in sorted(os.listdir(medium)):
        path = medium / name
        for bit in interesting_bits(path, dice):
            flip(path, bit)
            with pytest.raises(DamagedSeedError) as caught:
                SeedReader(str(medium)).verify()
            assert caught.value.path == str(path)
            assert caught.value.offset <= bit // 8 < caught.value.offset + PIECE, (name, bit)
            assert f"{path}: damaged at byte {caught.value.offset}: " in str(caught.value)
            assert caught.value.exit_code == 7 and caught.value.hint
            flip(path, bit)
    assert read(medium) == FRAMES


def test_a_flipped_bit_in_a_long_manifest_is_found_in_its_block() -> None:
    disks = tuple(
        DiskManifest(disk_id=number.to_bytes(16), name=f"{number}-\udcff\U0001f4be" * 20, format="raw", size=number)
        for number in range(1, 600)
    )
    manifest = SeedManifest(cycle=cycle(disks=disks), complete=True)
    raw = manifest.pack()
    assert len(raw) > 3 * PIECE
    assert SeedManifest.unpack(raw, "m") == manifest
    dice = random.Random(2)
    for bit in [*(dice.randrange(len(raw) * 8) for _ in range(200)), *range(len(raw) * 8 - 800, len(raw) * 8)]:
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedSeedError) as caught:
            SeedManifest.unpack(bytes(damaged), "m")
        assert caught.value.offset <= bit // 8 < caught.value.offset + PIECE
    for length in [0, 1, PIECE, PIECE + 1, len(raw) - 1]:
        with pytest.raises(DamagedSeedError):
            SeedManifest.unpack(raw[:length], "m")
    with pytest.raises(DamagedSeedError):
        SeedManifest.unpack(raw + b"\n", "m")


def test_missing_and_short_files_are_named(medium: Path) -> None:
    for name in sorted(os.listdir(medium)):
        path = medium / name
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(CorruptError, match=f"{path}: missing"):
            SeedReader(str(medium)).verify()
        path.write_bytes(whole[:-1])
        with pytest.raises(CorruptError, match=f"{path}: "):
            SeedReader(str(medium)).verify()
        path.write_bytes(whole)
    shutil.rmtree(medium)
    with pytest.raises(NotFoundError):
        SeedReader(str(medium))


def test_a_file_of_another_place_or_another_export_is_refused(medium: Path, tmp_path: Path) -> None:
    first, second = medium / "frames-00000.hvs", medium / "frames-00001.hvs"
    raw = first.read_bytes()
    first.write_bytes(raw.ljust(os.path.getsize(second), b"\0"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptError, match="frames-00000"):
        SeedReader(str(medium)).verify()
    # A file of the same export, whole in itself, with other frames in it.
    other = tmp_path / "other"
    write(other, {number + 1: frame(number + 1, length) for number, length in zip(FRAMES, LENGTHS, strict=True)})
    assert os.path.getsize(other / "frames-00000.hvs") == len(raw)
    shutil.copy(other / "frames-00000.hvs", first)
    with pytest.raises(CorruptError, match="another of this export"):
        SeedReader(str(medium)).verify()


def test_a_medium_that_was_not_finished_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / "m", complete=False)
    with pytest.raises(UsageError, match="not finished") as caught:
        SeedReader(str(tmp_path / "m"))
    assert "hvfuse seed export web01 DIR" in str(caught.value.hint)


def test_a_newer_version_is_refused(medium: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_manifest(str(medium))
    assert found is not None
    monkeypatch.setattr(seed, "VERSION", 2)
    (medium / "manifest.json").write_bytes(found.pack())
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match="version 2"):
        SeedReader(str(medium))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "[" * 100_000,
        '{"hvfuse_seed": 1, "disks": [1]}',
        '{"hvfuse_seed": 1, "disks": [], "files": [{"size": Infinity, "frames": 1, "digest": ""}]}',
    ],
)
def test_a_manifest_whose_checksums_are_right_and_that_is_nonsense_is_refused(text: str) -> None:
    body = text.removesuffix("}").encode() + b","
    sums = b" ".join(xxhash.xxh3_64_hexdigest(body[at : at + PIECE]).encode() for at in range(0, len(body), PIECE))
    line = b'\n "check": "' + sums + b" "
    raw = body + line + xxhash.xxh3_64_hexdigest(line).encode() + b'"\n}\n'
    with pytest.raises(CorruptError, match="makes no sense"):
        SeedManifest.unpack(raw, "m")


class Killed(BaseException):
    pass


def dying(at: int, short: int | None = None) -> system.Injector:
    calls = 0

    def injector(label: str, call: str, size: int) -> int | None:
        nonlocal calls
        if label.startswith("seed:"):
            calls += 1
            if calls == at:
                if short is not None and call == "pwrite":
                    return int(size * short / 8)
                raise Killed
        return None

    return injector


@pytest.mark.parametrize("short", [None, 3])
def test_killed_at_every_call_it_goes_on_and_repeats_at_most_the_frame_in_flight(
    tmp_path: Path, short: int | None
) -> None:
    done, kill = False, 0
    while not done:
        kill += 1
        directory = tmp_path / str(kill)
        put: list[int] = []
        system.install(dying(kill, short))
        try:
            done = attempt(directory, put)
        finally:
            system.install(None)
        attempt(directory, put)
        assert read(directory) == FRAMES
        assert len(put) <= len(FRAMES) + (not done), (kill, put)
        again: list[int] = []
        attempt(directory, again)
        assert again == []
        shutil.rmtree(directory)
    assert kill > 3 * len(FRAMES)


def attempt(directory: Path, put: list[int]) -> bool:
    try:
        with SeedWriter(str(directory), cycle(), file_limit=LIMIT) as writer:
            for number in FRAMES.keys() - writer.held:
                put.append(number)
                writer.append(number, FRAMES[number])
            writer.complete(cycle())
    except (Killed, HvfuseError):
        return False
    return True


def test_a_tail_torn_at_any_byte_is_cut(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    few = {number: FRAMES[number] for number in (1, 4, 22)}
    write(whole, few, complete=False)
    raw = (whole / "frames-00000.hvs").read_bytes()
    ends = list(np.cumsum([48, *(stored_length(len(each)) for each in few.values())]))
    dice = random.Random(3)
    for cut in {*ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1]), *dice.sample(range(len(raw)), 60)}:
        directory = tmp_path / str(cut)
        shutil.copytree(whole, directory)
        # What was not written yet, or comes back as anything at all after a loss of power.
        junk = bytes(len(raw) - cut) if dice.randrange(2) else dice.randbytes(dice.randrange(2000))
        (directory / "frames-00000.hvs").write_bytes(raw[:cut] + junk)
        with SeedWriter(str(directory), cycle(), file_limit=LIMIT) as writer:
            assert len(writer.held) == sum(end <= cut for end in ends[1:])
            for number in few.keys() - writer.held:
                writer.append(number, few[number])
            writer.complete(cycle())
        assert read(directory) == few


def test_a_full_medium_is_a_clear_error_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    def full(label: str, call: str, size: int) -> int | None:
        if label == "seed:append" and size > 250_000:
            raise OSError(28, "No space left on device")
        return None

    system.install(full)
    try:
        with pytest.raises(NoSpaceError, match=r"frames-00001\.hvs: the medium is full") as caught:
            write(tmp_path / "m")
    finally:
        system.install(None)
    assert "goes on" in str(caught.value.hint)
    moved = shutil.move(tmp_path / "m", tmp_path / "larger")
    with SeedWriter(str(moved), cycle(), file_limit=LIMIT) as writer:
        assert writer.held
    write(Path(moved))
    assert read(Path(moved)) == FRAMES


def test_a_file_that_could_not_be_synced_is_not_believed_afterwards(tmp_path: Path) -> None:
    def broken(label: str, call: str, size: int) -> int | None:
        if label == "seed:data-sync":
            raise OSError(5, "Input/output error")
        return None

    system.install(broken)
    try:
        with pytest.raises(HvfuseError, match="Input/output error"):
            write(tmp_path / "m")
    finally:
        system.install(None)
    with SeedWriter(str(tmp_path / "m"), cycle(), file_limit=LIMIT) as writer:
        assert writer.held == frozenset()
    write(tmp_path / "m")
    assert read(tmp_path / "m") == FRAMES


def test_a_damaged_file_that_was_finished_is_named_when_the_export_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "m", complete=False)
    path = tmp_path / "m" / "frames-00000.hvs"
    flip(path, os.path.getsize(path) * 8 - 100)
    with pytest.raises(DamagedSeedError, match=str(path)):
        write(tmp_path / "m")


def test_a_directory_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"not empty: holiday\.jpg"):
        write(tmp_path)
    assert os.listdir(tmp_path) == ["holiday.jpg"]
    (tmp_path / "holiday.jpg").unlink()
    for left in ("lost+found", ".Trash-1000"):
        (tmp_path / left).mkdir()
    write(tmp_path)
    assert read(tmp_path) == FRAMES


@pytest.mark.parametrize(
    "changes",
    [
        {"vm": "db"},
        {"generation": b"x" * 16},
        {"disks": (DiskManifest(disk_id=b"E" * 16, name="os.raw", format="raw", size=1),)},
    ],
)
def test_a_medium_of_something_else_is_refused_and_kept(medium: Path, changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="holds an"), SeedWriter(str(medium), cycle(**changes)):
        pass
    assert read(medium) == FRAMES


def test_two_do_not_export_into_the_same_directory_at_once(tmp_path: Path) -> None:
    with SeedWriter(str(tmp_path / "m"), cycle()), pytest.raises(BusyError):
        SeedWriter(str(tmp_path / "m"), cycle())
    SeedWriter(str(tmp_path / "m"), cycle()).close()


def test_what_was_discarded_leaves_an_empty_directory(tmp_path: Path) -> None:
    with SeedWriter(str(tmp_path / "m"), cycle(), file_limit=LIMIT) as writer:
        for number, raw in FRAMES.items():
            writer.append(number, raw)
        writer.discard()
    assert os.listdir(tmp_path / "m") == []


def test_nothing_is_put_twice_or_after_the_end(medium: Path) -> None:
    with SeedWriter(str(medium), cycle()) as writer:
        assert writer.held == FRAMES.keys()
        with pytest.raises(UsageError):
            writer.append(2, FRAMES[1])
        assert writer.complete(cycle()) == SeedReader(str(medium)).manifest
