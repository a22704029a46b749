"""`tools/resync` as its users run it: exit codes, JSON, processes killed at random and gone on with."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvfuse.cli import reconcile
from hvfuse.formats.digests import BLOCK

from .both_sides import settle
from .test_equal_afterwards import unequal_blocks

PROGRAM = [sys.executable, "-P", "-m", "hvfuse.cli.reconcile"]
SERVE = shlex.join([*PROGRAM, "--serve"])
ROOT = str(Path(__file__).resolve().parents[2])
ENVIRONMENT = {**os.environ, "PYTHONPATH": ROOT, "OPENBLAS_NUM_THREADS": "1"}
TOOLS = os.path.join(ROOT, "tools")
VIA = {"local": [], "push": ["--via", SERVE], "pull": ["--via", SERVE, "--pull"]}


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def resync(capfd, monkeypatch):
    """The program without a process of its own; what it runs with --via is one."""
    for name in ("PYTHONPATH", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    before = signal.getsignal(signal.SIGIO)

    def run(*arguments) -> Done:
        with pytest.raises(SystemExit) as ended:
            reconcile.main([*map(str, arguments)])
        return Done(ended.value.code, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGIO, before)


def test_exit_codes_and_json_tell_what_was_done(tmp_path, resync):
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    one.write_bytes(os.urandom(3 * BLOCK + 7))
    assert resync("-n", one, other).returncode == 1
    assert not other.exists()
    done = resync("--json", one, other)
    told = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (1, "")
    assert {key: told[key] for key in ("changed", "created", "size", "compared", "differing", "sent", "saved")} == {
        "changed": True, "created": True, "size": 3 * BLOCK + 7, "compared": 3 * BLOCK + 7,
        "differing": 3 * BLOCK + 7, "sent": 3 * BLOCK + 7, "saved": 0,
    }  # fmt: skip
    again = resync(one, other)
    assert again.returncode == 0
    assert "equal" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["one"], 2, "SOURCE and REPLICA are needed"),
        (["one", "other", "--pull"], 2, "--pull needs --via"),
        (["one", "other", "--level", "77"], 2, "--level"),
        (["one", "other", "--via", "'"], 2, "--via"),
        (["one", "other", "--via", ""], 2, "--via: no command"),
        (["one", "other", "--via", "  "], 2, "--via: no command"),
        (["one", "other", "--via", "", "--pull"], 2, "--via: no command"),
        (["missing", "other"], 5, "missing: No such file"),
        (["one", "other", "--via", "/does/not/exist"], 5, "/does/not/exist"),
        (["one", "other", "--via", "echo Welcome"], 7, "it says 'Welcome'"),
        (["one", "other", "--via", "echo hvfuse resync 2"], 8, "version '2'"),
        (["one", "other", "--via", "sh -c 'exit 3'"], 11, "its command ended with 3"),
        (["one", "other", "--via", "sh -c 'kill -9 $$'"], 11, "was killed by signal 9"),
        (["one", "other", "--via", "sleep 30", "--timeout", "0.3"], 11, "nothing was heard"),
        (["one", "missing/other", "--via", SERVE], 5, "on the other side"),
        (["one", "other", "--via", SERVE + " --read-only"], 2, "may only be read"),
        (["one", "other", "--via", SERVE + " elsewhere"], 2, "only elsewhere is served"),
        (["one", "../other", "--via", SERVE + " --root ."], 2, "only what is below . is served"),
        (["one", "link/other", "--via", SERVE + " --root ."], 2, "only what is below . is served"),
    ],
)
def test_every_error_is_one_line_and_has_its_code(tmp_path, resync, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").write_bytes(b"x")
    (tmp_path / "link").symlink_to("..")
    done = resync("--json", *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["exit_code"] == code
    assert os.listdir(tmp_path).count("other") == 0


@pytest.mark.parametrize(
    ("via", "hint"),
    [
        ("no-such-command", "--via takes a command that runs tools/resync --serve"),
        ("false", "--via takes a command that runs tools/resync --serve"),
        ("sleep 30", "--timeout"),
    ],
)
def test_who_reaches_nobody_is_told_what_to_do_and_not_that_something_goes_on(tmp_path, resync, via, hint):
    (tmp_path / "one").write_bytes(b"x")
    done = resync("--json", tmp_path / "one", tmp_path / "other", "--via", via, "--timeout", "0.3")
    told = json.loads(done.stdout)["error"]
    assert hint in told["hint"]
    assert f"hint: {told['hint']}" in done.stderr
    assert "again" not in told["hint"]


def test_a_served_side_that_is_killed_in_the_middle_is_told_to_be_run_again(pair):
    process, pids = start(*pair, "push")
    if len(pids) > 1 and process.poll() is None:
        os.kill(pids[1], signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode in (1, 11)
    if process.returncode == 11:
        assert "hint: run it again: what is equal by now is not sent again" in said
    wait_for_all(pids)


def test_a_banner_before_the_greeting_is_refused_before_anything_is_made(tmp_path, resync):
    (tmp_path / "one").write_bytes(b"x")
    talks = f"sh -c 'echo Welcome to this host; exec {SERVE}'"
    done = resync(tmp_path / "one", tmp_path / "other", "--via", talks)
    assert done.returncode == 7
    assert "it says 'Welcome" in done.stderr
    assert os.listdir(tmp_path) == ["one"]


def test_an_error_that_would_be_1_is_another_code(tmp_path, resync):
    (tmp_path / "one").write_bytes(b"x")
    os.symlink("loop", tmp_path / "loop")
    assert resync(tmp_path / "one", tmp_path / "loop").returncode == 20


def test_the_served_side_touches_what_is_named_and_no_more(tmp_path, resync):
    (tmp_path / "one").write_bytes(b"new")
    (tmp_path / "served").mkdir()
    done = resync(tmp_path / "one", tmp_path / "served/other", "--via", f"{SERVE} --root {tmp_path}/served")
    assert (done.returncode, done.stderr) == (1, "")
    assert os.listdir(tmp_path / "served") == ["other"]
    assert (tmp_path / "served/other").read_bytes() == b"new"


SIZE = 400 * BLOCK + 5


@pytest.fixture
def pair(tmp_path):
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    data = random.Random(1).randbytes(SIZE)
    one.write_bytes(data)
    half = bytearray(data)
    for block in range(0, 200, 3):
        half[block * BLOCK] ^= 1
    other.write_bytes(half[: 300 * BLOCK])
    settle(one)
    return one, other


def start(one, other, way) -> tuple[subprocess.Popen, list[int]]:
    """A run that has begun to change the replica, and the processes that take part in it."""
    before = other.stat().st_mtime_ns
    process = subprocess.Popen(
        [*PROGRAM, "--state-seconds", "0", str(one), str(other), *VIA[way]],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    limit = time.monotonic() + 20
    while process.poll() is None and other.stat().st_mtime_ns == before and time.monotonic() < limit:
        time.sleep(0.001)
    try:
        with open(f"/proc/{process.pid}/task/{process.pid}/children", encoding="ascii") as file:
            children = [int(pid) for pid in file.read().split()]
    except FileNotFoundError:
        children = []
    return process, [process.pid, *children]


@pytest.mark.parametrize(("way", "victim"), [("local", 0), ("push", 0), ("push", 1), ("pull", 0), ("pull", 1)])
def test_killed_at_random_and_gone_on_with(pair, resync, way, victim):
    one, other = pair
    dice = random.Random(f"{way}{victim}")
    process, pids = start(one, other, way)
    time.sleep(dice.random() * 0.05)
    if len(pids) > victim and process.poll() is None:
        os.kill(pids[victim], signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode in (1, 11, -signal.SIGKILL), said
    assert "Traceback" not in said
    if process.returncode == 11:
        assert "killed by signal 9" in said
    wait_for_all(pids)
    unequal = unequal_blocks(one.read_bytes(), other.read_bytes())
    done = resync("--json", one, other, *VIA[way])
    told = json.loads(done.stdout)
    assert other.read_bytes() == one.read_bytes()
    assert told["differing"] == unequal
    assert told["sent"] <= unequal * 1.01 + 4096
    assert told["compared"] <= SIZE - told["continued_at"]
    assert sorted(os.listdir(one.parent)) == ["one.raw", "other.raw"]


def wait_for_all(pids) -> None:
    """The served side ends by itself when the other one is gone."""
    limit = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < limit, "a process that nobody needs lives on"
        time.sleep(0.01)


@pytest.fixture
def device(tmp_path):
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control") or shutil.which("losetup") is None:
        pytest.skip("needs root and loop devices")
    image = tmp_path / "device.img"
    image.write_bytes(b"\xaa" * (10 * BLOCK))
    name = subprocess.check_output(["losetup", "--find", "--show", str(image)], text=True).strip()
    yield name
    subprocess.run(["losetup", "--detach", name], check=True)


def test_block_devices_keep_their_size_and_what_lies_beyond(tmp_path, resync, device):
    one, back = tmp_path / "one.raw", tmp_path / "back.raw"
    one.write_bytes(os.urandom(2 * BLOCK) + bytes(BLOCK) + os.urandom(1024))
    done = resync("--json", one, device)
    told = json.loads(done.stdout)
    assert (done.returncode, told["left_alone"]) == (1, 7 * BLOCK - 1024)
    assert resync(one, device).returncode == 0
    assert resync(device, back).returncode == 1
    assert back.read_bytes() == one.read_bytes() + b"\xaa" * (7 * BLOCK - 1024)
    assert resync(device, back, "--via", SERVE).returncode == 0

    one.write_bytes(os.urandom(11 * BLOCK))
    refused = resync(one, device)
    assert refused.returncode == 2
    assert "too few" in refused.stderr
    assert "hint: name a device that is as large or larger" in refused.stderr
    assert "is locked" not in resync(one, device, "-n").stderr
    with open(device, "rb") as file:
        assert file.read(BLOCK) == back.read_bytes()[:BLOCK]


def test_a_mounted_device_and_the_file_below_it_are_refused(tmp_path, resync, device):
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4")
    (tmp_path / "one.raw").write_bytes(b"x")
    assert resync(tmp_path / "one.raw", tmp_path / "device.img").returncode == 6
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", device, str(tmp_path / "mnt")], check=True)
    try:
        refused = resync(tmp_path / "one.raw", device)
        assert refused.returncode == 6
        assert "is mounted" in refused.stderr
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)


def test_the_launcher_works(tmp_path):
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    one.write_bytes(os.urandom(BLOCK))
    launcher = os.path.join(TOOLS, "resync")
    done = subprocess.run([launcher, one, other, "--via", f"{launcher} --serve"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert other.read_bytes() == one.read_bytes()
    assert done.stdout.endswith("/s)\n") and "created, resized, made equal" in done.stdout
    refused = subprocess.run([launcher, "--json", one], capture_output=True, text=True)
    assert (refused.returncode, json.loads(refused.stdout)["error"]["exit_code"]) == (2, 2)
    for arguments in (["--help"], ["-n", one, other]):  # equal, but who asked was not told
        with open("/dev/full", "w") as full:
            assert subprocess.run([launcher, *arguments], stdout=full, stderr=subprocess.DEVNULL).returncode == 20


@pytest.mark.mount
@pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync")
def test_the_measurement_works(tmp_path):
    told = subprocess.run(
        [os.path.join(TOOLS, "bench"), "resync", "--quick", "--json", "--folder", tmp_path],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    rows = json.loads(told.stdout)["rows"]
    assert all(row.keys() == {"subject", "peer", "hvfuse", "unit", "ratio", "target", "spread"} for row in rows)
    assert len(rows) == 10
