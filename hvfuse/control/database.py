"""The LMDB environment of the control plane's records: JSON objects under keys that sort, faults as our own errors.

Several processes read and write it at once. One writer's transaction is whole or absent, and durable when it
returns. LMDB allows an environment to be opened once in a process: pass the one `Database` on.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import lmdb

from hvfuse.errors import CorruptError, HvfuseError, NoSpaceError, UnsupportedError
from hvfuse.words import room_hint

VERSION = 1
MAP_SIZE = 1 << 34
"""Bytes of address space, not of disk: more than is kept of a thousand VMs, which is some 3 GB."""
NUMBER_BYTES = 8
"""A number at the end of a key: big-endian, so that keys sort by it."""

_Result = TypeVar("_Result")


class Transaction:
    """What is read and written in one step; every value is a JSON object."""

    def __init__(self, txn: Any, path: str) -> None:
        self._txn = txn
        self._path = path

    def get(self, key: bytes) -> dict[str, Any] | None:
        """The object under `key`, if there is one. Raises CorruptError."""
        raw = self._txn.get(key)
        return None if raw is None else self._parsed(key, raw)

    def put(self, key: bytes, value: Mapping[str, Any]) -> None:
        """Set the object under `key`."""
        self._txn.put(key, json.dumps(value).encode())

    def delete(self, key: bytes) -> None:
        """Take a key away, if it is there."""
        self._txn.delete(key)

    def under(self, prefix: bytes, *, first: int = 0, backwards: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, object) of the keys that are `prefix` and a number from `first` on, by number."""
        for number, raw in self._numbered(prefix, first, backwards):
            yield number, self._parsed(prefix, raw)

    def numbers(self, prefix: bytes) -> list[int]:
        """The numbers behind `prefix`, ascending; far faster than the objects."""
        return [number for number, _ in self._numbered(prefix, 0, False)]

    def drop_below(self, prefix: bytes, number: int) -> None:
        """Delete what stands under smaller numbers behind `prefix`. Where there is none, it costs next to nothing."""
        found = itertools.takewhile(lambda one: one[0] < number, self._numbered(prefix, 0, False))
        for old in [one for one, _ in found]:
            self.delete(numbered(prefix, old))

    def last(self, prefix: bytes) -> int:
        """The greatest number behind `prefix`; 0 if there is none."""
        return next((number for number, _ in self._numbered(prefix, 0, True)), 0)

    def names(self, prefix: bytes) -> list[str]:
        """What follows `prefix` in the keys that begin with it, as text."""
        return [key[len(prefix) :].decode() for key, _ in self._all(prefix)]

    def _numbered(self, prefix: bytes, first: int, backwards: bool) -> Iterator[tuple[int, bytes]]:
        cursor = self._txn.cursor()
        length = len(prefix) + NUMBER_BYTES
        if backwards:
            found = cursor.set_range(prefix + b"\xff" * (NUMBER_BYTES + 1))
            found = cursor.prev() if found else cursor.last()
        else:
            found = cursor.set_range(numbered(prefix, first))
        while found:
            key = bytes(cursor.key())
            if not key.startswith(prefix):
                return
            if len(key) == length:
                number = int.from_bytes(key[-NUMBER_BYTES:])
                if number < first:
                    return
                yield number, bytes(cursor.value())
            found = cursor.prev() if backwards else cursor.next()

    def _all(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        cursor = self._txn.cursor()
        if cursor.set_range(prefix):
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield bytes(key), bytes(value)

    def _parsed(self, key: bytes, raw: bytes) -> dict[str, Any]:
        try:
            value = json.loads(raw)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            name = key.decode(errors="replace").strip("/").rpartition("/")[2]
            raise CorruptError(f"{self._path}: the record of {name} is damaged")
        return value


def numbered(prefix: bytes, number: int) -> bytes:
    """The key that is `prefix` and a number."""
    return prefix + number.to_bytes(NUMBER_BYTES)


class Database:
    """The environment at directory `path`, made if missing. Raises CorruptError, UnsupportedError."""

    def __init__(self, path: str) -> None:
        self.path = path
        os.makedirs(path, mode=0o700, exist_ok=True)
        with self._faults():
            self._env = lmdb.open(path, map_size=MAP_SIZE, mode=0o600, max_readers=1024)
            self._env.reader_check()
        self._check_version()

    def close(self) -> None:
        """Let the environment go."""
        self._env.close()

    @contextlib.contextmanager
    def read(self) -> Iterator[Transaction]:
        """A snapshot."""
        with self._faults(), self._env.begin() as txn:
            yield Transaction(txn, self.path)

    def write(self, act: Callable[[Transaction], _Result]) -> _Result:
        """Run `act` in a write transaction: durable when this returns, or nothing happened."""
        with self._faults(), self._env.begin(write=True) as txn:
            return act(Transaction(txn, self.path))

    def _check_version(self) -> None:
        # Read first: a writer that hangs in its transaction must not keep `hvfuse status` from opening.
        with self.read() as txn:
            found = txn.get(b"version")
        if found is None:
            found = self.write(_begin)
        version = found.get("version")
        if version != VERSION:
            self.close()
            raise UnsupportedError(f"{self.path}: records of version {version}; this hvfuse knows {VERSION}")

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """LMDB's exceptions as ours."""
        try:
            yield
        except (lmdb.MapFullError, lmdb.DiskError) as error:
            raise NoSpaceError(f"{self.path}: {error}", hint=room_hint(self.path)) from None
        except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError) as error:
            raise CorruptError(f"{self.path}: {error}") from None
        except lmdb.VersionMismatchError as error:
            raise UnsupportedError(f"{self.path}: {error}") from None
        except lmdb.Error as error:
            if getattr(error, "code", None) in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(f"{self.path}: {error}", hint=room_hint(self.path)) from None
            raise HvfuseError(f"{self.path}: {error}") from None


def _begin(txn: Transaction) -> dict[str, Any]:
    """Begin the records, unless another process just did. Returns what stands there then."""
    found = txn.get(b"version")
    if found is None:
        found = {"version": VERSION}
        txn.put(b"version", found)
    return found
