"""The file of proofs: what is kept, what a resize leaves of it, and that no flipped bit goes unnoticed."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvfuse import system
from hvfuse.errors import CorruptError, UnsupportedError
from hvfuse.extent import Extent
from hvfuse.formats.digests import BLOCK
from hvfuse.shipper import proofs
from hvfuse.shipper.proofs import MAX_MISMATCHES, Proofs, region_size, subtract

MIB = 1 << 20
ONE, TWO = b"\1" * 16, b"\2" * 16
NOW = 1_800_000_000 * 10**9
DAY = 86400 * 10**9


def following(*sizes: int) -> Proofs:
    kept = Proofs()
    kept.follow((bytes([number + 1]) * 16, f"disk{number}.raw", size) for number, size in enumerate(sizes))
    return kept


@pytest.mark.parametrize(
    ("size", "region"),
    [
        (0, 4 * MIB),
        (1, 4 * MIB),
        (4 * MIB * 8192, 4 * MIB),
        (4 * MIB * 8192 + 1, 8 * MIB),
        (1 << 40, 128 * MIB),
        (64 << 40, 8 << 30),
    ],
)
def test_a_region_is_a_power_of_two_of_which_a_disk_has_at_most_8192(size: int, region: int) -> None:
    assert region_size(size) == region
    assert -(-size // region) <= 8192


def filled() -> Proofs:
    kept = following(10 * MIB, 0, 5 * MIB + 512)
    kept.prove(ONE, 1, now_ns=NOW)
    kept.prove(b"\3" * 16, 1, now_ns=NOW - 40 * DAY)
    kept.differ(ONE, [Extent(BLOCK, BLOCK), Extent(5 * BLOCK, 2 * BLOCK)], now_ns=NOW)
    kept.budget, kept.last_run = 1 << 20, {"seconds": 1.5, "seed": 7}
    return kept


def same(one: Proofs, other: Proofs) -> bool:
    return one.pack() == other.pack()


def test_what_was_kept_is_read_back(tmp_path) -> None:
    kept = filled()
    kept.save(str(tmp_path / "proofs"))
    found = proofs.load(str(tmp_path / "proofs"))
    assert same(found, kept)
    assert found.disks[ONE].dates.tolist() == [0, NOW // 10**9, 0]
    assert [mismatch.extent for mismatch in found.mismatches] == [Extent(BLOCK, BLOCK), Extent(5 * BLOCK, 2 * BLOCK)]
    assert (found.mismatches[0].disk, found.mismatches[0].found_ns) == ("disk0.raw", NOW)
    assert (found.budget, found.last_run) == (1 << 20, {"seconds": 1.5, "seed": 7})


def test_no_file_is_nothing_proved(tmp_path) -> None:
    assert proofs.load(str(tmp_path / "proofs")).verified(NOW) is None


def test_every_flipped_bit_and_every_cut_is_noticed() -> None:
    raw = filled().pack()
    for at in range(len(raw)):
        for bit in range(8):
            broken = bytearray(raw)
            broken[at] ^= 1 << bit
            with pytest.raises((CorruptError, UnsupportedError)):
                proofs.unpack(broken)
    for length in range(len(raw)):
        with pytest.raises(CorruptError):
            proofs.unpack(raw[:length])
    with pytest.raises(CorruptError):
        proofs.unpack(raw + b"\0")


def test_a_damaged_file_is_named_and_the_way_out_told(tmp_path) -> None:
    path = str(tmp_path / "proofs")
    with open(path, "wb") as file:
        file.write(filled().pack()[:-1])
    with pytest.raises(CorruptError, match=path) as caught:
        proofs.load(path)
    assert caught.value.hint is not None
    assert f"rm {path}" in caught.value.hint


def test_a_death_at_any_step_of_keeping_leaves_the_old_or_the_new(tmp_path) -> None:
    path = str(tmp_path / "proofs")
    old, new = following(4 * MIB), filled()
    labels: list[str] = []
    for step in range(5):
        old.save(path)
        labels.clear()

        def die(label: str, call: str, size: int, *, step: int = step) -> None:
            labels.append(label)
            if len(labels) == step + 1:
                raise KeyboardInterrupt

        system.install(die)
        try:
            new.save(path)
        except KeyboardInterrupt:
            pass
        finally:
            system.install(None)
        found = proofs.load(path)
        assert same(found, old) or same(found, new)
        assert same(found, new) == (step >= 3), labels
    assert labels == ["proofs:write", "proofs:sync", "proofs:rename", "proofs:directory"]


def test_growth_keeps_whole_regions_anything_else_begins_anew() -> None:
    kept = following(10 * MIB)
    for region in range(3):
        kept.prove(ONE, region, now_ns=NOW)
    kept.follow([(ONE, "disk0.raw", 18 * MIB)])
    assert (kept.disks[ONE].dates > 0).tolist() == [True, True, False, False, False]
    for region in range(5):
        kept.prove(ONE, region, now_ns=NOW)
    kept.follow([(ONE, "disk0.raw", 17 * MIB)])
    assert kept.disks[ONE].dates.tolist() == [0] * 5
    kept.prove(ONE, 0, now_ns=NOW)
    kept.follow([(ONE, "disk0.raw", 40 << 30)])
    assert kept.disks[ONE].region == 8 * MIB
    assert not kept.disks[ONE].dates.any()


def test_another_disk_id_begins_anew_and_a_disk_that_is_gone_is_forgotten() -> None:
    kept = filled()
    kept.follow([(TWO, "disk0.raw", 10 * MIB)])
    assert list(kept.disks) == [TWO]
    assert kept.mismatches == []
    assert not kept.disks[TWO].dates.any()


def test_what_is_found_equal_goes_from_the_list_and_only_that() -> None:
    kept = following(10 * MIB, 10 * MIB)
    kept.differ(ONE, [Extent(0, 4 * BLOCK)], now_ns=NOW)
    kept.differ(TWO, [Extent(0, 4 * BLOCK)], now_ns=NOW)
    kept.equal(ONE, [Extent(BLOCK, BLOCK), Extent(9 * BLOCK, BLOCK)])
    assert kept.mismatched() == {ONE: [Extent(0, BLOCK), Extent(2 * BLOCK, 2 * BLOCK)], TWO: [Extent(0, 4 * BLOCK)]}
    kept.equal(ONE, [Extent(0, 20 * BLOCK)])
    assert kept.mismatched() == {TWO: [Extent(0, 4 * BLOCK)]}


def test_what_differs_again_keeps_the_instant_of_the_first_time_and_its_region_is_unproved() -> None:
    kept = following(10 * MIB)
    kept.prove(ONE, 0, now_ns=NOW)
    kept.prove(ONE, 1, now_ns=NOW)
    kept.differ(ONE, [Extent(BLOCK, BLOCK)], now_ns=NOW)
    told = kept.differ(ONE, [Extent(0, 3 * BLOCK)], now_ns=NOW + DAY)
    assert [mismatch.extent for mismatch in told] == [Extent(0, 3 * BLOCK)]
    assert [(m.extent, m.found_ns) for m in kept.mismatches] == [
        (Extent(0, BLOCK), NOW + DAY),
        (Extent(BLOCK, BLOCK), NOW),
        (Extent(2 * BLOCK, BLOCK), NOW + DAY),
    ]
    assert kept.disks[ONE].dates.tolist() == [0, NOW // 10**9, 0]


def test_very_many_mismatches_are_told_by_region() -> None:
    size = 4 * MIB * 40
    kept = following(size)
    every_other = [Extent(at, BLOCK) for at in range(0, size, 2 * BLOCK)]
    assert len(every_other) > MAX_MISMATCHES
    assert len(kept.differ(ONE, every_other, now_ns=NOW)) == len(every_other)
    assert [m.extent for m in kept.mismatches] == [Extent(at, 4 * MIB) for at in range(0, size, 4 * MIB)]


def test_the_part_that_is_proved_counts_bytes_and_fades_after_30_days() -> None:
    kept = following(8 * MIB + 512, 4 * MIB)
    kept.prove(ONE, 0, now_ns=NOW - 29 * DAY)
    kept.prove(ONE, 2, now_ns=NOW)
    kept.prove(TWO, 0, now_ns=NOW - 31 * DAY)
    told = kept.verified(NOW)
    assert told is not None
    assert told.proved_30d == (4 * MIB + 512) / (12 * MIB + 512)
    assert told.oldest_ns is None
    kept.prove(ONE, 1, now_ns=NOW)
    told = kept.verified(NOW)
    assert told is not None
    assert told.oldest_ns == NOW - 31 * DAY
    assert told.proved_30d == (8 * MIB + 512) / (12 * MIB + 512)
    later = kept.verified(NOW + 60 * DAY)
    assert later is not None
    assert later.proved_30d == 0


ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=8)


def apart(found: list[tuple[int, int]]) -> list[Extent]:
    extents, at = [], 0
    for offset, length in sorted(found):
        if offset >= at:
            extents.append(Extent(offset, length))
            at = offset + length
    return extents


@given(ranges, ranges)
def test_subtracting_agrees_with_sets_of_bytes(one, other) -> None:
    ours, theirs = apart(one), apart(other)
    found = subtract(ours, theirs)
    assert {byte for e in found for byte in range(e.offset, e.end)} == {
        byte for e in ours for byte in range(e.offset, e.end)
    } - {byte for e in theirs for byte in range(e.offset, e.end)}
    assert all(extent.length > 0 for extent in found)
    assert all(low.end <= high.offset for low, high in itertools.pairwise(found))


def test_the_file_of_the_largest_disk_is_small() -> None:
    kept = following(64 << 40)
    kept.disks[ONE].dates[:] = np.arange(8192)
    assert len(kept.pack()) < 34_000


def test_the_file_is_for_nobody_else(tmp_path) -> None:
    filled().save(str(tmp_path / "proofs"))
    assert os.stat(tmp_path / "proofs").st_mode & 0o777 == 0o600


def test_what_is_doubted_counts_as_copied_in_another_generation_until_it_differs_again(tmp_path) -> None:
    kept = following(10 * MIB)
    kept.differ(ONE, [Extent(0, 3 * BLOCK)], now_ns=NOW)
    assert kept.mismatched("aa") == {ONE: [Extent(0, 3 * BLOCK)]}
    kept.doubt("aa")
    kept.save(str(tmp_path / "proofs"))
    kept = proofs.load(str(tmp_path / "proofs"))
    assert kept.mismatched("aa") == kept.mismatched() == {ONE: [Extent(0, 3 * BLOCK)]}
    assert kept.mismatched("bb") == {}
    kept.doubt("bb")
    assert kept.mismatched("bb") == {}, "another doubt is not about what was copied"
    kept.differ(ONE, [Extent(BLOCK, BLOCK)], now_ns=NOW + DAY)
    assert kept.mismatched("bb") == {ONE: [Extent(BLOCK, BLOCK)]}
    assert kept.mismatched() == {ONE: [Extent(0, BLOCK), Extent(BLOCK, BLOCK), Extent(2 * BLOCK, BLOCK)]}
    assert {each.found_ns for each in kept.mismatches} == {NOW}
    kept.equal(ONE, [Extent(0, 3 * BLOCK)])
    assert kept.mismatches == []
