"""What the tests of quantized layers share: policies, layers with known parameters, inputs and a tolerance.

Tolerance of every comparison of sums: ``ULPS`` units in the last place of the largest element of the reference, in the
dtype of what is compared. The operands are the same bit for bit; only the order of summation may differ.
"""

from __future__ import annotations

import torch

import fqtstats
from fqtstats import Policy, quantizer

ULPS = 8

QA, QW = quantizer("minmax", bits=4), quantizer("zero_on_grid", bits=3)
FORWARD = {"activation": QA, "weight": QW}
FQT = Policy(**FORWARD, grad_input=quantizer("psq", bits=3), grad_weight=quantizer("psq", bits=3))


def qa(x):
    return QA(x, fqtstats.stream())


def qw(w):
    return QW(w, fqtstats.stream())


def identity(x, stream):
    return x


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def assert_near(got, expected, ulps=ULPS, largest=None, slack=0.0):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    scale = float(expected.detach().abs().max() if largest is None else largest) * torch.finfo(expected.dtype).eps
    assert float((got.detach().double() - expected.detach().double()).abs().max()) <= ulps * scale + slack


def filled(layer, seed=1):
    """The layer with parameters that do not depend on torch's global generator."""
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(gaussian(*p.shape, seed=seed + i) / p[0].numel() ** 0.5)
    return layer
