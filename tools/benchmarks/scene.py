"""Where a benchmark takes place: directories on the disk and in memory, homes, processes; nothing of it is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
REPOSITORY = Path(__file__).parents[2]
MEMORY = Path("/dev/shm")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""Without what would let Python compile each of its modules at every start, unlike a user's."""


class Scene:
    """A run of the benchmarks. `quick`: small files and one round, to see whether it works, not how fast."""

    def __init__(self, *, quick: bool, folder: str | None) -> None:
        self.quick = quick
        self._folder = folder
        self._cache: Path | None = None

    def rounds(self, number: int) -> int:
        return 1 if self.quick else number

    def bytes(self, size: int) -> int:
        return max(size // 32, 8 * MIB) if self.quick else size

    @contextlib.contextmanager
    def place(self, *, memory: bool = False) -> Iterator[Place]:
        """A directory on the disk, or in memory (tmpfs)."""
        folder = MEMORY if memory else self._folder
        path = Path(tempfile.mkdtemp(prefix="hvfuse-bench-", dir=folder)).resolve()
        with contextlib.ExitStack() as stack:
            stack.callback(remove, path)
            yield Place(path, stack)

    @contextlib.contextmanager
    def built(self) -> Iterator[Path]:
        """A directory for what is compiled, the same one in the whole run."""
        if self._cache is not None:
            yield self._cache
            return
        with tempfile.TemporaryDirectory(prefix="hvfuse-bench-") as path:
            self._cache = Path(path)
            try:
                yield self._cache
            finally:
                self._cache = None


class Place:
    """A directory, and what is to be ended before it is removed."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path = path
        self.stack = stack

    def start(self, *command: str | Path, until: Callable[[], bool]) -> subprocess.Popen[bytes]:
        """Start a process that serves until the end, and wait for it to do so."""
        log = self.path / f"{Path(str(command[0])).name}.log"
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        self.stack.callback(stop, process)
        wait_for(until, lambda: f"{command[0]} did not come up: {log.read_text(errors='replace')[-2000:]}", process)
        return process


class Home:
    """An installation below a place. Configured so that nothing is done unasked, and small disks may have large logs,
    unless `config` says otherwise."""

    CONFIG = '[replication]\nprotect = "manual"\nhard_limit = 5000\nsoft_limit = 1000\n{}'

    def __init__(self, place: Place, name: str = "home", config: str = "") -> None:
        self.place = place
        self.root = place.path / name
        self.root.mkdir()
        (self.root / "hvfuse.toml").write_text(self.CONFIG.format(config))

    def folder(self, vm: str) -> Path:
        """Where a VM's disks lie; made if need be."""
        path = self.root / "disks" / vm
        path.mkdir(parents=True, exist_ok=True)
        return path

    def mountpoint(self, vm: str) -> Path:
        return self.root / "mnt" / vm

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-P", "-m", "hvfuse", "--home", str(self.root), *words]

    def do(self, *words: str) -> str:
        """A command of hvfuse's; ends the benchmark if it fails. Returns what it said."""
        return run(*self.command(*words))

    def json(self, *words: str) -> dict[str, Any]:
        return dict(json.loads(self.do(*words, "--json")))

    def mount(self, vm: str) -> Path:
        """Serve a VM until the end; returns where."""
        self.do("mount", vm)
        self.place.stack.callback(self.unmount, vm)
        return self.mountpoint(vm)

    def unmount(self, vm: str) -> None:
        """End a VM's mount, if it stands."""
        subprocess.run(self.command("umount", vm, "--force"), env=ENVIRONMENT, capture_output=True, check=False)

    def track(self, vm: str) -> Path:
        """Serve a VM, with its first copy made: from now on every write is logged. Returns where."""
        mountpoint = self.mount(vm)
        self.do("replication", "enable", vm)
        self.do("replicate", vm)
        return mountpoint


def run(*command: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    """A command's output; ends the benchmark if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        sys.exit(f"{' '.join(words)}: ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def fio(*options: str | Path) -> list[dict[str, Any]]:
    """What fio says of its jobs, in order; ends the benchmark if it fails."""
    said = run("fio", "--output-format=json", *options)
    return list(json.loads(said[said.index("{") :])["jobs"])


def seconds_of(*command: str | Path, codes: tuple[int, ...] = (0,)) -> float:
    """How long a command took."""
    started = time.perf_counter()
    run(*command, codes=codes)
    return time.perf_counter() - started


def settle() -> None:
    """Let nobody pay for what somebody else has written."""
    os.sync()


def fill(path: Path, size: int, *, compressible: bool = False) -> None:
    """A file of data, none of which is in the page cache; `compressible`: to a half."""
    with open(path, "wb") as file:
        for _ in range(0, size, MIB):
            file.write(data(MIB, compressible=compressible))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sparse(path: Path, size: int) -> Path:
    """A file without data."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def data(size: int, *, compressible: bool = False) -> bytes:
    """Random bytes; `compressible`: 2 KiB of zeroes in each 4 KiB."""
    if not compressible:
        return os.urandom(size)
    return b"".join(os.urandom(2048) + bytes(2048) for _ in range(0, size, 4096))


def wait_for(
    true: Callable[[], bool],
    what: Callable[[], str],
    process: subprocess.Popen[bytes] | None = None,
    seconds: float = 60,
) -> None:
    """Poll; ends the benchmark with `what()`."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline or (process is not None and process.poll() not in (None, 0)):
            sys.exit(what())
        time.sleep(0.02)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
            return
        process.kill()
        process.wait()


def unmount(mountpoint: Path) -> None:
    """Whatever is mounted there."""
    while os.path.ismount(mountpoint):
        if subprocess.run(["umount", mountpoint], capture_output=True, check=False).returncode:
            subprocess.run(["umount", "-l", mountpoint], capture_output=True, check=True)


def remove(path: Path) -> None:
    """Room for what comes next."""
    shutil.rmtree(path, ignore_errors=True)


def peak_until_end(process: subprocess.Popen[bytes], every: float) -> int:
    """Wait until a process has ended, which leaves it to be reaped, and return its `peak_memory`, looked at so often
    (seconds). What wait4 says is at least what its parent had when it was made."""
    peak = 0
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        with contextlib.suppress(StopIteration):  # it has just ended
            peak = max(peak, peak_memory(process.pid))
        time.sleep(every)
    return peak


def peak_memory(pid: int) -> int:
    """A process's greatest resident size so far, in bytes."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
