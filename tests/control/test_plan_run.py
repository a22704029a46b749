"""Recovery plans as they are run: real hooks, real records, real deaths; what fails a VM over is the test's."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvfuse import system
from hvfuse.control.config import Config
from hvfuse.control.home import Home
from hvfuse.control.job import JobKind, JobState
from hvfuse.control.plan import Group, Mode, Plan
from hvfuse.control.plan_failover import FailOver, VmOutcome, VmStep
from hvfuse.control.plan_hook import run_hook
from hvfuse.control.plan_record import PlanRun, RunState, StepState
from hvfuse.control.plan_records import PlanRuns
from hvfuse.control.plan_run import Attendance, PlanRunner, alone, give_up
from hvfuse.control.records import Records
from hvfuse.errors import BusyError, HvfuseError, NotFoundError, PausedError, StateError

from .children import HandClock, until


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Config().home(str(tmp_path / "home"))
    made.make()
    return made


@pytest.fixture
def records(home: Home) -> Iterator[Records]:
    with Records(home.records) as opened:
        yield opened


class Story:
    """A file to which hooks and failovers append what they do, in whatever process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def hook(self, word: str, *, code: str = "0") -> tuple[str, ...]:
        """A command that tells `word`; `code`: what it ends with, a piece of shell."""
        return ("/bin/sh", "-c", f'echo {word} >> "{self.path}"; echo said {word}; exit {code}')

    def tell(self, word: str) -> None:
        with open(self.path, "a") as file:
            file.write(f"{word}\n")

    def fail_over(self, step: VmStep) -> VmOutcome:
        self.tell(step.vm)
        return VmOutcome(point=f"{step.vm}-{step.point}", point_time_ns=1, fields={"mode": step.mode.value})

    @property
    def told(self) -> list[str]:
        return self.path.read_text().split() if self.path.exists() else []


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "story")


def runner(
    home: Home, records: Records, plan: Plan, fail_over: FailOver, ask: Callable[[str], bool] | None = None
) -> PlanRunner:
    return PlanRunner(home, records, plan, fail_over=fail_over, attendance=Attendance(ask=ask))


def last(records: Records) -> PlanRun:
    return records.plans.all()[-1]


def test_a_plan_is_run_in_order(home: Home, records: Records, story: Story) -> None:
    groups = (
        Group(name="g", vms=("a",), before=(story.hook("b1"), story.hook("b2")), after=(story.hook("a1"),), pause="ok"),
        Group(name="h", vms=("b",), before=(story.hook("b3"),), boot=True),
    )
    asked: list[str] = []

    def ask(text: str) -> bool:
        asked.append(text)
        assert (last(records).state, records.jobs.all()[-1].state) == (RunState.IN_PROGRESS, JobState.IN_PROGRESS)
        return True

    run = runner(home, records, Plan(name="p", groups=groups, points={"b": "latest-app-consistent"}), story.fail_over,
                 ask).start(Mode.TEST)  # fmt: skip
    assert story.told == ["b1", "b2", "a", "a1", "b3", "b"]
    assert asked == ["ok"]
    assert (run, run.state, run.owner) == (last(records), RunState.SUCCEEDED, None)
    assert [step.outcome.get("point") for step in run.steps if step.outcome] == ["a-latest", "b-latest-app-consistent"]
    assert run.steps[0].output == "said b1"
    (job,) = records.jobs.all()
    assert (job.id, job.kind, job.state, job.percent) == (run.job, JobKind.PLAN, JobState.SUCCEEDED, 100)
    assert {step.state for step in job.steps} == {JobState.SUCCEEDED}


def test_the_command_line_names_the_point_of_all_vms(home: Home, records: Records, story: Story) -> None:
    plan = Plan(name="p", groups=(Group(name="g", vms=("a", "b")),), points={"b": "latest-app-consistent"})
    run = runner(home, records, plan, story.fail_over).start(Mode.UNPLANNED, point="P")
    assert sorted(step.outcome["point"] for step in run.steps) == ["a-P", "b-P"]


def test_the_vms_of_a_group_are_failed_over_at_once(home: Home, records: Records) -> None:
    together = threading.Barrier(3)

    def fail_over(step: VmStep) -> VmOutcome:
        together.wait(10)  # breaks unless all three are under way
        return VmOutcome(point="p", point_time_ns=None)

    plan = Plan(name="p", groups=(Group(name="g", vms=("a", "b", "c")),))
    run = runner(home, records, plan, fail_over).start(Mode.TEST)
    assert max(step.started_ns for step in run.steps) < min(step.ended_ns or 0 for step in run.steps)


def test_a_vm_that_fails_lets_its_group_finish_and_stops_the_plan(home: Home, records: Records, story: Story) -> None:
    others_end = threading.Event()
    broken = {"b"}

    def fail_over(step: VmStep) -> VmOutcome:
        if step.vm in broken:
            others_end.set()
            raise NotFoundError("b has no recovery point", hint="look")
        assert others_end.wait(10)
        assert step.is_again is False, "what succeeded is not asked for again"
        return story.fail_over(step)

    plan = Plan(name="p", groups=(Group(name="g", vms=("a", "b", "c"), after=(story.hook("after"),)),))
    started = runner(home, records, plan, fail_over)
    with pytest.raises(HvfuseError, match="stopped: g: b: b has no recovery point") as caught:
        started.start(Mode.TEST)
    assert "hvfuse plan run p --continue" in str(caught.value.hint)
    assert sorted(story.told) == ["a", "c"]
    assert last(records).state is RunState.FAILED
    assert [(step.error, step.hint) for step in last(records).failed] == [("b has no recovery point", "look")]
    job = records.jobs.all()[-1]
    assert (job.state, "hvfuse plan run p --continue" in str(job.next_command)) == (JobState.FAILED, True)

    with pytest.raises(StateError, match="has stopped at g: b"):
        started.start(Mode.TEST)
    with pytest.raises(HvfuseError, match="stopped"):
        started.go_on(skip=False)
    run = started.go_on(skip=True)
    assert story.told[2:] == ["after"]
    skipped = run.step("g/vm/b")
    assert skipped is not None
    assert (run.state, skipped.state, skipped.attempts) == (RunState.SUCCEEDED, StepState.SKIPPED, 2)


def test_a_hook_that_fails_stops_before_the_next_step_and_is_repeated(
    home: Home, records: Records, story: Story, tmp_path: Path
) -> None:
    mended = tmp_path / "mended"
    hook = story.hook("hook", code=f'"$(test -e {mended} && echo 0 || echo 3)"')
    groups = (Group(name="g", vms=("a", "b"), after=(hook,)), Group(name="h", vms=("c",)))
    plan = runner(home, records, Plan(name="p", groups=groups), story.fail_over)
    with pytest.raises(HvfuseError, match="ended with exit code 3"):
        plan.start(Mode.TEST)
    assert (sorted(story.told[:2]), story.told[2:]) == (["a", "b"], ["hook"])
    assert last(records).failed[0].output == "said hook"
    mended.touch()
    assert plan.go_on(skip=False).state is RunState.SUCCEEDED
    assert story.told[2:] == ["hook", "hook", "c"]
    with pytest.raises(StateError, match="no run of the plan p stands"):
        plan.go_on(skip=False)


def test_a_hook_that_was_mended_in_the_plan_is_run_instead(home: Home, records: Records, story: Story) -> None:
    def plan(command: tuple[str, ...]) -> PlanRunner:
        groups = (Group(name="g", vms=("a",), before=(story.hook("first"), command)),)
        return runner(home, records, Plan(name="p", groups=groups), story.fail_over)

    with pytest.raises(HvfuseError, match="127: there is no such command"):
        plan(("/no/such/command",)).start(Mode.TEST)
    run = plan(story.hook("mended")).go_on(skip=False)
    assert story.told == ["first", "mended", "a"]
    assert (run.state, run.failed) == (RunState.SUCCEEDED, ())


def test_hooks_know_what_they_are_run_for(home: Home, records: Records, story: Story) -> None:
    show = ("/bin/sh", "-c", 'env | grep ^HVFUSE_ | sort; echo "$HVFUSE_VMS" | wc -l; cat; pwd')
    plan = Plan(name="p", groups=(Group(name="g", vms=("a", "b c"), before=(show,)),))
    run = runner(home, records, plan, story.fail_over).start(Mode.TEST)
    said = str(run.steps[0].output).splitlines()
    assert said[-2:] == ["2", "/"], "its standard input is empty"
    for line in ("GROUP=g", f"HOME={home.root}", "MODE=test", f"MOUNTS={home.root}/tests/p-1", "PLAN=p", "RUN=1"):
        assert f"HVFUSE_{line}" in said
    assert "HVFUSE_VMS=a" in said


def test_a_hook_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    told: list[int] = []
    words = ("/bin/sh", "-c", f"sleep 77 & echo $! > {tmp_path}/child; echo waiting; wait")
    said, failure = run_hook(words, seconds=0.5, environment={}, started=lambda process: told.append(process["pid"]))
    assert (said, str(failure)) == ("waiting", "/bin/sh did not end within 0.5 s and was killed")
    child = int((tmp_path / "child").read_text())
    until(lambda: system.process_start(child) is None and system.process_start(told[0]) is None)


def test_only_the_end_of_what_a_hook_says_is_kept() -> None:
    said, failure = run_hook(("seq", "100000"), seconds=20, environment={}, started=lambda _: None)
    assert failure is None
    assert (len(said) <= 1024, said.endswith("99999\n100000")) == (True, True)


def test_a_hook_whose_runner_dies_before_it_is_on_record_does_nothing(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        run_hook(
            ("touch", str(tmp_path / "done")), seconds=9, environment={}, started=lambda p: die(tmp_path, p["pid"])
        )
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    hook = int((tmp_path / "pid").read_text())
    until(lambda: system.process_start(hook) is None)
    assert not (tmp_path / "done").exists()


def die(tmp_path: Path, pid: int) -> None:
    (tmp_path / "pid").write_text(str(pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_pause_where_nobody_can_be_asked_is_left_until_somebody_goes_on(
    home: Home, records: Records, story: Story
) -> None:
    groups = (Group(name="g", vms=("a",), pause="look at a"), Group(name="h", vms=("b",), pause="look at b"))
    plan = runner(home, records, Plan(name="p", groups=groups), story.fail_over)
    with pytest.raises(PausedError, match="waits for you: look at a") as caught:
        plan.start(Mode.TEST)
    assert "hvfuse plan run p --continue" in str(caught.value.hint)
    assert (last(records).state, story.told) == (RunState.PAUSED, ["a"])
    (job,) = records.jobs.all()
    assert (job.state, job.command) == (JobState.SUSPENDED, ("plan", "run", "p", "--continue"))
    with pytest.raises(StateError, match="waits: look at a"):
        plan.start(Mode.TEST)
    refuses = runner(home, records, Plan(name="p", groups=groups), story.fail_over, ask=lambda _: False)
    with pytest.raises(PausedError, match="look at b"):
        refuses.go_on(skip=False)
    assert plan.go_on(skip=True).state is RunState.SUCCEEDED
    assert story.told == ["a", "b"]
    (job,) = records.jobs.all()
    assert job.state is JobState.SUCCEEDED, "it is one job, which waited"


def test_a_run_is_given_up_with_its_job(home: Home, records: Records, story: Story) -> None:
    plan = runner(home, records, Plan(name="p", groups=(Group(name="g", vms=("a",), pause="x"),)), story.fail_over)
    assert give_up(home, records, "p") is None
    with pytest.raises(PausedError):
        plan.start(Mode.UNPLANNED)
    given_up = give_up(home, records, "p")
    assert given_up is not None
    assert (given_up.state, records.jobs.all()[0].state) == (RunState.CANCELLED, JobState.CANCELLED)
    with pytest.raises(PausedError):
        plan.start(Mode.UNPLANNED)
    assert [run.state for run in records.plans.all("p")] == [RunState.CANCELLED, RunState.PAUSED]


def test_only_one_process_runs_a_plan(home: Home, records: Records, story: Story) -> None:
    plan = runner(home, records, Plan(name="p", groups=(Group(name="g", vms=("a",)),)), story.fail_over)
    with alone(home, "p"):
        for act in (lambda: plan.start(Mode.TEST), lambda: plan.go_on(skip=False), lambda: give_up(home, records, "p")):
            with pytest.raises(BusyError):
                act()
    assert records.plans.all() == []


def test_ended_runs_go_and_one_to_go_on_with_stays(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvfuse.control.plan_records.RUNS_KEPT", 3)
    runs = PlanRuns(records._database, clock=HandClock())
    for number in range(6):
        run = runs.begin(f"p{number}", Mode.TEST, point=None)
        state = RunState.PAUSED if number == 0 else RunState.SUCCEEDED
        runs.change(run.id, lambda now, now_ns, state=state: now.left(state, now_ns))  # type: ignore[misc]
    assert [run.id for run in runs.all()] == [1, 4, 5, 6]
    with pytest.raises(NotFoundError):
        runs.get(2)


# Deaths ---------------------------------------------------------------------------------------------------------


def killed_at(step: int, home: Home, plan: Plan, story: Story, *, go_on: bool = False) -> bool:
    """Run the plan in a process that is killed just before it writes down change number `step`. Whether it was."""
    child = os.fork()
    if child == 0:
        try:
            lock, count = threading.Lock(), 0
            change = PlanRuns.change

            def counted(self: PlanRuns, *arguments: object) -> PlanRun:
                nonlocal count
                with lock:
                    count += 1
                    if count == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                return change(self, *arguments)  # type: ignore[arg-type]

            PlanRuns.change = counted  # type: ignore[method-assign]
            with Records(home.records) as records:
                acts = runner(home, records, plan, story.fail_over, ask=lambda _: True)
                acts.go_on(skip=False) if go_on else acts.start(Mode.TEST)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_run_that_is_killed_at_any_step_goes_on_and_repeats_nothing_that_was_done(tmp_path: Path) -> None:
    deaths = 0
    while True:
        deaths += 1
        home = Config().home(str(tmp_path / str(deaths)))
        home.make()
        story = Story(tmp_path / f"story{deaths}")
        groups = (
            Group(name="g", vms=("a", "b"), before=(story.hook("before"),), after=(story.hook("after"),), pause="look"),
            Group(name="h", vms=("c",)),
        )
        plan = Plan(name="p", groups=groups)
        if not killed_at(deaths, home, plan, story):
            break
        with Records(home.records) as records:
            records.plans.bury()
            left = last(records)
            assert left.state in (RunState.FAILED, RunState.PAUSED)
            done = [step.what for step in left.steps if step.key in left.done]
            # A hook of the dead one may not have ended.
            until(lambda left=left: all(not s.process or not system.is_running(s.process) for s in left.steps))
        told = story.told
        again = deaths % 2 and killed_at(2, home, plan, story, go_on=True)
        with Records(home.records) as records:
            acts = runner(home, records, plan, story.fail_over, ask=lambda _: True)
            run = acts.go_on(skip=False)
            assert run.state is RunState.SUCCEEDED, again
            assert all(job.has_ended for job in records.jobs.all())
        whole = story.told
        assert whole[: len(told)] == told
        order = list(dict.fromkeys(whole))
        assert (order[0], sorted(order[1:3]), order[3:]) == ("before", ["a", "b"], ["after", "c"])
        for word in order:
            if any(word == what or f"echo {word} " in what for what in done):
                assert whole.count(word) == 1, (deaths, word, whole)
    assert deaths > 15


def test_a_hook_that_outlives_its_runner_is_not_run_beside_itself(home: Home, story: Story, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    hook = ("/bin/sh", "-c", f"echo begun >> {story.path}; cat {gate}; echo ended >> {story.path}")
    plan = Plan(name="p", groups=(Group(name="g", vms=("a",), before=(hook,)),))
    child = os.fork()
    if child == 0:
        with Records(home.records) as records:
            runner(home, records, plan, story.fail_over).start(Mode.TEST)
        os._exit(0)
    until(lambda: story.told)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with Records(home.records) as records:
        for skip in (False, True):
            with pytest.raises(BusyError, match="still runs") as caught:
                runner(home, records, plan, story.fail_over).go_on(skip=skip)
        command = str(caught.value.hint).partition("end it: ")[2]
        process = last(records).steps[0].process
        assert process is not None
        subprocess.run(["/bin/sh", "-c", command], check=True)
        until(lambda: not system.is_running(process))
        opened = os.open(gate, os.O_RDWR)  # the next one comes to its end
        os.write(opened, b"\n")
        threading.Timer(0.2, os.close, [opened]).start()
        assert runner(home, records, plan, story.fail_over).go_on(skip=False).state is RunState.SUCCEEDED
    assert story.told == ["begun", "begun", "ended", "a"]


def test_a_pause_that_is_killed_at_the_prompt_is_still_one(home: Home, story: Story) -> None:
    plan = Plan(name="p", groups=(Group(name="g", vms=("a",), pause="look"),))
    child = os.fork()
    if child == 0:
        with Records(home.records) as records:
            runner(home, records, plan, story.fail_over, ask=lambda _: time.sleep(60) or True).start(Mode.TEST)
        os._exit(0)
    with Records(home.records) as records:
        until(lambda: records.plans.all() and len(last(records).steps) == 2)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        records.plans.bury()
        assert last(records).state is RunState.PAUSED
        assert runner(home, records, plan, story.fail_over).go_on(skip=False).state is RunState.SUCCEEDED
    assert story.told == ["a"]
