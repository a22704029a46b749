"""A replica that is deleted is gone wholly, whatever interrupts it, and others stay as they are."""

from __future__ import annotations

import itertools
import os
import shutil

import pytest

from hvfuse.errors import BusyError
from hvfuse.target import removal, schema
from hvfuse.target.check import check
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.dying import done_until
from tests.target.model import Source, check_points
from tests.target.test_kill import folder  # noqa: F401


def replicated(store: Store, vm: str, *, seed: int, wide: int = 3000) -> Source:
    """A VM with points and a staged cycle; `wide`: bytes of its second disk, which is zeroed as a whole."""
    source = Source(vm, {"a.raw": 60_000, "b.raw": wide}, seed=seed)
    source.write("a.raw", 0, source.random.randbytes(60_000))
    replica = LocalReplica(store, vm)
    source.copy_to(replica)
    replica.define(vm.encode())
    for number in range(3):
        source.write("a.raw", 100, source.random.randbytes(9_000))
        if number == 0:
            source.zero("b.raw", 0, wide)
        source.ship_to(replica)
        source.history.clear() if wide > 1 << 20 else None
    source.write("a.raw", 100, source.random.randbytes(9_000))
    manifest, frames = source.begin_cycle()
    replica.begin(manifest)
    replica.put(frames[0])
    replica.close()
    return source


def dump(store: Store) -> dict[bytes, dict[bytes, bytes]]:
    """Everything in every database."""
    with store.env.read() as txn:
        found = {}
        for name in schema.DATABASES:
            with txn.cursor(db=store.env.db(name)) as cursor:
                found[name] = {bytes(key): bytes(value) for key, value in cursor}
    return found


def leavings(store: Store, number: int) -> list[tuple[bytes, bytes]]:
    """The keys that begin with the number of a VM, or tell of its deletion."""
    return [
        (name, key)
        for name, items in dump(store).items()
        for key in items
        if (name not in (schema.META, schema.VMS, schema.PINS) and key[:4] == schema.u32(number))
        or (name == schema.META and key.startswith(schema.PREFIX_GONE))
    ]


def others(store: Store, number: int) -> dict[bytes, dict[bytes, bytes]]:
    """Everything but what is of the VM of that number, called "vm"."""
    plain = (schema.META, schema.VMS, schema.PINS)
    return {
        name: {
            key: value
            for key, value in items.items()
            if (name in plain or key[:4] != schema.u32(number))
            and not key.startswith(schema.PREFIX_GONE)
            and (name, key) != (schema.VMS, b"vm")
        }
        for name, items in dump(store).items()
    }


def test_killed_at_every_step_a_deletion_goes_on_to_the_same_end_and_touches_nobody_else(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(removal, "BATCH", 2)
    whole = os.path.join(folder, "whole")
    with Store(whole) as store:
        other = replicated(store, "other", seed=1)
        replicated(store, "vm", seed=2, wide=(schema.WIDE_SPAN + 1) * schema.REGION)
        number = store.vm("vm").id
        before = others(store, number)
        assert {name for name, _ in leavings(store, number)} == {
            schema.POINTS, schema.POINT_IDS, schema.FRAMES, schema.PLACEMENTS, schema.INDEX, schema.WIDE,
            schema.STAGING, schema.DEFINITIONS,
        }  # fmt: skip
    for step in itertools.count(1):
        path = os.path.join(folder, str(step))
        shutil.copytree(whole, path)
        ended = removed_until(path, step)
        with Store(path) as store:
            assert check(store).findings == (), step
            if removal.is_half_done(store, "vm"):
                with pytest.raises(BusyError, match="not wholly deleted"):
                    LocalReplica(store, "vm").begin(Source("vm", {"a.raw": 512}).begin_copy()[0])
            removal.remove(store, "vm")
            assert not removal.exists(store, "vm")
            assert leavings(store, number) == [], step
            assert others(store, number) == before, step
            assert not os.path.exists(store.replica_folder("vm"))
            check_points(store, other)
            assert check(store).findings == ()
        shutil.rmtree(path)
        if ended:
            break
    assert step > 20


def removed_until(path: str, step: int) -> bool:
    """Delete in a process of its own that dies at the labelled call number `step`; whether it came to the end."""

    def remove() -> None:
        with Store(path) as store:
            removal.remove(store, "vm")

    return done_until(step, remove)


def test_a_replica_that_is_read_stays_and_one_whose_reader_died_does_not(tmp_path):
    with Store(str(tmp_path)) as store:
        replicated(store, "vm", seed=3)
        point = store.points("vm")[0].id
        pin = store.pin("vm", point, {"kind": "test-failover", "mountpoint": "/nowhere"})
        with pytest.raises(BusyError, match="is in use") as caught:
            removal.remove(store, "vm")
        assert caught.value.hint == "hvfuse failover cleanup vm"
        assert len(store.points("vm")) == 3
        store.unpin(pin)
        child = os.fork()
        if child == 0:
            os._exit(0)
        pin = store.pin("vm", point, {"kind": "reader", "pid": child})
        os.waitpid(child, 0)
        assert removal.remove(store, "vm")
        assert store.pins() == [] and store.vms() == []


def test_a_new_replica_of_that_name_has_nothing_of_the_old_one(tmp_path):
    with Store(str(tmp_path)) as store:
        replicated(store, "vm", seed=3)
        assert removal.remove(store, "vm")
        source = Source("vm", {"a.raw": 30_000}, seed=9)
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        source.ship_to(replica)
        replica.close()
        assert os.listdir(store.replica_folder("vm")) == ["a.raw"]
        check_points(store, source)
        assert check(store).findings == ()
