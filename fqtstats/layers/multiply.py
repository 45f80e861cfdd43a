"""The autograd function of a quantized layer: three products, and what is kept between forward and backward.

Source: J. Chen et al. (arXiv 2010.14298), section 3.1: ``dW = X^T Q1(g)``, ``dX = Q2(g) W^T`` with independent Q1, Q2;
both taken straight through the quantizers of input and weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fqtstats.layers.operand import Operand
from fqtstats.layers.product import Product
from fqtstats.layers.state import Call, Kept
from fqtstats.quantizers.storage import Extremes

__all__ = ["Saved", "multiply"]


@dataclass(frozen=True, slots=True)
class Saved:
    """What the backward products need of the forward one, but for the operands' large tensors.

    Those only autograd may hold, because checkpoints drop what it holds.

    Attributes:
        call, product: of the forward product.
        x, w: its operands, their :attr:`Operand.data` taken out.
        kept: the bytes that the graph keeps of them.
    """

    call: Call
    product: Product
    x: Operand
    w: Operand
    kept: Kept

    @staticmethod
    def of(call: Call, product: Product, x: Operand, w: Operand) -> Saved:
        """From the whole operands; counts what is kept."""
        kept = Kept(call.layer.name, x.nbytes, w.nbytes, 4 * math.prod(x.shape))
        call.layer.shared.kept.add(kept)
        x, w = (operand.with_data(operand.data.new_empty(0)) for operand in (x, w))
        return Saved(call, product, x, w, kept)

    def gradients(
        self, g: torch.Tensor, data: Sequence[torch.Tensor], needs: Sequence[bool], extremes: Extremes | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of input, weight and bias, None for those that are not needed.

        The two backward products are always computed separately, also without gradient quantizers: the QAT gradient and
        an FQT draw whose quantizer happens to be exact are then equal bit for bit.

        Args:
            g: the gradient of the product.
            data: :attr:`Operand.data` of input and weight.
            needs: whether those of input, weight and bias are needed.
            extremes: of ``g``, where they are known already.
        """
        call, product = self.call, self.product
        x, w = (operand.with_data(tensor) for operand, tensor in zip((self.x, self.w), data, strict=True))
        needs_x, needs_w, needs_bias = needs
        if call.layer.shared.draw.input_only == call.key:
            needs_w = needs_bias = False
        grad_x = grad_w = grad_bias = None
        kernel = w.shape[2:]
        with torch.autocast(g.device.type, enabled=False):
            if needs_w or needs_bias:
                quantized = call.gradient("grad_weight", g, product.pad("grad_weight", kernel), extremes)
                parameters = [name for name, needed in (("weight", needs_w), ("bias", needs_bias)) if needed]
                call.show_weight_gradient(product, g, x, w.shape, parameters)
                if needs_w:
                    grad_w = call.compute("grad_weight", product, quantized, x, w.shape)
                if needs_bias:
                    real = quantized.decode()
                    grad_bias = real.sum([axis for axis in range(real.dim()) if axis != 1])
            if needs_x:
                quantized = call.gradient("grad_input", g, product.pad("grad_input", kernel), extremes)
                grad_x = call.compute("grad_input", product, quantized, w, x.shape)
        return grad_x, grad_w, grad_bias


class _Multiply(torch.autograd.Function):
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
        ctx.saved, ctx.rows = Saved.of(call, product, a, b), x.dim() == 3
        # Nothing may change a view in place that an autograd function returned.
        return y.clone() if y._is_view() else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g = g.squeeze(2) if ctx.rows else g  # quantizers see what the layer's output looks like
        grad_x, grad_w, grad_bias = ctx.saved.gradients(g, ctx.saved_tensors, ctx.needs_input_grad[:3])
        grad_x, grad_w = (None if grad is None else _like(grad, g) for grad in (grad_x, grad_w))
        return grad_x, grad_w, grad_bias, None, None


def _like(result: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Images of height 1 as rows again where ``of`` has rows."""
    return result.squeeze(2) if result.dim() > of.dim() else result


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
    outputs = call.layer.shared.outputs
    if outputs is not None:
        outputs[call.key] = out
    return _like(out, x)
