"""A medium (`hvfuse.seed`) as files: written at the source, resumed, read at the target."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np

from hvfuse import seed, system
from hvfuse.errors import (
    BusyError,
    CorruptError,
    HvfuseError,
    NoSpaceError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from hvfuse.extent import Buffer
from hvfuse.frames import HEADER_SIZE, MAX_PLAIN, unpack_header
from hvfuse.manifest import CycleManifest
from hvfuse.seed import DamagedSeedError, FileFacts, Pieces, SeedManifest, Table, stored_length

_BESIDE = ("lost+found", "System Volume Information", "$RECYCLE.BIN", f"{seed.MANIFEST}.tmp")
"""What may be in the root of an empty medium, besides names that begin with a dot."""
_MAX_FRAME = HEADER_SIZE + MAX_PLAIN
_AGAIN = "copy this file from the original medium again, or export again into an empty directory"
_ELSEWHERE = "name a directory that is empty or new"


@contextlib.contextmanager
def _faults(path: str) -> Iterator[None]:
    """OSErrors as ours, naming the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "make room, or copy what is there to a larger medium; the same command goes on from there"
            raise NoSpaceError(f"{path}: the medium is full", hint=hint) from error
        raise HvfuseError(f"{path}: {error.strerror}") from error


def read_manifest(directory: str) -> SeedManifest | None:
    """The manifest of the medium in `directory`; None if there is no medium, nor remains of one.

    Raises CorruptError, UnsupportedError, HvfuseError (what the system says).
    """
    path = os.path.join(directory, seed.MANIFEST)
    with _faults(path):
        try:
            fd = _open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            if not _data_files(directory):
                return None
            text = f"{path}: missing, although there are data files of an export"
            raise CorruptError(text, hint="copy the whole directory again") from None
        try:
            raw = system.pread(fd, seed.MAX_MANIFEST, 0)
        finally:
            os.close(fd)
    return SeedManifest.unpack(raw, path)


def _open(path: str, flags: int) -> int:
    """Raises OSError, CorruptError."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptError(f"{path}: not a plain file")
    return fd


def _data_files(directory: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if seed.is_data_file(name))
    except (FileNotFoundError, NotADirectoryError):
        return []


class _DataFile:
    """One data file. Raises OSError, and CorruptError where it is not there or not what was written."""

    def __init__(self, directory: str, number: int, generation: bytes, flags: int) -> None:
        self.path = os.path.join(directory, seed.file_name(number))
        self.pieces = Pieces(self.path, number=number, generation=generation)
        try:
            self.fd = _open(self.path, flags)
        except FileNotFoundError:
            raise CorruptError(f"{self.path}: missing", hint=_AGAIN) from None

    def close(self) -> None:
        os.close(self.fd)

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def write(self, label: str, unit: Buffer, offset: int) -> int:
        """Write a unit. Returns where it ends."""
        system.pwrite(label, self.fd, self.pieces.seal(unit, offset), offset)
        return offset + stored_length(len(unit))

    def read(self, length: int, offset: int, *, chained: bool = True) -> bytes:
        """A verified unit of `length` bytes."""
        raw = system.pread(self.fd, stored_length(length), offset)
        return self.pieces.open(raw, length, offset, chained=chained)

    def read_head(self) -> int:
        """Returns where the first frame is."""
        self.pieces.check_head(self.read(seed.HEAD_SIZE, 0))
        return stored_length(seed.HEAD_SIZE)

    def write_end(self, table: Table, offset: int) -> FileFacts:
        """Write table and tail."""
        end = self.write("seed:table", table.tobytes(), offset)
        digest = self.pieces.chain.digest()
        size = self.write("seed:tail", self.pieces.tail(len(table), offset), end)
        return FileFacts(size=size, frames=len(table), digest=digest)

    def read_end(self) -> tuple[Table, FileFacts]:
        """What `write_end` wrote. Takes nothing into the chain."""
        size = self.size
        at = max(0, size - stored_length(seed.TAIL_SIZE))
        count, offset, digest = self.pieces.unpack_tail(self.read(seed.TAIL_SIZE, at, chained=False), at)
        unit = self.read(count * seed.ENTRY_DTYPE.itemsize, offset, chained=False)
        return self.pieces.unpack_table(unit, offset), FileFacts(size=size, frames=count, digest=digest)


class SeedWriter:
    """An export under way in `directory`, which is made if missing: begun, or taken up again.

    `cycle`: the COPY, as at its begin. `held`: the numbers of the frames that are there. For one thread, and
    one process at a time. Close it, or use it in a `with`. Raises UsageError (the directory holds something
    else), BusyError, CorruptError, NoSpaceError, HvfuseError; after that, only a new writer goes on.
    """

    def __init__(self, directory: str, cycle: CycleManifest, *, file_limit: int = seed.FILE_LIMIT) -> None:
        self._directory = directory
        self._limit = file_limit
        self._manifest = SeedManifest(cycle=cycle)
        self._file: _DataFile | None = None
        self._entries: list[tuple[int, int, int]] = []
        self._end = 0
        self._numbers: set[int] = set()
        with _faults(directory):
            os.makedirs(directory, exist_ok=True)
            self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with _faults(directory):
                self._begin()
        except BaseException:
            self.close()
            raise
        self.held = frozenset(self._numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let files go. What is there is taken up again by the next writer."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _begin(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{self._directory}: another process exports into it") from None
        except OSError:
            pass  # a network file system without locks of directories
        found = read_manifest(self._directory)
        if found is None:
            demand_empty(self._directory)
            self._put_manifest()
            return
        own = self._manifest.cycle
        disks = [(disk.disk_id, disk.name) for disk in own.disks]
        demand_same(found, self._directory, vm=own.vm, generation=own.generation, disks=disks)
        if found.complete:
            self._manifest = found
        count = len(found.files) if found.complete else len(_data_files(self._directory))
        for number in range(count):
            self._take_up(number, is_last=not found.complete and number == count - 1)

    def _take_up(self, number: int, *, is_last: bool) -> None:
        """Count the frames of a data file. Raises CorruptError, unless it is the last: that one is cut instead."""
        flags = os.O_RDWR if is_last else os.O_RDONLY
        self._file = file = _DataFile(self._directory, number, self._manifest.cycle.generation, flags)
        try:
            self._finished(*file.read_end())
        except DamagedSeedError:
            if not is_last:
                raise
            self._scan(file)

    def _finished(self, table: Table, facts: FileFacts) -> None:
        """A data file is finished: count it, and let it go."""
        assert self._file is not None
        self._numbers.update(table["number"].tolist())
        if not self._manifest.complete:
            self._manifest = replace(
                self._manifest,
                files=(*self._manifest.files, facts),
                frames=self._manifest.frames + len(table),
                frame_bytes=self._manifest.frame_bytes + int(table["length"].sum()),
            )
        self._file.close()
        self._file, self._entries, self._end = None, [], 0

    def _scan(self, file: _DataFile) -> None:
        """Find the whole frames of a file without a tail, and cut off what follows them."""
        self._sync("seed:scan-sync", file)  # so that nothing counts that an earlier process could not make durable
        with contextlib.suppress(CorruptError, UnsupportedError):
            self._end = file.read_head()
            while True:
                header = unpack_header(system.pread(file.fd, HEADER_SIZE, self._end))
                length = HEADER_SIZE + header.stored_length
                if length > _MAX_FRAME:
                    break
                file.read(length, self._end)
                self._note(header.number, length)
        system.truncate("seed:cut", file.fd, self._end)
        if self._end == 0:
            self._end = file.write("seed:head", file.pieces.head(), 0)

    def _note(self, number: int, length: int) -> None:
        self._entries.append((self._end, number, length))
        self._numbers.add(number)
        self._end += stored_length(length)

    def append(self, number: int, frame: bytes) -> None:
        """Put one encoded frame, of a number that is not there."""
        if self._manifest.complete or number in self._numbers:
            raise UsageError(f"{self._directory}: holds frame {number} already, or is complete")
        with _faults(self._path()):
            table_length = stored_length((len(self._entries) + 1) * seed.ENTRY_DTYPE.itemsize)
            length = stored_length(len(frame)) + table_length + stored_length(seed.TAIL_SIZE)
            if self._file is not None and self._entries and self._end + length > self._limit:
                self._finish_file(self._file)
            if self._file is None:
                self._file = self._next_file()
                self._end = self._file.write("seed:head", self._file.pieces.head(), 0)
            self._file.write("seed:append", frame, self._end)
        self._note(number, len(frame))

    def _path(self) -> str:
        return self._directory if self._file is None else self._file.path

    def _next_file(self) -> _DataFile:
        number, flags = len(self._manifest.files), os.O_RDWR | os.O_CREAT | os.O_TRUNC
        return _DataFile(self._directory, number, self._manifest.cycle.generation, flags)

    def _finish_file(self, file: _DataFile) -> None:
        """Make the frames durable, then the table that tells of them. Raises OSError."""
        table: Table = np.array(self._entries, seed.ENTRY_DTYPE)
        self._sync("seed:data-sync", file)
        facts = file.write_end(table, self._end)
        self._sync("seed:table-sync", file)
        system.fsync("seed:directory-sync", self._lock)
        self._finished(table, facts)

    @staticmethod
    def _sync(label: str, file: _DataFile) -> None:
        """A failure is final: what the cache shows of the file need not be on the medium, so it goes."""
        try:
            system.fsync(label, file.fd)
        except OSError:
            with contextlib.suppress(OSError):
                system.unlink("seed:drop", file.path)
            raise

    def complete(self, cycle: CycleManifest) -> SeedManifest:
        """All frames are there: say so, durably. `cycle`: as at the begin, perhaps with other sizes. Idempotent."""
        if not self._manifest.complete:
            with _faults(self._path()):
                if self._file is not None and self._entries:
                    self._finish_file(self._file)
                self._manifest = replace(self._manifest, cycle=cycle, complete=True)
                self._put_manifest()
        return self._manifest

    def _put_manifest(self) -> None:
        """Raises OSError."""
        path = os.path.join(self._directory, seed.MANIFEST)
        system.replace_file("seed:manifest", path, self._manifest.pack(), mode=0o644)

    def discard(self) -> None:
        """Remove what an export that is not complete has written. The manifest goes last."""
        with _faults(self._directory):
            for name in [*_data_files(self._directory), seed.MANIFEST]:
                system.unlink("seed:discard", os.path.join(self._directory, name), missing_ok=True)
        self.close()


def demand_empty(directory: str) -> None:
    """Raises UsageError if there is anything in `directory`, which may be missing; HvfuseError."""
    with _faults(directory):
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return
    found = sorted(name for name in names if not name.startswith(".") and name not in _BESIDE)
    if found:
        raise UsageError(f"{directory}: not empty: {found[0]} is in it", hint=_ELSEWHERE)


def demand_same(
    found: SeedManifest, directory: str, *, vm: str, generation: bytes | None, disks: Iterable[tuple[bytes, str]]
) -> None:
    """Raises UsageError unless `found`, the manifest in `directory`, is of an export of just this copy.

    `generation`: None if no copy would do. `disks`: (id, name) of each.
    """
    if found.cycle.vm != vm:
        raise UsageError(f"{directory}: holds an export of VM {found.cycle.vm}", hint=_ELSEWHERE)
    same = {(disk.disk_id, disk.name) for disk in found.cycle.disks} == set(disks)
    if found.cycle.generation != generation or not same:
        raise UsageError(f"{directory}: holds an older export of {vm}, which is of no use any more", hint=_ELSEWHERE)


class SeedReader:
    """A complete medium in `directory`. Nothing of its data files is believed before it was verified.

    `manifest`: verified. Raises NotFoundError (no medium), UsageError (not complete), CorruptError,
    UnsupportedError, HvfuseError.
    """

    def __init__(self, directory: str) -> None:
        found = read_manifest(directory)
        if found is None:
            raise NotFoundError(f"{directory}: there is no export in it", hint="hvfuse seed export VM DIR")
        if not found.complete:
            raise UsageError(
                f"{directory}: the export was not finished",
                hint=f"at the source, this goes on with it: hvfuse seed export {found.cycle.vm} DIR",
            )
        self._directory = directory
        self.manifest = found

    def verify(self, progress: Callable[[int], None] = lambda passed: None) -> frozenset[int]:
        """Read everything once. Returns the frames' numbers. `progress` is told the bytes passed since its
        last call. Raises CorruptError naming file and offset, UnsupportedError."""
        for number in range(len(self.manifest.files)):
            self._open(number).close()  # what is missing or short is told before hours of reading
        numbers: set[int] = set()
        for number, frame in self.frames():
            if number in numbers:
                raise CorruptError(f"{self._directory}: frame {number} is there twice")
            numbers.add(number)
            progress(len(frame))
        if len(numbers) != self.manifest.frames:
            raise CorruptError(f"{self._directory}: {len(numbers)} of {self.manifest.frames} frames are there")
        return frozenset(numbers)

    def frames(self, *, but: Collection[int] = ()) -> Iterator[tuple[int, bytes]]:
        """(number, encoded frame) of all frames but those, each verified, in the medium's order."""
        for number, told in enumerate(self.manifest.files):
            file = self._open(number)
            try:
                with _faults(file.path):
                    yield from self._frames_of(file, told, but)
            finally:
                file.close()

    def _open(self, number: int) -> _DataFile:
        told = self.manifest.files[number].size
        with _faults(os.path.join(self._directory, seed.file_name(number))):
            file = _DataFile(self._directory, number, self.manifest.cycle.generation, os.O_RDONLY)
            size = file.size
            if size != told:
                file.close()
                raise CorruptError(f"{file.path}: {size} bytes long; {told} were written", hint=_AGAIN)
        return file

    def _frames_of(self, file: _DataFile, told: FileFacts, but: Collection[int]) -> Iterator[tuple[int, bytes]]:
        table, facts = file.read_end()
        other = CorruptError(f"{file.path}: not the file that was written, but another of this export", hint=_AGAIN)
        if facts != told:
            raise other
        file.read_head()
        for offset, number, length in table.tolist():
            if number not in but:
                frame = file.read(length, offset)
                self._check_frame(frame, number, file.path, offset)
                yield number, frame
        if not but:
            file.read(len(table) * seed.ENTRY_DTYPE.itemsize, int(seed.ends(table)[-1]))
            if file.pieces.chain.digest() != told.digest:
                raise other

    def _check_frame(self, frame: bytes, number: int, path: str, offset: int) -> None:
        header = unpack_header(frame)
        identity = (header.generation, header.cycle, header.number, HEADER_SIZE + header.stored_length)
        if identity != (self.manifest.cycle.generation, 0, number, len(frame)):
            raise DamagedSeedError(path, offset, "the frame is not the one that the table tells of")
