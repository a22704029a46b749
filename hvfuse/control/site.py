"""A VM in an installation: what every order about it needs to know."""

from __future__ import annotations

from dataclasses import dataclass

from hvfuse.control.config import VmPolicy
from hvfuse.control.daemon import serving_pid
from hvfuse.control.home import Home
from hvfuse.control.location import Location, locate
from hvfuse.control.records import Records
from hvfuse.errors import HvfuseError
from hvfuse.system import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A VM in an installation, and the policy that applies to it."""

    home: Home
    policy: VmPolicy
    vm: str
    records: Records
    clock: Clock

    @property
    def location(self) -> Location:
        """Where the VM's replica lies, as its record and the policy say now."""
        return locate(self.home, self.policy, self.records.read(self.vm), self.vm)

    @property
    def store_path(self) -> str:
        """The directory of the store where the VM's replica lies."""
        return self.location.path

    @property
    def is_mounted(self) -> bool:
        """Whether its tracker serves it; one that is too busy to say so does."""
        try:
            return serving_pid(self.home.tracker_socket(self.vm)) is not None
        except HvfuseError:
            return True
