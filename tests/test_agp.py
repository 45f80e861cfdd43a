"""Pruning of whole groups: probabilities, law, covariance, storage, edges, and what planted faults do.

What is exact here has no false alarms; stochastic tests state theirs.
"""

from __future__ import annotations

import math

import controls
import layer_cases
import numpy as np
import pytest
import small
import torch
from oracles import pruning as oracle
from torch import nn

import fqtstats
from fqtstats.capture import Session
from fqtstats.errors import InputError, NonFiniteError
from fqtstats.estimators.exact import (
    Roundings,
    bias_variance,
    factors_input_total,
    input_total,
    summed,
    weight_variance,
)
from fqtstats.layers.operand import images
from fqtstats.layers.state import WeightGradient
from fqtstats.quantizers import quantizer
from fqtstats.quantizers.agp import AGP, keep_probabilities
from fqtstats.random import stream
from fqtstats.verdicts.expectation import exact_mean, law
from fqtstats.verdicts.products import check_products


def rows(n=64, d=32, sigma=1.5, seed=0, dtype=torch.float32):
    """Gaussian rows with lognormal scales."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return (x * torch.exp(sigma * torch.randn(n, 1, generator=g, dtype=torch.float64))).to(dtype)


def ranges(x):
    return (x.amax(1) - x.amin(1)).double()


# --- probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 4.0])
def test_probabilities_fill_up(bits, sigma):
    for n in (1, 2, 3, 10, 64, 257):
        r = ranges(rows(n, 8, sigma, seed=n))
        p = keep_probabilities(r, bits)
        assert float(p.max()) <= 1
        assert float(p.min()) > 0
        assert float(p.sum()) == pytest.approx(n / bits, abs=n * 2.0**-23)
        expected = torch.tensor(oracle.water_filled(r.tolist(), bits), dtype=torch.float64)
        torch.testing.assert_close(p, expected, rtol=0, atol=2.0**-23)
        assert torch.equal(p * 2**24, (p * 2**24).round())
        assert torch.equal(p, keep_probabilities(r * 2.0**40, bits))


def test_rows_of_nothing_beside_the_largest_keep_the_smallest_probability():
    r = torch.tensor([1e300] + [1e-300] * 7, dtype=torch.float64)
    p = keep_probabilities(r, 4)
    assert float(p[0]) == 1
    assert torch.equal(p[1:], torch.full((7,), float(p[1]), dtype=torch.float64))
    assert float(p.sum()) == pytest.approx(2, abs=8 * 2.0**-24)


def test_few_rows_that_are_not_zero_are_all_kept():
    r = torch.zeros(16, dtype=torch.float64)
    r[[2, 5, 11]] = torch.tensor([1.0, 1e-9, 3.0], dtype=torch.float64)
    assert torch.equal(keep_probabilities(r, 4), (r > 0).double())
    assert float(keep_probabilities(r, 8).sum()) == pytest.approx(2, abs=1e-6)


# --- the law ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", ["sample", "channel"])
def test_mean_variance_and_covariance(bits, groups):
    """``[step^2 f (1 - f) + x^2 (1 - p)] / p``, and ``x_j x_k (1 - p) / p`` between elements of a group."""
    q = quantizer("agp", bits=bits, groups=groups)
    x = rows(sigma=0.5, dtype=torch.float64)
    x = x if groups == "sample" else x.T.contiguous()
    table = (x if groups == "sample" else x.T).tolist()
    expected = torch.tensor(oracle.pruned_variance(table, bits), dtype=torch.float64)
    expected = expected if groups == "sample" else expected.T
    # P(up) and p are multiples of 2^-24.
    scale = expected.amax(1 if groups == "sample" else 0, keepdim=True)
    assert bool(((q.variance(x) - expected).abs() <= 1e-5 * scale).all())
    torch.testing.assert_close(q.mean(x), x, rtol=1e-5, atol=1e-6)
    assert float(q.variance(x).sum()) <= q.bound(x)
    if bits != 4:
        return
    # Drawn: 2000 draws of a product with fixed weights, whose variance the covariance decides. It is a sum over 64
    # groups, of a kurtosis below 4, so that 6 relative deviations sqrt(3 / 2000) of the variance are .23: false alarms
    # 2e-9. Finds a variance off by .6; control: the one that elements independent of each other would give.
    noise = q.noise(x)
    weights = torch.where(x.view(noise.variance.shape) > 0, 1.0, -0.2)
    axes = (1, 2) if groups == "sample" else (0, 2)
    own = (weights.square() * noise.variance).sum(axes)
    shared = (weights * noise.factors.signal).sum(axes).square() * noise.factors.variance.view(-1)
    predicted = float((own + shared).sum())
    sums = [(weights.view(x.shape) * (q(x, stream(draw=i)) - x)).sum().item() for i in range(2000)]
    assert np.var(sums) == pytest.approx(predicted, rel=0.3)
    independent = float((weights.square() * noise.elementwise).sum())
    assert abs(np.var(sums) - independent) > 0.3 * independent  # control


def test_published_bound_is_violated_and_ours_holds():
    """The published one leaves out what dropping rows does; heavy-tailed rows, b = 4."""
    for seed in range(10):
        x = rows(128, 64, sigma=1.0, seed=seed)
        q = quantizer("agp", bits=4)
        variance = float(q.variance(x).sum())
        assert variance > 5 * q.published_bound(x)
        assert variance <= q.bound(x)


@pytest.mark.parametrize("scale", [1e-38, 1e-42, 1e-44])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_bound_holds_for_subnormal_numbers(scale, bits):
    q = quantizer("agp", bits=bits)
    for seed in range(10):
        x = rows(24, 30, sigma=0.5, seed=seed) * scale
        assert float(q.variance(x).sum()) <= q.bound(x)


def test_four_bits_are_best():
    """On heavy-tailed rows, of the paper's 2, 4 and 8 bits."""
    for seed in range(10):
        x = rows(128, 64, sigma=1.5, seed=seed)
        variance = {bits: float(quantizer("agp", bits=bits).variance(x).sum()) for bits in (2, 4, 8)}
        assert variance[4] < min(variance[2], variance[8])


@pytest.mark.parametrize("groups", ["sample", "channel"])
def test_probed_mean_and_variance(groups):
    q, x = quantizer("agp", groups=groups), rows(24, 40).view(24, 10, 4)
    found = law(q, x)
    assert found.shared.axis == (0 if groups == "sample" else 1)
    torch.testing.assert_close(found.mean, q.mean(x), rtol=0, atol=1e-13)
    torch.testing.assert_close(found.variance, q.variance(x), rtol=1e-9, atol=1e-15)
    probability = found.shared.states[0].probability
    assert torch.equal(probability[probability < 1], q.keep(x).probability[q.keep(x).probability < 1])


def test_as_many_samples_as_channels():
    """Which of the two share a number is found by trying."""
    x = rows(16, 16)
    for groups in ("sample", "channel"):
        verdict = fqtstats.check_unbiased(quantizer("agp", groups=groups), x)
        assert verdict.ok, verdict
        assert verdict.method == f"exact over {groups}s and elements"


# --- the user's own ---------------------------------------------------------------------------------------------------


def test_the_users_own_pruning_is_probed_too():
    x = rows(20, 24)

    def own(x, s):
        kept = s.child("rows").uniform((len(x), 1)) < 0.25
        return controls.unbroken()(x, s) * kept / 0.25

    torch.testing.assert_close(exact_mean(own, x), x.double(), rtol=1e-5, atol=1e-4)
    verdict = fqtstats.check_unbiased(own, x)
    assert verdict.unbiased
    assert verdict.independent is False
    assert "has no factor_groups that says so" in verdict.evidence
    own.factor_groups = "sample"
    verdict = fqtstats.check_unbiased(own, x)
    assert verdict.ok
    assert verdict.independent == "between groups"
    dropout = fqtstats.check_unbiased(lambda x, s: x * (s.uniform((len(x), 1)) < 0.5) / 0.5, x)
    assert dropout.unbiased
    assert dropout.method == "exact over samples and elements"


@pytest.mark.parametrize("defect", controls.PRUNING)
def test_defects_are_found_without_sampling(defect):
    verdict = fqtstats.check_unbiased(controls.PRUNING[defect], rows(32, 96))
    assert not verdict.unbiased
    assert verdict.draws == 0
    assert "by probing" in verdict.evidence


def test_rounding_that_elements_share_is_still_dependence():
    class OneNumber(AGP):
        @property
        def rounding(self):
            return controls.SharedNoise(self.bits, self.random_bits)

    verdict = fqtstats.check_unbiased(OneNumber(), rows(32, 96))
    assert verdict.independent is not True
    assert not verdict.ok


# --- storage, edges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["sample", "channel"])
def test_only_what_is_kept_is_stored(groups):
    q, x = quantizer("agp", groups=groups), rows(64, 48).view(64, 12, 4)
    for draw in range(20):
        s = stream(draw=draw)
        encoded, out = q.encode(x, s), q(x, s)
        assert torch.equal(encoded.decode(), out)
        kept = out.abs().sum((1, 2) if groups == "sample" else (0, 2)) > 0
        assert encoded.index.tolist() == torch.nonzero(kept).view(-1).tolist()
        per_group = x.numel() // len(kept)
        assert encoded.codes().numel() == len(encoded.index) * per_group
        assert encoded.payload.numel() == -(-encoded.codes().numel() // 2)
        assert encoded.nbytes == encoded.payload.numel() + len(encoded.index) * (8 + 4 + 4 + 4)
        assert torch.equal(encoded.probability.double(), q.keep(x).probability[encoded.index])
    assert encoded.nbytes < quantizer("psq", bits=4).encode(rows(64, 48), s).nbytes


INPUTS = {
    "zeros": torch.zeros(6, 5),
    "constant": torch.full((6, 5), 0.3),
    "ones": torch.ones(3, 2),
    "one row": rows(1, 9),
    "two rows": rows(2, 9),
    "three rows": rows(3, 9),
    "one column": rows(9, 1),
    "fewer rows than bits": rows(5, 4),
    "one-sided": rows(12, 5).abs() + 0.1,
    "constant rows": torch.cat([rows(4, 6), torch.arange(1.0, 9.0).view(8, 1).expand(8, 6)]),
    "vector": rows(7, 1).view(-1),
    "images": rows(6, 40).view(6, 2, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": rows(12, 7).t(),
    "subnormal": rows(12, 7) * 1e-40,
    "bfloat16": rows(12, 7).bfloat16(),
    "float16": rows(12, 7, sigma=0.3).half(),
    "float64": rows(12, 7, dtype=torch.float64),
    "mixed scales": rows(12, 7, sigma=8.0),
}


@pytest.mark.parametrize("name", ["agp", "topk"])
@pytest.mark.parametrize("kind", INPUTS)
def test_edges(kind, name):
    x = INPUTS[kind]
    before = x.clone()
    for bits in (2, 4, 8):
        for groups in ("sample", "channel"):
            q = quantizer(name, bits=bits, groups=groups)
            for draw in range(5):
                out, encoded = q(x, stream(draw=draw)), q.encode(x, stream(draw=draw))
                assert out.shape == x.shape
                assert out.dtype == x.dtype
                assert bool(out.isfinite().all())
                assert torch.equal(encoded.decode().to(x.dtype), out)
                assert encoded.decode().dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
                if kind in ("zeros", "constant", "ones") or (kind == "one column" and groups == "sample"):
                    assert torch.equal(out, x)
            assert float(q.variance(x).sum()) <= q.bound(x)
            if name == "agp":
                largest = float(x.abs().max())
                assert float((q.mean(x) - x.double()).abs().max()) <= 1e-6 * largest + 1e-44
    assert torch.equal(x, before)


def test_bad_input():
    x = rows()
    x[3, 4] = math.nan
    q = quantizer("agp")
    for call in (lambda: q(x, stream()), lambda: q.encode(x, stream()), lambda: q.mean(x), lambda: q.bound(x)):
        with pytest.raises(NonFiniteError, match="1 NaN or Inf among 2048"):
            call()
    with pytest.raises(NonFiniteError, match="after division by p, got 64 of 64 samples"):
        q(rows(sigma=0.0).clamp(-3, 3) * 5e37, stream())
    with pytest.raises(InputError, match="groups must be 'sample' or 'channel'"):
        quantizer("agp", groups="row")
    with pytest.raises(InputError, match="bits"):
        quantizer("agp", bits=0)
    with pytest.raises(InputError, match="random_bits"):
        quantizer("agp", random_bits=40)


def test_the_same_on_any_number_of_threads():
    x, q = rows(200, 6000), quantizer("agp")
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((q(x, stream()), q.variance(x), q.keep(x).probability))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- in layers --------------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (5, 3)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 2, padding=1), (5, 2, 3, 3)),
    "groups": (lambda: nn.Conv2d(4, 4, 2, groups=2), (5, 4, 3, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (5, 2, 6)),
}


@pytest.mark.parametrize("groups", ["sample", "channel"])
@pytest.mark.parametrize("name", LAYERS)
def test_products_of_the_gradient(name, groups):
    """Weight, bias and input gradient: the exact variance against the covariance matrix of ``Q(g)``."""
    make, shape = LAYERS[name]
    layer, x = layer_cases.filled(make().double()), layer_cases.gaussian(*shape, seed=3, dtype=torch.float64)
    x.requires_grad_()
    y = layer(x)
    g = layer_cases.gaussian(*y.shape, seed=4, dtype=torch.float64)
    g[0] *= 3
    q = quantizer("agp", bits=2, groups=groups)
    noise = q.noise(g)
    group = torch.arange(noise.variance.shape[noise.factors.axis])
    view = [1, 1, 1]
    view[noise.factors.axis] = -1
    group = group.view(view).expand(noise.variance.shape).reshape(-1)
    signal, spread = noise.factors.signal.reshape(-1), noise.factors.variance.view(-1)
    covariance = torch.outer(signal, signal) * spread[group] * (group.view(-1, 1) == group)
    covariance += noise.variance.view(-1).diag()
    torch.testing.assert_close(covariance.diag(), q.variance(g).view(-1))
    # A gradient is linear in g: its matrix, row by row of g's elements.
    units = torch.eye(g.numel(), dtype=torch.float64).view(-1, *g.shape)
    columns = [torch.autograd.grad(y, [layer.weight, layer.bias, x], unit, retain_graph=True) for unit in units]
    expected = [
        torch.einsum("ik,ij,jk->k", m, covariance, m)
        for m in (torch.stack([c[i].reshape(-1) for c in columns]) for i in range(3))
    ]
    found = []

    def observe(call, gradient, parameters):
        found.append(gradient)

    with (
        fqtstats.quantized(nn.Sequential(layer), fqtstats.Policy(grad_weight=q)) as handle,
        Session(handle.layers["0"], handle, x.detach(), lambda model, batch: (model(batch) * g).sum()) as session,
    ):
        session.qat(None, observe)
    (call,) = found
    call = WeightGradient(call.product, q, call.g, call.x, tuple(layer.weight.shape))
    torch.testing.assert_close(weight_variance([call]).view(-1), expected[0])
    torch.testing.assert_close(bias_variance([call]).view(-1), expected[1])
    totals = summed(call, ["weight", "bias"])
    assert totals["weight"] == pytest.approx(float(expected[0].sum()))
    assert totals["bias"] == pytest.approx(float(expected[1].sum()))
    factors = Roundings.of(q, call.g).factors
    w, target = images(layer.weight.detach()), tuple(images(x).shape)
    of_factors = factors_input_total(call.product, factors, w, target)
    of_roundings = input_total(call.product, noise.roundings.view(images(g).shape), w, target)
    assert of_factors + of_roundings == pytest.approx(float(expected[2].sum()))


def scq(bits=4):
    return fqtstats.Policy(
        grad_input=quantizer("agp", bits=bits), grad_weight=quantizer("agp", bits=bits, groups="channel")
    )


def test_products_pass_and_a_wrong_factor_fails():
    report = check_products(small.mlp(), small.batch(), small.loss, scq())
    assert report.ok, report.evidence
    assert set(report.table["prediction"]) == {"exact"}
    wrong = fqtstats.Policy(grad_input=controls.Unscaled(bits=4), grad_weight=controls.Unscaled(groups="channel"))
    report = check_products(small.mlp(), small.batch(), small.loss, wrong)
    assert {row.verdict for row in report.rows} == {"biased"}


def test_profile_agrees_with_draws():
    """The variance profile's total with one from draws: up to 256 probes, 400 draws, within 6 standard errors.

    False alarms 2e-9. Its negative control is a profile of PSQ at the same bits, without what rows share. By channel
    the draws would not do: one class is missing in the batch, and its channel, of a small range, is kept in one draw
    of hundreds.
    """
    model, batch = small.mlp(), small.batch()
    q = quantizer("agp", bits=4)
    policy = fqtstats.Policy(grad_input=q, grad_weight=q)
    found = fqtstats.profile(model, batch, small.loss, policy, precision=0.15, most_probes=256)
    qat, drawn = small.draws(model, batch, policy, range(400))
    squares = sum(((drawn[name] - qat[name]) ** 2).sum(1) for name in qat)
    error = math.hypot(squares.std(ddof=1) / 20, float(found.total["standard_error"]))
    assert abs(squares.mean() - float(found.total["variance"])) < 6 * error
    psq = fqtstats.Policy(grad_input=quantizer("psq", bits=4), grad_weight=quantizer("pcq", bits=4))
    without = float(fqtstats.profile(model, batch, small.loss, psq, precision=0.1).total["variance"])
    assert abs(squares.mean() - without) > 6 * error
