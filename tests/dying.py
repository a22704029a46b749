"""Something done in a process that dies at one labelled system call, as by SIGKILL: nothing is tidied up."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

from hvfuse import system


def done_until(step: int, act: Callable[[], object], *, prepare: Callable[[], object] = lambda: None) -> bool:
    """Do `prepare`, and then `act` in the same child process, which dies at the labelled call number `step` of the
    latter. Returns whether it came to the end instead; fails where it ended in any other way."""
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def injector(label: str, call: str, size: int) -> int | None:
            if next(calls) == step:
                os._exit(9)
            return None

        try:
            prepare()
            system.install(injector)
            act()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 0
