"""Which recovery points stay."""

from dataclasses import replace

from hypothesis import given, settings
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
YEAR = 365 * DAY
GAPS = st.lists(st.integers(0, HOUR), min_size=1, max_size=60)
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


@given(gaps=GAPS, policy=POLICIES, later=st.integers(0, 20 * HOUR))
def test_what_was_let_go_would_not_be_wanted_later_either(gaps, policy, later):
    points = [(-n, NOW - sum(gaps[: n + 1])) for n in range(len(gaps))]
    kept = retain(points, policy, NOW)
    left = [point for point in points if point[0] in kept]
    assert retain(left, policy, NOW) == kept
    assert retain(points, policy, NOW + later) == retain(left, policy, NOW + later)


@given(gaps=GAPS, policy=POLICIES)
def test_a_more_generous_policy_keeps_no_less(gaps, policy):
    points = [(-n, NOW - sum(gaps[: n + 1])) for n in range(len(gaps))]
    more = RetentionPolicy(
        keep_all_seconds=policy.keep_all_seconds + 60, hourly=policy.hourly + 1, daily=policy.daily + 1
    )
    assert retain(points, policy, NOW) <= retain(points, more, NOW)


def regular(count, *, end, first_seq=1):
    """Points every 30 seconds, the last at `end`."""
    return [(first_seq + n, end - (count - 1 - n) * 30 * SECOND) for n in range(count)]


def replicated(points, cycles, now, policy):
    """What is left of points after more cycles, each followed by thinning; and the time it is then."""
    for _ in range(cycles):
        now += 30 * SECOND
        points = [*points, (points[-1][0] + 1, now)]
        kept = retain(points, policy, now)
        points = [point for point in points if point[0] in kept]
    return points, now


def test_one_cycle_with_the_clock_in_the_far_future_lets_go_of_no_hour():
    policy = RetentionPolicy()
    points = regular(2880, end=NOW)
    before = retain(points, policy, NOW)
    jumped = [*points, (2881, NOW + 12 * YEAR)]
    kept = retain(jumped, policy, NOW + 12 * YEAR)
    assert len(kept) >= len(before) - 4
    assert min(kept) <= min(before) + 120


def test_a_point_stamped_in_the_future_goes_like_its_neighbours():
    policy = RetentionPolicy(hourly=2)
    points = [*regular(10, end=NOW), (11, NOW + 12 * YEAR)]
    points, _ = replicated(points, 120 * 5, NOW, policy)
    assert min(seq for seq, _ in points) > 11
    assert len(points) <= 121 + 3


def test_a_clock_that_is_set_back_for_good_leaves_the_hours_before_it():
    policy = RetentionPolicy()
    points = regular(2880, end=NOW)
    kept = retain(points, policy, NOW)
    points, now = replicated([p for p in points if p[0] in kept], 240, NOW - YEAR, policy)
    assert len([seq for seq, _ in points if seq <= 2880]) >= 18
    points, _ = replicated(points, 120 * 27, now, policy)
    assert min(seq for seq, _ in points) > 2880


def test_a_clock_that_is_set_forward_for_good_leaves_the_hours_before_it_for_a_day():
    policy = RetentionPolicy()
    points = regular(2880, end=NOW)
    kept = retain(points, policy, NOW)
    points, now = replicated([p for p in points if p[0] in kept], 240, NOW + YEAR, policy)
    assert len([seq for seq, _ in points if seq <= 2880]) >= 18
    points, _ = replicated(points, 120 * 27, now, policy)
    assert min(seq for seq, _ in points) > 2880


def test_points_made_by_hand_once_a_week_do_not_pile_up():
    points = [(week, NOW + week * 7 * DAY) for week in range(300)]
    assert len(retain(points, RetentionPolicy(), points[-1][1])) <= 60 + 25


def test_days_apart_by_more_than_24_hours_are_still_days():
    points = [(day, NOW + day * DAY + day * SECOND) for day in range(10)]
    assert retain(points, RetentionPolicy(daily=5), points[-1][1]) == {4, 5, 6, 7, 8, 9}


JUMPS = st.one_of(st.just(0), st.integers(-3 * DAY, 3 * DAY), st.integers(-9 * YEAR, 9 * YEAR))
SHORT = st.builds(
    RetentionPolicy,
    keep_all_seconds=st.sampled_from([0, 600, 3600]),
    hourly=st.integers(0, 6),
    daily=st.integers(0, 2),
)


@settings(max_examples=60, deadline=None)
@given(
    phases=st.lists(st.tuples(st.integers(1, 300), JUMPS), min_size=1, max_size=5),
    policy=SHORT,
    period=st.sampled_from([120 * SECOND, 600 * SECOND]),
)
def test_whatever_the_clock_does_the_newest_stays_and_nothing_does_for_ever(phases, policy, period):
    """Cycles go on while the clock jumps; then it is right for as long as the policy looks back."""
    window = policy.keep_all_seconds * SECOND
    looks_back = max(window, (policy.hourly + 1) * HOUR, (policy.daily + 1) * DAY if policy.daily else 0)
    calm = looks_back // period + 2
    most = 2 * (window // period + policy.hourly + policy.daily + 3) + policy.keep_all_seconds // 60
    now, points, before_calm = NOW, [], 0
    for cycles, jump in [*phases, (calm, 0)]:
        now, before_calm = now + jump, len(points) and points[-1][0]
        for _ in range(cycles):
            now += period
            points.append((points[-1][0] + 1 if points else 1, now))
            kept = retain(points, policy, now)
            assert points[-1][0] in kept
            points = [point for point in points if point[0] in kept]
            assert len(points) <= most
    assert points[0][0] > before_calm


@given(times=TIMES, policy=POLICIES, hourly=st.integers(0, 3), window=st.integers(0, 60))
def test_more_hours_and_a_longer_window_keep_no_less_whatever_the_clock_did(times, policy, hourly, window):
    points = list(enumerate(times, 1))
    more = replace(policy, hourly=policy.hourly + hourly, keep_all_seconds=policy.keep_all_seconds + window)
    assert retain(points, policy, NOW) <= retain(points, more, NOW)


@given(gaps=GAPS, policy=POLICIES, ahead=st.integers(1, 99 * YEAR))
def test_a_point_from_the_future_costs_no_other_point(gaps, policy, ahead):
    points = [(-n, NOW - sum(gaps[: n + 1])) for n in range(len(gaps))]
    calm = retain([*points, (2, NOW)], policy, NOW)
    wild = retain([*points, (1, NOW + ahead), (2, NOW)], policy, NOW)
    assert calm <= wild
