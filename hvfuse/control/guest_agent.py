"""Freezing through the qemu guest agent. With `guest_monitor`, the one module that knows qemu.

The agent's channel is a serial line: what an earlier client left in it, such as the answer to a request whose patience
had ended, is still to come when the next one connects. So each connection begins with `guest-sync-delimited`: all up to
the byte 0xff is dropped, and the number behind it has to be ours. `qemu.qmp` does not know of that byte, but lets
a client say how a message is read and written. Each request has a connection of its own: qemu serves one client of
the channel at a time, and a guest must not be unreachable for others while it runs.

Needs an agent of qemu 4.0 or later, which repeats a request's id in its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message

from hvfuse.shipper.guest import FreezeError, GoneError

SENTINEL = b"\xff"
PATIENCE = 3.0
"""Seconds for a request that the agent answers at once if it lives."""


_Answer = TypeVar("_Answer")


class _Channel(QMPClient):
    """A client that finds its place in the agent's stream."""

    def __init__(self) -> None:
        super().__init__()
        self.await_greeting = False
        self.negotiate = False
        self._in_step = False
        self._has_spoken = False

    def _do_send(self, msg: Message) -> None:
        assert self._writer is not None
        if not self._has_spoken:  # half a request of somebody else's may stand in the agent's parser
            self._writer.write(SENTINEL)
            self._has_spoken = True
        super()._do_send(msg)

    async def _do_recv(self) -> Message:
        while True:
            line = await self._readline()
            behind = line.rfind(SENTINEL) + 1
            if behind or self._in_step:
                self._in_step = True
                try:
                    return Message(line[behind:])
                except UnicodeDecodeError as error:
                    raise QMPError(f"not JSON: {error}") from None


class AgentFreezer:
    """The guest behind the agent's socket at `path`. All methods raise FreezeError."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.may_be_frozen = False
        """Whether the guest was told to freeze."""

    def freeze(self, seconds: float) -> None:
        """Freeze all file systems of the guest, for which it has so long."""
        self._run(self._freeze(), seconds)

    def thaw(self, seconds: float) -> bool:
        """Thaw them. Returns whether any was still frozen; none is afterwards. Raises GoneError too."""
        thawed = self._run(self._request("guest-fsfreeze-thaw"), seconds)
        if not isinstance(thawed, int):
            raise FreezeError(f"the guest agent answered {thawed!r} to guest-fsfreeze-thaw")
        self.may_be_frozen = False
        return thawed > 0

    async def _freeze(self) -> None:
        status = await self._request("guest-fsfreeze-status")
        if status != "thawed":
            # Ours would have been thawed before: some other program is at it, and it is not ours to thaw.
            raise FreezeError(f"the guest says that its file systems are {status}: another program is at it")
        frozen = await self._request("guest-fsfreeze-freeze", freezes=True)
        if not isinstance(frozen, int) or frozen <= 0:
            raise FreezeError(f"the guest agent froze no file system (it answered {frozen!r})")

    async def _request(self, command: str, *, freezes: bool = False) -> object:
        channel = _Channel()
        try:
            await channel.connect(self._path)
            await asyncio.wait_for(self._synchronise(channel), PATIENCE)
            self.may_be_frozen |= freezes
            return await channel.execute(command)
        finally:
            # What the connection failed with comes up here once more; and a peer that does not read must not hold it.
            with contextlib.suppress(QMPError, OSError, EOFError, ValueError, TimeoutError):
                await asyncio.wait_for(channel.disconnect(), 1.0)

    async def _synchronise(self, channel: _Channel) -> None:
        number = secrets.randbits(48)
        arguments: Mapping[str, object] = {"id": number}
        if await channel.execute("guest-sync-delimited", arguments) != number:
            raise FreezeError(f"{self._path}: somebody else is talking to the guest agent")

    def _run(self, asking: Coroutine[Any, Any, _Answer], seconds: float) -> _Answer:
        try:
            return asyncio.run(asyncio.wait_for(asking, max(0.0, seconds)))
        except TimeoutError:
            raise FreezeError(f"{self._path}: the guest agent does not answer") from None
        except ConnectError as error:
            if isinstance(error.exc, OSError) and error.exc.errno in (errno.ECONNREFUSED, errno.ENOENT):
                raise GoneError(f"{self._path}: the guest does not run: {error.exc.strerror}") from None
            raise FreezeError(f"{self._path}: the guest agent cannot be reached: {error.exc}") from None
        except ExecuteError as error:
            raise FreezeError(f"the guest agent refused: {error}") from None
        except (QMPError, OSError, EOFError, ValueError) as error:
            raise FreezeError(f"{self._path}: the guest agent is not understood: {error}") from None
