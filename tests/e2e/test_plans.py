"""Recovery plans by the command line: real hooks, real failovers of replicas in a real store, and deaths in between."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hvfuse.control.plan_record import PlanRun
from hvfuse.control.records import Records
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.target.model import Source

from .conftest import Installation, processes_of, wait_until

pytestmark = pytest.mark.mount

VMS = ("db01", "db02", "web01")
OPTIONS = {"test": ("--test",), "unplanned": ("--yes",)}
"""By mode: what `hvfuse plan run` is told."""


def replicas(installation: Installation) -> dict[str, bytes]:
    """A store with a replica of each VM; returns their disks."""
    disks = {}
    (installation.root / "store").mkdir(parents=True)
    with Store(str(installation.root / "store")) as store:
        for number, vm in enumerate(VMS):
            source = Source(vm, {"os.raw": 50_000}, seed=number)
            source.write("os.raw", 0, source.random.randbytes(20_000))
            with closing(LocalReplica(store, vm)) as replica:
                source.copy_to(replica)
                source.ship_to(replica)
            disks[vm] = bytes(source.disks["os.raw"])
    return disks


def hook(installation: Installation, word: str, condition: str = "true") -> list[str]:
    return ["/bin/sh", "-c", f"echo {word} >> {installation.root}/story; echo {word} says; {condition}"]


def told(installation: Installation) -> list[str]:
    path = installation.root / "story"
    return path.read_text().split() if path.exists() else []


def write_plan(installation: Installation, **first: Any) -> None:
    """Databases, then web; `first`: further keys of the first group."""
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in first.items())
    (installation.root / "hvfuse.toml").write_text(
        f'[plan.site]\n[[plan.site.group]]\nname = "databases"\nvms = ["db01", "db02"]\n{keys}'
        f'[[plan.site.group]]\nname = "web"\nvms = ["web01"]\nbefore = {json.dumps(hook(installation, "web"))}\n'
    )


def disk(installation: Installation, mode: str, vm: str, run: int = 1) -> Path:
    folder = installation.root / "tests" / f"site-{run}" if mode == "test" else installation.mnt
    return folder / vm / "os.raw"


def failovers(installation: Installation) -> list[str]:
    """The VMs that the jobs told of having been failed over, each as often as it was."""
    jobs = installation.json("job", "list", "--all")["jobs"]
    return [job["vm"] for job in jobs if job["kind"].endswith(" failover") and job["state"] == "Succeeded"]


@pytest.mark.parametrize("mode", OPTIONS)
def test_a_hook_that_fails_between_two_groups_stops_the_plan_until_it_is_mended(
    installation: Installation, mode: str
) -> None:
    disks = replicas(installation)
    gate = installation.root / "mended"
    write_plan(installation, before=hook(installation, "before"), after=hook(installation, "after", f"test -e {gate}"))
    out = installation.hvfuse("plan", "run", "site", *OPTIONS[mode], code=1)
    assert "has stopped: databases: after" in out
    assert told(installation) == ["before", "after"]
    assert sorted(failovers(installation)) == ["db01", "db02"]

    stopped = installation.json("plan", "report", "site")
    assert (stopped["state"], stopped["next_command"]) == ("Failed", "hvfuse plan run site --continue")
    states = {vm["vm"]: vm["state"] for vm in stopped["vms"]}
    assert states == {"db01": "Succeeded", "db02": "Succeeded", "web01": "NotStarted"}
    failed = stopped["steps"][-1]
    assert (failed["kind"], failed["error"], failed["output"]) == (
        "after",
        "/bin/sh ended with exit code 1",
        "after says",
    )
    assert "allowed: continue, skip, cancel" in installation.hvfuse("plan", "run", "site", *OPTIONS[mode], code=13)

    gate.touch()
    done = installation.json("plan", "run", "site", "--continue")
    assert done["state"] == "Succeeded"
    assert told(installation) == ["before", "after", "after", "web"]
    assert sorted(failovers(installation)) == sorted(VMS), "nothing is done twice"
    for vm in VMS:
        assert disk(installation, mode, vm).read_bytes()[:50_000] == disks[vm]
    first, second = (step for step in done["steps"] if step["what"] in ("db01", "db02"))
    assert max(first["started"], second["started"]) < min(first["ended"], second["ended"]), "both at once"
    for vm in done["vms"]:
        assert vm["point_age_seconds"] > 86400, "the points are of 2023"
        assert 0 < vm["rto_seconds"] <= done["seconds"]
        assert vm["waited_seconds"] == 0
        assert vm["outcome"]["mountpoint"] == str(disk(installation, mode, vm["vm"]).parent)
    jobs = [job for job in installation.json("job", "list", "--all")["jobs"] if job["kind"] == "Recovery plan"]
    assert [(job["vm"], job["state"]) for job in jobs] == [("site", "Failed"), ("site", "Succeeded")]


def test_tests_of_a_plan_are_cleaned_up_together(installation: Installation) -> None:
    replicas(installation)
    write_plan(installation)
    shown = installation.json("plan", "show", "site")
    assert [(vm["vm"], vm["error"]) for vm in shown["vms"]] == [(vm, None) for vm in VMS]
    text = installation.hvfuse("plan", "run", "site", "--test")
    assert "web01" in text and "run 1 of the plan site (test): Succeeded" in text
    assert installation.json("plan", "list")["plans"][0]["last_run"]["state"] == "Succeeded"
    own = installation.root / "own"
    installation.test_failover("db01", own)
    with open(disk(installation, "test", "web01"), "rb"):
        assert "in use" in installation.hvfuse("plan", "cleanup", "site", code=6)
    cleaned = installation.json("plan", "cleanup", "site")["cleaned"]
    assert [each["vm"] for each in cleaned] == ["web01"], "the others were ended before"
    (left,) = installation.json("failover", "list")["tests"]
    assert left["mountpoint"] == str(own), "tests that the plan did not make stay"
    assert not (installation.root / "tests").exists()
    installation.hvfuse("failover", "cleanup", "--all")


def test_a_pause_without_a_terminal_ends_with_its_own_exit_code(installation: Installation) -> None:
    replicas(installation)
    write_plan(installation, pause="look at the databases")
    said = installation.hvfuse("plan", "run", "site", "--test", code=17)
    assert "waits for you: look at the databases\n  hint: once done: hvfuse plan run site --continue" in said
    (job,) = [job for job in installation.json("job", "list")["jobs"] if job["kind"] == "Recovery plan"]
    assert (job["state"], job["next_command"]) == ("Suspended", f"hvfuse job resume {job['id']}")
    installation.hvfuse("job", "resume", str(job["id"]))
    report = installation.json("plan", "report", "site")
    web = report["vms"][-1]
    assert (report["state"], report["job"]) == ("Succeeded", job["id"])
    assert 0 < web["waited_seconds"] < web["rto_seconds"]
    assert web["waited_seconds"] == report["waited"]
    installation.hvfuse("plan", "cleanup", "site")


def test_on_a_terminal_a_pause_asks(installation: Installation) -> None:
    replicas(installation)
    write_plan(installation, pause="look at the databases")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        installation.command("plan", "run", "site", "--test"),
        cwd="/", env=installation.environment(), stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        os.close(theirs)
        os.write(ours, b"y\n")
        assert process.stdout is not None
        out = process.stdout.read().decode()
    os.close(ours)
    assert "look at the databases. Go on?" in out
    assert process.returncode == 0, out
    installation.hvfuse("plan", "cleanup", "site")


# Deaths ---------------------------------------------------------------------------------------------------------


def kept(installation: Installation) -> PlanRun | None:
    if not (installation.root / "state" / "records").exists():
        return None
    with Records(str(installation.root / "state" / "records")) as records:
        return next(reversed(records.plans.all()), None)


def started(what: str) -> Callable[[PlanRun], bool]:
    return lambda run: any(step.what.startswith(what) and step.state.value == "InProgress" for step in run.steps)


def is_asked_again(run: PlanRun) -> bool:
    return any(step.attempts > 1 for step in run.steps)


def failing_over(installation: Installation) -> list[int]:
    """The processes that fail VMs over for a plan."""
    found = []
    for pid in processes_of(installation.root):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"failover" in words:
            found.append(pid)
    return found


@pytest.mark.parametrize(("moment", "failover_dies"), [("db", True), ("web01", False)])
def test_a_plan_goes_on_whose_runner_was_killed(installation: Installation, moment: str, failover_dies: bool) -> None:
    disks = replicas(installation)
    write_plan(installation, after=hook(installation, "after"))
    with subprocess.Popen(
        installation.command("plan", "run", "site", "--test"), cwd="/", env=installation.environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        wait_until(lambda: (run := kept(installation)) is not None and started(moment)(run), lambda: moment)
        while not (orphans := failing_over(installation)):  # they live for half a second and more
            assert process.poll() is None
        for pid in orphans:
            os.kill(pid, signal.SIGKILL if failover_dies else signal.SIGSTOP)
        process.kill()
        process.wait()
    done = kept(installation)
    assert done is not None
    behind = [step.what for step in done.steps if step.key in done.done]
    left = installation.json("plan", "report", "site")
    assert left["state"] == "Failed"
    with subprocess.Popen(
        installation.command("plan", "run", "site", "--continue", "--json"), cwd="/", env=installation.environment(),
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        if not failover_dies:
            wait_until(lambda: (run := kept(installation)) is not None and is_asked_again(run), lambda: moment)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            assert failing_over(installation) == orphans, "it waits for the one that is under way"
            for pid in orphans:
                os.kill(pid, signal.SIGCONT)
        assert process.stdout is not None
        answer = json.loads(process.stdout.read())
    assert answer["state"] == "Succeeded"
    tests = installation.json("failover", "list")["tests"]
    assert sorted(test["vm"] for test in tests if test["alive"]) == sorted(VMS), "each one once"
    assert len(tests) == len(VMS)
    for vm in VMS:
        assert disk(installation, "test", vm).read_bytes()[:50_000] == disks[vm]
    attempts = {step["what"]: step["attempts"] for step in answer["steps"]}
    assert all(attempts[what] == 1 for what in behind)
    assert told(installation) == ["after", "web"]
    if not failover_dies:
        assert sorted(failovers(installation)) == sorted(VMS), "what was under way was waited for, and found"
    assert len(installation.json("plan", "cleanup", "site")["cleaned"]) == len(VMS)
