"""From the text of `hvfuse.toml` to a `Config`, and back to where a setting comes from. Pure.

A key or table that is not known, or a value that does not fit, is refused by line and name, so that a misspelt policy
cannot be taken for the default one.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvfuse.control import config_guest as guests
from hvfuse.control import config_values as keys
from hvfuse.control.config import Config, Monitoring, VmPolicy
from hvfuse.control.config_plan import Path, PlanReader
from hvfuse.control.config_values import BadValueError, Key
from hvfuse.control.guest_settings import Addresses, BootSettings, GuestSettings, Network
from hvfuse.control.home import name_fault
from hvfuse.errors import UsageError

Layer = tuple[Path, Mapping[str, Any]]
"""A table and its values. Of several, a later one says more of a VM than an earlier one."""

_TABLES: Mapping[str, Mapping[str, Key]] = {
    "paths": keys.PATHS,
    "replication": keys.REPLICATION,
    "retention": keys.RETENTION,
    "monitoring": keys.MONITORING,
}
_GUEST_HINT = "agent, or freeze and thaw"
_ADDRESSES = ("network", "network_test")
_OWN_TABLES = ("guest", *_ADDRESSES)
"""What a VM may have besides keys."""
_KINDS = {"vm": "a VM's", "policy": "a policy's", "network": "a network's", "plan": "a plan's"}


def parse(path: str, text: str) -> Config:
    """The configuration in `text`; `path` is what errors name. Raises UsageError "FILE:LINE: [table] key: fault"."""
    return _Reader(path, text).read()


def parse_document(path: str, document: Mapping[str, Any]) -> Config:
    """As `parse`, of what is no file's text: errors name no line. Raises UnknownKeyError for one that is not known."""
    return _Reader(path, None).interpret(document)


class UnknownKeyError(UsageError):
    """A key or table at `path` is not known."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class _Reader:
    """Reads one file's text; None: what was read already."""

    def __init__(self, path: str, text: str | None) -> None:
        self._path = path
        self._text = text

    def read(self) -> Config:
        assert self._text is not None
        try:
            document = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            raise self._syntax_error(str(error), self._text) from None
        return self.interpret(document)

    def interpret(self, document: Mapping[str, Any]) -> Config:
        self._refuse_unknown((), document, (*_TABLES, *_KINDS))
        values = {name: self._table((name,), document.get(name, {}), known) for name, known in _TABLES.items()}
        general: list[Layer] = [((name,), values[name]) for name in ("replication", "retention")]
        if values["replication"].get("app_consistent"):
            raise self._error(
                ("replication", "app_consistent"),
                "this cannot be said of every VM: say it in a [policy.NAME] or [vm.NAME], and how the guest is asked "
                "to hold still in [vm.NAME.guest]",
            )
        named: dict[str, Layer] = {}
        for name, table in self._named("policy", document):
            named[name] = (("policy", name), self._table(("policy", name), table, keys.POLICY))
        plans = PlanReader(self._table, self._error)
        return Config(
            paths=values["paths"],
            default=self._policy(general),
            policies={name: self._policy([*general, layer]) for name, layer in named.items()},
            vms={name: self._vm(name, table, general, named) for name, table in self._named("vm", document)},
            monitoring=Monitoring(**values["monitoring"]),
            networks={
                name: self._network(("network", name), table) for name, table in self._named("network", document)
            },
            plans={name: plans.read(name, table) for name, table in self._named("plan", document)},
        )

    def _named(self, kind: str, document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, table in self._as_table((kind,), document.get(kind, {})).items():
            fault = name_fault(name)
            if kind == "network" and fault is None and not set(name).isdisjoint("{}"):
                fault = "holds a brace"
            if fault is not None:
                raise self._error((kind, name), f"this cannot be {_KINDS[kind]} name: it {fault}")
            yield name, table

    # Policies ------------------------------------------------------------------------------------------------

    def _vm(self, vm: str, table: Any, general: Sequence[Layer], named: Mapping[str, Layer]) -> VmPolicy:
        path = ("vm", vm)
        self._refuse_unknown(path, self._as_table(path, table), (*keys.VM, "policy", *_OWN_TABLES))
        values = self._values(path, {key: value for key, value in table.items() if key in keys.VM}, keys.VM)
        layers = [*general, (path, values)]
        if "policy" in table:
            name = self._values(path, {"policy": table["policy"]}, {"policy": keys.VM_POLICY})["policy"]
            if name not in named:
                raise self._error(
                    (*path, "policy"), f"there is no table [{dotted(('policy', name))}]; {_guess(name, named)}"
                )
            layers.insert(-1, named[name])
        guest, boot = self._guest((*path, "guest"), table["guest"]) if "guest" in table else (None, None)
        policy = self._policy(layers)
        if policy.app_consistent and guest is None:
            own = "app_consistent" in values
            raise self._error(
                (*path, "app_consistent" if own else "policy"),
                f"{'this needs' if own else 'its app_consistent needs'} a table [{dotted((*path, 'guest'))}] that says "
                f"how the guest is asked to hold still: {_GUEST_HINT}",
            )
        network, network_test = (
            self._addresses((*path, key), table[key]) if key in table else None for key in _ADDRESSES
        )
        return replace(policy, guest=guest, boot=boot, network=network, network_test=network_test)

    def _policy(self, layers: Sequence[Layer]) -> VmPolicy:
        merged = {key: value for _, values in layers for key, value in values.items()}
        policy = _built(merged)
        if policy.soft_limit > policy.hard_limit:
            path, values = next(layer for layer in reversed(layers) if {"soft_limit", "hard_limit"} & layer[1].keys())
            if "soft_limit" in values:
                fault = f"{policy.soft_limit} is more than hard_limit, which is {policy.hard_limit}"
                raise self._error((*path, "soft_limit"), fault)
            fault = f"{policy.hard_limit} is less than soft_limit, which is {policy.soft_limit}"
            raise self._error((*path, "hard_limit"), fault)
        return policy

    # Guests --------------------------------------------------------------------------------------------------

    def _guest(self, path: Path, table: Any) -> tuple[GuestSettings | None, BootSettings | None]:
        """How it is asked to hold still, and how it is booted; a table says at least one of them."""
        values = self._table(path, table, {**keys.GUEST, **guests.BOOT})
        freezing = {key: value for key, value in values.items() if key in keys.GUEST}
        booting = {key: value for key, value in values.items() if key in guests.BOOT}
        self._refuse_fault(path, guests.boot_fault(booting))
        if self._is_bare(values):
            return None, None
        if not booting or freezing:
            return self._freezing(path, freezing), BootSettings(**booting) if booting else None
        return None, BootSettings(**booting)

    def _freezing(self, path: Path, values: Mapping[str, Any]) -> GuestSettings:
        commands = [key for key in ("freeze", "thaw") if key in values]
        if "agent" in values and commands:
            raise self._error((*path, commands[0]), f"not together with agent: say {_GUEST_HINT}")
        if len(commands) == 1:
            other = "thaw" if commands == ["freeze"] else "freeze"
            raise self._error((*path, commands[0]), f"{other} is missing: one is of no use without the other")
        if "agent" not in values and not commands:
            at = (*path, "freeze_timeout") if values else path
            raise self._error(at, f"this says nothing: say {_GUEST_HINT}{'' if values else ', or qemu, or libvirt'}")
        nothing = {"agent": None, "freeze": (), "thaw": ()}
        return GuestSettings(**{**nothing, **values})

    def _addresses(self, path: Path, table: Any) -> Addresses:
        values = self._table(path, table, guests.ADDRESSES)
        if not self._is_bare(values):
            self._refuse_fault(path, guests.addresses_fault(values))
        return Addresses(**values)

    def _network(self, path: Path, table: Any) -> Network:
        values = self._table(path, table, guests.NETWORK)
        if not self._is_bare(values):
            self._refuse_fault(path, guests.network_fault(values))
        return Network(**values)

    def _is_bare(self, values: Mapping[str, Any]) -> bool:
        """Whether a table that travelled here says nothing that this hvfuse knows. In a file, that is a fault."""
        return not values and self._text is None

    def _refuse_fault(self, path: Path, fault: guests.Fault | None) -> None:
        if fault is not None:
            key, what = fault
            raise self._error((*path, key) if key else path, what)

    # Tables --------------------------------------------------------------------------------------------------

    def _table(self, path: Path, table: Any, known: Mapping[str, Key]) -> dict[str, Any]:
        self._refuse_unknown(path, self._as_table(path, table), known)
        return self._values(path, table, known)

    def _values(self, path: Path, table: Mapping[str, Any], known: Mapping[str, Key]) -> dict[str, Any]:
        values = {}
        for key, value in table.items():
            try:
                values[key] = known[key].parse(value)
            except BadValueError as error:
                raise self._error((*path, key), f"{shown(value)} is not {error}") from None
        return values

    def _as_table(self, path: Path, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._error(path, f"this is a table: write [{dotted(path)}] on a line of its own")
        return value

    def _refuse_unknown(self, path: Path, table: Mapping[str, Any], known: Iterable[str]) -> None:
        for key, value in table.items():
            if key not in known:
                kind = "table" if isinstance(value, dict) else "key"
                error = self._error((*path, key), f"unknown {kind}; {_guess(key, known)}")
                raise UnknownKeyError(str(error), (*path, key))

    # Faults --------------------------------------------------------------------------------------------------

    def _error(self, path: Path, what: str) -> UsageError:
        *table, key = path if isinstance(path[-1], str) else path[:-1]
        brackets = ("[[", "]]") if table and isinstance(table[-1], int) else ("[", "]")
        named = f"{brackets[0]}{dotted(tuple(table))}{brackets[1]} " if table else ""
        where = self._path
        if self._text is not None:
            where = f"{where}:{lines(self._text).get(path, len(self._text.splitlines()))}"
        return UsageError(f"{where}: {named}{key}: {what}")

    def _syntax_error(self, message: str, text: str) -> UsageError:
        match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
        line = match[1] if match and match[1] else len(text.splitlines()) or 1
        what = message[: match.start()] if match else message
        if twice := re.fullmatch(r"Cannot declare \((.*?),?\) twice", what):
            table = ".".join(re.findall(r"'(.*?)'", twice[1]))
            what = f"[{table}] stands here for the second time: its keys belong together"
        return UsageError(f"{self._path}:{line}: {what}")


def _built(values: Mapping[str, Any]) -> VmPolicy:
    """The policy of values that were read; what is not among them is the default."""
    default = VmPolicy()
    kept = {key: values[key] for key in keys.RETENTION if key in values}
    if "keep_all" in kept:
        kept["keep_all_seconds"] = int(kept.pop("keep_all"))
    resync = default.resync
    if "resync" in values:
        resync = replace(resync, automatic=values["resync"] == "auto")
    if "resync_window" in values:
        resync = replace(resync, window=values["resync_window"])
    own = {key: value for key, value in values.items() if key not in (*keys.RETENTION, "resync", "resync_window")}
    return replace(default, retention=replace(default.retention, **kept), resync=resync, **own)


def _guess(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(names) or 'none'}"


def shown(value: Any) -> str:
    """A value as the file's author would know it again."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(shown(one) for one in value)}]"
    return "a table" if isinstance(value, dict) else repr(value)


def dotted(path: Path) -> str:
    """A table's name as the file says it: `vm."web.example"`; an array of tables does not number its items."""
    names = (part for part in path if isinstance(part, str))
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"' for part in names)


def lines(text: str) -> dict[Path, int]:
    """For each table and key, the first line after which the text so far holds it: of a value of several lines, the
    last. Exact and slow: for a person only."""
    found: dict[Path, int] = {}
    split = text.splitlines()
    for count in range(1, len(split) + 1):
        try:
            document = tomllib.loads("\n".join(split[:count]))
        except tomllib.TOMLDecodeError:  # within a value of several lines
            continue
        for path in _paths((), document):
            found.setdefault(path, count)
    return found


def _paths(path: Path, table: Mapping[str, Any]) -> Iterator[Path]:
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _paths((*path, key), value)
        for number, item in enumerate(value if isinstance(value, list) else (), 1):
            if isinstance(item, dict):
                yield (*path, key, number)
                yield from _paths((*path, key, number), item)


# Where a setting comes from -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """A setting that applies. `value`: as the file says it, or would say the default; None for none. `table`: where
    it is said, such as "policy.gold", None for the default; `line`: in the file. `definition`: a note of which adopted
    definition says it, None if none does."""

    key: str
    value: Any
    table: str | None = None
    line: int | None = None
    definition: str | None = None

    @property
    def source(self) -> str:
        """ "default", or "[policy.gold], line 20", or "travelled with recovery point 1f3b9c2e-000017"."""
        if self.definition is not None:
            return self.definition
        return "default" if self.table is None else f"[{self.table}], line {self.line}"


class Origins:
    """Where the settings of VMs come from, in a text that was found without fault. `document`: what became of it; of
    what the text does not say, no line is told."""

    def __init__(self, text: str, document: Mapping[str, Any] | None = None) -> None:
        self._document = tomllib.loads(text) if document is None else document
        self._lines = lines(text)

    def of(self, vm: str | None) -> list[Effective]:
        """Every setting that applies to a VM, its guest's too; None: to one that has no table of its own."""
        own = self._document.get("vm", {}).get(vm, {}) if vm is not None else {}
        tables: list[Layer] = [((name,), self._document.get(name, {})) for name in ("replication", "retention")]
        if "policy" in own:
            name = own["policy"]
            tables.append((("policy", name), self._document["policy"][name]))
        if vm is not None:
            tables.append((("vm", vm), own))
        known = keys.VM if vm is not None else keys.POLICY
        found = [self._effective(key, known[key].default, tables) for key in known]
        for name in _OWN_TABLES:
            if name in own:
                assert vm is not None
                found += self._within(("vm", vm, name), own[name])
        return found

    def _within(self, path: Path, table: Mapping[str, Any]) -> list[Effective]:
        """Of a table of a VM's: what it says, and the defaults that matter then."""
        known = [keys.GUEST, guests.BOOT] if path[-1] == "guest" else [guests.ADDRESSES]
        settings = [
            self._effective(key, each[key].default, [(path, table)])
            for each in known
            if not each.keys().isdisjoint(table)
            for key in each
        ]
        return [replace(each, key=f"{path[-1]}.{each.key}") for each in settings if each.value is not None]

    def _effective(self, key: str, default: Any, tables: Sequence[Layer]) -> Effective:
        for path, values in reversed(tables):
            if key in values:
                return Effective(key=key, value=values[key], table=dotted(path), line=self._lines.get((*path, key)))
        return Effective(key=key, value=default)
