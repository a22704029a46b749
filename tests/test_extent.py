"""Byte ranges against models that are too simple to be wrong."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hvfuse.extent import Extent, is_zero, newest_wins, round_down, round_up

Ranges = list[tuple[int, int]]


def resolved(ranges: Ranges) -> list[tuple[int, int, int]]:
    starts = np.array([start for start, _ in ranges], np.int64)
    ends = np.array([end for _, end in ranges], np.int64)
    found = newest_wins(starts, ends)
    assert len(found) == len(found.starts) == len(found.ends) == len(found.owners)
    return list(zip(found.starts.tolist(), found.ends.tolist(), found.owners.tolist(), strict=True))


def painted(ranges: Ranges) -> dict[int, int]:
    """The owner of every byte, painted one by one."""
    owners: dict[int, int] = {}
    for number, (start, end) in enumerate(ranges):
        for at in range(start, end):
            owners[at] = number
    return owners


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(-3, 40)).map(lambda r: (r[0], r[0] + r[1])), max_size=60)


@given(RANGES)
@example([])
@example([(5, 5)])
@example([(0, 10), (3, 4), (0, 10)])
@example([(0, 8), (2, 6), (3, 5), (4, 5)])
def test_each_byte_belongs_to_the_newest_range_that_covers_it(ranges: Ranges) -> None:
    pieces = resolved(ranges)
    owners = {at: owner for start, end, owner in pieces for at in range(start, end)}
    assert owners == painted(ranges)
    assert all(start < end for start, end, _ in pieces)
    assert all(before[1] <= after[0] for before, after in pairwise(pieces))
    joined = [before for before, after in pairwise(pieces) if before[1] == after[0] and before[2] == after[2]]
    assert not joined, "neighbouring pieces of one owner are one piece"


@given(RANGES, st.sampled_from([1, 512, 1 << 20, 1 << 55]))
def test_scale_and_distance_do_not_matter(ranges: Ranges, unit: int) -> None:
    far = (1 << 62) - 103 * unit if unit < 1 << 55 else 0
    scaled = [(start * unit + far, end * unit + far) for start, end in ranges]
    expected = [(s * unit + far, e * unit + far, owner) for s, e, owner in resolved(ranges)]
    assert resolved(scaled) == expected


def test_a_hundred_thousand_ranges_agree_with_a_byte_map() -> None:
    rng = np.random.default_rng(3)
    starts = rng.integers(0, 1 << 20, 100_000)
    ends = starts + rng.integers(1, 2000, 100_000)
    owners = np.full(1 << 21, -1, np.int64)
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        owners[start:end] = number
    found = newest_wins(starts, ends)
    again = np.full(1 << 21, -1, np.int64)
    for start, end, owner in zip(found.starts, found.ends, found.owners, strict=True):
        again[start:end] = owner
    assert np.array_equal(owners, again)


@given(st.binary(max_size=300))
def test_is_zero_is_exact(data: bytes) -> None:
    assert is_zero(data) == (not any(data))
    assert is_zero(memoryview(bytearray(data))) == (not any(data))


@pytest.mark.parametrize("length", [1, 255, 256, 4095, 4096, 65536, 1 << 20])
def test_a_single_bit_anywhere_is_not_zero(length: int) -> None:
    assert is_zero(bytes(length))
    for at in {0, 1, length // 2, length - 1} & set(range(length)):
        for value in (1, 0x80):
            data = bytearray(length)
            data[at] = value
            assert not is_zero(data)


def test_a_sum_of_bytes_does_not_wrap_to_zero() -> None:
    assert not is_zero(b"\x80" * (1 << 25))  # adds up to 2**32


@given(st.integers(0, 1 << 62), st.integers(1, 1 << 40))
def test_rounding_goes_to_the_nearest_multiple_on_its_side(value: int, grain: int) -> None:
    low, high = round_down(value, grain), round_up(value, grain)
    assert low % grain == high % grain == 0
    assert low <= value <= high
    assert value - low < grain
    assert high - value < grain


def test_an_extent_ends_behind_its_last_byte() -> None:
    assert Extent(10, 5).end == 15
