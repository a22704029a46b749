"""What the process at a VM's mount serves: its tracked folder, or a recovery point that it was failed over at."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from hvfuse.cli import wiring
from hvfuse.cli.main import Session
from hvfuse.control import location
from hvfuse.control.home import Home
from hvfuse.control.job import JobKind, JobState
from hvfuse.control.records import Records
from hvfuse.errors import HvfuseError, NotFoundError, StateError
from hvfuse.formats.image import is_disk_name
from hvfuse.states import FAILOVER_DONE
from hvfuse.system import SystemClock
from hvfuse.target import standing

if TYPE_CHECKING:
    from hvfuse.target.hydration import Progress
    from hvfuse.target.store import Store
    from hvfuse.target.view import Point

HYDRATE_STEP, RELEASE_STEP = "hydrate", "let the replica go"


def is_failed_over(home: Home, vm: str) -> bool:
    """Whether the VM's disks are still those of a recovery point, or only just not any more."""
    return standing.stands(home.folder(vm))


def stand_again(session: Session, home: Home, vm: str, records: Records) -> None:
    """Where the VM is failed over to here, and a flow died before its overlays were begun, begin them: what is served
    is the recovery point. Raises HvfuseError, OSError."""
    folder = home.folder(vm)
    if os.path.isdir(folder) and (is_failed_over(home, vm) or any(map(is_disk_name, os.listdir(folder)))):
        return
    from hvfuse.control.failed_over import standing as standing_failover

    place = location.locate(home, session.config.policy(vm), records.read(vm), vm)
    with suppress(NotFoundError), place.open(read_only=True) as store:
        failover = standing_failover(store, vm, wiring.party(home))
        if failover is not None and failover.get("hydrated_ns") is None:
            os.makedirs(standing.overlays(folder), mode=0o700, exist_ok=True)


def serve_tracked(session: Session, home: Home, vm: str, records: Records | None) -> None:
    """Serve the tracked folder; held where another side has the VM."""
    from hvfuse.tracker.service import run_tracker

    policy = session.config.policy(vm)
    is_disabled, held, is_moving = False, None, False
    if records is not None:
        with suppress(HvfuseError):
            record = records.read(vm)
            is_disabled, is_moving = record.enabled is False, record.giving_way is not None
            held = wiring.fence_of(home, session.config_file, vm, records).look().held
    if is_moving:
        raise StateError(
            f"{vm}: its disks are being handed over to the other side", hint=f"hvfuse replication reverse {vm}"
        )
    run_tracker(
        vm=vm,
        folder=home.folder(vm),
        mountpoint=home.mountpoint(vm),
        state_dir=home.state_dir(vm),
        exclude=policy.exclude,
        hard_limit=policy.hard_limit / 100,
        soft_limit=policy.soft_limit / 100,
        disabled=is_disabled,
        held=held,
    )


def serve_failed_over(session: Session, home: Home, vm: str, records: Records) -> None:
    """Serve the recovery point that the store says the VM was failed over at; once that is committed, hydrate it.
    Raises StateError where the store knows of no failover to here."""
    from hvfuse.control.standing import serve_standing

    policy = session.config.policy(vm)
    place = location.locate(home, policy, records.read(vm), vm)
    with ExitStack() as stack:
        store = stack.enter_context(place.open())
        hydrating = _Hydrating(session, home, vm, records, store)
        try:
            serve_standing(
                vm=vm,
                folder=home.folder(vm),
                mountpoint=home.mountpoint(vm),
                socket_path=home.tracker_socket(vm),
                point_reader=hydrating.point,
                committed=hydrating.is_committed,
                hydrated=hydrating.finish,
                tell=hydrating.tell,
                exclude=policy.exclude,
                hard_limit=policy.hard_limit / 100,
                soft_limit=policy.soft_limit / 100,
            )
        finally:
            hydrating.interrupt()


class _Hydrating:
    """What the records and the store are told on the way. Called by one thread at a time."""

    def __init__(self, session: Session, home: Home, vm: str, records: Records, store: Store) -> None:
        self._store = store
        self._vm = vm
        self._home = home
        self._session = session
        self._records = records
        self._party = wiring.party(home)
        self._job: int | None = None

    def point(self) -> Point:
        """The point, opened. Raises StateError."""
        from hvfuse.control.failed_over import standing as standing_failover
        from hvfuse.target.journal import PointReader

        failover = standing_failover(self._store, self._vm, self._party)
        if failover is None:
            raise StateError(
                f"{self._vm}: {standing.overlays(self._home.folder(self._vm))} is of a failover that does "
                "not stand any more",
                hint=f"hvfuse failover cancel {self._vm}",
            )
        return PointReader(self._store, self._vm, str(failover["point"]))

    def is_committed(self) -> bool:
        """Whether the disks may become plain ones; then the record says that this home has the VM."""
        from hvfuse.control.failed_over import take_over
        from hvfuse.control.site import Site
        from hvfuse.target.failing_over import state_of

        record = self._store.vm(self._vm)
        if state_of(record) not in FAILOVER_DONE:
            return False
        policy = self._session.config.policy(self._vm)
        site = Site(home=self._home, policy=policy, vm=self._vm, records=self._records, clock=SystemClock())
        take_over(site, self._store.path, record, self._party)
        return True

    def tell(self, progress: Progress) -> None:
        """Keep how far it is, in a job."""
        from hvfuse.control.jobs import Running

        percent = 100 * progress.done // progress.total if progress.total else 100
        Running(self._records.jobs, self._take_job(), SystemClock()).progress(percent)

    def _take_job(self) -> int:
        if self._job is None:
            self._job = self._records.jobs.take_up(
                JobKind.HYDRATE, self._vm, steps=(HYDRATE_STEP, RELEASE_STEP), command=("mount", self._vm)
            )
        return self._job

    def finish(self) -> None:
        """The disks are plain ones: the replica is of no use any more."""
        from hvfuse.target import failing_over

        job, now_ns = self._take_job(), SystemClock().now_ns()
        self._records.jobs.change(job, lambda one: one.step(RELEASE_STEP, now_ns))
        self.is_committed()
        with suppress(NotFoundError):
            failing_over.let_go(self._store, self._vm, self._party)
        self._records.jobs.change(job, lambda one: one if one.has_ended else one.succeed(SystemClock().now_ns()))
        self._job = None

    def interrupt(self) -> None:
        """The process ends."""
        if self._job is not None:
            with suppress(HvfuseError):
                now_ns = SystemClock().now_ns()
                self._records.jobs.change(
                    self._job, lambda one: one.interrupt(now_ns) if one.state is JobState.IN_PROGRESS else one
                )
