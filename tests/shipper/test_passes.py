"""Copies of VMs that write more meanwhile than their logs may hold: pass after pass, until one fits."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from hvfuse.manifest import CycleKind, CycleManifest, RecoveryPoint
from hvfuse.shipper.service import Shipper
from hvfuse.shipper.source import ResyncScope, SourceStatus
from hvfuse.states import ReplicationState

from .logs import REGION, Killed, MemoryReplica, Tracked, random_bytes, tracked, write
from .test_service import MIB, Clock, Kept, Site

INITIAL = ReplicationState.INITIAL_REPLICATION_IN_PROGRESS
REPLICATING = ReplicationState.REPLICATING


@dataclass
class Reaper:
    """Kills at the nth step."""

    at: int | None = None
    steps: int = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.at:
            raise Killed


@dataclass
class Guest(MemoryReplica):
    """A replica during whose copies the guest writes: `regions[n]` of them in the nth pass, too many for logs;
    then nothing. Each point is compared with the disks at its barrier when it appears."""

    site: Busy | None = None
    regions: list[int] = field(default_factory=list)
    passes: int = 0
    seconds: float = 0.0
    written_for: bytes | None = None

    def put(self, frame: bytes) -> None:
        self.site.reaper.step()
        super().put(frame)
        if self.staged_for[1] == 0:
            self.write(self.staged_for[0])
        self.site.reaper.step()

    def write(self, generation: bytes) -> None:
        """Once for each copy."""
        self.site.clock.sleep(self.seconds)
        if self.written_for == generation:
            return
        self.written_for, source = generation, self.site.source
        count = self.regions[self.passes] if self.passes < len(self.regions) else 0
        self.passes += 1
        for number in range(count):
            source.disks[0].do(write(number * REGION, random_bytes(100 * self.passes + number, REGION)))
        source.flush()
        if count:
            source.end_logging("the logs were too large")

    def commit(self, manifest: CycleManifest, frame_count: int) -> RecoveryPoint | None:
        self.site.reaper.step()
        point = super().commit(manifest, frame_count)
        if manifest.kind is CycleKind.DELTA:
            images = [bytes(self.images[disk.disk_id]) for disk in self.site.source.disks]
            assert images == self.site.source.barriers[manifest.generation, manifest.cycle], "a false point"
        self.site.reaper.step()
        return point


@dataclass
class Dying(Tracked):
    """A source at whose calls the shipper dies."""

    reaper: Reaper = field(default_factory=Reaper)

    def begin(self, generation: bytes, scope: ResyncScope) -> SourceStatus:
        self.reaper.step()
        status = super().begin(generation, scope)
        self.reaper.step()
        return status

    def resynced(self, generation: bytes) -> None:
        self.reaper.step()
        super().resynced(generation)
        self.reaper.step()

    def rotate(self) -> int:
        self.reaper.step()
        return super().rotate()

    def release(self, generation: bytes, cycle: int) -> None:
        self.reaper.step()
        super().release(generation, cycle)


@dataclass
class Busy(Site):
    """A site whose shipper dies where the reaper says."""

    reaper: Reaper = field(default_factory=Reaper)


def busy(folder: str, regions: list[int], *, seconds: float = 0.0) -> Busy:
    reaper = Reaper()
    made = tracked(folder, [MIB, REGION + 100], begun=False)
    source = Dying(made.folder, made.disks, reaper=reaper)
    for seed, disk in enumerate(source.disks):
        disk.image[:] = random_bytes(seed, len(disk.image))
    source.flush()
    replica = Guest(regions=regions, seconds=seconds)
    replica.site = Busy(source, replica, Kept(), Clock(), reaper=reaper)
    return replica.site


def come_through(site: Busy, shipper: Shipper, *, seed: int) -> bool:
    """Whether a shipper comes through whatever is needed, and a cycle."""
    try:
        shipper.synchronise()
        site.write(seed)
        shipper.cycle_now()
    except Killed:
        return False
    return True


@pytest.mark.parametrize("is_first", [True, False])
def test_passes_follow_each_other_until_one_fits_and_only_then_there_is_a_point(tmp_path, is_first):
    site = busy(str(tmp_path), [8, 4, 1] if is_first else [])
    shipper = site.shipper()
    if not is_first:
        shipper.cycle_now()
        site.replica.regions, site.replica.passes = [8, 4, 1], 0
        site.source.disks[1].do(write(0, b"lost"))
        site.source.end_logging("the disk was full")
        site.source.flush()
    before = len(site.replica.all_points)
    site.records.states, site.records.copies = [], []
    report = shipper.cycle_now()
    site.assert_equal()
    first = 18 if is_first else 1  # slots, regions
    assert [copied.passes for copied in site.records.copies] == [1, 2, 3, 4]
    assert [copied.bytes_compared for copied in site.records.copies[1:]] == (
        [8 * REGION, 12 * REGION, 13 * REGION] if is_first else [9 * REGION, 13 * REGION, 14 * REGION]
    )
    assert [copied.regions for copied in site.records.copies] == (4 * [None] if is_first else [first, 9, 13, 14])
    assert len(site.replica.all_points) == before + 1
    assert (report.cycle, report.notes[-1]) == (1, site.records.copies[-1].text)
    assert report.notes[-1].endswith("sent in 4 passes")
    kind = "copied: 1.1 MiB" if is_first else "resynchronised: 14 regions"
    assert report.notes[-1].startswith(kind)
    assert site.records.states == (
        [INITIAL, REPLICATING]
        if is_first
        else [ReplicationState.WAITING_FOR_START_RESYNCHRONIZE, ReplicationState.RESYNCHRONIZING, REPLICATING]
    )


def test_a_copy_that_was_joined_and_loses_its_logs_before_the_first_rotation_takes_another_pass(tmp_path, monkeypatch):
    site = busy(str(tmp_path), [])
    rotate, losses = Dying.rotate, iter([True, True, True, False, False])

    def lose_and_rotate(source: Dying) -> int:
        if next(losses):
            source.disks[0].do(write(0, random_bytes(9, 100)))
            source.flush()
            source.end_logging("the logs were too large")
        return rotate(source)

    monkeypatch.setattr(Dying, "rotate", lose_and_rotate)
    assert site.shipper().cycle_now().cycle == 1
    site.assert_equal()
    assert [copied.passes for copied in site.records.copies] == [1, 2, 3, 4]
    assert [copied.bytes_compared for copied in site.records.copies] == [None, REGION, 2 * REGION, 3 * REGION]


@pytest.mark.parametrize("begin", ["first copy", "lost logs"])
def test_killed_at_every_step_of_every_pass_the_next_shipper_goes_on_and_no_point_is_false(tmp_path, begin):
    step, was_killed = 0, True
    while was_killed:
        step += 1
        folder = tmp_path / f"{begin}{step}"
        folder.mkdir()
        site = busy(str(folder), [3, 2] if begin == "first copy" else [])
        if begin == "lost logs":
            site.shipper().cycle_now()
            site.replica.regions, site.replica.passes = [3], 0
            site.source.disks[0].do(write(5 * REGION, random_bytes(5, 4 * REGION)))
            site.source.end_logging("the disk was full")
            site.source.flush()
        site.reaper.at, site.reaper.steps, site.replica.puts = step, 0, []
        was_killed = not come_through(site, site.shipper(), seed=3)
        site.reaper.at = None
        assert come_through(site, site.shipper(), seed=4)
        site.assert_equal()
        assert site.source.status().resync_scope is None
        assert len(set(site.replica.puts)) == len(site.replica.puts), "nothing was sent twice"
        last = site.records.copies[-1]
        expected = (3, True) if begin == "first copy" else (2, False)
        assert (last.passes, last.is_whole) == expected, "counted on across the death"
        assert site.records.fields["copy"] is site.records.fields["progress"] is None
    assert step > 30


def pace(site: Busy, sizes: list[int]) -> None:
    site.replica.regions, site.replica.seconds = sizes, 2.0


def test_passes_that_do_not_get_smaller_are_told_with_figures_and_it_goes_on_until_they_do(
    tmp_path, caplog, monkeypatch
):
    site = busy(str(tmp_path), [])
    pace(site, [16, 16, 16, 16, 16, 4, 1])
    told: list[tuple[int, object]] = []
    update = Kept.update

    def noted(records: Kept, **fields: object) -> None:
        update(records, **fields)
        if "error" in fields and (fields["error"] or told):
            told.append((site.replica.passes, fields["error"]))

    monkeypatch.setattr(Kept, "update", noted)
    report = site.shipper().cycle_now()
    site.assert_equal()
    assert [number for number, error in told if error] == [4, 5, 6], "from the third in a row on"
    assert "the guest writes faster than the copy gets over: 256.1 KiB/s against 256.1 KiB/s" in told[0][1]
    assert "/s in pass 4; it goes on trying" in told[0][1]
    assert told[3] == (7, None), "taken back as soon as they get smaller"
    assert site.records.fields["error"] is None
    assert any("faster than the copy" in note for note in report.notes)
    assert report.notes[-1].endswith("in 8 passes")
    assert "faster than the copy" in caplog.text


def test_a_shipper_that_is_restarted_remembers_that_passes_do_not_get_smaller(tmp_path, caplog):
    site = busy(str(tmp_path), [])
    pace(site, [16, 16, 16, 16, 16])
    kills = 0
    while True:
        site.reaper.at = site.reaper.steps + 9
        if come_through(site, site.shipper(), seed=kills):
            break
        kills += 1
    site.assert_equal()
    assert kills > 3
    assert "it goes on trying" in caplog.text


def test_a_slow_pass_that_sends_less_is_no_reason_to_complain(tmp_path):
    site = busy(str(tmp_path), [])
    pace(site, [16, 14, 12, 10, 8, 6, 4, 2])
    assert site.shipper().cycle_now().cycle == 1
    assert site.records.copies[-1].passes == 9


def test_a_copy_that_is_no_good_any_more_begins_anew_with_everything(tmp_path):
    site = busy(str(tmp_path), [])
    site.reaper.at = 8
    assert not come_through(site, site.shipper(), seed=1)
    began = site.source.generation
    site.source.resyncing, site.source.scope = False, ResyncScope.FULL
    site.source.resync_required = "an image could not be synced"
    site.shipper().cycle_now()
    site.assert_equal()
    assert site.source.generation != began and len(site.replica.all_points) == 1


def test_a_pass_that_ends_with_an_unreachable_target_is_resumed_by_the_ladder(tmp_path, monkeypatch, caplog):
    from hvfuse.errors import UnreachableError

    site = busy(str(tmp_path), [4, 2])
    put = Guest.put

    def fail(replica: Guest, frame: bytes) -> None:
        put(replica, frame)
        if replica.passes == 2:
            raise UnreachableError("the target is away")

    shipper = site.shipper()
    with monkeypatch.context() as patch:
        patch.setattr(Guest, "put", fail)
        assert shipper.turn() == 60
    assert site.records.fields["state"] is INITIAL
    site.clock.seconds += 60
    shipper.turn()
    site.assert_equal()
    assert site.records.copies[-1].passes == 3
    assert len(set(site.replica.puts)) == len(site.replica.puts)
    assert "the target is away" in caplog.text
