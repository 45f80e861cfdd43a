"""The autograd function of a quantized layer: three products, and what is kept between forward and backward.

Source: J. Chen et al. (arXiv 2010.14298), section 3.1: ``dW = X^T Q1(g)``, ``dX = Q2(g) W^T`` with independent Q1, Q2;
both taken straight through the quantizers of input and weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fqtstats.layers.operand import Operand
from fqtstats.layers.product import Product
from fqtstats.layers.state import Call, Kept

__all__ = ["multiply"]


class _Multiply(torch.autograd.Function):
    # The two backward products are always computed separately, also without gradient quantizers: the QAT gradient and
    # an FQT draw whose quantizer happens to be exact are then equal bit for bit.
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, product: Product, call: Call
    ) -> torch.Tensor:
        kernel = tuple(w.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            a = call.operand("activation", x, product.pad("activation", kernel))
            b = call.operand("weight", w)
            y = call.compute("forward", product, a, b, bias)
        ctx.save_for_backward(a.data, b.data)
        # Everything but the large tensors, which only autograd may hold (checkpoints drop them).
        ctx.operands = a.with_data(a.data.new_empty(0)), b.with_data(b.data.new_empty(0))
        ctx.shapes, ctx.product, ctx.call, ctx.rows = (a.shape, b.shape), product, call, x.dim() == 3
        ctx.kept = Kept(call.layer.name, a.nbytes, b.nbytes, 4 * math.prod(a.shape))
        call.layer.shared.kept.add(ctx.kept)
        # Nothing may change a view in place that an autograd function returned.
        return y.clone() if y._is_view() else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = (operand.with_data(data) for operand, data in zip(ctx.operands, ctx.saved_tensors, strict=True))
        (x_shape, w_shape), product, call = ctx.shapes, ctx.product, ctx.call
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_bias = None
        g = g.squeeze(2) if ctx.rows else g  # quantizers see what the layer's output looks like
        with torch.autocast(g.device.type, enabled=False):
            if needs_w or needs_bias:
                quantized = call.gradient("grad_weight", g, product.pad("grad_weight", w_shape[2:]))
                if needs_w:
                    grad_w = _like(call.compute("grad_weight", product, quantized, x, w_shape), g)
                if needs_bias:
                    grad_bias = _bias_gradient(quantized)
            if needs_x:
                quantized = call.gradient("grad_input", g, product.pad("grad_input", w_shape[2:]))
                grad_x = _like(call.compute("grad_input", product, quantized, w, x_shape), g)
        return grad_x, grad_w, grad_bias, None, None


def _like(result: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Images of height 1 as rows again where ``of`` has rows."""
    return result.squeeze(2) if result.dim() > of.dim() else result


def _bias_gradient(g: Operand) -> torch.Tensor:
    real = g.decode()
    return real.sum([axis for axis in range(real.dim()) if axis != 1])


def multiply(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, product: Product, call: Call) -> torch.Tensor:
    """The forward product of ``x`` and ``w`` through the layer's quantizers.

    Args:
        x: input ``[R, I]`` or ``[N, I, *space]``, in the dtype that products are computed in.
        w: weight.
        bias: ``[O]`` or None.
        product: the layer's operation.
        call: the call that this is.
    """
    out: torch.Tensor = _Multiply.apply(x, w, bias, product, call)  # type: ignore[no-untyped-call]
    return _like(out, x)
