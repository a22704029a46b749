"""A run of a recovery plan: what was done, when, and what stands. Pure: a method returns the run as it is after it.

    InProgress ──▶ Succeeded
      │   ▲   └──▶ Failed ────┐
      ▼   │                   ├──▶ InProgress (it goes on), Cancelled (given up)
     Paused ──────────────────┘

A run in progress belongs to a process (`owner`); one whose owner is gone has failed at what was under way. Only what
Succeeded or was Skipped is behind a run that goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from hvfuse.control.plan import Mode, PlanStep, StepKind, step_name
from hvfuse.errors import CorruptError

INTERRUPTED = "the plan's process ended meanwhile"


class RunState(StrEnum):
    """How far a run is."""

    IN_PROGRESS = "InProgress"
    PAUSED = "Paused"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


OPEN = frozenset({RunState.IN_PROGRESS, RunState.PAUSED, RunState.FAILED})
"""There is something to go on with."""


class StepState(StrEnum):
    """How far a step is; one that was not begun has no record."""

    IN_PROGRESS = "InProgress"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SKIPPED = "Skipped"


BEHIND = frozenset({StepState.SUCCEEDED, StepState.SKIPPED})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step. `first_ns`: when it was begun for the first time, `started_ns`: for the last; both ns since 1970.
    `error`, `hint`: why it failed. `output`: the end of what a hook said. `process`: `system.process_identity` of the
    hook that was started last. `outcome`: what a VM's failover told, "point" and "point_time_ns" among it."""

    key: str
    group: str
    kind: StepKind
    what: str
    state: StepState = StepState.IN_PROGRESS
    attempts: int = 1
    first_ns: int = 0
    started_ns: int = 0
    ended_ns: int | None = None
    error: str | None = None
    hint: str | None = None
    output: str | None = None
    process: Mapping[str, Any] | None = None
    outcome: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As it is told to a person."""
        return step_name(self.group, self.kind, self.what)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRun:
    """One run. `point`: what the command line said that all VMs are failed over to, None for what the plan says.
    `owner`: `system.process_identity` of the process that is at it, None while none is. `job`: id of its newest job.
    `steps`: those that were begun, in that order."""

    id: int
    plan: str
    mode: Mode
    point: str | None = None
    state: RunState = RunState.IN_PROGRESS
    started_ns: int = 0
    ended_ns: int | None = None
    owner: Mapping[str, Any] | None = None
    job: int | None = None
    steps: tuple[StepRecord, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether there is something to go on with."""
        return self.state in OPEN

    @property
    def done(self) -> frozenset[str]:
        """The keys of the steps that are behind it."""
        return frozenset(step.key for step in self.steps if step.state in BEHIND)

    @property
    def failed(self) -> tuple[StepRecord, ...]:
        """The steps that keep it from going on."""
        return tuple(step for step in self.steps if step.state is StepState.FAILED)

    def step(self, key: str) -> StepRecord | None:
        """The step of that key, if it was begun."""
        return next((step for step in self.steps if step.key == key), None)

    # What happens to it -------------------------------------------------------------------------------------

    def taken_up(self, owner: Mapping[str, Any], job: int) -> PlanRun:
        """A process works at it."""
        return replace(self, state=RunState.IN_PROGRESS, owner=dict(owner), job=job, ended_ns=None)

    def left(self, state: RunState, now_ns: int) -> PlanRun:
        """No process works at it any more."""
        return replace(self, state=state, owner=None, ended_ns=None if state is RunState.PAUSED else now_ns)

    def begun(self, step: PlanStep, now_ns: int) -> PlanRun:
        """The step is under way: for the first time, or again. A pause that was there before has begun then."""
        before = self.step(step.key)
        if before is None:
            made = StepRecord(
                key=step.key, group=step.group, kind=step.kind, what=step.what, first_ns=now_ns, started_ns=now_ns
            )
            return replace(self, steps=(*self.steps, made))
        started = before.started_ns if step.kind is StepKind.PAUSE else now_ns
        again = replace(
            before, what=step.what, state=StepState.IN_PROGRESS, attempts=before.attempts + 1, started_ns=started,
            ended_ns=None, error=None, hint=None, output=None, process=None,
        )  # fmt: skip
        return self._with(step.key, lambda _: again)

    def noted(self, key: str, **changes: Any) -> PlanRun:
        """With fields of a step changed."""
        return self._with(key, lambda step: replace(step, **changes))

    def succeeded(self, key: str, now_ns: int, **changes: Any) -> PlanRun:
        """The step is done."""
        return self.noted(key, state=StepState.SUCCEEDED, ended_ns=now_ns, **changes)

    def step_failed(self, key: str, now_ns: int, *, error: str, hint: str | None = None, **changes: Any) -> PlanRun:
        """The step is not done."""
        return self.noted(key, state=StepState.FAILED, ended_ns=now_ns, error=error, hint=hint, **changes)

    def buried(self, now_ns: int) -> PlanRun:
        """Its process is gone. A pause is one all the same; anything else that was under way may or may not be done."""
        waits = any(step.kind is StepKind.PAUSE and step.state is StepState.IN_PROGRESS for step in self.steps)
        steps = tuple(
            replace(step, state=StepState.FAILED, ended_ns=now_ns, error=INTERRUPTED)
            if step.state is StepState.IN_PROGRESS and step.kind is not StepKind.PAUSE
            else step
            for step in self.steps
        )
        return replace(self, steps=steps).left(RunState.PAUSED if waits else RunState.FAILED, now_ns)

    def _with(self, key: str, change: Callable[[StepRecord], StepRecord]) -> PlanRun:
        return replace(self, steps=tuple(change(step) if step.key == key else step for step in self.steps))

    # Kept ---------------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """The fields but the id, as they are kept."""
        values = dataclasses.asdict(self)
        del values["id"]
        return values

    @classmethod
    def from_json(cls, run_id: int, values: Mapping[str, Any]) -> PlanRun:
        """From `as_json`; fields that are not known are left out. Raises CorruptError."""
        try:
            steps = tuple(
                StepRecord(
                    **_known(StepRecord, step) | {"kind": StepKind(step["kind"]), "state": StepState(step["state"])}
                )
                for step in values["steps"]
            )
            states = {"mode": Mode(values["mode"]), "state": RunState(values["state"])}
            return cls(**_known(cls, values) | states | {"id": run_id, "steps": steps})
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"the record of run {run_id} of a recovery plan is not understood: {error}") from None


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: values[one.name] for one in dataclasses.fields(kind) if one.name in values}


# What came of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VmResult:
    """What came of one VM. `state`: None if it was not begun. `age`: seconds that its point was old when the run began:
    what was lost. `rto`: seconds from when the run began until the VM stood; `waited`: what of it went by in pauses."""

    group: str
    vm: str
    state: StepState | None
    point: str | None = None
    point_time_ns: int | None = None
    age: float | None = None
    rto: float | None = None
    waited: float | None = None
    error: str | None = None
    outcome: Mapping[str, Any] = field(default_factory=dict)


def results(run: PlanRun, vms: Sequence[tuple[str, str]]) -> list[VmResult]:
    """What came of each VM. `vms`: (group, VM), as the plan is now; VMs that were in it before follow."""
    begun = {step.what: step for step in run.steps if step.kind is StepKind.VM}
    names = [vm for _, vm in vms]
    gone = [(step.group, vm) for vm, step in begun.items() if vm not in names]
    return [_result(run, group, vm, begun.get(vm)) for group, vm in (*vms, *gone)]


def _result(run: PlanRun, group: str, vm: str, step: StepRecord | None) -> VmResult:
    if step is None:
        return VmResult(group=group, vm=vm, state=None)
    if step.state is not StepState.SUCCEEDED or step.ended_ns is None:
        return VmResult(group=group, vm=vm, state=step.state, error=step.error)
    time_ns = step.outcome.get("point_time_ns")
    return VmResult(
        group=group,
        vm=vm,
        state=step.state,
        point=step.outcome.get("point"),
        point_time_ns=time_ns,
        age=None if time_ns is None else max(0, run.started_ns - time_ns) / 1e9,
        rto=max(0, step.ended_ns - run.started_ns) / 1e9,
        waited=waited(run, until_ns=step.ended_ns),
        outcome=step.outcome,
    )


def waited(run: PlanRun, *, until_ns: int) -> float:
    """Seconds that went by in pauses, until that instant."""
    spans = (
        min(step.ended_ns or until_ns, until_ns) - step.started_ns
        for step in run.steps
        if step.kind is StepKind.PAUSE and step.started_ns < until_ns
    )
    return sum(max(0, span) for span in spans) / 1e9
