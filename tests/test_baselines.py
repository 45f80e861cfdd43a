"""What other gradient quantizers are compared with: DoReFa's, per-tensor INT4, and the biased controls.

Everything here is exact but the agreement with DoReFa's formula, which states its false-alarm rate. What holds for all
quantizers is in test_quantizers.py.
"""

from __future__ import annotations

import pytest
import torch

import fqtstats
from fqtstats.quantizers import QUANTIZERS, quantizer
from fqtstats.random import stream


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_exact_zero_costs_dorefa_the_same(bits):
    """``m^2 / B^2``: B is odd, so that zero lies in the middle of a bin. PTQ with zero on its grid: nothing."""
    x = gaussian(8, 64) * (gaussian(8, 64, seed=1) > 1)
    m, levels = x.abs().amax(1, keepdim=True), 2**bits - 1
    cost = (m / levels).square().expand_as(x)
    variance = quantizer("dorefa", bits=bits).variance(x)
    torch.testing.assert_close(variance[x == 0], cost[x == 0], rtol=1e-6, atol=0)
    assert bool((variance <= cost * (1 + 1e-6)).all())
    if bits > 1:
        assert not quantizer("ptq", bits=bits).variance(x)[x == 0].any()


def test_dorefa_is_its_formula():
    """``2 m [q_k(g / (2 m) + 1/2 + noise) - 1/2]``, clamped, has the same points and the same P(up).

    20000 draws of 30 numbers: within 6 deviations of a frequency, false alarms 6e-8.
    """
    g, bits, draws = gaussian(1, 30), 3, 20_000
    levels, m = 2**bits - 1, float(g.abs().max())
    noise = (torch.rand(draws, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5) / levels
    formula = 2 * m * ((levels * (g / (2 * m) + 0.5 + noise).clamp(0, 1)).round() / levels - 0.5)
    q = quantizer("dorefa", bits=bits)
    ours = torch.cat([q(g, stream(draw=i)) for i in range(200)])
    points = set(((ours / m + 1) * levels / 2).round().long().view(-1).tolist())
    assert points <= set(range(levels + 1))
    deviation = (q.variance(g) / draws).sqrt()
    assert bool(((formula.mean(0) - q.mean(g)).abs() <= 6 * deviation + 1e-12).all())
    torch.testing.assert_close(formula.var(0, correction=0), q.variance(g)[0], rtol=0.1, atol=1e-3 * m**2)


def test_rows_without_range():
    q = quantizer("dorefa", bits=2)
    x = torch.cat([torch.zeros(1, 5), torch.full((1, 5), -0.7), gaussian(2, 5).float()])
    out = q(x, stream())
    assert torch.equal(out[:2], x[:2])
    assert not q.variance(x)[:2].any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_int4_is_symmetric(bits):
    """One step for the tensor, ``max|x| / (2^(b-1) - 1)``; zeros stay zeros."""
    x = gaussian(16, 40).float() * (gaussian(16, 40, seed=1) > 0)
    q = quantizer("int4_sr", bits=bits)
    step = x.abs().max() / (2 ** (bits - 1) - 1)
    out = q(x, stream())
    assert not out[x == 0].any()
    torch.testing.assert_close(out / step, (out / step).round(), rtol=0, atol=1e-4)
    assert bool(((out - x).abs() <= step * (1 + 1e-6)).all())
    assert quantizer("int4_sr").bits == 4


def test_controls_are_biased_by_as_much_as_they_lose():
    """Exact relative biases ``||E - x|| / ||x||`` on heavy-tailed rows, from their definitions."""
    x = gaussian(64, 32) * torch.exp(gaussian(64, 1, seed=1))
    ranges = x.amax(1) - x.amin(1)
    largest = torch.topk(ranges, 16).indices
    without = x.clone()
    without[largest] = 0
    step = (ranges / 15).view(-1, 1)
    low = x.amin(1, keepdim=True)
    lost = {
        "topk": without,
        "nearest": ((x - low) / step).round() * step + low - x,
    }
    for name, expected in lost.items():
        bias = quantizer(name, bits=4).mean(x) - x
        assert float(bias.norm() / x.norm()) == pytest.approx(float(expected.norm() / x.norm()), rel=1e-6)
    assert float(without.norm() / x.norm()) > 0.2


@pytest.mark.parametrize("name", ["nearest", "flush", "topk"])
def test_controls_are_registered_as_biased_gradient_quantizers(name):
    assert QUANTIZERS[name].role == "gradient"
    assert quantizer(name).claim == "biased"
    policy = fqtstats.policies.get(f"statquant-{name}", bits=4)
    assert policy.grad_input.name == name
