"""Commands called in this process, on a home of their own; the processes that they start are real."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvfuse import mountpoint
from hvfuse.cli.main import Session, main
from hvfuse.control.daemon import serving_pid, start_and_wait, wait_for_end
from hvfuse.control.supervisor import shipper_daemon
from hvfuse.system import SystemClock


class CommandLine:
    """Runs `hvfuse --home HOME …`; keeps what the last one printed."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.out = ""
        self.err = ""
        self._capsys = capsys

    def __call__(self, *arguments: str) -> int:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["--home", str(self.root), *arguments])
        self.out, self.err = self._capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        ended = self(*arguments, "--json")
        answer = json.loads(self.out)
        if arguments[0] == "status" and "vms" in answer:
            codes = {"NotApplicable": 0, "Normal": 0, "Warning": 3, "Critical": 4}
            code = max((codes[vm["health"]] for vm in answer["vms"]), default=0)
        assert ended == code, self.err
        assert answer.pop("output_version") == 1
        return dict(answer)

    def add_vm(self, vm: str, size: int = 1 << 20) -> Path:
        """A VM with one raw disk; returns where the disk is once it is mounted."""
        folder = self.root / "disks" / vm
        folder.mkdir(parents=True)
        with open(folder / "os.raw", "wb") as file:
            file.truncate(size)
        return self.root / "mnt" / vm / "os.raw"

    def ship(self, vm: str) -> str:
        """Have a process ship the VM, as `hvfuse run` does. Returns its socket."""
        home = Session(str(self.root)).home
        start_and_wait(shipper_daemon(home, vm, clock=SystemClock()), clock=SystemClock())
        return home.shipper_socket(vm)

    def end(self) -> None:
        """Leave no process and no mount behind."""
        for socket in sorted((self.root / "state").rglob("*.sock")):
            pid = serving_pid(str(socket))
            if pid is not None and pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                assert wait_for_end(pid, 20)
        for found in (self.root.parent.glob("*"), (self.root / "mnt").glob("*")):
            for mount in found:
                mountpoint.clear_dead_mount(str(mount))


@pytest.fixture
def hvfuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[CommandLine]:
    line = CommandLine(tmp_path / "home", capsys)
    line.root.mkdir()
    yield line
    line.end()
