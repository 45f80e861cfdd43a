"""Exact own-layer variance of weight and bias gradients: against all outcomes, real draws, and in ``measure``."""

from __future__ import annotations

import itertools
import math

import layer_cases
import numpy as np
import pytest
import small
import torch
from torch import nn

import fqtstats
from fqtstats.capture import Session
from fqtstats.determinism import single_thread
from fqtstats.errors import InputError
from fqtstats.estimators.exact import bias_variance, input_total, summed, weight_variance
from fqtstats.layers.operand import images
from fqtstats.layers.product import LinearProduct
from fqtstats.layers.state import Draw, WeightGradient
from fqtstats.results import COLUMNS, Result, load

QUANTIZERS = ["ptq", "psq", "pcq", "bhq"]


def captured(model, batch, loss_fn, policy):
    """By layer name: the weight gradients of its calls in a QAT pass."""
    found = {}

    def observe(call, gradient, parameters):
        assert set(parameters) <= {"weight", "bias"}
        found.setdefault(call.layer.name, []).append(gradient)

    with (
        single_thread(),
        fqtstats.quantized(model, policy) as handle,
        Session(model, handle, batch, loss_fn) as session,
    ):
        session.qat(None, observe)
    return found


def treated_as_independent(call):
    """Wrong for BHQ: the law that would hold if the errors of all elements were independent."""
    v = call.q.variance(call.g)
    return (
        (v.T @ call.x.double().square())
        if v.dim() == 2
        else call.product.grad_weight(fqtstats.layers.real, v, call.x.double().square(), call.shape)
    )


# --- all outcomes -----------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (3, 3)),
    "conv2d": (lambda: nn.Conv2d(2, 2, 2), (3, 2, 2, 3)),
    "stride_padding_dilation": (
        lambda: nn.Conv2d(1, 1, (2, 3), stride=(2, 3), padding=(1, 2), dilation=(2, 1)), (3, 1, 3, 4)
    ),
    "groups": (lambda: nn.Conv2d(4, 4, 2, groups=2), (3, 4, 2, 2)),
    "depthwise": (lambda: nn.Conv2d(2, 4, 2, groups=2), (3, 2, 2, 2)),
    "same": (lambda: nn.Conv2d(2, 2, 2, padding="same"), (3, 2, 1, 2)),
    "reflect": (lambda: nn.Conv2d(2, 2, (1, 3), padding=(0, 1), padding_mode="reflect"), (3, 2, 1, 2)),
    "conv1d": (lambda: nn.Conv1d(2, 2, 3, padding=1), (3, 2, 2)),
}  # fmt: skip


def tiny(name):
    """A float64 layer, its input, and an incoming gradient of at most 12 elements with a large first row."""
    make, shape = LAYERS[name]
    layer, x = layer_cases.filled(make().double()), layer_cases.gaussian(*shape, seed=3, dtype=torch.float64)
    g = layer_cases.gaussian(*layer(x).shape, seed=4, dtype=torch.float64)
    g[0] *= 3
    assert g.numel() <= 12
    return layer, x, g


def dense(transform, n):
    """The matrix ``T`` from its groups, by its definition."""
    h = torch.eye(n, dtype=torch.float64)
    for head, size in zip(transform.heads.tolist(), transform.sizes.long().tolist(), strict=True):
        v = torch.full((size,), size**-0.5, dtype=torch.float64)
        v[0] -= 1
        h[head : head + size, head : head + size] -= 2 * torch.outer(v, v) / v.square().sum()
    return h @ torch.diag(transform.row_scale.view(-1).double()) @ torch.eye(n, dtype=torch.float64)[transform.order]


def outcomes(q, g):
    """All values of ``Q(g)``, ``[K, *g.shape]``, and their probabilities ``[K]``: by the quantizer's definition."""
    n = g.shape[0]
    t = dense(q.transform(g), n) if q.name == "bhq" else torch.eye(n, dtype=torch.float64)
    z = (t @ g.reshape(n, -1)).view(g.shape[0], g.shape[1], -1)
    axes = {"ptq": (0, 1, 2), "psq": (1, 2), "bhq": (1, 2), "pcq": (0, 2)}[q.name]
    low, high = z.amin(axes, keepdim=True), z.amax(axes, keepdim=True)
    step = (high - low) / (2**q.bits - 1)
    y = ((z - low) / step).reshape(-1)
    down = y.floor()
    ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=y.numel())), dtype=torch.float64)
    p = torch.where(ups > 0, y - down, 1 - (y - down)).prod(1)
    values = ((down + ups).view(-1, *z.shape) * step + low).view(-1, n, z[0].numel())
    return (torch.linalg.inv(t) @ values).view(-1, *g.shape), p


def variance_of(values, p):
    mean = (p[:, None] * values).sum(0)
    return (p[:, None] * (values - mean).square()).sum(0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", LAYERS)
def test_all_outcomes(name, quantizer, bits):
    """The law of the plain layer's gradients over all outcomes; P(up) has 24 bits, hence the tolerance."""
    layer, x, g = tiny(name)
    # The grid of the definition here is the affine one.
    q = fqtstats.quantizer(quantizer, bits=bits, **({"grid": "affine"} if quantizer == "ptq" else {}))
    y = layer(x)
    of_elements = [  # the gradients are linear in Q(g): one for each of its elements
        torch.autograd.grad(y, [layer.weight, layer.bias], e.view(g.shape), retain_graph=True)
        for e in torch.eye(g.numel(), dtype=torch.float64)
    ]
    values, p = outcomes(q, g)
    assert p.sum() == pytest.approx(1)
    expected = [
        variance_of(values.flatten(1) @ torch.stack([gradients[i].reshape(-1) for gradients in of_elements]), p)
        for i in (0, 1)
    ]
    policy = fqtstats.Policy(grad_weight=q)
    (call,) = captured(nn.Sequential(layer), x, lambda m, b: (m(b) * g).sum(), policy)["0"]
    call = WeightGradient(call.product, q, call.g, call.x, tuple(layer.weight.shape))
    found = weight_variance([call]), bias_variance([call])
    total = summed(call, ["weight", "bias"])
    assert expected[0].sum() > 0
    for got, want, kind in zip(found, expected, ("weight", "bias"), strict=True):
        assert got.dtype == torch.float64
        assert got.shape == getattr(layer, kind).shape
        atol = 1e-6 * float(want.max())
        torch.testing.assert_close(got.view(-1), want, rtol=1e-5, atol=atol)
        assert total[kind] == pytest.approx(float(got.sum()), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", LAYERS)
def test_all_outcomes_of_the_input_gradient(name, quantizer):
    layer, x, g = tiny(name)
    q = fqtstats.quantizer(quantizer, bits=2, **({"grid": "affine"} if quantizer == "ptq" else {}))
    x.requires_grad_()
    y = layer(x)
    of_elements = torch.stack(
        [
            torch.autograd.grad(y, x, e.view(g.shape), retain_graph=True)[0].reshape(-1)
            for e in torch.eye(g.numel(), dtype=torch.float64)
        ]
    )
    values, p = outcomes(q, g)
    expected = float(variance_of(values.flatten(1) @ of_elements, p).sum())
    policy = fqtstats.Policy(grad_weight=q)
    (call,) = captured(nn.Sequential(layer), x.detach(), lambda m, b: (m(b) * g).sum(), policy)["0"]
    got = input_total(call.product, images(q.variance(g)), images(layer.weight.detach()), tuple(images(x).shape))
    assert expected > 0
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [2, 5, 33])
def test_adjoint_of_the_inverse(rows):
    g = layer_cases.gaussian(rows, 6, dtype=torch.float64) * torch.logspace(0, -2, rows, dtype=torch.float64)[:, None]
    transform = fqtstats.quantizer("bhq", bits=4).transform(g)
    x = layer_cases.gaussian(rows, 2, 3, seed=9, dtype=torch.float64)
    before = x.clone()
    expected = torch.linalg.inv(dense(transform, rows)).T @ x.view(rows, -1)
    torch.testing.assert_close(transform.inverse_adjoint(x), expected.view(x.shape), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


def test_calls_add_up_and_what_is_unknown_is_refused():
    g, x = layer_cases.gaussian(5, 4), layer_cases.gaussian(5, 3, seed=1)
    call = WeightGradient(LinearProduct(), fqtstats.quantizer("psq", bits=3), g, x, (4, 3))
    for variance in (weight_variance, bias_variance):
        torch.testing.assert_close(variance([call, call]), 2 * variance([call]))
        with pytest.raises(InputError, match="at least one call"):
            variance([])
        custom = WeightGradient(call.product, layer_cases.identity, g, x, (4, 3))
        with pytest.raises(InputError, match="not known which errors are independent"):
            variance([custom])
    assert math.isnan(summed(custom, ["bias"])["bias"])


# --- draws of the real layer ------------------------------------------------------------------------------------------

COPIES, PASSES = 20, 1_000
SIGMAS = 5.8  # of a mean of 1000: false alarm 9e-9 (Student's t), 3e-7 in the 36 comparisons here
REAL = {
    "linear": (lambda: nn.Linear(4, 48 * COPIES), (8, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 48 * COPIES, 2, stride=2, padding=1, groups=2), (8, 4, 4, 4)),
}


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("quantizer", ["ptq", "psq", "bhq"])
@pytest.mark.parametrize("name", REAL)
def test_draws_of_the_real_layer(name, quantizer, bits):
    """The mean squared error of 20000 draws, summed over elements, within SIGMAS standard errors, which is 1 %.

    Every channel of the incoming gradient is there COPIES times, which leaves all ranges, and with them the grids, as
    they are: a backward pass makes as many independent draws of the layer with 48 outputs.

    Negative control: with BHQ's errors treated as independent, the same comparison fails.
    """
    make, shape = REAL[name]
    layer, x = layer_cases.filled(make()), layer_cases.gaussian(*shape, seed=3).relu()
    n, outputs, *space = layer(x).shape
    g = layer_cases.gaussian(n, outputs // COPIES, *space, seed=4).repeat_interleave(COPIES, 1)
    g[0] *= 6
    policy = fqtstats.Policy(**layer_cases.FORWARD, grad_weight=fqtstats.quantizer(quantizer, bits=bits))
    model = nn.Sequential(layer)
    (call,) = captured(model, x, lambda m, b: (m(b) * g).sum(), policy)["0"]
    exact = {"weight": float(weight_variance([call]).sum()), "bias": float(bias_variance([call]).sum())}
    squares = {kind: np.empty(PASSES) for kind in exact}
    with single_thread(), fqtstats.quantized(model, policy, seed=7) as handle:
        y = model(x)
        parameters = [layer.weight, layer.bias]

        def gradients(draw):
            with handle.shared.drawing(draw):
                return torch.autograd.grad(y, parameters, g, retain_graph=True)

        qat = gradients(Draw(sites=frozenset()))
        for index in range(PASSES):
            for kind, drawn, of in zip(squares, gradients(Draw(index)), qat, strict=True):
                squares[kind][index] = float(torch.linalg.vector_norm(drawn - of)) ** 2
    for kind, sums in squares.items():
        allowed = SIGMAS * sums.std(ddof=1) / math.sqrt(PASSES)
        print(f"{kind}: {sums.mean() / exact[kind]:.4f} of the exact variance, allowed {allowed / exact[kind]:.4f}")
        assert allowed < 0.01 * exact[kind]
        assert abs(sums.mean() - exact[kind]) < allowed
        if quantizer == "bhq":
            v = call.q.variance(call.g)
            wrong = float(v.sum() if kind == "bias" else treated_as_independent(call).sum())
            assert abs(sums.mean() - wrong) > allowed


# --- in the table -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """``twice`` is called twice and shares its weight with ``tied``; ``frozen`` has no trainable parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding="same", groups=2)
        self.line = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular", bias=False)
        self.twice, self.tied, self.frozen = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 10)
        self.tied.weight = self.twice.weight
        self.frozen.requires_grad_(False)
        self.last.weight.requires_grad_(False)
        layer_cases.filled(self)

    def forward(self, x):
        x = torch.relu(self.conv(x.view(-1, 2, 2, 3))).mean(2)
        x = self.line(x)[..., :2].flatten(1)
        for layer in (self.twice, self.twice, self.tied, self.frozen, self.norm):
            x = torch.tanh(layer(x))
        return self.last(x)


@pytest.mark.parametrize("quantizer", ["pcq", "bhq"])
def test_measured(quantizer, backend):
    q = fqtstats.quantizer(quantizer, bits=4)
    policy = fqtstats.Policy(**layer_cases.FORWARD, grad_input=q, grad_weight=q)
    calls = captured(Net(), small.batch(), small.loss, policy)
    expected = {
        "conv.weight": weight_variance(calls["conv"]),
        "conv.bias": bias_variance(calls["conv"]),
        "line.weight": weight_variance(calls["line"]),
        "twice.weight": weight_variance([*calls["twice"], *calls["tied"]]),
        "twice.bias": bias_variance(calls["twice"]),
        "tied.bias": bias_variance(calls["tied"]),
        "last.bias": bias_variance(calls["last"]),
    }
    assert [len(calls[name]) for name in ("conv", "twice", "tied")] == [1, 2, 1]
    result = fqtstats.measure(Net(), small.batch(), small.loss, policy, 2, backend=backend)
    rows = small.rows(result)
    for name, variance in expected.items():
        assert rows[name].variance_exact_own == pytest.approx(float(variance.sum()), rel=1e-9), name
    assert rows["total"].variance_exact_own == pytest.approx(sum(float(v.sum()) for v in expected.values()), rel=1e-9)
    assert {name for name, row in rows.items() if math.isnan(row.variance_exact_own)} == {"norm.weight", "norm.bias"}


def test_no_variance_without_a_weight_quantizer_or_of_a_custom_one():
    def custom(x, stream):
        return x

    q = fqtstats.quantizer("psq", bits=4)
    for policy in (fqtstats.Policy(grad_input=q), fqtstats.Policy(grad_weight=custom)):
        table = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, 2).table
        assert table["variance_exact_own"].isna().all()
    mixed = fqtstats.Policy(grad_weight=q, overrides={"0": fqtstats.Policy(grad_input=q)})
    rows = small.rows(fqtstats.measure(small.mlp(), small.batch(), small.loss, mixed, 2))
    known = [row.variance_exact_own for name, row in rows.items() if name[0] in "24"]
    assert math.isnan(rows["0.weight"].variance_exact_own)
    assert rows["total"].variance_exact_own == pytest.approx(math.fsum(known))


def test_saved_and_loaded_also_from_before(tmp_path):
    result = fqtstats.measure(small.mlp(), small.batch(), small.loss, small.psq(), 2)
    result.save(tmp_path / "run")
    assert load(tmp_path / "run").table["variance_exact_own"].equals(result.table["variance_exact_own"])
    assert result.table["variance_exact_own"].notna().all()
    old = Result(result.table.drop(columns="variance_exact_own"), result.metadata).table
    assert list(old.columns) == [column.name for column in COLUMNS]
    assert old["variance_exact_own"].isna().all()
