"""`hvfuse job`, and the jobs that commands leave behind: real processes, killed at each step."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from hvfuse.control.daemon import serving_pid
from hvfuse.control.job import JobKind, JobState
from hvfuse.control.records import Records
from hvfuse.shipper.orders import Orders
from hvfuse.states import Event
from tests.cli.conftest import CommandLine
from tests.control.children import until

MIB = 1 << 20
REPOSITORY = Path(__file__).resolve().parents[2]


def records(hvfuse: CommandLine) -> Records:
    return Records(str(hvfuse.root / "state" / "records"))


def jobs(hvfuse: CommandLine) -> list[dict[str, Any]]:
    return list(hvfuse.json("job", "list", "--all")["jobs"])


def a_medium(hvfuse: CommandLine, path: Path) -> None:
    """An export of a VM "vm", made in a home of its own."""
    hvfuse.add_vm("vm", 4 * MIB)
    with open(hvfuse.root / "disks" / "vm" / "os.raw", "r+b") as file:
        file.write(os.urandom(2 * MIB))
    assert hvfuse("mount", "vm") == 0
    assert hvfuse("seed", "export", "vm", str(path)) == 0


STEPPER = """
import os, signal, sys
from hvfuse.control.jobs import Running

home, last, *words = sys.argv[1:]
step, count = Running.step, [0]

def counted(self, *arguments):
    step(self, *arguments)
    count[0] += 1
    if str(count[0]) == last:
        os.kill(os.getpid(), signal.SIGKILL)

Running.step = counted
from hvfuse.cli.main import main
main(["--home", home, *words])
"""


def killed_at(hvfuse: CommandLine, step: int, *words: str) -> None:
    """Run a command that is killed as soon as its job is at the `step`th step."""
    done = subprocess.run(
        [sys.executable, "-c", STEPPER, str(hvfuse.root), str(step), *words], cwd=REPOSITORY, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def interrupted(hvfuse: CommandLine, kind: str, step: str, command: str) -> dict[str, Any]:
    """The newest job, which is shown as interrupted at `step`, and by no command as in progress."""
    last = jobs(hvfuse)[-1]
    assert (last["kind"], last["state"], last["next_command"], last["allowed"]) == (
        kind, "Failed", command, ["restart"],
    )  # fmt: skip
    assert [error["id"] for error in last["errors"]] == ["interrupted"]
    assert last["errors"][0]["message"] == f"its process ended at “{step}”"
    assert not [job for job in jobs(hvfuse) if job["state"] == "InProgress"]
    return last


class TestWhereNothingRuns:
    def test_a_home_without_records_has_no_jobs(self, hvfuse: CommandLine) -> None:
        assert hvfuse.json("job", "list") == {"jobs": []}
        assert hvfuse("job", "list") == 0
        assert hvfuse.out == "There is no job of the last day.\n"
        assert hvfuse("job", "show", "1") == 5
        assert not (hvfuse.root / "state").exists()

    def test_a_job_is_shown_with_its_steps_its_error_and_what_to_type(self, hvfuse: CommandLine) -> None:
        with (
            records(hvfuse) as kept,
            pytest.raises(ZeroDivisionError),
            kept.jobs.run(JobKind.VERIFY, "vm", steps=("one", "two", "three"), command=("verify", "vm")) as job,
        ):
            job.step("two")
            raise ZeroDivisionError("by zero")
        assert hvfuse("job", "show", "1") == 0
        at = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
        assert re.fullmatch(
            rf"""job 1: Verify of vm: Failed, 0 %
started {at}, ended {at}, 0\.\d s
  Succeeded    one  {at} to {at}
  Failed       two  {at} to {at}
  NotStarted   three
error ZeroDivisionError: by zero
  to do: hvfuse verify vm
allowed: restart
next: hvfuse verify vm
""",
            hvfuse.out,
        ), hvfuse.out
        shown = hvfuse.json("job", "show", "1")
        assert list(shown) == [
            "id", "kind", "vm", "state", "percent", "started", "ended", "seconds", "steps", "errors", "allowed",
            "next_command", "command",
        ]  # fmt: skip
        assert list(shown["steps"][0]) == ["name", "state", "started", "ended", "text"]
        assert list(shown["errors"][0]) == ["id", "message", "causes", "recommendation"]
        assert hvfuse("job", "list") == 0
        head, line, why = hvfuse.out.splitlines()
        assert head.split() == ["ID", "KIND", "VM", "STATE", "STARTED", "TOOK"]
        assert re.fullmatch(rf" 1  Verify  vm  Failed  {at}  0\.\d s", line), line
        assert why == "job 1: by zero"

    def test_jobs_of_one_vm_and_of_the_last_day_are_listed(self, hvfuse: CommandLine) -> None:
        with records(hvfuse) as kept:
            for vm in ("one", "two"):
                with kept.jobs.run(JobKind.VERIFY, vm) as job:
                    pass
            kept.jobs.change(job.id, lambda job: type(job).from_json(job.id, {**job.as_json(), "ended_ns": 1}))
        assert [job["vm"] for job in hvfuse.json("job", "list")["jobs"]] == ["one"]
        assert [job["vm"] for job in hvfuse.json("job", "list", "two", "--all")["jobs"]] == ["two"]

    def test_what_a_job_does_not_allow_is_refused_with_what_it_does(self, hvfuse: CommandLine) -> None:
        with records(hvfuse) as kept, kept.jobs.run(JobKind.VERIFY, "vm", command=("verify", "vm")):
            pass
        for action in ("cancel", "resume", "restart"):
            assert hvfuse("job", action, "1") == 13
            assert hvfuse.err == (
                f"hvfuse: job 1, Verify of vm, is Succeeded: {action} is not possible now; allowed: nothing\n"
                "  hint: hvfuse job show 1\n"
            )
        with records(hvfuse) as kept:
            kept.apply("vm", Event.ENABLE, Event.START)
            kept.apply("vm", Event.SUSPEND)
        assert hvfuse("job", "restart", "2") == 13
        assert "is Suspended: restart is not possible now; allowed: resume, cancel" in hvfuse.err
        assert hvfuse("job", "cancel", "3") == 5


class TestACopysJob:
    @pytest.fixture
    def copying(self, hvfuse: CommandLine) -> CommandLine:
        """A copy whose shipper was killed."""
        hvfuse.add_vm("vm")
        code = (
            "import os, sys\nfrom hvfuse.control.records import Records\nfrom hvfuse.states import Event\n"
            "records = Records(sys.argv[1])\nrecords.apply('vm', Event.ENABLE, Event.START)\nos.kill(os.getpid(), 9)\n"
        )
        subprocess.run([sys.executable, "-c", code, str(hvfuse.root / "state" / "records")], cwd=REPOSITORY)
        return hvfuse

    def orders(self, hvfuse: CommandLine) -> Orders:
        with records(hvfuse) as kept:
            return kept.orders("vm")

    def test_is_never_shown_in_progress_once_its_process_is_gone(self, copying: CommandLine) -> None:
        for ask in (lambda: jobs(copying)[0], lambda: copying.json("job", "show", "1")):
            job = ask()
            assert (job["state"], job["allowed"]) == ("Suspended", ["resume", "cancel"])
            assert job["next_command"] == "hvfuse job resume 1"

    def test_is_cancelled_as_by_hvfuse_resync(self, copying: CommandLine) -> None:
        assert copying("job", "cancel", "1") == 0
        assert "vm: no recovery points are made before: hvfuse resync vm --now\n" in copying.out
        assert self.orders(copying) == Orders(cancelled=True)
        assert jobs(copying)[0]["state"] == "Cancelled"

    def test_goes_on_as_by_hvfuse_resync_if_it_was_held_up(self, copying: CommandLine) -> None:
        assert copying("resync", "vm", "--suspend") == 0
        assert copying("job", "resume", "1") == 0
        assert copying.out.startswith("vm: copies are not suspended any more\n")
        assert self.orders(copying) == Orders()

    def test_begins_at_once_if_it_only_waits(self, copying: CommandLine) -> None:
        assert copying("job", "resume", "1") == 11
        assert "vm is not mounted" in copying.err
        assert self.orders(copying) == Orders(now=True)

    @pytest.mark.mount
    def test_begins_at_once_and_to_its_end(self, copying: CommandLine) -> None:
        assert copying("mount", "vm") == 0
        assert copying("job", "resume", "1") == 0
        assert "vm: recovery point " in copying.out
        assert [(job["id"], job["state"], job["percent"]) for job in jobs(copying)] == [
            (1, "Succeeded", 100), (2, "Succeeded", 100)
        ]  # fmt: skip
        assert jobs(copying)[1]["kind"] == "Finalize protection"

    @pytest.mark.mount
    def test_that_was_given_up_begins_anew_as_another(self, copying: CommandLine) -> None:
        assert copying("mount", "vm") == 0
        assert copying("job", "cancel", "1") == 0
        assert copying("job", "restart", "1") == 0
        states = [(job["id"], job["state"]) for job in jobs(copying) if job["kind"] != "Finalize protection"]
        assert states == [(1, "Cancelled"), (2, "Succeeded")]


class TestACommandsJob:
    def test_an_import_that_is_killed_at_any_step_is_done_again_by_its_job(
        self, hvfuse: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        medium = tmp_path / "medium"
        a_medium(hvfuse, medium)
        target = CommandLine(tmp_path / "target", capsys)
        command = f"hvfuse seed import {medium}"
        killed_at(target, 1, "seed", "import", str(medium))
        interrupted(target, "Import", "verify the medium", command)
        killed_at(target, 2, "seed", "import", str(medium))
        last = interrupted(target, "Import", "import", command)
        assert target("job", "restart", str(last["id"])) == 0
        assert target.out.startswith("vm: imported: 4 MiB, ")
        done = jobs(target)[-1]
        assert (done["state"], done["percent"], done["command"]) == ("Succeeded", 100, command)
        assert [step["state"] for step in done["steps"]] == ["Succeeded", "Succeeded"]

    def test_an_import_that_fails_says_what_to_do(
        self, hvfuse: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        medium = tmp_path / "medium"
        a_medium(hvfuse, medium)
        with open(medium / "frames-00000.hvs", "r+b") as file:
            file.seek(MIB)
            file.write(b"damage")
        target = CommandLine(tmp_path / "target", capsys)
        assert target("seed", "import", str(medium)) == 7
        (job,) = jobs(target)
        assert (job["state"], job["steps"][0]["state"]) == ("Failed", "Failed")
        assert (job["errors"][0]["id"], bool(job["next_command"])) == ("DamagedSeedError", True)

    @pytest.mark.mount
    def test_an_export_that_is_killed_goes_on_by_its_job(self, hvfuse: CommandLine, tmp_path: Path) -> None:
        hvfuse.add_vm("vm", 4 * MIB)
        assert hvfuse("mount", "vm") == 0
        medium = tmp_path / "a medium"
        killed_at(hvfuse, 1, "seed", "export", "vm", str(medium))
        last = interrupted(hvfuse, "Export", "write the medium", f"hvfuse seed export vm '{medium}'")
        assert hvfuse("job", "restart", str(last["id"])) == 0
        assert (medium / "manifest.json").exists()
        assert jobs(hvfuse)[-1]["state"] == "Succeeded"

    @pytest.mark.mount
    def test_a_test_failover_and_its_cleanup_are_jobs_whatever_kills_them(
        self, hvfuse: CommandLine, tmp_path: Path
    ) -> None:
        hvfuse.add_vm("vm")
        assert hvfuse("mount", "vm") == 0
        assert hvfuse("replicate", "vm") == 0
        view = tmp_path / "view"
        command = f"hvfuse failover test vm --point latest --mount {view}"
        for step, name in enumerate(("choose the recovery point", "mount it"), start=1):
            killed_at(hvfuse, step, "failover", "test", "vm", "--mount", str(view))
            last = interrupted(hvfuse, "Test failover", name, command)
        assert hvfuse("job", "restart", str(last["id"])) == 0
        assert (view / "os.raw").exists()
        (pin,) = hvfuse.json("failover", "list")["tests"]
        command = f"hvfuse failover cleanup vm {pin['id']} --note 'it boots'"
        names = ("shut the guest down", "unmount", "drop what was written", "let the recovery point go")
        for step, name in enumerate(names, start=1):
            killed_at(hvfuse, step, "failover", "cleanup", "vm", str(pin["id"]), "--note", "it boots")
            last = interrupted(hvfuse, "Cleanup test failover", name, command)
            (measured,) = hvfuse.json("measure")["vms"]
            assert measured["last_test_failover"] is None
        assert hvfuse("job", "restart", str(last["id"])) == 0
        assert hvfuse.json("failover", "list") == {"tests": []}
        (measured,) = hvfuse.json("measure")["vms"]
        assert measured["last_test_failover_point"] == pin["point"]
        assert measured["last_test_failover_note"] == "it boots"
        assert measured["last_test_failover"] is not None

    @pytest.mark.mount
    def test_a_failover_is_gone_on_with_as_it_was_ordered(self, hvfuse: CommandLine) -> None:
        hvfuse.add_vm("vm")
        assert hvfuse("mount", "vm") == 0
        assert hvfuse("replicate", "vm") == 0
        words = ("failover", "unplanned", "vm", "--point", "2026-11-22T18:30", "--boot", "--validate", "--yes")
        killed_at(hvfuse, 1, *words)
        interrupted(hvfuse, "Unplanned failover", "choose the recovery point", f"hvfuse {' '.join(words)}")

    @pytest.mark.mount
    def test_a_test_failover_of_a_point_that_does_not_exist_fails_with_where_to_look(
        self, hvfuse: CommandLine, tmp_path: Path
    ) -> None:
        hvfuse.add_vm("vm")
        assert hvfuse("mount", "vm") == 0
        assert hvfuse("replicate", "vm") == 0
        assert hvfuse("failover", "test", "vm", "--point", "nosuch", "--mount", str(tmp_path / "v")) == 5
        last = jobs(hvfuse)[-1]
        assert (last["state"], last["errors"][0]["id"], last["next_command"]) == (
            "Failed", "NotFoundError", "hvfuse point list vm",
        )  # fmt: skip
        assert hvfuse("failover", "test", "other", "--mount", str(tmp_path / "v")) == 5
        assert jobs(hvfuse)[-1]["id"] == last["id"]

    @pytest.mark.mount
    def test_a_verification_that_is_killed_is_done_again_with_the_same_words(self, hvfuse: CommandLine) -> None:
        hvfuse.add_vm("vm")
        assert hvfuse("mount", "vm") == 0
        assert hvfuse("replicate", "vm") == 0
        killed_at(hvfuse, 1, "verify", "vm", "--all", "--seed", "7")
        last = interrupted(hvfuse, "Verify", "compare", "hvfuse verify vm --all --seed 7")
        answer = hvfuse.json("job", "restart", str(last["id"]))
        assert (answer["seed"], answer["mismatches"]) == (7, [])
        assert jobs(hvfuse)[-1]["state"] == "Succeeded"

    @pytest.mark.mount
    def test_a_verification_that_finds_a_difference_has_failed(self, hvfuse: CommandLine) -> None:
        hvfuse.add_vm("vm")
        assert hvfuse("mount", "vm") == 0
        assert hvfuse("replicate", "vm") == 0
        with open(hvfuse.root / "disks" / "vm" / "os.raw", "r+b") as file:
            file.write(b"behind the mount")
        assert hvfuse("verify", "vm", "--all") == 7
        last = jobs(hvfuse)[-1]
        assert (last["state"], last["errors"][0]["message"], last["next_command"]) == (
            "Failed", "the replica differs from the disks in 1 place", "hvfuse verify vm --repair",
        )  # fmt: skip

    @pytest.mark.mount
    def test_a_command_that_is_under_way_is_interrupted_by_its_job(self, hvfuse: CommandLine, tmp_path: Path) -> None:
        hvfuse.add_vm("vm", 256 * MIB)
        with open(hvfuse.root / "disks" / "vm" / "os.raw", "r+b") as file:
            for _ in range(64):
                file.write(os.urandom(4 * MIB))
        assert hvfuse("mount", "vm") == 0
        words = ["--home", str(hvfuse.root), "seed", "export", "vm", str(tmp_path / "medium")]
        slow = "import hvfuse.system as s, time\np = s.pwrite\n"
        slow += "def slowly(*a):\n    time.sleep(0.5)\n    return p(*a)\n"
        slow += f"s.pwrite = slowly\nfrom hvfuse.cli.main import main\nmain({words!r})\n"
        with subprocess.Popen([sys.executable, "-c", slow], cwd=REPOSITORY, stderr=subprocess.PIPE) as command:
            until(lambda: [job for job in jobs(hvfuse) if job["state"] == "InProgress" and job["steps"][0]["text"]])
            with records(hvfuse) as kept:
                (job,) = kept.jobs.all()
                assert job.owner is not None
                assert job.owner["pid"] == command.pid
            assert hvfuse("job", "cancel", str(job.id)) == 0, hvfuse.err
            assert command.wait(20) == 130
        with records(hvfuse) as kept:
            assert kept.jobs.get(job.id).state is JobState.CANCELLED

    @pytest.mark.mount
    def test_an_export_that_the_shipper_makes_ends_there_when_its_job_is_cancelled(
        self, hvfuse: CommandLine, tmp_path: Path
    ) -> None:
        hvfuse.add_vm("vm", 256 * MIB)
        with open(hvfuse.root / "disks" / "vm" / "os.raw", "r+b") as file:
            for _ in range(64):
                file.write(os.urandom(4 * MIB))
        assert hvfuse("mount", "vm") == 0
        (hvfuse.root / "hvfuse.toml").write_text('[vm.vm]\ninitial = "seed"\ncompression = 15\n')
        shipper = serving_pid(hvfuse.ship("vm"))
        assert shipper is not None
        words = [
            sys.executable,
            "-m",
            "hvfuse",
            "--home",
            str(hvfuse.root),
            "seed",
            "export",
            "vm",
            str(tmp_path / "m"),
        ]
        with subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as command:
            with records(hvfuse) as kept:
                until(lambda: (kept.read("vm").copy or {}).get("kind") == "export")
                os.kill(shipper, signal.SIGSTOP)
                (job,) = kept.jobs.open("vm", {JobKind.EXPORT})
            timer = threading.Timer(1.0, os.kill, (shipper, signal.SIGCONT))
            timer.start()
            assert hvfuse("job", "cancel", str(job.id)) == 0, hvfuse.err
            timer.join()
            assert "the export was cancelled; what is in its directory DIR stays" in hvfuse.out
            assert command.wait(20) == 130
        with records(hvfuse) as kept:
            assert kept.jobs.get(job.id).state is JobState.CANCELLED
            until(lambda: kept.read("vm").copy is None)
        assert json.loads((tmp_path / "m" / "manifest.json").read_text())["complete"] is False
