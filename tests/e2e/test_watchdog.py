"""Replication that stands still while everything seems to be there: it may not stay green, and what hangs is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hvfuse.control.daemon import serving_pid

from .conftest import Installation, wait_until

pytestmark = pytest.mark.mount

FREQUENCY = 5
INTERVALS = 2
LOOKING = 3.0
"""Seconds that looking may take where a process does not answer, beyond the two intervals."""

HOLDER = """
import sys
import lmdb
env = lmdb.open(sys.argv[1], map_size=1 << 30, max_dbs=32, create=False)
with env.begin(write=True):
    print("held", flush=True)
    sys.stdin.read()
"""
"""Holds the store's write lock: frames are read and taken in no more, nothing is refused, nothing is committed."""


def replicating(installation: Installation) -> None:
    folder = installation.disks / "vm1"
    folder.mkdir(parents=True)
    with open(folder / "os.raw", "wb") as file:
        file.truncate(4 << 20)
    script = installation.root / "notify.sh"
    script.write_text(f"#!/bin/sh\ncat >>{installation.root}/told\n")
    script.chmod(0o755)
    config = f'[replication]\nfrequency = "{FREQUENCY}s"\n[monitoring]\nnotify = ["{script}"]\n'
    installation.root.joinpath("hvfuse.toml").write_text(config)
    installation.start()
    installation.wait_for_state("vm1")
    wait_until(lambda: installation.status("vm1")["health"] == "Normal", lambda: str(installation.status("vm1")))


def told(installation: Installation) -> list[str]:
    """The healths that the administrator's command was told of, in order."""
    path = installation.root / "told"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event["data"]["to"] for event in events if event["kind"] == "health"]


def critical_after(installation: Installation) -> tuple[float, dict[str, Any]]:
    """How long it takes until the VM is Critical for want of progress, and the reason."""
    started = time.monotonic()
    found: list[dict[str, Any]] = []

    def is_told() -> bool:
        found[:] = [one for one in installation.status("vm1")["reasons"] if one["id"] == "no-progress"]
        return bool(found)

    wait_until(is_told, lambda: str(installation.status("vm1")))
    return time.monotonic() - started, found[0]


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def assert_goes_on(installation: Installation) -> None:
    wait_until(lambda: installation.status("vm1")["health"] == "Normal", lambda: str(installation.status("vm1")))


def in_time(seconds: float) -> bool:
    # The interval under way when the process stops counts, too: a point had just been made, at best.
    return seconds <= INTERVALS * FREQUENCY + FREQUENCY + LOOKING


@pytest.mark.parametrize("role", ["shipper", "tracker"])
def test_a_process_that_stands_still_turns_critical_and_is_named(installation: Installation, role: str) -> None:
    replicating(installation)
    socket = str(installation.root / "state" / "vms" / "vm1" / f"{role}.sock")
    pid = serving_pid(socket)
    assert pid is not None
    with stopped(pid):
        seconds, reason = critical_after(installation)
        assert in_time(seconds)
        assert f"the {role} (pid {pid}) was stopped by a signal" in reason["text"]
        assert reason["next_command"] == f"kill -CONT {pid}"
        done = subprocess.run(
            installation.command("status"), env=installation.environment(), cwd="/", capture_output=True, text=True
        )
        assert done.returncode == 4
        assert "vm1 needs attention" in done.stdout
        if role == "shipper":
            wait_until(lambda: "Critical" in told(installation), installation.logs)
    assert_goes_on(installation)
    if role == "shipper":
        wait_until(lambda: told(installation)[-2:] == ["Critical", "Normal"], installation.logs)


def test_a_store_that_takes_and_never_commits_turns_critical_and_is_named(installation: Installation) -> None:
    replicating(installation)
    database = str(installation.root / "store" / "store.lmdb")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, database], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        seconds, reason = critical_after(installation)
        assert in_time(seconds)
        assert "the shipper waits for the target to take cycle" in reason["text"]
        holder.stdin.close()
        holder.wait()
    assert_goes_on(installation)
