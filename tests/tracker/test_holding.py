"""A VM that is held: what is refused, by whatever way, what goes on, and what is on disk once it is held."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hvfuse import spool, system
from hvfuse.errors import BusyError, HvfuseError, UsageError
from hvfuse.filesystem import OpenFile
from hvfuse.tracker import holding, membership
from hvfuse.tracker.mount import VmFolder
from hvfuse.tracker.service import TrackerControl
from hvfuse.tracker.vm import TrackedVm
from tests.dying import done_until
from tests.tracker.test_vm import GENERATION, MIB, attached, contents, make_folder, replayed

REASON = "it was failed over"
KEEP, PUNCH, ZERO = system.FALLOC_FL_KEEP_SIZE, system.FALLOC_FL_PUNCH_HOLE, system.FALLOC_FL_ZERO_RANGE
DATA = memoryview(b"changed")
FIXED = {"uid": 0, "gid": 0}
EXCLUDED = frozenset({"swap.raw", "late.raw"})


class Host:
    """A tracked VM and what its mount would ask it: `a.raw` is tracked, `swap.raw` excluded, `alias.bin` another name
    of the latter, and `notes.txt` no disk."""

    def __init__(self, tmp_path: Path, *, exclude: frozenset[str] = EXCLUDED, logs: bool = True) -> None:
        self.folder = make_folder(tmp_path, a=MIB, swap=MIB)
        with open(os.path.join(self.folder, "notes.txt"), "wb") as file:
            file.write(b"notes")
        os.link(os.path.join(self.folder, "swap.raw"), os.path.join(self.folder, "alias.bin"))
        self.vm = attached(self.folder, exclude=exclude, begin=logs)
        if logs:
            self.vm.resynced(GENERATION)
        self.root = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        self.mount = VmFolder(self.root, self.vm)
        self.control = TrackerControl(self.vm, "/none")

    def ask(self, op: str, **fields: object) -> dict[str, object]:
        return self.control.handle({"op": op, **fields})

    def looks(self) -> dict[str, object]:
        """The folder's own files: what they are and hold."""
        names = (name for name in os.listdir(self.folder) if not spool.is_reserved(name) and name != "copy")
        return {name: (self.looks_of(name), contents(self.folder, name)) for name in names}

    def looks_of(self, name: str) -> tuple[int, ...]:
        found = os.lstat(os.path.join(self.folder, name))
        return found.st_ino, found.st_size, found.st_blocks, found.st_mtime_ns, found.st_nlink

    def close(self) -> None:
        system.install(None)
        self.vm.detach()
        os.close(self.root)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    with closing(host):
        yield host


def code(action: Callable[[], object]) -> int:
    """The errno of what is refused; 0 if it is done."""
    try:
        action()
    except OSError as error:
        return error.errno or -1
    return 0


CONTENT: dict[str, Callable[[OpenFile], object]] = {
    "write": lambda file: file.write(DATA, 4096),
    "write past the end": lambda file: file.write(DATA, 2 * MIB),
    "shrink": lambda file: file.truncate(4096),
    "grow": lambda file: file.truncate(2 * MIB),
    "truncate to its size": lambda file: file.truncate(file.stat().st_size),
    "zero": lambda file: file.fallocate(ZERO, 0, 4096),
    "zero past the end": lambda file: file.fallocate(ZERO | KEEP, 2 * MIB, 4096),
    "trim": lambda file: file.fallocate(PUNCH | KEEP, 0, 4096),
    "allocate": lambda file: file.fallocate(KEEP, 0, 4096),
    "allocate past the end": lambda file: file.fallocate(0, MIB, 4096),
}


@pytest.mark.parametrize("what", CONTENT)
@pytest.mark.parametrize("name", ["a.raw", "swap.raw", "alias.bin", "early.tmp"])
def test_a_handle_that_could_write_cannot_while_it_is_held(host: Host, name: str, what: str) -> None:
    if name == "early.tmp":  # opened before it was a disk
        host.mount.create("/early.tmp", os.O_RDWR, 0o600, **FIXED).release()
        file = host.mount.open("/early.tmp", os.O_RDWR)
        file.truncate(MIB)
        host.mount.rename("/early.tmp", "/late.raw", 0)
    else:
        file = host.mount.open(f"/{name}", os.O_RDWR)
    file.write(memoryview(b"before"), 0)
    host.vm.hold(REASON)
    before = host.looks()
    assert code(lambda: CONTENT[what](file)) == errno.EROFS
    assert host.looks() == before
    buffer = memoryview(bytearray(6))
    assert (file.read_into(buffer, 0), bytes(buffer)) == (6, b"before")
    file.fsync(False)
    file.fsync(True)
    host.vm.unhold()
    assert code(lambda: CONTENT[what](file)) == 0
    file.release()


def opened(flags: int, path: str) -> Callable[[VmFolder], object]:
    return lambda mount: mount.open(path, flags)


NAMES: dict[str, Callable[[VmFolder], object]] = {
    **{
        f"open {path} with {flags}": opened(flags, path)
        for path in ("/a.raw", "/swap.raw", "/alias.bin")
        for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND)
    },
    **{
        f"truncate {path}": lambda mount, path=path: mount.truncate(path, 0)
        for path in ("/a.raw", "/swap.raw", "/alias.bin")
    },
    **{f"unlink {path}": lambda mount, path=path: mount.unlink(path) for path in ("/a.raw", "/swap.raw")},
    "create": lambda mount: mount.create("/new.VHD", os.O_RDWR, 0o600, **FIXED),
    "mknod": lambda mount: mount.mknod("/new.raw", stat.S_IFREG | 0o600, 0, **FIXED),
    "symlink": lambda mount: mount.symlink("notes.txt", "/new.img", **FIXED),
    "link to": lambda mount: mount.link("/notes.txt", "/new.raw"),
    "link of": lambda mount: mount.link("/swap.raw", "/another.bin"),
    "rename to": lambda mount: mount.rename("/notes.txt", "/new.raw", 0),
    "rename over": lambda mount: mount.rename("/notes.txt", "/swap.raw", 0),
    "rename over a tracked one": lambda mount: mount.rename("/notes.txt", "/a.raw", 0),
    "rename away": lambda mount: mount.rename("/swap.raw", "/swap.txt", 0),
    "exchange": lambda mount: mount.rename("/notes.txt", "/swap.raw", 2),
    "hide": lambda mount: mount.rename("/swap.raw", "/.fuse_hidden0000000000000001", 0),
}


@pytest.mark.parametrize("what", NAMES)
def test_no_name_makes_a_held_disk_another(host: Host, what: str) -> None:
    reader = host.mount.open("/swap.raw", os.O_RDONLY)
    host.vm.hold(REASON)
    before = host.looks()
    assert code(lambda: NAMES[what](host.mount)) == errno.EROFS
    assert host.looks() == before
    host.vm.unhold()
    assert code(lambda: NAMES[what](host.mount)) in (0, errno.EBUSY)
    reader.release()


def test_what_is_no_disk_can_be_changed_and_so_can_attributes(host: Host) -> None:
    early = host.mount.open("/notes.txt", os.O_RDWR)
    host.vm.hold(REASON)
    early.write(DATA, 0)
    early.release()
    host.mount.truncate("/notes.txt", 3)
    host.mount.open("/notes.txt", os.O_RDWR | os.O_TRUNC).release()
    host.mount.create("/new.txt", os.O_RDWR, 0o600, **FIXED).release()
    host.mount.mkdir("/below", 0o700, **FIXED)
    below = host.mount.create("/below/no-disk.raw", os.O_RDWR, 0o600, **FIXED)
    below.write(DATA, 0)
    below.release()
    host.mount.rename("/new.txt", "/newer.txt", 0)
    host.mount.unlink("/newer.txt")
    assert contents(host.folder, "below/no-disk.raw") == DATA
    for name in ("/a.raw", "/swap.raw"):
        host.mount.chmod(name, 0o640)
        assert stat.S_IMODE(host.mount.stat(name).st_mode) == 0o640
        host.mount.open(name, os.O_RDONLY).release()


def test_the_tracker_goes_on_while_it_is_held(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last cycle is shipped, disks come and go, copies begin and end."""
    monkeypatch.setattr(membership, "STILL_SECONDS", 0.0)
    vm = host.vm
    leaving = host.mount.open("/a.raw", os.O_RDWR)
    vm.disks["a.raw"].write(b"the last", 8192)
    vm.hold(REASON)
    cycle = vm.rotate().cycle
    assert replayed(host.folder, "a.raw", bytes(MIB)) == contents(host.folder, "a.raw")
    os.unlink(os.path.join(host.folder, "copy"))
    assert vm.rotate().cycle == cycle + 1
    assert vm.touched({}) == {"generation": GENERATION.hex(), "cycle": cycle + 2, "disks": {}}
    vm.release(GENERATION, cycle + 1)
    os.unlink(os.path.join(host.folder, "alias.bin"))
    vm.configure(exclude=frozenset({"a.raw"}), hard_limit=0.5, soft_limit=0.25)
    assert list(vm.disks) == ["swap.raw"]
    assert code(lambda: leaving.write(DATA, 0)) == errno.EROFS
    assert code(lambda: host.mount.open("/swap.raw", os.O_RDWR)) == errno.EROFS
    assert code(lambda: vm.disks["swap.raw"].write(b"x", 0)) == errno.EROFS
    assert vm.regions()["disks"] and vm.status()["held"] == REASON
    vm.begin(b"\1" * 16)
    vm.resynced(b"\1" * 16)
    vm.end()
    assert code(lambda: vm.disks["swap.raw"].write(b"x", 0)) == errno.EROFS
    assert vm.status()["open_disks"] == 1
    leaving.release()
    assert vm.status()["open_disks"] == 0


# The instant -------------------------------------------------------------------------------------------------


class Beginning:
    """Instead of the injector: a hold begins while the first call of that label is made, and has a moment for it.
    `early`: whether it was done by then."""

    def __init__(self, host: Host, label: str) -> None:
        self.early = False
        self._label = label
        self._thread = threading.Thread(target=self._hold, args=(host,))
        self.found: dict[str, object] = {}

    def __call__(self, label: str, _call: str, _size: int) -> int | None:
        if label == self._label and self._thread.ident is None:
            self._thread.start()
            self._thread.join(0.05)
            self.early = not self._thread.is_alive()
        return None

    def _hold(self, host: Host) -> None:
        host.vm.hold(REASON)
        self.found = host.looks()

    def end(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.mark.parametrize(
    ("label", "what"),
    [
        ("log:append", "write"),
        ("disk:write", "write"),
        ("disk:write", "write past the end"),
        ("disk:truncate", "shrink"),
        ("disk:zero", "zero"),
        ("disk:trim", "trim"),
        ("disk:allocate", "allocate"),
        ("folder:fallocate", "trim"),
    ],
)
def test_a_change_under_way_is_whole_before_the_vm_is_held(host: Host, label: str, what: str) -> None:
    file = host.mount.open("/swap.raw" if label.startswith("folder") else "/a.raw", os.O_RDWR)
    file.write(memoryview(b"\xaa" * MIB), 0)
    begins = Beginning(host, label)
    system.install(begins)
    assert code(lambda: CONTENT[what](file)) == 0
    begins.end()
    assert not begins.early
    assert begins.found == host.looks(), "nothing changed after hold had returned"
    assert code(lambda: CONTENT[what](file)) == errno.EROFS
    host.vm.rotate()
    if not label.startswith("folder"):
        told = replayed(host.folder, "a.raw", bytes(MIB))
        assert told[: os.stat(os.path.join(host.folder, "a.raw")).st_size] == contents(host.folder, "a.raw")
    file.release()


@pytest.mark.parametrize(
    ("exclude", "label", "what"),
    [(EXCLUDED, "disk:truncate", "shrink"), (EXCLUDED | {"a.raw"}, "folder:fallocate", "trim")],
)
def test_so_it_is_where_nothing_is_logged_or_no_disk_is_tracked(
    tmp_path: Path, exclude: frozenset[str], label: str, what: str
) -> None:
    host = Host(tmp_path, exclude=exclude, logs=False)
    with closing(host):
        file = host.mount.open("/a.raw", os.O_RDWR)
        begins = Beginning(host, label)
        system.install(begins)
        assert code(lambda: CONTENT[what](file)) == 0
        begins.end()
        assert not begins.early and begins.found == host.looks()
        assert code(lambda: CONTENT[what](file)) == errno.EROFS
        file.release()


def test_once_it_is_held_logs_and_images_are_synced(host: Host) -> None:
    host.vm.disks["a.raw"].write(DATA, 0)
    calls: list[str] = []
    system.install(lambda label, call, size: calls.append(label))
    host.vm.hold(REASON)
    assert calls[-1] == "disk:sync" and any(label.startswith("log:sync") for label in calls), calls


def test_a_disk_that_cannot_be_synced_is_told_and_the_vm_is_held(host: Host) -> None:
    def fail(label: str, _call: str, _size: int) -> int | None:
        if label == "disk:sync":
            raise OSError(errno.EIO, "broken")
        return None

    system.install(fail)
    with pytest.raises(HvfuseError, match=r"a\.raw could not be synced: broken"):
        host.vm.hold(REASON)
    system.install(None)
    assert host.vm.status()["held"] == REASON
    assert code(lambda: host.vm.disks["a.raw"].write(b"x", 0)) == errno.EROFS
    assert host.vm.resync_reason is not None
    with pytest.raises(HvfuseError, match="could not be synced"):
        host.vm.hold(REASON)  # the kernel tells it once only


def test_killed_at_every_step_of_it_nothing_is_lost_and_nothing_is_held(tmp_path: Path) -> None:
    for step in itertools.count(1):
        (tmp_path / str(step)).mkdir()
        folder = make_folder(tmp_path / str(step), a=MIB)
        vm = attached(folder)
        vm.resynced(GENERATION)
        vm.detach()
        held: list[TrackedVm] = []

        def prepare(folder: str = folder, held: list[TrackedVm] = held) -> None:
            held.append(attached(folder, begin=False))
            held[0].disks["a.raw"].write(b"acknowledged", 8192)

        def act(held: list[TrackedVm] = held) -> None:
            held[0].hold(REASON)

        ended = done_until(step, act, prepare=prepare)
        vm = attached(folder, begin=False)
        assert vm.resync_reason is None and vm.status()["held"] is None
        vm.disks["a.raw"].write(b"after", 0)
        vm.rotate()
        assert contents(folder, "a.raw")[8192:8204] == b"acknowledged"
        assert replayed(folder, "a.raw", bytes(MIB)) == contents(folder, "a.raw")
        vm.detach()
        if ended:
            break
    assert step > 2


# Only if nobody uses it, and what is told --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.raw", "swap.raw"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_only_if_unused_leaves_a_vm_alone_that_is_used(host: Host, name: str, flags: int) -> None:
    notes = host.mount.open("/notes.txt", os.O_RDWR)
    file = host.mount.open(f"/{name}", flags)
    assert host.ask("status")["open_disks"] == 1
    assert not host.vm.hold(REASON, only_if_unused=True)
    assert host.vm.held is None
    file.release()
    assert host.vm.hold(REASON, only_if_unused=True)
    assert host.ask("status")["open_disks"] == 0
    notes.release()


def test_a_name_cannot_be_opened_between_the_look_and_the_hold(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome: list[int] = []
    opener = threading.Thread(target=lambda: outcome.append(code(lambda: host.mount.open("/swap.raw", os.O_RDWR))))
    look = holding.open_disks

    def looks_and_waits(vm: TrackedVm) -> int:
        found = look(vm)
        opener.start()
        opener.join(0.05)
        return found

    monkeypatch.setattr(holding, "open_disks", looks_and_waits)
    assert host.vm.hold(REASON, only_if_unused=True)
    opener.join(10)
    assert outcome == [errno.EROFS]


def test_a_handle_that_is_just_being_closed_is_waited_for(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    file = host.mount.open("/a.raw", os.O_RDWR)
    monkeypatch.setattr(
        host.vm.clock, "sleep", lambda _seconds: file.release() if host.vm.disks["a.raw"].open_handles else None
    )
    assert host.ask("hold", reason=REASON, only_if_unused=True) == {}


def test_who_cannot_be_seen_is_told_of(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvfuse.tracker.service._CLOSING", 0.05)
    file = host.mount.open("/a.raw", os.O_RDONLY)
    with pytest.raises(BusyError, match="vm: its disks are in use by a process that cannot be seen from here"):
        host.ask("hold", reason=REASON, only_if_unused=True)
    assert host.ask("status")["held"] is None
    file.release()


def test_the_control_ops_are_idempotent_and_the_reason_is_the_last_one(host: Host) -> None:
    assert (host.ask("status")["held"], host.ask("unhold")) == (None, {})
    assert host.ask("hold", reason="prepared") == {}
    assert host.ask("hold", reason=REASON) == {}
    assert host.ask("status")["held"] == REASON
    assert host.ask("unhold") == host.ask("unhold") == {}
    assert host.ask("status")["held"] is None
    host.vm.disks["a.raw"].write(b"x", 0)
    for wrong in ({}, {"reason": ""}, {"reason": 5}, {"reason": REASON, "only_if_unused": 1}):
        with pytest.raises(UsageError):
            host.ask("hold", **wrong)


def test_a_vm_whose_replication_was_disabled_is_held_as_well(tmp_path: Path) -> None:
    vm = attached(make_folder(tmp_path, a=MIB), begin=False)
    vm.end()
    vm.hold(REASON)
    assert code(lambda: vm.disks["a.raw"].write(b"x", 0)) == errno.EROFS
    vm.unhold()
    vm.disks["a.raw"].write(b"x", 0)
    vm.detach()
