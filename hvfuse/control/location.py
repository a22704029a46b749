"""In which store the replica of a VM lies, as this home sees it.

A home sends its VMs to the store that hvfuse.toml names, and holds those of other homes in its own. Where replication
was turned round, the VM's record says where it goes, or lies, since.
"""

from __future__ import annotations

import os

from hvfuse.control.config import CONFIG_TARGET_HINT, VmPolicy
from hvfuse.control.home import CONFIG_NAME, Home
from hvfuse.control.records import VmRecord
from hvfuse.errors import NotFoundError, UnreachableError, UsageError
from hvfuse.formats.image import is_disk_name
from hvfuse.states import ReplicationState


def store_path(home: Home, policy: VmPolicy, record: VmRecord, vm: str) -> str:
    """Directory of the store."""
    if record.store is not None:
        return record.store
    if policy.target is None or not is_source(home, record, vm):
        return home.store
    return os.path.abspath(os.path.join(home.root, policy.target))


def is_source(home: Home, record: VmRecord, vm: str) -> bool:
    """Whether the home has the VM itself, or had it."""
    return record.state is not ReplicationState.DISABLED or record.enabled is not None or _has_disk(home.folder(vm))


def _has_disk(folder: str) -> bool:
    try:
        return any(is_disk_name(name) for name in os.listdir(folder))
    except OSError:
        return False


def demand_usable(home: Home, path: str, record: VmRecord) -> None:
    """Raise unless a store at `path` may be opened, or made, for a VM: NotFoundError, UsageError naming what is wrong,
    UnreachableError where it was there before: a disk that is not mounted is not a store to be begun anew."""
    if os.path.isdir(os.path.join(path, "store.lmdb")):
        return
    if os.path.exists(os.path.join(path, CONFIG_NAME)):
        raise UsageError(
            f"{path}: is a home, and not its store", hint=f'in hvfuse.toml: target = "{os.path.join(path, "store")}"'
        )
    if record.point is not None:
        raise UnreachableError(f"{path}: the store is not there; is its disk mounted?", hint=CONFIG_TARGET_HINT)
    if path != home.store and not os.path.isdir(os.path.dirname(path)):
        raise NotFoundError(f"{path}: there is no such directory to hold a store", hint=CONFIG_TARGET_HINT)
