"""What lies between two convolutions, in one pass: batch normalization, ReLU, 2x2 max pooling, quantization.

And the adjoint, in two.

Shape legend: ``y [N, C, H, W]`` float32 in channels-last memory is a convolution's output, R = N H W its pixels per
channel; ``[N, C, OH, OW]`` is the shape after pooling, H and W without it.

    t = a y + b         per channel, a product and a sum, each rounded to float32
    x = relu(t)         if ``relu``
    x = max_pool2d(x, 2)   if ``pool``

Sums are float64 over blocks of 64 consecutive pixels (in N, H, W order, those of the output), one pixel after the
other, then one block after the other, whatever the number of threads. The native kernels give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fqtstats.errors import InputError
from fqtstats.ops.codes import Affine, Codes, empty_codes, empty_images, row_bytes
from fqtstats.ops.extension import native_module

if TYPE_CHECKING:
    from fqtstats.quantizers.grid import Grid

__all__ = [
    "Adjoint",
    "Map",
    "Moments",
    "apply",
    "bits",
    "encode",
    "extremes",
    "gradient",
    "gradient_sums",
    "moments",
    "signs",
]

_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Map:
    """From ``y`` to ``x``.

    Attributes:
        a, b: ``[C]`` float32.
        relu, pool: whether ReLU and 2x2 max pooling follow.
        passes: ``(low, top)``: gradients of ``x`` pass where ``low < x <= top``, as the quantizer behind it has it.
    """

    a: torch.Tensor
    b: torch.Tensor
    relu: bool
    pool: bool
    passes: tuple[float, float] = (-math.inf, math.inf)

    @property
    def floor(self) -> float:
        """The smallest value of ``x``."""
        return 0.0 if self.relu else float("-inf")

    @property
    def opening(self) -> tuple[float, float]:
        """Gradients of ``t`` pass where it is above the first and not above the second number."""
        return max(self.floor, self.passes[0]), self.passes[1]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """``(OH, OW)``."""
        return (height // 2, width // 2) if self.pool else (height, width)


@dataclass(frozen=True, slots=True)
class Moments:
    """Of every channel of ``y``.

    Attributes:
        mean: ``[C]`` float64.
        square: ``[C]`` float64: sum of squared deviations from the mean.
        low, high: ``[C]`` float32: minimum and maximum, NaN both where ``y`` holds NaN or Inf.
    """

    mean: torch.Tensor
    square: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


@dataclass(frozen=True, slots=True)
class Adjoint:
    """``dL/dy = ((h - p) - (y - mean) q) r``, where ``h`` is ``dL/dx`` taken back to ``t``; ``[C]`` float32 each."""

    mean: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor
    r: torch.Tensor


def moments(y: torch.Tensor, *, variant: str | None = None) -> Moments:
    """Mean, sum of squared deviations, minimum and maximum of every channel of ``y``, in one pass.

    The sums are of ``y`` minus the first pixel's value, in float64: a mean far from 0 costs no digits.
    """
    inner = _inner("y", y)
    rows = inner.reshape(-1, y.shape[1])
    if rows.shape[0] == 0:
        raise InputError(f"expected at least one pixel, got y of shape {list(y.shape)}")
    native = _native(y)
    if native is None:
        d = rows.double() - rows[0].double()
        total, square = _block_sums(d), _block_sums(d * d)
        low, high = rows.amin(0), rows.amax(0)
        bad = ~torch.isfinite(total)
        low, high = (torch.where(bad, float("nan"), t) for t in (low, high))
    else:
        total, square = rows.new_empty(2, rows.shape[1], dtype=torch.float64)
        low, high = rows.new_empty(2, rows.shape[1])
        arrays = (t.numpy() for t in (rows, total, square, low, high))
        native.fused_moments(*arrays, torch.get_num_threads(), variant)
    mean = total / rows.shape[0]
    return Moments(rows[0] + mean, square - total * mean, low, high)


def extremes(y: torch.Tensor, m: Moments, f: Map, *, variant: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest ``x`` of every channel, ``[C]`` float32, exactly; NaN where ``y`` holds NaN or Inf.

    Per channel ``x`` is monotone in ``y``, also after rounding: without pooling the moments know the extremes of ``y``
    already, with it one more pass finds those of the windows' largest (for ``a < 0``: smallest) ``y``.
    """
    low, high = m.low, m.high
    if f.pool:
        sign = torch.ones_like(f.a).masked_fill_(f.a < 0, -1)
        low, high = (t * sign for t in _window_extremes(y, f.a < 0, variant))
        low, high = (torch.where(torch.isnan(m.low), m.low, t) for t in (low, high))
    ends = torch.stack([low, high]).mul_(f.a).add_(f.b)
    if f.relu:
        ends = ends.clamp_(min=0)
    first, second = torch.aminmax(ends, dim=0)
    return first, second


def encode(y: torch.Tensor, f: Map, grid: Grid, pad: tuple[int, int], *, variant: str | None = None) -> Codes:
    """8-bit codes of ``x`` on a grid of one group: ``clamp(round(((x - offset) * prescale) * scale) + zero)``.

    Args:
        y: finite.
        f: from ``y`` to ``x``.
        grid: of one group, float32; it covers ``x``.
        pad: pixels around every image.
        variant: of the kernel.
    """
    inner = _inner("y", y)
    n, c, *space = y.shape
    height, width = f.size(*space)
    offset, prescale, zero = (
        default if t is None else float(t)
        for t, default in ((grid.offset, 0.0), (grid.prescale, 1.0), (grid.zero, 0.0))
    )
    affine = Affine(
        step=grid.step.flatten(),
        zero=None if grid.zero is None else grid.zero.flatten().to(torch.int32),
        offset=None if grid.offset is None else grid.offset.flatten(),
    )
    native = _native(y)
    if native is None:
        coordinates = apply(y, f).sub_(offset).mul_(prescale).mul_(float(grid.scale))
        codes = coordinates.round_().add_(zero).clamp_(0, grid.levels).to(torch.uint8)
        return Codes.pack(codes, 8, affine, pad)
    size = (n, height + 2 * pad[0], width + 2 * pad[1], row_bytes(c, 8))
    data = torch.empty(size, dtype=torch.uint8, device="cpu")
    native.fused_encode(
        inner.numpy(),
        *_map(f),
        offset,
        prescale,
        float(grid.scale),
        int(zero),
        grid.levels,
        *pad,
        data.numpy(),
        torch.get_num_threads(),
        variant,
    )
    return Codes(data, 8, (n, c, height, width), pad, affine)


def bits(
    y: torch.Tensor, f: Map, threshold: float, affine: Affine, pad: tuple[int, int], *, variant: str | None = None
) -> Codes:
    """1-bit codes of ``x``: 1 where ``x >= threshold``, else 0.

    Args:
        y: finite.
        f: from ``y`` to ``x``.
        threshold: a float32 number.
        affine: what the codes mean.
        pad: pixels of zeros around every image.
        variant: of the kernel.
    """
    inner = _inner("y", y)
    n, c, *space = y.shape
    height, width = f.size(*space)
    native = _native(y)
    if native is None:
        return Codes.pack((apply(y, f) >= threshold).to(torch.uint8), 1, affine, pad)
    data = empty_codes((n, c, height, width), 1, pad)
    native.fused_bits(inner.numpy(), *_map(f), threshold, *pad, data.numpy(), torch.get_num_threads(), variant)
    return Codes(data, 1, (n, c, height, width), pad, affine)


def signs(w: torch.Tensor, affine: Affine, *, variant: str | None = None) -> Codes | None:
    """1-bit codes of a weight ``[O, C]`` or ``[O, C, kh, kw]``, 1 where it is at least 0; None: not finite."""
    if _native(w) is None:
        finite = bool(torch.isfinite(w).all())
        return Codes.pack((w >= 0).to(torch.uint8), 1, affine) if finite else None
    shape = tuple(w.shape)
    data = empty_codes(shape, 1, (0, 0))
    o, c, taps = shape[0], shape[1], math.prod(shape[2:])
    arrays = w.detach().contiguous().view(o, c, taps).numpy(), data.view(o, taps, -1).numpy()
    if not native_module().fused_signs(*arrays, torch.get_num_threads(), variant):
        return None
    return Codes(data if len(shape) == 4 else data.view(o, -1), 1, shape, (0, 0), affine)


def apply(y: torch.Tensor, f: Map, *, variant: str | None = None) -> torch.Tensor:
    """``x [N, C, OH, OW]`` float32 in channels-last memory of its own."""
    inner = _inner("y", y)
    native = _native(y)
    if native is None:
        t = y * _columns(f.a) + _columns(f.b)
        x = t.clamp_(min=0) if f.relu else t
        x = F.max_pool2d(x, 2) if f.pool else x
        return x.contiguous(memory_format=torch.channels_last)
    n, c, *space = y.shape
    out = empty_images(n, c, *f.size(*space))
    native.fused_apply(inner.numpy(), *_map(f), _inner("out", out).numpy(), torch.get_num_threads(), variant)
    return out


def gradient_sums(
    g: torch.Tensor, y: torch.Tensor, f: Map, mean: torch.Tensor, *, variant: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum h`` and ``sum h (y - mean)`` of every channel: ``[C]`` float64 each.

    Args:
        g: ``dL/dx [N, C, OH, OW]`` in channels-last memory.
        y: finite.
        f: from ``y`` to ``x``.
        mean: ``[C]`` float32.
        variant: of the kernel.
    """
    inner, incoming = _inner("y", y), _incoming(g, y, f)
    native = _native(y)
    if native is None:
        h, at = _selected(g, y, f)
        d = (at - mean).double()
        return _block_sums(h.double()), _block_sums(h.double() * d)
    total, dot = y.new_empty(2, y.shape[1], dtype=torch.float64)
    native.fused_gradient_sums(
        incoming.numpy(),
        inner.numpy(),
        *_adjoint_map(f),
        mean.numpy(),
        total.numpy(),
        dot.numpy(),
        torch.get_num_threads(),
        variant,
    )
    return total, dot


def gradient(
    g: torch.Tensor,
    y: torch.Tensor,
    f: Map,
    adjoint: Adjoint,
    *,
    out: torch.Tensor | None = None,
    variant: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``dL/dy`` and the extremes of every image and channel of it.

    Args:
        g: ``dL/dx [N, C, OH, OW]`` in channels-last memory.
        y: finite.
        f: from ``y`` to ``x``.
        adjoint: coefficients.
        out: memory for the result, ``y``'s shape, channels last; by default new.
        variant: of the kernel.

    Returns:
        ``dL/dy`` (``y``'s shape, channels last), and minimum and maximum ``[N, C]``, NaN where it holds NaN.
    """
    inner, incoming = _inner("y", y), _incoming(g, y, f)
    if out is None:
        out = torch.empty_like(y, memory_format=torch.channels_last)
    native = _native(y)
    if native is None:
        h = _spread(g, y, f)
        mean, p, q, r = (_columns(t) for t in (adjoint.mean, adjoint.p, adjoint.q, adjoint.r))
        out.copy_(((h - p) - (y - mean) * q) * r)
        return out, out.amin((2, 3)), out.amax((2, 3))
    low, high = y.new_empty(2, *y.shape[:2])
    native.fused_gradient(
        incoming.numpy(),
        inner.numpy(),
        *_adjoint_map(f),
        adjoint.mean.numpy(),
        adjoint.p.numpy(),
        adjoint.q.numpy(),
        adjoint.r.numpy(),
        _inner("out", out).numpy(),
        low.numpy(),
        high.numpy(),
        torch.get_num_threads(),
        variant,
    )
    return out, low, high


def _native(y: torch.Tensor) -> Any:
    return native_module() if y.device.type == "cpu" else None


def _inner(name: str, x: torch.Tensor) -> torch.Tensor:
    """``[N, H, W, C]``, contiguous."""
    if x.dim() != 4 or x.dtype != torch.float32:
        raise InputError(f"expected {name} [N, C, H, W] float32, got {list(x.shape)} {x.dtype}")
    inner = x.detach().permute(0, 2, 3, 1)
    if not inner.is_contiguous():
        raise InputError(f"expected {name} in channels-last memory, got strides {x.stride()} for {list(x.shape)}")
    return inner


def _incoming(g: torch.Tensor, y: torch.Tensor, f: Map) -> torch.Tensor:
    expected = (*y.shape[:2], *f.size(y.shape[2], y.shape[3]))
    if g.shape != expected:
        raise InputError(f"expected g of shape {list(expected)}, got {list(g.shape)}")
    return _inner("g", g)


def _map(f: Map) -> tuple[Any, Any, float, bool]:
    return f.a.numpy(), f.b.numpy(), f.floor, f.pool


def _adjoint_map(f: Map) -> tuple[Any, Any, float, float, bool]:
    return f.a.numpy(), f.b.numpy(), *f.opening, f.pool


def _columns(values: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, 1, 1)


def _block_sums(rows: torch.Tensor) -> torch.Tensor:
    """Sums of the columns of ``[R, C]`` float64 in the prescribed order."""
    count, channels = rows.shape
    blocks = -(-count // _BLOCK)
    # A final zero changes no sum.
    padded = F.pad(rows, (0, 0, 0, blocks * _BLOCK - count)).view(blocks, _BLOCK, channels)
    partial = rows.new_zeros(blocks, channels)
    for i in range(_BLOCK):
        partial += padded[:, i]
    total = rows.new_zeros(channels)
    for row in partial:
        total += row
    return total


def _windows(x: torch.Tensor) -> torch.Tensor:
    """``[N, OH, OW, C, 4]``: the pixels of the 2x2 windows of ``[N, C, H, W]``, row by row."""
    windows = x.unfold(2, 2, 2).unfold(3, 2, 2)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(-2)


def _window_extremes(y: torch.Tensor, flip: torch.Tensor, variant: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    native = _native(y)
    if native is None:
        largest = _windows(torch.where(_columns(flip), -y, y)).amax(-1).flatten(0, 2)
        return largest.amin(0), largest.amax(0)
    low, high = y.new_empty(2, y.shape[1])
    signs = flip.to(torch.int32) << 31
    arrays = (t.numpy() for t in (_inner("y", y), signs, low, high))
    native.fused_window_extremes(*arrays, torch.get_num_threads(), variant)
    return low, high


def _open(t: torch.Tensor, f: Map) -> torch.Tensor:
    low, top = f.opening
    return (t > low) & ~(t > top)


def _selected(g: torch.Tensor, y: torch.Tensor, f: Map) -> tuple[torch.Tensor, torch.Tensor]:
    """``h`` and ``y`` at the pixels that ``x`` comes from, ``[N OH OW, C]`` each."""
    t = y * _columns(f.a) + _columns(f.b)
    h = g.permute(0, 2, 3, 1)
    if f.pool:
        windows = _windows(t)
        which = windows.argmax(-1, keepdim=True)
        t, at = windows.gather(-1, which).squeeze(-1), _windows(y).gather(-1, which).squeeze(-1)
    else:
        t, at = t.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
    h = torch.where(_open(t, f), h, 0.0)
    return h.flatten(0, 2), at.flatten(0, 2)


def _spread(g: torch.Tensor, y: torch.Tensor, f: Map) -> torch.Tensor:
    """``h [N, C, H, W]``: ``g`` at the pixels that ``x`` comes from, 0 elsewhere."""
    t = y * _columns(f.a) + _columns(f.b)
    if not f.pool:
        return torch.where(_open(t, f), g, 0.0)
    largest, which = F.max_pool2d(t, 2, return_indices=True)
    h = torch.where(_open(largest, f), g, 0.0)
    flat = torch.zeros_like(t, memory_format=torch.contiguous_format).flatten(2)
    return flat.scatter_(2, which.flatten(2), h.flatten(2)).view(t.shape)
