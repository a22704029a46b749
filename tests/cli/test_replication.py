"""`hvfuse replication`: what may be ordered in which state, what is kept of it, and that no kill leaves half of it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest

from hvfuse import system, wire
from hvfuse.cli.main import Session, main
from hvfuse.control import database
from hvfuse.control.job import JobKind, JobState
from hvfuse.control.records import Records, VmRecord
from hvfuse.errors import StateError
from hvfuse.shipper.orders import Orders
from hvfuse.states import Event, ReplicationState
from hvfuse.target import removal, schema
from hvfuse.target.check import check
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.cli.conftest import CommandLine
from tests.target.model import Source
from tests.target.test_removal import leavings

from ..state_paths import leading_to

S = ReplicationState
BEFORE = {S.READY_FOR_INITIAL_REPLICATION, S.INITIAL_REPLICATION_IN_PROGRESS, S.WAITING_FOR_INITIAL_REPLICATION}
RESYNC = {S.WAITING_FOR_START_RESYNCHRONIZE, S.RESYNCHRONIZING, S.RESYNCHRONIZE_SUSPENDED}
ALLOWED = {
    "enable": {S.DISABLED},
    "disable": set(S),
    "suspend": BEFORE | RESYNC | {S.REPLICATING, S.SUSPENDED, S.ERROR},
    "resume": {S.SUSPENDED, S.RESYNCHRONIZE_SUSPENDED, S.ERROR},
    "start": BEFORE | RESYNC | {S.SUSPENDED},
}


def records_of(hvfuse: CommandLine) -> Records:
    return Records(str(hvfuse.root / "state" / "records"))


def record(hvfuse: CommandLine, vm: str = "vm") -> VmRecord:
    with records_of(hvfuse) as records:
        return records.read(vm)


def no_job_is_open(hvfuse: CommandLine, kind: JobKind) -> bool:
    """The last job of that kind has succeeded, and none passes for being worked at."""
    with records_of(hvfuse) as records:
        jobs = records.jobs.all()
    last = [job.state for job in jobs if job.kind is kind][-1:]
    return last == [JobState.SUCCEEDED] and all(job.state is not JobState.IN_PROGRESS for job in jobs)


def replicated(hvfuse: CommandLine, vm: str = "vm") -> Source:
    source = Source(vm, {"os.raw": 50_000})
    source.write("os.raw", 0, source.random.randbytes(20_000))
    with Store(str(hvfuse.root / "store")) as store:
        replica = LocalReplica(store, vm)
        source.copy_to(replica)
        source.ship_to(replica)
        replica.close()
    return source


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize("command", ALLOWED)
def test_a_command_is_carried_out_or_refused_with_what_is_allowed(
    hvfuse: CommandLine, command: str, state: ReplicationState
) -> None:
    hvfuse.add_vm("vm")
    with records_of(hvfuse) as records:
        records.apply("vm", *leading_to(state))
    code = hvfuse("replication", command, "vm")
    after = record(hvfuse)
    if state in ALLOWED[command]:
        assert code == 0, hvfuse.err
        return
    assert code == 13, (hvfuse.out, hvfuse.err)
    assert "allowed: " in hvfuse.err
    assert after.state is state and Orders.from_json(after.orders) == Orders()


def test_what_each_command_leaves_where_nothing_runs(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    answer = hvfuse.json("replication", "enable", "vm")
    assert (answer["enabled"], answer["next_command"], answer["point"]) == (True, "hvfuse run", None)
    assert {each["outcome"] for each in answer["checks"]} == {"passed"}
    assert (record(hvfuse).state, record(hvfuse).enabled) == (S.READY_FOR_INITIAL_REPLICATION, True)
    assert no_job_is_open(hvfuse, JobKind.ENABLE)

    assert hvfuse.json("replication", "suspend", "vm") == {"vm": "vm", "side": "source", "state": "Suspended"}
    assert Orders.from_json(record(hvfuse).orders) == Orders(paused=True)
    assert hvfuse("replication", "start", "vm") == 13
    assert "allowed: resume" in hvfuse.err
    assert hvfuse.json("replication", "resume", "vm")["state"] == "ReadyForInitialReplication"
    assert Orders.from_json(record(hvfuse).orders) == Orders()

    assert hvfuse.json("replication", "start", "vm", "--at", "18:30")["due"] is not None
    assert record(hvfuse).orders["at_ns"] is not None
    assert hvfuse("replication", "start", "vm") == 0
    assert Orders.from_json(record(hvfuse).orders) == Orders(now=True)

    assert hvfuse.json("replication", "disable", "vm") == {"vm": "vm", "state": "Disabled", "deleted": None}
    assert (record(hvfuse).state, record(hvfuse).enabled) == (S.DISABLED, False)
    assert no_job_is_open(hvfuse, JobKind.DISABLE)
    assert hvfuse("replication", "disable", "vm") == 13
    assert "allowed: enable" in hvfuse.err


def test_a_disabled_vm_is_brought_back_by_enabling_alone(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("replication", "disable", "vm") == 0
    with records_of(hvfuse) as records:
        for event in Event:
            if event not in (Event.ENABLE, Event.TAKE_OVER):
                with pytest.raises(StateError):
                    records.apply("vm", event)
    assert hvfuse("replication", "enable", "vm") == 0


def test_a_replica_that_was_kept_is_compared_at_once_and_a_first_copy_begins_when_the_policy_says(
    hvfuse: CommandLine,
) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("replication", "enable", "vm") == 0
    assert Orders.from_json(record(hvfuse).orders) == Orders()
    assert hvfuse("replication", "disable", "vm") == 0
    replicated(hvfuse)
    assert hvfuse("replication", "enable", "vm") == 0
    assert Orders.from_json(record(hvfuse).orders) == Orders(now=True)


def test_a_refusal_lists_the_checks_in_json_and_protects_nothing(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    os.link(hvfuse.root / "disks" / "vm" / "os.raw", hvfuse.root / "other")
    for command in ("enable", "check"):
        answer = hvfuse.json("replication", command, "vm", code=8)
        assert answer["error"]["type"] == "UnsupportedError"
        assert [each["name"] for each in answer["checks"] if each["outcome"] == "failed"] == ["other ways in"]
    (hvfuse.root / "disks" / "vm" / "bad.vhd").write_bytes(b"conectix" * 64)
    assert hvfuse("replication", "enable", "vm") == 10
    assert "2 of 11 prerequisites are missing" in hvfuse.err
    assert record(hvfuse).state is S.DISABLED and record(hvfuse).enabled is None
    with records_of(hvfuse) as records:
        job = records.jobs.all()[-1]
    assert job.state is JobState.FAILED
    assert {step.name for step in job.steps if step.state is JobState.FAILED} == {
        "disk structures",
        "other ways in",
        "make the relationship",
    }


def test_only_what_is_named_and_agreed_to_is_deleted(hvfuse: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    hvfuse.add_vm("vm")
    hvfuse.add_vm("other")
    replicated(hvfuse)
    replicated(hvfuse, "other")
    assert hvfuse("replication", "disable", "vm", "--delete-replica") == 2
    assert "this deletes the replica of vm: 1 recovery point, " in hvfuse.err
    assert "hvfuse replication disable vm --delete-replica --yes" in hvfuse.err
    assert record(hvfuse).enabled is None
    assert hvfuse("replication", "disable", "vm") == 0
    assert "the replica stays: 1 recovery point" in hvfuse.out
    assert hvfuse.json("replication", "disable", "vm", "--delete-replica", "--yes")["deleted"]["points"] == 1
    with Store(str(hvfuse.root / "store")) as store:
        assert [vm.name for vm in store.vms()] == ["other"]
        assert len(store.points("other")) == 1 and check(store).findings == ()
        assert leavings(store, 1) == []


def test_a_test_failover_keeps_the_replica_and_the_protection(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    source = replicated(hvfuse)
    with Store(str(hvfuse.root / "store")) as store:
        pin = store.pin("vm", next(iter(source.history)), {"kind": "test-failover", "mountpoint": "/nowhere"})
    assert hvfuse("replication", "disable", "vm", "--delete-replica", "--yes") == 6
    assert "hvfuse failover cleanup vm" in hvfuse.err
    assert record(hvfuse).enabled is None
    with Store(str(hvfuse.root / "store")) as store:
        store.unpin(pin)
    assert hvfuse("replication", "disable", "vm", "--delete-replica", "--yes") == 0


def test_the_replica_is_suspended_and_resumed_at_the_target(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("replication", "suspend", "vm", "--replica") == 5
    replicated(hvfuse)
    answer = hvfuse.json("replication", "suspend", "vm", "--replica")
    assert answer == {"vm": "vm", "side": "replica", "state": "Suspended"}
    assert hvfuse.json("store", "info")["vms"][0]["state"] == "Suspended"
    assert hvfuse("store", "info") == 0 and "Suspended" in hvfuse.out
    assert hvfuse("point", "list", "vm") == 0
    assert hvfuse.json("replication", "resume", "vm", "--replica")["state"] == "Replicating"
    assert hvfuse("replication", "resume", "vm", "--replica") == 13


def test_a_vm_that_does_not_exist(hvfuse: CommandLine) -> None:
    for command in ("enable", "check", "start", "suspend", "resume", "disable"):
        assert hvfuse("replication", command, "nosuch") == 5, command
        assert hvfuse("replication", command, ".x") == 2, command


# Killed -------------------------------------------------------------------------------------------------------


def killed_at(hvfuse: CommandLine, step: int, *arguments: str) -> bool:
    """Run a command in a process that is killed before or after the transaction of the records, or at the labelled
    call, with that number. Returns whether it came to the end instead."""
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def pass_by(*_: object) -> None:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        real = database.Database.write

        def write(self: database.Database, act: object) -> object:
            pass_by()
            result = real(self, act)
            pass_by()
            return result

        database.Database.write = write
        system.install(pass_by)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main(["--home", str(hvfuse.root), *arguments])
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def overwrite(disk: Path, data: bytes) -> None:
    with open(disk, "r+b", buffering=0) as file:
        file.write(data)


def restored(pristine: Path, root: Path) -> None:
    shutil.rmtree(root)
    shutil.copytree(pristine, root)


def test_enable_is_killed_at_every_step_and_the_same_command_ends_well(hvfuse: CommandLine, tmp_path: Path) -> None:
    hvfuse.add_vm("vm")
    with Store(str(hvfuse.root / "store")), records_of(hvfuse):
        pass
    pristine = tmp_path / "pristine"
    shutil.copytree(hvfuse.root, pristine)
    for step in itertools.count(1):
        restored(pristine, hvfuse.root)
        ended = killed_at(hvfuse, step, "replication", "enable", "vm")
        if not ended and not no_job_is_open(hvfuse, JobKind.ENABLE):
            assert hvfuse("replication", "enable", "vm") == 0, (step, hvfuse.err)
        assert (record(hvfuse).state, record(hvfuse).enabled) == (S.READY_FOR_INITIAL_REPLICATION, True), step
        assert no_job_is_open(hvfuse, JobKind.ENABLE), step
        if ended:
            break
    assert step > 25


@pytest.mark.mount
def test_disable_is_killed_at_every_step_and_the_same_command_ends_well(
    hvfuse: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    overwrite(disk, b"first" * 1000)
    assert hvfuse("replicate", "vm") == 0
    overwrite(disk, b"second" * 1000)
    assert hvfuse("umount", "vm") == 0
    pristine = tmp_path / "pristine"
    shutil.copytree(hvfuse.root, pristine)
    logs = [name for name in os.listdir(pristine / "disks" / "vm") if ".hr" in name]
    assert logs
    monkeypatch.setattr(removal, "BATCH", 2)
    command = ("replication", "disable", "vm", "--delete-replica", "--yes")
    for step in itertools.count(1):
        restored(pristine, hvfuse.root)
        ended = killed_at(hvfuse, step, *command)
        if not ended and not no_job_is_open(hvfuse, JobKind.DISABLE):
            assert hvfuse(*command) == 0, (step, hvfuse.err)
        after = record(hvfuse)
        assert (after.state, after.enabled, after.point) == (S.DISABLED, False, None), step
        assert no_job_is_open(hvfuse, JobKind.DISABLE), step
        assert not [name for name in os.listdir(hvfuse.root / "disks" / "vm") if name.endswith((".hrl", ".hrc"))]
        with Store(str(hvfuse.root / "store")) as store:
            assert store.vms() == [] and leavings(store, 1) == []
            with store.env.read() as txn:
                assert txn.stat(store.env.db(schema.FRAMES))["entries"] == 0
        if ended:
            break
    assert step > 40


def test_what_is_failing_is_tried_at_once_when_the_replica_is_resumed(hvfuse: CommandLine) -> None:
    """The shipper that runs here is woken over its socket."""
    hvfuse.add_vm("vm")
    replicated(hvfuse)
    assert hvfuse("replication", "suspend", "vm", "--replica") == 0
    home = Session(str(hvfuse.root)).home
    home.make_vm("vm")
    asked: list[object] = []
    listener = wire.Listener(home.shipper_socket("vm"), lambda message: asked.append(message["op"]) or {}, name="test")
    try:
        assert hvfuse("replication", "resume", "vm", "--replica") == 0
    finally:
        listener.close()
    assert asked == ["wake"]


@pytest.mark.mount
def test_what_is_left_to_an_administrator_is_not_replicated_by_asking_for_a_point(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    (hvfuse.root / "hvfuse.toml").write_text('[vm.vm]\nprotect = "manual"\n')
    assert hvfuse("mount", "vm") == 0
    assert hvfuse("replicate", "vm") == 13
    assert hvfuse.err.endswith("allowed: enable\n  hint: hvfuse replication enable vm\n")
    assert record(hvfuse).state is S.DISABLED
    assert hvfuse.json("replication", "enable", "vm")["next_command"] == "hvfuse replicate vm"
    assert hvfuse("replicate", "vm") == 0
    assert no_job_is_open(hvfuse, JobKind.FINALIZE)
    assert record(hvfuse).protected_since_ns is not None


@pytest.mark.parametrize(
    ("events", "point", "state"),
    [
        ((Event.COMMIT_POINT,), "p-1", "Replicating"),
        ((), None, "ReadyForInitialReplication"),
        ((Event.COMMIT_POINT, Event.NEED_RESYNC), "p-1", "WaitingForStartResynchronize"),
    ],
)
def test_resuming_says_what_the_shipper_will_show_and_not_what_it_shows_still(
    hvfuse: CommandLine, events: tuple[Event, ...], point: str | None, state: str
) -> None:
    hvfuse.add_vm("vm")
    with records_of(hvfuse) as records:
        records.apply("vm", Event.ENABLE, *events, Event.SUSPEND, point=point, orders=Orders(paused=True))
    home = Session(str(hvfuse.root)).home
    home.make_vm("vm")
    listener = wire.Listener(home.shipper_socket("vm"), lambda message: {"orders": {}}, name="test")
    try:
        assert hvfuse.json("replication", "resume", "vm")["state"] == state
    finally:
        listener.close()


def test_what_fails_and_will_be_tried_again_some_time_is_tried_at_once_when_it_is_resumed(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    with records_of(hvfuse) as records:
        records.apply("vm", Event.ENABLE, Event.COMMIT_POINT, point="p-1")
    assert hvfuse("replication", "resume", "vm") == 13
    with records_of(hvfuse) as records:
        records.update("vm", error="the disk is full", hint="make room")
    home = Session(str(hvfuse.root)).home
    home.make_vm("vm")
    asked: list[object] = []
    listener = wire.Listener(
        home.shipper_socket("vm"), lambda message: asked.append(message["op"]) or {"orders": {}}, name="test"
    )
    try:
        assert hvfuse.json("replication", "resume", "vm")["state"] == "Replicating"
    finally:
        listener.close()
    assert asked == ["unpause"]
