"""``profile`` against draws: what each quantizer puts into each gradient, and that it all adds up to the variance.

False alarms: every comparison of two means allows SIGMAS combined standard errors. With 32 draws or more that is at
most 5e-9 (Student's t); there are less than 200 comparisons, so below 1e-6 for the whole file.
"""

from __future__ import annotations

import warnings

import layer_cases
import numpy as np
import pandas as pd
import pytest
import small
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fqtstats
from fqtstats.capture import Session
from fqtstats.errors import InputError, NonFiniteError, UnsupportedError
from fqtstats.estimators.decomposition import (
    FEWEST,
    Decomposition,
    Sources,
    mean_and_error,
    one_at_a_time,
    precision_reached,
    probe,
)
from fqtstats.estimators.moments import squared_norm
from fqtstats.layers.state import Source
from fqtstats.models.preact_resnet import PreActBlock
from fqtstats.models.transformer import Transformer

SIGMAS = 8.0
DRAWS = 32


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp():
    """Wide enough that the squared norms of single draws vary little."""
    return small.mlp(40, 48, dtype=torch.float64), small.batch(64, 40, dtype=torch.float64)


def policy(q, bits=None, **forward):
    q = fqtstats.quantizer(q, bits=bits) if isinstance(q, str) else q
    return fqtstats.Policy(**forward, grad_input=q, grad_weight=q)


def decomposed(case, policy, probes=DRAWS, draws=DRAWS, whole=0):
    """The sources and parameters, draws of the two estimators ``[n, S, P]``, and squared errors ``[whole, P]``."""
    model, batch = case
    with (
        fqtstats.quantized(model, policy) as handle,
        Session(model, handle, batch, loss, injectable=True) as session,
    ):
        sources = Sources(session)
        gradient = session.qat(sources, sources.weight_gradient)
        probed = Decomposition(sources, probe, gradient)
        for i in range(probes):
            probed.draw(i, lambda: None)
        drawn = [one_at_a_time(sources, gradient, i, {}, lambda: None) for i in range(1000, 1000 + draws)]
        norms = [
            [squared_norm(a - g) for a, g in zip(session.draw(i), gradient, strict=True)]
            for i in range(2000, 2000 + whole)
        ]
        return sources.keys, list(session.parameters), probed.first(probes), np.array(drawn), np.array(norms)


def distance(one, other):
    """Difference of two means over draws in combined standard errors; 0 where both are equal."""
    (a, da), (b, db) = (mean_and_error(np.asarray(values)) for values in (one, other))
    error = np.hypot(da, db)
    # A law in closed form does not vary at all, and is known up to the 24 bits of P(up).
    return np.divide(a - b, error, out=np.zeros_like(error), where=np.abs(a - b) > 1e-6 * np.abs(a))


def resolution(one, other):
    """The combined standard error of the total, relative to it."""
    (a, da), (_, db) = (mean_and_error(values.sum(axis=(1, 2))) for values in (one, other))
    return np.hypot(da, db) / a


def assert_agree(one, other):
    for axis in (2, 1, (1, 2)):  # by source, by parameter, in total
        z = distance(one.sum(axis=axis), other.sum(axis=axis))
        assert np.abs(z).max() < SIGMAS, z
    assert np.array_equal(one.any(axis=0), other.any(axis=0))


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantizer", "bits"), [("ptq", 4), ("psq", 4), ("bhq", 4), ("ptq", 2)])
def test_probes_against_draws(quantizer, bits):
    """Finds 28 % of the total (SIGMAS times the asserted resolution)."""
    keys, names, probes, draws, whole = decomposed(mlp(), policy(quantizer, bits), whole=64)
    assert keys == [
        ("0", "grad_weight"), ("2", "grad_weight"), ("2", "grad_input"), ("4", "grad_weight"), ("4", "grad_input")
    ]  # fmt: skip
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert_agree(probes, draws)
    assert np.abs(distance(probes.sum(axis=1), whole)).max() < SIGMAS
    assert abs(distance(probes.sum(axis=(1, 2)), whole.sum(axis=1))) < SIGMAS
    assert resolution(probes, draws) < 0.035
    reached = probes.any(axis=0).astype(int).tolist()
    assert reached == [
        [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]
    ]  # fmt: skip


def test_the_law_at_the_qat_gradient_is_another(monkeypatch):
    """Negative control: quantizers above change the ranges below, which the QAT gradient does not show."""
    _, _, probes, draws, _ = decomposed(mlp(), policy("ptq", 2))
    assert_agree(probes, draws)
    original = Session.draw

    def undrawn(self, index, sites, **how):
        return original(self, index, sites, **{**how, "only": ()})

    monkeypatch.setattr(Session, "draw", undrawn)
    _, _, wrong, _, _ = decomposed(mlp(), policy("ptq", 2), draws=0)
    z = distance(wrong.sum(axis=2), draws.sum(axis=2))
    assert np.abs(z).max() > SIGMAS


def resnet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, bias=False), PreActBlock(6, 10, 2),
            nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
        )  # fmt: skip
    return model, (layer_cases.gaussian(12, 2, 6, 6), torch.arange(12) % 4)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Transformer(7, 6, width=12, heads=2, depth=1)

    def forward(self, tokens):
        return self.body(tokens).transpose(1, 2)


def transformer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Tokens()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(5)
        tokens = torch.randint(0, 7, (8, 7))
    return model, (tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize(("case", "quantizer"), [(resnet, "psq"), (transformer, "bhq")])
def test_whole_networks(case, quantizer):
    _, _, probes, draws, _ = decomposed(case(), policy(quantizer, 4, **layer_cases.FORWARD))
    assert_agree(probes, draws)
    assert resolution(probes, draws) < 0.05


# --- structures -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """``conv`` has groups and an input without gradient; ``twice`` is called twice and shares its weight with ``tied``;
    ``frozen`` has no trainable parameter; ``normed`` has a weight that is computed from two."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding="same", groups=2)
        self.line = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular", bias=False)
        self.twice, self.tied, self.frozen, self.normed = (nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Linear(8, 10)
        layer_cases.filled(self)
        self.tied.weight = self.twice.weight
        self.frozen.requires_grad_(False)
        self.last.weight.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its successor makes another type of the layer
            torch.nn.utils.weight_norm(self.normed)

    def forward(self, x):
        x = torch.relu(self.conv(x.view(-1, 2, 2, 3))).mean(2)
        x = self.line(x)[..., :2].flatten(1)
        for layer in (self.twice, self.twice, self.tied, self.frozen, self.normed):
            x = torch.tanh(layer(x))
        return self.last(x)


_PSQ = fqtstats.quantizer("psq", bits=3)


def custom(x, stream):
    return _PSQ(x, stream)


@pytest.mark.parametrize("q", [fqtstats.quantizer("pcq", bits=3), custom], ids=["pcq", "custom"])
def test_structures(q):
    keys, names, probes, draws, _ = decomposed((Net(), small.batch()), policy(q))
    assert [layer for layer, site in keys if site == "grad_weight"] == [
        "conv", "line", "twice", "tied", "normed", "last"
    ]  # fmt: skip
    assert ("conv", "grad_input") not in keys
    assert ("frozen", "grad_input") in keys
    assert_agree(probes, draws)
    row, columns = keys.index(("tied", "grad_weight")), [names.index(n) for n in ("twice.weight", "tied.bias")]
    assert np.flatnonzero(probes[:, row].any(axis=0)).tolist() == sorted(columns)
    assert {"normed.weight_g", "normed.weight_v"} <= {names[p] for p in np.flatnonzero(draws.any(axis=(0, 1)))}


def test_which_sources_are_sampled():
    found = fqtstats.profile(Net(), small.batch(), small.loss, policy("psq", 4), 0.9, most_probes=4).metadata
    assert found["sampled"] == [{"layer": "normed", "site": "grad_weight"}]
    # One pass for the draw, one for the weight that is no parameter, and one per Q2: the input gradient's.
    assert found["backward_passes"] == 2 + 4 * (1 + 1 + 7)
    mixed = fqtstats.Policy(grad_weight=custom, grad_input=fqtstats.quantizer("psq", bits=4))
    found = fqtstats.profile(small.mlp(), small.batch(), small.loss, mixed, 0.9)
    assert found.metadata["sampled"] == [{"layer": layer, "site": "grad_weight"} for layer in "024"]
    assert found.sources["quantizer"].tolist() == ["custom", "custom", "psq", "custom", "psq"]
    assert found.sources["bits"].isna().tolist() == [True, True, False, True, False]


def test_deterministic_quantizers_put_in_nothing():
    for q in (fqtstats.quantizer("minmax", bits=3), lambda x, stream: x.sign()):
        found = fqtstats.profile(small.mlp(), small.batch(), small.loss, policy(q))
        assert found.sources["variance"].eq(0).all()
        assert found.table.empty
        assert found.metadata["converged"]


# --- the profile ------------------------------------------------------------------------------------------------------


def test_the_tables():
    others = [small.batch(seed=10), small.batch(seed=11)]
    calls = []
    given = small.mlp(), small.batch(), small.loss, small.psq()
    found = fqtstats.profile(*given, seed=5, batches=others, progress=lambda *done: calls.append(done))
    assert found.metadata["converged"]
    assert found.metadata["precision_reached"] <= 0.05
    assert calls[-1] == (found.metadata["backward_passes"] + 2,) * 2
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert all(done <= total for done, total in calls)

    sources, table, parameters = found.sources, found.table, found.parameters
    assert list(sources["layer"] + " " + sources["site"]) == [
        "0 grad_weight", "2 grad_weight", "2 grad_input", "4 grad_weight", "4 grad_input"
    ]  # fmt: skip
    assert sources["quantizer"].eq("psq").all()
    assert sources["bits"].eq(4).all()
    assert sources["share"].sum() == pytest.approx(1)
    assert len(table) == 12
    total = parameters.iloc[-1]
    assert (total["layer"], total["parameter"], total["numel"]) == ("total", "", parameters["numel"][:-1].sum())
    of_source = table.groupby(["source_layer", "source_site"])["variance"].sum()
    for row in sources.itertuples():
        assert row.variance == pytest.approx(of_source[row.layer, row.site])
    of_parameter = table.groupby(["layer", "parameter"])["variance"].sum()
    for row in parameters[:-1].itertuples():
        assert row.variance == pytest.approx(of_parameter[row.layer, row.parameter])
    assert total["variance"] == pytest.approx(sources["variance"].sum())

    measured = fqtstats.measure(*given, draws=2, seed=5, batches=others).table
    for column in ("grad_norm_sq", "sampling_variance"):
        np.testing.assert_allclose(parameters[column], measured[column], rtol=1e-12)
    assert found.metadata["hashes"]
    assert found.metadata["policy"]["grad_input"] == repr(small.psq().grad_input)


def test_native_backend():
    """The same random numbers, so the same up to the rounding of the products."""
    given = small.mlp(), small.batch(), small.loss, policy("bhq", 4, **layer_cases.FORWARD)
    one, other = (fqtstats.profile(*given, 0.3, backend=backend).sources for backend in ("simulated", "native"))
    np.testing.assert_allclose(one["variance"], other["variance"], rtol=0.01)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.reentrant = small.mlp(), reentrant

    def forward(self, x):
        hidden = self.body[:2](x)
        if self.reentrant is None:
            return self.body[2:](hidden)
        return self.body[4](checkpoint(self.body[2:4], hidden, use_reentrant=self.reentrant))


def test_checkpoints():
    def found(reentrant, method):
        return fqtstats.profile(Checkpointed(reentrant), small.batch(), small.loss, small.psq(), 0.9, method=method)

    for method in ("probes", "one-at-a-time"):
        plain = found(None, method)
        for reentrant in (False, True)[: 1 + (method == "one-at-a-time")]:
            assert found(reentrant, method).table.equals(plain.table)
    with pytest.raises(UnsupportedError, match="use_reentrant=False"):
        found(True, "probes")


def test_standard_errors_are_those_of_the_sums():
    found = Decomposition(None, probe, [])
    rng = np.random.default_rng(0)
    found.matrices = {i: rng.random((2, 3)) for i in (2, 0, 1, 3)}
    loaded = Decomposition(None, probe, [])
    loaded.load(found.state())
    assert np.array_equal(loaded.first(4), np.stack([found.matrices[i] for i in range(4)]))
    totals = loaded.totals(4)
    assert totals.shape == (4, 2)
    values = np.column_stack([totals, totals.sum(axis=1)])
    np.testing.assert_allclose(
        precision_reached(totals), (values.std(axis=0, ddof=1) / 2 / values.mean(axis=0)).max(), rtol=1e-12
    )
    # Below 1 % of the sum, a source is held against 1 % of the sum.
    tiny = np.column_stack([np.ones(4), 1e-4 * totals[:, 0]])
    assert precision_reached(tiny) == pytest.approx(
        1e-4 * totals[:, 0].std(ddof=1) / 2 / (0.01 * tiny.sum(axis=1).mean()), rel=1e-12
    )
    assert precision_reached(np.zeros((4, 2))) == 0


def test_sources_that_vary_more_get_more_errors():
    q, layers = fqtstats.quantizer("psq", bits=4), "edcba"
    sources = Sources(None)
    for layer in layers:
        for site in ("grad_weight", "grad_input"):
            sources.calls.append(Source(layer, 0, site))
            sources.quantizers[layer, site] = q
    values = np.array([-1.0, 0, 0, 1])[:, None]

    def repeats(*deviations):
        totals = np.ones((4, 10))
        totals[:, 1::2] += values * deviations  # the odd ones are those of grad_input
        return [sources.repeats(totals).get((layer, "grad_input"), 1) for layer in "abcde"]

    assert repeats(0.1, 0.1, 0.1, 0.1, 0.1) == [1, 1, 1, 1, 1]
    assert repeats(0.1, 0.1, 0.1, 0.1, 0.1 * 3**0.5) == [1, 1, 1, 1, 3]
    assert repeats(0.1, 0.1, 0.1, 0.5, 0.9) == [1, 1, 1, 1, 4]  # of the largest, relative variance 81, a quarter
    assert repeats(0.0, 0.0, 0.0, 0.1, 0.0) == [1, 1, 1, 4, 1]
    assert repeats(0.0, 0.0, 0.0, 0.0, 0.0) == [1, 1, 1, 1, 1]
    totals = np.ones((4, 10))
    totals[:, [1]] += values * 3**0.5 * 0.1
    totals[:, 3::2] += values * 0.1
    more = sources.repeats(totals)
    assert sources.passes(probe, {}) == 1 + 5
    assert sources.passes(probe, more) == 1 + 5 + 2
    assert sources.passes(one_at_a_time, more) == 10


class Memory:
    """A store; interrupts at a number of saves."""

    def __init__(self, stop_at=None):
        self.saves, self.stop_at, self.arrays = 0, stop_at, None

    def load(self):
        return None if self.arrays is None else dict(self.arrays)

    def save(self, state, *, force=False):
        self.arrays = state()
        self.saves += 1
        if self.saves == self.stop_at:
            raise KeyboardInterrupt


def assert_same(one, other):
    for name in ("table", "sources", "parameters"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)
    assert one.metadata == other.metadata


@pytest.mark.parametrize("method", ["probes", "one-at-a-time"])
def test_the_same_when_resumed_and_on_any_number_of_threads(method):
    def found(store=None, seed=0):
        return fqtstats.profile(*resnet(), loss, policy("bhq", 4), 0.3, seed=seed, method=method, store=store)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = found()
        torch.set_num_threads(2)
        assert_same(found(), whole)
    finally:
        torch.set_num_threads(threads)
    assert whole.metadata["probes"] >= FEWEST
    store = Memory(3)
    with pytest.raises(KeyboardInterrupt) as stopped:
        found(store)
    partial = stopped.value.partial_result
    assert partial.metadata["probes"] == 3
    assert not partial.metadata["converged"]
    assert len(partial.sources) == len(whole.sources)
    assert_same(found(store), whole)
    with pytest.raises(InputError, match="cannot resume"):
        found(store, seed=1)


def test_a_state_is_that_of_one_method():
    store, given = Memory(), (small.mlp(), small.batch(), small.loss, small.psq(), 0.9)
    fqtstats.profile(*given, store=store)
    with pytest.raises(InputError, match="cannot resume"):
        fqtstats.profile(*given, store=store, method="one-at-a-time")


def test_a_precision_that_is_not_reached_is_told():
    with pytest.warns(UserWarning, match=r"precision of 0\.\d+ after 4 probes, not the 0.001 asked for"):
        found = fqtstats.profile(small.mlp(), small.batch(), small.loss, small.psq(), 0.001, most_probes=4)
    assert not found.metadata["converged"]
    assert found.metadata["probes"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": 0.0}, "precision must be a number between 0 and 1, got 0.0"),
        ({"precision": 1}, "between 0 and 1"),
        ({"precision": float("nan")}, "between 0 and 1"),
        ({"precision": True}, "between 0 and 1"),
        ({"method": "probe"}, "unknown method 'probe'; known: probes, one-at-a-time"),
        ({"most_probes": 3}, "at least 4"),
        ({"most_probes": 8.0}, "integer"),
        ({"model": nn.ReLU()}, "layers to quantize"),
        ({"policy": small.psq().qat()}, "no quantizer|with gradient quantizers"),
        ({"policy": fqtstats.Policy(**layer_cases.FORWARD)}, "with gradient quantizers"),
        ({"policy": None}, "expected a fqtstats.Policy"),
    ],
)
def test_bad_input(change, message):
    given = {"model": small.mlp(), "batch": small.batch(), "loss_fn": small.loss, "policy": small.psq(), **change}
    with pytest.raises(InputError, match=message) as error:
        fqtstats.profile(**given)
    assert "\n" not in str(error.value)


def test_noise_that_overflows_is_refused(monkeypatch):
    monkeypatch.setattr(Session, "inject", lambda self, call, error: [torch.tensor(torch.inf), *[None] * 5])
    with pytest.raises(NonFiniteError, match=r"layer '2', grad_input: .* overflows in 1 parameters"):
        fqtstats.profile(small.mlp(), small.batch(), small.loss, small.psq())
