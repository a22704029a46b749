import dataclasses
import os

import pytest

from hvfuse.errors import HvfuseError
from hvfuse.formats.companion import Kind
from hvfuse.position import NO_DIGEST, Position, PositionMismatchError
from hvfuse.shipper import cycle as cycle_module
from hvfuse.shipper.coalesce import DamagedLogError
from hvfuse.shipper.cycle import manifest, previous_position, ship, total
from hvfuse.system import SystemClock

from .logs import Killed, MemoryReplica, Op, Tracked, random_bytes, tracked, write

MIB = 1 << 20
FORMATS = {"disk0.raw": "raw", "disk1.raw": "raw", "disk2.raw": "raw"}


def shipped(source: Tracked, replica: MemoryReplica, first: int = 1, last: int | None = None, **options):
    cycles = [c for c in source.cycles() if first <= c.cycle <= (last or first)]
    return ship(cycles, vm="vm1", formats=FORMATS, replica=replica, level=1, clock=SystemClock(), **options)


def copied(source: Tracked) -> MemoryReplica:
    """A replica that holds what the disks hold now, at cycle 0."""
    return MemoryReplica(
        images={disk.disk_id: bytearray(disk.image) for disk in source.disks},
        stands=Position(source.generation, 0, NO_DIGEST),
    )


def contents(source: Tracked, replica: MemoryReplica) -> None:
    for disk in source.disks:
        assert replica.images[disk.disk_id] == disk.image, disk.name


def busy(source: Tracked, round_number: int) -> None:
    for disk in source.disks:
        for n in range(3):
            disk.do(write(n * MIB + round_number * 700, random_bytes(round_number + n, MIB - 5000)))
        disk.do(Op(Kind.TRIM, MIB // 2, MIB // 4))


def test_cycles_of_several_disks_arrive_and_each_makes_a_point(tmp_path):
    source = tracked(str(tmp_path), [4 * MIB, 3 * MIB, 5 * MIB])
    replica = copied(source)
    for number in (1, 2, 3):
        busy(source, number)
        source.rotate()
        report = shipped(source, replica, number)
        contents(source, replica)
        assert report.point == replica.all_points[-1].id == f"47474747-{number:06d}"
        assert report.frames_sent > 0 and report.frames_held == 0
        assert report.bytes_logged >= report.bytes_coalesced > report.bytes_sent // 2 > 0
        assert report.bytes_zero == 3 * MIB // 4
    assert replica.stands == manifest(source.cycles()[-1:], vm="vm1", formats=FORMATS).position()


def test_frame_numbers_run_from_zero_over_all_disks(tmp_path):
    source = tracked(str(tmp_path), [4 * MIB, 3 * MIB])
    replica = copied(source)
    busy(source, 1)
    source.rotate()
    report = shipped(source, replica)
    assert [number for _, _, number in replica.puts] == list(range(report.frames_sent))


def test_a_cycle_without_writes_still_makes_a_point(tmp_path):
    source = tracked(str(tmp_path))
    replica = copied(source)
    source.rotate()
    report = shipped(source, replica)
    assert (report.frames_sent, report.bytes_sent) == (0, 0)
    assert len(replica.all_points) == 1


def test_cycles_that_list_their_disks_in_other_orders_do_not_exchange_them(tmp_path):
    source = tracked(str(tmp_path), [4 * MIB, 4 * MIB])
    replica = copied(source)
    for number in range(2):
        source.disks[0].do(write(number * MIB, b"A" * 4096))
        source.disks[1].do(write(number * MIB + 8192, b"B" * 4096))
        source.rotate()
    first, second = source.cycles()
    turned = dataclasses.replace(first, logs=first.logs[::-1])
    ship([turned, second], vm="vm1", formats=FORMATS, replica=replica, level=1, clock=SystemClock())
    contents(source, replica)


@pytest.mark.parametrize("before_or_after", [-1, 1])
def test_killed_at_every_put_and_resumed_nothing_is_sent_twice(tmp_path, monkeypatch, before_or_after):
    source = tracked(str(tmp_path), [4 * MIB, 3 * MIB])
    empty = copied(source)
    busy(source, 1)
    source.rotate()
    frames = shipped(source, copied_again(empty)).frames_sent
    assert frames >= 4
    for kill in range(1, frames + 1):
        replica = copied_again(empty)
        replica.die_at = before_or_after * kill
        with pytest.raises(Killed):
            shipped(source, replica)
        replica.die_at = None
        held = len(replica.staged)
        with monkeypatch.context() as patch:
            built = counted(patch)
            report = shipped(source, replica)
        assert (report.frames_held, report.frames_sent) == (held, frames - held)
        assert len(built) == frames - held, "a frame that is held is not read again"
        assert len(replica.puts) == frames
        contents(source, replica)


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """The frames whose contents are read from now on."""
    built: list[int] = []
    content = cycle_module.DiskPlan.content
    patch.setattr(cycle_module.DiskPlan, "content", lambda *given: built.append(given[1]) or content(*given))
    return built


def copied_again(replica: MemoryReplica) -> MemoryReplica:
    images = {key: bytearray(image) for key, image in replica.images.items()}
    return MemoryReplica(images=images, stands=replica.stands)


def test_several_cycles_travel_as_one_under_the_last_number(tmp_path):
    source = tracked(str(tmp_path), [4 * MIB, 3 * MIB])
    replica = copied(source)
    for number in (1, 2, 3):
        busy(source, number)
        source.rotate()
    report = shipped(source, replica, 1, 3)
    contents(source, replica)
    assert report.cycle == 3 and len(replica.all_points) == 1
    busy(source, 4)
    source.rotate()
    shipped(source, replica, 4)
    contents(source, replica)


def test_a_cycle_that_does_not_continue_the_replica_is_refused_with_its_position(tmp_path):
    source = tracked(str(tmp_path))
    replica = copied(source)
    for _ in range(3):
        source.rotate()
    with pytest.raises(PositionMismatchError) as caught:
        shipped(source, replica, 2)
    assert caught.value.theirs == replica.stands


def test_a_log_that_does_not_continue_the_one_before_it_is_named(tmp_path):
    source = tracked(str(tmp_path))
    source.rotate()
    source.disks[0].digest = b"x" * 16
    source.rotate()
    with pytest.raises(DamagedLogError, match=r"0000000002\.hrc: does not continue"):
        shipped(source, copied(source), 1, 2)


def test_a_cycle_that_lacks_a_disk_is_refused(tmp_path):
    source = tracked(str(tmp_path), [MIB, MIB])
    source.rotate()
    os.unlink(source.cycles()[0].logs[1].companion_path)
    with pytest.raises(DamagedLogError, match="logs of cycle 1 are missing"):
        shipped(source, copied(source))


def test_the_position_that_a_cycle_continues_comes_from_its_own_logs(tmp_path):
    source = tracked(str(tmp_path), [MIB, MIB])
    source.rotate()
    source.rotate()
    first, second = source.cycles()
    assert previous_position(first) == Position(b"G" * 16, 0, NO_DIGEST)
    assert previous_position(second) == manifest([first], vm="vm1", formats=FORMATS).position()


def test_a_disk_of_unknown_format_is_refused(tmp_path):
    source = tracked(str(tmp_path))
    source.rotate()
    with pytest.raises(HvfuseError, match=r"disk0\.raw"):
        manifest(source.cycles(), vm="vm1", formats={})


def test_damage_found_halfway_leaves_the_replica_where_it_was(tmp_path):
    source = tracked(str(tmp_path), [4 * MIB])
    replica = copied(source)
    before = replica.stands
    busy(source, 1)
    source.rotate()
    with open(source.cycles()[0].logs[0].log_path, "r+b") as file:
        file.seek(2 * MIB)
        file.write(b"damage")
    with pytest.raises(DamagedLogError):
        shipped(source, replica)
    assert replica.stands == before and not replica.all_points


def test_between_frames_shipping_can_be_stopped_and_goes_on_later(tmp_path):
    source = tracked(str(tmp_path), [4 * MIB])
    replica = copied(source)
    busy(source, 1)
    source.rotate()

    def stop() -> None:
        raise Killed

    with pytest.raises(Killed):
        shipped(source, replica, between=stop)
    assert shipped(source, replica).frames_held == 1
    contents(source, replica)


def test_a_total_is_the_last_report_with_sums(tmp_path):
    source = tracked(str(tmp_path))
    replica = copied(source)
    source.disks[0].do(write(0, random_bytes(1, 5000)))
    source.rotate()
    report = shipped(source, replica)
    twice = total([report, dataclasses.replace(report, cycle=2, point="p")])
    assert (twice.cycle, twice.point, twice.bytes_logged) == (2, "p", 10000)
    assert twice.as_json()["generation"] == "47" * 16
