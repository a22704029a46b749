"""Walking, verifying and replaying closed logs; hvfuse's reader and the independent one side by side."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvfuse.errors import CorruptError, HvfuseError, NotFoundError, UnsupportedError
from hvfuse.formats import companion, hrl
from hvfuse.formats.companion import Kind
from hvfuse.formats.hrl_reader import BytesSource, LogReader, open_log, replay
from hvfuse.formats.image import open_image
from tests import independent_hrl
from tests.log_samples import FLUSH, Op, foreign, foreign_block, header, sealed, trim, write, zero

DISK = 1 << 16


def reader(data: bytes) -> LogReader:
    return LogReader(BytesSource(data), name="log")


def saved(folder: Path, data: bytes, name: str = "d.hrl") -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def image_of(folder: Path, data: bytes) -> str:
    return saved(folder, data, "disk.raw")


def replayed(path: str, image: str) -> bytes:
    disk = open_image(image, writable=True)
    with open_log(path) as log:
        log.verify()
        replay(log, disk)
    disk.close()
    return Path(image).read_bytes()


def many_ops(count: int) -> Iterator[Op]:
    rng = random.Random(11)
    for _ in range(count):
        offset, length = 512 * rng.randrange(100), 512 * rng.randrange(1, 20)
        pick = rng.random()
        if pick < 0.7:
            yield write(offset, rng.randbytes(length))
        elif pick < 0.9:
            yield (zero if pick < 0.8 else trim)(offset, length)
        else:
            yield FLUSH


OPS = st.lists(
    st.one_of(
        st.builds(write, st.integers(0, DISK - 600), st.binary(min_size=1, max_size=600)),
        st.builds(zero, st.integers(0, DISK - 5000), st.integers(1, 5000)),
        st.builds(trim, st.integers(0, DISK - 5000), st.integers(1, 5000)),
        st.just(FLUSH),
    ),
    max_size=300,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ops=OPS)
def test_both_readers_replay_a_sealed_log_to_the_same_disk(tmp_path: Path, ops: list[Op]) -> None:
    before = random.Random(1).randbytes(DISK)
    sample = sealed(ops)
    path = saved(tmp_path, sample.log)
    assert replayed(path, image_of(tmp_path, before)) == sample.applied(before)
    image = image_of(tmp_path, before)
    independent_hrl.replay(path, image)
    assert Path(image).read_bytes() == sample.applied(before)


def test_both_readers_find_the_same_entries_over_many_blocks(tmp_path: Path) -> None:
    sample = sealed(list(many_ops(1000)))
    path = saved(tmp_path, sample.log)
    with open_log(path) as log:
        assert [(e.byte_offset, e.length, e.location) for e in log] == independent_hrl.read(path)
        done = log.verify()
    assert done.entries == sum(op.kind is not Kind.FLUSH for op in sample.ops)
    assert done.blocks > 8
    assert done.unverified == 0


def test_a_hole_of_the_log_is_punched_into_the_disk_and_costs_no_reading(tmp_path: Path) -> None:
    length = 1 << 30
    body = foreign_block([], distance=0, size=4096)
    last = foreign_block([(4096, length)], distance=4096 + length, size=4096, checksums=[hrl.ZERO_CHECKSUM])
    eol = 4096 + len(body) + length + len(last)
    path = saved(tmp_path, header(eol_location=eol, total_metadata_entries=1).pack() + body)
    with open(path, "r+b") as file:
        file.seek(eol - len(last))
        file.write(last)
    image = image_of(tmp_path, b"\xaa" * 8192)
    os.truncate(image, 2 << 30)
    disk = open_image(image, writable=True)
    with open_log(path) as log:
        assert log.verify().payload_bytes == length
        replay(log, disk)
    assert disk.pread(0, 8192) == b"\xaa" * 4096 + bytes(4096)
    disk.close()
    assert os.stat(image).st_blocks * 512 < 1 << 20


def test_a_recycled_log_is_read_up_to_its_end_mark() -> None:
    sample = sealed([write(0, b"new" * 100)])
    stale = sealed([write(4096, b"old" * 9000)]).log[len(sample.log) :]
    assert list(reader(sample.log + stale)) == list(reader(sample.log))
    assert reader(sample.log + stale).verify().payload_bytes == 300


def test_a_foreign_log_without_data_checksums_is_accepted_as_unverified(tmp_path: Path) -> None:
    groups = [[(1024, b"a" * 512), (0, b"b" * 1024)], [(512, b"c" * 512)]]
    path = saved(tmp_path, foreign(groups))
    with open_log(path) as log:
        assert not log.header.is_ours
        done = log.verify()
    assert (done.blocks, done.entries, done.unverified) == (3, 3, 3)
    assert replayed(path, image_of(tmp_path, bytes(2048))) == b"b" * 512 + b"c" * 512 + b"a" * 512 + bytes(512)


def test_a_log_of_version_1_is_read() -> None:
    assert [e.length for e in reader(foreign([[(0, b"x" * 512)]], version=hrl.VERSION_1))] == [512]


def test_an_empty_log_has_no_entries(tmp_path: Path) -> None:
    sample = sealed([])
    assert list(reader(sample.log)) == []
    assert independent_hrl.read(saved(tmp_path, sample.log)) == []


def test_an_open_log_is_refused_with_a_hint() -> None:
    with pytest.raises(CorruptError, match="not closed properly") as caught:
        reader(header(eol_location=0).pack() + bytes(8192))
    assert caught.value.hint


def test_a_log_shorter_than_its_end_mark_is_truncated() -> None:
    with pytest.raises(CorruptError, match="truncated"):
        reader(sealed([write(0, b"x")]).log[:-1])


def own_log(*parts: bytes, entries: int) -> bytes:
    """A log of ours with that body, whatever it is worth."""
    body = b"".join(parts)
    return header(eol_location=4096 + len(body), total_metadata_entries=entries).pack() + body


def test_a_chain_that_leaves_the_log_is_refused() -> None:
    for distance in (4096, 8192, 1 << 40, (1 << 64) - 4096):
        with pytest.raises(CorruptError, match="leads out of the log"):
            reader(own_log(foreign_block([], distance=distance, size=4096), entries=0))


def test_a_chain_of_overlapping_blocks_is_refused() -> None:
    body = foreign_block([], distance=0, size=4096) + foreign_block([], distance=512, size=4096)
    with pytest.raises(CorruptError, match="overlaps"):
        reader(own_log(body, entries=0))


@pytest.mark.parametrize("claimed", [511, 513, 0, 0xFFFFFFFF])
def test_payloads_that_do_not_fill_their_room_are_refused(claimed: int) -> None:
    first = foreign_block([], distance=0, size=4096)
    last = foreign_block([(0, claimed)], distance=4096 + 512, size=4096)
    with pytest.raises(CorruptError, match="payloads end at"):
        list(reader(own_log(first, b"x" * 512, last, entries=1)))


def test_a_payload_that_no_entry_describes_is_refused() -> None:
    first = foreign_block([], distance=0, size=4096)
    with pytest.raises(CorruptError, match="payloads end at"):
        list(reader(own_log(b"x" * 512, first, entries=0)))


def test_entries_that_the_header_does_not_count_are_refused() -> None:
    with pytest.raises(CorruptError, match="0 entries, but its header says 1"):
        list(reader(own_log(foreign_block([], distance=0, size=4096), entries=1)))


def test_a_changed_payload_is_named_with_its_place() -> None:
    log = bytearray(sealed([write(0, b"x" * 100), write(512, b"y" * 100)]).log)
    log[8192 + 150] ^= 1
    with pytest.raises(CorruptError, match=r"log: at 8292: .*bytes 512 to 612"):
        reader(bytes(log)).verify()


def test_swapped_bytes_escape_the_byte_sum_but_not_the_companion() -> None:
    sample = sealed([write(0, b"xy" * 50)])
    log = sample.log.replace(b"xyxy", b"xxyy", 1)
    reader(log).verify()
    with pytest.raises(CorruptError, match="companion's checksum"):
        reader(log).verify_companion(*companion.unpack(sample.companion))


def test_a_log_agrees_with_its_companion_flushes_included() -> None:
    sample = sealed(list(many_ops(400)), first_seq=1000)
    unpacked = companion.unpack(sample.companion)
    reader(sample.log).verify_companion(*unpacked)
    indexed = list(reader(sample.log).with_companion(*unpacked))
    assert [i.kind for i in indexed] == [op.kind for op in sample.ops]
    assert [i.seq for i in indexed] == list(range(1000, 1400))


def test_a_companion_with_another_history_is_refused() -> None:
    log = reader(sealed([write(0, b"a"), write(1, b"b")]).log)
    for other in ([write(0, b"a")], [write(0, b"a"), write(2, b"b")], [write(1, b"b"), write(0, b"a")]):
        with pytest.raises(CorruptError):
            log.verify_companion(*companion.unpack(sealed(other).companion))


def test_a_companion_must_not_call_stored_bytes_a_hole() -> None:
    log = reader(sealed([write(0, b"a" * 10)]).log)
    with pytest.raises(CorruptError):
        log.verify_companion(*companion.unpack(sealed([zero(0, 10)]).companion))


def test_a_log_that_reaches_beyond_the_disk_does_not_fit() -> None:
    log = reader(sealed([write(1000, b"x" * 24)]).log)
    log.check_fits(1024)
    with pytest.raises(CorruptError, match="bytes 1000 to 1024, but the disk ends at 1023"):
        log.check_fits(1023)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"), open_log(str(tmp_path / "none.hrl")):
        pass
    with pytest.raises(HvfuseError), open_log(str(tmp_path)):
        pass
    os.mkfifo(tmp_path / "fifo.hrl")
    with pytest.raises(UnsupportedError, match="not a regular file"), open_log(str(tmp_path / "fifo.hrl")):
        pass
