"""Coverage of the variance intervals on real draws, and their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import small
from oracles import moments as oracle

from fqtstats.estimators import intervals
from fqtstats.estimators.intervals import jackknife_interval, sample_variance, t_interval

FALSE_ALARM = 1e-6
DRAWS = 2400


@pytest.fixture(scope="module")
def errors():
    """``[DRAWS, M]``: errors of the whole gradient of a small network under 4-bit PSQ."""
    qat, fqt = small.draws(small.mlp(), small.batch(), small.psq(), range(DRAWS))
    return np.concatenate([fqt[name] - qat[name] for name in qat], axis=1)


def band(runs, low, high):
    """Numbers of successes that probabilities between ``low`` and ``high`` leave with probability 1e-6."""
    return scipy.stats.binom.ppf(FALSE_ALARM / 2, runs, low), scipy.stats.binom.isf(FALSE_ALARM / 2, runs, high)


def covered(blocks, truth, interval):
    ends = np.array([interval(block) for block in blocks])
    return int(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).sum())


@pytest.mark.parametrize("n", [3, 5, 10, 30])
def test_t_interval_covers(errors, n):
    """Coverage .93 to .965 passes but for 1e-6; with 800 to 80 blocks .87 (n = 3) to .76 (n = 30) is found at 50 %."""
    norms = (errors**2).sum(1)
    blocks = norms.reshape(-1, n)
    found = covered(blocks, norms.mean(), t_interval)
    print(f"coverage {found / len(blocks):.3f} of {len(blocks)} blocks of {n}")
    low, high = band(len(blocks), 0.93, 0.965)
    assert low <= found <= high


def test_normal_interval_would_not_cover(errors):
    """Negative control: 1.96 standard errors with three draws cover about .8."""
    norms = (errors**2).sum(1)
    blocks = norms.reshape(-1, 3)

    def normal(a):
        half = 1.96 * a.std(ddof=1) / np.sqrt(len(a))
        return a.mean() - half, a.mean() + half

    assert covered(blocks, norms.mean(), normal) < band(len(blocks), 0.93, 0.965)[0]


@pytest.mark.parametrize("n", [10, 30])
def test_jackknife_covers_the_variance_of_biased_errors(errors, n):
    """A constant error twice as long as the noise: .92 to .98 passes but for 1e-6; the t interval covers nothing."""
    truth = (errors**2).sum(1).mean()
    offset = np.random.default_rng(0).normal(size=errors.shape[1])
    biased = errors + 2 * np.sqrt(truth) * offset / np.linalg.norm(offset)

    def jackknife(e):
        return jackknife_interval((e**2).sum(1), e @ e.T, oracle.variance(e))

    blocks = biased.reshape(-1, n, errors.shape[1])
    found = covered(blocks, truth, jackknife)
    print(f"coverage {found / len(blocks):.3f} of {len(blocks)} blocks of {n}")
    low, high = band(len(blocks), 0.92, 0.98)
    assert low <= found <= high
    assert covered(blocks, truth, lambda e: t_interval((e**2).sum(1))) == 0


def test_jackknife_is_leave_one_out(errors):
    e = errors[:12] + 0.01
    low, high = jackknife_interval((e**2).sum(1), e @ e.T, oracle.variance(e))
    half = scipy.stats.t.ppf(0.975, 11) * oracle.jackknife(e)
    np.testing.assert_allclose((low, high), (oracle.variance(e) - half, oracle.variance(e) + half), rtol=1e-9)


def test_sample_variance(errors):
    e = errors[:9]
    found = sample_variance((e**2).sum(1), float((e.mean(0) ** 2).sum()))
    np.testing.assert_allclose(found, oracle.variance(e), rtol=1e-12)
    assert np.isnan(sample_variance(np.array([1.0]), 1.0))


def test_intervals_contain_the_estimate_and_grow_with_the_level(errors):
    e = errors[:8]
    norms, variance = (e**2).sum(1), oracle.variance(e)
    for interval, center in (
        (lambda level: t_interval(norms, level), norms.mean()),
        (lambda level: jackknife_interval(norms, e @ e.T, variance, level), variance),
    ):
        ends = [interval(level) for level in (0.5, 0.9, 0.95, 0.99)]
        lows, highs = zip(*ends, strict=True)
        assert all(0 <= low <= center <= high for low, high in ends)
        assert list(lows) == sorted(lows, reverse=True)
        assert list(highs) == sorted(highs)


def test_edges():
    assert t_interval(np.zeros(4)) == (0.0, 0.0)
    assert t_interval(np.full(4, 2.0)) == (2.0, 2.0)
    assert t_interval(np.array([1.0, 30.0]))[0] == 0.0
    assert np.isnan(t_interval(np.array([1.0]))).all()
    assert np.isnan(jackknife_interval(np.ones(2), np.ones((2, 2)), 1.0)).all()
    assert jackknife_interval(np.zeros(4), np.zeros((4, 4)), 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("freedom", [1, 10])
def test_ratio_of_means_of_squares(freedom):
    """2000 runs of 24 draws, 7 % misses of the 95 % interval at most; 200 or more have a probability below 1e-6.

    A ratio of 3 is found in nearly all.
    """
    rng = np.random.default_rng(0)
    missed = found = 0
    for _ in range(2000):
        y = rng.uniform(1, 2, 24)
        ratio = intervals.mean_ratio(y * rng.chisquare(freedom, 24) / freedom, y)
        missed += not ratio.low <= 1 <= ratio.high
        found += not ratio.low <= 3 <= ratio.high
        assert (ratio.p_value < 0.05) == (not ratio.low <= 1 <= ratio.high)
    assert missed < 200
    assert found > 1800


def test_ratio_of_means_where_there_is_none():
    ones, zeros = np.ones(8), np.zeros(8)
    assert math.isnan(intervals.mean_ratio(zeros, zeros).value)
    assert intervals.mean_ratio(zeros, ones).value == 0
    assert math.isnan(intervals.mean_ratio(zeros, ones).low)
    assert intervals.mean_ratio(zeros, ones).p_value == 0
    assert intervals.mean_ratio(zeros, ones + np.arange(8) / 10, extra=0.1).p_value < 1e-6
    assert intervals.mean_ratio(zeros, ones, extra=1e3).p_value > 0.5  # nothing but rare outcomes that did not come
    assert intervals.mean_ratio(zeros, ones, slack=1.0).p_value == 1
    assert intervals.mean_ratio(ones, ones).p_value == 1
    assert intervals.mean_ratio(1.02 * ones, ones).p_value == 0
    assert intervals.mean_ratio(1.02 * ones, ones, slack=0.02).p_value == 1
