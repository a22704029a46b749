"""The session of docs/drill.md, typed for real: `tools/drill` writes its screens into the page, between its markers.

A VM is protected, failed over on trial and planned, replicated the other way, and brought home, by the very commands
that stand on the page. Nothing on its screens is made up; what differs from run to run (times, ids, process numbers,
digests) is shown by placeholders, so that the page changes only where the product does.

The session checks itself: what was written is compared with what is found, on either side, byte by byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from hvfuse.control.records import Records

from .conftest import PATIENCE, REPOSITORY, mounts_below, processes_of, wait_until

MIB = 1 << 20
MARK = re.compile(r"(<!-- screen: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
COMMAND = re.compile(r"^\$ ((?:.*<<'END'\n(?:.*\n)*?END$)|.*)", re.MULTILINE)
"""As a page shows it: a line, or one with the text that it takes in."""

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)?")
FIRST_TIME = datetime(2026, 11, 22, 18, 30)
GENERATION = re.compile(r"\b[0-9a-f]{8}(?=-\d{6}\b)")


class Terminal:
    """A shell, in which /srv is a directory of its own. Keeps what was typed and answered."""

    def __init__(self, folder: Path) -> None:
        self.srv = folder / "srv"
        self.srv.mkdir()
        self.screens: dict[str, str] = {}
        self._running: list[subprocess.Popen[bytes]] = []
        programs = folder / "bin"
        programs.mkdir()
        (programs / "hvfuse").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m hvfuse "$@"\n')
        (programs / "hvfuse").chmod(0o755)
        self._environment = {
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY),
            "LC_ALL": "C.UTF-8",
        }  # fmt: skip

    def path(self, shown: str) -> Path:
        """Where a path of the page, "/srv/…", really is."""
        return self.srv / shown.removeprefix("/srv/")

    def type(self, screen: str, command: str, *, code: int = 0) -> str:
        """Type a command that ends; returns what it says. It is the next one on `screen`."""
        told = self.ask(command, code=code)
        self._keep(screen, command, told)
        return told

    def ask(self, command: str, *, code: int = 0) -> str:
        """The same, on no screen."""
        done = subprocess.run(
            ["bash", "-c", self._real(command)], env=self._environment, cwd="/", text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE,
        )  # fmt: skip
        told = done.stdout.replace(str(self.srv), "/srv")
        assert done.returncode == code, f"$ {command}\n{told}exit code {done.returncode}\n{self.logs()}"
        return told

    def json(self, command: str) -> dict[str, Any]:
        found = json.loads(self.ask(f"{command} --json"))
        assert isinstance(found, dict)
        return found

    def start(self, screen: str, command: str) -> subprocess.Popen[bytes]:
        """Type a command that runs in the background, with its `&`."""
        program = f"exec {self._real(command.removesuffix('&').strip())}"
        with open(self.srv / "background.log", "ab") as log:
            made = subprocess.Popen(
                ["bash", "-c", program], env=self._environment, cwd="/", stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._running.append(made)
        self._keep(screen, command, "")
        return made

    def _real(self, command: str) -> str:
        return command.replace("/srv/", f"{self.srv}/")

    def _keep(self, screen: str, command: str, told: str) -> None:
        self.screens[screen] = self.screens.get(screen, "") + f"$ {command}\n{told}"

    def logs(self) -> str:
        paths = [path for path in sorted(self.srv.rglob("*.log")) if path.is_file()]
        return "".join(f"\n--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        for mount in sorted(mounts_below(self.srv), key=_is_hvfuse):
            if not _is_hvfuse(mount):
                subprocess.run(["umount", "-l", mount], capture_output=True, check=False)
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self._running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for mount in mounts_below(self.srv):
            subprocess.run(["umount", "-l", mount], capture_output=True, check=False)
        for home in ("source", "target"):
            for pid in processes_of(self.srv / home):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _is_hvfuse(mount: str) -> bool:
    with open("/proc/self/mounts", encoding="utf-8") as file:
        return any(line.split()[1] == mount and "fuse" in line.split()[2] for line in file)


S, T = "hvfuse --home /srv/source", "hvfuse --home /srv/target"

CONFIG = """cat > /srv/source/hvfuse.toml <<'END'
[replication]
target = "/srv/target/store"
frequency = "1m"
END"""

LOAD = (
    "fio --name=load --directory=/srv/guest --rw=randwrite --direct=1 --bs=16k --size=8M --rate=1M --time_based "
    "--runtime=3"
)
NEW_BYTES = 16 * MIB


@dataclass(slots=True)
class Found:
    """What the session came across: `sent`: bytes on the way back, of the copy and of the cycles after it; `written`:
    bytes that the guest's file system wrote in that time; `orders`: what the guest's file said last."""

    sent: int = 0
    written: int = 0
    orders: str = ""


def session(terminal: Terminal) -> Found:
    """The whole drill. Raises AssertionError where data is not what it has to be."""
    found = Found()
    _protect(terminal)
    older = _load(terminal)
    _try_out(terminal, older)
    _fail_over(terminal)
    _reverse(terminal, found)
    _come_home(terminal, found)
    return found


def _protect(terminal: Terminal) -> None:
    type_ = terminal.type
    type_("homes", "mkdir -p /srv/source/disks/web /srv/target /srv/guest /srv/trial")
    type_("homes", CONFIG)
    type_("homes", "mkfs.ext4 -q /srv/source/disks/web/root.raw 256M")
    terminal.start("run", f"{S} run > /srv/source.log 2>&1 &")
    _until(terminal, f"{S} status --json", '"Replicating"')
    type_("run", f"{S} status")
    type_("guest", "mount -o loop /srv/source/mnt/web/root.raw /srv/guest")
    type_("guest", "echo 'order 1: paid' > /srv/guest/orders")
    type_("guest", "sync")


def _load(terminal: Terminal) -> str:
    """Cycles are shipped while the guest writes. Returns the point at which there was one order."""
    load = terminal.start("load", f"{LOAD} > /srv/load.log 2>&1 &")
    first = terminal.type("load", f"{S} replicate web")
    terminal.type("load", "echo 'order 2: paid' >> /srv/guest/orders && sync")
    terminal.type("load", f"{S} replicate web")
    assert load.wait(PATIENCE) == 0, terminal.logs()
    terminal.type("load", f"{S} replicate web")
    terminal.type("points", f"{T} point list web")
    older = re.search(r"[0-9a-f]{8}-\d{6}", first)
    assert older is not None, first
    return older[0]


def _try_out(terminal: Terminal, older: str) -> None:
    type_ = terminal.type
    type_("test", f"{T} failover test web --point {older}")
    type_("test", "mount -o loop '/srv/target/mnt/web - Test/root.raw' /srv/trial")
    assert type_("test", "cat /srv/trial/orders") == "order 1: paid\n"
    assert type_("test", "cat /srv/guest/orders") == "order 1: paid\norder 2: paid\n"
    type_("scribble", "echo 'order 3: a trial' >> /srv/trial/orders")
    type_("scribble", "umount /srv/trial")
    type_("scribble", f"{T} failover cleanup web --note 'orders are there'")
    type_("scribble", f"{T} failover list web")
    type_("scribble", f"{T} measure web")


def _fail_over(terminal: Terminal) -> None:
    type_ = terminal.type
    type_("plan", f"{S} failover planned web --dry-run")
    type_("refused", f"{S} failover planned web --yes", code=6)
    type_("prepare", "umount /srv/guest")
    type_("prepare", f"{S} failover planned web --yes")
    type_("prepare", f"{S} status web", code=3)
    type_("take", f"{T} failover planned web --yes")
    digests = type_("equal", "sha256sum /srv/source/mnt/web/root.raw /srv/target/mnt/web/root.raw").split()
    assert digests[0] == digests[2] == _sha256(terminal.path("/srv/source/disks/web/root.raw"))
    type_("equal", "mount -o loop,ro,noload /srv/source/mnt/web/root.raw /srv/trial")
    type_("equal", "cat /srv/trial/orders")
    type_("equal", "umount /srv/trial")


def _reverse(terminal: Terminal, found: Found) -> None:
    type_ = terminal.type
    type_("new", "mount -o loop /srv/target/mnt/web/root.raw /srv/guest")
    written = _Written(terminal.path("/srv/guest"))
    assert type_("new", "cat /srv/guest/orders") == "order 1: paid\norder 2: paid\n"
    type_("new", "echo 'order 4: paid, on the target' >> /srv/guest/orders")
    type_("new", f"dd if=/dev/urandom of=/srv/guest/new bs=1M count={NEW_BYTES // MIB} conv=fsync status=none")
    type_("new", "sha256sum /srv/guest/new > /srv/new.sha256")
    terminal.start("commit", f"{T} run > /srv/target.log 2>&1 &")
    type_("commit", f"{T} failover commit web --wait --yes")
    type_("commit", f"{T} status web", code=3)
    type_("reverse", f"{S} replication reverse web --yes")
    type_("reverse", f"{T} replication reverse web --yes")
    _until(terminal, f"{T} status --json", '"state": "Replicating"')
    type_("reverse", f"{T} job list web")
    job = terminal.json(f"{T} job list web")["jobs"]
    number = next(one["id"] for one in reversed(job) if "nitial" in one["kind"])
    type_("way-back", f"{T} job show {number}")
    type_("way-back", f"{T} replicate web")
    type_("way-back", f"{T} point list web")
    found.written = written()
    points = terminal.json(f"{T} point list web")["points"]
    found.sent = _sent_by_copy(terminal.path("/srv/target")) + sum(point["stored_bytes"] for point in points)
    type_("way-back", f"{T} status web")


def _come_home(terminal: Terminal, found: Found) -> None:
    type_ = terminal.type
    type_("home", "umount /srv/guest")
    type_("home", f"{T} failover planned web --yes")
    type_("home", f"{S} failover planned web --yes")
    type_("home", f"{S} failover commit web --wait --yes")
    type_("again", f"{T} replication reverse web --yes")
    type_("again", f"{S} replication reverse web --yes")
    _until(terminal, f"{S} status --json", '"state": "Replicating"')
    type_("again", f"{S} status web")
    type_("end", "mount -o loop /srv/source/mnt/web/root.raw /srv/guest")
    found.orders = type_("end", "cat /srv/guest/orders")
    type_("end", "sha256sum -c /srv/new.sha256")
    type_("end", "umount /srv/guest")
    type_("end", "e2fsck -fn /srv/source/mnt/web/root.raw")
    type_("end", f"{S} replicate web")
    type_("end", f"{S} verify web --all")


class _Written:
    """Bytes written to the device of a mounted file system since this was made."""

    def __init__(self, mounted: Path) -> None:
        number = os.stat(mounted).st_dev
        self._stat = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
        self._before = self._sectors()

    def _sectors(self) -> int:
        return int(self._stat.read_text().split()[6])

    def __call__(self) -> int:
        return (self._sectors() - self._before) * 512


def _sent_by_copy(home: Path) -> int:
    """Bytes that the last copy of the VM sent."""
    with Records(str(home / "state" / "records")) as records:
        kept = records.read("web").last_copy
    assert kept is not None and isinstance(kept["bytes_sent"], int)
    return kept["bytes_sent"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _until(terminal: Terminal, command: str, words: str) -> None:
    """A person would look again and again."""
    wait_until(lambda: words in terminal.ask(f"{command} || true"), terminal.logs)


# The page ---------------------------------------------------------------------------------------------------------


def on_page(screens: dict[str, str]) -> dict[str, str]:
    """With placeholders for what is another in each run: ids, times, digests, processes, the host."""
    whole = "\n".join(screens.values())
    times = sorted(set(TIME.findall(whole)))
    shown_times = {
        time: (FIRST_TIME + timedelta(seconds=20 * at)).isoformat() + ".000Z" for at, time in enumerate(times)
    }
    ids = {each: _hex(f"generation {at}", 8) for at, each in enumerate(dict.fromkeys(GENERATION.findall(whole)))}
    digests = {
        each: _hex(f"digest {at}", 64) for at, each in enumerate(dict.fromkeys(re.findall(r"\b[0-9a-f]{64}\b", whole)))
    }

    def shown(text: str) -> str:
        text = TIME.sub(lambda match: shown_times[match[0]], text)
        text = re.sub(r"\b[0-9a-f]{64}\b", lambda match: digests[match[0]], text)
        text = GENERATION.sub(lambda match: ids[match[0]], text)
        text = re.sub(r"(?m)^web: [a-z ]+: (?!100 %)\d+ %\n", "", text)  # it depends on the pace which are told
        text = re.sub(r"(?m)^Inode .* could be narrower.*\n\n?", "", text)
        text = re.sub(r"(pid|seed) \d+", r"\1 4711", text)
        text = re.sub(r"\b\d+\.\d+ ?([KMG]i?B/s)", r"9.9 \1", text)
        text = re.sub(r"\b\d\.\d s\b", "0.5 s", text)
        return text.replace(f" on {socket.gethostname()}", " on vmhost")

    return {name: shown(text) for name, text in screens.items()}


def _hex(what: str, length: int) -> str:
    return hashlib.sha256(what.encode()).hexdigest()[:length]


def page_commands(page: str) -> dict[str, list[str]]:
    """What a page has typed, by the name of the screen; without what a cycle more or less would change."""
    return {match[2]: [_general(typed) for typed in COMMAND.findall(match[3])] for match in MARK.finditer(page)}


def commands_on_page(terminal: Terminal) -> dict[str, list[str]]:
    """What has been typed, as `page_commands` would find it."""
    return {name: [_general(typed) for typed in COMMAND.findall(text)] for name, text in terminal.screens.items()}


def _general(command: str) -> str:
    return re.sub(r"\b[0-9a-f]{8}-\d{6}\b", "POINT", re.sub(r"job show \d+", "job show ID", command))


def main() -> None:
    page = Path(sys.argv[1])
    with (
        tempfile.TemporaryDirectory(prefix="hvfuse-drill-") as folder,
        closing(Terminal(Path(folder))) as terminal,
    ):
        found = session(terminal)
        screens = on_page(terminal.screens)
    text = page.read_text()
    names = [match[2] for match in MARK.finditer(text)]
    assert sorted(names) == sorted(screens), f"{page} has {sorted(set(names) ^ set(screens))} too much or too little"
    page.write_text(MARK.sub(lambda match: f"{match[1]}```\n{screens[match[2]]}```\n{match[4]}", text))
    print(f"written {found.written} bytes, sent {found.sent}")


if __name__ == "__main__":
    main()
