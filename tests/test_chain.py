"""Fused chains against the modules one by one.

Bounds. ``t = a y + b`` against batch normalization in exact arithmetic: ``4 * 2^-23 * (|a y| + |b| + |beta|)``; codes
differ only where a coordinate is within ``TIE`` steps of a rounding boundary, and by one.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from chains import G, X, images, network, passed, policy, relative, twins
from torch import nn
from torch.utils.checkpoint import checkpoint

import fqtstats
from fqtstats.errors import NonFiniteError
from fqtstats.layers.chain import Normalization, Stage
from fqtstats.layers.fusion import FusedSequential, fuse_
from fqtstats.layers.operand import Operand
from fqtstats.layers.state import Draw
from fqtstats.ops import fused
from fqtstats.quantizers.storage import store

TIE = 2e-4


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


def binary(activation="sign"):
    """1-bit forward, and a first layer in full precision."""
    bits = {"activation": fqtstats.quantizer(activation, bits=1), "weight": fqtstats.quantizer("scaled_sign")}
    return fqtstats.Policy(**bits, overrides={"0": fqtstats.Policy()})


@pytest.mark.parametrize("activation", ["sign", "dorefa_act"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_binary_chains_are_the_modules_one_by_one(activation, training, relu):
    model = network(pools=(False, True, False, True), channels=12).train(training)
    layers = [m for m in model if relu or not isinstance(m, nn.ReLU)]
    one, other, handles, chains = twins(nn.Sequential(*layers), binary(activation))
    assert [len(chain) for chain in chains] == [len(layers) - 3]
    for name, layer in handles[0].layers.items():
        if name != str(len(layers) - 1):
            torch.manual_seed(int(name))
            scale = torch.randn(12).abs_() + 0.3
            scale[3] *= -1  # it is learned: its sign may change
            for handle in handles:
                handle.layers[name].fqt_weight.scale.data = scale.clone()
        assert type(layer) is type(handles[1].layers[name])
    for a, b in zip(passed(other, X, G), passed(one, X, G), strict=True):
        assert a.shape == b.shape
        # The gradient of a scale before statistics of the batch is what their eps leaves: differences of large numbers.
        assert relative(a, b) < 1e-4 or float((a - b).abs().max()) < 1e-5
    for a, b in zip(other.buffers(), one.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_scale_before_statistics_of_the_batch():
    """Against float64: it is in proportion to eps."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=0.5), nn.ReLU())
    policy = fqtstats.Policy(activation=fqtstats.quantizer("sign"), weight=fqtstats.quantizer("scaled_sign"))
    handle = fqtstats.prepare_(model, policy, backend="native")
    assert fuse_(model, handle) == [["0", "1", "2"]]
    scale = model[0].fqt_weight.scale
    scale.data = torch.linspace(-0.4, 0.3, 8)
    g = images(6, 8, 10, 8, seed=2)
    model(X).backward(g)
    exact = nn.BatchNorm2d(8, eps=0.5).double()
    y = F.conv2d(torch.where(X >= 0, 1.0, -1.0).double(), torch.where(model[0].weight >= 0, 1.0, -1.0).double())
    s = scale.detach().double().requires_grad_()
    exact(y * s.view(1, -1, 1, 1)).relu().backward(g.double())
    assert relative(scale.grad, s.grad) < 1e-5
    assert relative(model[1].weight.grad, exact.weight.grad) < 1e-5


def test_a_layer_in_full_precision_alone_is_no_chain():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(320, 4))
    handle = fqtstats.prepare_(model, fqtstats.Policy(weight=fqtstats.quantizer("sign")), "0", backend="native")
    assert fuse_(model, handle) == []
