"""The campaign is worth what it finds: each bug that is planted here must be found within a few worlds."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from hvfuse import spool, system
from hvfuse.formats.tracking import Scope
from hvfuse.shipper import replication
from hvfuse.shipper.cycle import CycleReport, ship
from hvfuse.spool import SealedCycle
from hvfuse.target.images import ReplicaImages
from hvfuse.target.journal import PointReader
from hvfuse.target.local import LocalReplica
from hvfuse.tracker import recovery
from hvfuse.tracker.disk import TrackedDisk
from hvfuse.tracker.index import IndexMap
from hvfuse.tracker.log import ReplicationLog
from hvfuse.tracker.regions import HOT, RegionMap
from hvfuse.tracker.vm import TrackedVm
from tests.crash.campaign import Fault, Violation, World
from tests.crash.host import FAST_FOLDER, VM, Host, Reaper
from tests.crash.powerloss import BypassError, PowerLoss

WORLDS = 30
"""In which a planted bug has to be found."""


@pytest.fixture
def root() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="hvfuse-crash-", dir=FAST_FOLDER)
    yield path
    shutil.rmtree(path)


def found(root: str, *faults: Fault) -> str:
    """What the campaign says of the bug that is planted now. Fails if it says nothing."""
    for number in range(WORLDS):
        path = os.path.join(root, str(number))
        os.mkdir(path)
        try:
            World(path, seed=f"planted/{number}", faults=faults or tuple(Fault)).run()
        except Violation as violation:
            return str(violation)
        shutil.rmtree(path)
    pytest.fail(f"the bug was not found in {WORLDS} worlds")


def every(nth: int, planted: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, but each nth call goes to `planted`."""
    calls = itertools.count(1)

    def mixed(*arguments: Any, **options: Any) -> Any:
        return (original if next(calls) % nth else planted)(*arguments, **options)

    return mixed


# A host's crash finds what was not synced -----------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "broken"),
    [
        ("disk:sync", "I1"),
        ("log:sync", "entries that a sync made durable"),
        ("index:sync", "entries that a sync made durable"),
        ("seal:image", "I1"),
        ("seal:log", "sealed, but entry"),
        ("seal:companion:sync", "companion is truncated"),
        ("seal:companion:directory log:prepare-directory", "sealed, but the log"),
        ("state:sync", ""),
    ],
)
def test_a_sync_that_is_left_out_is_found(root: str, monkeypatch: pytest.MonkeyPatch, label: str, broken: str) -> None:
    monkeypatch.setattr(PowerLoss, "ignored", frozenset(label.split()))
    assert broken in found(root, Fault.POWER)


def test_taking_up_logs_after_a_power_cut_as_if_only_the_process_had_died_is_found(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken_up(disks: list[recovery.Tracked]) -> recovery.Finding:
        return recovery.Finding(report=recovery._recover_logs(disks, disk_count=len(disks), now_ns=1))

    monkeypatch.setattr(recovery, "_recover_from_power_loss", taken_up)
    assert re.search("I3|copied anew|could not be taken up", found(root, Fault.POWER))


def test_a_whole_copy_after_a_power_cut_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(disks: list[recovery.Tracked]) -> recovery.Finding:
        return recovery.Finding(reason="planted", scope=Scope.FULL)

    monkeypatch.setattr(recovery, "_recover_from_power_loss", everything)
    assert "copied anew" in found(root, Fault.POWER)


def test_whatever_a_power_cut_leaves_the_marked_regions_cover_every_difference(root: str) -> None:
    """Nothing is planted: power cuts alone, and after each the next point equals the disks."""
    for number in range(4):
        path = os.path.join(root, str(number))
        os.mkdir(path)
        tally = World(path, seed=f"power/{number}", faults=[Fault.POWER]).run()
        assert tally.resyncs > 0
        assert tally.copies == 1


def test_a_region_that_is_not_marked_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RegionMap, "cover", every(4, lambda self, *range_: None, RegionMap.cover))
    assert re.search("I2|I3", found(root, Fault.POWER))


def test_a_mark_that_is_not_synced_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PowerLoss, "ignored", frozenset({"regions:sync"}))
    assert re.search("I2|I3", found(root, Fault.POWER))


def test_a_mark_that_is_cleared_too_early_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = RegionMap.switched

    def switched(self: RegionMap) -> None:
        original(self)
        self.clear(HOT)  # before log and image are synced

    monkeypatch.setattr(RegionMap, "switched", switched)
    assert re.search("I2|I3", found(root, Fault.POWER))


def written_before_the_first_copy_and_cut_off_after_it(root: str, seed: int) -> bool:
    """Whether the newest point equals the disks after a power cut right behind the first cycle."""
    path = os.path.join(root, str(seed))
    os.mkdir(path)
    with Host(path, Reaper(), seed=seed) as host:
        host.attach().disks["a.raw"].write(os.urandom(200_000), 0)
        host.replication.cycle_now()
        host.kill()
        host.close_target()
        host.cut_power()
        host.open_target()
        host.attach()
        reader = PointReader(host.store, VM, host.replication.cycle_now().point)
        same = all(reader.pread(name, 0, len(image)) == image for name, image in host.images().items())
        reader.close()
    return same


def test_an_image_that_is_not_synced_before_its_copy_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(written_before_the_first_copy_and_cut_off_after_it(root, seed) for seed in range(5))
    # Sealing syncs the image as well, but what it syncs there has been copied by then.
    monkeypatch.setattr(PowerLoss, "ignored", frozenset({"begin:image", "seal:image"}))
    assert not all(written_before_the_first_copy_and_cut_off_after_it(root, seed) for seed in range(5, 15))


# A process's death finds what was not thought through ----------------------------------------------------


def test_a_log_that_is_not_done_again_on_the_image_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_redo", lambda fd, kind, offset, payload: None)
    assert "I3" in found(root, Fault.TRACKER)


def test_a_torn_entry_that_is_accepted_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        IndexMap, "_holds", lambda self, at, seq: int.from_bytes(self._view[at : at + 8], "little") == seq
    )
    assert "could not be taken up" in found(root, Fault.TRACKER)


def test_cycles_sealed_by_recovery_although_the_barrier_was_cut_off_are_found(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_is_switched", lambda cycle, left, disks: True)
    assert re.search("copied anew|costs a copy", found(root, Fault.TRACKER))


def test_companions_ahead_of_the_state_that_recovery_overlooks_are_found(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_catch_up_with_companions", lambda disk, state: None)
    assert re.search("copied anew|costs a copy", found(root, Fault.TRACKER))


def test_logs_released_before_their_cycle_is_committed_are_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def early(run: Sequence[SealedCycle], **options: Any) -> CycleReport:
        spool.release(run)
        return ship(run, **options)

    monkeypatch.setattr(replication, "ship", early)
    assert "missing" in found(root, Fault.SHIPPER)


# The comparison finds what was lost or went astray -------------------------------------------------------


def test_a_write_that_reaches_the_log_but_not_the_image_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(self: TrackedDisk, data: bytes, offset: int) -> int:
        if self.log is not None:
            self.log.append_write(data, offset)
        return len(data)

    monkeypatch.setattr(TrackedDisk, "write", every(20, lose, TrackedDisk.write))
    assert "I1" in found(root)


def test_a_write_that_reaches_the_image_but_not_the_log_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ReplicationLog, "append_write", every(20, lambda self, data, offset: None, ReplicationLog.append_write)
    )
    assert "I3" in found(root)


def test_a_write_that_is_logged_for_another_place_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ReplicationLog.append_write
    monkeypatch.setattr(
        ReplicationLog,
        "append_write",
        every(20, lambda self, data, offset: original(self, data, max(offset - 512, 0)), original),
    )
    assert "I3" in found(root)


def test_a_resize_that_rotates_too_late_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(self: TrackedVm, disk: TrackedDisk, new_size: int | None) -> None:
        if new_size is not None:
            system.truncate("disk:truncate", disk.fd, new_size)
        if disk.log is not None:
            self.rotate()

    monkeypatch.setattr(TrackedVm, "rotate_for", late)
    assert "I3" in found(root)


def test_zeroes_that_a_merge_forgets_are_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReplicaImages, "zero", lambda self, name, offset, length: None)
    assert "I3" in found(root)


def test_a_frame_that_the_store_drops_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalReplica, "put", every(7, lambda self, frame: None, LocalReplica.put))
    monkeypatch.setattr(LocalReplica, "_check_complete", lambda *_: 0)
    assert "I3" in found(root)


def test_writing_past_the_seam_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the recorder can be believed: it would miss what a crash could make of it."""
    monkeypatch.setattr(TrackedDisk, "write", lambda self, data, offset: os.pwrite(self.fd, data, offset))
    with pytest.raises(BypassError):
        World(root, seed="bypass", faults=(Fault.POWER,)).run()
