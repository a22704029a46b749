"""The reply to FUSE_INIT, with a feature that libfuse cannot ask for. Pure: packs bytes, opens nothing.

Before every write, the kernel asks a FUSE filesystem for the attribute `security.capability`, so as to take
it away: a second round trip that costs two thirds of the throughput of small writes. It remembers a "there is
none" only of a filesystem that promises to take such privileges away by itself (FUSE_HANDLE_KILLPRIV_V2,
Linux 5.11); libfuse offers that since late versions only.

So `hvfuse.fuse` answers FUSE_INIT itself, from within libfuse's callback for it. libfuse's own answer, which
comes right after, then finds no request of that number (ENOENT), which libfuse takes for an interrupted request
and passes over. If our answer finds none, because the number was guessed wrongly, libfuse's counts, and writes
are slower: nothing else depends on it.

Layout of the reply (host byte order; a `fuse_out_header`, then a `fuse_init_out`):

    offset  size
         0     4  length of the whole, 80
         4     4  error, 0
         8     8  number of the request
        16     4  protocol, major
        20     4  protocol, minor
        24     4  read-ahead at most, bytes
        28     4  flags
        32     2  requests in the background at most; 0: the kernel's default
        34     2  of them, those from which on the device counts as congested; 0: the kernel's default
        36     4  write request at most, bytes
        40     4  granularity of timestamps, ns
        44     2  pages in a request at most
        46    34  features that are not used: zeroes
"""

from __future__ import annotations

import struct

FIRST_REQUEST = 2
"""The number of a connection's first request: the kernel counts in twos."""

ASYNC_READ = 1 << 0
ATOMIC_O_TRUNC = 1 << 3
EXPORT_SUPPORT = 1 << 4
BIG_WRITES = 1 << 5
ASYNC_DIO = 1 << 15
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
HANDLE_KILLPRIV_V2 = 1 << 28

_MAJOR, _MINOR = 7, 33
_PAGE = 4096

_REPLY = struct.Struct("=IiQ IIII HHIIH 34x")


def init_reply(*, flags: int, max_write: int, max_readahead: int, max_background: int) -> bytes:
    """The answer to the first request of a connection; sizes in bytes, a multiple of the page's."""
    return _REPLY.pack(
        _REPLY.size,
        0,
        FIRST_REQUEST,
        _MAJOR,
        _MINOR,
        max_readahead,
        flags,
        max_background,
        max_background * 3 // 4,
        max_write,
        1,
        max_write // _PAGE,
    )
