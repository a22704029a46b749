import errno
import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvfuse import frames, spool
from hvfuse.errors import UnsupportedError
from hvfuse.formats.companion import Kind
from hvfuse.frames import Fill, FrameWriter
from hvfuse.shipper import coalesce
from hvfuse.shipper.coalesce import FRAME_PLAIN, DamagedLogError, close_logs, logs_by_disk, open_logs, plan
from hvfuse.spool import SealedLog

from .logs import Op, Tracked, apply_frame, random_bytes, tracked, write

KIB = 1024
MIB = 1 << 20


def logs_of(source: Tracked, disk: int = 0) -> list[SealedLog]:
    return [cycle.logs[disk] for cycle in source.cycles()]


def made_frames(logs: list[SealedLog]) -> list[frames.Frame]:
    planned = plan(logs)
    writer = FrameWriter(generation=bytes(16), cycle=1)
    files = open_logs(planned)
    try:
        found = []
        for number in range(planned.frame_count):
            content = planned.content(number, files)
            raw = writer.encode(disk_id=bytes(16), number=number, table=content.table, data=content.data)
            found.append(frames.decode(raw))
        return found
    finally:
        close_logs(files)


def extents(found: list[frames.Frame]) -> list[tuple[int, int, Fill]]:
    return [(int(e["offset"]), int(e["length"]), Fill(int(e["kind"]))) for f in found for e in f.table]


def applied(found: list[frames.Frame], before: bytes, size: int) -> bytes:
    image = bytearray(before)
    for frame in found:
        apply_frame(image, frame)
    image.extend(bytes(max(0, size - len(image))))
    return bytes(image[:size])


def sealed(folder, *ops: Op, size: int = MIB) -> Tracked:
    source = tracked(str(folder), [size])
    for op in ops:
        source.disks[0].do(op)
    source.rotate()
    return source


def test_logs_of_different_disks_are_refused_in_one_plan(tmp_path):
    source = tracked(str(tmp_path), [MIB, MIB])
    source.rotate()
    source.rotate()
    first, second = source.cycles()
    with pytest.raises(DamagedLogError, match=r"disk1\.raw\.0000000002\.hrc.*disk0\.raw\.0000000001\.hrc"):
        plan([first.logs[0], second.logs[1]])


def test_logs_are_paired_by_disk_and_not_by_place(tmp_path):
    source = tracked(str(tmp_path), [MIB, MIB])
    for _ in range(3):
        source.rotate()
    first, second, third = source.cycles()
    turned = replace(second, logs=second.logs[::-1])
    assert logs_by_disk([first, turned, third]) == [logs_of(source, 0), logs_of(source, 1)]
    assert logs_by_disk([first, turned]) == [logs_of(source, 1)[:2], logs_of(source, 0)[:2]]
    with pytest.raises(DamagedLogError, match=r"disk1\.raw\.0000000003\.hrc: an earlier cycle has no log"):
        logs_by_disk([replace(first, logs=first.logs[:1]), third])


SIZE = 96 * KIB


def some_ops():
    offset = st.one_of(st.integers(0, SIZE - 1), st.integers(0, SIZE // 4096 - 1).map(lambda n: n * 4096))
    length = st.one_of(st.integers(1, 20_000), st.sampled_from([512, 4096, 8192, 16384]))

    def payload(seed: int, length: int) -> bytes:
        data = bytearray(random_bytes(seed, length))
        if seed % 3 == 0:
            data[seed % length :] = bytes(length - seed % length)
        return bytes(data)

    writes = st.builds(lambda o, n, seed: write(o, payload(seed, min(n, SIZE - o))), offset, length,
                       st.integers(0, 1000))  # fmt: skip
    rest = st.builds(
        lambda kind, o, n: Op(kind, o, min(n, SIZE - o)), st.sampled_from([Kind.ZERO, Kind.TRIM]), offset, length
    )
    return st.lists(st.one_of(writes, writes, rest, st.just(Op(Kind.FLUSH))), max_size=40)


@settings(max_examples=150, deadline=None)
@given(batches=st.lists(some_ops(), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_the_frames_of_any_logs_applied_to_the_old_disk_give_the_new_one(tmp_path_factory, batches, seed):
    source = tracked(str(tmp_path_factory.mktemp("vm")), [SIZE])
    source.disks[0].image[:] = before = random_bytes(seed, SIZE)
    for ops in batches:
        for op in ops:
            source.disks[0].do(op)
        source.rotate()
    found = made_frames(logs_of(source))
    assert applied(found, before, SIZE) == bytes(source.disks[0].image)
    covered = extents(found)
    for (offset, length, _), (following, _, _) in itertools.pairwise(covered):
        assert offset + length <= following


def test_resizes_between_merged_logs_never_show_cut_off_bytes_again(tmp_path):
    source = tracked(str(tmp_path), [64 * KIB])
    disk = source.disks[0]
    disk.image[:] = before = random_bytes(1, 64 * KIB)
    disk.do(write(60 * KIB, random_bytes(2, 4 * KIB)))
    source.rotate()
    disk.resize(30 * KIB)
    source.rotate()
    disk.resize(64 * KIB)
    disk.do(write(50 * KIB, b"new"))
    source.rotate()
    assert applied(made_frames(logs_of(source)), before, 64 * KIB) == bytes(disk.image)


def test_a_shrink_is_the_oldest_range_of_its_cycle(tmp_path):
    source = tracked(str(tmp_path), [64 * KIB])
    source.rotate()
    source.disks[0].resize(10 * KIB)
    source.disks[0].do(write(20 * KIB, random_bytes(1, KIB)))
    source.rotate()
    assert extents(made_frames(logs_of(source)[1:])) == [
        (10 * KIB, 10 * KIB, Fill.ZERO),
        (20 * KIB, KIB, Fill.DATA),
        (21 * KIB, 43 * KIB, Fill.ZERO),
    ]


def test_writes_that_failed_beyond_the_disks_end_are_left_out(tmp_path):
    source = tracked(str(tmp_path), [10_000])
    source.disks[0].ops = [write(9_000, random_bytes(1, 2_000)), write(12_000, b"x")]
    source.rotate()
    assert extents(made_frames(logs_of(source))) == [(9_000, 1_000, Fill.DATA)]


def test_zero_blocks_aligned_on_the_disk_carry_no_data(tmp_path):
    data = random_bytes(1, 1000) + bytes(4096 * 3) + random_bytes(2, 1000)
    source = sealed(tmp_path, write(5000, data))
    found = extents(made_frames(logs_of(source)))
    assert found == [
        (5000, 8192 - 5000, Fill.DATA),
        (8192, 8192, Fill.ZERO),
        (16384, 5000 + len(data) - 16384, Fill.DATA),
    ]


def test_a_block_with_a_single_bit_set_is_no_zero_block(tmp_path):
    for place in (0, 1, 2048, 4095):
        folder = tmp_path / str(place)
        folder.mkdir()
        data = bytearray(4096)
        data[place] = 1
        assert extents(made_frames(logs_of(sealed(folder, write(0, bytes(data)))))) == [(0, 4096, Fill.DATA)]


def test_a_zero_block_put_together_from_small_writes_is_found(tmp_path):
    source = sealed(tmp_path, *(write(n * 512, bytes(512)) for n in range(16)))
    assert extents(made_frames(logs_of(source))) == [(0, 8192, Fill.ZERO)]


def test_touching_writes_become_one_extent_and_touching_zeroes_too(tmp_path):
    ops = [write(n * 4096, random_bytes(n, 4096)) for n in range(20)]
    ops += [Op(Kind.TRIM, (20 + n) * 4096, 4096) for n in range(5)] + [Op(Kind.ZERO, 25 * 4096, 4096)]
    found = extents(made_frames(logs_of(sealed(tmp_path, *ops))))
    assert found == [(0, 20 * 4096, Fill.DATA), (20 * 4096, 6 * 4096, Fill.ZERO)]


def test_a_trim_of_an_enormous_disk_is_one_extent_of_one_frame(tmp_path):
    source = tracked(str(tmp_path))
    source.disks[0].ops = [Op(Kind.TRIM, n << 31, 1 << 31) for n in range(2000)]
    source.rotate()
    assert extents(made_frames(logs_of(source))) == [(0, 2000 << 31, Fill.ZERO)]


def test_frames_hold_about_their_planned_size_and_keep_to_the_limit(tmp_path):
    ops = [write(n * MIB + 300, random_bytes(n, MIB)) for n in range(6)]
    ops += [write(8 * MIB + 2 * n, b"x") for n in range(3000)]
    source = sealed(tmp_path, *ops, size=10 * MIB)
    found = made_frames(logs_of(source))
    assert 6 <= len(found) <= 8
    assert all(frame.header.plain_length <= 2 * FRAME_PLAIN + 8192 for frame in found)
    assert applied(found, bytes(10 * MIB), 10 * MIB) == bytes(source.disks[0].image)


def test_planning_is_the_same_every_time_and_counts_what_was_saved(tmp_path):
    ops = [write(0, random_bytes(n, 8192)) for n in range(10)] + [Op(Kind.ZERO, 0, 4096), Op(Kind.FLUSH)]
    logs = logs_of(sealed(tmp_path, *ops))
    first, second = plan(logs), plan(logs)
    assert np.array_equal(first.bounds, second.bounds)
    assert np.array_equal(first.pieces.starts, second.pieces.starts)
    assert (first.log_bytes, first.coalesced_bytes) == (81920, 4096)


def test_a_log_without_changes_has_no_frames(tmp_path):
    assert plan(logs_of(sealed(tmp_path, Op(Kind.FLUSH)))).frame_count == 0


def test_every_flipped_byte_of_a_used_payload_is_found_and_the_log_named(tmp_path):
    source = sealed(tmp_path, write(0, random_bytes(1, 600)), write(100, random_bytes(2, 50)))
    logs = logs_of(source)
    with open(logs[0].log_path, "rb") as file:
        whole = file.read()
    for place in range(8192, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        with open(logs[0].log_path, "wb") as file:
            file.write(damaged)
        with pytest.raises(DamagedLogError, match=r"disk0\.raw\.0000000001\.hrl: payload at (8192|8792) "):
            made_frames(logs)


def test_a_truncated_log_is_found_and_named(tmp_path):
    logs = logs_of(sealed(tmp_path, write(0, random_bytes(1, 600))))
    os.truncate(logs[0].log_path, 8500)
    with pytest.raises(DamagedLogError, match=r"\.hrl: payload at 8192 "):
        made_frames(logs)


def test_a_log_that_the_disk_cannot_read_any_more_is_named(tmp_path, monkeypatch):
    def fail(fd: int, buffer: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    logs = logs_of(sealed(tmp_path, write(0, b"a")))
    monkeypatch.setattr(coalesce.system, "pread_into", fail)
    with pytest.raises(DamagedLogError, match=r"\.hrl: cannot be read at 8192: Input/output error"):
        made_frames(logs)


def test_payload_that_newer_writes_replaced_is_not_even_looked_at(tmp_path):
    source = sealed(tmp_path, write(0, random_bytes(1, 4096)), write(0, random_bytes(2, 4096)))
    logs = logs_of(source)
    with open(logs[0].log_path, "r+b") as file:
        file.seek(8192)
        file.write(b"damage")
    assert applied(made_frames(logs), bytes(MIB), MIB) == bytes(source.disks[0].image)


def test_every_flipped_byte_of_a_companion_is_found_and_the_companion_named(tmp_path):
    logs = logs_of(sealed(tmp_path, write(0, b"a"), write(9, b"b")))
    with open(logs[0].companion_path, "rb") as file:
        whole = file.read()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        with open(logs[0].companion_path, "wb") as file:
            file.write(damaged)
        with pytest.raises((DamagedLogError, UnsupportedError), match=r"disk0\.raw\.0000000001\.hrc: "):
            plan(logs)


@pytest.mark.parametrize("suffix", ["log", "companion"])
def test_a_missing_file_is_named(tmp_path, suffix):
    logs = logs_of(sealed(tmp_path, write(0, b"a")))
    os.unlink(getattr(logs[0], f"{suffix}_path"))
    with pytest.raises(DamagedLogError, match=r"missing"):
        made_frames(logs)


def test_memory_stays_bounded_when_little_survives_of_each_of_many_long_writes(tmp_path, monkeypatch):
    source = sealed(
        tmp_path,
        *(write(n * MIB, random_bytes(n, MIB)) for n in range(24)),
        *(write(n * MIB + 512, random_bytes(n, MIB - 512)) for n in range(24)),
        size=24 * MIB,
    )
    spans = []
    read = coalesce.system.pread_into
    monkeypatch.setattr(coalesce.system, "pread_into", lambda fd, to, at: spans.append(len(to)) or read(fd, to, at))
    found = made_frames(logs_of(source))
    assert max(spans) <= coalesce.READ_SPAN + MIB
    assert applied(found, bytes(24 * MIB), 24 * MIB) == bytes(source.disks[0].image)


def test_spool_lists_what_these_tests_write(tmp_path):
    source = sealed(tmp_path, write(0, b"a"))
    assert [cycle.cycle for cycle in spool.list_cycles(source.folder)] == [1]
