"""DoReFa's quantizers at 16 bits, for progressive bits.

There are no codes of this width: products multiply numbers, on the native backend, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fqtstats.quantizers import quantizer
from fqtstats.random import Stream

__all__ = ["Wide"]

BITS = 16
LEVELS = 2**BITS - 1


@dataclass(frozen=True)
class Wide:
    """``dorefa_act`` or ``dorefa_weight`` with 16 bits, as a plain function of numbers.

    Source: B. Zhuang et al. (arXiv 1908.04680), section 3: ``q_k(z) = round((2^k - 1) z) / (2^k - 1)``.

    Attributes:
        name: registry name of the quantizer that this is a wider version of.
    """

    name: str
    bits = BITS

    def __call__(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        """The nearest of the 2^16 numbers; ``x``'s shape and dtype."""
        z = x.double()
        if self.name == "dorefa_act":
            return _nearest(z.clamp(0, 1)).to(x.dtype)
        t = torch.tanh(z)
        largest = t.abs().amax()
        rounded = 2 * _nearest(t / (2 * largest) + 0.5) - 1
        return torch.where(largest > 0, rounded, torch.zeros_like(rounded)).to(x.dtype)

    def surrogate(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, with the gradient of the narrower quantizers: it is straight through the rounding at any width."""
        passed: torch.Tensor = quantizer(self.name, bits=8).surrogate(x)  # type: ignore[attr-defined]
        return passed


def _nearest(z: torch.Tensor) -> torch.Tensor:
    return z.mul(LEVELS).round().div(LEVELS)
