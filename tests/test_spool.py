"""The files between tracker and shipper: names, listing, release and recycling, with real files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvfuse import spool, system
from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.formats import companion
from tests.log_samples import sealed, write

SAMPLE = sealed([write(0, b"payload")])
HEADER, ENTRIES = companion.unpack(SAMPLE.companion)


def put(folder: Path, disk: str, serial: int, *, cycle: int = 1, disks: int = 1, generation: bytes = b"g" * 16) -> None:
    """A sealed log and its companion."""
    header = replace(HEADER, serial=serial, cycle=cycle, disk_count=disks, generation=generation)
    (folder / spool.log_name(disk, serial)).write_bytes(SAMPLE.log)
    (folder / spool.companion_name(disk, serial)).write_bytes(header.pack() + ENTRIES.tobytes())


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


DISK_NAME = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(DISK_NAME, st.integers(0, 10**10 - 1))
def test_every_name_that_the_tracker_uses_is_reserved(disk: str, serial: int) -> None:
    for name in (
        spool.log_name(disk, serial),
        spool.compacted_name(disk, serial),
        spool.companion_name(disk, serial),
        spool.companion_name(disk, serial) + ".tmp",
        spool.spare_name(disk, serial % 3),
        spool.state_name(disk),
        spool.state_name(disk) + ".tmp",
        spool.index_name(disk, 0),
        spool.index_name(disk, 1),
    ):
        assert spool.is_reserved(name)


@pytest.mark.parametrize(
    "name",
    [
        "os.vhd", "os.raw", "x.hrl", "x.hrc", "x.1.hrl", "x.00000000001.hrl", "x.000000001.hrl", ".hvt",
        "hvt", "x.hvt2", "x.hvtmp", "x.spare.hrl", "0000000001.hrl", ".0000000001.hrl", "x.0000000001.hrl.bak",
        "x.0000000001.hrl\n", "x.hvt\n", "x.0000000001.hrl.tmp", ".0000000001.c.hrl", "x.1.c.hrl",
        "x.0000000001.c.hrc", "x.0000000001.cc.hrl", "x.0000000001.c.hrl\n", "x.٠٠٠٠٠٠٠٠٠١.hrc",
    ],
)  # fmt: skip
def test_other_names_belong_to_the_user(name: str) -> None:
    assert not spool.is_reserved(name)


def test_what_the_user_may_create_is_never_taken_for_a_sealed_log(tmp_path: Path) -> None:
    for name in ("x.٠٠٠٠٠٠٠٠٠١.hrc", "x.0000000001.hrc\n", "0000000001.hrc", "x.1.hrc"):
        assert not spool.is_reserved(name)
        (tmp_path / name).write_bytes(b"not a companion")
    assert spool.list_logs(str(tmp_path)) == []
    assert spool.unsealed_logs(str(tmp_path), "x") == []


def test_names_that_are_not_utf8_are_told_apart_too() -> None:
    assert spool.is_reserved(os.fsdecode(b"\xff\xfe.0000000001.hrl"))
    assert not spool.is_reserved(os.fsdecode(b"\xff\xfe.vhd"))


def test_sealed_logs_are_listed_by_disk_and_serial(tmp_path: Path) -> None:
    for disk, serial in (("b.vhd", 2), ("a.vhd", 11), ("a.vhd", 9), ("b.vhd", 10)):
        put(tmp_path, disk, serial)
    (tmp_path / "a.vhd").write_bytes(b"")
    (tmp_path / spool.log_name("a.vhd", 12)).write_bytes(b"not sealed yet")
    (tmp_path / spool.spare_name("a.vhd", 0)).write_bytes(b"spare")
    logs = spool.list_logs(str(tmp_path))
    assert [(log.disk, log.serial) for log in logs] == [("a.vhd", 9), ("a.vhd", 11), ("b.vhd", 2), ("b.vhd", 10)]
    assert logs[0].log_path == str(tmp_path / "a.vhd.0000000009.hrl")
    assert logs[0].entries().tobytes() == ENTRIES.tobytes()
    assert spool.unsealed_logs(str(tmp_path), "a.vhd") == [(12, str(tmp_path / "a.vhd.0000000012.hrl"))]
    assert spool.unsealed_logs(str(tmp_path), "b.vhd") == []


def test_cycles_are_listed_oldest_first_and_say_whether_they_are_whole(tmp_path: Path) -> None:
    old, new = b"z" * 16, b"a" * 16
    put(tmp_path, "a", 1, cycle=8, generation=old, disks=2)
    put(tmp_path, "b", 1, cycle=8, generation=old, disks=2)
    put(tmp_path, "a", 2, cycle=1, generation=new, disks=2)
    put(tmp_path, "b", 2, cycle=1, generation=new, disks=2)
    put(tmp_path, "b", 3, cycle=2, generation=new, disks=2)
    cycles = spool.list_cycles(str(tmp_path))
    assert [(c.generation, c.cycle, c.is_whole) for c in cycles] == [(old, 8, True), (new, 1, True), (new, 2, False)]
    assert [log.disk for log in cycles[0].logs] == ["a", "b"]
    assert cycles[0].log_bytes == 2 * len(SAMPLE.log)
    assert cycles[0].sealed_ns == HEADER.sealed_ns


def test_a_damaged_companion_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    path = tmp_path / spool.companion_name("a", 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    log = spool.list_logs(str(tmp_path))[0]
    with pytest.raises(CorruptError, match=str(path)):
        log.entries()
    for damaged in (b"", whole[:100], b"x" + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=str(path)):
            spool.list_logs(str(tmp_path))


def test_a_companion_that_was_replaced_since_the_listing_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    log = spool.list_logs(str(tmp_path))[0]
    put(tmp_path, "a", 1, cycle=2)
    with pytest.raises(CorruptError, match="changed since"):
        log.entries()


def test_a_companion_of_a_newer_version_is_unsupported(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    path = tmp_path / spool.companion_name("a", 1)
    raw = bytearray(path.read_bytes())
    raw[8] = 2
    raw[240:256] = companion.xxhash.xxh3_128_digest(bytes(raw[:240]))
    path.write_bytes(raw)
    with pytest.raises(UnsupportedError, match="version 2"):
        spool.list_logs(str(tmp_path))


def test_released_logs_become_spares_until_there_are_enough(tmp_path: Path) -> None:
    for serial in (1, 2, 3):
        put(tmp_path, "a", serial, cycle=serial)
    put(tmp_path, "b", 1)
    cycles = spool.list_cycles(str(tmp_path))
    spool.release(cycles)
    assert names(tmp_path) == ["a.spare0.hrl", "a.spare1.hrl", "b.spare0.hrl"]
    spool.release(cycles)
    assert names(tmp_path) == ["a.spare0.hrl", "a.spare1.hrl", "b.spare0.hrl"]


def test_a_release_that_died_between_its_steps_leaves_rubbish_and_never_half_a_log(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    cycles = spool.list_cycles(str(tmp_path))

    def die(label: str, _call: str, _size: int) -> None:
        if label == "spool:recycle":
            raise OSError("dead")

    system.install(die)
    try:
        with pytest.raises(OSError, match="dead"):
            spool.release(cycles)
    finally:
        system.install(None)
    assert spool.list_logs(str(tmp_path)) == []
    assert [serial for serial, _ in spool.unsealed_logs(str(tmp_path), "a")] == [1]
    spool.release(cycles)
    assert names(tmp_path) == ["a.spare0.hrl"]


def test_the_next_release_finishes_one_that_died_and_leaves_younger_logs_alone(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    put(tmp_path, "a", 2, cycle=2)
    put(tmp_path, "a", 3, cycle=3)
    (tmp_path / spool.companion_name("a", 1)).unlink()
    (tmp_path / spool.log_name("a", 4)).write_bytes(b"active")
    (tmp_path / spool.log_name("b", 1)).write_bytes(b"active")
    spool.release(spool.list_cycles(str(tmp_path))[:1])
    assert names(tmp_path) == [
        "a.0000000003.hrc", "a.0000000003.hrl", "a.0000000004.hrl", "a.spare0.hrl", "a.spare1.hrl",
        "b.0000000001.hrl",
    ]  # fmt: skip


def test_a_long_spare_is_cut_and_the_source_of_it_never_counts(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    os.truncate(tmp_path / spool.log_name("a", 1), spool.SPARE_SIZE + 4096)
    spool.release(spool.list_cycles(str(tmp_path)))
    assert os.stat(tmp_path / "a.spare0.hrl").st_size == spool.SPARE_SIZE


def test_a_spare_is_taken_once_and_only_by_its_disk(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    spool.release(spool.list_cycles(str(tmp_path)))
    folder, path = str(tmp_path), str(tmp_path / spool.log_name("a", 2))
    assert not spool.take_spare(folder, "b", path)
    assert spool.take_spare(folder, "a", path)
    assert names(tmp_path) == ["a.0000000002.hrl"]
    assert not spool.take_spare(folder, "a", path)


def test_clearing_lets_damaged_logs_go_as_well(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    put(tmp_path, "a", 2)
    (tmp_path / spool.companion_name("a", 1)).write_bytes(b"rubbish")
    (tmp_path / "a").write_bytes(b"disk")
    spool.clear(str(tmp_path))
    assert names(tmp_path) == ["a"]


def put_compacted(folder: Path, disk: str, serial: int, *, first: int, cycle: int, disks: int = 1) -> None:
    """A compacted log and its companion; the cycle's own log, if there is one, stays."""
    header = replace(
        HEADER, serial=serial, cycle=cycle, disk_count=disks, flags=companion.COMPACTED,
        earlier_cycles=cycle - first, carried_digest=b"c" * 16,
    )  # fmt: skip
    (folder / spool.compacted_name(disk, serial)).write_bytes(SAMPLE.log)
    (folder / spool.companion_name(disk, serial)).write_bytes(header.pack() + ENTRIES.tobytes())


def test_a_companion_says_which_of_two_logs_it_describes(tmp_path: Path) -> None:
    put(tmp_path, "a", 3, cycle=3)
    log = spool.list_logs(str(tmp_path))[0]
    assert (log.log_path, log.header.first_cycle) == (str(tmp_path / "a.0000000003.hrl"), 3)
    put_compacted(tmp_path, "a", 3, first=1, cycle=3)
    log = spool.list_logs(str(tmp_path))[0]
    assert (log.log_path, log.header.first_cycle) == (str(tmp_path / "a.0000000003.c.hrl"), 1)
    assert log.header.digest() == b"c" * 16
    assert spool.unsealed_logs(str(tmp_path), "a") == []


def test_a_cycle_goes_back_as_far_as_all_its_logs_do(tmp_path: Path) -> None:
    put_compacted(tmp_path, "a", 5, first=2, cycle=5, disks=2)
    put(tmp_path, "b", 5, cycle=5, disks=2)
    (cycle,) = spool.list_cycles(str(tmp_path))
    assert (cycle.is_whole, cycle.first_cycle, cycle.cycle) == (True, 5, 5)
    put_compacted(tmp_path, "b", 5, first=3, cycle=5, disks=2)
    assert spool.list_cycles(str(tmp_path))[0].first_cycle == 3


@pytest.mark.parametrize(
    ("let_go", "left"),
    [
        (lambda folder: spool.release(spool.list_cycles(folder)), ["a.spare0.hrl", "a.spare1.hrl"]),
        (spool.clear, []),
    ],
)
def test_no_log_of_a_serial_outlives_its_companion(
    tmp_path: Path, let_go: Callable[[str], None], left: list[str]
) -> None:
    put(tmp_path, "a", 3)
    put_compacted(tmp_path, "a", 3, first=1, cycle=3)
    put_compacted(tmp_path, "a", 1, first=1, cycle=1)
    (tmp_path / spool.companion_name("a", 1)).unlink()
    let_go(str(tmp_path))
    assert names(tmp_path) == left
    let_go(str(tmp_path))
    assert names(tmp_path) == left


def test_a_compaction_under_way_survives_the_release_of_earlier_cycles(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    put(tmp_path, "a", 2, cycle=2)
    (tmp_path / spool.compacted_name("a", 2)).write_bytes(b"being written")
    spool.release(spool.list_cycles(str(tmp_path))[:1])
    assert names(tmp_path) == ["a.0000000002.c.hrl", "a.0000000002.hrc", "a.0000000002.hrl", "a.spare0.hrl"]


def test_a_companion_that_claims_earlier_cycles_and_is_not_compacted_is_refused() -> None:
    for changed in ({"earlier_cycles": 1}, {"earlier_cycles": HEADER.cycle, "flags": companion.COMPACTED}):
        with pytest.raises(CorruptError, match="cycles before cycle"):
            companion.unpack_header(replace(HEADER, **changed).pack())
