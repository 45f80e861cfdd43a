"""SAWB: a clip from the first two moments, 4 bits.

Source: B. Chmiel et al., "Accurate Neural Training with 4-bit Matrix Multiplications at Standard Formats" (arXiv
2112.10769), section 4 (forward pass); J. Choi et al., "Accurate and Efficient 2-bit Quantized Neural Networks" (SysML
2019), statistics-aware weight binning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fqtstats.ops.quantize import Recipe
from fqtstats.quantizers.base import rows
from fqtstats.quantizers.ranged import (
    RangedQuantizer,
    require_bits,
    require_choice,
    require_finite,
    thread_free_sum,
)

__all__ = ["SAWB"]

_RMS, _MEAN = 12.1, 12.2
"""Coefficients for 4 bits."""


@dataclass(frozen=True)
class SAWB(RangedQuantizer):
    """Nearest on a uniform grid up to ``clip = 12.1 rms - 12.2 mean|x|``; what is beyond is clipped.

    Weights have 15 levels symmetric about zero, ``clip / 7`` apart, activations 16 from zero, ``clip / 15`` apart
    (negative ones become zero). Where the clip is not positive (magnitudes that hardly vary) it is ``max|x|``.
    Gradients pass straight through.

    Args:
        bits: 4: the coefficients are fitted for that width.
        on: ``"weight"`` or ``"activation"``.

    Raises:
        InputError: an option is out of range.
    """

    bits: int = 4
    on: Literal["weight", "activation"] = "weight"
    name: ClassVar[str] = "sawb"
    widths: ClassVar[Sequence[int]] = (4,)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bits(self.name, self.bits, 4, "its coefficients are fitted for that width")
        require_choice("on", self.on, ("weight", "activation"))

    @property
    def recipe(self) -> Recipe:
        return Recipe(None, "symmetric" if self.on == "weight" else "zero_on_grid", self.bits, None)

    def ranged(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        high = self.clip(x).to(x.dtype)
        low = -high if self.on == "weight" else torch.zeros_like(high)
        return x.clamp(low, high), low.view(1), high.view(1)

    def clip(self, x: torch.Tensor) -> torch.Tensor:
        """The clip, float64, 0-dimensional; 0 for zeros alone.

        Raises:
            NonFiniteError: ``x`` holds NaN or Inf.
        """
        largest = require_finite(x).double()
        z = rows(x).reshape(1, -1).double() / torch.where(largest > 0, largest, 1.0)  # its squares cannot overflow
        rms, mean = (thread_free_sum(t).div(t.numel()).view(()) for t in (z.square(), z.abs()))
        relative = _RMS * rms.sqrt() - _MEAN * mean
        return torch.where(relative > 0, relative, 1.0) * largest
