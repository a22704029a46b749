"""What is said of a VM's guest: how it is brought to stand still for an application-consistent recovery point, and how
it is booted on disks that were failed over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class GuestSettings:
    """`[vm.NAME.guest]`: either the guest agent or a pair of commands.

    `agent`: absolute path of the unix socket that qemu gives to the guest agent (`-chardev socket,path=…,server=on`
    behind a port `org.qemu.guest_agent.0`); None: not used. `freeze`, `thaw`: commands, a word each; empty: not used.
    They get HVFUSE_VM, the VM's name, and HVFUSE_EVENT, "freeze" or "thaw"; exit code 0 means done, and thawing a
    guest that is not frozen has to succeed. `freeze_timeout`: seconds from the beginning of a freeze after which
    the guest is let go, whether it froze or not, and whoever still needs it.
    """

    agent: str | None = None
    freeze: tuple[str, ...] = ()
    thaw: tuple[str, ...] = ()
    freeze_timeout: float = 10.0

    @property
    def fault(self) -> str | None:
        """What is wrong with the settings, in words; None if nothing is."""
        if bool(self.freeze) is not bool(self.thaw):
            return "freeze and thaw belong together: what is frozen has to be thawed"
        if self.agent is not None and self.freeze:
            return "agent, or freeze and thaw; not both"
        if self.agent is None and not self.freeze:
            return "agent, or freeze and thaw, is missing"
        return None


class Mode(StrEnum):
    """Why a guest is booted on disks that were failed over."""

    TEST = "test"
    PLANNED = "planned"
    UNPLANNED = "unplanned"


class Site(StrEnum):
    """Where a guest is booted, which says what its networks are called."""

    SOURCE = "source"
    TARGET = "target"
    TEST = "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class BootSettings:
    """`[vm.NAME.guest]`: how its guest is booted on disks that were failed over; see `guest_template` for what a text
    may hold. `qemu`: a command line; empty: not used. `libvirt`: path of a domain's XML, relative to the home; None:
    not used. At most one of the two. `before_boot`, `after_boot`, `validate`: commands, a word each; empty for none.
    `validate_timeout`: seconds."""

    qemu: tuple[str, ...] = ()
    libvirt: str | None = None
    before_boot: tuple[str, ...] = ()
    after_boot: tuple[str, ...] = ()
    validate: tuple[str, ...] = ()
    validate_timeout: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """`[vm.NAME.network]`, `[vm.NAME.network_test]`: TCP/IP settings of the guest once it is failed over, for hooks to
    apply. All in `ipaddress`' own notation; None: not said. `ipv4_mask` as in "255.255.255.0", `ipv6_prefix` in bits.
    `dns`: at most two, of either kind."""

    ipv4: str | None = None
    ipv4_mask: str | None = None
    ipv4_gateway: str | None = None
    ipv6: str | None = None
    ipv6_prefix: int | None = None
    ipv6_gateway: str | None = None
    dns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """`[network.LOGICAL]`: what a network is called at each site, as a bridge or a network of libvirt; None: a guest
    cannot be on it there."""

    source: str | None = None
    target: str | None = None
    test: str | None = None

    def at(self, site: Site) -> str | None:
        """Its name at `site`."""
        return {Site.SOURCE: self.source, Site.TARGET: self.target, Site.TEST: self.test}[site]


def networks_at(site: Site, networks: Mapping[str, Network]) -> dict[str, str]:
    """The real names at `site` by their logical ones, without those that are none there."""
    return {name: real for name, network in networks.items() if (real := network.at(site)) is not None}
