import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqtstats.ops import convolution1, products
from fqtstats.ops.codes import Affine, Codes, Geometry
from fqtstats.ops.extension import kernels, native_module

pytestmark = pytest.mark.skipif(native_module() is None, reason="the extension is not in use")

VARIANTS = [k.variant for k in kernels() if k.op == "convolution1" and k.available and k.variant != "torch"]
CHANNELS = st.one_of(st.integers(1, 130), st.sampled_from([1, 31, 32, 33, 63, 64, 65, 128]))
FUNCTIONS = ("convolution", "convolution_grad_input", "convolution_grad_weight")


def affine(draw, rng, bits, groups, axis, padded):
    """A random meaning of codes; zero points are codes where pad pixels have to hold them."""
    axis = axis if draw(st.booleans()) else None
    n = 1 if axis is None else groups
    low, high = (0, 2**bits) if padded else (-3, 2**bits + 3)
    zero = torch.from_numpy(rng.integers(low, high, n).astype(np.int32)) if draw(st.booleans()) else None
    offset = torch.from_numpy(rng.standard_normal(n).astype(np.float32)) if draw(st.booleans()) else None
    step = torch.from_numpy(rng.random(n).astype(np.float32) + np.float32(0.1))
    return Affine(step, zero, offset, axis)


def random_codes(rng, shape, bits, meaning, pad=(0, 0)):
    codes = torch.from_numpy(rng.integers(0, 2**bits, shape).astype(np.uint8))
    return Codes.pack(codes, bits, meaning, pad)


@st.composite
def cases(draw, function):
    """Arguments of one of the functions, and its definition's."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (2, 2), (5, 3), (1, 4)]))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (draw(st.integers(0, kernel[0])), draw(st.integers(0, kernel[1])))
    reach = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = tuple(draw(st.integers(max(1, r), max(9, r))) for r in reach)
    n, i, o = draw(st.integers(1, 5)), draw(CHANNELS), draw(CHANNELS)
    geometry = Geometry(stride, padding, dilation)
    out = tuple((s - r) // step + 1 for s, r, step in zip(size, reach, stride, strict=True))
    pads = st.tuples(st.integers(0, 3), st.integers(0, 3))
    x_shape, w_shape, g_shape = (n, i, *size), (o, i, *kernel), (n, o, *out)
    if function == "convolution":
        x = random_codes(rng, x_shape, 1, affine(draw, rng, 1, n, 0, True), draw(st.one_of(pads, st.just(padding))))
        w = random_codes(rng, w_shape, 1, affine(draw, rng, 1, o, 0, False))
        bias = torch.from_numpy(rng.standard_normal(o).astype(np.float32)) if draw(st.booleans()) else None
        return x, w, geometry, bias
    bits = draw(st.sampled_from([4, 4, 2, 1]))
    if function == "convolution_grad_input":
        g = random_codes(rng, g_shape, bits, affine(draw, rng, bits, n, 0, True), draw(pads))
        return g, random_codes(rng, w_shape, 1, affine(draw, rng, 1, i, 1, False)), geometry, size
    g = random_codes(rng, g_shape, bits, affine(draw, rng, bits, o, 1, True), draw(pads))
    x = random_codes(rng, x_shape, 1, affine(draw, rng, 1, i, 1, True), draw(pads))
    return g, x, geometry, kernel


def definition(function, *arguments):
    """The public function without native kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "KERNELS", ())
        return getattr(products, function)(*arguments)


def with_threads(threads, call):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("function", FUNCTIONS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_variant_is_the_definition(function, data):
    arguments = data.draw(cases(function))
    expected = definition(function, *arguments)
    for variant in VARIANTS:
        y = getattr(convolution1, function)(*arguments, variant=variant)
        assert y.shape == expected.shape
        assert torch.equal(y, expected), variant
