"""`hvfuse seed`: the first copy of a VM on a medium instead of over the network, or from copies that are there."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from hvfuse import wire
from hvfuse.cli.main import Session
from hvfuse.cli.output import counted, emit_json, json_option, note
from hvfuse.cli.progress import showing_copy
from hvfuse.control.daemon import serving_pid
from hvfuse.control.home import Home, check_vm_name
from hvfuse.control.job import JobKind
from hvfuse.control.location import location_of
from hvfuse.control.records import Records
from hvfuse.errors import BusyError, HvfuseError, UnreachableError, UsageError
from hvfuse.shipper.orders import Orders
from hvfuse.states import Event, ReplicationState
from hvfuse.words import bytes_text, duration_text

if TYPE_CHECKING:
    from hvfuse.control.jobs import Running
    from hvfuse.medium import SeedReader
    from hvfuse.target.local import LocalReplica

PATIENCE = 30 * 86400.0
"""Seconds: large disks on a slow medium."""
ANSWER_SECONDS = 60.0

_WRITE, _VERIFY, _IMPORT, _COPY = "write the medium", "verify the medium", "import", "copy the disks"
"""Steps of the jobs."""


@click.group()
def seed() -> None:
    """Take a VM's first copy to its target on a medium.

    At the source, `hvfuse seed export VM DIR` writes it; writes are logged while the medium travels. At the
    target, `hvfuse seed import DIR` reads it into the store. Then replication goes on with what has changed.
    """


@seed.command("export")
@click.argument("vm")
@click.argument("directory", metavar="DIR")
@json_option
@click.pass_obj
def export_command(session: Session, vm: str, directory: str, as_json: bool) -> None:
    """Write the first copy of VM's disks into DIR, which is to be empty or new.

    The VM has to be mounted, and runs on. Interrupted, the same command goes on where it was. Until the copy is
    imported at the target, nothing of the VM goes over the network (see `hvfuse seed cancel`).
    """
    home = session.home_with(vm)
    if serving_pid(home.tracker_socket(vm)) is None:
        raise UnreachableError(f"{vm} is not mounted, so nothing tracks its writes", hint=f"hvfuse mount {vm}")
    session.prepare()
    path = os.path.abspath(directory)
    words = ("seed", "export", vm, path)
    with (
        Records(home.records) as records,
        records.jobs.run(JobKind.EXPORT, vm, steps=(_WRITE,), command=words) as job,
    ):
        _refuse_while_copying(home, vm, records)
        job.step(_WRITE, path)
        with _told_on_interrupt(home, vm, directory), showing_copy(records, vm, tell=job.progress):
            report = _export(session, home, vm, records, path)
    if as_json:
        emit_json(report)
        return
    size = f"{bytes_text(report['medium_bytes'])} in {counted(report['files'], 'file')}"
    what = f"was exported before: {size}" if report["already"] else f"exported: {bytes_text(report['bytes_total'])} as "
    took = "" if report["already"] else f"{size}, in {duration_text(report['seconds'])}"
    click.echo(f"{vm}: {what}{took}")
    click.echo(f"{vm}: what is written from now on is logged; at the target: hvfuse seed import {directory}")


def _is_export(copy: Mapping[str, Any] | None) -> bool:
    return copy is not None and copy["kind"] == "export"


def _refuse_while_copying(home: Home, vm: str, records: Records) -> None:
    """Raises BusyError while the shipper copies over the network: an export would wait for the end of that."""
    record = records.read(vm)
    copying = record.state is ReplicationState.INITIAL_REPLICATION_IN_PROGRESS
    if copying and not _is_export(record.copy) and serving_pid(home.shipper_socket(vm)) is not None:
        raise BusyError(
            f"{vm}: the first copy is under way over the network",
            hint=f"to export it instead: hvfuse resync {vm} --suspend, then the same command again",
        )


@contextmanager
def _told_on_interrupt(home: Home, vm: str, directory: str) -> Iterator[None]:
    """Say at Ctrl-C what goes on."""
    background = serving_pid(home.shipper_socket(vm)) is not None
    try:
        yield
    except KeyboardInterrupt:
        if background:
            note(f"{vm}: it goes on all the same, see `hvfuse status {vm}`; to end it: hvfuse seed cancel {vm}")
        else:
            note(f"{vm}: stopped here; to go on: hvfuse seed export {vm} {directory}")
        raise


def _export(session: Session, home: Home, vm: str, records: Records, path: str) -> dict[str, Any]:
    """Have the VM's shipper do it, or do it here if none runs. Returns the fields of `ExportReport`."""
    if serving_pid(home.shipper_socket(vm)) is not None:
        answer = wire.request(home.shipper_socket(vm), "export", timeout=PATIENCE, directory=path)
        return {name: value for name, value in answer.items() if name != "ok"}
    from hvfuse.cli.wiring import shipper

    home.make_vm(vm)
    with shipper(home, session.config_file, vm, records) as here:
        return here.export(path).as_json()


@seed.command()
@click.argument("vm")
@json_option
@click.pass_obj
def cancel(session: Session, vm: str, as_json: bool) -> None:
    """Do not wait for VM's export to be imported: copy over the network after all.

    An export under way ends. What is on the medium can be imported as long as the copy has not begun.
    """
    from hvfuse.shipper.export import without_seed

    home = session.home_with(vm)
    session.prepare()
    with Records(home.records) as records:
        generation = records.orders(vm).seed
        # Before the copy over the network may begin. An export that is still under way does it itself.
        if _is_export(records.read(vm).copy):
            records.update(vm, copy=None, progress=None)
        if generation is not None and serving_pid(home.shipper_socket(vm)) is not None:
            answer = wire.request(home.shipper_socket(vm), "unseed", timeout=ANSWER_SECONDS)
            assert Orders.from_json(answer["orders"]).seed is None
        else:
            records.change_orders(vm, without_seed)
            if records.read(vm).state is ReplicationState.WAITING_FOR_INITIAL_REPLICATION:
                records.apply(vm, Event.NEED_FIRST_COPY)
    if as_json:
        emit_json({"vm": vm, "cancelled": generation is not None, "generation": generation})
    elif generation is None:
        click.echo(f"{vm}: no export is waited for")
    else:
        click.echo(f"{vm}: the export is not waited for any more; the first copy goes over the network")


@seed.command("import")
@click.argument("directory", metavar="DIR")
@click.option("--name", metavar="VM", help="The VM's name in this store.  [default: as at its source]")
@click.option(
    "--existing",
    metavar="VM",
    help="DIR holds plain copies of this VM's disks, not an export: take them; only what differs is sent then.",
)
@json_option
@click.pass_obj
def import_command(session: Session, directory: str, name: str | None, existing: str | None, as_json: bool) -> None:
    """Read the export in DIR into this installation's store. To be run at the target.

    All of it is verified before any of it is used. Interrupted, the same command goes on where it was.
    The source, whose store this is, goes on by itself with what was written since the export.
    """
    if existing is not None and name is not None:
        raise UsageError("--name and --existing do not go together", hint="hvfuse seed import --help")
    path = os.path.abspath(directory)
    report = _adopt(session, path, existing) if existing is not None else _import(session, path, name)
    _wake_shipper(session.home, report["vm"], report["generation"])
    if as_json:
        emit_json(report)
        return
    vm = report["vm"]
    if report["already"]:
        click.echo(f"{vm}: was imported before")
    else:
        took = duration_text(report["seconds"])
        click.echo(
            f"{vm}: imported: {bytes_text(report['bytes_total'])}, {bytes_text(report['bytes_read'])} read, in {took}"
        )


@contextmanager
def _told_to_repeat(vm: str, how: str) -> Iterator[None]:
    """Say at Ctrl-C what the same command does then."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"{vm}: stopped; the same command {how}")
        raise


def _wake_shipper(home: Home, vm: str, generation: str) -> None:
    """Have the VM's shipper, if one runs here, look at its replica at once, which stands at `generation` now."""
    socket = home.shipper_socket(vm)
    if serving_pid(socket) is None:
        return
    with Records(home.records) as records:
        awaited = records.orders(vm).seed
    if awaited in (None, generation):  # so that nothing else is taken back
        with suppress(HvfuseError):  # it looks by itself, if later
            wire.request(socket, "unseed", timeout=ANSWER_SECONDS)


def _import(session: Session, directory: str, name: str | None) -> dict[str, Any]:
    from hvfuse.medium import SeedReader
    from hvfuse.target.local import LocalReplica

    started = time.monotonic()
    reader = SeedReader(directory)
    cycle = reader.manifest.cycle
    vm = check_vm_name(cycle.vm if name is None else name)
    home = session.prepare()
    words = ("seed", "import", directory, *(() if name is None else ("--name", name)))
    with (
        Records(home.records) as records,
        records.jobs.run(JobKind.IMPORT, vm, steps=(_VERIFY, _IMPORT), command=words) as job,
        location_of(home, session.config, records, vm).open(create=True) as store,
        closing(LocalReplica(store, vm)) as replica,
    ):
        already = _is_imported(replica, vm, cycle.generation)
        counts = {"frames_put": 0, "frames_held": 0, "bytes_read": 0}
        if not already:
            with _told_to_repeat(vm, "goes on"):
                counts = _read_in(reader, replica, vm, job)
    return {
        "vm": vm,
        "directory": directory,
        "generation": cycle.generation.hex(),
        "disks": [disk.name for disk in cycle.disks],
        "bytes_total": sum(disk.size for disk in cycle.disks),
        "medium_bytes": reader.manifest.file_bytes,
        "frames": reader.manifest.frames,
        **counts,
        "seconds": time.monotonic() - started,
        "already": already,
    }


def _is_imported(replica: LocalReplica, vm: str, generation: bytes) -> bool:
    """Whether the store has this copy already. Raises UsageError if it has another."""
    position = replica.position()
    if position is not None and position.generation == generation:
        return True
    if position is not None or replica.points():
        raise UsageError(
            f"{vm}: the store has a replica of it already, at {position}",
            hint=f"at the source: hvfuse resync {vm} sends only what differs; or import it under another --name",
        )
    return False


def _read_in(reader: SeedReader, replica: LocalReplica, vm: str, job: Running) -> dict[str, int]:
    """Verify the medium, then put it into the replica. Returns what that took."""
    manifest = reader.manifest
    job.step(_VERIFY)
    with _bar(vm, "verifying the medium", manifest.frame_bytes) as bar:

        def passed(count: int) -> None:
            bar.update(count)
            job.progress(_share(bar, 50))

        numbers = reader.verify(passed)
    cycle = replace(manifest.cycle, vm=vm)
    held = replica.begin(cycle)
    put = read = 0
    job.step(_IMPORT)
    with _bar(vm, "importing", manifest.frame_bytes) as bar:
        for _, frame in reader.frames(but=held):
            replica.put(frame)
            put, read = put + 1, read + len(frame)
            bar.update(len(frame))
            job.progress(50 + _share(bar, 50))
    replica.commit(cycle, len(held | numbers))
    return {"frames_put": put, "frames_held": len(held), "bytes_read": read}


def _adopt(session: Session, directory: str, existing: str) -> dict[str, Any]:
    from hvfuse.target.adopt import adopt

    started = time.monotonic()
    vm = check_vm_name(existing)
    home = session.prepare()
    words = ("seed", "import", directory, "--existing", vm)
    with (
        Records(home.records) as records,
        records.jobs.run(JobKind.IMPORT, vm, steps=(_COPY,), command=words) as job,
        _told_to_repeat(vm, "begins again"),
        location_of(home, session.config, records, vm).open(create=True) as store,
        _bar(vm, "copying", 0) as bar,
    ):

        def tell(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)
            job.progress(_share(bar, 100))

        job.step(_COPY)
        report = adopt(store, vm, directory, progress=tell)
    return {
        "vm": vm,
        "directory": directory,
        "generation": report.position.generation.hex(),
        "disks": list(report.disks),
        "bytes_total": report.bytes_total,
        "bytes_read": report.bytes_written,
        "cloned": report.cloned,
        "seconds": time.monotonic() - started,
        "already": False,
    }


def _share(bar: Any, of: int) -> int:
    """How much of it the bar has passed, as a part of `of`."""
    return int(of * bar.pos // bar.length) if bar.length else 0


class _Lines:
    """In the place of a progress bar where there is no terminal: a line for each tenth. Units: bytes."""

    def __init__(self, doing: str, length: int) -> None:
        self.length = length
        self.pos = 0
        self._doing = doing
        self._told = 0

    def update(self, passed: int) -> None:
        """So much more is done."""
        self.pos += passed
        tenth = 10 * self.pos // self.length if self.length else 0
        if tenth > self._told:
            self._told = tenth
            note(f"{self._doing}, {10 * tenth} %, {bytes_text(self.pos)} of {bytes_text(self.length)}")


@contextmanager
def _bar(vm: str, doing: str, length: int) -> Iterator[Any]:
    """click's progress bar on a terminal, else lines. `length`: bytes."""
    label = f"{vm}: {doing}"
    if not sys.stderr.isatty():
        yield _Lines(label, length)
        return
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield bar
