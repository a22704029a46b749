"""The replica's own state: it follows what is taken in, and an administrator can hold it up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from hvfuse.errors import CorruptError, FencedError, StateError, SuspendedError
from hvfuse.manifest import CycleKind
from hvfuse.states import ReplicationState
from hvfuse.target import relation
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from hvfuse.target.usage import usage
from tests.target.model import Source, check_points, send


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    with Store(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def source() -> Source:
    made = Source("vm", {"a.raw": 50_000})
    made.write("a.raw", 0, made.random.randbytes(20_000))
    return made


def shown(store: Store) -> str:
    (found,) = usage(store).vms
    return found.state


def over(source: Source) -> tuple[object, list[bytes]]:
    """A copy of differences over where the replica stands: of everything."""
    previous = source.position
    _, frames = source.begin_copy()
    return source.manifest(CycleKind.COPY, previous=previous), frames


def test_the_state_follows_what_is_begun_and_committed(store: Store, source: Source) -> None:
    replica = LocalReplica(store, "vm")
    manifest, frames = source.begin_copy()
    replica.begin(manifest)
    assert shown(store) == "WaitingForInitialReplication"
    send(replica, manifest, frames)
    source.end_copy(manifest)
    assert shown(store) == "WaitingForInitialReplication"
    manifest, frames = source.begin_cycle()
    replica.begin(manifest)
    assert shown(store) == "WaitingForInitialReplication"
    source.end_cycle(manifest, send(replica, manifest, frames) or "")
    assert shown(store) == "Replicating"
    manifest, frames = over(source)
    replica.begin(manifest)
    assert shown(store) == "Resynchronizing"
    send(replica, manifest, frames)
    source.end_copy(manifest)
    assert shown(store) == "Resynchronizing"
    source.ship_to(replica)
    assert shown(store) == "Replicating"
    replica.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_suspended_replica_takes_nothing_in_at_whatever_step_and_loses_nothing(store, source, direct) -> None:
    replica = LocalReplica(store, "vm")
    if not direct:
        source.copy_to(replica)
        source.ship_to(replica)
    source.write("a.raw", 9_000, b"x" * 7_000)
    manifest, frames = source.begin_copy() if direct else source.begin_cycle()
    replica.begin(manifest)
    replica.put(frames[0])
    relation.suspend(store, "vm")
    for refused in (
        lambda: replica.put(frames[-1]),
        lambda: replica.commit(manifest, len(frames)),
        lambda: replica.begin(manifest),
    ):
        with pytest.raises(SuspendedError, match="suspended at the target") as caught:
            refused()
        assert caught.value.recoverable
        assert caught.value.hint == "hvfuse replication resume vm --replica"
    check_points(store, source)
    assert shown(store) == "Suspended"
    relation.resume(store, "vm")
    assert shown(store) == ("WaitingForInitialReplication" if direct else "Replicating")
    point = send(replica, manifest, frames)
    if direct:
        source.end_copy(manifest)
        source.ship_to(replica)
    else:
        source.end_cycle(manifest, point)
    assert shown(store) == "Replicating"
    check_points(store, source)
    replica.close()


def test_a_resynchronisation_that_was_suspended_here_goes_on_as_one(store: Store, source: Source) -> None:
    replica = LocalReplica(store, "vm")
    source.copy_to(replica)
    source.ship_to(replica)
    manifest, frames = over(source)
    replica.begin(manifest)
    assert relation.suspend(store, "vm") is ReplicationState.RESYNCHRONIZE_SUSPENDED
    with pytest.raises(SuspendedError):
        replica.put(frames[0])
        replica.commit(manifest, len(frames))
    assert relation.resume(store, "vm") is ReplicationState.WAITING_FOR_START_RESYNCHRONIZE
    send(replica, manifest, frames)
    assert shown(store) == "Resynchronizing"
    replica.close()


def test_what_is_suspended_or_resumed_twice(store: Store, source: Source) -> None:
    replica = LocalReplica(store, "vm")
    source.copy_to(replica)
    source.ship_to(replica)
    with pytest.raises(StateError, match="Replicating, and not suspended"):
        relation.resume(store, "vm")
    assert relation.suspend(store, "vm") is relation.suspend(store, "vm") is ReplicationState.SUSPENDED
    assert relation.resume(store, "vm") is ReplicationState.REPLICATING
    replica.close()


def test_a_replica_that_was_failed_over_takes_nothing_in(store: Store, source: Source) -> None:
    replica = LocalReplica(store, "vm")
    source.copy_to(replica)
    source.ship_to(replica)
    put_state(store, "FailedOverWaitingCompletion")
    for manifest in (source.begin_cycle()[0], over(source)[0]):
        with pytest.raises(FencedError, match="is FailedOverWaitingCompletion"):
            replica.begin(manifest)
    assert shown(store) == "FailedOverWaitingCompletion"
    replica.close()


def put_state(store: Store, state: str) -> None:
    store.write("test", lambda txn: store.save_vm(txn, replace(store.load_vm(txn, "vm"), state=state)))


def test_a_store_of_before_is_read_as_position_and_points_imply(store: Store, source: Source) -> None:
    replica = LocalReplica(store, "vm")
    manifest, frames = source.begin_copy()
    replica.begin(manifest)
    told = []
    put_state(store, "")
    told.append(shown(store))
    send(replica, manifest, frames)
    source.end_copy(manifest)
    put_state(store, "")
    told.append(shown(store))
    source.ship_to(replica)
    put_state(store, "")
    told.append(shown(store))
    manifest, frames = over(source)
    send(replica, manifest, frames)
    put_state(store, "")
    told.append(shown(store))
    waiting = "WaitingForInitialReplication"
    assert told == [waiting, waiting, "Replicating", "Resynchronizing"]
    put_state(store, "Elsewhere")
    with pytest.raises(CorruptError, match="no state 'Elsewhere'"):
        shown(store)
    replica.close()
