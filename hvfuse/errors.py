"""The one exception tree. A class says how the program ends and whether a retry can help.

Exit codes (stable; `docs/exit-codes.md` is for users):

    0 done            4 status: Critical    8 unsupported format or newer version
    1 failed          5 not found           9 no space
    2 usage, config   6 busy               10 a prerequisite is missing
    3 status: Warning 7 corrupt data       11 no answer
                                           12 resynchronisation required
                                           13 not possible in this state
                                           14 less than was asked for
                                           15 suspended at the target
                                           16 failed over: another side has the VM
                                           17 a recovery plan waits for an administrator
"""

from __future__ import annotations


class HvfuseError(Exception):
    """Base of everything hvfuse raises on purpose.

    `exit_code` is what the CLI ends with. `recoverable` is true when the same operation may succeed
    later without an administrator (network, full disk): the shipper retries those and only those.
    `hint` is the next command or action, shown on a line of its own.
    """

    exit_code = 1
    recoverable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(HvfuseError):
    """The command line or the configuration asks for something that does not exist or make sense."""

    exit_code = 2


class NotFoundError(HvfuseError):
    """A VM, disk, recovery point or file of that name does not exist."""

    exit_code = 5


class BusyError(HvfuseError):
    """Somebody else holds the thing: a lock, a mount point, an open handle."""

    exit_code = 6
    recoverable = True


class CorruptError(HvfuseError):
    """Bytes read back are not what was written: checksum, truncation, broken chain."""

    exit_code = 7


class UnsupportedError(HvfuseError):
    """A format, feature or version that this hvfuse does not handle."""

    exit_code = 8


class NoSpaceError(HvfuseError):
    """The disk under a log, a store or an image is full."""

    exit_code = 9
    recoverable = True


class PrerequisiteError(HvfuseError):
    """The machine lacks something: root, /dev/fuse, a library, a program."""

    exit_code = 10


class UnreachableError(HvfuseError):
    """A process or peer did not answer."""

    exit_code = 11
    recoverable = True


class ResyncRequiredError(HvfuseError):
    """Source and replica cannot be joined by logs any more; a new copy has to be made."""

    exit_code = 12


class StateError(HvfuseError):
    """The relationship's state does not allow what was asked for; the message says what it allows."""

    exit_code = 13


class SuspendedError(HvfuseError):
    """An administrator of the target suspended the replica: it takes nothing in until that is taken back."""

    exit_code = 15
    recoverable = True


class FencedError(HvfuseError):
    """The VM was failed over, or belongs to another home: this side may neither write its disks nor ship them."""

    exit_code = 16


class PausedError(HvfuseError):
    """A recovery plan came to a pause: it goes on when an administrator says so."""

    exit_code = 17
