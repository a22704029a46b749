"""The LMDB environment of a store: opened once in a process, grown when it is full, faults translated.

LMDB lets a process open an environment only once, and set the size of its map only while the process
has no transaction open. Both are seen to here: `open_environment` hands out one shared environment
per directory, and every transaction passes a gate that a resize closes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn, TypeAlias, TypeVar

import lmdb

from hvfuse import system
from hvfuse.errors import (
    BusyError,
    CorruptError,
    HvfuseError,
    NoSpaceError,
    NotFoundError,
    UnreachableError,
    UnsupportedError,
)
from hvfuse.frames import MAX_PLAIN
from hvfuse.target import schema
from hvfuse.words import room_hint

DEFAULT_MAP_SIZE = 1 << 30
"""Bytes of address space to begin with; the file grows only as it is used."""
MAX_READERS = 1024

Txn: TypeAlias = "lmdb.Transaction[bytes]"
_Result = TypeVar("_Result")

_REFUSED_FILESYSTEMS = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB",
    0xFF534D42: "CIFS",
    0x65735546: "FUSE",
}
"""By f_type of statfs(2): no coherent shared maps or no reliable locks."""


class Environment:
    """A store's LMDB, with its databases open. Made by `open_environment` alone.

    Transactions of one thread must not nest: a map that has to grow waits for all of them.
    """

    def __init__(self, path: str, *, create: bool, map_size: int, read_only: bool = False) -> None:
        self.path = path
        self._file = os.path.join(path, "data.mdb")
        self._map_size = map_size
        self._read_only = read_only
        self._identity: tuple[int, int] | None = None  # of the file that was opened
        self.users = 0
        # Guards _active and _resizing: no transaction begins while the map is resized, and a resize
        # waits for the running ones. Held while the map is resized, and by whoever peeks.
        self._gate_lock = threading.RLock()
        self._gate = threading.Condition(self._gate_lock)
        self._active = 0
        self._resizing = False
        self._lmdb = self._open(create=create)
        try:
            with self._faults():
                self._lmdb.reader_check()
            self._db = self._open_databases(create=create)
        except BaseException:
            self._lmdb.close()
            raise

    def _open(self, *, create: bool) -> lmdb.Environment:
        with self._faults():
            opened = lmdb.open(
                self.path, map_size=self._map_size, max_dbs=len(schema.DATABASES), max_readers=MAX_READERS,
                mode=0o600, create=create, readonly=self._read_only,
            )  # fmt: skip
        self._identity = self._found()
        return opened

    def allow_writing(self) -> None:
        """Make an environment that was opened for reading good for both. Waits for running transactions, and
        for another process's write transaction."""
        if self._read_only:
            self._resize(self._reopen)

    def _reopen(self) -> None:
        self._lmdb.close()
        self._read_only = False
        self._lmdb = self._open(create=False)
        self._db = self._handles()

    def _open_databases(self, *, create: bool) -> dict[bytes, lmdb._Database]:
        """All databases by name, made if the environment is new. Raises UnsupportedError, CorruptError."""
        version = self._format()
        if version == 0:
            if not create:
                raise CorruptError(f"{self.path}: not a store")
            self.write("store:create", self._create)
            version = self._format()
        if version != schema.FORMAT:
            raise UnsupportedError(
                f"{self.path}: a store of format {version}; this hvfuse knows format {schema.FORMAT}",
                hint="use the hvfuse that wrote it, or a newer one",
            )
        return self._handles()

    def _handles(self) -> dict[bytes, lmdb._Database]:
        """Handles of all databases; nobody else uses the environment meanwhile. LMDB opens them in a write
        transaction of its own, in a read one only where the environment is for reading: a process that
        stands still while writing keeps no reader waiting."""
        while True:
            try:
                with self._faults():
                    return {name: db for name in schema.DATABASES if (db := self._handle(name)) is not None}
            except lmdb.MapResizedError:
                self._adopt()

    def _handle(self, name: bytes) -> lmdb._Database | None:
        """None: a store of before, which lacks that database."""
        try:
            return self._lmdb.open_db(name, create=False)
        except lmdb.NotFoundError:
            if name not in schema.LATER:
                raise
            return None

    def _format(self) -> int:
        """The store's format; 0 if nothing was ever written. Writes nothing."""
        try:
            with self.read() as txn:
                meta = self._lmdb.open_db(schema.META, txn=txn, create=False)
                return schema.number_of(txn.get(schema.KEY_FORMAT, db=meta))
        except NotFoundError:
            return 0

    def _create(self, txn: Txn) -> None:
        for name in schema.DATABASES:
            self._lmdb.open_db(name, txn=txn)
        meta = self._lmdb.open_db(schema.META, txn=txn)
        txn.put(schema.KEY_FORMAT, schema.u32(schema.FORMAT), db=meta, overwrite=False)

    def db(self, name: bytes) -> lmdb._Database:
        """The database called `name` in the schema."""
        return self._db[name]

    def has(self, name: bytes) -> bool:
        """Whether the store has a database that those of before lack, as far as `ensure` looked."""
        return name in self._db

    def ensure(self, name: bytes) -> None:
        """Have a database that stores of before lack, made where the environment is for writing; where it is for
        reading, look whether another process made it. Not within a transaction."""
        if name in self._db:
            return
        if self._read_only:
            self._resize(self._look_for_later)
        else:
            self.write("store:database", lambda txn: self._lmdb.open_db(name, txn=txn) and None)
            self._resize(self._look_for_later)

    def _look_for_later(self) -> None:
        self._db = self._handles()

    def read(self) -> Snapshot:
        """A snapshot, to be used in a `with`."""
        return Snapshot(self)

    def peek(self, name: bytes, key: bytes) -> bytes | None:
        """What a database has of a key just now: `read` for those who ask at each of their own reads. Whether the file
        still lies at its path is not asked."""
        try:
            with self._gate_lock:
                txn = self._lmdb.begin()
                try:
                    return txn.get(key, db=self._db[name])
                finally:
                    txn.abort()
        except lmdb.Error:
            with self.read() as txn:
                return txn.get(key, db=self._db[name])

    def _begin_read(self) -> Txn:
        while True:
            try:
                return self._lmdb.begin()
            except lmdb.MapResizedError:
                self._leave()
                try:
                    self._resize(self._adopt)
                finally:
                    self._enter()

    def write(self, label: str, act: Callable[[Txn], _Result]) -> _Result:
        """Run `act` in a write transaction and commit it: durable when this returns, or nothing happened.

        `act` runs again from the start, in a new transaction, when the map had to grow; it must have no
        effects but through the transaction. Raises NoSpaceError when the disk is full, and what `act`
        raises, which aborts.
        """
        assert not self._read_only, f"{self.path} was opened for reading"
        while True:
            size = self.map_size()
            try:
                with self._faults(), self._inside():
                    return self._write_once(label, act)
            except lmdb.MapFullError:
                self._resize(partial(self._grow, size))
            except lmdb.MapResizedError:
                self._resize(self._adopt)

    def _write_once(self, label: str, act: Callable[[Txn], _Result]) -> _Result:
        txn = self._lmdb.begin(write=True)
        try:
            result = act(txn)
            system.passing(f"{label}:before")
        except BaseException:
            txn.abort()
            raise
        txn.commit()
        system.passing(f"{label}:after")
        return result

    def map_size(self) -> int:
        """Bytes of address space in use for the map: what the file may grow to without a resize."""
        return int(self._lmdb.info()["map_size"])

    def reader_check(self) -> int:
        """Free the reader slots of dead processes, which keep old pages from being used again."""
        with self._faults():
            return int(self._lmdb.reader_check())

    def close(self) -> None:
        """Let the environment go; only `close_environment` calls it."""
        self._lmdb.close()

    def _grow(self, size: int) -> None:
        """Double the map, unless somebody did since it was `size` bytes."""
        if self.map_size() <= size:
            self._lmdb.set_mapsize(2 * size)

    def _adopt(self) -> None:
        """Take over the size to which another process has grown the map."""
        self._lmdb.set_mapsize(0)

    def _resize(self, act: Callable[[], None]) -> None:
        with self._gate:
            self._gate.wait_for(lambda: not self._resizing)
            self._resizing = True
            try:
                self._gate.wait_for(lambda: not self._active)
                act()
            finally:
                self._resizing = False
                self._gate.notify_all()

    def _found(self) -> tuple[int, int] | None:
        """Which file lies where the environment's is to lie; None for none."""
        try:
            found = os.stat(self._file)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Within a transaction."""
        self._demand_there()
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _demand_there(self) -> None:
        """Raises UnreachableError where the file is not what lies at its path any more: what is committed to it then,
        nobody would find again."""
        if self._found() != self._identity:
            raise UnreachableError(
                f"{self.path}: the store is not there any more: it was moved, deleted, unmounted or replaced",
                hint="put it back; or, to go on with what lies there now, end `hvfuse run` and start it again",
            )

    def _enter(self) -> None:
        with self._gate_lock:
            if self._resizing:
                self._gate.wait_for(lambda: not self._resizing)
            self._active += 1

    def _leave(self) -> None:
        with self._gate_lock:
            self._active -= 1
            if self._resizing:
                self._gate.notify_all()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """LMDB's errors as hvfuse's, naming the environment."""
        try:
            yield
        except lmdb.Error as error:
            self._fail(error)

    def _fail(self, error: lmdb.Error) -> NoReturn:
        if isinstance(error, lmdb.MapFullError | lmdb.MapResizedError):
            raise error
        if error.code in (errno.ENOSPC, errno.EDQUOT) or (error.code == errno.EIO and self._is_full()):
            raise NoSpaceError(f"{self.path}: no space left", hint=room_hint(self.path)) from error
        raise _FAULTS.get(type(error), HvfuseError)(f"{self.path}: {error}") from error

    def _is_full(self) -> bool:
        """Whether a transaction may have met the disk's end: LMDB tells a write cut short as EIO."""
        room = os.statvfs(self.path)
        return room.f_bavail * room.f_frsize < _TIGHT


class Snapshot:
    """A read transaction of an environment, as a context. A generator would take longer than many a look-up."""

    __slots__ = ("_env", "_txn")

    def __init__(self, env: Environment) -> None:
        self._env = env

    def __enter__(self) -> Txn:
        env = self._env
        env._demand_there()
        env._enter()
        try:
            self._txn = env._begin_read()
        except BaseException as error:
            env._leave()
            if isinstance(error, lmdb.Error):
                env._fail(error)
            raise
        return self._txn

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._txn.abort()
        finally:
            self._env._leave()
        if isinstance(error, lmdb.Error):
            self._env._fail(error)


_TIGHT = 2 * MAX_PLAIN
"""Bytes free with which the largest transaction, that of one frame, may not have fitted."""

_FAULTS: dict[type[lmdb.Error], type[HvfuseError]] = {
    lmdb.NotFoundError: NotFoundError,
    lmdb.CorruptedError: CorruptError,
    lmdb.PageNotFoundError: CorruptError,
    lmdb.InvalidError: CorruptError,
    lmdb.IncompatibleError: CorruptError,
    lmdb.VersionMismatchError: UnsupportedError,
    lmdb.ReadersFullError: BusyError,
}

_open: dict[tuple[int, str], Environment] = {}
_open_lock = threading.Lock()  # guards _open and the users of its environments


def open_environment(
    path: str, *, create: bool, map_size: int = DEFAULT_MAP_SIZE, read_only: bool = False
) -> Environment:
    """The environment in directory `path`, shared within this process; give it back when done.

    `read_only`: no write transaction will be wanted, nor is one of another process waited for. (Where others
    in this process write, the environment is good for that all the same.)

    Raises NotFoundError (when not to be created), UnsupportedError (newer format, network file
    system), CorruptError.
    """
    key = (os.getpid(), os.path.realpath(path))
    with _open_lock:
        environment = _open.get(key)
        if environment is None:
            if create:
                os.makedirs(key[1], mode=0o700, exist_ok=True)
            elif not os.path.exists(os.path.join(key[1], "data.mdb")):
                raise NotFoundError(f"{path}: there is no store", hint="[paths] in hvfuse.toml says where it lies")
            refuse_unfit_filesystem(key[1])
            environment = _open[key] = Environment(key[1], create=create, map_size=map_size, read_only=read_only)
        elif not read_only:
            environment.allow_writing()
        environment.users += 1
        return environment


def close_environment(environment: Environment) -> None:
    """Give back what `open_environment` gave."""
    with _open_lock:
        environment.users -= 1
        if environment.users == 0:
            environment.close()
            del _open[os.getpid(), environment.path]


def refuse_unfit_filesystem(path: str) -> None:
    """Raises UnsupportedError on a file system where LMDB's map or locks cannot be relied on. What is missing of
    `path` yet would lie on that of what is there."""
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    name = _REFUSED_FILESYSTEMS.get(filesystem_type(path))
    if name is not None:
        raise UnsupportedError(
            f"{path}: lies on {name}, where a store is not safe", hint="put the store on a local disk"
        )


def filesystem_type(path: str) -> int:
    """f_type of statfs(2), which Python's statvfs does not tell. Raises OSError."""
    buffer = ctypes.create_string_buffer(512)  # struct statfs is 120 bytes; f_type is its first word
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], "little") & 0xFFFFFFFF


@contextmanager
def file_faults(path: str) -> Iterator[None]:
    """OSErrors of work on the file at `path` as hvfuse's: a full disk is NoSpaceError."""
    try:
        yield
    except OSError as error:
        name = error.filename or path
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind, hint = (NoSpaceError, room_hint(name)) if is_full else (HvfuseError, None)
        raise kind(f"{name}: {error.strerror or error}", hint=hint) from error
