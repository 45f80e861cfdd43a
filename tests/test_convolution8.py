import contextlib
import functools
import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqtstats.ops import convolution8, kernels, products
from fqtstats.ops.codes import Affine, Codes, Geometry

native = importlib.import_module("fqtstats._native")

VARIANTS = [k.variant for k in kernels() if k.op == "convolution8" and k.available and k.variant != "torch"]

# Around the edges of vectors (16), panels (64), tiles (4, 6 and 8 rows) and words (4); primes.
CHANNELS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 48, 49, 63, 64, 65, 70)


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def fallback():
    before, products.KERNELS = products.KERNELS, ()
    try:
        yield
    finally:
        products.KERNELS = before


def affine(generator, groups, axis, bits, zero, offset):
    n = 1 if axis is None else groups
    return Affine(
        step=torch.rand(n, generator=generator) * 0.1 + 0.01,
        zero=torch.randint(0, 2**bits, (n,), generator=generator, dtype=torch.int32) if zero else None,
        offset=torch.randn(n, generator=generator) if offset else None,
        axis=axis,
    )


def unaligned(codes):
    """The same codes, one byte further in memory."""
    buffer = torch.empty(codes.data.numel() + 1, dtype=torch.uint8)
    data = buffer[1:].view(codes.data.shape).copy_(codes.data)
    return Codes(data, codes.bits, codes.shape, codes.pad, codes.affine)


def same(got, expected):
    assert got.shape == expected.shape
    assert torch.equal(got, expected)


def integers(x, w, geometry):
    """Cross-correlation of int64 NumPy arrays, one tap at a time."""
    (n, _, height, width), (outputs, inputs, kh, kw) = x.shape, w.shape
    (sh, sw), (ph, pw), (dh, dw) = geometry.stride, geometry.padding, geometry.dilation
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    oh, ow = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    x = x.reshape(n, geometry.groups, inputs, *x.shape[2:])
    w = w.reshape(geometry.groups, -1, inputs, kh, kw)
    y = np.zeros((n, geometry.groups, w.shape[1], oh, ow), np.int64)
    for i in range(kh):
        for j in range(kw):
            window = x[..., i * dh : i * dh + sh * (oh - 1) + 1 : sh, j * dw : j * dw + sw * (ow - 1) + 1 : sw]
            y += np.einsum("ngchw,goc->ngohw", window, w[..., i, j])
    return y.reshape(n, outputs, oh, ow)


@st.composite
def problems(draw):
    """(x, w, bias, dy of the input gradient, its w, dy of the weight gradient, its x, geometry)."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    groups = pick(1, 1, 1, 2, 3)
    inputs, outputs = draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(CHANNELS))
    kernel, dilation = pick((1, 1), (3, 3), (3, 3), (2, 2), (5, 3), (1, 3)), (pick(1, 1, 2), pick(1, 1, 2))
    geometry = Geometry(
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        (draw(st.integers(0, 3)), draw(st.integers(0, 3))),
        dilation,
        groups,
    )
    size, positions = [], []
    for axis in range(2):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        size.append(draw(st.integers(max(1, extent - 2 * geometry.padding[axis]), 9)))
        positions.append((size[axis] + 2 * geometry.padding[axis] - extent) // geometry.stride[axis] + 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, 3))

    def codes(shape, axis, *, pad=True):
        bits = pick(1, 2, 4, 8, 8, 8)
        what = affine(
            generator,
            shape[axis or 0],
            None if axis is None or draw(st.booleans()) else axis,
            bits,
            draw(st.booleans()),
            draw(st.booleans()),
        )
        border = (draw(st.integers(0, 3)), draw(st.integers(0, 3))) if pad else (0, 0)
        packed = Codes.pack(
            torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8), bits, what, border
        )
        return unaligned(packed) if draw(st.booleans()) else packed

    x, dy, w = (n, inputs * groups, *size), (n, outputs * groups, *positions), (outputs * groups, inputs, *kernel)
    bias = torch.randn(w[0], generator=generator) if draw(st.booleans()) else None
    return (
        (codes(x, 0), codes(w, 0, pad=False), bias),
        (codes(dy, 0), codes(w, None, pad=False)),
        (codes(dy, 1), codes(x, 1 if groups == 1 else None)),
        geometry,
    )


# --- the definition, every variant ------------------------------------------------------------------------------------


def test_there_is_always_a_portable_variant():
    assert "scalar" in VARIANTS


@settings(max_examples=30)
@given(problem=problems(), team=st.sampled_from((1, 2, 3)))
def test_products_are_as_defined_bit_for_bit(problem, team):
    forward, grad_input, grad_weight, geometry = problem
    size, kernel = forward[0].shape[2:], forward[1].shape[2:]
    grad_weight = [products._counted_from_zero(c) for c in grad_weight]  # as the public product does
    with fallback():
        y = products.convolution(*forward[:2], geometry, forward[2])
        dx = products.convolution_grad_input(*grad_input, geometry, size)
        dw = products.convolution_grad_weight(*grad_weight, geometry, kernel)
    with threads(team):
        for variant in VARIANTS:
            same(convolution8.convolution(*forward[:2], geometry, forward[2], variant=variant), y)
            same(convolution8.convolution_grad_input(*grad_input, geometry, size, variant=variant), dx)
            same(convolution8.convolution_grad_weight(*grad_weight, geometry, kernel, variant=variant), dw)


@settings(max_examples=20)
@given(problem=problems())
def test_integers_are_those_of_an_independent_oracle(problem):
    (x, w, _), _, (dy, _), geometry = problem
    one = Affine(torch.ones(1))
    x, w, dy = (Codes(c.data, c.bits, c.shape, c.pad, one) for c in (x, w, dy))
    a, b, g = (c.unpack().numpy().astype(np.int64) for c in (x, w, dy))
    y = integers(a, b, geometry)
    # Both gradients are the transposes of the linear maps that the forward product is: <g, conv(x, w)> entry by entry.
    probe = np.random.default_rng(0)
    i, o = probe.integers(0, 256, a.shape), probe.integers(0, 256, b.shape)
    for variant in VARIANTS:
        same(convolution8.convolution(x, w, geometry, variant=variant), torch.from_numpy(y).float())
        dx = convolution8.convolution_grad_input(dy, w, geometry, x.shape[2:], variant=variant)
        dw = convolution8.convolution_grad_weight(dy, x, geometry, w.shape[2:], variant=variant)
        # Sums of this size are exact in float32 or rounded by at most 2^-24 of themselves, entry by entry.
        for gradient, direction, product in ((dx, i, integers(i, b, geometry)), (dw, o, integers(a, o, geometry))):
            expected = int((g * product).sum())
            got = float((gradient.double().numpy() * direction).sum())
            assert abs(got - expected) <= 2**-23 * expected


@functools.cache
def large(n):
    """Operands of which every thread gets a share, and their products."""
    g = torch.Generator().manual_seed(0)

    def codes(*shape, pad=(0, 0), offset=False):
        what = affine(g, 1, None, 8, True, offset)
        return Codes.pack(torch.randint(0, 256, shape, generator=g, dtype=torch.uint8), 8, what, pad)

    geometry = Geometry(padding=(1, 1))
    x, w, dy = codes(n, 40, 14, 14, pad=(1, 1)), codes(130, 40, 3, 3), codes(n, 130, 14, 14, offset=True)
    dy = products._counted_from_zero(dy)  # as the public product does before it asks for a kernel
    with fallback():
        y = products.convolution(x, w, geometry)
        dx = products.convolution_grad_input(dy, w, geometry, (14, 14))
        dw = products.convolution_grad_weight(dy, x, geometry, (3, 3))
    return geometry, x, w, dy, y, dx, dw


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("team", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 4])
def test_work_large_enough_to_be_split(variant, team, n):
    geometry, x, w, dy, y, dx, dw = large(n)
    with threads(team):
        same(convolution8.convolution(x, w, geometry, variant=variant), y)
        same(convolution8.convolution_grad_input(dy, w, geometry, (14, 14), variant=variant), dx)
        same(convolution8.convolution_grad_weight(dy, x, geometry, (3, 3), variant=variant), dw)


# --- exactness at the extremes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("zero", [0, 255])
@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize(
    ("inputs", "kernel"),
    [(3669, 3), (3670, 3), (33025, 1), (33026, 1), (70001, 1)],  # the last one: more than a part of a long sum
)
def test_extreme_codes_in_long_sums(variant, zero, code, inputs, kernel):
    what = Affine(torch.ones(1), torch.tensor([zero], dtype=torch.int32))
    x = Codes.pack(torch.full((1, inputs, kernel, kernel), code, dtype=torch.uint8), 8, what)
    w = Codes.pack(torch.full((2, inputs, kernel, kernel), 255, dtype=torch.uint8), 8, Affine(torch.ones(1)))
    exact = inputs * kernel**2 * (code - zero) * 255
    expected = torch.tensor([exact], dtype=torch.int64).float()
    same(convolution8.convolution(x, w, Geometry(), variant=variant), expected.expand(1, 2, 1, 1))
    # The same sum as an input gradient: one input channel, the long axis is that of the output channels.
    w = Codes.pack(torch.full((inputs, 1, kernel, kernel), 255, dtype=torch.uint8), 8, Affine(torch.ones(1)))
    padding = Geometry(padding=(kernel // 2, kernel // 2))
    dx = convolution8.convolution_grad_input(x, w, padding, (kernel, kernel), variant=variant)
    same(dx[0, 0, kernel // 2, kernel // 2], expected[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("zero", [0, 255])
@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("shape", [(1, 181, 182), (1, 181, 183), (5, 130, 130), (257, 16, 17)])
def test_extreme_codes_in_long_sums_of_weight_gradients(variant, zero, code, shape):
    n, height, width = shape
    what = Affine(torch.ones(1), torch.tensor([zero], dtype=torch.int32))
    dy = Codes.pack(torch.full((n, 2, height, width), code, dtype=torch.uint8), 8, what)
    x = Codes.pack(torch.full((n, 1, height, width), 255, dtype=torch.uint8), 8, Affine(torch.ones(1)))
    exact = n * height * width * (code - zero) * 255
    dw = convolution8.convolution_grad_weight(dy, x, Geometry(), (1, 1), variant=variant)
    same(dw, torch.tensor([exact], dtype=torch.int64).float().expand(2, 1, 1, 1))


def test_sums_beyond_the_limit_are_left_to_the_fallback():
    def outline(*shape):
        return Codes(torch.empty(0, dtype=torch.uint8), 8, shape, (0, 0), Affine(torch.ones(1)))

    channels = 2**23 + 1
    assert convolution8.convolution(outline(1, channels, 1, 1), outline(1, channels, 1, 1), Geometry()) is None
    dx = convolution8.convolution_grad_input(outline(1, channels, 1, 1), outline(channels, 1, 1, 1), Geometry(), (1, 1))
    assert dx is None
    images = outline(2**13 + 1, 1, 32, 32)
    assert convolution8.convolution_grad_weight(images, images, Geometry(), (1, 1)) is None


@pytest.mark.parametrize("zero", [-1, 256, 2**31 - 1])
def test_zero_points_that_are_no_codes_are_left_to_the_fallback(zero):
    plain = Affine(torch.ones(1))
    odd = Affine(torch.ones(1), torch.tensor([zero], dtype=torch.int32))
    x, w = (Codes.pack(torch.ones(2, 3, 4, 4, dtype=torch.uint8), 8, what) for what in (odd, plain))
    assert convolution8.convolution(x, w, Geometry()) is None
    assert convolution8.convolution(w, x, Geometry()) is None
    assert convolution8.convolution_grad_weight(w, x, Geometry(), (1, 1)) is None
    g = Codes.pack(torch.ones(2, 2, 1, 1, dtype=torch.uint8), 8, odd)
    assert convolution8.convolution_grad_input(g, w, Geometry(), (4, 4)) is None
    assert torch.equal(products.convolution(x, w, Geometry()), torch.full((2, 2, 1, 1), 48.0 * (1 - zero)))


# --- the public functions and the boundary ----------------------------------------------------------------------------


def small(variant=None):
    """Arguments of the three native functions, by name."""
    x, w = torch.zeros(2, 5, 6, 4, dtype=torch.uint8), torch.zeros(3, 3, 3, 4, dtype=torch.uint8)
    dy, step = torch.zeros(2, 5, 6, 4, dtype=torch.uint8), torch.ones(1)
    where = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "threads": 1, "variant": variant}

    def operand(name, data, **extra):
        return {
            name: data,
            f"{name}_bits": 8,
            f"{name}_magnitudes": 0,
            f"{name}_step": step,
            f"{name}_zero": None,
            f"{name}_offset": None,
            **{f"{name}_{key}": value for key, value in extra.items()},
        }

    pad = {"pad": (0, 0)}
    return {
        "convolution8": {
            **operand("x", x, **pad),
            **operand("w", w),
            "bias": None,
            "channels": 4,
            "out": torch.empty(2, 5, 6, 3),
            **where,
        },
        "convolution8_grad_input": {
            **operand("g", dy, **pad),
            **operand("w", w),
            "channels": 4,
            "out": torch.empty(2, 5, 6, 4),
            **where,
        },
        "convolution8_grad_weight": {
            **operand("g", dy, **pad),
            **operand("x", x, **pad),
            "channels": 4,
            "out": torch.empty(3, 4, 3, 3),
            **where,
        },
    }


@pytest.mark.parametrize("name", small())
def test_native_functions_accept_what_the_tests_below_spoil(name):
    getattr(native, name)(**small()[name])


def spoiled():
    for name, arguments in small().items():
        first = "x" if name == "convolution8" else "g"
        tensors = [key for key, value in arguments.items() if isinstance(value, torch.Tensor)]
        for key in tensors:
            value = arguments[key]
            yield name, key, value.double(), TypeError
            yield name, key, value[None], ValueError
            yield name, key, value.to("meta"), (TypeError, ValueError)
            if value.dim() == 4:
                yield name, key, value.transpose(1, 2).contiguous().transpose(1, 2), ValueError
                yield name, key, torch.cat([value, value], -1), ValueError
        yield name, f"{first}_zero", torch.zeros(1), TypeError
        yield name, f"{first}_zero", torch.full((1,), 256, dtype=torch.int32), ValueError
        yield name, f"{first}_zero", torch.full((1,), -1, dtype=torch.int32), ValueError
        yield name, f"{first}_zero", torch.zeros(2, dtype=torch.int32), ValueError
        yield name, f"{first}_offset", torch.zeros(2), ValueError
        yield name, f"{first}_bits", 3, ValueError
        yield name, f"{first}_bits", 8.0, TypeError
        yield name, f"{first}_magnitudes", 8, ValueError
        yield name, f"{first}_magnitudes", 7, ValueError
        yield name, f"{first}_pad", (3, 0), ValueError
        yield name, f"{first}_pad", (-1, 0), ValueError
        yield name, "stride", (0, 1), ValueError
        yield name, "stride", (2, 1), ValueError
        yield name, "padding", (-1, 0), ValueError
        yield name, "padding", (0, 0), ValueError
        yield name, "dilation", (1, 0), ValueError
        yield name, "groups", 0, ValueError
        yield name, "groups", 3, ValueError
        yield name, "channels", 0, ValueError
        yield name, "threads", 0, ValueError
        yield name, "variant", "no such", ValueError
    yield "convolution8", "bias", torch.zeros(4), ValueError
    yield "convolution8", "bias", torch.zeros(3, dtype=torch.float64), TypeError
    yield "convolution8_grad_weight", "out", torch.empty(3, 4, 0, 3), ValueError
    yield "convolution8_grad_weight", "x", torch.zeros(3, 5, 6, 4, dtype=torch.uint8), ValueError


@pytest.mark.parametrize(("name", "key", "value", "error"), list(spoiled()))
def test_a_wrong_argument_is_refused_by_name(name, key, value, error):
    # What a size contradicts is the other size.
    named = {
        "out": "out|kernel",
        "stride": "output|stride",
        "padding": "output|padding",
        "groups": "groups",
        "x_pad": "x|output",
    }
    with pytest.raises(error, match=None if isinstance(value, float) else named.get(key, key.removesuffix("_pad"))):
        getattr(native, name)(**{**small()[name], key: value})


def test_public_functions_use_the_kernels_and_give_channels_last():
    generator = torch.Generator().manual_seed(0)
    x = Codes.pack(
        torch.randint(0, 16, (2, 6, 5, 7), generator=generator, dtype=torch.uint8),
        4,
        affine(generator, 2, 0, 4, True, True),
    )
    w = Codes.pack(
        torch.randint(0, 256, (8, 6, 3, 3), generator=generator, dtype=torch.uint8),
        8,
        affine(generator, 8, 0, 8, True, False),
    )
    geometry = Geometry(stride=(2, 1), padding=(1, 1))
    y = products.convolution(x, w, geometry)
    with fallback():
        same(y, products.convolution(x, w, geometry))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert convolution8 in products.KERNELS


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_images(variant):
    none = Codes.pack(torch.zeros(0, 4, 3, 3, dtype=torch.uint8), 8, Affine(torch.ones(1)))
    w = Codes.pack(torch.zeros(4, 4, 3, 3, dtype=torch.uint8), 8, Affine(torch.ones(1)))
    geometry = Geometry(padding=(1, 1))
    assert convolution8.convolution(none, w, geometry, variant=variant).shape == (0, 4, 3, 3)
    assert convolution8.convolution_grad_input(none, w, geometry, (3, 3), variant=variant).shape == (0, 4, 3, 3)
    same(convolution8.convolution_grad_weight(none, none, geometry, (3, 3), variant=variant), torch.zeros(4, 4, 3, 3))
