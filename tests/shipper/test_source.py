import os
from dataclasses import replace

import pytest

from hvfuse import spool, wire
from hvfuse.errors import ResyncRequiredError, UnreachableError
from hvfuse.extent import Extent
from hvfuse.position import Position
from hvfuse.shipper.coalesce import DamagedLogError
from hvfuse.shipper.source import ResyncScope, SourceDisk, SourceStatus, TrackerSource

from .logs import Tracked, tracked, write


def listening(tmp_path, source: Tracked, asked: list | None = None) -> wire.Listener:
    """A tracker's control socket in front of a source in memory."""

    def answer(message: wire.Message) -> dict[str, object]:
        if asked is not None:
            asked.append(message)
        match message["op"]:
            case "rotate":
                return {"generation": source.generation.hex(), "cycle": source.rotate(), "barrier_ns": 1}
            case "release":
                source.release(bytes.fromhex(message["generation"]), message["cycle"])
                return {}
            case "begin":
                source.begin(bytes.fromhex(message["generation"]), ResyncScope(message["scope"]))
            case "resynced":
                source.resynced(bytes.fromhex(message["generation"]))
                return {}
            case "regions":
                disks = [
                    {"disk_id": disk_id.hex(), "extents": [[extent.offset, extent.length] for extent in extents]}
                    for disk_id, extents in source.regions().items()
                ]
                return {"scope": source.scope, "disks": disks}
        return {
            "vm": source.vm, "generation": source.generation and source.generation.hex(),
            "cycle": source.cycle, "resync_required": source.resync_required, "mountpoint": "/mnt", "pid": 1,
            "untracked": [], "unsettled": [], "resync_cause": None, "resync_scope": source.scope,
            "resyncing": source.resyncing,
            "acknowledged": source.acknowledged,
            "dirty_bytes": source.status().dirty_bytes,
            "resync_bases": [[generation.hex(), cycle] for generation, cycle in source.bases],
            "disks": [
                {"name": d.name, "disk_id": d.disk_id.hex(), "format": "raw", "size": len(d.image), "log_bytes": 7}
                for d in reversed(source.disks)
            ],
        }  # fmt: skip

    return wire.Listener(str(tmp_path / "tracker.sock"), answer, name="tracker")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "vm1").mkdir()
    return tracked(str(tmp_path / "vm1"), [4096, 8192], begun=False)


@pytest.fixture
def ours(tmp_path):
    return TrackerSource(str(tmp_path / "tracker.sock"), str(tmp_path / "vm1"))


def test_the_trackers_word_arrives_whole_and_disks_are_in_order(tmp_path, source, ours):
    listener = listening(tmp_path, source)
    try:
        assert ours.status().generation is None
        status = ours.begin(b"N" * 16, ResyncScope.FULL)
        assert (status.vm, status.generation, status.cycle) == ("vm1", b"N" * 16, 1)
        assert status.disks == (
            SourceDisk(name="disk0.raw", disk_id=b"\1" * 16, format="raw", size=4096, log_bytes=7),
            SourceDisk(name="disk1.raw", disk_id=b"\2" * 16, format="raw", size=8192, log_bytes=7),
        )
        assert ours.rotate() == 1
        assert ours.rotate() == 2
        assert [cycle.cycle for cycle in ours.cycles()] == [1, 2]
        ours.release(b"N" * 16, 1)
        assert [cycle.cycle for cycle in ours.cycles()] == [2]
    finally:
        listener.close()


def test_without_a_tracker_logs_are_listed_and_stay_until_it_can_note_the_release(source, ours):
    source.begin(b"O" * 16, ResyncScope.FULL)
    source.rotate()
    source.begin(b"N" * 16, ResyncScope.FULL)
    for _ in range(3):
        source.rotate()
    with pytest.raises(UnreachableError):
        ours.status()
    assert len(ours.cycles()) == 4
    ours.release(b"N" * 16, 2)
    assert len(ours.cycles()) == 4


def test_the_trackers_errors_arrive_as_they_are(tmp_path, ours):
    def refuse(message: wire.Message) -> dict[str, object]:
        raise ResyncRequiredError("the log could not be written")

    listener = wire.Listener(str(tmp_path / "tracker.sock"), refuse, name="tracker")
    try:
        with pytest.raises(ResyncRequiredError, match="could not be written"):
            ours.rotate()
    finally:
        listener.close()


def test_a_policy_and_the_wish_that_disks_be_taken_in_arrive_whole(tmp_path, ours):
    asked = []
    listener = wire.Listener(str(tmp_path / "tracker.sock"), lambda message: asked.append(message) or {}, name="t")
    try:
        ours.take_in()
        ours.configure(exclude=frozenset({"b.raw", "a.raw"}), hard_limit=0.5, soft_limit=0.1)
    finally:
        listener.close()
    assert asked == [
        {"op": "take_in"},
        {"op": "configure", "exclude": ["a.raw", "b.raw"], "hard_limit": 0.5, "soft_limit": 0.1},
    ]


def test_an_answer_that_makes_no_sense_is_no_answer(tmp_path, ours):
    listener = wire.Listener(str(tmp_path / "tracker.sock"), lambda message: {"vm": "vm1"}, name="tracker")
    try:
        with pytest.raises(UnreachableError, match="makes no sense"):
            ours.status()
    finally:
        listener.close()


def test_a_companion_that_cannot_be_read_is_named_and_can_be_discarded(source, ours, caplog):
    source.begin(b"N" * 16, ResyncScope.FULL)
    source.disks[0].do(write(0, b"a"))
    source.rotate()
    source.rotate()
    path = source.cycles()[0].logs[0].companion_path
    with open(path, "r+b") as file:
        file.write(b"damage")
    with pytest.raises(DamagedLogError, match=r"disk0\.raw\.0000000001\.hrc"):
        ours.cycles()
    assert ours.discard_damaged() == [path]
    assert path in caplog.text
    assert [cycle.is_whole for cycle in ours.cycles()] == [False, True]
    assert not os.path.exists(path.replace(".hrc", ".hrl"))
    assert os.path.exists(os.path.join(source.folder, spool.spare_name("disk0.raw", 0)))
    assert ours.discard_damaged() == []


def test_what_is_to_be_compared_is_asked_for_and_the_copys_end_is_told(tmp_path, source, ours):
    listener = listening(tmp_path, source)
    try:
        ours.begin(b"N" * 16, ResyncScope.FULL)
        assert ours.status().resyncing
        ours.resynced(b"N" * 16)
        assert (ours.status().resyncing, ours.status().resync_scope) == (False, None)
        source.disks[1].do(write(5000, b"lost"))
        source.end_logging("the disk is full")
        status = ours.status()
        assert (status.resync_required, status.resync_scope) == ("the disk is full", ResyncScope.REGIONS)
        assert status.resync_bases == ((b"N" * 16, 0),)
        assert ours.begin(b"O" * 16, ResyncScope.REGIONS).resync_bases == ((b"N" * 16, 0), (b"O" * 16, 0))
        assert ours.regions() == {b"\1" * 16: [], b"\2" * 16: [Extent(0, 8192)]}
    finally:
        listener.close()


@pytest.mark.parametrize(
    ("generation", "cycle", "expected"),
    [
        (b"B", 4, ResyncScope.FULL),
        (b"B", 5, ResyncScope.REGIONS),
        (b"B", 99, ResyncScope.REGIONS),
        (b"N", 0, ResyncScope.REGIONS),
        (b"N", 2, ResyncScope.REGIONS),
        (b"N", 3, ResyncScope.FULL),
        (b"X", 5, ResyncScope.FULL),
    ],
)
def test_marked_regions_are_enough_only_for_a_replica_that_they_add_to(generation, cycle, expected):
    status = SourceStatus(
        vm="vm1", generation=b"N" * 16, cycle=3, resync_required="why", disks=(),
        resync_scope=ResyncScope.REGIONS, resync_bases=((b"B" * 16, 5), (b"N" * 16, 0)),
    )  # fmt: skip
    position = Position(generation * 16, cycle, b"d" * 16)
    assert status.scope_for(position) is expected
    assert status.scope_for(None) is ResyncScope.FULL
    assert replace(status, resync_scope=None).scope_for(position) is ResyncScope.FULL
