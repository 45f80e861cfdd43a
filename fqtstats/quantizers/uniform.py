"""Uniform gradient quantizers with one grid per tensor (PTQ), sample (PSQ) or channel (PCQ).

Source: J. Chen et al., "A Statistical Framework for Low-bitwidth Training of Deep Neural Networks" (arXiv
2010.14298), section 3.3 (PTQ) and 4.1 (PSQ).

Shape legend: N samples, D elements per sample, B = 2^bits - 1 bins, R_i the range (maximum - minimum) of group i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fqtstats.errors import InputError
from fqtstats.ops.quantize import Recipe, Rule
from fqtstats.quantizers.base import StochasticQuantizer, extremes, step_bound

__all__ = ["PCQ", "PSQ", "PTQ", "GroupedQuantizer"]


@dataclass(frozen=True)
class GroupedQuantizer(StochasticQuantizer):
    """Stochastic rounding on one grid per group of elements."""

    def _recipe(self, axis: int | None, rule: Rule = "affine") -> Recipe:
        return Recipe(axis, rule, self.bits, self.random_bits)

    def bound(self, x: torch.Tensor) -> float:
        """``sum_i n_i step_i^2 / 4`` over groups of ``n_i`` elements."""
        view = self._view(x)
        low, high = extremes(view, self.recipe.axis)
        return step_bound(self._grid(low, high), low, high, view.numel() / low.numel())

    def published_bound(self, x: torch.Tensor) -> float:
        """``sum_i n_i R_i^2 / (4 B^2)``."""
        view = self._view(x)
        low, high = extremes(view, self.recipe.axis)
        span = high.double() - low.double()
        return float(span.square().sum() * (view.numel() / low.numel() / (4 * self.format.levels**2)))


@dataclass(frozen=True)
class PTQ(GroupedQuantizer):
    """Per-tensor quantizer: one grid for the whole gradient.

    Args:
        bits: 1 to 8.
        random_bits: random bits per decision.
        grid: ``"zero"`` has zero as a grid point, so that exact zeros stay zeros; ``"affine"`` runs from the minimum to
            the maximum, and a bulk of near-zero values then sits at one arbitrary fraction between two points.

    ``bound`` is ``N D step^2 / 4``; the published ``N D R^2 / (4 B^2)`` holds for the affine grid only (with zero on
    the grid the step is larger than ``R / B``).
    """

    grid: Literal["zero", "affine"] = "zero"
    name: ClassVar[str] = "ptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid not in ("zero", "affine"):
            raise InputError(f"grid must be 'zero' or 'affine', got {self.grid!r}")

    @property
    def recipe(self) -> Recipe:
        return self._recipe(None, "zero_on_grid" if self.grid == "zero" else "affine")


@dataclass(frozen=True)
class PSQ(GroupedQuantizer):
    """Per-sample quantizer: one affine grid per row.

    Bound ``D / (4 B^2) sum_i R_i^2``.
    """

    name: ClassVar[str] = "psq"

    @property
    def recipe(self) -> Recipe:
        return self._recipe(0)


@dataclass(frozen=True)
class PCQ(GroupedQuantizer):
    """Per-channel (per-column) quantizer: one affine grid per channel, over samples and space.

    The scale then does not sit on the index that the weight-gradient product contracts, so that product stays integer.

    Args:
        bits: 1 to 8.
        random_bits: random bits per decision.
        per_position: one grid per (channel, position), over the samples alone, as StatQuant's public code does it.
    """

    per_position: bool = False
    name: ClassVar[str] = "pcq"

    @property
    def recipe(self) -> Recipe:
        return self._recipe(1)

    def view_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        n, c, s = super().view_shape(shape)
        return (n, c * s, 1) if self.per_position else (n, c, s)
