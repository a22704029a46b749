"""A job: one thing that an administrator, or hvfuse by itself, set about; its steps, errors, what may be done with it.

    NotStarted ──▶ InProgress ──▶ Succeeded
                     │   ▲   └──▶ Failed ──▶ (restart: a new job)
                     ▼   │   └──▶ Cancelled
                   Suspended ──▶ Cancelled, Failed, Succeeded

A job in progress belongs to a process (`owner`); one whose owner is gone is *interrupted*: suspended where something
will go on with it by itself, failed with its next command where not. Pure: a method returns the job as it is after it.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from hvfuse.errors import CorruptError, HvfuseError

INTERRUPTED = "interrupted"
"""Id of the error of a job whose process ended in the middle."""


class JobKind(StrEnum):
    """What the job does."""

    ENABLE = "Enable protection"
    INITIAL = "Initial replication"
    FINALIZE = "Finalize protection"
    RESYNC = "Resynchronize"
    UPDATE_DISKS = "Update disks"
    TEST_FAILOVER = "Test failover"
    CLEANUP = "Cleanup test failover"
    PLANNED_FAILOVER = "Planned failover"
    UNPLANNED_FAILOVER = "Unplanned failover"
    COMMIT = "Commit"
    CANCEL_FAILOVER = "Cancel failover"
    REVERSE = "Reverse replicate"
    HYDRATE = "Hydrate disks"
    DISABLE = "Disable protection"
    VERIFY = "Verify"
    EXPORT = "Export"
    IMPORT = "Import"
    PLAN = "Recovery plan"


COPY_KINDS = frozenset({JobKind.INITIAL, JobKind.RESYNC, JobKind.UPDATE_DISKS})
"""Jobs that the shipper does, and goes on with by itself whatever ended it."""


GOES_ON = COPY_KINDS | {JobKind.HYDRATE}
"""Jobs that a process in the background does, and goes on with by itself once it runs again."""


class JobState(StrEnum):
    """How far a job, or one of its steps, is."""

    NOT_STARTED = "NotStarted"
    IN_PROGRESS = "InProgress"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"
    SUSPENDED = "Suspended"


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Action(StrEnum):
    """What may be done with a job, each by `hvfuse job ACTION ID`."""

    CANCEL = "cancel"
    RESUME = "resume"
    RESTART = "restart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step. Times in ns since 1970, None before it begins or ends. `text`: what there is to say of it."""

    name: str
    state: JobState = JobState.NOT_STARTED
    started_ns: int | None = None
    ended_ns: int | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    """Why a job, or an attempt of it, failed. `id`: the class of the exception, or INTERRUPTED. `recommendation`: what
    to do, mostly a command."""

    id: str
    message: str
    causes: tuple[str, ...] = ()
    recommendation: str | None = None

    @classmethod
    def of(cls, error: BaseException, *, otherwise: str | None = None) -> JobError:
        """From an exception; `otherwise`: what to recommend if it does not say."""
        hint = error.hint if isinstance(error, HvfuseError) else None
        causes = () if error.__cause__ is None else (str(error.__cause__),)
        return cls(
            id=type(error).__name__,
            message=str(error) or type(error).__name__,
            causes=tuple(cause for cause in causes if cause and cause != str(error)),
            recommendation=hint or otherwise,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job. `vm`: what it is about. `percent`: 0 to 100. `owner`: `system.process_identity` of the process that is
    at it, None while none is. `command`: the words after `hvfuse` that do the job, or go on with it, again."""

    id: int
    kind: JobKind
    vm: str
    state: JobState = JobState.NOT_STARTED
    steps: tuple[Step, ...] = ()
    errors: tuple[JobError, ...] = ()
    started_ns: int | None = None
    ended_ns: int | None = None
    percent: int = 0
    owner: Mapping[str, Any] | None = None
    command: tuple[str, ...] = ()

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def next_command(self) -> str | None:
        """What to type, if anything is to be done."""
        if self.state is JobState.SUSPENDED:
            return f"hvfuse job resume {self.id}"
        if self.state is JobState.FAILED:
            last = self.errors[-1].recommendation if self.errors else None
            return last or (f"hvfuse job restart {self.id}" if self.command else None)
        return None

    @property
    def allowed(self) -> tuple[Action, ...]:
        """What may be done with it now."""
        match self.state:
            case JobState.IN_PROGRESS:
                return (Action.CANCEL,) if self.kind in CANCELLABLE else ()
            case JobState.SUSPENDED | JobState.NOT_STARTED:
                return (Action.RESUME, Action.CANCEL)
            case JobState.FAILED | JobState.CANCELLED:
                return (Action.RESTART,) if self.command else ()
            case _:
                return ()

    # What happens to it -------------------------------------------------------------------------------------

    def planned(self, steps: Sequence[str]) -> Job:
        """With these steps before it, none of them begun."""
        return replace(self, steps=tuple(Step(name=name) for name in steps))

    def advanced(self, percent: int) -> Job:
        """So much of it is done; never less than before."""
        return replace(self, percent=max(self.percent, min(100, percent)))

    def begin(self, owner: Mapping[str, Any], now_ns: int) -> Job:
        """Somebody works at it, for the first time or again."""
        started = now_ns if self.started_ns is None else self.started_ns
        return replace(self, state=JobState.IN_PROGRESS, owner=dict(owner), started_ns=started, ended_ns=None)

    def step(self, name: str, now_ns: int, text: str | None = None) -> Job:
        """The step of that name is under way; those before it are done, those behind it still to come. One that is
        under way goes on."""
        if all(step.name != name for step in self.steps):
            return replace(self, steps=(*self._steps_done(now_ns), _begun(Step(name=name), now_ns, text)))
        at = next(number for number, step in enumerate(self.steps) if step.name == name)
        before = tuple(_ended(step, JobState.SUCCEEDED, now_ns) for step in self.steps[:at])
        behind = tuple(step if step.state in ENDED else Step(name=step.name) for step in self.steps[at + 1 :])
        return replace(self, steps=(*before, _begun(self.steps[at], now_ns, text), *behind))

    def note(self, text: str) -> Job:
        """Say something of the step under way."""
        steps = tuple(replace(step, text=text) if step.state is JobState.IN_PROGRESS else step for step in self.steps)
        return replace(self, steps=steps)

    def fail_step(self, name: str, error: JobError, now_ns: int) -> Job:
        """The step did not come out as it should, and the next ones may be tried all the same."""
        job = self.step(name, now_ns, error.message)
        steps = tuple(_ended(step, JobState.FAILED, now_ns) if step.name == name else step for step in job.steps)
        return replace(job, steps=steps, errors=(*self.errors, error))

    def succeed(self, now_ns: int) -> Job:
        return replace(self._end(JobState.SUCCEEDED, now_ns), steps=self._steps_done(now_ns), percent=100)

    def fail(self, error: JobError | None, now_ns: int) -> Job:
        """It is over; `error`: why, None if that was told before."""
        failed = self._end(JobState.FAILED, now_ns)
        return replace(failed, errors=self.errors if error is None else (*self.errors, error))

    def cancel(self, now_ns: int) -> Job:
        return self._end(JobState.CANCELLED, now_ns)

    def suspend(self, text: str | None = None) -> Job:
        """It waits; the step under way with it."""
        steps = tuple(
            replace(step, state=JobState.SUSPENDED, text=text or step.text)
            if step.state in (JobState.IN_PROGRESS, JobState.SUSPENDED)
            else step
            for step in self.steps
        )
        return replace(self, state=JobState.SUSPENDED, owner=None, steps=steps)

    def attempt_failed(self, error: JobError) -> Job:
        """It will be tried again. The same trouble twice in a row is told once."""
        return self if self.errors[-1:] == (error,) else replace(self, errors=(*self.errors, error)[-ERRORS_KEPT:])

    def interrupt(self, now_ns: int) -> Job:
        """Its process is gone."""
        at = next((step.name for step in self.steps if step.state is JobState.IN_PROGRESS), None)
        where = f" at “{at}”" if at is not None else ""
        if self.kind in GOES_ON:
            return self.suspend(f"its process ended{where}; the next one goes on with it")
        command = f"hvfuse {shlex.join(self.command)}" if self.command else None
        error = JobError(id=INTERRUPTED, message=f"its process ended{where}", recommendation=command)
        return self.fail(error, now_ns)

    def _end(self, state: JobState, now_ns: int) -> Job:
        steps = tuple(
            _ended(step, state, now_ns) if step.state in (JobState.IN_PROGRESS, JobState.SUSPENDED) else step
            for step in self.steps
        )
        return replace(self, state=state, owner=None, ended_ns=now_ns, steps=steps)

    def _steps_done(self, now_ns: int) -> tuple[Step, ...]:
        return tuple(_ended(step, JobState.SUCCEEDED, now_ns) for step in self.steps)

    # Kept ---------------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """The fields but the id, as they are kept."""
        values = dataclasses.asdict(self)
        del values["id"]
        return values

    @classmethod
    def from_json(cls, job_id: int, values: Mapping[str, Any]) -> Job:
        """From `as_json`; fields that are missing have their defaults, unknown ones are left out. Raises CorruptError
        for what is no job, or one of a kind or in a state that only a later version knows."""
        try:
            return cls(
                **_known(cls, values)
                | {
                    "id": job_id,
                    "kind": JobKind(values["kind"]),
                    "state": JobState(values.get("state", JobState.NOT_STARTED)),
                    "steps": tuple(_step(step) for step in values.get("steps", ())),
                    "errors": tuple(_error(error) for error in values.get("errors", ())),
                    "command": tuple(values.get("command", ())),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"the record of job {job_id} is not understood: {error}") from None


ERRORS_KEPT = 20
CANCELLABLE = COPY_KINDS | {JobKind.EXPORT, JobKind.IMPORT, JobKind.VERIFY}
"""What can be given up on the way; anything else is over in a moment."""


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: values[one.name] for one in dataclasses.fields(kind) if one.name in values}


def _step(values: Mapping[str, Any]) -> Step:
    return Step(**_known(Step, values) | {"state": JobState(values.get("state", JobState.NOT_STARTED))})


def _error(values: Mapping[str, Any]) -> JobError:
    return JobError(**_known(JobError, values) | {"causes": tuple(values.get("causes", ()))})


def _begun(step: Step, now_ns: int, text: str | None) -> Step:
    started = now_ns if step.started_ns is None else step.started_ns
    return replace(step, state=JobState.IN_PROGRESS, started_ns=started, ended_ns=None, text=text or step.text)


def _ended(step: Step, state: JobState, now_ns: int) -> Step:
    if step.state in ENDED:
        return step
    return replace(step, state=state, started_ns=step.started_ns or now_ns, ended_ns=now_ns)
