"""A Linux guest with the real guest agent on the mount: what its two kinds of recovery points are worth to its
file system, and that it goes on after standing still."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import REPOSITORY, Installation, installation, run
from tests.guest.machine import Guest, booted

__all__ = ["installation"]

pytestmark = [pytest.mark.mount, pytest.mark.guest]

HOLDER = """
import sys, time
from hvfuse.control.guest import GuardedGuest
from hvfuse.control.guest_settings import GuestSettings
with GuardedGuest("web01", lambda: GuestSettings(agent=sys.argv[1]), sys.argv[2] + "/guest").frozen():
    print("frozen", flush=True)
    time.sleep(60)
"""

VM = "web01"
DISK = "os.raw"


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="hvfuse-") as directory:
        yield Path(directory)


def header(image: Path) -> dict[str, str]:
    """What an ext4's superblock says."""
    lines = run("dumpe2fs", "-h", image).splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def fsck(image: Path, *how: str) -> int:
    done = subprocess.run(["e2fsck", *how, str(image)], capture_output=True, text=True)
    print(f"e2fsck {' '.join(how)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.returncode


def last_line(image: Path) -> int:
    """How far the guest's own journal of what it does had come."""
    text = run("debugfs", "-R", "cat /journal", image)
    return max((int(number) for number in re.findall(r"line (\d+)\n", text)), default=0)


def die_while_it_is_frozen(guest: Guest, directory: Path) -> None:
    """A process that has the guest frozen is killed: the guest writes on."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(guest.agent), str(directory)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"frozen\n"
    time.sleep(0.5)  # what it said before is on its way
    stood = guest.written()
    time.sleep(1)
    assert guest.written() == stood, "a frozen guest does not get on"
    holder.kill()
    killed = time.monotonic()
    while guest.written() == stood:
        assert time.monotonic() - killed < 10
        time.sleep(0.02)
    print(f"the guest wrote again {time.monotonic() - killed:.3f} s after the death of who had it frozen")
    holder.wait()
    holder.stdout.close()


def test_only_an_application_consistent_point_needs_no_recovery(
    installation: Installation, tmp_path: Path, sockets: Path
) -> None:
    folder = installation.disks / VM
    folder.mkdir(parents=True)
    with open(folder / DISK, "wb") as file:
        file.truncate(64 << 20)
    run("mkfs.ext4", "-q", "-F", folder / DISK)
    (installation.root / "hvfuse.toml").write_text(
        '[replication]\nfrequency = "1h"\nhard_limit = 1000\nresync_window = "always"\n'
        f'[vm.{VM}.guest]\nagent = "{sockets}/agent.sock"\n'
    )
    installation.start()
    installation.wait_for_state(VM)
    fallen_back = installation.hvfuse("replicate", VM, "--app-consistent", code=14)
    assert "crash-consistent: " in fallen_back, "no guest runs yet"

    with booted(installation.mnt / VM / DISK, sockets) as guest:
        crash = installation.json("replicate", VM)
        time.sleep(1)
        application = installation.json("replicate", VM, "--app-consistent")
        die_while_it_is_frozen(guest, tmp_path)
        after = installation.json("replicate", VM)
    print(f"the guest stood still for {application['frozen_seconds']:.3f} s")
    assert (crash["consistency"], crash["frozen_seconds"]) == ("crash-consistent", 0.0)
    assert (application["consistency"], application["freeze_error"]) == ("app-consistent", None)
    assert 0 < application["frozen_seconds"] < 5
    kinds = {point["id"]: point["kind"] for point in installation.json("point", "list", VM)["points"]}
    assert (kinds[crash["point"]], kinds[application["point"]]) == ("crash-consistent", "app-consistent")

    views = {name: tmp_path / name for name in ("crash", "application", "after")}
    installation.test_failover(VM, views["crash"], point=crash["point"])
    installation.test_failover(VM, views["application"], point="latest-app-consistent")
    installation.test_failover(VM, views["after"], point=after["point"])
    clean = views["application"] / DISK
    assert "needs_recovery" not in header(clean)["Filesystem features"]
    assert header(clean)["Filesystem state"] == "clean"
    assert fsck(clean, "-fn") == 0

    torn = views["crash"] / DISK
    assert "needs_recovery" in header(torn)["Filesystem features"]
    assert fsck(torn, "-fy") in (0, 1), "the journal is replayed into the overlay"
    assert "needs_recovery" not in header(torn)["Filesystem features"]
    assert fsck(torn, "-fn") == 0

    later = views["after"] / DISK
    assert fsck(later, "-fy") in (0, 1)
    assert last_line(torn) < last_line(clean) < last_line(later), "the guest writes before, and again afterwards"
    installation.hvfuse("failover", "cleanup", VM)
