"""DoReFa's weights and activations.

Source: B. Zhuang et al., "Effective Training of Convolutional Neural Networks with Low-bitwidth Weights and
Activations" (arXiv 1908.04680), section 3.1, after S. Zhou et al., "DoReFa-Net" (arXiv 1606.06160), equations 5 to 11.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fqtstats.ops.quantize import Recipe
from fqtstats.quantizers.passage import Passage, keeps, masked
from fqtstats.quantizers.ranged import Binary, RangedQuantizer, absolute_mean, require_finite
from fqtstats.quantizers.sign import signs

__all__ = ["DoReFaActivation", "DoReFaWeight"]


@dataclass(frozen=True)
class DoReFaActivation(RangedQuantizer):
    """``q_k(clip(x, 0, 1))`` with ``q_k(z) = round((2^k - 1) z) / (2^k - 1)``.

    The gradient passes where ``0 <= x <= 1``: straight through the rounding alone.
    """

    name: ClassVar[str] = "dorefa_act"

    @property
    def recipe(self) -> Recipe:
        return Recipe(None, "zero_on_grid", self.bits, None)

    @property
    def binary(self) -> Binary | None:
        """As :class:`Binary`, where there is one bit: 1/2 is rounded to 0, the even one."""
        above_half = float(np.nextafter(np.float32(0.5), np.float32(1)))
        below_zero = float(np.nextafter(np.float32(0), np.float32(-1)))
        return Binary(above_half, (0.0, 1.0), (below_zero, 1.0)) if self.bits == 1 else None

    def ranged(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        require_finite(x)
        return x.clamp(0, 1), x.new_zeros(1), x.new_ones(1)

    def surrogate(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, with the gradient of the clip; keeps one bit per element."""
        detached = x.detach()
        return masked(x, (detached >= 0) & (detached <= 1))

    def passage(self, w: torch.Tensor) -> Passage:
        """What the surrogate does to the gradient of ``w``."""
        return Passage(((w >= 0) & (w <= 1)).to(w.dtype))


@dataclass(frozen=True)
class DoReFaWeight(RangedQuantizer):
    """``2 q_k(tanh(w) / (2 max|tanh w|) + 1/2) - 1``; with one bit ``sign(w) mean|w|``, the sign of zero positive.

    Straight through the rounding alone: the gradient is that of ``tanh(w) / max|tanh w|``, maximum included (shared
    evenly where several elements have it). With one bit it is the identity. Zeros alone stay zeros, with the identity.
    """

    name: ClassVar[str] = "dorefa_weight"

    @property
    def recipe(self) -> Recipe:
        return Recipe(None, "affine", self.bits, None)

    def ranged(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not bool(require_finite(x) > 0):
            return x.clone(), x.new_zeros(1), x.new_zeros(1)
        if self.bits == 1:
            return signs(x, absolute_mean(x, None).to(x.dtype), None)
        t = torch.tanh(x)
        return t.div_(t.abs().max()), -x.new_ones(1), x.new_ones(1)

    def surrogate(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, with the gradient of ``tanh(x) / max|tanh x|``; keeps ``x``."""
        if self.bits == 1 or not (torch.is_grad_enabled() and x.requires_grad):
            return x
        out: torch.Tensor = _Normalized.apply(x, self.passage)  # type: ignore[no-untyped-call]
        return out

    def passage(self, w: torch.Tensor) -> Passage:
        """What the surrogate does to the gradient of ``w``."""
        if self.bits == 1 or not bool(w.any()):
            return Passage()
        factor, *rank_one = _derivative(w)
        return Passage(factor, (rank_one[0], rank_one[1]))


def _derivative(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of ``t / m`` with ``t = tanh w`` and ``m = max|t|``: by ``t``, times ``dt / dw``; ``dm / dw``; and by ``m``."""
    t = torch.tanh(w)
    m = t.abs().max()
    slope = 1 - t.square()
    largest = t.abs() == m
    return slope / m, slope * t.sign() * largest / largest.sum(), -(t / m) / m  # m^2 may underflow


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, passage: Callable[[torch.Tensor], Passage]) -> torch.Tensor:
        ctx.passage = passage
        keeps(ctx, w)
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        (w,) = ctx.saved_tensors
        return None if g is None else ctx.passage(w.detach())(g), None
