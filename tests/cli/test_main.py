"""The frame of the command line: help, errors and exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from hvfuse import __version__, errors
from hvfuse.cli import main as main_module
from hvfuse.cli.main import LazyGroup, cli, main
from hvfuse.errors import BusyError, HvfuseError

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Puts a command that raises in the place of `hvfuse status`; the list's item is what it raises."""
    raised: list[BaseException] = []

    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def status(as_json: bool) -> None:
        raise raised[0]

    monkeypatch.setitem(sys.modules, "hvfuse.cli.status", SimpleNamespace(status=status))
    return raised


def test_every_command_that_help_names_can_be_called_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert isinstance(cli, LazyGroup)
    names = cli.list_commands(click.Context(cli))
    assert set(names) == {
        "run", "status", "replicate", "replication", "resync", "verify", "policy", "seed", "mount", "umount", "job",
        "event", "measure", "point", "failover", "plan", "store", "disk", "log",
    }  # fmt: skip
    for name in names:
        assert f"  {name} " in shown
        assert run(name, "--help") == 0
        assert "Usage: hvfuse " + name in capsys.readouterr().out
    assert "_tracker" not in shown
    for name in ("_tracker", "_shipper", "_view"):
        assert run(name, "--help") == 0


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"hvfuse {__version__}\n"


def test_without_a_command_the_help_is_shown_and_it_counts_as_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "Usage: hvfuse" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["status", "--nonsense"], ["replicate"], ["--home"], ["failover", "change-point", "vm"]]
)
def test_misuse_is_one_line_a_hint_and_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("hvfuse: ")
    assert lines[1].startswith("  hint: hvfuse")
    assert lines[1].endswith("--help")


def test_an_error_is_its_message_its_hint_and_its_exit_code(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(BusyError("mnt/a: in use by qemu (pid 7)", hint="end it"))
    assert run("status") == 6
    captured = capsys.readouterr()
    assert captured.err == "hvfuse: mnt/a: in use by qemu (pid 7)\n  hint: end it\n"
    assert captured.out == ""


def test_with_json_an_error_is_one_object_on_stdout_as_well(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(BusyError("in use"))
    assert run("status", "--json") == 6
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "output_version": 1,
        "error": {"type": "BusyError", "message": "in use", "hint": None, "exit_code": 6},
    }
    assert captured.err == "hvfuse: in use\n"


def test_an_error_is_one_line_whatever_a_path_holds(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(BusyError("a\nb\x1b[2J\udcff: in use", hint="mv 'a\nb' c"))
    assert run("status") == 6
    assert capsys.readouterr().err == "hvfuse: a\\nb\\x1b[2J\\udcff: in use\n  hint: mv 'a\\nb' c\n"


@pytest.mark.parametrize(("typed", "meant"), [("stauts", "status"), ("umoutn", "umount")])
def test_a_misspelt_command_is_guessed(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(typed) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"hvfuse: there is no command '{typed}'; did you mean {meant}?"


OS_ERRORS = {
    errno.ENOSPC: 9,
    errno.EDQUOT: 9,
    errno.ENOENT: 5,
    errno.EBUSY: 6,
    errno.EACCES: 1,
    errno.EIO: 1,
    errno.EROFS: 1,
    errno.ENOTCONN: 11,
}


@pytest.mark.parametrize("code", OS_ERRORS)
def test_what_the_system_refuses_is_told_by_path(
    code: int, failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(OSError(code, os.strerror(code), "/srv/store/data.mdb"))
    assert run("status") == OS_ERRORS[code]
    assert capsys.readouterr().err.splitlines()[0] == f"hvfuse: /srv/store/data.mdb: {os.strerror(code)}"


def test_a_bug_is_one_line_and_leaves_its_traceback_in_a_file(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_module.tempfile, "tempdir", str(tmp_path))
    failing.append(KeyError("x"))
    assert run("status") == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "hvfuse: internal error: KeyError: 'x'"
    (kept,) = tmp_path.iterdir()
    assert str(kept) in second
    assert "Traceback" in kept.read_text()
    assert run("--debug", "status") == 1
    assert "Traceback" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_ends_with_130_and_no_traceback(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(KeyboardInterrupt())
    assert run("status") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_every_error_of_the_package_has_its_documented_exit_code() -> None:
    documented = (REPOSITORY / "docs" / "exit-codes.md").read_text()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HvfuseError)]
    assert len(kinds) > 5
    for kind in kinds:
        assert f"| {kind.exit_code} |" in documented


def test_a_home_that_does_not_exist_is_refused_and_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["status"],
        ["mount", "vm"],
        ["umount", "vm"],
        ["replicate", "vm"],
        ["resync", "vm"],
        ["failover", "list"],
    ):
        assert run("--home", str(tmp_path / "typo"), *arguments) == 5
        assert "there is no hvfuse home at" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_a_faulty_configuration_is_told_by_line_whatever_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hvfuse.toml").write_text('[replication]\nfreqency = "1s"\n')
    for arguments in (["status"], ["run"], ["mount", "vm"]):
        assert run("--home", str(tmp_path), *arguments) == 2
        line = f"hvfuse: {tmp_path}/hvfuse.toml:2: [replication] freqency: unknown key; did you mean frequency?\n"
        line += "  hint: mend that line; hvfuse policy check proves the file\n"
        assert capsys.readouterr().err == line


@pytest.mark.parametrize("vm", ["../x", "a/b", "", ".x"])
def test_a_name_that_leads_elsewhere_is_misuse(vm: str, tmp_path: Path) -> None:
    for command in ("mount", "umount", "replicate", "resync"):
        assert run("--home", str(tmp_path), command, vm) == 2


def test_help_and_version_do_without_heavy_imports() -> None:
    code = (
        "import sys, hvfuse.cli.main\n"
        "heavy = {'numpy', 'lmdb', 'rich', 'mfusepy', 'zstandard', 'stringzilla'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "hvfuse", "--help"], cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == b""
