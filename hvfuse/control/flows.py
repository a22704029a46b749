"""What each flow of a failover does, step by step. Pure: the job shows it, `--dry-run` prints it, a driver does it.

Each step is done wholly or not at all, and may be done again: a flow that was cut off is gone on with by the same
command, from whatever state it left (`docs/failover.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hvfuse.control.job import JobKind
from hvfuse.control.jobs import Running


@dataclass(frozen=True, slots=True)
class FlowStep:
    """`name`: as the job shows it; `what`: what it does, in a sentence without an end."""

    name: str
    what: str


UNUSED = FlowStep("check that the disks are unused", "refuse, and say who, if anybody has one of the VM's disks open")
HOLD = FlowStep("hold the disks", "make the source's disks read-only")
LAST = FlowStep("send the last cycle", "end the shipper, and send everything that was written")
PROVE = FlowStep("compare both sides", "read all disks on both sides, and compare their digests: they have to be equal")
CLOSE = FlowStep("close the replica", "have the store take nothing in any more, until this is cancelled or failed over")

CHOOSE = FlowStep("choose the recovery point", "find the point, and see that it can be read and the disks be served")
TAKE = FlowStep("raise the epoch", "put down in the store that the VM is failed over: the source can ship nothing more")
MOUNT = FlowStep("mount the disks", "show the point's disks under mnt/, writable; what is written is kept apart")
BOOT = FlowStep("boot the guest", "start the guest on these disks")
VALIDATE = FlowStep("validate", "run the validation hook, and keep its verdict")

SHUT_DOWN = FlowStep("shut the guest down", "end the guest that was booted on these disks, if it runs")
UNMOUNT = FlowStep("unmount", "end the mount; refuse, and say who, if a program uses it")
DROP = FlowStep("drop what was written", "delete what was written to the disks since the failover")
GIVE_BACK = FlowStep("give the VM back", "put down in the store that the VM is its source's again")
CHANGE = FlowStep("change the recovery point", "put down the other point in the store")

FINAL = FlowStep("make it final", "put down in the store that the VM is this side's; let its other recovery points go")
OWN = FlowStep("take the VM over", "keep its definition here, and hydrate its disks in the background")

RELEASE = FlowStep("let the disks go", "send nothing any more, unmount, and give up the logs")
HAND_OVER = FlowStep("hand the disks over", "move the disks into this home's store: they are the replica from now on")
INVITE = FlowStep("tell the other side", "put down in its store that the VM can be replicated to here")
WAIT = FlowStep("wait for the disks", "wait until the disks are hydrated and tracked")
TARGET = FlowStep("choose the target", "find the store that the VM is to be replicated to, and see that it takes it")
TURN = FlowStep(
    "turn replication round", "replicate the VM to there: both sides are compared, and what differs is sent"
)

PREPARE = (UNUSED, HOLD, LAST, PROVE, CLOSE)
"""Of the source, in a planned failover."""
REOPEN = (
    FlowStep("open the replica", "have the store take cycles in again"),
    FlowStep("let the disks go", "make the source's disks writable again"),
)
"""Of the source, when that is cancelled."""


def failover(*, boot: bool = False, validate: bool = False) -> tuple[FlowStep, ...]:
    """Of the target, in a failover that is planned or not."""
    return (CHOOSE, TAKE, MOUNT, *((BOOT,) if boot else ()), *((VALIDATE,) if validate else ()))


def change_point(*, boot: bool = False, validate: bool = False) -> tuple[FlowStep, ...]:
    """Of the target, when another point is wanted."""
    more = (*((BOOT,) if boot else ()), *((VALIDATE,) if validate else ()))
    return (CHOOSE, SHUT_DOWN, UNMOUNT, DROP, CHANGE, MOUNT, *more)


CANCEL = (SHUT_DOWN, UNMOUNT, DROP, GIVE_BACK)
COMMIT = (FINAL, OWN)
GIVE_WAY = (UNUSED, RELEASE, HAND_OVER, INVITE)
"""Of the side that was failed over from, in reverse replication."""
REVERSE = (WAIT, TARGET, TURN)
"""Of the side that has the VM."""


def drive(job: Running, steps: Sequence[FlowStep], acts: Mapping[FlowStep, Callable[[], str | None]]) -> None:
    """Do the steps in turn. An act returns what there is to say of it. Raises what an act raises."""
    for step in steps:
        job.step(step.name)
        said = acts[step]()
        if said:
            job.note(said)


def as_text(kind: JobKind, vm: str, steps: Sequence[FlowStep]) -> list[str]:
    """The plan in lines."""
    lines = [f"{number}. {step.name}: {step.what}" for number, step in enumerate(steps, 1)]
    return [f"{kind} of {vm}; nothing is done yet:", *lines]


def as_json(kind: JobKind, vm: str, steps: Sequence[FlowStep]) -> dict[str, object]:
    """The same for programs."""
    told = [{"name": step.name, "what": step.what} for step in steps]
    return {"vm": vm, "kind": kind.value, "dry_run": True, "steps": told}
