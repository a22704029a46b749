"""`hvfuse verify` on a VM that is mounted without `hvfuse run`, and what it says of it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from hvfuse import wire
from hvfuse.cli.verify import parse_budget, parse_share
from hvfuse.errors import UsageError
from tests.cli.conftest import CommandLine

pytestmark = pytest.mark.mount

BLOCK = 64 << 10
MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), ("100%", 1), ("0.1 %", 0.001), ("7", 0.07), ("12.5%", 0.125)]
)
def test_a_sample_is_a_percentage(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "0%", "101%", "", "-1%", "all", "5%%", "1e1", "٥%x"])
def test_what_is_no_percentage_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_share(text)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0", 0),
        ("10MB/s", 10_000_000),
        ("10 MB/s", 10_000_000),
        ("1.5MiB", 1_572_864),
        ("512k", 512_000),
        ("2GiB/s", 2 << 30),
        ("100b/s", 100),
        ("7000", 7000),
    ],
)
def test_a_budget_is_bytes_a_second(text: str, budget: int) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "fast", "-1", "10MB/h", "10TB", "1,5MB", "10 M B"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_budget(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sample", "5%", "--all"],
        ["--continuous", "1MB/s", "--all"],
        ["--continuous", "1MB/s", "--repair"],
        ["--sample", "0%"],
        ["--seed", "-1"],
    ],
)
def test_what_makes_no_sense_is_refused(hvfuse: CommandLine, arguments: list[str]) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("verify", "vm", *arguments) == 2


def test_a_vm_that_is_not_there_or_was_never_copied_is_refused(hvfuse: CommandLine) -> None:
    assert hvfuse("verify", "nosuch") == 5
    hvfuse.add_vm("vm")
    assert hvfuse("verify", "vm", "--all") == 12
    assert hvfuse.err == "hvfuse: vm was not copied yet\n  hint: hvfuse replicate vm\n"


@pytest.fixture
def disk(hvfuse: CommandLine) -> Path:
    disk = hvfuse.add_vm("vm", 8 * MIB)
    assert hvfuse("mount", "vm") == 0
    with open(disk, "r+b") as file:
        file.write(os.urandom(6 * MIB))
    assert hvfuse("replicate", "vm") == 0
    return disk


def flip(hvfuse: CommandLine, offset: int) -> None:
    with open(hvfuse.root / "store" / "replicas" / "vm" / "os.raw", "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 4]))


def test_all_of_it_is_proved_and_the_status_says_so(hvfuse: CommandLine, disk: Path) -> None:
    (before,) = hvfuse.json("status")["vms"]
    assert before["verified"] is None
    found = hvfuse.json("verify", "vm", "--all", "--seed", "7")
    assert list(found) == [
        "vm", "seed", "bytes_total", "bytes_compared", "bytes_unproved", "mismatch_bytes", "rounds", "seconds", "hot",
        "resized", "bytes_per_second", "mismatches", "repaired", "proved_30d",
    ]  # fmt: skip
    assert (found["seed"], found["bytes_total"], found["bytes_compared"]) == (7, 8 * MIB, 8 * MIB)
    assert (found["mismatches"], found["proved_30d"]) == ([], 1.0)
    (vm,) = hvfuse.json("status")["vms"]
    assert list(vm["verified"]) == ["proved_30d", "oldest", "continuous", "last_run", "mismatches"]
    assert (vm["verified"]["proved_30d"], vm["verified"]["last_run"]["seed"]) == (1.0, 7)
    assert hvfuse("status") == 4, "no shipper runs"
    assert "vm: 100 % of blocks proved in the last 30 days\n" in hvfuse.out
    assert hvfuse("status", "vm") == 4
    assert "proved   100 % of blocks proved in the last 30 days\n" in hvfuse.out
    assert hvfuse("verify", "vm", "--all") == 0
    assert re.match(r"vm: 8 MiB compared in \S+ s, seed \d+: no mismatch\n", hvfuse.out)


def test_a_sample_proves_a_part(hvfuse: CommandLine, disk: Path) -> None:
    assert hvfuse("verify", "vm") == 0
    assert "vm: 4 MiB compared" in hvfuse.out
    assert "vm: 50 % of the blocks were proved in the last 30 days\n" in hvfuse.out
    assert hvfuse("verify", "vm") == 0, "what was not proved comes first"
    assert "vm: 100 % of the blocks" in hvfuse.out


def test_what_was_written_since_the_last_point_is_no_mismatch(hvfuse: CommandLine, disk: Path) -> None:
    with open(disk, "r+b") as file:
        file.write(os.urandom(MIB))
    found = hvfuse.json("verify", "vm", "--all")
    assert (found["mismatches"], found["bytes_unproved"], found["rounds"], found["proved_30d"]) == ([], 0, 1, 1.0)
    assert len(hvfuse.json("point", "list", "vm")["points"]) == 2


def test_one_flipped_byte_ends_with_7_is_critical_and_can_be_repaired(hvfuse: CommandLine, disk: Path) -> None:
    flip(hvfuse, 3 * MIB + 5)
    assert hvfuse("verify", "vm", "--all") == 7
    assert "1 mismatch\n" in hvfuse.out
    assert f"vm: differs: os.raw: offset {3 * MIB}, length {BLOCK}, found 20" in hvfuse.out
    assert hvfuse.err.endswith("  hint: hvfuse verify vm --repair\n")
    (vm,) = hvfuse.json("status")["vms"]
    (reason,) = [reason for reason in vm["reasons"] if reason["id"] == "verify-mismatch"]
    assert (reason["health"], reason["next_command"]) == ("Critical", "hvfuse verify vm --repair")
    assert f"os.raw: offset {3 * MIB}, length {BLOCK}" in reason["text"]
    assert hvfuse("status") == 4
    found = hvfuse.json("verify", "vm", "--all", code=7)
    assert [(each["disk"], each["offset"], each["length"]) for each in found["mismatches"]] == [
        ("os.raw", 3 * MIB, BLOCK)
    ]
    assert hvfuse("verify", "vm", "--repair") == 0
    assert "repaired 1 place; recovery points from before may have the fault still\n" in hvfuse.out
    (vm,) = hvfuse.json("status")["vms"]
    assert vm["verified"]["mismatches"] == []
    assert [reason for reason in vm["reasons"] if reason["id"] == "verify-mismatch"] == []
    assert hvfuse("verify", "vm", "--all") == 0


def test_a_repair_lies_over_the_base_image_which_keeps_the_fault_until_it_is_merged(
    hvfuse: CommandLine, disk: Path
) -> None:
    flip(hvfuse, 100)
    assert hvfuse("verify", "vm", "--all", "--repair") == 0
    flip(hvfuse, 100)
    assert hvfuse("verify", "vm", "--all") == 0


def test_while_a_resynchronisation_is_required_it_names_the_next_command(hvfuse: CommandLine, disk: Path) -> None:
    socket = str(hvfuse.root / "state" / "vms" / "vm" / "tracker.sock")
    generation = wire.request(socket, "status")["generation"]
    wire.request(socket, "doubt", generation=generation, reason="a test", disks={})
    assert hvfuse("verify", "vm", "--all") == 12
    assert "  hint: hvfuse resync vm\n" in hvfuse.err


def test_ctrl_c_ends_the_run_and_the_same_command_goes_on_at_once(
    hvfuse: CommandLine, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = hvfuse.ship("vm")
    ask, asked = wire.request, []

    def interrupted(path: str, op: str, **fields: Any) -> wire.Message:
        answer = ask(path, op, **fields)
        asked.append(fields.get("do"))
        if asked == ["begin"]:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(wire, "request", interrupted)
    assert hvfuse("verify", "vm", "--all") == 130
    assert asked == ["begin", "end"]
    assert "vm: stopped; what was proved so far is kept, and the same command goes on with the rest\n" in hvfuse.err
    assert hvfuse("verify", "vm", "--all") == 0
    wire.request(socket, "verify", do="begin", share=1.0, token="another's")
    wire.request(socket, "verify", do="end", token="mine")
    assert hvfuse("verify", "vm", "--all") == 6, "a command ends its own run alone"
    assert hvfuse.err.endswith("hint: wait for the other command to end; if it was killed, try again in 30 s\n")


def test_a_vm_at_rest_is_verified_too(hvfuse: CommandLine, disk: Path) -> None:
    with open(disk, "r+b") as file:
        file.write(b"in the last log")
    assert hvfuse("umount", "vm") == 0
    found = hvfuse.json("verify", "vm", "--all")
    assert (found["mismatches"], found["bytes_unproved"], found["proved_30d"]) == ([], 0, 1.0)


def test_the_budget_of_idle_time_is_kept(hvfuse: CommandLine, disk: Path) -> None:
    assert hvfuse("verify", "vm", "--continuous", "10MB/s") == 0
    assert hvfuse.out == "vm: verified in idle time from now on, at most 9.5 MiB/s\n"
    assert hvfuse("verify", "vm", "--all") == 0
    (vm,) = hvfuse.json("status")["vms"]
    assert vm["verified"]["continuous"] == 10_000_000
    assert hvfuse.json("verify", "vm", "--continuous", "0") == {"vm": "vm", "continuous": 0}


def test_damaged_proofs_are_told_by_name_and_replication_goes_on(hvfuse: CommandLine, disk: Path) -> None:
    assert hvfuse("verify", "vm", "--all") == 0
    path = hvfuse.root / "state" / "vms" / "vm" / "proofs"
    path.write_bytes(path.read_bytes()[:-1])
    (vm,) = hvfuse.json("status")["vms"]
    (reason,) = [reason for reason in vm["reasons"] if reason["id"] == "proofs-damaged"]
    assert str(path) in reason["text"]
    assert hvfuse("replicate", "vm") == 0
    assert hvfuse("verify", "vm", "--all") == 0
    (vm,) = hvfuse.json("status")["vms"]
    assert vm["verified"]["proved_30d"] == 1.0
