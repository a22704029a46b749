"""Who goes first, and how long for."""

from __future__ import annotations

import threading
import time

from hvfuse.turns import Turns


def test_the_first_waits_for_one_turn_however_often_the_other_comes() -> None:
    turns, stop, begun = Turns(), threading.Event(), [0]

    def come_again() -> None:
        while not stop.is_set():
            with turns.behind():
                begun[0] += 1
                time.sleep(0.002)

    other = threading.Thread(target=come_again)
    other.start()
    most = 0
    for _ in range(50):
        before = begun[0]
        with turns:
            most = max(most, begun[0] - before)
        time.sleep(0.001)
    stop.set()
    other.join()
    assert most <= 1
    assert turns.taken == 50


def test_nobody_has_a_turn_during_another() -> None:
    turns, inside, together = Turns(), [0], [0]

    def take(turn: object) -> None:
        for _ in range(2000):
            with turn():  # type: ignore[operator]
                inside[0] += 1
                together[0] = max(together[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=take, args=(turn,)) for turn in (lambda: turns, turns.behind)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1]
