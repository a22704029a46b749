"""The set of a VM's tracked disks while it is mounted: disks are taken in and let go without a new mount.

A disk is taken in once it stands still and nobody has it open: whoever had it open through the mount would go on
writing past its log. A disk is let go as soon as it is excluded; who has it open goes on, past any log, and the mount
treats it as any other file from then on. Either happens in one step for whoever opens files through the mount, and for
whoever writes:

1. All logs are sealed, as a cycle of the disks that there were.
2. Under `names`, which every opening of a name through the mount takes, and the gate, which every write takes: a disk
   that goes is forgotten; one that comes is looked at again, marked as a whole, and joins (`hvfuse.tracker.history`);
   what was written since the cycle was sealed is marked, and logging ends. All of that is durable before anybody may
   go on.

A generation with the new set then begins as any other. Nothing of this happens while a copy is under way: a copy goes
by the set of disks with which it began.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvfuse.errors import BusyError, HvfuseError, ResyncRequiredError
from hvfuse.formats.image import is_disk_name
from hvfuse.formats.tracking import NOT_TRACKED, Scope
from hvfuse.tracker import history, resync
from hvfuse.tracker.disk import TrackedDisk
from hvfuse.tracker.resync import Tracked

if TYPE_CHECKING:
    from hvfuse.tracker.vm import TrackedVm

STILL_SECONDS = 3.0
"""So long a disk must not have changed before it is taken in."""

_Looks = tuple[int, int, int]
"""(inode, size in bytes, mtime in ns) of a file."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of disks that are to come or go. `waiting`: name to why not yet."""

    added: list[str]
    removed: list[str]
    waiting: dict[str, str]


class Membership:
    """Of one VM. `exclude`: names that are not to be tracked. The VM's `_rotation` guards it."""

    def __init__(self, vm: TrackedVm, exclude: frozenset[str]) -> None:
        self.exclude = exclude
        self._vm = vm
        self._seen: dict[str, tuple[_Looks, float]] = {}

    def present(self) -> list[str]:
        """Names of the disk files in the folder, in order. Raises OSError."""
        vm = self._vm
        names = (name for name in os.listdir(vm.folder) if is_disk_name(name))
        return sorted(name for name in names if os.path.isfile(os.path.join(vm.folder, name)))

    def coming(self) -> list[str]:
        """Disks that are to be tracked and are not."""
        return [name for name in self.present() if name not in self._vm.disks and name not in self.exclude]

    def going(self) -> list[str]:
        """Disks that are tracked and are to be so no more."""
        return sorted(name for name in self._vm.disks if name in self.exclude)

    def settle(self) -> Settled:
        """Let go and take in what can be now. Caller holds `_rotation`. Raises OSError."""
        vm, coming, going = self._vm, self.coming(), self.going()
        self._seen = {name: seen for name, seen in self._seen.items() if name in coming}
        if resync.is_resyncing(vm.tracked()):
            return Settled([], [], dict.fromkeys([*coming, *going], "a copy is under way"))
        waiting = {name: why for name in coming if (why := self._unsettled(name)) is not None}
        if going or len(waiting) < len(coming):
            with contextlib.suppress(ResyncRequiredError):  # then logging has ended, and that is noted
                if vm.is_logging:
                    vm.rotate()
            with vm.names, contextlib.ExitStack() as undo:
                newcomers = self._open([name for name in coming if name not in waiting], waiting, undo)
                with vm.gate:
                    self._change(going, newcomers)
                undo.pop_all()
            return Settled([disk.name for disk in newcomers], going, waiting)
        return Settled([], [], waiting)

    # Whether a disk may be taken in ---------------------------------------------------------------------------

    def _unsettled(self, name: str) -> str | None:
        """Why a disk cannot be taken in yet; None if it can."""
        try:
            status = os.lstat(os.path.join(self._vm.folder, name))
            if not self._stands_still(name, status):
                return "it has not stood still for long enough"
            self._vm.check_alone(name)
        except (HvfuseError, OSError) as error:
            return str(error)
        return None

    def _stands_still(self, name: str, status: os.stat_result) -> bool:
        """As observed by the calls so far; or as the file's ctime tells, which nobody can set back."""
        clock, looks = self._vm.clock, (status.st_ino, status.st_size, status.st_mtime_ns)
        now = clock.monotonic()
        before, since = self._seen.get(name, (None, now))
        if looks != before:
            since = now
        self._seen[name] = looks, since
        touched_ns = max(status.st_mtime_ns, status.st_ctime_ns)
        return now - since >= STILL_SECONDS or clock.now_ns() - touched_ns >= STILL_SECONDS * 1e9

    def _open(self, names: list[str], waiting: dict[str, str], undo: contextlib.ExitStack) -> list[TrackedDisk]:
        """Look again, now that nobody can open them through the mount, and open those that may be taken in; the others
        are added to `waiting`. Caller holds `names`, and closes them by `undo` should nothing come of it."""
        opened = []
        for name in names:
            try:
                status = os.lstat(os.path.join(self._vm.folder, name))
                if (status.st_ino, status.st_size, status.st_mtime_ns) != self._seen[name][0]:
                    raise BusyError(f"{name} has just changed")
                if not stat.S_ISREG(status.st_mode):
                    raise BusyError(f"{name} is no file any more")
                disk = self._vm.open_disk(name)
                undo.callback(disk.close)
                opened.append(disk)
            except (HvfuseError, OSError) as error:
                waiting[name] = str(error)
        return opened

    # The change -----------------------------------------------------------------------------------------------

    def _change(self, going: list[str], newcomers: list[TrackedDisk]) -> None:
        """Caller holds `names` and the gate. What cannot be noted has everything compared."""
        vm, before = self._vm, self._vm.tracked()
        after = {name: disk for name, disk in vm.disks.items() if name not in going}
        after |= {disk.name: disk for disk in newcomers}
        stay = [(disk, state) for disk, state in before if disk.name in after]
        self._note(before, stay, going, newcomers)
        for name in going:
            vm.let_go(vm.disks[name])
        vm.disks = dict(sorted(after.items()))

    def _note(self, before: list[Tracked], stay: list[Tracked], going: list[str], newcomers: list[TrackedDisk]) -> None:
        """Have the state on disk say what changes, in an order in which a death anywhere leaves enough marked."""
        vm = self._vm
        for disk, state in before:
            if disk.name in going:
                try:
                    state.forget()
                except OSError:
                    state.give_up()
        if not any(state.record.is_tracked for _, state in stay) or resync.scope(stay) is Scope.FULL:
            # The first copy, or one of everything, is still to come: what nobody knows is in it.
            if before and not stay and vm.generation != NOT_TRACKED:
                vm.lost = history.removed(going)
            return
        joining = [(disk, disk.state) for disk in newcomers if disk.state is not None]
        texts = [history.added([disk.name for disk in newcomers])] if newcomers else []
        texts += [history.removed(going)] if going else []
        reason, disks_changed = history.reason_with(stay, texts)
        count = len(stay) + len(joining)
        full = False
        for each in joining:
            try:
                history.join(each, stay, reason=reason, disks_changed=disks_changed, disk_count=count)
            except OSError:
                full = True
        vm.stop_logging(
            stay,
            [disk for disk, _ in joining],
            reason,
            full=full,
            disks_changed=disks_changed,
            disk_count=count,
        )
