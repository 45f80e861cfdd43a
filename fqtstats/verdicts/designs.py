"""Inputs on which quantizers are judged.

*natural*: heavy-tailed rows, as gradients are. *low ladder* and *high ladder*: every element lies a prescribed fraction
above a grid point, from 2^-20 of a step up to almost a whole one, where few random bits and truncated probabilities
show. On the ladders every row and every column of the input has minimum 0 and maximum B, the largest code, so that the
grid has step 1 whatever group of elements shares it, and all coordinates are exact in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fqtstats.determinism import seeded

__all__ = ["DRAWS", "LADDER_SHAPE", "Design", "ladder", "natural"]

DRAWS = {"natural": 64, "low ladder": 256, "high ladder": 256}
"""The most draws that each design takes."""

LADDER_SHAPE = (64, 256)

_DEEPEST = 20
_FINE_CODES = 8  # fractions below 2^-16 are exact in float32 up to here, with the sum of two coordinates


@dataclass(frozen=True, slots=True)
class Design:
    """An input and how it is judged.

    Attributes:
        name: one of :data:`DRAWS`.
        x: ``[N, ...]``.
        tolerance: of P(up), in steps.
    """

    name: str
    x: torch.Tensor
    tolerance: float

    @property
    def draws(self) -> int:
        return DRAWS[self.name]


def natural(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gaussian rows whose scales span three decades, with a mean of their own: no zero point is an integer."""
    rows = shape[0]
    with seeded(seed):
        x = torch.randn(*shape, dtype=torch.float64)
        means = 0.3 * torch.randn(rows, dtype=torch.float64)
    spread = torch.logspace(0, -3, rows, dtype=torch.float64)
    each = (rows, *[1] * (len(shape) - 1))
    return ((x + means.view(each)) * spread.view(each)).to(dtype)


def ladder(shape: Sequence[int], levels: int, high: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``k + f`` with ``f`` in {0, 2^-5, .., 2^-20} (low) or ``1 - f`` (high), ``k`` in ``0 .. levels - 1``.

    Args:
        shape: ``[R, C]`` or more; at least two rows and two columns.
        levels: B.
        high: which ladder.
    """
    rows, columns = shape[0], 1
    for extent in shape[1:]:
        columns *= extent
    index = torch.arange(rows * columns).view(rows, columns)
    rungs = torch.tensor([0.0] + [2.0**-j for j in range(5, _DEEPEST + 1)], dtype=torch.float64)
    rung = (index * 7 + index // columns) % len(rungs)  # 7 and the number of rungs have no common divisor
    f = rungs[rung]
    k = (index * 5 + index // columns * 3) % levels
    k = torch.where(f < 2.0**-16, k % min(_FINE_CODES, levels), k)
    if high:
        # 1 - 2^-20 needs 20 bits below the point, too.
        f = torch.where(f > 0, 1 - f, f)
        k = torch.where(f > 1 - 2.0**-16, k % min(_FINE_CODES, levels), k)
    x = k.double() + f
    for row, column in _corners(rows, columns):
        x[row, column] = 0.0
        x[row, (column + 1) % columns] = levels
    for column in range(columns):
        x[column % rows, column] = 0.0
        x[(column + 1) % rows, column] = levels
    return x.view(*shape).to(dtype)


def _corners(rows: int, columns: int) -> list[tuple[int, int]]:
    return [(row, row % columns) for row in range(rows)]
