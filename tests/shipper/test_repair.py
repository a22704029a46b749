"""Repairs of what verification found to differ, ordered of a shipper: at once or for later, against the real tracker
and the real store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hvfuse.errors import HvfuseError, UsageError
from hvfuse.formats.digests import BLOCK
from hvfuse.shipper import proofs
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.replication import CurrentPolicy, ShippingPolicy
from hvfuse.shipper.service import Shipper
from hvfuse.shipper.source import TrackerSource
from hvfuse.states import ReplicationState
from hvfuse.target.local import LocalReplica

from .test_service import Clock
from .test_with_store import StoredHost

HOUR = 3600


class Damaged(StoredHost):
    """A VM that is replicated; verification found a block of its replica to differ."""

    def __init__(self, tmp_path) -> None:
        super().__init__(tmp_path)
        self.path = str(tmp_path / "proofs")
        self.clock = Clock()
        self.started()
        self.ship.turn()
        with open(self.store.image_path("vm1", "a.raw"), "r+b") as file:
            file.seek(5 * BLOCK)
            byte = file.read(1)
            file.seek(5 * BLOCK)
            file.write(bytes([byte[0] ^ 1]))
        self.verify()
        assert len(self.mismatches) == 1

    def started(self) -> Shipper:
        """A new shipper, as after a restart."""
        self.ship = Shipper(
            vm="vm1", folder=self.folder, source=TrackerSource(self.socket, self.folder),
            replica=LocalReplica(self.store, "vm1"), records=self.records, policy=CurrentPolicy(ShippingPolicy()),
            clock=self.clock,
            proofs_path=self.path,
        )  # fmt: skip
        # The test's thread is the loop's.
        self.ship.request = lambda action: action()
        return self.ship

    def verify(self, **options: object) -> list[dict]:
        told = self.ship.verify({"do": "begin", "share": 1.0, "seed": 1, **options})
        while not told["report"]["done"]:
            told = self.ship.verify({"do": "step", "run": told["run"]})
        return told["report"]["mismatches"]

    @property
    def mismatches(self) -> list[proofs.Mismatch]:
        return proofs.load(self.path).mismatches

    @property
    def orders(self) -> Orders:
        return self.records.orders()

    @property
    def points(self) -> list[str]:
        return [point.id for point in LocalReplica(self.store, "vm1").points()]

    def turns(self, count: int) -> None:
        for seed in range(count):
            self.vm.disks["b.raw"].write(bytes([seed + 1]) * 700, 3000)
            self.clock.seconds += 30
            self.ship.turn()

    def assert_sound(self) -> None:
        assert self.at(self.points[-1]) == self.images()
        assert self.records.fields["state"] is ReplicationState.REPLICATING


@pytest.fixture
def host(tmp_path) -> Iterator[Damaged]:
    found = Damaged(tmp_path)
    yield found
    found.ship._end()
    found.detach()
    found.store.close()


# For later ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_repair_for_later_leaves_replication_alone_until_then(host: Damaged, is_restarted: bool) -> None:
    at_ns = host.clock.now_ns() + HOUR * 10**9
    host.ship.order_resync(full=False, at_ns=at_ns)
    assert host.orders == Orders(at_ns=at_ns, repair=True)
    before = len(host.points)
    if is_restarted:
        host.ship._end()
        host.started()
    host.turns(3)
    assert len(host.points) == before + 3
    assert host.vm.status()["resync_required"] is None
    assert host.records.fields["copy_due_ns"] == at_ns
    assert host.orders == Orders(at_ns=at_ns, repair=True)
    host.clock.seconds = at_ns / 1e9 - 1
    host.ship.turn()
    assert host.ship.turn() == 1, "it wakes at that time"
    copies = len(host.records.copies)
    host.clock.seconds = at_ns / 1e9
    host.ship.turn()
    host.assert_sound()
    assert len(host.records.copies) == copies + 1 and host.records.copies[-1].regions == 1
    host.turns(2)
    assert (host.orders, host.records.fields["copy_due_ns"]) == (Orders(), None)
    assert len(host.records.copies) == copies + 1
    assert host.verify(only_mismatches=True) == [] == host.mismatches


def test_a_repair_for_later_that_is_cancelled_leaves_everything_as_it_was(host: Damaged) -> None:
    generation = host.vm.status()["generation"]
    host.ship.order_resync(full=False, at_ns=host.clock.now_ns() + HOUR * 10**9)
    host.turns(1)
    host.ship.cancel()
    assert host.orders == Orders()
    host.turns(1)
    before = len(host.points)
    host.clock.seconds += 2 * HOUR
    host.turns(2)
    assert len(host.points) == before + 2 and host.vm.status()["generation"] == generation
    assert len(host.mismatches) == 1
    with pytest.raises(UsageError, match="no copy to cancel"):
        host.ship.cancel()


def test_a_crash_before_the_time_is_resynchronised_at_once(host: Damaged) -> None:
    at_ns = host.clock.now_ns() + HOUR * 10**9
    host.ship.order_resync(full=False, at_ns=at_ns)
    host.lose_logs()
    host.vm.disks["b.raw"].write(b"x" * 700, 9000)
    host.turns(2)
    assert host.records.fields["state"] is ReplicationState.REPLICATING
    assert host.orders == Orders(at_ns=at_ns, repair=True)


def test_a_repair_for_later_can_be_begun_now_instead(host: Damaged) -> None:
    host.ship.order_resync(full=False, at_ns=host.clock.now_ns() + HOUR * 10**9)
    host.ship.order_resync(full=False, at_ns=None)
    host.ship.turn()
    host.assert_sound()
    host.turns(2)
    assert host.orders == Orders() and len(host.records.copies) == 2


def test_a_repair_that_was_made_in_the_meantime_is_not_made_again(host: Damaged) -> None:
    at_ns = host.clock.now_ns() + HOUR * 10**9
    host.ship.order_resync(full=False, at_ns=at_ns)
    host.turns(1)
    host.ship.verify({"do": "repair"})
    assert host.verify(only_mismatches=True) == [] == host.mismatches
    copies = len(host.records.copies)
    host.clock.seconds = at_ns / 1e9
    host.turns(2)
    host.assert_sound()
    assert host.orders == Orders() and len(host.records.copies) == copies


# At once ----------------------------------------------------------------------------------------------------


def test_a_repair_does_not_begin_what_was_ordered_for_later(host: Damaged) -> None:
    at_ns = host.clock.now_ns() + HOUR * 10**9
    host.ship.order_resync(full=True, at_ns=at_ns)
    host.turns(1)
    host.ship.verify({"do": "repair"})
    host.assert_sound()
    assert host.records.copies[-1].regions == 1, "what differed, and no more"
    host.turns(2)
    assert host.orders == Orders(at_ns=at_ns, full=True)
    assert host.records.copies[-1].regions == 1
    host.clock.seconds = at_ns / 1e9
    host.ship.turn()
    assert host.records.copies[-1].regions is None
    host.turns(2)
    assert host.orders == Orders()


def test_a_repair_does_not_take_a_suspension_back(host: Damaged) -> None:
    host.records.change_orders(Orders.suspend)
    generation = host.vm.status()["generation"]
    with pytest.raises(HvfuseError, match="suspended") as caught:
        host.ship.verify({"do": "repair"})
    assert caught.value.hint == "hvfuse resync vm1 --resume"
    before = len(host.points)
    host.turns(2)
    assert len(host.points) == before + 2, "nothing is in doubt that was not"
    assert host.orders == Orders(suspended=True) and host.vm.status()["generation"] == generation
    host.ship.resume()
    host.ship.verify({"do": "repair"})
    host.assert_sound()
    assert host.verify(only_mismatches=True) == [] == host.mismatches
    host.turns(1)
    assert host.orders == Orders()


# What is told meanwhile -------------------------------------------------------------------------------------


def copied(host: Damaged) -> list[bool]:
    return [each.is_copied(host.records.fields["generation"]) for each in host.mismatches]


@pytest.mark.parametrize("is_full", [False, True])
def test_what_was_copied_anew_is_not_told_to_differ_and_not_copied_again(host: Damaged, is_full: bool) -> None:
    assert copied(host) == [False]
    host.ship.order_resync(full=is_full, at_ns=None)
    assert copied(host) == [False]
    host.ship.turn()
    host.assert_sound()
    assert copied(host) == [True], "to be proved"
    with pytest.raises(UsageError, match="nothing to resynchronise"):
        host.turns(1)
        host.ship.order_resync(full=False, at_ns=None)
    assert host.verify() == [] == host.mismatches


def test_what_another_resynchronisation_did_not_look_at_still_differs(host: Damaged) -> None:
    host.lose_logs()
    host.vm.disks["b.raw"].write(b"x" * 700, 9000)
    host.turns(2)
    assert len(host.records.copies) == 2 and copied(host) == [False]
