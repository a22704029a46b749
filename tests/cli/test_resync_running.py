"""`hvfuse resync` with real trackers and shippers: ordered, held up over restarts, given up, interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hvfuse import wire
from hvfuse.control.records import Records
from hvfuse.shipper.orders import Orders
from tests.cli.conftest import CommandLine
from tests.e2e.conftest import PATIENCE, REPOSITORY, wait_until

pytestmark = pytest.mark.mount
SIZE = 24 << 20
NO_ORDERS = {
    "at": None,
    "now": False,
    "full": False,
    "suspended": False,
    "cancelled": False,
    "seed": None,
    "repair": False,
    "paused": False,
}
LOCKER = """
import lmdb, sys
env = lmdb.open(sys.argv[1], map_size=1 << 30, max_dbs=64)
with env.begin(write=True):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def busy_store(root: Path) -> Iterator[Callable[[], None]]:
    """Somebody writes to the store until what this yields is called, and nobody else can."""
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(root / "store" / "store.lmdb")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        try:
            yield lambda: process.communicate() and None
        finally:
            process.communicate()


class Supervised:
    """A home with VM vm1 on which `hvfuse run` runs; resynchronisations wait to be asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._running: subprocess.Popen[bytes] | None = None
        (root / "disks" / "vm1").mkdir(parents=True)
        (root / "hvfuse.toml").write_text('[replication]\nfrequency = "1h"\nresync = "manual"\n')
        with open(root / "disks" / "vm1" / "os.raw", "wb") as file:
            file.write(b"first" * 1000)
            file.truncate(SIZE)

    def start(self) -> None:
        with open(self.root / "run.out", "ab") as out:
            self._running = subprocess.Popen(
                self.command("run"), cwd="/", env=self.environment(), stdout=out, stderr=out, start_new_session=True
            )

    def stop(self) -> None:
        assert self._running is not None
        self._running.send_signal(signal.SIGINT)
        assert self._running.wait(PATIENCE) == 0, (self.root / "run.out").read_text()

    @property
    def is_running(self) -> bool:
        return self._running is not None and self._running.poll() is None

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "hvfuse", "--home", str(self.root), *arguments]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


class At:
    """Commands on a supervised home, called in this process."""

    def __init__(self, supervised: Supervised, hvfuse: CommandLine) -> None:
        self.run = supervised
        self.root = supervised.root
        self.hvfuse = hvfuse

    def told(self, *arguments: str, code: int = 0) -> str:
        """What a command says that ends with `code`."""
        assert self.hvfuse(*arguments) == code, self.hvfuse.out + self.hvfuse.err
        return self.hvfuse.out + self.hvfuse.err

    def status(self) -> dict[str, Any]:
        (found,) = self.hvfuse.json("status")["vms"]
        return dict(found)

    def wait_for(self, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the status is as it should be; returns it."""
        found: dict[str, Any] = {}

        def holds() -> bool:
            assert self.run.is_running, (self.root / "run.out").read_text()
            found.clear()
            found.update(self.status())
            return true(found)

        wait_until(holds, lambda: str(found))
        return found

    def wait_for_state(self, state: str) -> dict[str, Any]:
        return self.wait_for(lambda status: status["state"] == state)


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    """One for all, as it takes seconds to start; every test leaves it replicating."""
    made = Supervised(tmp_path_factory.mktemp("supervised"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def home(supervised: Supervised, capsys: pytest.CaptureFixture[str]) -> At:
    at = At(supervised, CommandLine(supervised.root, capsys))
    at.wait_for_state("Replicating")
    return at


def doubted(home: At) -> None:
    """All of the disk may differ from the replica."""
    socket = str(home.root / "state" / "vms" / "vm1" / "tracker.sock")
    told = wire.request(socket, "status")
    disks = {disk["disk_id"]: [[0, disk["size"]]] for disk in told["disks"]}
    wire.request(socket, "doubt", generation=told["generation"], reason="a byte was found to differ", disks=disks)
    status = home.wait_for_state("WaitingForStartResynchronize")
    assert reasons(status) == {"resync-required": "hvfuse resync vm1 --now"}
    assert 'hvfuse.toml says resync = "manual"' in status["reasons"][0]["text"]


def write(disk: Path, data: bytes, offset: int = 0) -> None:
    with open(disk, "r+b") as file:
        file.seek(offset)
        file.write(data)


def reasons(status: dict[str, Any]) -> dict[str, str]:
    return {reason["id"]: reason["next_command"] for reason in status["reasons"]}


def test_everything_is_compared_at_once_or_at_a_time_and_points_stay(home: At) -> None:
    said = home.told("resync", "vm1", code=2)
    assert "vm1: the replica is up to date: there is nothing to resynchronise\n  hint: hvfuse resync vm1 --full" in said
    done = home.hvfuse.json("resync", "vm1", "--full")
    assert (done["action"], done["copied"], done["orders"]) == ("start", True, NO_ORDERS)
    assert done["last_copy"]["bytes_compared"] == SIZE
    status = home.status()
    assert (status["state"], status["health"]) == ("Replicating", "Normal")
    points = status["points"]
    home.told("resync", "vm1", "--full", "--at", f"{datetime.now(UTC) + timedelta(hours=3):%Y-%m-%dT%H:%M:%SZ}")
    assert home.told("resync", "vm1", "--cancel") == "vm1: the order was taken back; replication goes on\n"
    assert home.status()["orders"] == NO_ORDERS
    assert reasons(home.status()) == {}
    at = f"{datetime.now(UTC) + timedelta(seconds=4):%Y-%m-%dT%H:%M:%SZ}"
    ordered = home.hvfuse.json("resync", "vm1", "--full", "--at", at)
    shown = at.replace("Z", ".000Z")
    assert (ordered["orders"]["at"], ordered["due"], ordered["shipper"]) == (shown, shown, True)
    status = home.wait_for(lambda status: status["points"] > points and status["orders"] == NO_ORDERS)
    status = home.wait_for_state("Replicating")
    assert status["copy_due"] is None


def test_a_suspended_copy_stays_so_over_a_restart_and_goes_on(home: At) -> None:
    doubted(home)
    with busy_store(home.root) as let_go:
        ordered = home.hvfuse.json("resync", "vm1", "--no-wait")
        assert (ordered["orders"]["now"], ordered["due"]) == (True, None)
        status = home.wait_for_state("Resynchronizing")
        assert status["copy"]["kind"] == "resync"
        assert reasons(status) == {"copying": None}
        assert "suspended" in home.told("resync", "vm1", "--suspend")
        let_go()
    home.wait_for_state("ResynchronizeSuspended")
    home.run.stop()
    home.run.start()
    status = home.wait_for(lambda status: len(status["reasons"]) == 1)
    assert (status["state"], status["health"]) == ("ResynchronizeSuspended", "Critical")
    assert reasons(status) == {"resync-required": "hvfuse resync vm1 --resume"}
    write(home.root / "mnt" / "vm1" / "os.raw", b"meanwhile")
    assert "hint: hvfuse resync vm1 --resume" in home.told("resync", "vm1", code=1)
    assert "hint: hvfuse resync vm1 --resume" in home.told("replicate", "vm1", code=1)
    done = home.hvfuse.json("resync", "vm1", "--resume", "--wait")
    assert (done["copied"], done["orders"]) == (True, NO_ORDERS)
    assert home.wait_for_state("Replicating")["health"] == "Normal"
    assert home.told("resync", "vm1", "--resume") == "vm1: copies are not suspended\n"


def test_a_cancelled_copy_waits_to_be_asked_for_and_leaves_every_point(home: At, tmp_path: Path) -> None:
    points = home.status()["points"]
    assert "there is no copy to cancel" in home.told("resync", "vm1", "--cancel", code=2)
    doubted(home)
    with busy_store(home.root) as let_go:
        home.told("resync", "vm1", "--no-wait")
        home.wait_for_state("Resynchronizing")
        said = home.told("resync", "vm1", "--cancel")
        assert said.startswith("vm1: cancelled; dropped what was staged of it: ")
        let_go()
    status = home.wait_for_state("WaitingForStartResynchronize")
    assert (status["health"], status["points"], status["copy"]) == ("Critical", points, None)
    assert reasons(status)["resync-required"] == "hvfuse resync vm1 --now"
    home.told("failover", "test", "vm1", "--mount", str(tmp_path / "view"))
    home.told("failover", "cleanup", "vm1")
    assert home.hvfuse.json("resync", "vm1", "--now")["copied"]
    assert home.wait_for_state("Replicating")["points"] > points


def test_ctrl_c_ends_the_waiting_and_not_the_copy(home: At) -> None:
    doubted(home)
    with busy_store(home.root) as let_go:
        waiting = subprocess.Popen(
            home.run.command("resync", "vm1"),
            cwd="/", env=home.run.environment(), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        home.wait_for_state("Resynchronizing")
        waiting.send_signal(signal.SIGINT)
        _, said = waiting.communicate(timeout=60)
        assert waiting.returncode == 130
        assert "vm1: it goes on all the same; `hvfuse status vm1` tells how far it is" in said.splitlines()
        let_go()
    status = home.wait_for_state("Replicating")
    assert status["orders"] == NO_ORDERS


def test_without_a_shipper_the_command_makes_the_copy_itself(hvfuse: CommandLine) -> None:
    disk = hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    write(disk, b"first")
    assert hvfuse("resync", "vm", "--suspend") == 0
    assert hvfuse("replicate", "vm") == 1
    assert "hint: hvfuse resync vm --resume" in hvfuse.err
    assert hvfuse("resync", "vm", "--resume") == 0
    done = hvfuse.json("resync", "vm")
    assert (done["copied"], done["last_copy"]["is_whole"], done["orders"]) == (True, True, NO_ORDERS)
    assert hvfuse("resync", "vm") == 2
    assert hvfuse("resync", "vm", "--suspend") == 2
    with Records(str(hvfuse.root / "state" / "records")) as records:
        records.change_orders("vm", Orders.suspend)
    assert hvfuse("resync", "vm", "--resume") == 0
    assert hvfuse("resync", "vm", "--full") == 0
    first, second = hvfuse.out.splitlines()
    assert first == "vm: resynchronised: 1 MiB of 1 MiB compared, 128 B sent"
    assert second.startswith("vm: recovery point ")
    assert hvfuse.json("status")["vms"][0]["state"] == "Replicating"


def test_without_a_shipper_ctrl_c_ends_the_copy_and_the_next_command_goes_on(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    assert hvfuse("replicate", "vm") == 0
    with busy_store(hvfuse.root) as let_go:
        copying = subprocess.Popen(
            [sys.executable, "-m", "hvfuse", "--home", str(hvfuse.root), "resync", "vm", "--full"],
            cwd="/", env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_until(lambda: hvfuse.json("status")["vms"][0]["orders"]["full"], lambda: hvfuse.out)
        copying.send_signal(signal.SIGINT)
        let_go()
        _, said = copying.communicate(timeout=60)
    assert copying.returncode == 130
    assert "vm: stopped here; `hvfuse resync vm` or `hvfuse run` goes on where it was" in said.splitlines()
    assert hvfuse.json("resync", "vm")["copied"]
    assert hvfuse.json("status")["vms"][0]["orders"] == NO_ORDERS


def test_without_a_shipper_a_cancelled_copy_leaves_nothing_staged(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    assert hvfuse("replicate", "vm") == 0
    assert hvfuse("resync", "vm", "--full", "--no-wait") == 0
    assert hvfuse.out.splitlines()[1] == "vm: no shipper runs: nothing begins before `hvfuse run`"
    assert hvfuse("resync", "vm", "--cancel") == 0
    assert hvfuse.out == "vm: the order was taken back; replication goes on\n"
    assert hvfuse("store", "check") == 0
    assert hvfuse("replicate", "vm") == 0
    assert hvfuse.json("status")["vms"][0]["points"] == 2
