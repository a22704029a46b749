"""The tracking state of one disk on disk: what must be known before anything else is believed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import uuid
from dataclasses import replace
from typing import Any

from hvfuse import spool, system
from hvfuse.errors import BusyError, HvfuseError
from hvfuse.formats import tracking
from hvfuse.formats.companion import AddressSpace
from hvfuse.formats.tracking import MAP_OFFSET, MAP_SIZE, RECORD_SIZE, STATE_SIZE, Scope, TrackingRecord
from hvfuse.tracker.regions import RegionMap

_NO_HISTORY: dict[str, Any] = {
    "generation": tracking.NOT_TRACKED,
    "base_generation": tracking.NOT_TRACKED,
    "base_cycle": 0,
    "scope": Scope.NONE,
    "resyncing": False,
    "resync_reason": None,
    "disks_changed": False,
    "detached_cleanly": False,
}


class TrackingState:
    """The `.hvt` file of a disk, locked against every other tracker while it is open.

    Every change is durable when `update` returns. Raises BusyError when another process holds the
    disk, CorruptError or UnsupportedError for a file that cannot be read.
    """

    def __init__(self, folder: str, disk: str, *, address_space: AddressSpace, region_size: int) -> None:
        self.path = os.path.join(folder, spool.state_name(disk))
        self._changing = threading.Lock()
        is_new = not os.path.exists(self.path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._lock()
            if is_new or not self._was_created():
                self._create(folder, address_space, region_size)
            else:
                self.record = self._upgraded(self._read())
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{self.path}: the disk is attached by another process",
                hint="hvfuse status shows which VMs are mounted",
            ) from None

    def _was_created(self) -> bool:
        """Whether the file ever held a state. The second copy of the record is the first to be written; while the other
        one is all zeroes, it may be torn, and nothing was tracked yet."""
        first, second = (system.pread(self._fd, RECORD_SIZE, at) for at in (0, RECORD_SIZE))
        if os.fstat(self._fd).st_size < STATE_SIZE:
            return False
        return any(first) or tracking.is_record(second)

    def _create(self, folder: str, address_space: AddressSpace, region_size: int) -> None:
        system.allocate("state:allocate", self._fd, 0, STATE_SIZE)
        self.record = TrackingRecord(disk_id=uuid.uuid4().bytes, address_space=address_space, region_size=region_size)
        self.update()
        system.fsync_directory("state:directory", folder)

    def _read(self) -> TrackingRecord:
        try:
            return tracking.unpack_state(system.pread(self._fd, STATE_SIZE, 0))
        except HvfuseError as error:
            raise type(error)(
                f"{self.path}: {error}",
                hint="remove the file to track the disk anew; that begins with a full copy",
            ) from None

    def _upgraded(self, record: TrackingRecord) -> TrackingRecord:
        """The state of an earlier version as it is meant now. The map is durable before the record, which the next
        `update` writes: a death in between has it done again."""
        if record.version == tracking.VERSION:
            return record
        marks = system.pread(self._fd, MAP_SIZE, MAP_OFFSET)
        meant = tracking.upgraded_marks(record, marks)
        if meant != marks:
            self._store_map(meant)
            self._sync_map()
        return tracking.upgraded(record)

    def update(self, **changes: Any) -> None:
        """Change fields of the record, durably. Raises OSError."""
        # The guest's thread may degrade the disk while the control thread notes a sealed log: neither
        # change may be lost to the other.
        with self._changing:
            record = replace(self.record, **changes, write_number=self.record.write_number + 1)
            system.pwrite("state:write", self._fd, record.pack(), record.write_number % 2 * RECORD_SIZE)
            system.fdatasync("state:sync", self._fd)
            self.record = record

    def forget(self) -> None:
        """Take the disk out of the VM's history, durably: what is written to it from now on is in no log and no mark.
        Raises OSError."""
        self.update(**_NO_HISTORY)

    def give_up(self) -> None:
        """The record cannot be written: without a file the disk is a new one, here as at the next attach."""
        with contextlib.suppress(OSError):
            system.unlink("state:give-up", self.path, missing_ok=True)
        self.record = replace(self.record, generation=tracking.NOT_TRACKED, resyncing=False)

    def regions(self) -> RegionMap:
        """The disk's region map, as it is on disk."""
        marks = system.pread(self._fd, MAP_SIZE, MAP_OFFSET)
        return RegionMap(marks, size=self.record.region_size, store=self._store_map, sync=self._sync_map)

    def _store_map(self, marks: bytes) -> None:
        system.pwrite("regions:write", self._fd, marks, MAP_OFFSET)

    def _sync_map(self) -> None:
        system.fdatasync("regions:sync", self._fd)

    def close(self) -> None:
        """Let go of the disk."""
        os.close(self._fd)
