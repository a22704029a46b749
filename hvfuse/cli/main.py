"""The `hvfuse` command: a group that imports a subcommand only when it is used, and the one place
where exceptions become messages and exit codes.

An error is one line on stderr, `hvfuse: CAUSE`, and maybe a second, `  hint: NEXT COMMAND`. With
`--json` stdout gets `{"output_version":1,"error":{"type","message","hint","exit_code"}}` as well, so
that a program that reads stdout always finds one JSON object.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NoReturn, cast

import click

from hvfuse import __version__, errors
from hvfuse.cli.output import emit_json, note, one_line
from hvfuse.control import config_file
from hvfuse.control.config import Config
from hvfuse.control.config_file import ConfigFile
from hvfuse.control.home import HOME_VARIABLE, Home, home_root
from hvfuse.errors import BusyError, HvfuseError, NoSpaceError, NotFoundError, StateError, UnreachableError, UsageError

_SECTIONS: Mapping[str, Mapping[str, str]] = {
    "Protect": {
        "run": "Mount, track and replicate every VM under disks/, until Ctrl-C.",
        "status": "Show how each VM's replication is doing.",
        "replicate": "Make a recovery point of a VM now.",
        "replication": "Protect a VM, hold its replication up, end it.",
        "resync": "Compare a VM with its replica, and send what differs.",
        "verify": "Prove that a VM's replica is the same as its disks.",
        "policy": "Show which settings apply to a VM, and prove the configuration.",
        "seed": "Bring the first copy of a VM over on a medium, or from disks that are there.",
        "mount": "Mount and track one VM without `run`.",
        "umount": "End the mount of one VM.",
    },
    "Look back": {
        "job": "Show what was done or is under way, end it, go on with it.",
        "event": "Show what happened, and follow it.",
        "measure": "Tell how replication did over the last hours.",
    },
    "Recover": {
        "point": "List recovery points.",
        "failover": "Fail a VM over to a recovery point: on trial, planned, or unplanned.",
        "plan": "Fail many VMs over, in order, with commands and pauses in between.",
        "store": "Examine the target store.",
    },
    "Files": {
        "disk": "Create, examine, convert and compare disk images.",
        "log": "Examine replication logs (.hrl) and apply them to images.",
    },
}
_HIDDEN = ("_tracker", "_shipper", "_view", "_guard")
"""The entry points of the processes that hvfuse starts."""
_MODULES = {"umount": "mount", **dict.fromkeys(_HIDDEN, "daemons")}
"""Where a command lies that does not lie in a module of its name."""


_GO_ON = frozenset({"status", "event", "job", "measure", "point", "failover", "plan", "store", "umount", *_HIDDEN})
"""Commands that a fault in hvfuse.toml does not stop: what `hvfuse run` read last applies to them too."""


class LazyGroup(click.Group):
    """Looks a subcommand up in the tables above and imports its module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in _SECTIONS.values() for name in section]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _HIDDEN and name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"hvfuse.cli.{_MODULES.get(name, name)}")
        return cast(click.Command, getattr(module, name.removeprefix("_")))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not close or "did you mean" in error.message.lower():
                raise
            raise click.UsageError(f"there is no command {args[0]!r}; did you mean {close[0]}?", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, commands in _SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl(list(commands.items()))


class Session:
    """What every command gets as `ctx.obj`: the installation, read when first asked for."""

    def __init__(self, root: str, *, debug: bool = False, goes_on: bool = False) -> None:
        self.root = root
        self.debug = debug
        self.config_file = ConfigFile(root, uses_kept=goes_on)

    @property
    def config(self) -> Config:
        """The configuration as it is now. Raises UsageError naming a faulty line."""
        return self.config_file.current()

    @cached_property
    def home(self) -> Home:
        """The paths. Raises NotFoundError when there is no such home."""
        if not os.path.isdir(self.root):
            raise NotFoundError(
                f"there is no hvfuse home at {self.root}",
                hint="begin one with: hvfuse run; or name another with --home DIR",
            )
        return self.config.home(self.root)

    def home_with(self, vm: str) -> Home:
        """The paths, for a command on one VM. Raises NotFoundError when there is no folder of it."""
        if not os.path.isdir(self.home.folder(vm)):
            raise NotFoundError(f"there is no VM {vm}: no directory {self.home.folder(vm)}", hint="hvfuse status")
        return self.home

    def prepare(self) -> Home:
        """The paths, after making the home's directories and its commented configuration."""
        os.makedirs(self.root, exist_ok=True)
        config_file.write_template(self.root)
        self.home.make()
        return self.home


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--home",
    metavar="DIR",
    help=f"The installation's directory.  [default: ${HOME_VARIABLE}, else ./hvfuse-home]",
)
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
@click.version_option(__version__, prog_name="hvfuse", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, home: str | None, debug: bool) -> None:
    """Replicate virtual disks and fail over to any of their recovery points.

    Put a VM's disks (.vhd, .raw, .img) into a folder of their own under disks/, start `hvfuse run`,
    and let the guest use them through mnt/. Every write is logged, shipped to the store, and kept as
    recovery points that `hvfuse failover test` shows as disks.
    """
    ctx.obj = Session(home_root(home), debug=debug, goes_on=ctx.invoked_subcommand in _GO_ON)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with the documented exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(arguments, prog_name="hvfuse", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone (`hvfuse status | head`); nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except click.exceptions.NoArgsIsHelpError as error:
        note(error.format_message())
        code = UsageError.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = 130
    except Exception as error:
        code = _report(error, arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception, arguments: Sequence[str]) -> int:
    """Say what went wrong. Returns the exit code."""
    debug = "--debug" in arguments
    known = _as_hvfuse_error(error)
    if debug:
        traceback.print_exception(error)
    if known is None:
        known = HvfuseError(
            f"internal error: {type(error).__name__}: {error}",
            hint=None if debug else f"the traceback is in {keep_traceback(error)}; please report it",
        )
    if isinstance(known, StateError) and not known.hint:
        known.hint = "hvfuse status"
    note(f"hvfuse: {one_line(str(known))}")
    if known.hint:
        note(f"  hint: {one_line(known.hint)}")
    if "--json" in arguments:
        kind = next(kind.__name__ for kind in type(known).__mro__ if kind.__module__ == errors.__name__)
        emit_json({"error": {"type": kind, "message": str(known), "hint": known.hint, "exit_code": known.exit_code}})
    return known.exit_code


def _as_hvfuse_error(error: Exception) -> HvfuseError | None:
    """The error as one of ours; None for what nobody foresaw."""
    if isinstance(error, HvfuseError):
        return error
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "hvfuse"
        return UsageError(error.format_message(), hint=f"{command} --help")
    if isinstance(error, OSError) and error.strerror:
        named = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        message = f"{named}: {error.strerror}" if named else error.strerror
        hint = "run it as root" if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0 else None
        return _ERRNO_KINDS.get(error.errno or 0, HvfuseError)(message, hint=hint)
    return None


_ERRNO_KINDS: Mapping[int, type[HvfuseError]] = {
    errno.ENOENT: NotFoundError,
    errno.ENOSPC: NoSpaceError,
    errno.EDQUOT: NoSpaceError,
    errno.EBUSY: BusyError,
    errno.ETXTBSY: BusyError,
    errno.ENOTCONN: UnreachableError,
    errno.ETIMEDOUT: UnreachableError,
}


def keep_traceback(error: Exception) -> str:
    """Write the traceback to a file of its own; returns its path."""
    with tempfile.NamedTemporaryFile("w", prefix="hvfuse-traceback-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    return file.name
