"""Native convolutions with a 1-bit operand: forward 1 x 1 bit, both gradients (4, 2 or 1) x 1 bit.

The functions are those of ``fqtstats.ops.products``, for arguments that were checked there. They return None for other
widths, channel groups, and the rare case that an integer sum could exceed 32 bits: int8 kernels or the fallback take
those.
"""

from __future__ import annotations

import torch

from fqtstats.ops.codes import Codes, Geometry, array, empty_images
from fqtstats.ops.extension import native_module

__all__ = ["GRADIENT_BITS", "convolution", "convolution_grad_input", "convolution_grad_weight"]

GRADIENT_BITS = (1, 2, 4)
"""Widths of the incoming gradient that the backward kernels have."""


def convolution(
    x: Codes, w: Codes, geometry: Geometry, bias: torch.Tensor | None = None, variant: str | None = None
) -> torch.Tensor | None:
    """As ``products.convolution``; `variant` names the instruction set to use."""
    if (x.bits, w.bits) != (1, 1) or geometry.groups != 1 or 0 in (*x.shape, *w.shape):
        return None
    out = empty_images(x.shape[0], w.shape[0], *geometry.positions(x.shape[2:], w.shape[2:]))
    done = native_module().convolution1_forward(
        *_image(x),
        *_weights(w),
        *_slide(geometry),
        array(bias),
        torch.get_num_threads(),
        out.permute(0, 2, 3, 1).numpy(),
        variant,
    )
    return out if done else None


def convolution_grad_input(
    g: Codes, w: Codes, geometry: Geometry, size: tuple[int, int], variant: str | None = None
) -> torch.Tensor | None:
    """As ``products.convolution_grad_input``; `variant` names the instruction set to use."""
    if not _takes(g, w) or geometry.groups != 1 or 0 in (*g.shape, *w.shape, *size):
        return None
    out = empty_images(g.shape[0], w.shape[1], *size)
    done = native_module().convolution1_grad_input(
        *_gradient(g),
        *_weights(w),
        *_slide(geometry),
        tuple(size),
        torch.get_num_threads(),
        out.permute(0, 2, 3, 1).numpy(),
        variant,
    )
    return out if done else None


def convolution_grad_weight(
    g: Codes, x: Codes, geometry: Geometry, kernel: tuple[int, int], variant: str | None = None
) -> torch.Tensor | None:
    """As ``products.convolution_grad_weight``; `variant` names the instruction set to use."""
    if not _takes(g, x) or geometry.groups != 1 or 0 in (*g.shape, *x.shape, *kernel):
        return None
    out = torch.empty(g.shape[1], x.shape[1], *kernel, dtype=torch.float32, device="cpu")
    done = native_module().convolution1_grad_weight(
        *_gradient(g),
        *_image(x),
        *_slide(geometry),
        tuple(kernel),
        torch.get_num_threads(),
        out.numpy(),
        variant,
    )
    return out if done else None


def _takes(g: Codes, other: Codes) -> bool:
    """Whether the backward kernels take such operands."""
    return g.bits in GRADIENT_BITS and g.affine.magnitudes == 0 and other.bits == 1


def _image(codes: Codes) -> tuple[object, ...]:
    return codes.data.numpy(), codes.shape, codes.pad, *codes.affine.arrays()


def _gradient(codes: Codes) -> tuple[object, ...]:
    """Images, and the width of their codes."""
    data, *others = _image(codes)
    return data, codes.bits, *others


def _weights(codes: Codes) -> tuple[object, ...]:
    return codes.data.numpy(), codes.shape, *codes.affine.arrays()


def _slide(geometry: Geometry) -> tuple[tuple[int, int], ...]:
    return geometry.stride, geometry.padding, geometry.dilation
