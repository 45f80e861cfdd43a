"""Estimates over seeds, which are the independent units of the studies."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import scipy.stats

__all__ = ["LEVEL", "crossing", "geometric_mean", "mean_interval"]

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
