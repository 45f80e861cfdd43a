"""What is independent in the error of a quantizer: all that variances of products of a quantized tensor need.

Shape legend: the quantized tensor is viewed as ``[N, C, S]`` (sample, channel, space).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from fqtstats.quantizers.base import Transform

__all__ = ["Factors", "Groups", "Noise"]

Groups = Literal["sample", "channel"]
"""What the elements of a group have in common."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Random factors, one for each sample or channel: their error is ``c_i x_i`` on the elements of group ``i``.

    Attributes:
        groups: whether the elements of a sample or those of a channel share a factor.
        variance: Var(c), ``[N, 1, 1]`` or ``[1, C, 1]`` float64; 0 in groups without a random factor.
        gap: distance of the factor's two outcomes, likewise.
        signal: ``x``, the expectation of the quantized tensor, ``[N, C, S]`` float64.
    """

    groups: Groups
    variance: torch.Tensor
    gap: torch.Tensor
    signal: torch.Tensor

    @property
    def axis(self) -> int:
        """The axis of ``[N, C, S]`` that has a factor per index."""
        return 0 if self.groups == "sample" else 1

    @property
    def elementwise(self) -> torch.Tensor:
        """What the factors put into the variance of every element, ``[N, C, S]``."""
        return self.signal.square().mul_(self.variance)


@dataclass(frozen=True, slots=True)
class Noise:
    """The error of a quantizer on one input as a sum of uncorrelated parts: ``Q(x) - E Q(x) = T^-1 e + c x``.

    Attributes:
        shape: logical shape of the input.
        variance: of the roundings ``e``, which are independent given the factors, ``[N, C, S]`` float64; of the
            transformed rows, where there is a transform.
        gap: distance of the two outcomes of each rounding; broadcasts against ``variance``.
        transform: ``T``, or None for the identity.
        factors: ``c``, which groups of elements share, or None: there are none.
    """

    shape: torch.Size
    variance: torch.Tensor
    gap: torch.Tensor
    transform: Transform | None = None
    factors: Factors | None = None

    @property
    def roundings(self) -> torch.Tensor:
        """What the roundings put into the variance of every element of the input, ``[N, C, S]`` float64."""
        if self.transform is None:
            return self.variance
        return self.transform.inverse_squared(self.variance.clone())

    @property
    def elementwise(self) -> torch.Tensor:
        """The variance of every element, ``[N, C, S]`` float64."""
        return self.roundings if self.factors is None else self.roundings + self.factors.elementwise
