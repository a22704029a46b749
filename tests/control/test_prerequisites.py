"""Every prerequisite fails where it is not met, for real, and keeps no other from being looked at."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from hvfuse.control import prerequisites
from hvfuse.control.config import Config, VmPolicy
from hvfuse.control.daemon import start_and_wait
from hvfuse.control.prerequisites import Outcome, demand, make_checks
from hvfuse.control.records import Records
from hvfuse.control.site import Site
from hvfuse.control.supervisor import stop_tracker, tracker_daemon
from hvfuse.errors import (
    BusyError,
    CorruptError,
    HvfuseError,
    NoSpaceError,
    NotFoundError,
    PrerequisiteError,
    StateError,
    UnsupportedError,
    UsageError,
)
from hvfuse.formats.image import ImageFormat, create_image
from hvfuse.states import Event
from hvfuse.system import SystemClock
from hvfuse.target import relation, schema
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.target.model import Source

pytestmark = pytest.mark.mount
MIB = 1 << 20


@dataclass
class Case:
    """A VM "vm" with a raw and a VHD disk, which a breaker may change before it is looked at."""

    root: Path
    records: Records
    stack: ExitStack
    paths: dict[str, str] = field(default_factory=dict)
    vm: str = "vm"
    policy: VmPolicy = field(default_factory=VmPolicy)
    now_ns: int | None = None

    @property
    def folder(self) -> Path:
        return self.root / "disks" / "vm"

    @property
    def store(self) -> str:
        return self.site().home.store

    def site(self) -> Site:
        home = Config(paths=self.paths).home(str(self.root))
        clock = SystemClock()
        if self.now_ns is not None:
            clock = StoppedClock(self.now_ns)
        return Site(home=home, policy=self.policy, vm=self.vm, records=self.records, clock=clock)

    def small_filesystem(self, name: str, size: int) -> str:
        """A file system of so many bytes, mounted over a loop device."""
        device, mount = self.root / f"{name}.ext4", self.root / name
        with open(device, "wb") as file:
            file.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(device)], check=True)
        mount.mkdir()
        subprocess.run(["mount", "-o", "loop", str(device), str(mount)], check=True)
        self.stack.callback(subprocess.run, ["umount", str(mount)], check=True)
        return str(mount)


class StoppedClock(SystemClock):
    def __init__(self, now_ns: int) -> None:
        self._now_ns = now_ns

    def now_ns(self) -> int:
        return self._now_ns


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    home = Config().home(str(tmp_path))
    home.make()
    folder = tmp_path / "disks" / "vm"
    folder.mkdir()
    (folder / "os.raw").write_bytes(os.urandom(MIB) + bytes(3 * MIB))
    create_image(str(folder / "data.vhd"), 8 * MIB, ImageFormat.VHD_DYNAMIC)
    home.make_vm("vm")
    with ExitStack() as stack, Records(home.records) as records:
        yield Case(tmp_path, records, stack)


def bad_name(case: Case) -> None:
    case.vm = ".vm"


def no_folder(case: Case) -> None:
    shutil.rmtree(case.folder)


def no_disks(case: Case) -> None:
    for path in case.folder.iterdir():
        path.rename(path.with_suffix(".txt"))


def all_excluded(case: Case) -> None:
    case.policy = replace(case.policy, exclude=frozenset({"os.raw", "data.vhd"}))


def corrupt_header(case: Case) -> None:
    with open(case.folder / "data.vhd", "r+b") as file:
        file.seek(512 + 100)
        file.write(b"\xff" * 16)


def corrupt_footer(case: Case) -> None:
    with open(case.folder / "data.vhd", "r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(bytes(512))


def lost_parent(case: Case) -> None:
    parent, child = case.folder / "base.vhd", case.folder / "child.vhd"
    create_image(str(parent), 8 * MIB, ImageFormat.VHD_DYNAMIC)
    case.stack.callback(setattr, prerequisites, "probe_for_tracking", prerequisites.probe_for_tracking)
    probe = prerequisites.probe_for_tracking
    shutil.copy(case.folder / "data.vhd", child)

    def differencing(path: str) -> object:
        info = probe(path)
        return replace(info, details={**info.details, "parent": "C:\\vm\\gone.vhd"}) if path == str(child) else info

    prerequisites.probe_for_tracking = differencing


def hard_link(case: Case) -> None:
    os.link(case.folder / "os.raw", case.root / "other")


def hard_link_while_mounted(case: Case) -> None:
    site = case.site()
    start_and_wait(tracker_daemon(site.home, "vm", clock=SystemClock()), clock=SystemClock())
    case.stack.callback(stop_tracker, site.home, "vm")
    os.link(case.folder / "os.raw", case.root / "other")


def writer(case: Case) -> None:
    fd = os.open(case.folder / "os.raw", os.O_RDWR)
    case.stack.callback(os.close, fd)


def no_fuse(case: Case) -> None:
    case.stack.callback(setattr, os.path, "exists", os.path.exists)
    real = os.path.exists
    os.path.exists = lambda path: path != "/dev/fuse" and real(path)


def full_source(case: Case) -> None:
    mount = case.small_filesystem("small", 16 * MIB)
    shutil.copytree(case.folder, f"{mount}/vm")
    case.paths["disks"] = mount
    case.policy = replace(case.policy, soft_limit=200)


def nearly_full_source(case: Case) -> None:
    mount = case.small_filesystem("small", 32 * MIB)
    shutil.copytree(case.folder, f"{mount}/vm")
    case.paths["disks"] = mount
    case.policy = replace(case.policy, soft_limit=100, hard_limit=1000)


def full_target(case: Case) -> None:
    case.paths["store"] = case.small_filesystem("small", 8 * MIB)
    (case.folder / "os.raw").write_bytes(os.urandom(12 * MIB))


def target_without_any_room(case: Case) -> None:
    mount = case.small_filesystem("small", 4 * MIB)
    with suppress(OSError), open(f"{mount}/filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    case.paths["store"] = mount


def store_on_fuse(case: Case) -> None:
    site = case.site()
    start_and_wait(tracker_daemon(site.home, "vm", clock=SystemClock()), clock=SystemClock())
    case.stack.callback(stop_tracker, site.home, "vm")
    case.paths["store"] = f"{site.home.mountpoint('vm')}/store"


def store_is_a_file(case: Case) -> None:
    case.paths["store"] = str(case.root / "file")
    (case.root / "file").touch()


def store_of_tomorrow(case: Case) -> None:
    with Store(case.store) as store:
        store.write("test", lambda txn: txn.put(schema.KEY_FORMAT, schema.u32(99), db=store.env.db(schema.META)))


def protected(case: Case) -> None:
    case.records.apply("vm", Event.ENABLE)


def replica_of(case: Case, *disks: str) -> None:
    source = Source("vm", dict.fromkeys(disks, 50_000))
    with Store(case.store) as store:
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        source.ship_to(replica)
        replica.close()


def replica_of_others(case: Case) -> None:
    replica_of(case, "c.raw", "d.raw")


def replica_of_its_own(case: Case) -> None:
    replica_of(case, "os.raw", "data.vhd")


def replica_failed_over(case: Case) -> None:
    replica_of(case, "os.raw")
    with Store(case.store) as store:
        state = "FailedOverWaitingCompletion"
        store.write("test", lambda txn: store.save_vm(txn, replace(store.load_vm(txn, "vm"), state=state)))


def replica_suspended(case: Case) -> None:
    replica_of(case, "os.raw")
    with Store(case.store) as store:
        relation.suspend(store, "vm")


def replica_half_deleted(case: Case) -> None:
    replica_of(case, "os.raw")
    with Store(case.store) as store:
        store.write("test", lambda txn: txn.delete(b"vm", db=store.env.db(schema.VMS)))
        mark = schema.PREFIX_GONE + schema.u32(1)
        store.write("test", lambda txn: txn.put(mark, b"vm", db=store.env.db(schema.META)))


def clock_set_back(case: Case) -> None:
    case.now_ns = 10**9


FAILING = [
    (bad_name, "VM name", UsageError, "begins with a dot"),
    (no_folder, "disks", NotFoundError, "no directory"),
    (no_disks, "disks", NotFoundError, "no disk"),
    (all_excluded, "disks", NotFoundError, "no disk"),
    (corrupt_header, "disk structures", CorruptError, "data.vhd"),
    (corrupt_footer, "disk structures", CorruptError, "data.vhd"),
    (lost_parent, "disk structures", CorruptError, "its parent gone.vhd is not there"),
    (hard_link, "other ways in", UnsupportedError, "hard link"),
    (hard_link_while_mounted, "other ways in", UnsupportedError, "hard link"),
    (writer, "other ways in", BusyError, "open for writing"),
    (no_fuse, "machine", PrerequisiteError, "no /dev/fuse"),
    (full_source, "room for logs", NoSpaceError, "soft_limit"),
    (full_target, "room at target", NoSpaceError, "the first copy takes about"),
    (target_without_any_room, "target", NoSpaceError, "small"),
    (store_on_fuse, "target", UnsupportedError, "lies on FUSE"),
    (store_is_a_file, "target", HvfuseError, "file"),
    (store_of_tomorrow, "target", UnsupportedError, "format 99"),
    (protected, "protection", StateError, "allowed: disable, start, suspend, cancel"),
    (replica_of_others, "replica", UsageError, "of other disks: c.raw, d.raw"),
    (replica_failed_over, "replica", StateError, "FailedOverWaitingCompletion"),
    (replica_half_deleted, "replica", BusyError, "not wholly deleted"),
]


@pytest.mark.parametrize(("broken", "name", "kind", "text"), FAILING, ids=[row[0].__name__ for row in FAILING])
def test_what_is_missing_fails_its_own_check_and_names_what_mends_it(
    case: Case, broken: Callable[[Case], None], name: str, kind: type[HvfuseError], text: str
) -> None:
    broken(case)
    checks = make_checks(case.site())
    assert [check.name for check in checks] == list(prerequisites.names())
    failed = [check for check in checks if check.outcome is Outcome.FAILED]
    assert [check.name for check in failed] == [name], [(check.name, check.text) for check in failed]
    assert isinstance(failed[0].error, kind) and text in failed[0].text, failed
    with pytest.raises(kind, match=text.replace("(", r"\(")):
        demand(case.site(), checks)


WARNING = [
    (nearly_full_source, "room for logs", "hard_limit"),
    (replica_suspended, "replica", "suspended at the target"),
    (clock_set_back, "clock", "set back"),
]


@pytest.mark.parametrize(("broken", "name", "text"), WARNING, ids=[row[0].__name__ for row in WARNING])
def test_what_is_doubtful_is_told_and_stands_in_nobodys_way(
    case: Case, broken: Callable[[Case], None], name: str, text: str
) -> None:
    broken(case)
    checks = make_checks(case.site())
    assert [(check.name, text in check.text) for check in checks if check.outcome is Outcome.WARNED] == [(name, True)]
    demand(case.site(), checks)


def test_a_sound_vm_passes_with_and_without_a_replica_of_its_own(case: Case) -> None:
    assert {check.outcome for check in make_checks(case.site())} == {Outcome.PASSED}
    replica_of_its_own(case)
    found = {check.name: check for check in make_checks(case.site())}
    assert found["room at target"].outcome is Outcome.SKIPPED
    assert "only what differs travels" in found["replica"].text


def test_all_that_is_missing_is_told_at_once(case: Case) -> None:
    for broken in (hard_link, corrupt_header, protected):
        broken(case)
    checks = make_checks(case.site())
    with pytest.raises(PrerequisiteError) as caught:
        demand(case.site(), checks)
    told = str(caught.value)
    assert "vm: 3 of 11 prerequisites are missing" in told
    assert "hard link" in told and "data.vhd" in told and "protected already" in told
