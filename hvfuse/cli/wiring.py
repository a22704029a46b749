"""Puts the parts of a VM's replication together: where source, replica and records meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from hvfuse import system
from hvfuse.control.config import VmPolicy
from hvfuse.control.home import Home
from hvfuse.control.records import Records
from hvfuse.errors import BusyError, NotFoundError

if TYPE_CHECKING:
    from hvfuse.shipper.service import Shipper


@contextmanager
def shipper(home: Home, policy: VmPolicy, vm: str, records: Records) -> Iterator[Shipper]:
    """The shipper of a VM, into the home's own store; nobody else ships the VM meanwhile.

    Raises BusyError when another process does.
    """
    from hvfuse.shipper.replication import ShippingPolicy
    from hvfuse.shipper.service import Shipper
    from hvfuse.shipper.source import TrackerSource
    from hvfuse.target.local import LocalReplica
    from hvfuse.target.store import Store

    clock = system.SystemClock()
    with system.exclusive_lock(home.shipper_lock(vm)) as had:
        if not had:
            raise BusyError(f"{vm}: another process is replicating it just now", hint="try again in a moment")
        with Store(home.store) as store, closing(LocalReplica(store, vm)) as replica:

            def keep_house() -> None:
                replica.housekeep(policy.retention, clock.now_ns())

            yield Shipper(
                vm=vm,
                folder=home.folder(vm),
                source=TrackerSource(home.tracker_socket(vm), home.folder(vm)),
                replica=replica,
                records=records.of(vm),
                policy=ShippingPolicy(
                    frequency_seconds=policy.frequency, level=policy.compression, soft_limit=policy.soft_limit / 100
                ),
                clock=clock,
                housekeep=keep_house,
            )


@contextmanager
def point_counter(home: Home) -> Iterator[Callable[[str], int]]:
    """What tells how many recovery points a VM has; a store that is not there yet has none."""
    from hvfuse.target.store import Store

    store: Store | None = None

    def count(vm: str) -> int:
        nonlocal store
        try:
            if store is None:
                store = Store(home.store, create=False)
            return len(store.points(vm))
        except NotFoundError:
            return 0

    try:
        yield count
    finally:
        if store is not None:
            store.close()
