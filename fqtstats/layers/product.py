"""The three products of a linear or convolution layer, with the incoming gradient quantized for each backward one.

Shape legend: linear: input ``x [R, I]``, weight ``w [O, I]``, output ``y [R, O]``. Convolution: ``x [N, I, *space]``,
``w [O, I / groups, *kernel]``, ``y [N, O, *space]``. The incoming gradient ``g = dL/dY`` has ``y``'s shape.

Source: J. Chen et al. (arXiv 2010.14298), section 3.1: ``dW = X^T Q1(g)``, ``dX = Q2(g) W^T`` with independent Q1, Q2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fqtstats.layers.state import Call

__all__ = ["ConvProduct", "LinearProduct", "Product", "multiply"]


class Product(Protocol):
    """A bilinear layer operation and its two adjoints."""

    def forward(self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``y``."""

    def grad_input(self, g: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """``dL/dx`` for ``g = dL/dy``; of ``x`` only the shape matters."""

    def grad_weight(self, g: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """``dL/dw`` for ``g = dL/dy``; of ``w`` only the shape matters."""

    def grad_bias(self, g: torch.Tensor) -> torch.Tensor:
        """``dL/dbias [O]``."""


@dataclass(frozen=True, slots=True)
class LinearProduct:
    """``y = x w^T + bias``."""

    def forward(self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, w, bias)

    def grad_input(self, g: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return g @ w

    def grad_weight(self, g: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return g.t() @ x

    def grad_bias(self, g: torch.Tensor) -> torch.Tensor:
        return g.sum(0)


@dataclass(frozen=True, slots=True)
class ConvProduct:
    """A convolution with zero padding.

    Attributes:
        stride, padding, dilation: one number per space axis.
        groups: channel groups.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        convolution = F.conv1d if w.dim() == 3 else F.conv2d
        return convolution(x, w, bias, self.stride, self.padding, self.dilation, self.groups)

    def grad_input(self, g: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return self._backward(g, x, w, (True, False, False))[0]

    def grad_weight(self, g: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return self._backward(g, x, w, (False, True, False))[1]

    def grad_bias(self, g: torch.Tensor) -> torch.Tensor:
        return g.sum([axis for axis in range(g.dim()) if axis != 1])

    def _backward(
        self, g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten.convolution_backward(
            g, x, w, None, self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups, mask
        )
        return out


class _Multiply(torch.autograd.Function):
    # The two backward products are always computed separately, also without gradient quantizers: the QAT gradient and
    # an FQT draw whose quantizer happens to be exact are then equal bit for bit.
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, product: Product, call: Call
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.product, ctx.call = product, call
        with torch.autocast(x.device.type, enabled=False):
            return product.forward(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = ctx.saved_tensors
        product: Product = ctx.product
        call: Call = ctx.call
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_bias = None
        with torch.autocast(x.device.type, enabled=False):
            if needs_w or needs_bias:
                quantized = call.gradient("grad_weight", g)
                if needs_w:
                    grad_w = product.grad_weight(quantized, x, w)
                if needs_bias:
                    grad_bias = product.grad_bias(quantized)
            if needs_x:
                grad_x = product.grad_input(call.gradient("grad_input", g), x, w)
        return grad_x, grad_w, grad_bias, None, None


def multiply(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, product: Product, call: Call) -> torch.Tensor:
    """``product.forward`` whose backward products see the gradient through ``call``'s quantizers."""
    out: torch.Tensor = _Multiply.apply(x, w, bias, product, call)  # type: ignore[no-untyped-call]
    return out
