"""Intervals hold what they are about as often as they say, and pairing narrows them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i.evaluate import intervals


def test_a_mean_of_many_has_the_interval_of_the_normal_law():
    values = np.random.default_rng(0).normal(3, 2, 4000)
    found = intervals.mean(values)
    reach = 1.96 * values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.interval == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.008)
    assert found.n == 4000
    assert intervals.mean(values) == found


def test_nineteen_of_twenty_hold_the_truth():
    held = 0
    for trial in range(200):
        low, high = intervals.share(np.random.default_rng(trial).random(60) < 0.3).interval
        held += low <= 0.3 <= high
    assert 0.90 <= held / 200 <= 0.98


def test_a_pooled_share_draws_whole_prompts():
    """Three right of three, none of three: all that a prompt has goes together."""
    pooled = intervals.share([3, 0] * 50, [3, 3] * 50)
    assert pooled.value == 0.5
    single = intervals.share([1, 0] * 150)
    assert np.ptp(pooled.interval) > 1.5 * np.ptp(single.interval)
    assert intervals.share([1, 2, 0], [1, 4, 0]).value == 3 / 5
    assert intervals.share([1, 2, 0], [1, 4, 0]).n == 2


@pytest.mark.parametrize("n", [1, 3, 20, 500])
def test_rows_that_agree_are_not_certain(n):
    """Clopper and Pearson's exact interval of n in n: the probability of that is 2.5 % at its lower end."""
    low, high = intervals.share([1] * n).interval
    assert high == 1
    assert low**n == pytest.approx(0.025)
    assert intervals.share([0] * n).interval == pytest.approx((0, 1 - low))
    assert intervals.share([2] * n, [4] * n).interval == pytest.approx((low / 2, low / 2 + 1 - low))


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_an_interval_lies_within_0_and_1_about_its_share(right):
    found = intervals.share(right)
    low, high = found.interval
    assert 0 <= low <= found.value <= high <= 1
    assert intervals.share([not each for each in right]).interval == pytest.approx((1 - high, 1 - low))


def test_pairs_fall_together():
    """Prompts differ much, the two models little, and always the same way."""
    rng = np.random.default_rng(0)
    hardness = rng.normal(0, 10, 300)
    ours, theirs = hardness + rng.normal(0.5, 1, 300), hardness + rng.normal(0, 1, 300)
    found = intervals.difference(ours, theirs)
    assert found.value == pytest.approx(ours.mean() - theirs.mean())
    assert found.interval[0] > 0
    assert np.ptp(found.interval) < np.ptp(intervals.mean(ours).interval) / 4
    back = intervals.difference(theirs, ours)
    assert back.value == pytest.approx(-found.value)
    assert back.interval == pytest.approx((-found.interval[1], -found.interval[0]), abs=0.01)


def test_a_difference_of_shares_is_that_of_the_pooled_ones():
    found = intervals.difference([1, 2, 0], [0, 1, 5], of=[2, 2, 0], their_of=[2, 2, 9])
    assert found.value == 3 / 4 - 1 / 4  # the last prompt asks nothing of ours
    assert found.n == 2
    assert intervals.difference([1, 1], [1, 1]).interval == (0, 0)
    with pytest.raises(ValueError, match="found 2 rows and 3"):
        intervals.difference([1, 1], [1, 1, 1])


def test_a_statistic_of_sets_keeps_its_interval_about_itself():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 1))
    found = intervals.of_sets(lambda drawn: float(len(np.unique(drawn))), rows)  # a draw has 63 % of the rows
    assert found.value == 200
    assert found.interval[0] < 200 < found.interval[1]
    mean = intervals.of_sets(lambda drawn: float(drawn.mean()), rows, resamples=1000)
    assert mean.interval == pytest.approx(intervals.mean(rows[:, 0]).interval, abs=0.02)


def test_nothing_and_little_are_told_apart():
    with pytest.raises(ValueError, match="at least one row"):
        intervals.mean([])
    with pytest.raises(ValueError, match="at least one row"):
        intervals.share([0, 0], [0, 0])
    assert intervals.mean([2.0]).interval == (-np.inf, np.inf)


def test_names_in_a_table():
    assert intervals.Estimate(0.5, (0.4, 0.6), 9).named("x") == {"x": 0.5, "x_interval": (0.4, 0.6), "x_n": 9}
