"""What must not be there when a disk is attached: another way to write to it, past its log."""

from __future__ import annotations

import errno
import fcntl
import os

from hvfuse.errors import BusyError, UnsupportedError


def refuse_other_ways_in(path: str) -> None:
    """A disk must have no name but its own, and nobody may be writing to it: that would bypass the log.

    Raises BusyError, UnsupportedError, OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if os.fstat(fd).st_nlink > 1:
            raise UnsupportedError(
                f"{path}: has a hard link; what is written through the other name would not be logged",
                hint="remove the other name, or make it a copy",
            )
        # The kernel grants a read lease only where no descriptor is open for writing.
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        raise BusyError(
            f"{path}: another program has it open for writing", hint="it can be mounted once that has ended"
        ) from None
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS):
            raise  # those: a file system without leases
    finally:
        os.close(fd)
