"""A short campaign; and what the campaign itself promises. `tools/crashtest` runs longer ones."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse.tracker import recovery
from tests.crash import run
from tests.crash.campaign import Fault
from tests.crash.host import FAST_FOLDER
from tests.crash.killed import KilledWorld


@pytest.fixture
def root() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="hvfuse-crash-", dir=FAST_FOLDER)
    yield path
    shutil.rmtree(path)


def test_whoever_dies_and_whenever_nothing_promised_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--rounds", "80", "--seed", "1"]) == 0
    verdict = capsys.readouterr().out
    assert "all promises kept: 80 rounds" in verdict
    assert all(kind.value in verdict for kind in Fault)


def test_a_process_killed_between_any_two_instructions_loses_nothing(root: str) -> None:
    tally = KilledWorld(root, seed="killed").run(3)
    assert tally.deaths["kill -9"] == 3
    assert tally.copies == 1


def test_the_same_seed_gives_the_same_world(root: str) -> None:
    first, second = (run.run_world(11, 0, rounds=6, folder=root) for _ in range(2))
    assert first == second


def test_a_campaign_goes_on_where_it_was_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = str(tmp_path / "state.json")
    assert run.main(["--rounds", "12", "--seed", "5", "--resume", state]) == 0
    assert run.main(["--rounds", "20", "--resume", state]) == 0
    resumed = run.State(state, seed=None)
    assert (resumed.seed, resumed.worlds, resumed.tally.rounds) == (5, 2, 20)
    with pytest.raises(SystemExit):
        run.main(["--seed", "6", "--resume", state])
    capsys.readouterr()


def test_a_broken_promise_ends_the_campaign_and_says_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recovery, "_redo", lambda fd, kind, offset, payload: None)
    monkeypatch.setattr(run, "KILLED_EVERY", 1 << 30)  # real processes do not die twice in the same place
    assert run.main(["--rounds", "400", "--seed", "5"]) == 1
    verdict = capsys.readouterr().out
    assert verdict.startswith("crashtest: FAILED")
    again = verdict.split("tools/crashtest ")[1].split()
    assert run.main(again) == 1
