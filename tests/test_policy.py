"""Policies, the named recipes, and swapping layers into a model and out again."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn

import fqtstats
from fqtstats import Policy, policies, quantizer
from fqtstats.errors import InputError, UnsupportedError
from fqtstats.layers import BACKENDS, QuantConv1d, QuantConv2d, QuantLinear

PSQ = quantizer("psq", bits=4)
POLICY = policies.get("statquant-psq", bits=4)
PLACES = ("activation", "weight", "grad_input", "grad_weight")


class MyLinear(nn.Linear):
    pass


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 2)
    )


def batch(n=4):
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def snapshot(model):
    """Everything that preparation must give back: class, attributes and their identities, of every module."""
    return {
        name: (type(m), {k: id(v) for k, v in vars(m).items()}, {k: id(v) for k, v in m._parameters.items()})
        for name, m in model.named_modules()
    }


# --- Policy -----------------------------------------------------------------------------------------------------------


def test_policies_are_frozen_and_empty_by_default():
    policy = Policy()
    assert [getattr(policy, place) for place in PLACES] == [None] * 4
    assert not policy.quantizes_anything
    assert not policy.quantizes_gradients
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.weight = PSQ


@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_called_is_no_quantizer(place):
    with pytest.raises(InputError, match=f"{place}.*fqtstats.quantizer"):
        Policy(**{place: "psq"})
    with pytest.raises(InputError, match="override of 'a'"):
        Policy(overrides={"a": PSQ})
    assert Policy(**{place: PSQ}).quantizes_anything
    assert Policy(**{place: PSQ}).quantizes_gradients == place.startswith("grad")


def test_qat_drops_the_gradient_quantizers_also_in_overrides():
    policy = dataclasses.replace(POLICY, overrides={"4": Policy(weight=PSQ, grad_input=PSQ)})
    qat = policy.qat()
    assert policy.quantizes_gradients
    assert not qat.quantizes_gradients
    assert (qat.activation, qat.weight) == (policy.activation, policy.weight)
    assert qat.overrides["4"].weight is PSQ
    assert Policy(overrides={"4": Policy(grad_input=PSQ)}).quantizes_gradients


def test_the_first_matching_override_replaces_the_policy():
    first, second = Policy(grad_input=PSQ), Policy(grad_weight=PSQ)
    policy = Policy(weight=PSQ, overrides={"block.*.conv?": first, "block.*": second})
    assert policy.for_layer("block.0.conv1") is first
    assert policy.for_layer("block.0.fc") is second
    assert policy.for_layer("Block.0.fc") is policy, "patterns heed case"


def test_overrides_of_overrides_are_refused():
    inner = Policy(grad_input=PSQ, overrides={"0": Policy(weight=PSQ)})
    with pytest.raises(InputError, match="overrides of its own"):
        Policy(overrides={"*": inner})


def test_named_policies():
    assert set(policies.POLICIES) >= {"exact", "statquant-qat", "statquant-ptq", "statquant-psq", "statquant-bhq"}
    for name in policies.POLICIES:
        assert policies.get(name).name == name
    bhq = policies.get("statquant-bhq", bits=3)
    assert (bhq.grad_input.name, bhq.grad_input.bits) == ("bhq", 3)
    assert (bhq.grad_weight.name, bhq.grad_weight.bits) == ("pcq", 8)
    assert (bhq.activation.bits, bhq.weight.bits) == (8, 8)
    assert policies.get("statquant-ptq").grad_weight.name == "ptq"
    assert policies.get("statquant-ptq").grad_input.bits == 5
    assert policies.get("statquant-psq", grad_weight=PSQ).grad_weight is PSQ
    assert not policies.get("statquant-qat").quantizes_gradients
    assert not policies.get("exact").quantizes_anything
    with pytest.raises(InputError, match="unknown policy 'nope'; known: exact, statquant-qat"):
        policies.get("nope")
    with pytest.raises(InputError, match="bits"):
        policies.get("statquant-psq", bits=9)


# --- swapping in and out ----------------------------------------------------------------------------------------------


def test_only_the_class_changes_and_removal_restores_everything():
    model = network()
    model.extra = nn.Conv1d(2, 2, 1)
    before, keys = snapshot(model), list(model.state_dict())
    handle = fqtstats.prepare_(model, POLICY)
    assert {name: type(m) for name, m in handle.layers.items()} == {
        "0": QuantConv2d,
        "4": QuantLinear,
        "5": QuantLinear,
        "extra": QuantConv1d,
    }
    assert list(model.state_dict()) == keys
    assert isinstance(model[4], nn.Linear)
    after = snapshot(model)
    for name, (_, attributes, parameters) in before.items():
        assert after[name][2] == parameters, "the same parameter objects"
        assert set(after[name][1]) - set(attributes) == ({"fqt_state"} if name in handle.layers else set())
    assert "grad_input=PSQ(bits=4" in repr(model)
    handle.remove()
    assert snapshot(model) == before
    assert "PSQ" not in repr(model)
    handle.remove()  # once more does nothing
    assert snapshot(model) == before


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_the_context_manager_restores_on_exit_and_on_error(error):
    model = network()
    before = snapshot(model)

    def body():
        with fqtstats.quantized(model, POLICY) as handle:
            assert type(model[0]) is QuantConv2d
            handle.step = 3
            model(batch()).sum().backward()
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(error):
            body()
    for name, (kind, attributes, parameters) in snapshot(model).items():
        assert (kind, attributes.keys(), parameters) == (before[name][0], before[name][1].keys(), before[name][2])


def test_hooks_optimizer_and_state_dict_keep_working():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    model[4].register_forward_hook(lambda m, args, out: seen.append("forward"))
    model[4].register_forward_pre_hook(lambda m, args: seen.append("before"))
    model[4].register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    state = copy.deepcopy(model.state_dict())
    handle = fqtstats.prepare_(model, POLICY)
    model(batch()).square().sum().backward()
    optimizer.step()
    assert seen == ["before", "forward", "backward"]
    assert not torch.equal(model[4].weight, state["4.weight"])
    model.load_state_dict(state)
    assert torch.equal(model[4].weight, state["4.weight"])
    quantized_output = model.eval()(batch())
    handle.remove()
    model(batch()).sum().backward()
    assert seen[-3:] == ["before", "forward", "backward"]
    assert not torch.equal(model(batch()), quantized_output), "the forward pass was quantized, also in eval mode"


def test_every_layer_has_its_own_copy_of_the_quantizers():
    class Learned:
        def __init__(self):
            self.calls = 0

        def __call__(self, x, stream):
            self.calls += 1
            return x

    prototype, model = Learned(), network()
    handle = fqtstats.prepare_(model, Policy(activation=prototype))
    model(batch())
    copies = [layer.fqt_state.policy.activation for layer in handle.layers.values()]
    assert [c.calls for c in copies] == [1, 1, 1]
    assert len({id(c) for c in copies}) == 3
    assert prototype.calls == 0


def test_a_plain_function_is_a_quantizer():
    def halves(x, stream):
        return (2 * x).round() / 2

    model = nn.Sequential(nn.Linear(3, 2))
    fqtstats.prepare_(model, Policy(**dict.fromkeys(PLACES, halves)))
    x = torch.randn(4, 3)
    y = model(x)
    assert torch.allclose(y, nn.functional.linear(halves(x, None), halves(model[0].weight, None), model[0].bias))
    (y * torch.tensor([0.3, 1.4])).sum().backward()
    assert torch.equal(model[0].bias.grad, torch.tensor([2.0, 6.0])), "rounded to 0.5 and 1.5"


def test_unquantized_modules_are_listed_with_the_reason():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.mine = MyLinear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.norm = nn.BatchNorm1d(4)
            self.up = nn.ConvTranspose1d(4, 4, 1)
            self.bilinear = nn.Bilinear(4, 4, 1)
            self.three = nn.Conv3d(1, 1, 1)
            self.skipped = nn.Linear(4, 4)
            self.exact = nn.Linear(4, 4)
            self.flat = nn.BatchNorm1d(4, affine=False)
            self.own = nn.Parameter(torch.zeros(3))

    policy = dataclasses.replace(POLICY, overrides={"exact": Policy()})
    handle = fqtstats.prepare_(Model(), policy, skip="skipped")
    assert list(handle.layers) == ["linear"]
    reasons = {u.name: (u.type, u.reason) for u in handle.unquantized}
    none = "no quantized counterpart"
    subclass = "subclass of Linear; only exact types are swapped"
    assert reasons == {
        "": ("Model", none),
        "mine": ("MyLinear", subclass),
        "attention": ("MultiheadAttention", "its projections are used as plain functions, never called as modules"),
        "attention.out_proj": ("NonDynamicallyQuantizableLinear", subclass),
        "norm": ("BatchNorm1d", none),
        "up": ("ConvTranspose1d", none),
        "bilinear": ("Bilinear", none),
        "three": ("Conv3d", none),
        "skipped": ("Linear", "skipped on request"),
        "exact": ("Linear", "its policy has no quantizer"),
    }


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (None, ["0", "4", "5"]),
        ("4", ["0", "5"]),
        ("[45]", ["0"]),
        (["0", "5"], ["4"]),
        (iter(("0", "5")), ["4"]),
        (lambda name, module: isinstance(module, nn.Linear), ["0"]),
        (lambda name, module: False, ["0", "4", "5"]),
    ],
    ids=["none", "name", "glob", "list", "iterator", "predicate", "predicate without a match"],
)
def test_layers_can_be_skipped(skip, left):
    model = network()
    assert list(fqtstats.prepare_(model, POLICY, skip=skip).layers) == left
    assert {name for name, m in model.named_modules() if hasattr(m, "fqt_state")} == set(left)


def test_overrides_by_pattern_reach_the_layers():
    own = Policy(grad_weight=PSQ)
    handle = fqtstats.prepare_(network(), dataclasses.replace(POLICY, overrides={"[45]": own}))
    assert handle.layers["4"].fqt_state.policy == own
    assert handle.layers["0"].fqt_state.policy == dataclasses.replace(POLICY, overrides={})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": "conv*"}, r"skip pattern 'conv\*' matches no layer; layers: 0, 4, 5, 1"),
        ({"skip": ["4", "nope"]}, "skip pattern 'nope'"),
        ({"policy": dataclasses.replace(POLICY, overrides={"nope": Policy()})}, "override pattern 'nope'"),
        ({"backend": "magic"}, f"unknown backend 'magic'; known: {', '.join(BACKENDS)}"),
        ({"policy": "statquant-psq"}, "expected a fqtstats.Policy.*policies.get"),
        ({"policy": Policy()}, "none .*0: Conv2d, its policy has no quantizer"),
        ({"skip": "*"}, "0: Conv2d, skipped on request.*; let skip and policy leave a layer"),
        ({"model": nn.Sequential(*(nn.LayerNorm(2) for _ in range(7)))}, "4: LayerNorm, .*, and 2 more"),
        ({"model": nn.Sequential(nn.ReLU())}, "Sequential with none .*none with parameters"),
        ({"model": MyLinear(2, 2)}, r"\(root\): MyLinear, subclass of Linear"),
    ],
)
def test_bad_preparations_say_what_to_do_and_change_nothing(options, message):
    options = {"model": network(), "policy": POLICY, **options}
    before = snapshot(options["model"])
    with pytest.raises(InputError, match=message):
        fqtstats.prepare_(**options)
    assert snapshot(options["model"]) == before


def test_what_is_no_model_is_said_so():
    with pytest.raises(InputError, match=r"expected a model \(nn.Module\), got tuple; model comes first"):
        fqtstats.prepare_((torch.zeros(2), torch.zeros(2)), POLICY)


def test_a_prepared_model_cannot_be_prepared_again():
    model = network()
    handle = fqtstats.prepare_(model, POLICY)
    with pytest.raises(InputError, match=r"'0' is prepared already.*remove"):
        fqtstats.prepare_(model, POLICY)
    with pytest.raises(InputError, match="prepared already"), fqtstats.quantized(nn.Sequential(model[4]), POLICY):
        pass
    assert type(model[4]) is QuantLinear, "the failed attempt did not undo the first"
    handle.remove()
    fqtstats.prepare_(model, POLICY).remove()


def test_a_quantizer_that_cannot_be_copied_leaves_the_model_alone():
    class Stubborn:
        copies = 0

        def __call__(self, x, stream):
            return x

        def __deepcopy__(self, memo):
            Stubborn.copies += 1
            if Stubborn.copies > 1:
                raise ZeroDivisionError
            return self

    model = network()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        fqtstats.prepare_(model, Policy(grad_input=Stubborn()))
    assert snapshot(model) == before


def test_a_scripted_model_is_refused():
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedError, match="TorchScript"):
        fqtstats.prepare_(scripted, POLICY)


def gradient_after(model):
    model.zero_grad()
    model(batch()).square().sum().backward()
    return model[4].weight.grad.clone()


def test_copies_and_pickles_of_a_prepared_model_work_alike():
    model = network()
    handle = fqtstats.prepare_(model, POLICY, seed=3)
    handle.step = 2
    duplicate, buffer = copy.deepcopy(model), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    pickled = pickle.loads(pickle.dumps(model))
    expected = gradient_after(model)
    for other in (loaded, pickled):
        assert torch.equal(gradient_after(other), expected), "state at the time of pickling"
    assert type(duplicate[4]) is QuantLinear
    assert duplicate[4].weight is not model[4].weight
    handle.step = 2  # steers the copy, too, and restarts its calls
    assert torch.equal(gradient_after(duplicate), expected)
    handle.remove()
    assert type(model[4]) is nn.Linear
    assert type(duplicate[4]) is QuantLinear, "a copy stays prepared"


class Learned(nn.Module):
    """A quantizer with state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, stream: fqtstats.Stream) -> torch.Tensor:
        return (x / self.scale).round() * self.scale


def test_stateful_quantizers_add_keys_and_leave_with_the_handle() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    keys = list(model.state_dict())
    with fqtstats.quantized(model, fqtstats.Policy(activation=Learned())):
        added = [f"{layer}.fqt_activation.{name}" for layer in (0, 1) for name in ("scale", "seen")]
        assert sorted(model.state_dict()) == sorted([*keys, *added])
        # The layer's own copy is what acts, moves and trains.
        own = model[0].fqt_activation
        assert own is model[0].fqt_state.policy.activation
        assert own is not model[1].fqt_activation
        assert any(p is own.scale for p in model.parameters())
        with torch.no_grad():
            own.scale.fill_(100.0)
            assert torch.equal(model[0](torch.ones(1, 4)), model[0].bias.view(1, 4))
        assert model.double()[0].fqt_state.policy.activation.scale.dtype == torch.float64
        clone = copy.deepcopy(model)
        assert clone[0].fqt_state.policy.activation is clone[0].fqt_activation
    assert list(model.state_dict()) == keys


def test_the_qat_policy_has_its_own_name() -> None:
    assert fqtstats.policies.get("statquant-psq").qat().name == "statquant-psq-qat"
