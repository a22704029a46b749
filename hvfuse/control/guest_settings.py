"""How a VM's guest is brought to stand still for an application-consistent recovery point."""

from __future__ import annotations

from dataclasses import dataclass


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
