"""Rounding of grid coordinates to integers: to the nearest, or stochastically.

A coordinate ``y`` lies between the grid points ``k = floor(y)`` and ``k + 1`` at fraction ``f = y - k``. Stochastic
rounding decides by comparing random integers with ``f`` and never by adding noise: ``floor(y + u)`` rounds the sum,
which biases it by up to 2^-17 steps at 8 bits in float32 and by most of a step in bfloat16.
"""

from __future__ import annotations

import torch

from fqtstats.random import Stream

__all__ = ["nearest", "stochastic", "up_probability"]


def nearest(y: torch.Tensor) -> torch.Tensor:
    """The nearest integer, ties to even; same shape and dtype as ``y``."""
    return torch.round(y)


def stochastic(y: torch.Tensor, stream: Stream, random_bits: int = 24) -> torch.Tensor:
    """Stochastic rounding: up if and only if ``bits < floor(f 2^n)`` for ``n = random_bits`` random bits per element.

    Args:
        y: coordinates, any shape, float32 or float64, ``|y| < 2^23``.
        stream: where the random bits come from; element ``i`` of ``y`` (row-major) uses number ``i``.
        random_bits: ``n``, 1 to 32.

    Returns:
        Integer-valued tensor of ``y``'s shape and dtype. ``E = k + floor(f 2^n) / 2^n``: below ``y`` by less than
        ``2^-n``.
    """
    low = y.floor()
    threshold = (y - low).mul_(2.0**random_bits).floor_()
    if random_bits <= 24:
        # Numbers below 2^24 are exact in float32, so the whole decision stays in one dtype and in place.
        bits = stream.bits(y.shape, random_bits, dtype=torch.int32, device=y.device).to(y.dtype)
        return low.add_(torch.lt(bits, threshold, out=threshold))
    bits = stream.bits(y.shape, random_bits, device=y.device)
    return low.add_(bits < threshold.to(torch.int64))


def up_probability(y: torch.Tensor, random_bits: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact law of :func:`stochastic`: ``k`` (``y``'s dtype) and ``P(k + 1) = floor(f 2^n) / 2^n`` (float64)."""
    low = y.floor()
    threshold = (y - low).mul_(2.0**random_bits).floor_()
    return low, threshold.to(torch.float64).mul_(2.0**-random_bits)
