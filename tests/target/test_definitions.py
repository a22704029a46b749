"""A definition stands with the points that were committed under it, and goes with the last of them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import shutil
import subprocess
import sys

import pytest

from hvfuse.errors import CorruptError, FencedError, NotFoundError, SuspendedError, UsageError
from hvfuse.target import definitions, relation, schema
from hvfuse.target.check import check
from hvfuse.target.environment import Environment
from hvfuse.target.failing_over import Claim, Party
from hvfuse.target.local import LocalReplica
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.schema import PointRecord, VmRecord
from hvfuse.target.store import Store
from tests.dying import done_until
from tests.target.model import Source, check_points
from tests.target.test_journal import change, replica, source, store, stored  # noqa: F401
from tests.target.test_kill import folder  # noqa: F401

DEFINE = """
import sys
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
with Store(sys.argv[1], create=False) as store:
    LocalReplica(store, "vm").define(b"one")
"""
LATEST_ONLY = RetentionPolicy(keep_all_seconds=0, hourly=0)


def names(store: Store) -> set[str]:  # noqa: F811
    with store.env.read() as txn:
        return {name for name, _ in definitions.stored(txn, store, store.load_vm(txn, "vm"))}


def writes(monkeypatch) -> list[str]:
    made: list[str] = []
    real = Environment.write
    monkeypatch.setattr(Environment, "write", lambda self, label, act: made.append(label) or real(self, label, act))
    return made


def test_each_point_has_the_definition_of_when_it_was_committed(store, source, replica):  # noqa: F811
    without = source.ship_to(replica)
    replica.define(b"one")
    first = source.ship_to(replica)
    replica.define(b"two")
    second, third = source.ship_to(replica), source.ship_to(replica)
    replica.define(b"one")
    last = source.ship_to(replica)
    said = {point: store.definition("vm", point) for point in (without, first, second, third, last)}
    assert list(said.values()) == [None, b"one", b"two", b"two", b"one"]
    assert store.definition("vm") == b"one"
    by_digest = [schema.definition_name(data) for data in (b"one", b"two")]
    assert [point.definition for point in store.points("vm")] == [
        "",
        by_digest[0],
        by_digest[1],
        by_digest[1],
        by_digest[0],
    ]
    assert check(store).findings == ()


def test_saying_the_same_again_writes_nothing(source, replica, monkeypatch):  # noqa: F811
    replica.define(b"one")
    made = writes(monkeypatch)
    for _ in range(3):
        replica.define(b"one")
    assert made == []
    replica.define(b"two")
    assert made == ["store:define"]


def test_one_that_nothing_names_any_more_goes_with_the_last_point_that_did(store, source, replica):  # noqa: F811
    replica.define(b"one")
    held = source.ship_to(replica)
    pin = store.pin("vm", held, {})
    source.ship_to(replica)
    replica.define(b"never used")
    replica.define(b"two")
    source.ship_to(replica)
    one, two = (schema.definition_name(data) for data in (b"one", b"two"))
    replica.housekeep(LATEST_ONLY, source.now_ns)
    assert names(store) == {one, two}
    assert store.definition("vm", held) == b"one"
    store.unpin(pin)
    replica.housekeep(LATEST_ONLY, source.now_ns)
    assert names(store) == {two}
    assert store.definition("vm") == b"two"
    assert check(store).findings == ()


def test_another_vms_definition_stays(store, source, replica):  # noqa: F811
    other = Source("other", {"a.raw": 9000}, seed=9)
    others = LocalReplica(store, "other")
    other.copy_to(others)
    others.define(b"one")
    other.ship_to(others)
    for text in (b"one", b"two", b"three"):
        replica.define(text)
        source.ship_to(replica)
    replica.housekeep(LATEST_ONLY, source.now_ns)
    assert store.definition("other") == b"one" and len(names(store)) == 1


def test_what_may_not_be_shipped_may_not_be_defined(store, source, replica):  # noqa: F811
    with pytest.raises(NotFoundError):
        LocalReplica(store, "nobody").define(b"one")
    with pytest.raises(UsageError, match="more than"):
        replica.define(bytes(definitions.MAX_BYTES + 1))
    source.ship_to(replica)
    mine, strange = (
        LocalReplica(store, "vm", claim=lambda home=home: Claim(party=Party(home=home, root="/", host="h"), epoch=0))
        for home in ("mine", "strange")
    )
    source.ship_to(mine)
    mine.define(b"one")
    with pytest.raises(FencedError):
        strange.define(b"two")
    relation.suspend(store, "vm")
    with pytest.raises(SuspendedError):
        mine.define(b"two")
    mine.define(b"one")  # as before
    assert store.definition("vm") == b"one"


def test_every_flipped_bit_and_every_lack_is_found(store, source, replica):  # noqa: F811
    replica.define(b"one" * 100)
    point = source.ship_to(replica)
    (key, raw), dice = stored(store, schema.DEFINITIONS)[0], random.Random(4)
    for _ in range(50):
        damaged = bytearray(raw)
        damaged[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
        change(store, schema.DEFINITIONS, key, bytes(damaged))
        assert [str(finding) for finding in check(store).findings] == [
            f"vm: definition {key[4:].hex()} does not match its checksum"
        ]
        with pytest.raises(CorruptError, match="checksum"):
            store.definition("vm", point)
    change(store, schema.DEFINITIONS, key, schema.pack_definition(b"another"))
    assert "is another one" in str(check(store).findings[0])
    change(store, schema.DEFINITIONS, key, None)
    assert "is missing" in str(check(store).findings[0])
    change(store, schema.DEFINITIONS, key, raw)
    assert check(store).findings == ()


def before(monkeypatch) -> None:
    """From now on the store is written as it was before there were definitions."""
    monkeypatch.setattr(schema, "DATABASES", tuple(name for name in schema.DATABASES if name != schema.DEFINITIONS))
    pack = schema._pack_record
    monkeypatch.setattr(
        schema, "_pack_record",
        lambda record, without="": _without_definition(pack(record, without=without)),
    )  # fmt: skip


def _without_definition(raw: bytes) -> bytes:
    text = raw[8:].replace(b',"definition":""', b"")
    assert b"definition" not in text
    return schema._sealed(text)


def test_a_store_of_before_is_read_and_takes_definitions_from_then_on(tmp_path, monkeypatch):
    source, path = Source("vm", {"a.raw": 30_000}, seed=3), str(tmp_path / "store")  # noqa: F811
    with monkeypatch.context() as patch:
        before(patch)
        with Store(path) as store:
            replica = LocalReplica(store, "vm")
            source.copy_to(replica)
            old = source.ship_to(replica)
    with Store(path, create=False, read_only=True) as store:
        assert not store.env.has(schema.DEFINITIONS)
        assert store.definition("vm", old) is None and store.definition("vm") is None
        assert store.points("vm")[0].definition == ""
        assert check(store).findings == ()
        # Another process makes the database while this one has the store open.
        subprocess.run([sys.executable, "-c", DEFINE, path], check=True, timeout=60)
        assert store.definition("vm") == b"one" and store.definition("vm", old) is None
    with Store(path) as store:
        replica = LocalReplica(store, "vm")
        replica.define(b"two")
        new = source.ship_to(replica)
        assert (store.definition("vm", old), store.definition("vm", new)) == (None, b"two")
        replica.housekeep(LATEST_ONLY, source.now_ns)
        check_points(store, source)
        assert check(store).findings == ()


def test_records_without_the_field_have_none():
    vm = VmRecord.unpack(_without_definition(VmRecord(id=1, name="vm").pack()))
    assert vm.definition == ""
    assert "definition" in {field.name for field in dataclasses.fields(PointRecord)}


def test_killed_at_every_step_of_a_definition_it_is_given_wholly_or_not_at_all(folder):  # noqa: F811
    whole = os.path.join(folder, "whole")
    source = Source("vm", {"a.raw": 30_000}, seed=5)  # noqa: F811
    with Store(whole) as store:  # noqa: F811
        replica = LocalReplica(store, "vm")
        source.copy_to(replica)
        replica.define(b"one")
        source.ship_to(replica)
    manifest, frames = source.begin_cycle()
    said = set()
    for step in itertools.count(1):
        path = os.path.join(folder, str(step))
        shutil.copytree(whole, path)

        def go_on(path: str = path) -> None:
            with Store(path) as store:
                replica = LocalReplica(store, "vm")
                replica.define(b"two")
                if replica.position() != manifest.position():
                    held = replica.begin(manifest)
                    for number, frame in enumerate(frames):
                        if number not in held:
                            replica.put(frame)
                    replica.commit(manifest, len(frames))
                replica.housekeep(LATEST_ONLY, manifest.sealed_ns)

        ended = done_until(step, go_on)
        with Store(path) as store:
            assert check(store).findings == (), step
            said.add(store.definition("vm"))
            is_new = store.vm("vm").position == manifest.position()
            assert store.definition("vm", store.points("vm")[-1].id) == (b"two" if is_new else b"one")
        go_on()
        with Store(path) as store:
            assert names(store) == {schema.definition_name(b"two")}
            assert check(store).findings == ()
        shutil.rmtree(path)
        if ended:
            break
    assert said == {b"one", b"two"} and step > 8
