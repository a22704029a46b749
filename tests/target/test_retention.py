"""Which recovery points stay."""

from hypothesis import given
from hypothesis import strategies as st

from hvfuse.target.retention import RetentionPolicy, retain

SECOND = 10**9
HOUR = 3600 * SECOND
DAY = 24 * HOUR
NOW = 1_000 * DAY + HOUR // 2

POLICIES = st.builds(
    RetentionPolicy,
    keep_all_seconds=st.sampled_from([0, 60, 3600, 7200]),
    hourly=st.integers(0, 30),
    daily=st.integers(0, 5),
)
TIMES = st.lists(st.integers(NOW - 4 * DAY, NOW + HOUR), min_size=1, max_size=60)


def test_no_points_is_no_points():
    assert retain([], RetentionPolicy(), NOW) == frozenset()


def test_without_any_rule_only_the_newest_stays():
    policy = RetentionPolicy(keep_all_seconds=0, hourly=0)
    assert retain([(1, NOW), (2, NOW), (3, NOW - DAY)], policy, NOW) == {3}


def test_everything_younger_than_the_window_stays():
    points = [(seq, NOW - (10 - seq) * 600 * SECOND) for seq in range(1, 11)]
    assert retain(points, RetentionPolicy(keep_all_seconds=3600, hourly=0), NOW) == {5, 6, 7, 8, 9, 10}


def test_each_of_the_last_hours_keeps_its_newest_point():
    points = [(seq, NOW - 5 * HOUR + seq * HOUR // 4) for seq in range(20)]
    assert retain(points, RetentionPolicy(keep_all_seconds=0, hourly=2), NOW) == {13, 17, 19}


def test_each_of_the_last_days_keeps_its_newest_point():
    points = [(seq, NOW - 5 * DAY + seq * DAY // 4) for seq in range(20)]
    assert retain(points, RetentionPolicy(keep_all_seconds=0, hourly=0, daily=2), NOW) == {15, 19}


def test_a_day_of_cycles_every_30_seconds_leaves_an_hour_of_them_and_24_hours():
    points = [(seq, NOW - DAY + seq * 30 * SECOND) for seq in range(2881)]
    assert 120 + 23 <= len(retain(points, RetentionPolicy(), NOW)) <= 121 + 25


@given(times=TIMES, policy=POLICIES)
def test_the_newest_stays_and_nothing_is_made_up(times, policy):
    points = list(enumerate(times, 1))
    kept = retain(points, policy, NOW)
    assert len(times) in kept
    assert kept <= set(range(1, len(times) + 1))


@given(times=TIMES, policy=POLICIES, later=st.integers(0, 3 * DAY))
def test_what_was_let_go_would_not_be_wanted_later_either(times, policy, later):
    points = list(enumerate(sorted(times), 1))
    kept = retain(points, policy, NOW)
    left = [point for point in points if point[0] in kept]
    assert retain(left, policy, NOW) == kept
    assert retain(points, policy, NOW + later) == retain(left, policy, NOW + later)


@given(times=TIMES, policy=POLICIES)
def test_a_more_generous_policy_keeps_no_less(times, policy):
    points = list(enumerate(times, 1))
    more = RetentionPolicy(
        keep_all_seconds=policy.keep_all_seconds + 60, hourly=policy.hourly + 1, daily=policy.daily + 1
    )
    assert retain(points, policy, NOW) <= retain(points, more, NOW)
