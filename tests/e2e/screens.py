"""Real screens for the documentation: `tools/screens` writes them into docs/status.md, between its markers.

Each is what `hvfuse status` and `hvfuse status web01` say of an installation that was brought into that health for
real: nothing of it is made up, or edited but for the directory's name.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from hvfuse.control.daemon import serving_pid

from .conftest import Installation, wait_until

MIB = 1 << 20
SIZE = 2048 * MIB
CONFIG = """
[replication]
frequency = "5s"
resync_window = "always"
[policy.slow]
throttle = "4MB/s"
"""
MARK = re.compile(r"(<!-- screen: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def shell(installation: Installation, *arguments: str) -> str:
    """What a terminal would show of a command; the directory is shown as a home of anybody's."""
    done = subprocess.run(
        installation.command(*arguments), env=installation.environment(), cwd="/", capture_output=True, text=True
    )
    typed = " ".join(("hvfuse", *arguments))
    told = (done.stdout + done.stderr).replace(str(installation.root), "/srv/hvfuse")
    return f"$ {typed}; echo $?\n{told}{done.returncode}\n"


def both(installation: Installation) -> str:
    return shell(installation, "status") + "\n" + shell(installation, "status", "web01")


def has(installation: Installation, *reasons: str, state: str = "Replicating") -> Callable[[], bool]:
    """Whether these are the reasons that web01 has now."""

    def is_so() -> bool:
        status = installation.status("web01")
        return status["state"] == state and [reason["id"] for reason in status["reasons"]] == list(reasons)

    return is_so


def wait(installation: Installation, is_so: Callable[[], bool]) -> None:
    wait_until(is_so, lambda: str(installation.status("web01")))


def make(installation: Installation) -> None:
    for vm in ("db01", "web01"):
        (installation.disks / vm).mkdir(parents=True)
        with open(installation.disks / vm / "os.raw", "wb") as file:
            file.write(os.urandom(8 * MIB))
            file.truncate(SIZE)
    (installation.root / "hvfuse.toml").write_text(CONFIG)


def write(installation: Installation, size: int) -> None:
    with open(installation.mnt / "web01" / "os.raw", "r+b") as disk:
        disk.seek(64 * MIB)
        disk.write(os.urandom(size))


def set_policy(installation: Installation, text: str) -> None:
    (installation.root / "hvfuse.toml").write_text(CONFIG + text)


@contextmanager
def stopped(installation: Installation, role: str) -> Iterator[None]:
    pid = serving_pid(str(installation.root / "state" / "vms" / "web01" / f"{role}.sock"))
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def screens(installation: Installation) -> dict[str, str]:
    """By the name of the marker."""
    make(installation)
    installation.start()
    for vm in ("db01", "web01"):
        wait_until(lambda vm=vm: installation.status(vm).get("health") == "Normal", installation.logs)
    found = {}
    write(installation, 3 * MIB)
    found["normal"] = both(installation)

    installation.hvfuse("replication", "suspend", "web01")
    wait(installation, has(installation, "suspended", state="Suspended"))
    write(installation, 5 * MIB)
    found["warning"] = both(installation)
    installation.hvfuse("replication", "resume", "web01")
    wait(installation, has(installation))

    with stopped(installation, "shipper"):
        wait(installation, has(installation, "no-progress"))
        found["critical"] = both(installation)
    wait(installation, has(installation))

    # Somebody writes to the image while it is not mounted. With a throttle, there is time to look.
    set_policy(installation, '[vm.web01]\npolicy = "slow"\n')
    installation.stop()
    with open(installation.disks / "web01" / "os.raw", "r+b") as disk:
        disk.seek(256 * MIB)
        disk.write(os.urandom(64 * MIB))
    installation.start()
    wait(
        installation,
        lambda: (
            has(installation, "copying", state="Resynchronizing")()
            and installation.status("web01")["copy"]["bytes_sent"] > 0
        ),
    )
    found["resynchronizing"] = both(installation)
    return found


def main() -> None:
    page = Path(sys.argv[1])
    with (
        tempfile.TemporaryDirectory(prefix="hvfuse-screens-") as folder,
        closing(Installation(Path(folder) / "home")) as installation,
    ):
        found = screens(installation)
    text = page.read_text()
    names = [match[2] for match in MARK.finditer(text)]
    assert sorted(names) == sorted(found), f"{page} has the markers {names}"
    page.write_text(MARK.sub(lambda match: f"{match[1]}```\n{found[match[2]]}```\n{match[4]}", text))


if __name__ == "__main__":
    main()
