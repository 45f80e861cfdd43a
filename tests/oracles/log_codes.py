"""Logarithmic codes in plain torch operations, and their products by shifts alone.

Source: B. Chmiel et al., "Accurate Neural Training with 4-bit Matrix Multiplications at Standard Formats" (arXiv
2112.10769): points 0 and +-step 2^e for e < magnitudes; between two of them, and between 0 and the first, rounding is
stochastic in the linear distance.
"""

from __future__ import annotations

import numpy as np
import torch

from fqtstats.ops.codes import Affine, Codes


def step_of(low: torch.Tensor, high: torch.Tensor, magnitudes: int) -> torch.Tensor:
    """float32; a subnormal one is rounded up. 0 where all elements are equal, which are then given back as they are."""
    step = torch.maximum(low.abs(), high.abs()).double() / 2 ** (magnitudes - 1)
    smallest = 2.0**-149
    step = torch.where(step < 2.0**-126, torch.ceil(step / smallest) * smallest, step)
    return torch.where(low == high, 0.0, step).float()


def coordinates(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Piecewise linear: 0, 1, 2, .. at 0, step, 2 step, 4 step, .. ; every operation is rounded to float32."""
    lift = torch.where((step > 0) & (step.double() < 2.0**-100), 2.0**100, 1.0)
    scale = torch.where(step > 0, 1 / (step.double() * lift), 0.0).float()
    linear = (x * lift.float()) * scale
    mantissa, exponent = torch.frexp(linear.abs())  # mantissa in [1/2, 1)
    bent = (exponent - 1).float() + mantissa * 2
    return torch.where(linear.abs() < 1, linear, bent.copysign(linear))


def codes(y: torch.Tensor, bits: torch.Tensor | None, random_bits: int, magnitudes: int) -> torch.Tensor:
    """Of coordinates ``y``: up iff bits < floor(fraction 2^n); to nearest without ``bits``. uint8, ``y``'s shape."""
    if bits is None:
        k = torch.round(y)
    else:
        k = y.floor() + (bits.view(y.shape) < ((y - y.floor()) * 2.0**random_bits).floor().long())
    return (k + magnitudes).clamp(0, 2 * magnitudes).to(torch.uint8)


def encode(
    x: torch.Tensor, axis: int | None, magnitudes: int, bits: torch.Tensor | None, random_bits: int, pad=(0, 0)
) -> Codes:
    """Codes of ``x [N, C]`` or ``[N, C, H, W]`` with one step per index of ``axis``."""
    view = x.float().reshape(x.shape[0], x.shape[1], -1)
    shared = [i for i in range(3) if i != axis]
    low, high = view.amin(shared, keepdim=True), view.amax(shared, keepdim=True)
    step = step_of(low, high, magnitudes)
    k = codes(coordinates(view, step), bits, random_bits, magnitudes).view(x.shape)
    zero = torch.full((step.numel(),), magnitudes, dtype=torch.int32)
    constant = low == high
    affine = Affine(
        step.flatten(),
        zero,
        torch.where(constant, low, 0.0).flatten() if bool(constant.any()) else None,
        axis if step.numel() > 1 else None,
        magnitudes if magnitudes > 1 else 0,  # those of one are evenly spaced
    )
    return Codes.pack(k, next(b for b in (1, 2, 4, 8) if 2 * magnitudes < 1 << b), affine, pad)


def decode(codes: Codes) -> torch.Tensor:
    """By a table of the points."""
    affine, dim = codes.affine, len(codes.shape)
    assert affine.zero is not None
    powers = [2.0**e for e in range(int(affine.zero[0]))]
    points = torch.tensor([-p for p in reversed(powers)] + [0.0] + powers)
    x = points[codes.unpack().long()] * affine.along(affine.step, dim)
    return x if affine.offset is None else x + affine.along(affine.offset, dim)


def shifted(code: int, magnitudes: int, w: np.ndarray) -> np.ndarray:
    """What the number of a code, in steps, times the integers ``w`` is: shifts and signs, and no multiplication."""
    k = code - magnitudes
    if k == 0:
        return np.zeros_like(w)
    return w << (k - 1) if k > 0 else -(w << (-k - 1))


def product(a: np.ndarray, magnitudes: int, b: np.ndarray) -> np.ndarray:
    """``[M, N]`` int64: sums over k of the numbers of ``a [M, K]`` (codes) times the integers ``b [N, K]``."""
    out = np.zeros((len(a), len(b)), np.int64)
    for i, row in enumerate(a.tolist()):
        for k, code in enumerate(row):
            out[i] += shifted(code, magnitudes, b[:, k])
    return out
