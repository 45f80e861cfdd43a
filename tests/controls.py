"""Deliberately wrong gradient quantizers: negative controls for every detector of bias or of dependence.

Each is called as ``f(x, stream)`` and breaks one thing about per-sample stochastic rounding (``psq``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fqtstats
from fqtstats.quantizers import AGP, PSQ
from fqtstats.quantizers.agp import Keep


def _grid(x, bits):
    """Lowest element and step of each row's affine grid, broadcast against ``x``."""
    rows = x.reshape(x.shape[0], -1)
    low, high = rows.amin(1), rows.amax(1)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
    shape = [-1, *[1] * (x.dim() - 1)]
    return low.view(shape), step.view(shape)


def _stochastic(y, stream):
    return y.floor() + (stream.uniform(y.shape) < y - y.floor())


def unbroken(bits=4):
    """None of the faults: what the others are compared with."""

    def f(x, stream):
        low, step = _grid(x, bits)
        return _stochastic((x - low) / step, stream) * step + low

    return f


def nearest(bits=4):
    """Rounds to the nearest grid point: no randomness, a bias of up to half a step per element."""

    def f(x, stream):
        low, step = _grid(x, bits)
        return ((x - low) / step).round() * step + low

    return f


def few_random_bits(r, bits=4):
    """Decides with ``r`` random bits: every element up to ``2^-r`` steps too low."""
    return fqtstats.quantizer("psq", bits=bits, random_bits=r)


def clipped(bits=4, share=0.001):
    """Clips the largest magnitudes (``share`` of the tensor, at least one element) before quantizing."""

    def f(x, stream):
        keep = max(1, x.numel() - max(1, round(share * x.numel())))
        limit = x.abs().reshape(-1).kthvalue(keep).values
        return unbroken(bits)(x.clamp(-limit, limit), stream)

    return f


def rounded_zero_point(bits=4):
    """Rounds the grid's offset to a whole number of steps when decoding: each row is shifted by up to half a step."""

    def f(x, stream):
        low, step = _grid(x, bits)
        return _stochastic((x - low) / step, stream) * step + (low / step).round() * step

    return f


def scaled_channel(bits=4, factor=1.1):
    """Multiplies channel 0 by ``factor``: one wrong scale among many right ones."""

    def f(x, stream):
        out = unbroken(bits)(x, stream)
        out[:, 0] *= factor
        return out

    return f


@dataclass(frozen=True)
class SharedNoise(PSQ):
    """Per-sample rounding with the same random numbers in every row: unbiased, but not independent as it claims."""

    def _round(self, y, stream):
        return _stochastic(y, _OneRow(stream))


class _OneRow:
    def __init__(self, stream):
        self._stream = stream

    def uniform(self, shape):
        return self._stream.uniform(shape[1:]).expand(shape)


def pruned(p=0.9):
    """Keeps each element with probability ``p`` and forgets to divide by it: shrinks the gradient to ``p g``."""

    def f(x, stream):
        return x * (stream.uniform(x.shape) < p)

    return f


def shared_numbers(over, shape, stream):
    """Uniform numbers ``[R, C]`` for a matrix, the same along each row, each column or in blocks of four by four.

    ``"antithetic"``: u and 1 - u in rows that are neighbours.
    """
    rows, columns = shape
    if over == "rows":
        return stream.uniform((rows, 1)).expand(rows, columns)
    if over == "columns":
        return stream.uniform((1, columns)).expand(rows, columns)
    u = stream.uniform((rows, columns))
    if over == "antithetic":
        u = u[::2].repeat_interleave(2, 0)[:rows]
        u[1::2] = 1 - 2.0**-24 - u[1::2]
        return u
    return u[::4, ::4].repeat_interleave(4, 0).repeat_interleave(4, 1)[:rows, :columns]


def noise_shared(over, bits=4):
    """Unbiased, but elements share their random numbers: see :func:`shared_numbers`."""

    def f(x, stream):
        low, step = _grid(x, bits)
        y = (x - low) / step
        u = shared_numbers(over, (x.shape[0], x[0].numel()), stream).reshape(x.shape)
        return (y.floor() + (u < y - y.floor())) * step + low

    return f


def added_in_bfloat16(x, s):
    """``floor(y + u)`` with the sum rounded to bfloat16."""
    low, step = _grid(x, 8)
    y = (x - low) / step
    return (y.bfloat16() + s.uniform(x.shape).bfloat16()).float().floor().clamp(0, 255) * step + low


def moved(rows, columns, by):
    """Adds ``by`` steps to some elements."""

    def f(x, s):
        _, step = _grid(x, 4)
        out = unbroken(4)(x, s)
        out[rows, columns] += by * step.expand(x.shape)[rows, columns]
        return out

    return f


def probability_off(x, s):
    """P(up) too large by 1 / 256."""
    low, step = _grid(x, 4)
    y = (x - low) / step
    return (y.floor() + (s.uniform(x.shape) < (y - y.floor() + 1 / 256).clamp(max=1))).clamp(0, 15) * step + low


@dataclass(frozen=True)
class Unscaled(AGP):
    """Prunes rows at random and does not divide those that stay by ``p``."""

    def _keep(self, probability):
        return Keep(probability, torch.ones_like(probability))


@dataclass(frozen=True)
class Literal(AGP):
    """Takes ``p = N R / (b sum R)`` as it is: where it exceeds 1, a row is kept and divided by it."""

    def _keep(self, probability):
        return Keep(probability.clamp(max=1), 1 / torch.where(probability > 0, probability, 1.0))

    def _probabilities(self, ranges):
        p = ranges * (len(ranges) / (self.bits * ranges.sum()))
        return (p * 2.0**24).round() * 2.0**-24


@dataclass(frozen=True)
class Rounded(AGP):
    """Divides by ``p`` rounded to two digits."""

    def _keep(self, probability):
        return Keep(probability, 1 / ((probability * 100).round() / 100).clamp(min=0.01))


def logarithmic_without_underflow(x, s):
    """What is below the smallest magnitude becomes zero: LUQ without its stochastic underflow."""
    return fqtstats.quantizer("luq", underflow="flush")(x, s)


def logarithmic_by_maximum(x, s):
    """Scales by max(x) in place of max|x|, and keeps to the format: negative numbers are cut off."""
    return fqtstats.quantizer("luq", maximum="hindsight", largest=float(x.max()))(x, s)


PRUNING = {
    "deterministic": fqtstats.quantizer("topk"),
    "not divided by p": Unscaled(),
    "literal p": Literal(),
    "p of two digits": Rounded(),
}
"""Faults of pruning, by name."""

LOGARITHMIC = {
    "flush and nearest": fqtstats.quantizer("flush"),
    "without underflow": logarithmic_without_underflow,
    "underflow alone": fqtstats.quantizer("luq", rounding="nearest"),
    "max for max|x|": logarithmic_by_maximum,
}
"""Faults of logarithmic quantizers, by name; to be judged where negative numbers dominate."""

DEFECTS = {
    "nearest": nearest(),
    **{f"{r} random bits": few_random_bits(r) for r in (2, 4, 8, 12, 16)},
    "p off by 1/256": probability_off,
    "clipped": clipped(),
    "rounded zero point": rounded_zero_point(),
    "channel scaled by 1.01": scaled_channel(factor=1.01),
    "row off": moved(3, slice(None), 0.1),
    "element off": moved(3, 5, 0.1),
    "pruned": pruned(),
    "bfloat16 addition": added_in_bfloat16,
}
"""By name."""
