"""Running a command of the administrator's within a time, for guests that are booted."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OUTPUT_BYTES = 4096
"""What is kept of the output: its end."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a command said. `exit_code`: negative if a signal ended it, None if it took too long or could not be run.
    `output`: the last 4 KiB of what it wrote, and why there is no exit code. `seconds`: what it took."""

    ok: bool
    exit_code: int | None
    output: str
    seconds: float


def run_command(words: Sequence[str], environment: Mapping[str, str], *, seconds: float, cwd: str = "/") -> Verdict:
    """Run a command, and kill it with its whole process group once it has taken so long, or if waiting for it ends by
    an exception. What it leaves running in the background is not waited for."""
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cwd,
            env={**os.environ, **environment},
        )
    except OSError as error:
        return Verdict(False, None, f"{words[0]} cannot be run: {error.strerror}", 0.0)
    assert process.stdout is not None
    try:
        said = _listen(process, process.stdout.fileno(), began + seconds)
    finally:
        if process.poll() is None:  # its number is its own until it is waited for
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        else:
            code = process.returncode
        process.stdout.close()
    took = time.monotonic() - began
    output = said.decode(errors="replace").strip()
    if code is None:
        output = f"{output}\n{words[0]} did not end within {seconds:g} s and was killed".lstrip("\n")
    return Verdict(code == 0, code, output, took)


def _listen(process: subprocess.Popen[bytes], pipe: int, until: float) -> bytes:
    """The end of what a process says until it ends, or the time has come."""
    os.set_blocking(pipe, False)
    handle = os.pidfd_open(process.pid)
    said = b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.register(handle, select.POLLIN)
    try:
        while True:
            left = until - time.monotonic()
            ready = dict(poll.poll(max(0.0, left) * 1000))
            chunk = _read(pipe) if pipe in ready else None
            if chunk:
                said = (said + chunk)[-OUTPUT_BYTES:]
            elif handle in ready:
                process.wait()
                return said
            elif chunk == b"":  # it has closed its output, and goes on
                poll.unregister(pipe)
            if left <= 0:
                return said
    finally:
        os.close(handle)


def _read(pipe: int) -> bytes | None:
    """None: there is nothing at the moment; b"": there will be nothing any more."""
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return None
