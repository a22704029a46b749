"""The VM that a newcomer finds: `disks/sample` with one small disk, so that something replicates."""

from __future__ import annotations

import contextlib
import os

from hvfuse import system
from hvfuse.formats.image import ImageFormat, create_image

SAMPLE_VM = "sample"
SAMPLE_DISK = "sample.vhd"
SAMPLE_SIZE = 1 << 30
"""Bytes of the disk; its file is a few KiB until something is written."""


def make_sample(disks: str) -> str:
    """Make the sample VM in the directory `disks`; returns its name. Whole or not at all.

    Raises OSError, NoSpaceError.
    """
    folder = os.path.join(disks, SAMPLE_VM)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{SAMPLE_DISK}.tmp")  # hidden, hence not a disk yet
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    create_image(temporary, SAMPLE_SIZE, ImageFormat.VHD_DYNAMIC)
    fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        system.fsync("sample:sync", fd)
    finally:
        os.close(fd)
    system.rename("sample:rename", temporary, os.path.join(folder, SAMPLE_DISK))
    system.fsync_directory("sample:directory", folder)
    return SAMPLE_VM
