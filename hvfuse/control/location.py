"""In which store the replica of a VM lies, as this home sees it: its own, or another home's. The one place that knows.

    record.store set                                         that one: replication was turned round
    a VM that is no source here (`is_source`)                the home's own store: what others ship hither
    any other                                                `target` in hvfuse.toml, else the home's own store

A store may lie on a disk that is not mounted. What is in its place then, an empty mount point or nothing at all, must
not become a new store: the first copy would go to the wrong disk, and lie hidden below the right one later. So a
store is begun only in the home's own place, or where a directory is missing whose parent is there; and nowhere once
this home knows of a recovery point there. What `Location.is_there` takes for a store is never an empty directory:
a store that is begun at a target comes into its place by one rename.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from hvfuse import system
from hvfuse.control import config_file
from hvfuse.control.config import Config, VmPolicy
from hvfuse.control.home import CONFIG_NAME, Home, name_fault
from hvfuse.control.records import Records, VmRecord
from hvfuse.control.supervisor import find_vms, has_disk
from hvfuse.errors import CorruptError, HvfuseError, NotFoundError, UnreachableError, UsageError
from hvfuse.states import ReplicationState
from hvfuse.target.environment import file_faults, refuse_unfit_filesystem
from hvfuse.target.store import DATABASE_DIRECTORY, REPLICAS_DIRECTORY, Store


class StoreMissingError(NotFoundError):
    """There is no store where one should be, and none may be begun there. It may come back: a disk is mounted."""

    recoverable = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where the replica of `vm` lies. `path`: absolute. `is_own`: it is the home's own store. `has_point`: this home
    knows of a recovery point there, so that there is a store, reachable or not."""

    vm: str
    path: str
    is_own: bool
    has_point: bool

    @property
    def is_there(self) -> bool:
        """Whether a store is in that place, as far as its directory tells."""
        return _is_store(self.path)

    def open(self, *, create: bool = False, read_only: bool = False) -> Store:
        """The store; `create`: begun if it is not there and may be begun.

        Raises what `Store` raises, and: UsageError if the path is a home instead of its store; UnreachableError if
        the store of which this home knows is not there; StoreMissingError if there is none, and none may be begun;
        NotFoundError (without `create`) if there is none yet.
        """
        if not self.is_there:
            self._demand_beginning(create=create)
        return Store(self.path, create=create, read_only=read_only)

    def find(self, *, read_only: bool = False) -> Store | None:
        """The store; None if there certainly is none yet. Raises as `open`: nobody may take a store that is merely
        not reached for one that holds nothing."""
        try:
            return self.open(read_only=read_only)
        except (StoreMissingError, UnreachableError):
            raise
        except NotFoundError:
            return None

    def _demand_beginning(self, *, create: bool) -> None:
        """Raises for what is not a store; begins one at a target if `create` and it may be."""
        if self.has_point and (create or not self.is_own):
            raise UnreachableError(
                f"{self.path}: the store is not there, although {self.vm} has a recovery point in it",
                hint=f"mount the disk that it lies on; if the store is lost, begin an empty one: "
                f"mkdir -p {os.path.join(self.path, REPLICAS_DIRECTORY)}",
            )
        if self.is_own:
            return
        if os.path.isdir(self.path):
            self._refuse_home()
            raise StoreMissingError(
                f"{self.path}: there is a directory, but no store in it",
                hint=f"mount the disk that the store lies on; to begin one here: rmdir {self.path}",
            )
        if not os.path.isdir(os.path.dirname(self.path)):
            raise StoreMissingError(
                f"{self.path}: there is no store, nor the directory {os.path.dirname(self.path)} for one",
                hint="mount the disk that it lies on, or correct `target` in hvfuse.toml",
            )
        if create:
            _begin(self.path)

    def _refuse_home(self) -> None:
        store = os.path.join(self.path, "store")
        if os.path.isfile(os.path.join(self.path, CONFIG_NAME)):
            with contextlib.suppress(HvfuseError, OSError):
                store = config_file.load(self.path).home(self.path).store
        elif not os.path.isdir(store):
            return
        raise UsageError(
            f"{self.path} is not a store, but the home that it belongs to", hint=f'target = "{store}" in hvfuse.toml'
        )


def is_source(home: Home, record: VmRecord, vm: str) -> bool:
    """Whether the home has the VM itself, or had it; of any other, it may hold a replica at most."""
    if record.state is not ReplicationState.DISABLED or record.enabled is not None:
        return True
    return name_fault(vm) is None and has_disk(home.folder(vm))


def store_path(home: Home, policy: VmPolicy, record: VmRecord, vm: str) -> str:
    """The absolute path of the store that holds the VM's replica, or will."""
    if record.store is not None:
        return record.store
    if policy.target is None or not is_source(home, record, vm):
        return home.store
    return os.path.abspath(os.path.join(home.root, policy.target))


def locate(home: Home, policy: VmPolicy, record: VmRecord, vm: str) -> Location:
    """Where the VM's replica lies."""
    path = store_path(home, policy, record, vm)
    shipped_to = record.shipped_to or home.store  # a record from before there was a choice
    return Location(
        vm=vm, path=path, is_own=same(path, home.store),
        has_point=record.point is not None and same(path, shipped_to),
    )  # fmt: skip


def location_of(home: Home, config: Config, records: Records | None, vm: str) -> Location:
    """As `locate`, for whoever has the configuration and the records; None: there are none yet."""
    return locate(home, config.policy(vm), VmRecord() if records is None else records.read(vm), vm)


def all_locations(home: Home, config: Config, records: Records | None) -> list[Location]:
    """The home's own store, and every other that replicas of its VMs lie in or lay in: each once."""
    found = [Location(vm="", path=home.store, is_own=True, has_point=False)]
    for vm in all_vms(home, records):
        try:
            record = VmRecord() if records is None else records.read(vm)
        except CorruptError:  # status tells it
            continue
        before = record.shipped_to
        old = [] if before is None else [Location(vm=vm, path=before, is_own=same(before, home.store), has_point=False)]
        for one in (locate(home, config.policy(vm), record, vm), *old):
            if not any(same(one.path, known.path) for known in found):
                found.append(one)
    return found


def all_vms(home: Home, records: Records | None) -> list[str]:
    """The VMs of which this home knows by itself, not only from its store."""
    return sorted({*find_vms(home), *(() if records is None else records.names())})


def same(one: str, other: str) -> bool:
    """Whether two paths are of the same store."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _is_store(path: str) -> bool:
    return any(os.path.isdir(os.path.join(path, name)) for name in (DATABASE_DIRECTORY, REPLICAS_DIRECTORY))


def _begin(path: str) -> None:
    """Make the directory of a new store, never an empty one: that is what a mount point looks like."""
    with file_faults(path):
        refuse_unfit_filesystem(path)
        made = tempfile.mkdtemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
        try:
            os.mkdir(os.path.join(made, REPLICAS_DIRECTORY), mode=0o700)
            system.rename("store:begin", made, path)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            if not _is_store(path):  # else somebody else has begun it just now
                raise
        system.fsync_directory("store:begun", os.path.dirname(path))


@contextlib.contextmanager
def opened(location: Location, *, read_only: bool = False) -> Iterator[Store | None]:
    """`Location.find`, closed at the end."""
    store = location.find(read_only=read_only)
    try:
        yield store
    finally:
        if store is not None:
            store.close()
