"""Whatever the two files are, in whatever way they are made equal: equal afterwards, told truly, nothing in vain."""

import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvfuse import system
from hvfuse.errors import BusyError, HvfuseError, NotFoundError, UsageError
from hvfuse.formats.digests import BLOCK, Algorithm
from hvfuse.reconcile import compare, plan, run
from hvfuse.reconcile.ends import STATE_SUFFIX, open_replica

from .both_sides import WAYS, resync, settle

PART = 16 << 10
KINDS = st.sampled_from(["hole", "hole", "zeroes", "A", "A", "B", "fine"])
DISKS = st.tuples(st.lists(st.lists(KINDS, min_size=4, max_size=4), max_size=10), st.integers(0, BLOCK - 1))
MODEL = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def small(monkeypatch):
    """Spans, batches and windows so small that a few blocks have several of each."""
    monkeypatch.setattr(plan, "SPAN", 2 * BLOCK)
    monkeypatch.setattr(compare, "BATCH", 2)
    monkeypatch.setattr(run, "WINDOW", 4 * BLOCK)


def make(path, disk) -> bytes:
    """Write a disk of parts, the last block cut."""
    blocks, cut = disk
    parts = [part for block in blocks for part in block]
    size = max(0, len(parts) * PART - cut)
    with open(path, "wb") as file:
        for nth, part in enumerate(parts):
            dice = random.Random(f"{part}{nth}")
            data = {"zeroes": bytes(PART), "fine": dice.randbytes(5000).rjust(9500, b"\0").ljust(PART, b"\0")}
            if part != "hole":
                file.seek(nth * PART)
                file.write(data.get(part) or dice.randbytes(PART))
        file.truncate(size)
    return path.read_bytes()


def unequal_blocks(one: bytes, other: bytes) -> int:
    """Bytes of `one` in blocks where the two differ; the end of the shorter counts as zeroes."""
    padded = other[: len(one)].ljust(len(one), b"\0")
    return sum(
        len(one[at : at + BLOCK]) for at in range(0, len(one), BLOCK) if one[at : at + BLOCK] != padded[at : at + BLOCK]
    )


@pytest.mark.parametrize("way", WAYS)
@given(
    source=DISKS, replica=st.one_of(st.none(), DISKS), digest=st.sampled_from(Algorithm), level=st.sampled_from([0, 1])
)
@MODEL
def test_equal_afterwards_and_told_truly(small, tmp_path, way, source, replica, digest, level):
    one, other = tmp_path / "source.raw", tmp_path / "replica.raw"
    wanted = make(one, source)
    other.unlink(missing_ok=True)
    held = make(other, replica) if replica is not None else None
    is_equal = held == wanted

    told = resync(one, other, way, algorithm=digest, level=level, dry_run=True)
    assert told.changed is not is_equal
    assert told.differing == unequal_blocks(wanted, held or b"")
    assert (other.read_bytes() if other.exists() else None) == held

    done = resync(one, other, way, algorithm=digest, level=level)
    assert other.read_bytes() == one.read_bytes() == wanted
    assert done.changed is not is_equal
    assert (done.created, done.differing, done.size) == (held is None, told.differing, len(wanted))
    assert os.listdir(tmp_path).count(other.name + STATE_SUFFIX) == 0

    again = resync(one, other, way, algorithm=digest, level=level)
    assert not again.changed and again.differing == again.sent == 0


def converges(folder) -> bool:
    one, other = folder / "one.raw", folder / "other.raw"
    make(one, ([["A"] * 4, ["B"] * 4, ["A"] * 4, ["fine"] * 4, ["hole"] * 4], 0))
    make(other, ([["A"] * 4, ["A"] * 4, ["A"] * 4, ["hole"] * 4, ["A"] * 4], 0))
    resync(one, other)
    return one.read_bytes() == other.read_bytes()


def test_a_comparison_that_believes_equal_summaries_too_easily_would_be_caught(small, tmp_path, monkeypatch):
    assert converges(tmp_path)
    low_half = lambda ours, theirs: (ours & 0) != (theirs & 0)  # noqa: E731
    monkeypatch.setattr(compare, "differ", lambda ours, theirs: low_half(ours, theirs).any(axis=1))
    assert not converges(tmp_path)


def test_a_comparison_that_skips_the_level_of_blocks_would_be_caught(small, tmp_path, monkeypatch):
    differing = plan.differing
    monkeypatch.setattr(plan, "SPAN", 4 * BLOCK)
    assert converges(tmp_path)
    monkeypatch.setattr(plan, "differing", lambda extents, ours, theirs: differing(extents, ours, theirs)[:1])
    assert not converges(tmp_path)


def test_a_comparison_that_looks_for_holes_on_one_side_alone_would_be_caught(small, tmp_path, monkeypatch):
    in_doubt = plan.in_doubt
    monkeypatch.setattr(plan, "in_doubt", lambda wanted, ours, theirs: in_doubt(wanted, ours, []))
    assert not converges(tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_zeroes_become_holes_and_holes_are_neither_read_nor_sent(tmp_path, way):
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    with open(one, "wb") as file:
        file.truncate(1 << 40)
        file.seek(77 << 30)
        file.write(os.urandom(BLOCK) + bytes(BLOCK) + os.urandom(BLOCK))
    with open(other, "wb") as file:
        file.write(os.urandom(4 * BLOCK))
    done = resync(one, other, way)
    assert done.compared <= 16 * BLOCK
    assert done.sent < 3 * BLOCK
    assert os.stat(other).st_size == 1 << 40
    assert os.stat(other).st_blocks * 512 <= 3 * BLOCK
    with open(other, "rb") as file:
        assert not any(file.read(5 * BLOCK))


@pytest.mark.parametrize("way", WAYS)
def test_only_blocks_that_differ_are_written(tmp_path, way):
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    data = bytearray(os.urandom(200 * BLOCK))
    other.write_bytes(data)
    for block in (0, 63, 64, 199):
        data[block * BLOCK + 5] ^= 1
    one.write_bytes(data)
    written = []
    system.install(lambda label, call, size: written.append(size) if label == "resync:write" else None)
    try:
        done = resync(one, other, way)
    finally:
        system.install(None)
    assert done.differing == sum(written) == 4 * BLOCK
    assert other.read_bytes() == data


def test_a_source_that_is_written_to_meanwhile_is_told(tmp_path):
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    one.write_bytes(os.urandom(8 * BLOCK))
    settle(one)

    def meddle(report, passed):
        with open(one, "r+b") as file:
            file.write(b"meanwhile")

    with pytest.raises(BusyError, match="SOURCE was written to"):
        resync(one, other, progress=meddle)


def test_a_failed_sync_is_final(tmp_path):
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    one.write_bytes(os.urandom(8 * BLOCK))
    other.write_bytes(b"")
    state = tmp_path / ("other.raw" + STATE_SUFFIX)
    failures = 0

    def fail_once(label, call, size):
        nonlocal failures
        if label == "resync:sync":
            failures += 1
            if failures == 1:
                raise OSError(5, "Input/output error")

    end = open_replica(str(other), write=True)
    system.install(fail_once)
    try:
        state.write_bytes(b"what an earlier run knew")
        for _ in range(2):  # the kernel would call the second one a success
            with pytest.raises(HvfuseError, match="could not be made durable"):
                end.sync(b"state")
            assert not state.exists()
        with pytest.raises(HvfuseError, match="could not be made durable"):
            end.finish()
    finally:
        system.install(None)
        end.close()
    assert failures == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_failed_sync_fails_the_run(tmp_path, way):
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    one.write_bytes(os.urandom(8 * BLOCK))

    def fail(label, call, size):
        if label == "resync:sync":
            raise OSError(5, "Input/output error")

    system.install(fail)
    try:
        with pytest.raises(HvfuseError, match="could not be made durable"):
            resync(one, other, way)
    finally:
        system.install(None)


@pytest.mark.parametrize("way", ["local", "push"])
def test_a_full_disk_is_told_as_such(tmp_path, way):
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    one.write_bytes(os.urandom(8 * BLOCK))

    def fail(label, call, size):
        if label == "resync:write":
            raise OSError(28, "No space left on device")

    system.install(fail)
    try:
        with pytest.raises(HvfuseError, match="No space left") as caught:
            resync(one, other, way)
    finally:
        system.install(None)
    assert caught.value.exit_code == 9
    assert caught.value.hint and "free space there" in caught.value.hint


def test_what_cannot_be_a_replica_is_refused(tmp_path):
    one = tmp_path / "one.raw"
    one.write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(one)
    os.link(one, tmp_path / "hard")
    for path, kind in (("folder", UsageError), ("fifo", UsageError), ("none/there", NotFoundError)):
        with pytest.raises(kind):
            resync(one, tmp_path / path)
        with pytest.raises(kind):
            resync(one, tmp_path / path, "push")
        with pytest.raises(kind):
            resync(one, tmp_path / path, dry_run=True)
    for path in ("/dev/no-such-disk", "/dev/null"):
        with pytest.raises((UsageError, NotFoundError)):
            resync(one, path)
    for path in ("one.raw", "link", "hard"):  # dry run: nobody is in the way, but they are the same
        for way in WAYS:
            with pytest.raises(UsageError, match="are the same"):
                resync(one, tmp_path / path, way, dry_run=True)
            with pytest.raises((UsageError, BusyError)):
                resync(one, tmp_path / path, way)
    assert one.read_bytes() == b"x"


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_link_to_nothing_is_refused_and_nothing_is_made(tmp_path, way, dry_run):
    one, link = tmp_path / "one.raw", tmp_path / "link"
    one.write_bytes(b"x")
    link.symlink_to("nothing")
    with pytest.raises(NotFoundError, match="is a symbolic link to nothing, which does not exist") as caught:
        resync(one, link, way, dry_run=dry_run)
    assert caught.value.hint
    assert sorted(os.listdir(tmp_path)) == ["link", "one.raw"]


def test_a_replica_that_others_use_is_left_alone(tmp_path):
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    one.write_bytes(b"new")
    other.write_bytes(b"old")
    with open(other, "rb"), pytest.raises(BusyError, match="has it open"):
        resync(one, other)
    end = open_replica(str(other), write=True)
    try:
        with pytest.raises(BusyError, match="locked by another program"):
            resync(one, other)
    finally:
        end.close()
    assert other.read_bytes() == b"old"
    assert resync(one, other).changed
