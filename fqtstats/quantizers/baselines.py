"""Gradient quantizers that others are compared with: DoReFa's, per-tensor INT4, and rounding to nearest.

Sources: S. Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients"
(arXiv 1606.06160), section 2.5; B. Chmiel et al. (arXiv 2112.10769), figure 3 (INT4 with stochastic rounding).

Shape legend: N samples, D elements per sample, B = 2^bits - 1 bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fqtstats.errors import InputError
from fqtstats.ops.quantize import Recipe
from fqtstats.quantizers.base import NearestQuantizer, Role
from fqtstats.quantizers.uniform import GroupedQuantizer

__all__ = ["DoReFa", "Int4", "Nearest"]


@dataclass(frozen=True)
class DoReFa(GroupedQuantizer):
    """DoReFa's gradient quantizer: per sample the affine grid from ``-m`` to ``m = max|g|``.

    ``f(g) = 2 m [q_k(g / (2 m) + 1/2 + noise) - 1/2]`` with noise uniform over one bin (equation 12) is stochastic
    rounding on that grid, with the variance ``(2 m / B)^2 f (1 - f)``. B is odd: zero lies in the middle of a bin, and
    every exact zero costs ``m^2 / B^2``. A sample without a range is returned exactly.
    """

    name: ClassVar[str] = "dorefa"

    @property
    def recipe(self) -> Recipe:
        return self._recipe(0, "mirrored")

    @property
    def ladder_levels(self) -> None:
        """None: with zero in the middle of a bin, float32 cannot hold numbers that lie next to its points."""

    def published_bound(self, x: torch.Tensor) -> float:
        """The same as :meth:`bound`: the paper has none of its own."""
        return self.bound(x)


@dataclass(frozen=True)
class Int4(GroupedQuantizer):
    """Symmetric integers with one scale for the tensor, rounded stochastically.

    ``2^bits - 1`` points, ``step = max|x| / (2^(bits - 1) - 1)``.

    Raises:
        InputError: an option is out of range; it has at least 2 bits.
    """

    bits: int = 4
    name: ClassVar[str] = "int4_sr"
    widths: ClassVar[Sequence[int]] = range(2, 9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits < 2:
            raise InputError("int4_sr needs at least 2 bits (with 1 it would have a single point), got bits=1")

    @property
    def recipe(self) -> Recipe:
        return self._recipe(None, "symmetric")

    def published_bound(self, x: torch.Tensor) -> float:
        """The same as :meth:`bound`: the paper has none of its own."""
        return self.bound(x)


@dataclass(frozen=True)
class Nearest(NearestQuantizer):
    """Negative control: per-sample grids as PSQ's, rounded to nearest.

    What is small beside its row's range is lost, always in the same direction.
    """

    name: ClassVar[str] = "nearest"
    role: ClassVar[Role] = "gradient"

    @property
    def recipe(self) -> Recipe:
        return Recipe(0, "affine", self.bits, None)
