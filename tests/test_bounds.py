"""End-to-end bounds: their operator norms against explicit matrices, the bounds against measured variances."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
import small
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint

import fqtstats
from fqtstats.bounds import end_to_end_bounds
from fqtstats.bounds.norms import squared_norm
from fqtstats.capture import Session
from fqtstats.cli import run
from fqtstats.errors import InputError, UnsupportedError
from fqtstats.layers.state import Draw, Source
from fqtstats.models.transformer import Transformer
from fqtstats.policy import Policy
from fqtstats.quantizers.uniform import PTQ
from fqtstats.report import tables
from fqtstats.results import load


def bounds(model, batch, policy, loss=small.loss, backend="simulated", **options):
    with (
        fqtstats.quantized(model, policy, backend=backend) as handle,
        Session(model, handle, batch, loss, recordable=True) as session,
    ):
        return end_to_end_bounds(session, **options)


class ConvNet(nn.Module):
    """Convolutions with stride, groups, borders and one side of zeros, batch norm, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 2, padding="same", groups=2)
        self.rows = nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        h = self.grouped(F.relu(self.norm(self.first(x))))
        h = F.max_pool2d(self.grouped(F.gelu(h)), (2, 2))
        return self.head(torch.tanh(self.rows(h.mean(2))).flatten(1))


def images(n=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 2, 6, 6, generator=g).to(dtype), torch.randint(3, (n,), generator=g)


def psq(bits=4, **others):
    policy = small.psq(bits)
    return dataclasses.replace(policy, **others)


def matrices(session, source):
    """By parameter, the matrix of the map from an error to that gradient: one backward pass per column."""
    names, columns = list(session.parameters), []
    out = session._outputs[source[:2]]
    for index in range(out.numel()):
        unit = torch.zeros(out.numel(), dtype=out.dtype)
        unit[index] = 1
        with session.handle.shared.drawing(Draw(sites=frozenset(), through=source)):
            found = torch.autograd.grad(
                out, list(session.parameters.values()), unit.view(out.shape), retain_graph=True, allow_unused=True
            )
        columns.append([None if g is None else g.reshape(-1) for g in found])
    by_name = dict(zip(names, zip(*columns, strict=True), strict=True))
    return {name: torch.stack(c, 1) for name, c in by_name.items() if c[0] is not None}


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_operator_norms_are_those_of_the_matrices(net):
    if net == "mlp":
        model, batch = small.mlp(width=8, dtype=torch.float64), small.batch(n=6, dtype=torch.float64)
    else:
        model, batch = ConvNet().double(), images()
    with (
        fqtstats.quantized(model, psq(activation=fqtstats.quantizer("minmax", bits=8))) as handle,
        Session(model, handle, batch, small.loss, recordable=True) as session,
    ):
        found = end_to_end_bounds(session, draws=0)
        expected = {
            (source, name): float(torch.linalg.matrix_norm(matrix, 2)) ** 2
            for source in found.noise
            for name, matrix in matrices(session, source).items()
        }
    norms = {(t.source, name): t.norm for name, own in found.parameters.items() for t in own.terms}
    assert set(norms) == {key for key, value in expected.items() if value > 0}
    assert len({source.layer for source, _ in norms}) == (3 if net == "mlp" else 4)
    for key, norm in norms.items():
        if key[1] == "first.bias" and key[0].site == "grad_input":
            assert norm.squared < 1e-20  # batch norm takes it away: what is left is rounding
            continue
        assert norm.converged
        assert expected[key] * (1 - 1e-3) <= norm.squared <= expected[key] * (1 + 1e-9), key
    assert found.passes == sum(2 * n.iterations - 1 for n in norms.values()) + (len(expected) - len(norms))


def test_the_map_of_a_layers_own_quantizer_is_its_input():
    model, (x, y) = small.mlp(dtype=torch.float64), small.batch(dtype=torch.float64)
    found = bounds(model, (x, y), psq(), draws=0, tolerance=1e-9)
    own = {t.source: t.norm.squared for t in found.parameters["0.weight"].terms}[Source("0", 0, "grad_weight")]
    assert own == pytest.approx(float(torch.linalg.matrix_norm(x, 2)) ** 2)
    ones = {t.source: t.norm.squared for t in found.parameters["0.bias"].terms}[Source("0", 0, "grad_weight")]
    assert ones == pytest.approx(len(x))


def test_the_norm_of_one_map():
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    start = torch.ones(30, dtype=torch.float64)

    def norm(tolerance, limit):
        return squared_norm(lambda v: matrix @ v, lambda y: matrix.T @ y, start, tolerance, limit)

    assert norm(1e-12, 100).squared == pytest.approx(exact, rel=1e-12)
    early = norm(1e-12, 2)
    assert (early.iterations, early.converged) == (2, False)
    assert early.squared < norm(1e-12, 5).squared < exact
    zero = squared_norm(lambda v: 0 * v, lambda y: y, start, 1e-3, 100)
    assert (zero.squared, zero.iterations, zero.converged) == (0.0, 1, True)
    one = squared_norm(lambda v: 3 * v, lambda y: 3 * y, start, 1e-3, 100)
    assert one.squared == pytest.approx(9)
    assert one.converged


@pytest.mark.parametrize(("name", "bits"), [("ptq", 3), ("psq", 4), ("bhq", 4)])
def test_variances_are_below_the_bounds_and_not_far(name, bits):
    """A hundred draws; a bound of a thousand times the variance would be a mistake in it."""
    policy = Policy(
        grad_input=fqtstats.quantizer(name, bits=bits), grad_weight=fqtstats.quantizer(name, bits=bits), name="own"
    )
    result = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, draws=100, bounds=True)
    table = result.table
    assert (table["bound_ratio"] == table["variance"] / table["bound"]).all()
    assert table["bound_ratio"].between(1e-3, 1).all(), table["bound_ratio"]
    total = result.total(result.configurations[0])
    assert total["bound"] == pytest.approx(table["bound"][:-1].sum())
    about = result.metadata["configurations"][0]["bounds"]
    assert about["violations"] == about["exceeded"] == about["unknown"] == about["unconverged"] == []
    for row, (key, own) in zip(table.itertuples(), about["parameters"].items(), strict=False):
        assert key == f"{row.layer}.{row.parameter}"
        assert own["weight"] + own["input"] == pytest.approx(row.bound)
        assert row.variance_weight <= own["weight"] * (1 + 1e-3)
        assert own["largest"]["bound"] <= row.bound
    assert tables.sound(result)


def test_without_bounds_there_are_none():
    result = fqtstats.measure(small.mlp(), small.batch(), small.loss, psq(), draws=2)
    assert result.table["bound"].isna().all()
    assert result.table["bound_ratio"].isna().all()
    assert "bounds" not in result.metadata["configurations"][0]
    assert "var/bound" not in shown(result)


def test_measured_numbers_do_not_depend_on_the_bounds():
    model, batch = small.mlp(), small.batch()
    with_, without = (fqtstats.measure(model, batch, small.loss, psq(), draws=3, bounds=b).table for b in (True, False))
    new = ["bound", "bound_ratio"]
    assert with_.drop(columns=new).equals(without.drop(columns=new))
    again = fqtstats.measure(model, batch, small.loss, psq(), draws=3, bounds=True).table
    assert again.equals(with_)


@dataclasses.dataclass(frozen=True)
class Lying(PTQ):
    """Its bound is that of a finer grid than its own."""

    def bound(self, x):
        return self.published_bound(x) / 500


def shown(result):
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(tables.summary(result))
    return console.export_text()


def test_a_planted_violation_is_flagged_with_its_cause():
    policy = Policy(grad_input=Lying(bits=3), name="own", overrides={"4": Policy(grad_input=Lying(bits=4))})
    result = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, draws=20, bounds=True)
    about = result.metadata["configurations"][0]["bounds"]
    assert {(v["layer"], v["parameter"]) for v in about["violations"]} >= {("0", "weight"), ("total", "")}
    assert all(v["ratio"] > 1 for v in about["violations"])
    (first, *_) = about["violations"]
    assert any("exact variance of Q2 of 4 (ptq@4) is" in cause for cause in first["causes"])
    assert any("Q2 of 2 (ptq@3)" in text for text in about["exceeded"])
    text = shown(result)
    assert "ABOVE END-TO-END BOUND" in text
    assert "ERROR: 0.weight has a variance of at least" in text
    assert not tables.sound(result)
    row = result.table.set_index(["layer", "parameter"]).loc[("0", "weight")]
    assert row["variance_low"] > row["bound"]
    json.dumps(tables.to_dict(result), allow_nan=False)


def test_other_causes_are_told():
    class Scaled(PTQ):
        name = "scaled"

        def __call__(self, x, stream):
            return x + 30 * (super().__call__(x, stream) - x)

    def measured(q, **options):
        policy = Policy(grad_input=q, name="own")
        return fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, draws=10, bounds=True, **options)

    def causes(result):
        return [c for v in result.metadata["configurations"][0]["bounds"]["violations"] for c in v["causes"]]

    # The law that it claims is within its bound; only the measured variance shows that this is not its law.
    assert any(cause.startswith("not known") for cause in causes(measured(Scaled(bits=4))))
    biased = causes(measured(dataclasses.replace(Scaled(bits=4), random_bits=8)))
    assert any("does not claim to be unbiased" in cause for cause in biased)


def test_a_quantizer_without_a_bound_is_named():
    def noisy(x, stream):
        return x + 1e-3 * (stream.uniform(x.shape) - 0.5)

    policy = Policy(grad_input=noisy, grad_weight=fqtstats.quantizer("ptq", bits=4))
    result = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, draws=5, bounds=True)
    known = result.table.set_index(["layer", "parameter"])["bound"]
    assert math.isnan(known["total", ""])
    assert math.isnan(known["0", "weight"])
    assert known["4", "weight"] > 0  # nothing but its own quantizer
    assert "not known: the bound of Q2 of 2 (function)" in shown(result)
    assert tables.sound(result)


def test_norms_that_have_not_converged_are_named():
    found = bounds(small.mlp(), small.batch(), psq(), draws=2, iterations=2)
    assert found.parameters["0.weight"].unconverged == list(found.parameters["0.weight"].terms)


def test_expectations_are_means_over_the_draws():
    model, batch, policy = small.mlp(), small.batch(), psq(2)
    found, qat = (bounds(model, batch, policy, draws=n) for n in (3, 0))
    own = found.parameters["0.weight"]
    assert own.qat == qat.parameters["0.weight"].bound
    assert own.bound == pytest.approx(sum(t.norm.squared * sum(t.noise.drawn) / 3 for t in own.terms))
    assert own.bound != own.qat
    assert 0 < own.error < own.bound
    assert math.isnan(qat.parameters["0.weight"].error)
    # The gradient that reaches the last layer is not drawn.
    last = found.noise[Source("4", 0, "grad_input")]
    assert last.drawn == [last.qat] * 3
    assert len(set(found.noise[Source("0", 0, "grad_weight")].drawn)) == 3


def test_the_native_backend_has_the_same_norms():
    policy = fqtstats.policies.get("statquant-psq", 4)
    simulated, native = (
        bounds(ConvNet(), images(dtype=torch.float32), policy, backend=b, draws=1) for b in ("simulated", "native")
    )
    for name, own in simulated.parameters.items():
        for a, b in zip(own.terms, native.parameters[name].terms, strict=True):
            assert a.norm.squared == pytest.approx(b.norm.squared, rel=1e-3)


def test_a_transformer():
    torch.manual_seed(0)
    model = Transformer(vocabulary=11, length=6, width=8, heads=2, depth=1)
    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))

    def loss(model, batch):
        return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())

    result = fqtstats.measure(model, tokens, loss, psq(3), draws=10, bounds=True)
    assert result.table["bound_ratio"].between(1e-4, 1).all(), result.table["bound_ratio"]


def test_checkpointing_and_autocast():
    model, batch, policy = small.mlp(), small.batch(), psq()
    plain = bounds(model, batch, policy, draws=1)

    def within(model, batch):
        h = checkpoint(lambda x: model[1](model[0](x)), batch[0], use_reentrant=False)
        return F.cross_entropy(model[2:](h), batch[1])

    def low(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return small.loss(model, batch)

    found = bounds(model, batch, policy, draws=1, loss=within)
    assert {name: p.bound for name, p in found.parameters.items()} == {
        name: p.bound for name, p in plain.parameters.items()
    }
    half = bounds(model, batch, policy, draws=1, loss=low).parameters
    assert all(half[name].bound == pytest.approx(p.bound, rel=0.2) for name, p in plain.parameters.items())


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


class _Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.detach() * 2


def test_bad_input():
    model, batch = small.mlp(), small.batch()
    for options, told in (
        ({"draws": -1}, "draws"),
        ({"draws": True}, "draws"),
        ({"iterations": 0}, "iterations"),
        ({"tolerance": 0.0}, "tolerance"),
    ):
        with pytest.raises(InputError, match=told):
            bounds(model, batch, psq(), **options)
    with pytest.raises(InputError, match="recorded"):
        Draw(recorded=True)
    # The second one is no node of its own: autograd would find no way, and a norm of zero.
    for f in (_Once, _Detached):

        def loss(m, b, f=f):
            return F.cross_entropy(m[3:](f.apply(m[:3](b[0]))), b[1])

        with pytest.raises(UnsupportedError, match="derivatives of the backward pass") as caught:
            fqtstats.measure(model, batch, loss, psq(), 2, bounds=True)
    assert len(caught.value.partial_result.table) == 7
    with (
        fqtstats.quantized(model, psq()) as handle,
        Session(model, handle, batch, small.loss, injectable=True) as session,
        pytest.raises(RuntimeError, match="recordable"),
    ):
        end_to_end_bounds(session)


def network():
    return nn.Sequential(nn.Flatten(), *small.mlp(features=64))


def test_the_command(tmp_path, capsys):
    command = f"measure --model {__name__}:network --data digits --quantizer psq --batch-size 16 --batches 0 --draws 4"
    assert run([*command.split(), "--bounds", "--out", str(tmp_path / "run")]) == 0
    assert "var/bound" in capsys.readouterr().out
    result = load(tmp_path / "run")
    assert result.table["bound_ratio"].between(0, 1).all()
    assert result.metadata["arguments"]["bounds"] is True
