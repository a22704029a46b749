"""Two homes, S and T, with a VM that is failed over between them; and copies of them at rest, to begin from."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hvfuse.formats import tracking
from hvfuse.spool import state_name
from tests import harmed

from .conftest import REPOSITORY, mounts_below, processes_of

VM = "vm"
SIZES = {"os.raw": 8 << 20, "data.raw": 2 << 20}
PATIENCE = 30.0
CONFIG = '[replication]\nfrequency = "1s"\nhard_limit = 1000\nresync_window = "always"\n{}'


@dataclass(frozen=True)
class Answer:
    """Of a command."""

    code: int
    out: str

    def json(self) -> dict[str, Any]:
        assert self.out.startswith("{"), self.out
        return dict(json.loads(self.out.splitlines()[0] if self.out.count("\n") == 1 else self.out))


class Side:
    """One home."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root / name
        self.name = name
        self.folder = self.root / "disks" / VM
        self.mount = self.root / "mnt" / VM
        self._run: subprocess.Popen[bytes] | None = None

    # Commands ---------------------------------------------------------------------------------------------

    def do(self, *words: str, harm: Mapping[str, Any] | None = None) -> Answer:
        """A command in a child process; its exit code (-9: it was killed) and what it said."""
        out = self.root.parent / "out"
        program = [sys.executable, "-P", harmed.__file__, "--home", str(self.root), *words]
        with open(out, "wb") as file:
            environment = {**os.environ, **self.environment(harm)}
            done = subprocess.run(
                program, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, timeout=180, check=False
            )
        code = done.returncode
        return Answer(code, out.read_text(errors="replace"))

    def type(self, line: str) -> Answer:
        """What somebody is told to type: on this home, unless the command names another."""
        words = shlex.split(line)
        assert words[0] == "hvfuse", line
        if words[1] == "run":
            self.start()
            return Answer(0, "")
        if words[1] == "--home":
            return Side(Path(words[2]).parent, Path(words[2]).name).do(*words[3:])
        return self.do(*words[1:])

    def json(self, *words: str) -> dict[str, Any]:
        answer = self.do(*words, "--json")
        assert answer.code == 0 or words[0] == "status", (words, answer)  # its code tells the health
        return answer.json()

    def status(self) -> dict[str, Any]:
        return next((dict(vm) for vm in self.json("status")["vms"] if vm["name"] == VM), {"state": "absent"})

    def jobs(self) -> list[dict[str, Any]]:
        return list(self.json("job", "list", "--all")["jobs"])

    def pins(self) -> list[str]:
        """The kinds of the pins in its own store."""
        program = "import sys; from hvfuse.target.store import Store\nwith Store(sys.argv[1], create=False) as store: "
        program += "print(*(pin.owner.get('kind') for pin in store.pins()))"
        words = [sys.executable, "-c", program, str(self.root / "store")]
        done = subprocess.run(words, env=self.environment(None), capture_output=True, text=True, check=True)
        return done.stdout.split()

    def environment(self, harm: Mapping[str, Any] | None) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HVFUSE_HARM": json.dumps(harm or {})}

    # Processes --------------------------------------------------------------------------------------------

    def path(self, process: str) -> str:
        """By what one of the processes is found: "tracker", "shipper", "run"."""
        if process == "run":
            return str(self.root / "state" / "run.lock")
        return str(self.root / "state" / "vms" / VM / f"{process}.sock")

    def serves(self, process: str) -> bool:
        return harmed._serving(self.path(process)) is not None

    def start(self, harm: Mapping[str, Any] | None = None) -> None:
        """`hvfuse run`, if it does not run."""
        if self._run is not None and self._run.poll() is None:
            return
        with open(self.root / "run.out", "ab") as out:
            self._run = subprocess.Popen(
                [sys.executable, "-P", harmed.__file__, "--home", str(self.root), "run"],
                cwd="/", env=self.environment(harm), stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def interrupt(self) -> None:
        """Ctrl-C to `hvfuse run`, or to what runs without it."""
        if self._run is not None:
            self._run.send_signal(signal.SIGINT)

    def ended(self) -> None:
        """Wait until nothing runs."""
        if self._run is not None:
            code = self._run.wait(PATIENCE)
            assert code in (0, -9), self.logs()
            self._run = None
        if self.serves("tracker"):
            answer = self.do("umount", VM)
            assert answer.code == 0, answer
        assert processes_of(self.root) == [], self.logs()
        assert mounts_below(self.root) == []

    def close(self) -> None:
        """Whatever happened, nothing is left."""
        for pid in processes_of(self.root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._run is not None:
            self._run.wait()
            self._run = None
        for mount in mounts_below(self.root):
            subprocess.run(["umount", "-l", mount], capture_output=True, check=False)

    def logs(self) -> str:
        paths = [self.root / "run.out", *sorted((self.root / "state").rglob("*.log"))]
        return "".join(
            f"\n--- {self.name} {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in paths
            if path.exists()
        )

    # Disks ------------------------------------------------------------------------------------------------

    @property
    def is_mounted(self) -> bool:
        return str(self.mount) in mounts_below(self.root)

    def write(self, disk: str, offset: int, data: bytes) -> bool:
        """As a guest would, synced; whether it was taken."""
        if not self.is_mounted:
            return False
        done = subprocess.run(
            ["dd", f"of={self.mount / disk}", "bs=64k", f"seek={offset}", "oflag=seek_bytes", "conv=notrunc,fsync"],
            input=data, capture_output=True, check=False,
        )  # fmt: skip
        return done.returncode == 0

    def read(self, disk: str) -> bytes:
        return (self.mount / disk).read_bytes()

    def is_writable(self) -> bool:
        """Whether a guest could write; changes nothing."""
        if not self.is_mounted:
            return False
        try:
            fd = os.open(self.mount / "os.raw", os.O_RDWR)
        except OSError:
            return False
        try:
            os.pwrite(fd, os.pread(fd, 512, 0), 0)
            os.fsync(fd)
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
        return True


class Sites:
    """Both homes, and what the VM's disks hold (`model`)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.s, self.t = Side(root, "S"), Side(root, "T")
        self.model = {name: bytearray(size) for name, size in SIZES.items()}
        self.notes: dict[str, Any] = {}

    def side(self, name: str) -> Side:
        return self.s if name == "S" else self.t

    def make(self) -> None:
        """Two homes with a disk, and nothing else."""
        self.s.folder.mkdir(parents=True)
        self.t.root.mkdir()
        (self.s.root / "hvfuse.toml").write_text(CONFIG.format(f'target = "{self.t.root / "store"}"\n'))
        (self.t.root / "hvfuse.toml").write_text(CONFIG.format(""))
        for name, size in SIZES.items():
            with open(self.s.folder / name, "wb") as file:
                file.truncate(size)

    def write(self, side: Side, disk: str, offset: int, data: bytes) -> bool:
        """Through the mount, and into the model if it was taken."""
        taken = side.write(disk, offset, data)
        if taken:
            self.model[disk][offset : offset + len(data)] = data
        return taken

    def stop(self) -> None:
        """Nothing runs any more, and nothing is mounted."""
        for side in (self.s, self.t):
            side.interrupt()
        for side in (self.s, self.t):
            side.ended()

    def close(self) -> None:
        for side in (self.s, self.t):
            side.close()

    def logs(self) -> str:
        return self.s.logs() + self.t.logs()


def wait_for(true: Callable[[], bool], what: Callable[[], str], seconds: float = PATIENCE) -> None:
    """Poll; fails with `what()`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.15)


# Copies at rest ---------------------------------------------------------------------------------------------


def copy_homes(source: Path, target: Path) -> None:
    """Both homes, with nothing running; as if each disk had been moved and not copied."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    subprocess.run(["cp", "-a", "--sparse=always", "--reflink=auto", f"{source}/.", str(target)], check=True)
    for home in (target / "S", target / "T"):
        for disk in SIZES:
            state = home / "disks" / VM / state_name(disk)
            if state.exists() and (state.parent / disk).exists():
                _keep_inode(state, (state.parent / disk).stat().st_ino)


def _keep_inode(state: Path, inode: int) -> None:
    data = bytearray(state.read_bytes())
    record = replace(tracking.unpack_state(data), image_inode=inode).pack()
    data[: 2 * len(record)] = record + record
    state.write_bytes(data)
