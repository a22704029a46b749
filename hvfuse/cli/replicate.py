"""`hvfuse replicate`: one cycle now."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from hvfuse import wire
from hvfuse.cli.main import Session
from hvfuse.cli.output import emit_json, json_option, note, one_line
from hvfuse.cli.progress import showing_copy
from hvfuse.consistency import Consistency
from hvfuse.control.daemon import serving_pid
from hvfuse.control.home import Home
from hvfuse.control.records import Records
from hvfuse.control.supervisor import is_supervised
from hvfuse.errors import UnreachableError
from hvfuse.words import bytes_text, duration_text

PATIENCE = 30 * 86400.0
START_SECONDS = 5.0
"""How long `hvfuse run` may take to start a shipper."""
_LOOK_SECONDS = 0.1
"""Seconds: the cycle may have to wait for a whole copy of large disks."""
FELL_BACK = 14
"""Exit code: there is a point, but it is not application-consistent."""
_FIELDS = ("vm", "point", "cycle", "bytes_logged", "bytes_coalesced", "bytes_sent", "seconds")
_GUEST_FIELDS = ("consistency", "frozen_seconds", "freeze_error")


@click.command()
@click.argument("vm")
@click.option(
    "--app-consistent",
    "application",
    is_flag=True,
    help="Freeze the guest for a moment, so that its file systems are clean ([vm.NAME.guest] in hvfuse.toml). Where "
    "that fails, the point is crash-consistent, and the exit code 14.",
)
@json_option
@click.pass_obj
def replicate(session: Session, vm: str, application: bool, as_json: bool) -> None:
    """Make a recovery point of VM now, and wait until the store has it.

    The VM has to be mounted (`hvfuse run`, or `hvfuse mount VM`). The first time, its disks are copied; a
    resynchronisation that is needed is made first, at whatever hour (see `hvfuse resync`).
    """
    home = session.home_with(vm)
    if serving_pid(home.tracker_socket(vm)) is None:
        raise UnreachableError(f"{vm} is not mounted, so nothing tracks its writes", hint=f"hvfuse mount {vm}")
    session.prepare()
    with Records(home.records) as records, showing_copy(records, vm):
        report = make_cycle(session, home, vm, records, application=application)
    fell_back = application and report["consistency"] != Consistency.APPLICATION
    if as_json:
        emit_json({name: report[name] for name in (*_FIELDS, *_GUEST_FIELDS)})
    else:
        _tell(vm, report)
    if fell_back:
        note(f"hvfuse: {vm}: the point is crash-consistent: {one_line(str(report['freeze_error']))}")
        note("  hint: see docs/guests.md; the guest's way is set in [vm.NAME.guest] of hvfuse.toml")
        click.get_current_context().exit(FELL_BACK)


def _tell(vm: str, report: Mapping[str, Any]) -> None:
    for told in report.get("notes", ()):
        click.echo(f"{vm}: {told}")
    stood = f", {report['consistency']}" if report["consistency"] == Consistency.APPLICATION else ""
    if report["frozen_seconds"]:
        stood += f" (the guest stood still for {report['frozen_seconds']:.3f} s)"
    click.echo(
        f"{vm}: recovery point {report['point']}, cycle {report['cycle']}{stood}: "
        f"{bytes_text(report['bytes_logged'])} logged, {bytes_text(report['bytes_coalesced'])} after coalescing, "
        f"{bytes_text(report['bytes_sent'])} sent in {duration_text(report['seconds'])}"
    )


def make_cycle(session: Session, home: Home, vm: str, records: Records, *, application: bool = False) -> dict[str, Any]:
    """Have the VM's shipper make a cycle, after whatever copy it needs, or make it here if none runs. Returns
    the fields of `CycleReport`. `application`: with the guest frozen, if that can be done. Raises HvfuseError."""
    if _shipper_comes(home, vm):
        try:
            return wire.request(home.shipper_socket(vm), "cycle", timeout=PATIENCE, application=application)
        except KeyboardInterrupt:
            note(f"{vm}: it goes on all the same; `hvfuse status {vm}` tells how far it is")
            raise
    from hvfuse.cli.wiring import shipper

    home.make_vm(vm)
    with shipper(home, session.config_file, vm, records) as here:
        return here.cycle_now(application=application).as_json()


def _shipper_comes(home: Home, vm: str) -> bool:
    """Whether a shipper serves the VM. One that `hvfuse run` is just starting, as after `replication enable`, is waited
    for: two that ship the same VM get in each other's way."""
    deadline = time.monotonic() + START_SECONDS
    while serving_pid(home.shipper_socket(vm)) is None:
        if time.monotonic() > deadline or not is_supervised(home):
            return False
        time.sleep(_LOOK_SECONDS)
    return True
