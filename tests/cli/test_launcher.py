"""tools/hvfuse once everything is set up, and where it cannot be; setting up itself needs a fresh machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "tools" / "hvfuse"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A finished virtual environment whose interpreter only tells how it was called."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text('#!/bin/bash\nprintf "%s|" "$PWD" "$PYTHONPATH" "$@"\nexit 7\n')
    python.chmod(0o755)
    shutil.copy(REPOSITORY / "tools" / "requirements.txt", venv / "installed-requirements.txt")
    return {**os.environ, "HVFUSE_VENV": str(venv)}


def launch(launcher: Path, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(launcher), "status", "a b", "--json"],
        env=environment,
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
    )


def test_a_machine_that_is_set_up_runs_the_program_where_it_was_called(
    environment: dict[str, str], tmp_path: Path
) -> None:
    link = tmp_path / "hvfuse"
    link.symlink_to(LAUNCHER)
    for launcher in (LAUNCHER, link):
        done = launch(launcher, environment, tmp_path)
        assert done.returncode == 7
        assert done.stdout == f"{tmp_path}|{REPOSITORY}|-P|-m|hvfuse|status|a b|--json|"
        assert done.stderr == ""


def path_without(tmp_path: Path, *missing: str) -> str:
    """A PATH with all programs of this machine's but some."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for directory in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for program in Path(directory).iterdir():
            link = folder / program.name
            if program.name not in missing and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


def test_without_a_package_manager_it_says_in_one_line_what_is_missing(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment["PATH"] = path_without(tmp_path, "fusermount3", "apt-get")
    done = launch(LAUNCHER, environment, tmp_path)
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr == "hvfuse: needed on this machine: fuse3\n"


def test_an_environment_that_cannot_be_written_is_told_in_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment["HVFUSE_VENV"] = str(tmp_path / "file" / "venv")
    done = launch(LAUNCHER, environment, tmp_path)
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr == f"hvfuse: {tmp_path}/file/venv cannot be written; run once: sudo {LAUNCHER}\n"


def test_a_set_up_that_was_cut_short_is_begun_again(environment: dict[str, str], tmp_path: Path) -> None:
    venv = Path(environment["HVFUSE_VENV"])
    (venv / "installed-requirements.txt").unlink()
    (venv / "leftover").touch()
    environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = launch(LAUNCHER, environment, tmp_path)
    assert (done.returncode, done.stdout) == (10, ""), "without an index there is nothing to install"
    assert "could not install" in done.stderr.splitlines()[-1]
    assert not (venv / "leftover").exists()
    assert not (venv / "installed-requirements.txt").exists()
