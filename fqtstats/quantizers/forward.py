"""Deterministic forward quantizers of activations and weights: one grid per tensor, round to nearest.

Source: J. Chen et al. (arXiv 2010.14298), section 2.1; the straight-through estimator belongs to the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fqtstats.errors import InputError
from fqtstats.ops.quantize import Recipe
from fqtstats.quantizers.base import NearestQuantizer

__all__ = ["MinMax", "Symmetric", "ZeroOnGrid"]


@dataclass(frozen=True)
class MinMax(NearestQuantizer):
    """Affine grid from the minimum to the maximum: StatQuant's activations."""

    name: ClassVar[str] = "minmax"

    @property
    def recipe(self) -> Recipe:
        return Recipe(None, "affine", self.bits, None)


@dataclass(frozen=True)
class ZeroOnGrid(NearestQuantizer):
    """The finest grid over the range that has zero as a point: StatQuant's weights."""

    name: ClassVar[str] = "zero_on_grid"

    @property
    def recipe(self) -> Recipe:
        return Recipe(None, "zero_on_grid", self.bits, None)


@dataclass(frozen=True)
class Symmetric(NearestQuantizer):
    """A grid symmetric about zero.

    ``2^bits - 1`` points, ``step = max|x| / (2^(bits - 1) - 1)``; at least 2 bits.

    Raises:
        InputError: ``bits`` is below 2 or above 8.
    """

    name: ClassVar[str] = "symmetric"
    widths: ClassVar[Sequence[int]] = range(2, 9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits < 2:
            raise InputError("symmetric needs at least 2 bits (with 1 it would have a single point), got bits=1")

    @property
    def recipe(self) -> Recipe:
        return Recipe(None, "symmetric", self.bits, None)
