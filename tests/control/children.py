"""Tiny real processes that behave like trackers and shippers towards whoever supervises them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

SERVER = """
import os, signal, sys, threading
from hvfuse import wire
from hvfuse.errors import BusyError

socket_path, story = sys.argv[1:3]
name = os.path.basename(os.path.dirname(socket_path)) + " " + os.path.basename(socket_path)
done = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: done.set())

def handle(request):
    if request["op"] == "stop" and os.path.exists(story + ".busy"):
        raise BusyError("in use by qemu (pid 7)")
    if request["op"] == "stop":
        done.set()
    return {"pid": os.getpid(), "disks": [], "untracked": []}

listener = wire.Listener(socket_path, handle, name="control")
done.wait()
with open(story, "a") as file:
    file.write(f"{name} ended\\n")
listener.close()
"""
"""Serves argv[1]; ends at "stop" (refused while the file argv[2].busy is there) or SIGTERM, and says so in argv[2]."""

REFUSER = """
import sys
print("hvfuse: os.vhd: footer checksum does not match\\n  hint: hvfuse disk check os.vhd", file=sys.stderr)
sys.exit(7)
"""
"""Ends as a tracker does whose disk is corrupt."""

LATECOMER = """
import sys
print("hvfuse: late: another process serves it", file=sys.stderr)
sys.exit(6)
"""
"""Ends as a tracker does that another one was quicker than."""

PATIENCE = 20.0


def server(socket_path: str, story: str) -> list[str]:
    """The command of SERVER."""
    return [sys.executable, "-c", SERVER, socket_path, story]


def until(true: Callable[[], object]) -> None:
    """Wait for another process; fails when it takes for ever."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


class HandClock:
    """Intervals only pass when the test says so; `sleep` really waits, a little, for real processes."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now_ns(self) -> int:
        return int(self.at * 1e9)

    def monotonic(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds
        threading.Event().wait(0.01)
