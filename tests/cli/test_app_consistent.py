"""`hvfuse replicate --app-consistent`: what it says, and what the deaths of real processes do to guest and point."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hvfuse.control.daemon import serving_pid, wait_for_end
from tests.cli.conftest import CommandLine

pytestmark = pytest.mark.mount

HOOK = """
import os, signal, sys
if os.path.exists(sys.argv[1] + ".refuses"):
    sys.exit(4)
if os.path.exists(sys.argv[1] + ".stops") and os.environ["HVFUSE_EVENT"] == "freeze":
    with open(sys.argv[1] + ".stops") as file:
        os.kill(int(file.read()), signal.SIGSTOP)
with open(sys.argv[1], "w") as file:
    file.write(os.environ["HVFUSE_EVENT"] + os.environ["HVFUSE_VM"])
"""


@pytest.fixture
def state(hvfuse: CommandLine, tmp_path: Path) -> Path:
    """The file in which the VM's hooks keep how the guest is."""
    state = tmp_path / "guest-state"
    (tmp_path / "hook.py").write_text(HOOK)
    words = json.dumps([sys.executable, str(tmp_path / "hook.py"), str(state)])
    (hvfuse.root / "hvfuse.toml").write_text(f"[vm.vm.guest]\nfreeze = {words}\nthaw = {words}\n")
    hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    assert hvfuse("replicate", "vm") == 0
    return state


def kinds(hvfuse: CommandLine) -> list[str]:
    return [point["kind"] for point in hvfuse.json("point", "list", "vm")["points"]]


def wait_until(holds: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.parametrize("by_daemon", [False, True])
def test_a_point_is_made_with_the_guest_standing_still(hvfuse: CommandLine, state: Path, by_daemon: bool) -> None:
    if by_daemon:
        hvfuse.ship("vm")
    made = hvfuse.json("replicate", "vm", "--app-consistent")
    assert (made["consistency"], made["freeze_error"]) == ("app-consistent", None)
    assert 0 < made["frozen_seconds"] < 5
    assert state.read_text() == "thawvm"
    assert hvfuse("replicate", "vm", "--app-consistent") == 0
    assert "app-consistent (the guest stood still for 0." in hvfuse.out
    assert hvfuse("replicate", "vm") == 0
    assert kinds(hvfuse)[-3:] == ["app-consistent", "app-consistent", "crash-consistent"]
    assert hvfuse("point", "list", "vm") == 0
    assert "app-consistent" in hvfuse.out


def test_a_guest_that_cannot_be_frozen_gives_a_lesser_point_and_exit_code_14(hvfuse: CommandLine, state: Path) -> None:
    refuses = Path(f"{state}.refuses")
    refuses.touch()
    # It cannot be thawed either, which the process that tried goes on with until the command works again.
    threading.Timer(2.0, refuses.unlink).start()
    made = hvfuse.json("replicate", "vm", "--app-consistent", code=14)
    assert (made["consistency"], made["frozen_seconds"]) == ("crash-consistent", 0.0)
    assert "exit code 4" in made["freeze_error"]
    assert "the point is crash-consistent" in hvfuse.err
    assert "hint:" in hvfuse.err
    assert kinds(hvfuse) == ["crash-consistent", "crash-consistent"]
    assert hvfuse("replicate", "vm", "--app-consistent") == 0


def test_a_shipper_that_is_killed_while_the_guest_stands_still_leaves_it_moving_and_no_false_promise(
    hvfuse: CommandLine, state: Path
) -> None:
    socket = hvfuse.ship("vm")
    shipper, tracker = serving_pid(socket), serving_pid(str(Path(socket).with_name("tracker.sock")))
    assert shipper is not None and tracker is not None
    hvfuse("replicate", "vm")  # after the cycle that it began with by itself
    Path(f"{state}.stops").write_text(str(tracker))  # so that the rotation takes as long as we like
    try:
        asking = threading.Thread(target=_ask, args=(socket,))
        asking.start()
        # The request for the rotation waits at the tracker's socket from now on.
        wait_until(lambda: state.exists() and state.read_text() == "freezevm")
        time.sleep(0.5)
        os.kill(shipper, signal.SIGKILL)
        took = wait_until(lambda: state.read_text() == "thawvm")
        assert took < 1.5
        print(f"thawed {took:.3f} s after the shipper's death")
        assert wait_for_end(shipper, 10)
        asking.join()
    finally:
        os.kill(tracker, signal.SIGCONT)
    # Only now the tracker comes to what the dead one had asked for: the guest moves, and the point must not claim more.
    assert hvfuse("replicate", "vm") == 0
    assert set(kinds(hvfuse)) == {"crash-consistent"}
    assert not (hvfuse.root / "state" / "vms" / "vm" / "guest" / "note").exists()


def _ask(socket: str) -> None:
    from hvfuse import wire
    from hvfuse.errors import HvfuseError

    with pytest.raises(HvfuseError):
        wire.request(socket, "cycle", application=True)


def test_what_was_left_frozen_is_thawed_by_the_next_shipper(hvfuse: CommandLine, state: Path) -> None:
    hvfuse.json("replicate", "vm", "--app-consistent")
    guest = hvfuse.root / "state" / "vms" / "vm" / "guest"
    words = [sys.executable, str(state.parent / "hook.py"), str(state)]
    note = {"vm": "vm", "agent": None, "freeze": words, "thaw": words, "freeze_timeout": 10.0}
    (guest / "note").write_text(json.dumps(note))
    state.write_text("freezevm")
    assert hvfuse("replicate", "vm") == 0
    assert state.read_text() == "thawvm"
    assert not (guest / "note").exists()
