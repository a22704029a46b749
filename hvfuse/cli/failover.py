"""`hvfuse failover`: try a recovery point out, and clean up; the other flows are in `hvfuse.cli.failing_over`."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from hvfuse.cli import failing_over, wiring
from hvfuse.cli.main import Session
from hvfuse.cli.output import emit_json, json_option, note, one_line, print_table, time_text
from hvfuse.control import location, trial
from hvfuse.control.guest_settings import Mode
from hvfuse.control.home import Home
from hvfuse.control.job import JobKind
from hvfuse.control.jobs import Running
from hvfuse.control.location import all_locations
from hvfuse.control.records import Records
from hvfuse.control.site import Site
from hvfuse.errors import HvfuseError, NotFoundError, UsageError
from hvfuse.mountpoint import is_mounted
from hvfuse.system import SystemClock
from hvfuse.target.schema import Pin
from hvfuse.target.store import Store

_CHOOSE, _MOUNT, _BOOT, _VALIDATE = "choose the recovery point", "mount it", "boot the guest", "validate"
_SHUT_DOWN, _UNMOUNT, _DROP = "shut the guest down", "unmount", "drop what was written"
_RELEASE = "let the recovery point go"
_CLEANUP_STEPS = (_SHUT_DOWN, _UNMOUNT, _DROP, _RELEASE)


@click.group()
def failover() -> None:
    """Fail a VM over to a recovery point: on trial, planned, or as its source is lost.

    A test leaves replication as it is, and nothing written to its disks reaches the replica or the source. Of any other
    failover, nothing is final before `hvfuse failover commit`.
    """


for _flow in (
    failing_over.planned, failing_over.unplanned, failing_over.change_point, failing_over.commit, failing_over.cancel,
):  # fmt: skip
    failover.add_command(_flow)


@failover.command()
@click.argument("vm")
@click.option(
    "--point",
    default=trial.LATEST,
    show_default=True,
    metavar="P",
    help="The recovery point: latest, latest-app-consistent, an id (see `hvfuse point list`), or a time such as "
    "2026-11-22T18:30, which means the last one not after it.",
)
@click.option(
    "--mount", "directory", metavar="DIR", help="Where to show the disks; made if missing.  [default: mnt/VM - Test]"
)
@click.option("--boot", is_flag=True, help="Start the guest that [vm.NAME.guest] describes, on its test networks.")
@click.option("--validate", is_flag=True, help="Run its validation hook, and keep the verdict with the test.")
@json_option
@click.pass_obj
def test(
    session: Session, vm: str, *, point: str, directory: str | None, boot: bool, validate: bool, as_json: bool
) -> None:
    """Show VM's disks as they were at a recovery point, at DIR, writable.

    What is written there is kept apart until `hvfuse failover cleanup`. It takes the same time whatever
    the size of the disks; several tests may stand at once.
    """
    with _records(session) as records, _store(session, vm, records) as (home, store):
        directory = os.path.abspath(directory or _free_directory(home, vm))
        more = (*(("--boot",) if boot else ()), *(("--validate",) if validate else ()))
        words = ("failover", "test", vm, "--point", point, "--mount", directory, *more)
        store.vm(vm)  # raises NotFoundError
        steps = (_CHOOSE, _MOUNT, *((_BOOT,) if boot else ()), *((_VALIDATE,) if validate else ()))
        with records.jobs.run(JobKind.TEST_FAILOVER, vm, steps=steps, command=words) as job:
            job.step(_CHOOSE)
            chosen = trial.find_point(store, vm, point)
            job.note(f"{chosen.id}, {time_text(chosen.time_ns)}")
            job.step(_MOUNT)
            pin = trial.begin(home, store, chosen, directory, clock=SystemClock())
            job.note(f"test failover {pin.id} at {pin.owner['mountpoint']}")
            if boot or validate:
                _adopt(session, store, records, vm, chosen.id)
                pin = _try_guest(home, store, job, pin, boot=boot, validate=validate)
    fields = _fields(store, pin)
    if as_json:
        emit_json({**fields, "time": time_text(chosen.time_ns)})
        return
    click.echo(f"{vm} at recovery point {chosen.id} ({time_text(chosen.time_ns)}) is mounted at {fields['mountpoint']}")
    click.echo(f"when done: hvfuse failover cleanup {vm} {pin.id}")


def _adopt(session: Session, store: Store, records: Records, vm: str, point_id: str) -> None:
    """Where the VM is another home's, what travelled with the point says how it is booted."""
    home = session.home
    if not location.is_source(home, records.read(vm), vm):
        site = Site(home=home, policy=session.config.policy(vm), vm=vm, records=records, clock=SystemClock())
        wiring.adopter(site, store)(point_id)


def _try_guest(home: Home, store: Store, job: Running, pin: Pin, *, boot: bool, validate: bool) -> Pin:
    """Boot the guest of a test, validate it; the verdict is kept with the test whatever it is."""
    home.make_state(pin.vm)
    guest = wiring.guest_of(home, pin.vm, directory=str(pin.owner["mountpoint"]))
    if boot:
        job.step(_BOOT)
        job.note(guest.boot(Mode.TEST, pin.point_id))
    if validate:
        job.step(_VALIDATE)
        try:
            job.note(guest.validate(Mode.TEST, pin.point_id))
        except HvfuseError as error:
            error.hint = error.hint or f"look at {pin.owner['mountpoint']}; hvfuse failover cleanup {pin.vm} {pin.id}"
            raise
        finally:
            pin = store.update_pin(pin.id, {"validation": guest.verdict})
    return pin


@failover.command()
@click.argument("vm", required=False)
@click.argument("test_id", metavar="[ID]", required=False)
@click.option("--all", "everything", is_flag=True, help="The tests of all VMs.")
@click.option("--force", is_flag=True, help="End a test although programs use its disks.")
@click.option("--note", "remark", metavar="TEXT", help="What came out of the test; kept with it.")
@json_option
@click.pass_obj
def cleanup(
    session: Session,
    vm: str | None,
    test_id: str | None,
    *,
    everything: bool,
    force: bool,
    remark: str | None,
    as_json: bool,
) -> None:
    """End VM's test failovers, or only the one with that ID: unmount, and drop what was written.

    Works as well when the test's process or the whole machine died meanwhile. Only with its cleanup is a test
    complete, and told by `hvfuse measure`.
    """
    if (vm is None) is not everything:
        raise UsageError("name a VM, or give --all", hint="hvfuse failover cleanup --help")
    home = session.home
    with _records(session) as records, _stores(session, vm, records) as stores:
        found = _chosen(session, stores, vm, test_id, records)
        for store, pin in found:
            _clean_up(home, store, records, pin, force=force, remark=remark)
            if not as_json:
                click.echo(f"ended test failover {pin.id} of {pin.vm} at {pin.owner['mountpoint']}")
    if as_json:
        emit_json({"cleaned": [_fields(store, pin) for store, pin in found]})
    elif not found:
        click.echo("there was no test failover to clean up")


def _clean_up(home: Home, store: Store, records: Records, pin: Pin, *, force: bool, remark: str | None) -> None:
    """Clean one test up, as a job, and keep that it was made."""
    options = (*(("--force",) if force else ()), *(() if remark is None else ("--note", remark)))
    words = ("failover", "cleanup", pin.vm, str(pin.id), *options)
    with records.jobs.run(JobKind.CLEANUP, pin.vm, steps=_CLEANUP_STEPS, command=words) as job:
        job.step(_SHUT_DOWN)
        guest = wiring.guest_of(home, pin.vm, directory=str(pin.owner["mountpoint"]))
        job.note(guest.shut_down(Mode.TEST) or "there is none")
        job.step(_UNMOUNT)
        trial.unmount(pin, force=force)
        job.step(_DROP)
        trial.drop_written(home, store, pin)
        job.step(_RELEASE)
        # Before the pin goes: without it nobody would do this again.
        records.update(
            pin.vm,
            last_test={
                "point": pin.point_id, "started_ns": pin.created_ns, "ended_ns": time.time_ns(), "note": remark,
                "validation": pin.owner.get("validation"),
            },
        )  # fmt: skip
        store.unpin(pin.id)


@failover.command("list")
@click.argument("vm", required=False)
@json_option
@click.pass_obj
def list_tests(session: Session, vm: str | None, as_json: bool) -> None:
    """List the test failovers that were not cleaned up yet."""
    with wiring.kept_records(session.home) as records, _stores(session, vm, records) as stores:
        found = _chosen(session, stores, vm, None, records)
    if as_json:
        emit_json({"tests": [{**_fields(store, pin), "alive": trial.is_alive(pin)} for store, pin in found]})
        return
    if not found:
        click.echo("There is no test failover.")
        return
    rows = [
        (
            str(pin.id),
            pin.vm,
            pin.point_id,
            time_text(pin.created_ns),
            pin.owner["mountpoint"] + ("" if trial.is_alive(pin) else " (not mounted any more)"),
        )
        for _, pin in found
    ]
    print_table(("ID", "VM", "POINT", "SINCE", "MOUNTED AT"), rows, right=("ID",))


def _chosen(
    session: Session, stores: Sequence[Store], vm: str | None, test_id: str | None, records: Records | None
) -> Sequence[tuple[Store, Pin]]:
    """The test failovers that are meant, each with its store: an id is one of a store's, and as many tests may bear it
    as there are stores. Raises NotFoundError, UsageError."""
    standing = [(store, pin) for store in stores for pin in trial.trials(store)]
    found = [(store, pin) for store, pin in standing if vm is None or pin.vm == vm]
    if test_id is None:
        if vm is not None and not found and not os.path.isdir(session.home.folder(vm)):
            with _store(session, vm, records) as (_, store):
                store.point_count(vm)  # raises NotFoundError: there is not even such a VM
        return found
    number = trial.parse_id(test_id)
    found = [(store, pin) for store, pin in found if pin.id == number]
    if not found:
        for _, pin in standing:
            if pin.id == number:
                hint = f"hvfuse failover cleanup {pin.vm} {pin.id}"
                raise NotFoundError(f"test failover {pin.id} is of {pin.vm}", hint=hint)
        raise NotFoundError(f"there is no test failover {number}", hint="hvfuse failover list")
    if len(found) > 1:
        where = " and ".join(store.path for store, _ in found)
        hint = f"to end all tests of {vm}: hvfuse failover cleanup {vm}"
        raise UsageError(f"there is a test failover {number} of {vm} in {where}", hint=hint)
    return found


@contextmanager
def _store(session: Session, vm: str, records: Records | None) -> Iterator[tuple[Home, Store]]:
    """The store that the VM's replica lies in. Raises NotFoundError, UnreachableError."""
    with wiring.location_of(session, vm, records).open() as store:
        yield session.home, store


@contextmanager
def _stores(session: Session, vm: str | None, records: Records | None) -> Iterator[list[Store]]:
    """Every store in which tests may stand: the home's own, and those that its VMs are shipped to. One that is not
    reached is told, and keeps nobody from the others; but the VM's own has to be there. Raises NotFoundError if there
    is no store at all."""
    needed = wiring.location_of(session, vm, records).path if vm is not None else None
    stores: list[Store] = []
    missing: list[NotFoundError] = []
    with ExitStack() as stack:
        for place in all_locations(session.home, session.config, records):
            try:
                stores.append(stack.enter_context(place.open()))
            except HvfuseError as error:
                if needed == place.path:
                    raise
                if place.is_own and isinstance(error, NotFoundError):  # nothing was ever shipped hither
                    missing.append(error)
                else:
                    note(f"hvfuse: {one_line(str(error))}")
        if missing and not stores:
            raise missing[0]
        yield stores


def _free_directory(home: Home, vm: str) -> str:
    """Where no other test of the VM is mounted: mnt/VM - Test, mnt/VM - Test 2, …"""
    for number in itertools.count(1):
        path = os.path.join(home.mnt, f"{vm} - Test" + (f" {number}" if number > 1 else ""))
        if not is_mounted(path):
            return path
    raise AssertionError


def _records(session: Session) -> Records:
    return Records(session.prepare().records)


def _fields(store: Store, pin: Pin) -> dict[str, Any]:
    return {
        "store": store.path,
        "vm": pin.vm,
        "id": pin.id,
        "point": pin.point_id,
        "since": time_text(pin.created_ns),
        "mountpoint": pin.owner["mountpoint"],
        "pid": pin.owner["pid"],
        "validation": pin.owner.get("validation"),
    }
