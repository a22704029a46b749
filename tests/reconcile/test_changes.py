"""Zeroes among what differs are found exactly, wherever they lie."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvfuse.errors import CorruptError
from hvfuse.extent import ZERO_BLOCK, Extent
from hvfuse.formats.digests import BLOCK
from hvfuse.reconcile.changes import Change, changes, refuse_unasked

PIECES = st.sampled_from([bytes(ZERO_BLOCK), b"\0" * (ZERO_BLOCK - 1) + b"x", b"x" + bytes(ZERO_BLOCK - 1),
                          bytes(8) + b"x" * (ZERO_BLOCK - 8)])  # fmt: skip


@given(st.lists(PIECES, min_size=1, max_size=BLOCK // ZERO_BLOCK), st.integers(0, ZERO_BLOCK - 1))
def test_changes_give_the_bytes_back_and_no_zero_piece_is_data(pieces, cut):
    plain = b"".join(pieces).ljust(BLOCK, b"\0")
    end = 3 * BLOCK + len(plain) - cut
    found = changes([Extent(3 * BLOCK, BLOCK)], [memoryview(plain)], end=end)
    rebuilt = b"".join(bytes(change.length) if change.data is None else change.data for change in found)
    assert rebuilt == plain[: len(plain) - cut]
    assert found[0].offset == 3 * BLOCK and found[-1].end == end
    for one, other in itertools.pairwise(found):
        assert one.end == other.offset
        assert (one.data is None) != (other.data is None)
    for change in found:
        for at in range(0, change.length, ZERO_BLOCK):
            if change.data is not None:
                assert any(change.data[at : at + ZERO_BLOCK])


def test_a_block_beyond_the_end_gives_nothing():
    assert changes([Extent(BLOCK, BLOCK)], [memoryview(bytes(BLOCK))], end=BLOCK) == []


@pytest.mark.parametrize("wrong", ["less", "more", "elsewhere", "nothing"])
def test_only_what_was_asked_for_is_taken(wrong):
    asked = [Extent(0, BLOCK), Extent(2 * BLOCK, 2 * BLOCK)]
    data = memoryview(random.Random(1).randbytes(2 * BLOCK))
    end = 3 * BLOCK + 100
    right = [Change(0, 100, None), Change(100, BLOCK - 100, data[: BLOCK - 100]), Change(2 * BLOCK, BLOCK + 100, None)]
    refuse_unasked(right, asked, end=end)
    found = {
        "less": right[:2],
        "more": [*right[:2], Change(BLOCK, BLOCK + 100, None), right[2]],
        "elsewhere": [*right[:2], Change(BLOCK, BLOCK + 100, None)],
        "nothing": [],
    }[wrong]
    with pytest.raises(CorruptError):
        refuse_unasked(found, asked, end=end)
