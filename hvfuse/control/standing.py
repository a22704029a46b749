"""The process of a failed-over VM: it serves a recovery point, and then, tracked, the plain disks that this becomes.

The main thread belongs to FUSE. One thread of the control socket takes requests (`hvfuse.wire`): before the switch

    status                          -> what a tracker without a disk would say, and "standing": true,
                                       "hydration": {"state", "done", "total", "error"}, "mountpoint", "pid"
    end                             -> {}; there is nothing that could be logged or marked
    stop     force                  -> as a tracker

and afterwards all that `hvfuse.tracker.service` knows; "standing" is false then. One more thread, "hydration", asks
whether the failover has been committed, copies up (`hvfuse.target.hydration`) and switches. The switch, within which no
request runs: flush, mark, rename (`hvfuse.target.standing`), attach a `TrackedVm`, and open again what clients
hold (`hvfuse.switching`).

Whatever fails before the renames is told, and tried again. Where the disks cannot be tracked afterwards, they are
served as plain files, and the next start tries again: nothing has been logged of them yet that could be lost.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hvfuse import fuse, wire
from hvfuse.errors import HvfuseError, StateError
from hvfuse.filesystem import Filesystem
from hvfuse.manifest import DiskManifest
from hvfuse.mountpoint import check_mountpoint, clear_dead_mount
from hvfuse.switching import Switching
from hvfuse.system import fsync_directory
from hvfuse.target import standing
from hvfuse.target.hydration import RETRY_SECONDS, Hydration, HydrationState, Progress
from hvfuse.target.view import Point, View, ViewDisk
from hvfuse.target.view_mount import ViewFilesystem
from hvfuse.tracker import resync
from hvfuse.tracker.budget import HARD_LIMIT, SOFT_LIMIT
from hvfuse.tracker.mount import VmFolder
from hvfuse.tracker.service import TrackerControl
from hvfuse.tracker.vm import TrackedVm

POLL_SECONDS = 1.0
"""How often it is asked whether the failover has been committed."""

_log = logging.getLogger(__name__)


def serve_standing(
    *,
    vm: str,
    folder: str,
    mountpoint: str,
    socket_path: str,
    point_reader: Callable[[], Point],
    committed: Callable[[], bool],
    hydrated: Callable[[], None],
    tell: Callable[[Progress], None] = lambda progress: None,
    attached: Callable[[TrackedVm], None] = lambda tracked: None,
    exclude: frozenset[str] = frozenset(),
    hard_limit: float = HARD_LIMIT,
    soft_limit: float = SOFT_LIMIT,
    poll_seconds: float = POLL_SECONDS,
    retry_seconds: float = RETRY_SECONDS,
) -> None:
    """Serve a failed-over VM until it is unmounted or told to stop. Blocks; belongs in the main thread.

    `point_reader` opens the point; it is not called, and what is served are plain disks, where these were complete
    before. `committed`: whether overlays may become disks; asked until it says yes, then never again. `hydrated` has to
    note durably that the VM has plain disks; it may be called again after a crash, until nothing is left of the
    overlays. Whoever starts the VM's process starts this one as long as `hvfuse.target.standing.stands`. `tell` is told
    of progress, about every 5 seconds; `attached` is called within the switch, with the VM as it is tracked from there
    on. These four are called in threads of their own, one at a time; what `committed`, `hydrated` and `tell` raise
    (HvfuseError, OSError) is logged, and they are called again.

    Raises BusyError (the folder holds disks of its own, which it names; another process serves it; the mount point is
    in use), UsageError (the overlays belong to another point), and what `point_reader` or `TrackedVm.attach` raises,
    before anything is mounted.
    """
    clear_dead_mount(mountpoint)
    check_mountpoint(mountpoint)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    with standing.serving(folder) as fd:
        tracked = TrackedVm(vm, folder, exclude=exclude, hard_limit=hard_limit, soft_limit=soft_limit)
        told = _Told(committed=committed, hydrated=hydrated, tell=tell, attached=attached)
        serving = _Standing(tracked, fd, point_reader, told, poll_seconds=poll_seconds, retry_seconds=retry_seconds)
        control = StandingControl(serving, mountpoint)
        listener: wire.Listener | None = None

        def ready() -> None:
            # Only now, so that whoever gets an answer finds the VM mounted.
            nonlocal listener
            listener = wire.Listener(socket_path, control.handle, name="control")
            serving.start()

        try:
            fuse.mount(serving.filesystem, mountpoint, on_ready=ready)
        finally:
            # The socket goes last: where it is gone, the disks are free.
            serving.end()
            if listener is not None:
                listener.close()


@dataclass(frozen=True, slots=True)
class _Told:
    """The callbacks of `serve_standing`."""

    committed: Callable[[], bool]
    hydrated: Callable[[], None]
    tell: Callable[[Progress], None]
    attached: Callable[[TrackedVm], None]


class _Standing:
    """What is served, and the thread that makes plain disks of it. The caller has the folder, `fd`, for itself.

    `is_tracked` is set once, when the VM's disks are tracked."""

    def __init__(
        self,
        tracked: TrackedVm,
        fd: int,
        point_reader: Callable[[], Point],
        told: _Told,
        *,
        poll_seconds: float,
        retry_seconds: float,
    ) -> None:
        self.tracked = tracked
        self.is_tracked = False
        self.filesystem: Filesystem
        self._fd = fd
        self._folder = tracked.folder
        self._told = told
        self._poll_seconds = poll_seconds
        self._retry_seconds = retry_seconds
        self._stop = threading.Event()
        self._untracked_because: str | None = None
        self._view: View | None = None
        self._switching: Switching | None = None
        self._shown: ViewFilesystem | None = None
        self._disks: list[dict[str, Any]] = []
        if standing.is_complete(self._folder):
            self._take_up_complete()
        else:
            self._stand(point_reader)
        self._thread = threading.Thread(target=self._run, name="hydration", daemon=True)

    def _take_up_complete(self) -> None:
        """A process that died had made plain disks of the overlays, or had begun to."""
        standing.put_in_place(self._folder)
        self.tracked.attach()
        self._told.attached(self.tracked)
        self.is_tracked = True
        self.filesystem = VmFolder(self._fd, self.tracked)
        self.hydration = self._hydration({})

    def _stand(self, point_reader: Callable[[], Point]) -> None:
        standing.refuse_own_disks(self._folder)
        point = point_reader()
        self._view = view = View(point, overlays=standing.overlays(self._folder))
        try:
            fsync_directory("standing:overlays", standing.overlays(self._folder))
            fsync_directory("standing:folder", self._folder)
        except BaseException:
            view.close()
            raise
        self._disks = [_untracked_status(disk) for disk in point.disks]
        self._shown = ViewFilesystem(view)
        self.filesystem = self._switching = Switching(self._shown)
        self.hydration = self._hydration(view.disks)

    def _hydration(self, disks: Mapping[str, ViewDisk]) -> Hydration:
        directory = standing.overlays(self._folder)
        return Hydration(disks.values(), directory, tell=self._told.tell, retry_seconds=self._retry_seconds)

    def start(self) -> None:
        """The mount is served."""
        self._thread.start()
        _settle_memory()

    def end(self) -> None:
        """The mount is gone: nobody writes. Raises OSError."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self.is_tracked:
            self.tracked.detach()
        elif self._view is not None:
            self._view.close()

    @property
    def disks(self) -> list[dict[str, Any]]:
        """The disks that are not tracked yet, as a tracker would tell of them, with their sizes now."""
        view = self._view
        shown = {} if view is None else dict(view.disks)
        return [{**disk, "size": shown[disk["name"]].size} for disk in self._disks if disk["name"] in shown]

    # The thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error = None
        if self._switching is not None:
            if not self._may_begin():
                return
            while not (self.hydration.run(self._stop) and self._completes(self._switching)):
                if self._stop.is_set():
                    return
            error = self._untracked_because
            _settle_memory()
        self.hydration.note(HydrationState.DONE, error=error)
        self._tell_hydrated(error)

    def _may_begin(self) -> bool:
        """Wait until the failover is committed; whether it is."""
        while not self._stop.is_set():
            try:
                if self._told.committed():
                    return True
            except (HvfuseError, OSError) as error:
                _log.warning("whether the failover is committed cannot be found out: %s", error)
            self._stop.wait(self._poll_seconds)
        return False

    def _tell_hydrated(self, untracked: str | None) -> None:
        while not self._stop.is_set():
            try:
                self._told.hydrated()
                standing.clean_up(self._folder)
                return
            except (HvfuseError, OSError) as error:
                _log.warning("that the VM has plain disks could not be noted: %s", error)
                self.hydration.note(HydrationState.DONE, error=untracked or str(error))
                self._stop.wait(self._retry_seconds)

    def _completes(self, switching: Switching) -> bool:
        """Switch, unless there is more to copy by now. Returns whether it has switched."""
        try:
            with switching.standstill():
                began = time.perf_counter()
                if not self.hydration.is_complete():
                    return False
                self._put_in_place()
                # From here on nothing may fail: the guest goes on with what has been put in place.
                self._let_go_of_view()
                self._untracked_because = self._attach()
                switching.switch(VmFolder(self._fd, self.tracked))
            _log.info("%s: switched to plain disks in %.3f s", self._folder, time.perf_counter() - began)
            return True
        except (HvfuseError, OSError) as error:
            self.hydration.pause(error, self._stop)
            return False

    def _put_in_place(self) -> None:
        """Raises HvfuseError, OSError; the view serves its files wherever they are."""
        assert self._view is not None and self._shown is not None
        for disk in self._view.disks.values():
            disk.flush_behind()
        if not standing.is_complete(self._folder):
            standing.refuse_own_disks(self._folder)
            for name, (mode, owner) in self._shown.attributes().items():
                path = os.path.join(standing.overlays(self._folder), f"{name}.data")
                os.chown(path, *owner)
                os.chmod(path, mode)
            standing.mark_complete(self._folder)
        standing.put_in_place(self._folder)

    def _let_go_of_view(self) -> None:
        """All is flushed. While a descriptor could write to the disks, they could not be tracked."""
        view, self._view = self._view, None
        assert view is not None
        try:
            view.close()
        except OSError as error:
            _log.error("%s: %s", self._folder, error)

    def _attach(self) -> str | None:
        """Track the disks; why they cannot be, if they cannot."""
        try:
            self.tracked.attach()
            self.is_tracked = True
            self._told.attached(self.tracked)
        except Exception as error:  # whatever it is, the guest has to go on
            _log.exception("%s: the disks are served, and not tracked", self._folder)
            return f"the disks cannot be tracked: {error}"
        return None


def _settle_memory() -> None:
    """What exists now lives as long as the process, see `hvfuse.tracker.service`."""
    gc.collect()
    gc.freeze()


def _untracked_status(disk: DiskManifest) -> dict[str, Any]:
    """As `hvfuse.tracker.report.tracked_status`, but for the size."""
    nothing = dict.fromkeys(("log_bytes", "log_entries", "open_handles", "resync_bytes"), 0)
    return {"name": disk.name, "disk_id": disk.disk_id.hex(), "format": disk.format, **nothing}


class StandingControl:
    """Answers the control socket's requests. Handlers never overlap (`wire.Listener`)."""

    def __init__(self, serving: _Standing, mountpoint: str) -> None:
        self._serving = serving
        self._mountpoint = mountpoint
        self._tracker = TrackerControl(serving.tracked, mountpoint)

    def handle(self, request: wire.Message) -> dict[str, Any]:
        """One request. Raises HvfuseErrors, which travel to the other side."""
        serving, op = self._serving, request.get("op")
        if op == "status":
            return self._status()
        if serving.is_tracked or op == "stop":
            return self._tracker.handle(request)
        if op == "end":
            return {}
        raise StateError(
            f"{serving.tracked.name} is served from a recovery point: it is tracked once it has disks of its own",
            hint=f"hvfuse status {serving.tracked.name}",
        )

    def _status(self) -> dict[str, Any]:
        serving, progress = self._serving, self._serving.hydration.progress
        told = {"standing": not serving.is_tracked, "hydration": {**asdict(progress), "state": progress.state.value}}
        if serving.is_tracked:
            return {**self._tracker.handle({"op": "status"}), **told}
        return {
            "vm": serving.tracked.name,
            "generation": None,
            "cycle": 0,
            "logging": False,
            "resync_required": None,
            "recovered": None,
            **resync.status([]),
            "untracked": [],
            "unsettled": [],
            "excluded": [],
            "disks": serving.disks,
            "mountpoint": self._mountpoint,
            "pid": os.getpid(),
            **told,
        }
