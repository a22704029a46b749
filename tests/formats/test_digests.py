import random

import blake3
import numpy as np
import pytest
import xxhash

from hvfuse.extent import Extent
from hvfuse.formats.digests import (
    BLOCK,
    Algorithm,
    DigestKey,
    aligned,
    block_count,
    differ,
    digest_blocks,
    sparse_digests,
    summary,
    touched_blocks,
    zero_digests,
)

KEYS = [DigestKey(Algorithm.XXH3, seed) for seed in range(10)]


def test_a_digest_is_the_seeded_xxh3_128_of_the_block():
    data = random.Random(1).randbytes(BLOCK)
    row = digest_blocks(data, KEYS[7])[0]
    assert int(row[0]) + (int(row[1]) << 64) == xxhash.xxh3_128_intdigest(data, 7)
    assert differ(digest_blocks(data, KEYS[7]), digest_blocks(data, KEYS[8])).all()


@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_a_short_last_block_counts_as_if_zeroes_followed(length):
    data = random.Random(2).randbytes(length)
    padded = data.ljust(-(-length // BLOCK) * BLOCK, b"\0")
    assert np.array_equal(digest_blocks(data, KEYS[3]), digest_blocks(padded, KEYS[3]))
    assert len(digest_blocks(data, KEYS[3])) == -(-length // BLOCK)


def test_no_block_and_a_block_of_zeroes_have_the_same_digest():
    zeroes = digest_blocks(bytes(2 * BLOCK), KEYS[5])
    assert np.array_equal(zeroes, zero_digests(2, KEYS[5]))
    nothing = sparse_digests([Extent(0, 2 * BLOCK)], KEYS[5], data=lambda low, high: [], digest=digest_blocks)
    assert np.array_equal(zeroes, nothing)


def test_one_changed_bit_changes_the_digest_of_its_block_alone():
    data = bytearray(4 * BLOCK)
    before = digest_blocks(data, KEYS[1])
    data[2 * BLOCK + 77] = 1
    assert differ(before, digest_blocks(data, KEYS[1])).tolist() == [False, False, True, False]


def test_ranges_touch_whole_blocks_joined_where_they_meet():
    ranges = [
        (0, 1),
        (BLOCK - 1, BLOCK),
        (BLOCK, BLOCK + 1),
        (5 * BLOCK + 5, 6 * BLOCK + 1),
        (6 * BLOCK + 9, 7 * BLOCK),
    ]
    assert list(touched_blocks(ranges)) == [(0, 2 * BLOCK), (5 * BLOCK, 7 * BLOCK)]
    assert list(touched_blocks([])) == []
    assert list(touched_blocks([(3 * BLOCK, 4 * BLOCK)])) == [(3 * BLOCK, 4 * BLOCK)]


def test_extents_are_cut_at_the_end_before_they_are_widened_to_blocks():
    extents = [Extent(10, 5), Extent(3 * BLOCK, BLOCK), Extent(4 * BLOCK, 9 * BLOCK), Extent(20 * BLOCK, 1)]
    assert aligned(extents, end=5 * BLOCK + 1) == [Extent(0, BLOCK), Extent(3 * BLOCK, 3 * BLOCK)]


def test_a_sparse_disk_has_the_digests_of_its_bytes_and_its_holes_are_not_read():
    dice = random.Random(4)
    disk = bytearray(40 * BLOCK)
    ranges = []
    for at in range(0, 40, 5):
        low = at * BLOCK + dice.randrange(BLOCK)
        high = low + dice.randrange(1, 3 * BLOCK)
        disk[low:high] = dice.randbytes(high - low)
        ranges.append((low, high))
    read = []

    def digest(low, high):
        read.append((low, high))
        return digest_blocks(disk[low:high], KEYS[9])

    def data(start, end):
        return [(max(low, start), min(high, end)) for low, high in ranges if low < end and high > start]

    extents = [Extent(BLOCK, 9 * BLOCK), Extent(12 * BLOCK, 28 * BLOCK)]
    expected = np.concatenate([digest_blocks(disk[e.offset : e.end], KEYS[9]) for e in extents])
    assert np.array_equal(sparse_digests(extents, KEYS[9], data=data, digest=digest), expected)
    assert block_count(extents) == len(expected)
    assert sum(high - low for low, high in read) < len(expected) * BLOCK


def test_a_blake3_digest_is_the_keyed_hash_of_the_block_cut_to_128_bits():
    data = random.Random(1).randbytes(BLOCK)
    key = DigestKey(Algorithm.BLAKE3, 7)
    expected = blake3.blake3(data, key=(7).to_bytes(32, "little")).digest()[:16]
    assert digest_blocks(data, key).tobytes() == expected
    assert differ(digest_blocks(data, key), digest_blocks(data, DigestKey(Algorithm.BLAKE3, 8))).all()


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_summaries_are_the_same_where_all_blocks_are_and_only_there(algorithm):
    key = DigestKey.fresh(algorithm)
    data = bytearray(random.Random(3).randbytes(64 * BLOCK))
    before = summary(digest_blocks(data, key), key)
    assert np.array_equal(before, summary(digest_blocks(bytes(data), key), key))
    data[63 * BLOCK + 9] ^= 1
    assert not np.array_equal(before, summary(digest_blocks(data, key), key))


def test_two_runs_do_not_digest_alike():
    assert DigestKey.fresh() != DigestKey.fresh()
