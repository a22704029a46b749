"""The writer of whole logs, judged by hvfuse's reader and by one that shares no code with it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from hvfuse.formats import companion, hrl, hrl_writer
from hvfuse.formats.companion import CompanionHeader, Entries, Kind
from hvfuse.formats.hrl_reader import open_log
from hvfuse.formats.hrl_writer import LogWriter
from tests import independent_hrl
from tests.log_samples import PREVIOUS_ID, UNIQUE_ID, sealed

SIZE = 1 << 20
HEADER, _ = companion.unpack(sealed([]).companion)
Step = tuple[int, bytes | int]
"""(offset, bytes written or number of zeroes)."""


def written(path: Path, steps: list[Step], *, next_seq: int = 0) -> tuple[CompanionHeader, Entries]:
    with open(path, "xb") as file:
        writer = LogWriter(
            file.fileno(), unique_id=UNIQUE_ID, previous_unique_id=PREVIOUS_ID, opened_ns=0, written_ns=0
        )
        for offset, what in steps:
            if isinstance(what, int):
                writer.zero(offset, what)
            else:
                writer.write(offset, what)
        entries = writer.close(next_seq=next_seq)
    header = replace(
        HEADER, entry_count=len(entries), first_seq=max(0, next_seq - len(entries)), eol=writer.end,
        stored_bytes=writer.stored_bytes, entries_digest=xxhash.xxh3_128_digest(entries.tobytes()),
    )  # fmt: skip
    return header, entries


def applied(steps: list[Step]) -> bytes:
    disk = bytearray(b"\xaa" * SIZE)
    for offset, what in steps:
        data = bytes(what) if isinstance(what, int) else what
        disk[offset : offset + len(data)] = data
    return bytes(disk)


def agree(folder: Path, steps: list[Step]) -> Entries:
    """Both readers find what was written, and the log is whole."""
    path = folder / "x.hrl"
    header, entries = written(path, steps, next_seq=1000)
    with open_log(str(path)) as reader:
        reader.verify()
        reader.verify_companion(*companion.unpack(header.pack() + entries.tobytes()))
        assert reader.eol == os.stat(path).st_size
    image = folder / "image"
    image.write_bytes(b"\xaa" * SIZE)
    independent_hrl.replay(str(path), str(image))
    assert image.read_bytes() == applied(steps)
    assert independent_hrl.ids(str(path)) == (UNIQUE_ID, PREVIOUS_ID)
    seed = companion.entry_seed(UNIQUE_ID)
    assert all(companion.entry_is_valid(entry.tobytes(), seed) for entry in entries)
    path.unlink()
    return entries


OFFSETS = st.integers(0, SIZE - 1)
STEPS = st.lists(
    st.one_of(
        st.builds(lambda at, data: (at, data[: SIZE - at]), OFFSETS, st.binary(min_size=1, max_size=3000)),
        st.builds(lambda at, length: (at, min(length, SIZE - at)), OFFSETS, st.integers(1, 100_000)),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_both_readers_find_what_was_written(tmp_path_factory, steps: list[Step]) -> None:  # type: ignore[no-untyped-def]
    agree(tmp_path_factory.mktemp("log"), steps)


def test_many_entries_and_a_full_buffer_make_several_blocks(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(hrl_writer, "BUFFER", 10_000)
    steps: list[Step] = [(n * 700, bytes([n % 255 + 1]) * 600 if n % 5 else 600) for n in range(3 * 127)]
    assert len(agree(tmp_path, steps)) == 3 * 127
    agree(tmp_path, steps[:-1])


def test_long_writes_and_zeroes_are_cut(tmp_path: Path) -> None:
    _, entries = written(tmp_path / "x.hrl", [(5, b"x" * ((2 << 20) + 7)), (0, (5 << 30) + 1)])
    assert entries["length"].tolist() == [1 << 20, 1 << 20, 7, 1 << 31, 1 << 31, (1 << 30) + 1]
    assert entries["offset"].tolist() == [5, 5 + (1 << 20), 5 + (2 << 20), 0, 1 << 31, 2 << 31]
    assert entries["kind"].tolist() == [Kind.WRITE] * 3 + [Kind.ZERO] * 3
    assert os.stat(tmp_path / "x.hrl").st_blocks * 512 < 4 << 20


def test_sequence_numbers_end_where_the_next_log_begins_if_there_is_room(tmp_path: Path) -> None:
    steps: list[Step] = [(0, b"a"), (1, b"b"), (2, 1)]
    for name, next_seq, expected in (("a", 9, [6, 7, 8]), ("b", 3, [0, 1, 2]), ("c", 1, [0, 1, 2])):
        _, entries = written(tmp_path / name, steps, next_seq=next_seq)
        assert entries["seq"].tolist() == expected


def test_a_log_of_nothing_is_a_log(tmp_path: Path) -> None:
    header, entries = written(tmp_path / "x.hrl", [])
    assert (len(entries), header.eol, independent_hrl.read(str(tmp_path / "x.hrl"))) == (0, 8192, [])


def test_until_it_is_closed_it_is_no_log(tmp_path: Path) -> None:
    with open(tmp_path / "x.hrl", "xb") as file:
        writer = LogWriter(
            file.fileno(), unique_id=UNIQUE_ID, previous_unique_id=PREVIOUS_ID, opened_ns=0, written_ns=0
        )
        writer.write(0, bytes(5 << 20))
    assert not (tmp_path / "x.hrl").read_bytes().startswith(hrl.COOKIE)
