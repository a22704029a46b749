"""`hvfuse resync` where nothing runs: what may be typed, and what is kept of it."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from hvfuse.control.records import Records
from hvfuse.shipper.orders import Orders
from hvfuse.states import ReplicationState
from tests.cli.conftest import CommandLine

from ..state_paths import leading_to


def orders(hvfuse: CommandLine) -> Orders:
    with Records(str(hvfuse.root / "state" / "records")) as records:
        return records.orders("vm")


def recorded(hvfuse: CommandLine, **fields: object) -> None:
    state = ReplicationState(fields.pop("state", ReplicationState.DISABLED))
    with Records(str(hvfuse.root / "state" / "records")) as records:
        records.apply("vm", *leading_to(state, records.read("vm").state), **fields)


def a_copy(kind: str, *, bytes_total: int = 4096) -> dict[str, object]:
    return {
        "kind": kind, "generation": "ab" * 16, "pass": 1, "bytes_total": bytes_total, "bytes_done": 1024,
        "bytes_sent": 512, "bytes_saved": 512, "seconds": 1.0, "bytes_per_second": 1024.0, "seconds_left": 3.0,
    }  # fmt: skip


def from_now(**span: float) -> str:
    return f"{datetime.now(UTC) + timedelta(**span):%Y-%m-%dT%H:%M:%SZ}"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--now", "--at", "18:30"], "--now and --at do not go together"),
        (["--suspend", "--resume"], "--suspend and --resume do not go together"),
        (["--cancel", "--now"], "--now and --cancel do not go together"),
        (["--full", "--suspend"], "--full does not go together with --suspend"),
        (["--at", "18:30", "--wait"], "--wait does not go together with --at"),
        (["--cancel", "--wait"], "--wait does not go together with --cancel"),
        (["--at", ""], "--at needs a time"),
        (["--at", "25:00"], "'25:00' is not a time"),
        (["--at", "2001-01-01 18:30"], "'2001-01-01 18:30' lies in the past"),
        (["--at", from_now(days=7.1)], "lies more than 7 days ahead"),
        (["--at", from_now(minutes=-2)], "lies in the past"),
        (["--later"], "No such option"),
    ],
)
def test_what_makes_no_sense_is_refused_and_orders_nothing(hvfuse: CommandLine, arguments: list[str], why: str) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("resync", "vm", *arguments) == 2
    assert why in hvfuse.err
    assert orders(hvfuse) == Orders()


def test_a_vm_that_does_not_exist_gets_no_orders(hvfuse: CommandLine) -> None:
    for arguments in ([], ["--now"], ["--suspend"], ["--cancel"], ["--at", "18:30"]):
        assert hvfuse("resync", "nosuch", *arguments) == 5


def test_a_time_is_kept_for_the_shipper_to_come(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    text = from_now(hours=30)
    answer = hvfuse.json("resync", "vm", "--at", text, "--full")
    at_ns = round(datetime.fromisoformat(text).timestamp()) * 10**9
    assert orders(hvfuse) == Orders(at_ns=at_ns, full=True)
    due = text.replace("Z", ".000Z")
    assert answer == {
        "vm": "vm", "action": "start", "shipper": False, "due": due,
        "orders": {
            "at": due, "now": False, "full": True, "suspended": False, "cancelled": False, "seed": None,
            "repair": False,
            "paused": False,
        },
    }  # fmt: skip
    assert hvfuse("resync", "vm", "--at", "18:30") == 0
    assert "vm: a resynchronisation was ordered: at " in hvfuse.out
    assert hvfuse.out.endswith("vm: no shipper runs: nothing begins before `hvfuse run`\n")
    ahead = (orders(hvfuse).at_ns or 0) - time.time_ns()
    assert 0 < ahead <= 86400 * 10**9


def test_what_cannot_begin_now_says_so_and_stays_ordered(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("resync", "vm", "--now") == 11
    assert hvfuse.err == (
        "hvfuse: vm is not mounted, so nothing can be compared; it begins once it is mounted\n  hint: hvfuse run\n"
    )
    assert orders(hvfuse) == Orders(now=True)
    assert hvfuse("resync", "vm", "--no-wait", "--full") == 0
    assert orders(hvfuse) == Orders(now=True, full=True)


def test_copies_are_suspended_and_resumed_before_any_shipper_runs(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("resync", "vm", "--resume") == 0
    assert hvfuse.out == "vm: copies are not suspended\n"
    assert hvfuse("resync", "vm", "--suspend") == 0
    assert hvfuse.out == "vm: copies are suspended; to go on: hvfuse resync vm --resume\n"
    assert orders(hvfuse) == Orders(suspended=True)
    assert hvfuse.json("resync", "vm", "--suspend")["orders"]["suspended"]
    assert hvfuse("resync", "vm", "--no-wait") == 1
    assert hvfuse.err == (
        "hvfuse: vm: copies are suspended\n  hint: hvfuse resync vm --resume; or to begin all the same: --now\n"
    )
    assert hvfuse("resync", "vm", "--resume") == 0
    assert orders(hvfuse) == Orders()


def test_begin_all_the_same_takes_back_what_stood_against_it(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    recorded(hvfuse, orders=Orders(suspended=True, seed="ab" * 16))
    assert hvfuse("resync", "vm", "--now", "--no-wait") == 0
    assert "vm: it is not suspended any more\n" in hvfuse.err
    assert "vm: the seed that was exported is not waited for any more\n" in hvfuse.err
    assert orders(hvfuse) == Orders(now=True)


@pytest.mark.parametrize(
    "fields",
    [{"orders": Orders(seed="ab" * 16)}, {"state": ReplicationState.WAITING_FOR_INITIAL_REPLICATION}],
    ids=["exported", "by policy"],
)
def test_a_seed_that_is_on_its_way_is_not_given_up_by_mistake(hvfuse: CommandLine, fields: dict[str, object]) -> None:
    hvfuse.add_vm("vm")
    recorded(hvfuse, **fields)
    before = orders(hvfuse)
    assert hvfuse("resync", "vm") == 1
    assert "waits for a seed" in hvfuse.err
    assert "hint: hvfuse seed import DIR; or, to copy over the network instead: hvfuse resync vm --now" in hvfuse.err
    assert orders(hvfuse) == before


def test_a_seed_that_the_configuration_wants_is_not_given_up_by_mistake(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    (hvfuse.root / "hvfuse.toml").write_text('[vm.vm]\ninitial = "seed"\n')
    assert hvfuse("resync", "vm", "--no-wait") == 1
    assert orders(hvfuse) == Orders()
    assert hvfuse("resync", "vm", "--no-wait", "--now") == 0
    assert orders(hvfuse) == Orders(now=True)


def test_a_copy_is_cancelled_and_what_was_dropped_is_told(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    recorded(hvfuse, orders=Orders(now=True), copy=a_copy("initial"))
    assert hvfuse("resync", "vm", "--cancel") == 0
    assert hvfuse.out == (
        "vm: cancelled; dropped what was staged of it: 25 %, 1 KiB of 4 KiB copied, 512 B sent\n"
        "vm: no recovery points are made before: hvfuse resync vm --now\n"
    )
    assert orders(hvfuse) == Orders(cancelled=True)


@pytest.mark.parametrize(
    ("total", "how_far"), [(4096, "at 25 %, 1 KiB of 4 KiB copied, 512 B sent"), (0, "when it had just begun")]
)
def test_how_far_a_suspended_copy_came_is_told_in_a_sentence(hvfuse: CommandLine, total: int, how_far: str) -> None:
    hvfuse.add_vm("vm")
    recorded(hvfuse, copy=a_copy("initial", bytes_total=total))
    assert hvfuse("resync", "vm", "--suspend") == 0
    assert hvfuse.out == f"vm: suspended {how_far}; to go on: hvfuse resync vm --resume\n"


def test_an_order_that_is_not_needed_is_taken_back_and_nothing_else_is_asked_for(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    recorded(hvfuse, state=ReplicationState.REPLICATING)
    assert hvfuse("resync", "vm", "--full", "--at", from_now(hours=3)) == 0
    assert hvfuse("resync", "vm", "--cancel") == 0
    assert hvfuse.out == "vm: the order was taken back; replication goes on\n"
    assert orders(hvfuse) == Orders()


def test_a_suspended_export_is_told_with_the_command_that_goes_on_with_it(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    recorded(hvfuse, orders=Orders(seed="ab" * 16), copy=a_copy("export"))
    assert hvfuse("resync", "vm", "--suspend") == 0
    assert hvfuse.out == (
        "vm: the export was suspended at 25 %, 1 KiB of 4 KiB exported, 512 B sent; what is in its directory DIR stays;"
        " to go on: hvfuse seed export vm DIR\n"
    )
    recorded(hvfuse, state=ReplicationState.SUSPENDED)
    assert hvfuse("resync", "vm", "--resume") == 0
    assert hvfuse.out == "vm: copies are not suspended any more; to go on: hvfuse seed export vm DIR\n"
    (vm,) = hvfuse.json("status")["vms"]
    assert vm["state"] == "WaitingForInitialReplication"


@pytest.mark.parametrize(
    ("shown", "after"),
    [("Suspended", "ReadyForInitialReplication"), ("ResynchronizeSuspended", "WaitingForStartResynchronize")],
)
def test_what_is_not_suspended_is_not_shown_so(hvfuse: CommandLine, shown: str, after: str) -> None:
    hvfuse.add_vm("vm")
    recorded(hvfuse, state=ReplicationState(shown))
    assert hvfuse("resync", "vm", "--resume") == 0
    assert hvfuse.out == "vm: copies are not suspended\n"
    (vm,) = hvfuse.json("status")["vms"]
    assert vm["state"] == after


def test_of_a_cancelled_export_nothing_is_dropped(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    recorded(hvfuse, orders=Orders(seed="ab" * 16), copy=a_copy("export"), progress=0.25)
    assert hvfuse("resync", "vm", "--cancel") == 0
    assert hvfuse.out == (
        "vm: the export was cancelled; what is in its directory DIR stays; to go on: hvfuse seed export vm DIR\n"
        "vm: no recovery points are made before: hvfuse resync vm --now\n"
    )
    (vm,) = hvfuse.json("status")["vms"]
    assert vm["copy"] is None
    recorded(hvfuse, copy=a_copy("export"))
    assert hvfuse.json("resync", "vm", "--cancel")["dropped"] is None
