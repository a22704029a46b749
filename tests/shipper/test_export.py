"""A first copy on a medium: written by the shipper, killed and resumed, then put into a replica that goes on."""

import os
import random
import shutil
from dataclasses import replace

import pytest

from hvfuse import system
from hvfuse.errors import HvfuseError, NoSpaceError, ResyncRequiredError, UsageError
from hvfuse.medium import SeedReader, SeedWriter
from hvfuse.position import NO_DIGEST, Position
from hvfuse.shipper import slots
from hvfuse.shipper.export import Exporter, SeedReplica, estimate, without_seed
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.policy import CurrentPolicy, ShippingPolicy
from hvfuse.states import Event, ReplicationState
from hvfuse.system import SystemClock

from .logs import Killed, MemoryReplica, random_bytes, tracked
from .test_copy import assert_equal, image
from .test_copy import run as run_copy
from .test_service import Clock, Kept, Site

MIB = 1 << 20
KIB = 1 << 10


@pytest.fixture
def small(monkeypatch):
    """Slots, groups and files so small that a few MiB have many of them."""
    monkeypatch.setattr(slots, "SLOT", 64 * KIB)
    monkeypatch.setattr(slots, "SLOTS", 8)
    monkeypatch.setattr(slots, "GROUP", 512 * KIB)
    monkeypatch.setattr(SeedWriter.__init__, "__kwdefaults__", {"file_limit": 300_000})


@pytest.fixture
def site(tmp_path, small):
    return make_site(tmp_path / "disks")


def make_site(folder) -> Site:
    folder.mkdir(parents=True)
    site = Site(tracked(str(folder), [2 * MIB, MIB], begun=False))
    for number, disk in enumerate(site.source.disks):
        disk.image[: 700 * KIB] = random_bytes(number, 700 * KIB)
    site.source.flush()
    return site


def exporter(site: Site, **options) -> Exporter:
    made = {
        "vm": "vm1", "folder": site.source.folder, "source": site.source, "replica": site.replica,
        "records": site.records, "policy": CurrentPolicy(ShippingPolicy()), "clock": site.clock,
    }  # fmt: skip
    return Exporter(**made | options)


def travel(directory, replica: MemoryReplica) -> None:
    """What `hvfuse seed import` does."""
    reader = SeedReader(str(directory))
    reader.verify()
    replica.begin(reader.manifest.cycle)
    for _, frame in reader.frames():
        replica.put(frame)
    replica.commit(reader.manifest.cycle, reader.manifest.frames)


def test_what_was_written_while_the_medium_travelled_follows_as_cycles(site, tmp_path):
    medium = tmp_path / "medium"
    report = exporter(site).export(str(medium))
    assert site.records.states == [
        ReplicationState.INITIAL_REPLICATION_IN_PROGRESS,
        ReplicationState.WAITING_FOR_INITIAL_REPLICATION,
    ]
    assert site.records.orders() == Orders(seed=site.source.generation.hex())
    assert site.records.fields["copy"] is None and site.records.fields["progress"] is None
    assert (report.bytes_total, report.already, report.frames_held) == (3 * MIB, False, 0)
    assert report.bytes_sent > 1400 * KIB and report.files > 3
    assert report.medium_bytes == sum(os.path.getsize(medium / n) for n in os.listdir(medium) if n != "manifest.json")
    for number in range(5):
        site.write(number)
        site.source.rotate()
    travel(medium, site.replica)
    assert site.replica.stands == Position(site.source.generation, 0, NO_DIGEST)
    copied = len(site.replica.puts)
    cycle = site.shipper().cycle_now()
    site.assert_equal()
    assert cycle.bytes_sent < 200_000
    assert [put[1] for put in site.replica.puts[copied:]] == [6] * (len(site.replica.puts) - copied)


def test_killed_at_any_call_the_same_command_goes_on_and_repeats_at_most_one_frame(site, tmp_path):
    dice = random.Random(1)
    whole = exporter(site).export(str(tmp_path / "whole")).frames_sent
    assert whole > 20
    for kill in [1, 2, 3, 4, *sorted(dice.sample(range(5, whole + 20), 12))]:
        site = make_site(tmp_path / str(kill) / "disks")
        medium = tmp_path / str(kill) / "medium"
        appended = 0

        def dying(label: str, call: str, size: int, kill=kill) -> None:
            nonlocal appended
            appended += label == "seed:append"
            dying.calls += label.startswith("seed:")
            if dying.calls == kill and label.startswith("seed:"):
                raise Killed

        dying.calls = 0
        system.install(dying)
        try:
            with pytest.raises(Killed):
                exporter(site).export(str(medium))
            before, generation = appended, site.source.generation
            site.write(dice.randrange(50))
            site.source.flush()
            dying.calls = kill
            report = exporter(site).export(str(medium))
        finally:
            system.install(None)
        assert site.source.generation == generation
        assert report.frames_held + report.frames_sent == report.frames
        assert before - 1 <= report.frames_held <= before
        travel(medium, site.replica)
        site.shipper().cycle_now()
        site.assert_equal()


def test_told_to_stop_it_ends_between_two_frames_and_goes_on_later(site, tmp_path):
    told = []

    def stop() -> None:
        told.append(1)
        if len(told) == 9:
            raise Killed

    with pytest.raises(Killed):
        exporter(site, between=stop).export(str(tmp_path / "m"))
    assert site.records.fields["state"] == ReplicationState.WAITING_FOR_INITIAL_REPLICATION
    report = exporter(site).export(str(tmp_path / "m"))
    assert report.frames_held >= 8
    again = exporter(site).export(str(tmp_path / "m"))
    assert (again.already, again.frames, again.frames_sent) == (True, report.frames, 0)


def test_progress_counts_over_all_runs(site, tmp_path):
    class Slow(Clock):
        def monotonic(self) -> float:
            self.seconds += 0.7
            return self.seconds

    kept = []
    update = site.records.update

    def watch(**fields) -> None:
        update(**fields)
        if fields.get("copy"):
            kept.append(fields["copy"])
            if len(kept) == 5:
                raise Killed

    site.records.update = watch
    site.clock = Slow()
    with pytest.raises(Killed):
        exporter(site).export(str(tmp_path / "m"))
    exporter(site).export(str(tmp_path / "m"))
    assert len(kept) > 8
    assert {(each["kind"], each["generation"], each["bytes_total"]) for each in kept[1:]} == {
        ("export", site.source.generation.hex(), 3 * MIB)
    }
    for name in ("bytes_done", "bytes_sent"):
        assert [each[name] for each in kept] == sorted(each[name] for each in kept)


def test_an_export_whose_order_is_taken_back_ends_and_can_be_ordered_again(site, tmp_path):
    between = iter(range(10**6))

    def cancel() -> None:
        if next(between) == 9:
            site.records.change_orders(lambda orders: replace(orders, seed=None))
        site.clock.seconds += 2

    with pytest.raises(HvfuseError, match=r"was cancelled; what is in .* stays there") as caught:
        exporter(site, between=cancel).export(str(tmp_path / "m"))
    assert caught.value.hint.endswith(f"hvfuse seed export vm1 {tmp_path / 'm'}")
    assert site.records.fields["copy"] is None and site.records.fields["progress"] is None
    assert site.records.fields["state"] is ReplicationState.READY_FOR_INITIAL_REPLICATION
    assert exporter(site).export(str(tmp_path / "m")).frames_held >= 8


def test_an_export_that_is_suspended_ends_says_so_and_goes_on_when_it_is_called_again(site, tmp_path):
    between = iter(range(10**6))

    def suspend() -> None:
        if next(between) == 9:
            site.records.change_orders(Orders.suspend)
        site.clock.seconds += 2

    with pytest.raises(HvfuseError, match=r"was suspended; what is in .* stays there") as caught:
        exporter(site, between=suspend).export(str(tmp_path / "m"))
    assert caught.value.hint == f"to go on: hvfuse seed export vm1 {tmp_path / 'm'}"
    generation = site.source.generation
    assert site.records.orders() == Orders(seed=generation.hex(), suspended=True)
    assert site.records.fields["state"] is ReplicationState.SUSPENDED
    assert site.records.fields["copy"]["bytes_done"] > 0
    assert exporter(site).export(str(tmp_path / "m")).frames_held >= 8
    assert site.records.orders() == Orders(seed=generation.hex()), "the command that asks for it resumes it"
    assert site.records.fields["state"] is ReplicationState.WAITING_FOR_INITIAL_REPLICATION


@pytest.mark.parametrize("medium", ["the same", "another"])
def test_a_suspended_vm_that_is_exported_again_is_not_shown_as_suspended(site, tmp_path, medium):
    exporter(site).export(str(tmp_path / "the same"))
    site.records.change_orders(Orders.suspend)
    site.records.apply(Event.SUSPEND)
    assert exporter(site).export(str(tmp_path / medium)).already == (medium == "the same")
    assert site.records.orders() == Orders(seed=site.source.generation.hex())
    assert site.records.fields["state"] is ReplicationState.WAITING_FOR_INITIAL_REPLICATION


def test_a_suspension_after_an_export_is_shown_although_one_before_it_was(site, tmp_path):
    shipper = site.shipper()
    shipper.export(str(tmp_path / "m"))
    shipper.suspend()
    shipper.turn()
    assert site.records.fields["state"] is ReplicationState.SUSPENDED
    assert shipper.export(str(tmp_path / "m")).already
    assert site.records.fields["state"] is ReplicationState.WAITING_FOR_INITIAL_REPLICATION
    shipper.suspend()
    shipper.turn()
    assert site.records.fields["state"] is ReplicationState.SUSPENDED


def test_a_vm_with_a_replica_is_refused_with_the_way_that_it_wants(site, tmp_path):
    site.shipper().cycle_now()
    with pytest.raises(UsageError, match="has a replica already") as caught:
        exporter(site).export(str(tmp_path / "m"))
    assert "hvfuse resync vm1" in str(caught.value.hint)
    assert not (tmp_path / "m").exists()
    assert site.records.orders() == Orders()


def test_a_second_medium_of_the_same_generation_will_do_as_well(site, tmp_path):
    exporter(site).export(str(tmp_path / "lost"))
    generation = site.source.generation
    site.write(3)
    site.source.rotate()
    exporter(site).export(str(tmp_path / "found"))
    assert site.source.generation == generation
    for directory in ("lost", "found"):
        site.replica = MemoryReplica()
        travel(tmp_path / directory, site.replica)
        site.records.fields["orders"] = Orders()
        source = site.source
        assert site.replica.stands.generation == source.generation
    site.shipper().cycle_now()
    site.assert_equal()


def test_an_export_that_the_logs_do_not_add_to_any_more_is_refused_and_a_new_one_begins_elsewhere(site, tmp_path):
    exporter(site).export(str(tmp_path / "m"))
    site.source.begin(b"N" * 16, site.source.scope)
    with pytest.raises(UsageError, match="of no use any more"):
        exporter(site).export(str(tmp_path / "m"))
    exporter(site).export(str(tmp_path / "n"))
    assert site.source.generation not in (None, b"N" * 16)
    assert site.records.orders().seed == site.source.generation.hex()


def test_the_order_stands_before_the_generation_begins_and_goes_if_it_cannot(site, tmp_path):
    begin = site.source.begin
    seen = []

    def look(generation, scope):
        seen.append(site.records.orders().seed == generation.hex())
        return begin(generation, scope)

    site.source.begin = look
    exporter(site).export(str(tmp_path / "m"))
    assert seen == [True]

    def refuse(generation, scope):
        raise ResyncRequiredError("no")

    site.records = Kept({"orders": Orders(suspended=True)})
    site.source.begin = refuse
    with pytest.raises(ResyncRequiredError):
        exporter(site).export(str(tmp_path / "n"))
    assert site.records.orders() == Orders(suspended=True)


def test_an_export_takes_the_place_of_what_was_ordered_before(site, tmp_path):
    site.records.update(orders=Orders(now=True, cancelled=True, suspended=True))
    exporter(site).export(str(tmp_path / "m"))
    expected = Orders(seed=site.source.generation.hex())
    assert site.records.orders() == expected
    site.records.change_orders(without_seed)
    exporter(site).export(str(tmp_path / "m"))
    assert site.records.orders() == expected


def test_a_directory_with_other_things_in_it_is_refused_before_anything_begins(site, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "letter.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        exporter(site).export(str(tmp_path / "m"))
    assert site.source.generation is None and site.records.orders() == Orders()


def test_a_medium_that_is_too_small_is_told_before_anything_begins(site, tmp_path, monkeypatch):
    monkeypatch.setattr("hvfuse.shipper.export._free_bytes", lambda directory: MIB)
    with pytest.raises(NoSpaceError, match=r"1 MiB are free; vm1 will take about 1\.\d MiB"):
        exporter(site).export(str(tmp_path / "m"))
    assert site.source.generation is None and not (tmp_path / "m").exists()


def test_a_medium_that_gets_full_is_told_and_goes_on_when_there_is_room(site, tmp_path):
    def full(label: str, call: str, size: int) -> None:
        if label == "seed:append" and os.path.exists(tmp_path / "m" / "frames-00002.hvs"):
            raise OSError(28, "No space left on device")

    system.install(full)
    try:
        with pytest.raises(NoSpaceError, match="the medium is full") as caught:
            exporter(site).export(str(tmp_path / "m"))
    finally:
        system.install(None)
    assert caught.value.hint
    moved = shutil.move(tmp_path / "m", tmp_path / "larger")
    assert exporter(site).export(str(moved)).frames_held > 4
    travel(moved, site.replica)
    site.shipper().cycle_now()
    site.assert_equal()


def test_estimates_are_near_what_an_export_takes(tmp_path):
    dice = random.Random(4)
    text = b" ".join(str(dice.randrange(10**6)).encode() for _ in range(400_000))
    pieces = [(0, random_bytes(1, 2 * MIB)), (3 * MIB, text), (9 * MIB, bytes(MIB))]
    disks = [image(tmp_path, "a.raw", 1 << 30, *pieces), image(tmp_path, "b.raw", 5 * MIB)]
    report = run_copy(tmp_path, disks, SeedReplica(str(tmp_path / "m")))
    assert 0.8 * report.bytes_sent < estimate(disks, str(tmp_path), level=1) < 1.2 * report.bytes_sent
    assert estimate(disks[1:], str(tmp_path), level=1) == 0


def test_a_medium_takes_a_whole_copy_as_any_replica_does(tmp_path, small):
    disks = [image(tmp_path, "a.raw", 3 * MIB + 77, (5, random_bytes(1, 3000)), (MIB, random_bytes(2, MIB)))]
    medium = SeedReplica(str(tmp_path / "m"))
    report = run_copy(tmp_path, disks, medium)
    assert run_copy(tmp_path, disks, medium).frames_held == report.frames_sent
    replica = MemoryReplica()
    travel(tmp_path / "m", replica)
    assert_equal(tmp_path, disks, replica)


def test_a_medium_that_is_abandoned_is_empty_again_and_holds_nothing_to_compare_with(tmp_path, small):
    disks = [image(tmp_path, "a.raw", MIB, (5, random_bytes(1, 300_000)))]
    medium = SeedReplica(str(tmp_path / "m"))

    def stop(done: int, total: int, sent: int) -> None:
        if sent:
            raise Killed

    with pytest.raises(Killed):
        run_copy(tmp_path, disks, medium, progress=stop)
    assert os.listdir(tmp_path / "m")
    medium.abandon()
    medium.abandon()
    assert os.listdir(tmp_path / "m") == []
    assert medium.position() is None and medium.points() == () and medium.inspect(from_medium=True) is None
    for ask in (lambda: medium.extent(b""), lambda: medium.occupied(b"", 0, 1), lambda: medium.put(b"")):
        with pytest.raises(HvfuseError):
            ask()
    assert run_copy(tmp_path, disks, medium).frames_held == 0


def test_the_clock_of_the_machine_will_do(site, tmp_path):
    assert exporter(site, clock=SystemClock()).export(str(tmp_path / "m")).seconds >= 0
