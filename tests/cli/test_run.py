"""`hvfuse run`: what asks it to end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hvfuse.cli.run import SILENT_SECONDS, Ask, Interrupts, Watch
from hvfuse.control.status import VmStatus
from hvfuse.errors import CorruptError, HvfuseError, UnreachableError
from tests.control.children import HandClock, until

FLOOD = """
import os, signal, sys, threading
from hvfuse.cli.run import Interrupts

interrupts = Interrupts()

def flood():
    for _ in range(3000):
        os.kill(os.getpid(), signal.SIGINT)

with interrupts.caught():
    sender = threading.Thread(target=flood)
    sender.start()
    while sender.is_alive():
        interrupts.count = 0
        interrupts.wait(1e-5)
    sender.join()
print("still alive")
"""
"""Sends itself signals as fast as it can, so that some come amid the wait."""


def test_a_signal_ends_the_wait_and_is_counted() -> None:
    interrupts = Interrupts()
    with interrupts.caught():
        assert not interrupts.wait(0)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.wait(60)
        signal.raise_signal(signal.SIGINT)
        assert interrupts.wait(60)
        assert interrupts.count == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_amid_the_wait_does_not_hang_the_program() -> None:
    done = subprocess.run([sys.executable, "-c", FLOOD], check=False, capture_output=True, text=True, timeout=60)
    assert done.stdout == "still alive\n", done.stderr


def test_statuses_that_take_for_ever_keep_nobody_waiting() -> None:
    answered = threading.Event()

    @contextmanager
    def statuses() -> Iterator[Ask]:
        def ask() -> list[VmStatus]:
            answered.wait()
            return []

        yield ask

    with Watch(statuses) as watch:
        assert watch.news() is None
        answered.set()
        until(lambda: watch.news() == [])


def test_statuses_that_fail_are_told_of_and_asked_for_again() -> None:
    times = 0

    @contextmanager
    def statuses() -> Iterator[Ask]:
        def ask() -> list[VmStatus]:
            nonlocal times
            times += 1
            if times == 1:
                raise CorruptError("records: damaged")
            return []

        yield ask

    with Watch(statuses) as watch:
        with pytest.raises(CorruptError):
            until(watch.news)
        until(lambda: watch.news() == [])


def test_what_nobody_foresaw_when_statuses_are_asked_for_ends_nothing() -> None:
    @contextmanager
    def statuses() -> Iterator[Ask]:
        def ask() -> list[VmStatus]:
            raise KeyError("untracked")

        yield ask

    with Watch(statuses) as watch, pytest.raises(HvfuseError, match="internal error: KeyError: 'untracked'"):
        until(watch.news)


def test_that_no_status_comes_any_more_is_told() -> None:
    answered = threading.Event()
    clock = HandClock()

    @contextmanager
    def statuses() -> Iterator[Ask]:
        def ask() -> list[VmStatus]:
            answered.wait()
            return []

        yield ask

    with Watch(statuses, clock=clock) as watch:
        clock.at += SILENT_SECONDS
        assert watch.news() is None
        clock.at += 1
        with pytest.raises(UnreachableError, match="what is shown is old"):
            watch.news()
        answered.set()
        until(lambda: is_answered(watch))
        assert watch.news() in (None, [])


def is_answered(watch: Watch) -> bool:
    try:
        return watch.news() == []
    except UnreachableError:
        return False
