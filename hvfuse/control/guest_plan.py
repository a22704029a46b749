"""How a guest is to be booted on disks that were failed over: from the settings to a command line or a domain. Pure.

A guest on test must not reach the network of the real one, which may still run. So in a test each network that a guest
is given has to be named by `{network:LOGICAL}`, of which `[network.LOGICAL] test` says what it is there, or be
none that leads out. Everything else is refused, and qemu's own default, a network to the outside, is turned off.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from hvfuse.control.guest_domain import domain
from hvfuse.control.guest_settings import Addresses, BootSettings, Mode
from hvfuse.control.guest_template import DISK, NAME, NETWORK, Placeholder, fill
from hvfuse.errors import UsageError

MONITOR = "qmp.sock"
"""Our monitor of a qemu, in the guest's state directory."""

_NETWORK_OPTIONS = ("netdev", "nic", "net")
_DISPLAY_OPTIONS = ("display", "nographic", "vnc", "spice", "sdl", "curses")
_TAKES_A_LIST = ("name",)
"""Options whose value is a list even where it shows neither comma nor equals sign."""


class Kind(StrEnum):
    """What boots a guest."""

    QEMU = "qemu"
    LIBVIRT = "libvirt"
    NOTHING = "nothing"  # its disks can be validated all the same


@dataclass(frozen=True, slots=True, kw_only=True)
class BootPlan:
    """`vm`, `name`: the VM, and its guest's name. `point`: id of the recovery point. `state_dir`: the guest's private
    directory. `command`: qemu's words, to be run in `state_dir`. `domain`: the XML, and `uuid`: of the domain in it.
    `environment`: what hooks get besides ours. The hooks and `validate_timeout`: as in BootSettings."""

    vm: str
    name: str
    mode: Mode
    point: str
    state_dir: str
    kind: Kind
    command: tuple[str, ...] = ()
    domain: str = ""
    uuid: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    before_boot: tuple[str, ...] = ()
    after_boot: tuple[str, ...] = ()
    validate: tuple[str, ...] = ()
    validate_timeout: float = 300.0


def guest_name(vm: str, mode: Mode) -> str:
    """What the guest of `vm` is called."""
    return f"{vm} - Test" if mode is Mode.TEST else vm


def plan_boot(
    settings: BootSettings,
    *,
    vm: str,
    mode: Mode,
    point: str,
    directory: str,
    disks: Mapping[str, str],
    state_dir: str,
    networks: Mapping[str, str],
    addresses: Addresses | None,
    definition: str = "",
) -> BootPlan:
    """`directory`: where the disks lie; `disks`: the absolute path of each by its file name. `networks`: what each is
    called where the guest is to run, by their logical names; without those that it must not be on. `addresses`: those
    of this mode. `definition`: text of the file that `settings.libvirt` names. Raises UsageError naming what the
    settings ask for that is not there."""
    name = guest_name(vm, mode)
    values = _Values(vm=vm, name=name, mode=mode, disks=disks, state_dir=state_dir, networks=networks)
    command = _command(settings.qemu, values) if settings.qemu else ()
    xml = uuid = ""
    if settings.libvirt is not None:
        seed = f"{state_dir}\0{point}"
        xml, uuid = domain(definition, path=settings.libvirt, name=name, value=values, mode=mode, seed=seed)
    return BootPlan(
        vm=vm,
        name=name,
        mode=mode,
        point=point,
        state_dir=state_dir,
        kind=Kind.QEMU if command else Kind.LIBVIRT if xml else Kind.NOTHING,
        command=command,
        domain=xml,
        uuid=uuid,
        environment=_environment(values, point=point, directory=directory, addresses=addresses or Addresses()),
        before_boot=settings.before_boot,
        after_boot=settings.after_boot,
        validate=settings.validate,
        validate_timeout=settings.validate_timeout,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Values:
    """What placeholders stand for."""

    vm: str
    name: str
    mode: Mode
    disks: Mapping[str, str]
    state_dir: str
    networks: Mapping[str, str]

    def __call__(self, placeholder: Placeholder) -> str:
        if placeholder.kind == DISK:
            return self._disk(placeholder)
        if placeholder.kind == NETWORK:
            return self._network(placeholder)
        return self.name if placeholder.kind == NAME else self.state_dir

    def _disk(self, placeholder: Placeholder) -> str:
        if placeholder.of not in self.disks:
            known = ", ".join(sorted(self.disks)) or "none"
            raise UsageError(
                f"[vm.{self.vm}.guest]: {placeholder}: {self.vm} has no disk {placeholder.of} here; it has: {known}"
            )
        return self.disks[placeholder.of]

    def _network(self, placeholder: Placeholder) -> str:
        if placeholder.of not in self.networks:
            key, where = ("test", "in tests") if self.mode is Mode.TEST else ("target", "where it is failed over to")
            raise UsageError(
                f"[vm.{self.vm}.guest]: {placeholder}: nothing says what the network {placeholder.of} is {where}",
                hint=f'add to hvfuse.toml: [network.{placeholder.of}] {key} = "NAME OF THE BRIDGE OR NETWORK"',
            )
        return self.networks[placeholder.of]


# qemu -----------------------------------------------------------------------------------------------------------


def _command(words: Sequence[str], values: _Values) -> tuple[str, ...]:
    """The command line, with what it lacks: our monitor, a name, no window where nobody looks."""
    if values.mode is Mode.TEST:
        _refuse_ways_out(words, values.vm)
    filled = [_filled(word, before, values) for before, word in zip(("", *words), words, strict=False)]
    options = {word.lstrip("-") for word in words[1:] if word.startswith("-")}
    if "name" not in options:
        filled += ["-name", _in_a_list(values.name)]
    if not any(f"{values.state_dir}/{MONITOR}" in word for word in filled):
        filled += ["-qmp", f"unix:{MONITOR},server=on,wait=off"]  # its full path may be longer than a socket's can be
    if options.isdisjoint(_DISPLAY_OPTIONS):
        filled += ["-display", "none"]
    if values.mode is Mode.TEST and options.isdisjoint((*_NETWORK_OPTIONS, "nodefaults")):
        filled += ["-nic", "none"]
    return tuple(filled)


def _filled(word: str, before: str, values: _Values) -> str:
    """One word. In a list of options a comma ends a value, unless it is doubled; in JSON, quotes do."""
    literal = fill(word, lambda _: "")
    written: Callable[[str], str] = str
    if literal.startswith("{"):
        written = _in_json
    elif "=" in literal or "," in literal or before.lstrip("-") in _TAKES_A_LIST:
        written = _in_a_list
    return fill(word, lambda placeholder: written(values(placeholder)))


def _in_a_list(value: str) -> str:
    return value.replace(",", ",,")


def _in_json(value: str) -> str:
    return json.dumps(value)[1:-1]


def _refuse_ways_out(words: Sequence[str], vm: str) -> None:
    for option, value in _network_options(words):
        if not _leads_nowhere(value) and not _is_mapped(value):
            raise UsageError(
                f"[vm.{vm}.guest] qemu: -{option} {value}: a guest on test must not be on the network of the real one",
                hint="name it by {network:NAME}, and say in hvfuse.toml what it is in tests: "
                '[network.NAME] test = "NAME OF AN ISOLATED BRIDGE"',
            )


def _network_options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for option, value in itertools.pairwise(words):
        if option.startswith("-") and option.lstrip("-") in _NETWORK_OPTIONS:
            yield option.lstrip("-"), value


def _leads_nowhere(value: str) -> bool:
    """Whether a network of qemu's cannot be one that the real guest is on, whatever it is called."""
    kind, *options = value.split(",")
    if kind == "user":
        return not {"restrict=on", "restrict=yes", "restrict=y"}.isdisjoint(options)
    return kind in ("none", "nic", "hubport")


def _is_mapped(value: str) -> bool:
    """Whether a network of qemu's is named by a placeholder, and by nothing else."""
    options = fill(value, lambda placeholder: f"\0{placeholder.kind}").split(",")  # a name may hold commas
    named = [text for key, _, text in (option.partition("=") for option in options) if key in ("br", "ifname")]
    return all(text == f"\0{NETWORK}" for text in named) and any(f"\0{NETWORK}" in option for option in options)


# Hooks ----------------------------------------------------------------------------------------------------------


def _environment(values: _Values, *, point: str, directory: str, addresses: Addresses) -> dict[str, str]:
    """What hooks are told. What is not said is empty, so that nothing of ours shines through."""
    dns = (*addresses.dns, "", "")
    return {
        "HVFUSE_VM": values.vm,
        "HVFUSE_GUEST_NAME": values.name,
        "HVFUSE_MODE": values.mode.value,
        "HVFUSE_POINT": point,
        "HVFUSE_DISKS": directory,
        "HVFUSE_STATE": values.state_dir,
        "HVFUSE_IPV4": addresses.ipv4 or "",
        "HVFUSE_IPV4_MASK": addresses.ipv4_mask or "",
        "HVFUSE_IPV4_GATEWAY": addresses.ipv4_gateway or "",
        "HVFUSE_IPV6": addresses.ipv6 or "",
        "HVFUSE_IPV6_PREFIX": str(addresses.ipv6_prefix or ""),
        "HVFUSE_IPV6_GATEWAY": addresses.ipv6_gateway or "",
        "HVFUSE_DNS1": dns[0],
        "HVFUSE_DNS2": dns[1],
        "HVFUSE_NETWORKS": json.dumps(dict(values.networks), sort_keys=True),
    }
