"""Prepared layers that act as the plain ones: equal bit for bit, forward and backward."""

from __future__ import annotations

import pytest
import torch
from layer_cases import FQT, filled, gaussian
from torch import nn

import fqtstats
from fqtstats.errors import InputError

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "tokens": (nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 7)),
    "conv2d": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 8, 8)),
    "border": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
}


def passed(model, x, dtype):
    """Output and gradients of one pass."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        y = model(x)
    g = gaussian(*y.shape, seed=3).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], g)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("backend")
def test_a_layer_in_full_precision_is_the_plain_layer(name, dtype):
    layer, shape = LAYERS[name]
    own = torch.float32 if dtype == "autocast" else dtype
    model = nn.Sequential(filled(layer).to(own))
    x = gaussian(*shape, seed=2).to(own)
    plain = passed(model, x, dtype)
    handle = fqtstats.prepare_(model, FQT)
    quantized = passed(model, x, dtype)
    handle.full_precision = {"0"}
    again = passed(model, x, dtype)
    handle.full_precision = ()
    handle.step = 0
    back = passed(model, x, dtype)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    # Negative control: the comparison tells quantized layers from plain ones.
    assert not any(torch.equal(a, b) for a, b in list(zip(plain, quantized, strict=True))[:3])
    assert all(torch.equal(a, b) for a, b in zip(quantized, back, strict=True))


@pytest.mark.usefixtures("backend")
def test_only_the_named_layers_are_plain():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    filled(model[0])
    filled(model[1])
    x = gaussian(3, 6)
    handle = fqtstats.prepare_(model, FQT)
    handle.full_precision = "1"
    assert handle.full_precision == {"1"}
    hidden = model[0](x)
    expected = torch.nn.functional.linear(hidden, model[1].weight, model[1].bias)
    handle.step = 0
    assert torch.equal(model(x), expected)
    assert not torch.equal(hidden, torch.nn.functional.linear(x, model[0].weight, model[0].bias))
    assert "1" not in handle.kept


def test_calls_of_plain_layers_are_not_counted():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    handle = fqtstats.prepare_(model, FQT)
    handle.full_precision = {"0"}
    model(gaussian(3, 6))
    assert handle.shared._calls == {"1": 1}


def test_unknown_layers_are_refused():
    handle = fqtstats.prepare_(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), FQT, skip="1")
    for names in ({"1"}, "2", ["0", "nope"]):
        with pytest.raises(InputError, match=r"expected names of quantized layers .* layers: 0\Z"):
            handle.full_precision = names
    assert handle.full_precision == frozenset()


def test_a_fused_chain_ends_at_a_plain_layer():
    def network():
        return nn.Sequential(filled(nn.Conv2d(2, 3, 3)), nn.BatchNorm2d(3), nn.ReLU(), filled(nn.Conv2d(3, 2, 3)))

    x = gaussian(4, 2, 9, 9)
    outputs = []
    for fuse in (False, True):
        model = network()
        handle = fqtstats.prepare_(model, FQT, backend="native")
        if fuse:
            fqtstats.fuse_(model, handle)
        handle.full_precision = {"3"}
        outputs.append(model(x))
        kept = set(handle.kept)
        handle.full_precision = {"0", "3"}
        outputs.append(model(x))
        assert kept == {"0"}
    for unfused, fused in zip(outputs[:2], outputs[2:], strict=True):
        torch.testing.assert_close(unfused, fused, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs[1], network()(x))


def test_a_checkpoint_computes_the_same_again():
    model = nn.Sequential(filled(nn.Linear(6, 6)), filled(nn.Linear(6, 6)))
    x = gaussian(3, 6).requires_grad_()
    found = []
    for again in (False, True):
        with fqtstats.quantized(model, FQT) as handle:
            handle.full_precision = {"0"}
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if again else model(x)
            found.append(torch.autograd.grad(y.square().sum(), [x, *model.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
