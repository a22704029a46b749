"""Resynchronisations from end to end, between a source and a replica in memory."""

import pytest

from hvfuse.errors import UnreachableError
from hvfuse.position import NO_DIGEST, Position
from hvfuse.shipper.service import Shipper
from hvfuse.shipper.source import ResyncScope
from hvfuse.states import ReplicationState

from .logs import REGION, Killed, MemoryReplica, Tracked, random_bytes, tracked, write
from .test_service import MIB, Site

WAITING = ReplicationState.WAITING_FOR_START_RESYNCHRONIZE
RESYNCHRONIZING = ReplicationState.RESYNCHRONIZING
REPLICATING = ReplicationState.REPLICATING
LOST = "the disk is full"


def made(folder) -> tuple[Site, Shipper]:
    """Two disks with data everywhere, three points old."""
    folder.mkdir(exist_ok=True)
    site = Site(tracked(str(folder), [4 * MIB, MIB + 100], begun=False))
    for seed, disk in enumerate(site.source.disks):
        disk.image[:] = random_bytes(seed, len(disk.image))
    site.source.flush()
    shipper = site.shipper()
    for seed in range(3):
        site.write(seed)
        shipper.cycle_now()
    site.records.states, site.replica.puts, site.replica.asked = [], [], []
    return site, shipper


@pytest.fixture
def site(tmp_path) -> Site:
    return made(tmp_path / "vm")[0]


def lose(site: Site, *, seed: int = 50) -> None:
    """Some writes whose logs are lost, of one disk alone."""
    disk = site.source.disks[0]
    disk.do(write(seed * 1000, random_bytes(seed, 9000)))
    site.source.end_logging(LOST)
    disk.do(write(3 * MIB, random_bytes(seed + 1, 100)))
    site.source.flush()


def asked(site: Site) -> int:
    return sum(length for _, _, length in site.replica.asked)


def test_after_the_logs_were_lost_only_the_marked_regions_are_compared(site):
    lose(site)
    report = site.shipper().cycle_now()
    site.assert_equal()
    copied = site.records.copies[-1]
    assert (copied.regions, copied.bytes_compared) == (2, 2 * REGION)
    assert asked(site) == 2 * 2 * REGION, "the summaries, then the digests of what differs"
    assert copied.bytes_sent < 2 * REGION + 1000
    assert "resynchronised: 2 regions, 128 KiB of 5 MiB compared" in copied.text
    assert site.records.states == [WAITING, RESYNCHRONIZING, REPLICATING]
    assert (report.cycle, site.records.fields["resync_reason"]) == (1, None)
    assert len(site.replica.all_points) == 4, "the points before stay"


def test_the_reason_is_shown_until_the_first_cycle_after_the_copy(site):
    lose(site)
    site.shipper().synchronise()
    assert site.records.fields["resync_reason"] == LOST
    assert site.source.status().resync_scope is None


def test_whole_sealed_cycles_go_over_as_points_before_the_regions_are_compared(site):
    for seed in (20, 21):
        site.write(seed)
        site.source.rotate()
    expected = [bytes(disk.image) for disk in site.source.disks]
    site.source.disks[0].do(write(2 * MIB, b"lost with the host"))
    site.source.crash("the host died", hot=[40])
    site.source.flush()
    commit, seen = MemoryReplica.commit, []

    def noted(replica, manifest, count):
        point = commit(replica, manifest, count)
        seen.append((manifest.cycle, [bytes(replica.images[disk.disk_id]) for disk in site.source.disks]))
        return point

    site.replica.commit = lambda manifest, count: noted(site.replica, manifest, count)
    site.shipper().cycle_now()
    assert [cycle for cycle, _ in seen] == [4, 5, 0, 1]
    assert seen[1][1] == expected
    site.assert_equal()
    assert site.records.copies[-1].bytes_compared == 2 * REGION
    assert site.records.states == [WAITING, RESYNCHRONIZING, REPLICATING]


def test_what_the_guest_writes_during_the_comparison_arrives_with_the_first_cycle(site, monkeypatch):
    lose(site)
    put = MemoryReplica.put

    def busy_put(replica: MemoryReplica, frame: bytes) -> None:
        monkeypatch.setattr(MemoryReplica, "put", put)
        site.write(70)
        site.source.rotate()
        site.write(71)
        site.source.flush()
        put(replica, frame)

    monkeypatch.setattr(MemoryReplica, "put", busy_put)
    assert site.shipper().cycle_now().cycle == 2
    site.assert_equal()
    assert len(site.replica.all_points) == 4


def test_killed_at_every_put_a_resync_resumes_without_sending_twice(tmp_path):
    kill, killed = 0, True
    while killed:
        kill += 1
        site, _ = made(tmp_path / str(kill))
        lose(site)
        site.replica.die_at = kill
        killed = not survives(site, seed=80)
        begun = site.source.generation
        site.replica.die_at = None
        assert survives(site, seed=81)
        site.assert_equal()
        assert site.source.generation == begun, "went on with the generation that had begun"
        assert len(set(site.replica.puts)) == len(site.replica.puts)
        assert site.source.scope is None
    assert kill > 4


def survives(site: Site, *, seed: int) -> bool:
    shipper = site.shipper()
    try:
        shipper.synchronise()
        site.write(seed)
        shipper.cycle_now()
    except Killed:
        return False
    return True


@pytest.mark.parametrize("where", ["commit", "resynced"])
def test_a_shipper_that_dies_after_the_commit_says_later_that_the_copy_is_there(site, monkeypatch, where):
    lose(site)
    if where == "commit":
        site.replica.die_at_commit = True
    else:
        monkeypatch.setattr(Tracked, "resynced", lambda source, generation: raise_killed())
    with pytest.raises(Killed):
        site.shipper().synchronise()
    monkeypatch.undo()
    assert site.source.resyncing and site.source.scope is ResyncScope.REGIONS
    puts = len(site.replica.puts)
    site.shipper().synchronise()
    assert len(site.replica.puts) == puts, "nothing was copied again"
    assert not site.source.resyncing and site.source.scope is None
    site.shipper().cycle_now()
    site.assert_equal()


def raise_killed() -> None:
    raise Killed


def test_logs_that_are_lost_again_during_the_resync_lead_to_another_of_the_regions(site, monkeypatch):
    lose(site)
    put = MemoryReplica.put

    def put_and_lose(replica: MemoryReplica, frame: bytes) -> None:
        monkeypatch.setattr(MemoryReplica, "put", put)
        site.source.disks[1].do(write(0, b"lost again"))
        site.source.end_logging(LOST)
        site.source.flush()
        put(replica, frame)

    monkeypatch.setattr(MemoryReplica, "put", put_and_lose)
    site.shipper().cycle_now()
    site.assert_equal()
    assert [(copied.passes, copied.regions) for copied in site.records.copies[-2:]] == [(1, 2), (2, 3)]


def test_a_resync_that_lost_its_logs_while_no_shipper_ran_goes_on_and_a_pass_follows(site):
    lose(site)
    site.replica.die_at = 1
    with pytest.raises(Killed):
        site.shipper().synchronise()
    site.replica.die_at = None
    site.source.disks[1].do(write(0, b"lost again"))
    site.source.end_logging(LOST)
    site.source.flush()
    begun, points = site.source.generation, len(site.replica.all_points)
    site.shipper().cycle_now()
    site.assert_equal()
    assert [(copied.passes, copied.regions) for copied in site.records.copies[-2:]] == [(1, 2), (2, 3)]
    assert site.source.generation != begun and len(site.replica.all_points) == points + 1
    assert len(set(site.replica.puts)) == len(site.replica.puts), "nothing of the first pass came again"


def test_a_full_resync_sends_differences_alone_and_says_what_it_compared(site):
    site.source.resync_required, site.source.scope = "the image was changed offline", ResyncScope.FULL
    site.source.disks[0].image[2 * MIB] ^= 1
    site.source.flush()
    site.shipper().cycle_now()
    site.assert_equal()
    copied = site.records.copies[-1]
    assert (copied.regions, copied.bytes_compared, copied.bytes_differing) == (None, 5 * MIB + 100, REGION)
    assert len(site.replica.all_points) == 4


def test_regions_are_not_enough_for_a_replica_that_lacks_acknowledged_cycles(site):
    lose(site)
    site.replica.stands = Position(site.source.generation, 1, b"d" * 16)
    site.replica.images[site.source.disks[1].disk_id][:5000] = bytes(5000)
    site.shipper().cycle_now()
    site.assert_equal()
    assert site.records.copies[-1].regions is None


@pytest.mark.parametrize("died", [False, True])
def test_a_store_that_was_rolled_back_is_named_and_compared_as_a_whole(tmp_path, died, caplog):
    caplog.set_level("INFO")
    site, shipper = made(tmp_path / "vm")
    older = Position(site.source.generation, 1, b"d" * 16)
    if died:  # in the middle of a comparison of regions
        lose(site)
        site.replica.die_at = 1
        with pytest.raises(Killed):
            shipper.synchronise()
        site.replica.die_at, site.replica.staged_for = None, None
    site.replica.stands = older
    for image in site.replica.images.values():
        image[-5000:] = bytes(5000)
    site.shipper().cycle_now()
    site.assert_equal()
    assert "rolled back to an older copy" in caplog.text
    assert site.records.copies[-1].regions is None
    assert site.records.copies[-1].bytes_compared == 5 * MIB + 100


@pytest.mark.parametrize("holds", [True, False])
def test_a_store_of_another_generation_or_without_the_vm_is_named_and_compared_as_a_whole(site, holds, caplog):
    caplog.set_level("INFO")
    site.replica.stands = Position(b"O" * 16, 7, b"d" * 16) if holds else None
    if not holds:
        site.replica.images.clear()
    else:
        site.replica.images[site.source.disks[0].disk_id][:100] = bytes(100)
    site.shipper().cycle_now()
    site.assert_equal()
    assert "rolled back to an older copy, or is another one" in caplog.text
    copied = site.records.copies[-1]
    assert copied.bytes_compared == (5 * MIB + 100 if holds else None)


def test_a_replica_that_is_ahead_of_the_disks_gets_the_differences(site):
    site.replica.stands = Position(site.source.generation, 9, b"d" * 16)
    site.replica.images[site.source.disks[0].disk_id][:100] = bytes(100)
    site.shipper().cycle_now()
    site.assert_equal()
    assert site.records.copies[-1].bytes_differing == REGION


def test_while_the_tracker_is_away_a_resync_waits(site, monkeypatch):
    lose(site)
    site.replica.die_at = 1
    with pytest.raises(Killed):
        site.shipper().synchronise()
    site.replica.die_at = None

    def gone(source) -> None:
        raise UnreachableError("no answer from tracker.sock")

    with monkeypatch.context() as patch:
        patch.setattr(Tracked, "status", gone)
        with pytest.raises(UnreachableError):
            site.shipper().cycle_now()
    assert len(site.replica.all_points) == 3
    site.shipper().cycle_now()
    site.assert_equal()


def test_a_copy_that_no_cycle_followed_is_a_base_for_regions_too(tmp_path):
    site = Site(tracked(str(tmp_path), [2 * MIB], begun=False))
    site.source.disks[0].image[:] = random_bytes(1, 2 * MIB)
    site.source.flush()
    site.shipper().synchronise()
    assert site.replica.stands == Position(site.source.generation, 0, NO_DIGEST)
    site.source.disks[0].do(write(5, b"lost"))
    site.source.end_logging(LOST)
    site.source.flush()
    site.shipper().cycle_now()
    site.assert_equal()
    assert site.records.copies[-1].bytes_compared == REGION
