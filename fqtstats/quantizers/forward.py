"""Deterministic forward quantizers of activations and weights: one grid per tensor, round to nearest.

Source: J. Chen et al. (arXiv 2010.14298), section 2.1; the straight-through estimator belongs to the layer.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from fqtstats.errors import InputError
from fqtstats.quantizers.base import Frame, NearestQuantizer, extremes, rows
from fqtstats.quantizers.grid import Grid, affine, symmetric, zero_on_grid

__all__ = ["MinMax", "Symmetric", "ZeroOnGrid"]


@dataclass(frozen=True)
class _PerTensor(NearestQuantizer):
    @abstractmethod
    def _grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        """The tensor's grid."""

    def _frame(self, x: torch.Tensor) -> tuple[torch.Tensor, Frame]:
        view = rows(x)
        grid = self._grid(*extremes(view, (0, 1, 2)))
        n, c, s = view.shape
        return grid.coordinates(view), Frame(x.shape, (n, c, s), grid, None)


@dataclass(frozen=True)
class MinMax(_PerTensor):
    """Affine grid from the minimum to the maximum: StatQuant's activations."""

    name: ClassVar[str] = "minmax"

    def _grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        return affine(low, high, self.format.levels)


@dataclass(frozen=True)
class ZeroOnGrid(_PerTensor):
    """The finest grid over the range that has zero as a point: StatQuant's weights."""

    name: ClassVar[str] = "zero_on_grid"

    def _grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        return zero_on_grid(low, high, self.format.levels)


@dataclass(frozen=True)
class Symmetric(_PerTensor):
    """A grid symmetric about zero.

    ``2^bits - 1`` points, ``step = max|x| / (2^(bits - 1) - 1)``; at least 2 bits.

    Raises:
        InputError: ``bits`` is below 2 or above 8.
    """

    name: ClassVar[str] = "symmetric"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits < 2:
            raise InputError("symmetric needs at least 2 bits (with 1 it would have a single point), got bits=1")

    def _grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        return symmetric(low, high, self.format.levels)
