"""A recovery plan: groups of VMs that are failed over in order, with commands and pauses in between. Pure.

A plan is a row of stages; each has to be done before the next begins, and what is in one may be done at once:

    group 1: its hooks `before`, one by one │ its VMs, all at once │ its hooks `after`, one by one │ its pause
    group 2: …

What comes next is decided from the plan as it is written now and the keys of the steps that are behind: a plan may be
mended between two attempts. A step's key therefore says what the step does rather than where it stands, so that a hook
that is put in front of others makes none of them pass for another.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

LATEST = "latest"
Words = tuple[str, ...]
"""A command and its arguments."""


class Mode(StrEnum):
    """How a plan fails over."""

    TEST = "test"
    PLANNED = "planned"
    UNPLANNED = "unplanned"


class StepKind(StrEnum):
    """What a step is; in the order within a group."""

    BEFORE = "before"
    VM = "vm"
    AFTER = "after"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """VMs that are failed over at once. `before`, `after`: hooks. `pause`: what an administrator is to do after the
    group, None for no pause. `boot`: whether the guests are started. `hook_timeout`: seconds that one hook may take."""

    name: str
    vms: tuple[str, ...]
    before: tuple[Words, ...] = ()
    after: tuple[Words, ...] = ()
    pause: str | None = None
    boot: bool = False
    hook_timeout: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`point`: which recovery point the VMs are failed over to; `points`: of those VMs that have another one."""

    name: str
    groups: tuple[Group, ...]
    point: str = LATEST
    points: Mapping[str, str] = field(default_factory=dict)

    @property
    def vms(self) -> tuple[str, ...]:
        """All VMs, in the order of the plan."""
        return tuple(vm for group in self.groups for vm in group.vms)

    def point_of(self, vm: str) -> str:
        """The recovery point that is meant for a VM."""
        return self.points.get(vm, self.point)

    def group(self, name: str) -> Group:
        """The group of that name, which the plan has."""
        return next(group for group in self.groups if group.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStep:
    """One step. `what`: the VM's name, the hook's command, or the pause's text. `key`: tells it from all others of its
    plan."""

    group: str
    kind: StepKind
    what: str
    words: Words = ()
    key: str

    @property
    def name(self) -> str:
        """As it is told to a person."""
        return step_name(self.group, self.kind, self.what)


def step_name(group: str, kind: StepKind, what: str) -> str:
    """A step as it is told to a person: "databases: db01"."""
    word = {StepKind.VM: "", StepKind.PAUSE: "pause: "}.get(kind, f"{kind} ")
    return f"{group}: {word}{what}"


def steps(plan: Plan, done: Container[str]) -> tuple[PlanStep, ...]:
    """What comes next, given the keys of the steps that are behind: steps that may be done at once. Empty: nothing is
    left to do."""
    for stage in stages(plan):
        left = tuple(step for step in stage if step.key not in done)
        if left:
            return left
    return ()


def stages(plan: Plan) -> Iterator[tuple[PlanStep, ...]]:
    """The whole plan, stage by stage."""
    for group in plan.groups:
        yield from ((step,) for step in _hooks(group.name, StepKind.BEFORE, group.before))
        yield tuple(_step(group.name, StepKind.VM, vm) for vm in group.vms)
        yield from ((step,) for step in _hooks(group.name, StepKind.AFTER, group.after))
        if group.pause is not None:
            yield (_step(group.name, StepKind.PAUSE, group.pause),)


def stage_name(stage: Sequence[PlanStep]) -> str:
    """A stage as it is told to a person: "databases: db01, db02"."""
    return step_name(stage[0].group, stage[0].kind, ", ".join(step.what for step in stage))


def _hooks(group: str, kind: StepKind, commands: Sequence[Words]) -> Iterator[PlanStep]:
    seen: Counter[Words] = Counter()
    for words in commands:
        seen[words] += 1
        yield _step(group, kind, shlex.join(words), words=words, nth=seen[words])


def _step(group: str, kind: StepKind, what: str, *, words: Words = (), nth: int = 1) -> PlanStep:
    """`nth`: of the same hooks of a group; from the second on, it is part of the key."""
    # A VM or a pause is known by its kind: there is one VM of that name in a plan, and a pause whose text is mended is
    # the same pause.
    rest = {StepKind.VM: what, StepKind.PAUSE: ""}.get(kind, what if nth == 1 else f"{what} #{nth}")
    return PlanStep(group=group, kind=kind, what=what, words=words, key=f"{group}/{kind}/{rest}")
