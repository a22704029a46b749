"""Entry points of the processes that hvfuse starts in the background. Not for users: hidden commands.

Their output is a log file. An error that ends one is the log's last `hvfuse: …` line, which whoever
started the process shows.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading

import click

from hvfuse.cli.main import Session


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@click.command(hidden=True)
@click.argument("vm")
@click.pass_obj
def tracker(session: Session, vm: str) -> None:
    """Serve VM's mount until it is unmounted."""
    from hvfuse.tracker.service import run_tracker

    _log_to_stderr()
    home = session.home_with(vm)
    home.make_vm(vm)
    run_tracker(
        vm=vm,
        folder=home.folder(vm),
        mountpoint=home.mountpoint(vm),
        state_dir=home.state_dir(vm),
        exclude=session.config.policy(vm).exclude,
    )


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
    with Records(home.records) as records, wiring.shipper(home, session.config.policy(vm), vm, records) as here:
        listener = here.listen(home.shipper_socket(vm))
        try:
            here.run(stop)
        finally:
            listener.close()
