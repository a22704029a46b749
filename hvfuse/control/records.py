"""The control plane's records: where each VM's replication stands, and what its last cycles were.

An LMDB environment, read and written by several processes at once; values are JSON objects in UTF-8.

    key                      value
    "version"                {"version": 1}; a higher one is refused
    "vm/NAME"                the fields of VmRecord
    "cycle/NAME/" + u64 BE   the fields of CycleRecord; numbered upwards, the oldest beyond
                             CYCLES_KEPT go

A VM without a record was never replicated. Fields that are missing have their defaults; fields that are
not known are kept as they are. One writer's transaction is whole or absent, durable when it returns.
An environment must be opened only once in a process: use one `Records`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import TracebackType
from typing import Any, Self

import lmdb

from hvfuse.errors import CorruptError, HvfuseError, NoSpaceError, UnsupportedError
from hvfuse.manifest import ReplicationState
from hvfuse.shipper.copy import CopyReport
from hvfuse.shipper.cycle import CycleReport
from hvfuse.shipper.orders import Orders

VERSION = 1
CYCLES_KEPT = 2880
"""A day's cycles at one every 30 seconds."""
MAP_SIZE = 1 << 30
"""Bytes of address space, not of disk: far more than CYCLES_KEPT cycles of a thousand VMs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRecord:
    """Where a VM's replication stands.

    `error`, `hint`: why the last attempt failed and what to do; None when it did not. `tracker_error`,
    `shipper_error`: why that process ended or could not start, None while it runs; `tracker_hint`: what to do
    about it. `generation`: hex.
    `cycle`, `point`: the last one that the target has (0 and None: none yet).
    `last_replication_time_ns`: instant of that cycle's barrier, ns since 1970. `progress`: of the copy
    under way, 0 to 1; `copy`: how far it is, as `CopyProgress` tells it, None when there is none.
    `resync_reason`: why one is required. `last_copy`: what the last copy or
    resynchronisation took, as `CopyReport` tells it; "text" says it in words. `orders`: what an administrator
    ordered of copies, as `Orders` tells it; empty: nothing. `copy_due_ns`: when the copy that waits begins by
    itself, ns since 1970; None: not before it is asked for, or none waits.
    """

    state: ReplicationState = ReplicationState.DISABLED
    error: str | None = None
    hint: str | None = None
    tracker_error: str | None = None
    tracker_hint: str | None = None
    shipper_error: str | None = None
    generation: str | None = None
    cycle: int = 0
    point: str | None = None
    last_replication_time_ns: int | None = None
    progress: float | None = None
    resync_reason: str | None = None
    last_copy: dict[str, object] | None = None
    copy: dict[str, Any] | None = None
    orders: dict[str, Any] = field(default_factory=dict)
    copy_due_ns: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleRecord:
    """One cycle that was committed. `bytes_logged`: payload the guest wrote; `bytes_coalesced`: what
    of it was the newest; `bytes_sent`: as it travelled. `time_ns`: the barrier's instant."""

    cycle: int
    point: str | None
    time_ns: int
    bytes_logged: int
    bytes_coalesced: int
    bytes_sent: int
    seconds: float


class Records:
    """The environment at directory `path`, made if missing. Raises CorruptError, UnsupportedError."""

    def __init__(self, path: str) -> None:
        self._path = path
        os.makedirs(path, mode=0o700, exist_ok=True)
        with self._faults():
            self._env = lmdb.open(path, map_size=MAP_SIZE, mode=0o600, max_readers=1024)
            self._env.reader_check()
        self._check_version()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the environment go."""
        self._env.close()

    def names(self) -> list[str]:
        """The VMs that have a record."""
        with self._faults(), self._env.begin() as txn:
            return [key[len(b"vm/") :].decode() for key, _ in _under(txn, b"vm/")]

    def read(self, vm: str) -> VmRecord:
        """The VM's record; the default one if there is none."""
        with self._faults(), self._env.begin() as txn:
            return self._record(vm, txn.get(_vm_key(vm)))

    def update(self, vm: str, **changes: Any) -> VmRecord:
        """Change fields of the VM's record, in one transaction: what others changed meanwhile stays. `orders` may
        be given as `Orders`. Returns the new record; durable."""
        if isinstance(changes.get("orders"), Orders):
            changes["orders"] = changes["orders"].as_json()
        return self._change(vm, lambda _: changes)

    def orders(self, vm: str) -> Orders:
        """What an administrator ordered of the VM's copies."""
        return Orders.from_json(self.read(vm).orders)

    def change_orders(self, vm: str, change: Callable[[Orders], Orders]) -> Orders:
        """Replace the VM's orders by what `change` makes of them, in one transaction: of two who change them at
        once, the second sees what the first made. Returns the new ones; durable."""
        record = self._change(vm, lambda now: {"orders": change(Orders.from_json(now.orders)).as_json()})
        return Orders.from_json(record.orders)

    def _change(self, vm: str, changes: Callable[[VmRecord], Mapping[str, Any]]) -> VmRecord:
        with self._faults(), self._env.begin(write=True) as txn:
            raw = txn.get(_vm_key(vm))
            before = self._record(vm, raw)
            record = replace(before, **changes(before))
            kept = self._json(vm, raw) if raw is not None else {}
            txn.put(_vm_key(vm), json.dumps({**kept, **asdict(record)}).encode())
            return record

    def add_cycle(self, vm: str, cycle: CycleRecord) -> None:
        """Keep a cycle's statistics; durable."""
        prefix = _cycle_prefix(vm)
        with self._faults(), self._env.begin(write=True) as txn:
            keys = [key for key, _ in _under(txn, prefix)]
            number = int.from_bytes(keys[-1][len(prefix) :]) + 1 if keys else 1
            for key in keys[: max(0, len(keys) - CYCLES_KEPT + 1)]:
                txn.delete(key)
            txn.put(prefix + number.to_bytes(8), json.dumps(asdict(cycle)).encode())

    def of(self, vm: str) -> VmRecords:
        """The part of one VM, as its shipper uses it."""
        return VmRecords(self, vm)

    def cycles(self, vm: str) -> list[CycleRecord]:
        """The kept cycles of a VM, oldest first."""
        with self._faults(), self._env.begin() as txn:
            return [CycleRecord(**self._json(vm, raw)) for _, raw in _under(txn, _cycle_prefix(vm))]

    def _check_version(self) -> None:
        # Read first: a writer that hangs in its transaction must not keep `hvfuse status` from opening.
        with self._faults(), self._env.begin() as txn:
            raw = txn.get(b"version")
        if raw is None:
            raw = self._put_version()
        with self._faults():
            version = self._json("version", raw).get("version")
        if version != VERSION:
            self.close()
            raise UnsupportedError(f"{self._path}: records of version {version}; this hvfuse knows {VERSION}")

    def _put_version(self) -> bytes:
        """Begin the records, unless another process just did. Returns what stands there then."""
        with self._faults(), self._env.begin(write=True) as txn:
            raw = txn.get(b"version")
            if raw is None:
                raw = json.dumps({"version": VERSION}).encode()
                txn.put(b"version", raw)
            return bytes(raw)

    def _record(self, vm: str, raw: bytes | None) -> VmRecord:
        if raw is None:
            return VmRecord()
        values = self._json(vm, raw)
        known = {one.name: values[one.name] for one in fields(VmRecord) if one.name in values}
        try:
            known["state"] = ReplicationState(known.get("state", ReplicationState.DISABLED))
        except ValueError:
            raise CorruptError(f"{self._path}: {vm}: unknown state {known['state']!r}") from None
        return VmRecord(**known)

    def _json(self, what: str, raw: bytes) -> dict[str, Any]:
        try:
            value = json.loads(raw)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise CorruptError(f"{self._path}: the record of {what} is damaged")
        return value

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """LMDB's exceptions as ours."""
        try:
            yield
        except (lmdb.MapFullError, lmdb.DiskError) as error:
            raise NoSpaceError(f"{self._path}: {error}") from None
        except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError) as error:
            raise CorruptError(f"{self._path}: {error}") from None
        except lmdb.VersionMismatchError as error:
            raise UnsupportedError(f"{self._path}: {error}") from None
        except lmdb.Error as error:
            full = getattr(error, "code", None) in (errno.ENOSPC, errno.EDQUOT)
            raise (NoSpaceError if full else HvfuseError)(f"{self._path}: {error}") from None


@dataclass(frozen=True, slots=True)
class VmRecords:
    """One VM's part of the records."""

    records: Records
    vm: str

    def read(self) -> VmRecord:
        """The VM's record."""
        return self.records.read(self.vm)

    def update(self, **changes: Any) -> None:
        """Change fields of the VM's record; durable."""
        self.records.update(self.vm, **changes)

    def orders(self) -> Orders:
        """What an administrator ordered of the VM's copies."""
        return self.records.orders(self.vm)

    def change_orders(self, change: Callable[[Orders], Orders]) -> Orders:
        """As `Records.change_orders`."""
        return self.records.change_orders(self.vm, change)

    def copy_progress(self) -> dict[str, Any] | None:
        """The record's `copy`."""
        return self.read().copy

    def cycle(self, report: CycleReport) -> None:
        """Keep the statistics of a committed cycle; durable."""
        self.records.add_cycle(
            self.vm,
            CycleRecord(
                cycle=report.cycle,
                point=report.point,
                time_ns=report.sealed_ns,
                bytes_logged=report.bytes_logged,
                bytes_coalesced=report.bytes_coalesced,
                bytes_sent=report.bytes_sent,
                seconds=report.seconds,
            ),
        )

    def copied(self, report: CopyReport) -> None:
        """Keep the statistics of a committed copy; durable."""
        self.records.update(self.vm, last_copy=report.as_json())


def _vm_key(vm: str) -> bytes:
    return b"vm/" + vm.encode()


def _cycle_prefix(vm: str) -> bytes:
    return b"cycle/" + vm.encode() + b"/"


def _under(txn: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) pairs whose key begins with `prefix`, in order."""
    cursor = txn.cursor()
    if not cursor.set_range(prefix):
        return
    for key, value in cursor:
        if not key.startswith(prefix):
            return
        yield bytes(key), bytes(value)
