"""Real mounts for the tests: served by a process of their own, gone afterwards whatever happened."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hvfuse import mountpoint

REPOSITORY = Path(__file__).parents[2]
READY_WITHIN = 30.0
"""Seconds."""


class Mounted:
    """A folder, a bare directory beside it, and the folder's mount; `process` serves it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder, self.bare, self.mnt, self.journals = (
            root / name for name in ("folder", "bare", "mnt", "journals")
        )
        self.process: subprocess.Popen[str] | None = None
        for path in (self.folder, self.bare, self.mnt, self.journals):
            path.mkdir()

    def start(self) -> None:
        """Mount the folder, and return once the mount is served."""
        self.run("tests.mount.serving", self.folder, self.journals, self.mnt)

    def run(self, module: str, *arguments: Path | str) -> None:
        """Start the program that mounts, and return once it says that it is ready."""
        self.spawn(module, *arguments)
        self.expect("ready")

    def spawn(self, module: str, *arguments: Path | str) -> None:
        """Start the program that mounts."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=(self.root / "errors").open("a"),
            cwd=REPOSITORY,
            text=True,
        )

    def expect(self, word: str) -> None:
        """Wait for the line `word` from the serving process."""
        self.expect_match(re.escape(word) + r"\Z")

    def expect_match(self, pattern: str) -> None:
        """Wait for a line that begins with what matches `pattern`."""
        assert self.process is not None and self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], READY_WITHIN)
        line = self.process.stdout.readline() if readable else ""
        assert re.match(pattern, line.removesuffix("\n")), f"got {line!r}; {self.errors()}"

    def reap(self) -> None:
        """Wait for the end of a process that was told to end, or is dead."""
        if self.process is None:
            return
        process, self.process = self.process, None
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def errors(self) -> str:
        """What the serving process complained about."""
        return (self.root / "errors").read_text()

    def journal(self, disk: str) -> list[str]:
        """What the disk was asked to do so far, without the opening and closing."""
        lines = (self.journals / disk).read_text().splitlines()
        return [line for line in lines if line not in ("opened", "closed")]

    def clear_journal(self, disk: str) -> None:
        (self.journals / disk).write_text("")

    def end(self) -> None:
        """Unmount whatever is left and reap the process."""
        while mountpoint.is_mounted(str(self.mnt)):
            mountpoint.stop(str(self.mnt))
        self.reap()


@contextmanager
def world() -> Iterator[Mounted]:
    """Directories that other users can reach, and nothing mounted yet."""
    with tempfile.TemporaryDirectory(prefix="hvfuse-mount-") as name:
        os.chmod(name, 0o755)
        mounted = Mounted(Path(name))
        try:
            yield mounted
        finally:
            mounted.end()


@pytest.fixture
def unmounted() -> Iterator[Mounted]:
    """Directories, to be filled before `start`."""
    with world() as mounted:
        yield mounted


@pytest.fixture(scope="module")
def mounted() -> Iterator[Mounted]:
    """A mount shared by a module's tests, with the disks `os.vhd` and `data.raw` of 8 MiB."""
    with world() as mounted:
        for name in ("os.vhd", "data.raw"):
            with (mounted.folder / name).open("wb") as file:
                file.truncate(8 << 20)
        mounted.start()
        yield mounted
        assert "Traceback" not in mounted.errors(), mounted.errors()
