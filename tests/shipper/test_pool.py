import contextlib
import threading

import numpy as np
import pytest

from hvfuse.frames import decode, unpack_header
from hvfuse.shipper.content import Content, zeroes
from hvfuse.shipper.pool import AHEAD, FramePool, Job


def one_zero() -> Content:
    return zeroes(np.array([0]), np.array([1]))


def pool() -> FramePool:
    return FramePool(generation=b"G" * 16, cycle=3, level=1)


def test_frames_come_in_the_order_of_the_jobs_although_later_ones_are_made_first():
    second_is_made = threading.Event()

    def slow() -> Content:
        second_is_made.wait()
        return one_zero()

    def fast() -> Content:
        second_is_made.set()
        return one_zero()

    jobs = [Job(0, bytes(16), slow), Job(1, bytes(16), fast), *(Job(n, bytes(16), one_zero) for n in range(2, 30))]
    with pool() as frames:
        made = list(frames.make(jobs))
    assert [one.number for one in made] == list(range(30))
    headers = [unpack_header(one.frame) for one in made]
    assert [(header.cycle, header.number) for header in headers] == [(3, number) for number in range(30)]
    assert all(len(decode(one.frame).table) == 1 for one in made)


def test_no_more_than_a_few_frames_are_made_ahead():
    asked = []

    def jobs():
        for number in range(50):
            asked.append(number)
            yield Job(number, bytes(16), one_zero)

    with pool() as frames, contextlib.closing(frames.make(jobs())) as made:
        for taken, _ in enumerate(made, 1):
            assert len(asked) < taken + AHEAD


def test_a_job_with_nothing_to_send_makes_no_frame():
    with pool() as frames:
        assert [one.frame for one in frames.make([Job(0, bytes(16), lambda: None)])] == [b""]


def test_what_a_job_raises_ends_the_rest():
    def fail() -> Content:
        raise OSError("gone")

    with pool() as frames, pytest.raises(OSError, match="gone"):
        list(frames.make([Job(0, bytes(16), fail), Job(1, bytes(16), one_zero)]))


def test_once_the_iterator_is_closed_no_worker_is_at_it_any_more():
    started, at_work = threading.Event(), []

    def work() -> Content:
        at_work.append(1)
        started.set()
        try:
            return one_zero()
        finally:
            at_work.pop()

    with pool() as frames:
        made = frames.make(Job(number, bytes(16), work) for number in range(20))
        next(made)
        started.wait()
        made.close()
        assert at_work == []
