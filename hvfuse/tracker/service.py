"""The tracker's process: attach, answer on the control socket, serve the mount, detach.

The main thread belongs to FUSE; one thread of the control socket takes requests (`hvfuse.wire`):

    status                          -> `TrackedVm.status`, and "mountpoint", "pid". Of it, "held": why the disks refuse
                                       changes, or null; "open_disks": number of handles on disks
    regions                         -> "scope", "disks": what the copy under way, or required, compares
    begin    generation, scope      -> begin a generation; as status. scope: "full" (default), "regions"
    resynced generation             -> {}; the target has the copy that began it
    rotate   consistency, proof     -> "generation", "cycle", "sealed_ns", "barrier_ns", "consistency".
                                       consistency: "crash" (default), "application": the guest stands still as
                                       long as there is a file at the path `proof` (None: it certainly does)
    release  generation, cycle      -> {}
    touched  disks                  -> "generation", "cycle", "disks": what of them the cycle in progress changed
    doubt    generation, reason,    -> {}; the replica was found to differ there: a resynchronisation is
             disks                     required, of this and of what the logs held
    take_in                         -> "added", "removed", "waiting": disks that came or were excluded, and why not yet
    configure exclude, hard_limit,  -> {}; new values of what the process was started with
              soft_limit
    end                             -> {}; replication was disabled: nothing is logged or marked any more
    hold     reason,                -> {}; all disk files refuse every change (EROFS) until `unhold`; a second
             only_if_unused            one replaces the reason. only_if_unused (default false): BusyError naming who
                                       has disks open through the mount, if anybody has
    unhold                          -> {}; also if it was not held
    stop     force (default false)  -> {}; BusyError while somebody uses the mount, unless forced

In "touched" and "doubt", "disks" is {disk id, hexadecimal: [[offset, length], ...]}, in bytes.

When the mount is gone, however that came about, the logs are sealed and a clean detach is recorded.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable
from typing import Any

from hvfuse import wire
from hvfuse.consistency import Consistency
from hvfuse.errors import BusyError, UsageError
from hvfuse.formats.tracking import Scope
from hvfuse.mountpoint import check_mountpoint, clear_dead_mount, stop, unmount
from hvfuse.tracker import holding, touched
from hvfuse.tracker.budget import HARD_LIMIT, SOFT_LIMIT
from hvfuse.tracker.mount import serve
from hvfuse.tracker.vm import TrackedVm

SOCKET_NAME = "tracker.sock"

_CLOSING = 2.0
"""Seconds that a handle may take to be closed which no process has any more: the kernel tells us later."""
_LOOK_AGAIN = 0.02

_CONSISTENCIES = {each.name.lower(): each for each in Consistency}


def run_tracker(
    *,
    vm: str,
    folder: str,
    mountpoint: str,
    state_dir: str,
    exclude: frozenset[str],
    hard_limit: float = HARD_LIMIT,
    soft_limit: float = SOFT_LIMIT,
    disabled: bool = False,
    held: str | None = None,
) -> None:
    """Serve one VM until it is unmounted or told to stop. Blocks; belongs in the main thread.

    `hard_limit`: part of the disks' size that logs may take before they are given up; `soft_limit`: the same while
    a copy is under way. `disabled`: replication was ended, and whoever did it may not have come to say so here.
    `held`: why the disks are to refuse every change from the start, if they are.

    Raises NotFoundError, BusyError, CorruptError, UnsupportedError or PrerequisiteError before
    anything is mounted.
    """
    clear_dead_mount(mountpoint)
    check_mountpoint(mountpoint)
    tracked = TrackedVm(vm, folder, exclude=exclude, hard_limit=hard_limit, soft_limit=soft_limit)
    tracked.attach()
    if disabled:
        tracked.end()
    if held is not None:
        tracked.hold(held)
    control = TrackerControl(tracked, mountpoint)
    listener: wire.Listener | None = None

    def ready() -> None:
        # Only now, so that whoever gets an answer finds the VM mounted.
        nonlocal listener
        listener = wire.Listener(os.path.join(state_dir, SOCKET_NAME), control.handle, name="control")
        # What exists now lives as long as the process: the collector need not look at it again,
        # least of all in the middle of a guest's write.
        gc.collect()
        gc.freeze()

    try:
        serve(tracked, folder=tracked.folder, mountpoint=mountpoint, on_ready=ready)
    finally:
        # The socket goes last: where it is gone, the disks are free.
        tracked.detach()
        if listener is not None:
            listener.close()


class TrackerControl:
    """Answers the control socket's requests. Handlers never overlap (`wire.Listener`)."""

    def __init__(self, vm: TrackedVm, mountpoint: str) -> None:
        self._vm = vm
        self._mountpoint = mountpoint

        self._answers: dict[str, Callable[[wire.Message], dict[str, Any]]] = {
            "status": lambda request: self._status(),
            "regions": lambda request: vm.regions(),
            "begin": self._begin,
            "resynced": self._resynced,
            "rotate": self._rotate,
            "release": self._release,
            "touched": lambda request: vm.touched(touched.ranges(request.get("disks"))),
            "doubt": self._doubt,
            "take_in": lambda request: dataclasses.asdict(vm.take_in()),
            "configure": self._configure,
            "end": self._end,
            "hold": self._hold,
            "unhold": self._unhold,
            "stop": self._stop,
        }

    def handle(self, request: wire.Message) -> dict[str, Any]:
        """One request. Raises HvfuseErrors, which travel to the other side."""
        answer = self._answers.get(str(request.get("op")))
        if answer is None:
            raise UsageError(f"the tracker knows no request {request.get('op')!r}")
        return answer(request)

    def _begin(self, request: wire.Message) -> dict[str, Any]:
        scope = Scope.REGIONS if request.get("scope") == "regions" else Scope.FULL
        self._vm.begin(_generation(request), scope)
        return self._status()

    def _resynced(self, request: wire.Message) -> dict[str, Any]:
        self._vm.resynced(_generation(request))
        return {}

    def _rotate(self, request: wire.Message) -> dict[str, Any]:
        consistency, proof = request.get("consistency", "crash"), request.get("proof")
        if consistency not in _CONSISTENCIES:
            raise UsageError(f"a cycle is one of {', '.join(_CONSISTENCIES)}, not {consistency!r}")
        if proof is not None and not isinstance(proof, str):
            raise UsageError("a proof is the path of a file")
        rotation = self._vm.rotate(_CONSISTENCIES[consistency], proof=proof)
        return {
            "generation": rotation.generation.hex(),
            "cycle": rotation.cycle,
            "sealed_ns": rotation.sealed_ns,
            "barrier_ns": rotation.barrier_ns,
            "consistency": rotation.consistency.name.lower(),
        }

    def _release(self, request: wire.Message) -> dict[str, Any]:
        self._vm.release(_generation(request), int(request["cycle"]))
        return {}

    def _doubt(self, request: wire.Message) -> dict[str, Any]:
        reason = request.get("reason")
        if not isinstance(reason, str) or not reason:
            raise UsageError("a doubt needs a reason, in words")
        self._vm.doubt(_generation(request), reason, touched.ranges(request.get("disks")))
        return {}

    def _configure(self, request: wire.Message) -> dict[str, Any]:
        exclude, hard, soft = (request.get(field) for field in ("exclude", "hard_limit", "soft_limit"))
        if not isinstance(exclude, list) or not all(isinstance(name, str) for name in exclude):
            raise UsageError("exclude is a list of names")
        if not isinstance(hard, int | float) or not isinstance(soft, int | float) or min(hard, soft) <= 0:
            raise UsageError("hard_limit and soft_limit are parts of the disks' size, above 0")
        self._vm.configure(exclude=frozenset(exclude), hard_limit=hard, soft_limit=soft)
        return {}

    def _end(self, _request: wire.Message) -> dict[str, Any]:
        self._vm.end()
        return {}

    def _hold(self, request: wire.Message) -> dict[str, Any]:
        reason, only_if_unused = request.get("reason"), request.get("only_if_unused", False)
        if not isinstance(reason, str) or not reason:
            raise UsageError("a hold needs a reason, in words")
        if not isinstance(only_if_unused, bool):
            raise UsageError("only_if_unused is true or false")
        vm, begun = self._vm, self._vm.clock.monotonic()
        if not only_if_unused:  # as who has mapped a disk uses it
            holding.write_back(vm, self._mountpoint)
        while not vm.hold(reason, only_if_unused=only_if_unused):
            users = holding.users(vm, self._mountpoint)
            if users or vm.clock.monotonic() - begun > _CLOSING:
                names = ", ".join(map(str, users)) or "a process that cannot be seen from here"
                raise BusyError(f"{vm.name}: its disks are in use by {names}", hint="shut the VM down, then try again")
            vm.clock.sleep(_LOOK_AGAIN)
        return {}

    def _unhold(self, _request: wire.Message) -> dict[str, Any]:
        self._vm.unhold()
        return {}

    def _stop(self, request: wire.Message) -> dict[str, Any]:
        (stop if request.get("force") else unmount)(self._mountpoint)
        return {}

    def _status(self) -> dict[str, Any]:
        return {**self._vm.status(), "mountpoint": self._mountpoint, "pid": os.getpid()}


def _generation(request: wire.Message) -> bytes:
    try:
        generation = bytes.fromhex(str(request.get("generation")))
    except ValueError:
        generation = b""
    if len(generation) != 16 or not any(generation):
        raise UsageError("a generation is 32 hexadecimal digits")
    return generation
