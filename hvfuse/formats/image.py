"""Disk images: the interface of all of them, what a file is by its content, and opening or making one.

A file is looked at in this order: a VHD's footer at its end, the footer's copy at its start, the magic
of another format at its start; anything else is raw. (The end comes first because the start of a fixed
VHD belongs to the guest.) The name only matters where it promises a VHD or VHDX that the content is not.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from hvfuse import system
from hvfuse.errors import (
    BusyError,
    CorruptError,
    HvfuseError,
    NoSpaceError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from hvfuse.extent import Buffer
from hvfuse.formats import vhd
from hvfuse.formats.raw import RawImage
from hvfuse.formats.vhd_layout import MAX_SIZE, SECTOR, DiskType

DISK_SUFFIXES = (".vhd", ".vhdx", ".raw", ".img")
"""In lower case. A file of such a name is a disk of its VM."""


def is_disk_name(name: str) -> bool:
    """Whether a file of that name is a disk, in any case of letters; hidden files never are."""
    return name.lower().endswith(DISK_SUFFIXES) and not name.startswith(".")


class ImageFormat(StrEnum):
    """What an image file is. The strings stand in manifests and in `--json`: they never change."""

    RAW = "raw"
    VHD_FIXED = "vhd-fixed"
    VHD_DYNAMIC = "vhd-dynamic"
    VHD_DIFFERENCING = "vhd-differencing"
    VHDX = "vhdx"


_VHD_FORMATS = {
    DiskType.FIXED: ImageFormat.VHD_FIXED,
    DiskType.DYNAMIC: ImageFormat.VHD_DYNAMIC,
    DiskType.DIFFERENCING: ImageFormat.VHD_DIFFERENCING,
}
_VHDX_MAGIC = b"vhdxfile"
_FOREIGN = (
    (0, b"QFI\xfb", "a qcow2"),
    (0, b"QED\0", "a QED"),
    (0, b"KDMV", "a VMDK"),
    (0, b"COWD", "a VMDK"),
    (0, b"# Disk DescriptorFile", "a VMDK"),
    (64, b"\x7f\x10\xda\xbe", "a VDI"),
    (0, b"WithoutFreeSpace", "a Parallels"),
    (0, b"WithouFreSpacExt", "a Parallels"),
    (0, b"Bochs Virtual HD Image", "a Bochs"),
    (0, b"OOOM", "a UML copy-on-write"),
    (0, b"EVF\x09\x0d\x0a\xff\x00", "an EWF"),
)
_HEAD = 512


class Image(Protocol):
    """A disk behind any format. Ranges lie within the disk (else UsageError); units are bytes.

    OSErrors of the file below pass through as they are. After `flush` has failed the image must not
    be trusted any more.
    """

    @property
    def size(self) -> int:
        """Bytes of the disk, not of its file."""

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly the bytes of a range."""

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of `data`; durable after `flush`."""

    def trim(self, offset: int, length: int) -> None:
        """Give a range's space back where that is possible; it reads as zeroes."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes."""

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the ranges within [start, end) that may hold anything but zeroes,
        ascending and apart; not to be mixed with writes."""

    def flush(self) -> None:
        """Make everything written so far durable."""

    def close(self) -> None:
        """Close the file. Does not flush."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What a file is. Sizes in bytes; `virtual_size` is the disk's, None where it cannot be told (VHDX).

    `details`: the format's own facts, for people. `damage`: what is broken, though every byte of the
    disk can still be read. `warnings`: what is unusual.
    """

    path: str
    format: ImageFormat
    virtual_size: int | None
    file_size: int
    details: Mapping[str, str | int] = field(default_factory=dict)
    damage: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def probe(path: str) -> ImageInfo:
    """Say what a file is, by its content, and verify its structures.

    Raises CorruptError naming the damaged structure, UnsupportedError naming a foreign format,
    NotFoundError, UsageError for what is neither a file nor a block device.
    """
    with _opened(path, os.O_RDONLY) as fd:
        system.keep_pages_small(fd)  # it may be a disk in use
        return _identify(fd, path)[0]


def probe_for_tracking(path: str) -> ImageInfo:
    """`probe` for a disk that shall be tracked: the image file's bytes are what counts, so every
    format that `probe` knows will do, whether hvfuse can open it or not."""
    return probe(path)


def open_image(path: str, *, writable: bool = False, ordered: bool = True) -> Image:
    """Open a disk. Raises as `probe` does, and UnsupportedError for differencing VHDs and VHDX.

    `ordered` false: see `DynamicVhd`.
    """
    with _opened(path, os.O_RDWR if writable else os.O_RDONLY) as fd:
        info, structures = _identify(fd, path)
        if info.format is ImageFormat.VHD_DIFFERENCING:
            parent = info.details.get("parent", "")
            raise UnsupportedError(f"{path}: a differencing VHD (its parent is {parent!r}) cannot be opened yet")
        if info.format is ImageFormat.VHDX or info.virtual_size is None:
            raise UnsupportedError(f"{path}: a VHDX cannot be opened yet", hint=_conversion_hint(path))
        if structures is not None and writable:
            vhd.restore_footer(fd, structures)
        if structures is not None and info.format is ImageFormat.VHD_DYNAMIC:
            return vhd.DynamicVhd(os.dup(fd), path, structures, ordered=ordered)
        return RawImage(os.dup(fd), path, size=info.virtual_size)


def check_creatable(image_format: ImageFormat, size: int, path: str) -> None:
    """Raise unless a disk of that format and size (bytes) can be made under that name."""
    suffix = os.path.splitext(path)[1].lower()
    if image_format in (ImageFormat.VHDX, ImageFormat.VHD_DIFFERENCING):
        raise UnsupportedError(f"{path}: hvfuse cannot make a {image_format} yet")
    if suffix == ".vhdx" or (suffix == ".vhd" and image_format is ImageFormat.RAW):
        raise UsageError(f"{path}: a name in {suffix} promises another format than {image_format}")
    if size <= 0:
        raise UsageError(f"{path}: a disk of {size} bytes")
    if image_format is not ImageFormat.RAW and size % SECTOR:
        raise UsageError(f"{path}: the size of a VHD is a multiple of {SECTOR}, which {size} is not")
    if image_format is not ImageFormat.RAW and size > MAX_SIZE:
        raise UsageError(f"{path}: {size} bytes are more than the 2040 GiB of a VHD", hint="use --format raw")


def create_image(path: str, size: int, image_format: ImageFormat) -> None:
    """Make a new disk of `size` bytes that reads as zeroes. Not synced; a failure leaves nothing.

    Raises as `check_creatable`, and OSError (EEXIST when there is such a file).
    """
    check_creatable(image_format, size, path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if image_format is ImageFormat.VHD_DYNAMIC:
            vhd.write_dynamic(fd, size)
        elif image_format is ImageFormat.VHD_FIXED:
            vhd.write_fixed(fd, size)
        else:
            system.truncate("image:size", fd, size)
    except BaseException:
        system.unlink("image:drop", path)
        raise
    finally:
        os.close(fd)


@contextmanager
def named(path: str) -> Iterator[None]:
    """Turn an OSError within into the package's own, naming `path`."""
    try:
        yield
    except OSError as error:
        cause = (error.strerror or str(error)).lower()
        kind: type[HvfuseError] = HvfuseError
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            kind = NotFoundError
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            kind = NoSpaceError
        elif error.errno in (errno.EEXIST, errno.EISDIR):
            kind = UsageError
        elif error.errno in (errno.EBUSY, errno.ETXTBSY):
            kind = BusyError
        raise kind(f"{path}: {cause}") from error


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    """A descriptor of a regular file or block device; never waits for a FIFO's other end."""
    with named(path):
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise UsageError(f"{path}: neither a file nor a block device")
            yield fd
        finally:
            os.close(fd)


def _identify(fd: int, path: str) -> tuple[ImageInfo, vhd.Structures | None]:
    file_size = os.lseek(fd, 0, os.SEEK_END)
    structures = vhd.load(fd, path, file_size)
    if structures is not None:
        return _vhd_info(path, file_size, structures), structures
    head = system.pread(fd, _HEAD, 0)
    if head.startswith(_VHDX_MAGIC):
        return ImageInfo(path=path, format=ImageFormat.VHDX, virtual_size=None, file_size=file_size), None
    for at, magic, name in _FOREIGN:
        if head.startswith(magic, at):
            raise UnsupportedError(
                f"{path}: {name} image, which hvfuse does not handle",
                hint=_conversion_hint(path),
            )
    _demand_raw_name(path)
    warnings = (f"{file_size} bytes are not a multiple of {SECTOR}",) if file_size % SECTOR else ()
    return ImageInfo(
        path=path, format=ImageFormat.RAW, virtual_size=file_size, file_size=file_size, warnings=warnings
    ), None


def _conversion_hint(path: str) -> str:
    return f"qemu-img convert -O vpc {path} {os.path.splitext(path)[0]}-converted.vhd"


def _demand_raw_name(path: str) -> None:
    stem, suffix = os.path.splitext(path)
    hint = f"if it is a raw image, name it so: mv {path} {stem}.raw"
    if suffix.lower() == ".vhd":
        raise CorruptError(f"{path}: not a VHD: no footer at its end nor copy at its start", hint=hint)
    if suffix.lower() == ".vhdx":
        raise CorruptError(f"{path}: not a VHDX: no file identifier at its start", hint=hint)


def _vhd_info(path: str, file_size: int, structures: vhd.Structures) -> ImageInfo:
    footer, header = structures.footer, structures.header
    details: dict[str, str | int] = {
        "id": footer.unique_id.hex(),
        "creator": footer.creator.rstrip(b" \0").decode("ascii", "replace"),
        "geometry": str(footer.geometry),
    }
    if header is not None and structures.table is not None:
        details["block_size"] = header.block_size
        details["blocks"] = header.max_table_entries
        details["blocks_allocated"] = vhd.allocated_blocks(structures.table)
        if footer.disk_type is DiskType.DIFFERENCING:
            details["parent"] = header.parent_name
            details["parent_id"] = header.parent_unique_id.hex()
    return ImageInfo(
        path=path,
        format=_VHD_FORMATS[footer.disk_type],
        virtual_size=footer.current_size,
        file_size=file_size,
        details=details,
        damage=vhd.damage(structures),
        warnings=vhd.warnings(structures),
    )
