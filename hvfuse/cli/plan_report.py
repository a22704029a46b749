"""What came of a run of a recovery plan, as it is shown: how old each VM's point was, and how long it took."""

from __future__ import annotations

from typing import Any

import click

from hvfuse.cli.output import one_line, print_table, time_text
from hvfuse.control.plan import Plan, StepKind
from hvfuse.control.plan_record import BEHIND, PlanRun, StepRecord, VmResult, results, waited
from hvfuse.control.plan_run import standing_text
from hvfuse.words import duration_text

_COLUMNS = ("GROUP", "VM", "RESULT", "POINT", "POINT'S AGE", "TOOK", "OF IT PAUSED")


def report_fields(run: PlanRun, plan: Plan | None) -> dict[str, Any]:
    """For programs. `plan`: as it is written now, None if it is not any more."""
    is_open = run.is_open
    return {
        "plan": run.plan,
        "run": run.id,
        "mode": run.mode,
        "state": run.state,
        "job": run.job,
        "started": time_text(run.started_ns),
        "ended": _time(run.ended_ns),
        "seconds": _seconds(run),
        "waited": waited(run, until_ns=run.ended_ns) if run.ended_ns is not None else None,
        "vms": [_vm_fields(each) for each in _results(run, plan)],
        "steps": [_step_fields(step) for step in run.steps],
        "stands": standing_text(run) if is_open else None,
        "next_command": f"hvfuse plan run {run.plan} --continue" if is_open else None,
    }


def print_report(run: PlanRun, plan: Plan | None) -> None:
    """For a person."""
    rows = [
        (
            each.group,
            each.vm,
            "not begun" if each.state is None else each.state.value,
            "-" if each.point is None else each.point,
            _duration(each.age),
            _duration(each.rto),
            _duration(each.waited) if each.waited else "-",
        )
        for each in _results(run, plan)
    ]
    print_table(_COLUMNS, rows, right=_COLUMNS[-3:])
    for step in run.steps:
        if step.error is not None:
            click.echo(one_line(f"{step.name}: {step.state}: {step.error}"))
            for told in (step.hint and f"  hint: {step.hint}", step.output and f"  it said: {step.output[-300:]}"):
                if told:
                    click.echo(one_line(told))
    pauses = "" if run.ended_ns is None else _paused(run)
    took = _seconds(run)
    total = "" if took is None else f", {duration_text(took)}"
    click.echo(f"run {run.id} of the plan {run.plan} ({run.mode}): {run.state}{total}{pauses}")


def _paused(run: PlanRun) -> str:
    assert run.ended_ns is not None
    seconds = waited(run, until_ns=run.ended_ns)
    return f", of it {duration_text(seconds)} in pauses" if seconds else ""


def _results(run: PlanRun, plan: Plan | None) -> list[VmResult]:
    return results(run, [] if plan is None else [(group.name, vm) for group in plan.groups for vm in group.vms])


def _vm_fields(each: VmResult) -> dict[str, Any]:
    return {
        "group": each.group,
        "vm": each.vm,
        "state": "NotStarted" if each.state is None else each.state,
        "point": each.point,
        "point_time": _time(each.point_time_ns),
        "point_age_seconds": each.age,
        "rto_seconds": each.rto,
        "waited_seconds": each.waited,
        "error": each.error,
        "outcome": {key: value for key, value in each.outcome.items() if key not in ("point", "point_time_ns")},
    }


def _step_fields(step: StepRecord) -> dict[str, Any]:
    return {
        "group": step.group,
        "kind": step.kind,
        "what": step.what,
        "state": step.state,
        "attempts": step.attempts,
        "started": time_text(step.started_ns),
        "ended": _time(step.ended_ns),
        "error": step.error,
        "hint": step.hint,
        "output": step.output if step.kind in (StepKind.BEFORE, StepKind.AFTER) else None,
        "done": step.state in BEHIND,
    }


def _seconds(run: PlanRun) -> float | None:
    return None if run.ended_ns is None else max(0, run.ended_ns - run.started_ns) / 1e9


def _time(time_ns: int | None) -> str | None:
    return None if time_ns is None else time_text(time_ns)


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else duration_text(seconds)
