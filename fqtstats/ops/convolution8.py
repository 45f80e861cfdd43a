"""Convolutions of codes of up to 8 bits by direct native kernels; :mod:`fqtstats.ops.products` defines them."""

from __future__ import annotations

import torch

from fqtstats.ops.codes import Codes, Geometry, array, empty_images
from fqtstats.ops.extension import native_module

__all__ = ["convolution", "convolution_grad_input", "convolution_grad_weight"]

_MAX_TERMS = 2**23
"""Terms of one sum, so that the sum of the codes of one operand stays below 2^31."""


def convolution(
    x: Codes, w: Codes, geometry: Geometry, bias: torch.Tensor | None = None, *, variant: str | None = None
) -> torch.Tensor | None:
    """:func:`fqtstats.ops.products.convolution`; None where its sums or zero points do not fit."""
    outputs, inputs, kh, kw = w.shape
    if not _fits(inputs * kh * kw, x, w):
        return None
    out = empty_images(x.shape[0], outputs, *geometry.positions(x.shape[2:], (kh, kw)))
    others = _others(x.shape[1], geometry, out.permute(0, 2, 3, 1), variant)
    native_module().convolution8(*_images(x), *_weights(w), array(bias), *others)
    return out


def convolution_grad_input(
    g: Codes, w: Codes, geometry: Geometry, size: tuple[int, int], *, variant: str | None = None
) -> torch.Tensor | None:
    """:func:`fqtstats.ops.products.convolution_grad_input`; None where its sums or zero points do not fit."""
    outputs, inputs, kh, kw = w.shape
    if not _fits(outputs * kh * kw, g, w):
        return None
    channels = inputs * geometry.groups
    out = empty_images(g.shape[0], channels, *size)
    others = _others(channels, geometry, out.permute(0, 2, 3, 1), variant)
    native_module().convolution8_grad_input(*_images(g), *_weights(w), *others)
    return out


def convolution_grad_weight(
    g: Codes, x: Codes, geometry: Geometry, kernel: tuple[int, int], *, variant: str | None = None
) -> torch.Tensor | None:
    """:func:`fqtstats.ops.products.convolution_grad_weight`; None where its sums or zero points do not fit."""
    n, outputs, height, width = g.shape
    if not _fits(n * height * width, g, x):
        return None
    channels = x.shape[1]
    out = torch.empty(outputs, channels // geometry.groups, *kernel, dtype=torch.float32, device="cpu")
    others = _others(channels, geometry, out, variant)
    native_module().convolution8_grad_weight(*_images(g), *_images(x), *others)
    return out


def _fits(terms: int, *operands: Codes) -> bool:
    """Whether a sum of so many terms can be had, and codes and zero points are bytes (quantizers make no others)."""
    zeros = [c.affine.zero.numpy() for c in operands if c.affine.zero is not None]
    small = all(bool((zero >= 0).all() and (zero <= 255).all()) for zero in zeros)
    return terms <= _MAX_TERMS and small and all(c.fits_bytes for c in operands)


def _images(c: Codes) -> tuple[object, ...]:
    return c.data.numpy(), c.bits, c.affine.magnitudes, c.pad, *c.affine.arrays()


def _weights(c: Codes) -> tuple[object, ...]:
    return c.data.numpy(), c.bits, c.affine.magnitudes, *c.affine.arrays()


def _others(channels: int, geometry: Geometry, out: torch.Tensor, variant: str | None) -> tuple[object, ...]:
    """What follows the operands in every call; ``channels`` are those of the input."""
    slide = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    return channels, *slide, out.numpy(), torch.get_num_threads(), variant
