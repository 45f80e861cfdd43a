"""Oracles of the forward quantizers: plain loops for their numbers, autograd through straight-through rounding for
their gradients. Nothing here knows how the library does it.
"""

from __future__ import annotations

import math

import torch


class _Value(torch.autograd.Function):
    """The first argument's value, with the gradient of the second."""

    @staticmethod
    def forward(ctx, value, x):
        return value.clone()

    @staticmethod
    def backward(ctx, g):
        return None, g


def with_value(value, x):
    return _Value.apply(value.detach(), x)


def straight_through_round(x):
    return with_value(x.round(), x)


# --- LSQ (arXiv 1902.08153) -------------------------------------------------------------------------------------------


def lsq_range(bits, signed):
    """``Qn, Qp``."""
    return (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def lsq_start(v, positive):
    """The first step for all of ``v``."""
    values = v.detach().double().reshape(-1).tolist()
    return 2 * math.fsum(abs(a) for a in values) / len(values) / math.sqrt(positive)


def lsq(v, s, bits, signed, numbers):
    """Differentiable; ``s`` broadcasts against ``v``; ``numbers`` are those that share a step."""
    negative, positive = lsq_range(bits, signed)
    s = with_value(s, s / math.sqrt(numbers * positive))  # section 2.2: only the gradient is scaled
    return straight_through_round((v / s).clamp(-negative, positive)) * s


# --- SAWB (arXiv 2112.10769) ------------------------------------------------------------------------------------------


def sawb(x, on):
    values = x.detach().double().reshape(-1).tolist()
    rms = math.sqrt(math.fsum(a * a for a in values) / len(values))
    clip = 12.1 * rms - 12.2 * math.fsum(abs(a) for a in values) / len(values)
    if clip <= 0:
        clip = max(abs(a) for a in values)
    lowest, levels = (-7, 7) if on == "weight" else (0, 15)
    codes = [max(lowest, min(levels, round(a / clip * levels))) if clip > 0 else 0 for a in values]
    return with_value(torch.tensor([c * clip / levels for c in codes], dtype=x.dtype).view(x.shape), x)


# --- signs (arXiv 2408.14267) -----------------------------------------------------------------------------------------


def sign(x, scale=None):
    """Times the mean magnitude of each output channel where ``scale`` is ``"own"``."""
    value = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    if scale == "own":
        value = value * x.detach().abs().flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1))
    return with_value(value, x.clamp(-1, 1))


# --- DoReFa (arXiv 1908.04680) ----------------------------------------------------------------------------------------


def dorefa_activation(x, bits):
    levels = 2**bits - 1
    return straight_through_round(x.clamp(0, 1) * levels) / levels


def dorefa_weight(w, bits):
    if not bool(w.any()):
        return w
    if bits == 1:
        return with_value(torch.where(w >= 0, 1.0, -1.0).to(w.dtype) * w.detach().abs().mean(), w)
    levels, t = 2**bits - 1, torch.tanh(w)
    return 2 * straight_through_round((t / (2 * t.abs().amax()) + 0.5) * levels) / levels - 1
