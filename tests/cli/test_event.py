"""`hvfuse event list`: what happened, and what happens while somebody looks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hvfuse.control.events import Severity
from hvfuse.control.job import Job, JobKind, JobState
from hvfuse.control.jobs import add_job
from hvfuse.control.records import Records
from tests.cli.conftest import CommandLine

REPOSITORY = Path(__file__).resolve().parents[2]
AT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def records(hvfuse: CommandLine) -> Records:
    return Records(str(hvfuse.root / "state" / "records"))


def add(kept: Records, text: str, *, vm: str = "vm", kind: str = "failure", ago: float = 0.0) -> None:
    kept.events.add(
        kind=kind, vm=vm, text=text, severity=Severity.WARNING, data={"why": text},
        now_ns=time.time_ns() - int(ago * 1e9),
    )  # fmt: skip


def texts(hvfuse: CommandLine, *words: str) -> list[str]:
    return [event["text"] for event in hvfuse.json("event", "list", *words)["events"]]


@contextmanager
def following(hvfuse: CommandLine, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "hvfuse", "--home", str(hvfuse.root), "event", "list", "--follow", *words]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_home_without_records_has_no_events_and_gets_none(hvfuse: CommandLine) -> None:
    assert hvfuse.json("event", "list") == {"events": []}
    assert not (hvfuse.root / "state").exists()


def test_an_event_is_a_line_for_a_person_and_these_fields_for_a_program(hvfuse: CommandLine) -> None:
    with records(hvfuse) as kept:
        add(kept, "no answer\nfrom there")
    assert hvfuse("event", "list") == 0
    assert re.fullmatch(rf"{AT}  warning  vm: no answer\\nfrom there\n", hvfuse.out), hvfuse.out
    (event,) = hvfuse.json("event", "list")["events"]
    assert list(event) == ["number", "time", "kind", "vm", "severity", "text", "data"]
    assert (event["number"], event["kind"], event["data"]) == (1, "failure", {"why": "no answer\nfrom there"})


def test_events_are_chosen_by_vm_kind_number_and_time(hvfuse: CommandLine) -> None:
    with records(hvfuse) as kept:
        add(kept, "long ago", ago=7200)
        add(kept, "a while ago", vm="other", ago=600)
        add(kept, "just now", kind="policy")
    assert texts(hvfuse) == ["long ago", "a while ago", "just now"]
    assert texts(hvfuse, "vm") == ["long ago", "just now"]
    assert texts(hvfuse, "--kind", "policy") == ["just now"]
    assert texts(hvfuse, "--newest", "2") == ["a while ago", "just now"]
    assert texts(hvfuse, "--newest", "0") == []
    assert texts(hvfuse, "--since", "1h") == ["a while ago", "just now"]
    assert texts(hvfuse, "--since", "1h", "--newest", "1") == ["just now"]
    assert texts(hvfuse, "--since", "2001-01-01 18:30", "vm") == ["long ago", "just now"]


def test_without_a_number_the_last_fifty_are_listed_and_all_with_a_time(hvfuse: CommandLine) -> None:
    with records(hvfuse) as kept:
        for number in range(60):
            add(kept, str(number))
    assert texts(hvfuse) == [str(number) for number in range(10, 60)]
    assert len(texts(hvfuse, "--since", "1h")) == 60


def test_what_makes_no_sense_is_refused(hvfuse: CommandLine) -> None:
    for words, why in (
        (["--kind", "states"], "there are no events of the kind 'states'"),
        (["--since", "tomorrow"], "'tomorrow' is not a time"),
        (["--newest", "-1"], "--newest"),
    ):
        assert hvfuse("event", "list", *words) == 2
        assert why in hvfuse.err


def test_a_dead_process_is_told_of_although_nobody_did_yet(hvfuse: CommandLine) -> None:
    with records(hvfuse) as kept:
        job = Job(id=0, kind=JobKind.VERIFY, vm="vm", state=JobState.IN_PROGRESS)
        kept._database.write(lambda txn: add_job(txn, job, now_ns=time.time_ns()))
    assert texts(hvfuse) == ["job 1, Verify: InProgress", "job 1, Verify: Failed: its process ended"]


def test_whoever_follows_gets_each_event_once_as_a_line_and_ends_with_ctrl_c(hvfuse: CommandLine) -> None:
    with records(hvfuse) as kept:
        add(kept, "before")
        add(kept, "elsewhere", vm="other")
        with following(hvfuse, "vm", "--json") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            first = json.loads(process.stdout.readline())
            assert (first["output_version"], first["number"], first["text"]) == (1, 1, "before")
            for number in range(3):
                add(kept, f"news {number}")
                add(kept, "elsewhere", vm="other")
            told = [json.loads(process.stdout.readline())["text"] for _ in range(3)]
            assert told == ["news 0", "news 1", "news 2"]
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert (process.stdout.read(), process.stderr.read()) == ("", "\n")


@pytest.mark.parametrize("writes", [False, True], ids=["while nothing happens", "while something happens"])
def test_whoever_follows_ends_well_when_nobody_reads_any_more(hvfuse: CommandLine, writes: bool) -> None:
    with records(hvfuse) as kept:
        add(kept, "before")
        with following(hvfuse) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline().endswith("vm: before\n")
            os.close(process.stdout.fileno())
            deadline = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < deadline:
                if writes:
                    add(kept, "news")
                time.sleep(0.01)
            assert (process.poll(), process.stderr.read()) == (0, "")
            process.stdout = None


def test_whoever_waits_takes_next_to_no_time_of_a_processor(hvfuse: CommandLine) -> None:
    with records(hvfuse) as kept:
        add(kept, "before")
    with following(hvfuse) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = cpu_seconds(process.pid)
        time.sleep(3)
        assert cpu_seconds(process.pid) - before < 0.1


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
