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

from fqtstats.layers import real
from fqtstats.layers.operand import Operand, images
from fqtstats.layers.passing import Passed
from fqtstats.layers.product import Product
from fqtstats.layers.state import Call, Kept, Source
from fqtstats.quantizers.passage import leaves
from fqtstats.quantizers.storage import Extremes

__all__ = ["Saved", "multiply"]


@dataclass(frozen=True, slots=True)
class Saved:
    """What the backward products need of the forward one, but for the operands' large tensors.

    Those only autograd may hold, because checkpoints drop what it holds.

    Attributes:
        call, product: of the forward product.
        x, w: its operands, their :attr:`Operand.data` taken out.
        kept: the bytes that the graph keeps of them, and of what their quantizers' surrogates need.
        passed: what became of input and weight before the product.
    """

    call: Call
    product: Product
    x: Operand
    w: Operand
    kept: Kept
    passed: Passed

    @staticmethod
    def of(call: Call, product: Product, x: Operand, w: Operand, passed: Passed) -> Saved:
        """From the whole operands; counts what is kept."""
        activation, weight = x.nbytes + passed.activation_nbytes, w.nbytes + passed.weight_nbytes
        kept = Kept(call.layer.name, activation, weight, 4 * math.prod(x.shape))
        call.layer.shared.kept.add(kept)
        x, w = (operand.with_data(operand.data.new_empty(0)) for operand in (x, w))
        return Saved(call, product, x, w, kept, passed)

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
        draw = call.layer.shared.draw
        needs_x = needs_x and draw.passes(Source(*call.key, "grad_input"))
        if not draw.passes(Source(*call.key, "grad_weight")):
            needs_w = needs_bias = False
        grad_x = grad_w = grad_bias = None
        kernel = w.shape[2:]
        with torch.autocast(g.device.type, enabled=False):
            if needs_w or needs_bias:
                quantized = call.gradient("grad_weight", g, product.pad("grad_weight", kernel), extremes)
                parameters = [name for name, needed in (("weight", needs_w), ("bias", needs_bias)) if needed]
                call.show_weight_gradient(product, g, x, w.shape, self.passed, parameters)
                if needs_w:
                    grad_w = call.compute("grad_weight", product, quantized, x, w.shape)
                if needs_bias:
                    real = quantized.decode()
                    grad_bias = real.sum([axis for axis in range(real.dim()) if axis != 1])
            if needs_x:
                quantized = call.gradient("grad_input", g, product.pad("grad_input", kernel), extremes)
                grad_x = call.compute("grad_input", product, quantized, w, x.shape)
        return grad_x, grad_w, grad_bias

    def adjoint(
        self, errors: Sequence[torch.Tensor | None], data: Sequence[torch.Tensor], shape: torch.Size
    ) -> torch.Tensor | None:
        """The adjoint of :meth:`gradients` without gradient quantizers, as a map of ``g``.

        Args:
            errors: in the place of the gradients of input, weight and bias; None for zeros.
            data: as there.
            shape: of ``g``.
        """
        x, w = (operand.with_data(tensor).decode() for operand, tensor in zip((self.x, self.w), data, strict=True))
        error_x, error_w, error_bias = errors
        found: torch.Tensor | None = None
        with torch.autocast(x.device.type, enabled=False):
            for left, right in ((error_x, w), (x, error_w)):
                if left is not None and right is not None:
                    part = self.product.forward(real, images(left), right, None).reshape(shape)
                    found = part if found is None else found + part
            if error_bias is not None:
                spread = error_bias.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
                found = spread if found is None else found + spread
        return found


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        product: Product,
        call: Call,
        passed: Passed,
    ) -> torch.Tensor:
        kernel = tuple(w.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            a = call.operand("activation", x, product.pad("activation", kernel))
            b = call.operand("weight", w)
            y = call.compute("forward", product, a, b, bias)
        ctx.save_for_backward(a.data, b.data)
        ctx.saved, ctx.rows = Saved.of(call, product, a, b, passed), x.dim() == 3
        # Nothing may change a view in place that an autograd function returned.
        return y.clone() if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        recorded = ctx.saved.call.layer.shared.draw.recorded
        return (_recorded_gradients if recorded else _gradients)(ctx, g)


@once_differentiable
def _gradients(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    g = g.squeeze(2) if ctx.rows else g  # quantizers see what the layer's output looks like
    grad_x, grad_w, grad_bias = ctx.saved.gradients(g, ctx.saved_tensors, _needs(ctx))
    grad_x, grad_w = (None if grad is None else _like(grad, g) for grad in (grad_x, grad_w))
    return grad_x, grad_w, grad_bias, None, None, None


def _recorded_gradients(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    g = g.squeeze(2) if ctx.rows else g
    found = _Gradients.apply(g, ctx.saved, _needs(ctx), *ctx.saved_tensors)  # type: ignore[no-untyped-call]
    grad_x, grad_w = (None if grad is None else _like(grad, g) for grad in found[:2])
    return grad_x, grad_w, found[2], None, None, None


class _Gradients(torch.autograd.Function):
    """The backward products without gradient quantizers as a linear map of ``g``, which can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any, g: torch.Tensor, saved: Saved, needs: Sequence[bool], *data: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.save_for_backward(*data)
        ctx.saved, ctx.shape = saved, g.shape
        ctx.set_materialize_grads(False)
        return saved.gradients(g, data, needs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved.adjoint(gradients, ctx.saved_tensors, ctx.shape), *[None] * 4


def _needs(ctx: Any) -> list[bool]:
    """Whether the gradients of input, weight and bias are needed."""
    needs, wanted = list(ctx.needs_input_grad[:3]), ctx.saved.call.layer.shared.draw.wanted
    if wanted is not None:
        # Autograd does not tell which of the gradients will be used. A leaf's node knows whose gradient it is.
        for index, (node, _) in enumerate(ctx.next_functions[:3]):
            behind = leaves(node)
            needs[index] = needs[index] and (behind is None or any(id(leaf) in wanted for leaf in behind))
    return needs


def _like(result: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Images of height 1 as rows again where ``of`` has rows."""
    return result.squeeze(2) if result.dim() > of.dim() else result


def multiply(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, product: Product, call: Call, passed: Passed
) -> torch.Tensor:
    """The forward product of ``x`` and ``w`` through the layer's quantizers.

    Args:
        x: input ``[R, I]`` or ``[N, I, *space]``, in the dtype that products are computed in.
        w: weight.
        bias: ``[O]`` or None.
        product: the layer's operation.
        call: the call that this is.
        passed: what became of ``x`` and ``w`` on their way here.
    """
    out: torch.Tensor = _Multiply.apply(x, w, bias, product, call, passed)  # type: ignore[no-untyped-call]
    outputs = call.layer.shared.outputs
    if outputs is not None:
        outputs[call.key] = out
    return _like(out, x)
