import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from hvfuse import wire
from hvfuse.errors import (
    BusyError,
    CorruptError,
    HvfuseError,
    NoSpaceError,
    ResyncRequiredError,
    UnreachableError,
    UsageError,
)
from hvfuse.shipper.copy import CopyReport
from hvfuse.shipper.cycle import CycleReport
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.replication import CurrentPolicy, ShippingPolicy
from hvfuse.shipper.service import Shipper, StoppedError
from hvfuse.shipper.window import Resync
from hvfuse.states import Event, ReplicationState, next_state

from .logs import Killed, MemoryReplica, Tracked, random_bytes, tracked, write

MIB = 1 << 20


@dataclass
class Clock:
    """A clock that stands still unless told."""

    seconds: float = 1000.0

    def now_ns(self) -> int:
        return int(self.seconds * 1e9)

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@dataclass
class Kept:
    """Records in memory. `states`: every state there was, in order, without repetitions."""

    fields: dict = field(default_factory=dict)
    states: list = field(default_factory=list)
    reports: list[CycleReport] = field(default_factory=list)
    copies: list[CopyReport] = field(default_factory=list)
    reasons: list[object] = field(default_factory=list)
    misses: int = 0
    failures: list[HvfuseError] = field(default_factory=list)

    def update(self, **fields: object) -> None:
        self.fields.update(fields)
        self.reasons += [fields["resync_reason"]] if fields.get("resync_reason") else []

    def apply(self, *events: Event, **fields: object) -> ReplicationState:
        state = self.fields.get("state", ReplicationState.READY_FOR_INITIAL_REPLICATION)
        for event in events:
            state = next_state(state, event)
        self.update(**fields, state=state)
        if self.states[-1:] != [state]:
            self.states.append(state)
        return state

    def resume(self) -> None:
        is_first = self.fields.get("point") is None
        suspended = (ReplicationState.SUSPENDED, ReplicationState.RESYNCHRONIZE_SUSPENDED)
        if self.fields.get("state") in suspended and not self.orders().suspended:
            self.apply(Event.NEED_FIRST_COPY if is_first else Event.RESUME)

    def missed(self, count: int) -> None:
        self.misses += count

    def failed(self, error: HvfuseError) -> None:
        self.failures.append(error)

    def cycle(self, report: CycleReport, *events: Event, **fields: object) -> ReplicationState:
        self.reports.append(report)
        return self.apply(*events, **fields)

    def orders(self) -> Orders:
        return self.fields.get("orders", Orders())

    def change_orders(self, change: Callable[[Orders], Orders]) -> Orders:
        self.update(orders=change(self.orders()))
        return self.orders()

    def copy_progress(self) -> dict | None:
        return self.fields.get("copy")

    def last_app_consistent_ns(self) -> int | None:
        return self.fields.get("last_app_consistent_ns")

    def copied(self, report: CopyReport) -> None:
        self.copies.append(report)


@dataclass
class Site:
    """A source, a replica and what is needed to ship from one to the other."""

    source: Tracked
    replica: MemoryReplica = field(default_factory=MemoryReplica)
    records: Kept = field(default_factory=Kept)
    clock: Clock = field(default_factory=Clock)
    housekept: int = 0

    def shipper(self) -> Shipper:
        """A new one, as after a restart."""
        return Shipper(
            vm="vm1", folder=self.source.folder, source=self.source, replica=self.replica,
            records=self.records, policy=CurrentPolicy(ShippingPolicy(frequency_seconds=30)), clock=self.clock,
            housekeep=self.keep_house,
        )  # fmt: skip

    def keep_house(self) -> None:
        self.housekept += 1

    def write(self, seed: int) -> None:
        for disk in self.source.disks:
            disk.do(write(seed * 5000 % MIB, random_bytes(seed, 9000)))

    def assert_equal(self) -> None:
        for disk in self.source.disks:
            assert self.replica.images[disk.disk_id] == disk.image


@pytest.fixture
def site(tmp_path):
    site = Site(tracked(str(tmp_path), [2 * MIB, MIB], begun=False))
    for disk in site.source.disks:
        disk.image[:5000] = random_bytes(1, 5000)
    site.source.flush()
    return site


def test_a_new_vm_is_copied_and_has_a_point_after_its_first_cycle(site):
    report = site.shipper().cycle_now()
    site.assert_equal()
    assert site.records.states == [
        ReplicationState.INITIAL_REPLICATION_IN_PROGRESS,
        ReplicationState.REPLICATING,
    ]
    assert site.records.fields | {"generation": None} == {
        "state": ReplicationState.REPLICATING, "error": None, "hint": None, "resync_reason": None, "resync_cause": None,
        "progress": None, "copy": None, "copy_due_ns": None, "generation": None, "cycle": 1,
        "point": report.point, "last_replication_time_ns": report.sealed_ns,
    }  # fmt: skip
    assert site.records.reports == [replace(report, notes=())]
    assert report.notes == (site.records.copies[0].text,)
    assert site.housekept == 1
    assert site.source.cycles() == []


def test_that_somebody_else_is_at_the_replica_is_told_only_if_it_lasts(site):
    shipper = site.shipper()
    busy = BusyError("vm1: another process has taken over", hint="try again in a moment")
    site.replica.fail_with = busy
    for _ in range(60):
        assert shipper.turn() == 5
        assert site.records.fields.get("error") is None
        site.clock.seconds += 5
    shipper.turn()
    assert (site.records.fields["error"], site.records.fields["hint"]) == (str(busy), busy.hint)
    assert ReplicationState.ERROR not in site.records.states
    site.replica.fail_with = None
    site.clock.seconds += 240
    shipper.turn()
    site.assert_equal()
    assert (site.records.fields["error"], site.records.fields["state"]) == (None, ReplicationState.REPLICATING)


def test_each_cycle_makes_a_point_that_equals_the_disks_at_its_barrier(site):
    shipper = site.shipper()
    for seed in range(1, 5):
        site.write(seed)
        assert shipper.cycle_now().cycle == seed
        site.assert_equal()


def test_cycles_that_wait_are_shipped_in_order_each_as_its_own_point(site):
    shipper = site.shipper()
    shipper.cycle_now()
    for seed in (1, 2):
        site.write(seed)
        site.source.rotate()
    site.write(3)
    report = shipper.cycle_now()
    assert report.cycle == 4
    assert [kept.cycle for kept in site.records.reports] == [1, 2, 3, 4]
    assert report.bytes_logged == sum(kept.bytes_logged for kept in site.records.reports[1:])
    assert report.point == site.replica.all_points[-1].id
    site.assert_equal()


def test_what_is_rotated_during_the_copy_makes_no_point_of_its_own(site, monkeypatch):
    put = MemoryReplica.put

    def busy_put(replica: MemoryReplica, frame: bytes) -> None:
        monkeypatch.setattr(MemoryReplica, "put", put)
        site.write(1)
        site.source.rotate()
        site.write(2)
        site.source.flush()
        put(replica, frame)

    monkeypatch.setattr(MemoryReplica, "put", busy_put)
    report = site.shipper().cycle_now()
    assert (report.cycle, len(site.replica.all_points)) == (2, 1)
    site.assert_equal()


def test_a_shipper_killed_anywhere_in_copy_and_first_cycle_resumes_without_sending_twice(tmp_path):
    kill, killed = 0, True
    while killed:
        kill += 1
        (tmp_path / str(kill)).mkdir()
        site = Site(tracked(str(tmp_path / str(kill)), [2 * MIB, MIB], begun=False))
        site.write(9)
        site.source.flush()
        site.replica.die_at = kill
        killed = not survives(site, seed=1)
        site.replica.die_at = None
        assert survives(site, seed=2)
        assert survives(site, seed=3)
        site.assert_equal()
        assert len(set(site.replica.puts)) == len(site.replica.puts)
    assert kill == 5, "two frames of the copy, two of the first cycle"


def survives(site: Site, *, seed: int) -> bool:
    """Whether a shipper, started anew, comes through a copy (if there is one), a write and a cycle."""
    shipper = site.shipper()
    try:
        shipper.synchronise()
        site.write(seed)
        shipper.cycle_now()
    except Killed:
        return False
    return True


def test_a_first_cycle_that_was_killed_halfway_is_taken_up_as_it_was(site):
    shipper = site.shipper()
    shipper.synchronise()
    site.write(1)
    site.replica.die_at = len(site.replica.puts) + 1
    with pytest.raises(Killed):
        shipper.cycle_now()
    site.replica.die_at = None
    site.write(2)
    report = site.shipper().cycle_now()
    assert [(kept.cycle, kept.frames_held) for kept in site.records.reports] == [(1, 1), (2, 0)]
    assert report.cycle == 2, "what was written until now is in the point that was asked for"
    site.assert_equal()


@pytest.mark.parametrize("kills", range(1, 4))
def test_killed_after_the_commit_but_before_the_logs_were_released_nothing_is_sent_again(site, kills):
    site.shipper().cycle_now()
    for seed in range(kills):
        site.write(seed)
        site.replica.die_at_commit = True
        with pytest.raises(Killed):
            site.shipper().cycle_now()
    site.shipper().cycle_now()
    site.assert_equal()
    assert len(set(site.replica.puts)) == len(site.replica.puts)
    assert site.source.cycles() == []


def test_a_damaged_log_leads_to_a_new_copy_and_replication_goes_on(site):
    shipper = site.shipper()
    shipper.cycle_now()
    first = site.source.generation
    site.write(1)
    site.source.rotate()
    with open(site.source.cycles()[0].logs[0].log_path, "r+b") as file:
        file.seek(8192)
        file.write(b"damage")
    site.write(2)
    report = shipper.cycle_now()
    assert site.source.generation != first
    assert (report.cycle, report.generation) == (1, site.source.generation)
    assert site.records.states[2:] == [
        ReplicationState.WAITING_FOR_START_RESYNCHRONIZE,
        ReplicationState.RESYNCHRONIZING,
        ReplicationState.REPLICATING,
    ]
    assert [point.cycle for point in site.replica.all_points] == [1, 1], "existing points stay"
    site.assert_equal()


def test_a_missing_log_leads_to_a_new_copy(site):
    shipper = site.shipper()
    shipper.cycle_now()
    site.write(1)
    site.source.rotate()
    os.unlink(site.source.cycles()[0].logs[0].companion_path)
    assert shipper.cycle_now().cycle == 1
    site.assert_equal()


def test_a_replica_with_another_history_gets_a_new_copy(site):
    shipper = site.shipper()
    shipper.cycle_now()
    site.write(1)
    site.source.disks[0].digest = b"x" * 16
    assert shipper.cycle_now().cycle == 1
    site.assert_equal()


def test_a_resync_that_the_tracker_asks_for_is_done(site):
    shipper = site.shipper()
    shipper.cycle_now()
    site.source.resync_required = "the log could not be written"
    shipper.synchronise()
    assert site.records.fields["resync_reason"] == "the log could not be written"
    assert shipper.cycle_now().cycle == 1
    assert site.records.fields["resync_reason"] is None


def test_a_tracker_that_cannot_rotate_although_it_asks_for_nothing_gets_a_new_copy(site, monkeypatch):
    shipper = site.shipper()
    shipper.cycle_now()
    first, rotate = site.source.generation, Tracked.rotate

    def refuse(source: Tracked) -> int:
        if source.generation == first:
            raise ResyncRequiredError("no writes are being logged")
        return rotate(source)

    monkeypatch.setattr(Tracked, "rotate", refuse)
    assert shipper.cycle_now().cycle == 1
    assert site.source.generation != first


def test_logs_of_a_tracker_that_ended_are_shipped(site, monkeypatch):
    site.shipper().cycle_now()
    site.write(1)
    site.source.rotate()

    def gone(self) -> None:
        raise UnreachableError("no answer from tracker.sock")

    monkeypatch.setattr(Tracked, "status", gone)
    report = site.shipper().cycle_now()
    assert report.cycle == 2
    site.assert_equal()
    with pytest.raises(UnreachableError, match="no answer"):
        site.shipper().cycle_now()


def test_logs_sealed_during_a_copy_do_not_make_a_point_while_the_tracker_is_away(site, monkeypatch):
    shipper = site.shipper()
    shipper.synchronise()
    site.write(1)
    site.source.rotate()

    def gone(self) -> None:
        raise UnreachableError("no answer from tracker.sock")

    with monkeypatch.context() as patch:
        patch.setattr(Tracked, "status", gone)
        with pytest.raises(UnreachableError):
            shipper.cycle_now()
        assert not site.replica.all_points
    assert shipper.cycle_now().cycle == 2
    site.assert_equal()


def test_a_failing_housekeeper_is_told_but_does_not_fail_the_cycle(site, monkeypatch, caplog):
    def fail(self) -> None:
        raise NoSpaceError("the store is full")

    monkeypatch.setattr(Site, "keep_house", fail)
    assert site.shipper().cycle_now().cycle == 1
    assert site.records.fields["error"] == "the store is full"
    assert site.records.fields["state"] is ReplicationState.REPLICATING
    assert "the store is full" in caplog.text


def test_a_cycle_is_due_at_once_and_then_at_the_policys_frequency(site):
    shipper = site.shipper()
    assert shipper.turn() == 30
    site.clock.seconds += 29
    assert shipper.turn() == 1
    assert len(site.records.reports) == 1
    site.clock.seconds += 1
    assert shipper.turn() == 30
    assert len(site.records.reports) == 2


def test_a_cycle_that_takes_too_long_is_followed_at_once_and_misses_are_counted(site, monkeypatch):
    takes = [0]
    monkeypatch.setattr(Site, "keep_house", lambda self: self.clock.sleep(takes[0]))
    shipper = site.shipper()
    assert shipper.turn() == 30
    takes[0] = 70
    site.clock.seconds += 30
    assert shipper.turn() == 0
    assert (shipper.missed, site.records.misses) == (2, 2)


def test_the_time_that_a_first_copy_takes_is_no_missed_cycle(site, monkeypatch):
    monkeypatch.setattr(Site, "keep_house", lambda self: self.clock.sleep(70))
    shipper = site.shipper()
    assert shipper.turn() == 0
    assert shipper.missed == 0


def test_recoverable_errors_are_retried_by_the_ladder(site, caplog):
    shipper = site.shipper()
    shipper.turn()
    site.replica.fail_with = NoSpaceError("the store is full", hint="make room")
    site.clock.seconds += 30
    waits = [shipper.turn()]
    for _ in range(6):
        site.clock.seconds += waits[-1]
        waits.append(shipper.turn())
    assert waits == [60, 60, 120, 240, 120, 1800, 1800]
    assert (site.records.fields["error"], site.records.fields["hint"]) == ("the store is full", "make room")
    assert site.records.fields["state"] is ReplicationState.REPLICATING
    site.replica.fail_with = None
    site.clock.seconds += waits[-1]
    assert shipper.turn() == 30
    assert site.records.fields["error"] is None
    assert "the store is full" in caplog.text


def test_other_errors_wait_for_somebody_to_ask(site, caplog):
    shipper = site.shipper()
    shipper.turn()
    site.replica.fail_with = CorruptError("the store is damaged")
    site.clock.seconds += 30
    assert shipper.turn() == math.inf
    assert site.records.fields["state"] is ReplicationState.ERROR
    site.clock.seconds += 1e6
    assert shipper.turn() == math.inf
    site.replica.fail_with = None
    with running(shipper) as loop:
        assert shipper.request_cycle().cycle == 2
        assert site.records.fields["state"] is ReplicationState.REPLICATING
        loop.end()
    assert shipper.turn() == 30
    assert "the store is damaged" in caplog.text


def test_an_unreadable_image_is_an_error_of_ours(site, caplog):
    os.unlink(os.path.join(site.source.folder, "disk0.raw"))
    site.source.flush = lambda: None
    with pytest.raises(HvfuseError, match=r"disk0\.raw: No such file"):
        site.shipper().cycle_now()


class running:
    """The shipper's loop in a thread of its own."""

    def __init__(self, shipper: Shipper) -> None:
        self.stop_event = threading.Event()
        self.thread = threading.Thread(target=shipper.run, args=(self.stop_event,))

    def __enter__(self) -> "running":
        self.thread.start()
        return self

    def end(self) -> None:
        self.stop_event.set()
        self.thread.join()

    def __exit__(self, *_: object) -> None:
        self.end()


def test_the_control_socket_answers_cycle_status_and_stop(site, tmp_path):
    shipper = site.shipper()
    path = str(tmp_path / "shipper.sock")
    listener = shipper.listen(path)
    try:
        with running(shipper) as loop:
            site.write(1)
            first = wire.request(path, "cycle")
            second = wire.request(path, "cycle")
            assert second["cycle"] == first["cycle"] + 1
            assert second["point"] == site.replica.all_points[-1].id
            assert set(first) == {"ok", *CycleReport.__dataclass_fields__}
            status = wire.request(path, "status")
            assert (status["vm"], status["state"], status["error"]) == ("vm1", "Replicating", None)
            with pytest.raises(UsageError):
                wire.request(path, "dance")
            wire.request(path, "stop")
            loop.thread.join()
            with pytest.raises(UnreachableError, match="stopped"):
                wire.request(path, "cycle")
    finally:
        listener.close()


def test_a_request_is_answered_with_the_error_that_the_cycle_met(site, tmp_path, caplog):
    shipper = site.shipper()
    shipper.turn()
    path = str(tmp_path / "shipper.sock")
    listener = shipper.listen(path)
    try:
        with running(shipper):
            site.replica.fail_with = ResyncRequiredError("no way", hint="do that")
            with pytest.raises(ResyncRequiredError, match="no way") as caught:
                wire.request(path, "cycle")
            assert caught.value.hint == "do that"
            assert wire.request(path, "status")["state"] == "WaitingForStartResynchronize"
    finally:
        listener.close()
    assert "no way" in caplog.text


def test_a_stop_in_the_middle_ends_the_run_and_leaves_the_rest_for_later(site, monkeypatch):
    for disk in site.source.disks:
        disk.image[:] = random_bytes(2, len(disk.image))
    site.source.flush()
    stop = threading.Event()
    put = MemoryReplica.put

    def put_and_stop(replica: MemoryReplica, frame: bytes) -> None:
        put(replica, frame)
        stop.set()

    monkeypatch.setattr(MemoryReplica, "put", put_and_stop)
    shipper = site.shipper()
    shipper.run(stop)
    assert len(site.replica.puts) == 1
    assert site.records.states == [ReplicationState.INITIAL_REPLICATION_IN_PROGRESS]
    with pytest.raises(StoppedError):
        shipper.request_cycle()
    monkeypatch.setattr(MemoryReplica, "put", put)
    site.shipper().cycle_now()
    site.assert_equal()
    assert len(set(site.replica.puts)) == len(site.replica.puts)


def test_an_action_that_is_asked_for_is_done_by_the_loops_thread_once_for_all_who_ask(site, caplog):
    shipper = site.shipper()
    done, answers = [], []

    def action() -> dict:
        done.append(threading.current_thread())
        return {"done": len(done)}

    def fail() -> dict:
        raise NoSpaceError("no room", hint="make some")

    askers = [threading.Thread(target=lambda: answers.append(shipper.request(action))) for _ in range(3)]
    for asker in askers:
        asker.start()
    while len(shipper._requests) < 3:
        pass
    with running(shipper) as loop:
        for asker in askers:
            asker.join()
        assert (answers, done) == ([{"done": 1}] * 3, [loop.thread])
        with pytest.raises(NoSpaceError, match="no room"):
            shipper.request(fail)
        with pytest.raises(ZeroDivisionError):
            shipper.request(lambda: 1 // 0)
        assert shipper.request_cycle().cycle > 0, "the loop goes on"
    assert "a request failed" in caplog.text


def test_states_are_recorded_as_the_words_of_the_product(site):
    site.shipper().cycle_now()
    assert [str(state) for state in site.records.states] == ["InitialReplicationInProgress", "Replicating"]


def waiting(site: Site) -> Shipper:
    """A shipper whose VM needs a resynchronisation, which waits to be asked for."""
    policy = ShippingPolicy(frequency_seconds=30, resync=Resync(automatic=False))
    shipper = Shipper(
        vm="vm1", folder=site.source.folder, source=site.source, replica=site.replica, records=site.records,
        policy=CurrentPolicy(policy), clock=site.clock, housekeep=site.keep_house,
    )  # fmt: skip
    shipper.turn()
    site.source.resync_required = "changed offline"
    site.clock.seconds += 30
    shipper.turn()
    assert site.records.fields["state"] is ReplicationState.WAITING_FOR_START_RESYNCHRONIZE
    return shipper


def test_what_failed_while_a_copy_waited_is_not_told_for_ever(site):
    shipper = waiting(site)
    site.replica.fail_with = UnreachableError("away")
    site.clock.seconds += 30
    shipper.turn()
    assert site.records.fields["error"] == "away"
    site.replica.fail_with = None
    site.clock.seconds += 60
    shipper.turn()
    assert site.records.fields["error"] is None
    assert site.records.fields["state"] is ReplicationState.WAITING_FOR_START_RESYNCHRONIZE


def test_a_copy_that_waits_is_shown_as_waiting_again_after_an_error_was_mended(site):
    shipper = waiting(site)
    site.replica.fail_with = CorruptError("the store is damaged")
    site.clock.seconds += 30
    shipper.turn()
    assert site.records.fields["state"] is ReplicationState.ERROR
    site.replica.fail_with = None
    shipper.resume()
    shipper.turn()
    assert site.records.fields["state"] is ReplicationState.WAITING_FOR_START_RESYNCHRONIZE
    assert site.records.fields["error"] is None


def test_the_time_of_a_copy_that_passes_while_replication_is_suspended_wakes_nobody(site):
    shipper = site.shipper()
    due_ns = site.clock.now_ns() + 100 * 10**9
    site.records.update(orders=Orders(at_ns=due_ns))
    shipper.turn()
    assert site.records.fields["copy_due_ns"] == due_ns
    site.records.change_orders(Orders.pause)
    for _ in range(5):
        site.clock.seconds += 30
        assert shipper.turn() == 30
    assert site.records.fields["copy_due_ns"] is None
    site.records.change_orders(Orders.unpause)
    site.clock.seconds += 30
    shipper.turn()
    assert site.records.fields["state"] is ReplicationState.REPLICATING


def test_that_the_target_cannot_keep_house_is_told_once_and_shown_until_it_can(site, monkeypatch):
    errors, mended = [], False

    def keep_house() -> None:
        if not mended:
            raise CorruptError("a frame is damaged")

    monkeypatch.setattr(site, "keep_house", keep_house)
    shipper = site.shipper()
    update = site.records.update

    def told(**fields: object) -> None:
        errors.extend([fields["error"]] if "error" in fields else [])
        update(**fields)

    monkeypatch.setattr(site.records, "update", told)
    shipper.turn()
    errors.clear()
    for _ in range(3):
        site.clock.seconds += 30
        shipper.turn()
    assert set(errors) == {"a frame is damaged"}, "no cycle that succeeds takes it back"
    mended = True
    site.clock.seconds += 30
    shipper.turn()
    assert site.records.fields["error"] is None
