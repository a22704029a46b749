"""`hvfuse plan`: fail many VMs over, in order."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

import click

from hvfuse.cli import wiring
from hvfuse.cli.failing_over import consent
from hvfuse.cli.main import Session
from hvfuse.cli.output import counted, emit_json, json_option, note, one_line, print_table, time_text
from hvfuse.cli.plan_report import print_report, report_fields
from hvfuse.control import trial
from hvfuse.control.fence import read_replica
from hvfuse.control.plan import Group, Mode, Plan
from hvfuse.control.plan_failover import CommandFailOver
from hvfuse.control.plan_record import PlanRun
from hvfuse.control.plan_run import Attendance, PlanRunner, alone, give_up, standing_text
from hvfuse.control.records import Records
from hvfuse.control.site import Site
from hvfuse.errors import HvfuseError, NotFoundError, UsageError
from hvfuse.system import SystemClock
from hvfuse.words import duration_text


@click.group()
def plan() -> None:
    """Fail many VMs over, in order, with commands and pauses in between.

    A plan is a table [plan.NAME] of hvfuse.toml. A run of it that stops can always go on: what succeeded is not done
    twice.
    """


@plan.command("run")
@click.argument("name")
@click.option("--test", "is_test", is_flag=True, help="Try the plan out: test failovers, under HOME/tests.")
@click.option(
    "--kind",
    type=click.Choice([Mode.PLANNED.value, Mode.UNPLANNED.value]),
    help="How to fail over: planned, without any loss, or unplanned, as the source is lost.  [default: unplanned]",
)
@click.option(
    "--point", metavar="P", help="The recovery point of all VMs, whatever the plan says; see `failover test`."
)
@click.option("--yes", is_flag=True, help="Do not ask before VMs are failed over. Pauses are kept.")
@click.option("--continue", "goes_on", is_flag=True, help="Go on with the run that stands; do again what failed.")
@click.option("--skip", is_flag=True, help="Go on with the run that stands; leave out what failed.")
@json_option
@click.pass_obj
def run_plan(
    session: Session,
    name: str,
    *,
    is_test: bool,
    kind: Literal["planned", "unplanned"] | None,
    point: str | None,
    yes: bool,
    goes_on: bool,
    skip: bool,
    as_json: bool,
) -> None:
    """Fail the VMs of the plan NAME over: its groups one after the other, the VMs of a group at once.

    Stops at the first group or hook that fails, and at a pause where nobody can be asked (exit code 17);
    `--continue` and `--skip` go on from there.
    """
    again = goes_on or skip
    if (goes_on and skip) or (again and (is_test or kind or point)) or (is_test and kind):
        what = "a run goes on as it was begun: --continue or --skip, alone" if again else "--test or --kind, not both"
        raise UsageError(what, hint="hvfuse plan run --help")
    mode = Mode.TEST if is_test else Mode(kind or Mode.UNPLANNED)
    if point is not None and mode is Mode.PLANNED:
        raise UsageError("a planned failover loses nothing: it takes the last point", hint="leave --point away")
    home, wanted = session.prepare(), _plan(session, name)
    with Records(home.records) as records:
        runner = PlanRunner(
            home,
            records,
            wanted,
            fail_over=_fail_over(session, records),
            attendance=Attendance(ask=_asker(), tell=note),
        )
        if not again:
            _demand_consent(records, wanted, mode, yes=yes)
        try:
            run = runner.go_on(skip=skip) if again else runner.start(mode, point=point)
        except HvfuseError:
            stands = records.plans.open(name)
            if stands is not None and not as_json:
                print_report(stands, wanted)
            raise
    if as_json:
        emit_json(report_fields(run, wanted))
    else:
        print_report(run, wanted)


@plan.command("list")
@json_option
@click.pass_obj
def list_plans(session: Session, as_json: bool) -> None:
    """List the plans, and how the last run of each went."""
    plans = session.config.plans
    with wiring.kept_records(session.home) as records:
        last = {name: _last(records, name) for name in plans}
    if as_json:
        emit_json({"plans": [{**_plan_fields(plans[name]), "last_run": _brief(last[name])} for name in plans]})
        return
    if not plans:
        click.echo("There is no plan: hvfuse.toml has no table [plan.NAME].")
        return
    rows = []
    for name, each in plans.items():
        run = last[name]
        told = "-" if run is None else f"{run.id}, {run.mode}: {run.state}, {time_text(run.started_ns)}"
        rows.append((name, str(len(each.groups)), str(len(each.vms)), told))
    print_table(("NAME", "GROUPS", "VMS", "LAST RUN"), rows, right=("GROUPS", "VMS"))


@plan.command()
@click.argument("name")
@json_option
@click.pass_obj
def show(session: Session, name: str, as_json: bool) -> None:
    """Show what the plan NAME does, and to which recovery point each VM would be failed over now."""
    wanted = _plan(session, name)
    home = session.prepare()
    with Records(home.records) as records:
        ready = {vm: _ready(session, records, wanted, vm) for vm in wanted.vms}
        last = _last(records, name)
    if as_json:
        emit_json({**_plan_fields(wanted), "vms": list(ready.values()), "last_run": _brief(last)})
        return
    for group in wanted.groups:
        _print_group(group, ready)
    click.echo(
        "no run of it yet" if last is None else f"last run: {standing_text(last) if last.is_open else _ended(last)}"
    )


@plan.command()
@click.argument("name")
@click.argument("run_id", metavar="[RUN]", type=int, required=False)
@json_option
@click.pass_obj
def report(session: Session, name: str, run_id: int | None, as_json: bool) -> None:
    """Show what came of a run of the plan NAME: the last one, or the one of that number."""
    with wiring.kept_records(session.home) as records:
        run = _last(records, name) if run_id is None or records is None else records.plans.get(run_id)
    if run is None or run.plan != name:
        which = "" if run_id is None else f" of the number {run_id}"
        raise NotFoundError(f"the plan {name} has no run{which}", hint="hvfuse plan list")
    wanted = session.config.plans.get(name)
    if as_json:
        emit_json(report_fields(run, wanted))
    else:
        print_report(run, wanted)


@plan.command()
@click.argument("name")
@json_option
@click.pass_obj
def cancel(session: Session, name: str, as_json: bool) -> None:
    """Give up the run of the plan NAME that has stopped or waits. The VMs that are failed over stay so."""
    home = session.prepare()
    with Records(home.records) as records:
        run = give_up(home, records, name)
    if run is None:
        raise NotFoundError(f"no run of the plan {name} stands", hint="hvfuse plan list")
    if as_json:
        emit_json({"run": _brief(run)})
    else:
        click.echo(f"run {run.id} of the plan {name} is given up; what is failed over stays so")


@plan.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="End a test although programs use its disks.")
@json_option
@click.pass_obj
def cleanup(session: Session, name: str, *, force: bool, as_json: bool) -> None:
    """End the test failovers that test runs of the plan NAME made, and give such a run up if it has stopped."""
    home = session.prepare()
    with Records(home.records) as records:
        standing = records.plans.open(name)
        if standing is not None and standing.mode is Mode.TEST:
            give_up(home, records, name)
        fail_over = _fail_over(session, records)
        ended: list[dict[str, Any]] = []
        with alone(home, name):
            for run in records.plans.all(name):
                if run.mode is Mode.TEST:
                    remark = f"plan {name}, run {run.id}: {run.state}"
                    ended += fail_over.cleanup(name, run.id, force=force, note=remark)
    if as_json:
        emit_json({"plan": name, "cleaned": ended})
        return
    for each in ended:
        click.echo(one_line(f"ended test failover {each['id']} of {each['vm']} at {each['mountpoint']}"))
    if not ended:
        click.echo("there was no test failover to clean up")


# What they need -----------------------------------------------------------------------------------------


def _plan(session: Session, name: str) -> Plan:
    found = session.config.plans.get(name)
    if found is None:
        raise NotFoundError(f"there is no plan {name}: hvfuse.toml has no table [plan.{name}]", hint="hvfuse plan list")
    return found


def _last(records: Records | None, name: str) -> PlanRun | None:
    if records is None:
        return None
    records.plans.bury()
    return next(reversed(records.plans.all(name)), None)


def _fail_over(session: Session, records: Records) -> CommandFailOver:
    home = session.home

    def standing(vm: str) -> Mapping[str, Any] | None:
        replica = read_replica(_site(session, records, vm).store_path, vm)
        failover = None if replica is None else replica.failover
        return failover if failover is not None and failover["home"] == home.identity() else None

    return CommandFailOver(home, clock=SystemClock(), standing=standing)


def _site(session: Session, records: Records, vm: str) -> Site:
    return Site(home=session.home, policy=session.config.policy(vm), vm=vm, records=records, clock=SystemClock())


def _demand_consent(records: Records, wanted: Plan, mode: Mode, *, yes: bool) -> None:
    """Ask before real failovers, unless the run would not even begin."""
    if mode is Mode.TEST or records.plans.open(wanted.name) is not None:
        return
    kind = " --kind planned" if mode is Mode.PLANNED else ""
    consent(
        f"this fails {counted(len(wanted.vms), 'VM')} over, {mode}: {', '.join(wanted.vms)}",
        "Go on?",
        yes=yes,
        command=f"hvfuse plan run {wanted.name}{kind}",
    )


def _asker() -> Any:
    """What asks the administrator at the terminal; None where there is none."""
    if not sys.stdin.isatty():
        return None
    return lambda text: click.confirm(f"{text}. Go on?", err=True)


def _ready(session: Session, records: Records, wanted: Plan, vm: str) -> dict[str, Any]:
    """Which point a VM would be failed over to, or why to none."""
    point = wanted.point_of(vm)
    fields: dict[str, Any] = {"vm": vm, "wanted": point, "point": None, "time": None, "error": None}
    try:
        with _site(session, records, vm).location.open(read_only=True) as store:
            chosen = trial.find_point(store, vm, point)
    except HvfuseError as error:
        return {**fields, "error": str(error)}
    return {**fields, "point": chosen.id, "time": time_text(chosen.time_ns)}


# How it is shown ----------------------------------------------------------------------------------------


def _print_group(group: Group, ready: Mapping[str, Mapping[str, Any]]) -> None:
    click.echo(one_line(f"{group.name}:"))
    for words in group.before:
        click.echo(one_line(f"  before: {' '.join(words)}"))
    for vm in group.vms:
        found = ready[vm]
        point = f"{found['point']} ({found['time']})" if found["error"] is None else f"cannot be: {found['error']}"
        click.echo(one_line(f"  {vm}: {found['wanted']}: {point}{', and boot' if group.boot else ''}"))
    for words in group.after:
        click.echo(one_line(f"  after: {' '.join(words)}"))
    if group.pause is not None:
        click.echo(one_line(f"  pause: {group.pause}"))


def _plan_fields(each: Plan) -> dict[str, Any]:
    return {
        "name": each.name,
        "point": each.point,
        "points": dict(each.points),
        "groups": [
            {
                "name": group.name,
                "vms": list(group.vms),
                "before": [list(words) for words in group.before],
                "after": [list(words) for words in group.after],
                "pause": group.pause,
                "boot": group.boot,
                "hook_timeout": group.hook_timeout,
            }
            for group in each.groups
        ],
    }


def _brief(run: PlanRun | None) -> dict[str, Any] | None:
    if run is None:
        return None
    started, ended = time_text(run.started_ns), None if run.ended_ns is None else time_text(run.ended_ns)
    return {"id": run.id, "mode": run.mode, "state": run.state, "started": started, "ended": ended, "job": run.job}


def _ended(run: PlanRun) -> str:
    took = duration_text(((run.ended_ns or run.started_ns) - run.started_ns) / 1e9)
    return f"run {run.id} ({run.mode}): {run.state}, {took}"
