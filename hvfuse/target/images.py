"""The replica images of one VM as files: made, written, synced. One writer at a time.

Images are never replaced or renamed: a reader may have one open. Directories and files are made
durable before anything is promised about them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from hvfuse import system
from hvfuse.errors import BusyError, CorruptError
from hvfuse.extent import Buffer
from hvfuse.target.environment import file_faults


class ReplicaImages:
    """The images in `folder`, which is made if missing. Files once touched stay open until `close`.

    So a failure to write back is seen by the `sync` that follows, however much later. Whoever changes
    anything holds the `lock`. Raises NoSpaceError, and HvfuseError naming the file.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._files: dict[str, int] = {}
        with file_faults(folder):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            self._directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other writer out, here and in other processes. Raises BusyError at once."""
        try:
            fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{self._folder}: another process is writing the replica images",
                hint="wait until the import, adoption or merge is over",
            ) from None
        try:
            yield
        finally:
            fcntl.flock(self._directory, fcntl.LOCK_UN)

    def blank(self, names: Iterable[str]) -> None:
        """Make the images of these disks empty files, whatever they were; not yet durable."""
        for name in names:
            with self._faults(name):
                system.truncate("store:blank", self._file(name, create=True), 0)

    def write(self, name: str, offset: int, data: Buffer) -> None:
        """Write bytes into an image; not yet durable."""
        with self._faults(name):
            system.pwrite("store:image", self._file(name), data, offset)

    def begin_writing(self, name: str) -> None:
        """Have the medium begin to take what was written to an image, before the `sync` that waits for it."""
        system.begin_writing(self._file(name))

    def zero(self, name: str, offset: int, length: int) -> None:
        """Make a range read as zeroes, as a hole if possible; beyond the file's end it does already."""
        with self._faults(name):
            system.write_zeroes("store:punch", self._file(name), offset, length)

    def descriptor(self, name: str) -> int:
        """An image's descriptor, valid until `close`: for whoever writes to it without this object's verbs, so
        that its `sync` covers that too."""
        return self._file(name)

    def size(self, name: str) -> int:
        """Bytes of the file."""
        return os.fstat(self._file(name)).st_size

    def resize(self, name: str, size: int) -> None:
        """Set the file's length; not yet durable."""
        with self._faults(name):
            if self.size(name) != size:
                system.truncate("store:resize", self._file(name), size)

    def sync(self) -> None:
        """Make all that was done through this object durable. A failure is final: do it all again."""
        for name, fd in self._files.items():
            with self._faults(name):
                system.fsync("store:image-sync", fd)
        with file_faults(self._folder):
            system.fsync("store:folder-sync", self._directory)
            system.fsync_directory("store:replicas-sync", os.path.dirname(self._folder))

    def sync_file_system(self) -> None:
        """Make everything on the images' file system durable; fails also if anything was lost there before."""
        with file_faults(self._folder):
            system.syncfs("store:filesystem-sync", self._directory)

    def remove(self, name: str) -> None:
        """Remove the image of a disk that the VM has no more."""
        with self._faults(name):
            system.unlink("store:image-remove", os.path.join(self._folder, name), missing_ok=True)

    def _file(self, name: str, *, create: bool = False) -> int:
        """The image's descriptor. It must be there: one that is missing is not to be taken for zeroes."""
        fd = self._files.get(name)
        if fd is None:
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
            path = os.path.join(self._folder, name)
            try:
                fd = os.open(name, flags, 0o600, dir_fd=self._directory)
            except FileNotFoundError:
                raise CorruptError(f"{path}: the replica image is missing") from None
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise CorruptError(f"{path}: not a plain file")
            self._files[name] = fd
        return fd

    @contextmanager
    def _faults(self, name: str) -> Iterator[None]:
        with file_faults(os.path.join(self._folder, name)):
            yield
