"""Disks that come and go: what has to be compared then, what deaths leave, and who may have them open."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvfuse import spool, system
from hvfuse.errors import ResyncRequiredError, UsageError
from hvfuse.filesystem import OpenFile
from hvfuse.formats import tracking
from hvfuse.formats.tracking import DIRTY, Scope
from hvfuse.tracker import history, membership, regions, resync, state
from hvfuse.tracker.disk import TrackedDisk
from hvfuse.tracker.folder import PlainFile
from hvfuse.tracker.mount import VmFolder
from hvfuse.tracker.service import TrackerControl
from hvfuse.tracker.vm import TrackedVm
from tests.crash.host import FAST_FOLDER
from tests.tracker.replica_model import BLOCK, DISKS, Site, Violation
from tests.tracker.test_vm import GENERATION, MIB, attached, kill, make_folder, marked

NEXT = uuid.UUID(int=8).bytes


@pytest.fixture(autouse=True)
def marks_nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Marks are counted here; and disks need not stand still, but where that is the matter."""
    monkeypatch.setattr(regions, "_SOON", -1)
    monkeypatch.setattr(membership, "STILL_SECONDS", 0.0)
    yield
    system.install(None)


@pytest.fixture
def root() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="hvfuse-members-", dir=FAST_FOLDER)
    yield path
    shutil.rmtree(path)


def joined(tmp_path: Path, **sizes: int) -> TrackedVm:
    """The target has all but what was written to 3 MiB of a.raw."""
    vm = attached(make_folder(tmp_path, **sizes))
    vm.resynced(GENERATION)
    vm.release(GENERATION, vm.rotate().cycle)
    vm.disks["a.raw"].write(b"in a log", 3 * MIB)
    return vm


def bring(vm: TrackedVm, name: str = "new.raw", size: int = MIB) -> str:
    path = os.path.join(vm.folder, name)
    with open(path, "wb") as file:
        file.write(os.urandom(size))
    return path


def resync_of(vm: TrackedVm) -> tuple[object, object, object]:
    status = vm.status()
    return status["resync_required"], status["resync_scope"], status["resync_cause"]


def record_of(vm: TrackedVm, name: str) -> tracking.TrackingRecord:
    with open(os.path.join(vm.folder, spool.state_name(name)), "rb") as file:
        return tracking.unpack_state(file.read())


# While mounted -----------------------------------------------------------------------------------------------


def test_a_disk_that_comes_is_all_that_is_compared_with_what_is_written_from_then_on(tmp_path: Path) -> None:
    vm = joined(tmp_path, a=64 * MIB)
    bring(vm)
    assert (vm.status()["untracked"], vm.status()["unsettled"]) == (["new.raw"], ["new.raw"])
    settled = vm.take_in()
    assert (settled.added, settled.removed, settled.waiting) == (["new.raw"], [], {})
    assert resync_of(vm) == ("new.raw was added", "regions", "disks")
    assert vm.status()["resync_bases"] == [[GENERATION.hex(), 1]]
    assert marked(vm, "a.raw") == [] and marked(vm, "new.raw") == [[0, MIB]]
    (cycle,) = spool.list_cycles(vm.folder)
    assert (cycle.cycle, cycle.is_whole, [log.disk for log in cycle.logs]) == (2, True, ["a.raw"])
    vm.disks["a.raw"].write(b"marked", 10 * MIB)
    vm.disks["new.raw"].write(b"marked", 0)
    assert marked(vm, "a.raw") == [[10 * MIB, 65536]]
    vm.release(GENERATION, 2)
    vm.begin(NEXT, Scope.REGIONS)
    assert vm.is_logging and resync_of(vm) == (None, "regions", "disks")
    assert marked(vm, "new.raw") == [[0, MIB]]
    vm.resynced(NEXT)
    assert resync_of(vm) == (None, None, None)
    vm.rotate()
    assert [log.disk for cycle in spool.list_cycles(vm.folder) for log in cycle.logs] == ["a.raw", "new.raw"]
    vm.detach()
    again = attached(vm.folder, begin=False)
    assert again.is_logging and resync_of(again) == (None, None, None)
    again.detach()


def test_what_was_sealed_and_not_shipped_is_marked_when_the_next_generation_begins(tmp_path: Path) -> None:
    vm = joined(tmp_path, a=64 * MIB)
    bring(vm)
    vm.take_in()
    vm.begin(NEXT, Scope.REGIONS)
    assert marked(vm, "a.raw") == [[3 * MIB, 65536]]
    vm.detach()


def test_an_excluded_disk_leaves_and_comes_back_as_a_new_one(tmp_path: Path) -> None:
    vm = joined(tmp_path, a=64 * MIB, b=MIB)
    control = TrackerControl(vm, "/none")
    policy = {"op": "configure", "hard_limit": 0.5, "soft_limit": 0.25}
    assert control.handle({**policy, "exclude": ["b.raw"]}) == {}
    assert sorted(vm.disks) == ["a.raw"] and vm.status()["excluded"] == ["b.raw"]
    assert resync_of(vm) == ("b.raw was removed", "regions", "disks")
    assert marked(vm, "a.raw") == []
    assert not record_of(vm, "b.raw").is_tracked, "it may be written to past its log now"
    assert [[log.disk for log in cycle.logs] for cycle in spool.list_cycles(vm.folder)] == [["a.raw", "b.raw"]]
    vm.release(GENERATION, 2)
    vm.begin(NEXT, Scope.REGIONS)
    assert any(name.startswith("b.raw.") for name in os.listdir(vm.folder))
    vm.resynced(NEXT)
    left = [name for name in os.listdir(vm.folder) if name.startswith("b.raw")]
    assert left == ["b.raw"], "nothing is needed of it any more"
    vm.rotate()
    control.handle({**policy, "exclude": []})
    assert resync_of(vm) == ("b.raw was added", "regions", "disks")
    assert marked(vm, "b.raw") == [[0, MIB]]
    vm.detach()


@pytest.mark.parametrize(
    "fields",
    [{}, {"exclude": "b.raw"}, {"exclude": [1]}, {"exclude": [], "hard_limit": 0}, {"exclude": [], "soft_limit": "x"}],
)
def test_a_policy_that_makes_no_sense_changes_nothing(tmp_path: Path, fields: dict[str, object]) -> None:
    vm = joined(tmp_path, a=64 * MIB, b=MIB)
    good = {"exclude": [], "hard_limit": 0.5, "soft_limit": 0.25} if fields else {}
    with pytest.raises(UsageError):
        TrackerControl(vm, "/none").handle({"op": "configure", **good, **fields})
    assert sorted(vm.disks) == ["a.raw", "b.raw"] and vm.resync_reason is None
    vm.detach()


def test_new_limits_hold_at_once(tmp_path: Path) -> None:
    vm = joined(tmp_path, a=64 * MIB)
    vm.configure(exclude=frozenset(), hard_limit=0.14, soft_limit=0.14)
    for at in range(9):
        vm.disks["a.raw"].write(os.urandom(MIB), at * MIB)
    assert "14% of the disks' size" in str(vm.resync_reason)
    vm.detach()


def test_while_a_copy_is_under_way_the_set_of_disks_stays(tmp_path: Path) -> None:
    vm = attached(make_folder(tmp_path, a=MIB, b=MIB))
    bring(vm)
    vm.configure(exclude=frozenset({"b.raw"}), hard_limit=0.5, soft_limit=0.25)
    assert vm.take_in().waiting == dict.fromkeys(["b.raw", "new.raw"], "a copy is under way")
    assert sorted(vm.disks) == ["a.raw", "b.raw"]
    assert vm.status()["unsettled"] == ["b.raw", "new.raw"]
    vm.resynced(GENERATION)
    settled = vm.take_in()
    assert (settled.added, settled.removed) == (["new.raw"], ["b.raw"])
    assert resync_of(vm) == ("new.raw was added; b.raw was removed", "regions", "disks")
    vm.detach()


def test_before_the_first_copy_disks_come_and_go_without_a_word(tmp_path: Path) -> None:
    vm = attached(make_folder(tmp_path, a=MIB), begin=False)
    bring(vm)
    assert vm.take_in().added == ["new.raw"]
    vm.configure(exclude=frozenset({"a.raw"}), hard_limit=0.5, soft_limit=0.25)
    assert sorted(vm.disks) == ["new.raw"]
    assert resync_of(vm) == (None, "full", None)
    vm.begin(GENERATION)
    vm.disks["new.raw"].write(b"logged", 0)
    vm.resynced(GENERATION)
    vm.rotate()
    vm.detach()


def test_another_cause_beside_it_is_told(tmp_path: Path) -> None:
    vm = joined(tmp_path, a=64 * MIB)
    with vm.gate:
        vm.degrade("for the test")
    bring(vm)
    vm.take_in()
    assert resync_of(vm) == ("for the test; new.raw was added", "regions", None)
    assert marked(vm, "a.raw") == [[3 * MIB, 65536]] and marked(vm, "new.raw") == [[0, MIB]]
    vm.detach()


def test_logs_that_are_lost_afterwards_are_another_cause(tmp_path: Path) -> None:
    vm = joined(tmp_path, a=64 * MIB)
    bring(vm)
    vm.take_in()
    with vm.gate:
        vm.degrade("for the test")
    assert resync_of(vm) == ("for the test", "regions", None)
    assert marked(vm, "a.raw") == [[3 * MIB, 65536]], "the cycle that was sealed went with the others"
    vm.detach()


def test_everything_excluded_and_included_again_is_everything(tmp_path: Path) -> None:
    vm = joined(tmp_path, a=64 * MIB)
    vm.configure(exclude=frozenset({"a.raw"}), hard_limit=0.5, soft_limit=0.25)
    assert not vm.disks and not vm.is_logging and vm.resync_reason == "a.raw was removed"
    vm.configure(exclude=frozenset(), hard_limit=0.5, soft_limit=0.25)
    assert vm.status()["resync_scope"] == "full"
    vm.begin(NEXT, Scope.FULL)
    assert vm.is_logging
    vm.detach()


# When a disk has settled ---------------------------------------------------------------------------------------


def test_a_disk_is_not_taken_in_before_it_stood_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "STILL_SECONDS", 0.4)
    vm = joined(tmp_path, a=64 * MIB)
    path = bring(vm)
    os.utime(path, (1, 1))  # as a copy that keeps times does
    for _ in range(3):
        assert "stood still" in vm.take_in().waiting["new.raw"]
        time.sleep(0.2)
        with open(path, "ab") as file:
            file.write(b"more")
        os.utime(path, (1, 1))
    assert vm.resync_reason is None and vm.is_logging, "nobody paid for asking"
    assert not os.path.exists(f"{path}.hvt")
    time.sleep(0.5)
    assert vm.take_in().added == ["new.raw"]
    vm.detach()


@pytest.mark.parametrize("how", ["writer", "hard link", "not a disk"])
def test_a_disk_to_which_there_is_another_way_waits(tmp_path: Path, how: str) -> None:
    vm = joined(tmp_path, a=64 * MIB)
    path = bring(vm, "new.vhd" if how == "not a disk" else "new.raw")
    name = os.path.basename(path)
    with open(path, "r+b" if how == "writer" else "rb"):
        if how == "hard link":
            os.link(path, f"{path}.other")
        assert list(vm.take_in().waiting) == [name]
    assert vm.resync_reason is None and name not in vm.disks
    vm.detach()


def served(vm: TrackedVm) -> VmFolder:
    return VmFolder(os.open(vm.folder, os.O_RDONLY | os.O_DIRECTORY), vm)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_while_the_mount_has_it_open_as_a_plain_file_it_is_no_disk(tmp_path: Path, flags: int) -> None:
    vm = joined(tmp_path, a=64 * MIB)
    mount = served(vm)
    bring(vm)
    file = mount.open("/new.raw", flags)
    assert list(vm.take_in().waiting) == ["new.raw"]
    file.release()
    assert vm.take_in().added == ["new.raw"]
    again = mount.open("/new.raw", os.O_RDWR)
    again.write(memoryview(b"through the log"), 0)
    again.release()
    vm.begin(NEXT, Scope.REGIONS)
    with pytest.raises(OSError, match="busy"):
        mount.unlink("/new.raw")
    vm.detach()


class Opener:
    """Instead of the injector: at the nth call the mount is asked to open the disk, and has a moment for it."""

    def __init__(self, mount: VmFolder, nth: int) -> None:
        self.left = nth
        self._mount = mount
        self._file: OpenFile | None = None
        self._thread = threading.Thread(target=self._open)

    def __call__(self, label: str, call: str, size: int) -> None:
        self.left -= 1
        if self.left == 0:
            self._thread.start()
            self._thread.join(0.02)

    def _open(self) -> None:
        self._file = self._mount.open("/new.raw", os.O_RDWR)

    def has_plain_file(self) -> bool:
        """Whether what was opened leads past the log."""
        if self.left > 0:
            return False
        self._thread.join(10)
        assert self._file is not None, "whoever opens the disk waits for ever"
        found = isinstance(self._file, PlainFile)
        self._file.release()
        return found


def can_be_opened_too_early(tmp_path: Path) -> bool:
    """Whether there is a call at which the mount opens the file, and the disk is taken in all the same."""
    opener, nth, found = None, 0, False
    while not found and (opener is None or opener.left <= 0):
        nth += 1
        (tmp_path / str(nth)).mkdir()
        vm = joined(tmp_path / str(nth), a=64 * MIB)
        opener = Opener(served(vm), nth)
        bring(vm)
        system.install(opener)
        added = vm.take_in().added
        system.install(None)
        found = opener.has_plain_file() and bool(added)
        vm.detach()
    assert found or nth > 20
    return found


def test_whoever_opens_a_disk_while_it_is_taken_in_writes_to_its_log(tmp_path: Path) -> None:
    assert not can_be_opened_too_early(tmp_path)


def test_looking_once_only_whether_it_is_open_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that is planted: the switch does not look again."""
    check, looked = TrackedVm.check_alone, set()

    def once(self: TrackedVm, name: str) -> None:
        if (self.folder, name) not in looked:
            looked.add((self.folder, name))
            check(self, name)

    monkeypatch.setattr(TrackedVm, "check_alone", once)
    assert can_be_opened_too_early(tmp_path)


def test_an_excluded_disk_is_a_file_like_any_other(tmp_path: Path) -> None:
    vm = joined(tmp_path, a=64 * MIB, b=MIB)
    mount = served(vm)
    before = mount.open("/b.raw", os.O_RDWR)
    vm.configure(exclude=frozenset({"b.raw"}), hard_limit=0.5, soft_limit=0.25)
    before.write(memoryview(b"untracked"), 0)
    before.fsync(True)
    assert vm.resync_reason == "b.raw was removed"
    vm.configure(exclude=frozenset(), hard_limit=0.5, soft_limit=0.25)
    assert vm.take_in().waiting.keys() == {"b.raw"}, "a handle from before leads past its log"
    mount.rename("/b.raw", "/.fuse_hidden0000000100000001", 0)  # as libfuse removes what is open
    assert not os.path.exists(os.path.join(vm.folder, "b.raw"))
    buffer = memoryview(bytearray(9))
    assert before.read_into(buffer, 0) == 9 and buffer == b"untracked"
    before.release()
    assert sorted(vm.disks) == ["a.raw"] and vm.status()["unsettled"] == []
    vm.detach()


# At rest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["cleanly", "killed", "with the host"])
def test_a_disk_that_came_at_rest_is_all_that_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    vm = joined(tmp_path, a=64 * MIB)
    vm.detach() if ends == "cleanly" else kill(vm)
    if ends == "with the host":
        monkeypatch.setattr(system, "boot_id", lambda: b"another boot    ")
    bring(vm)
    vm = attached(vm.folder, begin=False)
    reason, scope, cause = resync_of(vm)
    assert "new.raw was added" in str(reason) and scope == "regions"
    assert cause == (None if ends == "with the host" else "disks")
    assert marked(vm, "new.raw") == [[0, MIB]]
    assert marked(vm, "a.raw") == ([[3 * MIB, 65536]] if ends == "with the host" else [])
    vm.detach()


@pytest.mark.parametrize("files_too", [False, True])
@pytest.mark.parametrize("ends", ["cleanly", "killed", "with the host"])
def test_a_disk_that_went_at_rest_leaves_nothing_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, files_too: bool
) -> None:
    vm = joined(tmp_path, a=64 * MIB, b=MIB)
    vm.detach() if ends == "cleanly" else kill(vm)
    if ends == "with the host":
        monkeypatch.setattr(system, "boot_id", lambda: b"another boot    ")
    for name in os.listdir(vm.folder):
        if name == "b.raw" or (files_too and name.startswith("b.raw.")):
            os.unlink(os.path.join(vm.folder, name))
    for _ in range(2):
        vm = attached(vm.folder, begin=False)
        reason, scope, cause = resync_of(vm)
        assert ("a disk was removed" if files_too else "b.raw was removed") in str(reason) and scope == "regions"
        assert cause == (None if ends == "with the host" else "disks")
        kill(vm)
    vm = attached(vm.folder, begin=False)
    whole = [cycle.cycle for cycle in spool.list_cycles(vm.folder) if cycle.is_whole]
    assert whole == ([2] if ends == "cleanly" and not files_too else [])
    vm.begin(NEXT, Scope.REGIONS)
    assert marked(vm, "a.raw") == [[3 * MIB, 65536]], "what no point can tell any more"
    assert [disk["name"] for disk in vm.status()["disks"]] == ["a.raw"]
    vm.resynced(NEXT)
    assert not [name for name in os.listdir(vm.folder) if name.startswith("b.raw")]
    vm.detach()


def test_a_disk_that_comes_back_is_not_taken_for_the_one_that_went(tmp_path: Path) -> None:
    vm = joined(tmp_path, a=64 * MIB, b=MIB)
    vm.detach()
    path = os.path.join(vm.folder, "b.raw")
    os.rename(path, f"{path}.away")
    kill(attached(vm.folder, begin=False))
    os.rename(f"{path}.away", path)
    vm = attached(vm.folder, begin=False)
    assert marked(vm, "b.raw") == [[0, MIB]] and marked(vm, "a.raw") == []
    vm.detach()


@pytest.mark.parametrize("change", ["content", "larger", "replaced"])
def test_of_disks_that_are_as_they_were_left_nothing_is_compared_as_another_changed(
    tmp_path: Path, change: str
) -> None:
    vm = joined(tmp_path, a=64 * MIB, b=MIB)
    vm.detach()
    path = os.path.join(vm.folder, "b.raw")
    if change == "replaced":
        os.rename(bring(vm, "other"), path)
    else:
        with open(path, "r+b") as file:
            file.seek(600 * MIB if change == "larger" else 0)
            file.write(b"x")
    vm = attached(vm.folder, begin=False)
    size = os.stat(path).st_size
    assert marked(vm, "b.raw") == [[0, size]] and marked(vm, "a.raw") == []
    assert vm.status()["resync_cause"] is None, "nobody chose that"
    vm.detach()


@pytest.mark.parametrize("ends", ["cleanly", "killed"])
@pytest.mark.parametrize("scope", [Scope.REGIONS, Scope.FULL])
@pytest.mark.parametrize("change", ["came", "went"])
def test_a_set_of_disks_that_changed_at_rest_during_a_copy_has_compared_what_the_copy_was_for(
    tmp_path: Path, change: str, scope: Scope, ends: str
) -> None:
    vm = joined(tmp_path, a=64 * MIB, b=MIB)
    vm.begin(NEXT, scope)
    vm.disks["a.raw"].write(b"during the copy", 7 * MIB)
    vm.detach() if ends == "cleanly" else kill(vm)
    bring(vm) if change == "came" else os.unlink(os.path.join(vm.folder, "b.raw"))
    vm = attached(vm.folder, begin=False)
    if scope is Scope.FULL:
        assert resync_of(vm)[1:] == ("full", None)
        assert "while everything was being copied" in str(vm.resync_reason)
    else:
        assert resync_of(vm)[1] == "regions" and not vm.status()["resyncing"]
        assert vm.status()["resync_bases"] == [[GENERATION.hex(), 1]]
        vm.begin(uuid.uuid4().bytes, Scope.REGIONS)
        assert marked(vm, "a.raw") == [[3 * MIB, 65536], [7 * MIB, 65536]]
        assert change == "went" or marked(vm, "new.raw") == [[0, MIB]]
    vm.detach()


def test_disks_of_two_histories_are_compared_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = attached(make_folder(tmp_path / "other", b=MIB), begin=False)
    other.begin(NEXT)
    other.detach()
    vm = joined(tmp_path, a=64 * MIB)
    vm.detach()
    for name in os.listdir(other.folder):
        shutil.move(os.path.join(other.folder, name), vm.folder)
    vm = attached(vm.folder, begin=False)
    assert resync_of(vm) == ("disks of different histories were put together", "full", None)
    vm.detach()


def test_a_state_whose_creation_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, a=MIB)
    path = os.path.join(folder, "a.raw.hvt")
    for torn in (b"", b"\0" * 4096 + b"HVFTRK1\0"):
        with open(path, "wb") as file:
            file.write(torn.ljust(tracking.STATE_SIZE, b"\0"))
        vm = attached(folder)
        assert vm.is_logging
        kill(vm)


def test_a_state_that_cannot_be_written_leaves_no_marks_that_look_enough(tmp_path: Path) -> None:
    vm = joined(tmp_path, a=64 * MIB, b=MIB)
    seen = 0

    def fail(label: str, _call: str, _size: int) -> None:
        nonlocal seen
        seen += label == "state:sync"
        if label == "state:sync" and seen == 2:
            raise OSError(5, "broken")

    system.install(fail)
    with vm.gate:
        vm.degrade("for the test")
    system.install(None)
    vm.disks["a.raw"].write(b"neither logged nor marked", 20 * MIB)
    kill(vm)
    vm = attached(vm.folder, begin=False)
    assert vm.status()["resync_scope"] == "full"
    vm.detach()


# Deaths at every call ------------------------------------------------------------------------------------------


def settled(site: Site) -> None:
    """The replica has all but one block of a.raw."""
    site.converge()
    site.tracker.disks["a.raw"].write(b"x" * 512, BLOCK)


def with_newcomer(site: Site) -> None:
    settled(site)
    site.create("c.raw")


def with_excluded(site: Site) -> None:
    site.choose(frozenset({"b.raw"}))
    settled(site)


def with_untracked(site: Site) -> None:
    """Writes to b.raw are in no log and no mark."""
    settled(site)
    site.choose(frozenset({"b.raw"}))
    site.write_untracked()


def copying(site: Site) -> None:
    """A copy of regions is under way."""
    settled(site)
    site.lose_logs()
    site.tracker.begin(site.dice.randbytes(16), Scope.REGIONS)
    site.tracker.disks["a.raw"].write(b"z" * 512, BLOCK)


def come_back(site: Site) -> None:
    """The tracker dies, and b.raw is no more excluded when it is started again."""
    site.kill()
    site.exclude = frozenset()
    site.attach()


def at_rest(change: Callable[[Site], None]) -> Callable[[Site], None]:
    def action(site: Site) -> None:
        site.detach()
        change(site)
        site.attach()

    return action


CHANGES: dict[str, tuple[Callable[[Site], None], Callable[[Site], None]]] = {
    "take in": (with_newcomer, lambda site: site.tracker.take_in() and None),
    "exclude": (settled, lambda site: site.choose(frozenset({"b.raw"}))),
    "include": (with_excluded, Site.include_all),
    "exchange": (with_newcomer, lambda site: site.choose(frozenset({"b.raw"}))),
    "come back at rest": (with_untracked, come_back),
    "come at rest": (settled, at_rest(lambda site: site.create("c.raw"))),
    "go at rest": (settled, at_rest(lambda site: site.remove("b.raw"))),
    "come at rest during a copy": (copying, at_rest(lambda site: site.create("c.raw"))),
    "go at rest during a copy": (copying, at_rest(lambda site: site.remove("b.raw"))),
    "replaced at rest during a copy": (copying, at_rest(lambda site: site.create("b.raw"))),
    "replaced at rest": (settled, at_rest(lambda site: site.create("b.raw"))),
}


def killed_at_every_call(root: str, change: str) -> int:
    """Of the process and of the host in turn; returns at how many. Raises Violation."""
    prepare, action = CHANGES[change]
    nth, died = 0, True
    while died:
        nth += 1
        folder = os.path.join(root, f"{change}{nth}")
        os.mkdir(folder)
        with Site(folder, seed=1) as site:
            prepare(site)
            copies = site.full_copies
            site.compared.clear()
            site.reaper.die_at(frozenset({"tracker"}), None, nth=nth)  # type: ignore[arg-type]
            died = site._dies_in(lambda site=site: action(site))
            if died:
                site.cut_power() if nth % 2 else site.kill()
                site.attach()
            site.check()
            for name in site.names:
                site.tracker.disks[name].write(b"y" * 512, 0)
            site.check()
            site.converge()
            assert site.full_copies == copies, f"everything was compared after {site.happened}"
            others = [name for name in DISKS if name == "a.raw" or change == "take in"]
            for name in others:
                assert site.compared[name] <= {0, BLOCK}, f"{site.compared} after {site.happened}"
            assert {name: bytes(each) for name, each in site.replica.content.items()} == {
                name: site.image(name) for name in site.names
            }
        shutil.rmtree(folder)
    return nth - 1


@pytest.mark.parametrize("change", CHANGES)
def test_death_at_any_call_of_a_change_of_disks_loses_no_mark_and_compares_no_other_disk(
    root: str, change: str
) -> None:
    assert killed_at_every_call(root, change) > 8


def forgets_to_forget(self: state.TrackingState) -> None:
    pass


def joins_first(newcomer: resync.Tracked, members: list[resync.Tracked], **options: object) -> None:
    """Its record says that it belongs to the VM before its marks are durable."""
    disk, _ = newcomer
    mark, disk.doubt_all = disk.doubt_all, lambda: None  # type: ignore[method-assign]
    JOIN(newcomer, members, **options)  # type: ignore[arg-type]
    mark()


JOIN = history.join
PLANTED: dict[str, tuple[str, object, str, object]] = {
    "a disk that comes is not marked": ("take in", TrackedDisk, "doubt_all", lambda self: None),
    "a disk is a member before it is marked": ("take in", history, "join", joins_first),
    "a disk that goes is not forgotten": ("come back at rest", state.TrackingState, "forget", forgets_to_forget),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_bugs_that_are_planted_are_found(root: str, monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    change, *bug = PLANTED[planted]
    monkeypatch.setattr(*bug)
    with pytest.raises((Violation, AssertionError)):
        killed_at_every_call(root, change)


class Meddler:
    """Instead of the injector: at the nth call at which the guest could write, it does."""

    def __init__(self, site: Site, nth: int) -> None:
        self.left = nth
        self._site = site

    def __call__(self, label: str, call: str, size: int) -> None:
        if not self._site.tracker.gate.locked():
            self.left -= 1
            if self.left == 0:
                self._site.tracker.disks["a.raw"].write(b"meddling" * 64, 3 * BLOCK)


def meddled_with_at_every_call(root: str) -> int:
    """Returns at how many. Raises Violation."""
    nth, meddler = 0, None
    while meddler is None or meddler.left <= 0:
        nth += 1
        folder = os.path.join(root, str(nth))
        os.mkdir(folder)
        with Site(folder, seed=2) as site:
            with_newcomer(site)
            meddler = Meddler(site, nth)
            system.install(meddler)
            site.tracker.configure(exclude=frozenset({"b.raw"}), hard_limit=1000, soft_limit=0.25)
            system.install(site.reaper)
            site.check()
            site.converge()
        shutil.rmtree(folder)
    return nth - 1


def test_what_is_written_while_disks_change_is_logged_or_marked(root: str) -> None:
    assert meddled_with_at_every_call(root) > 10


def test_forgetting_what_was_logged_while_disks_change_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that is planted."""
    monkeypatch.setattr(TrackedDisk, "unsealed", lambda self: [])
    with pytest.raises(Violation):
        meddled_with_at_every_call(root)


def test_a_resynchronisation_for_disks_needs_what_the_marks_add_to(tmp_path: Path) -> None:
    vm = joined(tmp_path, a=64 * MIB)
    bring(vm)
    vm.take_in()
    with pytest.raises(ResyncRequiredError):
        vm.rotate()
    assert resync.regions_of(vm.disks["new.raw"]).count(DIRTY)
    vm.detach()
