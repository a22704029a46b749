"""Recovery plans: what the configuration may say, what comes next, and what came of a run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hvfuse.control.config import TEMPLATE
from hvfuse.control.config_text import parse
from hvfuse.control.plan import Group, Mode, Plan, StepKind, stages, steps
from hvfuse.control.plan_record import PlanRun, RunState, StepState, results, waited
from hvfuse.errors import CorruptError, UsageError

SECOND = 10**9
PLAN = """\
[plan.site]
point = "latest-app-consistent"
points = { web01 = "2026-11-22T18:30" }
[[plan.site.group]]
name = "databases"
vms = ["db01", "db02"]
before = ["/path/hook", "arg"]
after = [["/a"], ["/b", "x"]]
pause = "check that the databases answer"
boot = true
hook_timeout = "90s"
[[plan.site.group]]
name = "web"
vms = ["web01"]
"""


def read(text: str) -> Plan:
    return parse("hvfuse.toml", text).plans["site"]


def test_a_plan_is_read() -> None:
    assert read(PLAN) == Plan(
        name="site",
        point="latest-app-consistent",
        points={"web01": "2026-11-22T18:30"},
        groups=(
            Group(
                name="databases", vms=("db01", "db02"), before=(("/path/hook", "arg"),), after=(("/a",), ("/b", "x")),
                pause="check that the databases answer", boot=True, hook_timeout=90.0,
            ),
            Group(name="web", vms=("web01",)),
        ),
    )  # fmt: skip
    assert [read(PLAN).point_of(vm) for vm in ("db01", "web01")] == ["latest-app-consistent", "2026-11-22T18:30"]


def test_the_templates_plan_is_a_sound_one() -> None:
    lines = TEMPLATE[TEMPLATE.index("# [plan.site]") :].splitlines()
    found = read("\n".join(line.removeprefix("# ") for line in lines))
    defaults = Group(name="databases", vms=("db01", "db02"), pause="check that the databases answer")
    assert found == Plan(name="site", groups=(defaults,))


GROUP = '[[plan.site.group]]\nname = "a"\nvms = ["x"]\n'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[plan.site]\n", ":1: [plan] site: this plan has no group"),
        ("plan = 1\n", ":1: plan: this is a table"),
        ("[plan]\nsite = 1\n", ":2: [plan] site: this is a table"),
        ('[plan."a/b"]\n', ":1: [plan] a/b: this cannot be a plan's name"),
        (f'[plan.site]\npoints = 5\n{GROUP}', ":2: [plan.site] points: this is a table"),
        (f'[plan.site]\npiont = "latest"\n{GROUP}', ":2: [plan.site] piont: unknown key; did you mean point?"),
        (f'[plan.site]\npoint = "yesterday"\n{GROUP}', ':2: [plan.site] point: "yesterday" is not "latest", '),
        (f'[plan.site]\npoint = 5\n{GROUP}', ':2: [plan.site] point: 5 is not "latest", '),
        (f'[plan.site]\npoints = {{ y = "latest" }}\n{GROUP}', ":2: [plan.site.points] y: unknown key"),
        (f'[plan.site]\npoints = {{ x = "soon" }}\n{GROUP}', ':2: [plan.site.points] x: "soon" is not'),
        ("[plan.site]\ngroup = 5\n", ":2: [plan.site] group: each group is a table: write [[plan.site.group]]"),
        ("[plan.site]\ngroup = []\n", ":2: [plan.site] group: each group is a table"),
        ("[plan.site.group]\nname = 'a'\n", ":1: [plan.site] group: each group is a table"),
        (f'{GROUP}[[plan.site.group]]\nname = "b"\n', ":4: [plan.site] group: vms is missing"),
        (f'{GROUP}[[plan.site.group]]\nvms = ["b"]\n', ":4: [plan.site] group: name is missing"),
        (f'{GROUP}[[plan.site.group]]\nname = "b"\nvms = []\n', ":6: [[plan.site.group]] vms: [] is not a list of at"),
        (f'{GROUP}[[plan.site.group]]\nname = "b"\nvms = "y"\n', ':6: [[plan.site.group]] vms: "y" is not a list'),
        (f'{GROUP}[[plan.site.group]]\nname = "b"\nvms = ["../y"]\n', ":6: [[plan.site.group]] vms: "),
        (f'{GROUP}[[plan.site.group]]\nname = "a"\nvms = ["y"]\n', ':5: [[plan.site.group]] name: there is a group'),
        (f'{GROUP}[[plan.site.group]]\nname = "a/b"\nvms = ["y"]\n', ":5: [[plan.site.group]] name: "),
        (
            f'{GROUP}[[plan.site.group]]\nname = "b"\nvms = ["y", "x"]\n',
            ':6: [[plan.site.group]] vms: "x" is in the group "a" as well',
        ),
        (
            '[[plan.site.group]]\nname = "b"\nvms = ["y", "y"]\n', ':3: [[plan.site.group]] vms: "y" is twice'
        ),
        (f"{GROUP}bofore = []\n", ":4: [[plan.site.group]] bofore: unknown key; did you mean before?"),
        (f'{GROUP}before = "/a"\n', ':4: [[plan.site.group]] before: "/a" is not a command and its arguments'),
        (f'{GROUP}before = [["/a"], "b"]\n', ":4: [[plan.site.group]] before: "),
        (f'{GROUP}after = [[]]\n', ":4: [[plan.site.group]] after: [[]] is not a command and its arguments"),
        (f'{GROUP}after = ["bin/a"]\n', ':4: [[plan.site.group]] after: ["bin/a"] is not'),
        (f'{GROUP}pause = ""\n', ':4: [[plan.site.group]] pause: "" is not a line'),
        (f"{GROUP}boot = 1\n", ":4: [[plan.site.group]] boot: 1 is not true or false"),
        (f'{GROUP}hook_timeout = "0s"\n', ':4: [[plan.site.group]] hook_timeout: "0s" is not a duration from "1s"'),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_its_line(text: str, fault: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse("hvfuse.toml", text)
    assert str(caught.value).startswith("hvfuse.toml" + fault), caught.value


# What comes next ------------------------------------------------------------------------------------------------


def test_stages_come_in_order_and_only_vms_of_a_group_at_once() -> None:
    assert [[(step.group, step.kind, step.what) for step in stage] for stage in stages(read(PLAN))] == [
        [("databases", StepKind.BEFORE, "/path/hook arg")],
        [("databases", StepKind.VM, "db01"), ("databases", StepKind.VM, "db02")],
        [("databases", StepKind.AFTER, "/a")],
        [("databases", StepKind.AFTER, "/b x")],
        [("databases", StepKind.PAUSE, "check that the databases answer")],
        [("web", StepKind.VM, "web01")],
    ]


def test_what_comes_next_is_what_is_left_of_the_first_stage_that_is_not_done() -> None:
    plan = read(PLAN)
    everything = [step for stage in stages(plan) for step in stage]
    for done in itertools.chain.from_iterable(itertools.combinations(everything, n) for n in range(8)):
        keys = {step.key for step in done}
        left = [step for step in everything if step.key not in keys]
        following = steps(plan, keys)
        assert list(following) == left[: len(following)]
        assert bool(following) is bool(left)
        assert len(following) <= 1 or {step.kind for step in following} == {StepKind.VM}


def test_a_plan_that_is_mended_repeats_nothing_and_takes_nothing_new_for_done() -> None:
    before = Plan(name="p", groups=(Group(name="g", vms=("a",), before=(("/one",), ("/two",)), pause="look"),))
    done = {step.key for stage in itertools.islice(stages(before), 2) for step in stage}
    in_front = Plan(name="p", groups=(Group(name="g", vms=("a",), before=(("/new",), ("/one",), ("/two",))),))
    assert [step.what for step in steps(in_front, done)] == ["/new"]
    assert [step.what for step in steps(in_front, done | {steps(in_front, done)[0].key})] == ["a"]
    twice = Plan(name="p", groups=(Group(name="g", vms=("a",), before=(("/one",), ("/one",), ("/two",))),))
    (again,) = steps(twice, done)
    assert (again.what, again.key in done) == ("/one", False)


def test_keys_tell_all_steps_of_a_plan_apart() -> None:
    groups = (
        Group(name="g", vms=("a", "x"), before=(("/x",), ("/x",), ("/x", "#2")), after=(("/x",),), pause="x"),
        Group(name="h", vms=("b",), before=(("/x",),), pause="x"),
    )
    keys = [step.key for stage in stages(Plan(name="p", groups=groups)) for step in stage]
    assert len(keys) == len(set(keys)) == 10


# What came of it ------------------------------------------------------------------------------------------------


def test_the_time_that_a_vm_took_counts_pauses_and_tells_them() -> None:
    plan = read(PLAN)
    by_what = {step.what: step for stage in stages(plan) for step in stage}
    run = PlanRun(id=1, plan="site", mode=Mode.TEST, started_ns=100 * SECOND)
    run = run.begun(by_what["db01"], 101 * SECOND)
    outcome = {"point": "p-1", "point_time_ns": 70 * SECOND}
    run = run.succeeded(by_what["db01"].key, 105 * SECOND, outcome=outcome)
    pause = by_what["check that the databases answer"]
    run = run.begun(pause, 110 * SECOND).begun(pause, 120 * SECOND)  # asked for again: it has begun before
    assert waited(run, until_ns=115 * SECOND) == 5.0
    run = run.succeeded(pause.key, 140 * SECOND)
    run = run.begun(by_what["web01"], 141 * SECOND)
    run = run.succeeded(by_what["web01"].key, 145 * SECOND, outcome={"point": "q", "point_time_ns": 145 * SECOND})
    names = [(group.name, vm) for group in plan.groups for vm in group.vms]
    first, second, web = results(run, names)
    assert (first.point, first.age, first.rto, first.waited) == ("p-1", 30.0, 5.0, 0.0)
    assert (second.vm, second.state, second.rto) == ("db02", None, None)
    assert (web.age, web.rto, web.waited) == (0.0, 45.0, 30.0)
    assert [each.vm for each in results(run, [])] == ["db01", "web01"], "VMs that are in the plan no more are told too"


def test_a_run_whose_process_is_gone_has_failed_at_what_was_under_way() -> None:
    plan = read(PLAN)
    hook, *_, pause, _ = [stage[0] for stage in stages(plan)]
    run = PlanRun(id=1, plan="site", mode=Mode.TEST).begun(hook, 1)
    assert [step.state for step in run.buried(5).failed] == [StepState.FAILED]
    assert run.buried(5).state is RunState.FAILED
    assert not run.buried(5).done
    waits = run.succeeded(hook.key, 2).begun(pause, 3).buried(5)
    assert (waits.state, waits.failed, waits.done) == (RunState.PAUSED, (), {hook.key})


def test_a_run_is_kept_as_it_is() -> None:
    plan = read(PLAN)
    run = PlanRun(id=7, plan="site", mode=Mode.PLANNED, point="latest", job=3, owner={"pid": 1})
    for stage in stages(plan):
        run = run.begun(stage[0], 4).step_failed(stage[0].key, 5, error="no", hint="do", output="said")
    assert PlanRun.from_json(7, run.as_json()) == run
    assert PlanRun.from_json(7, {**run.as_json(), "later": 1}) == run
    for broken in ({"state": "Odd"}, {"steps": [{}]}, {"mode": None}):
        with pytest.raises(CorruptError):
            PlanRun.from_json(7, {**run.as_json(), **broken})


def test_the_page_for_users_tells_of_each_key_and_its_example_is_sound() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plans.md").read_text()
    for key in ("point", "points", "name", "vms", "before", "after", "pause", "boot", "hook_timeout"):
        assert f"`{key}`" in page, key
    example = page.split("## An example")[1].split("\nThe ")[0]
    found = parse("docs/plans.md", "\n".join(line.removeprefix("    ") for line in example.splitlines()))
    assert [group.name for group in found.plans["site"].groups] == ["directory", "databases", "web"]
