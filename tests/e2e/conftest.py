"""A real installation in a temporary home: real processes, real mounts, real qemu and file systems."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 60.0


class Installation:
    """One home and the commands that work on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.disks = root / "disks"
        self.mnt = root / "mnt"
        self._running: subprocess.Popen[bytes] | None = None
        self._views: list[Path] = []

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "hvfuse", "--home", str(self.root), *arguments]

    def hvfuse(self, *arguments: str, code: int = 0) -> str:
        """Run a command that is expected to end with `code`; returns its standard output."""
        done = subprocess.run(
            self.command(*arguments), cwd="/", env=self.environment(), capture_output=True, text=True, timeout=180
        )
        assert done.returncode == code, (
            f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}{self.logs()}"
        )
        return done.stdout if code == 0 else done.stdout + done.stderr

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        answer = json.loads(self.hvfuse(*arguments, "--json", code=code))
        assert answer["output_version"] == 1
        assert isinstance(answer, dict)
        return answer

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def start(self, frequency: str = "1h") -> None:
        """`hvfuse run` in the background; cycles happen only when asked for, unless `frequency` says otherwise."""
        self.root.mkdir(exist_ok=True)
        config = self.root / "hvfuse.toml"
        if not config.exists():
            config.write_text(
                f'[replication]\nfrequency = "{frequency}"\nhard_limit = 1000\nresync_window = "always"\n'
            )
        with open(self.root / "run.out", "ab") as out:
            self._running = subprocess.Popen(
                self.command("run"), cwd="/", env=self.environment(), stdout=out, stderr=out, start_new_session=True
            )

    @property
    def running_pid(self) -> int:
        """Of `hvfuse run`."""
        assert self._running is not None
        return self._running.pid

    def buried(self) -> None:
        """`hvfuse run` was killed."""
        assert self._running is not None
        self._running.wait(PATIENCE)
        self._running = None

    def stop(self) -> int:
        """Ctrl-C to `hvfuse run`; its exit code."""
        assert self._running is not None
        self._running.send_signal(signal.SIGINT)
        code = self._running.wait(PATIENCE)
        self._running = None
        return code

    def status(self, vm: str) -> dict[str, Any]:
        done = subprocess.run(
            self.command("status", "--json"), cwd="/", env=self.environment(), capture_output=True, text=True
        )
        if not done.stdout:
            return {"state": "unknown", "error": done.stderr}
        for entry in json.loads(done.stdout).get("vms", []):
            if entry["name"] == vm:
                return dict(entry)
        return {"state": "absent"}

    def wait_for_state(self, vm: str, state: str = "Replicating") -> dict[str, Any]:
        wait_until(lambda: self.status(vm)["state"] == state, lambda: f"{self.status(vm)}{self.logs()}")
        return self.status(vm)

    def test_failover(self, vm: str, directory: Path, point: str | None = None) -> None:
        """Mount a view; the fixture cleans it up at the end if the test did not."""
        chosen = ["--point", point] if point is not None else []
        self.hvfuse("failover", "test", vm, *chosen, "--mount", str(directory))
        self._views.append(directory)

    def logs(self) -> str:
        parts = []
        for path in [self.root / "run.out", *sorted((self.root / "state").rglob("*.log"))]:
            if path.exists():
                parts.append(f"\n--- {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "".join(parts)

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self._running is not None:
            self._running.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running.wait(20)
            if self._running.poll() is None:
                self._running.kill()
                self._running.wait()
        for mount in mounts_below(self.root) + [str(view) for view in self._views]:
            subprocess.run(["umount", "-l", mount], capture_output=True, check=False)
        for pid in processes_of(self.root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_until(true: Callable[[], bool], what: Callable[[], str]) -> None:
    """Poll for a condition of other processes; fails with `what()` after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def mounts_below(root: Path) -> list[str]:
    with open("/proc/self/mounts", encoding="utf-8") as file:
        points = [line.split()[1].replace("\\040", " ") for line in file]
    return [point for point in points if point.startswith(f"{root}/")]


def processes_of(root: Path) -> list[int]:
    """Processes that were started with this home on their command line."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
                if os.fsencode(str(root)) in file.read().split(b"\0"):
                    found.append(int(entry))
    return found


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    made = Installation(tmp_path / "home")
    yield made
    made.close()
    assert mounts_below(tmp_path) == []


def run(*arguments: str | Path, code: int = 0) -> str:
    """A judge's program; fails the test unless it ends with `code`."""
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def qemu_io(image: Path, image_format: str, *commands: str) -> None:
    """Patterns through qemu-io, whose exit code does not tell a failed verification."""
    words = [word for command in commands for word in ("-c", command)]
    out = run("qemu-io", "-f", image_format, *words, image)
    assert "Pattern verification failed" not in out, out


def identical(first: Path, second: Path, image_format: str) -> bool:
    done = subprocess.run(
        ["qemu-img", "compare", "-f", image_format, "-F", image_format, str(first), str(second)],
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr + done.stdout
    return done.returncode == 0
