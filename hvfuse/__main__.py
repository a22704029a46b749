"""`python -m hvfuse`."""

import contextlib
import os
import sys

from hvfuse.cli.main import main

INTERRUPTED = 130

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        # An interrupt that comes while a module is imported, in the middle of an `exec` of the standard library's, is
        # remembered by the interpreter although it was caught: it would end with the signal, not with this code.
        if end.code == INTERRUPTED:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(INTERRUPTED)
        raise
