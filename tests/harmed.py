"""hvfuse as a process that comes to harm, or does harm to another one, where HVFUSE_HARM says so, and in haste.

HVFUSE_HARM is JSON; an empty object, or none, harms nobody:

    step, when      within a flow: before or after (`when`) the act of its step of that number
    call            within a flow: at the labelled call of that number, counted from 1
    role, label     in the process that was started as `hvfuse ROLE`, once it comes to a call of that label for the
                    `number`th time
    home            only where hvfuse works on the home in that directory
    marker          a file that is made just before, and must not exist: harm comes once
    do              "kill", "interrupt": of this process itself; or a list of sockets, or run.lock: kill who serves it

As a program: the processes in the background are started so. `run` does the same in a child of a test.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LOOK_SECONDS = 0.2


def run(arguments: Sequence[str]) -> None:
    """The command line, in haste and in harm's way. Ends the process."""
    from hvfuse.cli.main import main

    _hasten()
    harm = json.loads(os.environ.get("HVFUSE_HARM") or "{}")
    if harm and arguments[1] == harm["home"]:
        _arm(harm, arguments[2])
    main(arguments)


def _hasten() -> None:
    """Shorter pauses, and children that are in haste, too."""
    from hvfuse.control import daemon, fence, standing, supervisor

    fence.LOOK_SECONDS = supervisor.SCAN_SECONDS = LOOK_SECONDS
    supervisor.TICK_SECONDS = 0.05
    assert standing.serve_standing.__kwdefaults__ is not None
    standing.serve_standing.__kwdefaults__.update(poll_seconds=LOOK_SECONDS, retry_seconds=LOOK_SECONDS)
    daemon.Restarts.delay_after = lambda self, lived: LOOK_SECONDS  # type: ignore[method-assign]

    def command(home: Any, *arguments: str) -> list[str]:
        return [sys.executable, "-P", __file__, "--home", home.root, *arguments]

    supervisor.command = command  # type: ignore[attr-defined]


def _arm(harm: Mapping[str, Any], role: str) -> None:
    if "label" in harm:
        if role == harm["role"]:
            _install(harm, lambda label: label == harm["label"], int(harm.get("number", 1)))
    elif not role.startswith("_") and role != "run":
        _harm_flow(harm)


def _install(harm: Mapping[str, Any], counts: Callable[[str], bool], number: int) -> None:
    from hvfuse import system

    calls = itertools.count(1)

    def injector(label: str, call: str, size: int) -> int | None:
        if counts(label) and next(calls) == number:
            _do(harm)
        return None

    system.install(injector)


def _harm_flow(harm: Mapping[str, Any]) -> None:
    from hvfuse.control import flows

    drive = flows.drive

    def harmed(job: Any, steps: Sequence[Any], acts: Mapping[Any, Callable[[], str | None]]) -> None:
        if "call" in harm:
            _install(harm, lambda label: True, int(harm["call"]))
            return drive(job, steps, acts)

        def within(number: int, act: Callable[[], str | None]) -> Callable[[], str | None]:
            def acting() -> str | None:
                if (number, harm["when"]) == (harm["step"], "before"):
                    _do(harm)
                said = act()
                if (number, harm["when"]) == (harm["step"], "after"):
                    _do(harm)
                return said

            return acting

        return drive(job, steps, {step: within(number, acts[step]) for number, step in enumerate(steps)})

    flows.drive = harmed


def _do(harm: Mapping[str, Any]) -> None:
    try:
        os.close(os.open(harm["marker"], os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    if harm["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if harm["do"] == "interrupt":
        raise KeyboardInterrupt
    for path in harm["do"]:
        kill_serving(path)


def kill_serving(path: str) -> bool:
    """Kill who serves a socket, or holds a `run.lock`, and wait until it is dead. Returns whether there was one."""
    pid = _serving(path)
    if pid is None:
        return False
    fd = os.pidfd_open(pid)
    signal.pidfd_send_signal(fd, signal.SIGKILL)
    select.select([fd], [], [], 10)
    os.close(fd)
    return True


def _serving(path: str) -> int | None:
    from hvfuse import system
    from hvfuse.control.daemon import serving_pid

    if path.endswith(".sock"):
        return serving_pid(path) if os.path.isdir(os.path.dirname(path)) else None
    if not os.path.exists(path):
        return None
    with system.exclusive_lock(path) as had:
        if had:
            return None
    with open(path, encoding="ascii") as file:
        return int(file.read())


if __name__ == "__main__":
    run(sys.argv[1:])
