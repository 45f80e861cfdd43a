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
    g, x = (products._counted_from_zero(c) for c in (g, x))  # as the public product does
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
@settings(max_examples=60)
def test_every_variant_is_the_definition(function, data):
    arguments = data.draw(cases(function))
    expected = definition(function, *arguments)
    for variant in VARIANTS:
        y = getattr(convolution1, function)(*arguments, variant=variant)
        assert y.shape == expected.shape
        assert torch.equal(y, expected), variant


def taps(images, geometry, kernel, out):
    """[N, C, H, W] to [kh, kw, N, C, OH, OW]: what each tap of each output pixel reads; 0 outside."""
    (sy, sx), (py, px), (dy, dx) = geometry.stride, geometry.padding, geometry.dilation
    room = [(0, 0), (0, 0), (py, py + sy), (px, px + sx)]
    padded = np.pad(images, room)
    return np.stack(
        [
            np.stack([padded[:, :, ky * dy :: sy, kx * dx :: sx][:, :, : out[0], : out[1]] for kx in range(kernel[1])])
            for ky in range(kernel[0])
        ]
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("stride", "channels"), [(1, (65, 33)), (2, (64, 130)), (3, (1, 7))])
def test_integers_are_numpys(variant, stride, channels):
    """With step 1 and no offset the three products are plain sums of integers, here in NumPy's int64."""
    rng = np.random.default_rng(stride)
    geometry, kernel, size = Geometry((stride, stride), (1, 1)), (3, 3), (7, 6)
    out = tuple((s - 1) // stride + 1 for s in size)
    (i, o), one = channels, Affine(torch.ones(1), torch.ones(1, dtype=torch.int32))
    x, w, g = (
        random_codes(rng, shape, bits, one)
        for shape, bits in (((3, i, *size), 1), ((o, i, *kernel), 1), ((3, o, *out), 4))
    )
    cx, cw, cg = (c.centered().numpy().astype(np.int64) for c in (x, w, g))
    read = taps(cx, geometry, kernel, out)
    y = np.einsum("klnihw,oikl->nohw", read, cw)
    dw = np.einsum("klnihw,nohw->oikl", read, cg)
    # The input gradient is the transpose of the forward product: <dx, x'> = <g, conv(x')> for every x'.
    dx = convolution1.convolution_grad_input(g, w, geometry, size, variant=variant).double().numpy()
    probe = rng.integers(-9, 10, cx.shape)
    forward = np.einsum("klnihw,oikl->nohw", taps(probe, geometry, kernel, out), cw)
    assert (dx * probe).sum() == (cg * forward).sum()
    assert np.array_equal(convolution1.convolution(x, w, geometry, variant=variant).numpy(), y)
    assert np.array_equal(convolution1.convolution_grad_weight(g, x, geometry, kernel, variant=variant).numpy(), dw)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("variant", VARIANTS[:-1])
def test_threads_make_no_difference(function, variant):
    """Large enough that three threads have work, and that the weight gradient has several parts."""
    rng = np.random.default_rng(0)
    x = random_codes(rng, (9, 96, 16, 16), 1, Affine(torch.rand(9) + 0.1, None, torch.rand(9), 0), (1, 1))
    w = random_codes(rng, (80, 96, 3, 3), 1, Affine(torch.ones(1), None, torch.ones(1)))
    g = random_codes(rng, (9, 80, 16, 16), 4, Affine(torch.ones(1), torch.full((1,), 7, dtype=torch.int32)))
    geometry = Geometry((1, 1), (1, 1))
    x_plain = Codes(x.data, 1, x.shape, x.pad, Affine(torch.ones(1), None, torch.ones(1)))
    arguments = {
        "convolution": (x, w, geometry, torch.rand(80)),
        "convolution_grad_input": (g, w, geometry, (16, 16)),
        "convolution_grad_weight": (g, x_plain, geometry, (3, 3)),
    }[function]
    call = getattr(convolution1, function)
    results = [with_threads(t, lambda: call(*arguments, variant=variant)) for t in (1, 2, 3)]
    assert torch.equal(results[0], definition(function, *arguments))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_long_sums(variant):
    """Longer than the byte and 16-bit sums of any variant, with the largest codes."""
    ones = Affine(torch.ones(1))
    x = Codes.pack(torch.ones(1, 9000, 3, 3, dtype=torch.uint8), 1, ones)
    w = Codes.pack(torch.ones(2, 9000, 3, 3, dtype=torch.uint8), 1, ones)
    y = convolution1.convolution(x, w, Geometry(), variant=variant)
    assert y.flatten().tolist() == [81000.0] * 2
    g = Codes.pack(torch.full((1, 9000, 1, 1), 15, dtype=torch.uint8), 4, ones)
    w = Codes.pack(torch.ones(9000, 2, 3, 3, dtype=torch.uint8), 1, ones)
    dx = convolution1.convolution_grad_input(g, w, Geometry(), (3, 3), variant=variant)
    assert torch.equal(dx, torch.full_like(dx, 9000.0 * 15))
    g = Codes.pack(torch.full((3, 2, 101, 100), 15, dtype=torch.uint8), 4, ones)
    x = Codes.pack(torch.ones(3, 2, 101, 100, dtype=torch.uint8), 1, ones)
    dw = convolution1.convolution_grad_weight(g, x, Geometry(), (1, 1), variant=variant)
    assert torch.equal(dw, torch.full_like(dw, 30300.0 * 15))


def unaligned(codes):
    """The same codes one byte further."""
    flat = torch.empty(codes.data.numel() + 1, dtype=torch.uint8)[1:]
    data = flat.view(codes.data.shape).copy_(codes.data)
    return Codes(data, codes.bits, codes.shape, codes.pad, codes.affine)


@pytest.mark.parametrize("function", FUNCTIONS)
@given(data=st.data())
@settings(max_examples=10)
def test_data_may_start_at_any_byte(function, data):
    a, b, *others = data.draw(cases(function))
    expected = definition(function, a, b, *others)
    for variant in VARIANTS:
        y = getattr(convolution1, function)(unaligned(a), unaligned(b), *others, variant=variant)
        assert torch.equal(y, expected), variant


def example():
    rng = np.random.default_rng(1)
    one = Affine(torch.ones(1), None, torch.ones(1))
    x = random_codes(rng, (2, 5, 4, 4), 1, one)
    return x, random_codes(rng, (3, 5, 3, 3), 1, one), random_codes(rng, (2, 3, 2, 2), 4, one)


def test_what_has_no_kernel():
    x, w, g = example()
    eight = Codes.pack(torch.zeros(3, 5, 3, 3, dtype=torch.uint8), 8, w.affine)
    assert convolution1.convolution(x, eight, Geometry()) is None
    assert convolution1.convolution(x, w, Geometry(groups=5)) is None
    assert convolution1.convolution_grad_input(g, eight, Geometry(), (4, 4)) is None
    assert convolution1.convolution_grad_weight(g, g, Geometry(), (1, 1)) is None
    # Zero points for which a sum would not fit into 32 bits, or that a pad pixel cannot hold.
    for zero, padding in ((2**31 - 1, 0), (2, 1), (-1, 1)):
        far = Codes(x.data, 1, x.shape, x.pad, Affine(torch.ones(1), torch.tensor([zero], dtype=torch.int32)))
        assert convolution1.convolution(far, w, Geometry(padding=(padding, padding))) is None
        assert torch.equal(
            products.convolution(far, w, Geometry(padding=(padding, padding))),
            definition("convolution", far, w, Geometry(padding=(padding, padding))),
        )


def forward_arguments(**changes):
    x, w, _ = example()
    arguments = {
        "x": x.data.numpy(),
        "x_shape": x.shape,
        "x_pad": x.pad,
        "x_step": x.affine.step.numpy(),
        "x_zero": None,
        "x_offset": None,
        "w": w.data.numpy(),
        "w_shape": w.shape,
        "w_step": w.affine.step.numpy(),
        "w_zero": None,
        "w_offset": None,
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "bias": None,
        "threads": 1,
        "out": np.empty((2, 2, 2, 3), np.float32),
    }
    return arguments | changes


def gradient_arguments(second, **changes):
    x, w, g = example()
    b = x if second == "x" else w
    arguments = {
        "g": g.data.numpy(),
        "g_bits": 4,
        "g_shape": g.shape,
        "g_pad": g.pad,
        "g_step": g.affine.step.numpy(),
        "g_zero": None,
        "g_offset": None,
        second: b.data.numpy(),
        f"{second}_shape": b.shape,
        f"{second}_step": b.affine.step.numpy(),
        f"{second}_zero": None,
        f"{second}_offset": None,
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "threads": 1,
    }
    if second == "x":
        arguments |= {"x_pad": (0, 0), "kernel": (3, 3), "out": np.empty((3, 5, 3, 3), np.float32)}
    else:
        arguments |= {"size": (4, 4), "out": np.empty((2, 4, 4, 5), np.float32)}
    return arguments | changes


FORWARD_MISTAKES = [
    ("x", {"x": np.zeros((2, 4, 4, 8), np.int8)}, TypeError),
    ("x", {"x": np.zeros((2, 4, 4, 16), np.uint8)}, ValueError),
    ("x", {"x": np.zeros((2, 4, 4, 16), np.uint8)[..., ::2]}, ValueError),
    ("x", {"x_pad": (1, 1)}, ValueError),
    ("x_shape", {"x_shape": (2, 0, 4, 4)}, ValueError),
    ("x_pad", {"x_pad": (-1, 0)}, ValueError),
    ("x_step", {"x_step": np.ones(3, np.float32)}, ValueError),
    ("x_step", {"x_step": np.ones(1)}, TypeError),
    ("x_zero", {"x_zero": np.zeros(1, np.int64)}, TypeError),
    ("x_offset", {"x_offset": np.zeros(2, np.float32)}, ValueError),
    ("w_shape", {"w": np.zeros((3, 3, 3, 8), np.uint8), "w_shape": (3, 6, 3, 3)}, ValueError),
    ("w_shape", {"w": np.zeros((3, 5, 3, 8), np.uint8), "w_shape": (3, 5, 5, 3)}, ValueError),
    ("stride", {"stride": (0, 1)}, ValueError),
    ("padding", {"padding": (0, -1)}, ValueError),
    ("dilation", {"dilation": (0, 1)}, ValueError),
    ("bias", {"bias": np.zeros(2, np.float32)}, ValueError),
    ("threads", {"threads": 0}, ValueError),
    ("out", {"out": np.empty((2, 2, 3, 3), np.float32)}, ValueError),
    ("out", {"out": np.empty((2, 2, 2, 3))}, TypeError),
    ("variant", {"variant": "abacus"}, ValueError),
]

GRADIENT_MISTAKES = [
    ("g", {"g": np.zeros((2, 2, 2, 4), np.int8)}, TypeError),
    ("g", {"g": np.zeros((2, 2, 2, 8), np.uint8)}, ValueError),
    ("g_bits", {"g_bits": 8}, ValueError),
    ("g_bits", {"g_bits": 3}, ValueError),
    ("g_step", {"g_step": np.ones(4, np.float32)}, ValueError),
    ("g_shape", {"padding": (1, 1)}, ValueError),
    ("stride", {"stride": (1, 0)}, ValueError),
    ("threads", {"threads": 0}, ValueError),
    ("out", {"out": np.empty((1, 5, 4, 4), np.float32)}, ValueError),
    ("variant", {"variant": "abacus"}, ValueError),
]


@pytest.mark.parametrize(("name", "change", "error"), FORWARD_MISTAKES)
def test_strict_boundary_of_forward(name, change, error):
    native = native_module()
    assert native.convolution1_forward(**forward_arguments())
    with pytest.raises(error, match=name):
        native.convolution1_forward(**forward_arguments(**change))


@pytest.mark.parametrize("second", ["w", "x"])
@pytest.mark.parametrize(("name", "change", "error"), GRADIENT_MISTAKES)
def test_strict_boundary_of_gradients(second, name, change, error):
    native = native_module()
    call = native.convolution1_grad_input if second == "w" else native.convolution1_grad_weight
    assert call(**gradient_arguments(second))
    with pytest.raises(error, match=name):
        call(**gradient_arguments(second, **change))


@pytest.mark.parametrize("argument", ["x_shape", "stride", "threads"])
def test_numbers_are_not_converted(argument):
    changed = {"x_shape": (2.0, 5.0, 4.0, 4.0), "stride": (1.0, 1.0), "threads": 1.0}[argument]
    with pytest.raises(TypeError):
        native_module().convolution1_forward(**forward_arguments(**{argument: changed}))
