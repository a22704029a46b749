"""A hook of a recovery plan: a command that has to end with 0 within its time.

A runner that is killed must neither lose sight of a hook that goes on, nor find one that nobody wrote down. So the hook
waits for a word on its standard input before it becomes the command; the word comes when its process is on record, and
the hook ends if whoever had to say it is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from hvfuse import system
from hvfuse.control.plan import Words
from hvfuse.errors import BusyError, HvfuseError

OUTPUT_BYTES = 1024
"""So much of the end of what a hook says is kept."""
_WAIT_FOR_WORD = 'read -r _ && exec "$@" </dev/null'


class HookError(HvfuseError):
    """A hook failed, could not be run, or took too long."""


def run_hook(
    words: Words, *, seconds: float, environment: Mapping[str, str], started: Callable[[Mapping[str, Any]], None]
) -> tuple[str, HookError | None]:
    """Run a hook. `started` is told its `system.process_identity` before it does anything. Returns the end of what it
    said, and why it failed. One that takes longer than `seconds` is killed, with its children."""
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _WAIT_FOR_WORD, "sh", *words],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
                env={**os.environ, **environment},
            )
        except (OSError, ValueError) as error:
            return "", HookError(f"{words[0]} cannot be run: {error}")
        failure = None
        try:
            _say_the_word(process, started)
            code = process.wait(seconds)
            if code != 0:
                failure = HookError(f"{words[0]} {_ended(code)}")
        except subprocess.TimeoutExpired:
            failure = HookError(f"{words[0]} did not end within {seconds:g} s and was killed")
        finally:
            if process.poll() is None:  # too late, or Ctrl-C
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return _end_of(output.fileno()), failure


def demand_ended(identity: Mapping[str, Any] | None, name: str) -> None:
    """Raise BusyError if the hook that a runner of before has started still runs."""
    if identity is not None and system.is_running(identity):
        raise BusyError(
            f"{name}: the hook that was started before still runs (pid {identity['pid']})",
            hint=f"wait for its end, or end it: kill -9 -{identity['pid']}",
        )


def _say_the_word(process: subprocess.Popen[bytes], started: Callable[[Mapping[str, Any]], None]) -> None:
    assert process.stdin is not None
    try:
        started(system.process_identity(process.pid))
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"\n")
            process.stdin.flush()
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _ended(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    reason = {126: ": it cannot be run", 127: ": there is no such command"}.get(code, "")
    return f"ended with exit code {code}{reason}"


def _end_of(fd: int) -> str:
    size = os.fstat(fd).st_size
    return system.pread(fd, min(size, OUTPUT_BYTES), max(0, size - OUTPUT_BYTES)).decode(errors="replace").strip()
