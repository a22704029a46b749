"""A program for the tests: serves a failed-over VM whose recovery point is a folder of files."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from hvfuse import system
from hvfuse.control.standing import serve_standing
from hvfuse.errors import HvfuseError
from hvfuse.target.hydration import Progress
from tests.mount.serving_view import FilesPoint


def main() -> None:
    """Arguments: the point's folder, the VM's, the mount point, a directory, seconds that each piece takes, and the
    label at which the process dies, "none" for none.

    In the directory: `socket`; `committed`, once the failover is; `hydrated`, made by the program, or refused while
    there is `refuse`; `told`, lines of JSON."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    point, folder, mountpoint, directory = map(Path, sys.argv[1:5])
    seconds, fatal = float(sys.argv[5]), sys.argv[6]
    main_thread = threading.get_ident()

    def injector(label: str, _call: str, _size: int) -> int | None:
        if label == fatal:
            os._exit(9)
        if label == "overlay:write" and threading.get_ident() != main_thread:
            time.sleep(seconds)
        return None

    def hydrated() -> None:
        system.passing("test:hydrated")
        if (directory / "refuse").exists():
            raise HvfuseError("the records are busy")
        (directory / "hydrated").touch()

    def tell(progress: Progress) -> None:
        with (directory / "told").open("a") as file:
            file.write(json.dumps(asdict(progress)) + "\n")

    system.install(injector)
    try:
        serve_standing(
            vm="vm",
            folder=str(folder),
            mountpoint=str(mountpoint),
            socket_path=str(directory / "socket"),
            point_reader=lambda: FilesPoint(point),
            committed=(directory / "committed").exists,
            hydrated=hydrated,
            tell=tell,
            poll_seconds=0.02,
            retry_seconds=0.05,
        )
    except HvfuseError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    else:
        print("ended", flush=True)


if __name__ == "__main__":
    main()
