"""The guest of a VM on disks that were failed over: booted, validated and ended as the configuration says."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from hvfuse.control import boot
from hvfuse.control.config import Config
from hvfuse.control.guest_plan import BootPlan
from hvfuse.control.guest_settings import Mode, Site
from hvfuse.control.home import Home
from hvfuse.errors import HvfuseError
from hvfuse.words import duration_text


class FailoverGuest:
    """The guest of `vm` on the disks in `directory`. `config`: asked each time, as the VM's definition may only just
    have come; `site`: which side this is."""

    def __init__(
        self, home: Home, vm: str, *, directory: str, config: Callable[[], Config], site: Site = Site.TARGET
    ) -> None:
        self._home = home
        self._vm = vm
        self._directory = directory
        self._config = config
        self._site = site
        self.verdict: dict[str, Any] | None = None
        """What the validation hook said last."""

    def demand(self, mode: str, point: str, disks: Collection[str], *, boot_it: bool, validate_it: bool) -> None:
        """Before anything is done. Raises UsageError if what is asked for is nowhere described, or asks for disks or
        networks that will not be there."""
        plan = self._plan(mode, point, disks)
        if boot_it:
            boot.demand_bootable(plan)
        if validate_it:
            boot.demand_validatable(plan)

    def boot(self, mode: str, point: str) -> str:
        """Start it, unless it runs; returns what there is to say of it. Raises as `boot.boot`."""
        guest = boot.boot(self._plan(mode, point))
        process = f" (pid {guest.pid})" if guest.pid is not None else ""
        return f"{guest.name} runs{process}; its log: {guest.log}"

    def validate(self, mode: str, point: str) -> str:
        """Run the validation hook; returns its verdict. Raises HvfuseError if it failed."""
        verdict = boot.validate(self._plan(mode, point))
        self.verdict = {
            "ok": verdict.ok, "exit_code": verdict.exit_code, "output": verdict.output, "seconds": verdict.seconds,
        }  # fmt: skip
        if not verdict.ok:
            ended = "took too long" if verdict.exit_code is None else f"ended with exit code {verdict.exit_code}"
            said = verdict.output.strip().splitlines()
            raise HvfuseError(f"{self._vm}: validation failed: the hook {ended}" + (f": {said[-1]}" if said else ""))
        return f"passed, after {duration_text(verdict.seconds)}"

    def shut_down(self, mode: str) -> str | None:
        """End it, if one was booted here and runs."""
        state_dir = boot.guest_state_dir(self._home, self._vm, mode=Mode(mode), directory=self._directory)
        return f"the guest: {boot.shut_down(state_dir)}"

    def _plan(self, mode: str, point: str, disks: Collection[str] | None = None) -> BootPlan:
        config = self._config()
        return boot.plan_failed_over(
            self._home, config.policy(self._vm), self._vm, mode=Mode(mode), point=point, directory=self._directory,
            networks=config.seen_by(self._vm).networks, site=self._site, disks=disks,
        )  # fmt: skip
