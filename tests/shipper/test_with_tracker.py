"""The shipper and the real tracker (no mount): control socket, logs, images; the replica is in memory."""

import itertools
import os
import random
import threading

import pytest

from hvfuse import wire
from hvfuse.errors import UnreachableError
from hvfuse.shipper.source import TrackerSource
from hvfuse.tracker.service import TrackerControl
from hvfuse.tracker.vm import TrackedVm

from .logs import MemoryReplica, random_bytes
from .test_service import Clock, CurrentPolicy, Kept, Shipper, ShippingPolicy

MIB = 1 << 20
SIZES = {"a.raw": 3 * MIB, "b.raw": MIB + 512}


class Host:
    """A VM's folder with its tracker, in this process, and the replica of it."""

    def __init__(self, tmp_path) -> None:
        self.folder = str(tmp_path / "vm1")
        self.socket = str(tmp_path / "tracker.sock")
        self.replica = MemoryReplica()
        self.records = Kept()
        os.mkdir(self.folder)
        for name, size in SIZES.items():
            with open(os.path.join(self.folder, name), "wb") as file:
                file.write(random_bytes(1, 8000))
                file.truncate(size)
        self.attach()

    def attach(self) -> None:
        self.vm = TrackedVm("vm1", self.folder)
        self.vm.attach()
        self.listener = wire.Listener(self.socket, TrackerControl(self.vm, "/none").handle, name="control")

    def detach(self) -> None:
        self.listener.close()
        self.vm.detach()

    def shipper(self) -> Shipper:
        return Shipper(
            vm="vm1", folder=self.folder, source=TrackerSource(self.socket, self.folder),
            replica=self.replica, records=self.records, policy=CurrentPolicy(ShippingPolicy()), clock=Clock(),
        )  # fmt: skip

    def images(self) -> dict[str, bytes]:
        found = {}
        for name in SIZES:
            with open(os.path.join(self.folder, name), "rb") as file:
                found[name] = file.read()
        return found

    def replicas(self) -> dict[str, bytes]:
        names = {disk.disk_id: disk.name for disk in self.replica.all_points[-1].disks}
        return {names[key]: bytes(image) for key, image in self.replica.images.items()}

    def scribble(self, dice: random.Random, count: int) -> None:
        for _ in range(count):
            disk = self.vm.disks[dice.choice(list(SIZES))]
            size = disk.size()
            offset = dice.randrange(size)
            length = min(dice.choice([1, 511, 4096, 70_000]), size - offset)
            match dice.randrange(8):
                case 0:
                    disk.trim(offset, length)
                case 1:
                    disk.zero(offset, length)
                case 2:
                    disk.sync(datasync=True)
                case 3:
                    disk.write(bytes(length), offset)
                case _:
                    disk.write(random_bytes(dice.randrange(1000), length), offset)


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    yield host
    host.detach()


def test_each_point_equals_the_disks_whatever_was_done_to_them(host):
    dice = random.Random(1)
    shipper = host.shipper()
    for number in range(1, 9):
        host.scribble(dice, 40)
        assert shipper.cycle_now().cycle == number
        assert host.replicas() == host.images()
    assert not [name for name in os.listdir(host.folder) if name.endswith(".hrc")]


def test_resizes_rotate_and_the_replica_follows(host):
    shipper = host.shipper()
    dice = random.Random(2)
    shipper.cycle_now()
    for size in (2 * MIB, 4 * MIB, MIB + 77, 3 * MIB):
        host.scribble(dice, 10)
        host.vm.disks["a.raw"].truncate(size)
        host.scribble(dice, 10)
        shipper.cycle_now()
        assert host.replicas() == host.images()


def test_writes_and_resizes_during_the_copy_end_in_a_consistent_first_point(host, monkeypatch):
    dice = random.Random(3)
    put = MemoryReplica.put
    sizes = itertools.cycle([2, 4])

    def busy_put(replica: MemoryReplica, frame: bytes) -> None:
        host.scribble(dice, 10)
        host.vm.disks["a.raw"].truncate(next(sizes) * MIB)
        host.scribble(dice, 10)
        put(replica, frame)

    monkeypatch.setattr(MemoryReplica, "put", busy_put)
    shipper = host.shipper()
    shipper.synchronise()
    monkeypatch.setattr(MemoryReplica, "put", put)
    assert shipper.cycle_now().cycle > 1
    assert len(host.replica.all_points) == 1
    assert host.replicas() == host.images()


def test_cycles_while_another_thread_writes_end_equal(host):
    stop = threading.Event()
    dice = random.Random(4)

    def write() -> None:
        while not stop.is_set():
            host.scribble(dice, 5)

    writer = threading.Thread(target=write)
    writer.start()
    shipper = host.shipper()
    try:
        for _ in range(5):
            shipper.cycle_now()
    finally:
        stop.set()
        writer.join()
    shipper.cycle_now()
    assert host.replicas() == host.images()


def test_after_a_clean_detach_the_last_logs_are_shipped_and_a_new_attachment_continues(host):
    dice = random.Random(5)
    host.shipper().cycle_now()
    host.scribble(dice, 20)
    host.detach()
    assert host.shipper().cycle_now().cycle == 2
    assert host.replicas() == host.images()
    with pytest.raises(UnreachableError):
        host.shipper().cycle_now()
    host.attach()
    host.scribble(dice, 20)
    report = host.shipper().cycle_now()
    assert report.cycle == 3
    assert host.replicas() == host.images()
