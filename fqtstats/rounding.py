"""Rounding of grid coordinates to integers: to the nearest, or stochastically.

A coordinate ``y`` lies between the grid points ``k = floor(y)`` and ``k + 1`` at fraction ``f = y - k``. Stochastic
rounding decides by comparing random integers with ``f`` and never by adding noise: ``floor(y + u)`` rounds the sum,
which biases it by up to 2^-17 steps at 8 bits in float32 and by most of a step in bfloat16.
"""

from __future__ import annotations

import torch

from fqtstats.random import Stream

__all__ = ["nearest", "stochastic", "up_probability"]

_PIECE = 1 << 16
"""Elements rounded at a time on a CPU: the temporaries stay in the cache instead of in freshly mapped memory."""


def nearest(y: torch.Tensor) -> torch.Tensor:
    """The nearest integer, ties to even; same shape and dtype as ``y``."""
    return torch.round(y)


def stochastic(
    y: torch.Tensor, stream: Stream, random_bits: int = 24, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Stochastic rounding: up if and only if ``bits < floor(f 2^n)`` for ``n = random_bits`` random bits per element.

    Args:
        y: coordinates, any shape, float32 or float64, ``|y| < 2^23``.
        stream: where the random bits come from; element ``i`` of ``y`` (row-major) uses number ``i``.
        random_bits: ``n``, 1 to 32.
        out: contiguous tensor for the result, ``y`` itself to round in place; by default new memory.

    Returns:
        Integer-valued tensor of ``y``'s shape and dtype. ``E = k + floor(f 2^n) / 2^n``: below ``y`` by less than
        ``2^-n``.
    """
    flat = y.reshape(-1)
    rounded = torch.empty_like(flat) if out is None else out.view(-1)
    piece = _PIECE if y.device.type == "cpu" else max(flat.numel(), 1)
    for start in range(0, flat.numel(), piece):
        part = flat[start : start + piece]
        low = part.floor()
        threshold = (part - low).mul_(2.0**random_bits).floor_()
        if random_bits <= 24:
            # Numbers below 2^24 are exact in float32, so the whole decision stays in one dtype and in place.
            bits = stream.bits(part.shape, random_bits, dtype=torch.int32, device=y.device, start=start).to(y.dtype)
            up = torch.lt(bits, threshold, out=threshold)
        else:
            up = stream.bits(part.shape, random_bits, device=y.device, start=start) < threshold.to(torch.int64)
        torch.add(low, up, out=rounded[start : start + piece])
    return rounded.view(y.shape)


def up_probability(y: torch.Tensor, random_bits: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact law of :func:`stochastic`: ``k`` (``y``'s dtype) and ``P(k + 1) = floor(f 2^n) / 2^n`` (float64)."""
    low = y.floor()
    threshold = (y - low).mul_(2.0**random_bits).floor_()
    return low, threshold.to(torch.float64).mul_(2.0**-random_bits)
