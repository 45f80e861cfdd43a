"""Is a gradient biased? Three families of tests on the sketched errors of n draws.

Shape legend: n draws; a sketch matrix ``S`` is ``[n, W]``; a Gram matrix ``G`` is ``[n, n]``, ``G_ik = <e_i, e_k>``.

No grid is known for a whole network's gradient, so the tests are studentized or calibrated by sign flips. Their null
rejection rates at level .001, measured on quantized networks, are .0005 to .0013 (directed t), .0005 to .001
(cross-fit) and .0003 to .001 (sign flips). Biases far below the noise of a single draw are found at the quantizer, not
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from fqtstats.random import stream

__all__ = ["BiasTest", "bias_test", "cross_fit_p", "directed_p", "sign_flip_p"]

Array = npt.NDArray[np.float64]

FLIPS = 9999


@dataclass(frozen=True, slots=True)
class BiasTest:
    """p-values of "the gradient is unbiased"; each family is corrected for its own multiplicity.

    Attributes:
        directed: t test on fixed directions, Bonferroni over them.
        cross_fit: t test of one half of the draws on the mean error of the other half, both ways.
        sign_flip: U statistic of the squared bias against random sign flips.
    """

    directed: float
    cross_fit: float
    sign_flip: float

    @property
    def p_value(self) -> float:
        """``min(1, 3 x the smallest)``."""
        return min(1.0, 3 * min(self.directed, self.cross_fit, self.sign_flip))


def bias_test(directions: Array, gram: Array, seed: int = 0) -> BiasTest:
    """All three families.

    Args:
        directions: ``[n, m]``, the errors' components along m directions that were fixed beforehand.
        gram: ``[n, n]``, inner products of the (sketched) errors.
        seed: seed of the sign flips.
    """
    return BiasTest(directed_p(directions), cross_fit_p(gram), sign_flip_p(gram, seed))


def directed_p(directions: Array) -> float:
    """Two-sided t tests of mean zero for each column of ``[n, m]``, Bonferroni over the columns that vary or are not zero."""
    n = directions.shape[0]
    moving = directions[:, np.any(directions != 0, axis=0)]
    if n < 2 or moving.shape[1] == 0:
        return 1.0
    mean, deviation = moving.mean(axis=0), moving.std(axis=0, ddof=1)
    # Equal nonzero errors in all draws are a certain bias: t is infinite and p zero.
    with np.errstate(divide="ignore"):
        t = np.abs(mean) / (deviation / np.sqrt(n))
    return float(min(1.0, moving.shape[1] * 2 * stats.t.sf(t, n - 1).min()))


def cross_fit_p(gram: Array) -> float:
    """One-sided t test of ``<e_i, mean of the other half>`` for even against odd draws and back, Bonferroni over the two."""
    n = gram.shape[0]
    halves = (np.arange(0, n, 2), np.arange(1, n, 2))
    smallest = 1.0
    for tested, direction in (halves, halves[::-1]):
        if len(tested) < 2 or len(direction) < 1:
            continue
        components = gram[np.ix_(tested, direction)].mean(axis=1)
        deviation = components.std(ddof=1) / np.sqrt(len(tested))
        if components.mean() <= 0:
            continue
        t = components.mean() / deviation if deviation > 0 else np.inf
        smallest = min(smallest, float(stats.t.sf(t, len(tested) - 1)))
    return min(1.0, 2 * smallest)


def sign_flip_p(gram: Array, seed: int = 0, flips: int = FLIPS) -> float:
    """One-sided p-value of ``U = sum_{i != k} G_ik`` against ``sum_{i != k} s_i s_k G_ik`` for random signs ``s``.

    At least ``1 / (flips + 1)``. Flipping all signs changes nothing, so below about 15 draws fewer than ``flips`` distinct
    values exist and the test is coarser, never anti-conservative.
    """
    n = gram.shape[0]
    if n < 2:
        return 1.0
    off = gram - np.diag(np.diag(gram))
    observed = off.sum()
    bits = stream(seed=seed, site="sign_flip").bits((flips, n), 1).numpy()
    signs = bits.astype(np.float64) * 2 - 1
    flipped = np.einsum("fi,fi->f", signs @ off, signs)
    # Ties (among them the identity and its mirror image) count as extreme, up to rounding.
    slack = 1e-12 * np.abs(off).sum()
    return float((1 + np.count_nonzero(flipped >= observed - slack)) / (flips + 1))


def sums_of_directions(sketches: Array, slices: Sequence[slice]) -> Array:
    """``[n, 3]``: components along the whole gradient's ``g``, ``sign g`` and ``1``, from those of its parameters."""
    return np.sum([sketches[:, s] for s in slices], axis=0)
