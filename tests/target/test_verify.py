"""A replica opened to be compared: which state that is, and where it is read from."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Iterator

import pytest

from hvfuse.extent import Extent
from hvfuse.formats.digests import BLOCK, DigestKey, digest_blocks
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.shipper.logs import Killed
from tests.shipper.test_with_store import StoredHost
from tests.shipper.test_with_tracker import SIZES

MIB = 1 << 20
KEY = DigestKey.fresh()


@pytest.fixture
def host(tmp_path) -> Iterator[StoredHost]:
    found = StoredHost(tmp_path)
    yield found
    found.replica.close()
    found.store.close()
    found.detach()


def test_without_a_position_there_is_nothing_to_inspect(tmp_path) -> None:
    with Store(str(tmp_path / "store"), map_size=1 << 26) as store:
        assert LocalReplica(store, "vm1").inspect(from_medium=True) is None


def test_it_shows_the_newest_cycle_also_while_another_one_is_staged(host: StoredHost) -> None:
    shipper = host.shipper()
    shipper.cycle_now()
    host.scribble(random.Random(1), 30)
    shipper.cycle_now()
    were = host.images()
    host.scribble(random.Random(2), 30)
    host.die_at = len(host.puts) + 1
    with pytest.raises(Killed):
        shipper.cycle_now()
    found = LocalReplica(host.store, "vm1").inspect(from_medium=False)
    assert found is not None
    assert found.position.cycle == 2
    names = {state.record.disk_id: name for name, state in ((n, d.state) for n, d in host.vm.disks.items())}
    assert found.disk_ids == names.keys()
    for disk_id, name in names.items():
        assert found.extent(disk_id) == SIZES[name]
        length = -(-SIZES[name] // BLOCK) * BLOCK
        for low in range(0, length, 4 * MIB):
            extent = Extent(low, min(4 * MIB, length - low))
            expected = digest_blocks(were[name][low : extent.end], KEY)
            assert (found.digests(disk_id, [extent], KEY) == expected).all()
    found.close()


def test_read_from_the_medium_means_not_from_memory(host: StoredHost) -> None:
    host.shipper().cycle_now()
    path = host.store.image_path("vm1", "a.raw")
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, os.urandom(MIB), 0)
        os.fsync(fd)
        for from_medium in (False, True):
            os.pread(fd, MIB, 0)
            found = LocalReplica(host.store, "vm1").inspect(from_medium=from_medium)
            assert found is not None
            found.close()
            assert pages_in_memory(fd) == (0 if from_medium else MIB // mmap.PAGESIZE)
    finally:
        os.close(fd)


def pages_in_memory(fd: int) -> int:
    """Of the first MiB of a file."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, MIB) as mapped:
        start = (ctypes.c_char * MIB).from_buffer(mapped)
        found = (ctypes.c_ubyte * (MIB // mmap.PAGESIZE))()
        done = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(MIB), found)
        del start
    if done != 0:
        pytest.skip("this kernel does not tell what is in memory")
    return sum(page & 1 for page in found)
