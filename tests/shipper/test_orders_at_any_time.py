"""Orders that come at any moment, with deaths and failures in between: what is shown agrees with what was ordered."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvfuse.control.job import COPY_KINDS, JobState
from hvfuse.control.records import Records
from hvfuse.errors import CorruptError, HvfuseError, UnreachableError
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.replication import CurrentPolicy, ShippingPolicy
from hvfuse.shipper.service import Shipper
from hvfuse.shipper.window import ALWAYS, Resync
from hvfuse.states import BEFORE_FIRST_COPY, COPYING, OF_RESYNC, Event, ReplicationState

from .logs import Killed, MemoryReplica, Tracked, random_bytes, tracked, write
from .test_service import Clock

MIB = 1 << 20
SUSPENDED = (ReplicationState.SUSPENDED, ReplicationState.RESYNCHRONIZE_SUSPENDED)
ROUNDS = 12
SEEDS = 20
POLICY = ShippingPolicy(frequency_seconds=30, resync=Resync(window=ALWAYS))


@dataclass
class Disturbed(MemoryReplica):
    """A replica in whose calls something happens now and then."""

    chance: random.Random = field(default_factory=random.Random)
    happens: list[Callable[[], None]] = field(default_factory=list)
    disturbances: float = 0.15

    def _disturb(self) -> None:
        if self.happens and self.chance.random() < self.disturbances:
            self.happens[0]()

    def position(self):
        self._disturb()
        return super().position()

    def begin(self, manifest):
        self._disturb()
        return super().begin(manifest)

    def put(self, frame):
        self._disturb()
        super().put(frame)

    def commit(self, manifest, frame_count):
        self._disturb()
        point = super().commit(manifest, frame_count)
        self._disturb()
        return point


class Story:
    """One VM, one administrator who types what comes to mind, and shippers that die."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        (folder / "disks").mkdir()
        self.source: Tracked = tracked(str(folder / "disks"), [2 * MIB, MIB], begun=False)
        self.source.disks[0].image[:9000] = random_bytes(seed, 9000)
        self.source.flush()
        self.replica = Disturbed(chance=self.chance)
        self.clock = Clock()
        self.records = Records(str(folder / "records"), clock=self.clock)
        self.records.apply("vm1", Event.ENABLE)
        self.told: list[str] = []
        self.shipper: Shipper | None = None

    def start(self) -> None:
        self.shipper = Shipper(
            vm="vm1", folder=self.source.folder, source=self.source, replica=self.replica,
            records=self.records.of("vm1"), policy=CurrentPolicy(POLICY), clock=self.clock,
        )  # fmt: skip

    def turn(self) -> None:
        if self.shipper is None:
            self.start()
        assert self.shipper is not None
        self.clock.seconds += self.chance.choice((1, 31, 3600))
        try:
            self.shipper.turn()
        except Killed:
            self.told.append("killed")
            self.shipper = None

    def happen(self) -> None:
        """A command, a death, or a failure."""
        what = self.chance.choice((*COMMANDS, *COMMANDS, "die", "fail", "break", "need resync", "write"))
        self.told.append(what)
        match what:
            case "die":
                raise Killed
            case "fail":
                raise UnreachableError("no answer")
            case "break":
                raise CorruptError("the store is damaged")
            case "need resync":
                if self.source.generation is not None:
                    self.source.resync_required = "changed offline"
            case "write":
                self.write()
            case _:
                with contextlib.suppress(HvfuseError):
                    self.order(what)

    def write(self) -> None:
        at = self.chance.randrange(MIB - 9000)
        self.source.disks[0].do(write(at, random_bytes(at, 9000)))

    def order(self, what: str) -> None:
        """As the commands do: by a shipper that listens, or in the records where none does. Raises HvfuseError."""
        if self.shipper is not None and self.chance.random() < 0.8:
            match what:
                case "pause":
                    self.shipper._order(Orders.pause)
                case "unpause":
                    self.shipper._order(Orders.unpause)
                case "resync" | "full":
                    self.shipper.order_resync(full=what == "full", at_ns=None)
                case "later":
                    self.shipper.order_resync(full=True, at_ns=self.clock.now_ns() + 7200 * 10**9)
                case _:
                    getattr(self.shipper, what)()
            return
        now_ns = self.clock.now_ns()
        match what:
            case "pause":
                self.records.apply("vm1", Event.SUSPEND)
                self.records.change_orders("vm1", Orders.pause)
            case "unpause" | "resume":
                self.records.change_orders("vm1", getattr(Orders, what))
                self.records.of("vm1").resume()
            case "resync" | "full" | "later":
                at_ns = now_ns + 7200 * 10**9 if what == "later" else None
                self.records.change_orders(
                    "vm1", lambda orders: orders.resynchronise(full=what != "resync", at_ns=at_ns, now_ns=now_ns)
                )
            case "suspend":
                self.records.change_orders("vm1", Orders.suspend)
            case _:
                assert what == "cancel"
                self.records.change_orders("vm1", Orders.cancel)
                with contextlib.suppress(HvfuseError):
                    self.records.apply("vm1", Event.CANCEL, copy=None, progress=None)

    def settle(self) -> None:
        """Nothing happens any more, until a shipper has nothing left to do at once."""
        self.replica.happens.clear()
        if self.chance.random() < 0.5:
            self.shipper = None
        elif self.shipper is not None:
            self.shipper._wake_up()  # as `hvfuse replication resume` does: what fails for good is tried again
        for _ in range(4):
            self.turn()
            self.clock.seconds += 31

    def check(self) -> None:
        """What is shown agrees with what was ordered, and jobs with both."""
        record, orders = self.records.read("vm1"), self.records.orders("vm1")
        open_jobs = [job for job in self.records.jobs.all() if job.kind in COPY_KINDS and not job.has_ended]
        said = f"{self.told[-12:]}: {record.state}, {orders}, {record.error}, {[(j.kind, j.state) for j in open_jobs]}"
        assert [job.id for job in open_jobs] == ([] if record.copy_job is None else [record.copy_job]), said
        assert record.error is None, said
        assert record.state not in COPYING, said
        if orders.paused:
            assert record.state in SUSPENDED, said
        elif record.state in SUSPENDED:
            assert orders.suspended, said
        if record.state is ReplicationState.REPLICATING:
            assert not open_jobs and record.copy is None and record.resync_reason is None, said
            assert self.replica.all_points[-1].id == record.point, said
        if record.state in BEFORE_FIRST_COPY | OF_RESYNC:
            assert orders.cancelled or orders.suspended or orders.paused or orders.at_ns is not None, said
        assert all(job.state in (JobState.SUSPENDED, JobState.NOT_STARTED) for job in open_jobs), said

    def end(self) -> None:
        """All is taken back: the replica becomes equal."""
        for change in (Orders.unpause, lambda orders: orders.resynchronise(full=False, at_ns=None, now_ns=0)):
            self.records.change_orders("vm1", change)
        self.settle()
        record = self.records.read("vm1")
        assert (record.state, record.error) == (ReplicationState.REPLICATING, None), self.told
        assert not [job for job in self.records.jobs.all() if job.kind in COPY_KINDS and not job.has_ended]
        for disk in self.source.disks:
            assert self.replica.images[disk.disk_id] == disk.image


COMMANDS = ("pause", "unpause", "suspend", "resume", "cancel", "resync", "full", "later")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_is_ordered_and_whoever_dies_what_is_shown_is_so(seed: int, tmp_path: Path) -> None:
    story = Story(tmp_path, seed)
    try:
        for _ in range(ROUNDS):
            story.replica.happens[:] = [story.happen]
            for _ in range(story.chance.randrange(1, 6)):
                with contextlib.suppress(HvfuseError, Killed):
                    if story.chance.random() < 0.3:
                        story.happen()
                story.turn()
            story.settle()
            story.check()
        story.end()
    finally:
        story.records.close()


def test_a_copy_whose_process_died_before_its_first_point_is_not_held_up_while_the_next_one_is_at_it(tmp_path):
    story = Story(tmp_path, 1)
    story.write()
    seen = []

    def die_at_the_point() -> None:
        if story.replica.stands is not None:
            raise Killed

    def look() -> None:
        (job,) = story.records.jobs.all()
        seen.append((job.state, job.percent, [step.state for step in job.steps]))

    try:
        story.replica.disturbances = 1.0
        story.replica.happens[:] = [die_at_the_point]
        story.turn()
        assert story.told == ["killed"]
        (job,) = story.records.jobs.all()
        story.records.jobs.change(job.id, lambda job: job.interrupt(story.clock.now_ns()))
        story.replica.happens[:] = [look]
        story.turn()
        assert seen[-2] == (JobState.IN_PROGRESS, 100, [JobState.SUCCEEDED, JobState.IN_PROGRESS])
        assert [job.state for job in story.records.jobs.all()] == [JobState.SUCCEEDED]
    finally:
        story.records.close()
