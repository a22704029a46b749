"""Test failover: a recovery point as writable disks, and its cleanup.

A pin in the store is the record of a test failover: it holds the point back from merging, and its owner
says where the view is mounted and which process serves it. It is made first
and taken away last, so that a crash at any step, of any process or of the host, leaves something that
`clean_up` can finish.

    STORE/overlays/PIN/         what was written into the view
    STATE/views/PIN/view.sock   where the view's process answers; view.log: what it said

Ids of pins are a store's own. Where the store is another home's, it is STATE/views/STORE-PIN/, with a digest of the
store's path.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime

from hvfuse import mountpoint
from hvfuse.consistency import Consistency
from hvfuse.control.daemon import Daemon, command, start_and_wait, wait_for_end
from hvfuse.control.home import Home
from hvfuse.control.location import same
from hvfuse.control.supervisor import require_mountable
from hvfuse.errors import BusyError, NotFoundError, UnreachableError, UsageError
from hvfuse.manifest import RecoveryPoint
from hvfuse.system import Clock
from hvfuse.target.schema import Pin
from hvfuse.target.store import Store, holder_is_alive

KIND = "test-failover"
LATEST = "latest"
LATEST_APPLICATION = "latest-app-consistent"
END_SECONDS = 60.0


def overlay_path(store: Store, pin_id: int) -> str:
    """Where the writes into a view are kept."""
    return os.path.join(store.path, "overlays", str(pin_id))


def view_socket(home: Home, store: Store, pin_id: int) -> str:
    """Where the view's process answers."""
    return os.path.join(_view_state(home, store, pin_id), "view.sock")


def _view_state(home: Home, store: Store, pin_id: int) -> str:
    name = str(pin_id)
    if not same(store.path, home.store):
        name = f"{hashlib.blake2s(os.fsencode(os.path.realpath(store.path)), digest_size=4).hexdigest()}-{pin_id}"
    return os.path.join(home.state, "views", name)


def choose(points: Sequence[RecoveryPoint], wanted: str, *, vm: str) -> RecoveryPoint:
    """The recovery point that `wanted` names: "latest", "latest-app-consistent", an id, or a time (ISO 8601; local
    unless it says a zone), which means the last point not after it. Raises NotFoundError, UsageError."""
    if not points:
        raise NotFoundError(f"{vm} has no recovery point yet", hint=f"hvfuse replicate {vm}")
    if wanted == LATEST:
        return points[-1]
    if wanted == LATEST_APPLICATION:
        consistent = [point for point in points if point.consistency is Consistency.APPLICATION]
        if not consistent:
            raise NotFoundError(
                f"{vm} has no application-consistent recovery point", hint=f"hvfuse replicate {vm} --app-consistent"
            )
        return consistent[-1]
    for point in points:
        if point.id == wanted:
            return point
    try:
        instant_ns = _end_of(datetime.fromisoformat(wanted), has_fraction="." in wanted or "," in wanted)
    except ValueError:
        raise NotFoundError(f"{vm} has no recovery point {wanted}", hint=f"hvfuse point list {vm}") from None
    earlier = [point for point in points if point.time_ns <= instant_ns]
    if not earlier:
        first = datetime.fromtimestamp(points[0].time_ns // 10**9, UTC).isoformat()
        raise NotFoundError(f"{vm} has no recovery point before {wanted}; the first is of {first}")
    return earlier[-1]


def find_point(store: Store, vm: str, wanted: str) -> RecoveryPoint:
    """As `choose`, of the points in a store; the newest, or one of which the id is said, without a look at the others.
    Raises as `choose`."""
    if wanted == LATEST:
        return store.point(vm)
    with contextlib.suppress(NotFoundError):
        return store.point(vm, wanted)
    return choose(store.points(vm), wanted, vm=vm)


def _end_of(instant: datetime, *, has_fraction: bool) -> int:
    """The last nanosecond of what is named: a second, or, as points' times are shown, a millisecond."""
    micros = instant.microsecond if has_fraction else 999_999
    if micros % 1000 == 0:
        micros += 999
    return int(instant.replace(microsecond=0).timestamp()) * 10**9 + micros * 1000 + 999


def begin(home: Home, store: Store, point: RecoveryPoint, directory: str, *, clock: Clock) -> Pin:
    """Mount a view of `point` at `directory`, served in the background. Whole or not at all.

    Raises PrerequisiteError, BusyError (`directory` is in use), or what ended the view's process.
    """
    require_mountable()
    try:
        directory = mountpoint.check_mountpoint(directory)
    except BusyError as error:  # what is there may be in use: nobody should end it for the sake of a test
        raise BusyError(str(error), hint="choose another directory") from None
    pin_id = store.pin(point.vm, point.id, {"kind": KIND, "mountpoint": directory})
    try:
        os.makedirs(_view_state(home, store, pin_id), mode=0o700)
        daemon = Daemon(
            "view",
            command(home, "_view", store.path, str(pin_id)),
            socket_path=view_socket(home, store, pin_id),
            log_path=os.path.join(_view_state(home, store, pin_id), "view.log"),
            clock=clock,
        )
        start_and_wait(daemon, clock=clock)
        return find(store, pin_id)
    except BaseException:
        # Nothing was handed out yet, so whatever stands half-way is torn down without asking.
        clean_up(home, store, find(store, pin_id), force=True)
        raise


def find(store: Store, pin_id: int) -> Pin:
    """The test failover of that id. Raises NotFoundError."""
    for pin in store.pins():
        if pin.id == pin_id and pin.owner.get("kind") == KIND:
            return pin
    raise NotFoundError(f"there is no test failover {pin_id}", hint="hvfuse failover list")


def trials(store: Store, vm: str | None = None) -> list[Pin]:
    """The test failovers of one VM, or of all, oldest first."""
    return [pin for pin in store.pins(vm) if pin.owner.get("kind") == KIND]


def is_alive(pin: Pin) -> bool:
    """Whether the process that serves the view runs; a dead one that nobody has buried yet does not."""
    return holder_is_alive(pin) and not wait_for_end(int(pin.owner["pid"]), 0.0)


def clean_up(home: Home, store: Store, pin: Pin, *, force: bool = False) -> None:
    """Unmount a view, drop what was written into it, let its point go. May be repeated after any crash.

    Raises BusyError naming who uses the view (never with `force`), UnreachableError if its process
    does not end.
    """
    unmount(pin, force=force)
    drop_written(home, store, pin)
    store.unpin(pin.id)


def unmount(pin: Pin, *, force: bool) -> None:
    """The first step of `clean_up`; raises as it does."""
    directory = str(pin.owner["mountpoint"])
    if is_alive(pin) and int(pin.owner["pid"]) != os.getpid():
        if force:
            mountpoint.stop(directory)
        else:
            with contextlib.suppress(NotFoundError):  # unmounted by hand
                mountpoint.unmount(directory)
        if not wait_for_end(int(pin.owner["pid"]), END_SECONDS):
            raise UnreachableError(f"the view's process (pid {pin.owner['pid']}) does not end")
    mountpoint.clear_dead_mount(directory)


def drop_written(home: Home, store: Store, pin: Pin) -> None:
    """The second step of `clean_up`."""
    for path in (overlay_path(store, pin.id), _view_state(home, store, pin.id)):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


def parse_id(text: str) -> int:
    """A test failover's id as the user typed it. Raises UsageError."""
    if not text.isdecimal():
        raise UsageError(f"{text!r} is not the id of a test failover", hint="hvfuse failover list")
    return int(text)
