"""Is the gradient biased? Sizes and power of the tests, alone and through a whole measurement."""

from __future__ import annotations

import controls
import numpy as np
import pytest
import scipy.stats
import small
import torch

import fqtstats
from fqtstats.estimators.bias import Directions, bias_test, cross_fit_p, directed_p, sign_flip_p

FALSE_ALARM = 1e-6


def two_point_errors(rng, n, rows=16, columns=12):
    """Errors of stochastic rounding: one random fraction per element, steps that differ tenfold from row to row."""
    f = rng.random((rows, columns))
    step = np.exp(rng.normal(size=(rows, 1)))
    return ((rng.random((n, rows, columns)) < f) - f) * step


def directions(e, weights):
    n = len(e)
    fixed = np.stack([(e * weights).sum((1, 2)), (e * np.sign(weights)).sum((1, 2)), e.sum((1, 2))], axis=1)
    kinds = [(fixed, False), (e.sum(2), True), (e.sum(1), True)]
    return [Directions(values, np.zeros(values.shape[1]), alike) for values, alike in kinds if n]


def gram(e):
    flat = e.reshape(len(e), -1)
    return flat @ flat.T


@pytest.fixture(scope="module")
def null_p_values():
    """``[runs, 4]``: the three families and the combined p-value on unbiased errors."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(16, 12))
    out = []
    for run in range(2000):
        e = two_point_errors(rng, (16, 32)[run % 2])
        found = directed_p(directions(e, weights)), cross_fit_p(gram(e)), sign_flip_p(gram(e), run, 2999)
        out.append([*found, min(1.0, 3 * min(found))])
    return np.array(out)


@pytest.mark.parametrize("level", [0.01, 0.001])
@pytest.mark.parametrize("family", range(4), ids=["directed", "cross_fit", "sign_flip", "combined"])
def test_size(null_p_values, family, level):
    """2000 runs of 16 or 32 draws; a test whose size is its level fails this with probability 1e-6.

    Finds (with probability .99) sizes of .030 at level .01 and of .0115 at level .001.
    """
    rejected = int((null_p_values[:, family] <= level).sum())
    print(f"size {rejected / len(null_p_values):.4f} at level {level}")
    assert rejected <= scipy.stats.binom.isf(FALSE_ALARM, len(null_p_values), level)


def test_single_elements_as_directions_would_break_the_size():
    """Negative control of the size test: t tests of single elements see rare outcomes never happen, and reject."""
    rng = np.random.default_rng(1)
    rejected = 0
    for _ in range(200):
        e = two_point_errors(rng, 32).reshape(32, -1)
        rejected += directed_p([Directions(e, np.zeros(e.shape[1]), False)]) <= 0.001
    assert rejected > 100
    assert rejected > scipy.stats.binom.isf(FALSE_ALARM, 200, 0.001)


@pytest.mark.parametrize(
    ("name", "bits", "n", "classes", "dtype"),
    [
        ("psq", 8, 1, 10, torch.float32),
        ("psq", 8, 2, 10, torch.float32),  # two rows: each channel's two elements are its grid's ends, errors are 1e-9
        ("psq", 8, 4, 10, torch.float32),
        ("psq", 4, 32, 2, torch.float32),  # two classes: the same of the last layer's rows
        ("psq", 4, 32, 10, torch.float32),
        ("bhq", 3, 32, 10, torch.float32),
        ("ptq", 8, 32, 10, torch.float32),
        ("psq", 8, 32, 10, torch.bfloat16),  # the gradient's own cast is no bias of the quantizer
        ("psq", 8, 32, 10, torch.float16),
        ("psq", 8, 4, 10, torch.float64),
    ],
)
def test_no_false_alarm_on_real_gradients(name, bits, n, classes, dtype):
    """Four measurements of 32 draws, seven rows each: no p below 3e-8, hence a false alarm of 1e-6 per case.

    Finds what an unbiased quantizer must not trip: rare outcomes, and rounding of the arithmetic, which gave p = 0.
    """
    model, batch = small.mlp(classes=classes, dtype=dtype), small.batch(n, classes=classes, dtype=dtype)
    policy = fqtstats.policies.get(f"statquant-{name}", bits=bits)
    for seed in range(4):
        table = fqtstats.measure(model, batch, small.loss, policy, draws=32, seed=seed).table
        assert table["bias_p"].min() > 3e-8, table[["layer", "parameter", "bias_p"]].to_string()


def heavy_tailed(model, batch):
    """One sample counts thirty times: its gradient is the tail that clipping cuts off."""
    losses = torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    weights = torch.ones_like(losses)
    weights[3] = 30
    return (losses * weights).mean()


def measured_p(faulty, site, layer=None, loss=small.loss, draws=64, seed=0):
    good = fqtstats.quantizer("psq", bits=4)
    policy = fqtstats.Policy(**{"grad_input": good, "grad_weight": good, site: faulty})
    if layer is not None:
        policy = fqtstats.Policy(grad_input=good, grad_weight=good, overrides={layer: policy})
    result = fqtstats.measure(small.mlp(), small.batch(64), loss, policy, draws=draws, seed=seed)
    return float(result.table["bias_p"].min())


@pytest.mark.parametrize("site", ["grad_input", "grad_weight"])
@pytest.mark.parametrize(
    ("fault", "layer"),
    [
        (controls.nearest(), None),
        (controls.nearest(), "2"),
        (controls.few_random_bits(2), None),
        (controls.few_random_bits(4), None),
        (controls.rounded_zero_point(), None),
        (controls.scaled_channel(), "2"),
        (controls.pruned(), None),
    ],
    ids=["nearest", "nearest_in_one_layer", "r=2", "r=4", "zero_point", "channel_of_one_layer", "pruned"],
)
def test_64_draws_find(fault, layer, site):
    """p < 1e-3 in the total or the worst row; fixed seeds, so nothing here is left to chance."""
    assert measured_p(fault, site, layer) < 1e-3


def test_64_draws_find_clipping():
    """Of the top .1 % (one element of 640) at 8 bits, where the gradient has a tail; a smooth one has none to clip."""
    assert measured_p(controls.clipped(8), "grad_weight", loss=heavy_tailed) < 1e-3
    assert measured_p(controls.unbroken(8), "grad_weight", loss=heavy_tailed) > 1e-3


def test_the_unbroken_quantizer_is_not_found():
    """Negative control of the faults: the same code without one. The seed is fixed."""
    assert measured_p(controls.unbroken(), "grad_weight") > 1e-3


def test_eight_random_bits_are_not_found():
    """A bias of 2^-9 step on average under a noise of .4 step per draw: 64 draws see it no more than chance.

    Such micro-biases are found at the quantizer, from its exact mean.
    """
    assert measured_p(controls.few_random_bits(8), "grad_weight") > 1e-3


def test_a_rare_outcome_that_never_came_is_no_certainty():
    """One row's only decision goes up once in 50 draws; 32 draws without it, 36 % of all, are no evidence of a bias."""
    values = np.random.default_rng(0).choice([-0.5, 0.5], size=(32, 20))
    values[:, 7] = -0.02
    assert directed_p([Directions(values, np.zeros(20), True)]) > 0.01
    # Negative control: apart from its like, the row looks like a certain bias; and a bias that is large is found.
    assert directed_p([Directions(values, np.zeros(20), False)]) == 0.0
    values[:, 7] = -0.8
    assert directed_p([Directions(values, np.zeros(20), True)]) < 1e-4


# --- edges ------------------------------------------------------------------------------------------------------------


def whole(e, tolerance=0.0):
    return bias_test(directions(e, np.ones(e.shape[1:])), gram(e), tolerance)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 32])
def test_zero_errors(n):
    assert whole(np.zeros((n, 4, 3))).p_value == 1.0


@pytest.mark.parametrize("n", [8, 9, 32])
def test_identical_errors_are_certain(n):
    e = np.repeat(np.arange(1.0, 13).reshape(1, 4, 3), n, axis=0)
    assert whole(e).p_value == 0.0
    # ... unless they are within the rounding of the arithmetic.
    tolerant = [Directions(d.values, np.full(d.values.shape[1], 1e3), d.alike) for d in directions(e, np.ones((4, 3)))]
    assert bias_test(tolerant, gram(e), 1e6).p_value == 1.0


def test_coinciding_draws_are_no_certainty():
    """Two draws of sums of few roundings coincide often; that is no bias, and without t tests no p-value says so."""
    rng = np.random.default_rng(0)
    coincided = 0
    for _ in range(200):
        e = np.repeat(rng.integers(-2, 3, size=(2, 1, 1)), 12, axis=2).astype(float)
        coincided += bool(np.ptp(e) == 0 and np.any(e))
        assert whole(e).p_value > 0.1
    assert coincided > 10


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_few_draws_stay_valid(n):
    """500 runs: rejections at .01 beyond the binomial band have probability 1e-6. Finds a size of .06."""
    rng = np.random.default_rng(n)
    p = np.array([whole(two_point_errors(rng, n)).p_value for _ in range(500)])
    assert np.isfinite(p).all()
    assert ((p > 0) & (p <= 1)).all()
    assert (p <= 0.01).sum() <= scipy.stats.binom.isf(FALSE_ALARM, len(p), 0.01)


def test_the_combined_p_value_pays_for_three_families():
    test = whole(two_point_errors(np.random.default_rng(0), 16))
    assert test.p_value == min(1.0, 3 * min(test.directed, test.cross_fit, test.sign_flip))
