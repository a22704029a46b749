"""Two homes, each with its own store, that fail a VM over to each other: their real processes, mounts and directories,
and what can become of them."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvfuse.control.records import VmRecord
from hvfuse.target.failing_over import Party
from tests.e2e.conftest import Installation, mounts_below, processes_of

VM = "web"
DISKS = {"a.raw": 4 << 20, "b.raw": 1 << 20}
BLOCK = 4096
PATIENCE = 120.0
REFUSALS = (2, 5, 6, 10, 11, 12, 13, 15, 16)
"""Exit codes with which a flow may end, beside 0."""
Content = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Version:
    """What a side's disks held from some instant within `begun_ns` to `ended_ns` on."""

    begun_ns: int
    ended_ns: int
    content: Content


@dataclass(slots=True, eq=False)
class Side:
    """One home. `content`: what the VM's disks have to hold here, None where it has none; `others`: or one of these, as
    a flow was cut off. `fenced_at`: since when a store that it can reach says that the VM is another side's."""

    name: str
    root: Path
    home: str = ""
    content: Content | None = None
    others: list[Content] = field(default_factory=list)
    versions: list[Version] = field(default_factory=list)
    record: VmRecord = field(default_factory=VmRecord)
    fenced_at: float | None = None
    gave_way_ns: int | None = None
    run: subprocess.Popen[bytes] | None = None
    run_at: float = 0.0
    is_away: bool = False

    @property
    def place(self) -> Path:
        return self.root.with_suffix(".away") if self.is_away else self.root

    @property
    def store(self) -> Path:
        return self.place / "store"

    @property
    def mnt(self) -> Path:
        return self.root / "mnt" / VM

    @property
    def folder(self) -> Path:
        return self.place / "disks" / VM

    @property
    def socket(self) -> str:
        return str(self.root / "state" / "vms" / VM / "tracker.sock")

    @property
    def runs(self) -> bool:
        return self.run is not None and self.run.poll() is None

    @property
    def party(self) -> Party:
        return Party(home=self.home, root=str(self.root), host="")

    def holds(self, content: Content, *, others: list[Content] | None = None) -> None:
        """From now on."""
        self.content, self.others = content, others or []
        now_ns = time.time_ns()
        self.versions.append(Version(now_ns, now_ns, content))

    def holds_nothing(self) -> None:
        self.content, self.others = None, []


class TwoHomes:
    """See the module. A has the VM at first, and sends it to B's store, which it reaches by way of `link`. What is
    random comes from `seed`."""

    def __init__(self, root: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.root = root
        self.story: list[str] = []
        self.sides = {name: Side(name, root / name) for name in "AB"}
        self.a, self.b = self.sides["A"], self.sides["B"]
        self.link = root / "to-B"
        self.tests: list[tuple[Side, Path]] = []

    def begin(self) -> None:
        """Make both homes; A has the VM, and sends it to B's store."""
        for side in self.sides.values():
            side.folder.parent.mkdir(parents=True)
            (side.root / "mnt").mkdir()
            target = f'target = "{self.link}/store"\n' if side is self.a else ""
            (side.root / "hvfuse.toml").write_text(
                f'[replication]\nfrequency = "1h"\nhard_limit = 1000\nresync_window = "always"\n{target}'
            )
        (self.root / "C").mkdir()
        self.link.symlink_to(self.b.root)
        self.a.folder.mkdir()
        content = {name: self.random.randbytes(size) for name, size in DISKS.items()}
        for name, data in content.items():
            (self.a.folder / name).write_bytes(data)
        self.a.holds(content)
        for words in (("mount", VM), ("replicate", VM)):
            assert self.hvfuse(self.a, *words) == 0
        self.a.home = (self.a.root / "state" / "home-id").read_text().strip()
        assert self.hvfuse(self.b, "status") in (0, 3, 4)

    def tell(self, text: str) -> None:
        self.story.append(f"{time.strftime('%H:%M:%S')} {text}")

    def environment(self) -> dict[str, str]:
        return Installation(self.root).environment()

    def hvfuse(self, side: Side, *words: str, killed_after: float | None = None) -> int | None:
        """Run a command. Returns its exit code; None if it was killed."""
        command = Installation(side.root).command(*words)
        process = subprocess.Popen(
            command, cwd="/", env=self.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=killed_after or PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            assert killed_after is not None, f"{side.name}: {words}: no end after {PATIENCE} s\n{out}\n{err}"
            self.tell(f"{side.name}: {' '.join(words)} -> killed after {killed_after:.2f} s")
            return None
        self.tell(f"{side.name}: {' '.join(words)} -> {process.returncode} {err.strip() or out.strip()[:200]}")
        assert "Traceback" not in err and "internal error" not in err, f"{words}\n{out}\n{err}"
        if words[0] != "status":
            assert process.returncode in (0, *REFUSALS), f"{words}: {process.returncode}\n{out}\n{err}"
        return process.returncode

    def start_run(self, side: Side) -> None:
        self.tell(f"{side.name}: run")
        with open(side.root / "run.out", "ab") as out:
            command = Installation(side.root).command("run")
            side.run = subprocess.Popen(
                command, cwd="/", env=self.environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        side.run_at = time.monotonic()

    def end_run(self, side: Side, number: signal.Signals) -> None:
        if side.run is not None:
            self.tell(f"{side.name}: run gets {number.name}")
            side.run.send_signal(number)
            side.run.wait(PATIENCE)
            side.run = None

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(pid)
                select.select([fd], [], [], 10)
                os.close(fd)

    def bring_down(self, side: Side) -> None:
        """The host of a home stops."""
        self.end_run(side, signal.SIGKILL)
        for _ in range(3):
            for pid in processes_of(side.root):
                self.kill(pid)
        for mount in mounts_below(side.root):
            subprocess.run(["umount", "-l", mount], capture_output=True, check=False)
        for test in [one for one in self.tests if one[0] is side]:
            subprocess.run(["umount", "-l", str(test[1])], capture_output=True, check=False)

    def go_away(self, side: Side) -> None:
        self.tell(f"{side.name} goes away")
        self.bring_down(side)
        side.root.rename(side.root.with_suffix(".away"))
        side.is_away = True

    def come_back(self, side: Side) -> None:
        self.tell(f"{side.name} comes back")
        side.place.rename(side.root)
        side.is_away = False

    def close(self) -> None:
        """Leave nothing behind."""
        for side in self.sides.values():
            if not side.is_away:
                self.bring_down(side)
        for mount in mounts_below(self.root):
            subprocess.run(["umount", "-l", mount], capture_output=True, check=False)
        for pid in processes_of(self.root):
            self.kill(pid)

    def logs(self) -> Iterator[tuple[Path, str]]:
        for side in self.sides.values():
            for path in [side.place / "run.out", *sorted((side.place / "state").rglob("*.log"))]:
                if path.exists():
                    yield path, path.read_text(errors="replace")


def write_direct(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer.write(data)
            assert os.pwrite(fd, buffer, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def started_at(pid: int) -> float:
    """When a process began, on the monotonic clock, to a hundredth of a second."""
    fields: list[Any] = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK") - (time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic())
