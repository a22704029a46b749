"""`hvfuse mount` and `hvfuse umount`: one VM's tracker, without `hvfuse run`."""

from __future__ import annotations

import os
import signal

import click

from hvfuse.cli.main import Session
from hvfuse.cli.output import emit_json, json_option
from hvfuse.control.daemon import serving_pid, wait_for_end
from hvfuse.control.sole_server import start_tracker
from hvfuse.control.supervisor import require_mountable, require_no_supervisor, stop_tracker
from hvfuse.errors import NotFoundError, UnreachableError
from hvfuse.mountpoint import clear_dead_mount
from hvfuse.system import SystemClock

END_SECONDS = 60.0
"""How long a tracker may take to seal its logs after it has unmounted."""


@click.command()
@click.argument("vm")
@json_option
@click.pass_obj
def mount(session: Session, vm: str, as_json: bool) -> None:
    """Mount VM's folder at mnt/VM and log every write to its disks.

    Its tracker goes on in the background until `hvfuse umount`. Nothing is replicated by itself;
    `hvfuse replicate VM` makes recovery points.
    """
    if not os.path.isdir(session.home.folder(vm)):
        _stand_again(session, vm)
    session.home_with(vm)
    home = session.prepare()
    mountpoint = home.mountpoint(vm)
    pid = serving_pid(home.tracker_socket(vm))
    already = pid is not None
    if pid is None:
        require_mountable()
        home.make_vm(vm)
        pid = start_tracker(home, vm, clock=SystemClock())
    if as_json:
        emit_json({"vm": vm, "mountpoint": mountpoint, "pid": pid, "already_mounted": already})
    else:
        click.echo(f"{vm} is {'already ' if already else ''}mounted at {mountpoint}")


def _stand_again(session: Session, vm: str) -> None:
    """Begin the folder of a VM that is failed over to here, where the failover died before that."""
    from hvfuse.cli import serving
    from hvfuse.cli.wiring import kept_records

    with kept_records(session.home) as records:
        if records is not None:
            serving.stand_again(session, session.home, vm, records)


@click.command()
@click.argument("vm")
@click.option("--force", is_flag=True, help="End it although programs use it; they get errors.")
@json_option
@click.pass_obj
def umount(session: Session, vm: str, force: bool, as_json: bool) -> None:
    """Unmount VM's folder, seal its logs and end its tracker.

    Refused while a program uses the mount, or while `hvfuse run` would mount it again.
    """
    home = session.home
    if not os.path.isdir(home.state_dir(vm)):  # a VM that has one may be mounted, whatever became of its folder
        session.home_with(vm)
    require_no_supervisor(home)
    pid = serving_pid(home.tracker_socket(vm))
    if pid is None:
        if not clear_dead_mount(home.mountpoint(vm)):
            raise NotFoundError(f"{vm} is not mounted", hint="hvfuse status")
    else:
        if force:
            os.kill(pid, signal.SIGTERM)
        else:
            stop_tracker(home, vm)
        if not wait_for_end(pid, END_SECONDS):
            raise UnreachableError(
                f"{vm}: the tracker (pid {pid}) does not end", hint=f"tail {home.log(vm, 'tracker')}"
            )
    if as_json:
        emit_json({"vm": vm, "mountpoint": home.mountpoint(vm)})
    else:
        click.echo(f"{vm} is unmounted")
