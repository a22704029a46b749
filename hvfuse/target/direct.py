"""The first copy of a VM, which goes straight into the replica images: nobody can read them yet.

Its frames count as held once the images were synced and a transaction says so, every `BATCH` bytes. Between
two syncs those with data are noted in a plain file (`hvfuse.target.unsynced`), so that the death of a process
repeats no more than the frame in flight and the few that say zeroes alone; that of the host repeats a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hvfuse.errors import HvfuseError
from hvfuse.frames import Fill, Frame
from hvfuse.manifest import CycleManifest
from hvfuse.target import schema, staging
from hvfuse.target.environment import Txn, file_faults
from hvfuse.target.images import ReplicaImages
from hvfuse.target.schema import DiskRecord, StagingRecord, VmRecord
from hvfuse.target.store import Store
from hvfuse.target.unsynced import UnsyncedFrames, WrittenFrame

BATCH = 128 << 20
"""Bytes put into images before they are synced and noted as held: what a loss of power repeats."""
AHEAD = 8 << 20
"""Bytes put into images before the medium begins with them, so that it is busy all the time. Of less than that, a file
system would make pieces of the images."""
PENDING_OVERHEAD = 64 << 10
"""Bytes that any frame stands for, however small: bounds the number in a batch."""

_log = logging.getLogger(__name__)


class DirectCopy:
    """The direct copy that `opened`, its staging record, tells of. For one thread at a time.

    `held`: the frames that count, after `take_up`. Raises BusyError when the images are being written by
    another process, or the copy was begun anew elsewhere; NoSpaceError, and HvfuseError naming a file.
    """

    def __init__(self, store: Store, vm: str, opened: StagingRecord) -> None:
        self._store = store
        self._env = store.env
        self._vm = vm
        self._opened = opened
        self._images = ReplicaImages(store.replica_folder(vm))
        self._unsynced = UnsyncedFrames(store, vm, opened)
        # Frames in the images, but not yet durably, and the bytes that they stand for.
        self._pending: set[int] = set()
        self._pending_bytes = 0
        self._unwritten = 0  # bytes put into images since the medium was last told to begin with them
        self._failed = False

    def close(self) -> None:
        """Let files go. What is noted counts when the copy is taken up again."""
        self._images.close()
        self._unsynced.close()

    def take_up(self, held: frozenset[int]) -> frozenset[int]:
        """Begin, or go on where an earlier process stopped; `held`: durably. Returns the frames that count."""
        with self._images.lock():
            noted = [frame for frame in self._unsynced.read() if frame.number not in held]
            found = self._make_held(noted) if noted else frozenset()
            if not held and not found:
                self._images.blank(disk.name for disk in self._opened.disks)
                # Else what an earlier copy left could come back beneath frames that were found again.
                self._images.sync()
            self._unsynced.start()
        return held | found

    def _make_held(self, noted: Sequence[WrittenFrame]) -> frozenset[int]:
        """Make durable what an earlier process wrote, and note it so. Returns what is there for certain.

        The kernel tells a failure to write back to those who have the file open, or to the first to open it
        afterwards, but not if it has forgotten the file by then, nor if that process was told and died before
        it could say so. Of the file system as a whole the failure is remembered apart, until it is told, and
        until it is mounted anew. Hence what counts is read back from the medium.
        """
        try:
            for disk in self._opened.disks:
                self._images.size(disk.name)  # opens it: what is not open is not synced
            self._images.sync()
            self._images.sync_file_system()
        except HvfuseError as error:
            _log.warning("%s: %d frames that were not durable yet count as lost: %s", self._vm, len(noted), error)
            self._distrust()
            return frozenset()
        found = frozenset(frame.number for frame in noted if self._is_there(frame))
        lost = len({frame.number for frame in noted} - found)
        if lost:
            _log.warning("%s: %d frames that were not durable yet are not in the replica images", self._vm, lost)
        if found:
            self._note_held(found)
        return found

    def _is_there(self, frame: WrittenFrame) -> bool:
        """Whether the medium has what a frame left in its image. What cannot be read is not there."""
        name = next((disk.name for disk in self._opened.disks if disk.number == frame.disk), None)
        try:
            return name is not None and frame.is_in(self._images.descriptor(name))
        except OSError as error:
            _log.warning("%s: %s: %s", self._vm, name, error.strerror)
            return False

    def _distrust(self) -> None:
        """Remove the note after a sync that failed, which is what the caller is to be told of."""
        try:
            self._unsynced.drop()
        except HvfuseError as error:
            _log.warning("%s: the note of frames that were not durable could not be removed: %s", self._vm, error)

    def put(self, frame: Frame, disk: DiskRecord) -> None:
        """Apply a frame to the image, unless it is there already."""
        number = frame.header.number
        self._check_usable()
        with self._images.lock():
            with self._env.read() as txn:
                vm = self._load_open(txn)
                held = txn.get(schema.held_key(vm.id, number), db=self._env.db(schema.HELD)) is not None
            if held or number in self._pending:
                return
            rows = zip(frame.table.tolist(), frame.positions().tolist(), strict=True)
            for (offset, length, kind), at in rows:
                if kind == Fill.DATA:
                    self._images.write(disk.name, offset, frame.data[at : at + length])
                else:
                    self._images.zero(disk.name, offset, length)
            with file_faults(self._store.image_path(self._vm, disk.name)):
                written = WrittenFrame.of(frame, disk.number, self._images.descriptor(disk.name))
            if written is not None:
                self._unsynced.append(written)
            self._unwritten += len(frame.data)
            if self._unwritten >= AHEAD:
                self._images.begin_writing(disk.name)
                self._unwritten = 0
        self._pending.add(number)
        self._pending_bytes += frame.header.plain_length + PENDING_OVERHEAD
        if self._pending_bytes >= BATCH:
            self._flush()

    def finish(self, manifest: CycleManifest) -> None:
        """Make the images as long as the disks, and durable. What was copied beyond a disk that became
        shorter meanwhile stays: cycles between may need it, and the one that cut it off says so. The images
        of disks that the VM has no more go."""
        self._check_usable()
        with self._images.lock(), self._env.read() as txn:
            vm = self._load_open(txn)
            for name in {disk.name for disk in vm.disks} - {disk.name for disk in manifest.disks}:
                self._images.remove(name)
            for disk in manifest.disks:
                self._images.resize(disk.name, max(disk.size, self._images.size(disk.name)))
        self._flush()

    def forget(self) -> None:
        """Remove the note: the copy is committed."""
        self._unsynced.drop()

    def _flush(self) -> None:
        """Make the images durable, then note the frames in them as held."""
        try:
            self._images.sync()
        except HvfuseError:
            self._failed = True
            self._distrust()
            raise
        self._note_held(frozenset(self._pending))
        self._unsynced.empty()
        self._pending.clear()
        self._pending_bytes = 0

    def _note_held(self, numbers: frozenset[int]) -> None:
        def act(txn: Txn) -> None:
            vm = self._load_open(txn)
            for number in numbers:
                txn.put(schema.held_key(vm.id, number), b"", db=self._env.db(schema.HELD))

        self._store.write("store:held", act)

    def _load_open(self, txn: Txn) -> VmRecord:
        return staging.load_open(txn, self._store, self._vm, self._opened)

    def _check_usable(self) -> None:
        """A sync that failed is final: the next one would say that all is well."""
        if self._failed:
            raise HvfuseError(f"{self._vm}: the replica images could not be synced; begin the copy again")
