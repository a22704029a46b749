"""What the death of a process, of the host, or of a sync costs a first copy, and that it costs nothing else."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import xxhash

from hvfuse import system
from hvfuse.errors import BusyError, HvfuseError, NoSpaceError
from hvfuse.frames import EXTENT_DTYPE, Fill, FrameWriter, decode
from hvfuse.manifest import CycleKind, CycleManifest
from hvfuse.position import PositionMismatchError
from hvfuse.target import direct, schema, unsynced
from hvfuse.target.check import check
from hvfuse.target.local import SMALL_FRAMES, LocalReplica
from hvfuse.target.store import Store
from hvfuse.target.unsynced import ENTRY_SIZE, HEAD_SIZE, UnsyncedFrames, WrittenFrame
from tests.target.clock import Hand
from tests.target.model import Source, check_points, send

SIZES = {"a.raw": 150_000, "b.raw": 9_000}


@pytest.fixture
def clock() -> Hand:
    return Hand()


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def store(path, clock) -> Iterator[Store]:
    with Store(path, clock=clock) as store:
        yield store


@pytest.fixture
def source() -> Source:
    source = Source("vm", SIZES, seed=5)
    for name, size in SIZES.items():
        source.write(name, 0, source.random.randbytes(size - 100))
    return source


@pytest.fixture(autouse=True)
def no_injector() -> Iterator[None]:
    yield
    system.install(None)


def part(replica: LocalReplica, manifest: CycleManifest, frames: list[bytes], count: int) -> None:
    """A process that puts some frames and goes."""
    replica.begin(manifest)
    for frame in frames[:count]:
        replica.put(frame)
    replica.close()


def finish(store: Store, source: Source, manifest: CycleManifest, frames: list[bytes]) -> None:
    """The copy ends, a cycle follows, and the point and the images are right."""
    replica = LocalReplica(store, "vm")
    send(replica, manifest, frames)
    source.end_copy(manifest)
    for name, data in source.disks.items():
        with open(store.image_path("vm", name), "rb") as image:
            assert image.read() == data
    source.ship_to(replica)
    check_points(store, source)
    assert check(store).findings == ()
    assert not os.path.exists(store.unsynced_path("vm"))
    replica.close()


@contextmanager
def failing(label: str, error: int, *, times: int | None = None) -> Iterator[None]:
    """The first calls with that label fail; `times` None: every one does."""
    calls = itertools.count()

    def injector(seen: str, call: str, size: int) -> int | None:
        if seen == label and (times is None or next(calls) < times):
            raise OSError(error, os.strerror(error))
        return None

    system.install(injector)
    try:
        yield
    finally:
        system.install(None)


@contextmanager
def labels() -> Iterator[list[str]]:
    """The labels passed, in order."""
    seen: list[str] = []
    system.install(lambda label, call, size: seen.append(label))
    try:
        yield seen
    finally:
        system.install(None)


# The process dies


def child_that_puts(path: str, manifest: CycleManifest, frames: list[bytes]) -> tuple[int, int, int]:
    """A process that takes the copy up. It tells each frame before it puts it, and waits for leave to do so.
    Returns its pid, and the descriptors to read from and to give leave to."""
    told, tell = os.pipe()
    wait, allow = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        os.close(wait)
        return child, told, allow
    try:
        with Store(path) as store:
            replica = LocalReplica(store, "vm")
            held = replica.begin(manifest)
            for number, frame in enumerate(frames):
                if number not in held:
                    os.write(tell, number.to_bytes(4, "little"))
                    os.read(wait, 1)
                    replica.put(frame)
            os.write(tell, b"done")
            signal.pause()
    finally:
        os._exit(1)


def killed_until_done(path: str, manifest: CycleManifest, frames: list[bytes], dice: random.Random) -> tuple[list, int]:
    """Processes take the copy up and are killed while they put a frame, until one has put all. Returns the
    numbers of the frames, as often as they were put, and how many processes there were."""
    puts: list[int] = []
    kills, done = 0, False
    while not done:
        pid, told, allow = child_that_puts(path, manifest, frames)
        for _ in range(dice.randrange(1, 16)):
            number = os.read(told, 4)
            done = number == b"done"
            if done:
                break
            puts.append(int.from_bytes(number, "little"))
            os.write(allow, b"!")
        for _ in range(dice.randrange(20_000)):  # the kill may come anywhere in a put, or after it
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told)
        os.close(allow)
        kills += 1
    return puts, kills


@pytest.mark.parametrize("batch", [128 << 20, 300_000])
def test_killed_again_and_again_no_more_than_the_frame_in_flight_is_put_twice(path, batch, monkeypatch):
    monkeypatch.setattr(direct, "BATCH", batch)
    dice = random.Random(batch)
    source = Source("vm", {"a.raw": 3000 * 2 * 100})
    source.write("a.raw", 0, dice.randbytes(3000 * 2 * 100))
    manifest, frames = source.begin_copy()
    puts, kills = killed_until_done(path, manifest, frames, dice)
    assert kills >= 8
    assert set(puts) == set(range(len(frames)))
    assert len(puts) <= len(frames) + kills
    with Store(path) as store:
        replica = LocalReplica(store, "vm")
        assert replica.begin(manifest) == frozenset(range(len(frames)))
        replica.close()
        finish(store, source, manifest, frames)


def test_killed_at_any_step_every_frame_whose_put_had_returned_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(direct, "BATCH", 2 * direct.PENDING_OVERHEAD)
    source = Source("vm", {"a.raw": 3000 * 2 * 5})
    source.write("a.raw", 0, random.Random(2).randbytes(3000 * 2 * 5))
    manifest, frames = source.begin_copy()
    for step in itertools.count(1):
        path = str(tmp_path / str(step))
        returned = frames_put_until(path, manifest, frames, step)
        with Store(path) as store:
            replica = LocalReplica(store, "vm")
            assert set(range(returned)) <= replica.begin(manifest) <= set(range(returned + 1)), step
            replica.close()
        if returned == len(frames):
            break
    assert step > 20


def frames_put_until(path: str, manifest: CycleManifest, frames: list[bytes], step: int) -> int:
    """Put frames in a process that dies at the labelled call number `step`. How many puts returned."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)
        try:
            with Store(path) as store:
                replica = LocalReplica(store, "vm")
                system.install(lambda label, call, size: os._exit(9) if next(calls) == step else None)
                replica.begin(manifest)
                for frame in frames:
                    replica.put(frame)
                    os.write(tell, b"!")
        finally:
            os._exit(0)
    os.close(tell)
    os.waitpid(child, 0)
    returned = len(os.read(told, 100))
    os.close(told)
    return returned


def test_a_copy_of_differences_that_is_killed_repeats_no_more_either(path):
    dice = random.Random(1)
    source = Source("vm", {"a.raw": 3000 * 2 * 80})
    with Store(path) as store:
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        source.ship_to(replica)
        replica.close()
        source.write("a.raw", 0, dice.randbytes(3000 * 2 * 80))
        _, frames = source.begin_copy()
        manifest = source.manifest(CycleKind.COPY, previous=source.position)
    puts, kills = killed_until_done(path, manifest, frames, dice)
    assert kills >= 5
    assert set(puts) == set(range(len(frames)))
    assert len(puts) <= len(frames) + kills
    with Store(path) as store:
        replica = LocalReplica(store, "vm")
        send(replica, manifest, frames)
        source.end_copy(manifest)
        source.ship_to(replica)
        check_points(store, source)
        assert check(store).findings == ()
        replica.close()


def test_what_an_earlier_process_wrote_is_synced_before_it_counts_for_good(store, source):
    manifest, frames = source.begin_copy()
    part(LocalReplica(store, "vm"), manifest, frames, 5)
    again = LocalReplica(store, "vm")
    with labels() as seen:
        assert again.begin(manifest) == frozenset(range(5))
    assert seen.count("store:image-sync") == len(SIZES)
    syncs = [at for at, label in enumerate(seen) if label in ("store:image-sync", "store:filesystem-sync")]
    assert max(syncs) < seen.index("store:held:before") < seen.index("store:unsynced-start")
    again.close()
    os.unlink(store.unsynced_path("vm"))
    assert LocalReplica(store, "vm").begin(manifest) == frozenset(range(5))
    finish(store, source, manifest, frames)


def test_frames_without_data_count_once_they_are_durable_and_no_others_are_put_again(path, monkeypatch):
    source = Source("vm", {"a.raw": 10 * 3000})
    source.write("a.raw", 0, source.random.randbytes(10 * 3000))
    for number in (1, 5, 7):
        source.zero("a.raw", number * 3000, 3000)
    source.begin_copy()
    disk = source.disks["a.raw"]
    pieces = [(at, 3000, bytes(disk[at : at + 3000])) for at in range(0, len(disk), 3000)]
    frames = source.frames({"a.raw": [(at, n, data if any(data) else None) for at, n, data in pieces]}, per_frame=1)
    manifest = source.manifest(CycleKind.COPY, previous=None)
    with Store(path) as store:
        part(LocalReplica(store, "vm"), manifest, frames, 8)
        assert LocalReplica(store, "vm").begin(manifest) == {0, 2, 3, 4, 6}  # held for good by now
        monkeypatch.setattr(direct, "BATCH", 3 * direct.PENDING_OVERHEAD)
        replica = LocalReplica(store, "vm")
        replica.begin(manifest)
        for number in (1, 5, 7):  # a batch
            replica.put(frames[number])
        replica.close()
        assert LocalReplica(store, "vm").begin(manifest) == frozenset(range(8))
        finish(store, source, manifest, frames)


def test_a_frame_that_was_not_wholly_written_is_not_noted(store, source):
    manifest, frames = source.begin_copy()
    replica = LocalReplica(store, "vm")
    replica.begin(manifest)
    replica.put(frames[0])
    with failing("store:image", errno.ENOSPC), pytest.raises(NoSpaceError):
        replica.put(frames[1])
    with failing("store:unsynced", errno.ENOSPC), pytest.raises(NoSpaceError):
        replica.put(frames[2])
    replica.put(frames[3])
    replica.close()
    assert LocalReplica(store, "vm").begin(manifest) == {0, 3}
    finish(store, source, manifest, frames)


# The host dies


def test_after_a_reboot_the_note_says_nothing(store, source, monkeypatch):
    manifest, frames = source.begin_copy()
    part(LocalReplica(store, "vm"), manifest, frames, 5)
    for name in SIZES:  # the page cache is gone
        os.truncate(store.image_path("vm", name), 0)
    monkeypatch.setattr(system, "boot_id", lambda: b"another boot id!")
    again = LocalReplica(store, "vm")
    assert again.begin(manifest) == frozenset()
    again.close()
    finish(store, source, manifest, frames)


def test_a_reboot_keeps_what_was_durable(store, source, monkeypatch):
    monkeypatch.setattr(direct, "BATCH", 2 * direct.PENDING_OVERHEAD)
    manifest, frames = source.begin_copy()
    part(LocalReplica(store, "vm"), manifest, frames, 5)
    monkeypatch.setattr(system, "boot_id", lambda: b"another boot id!")
    again = LocalReplica(store, "vm")
    assert again.begin(manifest) == frozenset(range(4))
    again.close()
    finish(store, source, manifest, frames)


ENTRIES = tuple(
    WrittenFrame(number=number, disk=number % 2, offset=number << 40, length=number << 16, checksum=(1 << 64) - number)
    for number in (7, 3, 11, 5)
)


@pytest.fixture
def note(store, source) -> UnsyncedFrames:
    """A note of the frames 7, 3, 11 and 5, closed."""
    replica = LocalReplica(store, "vm")
    replica.begin(source.begin_copy()[0])
    note = replica._direct._unsynced
    for entry in ENTRIES:
        note.append(entry)
    replica.close()
    assert note.read() == ENTRIES
    return note


def test_a_note_that_is_cut_off_anywhere_tells_of_the_frames_before_the_cut(store, note):
    path = store.unsynced_path("vm")
    with open(path, "rb") as file:
        whole = file.read()
    for length in range(len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:length])
        assert note.read() == ENTRIES[: max(0, length - HEAD_SIZE) // ENTRY_SIZE]


def test_a_note_with_any_byte_wrong_tells_of_no_frame_from_there_on(store, note):
    path = store.unsynced_path("vm")
    with open(path, "rb") as file:
        whole = file.read()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x40
        with open(path, "wb") as file:
            file.write(damaged)
        good = 0 if at < HEAD_SIZE else (at - HEAD_SIZE) // ENTRY_SIZE
        assert note.read() == ENTRIES[:good]


@pytest.mark.parametrize("change", [{"generation": b"x" * 16}, {"seq": 9}, {"stage_id": b"y" * 8}])
def test_a_note_counts_for_the_very_copy_that_wrote_it(store, note, change):
    vm = store.vm("vm")
    with store.env.read() as txn:
        staging = store.load_staging(txn, vm)
    assert UnsyncedFrames(store, "vm", staging).read() == ENTRIES
    assert UnsyncedFrames(store, "vm", dataclasses.replace(staging, **change)).read() == ()


def test_entries_in_the_place_of_others_do_not_count(store, note):
    path = store.unsynced_path("vm")
    with open(path, "rb") as file:
        whole = file.read()
    head, first, rest = whole[:HEAD_SIZE], whole[HEAD_SIZE : HEAD_SIZE + ENTRY_SIZE], whole[HEAD_SIZE + ENTRY_SIZE :]
    for misplaced, good in ((rest, ()), (rest + first, ()), (first + first + rest, ENTRIES[:1])):
        with open(path, "wb") as file:
            file.write(head + misplaced)
        assert note.read() == good


@pytest.mark.parametrize(("version", "counts"), [(unsynced.VERSION, True), (1, False), (3, False)])
def test_a_note_of_another_version_tells_of_nothing(store, note, version, counts):
    path = store.unsynced_path("vm")
    raw = bytearray(Path(path).read_bytes())
    raw[4:6] = version.to_bytes(2, "little")
    seed = xxhash.xxh3_64_intdigest(raw[:56])
    raw[56:64] = seed.to_bytes(8, "little")
    for at in range(HEAD_SIZE, len(raw), ENTRY_SIZE):
        checksum = xxhash.xxh3_64_intdigest(raw[at : at + ENTRY_SIZE - 8], seed)
        raw[at + ENTRY_SIZE - 8 : at + ENTRY_SIZE] = checksum.to_bytes(8, "little")
    Path(path).write_bytes(raw)
    assert note.read() == (ENTRIES if counts else ())


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_a_note_that_is_no_plain_file_is_not_followed(store, note, tmp_path, kind):
    path = store.unsynced_path("vm")
    os.rename(path, tmp_path / "elsewhere")
    if kind == "link":
        os.symlink(tmp_path / "elsewhere", path)
    else:
        os.mkdir(path) if kind == "directory" else os.mkfifo(path)
    assert note.read() == ()


def test_a_copy_dropped_for_another_and_begun_again_has_nothing(store, source):
    manifest, frames = source.begin_copy()
    part(LocalReplica(store, "vm"), manifest, frames, 5)
    part(LocalReplica(store, "vm"), dataclasses.replace(manifest, generation=b"o" * 16), frames, 0)
    again = LocalReplica(store, "vm")
    assert again.begin(manifest) == frozenset()
    again.close()
    finish(store, source, manifest, frames)


# A sync fails


def test_after_a_failed_sync_nothing_that_it_should_have_covered_counts_and_no_later_one_is_believed(
    store, source, monkeypatch
):
    monkeypatch.setattr(direct, "BATCH", 3 * direct.PENDING_OVERHEAD)
    manifest, frames = source.begin_copy()
    replica = LocalReplica(store, "vm")
    replica.begin(manifest)
    for frame in frames[:5]:  # the first three are durable
        replica.put(frame)
    with failing("store:image-sync", errno.EIO), pytest.raises(HvfuseError, match="Input/output"):
        replica.put(frames[5])
    for act in (lambda: replica.put(frames[6]), lambda: replica.commit(manifest, len(frames))):
        with pytest.raises(HvfuseError, match="could not be synced"):
            act()
    assert not os.path.exists(store.unsynced_path("vm"))
    assert replica.begin(manifest) == {0, 1, 2}
    replica.close()
    finish(store, source, manifest, frames)


@pytest.mark.parametrize("label", ["store:image-sync", "store:filesystem-sync", "store:folder-sync"])
def test_where_what_an_earlier_process_wrote_cannot_be_synced_it_is_put_again(store, source, label, caplog):
    manifest, frames = source.begin_copy()
    part(LocalReplica(store, "vm"), manifest, frames, 5)
    again = LocalReplica(store, "vm")
    with failing(label, errno.EIO, times=1):
        assert again.begin(manifest) == frozenset()
    assert "5 frames that were not durable yet count as lost" in caplog.text
    again.close()
    assert LocalReplica(store, "vm").begin(manifest) == frozenset()
    finish(store, source, manifest, frames)


@pytest.mark.parametrize("broken", [["store:unsynced-drop"], ["store:unsynced-drop", "store:unsynced-cut"]])
def test_where_the_note_cannot_be_removed_after_a_failed_sync_no_frame_that_was_lost_counts(
    store, source, monkeypatch, caplog, broken
):
    monkeypatch.setattr(direct, "BATCH", 6 * direct.PENDING_OVERHEAD)
    manifest, frames = source.begin_copy()
    replica = LocalReplica(store, "vm")
    replica.begin(manifest)
    for frame in frames[:5]:
        replica.put(frame)

    def injector(label: str, call: str, size: int) -> None:
        if label in ("store:image-sync", *broken):
            raise OSError(errno.EIO, "Input/output error")

    system.install(injector)
    with pytest.raises(HvfuseError, match=r"a\.raw: Input/output"):  # the sync's
        replica.put(frames[5])
    system.install(None)
    assert "could not be removed" in caplog.text
    replica.close()
    damage(store, "a.raw", 6000)  # of frame 1
    kept = {0, 2, 3, 4, 5} if "store:unsynced-cut" in broken else set()
    again = LocalReplica(store, "vm")
    assert again.begin(manifest) == kept
    again.close()
    finish(store, source, manifest, frames)


# The same boot, but not the same page cache


def damage(store: Store, name: str, offset: int) -> None:
    """Change a byte behind everybody's back."""
    with open(store.image_path("vm", name), "r+b") as image:
        image.seek(offset)
        byte = image.read(1)[0]
        image.seek(offset)
        image.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("at", [0, 5999, 6000, 11_999, 12_000])
def test_a_frame_of_which_any_byte_is_not_in_the_image_is_put_again(store, source, caplog, at):
    manifest, frames = source.begin_copy()
    part(LocalReplica(store, "vm"), manifest, frames, 5)
    damage(store, "a.raw", at)
    again = LocalReplica(store, "vm")
    assert again.begin(manifest) == set(range(5)) - {at // 6000}
    assert "1 frames that were not durable yet are not in the replica images" in caplog.text
    again.close()
    finish(store, source, manifest, frames)


def test_images_that_became_shorter_or_went_hold_no_frame(store, source, caplog):
    manifest, frames = source.begin_copy()
    for lose, left in ((lambda path: os.truncate(path, 12_500), {0, 1}), (os.unlink, set())):
        part(LocalReplica(store, "vm"), manifest, frames, 0)
        part(LocalReplica(store, "vm"), dataclasses.replace(manifest, generation=b"o" * 16), frames, 0)
        part(LocalReplica(store, "vm"), manifest, frames, 5)
        lose(store.image_path("vm", "a.raw"))
        again = LocalReplica(store, "vm")
        assert again.begin(manifest) == left
        again.close()
    finish(store, source, manifest, frames)
    assert "count as lost" in caplog.text


def test_frames_of_holes_and_gaps_are_found_again_whatever_lies_around_them(store, clock):
    source = Source("vm", {"a.raw": 400_000})
    manifest, _ = source.begin_copy()
    dice = source.random
    pieces = [
        (0, 5000, None), (5000, 100, dice.randbytes(100)),  # begins with zeroes
        (10_000, 10, dice.randbytes(10)), (50_000, 10, dice.randbytes(10)),  # a gap
        (60_000, 10, dice.randbytes(10)), (60_010, 90_000, None),  # ends with zeroes, beyond the image's end
        (300_000, 10, dice.randbytes(10)),  # makes it longer
    ]  # fmt: skip
    for at, length, data in pieces:
        source.disks["a.raw"][at : at + length] = data or bytes(length)
    frames = source.frames({"a.raw": pieces})
    part(LocalReplica(store, "vm"), manifest, frames, 4)
    assert LocalReplica(store, "vm").begin(manifest) == {0, 1, 2, 3}
    finish(store, source, manifest, frames)


@pytest.mark.parametrize("zeroes", [1, 4096, 3 << 20])
def test_what_a_frame_without_gaps_left_is_known_without_reading_it(tmp_path, zeroes):
    source = Source("vm", {"a.raw": 8 << 20}, seed=zeroes)
    source.begin_copy()
    pieces = [(0, 10, b"1" * 10), (10, zeroes, None), (10 + zeroes, 5000, source.random.randbytes(5000))]
    pieces.append((pieces[-1][0] + 5000, zeroes, None))
    (raw,) = source.frames({"a.raw": pieces}, per_frame=4)
    frame = decode(raw)
    with open(tmp_path / "image", "w+b") as image:
        for offset, length, data in pieces[:3]:
            image.seek(offset)
            image.write(data or bytes(length))
        image.flush()
        os.fsync(image.fileno())
        written = WrittenFrame.of(frame, 3, -1)
        assert written is not None and (written.offset, written.length) == (0, 5010 + 2 * zeroes)
        assert written.is_in(image.fileno())
        image.truncate(5009 + zeroes)
        assert not written.is_in(image.fileno())


def test_a_frame_whose_extents_lie_far_apart_counts_once_it_is_durable(store):
    source = Source("vm", {"a.raw": 0})
    manifest, _ = source.begin_copy()
    manifest = dataclasses.replace(manifest, disks=(dataclasses.replace(manifest.disks[0], size=2 << 40),))
    frames = source.frames({"a.raw": [(0, 1, b"a"), (1 << 40, 1, b"b"), (2, 1, b"c")]})
    part(LocalReplica(store, "vm"), manifest, frames, 2)
    assert LocalReplica(store, "vm").begin(manifest) == {1}


def test_what_an_earlier_copy_left_is_gone_for_good_before_any_frame_is_noted(store, source):
    manifest, frames = source.begin_copy()
    part(LocalReplica(store, "vm"), manifest, frames, 5)
    other = dataclasses.replace(manifest, generation=b"o" * 16)
    replica = LocalReplica(store, "vm")
    with labels() as seen:
        replica.begin(other)
    replica.close()
    blanks = [at for at, label in enumerate(seen) if label == "store:blank"]
    syncs = [at for at, label in enumerate(seen) if label == "store:image-sync"]
    assert max(blanks) < min(syncs) < max(syncs) < seen.index("store:unsynced-start")


@contextmanager
def mounted(device: Path, folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "loop,commit=300", str(device), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # a test that fails may leave files open


@pytest.mark.mount
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mkfs.ext4"), reason="needs root and mkfs.ext4")
def test_frames_that_went_with_their_device_are_put_again_although_every_sync_succeeds(tmp_path, caplog):
    source = Source("vm", {"a.raw": 3000 * 200})
    source.write("a.raw", 0, source.random.randbytes(3000 * 200))
    manifest, frames = source.begin_copy()
    device, left, folder = tmp_path / "device", tmp_path / "left", tmp_path / "mounted"
    folder.mkdir()
    with open(device, "wb") as file:
        file.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(device)], check=True)
    path = str(folder / "store")
    with mounted(device, folder), Store(path, map_size=16 << 20) as store:
        part(LocalReplica(store, "vm"), manifest, frames, 30)
        part(LocalReplica(store, "vm"), manifest, frames, 0)  # 30 frames are durable
        replica = LocalReplica(store, "vm")
        replica.begin(manifest)
        for frame in frames[30:60]:
            replica.put(frame)
        replica.close()
        with open(store.unsynced_path("vm"), "rb") as note:
            os.fdatasync(note.fileno())
        subprocess.run(["cp", "--sparse=always", str(device), str(left)], check=True)
    with mounted(left, folder), Store(path, map_size=16 << 20) as store:
        assert os.stat(store.unsynced_path("vm")).st_size == HEAD_SIZE + 30 * ENTRY_SIZE
        replica = LocalReplica(store, "vm")
        held = replica.begin(manifest)
        replica.close()
        assert held >= set(range(30))
        image = Path(store.image_path("vm", "a.raw")).read_bytes()
        for number in held:
            assert image[number * 6000 : (number + 1) * 6000] == source.disks["a.raw"][number * 6000 :][:6000]
        if len(held) == 60:
            pytest.skip("the host wrote everything to the device before it went")
        assert "are not in the replica images" in caplog.text
        finish(store, source, manifest, frames)


@pytest.mark.mount
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mkfs.ext4"), reason="needs root and mkfs.ext4")
def test_what_counts_is_on_the_medium_not_in_memory_alone(tmp_path, source):
    manifest, frames = source.begin_copy()
    device, folder = tmp_path / "device", tmp_path / "mounted"
    folder.mkdir()
    with open(device, "wb") as file:
        file.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(device)], check=True)
    with mounted(device, folder), Store(str(folder / "store"), map_size=16 << 20) as store:
        part(LocalReplica(store, "vm"), manifest, frames, 5)
        with open(store.image_path("vm", "a.raw"), "rb") as image:
            os.fsync(image.fileno())
            in_memory = image.read(30_000)
        at = device.read_bytes().index(in_memory[8192:12_000])  # of frame 1
        with open(device, "r+b") as file:
            file.seek(at)
            file.write(bytes(100))
        assert Path(store.image_path("vm", "a.raw")).read_bytes()[:30_000] == in_memory
        again = LocalReplica(store, "vm")
        assert again.begin(manifest) == {0, 2, 3, 4}
        again.close()
        finish(store, source, manifest, frames)


# Another process takes over


def test_who_began_the_copy_earlier_is_put_out_and_its_frames_count_once(store, source):
    manifest, frames = source.begin_copy()
    first, second = LocalReplica(store, "vm"), LocalReplica(store, "vm")
    first.begin(manifest)
    for frame in frames[:3]:
        first.put(frame)
    assert second.begin(manifest) == {0, 1, 2}
    with pytest.raises(BusyError):
        first.put(frames[3])
    with pytest.raises(BusyError):
        first.commit(manifest, len(frames))
    second.put(frames[4])
    first.close()
    second.close()
    assert LocalReplica(store, "vm").begin(manifest) == {0, 1, 2, 4}
    finish(store, source, manifest, frames)


def test_frames_that_were_blanked_by_who_took_over_are_not_noted_as_held(store, source):
    manifest, frames = source.begin_copy()
    first, second = LocalReplica(store, "vm"), LocalReplica(store, "vm")
    first.begin(manifest)
    first.put(frames[0])
    os.unlink(store.unsynced_path("vm"))
    assert second.begin(manifest) == frozenset()
    with pytest.raises(BusyError):
        first.commit(manifest, 1)
    second.put(frames[1])
    second.close()
    assert LocalReplica(store, "vm").begin(manifest) == {1}
    finish(store, source, manifest, frames)


# Giving a copy up


def test_an_abandoned_first_copy_leaves_nothing_that_counts(store, source):
    manifest, frames = source.begin_copy()
    replica = LocalReplica(store, "vm")
    replica.abandon()  # nothing is known of the VM
    part(replica, manifest, frames, 5)
    for _ in range(2):
        replica.abandon()
        assert replica.position() is None
        assert not os.path.exists(store.unsynced_path("vm"))
    with pytest.raises(HvfuseError, match="no cycle was open"):
        replica.put(frames[0])
    with pytest.raises(PositionMismatchError, match="was not begun"):
        replica.commit(manifest, len(frames))
    assert check(store).findings == ()
    assert replica.begin(manifest) == frozenset()
    replica.close()
    finish(store, source, manifest, frames)


def test_the_images_of_an_abandoned_first_copy_go_with_the_next(store, source):
    replica = LocalReplica(store, "vm")
    part(replica, *source.begin_copy(), 3)
    replica.abandon()
    other = Source("vm", {"c.raw": 5000}, seed=9)
    finish(store, other, *other.begin_copy())
    assert os.listdir(store.replica_folder("vm")) == ["c.raw"]


@pytest.mark.parametrize("kind", [CycleKind.COPY, CycleKind.DELTA])
def test_an_abandoned_cycle_leaves_the_replica_where_it_stood(store, source, kind):
    replica = LocalReplica(store, "vm")
    source.copy_to(replica)
    source.ship_to(replica)
    before, disks = rows(store), store.vm("vm")
    source.write("a.raw", 100, b"new" * 1000)
    manifest, frames = source.begin_cycle()
    if kind is CycleKind.COPY:
        manifest = dataclasses.replace(
            manifest, kind=kind, cycle=0, generation=b"n" * 16,
            disks=tuple(dataclasses.replace(disk, digest=bytes(16)) for disk in manifest.disks),
        )  # fmt: skip
        frames = []
    replica.begin(manifest)
    for frame in frames:
        replica.put(frame)
    for _ in range(2):
        replica.abandon()
        assert dataclasses.replace(store.vm("vm"), state=disks.state) == disks
        needs_copy = kind is CycleKind.COPY
        assert store.vm("vm").state == ("WaitingForStartResynchronize" if needs_copy else "Replicating")
        assert [row for row in rows(store) if row[0] != schema.VMS] == [row for row in before if row[0] != schema.VMS]
    manifest, frames = source.begin_cycle()
    source.end_cycle(manifest, send(replica, manifest, frames))
    check_points(store, source)


def rows(store: Store) -> list[tuple[bytes, bytes, bytes]]:
    with store.env.read() as txn:
        return [
            (name, key, value) for name, database in store.env._db.items() for key, value in txn.cursor(db=database)
        ]


# What a copy of nothing costs

GROUPS, GROUP = 256, 4 << 30


def closing_frames(source: Source) -> tuple[CycleManifest, list[bytes]]:
    """The copy of an empty disk of 1 TiB, as the shipper makes it: a frame of zeroes for each group."""
    source.generation, source.cycle = source.random.randbytes(16), 0
    manifest = source.manifest(CycleKind.COPY, previous=source.position)
    disk = dataclasses.replace(manifest.disks[0], size=GROUPS * GROUP)
    writer = FrameWriter(generation=source.generation, cycle=0)
    frames = []
    for number in range(GROUPS):
        table = np.array([(number * GROUP, GROUP, Fill.ZERO)], EXTENT_DTYPE)
        frames.append(writer.encode(disk_id=disk.disk_id, number=number, table=table, data=[]))
    return dataclasses.replace(manifest, disks=(disk, *manifest.disks[1:])), frames


def test_the_first_copy_of_a_tebibyte_of_nothing_takes_three_transactions(store):
    source = Source("vm", SIZES)
    manifest, frames = closing_frames(source)
    replica = LocalReplica(store, "vm")
    with labels() as seen:
        assert send(replica, manifest, frames) is None
    assert [label for label in seen if label.endswith(":after")] == [
        "store:begin:after", "store:held:after", "store:commit:after",
    ]  # fmt: skip
    assert seen.count("store:image-sync") == 2 * len(SIZES)  # empty, and at the end
    assert os.stat(store.image_path("vm", "a.raw")).st_size == GROUPS * GROUP


def test_a_copy_of_differences_that_has_none_shares_transactions(store, source, clock):
    replica = LocalReplica(store, "vm")
    source.copy_to(replica)
    source.ship_to(replica)
    clock.seconds += 5
    manifest, frames = closing_frames(source)
    with labels() as seen:
        replica.begin(manifest)
        for frame in frames:
            replica.put(frame)
        replica.commit(manifest, len(frames))
    assert sum(label == "store:put:after" for label in seen) <= 2 + GROUPS // SMALL_FRAMES
    source.end_copy(manifest)
    assert check(store).findings == ()


def test_frames_that_come_slowly_or_are_large_are_staged_at_once(store, source, clock):
    replica = LocalReplica(store, "vm")
    source.copy_to(replica)
    source.ship_to(replica)
    manifest, frames = closing_frames(source)
    replica.begin(manifest)
    clock.seconds += 5
    replica.put(frames[0])  # nothing was written lately
    replica.put(frames[1])  # waits
    assert LocalReplica(store, "vm").begin(manifest) == {0}
    clock.seconds += 5
    replica.put(frames[2])
    assert LocalReplica(store, "vm").begin(manifest) == {0, 1, 2}
    replica.put(frames[3])
    large = source.frames({"a.raw": [(0, 3000, source.random.randbytes(3000))]})
    replica.put(large[0])  # number 0: already there, and brings along what waits
    assert LocalReplica(store, "vm").begin(manifest) == {0, 1, 2, 3}
    replica.close()


def test_a_refused_frame_takes_none_of_those_that_wait_with_it(store, source, clock):
    replica = LocalReplica(store, "vm")
    source.copy_to(replica)
    source.ship_to(replica)
    manifest, frames = closing_frames(source)
    replica.begin(manifest)
    clock.seconds += 5
    for frame in frames[:3]:
        replica.put(frame)
    with pytest.raises(HvfuseError):
        replica.put(frames[3][:-1])
    for frame in frames[3:]:
        replica.put(frame)
    assert replica.commit(manifest, len(frames)) is None
