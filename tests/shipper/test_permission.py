from dataclasses import replace
from datetime import UTC

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvfuse.errors import UsageError
from hvfuse.shipper.orders import MAX_AHEAD_NS, Orders
from hvfuse.shipper.permission import AT_ONCE_BYTES, AT_ONCE_PART, Cause, Need, Wait, permission
from hvfuse.shipper.window import ALWAYS, AT_NIGHT, AT_ONCE, NIGHT, Initial, Resync

HOUR = 3600 * 10**9
NOON = 12 * HOUR
EVENING = 18 * HOUR + HOUR // 2
GENERATION = "ab" * 16

FIRST = Need(is_first=True)
SMALL = Need(is_first=False, part=AT_ONCE_PART, length=1 << 40)
LARGE = Need(is_first=False, part=AT_ONCE_PART + 0.01, length=AT_ONCE_BYTES + 1)
DISKS = replace(LARGE, is_for_disks=True)
NIGHTLY = Wait(Cause.WINDOW, EVENING)


def ask(need, orders, **others):
    told = {"resync": AT_NIGHT, "initial": AT_ONCE, "now_ns": NOON} | others
    return permission(need, orders, tz=UTC, **told)


@pytest.mark.parametrize(
    ("need", "orders", "others", "expected"),
    [
        # The first copy goes by the policy of first copies alone.
        (FIRST, Orders(), {}, None),
        (FIRST, Orders(), {"resync": Resync(automatic=False)}, None),
        (FIRST, Orders(), {"initial": Initial(how="now", at_ns=NOON + 1)}, Wait(Cause.TIME, NOON + 1)),
        (FIRST, Orders(), {"initial": Initial(how="now", at_ns=NOON)}, None),
        (FIRST, Orders(), {"initial": Initial(how="seed")}, Wait(Cause.SEED)),
        (replace(FIRST, stands_at=GENERATION), Orders(), {"initial": Initial(how="seed")}, None),
        (FIRST, Orders(now=True), {"initial": Initial(how="seed")}, None),
        (FIRST, Orders(now=True), {"initial": Initial(how="now", at_ns=NOON + 1)}, None),
        # Resynchronisations: small ones at once, large ones in the window.
        (SMALL, Orders(), {}, None),
        (LARGE, Orders(), {}, NIGHTLY),
        (LARGE, Orders(), {"now_ns": EVENING}, None),
        (LARGE, Orders(), {"resync": Resync(window=ALWAYS)}, None),
        (LARGE, Orders(now=True), {}, None),
        (LARGE, Orders(), {"asked": True}, None),
        (SMALL, Orders(), {"resync": Resync(automatic=False)}, Wait(Cause.MANUAL)),
        (SMALL, Orders(now=True), {"resync": Resync(automatic=False)}, None),
        # Somebody added a disk, or removed one: that does not wait, unless copies were told to.
        (DISKS, Orders(), {}, None),
        (DISKS, Orders(), {"resync": Resync(automatic=False)}, None),
        (DISKS, Orders(at_ns=NOON + 1), {}, Wait(Cause.TIME, NOON + 1)),
        (DISKS, Orders(cancelled=True), {}, Wait(Cause.CANCELLED)),
        (DISKS, Orders(suspended=True), {"asked": True}, Wait(Cause.SUSPENDED)),
        (replace(DISKS, is_first=True), Orders(), {"initial": Initial(how="seed")}, Wait(Cause.SEED)),
        # What has begun, and what belongs to it, goes on.
        (replace(LARGE, is_under_way=True), Orders(), {"resync": Resync(automatic=False)}, None),
        (replace(LARGE, is_pass=True), Orders(), {}, None),
        # A time that was ordered comes before the window, on either side of it.
        (SMALL, Orders(at_ns=NOON + 1), {}, Wait(Cause.TIME, NOON + 1)),
        (LARGE, Orders(at_ns=NOON), {}, None),
        (FIRST, Orders(at_ns=NOON + 1), {}, Wait(Cause.TIME, NOON + 1)),
        (SMALL, Orders(at_ns=NOON + 1), {"asked": True}, None),
        # Cancelled: only if somebody wants it.
        (SMALL, Orders(cancelled=True), {}, Wait(Cause.CANCELLED)),
        (replace(SMALL, is_under_way=True), Orders(cancelled=True), {}, Wait(Cause.CANCELLED)),
        (SMALL, Orders(cancelled=True), {"asked": True}, None),
        # Little of a small VM, and all of it.
        (replace(LARGE, length=AT_ONCE_BYTES), Orders(), {}, None),
        (replace(LARGE, length=None), Orders(), {}, NIGHTLY),
        # Suspended, or on a medium: not even then.
        (SMALL, Orders(suspended=True, now=True), {"asked": True}, Wait(Cause.SUSPENDED)),
        (FIRST, Orders(seed=GENERATION, now=True), {"asked": True}, Wait(Cause.SEED)),
        (replace(FIRST, stands_at="cd" * 16), Orders(seed=GENERATION), {}, None),
        (replace(FIRST, stands_at=GENERATION), Orders(seed=GENERATION), {}, None),
    ],
)
def test_whether_a_copy_may_start_follows_from_need_orders_and_policy(need, orders, others, expected):
    assert ask(need, orders, **others) == expected


NEEDS = st.builds(
    Need,
    is_first=st.booleans(),
    is_under_way=st.booleans(),
    is_pass=st.booleans(),
    is_for_disks=st.booleans(),
    part=st.sampled_from([0.0, AT_ONCE_PART, 0.5, 1.0]),
    length=st.sampled_from([None, 0, AT_ONCE_BYTES, AT_ONCE_BYTES + 1]),
    stands_at=st.sampled_from([None, GENERATION, "cd" * 16]),
)
TIMES = st.one_of(st.none(), st.integers(NOON - HOUR, NOON + HOUR))
ORDERS = st.builds(
    Orders,
    now=st.booleans(),
    at_ns=TIMES,
    full=st.booleans(),
    suspended=st.booleans(),
    cancelled=st.booleans(),
    seed=st.sampled_from([None, GENERATION]),
)
POLICIES = st.fixed_dictionaries(
    {
        "resync": st.builds(Resync, automatic=st.booleans(), window=st.sampled_from([NIGHT, ALWAYS])),
        "initial": st.builds(Initial, how=st.sampled_from(["now", "seed"]), at_ns=TIMES),
    }
)


@settings(max_examples=300, deadline=None)
@given(NEEDS, ORDERS, POLICIES)
def test_what_waits_for_an_instant_goes_then_and_not_before_and_asking_helps_unless_it_is_barred(need, orders, policy):
    wait = ask(need, orders, **policy)
    if wait is not None and wait.until_ns is not None:
        assert wait.until_ns > NOON
        assert ask(need, orders, now_ns=wait.until_ns, **policy) is None
        assert ask(need, orders, now_ns=wait.until_ns - 1, **policy) == wait
    barred = orders.suspended or (orders.seed is not None and need.stands_at is None)
    assert (ask(need, orders, asked=True, **policy) is not None) == barred
    assert ask(need, orders.suspend(), **policy) == Wait(Cause.SUSPENDED)
    assert ask(need, orders.resynchronise(full=False, at_ns=None, now_ns=NOON), **policy) is None
    if wait is None and not orders.now:
        assert ask(need, orders.cancel(), **policy) == Wait(Cause.CANCELLED)


@given(ORDERS)
def test_orders_are_kept_as_they_are_and_can_be_taken_back(orders):
    assert Orders.from_json(orders.as_json()) == orders
    assert Orders.from_json({**orders.as_json(), "unheard_of": 1}) == orders
    assert orders.suspend().resume() == replace(orders, suspended=False)
    assert orders.cancel() == Orders(cancelled=True)
    assert orders.done().done() == orders.done()
    assert orders.done().full == orders.full, "a full copy that was ordered has not begun"
    assert not orders.done().cancelled and orders.done().suspended == orders.suspended


def test_missing_orders_are_none():
    assert Orders.from_json(None) == Orders.from_json({}) == Orders()


@pytest.mark.parametrize("at_ns", [NOON - 1, NOON + MAX_AHEAD_NS + 1])
def test_a_copy_is_ordered_for_the_coming_seven_days(at_ns):
    with pytest.raises(UsageError):
        Orders().resynchronise(full=False, at_ns=at_ns, now_ns=NOON)
    latest = Orders(suspended=True, seed=GENERATION).resynchronise(full=True, at_ns=NOON + MAX_AHEAD_NS, now_ns=NOON)
    assert latest == Orders(at_ns=NOON + MAX_AHEAD_NS, full=True)


def test_a_wait_says_until_when():
    assert Wait(Cause.WINDOW, EVENING).text.startswith("waits for the window of resynchronisations: 1970-01-0")
    assert Wait(Cause.SUSPENDED).text == "is suspended"
