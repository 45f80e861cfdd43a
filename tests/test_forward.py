"""Forward quantizers with grids, gradients and parameters of their own, alone and in layers, against oracles.

Numbers are float64, where quantizer and oracle differ by the rounding of the arithmetic only: ``CLOSE``, relative to
the largest element. In the tests of unbiasedness a t-test of the draws along the gradient has a false-alarm rate of
1e-8; there are fewer than 50 of them.
"""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import scipy.stats
import small
import torch
import torch.nn.functional as F
from oracles import forward as oracle
from torch import nn
from torch.utils.checkpoint import checkpoint

import fqtstats
from fqtstats import Policy, quantizer
from fqtstats.capture import IncomingGradients, Session
from fqtstats.errors import InputError
from fqtstats.estimators import exact
from fqtstats.layers.fusion import fuse_
from fqtstats.layers.state import Draw
from fqtstats.quantizers.passage import PackedMask, leaves
from fqtstats.quantizers.storage import store

CLOSE = 1e-12
S = fqtstats.stream()


def gaussian(*shape, seed=0, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)


def assert_close(got, expected, tolerance=CLOSE):
    assert got.shape == expected.shape
    largest = float(expected.detach().abs().max())
    assert float((got.detach() - expected.detach()).abs().max()) <= tolerance * max(largest, 1e-30)


def passed(q, x, g):
    """What a gradient ``g`` of the quantized numbers becomes: that of ``x``."""
    x = x.clone().requires_grad_()
    q.surrogate(x).backward(g)
    return x.grad


# --- LSQ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize(("on", "signed"), [("weight", None), ("activation", True), ("activation", False)])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_gradients_of_lsq_are_those_of_straight_through_rounding(bits, on, signed, per):
    for shape in ((12, 10), (6, 5, 3, 3), (4, 6, 7)):
        v, g = gaussian(*shape, seed=1), gaussian(*shape, seed=2)
        q = quantizer("lsq", bits=bits, on=on, signed=signed, per=per).double()
        q(v, S)
        axis = 0 if on == "weight" else 1
        groups = 1 if per == "tensor" else shape[axis]
        # Not where it starts, so that a part is clipped at any width.
        q.step.data = (0.2 + gaussian(groups, seed=3).abs()) * 2.0 ** (3 - bits)
        assert_close(passed(q, v, g), *gradients_of_lsq(q, v, g, axis, groups)[:1])
        assert_close(q.step.grad, gradients_of_lsq(q, v, g, axis, groups)[1])
        assert_close(q(v, S), gradients_of_lsq(q, v, g, axis, groups)[2])


def gradients_of_lsq(q, v, g, axis, groups):
    v = v.clone().requires_grad_()
    s = q.step.detach().clone().requires_grad_()
    across = [1] * v.dim()
    if groups > 1:
        across[axis] = groups
    features = v.numel() if q.on == "weight" else v[0].numel()
    out = oracle.lsq(v, s.view(across), q.bits, q.on == "weight" or q.signed, features // groups)
    return *torch.autograd.grad(out, (v, s), g), out.detach()


def test_the_step_of_lsq_starts_where_the_paper_says():
    v = gaussian(20, 6, seed=4)
    for options, positive in (
        ({"bits": 4}, 7),
        ({"bits": 4, "on": "activation", "signed": True}, 7),
        ({"bits": 4, "on": "activation", "signed": False}, 15),
        ({"bits": 4, "on": "activation"}, 7),
    ):
        q = quantizer("lsq", **options).double()
        q(v, S)
        assert q.step.item() == pytest.approx(oracle.lsq_start(v, positive), rel=1e-14)
    rectified = quantizer("lsq", bits=1, on="activation").double()
    rectified(v.relu(), S)
    assert rectified.step.item() == pytest.approx(oracle.lsq_start(v.relu(), 1), rel=1e-14)
    channels = quantizer("lsq", bits=4, per="channel").double()
    channels(v, S)
    expected = [oracle.lsq_start(row, 7) for row in v]
    assert channels.step.tolist() == pytest.approx(expected, rel=1e-14)
    v[3:] = 0
    some = quantizer("lsq", bits=4, per="channel").double()
    some(v, S)
    expected = [oracle.lsq_start(row, 7) for row in v[:3]]
    assert some.step.tolist() == pytest.approx([*expected, *[sum(expected) / 3] * 17], rel=1e-14)


def test_the_step_of_lsq_waits_for_an_input_that_is_not_all_zeros():
    q = quantizer("lsq", bits=4, on="activation")
    zeros = torch.zeros(3, 5, requires_grad=True)
    assert not q(zeros, S).any()
    q.surrogate(zeros).sum().backward()
    assert torch.equal(zeros.grad, torch.ones(3, 5))
    assert q.step.grad is None
    assert not q.known
    q(torch.rand(3, 5), S)
    assert q.known
    first = q.step.item()
    q(10 * torch.rand(3, 5), S)
    assert q.step.item() == first > 0


def test_the_step_of_lsq_is_positive_whatever_training_does():
    v, g = gaussian(8, 6), gaussian(8, 6, seed=1)
    q, mirrored = (quantizer("lsq", bits=3).double() for _ in range(2))
    q(v, S)
    mirrored.step.data = -q.step.data
    assert torch.equal(mirrored(v, S), q(v, S))
    assert torch.equal(passed(mirrored, v, g), passed(q, v, g))
    assert torch.equal(mirrored.step.grad, -q.step.grad)  # the derivative of |p|
    assert float(mirrored.encode(v, S).frame.grid.step) > 0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_the_grid_of_lsq_has_its_step(bits, signed):
    """Exactly where there are negative codes, else within one unit in the last place."""
    q = quantizer("lsq", bits=bits, on="activation", signed=signed)
    for step in (gaussian(200).abs() + 1e-3).float():
        q.step.data = step.view(1)
        grid = q.encode(torch.ones(1, 1), S).frame.grid
        assert abs(float(grid.step) - float(step)) <= (0 if signed else 2.0**-23 * float(step))
        assert grid.offset is None
        assert (0 if grid.zero is None else int(grid.zero)) == (2 ** (bits - 1) if signed else 0)


def test_a_frozen_step_of_lsq_keeps_bits_and_passes_the_same():
    v, g = gaussian(9, 7), gaussian(9, 7, seed=1)
    q = quantizer("lsq", bits=3).double()
    q(v, S)
    expected = passed(q, v, g)
    q.step.requires_grad_(False)
    x = v.clone().requires_grad_()
    y = q.surrogate(x)
    assert y.grad_fn.fqt_nbytes == math.ceil(63 / 8)
    y.backward(g)
    assert torch.equal(x.grad, expected)


def test_misplaced_and_impossible_lsq():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(InputError, match="layer '0': expected lsq with on='activation'"):
        fqtstats.prepare_(model, Policy(activation=quantizer("lsq", bits=4)))
    with pytest.raises(InputError, match="layer '0': scaled_sign is for weights, got it for activation"):
        fqtstats.prepare_(model, Policy(activation=quantizer("scaled_sign")))
    assert type(model[0]) is nn.Linear
    for options in ({"bits": 1}, {"bits": 1, "on": "activation", "signed": True}):
        with pytest.raises(InputError, match="at least 2 bits"):
            quantizer("lsq", **options)
    with pytest.raises(InputError, match="at least 2 bits for signed numbers, got an input with negative"):
        quantizer("lsq", bits=1, on="activation")(gaussian(3, 3), S)
    for option in ("on", "per", "signed"):
        with pytest.raises(InputError, match=f"{option} must be"):
            quantizer("lsq", **{option: "both"})


# --- the others -------------------------------------------------------------------------------------------------------

OTHERS = {
    "sawb": ({}, lambda x: oracle.sawb(x, "weight")),
    "sawb activation": ({"on": "activation"}, lambda x: oracle.sawb(x, "activation")),
    "sign": ({}, oracle.sign),
    "sign channel": ({"scale": "channel"}, lambda x: oracle.sign(x, "own")),
    "scaled_sign": ({}, oracle.sign),
    **{f"dorefa_act {b}": ({"bits": b}, lambda x, b=b: oracle.dorefa_activation(x, b)) for b in (1, 2, 8)},
    **{f"dorefa_weight {b}": ({"bits": b}, lambda x, b=b: oracle.dorefa_weight(x, b)) for b in (1, 2, 8)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_numbers_and_gradients_are_the_oracles(name):
    options, expected = OTHERS[name]
    for x in (gaussian(12, 9, seed=5), gaussian(5, 4, 3, 3, seed=6), gaussian(7, 6, seed=7, scale=0.01)):
        q = quantizer(name.split()[0], **options)
        v, g = x.clone().requires_grad_(), gaussian(*x.shape, seed=8)
        out = expected(v)
        assert_close(q(x, S), out)
        assert_close(q.encode(x, S).decode(), out)
        (by_v,) = torch.autograd.grad(out, v, g)
        assert_close(passed(q, x, g) if hasattr(q, "surrogate") else g, by_v)
        single = q(x.float(), S).double()
        # A decision may fall otherwise where a coordinate is within 1e-5 of a boundary: none is here.
        assert_close(single, out.detach(), 1e-5)


def test_signs_of_zero_and_channels_of_zeros():
    x = torch.tensor([[0.0, -0.0, 1e-40, -1e-40], [0.0, 0.0, 0.0, 0.0]])
    assert quantizer("sign")(x, S).tolist() == [[1, 1, 1, -1], [1, 1, 1, 1]]
    assert not quantizer("sign", scale="channel")(x, S)[1].any()


def test_what_sawb_clips_and_when_it_does_not():
    q = quantizer("sawb")
    x = torch.cat([gaussian(1000), torch.tensor([50.0], dtype=torch.float64)]).view(7, 143)
    assert float(q(x, S).max()) == pytest.approx(float(q.clip(x)))
    assert float(q.clip(x)) < 50
    assert float(q.clip(torch.full((3, 4), -2.0))) == 2  # the formula gives a negative one
    assert float(q.clip(torch.zeros(3, 4))) == 0
    assert not quantizer("sawb", on="activation")(-x.abs(), S).any()


def test_the_maximum_of_dorefa_weights_is_differentiated_where_several_have_it():
    w = torch.tensor([[0.7, -0.7, 0.2], [0.7, -0.1, 0.0]], dtype=torch.float64)
    g = gaussian(2, 3)
    v = w.clone().requires_grad_()
    oracle.dorefa_weight(v, 3).backward(g)
    assert_close(passed(quantizer("dorefa_weight", bits=3), w, g), v.grad)


FORWARD = [name for name, cls in fqtstats.QUANTIZERS.items() if cls.role == "forward"]


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_edges(name, dtype):
    for x in (
        torch.zeros(3, 4),
        torch.full((3, 4), 0.3),
        torch.full((3, 4), -2.0),
        torch.rand(1, 5),
        torch.rand(4, 1),
        torch.rand(1, 1),
        torch.rand(3, 4) * 1e-30,
        torch.zeros(2, 3).index_fill(0, torch.tensor([1]), 4.0),
    ):
        q = quantizer(name, bits=min(fqtstats.QUANTIZERS[name].widths, key=lambda width: abs(width - 4)))
        out = q(x.to(dtype), S)
        assert out.dtype == dtype
        assert bool(out.isfinite().all())
        if not x.any() and "sign" not in name:
            assert not out.any()
        if hasattr(q, "surrogate"):
            grad = passed(q, x.to(dtype), torch.ones_like(x, dtype=dtype))
            assert bool(grad.isfinite().all())
            assert bool(grad.any()) or bool(x.any()), "what is zero can become something else"


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5), (1, 9, 1, 1)])
def test_packed_masks(shape):
    mask = gaussian(*shape) > 0
    forms = [mask, mask.to(memory_format=torch.channels_last)] if len(shape) == 4 else [mask, mask.flip(0)[::1]]
    for form in forms:
        layout, bits = PackedMask.pack(form)
        assert bits.numel() == math.ceil(mask.numel() / 8)
        assert torch.equal(layout.unpack(bits), form)


# --- in layers --------------------------------------------------------------------------------------------------------


class OracleLayer:
    """What a layer's two quantizers do, and the parameters that they have, in autograd."""

    def __init__(self, activation, weight, layer, x):
        self.parameters = {}
        self.activation = self._quantizer("activation", *activation, x)
        self.weight = self._quantizer("weight", *weight, layer.weight)

    def _quantizer(self, place, name, options, v):
        if name == "lsq":
            signed = place == "weight" or bool((v < 0).any())
            positive = oracle.lsq_range(options["bits"], signed)[1]
            channels = options.get("per") == "channel"
            rows = list(v) if channels else [v]
            start = torch.tensor([oracle.lsq_start(row, positive) for row in rows], dtype=v.dtype)
            s = self.parameters[f"fqt_{place}.step"] = start.requires_grad_()
            numbers = (v.numel() if place == "weight" else v[0].numel()) // len(rows)
            shape = (-1, *[1] * (v.dim() - 1))
            return lambda v: oracle.lsq(v, s.view(shape), options["bits"], signed, numbers)
        if name == "scaled_sign":
            self.scale = self.parameters["fqt_weight.scale"] = v.detach().abs().flatten(1).mean(1).requires_grad_()
            return oracle.sign
        if name == "sign":
            return lambda v: oracle.sign(v, "own" if options.get("scale") == "channel" else None)
        if name == "sawb":
            return lambda v: oracle.sawb(v, options.get("on", "weight"))
        return lambda v: {"dorefa_act": oracle.dorefa_activation, "dorefa_weight": oracle.dorefa_weight}[name](
            v, options["bits"]
        )

    def __call__(self, layer, x):
        a, w = self.activation(x), self.weight(layer.weight)
        y = F.conv2d(a, w, None, layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else F.linear(a, w)
        across = (1, -1, *[1] * (y.dim() - 2))
        if hasattr(self, "scale"):
            y = y * self.scale.view(across)
        return y + layer.bias.view(across)


PAIRS = {
    "lsq": (("lsq", {"bits": 3, "on": "activation"}), ("lsq", {"bits": 3})),
    "lsq channel": (("lsq", {"bits": 4, "on": "activation"}), ("lsq", {"bits": 4, "per": "channel"})),
    "sawb": (("sawb", {"on": "activation"}), ("sawb", {})),
    "sign": (("sign", {}), ("sign", {"scale": "channel"})),
    "scaled_sign": (("sign", {}), ("scaled_sign", {})),
    "dorefa 1": (("dorefa_act", {"bits": 1}), ("dorefa_weight", {"bits": 1})),
    "dorefa 2": (("dorefa_act", {"bits": 2}), ("dorefa_weight", {"bits": 2})),
}


def policy(pair, gradient=None, bits=4):
    activation, weight = (quantizer(name, **options) for name, options in PAIRS[pair])
    q = None if gradient is None else quantizer(gradient, bits=bits)
    return Policy(activation, weight, q, q)


def cnn(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.Flatten(), nn.Linear(54, 5)
        ).to(dtype)


def cnn_batch(n=6, dtype=torch.float64):
    return gaussian(n, 2, 8, 8, seed=3, dtype=dtype), torch.arange(n) % 5


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


MODELS = {
    "mlp": lambda dtype=torch.float64: (small.mlp(dtype=dtype), small.batch(dtype=dtype)),
    "cnn": lambda dtype=torch.float64: (cnn(dtype), cnn_batch(dtype=dtype)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_measured_gradient_is_that_of_straight_through_autograd(name, pair):
    model, batch = MODELS[name]()
    oracles = {}
    x = batch[0]
    for index, module in enumerate(model):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            oracles[index] = OracleLayer(*PAIRS[pair], module, x.detach())
            x = oracles[index](module, x)
        else:
            x = module(x)
    wanted = dict(model.named_parameters())
    wanted |= {f"{index}.{name}": p for index, own in oracles.items() for name, p in own.parameters.items()}
    expected = dict(zip(wanted, torch.autograd.grad(F.cross_entropy(x, batch[1]), wanted.values()), strict=True))
    with fqtstats.quantized(model, policy(pair, "psq")) as handle, Session(model, handle, batch, loss) as session:
        found = dict(zip(session.parameters, session.qat(), strict=True))
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        assert_close(gradient, expected[parameter], 1e-10)


def shrunk(g, stream):
    return 0.7 * quantizer("psq", bits=4)(g, stream)


def t_statistic(errors, gradient):
    """Of the errors' components along the gradient."""
    along = errors @ (gradient / np.linalg.norm(gradient))
    return abs(along.mean()) / (along.std(ddof=1) / math.sqrt(len(along)))


@pytest.mark.parametrize("pair", PAIRS)
def test_quantized_gradients_are_unbiased_behind_these_quantizers(pair):
    n = 24
    limit = scipy.stats.t.isf(0.5e-8, n - 1)
    model, batch = MODELS["mlp"](torch.float32)
    statistics = {}
    for label, q in (("fair", quantizer("psq", bits=4)), ("shrunk", shrunk)):
        with fqtstats.quantized(model, policy(pair)) as handle:
            for layer in handle.layers.values():  # the same forward pass, other gradients
                state = layer.fqt_state
                object.__setattr__(state, "policy", Policy(state.policy.activation, state.policy.weight, q, q))
            with Session(model, handle, batch, small.loss) as session:
                qat = torch.cat([g.view(-1) for g in session.qat()]).double().numpy()
                errors = [torch.cat([g.view(-1) for g in session.draw(i)]).double().numpy() - qat for i in range(n)]
        statistics[label] = t_statistic(np.stack(errors), qat)
    assert statistics["fair"] < limit
    assert statistics["shrunk"] > limit


@pytest.mark.parametrize("gradient", ["psq", "bhq"])
@pytest.mark.parametrize("layer", ["linear", "convolution"])
@pytest.mark.parametrize("pair", ["lsq", "lsq channel", "sign", "dorefa 2"])
def test_the_exact_variance_behind_a_weight_quantizer(pair, layer, gradient):
    """Against the covariance matrix of the roundings, taken through the matrix of the whole backward pass."""
    torch.manual_seed(0)
    if layer == "linear":
        module, x = nn.Linear(4, 3).double(), gaussian(5, 4).abs()
    else:
        module, x = nn.Conv2d(2, 3, 2, padding=1).double(), gaussian(3, 2, 2, 2).abs()
    with torch.no_grad():
        module.weight.mul_(1.5)
        module.weight.view(-1)[:2] = module.weight.abs().max()  # two that share the maximum
    q = quantizer(gradient, bits=2)
    named = policy(pair, gradient, 2)
    with fqtstats.quantized(module, named) as handle:
        target = gaussian(*module(x).shape, seed=5)
        seen = []
        with Session(module, handle, x, lambda m, b: (m(b) * target).sum()) as session:
            observed = IncomingGradients()
            session.qat(observed, observed.weight_gradient)
            with handle.shared.drawing(Draw(sites=frozenset(), observe_weight=lambda *a: seen.append(a))):
                loss_value = (module(x) * target).sum()
                torch.autograd.grad(loss_value, [p for p in module.parameters() if p.requires_grad])
            _, call, parameters = seen[0]
            # The backward pass is linear in the incoming gradient: its matrix, column by column.
            with handle.shared.drawing(Draw(sites=frozenset())):
                out, own = module(x), dict(module.named_parameters())
                units = torch.eye(target.numel(), dtype=torch.float64).view(-1, *target.shape)
                wanted = [own[name] for name in parameters]
                columns = [torch.autograd.grad(out, wanted, unit, retain_graph=True) for unit in units]
    noise = q.noise(target)
    inverse = torch.eye(len(target), dtype=torch.float64)
    if noise.transform is not None:
        inverse = noise.transform.inverse(inverse.view(len(target), -1, 1)).view(len(target), -1)
    # Columns: from each independent rounding to the gradient, and from each factor.
    spread = torch.kron(inverse.contiguous(), torch.eye(target[0].numel(), dtype=torch.float64))
    variance = noise.variance.reshape(-1)
    if noise.factors is not None:
        n, c, _ = noise.factors.signal.shape
        groups = torch.eye(n if noise.factors.groups == "sample" else c, dtype=torch.float64)
        shape = (-1, n, 1, 1) if noise.factors.groups == "sample" else (-1, 1, c, 1)
        spread = torch.cat([spread, (groups.view(shape) * noise.factors.signal).flatten(1).t()], 1)
        variance = torch.cat([variance, noise.factors.variance.reshape(-1)])
    for place, name in enumerate(parameters):
        jacobian = torch.stack([column[place].reshape(-1) for column in columns], dim=1) @ spread
        expected = float((jacobian.square() @ variance).sum())
        assert observed.own[handle_name(observed), name] == pytest.approx(expected, rel=1e-9)
        if name == "weight":
            elementwise = (jacobian.square() @ variance).view_as(module.weight)
            assert_close(exact.weight_variance([call]), elementwise, 1e-9)
    assert set(parameters) >= {"bias", "weight"}
    assert ("fqt_weight.step" in parameters) == pair.startswith("lsq")


def handle_name(observed):
    return next(iter(observed.own))[0]


def test_steps_have_rows_and_an_exact_variance_of_their_own():
    result = fqtstats.measure(*MODELS["mlp"](torch.float32), small.loss, policy("lsq", "psq"), draws=4)
    rows = small.rows(result)
    assert len(rows) == 13
    for layer in "024":
        assert rows[f"{layer}.fqt_weight.step"].variance_exact_own > 0
        assert math.isnan(rows[f"{layer}.fqt_activation.step"].variance_exact_own)  # behind Q2, not Q1
        assert rows[f"{layer}.fqt_weight.step"].numel == 1
    assert rows["4.fqt_weight.step"].variance == pytest.approx(rows["4.fqt_weight.step"].variance_exact_own)


def test_profiles_know_the_same_of_steps():
    model, batch = MODELS["mlp"](torch.float32)
    profile = fqtstats.profile(model, batch, small.loss, policy("lsq", "psq"), precision=0.5)
    measured = small.rows(fqtstats.measure(model, batch, small.loss, policy("lsq", "psq"), method="exact"))
    for name in ("4.fqt_weight.step", "4.weight"):  # what arrives at the last layer is the same in every draw
        found = profile.matrix().loc["4 grad_weight", name]
        assert found == pytest.approx(measured[name].variance_exact_own, rel=1e-5)
    # A step of an activation gets its noise from Q2 of the same layer, and from those above.
    assert profile.matrix().loc["0 grad_input", "0.fqt_activation.step"] > 0
    assert math.isnan(profile.matrix().loc["0 grad_weight", "0.fqt_activation.step"])  # Q1 does not reach it


def test_bounds_hold_behind_surrogates():
    model, batch = MODELS["mlp"](torch.float32)
    for pair in ("lsq", "dorefa 2", "scaled_sign"):
        result = fqtstats.measure(model, batch, small.loss, policy(pair, "psq"), draws=8, bounds=True)
        ratio = result.table["bound_ratio"].dropna()
        assert len(ratio) >= 7
        assert bool((ratio <= 1).all())


def test_gradients_nobody_asks_for_are_not_computed_behind_a_surrogate():
    layer = nn.Linear(4, 3)
    with fqtstats.quantized(layer, policy("lsq")) as handle:
        out = layer(torch.rand(5, 4))
        node = out.grad_fn
        while type(node).__name__ != "_MultiplyBackward":
            node = node.next_functions[0][0]
        weight = leaves(node.next_functions[1][0])
        assert {id(p) for p in weight} == {id(layer.weight), id(layer.fqt_weight.step)}
        seen = []
        for wanted in (layer.bias, layer.fqt_weight.step):
            draw = Draw(sites=frozenset(), wanted=frozenset([id(wanted)]))
            with handle.shared.drawing(draw):
                got = torch.autograd.grad(out.sum(), [layer.weight, wanted], retain_graph=True, allow_unused=True)
            seen.append([g is not None for g in got])
    assert seen == [[False, True], [True, True]]


def test_recomputation_and_autocast():
    class Block(nn.Module):
        def __init__(self, body, again):
            super().__init__()
            self.body, self.again = body, again

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=self.again) if self.again is not None else self.body(x)

    _, (x, y) = MODELS["mlp"](torch.float32)
    for pair in ("lsq", "scaled_sign"):
        found = []
        for again in (None, False, True):
            model = Block(small.mlp(), again)
            with fqtstats.quantized(model, policy(pair, "psq")):
                F.cross_entropy(model(x.clone().requires_grad_()), y).backward()
                found.append([p.grad.clone() for p in model.parameters()])
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
        model = small.mlp()
        with fqtstats.quantized(model, policy(pair, "psq")), torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
            assert out.dtype == torch.bfloat16
            F.cross_entropy(out.float(), y).backward()
            assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_what_surrogates_keep_is_counted():
    x = torch.rand(6, 16, requires_grad=True)
    for pair, activation, weight in (
        ("sign", 6 * 16 // 8, 0),  # of weights, the parameter that is there anyway
        ("dorefa 2", 6 * 16 // 8, 4 * 8 * 16),  # of weights, w itself
        ("lsq", 4 * 6 * 16, 4 * 8 * 16),
        ("sawb", 0, 0),
    ):
        layer = nn.Linear(16, 8)
        with fqtstats.quantized(layer, policy(pair), backend="native") as handle:
            out = layer(x)
            own = layer.fqt_state.policy
            codes = [store(q, v, S).codes.nbytes for q, v in ((own.activation, x), (own.weight, layer.weight))]
            assert handle.kept[""].activation == activation + codes[0]
            assert handle.kept[""].weight == weight + codes[1]
            del out
            assert handle.kept == {}


def trained(model, handle, steps, start=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(start, steps):
        handle.step = step
        optimizer.zero_grad()
        small.loss(model, small.batch(seed=step)).backward()
        optimizer.step()
        yield {"model": copy.deepcopy(model.state_dict()), "optimizer": copy.deepcopy(optimizer.state_dict())}


@pytest.mark.parametrize("pair", ["lsq", "lsq channel", "scaled_sign"])
def test_state_is_saved_loaded_copied_and_resumed(pair):
    model = small.mlp()
    handle = fqtstats.prepare_(model, policy(pair, "psq"), seed=1)
    unset, buffer = copy.deepcopy(model), io.BytesIO()
    torch.save(model.state_dict(), buffer)  # before anything is set
    states = list(trained(model, handle, 4))
    again = small.mlp()
    other = fqtstats.prepare_(again, policy(pair, "psq"), seed=1)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer))
    assert_same(list(trained(again, other, 4))[-1]["model"], states[-1]["model"])
    assert all(not any(p.any() for p in q.parameters()) for n, q in unset.named_modules() if "fqt_" in n)
    # Half of it, saved, loaded elsewhere and continued.
    resumed = small.mlp(seed=9)
    last = fqtstats.prepare_(resumed, policy(pair, "psq"), seed=1)
    resumed.load_state_dict(states[1]["model"])
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(states[1]["optimizer"])
    for step in (2, 3):
        last.step = step
        optimizer.zero_grad()
        small.loss(resumed, small.batch(seed=step)).backward()
        optimizer.step()
    assert_same(resumed.state_dict(), states[-1]["model"])
    handle.remove()
    assert not [name for name in model.state_dict() if "fqt_" in name]


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_quantizer_that_stands_alone_loads_the_steps_of_another():
    q, other = (quantizer("lsq", bits=4, per="channel") for _ in range(2))
    q(gaussian(5, 3).float(), S)
    other.load_state_dict(q.state_dict())
    assert torch.equal(other.step, q.step)
    signed, fresh = (quantizer("lsq", bits=4, on="activation") for _ in range(2))
    signed(torch.rand(4, 3), S)
    fresh.load_state_dict(signed.state_dict())
    x = gaussian(4, 3).float()
    assert torch.equal(fresh(x, S), signed(x, S))
    assert float(fresh(x, S).min()) == 0


# --- native -----------------------------------------------------------------------------------------------------------

ARITHMETIC = {
    "lsq": ("3", "4x4", True),
    "lsq channel": ("4", "4x4", False),
    "sawb": ("4", "4x4", True),
    "sign": ("1", "1x1", False),
    "scaled_sign": ("1", "1x1", True),
    "dorefa 1": ("1", "1x1", True),
    "dorefa 2": ("2", "2x2", True),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pair", PAIRS)
def test_native_products_are_on_codes_and_agree(name, pair):
    model, batch = MODELS[name](torch.float32)
    with torch.no_grad():
        batch[0][0, 0] = 0  # zeros have a sign here, and padding is not on its grid
    q = quantizer("ptq", bits=4)
    named = policy(pair)
    report = fqtstats.parity(model, batch, loss, Policy(named.activation, named.weight, q, q))
    assert report.ok, report.table.to_string()
    _, forward, by_tensor = ARITHMETIC[pair]
    for row in report.table.itertuples():
        if row.product == "forward":
            assert row.arithmetic == f"integer {forward}"
        elif row.product == "grad_weight" or by_tensor:
            assert row.arithmetic.startswith("integer 4x")
        else:
            assert row.arithmetic == "float32: the scales of w vary along the contracted output channels"


def chained():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 4, 1),
        )


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair != "scaled_sign"])
def test_fused_chains_give_the_gradients_of_the_modules(pair):
    x = gaussian(4, 2, 10, 10, seed=4, dtype=torch.float32).to(memory_format=torch.channels_last)
    found = []
    for fused in (False, True):
        model = chained()
        handle = fqtstats.prepare_(model, policy(pair), backend="native", seed=2)
        if fused:
            assert fuse_(model, handle) == [list("0123456")]
        inputs = x.clone().requires_grad_()
        out = model(inputs)
        out.backward(gaussian(*out.shape, seed=6, dtype=torch.float32))
        found.append([out.detach(), inputs.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert float((one - other).norm()) <= 1e-3 * float(one.norm()) + 1e-12


def test_a_scaled_sign_is_in_a_chain_where_it_is_normalized():
    model = chained()
    handle = fqtstats.prepare_(model, policy("scaled_sign"), backend="native")
    assert fuse_(model, handle) == [["0", "1"]]
