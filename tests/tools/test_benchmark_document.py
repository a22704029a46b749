"""The page that `tools/bench --write` makes of rows."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
DAY = datetime.date(2026, 11, 29)


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[ModuleType]:
    sys.path.insert(0, str(TOOLS))
    import benchmarks.document
    import benchmarks.table

    yield benchmarks
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def section(benchmarks: ModuleType) -> object:
    rates, at_most = benchmarks.table.rates, benchmarks.table.at_most
    rows = [
        rates("big writes", {"qemu": [100.0, 300.0, 200.0], "cp": [90.0]}, [400.0], "MB/s", 1.0),
        rates("small writes", {"qemu": [200.0]}, [100.0], "MB/s", 1.0),
        rates("no target", {"a|b": [200.0]}, [100.0], "MB/s"),
        at_most("memory", 10.0, [20.0], "MiB"),
    ]
    return benchmarks.document.Section("write", "writes of all kinds", "\n\nHow it\nis done.\n", 12.3, rows)


def page(benchmarks: ModuleType, section: object, **reasons: dict[str, str]) -> str:
    return str(benchmarks.document.render([section], reasons, {"memory": "24 GiB"}, DAY))


def test_it_says_when_and_where_and_how(benchmarks: ModuleType, section: object) -> None:
    text = page(benchmarks, section)
    assert "On 2026-11-29" in text and "| memory | 24 GiB |" in text
    assert "## write: writes of all kinds\n\n```sh\ntools/bench write    # took 12 s\n```\n\nHow it\nis done.\n" in text


def test_a_row_is_a_line_of_a_table(benchmarks: ModuleType, section: object) -> None:
    lines = page(benchmarks, section).splitlines()
    assert "| big writes (qemu) | 200 | 400 | MB/s | 2.00 | ≥ 1 | met | 100–300 / 400–400 |" in lines
    assert "| no target (a\\|b) | 200 | 100 | MB/s | 0.50 |  |  | 200–200 / 100–100 |" in lines
    rows = [line for line in lines if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in rows}
    assert widths == {3, 9}  # the machine's and the rows'


def test_what_is_missed_is_explained_or_said_not_to_be(benchmarks: ModuleType, section: object) -> None:
    text = page(benchmarks, section, write={"small": "Python."}, read={"memory*": "of another subject"})
    assert "**Missed: small writes (qemu).** Python." in text
    assert "**Missed: memory (limit).** not explained" in text
    assert text.count("Missed:") == 2


def test_reasons_are_found_by_a_beginning_or_a_glob(benchmarks: ModuleType, section: object) -> None:
    for pattern in ("small writes (qemu)", "small", "*all w*", "small writes (*)"):
        assert "not explained" not in page(benchmarks, section, write={pattern: "Python.", "mem*": "it is much"})


def test_reasons_for_what_is_met_are_noticed(benchmarks: ModuleType, section: object) -> None:
    reasons = {"write": {"small": "a", "big*": "b"}, "read": {"any": "c"}}
    assert list(benchmarks.document.idle([section], reasons)) == [("write", "big*"), ("read", "any")]


def test_the_reasons_can_be_read(benchmarks: ModuleType, section: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class Written:
        def write_text(self, text: str, encoding: str) -> None:
            assert text.startswith("# Benchmarks\n")

    monkeypatch.setattr(benchmarks.document, "PAGE", Written())
    benchmarks.document.write([section], folder=None)


def test_each_reason_is_of_a_subject_in_words(benchmarks: ModuleType) -> None:
    import tomllib

    from benchmarks.__main__ import SUBJECTS

    reasons = tomllib.loads(benchmarks.document.REASONS.read_text(encoding="utf-8"))
    assert set(reasons) <= set(SUBJECTS)
    assert all(isinstance(why, str) and why.strip() for patterns in reasons.values() for why in patterns.values())
