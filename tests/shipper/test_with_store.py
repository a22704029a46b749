"""From the real tracker through the shipper into the real store, and back out of every recovery point."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvfuse import wire
from hvfuse.errors import UnreachableError
from hvfuse.frames import FrameHeader, unpack_header
from hvfuse.reconcile import plan
from hvfuse.shipper import slots
from hvfuse.shipper.copies import WaitingError
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.replication import CurrentPolicy, Replication, ShippingPolicy
from hvfuse.shipper.service import Shipper
from hvfuse.shipper.source import TrackerSource
from hvfuse.shipper.window import Resync
from hvfuse.target.check import check
from hvfuse.target.journal import PointReader
from hvfuse.target.local import SMALL_FRAME, LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store
from hvfuse.tracker import budget, membership, regions
from hvfuse.tracker.service import TrackerControl
from hvfuse.tracker.vm import TrackedVm

from .logs import Killed, random_bytes
from .test_service import Clock
from .test_with_tracker import SIZES, Host


class StoredHost(Host):
    """A host whose replica is a store; a new `replica` at each call, as after a restart."""

    def __init__(self, tmp_path) -> None:
        super().__init__(tmp_path)
        _MADE.append(self)
        self.store = Store(str(tmp_path / "store"), map_size=1 << 28)
        self.puts: list[tuple[bytes, int, int]] = []
        self.large: list[tuple[bytes, int, int]] = []
        self.die_at: int | None = None
        self.meddle: Callable[[FrameHeader], object] = lambda header: None

    def shipper(self) -> Shipper:
        self.replica = Counted(self)
        return Shipper(
            vm="vm1", folder=self.folder, source=TrackerSource(self.socket, self.folder),
            replica=self.replica, records=self.records, policy=CurrentPolicy(ShippingPolicy()), clock=Clock(),
        )  # fmt: skip

    def lose_logs(self) -> None:
        """What a full disk does; the guest writes on."""
        with self.vm.gate:
            self.vm.degrade("the disk is full")

    def roll_back(self, copy: str) -> None:
        """Put back a store as it was when it was copied."""
        self.replica.close()
        self.store.close()
        shutil.rmtree(self.store.path)
        shutil.copytree(copy, self.store.path)
        self.store = Store(self.store.path, map_size=1 << 28)

    def marked(self) -> int:
        return sum(disk["resync_bytes"] for disk in self.vm.status()["disks"])

    def at(self, point: str) -> dict[str, bytes]:
        reader = PointReader(self.store, "vm1", point)
        try:
            return {disk.name: reader.pread(disk.name, 0, disk.size) for disk in reader.disks}
        finally:
            reader.close()


_MADE: list[StoredHost] = []


class Counted(LocalReplica):
    """The real replica; notes what it is given and dies where it is told to."""

    def __init__(self, host: StoredHost) -> None:
        super().__init__(host.store, "vm1")
        self.host = host

    def put(self, frame: bytes) -> None:
        header = unpack_header(frame)
        super().put(frame)
        self.host.puts.append((header.generation, header.cycle, header.number))
        self.host.meddle(header)
        if header.cycle or len(frame) > SMALL_FRAME:
            self.host.large.append(self.host.puts[-1])
        if self.host.die_at == len(self.host.puts):
            raise Killed


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    yield
    while _MADE:
        host = _MADE.pop()
        if isinstance(host.replica, LocalReplica):  # it has shipped
            host.replica.close()
        host.store.close()
        host.detach()


@pytest.fixture
def host(tmp_path) -> StoredHost:
    return StoredHost(tmp_path)


def test_what_goes_straight_into_images_is_not_compressed_and_what_is_kept_is(host):
    for name in ("a.raw", "b.raw"):
        host.vm.disks[name].write(b"text" * (64 << 10), 0)
    host.shipper().cycle_now()
    (copied,) = host.records.copies
    assert copied.is_whole and copied.bytes_sent > 2 * (256 << 10)
    host.vm.disks["a.raw"].write(b"more" * (64 << 10), 0)
    report = host.shipper().cycle_now()
    assert report.bytes_coalesced == 256 << 10 and report.bytes_sent < 10_000
    assert host.at(report.point) == host.images()


def test_every_point_reads_as_the_disks_were_before_and_after_merging(host):
    dice = random.Random(1)
    shipper = host.shipper()
    were = {}
    for _ in range(8):
        host.scribble(dice, 30)
        if dice.randrange(2):
            host.vm.disks["a.raw"].truncate(dice.randrange(1 << 20, 4 << 20))
        host.scribble(dice, 10)
        were[shipper.cycle_now().point] = host.images()
    assert {point: host.at(point) for point in were} == were
    newest = max(were)
    host.replica.housekeep(RetentionPolicy(keep_all_seconds=0, hourly=0), 2 << 60)
    assert host.at(newest) == were[newest]


def test_killed_at_every_put_the_rest_follows_and_what_is_held_does_not_come_twice(tmp_path):
    kill, killed = 0, True
    while killed:
        kill += 1
        (tmp_path / str(kill)).mkdir()
        host = StoredHost(tmp_path / str(kill))
        host.die_at = kill
        killed = not survives(host, seed=kill)
        host.die_at = None
        assert survives(host, seed=1000)
        point = host.replica.points()[-1].id
        assert host.at(point) == host.images()
        # Frames of a copy straight into the images are held only once those are synced: they may come again.
        journalled = [put for put in host.puts if put[1] > 0]
        assert len(set(journalled)) == len(journalled)
        host.replica.close()
        host.store.close()
        host.detach()
    assert kill > len(SIZES)


def survives(host: StoredHost, *, seed: int) -> bool:
    shipper = host.shipper()
    try:
        shipper.synchronise()
        host.scribble(random.Random(seed), 20)
        shipper.cycle_now()
    except Killed:
        return False
    return True


def test_a_resync_leaves_the_older_points_as_they_were(host, monkeypatch):
    monkeypatch.setattr(slots, "SLOT", 1 << 18)
    monkeypatch.setattr(plan, "SPAN", 1 << 18)
    monkeypatch.setattr(slots, "GROUP", slots.SLOTS << 18)
    dice = random.Random(3)
    shipper = host.shipper()
    were = {}
    for _ in range(3):
        host.scribble(dice, 20)
        were[shipper.cycle_now().point] = host.images()
    host.scribble(dice, 20)
    host.vm.rotate()
    log = next(name for name in sorted(os.listdir(host.folder)) if name.endswith(".hrc"))
    with open(os.path.join(host.folder, log), "r+b") as file:
        file.write(b"damage")
    host.scribble(dice, 20)
    host.die_at = len(host.puts) + 4
    with pytest.raises(Killed):
        shipper.cycle_now()
    host.die_at = None
    shipper = host.shipper()
    were[shipper.cycle_now().point] = host.images()
    assert len(host.replica.points()) == 4
    assert {point: host.at(point) for point in were} == were
    assert len(set(host.puts)) == len(host.puts)


def test_after_lost_logs_only_marked_regions_are_compared_and_every_point_is_right(host, monkeypatch):
    monkeypatch.setattr(regions, "_SOON", 0.0)  # nothing is marked ahead
    dice = random.Random(5)
    shipper = host.shipper()
    were = {}
    for _ in range(3):
        host.scribble(dice, 20)
        were[shipper.cycle_now().point] = host.images()
        host.lose_logs()
        host.scribble(dice, 5)
        marked = host.marked()
        assert 0 < marked < sum(SIZES.values())
        were[shipper.cycle_now().point] = host.images()
        assert host.records.copies[-1].bytes_compared == marked
    assert {point: host.at(point) for point in were} == were
    host.replica.housekeep(RetentionPolicy(keep_all_seconds=0, hourly=0), 2 << 60)
    assert host.at(point := host.replica.points()[-1].id) == were[point]
    assert check(host.store).findings == ()


def test_killed_at_every_put_of_a_resync_both_sides_go_on_whatever_died(tmp_path):
    kill, killed = 0, True
    while killed:
        kill += 1
        (tmp_path / str(kill)).mkdir()
        host = StoredHost(tmp_path / str(kill))
        dice = random.Random(kill)
        host.scribble(dice, 20)
        first = host.shipper().cycle_now().point
        were = {first: host.images()}
        host.lose_logs()
        host.scribble(dice, 4)
        host.die_at, host.puts, host.large = kill, [], []
        killed = not survives(host, seed=kill)
        host.die_at = None
        if kill % 2:
            host.detach()
            host.attach()
        host.scribble(dice, 5)
        were[host.shipper().cycle_now().point] = host.images()
        assert {point: host.at(point) for point in were} == were
        # Small frames of a copy are held only once some of them have come: they may come again.
        assert len(set(host.large)) == len(host.large)
        assert all(copied.regions for copied in host.records.copies[1:])
        host.replica.close()
        host.store.close()
        host.detach()
    assert kill > 4


@pytest.mark.parametrize("lost", [False, True])
def test_a_store_rolled_back_to_an_older_copy_is_named_and_its_points_stay_right(host, tmp_path, lost):
    dice = random.Random(6)
    were, points = {}, []
    for number in range(4):
        host.scribble(dice, 20)
        points.append(host.shipper().cycle_now().point)
        were[points[-1]] = host.images()
        host.replica.close()
        if number == 1:
            shutil.copytree(host.store.path, tmp_path / "older")
    host.roll_back(str(tmp_path / "older"))
    host.scribble(dice, 20)
    if lost:
        host.lose_logs()
        host.scribble(dice, 20)
    newest = host.shipper().cycle_now().point
    were[newest] = host.images()
    assert any("rolled back" in str(reason) for reason in host.records.reasons)
    assert host.records.copies[-1].regions is None
    assert [point.id for point in host.replica.points()] == [*points[:2], newest]
    assert {point: host.at(point) for point in [*points[:2], newest]} == {
        point: were[point] for point in [*points[:2], newest]
    }


def busy(host: StoredHost, *, passes: int, die: bool = False) -> None:
    """From now on the guest writes more than its logs may hold during so many copies, and dies in each if it is to."""
    seen: set[bytes] = set()
    dice = random.Random(passes)

    def meddle(header: FrameHeader) -> None:
        if header.cycle or header.generation in seen or len(seen) == passes:
            return
        seen.add(header.generation)
        host.scribble(dice, 5)
        for _ in range(8):
            host.vm.disks["a.raw"].write(random_bytes(dice.randrange(1000), 200_000), dice.randrange(2 << 20))
        while not host.vm.status()["resync_required"]:  # until the logs are given up
            host.scribble(dice, 5)
        if die:
            raise Killed

    host.meddle = meddle


@pytest.mark.parametrize("how", ["first copy", "regions", "everything"])
@pytest.mark.parametrize("die", [False, True])
def test_a_guest_that_outwrites_its_logs_is_caught_up_with_pass_by_pass(host, monkeypatch, how, die):
    monkeypatch.setattr(budget, "LEAST_LIMIT", 1 << 18)
    dice = random.Random(8)
    were = {}
    if how != "first copy":
        host.scribble(dice, 20)
        were[host.shipper().cycle_now().point] = host.images()
        with host.vm.gate:
            host.vm.degrade("the disk is full", full=how == "everything")
        host.scribble(dice, 5)
    busy(host, passes=3, die=die)
    for life in range(10):
        try:
            point = host.shipper().cycle_now().point
            break
        except Killed:
            host.replica.close()
            if life % 2:
                host.detach()
                host.attach()
            host.scribble(dice, 3)
    assert (life == 3) == die
    were[point] = host.images()
    assert {point.id for point in host.replica.points()} == were.keys(), "no point in between"
    assert {point: host.at(point) for point in were} == were
    last = host.records.copies[-1]
    assert (last.passes, last.is_whole) == (4, how == "first copy")
    assert host.vm.status()["resync_scope"] is None
    were[host.shipper().cycle_now().point] = host.images()
    assert {point: host.at(point) for point in were} == were
    assert check(host.store).findings == ()


@pytest.mark.parametrize("how", ["first copy", "everything"])
def test_cancelled_in_the_middle_the_store_drops_what_was_staged_and_the_points_stay(host, how):
    dice = random.Random(9)
    were = {}
    if how == "everything":
        host.scribble(dice, 20)
        were[host.shipper().cycle_now().point] = host.images()
        with host.vm.gate:
            host.vm.degrade("an image was exchanged", full=True)
        host.scribble(dice, 20)
    shipper = host.shipper()
    host.meddle = lambda header: shipper.cancel() if header.cycle == 0 else None
    with pytest.raises(WaitingError, match="was cancelled"):
        shipper.cycle_now()
    host.meddle = lambda header: None
    assert {point.id for point in host.replica.points()} == were.keys()
    assert {point: host.at(point) for point in were} == were
    assert check(host.store).findings == ()
    host.scribble(dice, 10)
    host.replica.close()
    were[host.shipper().cycle_now().point] = host.images()
    assert {point: host.at(point) for point in were} == were
    assert check(host.store).findings == ()


@pytest.mark.parametrize("interrupted", [True, False])
def test_what_a_disk_loses_while_its_copy_is_interrupted_is_not_seen_again_when_it_grows(tmp_path, interrupted):
    host = StoredHost(tmp_path)
    first, second = host.vm.disks["a.raw"], host.vm.disks["b.raw"]
    host.shipper().cycle_now()
    first.truncate(20 << 20)
    first.write(random_bytes(7, 70_000), 18 << 20)  # in the journal, not in the base image
    host.shipper().cycle_now()
    first.write(random_bytes(8, 5000), 0)
    second.write(random_bytes(9, 70_000), 0)
    host.lose_logs()
    if interrupted:

        def die_at_the_second_disk(header):
            if header.cycle == 0 and header.disk_id == second.state.record.disk_id:
                host.meddle = lambda header: None
                raise Killed

        host.meddle = die_at_the_second_disk
        with pytest.raises(Killed):
            host.shipper().cycle_now()
        host.replica.close()
    first.truncate(3 << 20)  # its part of the copy is done
    host.lose_logs()
    report = host.shipper().cycle_now()
    assert host.at(report.point) == host.images()
    first.truncate(20 << 20)
    report = host.shipper().cycle_now()
    assert host.at(report.point) == host.images()


@pytest.mark.parametrize("how", ["excluded", "removed"])
def test_the_cycle_that_an_unmount_sealed_is_shipped_although_one_of_its_disks_is_gone(tmp_path, how):
    host = StoredHost(tmp_path)
    host.shipper().cycle_now()
    host.vm.disks["b.raw"].write(random_bytes(1, 5000), 0)
    host.detach()
    if how == "removed":
        (Path(host.folder) / "a.raw").unlink()
    host.vm = TrackedVm("vm1", host.folder, exclude=frozenset({"a.raw"}))
    host.vm.attach()
    host.listener = wire.Listener(host.socket, TrackerControl(host.vm, "/none").handle, name="control")
    report = host.shipper().cycle_now()
    assert host.at(report.point)["b.raw"] == (Path(host.folder) / "b.raw").read_bytes()
    assert len(host.replica.points()) == 3


# Disks that come and go -------------------------------------------------------------------------------------


def disks_of(host):
    return {name: (Path(host.folder) / name).read_bytes() for name in host.vm.disks}


def with_a_newcomer(tmp_path, monkeypatch):
    """A point of both disks; then writes, and a third disk."""
    monkeypatch.setattr(membership, "STILL_SECONDS", 0.0)
    host = StoredHost(tmp_path)
    host.shipper().cycle_now()
    host.vm.disks["a.raw"].write(random_bytes(2, 5000), 70_000)
    (Path(host.folder) / "c.raw").write_bytes(random_bytes(3, 3 << 20) + bytes(1 << 20))
    return host


def test_a_disk_that_comes_is_taken_in_and_what_was_sealed_before_is_a_point_without_it(tmp_path, monkeypatch):
    host = with_a_newcomer(tmp_path, monkeypatch)
    before = disks_of(host)
    shipper = host.shipper()
    report = shipper.cycle_now()
    assert host.at(report.point) == disks_of(host)
    assert [sorted(host.at(point.id)) for point in host.replica.points()] == [
        ["a.raw", "b.raw"], ["a.raw", "b.raw"], ["a.raw", "b.raw", "c.raw"],
    ]  # fmt: skip
    assert host.at(host.replica.points()[1].id) == before
    (copied,) = [copied for copied in host.records.copies if not copied.is_whole]
    assert (copied.bytes_compared, copied.bytes_sent < (3 << 20) + 100_000) == (4 << 20, True)
    assert any(note.startswith("c.raw was added") for note in report.notes)
    assert check(host.store).findings == ()


@pytest.mark.parametrize("nth", range(1, 6))
def test_a_shipper_that_dies_over_the_copy_of_a_new_disk_goes_on_with_just_that(tmp_path, monkeypatch, nth):
    host = with_a_newcomer(tmp_path, monkeypatch)
    host.die_at = len(host.puts) + nth
    try:
        host.shipper().cycle_now()
    except Killed:
        host.replica.close()
    host.die_at = None
    host.vm.disks["a.raw"].write(random_bytes(5, 5000), 0)
    host.vm.disks["c.raw"].write(random_bytes(6, 5000), 0)
    report = host.shipper().cycle_now()
    assert host.at(report.point) == disks_of(host)
    assert all(copied.regions is not None for copied in host.records.copies[1:])
    assert check(host.store).findings == ()


def test_a_disk_that_is_excluded_and_included_again_costs_that_disk(tmp_path, monkeypatch):
    host = with_a_newcomer(tmp_path, monkeypatch)
    host.shipper().cycle_now()
    host.vm.configure(exclude=frozenset({"c.raw"}), hard_limit=0.5, soft_limit=0.25)
    host.vm.disks["a.raw"].write(random_bytes(7, 5000), 0)
    report = host.shipper().cycle_now()
    assert sorted(host.at(report.point)) == ["a.raw", "b.raw"]
    assert host.at(report.point) == disks_of(host)
    assert host.records.copies[-1].bytes_compared < 1 << 20
    host.vm.configure(exclude=frozenset(), hard_limit=0.5, soft_limit=0.25)
    report = host.shipper().cycle_now()
    assert sorted(host.at(report.point)) == ["a.raw", "b.raw", "c.raw"]
    assert host.at(report.point) == disks_of(host)
    assert host.records.copies[-1].bytes_compared == 4 << 20
    assert check(host.store).findings == ()


def test_a_disk_that_has_not_settled_holds_nobody_up(tmp_path, monkeypatch):
    host = with_a_newcomer(tmp_path, monkeypatch)
    with open(Path(host.folder) / "c.raw", "ab"):
        report = host.shipper().cycle_now()
    assert sorted(host.at(report.point)) == ["a.raw", "b.raw"]
    assert len(host.records.copies) == 1


def test_a_new_disk_does_not_wait_for_the_window_and_its_cause_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("hvfuse.shipper.permission.AT_ONCE_PART", -1.0)
    monkeypatch.setattr("hvfuse.shipper.permission.AT_ONCE_BYTES", -1)
    host = with_a_newcomer(tmp_path, monkeypatch)
    told = []
    keep = host.records.apply

    def watched(*events, **fields):
        told.extend((fields["resync_reason"], fields["resync_cause"]) for _ in [0] if "resync_cause" in fields)
        return keep(*events, **fields)

    monkeypatch.setattr(host.records, "apply", watched)
    manual = ShippingPolicy(resync=Resync(automatic=False))
    replica = Counted(host)
    Replication(
        vm="vm1", folder=host.folder, source=TrackerSource(host.socket, host.folder), replica=replica,
        records=host.records, policy=CurrentPolicy(manual), clock=Clock(), housekeep=lambda: None,
    ).cycle_now(asked=False)  # fmt: skip
    assert told[0] == ("c.raw was added", "disks") and told[-1] == (None, None)
    assert host.at(replica.points()[-1].id) == disks_of(host)


@pytest.mark.parametrize("held", ["suspended", "target away"])
def test_a_new_disk_ends_no_logging_while_no_copy_could_begin(tmp_path, monkeypatch, held):
    host = with_a_newcomer(tmp_path, monkeypatch)
    shipper = host.shipper()
    if held == "suspended":
        host.records.change_orders(Orders.suspend)
        shipper.cycle_now()
    else:

        def unreachable():
            raise UnreachableError("no route")

        position, host.replica.position = host.replica.position, unreachable
        with pytest.raises(UnreachableError):
            shipper.cycle_now()
        host.replica.position = position
    assert host.vm.is_logging and host.vm.status()["untracked"] == ["c.raw"]
    host.records.change_orders(Orders.resume)
    assert host.at(shipper.cycle_now().point) == disks_of(host)
    assert "c.raw" in host.vm.disks
