"""Is a gradient biased? Three families of tests on the sketched errors of n draws.

Shape legend: n draws; a sketch matrix ``S`` is ``[n, W]``; a Gram matrix ``G`` is ``[n, n]``, ``G_ik = <e_i, e_k>``.

No grid is known for a whole network's gradient, so the tests are studentized or calibrated by sign flips. In 2000
simulated null runs of 16 and 32 draws they rejected at level .01 with rates .0020 (directed t), .0085 (cross-fit),
.0105 (sign flips) and .0040 (combined), and at level .001 with 0, .0015, 0 and .0005; ``tests/test_bias.py`` repeats
this. Biases far below the noise of a single draw are found at the quantizer, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from fqtstats.random import stream

__all__ = ["BiasTest", "Directions", "bias_test", "cross_fit_p", "directed_p", "sign_flip_p"]

Array = npt.NDArray[np.float64]

FLIPS = 9999

LEAST_DRAWS = 8
"""Below this there are no t tests. Errors of rounding lie on a lattice, and two draws often coincide along a direction,
which shows a mean without a variance; eight draws practically never all do."""

_BLOCKS = 256

_SHARED = 64
"""Weight of the group's mean variance in each direction's own, in units of 1 / n: see :func:`directed_p`."""


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


@dataclass(frozen=True, slots=True)
class Directions:
    """Components of the errors along one kind of directions that were fixed beforehand.

    Attributes:
        values: ``[n, m]``.
        tolerance: means up to this are the rounding of the arithmetic, ``[m]``.
        alike: whether the m directions are of one kind (rows, columns), so that their variances can be compared.
    """

    values: Array
    tolerance: Array
    alike: bool


def bias_test(directions: Sequence[Directions], gram: Array, tolerance: float = 0.0, seed: int = 0) -> BiasTest:
    """All three families.

    Args:
        directions: components of the errors along fixed directions.
        gram: ``[n, n]``, inner products of the (sketched) errors.
        tolerance: a squared bias up to this is the rounding of the arithmetic.
        seed: seed of the sign flips.
    """
    gram = gram - tolerance
    if len(gram) < LEAST_DRAWS:
        return BiasTest(1.0, 1.0, sign_flip_p(gram, seed))
    return BiasTest(directed_p(directions), cross_fit_p(gram), sign_flip_p(gram, seed))


def directed_p(directions: Sequence[Directions]) -> float:
    """Two-sided t tests of mean zero for each direction, Bonferroni over those that vary or are not zero.

    A direction that few rounding decisions enter may go all n draws without its rare outcome, and then shows a mean
    without a variance (a decision with probability 1/n of going up, in one draw set out of e). Among directions of one
    kind each therefore gets ``64 / n`` of the kind's mean variance at least. Single elements are no directions at all.
    """
    smallest, tests = 1.0, 0
    for kind in directions:
        n, m = kind.values.shape
        if n < 2 or m == 0:
            continue
        moving = np.any(np.abs(kind.values) > kind.tolerance, axis=0)
        tests += int(moving.sum())
        excess = np.maximum(np.abs(kind.values.mean(axis=0)) - kind.tolerance, 0.0)
        variance = kind.values.var(axis=0, ddof=1)
        if kind.alike:
            variance = np.maximum(variance, _SHARED / n * variance.mean())
        moving &= excess > 0
        if moving.any():
            # Equal nonzero errors in all draws are a certain bias: t is infinite and p zero.
            with np.errstate(divide="ignore"):
                t = excess[moving] / np.sqrt(variance[moving] / n)
            smallest = min(smallest, float(2 * stats.t.sf(t, n - 1).min()))
    return min(1.0, max(tests, 1) * smallest)


def cross_fit_p(gram: Array) -> float:
    """One-sided t test of ``<e_i, mean of the other half>``, even against odd draws and back, times two."""
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

    At least ``1 / (flips + 1)``. Flipping all signs changes nothing, so below about 15 draws fewer than ``flips``
    distinct values exist and the test is coarser, never anti-conservative. Many draws are summed in 256 blocks of
    neighbours, which are flipped whole.
    """
    if gram.shape[0] > _BLOCKS:
        starts = np.linspace(0, gram.shape[0], _BLOCKS + 1).astype(int)[:-1]
        gram = np.add.reduceat(np.add.reduceat(gram, starts, axis=0), starts, axis=1)
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
