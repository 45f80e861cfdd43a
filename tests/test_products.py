"""The definition of the products of codes, against float64 NumPy on the decoded operands."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqtstats.errors import InputError
from fqtstats.ops import products
from fqtstats.ops.codes import Affine, Codes, Geometry

# (1 + 2^-24)^6 - 1, and room for this file's own float64 sums.
BOUND = (1 + 2**-24) ** 6 - 1 + 2**-40


def random_codes(g, shape, bits, axis=None, pad=(0, 0), zero=True, offset=True):
    groups = 1 if axis is None else shape[axis]
    affine = Affine(
        step=torch.rand(groups, generator=g) + 0.01,
        zero=torch.randint(2**bits, (groups,), generator=g, dtype=torch.int32) if zero else None,
        offset=torch.randn(groups, generator=g) if offset else None,
        axis=axis,
    )
    return Codes.pack(torch.randint(2**bits, shape, generator=g, dtype=torch.uint8), bits, affine, pad)


class Parts:
    """An operand's two summands, float64, decoded from its bytes: (code - zero) * step, and the offset everywhere."""

    def __init__(self, codes):
        per_byte = 8 // codes.bits
        bits = np.unpackbits(codes.data.numpy(), axis=-1, bitorder="little")
        weights = 2 ** np.arange(codes.bits)
        *rows, count = codes.data.shape
        values = (bits.reshape(*rows, count * per_byte, codes.bits) * weights).sum(-1)
        values = values[..., : codes.shape[1]]
        if len(codes.shape) == 4:
            (ph, pw), (height, width) = codes.pad, codes.shape[2:]
            values = values[:, ph : ph + height, pw : pw + width].transpose(0, 3, 1, 2)
        shape = [1] * values.ndim
        if codes.affine.axis is not None:
            shape[codes.affine.axis] = -1
        step, zero, offset = (
            0.0 if t is None else t.numpy().astype(np.float64).reshape(shape)
            for t in (codes.affine.step, codes.affine.zero, codes.affine.offset)
        )
        self.scaled = (values - zero) * step
        self.offset = np.broadcast_to(offset, values.shape)


def exact(product, a, b, bias=None):
    """The product of the decoded operands in float64, and the sum of magnitudes that its error is relative to."""
    a, b = Parts(a), Parts(b)
    terms = [
        product(a.scaled, b.scaled),
        product(a.scaled, b.offset),
        product(a.offset, b.scaled + b.offset),
    ]
    if bias is not None:
        columns = bias.numpy().astype(np.float64).reshape(1, -1, *[1] * (terms[0].ndim - 2))
        terms.append(np.broadcast_to(columns, terms[0].shape))
    return sum(terms), sum(np.abs(t) for t in terms)


def worst(got, product, a, b, bias=None):
    """The largest error, as a multiple of the bound."""
    y, magnitude = exact(product, a, b, bias)
    # Where integers cancel to 0, y is this file's own rounding in float64.
    own = 2**-44 * exact(lambda p, q: product(np.abs(p), np.abs(q)), a, b)[1]
    assert got.shape == y.shape
    assert got.dtype == torch.float32
    error = np.abs(got.numpy().astype(np.float64) - y)
    return float(np.max(error / (BOUND * magnitude + own + 1e-30), initial=0.0))


def as_counted(*operands):
    """Operands of a weight gradient with the zeros that it counts from: where terms of the given ones cancel exactly,
    terms of these may not, and its error is relative to theirs."""
    return [products._counted_from_zero(codes) for codes in operands]


def convolution_terms(geometry, x_size, kernel, out_size):
    """Which elements meet: for every kernel element (p, q), the rows and columns of y and of x."""
    (sh, sw), (ph, pw), (dh, dw) = geometry.stride, geometry.padding, geometry.dilation
    for p, q in itertools.product(range(kernel[0]), range(kernel[1])):
        oy = np.array([o for o in range(out_size[0]) if 0 <= o * sh + p * dh - ph < x_size[0]], dtype=int)
        ox = np.array([o for o in range(out_size[1]) if 0 <= o * sw + q * dw - pw < x_size[1]], dtype=int)
        yield p, q, np.ix_(oy, ox), np.ix_(oy * sh + p * dh - ph, ox * sw + q * dw - pw)


def channel_groups(groups, inputs, outputs):
    for i in range(groups):
        yield (
            slice(i * inputs // groups, (i + 1) * inputs // groups),
            slice(i * outputs // groups, (i + 1) * outputs // groups),
        )


def forward(geometry, out_size):
    def product(x, w):
        y = np.zeros((x.shape[0], w.shape[0], *out_size))
        for p, q, at_y, at_x in convolution_terms(geometry, x.shape[2:], w.shape[2:], out_size):
            for i, o in channel_groups(geometry.groups, x.shape[1], w.shape[0]):
                y[:, o][..., *at_y] += np.einsum("nihw,oi->nohw", x[:, i][..., *at_x], w[o, :, p, q])
        return y

    return product


def grad_input(geometry, x_shape):
    def product(g, w):
        x = np.zeros(x_shape)
        for p, q, at_y, at_x in convolution_terms(geometry, x_shape[2:], w.shape[2:], g.shape[2:]):
            for i, o in channel_groups(geometry.groups, x_shape[1], w.shape[0]):
                x[:, i][..., *at_x] += np.einsum("nohw,oi->nihw", g[:, o][..., *at_y], w[o, :, p, q])
        return x

    return product


def grad_weight(geometry, w_shape):
    def product(g, x):
        w = np.zeros(w_shape)
        for p, q, at_y, at_x in convolution_terms(geometry, x.shape[2:], w_shape[2:], g.shape[2:]):
            for i, o in channel_groups(geometry.groups, x.shape[1], g.shape[1]):
                w[o, :, p, q] += np.einsum("nohw,nihw->oi", g[:, o][..., *at_y], x[:, i][..., *at_x])
        return w

    return product


LINEAR = {
    "linear": (lambda a, b: a @ b.T, 0, 0),
    "linear_grad_input": (lambda a, b: a @ b, 0, 1),
    "linear_grad_weight": (lambda a, b: a.T @ b, 1, 1),
}
some = st.booleans()
width = st.sampled_from((1, 2, 4, 8))


@pytest.fixture(autouse=True)
def _fallback_only(monkeypatch):
    monkeypatch.setattr(products, "KERNELS", ())


def linear_operands(g, name, m, n, k, bits, grouped=(True, True), zero=(True, True), offset=(True, True)):
    _, axis_a, axis_b = LINEAR[name]
    shapes = ((k, m) if axis_a else (m, k), (k, n) if axis_b else (n, k))
    axes = (axis_a if grouped[0] else None, axis_b if grouped[1] else None)
    return [random_codes(g, shapes[i], bits[i], axes[i], zero=zero[i], offset=offset[i]) for i in range(2)]


@pytest.mark.parametrize("name", LINEAR)
@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 400)),
    bits=st.tuples(width, width),
    grouped=st.tuples(some, some),
    zero=st.tuples(some, some),
    offset=st.tuples(some, some),
    with_bias=some,
    seed=st.integers(0, 2**32),
)
def test_linear_products_within_the_bound(name, size, bits, grouped, zero, offset, with_bias, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = linear_operands(g, name, *size, bits, grouped, zero, offset)
    bias = (torch.randn(size[1], generator=g),) if with_bias and name == "linear" else ()
    got = getattr(products, name)(a, b, *bias)
    if name == "linear_grad_weight":
        a, b = as_counted(a, b)
    assert worst(got, LINEAR[name][0], a, b, *bias) <= 1


@settings(max_examples=60)
@given(
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
    groups=st.sampled_from((1, 2)),
    bits=st.tuples(width, width),
    grouped=st.tuples(some, some),
    offset=st.tuples(some, some),
    pad=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    with_bias=some,
    seed=st.integers(0, 2**32),
)
def test_convolutions_within_the_bound(
    stride, padding, dilation, kernel, size, groups, bits, grouped, offset, pad, with_bias, seed
):
    rng = torch.Generator().manual_seed(seed)
    geometry = Geometry(stride, padding, dilation, groups)
    n, inputs, outputs = 2, 6, 4
    out_size = tuple((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    x_shape, w_shape, g_shape = (n, inputs, *size), (outputs, inputs // groups, *kernel), (n, outputs, *out_size)

    def codes(shape, i, axis):
        around = pad if i == 0 else (0, 0)
        return random_codes(rng, shape, bits[i], axis if grouped[i] else None, around, offset=offset[i])

    x, w = codes(x_shape, 0, 0), codes(w_shape, 1, 0)
    bias = (torch.randn(outputs, generator=rng),) if with_bias else ()
    y = products.convolution(x, w, geometry, *bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert worst(y, forward(geometry, out_size), x, w, *bias) <= 1

    g, w = codes(g_shape, 0, 0), random_codes(rng, w_shape, bits[1], offset=offset[1])
    dx = products.convolution_grad_input(g, w, geometry, size)
    assert worst(dx, grad_input(geometry, x_shape), g, w) <= 1

    g, x = codes(g_shape, 0, 1), random_codes(rng, x_shape, bits[1], pad=pad, offset=offset[1])
    dw = products.convolution_grad_weight(g, x, geometry, kernel)
    assert worst(dw, grad_weight(geometry, w_shape), *as_counted(g, x)) <= 1


@pytest.mark.parametrize("name", LINEAR)
def test_the_bound_detects_what_it_should(name):
    # Negative controls: a zero point that is off by one, an offset left out, a sum rounded to bfloat16's precision.
    a, b = linear_operands(torch.Generator().manual_seed(0), name, 9, 11, 300, (8, 8))
    y, affine = getattr(products, name)(a, b), a.affine
    product = LINEAR[name][0]
    assert worst(y, product, a, b) <= 1
    wrong = (
        Affine(affine.step, affine.zero + 1, affine.offset, affine.axis),
        Affine(affine.step, affine.zero, None, affine.axis),
    )
    for other in wrong:
        assert worst(y, product, Codes(a.data, a.bits, a.shape, a.pad, other), b) > 100
    assert worst(y.bfloat16().float(), product, a, b) > 100


def test_the_bound_is_not_vacuous():
    # Some error comes within a factor of six of it.
    g = torch.Generator().manual_seed(0)
    a, b = linear_operands(g, "linear", 64, 64, 300, (8, 8))
    assert worst(products.linear(a, b), LINEAR["linear"][0], a, b) > 1 / 6


@pytest.mark.parametrize(
    ("name", "axes"), [("linear", (1, 0)), ("linear_grad_input", (0, 0)), ("linear_grad_weight", (1, 0))]
)
def test_scales_along_the_contracted_axis_are_refused(name, axes):
    g = torch.Generator().manual_seed(0)
    a, b = (random_codes(g, (6, 6), 8, axis) for axis in axes)
    with pytest.raises(InputError, match="which the product contracts"):
        getattr(products, name)(a, b)


def of_shape(*shape):
    return Codes.pack(torch.zeros(shape, dtype=torch.uint8), 1, Affine(torch.ones(1)))


X, W, G = of_shape(2, 6, 5, 5), of_shape(4, 3, 3, 3), of_shape(2, 4, 3, 3)
PAIRED = Geometry(groups=2)
SHAPES = {
    "linear: expected w [O, 5], got [3, 4]": ("linear", of_shape(2, 5), of_shape(3, 4)),
    "linear: expected x [R, I], got [2, 6, 5, 5]": ("linear", X, of_shape(3, 4)),
    "linear: expected bias [3], got [1]": ("linear", of_shape(2, 4), of_shape(3, 4), torch.zeros(1)),
    "linear_grad_input: expected g [R, 3], got [2, 5]": ("linear_grad_input", of_shape(2, 5), of_shape(3, 4)),
    "linear_grad_weight: expected x [2, I], got [3, 4]": ("linear_grad_weight", of_shape(2, 5), of_shape(3, 4)),
    "convolution: expected x [N, 3, H, W], got [2, 6, 5, 5]": ("convolution", X, W, Geometry()),
    "convolution: expected x [N, 9, H, W], got [2, 6, 5, 5]": (
        "convolution", X, of_shape(6, 3, 3, 3), Geometry(groups=3),
    ),
    "convolution: expected a multiple of groups = 2 output channels of w, got 5": (
        "convolution", X, of_shape(5, 3, 3, 3), PAIRED,
    ),
    "convolution: expected bias [4], got [5]": ("convolution", X, W, PAIRED, torch.zeros(5)),
    "the kernel is larger than the input: width 7 (with dilation), of the input 5 (with padding)": (
        "convolution", X, of_shape(4, 3, 1, 4), Geometry((1, 1), (0, 0), (1, 2), 2),
    ),
    "convolution_grad_input: expected g [N, 4, 3, 3], got [2, 6, 5, 5]": (
        "convolution_grad_input", X, W, PAIRED, (5, 5),
    ),
    "convolution_grad_input: expected g [N, 4, 4, 3], got [2, 4, 3, 3]": (
        "convolution_grad_input", G, W, PAIRED, (6, 5),
    ),
    "convolution_grad_weight: expected g [2, O, 4, 3], got [2, 4, 3, 3]": (
        "convolution_grad_weight", G, X, PAIRED, (2, 3),
    ),
    "convolution_grad_weight: expected g [1, O, 3, 3], got [2, 4, 3, 3]": (
        "convolution_grad_weight", G, of_shape(1, 6, 5, 5), PAIRED, (3, 3),
    ),
    "convolution_grad_weight: expected a multiple of groups = 4 input channels of x, got 6": (
        "convolution_grad_weight", G, X, Geometry(groups=4), (3, 3),
    ),
    "convolution_grad_weight: expected a multiple of groups = 3 output channels of g, got 4": (
        "convolution_grad_weight", G, X, Geometry(groups=3), (3, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", SHAPES)
def test_shapes_that_do_not_fit_are_refused(message):
    name, *arguments = SHAPES[message]
    with pytest.raises(InputError, match=re.escape(message)):
        getattr(products, name)(*arguments)


def far_from_their_offsets():
    """Gradients around zero on grids that start far below it, and activations that have no pad."""
    g = torch.Generator().manual_seed(0)
    grids = Affine(torch.full((6,), 0.01), offset=torch.full((6,), -1.28), axis=1)
    codes = torch.randint(126, 131, (64, 6, 12, 12), generator=g, dtype=torch.uint8)
    dy = Codes.pack(codes, 8, grids)
    x = random_codes(g, (64, 5, 12, 12), 8, zero=False)
    return dy, x


def largest_error(dy, x):
    exact = products._backward(
        dy.decode().double(),
        x.decode().double(),
        torch.empty(6, 5, 3, 3, dtype=torch.float64),
        Geometry(padding=(1, 1)),
        (False, True, False),
    )[1]
    dw = products.convolution_grad_weight(dy, x, Geometry(padding=(1, 1)), (3, 3))
    return float((dw - exact).abs().max() / exact.abs().max()) / 2**-24


def test_weight_gradients_do_not_cancel(monkeypatch):
    operands = far_from_their_offsets()
    assert largest_error(*operands) < 30
    monkeypatch.setattr(products, "_counted_from_zero", lambda codes: codes)
    assert largest_error(*operands) > 300


@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([1, 2, 4, 8]), axis=st.sampled_from([None, 0, 1]))
@settings(max_examples=40)
def test_counting_from_zero_keeps_the_numbers(seed, bits, axis):
    g = torch.Generator().manual_seed(seed)
    codes = random_codes(g, (5, 7), bits, axis, zero=bool(seed % 2))
    counted = products._counted_from_zero(codes)
    assert torch.equal(counted.data, codes.data)
    once_more = products._counted_from_zero(counted)
    assert torch.equal(once_more.affine.offset, counted.affine.offset)
    step, offset = codes.affine.step, codes.affine.offset
    if codes.affine.zero is None:
        spans_zero = (offset <= 0) & (offset >= -step * (2**bits - 1))
        assert bool((counted.affine.offset.abs()[spans_zero] <= step[spans_zero] * (1 + 2**-20)).all())
        # No term of the products' bound grows.
        before, after = (
            c.centered().abs() * c.affine.along(c.affine.step, 2) + c.affine.along(c.affine.offset, 2).abs()
            for c in (codes, counted)
        )
        assert bool((after <= before * (1 + 2**-20) + 1e-7).all())
    largest = (codes.decode().abs() + codes.affine.along(offset.abs(), 2)).max()
    assert bool(((counted.decode().double() - codes.decode().double()).abs() <= 2**-22 * largest).all())
