"""Earlier recovery points stay mountable and right while a copy comes in, while house is kept, and afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hvfuse import mountpoint
from hvfuse.manifest import CycleKind
from hvfuse.target.check import check
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.store import Store
from tests.mount.conftest import Mounted, world
from tests.target.model import Source, check_points

pytestmark = pytest.mark.mount

LATEST_ONLY = RetentionPolicy(keep_all_seconds=0, hourly=0)
SIZES = {"a.raw": 300_000, "b.raw": 20_000}


@pytest.fixture
def site(tmp_path) -> Iterator[tuple[Store, LocalReplica, Source]]:
    """A VM with five points."""
    source = Source("vm", SIZES, seed=8)
    source.write("a.raw", 0, source.random.randbytes(200_000))
    with Store(str(tmp_path / "store")) as store:
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        for number in range(5):
            source.write("a.raw", 40_000 * number, source.random.randbytes(60_000))
            source.zero("a.raw", 30_000 * number, 9_000)
            source.write("b.raw", 3_000 * number, source.random.randbytes(3_000))
            source.ship_to(replica)
        yield store, replica, source
        replica.close()


@contextmanager
def viewed(store: Store, point: str) -> Iterator[Mounted]:
    """A point's disks, mounted by a process of its own."""
    with world() as mounted:
        mounted.run("tests.target.serving_point", store.path, "vm", point, mounted.mnt, mounted.root / "overlays")
        yield mounted
        assert "Traceback" not in mounted.errors(), mounted.errors()
        mountpoint.unmount(str(mounted.mnt))
        mounted.expect("ended")


def shown(mounted: Mounted) -> dict[str, bytes]:
    """All disks as the mount shows them, past the kernel's cache."""
    found = {}
    for path in mounted.mnt.iterdir():
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found[path.name] = file.readall()
    return found


@pytest.mark.parametrize("whole", [False, True])
def test_views_are_right_before_while_and_after_a_copy_comes_in(site, whole):
    store, replica, source = site
    ids = [point.id for point in store.points("vm")]
    pinned = ids[2]
    pin = store.pin("vm", pinned, {"kind": "test-failover"})
    keeper = LocalReplica(store, "vm")
    with viewed(store, pinned) as standing:

        def check_views(*points: str) -> None:
            expected = source.history[pinned]
            assert shown(standing) == {**expected, "b.raw": b"own" + expected["b.raw"][3:]}
            for point in points:
                with viewed(store, point) as fresh:
                    assert shown(fresh) == source.history[point]
            check_points(store, source)
            assert check(store).findings == ()

        with (standing.mnt / "b.raw").open("r+b") as file:
            file.write(b"own")
        check_views(ids[0], ids[4])
        source.zero("a.raw", 0, 100_000)
        source.write("a.raw", 50_000, b"changed while nobody logged" * 3000)
        previous, changes = source.position, source.coalesced()
        manifest, frames = source.begin_copy()
        if not whole:
            manifest, frames = source.manifest(CycleKind.COPY, previous=previous), source.frames(changes)
        replica.begin(manifest)
        for frame in frames[: len(frames) // 2]:
            replica.put(frame)
        check_views(ids[1])
        keeper.housekeep(LATEST_ONLY, source.now_ns)
        assert store.vm("vm").base_seq > 1
        check_views(ids[4])
        for frame in frames[len(frames) // 2 :]:
            replica.put(frame)
        check_views()
        replica.commit(manifest, len(frames))
        source.end_copy(manifest)
        assert [point.id for point in store.points("vm")] == [pinned, ids[4]]
        check_views(pinned, ids[4])
        latest = source.ship_to(replica)
        keeper.housekeep(LATEST_ONLY, source.now_ns)
        check_views(latest)
    store.unpin(pin)
    keeper.housekeep(LATEST_ONLY, source.now_ns)
    assert store.vm("vm").base_seq == store.vm("vm").head_seq
    check_points(store, source)
    assert check(store).findings == ()
