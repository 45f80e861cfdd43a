import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqtstats import ops
from fqtstats.errors import InputError
from fqtstats.ops import product8, products
from fqtstats.ops.codes import STORAGE_BITS, Affine, Codes

native = importlib.import_module("fqtstats._native")

VARIANTS = [k.variant for k in ops.kernels() if k.op == "product8" and k.available and k.variant != "torch"]
# Around the tile (6 x 64, lanes of 16, shares of 24 rows), a block of 192 rows, words of 4 and 8 codes, a load of 64.
ROWS = (0, 1, 2, 5, 6, 7, 23, 24, 25, 64, 97, 191, 192, 193, 211)
COLUMNS = (0, 1, 3, 15, 16, 17, 31, 33, 48, 63, 64, 65, 127, 128, 129, 131)
DEPTHS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 31, 63, 64, 65, 127, 128, 129, 131, 257)
ORIENTATIONS = ("linear", "linear_grad_input", "linear_grad_weight")
# One scale per row and column; one for all rows, with one zero point for all columns: a path of its own.
SCALES = (
    {"grouped": (True, True), "zero": (True, True), "offset": (True, True)},
    {"grouped": (False, False), "zero": (True, True), "offset": (True, False)},
    {"grouped": (False, True), "zero": (True, False), "offset": (False, False)},
)


def random_codes(g, shape, bits, axis=None, zero=True, offset=True):
    groups = 1 if axis is None else shape[axis]
    top = 2**bits
    affine = Affine(
        step=torch.rand(groups, generator=g) + 0.01,
        zero=torch.randint(-3, top + 3, (groups,), generator=g, dtype=torch.int32) if zero else None,
        offset=torch.randn(groups, generator=g) if offset else None,
        axis=axis,
    )
    return Codes.pack(torch.randint(top, shape, generator=g, dtype=torch.uint8), bits, affine)


def operands(g, orientation, m, n, k, bits, grouped=(True, True), zero=(True, True), offset=(True, True)):
    """Operands of the product that gives [m, n] from k terms, and the axes of their groups."""
    shapes = {
        "linear": ((m, k), (n, k), 0, 0),
        "linear_grad_input": ((m, k), (k, n), 0, 1),
        "linear_grad_weight": ((k, m), (k, n), 1, 1),
    }
    *shape, axis_a, axis_b = shapes[orientation]
    axes = (axis_a if grouped[0] else None, axis_b if grouped[1] else None)
    return [random_codes(g, shape[i], bits[i], axes[i], zero[i], offset[i]) for i in range(2)]


def fallback(orientation, a, b, bias=None):
    product = {
        "linear": lambda x, y: x @ y.t(),
        "linear_grad_input": torch.mm,
        "linear_grad_weight": lambda x, y: x.t() @ y,
    }[orientation]
    return products._affine(product, a, b, bias)


def run(variant, orientation, a, b, bias=None, threads=1, out=None):
    k = a.shape[0 if orientation == "linear_grad_weight" else 1]
    m = a.shape[1 if orientation == "linear_grad_weight" else 0]
    n = b.shape[0 if orientation == "linear" else 1]
    out = torch.full((m, n), torch.nan) if out is None else out
    p, q = a.affine, b.affine
    inner = (orientation != "linear_grad_weight", orientation == "linear")
    scales = (p.step, p.zero, p.offset, q.step, q.zero, q.offset)
    native.product8_affine(a.data, b.data, k, a.bits, b.bits, 0, 0, *inner, *scales, bias, out, threads, variant)
    return out


def raw(variant, a, b, threads=1):
    out = torch.full((a.shape[0], b.shape[0]), -1, dtype=torch.int32)
    native.product8_integer(a, b, a.shape[1], 0, 0, out, threads, variant)
    return out


def int64(a, b):
    """The product in NumPy int64, modulo 2^32."""
    return (a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T).astype(np.int32)


# --- every variant, every layout --------------------------------------------------------------------------------------


def test_there_is_a_portable_variant():
    assert VARIANTS[-1] == "scalar"


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=60)
@given(
    m=st.sampled_from(ROWS) | st.integers(0, 70),
    n=st.sampled_from(COLUMNS) | st.integers(0, 140),
    k=st.sampled_from(DEPTHS) | st.integers(0, 300),
    signed=st.tuples(st.booleans(), st.booleans()),
    transposed=st.tuples(st.booleans(), st.booleans()),
    shift=st.integers(0, 70),
    slack=st.sampled_from((0, 1, 4, 37)),
    seed=st.integers(0, 2**32),
)
def test_integer_product_is_int64_numpy(variant, m, n, k, signed, transposed, shift, slack, seed):
    # Views into a larger buffer: any alignment, rows further apart than they are long, either axis contiguous.
    g = torch.Generator().manual_seed(seed)

    def matrix(rows, is_signed, is_transposed):
        shape = (k, rows) if is_transposed else (rows, k)
        stride = shape[1] + slack
        low, high, dtype = (-128, 128, torch.int8) if is_signed else (0, 256, torch.uint8)
        buffer = torch.randint(low, high, (shift + shape[0] * stride,), generator=g, dtype=dtype)
        view = buffer[shift:].as_strided(shape, (stride, 1))
        return view.t() if is_transposed else view

    a, b = matrix(m, signed[0], transposed[0]), matrix(n, signed[1], transposed[1])
    got = raw(variant, a, b)
    assert np.array_equal(got.numpy(), int64(a, b))
    assert torch.equal(got, raw("scalar", a, b))


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=120)
@given(
    orientation=st.sampled_from(ORIENTATIONS),
    m=st.sampled_from(ROWS) | st.integers(0, 70),
    n=st.sampled_from(COLUMNS) | st.integers(0, 140),
    k=st.sampled_from(DEPTHS) | st.integers(0, 300),
    bits=st.tuples(st.sampled_from(STORAGE_BITS), st.sampled_from(STORAGE_BITS)),
    grouped=st.tuples(st.booleans(), st.booleans()),
    zero=st.tuples(st.booleans(), st.booleans()),
    offset=st.tuples(st.booleans(), st.booleans()),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_affine_product_is_the_definition(variant, orientation, m, n, k, bits, grouped, zero, offset, with_bias, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = operands(g, orientation, m, n, k, bits, grouped, zero, offset)
    bias = torch.randn(n, generator=g) if with_bias else None
    got = run(variant, orientation, a, b, bias)
    assert torch.equal(got, fallback(orientation, a, b, bias))
    assert torch.equal(got, run("scalar", orientation, a, b, bias))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (1, 2)])
@pytest.mark.parametrize("k", [2049, 4111])
def test_several_chunks_of_k(variant, orientation, bits, k):
    for scales in SCALES:
        a, b = operands(torch.Generator().manual_seed(k), orientation, 13, 83, k, bits, **scales)
        assert torch.equal(run(variant, orientation, a, b), fallback(orientation, a, b))


@pytest.mark.parametrize("variant", VARIANTS)
def test_panels_in_several_slabs(variant):
    # 4 MB of panels at a time: two chunks of 1536 k and 1408 columns.
    for scales in SCALES:
        a, b = operands(torch.Generator().manual_seed(0), "linear_grad_weight", 3, 1400, 6000, (8, 8), **scales)
        assert torch.equal(run(variant, "linear_grad_weight", a, b), fallback("linear_grad_weight", a, b))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("m", "n"), [(2029, 1040), (2029, 1041)])
def test_results_that_are_written_past_the_caches(variant, m, n):
    # From 2^21 of them on, in whole cache lines: not where a row, or the first one, begins within a line.
    g = torch.Generator().manual_seed(n)
    for scales in ({"zero": (False, False), "offset": (False, False)}, *SCALES):
        a, b = operands(g, "linear", m, n, 9, (8, 8), **scales)
        bias = torch.randn(n, generator=g)
        expected = fallback("linear", a, b, bias)
        for threads in (1, 3):
            assert torch.equal(run(variant, "linear", a, b, bias, threads), expected)
        unaligned = torch.full((m * n + 1,), torch.nan)[1:].view(m, n)
        assert torch.equal(run(variant, "linear", a, b, bias, out=unaligned), expected)
    a = torch.randint(-128, 128, (m, 9), generator=g, dtype=torch.int8)
    b = torch.randint(-128, 128, (n, 9), generator=g, dtype=torch.int8)
    assert np.array_equal(raw(variant, a, b, threads=2).numpy(), int64(a, b))


# --- every K ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("k", [40_000, 140_000])
def test_sums_beyond_int32_are_exact(variant, orientation, k):
    g = torch.Generator().manual_seed(k)
    a, b = operands(g, orientation, 3, 18, k, (8, 8), zero=(False, True))
    # All codes at the top: the sum is the largest there is.
    top = Codes(torch.full_like(a.data, 255), 8, a.shape, a.pad, a.affine)
    for first in (a, top):
        bias = torch.randn(18, generator=g)
        assert torch.equal(run(variant, orientation, first, b, bias), fallback(orientation, first, b, bias))
    ones = Affine(torch.ones(1))
    a, b = (Codes(torch.full_like(x.data, 255), 8, x.shape, x.pad, ones) for x in (a, b))
    got = run(variant, orientation, a, b)
    assert k * 255 * 255 > 2**31
    assert torch.equal(got, torch.full_like(got, k * 255 * 255))


@pytest.mark.parametrize("variant", VARIANTS)
def test_distant_zero_points_are_exact(variant):
    # Sums of codes fit int32, those of centered codes do not.
    a, b = operands(torch.Generator().manual_seed(0), "linear", 7, 20, 500, (8, 8))
    zero = torch.full((7,), -(2**20), dtype=torch.int32)
    a = Codes(a.data, 8, a.shape, a.pad, Affine(a.affine.step, zero, a.affine.offset, 0))
    assert torch.equal(run(variant, "linear", a, b), fallback("linear", a, b))


LIMITS = [
    (torch.uint8, 255, torch.uint8, 255, 33025),
    (torch.uint8, 255, torch.int8, -128, 65793),
    (torch.int8, -128, torch.int8, -128, 131071),
]


@pytest.mark.parametrize(("a_type", "a_value", "b_type", "b_value", "limit"), LIMITS)
def test_integer_product_states_its_limit(a_type, a_value, b_type, b_value, limit):
    def full(rows, k, value, dtype):
        return torch.full((rows, k), value, dtype=dtype)

    got = ops.product8.integer_product(full(2, limit, a_value, a_type), full(3, limit, b_value, b_type))
    assert torch.equal(got, torch.full((2, 3), limit * a_value * b_value, dtype=torch.int32))
    for variant in VARIANTS:
        assert torch.equal(raw(variant, full(2, limit, a_value, a_type), full(3, limit, b_value, b_type)), got)
    with pytest.raises(InputError, match=f"K may be {limit} at most"):
        product8.integer_product(full(2, limit + 1, a_value, a_type), full(3, limit + 1, b_value, b_type))


# --- threads and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("shape", [(150, 130, 700), (20, 900, 800), (3, 5, 70_000)])
def test_same_on_any_number_of_threads(variant, orientation, shape):
    a, b = operands(torch.Generator().manual_seed(0), orientation, *shape, (8, 8))
    one = run(variant, orientation, a, b)
    for threads in (2, 3):
        assert torch.equal(run(variant, orientation, a, b, threads=threads), one)
    assert torch.equal(one, fallback(orientation, a, b))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("m", "n"), [(5, 13), (7, 64), (13, 67), (2, 33)])
def test_writes_the_result_and_nothing_else(variant, m, n):
    a, b = operands(torch.Generator().manual_seed(0), "linear", m, n, 37, (8, 4))
    buffer = torch.full((m * n + 34,), 3.0)
    out = buffer[17:-17].view(m, n)
    run(variant, "linear", a, b, out=out)
    assert torch.equal(out, fallback("linear", a, b))
    assert bool((buffer[:17] == 3).all())
    assert bool((buffer[-17:] == 3).all())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stride", [1024, 2048, 1022])
def test_rows_far_apart(variant, stride):
    g = torch.Generator().manual_seed(0)
    a = torch.randint(256, (50, stride), generator=g, dtype=torch.uint8)[:, :900]
    b = torch.randint(-128, 128, (70, stride), generator=g, dtype=torch.int8)[:, :900]
    assert np.array_equal(raw(variant, a, b).numpy(), int64(a, b))


# --- the operation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
def test_public_products_use_it_and_agree_with_the_fallback(monkeypatch, orientation, bits):
    assert product8 in products.KERNELS
    a, b = operands(torch.Generator().manual_seed(1), orientation, 33, 70, 129, bits)
    function = getattr(products, orientation)
    monkeypatch.setattr(products, "KERNELS", (product8,))
    got = function(a, b)
    monkeypatch.setattr(products, "KERNELS", ())
    assert torch.equal(got, function(a, b))
    bias = torch.randn(70)
    if orientation == "linear":
        assert torch.equal(product8.linear(a, b, bias), function(a, b, bias))


@pytest.mark.parametrize("bits", [(a, b) for a in STORAGE_BITS for b in STORAGE_BITS])
def test_integer_product_of_codes(monkeypatch, bits):
    g = torch.Generator().manual_seed(2)
    a, b = (random_codes(g, (rows, 77), width) for rows, width in zip((9, 21), bits, strict=True))
    expected = int64(a.unpack(), b.unpack())
    assert np.array_equal(product8.integer_product(a, b).numpy(), expected)
    assert np.array_equal(product8.integer_product(a.unpack(), b).numpy(), expected)
    out = torch.zeros(9, 21, dtype=torch.int32)
    assert product8.integer_product(a, b.unpack(), out=out) is out
    assert np.array_equal(out.numpy(), expected)
    monkeypatch.setattr(product8, "native_module", lambda: None)
    assert np.array_equal(product8.integer_product(a, b.unpack()).numpy(), expected)


U8 = torch.zeros(4, 8, dtype=torch.uint8)
OUT = torch.zeros(4, 4, dtype=torch.int32)
RAW = {"a": U8, "b": U8, "k": 8, "a_bits": 0, "b_bits": 0, "out": OUT, "threads": 1}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"a": U8.short()}, TypeError, "a must be uint8 or int8"),
        ({"b": U8.float()}, TypeError, "b must be uint8 or int8"),
        ({"a": U8[0]}, ValueError, "a must be uint8 or int8"),
        ({"a": U8[:3]}, ValueError, "a must be uint8 or int8"),
        ({"b": U8[:, :7]}, ValueError, "b must be uint8 or int8"),
        ({"a": torch.zeros(8, 16, dtype=torch.uint8)[::2, ::2]}, ValueError, "a must be contiguous along one axis"),
        ({"a": U8[:1].expand(4, 8)}, ValueError, "a must be contiguous along one axis"),
        ({"a_bits": 8, "a": U8.char()}, TypeError, "a must be uint8"),
        ({"b_bits": 4}, ValueError, "b must be uint8"),
        ({"a_bits": 3}, ValueError, "a must be 1, 2, 4 or 8|a_bits must be"),
        ({"k": -1}, ValueError, "k must be"),
        ({"out": OUT.long()}, TypeError, "out must be int32"),
        ({"out": OUT.t()[:, :2]}, ValueError, "out must be int32"),
        ({"threads": 0}, ValueError, "threads must be"),
        ({"k": 8.0}, TypeError, "incompatible"),
        ({"variant": "sse9"}, ValueError, "variant must be one of .*scalar"),
    ],
)
def test_native_boundary_is_strict(changed, error, message):
    with pytest.raises(error, match=message):
        native.product8_integer(**{**RAW, **changed})


STEP = torch.ones(1)
AFFINE = {
    "a": U8,
    "b": U8,
    "k": 8,
    "a_bits": 8,
    "b_bits": 8,
    "a_magnitudes": 0,
    "b_magnitudes": 0,
    "a_inner": True,
    "b_inner": True,
    "a_step": STEP,
    "a_zero": None,
    "a_offset": None,
    "b_step": STEP,
    "b_zero": None,
    "b_offset": None,
    "bias": None,
    "out": torch.zeros(4, 4),
    "threads": 1,
}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"a": U8.char()}, TypeError, "a must be uint8"),
        ({"a": U8[:, :4]}, ValueError, "a must be uint8"),
        ({"b": U8.t()}, ValueError, "b must be uint8"),
        ({"b_inner": False}, ValueError, "b must be uint8"),
        ({"a_bits": 5}, ValueError, "a_bits must be"),
        ({"a_magnitudes": 8}, ValueError, "a_magnitudes must be 0 to 7, got 8"),
        ({"b_magnitudes": -1}, ValueError, "b_magnitudes must be 0 to 7, got -1"),
        ({"b_magnitudes": 7}, ValueError, "b_magnitudes must be 0, unless codes have 4 bits, got 7"),
        ({"a_step": STEP.double()}, TypeError, "a_step must be float32"),
        ({"b_step": torch.ones(3)}, ValueError, "b_step must be float32"),
        ({"a_zero": STEP}, TypeError, "a_zero must be int32"),
        ({"b_zero": torch.zeros(2, dtype=torch.int32)}, ValueError, "b_zero must be int32"),
        ({"a_offset": torch.ones(4)}, ValueError, "a_offset must be float32"),
        ({"b_offset": STEP.half()}, TypeError, "b_offset must be float32"),
        ({"bias": torch.zeros(3)}, ValueError, "bias must be float32"),
        ({"out": torch.zeros(4, 5)}, ValueError, "b must be uint8"),
        ({"out": torch.zeros(4, 4).double()}, TypeError, "out must be float32"),
        ({"threads": 0}, ValueError, "threads must be"),
    ],
)
def test_native_boundary_of_the_affine_product_is_strict(changed, error, message):
    with pytest.raises(error, match=message):
        native.product8_affine(**{**AFFINE, **changed})


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (U8, U8[:, :4], InputError, "expected a .M, K. and b .N, K."),
        (U8[0], U8, InputError, "expected a .M, K. and b .N, K."),
        (U8.float(), U8, TypeError, "^a must be uint8 or int8 .* got torch.float32"),
        (U8, U8.to("meta"), TypeError, "^b must be .* on meta"),
        (U8, [[1]], TypeError, "^b must be .* got list"),
    ],
)
def test_integer_product_checks_its_arguments(a, b, error, message):
    with pytest.raises(error, match=message):
        product8.integer_product(a, b)


def test_contracted_sizes_must_match():
    g = torch.Generator().manual_seed(0)
    with pytest.raises(InputError, match=r"linear: expected w \[O, 8\], got \[3, 9\]"):
        products.linear(random_codes(g, (3, 8), 8), random_codes(g, (3, 9), 8))
