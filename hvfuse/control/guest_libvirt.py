"""A guest as a transient domain of libvirt's, through `virsh`: started, found again, ended.

A domain is known by its UUID, of which libvirt runs one at most.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from hvfuse import system
from hvfuse.control.guest_plan import BootPlan
from hvfuse.control.guest_record import Ending, GuestRecord
from hvfuse.errors import BusyError, HvfuseError, PrerequisiteError, UnreachableError

COMMAND_SECONDS = 60.0
PRESS_SECONDS = 10.0
END_SECONDS = 20.0
_OFF = ("shut off", "")


class LibvirtGuest:
    """The domain of one state directory, which `record` tells of."""

    def __init__(self, state_dir: str, record: GuestRecord) -> None:
        self._state_dir = state_dir
        self._uuid = record.token

    @staticmethod
    def token(plan: BootPlan) -> str:
        """For a guest that is about to be started."""
        return plan.uuid

    @staticmethod
    def check(plan: BootPlan) -> None:
        """Raises PrerequisiteError, UnreachableError if it could not be started, BusyError if what is not ours runs
        under its name or UUID."""
        for known in (plan.uuid, plan.name):
            if (state := _state(known)) not in _OFF:
                raise BusyError(
                    f"libvirt has a domain {known} already, which is {state}, and which is not one that hvfuse booted",
                    hint=f"virsh dominfo '{known}'",
                )

    def is_running(self) -> bool:
        """Whether it runs. Raises PrerequisiteError, UnreachableError."""
        return _state(self._uuid) not in _OFF

    def start(self, plan: BootPlan) -> Mapping[str, Any] | None:
        """Start it. Returns None: its process is libvirt's. Raises HvfuseError with libvirt's words."""
        path = os.path.join(self._state_dir, "domain.xml")
        system.replace_file("boot:domain", path, plan.domain.encode())
        done = _virsh("create", path)
        if done.returncode != 0:
            raise HvfuseError(f"libvirt does not start {plan.name}: {_said(done)}")
        system.passing("boot:created")
        return None

    def wait_until_ready(self, plan: BootPlan) -> None:
        """Raises HvfuseError if it has ended again."""
        if not self.is_running():
            raise HvfuseError(
                f"the guest {plan.name} ended at once", hint=f"tail '/var/log/libvirt/qemu/{plan.name}.log'"
            )

    def pid(self) -> int | None:
        """None: its process is libvirt's."""
        return None

    def shut_down(self, seconds: float) -> Ending:
        """As `QemuGuest.shut_down`."""
        until = time.monotonic() + seconds
        # A guest that is paused cannot react.
        while (left := until - time.monotonic()) > 0 and _state(self._uuid) == "running":
            _virsh("shutdown", self._uuid, "--mode", "acpi")
            if self._ends_within(min(left, PRESS_SECONDS)):
                return Ending.SHUT_DOWN
        done = _virsh("destroy", self._uuid)
        if not self._ends_within(END_SECONDS):
            raise UnreachableError(f"libvirt does not end the domain {self._uuid}: {_said(done)}")
        return Ending.QUIT if done.returncode == 0 else Ending.SHUT_DOWN

    def _ends_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        return True


def _state(domain: str) -> str:
    """As `virsh domstate` says it; "" if there is no such domain. Raises PrerequisiteError, UnreachableError."""
    done = _virsh("domstate", domain)
    if done.returncode == 0:
        return done.stdout.strip()
    if "failed to get domain" in done.stderr or "Domain not found" in done.stderr:
        return ""
    raise UnreachableError(f"libvirt cannot be asked for {domain}: {_said(done)}", hint="virsh list --all")


def _virsh(*words: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("virsh")
    if program is None:
        raise PrerequisiteError(
            "virsh is missing, by which guests with libvirt = … are booted", hint="apt-get install libvirt-clients"
        )
    try:
        return subprocess.run(
            [program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise UnreachableError(f"virsh {words[0]} did not end within {COMMAND_SECONDS:.0f} s") from None


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    return lines[-1].removeprefix("error: ")
