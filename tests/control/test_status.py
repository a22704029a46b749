"""What `status` makes of what it finds: state, health with its reasons, what is pending."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hvfuse import wire
from hvfuse.cli.screen import at_risk
from hvfuse.control import facts
from hvfuse.control.config import Config, VmPolicy
from hvfuse.control.facts import Past, StandingTest, TargetFacts
from hvfuse.control.home import Home
from hvfuse.control.instants import instant_text
from hvfuse.control.records import VmRecord
from hvfuse.control.statistics import Sums
from hvfuse.control.status import Health, VmStatus, vm_status
from hvfuse.extent import Extent
from hvfuse.formats.digests import BLOCK
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.proofs import Proofs
from hvfuse.shipper.window import Initial, Resync
from hvfuse.states import ReplicationState

NOW_NS = 1_800_000_000 * 10**9
TRACKER: Mapping[str, Any] = {
    "disks": [{"name": "os.raw", "format": "raw", "size": 4096, "log_bytes": 8192 + 700}],
    "untracked": [],
    "resync_required": None,
}
REPLICATED = VmRecord(
    state=ReplicationState.REPLICATING,
    generation="ab" * 16,
    cycle=7,
    point="p-7",
    last_replication_time_ns=NOW_NS - 12 * 10**9,
)
Ask = Callable[..., VmStatus]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Config().home(str(tmp_path))
    home.make()
    folder = Path(home.folder("vm"))
    folder.mkdir()
    (folder / "os.raw").write_bytes(bytes(4096))
    home.make_vm("vm")
    return home


@pytest.fixture
def ask(home: Home) -> Iterator[Ask]:
    """Asks for the status of "vm" with those processes answering; None = it does not run."""
    with ExitStack() as stack:

        def asked(
            record: VmRecord = REPLICATED,
            *,
            tracker: Mapping[str, Any] | None = TRACKER,
            shipper: bool = True,
            policy: VmPolicy | None = None,
            vm: str = "vm",
            target: TargetFacts | None = None,
            sums: Sums | None = None,
            doing: Mapping[str, Any] | None = None,
        ) -> VmStatus:
            if tracker is not None:
                listener = wire.Listener(home.tracker_socket("vm"), lambda _: tracker, name="tracker")
                stack.callback(listener.close)
            if shipper:
                told = doing or {}
                stack.callback(wire.Listener(home.shipper_socket("vm"), lambda _: told, name="shipper").close)
            return vm_status(
                home,
                vm,
                record=record,
                policy=policy or VmPolicy(),
                target=lambda _: target or TargetFacts(points=3, newest_id=record.point, newest_ns=NOW_NS),
                past=Past(sums=sums or Sums(begin=0)),
                now_ns=NOW_NS,
            )

        yield asked


def reasons(status: VmStatus) -> list[str]:
    return [reason.id for reason in status.reasons]


def test_a_vm_that_replicates_is_normal_and_its_figures_add_up(ask: Ask) -> None:
    status = ask()
    assert (status.state, status.health, reasons(status)) == (ReplicationState.REPLICATING, Health.NORMAL, [])
    assert (status.last_cycle, status.latest_point, status.points) == (7, "p-7", 3)
    assert status.rpo_seconds == 12.0
    assert status.pending_bytes == 700, "the head of an empty log is not pending"
    assert [(disk.name, disk.format, disk.size, disk.log_bytes) for disk in status.disks] == [
        ("os.raw", "raw", 4096, 8892)
    ]


def test_a_folder_that_was_never_replicated_is_disabled_and_nothing_is_known(ask: Ask) -> None:
    status = ask(VmRecord(), tracker=None, shipper=False)
    assert (status.state, status.health) == (ReplicationState.DISABLED, Health.NORMAL)
    assert (status.rpo_seconds, status.last_replication_time_ns, status.pending_bytes) == (None, None, None)
    assert [disk.name for disk in status.disks] == ["os.raw"]


def test_a_clock_that_was_set_back_does_not_make_the_age_negative(ask: Ask) -> None:
    record = VmRecord(state=ReplicationState.REPLICATING, last_replication_time_ns=NOW_NS + 59 * 10**9)
    status = ask(record)
    assert (status.rpo_seconds, status.health) == (0.0, Health.NORMAL)


def test_a_point_of_the_future_has_no_age_and_that_is_told(ask: Ask) -> None:
    record = VmRecord(state=ReplicationState.REPLICATING, last_replication_time_ns=NOW_NS + 61 * 10**9)
    status = ask(record)
    assert (status.rpo_seconds, status.health, reasons(status)) == (None, Health.WARNING, ["clock-set-back"])


def test_a_process_that_is_there_but_says_nothing_is_busy_and_not_missing(
    ask: Ask, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "ANSWER_SECONDS", 0.05)
    with ExitStack() as stack:
        for path in (home.tracker_socket("vm"), home.shipper_socket("vm")):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            directory = os.open(os.path.dirname(path), os.O_PATH)
            stack.callback(os.close, directory)
            listener.bind(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
            listener.listen(8)
        status = ask(tracker=None, shipper=False)
    assert (status.state, status.health) == (ReplicationState.REPLICATING, Health.WARNING)
    assert reasons(status) == ["tracker-busy", "shipper-busy"]


def test_a_first_copy_that_nobody_goes_on_with_is_critical_and_says_how_to_go_on(ask: Ask) -> None:
    record = VmRecord(state=ReplicationState.INITIAL_REPLICATION_IN_PROGRESS, progress=0.3)
    status = ask(record, tracker=None, shipper=False)
    assert status.health is Health.CRITICAL
    assert [reason.next_command for reason in status.reasons] == ["hvfuse run", "hvfuse run", None]


def test_a_copy_that_is_under_way_is_told_in_figures(ask: Ask) -> None:
    copy = {
        "kind": "resync", "pass": 1, "bytes_total": 3_500 << 20, "bytes_done": 1_300 << 20, "bytes_sent": 15 << 20,
        "bytes_saved": 1_285 << 20, "seconds": 6.2, "bytes_per_second": 210 << 20, "seconds_left": 9.5,
    }  # fmt: skip
    record = VmRecord(state=ReplicationState.RESYNCHRONIZING, progress=0.37, copy=copy)
    status = ask(record)
    (reason,) = status.reasons
    assert reason.text == ("resynchronizing: 37 %, 1.3 GiB of 3.4 GiB compared, 15 MiB sent, 210 MiB/s, 9.5 s left")
    assert status.copy == copy


def test_what_is_not_known_of_a_copy_is_not_told(ask: Ask) -> None:
    copy = {
        "kind": "initial", "pass": 3, "bytes_total": 0, "bytes_done": 0, "bytes_sent": 0, "bytes_saved": 0,
        "seconds": 0.0, "bytes_per_second": 0.0, "seconds_left": None,
    }  # fmt: skip
    (reason,) = ask(VmRecord(state=ReplicationState.INITIAL_REPLICATION_IN_PROGRESS, copy=copy)).reasons
    assert reason.text == "copying the disks: pass 3, just begun"


READY = ReplicationState.READY_FOR_INITIAL_REPLICATION
WAITING = ReplicationState.WAITING_FOR_START_RESYNCHRONIZE
LATER_NS = NOW_NS + 3 * 86400 * 10**9
FIRST = "the first copy of the disks"
RESYNC = "a resynchronisation is required: logs lost; it"
MANUAL = VmPolicy(resync=Resync(automatic=False))
SEED = VmPolicy(initial=Initial(how="seed"))

# What waits: state, orders, when it is due, policy; the text's begin and end, and the command.
WAITS: dict[str, tuple[ReplicationState, Orders, int | None, VmPolicy, str, str, str | None]] = {
    "a first copy about to begin": (READY, Orders(), None, VmPolicy(), FIRST, "has not begun yet", None),
    "a first copy at a time": (
        READY, Orders(at_ns=LATER_NS), LATER_NS, VmPolicy(), FIRST,
        f"begins at {instant_text(LATER_NS, now_ns=NOW_NS)}", "hvfuse resync vm --now",
    ),
    "a first copy suspended": (
        ReplicationState.SUSPENDED, Orders(now=True, suspended=True), None, VmPolicy(), FIRST, "is suspended",
        "hvfuse resync vm --resume",
    ),
    "a first copy cancelled": (
        READY, Orders(cancelled=True), None, VmPolicy(), FIRST, "was cancelled, and does not begin by itself",
        "hvfuse resync vm --now",
    ),
    "a first copy from a seed": (
        ReplicationState.WAITING_FOR_INITIAL_REPLICATION, Orders(), None, SEED, FIRST, "waits for its seed",
        "hvfuse seed export vm DIR",
    ),
    "a first copy that was exported": (
        ReplicationState.WAITING_FOR_INITIAL_REPLICATION, Orders(seed="ab" * 16), None, VmPolicy(), FIRST,
        "waits for its seed", "hvfuse seed import DIR",
    ),
    "a resynchronisation at a time": (
        WAITING, Orders(), LATER_NS, VmPolicy(), RESYNC, f"begins at {instant_text(LATER_NS, now_ns=NOW_NS)}",
        "hvfuse resync vm --now",
    ),
    "a resynchronisation that is due": (
        WAITING, Orders(), NOW_NS, VmPolicy(), RESYNC, "has not begun yet", "hvfuse resync vm --now",
    ),
    "a resynchronisation that has to be asked for": (
        WAITING, Orders(), None, MANUAL, RESYNC, 'says resync = "manual")', "hvfuse resync vm --now",
    ),
    "a resynchronisation that was asked for": (
        WAITING, Orders(now=True), None, MANUAL, RESYNC, "has not begun yet", "hvfuse resync vm --now",
    ),
    "a resynchronisation suspended": (
        ReplicationState.RESYNCHRONIZE_SUSPENDED, Orders(suspended=True), LATER_NS, VmPolicy(), RESYNC, "is suspended",
        "hvfuse resync vm --resume",
    ),
    "a resynchronisation cancelled": (
        WAITING, Orders(cancelled=True), None, VmPolicy(), RESYNC, "was cancelled, and does not begin by itself",
        "hvfuse resync vm --now",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WAITS)
def test_a_copy_that_waits_says_for_what_and_what_ends_that(case: str, ask: Ask) -> None:
    state, orders, due, policy, begin, end, command = WAITS[case]
    reason = "logs lost" if begin is RESYNC else None
    record = VmRecord(state=state, orders=orders.as_json(), copy_due_ns=due, resync_reason=reason)
    status = ask(record, policy=policy)
    (told,) = status.reasons
    expected = ("resync-required", Health.CRITICAL) if begin is RESYNC else ("initial-replication", Health.WARNING)
    assert (told.id, told.health) == expected
    assert told.text.startswith(begin)
    assert told.text.endswith(end)
    assert told.next_command == command
    assert (status.copy_due_ns, status.orders) == (due, orders)


IN_PROGRESS = ReplicationState.INITIAL_REPLICATION_IN_PROGRESS
UNHEEDED = {
    "a first copy": (IN_PROGRESS, Orders(suspended=True), ReplicationState.SUSPENDED),
    "a first copy given up": (IN_PROGRESS, Orders(cancelled=True), READY),
    "a resynchronisation": (
        ReplicationState.RESYNCHRONIZING, Orders(suspended=True), ReplicationState.RESYNCHRONIZE_SUSPENDED
    ),
    "a resynchronisation given up": (ReplicationState.RESYNCHRONIZE_SUSPENDED, Orders(cancelled=True), WAITING),
    "none": (ReplicationState.REPLICATING, Orders(suspended=True), ReplicationState.REPLICATING),
}  # fmt: skip


@pytest.mark.parametrize("case", UNHEEDED)
def test_orders_show_although_no_shipper_has_heeded_them_yet(case: str, ask: Ask) -> None:
    state, orders, shown = UNHEEDED[case]
    record = VmRecord(state=state, orders=orders.as_json())
    assert ask(record, shipper=False).state is shown
    assert ask(record, tracker=None).state is state, "a shipper that runs knows best"


def test_copies_that_are_suspended_although_none_is_needed_are_told(ask: Ask) -> None:
    fields = {name: getattr(REPLICATED, name) for name in VmRecord.__slots__}
    (reason,) = ask(VmRecord(**{**fields, "orders": Orders(suspended=True).as_json()})).reasons
    assert (reason.id, reason.health, reason.next_command) == (
        "copies-suspended", Health.WARNING, "hvfuse resync vm --resume",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("orders", "what"),
    [
        (Orders(at_ns=LATER_NS, full=True), "a full resynchronisation"),
        (Orders(at_ns=LATER_NS, repair=True), "the repair of what verification found to differ"),
    ],
)
def test_a_copy_that_is_ordered_for_later_is_told_and_no_worry(ask: Ask, orders: Orders, what: str) -> None:
    status = ask(dataclasses.replace(REPLICATED, orders=orders.as_json()))
    (reason,) = status.reasons
    assert (reason.id, reason.health, status.health) == ("copy-ordered", Health.NORMAL, Health.NORMAL)
    assert reason.text == f"{what} is ordered for {instant_text(LATER_NS, now_ns=NOW_NS)}"


def with_mismatch(home: Home, *, doubted: str | None) -> None:
    kept = Proofs()
    kept.follow([(b"d" * 16, "os.raw", 8 << 20)])
    kept.differ(b"d" * 16, [Extent(4 << 20, BLOCK)], now_ns=NOW_NS - 10**9)
    if doubted is not None:
        kept.doubt(doubted)
    kept.save(home.proofs("vm"))


@pytest.mark.parametrize(
    ("doubted", "changes", "tracker", "expected"),
    [
        (None, {}, TRACKER, ("verify-mismatch", Health.CRITICAL, "hvfuse verify vm --repair")),
        (
            "ab" * 16, {}, {**TRACKER, "resync_required": "verification found that the replica differs"},
            ("verify-mismatch", Health.CRITICAL, None),
        ),
        (None, {"state": ReplicationState.RESYNCHRONIZING}, TRACKER, ("verify-mismatch", Health.CRITICAL, None)),
        (None, {"state": WAITING, "resync_reason": "lost"}, TRACKER, ("verify-mismatch", Health.CRITICAL, None)),
        ("cd" * 16, {}, TRACKER, ("repair-unproved", Health.WARNING, "hvfuse verify vm")),
        ("cd" * 16, {"state": WAITING, "resync_reason": "lost"}, TRACKER, ("repair-unproved", Health.WARNING, None)),
    ],
)  # fmt: skip
def test_a_mismatch_is_told_with_what_can_be_done_about_it_now(
    ask: Ask, home: Home, doubted: str | None, changes: dict[str, Any], tracker: Any, expected: tuple[Any, ...]
) -> None:
    with_mismatch(home, doubted=doubted)
    status = ask(dataclasses.replace(REPLICATED, **changes), tracker=tracker)
    (reason,) = [reason for reason in status.reasons if reason.id in ("verify-mismatch", "repair-unproved")]
    assert (reason.id, reason.health, reason.next_command) == expected
    assert f"os.raw: offset {4 << 20}, length {BLOCK}" in reason.text


def test_a_forgotten_test_failover_is_told_with_the_command_that_ends_it(home: Home) -> None:
    tests = (StandingTest(id=4, since_ns=NOW_NS, is_served=False),)
    status = vm_status(
        home,
        "vm",
        record=VmRecord(),
        policy=VmPolicy(),
        target=lambda _: TargetFacts(points=1, tests=tests),
        past=Past(),
        now_ns=NOW_NS,
    )
    (reason,) = status.reasons
    assert (reason.health, reason.next_command) == (Health.WARNING, "hvfuse failover cleanup vm 4")


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Health, list[str]]] = {
    "tracker down": ({}, {"tracker": None}, Health.CRITICAL, ["tracker-down"]),
    "shipper down": ({}, {"shipper": False}, Health.CRITICAL, ["shipper-down"]),
    "both down": ({}, {"tracker": None, "shipper": False}, Health.CRITICAL, ["tracker-down", "shipper-down"]),
    "copying": (
        {"state": ReplicationState.INITIAL_REPLICATION_IN_PROGRESS, "progress": 0.5}, {}, Health.WARNING, ["copying"]
    ),
    "waiting for a resynchronisation": (
        {"state": ReplicationState.WAITING_FOR_START_RESYNCHRONIZE, "resync_reason": "logs lost"}, {},
        Health.CRITICAL, ["resync-required"],
    ),
    "the tracker wants a resynchronisation": (
        {}, {"tracker": {**TRACKER, "resync_required": "changed offline"}}, Health.CRITICAL, ["resync-required"]
    ),
    "failing for a moment": ({"error": "store full"}, {}, Health.WARNING, ["replication-failing"]),
    "failing for long": (
        {"error": "store full", "last_replication_time_ns": NOW_NS - 61 * 10**9}, {},
        Health.CRITICAL, ["replication-failing"],
    ),
    "an administrator is needed": (
        {"state": ReplicationState.ERROR, "error": "corrupt frame"}, {}, Health.CRITICAL, ["replication-failing"]
    ),
    "an excluded disk that does not exist": (
        {}, {"policy": VmPolicy(exclude=frozenset(["os.raw", "swpa.raw"]))}, Health.WARNING, ["exclude-unknown"]
    ),
    "a disk that is not tracked": (
        {}, {"tracker": {**TRACKER, "untracked": ["new.vhd"]}}, Health.WARNING, ["untracked-disk"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_told_with_its_reason(case: str, ask: Ask) -> None:
    changes, found, health, ids = CASES[case]
    fields = {name: getattr(REPLICATED, name) for name in VmRecord.__slots__}
    status = ask(VmRecord(**{**fields, **changes}), **found)
    assert (status.health, reasons(status)) == (health, ids)


def test_a_tracker_that_cannot_start_is_an_error_with_its_cause(ask: Ask) -> None:
    record = VmRecord(tracker_error="os.vhd: not a VHD", tracker_hint="rename it")
    status = ask(record, tracker=None, shipper=False)
    assert (status.state, status.health) == (ReplicationState.ERROR, Health.CRITICAL)
    (reason,) = status.reasons
    assert (reason.text, reason.next_command) == ("os.vhd: not a VHD", "rename it")


def test_damage_is_a_reason_and_the_rest_is_still_told(ask: Ask, home: Home) -> None:
    Path(home.folder("vm"), "os.raw.0000000003.hrc").write_bytes(b"rubbish")
    status = ask()
    (reason,) = status.reasons
    assert (reason.id, reason.health) == ("logs-damaged", Health.CRITICAL)
    assert "os.raw.0000000003.hrc" in reason.text
    assert (status.state, status.points, status.pending_bytes) == (ReplicationState.REPLICATING, 3, 700)


def test_a_vm_whose_folder_is_gone_points_to_the_store(ask: Ask, home: Home) -> None:
    status = ask(vm="other")
    assert reasons(status)[0] == "folder-gone"
    assert status.disks == ()


def test_what_is_to_be_compared_is_not_told_as_if_it_were_all_lost(ask: Ask) -> None:
    disks = [{**TRACKER["disks"][0], "resync_bytes": 3 << 20}]
    status = ask(tracker={**TRACKER, "disks": disks}, target=TargetFacts(points=3, newest_id="p-7", newest_ns=NOW_NS))
    assert (status.pending_bytes, status.doubtful_bytes) == (700 + (3 << 20), 3 << 20)
    assert at_risk(status) == "the last 12 s, 700 B, and what differs in 3 MiB that are to be compared"
