"""A file system that is another one underneath, and from some instant on a second one.

Until then each request takes its turn at a lock, so that somebody can let none run (`standstill`). At the switch, files
and directories that clients hold are opened again in the second file system, by their paths and with their flags: who
holds one does not notice. From then on the methods of this file system, and of the files that live on, *are* the
second's: they stand in the instance's own dictionary, before those of the class. What is opened then is the second's.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hvfuse.filesystem import Filesystem, Node, OpenDirectory, OpenFile, TimeSpec
from hvfuse.turns import Turns

_PASSED_ON = (
    "statfs readlink mknod mkdir symlink link unlink rmdir rename truncate getxattr setxattr listxattr removexattr"
).split()
_OPENING = "open open_directory create".split()
_OF_FILES = "read_into write fsync truncate fallocate lseek stat release".split()
_OF_DIRECTORIES = "entries fsync release".split()
_ONLY_AT_FIRST = os.O_TRUNC | os.O_CREAT | os.O_EXCL
"""Flags that must not be repeated when a file is opened again."""

_log = logging.getLogger(__name__)


class SwitchedFile:
    """An open file of whichever file system is current."""

    def __init__(self, owner: Switching, file: OpenFile, path: str, flags: int) -> None:
        self.file = file
        self.path = path
        self.flags = flags & ~_ONLY_AT_FIRST
        self._turns = owner.turns
        self._let_go: Callable[[SwitchedFile], None] = owner.files.discard

    def read_into(self, buffer: memoryview, offset: int) -> int:
        with self._turns.behind():
            return self.file.read_into(buffer, offset)

    def write(self, data: memoryview, offset: int) -> int:
        with self._turns.behind():
            return self.file.write(data, offset)

    def fsync(self, datasync: bool) -> None:
        with self._turns.behind():
            self.file.fsync(datasync)

    def truncate(self, size: int) -> None:
        with self._turns.behind():
            self.file.truncate(size)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        with self._turns.behind():
            self.file.fallocate(mode, offset, length)

    def lseek(self, offset: int, whence: int) -> int:
        with self._turns.behind():
            return self.file.lseek(offset, whence)

    def stat(self) -> os.stat_result:
        with self._turns.behind():
            return self.file.stat()

    def release(self) -> None:
        with self._turns.behind():
            self._let_go(self)
            self.file.release()

    def become(self, file: OpenFile) -> None:
        """Be `file` from now on. Caller is within `standstill`."""
        self.file = file
        vars(self).update({name: getattr(file, name) for name in _OF_FILES})


class SwitchedDirectory:
    """An open directory of whichever file system is current."""

    def __init__(self, owner: Switching, directory: OpenDirectory, path: str) -> None:
        self.directory = directory
        self.path = path
        self._turns = owner.turns
        self._let_go: Callable[[SwitchedDirectory], None] = owner.directories.discard

    def entries(self) -> Iterable[tuple[str, int, int]]:
        with self._turns.behind():
            return list(self.directory.entries())

    def fsync(self, datasync: bool) -> None:
        with self._turns.behind():
            self.directory.fsync(datasync)

    def release(self) -> None:
        with self._turns.behind():
            self._let_go(self)
            self.directory.release()

    def become(self, directory: OpenDirectory) -> None:
        """Be `directory` from now on. Caller is within `standstill`."""
        self.directory = directory
        vars(self).update({name: getattr(directory, name) for name in _OF_DIRECTORIES})


class _Lost:
    """What stands in for a file or directory that could not be opened again."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._fail

    def _fail(self, *_arguments: object) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def release(self) -> None:
        pass


class Switching(Filesystem):
    """Is `first` until `switch`. Requests come from one thread. Names by which files are open must not come to lead to
    others before the switch."""

    def __init__(self, first: Filesystem) -> None:
        self.turns = Turns()
        self.files: set[SwitchedFile] = set()
        self.directories: set[SwitchedDirectory] = set()
        self._current = first
        self._is_switched = False
        vars(self).update({name: self._waiting(name) for name in _PASSED_ON})

    def _waiting(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.turns.behind():
                return getattr(self._current, name)(*arguments, **options)

        return call

    @contextmanager
    def standstill(self) -> Iterator[None]:
        """No request runs within. For another thread than the one of the requests."""
        with self.turns:
            yield

    def switch(self, second: Filesystem) -> None:
        """Be `second` from now on. Caller is within `standstill`. A file that cannot be opened again gives EIO."""
        for file in self.files:
            file_before = file.file
            file.become(_again(file.path, second.open, file.flags))
            with suppress(OSError):
                file_before.release()
        for directory in self.directories:
            directory_before = directory.directory
            directory.become(_again(directory.path, second.open_directory))
            with suppress(OSError):
                directory_before.release()
        self.files.clear()
        self.directories.clear()
        self._current, self._is_switched = second, True
        vars(self).update({name: getattr(second, name) for name in (*_PASSED_ON, *_OPENING)})

    # Opening: only what is opened before the switch has to be found again.

    def open(self, path: str, flags: int) -> OpenFile:
        with self.turns.behind():
            return self._held(self._current.open(path, flags), path, flags)

    def create(self, path: str, flags: int, mode: int, *, uid: int, gid: int) -> OpenFile:
        with self.turns.behind():
            return self._held(self._current.create(path, flags, mode, uid=uid, gid=gid), path, flags)

    def _held(self, file: OpenFile, path: str, flags: int) -> OpenFile:
        if self._is_switched:
            return file
        held = SwitchedFile(self, file, path, flags)
        self.files.add(held)
        return held

    def open_directory(self, path: str) -> OpenDirectory:
        with self.turns.behind():
            directory = self._current.open_directory(path)
            if self._is_switched:
                return directory
            held = SwitchedDirectory(self, directory, path)
            self.directories.add(held)
            return held

    # What may be asked of an open file: the one underneath is meant.

    def _of(self, name: str, node: Node, *arguments: Any) -> Any:
        if self._is_switched:
            return getattr(self._current, name)(node.file if isinstance(node, SwitchedFile) else node, *arguments)
        with self.turns.behind():
            return getattr(self._current, name)(node.file if isinstance(node, SwitchedFile) else node, *arguments)

    def stat(self, node: Node) -> os.stat_result:
        found: os.stat_result = self._of("stat", node)
        return found

    def chmod(self, node: Node, mode: int) -> None:
        self._of("chmod", node, mode)

    def chown(self, node: Node, uid: int, gid: int) -> None:
        self._of("chown", node, uid, gid)

    def utimens(self, node: Node, accessed: TimeSpec, modified: TimeSpec) -> None:
        self._of("utimens", node, accessed, modified)


def _again(path: str, reopen: Callable[..., Any], *arguments: object) -> Any:
    try:
        return reopen(path, *arguments)
    except OSError as error:
        _log.error("%s: cannot be opened again: %s", path, error.strerror)
        return _Lost()
