import json

import pytest

from hvfuse.shipper.copy import CopyReport
from hvfuse.shipper.progress import CopyKind, CopyProgress, Meter

from .test_service import Clock

MIB = 1 << 20


def report(sent: int, *, held: int = 0) -> CopyReport:
    return CopyReport(
        regions=2, bytes_total=100 * MIB, bytes_compared=sent, bytes_differing=sent, bytes_sent=sent, frames_sent=3,
        frames_held=held, seconds=10.0,
    )  # fmt: skip


def meter(clock: Clock, kept: CopyProgress | None = None) -> tuple[Meter, list[CopyProgress]]:
    told: list[CopyProgress] = []
    kept = kept or CopyProgress(kind=CopyKind.RESYNC, generation="ab")
    return Meter(kept, clock=clock, keep=told.append), told


def test_progress_is_kept_once_a_second_with_rate_and_time_left():
    clock = Clock()
    measured, told = meter(clock)
    for tenth in range(1, 101):
        clock.seconds += 0.1
        measured.tell(tenth * MIB, 200 * MIB, tenth * 1000)
    assert len(told) in (9, 10), "each second"
    last = told[-1]
    assert last.bytes_per_second == pytest.approx(10 * MIB, rel=0.02)
    assert last.seconds_left == pytest.approx((200 * MIB - last.bytes_done) / (10 * MIB), rel=0.02)
    assert last.part == last.bytes_done / (200 * MIB)
    assert last.as_json()["bytes_saved"] == last.bytes_done - last.bytes_sent


def test_a_run_that_goes_on_adds_up_and_what_it_passes_over_is_no_rate():
    clock = Clock()
    measured, told = meter(clock)
    clock.seconds += 5
    measured.tell(50 * MIB, 100 * MIB, 7000)
    clock.seconds += 4
    measured.tell(60 * MIB, 100 * MIB, 8000)
    clock.seconds += 100  # nobody ran
    kept = CopyProgress.from_json(json.loads(json.dumps(told[-1].as_json())))
    assert kept == told[-1]
    measured, told = meter(clock, kept)
    measured.tell(60 * MIB, 100 * MIB, 0)  # closed groups, in no time
    clock.seconds += 1
    measured.tell(60 * MIB, 100 * MIB, 0)
    assert (told[-1].bytes_per_second, told[-1].seconds_left) == (0, None)
    clock.seconds += 2
    measured.tell(62 * MIB, 100 * MIB, 500)
    assert (told[-1].bytes_per_second, told[-1].seconds_left) == (MIB, 38)
    assert (told[-1].bytes_sent, told[-1].seconds, told[-1].bytes_done) == (8500, 12, 62 * MIB)
    measured.tell(100 * MIB, 100 * MIB, 600)
    measured.complete(report(600, held=5))
    assert measured.now.report.bytes_sent == 8600
    assert measured.now.report.frames_sent == 8, "of all runs"
    assert measured.now.report.bytes_compared == 100 * MIB


def test_passes_are_summed_and_those_that_hardly_get_smaller_counted():
    kept, stalled = CopyProgress(kind=CopyKind.INITIAL, generation="0"), []
    for number, sent in enumerate([1000, 900, 899, 809, 100, 95, 0], start=1):
        measured, _ = meter(Clock(), kept)
        measured.tell(MIB, MIB, sent)
        measured.complete(report(sent))
        stalled.append(measured.now.stalled)
        kept = measured.now.next_pass(str(number))
        assert (kept.number, kept.generation, kept.previous_sent) == (number + 1, str(number), sent)
        assert CopyProgress.from_json(kept.as_json()) == kept
    assert stalled == [0, 1, 2, 0, 0, 1, 0]
    assert kept.earlier.bytes_sent == 3803 and kept.earlier.passes == 7
    assert kept.earlier.text.endswith("in 7 passes")


@pytest.mark.parametrize("values", [None, {}, {"pass": 1}, {"pass": "x", "kind": "resync", "generation": "ab"}])
def test_a_record_that_is_not_understood_is_none(values):
    assert CopyProgress.from_json(values) is None


def test_every_wrong_field_of_a_record_is_survived():
    good = CopyProgress(kind=CopyKind.RESYNC, generation="ab", earlier=report(1)).as_json()
    for name in good:
        assert CopyProgress.from_json({**good, "unheard_of": 1}) is not None
        CopyProgress.from_json({key: value for key, value in good.items() if key != name})
