"""Guests that are booted on disks that were failed over: real qemus without an operating system, real kills."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvfuse import system
from hvfuse.control import boot as booting
from hvfuse.control import guest_monitor, guest_qemu
from hvfuse.control.boot import Ending, boot, boot_failed_over, guest_state_dir, guests, is_running, shut_down, validate
from hvfuse.control.config import Config, VmPolicy
from hvfuse.control.guest_plan import BootPlan, plan_boot
from hvfuse.control.guest_qemu import TOKEN_VARIABLE
from hvfuse.control.guest_settings import Addresses, BootSettings, Mode, Network, Site
from hvfuse.errors import (
    BusyError,
    CorruptError,
    HvfuseError,
    NotFoundError,
    PrerequisiteError,
    StateError,
    UnreachableError,
    UsageError,
)
from tests.dying import done_until

QEMU = ("qemu-system-x86_64", "-nodefaults", "-accel", "tcg", "-m", "32", "-nographic")

HOOK = """\
#!/bin/sh
env >>"$HVFUSE_STATE/env-$1"
echo said by $1
exit $(cat "$HVFUSE_STATE/fail-$1" 2>/dev/null || echo 0)
"""


class Place:
    """A raw disk and the state directory of its guest."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "boot"
        self.disks = root / "disks"
        self.disks.mkdir()
        self.disk = self.disks / "root.raw"
        with open(self.disk, "wb") as file:
            file.truncate(1 << 20)
        self.hook = root / "hook"
        self.hook.write_text(HOOK)
        self.hook.chmod(0o700)

    def plan(self, *words: str, qemu: tuple[str, ...] = QEMU, hooks: bool = False, **changes: Any) -> BootPlan:
        commands = {name: (str(self.hook), name) for name in ("before_boot", "after_boot")} if hooks else {}
        settings = changes.pop("settings", None) or BootSettings(qemu=(*qemu, *words), **commands)
        fields: dict[str, Any] = {
            "vm": "web01",
            "mode": Mode.PLANNED,
            "point": "1-7",
            "directory": str(self.disks),
            "disks": {"root.raw": str(self.disk)},
            "state_dir": str(self.state),
            "networks": {"lan": "br1"},
            "addresses": Addresses(ipv4="192.0.2.9", ipv4_mask="255.255.255.0", dns=("192.0.2.53",)),
        }
        return plan_boot(settings, **{**fields, **changes})

    def running(self) -> list[int]:
        """The processes that carry the token of a guest of this place, whatever the record says; the first first."""
        found = []
        for entry in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
                if any(each.startswith(TOKEN_VARIABLE.encode()) for each in variables) and (
                    b"HVFUSE_STATE=" + os.fsencode(self.state) in variables
                ):
                    found.append(int(entry))
        return sorted(found)

    def record(self) -> dict[str, Any]:
        found = json.loads((self.state / "guest.json").read_text())
        assert isinstance(found, dict)
        return found

    def told(self, hook: str) -> list[dict[str, str]]:
        """The environments with which a hook was run."""
        path = self.state / f"env-{hook}"
        if not path.exists():
            return []
        runs = path.read_text().split("HVFUSE_VM=")  # env's order is the same each time
        lines = [line.partition("=") for line in path.read_text().splitlines()]
        return [{key: value for key, _, value in lines if key.startswith("HVFUSE_")}] * (len(runs) - 1)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for pid in made.running():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.qemu
def test_a_guest_is_booted_once_and_ended(place: Place) -> None:
    plan = place.plan("-drive", "file={disk:root.raw},format=raw", hooks=True)
    assert not is_running(plan.state_dir)
    guest = boot(plan)
    assert (guest.name, guest.was_running, guest.uuid) == ("web01", False, None)
    assert place.running() == [guest.pid]
    assert place.record()["process"] == system.process_identity(place.running()[0])
    assert os.getsid(place.running()[0]) == guest.pid, "no terminal's Ctrl-C reaches it"
    assert os.stat(place.state).st_mode & 0o777 == 0o700
    assert is_running(plan.state_dir)
    assert boot(plan) == replace(guest, was_running=True)
    assert place.running() == [guest.pid]
    assert "before_boot: said by before_boot\n" in Path(guest.log).read_text()

    assert shut_down(plan.state_dir, 0.2) is Ending.QUIT, "nothing in it listens to the power button"
    assert place.running() == []
    assert not is_running(plan.state_dir)
    assert shut_down(plan.state_dir) is Ending.NOT_RUNNING
    for hook in ("before_boot", "after_boot"):
        (told,) = place.told(hook)
        assert told == plan.environment, "and no token, which marks a guest"
    assert (told["HVFUSE_IPV4"], told["HVFUSE_NETWORKS"]) == ("192.0.2.9", '{"lan": "br1"}')


@pytest.mark.qemu
def test_whoever_dies_while_booting_leaves_at_most_one_guest(place: Place) -> None:
    plan = place.plan("-drive", "file={disk:root.raw},format=raw", hooks=True)
    left = set()
    for step in itertools.count(1):
        came_to_the_end = done_until(step, lambda: boot(plan))
        left.add(len(place.running()))
        before = place.running()
        guest = boot(plan)
        assert place.running() == [guest.pid]
        assert not before or before == [guest.pid], "the one that was left is the one that is found"
        assert guest.was_running is bool(before)
        assert place.record()["step"] == "booted"
        assert place.told("after_boot")
        assert shut_down(plan.state_dir, 0) is Ending.QUIT
        shutil.rmtree(place.state)
        if came_to_the_end:
            break
    assert step > 10
    assert left == {0, 1}


@pytest.mark.qemu
def test_whoever_is_killed_at_any_instant_leaves_at_most_one_guest(place: Place) -> None:
    plan = place.plan("-drive", "file={disk:root.raw},format=raw")
    chosen = random.Random(7)
    left = []
    for _ in range(25):
        child = os.fork()
        if child == 0:
            try:
                boot(plan)
            finally:
                os._exit(0)
        time.sleep(chosen.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left.append(len(place.running()))
        guest = boot(plan)
        assert place.running() == [guest.pid]
        shut_down(plan.state_dir, 0)
    print(f"left by who was killed: {left}")


@pytest.mark.qemu
def test_whoever_dies_while_ending_a_guest_leaves_what_can_be_ended(place: Place) -> None:
    plan = place.plan()
    for step in itertools.count(1):
        boot(plan)
        came_to_the_end = done_until(step, lambda: shut_down(plan.state_dir, 0))
        shut_down(plan.state_dir, 0)
        assert place.running() == []
        assert not (place.state / "guest.json").exists()
        if came_to_the_end:
            break


@pytest.mark.qemu
def test_several_who_boot_at_once_boot_one(place: Place) -> None:
    plan = place.plan()
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                boot(plan)
                code = 0
            except BusyError:
                code = 6
            finally:
                os._exit(code)
        children.append(child)
    codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    assert codes <= {0, 6}
    assert len(place.running()) == 1
    shut_down(plan.state_dir, 0)


@pytest.mark.qemu
def test_a_guest_that_ended_by_itself_is_booted_again(place: Place) -> None:
    plan = place.plan()
    first = boot(plan)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: not is_running(plan.state_dir))
    second = boot(plan)
    assert (second.was_running, place.running()) == (False, [second.pid])
    shut_down(plan.state_dir, 0)


@pytest.mark.qemu
def test_a_guest_that_is_paused_is_not_waited_for(place: Place) -> None:
    plan = place.plan("-S")
    boot(plan)
    began = time.monotonic()
    assert shut_down(plan.state_dir, 60) is Ending.QUIT
    assert time.monotonic() - began < 5


@pytest.mark.qemu
def test_a_guest_that_does_not_answer_is_killed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_monitor, "PATIENCE", 0.3)
    plan = place.plan()
    guest = boot(plan)
    assert guest.pid is not None
    os.kill(guest.pid, signal.SIGSTOP)
    assert shut_down(plan.state_dir, 60) is Ending.KILLED
    assert place.running() == []


@pytest.mark.qemu
def test_a_guest_that_does_not_answer_in_time_is_told_of_and_found_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_qemu, "READY_SECONDS", 0.3)
    script = place.root / "slow"
    script.write_text('#!/bin/sh\nsleep 1\nexec "$@"\n')
    script.chmod(0o700)
    plan = place.plan(qemu=(str(script), *QEMU), hooks=True)
    with pytest.raises(UnreachableError, match="the guest web01 runs, but "):
        boot(plan)
    (pid,) = {os.getsid(found) for found in place.running()}
    assert place.told("after_boot") == []
    monkeypatch.setattr(guest_qemu, "READY_SECONDS", 20)
    assert (boot(plan).pid, boot(plan).was_running) == (pid, True)
    assert (len(place.told("before_boot")), len(place.told("after_boot"))) == (1, 1)
    shut_down(plan.state_dir, 0)


@pytest.mark.qemu
def test_a_guest_outlives_the_script_that_started_it_and_is_ended_all_the_same(place: Place) -> None:
    script = place.root / "wrapper"
    script.write_text('#!/bin/sh\n"$@"\n')
    script.chmod(0o700)
    plan = place.plan(qemu=(str(script), *QEMU))
    guest = boot(plan)
    assert guest.pid is not None
    assert len(place.running()) == 2
    os.kill(guest.pid, signal.SIGKILL)
    wait_until(lambda: len(place.running()) == 1)
    assert is_running(plan.state_dir)
    again = boot(plan)
    assert (again.was_running, [again.pid]) == (True, place.running())
    assert shut_down(plan.state_dir, 0) is Ending.QUIT
    assert place.running() == []


def test_nobody_but_the_recorded_process_is_ended(place: Place) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        place.state.mkdir()
        identity = system.process_identity(stranger.pid)
        for other in ({"process_start": identity["process_start"] + 1}, {"boot_id": "0" * 32}):
            record = {"kind": "qemu", "vm": "web01", "name": "web01", "mode": "test", "point": "1", "token": "t"}
            fields = {**record, "version": 1, "step": "booted", "process": {**identity, **other}}
            (place.state / "guest.json").write_text(json.dumps(fields))
            assert not is_running(str(place.state))
            assert shut_down(str(place.state), 0) is Ending.NOT_RUNNING
        assert stranger.poll() is None
        stranger.kill()


def test_a_record_that_makes_no_sense_is_named(place: Place) -> None:
    place.state.mkdir()
    for text in ("", "[]", '{"version": 1}', '{"version": 2}', '{"version": 1, "kind": "x", "mode": "test"}'):
        (place.state / "guest.json").write_text(text)
        with pytest.raises(CorruptError, match=r"guest\.json"):
            is_running(str(place.state))


@pytest.mark.qemu
def test_a_lock_that_nobody_known_holds_starts_no_second_guest(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_qemu, "APPEAR_SECONDS", 0.2)
    plan = place.plan()
    guest = boot(plan)
    (place.state / "guest.json").write_text(json.dumps({**place.record(), "token": "x", "process": None}))
    with pytest.raises(BusyError, match="whose process cannot be found"):
        boot(plan)
    (place.state / "guest.json").unlink()
    with pytest.raises(BusyError, match="a guest of web01 is there already"):
        boot(plan)
    assert place.running() == [guest.pid]


@pytest.mark.qemu
def test_a_qemu_that_ends_at_once_is_told_by_its_own_words(place: Place) -> None:
    plan = place.plan("-drive", "file={disk:root.raw},format=vdi")
    with pytest.raises(HvfuseError, match=r"the guest web01 ended at once: .*VDI") as caught:
        boot(plan)
    assert caught.value.hint == f"tail {place.state}/guest.log"
    assert not is_running(plan.state_dir)
    boot(place.plan())
    shut_down(plan.state_dir, 0)


def test_a_program_that_is_missing_is_named_before_anything_is_done(place: Place) -> None:
    plan = place.plan(qemu=("/does/not/exist",), hooks=True)
    with pytest.raises(PrerequisiteError, match=r"\[vm\.web01\.guest\] qemu: there is no program /does/not/exist"):
        boot(plan)
    assert place.told("before_boot") == []


def test_nothing_to_boot_is_told_with_the_lines_to_add(place: Place) -> None:
    plan = place.plan(settings=BootSettings(validate=("x",)))
    with pytest.raises(UsageError, match="nothing says how the guest of web01 is booted") as caught:
        boot(plan)
    assert "[vm.web01.guest] qemu = " in str(caught.value.hint)
    assert not place.state.exists()


@pytest.mark.qemu
def test_a_hook_that_fails_before_keeps_the_guest_from_booting(place: Place) -> None:
    plan = place.plan(hooks=True)
    place.state.mkdir()
    (place.state / "fail-before_boot").write_text("3")
    with pytest.raises(HvfuseError, match=r"the before_boot hook .* ended with exit code 3: said by before_boot"):
        boot(plan)
    assert place.running() == []
    assert not is_running(plan.state_dir)


@pytest.mark.qemu
def test_a_hook_that_fails_afterwards_is_run_again_by_the_next_boot(place: Place) -> None:
    plan = place.plan(hooks=True)
    place.state.mkdir()
    failing = place.state / "fail-after_boot"
    failing.write_text("4")
    with pytest.raises(HvfuseError, match=r"the after_boot hook .* exit code 4"):
        boot(plan)
    (pid,) = place.running()
    failing.unlink()
    assert (boot(plan).pid, boot(plan).was_running) == (pid, True)
    assert (len(place.told("before_boot")), len(place.told("after_boot"))) == (1, 2)
    shut_down(plan.state_dir, 0)


@pytest.mark.qemu
def test_a_hook_that_takes_too_long_is_killed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(booting, "HOOK_SECONDS", 0.3)
    plan = place.plan(settings=BootSettings(qemu=QEMU, before_boot=("sleep", "60")))
    with pytest.raises(HvfuseError, match=r"the before_boot hook sleep failed: .* did not end within 0\.3 s"):
        boot(plan)


@pytest.mark.qemu
def test_another_point_is_not_booted_in_the_place_of_one_that_runs(place: Place) -> None:
    boot(place.plan())
    with pytest.raises(StateError, match="web01 runs already, on recovery point 1-7"):
        boot(place.plan(point="1-8"))
    shut_down(str(place.state), 0)


@pytest.mark.qemu
def test_a_long_path_is_no_obstacle(tmp_path: Path) -> None:
    root = tmp_path / ("x" * 100)
    root.mkdir()
    place = Place(root)
    boot(place.plan())
    assert shut_down(str(place.state), 0) is Ending.QUIT


# Validation -----------------------------------------------------------------------------------------------------


def validated(place: Place, script: str, seconds: float = 20.0) -> booting.Verdict:
    settings = BootSettings(validate=("sh", "-c", script), validate_timeout=seconds)
    return validate(place.plan(settings=settings))


def test_what_the_hook_says_is_the_verdict(place: Place) -> None:
    good = validated(place, 'echo "$HVFUSE_VM $HVFUSE_MODE $HVFUSE_POINT $HVFUSE_DISKS"; echo fine >&2')
    assert (good.ok, good.exit_code, good.output) == (True, 0, f"web01 planned 1-7 {place.disks}\nfine")
    bad = validated(place, "echo no such table; exit 7")
    assert (bad.ok, bad.exit_code, bad.output) == (False, 7, "no such table")
    assert (validated(place, "kill -9 $$").ok, validated(place, "kill -9 $$").exit_code) == (False, -9)
    long = validated(place, "seq 100000")
    assert len(long.output) <= 4096
    assert long.output.endswith("\n99999\n100000")


def test_a_hook_that_hangs_is_killed_with_its_children(place: Place) -> None:
    pids = place.root / "pids"
    verdict = validated(place, f"echo begun; (echo $$; sleep 61) >{pids} & sleep 61 & echo $! >>{pids}; wait", 0.5)
    assert (verdict.ok, verdict.exit_code) == (False, None)
    assert verdict.output.startswith("begun\n")
    assert verdict.output.endswith("sh did not end within 0.5 s and was killed")
    assert 0.5 <= verdict.seconds < 3
    wait_until(lambda: all(system.process_start(int(pid)) is None for pid in pids.read_text().split()), 5)
    silent = validated(place, "exec >/dev/null 2>&1; sleep 61", 0.3)
    assert (silent.exit_code, silent.seconds < 3) == (None, True)


def test_what_a_hook_leaves_in_the_background_is_not_waited_for(place: Place) -> None:
    verdict = validated(place, "sleep 3 & echo done")
    assert (verdict.ok, verdict.output) == (True, "done")
    assert verdict.seconds < 2


def test_a_hook_that_closes_its_output_is_waited_for(place: Place) -> None:
    verdict = validated(place, "exec >&- 2>&-; sleep 0.3; exit 5")
    assert (verdict.exit_code, verdict.seconds >= 0.3) == (5, True)


def test_a_hook_that_cannot_be_run_has_failed(place: Place) -> None:
    verdict = validate(place.plan(settings=BootSettings(validate=("/does/not/exist",))))
    assert (verdict.ok, verdict.exit_code) == (False, None)
    assert verdict.output == "/does/not/exist cannot be run: No such file or directory"
    with pytest.raises(UsageError, match="nothing says how web01 is validated"):
        validate(place.plan(settings=BootSettings(qemu=QEMU)))


# libvirt --------------------------------------------------------------------------------------------------------

VIRSH = """\
#!{python}
import os, sys
from xml.etree import ElementTree
home = {home!r}
with open(home + "/calls", "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
def fail(text):
    print("error: " + text, file=sys.stderr)
    sys.exit(1)
def path(domain):
    found = [name for name in os.listdir(home) if domain in name.split("|")]
    return home + "/" + found[0] if found else fail(f"failed to get domain '{{domain}}'")
if os.path.exists(home + "/away"):
    fail("failed to connect to the hypervisor")
order, what = sys.argv[1:3]
if order == "create":
    root = ElementTree.parse(what).getroot()
    name = root.findtext("uuid") + "|" + root.findtext("name")
    if os.path.exists(home + "/" + name):
        fail("domain already exists")
    open(home + "/" + name, "w").write("running")
elif order == "domstate":
    print(open(path(what)).read() + "\\n")
elif order == "shutdown" and not os.path.exists(home + "/deaf") or order == "destroy":
    os.unlink(path(what))
"""
DEFINITION = (
    "<domain type='kvm'><name>x</name><devices><disk><source file='{disk:root.raw}'/></disk></devices></domain>"
)


@pytest.fixture
def virsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A libvirt that records its calls, and has a file UUID|NAME for each domain."""
    home, programs = tmp_path / "libvirt", tmp_path / "bin"
    home.mkdir()
    programs.mkdir()
    (programs / "virsh").write_text(VIRSH.format(python=sys.executable, home=str(home)))
    (programs / "virsh").chmod(0o700)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return home


def domains(virsh: Path) -> list[str]:
    return [path.name.partition("|")[2] for path in virsh.iterdir() if "|" in path.name]


def libvirt_plan(place: Place, **changes: Any) -> BootPlan:
    hooks = {"before_boot": (str(place.hook), "before_boot"), "after_boot": (str(place.hook), "after_boot")}
    settings = BootSettings(libvirt="web01.xml", **hooks)
    return place.plan(settings=settings, definition=DEFINITION, **changes)


def test_a_domain_is_booted_once_and_ended(place: Place, virsh: Path) -> None:
    plan = libvirt_plan(place, mode=Mode.TEST)
    guest = boot(plan)
    assert (guest.name, guest.pid, guest.uuid, guest.was_running) == ("web01 - Test", None, plan.uuid, False)
    assert domains(virsh) == ["web01 - Test"]
    assert f"file='{place.disk}'" in (place.state / "domain.xml").read_text().replace('"', "'")
    assert boot(plan) == replace(guest, was_running=True)
    assert is_running(plan.state_dir)
    assert (len(place.told("before_boot")), len(place.told("after_boot"))) == (1, 1)
    assert shut_down(plan.state_dir) is Ending.SHUT_DOWN
    assert domains(virsh) == []
    assert not is_running(plan.state_dir)
    calls = (virsh / "calls").read_text().splitlines()
    assert calls.count(f"create {place.state}/domain.xml") == 1
    assert f"shutdown {plan.uuid} --mode acpi" in calls
    assert not any(call.startswith("destroy") for call in calls)


def test_a_domain_that_does_not_shut_down_is_destroyed(place: Place, virsh: Path) -> None:
    (virsh / "deaf").touch()
    plan = libvirt_plan(place)
    boot(plan)
    assert shut_down(plan.state_dir, 0.3) is Ending.QUIT
    assert domains(virsh) == []


def test_whoever_dies_while_booting_leaves_at_most_one_domain(place: Place, virsh: Path) -> None:
    plan = libvirt_plan(place)
    for step in itertools.count(1):
        came_to_the_end = done_until(step, lambda: boot(plan))
        was_there = bool(domains(virsh))
        assert boot(plan).was_running is was_there
        assert domains(virsh) == ["web01"]
        assert shut_down(plan.state_dir) is Ending.SHUT_DOWN
        if came_to_the_end:
            break
    assert step > 10


def test_a_domain_that_is_not_ours_is_left_alone(place: Place, virsh: Path) -> None:
    plan = libvirt_plan(place)
    for name in (f"{plan.uuid}|other", "8e8a5b2c-0000-4000-8000-000000000001|web01"):
        (virsh / name).write_text("running")
        with pytest.raises(BusyError, match="which is not one that hvfuse booted"):
            boot(plan)
        assert not is_running(plan.state_dir)
        assert shut_down(plan.state_dir) is Ending.NOT_RUNNING
        (virsh / name).write_text("shut off")
        assert domains(virsh) == [name.partition("|")[2]]
        (virsh / name).unlink()


def test_a_libvirt_that_is_missing_or_away_is_told(place: Place, virsh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = libvirt_plan(place)
    boot(plan)
    (virsh / "away").touch()
    with pytest.raises(UnreachableError, match="failed to connect to the hypervisor"):
        is_running(plan.state_dir)
    with pytest.raises(UnreachableError):
        shut_down(plan.state_dir)
    assert (place.state / "guest.json").exists(), "what may run is not forgotten"
    monkeypatch.setenv("PATH", str(place.root))
    with pytest.raises(PrerequisiteError, match="virsh is missing") as caught:
        boot(plan)
    assert caught.value.hint == "apt-get install libvirt-clients"


# Of a home ------------------------------------------------------------------------------------------------------


@pytest.mark.qemu
def test_a_vm_is_booted_where_it_was_failed_over_to(place: Place) -> None:
    with tempfile.TemporaryDirectory(prefix="hvfuse-") as root:
        home = Config().home(root)
        qemu = (*QEMU, "-drive", "file={disk:root.raw},format=raw", "-serial", "unix:{state}/serial,server=on,wait=off")
        policy = VmPolicy(boot=BootSettings(qemu=qemu), network=Addresses(dns=("192.0.2.1",)))
        state_dirs = []
        for mode, name in ((Mode.UNPLANNED, "real"), (Mode.TEST, "one test"), (Mode.TEST, "another")):
            directory = shutil.copytree(place.disks, place.root / name)
            guest = boot_failed_over(
                home, policy, "web01", mode=mode, point="1-7", directory=str(directory), networks={}
            )
            assert guest.state_dir == guest_state_dir(home, "web01", mode=mode, directory=str(directory))
            assert os.path.exists(f"{guest.state_dir}/serial")
            state_dirs.append(guest.state_dir)
        assert sorted(each.state_dir for each in guests(home, "web01")) == sorted(state_dirs)
        assert {each.name for each in guests(home, "web01")} == {"web01", "web01 - Test"}
        assert guests(home, "other") == []
        assert [shut_down(each, 0) for each in state_dirs] == [Ending.QUIT] * 3
        assert guests(home, "web01") == []


def test_what_is_booted_is_said_by_the_home(place: Place) -> None:
    home = Config().home(str(place.root))
    networks = {"lan": Network(source="br0", target="br1", test="br9")}
    policy = VmPolicy(
        boot=BootSettings(qemu=("q", "-nic", "bridge,br={network:lan}", "-hda", "{disk:root.raw}")),
        network=Addresses(dns=("192.0.2.1",)),
        network_test=Addresses(dns=("192.0.2.2",)),
    )

    def planned(
        mode: Mode, site: Site = Site.TARGET, used: VmPolicy = policy, directory: Path = place.disks
    ) -> BootPlan:
        return booting.plan_failed_over(
            *(home, used, "web01"), mode=mode, point="1", directory=str(directory), networks=networks, site=site
        )

    (place.disks / "link.raw").symlink_to("/etc/passwd")
    (place.disks / "folder").mkdir()
    found = {mode: planned(mode) for mode in Mode}
    assert {mode: (plan.command[2], plan.environment["HVFUSE_DNS1"]) for mode, plan in found.items()} == {
        Mode.TEST: ("bridge,br=br9", "192.0.2.2"),
        Mode.PLANNED: ("bridge,br=br1", "192.0.2.1"),
        Mode.UNPLANNED: ("bridge,br=br1", "192.0.2.1"),
    }
    assert planned(Mode.PLANNED, Site.SOURCE).command[2] == "bridge,br=br0"
    assert planned(Mode.TEST, Site.SOURCE).command[2] == "bridge,br=br9", "wherever it is"
    assert planned(Mode.TEST, used=replace(policy, network_test=None)).environment["HVFUSE_DNS1"] == ""
    with pytest.raises(UsageError, match=r"no disk link\.raw here; it has: root\.raw$"):
        planned(Mode.TEST, used=VmPolicy(boot=BootSettings(qemu=("q", "{disk:link.raw}"))))
    with pytest.raises(NotFoundError):
        planned(Mode.TEST, directory=place.root / "nowhere")
    libvirt = VmPolicy(boot=BootSettings(libvirt="web01.xml"))
    with pytest.raises(UsageError, match=r"libvirt: .*/web01\.xml: No such file"):
        planned(Mode.TEST, used=libvirt)
    (place.root / "web01.xml").write_text(DEFINITION)
    assert str(place.disk) in planned(Mode.TEST, used=libvirt).domain
