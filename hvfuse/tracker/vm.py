"""All disks of one VM: attach, generations, the rotation barrier, detach.

Locks, always taken in this order:

- `_rotation` serialises what changes logs: begin, rotate, resize, release, doubt, configure, take in, detach. The VM
  becomes held under it (`hvfuse.tracker.holding`), while no resize is under way. Whoever seals holds it, so a log is
  sealed before the next switch needs its index map.
- `names` is held while a name is looked up and opened through the mount, or made to lead to another file, and while the
  set of disks changes, or the VM becomes held. It forbids that a file is opened as a plain one while it becomes a disk.
- `gate` is held by every write, by the switch, and by whatever changes marks, ends logging or holds the VM. It forbids
  that a write lands between the switch of one disk and that of the next, and that a payload goes to a log while
  it is switched away. Logs are sealed and images synced outside of it, so the barrier itself lasts
  microseconds; it waits for a write that is marking a cold region, which takes a sync. Where a generation begins,
  it also keeps writes out while the marks change sides: what is written is in the copy, or in its logs.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from hvfuse import spool, system
from hvfuse.consistency import Consistency
from hvfuse.errors import BusyError, HvfuseError, NotFoundError, ResyncRequiredError, UsageError
from hvfuse.formats.companion import APPLICATION
from hvfuse.formats.image import probe_for_tracking
from hvfuse.formats.tracking import HOT, NOT_TRACKED, Scope
from hvfuse.tracker import history, holding, recovery, report, resync, touched
from hvfuse.tracker.budget import HARD_LIMIT, SOFT_LIMIT, Budget
from hvfuse.tracker.disk import TrackedDisk, address_space
from hvfuse.tracker.membership import Membership, Settled
from hvfuse.tracker.regions import greatest_size, region_size
from hvfuse.tracker.resync import Tracked
from hvfuse.tracker.state import TrackingState
from hvfuse.tracker.touched import Ranges
from hvfuse.tracker.ways_in import refuse_other_ways_in


@dataclass(frozen=True, slots=True)
class Rotation:
    """The cycle that a rotation sealed, its instant (ns since 1970), how long the barrier stood (ns), and what the
    point may promise."""

    generation: bytes
    cycle: int
    sealed_ns: int
    barrier_ns: int
    consistency: Consistency


class TrackedVm:
    """The disks directly in `folder`, those in `exclude` left out: they are files like any other.

    `names` and `disks` are the mount's to read; the latter is replaced as a whole, never changed. `is_open` is the
    mount's to give: whether it has a file open, by (device, inode).
    """

    def __init__(
        self,
        name: str,
        folder: str,
        *,
        exclude: frozenset[str] = frozenset(),
        hard_limit: float = HARD_LIMIT,
        soft_limit: float = SOFT_LIMIT,
        clock: system.Clock | None = None,
    ) -> None:
        self.name = name
        self.folder = os.path.abspath(folder)
        self.gate = threading.Lock()
        self.names = threading.RLock()
        self.is_open: Callable[[tuple[int, int]], bool] = lambda inode: False
        self.disks: dict[str, TrackedDisk] = {}
        self.held: holding.Hold | None = None
        self.recovered: str | None = None
        self.clock: system.Clock = clock or system.SystemClock()
        self.lost: str | None = None
        """Why a resynchronisation is required, where no disk's record says so."""
        self._members = Membership(self, exclude)
        self._budget = Budget(hard_limit=hard_limit, soft_limit=soft_limit)
        self._left: list[TrackedDisk] = []
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
            names = self._members.present()
        except FileNotFoundError:
            raise NotFoundError(f"{self.folder}: no such VM folder") from None
        if not names:
            raise NotFoundError(f"{self.folder}: no disk (.vhd, .vhdx, .raw or .img) in it")
        try:
            for name in names:
                if name not in self._members.exclude:
                    self.disks[name] = self.open_disk(name)
            with self._rotation:
                self._resume()
        except BaseException:
            self.close()
            raise

    def check_alone(self, name: str) -> None:
        """Raises HvfuseError, OSError if the file can be written to past its log, or is no disk that can be tracked."""
        path = os.path.join(self.folder, name)
        status = os.lstat(path)
        if self.is_open((status.st_dev, status.st_ino)):
            raise BusyError(f"{path}: is open through the mount", hint="it is taken in once it is closed")
        refuse_other_ways_in(path)
        probe_for_tracking(path)

    def open_disk(self, name: str) -> TrackedDisk:
        """Open a disk to which there is no other way in. Raises HvfuseError, OSError."""
        self.check_alone(name)
        info = probe_for_tracking(os.path.join(self.folder, name))
        state = TrackingState(
            self.folder,
            name,
            address_space=address_space(info.format),
            region_size=region_size(greatest_size(info)),
        )
        try:
            return TrackedDisk(self.folder, info, self, state=state)
        except BaseException:
            state.close()
            raise

    def _resume(self) -> None:
        """Continue the generation if every disk allows it; else remember why not, durably."""
        disks = self.tracked()
        found = recovery.recover(disks, folder=self.folder, now_ns=self.clock.now_ns())
        self.recovered = found.report
        boot = system.boot_id()
        if found.scope is Scope.REGIONS:
            self._take_up_changes(found, disks)
        for disk, state in disks:
            changes: dict[str, Any] = {"scope": max(found.scope, state.record.scope)}
            if found.reason is not None:
                changes["disks_changed"] = found.disks_changed
            if found.scope is Scope.FULL:
                changes = resync.EVERYTHING
            elif found.scope is Scope.REGIONS and not resync.is_resyncing(disks):
                changes["disk_count"] = len(disks)
            state.update(detached_cleanly=False, boot_id=boot, resync_reason=found.reason, **changes)
            disk.marks_only = found.scope is Scope.REGIONS
            if found.reason is not None:
                # Where a sync has failed, also somebody else's, the page cache may show what is not on the disk.
                os.posix_fadvise(disk.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if disks:
            self._generation, self._cycle = disks[0][1].record.generation, disks[0][1].record.cycle
        self._count_sealed()
        if found.reason is None and self._generation != NOT_TRACKED:
            with contextlib.suppress(ResyncRequiredError):  # the disks are served all the same
                self._start_logs()
        if found.scope is Scope.NONE:
            history.sweep(self.folder, self.disks)

    def _take_up_changes(self, found: recovery.Finding, disks: list[Tracked]) -> None:
        """Mark the disks that changed or came, durably, before the others' state is the new one. Raises OSError."""
        assert found.reason is not None
        members = [(disk, state) for disk, state in disks if (disk, state) not in found.joining]
        if found.abandons:
            resync.abandon(members, found.reason)
        for disk in found.changed:
            disk.doubt_all()
        for each in found.joining:
            history.join(each, members, reason=found.reason, disks_changed=found.disks_changed, disk_count=len(disks))

    def _start_logs(self, copied: Scope = Scope.NONE) -> None:
        """First logs of this attachment, or of a generation that begins with a copy of scope `copied`.
        Raises ResyncRequiredError."""
        disks = self.tracked()
        self._prepare(self._cycle + 1)
        with self.gate:
            if not all(disk.is_prepared for disk, _ in disks):
                raise ResyncRequiredError(f"{self.name}: nothing can be logged: {self.resync_reason}")
            if copied is not Scope.NONE:
                self._start_comparing(copied)
            now = self.clock.now_ns()
            for disk, _ in disks:
                disk.switch(now_ns=now)

    def detach(self) -> None:
        """Seal what was written and record a clean detach. The mount is gone: nobody writes."""
        with self._rotation:
            if self.is_logging:
                with self.gate:
                    now = self.clock.now_ns()
                    for disk, _ in self.tracked():
                        disk.retire()
                with contextlib.suppress(ResyncRequiredError):  # the state says it durably
                    self._seal(now)
            for disk, state in self.tracked():
                disk.drop_logs()
                try:
                    disk.sync_image("detach:image", datasync=False)
                except OSError as error:
                    with self.gate:
                        self.degrade(f"{disk.name} could not be synced: {error.strerror}")
                    continue  # and it is not noted as detached cleanly
                if state.record.resync_reason is None:
                    resync.regions_of(disk).clear(HOT)
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
        for disk in (*self.disks.values(), *self._left):
            disk.close()
        self.disks, self._left = {}, []

    # Tracking ---------------------------------------------------------------------------------

    @property
    def is_logging(self) -> bool:
        """Whether writes are logged."""
        return any(disk.log is not None for disk in self.disks.values())

    @property
    def resync_reason(self) -> str | None:
        """Why a resynchronisation is required; None when it is not."""
        reasons = (state.record.resync_reason for _, state in self.tracked())
        return next((reason for reason in reasons if reason is not None), self.lost)

    def begin(self, generation: bytes, scope: Scope = Scope.FULL) -> None:
        """Begin a generation: from one instant on, all writes to all disks are logged, as cycle 1.

        A copy of the given scope is to follow; `resynced` says that the target has it. A copy under way is
        abandoned, and logs that the target has not acknowledged are given up; for scope REGIONS what either of
        them was for is compared by the new one. Idempotent for the generation in progress, also when its logs
        were lost during its copy. Raises OSError, UsageError (a generation that was in progress before),
        ResyncRequiredError (the scope is too narrow, or logging ended at once).
        """
        with self._rotation:
            disks = self.tracked()
            if not disks:
                raise NotFoundError(f"{self.name}: every disk is excluded from replication")
            if self._generation == generation:
                if self.is_logging or resync.is_resyncing(disks):
                    return
                raise UsageError(f"{self.name}: generation {generation.hex()} has begun before; it takes a new one")
            self._demand_enough(scope)
            # Until the new generation stands on disk for all disks, a death in here must not leave a
            # state that looks continuous: the reason stays until then.
            with self.gate:
                reason = self.resync_reason or "a new generation was being begun"
                self._degrade(reason, full=scope is Scope.FULL, disks_changed=resync.is_for_disks(disks))
                self._demand_enough(scope)
                resync.open_generation(disks, generation, scope)
            for disk, _ in disks:
                disk.drop_retired()
                disk.drop_strays()
            self._generation, self._cycle = generation, 0
            self._count_sealed()
            self._start_logs(scope)
            self._sync_images()
            with self.gate:
                self._require_logging()
                resync.start_copy(disks)
                self.lost = None

    def _demand_enough(self, scope: Scope) -> None:
        """Raises ResyncRequiredError if a copy of that scope would not bring the replica up."""
        if scope is Scope.REGIONS and resync.scope(self.tracked()) is Scope.FULL:
            reason = self.resync_reason or "a copy of everything is under way"
            raise ResyncRequiredError(f"{self.name}: the marked regions are not enough: {reason}")

    def _start_comparing(self, scope: Scope) -> None:
        """Caller holds the gate. Raises ResyncRequiredError."""
        self._demand_enough(scope)
        try:
            resync.start_comparing(self.tracked(), scope)
        except OSError as error:
            reason = f"a region map could not be written: {error.strerror}"
            self.degrade(reason, full=True)
            raise ResyncRequiredError(f"{self.name}: {reason}") from None

    def _sync_images(self) -> None:
        """What was written before the logs began is in no hot region, and the copy that follows takes it
        from the page cache: it must not be lost here once the replica has it. Raises ResyncRequiredError."""
        try:
            for disk, _ in self.tracked():
                disk.sync_image("begin:image")
        except OSError as error:
            self._give_up(f"an image could not be synced: {error.strerror}")

    def resynced(self, generation: bytes) -> None:
        """The target has the copy that began `generation`. If logs were lost during it, a resynchronisation of
        what was written since stays required. Idempotent. Raises OSError, UsageError."""
        with self._rotation:
            if generation != self._generation:
                raise UsageError(f"{self.name}: generation {generation.hex()} is not the one in progress")
            with self.gate:
                if resync.is_resyncing(self.tracked()):
                    resync.finish(self.tracked())
            history.sweep(self.folder, self.disks)

    def rotate(self, consistency: Consistency = Consistency.CRASH, *, proof: str | None = None) -> Rotation:
        """Seal the cycle in progress. When this returns, its logs are durable and in the spool.

        `consistency`: what the guest was brought to for this. `proof`: path of a file that goes before the guest
        moves again; where it is gone after the barrier, the cycle is crash-consistent whatever was asked for.
        Raises ResyncRequiredError when nothing is being logged.
        """
        with self._rotation:
            return self._rotate(consistency=consistency, proof=proof)

    def rotate_for(self, disk: TrackedDisk, new_size: int | None) -> None:
        """Rotate, and resize `disk` within the barrier: the new size belongs to the next cycle."""
        with self._rotation:
            if new_size is not None:
                with self.gate:
                    disk.about_to_resize(new_size)
            if disk.log is not None:
                # Where logging ends, durably noted, the guest's operation goes on without it.
                with contextlib.suppress(ResyncRequiredError):
                    self._rotate(resized=disk if new_size is not None else None, new_size=new_size or 0)
            if new_size is not None and disk.size() != new_size:
                with self.gate:
                    disk.about_to_resize(new_size)
                system.truncate("disk:truncate", disk.fd, new_size)

    def _rotate(
        self,
        *,
        resized: TrackedDisk | None = None,
        new_size: int = 0,
        consistency: Consistency = Consistency.CRASH,
        proof: str | None = None,
    ) -> Rotation:
        self._require_logging()
        disks = [disk for disk, _ in self.tracked()]
        self._prepare(self._cycle + 2)
        with self.gate:
            self._require_logging()
            started = time.perf_counter_ns()
            now = self.clock.now_ns()
            for disk in disks:
                disk.switch(now_ns=now, start_size=new_size if disk is resized else None)
            refused = self._resize_image(resized, new_size) if resized is not None else None
            barrier = time.perf_counter_ns() - started
        # Whoever asked may be dead by now, and the guest let go before the barrier: then the proof is gone.
        if proof is not None and not os.path.exists(proof):
            consistency = Consistency.CRASH
        self._seal(now, flags=APPLICATION if consistency is Consistency.APPLICATION else 0)
        if refused is not None:
            raise refused
        return Rotation(self._generation, self._cycle, now, barrier, consistency)

    def _prepare(self, cycle: int) -> None:
        try:
            for disk, _ in self.tracked():
                disk.prepare(generation=self._generation, cycle=cycle)
        except OSError as error:
            self._give_up(f"no log could be made: {error.strerror}")

    def _resize_image(self, disk: TrackedDisk, new_size: int) -> OSError | None:
        """Returns what refused the size, which the new log then does not claim. Caller holds the gate."""
        try:
            system.truncate("disk:truncate", disk.fd, new_size)
        except OSError as error:
            disk.resize_refused()
            return error
        return None

    def _seal(self, sealed_ns: int, *, flags: int = 0) -> None:
        """Seal all logs that were switched away from, then have the next ones stand by. `flags`: of the companions."""
        disks = self.tracked()
        try:
            for disk, _ in disks:
                disk.seal(sealed_ns=sealed_ns, disk_count=len(disks), flags=flags)
        except OSError as error:
            self._give_up(f"a log could not be sealed: {error.strerror}")
        self._cycle += 1
        self._count_sealed()
        with self.gate:
            self._settle()
        if self.is_logging:
            with contextlib.suppress(OSError):  # tried again, in earnest, when the next rotation needs it
                for disk, _ in disks:
                    disk.prepare(generation=self._generation, cycle=self._cycle + 2)

    def _settle(self) -> None:
        """Log and image of all disks are durable up to the last switch. Caller holds the gate."""
        try:
            for disk, _ in self.tracked():
                if disk.log is not None:
                    resync.regions_of(disk).settle()
        except OSError as error:
            self.degrade(f"a region map could not be written: {error.strerror}")

    def degrade(self, reason: str, *, full: bool = False) -> None:
        """Stop logging for all disks, durably; the guest's writes go on, and mark their regions unless
        a full resynchronisation is required anyhow. Caller holds the gate."""
        self._degrade(reason, full=full, disks_changed=False)

    def _degrade(self, reason: str, *, full: bool, disks_changed: bool) -> None:
        self.lost = reason
        scope = resync.lose_logs(self.tracked(), reason, full=full, disks_changed=disks_changed)
        for disk, _ in self.tracked():
            disk.marks_only = scope is Scope.REGIONS

    def end(self) -> None:
        """Replication of the VM was disabled: give the logs up. From now on nothing is logged or marked, and the disks
        are served all the same; should it be enabled again, everything is compared. Durable; idempotent."""
        with self._rotation:
            if self._generation == NOT_TRACKED:
                return
            with self.gate:
                self.degrade("replication was disabled", full=True)
            for disk, _ in self.tracked():
                disk.drop_retired()
                disk.drop_strays()  # of a process that was killed in here
            with contextlib.suppress(OSError):  # they take up room, and nothing else
                spool.clear(self.folder)
            self._count_sealed()

    # The set of disks -------------------------------------------------------------------------

    @property
    def generation(self) -> bytes:
        """The one in progress; zeroes before the first."""
        return self._generation

    def take_in(self) -> Settled:
        """Track the disks that came, as far as they have settled, and no more those that are excluded. Where a
        generation has begun, a resynchronisation of regions is required then. Waits for nothing. Raises OSError."""
        with self._rotation:
            return self._members.settle()

    def configure(self, *, exclude: frozenset[str], hard_limit: float, soft_limit: float) -> None:
        """Take new values of what the constructor was given. Limits hold at once; disks come and go as by `take_in`.
        Raises OSError."""
        with self._rotation:
            with self.gate:
                self._budget.set_limits(hard_limit=hard_limit, soft_limit=soft_limit)
                for disk, _ in self.tracked():
                    if disk.log is not None:
                        disk.log.budget_check = 0
            self._members.exclude = exclude
            self._members.settle()

    def hold(self, reason: str, *, only_if_unused: bool = False) -> bool:
        """Have all disks refuse every change; see `holding.hold`."""
        with self._rotation:
            return holding.hold(self, reason, only_if_unused=only_if_unused)

    def unhold(self) -> None:
        """The disks may be changed again. Idempotent."""
        with self._rotation, self.gate:
            self.held = None

    def stop_logging(
        self,
        stay: list[Tracked],
        joined: list[TrackedDisk],
        reason: str,
        *,
        full: bool,
        disks_changed: bool,
        disk_count: int,
    ) -> None:
        """Mark what the active logs of the disks that stay hold, and log no more: a generation of another set of disks
        has to begin. What was sealed stays, unless everything has to be compared (`full`). Caller holds the gate."""
        self.lost = reason
        scope = resync.lose_logs(
            stay, reason, full=full, sealed_stay=True, disks_changed=disks_changed, disk_count=disk_count
        )
        for disk in (*(disk for disk, _ in stay), *joined):
            disk.marks_only = scope is Scope.REGIONS

    def let_go(self, disk: TrackedDisk) -> None:
        """Track a disk no more. Caller holds `names` and the gate."""
        disk.leave()
        self._left = [each for each in self._left if each.open_handles] + [disk]

    def check_budget(self) -> None:
        """End logging if the logs must not grow any more; else say of each when this is to be asked again. Caller holds
        the gate."""
        disks = self.tracked()
        found = self._budget.look(disks)
        if isinstance(found, str):
            self.degrade(found)
            return
        for disk, _ in disks:  # also of idle ones, or theirs would be what it was when much was left
            if disk.log is not None:
                disk.log.budget_check = disk.log.stored + found

    def _count_sealed(self) -> None:
        """Look at what waits in the spool. A log that cannot be read is the shipper's to complain of."""
        with contextlib.suppress(HvfuseError, OSError):
            self._budget.sealed = sum(log.header.stored_bytes for log in spool.list_logs(self.folder))

    def _give_up(self, reason: str) -> NoReturn:
        with self.gate:
            self.degrade(reason)
        for disk, _ in self.tracked():
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
        """Recycle the sealed logs of `generation`, the one in progress, up to `cycle`, and those of all
        others. Raises UsageError, OSError."""
        with self._rotation:
            if generation != self._generation or not self.disks:
                raise UsageError(f"{self.name}: generation {generation.hex()} is not the one in progress")
            resync.acknowledge(self.tracked(), cycle)
            cycles = spool.list_cycles(self.folder)
            spool.release([c for c in cycles if c.generation != generation or c.cycle <= cycle])
            self._count_sealed()

    # Verification -----------------------------------------------------------------------------

    def touched(self, asked: Ranges) -> dict[str, Any]:
        """Which of the given ranges were written to, zeroed, trimmed or cut since the cycle in progress began, for
        the control socket: all that can be read of the images by now is accounted for.

        Raises ResyncRequiredError when nothing is being logged, UsageError for a disk that is not tracked.
        """
        with self._rotation:
            disks = self._disks_by_id(asked)
            with self.gate:
                self._require_logging()
                logs = {disk_id: disk.log for disk_id, disk in disks.items()}
                found = {disk_id: touched.covered(log) for disk_id, log in logs.items() if log is not None}
            answer = {disk_id: found[disk_id].among(asked[disk_id]) for disk_id in asked}
            return {
                "generation": self._generation.hex(),
                "cycle": self._cycle + 1,
                "disks": touched.as_field(answer),
            }

    def doubt(self, generation: bytes, reason: str, doubtful: Ranges) -> None:
        """The replica differs from the disks in these ranges, as somebody found: require that they are compared,
        and with them what the logs hold, which are given up. Durable when this returns.

        Raises UsageError for another generation than the one in progress, or a disk that is not tracked.
        """
        with self._rotation:
            disks = self._disks_by_id(doubtful)
            if generation != self._generation:
                raise UsageError(f"{self.name}: generation {generation.hex()} is not the one in progress")
            with self.gate:
                full = False
                try:
                    for disk_id, disk in disks.items():
                        disk.doubt(doubtful[disk_id])
                except OSError:
                    full = True
                self.degrade(reason, full=full)

    def _disks_by_id(self, wanted: Ranges) -> dict[bytes, TrackedDisk]:
        """Raises UsageError."""
        known = {state.record.disk_id: disk for disk, state in self.tracked()}
        for disk_id in wanted:
            if disk_id not in known:
                raise UsageError(f"{self.name}: no disk with the id {disk_id.hex()} is tracked")
        return {disk_id: known[disk_id] for disk_id in wanted}

    # What is told of it -----------------------------------------------------------------------

    def regions(self) -> dict[str, Any]:
        """What the copy under way compares with the replica, or, if there is none, what the required one has to;
        for the control socket: offsets and lengths in bytes."""
        with self.gate:
            return report.regions(self.tracked())

    def tracked(self) -> list[Tracked]:
        """The disks with their states."""
        return [(disk, disk.state) for disk in self.disks.values() if disk.state is not None]

    def status(self) -> dict[str, Any]:
        """What there is to know, for the control socket: JSON types, sizes in bytes."""
        disks, exclude = self.tracked(), self._members.exclude
        coming = self._members.coming()
        return {
            "vm": self.name,
            "generation": self._generation.hex() if self._generation != NOT_TRACKED else None,
            "cycle": self._cycle + 1,
            "logging": self.is_logging,
            "resync_required": self.resync_reason,
            **resync.status(disks),
            "recovered": self.recovered,
            "untracked": coming,
            "unsettled": sorted([*coming, *self._members.going()]),
            "excluded": [name for name in self._members.present() if name in exclude],
            "disks": report.tracked_status(disks),
            **self._budget.status(disks),
            **holding.status(self),
        }
