"""One tracked disk: the write path, and its half of a rotation.

The order of a write, under the VM's gate: a durable mark of its region, unless there is one; the payload
to the log, its entry to the index; the payload to the image; the answer. The invariant it keeps, with the
tests that attack each clause:

    at every instant, each byte in which the disk may differ from the replica is covered
      - by a durable log record not yet acknowledged by the target
            (test_killed_at_every_labelled_call_the_logs_still_give_the_disk),
      - or by a region marked in the durable region map
            (test_whatever_a_power_cut_leaves_the_marked_regions_cover_every_difference,
             test_every_unlogged_write_is_marked_durably_before_it_is_answered,
             test_whatever_happens_every_difference_is_in_a_log_or_will_be_looked_at);
    otherwise the state on disk says that a full resynchronisation is required
            (test_a_map_that_cannot_be_written_asks_for_a_full_resynchronisation).

So a log that cannot be written does not fail the guest's write: before that write is answered, the
state says durably that a resynchronisation is required and the regions in doubt are marked, and logging
ends for the whole VM; from then on writes only mark their regions. And an image that cannot be written
fails the guest's write, but the log must not claim what the image does not hold: what stands on the image
is logged after it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hvfuse import system
from hvfuse.extent import Buffer, Extent
from hvfuse.filesystem import read_only
from hvfuse.formats.companion import AddressSpace, Kind
from hvfuse.formats.image import ImageFormat, ImageInfo
from hvfuse.formats.tracking import DIRTY, HOT
from hvfuse.tracker.disk_logs import DiskLogs
from hvfuse.tracker.holding import Hold
from hvfuse.tracker.log import MAX_LOG_SIZE, ReplicationLog
from hvfuse.tracker.regions import MAX_REGIONS, RegionMap, region_size
from hvfuse.tracker.state import TrackingState

_PIECE = 1 << 20
_MOST_LOGGED = 16 << 20
"""Bytes of the image that are read back and logged after a failed write; more is marked instead."""
_LOGICAL_FORMATS = (ImageFormat.RAW, ImageFormat.VHD_FIXED)


def address_space(image_format: ImageFormat) -> AddressSpace:
    """What the offsets in a disk's log count from; for raw and fixed disks both are the same."""
    return AddressSpace.LOGICAL if image_format in _LOGICAL_FORMATS else AddressSpace.IMAGE_FILE


class Tracking(Protocol):
    """What a disk needs of its VM."""

    gate: threading.Lock
    """Held during every write and during the switch of all logs: no write completes between the
    first disk's switch and the last's."""
    held: Hold | None
    """While there is one, nothing of the disk's content or size may change. Changes under the gate."""

    def degrade(self, reason: str, *, full: bool = False) -> None:
        """End logging, durably; `full`: the region maps cannot be relied on. Caller holds the gate."""

    def check_budget(self) -> None:
        """End logging if the logs must not grow any more; else say of each when this is to be asked again. Caller holds
        the gate."""

    def rotate_for(self, disk: TrackedDisk, new_size: int | None) -> None:
        """Rotate all logs, resizing `disk` within the barrier. Caller does not hold the gate."""


class TrackedDisk(DiskLogs):
    """An image file and its logs, as the guest sees them. Reads go straight to `fd`."""

    def __init__(self, folder: str, info: ImageInfo, vm: Tracking, *, state: TrackingState | None) -> None:
        fd = os.open(info.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        system.keep_pages_small(fd)
        super().__init__(folder, os.path.basename(info.path), fd, address_space(info.format), state=state)
        self.format = info.format
        self.capacity = max(info.virtual_size or 0, info.file_size)
        self.open_handles = 0
        self.has_left = False
        """Whether it is not tracked any more: handles that were open then write to it past any log."""
        self.marks_only = False
        """Whether writes mark their regions dirty instead of being logged."""
        self._vm = vm
        self._gate = vm.gate
        self._large = system.cached_rooms(fd, info.file_size)
        """What others may have read into large pages before the disk was attached, and was not written to since."""
        if self.regions is not None:
            self.regions.used = min(-(-info.file_size // self.regions.size) + 1, MAX_REGIONS)

    def write(self, data: Buffer, offset: int) -> int:
        """Log and write all of `data`; a write past the end extends the image. Raises OSError only
        for the image's sake, or because the VM is held."""
        length, is_full = len(data), False
        with self._gate:
            if self._vm.held is not None:
                raise read_only()
            if self._large:
                self._split_pages(offset, length)
            log = self.log
            if log is not None:
                try:
                    self._cover(offset, length, HOT)
                    log.append_write(data, offset)
                except OSError as error:
                    self._vm.degrade(f"the log of {self.name} could not be written: {error.strerror}")
                    self._mark_unlogged(offset, length)
                if log.stored >= log.budget_check:
                    self._vm.check_budget()
                    is_full = log.size > MAX_LOG_SIZE
            else:
                self._mark_unlogged(offset, length)
            try:
                system.pwrite_small("disk:write", self.fd, data, offset)
            except OSError as error:
                if not self._made_room(error, offset, length):
                    raise
                system.pwrite_small("disk:write", self.fd, data, offset)
        if is_full:
            self._vm.rotate_for(self, None)
        return length

    def _split_pages(self, offset: int, length: int) -> None:
        """Let go of what may be in large pages where it is about to be written to for the first time."""
        for number in range(offset >> system.LARGE_SHIFT, (offset + length - 1 >> system.LARGE_SHIFT) + 1):
            if number in self._large:
                self._large.discard(number)
                system.drop_large_page(self.fd, number)

    def trim(self, offset: int, length: int) -> None:
        """Deallocate a range, which then reads as zeroes; what lies past the end is ignored."""
        self._clear(Kind.TRIM, offset, length)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes but keep its space; what lies past the end is ignored."""
        self._clear(Kind.ZERO, offset, length)

    def _clear(self, kind: Kind, offset: int, length: int) -> None:
        with self._gate:
            if self._vm.held is not None:
                raise read_only()
            length = min(length, self.size() - offset)
            if length <= 0:
                return
            log = self.log
            if log is not None:
                try:
                    self._cover(offset, length, HOT)
                    log.append_hole(kind, offset, length)
                except OSError as error:
                    self._vm.degrade(f"the log of {self.name} could not be written: {error.strerror}")
                    self._mark_unlogged(offset, length)
            else:
                self._mark_unlogged(offset, length)
            try:
                self._clear_image(kind, offset, length)
            except OSError as error:
                if not self._made_room(error, offset, length):
                    raise
                self._clear_image(kind, offset, length)
        if log is not None and log.size > MAX_LOG_SIZE:
            self._vm.rotate_for(self, None)

    def allocate(self, offset: int, length: int) -> None:
        """Have the file system keep room for a range; content and size stay."""
        with self._gate:
            if self._vm.held is not None:
                raise read_only()
            system.fallocate("disk:allocate", self.fd, system.FALLOC_FL_KEEP_SIZE, offset, length)

    def _cover(self, offset: int, length: int, mark: int) -> None:
        """Mark the regions of a range durably. Caller holds the gate. Raises OSError."""
        regions = self.regions
        assert regions is not None, "only tracked disks are logged"
        if offset + length > regions.reach:
            regions = self._enlarge_regions(offset + length)
        regions.cover(offset, length, mark)

    def _enlarge_regions(self, size: int) -> RegionMap:
        """The disk outgrew its map: take larger regions. A crash on the way finds every region marked."""
        regions, state = self.regions, self._tracked_state()
        assert regions is not None, "only tracked disks are logged"
        marks = regions.marks
        regions.blanket()
        state.update(region_size=region_size(size))
        self.regions = regions.coarser(region_size(size), marks)
        self.regions.save()
        return self.regions

    def _mark_unlogged(self, offset: int, length: int) -> None:
        """What is about to be written will be in no log. Caller holds the gate."""
        if not self.marks_only:
            return
        try:
            self._cover(offset, length, DIRTY)
        except OSError as error:
            self._vm.degrade(f"the region map of {self.name} could not be written: {error.strerror}", full=True)

    def doubt(self, ranges: Sequence[Extent]) -> None:
        """Mark ranges dirty, in memory: the replica is known to differ there. What lies past the end of the disk is
        left out. Caller holds the gate, and ends logging, which makes it durable. Raises OSError."""
        size = self.size()
        there = [extent for extent in ranges if extent.offset < size]
        if not there:
            return
        regions = self.regions
        assert regions is not None, "only tracked disks can differ"
        if size > regions.reach:
            regions = self._enlarge_regions(size)
        lengths = [min(extent.end, size) - extent.offset for extent in there]
        regions.mark_ranges(np.array([extent.offset for extent in there], np.int64), np.array(lengths, np.int64))

    def doubt_all(self) -> None:
        """Mark the whole disk dirty, durably. Caller holds the gate, or nobody writes. Raises OSError."""
        regions = self.regions
        assert regions is not None, "only tracked disks can differ"
        if self.size() > regions.reach:
            regions = self._enlarge_regions(self.size())
        regions.doubt_all()

    def _made_room(self, error: OSError, offset: int, length: int) -> bool:
        """The image could not be written. If that is because the file system is full, the logs go before
        the guest's write does; otherwise what stands on the image is logged. Caller holds the gate."""
        if self.log is None:
            return False
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or length > _MOST_LOGGED:
            self._vm.degrade(f"{self.name} could not be written: {error.strerror}")
            self._mark_unlogged(offset, length)
            return error.errno in (errno.ENOSPC, errno.EDQUOT)
        self._log_what_stands(offset, length)
        return False

    def _clear_image(self, kind: Kind, offset: int, length: int) -> None:
        if kind is Kind.ZERO:
            mode = system.FALLOC_FL_ZERO_RANGE | system.FALLOC_FL_KEEP_SIZE
            try:
                system.fallocate("disk:zero", self.fd, mode, offset, length)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
        system.write_zeroes("disk:trim", self.fd, offset, length)

    def about_to_resize(self, size: int) -> None:
        """What is cut off reads as zeroes should the disk grow again: mark it. Caller holds the gate, and `_rotation`
        until the size is changed. Raises OSError if the VM is held."""
        if self._vm.held is not None:
            raise read_only()
        cut = self.size() - size
        if cut <= 0:
            return
        if self.log is None:
            self._mark_unlogged(size, cut)
            return
        try:
            self._cover(size, cut, HOT)
        except OSError as error:
            self._vm.degrade(f"the region map of {self.name} could not be written: {error.strerror}")
            self._mark_unlogged(size, cut)

    def truncate(self, size: int) -> None:
        """Resize the image explicitly: a rotation, so that the new size begins a cycle."""
        if size != self.size():
            self._vm.rotate_for(self, size)
        elif self._vm.held is not None:
            raise read_only()

    def sync(self, *, datasync: bool) -> None:
        """Make all answered writes durable: log, index and image, at the same time. It matters to nobody which of them
        is first, as the kernel writes them back in any order even before.

        A failed sync is final: the kernel may have dropped the pages and report success the next
        time. Raises OSError only for the image's sake.
        """
        with self._gate:
            log = self.log
            if log is not None:
                try:
                    log.describe()
                except OSError as error:
                    self._vm.degrade(f"the log of {self.name} could not be written: {error.strerror}")

        def sync_image() -> None:
            self.sync_image("disk:sync", datasync=datasync)

        if log is not None:
            log_refused, image_refused = system.at_once(log.sync, sync_image)
        else:
            log_refused, image_refused = None, system.refusal_of(sync_image)
        if log_refused is not None:
            with self._gate:
                self._vm.degrade(f"the log of {self.name} could not be synced: {log_refused.strerror}")
        if image_refused is not None:
            with self._gate:
                if not self.has_left:
                    self._vm.degrade(f"{self.name} could not be synced: {image_refused.strerror}")
            raise image_refused
        with self._gate:
            if log is not None and log is self.log:
                self._mark_flush(log)

    def _mark_flush(self, log: ReplicationLog) -> None:
        try:
            log.mark_flush()
        except OSError as error:
            self._vm.degrade(f"the log of {self.name} could not be written: {error.strerror}")

    def _log_what_stands(self, offset: int, length: int) -> None:
        """A write to the image failed half-way: log what the image holds there now. Caller holds the gate.

        What would have extended the image and did not is logged as zeroes: that is what stands there
        once a later write extends it.
        """
        log = self.log
        if log is None:
            return
        try:
            end = offset + length
            stands = min(end, self.size())
            for at in range(offset, stands, _PIECE):
                log.append_write(system.pread(self.fd, min(_PIECE, stands - at), at), at)
            log.append_hole(Kind.ZERO, max(offset, stands), end - max(offset, stands))
        except OSError as error:
            self._vm.degrade(f"{self.name} could not be read after a failed write: {error.strerror}")

    def opened(self) -> None:
        """A handle on the disk was opened."""
        self.open_handles += 1

    def closed(self) -> None:
        """A handle on the disk was closed."""
        with self._gate:
            self.open_handles -= 1
            if self.has_left and not self.open_handles:
                self._close_image()

    def leave(self) -> None:
        """Track the disk no more; what it had open it keeps while handles lead to it. Caller holds the gate."""
        self.drop_logs()
        self.has_left, self.marks_only = True, False
        self._let_go()
        if not self.open_handles:
            self._close_image()

    def close(self) -> None:
        """Let go of image, logs, index and state, as they are."""
        self.close_logs()
        self._let_go()
        self._close_image()

    def _let_go(self) -> None:
        for index in self._indexes:
            index.close()
        self._indexes.clear()
        state, self.state, self.regions = self.state, None, None
        if state is not None:
            state.close()

    def _close_image(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
