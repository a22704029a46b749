"""Freezing through a pair of commands, for guests without an agent and for whatever has to be asked instead."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from hvfuse.shipper.guest import FreezeError


class HookFreezer:
    """The guest of `vm`, behind the commands `freeze` and `thaw`. All methods raise FreezeError."""

    def __init__(self, vm: str, freeze: Sequence[str], thaw: Sequence[str]) -> None:
        self._vm = vm
        self._commands = {"freeze": freeze, "thaw": thaw}
        self.may_be_frozen = False
        """Whether the freezing command was started."""

    def freeze(self, seconds: float) -> None:
        """Run the freezing command, which has so long. One that takes longer is killed, with its children."""
        self._run("freeze", seconds)

    def thaw(self, seconds: float) -> bool:
        """Run the thawing command, likewise. Returns True: a command does not tell whether the guest was frozen."""
        self._run("thaw", seconds)
        self.may_be_frozen = False
        return True

    def _run(self, event: str, seconds: float) -> None:
        words = self._commands[event]
        named = f"the {event} command {words[0]}"
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                start_new_session=True,
                env={**os.environ, "HVFUSE_VM": self._vm, "HVFUSE_EVENT": event},
            )
        except OSError as error:
            raise FreezeError(f"{named} cannot be run: {error.strerror}") from None
        self.may_be_frozen = True
        try:
            code = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            raise FreezeError(f"{named} did not end within {seconds:g} s and was killed") from None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code != 0:
            raise FreezeError(f"{named} ended with exit code {code}")
