"""Runs a recovery plan: what comes next is decided by `hvfuse.control.plan`, done here, and written down.

A run may stop at any step: a hook or a VM failed, an administrator is waited for, the process was killed. What
succeeded stands, and is never done again; what failed, or was under way, is done again when the run goes on, or left
out. One process at a time runs a plan; it has the plan's lock.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from hvfuse import system
from hvfuse.control.home import HOME_VARIABLE, Home
from hvfuse.control.job import JobKind, JobState
from hvfuse.control.jobs import Running
from hvfuse.control.plan import Mode, Plan, PlanStep, StepKind, stage_name, stages, steps
from hvfuse.control.plan_failover import FailOver, VmStep, plans_state, tests_directory
from hvfuse.control.plan_hook import demand_ended, run_hook
from hvfuse.control.plan_record import PlanRun, RunState, StepRecord, StepState
from hvfuse.control.records import Records
from hvfuse.errors import BusyError, HvfuseError, PausedError, StateError
from hvfuse.words import duration_text

AT_ONCE = 32
"""VMs of a group that are failed over at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attendance:
    """Who looks on. `ask`: whether to go on after a pause, given its text, None where nobody can answer; `tell`: is
    told of each step, in any thread."""

    ask: Callable[[str], bool] | None = None
    tell: Callable[[str], None] = lambda text: None


class PlanRunner:
    """Runs one plan of a home, as it is written now."""

    def __init__(
        self, home: Home, records: Records, plan: Plan, *, fail_over: FailOver, attendance: Attendance | None = None
    ) -> None:
        self._home = home
        self._runs = records.plans
        self._jobs = records.jobs
        self._plan = plan
        self._fail_over = fail_over
        self._attendance = attendance or Attendance()
        self._total = sum(len(stage) for stage in stages(plan))
        self._counting = threading.Lock()  # of how much is done: a thread must not tell less than another just did

    def start(self, mode: Mode, *, point: str | None = None) -> PlanRun:
        """A new run, from its beginning. Returns it as it has ended well. Raises HvfuseError where a step failed,
        PausedError where an administrator is waited for, StateError while there is a run to go on with."""
        with alone(self._home, self._plan.name):
            self._runs.bury()
            stands = self._runs.open(self._plan.name)
            if stands is not None:
                raise StateError(f"{standing_text(stands)}; allowed: continue, skip, cancel", hint=_on(self._plan.name))
            return self._drive(self._runs.begin(self._plan.name, mode, point=point))

    def go_on(self, *, skip: bool) -> PlanRun:
        """Go on with the run that stands: what failed is done again, or with `skip` left out. Raises as `start`."""
        with alone(self._home, self._plan.name):
            self._runs.bury()
            stands = self._runs.open(self._plan.name)
            if stands is None:
                name = self._plan.name
                raise StateError(f"no run of the plan {name} stands; allowed: run", hint=f"hvfuse plan run {name}")
            for step in stands.steps:
                demand_ended(step.process, step.name)
            if skip and not stands.failed and stands.state is not RunState.PAUSED:
                raise StateError(f"{standing_text(stands)}: no step failed; allowed: continue", hint=_on(stands.plan))
            return self._drive(self._runs.change(stands.id, lambda run, now_ns: self._resumed(run, now_ns, skip=skip)))

    def _resumed(self, run: PlanRun, now_ns: int, *, skip: bool) -> PlanRun:
        """A pause is over; what failed is left out if that is wanted, or stands in the plan no more."""
        planned = {step.key for stage in stages(self._plan) for step in stage}
        for step in run.steps:
            if step.kind is StepKind.PAUSE and step.state is StepState.IN_PROGRESS:
                run = run.succeeded(step.key, now_ns)
            elif step.state is StepState.FAILED and (skip or step.key not in planned):
                run = run.noted(step.key, state=StepState.SKIPPED, ended_ns=now_ns)
        # From here on it is this process that is killed, if any is.
        return replace(run, state=RunState.IN_PROGRESS, owner=system.process_identity(os.getpid()))

    # The steps ----------------------------------------------------------------------------------------------

    def _drive(self, run: PlanRun) -> PlanRun:
        names = [stage_name(stage) for stage in stages(self._plan)]
        words = ("plan", "run", self._plan.name, "--continue")
        with self._jobs.run(
            JobKind.PLAN, self._plan.name, steps=names, command=words, takes_up=self._suspended_job(run)
        ) as job:
            self._runs.change(run.id, lambda now, _: now.taken_up(system.process_identity(os.getpid()), job.id))
            try:
                paused = self._until_pause(run.id, job)
            except BaseException:
                self._runs.change(run.id, lambda now, now_ns: now.buried(now_ns))
                raise
            state = RunState.SUCCEEDED if paused is None else RunState.PAUSED
            run = self._runs.change(run.id, lambda now, now_ns: now.left(state, now_ns))
            if paused is not None:
                job.suspend(paused.what)
        if paused is not None:
            raise PausedError(f"the plan {run.plan} waits for you: {paused.what}", hint=f"once done: {_on(run.plan)}")
        return run

    def _suspended_job(self, run: PlanRun) -> int | None:
        """The job to go on with: only one that waits does not end with its process."""
        if run.job is None:
            return None
        return next((job.id for job in self._jobs.all() if job.id == run.job and job.state is JobState.SUSPENDED), None)

    def _until_pause(self, run_id: int, job: Running) -> PlanStep | None:
        """Do what is left to do. Returns the pause that it came to, None if all is done. Raises HvfuseError."""
        by_key = {step.key: stage_name(stage) for stage in stages(self._plan) for step in stage}
        while stage := steps(self._plan, self._runs.get(run_id).done):
            job.step(by_key[stage[0].key])
            match stage[0].kind:
                case StepKind.PAUSE:
                    if not self._pause(run_id, stage[0]):
                        return stage[0]
                case StepKind.VM:
                    with ThreadPoolExecutor(min(len(stage), AT_ONCE)) as pool:
                        ends = [pool.submit(self._vm, run_id, step, job) for step in stage]
                    for end in ends:
                        end.result()
                case _:
                    self._hook(run_id, stage[0])
            self._demand_none_failed(run_id, stage)
            self._count(run_id, job)
        return None

    def _pause(self, run_id: int, step: PlanStep) -> bool:
        """Whether an administrator said that the plan may go on."""
        self._runs.change(run_id, lambda run, now_ns: run.begun(step, now_ns))
        if self._attendance.ask is None or not self._attendance.ask(step.what):
            return False
        self._runs.change(run_id, lambda run, now_ns: run.succeeded(step.key, now_ns))
        return True

    def _hook(self, run_id: int, step: PlanStep) -> None:
        run = self._runs.change(run_id, lambda run, now_ns: run.begun(step, now_ns))
        group = self._plan.group(step.group)
        is_test = run.mode is Mode.TEST
        said, failure = run_hook(
            step.words,
            seconds=group.hook_timeout,
            environment={
                HOME_VARIABLE: self._home.root,
                "HVFUSE_PLAN": run.plan,
                "HVFUSE_RUN": str(run_id),
                "HVFUSE_GROUP": group.name,
                "HVFUSE_MODE": run.mode.value,
                "HVFUSE_VMS": "\n".join(group.vms),
                "HVFUSE_MOUNTS": tests_directory(self._home, run.plan, run_id) if is_test else self._home.mnt,
            },
            started=lambda process: self._note(run_id, step, process=process),
        )
        if failure is None:
            run = self._runs.change(run_id, lambda run, now_ns: run.succeeded(step.key, now_ns, output=said))
        else:
            error, hint = str(failure), failure.hint
            run = self._runs.change(
                run_id, lambda run, now_ns: run.step_failed(step.key, now_ns, error=error, hint=hint, output=said)
            )
        self._tell(run, step)

    def _vm(self, run_id: int, step: PlanStep, job: Running) -> None:
        run = self._runs.change(run_id, lambda run, now_ns: run.begun(step, now_ns))
        record = run.step(step.key)
        assert record is not None
        try:
            outcome = self._fail_over(self._order(run, step, record))
        except (HvfuseError, OSError) as error:
            text, hint = str(error), error.hint if isinstance(error, HvfuseError) else None
            run = self._runs.change(run_id, lambda run, now: run.step_failed(step.key, now, error=text, hint=hint))
        else:
            told = {**outcome.fields, "point": outcome.point, "point_time_ns": outcome.point_time_ns}
            run = self._runs.change(run_id, lambda run, now_ns: run.succeeded(step.key, now_ns, outcome=told))
            self._count(run_id, job)
        self._tell(run, step)

    def _order(self, run: PlanRun, step: PlanStep, record: StepRecord) -> VmStep:
        vm = step.what
        return VmStep(
            plan=run.plan,
            run=run.id,
            group=step.group,
            vm=vm,
            mode=run.mode,
            point=run.point or self._plan.point_of(vm),
            boot=self._plan.group(step.group).boot,
            directory=os.path.join(tests_directory(self._home, run.plan, run.id), vm),
            first_ns=record.first_ns,
            is_again=record.attempts > 1,
        )

    def _demand_none_failed(self, run_id: int, stage: tuple[PlanStep, ...]) -> None:
        keys = {step.key for step in stage}
        failed = [step for step in self._runs.get(run_id).failed if step.key in keys]
        if failed:
            what = "; ".join(f"{step.name}: {step.error}" for step in failed)
            on = _on(self._plan.name)
            raise HvfuseError(
                f"the plan {self._plan.name} has stopped: {what}",
                hint=f"once mended: {on}; to leave it out: {on.replace('--continue', '--skip')}",
            )

    def _note(self, run_id: int, step: PlanStep, **changes: object) -> None:
        self._runs.change(run_id, lambda run, _: run.noted(step.key, **changes))

    def _count(self, run_id: int, job: Running) -> None:
        with self._counting:
            job.progress(100 * len(self._runs.get(run_id).done) // self._total)

    def _tell(self, run: PlanRun, step: PlanStep) -> None:
        record = run.step(step.key)
        assert record is not None
        took = duration_text(((record.ended_ns or record.started_ns) - record.started_ns) / 1e9)
        self._attendance.tell(f"{step.name}: {f'failed: {record.error}' if record.error else 'done'} ({took})")


@contextlib.contextmanager
def alone(home: Home, plan: str) -> Iterator[None]:
    """Nobody else runs the plan, or ends a run of it, meanwhile. Raises BusyError."""
    with system.exclusive_lock(os.path.join(plans_state(home), f"plan.{plan}.lock")) as had:
        if not had:
            raise BusyError(f"another process is at the plan {plan}", hint=f"hvfuse plan report {plan}")
        yield


def give_up(home: Home, records: Records, plan: str) -> PlanRun | None:
    """Give up the run that stands; what is failed over stays so. Returns it, None if none stood. Raises BusyError."""
    with alone(home, plan):
        records.plans.bury()
        stands = records.plans.open(plan)
        if stands is None:
            return None
        run = records.plans.change(stands.id, lambda now, now_ns: now.left(RunState.CANCELLED, now_ns))
        with contextlib.suppress(HvfuseError):  # the job may be gone
            if run.job is not None:
                now_ns = run.ended_ns or 0
                records.jobs.change(run.job, lambda job: job if job.has_ended else job.cancel(now_ns))
        return run


def standing_text(run: PlanRun) -> str:
    """How a run stands, in words."""
    what = f"run {run.id} of the plan {run.plan} ({run.mode})"
    if run.state is RunState.PAUSED:
        pause = next(
            step.what for step in run.steps if step.kind is StepKind.PAUSE and step.state is StepState.IN_PROGRESS
        )
        return f"{what} waits: {pause}"
    if run.failed:
        return f"{what} has stopped at {', '.join(f'{step.name} ({step.error})' for step in run.failed)}"
    return f"{what} was interrupted between two steps"


def _on(plan: str) -> str:
    return f"hvfuse plan run {plan} --continue"
