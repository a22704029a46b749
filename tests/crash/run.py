"""The campaign from the command line: so many rounds, one line of verdict."""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields

from hvfuse import system
from tests.crash.campaign import WORLD, Tally, Violation, World
from tests.crash.host import FAST_FOLDER
from tests.crash.killed import KilledWorld

KILLED_EVERY = 8
"""Of so many worlds one is of real processes, which take longer: it has fewer rounds."""
KILLED_ROUNDS = 2


class State:
    """How far a campaign has come: worlds done, and what they add up to. Kept in a file, if there is one."""

    def __init__(self, path: str | None, *, seed: int | None) -> None:
        self._path = path
        self.worlds = 0
        self.seconds = 0.0
        self.tally = Tally()
        kept = {}
        if path is not None and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                kept = json.load(file)
            if seed not in (None, kept["seed"]):
                raise SystemExit(f"crashtest: {path} is of seed {kept['seed']}, not {seed}")
            self.worlds, self.seconds, self.tally = kept["worlds"], kept["seconds"], Tally.from_json(kept["tally"])
        self.seed: int = kept.get("seed", secrets.randbelow(10**9) if seed is None else seed)

    def save(self) -> None:
        """Keep it, durably."""
        if self._path is not None:
            kept = {
                "seed": self.seed,
                "worlds": self.worlds,
                "seconds": self.seconds,
                "tally": {each.name: getattr(self.tally, each.name) for each in fields(Tally)},
            }
            system.replace_file("crashtest", os.path.abspath(self._path), json.dumps(kept).encode())

    def verdict(self, broken: str | None) -> str:
        """One line."""
        tally = self.tally
        deaths = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.deaths.items()))
        return (
            f"crashtest: {'FAILED' if broken else 'all promises kept'}: {tally.rounds} rounds, seed {self.seed}: "
            f"{deaths} (at {len(tally.labels)} kinds of calls); {tally.copies} first copies, no other, "
            f"{tally.resyncs} resynchronisations of {tally.bytes_in_doubt >> 20} MiB; "
            f"{tally.points} recovery points and disks, {tally.bytes_compared / 2**30:.1f} GiB, compared "
            f"in {self.seconds:.0f} s{f'; {broken}' if broken else ''}"
        )


def run_world(seed: int, number: int, *, rounds: int, folder: str | None) -> Tally:
    """One world in a folder of its own. Raises Violation."""
    root = tempfile.mkdtemp(prefix="hvfuse-crash-", dir=folder)
    try:
        if number % KILLED_EVERY == KILLED_EVERY - 1:
            return KilledWorld(root, seed=f"{seed}/{number}").run(min(rounds, KILLED_ROUNDS))
        return World(root, seed=f"{seed}/{number}").run(rounds)
    finally:
        shutil.rmtree(root)


def one_world(state: State, *, rounds: int, folder: str | None) -> str | None:
    """The next world. Returns what was broken, None if nothing was."""
    started = time.monotonic()
    try:
        tally = run_world(state.seed, state.worlds, rounds=rounds, folder=folder)
    except Violation as violation:
        return f"{violation}; again: tools/crashtest --seed {state.seed} --world {state.worlds}"
    state.tally.add(tally)
    state.worlds += 1
    state.seconds += time.monotonic() - started
    state.save()
    return None


def campaign(state: State, *, rounds: int, folder: str | None) -> str | None:
    """World after world until there were so many rounds. Returns as `one_world`."""
    broken = None
    while broken is None and state.tally.rounds < rounds:
        broken = one_world(state, rounds=min(WORLD, rounds - state.tally.rounds), folder=folder)
    return broken


def main(arguments: Sequence[str]) -> int:
    """0 if all promises were kept, else 1."""
    parser = argparse.ArgumentParser(prog="crashtest", description="Kill hvfuse at random, and compare.")
    parser.add_argument("--rounds", type=int, default=200, help="deaths (default: 200)")
    parser.add_argument("--seed", type=int, help="repeat this campaign (default: a new one)")
    parser.add_argument("--world", type=int, help="only this part of the campaign")
    parser.add_argument("--resume", metavar="FILE", help="keep progress here, and go on from it")
    parser.add_argument("--folder", default=FAST_FOLDER, help="where to work (default: in memory if possible)")
    options = parser.parse_args(arguments)
    state = State(options.resume if options.world is None else None, seed=options.seed)
    if options.world is None:
        broken = campaign(state, rounds=options.rounds, folder=options.folder)
    else:
        state.worlds = options.world
        broken = one_world(state, rounds=WORLD, folder=options.folder)
    print(state.verdict(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    logging.getLogger("hvfuse").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))
