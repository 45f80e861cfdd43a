"""Activation checkpointing: a recomputed call draws the numbers of the original one."""

from __future__ import annotations

import pytest
import torch
from layer_cases import FQT, assert_near, filled, gaussian
from torch import nn
from torch.utils.checkpoint import checkpoint

import fqtstats
from fqtstats import Policy, quantizer
from fqtstats.errors import UnsupportedError
from fqtstats.layers import recomputation

pytestmark = pytest.mark.usefixtures("backend")


class Blocks(nn.Module):
    """Layers in checkpointed segments; ``shared`` is called once in each of two segments and twice in a third."""

    def __init__(self, wrap):
        super().__init__()
        self.first, self.shared, self.last = (filled(nn.Linear(6, 6), seed) for seed in (1, 3, 5))
        self.norm = nn.LayerNorm(6)
        self.wrap = wrap

    def segment_a(self, x):
        return torch.tanh(self.shared(torch.relu(self.first(x))))

    def segment_b(self, x):
        return self.norm(self.shared(self.shared(x)))

    def nested(self, x):
        return torch.tanh(self.wrap(self.segment_b, self.wrap(self.segment_a, x)))

    def forward(self, x):
        x = self.wrap(self.segment_a, x)
        x = self.wrap(self.segment_b, x)
        x = self.wrap(self.nested, x)
        return self.last(self.shared(x))


def wrapped(kind):
    if kind == "none":
        return lambda f, x: f(x)
    return lambda f, x: checkpoint(f, x, use_reentrant=kind == "reentrant")


class Kept:
    """A quantizer whose results are kept by stream; asked twice for one stream, it must give the same numbers."""

    def __init__(self, q):
        self.q = q
        self.results = {}

    def __call__(self, x, stream):
        out = self.q(x, stream)
        assert torch.equal(self.results.setdefault(stream, out), out), f"recomputed differently: {stream}"
        return out

    def __deepcopy__(self, memo):
        return self


def training(kind, policy):
    """Everything that the quantizers of two steps of two micro-batches gave, and the gradients."""
    places = ("activation", "weight", "grad_input", "grad_weight")
    quantizers = {place: Kept(getattr(policy, place)) for place in places if getattr(policy, place) is not None}
    model = Blocks(wrapped(kind))
    handle = fqtstats.prepare_(model, Policy(**quantizers), seed=3)
    gradients = []
    for step in range(2):
        handle.step = step
        x = gaussian(5, 6, seed=step).requires_grad_()
        for _ in range(2):
            model(x).square().mean().backward()
        gradients += [x.grad, *(p.grad.clone() for p in model.parameters())]
    return {stream: out for q in quantizers.values() for stream, out in q.results.items()}, gradients


STOCHASTIC_FORWARD = Policy(activation=quantizer("psq", bits=3), weight=quantizer("ptq", bits=3))


# A nested reentrant checkpoint runs its first pass under no_grad, which torch comments on.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("policy", [FQT, STOCHASTIC_FORWARD], ids=["fqt", "stochastic forward"])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_no_number(kind, policy):
    plain, plain_gradients = training("none", policy)
    checkpointed, gradients = training(kind, policy)
    assert plain.keys() == checkpointed.keys()
    assert {s.call for s in plain if s.layer == "shared"} == set(range(14)), "7 calls in each of 2 micro-batches"
    if kind == "non-reentrant":
        assert all(torch.equal(plain[s], checkpointed[s]) for s in plain)
        assert all(torch.equal(a, b) for a, b in zip(plain_gradients, gradients, strict=True))
    else:
        # Reentrant checkpoints add up the gradients of a tensor that is used several times in another order.
        for s, out in plain.items():
            if s.site in ("activation", "weight"):
                assert torch.equal(out, checkpointed[s])
            else:
                differs = (out - checkpointed[s]).abs() > 1e-5 * out.abs().max()
                assert differs.float().mean() <= 0.05, "an ulp may turn a rounding decision here and there"
        for a, b in zip(plain_gradients, gradients, strict=True):
            assert_near(a, b, 64)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("policy", [FQT, STOCHASTIC_FORWARD], ids=["fqt", "stochastic forward"])
def test_gradients_under_checkpointing_are_bit_identical_where_nothing_is_added_up(kind, policy):
    def run(kind):
        wrap = wrapped(kind)
        layers = nn.ModuleList([filled(nn.Linear(6, 6), seed) for seed in range(1, 9)])
        handle = fqtstats.prepare_(layers, policy, seed=3)
        handle.step = 2
        x = y = gaussian(5, 6).requires_grad_()
        for first, second in zip(layers[::2], layers[1::2], strict=True):
            y = wrap(lambda y, a=first, b=second: torch.tanh(b(torch.relu(a(y)))), y)
        y.square().sum().backward()
        return [x.grad, *(p.grad for p in layers.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run("none"), run(kind), strict=True))


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_an_interrupted_backward_pass_leaves_the_calls_in_order(kind):
    armed = []

    def failing(g):
        if armed:
            raise ZeroDivisionError
        return g

    def backward(kind, interrupt):
        layer = filled(nn.Linear(6, 6))
        kept = Kept(quantizer("psq", bits=3))
        fqtstats.prepare_(layer, Policy(activation=kept, grad_weight=FQT.grad_weight))

        def segment(x):
            y = layer(x)
            if torch.is_grad_enabled():
                y.register_hook(failing)
                if armed and torch._C._current_graph_task_id() != -1:
                    raise ZeroDivisionError
            return layer(layer(y))

        loss = wrapped(kind)(segment, gaussian(5, 6).requires_grad_()).square().sum()
        if interrupt:
            armed.append(True)
            with pytest.raises(ZeroDivisionError):
                loss.backward(retain_graph=True)
            armed.clear()
            layer.zero_grad()
        loss.backward()
        return layer.weight.grad

    assert_near(backward(kind, True), backward(kind, False))


def test_a_torch_that_keeps_checkpoints_otherwise_is_refused_only_with_checkpoints(monkeypatch):
    monkeypatch.setattr(recomputation, "_AGAIN", None)
    layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(3, 4, requires_grad=True)
    with fqtstats.quantized(layer, fqtstats.policies.get("statquant-psq")):
        layer(x).sum().backward()
        with pytest.raises(UnsupportedError, match="activation checkpointing"):
            checkpoint(layer, x, use_reentrant=False).sum().backward()
