"""What the shipper needs of the guest: that it stands still for the moment of a barrier, and moves again afterwards."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from hvfuse.errors import HvfuseError


class FreezeError(HvfuseError):
    """The guest could not be brought to stand still. It moves, unless `Guest.stuck` says otherwise."""

    recoverable = True


class GoneError(FreezeError):
    """The guest does not run: nothing of it stands still."""


@dataclass(slots=True)
class Stillness:
    """One time that the guest stood still. `proof`: path of a file that goes before the guest moves again.

    Known at the end: `seconds` from when the freezing began until the guest moved again, or was given up. `broken`:
    the guest had moved by itself before it was let go, so what was sealed meanwhile is crash-consistent.
    """

    proof: str
    seconds: float = 0.0
    broken: str | None = None


class Guest(Protocol):
    """A guest that can be frozen: its file systems made clean and kept from writing."""

    def frozen(self) -> AbstractContextManager[Stillness]:
        """Freeze the guest for the body of a `with`, and thaw it at its end, whatever happens there.

        Entering raises FreezeError; the guest moves again then. Leaving raises nothing: a guest that could not be
        thawed is what `stuck` tells.
        """

    def thaw_leftover(self) -> None:
        """Thaw the guest if a shipper died while it stood still. Raises nothing; see `stuck`."""

    def stuck(self) -> str | None:
        """Why the guest may be standing still although nobody needs it to; None if it is not."""
