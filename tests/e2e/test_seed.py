"""First copies that travel on a medium, and copies that are at the target already; with two homes on one machine.

The source's store is the target home's, so that what the target imports is what the source finds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse.control.daemon import serving_pid
from hvfuse.control.records import Records
from tests.e2e.conftest import Installation, identical, mounts_below, qemu_io, run, wait_until

pytestmark = pytest.mark.mount

MIB = 1 << 20
SEED = int(os.environ.get("HVFUSE_SEED", random.SystemRandom().randrange(1 << 32)))
DATA = 32 * MIB

KILLED = """
import os, signal, sys
from hvfuse import system
from hvfuse.cli.main import main
label, nth = sys.argv[1], int(sys.argv[2])
seen = 0
def injector(called, call, size):
    global seen
    seen += called.startswith(label)
    if seen == nth:
        os.kill(os.getpid(), signal.SIGKILL)
system.install(injector)
main(sys.argv[3:])
"""
"""`hvfuse`, killed before the NTH labelled call of a kind: python -c KILLED LABEL NTH arguments…"""


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Installation]:
    made = Installation(tmp_path / "target")
    made.root.mkdir()
    yield made
    made.close()
    assert mounts_below(made.root) == []


@pytest.fixture
def source(installation: Installation, target: Installation) -> Installation:
    """A VM of two disks, most of one of them random data, whose first copy is to come from elsewhere."""
    print(f"HVFUSE_SEED={SEED}")
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    run("qemu-img", "create", "-q", "-f", "vpc", "-o", "subformat=dynamic,force_size=on", folder / "os.vhd", "32M")
    with open(folder / "data.raw", "wb") as file:
        file.truncate(256 * MIB)
        file.seek(64 * MIB)
        file.write(random.Random(SEED).randbytes(DATA))
    (installation.root / "hvfuse.toml").write_text(
        f'[paths]\nstore = "{target.root / "store"}"\n[replication]\nfrequency = "1s"\ninitial = "seed"\n'
    )
    return installation


def write_meanwhile(source: Installation, pattern: int) -> None:
    qemu_io(source.mnt / "vm1" / "data.raw", "raw", f"write -P {pattern} {60 + pattern}M 1M", "write -z 100M 1M")
    qemu_io(source.mnt / "vm1" / "os.vhd", "vpc", f"write -P {pattern} {pattern}M 512k", "flush")


def assert_view_equals(source: Installation, view: Path) -> None:
    source.test_failover("vm1", view)
    assert identical(source.mnt / "vm1" / "os.vhd", view / "os.vhd", "vpc")
    assert identical(source.mnt / "vm1" / "data.raw", view / "data.raw", "raw")
    source.hvfuse("failover", "cleanup", "vm1")


def test_after_an_import_the_source_goes_on_by_itself_with_what_was_written_since_the_export(
    source: Installation, target: Installation, tmp_path: Path
) -> None:
    source.start()
    source.wait_for_state("vm1", "WaitingForInitialReplication")
    write_meanwhile(source, 1)
    medium = tmp_path / "medium"
    kill_shipper_while_it_exports(source, medium)
    write_meanwhile(source, 2)
    exported = source.json("seed", "export", "vm1", str(medium))
    assert exported["frames_held"] >= 1
    assert exported["bytes_total"] > 256 * MIB
    assert DATA * 0.9 < exported["medium_bytes"] < DATA + 2 * MIB
    write_meanwhile(source, 3)
    status = source.status("vm1")
    assert (status["state"], status["points"]) == ("WaitingForInitialReplication", 0)
    imported = target.json("seed", "import", str(medium))
    assert imported["frames_put"] == exported["frames"]
    source.wait_for_state("vm1")
    source.hvfuse("replicate", "vm1")
    assert_view_equals(source, tmp_path / "view")
    with Records(str(source.root / "state" / "records")) as records:
        cycles = records.cycles("vm1")
        assert records.read("vm1").last_copy is None, "nothing was to be copied over the network"
    assert 0 < sum(cycle.bytes_sent for cycle in cycles) < DATA / 100
    assert target.json("store", "check")["ok"] is True
    assert source.stop() == 0


def kill_shipper_while_it_exports(source: Installation, medium: Path) -> None:
    socket = str(source.root / "state" / "vms" / "vm1" / "shipper.sock")
    pid = serving_pid(socket)
    assert pid is not None
    command, data = source.command("seed", "export", "vm1", str(medium)), medium / "frames-00000.hvs"
    with subprocess.Popen(command, env=source.environment(), cwd="/", stderr=subprocess.PIPE) as client:
        wait_until(lambda: data.exists() and data.stat().st_size > 6 * MIB, source.logs)
        os.kill(pid, signal.SIGKILL)
        _, told = client.communicate(timeout=60)
    assert client.returncode in (0, 11), told
    wait_until(lambda: serving_pid(socket) not in (None, pid), source.logs)


def test_a_flipped_bit_in_any_file_of_a_medium_is_refused_by_file_and_offset(
    source: Installation, target: Installation, tmp_path: Path
) -> None:
    source.hvfuse("mount", "vm1")
    medium = tmp_path / "medium"
    source.hvfuse("seed", "export", "vm1", str(medium))
    dice = random.Random(SEED)
    for path in medium.iterdir():
        at, bit = dice.randrange(path.stat().st_size), 1 << dice.randrange(8)
        flip(path, at, bit)
        answer = target.hvfuse("seed", "import", str(medium), "--json", code=7)
        message = json.loads(answer.splitlines()[0])["error"]["message"]
        offset = int(message.removeprefix(f"{path}: damaged at byte ").split(":")[0])
        assert offset <= at < offset + 65536
        flip(path, at, bit)
    assert target.json("store", "info")["vms"] == [], "nothing of a damaged medium may be believed"
    target.hvfuse("seed", "import", str(medium))


def flip(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        changed = bytes([file.read(1)[0] ^ bit])
        file.seek(at)
        file.write(changed)


def killed(installation: Installation, label: str, nth: int, *arguments: str) -> int:
    """Run a command that is killed, if it comes to that; returns its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, label, str(nth), "--home", str(installation.root), *arguments],
        cwd="/", env=installation.environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def test_export_and_import_killed_again_and_again_go_on_where_they_were(
    source: Installation, target: Installation, tmp_path: Path
) -> None:
    source.hvfuse("mount", "vm1")
    medium, dice = tmp_path / "medium", random.Random(SEED)
    kills = 0
    for _ in range(3):
        kills += killed(source, "seed:", dice.randrange(6, 8), "seed", "export", "vm1", str(medium)) != 0
    write_meanwhile(source, 4)
    exported = source.json("seed", "export", "vm1", str(medium))
    assert kills == 3 and exported["frames_held"] >= 1
    assert exported["frames_held"] + exported["frames_sent"] == exported["frames"]
    kills = 0
    for label, nth in (("store:image", dice.randrange(1, 4)), ("store:unsynced", 2), ("store:commit", 1)):
        kills += killed(target, label, nth, "seed", "import", str(medium)) != 0
    imported = target.json("seed", "import", str(medium))
    assert kills == 3
    assert imported["already"] or imported["frames_held"] + imported["frames_put"] == exported["frames"]
    source.hvfuse("replicate", "vm1")
    assert_view_equals(source, tmp_path / "view")
    assert target.json("store", "check")["ok"] is True


def test_copies_that_differ_in_one_percent_cost_about_that(
    source: Installation, target: Installation, tmp_path: Path
) -> None:
    copies, dice = tmp_path / "copies", random.Random(SEED)
    shutil.copytree(source.disks / "vm1", copies)
    with open(source.disks / "vm1" / "data.raw", "r+b") as file:
        for block in dice.sample(range(DATA >> 16), (DATA >> 16) // 100):
            file.seek(64 * MIB + (block << 16))
            file.write(dice.randbytes(1 << 16))
    source.hvfuse("mount", "vm1")
    adopted = target.json("seed", "import", str(copies), "--existing", "vm1")
    assert adopted["disks"] == ["data.raw", "os.vhd"]
    write_meanwhile(source, 7)
    source.hvfuse("replicate", "vm1")
    # What was written meanwhile (pattern blocks, that compress away) is compared, too.
    assert DATA / 100 * 0.8 < sent_bytes(source) < DATA / 100 * 1.2
    assert_view_equals(source, tmp_path / "view")


def sent_bytes(source: Installation) -> int:
    with Records(str(source.root / "state" / "records")) as records:
        copied = records.read("vm1").last_copy
    assert copied is not None
    return int(str(copied["bytes_sent"]))
