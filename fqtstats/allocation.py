"""Dividing bits among quantizers: exact, by dynamic programming over the total number of bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["Allocation"]


class Allocation:
    """The least sum of variances for every total number of bits.

    Nothing is assumed of how a variance falls with the bits. (Where all fall convexly, the result is that of giving one
    bit after the other to the quantizer that gains most from it.)

    Args:
        curves: for every quantizer, the variance at each number of bits that it may have; at least one each.

    Attributes:
        least: by total number of bits, the least sum of variances; infinite where no choice has that total.
    """

    def __init__(self, curves: Sequence[Mapping[int, float]]) -> None:
        most = sum(max(curve) for curve in curves)
        self.least = np.full(most + 1, np.inf)
        self.least[0] = 0.0
        self._last = []  # for every quantizer and total up to it, its bits in the best choice
        for curve in curves:
            least, last = np.full(most + 1, np.inf), np.zeros(most + 1, dtype=np.int64)
            for bits, variance in curve.items():
                found = self.least[: most + 1 - bits] + variance
                better = found < least[bits:]
                least[bits:][better], last[bits:][better] = found[better], bits
            self.least = least
            self._last.append(last)

    def within_bits(self, total: int) -> tuple[int, ...] | None:
        """The choice of the least variance with at most ``total`` bits, and of these the one with fewest; or None."""
        least = self.least[: max(0, total + 1)]
        return self._choice(int(least.argmin())) if np.isfinite(least).any() else None

    def within_variance(self, limit: float) -> tuple[int, ...] | None:
        """The choice of the fewest bits with at most this variance, and of these the least variance; or None."""
        found = np.flatnonzero(self.least <= limit)
        return self._choice(int(found[0])) if len(found) else None

    def _choice(self, total: int) -> tuple[int, ...]:
        chosen = []
        for last in reversed(self._last):
            chosen.append(int(last[total]))
            total -= chosen[-1]
        return tuple(reversed(chosen))
