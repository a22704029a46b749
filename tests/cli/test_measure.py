"""`hvfuse measure`: what is told of VMs that really replicate, and how."""

from __future__ import annotations

import csv
import io
import time

import pytest

from hvfuse.control.records import Records
from hvfuse.states import Event
from tests.cli.conftest import CommandLine

FIELDS = [
    "name", "state", "health", "health_details", "pending_bytes", "window_begin", "window_end", "successful_cycles",
    "missed_cycles", "network_failures", "replication_failures", "app_consistent_failures", "app_consistent_points",
    "mean_bytes", "max_bytes", "mean_latency_seconds", "max_latency_seconds", "mean_frozen_seconds",
    "max_frozen_seconds", "saved_by_overwriting_bytes", "saved_by_zeroes_bytes", "saved_by_compression_bytes",
    "last_replication_time", "last_applied_time", "last_test_failover", "last_test_failover_point",
    "last_test_failover_note", "late_cycles", "last_test_failover_validation",
]  # fmt: skip


def records(hvfuse: CommandLine) -> Records:
    return Records(str(hvfuse.root / "state" / "records"))


def replicating(hvfuse: CommandLine, vm: str, *, counted_ago: float = 0.0) -> None:
    hvfuse.add_vm(vm)
    with records(hvfuse) as kept:
        kept.apply(vm, Event.ENABLE, Event.COMMIT_POINT)
        kept.update(vm, counted_ns=time.time_ns() - int(counted_ago * 1e9))


@pytest.mark.mount
def test_cycles_are_told_by_what_they_took_and_saved(hvfuse: CommandLine) -> None:
    disk = hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    assert hvfuse("replicate", "vm") == 0
    for number in range(2):
        with open(disk, "r+b") as file:
            file.write(bytes([65 + number]) * 8192)
            file.flush()
            file.seek(0)
            file.write(b"y" * 4096)
        assert hvfuse("replicate", "vm") == 0
    answer = hvfuse.json("measure", "--window", "1h")
    assert answer["window_seconds"] == 3600
    (vm,) = answer["vms"]
    assert list(vm) == FIELDS
    assert (vm["name"], vm["state"], vm["successful_cycles"], vm["missed_cycles"]) == ("vm", "Replicating", 3, 0)
    assert vm["saved_by_overwriting_bytes"] == 8192
    assert 8192 < vm["saved_by_compression_bytes"] < 16384
    assert 0 < vm["mean_bytes"] <= vm["max_bytes"] < 4096
    assert 0 < vm["mean_latency_seconds"] <= vm["max_latency_seconds"] < 60
    assert vm["last_replication_time"] <= vm["last_applied_time"]
    assert vm["last_test_failover"] is None
    assert hvfuse("measure") == 0
    assert "  cycles      3 made, 0 missed (0 % of those due)\n" in hvfuse.out
    assert "  test        none was ever cleaned up\n" in hvfuse.out


def test_csv_has_a_header_and_a_line_for_each_vm_whatever_its_name(hvfuse: CommandLine) -> None:
    names = ['a "b", c', "plain"]
    for name in names:
        replicating(hvfuse, name)
    assert hvfuse("measure", "--csv") == 0
    assert hvfuse.out.count("\r\n") == 3
    assert hvfuse.out.replace("\r\n", "").count("\n") == 0
    head, *rows = csv.reader(io.StringIO(hvfuse.out, newline=""))
    assert head == FIELDS
    assert [row[0] for row in rows] == names
    assert {len(row) for row in rows} == {len(FIELDS)}
    told = dict(zip(head, rows[0], strict=True))
    assert (told["state"], told["last_test_failover"], told["missed_cycles"]) == ("Replicating", "", "0")
    assert "; " in told["health_details"] or told["health_details"]


def test_cycles_that_were_due_while_nothing_ran_are_missed(hvfuse: CommandLine) -> None:
    replicating(hvfuse, "vm", counted_ago=3600.0)
    (hvfuse.root / "hvfuse.toml").write_text('[replication]\nfrequency = "60s"\n')
    assert hvfuse.json("measure", "vm")["vms"][0]["missed_cycles"] == 59
    assert hvfuse.json("measure", "vm", "--window", "10m")["vms"][0]["missed_cycles"] in range(9, 17)
    with records(hvfuse) as kept:
        kept.apply("vm", Event.SUSPEND)
    assert hvfuse.json("measure", "vm")["vms"][0]["missed_cycles"] == 0


@pytest.mark.mount
def test_what_was_missed_stays_so_when_somebody_ships_again(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    assert hvfuse("replicate", "vm") == 0
    with records(hvfuse) as kept:
        kept.update("vm", counted_ns=time.time_ns() - 3600 * 10**9)
    assert hvfuse("replicate", "vm") == 0
    (vm,) = hvfuse.json("measure")["vms"]
    assert (vm["successful_cycles"], vm["missed_cycles"]) == (2, 119)


def test_counting_begins_anew_when_asked_to(hvfuse: CommandLine) -> None:
    for name in ("one", "two"):
        replicating(hvfuse, name, counted_ago=3600.0)
    assert hvfuse("measure", "one", "--reset") == 0
    assert hvfuse.out == "one: counted anew from now on\n"
    told = {
        vm["name"]: (vm["missed_cycles"], vm["window_begin"] >= vm["window_end"])
        for vm in hvfuse.json("measure")["vms"]
    }
    assert told["one"][0] == 0
    assert told["two"] == (119, False)
    assert hvfuse.json("measure", "--reset") == {"reset": ["one", "two"]}


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--csv", "--json"], 2, "--csv and --json do not go together"),
        (["--reset", "--csv"], 2, "--reset shows nothing"),
        (["--window", "8d"], 2, "is not a window of time"),
        (["nosuch"], 5, "there is no VM nosuch"),
    ],
)
def test_what_makes_no_sense_is_refused(hvfuse: CommandLine, words: list[str], code: int, why: str) -> None:
    assert hvfuse("measure", *words) == code
    assert why in hvfuse.err
