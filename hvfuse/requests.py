"""The loop that takes a FUSE connection's requests from the kernel. Knows their bytes, and nothing of libfuse.

Reads and writes of open files, nearly all that a guest ever asks for, are answered right here: a system call to take
the request, one to answer it, and between them nothing but the file's own work. On libfuse's way each would go through
its tables of names and a callback from C, which costs as much again. Every other request is handed on as it came.

Whoever is asked often stays awake for a moment after each answer (`_TRIES`).

One buffer takes all requests, placed so that a write's payload begins on a page; what is read is answered from another,
placed alike.

Layout of what is read and answered here (host byte order):

    request           0   4  length of the whole           answer    0   4  length of the whole
                      4   4  operation                               4   4  0, or the error, negative
                      8   8  number                                  8   8  number of the request
                     16  24  (inode, user, group, process)          16      of a read: the bytes;
    reads and writes 40   8  handle of the open file                        of a write: 4 bytes written, 4 zeroes
                     48   8  offset, bytes
                     56   4  length, bytes
                     60  20  (flags, owner of locks)
    writes           80      the payload
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import struct
import time
from collections.abc import Callable, Mapping

from hvfuse.extent import Buffer
from hvfuse.filesystem import OpenFile

MAX_REQUEST = 1 << 20
"""Bytes in one read or write request; libfuse 3.14 does not survive more."""

_TRIES = 64
"""How often the device is asked again before we sleep: a request that comes within these 50 to 100 microseconds need
not wake anybody up, which takes as long. Only where the last sleep was short: an idle mount keeps no processor busy."""
_SOON_NS = 100_000
"""What a short sleep is."""
_HEAD = 80
_READ, _WRITE = 15, 16
_REQUEST = struct.Struct("=4xIQ24xQQI20x")
_ANSWER = struct.Struct("=IiQ")
_WRITTEN = struct.Struct("=IiQI4x")


class Requests:
    """The requests that arrive at `device`.

    `files`: open files by their handles. `hand_on`: gets the length of a request that is not answered here and lies
    in `buffer`, answers it, and returns whether there may be more. `errno_of`: what an exception means to the caller.
    """

    def __init__(
        self,
        device: int,
        files: Mapping[int, OpenFile],
        *,
        hand_on: Callable[[int], bool],
        errno_of: Callable[[str, Exception], int],
    ) -> None:
        self._device = device
        self._files = files
        self._hand_on = hand_on
        self._errno_of = errno_of
        self.buffer = memoryview(mmap.mmap(-1, mmap.PAGESIZE + MAX_REQUEST))[mmap.PAGESIZE - _HEAD :]
        self._out = memoryview(mmap.mmap(-1, mmap.PAGESIZE + MAX_REQUEST))[mmap.PAGESIZE - _ANSWER.size :]
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._left = False

    def leave(self) -> None:
        """Have `serve` return as soon as it looks up from its work. For any thread, and signal handlers."""
        self._left = True
        os.eventfd_write(self._bell, 1)

    def serve(self) -> None:
        """Answer requests until the connection ends, by an unmount or otherwise, or somebody leaves.

        Raises OSError for anything else that the device says.
        """
        device, request, out, files = self._device, self.buffer, self._out, self._files
        payload, data, head = request[_HEAD:], out[_ANSWER.size :], _ANSWER.size
        os.set_blocking(device, False)
        waiting = select.poll()
        waiting.register(device, select.POLLIN)
        waiting.register(self._bell, select.POLLIN)
        tries = left = 0
        answer: Buffer
        while not self._left:
            try:
                length = os.readv(device, (request,))
            except BlockingIOError:
                if left:
                    left -= 1
                    continue
                began = time.monotonic_ns()
                waiting.poll()
                tries = left = _TRIES if time.monotonic_ns() - began < _SOON_NS else 0
                continue
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.ENOENT, errno.EINTR):  # it was taken back while we read it
                    continue
                raise
            left = tries
            operation, number, handle, offset, size = _REQUEST.unpack_from(request)
            if operation == _WRITE and size:
                try:
                    answer = _WRITTEN.pack(_WRITTEN.size, 0, number, files[handle].write(payload[:size], offset))
                except Exception as error:
                    answer = self._refusal("write", number, error)
                self._answer(answer)
            elif operation == _READ and size:
                try:
                    end = head + files[handle].read_into(data[:size], offset)
                    _ANSWER.pack_into(out, 0, end, 0, number)
                    answer = out[:end]
                except Exception as error:
                    answer = self._refusal("read", number, error)
                self._answer(answer)
            elif not self._hand_on(length):
                return

    def _refusal(self, name: str, number: int, error: Exception) -> bytes:
        return _ANSWER.pack(_ANSWER.size, -self._errno_of(name, error), number)

    def _answer(self, answer: Buffer) -> None:
        try:
            os.write(self._device, answer)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits for it any more
                raise

    def close(self) -> None:
        """Let go of the bell; the device is its opener's."""
        os.close(self._bell)
