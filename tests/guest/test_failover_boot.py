"""A guest whose host loses power is booted elsewhere, from its replica: what it had synced before the recovery point is
there. HVFUSE_ROUNDS says how often (1), each time another way; more than one are told in a table (`pytest -s`)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import astuple, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from hvfuse.control.boot import plan_failed_over
from hvfuse.control.config_file import ConfigFile
from hvfuse.control.guest_monitor import Monitor
from hvfuse.control.guest_plan import MONITOR
from hvfuse.control.guest_settings import Mode, Site
from hvfuse.words import time_text
from tests.e2e.conftest import Installation, mounts_below, processes_of, run, wait_until
from tests.guest.records import Report, Writer, machine, synced, wait_for_report

pytestmark = [pytest.mark.mount, pytest.mark.guest]

ROUNDS = int(os.environ.get("HVFUSE_ROUNDS", "1"))
VM, DISK = "web", "data.raw"
COMMITTED = "committed"

CONFIG = """
[replication]
frequency = "1s"
hard_limit = 1000
resync_window = "always"
target = {store}

[network.lan]
source = "lan-source"
target = "lan-target"
test = "lan-isolated"

[vm.web.guest]
qemu = {qemu}
validate = ["sh", "-c", {validate}]
"""

HARDWARE = (
    *("-serial", "file:{state}/console"),
    *("-drive", "file={disk:data.raw},format=raw,if=virtio,cache=none,werror=stop,rerror=stop"),
    # A network of one: a socket in the guest's state directory, by the name of what it is connected to.
    *("-netdev", "stream,id=lan,server=on,addr.type=unix,addr.path={network:lan}"),
    *("-device", "virtio-net-pci,netdev=lan,romfile="),
)

VALIDATE = """
until said=$(grep -a '^last ' "$HVFUSE_STATE/console"); do sleep 0.1; done
echo "$HVFUSE_MODE $HVFUSE_NETWORKS $said"
case $said in *"bad 0"*) ;; *) exit 1;; esac
"""


class Drill:
    """A source and a target, which share the target's store, and a VM whose guest keeps records."""

    def __init__(self, root: Path) -> None:
        self.source = Installation(root / "S")
        self.target = Installation(root / "T")
        self.source.root.mkdir(parents=True)
        self.target.root.mkdir()
        (self.target.root / "hvfuse.toml").write_text('[replication]\nfrequency = "1s"\n')
        (self.source.root / "hvfuse.toml").write_text(
            CONFIG.format(
                store=json.dumps(str(self.target.root / "store")),
                qemu=json.dumps([*machine(), *HARDWARE]),
                validate=json.dumps(VALIDATE),
            )
        )
        folder = self.source.disks / VM
        folder.mkdir(parents=True)
        with open(folder / DISK, "wb") as file:
            file.truncate(64 << 20)
        run("mkfs.ext4", "-q", "-F", folder / DISK)
        self.source.start()

    def close(self) -> None:
        for home in (self.source, self.target):
            for pid in guests_of(home):
                kill(pid)
            home.close()
            assert mounts_below(home.root) == []

    # The source ------------------------------------------------------------------------------------------------

    def boot_source(self) -> Writer:
        """The guest on the source's mount, as its definition says, once it is replicated."""
        self.source.wait_for_state(VM)
        config = ConfigFile(str(self.source.root)).current()
        plan = plan_failed_over(
            *(config.home(str(self.source.root)), config.policy(VM), VM),
            mode=Mode.PLANNED,
            point="",
            directory=str(self.source.mnt / VM),
            networks=config.networks,
            site=Site.SOURCE,
        )
        return Writer(plan.command, Path(plan.state_dir))

    def cut_power(self, guest: Writer, chance: random.Random) -> int:
        """Nothing of the source runs any more. Returns when that began, ns since 1970."""
        pids = [guest.pid, *processes_of(self.source.root)]
        assert len(pids) >= 4, "the guest, hvfuse run, a tracker and a shipper"
        chance.shuffle(pids)
        began = time.time_ns()
        for pid in pids:
            kill(pid)
        self.source.buried()

        def all_are_gone() -> bool:
            left = processes_of(self.source.root)  # what `hvfuse run` may have started just before its own end
            for pid in left:
                kill(pid)
            return not left

        wait_until(all_are_gone, lambda: f"{processes_of(self.source.root)}")
        return began

    def disk_is(self, what: str) -> bool:
        """Whether the source's disk is "held", "writable", or "away" for now."""
        try:
            with open(self.source.mnt / VM / DISK, "r+b", buffering=0) as disk:
                first = disk.read(512)
                disk.seek(0)
                disk.write(first)
                return what == "writable"
        except OSError as error:
            return what == {errno.EROFS: "held"}.get(error.errno or 0, "away")

    # The target ------------------------------------------------------------------------------------------------

    @property
    def console(self) -> Path:
        """Of the guest that was failed over."""
        return self.target.root / "state" / "vms" / VM / "boot" / "console"

    def points(self) -> list[dict[str, Any]]:
        return list(self.target.json("point", "list", VM)["points"])

    def wait_for_points_since(self, time_ns: int, count: int) -> list[dict[str, Any]]:
        """The points that were made after that time, oldest first, once there are so many."""
        found: list[dict[str, Any]] = []

        def are_there() -> bool:
            found[:] = [point for point in self.points() if nanoseconds(point["time"]) > time_ns]
            return len(found) >= count

        wait_until(are_there, lambda: f"{self.points()[-3:]}{self.source.logs()}")
        return found

    def written_on(self, more: int) -> int:
        """Wait until the guest that was failed over has synced so many records; the last of them."""
        until = synced(self.console.read_text(errors="replace")) + more
        wait_until(
            lambda: synced(self.console.read_text(errors="replace")) >= until,
            lambda: self.console.read_text(errors="replace")[-2000:] + self.target.logs(),
        )
        return until


@dataclass(frozen=True)
class Row:
    """One round. `lost`: how many records of those synced before the point are not there; `exposed`: seconds between
    the point and the power cut; `behind`: records that were synced after the point, which no failover could have."""

    round: int
    wanted: str
    point: str
    exposed: float
    before: int
    last: int
    lost: int
    behind: int
    ending: str
    seconds: float


def nanoseconds(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000) * 10**6


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def guests_of(home: Installation) -> list[int]:
    """The qemus on a home's disks."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{entry}/cmdline").read_bytes()
            if words.startswith(b"qemu-system") and os.fsencode(f"{home.root}/") in words:
                found.append(int(entry))
    return found


def resume(monitor: Path) -> None:
    """Have a qemu that is paused try again what it could not write."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rw") as lines:
        sock.connect(str(monitor))
        for command in ("qmp_capabilities", "cont"):
            lines.write(f'{{"execute": "{command}"}}\n')
        lines.flush()
        answers = 0
        while answers < 2:
            answer = json.loads(lines.readline())
            assert "error" not in answer, answer
            answers += "return" in answer


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Drill, Writer]]:
    """A drill whose guest writes: one for both tests, as a guest takes its time to boot."""
    drill = Drill(tmp_path_factory.mktemp("homes"))
    try:
        with drill.boot_source() as guest:
            guest.wait_until_synced(1)
            yield drill, guest
    finally:
        drill.close()


def choose(drill: Drill, number: int, booted_ns: int, chance: random.Random) -> tuple[str, str]:
    """What to fail over to: (as it is typed, the point that this has to mean). By turns: the latest; one of before, by
    its id; and by an instant between two."""
    points = drill.wait_for_points_since(booted_ns, 1)
    how = ("latest", "id", "time")[number % 3]
    if how == "latest":
        return "latest", points[-1]["id"]
    place = chance.randrange(max(0, len(points) - 4), len(points) - 1)
    if how == "id":
        return points[place]["id"], points[place]["id"]
    after, before = nanoseconds(points[place + 1]["time"]), nanoseconds(points[place]["time"])
    return time_text((before + after) // 2), points[place]["id"]


def play(drill: Drill, number: int, guest: Writer, known: int) -> Row:
    """One round, with a guest on the source that has just booted, or runs. `known`: the last record that had been
    synced when the source's power was cut before."""
    chance, began = random.Random(number), time.monotonic()
    guest.wait_until_synced(known + 1)
    found = wait_for_report(guest.console)
    assert found.is_sound and found.last >= known, f"{found}, {known}: the source lost records by itself"
    booted_ns = time.time_ns()
    drill.wait_for_points_since(booted_ns, 3)
    time.sleep(chance.random())  # anywhere in a cycle
    cut_ns = drill.cut_power(guest, chance)

    wanted, meant = choose(drill, number, booted_ns, chance)
    validate = ("--validate",) if number % 2 else ()
    said = drill.target.json("failover", "unplanned", VM, "--point", wanted, "--boot", *validate, "--yes")
    assert said["point"] == meant, (wanted, said)
    point_ns = nanoseconds(said["time"])
    report, before = wait_for_report(drill.console), guest.synced_before(point_ns)
    told = f"{meant} of {said['time']}: {report}, {before}\n{drill.console.read_text(errors='replace')[-2000:]}"
    assert report.is_sound, told
    assert 0 < before <= report.last, told
    assert report.last <= guest.synced_before(point_ns + 3 * 10**9) + 1, f"older points are older: {told}"
    assert (drill.console.parent / "lan-target").is_socket(), "it is on the network of this side"

    ending = commit(drill, report) if number % 2 else give_back(drill, returns_early=number // 2 % 2 == 1)
    return Row(
        round=number, wanted=wanted, point=meant, exposed=round((cut_ns - point_ns) / 1e9, 2), before=before,
        last=report.last, lost=max(0, before - report.last) + report.bad, behind=guest.synced() - report.last,
        ending=ending, seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip


def give_back(drill: Drill, *, returns_early: bool) -> str:
    """The failover is cancelled, and the source goes on by itself: it is back by then, or comes back later."""
    drill.written_on(3)
    if returns_early:
        drill.source.start()
        drill.source.wait_for_state(VM, "FailedOverWaitingCompletion")
        wait_until(lambda: drill.disk_is("held"), drill.source.logs)
    drill.target.json("failover", "cancel", VM, "--yes")
    assert guests_of(drill.target) == []
    assert "UNMOUNTED" in drill.console.read_text(errors="replace"), "it was shut down by its power button"
    assert mounts_below(drill.target.root) == [] and not (drill.target.disks / VM).exists()
    if not returns_early:
        drill.source.start()
    drill.source.wait_for_state(VM)
    wait_until(lambda: drill.disk_is("writable"), drill.source.logs)
    drill.wait_for_points_since(time.time_ns(), 1)
    return "cancelled, the source was back" if returns_early else "cancelled, the source came back"


def commit(drill: Drill, report: Report) -> str:
    """The guest lives on while its disk becomes a plain one. Then the power is cut there, too."""
    drill.target.json("failover", "commit", VM, "--wait", "--yes")
    last = drill.written_on(5)
    assert last > report.last
    for pid in [*guests_of(drill.target), *processes_of(drill.target.root)]:
        kill(pid)
    drill.target.hvfuse("mount", VM)
    copy = drill.target.root / "copy.raw"
    shutil.copy(drill.target.mnt / VM / DISK, copy)
    assert subprocess.run(["e2fsck", "-p", copy], capture_output=True).returncode in (0, 1)
    run("e2fsck", "-fn", copy)
    records = run("debugfs", "-R", "cat /records", copy).splitlines()
    assert [int(record[:8]) for record in records] == [*range(1, len(records) + 1)] and len(records) >= last
    drill.source.start()
    drill.source.wait_for_state(VM, "FailedOver")
    wait_until(lambda: drill.disk_is("held"), drill.source.logs)
    return COMMITTED


def table(rows: list[Row]) -> str:
    cells = [[field.name for field in fields(Row)], *([str(value) for value in astuple(row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)) for line in cells)


def test_a_guest_on_test_is_validated_beside_the_one_that_runs_and_ends_with_the_cleanup(
    running: tuple[Drill, Writer],
) -> None:
    homes, guest = running
    target = homes.target
    guest.wait_until_synced(1)
    homes.wait_for_points_since(time.time_ns(), 1)
    made = target.json("failover", "test", VM, "--boot", "--validate")
    assert made["mountpoint"] == str(target.mnt / f"{VM} - Test")
    before = guest.synced_before(nanoseconds(made["time"]))
    verdict = made["validation"]
    said = re.search(r'^test {"lan": "lan-isolated"} last (\d+) bad 0$', verdict["output"], re.MULTILINE)
    assert verdict["ok"] and verdict["exit_code"] == 0 and said is not None, verdict
    assert 0 < before <= int(said[1])

    (pid,) = guests_of(target)
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    assert words[words.index("-name") + 1] == f"{VM} - Test"
    state = Path(os.readlink(f"/proc/{pid}/cwd"))
    assert (state / "lan-isolated").is_socket() and not (state / "lan-target").exists()
    (listed,) = target.json("failover", "list", VM)["tests"]
    assert listed["validation"] == verdict and listed["alive"]
    guest.wait_until_synced(guest.synced() + 5)
    homes.wait_for_points_since(time.time_ns(), 1)

    target.json("failover", "cleanup", VM, "--note", "as it should be")
    assert guests_of(target) == [] and "UNMOUNTED" in (state / "console").read_text(errors="replace")
    assert target.json("failover", "list", VM)["tests"] == []
    (measured,) = target.json("measure", VM)["vms"]
    assert measured["last_test_failover_point"] == made["point"]
    assert measured["last_test_failover_note"] == "as it should be"
    assert measured["last_test_failover_validation"] == "passed"
    assert "passed" in target.hvfuse("measure", VM)
    guest.wait_until_synced(guest.synced() + 5)


def test_a_source_that_runs_on_has_its_guest_pause_while_another_side_has_it_and_go_on_after_that(
    running: tuple[Drill, Writer],
) -> None:
    drill, guest = running
    monitor = Monitor(str(guest.console.parent), MONITOR)
    guest.wait_until_synced(1)
    drill.target.json("failover", "unplanned", VM, "--yes")
    wait_until(lambda: monitor.status() == "io-error", drill.source.logs)
    stood = guest.synced()
    drill.target.json("failover", "cancel", VM, "--yes")
    wait_until(lambda: drill.source.status(VM).get("state") == "Replicating", drill.source.logs)

    def goes_on() -> bool:
        resume(guest.console.parent / MONITOR)
        time.sleep(0.2)  # until a disk that is still held has stopped it again
        return monitor.status() == "running" and guest.synced() > stood

    wait_until(goes_on, drill.source.logs)
    guest.wait_until_synced(stood + 10)
    assert wait_for_report(guest.console).is_sound and "WRITE-FAILED" not in guest.said()
    drill.wait_for_points_since(time.time_ns(), 1)


@pytest.mark.timeout(240 * ROUNDS)
def test_nothing_that_was_synced_before_the_point_is_missing_where_the_guest_is_booted_after_a_power_cut(
    running: tuple[Drill, Writer], tmp_path: Path
) -> None:
    drill, guest = running
    known = 0
    rows: list[Row] = []
    with ExitStack() as stack:
        stack.callback(lambda: print(f"\n{table(rows)}\nlost: {sum(row.lost for row in rows)} in {len(rows)} rounds"))
        while True:
            rows.append(play(drill, len(rows), guest, known))
            print(table(rows[-1:]).splitlines()[1], flush=True)
            if len(rows) == ROUNDS:
                return
            known = guest.synced()
            if rows[-1].ending == COMMITTED:
                drill.close()
                drill, known = Drill(tmp_path / f"{len(rows)}"), 0
                stack.callback(drill.close)
            guest = stack.enter_context(drill.boot_source())
