"""How far the disks of a VM that was failed over to here are hydrated."""

from __future__ import annotations

from dataclasses import dataclass

from hvfuse import wire
from hvfuse.control.home import Home
from hvfuse.control.supervisor import is_standing
from hvfuse.errors import UnreachableError

ANSWER_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hydration:
    """`done` of `total` bytes are copied; `error`: why it does not go on, None while it does."""

    done: int
    total: int
    error: str | None


def hydration(home: Home, vm: str) -> Hydration | None:
    """How far it is; None once the disks are plain and tracked. Raises UnreachableError if nobody serves them."""
    try:
        told = wire.request(home.tracker_socket(vm), "status", timeout=ANSWER_SECONDS)
    except UnreachableError:
        what = "hydrated any further" if is_standing(home.folder(vm)) else "tracked"
        raise UnreachableError(f"{vm} is not mounted: its disks are not {what}", hint=f"hvfuse mount {vm}") from None
    if not told.get("standing"):
        return None
    left = told["hydration"]
    return Hydration(done=int(left["done"]), total=int(left["total"]), error=left.get("error"))
