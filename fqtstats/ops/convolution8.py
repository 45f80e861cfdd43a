"""Convolutions of codes of up to 8 bits by direct native kernels; :mod:`fqtstats.ops.products` defines them."""

from __future__ import annotations

import torch

from fqtstats.ops.codes import Codes, Geometry
from fqtstats.ops.extension import native_module

__all__ = ["convolution", "convolution_grad_input", "convolution_grad_weight"]

_MAX_TERMS = 2**23
"""Terms of one sum, so that the sum of the codes of one operand stays below 2^31."""


def convolution(
    x: Codes, w: Codes, geometry: Geometry, bias: torch.Tensor | None = None, *, variant: str | None = None
) -> torch.Tensor | None:
    """:func:`fqtstats.ops.products.convolution`; None beyond the limits of the kernels."""
    (n, channels, height, width), (outputs, inputs, kh, kw) = x.shape, w.shape
    if inputs * kh * kw > _MAX_TERMS or not _zeros_are_codes(x, w):
        return None
    size = (_positions(height, kh, geometry, 0), _positions(width, kw, geometry, 1))
    out = torch.empty(n, *size, outputs)
    native_module().convolution8(
        *_codes(x),
        *_weights(w),
        None if bias is None else bias.detach().numpy(),
        channels,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        out.numpy(),
        torch.get_num_threads(),
        variant,
    )
    return out.permute(0, 3, 1, 2)


def convolution_grad_input(
    g: Codes, w: Codes, geometry: Geometry, size: tuple[int, int], *, variant: str | None = None
) -> torch.Tensor | None:
    """:func:`fqtstats.ops.products.convolution_grad_input`; None beyond the limits of the kernels."""
    outputs, inputs, kh, kw = w.shape
    if outputs * kh * kw > _MAX_TERMS or not _zeros_are_codes(g, w):
        return None
    channels = inputs * geometry.groups
    out = torch.empty(g.shape[0], *size, channels)
    native_module().convolution8_grad_input(
        *_codes(g),
        *_weights(w),
        channels,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        out.numpy(),
        torch.get_num_threads(),
        variant,
    )
    return out.permute(0, 3, 1, 2)


def convolution_grad_weight(
    g: Codes, x: Codes, geometry: Geometry, kernel: tuple[int, int], *, variant: str | None = None
) -> torch.Tensor | None:
    """:func:`fqtstats.ops.products.convolution_grad_weight`; None beyond the limits of the kernels."""
    n, outputs, height, width = g.shape
    if n * height * width > _MAX_TERMS or not _zeros_are_codes(g, x):
        return None
    channels = x.shape[1]
    out = torch.empty(outputs, channels // geometry.groups, *kernel)
    native_module().convolution8_grad_weight(
        *_codes(g),
        *_codes(x),
        channels,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        out.numpy(),
        torch.get_num_threads(),
        variant,
    )
    return out


def _zeros_are_codes(*operands: Codes) -> bool:
    # 0..255: the kernels' bounds on int32 sums rest on it.
    zeros = [c.affine.zero.numpy() for c in operands if c.affine.zero is not None]
    return all(zero.min(initial=0) >= 0 and zero.max(initial=0) <= 255 for zero in zeros)


def _positions(size: int, kernel: int, geometry: Geometry, axis: int) -> int:
    room = size + 2 * geometry.padding[axis] - geometry.dilation[axis] * (kernel - 1) - 1
    return max(0, room // geometry.stride[axis] + 1)


def _codes(c: Codes) -> tuple[object, ...]:
    return c.data.numpy(), c.bits, c.pad, *_affine(c)


def _weights(c: Codes) -> tuple[object, ...]:
    return c.data.numpy(), c.bits, *_affine(c)


def _affine(c: Codes) -> tuple[object, ...]:
    affine = c.affine
    return (
        affine.step.numpy(),
        None if affine.zero is None else affine.zero.numpy(),
        None if affine.offset is None else affine.offset.numpy(),
    )
