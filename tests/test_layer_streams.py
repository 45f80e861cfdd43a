"""Which random stream each use of a quantizer draws from: step, layer, site, draw, call and replica."""

from __future__ import annotations

import pytest
import torch
from layer_cases import FORWARD, FQT, assert_near, filled, gaussian, identity, qa, qw
from oracles import fake_quantization as oracle
from torch import nn

import fqtstats
from fqtstats import Policy
from fqtstats.errors import InputError

pytestmark = pytest.mark.usefixtures("backend")


class Recorder:
    """A quantizer that rounds nothing and keeps the streams it was given; copies share the list."""

    def __init__(self):
        self.streams = []

    def __call__(self, x, stream):
        self.streams.append(stream)
        return x

    def __deepcopy__(self, memo):
        return self

    def of(self, site):
        return [s for s in self.streams if s.site == site]


def recorded(model, **options):
    recorder = Recorder()
    places = ("activation", "weight", "grad_input", "grad_weight")
    return recorder, fqtstats.prepare_(model, Policy(**dict.fromkeys(places, recorder)), **options)


def test_streams_carry_seed_step_layer_site_draw_call_and_replica():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    recorder, handle = recorded(model, seed=7)
    handle.step = 4
    model(gaussian(4, 3).requires_grad_()).sum().backward()
    sites = ("activation", "weight", "grad_input", "grad_weight")
    expected = {fqtstats.stream(7, 4, layer, site, 0, 0, 0) for layer in ("0", "2") for site in sites}
    assert set(recorder.streams) == expected
    assert len(recorder.streams) == 8


@pytest.mark.parametrize("tie", ["module under two names", "called twice"])
def test_a_layer_called_twice_has_call_0_and_1(tie):
    shared = filled(nn.Linear(3, 3))
    if tie == "called twice":
        model = nn.Sequential(shared)
        forward = lambda x: model(model(x))  # noqa: E731
    else:
        model = nn.Sequential(shared, nn.Tanh(), shared)
        forward = model
    handle = fqtstats.prepare_(model, FQT)
    assert list(handle.layers) == ["0"]
    assert "2.weight" in model.state_dict() or tie == "called twice"
    handle.remove()
    recorder, _ = recorded(model)
    forward(gaussian(4, 3)).sum().backward()
    assert [s.call for s in recorder.of("activation")] == [0, 1]
    assert [s.call for s in recorder.of("grad_weight")] == [1, 0], "backward runs the other way"
    assert {s.layer for s in recorder.streams} == {"0"}
    first, second = recorder.of("activation")
    assert not torch.equal(first.bits((50,)), second.bits((50,)))


def test_two_modules_with_one_parameter_are_two_layers():
    model = nn.Sequential(filled(nn.Linear(3, 3)), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    x = gaussian(6, 3)
    y = oracle.linear(oracle.linear(x, model[0].weight, model[0].bias, qa, qw), model[0].weight, model[1].bias, qa, qw)
    (expected,) = torch.autograd.grad(y.square().sum(), [model[0].weight])
    handle = fqtstats.prepare_(model, Policy(**FORWARD, grad_input=identity, grad_weight=identity))
    assert list(handle.layers) == ["0", "1"]
    model(x).square().sum().backward()
    assert model[1].weight is model[0].weight
    assert_near(model[0].weight.grad, expected)


def test_calls_continue_over_micro_batches_and_restart_with_the_step():
    model = nn.Sequential(filled(nn.Linear(3, 2)))
    recorder, handle = recorded(model)
    for _ in range(3):
        model(gaussian(4, 3)).sum().backward()
    assert [s.call for s in recorder.of("grad_weight")] == [0, 1, 2]
    recorder.streams.clear()
    handle.step = 1
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(gaussian(4, 3))  # an evaluation in between
    model(gaussian(4, 3)).sum().backward()
    assert [(s.step, s.call) for s in recorder.of("grad_weight")] == [(1, 0)]


def test_the_step_changes_the_numbers_and_a_late_backward_keeps_its_own_step():
    layer = filled(nn.Linear(5, 4))
    x = gaussian(8, 5)

    def run(step, later=None):
        layer.grad = layer.weight.grad = None
        handle = fqtstats.prepare_(layer, FQT)
        handle.step = step
        loss = layer(x).square().sum()
        if later is not None:
            handle.step = later
        loss.backward()
        handle.remove()
        return layer.weight.grad.clone()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert torch.equal(run(0, later=1), run(0))


@pytest.mark.parametrize("value", [1.5, "a", True, None])
def test_seed_and_step_are_integers(value):
    layer = nn.Linear(3, 2)
    with pytest.raises(InputError, match="integer"):
        fqtstats.prepare_(layer, FQT, seed=value)
    assert type(layer) is nn.Linear
    handle = fqtstats.prepare_(layer, FQT)
    with pytest.raises(InputError, match="integer"):
        handle.step = value
