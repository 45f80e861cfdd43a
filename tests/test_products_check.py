"""Products of layers: independent rounding passes, and noise that elements share is found where it shows.

Verdicts are wrong with probability 1e-6 by their construction, the comparison of rates with 2e-7. The smallest ratio
that is caught is the end of an interval: on these small layers .9 or 1.1 (dX of 16 samples) to .2 or 1.8 (dW of 8
outputs). The controls have ratios of 4 to 6 (rows), 5 to 14 (columns), 2 (tiles) and .5 to .7 (antithetic).
"""

from __future__ import annotations

from dataclasses import dataclass

import controls
import numpy as np
import pytest
import small
import torch
from scipy import stats
from torch import nn

import fqtstats
from fqtstats import Policy, check_products, quantizer
from fqtstats.errors import InputError
from fqtstats.quantizers.bhq import BHQ
from fqtstats.quantizers.uniform import PSQ
from fqtstats.verdicts.products import symmetric_interval

CONFIGURATIONS = [(name, bits) for name in ("ptq", "psq", "pcq", "bhq") for bits in (8, 4, 2)]


def both(q):
    return Policy(grad_input=q, grad_weight=q)


def positive(model):
    """Weights and, with them, activations of one sign: what elements share does not cancel in the products."""
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()
    return model


def network(*layers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(*(made for make in layers for made in (make(), nn.ReLU())))


def mlp():
    return network(*[lambda: nn.Linear(8, 8)] * len(CONFIGURATIONS))


def conv_net():
    def layer(i):
        return lambda: nn.Conv2d(4, 4, 3, padding=1, groups=1 + i % 2, padding_mode=("zeros", "reflect")[i % 3 == 0])

    return network(*map(layer, range(len(CONFIGURATIONS))))


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def squares(model, x):
    """Every layer gets a gradient of about the same size."""
    total = 0.0
    for layer in model:
        y = layer(x)
        total = total + (y - 0.3).square().sum()
        x = y / y.detach().square().mean().sqrt() if isinstance(layer, nn.ReLU) else y
    return total


@pytest.mark.parametrize(("make", "shape"), [(mlp, (16, 8)), (conv_net, (4, 4, 4, 4))])
def test_independent_rounding_passes(make, shape):
    """A layer for each quantizer and width: dW of all, dX of all but the first."""
    overrides = {str(2 * i): both(quantizer(name, bits=bits)) for i, (name, bits) in enumerate(CONFIGURATIONS)}
    report = check_products(make(), normal(*shape), squares, Policy(overrides=overrides), draws=96)
    assert report.ok, report.evidence
    assert len(report.rows) == 2 * len(CONFIGURATIONS) - 1
    assert set(report.table["prediction"]) == {"exact"}
    assert ((report.table["low"] < 1) & (report.table["high"] > 1)).all()
    assert report.table["ratio"].between(0.5, 1.5).all()


@dataclass(frozen=True)
class SharedPSQ(PSQ):
    """The law of PSQ element by element, and random numbers that elements share."""

    over: str = "rows"

    def _round(self, y, stream):
        u = controls.shared_numbers(self.over, (y.shape[0], y[0].numel()), stream).reshape(y.shape)
        return y.floor() + (u < y - y.floor())


@dataclass(frozen=True)
class SharedBHQ(BHQ):
    over: str = "rows"
    _round = SharedPSQ._round


AFFECTED = {
    "rows": ({"grad_input"}, 1),
    "columns": ({"grad_weight"}, 1),
    "tiles": ({"grad_input", "grad_weight"}, 1),
    "antithetic": ({"grad_weight"}, -1),
}


class Twice(nn.Module):
    """One layer in two calls, and a 1-D convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = network(lambda: nn.Conv1d(2, 3, 3)), network(lambda: nn.Linear(6, 6))

    def forward(self, x):
        return self.layer(self.layer(self.first(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_calls_of_one_layer(dtype):
    def loss(model, x):
        return (model(x).float() - 0.3).square().sum()

    report = check_products(Twice().to(dtype), normal(6, 2, 8).to(dtype), loss, both(quantizer("bhq", bits=4)))
    assert report.ok, report.evidence
    assert [(row.layer, row.call, row.product) for row in report.rows] == [
        ("first.0", 0, "grad_weight"),
        *[("layer.0", call, product) for call in (0, 1) for product in ("grad_input", "grad_weight")],
    ]


def test_where_nothing_is_random_there_is_no_ratio():
    report = check_products(small.mlp(), small.batch(), lambda m, b: 0 * small.loss(m, b), small.psq())
    assert report.ok
    assert report.table["ratio"].isna().all()
    assert "no draw differs from another" in report.evidence[0]


CONTROLS = [
    *[(SharedPSQ, over) for over in AFFECTED],
    (SharedBHQ, "rows"),
    (SharedBHQ, "columns"),
    (controls.noise_shared, "rows"),
    (controls.noise_shared, "antithetic"),
]


@pytest.mark.parametrize(("make", "over"), CONTROLS)
def test_dependent_rounding_fails_where_it_shows(make, over):
    x, y = small.batch()
    report = check_products(positive(small.mlp()), (x.abs(), y), small.loss, both(make(bits=4, over=over)))
    failed = [row for row in report.rows if not row.ok]
    affected, direction = AFFECTED[over]
    assert not report.ok
    assert {row.product for row in failed} == affected
    assert {row.verdict for row in failed} == {"dependent rounding"}
    assert all(np.sign(row.ratio - 1) == direction for row in failed)
    assert len(report.evidence) == len(failed)
    assert all("dependent rounding; the variance is" in sentence for sentence in report.evidence)
    assert set(report.table["prediction"]) == {"sampled" if make is controls.noise_shared else "exact"}


@pytest.mark.parametrize("over", AFFECTED)
def test_every_element_of_the_controls_is_right(over):
    """So that a product is what it takes: exact binomial tails of how often each goes up, 1e-7 for all of them."""
    x, draws = small.batch(8)[0], 500
    q = SharedPSQ(bits=4, over=over)
    _, _, low, high, up = q._outcomes(x)
    middle = (low + high).view(x.shape) / 2
    count = sum((q(x, fqtstats.stream(draw=i)) > middle).double() for i in range(draws)).numpy()
    p = up.view(x.shape).numpy()
    tails = np.minimum(stats.binom.cdf(count, draws, p), stats.binom.sf(count - 1, draws, p))
    assert 2 * tails[(p > 0) & (p < 1)].min() * x.numel() > 1e-7


@pytest.mark.parametrize(
    ("q", "ratios"),
    [
        (controls.few_random_bits(1), True),
        (controls.scaled_channel(factor=2.0), True),
        (controls.nearest(), False),
    ],
    ids=["few random bits", "scaled channel", "nearest"],
)
def test_biases_are_told_from_dependence(q, ratios):
    report = check_products(small.mlp(), small.batch(), small.loss, both(q), draws=96)
    assert {row.verdict for row in report.rows} <= {"ok", "biased"}
    assert sum(row.verdict == "biased" for row in report.rows) >= 2
    assert (~report.table["ratio"].isna()).all() == ratios
    assert all(np.isnan(row.ratio) == (row.as_dict()["ratio"] is None) for row in report.rows)


def test_outcomes_that_never_came_are_no_bias_where_the_law_is_known():
    """One large element, on the grid, and others that go up once in 10^5 draws: 128 draws show a mean and no variance.

    Negative control: studentized alone, as for a callable without a law, it is a bias.
    """
    g = torch.full((8, 4), 1e-5)
    g[0, 0] = 1.0
    model, x = nn.Sequential(nn.Linear(3, 4)), normal(8, 3)
    q = quantizer("ptq", bits=1)

    def without_law(x, stream):
        return q(x, stream)

    verdicts = [
        check_products(model, x, lambda m, b: (m(b) * g).sum(), Policy(grad_weight=each)).rows[0].verdict
        for each in (q, without_law)
    ]
    assert verdicts == ["ok", "biased"]


@pytest.mark.parametrize(("rows", "outputs", "p"), [(8, 2, 0.004), (12, 12, None)], ids=["small, rare", "larger"])
def test_null_rates_of_the_interval(rows, outputs, p):
    """2000 runs of 128 draws; negative control: Student's t interval of the squared errors, where outcomes are rare."""
    rng = np.random.default_rng(0)
    runs, draws = 2000, 128
    x = np.maximum(rng.standard_normal((rows, 3)), 0) + 0.1
    up = rng.random((rows, outputs)) if p is None else np.full((rows, outputs), p)
    expected = float((up * (1 - up) * np.square(x).sum(1)[:, None]).sum())
    rejected = {(kind, level): 0 for kind in ("symmetric", "t") for level in (0.01, 0.001)}
    for _ in range(runs):
        e = ((rng.random((draws, rows, outputs), dtype=np.float32) < up) - up).transpose(0, 2, 1)
        signs = rng.integers(0, 2, (draws // 2, outputs, rows)) * 2 - 1
        f = e[::2] - e[1::2]
        own, changed = (np.square(each @ x).sum((1, 2)) / 2 for each in (f, signs * f))
        z = np.where(np.abs(own - changed) > 1e-9, own - changed, 0.0)
        squares_of_draws = np.square(e @ x).sum((1, 2))
        for level in (0.01, 0.001):
            low, high = symmetric_interval(z, level)
            rejected["symmetric", level] += not low <= 0 <= high
            half = stats.t.isf(level / 2, draws - 1) * squares_of_draws.std(ddof=1) / np.sqrt(draws)
            rejected["t", level] += abs(squares_of_draws.mean() - expected) > half
    for level in (0.01, 0.001):
        most = stats.binom.isf(1e-7, runs, level)
        assert rejected["symmetric", level] <= most
        assert (rejected["t", level] > most) or p is None


def test_an_interval_needs_pairs():
    z = np.array([1.0, 2.0, 1.5, 1.7])
    assert symmetric_interval(z, 1e-6) == (-np.inf, np.inf)
    low, high = symmetric_interval(np.tile(z, 50), 1e-6)
    assert 0 < low < z.mean() < high
    assert symmetric_interval(np.zeros(64), 1e-6) == (0.0, 0.0)


def test_a_report_reads_as_a_line():
    report = check_products(small.mlp(), small.batch(), small.loss, small.psq())
    assert str(report).startswith("5 of 5 products ok: layer")
    assert len(str(report).splitlines()) == 1


def test_bad_input_is_told():
    model, batch = small.mlp(), small.batch()
    with pytest.raises(InputError, match="even integer"):
        check_products(model, batch, small.loss, small.psq(), draws=65)
    with pytest.raises(InputError, match=r"draws must be at least \d\d to find anything in 5 products"):
        check_products(model, batch, small.loss, small.psq(), draws=16)
    with pytest.raises(InputError, match="false_alarm must be a probability"):
        check_products(model, batch, small.loss, small.psq(), false_alarm=1.0)
    with pytest.raises(InputError, match="quantizes the incoming gradient"):
        check_products(model, batch, small.loss, Policy(weight=quantizer("minmax", bits=8)))


def test_it_says_how_far_it_is_and_gives_the_same_again():
    told = []
    first, again, native = (
        check_products(
            small.mlp(), small.batch(), small.loss, small.psq(), draws=80, backend=backend, skip="0", progress=progress
        )
        for backend, progress in (
            ("simulated", lambda done, total: told.append((done, total))),
            ("simulated", None),
            ("native", None),
        )
    )
    assert told == [(i, len(first.rows)) for i in range(1, len(first.rows) + 1)]
    assert first == again
    assert [row.layer for row in first.rows] == ["2", "2", "4", "4"]
    np.testing.assert_allclose(native.table["ratio"], first.table["ratio"], rtol=1e-3)
