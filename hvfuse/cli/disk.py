"""`hvfuse disk`: make, examine, convert and compare disk images."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from hvfuse import spool, system
from hvfuse.cli.output import emit_json, json_option, note
from hvfuse.errors import CorruptError, NotFoundError, UsageError
from hvfuse.extent import round_up
from hvfuse.formats.image import (
    ImageFormat,
    ImageInfo,
    check_creatable,
    create_image,
    named,
    open_image,
    probe,
)
from hvfuse.formats.image_copy import Progress, copy_disk, first_difference
from hvfuse.formats.vhd_layout import SECTOR
from hvfuse.words import bytes_text

_MIB = 1 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+)(?:([KMGT])(?:iB)?)?", re.ASCII | re.IGNORECASE)
_CREATABLE = [ImageFormat.VHD_DYNAMIC.value, ImageFormat.VHD_FIXED.value, ImageFormat.RAW.value]


class Size(click.ParamType[int]):
    """A number of bytes: 4096, 512M, 1G, 1GiB. Units are powers of 1,024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises click's BadParameter."""
        match = _SIZE.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is not a size such as 4096, 512M, 1G or 1GiB", param, ctx)
        return int(match[1]) * _UNITS[(match[2] or "").upper()]


_format_option = click.option(
    "--format",
    "format_name",
    type=click.Choice(_CREATABLE),
    help="What to make.  [default: vhd-dynamic for a name in .vhd, else raw]",
)
_force_option = click.option("--force", is_flag=True, help="Replace an existing file.")


@click.group()
def disk() -> None:
    """Create, examine, convert and compare disk images."""


@disk.command()
@click.argument("path", metavar="PATH")
@click.argument("size", metavar="SIZE", type=Size())
@_format_option
@click.option("--exact", is_flag=True, help="Do not round the size of a VHD up to a whole MiB.")
@_force_option
@json_option
def create(*, path: str, size: int, format_name: str | None, exact: bool, force: bool, as_json: bool) -> None:
    """Make a disk of SIZE (512M, 1G, 1GiB) that reads as zeroes.

    A VHD is made a whole number of MiB, as Azure wants it; --exact takes any multiple of 512 bytes.
    """
    image_format = _chosen_format(path, format_name)
    made = size if exact or image_format is ImageFormat.RAW else round_up(size, _MIB)
    with _new_file(path, image_format, made, force=force):
        pass
    if as_json:
        emit_json({"path": path, "format": image_format, "virtual_size": made, "requested_size": size})
        return
    rounded = f", rounded up from {size} bytes" if made != size else ""
    click.echo(f"{path}: made, {image_format}, {_size_text(made)}{rounded}")


@disk.command()
@click.argument("path", metavar="PATH")
@json_option
def info(path: str, as_json: bool) -> None:
    """Say what a disk is, by its content."""
    found = probe(path)
    fields = _info_fields(found)
    if as_json:
        emit_json(fields)
        return
    for name, value in fields.items():
        if isinstance(value, Mapping | list):
            continue
        text = _size_text(value) if name.endswith("_size") and value is not None else value
        click.echo(f"{name.replace('_', ' '):<18} {'unknown' if text is None else text}")
    for name, value in found.details.items():
        click.echo(f"{name.replace('_', ' '):<18} {value}")
    for remark in (*found.damage, *found.warnings):
        click.echo(f"{'note':<18} {remark}")


@disk.command()
@click.argument("path", metavar="PATH")
@click.option("--repair", is_flag=True, help="Put back a footer that an interrupted growth left out.")
@json_option
@click.pass_context
def check(ctx: click.Context, path: str, repair: bool, as_json: bool) -> None:
    """Verify a disk's structures: checksums, bounds, overlaps. Ends with 7 when they are damaged.

    The guest's data has no checksums in these formats and is not judged.
    """
    try:
        found = probe(path)
        if repair and found.damage:
            _demand_unreplicated(path)
            with closing(open_image(path, writable=True)) as repaired:
                repaired.flush()
            found = probe(path)
    except CorruptError as error:
        if not as_json:
            raise
        emit_json({"path": path, "ok": False, "problems": [str(error)], "warnings": []})
        ctx.exit(error.exit_code)
    if as_json:
        emit_json(
            {
                "path": path,
                "ok": not found.damage,
                "format": found.format,
                "problems": list(found.damage),
                "warnings": list(found.warnings),
            }
        )
    else:
        for problem in found.damage:
            note(f"hvfuse: {path}: {problem}")
        for warning in found.warnings:
            note(f"{path}: {warning}")
        if not found.damage:
            click.echo(f"{path}: ok, {found.format}")
        elif not repair:
            note(f"  hint: hvfuse disk check --repair {path}")
    ctx.exit(CorruptError.exit_code if found.damage else 0)


@disk.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@_format_option
@click.option("--whole-mib", is_flag=True, help="Round the disk up to a whole MiB, as Azure wants it.")
@_force_option
@json_option
def convert(*, source: str, target: str, format_name: str | None, whole_mib: bool, force: bool, as_json: bool) -> None:
    """Copy the disk SRC into a new image DST of another format. Zeroes take no space in DST.

    DST appears only once it is complete and durable.
    """
    image_format = _chosen_format(target, format_name)
    with closing(open_image(source)) as old:
        grain = _MIB if whole_mib else 1 if image_format is ImageFormat.RAW else SECTOR
        size = round_up(old.size, grain)
        with (
            _new_file(target, image_format, size, force=force) as temporary,
            closing(open_image(temporary, writable=True, ordered=False)) as new,
            _progress(f"Converting {os.path.basename(source)}", old.size) as progress,
        ):
            written = copy_disk(old, new, progress)
            new.flush()
    if as_json:
        fields = {"source": source, "target": target, "format": image_format, "virtual_size": size}
        emit_json({**fields, "bytes_written": written})
        return
    click.echo(f"{target}: made, {image_format}, {_size_text(size)}, {bytes_text(written)} of it data")


@disk.command()
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@json_option
@click.pass_context
def compare(ctx: click.Context, one: str, other: str, as_json: bool) -> None:
    """Compare two disks byte by byte, whatever their formats. Ends with 1 when they differ.

    Disks of different sizes differ, even if the longer one goes on with zeroes.
    """
    with closing(open_image(one)) as first, closing(open_image(other)) as second:
        sizes = (first.size, second.size)
        with _progress("Comparing", min(sizes)) as progress:
            at = first_difference(first, second, progress)
    if as_json:
        emit_json({"identical": at is None, "first_difference": at, "sizes": sizes})
    elif at is None:
        click.echo(f"identical: {_size_text(sizes[0])}")
    elif sizes[0] != sizes[1]:
        click.echo(f"different: from byte {at} on; sizes {sizes[0]} and {sizes[1]} bytes")
    else:
        click.echo(f"different: from byte {at} on")
    ctx.exit(0 if at is None else 1)


def _chosen_format(path: str, format_name: str | None) -> ImageFormat:
    if format_name is not None:
        return ImageFormat(format_name)
    return ImageFormat.VHD_DYNAMIC if path.lower().endswith((".vhd", ".vhdx")) else ImageFormat.RAW


def _size_text(size: int) -> str:
    return f"{bytes_text(size)} ({size} bytes)"


def _info_fields(found: ImageInfo) -> dict[str, Any]:
    return {
        "path": found.path,
        "format": found.format,
        "virtual_size": found.virtual_size,
        "file_size": found.file_size,
        "disk_size": os.stat(found.path).st_blocks * 512,
        "details": dict(found.details),
        "problems": list(found.damage),
        "warnings": list(found.warnings),
    }


@contextmanager
def _new_file(path: str, image_format: ImageFormat, size: int, *, force: bool) -> Iterator[str]:
    """Yield the name of a new empty image, which becomes `path`, durably, when the block ends well."""
    check_creatable(image_format, size, path)
    if os.path.lexists(path):
        _demand_replaceable(path, force=force)
    folder, name = os.path.split(path)
    if folder and not os.path.isdir(folder):
        raise NotFoundError(f"{folder}: no such directory")
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.new")
    with named(path):
        try:
            create_image(temporary, size, image_format)
            yield temporary
            _sync(temporary)
            system.rename("disk:rename", temporary, path)
        except BaseException:
            system.unlink("disk:drop", temporary, missing_ok=True)
            raise
        system.fsync_directory("disk:directory", folder or ".")


def _demand_replaceable(path: str, *, force: bool) -> None:
    if not os.path.isfile(path) or os.path.islink(path):
        raise UsageError(f"{path}: exists and is not a plain file")
    _demand_unreplicated(path)
    if not force:
        raise UsageError(f"{path}: exists already", hint="add --force to replace it")


def _demand_unreplicated(path: str) -> None:
    """What changes a disk behind its mount escapes the log, and forces a whole new copy."""
    if os.path.exists(spool.state_name(os.path.realpath(path))):
        raise UsageError(f"{path}: is replicated; it must not be changed behind its mount")


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        system.fsync("disk:sync", fd)
    finally:
        os.close(fd)


@contextmanager
def _progress(label: str, total: int) -> Iterator[Progress]:
    """A bar when stderr is a terminal, nothing elsewhere; yields what is told how far it has come."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda position: bar.update(task, completed=position)
