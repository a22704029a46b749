"""A program for the tests: mounts a folder, whose disks are not logged but watched, and says "ready"."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from hvfuse import system
from hvfuse.errors import HvfuseError, NoSpaceError
from hvfuse.tracker import mount

ERRORS = {
    "RuntimeError": RuntimeError("a bug"),
    "HvfuseError": HvfuseError("the log is gone"),
    "NoSpaceError": NoSpaceError("the log is full"),
    "OSError": OSError(errno.EDQUOT, "quota"),
}


class PassthroughDisk:
    """A disk without a log that writes down in `journal` what it was asked to do."""

    def __init__(self, path: Path, journal: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _note(self, *what: object) -> None:
        os.write(self._journal, (" ".join(map(str, what)) + "\n").encode())

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def write(self, data: memoryview, offset: int) -> int:
        self._note("write", offset, len(data))
        if data[:6] == b"raise:":
            raise ERRORS[bytes(data[6:]).decode()]
        return os.pwrite(self.fd, data, offset)

    def zero(self, offset: int, length: int) -> None:
        self._note("zero", offset, length)
        system.write_zeroes("test:zero", self.fd, offset, length)

    def trim(self, offset: int, length: int) -> None:
        self._note("trim", offset, length)
        system.write_zeroes("test:trim", self.fd, offset, length)

    def truncate(self, size: int) -> None:
        self._note("truncate", size)
        os.ftruncate(self.fd, size)

    def allocate(self, offset: int, length: int) -> None:
        system.fallocate("test:allocate", self.fd, system.FALLOC_FL_KEEP_SIZE, offset, length)

    def sync(self, *, datasync: bool) -> None:
        self._note("sync", datasync)
        os.fsync(self.fd)

    def opened(self) -> None:
        self._note("opened")

    def closed(self) -> None:
        self._note("closed")


class PassthroughVm:
    def __init__(self, folder: Path, journals: Path) -> None:
        self.names = threading.RLock()
        self.gate = threading.Lock()
        self.held = None
        self.is_open: Callable[[tuple[int, int]], bool] = lambda inode: False
        self.disks = {
            path.name: PassthroughDisk(path, journals / path.name)
            for path in folder.iterdir()
            if path.suffix in (".vhd", ".raw")
        }


def ready() -> None:
    print("ready", flush=True)


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    folder, journals, mountpoint = map(Path, sys.argv[1:4])
    # Other threads of the process must not keep the mount from ending.
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    vm = PassthroughVm(folder, journals)
    mount.serve(vm, folder=str(folder), mountpoint=str(mountpoint), on_ready=ready)
    print("ended", flush=True)


if __name__ == "__main__":
    main()
