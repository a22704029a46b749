"""Entry points of the processes that hvfuse starts in the background. Not for users: hidden commands.

Their output is a log file. An error that ends one is the log's last `hvfuse: …` line, which whoever
started the process shows.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import ExitStack, suppress

import click

from hvfuse.cli.main import Session
from hvfuse.errors import HvfuseError


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@click.command(hidden=True)
@click.argument("vm")
@click.pass_obj
def tracker(session: Session, vm: str) -> None:
    """Serve VM's mount until it is unmounted."""
    from hvfuse.cli import serving
    from hvfuse.control.records import Records
    from hvfuse.control.sole_server import serving as alone
    from hvfuse.system import SystemClock

    _log_to_stderr()
    home = session.home_with(vm)
    home.make_vm(vm)
    with ExitStack() as stack:
        stack.enter_context(alone(home, vm, clock=SystemClock()))
        records: Records | None = None
        with suppress(HvfuseError):  # a guest must start, whatever became of the records
            records = stack.enter_context(Records(home.records))
            if records.read(vm).tracker_error is not None:  # of whoever tried before
                records.update(vm, tracker_error=None, tracker_hint=None)
            serving.stand_again(session, home, vm, records)
        if records is not None and serving.is_failed_over(home, vm):
            serving.serve_failed_over(session, home, vm, records)
        else:
            serving.serve_tracked(session, home, vm, records)


@click.command(hidden=True)
@click.argument("vm")
@click.pass_obj
def shipper(session: Session, vm: str) -> None:
    """Ship VM's logs at its policy's frequency until told to stop."""
    from hvfuse.cli import wiring
    from hvfuse.control.records import Records

    _log_to_stderr()
    home = session.home_with(vm)
    home.make_vm(vm)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    # Where another target is said, this one ends, and whoever starts it again has it ship there.
    with (
        Records(home.records) as records,
        wiring.shipper(home, session.config_file, vm, records, moved=stop.set) as here,
    ):
        listener = here.listen(home.shipper_socket(vm))
        try:
            here.run(stop)
        finally:
            listener.close()


@click.command(hidden=True)
@click.argument("path")
@click.argument("pin_id", type=int)
@click.pass_obj
def view(session: Session, path: str, pin_id: int) -> None:
    """Serve the view of a recovery point that is pinned in the store at PATH until it is unmounted."""
    from hvfuse import wire
    from hvfuse.control import trial
    from hvfuse.target.journal import PointReader
    from hvfuse.target.store import Store
    from hvfuse.target.view import View
    from hvfuse.target.view_mount import serve_view

    _log_to_stderr()
    home = session.home
    with Store(path, create=False) as store, ExitStack() as stack:
        pin = trial.find(store, pin_id)
        store.update_pin(pin_id, {"pid": os.getpid()})
        shown = View(PointReader(store, pin.vm, pin.point_id), overlays=trial.overlay_path(store, pin_id))
        stack.callback(shown.close)

        def ready() -> None:
            # Only now, so that whoever finds the socket served finds the view mounted.
            socket = trial.view_socket(home, store, pin_id)
            listener = wire.Listener(socket, lambda _: {"pid": os.getpid()}, name="view")
            stack.callback(listener.close)

        serve_view(shown, str(pin.owner["mountpoint"]), on_ready=ready)


@click.command(hidden=True)
@click.argument("directory")
@click.argument("settings", required=False)
def guard(directory: str, settings: str | None) -> None:
    """Hold a guest frozen for as long as standard input is open, or thaw what DIRECTORY's note tells of."""
    from hvfuse.control import guest_guard

    _log_to_stderr()
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what it has to say is in our own errors
    with guest_guard.told_to_end() as ended:
        if settings is None:
            guest_guard.thaw_leftover(directory)
        else:
            guest_guard.hold(directory, settings, ended)
