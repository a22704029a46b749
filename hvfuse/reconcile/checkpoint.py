"""How far a run has come, so that the next goes on there. Pure; `hvfuse.reconcile.ends` keeps it in a file.

    Line 1, JSON in ASCII
        version   1
        source    identity (`hvfuse.reconcile.ends.Identity`) when the run began
        replica   likewise, after its size was set
        offset    bytes; up to here the replica equals the source, durably
    Line 2
        xxh3-64 of line 1 with its newline, 16 hexadecimal digits, and a newline
    Line 3
        the end's own (`hvfuse.reconcile.ends.ReplicaEnd`)

Written beside, synced and renamed into place, only after the replica was synced. So it is whole or not there, and
what it says is true unless one of the two was written to since. That is recognised:

    source     its mtime, size, inode and device are as they were, and its mtime was old enough then for any
               later write to show
    replica    inode, device and size are as they were, and its mtime is exactly the mark that the run gave it
               (`hvfuse.reconcile.ends`)
    both       their machine has not been booted since: a power failure may lose an mtime and not the write that
               set it

A block device has no mtime: a state that concerns one is believed only if the user says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Self

import xxhash

from hvfuse.reconcile import plan
from hvfuse.reconcile.ends import Identity, Kind

VERSION = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The fields of line 1."""

    source: Identity
    replica: Identity
    offset: int

    def pack(self) -> bytes:
        """The file."""
        fields = {
            "version": VERSION,
            "source": self.source.as_json(),
            "replica": self.replica.as_json(),
            "offset": self.offset,
        }
        line = json.dumps(fields).encode() + b"\n"
        return line + xxhash.xxh3_64_hexdigest(line).encode() + b"\n"

    @classmethod
    def unpack(cls, data: bytes) -> Self | None:
        """The fields; None if that is no whole state of this version."""
        line, newline, digest = data.partition(b"\n")
        if digest != xxhash.xxh3_64_hexdigest(line + newline).encode() + b"\n":
            return None
        try:
            fields = json.loads(line)
            if fields["version"] != VERSION or type(fields["offset"]) is not int or fields["offset"] % plan.SPAN:
                return None
            source, replica = Identity.from_json(fields["source"]), Identity.from_json(fields["replica"])
        except (ValueError, TypeError, KeyError):
            return None
        return cls(source, replica, fields["offset"])


def start_of(state: tuple[bytes, bool] | None, *, source: Identity, replica: Identity, believed: bool) -> int:
    """Where a run may begin: 0, or what the state says if it is to be trusted.

    `state`: lines 1 and 2, and whether the replica has not been written to since. `believed`: the user says that
    block devices have not, either.
    """
    found = Checkpoint.unpack(state[0]) if state is not None else None
    if state is None or found is None or not 0 < found.offset <= source.size:
        return 0
    if Kind.DEVICE in (source.kind, replica.kind) and not believed:
        return 0
    if source.kind is Kind.FILE and not found.source.settled:
        return 0
    if not _is_unaltered(found.source, source, "settled"):
        return 0
    if not _is_unaltered(found.replica, replica, "settled", "mtime_ns"):
        return 0
    return found.offset if state[1] or replica.kind is Kind.DEVICE else 0


def _is_unaltered(then: Identity, now: Identity, *apart_from: str) -> bool:
    """Whether the fields are the same, but for those named; of a device, of which the user tells, the boot, too."""
    before, after = then.as_json(), now.as_json()
    if now.kind is Kind.DEVICE:
        apart_from = (*apart_from, "boot")
    return all(before[name] == after[name] for name in before if name not in apart_from)
