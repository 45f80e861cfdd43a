"""The sketch of an error: linear, short, deterministic, and its inner products are those of the errors on average."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqtstats.estimators.sketch import WIDTH, Sketch


def tensors(shapes, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


MIXED = [(5, 7), (3,), (), (400, 90), (64, 32, 3, 3), (30000,), (1, 20000)]


def test_linear():
    sketch = Sketch(tensors(MIXED), 1)
    a, b = tensors(MIXED, 1), tensors(MIXED, 2)
    combined = sketch([2 * x - 3 * y for x, y in zip(a, b, strict=True)])
    np.testing.assert_allclose(combined, 2 * sketch(a) - 3 * sketch(b), rtol=0, atol=1e-9)


def test_deterministic_and_seeded():
    a = tensors(MIXED, 1)
    first, again, other = (Sketch(tensors(MIXED), seed)(a) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


shapes = st.one_of(
    st.tuples(), st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 60), st.integers(1, 60)), st.just((3, 2, 3, 3))
)


@given(st.lists(shapes, min_size=1, max_size=40), st.integers(1, 25))
@settings(max_examples=60)
def test_width(kinds, repeats):
    parameters = (kinds * repeats)[:600]
    sketch = Sketch([torch.zeros(shape) for shape in parameters], 0)
    assert sketch.width <= (WIDTH if len(parameters) <= 512 else max(WIDTH, 8 * len(parameters)))
    # Every parameter has its own consecutive numbers, and nothing is left over.
    at = 0
    for slots, shape in zip(sketch.slots, parameters, strict=True):
        for part in (slots.directions, slots.rows, slots.columns, slots.buckets):
            assert part.start == at
            at = part.stop
        kept = slots.buckets.stop - slots.buckets.start
        assert 1 <= kept <= np.prod(shape, dtype=int)
        assert slots.directions.stop - slots.directions.start == 3
    assert at == sketch.width


@pytest.mark.parametrize("count", [512, 513, 2000])
def test_many_large_parameters_get_eight_numbers_each(count):
    sketch = Sketch([torch.zeros(20, 20)] * count, 0)
    assert sketch.width <= max(WIDTH, 8 * count)
    assert all(s.buckets.stop - s.directions.start >= 6 for s in sketch.slots)


def test_small_parameters_are_kept_whole():
    reference, errors = tensors(MIXED), tensors(MIXED, 1)
    sketch = Sketch(reference, 0)
    out = sketch(errors)
    for p in range(3):
        kept, element = out[sketch.slots[p].buckets], errors[p].reshape(-1).numpy()
        np.testing.assert_array_equal(np.abs(kept), np.abs(element))
        np.testing.assert_allclose(kept @ kept, element @ element)


def grouped(values, groups):
    ends = [len(values) * i // groups for i in range(groups + 1)]
    return np.array([values[a:b].sum() for a, b in pairwise(ends)])


@pytest.mark.parametrize("shape", [(400, 90), (64, 32, 3, 3), (5000, 2), (2, 5000)])
def test_directions_and_row_and_column_sums_against_numpy(shape):
    (g,), (e,) = tensors([shape]), tensors([shape], 1)
    sketch = Sketch([g], 0)
    out, slots, matrix = sketch([e]), sketch.slots[0], e.numpy().reshape(shape[0], -1)
    expected = [(e * g).sum(), (e * g.sign()).sum(), e.sum()]
    np.testing.assert_allclose(out[slots.directions], expected, rtol=1e-9)
    rows, columns = sketch.row_and_column_sums(0, out[None])
    np.testing.assert_allclose(rows[0], grouped(matrix.sum(1), rows.shape[1]), atol=1e-9)
    np.testing.assert_allclose(columns[0], grouped(matrix.sum(0), columns.shape[1]), atol=1e-9)
    assert rows.shape[1] == min(shape[0], 1364)
    assert columns.shape[1] == min(matrix.shape[1], 1364)


def test_row_and_column_sums_of_a_small_parameter():
    reference, errors = tensors(MIXED), [tensors(MIXED, s) for s in (1, 2)]
    sketch = Sketch(reference, 5)
    out = np.stack([sketch(e) for e in errors])
    rows, columns = sketch.row_and_column_sums(0, out)
    for i, e in enumerate(errors):
        np.testing.assert_allclose(rows[i], e[0].sum(1), atol=1e-12)
        np.testing.assert_allclose(columns[i], e[0].sum(0), atol=1e-12)
    for vector in (1, 2):
        assert [part.shape for part in sketch.row_and_column_sums(vector, out)] == [(2, 0), (2, 0)]


def inner_products(seeds, reference, a, b, keep=lambda sketch: sketch.slots[0].buckets):
    out = []
    for seed in seeds:
        sketch = Sketch(reference, seed)
        out.append(float(sketch([a])[keep(sketch)] @ sketch([b])[keep(sketch)]))
    return np.array(out)


def test_bucket_inner_products_are_unbiased():
    """Over 400 seeds, against the exact <a, b>; t beyond 5.2 has probability 4e-7.

    Finds a relative error of the inner product of 5.2 standard errors, here about 1.5 %.
    """
    reference, (a,), (b,) = tensors([(96, 200)]), tensors([(96, 200)], 1), tensors([(96, 200)], 2)
    b = b + 0.5 * a
    exact = float((a * b).sum())
    found = inner_products(range(400), reference, a, b)
    t = (found.mean() - exact) / (found.std(ddof=1) / np.sqrt(len(found)))
    limit = scipy.stats.t.isf(2e-7, len(found) - 1)
    assert abs(t) < limit
    # Negative control: 3 % off is found.
    assert abs((found.mean() - 1.03 * exact) / (found.std(ddof=1) / np.sqrt(len(found)))) > limit


def test_ragged_last_bucket_is_counted():
    """numel = length * whole + rest: a vector that lives in the rest alone has the right norm."""
    size = WIDTH * 3 + 5
    e = torch.zeros(size, dtype=torch.float64)
    e[-1] = 2.0
    sketch = Sketch([torch.zeros(size, dtype=torch.float64)], 0)
    buckets = sketch([e])[sketch.slots[0].buckets]
    assert buckets @ buckets == 4.0
