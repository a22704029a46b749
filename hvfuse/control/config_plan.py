"""The tables `[plan.NAME]` of `hvfuse.toml`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hvfuse.control import config_values as keys
from hvfuse.control.config_values import Key
from hvfuse.control.plan import Group, Plan
from hvfuse.errors import UsageError

Path = tuple[str | int, ...]
"""Where a value stands in the file; a number, from 1, for an item of an array of tables."""
ReadTable = Callable[[Path, Any, Mapping[str, Key]], dict[str, Any]]
"""Parses the values of a table; refuses what is not one, and keys that are not known."""
Fault = Callable[[Path, str], UsageError]


class PlanReader:
    """`table` and `fault`: how a table of this file is read, and a fault in it told."""

    def __init__(self, table: ReadTable, fault: Fault) -> None:
        self._table = table
        self._fault = fault

    def read(self, name: str, table: Any) -> Plan:
        """The plan of that name. Raises UsageError."""
        path: Path = ("plan", name)
        structure = {"group": Key(_as_is), "points": Key(_as_is)}
        values = self._table(path, table, {**keys.PLAN, **structure})
        if "group" not in values:
            raise self._fault(path, f"this plan has no group: write [[plan.{name}.group]] with name and vms")
        groups = self._groups((*path, "group"), values["group"])
        vms = {vm for group in groups for vm in group.vms}
        points = self._points((*path, "points"), values.get("points", {}), vms)
        return Plan(name=name, groups=groups, point=values.get("point", keys.PLAN["point"].default), points=points)

    def _points(self, path: Path, table: Any, vms: set[str]) -> dict[str, str]:
        return self._table(path, table, dict.fromkeys(sorted(vms), keys.PLAN["point"]))

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
        values = self._table(path, table, keys.PLAN_GROUP)
        for key in ("name", "vms"):
            if key not in values:
                raise self._fault(path, f"{key} is missing: each group has a name and its vms")
        return Group(**values)


def _as_is(value: Any) -> Any:
    return value
