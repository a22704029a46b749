"""`hvfuse log`: look into replication logs, ours and Hyper-V's, verify them, apply them to an image."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import click

from hvfuse import spool
from hvfuse.cli.output import emit_json, json_option, note, time_text
from hvfuse.errors import HvfuseError, UnsupportedError, UsageError
from hvfuse.formats import hrl
from hvfuse.formats.companion import AddressSpace, CompanionHeader, Entries, Kind
from hvfuse.formats.hrl_reader import LogEntry, LogReader, open_log, replay
from hvfuse.formats.image import Image, ImageFormat, named, open_image, probe
from hvfuse.words import bytes_text

_FLAT_FORMATS = (ImageFormat.RAW, ImageFormat.VHD_FIXED)
"""Images in which the disk's byte n is the file's byte n."""

Companion = tuple[CompanionHeader, Entries]


@click.group()
def log() -> None:
    """Examine replication logs (.hrl) and apply them to images."""


@log.command()
@click.argument("path", metavar="FILE.hrl")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="Show the first N entries only.")
@json_option
def dump(path: str, limit: int | None, as_json: bool) -> None:
    """Show a log's header and its entries in the order of the writes.

    Metadata is verified on the way, payloads are not. With a companion (FILE.hrc) beside it, entries
    have sequence numbers and kinds, and flushes are shown.
    """
    with open_log(path) as reader:
        companion = _companion_of(path)
        entries = islice(_described(reader, companion), limit)
        if as_json:
            emit_json(
                {
                    "path": path,
                    "header": _header_fields(reader.header),
                    "companion": _companion_fields(companion),
                    "entries": list(entries),
                }
            )
            return
        for title, fields in (
            ("", _header_fields(reader.header)),
            ("companion ", _companion_fields(companion)),
        ):
            for name, value in (fields or {}).items():
                click.echo(f"{title + name.replace('_', ' '):<26} {'-' if value is None else value}")
        click.echo(f"\n{'seq':>8} {'kind':<6} {'offset':>16} {'length':>11} {'location':>16} {'checksum':<8} time")
        for entry in entries:
            seq = "-" if entry["seq"] is None else entry["seq"]
            click.echo(
                f"{seq:>8} {entry['kind']:<6} {entry['offset']:>16} {entry['length']:>11} "
                f"{entry['location']:>16} {entry['checksum']:08x} {entry['time']}"
            )


@log.command()
@click.argument("paths", metavar="FILE.hrl...", nargs=-1, required=True)
@json_option
@click.pass_context
def verify(ctx: click.Context, paths: tuple[str, ...], as_json: bool) -> None:
    """Verify logs wholly: chain, bounds, every checksum, and the companion if there is one.

    All files are looked at; the first that fails decides the exit code: 7 when it is damaged.
    """
    results: list[dict[str, Any]] = []
    exit_code = 0
    for path in paths:
        try:
            result = _verify(path)
        except HvfuseError as error:
            exit_code = exit_code or error.exit_code
            result = {"path": path, "ok": False, "error": type(error).__name__, "message": str(error)}
            note(f"hvfuse: {error}")
            if error.hint:
                note(f"  hint: {error.hint}")
        else:
            if not as_json:
                unverified = f", {result['unverified']} without a checksum" if result["unverified"] else ""
                beside = ", companion agrees" if result["companion"] else ""
                size = bytes_text(result["payload_bytes"])
                click.echo(f"{path}: ok, entries {result['entries']}, {size}{unverified}{beside}")
        results.append(result)
    if as_json:
        emit_json({"ok": exit_code == 0, "logs": results})
    ctx.exit(exit_code)


@log.command()
@click.argument("path", metavar="FILE.hrl")
@click.argument("image_path", metavar="IMAGE")
@click.option("--yes", is_flag=True, help="Do not ask before writing.")
@json_option
def apply(path: str, image_path: str, yes: bool, as_json: bool) -> None:
    """Write a log's entries into a raw image or a fixed VHD.

    The log is verified wholly first, and nothing is written when it is damaged or reaches beyond the
    disk's end. An interrupted run is repeated: the result is the same. The log's header knows the size
    of the log and not of the disk, so a disk that is larger than it was is not noticed.
    """
    if as_json and not yes:
        raise UsageError("log apply --json does not ask: add --yes")
    with open_log(path) as reader:
        companion = _companion_of(path)
        if companion is not None and companion[0].address_space is not AddressSpace.LOGICAL:
            raise UnsupportedError(f"{path}: holds offsets in an image file, not on a disk")
        with _opened_flat(image_path) as image:
            reader.check_fits(image.size)
            with _progress("Verifying", reader.eol) as advance:
                done = reader.verify(advance)
            if companion is not None:
                reader.verify_companion(*companion)
            if not yes:
                size = bytes_text(done.payload_bytes)
                click.confirm(f"Write {size} in {done.entries} pieces into {image_path}?", abort=True, err=True)
            with named(image_path), _progress("Writing", done.payload_bytes) as advance:
                replay(reader, image, advance)
    if as_json:
        emit_json({"path": path, "image": image_path, "entries": done.entries, "payload_bytes": done.payload_bytes})
    else:
        click.echo(f"{image_path}: applied, entries {done.entries}, {bytes_text(done.payload_bytes)}")


def _verify(path: str) -> dict[str, Any]:
    with open_log(path) as reader:
        companion = _companion_of(path)
        with _progress(f"Verifying {path}", reader.eol) as advance:
            done = reader.verify(advance)
        if companion is not None:
            reader.verify_companion(*companion)
    return {
        "path": path,
        "ok": True,
        "blocks": done.blocks,
        "entries": done.entries,
        "payload_bytes": done.payload_bytes,
        "unverified": done.unverified,
        "companion": companion is not None,
    }


def _companion_of(path: str) -> Companion | None:
    """The verified companion beside a log; None when there is none, as beside a foreign log, or when it
    describes the other log of its serial: one of the two is compacted."""
    base = path.removesuffix(".hrl")
    try:
        companion = spool.read_companion(f"{base.removesuffix('.c')}.hrc")
    except FileNotFoundError:
        return None
    return companion if companion[0].is_compacted == base.endswith(".c") else None


def _described(reader: LogReader, companion: Companion | None) -> Iterator[dict[str, Any]]:
    """Each entry as the fields of its JSON object."""
    if companion is None:
        for entry in reader:
            yield _entry_fields(entry, seq=None, kind=Kind.WRITE)
        return
    for indexed in reader.with_companion(*companion):
        yield _entry_fields(indexed.entry, seq=indexed.seq, kind=indexed.kind)


def _entry_fields(entry: LogEntry, *, seq: int | None, kind: Kind) -> dict[str, Any]:
    return {
        "seq": seq,
        "kind": kind.name.lower(),
        "offset": entry.byte_offset,
        "length": entry.length,
        "location": entry.location,
        "checksum": entry.checksum,
        "time": _time(entry.timestamp),
    }


def _header_fields(header: hrl.LogHeader) -> dict[str, Any]:
    return {
        "version": f"{header.version >> 16}.{header.version & 0xFFFF}",
        "creator": header.creator_application.decode("ascii", "replace").rstrip(" \0"),
        "creator_version": f"{header.creator_version:#x}",
        "opened": _time(header.timestamp),
        "modified": _time(header.last_modified_timestamp),
        "original_size": header.original_size,
        "current_size": header.current_size,
        "end_of_log": header.eol_location,
        "metadata_size": header.metadata_size,
        "entry_count": header.total_metadata_entries,
        "error_code": header.error_code,
        "unique_id": _guid(header.unique_id),
        "previous_unique_id": _guid(header.previous_unique_id),
        "vhd2_data_write_guid": _guid(header.vhd2_data_write_guid),
    }


def _companion_fields(companion: Companion | None) -> dict[str, Any] | None:
    if companion is None:
        return None
    header, _ = companion
    return {
        "generation": header.generation.hex(),
        "first_cycle": header.first_cycle,
        "cycle": header.cycle,
        "serial": header.serial,
        "disk_id": header.disk_id.hex(),
        "first_seq": header.first_seq,
        "entry_count": header.entry_count,
        "offsets": "disk" if header.address_space is AddressSpace.LOGICAL else "image file",
        "start_size": header.start_size,
        "end_size": header.end_size,
        "opened": time_text(header.opened_ns),
        "sealed": time_text(header.sealed_ns),
        "disk_count": header.disk_count,
        "digest": header.digest().hex(),
    }


def _time(timestamp: int) -> str:
    return time_text(hrl.unix_seconds(timestamp) * 10**9)


def _guid(raw: bytes) -> str | None:
    """A GUID as Windows writes it; None for the one that is all zeroes."""
    return str(uuid.UUID(bytes_le=raw)) if any(raw) else None


@contextmanager
def _opened_flat(path: str) -> Iterator[Image]:
    """An image open for writing. Refuses what is not flat, and what is replicated."""
    info = probe(path)
    if info.format not in _FLAT_FORMATS:
        raise UnsupportedError(
            f"{path}: is {info.format}: a log does not say whether its offsets count on the disk or in the image "
            "file, and only in a raw image or fixed VHD that is the same",
            hint=f"convert {path} first: hvfuse disk convert --help",
        )
    if os.path.exists(spool.state_name(os.path.realpath(path))):
        raise UsageError(
            f"{path}: is replicated; writing to it behind its mount would force a whole new copy",
            hint="apply the log to the disk as the mount shows it",
        )
    image = open_image(path, writable=True)
    try:
        yield image
    finally:
        image.close()


@contextmanager
def _progress(label: str, length: int) -> Iterator[Any]:
    """A bar on a terminal's stderr, nothing elsewhere; yields what is told of bytes done."""
    with click.progressbar(length=length, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield bar.update
