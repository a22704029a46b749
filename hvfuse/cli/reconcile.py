"""`tools/resync`: make an image file or block device equal to another, here or through a pipe.

A program of its own, with exit codes of its own: 0 equal, 1 changed, otherwise as `hvfuse.errors` has them, but for
`FAILED` where an error would be 1. It lives for less than a second where nothing differs, so it imports
what it needs when it needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from hvfuse.errors import HvfuseError, UsageError

if TYPE_CHECKING:
    from hvfuse.reconcile.run import Options, Progress, Report

FAILED = 20
"""Exit code of an error that the others do not name: 1 means that something was changed."""
OUTPUT_VERSION = 1
PIPE_WORKERS = 8
"""Threads that compare when the other side is far away: most of them wait for it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint="tools/resync --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="tools/resync",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make REPLICA equal to SOURCE. Either may be an image file or a block device.",
        usage="%(prog)s [options] SOURCE REPLICA\n       %(prog)s --serve [--read-only] [--root DIR | FILE]",
        epilog="exit status: 0 they were equal, 1 REPLICA was changed, other: an error\n"
        "manual: docs/resync.md\n\n"
        "  tools/resync disk.raw /backup/disk.raw\n"
        "  tools/resync disk.raw /backup/disk.raw --via 'ssh host /opt/hvfuse/tools/resync --serve'",
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("-n", "--dry-run", action="store_true", help="change nothing; exit 1 if that would be needed")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--digest", choices=["xxh3", "blake3"], default="xxh3",
                        help="blake3 where who writes the data is not trusted (default: xxh3)")  # fmt: skip
    parser.add_argument("--continue", dest="believed", action="store_true",
                        help="block devices: go on where a killed run was; nobody wrote to them since")  # fmt: skip
    pipe = parser.add_argument_group("through a pipe")
    pipe.add_argument("--via", metavar="COMMAND", help="REPLICA is where COMMAND runs tools/resync --serve")
    pipe.add_argument("--pull", action="store_true", help="with --via: SOURCE is there, and REPLICA here")
    pipe.add_argument("--level", type=int, default=1, choices=range(20), metavar="0-19",
                      help="zstd level of what travels; 0: not compressed (default: 1)")  # fmt: skip
    pipe.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS",
                      help="take the other side for dead after so long a silence (default: 60)")  # fmt: skip
    served = parser.add_argument_group("the other side")
    served.add_argument("--serve", action="store_true", help="serve one tools/resync on stdin and stdout")
    served.add_argument("--root", metavar="DIR", help="serve only what is below DIR")
    served.add_argument("--read-only", action="store_true", help="serve for --pull only")
    parser.add_argument("--state-seconds", type=float, default=2.0, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # who opens a file on which a lease is tried for a moment sends it
    try:
        code = _run(_parser().parse_args(arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = _report(error, as_json="--json" in arguments)
    sys.exit(code)


def _run(options: argparse.Namespace) -> int:
    if options.serve:
        return _serve(options)
    if len(options.paths) != 2:
        raise UsageError("SOURCE and REPLICA are needed", hint="tools/resync --help")
    if options.pull and options.via is None:
        raise UsageError("--pull needs --via", hint="tools/resync --help")
    if options.root or options.read_only:
        raise UsageError("--root and --read-only are for --serve")
    if not 0.1 <= options.timeout <= 86400:
        raise UsageError("--timeout: between 0.1 and 86400 seconds")
    with _showing(os.path.basename(options.paths[1])) as progress:
        report = _resync(options, progress)
    _tell(options, report)
    return int(report.changed)


def _resync(options: argparse.Namespace, progress: Progress) -> Report:
    from hvfuse.formats.digests import Algorithm
    from hvfuse.reconcile.ends import open_replica, open_source
    from hvfuse.reconcile.run import Options, Resync

    source_path, replica_path = options.paths
    chosen = Options(
        algorithm=Algorithm(options.digest), dry_run=options.dry_run, believed=options.believed,
        state_seconds=options.state_seconds,
    )  # fmt: skip
    if options.via is not None:  # an empty one is an unset variable: it must not mean this machine
        return _resync_through(options, source_path, replica_path, chosen, progress)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(open_source(source_path)))
        if os.path.exists(replica_path) and os.path.samefile(source_path, replica_path):
            raise UsageError(f"{replica_path}: SOURCE and REPLICA are the same")  # not: SOURCE has it open
        replica = stack.enter_context(contextlib.closing(open_replica(replica_path, write=not options.dry_run)))
        run = Resync(source, replica, replica=replica, options=chosen, progress=progress)
        return run.run(replica_path=replica_path, created=replica.created)


def _resync_through(
    options: argparse.Namespace, source_path: str, replica_path: str, chosen: Options, progress: Progress
) -> Report:
    from dataclasses import replace

    from hvfuse.reconcile.ends import open_replica, open_source
    from hvfuse.reconcile.remote import Peer, RemoteEnd, start
    from hvfuse.reconcile.run import Resync

    try:
        command = shlex.split(options.via)
    except ValueError as error:
        raise UsageError(f"--via: {error}") from None
    if not command:
        raise UsageError("--via: no command", hint="is a variable in it not set?")
    chosen = replace(chosen, workers=PIPE_WORKERS, askers=3, at_once=1)
    write = not options.dry_run
    with contextlib.ExitStack() as stack:
        if options.pull:
            peer = stack.enter_context(Peer(start(command), silence=options.timeout))
            far = RemoteEnd(peer, source_path, role="source", write=False, level=options.level)
            replica = stack.enter_context(contextlib.closing(open_replica(replica_path, write=write)))
            run = Resync(replica, far, source=far, replica=replica, options=chosen, progress=progress)
            return run.run(replica_path=replica_path, created=replica.created)
        source = stack.enter_context(contextlib.closing(open_source(source_path)))
        peer = stack.enter_context(Peer(start(command), silence=options.timeout))
        far = RemoteEnd(peer, replica_path, role="replica", write=write, level=options.level)
        run = Resync(source, far, replica=far, options=chosen, progress=progress)
        return run.run(replica_path=replica_path, created=far.created and write)


def _serve(options: argparse.Namespace) -> int:
    from hvfuse.reconcile.line import Line
    from hvfuse.reconcile.served import Permission, Server

    if len(options.paths) > 1 or (options.paths and options.root):
        raise UsageError("--serve takes one FILE, or --root DIR")
    if os.isatty(0) or os.isatty(1):
        raise UsageError("--serve is for another tools/resync, whose --via runs it", hint="docs/resync.md")
    permission = Permission(
        path=options.paths[0] if options.paths else None, root=options.root, read_only=options.read_only
    )
    Server(Line(0, 1, silence=options.timeout, drained=True), permission).run()
    return 0


@contextlib.contextmanager
def _showing(name: str) -> Iterator[Progress]:
    """A bar on a terminal: how much is passed, at what rate, the time left, and what was sent."""
    if not sys.stderr.isatty():
        yield lambda report, passed: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
        DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[sent]} sent"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None, sent="0 B")

        def tell(report: Report, passed: int) -> None:
            if bar.tasks[0].total is None:
                bar.reset(task, total=report.size, completed=report.start)
            bar.update(task, completed=passed, sent=size_text(report.sent))

        yield tell


def _tell(options: argparse.Namespace, report: Report) -> None:
    source, replica = options.paths
    rate = round((report.size - report.start) / report.seconds) if report.seconds else 0
    if not report.keeps_state:
        _note(f"hvfuse: {replica}: nothing can be written beside it; had this run been killed, it had begun anew")
    if options.json:
        fields = {
            "output_version": OUTPUT_VERSION, "source": source, "replica": replica, "dry_run": options.dry_run,
            "changed": report.changed, "created": report.created, "resized": report.resized, "size": report.size,
            "continued_at": report.start, "compared": report.compared, "differing": report.differing,
            "sent": report.sent, "saved": report.saved, "left_alone": report.left_alone,
            "seconds": round(report.seconds, 3), "rate": rate,
        }  # fmt: skip
        print(json.dumps(fields))
        return
    print(_one_line(f"{replica}: {_outcome(options, report)}"))
    start = f" from {size_text(report.start)} on" if report.start else ""
    print(
        f"  {size_text(report.size)}{start}: {size_text(report.compared)} compared, {size_text(report.differing)} "
        f"differing, {size_text(report.sent)} sent, in {report.seconds:.1f} s ({size_text(rate)}/s)"
    )
    if report.left_alone:
        print(f"  the last {size_text(report.left_alone)} of the device are beyond SOURCE's end and were left alone")


def _outcome(options: argparse.Namespace, report: Report) -> str:
    if not report.changed:
        return "equal"
    done = [word for word, is_so in (("created", report.created), ("resized", report.resized)) if is_so]
    if options.dry_run:
        return "differs" + "".join(f", would be {word}" for word in done)
    return ", ".join([*done, "made equal"])


def size_text(count: float) -> str:
    """Bytes in words: "0 B", "1.5 GiB"."""
    unit = 0
    while count >= 1024 and unit < 6:
        count, unit = count / 1024, unit + 1
    name = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")[unit]
    return f"{count:.1f} {name}" if unit and count < 100 else f"{count:.0f} {name}"


def _report(error: Exception, *, as_json: bool) -> int:
    """Say what went wrong. Returns the exit code."""
    known = error if isinstance(error, HvfuseError) else None
    if known is None and isinstance(error, OSError) and error.strerror:
        known = HvfuseError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if known is None:
        from hvfuse.cli.main import keep_traceback

        known = HvfuseError(
            f"internal error: {type(error).__name__}: {error}",
            hint=f"the traceback is in {keep_traceback(error)}; please report it",
        )
    code = known.exit_code if known.exit_code != HvfuseError.exit_code else FAILED
    _note(f"hvfuse: {_one_line(str(known))}")
    if known.hint:
        _note(f"  hint: {_one_line(known.hint)}")
    if as_json:
        fields = {"type": type(known).__name__, "message": str(known), "hint": known.hint, "exit_code": code}
        print(json.dumps({"output_version": OUTPUT_VERSION, "error": fields}))
    return code


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _note(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def program() -> NoReturn:
    """`main` as a process of its own. Everything is closed and joined by then, and to take the interpreter apart
    piece by piece would take as long as to compare some hundred megabytes."""
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0  # None: after --help
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or FAILED
    os._exit(code)


if __name__ == "__main__":
    program()
