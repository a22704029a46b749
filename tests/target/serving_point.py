"""A program for the tests: mounts a view of a recovery point in a store, and says "ready"."""

from __future__ import annotations

import logging
import sys

from hvfuse.target.journal import PointReader
from hvfuse.target.store import Store
from hvfuse.target.view import View
from hvfuse.target.view_mount import serve_view


def main() -> None:
    """Arguments: the store, the VM, the point, the mount point, the overlays' directory."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    path, vm, point, mountpoint, overlays = sys.argv[1:]
    with Store(path, create=False, read_only=True) as store:
        view = View(PointReader(store, vm, point), overlays=overlays)
        serve_view(view, mountpoint, on_ready=lambda: print("ready", flush=True))
        view.drop()
    print("ended", flush=True)


if __name__ == "__main__":
    main()
