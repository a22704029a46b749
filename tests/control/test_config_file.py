"""The configuration file while it is edited under a process that follows it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hvfuse.control import config_file
from hvfuse.control.config import Config
from hvfuse.control.config_file import SETTLED_SECONDS, ConfigFile
from hvfuse.errors import UsageError


class Edited:
    """A home with a file, and a clock that stands still unless told."""

    def __init__(self, root: Path) -> None:
        self.path = root / "hvfuse.toml"
        self.seconds = 50.0
        self.file = ConfigFile(str(root), monotonic=lambda: self.seconds)

    def write(self, text: str) -> None:
        """In one step, as careful editors do."""
        new = self.path.with_suffix(".new")
        new.write_text(text)
        os.replace(new, self.path)

    def frequency(self) -> float:
        return self.file.current().policy("vm").frequency

    def after_a_while(self) -> float:
        self.frequency()
        self.seconds += SETTLED_SECONDS
        return self.frequency()


@pytest.fixture
def edited(tmp_path: Path) -> Edited:
    edited = Edited(tmp_path)
    edited.write('[replication]\nfrequency = "1m"\n')
    return edited


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were parsed."""
    found: list[str] = []
    real: Callable[[str, str], Config] = config_file.parse
    monkeypatch.setattr(config_file, "parse", lambda path, text: found.append(text) or real(path, text))  # type: ignore[func-returns-value]
    return found


def test_a_file_that_stays_the_same_is_read_once(edited: Edited, reads: list[str]) -> None:
    first = edited.file.current()
    for _ in range(100):
        edited.seconds += 10
        assert edited.file.current() is first
    assert len(reads) == 1


def test_a_change_applies_once_the_file_has_rested(edited: Edited) -> None:
    assert edited.frequency() == 60
    edited.write('[replication]\nfrequency = "2m"\n')
    assert edited.frequency() == 60
    edited.seconds += SETTLED_SECONDS - 0.01
    assert edited.frequency() == 60
    edited.seconds += 0.01
    assert edited.frequency() == 120
    assert edited.file.fault is None


def test_a_file_that_is_emptied_and_filled_again_never_counts_as_empty(edited: Edited, reads: list[str]) -> None:
    edited.frequency()
    for text in (
        "",
        "[replica",
        '[replication]\nfrequency = "1s"',
        '[replication]\nfrequency = "1s"\nhard_limit = 60\n',
    ):
        edited.path.write_text(text)
        assert edited.frequency() == 60
        edited.seconds += 0.9 * SETTLED_SECONDS
    assert edited.after_a_while() == 1
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_read_again(edited: Edited, monkeypatch: pytest.MonkeyPatch) -> None:
    edited.frequency()
    edited.write('[replication]\nfrequency = "2m"\n')
    edited.frequency()
    edited.seconds += SETTLED_SECONDS
    real = config_file.read

    def disturbed(path: str) -> Config:
        monkeypatch.setattr(config_file, "read", real)
        edited.write("")
        found = real(path)
        edited.write('[replication]\nfrequency = "3m"\n')
        return found

    monkeypatch.setattr(config_file, "read", disturbed)
    assert edited.frequency() == 60, "what was read in between is nobody's wish"
    assert edited.after_a_while() == 180


def test_a_faulty_edit_changes_nothing_and_is_told_with_its_line(
    edited: Edited, caplog: pytest.LogCaptureFixture
) -> None:
    edited.frequency()
    edited.write('[replication]\nfrequency = "2m"\ncompression = 99\n')
    assert edited.after_a_while() == 60
    fault = f"{edited.path}:3: [replication] compression: 99 is not a whole number from 0 to 22"
    assert edited.file.fault == fault
    for _ in range(5):
        assert edited.after_a_while() == 60
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == [f"{fault}; what was read before still applies"]
    edited.write('[replication]\nfrequency = "2m"\ncompression = 9\n')
    assert edited.after_a_while() == 120
    assert edited.file.fault is None


def test_a_file_that_goes_changes_nothing_and_one_that_comes_back_does(
    edited: Edited, caplog: pytest.LogCaptureFixture
) -> None:
    edited.frequency()
    edited.path.unlink()
    assert edited.after_a_while() == 60
    assert edited.file.fault == f"{edited.path}: No such file or directory"
    edited.write("")
    assert edited.after_a_while() == 30
    assert edited.file.fault is None
    assert len(caplog.records) == 1


def test_a_home_without_a_file_has_the_defaults_until_there_is_one(tmp_path: Path) -> None:
    edited = Edited(tmp_path)
    assert edited.after_a_while() == 30
    edited.write('[replication]\nfrequency = "2m"\n')
    assert edited.after_a_while() == 120


def test_as_long_as_nothing_was_read_a_fault_is_raised(edited: Edited) -> None:
    edited.write("[replication]\nfreqency = 1\n")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"hvfuse\.toml:2: "):
            edited.file.current()
    edited.write('[replication]\nfrequency = "2m"\n')
    assert edited.frequency() == 120


def test_a_change_of_paths_is_told_once_as_one_that_waits_for_a_start(
    edited: Edited, caplog: pytest.LogCaptureFixture
) -> None:
    edited.frequency()
    for text in ('[paths]\nstore = "/other"\n', '[paths]\nstore = "/other"\n[replication]\n', ""):
        edited.write(text)
        edited.after_a_while()
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"{edited.path}: a change of [paths] takes effect with the next `hvfuse run`"
    ]


class TestKept:
    """What was applied last, for processes that begin while the file is faulty."""

    FAULTY = "[replication]\nfrequency = 3\n"

    def test_a_process_that_goes_on_has_what_was_kept_and_says_why(self, edited: Edited) -> None:
        edited.file.keep()
        edited.write(self.FAULTY)
        other = ConfigFile(str(edited.path.parent), uses_kept=True)
        assert other.current().policy("vm").frequency == 60
        assert other.fault is not None and "hvfuse.toml:2: [replication] frequency" in other.fault

    def test_one_that_needs_a_sound_file_is_refused_with_what_proves_it(self, edited: Edited) -> None:
        edited.file.keep()
        edited.write(self.FAULTY)
        with pytest.raises(UsageError) as refused:
            ConfigFile(str(edited.path.parent)).current()
        assert refused.value.hint is not None and "hvfuse policy check" in refused.value.hint

    def test_a_change_that_applies_is_kept_and_a_fault_never(
        self, edited: Edited, caplog: pytest.LogCaptureFixture
    ) -> None:
        edited.file.keep()
        edited.write('[replication]\nfrequency = "2m"\n')
        assert edited.after_a_while() == 120
        edited.write(self.FAULTY)
        assert edited.after_a_while() == 120
        caplog.clear()
        assert ConfigFile(str(edited.path.parent), uses_kept=True).current().policy("vm").frequency == 120

    def test_without_anything_kept_the_fault_is_told(self, edited: Edited) -> None:
        edited.write(self.FAULTY)
        with pytest.raises(UsageError, match="frequency"):
            ConfigFile(str(edited.path.parent), uses_kept=True).current()

    def test_the_fault_ends_with_the_next_sound_text(self, edited: Edited) -> None:
        edited.file.keep()
        edited.write(self.FAULTY)
        edited.file = ConfigFile(str(edited.path.parent), uses_kept=True, monotonic=lambda: edited.seconds)
        assert edited.frequency() == 60
        edited.write('[replication]\nfrequency = "3m"\n')
        assert edited.after_a_while() == 180
        assert edited.file.fault is None
