"""Boots guests on disks that were failed over, and ends them.

A boot may die at any step and be begun again: exactly one guest runs then. What is durable before the next step begins:

    check → before_boot hook → record "meant" → start → record "started" → it answers → after_boot hook → "booted"

A guest of which the record says "meant" may run or not; its token tells. Hooks may run twice.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hvfuse import system
from hvfuse.control import guest_record
from hvfuse.control.config import VmPolicy
from hvfuse.control.guest_command import Verdict, run_command
from hvfuse.control.guest_libvirt import LibvirtGuest
from hvfuse.control.guest_plan import BootPlan, Kind, plan_boot
from hvfuse.control.guest_qemu import QemuGuest
from hvfuse.control.guest_record import Ending, GuestRecord, Step
from hvfuse.control.guest_settings import BootSettings, Mode, Network, Site, networks_at
from hvfuse.control.home import Home
from hvfuse.errors import BusyError, HvfuseError, NotFoundError, StateError, UsageError

__all__ = [
    "BootPlan",
    "BootedGuest",
    "Ending",
    "Verdict",
    "boot",
    "boot_failed_over",
    "guest_state_dir",
    "guests",
    "is_running",
    "plan_boot",
    "plan_failed_over",
    "shut_down",
    "validate",
]

HOOK_SECONDS = 300.0
"""What a before_boot or after_boot hook may take."""
SHUTDOWN_SECONDS = 120.0
"""What a guest gets to shut down."""
_BUSY_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BootedGuest:
    """A guest that runs. `pid`: of its qemu, None with libvirt; `uuid`: of its domain, None with qemu. `log`: path of
    what it said. `was_running`: it did before it was asked for."""

    vm: str
    name: str
    mode: Mode
    point: str
    kind: Kind
    state_dir: str
    pid: int | None
    uuid: str | None
    log: str
    was_running: bool


class Machine(Protocol):
    """A guest, however it runs."""

    def is_running(self) -> bool:
        """Whether it runs, or is just starting."""

    def start(self, plan: BootPlan) -> Mapping[str, Any] | None:
        """Start it; returns its process, if that is ours."""

    def wait_until_ready(self, plan: BootPlan) -> None:
        """Wait until it has begun to run. Raises HvfuseError if it does not."""

    def shut_down(self, seconds: float) -> Ending:
        """End it; gently, if that succeeds within that time."""

    def pid(self) -> int | None:
        """Of its process, if that is ours."""


_KINDS: Mapping[Kind, type[QemuGuest] | type[LibvirtGuest]] = {Kind.QEMU: QemuGuest, Kind.LIBVIRT: LibvirtGuest}


def _machine(state_dir: str, record: GuestRecord) -> Machine:
    return _KINDS[record.kind](state_dir, record)


# Booting --------------------------------------------------------------------------------------------------------


def demand_bootable(plan: BootPlan) -> None:
    """Raises UsageError if nothing says how the guest is booted."""
    if plan.kind is Kind.NOTHING:
        raise UsageError(
            f"nothing says how the guest of {plan.vm} is booted",
            hint=f'add to hvfuse.toml: [vm.{plan.vm}.guest] qemu = ["qemu-system-x86_64", …]; see docs/guests.md',
        )


def boot(plan: BootPlan) -> BootedGuest:
    """Boot a guest, or go on with a boot that was interrupted; one that runs is returned as it is.

    Raises UsageError if nothing says how; PrerequisiteError, BusyError, UnreachableError; StateError if another guest
    runs in its place; HvfuseError with what a hook or the guest said that failed.
    """
    demand_bootable(plan)
    os.makedirs(plan.state_dir, mode=0o700, exist_ok=True)
    with _changing(plan.state_dir):
        record = guest_record.load(plan.state_dir)
        was_running = record is not None and _machine(plan.state_dir, record).is_running()
        if record is None or not was_running:
            record = _start(plan)
        elif (record.point, record.name) != (plan.point, plan.name):
            raise StateError(f"the guest {record.name} runs already, on recovery point {record.point}")
        machine = _machine(plan.state_dir, record)
        if record.step is not Step.BOOTED:
            machine.wait_until_ready(plan)
            _run_hook(plan, "after_boot", plan.after_boot)
            record = replace(record, step=Step.BOOTED)
            record.save(plan.state_dir)
        return _booted(plan.state_dir, record, machine, was_running=was_running)


def _start(plan: BootPlan) -> GuestRecord:
    kind = _KINDS[plan.kind]
    kind.check(plan)
    _run_hook(plan, "before_boot", plan.before_boot)
    record = GuestRecord.meant(plan, kind.token(plan))
    record.save(plan.state_dir)
    process = _machine(plan.state_dir, record).start(plan)
    record = replace(record, process=process, step=Step.STARTED)
    record.save(plan.state_dir)
    return record


def _run_hook(plan: BootPlan, name: str, words: tuple[str, ...]) -> None:
    if not words:
        return
    verdict = run_command(words, plan.environment, seconds=HOOK_SECONDS)
    if verdict.output:
        with open(guest_record.log_path(plan.state_dir), "a", encoding="utf-8", errors="replace") as log:
            log.write(f"{name}: {verdict.output}\n")
    if not verdict.ok:
        said = verdict.output.splitlines()[-1] if verdict.output else "it said nothing"
        ended = f"ended with exit code {verdict.exit_code}" if verdict.exit_code is not None else "failed"
        raise HvfuseError(
            f"the {name} hook {words[0]} {ended}: {said}", hint=f"tail {guest_record.log_path(plan.state_dir)}"
        )


def _booted(state_dir: str, record: GuestRecord, machine: Machine, *, was_running: bool) -> BootedGuest:
    return BootedGuest(
        vm=record.vm,
        name=record.name,
        mode=record.mode,
        point=record.point,
        kind=record.kind,
        state_dir=state_dir,
        pid=machine.pid(),
        uuid=record.token if record.kind is Kind.LIBVIRT else None,
        log=guest_record.log_path(state_dir),
        was_running=was_running,
    )


@contextmanager
def _changing(state_dir: str) -> Iterator[None]:
    """One boots or ends it at a time. Raises BusyError."""
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        with system.exclusive_lock(os.path.join(state_dir, "boot.lock")) as had:
            if had:
                yield
                return
        if time.monotonic() > until:
            raise BusyError("the guest is just being booted or ended by another process", hint="try again in a moment")
        time.sleep(0.05)


# Looking, ending, validating ------------------------------------------------------------------------------------


def is_running(state_dir: str) -> bool:
    """Whether a guest that was booted there runs. Raises CorruptError; PrerequisiteError, UnreachableError of libvirt;
    BusyError if something runs of which nobody knows what it is."""
    record = guest_record.load(state_dir)
    return record is not None and _machine(state_dir, record).is_running()


def shut_down(state_dir: str, timeout: float = SHUTDOWN_SECONDS) -> Ending:
    """End the guest that was booted there, and no other: by its power button, for which it has `timeout` seconds, or
    else as by a power cut. May be repeated. Raises as `is_running`, and UnreachableError if it does not end."""
    if not os.path.isdir(state_dir):
        return Ending.NOT_RUNNING
    with _changing(state_dir):
        record = guest_record.load(state_dir)
        if record is None:
            return Ending.NOT_RUNNING
        machine = _machine(state_dir, record)
        ending = machine.shut_down(timeout) if machine.is_running() else Ending.NOT_RUNNING
        guest_record.forget(state_dir)
        return ending


def demand_validatable(plan: BootPlan) -> None:
    """Raises UsageError without a `validate` hook."""
    if not plan.validate:
        raise UsageError(
            f"nothing says how {plan.vm} is validated",
            hint=f'add to hvfuse.toml: [vm.{plan.vm}.guest] validate = ["/path/to/command"]',
        )


def validate(plan: BootPlan) -> Verdict:
    """Whether what was failed over is sound, by the `validate` hook: exit code 0. Raises UsageError without one."""
    demand_validatable(plan)
    return run_command(plan.validate, plan.environment, seconds=plan.validate_timeout)


# Of a home ------------------------------------------------------------------------------------------------------


def guest_state_dir(home: Home, vm: str, *, mode: Mode, directory: str) -> str:
    """Where the guest's state lies that is booted on the disks in `directory`: one for each test, one for the rest."""
    if mode is not Mode.TEST:
        return os.path.join(home.state_dir(vm), "boot")
    told = hashlib.blake2b(os.path.abspath(directory).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return os.path.join(home.state_dir(vm), f"test-{told}")


def plan_failed_over(
    home: Home,
    policy: VmPolicy,
    vm: str,
    *,
    mode: Mode,
    point: str,
    directory: str,
    networks: Mapping[str, Network],
    site: Site = Site.TARGET,
    disks: Collection[str] | None = None,
) -> BootPlan:
    """How the guest of `vm` is booted or validated on the disks in `directory`. `networks`: all of the configuration;
    `site`: which side this is, unless it is a test; `disks`: the names of those that are going to be there, None: look.
    Raises UsageError, NotFoundError."""
    settings = policy.boot or BootSettings()
    directory = os.path.abspath(directory)
    return plan_boot(
        settings,
        vm=vm,
        mode=mode,
        point=point,
        directory=directory,
        disks=_disks(directory) if disks is None else {name: os.path.join(directory, name) for name in disks},
        state_dir=guest_state_dir(home, vm, mode=mode, directory=directory),
        networks=networks_at(Site.TEST if mode is Mode.TEST else site, networks),
        addresses=policy.network_test if mode is Mode.TEST else policy.network,
        definition=_definition(home, vm, settings.libvirt) if settings.libvirt is not None else "",
    )


def boot_failed_over(
    home: Home,
    policy: VmPolicy,
    vm: str,
    *,
    mode: Mode,
    point: str,
    directory: str,
    networks: Mapping[str, Network],
    site: Site = Site.TARGET,
) -> BootedGuest:
    """Plan and boot; see `plan_failed_over`, `boot`."""
    return boot(
        plan_failed_over(home, policy, vm, mode=mode, point=point, directory=directory, networks=networks, site=site)
    )


def guests(home: Home, vm: str) -> list[BootedGuest]:
    """The guests of `vm` that were booted on disks that were failed over, and run; raises as `is_running`."""
    found = []
    try:
        names = sorted(os.listdir(home.state_dir(vm)))
    except FileNotFoundError:
        return []
    for name in names:
        state_dir = os.path.join(home.state_dir(vm), name)
        record = guest_record.load(state_dir) if name == "boot" or name.startswith("test-") else None
        if record is not None and (machine := _machine(state_dir, record)).is_running():
            found.append(_booted(state_dir, record, machine, was_running=True))
    return found


def _disks(directory: str) -> dict[str, str]:
    """What a placeholder of a disk can name: the files of the VM."""
    try:
        with os.scandir(directory) as entries:
            return {entry.name: entry.path for entry in entries if entry.is_file(follow_symlinks=False)}
    except OSError as error:
        raise NotFoundError(f"{directory}: {error.strerror}") from None


def _definition(home: Home, vm: str, path: str) -> str:
    try:
        with open(os.path.join(home.root, path), encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"[vm.{vm}.guest] libvirt: {os.path.join(home.root, path)}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"[vm.{vm}.guest] libvirt: {os.path.join(home.root, path)}: this is not UTF-8") from None
