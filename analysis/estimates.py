"""Estimates over seeds, which are the independent units of the studies, and tests of several of them together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.special
import scipy.stats

__all__ = [
    "LEVEL",
    "crossing",
    "geometric_mean",
    "holm",
    "holm_bounds",
    "mean_interval",
    "mean_share",
    "moderated",
    "p_greater",
    "range_tests",
    "typical",
]

LEVEL = 0.95

Vector = npt.NDArray[np.float64]


def mean_interval(values: npt.ArrayLike, level: float = LEVEL) -> tuple[float, float, float]:
    """Mean of independent numbers, and the ends of its Student t interval; NaN for the ends of less than two."""
    found = np.asarray(values, dtype=np.float64)
    n = len(found)
    mean = float(found.mean()) if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan
    half = float(scipy.stats.t.ppf((1 + level) / 2, n - 1)) * float(found.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def geometric_mean(values: npt.ArrayLike, level: float = LEVEL) -> tuple[float, float, float]:
    """The same of the logarithms of positive numbers, as numbers."""
    mean, low, high = mean_interval(np.log(np.asarray(values, dtype=np.float64)), level)
    return math.exp(mean), math.exp(low), math.exp(high)


def mean_share(values: npt.ArrayLike, level: float = LEVEL) -> tuple[float, float, float]:
    """Mean of independent shares, and the ends of an interval that stays between 0 and 1; NaN where the mean does not.

    Student's t interval of the mean, on the scale of its logit (by the delta method).
    """
    mean, low, high = mean_interval(values, level)
    if not 0 < mean < 1:
        return mean, math.nan, math.nan
    half = (high - low) / 2 / (mean * (1 - mean))
    ends = scipy.special.expit(scipy.special.logit(mean) + np.array([-half, half]))
    return mean, float(ends[0]), float(ends[1])


def crossing(bits: npt.ArrayLike, values: npt.ArrayLike, level: float) -> float:
    """Bits at which a quantity that falls with them comes down to ``level``.

    Its logarithm is interpolated between neighbouring bits. NaN where all values are above the level or all below it,
    so that nothing is extrapolated.

    Args:
        bits: ascending, ``[b]``.
        values: positive, ``[b]``.
        level: positive.
    """
    places, heights = np.asarray(bits, dtype=np.float64), np.log(np.asarray(values, dtype=np.float64) / level)
    above = np.flatnonzero(heights > 0)
    if not len(above) or above[-1] == len(places) - 1:
        return math.nan
    last = above[-1]  # of the bits at which it is above the level, the highest
    share = heights[last] / (heights[last] - heights[last + 1])
    return float(places[last] + share * (places[last + 1] - places[last]))


# --- several comparisons ----------------------------------------------------------------------------------------------


def p_greater(differences: npt.ArrayLike) -> float:
    """One-sided p-value of a mean of at most zero against a greater one; NaN for less than two differences."""
    found = np.asarray(differences, dtype=np.float64)
    if len(found) < 2:
        return math.nan
    if np.ptp(found) == 0:  # no spread to compare them with
        return 0.0 if found[0] > 0 else 1.0
    n = len(found)
    t = found.mean() / (found.std(ddof=1) / math.sqrt(n))
    return float(scipy.special.stdtr(n - 1, -t))


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted by Holm's method; those that are NaN count for nothing and stay."""
    adjusted = np.array(p, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(adjusted))
    order = known[np.argsort(adjusted[known])]
    steps = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(value) for value in adjusted]


def holm_bounds(samples: Sequence[npt.ArrayLike], level: float) -> list[float]:
    """Lower bounds of means that hold together, and are zero or more just where Holm's method finds the mean positive.

    Those found positive have the bound zero, unless all are: then, and for the others, it is that of Student's t with
    the level divided by the number of means that are left (K. Strassburger and F. Bretz, "Compatible simultaneous lower
    confidence bounds for the Holm procedure and other Bonferroni-based closed tests", 2008).

    Args:
        samples: of each mean; with less than two numbers it counts for nothing, and its bound is NaN.
        level: probability that any bound is above its mean, at most.
    """
    found = [np.asarray(sample, dtype=np.float64) for sample in samples]
    positive = [p < level for p in holm([p_greater(sample) for sample in found])]
    tested = sum(len(sample) > 1 for sample in found)
    left = tested - sum(positive) or tested
    bounds = []
    for sample, above in zip(found, positive, strict=True):
        _, bound, _ = mean_interval(sample, 1 - 2 * level / max(left, 1))
        if above:
            bound = 0.0 if left < tested else max(bound, 0.0)
        bounds.append(bound)
    return bounds


def range_tests(block: npt.ArrayLike) -> Vector:
    """P-values of every mean against the lowest, by Tukey's studentized range, which allows for all pairs: ``[k]``.

    Args:
        block: ``[k, seeds]``; the seeds are blocks, and all k share one variance.
    """
    values = np.asarray(block, dtype=np.float64)
    k, seeds = values.shape
    means = values.mean(axis=1)
    if seeds < 2 or k < 2:
        return np.full(k, math.nan)
    residual = values - means[:, None] - values.mean(axis=0) + values.mean()
    df = (k - 1) * (seeds - 1)
    error = math.sqrt(float(np.square(residual).sum()) / df / seeds)
    above = means - means.min()
    if error == 0:
        return np.where(above > 0, 0.0, 1.0)
    return np.asarray(scipy.stats.studentized_range.sf(above / error, k, df), dtype=np.float64)


# --- several variances ------------------------------------------------------------------------------------------------


def _log_variances(variances: Vector, df: Vector) -> Vector:
    """Unbiased estimates of the logarithms of the true variances, from estimates with ``df`` degrees of freedom."""
    # One that is almost 0 by chance would outweigh all others.
    logs = np.log(np.maximum(variances, 1e-5 * np.median(variances)))
    return np.asarray(logs + np.log(df / 2) - scipy.special.digamma(df / 2), dtype=np.float64)


def typical(variances: Vector, df: Vector, level: float = LEVEL) -> float:
    """Lower confidence limit of the geometric mean of the standard deviations; of one alone there is none but 0."""
    k = len(variances)
    if k < 2:
        return 0.0
    logs = _log_variances(variances, df)
    half = scipy.stats.t.ppf(level, k - 1) * logs.std(ddof=1) / math.sqrt(k)
    return math.exp((logs.mean() - half) / 2)


def moderated(variances: Vector, df: Vector) -> tuple[Vector, Vector]:
    """Variances shrunk towards each other, and their degrees of freedom (Smyth 2004, section 6.2).

    The true variances are taken to follow a scaled inverse chi-square distribution, whose mean and degrees of freedom
    are found by the moments of the logarithms; where those spread no more than equal variances do, all are pooled.
    """
    if len(variances) < 2:
        return variances, df
    logs = _log_variances(variances, df)
    spread = float(logs.var(ddof=1) - scipy.special.polygamma(1, df / 2).mean())
    if spread <= 0:
        pooled = float((df * variances).sum() / df.sum())
        return np.full_like(variances, pooled), np.full_like(df, df.sum())
    half = scipy.optimize.brentq(lambda x: float(scipy.special.polygamma(1, x)) - spread, 1e-6, 1e9)
    prior = math.exp(logs.mean() + scipy.special.digamma(half) - math.log(half))
    total = 2 * half + df
    # No more degrees of freedom than all the data have.
    return (2 * half * prior + df * variances) / total, np.minimum(total, df.sum())
