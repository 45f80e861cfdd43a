"""Which modules are fused, and that a model with chains is otherwise the model that it was."""

from __future__ import annotations

import copy

import pytest
import torch
from chains import G, X, network, passed, policy, relative, twins
from torch import nn

import fqtstats
from fqtstats.errors import InputError
from fqtstats.layers.chain import Output
from fqtstats.layers.fusion import FusedSequential, fuse_


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
