"""tools/resync against rsync and cmp, on the same files, in turns; medians.

Every program runs as its user would run it, start-up included, with the files in the page cache:

    rsync   rsync -I --inplace --no-whole-file SOURCE REPLICA
            -I, since it would otherwise believe that files of the same size and time are equal
    cmp     cmp SOURCE REPLICA: reads both images once and compares them
    ours    tools/resync SOURCE REPLICA

The first round is not counted: it fills the caches, Python's of compiled modules among them, which is kept for all
programs as for a user's (PYTHONDONTWRITEBYTECODE is not handed on). From then on the order changes from round to round.
Before each run on changed images the same blocks of the replica are changed anew, and synced. The rows on sparse
disks copy one GiB of data to a file that does not exist yet. Bytes read are what the process asked the kernel for,
its own program included (rchar of /proc/PID/io); memory is its peak resident size (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

RESYNC = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "resync")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
MIB, GIB = 1 << 20, 1 << 30
BLOCK = 64 << 10


@dataclass(frozen=True)
class Run:
    """What one process took. `read`: bytes; `peak`: bytes."""

    seconds: float
    read: int
    peak: int


def run(*command: str, expected: int) -> Run:
    """Run a command; ends the program if it ends with another code than `expected`."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seconds = time.perf_counter() - started
    with open(f"/proc/{process.pid}/io", encoding="ascii") as file:  # it has ended, but is not yet reaped
        read = int(file.readline().split()[1])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expected:
        sys.exit(f"{' '.join(command)}: ended with {process.returncode}, not {expected}")
    return Run(seconds, read, usage.ru_maxrss * 1024)


class Pair:
    """Two equal images, a share of whose blocks can be made to differ."""

    def __init__(self, folder: str, size: int, *, changed: float) -> None:
        self.source, self.replica = os.path.join(folder, "source.raw"), os.path.join(folder, "replica.raw")
        with open(self.source, "wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
        shutil.copyfile(self.source, self.replica)
        blocks = size // BLOCK
        self._blocks = random.Random(1).sample(range(blocks), max(1, round(blocks * changed)))
        self.settle()

    def spoil(self) -> None:
        """Change 4 KiB in each of the chosen blocks of the replica."""
        with open(self.replica, "r+b") as file:
            for block in self._blocks:
                file.seek(block * BLOCK + 8192)
                file.write(os.urandom(4096))
        self.settle()

    def remove(self) -> None:
        """Make room in the page cache."""
        os.unlink(self.source)
        os.unlink(self.replica)

    def settle(self) -> None:
        """Let no program pay for what another wrote."""
        os.sync()

    def ours(self, expected: int) -> Run:
        """Our turn."""
        return run(RESYNC, self.source, self.replica, expected=expected)

    def rsync(self) -> Run:
        """The peer's turn."""
        return run("rsync", "-I", "--inplace", "--no-whole-file", self.source, self.replica, expected=0)

    def cmp(self) -> Run:
        """The reading limit."""
        return run("cmp", self.source, self.replica, expected=0)


def row(subject: str, peer: float, ours: float, *, unit: str, ratio: float, target: float | None) -> dict[str, object]:
    """One row of the table."""
    return {
        "subject": subject, "peer": round(peer, 3), "hvfuse": round(ours, 3), "unit": unit, "ratio": round(ratio, 3),
        "target": target,
    }  # fmt: skip


def spread(times: list[float]) -> str:
    """The range of some times, in words."""
    return f"{min(times):.2f}-{max(times):.2f} s"


def compared(subject: str, peer: list[float], ours: list[float], target: float) -> dict[str, object]:
    """A row of times: the ratio is the peer's median to ours."""
    theirs, mine = statistics.median(peer), statistics.median(ours)
    return row(
        f"{subject} ({spread(peer)} / {spread(ours)})", theirs, mine, unit="s", ratio=theirs / mine, target=target
    )


def in_turns(rounds: int, *runs: Callable[[], float]) -> list[list[float]]:
    """The times of each of `runs`, one after the other in each of the rounds, every other round backwards: none is
    always the first. A round before them is not counted, unless it is the only one: `rounds` 0."""
    first = [one() for one in runs]
    if not rounds:
        return [[seconds] for seconds in first]
    times: list[list[float]] = [[] for _ in runs]
    turns = list(zip(runs, times, strict=True))
    for nth in range(rounds):
        for one, found in reversed(turns) if nth % 2 else turns:
            found.append(one())
    return times


def equal_and_changed(folder: str, size: int, rounds: int) -> list[dict[str, object]]:
    """Unchanged images, and 1 % of the blocks changed."""
    pair = Pair(folder, size, changed=0.01)
    rsync, cmp, ours = in_turns(
        rounds, lambda: pair.rsync().seconds, lambda: pair.cmp().seconds, lambda: pair.ours(0).seconds
    )
    name = f"{size // MIB} MiB unchanged"
    found = [compared(f"{name}: rsync", rsync, ours, 3.0), compared(f"{name}: cmp", cmp, ours, round(1 / 1.5, 3))]

    def after_spoiling(turn: Callable[[], Run]) -> Callable[[], float]:
        def spoilt() -> float:
            pair.spoil()
            seconds = turn().seconds
            pair.cmp()  # ends the program unless they are equal
            return seconds

        return spoilt

    rsync, ours = in_turns(rounds, after_spoiling(pair.rsync), after_spoiling(lambda: pair.ours(1)))
    found.append(compared(f"{size // MIB} MiB, 1 % of the blocks changed: rsync", rsync, ours, 3.0))
    pair.remove()
    return found


def sparse(folder: str, data: int, sizes: tuple[int, int], rounds: int) -> list[dict[str, object]]:
    """The same data on a small and a large sparse disk, copied to a new file."""
    sources = [os.path.join(folder, f"sparse-{size // GIB}.raw") for size in sizes]
    replica = os.path.join(folder, "sparse-replica.raw")
    chunks = max(1, data // (16 * MIB))
    for source, size in zip(sources, sizes, strict=True):
        dice = random.Random(1)
        with open(source, "wb") as file:
            for nth in range(chunks):
                file.seek(size // chunks * nth // BLOCK * BLOCK)
                file.write(dice.randbytes(data // chunks))
            file.truncate(size)
    last: dict[str, Run] = {}

    def copy(source: str) -> Callable[[], float]:
        def once() -> float:
            if os.path.exists(replica):
                os.unlink(replica)
            os.sync()
            last[source] = run(RESYNC, source, replica, expected=1)
            return last[source].seconds

        return once

    small, large = in_turns(rounds, *map(copy, sources))
    names = [f"{size // GIB} GiB" if size < 1024 * GIB else f"{size // (1024 * GIB)} TiB" for size in sizes]
    subject = f"{data // MIB} MiB of data copied: on {names[0]} / on {names[1]}"
    found = [compared(subject, small, large, round(1 / 1.2, 3))]
    for source, name in zip(sources, names, strict=True):
        read, peak = last[source].read / MIB, last[source].peak / MIB
        limit = 1.1 * data / MIB
        found.append(
            row(
                f"{name}: limit / bytes read, replica's included",
                limit,
                read,
                unit="MiB",
                ratio=limit / read,
                target=1.0,
            )
        )
        found.append(row(f"{name}: limit / peak memory", 300, peak, unit="MiB", ratio=300 / peak, target=1.0))
    return found


def show(rows: list[dict[str, object]]) -> None:
    """The table."""
    width = max(len(str(one["subject"])) for one in rows)
    print(f"{'subject':<{width}} {'peer':>9} {'hvfuse':>9} {'unit':<4} {'ratio':>6} {'target':>6}")
    for one in rows:
        target = one["target"]
        met = "" if target is None else "  met" if float(str(one["ratio"])) >= float(str(target)) else "  MISSED"
        print(
            f"{one['subject']!s:<{width}} {one['peer']:>9} {one['hvfuse']:>9} {one['unit']:<4} {one['ratio']:>6} "
            f"{target if target is not None else '':>6}{met}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=["resync"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="small files, one cold round: whether it works, not how fast"
    )
    parser.add_argument("--size", type=int, default=4096, metavar="MIB", help="of the images (default: 4096)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: 5)")
    parser.add_argument("--folder", help="where the files are made (default: the directory for temporary files)")
    arguments = parser.parse_args()
    size, rounds, data = arguments.size * MIB, arguments.rounds, GIB
    if arguments.quick:
        size, rounds, data = 32 * MIB, 0, 32 * MIB
    with tempfile.TemporaryDirectory(prefix="hvfuse-bench-", dir=arguments.folder) as folder:
        rows = equal_and_changed(folder, size, rounds)
        rows += sparse(folder, data, (10 * GIB, 1024 * GIB), rounds)
    if arguments.json:
        print(json.dumps({"rows": rows}))
    else:
        show(rows)


if __name__ == "__main__":
    main()
