"""Who has a VM, by the store: each act alone, again, out of turn, and by somebody who has no part in it."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from hvfuse.errors import BusyError, CorruptError, FencedError, NotFoundError, StateError
from hvfuse.manifest import CycleKind
from hvfuse.position import PositionMismatchError
from hvfuse.states import AFTER_FAILOVER, FAILOVER_OPEN, TABLE, Event, ReplicationState
from hvfuse.target import definitions, failing_over, relation, removal
from hvfuse.target.adopt import adopt
from hvfuse.target.check import check
from hvfuse.target.failing_over import PLANNED, UNPLANNED, Claim, Party
from hvfuse.target.journal import PointReader
from hvfuse.target.local import LocalReplica
from hvfuse.target.merge import merge
from hvfuse.target.retention import RetentionPolicy
from hvfuse.target.schema import VmRecord
from hvfuse.target.store import Store
from hvfuse.target.usage import usage
from tests.dying import done_until
from tests.target.model import Source, check_points, contents, send
from tests.target.test_kill import folder  # noqa: F401
from tests.target.test_removal import dump, leavings

S = Party(home="s", root="/s", host="one")
T = Party(home="t", root="/t", host="two")
X = Party(home="x", root="/x", host="three")
LATEST_ONLY = RetentionPolicy(keep_all_seconds=0, hourly=0)
_S = ReplicationState


class Claimant:
    """A home that ships as `party`, under the epoch that it knows."""

    def __init__(self, store: Store, party: Party, epoch: int = 0) -> None:
        self.party, self.epoch = party, epoch
        self.replica = LocalReplica(store, "vm", claim=lambda: Claim(party=party, epoch=self.epoch))


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    with Store(str(tmp_path / "store")) as opened:
        yield opened


def shipped(store: Store, points: int = 3) -> tuple[Source, Claimant]:
    """A VM of S with so many recovery points."""
    source, home = Source("vm", {"a.raw": 60_000, "b.raw": 3_000}, seed=5), Claimant(store, S)
    source.write("a.raw", 0, source.random.randbytes(50_000))
    source.copy_to(home.replica)
    for number in range(points):
        source.write("a.raw", 4000 * number, source.random.randbytes(9_000))
        source.zero("b.raw", 100 * number, 500)
        source.ship_to(home.replica)
    return source, home


def state(store: Store) -> ReplicationState:
    return failing_over.state_of(store.vm("vm"))


def ids(store: Store) -> list[str]:
    return [point.id for point in store.points("vm")]


def put(store: Store, **changes: object) -> None:
    store.write("test", lambda txn: store.save_vm(txn, replace(store.load_vm(txn, "vm"), **changes)))


def put_state(store: Store, wanted: ReplicationState) -> None:
    """The record as it is in that state; who fails over is T."""
    put(store, state=wanted.value)
    if wanted in AFTER_FAILOVER and wanted is not _S.PREPARED_FOR_FAILOVER:
        point, epoch = store.points("vm")[-1], store.vm("vm").epoch
        pin = store.pin("vm", point.id, {"kind": "failover"})
        put(store, failover={"kind": UNPLANNED, "point": point.id, "pin": pin, "epoch": epoch, **T.as_json()})
    if wanted is _S.PREPARED_FOR_FAILOVER:
        put(store, prepared={"point": ids(store)[-1]}, primary=S.home)


def prepare(store: Store, home: Claimant, point: str = "") -> None:
    claim = Claim(party=home.party, epoch=home.epoch)
    failing_over.prepare(store, "vm", claim, point_id=point or ids(store)[-1], proof={"compared": 7})


def withdraw(store: Store, home: Claimant) -> None:
    failing_over.withdraw(store, "vm", Claim(party=home.party, epoch=home.epoch))


def fail_over(store: Store, me: Party = T, *, kind: str = UNPLANNED, at: int = -1, home: bool = False) -> VmRecord:
    return failing_over.fail_over(store, "vm", me, kind=kind, point_id=ids(store)[at], comes_home=home)


# Each act by the table ----------------------------------------------------------------------------------------

ACTS: dict[Event, Callable[[Store], object]] = {
    Event.PREPARE_FAILOVER: lambda store: prepare(store, Claimant(store, S)),
    Event.FAIL_OVER: fail_over,
    Event.FAIL_BACK: lambda store: fail_over(store, home=True),
    Event.CHANGE_POINT: lambda store: failing_over.change_point(store, "vm", T, ids(store)[0]),
    Event.CANCEL_FAILOVER: lambda store: failing_over.cancel(store, "vm", T),
    Event.COMMIT_FAILOVER: lambda store: failing_over.commit(store, "vm", T),
}
DONE_BEFORE = {
    (_S.PREPARED_FOR_FAILOVER, Event.PREPARE_FAILOVER), (_S.FAILED_OVER, Event.COMMIT_FAILOVER),
    (_S.FAILBACK_COMPLETE, Event.COMMIT_FAILOVER),
    *((state, event) for state in FAILOVER_OPEN for event in (Event.FAIL_OVER, Event.FAIL_BACK)),
    *((state, Event.CANCEL_FAILOVER) for state in _S if state not in AFTER_FAILOVER),
}  # fmt: skip
"""What is no event any more, but the same act again."""


@pytest.mark.parametrize("event", list(ACTS))
def test_every_act_goes_by_the_table_from_every_state_and_changes_nothing_where_it_is_refused(store, event) -> None:
    shipped(store)
    blank = store.vm("vm")
    for before in ReplicationState:
        store.write("test", lambda txn: store.save_vm(txn, blank))
        for pin in store.pins():
            store.unpin(pin.id)
        put_state(store, before)
        kept, after = dump(store), TABLE.get((before, event))
        if (before, event) in DONE_BEFORE:
            ACTS[event](store)
            assert dump(store) == kept, before
        elif after is None or (before is _S.PREPARED_FOR_FAILOVER and event is Event.CANCEL_FAILOVER):
            with pytest.raises((StateError, FencedError)):
                ACTS[event](store)
            assert dump(store) == kept, before
        else:
            ACTS[event](store)
            assert state(store) is after, before


def test_a_planned_failover_is_at_the_last_point_takes_nothing_in_and_can_be_taken_back(store) -> None:
    source, home = shipped(store)
    with pytest.raises(NotFoundError, match="not the newest"):
        prepare(store, home, ids(store)[0])
    with pytest.raises(NotFoundError):
        prepare(store, home, "nothing")
    with pytest.raises(StateError, match="has not prepared"):
        fail_over(store, kind=PLANNED)
    for _ in range(2):
        prepare(store, home)
    kept = store.vm("vm").prepared
    assert kept is not None and kept["proof"] == {"compared": 7} and kept["point"] == ids(store)[-1]
    with pytest.raises(FencedError):
        prepare(store, Claimant(store, X))
    manifest, _ = source.begin_cycle()
    for claimant in (home, Claimant(store, X), Claimant(store, S, 9)):
        with pytest.raises(FencedError, match="planned failover is prepared"):
            claimant.replica.begin(manifest)
    with pytest.raises(FencedError):
        LocalReplica(store, "vm").begin(manifest)
    with pytest.raises(StateError, match="last point"):
        fail_over(store, kind=PLANNED, at=0)
    with pytest.raises(FencedError):
        withdraw(store, Claimant(store, X))
    with pytest.raises(StateError):
        failing_over.cancel(store, "vm", T)
    for _ in range(2):
        withdraw(store, home)
    assert store.vm("vm").prepared is None and state(store) is _S.REPLICATING and store.vm("vm").epoch == 0
    source.end_cycle(manifest, send(home.replica, manifest, source.frames(source.coalesced())) or "")
    check_points(store, source)
    prepare(store, home)
    assert fail_over(store, kind=PLANNED).prepared is None
    with pytest.raises(FencedError, match="/t on two"):
        withdraw(store, home)


def test_who_prepares_has_the_vm_also_in_a_store_of_before(store) -> None:
    _, home = shipped(store)
    put(store, primary="", source=None, state="")
    for _ in range(2):
        prepare(store, home)
    assert store.vm("vm").primary == S.home
    with pytest.raises(FencedError, match="/s on one"):
        withdraw(store, Claimant(store, X))


def test_a_failover_pins_its_point_and_moves_with_it(store) -> None:
    source, _ = shipped(store)
    first = fail_over(store)
    assert first.failover is not None and first.epoch == store.epoch() == 1
    assert fail_over(store) == first
    with pytest.raises(StateError, match="is failed over at") as caught:
        fail_over(store, at=0)
    assert caught.value.hint == f"hvfuse failover change-point vm --point {ids(store)[0]}"
    for act in (
        lambda: fail_over(store, X),
        lambda: failing_over.change_point(store, "vm", X, ids(store)[0]),
        lambda: failing_over.cancel(store, "vm", S),
        lambda: failing_over.commit(store, "vm", X),
        lambda: failing_over.let_go(store, "vm", X),
    ):
        with pytest.raises(StateError, match="/t on two"):
            act()
    with pytest.raises(NotFoundError):
        failing_over.change_point(store, "vm", T, "nothing")
    for at in (0, 0, 1):
        changed = failing_over.change_point(store, "vm", T, ids(store)[at])
        (pin,) = store.pins("vm")
        assert changed.failover is not None
        assert (pin.point_id, pin.id) == (ids(store)[at], changed.failover["pin"])
        assert changed.failover["point_ns"] == store.point("vm", pin.point_id).time_ns
        assert changed.failover["epoch"] == changed.epoch == 1
    assert len(ids(store)) == 3 and check(store).findings == ()
    check_points(store, source)
    for _ in range(2):
        assert failing_over.cancel(store, "vm", T).epoch == 2
    assert store.pins() == [] and store.vm("vm").failover is None and store.vm("vm").primary == S.home
    with pytest.raises(StateError, match="is Replicating: it is not failed over"):
        failing_over.commit(store, "vm", T)


def test_a_store_of_before_can_be_failed_over(store) -> None:
    source, _ = shipped(store)
    put(store, state="", primary="", source=None)
    raw = {key: value for key, value in vars_of(store.vm("vm")).items() if key not in NEW}
    assert VmRecord(**raw) == store.vm("vm")
    fail_over(store, at=1)
    failing_over.change_point(store, "vm", T, ids(store)[0])
    failing_over.cancel(store, "vm", T)
    fail_over(store, at=1)
    failing_over.commit(store, "vm", T)
    check_points(store, source)
    with pytest.raises(FencedError, match="/t on two"):
        Claimant(store, S).replica.begin(source.begin_cycle()[0])


NEW = ("primary", "epoch", "source", "prepared", "failover", "returns_to", "moving")


def vars_of(vm: VmRecord) -> dict[str, object]:
    return {name: getattr(vm, name) for name in VmRecord.__slots__}


def test_a_state_that_nobody_knows_is_damage(store) -> None:
    source, home = shipped(store)
    put(store, state="Elsewhere")
    for act in (lambda: home.replica.begin(source.begin_cycle()[0]), lambda: fail_over(store), lambda: state(store)):
        with pytest.raises(CorruptError, match="no state 'Elsewhere'"):
            act()


# Who ships ----------------------------------------------------------------------------------------------------


def test_a_stranger_gets_nothing_in_out_or_away(store) -> None:
    source, home = shipped(store)
    source.write("a.raw", 5, b"more")
    manifest, frames = source.begin_cycle()
    home.replica.begin(manifest)
    home.replica.put(frames[0])
    kept, stranger = dump(store), Claimant(store, X, 99)
    other = Source("vm", {"a.raw": 60_000, "b.raw": 3_000}, seed=6)
    for act in (
        lambda: stranger.replica.begin(manifest),
        lambda: stranger.replica.begin(other.begin_copy()[0]),
        lambda: stranger.replica.commit(manifest, len(frames)),
        lambda: stranger.replica.housekeep(LATEST_ONLY, source.now_ns),
        lambda: stranger.replica.define(b"mine"),
        stranger.replica.abandon,
        lambda: prepare(store, stranger),
        lambda: withdraw(store, stranger),
    ):
        with pytest.raises(FencedError, match="belongs to /s on one"):
            act()
        assert dump(store) == kept
    source.end_cycle(manifest, send(home.replica, manifest, frames) or "")
    check_points(store, source)


def test_the_first_who_ships_has_the_vm_and_an_epoch_from_elsewhere_is_kept(store) -> None:
    source, home = shipped(store)
    assert (store.vm("vm").primary, store.vm("vm").source) == (S.home, S.as_json())
    home.epoch = 7
    source.ship_to(home.replica)
    assert store.vm("vm").epoch == store.epoch() == 7
    home.epoch = 6
    with pytest.raises(FencedError, match="epoch 7, 6 is known here"):
        source.begin_cycle()
        home.replica.begin(source.manifest(CycleKind.DELTA, previous=source.position))
    assert fail_over(store).epoch == 8


def test_a_claim_that_is_refused_for_another_reason_is_not_kept(store) -> None:
    source, _ = shipped(store)
    put(store, primary="", source=None)
    manifest = replace(source.begin_cycle()[0], previous=replace(source.position, cycle=77))
    with pytest.raises(PositionMismatchError):
        Claimant(store, X, 5).replica.begin(manifest)
    assert (store.vm("vm").primary, store.vm("vm").epoch) == ("", 0)


@pytest.mark.parametrize("kind", [CycleKind.DELTA, CycleKind.COPY])
@pytest.mark.parametrize("when", ["begun", "put", "all put"])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("claims", [True, False])
def test_a_failover_in_the_middle_of_a_cycle_lets_nothing_land(store, kind, when, same, claims) -> None:
    source, home = shipped(store)
    replica = home.replica if claims else LocalReplica(store, "vm")
    source.write("a.raw", 1_000, source.random.randbytes(20_000))
    previous, changes = source.position, source.coalesced()
    if kind is CycleKind.COPY:
        source.begin_copy()
        manifest, frames = source.manifest(kind, previous=previous), source.frames(changes, per_frame=1)
    else:
        manifest, frames = source.begin_cycle()
    replica.begin(manifest)
    for frame in frames[: {"begun": 0, "put": 1, "all put": len(frames)}[when]]:
        replica.put(frame)
    points = ids(store)
    fail_over(store)
    for act in (
        lambda: replica.put(frames[-1]),
        lambda: replica.commit(manifest, len(frames)),
        lambda: replica.begin(manifest),
        replica.abandon,
    ):
        with pytest.raises(FencedError, match="failed over to /t on two"):
            act()
            replica.commit(manifest, len(frames))  # a small frame may have waited
    assert ids(store) == points and store.vm("vm").position == previous
    failing_over.cancel(store, "vm", T)
    if claims:
        for act in (lambda: replica.begin(manifest), lambda: replica.commit(manifest, len(frames))):
            with pytest.raises(FencedError, match="failed over meanwhile"):
                act()
    home.epoch = store.vm("vm").epoch
    if not same:  # it is begun anew, with other contents
        home.replica.abandon()
        source.changes = {name: [(0, len(data), bytes(data))] for name, data in source.disks.items()}
        source.begin_copy()
        manifest = source.manifest(CycleKind.COPY, previous=previous)
        frames = source.frames({name: [(0, len(data), bytes(data))] for name, data in source.disks.items()})
    point = send(home.replica, manifest, frames)
    if point is not None:
        source.end_cycle(manifest, point)
    else:
        source.end_copy(manifest)
    source.write("b.raw", 0, b"after")
    source.ship_to(home.replica)
    check_points(store, source)
    assert check(store).findings == ()


def test_nothing_is_let_go_while_a_failover_stands_and_its_point_never(store) -> None:
    source, home = shipped(store, points=6)
    source.ship_to(home.replica)
    fail_over(store, at=2)
    chosen, points = ids(store)[2], ids(store)
    seq = store.pins("vm")[0].seq
    assert LocalReplica(store, "vm").housekeep(LATEST_ONLY, source.now_ns).points_dropped == 0
    with pytest.raises(FencedError):
        home.replica.housekeep(LATEST_ONLY, source.now_ns)
    merge(store, "vm", 99)
    assert ids(store) == points and store.vm("vm").base_seq < seq
    reader = PointReader(store, "vm", chosen)
    failing_over.commit(store, "vm", T)
    assert ids(store) == [chosen]
    LocalReplica(store, "vm").housekeep(LATEST_ONLY, source.now_ns)
    merge(store, "vm", 99)
    assert store.vm("vm").base_seq == seq and ids(store) == [chosen]
    assert reader.pread("a.raw", 0, 60_000) == source.history[chosen]["a.raw"]
    assert contents(store, "vm", chosen) == source.history[chosen]
    reader.close()
    assert check(store).findings == ()


def test_a_point_that_somebody_else_holds_stays_listed_and_keeps_the_replica(store) -> None:
    source, _ = shipped(store)
    pin = store.pin("vm", ids(store)[0], {"kind": "test-failover"})
    held = ids(store)[0]
    fail_over(store)
    failing_over.commit(store, "vm", T)
    assert ids(store) == [held, store.vm("vm").failover["point"]] and check(store).findings == ()
    kept = dump(store)
    with pytest.raises(BusyError, match=held):
        failing_over.let_go(store, "vm", T)
    assert dump(store) == kept
    check_points(store, source)
    store.unpin(pin)
    failing_over.let_go(store, "vm", T)
    assert store.pins() == []


# After it was let go ------------------------------------------------------------------------------------------


def let_go_wholly(store: Store) -> int:
    """The number that it had."""
    number = store.vm("vm").id
    fail_over(store, at=1)
    with pytest.raises(StateError, match="not committed"):
        failing_over.let_go(store, "vm", T)
    failing_over.commit(store, "vm", T)
    failing_over.let_go(store, "vm", T)
    return number


def test_of_what_was_let_go_only_the_fence_stays(store, tmp_path) -> None:
    source, home = shipped(store)
    home.replica.define(b"what it is")
    source.write("a.raw", 0, b"staged")
    manifest, frames = source.begin_cycle()
    home.replica.begin(manifest)
    home.replica.put(frames[0])
    home.replica.close()
    reader = PointReader(store, "vm", ids(store)[1])
    number = let_go_wholly(store)
    kept = dump(store)
    failing_over.let_go(store, "vm", T)
    assert dump(store) == kept
    assert leavings(store, number) == [] and not os.path.exists(store.replica_folder("vm"))
    vm = store.vm("vm")
    assert vm.id != number and vm.primary == T.home and vm.failover is not None and vm.failover["hydrated_ns"]
    assert check(store).findings == () and ids(store) == [] and store.pins() == []
    assert store.summary("vm") == (0, None, "FailedOver") and store.point_count("vm") == 0
    (found,) = usage(store).vms
    assert (found.state, found.points, found.journal_bytes, found.base_bytes, found.position) == (
        "FailedOver", 0, 0, 0, None,
    )  # fmt: skip
    assert store.definition("vm") is None
    with pytest.raises(NotFoundError):
        store.point("vm")
    with pytest.raises(NotFoundError):
        PointReader(store, "vm", vm.failover["point"])
    with pytest.raises(NotFoundError):
        reader.pread("a.raw", 0, 100)
    reader.close()
    replica = LocalReplica(store, "vm")
    assert replica.position() is None and replica.points() == () and replica.inspect(from_medium=True) is None
    assert replica.housekeep(LATEST_ONLY, source.now_ns).cycles_merged == 0
    assert not os.path.exists(store.replica_folder("vm"))
    first = source.begin_copy()[0]
    for claimant in (home.replica, Claimant(store, S, 99).replica, Claimant(store, X).replica, replica):
        with pytest.raises(FencedError, match="failed over to /t on two"):
            claimant.begin(first)
    (tmp_path / "brought").mkdir()
    (tmp_path / "brought" / "a.raw").write_bytes(b"1" * 512)
    with pytest.raises(FencedError):
        adopt(store, "vm", str(tmp_path / "brought"))
    with pytest.raises(StateError):
        relation.suspend(store, "vm")


def test_who_deletes_the_replica_of_a_vm_that_was_failed_over_does_not_let_its_old_source_in(store) -> None:
    source, home = shipped(store)
    fail_over(store)
    with pytest.raises(BusyError):
        removal.remove(store, "vm")
    failing_over.commit(store, "vm", T)
    with pytest.raises(BusyError):
        removal.remove(store, "vm")
    store.unpin(store.vm("vm").failover["pin"])
    number = store.vm("vm").id
    assert removal.remove(store, "vm") and not removal.remove(store, "vm")
    assert leavings(store, number) == []
    with pytest.raises(FencedError, match="/t on two"):
        home.replica.begin(source.begin_copy()[0])
    failing_over.let_go(store, "vm", T)


def test_killed_at_every_step_letting_go_goes_on_to_the_same_end(folder) -> None:  # noqa: F811
    whole = os.path.join(folder, "whole")
    with Store(whole) as store:
        shipped(store)
        number = store.vm("vm").id
        fail_over(store)
        failing_over.commit(store, "vm", T)
    for step in itertools.count(1):
        path = os.path.join(folder, str(step))
        shutil.copytree(whole, path)

        def act(path: str = path) -> None:
            with Store(path) as store:
                failing_over.let_go(store, "vm", T)

        ended = done_until(step, act)
        with Store(path) as store:
            assert state(store) is _S.FAILED_OVER and check(store).findings == (), step
            failing_over.let_go(store, "vm", T)
            assert leavings(store, number) == [] and store.pins() == [], step
            assert not os.path.exists(store.replica_folder("vm"))
            assert store.vm("vm").failover["hydrated_ns"]
        shutil.rmtree(path)
        if ended:
            break
    assert step > 10


@pytest.mark.parametrize("act", ["prepare", "fail over", "change", "cancel", "commit"])
def test_killed_around_its_transaction_an_act_is_done_or_not_and_done_again_it_is_done_once(folder, act) -> None:  # noqa: F811
    def do(store: Store) -> None:
        if act == "prepare":
            prepare(store, Claimant(store, S))
        if act in ("fail over", "change", "cancel", "commit"):
            fail_over(store)
        if act == "change":
            failing_over.change_point(store, "vm", T, ids(store)[0])
        if act == "cancel":
            failing_over.cancel(store, "vm", T)
        if act == "commit":
            failing_over.commit(store, "vm", T)

    with Store(os.path.join(folder, "0")) as store:
        shipped(store)
        number = store.vm("vm").head_seq
    for step in itertools.count(1):
        path = os.path.join(folder, str(step))
        shutil.copytree(os.path.join(folder, "0"), path)

        def dying(path: str = path) -> None:
            with Store(path) as store:
                do(store)

        ended = done_until(step, dying)
        with Store(path) as store:
            if state(store) is not _S.FAILED_OVER and not (act == "change" and store.vm("vm").failover):
                do(store)
            if act == "change":
                failing_over.change_point(store, "vm", T, ids(store)[0])
            if act == "commit":
                failing_over.commit(store, "vm", T)
            vm = store.vm("vm")
            pins = {"prepare": 0, "cancel": 0}.get(act, 1)
            assert len(store.pins()) == pins and vm.head_seq == number and check(store).findings == ()
            assert vm.epoch == store.epoch()
        if ended:
            break
    assert step > 2


def test_an_invitation_is_of_who_has_the_vm_for_good(store) -> None:
    shipped(store)
    where = {"store": "/s/store", **S.as_json()}
    for _ in range(2):
        with pytest.raises(StateError, match="no failover is committed"):
            failing_over.invite(store, "vm", where)
        fail_over(store) if store.vm("vm").failover is None else None
    failing_over.commit(store, "vm", T)
    for _ in range(2):
        failing_over.invite(store, "vm", where)
    failing_over.let_go(store, "vm", T)
    assert store.vm("vm").returns_to == where
    with pytest.raises(NotFoundError):
        failing_over.invite(store, "other", where)


def test_a_store_awaits_nobody_while_a_failover_stands_open(store) -> None:
    shipped(store)

    def awaiting(txn):
        return failing_over.awaiting(txn, store, store.load_vm(txn, "vm"), S, epoch=9)

    prepare(store, Claimant(store, S))
    with pytest.raises(StateError):
        store.write("test", awaiting)
    fail_over(store)
    with pytest.raises(StateError):
        store.write("test", awaiting)
    failing_over.commit(store, "vm", T)
    found = store.write("test", awaiting)
    assert (found.state, found.primary, found.epoch, found.failover) == (
        _S.WAITING_FOR_INITIAL_REPLICATION,
        "s",
        9,
        None,
    )
    assert store.epoch() >= 9


def test_a_definition_is_taken_from_nobody_while_a_failover_stands(store) -> None:
    shipped(store)
    fail_over(store)
    for claim in (None, Claim(party=S, epoch=1)):
        with pytest.raises(FencedError):
            definitions.define(store, "vm", b"new", claim)
