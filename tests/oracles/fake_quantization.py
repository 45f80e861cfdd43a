"""Oracle of the quantized layers: autograd through straight-through fake quantization around torch's own functions.

The output of each function is differentiable; ``torch.autograd.grad(y, (w, b), q1(g))`` and ``torch.autograd.grad(y, x,
q2(g))`` are then the two backward products of fully quantized training, and ``torch.autograd.grad(y, (x, w, b), g)``
the gradient of quantization-aware training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q):
        return q(x.detach())

    @staticmethod
    def backward(ctx, g):
        return g, None


def fake(x, q):
    """``q(x)`` with the identity as its derivative; ``x`` itself without a quantizer."""
    return x if q is None else _StraightThrough.apply(x, q)


def linear(x, w, b, qa=None, qw=None):
    """``nn.Linear`` on quantized operands, computed in float32 (float64 for float64)."""
    return _computed(F.linear, x, w, b, qa, qw)


def conv(x, w, b, qa=None, qw=None, *, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"):
    """``nn.Conv1d`` and ``nn.Conv2d`` on quantized operands: quantize, pad, multiply."""
    space = w.dim() - 2
    function = F.conv1d if space == 1 else F.conv2d

    def product(xq, wq, bq):
        if padding_mode == "zeros" and padding != "same":
            return function(xq, wq, bq, stride, padding, dilation, groups)
        pads = []
        for axis in reversed(range(space)):
            if padding == "valid":
                pads += [0, 0]
            elif padding == "same":
                d = dilation if isinstance(dilation, int) else dilation[axis]
                total = d * (w.shape[2 + axis] - 1)
                pads += [total // 2, total - total // 2]
            else:
                pads += 2 * [padding if isinstance(padding, int) else padding[axis]]
        return function(
            F.pad(xq, pads, mode="constant" if padding_mode == "zeros" else padding_mode),
            wq,
            bq,
            stride,
            0,
            dilation,
            groups,
        )

    return _computed(product, x, w, b, qa, qw)


def _computed(product, x, w, b, qa, qw):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        return product(fake(x.to(dtype), qa), fake(w.to(dtype), qw), None if b is None else b.to(dtype))
