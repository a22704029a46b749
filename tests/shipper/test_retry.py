import errno
import os

import pytest

from hvfuse.errors import NoSpaceError
from hvfuse.shipper.retry import next_attempt, next_interval, refusal


@pytest.mark.parametrize(
    ("elapsed", "expected"),
    [
        (0, 60),
        (59.9, 60),
        (60, 120),
        (61, 120),
        (120, 240),
        (240, 480),
        (480, 600),
        (600, 2400),
        (2399, 2400),
        (2400, 4200),
        (86_400, 87_000),
    ],
)
def test_attempts_follow_the_ladder_and_then_come_every_thirty_minutes(elapsed, expected):
    assert next_attempt(elapsed) == expected


def test_the_next_attempt_always_lies_ahead():
    elapsed = 0.0
    for _ in range(200):
        following = next_attempt(elapsed)
        assert following > elapsed
        elapsed = following + 7


@pytest.mark.parametrize(
    ("finished", "expected"),
    [(101, (130, 0)), (129.9, (130, 0)), (130, (130, 1)), (165, (165, 2)), (190, (190, 3))],
)
def test_an_overrun_starts_the_next_cycle_at_once_and_counts_the_missed(finished, expected):
    assert next_interval(100, finished, 30) == expected


@pytest.mark.parametrize(
    ("code", "recoverable"),
    [
        (errno.EMFILE, True), (errno.ENOMEM, True), (errno.ENOENT, True), (errno.ESTALE, True),
        (errno.EIO, False), (errno.EACCES, False),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_tried_again_unless_only_an_administrator_can_help(code, recoverable):
    error = refusal(OSError(code, os.strerror(code)), "/vms/a.raw")
    assert error.recoverable is recoverable
    assert str(error) == f"/vms/a.raw: {os.strerror(code)}"


def test_a_full_disk_is_no_space_and_the_next_command_tells_which_one():
    error = refusal(OSError(errno.ENOSPC, "full", "/vms of mine/x"))
    assert isinstance(error, NoSpaceError)
    assert error.hint == "make room: df -h '/vms of mine/x'"
