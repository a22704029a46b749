"""Numbers in words."""

from __future__ import annotations

import pytest

from hvfuse.cli.output import time_text
from hvfuse.words import bytes_text, duration_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), ((1 << 20) - 1, "1 MiB"),
        (1 << 20, "1 MiB"), (20 << 30, "20 GiB"), (int(2.5 * (1 << 40)), "2.5 TiB"), (1 << 60, "1024 PiB"),
    ],
)  # fmt: skip
def test_sizes_are_told_with_the_unit_that_fits(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1.0, "0.0 s"), (0.04, "0.0 s"), (0.45, "0.5 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"),
        (59.6, "1 min"), (185, "3 min 5 s"), (3600, "1 h"), (7800, "2 h 10 min"), (86399.9, "1 d"), (273600, "3 d 4 h"),
    ],
)  # fmt: skip
def test_spans_are_told_in_two_units_at_most(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_instants_are_iso_8601_in_utc_and_exact_to_the_millisecond() -> None:
    assert time_text(1_700_000_000_123_456_789) == "2023-11-14T22:13:20.123Z"
    assert time_text(1_700_000_000_999_999_999) == "2023-11-14T22:13:20.999Z"
    assert time_text(0) == "1970-01-01T00:00:00.000Z"
