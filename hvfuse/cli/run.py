"""`hvfuse run`: supervise in the foreground, show how it goes, end cleanly at Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Protocol, Self

import click

from hvfuse.cli.main import Session
from hvfuse.cli.output import is_terminal
from hvfuse.cli.screen import plain_line, reason_lines, table
from hvfuse.cli.status import statuses
from hvfuse.cli.wiring import fence_of
from hvfuse.control.copying import percent
from hvfuse.control.fence import Fence, FenceWatch
from hvfuse.control.monitor import Monitor
from hvfuse.control.notify import Notifier
from hvfuse.control.records import Records
from hvfuse.control.status import VmStatus
from hvfuse.control.supervisor import TICK_SECONDS, Supervisor, collected, only_supervisor, require_mountable
from hvfuse.errors import HvfuseError, UnreachableError
from hvfuse.states import ReplicationState
from hvfuse.system import Clock, SystemClock

_log = logging.getLogger(__name__)

SHOW_SECONDS = 1.0
END_SECONDS = 1.0
"""How long the end waits for an answer that is not needed any more."""
SILENT_SECONDS = 60.0
"""So long the statuses may take; with many VMs that hang, their patience adds up."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Display(Protocol):
    """Where the statuses are shown."""

    def show(self, found: Sequence[VmStatus]) -> None:
        """Show how the VMs are now."""

    def say(self, text: str) -> None:
        """Tell something that happened."""


class PlainDisplay:
    """A line whenever a VM's state, point or troubles change, or a tenth of a copy is done: for logs and pipes."""

    def __init__(self) -> None:
        self._told: dict[str, object] = {}

    def show(self, found: Sequence[VmStatus]) -> None:
        for one in found:
            # Not what counts up all the time (pending bytes, ages): that would be a line a second.
            tenth = None if one.copy is None else percent(one.copy) // 10
            key = (one.state, tenth, one.latest_point, [reason.id for reason in one.reasons])
            if self._told.get(one.name) != key:
                self._told[one.name] = key
                click.echo(plain_line(one))

    def say(self, text: str) -> None:
        click.echo(text)


class Interrupts:
    """Counts the signals that ask to end; the second one asks with force."""

    def __init__(self) -> None:
        self.count = 0
        # The handler runs in the very thread that waits, maybe within the wait: of all that wakes a
        # thread, only this queue's `put` may be called from there.
        self._came: queue.SimpleQueue[None] = queue.SimpleQueue()

    def _note(self, _number: int, _frame: object) -> None:
        self.count += 1
        self._came.put(None)

    def wait(self, seconds: float) -> bool:
        """Wait for the first; returns whether it has come."""
        if self.count == 0:
            with contextlib.suppress(queue.Empty):
                self._came.get(timeout=seconds)
        return self.count > 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Count SIGINT, SIGTERM and SIGHUP meanwhile; under nohup, SIGHUP stays ignored."""
        ignored = signal.SIGHUP if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else None
        before = {number: signal.signal(number, self._note) for number in _SIGNALS if number is not ignored}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@click.command()
@click.pass_obj
def run(session: Session) -> None:
    """Mount, track and replicate every VM under disks/, until Ctrl-C.

    Each folder of disks/ that holds a disk is a VM; new ones are noticed while it runs. One whose
    replication was disabled is mounted all the same, and not replicated. If there is no VM, disks/sample
    is made. A process that dies is started again. Ctrl-C ends replication, then the mounts, once nobody
    uses them; a second Ctrl-C ends them whoever does.
    """
    require_mountable()
    home = session.prepare()
    interrupts = Interrupts()
    with only_supervisor(home), interrupts.caught(), Records(home.records) as records:
        session.config_file.keep()
        supervisor = Supervisor(
            home, records, clock=SystemClock(), protects=lambda vm: session.config.policy(vm).protect == "auto"
        )
        monitor = Monitor(records, clock=SystemClock(), keep_events=lambda: session.config.monitoring.keep_events)
        notifier = Notifier(records, lambda: session.config.monitoring.notify, clock=SystemClock())

        def fences() -> list[Fence]:
            return [fence_of(home, session.config_file, vm, records) for vm in records.names()]

        with _display() as display, notifier, FenceWatch(fences), Watch(lambda: statuses(session, records)) as watch:
            sample = None if _holds_replicas(home.store) else supervisor.prepare()
            if sample is not None:
                display.say(f"there was no VM yet: made {home.folder(sample)}")
            display.say(f"disks in {home.disks}; let the guests use them in {home.mnt}; Ctrl-C ends")
            _keep(supervisor, interrupts, watch, display, monitor)
            display.say("ending: shippers first, then the mounts")
            supervisor.stop(asked=lambda: interrupts.count, tell=display.say)
        click.echo("ended cleanly")


def _holds_replicas(path: str) -> bool:
    """Whether the home's store has VMs of other homes: then it is a target, and needs no sample."""
    from hvfuse.target.store import Store

    with contextlib.suppress(HvfuseError, OSError), Store(path, create=False, read_only=True) as store:
        return bool(store.vms())
    return False


Ask = Callable[[], list[VmStatus]]


class Watch:
    """Asks for the statuses every SHOW_SECONDS, in a thread of its own: asking a VM that hangs takes long,
    and must not keep the others from being supervised."""

    def __init__(self, open_statuses: Callable[[], AbstractContextManager[Ask]], *, clock: Clock | None = None) -> None:
        self._open_statuses = open_statuses
        self._clock: Clock = clock or SystemClock()
        self._heard_at = self._clock.monotonic()
        self._answers: queue.SimpleQueue[list[VmStatus] | Exception] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        # It reads records only when it begins to ask, and may be left behind while it waits for an answer.
        self._thread.join(END_SECONDS)

    def news(self) -> list[VmStatus] | None:
        """The next answer, if one has come. Raises what asking failed with, and UnreachableError where no answer comes
        for SILENT_SECONDS: what is shown is as old, then."""
        try:
            answer = self._answers.get_nowait()
        except queue.Empty:
            if self._clock.monotonic() - self._heard_at > SILENT_SECONDS:
                raise UnreachableError(
                    f"nobody can tell how the VMs are: no answer for {SILENT_SECONDS:.0f} s; what is shown is old",
                    hint="hvfuse status",
                ) from None
            return None
        self._heard_at = self._clock.monotonic()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _run(self) -> None:
        with self._open_statuses() as ask:
            while not self._ended.is_set():
                try:
                    self._answers.put(ask())
                except (HvfuseError, OSError) as error:  # whoever reads the answers judges what can be lived with
                    self._answers.put(error)
                except Exception as error:  # as of a process of another version that is served on
                    _log.debug("asking for the statuses failed", exc_info=True)
                    self._answers.put(HvfuseError(f"internal error: {type(error).__name__}: {error}"))
                self._ended.wait(SHOW_SECONDS)


def _keep(supervisor: Supervisor, interrupts: Interrupts, watch: Watch, display: Display, monitor: Monitor) -> None:
    """Tick, show and watch until an interrupt comes. Nothing that fails on the way may end what serves guests."""
    told: set[str] = set()
    while not interrupts.wait(TICK_SECONDS):
        troubles: list[Exception] = []
        with collected(troubles):
            supervisor.tick()
        with collected(troubles):
            found = watch.news()
            if found is not None:
                display.show(_begun(found))
                monitor.look(_begun(found))
                told.intersection_update(map(str, troubles))
        for error in troubles:
            if str(error) not in told:
                display.say(f"trouble: {error}")
            told.add(str(error))


def _begun(found: Sequence[VmStatus]) -> list[VmStatus]:
    """Without the VMs that the supervisor has not taken up yet, or is just starting for the first time."""
    return [
        one
        for one in found
        if one.state is not ReplicationState.DISABLED
        and (one.tracker or one.state is not ReplicationState.READY_FOR_INITIAL_REPLICATION)
    ]


@contextmanager
def _display() -> Iterator[Display]:
    """A live table on a terminal, plain lines elsewhere."""
    if not is_terminal():
        yield PlainDisplay()
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    console = Console()

    class LiveDisplay:
        def show(self, found: Sequence[VmStatus]) -> None:
            live.update(Group(table(found), *(Text(line) for line in reason_lines(found))))

        def say(self, text: str) -> None:
            console.print(text, markup=False, highlight=False)

    with Live(console=console, refresh_per_second=4, transient=False) as live:
        yield LiveDisplay()
