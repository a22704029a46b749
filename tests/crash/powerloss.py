"""A host's power cut, simulated: what was written below one folder, what was synced, and what could be left.

`PowerLoss` stands in for the functions of `hvfuse.system` and remembers, file by file, the contents that
are durable and every change since. `cut` then builds a folder such as a crash of the host could leave:

- A sector (512 bytes) is whole, and holds what was last synced or what it held at any time since; each
  sector for itself, so writes are torn, and reordered within a file and between files.
- A file has the length that was last synced, or any since. fsync, fdatasync and msync of the file (of
  the range) make it durable; mtime is durable after fsync alone.
- A name that was made, changed or removed since the last sync of the directory may stand as before. A
  sync of a file does not make its name durable.
- Stores into a shared map are not calls. A mapped file is looked at now and then, and at the cut.

How much of all that survives is drawn at each cut: nothing, all, everything up to one instant, or each
sector by itself. The same seed and the same calls give the same folder.
"""

from __future__ import annotations

import functools
import mmap
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvfuse import system
from hvfuse.extent import Buffer, round_up
from tests.crash.recorded import SECTOR, Change, Fate, File, Verdict, fill

_LOOK_AT_MAPS = 8
"""Calls between two looks at the mapped files, on average."""


class BypassError(AssertionError):
    """Something changed below the folder that did not go through `hvfuse.system`."""


@dataclass(frozen=True, slots=True)
class _Renaming:
    """At `time`, `file` got the name `new` (None: none any more) instead of `old` (None: it was new)."""

    time: int
    file: File
    old: str | None
    new: str | None


class _SeenMap(mmap.mmap):
    """A map that remembers of which file it is."""

    inode: tuple[int, int]

    def __new__(cls, fd: int, *rest: Any, **options: Any) -> _SeenMap:
        self = super().__new__(cls, fd, *rest, **options)
        if fd >= 0:
            info = os.fstat(fd)
            self.inode = (info.st_dev, info.st_ino)
            for recorder in _recording:
                recorder.mapped(fd)
        return self


_recording: list[PowerLoss] = []


class PowerLoss:
    """Records what happens in `folder` while it is entered; one at a time, one thread.

    What lies there when it is entered counts as durable. Syncs whose label is in `ignored` make nothing
    durable: that plants a bug.
    """

    ignored: frozenset[str] = frozenset()

    def __init__(self, folder: str, *, seed: int) -> None:
        self.folder = os.path.realpath(folder)
        self._dice = random.Random(seed)
        self._time = 0
        self._files: dict[tuple[int, int], File] = {}
        self._names: dict[str, File] = {}
        self._durable_names: dict[str, File] = {}
        self._renamings: list[_Renaming] = []
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> PowerLoss:
        assert not _recording, "one recorder at a time"
        self._scan()
        for file in self._names.values():
            file.settle()
        self._durable_names, self._renamings = dict(self._names), []
        self._stand_in()
        _recording.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _recording.clear()
        for module, name, original in self._replaced:
            setattr(module, name, original)
        self._replaced.clear()
        for file in self._files.values():
            os.close(file.fd)
        self._files.clear()

    # Standing in for hvfuse.system ---------------------------------------------------------------

    def _stand_in(self) -> None:
        for name in "pwrite truncate allocate fallocate fsync fdatasync sync_map rename unlink fsync_directory".split():
            original = getattr(system, name)
            wrapped = functools.partial(getattr(self, f"_{name}"), original)
            self._replaced.append((system, name, original))
            setattr(system, name, functools.wraps(original)(wrapped))
        self._replaced.append((system, "at_once", system.at_once))
        system.at_once = lambda first, second: (system.refusal_of(first), system.refusal_of(second))
        self._replaced.append((mmap, "mmap", mmap.mmap))
        mmap.mmap = _SeenMap  # type: ignore[misc,assignment]

    def _pwrite(self, original: Callable[..., None], label: str, fd: int, data: Buffer, offset: int) -> None:
        file = self._file(fd)
        try:
            original(label, fd, data, offset)
        except OSError:
            self._look_at(file)
            raise
        if file is not None:
            self._note(file, offset, len(data), bytes(data), max(len(file.now), offset + len(data)))

    def _truncate(self, original: Callable[..., None], label: str, fd: int, size: int) -> None:
        file = self._file(fd)
        original(label, fd, size)
        if file is not None:
            self._note(file, min(size, len(file.now)), max(len(file.now) - size, 0), None, size)

    def _allocate(self, original: Callable[..., None], label: str, fd: int, offset: int, length: int) -> None:
        file = self._file(fd)
        original(label, fd, offset, length)
        if file is not None and offset + length > len(file.now):
            self._note(file, len(file.now), 0, None, offset + length)

    def _fallocate(  # the arguments of fallocate(2)
        self, original: Callable[..., None], label: str, fd: int, mode: int, offset: int, length: int
    ) -> None:
        file = self._file(fd)
        original(label, fd, mode, offset, length)
        if file is None:
            return
        end, size = offset + length, len(file.now)
        if not mode & system.FALLOC_FL_KEEP_SIZE:
            size = max(size, end)
        if mode & (system.FALLOC_FL_PUNCH_HOLE | system.FALLOC_FL_ZERO_RANGE):
            self._note(file, offset, max(min(end, size) - offset, 0), None, size)
        elif size > len(file.now):
            self._note(file, len(file.now), 0, None, size)

    def _fsync(self, original: Callable[..., None], label: str, fd: int) -> None:
        original(label, fd)
        self._synced(label, fd, mtime=True)

    def _fdatasync(self, original: Callable[..., None], label: str, fd: int) -> None:
        original(label, fd)
        self._synced(label, fd, mtime=False)

    def _synced(self, label: str, fd: int, *, mtime: bool) -> None:
        if label in self.ignored:
            return
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            if os.readlink(f"/proc/self/fd/{fd}") == self.folder:
                self._names_synced()
            return
        file = self._file(fd)
        if file is None:
            return
        if file.is_mapped:
            self._look_at(file)
        file.settle()
        if mtime:
            file.durable_mtime_ns = os.fstat(fd).st_mtime_ns

    def _fsync_directory(self, original: Callable[..., None], label: str, path: str) -> None:
        original(label, path)  # which comes to `_fsync`

    def _sync_map(self, original: Callable[..., None], label: str, shared: mmap.mmap, start: int, end: int) -> None:
        original(label, shared, start, end)
        file = self._files.get(shared.inode) if isinstance(shared, _SeenMap) else None
        if file is not None and label not in self.ignored:
            self._look_at(file)
            file.settle_range(start, end)

    def _rename(self, original: Callable[..., None], label: str, old: str, new: str) -> None:
        ours = os.path.dirname(os.path.realpath(old)) == self.folder
        if ours:
            self._scan()
        original(label, old, new)
        if ours:
            self._name(self._names.pop(os.path.basename(old)), os.path.basename(old), os.path.basename(new))

    def _unlink(self, original: Callable[..., None], label: str, path: str, *, missing_ok: bool = False) -> None:
        ours = os.path.dirname(os.path.realpath(path)) == self.folder
        if ours:
            self._scan()
        original(label, path, missing_ok=missing_ok)
        file = self._names.pop(os.path.basename(path), None) if ours else None
        if file is not None:
            self._name(file, os.path.basename(path), None)

    def mapped(self, fd: int) -> None:
        """The file `fd` was mapped: from now on it changes without calls."""
        file = self._file(fd)
        if file is not None:
            file.is_mapped = True

    # Keeping the record --------------------------------------------------------------------------

    def _tick(self) -> int:
        self._time += 1
        if self._dice.randrange(_LOOK_AT_MAPS) == 0:
            for file in self._names.values():
                if file.is_mapped:
                    self._look_at(file)
        return self._time

    def _note(self, file: File, offset: int, length: int, data: bytes | None, size: int) -> None:
        file.note(Change(self._tick(), offset, length, data, size))

    def _name(self, file: File, old: str | None, new: str | None) -> None:
        if new is not None:
            self._names[new] = file
        self._renamings.append(_Renaming(self._tick(), file, old, new))

    def _file(self, fd: int) -> File | None:
        """The file that `fd` is open on; None if it does not lie in the folder, or not any more."""
        info = os.fstat(fd)
        inode = (info.st_dev, info.st_ino)
        if inode not in self._files and os.path.dirname(os.readlink(f"/proc/self/fd/{fd}")) == self.folder:
            self._scan()
        file = self._files.get(inode)
        if file is not None and info.st_size == 0 and file.now:
            self._look_at(file)  # opened with O_TRUNC
        return file

    def _scan(self) -> None:
        """Meet the files that were made since."""
        present = {entry.name: entry.inode() for entry in os.scandir(self.folder) if entry.is_file()}
        gone = self._names.keys() - present.keys()
        if gone:
            raise BypassError(f"{min(gone)} is gone, and nobody said so")
        for name in sorted(present.keys() - self._names.keys()):
            fd = os.open(os.path.join(self.folder, name), os.O_RDONLY | os.O_CLOEXEC)
            info = os.fstat(fd)
            file = File(fd, bytearray(), info.st_mtime_ns)
            self._files[info.st_dev, info.st_ino] = file
            self._look_at(file)
            self._name(file, None, name)

    def _look_at(self, file: File | None) -> None:
        """Note what is different from what we knew, sector by sector."""
        if file is None:
            return
        size = os.fstat(file.fd).st_size
        found = os.pread(file.fd, size, 0)
        if found == file.now:
            return
        time, known = self._time, file.now.ljust(size, b"\0")[:size]
        if size != len(file.now):
            shrunk = max(len(file.now) - size, 0)
            file.note(Change(time, min(size, len(file.now)), shrunk, None, size))
        sectors = [np.frombuffer(raw.ljust(round_up(size, SECTOR), b"\0"), np.uint8) for raw in (known, found)]
        differ = (sectors[0] != sectors[1]).reshape(-1, SECTOR).any(axis=1)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], differ, [False]])))
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            low, high = first * SECTOR, min(last * SECTOR, size)
            file.note(Change(time, low, high - low, found[low:high], size))

    def _names_synced(self) -> None:
        self._scan()
        self._durable_names = dict(self._names)
        self._renamings.clear()
        for inode, file in list(self._files.items()):
            if file not in self._names.values():
                os.close(self._files.pop(inode).fd)

    def check_complete(self) -> None:
        """See that nothing went past the seam. Raises BypassError."""
        self._scan()
        for name, file in self._names.items():
            found = os.pread(file.fd, os.fstat(file.fd).st_size, 0)
            if found != file.now and not file.is_mapped:
                raise BypassError(f"{name} is not what was written to it through hvfuse.system")

    # Cutting the power ---------------------------------------------------------------------------

    def cut(self, into: str) -> None:
        """Build in the new folder `into` what a crash of the host at this moment could leave.

        An image keeps its inode: files that still have a name are moved there. The folder that was
        recorded is no longer of use, nor is this recorder.
        """
        self.check_complete()
        for file in self._names.values():
            if file.is_mapped:
                self._look_at(file)
        dice = np.random.default_rng(self._dice.getrandbits(64))
        common = self._verdict(dice)
        is_common = self._dice.randrange(2) == 0
        names = self._surviving_names(common if is_common else self._verdict(dice))
        current = {file: name for name, file in self._names.items()}
        os.mkdir(into)
        for name, file in sorted(names.items()):
            content = file.left_by(common if is_common else self._verdict(dice))
            mtime = self._dice.choice([file.durable_mtime_ns, os.fstat(file.fd).st_mtime_ns])
            path = os.path.join(into, name)
            if file in current:
                os.rename(os.path.join(self.folder, current[file]), path)
            fill(path, content)
            os.utime(path, ns=(mtime, mtime))

    def _verdict(self, dice: np.random.Generator) -> Verdict:
        """Few of them: it is the combination of files that differ which finds something."""
        fate = self._dice.choice(list(Fate))
        return Verdict(fate, self._dice.randint(0, self._time), self._dice.choice([0.1, 0.5, 0.9]), dice)

    def _surviving_names(self, verdict: Verdict) -> dict[str, File]:
        """A change of names is possible only for a file that has the old name."""
        names = dict(self._durable_names)
        for renaming in self._renamings:
            possible = renaming.old is None or names.get(renaming.old) is renaming.file
            if possible and verdict.takes(renaming.time, 1)[0]:
                if renaming.old is not None:
                    del names[renaming.old]
                if renaming.new is not None:
                    names[renaming.new] = renaming.file
        return names
