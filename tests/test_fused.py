"""The kernels between two convolutions: against each other, against numpy, autograd and the grids they encode on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chains import images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fqtstats.errors import InputError
from fqtstats.ops import fused
from fqtstats.ops.codes import Affine
from fqtstats.ops.extension import kernels, native_module
from fqtstats.quantizers.grid import affine, symmetric, zero_on_grid

ONE_BIT = Affine(step=torch.tensor([2.0]), offset=torch.tensor([-1.0]))
VARIANTS = [k.variant for k in kernels() if k.op == "fused" and k.available and k.variant != "torch"]
native = pytest.mark.skipif(native_module() is None, reason="the extension is not in use")


def same(a, b):
    """Equal bit for bit, up to the sign of zero, NaN like NaN."""
    return torch.equal(torch.nan_to_num(a, nan=1.25e30), torch.nan_to_num(b, nan=1.25e30))


def everything(y, g, f, adjoint, grid, pad, variant=None):
    """All results of the kernels, as a flat list of tensors."""
    m = fused.moments(y, variant=variant)
    out = [m.mean, m.square, m.low, m.high, *fused.extremes(y, m, f, variant=variant)]
    out += [fused.encode(y, f, grid, pad, variant=variant).data, fused.apply(y, f, variant=variant)]
    out += [fused.bits(y, f, 0.25, ONE_BIT, pad, variant=variant).data, fused.signs(y, ONE_BIT, variant=variant).data]
    out += fused.gradient_sums(g, y, f, adjoint.mean, variant=variant)
    out += fused.gradient(g, y, f, adjoint, variant=variant)
    return out


def case(n, c, h, w, relu, pool, seed, ties=False):
    """Arguments of :func:`everything`; with ``ties`` there are equal pixels in many windows."""
    y = images(n, c, h, w, seed=seed, scale=3, shift=1)
    y = y.round() if ties else y
    a, b, mean, p, q, r = torch.randn(6, c, generator=torch.Generator().manual_seed(seed + 1))
    passes = (-1.0, 2.0) if seed % 2 else (-math.inf, math.inf)
    f = fused.Map(a, b, relu, pool, passes)
    g = images(n, c, *f.size(h, w), seed=seed + 2)
    low, high = fused.extremes(y, fused.moments(y), f)
    grid = affine(low.amin().view(1, 1, 1), high.amax().view(1, 1, 1), 255)
    return y, g, f, fused.Adjoint(mean, p, q, r), grid


@native
@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.one_of(st.integers(1, 40), st.sampled_from([47, 48, 49, 64, 65])),
    st.integers(2, 9),
    st.integers(2, 19),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_every_variant_and_thread_count_gives_the_fallbacks_bits(n, c, h, w, relu, pool, ties, seed):
    arguments = (*case(n, c, h, w, relu, pool, seed, ties), (seed % 2, seed % 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "native_module", lambda: None)
        expected = everything(*arguments)
    for variant in VARIANTS:
        assert all(map(same, everything(*arguments, variant), expected)), variant


@native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pool", [False, True])
def test_threads_do_not_matter(variant, pool):
    arguments = (*case(7, 67, 33, 34, True, pool, 5), (1, 1))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(*arguments, variant))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(same, other, results[0]))


@native
@pytest.mark.parametrize("variant", VARIANTS)
def test_unaligned_memory(variant):
    y, g, f, adjoint, grid = case(2, 21, 6, 6, True, True, 3)
    expected = everything(y, g, f, adjoint, grid, (1, 1), variant)

    def moved(x):
        inner = x.permute(0, 2, 3, 1)
        buffer = torch.empty(inner.numel() + 1)
        return buffer[1:].view(inner.shape).copy_(inner).permute(0, 3, 1, 2)

    assert all(map(same, everything(moved(y), moved(g), f, adjoint, grid, (1, 1), variant), expected))


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_moments_against_numpy(shift):
    y = images(5, 9, 11, 7, scale=0.5, shift=shift)
    m = fused.moments(y)
    exact = y.numpy().astype(np.longdouble).transpose(0, 2, 3, 1).reshape(-1, 9)
    assert np.allclose(m.mean.numpy(), exact.mean(0).astype(float), rtol=1e-14, atol=1e-15)
    assert np.allclose(m.square.numpy(), (exact.var(0) * len(exact)).astype(float), rtol=1e-12, atol=0)
    assert torch.equal(m.low, y.amin((0, 2, 3)))
    assert torch.equal(m.high, y.amax((0, 2, 3)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("pool", [False, True])
def test_what_is_not_finite_shows_in_the_extremes_of_its_channel(bad, pool):
    y = images(3, 20, 4, 4)
    y[1, 17, 2, 3] = bad
    f = fused.Map(torch.ones(20), torch.zeros(20), False, pool)
    for end in fused.extremes(y, fused.moments(y), f):
        assert torch.isnan(end).nonzero().flatten().tolist() == [17]
    if math.isnan(bad):
        out = fused.apply(y, f)
        assert torch.equal(torch.isnan(out), torch.isnan(F.max_pool2d(y, 2) if pool else y))
        assert int(torch.isnan(out).sum()) == 1
    g = images(3, 20, 2, 2) if pool else images(3, 20, 4, 4)
    g[2, 5, 1, 1] = float("nan")
    ones = torch.ones(20)
    low, high = fused.gradient(g, images(3, 20, 4, 4), f, fused.Adjoint(0 * ones, 0 * ones, 0 * ones, ones))[1:]
    assert torch.isnan(low).nonzero().tolist() == torch.isnan(high).nonzero().tolist() == [[2, 5]]


@pytest.mark.parametrize(("relu", "pool"), list(itertools.product([False, True], repeat=2)))
def test_extremes_are_those_of_what_is_applied(relu, pool):
    y, _, f, _, _ = case(3, 37, 7, 6, relu, pool, 11)
    x = fused.apply(y, f)
    low, high = fused.extremes(y, fused.moments(y), f)
    if pool:  # of the whole image, the last row belongs to no window
        assert x.shape[2:] == (3, 3)
    assert torch.equal(low, x.amin((0, 2, 3)))
    assert torch.equal(high, x.amax((0, 2, 3)))


@pytest.mark.parametrize("build", [affine, zero_on_grid, symmetric])
@pytest.mark.parametrize("levels", [31, 255])
@pytest.mark.parametrize("pool", [False, True])
def test_codes_are_those_of_the_grid(build, levels, pool):
    y, _, f, _, _ = case(2, 13, 5, 8, False, pool, 2)
    x = fused.apply(y, f)
    grid = build(x.amin().view(1, 1, 1), x.amax().view(1, 1, 1), levels)
    codes = fused.encode(y, f, grid, (2, 1))
    n, c, h, w = x.shape
    expected = grid.codes(grid.coordinates(x.reshape(n, c, -1)).round_()).to(torch.uint8).view(x.shape)
    assert torch.equal(codes.unpack(), expected)
    zero = 0 if grid.zero is None else int(grid.zero)
    whole = codes.data.clone()
    assert not bool(whole[..., c:].any())  # what is left of the last word
    whole[:, 2 : 2 + h, 1 : 1 + w, :c] = zero
    assert bool((whole[..., :c] == zero).all())


@pytest.mark.parametrize(("relu", "pool"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("size", [(6, 8), (7, 9)])
def test_adjoint_against_autograd(relu, pool, size):
    y = images(4, 19, *size, shift=0.3).double().float().requires_grad_()
    norm = nn.BatchNorm2d(19).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(19, generator=torch.Generator().manual_seed(1)))
        norm.bias.copy_(torch.randn(19, generator=torch.Generator().manual_seed(2)))
    x = norm(y.double())
    x = F.relu(x) if relu else x
    x = F.max_pool2d(x, 2) if pool else x
    g = images(*x.shape, seed=4)
    expected = torch.autograd.grad(x, [y, norm.weight, norm.bias], g.double())
    y = y.detach()
    m, r = fused.moments(y), y.numel() // 19
    scale = torch.rsqrt(m.square / r + norm.eps)
    a = (norm.weight.detach() * scale).float()
    f = fused.Map(a, (norm.bias.detach() - m.mean * a.double()).float(), relu, pool)
    total, dot = fused.gradient_sums(g, y, f, m.mean.float())
    adjoint = fused.Adjoint(m.mean.float(), (total / r).float(), (dot / r * scale**2).float(), a)
    got = fused.gradient(g, y, f, adjoint)[0], dot * scale, total
    for one, other in zip(got, expected, strict=True):
        assert float((one.double() - other).abs().max()) <= 1e-5 * float(other.abs().max())


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(2, 4, 4, 3).double()}, "y must be float32"),
        ({"y": torch.zeros(4, 4, 3)}, "y must be float32"),
        ({"y": torch.zeros(2, 4, 3, 4).transpose(2, 3)}, "y must be .* strides"),
        ({"a": torch.zeros(4)}, "a must be"),
        ({"b": torch.zeros(3, dtype=torch.float64)}, "b must be"),
        ({"out": torch.zeros(2, 4, 4, 3)}, "out must be"),
        ({"threads": 0}, "threads must be"),
    ],
)
def test_the_boundary_is_strict(change, message):
    arguments = {
        "y": torch.zeros(2, 4, 4, 3),
        "a": torch.zeros(3),
        "b": torch.zeros(3),
        "floor": 0.0,
        "pool": True,
        "out": torch.zeros(2, 2, 2, 3),
        "threads": 1,
        **change,
    }
    ready = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        native_module().fused_apply(**ready)


def boundary_arguments():
    """Valid arguments of every native function, as tensors and numbers."""
    y, small, c = torch.zeros(2, 4, 4, 3), torch.zeros(2, 2, 2, 3), torch.zeros(3)
    line = {"a": c, "b": c, "floor": 0.0, "pool": True}
    ends = {"low": torch.zeros(3), "high": torch.zeros(3)}
    wide = torch.zeros(3, dtype=torch.float64)
    grid = {"offset": 0.0, "prescale": 1.0, "scale": 1.0, "zero": 0, "levels": 255, "pad_h": 1, "pad_w": 0}
    codes, bits = torch.zeros(2, 4, 2, 4, dtype=torch.uint8), torch.zeros(2, 4, 2, 8, dtype=torch.uint8)
    images_and_ends = {"out": y.clone(), "low": torch.zeros(2, 3), "high": torch.zeros(2, 3)}
    return {
        "fused_moments": {"y": torch.zeros(5, 3), "sum": wide, "square": wide.clone(), **ends},
        "fused_window_extremes": {"y": y, "flip": torch.zeros(3, dtype=torch.int32), **ends},
        "fused_encode": {"y": y, **line, **grid, "out": codes},
        "fused_bits": {"y": y, **line, "threshold": 0.5, "pad_h": 1, "pad_w": 0, "out": bits},
        "fused_signs": {"w": torch.zeros(2, 3, 9), "out": torch.zeros(2, 9, 8, dtype=torch.uint8)},
        "fused_apply": {"y": y, **line, "out": small},
        "fused_gradient_sums": {"g": small, "y": y, **line, "top": 1.0, "mean": c, "sum": wide, "dot": wide.clone()},
        "fused_gradient": {
            "g": small,
            "y": y,
            **line,
            "top": 1.0,
            "mean": c,
            "p": c,
            "q": c,
            "r": c,
            **images_and_ends,
        },
    }


@native
@pytest.mark.parametrize("function", boundary_arguments())
def test_every_array_argument_is_checked(function):
    def call(arguments):
        ready = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        getattr(native_module(), function)(**ready, threads=1)

    arguments = boundary_arguments()[function]
    call(arguments)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        wrong = torch.zeros(*value.shape, dtype=torch.int16), torch.zeros(*value.shape, 1, dtype=value.dtype)
        strided = torch.zeros(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype)[..., ::2]
        for other in (*wrong, strided):
            with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
                call({**arguments, name: other})
    for name in ("zero", "levels", "pad_h", "pad_w"):
        if name in arguments:
            with pytest.raises(ValueError, match=f"^{name} must be"):
                call({**arguments, name: -1})


def test_wrong_memory_format_or_shape_is_refused():
    f = fused.Map(torch.ones(3), torch.zeros(3), True, True)
    with pytest.raises(InputError, match="channels-last"):
        fused.apply(torch.zeros(2, 3, 4, 4), f)
    with pytest.raises(InputError, match="float32"):
        fused.apply(torch.zeros(2, 3, 4, 4).double(), f)
    with pytest.raises(InputError, match="shape"):
        fused.gradient_sums(images(2, 3, 4, 4), images(2, 3, 4, 4), f, torch.zeros(3))
    with pytest.raises(InputError, match="pixel"):
        fused.moments(torch.zeros(0, 3, 4, 4))


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_applied_maps_are_channels_last_and_no_views(variant):
    for shape in [(2, 5, 4, 6), (1, 1, 2, 2), (3, 4, 2, 2), (2, 1, 5, 3)]:
        f = fused.Map(torch.ones(shape[1]), torch.zeros(shape[1]), True, True)
        out = fused.apply(images(*shape), f, variant=variant)
        assert not out._is_view()
        assert out.permute(0, 2, 3, 1).is_contiguous()


@native
def test_the_sign_of_zero_is_all_that_changes_without_normalization():
    # What the docstring allows, at the one place where it happens: y * 1 + 0.
    y = torch.tensor([-0.0, 0.0, 1e-45, -3.4e38, 1.5]).view(1, 1, 1, 5).contiguous(memory_format=torch.channels_last)
    for variant in VARIANTS:
        out = fused.apply(y, fused.Map(torch.ones(1), torch.zeros(1), False, False), variant=variant)
        assert torch.equal(out, y)
        assert not bool(torch.signbit(out[..., 0]))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_defaults_of_dtype_and_device_do_not_matter_to_kernels(relu, pool, monkeypatch):
    arguments = (*case(3, 21, 6, 5, relu, pool, 4), (1, 1))
    expected = everything(*arguments)
    for other in ([] if native_module() is None else [native_module()]) + [None]:
        monkeypatch.setattr(fused, "native_module", lambda module=other: module)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                results = everything(*arguments)
        finally:
            torch.set_default_dtype(torch.float32)
        for a, b in zip(results, expected, strict=True):
            assert a.dtype == b.dtype
            assert same(a, b)
