"""Digests by which two copies of a disk are compared. Pure.

A disk is cut into blocks of `BLOCK` bytes, block k beginning at k * BLOCK. A block's digest is the xxh3-128
of its bytes with a seed that the two sides agree on anew for every run: two blocks that happen to collide
under one seed do not under the next. Who may choose what a guest writes could still make blocks collide under
xxh3, which is no cryptographic hash; where the guest is not trusted, the digest is a keyed BLAKE3, cut to
128 bits. Beyond the end of a disk, and in a hole, there are zeroes; hence every block has a digest, and "no
block" and "a block of zeroes" have the same.

A *summary* is the digest of the digests of consecutive blocks: where two summaries are the same, so are all
their blocks, and their digests need not travel.

    Digest, 16 bytes, as two unsigned 64-bit little-endian integers
    offset size field
         0    8 low half of the xxh3-128; bytes 0 to 7 of the BLAKE3
         8    8 high half; bytes 8 to 15
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import xxhash
from numpy.typing import NDArray

from hvfuse.extent import Buffer, Extent, round_down, round_up

BLOCK = 64 << 10
DIGEST_SIZE = 16

Digests = NDArray[np.uint64]
"""Shape (n, 2): a row is one block's digest, low half first. Blocks follow one another as their extents do."""

_ZERO = bytes(BLOCK)


class Algorithm(StrEnum):
    """How blocks are digested."""

    XXH3 = "xxh3"
    BLAKE3 = "blake3"


@dataclass(frozen=True, slots=True)
class DigestKey:
    """What two sides agree on for one run. `seed`: 64 bits, drawn anew for each."""

    algorithm: Algorithm
    seed: int

    @classmethod
    def fresh(cls, algorithm: Algorithm = Algorithm.XXH3) -> DigestKey:
        """A key that nobody had before."""
        return cls(algorithm, int.from_bytes(os.urandom(8), "little"))

    def digester(self) -> Callable[[Buffer], bytes]:
        """What makes `DIGEST_SIZE` bytes of any bytes. For any thread."""
        if self.algorithm is Algorithm.BLAKE3:
            from blake3 import blake3  # for those alone who ask for it

            key = self.seed.to_bytes(32, "little")
            return lambda data: blake3(data, key=key).digest(length=DIGEST_SIZE)
        seed = self.seed
        return lambda data: xxhash.xxh3_128_intdigest(data, seed).to_bytes(DIGEST_SIZE, "little")


def zero_digests(count: int, key: DigestKey) -> Digests:
    """The digests of `count` blocks of zeroes; shape (count, 2), writable."""
    return np.tile(_zero_digest(key), (count, 1))


@functools.lru_cache(maxsize=8)
def _zero_digest(key: DigestKey) -> Digests:
    return digest_blocks(_ZERO, key)


def digest_blocks(data: Buffer, key: DigestKey) -> Digests:
    """The digests of the blocks in `data`, which begins with one. The last may be short: zeroes follow."""
    view = memoryview(data)
    whole = round_down(len(view), BLOCK)
    digest = key.digester()
    found = [digest(view[at : at + BLOCK]) for at in range(0, whole, BLOCK)]
    if whole < len(view):
        found.append(digest(bytes(view[whole:]).ljust(BLOCK, b"\0")))
    return np.frombuffer(b"".join(found), "<u8").astype(np.uint64).reshape(-1, 2)


def summary(digests: Digests, key: DigestKey) -> Digests:
    """The digest of the digests of consecutive blocks; shape (2,)."""
    return np.frombuffer(key.digester()(digests.astype("<u8").tobytes()), "<u8").astype(np.uint64)


def differ(ours: Digests, theirs: Digests) -> NDArray[np.bool_]:
    """Which blocks are not the same; shape (n,)."""
    found: NDArray[np.bool_] = (ours != theirs).any(axis=1)
    return found


def touched_blocks(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The runs [start, end) of whole blocks that ranges (offset, end), ascending, touch; ascending and apart."""
    low = high = 0
    for begin, finish in ranges:
        if round_down(begin, BLOCK) > high:
            if high > low:
                yield low, high
            low = round_down(begin, BLOCK)
        high = round_up(finish, BLOCK)
    if high > low:
        yield low, high


def aligned(extents: Iterable[Extent], *, end: int) -> list[Extent]:
    """The whole blocks before `end` that extents, ascending, touch: aligned, ascending and apart."""
    cut = ((extent.offset, min(extent.end, end)) for extent in extents if extent.offset < end and extent.length)
    return [Extent(low, high - low) for low, high in touched_blocks(cut)]


def block_count(extents: Sequence[Extent]) -> int:
    """Blocks in aligned extents."""
    return sum(extent.length for extent in extents) // BLOCK


def sparse_digests(
    extents: Sequence[Extent],
    key: DigestKey,
    *,
    data: Callable[[int, int], Iterable[tuple[int, int]]],
    digest: Callable[[int, int], Digests],
) -> Digests:
    """The digests of the blocks of aligned extents of a disk that has holes, which are not read.

    `data(start, end)`: the ranges (offset, end) therein that may hold anything but zeroes. `digest(start,
    end)`: the digests of those whole blocks.
    """
    found = zero_digests(block_count(extents), key)
    first = 0
    for extent in extents:
        for low, high in touched_blocks(data(extent.offset, extent.end)):
            at = first + (low - extent.offset) // BLOCK
            found[at : at + (high - low) // BLOCK] = digest(low, high)
        first += extent.length // BLOCK
    return found
