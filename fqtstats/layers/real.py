"""The products of :mod:`fqtstats.ops.products` on real numbers: float32 or float64, in torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fqtstats.ops.codes import Geometry

__all__ = [
    "convolution",
    "convolution_grad_input",
    "convolution_grad_weight",
    "linear",
    "linear_grad_input",
    "linear_grad_weight",
]


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x w^T + bias``."""
    return F.linear(x, w, bias)


def linear_grad_input(g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``dx = g w``."""
    return g @ w


def linear_grad_weight(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``dw = g^T x``."""
    return g.t() @ x


def convolution(x: torch.Tensor, w: torch.Tensor, geometry: Geometry, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y``."""
    return F.conv2d(x, w, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def convolution_grad_input(g: torch.Tensor, w: torch.Tensor, geometry: Geometry, size: tuple[int, int]) -> torch.Tensor:
    """``dL/dx`` with ``size`` its height and width."""
    x = _unread(g, (g.shape[0], w.shape[1] * geometry.groups, *size))
    return _backward(g, x, w, geometry, (True, False, False))[0]


def convolution_grad_weight(
    g: torch.Tensor, x: torch.Tensor, geometry: Geometry, kernel: tuple[int, int]
) -> torch.Tensor:
    """``dL/dw`` with ``kernel`` its height and width."""
    w = _unread(g, (g.shape[1], x.shape[1] // geometry.groups, *kernel))
    return _backward(g, x, w, geometry, (False, True, False))[1]


def _unread(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of which only shape and memory format matter."""
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return torch.empty(
        shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _backward(
    g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, geometry: Geometry, mask: tuple[bool, bool, bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten.convolution_backward(
        g, x, w, None, geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], geometry.groups, mask
    )
    return out
