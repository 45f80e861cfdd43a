"""What studies estimate over their seeds: intervals, tests of several claims together, and variances of several."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.libqsturng import psturng
from statsmodels.stats.multitest import multipletests


@pytest.fixture(scope="module")
def estimates(analysis):
    return analysis("estimates")


def test_bits_of_equal_variance_are_interpolated(estimates):
    bits = np.arange(2, 9)
    falling = 4.0 ** -bits.astype(float)
    assert estimates.crossing(bits, falling, 4.0**-5.25) == pytest.approx(5.25)
    assert np.isnan(estimates.crossing(bits, falling, 1.0))  # below it everywhere
    assert np.isnan(estimates.crossing(bits, falling, 1e-9))  # above it everywhere


def test_intervals_of_a_mean_cover_it(estimates):
    """Student t intervals of 5 normal numbers cover 95 %; with 4000 of them a share outside .93 to .97 has p < 1e-7."""
    numbers = np.random.default_rng(0).normal(3, 2, (4000, 5))
    ends = np.array([estimates.mean_interval(row) for row in numbers])
    assert 0.93 < np.mean((ends[:, 1] <= 3) & (ends[:, 2] >= 3)) < 0.97


def test_intervals_of_mean_shares_are_shares_and_cover_the_mean(estimates):
    """Of Beta(2, 38), whose mean is 5 %: plain t intervals go below 0."""
    numbers = np.random.default_rng(0).beta(2, 38, (2000, 5))
    found = np.array([estimates.mean_share(row) for row in numbers])
    assert np.allclose(found[:, 0], numbers.mean(axis=1))
    assert np.all((found[:, 1] > 0) & (found[:, 1] < found[:, 0]) & (found[:, 2] > found[:, 0]) & (found[:, 2] < 1))
    assert 0.9 < np.mean((found[:, 1] <= 0.05) & (found[:, 2] >= 0.05)) < 0.99
    assert min(estimates.mean_interval(row)[1] for row in numbers) < 0
    for share in (0.0, 1.0):
        assert estimates.mean_share([share] * 3) == pytest.approx((share, math.nan, math.nan), nan_ok=True)


# --- several comparisons ----------------------------------------------------------------------------------------------


def test_p_values_are_adjusted_by_holm_and_missing_ones_count_for_nothing(estimates):
    p = [0.04, 0.01, math.nan, 0.02, 0.7, 0.04]
    adjusted = estimates.holm(p)
    assert math.isnan(adjusted.pop(2))
    del p[2]
    np.testing.assert_allclose(adjusted, multipletests(p, method="holm")[1])
    assert estimates.holm([math.nan]) == pytest.approx([math.nan], nan_ok=True)


def test_false_statements_are_as_rare_as_promised(estimates):
    # 300 studies of 8 claims that do not hold: more than 40 with a statement have a probability below 1e-6 at 5 % each.
    assert scipy.stats.binom.sf(40, 300, 0.05) < 1e-6
    found = plain = 0
    for differences in np.random.default_rng(0).standard_normal((300, 8, 6)):
        p = [[estimates.p_greater(sign * values) for values in differences] for sign in (1, -1)]
        found += any(min(estimates.holm(each)) < 0.025 for each in p)
        plain += min(map(min, p)) < 0.025
    assert found <= 40
    assert plain > 40  # without the adjustment


def test_bounds_of_holm_say_what_its_tests_say_and_hold_together(estimates):
    """500 times six means, three of them 0: bounds above a mean more often than 54 times have p < 1e-6 at 5 % each."""
    assert scipy.stats.binom.sf(54, 500, 0.05) < 1e-6
    means, level = np.array([0, 0, 0, 1, 2, 8.0]), 0.05
    false = alone = 0
    for sample in means[:, None] + np.random.default_rng(0).standard_normal((500, 6, 6)):
        bounds = np.array(estimates.holm_bounds(list(sample), level))
        positive = np.array(estimates.holm([estimates.p_greater(own) for own in sample])) < level
        assert np.array_equal(bounds >= 0, positive)
        false += bool((bounds > means).any())
        alone += any(
            estimates.mean_interval(own, 1 - 2 * level)[1] > mean for own, mean in zip(sample, means, strict=True)
        )
    assert false <= 54
    assert alone > 54  # without the adjustment


def test_bounds_of_holm_of_one_mean_and_of_none_left(estimates):
    sample = [1.0, 1.2, 0.9]
    (bound,) = estimates.holm_bounds([sample], 0.025)
    assert bound == pytest.approx(estimates.mean_interval(sample)[1])
    bounds = estimates.holm_bounds([sample, [2.0, 2.1, 2.3], [1.0]], 0.025)
    assert bounds[0] == pytest.approx(
        estimates.mean_interval(sample, 0.975)[1]
    )  # all are positive: half the level each
    assert math.isnan(bounds[2])


def test_range_tests_are_those_of_tukey_with_blocks(estimates):
    block = np.array([[1.0, 2.1, 2.9], [1.4, 2.3, 3.6], [4.0, 5.2, 5.9]])
    p = estimates.range_tests(block)
    residual = block - block.mean(1, keepdims=True) - block.mean(0) + block.mean()
    error = math.sqrt((residual**2).sum() / 4 / 3)
    assert p[0] == 1
    for index in (1, 2):
        assert p[index] == pytest.approx(psturng((block[index].mean() - 2) / error, 3, 4), abs=5e-3)
    assert np.isnan(estimates.range_tests(block[:, :1])).all()
    assert list(estimates.range_tests([[1.0, 2], [2, 3]])) == [1, 0]


# --- several variances ------------------------------------------------------------------------------------------------


def test_moderated_variances(estimates):
    """Equal variances are pooled; unequal ones have about the prior they are drawn from."""
    generator = np.random.default_rng(0)
    df = np.full(2000, 2.0)
    pooled, more = estimates.moderated(np.linspace(1.9, 2.1, 5), df[:5])
    assert np.allclose(pooled, 2.0)
    assert np.allclose(more, 10)
    true = 0.5 * 8 / generator.chisquare(8, 2000)
    found, total = estimates.moderated(true * generator.chisquare(2, 2000) / 2, df)
    # Smyth's example: 8 degrees of freedom and the scale 0.5. 15 % are 5 standard errors of this fixed draw.
    assert total[0] == pytest.approx(10, rel=0.15)
    assert np.corrcoef(np.log(found), np.log(true))[0, 1] > 0.3


def test_the_typical_deviation_is_a_lower_limit(estimates):
    """At 95 %: in 1000 fixed draws more than 90 limits above the truth have p < 1e-6."""
    assert scipy.stats.binom.sf(90, 1000, 0.05) < 1e-6
    df = np.full(20, 2.0)
    variances = 0.04 * np.random.default_rng(0).chisquare(2, (1000, 20)) / 2
    limits = np.array([estimates.typical(each, df) for each in variances])
    assert np.sum(limits > 0.2) <= 90
    assert np.median(limits) > 0.12
    assert estimates.typical(variances[0][:1], df[:1]) == 0
