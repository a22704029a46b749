"""Measure hvfuse against what a user would run instead, side by side in one run, in turns; medians.

Without a subject, all of them. A ratio is how many times better hvfuse is, whatever the unit; a row is met if its ratio
reaches its target.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time

from rich.console import Console

from . import document
from .scene import Scene
from .table import as_json, show

SUBJECTS = {
    "write": "writes through the mount, tracked",
    "fsync": "writes that are synced",
    "read": "reads through the mount",
    "cycle": "from a rotation to the point",
    "initial": "the first copy",
    "resync": "comparing and repairing",
    "view": "a recovery point as a disk",
    "scale": "large disks, many VMs",
    "marks": "what the region map costs",
    "cost": "where the time of a 4k write goes",
}
"""Each is a module in here, with `measure(scene)` that returns its rows."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tools/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--json", action="store_true", help='{"rows": [...]} instead of tables')
    parser.add_argument("--quick", action="store_true", help="small files, one round: whether it works, not how fast")
    parser.add_argument(
        "--folder", help="where files on the disk are made (default: the directory for temporary files)"
    )
    parser.add_argument("--write", action="store_true", help="all subjects, and then docs/benchmarks.md")
    arguments = parser.parse_args()
    if arguments.write and (arguments.subjects or arguments.quick or arguments.json):
        parser.error("--write is of all subjects, in full, as tables")
    for subject in arguments.subjects:
        if subject not in SUBJECTS:
            parser.error(f"{subject}: not a subject; there are {', '.join(SUBJECTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    scene = Scene(quick=arguments.quick, folder=arguments.folder)
    console = Console(stderr=arguments.json, width=None if sys.stdout.isatty() else 160, highlight=False)
    sections: list[document.Section] = []
    with scene.built():
        for subject in arguments.subjects or SUBJECTS:
            started = time.monotonic()
            module = importlib.import_module(f".{subject}", __package__)
            rows = module.measure(scene)
            seconds = time.monotonic() - started
            sections.append(document.Section(subject, SUBJECTS[subject], module.__doc__, seconds, rows))
            if not arguments.json:
                show(f"{subject}: {SUBJECTS[subject]} ({seconds:.0f} s)", rows, console)
    if arguments.write:
        document.write(sections, folder=arguments.folder)
    if arguments.json:
        print(as_json([row for section in sections for row in section.rows]))


if __name__ == "__main__":
    main()
