"""Confidence intervals of a total variance from n draws.

Intervals come from the draws' own squared errors ``A_i = ||e_i||^2``; a bootstrap over draws covers far too little here
(0 to 70 % instead of 95 %).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["jackknife_interval", "sample_variance", "t_interval"]

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


def _around(center: float, deviation: float, norms: Array, level: float) -> tuple[float, float]:
    half = stats.t.ppf((1 + level) / 2, len(norms) - 1) * deviation if len(norms) > 1 else float("nan")
    return max(0.0, center - half) if not math.isnan(half) else float("nan"), float(center + half)
