"""Signs: 1-bit weights and activations.

Source: C. Gao et al., "1-Bit FQT: Pushing the Limit of Fully Quantized Training to 1-bit" (arXiv 2408.14267), section
3.1 (forward pass); the scale is that of M. Rastegari et al., "XNOR-Net" (arXiv 1603.05279), equation 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import nn

from fqtstats.errors import InputError
from fqtstats.ops.quantize import Recipe
from fqtstats.quantizers.passage import Passage, clipped
from fqtstats.quantizers.ranged import (
    Binary,
    LearnedQuantizer,
    RangedQuantizer,
    absolute_mean,
    require_bits,
    require_choice,
    require_finite,
)

__all__ = ["ScaledSign", "Sign", "signs"]


def signs(x: torch.Tensor, scale: torch.Tensor, axis: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``+scale`` where ``x >= 0`` and ``-scale`` elsewhere, and both ends.

    Args:
        x: ``[N, ...]``.
        scale: ``[G]`` in ``x``'s dtype.
        axis: that the groups run along, or None.
    """
    along = scale.view(-1, *[1] * (x.dim() - 1)) if axis == 0 else scale
    return torch.where(x >= 0, along, -along), -scale, scale


def _passes(x: torch.Tensor) -> torch.Tensor:
    return x.abs() < 1


@dataclass(frozen=True)
class Sign(RangedQuantizer):
    """``scale * sign(x)`` with the sign of zero positive; the gradient passes where ``|x| < 1``.

    Behind a ReLU every sign is positive: binary networks quantize what comes before it, or have none.

    ``scale`` counts as a constant in the backward pass. With one per channel, the product that gives the input gradient
    is not on integers, because it contracts the weight's output channels; :class:`ScaledSign` keeps it there.

    Args:
        bits: 1.
        scale: ``"one"``: 1, for activations; ``"channel"``: the mean of ``|x|`` of each index of the first axis, the
            output channels of a weight (a channel of zeros stays zero).

    Raises:
        InputError: an option is out of range.
    """

    bits: int = 1
    scale: Literal["one", "channel"] = "one"
    name: ClassVar[str] = "sign"
    widths: ClassVar[Sequence[int]] = (1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bits(self.name, self.bits, 1)
        require_choice("scale", self.scale, ("one", "channel"))

    @property
    def recipe(self) -> Recipe:
        return Recipe(0 if self.scale == "channel" else None, "affine", self.bits, None)

    @property
    def binary(self) -> Binary | None:
        """As :class:`Binary`; None where the scale is the input's."""
        inside = float(np.nextafter(np.float32(1), np.float32(0)))
        return Binary(0.0, (-1.0, 1.0), (-1.0, inside)) if self.scale == "one" else None

    def ranged(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        require_finite(x)
        axis = self.recipe.axis
        return signs(x, x.new_ones(1) if axis is None else absolute_mean(x, axis).to(x.dtype), axis)

    def surrogate(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, with the clipped straight-through estimator; keeps one bit per element, or a parameter."""
        return clipped(x, -1.0, 1.0)

    def passage(self, w: torch.Tensor) -> Passage:
        """What the surrogate does to the gradient of ``w``."""
        return Passage(_passes(w).to(w.dtype))


@dataclass(eq=False)
class ScaledSign(LearnedQuantizer):
    """``sign(w)`` of a weight, and a learned scale for each of the layer's output channels.

    The layer multiplies its product by the scale (before the bias), so that no product contracts it: all three stay
    integer. The scale is set to the mean of ``|w|`` of each output channel by the first forward pass.

    Args:
        bits: 1.

    Raises:
        InputError: ``bits`` is not 1.
    """

    bits: int = 1
    name: ClassVar[str] = "scaled_sign"
    widths: ClassVar[Sequence[int]] = (1,)

    def __post_init__(self) -> None:
        super().__init__()
        require_bits(self.name, self.bits, 1)
        self.scale = nn.Parameter(torch.zeros(1))

    def attach(self, place: str, layer: nn.Module) -> None:
        if place != "weight":
            raise InputError(f"scaled_sign is for weights, got it for {place}; use sign there")
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.scale.data = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device)

    def fixed(self, x: torch.Tensor) -> Sign:
        return Sign()

    def output_scale(self, w: torch.Tensor) -> torch.Tensor:
        """What the layer multiplies its output channels by, ``[O]``, for the weight ``w`` ``[O, ...]``."""
        if not bool(self.scale.any()):
            with torch.no_grad():
                self.scale.data = absolute_mean(w, 0).to(self.scale.dtype)
        return self.scale

    def surrogate(self, x: torch.Tensor) -> torch.Tensor:
        """As :meth:`Sign.surrogate`."""
        return Sign().surrogate(x)

    def passage(self, w: torch.Tensor) -> Passage:
        """As :meth:`Sign.passage`."""
        return Sign().passage(w)
