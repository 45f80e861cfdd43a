"""The native block Householder transform, groups and codes against their definitions, bit for bit."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqtstats import ops
from fqtstats.errors import NonFiniteError
from fqtstats.ops import quantize
from fqtstats.ops.householder import (
    Groups,
    householder_encode,
    householder_forward,
    householder_groups,
    householder_inverse,
)
from fqtstats.quantizers import quantizer
from fqtstats.quantizers.bhq import BlockHouseholder, group_rows
from fqtstats.quantizers.storage import store
from fqtstats.random import stream

native = importlib.import_module("fqtstats._native")

VARIANTS = [k.variant for k in ops.kernels() if k.op == "householder" and k.available and k.variant != "torch"]
ROWS = (2, 3, 5, 8, 17, 64, 131)
COLUMNS = (*range(1, 71), 511, 512, 513, 1000)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def case(n_rows, columns, seed=0, spread=3.0):
    """Rows of log-normal ranges, and their transform; every eighth row is constant."""
    g = rng(seed)
    x = torch.randn(n_rows, columns, generator=g) * torch.exp(spread * torch.randn(n_rows, 1, generator=g))
    x[7::8] = x[7::8, :1]
    ranges = torch.exp(spread * torch.randn(n_rows, generator=g)).double()
    ranges[7::8] = 0
    return x, BlockHouseholder.of(group_rows(ranges), torch.float32)


def one_group(n):
    """A single group of n rows."""
    ranges = torch.cat([torch.ones(1), torch.full((n - 1,), 1e-4)]).double()
    transform = BlockHouseholder.of(group_rows(ranges), torch.float32)
    assert transform.sizes.tolist() == [n]
    return transform


def by_definition(transform, x):
    """Transformed rows and their inverse by the torch code; x is [N, D]."""
    n_rows, columns = x.shape
    z = x.view(n_rows, 1, columns)[transform.order] * transform.row_scale
    y = transform.reflect_(z).view(n_rows, columns)
    back = transform.reflect_(y.clone().view(n_rows, 1, columns)) / transform.row_scale
    return y, torch.empty_like(back).index_copy_(0, transform.order, back).view(n_rows, columns)


def arguments(transform):
    return transform.order, transform.heads, transform.sizes, transform.row_scale.view(-1)


def forward(variant, transform, x, threads=1):
    out, low, high = torch.full_like(x, 7.0), torch.empty(len(x)), torch.empty(len(x))
    native.householder_forward(x, *arguments(transform), threads, out, low, high, variant)
    return out, low, high


def inverse(variant, transform, y, threads=1):
    out = torch.full_like(y, 7.0)
    native.householder_inverse(y, *arguments(transform), threads, out, variant)
    return out


def check(variant, transform, x, threads=1):
    expected, back = by_definition(transform, x)
    y, low, high = forward(variant, transform, x, threads)
    assert torch.equal(y, expected)
    assert torch.equal(low, expected.amin(1))
    assert torch.equal(high, expected.amax(1))
    assert not torch.signbit(low[low == 0]).any()
    assert torch.equal(inverse(variant, transform, expected, threads), back)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_rows", ROWS)
def test_every_width(variant, n_rows):
    for columns in COLUMNS if n_rows == 17 else COLUMNS[::9]:
        check(variant, *reversed(case(n_rows, columns, seed=columns)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [*range(2, 36), 61, 64, 65, 127, 128, 129, 1021, 4099])
def test_a_group_of_every_size(variant, n):
    transform = one_group(n)
    for columns in (1, 33) if n > 200 else (1, 5, 16, 33, 600):
        check(variant, transform, torch.randn(n, columns, generator=rng(n)))


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=30)
@given(
    n_rows=st.integers(2, 150),
    columns=st.integers(1, 100),
    spread=st.sampled_from([0.0, 1.0, 4.0, 15.0]),
    seed=st.integers(0, 2**32),
    threads=st.integers(1, 3),
)
def test_any_grouping(variant, n_rows, columns, spread, seed, threads):
    check(variant, *reversed(case(n_rows, columns, seed, spread)), threads)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows_no_columns_one_row_and_no_groups(variant):
    none = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    for n_rows, columns in ((0, 5), (4, 0), (1, 37), (4, 37)):
        order, scale = torch.arange(n_rows).flip(0), torch.full((n_rows,), 0.5)
        x = torch.randn(n_rows, columns, generator=rng(0))
        out, low, high = torch.empty_like(x), torch.empty(n_rows), torch.empty(n_rows)
        native.householder_forward(x, order, *none, scale, 2, out, low, high, variant)
        assert torch.equal(out, x.flip(0) / 2)
        if columns:
            assert torch.equal(low, out.amin(1))
            assert torch.equal(high, out.amax(1))
        else:
            assert torch.equal(low, torch.full((n_rows,), torch.inf))
            assert torch.equal(high, -low)
        back = torch.empty_like(x)
        native.householder_inverse(out, order, *none, scale, 2, back, variant)
        assert torch.equal(back, x)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(40, 5000), (9, 30_001), (700, 512), (128, 16_384)])
def test_same_on_any_number_of_threads(variant, shape):
    # The last one is large enough to be written past the caches, which only whole cache lines are.
    x, transform = case(*shape)
    expected = by_definition(transform, x)
    for threads in (1, 2, 3):
        y, low, high = forward(variant, transform, x, threads)
        assert torch.equal(y, expected[0])
        assert torch.equal(low, y.amin(1))
        assert torch.equal(high, y.amax(1))
        assert torch.equal(inverse(variant, transform, y, threads), expected[1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shift", [1, 3, 15])
def test_unaligned_memory(variant, shift):
    x, transform = case(33, 70)
    buffers = [torch.empty(x.numel() + shift)[shift:].view(x.shape) for _ in range(2)]
    buffers[0].copy_(x)
    expected, back = by_definition(transform, x)
    extremes = [torch.empty(34)[1:] for _ in range(2)]
    native.householder_forward(buffers[0], *arguments(transform), 1, buffers[1], *extremes, variant)
    assert torch.equal(buffers[1], expected)
    native.householder_inverse(buffers[1], *arguments(transform), 1, buffers[0], variant)
    assert torch.equal(buffers[0], back)


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_around_the_rows_is_left_alone(variant):
    x, transform = case(19, 37)
    for run in (
        lambda out: native.householder_forward(
            x, *arguments(transform), 1, out, torch.empty(19), torch.empty(19), variant
        ),
        lambda out: native.householder_inverse(x, *arguments(transform), 1, out, variant),
    ):
        buffer = torch.full((19 * 37 + 64,), 5.0)
        run(buffer[32:-32].view(19, 37))
        assert bool((buffer[:32] == 5).all() & (buffer[-32:] == 5).all())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("columns", [1, 16, 37])
def test_extremes_of_what_is_not_finite(variant, bad, columns):
    for column in {0, columns // 2, columns - 1}:
        x, transform = case(21, columns)
        x[5, column] = bad
        expected, _ = by_definition(transform, x)
        y, low, high = forward(variant, transform, x)
        assert torch.equal(torch.isfinite(y), torch.isfinite(expected))
        torch.testing.assert_close(low, expected.amin(1), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(high, expected.amax(1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zeros_of_either_sign_have_a_positive_zero_as_extreme(variant):
    transform = one_group(3)
    for value in (0.0, -0.0):
        _, low, high = forward(variant, transform, torch.full((3, 20), value))
        assert not torch.signbit(torch.cat([low, high])).any()


# --- the operation ----------------------------------------------------------------------------------------------------


def torch_only(monkeypatch, function):
    monkeypatch.setenv("FQTSTATS_NATIVE", "0")
    ops.native_module.cache_clear()
    try:
        return function()
    finally:
        monkeypatch.undo()
        ops.native_module.cache_clear()


@pytest.mark.parametrize("shape", [(24, 6, 35), (24, 1, 10), (24, 7, 1)])
def test_operation_and_fallback_agree(monkeypatch, shape):
    x, transform = case(24, shape[1] * shape[2])
    x = x.view(shape)
    y, low, high = transform.forward_extremes(x)
    back = transform.inverse(y.clone())
    fallback = torch_only(monkeypatch, lambda: transform.forward_extremes(x))
    assert all(torch.equal(a, b) for a, b in zip((y, low, high), fallback, strict=True))
    assert low.shape == (24, 1, 1)
    assert torch.equal(transform.forward(x), y)
    assert torch.equal(back, torch_only(monkeypatch, lambda: transform.inverse(y.clone())))


def test_memory_format_is_kept():
    x, transform = case(24, 5 * 12)
    x = x.view(24, 5, 12)
    y = transform.forward(x)
    last = torch.empty(24, 12, 5).transpose(1, 2).copy_(y)
    back = transform.inverse(last.clone(memory_format=torch.preserve_format))
    assert back.stride() == last.stride() == (60, 1, 5)
    assert torch.equal(back, transform.inverse(y.clone()))
    images = torch.empty(24, 5, 3, 4).to(memory_format=torch.channels_last).copy_(y.view(24, 5, 3, 4))
    assert (
        transform.inverse(images.reshape(24, 5, -1)).view(24, 5, 3, 4).is_contiguous(memory_format=torch.channels_last)
    )
    strided = torch.empty(24, 5, 24)[..., ::2].copy_(y)
    assert torch.equal(transform.inverse(strided), back)


def test_other_types_have_no_kernel():
    x, transform = case(8, 6)
    groups = Groups(*arguments(transform))
    for other in (x.double(), x.to("meta")):
        assert householder_forward(other, groups) is None
        assert householder_inverse(other, groups) is None


def test_exactly_one_variant_is_selected():
    selected = [k.variant for k in ops.kernels() if k.op == "householder" and k.selected]
    assert len(selected) == 1
    assert selected[0] in VARIANTS


def whole(**changed):
    x, transform = case(8, 6)
    order, heads, sizes, scale = arguments(transform)
    values = {"x": x, "order": order, "heads": heads, "sizes": sizes, "scale": scale, "threads": 1}
    values |= {"out": torch.empty(8, 6), "low": torch.empty(8), "high": torch.empty(8)}
    for name, change in changed.items():
        values[name] = change(values[name])
    return values


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("x", lambda x: x.double(), TypeError, "must be float32"),
        ("x", lambda x: x.to(torch.bfloat16), TypeError, "must be float32"),
        ("x", lambda x: x.view(-1), ValueError, "got 1-D"),
        ("x", lambda x: torch.empty(6, 8).t(), ValueError, "with strides"),
        ("x", lambda x: torch.empty(8, 12)[:, ::2], ValueError, "with strides"),
        ("x", lambda x: x.tolist(), TypeError, "incompatible function arguments"),
        ("order", lambda x: x.int(), TypeError, "must be int64"),
        ("order", lambda x: x[:-1], ValueError, r"\[8\]"),
        ("order", lambda x: torch.zeros(8, dtype=torch.int64), ValueError, "a permutation of 0 to 7, got 0 at 1"),
        ("order", lambda x: x + 1, ValueError, "a permutation of 0 to 7, got 8"),
        ("order", lambda x: x - 1, ValueError, "a permutation of 0 to 7, got -1"),
        ("heads", lambda x: x.double(), TypeError, "must be int64"),
        ("heads", lambda x: x.view(1, -1), ValueError, "got 2-D"),
        ("heads", lambda x: x - 1, ValueError, "heads must be 0 to 7, got -1 at 0"),
        ("heads", lambda x: x + 8, ValueError, "heads must be 0 to 7"),
        ("sizes", lambda x: x.long(), TypeError, "must be float64"),
        ("sizes", lambda x: x[:0], ValueError, "got 1-D float64"),
        ("sizes", lambda x: x * 0 + 1, ValueError, "sizes must be 2 to 8"),
        ("sizes", lambda x: x + 8, ValueError, "sizes must be 2 to 8"),
        ("sizes", lambda x: x * np.nan, ValueError, "sizes must be 2 to 8, got .*nan at 0"),
        ("sizes", lambda x: x * 0 + 2.5, ValueError, "sizes must be whole numbers"),
        ("scale", lambda x: x.double(), TypeError, "must be float32"),
        ("scale", lambda x: x[1:], ValueError, r"\[8\]"),
        ("threads", lambda x: 0, ValueError, "threads must be 1 to 65536"),
        ("out", lambda x: torch.empty(8, 7), ValueError, r"\[8, 6\]"),
        ("out", lambda x: x.double(), TypeError, "must be float32"),
        ("out", lambda x: torch.empty(6, 8).t(), ValueError, "with strides"),
        ("low", lambda x: x[1:], ValueError, r"\[8\]"),
        ("high", lambda x: x.double(), TypeError, "must be float32"),
    ],
)
def test_native_boundary_is_strict(name, change, error, message):
    values = whole(**{name: change})
    with pytest.raises(error, match=message) as caught:
        native.householder_forward(**values)
    assert "incompatible" in str(caught.value) or str(caught.value).startswith(f"{name} must be")
    if name not in ("low", "high"):
        del values["low"], values["high"]
        with pytest.raises(error, match=message):
            native.householder_inverse(**values)


def test_native_boundary_refuses_overlap_and_unknown_variants():
    values = whole()
    buffer = torch.zeros(96)
    values["x"], values["out"] = buffer[:48].view(8, 6), buffer[47:95].view(8, 6)
    with pytest.raises(ValueError, match="out must be apart from x in memory"):
        native.householder_forward(**values)
    values["out"] = buffer[48:].view(8, 6)
    native.householder_forward(**values)
    with pytest.raises(ValueError, match=r"variant must be one of .*scalar, got 'sse9'"):
        native.householder_forward(**values, variant="sse9")


# --- groups and scales ------------------------------------------------------------------------------------------------


def check_groups(ranges):
    expected = BlockHouseholder.of(group_rows(ranges), torch.float32)
    groups = householder_groups(ranges)
    for name, want in zip(Groups._fields, arguments(expected), strict=True):
        got = getattr(groups, name)
        assert got.dtype == want.dtype
        assert torch.equal(got, want), name


RANGE = st.one_of(
    st.floats(0, 3.4028234663852886e38, width=32),
    st.floats(0, 2.0**-126, width=32),
    st.integers(0, 4).map(float),
    st.sampled_from([0.0, 1e-45, 2.0**-60, 2.0**60, 3.4028234663852886e38, 6.8e38]),
)


@settings(max_examples=300)
@given(st.lists(RANGE, min_size=2, max_size=80))
def test_groups_of_any_ranges(values):
    if max(values) > 0:
        check_groups(torch.tensor(values, dtype=torch.float64))


@settings(max_examples=150)
@given(
    n=st.one_of(st.integers(2, 1100), st.sampled_from([2, 3, 31, 127, 128, 257, 1021, 1024])),
    spread=st.sampled_from([0.0, 0.3, 1.0, 4.0, 15.0]),
    steps=st.sampled_from([0, 1, 16]),
    zeros=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 2**32),
)
def test_groups_of_many_rows(n, spread, steps, zeros, seed):
    """Log-normal ranges; with `steps`, rounded to multiples of 1 / steps, so that many are equal."""
    g = rng(seed)
    ranges = torch.exp(spread * torch.randn(n, generator=g)).double()
    if steps:
        ranges = (ranges * steps).round() / steps
    ranges[torch.rand(n, generator=g) < zeros] = 0
    ranges[n // 2] = 1
    check_groups(ranges)


@pytest.mark.parametrize("n", [2, 3, 7, 8, 64, 1000])
def test_groups_where_shares_end_on_halves(n):
    check_groups(torch.cat([torch.tensor([3.0, 1.0])[:n], torch.full((max(n - 2, 0),), 2.0**-9)]).double())
    check_groups(torch.full((n,), 0.1, dtype=torch.float64))
    check_groups((torch.arange(n) == n // 2).double())


def test_only_the_torch_path_makes_a_summation_tree():
    """The native path makes only what it needs."""
    x, _ = case(40, 12)
    q, s = quantizer("bhq", bits=4), stream(seed=1)
    transform = store(q, x, s).transform
    assert isinstance(transform, BlockHouseholder)
    transform.inverse(transform.forward(x.view(40, 12, 1)))
    assert set(vars(transform)) == {"order", "heads", "sizes", "row_scale"}
    assert transform.members.numel() == int(transform.sizes.sum()) - transform.heads.numel()
    assert torch.equal(torch.bincount(transform.head_of_member) + 1.0, transform.sizes.float())


def test_groups_have_no_kernel_elsewhere(monkeypatch):
    ranges = torch.arange(5).double()
    assert householder_groups(ranges.to("meta")) is None
    assert torch_only(monkeypatch, lambda: householder_groups(ranges)) is None
    expected = BlockHouseholder.of_ranges(ranges, torch.float32)
    found = torch_only(monkeypatch, lambda: BlockHouseholder.of_ranges(ranges, torch.float32))
    assert all(map(torch.equal, arguments(found), arguments(expected)))


def groups_of(n, **changes):
    values = {"order": np.zeros(n, np.int64), "heads": np.zeros(n // 2, np.int64)}
    values |= {"sizes": np.zeros(n // 2), "scale": np.zeros(n, np.float32)}
    return {**values, **changes}


BAD_GROUPS = [
    ({"order": np.zeros(5, np.int32)}, TypeError, "order must be int64"),
    ({"order": np.zeros(6, np.int64)}, ValueError, r"order must be int64 \[5\]"),
    ({"heads": np.zeros(2)}, TypeError, "heads must be int64"),
    ({"heads": np.zeros(5, np.int64)}, ValueError, r"heads must be int64 \[2\]"),
    ({"sizes": np.zeros(2, np.float32)}, TypeError, "sizes must be float64"),
    ({"sizes": np.zeros(1)}, ValueError, r"sizes must be float64 \[2\]"),
    ({"scale": np.zeros(5)}, TypeError, "scale must be float32"),
    ({"scale": np.zeros(10, np.float32)[::2]}, ValueError, "scale must be .* with strides"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD_GROUPS,
        ({"ranges": np.ones(5, np.float32)}, TypeError, "ranges must be float64"),
        ({"ranges": np.ones((5, 1))}, ValueError, r"ranges must be float64 \[\*\]"),
        ({"ranges": np.ones(1)}, ValueError, "ranges must be of 2 rows at least"),
        ({"ranges": np.zeros(5)}, ValueError, "ranges must be positive in one row at least"),
        (
            {"ranges": np.array([1, 1, np.nan, 1, 1])},
            ValueError,
            "ranges must be from 0 to twice the largest float, .*nan at 2",
        ),
        (
            {"ranges": np.array([1, np.inf, 0, 1, 1])},
            ValueError,
            "ranges must be from 0 to twice the largest float, .*inf at 1",
        ),
        (
            {"ranges": np.array([-1.0, 1, 0, 1, 1])},
            ValueError,
            "ranges must be from 0 to twice the largest float, .*at 0",
        ),
    ],
)
def test_native_boundary_of_groups_is_strict(changes, error, message):
    values = {"ranges": np.arange(5.0), **groups_of(5)}
    assert native.householder_groups(**values) >= 1
    with pytest.raises(error, match=message):
        native.householder_groups(**{**values, **changes})


# --- codes ------------------------------------------------------------------------------------------------------------


def input_of(shape, seed=0, spread=2.0):
    """Rows of log-normal ranges about different means; every eighth row is constant."""
    g = rng(seed)
    rows = torch.exp(spread * torch.randn(shape[0], 1, generator=g))
    x = torch.randn(shape[0], math.prod(shape[1:]), generator=g) * rows + torch.randn(shape[0], 1, generator=g)
    x[7::8] = x[7::8, :1]
    return x.view(shape)


def forms(x):
    yield x
    if x.dim() == 4:
        yield x.to(memory_format=torch.channels_last)


def check_codes(monkeypatch, x, bits, pad=(0, 0), random_bits=24, threads=(1, 2, 3)):
    """Codes, grids and decoded numbers of `store` are those of `encode` with torch operations alone."""
    q, s = quantizer("bhq", bits=bits, random_bits=random_bits), stream(seed=bits)
    encoded = torch_only(monkeypatch, lambda: q.encode(x, s))
    decoded = torch_only(monkeypatch, encoded.decode)
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            stored = store(q, x, s, pad)
            assert torch.equal(stored.codes.unpack(), encoded.codes().view(x.shape))
            assert torch.equal(stored.codes.affine.step, encoded.frame.grid.step.view(-1))
            assert torch.equal(stored.decode(), decoded)
    finally:
        torch.set_num_threads(before)
    return stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(40, 37), (2, 9), (3, 64), (131, 520), (8, 5, 3, 4), (24, 70, 1, 3)])
def test_codes_are_those_of_encode(monkeypatch, shape, bits, dtype):
    for x in forms(input_of(shape, seed=bits).to(dtype)):
        check_codes(monkeypatch, x, bits, (1, 2) if len(shape) == 4 else (0, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(45, 12_000), (12, 35, 34, 38)])
def test_codes_of_what_is_transformed_in_several_parts(monkeypatch, shape, dtype):
    for random_bits in (8, 24):
        for x in forms(input_of(shape, spread=0.5).to(dtype)):
            stored = check_codes(monkeypatch, x, 8, (0, 1) if len(shape) == 4 else (0, 0), random_bits)
    assert stored.transform.heads.numel() > 1


def test_codes_of_one_group_that_is_larger_than_the_memory_that_is_kept(monkeypatch):
    x = torch.randn(3, 5_700_000, generator=rng(0)) * torch.tensor([[1.0], [1e-3], [1e-3]])
    stored = check_codes(monkeypatch, x, 4, threads=(2,))
    assert stored.transform.sizes.tolist() == [3]


def encode(x, **changes):
    return householder_encode(x, **{"bits": 4, "random_bits": 24, "words": (1, 2, 3, 4), **changes})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(40, 2051), (9, 33, 6, 11)])
def test_codes_of_every_variant(variant, shape):
    for x in forms(input_of(shape)):
        expected, groups = encode(x)
        for form in (x, x.bfloat16()):
            codes, found = encode(form, variant=variant)
            want, want_groups = (expected, groups) if form is x else encode(form)
            assert torch.equal(codes.data, want.data)
            assert all(map(torch.equal, found, want_groups))


def test_codes_with_known_extremes():
    x = input_of((20, 30))
    codes, groups = encode(x)
    known, same = encode(x, extremes=(x.amin(1), x.amax(1)))
    assert torch.equal(codes.data, known.data)
    assert all(map(torch.equal, groups, same))


@pytest.mark.parametrize("x", [torch.randn(1, 40, generator=rng(0)), torch.arange(3.0).view(3, 1).expand(3, 8)])
def test_one_row_and_constant_rows_are_not_transformed(x):
    codes, groups = encode(x)
    assert groups is None
    assert torch.equal(codes.data, quantize.encode(x, quantizer("psq", bits=4).recipe, (1, 2, 3, 4)).data)
    assert store(quantizer("bhq", bits=4), x, stream()).transform is None


def test_codes_have_no_kernel_elsewhere(monkeypatch):
    x = input_of((8, 6))
    for other in (x.double(), x.half(), x.to("meta")):
        assert encode(other) is None
    assert encode(x, random_bits=25) is None
    assert torch_only(monkeypatch, lambda: encode(x)) is None


def spoiled(value):
    x = input_of((6, 9))
    x[3, 4] = value
    return x


def beyond_float32():
    x = input_of((6, 9))
    x[2, :2] = torch.tensor([-3e38, 3e38])
    return x


@pytest.mark.parametrize(
    "x",
    [spoiled(np.nan), spoiled(np.inf), spoiled(-np.inf), beyond_float32()],
    ids=["nan", "inf", "-inf", "range"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused_as_by_torch(monkeypatch, x, dtype):
    q, x = quantizer("bhq", bits=4), x.to(dtype)
    assert encode(x) is None
    with pytest.raises(NonFiniteError) as got:
        store(q, x, stream())

    def expected():
        with pytest.raises(NonFiniteError) as want:
            store(q, x, stream())
        return want.value

    want = torch_only(monkeypatch, expected)
    assert str(got.value) == str(want)
    assert (got.value.count, got.value.numel) == (want.count, want.numel)


def whole_encode(**changes):
    values = {"x": np.arange(150, dtype=np.float32).reshape(5, 6, 5), "channels_last": False, "bits": 3}
    values |= {"random_bits": 24, "words": (1, 2, 3, 4), "storage_bits": 4, "size": (5, 1), "pad": (0, 1)}
    values |= {"out": np.zeros((5, 5, 3, 4), np.uint8), "step": np.zeros(5, np.float32)}
    values |= {"zero": np.zeros(5, np.int32), "offset": np.zeros(5, np.float32), **groups_of(5)}
    return {**values, "low": None, "high": None, "adaptive": False, "threads": 1, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD_GROUPS,
        ({"x": np.zeros((5, 6, 5))}, TypeError, "x must be float32 or bfloat16, got 3-D float64"),
        ({"x": np.zeros((5, 6), np.float32)}, ValueError, r"x must be float32 \[\*, \*, \*\]"),
        ({"x": np.zeros((5, 6, 10), np.float32)[..., ::2]}, ValueError, "x must be .* with strides"),
        ({"x": np.zeros((0, 6, 5), np.float32)}, ValueError, "x must be not empty"),
        ({"x": np.zeros((5, 6, 4), np.float32)}, ValueError, "x must be as many positions as size has"),
        ({"bits": 0}, ValueError, "bits must be 1 to 8, got 0"),
        ({"bits": 5}, ValueError, "storage_bits must be at least bits, got 4"),
        ({"storage_bits": 3}, ValueError, "storage_bits must be 1, 2, 4 or 8, got 3"),
        ({"random_bits": 0}, ValueError, "random_bits must be 1 to 24, got 0"),
        ({"random_bits": 25}, ValueError, "random_bits must be 1 to 24, got 25"),
        ({"size": (0, 5)}, ValueError, "size must be .* got 0"),
        ({"pad": (-1, 0)}, ValueError, "pad must be .* got -1"),
        ({"pad": (0, 0)}, ValueError, r"out must be uint8 \[5, 5, 1, 4\]"),
        ({"out": np.zeros((5, 5, 3, 4), np.int8)}, TypeError, "out must be uint8"),
        ({"step": np.zeros(3, np.float32)}, ValueError, r"step must be float32 \[5\]"),
        ({"zero": np.zeros(5, np.int64)}, TypeError, r"zero must be int32 \[5\]"),
        ({"offset": np.zeros(5)}, TypeError, r"offset must be float32 \[5\]"),
        ({"low": np.zeros(5, np.float32)}, ValueError, "low and high must be given together"),
        ({"low": np.zeros(1, np.float32), "high": np.zeros(5, np.float32)}, ValueError, r"low must be float32 \[5\]"),
        ({"threads": 0}, ValueError, "threads must be 1 to 65536, got 0"),
        ({"variant": "sse9"}, ValueError, r"variant must be one of .*scalar, got 'sse9'"),
    ],
)
def test_native_boundary_of_encode_is_strict(changes, error, message):
    status, groups = native.householder_encode(**whole_encode())
    assert status == 1
    assert groups >= 1
    with pytest.raises(error, match=message):
        native.householder_encode(**whole_encode(**changes))
