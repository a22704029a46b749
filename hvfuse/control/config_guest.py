"""What the keys of `[vm.NAME.guest]`, `[vm.NAME.network]` and `[network.NAME]` may be. Pure.

As `hvfuse.control.config_values`, whose parsers these go on from. A check of a whole table returns the key that is at
fault, or "" for the table, and what is wrong with it.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from typing import Any

from hvfuse.control.config_values import BadValueError, Key, Parser, command, duration, whole
from hvfuse.control.guest_template import pieces
from hvfuse.errors import UsageError

Fault = tuple[str, str]

_MINUTES = 60.0
_OWN_OPTIONS = {"-daemonize": "hvfuse starts it in the background itself", "-S": "nobody would let it go on"}
_UNTOUCHABLE = {"--" + option[1:]: why for option, why in _OWN_OPTIONS.items()} | _OWN_OPTIONS


def _qemu(value: Any) -> tuple[str, ...]:
    words: tuple[str, ...] = command()(value)
    for word in words:
        if word in _UNTOUCHABLE:
            raise BadValueError(f"a command line for hvfuse: {word} cannot be in it, as {_UNTOUCHABLE[word]}")
        try:
            list(pieces(word))
        except UsageError as error:
            raise BadValueError(f"a command line for hvfuse: {error}") from None
    return words


def _file(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value or value.endswith("/"):
        raise BadValueError('the path of a domain\'s XML, such as "web01.xml"')
    return os.path.normpath(value)


def _network(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or value != value.strip() or value[:1] in ("", "-"):
        raise BadValueError('the name of a bridge or network, such as "br0"')
    return value


def _address(kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address], example: str) -> Parser:
    def parse(value: Any) -> str:
        try:
            found = kind(value) if isinstance(value, str) and "%" not in value else None
        except ValueError:
            found = None
        if found is None or found.is_unspecified or found.is_multicast or found.is_loopback:
            raise BadValueError(f'an address of a host, such as "{example}"')
        return str(found)

    return parse


def _mask(value: Any) -> str:
    try:
        network = ipaddress.IPv4Network(f"0.0.0.0/{value}") if isinstance(value, str) and "." in value else None
    except ValueError:
        network = None
    # "0.0.0.255" is taken for a mask the other way round.
    if network is None or network.prefixlen == 0 or str(network.netmask) != value:
        raise BadValueError('a mask, such as "255.255.255.0"')
    return str(network.netmask)


_ipv4 = _address(ipaddress.IPv4Address, "192.0.2.10")
_ipv6 = _address(ipaddress.IPv6Address, "2001:db8::10")


def _dns(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > 2:
        raise BadValueError('a list of at most two addresses, such as ["192.0.2.53", "2001:db8::53"]')
    return tuple(_ipv6(server) if isinstance(server, str) and ":" in server else _ipv4(server) for server in value)


BOOT: Mapping[str, Key] = {
    "qemu": Key(_qemu),
    "libvirt": Key(_file),
    "before_boot": Key(command()),
    "after_boot": Key(command()),
    "validate": Key(command()),
    "validate_timeout": Key(duration(1, 24 * 60 * _MINUTES, 'from "1s" to "24h"'), "5m"),
}
ADDRESSES: Mapping[str, Key] = {
    "ipv4": Key(_ipv4),
    "ipv4_mask": Key(_mask),
    "ipv4_gateway": Key(_ipv4),
    "ipv6": Key(_ipv6),
    "ipv6_prefix": Key(whole(1, 128)),
    "ipv6_gateway": Key(_ipv6),
    "dns": Key(_dns),
}
NETWORK: Mapping[str, Key] = {"source": Key(_network), "target": Key(_network), "test": Key(_network)}


def boot_fault(values: Mapping[str, Any]) -> Fault | None:
    """What is wrong with the keys of BOOT that one table has, each sound by itself."""
    if "qemu" in values and "libvirt" in values:
        return "libvirt", "not together with qemu: say one of them"
    boots = "qemu" in values or "libvirt" in values
    for key in ("before_boot", "after_boot"):
        if key in values and not boots:
            return key, "qemu or libvirt is missing: there is nothing to boot"
    if "validate_timeout" in values and "validate" not in values:
        return "validate_timeout", "validate is missing: there is nothing to wait for"
    return None


def addresses_fault(values: Mapping[str, Any]) -> Fault | None:
    """As `boot_fault`, of ADDRESSES."""
    if not values:
        return "", "this says nothing: say ipv4 and ipv4_mask, ipv6 and ipv6_prefix, or dns"
    for own, needs in (
        *(("ipv4", "ipv4_mask"), ("ipv4_mask", "ipv4"), ("ipv4_gateway", "ipv4")),
        *(("ipv6", "ipv6_prefix"), ("ipv6_prefix", "ipv6"), ("ipv6_gateway", "ipv6")),
    ):
        if own in values and needs not in values:
            return own, f"{needs} is missing: one is of no use without the other"
    if "ipv4" in values:
        network = ipaddress.IPv4Interface(f"{values['ipv4']}/{values['ipv4_mask']}").network
        edges = (str(network.network_address), str(network.broadcast_address))
        if network.prefixlen <= 30 and values["ipv4"] in edges:
            return "ipv4", f"{values['ipv4']} is the network {network} itself or its broadcast address, not a host"
    for kind in ("ipv4", "ipv6"):
        if kind in values and values.get(f"{kind}_gateway") == values[kind]:
            return f"{kind}_gateway", "this is the guest's own address"
    return None


def network_fault(values: Mapping[str, Any]) -> Fault | None:
    """As `boot_fault`, of NETWORK."""
    if not values:
        return "", "this says nothing: say source, target and test"
    for side in ("target", "source"):  # a failover home swaps them
        if "test" in values and values["test"] == values.get(side):
            return "test", f"this is the {side} too: a guest on test would be on the network of the real one"
    return None
