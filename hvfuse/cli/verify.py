"""`hvfuse verify`: compare a VM's disks with its replica while they are in use.

The run is the shipper's, which takes a step of a second or so whenever it is asked; where no shipper runs, this
process is one meanwhile.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from hvfuse import wire
from hvfuse.cli.main import Session
from hvfuse.cli.output import counted, emit_json, json_option, note, one_line, time_text
from hvfuse.cli.progress import showing_copy
from hvfuse.control.daemon import serving_pid
from hvfuse.control.job import JobError, JobKind
from hvfuse.control.records import Records
from hvfuse.errors import CorruptError, HvfuseError, UsageError
from hvfuse.words import bytes_text, duration_text

if TYPE_CHECKING:
    from rich.console import RenderableType

PATIENCE = 86400.0
"""Seconds for one answer: a repair copies."""
END_SECONDS = 2.0
"""For the answer to "end", which nobody needs: a step under way comes first."""
SAMPLE = "5%"
BLOCK = 64 << 10

_COMPARE, _REPAIR, _PROVE = "compare", "copy again what differs", "prove it"
"""Steps of the job."""

Ask = Callable[..., Mapping[str, Any]]
"""Asks the VM's verifier (`hvfuse.shipper.verifier`); the fields of the request by name."""


@click.command()
@click.argument("vm")
@click.option(
    "--sample", metavar="PERCENT", help=f"So much of the disks, what was not proved for longest first. [{SAMPLE}]"
)
@click.option("--all", "everything", is_flag=True, help="All of the disks.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Choose as an earlier run with this seed did.")
@click.option("--repair", is_flag=True, help="Copy again what differs, and prove it.")
@click.option(
    "--continuous",
    metavar="BUDGET",
    help='From now on verify in idle time, so many bytes a second: "10MB/s". "0" ends it.',
)
@json_option
@click.pass_obj
def verify(
    session: Session,
    /,
    vm: str,
    *,
    sample: str | None,
    everything: bool,
    seed: int | None,
    repair: bool,
    continuous: str | None,
    as_json: bool,
) -> None:
    """Prove that VM's replica is the same as its disks, while they are in use.

    Blocks that are written to meanwhile are left out and compared again after the next cycle; what is
    written to all the time is told as not proved. A mismatch is thus never a write that the replica has
    yet to get. Ends with 7 if there is one.

    --repair copies again what differs, by a resynchronisation of these blocks. Recovery points from
    before it may have the fault still.
    """
    if continuous is not None and (sample or everything or repair or seed is not None):
        raise UsageError(
            "--continuous stands alone: it only sets what is done from now on", hint="hvfuse verify --help"
        )
    if sample is not None and everything:
        raise UsageError("--sample and --all do not go together", hint="hvfuse verify --help")
    share = 1.0 if everything else parse_share(sample or SAMPLE)
    budget = None if continuous is None else parse_budget(continuous)
    home = session.home_with(vm)
    session.prepare()
    with Records(home.records) as records:
        if budget is not None:
            with _asking(session, vm, records) as ask:
                ask(do="budget", budget=budget)
            _tell_budget(vm, budget, as_json=as_json)
            return
        words = _words(vm, share, seed, repair=repair)
        steps = (_COMPARE, _REPAIR, _PROVE) if repair else (_COMPARE,)
        with (
            records.jobs.run(JobKind.VERIFY, vm, steps=steps, command=words) as job,
            _asking(session, vm, records) as ask,
        ):
            job.step(_COMPARE)
            found = _run(ask, vm, job.progress, share=share, seed=seed)
            repaired: list[dict[str, Any]] = []
            if repair and _recorded(found):
                job.step(_REPAIR)
                with showing_copy(records, vm):
                    repaired = _repair(ask, vm)
                job.step(_PROVE)
                found = {**found, **_run(ask, vm, job.progress, share=share, only_mismatches=True)}
            if _recorded(found):
                job.fail(_difference(vm, _recorded(found)))
    if as_json:
        emit_json(_fields(vm, found, repaired))
    else:
        _tell(vm, found, repaired)
    if _recorded(found):
        click.get_current_context().exit(CorruptError.exit_code)


def parse_share(text: str) -> float:
    """ "5%" as 0.05. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", text)
    share = float(match[1]) / 100 if match else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"{text!r} is not a part of the disks", hint='write a percentage, such as "5%"')
    return share


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_budget(text: str) -> int:
    """ "10MB/s" as bytes a second. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?(?:b)?(?:/s)?", text.strip().lower())
    if match is None:
        raise UsageError(f"{text!r} is not a number of bytes a second", hint='write "10MB/s", or "0" to end it')
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _words(vm: str, share: float, seed: int | None, *, repair: bool) -> tuple[str, ...]:
    """What does the same again, after `hvfuse`."""
    how_much = ("--all",) if share == 1 else ("--sample", f"{100 * share:g}%")
    chosen = () if seed is None else ("--seed", str(seed))
    return ("verify", vm, *how_much, *chosen, *(("--repair",) if repair else ()))


def _difference(vm: str, mismatches: Sequence[object]) -> JobError:
    return JobError(
        id=CorruptError.__name__,
        message=f"the replica differs from the disks in {counted(len(mismatches), 'place')}",
        recommendation=f"hvfuse verify {vm} --repair",
    )


@contextmanager
def _asking(session: Session, vm: str, records: Records) -> Iterator[Ask]:
    """What asks the VM's shipper, or one of this process if none runs."""
    home = session.home
    socket = home.shipper_socket(vm)
    if serving_pid(socket) is not None:
        yield lambda **fields: _ask_shipper(socket, fields)
        return
    from hvfuse.cli.wiring import shipper

    home.make_vm(vm)
    with shipper(home, session.config_file, vm, records) as here:
        yield lambda **fields: here.verify(fields)


def _ask_shipper(socket: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return wire.request(socket, "verify", timeout=END_SECONDS if fields["do"] == "end" else PATIENCE, **fields)


def _run(ask: Ask, vm: str, tell: Callable[[int], None], **options: object) -> dict[str, Any]:
    """One run to its end; `tell` is told the percentage. Returns its last answer: "report" and "verified"."""
    token = secrets.token_hex(8)
    try:
        begun = ask(do="begin", token=token, **options)
        answer = dict(begun)
        with _showing(vm) as show:
            while not answer["report"]["done"] or "verified" not in answer:
                answer = dict(ask(do="step", run=begun["run"]))
                show(answer["report"])
                tell(_percent(answer["report"]))
    except KeyboardInterrupt:
        note(f"{vm}: stopped; what was proved so far is kept, and the same command goes on with the rest")
        raise
    finally:
        # Without it the next command would be kept out for a while. Once it is sent, it is heeded.
        with suppress(HvfuseError):
            ask(do="end", token=token)
    return answer


def _repair(ask: Ask, vm: str) -> list[dict[str, Any]]:
    """Have what differs copied again. Returns what that was."""
    try:
        return list(ask(do="repair")["mismatches"])
    except KeyboardInterrupt:
        note(f"{vm}: stopped waiting for the repair; `hvfuse status {vm}` tells whether it goes on")
        note(f"  hint: to finish it: hvfuse verify {vm} --repair")
        raise


@contextmanager
def _showing(vm: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show reports on stderr: a bar on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        told = [0]

        def line(report: Mapping[str, Any]) -> None:
            if _percent(report) // 10 > told[0]:
                told[0] = _percent(report) // 10
                note(f"{vm}: verifying, {_figures(report)}")

        yield line
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        yield lambda report: live.update(_bar(vm, report), refresh=True)


def _bar(vm: str, report: Mapping[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 1))
    percent = _percent(report)
    line.add_row(Text(f"{vm}: verifying"), ProgressBar(total=100, completed=percent, width=40), Text(f"{percent} %"))
    return Group(line, Text(f"  {_figures(report)}"))


def _percent(report: Mapping[str, Any]) -> int:
    total = report["bytes_total"]
    return min(100, int(100 * report["bytes_compared"] / total)) if total else 100


def _figures(report: Mapping[str, Any]) -> str:
    parts = [
        f"{bytes_text(report['bytes_compared'])} of {bytes_text(report['bytes_total'])} compared",
        f"{bytes_text(_rate(report))}/s",
    ]
    if report["rounds"] or report["wants_cycle"]:
        parts.append(f"{_blocks(report['bytes_unproved'])} written to meanwhile, taken up again")
    elif report["seconds_left"]:
        parts.append(f"{duration_text(report['seconds_left'])} left")
    return ", ".join(parts)


def _rate(report: Mapping[str, Any]) -> int:
    return int(report["bytes_compared"] / report["seconds"]) if report["seconds"] > 0 else 0


def _blocks(count: int) -> str:
    return f"{counted(count // BLOCK, 'block')} ({bytes_text(count)})"


def _recorded(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is on the list of mismatches now."""
    return list(found["verified"]["mismatches"]) if found["verified"] else []


def _proved(found: Mapping[str, Any]) -> str:
    return f"{int(100 * found['verified']['proved_30d'])} % of the blocks were proved in the last 30 days"


def _fields(vm: str, found: Mapping[str, Any], repaired: list[dict[str, Any]]) -> dict[str, Any]:
    report = found["report"]
    names = ("seed", "bytes_total", "bytes_compared", "bytes_unproved", "mismatch_bytes", "rounds", "seconds", "hot")
    return {
        "vm": vm,
        **{name: report[name] for name in names},
        "resized": report["resized"],
        "bytes_per_second": _rate(report),
        "mismatches": [_mismatch(each) for each in _recorded(found)],
        "repaired": [_mismatch(each) for each in repaired],
        "proved_30d": found["verified"]["proved_30d"] if found["verified"] else 0.0,
    }


def _mismatch(each: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "disk": each["disk"],
        "offset": each["offset"],
        "length": each["length"],
        "found": time_text(each["found_ns"]),
    }


def _tell(vm: str, found: Mapping[str, Any], repaired: list[dict[str, Any]]) -> None:
    report, left = found["report"], _recorded(found)
    name = one_line(vm)
    compared = f"{bytes_text(report['bytes_compared'])} compared in {duration_text(report['seconds'])}"
    outcome = {0: "no mismatch", 1: "1 mismatch"}.get(len(left), f"{len(left)} mismatches")
    click.echo(f"{name}: {compared}, seed {report['seed']}: {outcome}")
    for each in left:
        place = f"{one_line(each['disk'])}: offset {each['offset']}, length {each['length']}"
        click.echo(f"{name}: differs: {place}, found {time_text(each['found_ns'])}")
    if report["bytes_unproved"]:
        click.echo(f"{name}: {_blocks(report['bytes_unproved'])} were written to all the time, and are not proved")
    for disk in report["resized"]:
        click.echo(f"{name}: {one_line(disk)} was resized meanwhile; the rest of it is left to another run")
    if repaired and not left:
        places = counted(len(repaired), "place")
        click.echo(f"{name}: repaired {places}; recovery points from before may have the fault still")
    if found["verified"]:
        click.echo(f"{name}: {_proved(found)}")
    if left:
        note(f"  hint: hvfuse verify {vm} --repair")


def _tell_budget(vm: str, budget: int, *, as_json: bool) -> None:
    if as_json:
        emit_json({"vm": vm, "continuous": budget})
    elif budget:
        click.echo(f"{vm}: verified in idle time from now on, at most {bytes_text(budget)}/s")
    else:
        click.echo(f"{vm}: not verified in idle time any more")
