"""Each flow of a failover with a death, or a cancel, at each of its steps: what is left has a name and a next command,
that command ends well, and no byte is lost.

HVFUSE_DEATHS=all does every case, which takes hours, and anything else in it picks those whose names hold one of the
texts that it joins with "|"; without it there is a sample, of one case of each of some flows, another one each time:
HVFUSE_DEATHS_SEED does the same again.
"""

from __future__ import annotations

import itertools
import os
import random
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from hvfuse.control import flows
from hvfuse.control.flows import FlowStep
from hvfuse.states import ReplicationState

from .failover_sites import SIZES, VM, Answer, Side, Sites, wait_for
from .failover_stages import Stages

pytestmark = pytest.mark.mount

SAMPLE = 4
"""Cases of a sample, which take some five seconds each, and what they begin from as much again."""
IN_THE_BACKGROUND = {"Hydrate disks", "Resynchronize", "Initial replication", "Finalize protection"}
FENCE_SECONDS = 5.0
"""Far longer than a source that is watched takes to see that it has lost the VM."""


@dataclass(frozen=True)
class Flow:
    """`source`, `target`: before it. `at`: the side where it is ordered. `has`: who has the VM at its end.
    `can_cancel`: whether `failover cancel` may come at any step of it. `harms`: the processes that can be killed."""

    name: str
    stage: str
    at: str
    words: tuple[str, ...]
    steps: tuple[FlowStep, ...]
    source: str
    target: str
    has: str
    harms: tuple[tuple[str, str], ...]
    can_cancel: bool = False
    labels: tuple[str, ...] = ()


def _flows() -> Iterator[Flow]:
    for source, target, stages in (
        ("S", "T", ("protected", "prepared", "failed over", "committed", "given way")),
        ("T", "S", ("turned round", "prepared there", "failed back", "committed here", "given way there")),
    ):
        away = "" if source == "S" else " back"
        ends = (("S", "run"), ("T", "run"))
        at_source, at_target = (source, "tracker"), (target, "tracker")
        everyone = (at_source, (source, "shipper"), *ends)

        def flow(
            name: str, *arguments: Any, source: str = source, target: str = target, away: str = away, **more: Any
        ) -> Flow:
            stage, at, words, steps, has, harms = arguments
            return Flow(name + away, stage, at, tuple(words), steps, source, target, has, harms, **more)

        planned, yes = ("failover", "planned", VM), ("--yes",)
        reverse = ("replication", "reverse", VM, "--yes")
        yield flow("prepare", stages[0], source, planned + yes, flows.PREPARE, source, everyone, can_cancel=True)
        yield flow(
            "planned",
            stages[1],
            target,
            planned + yes,
            flows.failover(),
            target,
            (at_source, at_target, *ends),
            can_cancel=True,
        )
        yield flow(
            "unplanned",
            stages[0],
            target,
            ("failover", "unplanned", VM, "--yes"),
            flows.failover(),
            target,
            (*everyone, at_target),
            can_cancel=True,
        )
        yield flow(
            "change point",
            stages[2],
            target,
            ("failover", "change-point", VM, "--point", "POINT", "--yes"),
            flows.change_point(),
            target,
            (at_target, *ends),
            can_cancel=True,
        )
        yield flow(
            "cancel there",
            stages[2],
            target,
            ("failover", "cancel", VM, "--yes"),
            flows.CANCEL,
            source,
            (at_source, at_target, *ends),
        )
        yield flow(
            "cancel here",
            stages[1],
            source,
            ("failover", "cancel", VM, "--yes"),
            flows.REOPEN,
            source,
            (at_source, *ends),
        )
        yield flow(
            "commit",
            stages[2],
            target,
            ("failover", "commit", VM, "--yes"),
            flows.COMMIT,
            target,
            (at_source, at_target, *ends),
            labels=HYDRATION,
        )
        yield flow("give way", stages[3], source, reverse, flows.GIVE_WAY, target, (at_source, at_target, *ends))
        yield flow("turn round", stages[4], target, reverse, flows.REVERSE, target, (at_target, *ends))


HYDRATION = (
    "standing:mark", "standing:marked", "standing:rename", "standing:rename 2", "standing:renamed",
    "removal:mark:before", "removal:mark:after",
    "removal:images", "removal:keys:before", "removal:end:before", "removal:end:after",
    "standing:clean", "standing:unmark", "standing:remove", "standing:removed",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A flow, and what happens in it. `harm`: of `tests.harmed`; `victim`: who is killed, None: the command itself."""

    flow: Flow
    step: int
    when: str
    do: str
    victim: tuple[str, str] | None = None
    label: str | None = None
    then: str = "again"

    @property
    def name(self) -> str:
        whom = "command" if self.victim is None else " ".join(self.victim)
        where = self.label or f"{self.when} {self.flow.steps[self.step].name}"
        return f"{self.flow.name}: {self.do} {whom} {where}, {self.then}"

    def harm(self, sites: Sites) -> dict[str, Any]:
        marker = {"marker": str(sites.root / "harmed")}
        if self.label is not None:
            label, _, number = self.label.partition(" ")
            home = str(sites.side(self.flow.target).root)
            return {
                "role": "_tracker",
                "home": home,
                "label": label,
                "number": int(number or 1),
                "do": "kill",
                **marker,
            }
        home = str(sites.side(self.flow.at).root)
        do: Any = self.do if self.victim is None else [sites.side(self.victim[0]).path(self.victim[1])]
        return {"home": home, "step": self.step, "when": self.when, "do": do, **marker}


def cases(flow: Flow) -> Iterator[Case]:
    for step in range(len(flow.steps)):
        for then in ("again", "cancel") if flow.can_cancel else ("again",):
            for do, when in itertools.product(("kill", "interrupt"), ("before", "after")):
                yield Case(flow, step, when, do, then=then)
            for victim in flow.harms:
                yield Case(flow, step, "before", "kill", victim, then=then)
                if step == len(flow.steps) - 1:
                    yield Case(flow, step, "after", "kill", victim, then=then)
    for label in flow.labels:
        yield Case(flow, len(flow.steps) - 1, "after", "kill", (flow.target, "tracker"), label)


# All workers of a parallel run have to come to the same.
SEED = int(
    os.environ.get("HVFUSE_DEATHS_SEED")
    or zlib.crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(time.time_ns())).encode())
)
EVERY = [case for flow in _flows() for case in cases(flow)]


def chosen() -> list[Case]:
    wanted = os.environ.get("HVFUSE_DEATHS")
    if wanted is not None:
        return [case for case in EVERY if wanted == "all" or any(text in case.name for text in wanted.split("|"))]
    dice = random.Random(SEED)
    names = dice.sample(sorted({case.flow.name for case in EVERY if case.flow.source == "S"}), SAMPLE)
    return [dice.choice([case for case in EVERY if case.flow.name == name]) for name in names]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Stages:
    ways, steps = {case.flow.name for case in EVERY}, {(case.flow.name, case.step) for case in EVERY}
    told = f"{len(ways)} flows × {len(steps)} steps × faults: {len(EVERY)} cases; seed {SEED}"
    request.config.get_terminal_writer().line(f" {told}")
    return Stages(tmp_path_factory.mktemp("failover"))


@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.name)
def test_a_death_or_a_cancel_at_any_step_leads_to_a_named_state_and_on(stages: Stages, case: Case) -> None:
    sites = stages.begin(case.flow.stage)
    try:
        Trial(sites, case).do()
        sites.stop()
    except BaseException as error:
        error.add_note(sites.logs())
        raise
    finally:
        sites.close()


class Trial:
    """One case."""

    def __init__(self, sites: Sites, case: Case) -> None:
        self.sites = sites
        self.flow = case.flow
        self.case = case
        self.source, self.target = sites.side(case.flow.source), sites.side(case.flow.target)
        self.at = sites.side(case.flow.at)
        point = sites.notes["point1"] if case.flow.source == "S" else "latest"
        self.words = [point if word == "POINT" else word for word in case.flow.words]

    def do(self) -> None:
        self.begin()
        was = self.at.do(*self.words, harm=self.case.harm(self.sites))
        if self.case.label is None:
            assert (self.sites.root / "harmed").exists(), was
            died = self.case.victim is None and self.case.do == "kill"
            assert not died or was.code == -9, was
        self.look()
        for side in (self.source, self.target):
            if self.case.victim in (None, (side.name, "run")):
                side.start()
        is_cancelled = self.case.then == "cancel" and self.cancel()
        if not is_cancelled and self.case.then == "again":
            self.go_on(was)
        self.follow_status()
        self.wait_for_end(is_cancelled=is_cancelled or self.flow.words[1] == "cancel")

    # Before -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        harm = self.case.harm(self.sites) if self.case.label else None
        there = self.flow.target
        is_run_there = zlib.crc32(self.case.name.encode()) % 2 == 0 or self.case.victim == (there, "run")
        self.is_run = {self.flow.source: True, there: is_run_there}
        for side in (self.source, self.target):
            if self.is_run[side.name]:
                side.start(harm)
        for side, process in self.expected():
            if not self.is_run[side.name] and process == "tracker" and not side.serves("tracker"):
                side.do("mount", VM, harm=harm)
            wait_for(lambda side=side, process=process: side.serves(process), self.sites.logs)
        if self.flow.name.startswith("prepare"):
            assert self.sites.write(self.source, "os.raw", 9 << 17, os.urandom(50_000))
        if self.flow.name.startswith("commit"):
            assert self.sites.write(self.target, "os.raw", 9 << 17, os.urandom(50_000))

    def expected(self) -> Iterator[tuple[Side, str]]:
        """The processes that serve when all is well."""
        name = self.flow.name.removesuffix(" back")
        if name != "turn round":
            yield self.source, "tracker"
        if name in ("prepare", "unplanned"):
            yield self.source, "shipper"
        if name in ("change point", "cancel there", "commit", "give way", "turn round"):
            yield self.target, "tracker"

    # After ------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Whatever has happened, each side can say what it is, and nothing passes for worked at."""
        for side in (self.source, self.target):
            state = side.status()["state"]
            assert state == "absent" or ReplicationState(state), state
            working = {job["kind"] for job in side.jobs() if job["state"] == "InProgress"}
            assert working <= IN_THE_BACKGROUND, working

    def last_job(self) -> dict[str, Any]:
        words = [(job, (job["command"] or "").split()[1:2]) for job in self.at.jobs()]
        return next(job for job, first in reversed(words) if first in (["failover"], ["replication"]))

    def go_on(self, was: Answer) -> None:
        """Type what is named until it is done; and the command again once what its hint named was done."""
        said, typed = [was], None
        for _ in range(10):
            job = self.last_job()
            if job["state"] == "Succeeded":
                return
            line = job["next_command"]
            if line is None or (job["id"], line) == typed:
                line = f"hvfuse job restart {job['id']}"
            typed = job["id"], line
            asks = line.split()[1] in ("failover", "replication") and "--yes" not in line
            said.append(self.at.type(f"{line} --yes" if asks else line))
        raise AssertionError(f"{self.last_job()} {said}")

    def follow_status(self) -> None:
        """Where no `hvfuse run` starts again what has died, the status says what does."""
        for side in (self.source, self.target):
            if not self.is_run[side.name]:
                for reason in side.status().get("reasons", ()):
                    if reason["id"] in ("failover-not-served", "tracker-down", "shipper-down"):
                        assert reason["next_command"], reason
                        side.type(reason["next_command"])

    def cancel(self) -> bool:
        """As far as it can be cancelled now, on either side; whether it was. Else it has to have said why not."""
        for side in (self.target, self.source):
            answer = side.do("failover", "cancel", VM, "--yes")
            if answer.code == 0:
                return True
            assert "hint: " in answer.out, answer
        assert self.case.flow.name.removesuffix(" back") in ("prepare", "unplanned"), "it stands, and can be cancelled"
        return True

    def wait_for_end(self, *, is_cancelled: bool) -> None:
        end = "cancelled" if is_cancelled else self.flow.name.removesuffix(" back")
        has = self.source if is_cancelled else self.sites.side(self.flow.has)
        lost = self.target if has is self.source else self.source
        wait_for(
            lambda: self.ends(end) is None, lambda: f"{self.ends(end)} {self.source.status()} {self.target.status()}"
        )
        if end == "change point" and self.flow.source == "S":
            self.sites.model = self.sites.notes["model1"]
        elif end == "change point" or (
            is_cancelled and "source" in self.sites.notes and self.flow.stage.startswith("failed")
        ):
            self.sites.model = self.sites.notes["source"]
        wait_for(lambda: has.is_mounted and has.serves("tracker"), self.sites.logs)
        for disk in SIZES:
            assert has.read(disk) == bytes(self.sites.model[disk]), f"{disk} on {has.name}"
        assert has.is_writable() is (end != "prepare")
        wait_for(lambda: not lost.is_writable(), self.sites.logs, FENCE_SECONDS)
        self.look()
        self.leftovers(end)

    def ends(self, end: str) -> str | None:
        """What is not yet as it is to be."""
        at_source, at_target = self.source.status(), self.target.status()
        back = self.flow.source == "T"
        opened = "FailbackInProgress" if back else "FailedOverWaitingCompletion"
        done = "FailbackComplete" if back else "FailedOver"
        wanted = {
            "cancelled": ("Replicating", None), "prepare": ("PreparedForFailover", None), "planned": (opened, opened),
            "unplanned": (opened, opened), "change point": (opened, opened), "commit": (done, "FailedOver"),
            "give way": (None, "FailedOver"), "turn round": (None, "Replicating"),
        }[end]  # fmt: skip
        for side, found, state in ((self.source, at_source, wanted[0]), (self.target, at_target, wanted[1])):
            if state is not None and found["state"] != state:
                return f"{side.name} is {found['state']}, and not {state}"
        if end == "commit" and (self.target.folder / ".failover").exists():
            return "its disks are not plain ones yet"
        if end == "cancelled" and self.source.status()["replica_state"] not in (None, "Replicating"):
            return "the replica is not replicated to"
        if end == "cancelled" and not self.source.is_writable():
            return "the source does not have its disks back"
        if end == "turn round" and at_target["pending_bytes"]:
            return "not all has arrived"
        return None

    def leftovers(self, end: str) -> None:
        wanted = 1 if end in ("planned", "unplanned", "change point") else 0
        assert self.target.pins().count("failover") == wanted, self.target.pins()
        if end == "cancelled":
            assert not self.target.is_mounted
            assert not (self.target.folder / ".failover").exists()
            assert not any((self.target.folder / disk).exists() for disk in SIZES)
        if end in ("give way", "turn round"):
            assert not self.source.is_mounted
            assert not any((self.source.folder / disk).exists() for disk in SIZES)
