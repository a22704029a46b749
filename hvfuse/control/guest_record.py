"""What stands of a guest that was booted on disks that were failed over, in its state directory, mode 0700.

    guest.json   JSON, the fields of `GuestRecord`
    guest.lock   held (flock) by the guest from before it is one: the descriptor is handed down to it
    boot.lock    held by whoever boots it or ends it
    guest.log    what it said: qemu's output, and the hooks'
    qmp.sock     our monitor of a qemu
    domain.xml   what libvirt was given

The record is durable before the guest is started, and removed once it has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from hvfuse import system
from hvfuse.control.guest_plan import BootPlan, Kind
from hvfuse.control.guest_settings import Mode
from hvfuse.errors import CorruptError

_VERSION = 1


class Step(StrEnum):
    """How far a boot has come."""

    MEANT = "meant"  # it is about to be started, or was
    STARTED = "started"
    BOOTED = "booted"  # its after_boot hook has passed


class Ending(StrEnum):
    """How a guest was ended."""

    SHUT_DOWN = "shut-down"  # by itself, having been asked to
    QUIT = "quit"  # like a power cut, though qemu wrote out what it held
    KILLED = "killed"
    NOT_RUNNING = "not-running"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRecord:
    """`token`: what tells the guest from every other: of a qemu, the value of a variable in its environment; of a
    domain, its UUID. `process`: the `system.process_identity` of a qemu, None as long as nobody has noted it."""

    kind: Kind
    vm: str
    name: str
    mode: Mode
    point: str
    token: str
    step: Step = Step.MEANT
    process: Mapping[str, Any] | None = None

    @classmethod
    def meant(cls, plan: BootPlan, token: str) -> GuestRecord:
        """Of a guest that is about to be started."""
        return cls(kind=plan.kind, vm=plan.vm, name=plan.name, mode=plan.mode, point=plan.point, token=token)

    def save(self, state_dir: str) -> None:
        """Durably. Raises OSError."""
        text = json.dumps({"version": _VERSION, **asdict(self)})
        system.replace_file(f"boot:{self.step}", record_path(state_dir), text.encode())


def record_path(state_dir: str) -> str:
    """Where the record lies."""
    return os.path.join(state_dir, "guest.json")


def log_path(state_dir: str) -> str:
    """Where it is kept what the guest and the hooks said."""
    return os.path.join(state_dir, "guest.log")


def load(state_dir: str) -> GuestRecord | None:
    """What was saved last; None if there is nothing. Raises CorruptError, OSError."""
    path = record_path(state_dir)
    try:
        with open(path, "rb") as file:
            fields = json.loads(file.read())
        if fields.pop("version") != _VERSION:
            raise CorruptError(f"{path}: this was written by another version of hvfuse")
        kinds = {"kind": Kind(fields["kind"]), "mode": Mode(fields["mode"]), "step": Step(fields["step"])}
        return GuestRecord(**{**fields, **kinds})
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{path}: the record of a guest makes no sense: {error!r}") from None


def forget(state_dir: str) -> None:
    """Remove the record of a guest that has ended. It may come back if the host dies now, and does no harm."""
    system.unlink("boot:forget", record_path(state_dir), missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(state_dir, "qmp.sock"))
