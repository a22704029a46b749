import os

import pytest

from hvfuse import spool, wire
from hvfuse.errors import ResyncRequiredError, UnreachableError
from hvfuse.shipper.coalesce import DamagedLogError
from hvfuse.shipper.source import SourceDisk, TrackerSource

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
                source.begin(bytes.fromhex(message["generation"]))
        return {
            "vm": source.vm, "generation": source.generation and source.generation.hex(),
            "cycle": source.cycle, "resync_required": source.resync_required, "mountpoint": "/mnt", "pid": 1,
            "untracked": [],
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
        status = ours.begin(b"N" * 16)
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


def test_without_a_tracker_logs_are_listed_and_released_all_the_same(source, ours):
    source.begin(b"O" * 16)
    source.rotate()
    source.begin(b"N" * 16)
    for _ in range(3):
        source.rotate()
    with pytest.raises(UnreachableError):
        ours.status()
    assert len(ours.cycles()) == 4
    ours.release(b"N" * 16, 2)
    assert [(cycle.generation, cycle.cycle) for cycle in ours.cycles()] == [(b"N" * 16, 3)]


def test_the_trackers_errors_arrive_as_they_are(tmp_path, ours):
    def refuse(message: wire.Message) -> dict[str, object]:
        raise ResyncRequiredError("the log could not be written")

    listener = wire.Listener(str(tmp_path / "tracker.sock"), refuse, name="tracker")
    try:
        with pytest.raises(ResyncRequiredError, match="could not be written"):
            ours.rotate()
    finally:
        listener.close()


def test_an_answer_that_makes_no_sense_is_no_answer(tmp_path, ours):
    listener = wire.Listener(str(tmp_path / "tracker.sock"), lambda message: {"vm": "vm1"}, name="tracker")
    try:
        with pytest.raises(UnreachableError, match="makes no sense"):
            ours.status()
    finally:
        listener.close()


def test_a_companion_that_cannot_be_read_is_named_and_can_be_discarded(source, ours, caplog):
    source.begin(b"N" * 16)
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
