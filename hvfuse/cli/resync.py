"""`hvfuse resync`: order a resynchronisation, hold it up, go on with it, give it up.

Orders are durable. A shipper that runs changes them itself; where none does, they are changed in the records,
and a copy that is to begin at once is made by this process, as `hvfuse replicate` does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from hvfuse import wire
from hvfuse.cli.main import Session
from hvfuse.cli.output import emit_json, json_option, note, time_text
from hvfuse.cli.progress import showing_copy
from hvfuse.cli.replicate import make_cycle
from hvfuse.cli.status import copy_fields, orders_fields
from hvfuse.cli.wiring import drop_staged, store_facts
from hvfuse.control.copying import copy_text
from hvfuse.control.daemon import serving_pid
from hvfuse.control.home import Home
from hvfuse.control.instants import FORMS, instant_text, parse_instant
from hvfuse.control.records import Records, VmRecord
from hvfuse.errors import HvfuseError, UnreachableError, UsageError
from hvfuse.shipper.orders import Orders
from hvfuse.states import TABLE, Event, ReplicationState

ANSWER_SECONDS = 60.0


@click.command()
@click.argument("vm")
@click.option("--now", is_flag=True, help="At once, whatever stands against it. The default, unless it is held up.")
@click.option("--at", metavar="TIME", help=f"At a time at most 7 days ahead: {FORMS}.")
@click.option("--full", is_flag=True, help="Compare everything, not only what is in doubt.")
@click.option("--suspend", is_flag=True, help="Hold the copy up, or do not begin one, until --resume.")
@click.option("--resume", is_flag=True, help="Go on where it was held up.")
@click.option("--cancel", is_flag=True, help="Give the copy up, and drop what was staged of it.")
@click.option(
    "--wait/--no-wait", default=None, help="Wait until it is complete, and show how far it is. The default at once."
)
@json_option
@click.pass_obj
def resync(session: Session, /, vm: str, *, at: str | None, as_json: bool, **options: bool | None) -> None:
    """Compare VM's disks with its replica now, and send what differs.

    Only what is in doubt is compared, or everything with --full; the first time, the disks are copied.
    The VM runs on, its recovery points stay, and what is interrupted goes on where it was. A
    resynchronisation that is needed begins by itself at the times that hvfuse.toml allows
    (resync_window).

    After --cancel no recovery points are made until the next resynchronisation, which has to be
    asked for; the existing ones stay.
    """
    wish = _wish(at, options)
    home = session.home_with(vm)
    session.prepare()
    with Records(home.records) as records:
        outcome = _ACTIONS[wish.action](_Target(session, home, vm, records), wish)
    if as_json:
        emit_json({"vm": vm, "action": wish.action, **outcome.fields})
        return
    for line in outcome.lines:
        click.echo(f"{vm}: {line}")


def carry_out(session: Session, records: Records, vm: str, verb: str) -> Outcome:
    """Do what `hvfuse resync VM --VERB` does, for another command: "now", "suspend", "resume", "cancel". Raises
    HvfuseError."""
    wish = _wish(None, {verb: True, "full": False, "wait": None})
    return _ACTIONS[wish.action](_Target(session, session.home_with(vm), vm, records), wish)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What was typed. `at_ns`: when to start, None at once; `insists`: --now was written out."""

    action: str
    at_ns: int | None
    full: bool
    insists: bool
    wait: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What there is to say: lines for a person, fields for a program."""

    lines: tuple[str, ...]
    fields: Mapping[str, object] = field(default_factory=dict)


def _wish(at: str | None, options: Mapping[str, bool | None]) -> _Wish:
    """What was typed, if it makes sense. Raises UsageError."""
    chosen = [
        name for name in ("now", "at", "suspend", "resume", "cancel") if options.get(name) or (name == "at" and at)
    ]
    if at is not None and not at:
        raise UsageError("--at needs a time", hint=f"write {FORMS}")
    if len(chosen) > 1:
        raise UsageError(f"--{chosen[0]} and --{chosen[1]} do not go together", hint="hvfuse resync --help")
    verb = chosen[0] if chosen else "start"
    starts = verb in ("start", "now", "at")
    if options["full"] and not starts:
        raise UsageError(f"--full does not go together with --{verb}", hint="hvfuse resync --help")
    if options["wait"] and verb not in ("start", "now", "resume"):
        raise UsageError(f"--wait does not go together with --{verb}", hint="hvfuse resync --help")
    wait = verb in ("start", "now") if options["wait"] is None else options["wait"]
    return _Wish(
        action="start" if starts else verb,
        at_ns=None if at is None else parse_instant(at, now_ns=time.time_ns()),
        full=bool(options["full"]),
        insists=verb in ("now", "at"),
        wait=wait,
    )


@dataclass(frozen=True, slots=True)
class _Target:
    """The VM, and whoever ships it."""

    session: Session
    home: Home
    vm: str
    records: Records

    def read(self) -> VmRecord:
        return self.records.read(self.vm)

    @property
    def has_shipper(self) -> bool:
        return serving_pid(self.home.shipper_socket(self.vm)) is not None

    @property
    def is_mounted(self) -> bool:
        return serving_pid(self.home.tracker_socket(self.vm)) is not None

    def order(self, op: str, change: Callable[[Orders], Orders], **fields: object) -> Orders:
        """Have the shipper change the orders, or change them here if none runs. Raises UsageError if there is no
        copy that they could be for."""
        if self.has_shipper:
            answer = wire.request(self.home.shipper_socket(self.vm), op, timeout=ANSWER_SECONDS, **fields)
            return Orders.from_json(answer["orders"])
        is_for_one = op != "resume" and not fields.get("full") and not self.records.orders(self.vm).is_beyond_need
        if is_for_one and not self.needs_copy(otherwise=True):
            raise _nothing_to(self.vm, op)
        return self.records.change_orders(self.vm, change)

    def needs_copy(self, *, otherwise: bool = False) -> bool:
        """Whether anything has to be copied or compared, as far as can be told without doing it. `otherwise`: of a
        VM that is not mounted, and replicated before."""
        if self.read().state is not ReplicationState.REPLICATING:
            return True
        if not self.is_mounted:
            return otherwise
        told = wire.request(self.home.tracker_socket(self.vm), "status", timeout=ANSWER_SECONDS)
        return told["generation"] is None or bool(told["resync_required"]) or bool(told["resyncing"])

    def has_seed_arrived(self, orders: Orders) -> bool:
        """Whether the replica stands where a seed brings it: the one that was exported, or any that was imported."""
        with store_facts(self.session, lambda: self.records) as facts:
            position = facts.position(self.vm)
        return position is not None and orders.seed in (None, position.generation.hex())

    def show_resumed(self) -> None:
        """Show the state of a VM that is not suspended, where no shipper runs that would."""
        if self.has_shipper:
            return
        self.records.of(self.vm).resume()

    def beginning(self) -> tuple[str, ...]:
        """What has to be done for an order to be carried out; nothing where a shipper runs."""
        return () if self.has_shipper else ("no shipper runs: nothing begins before `hvfuse run`",)


def _nothing_to(vm: str, op: str) -> UsageError:
    """As a shipper says it."""
    if op == "resync":
        return UsageError(
            f"{vm}: the replica is up to date: there is nothing to resynchronise", hint=f"hvfuse resync {vm} --full"
        )
    return UsageError(f"{vm}: there is no copy to {op}")


def _fields(target: _Target, orders: Orders, **more: object) -> dict[str, object]:
    return {"orders": orders_fields(orders), "shipper": target.has_shipper, **more}


def _start(target: _Target, wish: _Wish) -> Outcome:
    before = Orders.from_json(target.read().orders)
    has_arrived = target.has_seed_arrived(before)
    if not wish.insists:
        _refuse_what_is_held_up(target, before, has_arrived=has_arrived)
    now_ns = time.time_ns()

    def order() -> Orders:
        orders = target.order(
            "resync",
            lambda orders: orders.resynchronise(full=wish.full, at_ns=wish.at_ns, now_ns=now_ns),
            full=wish.full,
            at_ns=wish.at_ns,
        )
        for line in _taken_back(before, has_arrived=has_arrived):
            note(f"{target.vm}: {line}")
        return orders

    if wish.wait:
        return _completed(target, order)
    orders = order()
    when = "now" if wish.at_ns is None else f"at {instant_text(wish.at_ns, now_ns=now_ns)}"
    lines = (f"a resynchronisation was ordered: {when}", *target.beginning())
    due = None if wish.at_ns is None else time_text(wish.at_ns)
    return Outcome(lines, _fields(target, orders, due=due))


def order_copy(
    session: Session, vm: str, records: Records, *, at_ns: int | None
) -> tuple[tuple[str, ...], Mapping[str, object]]:
    """Have the copy that a VM needs begin at `at_ns`, or now, whatever stands against it; nobody waits. Returns what
    there is to say, and the fields. Raises as `hvfuse resync`."""
    wish = _Wish(action="start", at_ns=at_ns, full=False, insists=True, wait=False)
    outcome = _start(_Target(session, session.home, vm, records), wish)
    return outcome.lines, outcome.fields


def _refuse_what_is_held_up(target: _Target, orders: Orders, *, has_arrived: bool) -> None:
    """Raise HvfuseError where an administrator said not to begin: that is taken back only by name."""
    vm = target.vm
    if orders.suspended:
        raise HvfuseError(
            f"{vm}: copies are suspended", hint=f"hvfuse resync {vm} --resume; or to begin all the same: --now"
        )
    state = target.read().state
    waits = state is ReplicationState.WAITING_FOR_INITIAL_REPLICATION
    if target.session.config.policy(vm).initial.how == "seed":
        waits = waits or state in (ReplicationState.DISABLED, ReplicationState.READY_FOR_INITIAL_REPLICATION)
    if (orders.seed is not None or waits) and not has_arrived:
        raise HvfuseError(
            f"{vm}: the first copy waits for a seed",
            hint=f"hvfuse seed import DIR; or, to copy over the network instead: hvfuse resync {vm} --now",
        )


def _taken_back(before: Orders, *, has_arrived: bool) -> tuple[str, ...]:
    """What an order to begin did away with."""
    lines = []
    if before.suspended:
        lines.append("it is not suspended any more")
    if before.seed is not None and has_arrived:
        lines.append("the seed has arrived: what was written since the export is sent now")
    elif before.seed is not None:
        lines.append("the seed that was exported is not waited for any more")
    return tuple(lines)


def _completed(target: _Target, order: Callable[[], Orders]) -> Outcome:
    """Order a copy, and wait until it is complete. Raises UnreachableError if the VM is not mounted."""
    before = target.read()
    with _told_on_interrupt(target):
        order()
        if not target.is_mounted:
            raise UnreachableError(
                f"{target.vm} is not mounted, so nothing can be compared; it begins once it is mounted",
                hint="hvfuse run",
            )
        with showing_copy(target.records, target.vm):
            report = make_cycle(target.session, target.home, target.vm, target.records)
    record = target.read()
    orders = Orders.from_json(record.orders)
    if record.generation == before.generation:
        return _nothing(target, orders, point=report["point"])
    if record.last_copy == before.last_copy:  # the generation's copy came on a medium
        lines = (f"recovery point {report['point']}", "replication goes on from the seed")
        return Outcome(lines, _fields(target, orders, copied=False, last_copy=None, point=report["point"]))
    text = str((record.last_copy or {}).get("text", "copied"))
    lines = (text, f"recovery point {report['point']}")
    return Outcome(lines, _fields(target, orders, copied=True, last_copy=record.last_copy, point=report["point"]))


@contextmanager
def _told_on_interrupt(target: _Target) -> Iterator[None]:
    """Say at Ctrl-C what goes on."""
    vm, background = target.vm, target.has_shipper
    try:
        yield
    except KeyboardInterrupt:
        if background:
            note(f"{vm}: it goes on all the same; `hvfuse status {vm}` tells how far it is")
        else:
            note(f"{vm}: stopped here; `hvfuse resync {vm}` or `hvfuse run` goes on where it was")
        raise


def _nothing(target: _Target, orders: Orders, **more: object) -> Outcome:
    lines = (
        "nothing is in doubt: the logs continue the replica",
        f"to compare everything all the same: hvfuse resync {target.vm} --full",
    )
    return Outcome(lines, _fields(target, orders, copied=False, last_copy=None, **more))


def _how_far(copy: Mapping[str, Any]) -> str:
    """Where a copy was when it ended, to follow a verb."""
    return f"at {copy_text(copy, is_under_way=False)}" if copy["bytes_total"] else "when it had just begun"


def _is_export(copy: Mapping[str, Any] | None) -> bool:
    return copy is not None and copy["kind"] == "export"


def _suspend(target: _Target, _: _Wish) -> Outcome:
    copy = target.read().copy
    orders = target.order("suspend", Orders.suspend)
    to_go_on = f"hvfuse resync {target.vm} --resume"
    what = "copies are suspended" if copy is None else "suspended " + _how_far(copy)
    if copy is not None and _is_export(copy):
        what = f"the export was suspended {_how_far(copy)}; what is in its directory DIR stays"
        to_go_on = f"hvfuse seed export {target.vm} DIR"
    return Outcome((f"{what}; to go on: {to_go_on}",), _fields(target, orders))


def _resume(target: _Target, wish: _Wish) -> Outcome:
    record = target.read()
    before = Orders.from_json(record.orders)
    if not before.suspended:
        target.show_resumed()
        return Outcome(("copies are not suspended",), _fields(target, before))
    if wish.wait:
        return _completed(target, lambda: target.order("resume", Orders.resume))
    orders = target.order("resume", Orders.resume)
    target.show_resumed()
    line = "copies are not suspended any more"
    if orders.seed is not None and _is_export(record.copy):
        return Outcome((f"{line}; to go on: hvfuse seed export {target.vm} DIR",), _fields(target, orders))
    return Outcome((line, *target.beginning()), _fields(target, orders))


def _cancel(target: _Target, _: _Wish) -> Outcome:
    record, vm = target.read(), target.vm
    orders = target.order("cancel", Orders.cancel if target.needs_copy() else Orders.withdraw)
    if not orders.cancelled:
        return Outcome(("the order was taken back; replication goes on",), _fields(target, orders, dropped=None))
    if not target.has_shipper:
        drop_staged(target.home, target.session.config.policy(vm), vm, target.records)
        cancelled = (Event.CANCEL,) if (record.state, Event.CANCEL) in TABLE else ()
        target.records.apply(vm, *cancelled, copy=None, progress=None)
    dropped = None if _is_export(record.copy) else record.copy
    if _is_export(record.copy):
        line = f"the export was cancelled; what is in its directory DIR stays; to go on: hvfuse seed export {vm} DIR"
    elif dropped is not None:
        line = f"cancelled; dropped what was staged of it: {copy_text(dropped, is_under_way=False)}"
    else:
        line = "cancelled; nothing was staged of it"
    lines = (line, f"no recovery points are made before: hvfuse resync {vm} --now")
    return Outcome(lines, _fields(target, orders, dropped=copy_fields(dropped)))


_ACTIONS: Mapping[str, Callable[[_Target, _Wish], Outcome]] = {
    "start": _start,
    "suspend": _suspend,
    "resume": _resume,
    "cancel": _cancel,
}
