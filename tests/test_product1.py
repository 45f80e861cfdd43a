"""Native products of codes with a 1-bit operand, against int64 NumPy and the prescribed float32 arithmetic."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqtstats import ops
from fqtstats.errors import InputError
from fqtstats.ops import product1, products
from fqtstats.ops.codes import Affine, Codes, row_bytes

native = importlib.import_module("fqtstats._native")

VARIANTS = [k.variant for k in ops.kernels() if k.op == "product1" and k.available and k.variant != "torch"]
PAIRS = sorted(product1.PAIRS)
# Edges of the tiles: 6 and 8 rows, blocks of 16, panels of 32; groups of 64 terms, passes of 12 groups.
ROWS = (0, 1, 5, 6, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 40, 41, 64, 65, 67)
TERMS = (0, 1, 2, 31, 63, 64, 65, 100, 127, 128, 129, 191, 193, 255, 257, 320, 767, 768, 769, 831, 833, 1601)
ORIENTATIONS = {"linear": (False, False), "linear_grad_input": (False, True), "linear_grad_weight": (True, True)}


def draw(generator, bits, shape):
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def unaligned(data):
    """The same array at an address that no word can start at."""
    buffer = torch.empty(data.numel() + 1, dtype=torch.uint8)
    buffer[1:] = data.flatten()
    return buffer[1:].view(data.shape)


def packed(codes, bits, affine=None):
    return Codes.pack(codes, bits, affine or Affine(torch.ones(1)))


def integers(variant, a, b, contract=(False, False), *, signs=False, threads=1, move=lambda data: data):
    m, n = (x.shape[int(c)] for x, c in zip((a, b), contract, strict=True))
    out = torch.full((m, n), -7, dtype=torch.int32)
    arguments = [(move(x.data), x.shape[1], x.bits, c) for x, c in zip((a, b), contract, strict=True)]
    native.product1_integers(*arguments[0], *arguments[1], signs, threads, out, variant)
    return out


def oriented(x, contract):
    return x.t().contiguous() if contract else x


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", PAIRS)
@settings(max_examples=40)
@given(
    m=st.sampled_from(ROWS),
    n=st.sampled_from(ROWS),
    k=st.sampled_from(TERMS),
    orientation=st.sampled_from(sorted(ORIENTATIONS)),
    threads=st.integers(1, 3),
    move=st.sampled_from((lambda data: data, unaligned)),
    seed=st.integers(0, 2**31),
)
def test_sums_equal_numpy(variant, bits, m, n, k, orientation, threads, move, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = draw(generator, bits[0], (m, k)), draw(generator, bits[1], (n, k))
    expected = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    contract = ORIENTATIONS[orientation]
    first, second = (packed(oriented(x, c), w) for x, c, w in zip((a, b), contract, bits, strict=True))
    got = integers(variant, first, second, contract, threads=threads, move=move)
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_sums_over_several_passes(variant, orientation):
    # More than 64 panels, more than 32 rows, more than one strip of columns, and three threads.
    generator = torch.Generator().manual_seed(0)
    contract = ORIENTATIONS[orientation]
    for bits, (m, n, k) in (((1, 4), (2100, 70, 130)), ((4, 1), (70, 2100, 130)), ((1, 1), (2100, 130, 1030))):
        if variant == "scalar" and bits != (1, 1):
            k = 40  # noqa: PLW2901
        a, b = draw(generator, bits[0], (m, k)), draw(generator, bits[1], (n, k))
        expected = (a.double() @ b.double().t()).int()
        first, second = (packed(oriented(x, c), w) for x, c, w in zip((a, b), contract, bits, strict=True))
        for threads in (1, 3):
            assert torch.equal(integers(variant, first, second, contract, threads=threads), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [(1, 1), (4, 1), (1, 4)])
@pytest.mark.parametrize(("m", "n"), [(2029, 1040), (2029, 1041)])
def test_results_that_are_written_past_the_caches(variant, bits, m, n):
    # From 2^21 of them on, in whole cache lines: not where a row begins within a line.
    generator = torch.Generator().manual_seed(n)
    a, b = draw(generator, bits[0], (m, 70)), draw(generator, bits[1], (n, 70))
    first, second = (
        packed(x, w, random_affine(generator, w, x.shape[0], 0, True, True)) for x, w in zip((a, b), bits, strict=True)
    )
    bias = torch.randn(n, generator=generator)
    expected = products._affine(lambda x, y: x @ y.t(), first, second, bias)
    assert torch.equal(product1._product(first, second, False, False, bias, variant), expected)
    assert torch.equal(integers(variant, first, second, threads=2), (a.double() @ b.double().t()).int())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", PAIRS)
def test_largest_codes_over_many_terms(variant, bits):
    k = 100_003
    a, b = (packed(torch.full((7, k), (1 << w) - 1, dtype=torch.uint8), w) for w in bits)
    expected = torch.full((7, 7), k * ((1 << bits[0]) - 1) * ((1 << bits[1]) - 1), dtype=torch.int32)
    assert torch.equal(integers(variant, a, b), expected)
    generator = torch.Generator().manual_seed(1)
    a, b = (draw(generator, w, (3, k)) for w in bits)
    expected = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    assert np.array_equal(integers(variant, packed(a, bits[0]), packed(b, bits[1])).numpy(), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=20)
@given(m=st.sampled_from(ROWS), n=st.sampled_from(ROWS), k=st.sampled_from(TERMS), seed=st.integers(0, 2**31))
def test_product_of_signs(variant, m, n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = draw(generator, 1, (m, k)), draw(generator, 1, (n, k))
    expected = (2 * a.numpy().astype(np.int64) - 1) @ (2 * b.numpy().astype(np.int64) - 1).T
    got = product1.integer_product(packed(a, 1), packed(b, 1), signs=True, variant=variant)
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(got.numpy(), expected)


def random_affine(generator, bits, groups, axis, zero, offset):
    step = torch.rand(groups, generator=generator) + 0.01
    return Affine(
        step,
        torch.randint(-3, (1 << bits) + 3, (groups,), dtype=torch.int32, generator=generator) if zero else None,
        torch.randn(groups, generator=generator) if offset else None,
        axis,
    )


flags = st.tuples(*[st.booleans()] * 3)  # grouped, with zero, with offset


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@settings(max_examples=60)
@given(
    bits=st.sampled_from(PAIRS),
    m=st.sampled_from(ROWS),
    n=st.sampled_from(ROWS),
    k=st.sampled_from(TERMS),
    of_a=flags,
    of_b=flags,
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_float_product_is_the_prescribed_one(variant, orientation, bits, m, n, k, of_a, of_b, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    contract = ORIENTATIONS[orientation]
    operands = []
    for extent, width, c, (grouped, zero, offset) in zip((m, n), bits, contract, (of_a, of_b), strict=True):
        groups, axis = (extent, int(c)) if grouped else (1, None)
        affine = random_affine(generator, width, groups, axis, zero, offset)
        operands.append(packed(draw(generator, width, (k, extent) if c else (extent, k)), width, affine))
    a, b = operands
    bias = torch.randn(n, generator=generator) if biased and orientation == "linear" else None

    def bilinear(x, y):
        return (x.t() if contract[0] else x) @ (y if contract[1] else y.t())

    expected = products._affine(bilinear, a, b, bias)
    assert torch.equal(product1._product(a, b, *contract, bias, variant), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_integers_beyond_int32_are_rounded_once(variant):
    generator = torch.Generator().manual_seed(2)
    zero = torch.tensor([32768, -32768, 20001], dtype=torch.int32)
    a = packed(draw(generator, 4, (3, 4099)), 4, Affine(torch.rand(3), zero, torch.randn(3), 0))
    b = packed(draw(generator, 1, (3, 4099)), 1, Affine(torch.rand(3), zero.flip(0), torch.randn(3), 0))
    for x, w in ((a, b), (b, a)):
        expected = products._affine(lambda cx, cw: cx @ cw.t(), x, w, None)
        assert expected.abs().max() > 2**31
        assert torch.equal(product1._product(x, w, False, False, None, variant), expected)


def test_public_products_use_the_kernel(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    monkeypatch.setattr(products, "_affine", None)
    for bits in PAIRS:
        x, w, g = (
            packed(draw(generator, width, shape), width)
            for width, shape in zip((*bits, 1 if bits[0] > 1 else bits[1]), ((20, 30), (40, 30), (20, 40)), strict=True)
        )
        bias = torch.randn(40, generator=generator)
        cx, cw, cg = (codes.unpack().double() for codes in (x, w, g))
        assert torch.equal(products.linear(x, w, bias), (cx @ cw.t()).float() + bias)
        if (g.bits, w.bits) in product1.PAIRS:
            assert torch.equal(products.linear_grad_input(g, w), (cg @ cw).float())
        if (g.bits, x.bits) in product1.PAIRS:
            assert torch.equal(products.linear_grad_weight(g, x), (cg.t() @ cx).float())


def test_what_is_no_codes_is_named():
    a = packed(torch.zeros(3, 5, dtype=torch.uint8), 1)
    with pytest.raises(TypeError, match=r"^b must be codes, got Tensor"):
        product1.integer_product(a, a.data)


def test_other_widths_are_left_to_others():
    a, b = packed(torch.zeros(3, 5, dtype=torch.uint8), 4), packed(torch.zeros(3, 5, dtype=torch.uint8), 8)
    for function in (product1.linear, product1.linear_grad_input, product1.linear_grad_weight):
        assert function(a, b) is None
        assert function(a, a) is None
    with pytest.raises(InputError, match="no native product of 4-bit and 8-bit codes"):
        product1.integer_product(a, b)


# --- the boundary -----------------------------------------------------------------------------------------------------

ONE = torch.ones(1)


def call(**changes):
    arguments = {
        "a": torch.zeros(3, row_bytes(70, 4), dtype=torch.uint8),
        "a_channels": 70,
        "a_bits": 4,
        "a_contract_rows": False,
        "a_step": ONE,
        "a_zero": None,
        "a_offset": None,
        "b": torch.zeros(5, row_bytes(70, 1), dtype=torch.uint8),
        "b_channels": 70,
        "b_bits": 1,
        "b_contract_rows": False,
        "b_step": ONE,
        "b_zero": None,
        "b_offset": None,
        "bias": None,
        "threads": 1,
        "out": torch.empty(3, 5),
    }
    arguments.update(changes)
    native.product1_multiply(**arguments)


def test_accepts_what_it_documents():
    call()
    call(a_step=torch.ones(3), a_zero=torch.zeros(3, dtype=torch.int32), b_offset=ONE, bias=torch.zeros(5))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": torch.zeros(3, 36)}, TypeError, "a must be uint8"),
        ({"a": torch.zeros(3, 35, dtype=torch.uint8)}, ValueError, "a must be uint8"),
        ({"a": torch.zeros(3, 72, dtype=torch.uint8)[:, ::2]}, ValueError, "a must be uint8.*contiguous"),
        ({"a": torch.zeros(3, 36, dtype=torch.uint8, device="meta")}, TypeError, "incompatible function arguments"),
        ({"b": torch.zeros(5, 12, dtype=torch.uint8)}, ValueError, "b must be uint8"),
        ({"a_bits": 8}, ValueError, "bits of a must be 1, 2 or 4, got 8"),
        ({"a_channels": -1}, ValueError, "channels of a must be"),
        ({"a_channels": 71}, ValueError, "contracted axes of a and b must agree, got 71 and 70"),
        ({"b_contract_rows": True}, ValueError, "contracted axes of a and b must agree, got 70 and 5"),
        ({"b_bits": 4, "b": torch.zeros(5, 36, dtype=torch.uint8)}, ValueError, "one of a and b must have 1 bit"),
        ({"a_step": torch.ones(2)}, ValueError, "a_step must be float32"),
        ({"a_step": ONE.double()}, TypeError, "a_step must be float32"),
        ({"b_step": torch.ones(())}, ValueError, "b_step must be float32"),
        ({"a_zero": torch.zeros(1)}, TypeError, "a_zero must be int32"),
        ({"a_zero": torch.zeros(3, dtype=torch.int32)}, ValueError, "a_zero must be int32"),
        ({"b_zero": torch.tensor([40000], dtype=torch.int32)}, ValueError, "b_zero must be -32768 to 32768, got 40000"),
        ({"b_offset": torch.ones(5)}, ValueError, "b_offset must be float32"),
        ({"bias": torch.zeros(3)}, ValueError, "bias must be float32"),
        ({"threads": 0}, ValueError, "threads must be"),
        ({"out": torch.empty(5, 3)}, ValueError, "out must be float32"),
        ({"out": torch.empty(3, 5, dtype=torch.float64)}, TypeError, "out must be float32"),
        ({"out": torch.empty(5, 3).t()}, ValueError, "out must be float32"),
        ({"variant": "sse9"}, ValueError, "variant must be one of"),
    ],
)
def test_boundary(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_signs_need_one_bit():
    a, b = packed(torch.zeros(3, 5, dtype=torch.uint8), 4), packed(torch.zeros(3, 5, dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match="must be 1 for the product of signs, got 4"):
        product1.integer_product(a, b, signs=True)
