"""A program for the tests: mounts a view of the files in a folder, and says "ready"."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from hvfuse import system
from hvfuse.manifest import DiskManifest
from hvfuse.target.view import View
from hvfuse.target.view_mount import serve_view


class FilesPoint:
    """The files of a folder, as if they were the disks of a recovery point."""

    def __init__(self, folder: Path) -> None:
        self._fds = {path.name: os.open(path, os.O_RDONLY) for path in folder.iterdir()}
        self.disks = tuple(
            DiskManifest(disk_id=name.encode().ljust(16), name=name, format="raw", size=os.fstat(fd).st_size)
            for name, fd in self._fds.items()
        )

    def pread(self, disk_name: str, offset: int, length: int) -> bytes:
        return system.pread(self._fds[disk_name], length, offset)

    def pread_into(self, disk_name: str, offset: int, out: memoryview) -> None:
        assert system.pread_into(self._fds[disk_name], out, offset) == len(out)

    def extents(self, disk_name: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        return system.data_extents(self._fds[disk_name], start, end)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)


def main() -> None:
    """Arguments: the folder, the mount point, the overlays' directory or "none", "keep" or "drop"."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    folder, mountpoint, overlays, afterwards = sys.argv[1:5]
    view = View(FilesPoint(Path(folder)), overlays=None if overlays == "none" else overlays)
    serve_view(view, mountpoint, on_ready=lambda: print("ready", flush=True))
    view.close() if afterwards == "keep" else view.drop()
    print("ended", flush=True)


if __name__ == "__main__":
    main()
