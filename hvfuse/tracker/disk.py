"""One tracked disk: the write path, and its half of a rotation.

The order of a write, under the VM's gate: a durable mark of its region, unless there is one; the payload
to the log, its entry to the index; the payload to the image; the answer. The invariant it keeps, with the
tests that attack each clause:

    at every instant, each byte in which the disk may differ from the replica is covered
      - by a durable log record not yet acknowledged by the target
            (test_killed_at_every_labelled_call_the_logs_still_give_the_disk),
      - or by a region marked in the durable region map
            (test_whatever_a_power_cut_leaves_the_marked_regions_cover_every_difference,
             test_every_unlogged_write_is_marked_durably_before_it_is_answered);
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
from typing import Protocol

from hvfuse import spool, system
from hvfuse.extent import Buffer
from hvfuse.formats.companion import AddressSpace, CompanionHeader, Kind
from hvfuse.formats.image import ImageFormat, ImageInfo
from hvfuse.formats.tracking import IndexHead
from hvfuse.tracker.index import IndexMap
from hvfuse.tracker.log import MAX_LOG_SIZE, ReplicationLog, new_log_id
from hvfuse.tracker.regions import DIRTY, HOT, MAX_REGIONS, RegionMap, region_size
from hvfuse.tracker.state import TrackingState

_PIECE = 1 << 20
_BUDGET_STEP = 1 << 20
"""Bytes of payload after which the logs' budget is looked at again."""
_LOGICAL_FORMATS = (ImageFormat.RAW, ImageFormat.VHD_FIXED)


def address_space(image_format: ImageFormat) -> AddressSpace:
    """What the offsets in a disk's log count from; for raw and fixed disks both are the same."""
    return AddressSpace.LOGICAL if image_format in _LOGICAL_FORMATS else AddressSpace.IMAGE_FILE


class Tracking(Protocol):
    """What a disk needs of its VM."""

    gate: threading.Lock
    """Held during every write and during the switch of all logs: no write completes between the
    first disk's switch and the last's."""

    def degrade(self, reason: str, *, full: bool = False) -> None:
        """End logging, durably; `full`: the region maps cannot be relied on. Caller holds the gate."""

    def over_budget(self) -> str | None:
        """Why the logs must not grow any more; None while they may. Caller holds the gate."""

    def rotate_for(self, disk: TrackedDisk, new_size: int | None) -> None:
        """Rotate all logs, resizing `disk` within the barrier. Caller does not hold the gate."""


class TrackedDisk:
    """An image file and its log. `fd` is open for reading and writing; reads go straight to it.

    `log` is None while nothing is logged: not yet protected, or a resynchronisation is required.
    """

    marks_only = False
    """Whether writes mark their regions dirty instead of being logged."""

    def __init__(self, folder: str, info: ImageInfo, vm: Tracking, *, state: TrackingState | None) -> None:
        self.folder = folder
        self.name = os.path.basename(info.path)
        self.format = info.format
        self.space = address_space(info.format)
        self.state = state
        self.capacity = max(info.virtual_size or 0, info.file_size)
        self.regions = state.regions() if state is not None else None
        if self.regions is not None:
            self.regions.used = min(-(-info.file_size // self.regions.size) + 1, MAX_REGIONS)
        self.log: ReplicationLog | None = None
        self._budget_check = 0
        self.open_handles = 0
        self._vm = vm
        self._gate = vm.gate
        self._standby: ReplicationLog | None = None
        self._retired: tuple[ReplicationLog, int] | None = None
        self._indexes: list[IndexMap] = []
        self.fd = os.open(info.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    # The guest's side -------------------------------------------------------------------------

    def size(self) -> int:
        """Bytes of the image file."""
        return os.fstat(self.fd).st_size

    def write(self, data: Buffer, offset: int) -> int:
        """Log and write all of `data`; a write past the end extends the image. Raises OSError only
        for the image's sake."""
        with self._gate:
            log = self.log
            if log is not None:
                try:
                    self._cover(offset, len(data), HOT)
                    log.append_write(data, offset)
                except OSError as error:
                    self._vm.degrade(f"the log of {self.name} could not be written: {error.strerror}")
                if log.stored > self._budget_check:
                    self._check_budget(log)
            elif self.marks_only:
                self._mark_unlogged(offset, len(data))
            try:
                system.pwrite("disk:write", self.fd, data, offset)
            except OSError:
                self._log_what_stands(offset, len(data))
                raise
        if log is not None and log.size > MAX_LOG_SIZE:
            self._vm.rotate_for(self, None)
        return len(data)

    def trim(self, offset: int, length: int) -> None:
        """Deallocate a range, which then reads as zeroes; what lies past the end is ignored."""
        self._clear(Kind.TRIM, offset, length)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes but keep its space; what lies past the end is ignored."""
        self._clear(Kind.ZERO, offset, length)

    def _clear(self, kind: Kind, offset: int, length: int) -> None:
        with self._gate:
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
            elif self.marks_only:
                self._mark_unlogged(offset, length)
            try:
                self._clear_image(kind, offset, length)
            except OSError:
                self._log_what_stands(offset, length)
                raise
        if log is not None and log.size > MAX_LOG_SIZE:
            self._vm.rotate_for(self, None)

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
        try:
            self._cover(offset, length, DIRTY)
        except OSError as error:
            self._vm.degrade(f"the region map of {self.name} could not be written: {error.strerror}", full=True)

    def _check_budget(self, log: ReplicationLog) -> None:
        """Caller holds the gate."""
        reason = self._vm.over_budget()
        if reason is not None:
            self._vm.degrade(reason)
        self._budget_check = log.stored + _BUDGET_STEP

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

    def truncate(self, size: int) -> None:
        """Resize the image explicitly: a rotation, so that the new size begins a cycle."""
        if size != self.size():
            self._vm.rotate_for(self, size)

    def sync(self, *, datasync: bool) -> None:
        """Make all answered writes durable: log and index first, then the image.

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
        if log is not None:
            try:
                log.sync()
            except OSError as error:
                with self._gate:
                    self._vm.degrade(f"the log of {self.name} could not be synced: {error.strerror}")
        try:
            (system.fdatasync if datasync else system.fsync)("disk:sync", self.fd)
        except OSError as error:
            with self._gate:
                self._vm.degrade(f"{self.name} could not be synced: {error.strerror}")
            raise
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
        self.open_handles -= 1

    # The rotation's side; the VM's rotation lock is held ------------------------------------------

    def prepare(self, *, generation: bytes, cycle: int) -> None:
        """Have a log stand by for `cycle`. Outside the barrier. Raises OSError."""
        if self._standby is not None:
            if (self._standby.head.generation, self._standby.head.cycle) == (generation, cycle):
                return
            self._discard(self._standby)
            self._standby = None
        state = self._tracked_state()
        log = self.log
        continues = log is not None and log.head.generation == generation
        head = IndexHead(
            active=False,
            unique_id=new_log_id(),
            previous_unique_id=log.head.unique_id if log is not None and continues else state.record.unique_id,
            generation=generation,
            disk_id=state.record.disk_id,
            cycle=cycle,
            serial=self._take_serial(),
            first_seq=0,
            previous_size=0,
            start_size=0,
            opened_ns=0,
        )
        self._standby = ReplicationLog.prepare(self.folder, self.name, head, self._free_index())

    def _take_serial(self) -> int:
        used = [serial for serial, _ in spool.unsealed_logs(self.folder, self.name)]
        used += [log.head.serial for log in (self.log, self._standby) if log is not None]
        return max([self._tracked_state().record.serial, *used]) + 1

    def _free_index(self) -> IndexMap:
        """The index map that no log in use occupies."""
        logs = (self.log, self._retired[0] if self._retired else None)
        busy = [log.index for log in logs if log is not None]
        return next(index for index in self.index_maps() if index not in busy)

    def index_maps(self) -> list[IndexMap]:
        """Both index maps, made at need. Raises OSError."""
        for slot in range(len(self._indexes), 2):
            self._indexes.append(IndexMap(os.path.join(self.folder, spool.index_name(self.name, slot))))
        return self._indexes

    def switch(self, *, now_ns: int, start_size: int | None = None) -> None:
        """Let the log that stands by take the writes. Within the barrier; caller holds the gate."""
        assert self._standby is not None, "prepare() comes before switch()"
        size = self.size()
        next_seq = self.log.next_seq if self.log is not None else self._tracked_state().record.next_seq
        self._standby.activate(
            opened_ns=now_ns,
            first_seq=next_seq,
            previous_size=size,
            start_size=size if start_size is None else start_size,
        )
        self.retire()
        self.log, self._standby = self._standby, None
        self._budget_check = _BUDGET_STEP
        if self.regions is not None:
            self.regions.switched()

    def retire(self) -> None:
        """Stop writing to the log, which is then to be sealed. Caller holds the gate."""
        if self.log is not None:
            self._retired = (self.log, self.size())
            self.log = None

    def seal(self, *, sealed_ns: int, disk_count: int) -> CompanionHeader | None:
        """Seal the log that was switched away from, and note it in the state. Raises OSError."""
        if self._retired is None:
            return None
        log, end_size = self._retired
        state = self._tracked_state()
        system.fdatasync("seal:image", self.fd)
        header = log.seal(
            sealed_ns=sealed_ns,
            end_size=end_size,
            disk_count=disk_count,
            previous_digest=state.record.digest,
            space=self.space,
        )
        self.note_sealed(header)
        self._retired = None
        return header

    def note_sealed(self, header: CompanionHeader) -> None:
        """Make `header`'s log the last sealed one in the state. Raises OSError."""
        self._tracked_state().update(
            cycle=header.cycle,
            serial=max(header.serial, self._tracked_state().record.serial),
            next_seq=header.first_seq + header.entry_count,
            digest=header.digest(),
            unique_id=header.unique_id,
            sealed_size=header.end_size,
        )

    def drop_logs(self) -> None:
        """Give up the active log and the one standing by. Caller holds the gate or nobody writes.

        A log that is being sealed belongs to whoever seals it.
        """
        for log in (self.log, self._standby):
            if log is not None:
                self._discard(log)
        self.log = self._standby = None

    def drop_retired(self) -> None:
        """Give up a log that could not be sealed."""
        if self._retired is not None:
            self._discard(self._retired[0])
            self._retired = None

    def drop_strays(self) -> None:
        """Recycle logs that an earlier process left without sealing them."""
        for _, path in spool.unsealed_logs(self.folder, self.name):
            spool.discard_log(self.folder, self.name, path)

    def _discard(self, log: ReplicationLog) -> None:
        log.close()
        spool.discard_log(self.folder, self.name, log.path)

    def _tracked_state(self) -> TrackingState:
        assert self.state is not None, "only disks with a tracking state are logged"
        return self.state

    def close(self) -> None:
        """Let go of image, index and state."""
        for index in self._indexes:
            index.close()
        if self.state is not None:
            self.state.close()
        os.close(self.fd)
