"""The accumulator of gradient errors: right to its stated resolution, exactly associative, and small."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import moments as oracle

from fqtstats.errors import InputError
from fqtstats.estimators.moments import ErrorMoments
from fqtstats.estimators.sketch import Sketch

SHAPES = [(6, 5), (7,), (), (3, 2, 2, 2)]
NAMES = [f"p{i}" for i in range(len(SHAPES))]


def tensors(seed, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).mul(scale).to(dtype) for shape in SHAPES]


REFERENCE, CALIBRATION = tensors(0), tensors(1, 0.1)
ERRORS = [[e + 0.01 for e in tensors(10 + i, 0.1)] for i in range(12)]


def accumulator(sketch=True, names=NAMES, reference=REFERENCE, calibration=CALIBRATION):
    return ErrorMoments(names, reference, calibration, Sketch(reference, 3) if sketch else None)


def filled(draws, **options):
    moments = accumulator(**options)
    for i in draws:
        moments.add(i, ERRORS[i], np.full((2, len(SHAPES)), float(i)))
    return moments


def same_state(a, b):
    a, b = a.state(), b.state()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


def raw(index, draws=range(12)):
    return np.stack([ERRORS[i][index].double().numpy().reshape(-1) for i in draws])


# --- right ------------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_stored_errors():
    """Each sum is off by at most half a step of 2^-31 of the largest element per draw: 2.4e-10 of it in the mean."""
    moments = filled(range(12))
    for p in range(len(SHAPES)):
        errors = raw(p)
        step = 2.0 ** moments.exponents[p]
        assert step <= 2**-31 * max(float(REFERENCE[p].abs().max()), float(CALIBRATION[p].abs().max()))
        np.testing.assert_allclose(moments.mean_error(p), oracle.mean_error(errors), rtol=0, atol=step / 2)
        norms, mean_sq, n = moments.stacked("norms")[:, p], moments.mean_norm_sq()[p], 12
        np.testing.assert_allclose(norms, (errors**2).sum(1), rtol=1e-12)
        np.testing.assert_allclose((norms.sum() - n * mean_sq) / (n - 1), oracle.variance(errors), rtol=1e-7)
        np.testing.assert_allclose(
            (n**2 * mean_sq - norms.sum()) / (n * (n - 1)), oracle.bias_norm_sq(errors), rtol=1e-6, atol=1e-10
        )


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30])
def test_every_scale_of_float32_works(scale):
    reference = [torch.tensor([1.0, -2.0]) * scale]
    moments = ErrorMoments(["w"], reference, reference, None)
    for i, factor in enumerate((1, 2, 4)):
        moments.add(i, [reference[0] * factor])
    np.testing.assert_allclose(moments.mean_error(0), reference[0].double() * 7 / 3, rtol=1e-9)


def test_zero_gradient_and_zero_errors():
    zero = [torch.zeros(4)]
    moments = ErrorMoments(["w"], zero, zero, Sketch(zero, 0))
    moments.add(0, zero)
    moments.add(1, zero)
    assert moments.mean_norm_sq().tolist() == [0.0]
    assert not moments.stacked("sketches").any()


def test_a_small_difference_on_a_large_offset_is_kept():
    """The raw float32 sum of squares would lose it: errors 1 +- 1e-6 have variance 1e-12, their squares are 1."""
    reference = [torch.ones(1, dtype=torch.float64)]
    moments = ErrorMoments(["w"], reference, reference, None)
    values = 1 + 1e-6 * np.array([-1.0, 1.0, -1.0, 1.0])
    for i, value in enumerate(values):
        moments.add(i, [torch.tensor([value], dtype=torch.float64)])
    assert abs(float(moments.mean_error(0)) - values.mean()) <= 2.0**-32


def test_exact_parts_are_kept_and_merged():
    parts = np.arange(4.0).reshape(2, 2)
    first, second = (ErrorMoments(["v", "w"], [torch.ones(2)] * 2, [torch.ones(2)] * 2, None) for _ in range(2))
    for moments, draw in ((first, 1), (second, 0)):
        moments.add(draw, [torch.ones(2)] * 2, parts + draw, np.array([draw, 2.0]))
    first.merge(second)
    assert first.stacked("own").tolist() == [[0, 2], [1, 2]]
    second = ErrorMoments(["v", "w"], [torch.ones(2)] * 2, [torch.ones(2)] * 2, None)
    second.load(first.state())
    assert second.stacked("own").tolist() == first.stacked("own").tolist()


# --- associative ------------------------------------------------------------------------------------------------------


@given(st.permutations(range(12)), st.lists(st.integers(0, 3), min_size=12, max_size=12), st.permutations(range(4)))
@settings(max_examples=60)
def test_any_split_and_order_gives_the_same_bits(order, owner, merging):
    parts = [filled([i for i, who in zip(order, owner, strict=True) if who == k]) for k in range(4)]
    merged = accumulator()
    for k in merging:
        merged.merge(parts[k])
    assert same_state(merged, filled(range(12)))
    assert merged.mean_norm_sq().tobytes() == filled(range(12)).mean_norm_sq().tobytes()


def test_float_sums_would_not_be_associative():
    """Negative control of the test above: plain float32 sums of the same errors depend on the order."""
    forward = sum(ERRORS[i][0] for i in range(12))
    backward = sum(ERRORS[i][0] for i in reversed(range(12)))
    assert not torch.equal(forward, backward)


def test_state_survives_a_round_trip():
    first = filled(range(7))
    arrays = {k: v.copy() for k, v in first.state().items()}
    second = accumulator()
    second.load(arrays)
    assert same_state(first, second)
    for i in range(7, 12):
        second.add(i, ERRORS[i], np.full((2, len(SHAPES)), float(i)))
    assert same_state(second, filled(range(12)))


def test_an_interrupted_add_leaves_whole_draws(monkeypatch):
    """Ctrl-C in the middle of a draw's sums: the draw is neither half in nor counted."""
    moments = filled(range(5))
    calls = 0
    increments = ErrorMoments._increments

    def interrupted(self, errors):
        nonlocal calls
        calls += 1
        for place, pair in enumerate(increments(self, errors)):
            if calls == 1 and place == 2:
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr(ErrorMoments, "_increments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moments.add(5, ERRORS[5])
    assert same_state(moments, filled(range(5)))


def test_an_add_that_is_interrupted_at_its_end_leaves_nothing():
    class Stopped(dict):
        def __setitem__(self, draw, value):
            raise KeyboardInterrupt

    moments = accumulator()
    moments.norms = Stopped()
    with pytest.raises(KeyboardInterrupt):
        moments.add(0, ERRORS[0], np.zeros((2, len(SHAPES))), np.zeros(len(SHAPES)))
    assert same_state(moments, accumulator())


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_an_error_beyond_the_fixed_point_is_refused_and_leaves_no_trace(bad):
    moments = filled(range(3))
    errors = [e.clone() for e in ERRORS[3]]
    errors[3].view(-1)[-1] = bad
    with pytest.raises(InputError, match="'p3' is not finite or over"):
        moments.add(3, errors)
    assert same_state(moments, filled(range(3)))


def test_the_largest_errors_allowed_fit():
    reference = [torch.ones(1)]
    moments = ErrorMoments(["w"], reference, reference, None)
    for i in range(8):
        moments.add(i, [torch.full((1,), 2.0**20)])
    assert float(moments.mean_error(0)) == 2.0**20


def test_a_draw_counts_once():
    moments = filled(range(3))
    with pytest.raises(InputError, match="draw 1 was added before"):
        moments.add(1, ERRORS[1])
    with pytest.raises(InputError, match=r"draws \[2\] are in both"):
        moments.merge(filled([2, 5]))
    assert same_state(moments, filled(range(3)))


def test_accumulators_of_different_gradients_do_not_merge():
    with pytest.raises(InputError, match="same gradient"):
        filled(range(3)).merge(accumulator(names=["a", "b", "c", "d"]))
    with pytest.raises(InputError, match="same gradient"):
        filled(range(3)).merge(accumulator(reference=tensors(0, 100.0)))
    other = accumulator(reference=tensors(0, 100.0))
    with pytest.raises(InputError, match="another gradient"):
        other.load(filled(range(3)).state())


# --- memory -----------------------------------------------------------------------------------------------------------

_PEAK = """
import resource, sys, torch
from torch import nn
import fqtstats
model = nn.Sequential(nn.Linear(1600, 1600, bias=False), nn.Linear(1600, 3200, bias=False))
batch = torch.ones(2, 1600)
policy = fqtstats.Policy(grad_input=fqtstats.quantizer("psq", bits=4), grad_weight=fqtstats.quantizer("pcq", bits=8))
loss = lambda model, batch: model(batch).square().mean()
fqtstats.measure(nn.Linear(4, 4), torch.ones(2, 4), loss, policy, draws=3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fqtstats.measure(model, batch, loss, policy, draws=int(sys.argv[1]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / sum(4 * p.numel() for p in model.parameters()))
"""


def test_memory_is_a_few_gradients_however_many_draws():
    """Peak resident memory beyond model and (here tiny) graph: at most eight gradients, and no growth with the draws.

    24 instead of 4 draws may add 20 sketches of 4096 float64 (2 % of this gradient); a buffer kept per draw would add
    20 gradients. Freed blocks go back to the system at once, so that the C library's free lists do not count.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

    def peak(draws):
        command = [sys.executable, "-c", _PEAK, str(draws)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)

    few, many = peak(4), peak(24)
    print(f"peak in gradients: {few:.2f} at 4 draws, {many:.2f} at 24")
    assert max(few, many) <= 8
    assert abs(many - few) <= 0.5
