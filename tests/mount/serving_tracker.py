"""A program for the tests: tracks a VM's folder as the tracker's process does, and says "ready"."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

from hvfuse import wire
from hvfuse.errors import HvfuseError
from hvfuse.tracker.service import SOCKET_NAME, run_tracker


def say_when_ready(socket: str) -> None:
    while True:
        try:
            wire.request(socket, "status")
            break
        except HvfuseError:
            time.sleep(0.01)
    print("ready", flush=True)


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    folder, state_dir, mountpoint, *held = sys.argv[1:]
    threading.Thread(target=say_when_ready, args=(os.path.join(state_dir, SOCKET_NAME),), daemon=True).start()
    run_tracker(
        vm="vm",
        folder=folder,
        mountpoint=mountpoint,
        state_dir=state_dir,
        exclude=frozenset({"swap.raw"}),
        held=held[0] if held else None,
    )


if __name__ == "__main__":
    main()
