"""Asking a running qemu through its monitor (QMP)."""

from __future__ import annotations

import asyncio
import contextlib
import os

from qemu.qmp import ExecuteError, QMPClient, QMPError

from hvfuse.errors import UnreachableError

PATIENCE = 5.0
"""Seconds for a request that a qemu answers at once if it lives."""


class Monitor:
    """The monitor whose socket is `name` in `directory`. Each request has a connection of its own: qemu serves one
    client at a time. All methods raise UnreachableError."""

    def __init__(self, directory: str, name: str) -> None:
        self._directory = directory
        self._name = name

    def status(self) -> str:
        """ "running", or why it is not: "paused", "io-error", "prelaunch" and so on."""
        found = self._ask("query-status")
        return str(found.get("status")) if isinstance(found, dict) else ""

    def power_down(self) -> None:
        """Press the power button: the guest's system shuts down, if it runs and listens to that."""
        self._ask("system_powerdown")

    def quit(self) -> None:
        """Have qemu write out what it still holds, and end: for the guest, like a power cut."""
        self._ask("quit")

    def _ask(self, command: str) -> object:
        try:
            directory = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise UnreachableError(f"{self._directory}: {error.strerror}") from None
        try:
            # A socket's path is short, that of the directory may be long.
            path = f"/proc/self/fd/{directory}/{self._name}"
            return asyncio.run(asyncio.wait_for(_request(path, command), PATIENCE))
        except TimeoutError:
            raise UnreachableError(f"qemu does not answer within {PATIENCE:.0f} s") from None
        except ExecuteError as error:
            raise UnreachableError(f"qemu refused {command}: {error}") from None
        except (QMPError, OSError, EOFError, ValueError) as error:
            raise UnreachableError(f"qemu cannot be asked: {error}") from None
        finally:
            os.close(directory)


async def _request(path: str, command: str) -> object:
    client = QMPClient("hvfuse")
    client.logger.disabled = True  # each failure is told by its exception
    try:
        await client.connect(path)
        return await client.execute(command)
    finally:
        # What the connection failed with comes up here once more.
        with contextlib.suppress(QMPError, OSError, EOFError, ValueError, TimeoutError):
            await asyncio.wait_for(client.disconnect(), 1.0)
