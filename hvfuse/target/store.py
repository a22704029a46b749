"""The store: the VMs it holds, their recovery points, pins, the epoch.

    STORE/store.lmdb/               the journal and all records (`hvfuse.target.schema`)
    STORE/replicas/VM/DISK          replica images: plain sparse files, the disks at the base point
    STORE/unsynced/VM               frames of a first copy that are in the images, but not synced yet
                                    (`hvfuse.target.unsynced`); of no meaning after a reboot

One store serves all VMs, and any number of processes at once; LMDB lets one of them write at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

from hvfuse import system
from hvfuse.errors import BusyError, CorruptError, NotFoundError
from hvfuse.manifest import RecoveryPoint
from hvfuse.system import Clock, SystemClock
from hvfuse.target import schema
from hvfuse.target.environment import (
    DEFAULT_MAP_SIZE,
    Txn,
    close_environment,
    file_faults,
    open_environment,
    refuse_unfit_filesystem,
)
from hvfuse.target.index import scan
from hvfuse.target.schema import Pin, PointRecord, StagingRecord, VmRecord

DATABASE_DIRECTORY = "store.lmdb"
REPLICAS_DIRECTORY = "replicas"
UNSYNCED_DIRECTORY = "unsynced"

_Result = TypeVar("_Result")


class Store:
    """The store in directory `path`. Close it when done, or use it in a `with`.

    Methods whose names begin with `load_` or `scan_` work within a transaction of the caller's, the
    others have their own. With `read_only` (`create` must be false then) nothing can be written, and nothing
    waits for a process that does. Raises NotFoundError (there is none and `create` is false),
    UnsupportedError (newer format, unfit file system), CorruptError, NoSpaceError.
    """

    def __init__(
        self,
        path: str,
        *,
        create: bool = True,
        read_only: bool = False,
        map_size: int = DEFAULT_MAP_SIZE,
        clock: Clock | None = None,
    ) -> None:
        assert not (create and read_only)
        self.path = os.path.abspath(path)
        self.clock = clock or SystemClock()
        if create:
            with file_faults(self.path):
                refuse_unfit_filesystem(self.path)  # first: some do not even let a directory be made
                os.makedirs(self.path, mode=0o700, exist_ok=True)
                os.makedirs(os.path.join(self.path, REPLICAS_DIRECTORY), mode=0o700, exist_ok=True)
        self.env = open_environment(
            os.path.join(self.path, DATABASE_DIRECTORY), create=create, map_size=map_size, read_only=read_only
        )
        if create:
            with file_faults(self.path):
                system.fsync_directory("store:directory", self.path)
        self._closed = False

    def close(self) -> None:
        """Let the store go."""
        if not self._closed:
            self._closed = True
            close_environment(self.env)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # VMs

    def vms(self) -> list[VmRecord]:
        """All VMs, by name."""
        with self.env.read() as txn, txn.cursor(db=self.env.db(schema.VMS)) as cursor:
            return [VmRecord.unpack(value) for _, value in cursor]

    def vm(self, name: str) -> VmRecord:
        """One VM. Raises NotFoundError."""
        with self.env.read() as txn:
            return self.load_vm(txn, name)

    def load_vm(self, txn: Txn, name: str) -> VmRecord:
        """One VM. Raises NotFoundError."""
        vm = self.find_vm(txn, name)
        if vm is None:
            raise NotFoundError(f"the store has no VM {name!r}", hint="hvfuse store info")
        return vm

    def find_vm(self, txn: Txn, name: str) -> VmRecord | None:
        """One VM; None if there is none of that name."""
        if not name or len(os.fsencode(name)) > 255:
            return None
        raw = txn.get(schema.vm_key(name), db=self.env.db(schema.VMS))
        return None if raw is None else VmRecord.unpack(raw)

    def save_vm(self, txn: Txn, vm: VmRecord) -> None:
        """Put a VM's record."""
        txn.put(schema.vm_key(vm.name), vm.pack(), db=self.env.db(schema.VMS))

    def create_vm(self, txn: Txn, name: str) -> VmRecord:
        """A new VM with nothing in it. Raises BusyError if the one of that name before it is half deleted."""
        if self.half_deleted(txn, name):
            raise BusyError(
                f"{name}: the replica that it had is not wholly deleted yet",
                hint=f"hvfuse replication disable {name} --delete-replica",
            )
        vm = VmRecord(id=self.next_vm_number(txn), name=name)
        self.save_vm(txn, vm)
        return vm

    def next_vm_number(self, txn: Txn) -> int:
        """The number of a VM that is new, or begins anew."""
        return self._next(txn, schema.KEY_NEXT_VM)

    def half_deleted(self, txn: Txn, name: str) -> list[int]:
        """The numbers of VMs of that name whose deletion was begun (`hvfuse.target.removal`)."""
        start, stop = schema.PREFIX_GONE, schema.PREFIX_GONE + b"\xff" * 5
        found = scan(txn, self.env, schema.META, start, stop)
        return [schema.number_of(key[-4:]) for key, value in found if value == os.fsencode(name)]

    def replica_folder(self, vm: str) -> str:
        """Where a VM's replica images lie."""
        return os.path.join(self.path, REPLICAS_DIRECTORY, vm)

    def image_path(self, vm: str, disk: str) -> str:
        """One replica image."""
        return os.path.join(self.replica_folder(vm), disk)

    def unsynced_path(self, vm: str) -> str:
        """The note of a VM's first copy."""
        return os.path.join(self.path, UNSYNCED_DIRECTORY, vm)

    # Cycles and recovery points

    def points(self, vm: str) -> list[RecoveryPoint]:
        """The recovery points, oldest first. Raises NotFoundError."""
        with self.env.read() as txn:
            record = self.load_vm(txn, vm)
            return [cycle.recovery_point(vm) for cycle in self.scan_points(txn, record)]

    def point(self, vm: str, point_id: str | None = None) -> RecoveryPoint:
        """One recovery point; the newest without an id. Raises NotFoundError."""
        with self.env.read() as txn:
            record = self.load_vm(txn, vm)
            if point_id is not None:
                return self.load_point(txn, record, point_id).recovery_point(vm)
            newest = self.newest_point(txn, record)
            if newest is None:
                raise NotFoundError(f"{vm} has no recovery point yet", hint=f"hvfuse replicate {vm}")
            return newest.recovery_point(vm)

    def load_point(self, txn: Txn, vm: VmRecord, point_id: str) -> PointRecord:
        """One recovery point. Raises NotFoundError."""
        raw = txn.get(schema.point_id_key(vm.id, point_id), db=self.env.db(schema.POINT_IDS))
        if raw is None:
            raise NotFoundError(f"{vm.name} has no recovery point {point_id!r}", hint=f"hvfuse point list {vm.name}")
        return self.load_cycle(txn, vm, schema.unpack_listing(raw)[0])

    def load_cycle(self, txn: Txn, vm: VmRecord, seq: int) -> PointRecord:
        """The committed cycle with that seq. Raises NotFoundError."""
        raw = txn.get(schema.point_key(vm.id, seq), db=self.env.db(schema.POINTS))
        if raw is None:
            raise NotFoundError(f"{vm.name} has no cycle {seq} in the store any more")
        return PointRecord.unpack(raw, seq)

    def scan_cycles(self, txn: Txn, vm: VmRecord, *, first: int = 0, last: int | None = None) -> Iterator[PointRecord]:
        """The committed cycles first <= seq <= last, from the base to the newest at most, oldest first."""
        start = schema.point_key(vm.id, first)
        stop = schema.point_key(vm.id, (vm.head_seq if last is None else last) + 1)
        for key, value in scan(txn, self.env, schema.POINTS, start, stop):
            yield PointRecord.unpack(value, int.from_bytes(key[-8:], "big"))

    def scan_points(self, txn: Txn, vm: VmRecord) -> Iterator[PointRecord]:
        """The recovery points, oldest first."""
        return (cycle for cycle in self.scan_cycles(txn, vm) if cycle.is_point)

    def newest_point(self, txn: Txn, vm: VmRecord) -> PointRecord | None:
        """The newest recovery point; None without any."""
        for seq in range(vm.head_seq, vm.base_seq - 1, -1):
            raw = txn.get(schema.point_key(vm.id, seq), db=self.env.db(schema.POINTS))
            if raw is not None:
                cycle = PointRecord.unpack(raw, seq)
                if cycle.is_point:
                    return cycle
        return None

    def save_cycle(self, txn: Txn, vm: VmRecord, cycle: PointRecord) -> None:
        """Put a cycle's record, and list it as a recovery point or take it off the list."""
        txn.put(schema.point_key(vm.id, cycle.seq), cycle.pack(), db=self.env.db(schema.POINTS))
        key, ids = schema.point_id_key(vm.id, cycle.id), self.env.db(schema.POINT_IDS)
        if cycle.is_point:
            txn.put(key, schema.pack_listing(cycle.seq, cycle.time_ns), db=ids)
        else:
            txn.delete(key, db=ids)

    def listed(self, txn: Txn, vm: VmRecord) -> list[tuple[int, int]]:
        """Seq and time (ns since 1970) of each recovery point, in no order; far faster than their records."""
        start, stop = schema.u32(vm.id), schema.u32(vm.id + 1)
        found = scan(txn, self.env, schema.POINT_IDS, start, stop)
        return [schema.unpack_listing(raw) for _, raw in found]

    def summary(self, vm: str) -> tuple[int, RecoveryPoint | None, str]:
        """How many recovery points there are, the newest of them, and the replica's state. Raises NotFoundError."""
        with self.env.read() as txn:
            record = self.load_vm(txn, vm)
            newest = self.newest_point(txn, record)
            point = None if newest is None else newest.recovery_point(vm)
            return len(self.listed(txn, record)), point, record.state

    def point_count(self, vm: str) -> int:
        """How many recovery points there are. Raises NotFoundError."""
        with self.env.read() as txn:
            return len(self.listed(txn, self.load_vm(txn, vm)))

    def definition(self, vm: str, point_id: str | None = None) -> bytes | None:
        """What the source said of the VM when a recovery point was committed, or said last without an id; None where it
        said nothing. Raises NotFoundError, CorruptError."""
        self.env.ensure(schema.DEFINITIONS)
        with self.env.read() as txn:
            record = self.load_vm(txn, vm)
            name = record.definition if point_id is None else self.load_point(txn, record, point_id).definition
            return self.load_definition(txn, record, name) if name else None

    def load_definition(self, txn: Txn, vm: VmRecord, name: str) -> bytes:
        """The definition of that name. Raises CorruptError: damaged, or missing although a record names it."""
        what, raw = f"{vm.name}: definition {name}", None
        if self.env.has(schema.DEFINITIONS):
            raw = txn.get(schema.definition_key(vm.id, name), db=self.env.db(schema.DEFINITIONS))
        if raw is None:
            raise CorruptError(f"{what} is missing", hint="hvfuse store check")
        definition = schema.unpack_definition(raw, what)
        if schema.definition_name(definition) != name:
            raise CorruptError(f"{what} is another one", hint="hvfuse store check")
        return definition

    def load_staging(self, txn: Txn, vm: VmRecord) -> StagingRecord | None:
        """The VM's unfinished cycle, if there is one."""
        raw = txn.get(schema.u32(vm.id), db=self.env.db(schema.STAGING))
        return None if raw is None else StagingRecord.unpack(raw)

    # Pins

    def pin(self, vm: str, point_id: str, owner: Mapping[str, Any]) -> int:
        """Keep a recovery point readable until `unpin`, whatever retention says. Returns the pin's id.

        `owner`: see `schema.Pin`; "kind" and whatever is to be found again. This process is put down as
        the holder unless "pid" names another. Raises NotFoundError.
        """
        filled = {"kind": "reader", **system.process_identity(int(owner.get("pid") or os.getpid())), **owner}
        json.dumps(filled)  # must be JSON; better found out here than in the middle of a transaction

        def act(txn: Txn) -> int:
            record = self.load_vm(txn, vm)
            return self.put_pin(txn, record, self.load_point(txn, record, point_id), filled)

        return self.env.write("store:pin", act)

    def put_pin(self, txn: Txn, vm: VmRecord, cycle: PointRecord, owner: Mapping[str, Any]) -> int:
        """Pin a cycle. Returns the pin's id."""
        pin = Pin(
            id=self._next(txn, schema.KEY_NEXT_PIN),
            vm=vm.name,
            point_id=cycle.id,
            seq=cycle.seq,
            created_ns=self.clock.now_ns(),
            owner=owner,
        )
        txn.put(schema.u64(pin.id), pin.pack(), db=self.env.db(schema.PINS))
        return pin.id

    def update_pin(self, pin_id: int, owner: Mapping[str, Any]) -> Pin:
        """Change fields of a pin's owner: a "pid" brings its boot and start along. Raises NotFoundError."""
        changes = {**(system.process_identity(int(owner["pid"])) if owner.get("pid") else {}), **owner}

        def act(txn: Txn) -> Pin:
            key, pins = schema.u64(pin_id), self.env.db(schema.PINS)
            raw = txn.get(key, db=pins)
            if raw is None:
                raise NotFoundError(f"there is no pin {pin_id}")
            pin = Pin.unpack(raw, pin_id)
            pin = replace(pin, owner={**pin.owner, **changes})
            txn.put(key, pin.pack(), db=pins)
            return pin

        return self.env.write("store:pin", act)

    def unpin(self, pin_id: int) -> None:
        """Take a pin away; one that is gone already is no error."""
        self.env.write("store:unpin", lambda txn: self.delete_pin(txn, pin_id))

    def delete_pin(self, txn: Txn, pin_id: int) -> None:
        """As `unpin`."""
        txn.delete(schema.u64(pin_id), db=self.env.db(schema.PINS))

    def pins(self, vm: str | None = None) -> list[Pin]:
        """The pins of one VM, or of all, oldest first."""
        with self.env.read() as txn:
            return [pin for pin in self.scan_pins(txn) if vm is None or pin.vm == vm]

    def scan_pins(self, txn: Txn) -> Iterator[Pin]:
        """All pins, oldest first."""
        with txn.cursor(db=self.env.db(schema.PINS)) as cursor:
            for key, value in cursor:
                yield Pin.unpack(value, schema.number_of(key))

    # The epoch

    def epoch(self) -> int:
        """The highest epoch of any VM."""
        with self.env.read() as txn:
            return schema.number_of(txn.get(schema.KEY_EPOCH, db=self.env.db(schema.META)))

    def raise_epoch(self, txn: Txn, *, above: int = 0) -> int:
        """A new epoch, higher than all before it and than `above`, which may come from another store."""
        meta = self.env.db(schema.META)
        epoch = max(schema.number_of(txn.get(schema.KEY_EPOCH, db=meta)), above) + 1
        txn.put(schema.KEY_EPOCH, schema.u64(epoch), db=meta)
        return epoch

    def write(self, label: str, act: Callable[[Txn], _Result]) -> _Result:
        """See `Environment.write`."""
        return self.env.write(label, act)

    def _next(self, txn: Txn, key: bytes) -> int:
        """Count a number in `meta` up, from 1."""
        meta = self.env.db(schema.META)
        number = schema.number_of(txn.get(key, db=meta)) + 1
        txn.put(key, schema.u64(number), db=meta)
        return number


def holder_is_alive(pin: Pin) -> bool:
    """Whether the process that holds a pin still runs."""
    return system.is_running(pin.owner)
