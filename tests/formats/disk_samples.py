"""Small disks that the tests of the formats share, and qemu as their judge."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from hvfuse.formats import vhd
from hvfuse.formats.image import Image, ImageFormat, create_image, open_image

BLOCK = 4096
"""Bytes of a block in the small dynamic disks: a few of them make a few blocks."""

QEMU_FORMAT = {
    ImageFormat.RAW: "raw",
    ImageFormat.VHD_FIXED: "vpc",
    ImageFormat.VHD_DYNAMIC: "vpc",
}


def make(path: Path, size: int, image_format: ImageFormat, *, block_size: int = BLOCK) -> None:
    """A new disk; a dynamic one with small blocks."""
    if image_format is not ImageFormat.VHD_DYNAMIC:
        create_image(str(path), size, image_format)
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        vhd.write_dynamic(fd, size, block_size=block_size)
    finally:
        os.close(fd)


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes without a zero among them, different for each seed and place."""
    return bytes((at * 7 + seed * 31) % 255 + 1 for at in range(length))


def small_dynamic(path: Path, *, size: int = 10 * BLOCK) -> bytes:
    """A dynamic disk with blocks 7, 2 and 4 in the file in this order. Returns what the disk holds."""
    make(path, size, ImageFormat.VHD_DYNAMIC)
    model = bytearray(size)
    disk = open_image(str(path), writable=True)
    for seed, index in enumerate((7, 2, 4)):
        data = pattern(BLOCK - 700, seed)
        disk.pwrite(index * BLOCK + 300, data)
        model[index * BLOCK + 300 : index * BLOCK + 300 + len(data)] = data
    disk.flush()
    disk.close()
    return bytes(model)


def content(path: Path) -> bytes:
    """The whole disk, as hvfuse reads it."""
    disk: Image = open_image(str(path))
    try:
        return disk.pread(0, disk.size)
    finally:
        disk.close()


def qemu_content(path: Path, image_format: ImageFormat) -> bytes:
    """The whole disk, as qemu reads it."""
    plain = path.with_name(path.name + ".qemu-raw")
    run("qemu-img", "convert", "-f", QEMU_FORMAT[image_format], "-O", "raw", path, plain)
    data = plain.read_bytes()
    plain.unlink()
    return data


def qemu_io(path: Path, image_format: ImageFormat, *commands: str) -> None:
    """Do something to a disk with qemu-io; its exit code does not tell a failed pattern."""
    arguments = [word for command in commands for word in ("-c", command)]
    output = run("qemu-io", "-f", QEMU_FORMAT[image_format], *arguments, path)
    assert "failed" not in output, output


def run(*command: str | Path) -> str:
    """Run a program to its good end; returns its output."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr
