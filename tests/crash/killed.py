"""A real process, really killed: SIGKILL at a random moment, between any two instructions.

The child is the host of `tests.crash.host` without any injector: tracker, shipper and store in one process.
It tells each barrier and each answered operation on its standard output. Who knows the seed knows what
the operations were, so the parent follows with its model, and takes over when the child is dead.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from typing import IO, Any

from hvfuse.tracker.vm import TrackedVm
from tests.crash.campaign import Fault, Violation, World, barrier_at
from tests.crash.host import Host, Reaper
from tests.crash.workload import DiskModel, Operation, draw

_ENDLESS = 1 << 30
_REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class KilledWorld(World):
    """A world whose one process is killed from outside, once a round."""

    def __init__(self, root: str, *, seed: str) -> None:
        super().__init__(root, seed=seed, records=False)
        self._seed = seed

    def _round(self, fault: Fault) -> None:
        del fault
        self.host.detach()
        self.host.close_target()
        try:
            in_flight = self._kill_one(f"{self._seed}/{self.tally.rounds}")
        finally:
            self.host.open_target()
        self.tally.deaths["kill -9"] += 1
        self._tracker_died(in_flight)
        self._ship()

    def _kill_one(self, seed: str) -> Operation:
        """Have a child work, follow it, and kill it. Returns the operation at which it was."""
        with subprocess.Popen(
            [sys.executable, "-m", "tests.crash.killed", self.host.root, str(self.host.seed), seed],
            stdout=subprocess.PIPE,
            text=True,
            cwd=_REPOSITORY,
        ) as child:
            assert child.stdout is not None
            answers = self._dice.randrange(1, 150)
            for operation in draw(random.Random(seed), self._disks, _ENDLESS, ships=True):
                if answers == 0:
                    child.kill()
                answers -= 1
                if not self._is_answered(child.stdout):
                    break
                self._apply(operation)
        if child.returncode != -signal.SIGKILL:
            raise Violation(f"the process ended by itself, with {child.returncode}")
        return operation

    def _is_answered(self, told: IO[str]) -> bool:
        for line in told:
            if line == "done\n":
                return True
            if line.endswith("\n"):
                generation, cycle = line.split()
                self._note_barrier((bytes.fromhex(generation), int(cycle)))
        return False


def work(root: str, host_seed: int, seed: str) -> None:
    """What the child does; it ends only by being killed."""

    def tell(line: str) -> None:
        os.write(sys.stdout.fileno(), f"{line}\n".encode())

    def asked(request: str, fields: dict[str, Any], vm: TrackedVm) -> None:
        del fields
        if request == "begin":
            raise Violation(f"the disks are copied anew: {vm.resync_reason or 'logs are missing'}")
        barrier = barrier_at(request, vm)
        if barrier is not None:
            tell(f"{barrier[0].hex()} {barrier[1]}")

    with Host(root, Reaper(), seed=host_seed, on_request=asked, records=False) as host:
        host.attach()
        disks = {name: DiskModel(bytearray(content)) for name, content in host.images().items()}
        for operation in draw(random.Random(seed), disks, _ENDLESS, ships=True):
            host.perform(operation)
            if operation.disk:
                disks[operation.disk].apply(operation)
            tell("done")


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), sys.argv[3])
