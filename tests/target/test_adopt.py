"""Copies that somebody put beside the store become a replica: wholly, or not at all."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import random
import shutil
import subprocess

import pytest

from hvfuse import system
from hvfuse.errors import BusyError, CorruptError, HvfuseError, NoSpaceError, NotFoundError, UsageError
from hvfuse.extent import Extent
from hvfuse.formats.digests import BLOCK, DigestKey, digest_blocks
from hvfuse.frames import unpack_header
from hvfuse.manifest import CycleKind
from hvfuse.position import PositionMismatchError
from hvfuse.target.adopt import adopt
from hvfuse.target.check import check
from hvfuse.target.images import ReplicaImages
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.schema import UNKNOWN_DISK
from hvfuse.target.store import Store
from tests.target.model import Source, check_points, send

SIZES = {"a.raw": 5 * BLOCK + 77, "b.img": 3 * BLOCK}


@pytest.fixture
def source() -> Source:
    source = Source("vm", SIZES, seed=3)
    source.write("a.raw", BLOCK, source.random.randbytes(2 * BLOCK))
    source.write("b.img", 100, source.random.randbytes(BLOCK))
    return source


@pytest.fixture
def folder(tmp_path, source) -> str:
    """Copies of the disks."""
    path = tmp_path / "brought"
    path.mkdir()
    for name, data in source.disks.items():
        (path / name).write_bytes(data)
    return str(path)


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store")) as store:
        yield store


@pytest.fixture(autouse=True)
def no_injector():
    yield
    system.install(None)


def images(store: Store) -> dict[str, bytes]:
    folder = store.replica_folder("vm")
    found = {}
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as image:
            found[name] = image.read()
    return found


def resync(source: Source, replica: LocalReplica) -> tuple[int, int]:
    """A copy of differences as the shipper makes it. Returns (blocks compared, blocks sent)."""
    key, compared = DigestKey.fresh(), 0
    position = replica.position()
    source.begin_copy()
    manifest = source.manifest(CycleKind.COPY, previous=position)
    replica.begin(manifest)
    changes = {}
    for name, data in source.disks.items():
        length = -(-max(len(data), replica.extent(source.ids[name])) // BLOCK) * BLOCK
        padded = bytes(data).ljust(length, b"\0")
        theirs = replica.digests(source.ids[name], [Extent(0, length)], key)
        unequal = (digest_blocks(padded, key) != theirs).any(axis=1).nonzero()[0].tolist()
        changes[name] = [(at * BLOCK, BLOCK, padded[at * BLOCK :][:BLOCK]) for at in unequal]
        compared += length // BLOCK
    send(replica, manifest, source.frames(changes, per_frame=1))
    source.end_copy(manifest)
    return compared, sum(map(len, changes.values()))


def test_adopted_copies_are_the_replica(store, folder, source):
    seen = []
    report = adopt(store, "vm", folder, progress=lambda done, total: seen.append((done, total)))
    total = sum(SIZES.values())
    assert images(store) == {name: bytes(data) for name, data in source.disks.items()}
    assert (report.vm, report.disks, report.bytes_total) == ("vm", ("a.raw", "b.img"), total)
    assert report.cloned or 3 * BLOCK <= report.bytes_written <= 4 * BLOCK
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert LocalReplica(store, "vm").position() == report.position
    assert (report.position.cycle, report.position.digest) == (0, bytes(16))
    assert {disk.disk_id for disk in store.vm("vm").disks} == {UNKNOWN_DISK}
    assert store.points("vm") == []
    assert check(store).findings == ()


def test_after_it_only_differences_travel_and_points_are_right(store, folder, source):
    adopt(store, "vm", folder)
    source.write("a.raw", 4 * BLOCK + 5, b"changed since")
    replica = LocalReplica(store, "vm")
    assert resync(source, replica) == (9, 1)
    source.write("b.img", 0, b"and on")
    source.ship_to(replica)
    check_points(store, source)
    assert check(store).findings == ()
    replica.housekeep(RetentionPolicy(keep_all_seconds=0, hourly=0), 2 << 60)
    check_points(store, source)
    assert images(store) == {name: bytes(data) for name, data in source.disks.items()}
    assert UNKNOWN_DISK not in {disk.disk_id for disk in store.vm("vm").disks}
    assert resync(source, replica) == (9, 0)


def test_disks_that_only_one_side_has_come_and_go(store, folder, source):
    with open(os.path.join(folder, "old.raw"), "wb") as file:
        file.write(b"of a disk that the VM has no more")
    adopt(store, "vm", folder)
    source.disks["new.raw"], source.ids["new.raw"], source.changes["new.raw"] = bytearray(b"n" * BLOCK), b"n" * 16, []
    replica = LocalReplica(store, "vm")
    assert resync(source, replica) == (10, 1)
    source.ship_to(replica)
    replica.housekeep(RetentionPolicy(keep_all_seconds=0, hourly=0), 2 << 60)
    check_points(store, source)
    assert sorted(images(store)) == ["a.raw", "b.img", "new.raw"]


def test_a_copy_longer_than_the_disk_is_cut_by_the_resync(store, folder, source):
    with open(os.path.join(folder, "b.img"), "ab") as file:
        file.write(random.Random(1).randbytes(2 * BLOCK))
    adopt(store, "vm", folder)
    replica = LocalReplica(store, "vm")
    assert resync(source, replica) == (11, 2)
    source.ship_to(replica)
    source.resize("b.img", 5 * BLOCK)  # what was cut off must not be seen again
    source.ship_to(replica)
    replica.housekeep(RetentionPolicy(keep_all_seconds=0, hourly=0), 2 << 60)
    check_points(store, source)


def test_a_cycle_does_not_continue_an_adopted_copy(store, folder, source):
    position = adopt(store, "vm", folder).position
    replica = LocalReplica(store, "vm")
    manifest = dataclasses.replace(source.begin_cycle()[0], generation=b"g" * 16)
    with pytest.raises(PositionMismatchError) as caught:
        replica.begin(dataclasses.replace(manifest, previous=dataclasses.replace(position, cycle=1)))
    assert caught.value.theirs == position
    with pytest.raises(HvfuseError, match="has no copy of disk"):
        replica.begin(dataclasses.replace(manifest, previous=position))


def test_holes_and_zeroes_take_no_room(store, folder):
    with open(os.path.join(folder, "big.raw"), "wb") as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), bytes(8 << 20), 5 << 30)
        os.pwrite(file.fileno(), b"something", 7 << 30)
    report = adopt(store, "vm", folder)
    image = store.image_path("vm", "big.raw")
    assert os.stat(image).st_size == 1 << 40
    with open(image, "rb") as file:
        assert os.pread(file.fileno(), 9, 7 << 30) == b"something"
    if not report.cloned:
        assert report.bytes_written <= 4 * BLOCK + 4096
        assert os.stat(image).st_blocks * 512 < 1 << 20


# What is refused


def test_a_vm_that_has_a_replica_is_refused(store, folder, source):
    source.copy_to(LocalReplica(store, "vm"))
    with pytest.raises(UsageError, match="has a replica") as caught:
        adopt(store, "vm", folder)
    assert "hvfuse resync vm" in caught.value.hint
    adopted = store.vm("vm")
    assert adopt(store, "other", folder).vm == "other"
    with pytest.raises(UsageError, match="has a replica"):
        adopt(store, "other", folder)
    assert store.vm("vm") == adopted


@pytest.mark.parametrize("name", ["notes.txt", ".hidden.raw", "a.raw.0000000001.hrl", "a.raw.hvt", "lost+found/"])
def test_what_is_no_disk_by_name_is_refused(store, folder, name):
    path = os.path.join(folder, name)
    os.mkdir(path) if name.endswith("/") else open(path, "w").close()
    with pytest.raises(UsageError, match="not the name of a disk"):
        adopt(store, "vm", folder)
    assert store.vms() == []


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_plain_file_is_refused(store, folder, tmp_path, kind):
    path = os.path.join(folder, "c.raw")
    if kind == "link":
        (tmp_path / "victim").write_bytes(b"secret")
        os.symlink(tmp_path / "victim", path)
    else:
        os.mkfifo(path) if kind == "fifo" else os.mkdir(path)
    with pytest.raises(UsageError, match="not a plain file"):
        adopt(store, "vm", folder)
    assert store.vms() == []


def test_a_link_put_in_place_at_the_last_moment_is_not_followed(store, folder, tmp_path):
    (tmp_path / "victim").write_bytes(b"secret" * 100)
    path = os.path.join(folder, "b.img")

    def injector(label: str, call: str, size: int) -> None:
        if label == "adopt:begin:after":
            os.unlink(path)
            os.symlink(tmp_path / "victim", path)

    system.install(injector)
    with pytest.raises(HvfuseError, match=r"b\.img"):
        adopt(store, "vm", folder)
    system.install(None)
    assert LocalReplica(store, "vm").position() is None
    assert b"secret" not in b"".join(images(store).values())


def test_a_file_that_changes_its_size_meanwhile_is_refused(store, folder):
    def injector(label: str, call: str, size: int) -> None:
        if label == "adopt:begin:after":
            os.truncate(os.path.join(folder, "b.img"), 100)

    system.install(injector)
    with pytest.raises(BusyError, match="changed just now"):
        adopt(store, "vm", folder)


def test_folders_without_disks_or_in_the_store_or_not_there_are_refused(store, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="0 disks"):
        adopt(store, "vm", str(tmp_path / "empty"))
    with pytest.raises(NotFoundError):
        adopt(store, "vm", str(tmp_path / "missing"))
    with pytest.raises(NotFoundError):
        adopt(store, "vm", os.path.join(folder, "a.raw"))
    inside = os.path.join(store.path, "replicas", "vm")
    shutil.copytree(folder, inside)
    os.symlink(inside, tmp_path / "detour")
    for path in (inside, str(tmp_path / "detour"), os.path.join(store.path, "replicas", "..", "replicas", "vm")):
        with pytest.raises(UsageError, match="lies in the store"):
            adopt(store, "vm", path)
    with pytest.raises(CorruptError):
        adopt(store, "../vm", folder)
    assert store.vms() == []


def test_a_damaged_disk_is_refused(store, folder):
    with open(os.path.join(folder, "c.vhd"), "wb") as file:
        file.write(b"no footer here" * 100)
    with pytest.raises(CorruptError, match=r"c\.vhd"):
        adopt(store, "vm", folder)


# Deaths and faults


def test_killed_at_every_step_it_is_adopted_wholly_or_not_at_all(tmp_path, folder, source):
    for step in itertools.count(1):
        path = str(tmp_path / f"store{step}")
        Store(path).close()
        ended = adopted_until(path, folder, step)
        with Store(path) as store:
            position = LocalReplica(store, "vm").position()
            assert check(store).findings == (), step
            assert position is not None or not ended
            if position is None:
                position = adopt(store, "vm", folder).position
            assert images(store) == {name: bytes(data) for name, data in source.disks.items()}
            assert store.vm("vm").position == position
            assert check(store).findings == (), step
        shutil.rmtree(path)
        if ended:
            break
    assert step > 10


def adopted_until(path: str, folder: str, step: int) -> bool:
    """Adopt in a process of its own that dies at the labelled call number `step`. Whether it came to the end."""
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)
        try:
            with Store(path) as store:
                system.install(lambda label, call, size: os._exit(9) if next(calls) == step else None)
                adopt(store, "vm", folder)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 0


@pytest.mark.parametrize(
    ("label", "error", "kind"),
    [
        ("store:image-sync", errno.EIO, HvfuseError),
        ("store:folder-sync", errno.EIO, HvfuseError),
        ("image:write", errno.ENOSPC, NoSpaceError),
        ("store:resize", errno.EFBIG, HvfuseError),
    ],
)
def test_a_fault_leaves_the_vm_without_a_replica_and_it_can_be_done_again(store, folder, label, error, kind):
    def injector(seen: str, call: str, size: int) -> None:
        if seen == label:
            raise OSError(error, os.strerror(error))

    system.install(injector)
    with pytest.raises(kind):
        adopt(store, "vm", folder)
    system.install(None)
    assert LocalReplica(store, "vm").position() is None
    assert check(store).findings == ()
    adopt(store, "vm", folder)
    assert check(store).findings == ()


def test_a_first_copy_under_way_gives_way_and_its_images_go(store, folder):
    other = Source("vm", {"a.raw": 9000, "gone.raw": 9000}, seed=4)
    other.write("a.raw", 0, other.random.randbytes(9000))
    manifest, frames = other.begin_copy()
    replica = LocalReplica(store, "vm")
    replica.begin(manifest)
    replica.put(frames[0])
    with ReplicaImages(store.replica_folder("vm")) as held, held.lock(), pytest.raises(BusyError):
        adopt(store, "vm", folder)
    position = adopt(store, "vm", folder).position
    with pytest.raises(BusyError):
        replica.put(frames[1])
    assert replica.position() == position
    assert sorted(images(store)) == ["a.raw", "b.img"]
    assert not os.path.exists(store.unsynced_path("vm"))


def test_a_first_copy_begun_meanwhile_is_not_overrun(store, folder, source):
    manifest, frames = source.begin_copy()
    begun = []

    def injector(label: str, call: str, size: int) -> None:
        if label == "store:image-sync" and not begun:
            begun.append(True)
            with pytest.raises(BusyError):  # at the images; but it is staged
                LocalReplica(store, "vm").begin(manifest)

    system.install(injector)
    with pytest.raises(BusyError, match="meanwhile"):
        adopt(store, "vm", folder)
    system.install(None)
    replica = LocalReplica(store, "vm")
    send(replica, manifest, frames)
    source.end_copy(manifest)
    source.ship_to(replica)
    check_points(store, source)
    assert unpack_header(frames[0]).cycle == 0


@pytest.mark.mount
@pytest.mark.skipif(not (shutil.which("mkfs.xfs") or shutil.which("mkfs.btrfs")), reason="no mkfs.xfs or mkfs.btrfs")
def test_where_the_file_system_can_the_blocks_are_shared(tmp_path, source):
    device, mount = tmp_path / "device", tmp_path / "mounted"
    mount.mkdir()
    with open(device, "wb") as file:
        file.truncate(320 << 20)
    make = shutil.which("mkfs.xfs") or shutil.which("mkfs.btrfs") or ""
    subprocess.run([make, "-q", str(device)], check=True)
    subprocess.run(["mount", "-o", "loop", str(device), str(mount)], check=True)
    try:
        (mount / "brought").mkdir()
        for name, data in source.disks.items():
            (mount / "brought" / name).write_bytes(data)
        with Store(str(mount / "store")) as store:
            report = adopt(store, "vm", str(mount / "brought"))
            assert (report.cloned, report.bytes_written) == (2, 0)
            (mount / "brought" / "a.raw").write_bytes(b"changed afterwards")
            assert images(store) == {name: bytes(data) for name, data in source.disks.items()}
            assert check(store).findings == ()
    finally:
        subprocess.run(["umount", str(mount)], check=True)
