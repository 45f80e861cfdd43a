"""Recipes: that all of them build and fit the models, their rules for layers, stages, schedules and optimizers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import fqtstats
from fqtstats import Policy, models, quantizer
from fqtstats.errors import InputError
from fqtstats.training import recipes, runs
from fqtstats.training.layer_rules import LayerRules, roles
from fqtstats.training.optimizers import Optimizer
from fqtstats.training.recipes import RECIPES, Recipe, Stage
from fqtstats.training.schedules import SCHEDULES, schedule, warmed_up
from fqtstats.training.stochastic_precision import StochasticPrecision

FULL, OTHER = Policy(), Policy(weight=quantizer("symmetric", bits=2))


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    kind: str
    input_shape: tuple[int, ...]
    num_classes: int


DIGITS, TEXT = Shape("digits", "image", (1, 8, 8), 10), Shape("text", "tokens", (8,), 97)
LARGE = Shape("images", "image", (3, 65, 65), 7)
BUILT = {}


def model(name, shape=None):
    """A model of the library, made once and left as it is, and two of its inputs."""
    shape = shape or (TEXT if name == "transformer" else DIGITS)
    if (name, shape) not in BUILT:
        BUILT[name, shape] = models.build(name, shape, 0)
    inputs = torch.zeros(2, 8, dtype=torch.long) if shape.kind == "tokens" else torch.randn(2, *shape.input_shape)
    return BUILT[name, shape], inputs


def small(layers=4):
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))


# --- every recipe -----------------------------------------------------------------------------------------------------

CASES = [(name, bits) for name, row in RECIPES.items() for bits in (row.bits or (None,))]


@pytest.mark.parametrize(("name", "bits"), CASES, ids=[f"{name}@{bits}" for name, bits in CASES])
def test_every_recipe_fits_a_small_model_and_its_policies_run(name, bits):
    recipe = recipes.get(name, bits)
    assert (recipe.name, recipe.bits, recipe.source) == (name, bits, RECIPES[name].source)
    net = small()
    found = recipe.for_model(net, torch.randn(3, 6), pretrained=True)
    assert [stage.name for stage in found.stages] == [stage.name for stage in recipe.stages]
    others = () if found.distillation is None else found.distillation.others
    for policy in [*(stage.policy for stage in found.stages if stage.quantizes), *others]:
        with fqtstats.quantized(net, policy) as handle:
            loss = net(torch.randn(5, 6)).square().sum()
            gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in gradients)
            assert handle.layers
            assert recipe.build_optimizer(net).param_groups


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_every_model(recipe, name):
    net, _ = model(name)
    found = recipes.get(recipe).for_model(net, pretrained=True)
    for stage in found.stages:
        if stage.quantizes:
            with fqtstats.quantized(net, stage.policy) as handle:
                assert handle.layers


def test_the_default_bits_are_defined_and_the_unknown_are_refused():
    for name, row in RECIPES.items():
        assert (row.default in row.bits) if row.bits else row.default is None
        assert row.name == name
        wrong = 3 if name.startswith("1bit-agp") else 9
        with pytest.raises(InputError, match=f"recipe '{name}' is not defined for {wrong} bits; (known: |it has none)"):
            recipes.get(name, wrong)
    with pytest.raises(InputError, match=r"unknown recipe 'nope'; known: exact, statquant-qat, .*dorefa\Z"):
        recipes.get("nope")


def test_statquant_recipes_are_the_policies():
    for name, bits in (("exact", None), ("statquant-qat", None), ("statquant-bhq", 3)):
        recipe = recipes.get(name, bits)
        assert [stage.policy for stage in recipe.stages] == [fqtstats.policies.get(name, bits or 8)]
    assert recipes.get("statquant-psq").bits == 5
    assert recipes.get("exact").for_model(nn.ReLU()) == recipes.get("exact")  # nothing to quantize, nothing to refuse


def test_one_bit_prunes_samples_for_inputs_and_channels_for_weights():
    recipe = recipes.get("1bit-agp-adam", 8)
    policy = recipe.stages[-1].policy
    assert (policy.grad_input.groups, policy.grad_weight.groups) == ("sample", "channel")
    assert policy.grad_input.bits == policy.grad_weight.bits == 8
    assert [stage.quantizes for stage in recipe.stages] == [False, True, True]
    assert not recipe.stages[1].policy.quantizes_gradients
    net, inputs = model("resnet18")
    plain = {"stem.0", "head", *(f"stages.{s}.0.shortcut.0" for s in (1, 2, 3))}
    found = recipe.for_model(net, inputs)
    assert {
        name for name, policy in found.stages[-1].policy.overrides.items() if not policy.quantizes_anything
    } == plain
    assert found.stages[0].policy.overrides == {}


def test_lsq_has_8_bits_at_both_ends_and_starts_from_full_precision():
    recipe = recipes.get("lsq", 2)
    net, inputs = model("mlp")
    found = recipe.for_model(net, inputs, pretrained=True)
    assert {name: policy.weight.bits for name, policy in found.stages[0].policy.overrides.items()} == {"1": 8, "5": 8}
    assert found.stages[0].policy.weight.bits == 2
    with pytest.raises(
        InputError, match=r"'lsq' starts from a network that was trained in full precision, .*checkpoint"
    ):
        recipe.for_model(net, inputs)


def test_two_step_quantizes_weights_first():
    first, second = (stage.policy for stage in recipes.get("two-step", 2).stages)
    assert first.activation is None
    assert first.weight == second.weight
    assert second.activation is not None


def test_progressive_bits_halve():
    recipe = recipes.get("progressive", 2)
    assert [stage.name for stage in recipe.stages] == ["32 bits", "16 bits", "8 bits", "4 bits", "2 bits"]
    assert [stage.policy.weight.bits for stage in recipe.stages[1:]] == [16, 8, 4, 2]
    assert recipe.epochs(5) == (1, 1, 1, 1, 1)
    assert [stage.name for stage in recipes.get("progressive", 8).stages] == ["32 bits", "16 bits", "8 bits"]


def test_16_bits_are_what_dorefa_would_give():
    recipe = recipes.get("progressive", 8)
    wide = recipe.stages[1].policy
    s = fqtstats.stream()
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = x.detach().double().tanh()
    unit = t / (2 * t.abs().max()) + 0.5
    expected = 2 * torch.round(unit * 65535) / 65535 - 1
    torch.testing.assert_close(wide.weight(x.detach(), s), expected.float(), rtol=0, atol=0)
    expected = torch.round(x.detach().double().clamp(0, 1) * 65535) / 65535
    torch.testing.assert_close(wide.activation(x.detach(), s), expected.float(), rtol=0, atol=0)
    assert torch.equal(wide.weight(torch.zeros(3), s), torch.zeros(3))
    for own, narrow in ((wide.weight, "dorefa_weight"), (wide.activation, "dorefa_act")):
        got, wanted = (torch.autograd.grad(q.surrogate(x).pow(2).sum(), x)[0] for q in (own, quantizer(narrow, bits=2)))
        assert torch.equal(got, wanted)


def test_luq_takes_symmetric_levels_where_inputs_are_negative_and_fnt_keeps_only_weights():
    recipe = recipes.get("luq-fnt")
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 6), nn.Linear(6, 6))
    found = recipe.for_model(net, torch.randn(50, 6))
    overrides = found.stages[0].policy.overrides
    assert {name: policy.quantizes_anything for name, policy in overrides.items()} == {"0": False, "7": False}
    net[3] = nn.Identity()  # the input of layer 4 can be negative now
    overrides = recipe.for_model(net, torch.randn(50, 6)).stages[0].policy.overrides
    assert list(overrides) == ["0", "7", "4"]
    assert overrides["4"].activation == quantizer("sawb", on="weight")
    assert overrides["4"].grad_input == found.stages[0].policy.grad_input
    last = found.stages[1].policy
    assert (last.activation, last.grad_input, last.grad_weight) == (None, None, None)
    assert last.weight == found.stages[0].policy.weight
    assert recipes.get("luq-smp").stages[0].policy.grad_weight.samples == 2
    assert recipes.get("luq-smp").stages[0].policy.grad_input.samples == 1


# --- which layers ----------------------------------------------------------------------------------------------------

ENDS = {  # first, last, down-sampling, on digits
    "mlp": ("1", "5", ()),
    "preact_resnet20": ("conv", "head", ("stages.1.0.shortcut", "stages.2.0.shortcut")),
    "preact_resnet56": ("conv", "head", ("stages.1.0.shortcut", "stages.2.0.shortcut")),
    "resnet18": ("stem.0", "head", tuple(f"stages.{s}.0.shortcut.0" for s in (1, 2, 3))),
    "resnet50": ("stem.0", "head", tuple(f"stages.{s}.0.shortcut.0" for s in (1, 2, 3))),
    "vgg16": ("0", "44", ()),
    "transformer": ("blocks.0.qkv", "head", ()),
}


@pytest.mark.parametrize("name", models.MODELS)
def test_first_last_and_downsampling_layers_of_the_models(name):
    net, inputs = model(name)
    first, last, downsampling = ENDS[name]
    modes = {m: m.training for m in net.modules()}
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for found in (roles(net), roles(net, inputs)):
        assert (found.order[0], found.last) == (first, last)
        assert set(found.downsampling) == set(downsampling)
    assert set(roles(net).order) == set(found.order)
    assert {m: m.training for m in net.modules()} == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_the_stem_for_large_images_is_the_first_layer_and_does_not_count_as_downsampling():
    net, inputs = model("resnet18", LARGE)
    found = roles(net, inputs)
    assert found.order[0] == "stem.0"
    assert "stem.0" not in found.downsampling


class Backwards(nn.Module):
    """Registers its layers against the order of use; one is used twice, one never."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)
        self.middle = nn.Linear(6, 6)
        self.first = nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.middle(self.middle(self.first(x)).relu()))


def test_the_order_of_use_counts_where_inputs_are_given():
    net = Backwards()
    assert roles(net, torch.randn(2, 6)).order == ("first", "middle", "last")
    assert roles(net).order == ("unused", "last", "middle", "first")
    found = roles(net, torch.rand(40, 6))
    assert (set(found.signed), found.nonnegative) == ({"middle", "last"}, ("first",))
    assert roles(net).signed == roles(net).nonnegative == ()
    recipe = dataclasses.replace(recipes.get("statquant-psq"), rules=LayerRules(FULL, OTHER))
    overrides = recipe.for_model(net, torch.randn(2, 6)).stages[0].policy.overrides
    assert overrides == {"first": FULL, "last": OTHER}


def test_a_layer_that_is_called_first_and_last_is_first():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.a(self.b(self.a(x)))

    found = roles(Shared(), torch.randn(2, 6))
    assert (found.order, found.last) == (("a", "b"), "a")
    assert LayerRules(FULL, OTHER).overrides(found, OTHER) == {"a": FULL}


def test_what_recipes_do_not_fit():
    recipe = dataclasses.replace(recipes.get("statquant-psq"), rules=LayerRules(FULL, FULL))
    for layers in (1, 2):
        with pytest.raises(
            InputError, match=r"'statquant-psq' does not fit Sequential: too few layers.*\(first, last\)"
        ):
            recipe.for_model(small(layers))
    with pytest.raises(InputError, match=r"does not fit Sequential: expected a model with nn\.Linear"):
        recipe.for_model(nn.Sequential(nn.ReLU()))
    net = small()
    with fqtstats.quantized(net, OTHER), pytest.raises(InputError, match="got one that is prepared"):
        recipe.for_model(net)
    policy = recipe.for_model(small(3)).stages[0].policy
    assert list(policy.overrides) == ["0", "2"]


def test_the_model_is_only_run_for_rules():
    class Never(nn.Linear):
        def forward(self, x):
            raise AssertionError

    net = nn.Sequential(*small(3), Never(6, 6))
    found = recipes.get("statquant-psq").for_model(net, torch.randn(2, 6))
    assert found == recipes.get("statquant-psq")
    with pytest.raises(AssertionError):
        dataclasses.replace(found, rules=LayerRules(FULL)).for_model(net, torch.randn(2, 6))


def test_odd_names_are_no_patterns():
    net = nn.Sequential()
    for name in ("a[0]", "a0", "b*", "c"):
        net.add_module(name, nn.Linear(6, 6))
    recipe = dataclasses.replace(recipes.get("statquant-psq"), rules=LayerRules(FULL, FULL))
    with fqtstats.quantized(net, recipe.for_model(net).stages[0].policy) as handle:
        assert list(handle.layers) == ["a0", "b*"]


# --- stages, schedules, optimizers -----------------------------------------------------------------------------------


def staged(*shares, **others):
    stages = tuple(Stage(str(i), FULL, share) for i, share in enumerate(shares))
    return Recipe("r", "", None, stages, **others)


def test_epochs_are_divided_by_the_shares():
    assert staged(1.0).epochs(7) == (7,)
    assert staged(0.3, 0.3, 0.4).epochs(10) == (3, 3, 4)
    assert staged(0.5, 0.5).epochs(3) in ((1, 2), (2, 1))
    assert staged(0.98, 0.02).epochs(5) == (4, 1)
    assert staged(0.02, 0.49, 0.49).epochs(3) == (1, 1, 1)
    assert staged(1 / 3, 1 / 3, 1 / 3).epochs(300) == (100, 100, 100)
    for total in range(4, 60):
        counts = staged(0.05, 0.6, 0.3, 0.05).epochs(total)
        assert sum(counts) == total
        assert min(counts) >= 1
    with pytest.raises(InputError, match="recipe 'r' has 2 stages, which need at least one epoch each; got 1 epochs"):
        staged(0.5, 0.5).epochs(1)


def test_what_is_no_recipe():
    for wrong, told in (
        (lambda: staged(0.5, 0.4), "to add up to 1, got 0.9"),
        (staged, "stages of different names"),
        (lambda: Recipe("r", "", None, (Stage("a", FULL, 0.5), Stage("a", FULL, 0.5))), "different names"),
        (lambda: staged(1.0, label_smoothing=1.0), "label smoothing"),
        (lambda: staged(0.5, 0.5, warmup=0.5), "warm-up"),
        (lambda: Stage("a", FULL, schedule="nope"), "unknown schedule 'nope'; known: cosine, constant, step, triangle"),
        (lambda: Stage("a", FULL, share=0.0), "share above 0"),
        (lambda: Stage("a", FULL, lr_scale=-1.0), "positive lr_scale"),
        (lambda: Optimizer("nope"), "unknown optimizer 'nope'; known: sgd, adam"),
        (lambda: Optimizer(lr=0.0), "lr of the optimizer to be finite and positive"),
        (lambda: Optimizer(linear_lr=math.inf), "linear_lr of the optimizer"),
        (lambda: Optimizer(momentum=1.0), "momentum"),
        (lambda: Optimizer(weight_decay=-1.0), "weight_decay"),
        (lambda: Optimizer(betas=(0.9, 1.0)), "betas"),
        (lambda: warmed_up(schedule("cosine"), 1.0), "warm-up"),
    ):
        with pytest.raises(InputError, match=told):
            wrong()


def rates(shape, steps):
    return [shape(done, steps) for done in range(steps)]


def test_schedules():
    expected = {
        "cosine": [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4],
        "constant": [1, 1, 1, 1],
        "step": [1, 1, 0.1, 0.01],
        "triangle": [0.25, 0.75, 0.75, 0.25],
    }
    assert set(expected) == set(SCHEDULES)
    for name, values in expected.items():
        assert rates(schedule(name), 4) == pytest.approx(values, abs=1e-15)
    assert rates(schedule("triangle"), 5) == pytest.approx([0.2, 0.6, 1, 0.6, 0.2], abs=1e-15)
    warm = warmed_up(schedule("cosine"), 0.2)
    assert rates(warm, 10)[:3] == [0.5, 1, 1]
    assert rates(warm, 10)[2:] == rates(schedule("cosine"), 8)
    assert rates(warmed_up(schedule("step"), 0.0), 8) == rates(schedule("step"), 8)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64, 1000])
def test_every_step_has_a_rate_and_a_triangle_is_symmetric(steps):
    for shape in SCHEDULES.values():
        for share in (0.0, 1 / 90, 0.4, 0.999):
            assert all(0 < rate <= 1 for rate in rates(warmed_up(shape, share), steps))
    found = rates(schedule("triangle"), steps)
    assert found == found[::-1]
    rise = rates(warmed_up(schedule("constant"), 0.5), steps)
    assert rise[-1] == 1
    assert rise == sorted(rise)


def test_factors_of_the_stages():
    stages = (Stage("a", FULL, 0.5), Stage("b", FULL, 0.5, lr_scale=0.1, schedule="constant"))
    recipe = Recipe("r", "", None, stages, warmup=0.25)
    found = [recipe.factor(0, done, 8) for done in range(8)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, *rates(schedule("cosine"), 4)], abs=1e-15)
    assert recipe.factor(1, 0, 8) == 0.1


def test_optimizer_groups():
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    net[3].bias.requires_grad_(False)
    net[0].fqt_weight = nn.Module()  # what a quantizer has learned stands there
    net[0].fqt_weight.step = nn.Parameter(torch.ones(3, 1, 1, 1))
    names = {id(p): name for name, p in net.named_parameters()}

    def found(optimizer, **options):
        groups = optimizer.build(net, **options).param_groups
        assert all(group["lr"] == group["initial_lr"] for group in groups)
        return {(g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}

    every = {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}
    assert found(Optimizer(lr=0.5, weight_decay=1e-3)) == {(0.5, 1e-3): every, (0.5, 0): {"0.fqt_weight.step"}}
    assert found(Optimizer(lr=0.5, weight_decay=1e-3), decay_norms=False) == {
        (0.5, 1e-3): {"0.weight", "3.weight"},
        (0.5, 0): {"0.bias", "1.weight", "1.bias", "0.fqt_weight.step"},
    }
    assert found(Optimizer("adam", lr=0.5, linear_lr=0.25, weight_decay=0.0)) == {
        (0.5, 0): every - {"3.weight"} | {"0.fqt_weight.step"},
        (0.25, 0): {"3.weight"},
    }
    assert Optimizer(lr=0.5).with_lr(2.0) == Optimizer(lr=2.0)
    assert Optimizer(lr=0.5, linear_lr=0.25).with_lr(2.0) == Optimizer(lr=2.0, linear_lr=1.0)
    sgd, adam = Optimizer(momentum=0.875).build(net), Optimizer("adam", betas=(0.8, 0.9)).build(net)
    assert isinstance(sgd, torch.optim.SGD)
    assert {group["momentum"] for group in sgd.param_groups} == {0.875}
    assert isinstance(adam, torch.optim.Adam)
    assert {group["betas"] for group in adam.param_groups} == {(0.8, 0.9)}
    with pytest.raises(InputError, match="expected a model with parameters to train, got ReLU with none"):
        Optimizer().build(nn.ReLU())


def test_a_learned_step_is_not_decayed():
    net = small()
    recipe = recipes.get("lsq", 4)
    with fqtstats.quantized(net, recipe.for_model(net, pretrained=True).stages[0].policy):
        net(torch.randn(5, 6))
        groups = recipe.build_optimizer(net).param_groups
        learned = {id(p) for name, p in net.named_parameters() if ".fqt_" in name}
        assert len(learned) == 8
        assert learned == {id(p) for g in groups for p in g["params"] if g["weight_decay"] == 0}


# --- stochastic precision --------------------------------------------------------------------------------------------


def test_blocks_of_the_models():
    rule = StochasticPrecision()
    net, _ = model("resnet18")
    units = rule.units(net, roles(net).order)
    assert units["stem.0"] == "stem.0"
    assert units["head"] == "head"
    assert {layer for layer, unit in units.items() if unit == "stages.1.0"} == {
        "stages.1.0.branch.0",
        "stages.1.0.branch.3",
        "stages.1.0.shortcut.0",
    }
    assert len(set(units.values())) == 2 + 8
    for name, blocks in (("vgg16", 14), ("mlp", 3), ("transformer", 3), ("preact_resnet20", 11)):
        net, _ = model(name)
        assert len(set(rule.units(net, roles(net).order).values())) == blocks
    wrapped = nn.Module()
    wrapped.net = model("preact_resnet20")[0]  # a module with blocks in it is none
    assert rule.units(wrapped, ["net.conv", "net.stages.0.0.conv1"]) == {
        "net.conv": "net.conv",
        "net.stages.0.0.conv1": "net.stages.0.0",
    }
    layers = ["net.conv", "net.stages.0.0.conv1"]
    assert StochasticPrecision("layer").units(wrapped, layers) == {layer: layer for layer in layers}


def test_probabilities_of_stochastic_precision():
    assert [StochasticPrecision().probability(t, 100) for t in (0, 10, 25, 50, 99)] == [0, 0.2, 0.5, 1, 1]
    steps = StochasticPrecision(schedule="step", rho=1.0)
    assert [steps.probability(t, 100) for t in (0, 24, 25, 60, 99)] == [0, 0, 0.25, 0.5, 0.75]
    for wrong in ({"unit": "net"}, {"schedule": "cosine"}, {"rho": 0.0}, {"rho": 1.5}):
        with pytest.raises(InputError, match="stochastic precision"):
            StochasticPrecision(**wrong)


UNITS = {f"{block}.{layer}": f"block{block}" for block in range(20) for layer in range(2)}


def excess(rule, steps, claimed):
    """How far the number of quantized blocks in a stage is from its mean under ``claimed``, and Hoeffding's limit.

    The blocks are independent numbers in [0, 1], n in all: P(|sum - mean| >= limit) <= 2 exp(-2 limit^2 / n) = 1e-6.
    """
    found = [rule.quantized_layers(t, steps, UNITS, seed=3) for t in range(steps)]
    assert all(len(layers) % 2 == 0 for layers in found)
    n = 20 * steps
    mean = 20 * sum(claimed(t) for t in range(steps))
    return abs(sum(len(layers) for layers in found) / 2 - mean), math.sqrt(n * math.log(2 / 1e-6) / 2)


def test_blocks_are_quantized_at_the_stated_rate():
    """False-alarm rate 1e-6 for each of two schedules; the control's rates differ by 1/6 on average, 8 limits."""
    steps = 400
    for rule in (StochasticPrecision(rho=1.0), StochasticPrecision(rho=1.0, schedule="step")):
        distance, limit = excess(rule, steps, lambda t, rule=rule: rule.probability(t, steps))
        assert distance < limit
        distance, _ = excess(rule, steps, lambda t, rule=rule: rule.probability(t, steps) ** 2)
        assert distance > 2 * limit


def test_the_choice_depends_on_seed_step_and_name_alone():
    rule = StochasticPrecision()
    chosen = [rule.quantized_layers(t, 100, UNITS, seed=1) for t in range(50)]
    some = {layer: unit for layer, unit in reversed(UNITS.items()) if unit in ("block3", "block7")}
    assert [rule.quantized_layers(t, 100, some, seed=1) for t in range(50)] == [c & set(some) for c in chosen]
    assert chosen != [rule.quantized_layers(t, 100, UNITS, seed=2) for t in range(50)]
    assert len({frozenset(c) for c in chosen[10:40]}) > 20
    assert chosen[0] == set()
    assert rule.quantized_layers(50, 100, UNITS, seed=1) == set(UNITS)


def test_sampled_layers_are_quantized_and_the_others_plain():
    net, x = small(), torch.randn(5, 6)
    rule = StochasticPrecision("layer")
    with fqtstats.quantized(net, OTHER) as handle:
        handle.full_precision = {"3"}
        units = rule.units(net, handle.layers)
        wanted = rule.quantized_layers(5, 20, units, seed=0)
        assert 0 < len(wanted) < 4
        with rule.sampled(handle, units, 5, 20, seed=0):
            assert handle.full_precision == set(handle.layers) - wanted
            got = net(x)
        assert handle.full_precision == {"3"}
    for name, layer in net.named_children():
        weight = quantizer("symmetric", bits=2)(layer.weight, fqtstats.stream()) if name in wanted else layer.weight
        x = torch.nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(got, x)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_every_recipe_has_runs_on_the_embedded_data():
    for name in RECIPES:
        for data in ("digits", "text"):
            assert f"{name}/{data}" in runs.RUNS
    for setting in runs.SETTINGS:
        assert setting.model in models.MODELS
        assert set(setting.recipes) <= set(RECIPES)
        assert setting.published == bool(setting.ours)


def test_published_runs_have_the_papers_numbers():
    run = runs.run("statquant-bhq/cifar10", 4)
    assert (run.model, run.data, run.epochs, run.batch_size) == ("preact_resnet56", "cifar10", 200, 128)
    assert run.recipe.optimizer == Optimizer("sgd", 0.1, 0.9, 1e-4)
    assert run.recipe.bits == 4
    run = runs.run("statquant-psq/imagenet-resnet50")
    assert (run.model, run.data, run.epochs, run.batch_size, run.image_size) == ("resnet50", "images", 90, 400, 224)
    assert run.recipe.optimizer == Optimizer("sgd", 0.4, 0.875, 3.05e-5)
    assert (run.recipe.label_smoothing, run.recipe.decay_norms) == (0.1, False)
    # Four of 90 epochs of warm-up: at the end of them the rate is full, halfway through half.
    assert [run.recipe.factor(0, epoch * 50 - 1, 90 * 50) for epoch in (2, 4)] == [0.5, 1]


def test_published_runs_of_other_recipes():
    recipes.get("1bit-agp-adam")
    run = runs.run("1bit-agp-adam/cifar100-vgg16")
    assert (run.epochs, run.batch_size, run.recipe.starts_from) == (60, 128, "full-precision")
    optimizer = run.recipe.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.linear_lr, optimizer.weight_decay) == ("adam", 1e-5, 1e-3, 1e-5)
    assert [(stage.name, stage.share) for stage in run.recipe.stages] == [("fine-tuning", 1.0)]
    run = runs.run("joint-2-4/cifar100")
    assert (run.model, run.epochs, run.recipe.optimizer.lr) == ("preact_resnet20", 200, 0.1)
    distillation = run.recipe.distillation
    assert (distillation.task, distillation.student, distillation.teacher, distillation.temperature) == (
        0.7,
        0.7,
        0.5,
        1,
    )
    widths = [policy.weight.bits for policy in (run.recipe.stages[0].policy, *distillation.others)]
    assert widths == [2, 4]


def test_unknown_runs():
    with pytest.raises(InputError, match=r"expected a run as recipe/setting, got 'nope'; known recipes: exact"):
        runs.run("nope")
    with pytest.raises(InputError, match=r"'lsq' has no run 'lsq/cifar10'; known: lsq/digits, lsq/text\Z"):
        runs.run("lsq/cifar10")


def test_layers_that_are_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.a(input=self.b(input=x))

    net = Keyword()
    assert roles(net, -torch.ones(2, 6)).order == ("b", "a")
    expected = net(torch.ones(2, 6))
    with fqtstats.quantized(net, Policy(weight=quantizer("symmetric", bits=8))):
        torch.testing.assert_close(net(torch.ones(2, 6)), expected, rtol=0.1, atol=0.1)
