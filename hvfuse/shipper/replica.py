"""What the shipper asks of a target. The local store, a TLS client or an object store fits it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hvfuse.extent import Extent
from hvfuse.formats.digests import DigestKey, Digests
from hvfuse.manifest import CycleManifest, RecoveryPoint
from hvfuse.position import Position


class Inspection(Protocol):
    """A replica as the newest committed cycle left it. It does not change until another one is committed.

    `position`: of that cycle. `disk_ids`: of the disks that it has; only these may be asked for. The methods are
    those of `Replica`, without a COPY; `occupied`, `summaries` and `digests` are for any thread.
    """

    position: Position
    disk_ids: frozenset[bytes]

    def extent(self, disk_id: bytes) -> int: ...

    def occupied(self, disk_id: bytes, low: int, high: int) -> Sequence[Extent]: ...

    def summaries(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests: ...

    def digests(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests: ...

    def close(self) -> None:
        """Let it go; to be called before the next cycle is begun."""


class Replica(Protocol):
    """The replica of one VM at a target.

    Every call is idempotent by (generation, cycle, frame number): a shipper that died anywhere says the
    same again and nothing changes twice. Errors are `HvfuseError`s whose `recoverable` tells whether
    the shipper should come back later.
    """

    def keeps_frames(self) -> bool:
        """Whether what is put for the open cycle is kept, or travels, as it comes. If not, it is unpacked at once, and
        compressing it is in vain."""

    def position(self) -> Position | None:
        """Where the replica stands; None before its first copy was committed."""

    def begin(self, manifest: CycleManifest) -> frozenset[int]:
        """Open a cycle, or take an interrupted one up again.

        Returns the numbers of the frames that the target already holds for it. Anything staged for
        another cycle is dropped. Raises PositionMismatchError (with the target's position) when
        `manifest.previous` is not where the replica stands; a COPY may begin anywhere and leaves
        earlier recovery points usable. One with `previous` lies over what the replica holds there, and may
        bring along new disks; one without is whole. Only `previous` tells what a cycle continues: cycle numbers
        skip what travels as one, as the logs that piled up during a copy do.
        """

    def extent(self, disk_id: bytes) -> int:
        """Bytes from the start of a disk, beyond which the replica holds zeroes alone; 0 for a disk that it
        does not know. As with `digests`, a COPY with `previous` is open.

        Mostly the disk's size; more if what was cut off a disk might be seen again once it grew.
        """

    def occupied(self, disk_id: bytes, low: int, high: int) -> Sequence[Extent]:
        """The ranges within [low, high) that may hold anything but zeroes, ascending and apart, of a disk as it
        is at the `previous` of the open COPY: frames put for it are not seen. Reads no data. Asked for at
        most a group (`hvfuse.shipper.slots`) at once.
        """

    def summaries(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """The summary (`hvfuse.formats.digests`) of the blocks of each of the aligned extents, ascending, each
        within a span (`hvfuse.reconcile.plan`): shape (len(extents), 2). Of the same state as `occupied`.

        This and `digests` may be called in other threads than the one that puts, at the same time. Asked for
        at most 128 MiB of the disk at once.
        """

    def digests(self, disk_id: bytes, extents: Sequence[Extent], key: DigestKey) -> Digests:
        """The digests of the blocks of aligned extents, ascending; otherwise as `summaries`."""

    def define(self, definition: bytes) -> None:
        """Have the points that are committed from now on say that the VM was defined so: what its home's configuration
        says of it, for whoever fails it over. Durable; cheap if it is the one given last. The replica was copied once.
        """

    def put(self, frame: bytes) -> None:
        """Stage one encoded frame of the open cycle. Verified before it is kept (CorruptError)."""

    def commit(self, manifest: CycleManifest, frame_count: int) -> RecoveryPoint | None:
        """Make the cycle of all disks durable, wholly or not at all. Returns the recovery point; None
        for a COPY.

        `frame_count`: frames that were put, in this run and before; a DELTA's are numbered from 0
        without gaps, a COPY's by their place, with gaps.
        Committing the cycle at which the replica already stands returns the same point.
        `manifest` is the same as at `begin`, except that a COPY may give later sizes.
        """

    def abandon(self) -> None:
        """Drop what is staged of an unfinished cycle. The replica stands where it stood. Idempotent."""

    def inspect(self, *, from_medium: bool) -> Inspection | None:
        """Open what the replica holds, to compare it; None without a position. Staged frames are not seen.

        `from_medium`: have it read from where it lies durably, as far as that can be had.
        """

    def points(self) -> Sequence[RecoveryPoint]:
        """The recovery points, oldest first."""
