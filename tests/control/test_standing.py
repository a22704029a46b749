"""A failed-over VM in use: from the view of a recovery point to plain, tracked disks, under whoever holds them open."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvfuse import mountpoint, spool, wire
from hvfuse.control.arrivals import Arrivals
from hvfuse.control.config import Config
from hvfuse.errors import BusyError, HvfuseError, StateError
from hvfuse.target import standing
from hvfuse.target.view import View
from tests.control.children import HandClock
from tests.dying import done_until
from tests.mount.conftest import Mounted, world
from tests.mount.serving_view import FilesPoint

pytestmark = pytest.mark.mount

MIB = 1 << 20


class Vm:
    """A recovery point with `os.raw` of 12 MiB, full of data but for a hole, and `data.raw` of 5000 bytes; and its
    failed-over VM."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted = mounted
        self.point, self.folder, self.mnt = mounted.bare, mounted.folder, mounted.mnt
        self.directory = mounted.journals
        self.socket = str(self.directory / "socket")
        self.seconds, self.fatal = 0.0, "none"
        self.put("os.raw", random.Random(1).randbytes(4 * MIB) + bytes(4 * MIB) + random.Random(2).randbytes(4 * MIB))
        self.put("data.raw", b"d" * 5000)

    def put(self, name: str, data: bytes) -> None:
        (self.point / name).write_bytes(data)

    def start(self) -> None:
        self.spawn()
        until(self.answers)

    def spawn(self) -> None:
        arguments = (self.point, self.folder, self.mnt, self.directory, self.seconds, self.fatal)
        self.mounted.spawn("tests.control.serving_standing", *map(str, arguments))

    def answers(self) -> bool:
        assert self.mounted.process is not None and self.mounted.process.poll() is None, self.mounted.errors()
        return mountpoint.is_mounted(str(self.mnt)) and Path(self.socket).exists()

    def status(self) -> dict[str, object]:
        return wire.request(self.socket, "status")

    def hydration(self) -> dict[str, object]:
        found = self.status()["hydration"]
        assert isinstance(found, dict)
        return found

    def commit(self) -> None:
        (self.directory / "committed").touch()

    @property
    def is_hydrated(self) -> bool:
        return (self.directory / "hydrated").exists() and not standing.is_complete(str(self.folder))

    def await_hydrated(self) -> None:
        until(lambda: self.is_hydrated)

    def stop(self) -> None:
        wire.request(self.socket, "stop")
        self.mounted.expect("ended")
        self.mounted.reap()

    def await_death(self) -> None:
        assert self.mounted.process is not None
        self.mounted.process.wait(20)
        self.bury()

    def kill(self) -> None:
        assert self.mounted.process is not None
        self.mounted.process.kill()
        self.await_death()

    def bury(self) -> None:
        self.mounted.reap()
        mountpoint.clear_dead_mount(str(self.mnt))

    def open(self, name: str = "os.raw", flags: int = os.O_RDWR) -> int:
        return os.open(self.mnt / name, flags)


@pytest.fixture
def vm() -> Iterator[Vm]:
    with world() as mounted:
        yield Vm(mounted)
        assert "Traceback" not in mounted.errors(), mounted.errors()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


class Guest:
    """Writes at random places through one descriptor, as a guest would, and knows what should be there."""

    def __init__(self, fd: int, model: bytearray, seed: int, *, direct: bool = False) -> None:
        self.fd = fd
        self.model = model
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.written = 0
        self.longest = 0.0
        self._grain = 4096 if direct else 1
        self._random = random.Random(seed)
        self._buffer = mmap.mmap(-1, 1 << 16)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Guest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self.stop.is_set():
                began = time.monotonic()
                self.step()
                self.longest = max(self.longest, time.monotonic() - began)
        except BaseException as error:
            self.error = error

    def step(self) -> None:
        pick = self._random
        length = pick.randint(1, (1 << 16) // self._grain) * self._grain
        offset = pick.randrange((len(self.model) - length) // self._grain) * self._grain
        match pick.randrange(8):
            case 0:
                assert os.preadv(self.fd, [memoryview(self._buffer)[:length]], offset) == length
                assert self._buffer[:length] == self.model[offset : offset + length]
            case 1:
                os.fsync(self.fd)
            case _:
                self._buffer[:length] = pick.randbytes(length)
                assert os.pwritev(self.fd, [memoryview(self._buffer)[:length]], offset) == length
                self.model[offset : offset + length] = self._buffer[:length]
                self.written += 1


def test_until_it_is_committed_nothing_becomes_of_it(vm: Vm) -> None:
    vm.start()
    assert sorted(os.listdir(vm.mnt)) == ["data.raw", "os.raw"]
    found = vm.status()
    assert found["standing"] is True
    assert vm.hydration() == {"state": "waiting", "done": 0, "total": 12 * MIB + 5000, "error": None}
    assert [(disk["name"], disk["size"]) for disk in found["disks"]] == [("data.raw", 5000), ("os.raw", 12 * MIB)]  # type: ignore[attr-defined]
    for op in ("rotate", "begin", "take_in"):
        with pytest.raises(StateError, match="served from a recovery point"):
            wire.request(vm.socket, op)
    (vm.mnt / "os.raw").open("r+b").write(b"guest")
    vm.stop()
    assert os.listdir(vm.folder) == [".failover"]
    standing.drop(str(vm.folder))
    standing.drop(str(vm.folder))
    assert not os.listdir(vm.folder)


@pytest.mark.parametrize("direct", [True, False])
def test_a_guest_that_writes_all_the_time_keeps_its_disk(vm: Vm, direct: bool) -> None:
    vm.seconds = 0.01
    vm.start()
    model = bytearray((vm.point / "os.raw").read_bytes())
    fd = vm.open(flags=os.O_RDWR | (os.O_DIRECT if direct else 0))
    with Guest(fd, model, 7, direct=direct) as guest:
        vm.commit()
        vm.await_hydrated()
        at_the_switch = guest.written
        until(lambda: guest.written > at_the_switch + 50)
        assert guest.longest < 2
    assert "switched to plain disks in 0." in vm.mounted.errors()
    assert vm.status()["standing"] is False
    assert (vm.mnt / "os.raw").read_bytes() == model
    os.close(fd)
    vm.stop()
    assert (vm.folder / "os.raw").read_bytes() == model
    assert (vm.folder / "data.raw").read_bytes() == b"d" * 5000
    assert not (vm.folder / ".failover").exists()


def test_what_is_written_after_the_switch_through_a_handle_from_before_is_logged(vm: Vm) -> None:
    vm.start()
    fd = vm.open()
    vm.commit()
    vm.await_hydrated()
    generation = "ab" * 16
    begun = wire.request(vm.socket, "begin", generation=generation)
    assert begun["logging"] is True
    os.pwrite(fd, b"logged", 3 * MIB)
    os.fsync(fd)
    assert wire.request(vm.socket, "rotate")["cycle"] == 1
    (cycle,) = spool.list_cycles(str(vm.folder))
    (log,) = [log for log in cycle.logs if log.disk == "os.raw"]
    assert (3 * MIB, 6) in [(int(entry["offset"]), int(entry["length"])) for entry in log.entries()]
    assert next(d for d in vm.status()["disks"] if d["name"] == "os.raw")["open_handles"] == 1  # type: ignore[attr-defined]
    os.close(fd)
    deadline = time.monotonic() + 10  # the kernel tells of it after the close
    while next(d for d in vm.status()["disks"] if d["name"] == "os.raw")["open_handles"]:  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    vm.stop()


def test_a_file_system_on_the_disk_lives_through_the_switch(vm: Vm) -> None:
    image, inside = vm.point / "os.raw", vm.mounted.root / "inside"
    image.write_bytes(bytes(48 * MIB))
    inside.mkdir()
    run("mkfs.ext4", "-q", "-F", str(image))
    vm.seconds = 0.005
    vm.start()
    device = run("losetup", "--find", "--show", "--direct-io=on", str(vm.mnt / "os.raw"))
    try:
        run("mount", device, str(inside))
        try:
            files: dict[Path, bytes] = {}
            pick = random.Random(3)
            vm.commit()
            for number in range(40):
                path = inside / str(number)
                files[path] = pick.randbytes(200_000)
                path.write_bytes(files[path])
                if number == 20:
                    os.sync()
                    vm.await_hydrated()
            os.sync()
            run("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
            assert all(path.read_bytes() == data for path, data in files.items())
        finally:
            run("umount", str(inside))
    finally:
        run("losetup", "-d", device)
    vm.stop()
    run("e2fsck", "-fn", str(vm.folder / "os.raw"))


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_killed_again_and_again_what_was_synced_is_there(vm: Vm) -> None:
    vm.seconds = 0.1
    vm.commit()
    pick = random.Random(11)
    model = bytearray((vm.point / "os.raw").read_bytes())
    copied = []
    for _ in range(10):
        vm.start()
        fd = vm.open()
        assert os.pread(fd, len(model), 0) == model
        for _ in range(5):
            offset, data = pick.randrange(12 * MIB - 5000), pick.randbytes(5000)
            os.pwrite(fd, data, offset)
            model[offset : offset + 5000] = data
            if pick.random() < 0.5:
                time.sleep(pick.random() * 0.1)
        os.fsync(fd)
        time.sleep(pick.random() * 0.1)
        copied.append((vm.folder / ".failover/os.raw.data").stat().st_blocks * 512)
        vm.kill()
        with contextlib.suppress(OSError):
            os.close(fd)
    assert 0 < copied[0] < copied[-1] <= 8 * MIB + 10 * 5 * 12288
    vm.seconds = 0.0
    vm.start()
    vm.await_hydrated()
    vm.stop()
    assert (vm.folder / "os.raw").read_bytes() == model


STEPS = [
    "standing:mark",
    "standing:marked",
    "standing:rename",
    "standing:renamed",
    "standing:renamed-from",
    "test:hydrated",
    "standing:clean",
    "standing:cleaned",
    "standing:unmark",
    "standing:remove",
    "standing:removed",
]


@pytest.mark.parametrize("label", STEPS)
def test_killed_at_any_step_of_completion_the_next_start_serves_the_same_bytes(vm: Vm, label: str) -> None:
    vm.fatal = label
    vm.start()
    with contextlib.suppress(OSError), (vm.mnt / "os.raw").open("r+b", buffering=0) as file:
        file.seek(4097)
        file.write(b"guest")
        os.fsync(file.fileno())
    model = bytearray((vm.point / "os.raw").read_bytes())
    model[4097:4102] = b"guest"
    vm.commit()
    vm.await_death()
    vm.fatal = "none"
    if standing.stands(str(vm.folder)):
        (vm.directory / "hydrated").unlink(missing_ok=True)
        vm.start()
        assert (vm.mnt / "os.raw").read_bytes() == model
        vm.await_hydrated()
        assert vm.status()["standing"] is False
        assert (vm.mnt / "os.raw").read_bytes() == model
        vm.stop()
    assert not (vm.folder / ".failover").exists()
    assert (vm.folder / "os.raw").read_bytes() == model
    assert (vm.folder / "data.raw").read_bytes() == b"d" * 5000


def test_killed_at_any_call_the_file_work_is_finished_by_the_next(tmp_path: Path) -> None:
    def hydrate(folder: Path) -> None:
        (folder / ".failover").mkdir(parents=True)
        for name in ("a.raw", "z.raw"):
            (folder / ".failover" / f"{name}.data").write_bytes(name.encode() * 1000)
            (folder / ".failover" / f"{name}.blocks").touch()

    def complete(folder: Path) -> None:
        standing.mark_complete(str(folder))
        standing.put_in_place(str(folder))
        standing.clean_up(str(folder))

    step, is_through = 0, False
    while not is_through:
        step += 1
        folder = tmp_path / str(step)
        hydrate(folder)
        is_through = done_until(step, lambda folder=folder: complete(folder))  # type: ignore[misc]
        was_marked = standing.is_complete(str(folder))
        finishes = 0
        while not done_until(finishes + 1, lambda folder=folder: standing.finish_interrupted(str(folder))):  # type: ignore[misc]
            finishes += 1
        standing.finish_interrupted(str(folder))
        names = sorted(os.listdir(folder))
        if step == 1:
            assert not was_marked
            assert names == [".failover"]
        else:
            assert names == ["a.raw", "z.raw"]
            assert (folder / "z.raw").read_bytes() == b"z.raw" * 1000
    assert step > 10


def test_a_vm_stands_from_the_making_of_the_directory_until_only_that_is_left(tmp_path: Path) -> None:
    folder, overlays = str(tmp_path), tmp_path / ".failover"
    assert not standing.stands(folder)
    overlays.mkdir()
    assert standing.stands(folder)
    assert not standing.finish_interrupted(folder)
    assert standing.stands(folder)
    (overlays / "a.raw.data").touch()
    assert standing.stands(folder)
    standing.mark_complete(folder)
    standing.put_in_place(folder)
    assert standing.stands(folder)  # nobody has noted it
    (overlays / "complete").unlink()
    assert not standing.stands(folder)
    assert os.listdir(folder) == ["a.raw"]


def test_dropped_half_way_the_rest_goes_next_time_and_claims_nothing(tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    for name in ("a.raw", "b.raw"):
        (point / name).write_bytes(b"point" * 1000)
    step, is_through = 0, False
    while not is_through:
        step += 1
        folder = tmp_path / str(step)
        overlays = standing.overlays(str(folder))
        view = View(FilesPoint(point), overlays=overlays)
        view.disks["a.raw"].pwrite(0, b"guest")
        view.close()
        is_through = done_until(step, lambda folder=folder: standing.drop(str(folder)))  # type: ignore[misc]
        view = View(FilesPoint(point), overlays=overlays)
        assert view.disks["a.raw"].pread(0, 10) in (b"pointpoint", b"guestpoint")
        view.close()
        standing.drop(str(folder))
        assert not os.listdir(folder)


def test_disks_that_grew_or_shrank_in_the_view_become_what_they_were(vm: Vm) -> None:
    vm.start()
    os.truncate(vm.mnt / "os.raw", 3 * MIB + 100)
    os.truncate(vm.mnt / "data.raw", 2 * MIB)
    fd = vm.open("data.raw")
    os.pwrite(fd, b"end", 2 * MIB - 3)
    vm.commit()
    vm.await_hydrated()
    os.close(fd)
    vm.stop()
    assert (vm.folder / "os.raw").read_bytes() == (vm.point / "os.raw").read_bytes()[: 3 * MIB + 100]
    assert (vm.folder / "data.raw").read_bytes() == b"d" * 5000 + bytes(2 * MIB - 5003) + b"end"


def test_owner_and_mode_go_with_the_disk(vm: Vm) -> None:
    vm.start()
    os.chown(vm.mnt / "os.raw", 107, 108)
    (vm.mnt / "os.raw").chmod(0o640)
    vm.commit()
    vm.await_hydrated()
    for directory in (vm.mnt, vm.folder):
        found = (directory / "os.raw").stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, 107, 108)
        assert stat.S_IMODE((directory / "data.raw").stat().st_mode) == 0o600
    vm.stop()


def test_what_is_left_of_the_overlays_is_not_shown_while_it_is_there(vm: Vm) -> None:
    (vm.directory / "refuse").touch()
    vm.start()
    listing = os.open(vm.mnt, os.O_RDONLY | os.O_DIRECTORY)
    vm.commit()
    until(lambda: vm.hydration()["error"] == "the records are busy")
    assert vm.hydration()["state"] == "done"
    assert standing.is_complete(str(vm.folder))
    assert sorted(os.listdir(vm.mnt)) == sorted(os.listdir(listing)) == ["data.raw", "os.raw"]
    hidden = vm.mnt / ".failover"
    for refused in (hidden.stat, hidden.mkdir):
        with pytest.raises(OSError):
            refused()
    os.close(listing)
    with pytest.raises(BusyError, match="another process serves"):
        standing.drop(str(vm.folder))
    vm.kill()
    with pytest.raises(BusyError, match="its own disks"):
        standing.drop(str(vm.folder))
    (vm.directory / "refuse").unlink()
    vm.start()
    vm.await_hydrated()
    vm.stop()


def test_disks_that_cannot_be_tracked_are_served_all_the_same(vm: Vm) -> None:
    vm.put("bad.vhd", b"this has no footer" * 1000)
    vm.start()
    fd = vm.open("bad.vhd")
    vm.commit()
    vm.await_hydrated()
    assert "cannot be tracked" in str(vm.hydration()["error"])
    assert vm.status()["standing"] is True
    os.pwrite(fd, b"goes on", 0)
    os.fsync(fd)
    os.close(fd)
    assert (vm.mnt / "bad.vhd").read_bytes().startswith(b"goes on")
    vm.stop()
    assert (vm.folder / "bad.vhd").read_bytes().startswith(b"goes on")
    assert "the disks are served, and not tracked" in vm.mounted.errors()
    (vm.mounted.root / "errors").write_text("")


def test_it_does_not_stand_over_disks_that_are_there(vm: Vm) -> None:
    (vm.folder / "mine.raw").write_bytes(b"mine")
    vm.spawn()
    vm.mounted.expect_match(r"BusyError: .*/mine\.raw: is there already")
    vm.mounted.reap()
    assert os.listdir(vm.folder) == ["mine.raw"]


def test_a_disk_that_is_put_in_its_place_meanwhile_is_not_replaced(vm: Vm) -> None:
    vm.start()
    (vm.folder / "os.raw").write_bytes(b"mine")
    vm.commit()
    until(lambda: vm.hydration()["state"] == "paused")
    assert "is there already" in str(vm.hydration()["error"])
    assert (vm.mnt / "os.raw").read_bytes() == (vm.point / "os.raw").read_bytes()
    assert (vm.folder / "os.raw").read_bytes() == b"mine"
    (vm.folder / "os.raw").unlink()
    vm.await_hydrated()
    vm.stop()


def test_overlays_belong_to_one_point(vm: Vm) -> None:
    vm.start()
    vm.stop()
    (vm.point / "os.raw").rename(vm.point / "other.raw")
    overlays = Path(standing.overlays(str(vm.folder)))
    for kind in ("data", "blocks"):
        (overlays / f"os.raw.{kind}").rename(overlays / f"other.raw.{kind}")
    vm.spawn()
    vm.mounted.expect_match("UsageError: .*another recovery point")
    vm.mounted.reap()


def test_progress_is_told(vm: Vm) -> None:
    vm.start()
    vm.commit()
    vm.await_hydrated()
    told = [json.loads(line) for line in (vm.directory / "told").read_text().splitlines()]
    assert told[0]["state"] == "copying"
    assert told[-1] == {"state": "done", "done": 12 * MIB + 5000, "total": 12 * MIB + 5000, "error": None}
    vm.stop()


def test_what_is_served_to_a_failed_over_vm_does_not_keep_its_folder_from_settling(tmp_path: Path) -> None:
    home = Config().home(str(tmp_path))
    overlays = tmp_path / "disks/vm/.failover"
    overlays.mkdir(parents=True)
    (overlays / "os.raw.data").touch()
    (tmp_path / "disks/vm/os.raw").touch()
    clock = HandClock()
    arrivals = Arrivals(home, clock=clock)
    assert not arrivals.is_settled("vm", at_start=False)
    clock.sleep(10)
    (overlays / "os.raw.data").unlink()
    assert arrivals.is_settled("vm", at_start=False)
    assert spool.is_reserved(".failover")
    assert spool.disk_of(".failover") is None


def test_one_process_serves_a_folder(vm: Vm) -> None:
    vm.start()
    with pytest.raises(HvfuseError, match="another process serves"), standing.serving(str(vm.folder)):
        pass
    with pytest.raises(BusyError):
        standing.finish_interrupted(str(vm.folder))
    vm.stop()
