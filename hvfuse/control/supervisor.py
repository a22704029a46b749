"""`hvfuse run`: a tracker and a shipper for each VM, for as long as it runs.

One supervisor per home, by a lock that dies with it. When it dies itself, the processes live on (see
`hvfuse.control.daemon`), and the next supervisor adopts them. It ends them in an order that loses
nothing: first the shippers (what they had under way they take up again), then the trackers, which unmount,
seal what was written, and record a clean detach. A mount in use is never torn away, unless asked for
with force.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

from hvfuse import spool, system, wire
from hvfuse.control.arrivals import Arrivals
from hvfuse.control.daemon import Daemon, command, serving_pid
from hvfuse.control.events import Severity
from hvfuse.control.home import Home, name_fault
from hvfuse.control.records import Records, VmRecord
from hvfuse.control.sample import make_sample
from hvfuse.errors import BusyError, HvfuseError, NotFoundError, PrerequisiteError, UnreachableError
from hvfuse.formats.image import is_disk_name
from hvfuse.states import AFTER_FAILOVER, Event, ReplicationState
from hvfuse.system import Clock

NOT_SHIPPED = AFTER_FAILOVER | {ReplicationState.DISABLED}
"""States in which no shipper runs."""
SCAN_SECONDS = 2.0
"""How soon a new VM folder is noticed."""
TICK_SECONDS = 0.2
PROBE_SECONDS = 0.05
"""Far longer than `require_no_supervisor` holds the lock."""
SHIPPER_GRACE = 15.0
"""Seconds that a shipper has to end by itself; it may be killed at any time without loss."""
ASK_SECONDS = 1.0
"""How often a tracker whose mount is in use is asked again."""
_FORCE = 2
"""Asked so often, a mount is ended whoever uses it."""


def find_vms(home: Home) -> list[str]:
    """The VMs: folders directly in `disks` that hold at least one disk, or stand for a failover, and whose names will
    do."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(home.disks) as entries:
        for entry in entries:
            if name_fault(entry.name) is None and entry.is_dir() and (has_disk(entry.path) or is_standing(entry.path)):
                found.append(entry.name)
    return sorted(found)


def is_standing(folder: str) -> bool:
    """Whether the folder is that of a VM that was failed over to here, and whose disks are not hydrated yet."""
    return os.path.isdir(os.path.join(folder, spool.FAILOVER))


def has_disk(folder: str) -> bool:
    """Whether a folder holds a disk; false if there is none that can be read."""
    try:
        return any(is_disk_name(name) for name in os.listdir(folder))
    except OSError:
        return False


def _left_behind(home: Home) -> list[str]:
    """The VMs of which a process still lives, whether or not their folders are still there."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = [name for name in os.listdir(os.path.join(home.state, "vms")) if name_fault(name) is None]
    return sorted(vm for vm in names if _lives(home.tracker_socket(vm)) or _lives(home.shipper_socket(vm)))


def _lives(socket_path: str) -> bool:
    try:
        return serving_pid(socket_path) is not None
    except HvfuseError:  # it has more to do than it can answer
        return True
    except NotADirectoryError:
        return False


def tracker_daemon(home: Home, vm: str, *, clock: Clock) -> Daemon:
    """The VM's tracker as a background process."""
    return _daemon(home, vm, "tracker", home.tracker_socket(vm), clock)


def shipper_daemon(home: Home, vm: str, *, clock: Clock) -> Daemon:
    """The VM's shipper as a background process."""
    return _daemon(home, vm, "shipper", home.shipper_socket(vm), clock)


def _daemon(home: Home, vm: str, role: str, socket_path: str, clock: Clock) -> Daemon:
    return Daemon(
        role, command(home, f"_{role}", vm), socket_path=socket_path, log_path=home.log(vm, role), clock=clock
    )


@contextlib.contextmanager
def only_supervisor(home: Home) -> Iterator[None]:
    """Be the one supervisor of this home. Raises BusyError naming the pid of the other."""
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(system.exclusive_lock(home.run_lock)):
            time.sleep(PROBE_SECONDS)  # maybe somebody only asked
            if not stack.enter_context(system.exclusive_lock(home.run_lock)):
                raise _running_here(home)
        with open(home.run_lock, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
        yield


def require_no_supervisor(home: Home) -> None:
    """Raise BusyError naming the pid if `hvfuse run` is running on this home.

    Several may ask at once; none passes for a supervisor towards another, nor towards one that starts.
    """
    if system.is_locked(home.run_lock):
        raise _running_here(home)


def is_supervised(home: Home) -> bool:
    """Whether `hvfuse run` is running on this home."""
    try:
        require_no_supervisor(home)
    except BusyError:
        return True
    return False


def _running_here(home: Home) -> BusyError:
    with open(home.run_lock, encoding="ascii", errors="replace") as file:
        pid = file.read().strip() or "unknown"
    return BusyError(
        f"{home.root}: `hvfuse run` is running here already, with pid {pid}", hint=f"kill -INT {pid} ends it"
    )


def require_mountable() -> None:
    """Raise PrerequisiteError unless this process may mount. Whether libfuse is there, its binding says."""
    if os.geteuid() != 0:
        raise PrerequisiteError("mounting needs root", hint="use sudo")
    if not os.path.exists("/dev/fuse"):
        raise PrerequisiteError(
            "there is no /dev/fuse", hint="modprobe fuse; in a container, start it with --device /dev/fuse"
        )


def stop_tracker(home: Home, vm: str, *, timeout: float = 60.0) -> None:
    """Have a VM's tracker unmount, seal and end, as it then does. Raises BusyError naming who uses the mount,
    UnreachableError when the tracker does not answer."""
    try:
        wire.request(home.tracker_socket(vm), "stop", timeout=timeout, force=False)
    except NotFoundError:  # unmounted already: it is ending
        pass
    except UnreachableError:  # it may have ended before its answer was on the way
        if serving_pid(home.tracker_socket(vm)) is not None:
            raise


class Keeper:
    """The two processes of one VM."""

    def __init__(self, home: Home, vm: str, records: Records, *, tracker: Daemon, shipper: Daemon) -> None:
        self.vm = vm
        self.tracker = tracker
        self.shipper = shipper
        self.held_up: str | None = None
        """Why the tracker did not end when it was asked to last."""
        self._asking: threading.Thread | None = None
        self._home = home
        self._records = records
        self._record: VmRecord | None = None  # as of the last tick that could read it
        self._is_protected = True

    def tick(self) -> None:
        """Keep both alive; the shipper has nothing to do before the tracker first answered, and none is there for a VM
        that is not to be replicated: that one is mounted all the same, until somebody unmounts it."""
        with contextlib.suppress(HvfuseError):  # what cannot be read is as it was: the mount comes first
            self._record = self._records.read(self.vm)
            self._is_protected = self._record.state not in NOT_SHIPPED
        self.tracker.check()
        if not self.tracker.is_running and not self._is_to_be_mounted and not self.tracker.adopt():
            return
        self.tracker.tick()
        if not self._is_protected:
            self.stop_shipper(force=False)
        elif self.tracker.is_ready or self.shipper.is_running:
            self.shipper.tick()
        self._tell(self.tracker, lambda error, hint: {"tracker_error": error, "tracker_hint": hint})
        self._tell(self.shipper, lambda error, _: {"shipper_error": error})

    @property
    def _is_to_be_mounted(self) -> bool:
        """Whether the VM is to be mounted, if it is not. One that is shipped, held read-only, or failed over to here is
        not left to whoever unmounts it; one whose disks are on the move, or have gone, is left alone."""
        if self._record is not None and self._record.giving_way is not None:
            return False
        if self._record is not None and self._record.state is not ReplicationState.DISABLED:
            return True
        folder = self._home.folder(self.vm)
        return is_standing(folder) or (has_disk(folder) and not self.tracker.has_ended_well)

    def _tell(self, daemon: Daemon, fields: Callable[[str | None, str | None], dict[str, Any]]) -> None:
        """Record why a process failed, or that it serves, when that is news."""
        failure = daemon.failure
        if failure is None and not daemon.is_ready:
            return
        if isinstance(failure, BusyError) and daemon is self.tracker and self._is_served:
            return  # somebody else was quicker: that one is taken over as soon as it answers
        changes = fields(str(failure), failure.hint) if failure is not None else fields(None, None)
        if failure is None:
            changes[f"{daemon.name}_process"] = system.process_identity(daemon.pid)
        if self._record is None or any(getattr(self._record, name) != value for name, value in changes.items()):
            self._record = self._records.update(self.vm, **changes)
            self._records.events.add(
                kind="process",
                vm=self.vm,
                severity=Severity.INFO if failure is None else Severity.ERROR,
                text=f"the {daemon.name} runs, with pid {daemon.pid}" if failure is None else str(failure),
                data={"process": daemon.name, "pid": daemon.pid, "runs": failure is None},
                now_ns=time.time_ns(),
            )
            if failure is None and daemon is self.tracker and self.shipper.is_ready:
                # It may have asked the tracker in vain, and would try again by the ladder, in a minute at the earliest.
                threading.Thread(target=self._wake_shipper, name=f"wake:{self.vm}", daemon=True).start()

    @property
    def _is_served(self) -> bool:
        return system.is_locked(self._home.tracker_lock(self.vm))

    def _wake_shipper(self) -> None:
        with contextlib.suppress(HvfuseError):
            wire.request(self.shipper.socket_path, "wake", timeout=ASK_SECONDS)

    def stop_shipper(self, *, force: bool) -> None:
        """Ask the shipper to end, or kill it."""
        self.shipper.check()
        self.shipper.send(signal.SIGKILL if force else signal.SIGTERM)

    def stop_tracker(self, *, force: bool) -> None:
        """Ask the tracker to end; with `force`, to end the mount whoever uses it. Does not wait for an answer."""
        self.tracker.check()
        if not self.tracker.is_running:
            return
        if force or not _lives(self.tracker.socket_path):
            self.tracker.send(signal.SIGTERM)  # without its socket it has no mount yet, or none any more
        elif self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=self._ask_to_end, name=f"stop:{self.vm}", daemon=True)
            self._asking.start()

    def _ask_to_end(self) -> None:
        try:
            stop_tracker(self._home, self.vm)
            self.held_up = None
        except HvfuseError as error:
            self.held_up = str(error)


class Supervisor:
    """Keeps the processes of all VMs of a home alive. `tick` and `stop` are for one thread.

    `protects`: whether a VM of which nobody said anything is replicated. One that is not is mounted all the same, as a
    guest must start whether or not its disks are replicated.
    """

    def __init__(
        self,
        home: Home,
        records: Records,
        *,
        clock: Clock,
        tracker: Callable[..., Daemon] = tracker_daemon,
        shipper: Callable[..., Daemon] = shipper_daemon,
        protects: Callable[[str], bool] = lambda vm: True,
    ) -> None:
        self._home = home
        self._records = records
        self._clock = clock
        self._tracker = tracker
        self._shipper = shipper
        self._protects = protects
        self._keepers: dict[str, Keeper] = {}
        self._arrivals = Arrivals(home, clock=clock)
        self._sample: str | None = None
        self._scan_due: float | None = None
        """When to look for new folders; None before the first time."""
        for vm in _left_behind(home):
            self._keepers[vm] = self._keeper(vm)

    @property
    def vms(self) -> Mapping[str, Keeper]:
        """The VMs that are kept, by name."""
        return self._keepers

    def prepare(self) -> str | None:
        """Make the sample VM if there is none at all; returns its name if so."""
        self._sample = make_sample(self._home.disks) if not find_vms(self._home) else None
        return self._sample

    def tick(self) -> None:
        """Notice new VMs, keep every process alive.

        What goes wrong with one VM (a full disk, say) does not keep the others from their turn; the first
        such error is raised at the end.
        """
        failures: list[Exception] = []
        at_start = self._scan_due is None
        if self._scan_due is None or self._clock.monotonic() >= self._scan_due:
            self._scan_due = self._clock.monotonic() + SCAN_SECONDS
            with collected(failures):
                self._records.jobs.bury()
            for vm in find_vms(self._home):
                with collected(failures):
                    if vm not in self._keepers and self._may_take(vm, at_start=at_start):
                        self._keepers[vm] = self._keep(vm)
        for keeper in self._keepers.values():
            with collected(failures):
                keeper.tick()
        if failures:
            raise failures[0]

    def _may_take(self, vm: str, *, at_start: bool) -> bool:
        """Whether the folder is one that was taken up before, or our own, or a new one that is complete; not what is
        left of a VM that another side has now: its disks are to be mounted there when it comes home."""
        record = self._records.read(vm)
        is_left = record.gave_way_ns is not None and record.state is ReplicationState.DISABLED
        if is_left and record.enabled is None and not is_standing(self._home.folder(vm)):
            return False
        known = vm == self._sample or record.state is not ReplicationState.DISABLED or record.enabled is not None
        known = known or is_standing(self._home.folder(vm))
        return known or self._arrivals.is_settled(vm, at_start=at_start)

    def _keep(self, vm: str) -> Keeper:
        self._home.make_vm(vm)
        record = self._records.read(vm)
        is_new = record.state is ReplicationState.DISABLED and record.enabled is None and record.gave_way_ns is None
        if is_new and not is_standing(self._home.folder(vm)) and self._protects(vm):
            self._records.apply(vm, Event.ENABLE)
        return self._keeper(vm)

    def _keeper(self, vm: str) -> Keeper:
        """The keeper of the VM's processes; those that live already are adopted."""
        keeper = Keeper(
            self._home,
            vm,
            self._records,
            tracker=self._tracker(self._home, vm, clock=self._clock),
            shipper=self._shipper(self._home, vm, clock=self._clock),
        )
        for daemon in (keeper.tracker, keeper.shipper):
            with contextlib.suppress(HvfuseError):  # too busy to be told apart: the next tick tries again
                daemon.adopt()
        return keeper

    def stop(self, *, asked: Callable[[], int], tell: Callable[[str], None]) -> None:
        """End all processes: shippers, then trackers. Returns when none is left.

        `asked`: how often the user has asked to end; from the second time on mounts are ended whoever
        uses them, at the third time it is given up (BusyError). `tell` gets a line when there is news.
        All are asked at once: one that does not answer keeps neither the others nor the user waiting.
        """
        self._stop_shippers(hurry=lambda: asked() > 1)
        told: dict[str, str | None] = {}
        while (times := asked()) <= _FORCE:
            for keeper in self._keepers.values():
                keeper.stop_tracker(force=times >= _FORCE)
            if not self._await(ASK_SECONDS, "tracker", give_up=partial(_asked_again, asked, times)):
                return
            for keeper in self._keepers.values():
                reason = keeper.held_up if keeper.tracker.is_running else None
                if reason is not None and told.get(keeper.vm) != reason:
                    tell(f"{keeper.vm}: {reason}")
                told[keeper.vm] = reason
        left = [f"{vm} (pid {keeper.tracker.pid})" for vm, keeper in self._keepers.items() if keeper.tracker.is_running]
        raise BusyError(f"still running: the trackers of {', '.join(left)}", hint="hvfuse run takes them over again")

    def _stop_shippers(self, *, hurry: Callable[[], bool]) -> None:
        for keeper in self._keepers.values():
            keeper.stop_shipper(force=False)
        if self._await(SHIPPER_GRACE, "shipper", give_up=hurry):
            for keeper in self._keepers.values():
                keeper.stop_shipper(force=True)
            self._await(SHIPPER_GRACE, "shipper", give_up=lambda: False)

    def _await(self, seconds: float, role: Literal["tracker", "shipper"], *, give_up: Callable[[], bool]) -> bool:
        """Wait until no VM's process of that role runs. Returns whether one still does."""
        deadline = self._clock.monotonic() + seconds
        daemons = [keeper.tracker if role == "tracker" else keeper.shipper for keeper in self._keepers.values()]
        while True:
            for daemon in daemons:
                daemon.check()
            if not any(daemon.is_running for daemon in daemons):
                return False
            if self._clock.monotonic() >= deadline or give_up():
                return True
            self._clock.sleep(TICK_SECONDS / 4)


def _asked_again(asked: Callable[[], int], times: int) -> bool:
    return asked() > times


@contextlib.contextmanager
def collected(failures: list[Exception]) -> Iterator[None]:
    """Add what is raised to `failures` and go on, if it is something that can be foreseen."""
    try:
        yield
    except (HvfuseError, OSError) as error:
        failures.append(error)
