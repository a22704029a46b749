"""The files from which a failed-over VM is served, in its folder, until it has plain disks.

    .failover/NAME.data, NAME.blocks    the overlay of disk NAME over the recovery point (`hvfuse.target.overlay`)
    .failover/complete                  an empty file: every NAME.data is the whole disk, durably

The steps from overlays to plain disks, while nobody writes (`hvfuse.control.standing`):

1. All is copied up and flushed. The marker `complete` is made, durably. Before that, the overlays count, and only they.
2. Each NAME.data is renamed to NAME in the VM's folder, and the names are made durable. From the marker on, a data file
   is the disk under whichever of the two names it has: `put_in_place` finishes that after any crash.
3. Once somebody has noted that the VM has plain disks, `clean_up` takes away what is left, the marker last.

Whoever starts the VM's process asks `stands` which one it has to be.

`serving` is a lock on the folder: one process serves it or changes these files.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hvfuse import spool, system
from hvfuse.errors import BusyError
from hvfuse.formats.image import is_disk_name
from hvfuse.target.overlay import drop_overlays

_MARKER = "complete"
_DATA = ".data"


def overlays(folder: str) -> str:
    """The directory of the overlays."""
    return os.path.join(folder, spool.FAILOVER)


def is_complete(folder: str) -> bool:
    """Whether the overlays are whole disks, in place or not."""
    return os.path.lexists(os.path.join(overlays(folder), _MARKER))


def stands(folder: str) -> bool:
    """Whether what has to be started for the VM is `hvfuse.control.standing.serve_standing`: a failover has begun, if
    only by making the directory, or plain disks are there and nobody has noted it. An empty directory beside disks is
    the last that a clean-up left, and is removed. For a folder that nobody serves. Raises OSError."""
    try:
        is_begun = bool(os.listdir(overlays(folder)))
    except FileNotFoundError:
        return False
    if is_begun or not any(map(is_disk_name, os.listdir(folder))):
        return True
    os.rmdir(overlays(folder))
    return False


@contextmanager
def serving(folder: str) -> Iterator[int]:
    """Have the folder for oneself; yields a descriptor of it. Raises BusyError, OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    except BlockingIOError:
        raise BusyError(f"{folder}: another process serves what is in it") from None
    finally:
        os.close(fd)


def refuse_own_disks(folder: str) -> None:
    """A VM that is served from a point has no disk images of its own beside it. Raises BusyError naming one."""
    for name in sorted(os.listdir(folder)):
        if is_disk_name(name) or os.path.lexists(os.path.join(overlays(folder), name + _DATA)):
            raise BusyError(
                f"{os.path.join(folder, name)}: is there already; the failed-over disks would be put here",
                hint="move it elsewhere",
            )


def mark_complete(folder: str) -> None:
    """Step 1. Raises OSError; it may be marked or not then, and is right in either case."""
    system.passing("standing:mark")
    os.close(os.open(os.path.join(overlays(folder), _MARKER), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    system.fsync_directory("standing:marked", overlays(folder))


def put_in_place(folder: str) -> None:
    """Step 2. Idempotent. Raises BusyError where a disk's name has been taken, OSError."""
    for name in sorted(os.listdir(overlays(folder))):
        if not name.endswith(_DATA):
            continue
        place = os.path.join(folder, name.removesuffix(_DATA))
        if os.path.lexists(place):
            raise BusyError(f"{place}: is there already", hint="move it elsewhere: the failed-over disk belongs here")
        system.rename("standing:rename", os.path.join(overlays(folder), name), place)
    system.fsync_directory("standing:renamed", folder)
    system.fsync_directory("standing:renamed-from", overlays(folder))


def clean_up(folder: str) -> None:
    """Step 3. Idempotent. Raises OSError."""
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(overlays(folder))):
            if name != _MARKER:
                assert not name.endswith(_DATA), "disks are in place before anything is cleaned up"
                system.unlink("standing:clean", os.path.join(overlays(folder), name), missing_ok=True)
        # Without the marker, maps that had lost their data would be taken for overlays.
        system.fsync_directory("standing:cleaned", overlays(folder))
        system.unlink("standing:unmark", os.path.join(overlays(folder), _MARKER), missing_ok=True)
        system.passing("standing:remove")
        os.rmdir(overlays(folder))
    system.fsync_directory("standing:removed", folder)


def finish_interrupted(folder: str) -> bool:
    """Finish what a process that died had begun, in a folder that nobody serves, where it has been noted that the VM
    has plain disks, or need not be. Returns whether the overlays had become plain disks, which are now all that is
    left; else overlays, if there are any, go on being what they were. Idempotent. Raises BusyError (somebody serves
    it, or a disk's name has been taken), OSError."""
    if not os.path.isdir(overlays(folder)):
        return False
    with serving(folder):
        if is_complete(folder):
            put_in_place(folder)
            clean_up(folder)
            return True
        return not stands(folder)


def drop(folder: str) -> None:
    """Take the overlays away, and with them all that was written to the failed-over VM. Idempotent.
    Raises BusyError if somebody serves them, or they have become plain disks; HvfuseError, OSError."""
    if not os.path.isdir(overlays(folder)):
        return
    with serving(folder):
        if is_complete(folder):
            raise BusyError(f"{folder}: the failed-over VM has got its own disks; they are not thrown away")
        drop_overlays(overlays(folder))
