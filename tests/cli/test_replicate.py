"""`hvfuse replicate`, `status` and `failover` on a VM that is mounted without `hvfuse run`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hvfuse import system
from hvfuse.control.daemon import wait_for_end
from tests.cli.conftest import CommandLine

pytestmark = pytest.mark.mount


@pytest.fixture
def disk(hvfuse: CommandLine) -> Path:
    disk = hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    return disk


def write(disk: Path, text: bytes, offset: int = 0) -> None:
    with open(disk, "r+b") as file:
        file.seek(offset)
        file.write(text)


def read(disk: Path, length: int) -> bytes:
    with open(disk, "rb") as file:
        return file.read(length)


def test_a_cycle_tells_what_it_took_in_exactly_these_fields(hvfuse: CommandLine, disk: Path) -> None:
    first = hvfuse.json("replicate", "vm")
    write(disk, b"x" * 4096)
    write(disk, b"y" * 4096)
    second = hvfuse.json("replicate", "vm")
    assert list(second) == [
        "vm", "point", "cycle", "bytes_logged", "bytes_coalesced", "bytes_sent", "seconds",
        "consistency", "frozen_seconds", "freeze_error",
    ]  # fmt: skip
    assert (second["vm"], second["cycle"]) == ("vm", first["cycle"] + 1)
    assert (second["bytes_logged"], second["bytes_coalesced"]) == (8192, 4096)
    assert hvfuse("replicate", "vm") == 0
    assert hvfuse.out.startswith("vm: recovery point ")


def test_the_status_of_a_replicated_vm_has_exactly_these_fields(hvfuse: CommandLine, disk: Path) -> None:
    report = hvfuse.json("replicate", "vm")
    (vm,) = hvfuse.json("status")["vms"]
    assert list(vm) == [
        "name", "role", "state", "health", "allowed", "last_cycle", "last_replication_time", "rpo_seconds",
        "pending_bytes", "doubtful_bytes", "points", "latest_point", "replica_state", "tests", "frequency",
        "monitoring", "forecast", "copy", "copy_due", "orders", "verified", "disks", "excluded", "reasons",
    ]  # fmt: skip
    keys = ["id", "health", "text", "next_command", "allowed", "evidence"]
    assert [list(reason) for reason in vm["reasons"]] == [keys]
    assert vm["allowed"] == [
        "hvfuse replication suspend vm", "hvfuse failover planned vm", "hvfuse replication disable vm",
    ]  # fmt: skip
    assert (vm["reasons"][0]["id"], vm["reasons"][0]["next_command"]) == ("shipper-down", "hvfuse run")
    assert (vm["name"], vm["state"], vm["last_cycle"], vm["points"]) == ("vm", "Replicating", report["cycle"], 1)
    assert 0 <= vm["rpo_seconds"] < 60
    assert vm["pending_bytes"] == 0
    (found,) = vm["disks"]
    assert list(found) == ["name", "format", "size", "log_bytes"]
    assert (found["name"], found["format"], found["size"]) == ("os.raw", "raw", 1 << 20)
    write(disk, b"x" * 5000)
    (vm,) = hvfuse.json("status", "vm")["vms"]
    assert 5000 <= vm["pending_bytes"] < 20000
    assert hvfuse("status", "vm") == 4
    assert "no shipper runs" in hvfuse.out
    assert "next: hvfuse run" in hvfuse.out
    assert hvfuse("status", "other") == 5


def test_what_is_not_mounted_cannot_be_replicated(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("replicate", "vm") == 11
    assert hvfuse.err == "hvfuse: vm is not mounted, so nothing tracks its writes\n  hint: hvfuse mount vm\n"
    (vm,) = hvfuse.json("status")["vms"]
    assert (vm["state"], vm["health"], vm["rpo_seconds"], vm["last_replication_time"]) == (
        "Disabled", "NotApplicable", None, None,
    )  # fmt: skip


def test_two_do_not_replicate_the_same_vm_at_once(hvfuse: CommandLine, disk: Path) -> None:
    with system.exclusive_lock(str(hvfuse.root / "state" / "vms" / "vm" / "shipper.lock")) as had:
        assert had
        assert hvfuse("replicate", "vm") == 6
        assert "another process is replicating it" in hvfuse.err


def test_a_test_failover_shows_its_point_and_takes_writes_of_its_own(
    hvfuse: CommandLine, disk: Path, tmp_path: Path
) -> None:
    write(disk, b"first")
    older = hvfuse.json("replicate", "vm")["point"]
    write(disk, b"after")
    newer = hvfuse.json("replicate", "vm")["point"]
    one = hvfuse.json("failover", "test", "vm", "--mount", str(tmp_path / "one"))
    two = hvfuse.json("failover", "test", "vm", "--mount", str(tmp_path / "two"), "--point", older)
    assert (one["point"], two["point"]) == (newer, older)
    assert read(tmp_path / "one" / "os.raw", 5) == b"after"
    assert read(tmp_path / "two" / "os.raw", 5) == b"first"
    write(tmp_path / "one" / "os.raw", b"trial")
    assert read(tmp_path / "one" / "os.raw", 5) == b"trial"
    assert read(disk, 5) == b"after"
    tests = hvfuse.json("failover", "list")["tests"]
    assert [(test["id"], test["alive"]) for test in tests] == [(one["id"], True), (two["id"], True)]
    assert hvfuse.json("failover", "cleanup", "vm", str(one["id"]))["cleaned"][0]["point"] == newer
    assert hvfuse("failover", "cleanup", "vm", str(one["id"])) == 5
    assert hvfuse("failover", "cleanup", "vm") == 0
    assert hvfuse("failover", "cleanup", "vm") == 0
    assert hvfuse.out == "there was no test failover to clean up\n"
    assert hvfuse.json("failover", "list")["tests"] == []
    assert not os.path.ismount(tmp_path / "one")
    for left in ("store/overlays", "state/views"):
        assert os.listdir(hvfuse.root / left) == []


def test_a_test_failover_whose_process_died_can_be_cleaned_up(hvfuse: CommandLine, disk: Path, tmp_path: Path) -> None:
    hvfuse.json("replicate", "vm")
    pid = hvfuse.json("failover", "test", "vm", "--mount", str(tmp_path / "t"))["pid"]
    os.kill(pid, signal.SIGKILL)
    assert wait_for_end(pid, 20)
    assert [test["alive"] for test in hvfuse.json("failover", "list")["tests"]] == [False]
    assert hvfuse("failover", "cleanup", "--all") == 0
    assert os.listdir(tmp_path / "t") == []
    assert hvfuse.json("failover", "list")["tests"] == []


def test_a_test_failover_in_use_is_kept_unless_forced(hvfuse: CommandLine, disk: Path, tmp_path: Path) -> None:
    hvfuse.json("replicate", "vm")
    hvfuse.json("failover", "test", "vm", "--mount", str(tmp_path / "t"))
    used = os.open(tmp_path / "t" / "os.raw", os.O_RDONLY)
    assert hvfuse("failover", "cleanup", "vm") == 6
    assert f"(pid {os.getpid()})" in hvfuse.err
    assert hvfuse("failover", "cleanup", "vm", "--force") == 0
    with pytest.raises(OSError, match="not connected"):
        os.close(used)
    assert not os.path.ismount(tmp_path / "t")


def test_a_test_failover_that_cannot_be_mounted_leaves_nothing(hvfuse: CommandLine, disk: Path, tmp_path: Path) -> None:
    hvfuse.json("replicate", "vm")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert hvfuse("failover", "test", "vm", "--mount", str(tmp_path / "full")) == 6
    assert hvfuse("failover", "test", "vm", "--mount", str(tmp_path / "t"), "--point", "nonsense") == 5
    assert hvfuse("failover", "test", "vm", "--mount", str(tmp_path / "t"), "--point", "2001-01-01") == 5
    assert "no recovery point before" in hvfuse.err
    assert hvfuse("failover", "test", "other", "--mount", str(tmp_path / "t")) == 5
    assert hvfuse("failover", "cleanup") == 2
    assert hvfuse.json("failover", "list")["tests"] == []


def test_a_test_failover_is_not_to_be_mounted_over_what_is_in_use(hvfuse: CommandLine, disk: Path) -> None:
    assert hvfuse("replicate", "vm") == 0
    assert hvfuse("failover", "test", "vm", "--mount", str(disk.parent)) == 6
    assert hvfuse.err.splitlines()[1] == "  hint: choose another directory"
    assert hvfuse("failover", "list") == 0
    assert hvfuse.out == "There is no test failover.\n"
    assert hvfuse("failover", "list", "nosuch") == 5


def test_cleaning_up_after_a_vm_that_does_not_exist_is_refused(hvfuse: CommandLine, disk: Path) -> None:
    assert hvfuse("replicate", "vm") == 0
    assert hvfuse("failover", "cleanup", "vm") == 0
    assert hvfuse("failover", "cleanup", "nosuch") == 5
    assert "nosuch" in hvfuse.err


def test_the_store_is_told_in_words_that_agree_with_their_numbers(hvfuse: CommandLine, disk: Path) -> None:
    assert hvfuse("replicate", "vm") == 0
    assert hvfuse("store", "check") == 0
    assert hvfuse.out.startswith("1 VM, 1 recovery point, ")
