"""What a stochastic quantizer decides for each element, and what an unbiased one would: the input of the battery.

Shape legend: P elements, viewed as a matrix ``[R, C]`` of rows (samples) and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fqtstats.quantizers.base import UniformQuantizer
from fqtstats.random import Stream
from fqtstats.verdicts.expectation import Law
from fqtstats.verdicts.probe import StreamFunction, call

__all__ = ["Decisions", "of_grid", "of_law"]

_ROUNDED = 2.0**-24  # a probability in float32


@dataclass(frozen=True, slots=True)
class Decisions:
    """Elements that go up or stay down, by a random decision each.

    Attributes:
        x: the input in steps from its grid's origin, ``[R, C]`` float64; a direction in which errors may lie.
        p: P(up) of an unbiased quantizer, ``[R, C]`` float64 in [0, 1].
        tolerance: by how much P(up) may differ from ``p`` through the rounding of the arithmetic, ``[R, C]``.
        coordinates: of ``x`` on the grid, from its code 0 on, ``[R, C]``.
        ups: of a stream, which elements went up, ``[R, C]`` bool; and how many went neither up nor down.
    """

    x: torch.Tensor
    p: torch.Tensor
    tolerance: torch.Tensor
    coordinates: torch.Tensor
    ups: Callable[[Stream], tuple[torch.Tensor, int]]

    @property
    def variance(self) -> torch.Tensor:
        """``p (1 - p)``, steps squared."""
        return self.p * (1 - self.p)


def of_grid(q: UniformQuantizer, x: torch.Tensor, tolerance: float) -> Decisions:
    """The codes of a quantizer against the coordinates that its grid gives ``x`` (after its transform, if any).

    Args:
        q: the quantizer.
        x: ``[N, ...]``.
        tolerance: in steps.
    """
    coordinates, frame = q._frame(x)
    rows = frame.view[0]
    y = coordinates.double().view(rows, -1)
    low = y.floor()
    zero = 0.0 if frame.grid.zero is None else frame.grid.zero.double()
    lowest = (low.view(frame.view) + zero).view(rows, -1)
    p = y - low

    def ups(s: Stream) -> tuple[torch.Tensor, int]:
        step = q.encode(x, s).codes().view(rows, -1) - lowest
        up = step == 1
        return up, int(((step != 0) & ~up).sum())

    return Decisions(y, p, torch.full_like(p, tolerance), lowest + p, ups)


def of_law(f: StreamFunction, x: torch.Tensor, law: Law) -> Decisions:
    """The two values of every element and their probabilities, as probing has found them.

    Whether their mean is ``x`` is not asked here: the law says it exactly, and the rounding of the arithmetic in it is
    no matter of chance. Elements with a single value have ``p = 0`` and never go up.

    Args:
        f: the callable.
        x: ``[N, ...]``.
        law: of ``f`` on ``x``.
    """
    rows = x.shape[0]
    low, high = law.low.to(x.dtype), law.high.to(x.dtype)  # exact: they are outputs
    gap = law.high - law.low
    moves = gap > 0
    p = law.up.view(rows, -1)

    def ups(s: Stream) -> tuple[torch.Tensor, int]:
        out = call(f, x, s)
        up = out == high
        outside = int((~up & (out != low)).sum())
        return (up & moves).view(rows, -1), outside

    along = torch.where(moves, x / torch.where(moves, gap, 1.0), 0.0)
    return Decisions(along.view(rows, -1), p, torch.full_like(p, _ROUNDED), p, ups)
