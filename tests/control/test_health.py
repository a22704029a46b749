"""Each rule of health is a row: what is so, and what that makes of a VM that was well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hvfuse.control.config import VmPolicy
from hvfuse.control.copy_health import copy_reasons, shown_state
from hvfuse.control.facts import Facts, Past, Process, StandingTest, TargetFacts, Trouble
from hvfuse.control.forecast import Forecast
from hvfuse.control.health import Health, Reason, commands, reasons
from hvfuse.control.records import VmRecord
from hvfuse.control.statistics import Sums
from hvfuse.shipper.orders import Orders
from hvfuse.states import ReplicationState

S = 10**9
NOW = 1_800_000_000 * S
STATE = ReplicationState
RECORD = VmRecord(
    state=STATE.REPLICATING, generation="ab" * 16, cycle=7, point="p-7", last_replication_time_ns=NOW - 12 * S
)
ANSWER: dict[str, Any] = {
    "disks": [{"name": "os.raw", "log_bytes": 8892}], "untracked": [], "resync_required": None,
}  # fmt: skip
WELL = Facts(
    vm="vm",
    now_ns=NOW,
    record=RECORD,
    orders=Orders(),
    policy=VmPolicy(frequency=30.0),
    tracker=Process(answer=ANSWER, pid=11),
    shipper=Process(answer={"doing": None, "doing_seconds": None}, pid=12),
    names=frozenset({"os.raw"}),
    target=TargetFacts(points=7, newest_id="p-7", newest_ns=NOW - 12 * S, state=STATE.REPLICATING),
    verified=None,
    past=Past(sums=Sums(begin=0, successful=80, missed=20, latency=80.0)),
    forecast=Forecast(rate=1000.0, used=700, soft_limit=1 << 20, hard_limit=2 << 20),
    sealed={},
    shipper_log="/s/shipper.log",
    config_fault=None,
    troubles=(),
)


def all_reasons(facts: Facts) -> list[Reason]:
    state = shown_state(facts)
    return [*reasons(facts, state), *copy_reasons(facts, state)]


def record(**changes: Any) -> dict[str, Any]:
    return {"record": replace(RECORD, **changes)}


def aged(seconds: float, **changes: Any) -> dict[str, Any]:
    """The newest point is so old, on both sides."""
    last = NOW - int(seconds * S)
    target = TargetFacts(points=7, newest_id="p-7", newest_ns=last, state=STATE.REPLICATING)
    return {**record(last_replication_time_ns=last, **changes), "target": target}


def doing(what: str | None, seconds: float | None) -> dict[str, Any]:
    return {"shipper": Process(answer={"doing": what, "doing_seconds": seconds}, pid=12)}


def sums(**counts: Any) -> dict[str, Any]:
    return {"past": Past(sums=Sums(begin=0, **counts))}


def standing(**fields: Any) -> dict[str, Any]:
    assert WELL.target is not None
    return {"target": replace(WELL.target, tests=(StandingTest(id=4, **fields),))}


def target(**fields: Any) -> dict[str, Any]:
    assert WELL.target is not None
    return {"target": replace(WELL.target, **fields)}


def policy(**fields: Any) -> dict[str, Any]:
    return {"policy": replace(WELL.policy, **fields)}


N, W, C = Health.NORMAL, Health.WARNING, Health.CRITICAL
STOPPED = Process(is_busy=True, pid=12, is_stopped=True)
SILENT = Process(is_busy=True, pid=12)
FAILS = {"error": "the store is full", "hint": "make room"}

# What is so; the ids of the reasons and the worst health; what is to be typed next for the first of them.
RULES: dict[str, tuple[dict[str, Any], list[str], Health, str | None]] = {
    "all is well": ({}, [], N, None),
    # Processes
    "no tracker": ({"tracker": Process()}, ["tracker-down"], C, "hvfuse run"),
    "no shipper": ({"shipper": Process()}, ["shipper-down"], C, "hvfuse run"),
    "neither, while somebody starts them": (
        {"tracker": Process(), "shipper": Process(), "is_supervised": True}, ["tracker-down", "shipper-down"], C, None,
    ),
    "the tracker cannot start": (
        {"tracker": Process(), **record(tracker_error="not a VHD", tracker_hint="rename it")}, ["tracker-failed"], C,
        "rename it",
    ),
    "the tracker does not answer": ({"tracker": SILENT}, ["tracker-busy"], W, None),
    "the tracker was stopped": ({"tracker": STOPPED}, ["tracker-busy"], W, "kill -CONT 12"),
    "the shipper does not answer": ({"shipper": SILENT}, ["shipper-busy"], W, None),
    "the shipper was stopped": ({"shipper": STOPPED}, ["shipper-busy"], W, "kill -CONT 12"),
    "the folder is gone": ({"names": None}, ["folder-gone"], C, "hvfuse failover test vm --mount DIR"),
    "the folder is gone, and everybody stumbles over that": (
        {"names": None, **record(**FAILS),
         "troubles": (Trouble(id="tracker-damaged", text="no such file", hint=None),)},
        ["folder-gone"], C, "hvfuse failover test vm --mount DIR",
    ),
    "the folder of a new VM is gone": (
        {"names": None, **record(state=STATE.READY_FOR_INITIAL_REPLICATION, point=None, last_replication_time_ns=None)},
        ["folder-gone", "initial-replication"], C, "hvfuse replication disable vm",
    ),
    "a VM that is not protected": (
        {"tracker": Process(), "shipper": Process(), "record": VmRecord()}, [], N, None
    ),
    # Failures: Warning, and Critical once the point is two intervals old
    "attempts fail": (record(**FAILS), ["replication-failing"], W, "make room"),
    "attempts fail, two intervals": (aged(60, **FAILS), ["replication-failing"], W, "make room"),
    "attempts fail, longer": (aged(61, **FAILS), ["replication-failing"], C, "make room"),
    "attempts fail, before the first point": (
        record(state=STATE.READY_FOR_INITIAL_REPLICATION, point=None, last_replication_time_ns=None, **FAILS),
        ["replication-failing", "initial-replication"], C, "make room",
    ),
    "Error": (record(state=STATE.ERROR, **FAILS), ["replication-failing"], C, "make room"),
    "Error, and nobody knows better": (
        record(state=STATE.ERROR, error="no such file"), ["replication-failing"], C, "hvfuse replication resume vm",
    ),
    # The watchdog
    "busy for two intervals": (doing("sends cycle 8, frame 2", 60), [], N, None),
    "busy for longer without a step": (
        doing("waits for the target to commit cycle 8", 61), ["no-progress"], C, "tail /s/shipper.log",
    ),
    "busy, and late, but moving": (
        {**aged(300), **doing("sends cycle 8, frame 900", 0.1)}, [], N, None,
    ),
    "idle although due": (aged(61), ["no-progress"], C, "tail /s/shipper.log"),
    "the shipper is stopped, and no point comes": (
        {**aged(61), "shipper": STOPPED}, ["no-progress"], C, "kill -CONT 12",
    ),
    "the tracker is stopped, and no point comes": (
        {"tracker": STOPPED, **doing("waits for the tracker to seal the cycle's logs", 61)},
        ["no-progress"], C, "kill -CONT 12",
    ),
    "a copy that hangs": (
        {**record(state=STATE.RESYNCHRONIZING), **doing("compares and sends what differs", 61)},
        ["no-progress", "copying"], C, "tail /s/shipper.log",
    ),
    "a first copy that hangs before it begins": (
        {**record(state=STATE.READY_FOR_INITIAL_REPLICATION, point=None, last_replication_time_ns=None),
         **doing("asks both sides where they stand", 61)},
        ["no-progress", "initial-replication"], C, "tail /s/shipper.log",
    ),
    "a short interval is given time all the same": (
        {**aged(13), **policy(frequency=1.0), **doing("sends cycle 8, frame 1", 10)}, ["stale"], W,
        "hvfuse replicate vm",
    ),
    # The target
    "the store is damaged": (
        {"target": None, "troubles": (Trouble(id="store-damaged", text="bad", hint="hvfuse store check"),)},
        ["store-damaged"], C, "hvfuse store check",
    ),
    "the store does not answer": (
        {"target": None, "troubles": (Trouble(id="store-unreachable", text="no", hint=None),)},
        ["store-unreachable"], W, None,
    ),
    "the store does not answer for two intervals": (
        {**aged(61), **doing("sends", 1), "target": None,
         "troubles": (Trouble(id="store-unreachable", text="no", hint=None),)},
        ["store-unreachable"], C, None,
    ),
    "the store was rolled back": (
        target(newest_id="p-5", newest_ns=NOW - 72 * S), ["store-rolled-back"], C, "hvfuse replicate vm",
    ),
    "the store is empty": (
        {"target": TargetFacts()}, ["store-rolled-back"], C, "hvfuse replicate vm",
    ),
    "suspended at the target": (
        target(state=STATE.SUSPENDED), ["replica-suspended"], C, "hvfuse replication resume vm --replica",
    ),
    "suspended at the target, as the last attempt has found": (
        {**target(state=STATE.SUSPENDED),
         **record(error="suspended", hint="hvfuse replication resume vm --replica")},
        ["replica-suspended"], C, "hvfuse replication resume vm --replica",
    ),
    # The monitoring interval
    "a fifth is missed": (sums(successful=80, missed=20), [], N, None),
    "more than a fifth is missed": (sums(successful=79, missed=20), ["cycles-missed"], W, "hvfuse measure vm"),
    "a fifth is missed, and came behind": (sums(successful=100, late=20, missed=20), [], N, None),
    "more than a fifth is missed, and came behind": (
        sums(successful=99, late=20, missed=20), ["cycles-missed"], W, "hvfuse measure vm",
    ),
    "few are missed of few": (sums(successful=1, missed=4), [], N, None),
    "an interval's latency": (sums(successful=2, latency=60.0), [], N, None),
    "more than an interval's latency": (sums(successful=2, latency=60.2), ["latency"], W, "hvfuse measure vm"),
    "twelve intervals old": (
        {**aged(360), **doing("sends cycle 8, frame 900", 0.1)}, [], N, None,
    ),
    "older than twelve intervals": (
        {**aged(361), **doing("sends cycle 8, frame 900", 0.1)}, ["stale"], W, "hvfuse replicate vm",
    ),
    "an hour at five minutes": (
        {**aged(3600), **policy(frequency=300.0), **doing("sends", 0.1)}, [], N, None,
    ),
    "over an hour at five minutes": (
        {**aged(3601), **policy(frequency=300.0), **doing("sends", 0.1)}, ["stale"], W, "hvfuse replicate vm",
    ),
    # Suspended, copies
    "suspended": (
        {"orders": Orders(paused=True), **aged(9000, state=STATE.SUSPENDED)}, ["suspended"], W,
        "hvfuse replication resume vm",
    ),
    "copies suspended": (
        {"orders": Orders(suspended=True)}, ["copies-suspended"], W, "hvfuse resync vm --resume",
    ),
    "the first copy is under way": (
        {**record(state=STATE.INITIAL_REPLICATION_IN_PROGRESS, point=None, last_replication_time_ns=None)},
        ["copying"], W, None,
    ),
    "the first copy has not begun": (
        record(state=STATE.READY_FOR_INITIAL_REPLICATION, point=None, last_replication_time_ns=None),
        ["initial-replication"], W, None,
    ),
    "a resynchronisation is required": (
        record(state=STATE.WAITING_FOR_START_RESYNCHRONIZE, resync_reason="logs lost"), ["resync-required"], C,
        "hvfuse resync vm --now",
    ),
    "a resynchronisation is suspended": (
        {**record(state=STATE.RESYNCHRONIZE_SUSPENDED, resync_reason="lost"), "orders": Orders(suspended=True)},
        ["resync-required"], C, "hvfuse resync vm --resume",
    ),
    "a resynchronisation is under way": (record(state=STATE.RESYNCHRONIZING), ["copying"], W, None),
    # Limits
    "the hard limit is an interval away": (
        {"forecast": Forecast(rate=1000.0, used=10_000, hard_limit=40_000)}, [], N, None,
    ),
    "the hard limit is nearer": (
        {"forecast": Forecast(rate=1000.0, used=10_001, hard_limit=40_000)}, ["log-limit"], W,
        "hvfuse replicate vm",
    ),
    "the hard limit is near while replication is suspended": (
        {"forecast": Forecast(rate=1000.0, used=10_001, hard_limit=40_000), "orders": Orders(paused=True),
         **record(state=STATE.SUSPENDED)},
        ["suspended", "log-limit"], W, "hvfuse replication resume vm",
    ),
    # The guest
    "an app-consistent point failed": (
        {**record(guest_error="no agent"), **policy(app_consistent=3600.0)}, ["app-consistent-failed"], W,
        "hvfuse replicate vm --app-consistent",
    ),
    "the guest could not be thawed": (
        record(guest_stuck="no agent"), ["guest-stuck"], C, "hvfuse replicate vm --app-consistent",
    ),
    "one failed that nobody wants any more": (record(guest_error="no agent"), [], N, None),
    # Failover
    "failed over, not committed": (
        record(state=STATE.FAILED_OVER_WAITING_COMPLETION, held="it was failed over"), ["fenced"], W, None,
    ),
    "failed over to elsewhere for good": (
        record(state=STATE.FAILED_OVER, held="it was failed over"), ["fenced"], W, "hvfuse replication reverse vm",
    ),
    "held as the store could not be asked": (
        {"tracker": Process(answer={**ANSWER, "held": "nobody could be asked"}, pid=11)}, ["held"], C, "hvfuse run",
    ),
    "failed over to here, not reversed": (
        record(state=STATE.FAILED_OVER), ["failed-over"], W, "hvfuse replication reverse vm",
    ),
    "a planned failover was cut off": (
        record(state=STATE.PREPARED_FOR_FAILOVER, held="planned"), ["failover-unprepared"], W,
        "hvfuse failover planned vm",
    ),
    "a planned failover is prepared": (
        record(state=STATE.PREPARED_FOR_FAILOVER, held="planned", prepared={"point": "a-1"}), ["failover-prepared"], W,
        "hvfuse failover cancel vm",
    ),
    "giving way was cut off": (
        record(state=STATE.FAILED_OVER, held="it was", giving_way={"disks": []}), ["reverse-unfinished"], W,
        "hvfuse replication reverse vm",
    ),
    "a test for a day": (standing(since_ns=NOW - 86400 * S, is_served=True), [], N, None),
    "a test for longer": (
        standing(since_ns=NOW - 86401 * S, is_served=True), ["test-standing"], W, "hvfuse failover cleanup vm 4",
    ),
    "a test whose process is gone": (
        standing(since_ns=NOW, is_served=False), ["test-standing"], W, "hvfuse failover cleanup vm 4",
    ),
    # Surroundings
    "hvfuse.toml has a mistake": ({"config_fault": "line 3"}, ["config-fault"], W, "hvfuse policy check"),
    "the clock was set back": (aged(-61), ["clock-set-back"], W, "date"),
    "attempts fail after the clock was set back": (
        aged(-61, **FAILS), ["replication-failing", "clock-set-back"], C, "make room",
    ),
    "the clocks differ a little": (aged(-59), [], N, None),
    "a disk that is not tracked": (
        {"tracker": Process(answer={**ANSWER, "untracked": ["new.vhd"]})}, ["untracked-disk"], W, None,
    ),
    "an excluded disk that is not there": (
        policy(exclude=frozenset({"swap.raw"})), ["exclude-unknown"], W, "hvfuse policy show vm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_what_is_so_is_told_with_its_health_and_the_next_command(case: str) -> None:
    changes, ids, worst, command = RULES[case]
    found = all_reasons(replace(WELL, **changes))
    assert [reason.id for reason in found] == ids
    assert max((reason.health for reason in found), default=Health.NORMAL) is worst
    assert (found[0].next_command if found else None) == command


def test_what_hangs_is_named() -> None:
    def text(**changes: Any) -> str:
        return next(one.text for one in all_reasons(replace(WELL, **changes)) if one.id == "no-progress")

    assert "waits for the target to commit cycle 8" in text(**doing("waits for the target to commit cycle 8", 90))
    assert "(pid 12) was stopped by a signal" in text(**{**aged(90), "shipper": STOPPED})
    tracker = text(tracker=STOPPED, **doing("waits for the tracker to seal the cycle's logs", 90))
    assert "the tracker (pid 12) was stopped by a signal" in tracker
    assert "the shipper does not say why" in text(**aged(90))


@pytest.mark.parametrize(
    ("changes", "seconds", "size"),
    [
        ({}, 12.0, 700),
        ({"target": None}, None, 700),
        ({"tracker": Process()}, 12.0, None),
        ({"target": TargetFacts()}, None, 700),
        (target(newest_id="p-5", newest_ns=NOW - 72 * S), 72.0, 700),
        (aged(-61), None, 700),
        ({"sealed": {"os.raw": 300}}, 12.0, 1000),
        (
            {"tracker": Process(answer={**ANSWER, "disks": [{"name": "a", "log_bytes": 0, "resync_bytes": 5}]})},
            12.0, 5,
        ),
    ],
)  # fmt: skip
def test_what_nobody_can_tell_is_unknown_and_never_zero(
    changes: dict[str, Any], seconds: float | None, size: int | None
) -> None:
    facts = replace(WELL, **changes)
    assert (facts.rpo_seconds, facts.rpo_bytes) == (seconds, size)


def test_every_command_that_is_said_to_be_allowed_is_one_that_the_state_allows() -> None:
    for state in ReplicationState:
        for command in commands("vm", state):
            assert command.startswith(("hvfuse re", "hvfuse failover "))
    assert "hvfuse replication resume vm" in commands("vm", STATE.SUSPENDED)
    assert commands("vm", STATE.SUSPENDED, paused=True) == (
        "hvfuse replication resume vm", "hvfuse replication disable vm",
    )  # fmt: skip
    assert "hvfuse replication resume vm" not in commands("vm", STATE.REPLICATING)
    assert commands("vm", STATE.DISABLED) == ("hvfuse replication enable vm",)
