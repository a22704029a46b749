"""Adopted definitions (`hvfuse.control.definition`) beneath what `hvfuse.toml` says of their VMs. Pure.

Of what is said in several places, the last one in this list applies, key by key:

    the default, [replication] and [retention]
    the definition
    [policy.NAME], where the VM's own table names one
    [vm.NAME] and its tables; [network.NAME]

Of two keys of which a table may have only one, such as agent and freeze, the file's own puts out the definition's.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hvfuse.control.config import Config
from hvfuse.control.config_plan import Path
from hvfuse.control.config_text import Effective, Origins, UnknownKeyError, dotted, parse_document
from hvfuse.errors import UsageError

if TYPE_CHECKING:
    from hvfuse.control.definition import Definition

Table = Mapping[str, Any]

_RIVALS = (
    (frozenset({"agent"}), frozenset({"freeze", "thaw"})),
    (frozenset({"qemu"}), frozenset({"libvirt"})),
)


@dataclass(frozen=True, slots=True)
class Layered:
    """A configuration with definitions beneath it. `faults`: by VM, why its definition does not apply. `unknown`: by
    VM, keys of its definition that this hvfuse does not know: a newer one wrote them."""

    config: Config
    faults: Mapping[str, str]
    unknown: Mapping[str, tuple[str, ...]]


def beneath(own: Table, travelled: Table) -> dict[str, Any]:
    """The keys of a table of the file's own with those of a definition beneath them."""
    out: set[str] = set()
    for one, other in _RIVALS:
        for mine, theirs in ((one, other), (other, one)):
            if not mine.isdisjoint(own):
                out |= theirs
    return {**{key: value for key, value in travelled.items() if key not in out}, **own}


def layered(document: Table, vm: str, definition: Definition | None) -> dict[str, Any]:
    """A file's document, which is without fault, as it applies to one VM: its table has what the policy that it names
    says, and what a definition does."""
    own: dict[str, Any] = document.get("vm", {}).get(vm, {})
    named = document["policy"][own["policy"]] if "policy" in own else {}
    settings, inner, outer = (
        (definition.settings, definition.tables, definition.networks) if definition is not None else ({}, {}, {})
    )
    keys = {key: value for key, value in own.items() if key != "policy" and not isinstance(value, dict)}
    tables = {name: value for name, value in own.items() if isinstance(value, dict)}
    networks = document.get("network", {})
    merged = {
        **settings,
        **named,
        **keys,
        **{name: beneath(tables.get(name, {}), table) for name, table in inner.items()},
        **{name: table for name, table in tables.items() if name not in inner},
    }
    found = {
        **document,
        "vm": {**document.get("vm", {}), vm: merged},
        "network": {
            **networks,
            **{name: beneath(networks.get(name, {}), table) for name, table in outer.items()},
        },
    }
    if not found["network"]:
        del found["network"]
    return found


def with_definitions(config: Config, text: str, definitions: Mapping[str, tuple[str, Definition]]) -> Layered:
    """What `config`, which is what `text` says, becomes with definitions beneath it. `definitions`: by VM, the path of
    each, which faults name."""
    document = tomllib.loads(text)
    seen, faults, unknown = {}, {}, {}
    for vm, (path, definition) in definitions.items():
        try:
            seen[vm], ignored = _seen_by(path, document, vm, definition)
        except UsageError as error:
            faults[vm] = str(error)
            continue
        if ignored:
            unknown[vm] = ignored
    return Layered(replace(config, adopted=seen), faults, unknown)


def origins(text: str, vm: str, definition: Definition) -> list[Effective]:
    """As `Origins.of`, with a definition beneath the text."""
    plain = {each.key: each for each in Origins(text).of(vm)}
    note = f"travelled with recovery point {definition.point}" if definition.point else "travelled with the VM"
    found = []
    for each in Origins(text, layered(tomllib.loads(text), vm, definition)).of(vm):
        own = plain.get(each.key)
        if each.table is None or each.line is not None:
            found.append(each)
        elif own is not None and (own.table or "").startswith("policy."):
            found.append(own)  # of the policy that the VM's own table names
        else:
            found.append(Effective(key=each.key, value=each.value, definition=note))
    return found


def _seen_by(path: str, document: Table, vm: str, definition: Definition) -> tuple[Config, tuple[str, ...]]:
    """The configuration of one VM, and the keys of its definition that are not known. Raises UsageError."""
    found = layered(document, vm, definition)
    ignored: list[str] = []
    while True:
        try:
            return parse_document(path, found), tuple(ignored)
        except UnknownKeyError as error:  # the file's own are all known
            ignored.append(dotted(error.path))
            found = _without(found, error.path)


def _without(table: Table, path: Path) -> dict[str, Any]:
    """A table without the key at `path`, which it has."""
    key, *rest = (str(part) for part in path)
    if not rest:
        return {name: value for name, value in table.items() if name != key}
    return {**table, key: _without(table[key], tuple(rest))}
