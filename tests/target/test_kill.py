"""A process that dies at any labelled step of taking in, committing or merging leaves a whole store,
and the next one brings it to the same end."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from hvfuse import system
from hvfuse.errors import HvfuseError, NoSpaceError
from hvfuse.manifest import CycleManifest, point_id
from hvfuse.target import direct
from hvfuse.target.check import check
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store
from tests.dying import done_until
from tests.target.model import Source, check_points, contents, send

LATEST_ONLY = RetentionPolicy(keep_all_seconds=0, hourly=0)


@dataclass
class Story:
    """What happens to a VM, fixed beforehand: cycles in order, after some of them house-keeping."""

    source: Source
    cycles: list[tuple[CycleManifest, list[bytes], bool]]

    @classmethod
    def made(cls) -> Story:
        source = Source("vm", {"a.raw": 60_000, "b.raw": 9_000}, seed=7)
        cycles = []
        for number, (is_copy, keep_house) in enumerate(
            [(True, False), (False, False), (False, True), (True, False), (False, False), (False, True)]
        ):
            source.write("a.raw", 7000 * number, source.random.randbytes(9000))
            source.zero("a.raw", 3000 * number, 2000)
            source.resize("b.raw", 9_000 - 1000 * number)
            manifest, frames = source.begin_copy() if is_copy else source.begin_cycle()
            if is_copy:
                source.end_copy(manifest)
            else:
                source.end_cycle(manifest, point_id(manifest.generation, manifest.cycle))
            cycles.append((manifest, frames, keep_house))
        return cls(source, cycles)

    def tell(self, path: str) -> None:
        """Go on from wherever the store is, to the end."""
        with Store(path) as store:
            replica = LocalReplica(store, "vm")
            positions = [manifest.position() for manifest, _, _ in self.cycles]
            position = replica.position()
            done = positions.index(position) if position is not None else 0
            for manifest, frames, keep_house in self.cycles[done:]:
                send(replica, manifest, frames)
                if keep_house:
                    replica.housekeep(LATEST_ONLY, manifest.sealed_ns)
            replica.close()


def told_until(story: Story, path: str, step: int) -> bool:
    """Tell the story in a process of its own that dies at the labelled call number `step`.

    Returns whether it came to the end instead.
    """
    return done_until(step, lambda: story.tell(path))


def check_end(story: Story, path: str) -> None:
    with Store(path, create=False) as store:
        assert check(store).findings == ()
        (point,) = store.points("vm")
        assert contents(store, "vm", point.id) == story.source.history[point.id]
        for name, data in story.source.disks.items():
            with open(store.image_path("vm", name), "rb") as image:
                assert image.read() == data


@pytest.fixture
def folder() -> Iterator[str]:
    """A directory in memory if possible: hundreds of commits, and no power is lost here."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield path


def test_killed_at_every_step_the_store_is_whole_and_the_next_process_brings_it_to_the_same_end(folder, monkeypatch):
    monkeypatch.setattr(direct, "BATCH", 1)  # every frame of the first copy is noted on its own
    story = Story.made()
    for step in itertools.count(1):
        path = os.path.join(folder, str(step))
        ended = told_until(story, path, step)
        if os.path.exists(os.path.join(path, "store.lmdb", "data.mdb")):
            with Store(path) as store:
                assert check(store).findings == (), step
                if store.vms():
                    check_points(store, story.source)
        story.tell(path)
        check_end(story, path)
        if ended:
            break
    assert step > 60


def test_killed_again_and_again_a_little_further_each_time_it_still_gets_to_the_same_end(folder):
    story, path = Story.made(), os.path.join(folder, "store")
    lives = 0
    while not told_until(story, path, 3 + lives):
        lives += 1
        assert lives < 300
    check_end(story, path)
    assert lives > 5


@contextlib.contextmanager
def broken(label: str, error: int) -> Iterator[None]:
    """Every call with that label fails."""

    def injector(seen: str, call: str, size: int) -> int | None:
        if seen == label:
            raise OSError(error, os.strerror(error))
        return None

    system.install(injector)
    try:
        yield
    finally:
        system.install(None)


@pytest.mark.parametrize("label", ["store:image", "store:image-sync", "store:folder-sync", "store:resize"])
@pytest.mark.parametrize(("error", "kind"), [(errno.ENOSPC, NoSpaceError), (errno.EIO, HvfuseError)])
def test_a_merge_that_fails_leaves_the_base_where_it_was_and_is_done_wholly_the_next_time(folder, label, error, kind):
    source = Source("vm", {"a.raw": 50_000})
    with Store(folder) as store:
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        for number in range(3):
            source.write("a.raw", 1000 * number, b"x" * 5000)
            source.resize("a.raw", 50_000 - number)
            source.ship_to(replica)
        with broken(label, error), pytest.raises(kind) as caught:
            replica.housekeep(LATEST_ONLY, source.now_ns)
        assert caught.value.recoverable == (error == errno.ENOSPC)
        assert store.vm("vm").base_seq == 1
        check_points(store, source)
        replica.housekeep(LATEST_ONLY, source.now_ns)
        assert store.vm("vm").base_seq == store.vm("vm").head_seq == 4
        check_points(store, source)
        assert check(store).findings == ()


def test_frames_of_a_first_copy_that_could_not_be_synced_are_not_held(folder):
    source = Source("vm", {"a.raw": 50_000})
    source.write("a.raw", 0, source.random.randbytes(50_000))
    manifest, frames = source.begin_copy()
    with Store(folder) as store:
        replica = LocalReplica(store, "vm")
        replica.begin(manifest)
        for frame in frames:
            replica.put(frame)
        with broken("store:image-sync", errno.EIO), pytest.raises(HvfuseError):
            replica.commit(manifest, len(frames))
        assert replica.position() is None
        assert replica.begin(manifest) == frozenset()
        assert send(replica, manifest, frames) is None
        source.end_copy(manifest)
        source.ship_to(replica)
        check_points(store, source)
