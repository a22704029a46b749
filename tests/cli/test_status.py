"""How statuses are shown."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import lmdb
import pytest

from hvfuse.cli.main import Session
from hvfuse.cli.status import statuses
from hvfuse.control import facts
from hvfuse.control.records import Records
from hvfuse.states import Event, ReplicationState
from tests.cli.conftest import CommandLine


def test_names_and_states_are_whole_however_many_columns_a_pipe_has(
    hvfuse: CommandLine,
) -> None:
    names = [letter * 120 for letter in "ab"]
    for name in names:
        hvfuse.add_vm(name)
    assert hvfuse("status") == 0
    lines = hvfuse.out.splitlines()
    assert [line.split()[:3] for line in lines[1:-1]] == [[name, "Disabled", "-"] for name in names]
    assert lines[-1] == f"nothing is replicated; next: hvfuse replication enable {names[0]}"


def test_a_name_that_looks_like_markup_is_shown_as_it_is(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("[red]x")
    assert hvfuse("status") == 0
    assert hvfuse.out.splitlines()[1].startswith("[red]x  Disabled")


def test_json_is_ascii_even_for_a_disk_whose_name_is_not_text(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    folder = os.fsencode(hvfuse.root / "disks" / "vm")
    os.rename(folder + b"/os.raw", folder + b"/\xff.raw")
    (vm,) = hvfuse.json("status")["vms"]
    assert hvfuse.out.isascii()
    assert [os.fsencode(disk["name"]) for disk in vm["disks"]] == [b"\xff.raw"]


def test_json_that_never_ends_is_refused(hvfuse: CommandLine) -> None:
    assert hvfuse("status", "--watch", "--json") == 2


def test_the_damaged_record_of_one_vm_is_shown_as_such_and_the_others_as_ever(hvfuse: CommandLine) -> None:
    records = hvfuse.root / "state" / "records"
    for name in ("bad", "good"):
        hvfuse.add_vm(name)
        with Records(str(records)) as kept:
            kept.apply(name, Event.ENABLE)
    with lmdb.open(str(records), map_size=1 << 20) as env, env.begin(write=True) as txn:
        txn.put(b"vm/bad", b'{"state": "Dancing"}')
    bad, good = hvfuse.json("status")["vms"]
    assert (bad["state"], bad["health"], bad["allowed"]) == ("Error", "Critical", [])
    assert [reason["id"] for reason in bad["reasons"]] == ["record-damaged"]
    assert bad["reasons"][0]["next_command"] is not None
    assert good["state"] == "ReadyForInitialReplication"
    assert [row["name"] for row in hvfuse.json("measure")["vms"]] == ["good"]
    assert "bad: unknown state 'Dancing'" in hvfuse.err
    assert hvfuse("measure", "bad") == 7


def test_a_folder_that_cannot_be_read_is_a_reason_of_its_vm_and_keeps_nobody_from_the_others(
    hvfuse: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bad", "good"):
        hvfuse.add_vm(name)
    listdir = os.listdir

    def failing(path: str) -> list[str]:
        if str(path).endswith("/bad"):
            raise OSError(errno.EIO, "Input/output error", path)
        return listdir(path)

    with Records(str(hvfuse.root / "state" / "records")) as kept:
        kept.apply("bad", Event.ENABLE)
    monkeypatch.setattr(facts.os, "listdir", failing)
    bad, good = hvfuse.json("status")["vms"]
    assert "folder-damaged" in [reason["id"] for reason in bad["reasons"]]
    assert (good["name"], good["reasons"]) == ("good", [])


def test_of_a_vm_that_is_not_replicated_nothing_says_that_it_is_well(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    assert [vm["health"] for vm in hvfuse.json("status")["vms"]] == ["NotApplicable"]
    assert [vm["health"] for vm in hvfuse.json("measure")["vms"]] == ["NotApplicable"]


def test_what_is_watched_shows_records_that_came_only_then(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    with statuses(Session(str(hvfuse.root))) as ask:
        assert [one.state for one in ask()] == [ReplicationState.DISABLED]
        code = (
            "import sys; from hvfuse.control.records import Records; from hvfuse.states import Event\n"
            "with Records(sys.argv[1]) as records: records.apply('vm', Event.ENABLE)"
        )
        subprocess.run([sys.executable, "-c", code, str(hvfuse.root / "state" / "records")], check=True)
        assert [one.state for one in ask()] == [ReplicationState.READY_FOR_INITIAL_REPLICATION]


def test_a_fault_in_the_configuration_does_not_hide_how_things_are(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    Session(str(hvfuse.root)).config_file.keep()
    (hvfuse.root / "hvfuse.toml").write_text("[replication]\nfrequencyy = 3\n")
    (vm,) = hvfuse.json("status")["vms"]
    (reason,) = vm["reasons"]
    assert reason["id"] == "config-fault"
    assert "hvfuse.toml:2: [replication] frequencyy" in reason["text"]
    assert hvfuse("event", "list") == hvfuse("job", "list") == 0
    assert hvfuse("replicate", "vm") == 2


@pytest.mark.parametrize("command", ["event", "job"])
def test_a_misspelt_vm_is_told_and_does_not_pass_for_one_without_news(hvfuse: CommandLine, command: str) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse(command, "list", "vm") == 0
    assert hvfuse(command, "list", "wm") == 5
    assert hvfuse.err.endswith("  hint: hvfuse status\n")


def test_a_store_that_is_moved_away_is_missed_by_whoever_has_it_open_too(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == hvfuse("replicate", "vm") == 0
    store = hvfuse.root / "store"
    session = Session(str(hvfuse.root))
    with statuses(session) as ask:
        assert ask()[0].points == 1
        os.rename(store, hvfuse.root / "away")
        (vm,) = ask()
        assert (vm.points, vm.rpo_seconds) == (None, None)
        assert "store-unreachable" in [reason.id for reason in vm.reasons]
        os.rename(hvfuse.root / "away", store)
        assert ask()[0].points == 1
