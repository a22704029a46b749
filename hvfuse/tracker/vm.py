"""All disks of one VM: attach, generations, the rotation barrier, detach.

Locks, always taken in this order:

- `_rotation` serialises what changes logs: begin, rotate, resize, release, detach. Whoever seals holds
  it, so a log is sealed before the next switch needs its index map.
- `gate` is held by every write and by the switch. It forbids that a write lands between the switch
  of one disk and that of the next, and that a payload goes to a log while it is switched away.
  Nothing is synced or sealed under it, so the barrier lasts microseconds, not disk time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, NoReturn

from hvfuse import spool, system
from hvfuse.errors import NotFoundError, ResyncRequiredError
from hvfuse.formats.image import is_disk_name, probe_for_tracking
from hvfuse.formats.tracking import NOT_TRACKED
from hvfuse.tracker import recovery
from hvfuse.tracker.disk import TrackedDisk, address_space
from hvfuse.tracker.state import TrackingState

_BARRIERS_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Rotation:
    """The cycle that a rotation sealed, its instant (ns since 1970) and how long the barrier stood."""

    generation: bytes
    cycle: int
    sealed_ns: int
    barrier_ns: int


class TrackedVm:
    """The disks directly in `folder`, those in `exclude` left out of tracking (they are still served)."""

    def __init__(
        self,
        name: str,
        folder: str,
        *,
        exclude: frozenset[str] = frozenset(),
        clock: system.Clock | None = None,
    ) -> None:
        self.name = name
        self.folder = os.path.abspath(folder)
        self.gate = threading.Lock()
        self.disks: dict[str, TrackedDisk] = {}
        self.recovered: str | None = None
        self.barriers_ns: deque[int] = deque(maxlen=_BARRIERS_KEPT)
        self._exclude = exclude
        self._clock: system.Clock = clock or system.SystemClock()
        self._rotation = threading.RLock()
        self._generation = NOT_TRACKED
        self._cycle = 0

    # Attach and detach ------------------------------------------------------------------------

    def attach(self) -> None:
        """Open the disks and take up their logs where that can be done safely.

        Raises NotFoundError without a disk, BusyError when another process has one attached,
        CorruptError or UnsupportedError naming a disk that cannot be tracked.
        """
        try:
            names = sorted(name for name in os.listdir(self.folder) if is_disk_name(name))
        except FileNotFoundError:
            raise NotFoundError(f"{self.folder}: no such VM folder") from None
        names = [name for name in names if os.path.isfile(os.path.join(self.folder, name))]
        if not names:
            raise NotFoundError(f"{self.folder}: no disk (.vhd, .vhdx, .raw or .img) in it")
        try:
            for name in names:
                self.disks[name] = self._open(name)
            with self._rotation:
                self._resume()
        except BaseException:
            self.close()
            raise

    def _open(self, name: str) -> TrackedDisk:
        info = probe_for_tracking(os.path.join(self.folder, name))
        state = None
        if name not in self._exclude:
            state = TrackingState(self.folder, name, address_space=address_space(info.format))
        return TrackedDisk(self.folder, info, self, state=state)

    def _resume(self) -> None:
        """Continue the generation if every disk allows it; else remember why not, durably."""
        disks = self._tracked()
        reason, self.recovered = recovery.recover(disks, now_ns=self._clock.now_ns())
        boot = system.boot_id()
        for _, state in disks:
            state.update(detached_cleanly=False, boot_id=boot, resync_reason=reason)
        if disks:
            self._generation, self._cycle = disks[0][1].record.generation, disks[0][1].record.cycle
        if reason is None and self._generation != NOT_TRACKED:
            with contextlib.suppress(ResyncRequiredError):  # the disks are served all the same
                self._start_logs()

    def _start_logs(self) -> None:
        """First logs of this attachment or generation. Raises ResyncRequiredError."""
        disks = self._tracked()
        self._prepare(self._cycle + 1)
        with self.gate:
            now = self._clock.now_ns()
            for disk, _ in disks:
                disk.switch(now_ns=now)

    def detach(self) -> None:
        """Seal what was written and record a clean detach. The mount is gone: nobody writes."""
        with self._rotation:
            if self.is_logging:
                with self.gate:
                    now = self._clock.now_ns()
                    for disk, _ in self._tracked():
                        disk.retire()
                with contextlib.suppress(ResyncRequiredError):  # the state says it durably
                    self._seal(now)
            for disk, state in self._tracked():
                disk.drop_logs()
                system.fsync("detach:image", disk.fd)
                stat = os.fstat(disk.fd)
                state.update(
                    detached_cleanly=True,
                    image_size=stat.st_size,
                    image_mtime_ns=stat.st_mtime_ns,
                    image_inode=stat.st_ino,
                )
            self.close()

    def close(self) -> None:
        """Let go of everything as it is."""
        for disk in self.disks.values():
            disk.close()
        self.disks.clear()

    # Tracking ---------------------------------------------------------------------------------

    @property
    def is_logging(self) -> bool:
        """Whether writes are logged."""
        return any(disk.log is not None for disk in self.disks.values())

    @property
    def resync_reason(self) -> str | None:
        """Why a resynchronisation is required; None when it is not."""
        reasons = (state.record.resync_reason for _, state in self._tracked())
        return next((reason for reason in reasons if reason is not None), None)

    def begin(self, generation: bytes) -> None:
        """Begin a generation: from one instant on, all writes to all disks are logged, as cycle 1.

        Idempotent for the generation in progress. Earlier logs are given up: a copy is to follow.
        Raises OSError, ResyncRequiredError.
        """
        with self._rotation:
            if self.is_logging and self._generation == generation:
                return
            disks = self._tracked()
            if not disks:
                raise NotFoundError(f"{self.name}: every disk is excluded from replication")
            # Until the new generation stands on disk for all disks, a death in here must not leave a
            # state that looks continuous.
            for _, state in disks:
                state.update(resync_reason="a new generation was being begun")
            with self.gate:
                for disk, _ in disks:
                    disk.drop_logs()
            for disk, _ in disks:
                disk.drop_retired()
                disk.drop_strays()
            for _, state in disks:
                state.update(
                    generation=generation,
                    cycle=0,
                    digest=bytes(16),
                    unique_id=bytes(16),
                    disk_count=len(disks),
                )
            spool.clear(self.folder)
            self._generation, self._cycle = generation, 0
            self._start_logs()
            for _, state in disks:
                state.update(resync_reason=None)

    def rotate(self) -> Rotation:
        """Seal the cycle in progress. When this returns, its logs are durable and in the spool.

        Raises ResyncRequiredError when nothing is being logged.
        """
        with self._rotation:
            return self._rotate()

    def rotate_for(self, disk: TrackedDisk, new_size: int | None) -> None:
        """Rotate, and resize `disk` within the barrier: the new size belongs to the next cycle."""
        with self._rotation:
            if disk.log is not None:
                # Where logging ends, durably noted, the guest's operation goes on without it.
                with contextlib.suppress(ResyncRequiredError):
                    self._rotate(resized=disk if new_size is not None else None, new_size=new_size or 0)
            if new_size is not None and disk.size() != new_size:
                system.truncate("disk:truncate", disk.fd, new_size)

    def _rotate(self, *, resized: TrackedDisk | None = None, new_size: int = 0) -> Rotation:
        self._require_logging()
        disks = [disk for disk, _ in self._tracked()]
        self._prepare(self._cycle + 2)
        with self.gate:
            self._require_logging()
            started = time.perf_counter_ns()
            now = self._clock.now_ns()
            for disk in disks:
                disk.switch(now_ns=now, start_size=new_size if disk is resized else None)
            if resized is not None:
                self._resize_image(resized, new_size)
            barrier = time.perf_counter_ns() - started
        self.barriers_ns.append(barrier)
        self._seal(now)
        return Rotation(self._generation, self._cycle, now, barrier)

    def _prepare(self, cycle: int) -> None:
        try:
            for disk, _ in self._tracked():
                disk.prepare(generation=self._generation, cycle=cycle)
        except OSError as error:
            self._give_up(f"no log could be made: {error.strerror}")

    def _resize_image(self, disk: TrackedDisk, new_size: int) -> None:
        """Caller holds the gate; the new log already says `new_size`, so a failure must not keep it."""
        try:
            system.truncate("disk:truncate", disk.fd, new_size)
        except OSError as error:
            self.degrade(f"{disk.name} could not be resized: {error.strerror}")
            raise

    def _seal(self, sealed_ns: int) -> None:
        """Seal all logs that were switched away from, then have the next ones stand by."""
        disks = self._tracked()
        try:
            for disk, _ in disks:
                disk.seal(sealed_ns=sealed_ns, disk_count=len(disks))
        except OSError as error:
            self._give_up(f"a log could not be sealed: {error.strerror}")
        self._cycle += 1
        if self.is_logging:
            with contextlib.suppress(OSError):  # tried again, in earnest, when the next rotation needs it
                for disk, _ in disks:
                    disk.prepare(generation=self._generation, cycle=self._cycle + 2)

    def degrade(self, reason: str) -> None:
        """Stop logging for all disks, durably; the guest's writes go on. Caller holds the gate."""
        for disk, state in self._tracked():
            try:
                state.update(resync_reason=reason)
            except OSError:
                # With neither log nor mark the disk would look whole at the next attach; without a
                # state file it looks new, which means a full copy as well.
                system.unlink("state:give-up", state.path, missing_ok=True)
            disk.drop_logs()

    def _give_up(self, reason: str) -> NoReturn:
        with self.gate:
            self.degrade(reason)
        for disk, _ in self._tracked():
            disk.drop_retired()
        raise ResyncRequiredError(f"{self.name}: {reason}", hint=f"hvfuse replicate {self.name} makes a new copy")

    def _require_logging(self) -> None:
        if not self.is_logging:
            reason = self.resync_reason or "it is not protected yet"
            raise ResyncRequiredError(
                f"{self.name}: no writes are being logged: {reason}",
                hint=f"hvfuse replicate {self.name} makes a copy",
            )

    def release(self, generation: bytes, cycle: int) -> None:
        """Recycle the sealed logs of `generation` up to `cycle`, and those of all other generations."""
        with self._rotation:
            cycles = spool.list_cycles(self.folder)
            spool.release([c for c in cycles if c.generation != generation or c.cycle <= cycle])

    def _tracked(self) -> list[tuple[TrackedDisk, TrackingState]]:
        return [(disk, disk.state) for disk in self.disks.values() if disk.state is not None]

    def status(self) -> dict[str, Any]:
        """What there is to know, for the control socket: JSON types, sizes in bytes."""
        present = {name for name in os.listdir(self.folder) if is_disk_name(name)}
        return {
            "vm": self.name,
            "generation": self._generation.hex() if self._generation != NOT_TRACKED else None,
            "cycle": self._cycle + 1,
            "resync_required": self.resync_reason,
            "recovered": self.recovered,
            "untracked": sorted(present - set(self.disks)),
            "excluded": sorted(name for name, disk in self.disks.items() if disk.state is None),
            "disks": [
                {
                    "name": disk.name,
                    "disk_id": state.record.disk_id.hex(),
                    "format": disk.format.value,
                    "size": disk.size(),
                    "log_bytes": disk.log.size if disk.log is not None else 0,
                    "log_entries": disk.log.entry_count if disk.log is not None else 0,
                    "open_handles": disk.open_handles,
                }
                for disk, state in self._tracked()
            ],
        }
