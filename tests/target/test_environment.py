"""The LMDB under a store: opened once, grown when full, refused when it cannot be understood."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager

import lmdb
import pytest

from hvfuse.errors import (
    BusyError,
    CorruptError,
    HvfuseError,
    NoSpaceError,
    NotFoundError,
    UnreachableError,
    UnsupportedError,
)
from hvfuse.target import environment, schema
from hvfuse.target.check import check
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from hvfuse.target.usage import usage
from tests.target.model import Source, check_points

TINY = 64 << 10


def run_python(code: str, *arguments: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    return done.stdout


def test_a_store_is_its_owners_alone(tmp_path):
    path = tmp_path / "store"
    with Store(str(path)):
        for found in (path, path / "store.lmdb", path / "replicas"):
            assert stat.S_IMODE(found.stat().st_mode) == 0o700
        assert stat.S_IMODE((path / "store.lmdb" / "data.mdb").stat().st_mode) == 0o600


def test_opening_twice_in_a_process_shares_one_environment(tmp_path):
    path = str(tmp_path / "store")
    with Store(path) as first, Store(path + "/") as second:
        assert first.env is second.env
        first.close()
        first.close()
        assert second.write("test:epoch", second.raise_epoch) == 1
    with Store(path, create=False) as third:
        assert third.epoch() == 1


def test_a_store_that_is_not_there_is_not_made_by_a_reader(tmp_path):
    with pytest.raises(NotFoundError, match="there is no store"):
        Store(str(tmp_path / "store"), create=False)
    assert os.listdir(tmp_path) == []


def test_a_store_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "store"
    with Store(str(path)) as store:
        store.env.write("test", lambda txn: txn.put(schema.KEY_FORMAT, schema.u32(7), db=store.env.db(schema.META)))
    data = (path / "store.lmdb" / "data.mdb").read_bytes()
    for create in (True, False):
        with pytest.raises(UnsupportedError, match="format 7; this hvfuse knows format 1"):
            Store(str(path), create=create)
    assert (path / "store.lmdb" / "data.mdb").read_bytes() == data


@pytest.mark.parametrize("content", [b"", b"not a database" * 1000])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "store.lmdb").mkdir()
    (tmp_path / "store.lmdb" / "data.mdb").write_bytes(content)
    with pytest.raises(HvfuseError, match=r"store\.lmdb"):
        Store(str(tmp_path), create=False)


def test_an_lmdb_of_something_else_is_refused(tmp_path):
    lmdb.open(str(tmp_path / "store.lmdb")).close()
    with pytest.raises(CorruptError, match="not a store"):
        Store(str(tmp_path), create=False)


@pytest.mark.parametrize(("kind", "name"), [(0x6969, "NFS"), (0xFF534D42, "CIFS"), (0x65735546, "FUSE")])
def test_a_file_system_that_lmdb_is_not_safe_on_is_refused(tmp_path, monkeypatch, kind, name):
    monkeypatch.setattr(environment, "filesystem_type", lambda path: kind)
    with pytest.raises(UnsupportedError, match=name):
        Store(str(tmp_path / "store"))


def test_the_kind_of_a_file_system_is_known():
    assert environment.filesystem_type("/proc") == 0x9FA0
    with pytest.raises(FileNotFoundError):
        environment.filesystem_type("/nowhere")


def test_a_full_map_grows_and_nothing_is_lost(tmp_path):
    source = Source("vm", {"a.raw": 300_000})
    with Store(str(tmp_path / "store"), map_size=TINY) as store:
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        for _ in range(5):
            source.write("a.raw", 0, source.random.randbytes(200_000))
            source.ship_to(replica)
        assert store.env.map_size() > 1_000_000
        check_points(store, source)
        assert check(store).findings == ()


def test_a_map_that_another_process_has_grown_is_taken_over(tmp_path):
    path = str(tmp_path / "store")
    source = Source("vm", {"a.raw": 300_000})
    with Store(path, map_size=TINY) as store:
        source.copy_to(LocalReplica(store, "vm"))
        size = store.env.map_size()
        grown = run_python(
            """
            import os, sys
            from hvfuse.target.store import Store
            with Store(sys.argv[1]) as store:
                for number in range(300):
                    store.env.write("x", lambda txn: txn.put(b"%d" % number, bytes(3000), db=store.env.db(b"meta")))
                print(os.path.getsize(store.env.path + "/data.mdb"))
            """,
            path,
        )
        assert int(grown) > size
        assert store.vms()
        source.write("a.raw", 0, source.random.randbytes(200_000))
        source.ship_to(LocalReplica(store, "vm"))
        check_points(store, source)


def test_the_map_grows_while_other_threads_read(tmp_path):
    source = Source("vm", {"a.raw": 100_000})
    with Store(str(tmp_path / "store"), map_size=TINY) as store:
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        done = threading.Event()
        read: list[int] = []

        def reading() -> None:
            while not done.is_set():
                read.append(len(store.points("vm")))

        thread = threading.Thread(target=reading)
        thread.start()
        for _ in range(4):
            source.write("a.raw", 0, source.random.randbytes(60_000))
            source.ship_to(replica)
        done.set()
        thread.join()
        assert len(store.points("vm")) == 4
        assert read
        check_points(store, source)


def test_a_writer_that_raises_changes_nothing(tmp_path):
    with Store(str(tmp_path / "store")) as store:

        def act(txn):
            store.create_vm(txn, "vm")
            raise BusyError("no")

        with pytest.raises(BusyError):
            store.write("test", act)
        assert store.vms() == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB. Needs root."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.mount
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_on_a_full_disk_nothing_committed_is_lost_and_it_goes_on_once_there_is_room(small_disk):
    source = Source("vm", {"a.raw": 400_000})
    with Store(str(small_disk / "store"), map_size=TINY) as store:
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(1 << 20))
        with pytest.raises(NoSpaceError) as caught:
            while True:
                source.write("a.raw", 0, source.random.randbytes(300_000))
                source.ship_to(replica)
        assert caught.value.recoverable
        assert str(caught.value).endswith(": no space left")
        assert caught.value.hint == f"make room: df -h {small_disk}/store/store.lmdb"
        assert len(store.points("vm")) >= 1
        check_points(store, source)
        assert check(store).findings == ()
        ballast.unlink()
        source.cycle -= 1  # the failed one, which comes again
        source.ship_to(replica)
        check_points(store, source)


def test_readers_of_dead_processes_are_cleared(tmp_path):
    path = str(tmp_path / "store")
    with Store(path) as store:
        run_python(
            """
            import os, sys
            from hvfuse.target.store import Store
            store = Store(sys.argv[1])
            with store.env.read() as txn:
                os._exit(0)
            """,
            path,
        )
        assert store.env.reader_check() == 1
        assert store.env.reader_check() == 0


STANDS_STILL = """
    import lmdb, sys
    txn = lmdb.open(sys.argv[1], max_dbs=32).begin(write=True)
    print("writing", flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer_that_stands_still(path):
    """A process in the middle of a write transaction of the store."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STANDS_STILL), os.path.join(path, "store.lmdb")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "writing\n"
        try:
            yield
        finally:
            process.stdin.close()


def test_whoever_only_reads_does_not_wait_for_a_writer(tmp_path):
    path = str(tmp_path / "store")
    source = Source("web01", {"a.raw": 50_000})
    with Store(path) as store:
        replica = LocalReplica(store, "web01")
        source.copy_to(replica)
        source.ship_to(replica)
        replica.close()
    with writer_that_stands_still(path), Store(path, create=False, read_only=True) as store:
        assert [point.cycle for point in store.points("web01")] == [1]
        assert store.pins() == []
        assert [vm.points for vm in usage(store).vms] == [1]
        assert check(store).findings == ()
        check_points(store, source)


def test_a_reader_follows_when_another_process_grows_the_map(tmp_path):
    path = str(tmp_path / "store")
    Store(path).close()
    grow = """
        import sys
        from hvfuse.target.store import Store
        from hvfuse.target import schema
        with Store(sys.argv[1], create=False) as store:
            store.write("test", lambda txn: txn.put(b"big", bytes(3 << 20), db=store.env.db(schema.META)))
    """
    with Store(path, create=False, read_only=True, map_size=1 << 20) as store:
        assert store.epoch() == 0
        run_python(grow, path)
        assert len(store.env.peek(schema.META, b"big")) == 3 << 20
        with store.env.read() as txn:
            assert len(txn.get(b"big", db=store.env.db(schema.META))) == 3 << 20


def test_a_peek_finds_what_is_committed_and_nothing_of_what_is_not(tmp_path):
    with Store(str(tmp_path / "store"), map_size=TINY) as store:
        seen = []

        def write(txn, value):
            txn.put(b"key", value, db=store.env.db(schema.META))
            seen.append(store.env.peek(schema.META, b"key"))

        for value in (b"1", bytes(1 << 20)):  # for the second, the map has to grow
            store.write("test", lambda txn, value=value: write(txn, value))
            assert store.env.peek(schema.META, b"key") == value
        assert seen == [None, b"1"]


def test_a_writer_joins_a_reader_of_its_process(tmp_path):
    path = str(tmp_path / "store")
    Store(path).close()
    with Store(path, create=False, read_only=True) as reader:
        with pytest.raises(AssertionError, match="opened for reading"):
            reader.write("test:epoch", reader.raise_epoch)
        with Store(path) as writer:
            assert writer.env is reader.env
            assert writer.write("test:epoch", writer.raise_epoch) == 1
            assert reader.epoch() == 1
        assert reader.epoch() == 1


@pytest.mark.parametrize("what", ["moved", "replaced", "unlinked"])
def test_nothing_is_committed_to_a_store_that_is_not_there_any_more(tmp_path, what):
    path, away = tmp_path / "store", tmp_path / "away"
    with Store(str(path)) as store:
        assert store.write("test:epoch", store.raise_epoch) == 1
        if what == "unlinked":
            os.rename(path / "store.lmdb" / "data.mdb", away)
        else:
            os.rename(path, away)
        if what == "replaced":
            shutil.copytree(away, path)
        for act in (lambda: store.write("test:epoch", store.raise_epoch), store.epoch):
            with pytest.raises(UnreachableError, match="moved, deleted, unmounted or replaced") as raised:
                act()
            assert raised.value.hint is not None and raised.value.recoverable
        if what == "unlinked":
            os.rename(away, path / "store.lmdb" / "data.mdb")
        else:
            shutil.rmtree(path, ignore_errors=True)
            os.rename(away, path)
        assert store.write("test:epoch", store.raise_epoch) == 2, "put back, it goes on"
