"""Disks that a side hands over are its store's replica images, and none is lost on the way, whenever it dies."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from hvfuse import system
from hvfuse.errors import BusyError, HvfuseError, NoSpaceError, NotFoundError, StateError, UsageError
from hvfuse.formats.digests import BLOCK
from hvfuse.position import Position
from hvfuse.states import ReplicationState
from hvfuse.target import failing_over, handed_over, relation, removal
from hvfuse.target.adopt import adopt
from hvfuse.target.check import check
from hvfuse.target.failing_over import UNPLANNED
from hvfuse.target.images import ReplicaImages
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.dying import done_until
from tests.target.model import Source, check_points
from tests.target.test_adopt import resync
from tests.target.test_failing_over import Claimant, S, T, X, put, state
from tests.target.test_kill import folder  # noqa: F401

SIZES = {"a.raw": 5 * BLOCK + 77, "b.img": 3 * BLOCK}
EPOCH = 4


class Given:
    """What S gives away: `old` disks in `folder`; T has the VM, as `source` says."""

    def __init__(self, path: str, disks: str) -> None:
        self.path, self.folder = path, disks
        self.source = Source("vm", SIZES, seed=3)
        self.source.write("a.raw", BLOCK, self.source.random.randbytes(2 * BLOCK))
        self.source.write("b.img", 100, self.source.random.randbytes(BLOCK))
        self.old = {name: bytes(data) for name, data in self.source.disks.items()}
        os.makedirs(disks, exist_ok=True)
        for name, data in self.old.items():
            with open(os.path.join(disks, name), "wb") as file:
                file.write(data)
        self.source.write("a.raw", 4 * BLOCK + 5, b"what T wrote")

    def take(self, store: Store) -> Position:
        return handed_over.take(store, "vm", self.folder, list(SIZES), primary=T, epoch=EPOCH)

    def take_anew(self) -> None:
        with Store(self.path) as store:
            self.take(store)

    def demand_all(self) -> None:
        """Every disk is whole at one of its places."""
        for name, data in self.old.items():
            found = []
            for path in (os.path.join(self.folder, name), os.path.join(self.path, "replicas", "vm", name)):
                if os.path.exists(path):
                    with open(path, "rb") as file:
                        found.append(file.read())
            assert data in found, name

    def demand_taken(self, store: Store) -> None:
        """The store has them, nothing else has, and T brings them up to date by what differs alone."""
        assert not os.listdir(self.folder)
        assert sorted(os.listdir(store.replica_folder("vm"))) == sorted(SIZES)
        for name, data in self.old.items():
            with open(store.image_path("vm", name), "rb") as file:
                assert file.read() == data
        assert check(store).findings == ()
        vm = store.vm("vm")
        assert (vm.primary, vm.moving, vm.failover, vm.returns_to) == (T.home, None, None, None)
        assert vm.epoch >= EPOCH and store.epoch() >= vm.epoch
        assert failing_over.state_of(vm) is ReplicationState.WAITING_FOR_INITIAL_REPLICATION
        home = Claimant(store, T, vm.epoch)
        assert resync(self.source, home.replica)[1] == 1
        self.source.write("b.img", 9, b"later")
        self.source.ship_to(home.replica)
        check_points(store, self.source)
        assert check(store).findings == ()
        home.replica.close()


@pytest.fixture
def given(tmp_path) -> Given:
    return Given(str(tmp_path / "store"), str(tmp_path / "disks"))


@pytest.fixture
def elsewhere(folder) -> Iterator[str]:  # noqa: F811
    """A directory on another file system than `folder` and `tmp_path`."""
    path = os.path.join(folder, "elsewhere")
    os.mkdir(path)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.fixture(autouse=True)
def no_injector() -> Iterator[None]:
    yield
    system.install(None)


def labels() -> list[str]:
    """The labels of the calls from here on."""
    seen: list[str] = []

    def injector(label: str, call: str, size: int) -> None:
        seen.append(label)

    system.install(injector)
    return seen


def test_on_the_same_file_system_disks_are_renamed_and_nothing_is_read_or_written(given) -> None:
    inodes = {name: os.stat(os.path.join(given.folder, name)).st_ino for name in SIZES}
    with Store(given.path) as store:
        seen = labels()
        position = given.take(store)
        assert seen.count("handed-over:rename") == 2 and not {"image:write", "image:sync"} & set(seen)
        assert {name: os.stat(store.image_path("vm", name)).st_ino for name in SIZES} == inodes
        assert given.take(store) == position == store.vm("vm").position
        given.demand_taken(store)


def test_on_another_file_system_they_are_copied_and_leave_holes_holes(elsewhere, folder) -> None:  # noqa: F811
    given = Given(os.path.join(folder, "store"), elsewhere)
    told: list[tuple[int, int]] = []
    with Store(given.path) as store:
        position = handed_over.take(
            store, "vm", elsewhere, list(SIZES), primary=T, epoch=EPOCH, progress=lambda *at: told.append(at)
        )
        assert {total for _, total in told} == set(SIZES.values()) and all(at <= total for at, total in told)
        assert os.stat(store.image_path("vm", "b.img")).st_blocks * 512 < SIZES["b.img"]
        assert given.take(store) == position
        given.demand_taken(store)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("before", ["nothing", "let go", "left over"])
def test_killed_at_every_step_no_disk_is_lost_and_it_goes_on_to_the_same_end(folder, elsewhere, far, before) -> None:  # noqa: F811
    for step in itertools.count(1):
        root = os.path.join(folder, f"{before}{step}")
        given = Given(os.path.join(root, "store"), os.path.join(elsewhere if far else root, "disks"))
        had(given, before)
        ended = done_until(step, given.take_anew)
        given.demand_all()
        with Store(given.path) as store:
            assert check(store).findings == (), step
            demand_refused_while_moving(store, given)
            given.take(store)
            given.demand_taken(store)
        shutil.rmtree(given.folder)
        shutil.rmtree(root)
        if ended:
            break
    assert step > 12


def had(given: Given, before: str) -> None:
    """What the store has of the VM beforehand."""
    with Store(given.path) as store:
        if before == "let go":
            failed_over_to_s(store)
        if before == "left over":
            leave_over(store)


def failed_over_to_s(store: Store, *, let_go: bool = True) -> None:
    """The VM came home to S once, by this store."""
    source, home = Source("vm", {"a.raw": 9_000, "old.raw": 800}, seed=8), Claimant(store, T)
    source.write("a.raw", 0, b"old" * 1000)
    source.copy_to(home.replica)
    source.ship_to(home.replica)
    failing_over.fail_over(store, "vm", S, kind=UNPLANNED, point_id=store.point("vm").id, comes_home=True)
    failing_over.commit(store, "vm", S)
    if let_go:
        failing_over.let_go(store, "vm", S)


def leave_over(store: Store) -> None:
    """An image of a disk of that name that no record knows of, and one that a copy was begun with."""
    interrupted = Source("vm", {"a.raw": 700, "passing.raw": 600}, seed=9)
    home = Claimant(store, T)
    manifest, _ = interrupted.begin_copy()
    home.replica.begin(manifest)
    home.replica.close()
    with open(store.image_path("vm", "b.img"), "wb") as file:
        file.write(random.Random(0).randbytes(9000))


def demand_refused_while_moving(store: Store, given: Given) -> None:
    """While some of the disks may have been moved, nothing else is put in their place."""
    vm = next(iter(store.vms()), None)
    if vm is None or vm.moving is None:
        return
    whole = given.source.begin_copy()[0]
    for replica in (Claimant(store, T, 99).replica, LocalReplica(store, "vm")):
        with pytest.raises(BusyError, match="being handed over"):
            replica.begin(whole)
    with pytest.raises(BusyError, match="being handed over"):
        adopt(store, "vm", filled(given))
    with pytest.raises(StateError):
        handed_over.take(store, "vm", given.folder, list(SIZES), primary=X, epoch=9)
    with pytest.raises((StateError, NotFoundError)):
        handed_over.take(store, "vm", given.folder, ["a.raw"], primary=T, epoch=EPOCH)
    given.demand_all()


def filled(given: Given) -> str:
    path = os.path.join(os.path.dirname(given.path), "brought")
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "a.raw"), "wb") as file:
        file.write(b"1" * 512)
    return path


def test_a_disk_that_is_missing_is_told_before_anything_changes(given) -> None:
    with Store(given.path) as store:
        leave_over(store)
        kept = store.vm("vm")
        os.unlink(os.path.join(given.folder, "b.img"))
        with pytest.raises(NotFoundError, match=r"b\.img: the disk is gone"):
            given.take(store)
        assert store.vm("vm") == kept
        assert os.listdir(given.folder) == ["a.raw"]


def test_a_disk_that_vanishes_between_two_attempts_is_told(given) -> None:
    times = itertools.count(1)

    def injector(label: str, call: str, size: int) -> None:
        if label == "handed-over:rename" and next(times) == 2:
            failing(label, label, errno.EIO)

    system.install(injector)
    with pytest.raises(HvfuseError):
        given.take_anew()
    system.install(None)
    with Store(given.path) as store:
        left = os.listdir(given.folder)
        assert len(left) == 1
        os.rename(os.path.join(given.folder, left[0]), os.path.join(given.folder, "away"))
        with pytest.raises(NotFoundError, match="the disk is gone"):
            given.take(store)
        os.rename(os.path.join(given.folder, "away"), os.path.join(given.folder, left[0]))
        given.take(store)
        given.demand_taken(store)


@pytest.mark.parametrize("odd", ["link", "folder", "damaged", "name", "twice", "none"])
def test_what_is_no_disk_is_refused_before_anything_changes(given, odd) -> None:
    names, path = list(SIZES), os.path.join(given.folder, "b.img")
    if odd in ("link", "folder"):
        os.rename(path, os.path.join(given.folder, "real"))
        os.symlink("real", path) if odd == "link" else os.mkdir(path)
    if odd == "damaged":
        with open(path, "wb") as file:
            file.write(b"conectix" + b"\xff" * 504 + bytes(2048) + b"conectix" + b"\xff" * 504)
    names = {"name": ["../a.raw"], "twice": ["a.raw", "a.raw"], "none": []}.get(odd, names)
    with Store(given.path) as store:
        if odd == "damaged":
            with pytest.raises(HvfuseError):
                handed_over.take(store, "vm", given.folder, names, primary=T, epoch=EPOCH)
        else:
            with pytest.raises(UsageError):
                handed_over.take(store, "vm", given.folder, names, primary=T, epoch=EPOCH)
        assert store.vms() == [] and os.path.exists(os.path.join(given.folder, "a.raw"))


def test_pins_keep_what_the_store_has(given) -> None:
    with Store(given.path) as store:
        failed_over_to_s(store, let_go=False)
        point = store.point("vm").id
        with pytest.raises(BusyError, match=point) as caught:
            given.take(store)
        assert caught.value.hint == "wait until the disks that were failed over are whole"
        failing_over.let_go(store, "vm", S)
        given.take(store)
        given.demand_taken(store)


def test_a_test_failover_keeps_what_the_store_has(given) -> None:
    with Store(given.path) as store:
        failed_over_to_s(store, let_go=False)
        store.unpin(store.pins("vm")[0].id)
        pin = store.pin("vm", store.point("vm").id, {"kind": "test-failover"})
        with pytest.raises(BusyError) as caught:
            given.take(store)
        assert caught.value.hint == "hvfuse failover cleanup vm"
        store.unpin(pin)
        given.take(store)
        given.demand_taken(store)


@pytest.mark.parametrize("stage", ["first copy", "points", "prepared", "failed over"])
def test_a_replica_that_somebody_else_ships_is_not_overwritten(given, stage) -> None:
    with Store(given.path) as store:
        other, home = Source("vm", {"a.raw": 9_000}, seed=1), Claimant(store, X)
        other.write("a.raw", 0, b"theirs" * 900)
        if stage == "first copy":
            manifest, frames = other.begin_copy()
            home.replica.begin(manifest)
            home.replica.put(frames[0])
        else:
            other.copy_to(home.replica)
            other.ship_to(home.replica)
        if stage == "prepared":
            claim = failing_over.Claim(party=X)
            failing_over.prepare(store, "vm", claim, point_id=store.point("vm").id, proof={})
        if stage == "failed over":
            failing_over.fail_over(store, "vm", S, kind=UNPLANNED, point_id=store.point("vm").id)
        kept = store.vm("vm")
        with pytest.raises((StateError, BusyError)):
            given.take(store)
        assert store.vm("vm") == kept
        check_points(store, other)
        given.demand_all()
        assert sorted(os.listdir(given.folder)) == sorted(SIZES)
        home.replica.close()


def test_what_is_there_again_after_it_was_handed_over_is_not_taken_for_it(given) -> None:
    with Store(given.path) as store:
        given.take(store)
        with open(os.path.join(given.folder, "a.raw"), "wb") as file:
            file.write(b"new")
        with pytest.raises(StateError, match="has the replica of vm already"):
            given.take(store)


def test_a_disk_in_both_places_is_believed_only_if_both_are_the_same(elsewhere, folder) -> None:  # noqa: F811
    given = Given(os.path.join(folder, "store"), elsewhere)
    system.install(lambda label, call, size: failing(label, "handed-over:remove", errno.EIO))
    with Store(given.path) as store:
        with pytest.raises(HvfuseError):
            given.take(store)
        system.install(None)
        assert sorted(os.listdir(elsewhere)) == sorted(SIZES)
        with open(os.path.join(elsewhere, "a.raw"), "r+b") as file:
            file.write(b"!")
        with pytest.raises(StateError, match="differ at byte 0"):
            given.take(store)
        with open(os.path.join(elsewhere, "a.raw"), "r+b") as file:
            file.write(given.old["a.raw"][:1])
        given.take(store)
        given.demand_taken(store)


def failing(label: str, wanted: str, error: int) -> None:
    if label == wanted:
        raise OSError(error, os.strerror(error))


@pytest.mark.parametrize("label", ["image:write", "image:sync", "handed-over:size", "handed-over:copied"])
def test_a_full_disk_keeps_the_disks_where_they_are_and_leaves_no_part(elsewhere, folder, label) -> None:  # noqa: F811
    given = Given(os.path.join(folder, "store"), elsewhere)
    system.install(lambda seen, call, size: failing(seen, label, errno.ENOSPC))
    with Store(given.path) as store:
        with pytest.raises(NoSpaceError) as caught:
            given.take(store)
        assert caught.value.recoverable
        system.install(None)
        assert sorted(os.listdir(elsewhere)) == sorted(SIZES)
        assert os.listdir(store.replica_folder("vm")) == []
        given.take(store)
        given.demand_taken(store)


def test_who_writes_the_images_is_not_disturbed(given) -> None:
    with Store(given.path) as store, ReplicaImages(store.replica_folder("vm")) as images, images.lock():
        with pytest.raises(BusyError):
            given.take(store)
        assert store.vms() == [] and sorted(os.listdir(given.folder)) == sorted(SIZES)


def test_what_was_let_go_by_halves_goes_first(given) -> None:
    with Store(given.path) as store:
        failed_over_to_s(store, let_go=False)
    done_until(4, lambda: letting_go(given.path))
    with Store(given.path) as store:
        assert removal.is_half_done(store, "vm")
        with pytest.raises(BusyError, match="not wholly deleted"):
            given.take(store)
        failing_over.let_go(store, "vm", S)
        given.take(store)
        with pytest.raises(StateError, match="not failed over"):
            failing_over.let_go(store, "vm", S)
        given.demand_taken(store)


def letting_go(path: str) -> None:
    with Store(path) as store:
        failing_over.let_go(store, "vm", S)


def test_letting_go_that_comes_late_does_not_delete_what_was_handed_over_since(given, monkeypatch) -> None:
    """It looked before the disks were handed over, and acts when they are."""
    with Store(given.path) as store:
        failed_over_to_s(store)
        empty = removal.empty

        def late(*arguments: object, **more: object) -> None:
            given.take(store)
            empty(*arguments, **more)

        monkeypatch.setattr(removal, "empty", late)
        with pytest.raises(StateError, match="not failed over"):
            failing_over.let_go(store, "vm", S)
        given.demand_taken(store)


def test_a_vm_that_was_handed_over_can_be_failed_over_again_once_it_has_a_point(given) -> None:
    with Store(given.path) as store:
        given.take(store)
        assert state(store) is ReplicationState.WAITING_FOR_INITIAL_REPLICATION
        with pytest.raises((StateError, NotFoundError)):
            failing_over.fail_over(store, "vm", S, kind=UNPLANNED, point_id="nothing")
        given.demand_taken(store)
        point = store.point("vm").id
        vm = failing_over.fail_over(store, "vm", S, kind=UNPLANNED, point_id=point, comes_home=True)
        assert vm.state == "FailbackInProgress" and vm.epoch > EPOCH
        check_points(store, given.source)
        put(store, state="FailbackInProgress")
        with pytest.raises(StateError):
            relation.suspend(store, "vm")
