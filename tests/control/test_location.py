"""Which store a VM's replica lies in, and that none is begun where a disk is missing; who a home is."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvfuse.control.config import Config, VmPolicy
from hvfuse.control.home import Home
from hvfuse.control.location import StoreMissingError, all_locations, is_source, locate, store_path
from hvfuse.control.records import Records, VmRecord
from hvfuse.errors import CorruptError, NotFoundError, UnreachableError, UsageError
from hvfuse.states import Event, ReplicationState
from hvfuse.target.store import Store
from tests.dying import done_until

REPLICATING = VmRecord(state=ReplicationState.REPLICATING)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Config().home(str(tmp_path / "home"))
    made.make()
    return made


def with_disk(home: Home, vm: str = "vm") -> None:
    os.makedirs(home.folder(vm))
    Path(home.folder(vm), "os.raw").touch()


def test_the_record_says_it_before_the_policy_and_that_before_the_home(home: Home, tmp_path: Path) -> None:
    with_disk(home)
    far, farther = str(tmp_path / "far"), str(tmp_path / "farther")
    assert store_path(home, VmPolicy(), REPLICATING, "vm") == home.store
    assert store_path(home, VmPolicy(target=far), REPLICATING, "vm") == far
    assert store_path(home, VmPolicy(target=far), replace(REPLICATING, store=farther), "vm") == farther
    assert store_path(home, VmPolicy(target=far), VmRecord(), "vm") == far, "it is going to be shipped"
    assert store_path(home, VmPolicy(target="../far"), REPLICATING, "vm") == far, "relative to the home"


@pytest.mark.parametrize(
    ("record", "folder", "source"),
    [
        (VmRecord(), None, False),
        (VmRecord(), "empty", False),
        (VmRecord(), "disk", True),
        (VmRecord(enabled=False), None, True),
        (VmRecord(health="Normal"), None, False),
        (REPLICATING, None, True),
    ],
)
def test_a_vm_that_is_no_source_here_lies_in_the_homes_own_store(
    home: Home, record: VmRecord, folder: str | None, source: bool
) -> None:
    if folder == "disk":
        with_disk(home)
    elif folder == "empty":
        os.makedirs(home.folder("vm"))
    assert is_source(home, record, "vm") is source
    assert store_path(home, VmPolicy(target="/far"), record, "vm") == ("/far" if source else home.store)


def test_a_name_that_no_vm_can_have_is_no_source(home: Home) -> None:
    assert not is_source(home, VmRecord(), "../vm")


# Beginning a store ----------------------------------------------------------------------------------------------


def nothing(target: Path) -> None:
    pass


def a_store(target: Path) -> None:
    Store(str(target)).close()


def a_store_just_begun(target: Path) -> None:
    (target / "replicas").mkdir(parents=True)


def an_empty_directory(target: Path) -> None:
    target.mkdir()


def something_else(target: Path) -> None:
    target.mkdir()
    (target / "letters.txt").touch()


@pytest.mark.parametrize(
    ("prepare", "begins"),
    [
        (nothing, True),
        (a_store, True),
        (a_store_just_begun, True),
        (an_empty_directory, False),
        (something_else, False),
    ],
)
def test_a_store_is_begun_only_where_nothing_is_that_could_be_a_mount_point(
    home: Home, tmp_path: Path, prepare: object, begins: bool
) -> None:
    target = tmp_path / "store"
    assert callable(prepare)
    prepare(target)
    before = sorted(os.listdir(target)) if target.exists() else None
    place = locate(home, VmPolicy(target=str(target)), REPLICATING, "vm")
    if begins:
        place.open(create=True).close()
        assert place.is_there
        place.open(read_only=True).close()
        return
    with pytest.raises(StoreMissingError, match="no store in it") as caught:
        place.open(create=True)
    assert caught.value.recoverable and str(target) in str(caught.value.hint)
    assert sorted(os.listdir(target)) == before, "nothing was put there"
    with pytest.raises(StoreMissingError):
        place.find()


def test_a_target_without_its_parent_is_told_and_not_made(home: Home, tmp_path: Path) -> None:
    place = locate(home, VmPolicy(target=str(tmp_path / "disk" / "store")), REPLICATING, "vm")
    with pytest.raises(StoreMissingError, match=f"nor the directory {tmp_path}/disk"):
        place.open(create=True)
    assert not (tmp_path / "disk").exists()


def test_looking_begins_nothing(home: Home, tmp_path: Path) -> None:
    for target in (None, str(tmp_path / "store")):
        place = locate(home, VmPolicy(target=target), REPLICATING, "vm")
        assert place.find() is None
        with pytest.raises(NotFoundError):
            place.open(read_only=True)
        assert not os.path.exists(place.path)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_store_that_holds_a_point_is_missed_and_not_begun_again(home: Home, tmp_path: Path, is_own: bool) -> None:
    target = None if is_own else str(tmp_path / "store")
    record = replace(REPLICATING, point="p-1", shipped_to=target)
    place = locate(home, VmPolicy(target=target), record, "vm")
    for _ in range(2):
        with pytest.raises(UnreachableError, match="is not there") as caught:
            place.open(create=True)
        assert "replicas" in str(caught.value.hint)
    os.mkdir(place.path)  # the mount point is there, and the disk is not
    with pytest.raises(UnreachableError):
        place.open(create=True)
    assert os.listdir(place.path) == []
    os.mkdir(os.path.join(place.path, "replicas"))  # as the hint says
    place.open(create=True).close()


def test_where_another_store_holds_the_point_the_new_one_may_be_begun(home: Home, tmp_path: Path) -> None:
    target = str(tmp_path / "store")
    for before in (None, str(tmp_path / "old")):
        place = locate(home, VmPolicy(target=target), replace(REPLICATING, point="p-1", shipped_to=before), "vm")
        assert not place.has_point
        place.open(create=True).close()


def test_a_store_is_begun_wholly_or_not_at_all(home: Home, tmp_path: Path) -> None:
    """Whoever dies in the middle leaves no directory that would be taken for a mount point."""
    for step in itertools.count(1):
        target = tmp_path / f"{step}" / "store"
        target.parent.mkdir()
        place = locate(home, VmPolicy(target=str(target)), REPLICATING, "vm")
        is_done = done_until(step, lambda place=place: place.open(create=True).close())  # type: ignore[misc]
        assert not target.exists() or place.is_there
        place.open(create=True).close()
        if is_done:
            break
    assert step > 2


@pytest.mark.parametrize(
    ("config", "store"), [("", "store"), ('[paths]\nstore = "elsewhere"\n', "elsewhere"), (None, "store")]
)
def test_a_home_in_the_place_of_its_store_is_told_with_the_right_path(
    home: Home, tmp_path: Path, config: str | None, store: str
) -> None:
    other = tmp_path / "other"
    (other / "store").mkdir(parents=True)
    if config is not None:
        (other / "hvfuse.toml").write_text(config)
    place = locate(home, VmPolicy(target=str(other)), REPLICATING, "vm")
    for create in (True, False):
        with pytest.raises(UsageError, match="the home that it belongs to") as caught:
            place.open(create=create)
        assert f'"{other / store}"' in str(caught.value.hint)


@pytest.fixture
def unmounted(tmp_path: Path) -> Iterator[Path]:
    """The place of a disk that comes and goes."""
    directory = tmp_path / "disk"
    directory.mkdir()
    yield directory
    subprocess.run(["umount", "-q", str(directory)], check=False)


def test_a_store_on_a_disk_that_comes_back_is_found_again(home: Home, tmp_path: Path, unmounted: Path) -> None:
    disk = tmp_path / "disk.img"
    with open(disk, "wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(disk)], check=True)
    place = locate(home, VmPolicy(target=str(unmounted / "home" / "store")), REPLICATING, "vm")
    with pytest.raises(StoreMissingError):
        place.open(create=True)
    assert os.listdir(unmounted) == []
    subprocess.run(["mount", "-o", "loop", str(disk), str(unmounted)], check=True)
    (unmounted / "home").mkdir()
    place.open(create=True).close()
    subprocess.run(["umount", str(unmounted)], check=True)
    with pytest.raises(StoreMissingError):
        place.open(create=True)


def test_all_stores_are_told_once_each_the_old_ones_too(home: Home, tmp_path: Path) -> None:
    far, old = str(tmp_path / "far"), str(tmp_path / "old")
    for vm in ("a", "b", "c"):
        with_disk(home, vm)
    config = Config(vms={"a": VmPolicy(target=far), "b": VmPolicy(target=f"{far}/")})
    os.symlink(far, tmp_path / "link")
    config = replace(config, vms={**config.vms, "c": VmPolicy(target=str(tmp_path / "link"))})
    with Records(home.records) as records:
        records.apply("gone", Event.ENABLE, shipped_to=old)
        assert [place.path for place in all_locations(home, config, records)] == [home.store, far, old]


# Who a home is --------------------------------------------------------------------------------------------------


def test_a_home_keeps_its_id_and_shares_it_with_none(home: Home, tmp_path: Path) -> None:
    made = home.identity()
    assert len(made) == 32 and int(made, 16)
    assert home.identity() == made
    assert Config().home(str(tmp_path / "second")).identity() != made


def test_an_id_is_made_wholly_or_not_at_all(home: Home) -> None:
    path = Path(home.state, "home-id")
    for step in itertools.count(1):
        path.unlink(missing_ok=True)
        is_done = done_until(step, home.identity)
        kept = path.read_text().strip() if path.exists() else None
        found = home.identity()
        assert kept in (None, found), "of an id that was there, none is made anew"
        if is_done:
            break
    assert step > 4


def test_of_several_that_make_it_at_once_all_get_the_same(home: Home) -> None:
    code = f"from hvfuse.control.config import Config; print(Config().home({home.root!r}).identity())"
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    found = {process.communicate()[0].strip() for process in started}
    assert found == {home.identity()}


def test_an_id_that_is_damaged_is_not_made_anew(home: Home) -> None:
    home.identity()
    for damage in ("", "x" * 32 + "\n", "0" * 31 + "\n"):
        Path(home.state, "home-id").write_text(damage)
        with pytest.raises(CorruptError):
            home.identity()
