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
from hvfuse.shipper import replication
from hvfuse.shipper.cycle import CycleReport, ship
from hvfuse.spool import SealedCycle
from hvfuse.target.images import ReplicaImages
from hvfuse.target.local import LocalReplica
from hvfuse.tracker import recovery
from hvfuse.tracker.disk import TrackedDisk
from hvfuse.tracker.index import IndexMap
from hvfuse.tracker.log import ReplicationLog
from hvfuse.tracker.vm import TrackedVm
from tests.crash import campaign
from tests.crash.campaign import Fault, Violation, World
from tests.crash.host import FAST_FOLDER
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
        ("seal:companion:directory", "sealed, but the log"),
        ("state:sync", ""),
    ],
)
def test_a_sync_that_is_left_out_is_found(root: str, monkeypatch: pytest.MonkeyPatch, label: str, broken: str) -> None:
    monkeypatch.setattr(PowerLoss, "ignored", frozenset({label}))
    assert broken in found(root, Fault.POWER)


def test_taking_up_logs_after_a_power_cut_as_if_only_the_process_had_died_is_found(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_cannot_continue", lambda disks: None)
    assert "I3" in found(root, Fault.POWER)


def test_a_whole_copy_after_a_power_cut_is_found_once_it_counts_as_a_failure(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is planted: this is the expectation that replaces today's."""
    monkeypatch.setattr(campaign, "AFTER_POWER_LOSS", campaign.Expectation.HOT_REGIONS)
    assert "copied anew" in found(root, Fault.POWER)


# A process's death finds what was not thought through ----------------------------------------------------


def test_a_log_that_is_not_done_again_on_the_image_is_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_redo", lambda log, recovered: None)
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
