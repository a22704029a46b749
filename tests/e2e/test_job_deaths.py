"""The job of a copy, with a death of each process at each of its steps: it goes on, and never passes for worked at."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from hvfuse import system
from hvfuse.control.daemon import serving_pid
from hvfuse.control.following import COPY_STEP, POINT_STEP
from hvfuse.control.records import Records

from .conftest import Installation, wait_until

pytestmark = pytest.mark.mount

SIZE = 16 << 20
CONFIG = """
[replication]
frequency = "1h"
hard_limit = 1000
resync_window = "always"
throttle = "4MB/s"
"""


def start(installation: Installation) -> None:
    folder = installation.disks / "vm1"
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "os.raw").write_bytes(os.urandom(SIZE))
        installation.root.joinpath("hvfuse.toml").write_text(CONFIG)
    installation.start()


def jobs(installation: Installation) -> list[dict[str, Any]]:
    """As a command tells of them; none may pass for worked at that is not."""
    found = installation.json("job", "list", "vm1", "--all")["jobs"]
    with Records(str(installation.root / "state" / "records")) as records:
        kept = {job.id: job for job in records.jobs.all()}
    for job in found:
        owner = kept[job["id"]].owner
        if job["state"] == "InProgress" and kept[job["id"]].state.value == "InProgress":
            assert owner is not None
            assert system.is_running(owner), job
    return list(found)


def of_kind(installation: Installation, kind: str) -> list[dict[str, Any]]:
    return [job for job in jobs(installation) if job["kind"] == kind]


def newest(installation: Installation, kind: str) -> dict[str, Any]:
    found = of_kind(installation, kind)
    return found[-1] if found else {"state": "none", "percent": 0, "steps": []}


def wait_for(installation: Installation, kind: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    wait_until(lambda: is_so(newest(installation, kind)), lambda: f"{jobs(installation)}{installation.logs()}")
    return newest(installation, kind)


def at_step(name: str) -> Callable[[dict[str, Any]], bool]:
    def is_there(job: dict[str, Any]) -> bool:
        states = {step["name"]: step["state"] for step in job["steps"]}
        return job["state"] == "InProgress" and states.get(name) == "InProgress" and job["percent"] > 0

    return is_there


def pid_of(installation: Installation, role: str) -> int:
    pid = serving_pid(str(installation.root / "state" / "vms" / "vm1" / f"{role}.sock"))
    assert pid is not None
    return pid


def bring_to(installation: Installation, kind: str, step: str) -> dict[str, Any]:
    """The job is at that step and stays there for a while. The tracker may be stopped for that."""
    wait_for(installation, kind, at_step(COPY_STEP))
    if step == POINT_STEP:
        # The copy is read from the images; what follows it needs the tracker, which stands still.
        os.kill(pid_of(installation, "tracker"), signal.SIGSTOP)
    return wait_for(installation, kind, at_step(step))


def kill(installation: Installation, victims: tuple[str, ...]) -> None:
    pids = {"shipper": pid_of(installation, "shipper"), "tracker": pid_of(installation, "tracker")}
    for victim in victims:
        os.kill(installation.running_pid if victim == "run" else pids[victim], signal.SIGKILL)
    if "run" in victims:
        installation.buried()
    if "tracker" not in victims:
        os.kill(pids["tracker"], signal.SIGCONT)


EVERYBODY = ("run", "shipper", "tracker")
DEATHS = [(COPY_STEP, ("shipper",)), (COPY_STEP, EVERYBODY), (POINT_STEP, ("tracker",)), (POINT_STEP, EVERYBODY)]
if "HVFUSE_DEATHS" in os.environ:  # set it to anything for all of them
    DEATHS = [
        (step, victims)
        for step in (COPY_STEP, POINT_STEP)
        for victims in (("shipper",), ("tracker",), ("run",), ("shipper", "tracker"), EVERYBODY)
    ]


@pytest.mark.parametrize(("step", "victims"), DEATHS)
def test_the_first_copys_job_survives_a_death_at_any_step(
    installation: Installation, step: str, victims: tuple[str, ...]
) -> None:
    start(installation)
    begun = bring_to(installation, "Initial replication", step)
    kill(installation, victims)
    if "run" in victims and "shipper" in victims:
        left = newest(installation, "Initial replication")
        assert left["state"] == "Suspended", "nobody is at it"
        assert left["next_command"] == f"hvfuse job resume {begun['id']}"
        assert installation.status("vm1")["health"] == "Critical"
    if "run" in victims:
        start(installation)
    done = wait_for(installation, "Initial replication", lambda job: job["state"] == "Succeeded")
    assert (done["id"], done["percent"]) == (begun["id"], 100)
    assert len(of_kind(installation, "Initial replication")) == 1
    installation.wait_for_state("vm1")
    wait_for(installation, "Finalize protection", lambda job: job["state"] == "Succeeded")


def test_a_resynchronisations_job_survives_a_death_of_all(installation: Installation) -> None:
    start(installation)
    installation.wait_for_state("vm1")
    installation.hvfuse("resync", "vm1", "--full", "--no-wait")
    begun = wait_for(installation, "Resynchronize", lambda job: job["state"] in ("InProgress", "Succeeded"))
    if begun["state"] == "InProgress":
        kill(installation, ("run", "shipper", "tracker"))
        start(installation)
    done = wait_for(installation, "Resynchronize", lambda job: job["state"] == "Succeeded")
    assert done["id"] == begun["id"]
