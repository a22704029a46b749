"""The `hvfuse` command with its labelled system calls counted, and killed at one of them. A program:

    python watched.py TRACE LABEL NTH VICTIM hvfuse-arguments…

TRACE gets a line "LABEL SIZE" for every labelled call that writes to a replica image or stages a frame,
before the call, and for each commit; what is in it survives any kill. Before the NTH call whose label begins
with LABEL (never if NTH is 0) the process gets SIGKILL, and so does VICTIM first, a pid, if it is not 0.
"""

from __future__ import annotations

import os
import signal
import sys

from hvfuse import system
from hvfuse.cli.main import main

TRACED = ("store:image", "store:put", "store:commit:after")


def watch(trace: str, label: str, nth: int, victim: int) -> None:
    fd = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    seen = 0

    def injector(called: str, call: str, size: int) -> None:
        nonlocal seen
        if called.startswith(label):
            seen += 1
            if seen == nth:
                if victim:
                    os.kill(victim, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        if called in TRACED:
            os.write(fd, f"{called} {size}\n".encode())

    system.install(injector)


if __name__ == "__main__":
    watch(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    main(sys.argv[5:])
