"""Random lives of two homes that fail a VM over to each other, with crashes and returns at any moment.

Never are there two sides of which each could write the VM and keep what it wrote; never is a byte lost that was in the
point that was committed; and from wherever it got to, the story can be led to an end in which the VM is protected
again. Real processes and mounts; `tests.e2e.worlds` says what is checked after each step.

The seed is printed; HVFUSE_SEED repeats a run, as far as processes that run beside it allow. HVFUSE_EXAMPLES: how many
lives, of HVFUSE_STEPS steps each.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hvfuse.control.daemon import serving_pid
from hvfuse.states import FAILOVER_DONE, ReplicationState
from tests.e2e.conftest import mounts_below
from tests.e2e.two_homes import VM, Side
from tests.e2e.worlds import World

EXAMPLES = int(os.environ.get("HVFUSE_EXAMPLES", "1"))
STEPS = int(os.environ.get("HVFUSE_STEPS", "12"))
ROUNDS = 12
"""Of what it may take to lead a story to its end."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="mounts")


class Life(World):
    """What happens, at random."""

    def steps(self) -> list[tuple[int, Callable[[Side], None]]]:
        """Each with its weight."""
        return [
            (14, self.write_somewhere), (24, self.lead_on), (4, self.replicate), (6, self.run_or_end),
            (4, self.mount_or_not), (4, self.kill_a_process), (4, self.away_or_back), (2, self.cut_or_mend),
            (2, self.planned), (3, self.unplanned), (4, self.change_point), (3, self.cancel), (3, self.commit),
            (4, self.reverse), (3, self.try_out), (2, self.enable),
        ]  # fmt: skip

    def step(self) -> None:
        weights, acts = zip(*self.steps(), strict=True)
        act = self.random.choices(acts, weights)[0]
        act(self.random.choice([self.a, self.b]))

    def order(self, side: Side, verb: str, *words: str) -> int | None:
        """A command, which dies in the middle now and then; what it made of the world is seen after it."""
        killed_after = self.random.uniform(0.15, 1.2) if self.random.random() < 0.25 else None
        if side.is_away:
            return None
        code = self.hvfuse(side, *words, killed_after=killed_after)
        self.observe(side, verb, code)
        return code

    @property
    def other(self) -> Side:
        """Who does not have the VM."""
        return self.b if self.owner is self.a else self.a

    def mostly(self, side: Side) -> Side:
        return side if self.random.random() < 0.85 else self.other if side is self.owner else self.owner

    def write_somewhere(self, _: Side) -> None:
        for side in (self.a, self.b):
            if not side.is_away:
                self.observe()
                if not side.others:
                    self.write(side)
        self.observe()

    def lead_on(self, _: Side) -> None:
        """What an administrator would do next, so that a life goes round more than once."""
        owner, other = self.owner, self.other
        if any(seen.failover and not seen.failover.is_done for seen in self.stores.values()):
            self.commit(other)
        elif owner.record.state is ReplicationState.PREPARED_FOR_FAILOVER:
            self.order(other, "planned", "failover", "planned", VM, "--yes")
        elif owner.record.state is ReplicationState.REPLICATING and not owner.is_away:
            self.random.choice([self.replicate, self.planned, self.unplanned])(owner)
        elif owner.record.state not in FAILOVER_DONE:
            self.order(owner, "mount", "mount", VM)
            self.order(owner, "replicate", "replicate", VM)
        elif other.record.gave_way_ns is None:
            self.order(other, "reverse", "replication", "reverse", VM, "--yes")
        else:
            self.order(owner, "reverse", "replication", "reverse", VM, "--yes")

    def replicate(self, _: Side) -> None:
        self.order(self.mostly(self.owner), "replicate", "replicate", VM)

    def run_or_end(self, side: Side) -> None:
        if side.is_away:
            return
        if side.runs:
            self.end_run(side, self.random.choice([signal.SIGINT, signal.SIGKILL]))
        else:
            self.start_run(side)
            time.sleep(self.random.uniform(0, 4))
        self.observe()

    def mount_or_not(self, side: Side) -> None:
        self.order(side, "mount", "umount" if os.path.ismount(side.mnt) else "mount", VM)

    def kill_a_process(self, side: Side) -> None:
        role = self.random.choice(["tracker", "tracker", "shipper"])
        pid = None if side.is_away else serving_pid(side.socket.replace("tracker", role))
        if pid is not None:
            self.tell(f"{side.name}: kill -9 {role}")
            self.kill(pid)
        self.observe()

    def away_or_back(self, side: Side) -> None:
        (self.come_back if side.is_away else self.go_away)(side)
        self.observe()

    def cut_or_mend(self, _: Side) -> None:
        if self.link.exists():
            self.tell("B's store is out of reach for A")
            self.link.unlink()
        else:
            self.mend()
        self.observe()

    def mend(self) -> None:
        if not self.link.is_symlink():
            self.tell("A can reach B's store again")
            self.link.symlink_to(self.b.root)

    def planned(self, _: Side) -> None:
        self.order(self.mostly(self.owner), "planned", "failover", "planned", VM, "--yes")
        if self.owner.record.state is ReplicationState.PREPARED_FOR_FAILOVER and self.random.random() < 0.7:
            self.order(self.other, "planned", "failover", "planned", VM, "--yes")

    def unplanned(self, _: Side) -> None:
        self.order(self.mostly(self.other), "unplanned", "failover", "unplanned", VM, *self.a_point(), "--yes")

    def change_point(self, _: Side) -> None:
        words = self.a_point() or ["--point", "latest"]
        self.order(self.mostly(self.other), "change-point", "failover", "change-point", VM, *words, "--yes")

    def a_point(self) -> list[str]:
        points = self.stores[self.other.name].points
        kind = self.random.choice(["latest", "id", "time"])
        if kind == "latest" or not points:
            return []
        point, time_ns = self.random.choice(points)
        if kind == "id":
            return ["--point", point]
        return ["--point", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_ns // 10**9 + 1))]

    def cancel(self, side: Side) -> None:
        self.order(side, "cancel", "failover", "cancel", VM, "--yes")

    def commit(self, _: Side) -> None:
        wait = ["--wait"] if self.random.random() < 0.5 else []
        self.order(self.mostly(self.other), "commit", "failover", "commit", VM, "--yes", *wait)

    def reverse(self, side: Side) -> None:
        to = ["--to", str(self.root / "C" / "store")] if self.random.random() < 0.06 else []
        self.order(side, "reverse", "replication", "reverse", VM, "--yes", *to)

    def enable(self, _: Side) -> None:
        """Of a VM that is protected, or another's: always too much."""
        self.order(self.random.choice([self.a, self.b]), "enable", "replication", "enable", VM)

    def try_out(self, _: Side) -> None:
        """A test failover shows what the point is; it is cleaned up, or left for later."""
        side, points = self.other, self.stores[self.other.name].points
        if side.is_away or not points:
            return
        directory = self.root / f"test-{len(self.story)}"
        point = self.random.choice(points)[0]
        code = self.hvfuse(side, "failover", "test", VM, "--point", point, "--mount", str(directory))
        self.tests.append((side, directory))
        if code == 0:
            found = {path.name: path.read_bytes() for path in directory.iterdir()}
            assert found == self.points[side.name, point], f"a test of {point} shows something else"
        self.observe()
        if self.random.random() < 0.8:
            self.order(side, "cleanup", "failover", "cleanup", VM)

    # The end of the story -----------------------------------------------------------------------------------

    def end_well(self) -> None:
        """Both sides are there again; what has begun is led to its end: the VM is protected, and both are equal."""
        self.tell("the end: all is there again")
        self.mend()
        for side in (self.a, self.b):
            if side.is_away:
                self.come_back(side)
            if not side.runs:
                self.end_run(side, signal.SIGKILL)
                self.start_run(side)
        self.observe()
        for side in {side for side, _ in self.tests}:
            self.hvfuse(side, "failover", "cleanup", VM)
        for _ in range(ROUNDS):
            time.sleep(2.5)  # whoever has to look has looked
            self.observe()
            if self._is_led_on():
                return
        raise AssertionError(f"{self.owner.name} has the VM, {[(s.name, s.record.state) for s in self.sides.values()]}")

    def _is_led_on(self) -> bool:
        """Do what comes next, whatever has become of what was done before. Returns whether all is well."""
        owner, other = self.owner, self.other
        standing = [seen.failover for seen in self.stores.values() if seen.failover and not seen.failover.is_done]
        if standing:
            verb = self.random.choice(["commit", "cancel"])
            code = self.hvfuse(other, "failover", verb, VM, "--yes")
            self.observe(other, verb, code)
        elif owner.record.state is ReplicationState.PREPARED_FOR_FAILOVER:
            self.observe(owner, "cancel", self.hvfuse(owner, "failover", "cancel", VM, "--yes"))
        elif other.record.state is not ReplicationState.DISABLED and other.record.gave_way_ns is None:
            self.observe(other, "reverse", self.hvfuse(other, "replication", "reverse", VM, "--yes"))
        elif owner.record.state in FAILOVER_DONE or owner.record.state is ReplicationState.DISABLED:
            self.observe(owner, "reverse", self.hvfuse(owner, "replication", "reverse", VM, "--yes"))
        else:
            return self._is_protected(owner)
        return False

    def _is_protected(self, owner: Side) -> bool:
        self.write(owner)
        if self.hvfuse(owner, "replicate", VM) != 0:
            return False
        self.observe()
        name = self._store_of(owner)
        newest = self.stores[name].points[-1][0]
        assert self.points[name, newest] == owner.content == self.read(owner), "both sides are equal"
        assert owner.record.state is ReplicationState.REPLICATING
        return True

    def demand_no_traceback(self) -> None:
        for path, text in self.logs():
            assert "Traceback" not in text and "internal error" not in text, f"{path}\n{text[-3000:]}"


def live(root: Path, seed: int) -> None:
    """One life; the story is printed if it goes wrong."""
    life = Life(root, seed)
    try:
        life.begin()
        life.observe()
        for _ in range(STEPS):
            life.step()
        life.end_well()
        life.demand_no_traceback()
        print("\n".join(life.story))
    except BaseException:
        print("\n".join(life.story))
        for path, text in life.logs():
            print(f"--- {path}\n{text[-2500:]}")
        raise
    finally:
        life.close()


def test_no_life_has_two_primaries_or_loses_a_byte_or_is_a_dead_end(tmp_path: Path) -> None:
    first = int(os.environ.get("HVFUSE_SEED") or random.SystemRandom().randrange(1 << 32))
    for seed in range(first, first + EXAMPLES):
        print(f"HVFUSE_SEED={seed} repeats this life")
        live(tmp_path / str(seed), seed)
        assert mounts_below(tmp_path) == []
        shutil.rmtree(tmp_path / str(seed))
