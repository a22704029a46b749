"""What a user would run instead: libfuse's own examples, and qemu's export of an image, both written in C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

from qemu.qmp import QMPClient

from .scene import Place, Scene, run, unmount

EXAMPLES = Path("usr/share/doc/libfuse3-dev/examples")
_WITHOUT_DIRECT = """
#define _GNU_SOURCE
#include <fcntl.h>
#define open(path, flags, ...) open(path, (flags) & ~O_DIRECT, ##__VA_ARGS__)
"""


def passthrough(scene_: Scene, place: Place, example: str, folder: Path) -> Path:
    """Serve a directory by libfuse's example of that name, which tracks nothing; returns where it is seen.

    `passthrough_ll` serves one directory through libfuse's lower interface, `passthrough_fh` the whole system through
    its higher one, the one that hvfuse is bound to. They are built so that they open files without O_DIRECT, as qemu
    and hvfuse do: with it, ext4 refuses what they write (EINVAL), as they do not align it.
    """
    with scene_.built() as built:
        program = built / example
        if not program.exists():
            source = _examples(built) / f"{example}.c"
            (built / "direct.h").write_text(_WITHOUT_DIRECT)
            run(
                "gcc",
                "-O2",
                "-w",
                "-include",
                built / "direct.h",
                source,
                *run("pkg-config", "--cflags", "--libs", "fuse3").split(),
                "-o",
                program,
            )
        mountpoint = place.path / f"mnt-{example}"
        mountpoint.mkdir()
        place.stack.callback(unmount, mountpoint)
        options = ["-o", f"source={folder}"] if example == "passthrough_ll" else []
        place.start(program, "-f", *options, mountpoint, until=lambda: os.path.ismount(mountpoint))
    return mountpoint if options else mountpoint / folder.relative_to("/")


def _examples(built: Path) -> Path:
    """Slim installations leave documentation out, and the examples with it: then they come from the package."""
    installed = Path("/") / EXAMPLES
    if not installed.exists():
        run("sh", "-c", f"cd {built} && apt-get -q download libfuse3-dev && dpkg-deb -x libfuse3-dev_*.deb .")
        return built / EXAMPLES
    return installed


def qemu_export(place: Place, image: Path, *, bitmap: bool) -> Path:
    """Serve a raw image by qemu's storage daemon; returns the file.

    `bitmap`: with one in memory that notes what was changed, as incremental backups need; it does not outlive qemu.
    """
    mountpoint = place.path / f"export-{image.stem}"
    mountpoint.touch()
    place.stack.callback(unmount, mountpoint)
    command = [
        "qemu-storage-daemon",
        "--blockdev", f"driver=file,node-name=file,filename={image}",
        "--blockdev", "driver=raw,node-name=disk,file=file",
    ]  # fmt: skip
    if bitmap:
        socket = _monitor(mountpoint)
        place.stack.callback(socket.unlink, missing_ok=True)
        command += ["--chardev", f"socket,id=monitor,path={socket},server=on,wait=off", "--monitor", "chardev=monitor"]
    command += ["--export", f"type=fuse,id=export,node-name=disk,mountpoint={mountpoint},writable=on"]
    place.start(*command, until=lambda: os.path.ismount(mountpoint))
    if bitmap:
        asyncio.run(_ask(socket, "block-dirty-bitmap-add", {"node": "disk", "name": "changed", "granularity": 65536}))
    return mountpoint


def qemu_backup(mountpoint: Path, target: Path, *, options: str = "", compress: bool = False) -> float:
    """Seconds that an incremental backup of what the bitmap of `qemu_export` has takes, to a new qcow2 file, until
    that is closed, and flushed by that. The bitmap is empty afterwards. `options`: of the file, for qemu-img."""
    run(
        "qemu-img", "create", "-q", "-f", "qcow2", *(("-o", options) if options else ()), target, str(_size(mountpoint))
    )
    started = time.perf_counter()
    asyncio.run(_backup(_monitor(mountpoint), target, compress=compress))
    return time.perf_counter() - started


def _size(path: Path) -> int:
    return path.stat().st_size


def _monitor(mountpoint: Path) -> Path:
    """Its socket, in a place whose path is short enough for one."""
    return Path(tempfile.gettempdir()) / f"hvfuse-bench-{zlib.crc32(bytes(mountpoint)):08x}.qmp"


async def _backup(monitor: Path, target: Path, *, compress: bool) -> None:
    file = {"driver": "file", "filename": str(target)}
    async with _qmp(monitor) as client:
        await client.execute("blockdev-add", {"driver": "qcow2", "node-name": "target", "file": file})
        job = {"job-id": "backup", "device": "disk", "target": "target", "sync": "incremental", "bitmap": "changed"}
        with client.listener("BLOCK_JOB_COMPLETED") as ended:
            await client.execute("blockdev-backup", {**job, "compress": compress})
            outcome = await ended.get()
        if "error" in outcome["data"]:
            sys.exit(f"qemu's backup failed: {outcome['data']['error']}")
        await client.execute("blockdev-del", {"node-name": "target"})


@contextlib.asynccontextmanager
async def _qmp(path: Path) -> AsyncIterator[QMPClient]:
    client = QMPClient("hvfuse-bench")
    await client.connect(str(path))
    try:
        yield client
    finally:
        await client.disconnect()


async def _ask(path: Path, command: str, arguments: dict[str, object]) -> None:
    async with _qmp(path) as client:
        await client.execute(command, arguments)
