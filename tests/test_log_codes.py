"""Logarithmic codes: quantized by every native kernel, decoded, and multiplied; against torch operations and shifts."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import log_codes as oracle

from fqtstats import ops
from fqtstats.layers.operand import Operand
from fqtstats.layers.product import ConvProduct, LinearProduct, compute, how
from fqtstats.ops import convolution8, product1, product8, products, quantize
from fqtstats.ops.codes import Affine, Codes, Geometry, Kept
from fqtstats.ops.quantize import Recipe
from fqtstats.quantizers.storage import Stored
from fqtstats.random import stream

native = importlib.import_module("fqtstats._native")

VARIANTS = [k.variant for k in ops.kernels() if k.op == "quantize" and k.available and k.variant != "torch"]
STREAM = stream(seed=7, layer="kernel")
CHANNELS_LAST = torch.channels_last
MATRICES = [(1, 1), (1, 7), (2, 15), (3, 16), (2, 17), (5, 63), (3, 65), (2, 129), (7, 576), (2, 1025), (300, 5)]
IMAGES = [(1, 1, 1, 1), (2, 3, 4, 4), (3, 16, 1, 1), (2, 17, 5, 7), (2, 70, 3, 3), (2, 33, 45, 23)]


def heavy(shape, seed=0, scale=1.0):
    """Numbers of all magnitudes, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(8 * torch.randn(shape, generator=generator))
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0) / x.abs().max().clamp(min=1e-30) * scale


def recipe_of(axis, magnitudes, random_bits):
    return Recipe(axis, "logarithmic", (2 * magnitudes).bit_length(), random_bits, magnitudes)


def expected(x, recipe, pad=(0, 0)):
    n = recipe.random_bits
    bits = None if n is None else STREAM.bits(x.numel(), n)
    view = None if bits is None else bits.view(x.shape[0], x.shape[1], -1)
    return oracle.encode(x, recipe.axis, recipe.magnitudes, view, n or 0, pad)


def forms(x):
    yield x
    yield torch.empty(x.numel() + 3)[3:].view(x.shape).copy_(x)
    if x.dim() == 4:
        yield x.to(memory_format=CHANNELS_LAST)


def assert_same(got, want):
    assert (got.bits, got.shape, got.pad) == (want.bits, want.shape, want.pad)
    assert (got.affine.axis, got.affine.magnitudes) == (want.affine.axis, want.affine.magnitudes)
    for name in ("step", "zero", "offset"):
        a, b = getattr(got.affine, name), getattr(want.affine, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
    assert torch.equal(got.data, want.data)


# --- quantizing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("random_bits", [None, 8, 16, 24])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_codes_and_numbers_as_defined(variant, axis, random_bits):
    for i, shape in enumerate(MATRICES + IMAGES):
        recipe = recipe_of(axis, (7, 5, 8, 1, 2)[i % 5], random_bits)
        pad = (i % 2, i % 3) if len(shape) == 4 else (0, 0)
        x = heavy(shape, seed=i)
        for dtype in (torch.float32, torch.bfloat16):
            want = expected(x.to(dtype), recipe, pad)
            for form in forms(x):
                got = quantize.encode(form.to(dtype), recipe, STREAM.words(), pad, variant=variant)
                assert_same(got, want)
            numbers = oracle.decode(want)
            assert torch.equal(want.decode(), numbers)
            assert torch.equal(quantize.decode(want, variant=variant), numbers)
            if x.dim() == 4:
                assert torch.equal(quantize.decode(want, CHANNELS_LAST, variant=variant), numbers)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-36, 1e-40, 3e-45, 3e38])
def test_tensors_of_every_size(variant, scale):
    x = heavy((12, 70), scale=scale)
    x[0] = 0
    x[1] = x[1, 0]
    x[2] = x[2].abs()
    x[3] = -x[3].abs()
    x[4, 1:] = 0
    x[5] = x[5].sign() * scale
    x[6] = -0.0
    for magnitudes in (7, 5, 8):
        for axis, y in ((0, x), (1, x.t()), (None, x), (None, x[:1]), (None, x[1:2]), (0, x.view(12, 5, 2, 7))):
            for random_bits in (24, None):
                recipe = recipe_of(axis, magnitudes, random_bits)
                got = quantize.encode(y, recipe, STREAM.words(), variant=variant)
                assert_same(got, expected(y, recipe))
                assert torch.equal(quantize.decode(got, variant=variant), got.decode())


@settings(max_examples=40)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    magnitudes=st.sampled_from([5, 7, 8]),
)
def test_codes_of_any_numbers(values, magnitudes):
    x = torch.tensor(values, dtype=torch.float32).view(1, -1)
    recipe = recipe_of(None, magnitudes, 24)
    want = expected(x, recipe)
    for variant in VARIANTS:
        assert_same(quantize.encode(x, recipe, STREAM.words(), variant=variant), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_beyond_given_extremes_codes_are_clamped(variant):
    x = torch.tensor([[-3e38, -100.0, -3.0, 0.0, 0.5, 3.0, 100.0, 3e38]])
    ends = torch.tensor([-1.0]), torch.tensor([1.0])
    codes = quantize.encode(x, recipe_of(None, 7, None), extremes=ends, variant=variant)
    assert codes.unpack().tolist() == [[0, 0, 0, 7, 13, 14, 14, 14]]


# --- products ---------------------------------------------------------------------------------------------------------

PRODUCTS8 = [k.variant for k in ops.kernels() if k.op == "product8" and k.available and k.variant != "torch"]
CONVOLUTIONS8 = [k.variant for k in ops.kernels() if k.op == "convolution8" and k.available and k.variant != "torch"]
SIZES = [(1, 1, 1), (5, 3, 7), (17, 16, 15), (33, 65, 64), (6, 70, 129), (100, 31, 66)]
"""M, N, K: around the edges of tiles, words and vectors."""


def log_codes(shape, magnitudes=7, seed=0, step=None, pad=(0, 0)):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 * magnitudes + 1, shape, generator=generator, dtype=torch.uint8)
    zero = torch.tensor([magnitudes], dtype=torch.int32)
    return Codes.pack(raw, 4, Affine(torch.ones(1) if step is None else step, zero, magnitudes=magnitudes), pad)


def codes_of(shape, bits, seed=0, step=None, zero=None, offset=None, pad=(0, 0)):
    raw = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    zeros = None if zero is None else torch.tensor([zero], dtype=torch.int32)
    return Codes.pack(raw, bits, Affine(torch.ones(1) if step is None else step, zeros, offset), pad)


def as_bytes(codes):
    """The same numbers as codes of 8 bits."""
    shift = 2 ** (codes.affine.magnitudes - 1)
    raw = (codes.centered() + shift).to(torch.uint8)
    affine = replace(codes.affine, zero=torch.full_like(codes.affine.zero, shift), magnitudes=0)
    return Codes.pack(raw, 8, affine, codes.pad)


def by_shifts(a, b):
    """``a b^T`` for logarithmic codes ``a [M, K]`` and others ``b [N, K]``, in steps: exact integers, as float32."""
    exact = oracle.product(a.unpack().numpy(), a.affine.magnitudes, b.centered().long().numpy())
    return torch.from_numpy(exact).float()


def turned(codes):
    """Transposed in memory and by shape; one group."""
    return Codes.pack(codes.unpack().t().contiguous(), codes.bits, codes.affine)


@pytest.mark.parametrize("variant", PRODUCTS8)
@pytest.mark.parametrize("magnitudes", [7, 5, 2])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_matrix_products_are_shifts(variant, magnitudes, bits):
    for seed, (m, n, k) in enumerate(SIZES):
        zero = 2 ** (bits - 1)
        a, b = log_codes((m, k), magnitudes, seed), codes_of((n, k), bits, seed, zero=zero)
        want = by_shifts(a, b)
        across_a, across_b = turned(a), turned(b)
        for left, a_inner in ((a, True), (across_a, False)):
            for right, b_inner in ((b, True), (across_b, False)):
                got = product8._product(left, right, None, m, n, k, a_inner, b_inner, variant)
                assert torch.equal(got, want)
                got = product8._product(right, left, None, n, m, k, b_inner, a_inner, variant)
                assert torch.equal(got, want.t())


@pytest.mark.parametrize("variant", PRODUCTS8)
def test_both_operands_may_be_logarithmic(variant):
    a, b = log_codes((9, 40), 7, 1), log_codes((20, 40), 5, 2)
    assert torch.equal(product8._product(a, b, None, 9, 20, 40, True, True, variant), by_shifts(a, b))


def problem(seed, kernel, geometry, size, n=3, inputs=5, outputs=6, bits=4, pads=(0, 0)):
    """Codes of g, w and x of a convolution with all scales there can be."""
    groups = geometry.groups
    positions = geometry.positions(size, kernel)
    step = torch.tensor([0.37])
    g = log_codes((n, outputs * groups, *positions), 7, seed, step * 0.01, pads)
    w = codes_of((outputs * groups, inputs, *kernel), bits, seed + 1, step, 3)
    x = codes_of((n, inputs * groups, *size), bits, seed + 2, step, None, torch.tensor([0.2]), pads)
    return g, w, x


CASES = [
    ((3, 3), Geometry((1, 1), (1, 1)), (7, 6), {}),
    ((3, 3), Geometry((2, 1), (1, 2), (1, 2)), (9, 8), {"pads": (1, 2)}),
    ((1, 1), Geometry(), (4, 4), {"inputs": 70, "outputs": 33}),
    ((2, 3), Geometry((1, 2), (0, 1), (1, 1), 2), (6, 5), {"inputs": 3, "bits": 8}),
    ((3, 3), Geometry((1, 1), (1, 1)), (5, 5), {"n": 9, "inputs": 17, "outputs": 65, "bits": 2}),
]


@pytest.mark.parametrize("variant", CONVOLUTIONS8)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_convolutions_of_logarithmic_codes(variant, case, monkeypatch):
    kernel, geometry, size, more = CASES[case]
    g, w, x = problem(case, kernel, geometry, size, **more)
    assert torch.equal(g.centered().long(), torch.from_numpy(by_table(g)))
    w0 = replace(w, affine=replace(w.affine, offset=None))
    calls = [
        (products.convolution_grad_input, convolution8.convolution_grad_input, (g, w0, geometry, size)),
        (products.convolution_grad_weight, convolution8.convolution_grad_weight, (g, x, geometry, kernel)),
        (products.convolution, convolution8.convolution, (as_input(x, g), w, geometry)),
    ]
    for defined, native_kernel, arguments in calls:
        got = native_kernel(*arguments, variant=variant)
        expanded = (as_bytes(arguments[0]), *arguments[1:])
        assert torch.equal(got, native_kernel(*expanded, variant=variant))
        with monkeypatch.context() as patch:
            patch.setattr(products, "KERNELS", ())
            assert torch.equal(got, defined(*arguments))


def by_table(codes):
    """What the codes stand for, in steps, by shifts of 1."""
    one, m = np.ones(1, np.int64), codes.affine.magnitudes
    table = np.array([oracle.shifted(code, m, one)[0] for code in range(2 * m + 1)])
    return table[codes.unpack().numpy()]


def as_input(x, g):
    """Logarithmic codes of the shape of ``x``."""
    return log_codes(x.shape, g.affine.magnitudes, 5, g.affine.step, x.pad)


def test_matrix_products_with_all_corrections(monkeypatch):
    """Steps per row, offsets on the other side, a bias: as defined, and as of bytes."""
    g = log_codes((12, 9), 7, 0, torch.tensor([0.3]))
    rows = replace(g, affine=replace(g.affine, step=torch.rand(12) + 0.1, zero=g.affine.zero.repeat(12), axis=0))
    w = codes_of((9, 20), 4, 1, torch.tensor([0.7]), 5, torch.tensor([0.4]))
    x = codes_of((12, 20), 4, 2, torch.tensor([0.9]), None, torch.tensor([-3.0]))
    calls = [
        (products.linear_grad_input, (rows, w)),
        (products.linear_grad_weight, (g, x)),
        (products.linear, (rows, codes_of((20, 9), 4, 3, torch.tensor([0.1]), 8), torch.randn(20))),
    ]
    for function, arguments in calls:
        got = function(*arguments)
        assert torch.equal(got, function(as_bytes(arguments[0]), *arguments[1:]))
        with monkeypatch.context() as patch:
            patch.setattr(products, "KERNELS", ())
            assert torch.equal(got, function(*arguments))


def test_eight_magnitudes_are_not_for_integer_kernels():
    raw = torch.randint(0, 17, (5, 6), dtype=torch.uint8)
    g = Codes.pack(raw, 8, Affine(torch.ones(1), torch.tensor([8], dtype=torch.int32), magnitudes=8))
    w = codes_of((6, 4), 4, zero=3)
    assert product8.linear_grad_input(g, w) is None
    assert torch.equal(products.linear_grad_input(g, w), by_shifts(g, turned(w)))
    left, right = Operand(Stored(g)), Operand(Stored(w))
    assert how(LinearProduct(), "grad_input", left, right, torch.float32) == (
        "float32: the magnitudes of g do not fit bytes"
    )


def test_one_bit_kernels_leave_logarithmic_codes_to_others():
    g, w = log_codes((5, 64)), codes_of((64, 8), 1)
    assert product1.linear_grad_input(g, w) is None
    assert torch.equal(products.linear_grad_input(g, w), by_shifts(g, turned(w)))
    left, right = Operand(Stored(g)), Operand(Stored(w))
    assert how(LinearProduct(), "grad_input", left, right, torch.float32) == "integer log4x1"


# --- several samples, and parts ---------------------------------------------------------------------------------------


def stacked(codes, seeds, make):
    """Codes of several quantizations, one after the other."""
    return Codes.pack(torch.cat([make(seed).unpack() for seed in seeds]), codes.bits, codes.affine, codes.pad)


@pytest.mark.parametrize("samples", [2, 3])
def test_the_weight_gradient_of_several_samples_is_one_sum(samples):
    step = torch.tensor([0.013])
    for shape, other, product, last in (
        ((12, 9), (12, 20), LinearProduct(), (9, 20)),
        ((4, 6, 5, 5), (4, 7, 5, 5), ConvProduct(Geometry(padding=(1, 1))), (6, 7, 3, 3)),
    ):
        make = lambda seed, shape=shape: log_codes(shape, 7, seed, step)  # noqa: E731
        g = Stored(stacked(make(0), range(samples), make), samples=samples)
        x = codes_of(other, 4, 9, torch.tensor([0.7]), 5)
        assert g.shape == shape
        total = make(0).decode()
        for seed in range(1, samples):
            total = total + make(seed).decode()
        assert torch.equal(g.decode(), total / samples)
        got = compute(product, "grad_weight", Operand(g), Operand(Stored(x)), last)
        exact = sum(
            compute(
                product,
                "grad_weight",
                Operand(Stored(replace(make(s), affine=replace(make(s).affine, step=torch.ones(1))))),
                Operand(Stored(replace(x, affine=replace(x.affine, step=torch.ones(1))))),
                last,
            )
            for s in range(samples)
        )
        assert torch.equal(got, exact * ((step / samples) * x.affine.step))
        assert how(product, "grad_weight", Operand(g), Operand(Stored(x)), torch.float32) == "integer log4x4"
    assert "a mean of samples" in how(LinearProduct(), "grad_input", Operand(g), Operand(Stored(x)), torch.float32)


PARTS = [[0], [1, 4, 5], [0, 1, 2, 3, 4, 5], []]


@pytest.mark.parametrize("indices", PARTS, ids=str)
@pytest.mark.parametrize("bits", [4, 2, 8])
@pytest.mark.parametrize("linear", [True, False])
def test_products_of_what_is_kept(linear, bits, indices):
    kept = torch.tensor(indices, dtype=torch.int64)
    count, size = len(indices), 6
    scales = {"step": torch.rand(max(count, 1)) + 0.1, "offset": torch.randn(max(count, 1))}
    product = LinearProduct() if linear else ConvProduct(Geometry(padding=(1, 1)))
    space = () if linear else (5, 4)
    taps = () if linear else (3, 3)
    w, x = (
        codes_of((6, 10, *taps), 1, 1, torch.tensor([0.3]), 0),
        codes_of((6, 10, *space), 1, 2, torch.tensor([0.2]), 0),
    )
    for axis, name, other, shape in ((0, "grad_input", w, (6, 10, *space)), (1, "grad_weight", x, (6, 10, *taps))):
        part = tuple(count if i == axis else n for i, n in enumerate((6, 6, *space)))
        raw = torch.randint(0, 2**bits, part, dtype=torch.uint8)
        affine = Affine(scales["step"], None, scales["offset"], axis if count > 1 else None)
        codes = Codes.pack(raw, bits, affine)
        g = Stored(codes, kept=Kept(axis, kept, size))
        assert g.shape == (6, 6, *space)
        decoded = g.decode()
        dropped = torch.tensor([i for i in range(size) if i not in indices], dtype=torch.int64)
        assert decoded.shape == g.shape
        assert not decoded.index_select(axis, dropped).any()
        assert how(product, name, Operand(g), Operand(Stored(other)), torch.float32) == f"integer {bits}x1"
        got = compute(product, name, Operand(g), Operand(Stored(other)), shape)
        assert got.shape == shape
        assert not got[dropped].any()
        if count:
            assert torch.equal(decoded.index_select(axis, kept), codes.decode())
            alone = compute(product, name, Operand(Stored(codes)), Operand(Stored(other)), (count, *shape[1:]))
            assert torch.equal(got[kept], alone)
        if name == "grad_input" and not linear:
            assert got.is_contiguous(memory_format=CHANNELS_LAST)
        wrong = "grad_weight" if name == "grad_input" else "grad_input"
        assert how(product, wrong, Operand(g), Operand(Stored(x if axis == 0 else w)), torch.float32).startswith(
            "float32"
        )
    grouped = ConvProduct(Geometry(groups=2))
    assert "groups" in how(grouped, "grad_weight", Operand(g), Operand(Stored(x)), torch.float32)
