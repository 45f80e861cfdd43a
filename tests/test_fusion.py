"""Fused chains: the kernels against each other and an oracle, the chains against the modules one by one.

Bounds. ``t = a y + b`` against batch normalization in exact arithmetic: ``4 * 2^-23 * (|a y| + |b| + |beta|)``; codes
differ only where a coordinate is within ``TIE`` steps of a rounding boundary, and by one.
"""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import fqtstats
from fqtstats.errors import InputError, NonFiniteError
from fqtstats.layers.chain import Normalization, Output, Stage
from fqtstats.layers.fusion import FusedSequential, fuse_
from fqtstats.layers.operand import Operand
from fqtstats.layers.state import Draw
from fqtstats.ops import fused
from fqtstats.ops.extension import kernels, native_module
from fqtstats.quantizers.grid import affine, symmetric, zero_on_grid
from fqtstats.quantizers.storage import store

VARIANTS = [k.variant for k in kernels() if k.op == "fused" and k.available and k.variant != "torch"]
native = pytest.mark.skipif(native_module() is None, reason="the extension is not in use")

TIE = 2e-4


def images(*shape, seed=0, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * scale + shift).contiguous(memory_format=torch.channels_last)


def same(a, b):
    """Equal bit for bit, up to the sign of zero, NaN like NaN."""
    return torch.equal(torch.nan_to_num(a, nan=1.25e30), torch.nan_to_num(b, nan=1.25e30))


def everything(y, g, f, adjoint, grid, pad, variant=None):
    """All results of the kernels, as a flat list of tensors."""
    m = fused.moments(y, variant=variant)
    out = [m.mean, m.square, m.low, m.high, *fused.extremes(y, m, f, variant=variant)]
    out += [fused.encode(y, f, grid, pad, variant=variant).data, fused.apply(y, f, variant=variant)]
    out += fused.gradient_sums(g, y, f, adjoint.mean, variant=variant)
    out += fused.gradient(g, y, f, adjoint, variant=variant)
    return out


def case(n, c, h, w, relu, pool, seed, ties=False):
    """Arguments of :func:`everything`; with ``ties`` there are equal pixels in many windows."""
    y = images(n, c, h, w, seed=seed, scale=3, shift=1)
    y = y.round() if ties else y
    a, b, mean, p, q, r = torch.randn(6, c, generator=torch.Generator().manual_seed(seed + 1))
    f = fused.Map(a, b, relu, pool)
    g = images(n, c, *f.size(h, w), seed=seed + 2)
    low, high = fused.extremes(y, fused.moments(y), f)
    grid = affine(low.amin().view(1, 1, 1), high.amax().view(1, 1, 1), 255)
    return y, g, f, fused.Adjoint(mean, p, q, r), grid


# --- kernels ----------------------------------------------------------------------------------------------------------


@native
@settings(max_examples=40, deadline=None)
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


def test_folded_normalization_is_within_its_bound():
    for seed, shift in ((0, 0.0), (1, 30.0)):
        y = images(8, 33, 6, 5, seed=seed, shift=shift)
        stage = nn.Sequential(nn.Conv2d(33, 33, 1), nn.BatchNorm2d(33))
        norm = stage[1]
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        m = fused.moments(y)
        f = Normalization.of(norm, m, y.numel() // 33).map(Stage(stage[0], norm, False, False))
        got = fused.apply(y, f).double()
        exact = F.batch_norm(y.double(), None, None, norm.weight.double(), norm.bias.double(), True, 0, norm.eps)
        a, b, beta = (t.detach().double().abs().view(1, -1, 1, 1) for t in (f.a, f.b, norm.bias))
        assert bool(((got - exact).abs() <= 4 * 2.0**-23 * (a * y.double().abs() + b + beta)).all())


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
    codes = torch.zeros(2, 4, 2, 4, dtype=torch.uint8)
    images_and_ends = {"out": y.clone(), "low": torch.zeros(2, 3), "high": torch.zeros(2, 3)}
    return {
        "fused_moments": {"y": torch.zeros(5, 3), "sum": wide, "square": wide.clone(), **ends},
        "fused_window_extremes": {"y": y, "flip": torch.zeros(3, dtype=torch.int32), **ends},
        "fused_encode": {"y": y, **line, **grid, "out": codes},
        "fused_apply": {"y": y, **line, "out": small},
        "fused_gradient_sums": {"g": small, "y": y, **line, "mean": c, "sum": wide, "dot": wide.clone()},
        "fused_gradient": {"g": small, "y": y, **line, "mean": c, "p": c, "q": c, "r": c, **images_and_ends},
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


# --- chains -----------------------------------------------------------------------------------------------------------


def network(normalized=True, bias=False, pools=(True, False, True), channels=10, seed=0):
    """``len(pools)`` stages and a head."""
    layers, before = [], 3
    for pool in pools:
        layers.append(nn.Conv2d(before, channels, 3, padding=1, bias=bias))
        layers += [nn.BatchNorm2d(channels)] if normalized else []
        layers.append(nn.ReLU())
        layers += [nn.MaxPool2d(2)] if pool else []
        before = channels
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5 + (p.dim() == 1))
    return model


def policy(name="statquant-ptq", bits=8):
    return fqtstats.policies.get(name, bits=bits)


def twins(model, named):
    """The model prepared, and a copy that is fused as well, with their handles."""
    other = copy.deepcopy(model)
    handles = [fqtstats.prepare_(m, named, backend="native", seed=3) for m in (model, other)]
    chains = fuse_(other, handles[1])
    return model, other, handles, chains


def passed(model, x, g):
    """Output and gradients of input and parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(g)
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


X = images(6, 3, 12, 10)
G = images(6, 4, 1, 1, seed=9).flatten(1)

SIMPLE = {"no normalization": {"normalized": False}, "with bias": {"normalized": False, "bias": True}}


@pytest.mark.parametrize("options", SIMPLE.values(), ids=SIMPLE.keys())
@pytest.mark.parametrize("name", ["statquant-qat", "statquant-ptq", "statquant-psq", "statquant-bhq"])
@pytest.mark.parametrize("bits", [8, 4])
def test_without_normalization_nothing_changes(options, name, bits):
    one, other, _, chains = twins(network(**options), policy(name, bits))
    assert [len(c) for c in chains] == [8]
    for a, b in zip(passed(other, X, G), passed(one, X, G), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["statquant-qat", "statquant-ptq", "statquant-psq", "statquant-bhq"])
def test_chain_against_modules(name, training):
    # A decision of stochastic rounding can fall otherwise where the two differ in the last digits: a step of one
    # element of one gradient, 1/255 of its range.
    one, other, _, chains = twins(network().train(training), policy(name))
    assert len(chains) == 1
    assert len(chains[0]) == 11
    for a, b in zip(passed(other, X, G), passed(one, X, G), strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < 5e-3
    for a, b in zip(other.buffers(), one.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_codes_between_stages_differ_only_near_boundaries(training, monkeypatch):
    seen = []
    create = Operand.__init__

    def noted(self, content, why=None):
        create(self, content, why)
        if self.stored is not None:
            seen.append(self.stored.codes)

    model = network(pools=(True, False)).train(training)
    one, other, _, _ = twins(model, policy())
    x = images(16, 3, 32, 32)
    outs = []
    for m in (one, other):
        with monkeypatch.context() as patch:
            patch.setattr(Operand, "__init__", noted)
            seen.clear()
            m(x)
            inner = [c for c in seen if len(c.shape) == 4 and c.shape[0] == 16 and c.shape[1] == 10]
            outs.append(inner[0])
    a, b = (c.unpack().int() for c in outs)
    steps = [float(c.affine.step) for c in outs]
    assert abs(steps[0] / steps[1] - 1) < 1e-6
    different = (a != b).nonzero()
    assert bool(((a - b).abs() <= 1).all())
    assert len(different) < 1e-3 * a.numel()
    exact = copy.deepcopy(one)
    first = exact[0](x)
    with torch.no_grad():
        value = exact[3](exact[2](exact[1].double()(first.double())))
    coordinate = (value - value.min()) / (value.max() - value.min()) * 255
    off = (coordinate - coordinate.floor() - 0.5).abs()
    assert bool((off[tuple(different.t())] <= TIE).all())


def test_many_backward_passes_over_one_graph():
    one, other, handles, _ = twins(network(channels=6), policy("statquant-psq", 4))
    grads = []
    for model, handle in zip((one, other), handles, strict=True):
        out = model(X)
        drawn = []
        for draw in (0, 1, 0):
            with handle.shared.drawing(Draw(draw)):
                drawn.append(torch.autograd.grad(out, [*model.parameters()], G, retain_graph=True))
        grads.append(drawn)
        assert all(map(torch.equal, drawn[0], drawn[2]))
        assert not all(map(torch.equal, drawn[0], drawn[1]))
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        assert relative(a, b) < 5e-2


def test_every_call_of_a_step_draws_its_own_numbers():
    one, other, handles, _ = twins(network(normalized=False), policy("statquant-psq", 4))
    results = [[passed(model, X, G) for _ in range(2)] for model in (other, one)]
    for a, b in zip(*results, strict=True):
        assert all(map(torch.equal, a, b))
    assert not torch.equal(results[0][0][1], results[0][1][1])  # the gradient of the input
    with torch.no_grad():
        other(X)
    assert handles[1].shared._calls == handles[0].shared._calls == dict.fromkeys(handles[0].layers, 2)


def test_a_layer_that_is_shared_within_a_chain():
    layer, relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
    model = nn.Sequential(layer, relu, layer, relu)
    one, other, handles, chains = twins(model, policy("statquant-psq", 4))
    assert chains == [["0", "1", "2", "3"]]
    x, g = images(3, 4, 6, 6), images(3, 4, 6, 6, seed=1)
    for _ in range(2):
        assert all(map(torch.equal, passed(other, x, g), passed(one, x, g)))
    assert handles[1].shared._calls == handles[0].shared._calls == {"0": 4}


def test_threads_do_not_change_a_chain():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = network(channels=40)
            fuse_(model, fqtstats.prepare_(model, policy(), backend="native"))
            chain = model[:11]
            chain.__class__ = FusedSequential
            x = images(8, 3, 32, 32).requires_grad_()
            out = chain(x)
            out.backward(images(*out.shape, seed=5))
            results.append([out.detach(), x.grad, *(p.grad for p in chain.parameters()), *chain.buffers()])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_repeat_the_numbers(reentrant):
    model = network(normalized=False)
    handle = fqtstats.prepare_(model, policy("statquant-psq", 4), backend="native")
    fuse_(model, handle)
    expected = passed(model, X, G)
    model.zero_grad()
    handle.step = 0  # counts calls anew
    x = X.clone().requires_grad_()
    out = checkpoint(model, x, use_reentrant=reentrant)
    out.backward(G)
    assert all(map(torch.equal, [out.detach(), x.grad, *(p.grad for p in model.parameters())], expected))


@pytest.mark.parametrize("name", ["ptq", "psq", "pcq", "bhq"])
def test_extremes_that_are_known_change_no_code(name):
    g = images(5, 12, 4, 3)
    ends = g.amin((2, 3)), g.amax((2, 3))
    q, stream = fqtstats.quantizer(name, bits=4), fqtstats.stream(1)
    found, given_ = store(q, g, stream, (1, 1)), store(q, g, stream, (1, 1), ends)
    assert torch.equal(found.codes.data, given_.codes.data)
    assert torch.equal(found.decode(), given_.decode())
    bad = tuple(t.clone() for t in ends)
    for t in bad:
        t[2, 3] = float("nan")
    g[2, 3, 1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="1 NaN or Inf"):
        store(q, g, stream, (1, 1), bad)


def test_frozen_parameters_and_input_get_no_gradient():
    one, other, _, _ = twins(network(), policy())
    for model in (one, other):
        for p in itertools.chain(model[0].parameters(), model[1].parameters(), model[5].parameters()):
            p.requires_grad_(False)
        model(X).backward(G)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or relative(b.grad, a.grad) < 5e-3
    with torch.no_grad():
        assert not other(X).requires_grad


def test_cumulative_and_absent_running_statistics():
    changes = {"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"momentum": 0.3, "eps": 0.1}
    for change in changes:
        model = network(pools=(True,))
        model[1] = nn.BatchNorm2d(10, **change)
        one, other, _, chains = twins(model, policy())
        assert chains
        for _ in range(3):
            a, b = one(X), other(X)
        one.eval()
        other.eval()
        assert relative(b, a) < 1e-5
        assert relative(other(X), one(X)) < 1e-5
        for p, q in zip(other.buffers(), one.buffers(), strict=True):
            assert torch.allclose(p.double(), q.double(), rtol=1e-6, atol=1e-7)


def test_one_pixel_cannot_be_normalized():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    fuse_(model, fqtstats.prepare_(model, policy(), backend="native"))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(images(1, 3, 1, 1))


# --- what is fused ----------------------------------------------------------------------------------------------------


def fused_calls(model, x, monkeypatch):
    """How often a chain made numbers of an output: at its end, and where the next layer takes no codes."""
    count = []
    numbers = Output.numbers

    def counted(output):
        count.append(1)
        return numbers(output)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "numbers", counted)
        model(x)
    return len(count)


def test_chains_are_named_and_maximal():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.1)),
        nn.Sequential(nn.Conv2d(4, 4, 3)),  # nothing to fuse
        nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.MaxPool2d(3), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)),
    )
    handle = fqtstats.prepare_(model, policy(), backend="native")
    assert fqtstats.fuse_(model, handle) == [["0.0", "0.1", "0.2", "0.3"], ["2.3", "2.4"]]
    assert [type(m) for m in model] == [FusedSequential, nn.Sequential, FusedSequential]
    assert type(model) is nn.Sequential


def test_state_dict_stays_and_remove_restores(monkeypatch):
    model = network()
    keys, modules = list(model.state_dict()), list(model)
    before = model(X)
    handle = fqtstats.prepare_(model, policy(), backend="native")
    assert fuse_(model, handle)
    assert list(model.state_dict()) == keys
    assert list(model) == modules
    assert fused_calls(model, X, monkeypatch) == 1
    handle.remove()
    assert type(model) is nn.Sequential
    assert not [name for name in vars(model) if name.startswith("fqt")]
    model.load_state_dict(network().state_dict())
    assert torch.equal(model(X), before)
    handle.remove()  # again: nothing to do


def test_slices_and_copies_work():
    model = network()
    handle = fqtstats.prepare_(model, policy(), backend="native")
    fuse_(model, handle)
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    assert model[:3](X).shape == (6, 10, 12, 10)


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda *a: None),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda *a: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *a: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda *a: None),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_module_with_hooks_is_not_fused(hook, position):
    model = network(pools=(False,))
    removable = hook(model[position])
    handle = fqtstats.prepare_(model, policy(), backend="native")
    names = fuse_(model, handle)
    assert names == ([["0", "1"]] if position == 2 else [])
    removable.remove()
    if position == 2:  # looked up at every call
        assert next(iter(model._modules)) == "0"
        chain = model(X)
        assert chain.shape == (6, 4)


def test_hooks_see_their_module_also_when_they_come_later(monkeypatch):
    model = network()
    fuse_(model, fqtstats.prepare_(model, policy(), backend="native"))
    expected = model(X)
    shapes = []
    model[1].register_forward_hook(lambda m, inputs, out: shapes.append(out.shape))
    assert fused_calls(model, X, monkeypatch) == 1  # the rest
    assert shapes == [(6, 10, 12, 10)]
    assert relative(model(X), expected) < 1e-2


def test_other_inputs_run_module_by_module(monkeypatch):
    model = network(normalized=False)
    fuse_(model, fqtstats.prepare_(model, policy(), backend="native"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_calls(model, X, monkeypatch) == 0
    assert fused_calls(model, X, monkeypatch) == 1
    model.double()
    assert fused_calls(model, X.double(), monkeypatch) == 0


def test_only_the_native_backend_is_fused():
    model = network()
    handle = fqtstats.prepare_(model, policy())
    with pytest.raises(InputError, match="backend='native'"):
        fuse_(model, handle)


def test_quantizers_without_8_bit_codes_take_numbers(monkeypatch):
    narrow = fqtstats.Policy(
        activation=fqtstats.quantizer("minmax", bits=4),
        weight=fqtstats.quantizer("zero_on_grid", bits=4),
        grad_input=fqtstats.quantizer("ptq", bits=4),
        grad_weight=fqtstats.quantizer("ptq", bits=4),
    )
    one, other, handles, chains = twins(network(normalized=False), narrow)
    assert chains
    assert fused_calls(other, X, monkeypatch) == 3
    handles[1].step = 0  # counts calls anew
    for a, b in zip(passed(other, X, G), passed(one, X, G), strict=True):
        assert torch.equal(a, b)


class Sum(nn.Module):
    """``x += 1``."""

    def forward(self, x):
        x += 1
        return x


IN_PLACE = {
    "dropout": lambda: nn.Dropout(0.5, inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),  # the second one, the first belongs to the chain
    "sum": Sum,
}


@pytest.mark.parametrize("following", IN_PLACE.values(), ids=IN_PLACE.keys())
@pytest.mark.parametrize("pools", [(True,), (False, True)])
def test_what_follows_may_work_in_place(following, pools):
    one, other, _, chains = twins(nn.Sequential(*network(False, pools=pools)[:-3], following()), policy())
    assert chains
    results = []
    for model in (one, other):
        torch.manual_seed(5)
        results.append(passed(model, X, images(6, 10, 6, 5, seed=1)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_applied_maps_are_channels_last_and_no_views(variant):
    for shape in [(2, 5, 4, 6), (1, 1, 2, 2), (3, 4, 2, 2), (2, 1, 5, 3)]:
        f = fused.Map(torch.ones(shape[1]), torch.zeros(shape[1]), True, True)
        out = fused.apply(images(*shape), f, variant=variant)
        assert not out._is_view()
        assert out.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1)])
def test_images_without_a_window_are_refused(last, normalized, size):
    norm, further = [nn.BatchNorm2d(4)] if normalized else [], [] if last else [nn.Conv2d(4, 4, 1)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *norm, nn.ReLU(), nn.MaxPool2d(2), *further)
    one, other, _, chains = twins(model, policy())
    assert len(chains[0]) == len(model)
    messages = []
    for m in (one, other):
        with pytest.raises(RuntimeError, match="Output size is too small") as error:
            m(images(2, 3, *size))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    for a, b in zip(other.buffers(), one.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-7)


def test_only_outputs_that_are_read_again_are_kept():
    def kept(*following):
        """Elements in float32 that the graph holds."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *following, nn.Conv2d(4, 5, 1))
        assert fuse_(model, fqtstats.prepare_(model, policy(), backend="native"))
        saved = model(X).grad_fn.saved_tensors
        return sum(t.numel() for t in saved if t.dtype == torch.float32)

    pixels = X.numel() // 3
    assert kept() == 0
    assert kept(nn.ReLU()) == kept(nn.BatchNorm2d(4)) == kept(nn.MaxPool2d(2)) == 4 * pixels


def test_convolutions_without_anything_between():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, bias=False), nn.Conv2d(5, 4, 1))
    one, other, _, chains = twins(model, policy("statquant-psq"))
    assert chains == [["0", "1", "2"]]
    g = images(6, 4, 8, 6, seed=1)
    assert all(map(torch.equal, passed(other, X, g), passed(one, X, g)))


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_a_forward_of_its_own_is_called(position):
    model = network(pools=(True,))
    handle = fqtstats.prepare_(model, policy(), backend="native")
    called = []
    whole = model[position].forward
    model[position].forward = lambda x: called.append(x.shape) or whole(x)
    assert fuse_(model, handle) == {0: [], 1: [], 2: [["0", "1"]], 3: [["0", "1", "2"]]}[position]
    model(X)
    assert len(called) == 1


def test_a_sequential_with_a_forward_of_its_own_is_left_alone():
    model = network()
    model.forward = model.forward
    assert fuse_(model, fqtstats.prepare_(model, policy(), backend="native")) == []
    assert type(model) is nn.Sequential


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


@pytest.mark.parametrize("normalized", [False, True])
def test_the_default_dtype_does_not_matter_to_a_chain(normalized):
    model = network(normalized, pools=(True, False))[:-3]
    handle = fqtstats.prepare_(model, policy(), backend="native")
    fuse_(model, handle)
    other = copy.deepcopy(model)
    g = images(6, 10, 6, 5, seed=1)
    expected = passed(model, X, g)
    handle.step = 0  # counts calls anew
    torch.set_default_dtype(torch.float64)
    try:
        results = passed(other, X, g)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, results, expected))


def test_what_is_not_finite_names_the_layer():
    for place in (0, 1):
        model = network().eval()
        with torch.no_grad():
            model[place].weight.view(-1)[0] = float("nan")
        fuse_(model, fqtstats.prepare_(model, policy(), backend="native"))
        with pytest.raises(NonFiniteError, match="layer '0', weight" if place == 0 else "layer '4', activation"):
            model(X)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    fuse_(model, fqtstats.prepare_(model, policy(), backend="native"))
    with pytest.raises(NonFiniteError, match=r"layer '0', grad_weight"):
        model(X).backward(images(6, 4, 12, 10) * float("inf"))
