"""`hvfuse failover`: try a recovery point out, and clean up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from hvfuse.cli.main import Session
from hvfuse.cli.output import emit_json, json_option, print_table, time_text
from hvfuse.control import trial
from hvfuse.control.home import Home
from hvfuse.control.job import JobKind
from hvfuse.control.records import Records
from hvfuse.errors import NotFoundError, UsageError
from hvfuse.system import SystemClock
from hvfuse.target.schema import Pin
from hvfuse.target.store import Store

_CHOOSE, _MOUNT = "choose the recovery point", "mount it"
_TEST_STEPS = (_CHOOSE, _MOUNT)
_UNMOUNT, _DROP, _RELEASE = "unmount", "drop what was written", "let the recovery point go"
_CLEANUP_STEPS = (_UNMOUNT, _DROP, _RELEASE)


@click.group()
def failover() -> None:
    """Try out a recovery point on writable disks.

    Replication goes on meanwhile, and nothing written there reaches the replica or the source.
    """


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
@click.option("--mount", "directory", required=True, metavar="DIR", help="Where to show the disks; made if missing.")
@json_option
@click.pass_obj
def test(session: Session, vm: str, point: str, directory: str, as_json: bool) -> None:
    """Show VM's disks as they were at a recovery point, at DIR, writable.

    What is written there is kept apart until `hvfuse failover cleanup`. It takes the same time whatever
    the size of the disks; several tests may stand at once.
    """
    words = ("failover", "test", vm, "--point", point, "--mount", os.path.abspath(directory))
    with _store(session) as (home, store), _records(session) as records:
        points = store.points(vm)
        with records.jobs.run(JobKind.TEST_FAILOVER, vm, steps=_TEST_STEPS, command=words) as job:
            job.step(_CHOOSE)
            chosen = trial.choose(points, point, vm=vm)
            job.note(f"{chosen.id}, {time_text(chosen.time_ns)}")
            job.step(_MOUNT)
            pin = trial.begin(home, store, chosen, directory, clock=SystemClock())
            job.note(f"test failover {pin.id} at {pin.owner['mountpoint']}")
    fields = _fields(pin)
    if as_json:
        emit_json({**fields, "time": time_text(chosen.time_ns)})
        return
    click.echo(f"{vm} at recovery point {chosen.id} ({time_text(chosen.time_ns)}) is mounted at {fields['mountpoint']}")
    click.echo(f"when done: hvfuse failover cleanup {vm} {pin.id}")


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
    with _store(session) as (home, store):
        found = _chosen(store, vm, test_id)
        if vm is not None and not found and not os.path.isdir(home.folder(vm)):
            store.point_count(vm)  # raises NotFoundError: there is not even such a VM
        with _records(session) as records:
            for pin in found:
                _clean_up(home, store, records, pin, force=force, remark=remark)
                if not as_json:
                    click.echo(f"ended test failover {pin.id} of {pin.vm} at {pin.owner['mountpoint']}")
    if as_json:
        emit_json({"cleaned": [_fields(pin) for pin in found]})
    elif not found:
        click.echo("there was no test failover to clean up")


def _clean_up(home: Home, store: Store, records: Records, pin: Pin, *, force: bool, remark: str | None) -> None:
    """Clean one test up, as a job, and keep that it was made."""
    options = (*(("--force",) if force else ()), *(() if remark is None else ("--note", remark)))
    words = ("failover", "cleanup", pin.vm, str(pin.id), *options)
    with records.jobs.run(JobKind.CLEANUP, pin.vm, steps=_CLEANUP_STEPS, command=words) as job:
        job.step(_UNMOUNT)
        trial.unmount(pin, force=force)
        job.step(_DROP)
        trial.drop_written(home, pin)
        job.step(_RELEASE)
        # Before the pin goes: without it nobody would do this again.
        records.update(
            pin.vm,
            last_test={
                "point": pin.point_id, "started_ns": pin.created_ns, "ended_ns": time.time_ns(), "note": remark,
            },
        )  # fmt: skip
        store.unpin(pin.id)


@failover.command("list")
@click.argument("vm", required=False)
@json_option
@click.pass_obj
def list_tests(session: Session, vm: str | None, as_json: bool) -> None:
    """List the test failovers that were not cleaned up yet."""
    with _store(session) as (home, store):
        found = trial.trials(store, vm)
        if vm is not None and not found and not os.path.isdir(home.folder(vm)):
            store.point_count(vm)  # raises NotFoundError: there is not even such a VM
    if as_json:
        emit_json({"tests": [{**_fields(pin), "alive": trial.is_alive(pin)} for pin in found]})
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
        for pin in found
    ]
    print_table(("ID", "VM", "POINT", "SINCE", "MOUNTED AT"), rows, right=("ID",))


def _chosen(store: Store, vm: str | None, test_id: str | None) -> Sequence[Pin]:
    if test_id is None:
        return trial.trials(store, vm)
    pin = trial.find(store, trial.parse_id(test_id))
    if pin.vm != vm:
        raise NotFoundError(f"test failover {pin.id} is of {pin.vm}", hint=f"hvfuse failover cleanup {pin.vm} {pin.id}")
    return [pin]


@contextmanager
def _store(session: Session) -> Iterator[tuple[Home, Store]]:
    home = session.home
    with Store(home.store, create=False) as store:
        yield home, store


def _records(session: Session) -> Records:
    return Records(session.prepare().records)


def _fields(pin: Pin) -> dict[str, Any]:
    return {
        "vm": pin.vm,
        "id": pin.id,
        "point": pin.point_id,
        "since": time_text(pin.created_ns),
        "mountpoint": pin.owner["mountpoint"],
        "pid": pin.owner["pid"],
    }
