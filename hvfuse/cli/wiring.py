"""Puts the parts of a VM's replication together: where source, replica and records meet."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

from hvfuse import system
from hvfuse.control import definition, location
from hvfuse.control.config import VmPolicy
from hvfuse.control.config_file import Applied, ConfigFile
from hvfuse.control.home import Home
from hvfuse.control.location import Location
from hvfuse.control.records import Records, VmRecord
from hvfuse.errors import BusyError, CorruptError, HvfuseError, NotFoundError, UnreachableError
from hvfuse.states import ReplicationState

if TYPE_CHECKING:
    from hvfuse.cli.main import Session
    from hvfuse.control.facts import TargetFacts
    from hvfuse.control.failover_guests import FailoverGuest
    from hvfuse.control.fence import Fence
    from hvfuse.control.site import Site
    from hvfuse.position import Position
    from hvfuse.shipper.policy import ShippingPolicy
    from hvfuse.shipper.service import Shipper
    from hvfuse.shipper.source import Source
    from hvfuse.target.failing_over import Party
    from hvfuse.target.store import Store

_log = logging.getLogger(__name__)


class FollowedPolicy:
    """The policy of a VM that is being shipped, as the configuration says it at any time. For the shipper's thread.

    `moved`: called with a policy that says another target than the one before.
    """

    def __init__(
        self, file: ConfigFile, vm: str, *, source: Source, records: Records, moved: Callable[[], None] = lambda: None
    ) -> None:
        self._file = file
        self._vm = vm
        self._source = source
        self._records = records
        self._moved = moved
        self.policy = file.current().policy(vm)
        self._shipping = shipping_policy(self.policy)
        self._is_told = False  # the tracker, which may have begun with an older text

    def shipping(self) -> ShippingPolicy:
        """What of it the shipper is told; the same object as long as nothing changes."""
        policy = self._file.current().policy(self._vm)
        if policy is not self.policy:
            if policy != self.policy:
                self._shipping = shipping_policy(policy)
                self._note(changes_text(policy, self.policy))
                self._is_told = False
                if policy.target != self.policy.target:
                    self._moved()
            self.policy = policy
        if not self._is_told:
            self._tell_tracker()
        return self._shipping

    def _note(self, what: str) -> None:
        text = f"the policy has changed: {what}"
        _log.info("%s: %s", self._vm, text)
        with suppress(HvfuseError):
            self._records.events.add(kind="policy", vm=self._vm, text=text, now_ns=time.time_ns())

    def _tell_tracker(self) -> None:
        """Tell it what it holds of the policy. This comes between two turns, or two frames of a copy: it must not fail
        them. One that does not run will read the file itself when it begins."""
        policy = self.policy
        try:
            self._source.configure(
                exclude=policy.exclude, hard_limit=policy.hard_limit / 100, soft_limit=policy.soft_limit / 100
            )
        except UnreachableError:
            return  # it is tried again
        except HvfuseError as error:
            _log.warning("%s: the tracker keeps its old policy: %s", self._vm, error)
        self._is_told = True


class FollowedDefinition:
    """What the configuration says of a VM that is being shipped, as the document that travels with its recovery points.
    For the shipper's thread. Looks at the configuration, and at the files that it names, each time."""

    def __init__(self, file: ConfigFile, root: str, vm: str, *, records: Records) -> None:
        self._file = file
        self._root = root
        self._vm = vm
        self._records = records
        self._applied: Applied | None = None
        self._paths: list[str] = []
        self._seen: list[tuple[int, ...] | None] = []
        self._document: bytes | None = None
        self._complaint = ""

    def __call__(self) -> bytes | None:
        """The document; None if there is none that could travel. What cannot travel holds no recovery point up."""
        applied = self._file.applied()
        if applied is not self._applied:
            adopted = applied.definitions.get(self._vm)
            self._paths = definition.file_paths(applied.text, self._root, self._vm, adopted=adopted)
        seen = [_stamp(path) for path in self._paths]
        if applied is not self._applied or seen != self._seen:
            self._make(applied)
            self._applied, self._seen = applied, seen
        return self._document

    def _make(self, applied: Applied) -> None:
        try:
            found = definition.of(applied.text, self._root, self._vm, adopted=applied.definitions.get(self._vm))
            self._document = found.encode()
        except HvfuseError as error:
            self._complain(f"what is said of the VM does not travel with its recovery points: {error}")
            return
        lost = [f"{file.name} ({file.fault})" for file in found.files.values() if file.data is None]
        self._complain(f"recovery points are without {', '.join(lost)}" if lost else "")

    def _complain(self, text: str) -> None:
        if text and text != self._complaint:
            _log.warning("%s: %s", self._vm, text)
            with suppress(HvfuseError):
                self._records.events.add(kind="policy", vm=self._vm, text=text, now_ns=time.time_ns())
        self._complaint = text


def _stamp(path: str) -> tuple[int, ...] | None:
    """By what a change of a file is noticed; None: there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def changes_text(policy: VmPolicy, before: VmPolicy) -> str:
    """In what two policies differ: "frequency, retention"."""
    names = (field.name for field in dataclasses.fields(VmPolicy))
    return ", ".join(name for name in names if getattr(policy, name) != getattr(before, name))


def shipping_policy(policy: VmPolicy) -> ShippingPolicy:
    """What of a VM's policy the shipper is told."""
    from hvfuse.formats.digests import Algorithm
    from hvfuse.shipper.policy import ShippingPolicy

    return ShippingPolicy(
        frequency_seconds=policy.frequency,
        level=policy.compression,
        soft_limit=policy.soft_limit / 100,
        algorithm=Algorithm(policy.digest),
        resync=policy.resync,
        initial=policy.initial,
        throttle=policy.throttle,
        app_consistent=policy.app_consistent,
    )


@contextmanager
def shipper(
    home: Home, file: ConfigFile, vm: str, records: Records, *, moved: Callable[[], None] = lambda: None
) -> Iterator[Shipper]:
    """The shipper of a VM, into the store that its replica lies in; nobody else ships the VM meanwhile. It follows what
    the configuration says of the VM, but for the target: `moved` is called when that is another one.

    Raises BusyError when another process does, StateError when the VM is not to be replicated, and what
    `Location.open` raises.
    """
    from hvfuse.control import protected
    from hvfuse.control.guest import GuardedGuest
    from hvfuse.shipper.policy import CurrentPolicy
    from hvfuse.shipper.service import Shipper
    from hvfuse.shipper.source import TrackerSource
    from hvfuse.target.failing_over import Claim
    from hvfuse.target.local import LocalReplica

    clock = system.SystemClock()
    source = TrackerSource(home.tracker_socket(vm), home.folder(vm))
    followed = FollowedPolicy(file, vm, source=source, records=records, moved=moved)
    with system.exclusive_lock(home.shipper_lock(vm)) as had:
        if not had:
            raise BusyError(f"{vm}: another process is replicating it just now", hint="try again in a moment")
        # With the lock, without which nobody disables it.
        protected.begin(records, vm, followed.policy, folder=home.folder(vm))
        records.of(vm).count_absence(followed.policy.frequency)
        place = location.locate(home, followed.policy, records.read(vm), vm)
        this, fence = party(home), fence_of(home, file, vm, records)

        def claim() -> Claim:
            return Claim(party=this, epoch=records.read(vm).epoch)

        with place.open(create=True) as store, closing(LocalReplica(store, vm, claim=claim)) as replica:
            # Now that it is there: once it holds a point, it is missed if it is gone.
            records.update(vm, shipped_to=None if place.is_own else place.path)

            def keep_house() -> None:
                replica.housekeep(followed.policy.retention, clock.now_ns())

            here = Shipper(
                vm=vm,
                folder=home.folder(vm),
                source=source,
                replica=replica,
                records=records.of(vm),
                policy=CurrentPolicy(followed.shipping(), look=followed.shipping),
                clock=clock,
                housekeep=keep_house,
                on_point=protected.Finalizer(
                    records, vm, store=store, source=source, housekeep=keep_house, clock=clock
                ),
                proofs_path=home.proofs(vm),
                definition=FollowedDefinition(file, home.root, vm, records=records),
                guest=GuardedGuest(vm, lambda: followed.policy.guest, home.guest(vm)),
                on_fenced=lambda: fence.enforce().held is not None,
            )
            here.thaw_leftover()
            yield here


def party(home: Home) -> Party:
    """This home as others know it."""
    from hvfuse.target.failing_over import Party

    return Party(home=home.identity(), root=home.root, host=socket.gethostname())


def fence_of(home: Home, file: ConfigFile, vm: str, records: Records) -> Fence:
    """The fence of a VM that is shipped from this home."""
    from hvfuse.control.fence import Fence

    def policy() -> VmPolicy:
        return file.current().policy(vm)

    return Fence(
        home,
        vm,
        records,
        store_path=lambda: location.store_path(home, policy(), records.read(vm), vm),
        is_strict=lambda: policy().fence == "strict",
    )


def guest_of(home: Home, vm: str, *, directory: str, comes_home: bool = False) -> FailoverGuest:
    """The guest of a VM on failed-over disks. What travelled with the VM may be there only since this command began, so
    the configuration is read anew."""
    from hvfuse.control.failover_guests import FailoverGuest
    from hvfuse.control.guest_settings import Site

    return FailoverGuest(
        home,
        vm,
        directory=directory,
        config=lambda: ConfigFile(home.root, uses_kept=True).current(),
        site=Site.SOURCE if comes_home else Site.TARGET,
    )


def adopter(site: Site, store: Store) -> Callable[[str | None], None]:
    """What keeps the definition that came with a recovery point in this home, or forgets it."""

    def adopt(point_id: str | None) -> None:
        data = None if point_id is None else store.definition(site.vm, point_id)
        if data is None:
            definition.forget(site.home, site.vm)
        else:
            definition.adopt(site.home, site.vm, data, point=point_id or "")

    return adopt


@contextmanager
def kept_records(home: Home) -> Iterator[Records | None]:
    """The home's records, jobs of dead processes buried; None where there are none yet. For those who only look."""
    if not os.path.isdir(home.records):
        yield None
        return
    with Records(home.records) as records:
        records.jobs.bury()
        yield records


def require_known(home: Home, records: Records | None, vm: str | None) -> None:
    """Raise NotFoundError for a VM that has neither folder nor record: its name is a mistake. None: all VMs."""
    if vm is None or os.path.isdir(home.folder(vm)) or (records is not None and vm in records.names()):
        return
    raise NotFoundError(f"there is no VM {vm}: no directory {home.folder(vm)}", hint="hvfuse status")


def drop_staged(home: Home, policy: VmPolicy, vm: str, records: Records) -> None:
    """Drop what the store holds of a copy that was given up. Whoever is just making it has to do that himself."""
    from hvfuse.target.local import LocalReplica

    home.make_vm(vm)
    with system.exclusive_lock(home.shipper_lock(vm)) as had:
        if had:
            with location.opened(location.locate(home, policy, records.read(vm), vm)) as store, suppress(NotFoundError):
                if store is not None:
                    with closing(LocalReplica(store, vm)) as replica:
                        replica.abandon()


class StoreFacts:
    """What the stores tell of VMs; one that is not there yet knows nothing of any. `locate`: says where a VM's is."""

    def __init__(self, locate: Callable[[str], Location]) -> None:
        self._locate = locate
        self._stores: dict[str, Store] = {}

    def facts(self, vm: str) -> TargetFacts:
        """What the health rules want to know. Raises StoreMissingError, UnreachableError, UsageError where the store
        is not there, though it should be."""
        from hvfuse.control import trial
        from hvfuse.control.facts import StandingTest, TargetFacts

        store = self._open(self._locate(vm))
        try:
            if store is None:
                return TargetFacts()
            count, newest, state = store.summary(vm)
            record = store.vm(vm)
        except NotFoundError:
            return TargetFacts()
        tests = tuple(
            StandingTest(id=pin.id, since_ns=pin.created_ns, is_served=trial.is_alive(pin))
            for pin in trial.trials(store, vm)
        )
        return TargetFacts(
            points=count,
            newest_id=None if newest is None else newest.id,
            newest_ns=None if newest is None else newest.time_ns,
            state=ReplicationState(state) if state else None,
            tests=tests,
            replica=record,
        )

    def position(self, vm: str) -> Position | None:
        """Where the replica of a VM stands; None if it has none. Raises as `facts`."""
        store = self._open(self._locate(vm))
        try:
            return None if store is None else store.vm(vm).position
        except NotFoundError:
            return None

    def close(self) -> None:
        """Let the stores go."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    def held(self, path: str) -> list[str]:
        """The VMs of the store at `path` that were replicated to it, or failed over from it. Raises HvfuseError."""
        store = self._open(Location(vm="", path=path, is_own=True, has_point=False))
        found = [] if store is None else store.vms()
        return [vm.name for vm in found if vm.position is not None or vm.failover is not None]

    def _open(self, place: Location) -> Store | None:
        if place.path not in self._stores:
            store = place.find(read_only=True)
            if store is None:
                return None
            self._stores[place.path] = store
        return self._stores[place.path]


def location_of(session: Session, vm: str, records: Records | None) -> Location:
    """Where a VM's replica lies."""
    record = VmRecord()
    with suppress(CorruptError):  # that is told elsewhere, and concerns no store
        record = record if records is None else records.read(vm)
    return location.locate(session.home, session.config.policy(vm), record, vm)


@contextmanager
def store_facts(session: Session, records: Callable[[], Records | None]) -> Iterator[StoreFacts]:
    """What asks the stores, which are opened when they are there, and closed at the end. `records`: as far as there are
    any by now."""
    with closing(StoreFacts(lambda vm: location_of(session, vm, records()))) as facts:
        yield facts
