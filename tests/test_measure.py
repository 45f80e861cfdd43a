"""``measure`` against an independent replicate, and what must not change its numbers."""

from __future__ import annotations

import copy
import functools
import io
import math
import os
import subprocess
import sys
import types

import controls
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import small
import torch
import torch.nn.functional as F
from oracles import moments as oracle
from rich.console import Console
from torch import nn

import fqtstats
from fqtstats.capture import Session
from fqtstats.errors import InputError, NonFiniteError
from fqtstats.estimators import bias, exact, intervals
from fqtstats.layers import BACKENDS
from fqtstats.layers.state import Draw
from fqtstats.report import tables
from fqtstats.results import COLUMNS

DRAWS = 24
POLICY = fqtstats.policies.get("statquant-psq", bits=4)


def others(count=4):
    return [small.batch(seed=10 + i) for i in range(count)]


@pytest.fixture(scope="module")
def measured():
    arguments = small.mlp(), small.batch(), small.loss, POLICY, DRAWS
    return small.rows(fqtstats.measure(*arguments, seed=5, batches=others(), method="montecarlo"))


@pytest.fixture(scope="module")
def replicate():
    """QAT gradient, draws, and draws without the weight-gradient quantizers."""
    arguments = small.mlp(), small.batch(), POLICY, range(DRAWS), 5
    qat, fqt = small.draws(*arguments)
    return qat, fqt, small.draws(*arguments, sites=["grad_input"])[1]


def joined(by_name):
    return np.concatenate(list(by_name.values()), axis=-1)


def each(measured, *by_name):
    for name in by_name[0]:
        yield (measured[name], *(part[name] for part in by_name))
    yield (measured["total"], *(joined(part) for part in by_name))


# --- against the replicate --------------------------------------------------------------------------------------------


def test_moments(measured, replicate):
    for row, g, fqt, upstream in each(measured, *replicate):
        errors = fqt - g
        assert row.numel == g.size
        assert row.draws == DRAWS
        assert row.quantized
        np.testing.assert_allclose(row.grad_norm_sq, (g**2).sum(), rtol=1e-12)
        np.testing.assert_allclose(row.variance, oracle.variance(fqt), rtol=1e-6)
        np.testing.assert_allclose(row.bias_norm_sq, oracle.bias_norm_sq(errors), rtol=1e-5, atol=1e-7 * row.variance)
        np.testing.assert_allclose(row.variance_input, ((upstream - g) ** 2).sum(1).mean(), rtol=1e-6)
        np.testing.assert_allclose(row.variance_weight, ((fqt - upstream) ** 2).sum(1).mean(), rtol=1e-6)
        np.testing.assert_allclose(row.snr, row.grad_norm_sq / row.variance, rtol=1e-12)
        np.testing.assert_allclose(row.sqrt3_margin, math.sqrt(row.grad_norm_sq / (3 * row.variance)), rtol=1e-12)
        norms = (errors**2).sum(1)
        half = scipy.stats.t.ppf(0.975, DRAWS - 1) * norms.std(ddof=1) / math.sqrt(DRAWS)
        assert row.bias_p >= 0.01
        np.testing.assert_allclose(row.variance_low, min(norms.mean() - half, row.variance), rtol=1e-6)
        np.testing.assert_allclose(row.variance_high, max(norms.mean() + half, row.variance), rtol=1e-6)


def test_parts_add_up(measured, replicate):
    """The mean product of the two parts is zero: |t| < 8.5 with 23 degrees of freedom but for 1e-8 in each of 7 rows.

    Finds a correlation that moves the sum by 8.5 standard errors; equal numbers in both quantizers would.
    """
    for row, g, fqt, upstream in each(measured, *replicate):
        cross = ((fqt - upstream) * (upstream - g)).sum(1)
        total = row.variance_weight + row.variance_input
        np.testing.assert_allclose(total + 2 * cross.mean(), ((fqt - g) ** 2).sum(1).mean(), rtol=1e-6)
        if cross.any():
            assert abs(cross.mean()) < 8.5 * cross.std(ddof=1) / math.sqrt(DRAWS)


def test_the_total_sums_the_rows(measured):
    parameters = [row for name, row in measured.items() if name != "total"]
    for column in (c.name for c in COLUMNS if c.dtype in ("float64", "int64")):
        if column in (
            "numel",
            "grad_norm_sq",
            "bias_norm_sq",
            "variance",
            "variance_weight",
            "variance_input",
            "variance_exact_own",
        ) or (column.startswith("q_") or column == "sampling_variance"):
            expected = np.nansum([getattr(row, column) for row in parameters])
            np.testing.assert_allclose(getattr(measured["total"], column), expected, rtol=1e-9, err_msg=column)


def test_sampling_variance(measured):
    gradients = []
    for b in [small.batch(), *others()]:
        qat, _ = small.draws(small.mlp(), b, POLICY, [0])
        gradients.append(qat)
    stacked = {name: np.stack([g[name] for g in gradients]) for name in gradients[0]}
    for row, g in each(measured, stacked):
        np.testing.assert_allclose(row.sampling_variance, oracle.covariance_trace(g), rtol=1e-6)


class Added(nn.Module):
    """Two parameters of the output's shape are added up: autograd has one tensor for the gradients of both.

    That of ``summed`` has one number for all of its elements.
    """

    def __init__(self):
        super().__init__()
        self.one, self.other = (nn.Parameter(t) for t in torch.randn(2, 32, 12, generator=torch.manual_seed(0)))
        self.body, self.summed = small.mlp(), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.body(x + self.one + self.other) * self.summed.sum()


def test_parameters_whose_gradients_share_memory():
    table = fqtstats.measure(Added(), small.batch(), small.loss, POLICY, 8, batches=others()).table
    one, other = (table[table["parameter"] == name].iloc[0] for name in ("one", "other"))
    assert one["bias_p"] > 1e-6
    assert abs(one["bias_norm_sq"]) < 0.1 * one["grad_norm_sq"]
    for column in ("grad_norm_sq", "variance", "variance_input", "sampling_variance"):
        assert one[column] == other[column]
    # A minibatch's gradient is not twice the first one further away.
    gradients = []
    for b in [small.batch(), *others()]:
        qat, _ = small.draws(Added(), b, POLICY, [0])
        gradients.append(qat["one"])
    np.testing.assert_allclose(one["sampling_variance"], oracle.covariance_trace(np.stack(gradients)), rtol=1e-6)


def test_no_sampling_variance_without_batches():
    table = fqtstats.measure(small.mlp(), small.batch(), small.loss, POLICY, 3).table
    assert table["sampling_variance"].isna().all()


class Shared(nn.Module):
    """``twice`` is called twice; ``tied`` has ``twice``'s weight and its own bias; ``frozen`` has no trainable one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.twice, self.tied, self.frozen = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 10, bias=False)
        self.tied.weight = self.twice.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.twice(torch.tanh(self.first(x))))
        x = torch.tanh(self.tied(torch.tanh(self.twice(x))))
        return self.last(self.norm(self.frozen(x)))


def incoming_gradients(model, batch, policy):
    """By layer name: the QAT gradients that arrive at its calls, caught by hooks on the outputs."""
    caught = {}

    def hook(name):
        def forward(module, inputs, y):
            y.register_hook(lambda g: caught.setdefault(name, []).append(g.clone()))

        return forward

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    with fqtstats.quantized(model, policy) as handle, handle.shared.drawing(Draw(sites=frozenset())):
        small.loss(model, batch).backward()
    for h in handles:
        h.remove()
    return caught


def test_laws_of_the_quantizers():
    """Calls are summed, a tied weight shows both layers, NaN where a quantizer does not act."""
    torch.manual_seed(0)
    model, batch = Shared(), small.batch()
    caught = incoming_gradients(copy.deepcopy(model), batch, POLICY)
    assert [len(caught[name]) for name in ("first", "twice", "tied", "frozen", "last")] == [1, 2, 1, 1, 1]
    rows = small.rows(fqtstats.measure(model, batch, small.loss, POLICY, 3))
    assert list(rows) == [
        "first.weight", "first.bias", "twice.weight", "twice.bias", "tied.bias", "norm.weight", "norm.bias",
        "last.weight", "total",
    ]  # fmt: skip

    def sums(layers, quantizer):
        found = [g for layer in layers for g in caught[layer]]
        return sum(float(quantizer.variance(g).sum()) for g in found), sum(quantizer.bound(g) for g in found)

    expected = {
        ("first.weight", "weight"): ["first"],
        ("twice.weight", "weight"): ["twice", "tied"],
        ("twice.weight", "input"): ["twice", "tied"],
        ("last.weight", "weight"): ["last"],
        ("last.weight", "input"): ["last"],
        ("total", "weight"): ["first", "twice", "tied", "last"],
        ("total", "input"): ["twice", "tied", "frozen", "last"],
    }
    for name, row in rows.items():
        for site in ("input", "weight"):
            found = getattr(row, f"q_{site}_variance"), getattr(row, f"q_{site}_bound")
            if (name, site) in expected:
                quantizer = POLICY.grad_input if site == "input" else POLICY.grad_weight
                np.testing.assert_allclose(found, sums(expected[name, site], quantizer), rtol=1e-6, err_msg=name)
                assert found[0] <= found[1]
            else:
                assert np.isnan(found).all(), (name, site, found)
    assert [rows[name].quantized for name in ("norm.weight", "last.weight", "total")] == [False, True, True]


def own_layer_variance(model, batch, quantizer):
    """Closed form for the last layer's weight: ``Var[dW_kd] = sum_n H_nd^2 v_nk``."""
    with torch.no_grad():
        h = model[:-1](batch[0])
        logits = model[-1](h).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(logits.requires_grad_(), batch[1]), logits)
    return float((quantizer.variance(g).T @ h.double().square()).sum())


def test_own_layer_variance_against_the_closed_form():
    """256 draws (standard error 2 %); beyond 5.1 of it with probability 7e-7. Finds 25 % (negative control)."""
    model, batch = small.mlp(), small.batch()
    policy = small.psq(3)
    result = fqtstats.measure(model, batch, small.loss, policy, 256, method="montecarlo")
    row = small.rows(result)[f"{small.LAST}.weight"]
    exact = own_layer_variance(model, batch, policy.grad_weight)
    error = (row.variance_high - row.variance_low) / 2 / scipy.stats.t.ppf(0.975, 255)
    print(f"variance {row.variance / exact:.4f} of the closed form, standard error {error / exact:.4f}")
    assert abs(row.variance - exact) < 5.1 * error
    np.testing.assert_allclose(row.variance_exact_own, exact, rtol=1e-6)
    assert abs(row.variance - 1.25 * exact) > 5.1 * error


# --- closed form and draws --------------------------------------------------------------------------------------------


def policy_of(q):
    return fqtstats.Policy(grad_input=q, grad_weight=q)


def drawn_and_exact(policy, indices, seed=0):
    """By parameter: ``||e_i||^2``, ``||u_i||^2`` and the exact variance of Q1 at the drawn gradients, each ``[n]``."""
    model, batch = small.mlp(), small.batch()
    found = {name: np.empty((3, len(indices))) for name, _ in model.named_parameters()}
    with fqtstats.quantized(model, policy, seed=seed) as handle, Session(model, handle, batch, small.loss) as session:
        qat = session.qat()
        for at, index in enumerate(indices):
            calls = {}
            drawn = session.draw(index)
            upstream = session.draw(
                index, ["grad_input"], observe_weight=lambda call, g, _, calls=calls: calls.update({call.layer.name: g})
            )
            for name, g, e, u in zip(found, qat, drawn, upstream, strict=True):
                layer, _, kind = name.rpartition(".")
                variance = (exact.weight_variance if kind == "weight" else exact.bias_variance)([calls[layer]])
                squares = [float((x - g).double().square().sum()) for x in (e, u)]
                found[name][:, at] = *squares, float(variance.sum())
    return {**found, "total": sum(found.values())}


@pytest.mark.parametrize("quantizer", ["ptq", "psq", "bhq"])
def test_drawn_and_exact_own_parts_agree(quantizer):
    """No p-value below 4e-8 in 3 x 7 rows: a false alarm in 8e-7 of all seeds."""
    policy = policy_of(fqtstats.quantizer(quantizer, bits=3))
    result = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, 64)
    for row in small.rows(result).values():
        assert row.own_ratio_p > 4e-8
        assert row.own_ratio_low < row.own_ratio < row.own_ratio_high
    assert 0.8 < row.own_ratio_low < row.own_ratio_high < 1.25  # what could be found
    assert "dependent" not in printed(result)
    assert "drawn over exact: " in printed(result)


def test_noise_that_rows_share_is_found():
    policy = policy_of(controls.SharedNoise(bits=3))
    result = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, 32)
    total = small.rows(result)["total"]
    assert total.own_ratio_low > 1.25
    assert total.own_ratio_p < 1e-9
    assert math.isnan(total.variance_gain)  # the closed form does not stand in for the draws
    plain = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, 32, method="montecarlo")
    assert small.rows(plain)["total"].variance == total.variance
    assert "error: dependent rounding" in printed(result)


def test_a_quantizer_that_does_not_round_is_found():
    """No error comes from Q1: nothing that the closed form could stand in for."""

    class Passing(type(POLICY.grad_weight)):
        def __call__(self, x, stream):
            return x.clone()

    policy = fqtstats.Policy(grad_input=POLICY.grad_input, grad_weight=Passing(bits=3))
    rows = small.rows(fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, 16))
    plain = small.rows(fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, 16, method="montecarlo"))
    for name, row in rows.items():
        assert (row.own_ratio, row.variance_weight) == (0, 0)
        assert row.own_ratio_p < 1e-6
        assert math.isnan(row.variance_gain)
        assert row.variance == plain[name].variance


def test_a_bias_that_is_admitted_is_no_error():
    policy = policy_of(controls.few_random_bits(1, bits=2))
    rows = small.rows(fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, 16))
    assert rows["total"].own_ratio > 1
    assert all(math.isnan(row.own_ratio_p) and math.isnan(row.variance_gain) for row in rows.values())


def test_the_rounding_of_half_precision_is_no_error_and_not_left_out():
    policy = policy_of(fqtstats.quantizer("psq", bits=8))
    half = torch.bfloat16
    rows = small.rows(fqtstats.measure(small.mlp(dtype=half), small.batch(dtype=half), small.loss, policy, 16))
    assert rows["total"].own_ratio > 1.05
    assert all(row.own_ratio_p > 0.01 and math.isnan(row.variance_gain) for row in rows.values())


def test_the_rounding_of_autocast_is_no_bias():
    """As that of half-precision parameters; negative control: a biased quantizer is found there."""

    def half(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return small.loss(model, batch)

    policies = policy_of(fqtstats.quantizer("bhq", bits=8)), policy_of(controls.few_random_bits(1, bits=2))
    fine, biased = (fqtstats.measure(small.mlp(), small.batch(), half, policy, 64).table for policy in policies)
    assert fine["bias_p"].min() > 1e-6
    assert fine["own_ratio_p"].min() > 1e-6
    assert fine["variance_gain"].notna().all()  # Q1's part is not rounded on the way, and the closed form stands in
    assert biased["bias_p"].min() < 1e-6


def test_a_rare_outcome_that_no_draw_showed_is_no_error():
    """One decision that goes up with probability 0.003: most draws, and here all, are the same."""
    g = torch.tensor([[0.0], [1.0], [0.003]])
    policy = fqtstats.Policy(grad_weight=fqtstats.quantizer("ptq", bits=1))
    model = nn.Linear(1, 1)
    result = fqtstats.measure(model, torch.ones(3, 1), lambda m, x: (m(x) * g).sum(), policy, 64)
    row = small.rows(result)[".weight"]
    assert row.own_ratio < 0.01
    assert row.own_ratio_p > 1e-4
    squares, exact_mean = np.full(64, 9e-6), np.full(64, 0.003 * 0.997)
    assert intervals.mean_ratio(squares * (1 + 1e-3 * np.arange(64)), exact_mean).p_value < 1e-6  # without the guard


def test_the_variance_is_that_given_the_gradients_that_arrive():
    """Rows of both methods against an independent replicate; they are the same where Q1 adds nothing."""
    arguments = small.mlp(), small.batch(), small.loss, POLICY, DRAWS
    both = small.rows(fqtstats.measure(*arguments, seed=5))
    assert min(row.bias_p for row in both.values()) >= 0.01
    assert min(row.own_ratio_p for row in both.values()) >= 0.01
    for name, (plain, upstream, own) in drawn_and_exact(POLICY, range(DRAWS), 5).items():
        row, conditioned = both[name], upstream + own
        half = scipy.stats.t.ppf(0.975, DRAWS - 1) * conditioned.std(ddof=1) / math.sqrt(DRAWS)
        np.testing.assert_allclose(row.variance, conditioned.mean(), rtol=1e-6)
        np.testing.assert_allclose(row.variance_high - row.variance_low, 2 * half, rtol=1e-6, atol=1e-9 * row.variance)
        np.testing.assert_allclose(row.snr, row.grad_norm_sq / row.variance, rtol=1e-12)
        if name.startswith(small.LAST):
            assert row.variance_gain == math.inf
            np.testing.assert_allclose(row.variance, row.variance_exact_own, rtol=1e-12)
        else:
            np.testing.assert_allclose(row.variance_gain, plain.var() / conditioned.var(), rtol=1e-4)
    without = small.rows(fqtstats.measure(*arguments, method="montecarlo"))
    for row in without.values():
        assert math.isnan(row.own_ratio)
        assert math.isnan(row.variance_gain)


def test_the_closed_form_leaves_the_mean_and_lowers_the_error():
    """144 draws. Means differ by less than 6 standard errors (2e-8 each, 7 of them), and a Pitman-Morgan correlation of
    sum and difference is above -6 / sqrt n (1e-9). Finds 25 % too much in the exact part (negative control).
    """
    policy = policy_of(fqtstats.quantizer("bhq", bits=3))
    rows = drawn_and_exact(policy, range(144))
    for name, (plain, upstream, own) in rows.items():
        conditioned = upstream + own
        difference = plain - conditioned
        error = difference.std(ddof=1) / 12
        assert abs(difference.mean()) < 6 * error, name
        if name == "total":
            assert abs((difference - 0.25 * own).mean()) > 6 * error
        if np.ptp(conditioned) > 0:
            assert np.corrcoef(plain + conditioned, difference)[0, 1] > -0.5, name
    plain, upstream, own = rows["total"]
    assert (upstream + own).std() < plain.std()


def test_exact_method():
    """One backward pass: what does not come from draws is as it is with them, and the rest is missing."""
    steps = []
    arguments = small.mlp(), small.batch(), small.loss, POLICY
    alone = fqtstats.measure(*arguments, method="exact", progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 1)]
    both = fqtstats.measure(*arguments, draws=2, batches=others())
    sampled = fqtstats.measure(*arguments, method="exact", batches=others())
    exact_columns = [name for name in alone.table if name.startswith(("q_", "variance_exact", "grad_norm", "numel"))]
    pd.testing.assert_frame_equal(alone.table[exact_columns], both.table[exact_columns], check_exact=True)
    assert alone.table["variance_exact_own"].notna().all()
    assert (alone.table["draws"] == 0).all()
    missing = ["bias_p", "variance", "variance_low", "variance_weight", "own_ratio", "variance_gain", "snr"]
    assert alone.table[missing].isna().all(axis=None)
    assert alone.table["sampling_variance"].isna().all()
    assert sampled.table["sampling_variance"].equals(both.table["sampling_variance"])
    assert "exact variances per layer, no draws" in printed(alone)
    (axes,) = alone.plot_variance().axes
    assert "no draws" in axes.get_xlabel()
    assert len(both.plot_variance().axes) == 2


def printed(result):
    screen = io.StringIO()
    Console(file=screen, width=200).print(tables.summary(result))
    return screen.getvalue()


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [POLICY.qat(), fqtstats.Policy(grad_weight=lambda x, stream: x)])
def test_without_noise(policy):
    table = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, 3).table
    zero = ["variance", "variance_low", "variance_high", "variance_weight", "variance_input", "bias_norm_sq"]
    assert (table[zero] == 0).all(axis=None)
    assert (table["bias_p"] == 1).all()
    assert np.isposinf(table[["snr", "sqrt3_margin"]]).all(axis=None)
    assert table[["q_input_variance", "q_input_bound", "q_weight_variance", "q_weight_bound"]].isna().all(axis=None)


def test_zero_gradient_has_no_ratio():
    model = small.mlp()
    table = fqtstats.measure(model, small.batch(), lambda m, b: 0 * small.loss(m, b), small.psq(), 3).table
    assert (table["variance"] == 0).all()
    assert table[["snr", "sqrt3_margin"]].isna().all(axis=None)
    assert (table["bias_p"] == 1).all()


@pytest.mark.parametrize("draws", [2, 3, 4])
@pytest.mark.parametrize("quantizer", ["psq", "nearest"])
def test_few_draws(draws, quantizer):
    """Intervals contain their estimate or, where there is none (two draws that may have a bias), are both NaN."""
    q = fqtstats.quantizer("psq", bits=4) if quantizer == "psq" else (lambda x, stream: x.round(decimals=2))
    policy = fqtstats.Policy(grad_input=q, grad_weight=q)
    table = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, draws).table
    assert table["bias_p"].between(0, 1).all()
    low, value, high = (table[name] for name in ("variance_low", "variance", "variance_high"))
    assert (((low <= value) & (value <= high)) | (low.isna() & high.isna())).all()


def test_one_scalar_parameter_and_few_draws():
    """Two draws of one two-point number can have equal squares: the interval still contains the estimate."""
    model = nn.Linear(1, 1, bias=False)
    batch = torch.tensor([[1.0], [2.0], [-1.5]])
    coin = fqtstats.Policy(grad_weight=fqtstats.quantizer("ptq", bits=1))
    for seed in range(20):
        table = fqtstats.measure(model, batch, lambda m, x: (m(x) * x).sum() ** 2, coin, 2, seed=seed).table
        known = table.dropna(subset=["variance_low"])
        assert (known["variance_low"] <= known["variance"]).all()
        assert (known["variance"] <= known["variance_high"]).all()


@pytest.mark.parametrize("draws", [1, 0, -3, 2.0, "8", True, None])
def test_bad_draws(draws):
    with pytest.raises(InputError, match="draws must be an integer of at least 2"):
        fqtstats.measure(small.mlp(), small.batch(), small.loss, POLICY, draws)


def test_bad_input():
    model, batch = small.mlp(), small.batch()
    with pytest.raises(InputError, match=r"expected a fqtstats\.Policy"):
        fqtstats.measure(model, batch, small.loss, "psq")
    with pytest.raises(InputError, match="unknown method 'magic'; known: exact, montecarlo, both"):
        fqtstats.measure(model, batch, small.loss, POLICY, method="magic")
    with pytest.raises(InputError, match="unknown backend"):
        fqtstats.measure(model, batch, small.loss, POLICY, backend="magic")
    with pytest.raises(InputError, match="scalar"):
        fqtstats.measure(model, batch, lambda m, b: m(b[0]), POLICY)
    with pytest.raises(InputError, match="finite loss"):
        fqtstats.measure(model, batch, lambda m, b: small.loss(m, b) * float("nan"), POLICY)
    with pytest.raises(InputError, match="with samples"):
        fqtstats.measure(model, small.batch(0), small.loss, POLICY)
    with pytest.raises(InputError, match="trainable"):
        fqtstats.measure(small.mlp().requires_grad_(False), batch, small.loss, POLICY)
    assert type(model[0]) is nn.Linear


# --- invariance -------------------------------------------------------------------------------------------------------


def wide():
    """Parameters beyond torch's threshold for splitting sums over threads (32768 elements)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_thread_count_and_repetition_change_nothing(backend):
    batch, further = small.batch(features=300), [small.batch(features=300, seed=s) for s in (3, 4)]
    tables, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            result = fqtstats.measure(wide(), batch, small.loss, POLICY, 4, backend=backend, batches=further)
            tables.append(result.table)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)


def test_seed_changes_the_draws():
    arguments = small.mlp(), small.batch(), small.loss, POLICY, 3
    first, second = (fqtstats.measure(*arguments, seed=s, method="montecarlo").table for s in (0, 1))
    assert (first["grad_norm_sq"] == second["grad_norm_sq"]).all()
    assert (first["variance"] != second["variance"]).all()


_DIGEST = """
import sys; sys.path.insert(0, sys.argv[1])
import hashlib, small, fqtstats
from fqtstats import ops
policy = fqtstats.policies.get("statquant-bhq", bits=4)
print(ops.isa())
for backend in sys.argv[2:]:
    result = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, 5, backend=backend)
    numbers = result.table.select_dtypes("number").to_numpy(dtype="float64", na_value=float("nan"))
    print(hashlib.sha256(numbers.tobytes()).hexdigest())
"""


def test_native_kernels_and_their_fallbacks_give_the_same_tables():
    out = []
    for native in ("1", "0"):
        command = [sys.executable, "-W", "ignore", "-c", _DIGEST, os.path.dirname(__file__), *BACKENDS]
        environment = {**os.environ, "FQTSTATS_NATIVE": native}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        out.append(done.stdout.split())
    assert out[1][0] == "torch"
    assert len(out[0]) == 1 + len(BACKENDS)
    assert out[0][1:] == out[1][1:]


class Memory:
    """A store in memory; copies, as a file would."""

    def __init__(self):
        self.arrays = None
        self.forced = 0

    def load(self):
        return None if self.arrays is None else {name: array.copy() for name, array in self.arrays.items()}

    def save(self, state, *, force=False):
        self.arrays = {name: array.copy() for name, array in state().items()}
        self.forced += force


def stop_at(step, error=KeyboardInterrupt):
    def progress(done, total):
        if done == step:
            raise error

    return progress


def measure_small(draws=8, seed=0, policy=POLICY, **options):
    return fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, draws, seed, batches=others(2), **options)


@pytest.mark.parametrize(("backend", "k"), [*(("simulated", k) for k in (0, 1, 2, 5, 8)), ("native", 5)])
def test_interrupted_and_resumed_equals_uninterrupted(k, backend):
    run = functools.partial(measure_small, backend=backend)
    store = Memory()
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(store=store, progress=stop_at(2 + k))
    if k >= 1:
        assert store.forced == 1
        assert len(store.arrays["draws"]) == k
    partial = getattr(stopped.value, "partial_result", None)
    assert (partial is not None) == (k >= 2)
    if partial is not None:
        alone = run(draws=k).table.drop(columns="sampling_variance")
        pd.testing.assert_frame_equal(partial.table.drop(columns="sampling_variance"), alone, check_exact=True)
    steps = []
    resumed = run(store=store, progress=lambda done, total: steps.append((done, total)))
    pd.testing.assert_frame_equal(resumed.table, run().table, check_exact=True)
    assert steps == [(i, 12) for i in (1, 2, *range(3 + k, 13))]


def test_an_error_in_a_further_batch_keeps_the_draws():
    store = Memory()
    with pytest.raises(ValueError, match="stop") as stopped:
        measure_small(store=store, progress=stop_at(12, ValueError("stop")))
    assert stopped.value.partial_result.table["draws"].eq(8).all()
    assert stopped.value.partial_result.table["sampling_variance"].isna().all()
    pd.testing.assert_frame_equal(measure_small(store=store).table, measure_small().table, check_exact=True)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"policy": fqtstats.policies.get("statquant-psq", bits=5)},
        {"policy": small.psq()},
        {"backend": "native"},
        {"method": "montecarlo"},
    ],
    ids=["seed", "bits", "policy", "backend", "method"],
)
def test_a_state_of_another_measurement_is_refused(change):
    """Also where the QAT gradient is the same, as with another seed or other gradient quantizers."""
    store = Memory()
    measure_small(store=store)
    with pytest.raises(InputError, match="cannot resume"):
        measure_small(store=store, **change)


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(16, 10)

    def forward(self, x):
        return self.out(self.drop(F.relu(self.norm(self.conv(x.view(-1, 1, 4, 4)))).flatten(1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_left_as_it_was(training, interrupted, backend):
    torch.manual_seed(0)
    model, batch = Everything().train(training), small.batch(features=16)
    small.loss(model, batch).backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    modes, types = ([(f(m)) for m in model.modules()] for f in (lambda m: m.training, type))
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    arguments = model, batch, small.loss, POLICY, 4
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            fqtstats.measure(*arguments, backend=backend, progress=stop_at(4))
    else:
        fqtstats.measure(*arguments, backend=backend, batches=[small.batch(features=16, seed=3)])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, p in model.named_parameters():
        assert p.grad is grads[name][0]
        assert torch.equal(p.grad, grads[name][1])
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == types
    assert not any("fqt" in key for m in model.modules() for key in vars(m))
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_num_threads() == threads
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small.mlp()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.net(self.drop(x))


def test_dropout_masks_count_as_sampling():
    batch = small.batch()
    result = fqtstats.measure(Dropped(), batch, small.loss, POLICY, draws=2, batches=[batch] * 3)
    total = result.table.iloc[-1]
    assert total["sampling_variance"] > 1e-3 * total["grad_norm_sq"]
    # Without dropout the same batch four times has none, to the last bit.
    result = fqtstats.measure(small.mlp(), batch, small.loss, POLICY, draws=2, batches=[batch] * 3)
    assert result.table.iloc[-1]["sampling_variance"] == 0


def test_a_nan_in_an_unquantized_parameter_is_named():
    model = nn.Sequential(small.mlp(), nn.LayerNorm(10))
    model[1].bias.register_hook(lambda g: g * torch.tensor([float("nan")] * 3 + [1.0] * 7))
    with pytest.raises(NonFiniteError, match=r"3 NaN or Inf among the 10 elements of '1.bias'") as error:
        fqtstats.measure(model, small.batch(), small.loss, POLICY, draws=2)
    assert (error.value.count, error.value.numel) == (3, 10)


def test_hashes_cover_buffers_and_batches_of_any_kind():
    def hashes(scale=1.0, shift=0.0):
        norm = nn.BatchNorm1d(12)
        norm.running_var.fill_(scale)
        model = nn.Sequential(norm, small.mlp()).eval()
        x, y = small.batch()
        batch = types.SimpleNamespace(x=x + shift, y=y)
        policy = fqtstats.policies.get("statquant-psq")
        run = fqtstats.measure(model, batch, lambda m, b: small.loss(m, (b.x, b.y)), policy, draws=2)
        return run.metadata["hashes"]

    assert hashes() == hashes()
    assert hashes(scale=2.0)["model"] != hashes()["model"]
    assert hashes(shift=1.0)["batch"] != hashes()["batch"]


def test_many_draws_keep_the_size_of_the_sign_flips():
    """Blocks of draws: 200 runs of 600 draws; more than 18 rejections at .02 have a probability below 1e-6."""
    rng = np.random.default_rng(0)
    rejected = 0
    for run in range(200):
        e = rng.standard_normal((600, 8))
        rejected += bias.sign_flip_p(e @ e.T, seed=run, flips=199) <= 0.02
    assert rejected <= 18
    shifted = e + 0.3
    assert bias.sign_flip_p(shifted @ shifted.T) == 1e-4


def test_further_batches_are_no_number():
    for run in (fqtstats.measure, fqtstats.profile):
        with pytest.raises(InputError, match="batches must be a sequence of minibatches like batch, got 8; give"):
            run(small.mlp(), small.batch(), small.loss, small.psq(), batches=8)


def test_the_callers_grad_mode_does_not_matter():
    with torch.no_grad():
        off = fqtstats.measure(small.mlp(), small.batch(), small.loss, small.psq(), draws=4)
        assert not torch.is_grad_enabled()
    on = fqtstats.measure(small.mlp(), small.batch(), small.loss, small.psq(), draws=4)
    assert off.files() == on.files()
