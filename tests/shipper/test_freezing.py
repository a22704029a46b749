"""Application-consistent points: when they are due, what is frozen for them, and what happens where that fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from hvfuse.consistency import Consistency
from hvfuse.errors import HvfuseError, UnreachableError
from hvfuse.shipper.compact import Compactor
from hvfuse.shipper.freezing import PAUSE, is_due
from hvfuse.shipper.guest import FreezeError, Stillness
from hvfuse.shipper.replication import CurrentPolicy, ShippingPolicy
from hvfuse.shipper.service import Shipper

from .logs import Killed, Tracked, random_bytes, tracked, write
from .test_service import MIB, Site

CRASH, APPLICATION = Consistency.CRASH, Consistency.APPLICATION
HOUR = 3600.0
NOW = 10**18


@pytest.mark.parametrize(
    ("every", "last", "failed_ago", "expected"),
    [
        (0, None, None, False),  # off
        (0, -100 * HOUR, None, False),
        (HOUR, None, None, True),  # never made one
        (HOUR, -HOUR + 0.001, None, False),
        (HOUR, -HOUR, None, True),
        (HOUR, -100 * HOUR, None, True),
        (HOUR, 0.0, None, False),
        (HOUR, 5.0, None, True),  # the clock was set back
        (HOUR, None, 0.0, False),  # failed just now
        (HOUR, -9 * HOUR, PAUSE - 1, False),
        (HOUR, -9 * HOUR, PAUSE, True),
        (HOUR, -60.0, 2 * PAUSE, False),  # due is due, whatever had failed
        (60.0, None, 14.9, False),  # a quarter of a short interval
        (60.0, None, 15.0, True),
    ],
)
def test_whether_a_point_is_due(every: float, last: float | None, failed_ago: float | None, expected: bool) -> None:
    last_ns = None if last is None else NOW + round(last * 1e9)
    assert is_due(every=every, last_ns=last_ns, now_ns=NOW, failed_ago=failed_ago) is expected


@dataclass
class ModelGuest:
    """A guest in memory. `refusal`: why it does not freeze; `breaks`: why it will turn out to have moved."""

    source: Tracked
    refusal: str | None = None
    breaks: str | None = None
    is_stuck: str | None = None
    is_frozen: bool = False
    tries: int = 0
    leftovers: int = 0
    frozen_at: list[int] = field(default_factory=list)

    @contextmanager
    def frozen(self) -> Iterator[Stillness]:
        self.tries += 1
        if self.refusal is not None:
            raise FreezeError(self.refusal)
        stillness = Stillness("proof")
        self.is_frozen = True
        self.frozen_at.append(self.source.cycle)
        try:
            yield stillness
        finally:
            self.is_frozen = False
            stillness.seconds = 0.25
            stillness.broken = self.breaks

    def thaw_leftover(self) -> None:
        self.leftovers += 1

    def stuck(self) -> str | None:
        return self.is_stuck


class Frozen(Site):
    """A site whose source follows the wall clock, and whose guest must stand still for nothing but a rotation."""

    def __init__(self, source: Tracked) -> None:
        super().__init__(source)
        self.guest = ModelGuest(source)
        self.every = HOUR
        self.proofs: list[str | None] = []
        rotate, put = source.rotate, self.replica.put

        def rotated(consistency: Consistency = CRASH, *, proof: str | None = None) -> int:
            assert self.guest.is_frozen is (consistency is APPLICATION)
            self.proofs.append(proof)
            source.now_ns = self.clock.now_ns() - 10**9  # it adds a second by itself
            return rotate(consistency, proof=proof)

        def sent(frame: bytes) -> None:
            assert not self.guest.is_frozen, "nothing but the rotation happens while the guest stands still"
            put(frame)

        source.rotate, self.replica.put = rotated, sent

    def shipper(self) -> Shipper:
        return Shipper(
            vm="vm1", folder=self.source.folder, source=self.source, replica=self.replica, records=self.records,
            policy=CurrentPolicy(ShippingPolicy(frequency_seconds=30, app_consistent=self.every)), clock=self.clock,
            housekeep=self.keep_house, guest=self.guest,
        )  # fmt: skip

    def kinds(self) -> list[Consistency]:
        return [point.consistency for point in self.replica.all_points]


@pytest.fixture
def site(tmp_path):
    return Frozen(tracked(str(tmp_path), [2 * MIB, MIB]))


@pytest.fixture
def joined(site):
    """After the first copy, and its point, which is application-consistent since there was none before."""
    site.source.begin(b"H" * 16, "full")
    site.shipper().synchronise()
    return site


def test_a_point_is_application_consistent_when_it_is_due_and_only_then(joined):
    shipper = joined.shipper()
    for _ in range(5):
        joined.write(1)
        report = shipper.cycle_now()
        joined.clock.seconds += HOUR / 2
        assert (report.consistency is APPLICATION) == (report.frozen_seconds == 0.25)
        assert report.freeze_error is None
    assert joined.kinds() == [APPLICATION, CRASH, APPLICATION, CRASH, APPLICATION]
    assert joined.proofs == ["proof", None, "proof", None, "proof"]
    assert [report.consistency for report in joined.records.reports] == joined.kinds()
    joined.assert_equal()


def test_when_the_last_one_was_is_known_after_a_restart(joined):
    assert joined.shipper().cycle_now().consistency is APPLICATION
    joined.clock.seconds += HOUR - 1
    assert joined.shipper().cycle_now().consistency is CRASH
    joined.clock.seconds += 1
    assert joined.shipper().cycle_now().consistency is APPLICATION


def test_without_a_policy_the_guest_is_never_touched(joined):
    joined.every = 0.0
    assert joined.shipper().cycle_now().consistency is CRASH
    assert joined.guest.tries == 0


def test_a_guest_that_does_not_freeze_costs_the_promise_and_not_the_point(joined, caplog):
    joined.guest.refusal = "the agent is asleep"
    shipper = joined.shipper()
    joined.write(1)
    report = shipper.cycle_now()
    assert (report.consistency, report.frozen_seconds, report.freeze_error) == (CRASH, 0.0, "the agent is asleep")
    assert joined.records.reports[-1].freeze_error == "the agent is asleep"
    assert joined.records.fields["guest_error"] == "the agent is asleep"
    assert "the agent is asleep" in caplog.text
    joined.assert_equal()
    joined.clock.seconds += PAUSE - 1
    report = shipper.cycle_now()
    assert (report.freeze_error, joined.guest.tries) == (None, 1), "a sick guest is left alone for a while"
    joined.guest.refusal = None
    joined.clock.seconds += 1
    assert shipper.cycle_now().consistency is APPLICATION
    assert [report.freeze_error is None for report in joined.records.reports] == [False, True, True]


def test_one_can_be_asked_for_although_none_is_due(joined):
    shipper = joined.shipper()
    shipper.cycle_now()
    assert shipper.cycle_now().consistency is CRASH
    assert shipper.cycle_now(application=True).consistency is APPLICATION
    assert shipper.cycle_now().consistency is CRASH
    joined.guest.refusal = "no"
    assert shipper.cycle_now(application=True).freeze_error == "no"
    joined.guest.refusal = None
    assert shipper.cycle_now(application=True).consistency is APPLICATION, "whoever asks does not wait"


def test_a_shipper_without_a_guest_says_so_when_it_is_asked(tmp_path):
    site = Site(tracked(str(tmp_path)))
    site.source.begin(b"H" * 16, "full")
    report = site.shipper().cycle_now(application=True)
    assert (report.consistency, report.freeze_error) == (CRASH, "nothing says how to freeze the guest")


def test_a_guest_that_turns_out_to_have_moved_takes_the_promise_back(joined):
    joined.guest.breaks = "it had thawed by itself"
    report = joined.shipper().cycle_now()
    assert (report.consistency, report.frozen_seconds) == (CRASH, 0.25)
    assert report.freeze_error == "it had thawed by itself"
    assert joined.kinds() == [CRASH]
    assert joined.records.last_app_consistent_ns() is None


def test_a_rotation_that_came_too_late_is_told(joined):
    rotate = joined.source.rotate

    def late(consistency: Consistency = CRASH, *, proof: str | None = None) -> int:
        joined.guest.is_frozen = False
        return rotate(CRASH, proof=proof)

    joined.source.rotate = late
    report = joined.shipper().cycle_now()
    assert report.consistency is CRASH
    assert "let go before" in report.freeze_error


def test_a_rotation_that_fails_lets_the_guest_go(joined):
    def fail(consistency: Consistency = CRASH, *, proof: str | None = None) -> int:
        raise UnreachableError("the tracker is gone")

    joined.source.rotate = fail
    with pytest.raises(HvfuseError):
        joined.shipper().cycle_now()
    assert joined.guest.tries == 1
    assert not joined.guest.is_frozen


def test_a_shipper_that_dies_between_sealing_and_shipping_keeps_the_promise(joined):
    joined.shipper().cycle_now()
    joined.clock.seconds += HOUR
    joined.write(1)
    joined.replica.die_at = -(len(joined.replica.puts) + 1)
    with pytest.raises(Killed):
        joined.shipper().cycle_now()
    joined.replica.die_at = None
    joined.guest.refusal = "not this time"
    joined.write(2)
    joined.shipper().cycle_now()
    joined.assert_equal()
    assert joined.kinds() == [APPLICATION, APPLICATION, CRASH]


def test_sealed_cycles_are_shipped_as_what_they_are(joined):
    joined.shipper().cycle_now()
    joined.write(1)
    joined.source.now_ns += 1
    with joined.guest.frozen():
        joined.source.rotate(APPLICATION)
    joined.source.rotate()
    joined.shipper().cycle_now()
    assert joined.kinds()[-3:] == [APPLICATION, CRASH, CRASH]


def test_points_of_an_outage_are_application_consistent_too(joined):
    shipper = joined.shipper()
    shipper.cycle_now()
    joined.replica.fail_with = UnreachableError("the target is away")
    for _ in range(3):
        joined.write(3)
        joined.clock.seconds += HOUR / 2
        shipper._replication.hold_out()
    joined.replica.fail_with = None
    shipper.cycle_now()
    assert joined.kinds() == [APPLICATION, CRASH, APPLICATION, CRASH, CRASH]


def test_a_compaction_keeps_what_its_last_cycle_promises(tmp_path):
    for last in (CRASH, APPLICATION):
        folder = tmp_path / last.name
        folder.mkdir()
        source = tracked(str(folder), [MIB, MIB])
        for consistency in (APPLICATION, CRASH, last):
            for disk in source.disks:
                disk.do(write(0, random_bytes(1, 900_000)))
            source.rotate(consistency)
        assert Compactor().relieve(source.cycles(), soft_limit=0.1) is not None
        (cycle,) = source.cycles()
        assert cycle.first_cycle == 1
        assert cycle.consistency is last


def test_a_guest_that_may_stand_still_is_shown_until_it_moves(joined):
    shipper = joined.shipper()
    joined.guest.is_stuck = "the agent does not answer"
    shipper.cycle_now()
    assert joined.records.fields["guest_stuck"] == "the agent does not answer"
    joined.guest.is_stuck = None
    shipper.cycle_now(application=True)
    assert joined.records.fields["guest_stuck"] is None


def test_what_an_earlier_shipper_left_frozen_is_thawed_first(joined):
    joined.records.update(guest_stuck="left by one who died")
    joined.shipper().thaw_leftover()
    assert joined.guest.leftovers == 1
    assert joined.records.fields["guest_stuck"] is None


def test_the_socket_takes_the_wish(joined):
    shipper = joined.shipper()
    shipper.cycle_now()
    answers = []
    for application in (False, True):
        action = shipper._asked_application_cycle if application else shipper._asked_cycle
        future = shipper._hand_over(action)
        shipper.turn()
        answers.append(future.result(5))
    assert [answer.consistency for answer in answers] == [CRASH, APPLICATION]
    assert answers[1].as_json()["consistency"] == "app-consistent"


def test_a_cycle_with_one_log_that_does_not_promise_is_crash_consistent(tmp_path):
    source = tracked(str(tmp_path), [MIB, MIB])
    source.rotate(APPLICATION)
    (cycle,) = source.cycles()
    assert cycle.consistency is APPLICATION
    first, second = cycle.logs
    broken = replace(cycle, logs=(first, replace(second, header=replace(second.header, flags=0))))
    assert broken.consistency is CRASH
