"""Why a VM's health is what it is, one by one. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class Health(IntEnum):
    """The worse, the higher."""

    NORMAL = 0
    WARNING = 1
    CRITICAL = 2

    def __str__(self) -> str:
        return self.name.capitalize()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why the health is not Normal; or what is to come, if that is Normal. `id` never changes; `evidence`: the figures
    behind `text`, JSON values; `next_command` is what to type, if anything."""

    id: str
    health: Health
    text: str
    next_command: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What of it is told wherever it is told: not the figures behind it."""
        return {"id": self.id, "health": str(self.health), "text": self.text, "next_command": self.next_command}


def warning(reason_id: str, text: str, next_command: str | None = None, **evidence: Any) -> Reason:
    """A reason of that health."""
    return Reason(id=reason_id, health=Health.WARNING, text=text, next_command=next_command, evidence=evidence)


def critical(reason_id: str, text: str, next_command: str | None = None, **evidence: Any) -> Reason:
    """A reason of that health."""
    return Reason(id=reason_id, health=Health.CRITICAL, text=text, next_command=next_command, evidence=evidence)
