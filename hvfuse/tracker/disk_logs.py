"""The logs of one disk over its rotations: standing by, active, being sealed.

The VM's rotation lock is held in all of it; what the guest's writes see changes under its gate too.
"""

from __future__ import annotations

import contextlib
import os

from hvfuse import spool, system
from hvfuse.formats.companion import AddressSpace, CompanionHeader
from hvfuse.formats.tracking import IndexHead
from hvfuse.tracker.index import IndexMap
from hvfuse.tracker.log import ReplicationLog, new_log_id
from hvfuse.tracker.regions import RegionMap
from hvfuse.tracker.state import TrackingState


class DiskLogs:
    """Half of a tracked disk. `fd`: of the image, open for reading and writing.

    `log` is None while nothing is logged: not yet protected, or a resynchronisation is required.
    `regions` is None for a disk that is not tracked at all.
    """

    def __init__(self, folder: str, name: str, fd: int, space: AddressSpace, *, state: TrackingState | None) -> None:
        self.folder = folder
        self.name = name
        self.fd = fd
        self.space = space
        self.state = state
        self.regions: RegionMap | None = state.regions() if state is not None else None
        self.log: ReplicationLog | None = None
        self.sync_failed: OSError | None = None
        self._standby: ReplicationLog | None = None
        self._retired: tuple[ReplicationLog, int] | None = None
        self._indexes: list[IndexMap] = []

    def size(self) -> int:
        """Bytes of the image file."""
        return os.fstat(self.fd).st_size

    def prepare(self, *, generation: bytes, cycle: int) -> None:
        """Have a log stand by for `cycle`. Outside the barrier. Raises OSError."""
        standby = self._standby  # which the guest's thread may give up at any moment
        if standby is not None:
            if (standby.head.generation, standby.head.cycle) == (generation, cycle):
                return
            self._standby = None
            self._discard(standby)
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

    @property
    def is_prepared(self) -> bool:
        """Whether a log stands by; the guest's thread may have given it up. Caller holds the gate."""
        return self._standby is not None

    def _take_serial(self) -> int:
        return max(self._tracked_state().record.serial, spool.greatest_serial(self.folder, self.name)) + 1

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
        if self.regions is not None:
            self.regions.switched()

    def resize_refused(self) -> None:
        """The image kept its size: the log that was to begin with the new one begins with that. Caller
        holds the gate, and has since the switch."""
        assert self.log is not None, "a resize is a rotation"
        head, size = self.log.head, self.size()
        self.log.activate(opened_ns=head.opened_ns, first_seq=head.first_seq, previous_size=size, start_size=size)

    def sync_image(self, label: str, *, datasync: bool = True) -> None:
        """Sync the image. Raises OSError, and from the first failure on always: the kernel tells it once,
        to whoever asks first, and may have dropped the pages."""
        if self.sync_failed is not None:
            raise OSError(self.sync_failed.errno, self.sync_failed.strerror)
        try:
            (system.fdatasync if datasync else system.fsync)(label, self.fd)
        except OSError as error:
            self.sync_failed = error
            raise

    def retire(self) -> None:
        """Stop writing to the log, which is then to be sealed. Caller holds the gate."""
        if self.log is not None:
            self._retired = (self.log, self.size())
            self.log = None

    def seal(self, *, sealed_ns: int, disk_count: int, flags: int = 0) -> CompanionHeader | None:
        """Seal the log that was switched away from, and note it in the state. `flags`: of its companion.
        Raises OSError."""
        if self._retired is None:
            return None
        log, end_size = self._retired
        state = self._tracked_state()
        self.sync_image("seal:image")
        header = log.seal(
            sealed_ns=sealed_ns,
            end_size=end_size,
            disk_count=disk_count,
            previous_digest=state.record.digest,
            space=self.space,
            flags=flags,
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
        )

    def unsealed(self) -> list[ReplicationLog]:
        """The logs whose entries no companion need tell of: the one being sealed, the active one. Caller holds the
        gate; as long as it does, none of their index maps is taken for another log."""
        retired, log = self._retired, self.log  # the first may be let go at any moment
        return [each for each in (retired[0] if retired else None, log) if each is not None]

    def drop_logs(self) -> None:
        """Give up the active log and the one standing by. Caller holds the gate or nobody writes.

        A log that is being sealed belongs to whoever seals it.
        """
        logs = (self.log, self._standby)
        self.log = self._standby = None  # first: a closed log's descriptor may soon be another file's
        for log in logs:
            if log is not None:
                with contextlib.suppress(OSError):  # the file is in nobody's way
                    self._discard(log)

    def close_logs(self) -> None:
        """Let go of the logs as they are; their files stay, unsealed. Nobody writes any more."""
        retired = self._retired[0] if self._retired else None
        logs = (self.log, self._standby, retired)
        self.log = self._standby = self._retired = None
        for log in logs:
            if log is not None:
                log.close()

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
