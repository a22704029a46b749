"""Failover as the target does it: from the store alone, whatever has become of the source.

What stands is written down in the store (`hvfuse.target.failing_over`) and in the VM's folder:

    disks/VM/.failover/     what was written to the failed-over disks (`hvfuse.control.standing`)
    state/vms/VM/           the process that serves them, as any tracker; the VM's definition

Until it is committed, a failover can be cancelled or be at another point, and each of that leaves nothing behind. The
source is told by the store: it can ship nothing from the moment that the epoch is raised.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hvfuse.control import flows, trial
from hvfuse.control.failover_guests import FailoverGuest
from hvfuse.control.job import JobKind
from hvfuse.control.protection import was_interrupted
from hvfuse.control.site import Site
from hvfuse.control.sole_server import nobody_serves, start_tracker
from hvfuse.control.supervisor import is_standing, require_mountable
from hvfuse.errors import BusyError, HvfuseError, NotFoundError, StateError
from hvfuse.formats.image import is_disk_name
from hvfuse.manifest import RecoveryPoint
from hvfuse.mountpoint import check_mountpoint, clear_dead_mount
from hvfuse.states import FAILOVER_DONE, FAILOVER_OPEN, Event, ReplicationState
from hvfuse.target import failing_over, schema
from hvfuse.target.failing_over import PLANNED, Party, state_of
from hvfuse.target.standing import drop, overlays
from hvfuse.target.store import Store

KINDS = {PLANNED: JobKind.PLANNED_FAILOVER, failing_over.UNPLANNED: JobKind.UNPLANNED_FAILOVER}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`point`: as `hvfuse failover` is told of it. `boot`, `validate`: the guest. `force`: end what uses the mount."""

    point: str = trial.LATEST
    boot: bool = False
    validate: bool = False
    force: bool = False

    def words(self) -> tuple[str, ...]:
        """As they are typed, but for the point."""
        chosen = (("--boot", self.boot), ("--validate", self.validate), ("--force", self.force))
        return tuple(word for word, is_chosen in chosen if is_chosen)


class Failover:
    """The flows of one VM at its target. `adopt`: keep the definition that came with a point here (None: forget it
    again). `guest`: what is booted on its disks."""

    def __init__(
        self,
        site: Site,
        party: Party,
        store: Store,
        *,
        guest: FailoverGuest,
        adopt: Callable[[str | None], None] = lambda point_id: None,
    ) -> None:
        self._site = site
        self._vm = site.vm
        self._party = party
        self._store = store
        self._guest = guest
        self._adopt = adopt
        self._point: RecoveryPoint | None = None
        self._wants_latest = False
        self._alone = contextlib.ExitStack()
        """That nobody serves the VM meanwhile."""

    # The flows ------------------------------------------------------------------------------------------------

    def begin(self, kind: str, options: Options) -> RecoveryPoint:
        """Fail over. Returns the point. Idempotent: where the same failover stands, its disks are mounted again.
        Raises StateError, NotFoundError, BusyError, PrerequisiteError."""
        acts = {
            flows.CHOOSE: lambda: self._choose(kind, options),
            flows.TAKE: lambda: self._take(kind),
            flows.MOUNT: self._mount,
            flows.BOOT: lambda: self._guest.boot(kind, self._chosen.id),
            flows.VALIDATE: lambda: self._guest.validate(kind, self._chosen.id),
        }
        point = ("--point", options.point) if options.point != trial.LATEST else ()
        self._run(
            KINDS[kind],
            flows.failover(boot=options.boot, validate=options.validate),
            acts,
            ("failover", kind, self._vm, *point, *options.words(), "--yes"),
        )
        return self._chosen

    def change_point(self, options: Options) -> RecoveryPoint:
        """Have the VM failed over at another point. What was written since is dropped. Raises as `begin`."""
        failover = failing_over.demand_mine(self._store.vm(self._vm), self._party)
        kind = str(failover["kind"])
        acts = {
            flows.CHOOSE: lambda: self._choose_other(kind, options),
            flows.SHUT_DOWN: self._shut_down,
            flows.UNMOUNT: lambda: self._unmount(force=options.force),
            flows.DROP: self._drop,
            flows.CHANGE: self._change,
            flows.MOUNT: self._mount,
            flows.BOOT: lambda: self._guest.boot(kind, self._chosen.id),
            flows.VALIDATE: lambda: self._guest.validate(kind, self._chosen.id),
        }
        self._run(
            KINDS[kind],
            flows.change_point(boot=options.boot, validate=options.validate),
            acts,
            ("failover", "change-point", self._vm, "--point", options.point, *options.words(), "--yes"),
        )
        return self._chosen

    def cancel(self, *, force: bool) -> None:
        """The VM is its source's again, and what was written here is dropped. Raises StateError, BusyError."""
        has_given_back = self._has_given_back()
        if not has_given_back:
            failing_over.demand_mine(self._store.vm(self._vm), self._party)
            self._demand_open()
        acts: dict[flows.FlowStep, Callable[[], str | None]] = {
            flows.SHUT_DOWN: self._shut_down if not has_given_back else lambda: None,
            flows.UNMOUNT: lambda: self._unmount(force=force),
            flows.DROP: self._drop,
            flows.GIVE_BACK: self._give_back,
        }
        self._run(JobKind.CANCEL_FAILOVER, flows.CANCEL, acts, ("failover", "cancel", self._vm, "--yes"))

    def commit(self) -> None:
        """The VM is this side's for good; its disks are hydrated in the background. Raises StateError."""
        failing_over.demand_mine(self._store.vm(self._vm), self._party)
        acts: dict[flows.FlowStep, Callable[[], str | None]] = {
            flows.FINAL: self._make_final,
            flows.OWN: lambda: take_over(self._site, self._store.path, self._store.vm(self._vm), self._party),
        }
        self._run(JobKind.COMMIT, flows.COMMIT, acts, ("failover", "commit", self._vm, "--yes"))

    def _run(
        self,
        kind: JobKind,
        steps: tuple[flows.FlowStep, ...],
        acts: Mapping[flows.FlowStep, Callable[[], str | None]],
        command: tuple[str, ...],
    ) -> None:
        jobs = self._site.records.jobs
        with self._alone, jobs.run(kind, self._vm, steps=[step.name for step in steps], command=command) as job:
            flows.drive(job, steps, acts)

    # The steps ------------------------------------------------------------------------------------------------

    @property
    def _chosen(self) -> RecoveryPoint:
        assert self._point is not None
        return self._point

    def _demand_open(self) -> None:
        state = state_of(self._store.vm(self._vm))
        if state in FAILOVER_DONE:
            raise StateError(
                f"{self._vm}: its failover is committed, from which nothing leads back",
                hint=f"hvfuse replication reverse {self._vm}",
            )

    def _choose(self, kind: str, options: Options) -> str:
        wanted, vm = options.point, self._store.vm(self._vm)
        self._demand_free()
        self._demand_open()
        stands = vm.failover if state_of(vm) in FAILOVER_OPEN else None
        if kind == PLANNED and vm.prepared is not None:
            wanted = str(vm.prepared["point"])
        elif stands is not None and wanted == trial.LATEST:
            wanted = str(stands["point"])  # the same command goes on
        self._point = trial.find_point(self._store, self._vm, wanted)
        self._wants_latest = wanted == trial.LATEST
        if stands is None:
            self._demand_room()
        self._demand_guest(kind, options)
        return self._told()

    def _choose_other(self, kind: str, options: Options) -> str:
        self._demand_open()
        self._point = trial.find_point(self._store, self._vm, options.point)
        self._demand_guest(kind, options)
        return self._told()

    def _demand_guest(self, kind: str, options: Options) -> None:
        """Raises UsageError if what is to boot or to validate is not described: before the source loses the VM. The
        description may have come with the point; it is kept only if it will do."""
        if not options.boot and not options.validate:
            return
        standing_now = standing(self._store, self._vm, self._party)
        self._adopt(self._chosen.id)
        try:
            disks = [disk.name for disk in self._chosen.disks]
            self._guest.demand(kind, self._chosen.id, disks, boot_it=options.boot, validate_it=options.validate)
        except HvfuseError:
            self._adopt(str(standing_now["point"]) if standing_now is not None else None)
            raise

    def _demand_room(self) -> None:
        """Raises BusyError, UsageError, if the disks cannot be mounted, or there are others in their folder: also one
        that was left out when this side gave way, as whoever finds it takes the disks for plain ones already."""
        home, folder = self._site.home, self._site.home.folder(self._vm)
        found = os.listdir(folder) if os.path.isdir(folder) and not is_standing(folder) else []
        for path in sorted(os.path.join(folder, name) for name in found if is_disk_name(name)):
            raise BusyError(f"{path}: is there already, where the failed-over disks are to be", hint=f"mv {path} …")
        clear_dead_mount(home.mountpoint(self._vm))
        check_mountpoint(home.mountpoint(self._vm))

    def _told(self) -> str:
        return f"{self._chosen.id}, {len(self._chosen.disks)} disks"

    def _demand_free(self) -> None:
        """Raises StateError, BusyError if this home has the VM, or disks where its disks are to be."""
        record = self._site.records.read(self._vm)
        if record.state is not ReplicationState.DISABLED:
            raise StateError(
                f"{self._vm} is {record.state} in this home, which is its source: it can fail over to another one",
                hint="on the target: hvfuse --home DIR failover …; to look at a point here: "
                f"hvfuse failover test {self._vm}",
            )
        require_mountable()

    def _take(self, kind: str) -> str:
        record = self._site.records.read(self._vm)
        vm = failing_over.fail_over(
            self._store,
            self._vm,
            self._party,
            kind=kind,
            point_id=self._chosen.id,
            comes_home=record.gave_way_ns is not None,
            is_newest=kind != PLANNED and self._wants_latest,
        )
        assert vm.failover is not None
        if vm.failover["point"] != self._chosen.id:  # one more came just now
            self._point = self._store.point(self._vm, str(vm.failover["point"]))
        return f"epoch {vm.epoch}, at recovery point {self._chosen.id}"

    def _mount(self) -> str:
        home = self._site.home
        os.makedirs(overlays(home.folder(self._vm)), mode=0o700, exist_ok=True)
        home.make_vm(self._vm)
        self._adopt(self._chosen.id)
        self._alone.close()
        start_tracker(home, self._vm, clock=self._site.clock)
        return home.mountpoint(self._vm)

    def _shut_down(self) -> str | None:
        vm = self._store.vm(self._vm)
        return self._guest.shut_down(str(failing_over.demand_mine(vm, self._party)["kind"]))

    def _has_given_back(self) -> bool:
        """Whether a cancel has died just behind the store's transaction, or has left something in another way."""
        if self._store.vm(self._vm).failover is not None:
            return False
        is_left = is_standing(self._site.home.folder(self._vm))
        return is_left or was_interrupted(self._site, JobKind.CANCEL_FAILOVER)

    def _unmount(self, *, force: bool) -> None:
        """Nobody serves the VM from here on until it is mounted again, or the flow has ended."""
        alone = nobody_serves(self._site.home, self._vm, clock=self._site.clock, force=force)
        self._alone.enter_context(alone)

    def _drop(self) -> None:
        drop(self._site.home.folder(self._vm))

    def _change(self) -> str:
        failing_over.change_point(self._store, self._vm, self._party, self._chosen.id)
        return self._told()

    def _give_back(self) -> None:
        if self._store.vm(self._vm).failover is not None:
            failing_over.cancel(self._store, self._vm, self._party)
        self._adopt(None)
        with contextlib.suppress(OSError):
            os.rmdir(self._site.home.folder(self._vm))

    def _make_final(self) -> str:
        vm = failing_over.commit(self._store, self._vm, self._party)
        assert vm.failover is not None
        return f"at recovery point {vm.failover['point']}"


def take_over(site: Site, store: str, vm: schema.VmRecord, party: Party) -> None:
    """Have this home's record say that it has the VM, by the store in that directory. Idempotent. Raises StateError."""
    failover = failing_over.demand_mine(vm, party)
    record = site.records.read(site.vm)
    if record.state is ReplicationState.DISABLED and record.epoch < int(failover["epoch"]):
        site.records.apply(
            site.vm, Event.TAKE_OVER, enabled=None, epoch=int(failover["epoch"]), store=store, held=None,
            gave_way_ns=None, error=None, hint=None, point=None, cycle=0, generation=None, protected_since_ns=None,
            resync_reason=None, resync_cause=None, copy=None, progress=None, orders={},
        )  # fmt: skip


def standing(store: Store, vm: str, party: Party) -> Mapping[str, Any] | None:
    """The failover of a VM that stands in this home; None if none does."""
    with contextlib.suppress(NotFoundError):
        record = store.vm(vm)
        if record.failover is not None and record.failover["home"] == party.home:
            return record.failover
    return None
