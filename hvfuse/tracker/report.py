"""What a tracker tells of its disks, for the control socket: JSON types, offsets and sizes in bytes."""

from __future__ import annotations

from typing import Any

from hvfuse.tracker import resync
from hvfuse.tracker.disk import TrackedDisk
from hvfuse.tracker.resync import Comparison, Tracked
from hvfuse.tracker.state import TrackingState


def regions(disks: list[Tracked]) -> dict[str, Any]:
    """What the copy under way compares with the replica, or, if there is none, what the required one has to.
    Caller holds the gate."""
    found = resync.comparison(disks)
    return {
        "scope": resync.status(disks)["resync_scope"],
        "disks": [
            {
                "disk_id": state.record.disk_id.hex(),
                "extents": [[extent.offset, extent.length] for extent in found.extents(disk)],
            }
            for disk, state in disks
        ],
    }


def tracked_status(disks: list[Tracked]) -> list[dict[str, Any]]:
    """The status of each tracked disk."""
    found = resync.comparison(disks)
    return [_disk_status(disk, state, found) for disk, state in disks]


def _disk_status(disk: TrackedDisk, state: TrackingState, found: Comparison) -> dict[str, Any]:
    log = disk.log  # which the guest's thread may give up at any moment
    return {
        "name": disk.name,
        "disk_id": state.record.disk_id.hex(),
        "format": disk.format.value,
        "size": disk.size(),
        "log_bytes": log.size if log is not None else 0,
        "log_entries": log.entry_count if log is not None else 0,
        "open_handles": disk.open_handles,
        "resync_bytes": sum(extent.length for extent in found.extents(disk)),
    }
