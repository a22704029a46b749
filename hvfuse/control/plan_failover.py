"""How a recovery plan fails a VM over: by `hvfuse failover`, in a process of its own for each VM.

The process has a lock of its VM for as long as it runs. It goes on when the plan's runner is killed, and the next one
waits for its end before it asks again: what was done meanwhile is found, and not done twice.

    HOME/tests/PLAN-RUN/VM         where a test failover of the plan shows its disks
    STATE/plans/plan.PLAN.lock     held by who runs the plan
    STATE/plans/vm.VM.lock         held by the process that fails the VM over
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hvfuse import errors, system
from hvfuse.control.daemon import command
from hvfuse.control.home import Home
from hvfuse.control.plan import Mode
from hvfuse.errors import BusyError, HvfuseError, StateError
from hvfuse.system import Clock

WAIT_SECONDS = 120.0
"""How long to wait for a process that a runner of before has left."""
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class VmStep:
    """A VM that is to be failed over. `directory`: where a test shows its disks. `first_ns`: when the run asked for it
    first, ns since 1970; `is_again`: whether it did so before."""

    plan: str
    run: int
    group: str
    vm: str
    mode: Mode
    point: str
    boot: bool
    directory: str
    first_ns: int
    is_again: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VmOutcome:
    """What a failover came to: the point's id and time (ns since 1970), and whatever else it told, JSON values."""

    point: str
    point_time_ns: int | None
    fields: Mapping[str, Any] = field(default_factory=dict)


FailOver = Callable[[VmStep], VmOutcome]
"""Fails a VM over, and returns when that is done, booted and validated. Idempotent: it may be asked again whatever has
become of it before. For any thread. Raises HvfuseError."""


def tests_directory(home: Home, plan: str, run: int) -> str:
    """Where a test run of a plan shows its VMs."""
    return os.path.join(home.root, "tests", f"{plan}-{run}")


def plans_state(home: Home) -> str:
    """The plans' part of the state directory, made if missing."""
    path = os.path.join(home.state, "plans")
    os.makedirs(path, mode=0o700, exist_ok=True)
    return path


class CommandFailOver:
    """`FailOver` by `hvfuse failover` of this home."""

    def __init__(self, home: Home, *, clock: Clock, standing: Callable[[str], Mapping[str, Any] | None]) -> None:
        """`standing`: the failover of a VM that this home has made, as the store tells it."""
        self._home = home
        self._clock = clock
        self._standing = standing

    def __call__(self, step: VmStep) -> VmOutcome:
        if step.mode is not Mode.TEST:
            return self._real(step)
        left = self._left(step) if step.is_again else None
        if left is not None and left["alive"] and not step.boot:
            return _outcome(left)
        if left is not None:  # not served, or nobody knows whether its guest was started
            self._run(step.vm, ("cleanup", step.vm, str(left["id"]), "--force"))
        words = ("test", step.vm, "--point", step.point, "--mount", step.directory)
        return _outcome(self._run(step.vm, (*words, *_boot(step))))

    def _real(self, step: VmStep) -> VmOutcome:
        point = ("--point", step.point) if step.mode is Mode.UNPLANNED else ()
        try:
            return _outcome(self._run(step.vm, (step.mode, step.vm, *point, *_boot(step), "--yes")))
        except StateError:
            standing = self._standing(step.vm) if step.is_again else None
            if standing is None or int(standing["since_ns"]) < step.first_ns:
                raise
            return VmOutcome(point=str(standing["point"]), point_time_ns=standing.get("point_ns"), fields=standing)

    def cleanup(self, plan: str, run: int, *, force: bool, note: str) -> list[dict[str, Any]]:
        """End the test failovers that a run made. Returns them as `hvfuse failover` tells of them. Raises HvfuseError
        at the first that cannot be ended; may be repeated."""
        directory = tests_directory(self._home, plan, run)
        ended = []
        for vm in _names(directory):
            with self._lock(vm):
                for found in self._tests(vm, os.path.join(directory, vm)):
                    options = ("--note", note, *(("--force",) if force else ()))
                    self._answer(("cleanup", vm, str(found["id"]), *options))
                    ended.append(found)
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(directory, vm))
        for path in (directory, os.path.dirname(directory)):
            with contextlib.suppress(OSError):  # others' tests are there
                os.rmdir(path)
        return ended

    def _left(self, step: VmStep) -> dict[str, Any] | None:
        """The test that an attempt of before has left."""
        with self._lock(step.vm):
            return next(iter(self._tests(step.vm, step.directory)), None)

    def _tests(self, vm: str, directory: str) -> list[dict[str, Any]]:
        tests = self._answer(("list", vm))["tests"]
        real = os.path.realpath(os.path.dirname(directory))
        return [each for each in tests if each["mountpoint"] in (directory, os.path.join(real, vm))]

    def _run(self, vm: str, words: Sequence[str]) -> dict[str, Any]:
        """As `_answer`, while nobody else does that with the VM."""
        with self._lock(vm) as fd:
            return self._answer(words, lock=fd)

    def _answer(self, words: Sequence[str], *, lock: int | None = None) -> dict[str, Any]:
        """Run `hvfuse failover`; what it told. `lock`: a descriptor that it keeps. Raises HvfuseError as the command
        did."""
        done = subprocess.run(
            [*command(self._home, "failover", *words), "--json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,  # Ctrl-C ends the plan once the failover is through
            pass_fds=() if lock is None else (lock,),
            cwd="/",
            check=False,
        )
        try:
            told = json.loads(done.stdout)
        except ValueError:
            told = None
        if isinstance(told, dict) and done.returncode == 0:
            return told
        raise _error(told, done.returncode, done.stderr.decode(errors="replace").strip())

    @contextlib.contextmanager
    def _lock(self, vm: str) -> Iterator[int]:
        path = os.path.join(plans_state(self._home), f"vm.{vm}.lock")
        deadline = self._clock.monotonic() + WAIT_SECONDS
        while True:
            with system.inheritable_lock(path) as fd:
                if fd is not None:
                    yield fd
                    return
            if self._clock.monotonic() > deadline:
                raise BusyError(
                    f"{vm}: the failover that was begun before is still under way", hint="hvfuse job list " + vm
                )
            self._clock.sleep(_LOOK_SECONDS)


def _boot(step: VmStep) -> tuple[str, ...]:
    return ("--boot",) if step.boot else ()


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def _outcome(told: Mapping[str, Any]) -> VmOutcome:
    """From what `hvfuse failover` told."""
    fields = {key: value for key, value in told.items() if key not in ("output_version", "vm")}
    time_ns = None
    if isinstance(told.get("time"), str):
        time_ns = round(datetime.fromisoformat(told["time"]).timestamp() * 1000) * 10**6
    return VmOutcome(point=str(told["point"]), point_time_ns=time_ns, fields=fields)


def _error(told: Any, code: int, said: str) -> HvfuseError:
    """The exception that ended the command, as one of its kind."""
    fault = told.get("error") if isinstance(told, dict) else None
    if not isinstance(fault, dict):
        return HvfuseError(f"hvfuse failover ended with exit code {code}: {said[-300:] or 'it said nothing'}")
    kind = getattr(errors, str(fault.get("type")), HvfuseError)
    if not (isinstance(kind, type) and issubclass(kind, HvfuseError)):
        kind = HvfuseError
    return kind(str(fault.get("message")), hint=fault.get("hint"))
