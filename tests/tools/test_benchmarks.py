"""The subjects of `tools/bench` work, and their rows are whole; not how fast anything is.

HVFUSE_BENCH=all looks at every subject, which takes minutes, or at those it names, joined with commas; without it at
two, others each time.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SUBJECTS = ("write", "fsync", "read", "cycle", "initial", "resync", "view", "scale", "marks", "cost")

SAMPLE = 2


def chosen() -> list[str]:
    wanted = os.environ.get("HVFUSE_BENCH")
    if wanted is not None:
        return [subject for subject in SUBJECTS if wanted == "all" or subject in wanted.split(",")]
    # All workers of a parallel run have to come to the same.
    return random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(time.time_ns()))).sample(SUBJECTS, SAMPLE)


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([REPOSITORY / "tools" / "bench", *arguments], capture_output=True, text=True)


def test_these_are_all_subjects() -> None:
    named = bench("--help").stdout.split("SUBJECT", 1)[1]
    assert " ".join(", ".join(SUBJECTS).split()) in " ".join(named.split())


@pytest.mark.mount
@pytest.mark.parametrize("subject", chosen())
def test_it_measures_rows_and_leaves_nothing(subject: str, tmp_path: Path) -> None:
    done = bench(subject, "--quick", "--json", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == {"rows"} and answer["rows"]
    for row in answer["rows"]:
        assert set(row) == {"subject", "peer", "hvfuse", "unit", "ratio", "target", "spread"}
        assert all(isinstance(row[name], str) for name in ("subject", "unit", "spread"))
        assert row["subject"] and row["unit"]
        assert row["peer"] > 0 and row["hvfuse"] > 0 and row["ratio"] > 0
        assert row["target"] is None or row["target"] > 0
    subjects = [row["subject"] for row in answer["rows"]]
    assert len(set(subjects)) == len(subjects)
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


@pytest.mark.parametrize(
    "arguments", [["no-such-subject"], ["--write", "scale"], ["--write", "--quick"], ["--write", "--json"]]
)
def test_what_makes_no_sense_is_refused(arguments: list[str]) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert "error:" in done.stderr
