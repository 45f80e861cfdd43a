"""How gradients pass a forward quantizer: straight-through estimators other than the identity.

A forward quantizer may have a method ``surrogate(x)`` that returns ``x``'s values unchanged, as an autograd function
whose backward pass is the quantizer's straight-through estimator, into ``x`` and into the quantizer's own parameters.
Layers apply it to what they quantize, before the product. A quantizer without one has the identity.

The backward pass of a surrogate is linear in the incoming gradient and can be differentiated by it; what it multiplies
by are constants. :class:`Passage` says what that linear map is, which gives the exact variance of what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fqtstats.formats import pack, uint, unpack

__all__ = ["Functional", "PackedMask", "Passage", "clipped", "keeps", "leaves", "masked", "nbytes"]


@dataclass(frozen=True, slots=True)
class Functional:
    """Gradients of a parameter that are sums over a gradient ``g``: ``sum coefficients * g``.

    Attributes:
        coefficients: of ``g``'s shape.
        per_channel: whether there is one sum for every index of the first axis, or one for all.
    """

    coefficients: torch.Tensor
    per_channel: bool

    def of(self, g: torch.Tensor) -> torch.Tensor:
        """The parameter's gradient, ``[O]`` or ``[1]``."""
        product = self.coefficients * g
        return product.flatten(1).sum(1) if self.per_channel else product.sum().view(1)


@dataclass(frozen=True, slots=True)
class Passage:
    """The linear map of a surrogate's backward pass, ``g -> factor * g + direction * sum(coefficients * g)``.

    The default is the identity.

    Attributes:
        factor: of ``g``'s shape, or None for 1.
        rank_one: ``direction`` and ``coefficients``, of ``g``'s shape, or None where there is no such part.
        own: gradients of the quantizer's own parameters, by name.
    """

    factor: torch.Tensor | None = None
    rank_one: tuple[torch.Tensor, torch.Tensor] | None = None
    own: Mapping[str, Functional] = field(default_factory=dict)

    def __call__(self, g: torch.Tensor) -> torch.Tensor:
        """What becomes of ``g``, but for :attr:`own`."""
        out = g if self.factor is None else self.factor * g
        if self.rank_one is not None:
            direction, coefficients = self.rank_one
            out = out + direction * (coefficients * g).sum()
        return out

    @property
    def is_identity(self) -> bool:
        """Whether what comes out for ``x`` is what came in."""
        return self.factor is None and self.rank_one is None


@dataclass(frozen=True, slots=True)
class PackedMask:
    """A mask in one bit per element, in the order that the elements of ``x`` have in memory.

    Attributes:
        shape: of the mask.
        channels_last: whether the order is ``[N, H, W, C]``.
    """

    shape: torch.Size
    channels_last: bool

    @staticmethod
    def pack(mask: torch.Tensor) -> tuple[PackedMask, torch.Tensor]:
        """The layout, and the bits: uint8 ``[ceil(numel / 8)]``."""
        last = mask.dim() == 4 and mask.is_contiguous(memory_format=torch.channels_last) and not mask.is_contiguous()
        flat = (mask.permute(0, 2, 3, 1) if last else mask).reshape(-1)
        if flat.device.type == "cpu":
            bits = torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
        else:
            bits = pack(flat.to(torch.uint8), uint(1))
        return PackedMask(mask.shape, last), bits

    def unpack(self, bits: torch.Tensor) -> torch.Tensor:
        """The mask, bool, in the memory format that it had."""
        count = math.prod(self.shape)
        if bits.device.type == "cpu":
            flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=count, bitorder="little"))
        else:
            flat = unpack(bits, uint(1), count)
        flat = flat.view(torch.bool)
        if not self.channels_last:
            return flat.view(self.shape)
        n, c, h, w = self.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def keeps(ctx: Any, *tensors: torch.Tensor) -> None:
    """Save tensors for the backward pass of a surrogate, and note how many bytes they are."""
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # what is not needed is not computed from zeros
    ctx.fqt_nbytes = sum(t.numel() * t.element_size() for t in tensors)


def nbytes(passed: torch.Tensor) -> int:
    """Bytes that the surrogate which gave ``passed`` keeps; 0 where there is none, or it does not tell."""
    return int(getattr(passed.grad_fn, "fqt_nbytes", 0))


def leaves(node: Any) -> list[torch.Tensor] | None:
    """The leaves whose gradients a node of the graph gives, looking through surrogates; None where others go on."""
    if node is None:
        return []
    variable = getattr(node, "variable", None)
    if variable is not None:
        return [variable]
    if not hasattr(node, "fqt_nbytes"):
        return None
    found: list[torch.Tensor] = []
    for following, _ in node.next_functions:
        own = leaves(following)
        if own is None:
            return None
        found += own
    return found


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.layout, bits = PackedMask.pack(mask)
        keeps(ctx, bits)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        (bits,) = ctx.saved_tensors
        return None if g is None else g * ctx.layout.unpack(bits), None


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        ctx.low, ctx.high = low, high
        keeps(ctx, x)
        ctx.fqt_nbytes = 0  # a parameter is there anyway
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        return None if g is None else torch.ops.aten.hardtanh_backward(g, x, ctx.low, ctx.high), None, None


def clipped(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """``x``, with a gradient that passes where ``low < x < high``; keeps one bit per element, or a parameter itself."""
    if torch.is_grad_enabled() and x.requires_grad and isinstance(x, torch.nn.Parameter):
        out: torch.Tensor = _Clipped.apply(x, low, high)  # type: ignore[no-untyped-call]
        return out
    detached = x.detach()
    return masked(x, (detached > low) & (detached < high))


def masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``x``, with a gradient that passes where ``mask`` is set; keeps one bit per element."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    out: torch.Tensor = _Masked.apply(x, mask)  # type: ignore[no-untyped-call]
    return out
