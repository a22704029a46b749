"""When copies start, and what an administrator's orders do to them, at every stage and across restarts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from hvfuse import wire
from hvfuse.errors import HvfuseError, UnreachableError, UsageError
from hvfuse.position import NO_DIGEST, Position
from hvfuse.shipper import permission
from hvfuse.shipper.copies import WaitingError
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.replication import CurrentPolicy, ShippingPolicy
from hvfuse.shipper.service import Shipper
from hvfuse.shipper.source import ResyncScope
from hvfuse.shipper.window import ALWAYS, NIGHT, Initial, Resync
from hvfuse.states import ReplicationState

from .logs import REGION, Killed, MemoryReplica, random_bytes, tracked, write
from .test_service import MIB, Site, running

State = ReplicationState
HOUR = 3600


@dataclass
class Meddled(MemoryReplica):
    """A replica at whose nth put something else happens, too; the frames that came are counted."""

    at: int | None = None
    act: Callable[[], object] | None = None
    bytes_put: int = 0

    def put(self, frame: bytes) -> None:
        super().put(frame)
        self.bytes_put += len(frame)
        if len(self.puts) == self.at:
            self.act()


@dataclass
class Ordered(Site):
    policy: ShippingPolicy = field(default_factory=ShippingPolicy)

    def shipper(self) -> Shipper:
        return Shipper(
            vm="vm1", folder=self.source.folder, source=self.source, replica=self.replica, records=self.records,
            policy=CurrentPolicy(self.policy), clock=self.clock, housekeep=self.keep_house,
        )  # fmt: skip

    @property
    def state(self) -> State:
        return self.records.fields["state"]

    def meddle(self, at: int, act: Callable[[], object]) -> None:
        self.replica.at, self.replica.act = len(self.replica.puts) + at, act

    def at_noon(self) -> None:
        """Some hour at which the window of the nights is closed, whatever the machine's time zone."""
        while NIGHT.is_open(self.clock.now_ns()):
            self.clock.seconds += HOUR

    def lose(self, regions: int) -> None:
        disk = self.source.disks[0]
        disk.do(write(0, random_bytes(int(self.clock.seconds), regions * REGION)))
        self.source.end_logging("the disk was full")
        self.source.flush()

    def doubt_everything(self) -> None:
        self.source.resync_required, self.source.scope = "the image was changed offline", ResyncScope.FULL
        for disk in self.source.disks:
            disk.do(write(100, random_bytes(int(self.clock.seconds), 5000)))
        self.source.flush()


def made(folder, *, copied: bool = False, **policy: object) -> Ordered:
    folder.mkdir(exist_ok=True)
    site = Ordered(
        tracked(str(folder), [2 * MIB, MIB], begun=False), replica=Meddled(), policy=ShippingPolicy(**policy)
    )
    for seed, disk in enumerate(site.source.disks):
        disk.image[:] = random_bytes(seed, len(disk.image))
    site.source.flush()
    site.at_noon()
    if copied:
        site.shipper().cycle_now()
        site.records.states, site.records.copies, site.replica.puts = [], [], []
    return site


@pytest.fixture
def new(tmp_path) -> Ordered:
    """A VM that was never copied."""
    return made(tmp_path / "vm")


@pytest.fixture
def replicating(tmp_path) -> Ordered:
    return made(tmp_path / "vm", copied=True)


# Windows and times -----------------------------------------------------------------------------------------


def test_a_resync_of_everything_waits_for_its_window_and_starts_when_that_opens(replicating):
    site = replicating
    site.doubt_everything()
    opening = NIGHT.next_opening_ns(site.clock.now_ns())
    shipper = site.shipper()
    for _ in range(5):
        assert shipper.turn() == 30, "it is no failure: no ladder"
        site.clock.seconds += 30
    assert (site.state, site.records.fields["error"]) == (State.WAITING_FOR_START_RESYNCHRONIZE, None)
    assert site.records.fields["copy_due_ns"] == opening
    assert site.records.fields["resync_reason"] == "the image was changed offline"
    assert not site.replica.puts and not site.records.copies
    site.clock.seconds = opening / 1e9 - 1
    shipper.turn()
    assert shipper.turn() == 1, "it wakes at that time"
    site.clock.seconds += 1
    shipper.turn()
    site.assert_equal()
    assert (site.state, site.records.fields["copy_due_ns"]) == (State.REPLICATING, None)
    assert len(site.replica.all_points) == 2


@pytest.mark.parametrize(("regions", "waits"), [(12, False), (13, True)])
def test_a_resync_of_a_quarter_of_the_disks_starts_at_any_time_of_the_day(replicating, monkeypatch, regions, waits):
    monkeypatch.setattr(permission, "AT_ONCE_BYTES", 0)
    site = replicating
    site.lose(regions)
    site.shipper().turn()
    assert (site.state is State.WAITING_FOR_START_RESYNCHRONIZE) == waits
    assert bool(site.records.copies) != waits


@pytest.mark.parametrize("how", ["cycle", "order", "window"])
def test_asking_starts_a_copy_that_waits_and_the_next_one_waits_again(replicating, how):
    site = replicating
    shipper = site.shipper()
    site.doubt_everything()
    shipper.turn()
    assert site.state is State.WAITING_FOR_START_RESYNCHRONIZE
    if how == "cycle":
        with running(shipper):
            assert shipper.request_cycle().cycle == 1
    elif how == "order":
        assert shipper.order_resync(full=False, at_ns=None) == Orders(now=True)
        shipper.turn()
    else:
        site.policy = dataclasses.replace(site.policy, resync=Resync(window=ALWAYS))
        shipper = site.shipper()
        shipper.turn()
    site.assert_equal()
    shipper.turn()
    assert site.records.orders() == Orders(), "taken back when the copy is complete"
    if how != "window":
        site.doubt_everything()
        site.clock.seconds += 30
        site.shipper().turn()
        assert site.state is State.WAITING_FOR_START_RESYNCHRONIZE


def test_resyncs_that_are_not_automatic_wait_to_be_asked_for(tmp_path):
    site = made(tmp_path / "vm", copied=True, resync=Resync(automatic=False, window=ALWAYS))
    site.lose(1)
    shipper = site.shipper()
    for _ in range(3):
        shipper.turn()
        site.clock.seconds += HOUR
    assert (site.state, site.records.fields["copy_due_ns"]) == (State.WAITING_FOR_START_RESYNCHRONIZE, None)
    shipper.order_resync(full=False, at_ns=None)
    shipper.turn()
    site.assert_equal()


def test_an_ordered_time_comes_before_the_window_and_survives_a_restart(replicating):
    site = replicating
    site.doubt_everything()
    at_ns = site.clock.now_ns() + 2 * HOUR * 10**9
    site.shipper().order_resync(full=False, at_ns=at_ns)
    site.shipper().turn()
    assert site.records.fields["copy_due_ns"] == at_ns
    site.clock.seconds += 2 * HOUR - 1
    site.shipper().turn()
    assert not site.records.copies
    site.clock.seconds += 1
    site.shipper().turn()
    site.assert_equal()
    assert site.records.orders() == Orders()


def test_the_first_copy_waits_for_its_time(tmp_path):
    site = made(tmp_path / "vm")
    at_ns = site.clock.now_ns() + HOUR * 10**9
    site.policy = ShippingPolicy(initial=Initial(at_ns=at_ns))
    shipper = site.shipper()
    shipper.turn()
    assert (site.state, site.records.fields["copy_due_ns"]) == (State.READY_FOR_INITIAL_REPLICATION, at_ns)
    assert site.source.generation is None
    site.clock.seconds += HOUR
    shipper.turn()
    site.assert_equal()
    assert site.records.states[-2:] == [State.INITIAL_REPLICATION_IN_PROGRESS, State.REPLICATING]


# Seeds -------------------------------------------------------------------------------------------------------


def test_a_policy_of_seeds_waits_until_the_replica_stands_somewhere_and_sends_only_what_differs(tmp_path):
    site = made(tmp_path / "vm", initial=Initial(how="seed"))
    shipper = site.shipper()
    shipper.turn()
    assert (site.state, site.records.fields["copy_due_ns"]) == (State.WAITING_FOR_INITIAL_REPLICATION, None)
    for disk in site.source.disks:  # an existing copy is adopted
        site.replica.images[disk.disk_id] = bytearray(disk.image)
    site.source.disks[0].image[MIB] ^= 1
    site.source.flush()
    site.replica.stands = Position(b"E" * 16, 0, NO_DIGEST)
    site.clock.seconds += 30
    shipper.turn()
    site.assert_equal()
    assert site.records.copies[-1].bytes_differing == REGION
    assert site.records.states[-2:] == [State.INITIAL_REPLICATION_IN_PROGRESS, State.REPLICATING]


def test_a_seed_is_waited_for_whoever_asks_and_cycles_follow_once_it_is_there(new):
    site = new
    generation = b"S" * 16
    site.source.begin(generation, ResyncScope.FULL)
    seed = {disk.disk_id: bytearray(disk.image) for disk in site.source.disks}
    site.records.update(orders=Orders(seed=generation.hex()))
    shipper = site.shipper()
    shipper.turn()
    assert site.state is State.WAITING_FOR_INITIAL_REPLICATION
    with pytest.raises(WaitingError, match="waits for a seed") as caught:
        shipper.cycle_now()
    assert "hvfuse seed import" in caught.value.hint and "hvfuse resync vm1 --now" in caught.value.hint
    site.write(1)
    site.replica.images, site.replica.stands = seed, Position(generation, 0, NO_DIGEST)
    site.clock.seconds += 30
    shipper.turn()
    site.assert_equal()
    assert (site.state, site.records.orders(), site.records.copies) == (State.REPLICATING, Orders(), [])
    assert not [put for put in site.replica.puts if put[1] == 0], "nothing was copied"


@pytest.mark.parametrize("initial", [Initial(), Initial(how="seed")])
def test_an_import_is_noticed_long_before_the_next_cycle_of_an_hourly_vm_is_due(tmp_path, initial):
    site = made(tmp_path / "vm", initial=initial, frequency_seconds=3600)
    if initial.how == "now":
        site.source.begin(b"S" * 16, ResyncScope.FULL)
        site.records.update(orders=Orders(seed=(b"S" * 16).hex()))
    shipper = site.shipper()
    for _ in range(30):
        assert shipper.turn() == 10
        site.clock.seconds += 10
    site.replica.images = {disk.disk_id: bytearray(disk.image) for disk in site.source.disks}
    site.replica.stands = Position(b"S" * 16, 0, NO_DIGEST)
    assert shipper.turn() > 3000
    site.assert_equal()
    assert site.state is State.REPLICATING


@pytest.mark.parametrize("was_restarted", [False, True])
def test_another_copy_than_the_seed_that_is_waited_for_voids_it_and_only_differences_travel(new, caplog, was_restarted):
    site = new
    site.source.begin(b"A" * 16, ResyncScope.FULL)
    older = {disk.disk_id: bytearray(disk.image) for disk in site.source.disks}
    site.write(1)
    site.source.begin(b"B" * 16, ResyncScope.FULL)
    site.records.update(orders=Orders(seed=(b"B" * 16).hex()))
    shipper = site.shipper()
    shipper.turn()
    assert site.state is State.WAITING_FOR_INITIAL_REPLICATION
    site.write(2)
    site.replica.images, site.replica.stands = older, Position(b"A" * 16, 0, NO_DIGEST)
    if was_restarted:
        shipper = site.shipper()
    site.clock.seconds += 30
    report = shipper.cycle_now()
    site.assert_equal()
    assert (site.state, site.records.orders()) == (State.REPLICATING, Orders())
    assert 0 < site.records.copies[-1].bytes_differing < MIB
    assert any("not at the seed that was exported" in note for note in report.notes)
    assert "not at the seed that was exported" in caplog.text


def test_who_gives_a_seed_up_orders_the_copy_over_the_network(new):
    site = new
    site.source.begin(b"S" * 16, ResyncScope.FULL)
    site.records.update(orders=Orders(seed=(b"S" * 16).hex()))
    shipper = site.shipper()
    shipper.turn()
    shipper.order_resync(full=False, at_ns=None)
    shipper.turn()
    site.assert_equal()


def test_while_a_copy_waits_logs_that_are_kept_are_sealed_now_and_then_and_others_are_not(new, tmp_path):
    site = new
    site.source.begin(b"S" * 16, ResyncScope.FULL)
    site.records.update(orders=Orders(seed=(b"S" * 16).hex()))
    shipper = site.shipper()
    for _ in range(2 * 120 + 1):
        shipper.turn()
        site.clock.seconds += 30
    assert 8 <= len(site.source.cycles()) <= 9, "each quarter of an hour of two hours"
    other = made(tmp_path / "other", copied=True)
    other.doubt_everything()
    rotated: list[int] = []
    other.source.rotate = lambda: rotated.append(1)
    shipper = other.shipper()
    for _ in range(60):
        shipper.turn()
        other.clock.seconds += 30
    assert not rotated


# Suspend, resume, cancel -------------------------------------------------------------------------------------


def begun(folder, kind: str) -> Ordered:
    """A VM that needs a copy of its own accord."""
    site = made(folder, copied=kind != "first copy", resync=Resync(window=ALWAYS))
    if kind == "regions":
        site.lose(20)
    elif kind == "everything":
        site.doubt_everything()
    return site


KINDS = ["first copy", "regions", "everything"]


@pytest.mark.parametrize("kind", KINDS)
def test_suspended_at_every_frame_a_copy_stays_so_until_it_is_resumed_and_goes_on_where_it_was(tmp_path, kind):
    at = 0
    while True:
        at += 1
        site = begun(tmp_path / str(at), kind)
        shipper = site.shipper()
        site.meddle(at, shipper.suspend)
        shipper.turn()
        if site.state is State.REPLICATING:
            break
        expected = State.SUSPENDED if kind == "first copy" else State.RESYNCHRONIZE_SUSPENDED
        assert site.state is expected and len(site.replica.puts) == at
        shipper = site.shipper()
        for _ in range(3):
            site.clock.seconds += 600
            shipper.turn()
        with pytest.raises(WaitingError, match="is suspended") as caught:
            shipper.cycle_now()
        assert caught.value.hint == "hvfuse resync vm1 --resume"
        assert site.state is expected and len(site.replica.puts) == at
        shipper.resume()
        shipper.turn()
        site.assert_equal()
        assert site.state is State.REPLICATING
        assert len(set(site.replica.puts)) == len(site.replica.puts)
        copied = site.records.copies[-1]
        assert copied.frames_sent == len([put for put in site.replica.puts if put[1] == 0])
    assert at > 2


@pytest.mark.parametrize("kind", KINDS)
def test_cancelled_at_every_frame_a_copy_leaves_nothing_and_waits_to_be_asked_for(tmp_path, kind):
    at = 0
    while True:
        at += 1
        site = begun(tmp_path / str(at), kind)
        points = list(site.replica.all_points)
        shipper = site.shipper()
        site.meddle(at, shipper.cancel)
        shipper.turn()
        if site.state is State.REPLICATING:
            break
        expected = (
            State.READY_FOR_INITIAL_REPLICATION if kind == "first copy" else State.WAITING_FOR_START_RESYNCHRONIZE
        )
        assert site.state is expected and not site.replica.staged
        assert site.records.fields["copy"] is site.records.fields["progress"] is None
        shipper = site.shipper()
        for _ in range(3):
            site.clock.seconds += 24 * HOUR
            shipper.turn()
        assert site.state is expected and len(site.replica.puts) == at and site.replica.all_points == points
        shipper.order_resync(full=False, at_ns=None)
        site.replica.puts, site.replica.at = [], None
        shipper.turn()
        site.assert_equal()
        assert site.records.orders() == Orders()
    assert at > 2


def test_a_copy_that_was_cancelled_while_no_shipper_ran_is_dropped_by_the_next(tmp_path):
    site = begun(tmp_path / "vm", "everything")
    site.meddle(1, lambda: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        site.shipper().turn()
    assert site.replica.staged
    site.records.change_orders(Orders.cancel)
    site.shipper().turn()
    assert not site.replica.staged and site.state is State.WAITING_FOR_START_RESYNCHRONIZE


def test_before_a_copy_begins_it_can_be_suspended_too_and_nothing_at_all_is_sent(replicating):
    site = replicating
    site.source.rotate()
    site.source.crash("the host died", hot=[3])
    site.source.flush()
    shipper = site.shipper()
    shipper.suspend()
    shipper.turn()
    assert (site.state, site.replica.puts) == (State.RESYNCHRONIZE_SUSPENDED, [])
    assert len(site.replica.all_points) == 1
    shipper.resume()
    shipper.turn()
    site.assert_equal()
    assert len(site.replica.all_points) == 3, "what was sealed whole became a point first"


def test_orders_that_make_no_sense_are_refused_and_leave_no_trace(replicating):
    site = replicating
    shipper = site.shipper()
    shipper.turn()
    now_ns = site.clock.now_ns()
    for order, text in [
        (shipper.suspend, "no copy to suspend"),
        (shipper.cancel, "no copy to cancel"),
        (lambda: shipper.order_resync(full=False, at_ns=None), "nothing to resynchronise"),
        (lambda: shipper.order_resync(full=True, at_ns=now_ns - 1), "over already"),
        (lambda: shipper.order_resync(full=True, at_ns=now_ns + 8 * 86400 * 10**9), "7 days"),
    ]:
        with pytest.raises(UsageError, match=text):
            order()
    with pytest.raises(UsageError) as caught:
        shipper.order_resync(full=False, at_ns=None)
    assert caught.value.hint == "hvfuse resync vm1 --full"
    assert site.records.orders() == Orders()
    site.lose(1)
    errors: list[HvfuseError] = []

    def order_time() -> None:
        with pytest.raises(UsageError, match="under way already") as refused:
            shipper.order_resync(full=False, at_ns=now_ns + 10**9)
        errors.append(refused.value)

    site.meddle(1, order_time)
    site.clock.seconds += 30
    shipper.turn()
    assert errors and site.state is State.REPLICATING


# Everything, although nothing is in doubt --------------------------------------------------------------------


def test_a_full_comparison_of_a_vm_that_replicates_finds_what_nobody_knew_of_and_keeps_the_points(replicating):
    site = replicating
    shipper = site.shipper()
    shipper.turn()
    points, generation = list(site.replica.all_points), site.source.generation
    site.replica.images[site.source.disks[1].disk_id][77] ^= 1
    assert shipper.order_resync(full=True, at_ns=None) == Orders(now=True, full=True)
    shipper.turn()
    site.assert_equal()
    assert site.source.generation != generation
    copied = site.records.copies[-1]
    assert (copied.regions, copied.bytes_compared, copied.bytes_differing) == (None, 3 * MIB, REGION)
    assert site.replica.all_points[: len(points)] == points
    site.clock.seconds += 30
    shipper.turn()
    assert (site.records.orders(), len(site.records.copies)) == (Orders(), 1)


def test_a_full_comparison_at_a_time_does_not_keep_cycles_or_needed_resyncs_waiting(replicating):
    site = replicating
    shipper = site.shipper()
    shipper.turn()
    at_ns = site.clock.now_ns() + 2 * HOUR * 10**9
    shipper.order_resync(full=True, at_ns=at_ns)
    points = len(site.replica.all_points)
    for _ in range(3):
        shipper.turn()
        site.clock.seconds += 30
    assert (site.state, site.records.fields["copy_due_ns"]) == (State.REPLICATING, at_ns)
    assert len(site.replica.all_points) == points + 3
    site.lose(1)
    shipper.turn()
    assert (site.state, site.records.copies[-1].regions) == (State.REPLICATING, 1)
    assert site.records.orders() == Orders(full=True, at_ns=at_ns)
    site.clock.seconds = at_ns / 1e9
    shipper.turn()
    site.assert_equal()
    assert site.records.copies[-1].regions is None
    shipper.turn()
    assert site.records.fields["copy_due_ns"] is None
    site.clock.seconds += 30
    shipper.turn()
    assert site.records.orders() == Orders()


def test_a_full_comparison_that_is_ordered_for_later_can_be_begun_now_and_cancelled(replicating):
    site = replicating
    shipper = site.shipper()
    shipper.turn()
    at_ns = site.clock.now_ns() + 2 * HOUR * 10**9
    shipper.order_resync(full=True, at_ns=at_ns)
    shipper.cancel()
    assert site.records.orders() == Orders(), "and nothing keeps a copy that is needed meanwhile waiting"
    shipper.order_resync(full=True, at_ns=at_ns)
    shipper.turn()
    assert not site.records.copies
    shipper.order_resync(full=False, at_ns=None)
    shipper.turn()
    site.assert_equal()
    assert (len(site.records.copies), site.records.copies[-1].regions) == (1, None)
    site.clock.seconds = at_ns / 1e9
    shipper.turn()
    assert (len(site.records.copies), site.records.orders()) == (1, Orders())


def test_killed_anywhere_a_full_comparison_that_was_ordered_is_made_once(tmp_path):
    at, was_killed = 0, True
    while was_killed:
        at += 1
        site = made(tmp_path / str(at), copied=True)
        shipper = site.shipper()
        shipper.turn()
        site.replica.images[site.source.disks[1].disk_id][77] ^= 1
        shipper.order_resync(full=True, at_ns=None)
        site.replica.die_at = len(site.replica.puts) + at
        try:
            shipper.turn()
            was_killed = False
        except Killed:
            site.replica.die_at = None
            site.shipper().turn()
        site.assert_equal()
        generation = site.source.generation
        site.clock.seconds += 30
        site.shipper().turn()
        assert site.source.generation == generation and len(site.records.copies) == 1
        assert site.records.orders() == Orders()
    assert at > 3


def test_during_a_resync_of_regions_everything_can_be_ordered_instead(tmp_path):
    site = begun(tmp_path / "vm", "regions")
    shipper = site.shipper()
    site.meddle(1, shipper.suspend)
    shipper.turn()
    site.replica.images[site.source.disks[1].disk_id][77] ^= 1
    shipper.order_resync(full=True, at_ns=None)
    shipper.turn()
    site.assert_equal()
    assert site.records.copies[-1].regions is None


def test_everything_that_is_ordered_while_it_is_compared_is_not_compared_twice(tmp_path):
    site = begun(tmp_path / "vm", "everything")
    shipper = site.shipper()
    site.meddle(1, lambda: shipper.order_resync(full=True, at_ns=None))
    for _ in range(3):
        shipper.turn()
        site.clock.seconds += 30
    site.assert_equal()
    assert (len(site.records.copies), site.records.orders()) == (1, Orders())


def test_what_an_attempt_failed_at_is_not_shown_any_more_once_the_copy_goes_on(tmp_path, caplog):
    site = begun(tmp_path / "vm", "everything")
    shipper = site.shipper()
    site.replica.fail_with = UnreachableError("the target is away")
    shipper.turn()
    assert site.records.fields["error"] == "the target is away"
    site.replica.fail_with = None
    site.meddle(1, lambda: errors.append(site.records.fields["error"]))
    errors: list[object] = []
    site.clock.seconds += 60
    shipper.turn()
    assert errors == [None] and site.state is State.REPLICATING
    assert "the target is away" in caplog.text


# Over the socket, and figures ---------------------------------------------------------------------------------


def test_orders_come_over_the_socket_and_are_obeyed_in_the_middle_of_a_copy(new, tmp_path):
    site = new
    shipper = site.shipper()
    path = str(tmp_path / "shipper.sock")
    answers: list[dict] = []
    site.meddle(1, lambda: answers.append(wire.request(path, "suspend")))
    listener = shipper.listen(path)
    try:
        with running(shipper):
            with pytest.raises(HvfuseError, match="is suspended"):
                wire.request(path, "cycle")
            assert answers[0]["orders"]["suspended"] is True
            assert wire.request(path, "status")["state"] == "Suspended"
            assert wire.request(path, "resume")["orders"]["suspended"] is False
            wire.request(path, "cycle")
            assert wire.request(path, "status")["state"] == "Replicating"
            with pytest.raises(UsageError, match="nothing to resynchronise"):
                wire.request(path, "resync", full=False, at_ns=None)
            for wrong in ("soon", 1.5, True):
                with pytest.raises(UsageError):
                    wire.request(path, "resync", full=True, at_ns=wrong)
            assert wire.request(path, "resync", full=True, at_ns=None)["orders"]["full"] is True
            wire.request(path, "cycle")
            with pytest.raises(UsageError, match="no copy to cancel"):
                wire.request(path, "cancel")
    finally:
        listener.close()
    site.assert_equal()
    assert len(site.records.copies) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["killed", "suspended"])
def test_figures_are_of_all_runs_of_a_copy(tmp_path, kind, how):
    site = begun(tmp_path / "vm", kind)
    shown: list[dict] = []
    update = site.records.update

    def noted(**fields: object) -> None:
        update(**fields)
        if fields.get("copy"):
            shown.append(dict(fields["copy"]))

    site.records.update = noted
    put = site.replica.put

    def slow_put(frame: bytes) -> None:
        site.clock.seconds += 2
        put(frame)

    site.replica.put = slow_put
    before, runs = site.replica.bytes_put, 0
    while site.records.fields.get("state") is not State.REPLICATING or not site.records.copies:
        runs += 1
        shipper = site.shipper()

        def end(shipper: Shipper = shipper) -> None:
            if how == "killed":
                raise Killed
            shipper.suspend()

        site.meddle(1, end)
        try:
            shipper.turn()
        except Killed:
            pass
        site.records.change_orders(Orders.resume)
    assert runs > 2
    copied = site.records.copies[-1]
    frames = [put for put in site.replica.puts if put[1] == 0]
    assert copied.frames_sent == len(frames)
    assert copied.bytes_compared == (None if kind == "first copy" else 20 * REGION if kind == "regions" else 3 * MIB)
    if how == "suspended":
        assert copied.bytes_sent <= site.replica.bytes_put - before
        assert copied.seconds == 2 * len(frames)
    assert {each["pass"] for each in shown} == {1}
    assert len({each["generation"] for each in shown}) == 1
    for figure in ("bytes_done", "bytes_sent", "seconds"):
        values = [each[figure] for each in shown]
        assert values == sorted(values), f"{figure} only grows"
    last = shown[-1]
    assert last["bytes_done"] == last["bytes_total"] and last["kind"] == (
        "initial" if kind == "first copy" else "resync"
    )
    assert last["bytes_saved"] == max(0, last["bytes_done"] - last["bytes_sent"])
    assert site.records.fields["copy"] is None
