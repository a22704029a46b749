"""The tables `[plan.NAME]` of `hvfuse.toml`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hvfuse.control import instants
from hvfuse.control.config_values import DAY, BadValueError, Key, command, duration
from hvfuse.control.home import name_fault
from hvfuse.control.plan import Group, Plan
from hvfuse.errors import UsageError

Path = tuple[str | int, ...]
"""Where a value stands in the file; a number, from 1, for an item of an array of tables."""
ReadTable = Callable[[Path, Any, Mapping[str, Key]], dict[str, Any]]
"""Parses the values of a table; refuses what is not one, and keys that are not known."""
Fault = Callable[[Path, str], UsageError]


def _commands(value: Any) -> tuple[tuple[str, ...], ...]:
    """One command, or several."""
    one = command()
    try:
        if isinstance(value, list) and any(isinstance(each, list) for each in value):
            return tuple(one(each) for each in value)
        return (one(value),) if value != [] else ()
    except BadValueError:
        raise BadValueError(
            'a command and its arguments, such as ["/usr/local/bin/tell", "now"], or a list of such commands'
        ) from None


def _vms(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or any(not isinstance(n, str) or name_fault(n) for n in value):
        raise BadValueError('a list of at least one VM\'s name, such as ["db01", "db02"]')
    return tuple(value)


def _group_name(value: Any) -> str:
    if not isinstance(value, str) or name_fault(value) is not None:
        raise BadValueError("the name of a group, in quotes, without a slash")
    return value


def _line(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise BadValueError("a line that says what is to be done meanwhile, in quotes")
    return value


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadValueError("true or false")
    return value


def _point(value: Any) -> str:
    is_known = value in ("latest", "latest-app-consistent")
    if not is_known and (not isinstance(value, str) or instants.parse_date(value) is None):
        raise BadValueError(
            '"latest", "latest-app-consistent", or a time such as "2026-11-22T18:30", which means the last recovery '
            "point not after it"
        )
    return str(value)


PLAN: Mapping[str, Key] = {"point": Key(_point, "latest")}
"""Without "group" and "points", which are tables."""
GROUP: Mapping[str, Key] = {
    "name": Key(_group_name),
    "vms": Key(_vms),
    "before": Key(_commands, []),
    "after": Key(_commands, []),
    "pause": Key(_line),
    "boot": Key(_yes_or_no, False),
    "hook_timeout": Key(duration(1, DAY, 'from "1s" to "1d", such as "10m"'), "10m"),
}


class PlanReader:
    """`table` and `fault`: how a table of this file is read, and a fault in it told."""

    def __init__(self, table: ReadTable, fault: Fault) -> None:
        self._table = table
        self._fault = fault

    def read(self, name: str, table: Any) -> Plan:
        """The plan of that name. Raises UsageError."""
        path: Path = ("plan", name)
        structure = {"group": Key(_as_is), "points": Key(_as_is)}
        values = self._table(path, table, {**PLAN, **structure})
        if "group" not in values:
            raise self._fault(path, f"this plan has no group: write [[plan.{name}.group]] with name and vms")
        groups = self._groups((*path, "group"), values["group"])
        vms = {vm for group in groups for vm in group.vms}
        points = self._points((*path, "points"), values.get("points", {}), vms)
        return Plan(name=name, groups=groups, point=values.get("point", PLAN["point"].default), points=points)

    def _points(self, path: Path, table: Any, vms: set[str]) -> dict[str, str]:
        return self._table(path, table, dict.fromkeys(sorted(vms), PLAN["point"]))

    def _groups(self, path: Path, tables: Any) -> tuple[Group, ...]:
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise self._fault(path, f"each group is a table: write [[{path[0]}.{path[1]}.group]] on a line of its own")
        found: list[Group] = []
        owners: dict[str, str] = {}
        for number, table in enumerate(tables, 1):
            group = self._group((*path, number), table)
            if any(group.name == other.name for other in found):
                raise self._fault((*path, number, "name"), f'there is a group "{group.name}" before')
            for vm in group.vms:
                if vm in owners:
                    where = "twice" if owners[vm] == group.name else f'in the group "{owners[vm]}" as well'
                    raise self._fault((*path, number, "vms"), f'"{vm}" is {where}: a VM is failed over once')
                owners[vm] = group.name
            found.append(group)
        return tuple(found)

    def _group(self, path: Path, table: Any) -> Group:
        values = self._table(path, table, GROUP)
        for key in ("name", "vms"):
            if key not in values:
                raise self._fault(path, f"{key} is missing: each group has a name and its vms")
        return Group(**values)


def _as_is(value: Any) -> Any:
    return value
