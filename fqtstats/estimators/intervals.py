"""Confidence intervals of a total variance from n draws.

Intervals come from the draws' own squared errors ``A_i = ||e_i||^2``; a bootstrap over draws covers far too little here
(0 to 70 % instead of 95 %).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["MeanRatio", "jackknife_interval", "mean_ratio", "sample_variance", "t_interval"]

Array = npt.NDArray[np.float64]


def sample_variance(norms: Array, mean_norm_sq: float) -> float:
    """Sum over elements of the sample variance, ``(sum_i A_i - n ||mean e||^2) / (n - 1)``; NaN below two draws.

    Args:
        norms: ``A_i``, ``[n]``.
        mean_norm_sq: ``||sum_i e_i||^2 / n^2``.
    """
    n = len(norms)
    return max(0.0, float((norms.sum() - n * mean_norm_sq) / (n - 1))) if n > 1 else float("nan")


def t_interval(norms: Array, level: float = 0.95) -> tuple[float, float]:
    """Student t interval of ``E A_i``, which is the variance where there is no bias; cut off at zero.

    Coverage at n = 3 to 30 was .935 to .958 in simulation.
    """
    return _around(
        float(norms.mean()), norms.std(ddof=1) / np.sqrt(len(norms)) if len(norms) > 1 else np.nan, norms, level
    )


def jackknife_interval(norms: Array, gram: Array, variance: float, level: float = 0.95) -> tuple[float, float]:
    """Jackknife interval around the sample variance, for errors that may have a mean; NaN below three draws.

    Args:
        norms: ``A_i``, ``[n]``.
        gram: ``[n, n]`` inner products of the (sketched) errors; only off-diagonal entries are used.
        variance: the exact sample variance; from sketches it would be off by per cents of the squared bias.
        level: coverage.
    """
    n = len(norms)
    if n < 3:
        return float("nan"), float("nan")
    off = gram - np.diag(np.diag(gram))
    # ||sum e||^2 = sum_i A_i + sum_{i != k} G_ik, and the same with one draw left out.
    total_norm, total_off = norms.sum(), off.sum()

    norms_left, off_left = total_norm - norms, total_off - 2 * off.sum(axis=1)
    left_out = (norms_left - (norms_left + off_left) / (n - 1)) / (n - 2)
    deviation = np.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())
    return _around(variance, deviation, norms, level)


@dataclass(frozen=True, slots=True)
class MeanRatio:
    """The ratio of two means; NaN where it is not defined.

    Attributes:
        value: the estimate.
        low, high: ends of its interval; NaN for a ratio of zero.
        p_value: two-sided p-value of a ratio of one.
    """

    value: float
    low: float
    high: float
    p_value: float


def mean_ratio(x: Array, y: Array, level: float = 0.95, *, extra: float = 0.0, slack: float = 0.0) -> MeanRatio:
    """``mean x / mean y`` of paired squared norms, with Student's t for its cube root.

    The deviation of the ratio ``r`` is that of ``x - r y``, relative to ``mean x``. Means of squares are close to gamma
    variables, whose cube roots are close to normal (Wilson and Hilferty, 1931). With Gaussian errors of one element,
    the worst case, a p-value below 1e-6 came up in 8e-7 (16 draws) to 1e-5 (64) of simulated runs, and from ten
    elements on at its nominal rate; t tests of ``x - y`` have 3e-3 there, because a mean that is low by chance comes
    with a deviation that is low, too.

    Args:
        x, y: ``[n]``, not negative.
        level: coverage of the interval.
        extra: relative variance of ``x`` that draws may not have shown, added to theirs.
        slack: part of the root of ``mean x`` that may be something else than what ``y`` is the mean of, relative to the
            root of ``mean y``; for the p-value only.
    """
    n, top, bottom = len(x), float(x.mean()), float(y.mean())
    ratio = top / bottom if bottom > 0 else math.nan
    if n < 2 or math.isnan(ratio):
        return MeanRatio(ratio, math.nan, math.nan, math.nan)
    # Where x is zero, the limit of an x that is in proportion to y.
    spread = (x - ratio * y).var(ddof=1) / top**2 if top > 0 else y.var(ddof=1) / bottom**2
    deviation = math.sqrt((spread + extra) / n) / 3  # of the root, relative to it
    low = high = math.nan
    if top > 0:
        reach = float(stats.t.ppf((1 + level) / 2, n - 1)) * deviation
        low, high = ratio / (1 + reach) ** 3, ratio / (1 - reach) ** 3 if reach < 1 else math.inf
    nearest = max(abs(math.sqrt(ratio) - 1) - slack, 0.0)
    closest = (1 + math.copysign(nearest, ratio - 1)) ** 2
    distance = abs(closest ** (1 / 3) - 1)
    if distance == 0:
        return MeanRatio(ratio, low, high, 1.0)
    p = 2 * float(stats.t.sf(distance / deviation, n - 1)) if deviation > 0 else 0.0
    return MeanRatio(ratio, low, high, p)


def _around(center: float, deviation: float, norms: Array, level: float) -> tuple[float, float]:
    half = stats.t.ppf((1 + level) / 2, len(norms) - 1) * deviation if len(norms) > 1 else float("nan")
    return max(0.0, center - half) if not math.isnan(half) else float("nan"), float(center + half)
