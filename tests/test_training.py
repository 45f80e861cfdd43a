"""``train`` against a plain loop, and what must not change its bits: measuring on the way, and being continued."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import UninitializedParameter, is_lazy

import fqtstats
from fqtstats import Policy, models, quantizer
from fqtstats.data import data
from fqtstats.data.base import InMemory
from fqtstats.determinism import single_thread
from fqtstats.errors import InputError, TrainingDiverged
from fqtstats.hashing import tensor_digest
from fqtstats.training import recipes, steps
from fqtstats.training.distillation import Distillation
from fqtstats.training.loop import train
from fqtstats.training.recipes import Optimizer, Recipe, Stage
from fqtstats.training.stochastic_precision import StochasticPrecision
from fqtstats.trainings import TIMES

BATCH, STEPS = 16, 6


@pytest.fixture(scope="module")
def digits():
    source = data("digits")
    return replace(
        source,
        inputs={split: t[: BATCH * STEPS] for split, t in source.inputs.items()},
        targets={split: t[: BATCH * STEPS] for split, t in source.targets.items()},
    )


def mlp(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
        )


def cnn(seed=0):
    """With everything that a look at the gradient might change: statistics of batches, and dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 10)
        )


def qat():
    return Policy(activation=quantizer("minmax", bits=4), weight=quantizer("zero_on_grid", bits=4), name="qat")


def bhq():
    return replace(qat(), grad_input=quantizer("bhq", bits=3), grad_weight=quantizer("pcq", bits=8), name="bhq")


def one(policy, **options):
    return Recipe("own", "", None, (Stage("training", policy),), **options)


STAGES = Recipe(
    "stages",
    "",
    None,
    (
        Stage("full", Policy(), 0.3),
        Stage("qat", qat(), 0.3, lr_scale=0.5, schedule="triangle", stochastic=StochasticPrecision("layer")),
        Stage("bhq", bhq(), 0.4, schedule="constant"),
    ),
)
JOINT = one(bhq(), distillation=Distillation(others=(qat(),)), label_smoothing=0.1)
LSQ = Policy(activation=quantizer("lsq", bits=4, on="activation"), weight=quantizer("lsq", bits=4), name="lsq")
RECIPES = {
    "lsq": Recipe("lsq", "", None, (Stage("full", Policy(), 0.25), Stage("lsq", LSQ, 0.75)), decay_norms=False),
    "sgd": one(bhq()),
    "adam": one(bhq(), optimizer=Optimizer("adam", lr=1e-3)),
    "stages": STAGES,
    "joint": JOINT,
}


def go(source, recipe, model=None, **options):
    return train(mlp() if model is None else model, source, recipe, **{"epochs": 3, "batch_size": BATCH, **options})


def assert_same(one, two, without=()):
    """The same run, whatever the time it took."""
    assert one.metadata["hashes"] == two.metadata["hashes"]
    left_out = [*TIMES, *without]
    pd.testing.assert_frame_equal(
        one.epochs.drop(columns=left_out), two.epochs.drop(columns=left_out), check_exact=True
    )


# --- against a plain loop ---------------------------------------------------------------------------------------------


def plain_loop(model, source, policy, optimizer, epochs, smoothing=0.0, warmup=0):
    """What a user would write; ``warmup`` in steps, then half a cosine."""
    steps = epochs * STEPS
    with single_thread():
        handle = None if policy is None else fqtstats.prepare_(model, policy, seed=0)
        first = [group["lr"] for group in optimizer.param_groups]
        for epoch in range(epochs):
            for k, (x, y) in enumerate(source.batches(BATCH, seed=0, epoch=epoch)):
                step = epoch * STEPS + k
                factor = (
                    (step + 1) / warmup
                    if step < warmup
                    else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
                )
                for group, lr in zip(optimizer.param_groups, first, strict=True):
                    group["lr"] = lr * factor
                if handle is not None:
                    handle.step = step
                optimizer.zero_grad()
                F.cross_entropy(model(x), y, label_smoothing=smoothing).backward()
                optimizer.step()
        if handle is not None:
            handle.remove()
    return model


@pytest.mark.parametrize("policy", [None, bhq()], ids=["full", "bhq"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_it_does_what_a_plain_loop_does(digits, policy, name):
    options = {"lr": 0.1, "weight_decay": 1e-3} if name == "sgd" else {"lr": 1e-2, "weight_decay": 1e-3}
    recipe = one(policy or Policy(), optimizer=Optimizer(name, **options))
    model, other = mlp(), mlp()
    go(digits, recipe, model)
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, momentum=0.9, **options),
        "adam": lambda p: torch.optim.Adam(p, **options),
    }
    plain_loop(other, digits, policy, makers[name](other.parameters()), 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(hasattr(module, "fqt_state") for module in model.modules())


def test_smoothing_warm_up_and_norms_without_decay(digits):
    recipe = one(Policy(), optimizer=Optimizer(weight_decay=0.1), label_smoothing=0.1, warmup=1 / 3, decay_norms=False)
    model, other = cnn(), cnn()
    model[3], other[3] = nn.Identity(), nn.Identity()
    go(digits, recipe, model)
    decayed = [p for p in other.parameters() if p.dim() > 1]
    others = [p for p in other.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    plain_loop(other, digits, None, torch.optim.SGD(groups, lr=0.1, momentum=0.9), 3, smoothing=0.1, warmup=STEPS)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_every_step_moves_the_weights(digits):
    warm = one(Policy(), warmup=0.5)
    triangle = Recipe("own", "", None, (Stage("training", Policy(), schedule="triangle"),))
    for recipe in (warm, triangle):
        model = mlp()
        seen = [tensor_digest(model.state_dict())]
        go(digits, recipe, model, progress=lambda *_, m=model, s=seen: s.append(tensor_digest(m.state_dict())))
        assert len(set(seen)) == 1 + 3 * STEPS


def test_the_table(digits):
    found = go(digits, one(bhq()), backend="native")
    assert list(found.epochs["epoch"]) == [1, 2, 3]
    assert list(found.epochs["steps"]) == [STEPS, 2 * STEPS, 3 * STEPS]
    first, last = found.epochs.iloc[0], found.epochs.iloc[-1]
    assert last["loss"] < first["loss"] < 2.5
    assert (found.epochs["kept_bytes"] > 0).all()
    model = mlp()
    loaded = fqtstats.prepare_(model, bhq())
    model.load_state_dict(found.weights["model"])
    model.eval()
    with torch.no_grad():
        x, y = next(digits.batches(256, seed=0, split="test"))
        z = model(x)
    loaded.remove()
    assert last["test_loss"] == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-4)
    assert last["test_accuracy"] == float((z.argmax(-1) == y).double().mean())
    assert tensor_digest(found.weights["model"]) == found.metadata["hashes"]["model"]


def test_what_is_kept_with_stochastic_precision_is_the_most_of_the_epoch(digits):
    stage = Stage("training", bhq(), stochastic=StochasticPrecision("layer"))
    found = go(digits, Recipe("own", "", None, (stage,)))
    most = go(digits, one(bhq()), epochs=1).epochs["kept_bytes"][0]
    # Nothing is quantized in the very first step, and everything from the half of the run on.
    assert 0 < found.epochs["kept_bytes"][0] <= most
    assert found.epochs["kept_bytes"][2] == most


# --- the variance on the way ------------------------------------------------------------------------------------------


def test_measuring_on_the_way_changes_nothing(digits):
    runs = {every: go(digits, one(bhq()), cnn(), variance_every=every, variance_draws=2) for every in (0, 2, 6)}
    for every in (2, 6):
        assert_same(runs[0], runs[every], without=("variance", "snr"))
        assert sorted(set(runs[every].variance["step"])) == list(range(0, 3 * STEPS, every))
        assert (runs[every].epochs["overhead"] > 0).all()
    assert runs[0].variance.empty
    # What is measured does not depend on what was measured before, either.
    rows = runs[2].variance
    pd.testing.assert_frame_equal(rows[rows["step"] % 6 == 0].reset_index(drop=True), runs[6].variance)


def test_the_variance_is_that_of_the_step(digits):
    """At the first step: the gradient of QAT, and a variance whose interval meets that of other draws.

    False alarm: both intervals, widened to four times their half-widths, miss each other with less than 1e-6.
    """
    found = go(digits, one(bhq()), epochs=1, variance_every=100, variance_draws=16)
    first = found.totals.iloc[0]
    batch = next(digits.batches(BATCH, seed=0))
    result = fqtstats.measure(mlp(), batch, models.loss, bhq(), draws=16, seed=5)
    total = result.total()
    assert first["grad_norm_sq"] == pytest.approx(total["grad_norm_sq"], rel=1e-6)
    apart = abs(first["variance"] - total["variance"])
    assert apart < 4 * (first["variance_high"] - first["variance_low"] + total["variance_high"] - total["variance_low"])
    # A variance of other bits is told apart, or the test above would show nothing.
    other = fqtstats.measure(
        mlp(), batch, fqtstats.models.loss, replace(bhq(), grad_input=quantizer("bhq", bits=2)), 64
    )
    assert abs(first["variance"] - other.total()["variance"]) > apart


# --- continuing -------------------------------------------------------------------------------------------------------


class Memory:
    """A store that keeps every state it is offered."""

    def __init__(self):
        self.arrays = None

    def load(self):
        return None if self.arrays is None else dict(self.arrays)

    def save(self, state, *, force=False):
        self.arrays = state()


@pytest.mark.parametrize(("name", "backend"), [*((name, "simulated") for name in RECIPES), ("sgd", "native")])
def test_continued_runs_end_with_the_same_bits(digits, name, backend):
    every = 0 if name == "lsq" else 5  # whose gradients are exact
    recipe, options = RECIPES[name], {"epochs": 4, "variance_every": every, "variance_draws": 2, "backend": backend}
    whole = go(digits, recipe, cnn(), **options)
    store, last = Memory(), 0
    # In the first epoch, right at the end of one, and in others.
    for stop in (2, STEPS, 2 * STEPS + 1, 3 * STEPS + 4):

        def progress(epoch, epochs, step, steps, loss, stop=stop):
            if (epoch - 1) * STEPS + step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            go(digits, recipe, cnn(), store=store, progress=progress, **options)
        assert stop > last
        last = stop
    model = cnn()
    done = go(digits, recipe, model, store=store, **options)
    assert done.metadata["resumed_at"] == last
    assert_same(whole, done)
    pd.testing.assert_frame_equal(whole.variance, done.variance, check_exact=True)


def test_a_checkpoint_of_another_run_is_refused(digits):
    store = Memory()
    go(digits, one(bhq()), store=store, epochs=1)
    for recipe, model, options in (
        (one(qat()), mlp(), {}),
        (one(bhq()), mlp(seed=1), {}),
        (one(bhq()), cnn(), {}),
        (one(bhq()), mlp(), {"seed": 1}),
        (one(bhq()), mlp(), {"epochs": 2}),
    ):
        with pytest.raises(InputError, match="cannot resume: the saved checkpoint is of another run"):
            go(digits, recipe, model, store=store, **{"epochs": 1, **options})
    go(digits, one(bhq()), store=store, epochs=1)


class Learned(nn.Module):
    """Clips at what it has seen first, and counts its calls."""

    claim = "biased"

    def __init__(self, share=1.0):
        super().__init__()
        self.share = share
        self.most = UninitializedParameter(requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.tensor(math.nan))

    def forward(self, x, stream):
        if is_lazy(self.most):
            self.most.materialize(())
            self.most.fill_(self.share * x.abs().max())
        self.calls += 1
        return x.clamp(-self.most, self.most)

    def update(self):
        self.steps = torch.nan_to_num(self.steps) + 1

    def extra_repr(self):
        return f"share={self.share}"


def test_what_quantizers_learn_is_kept(digits):
    same = Policy(activation=Learned())
    others = replace(same, activation=Learned(0.5), grad_input=quantizer("psq", bits=4))
    recipe = Recipe("learned", "", None, (Stage("a", same, 0.25), Stage("b", same, 0.5), Stage("c", others, 0.25)))
    whole = go(digits, recipe, epochs=4)
    calls = {name: int(t) for name, t in whole.weights["model"].items() if name.endswith("calls")}
    assert set(calls) == {f"{layer}.fqt_activation.calls" for layer in (1, 3, 5)}
    # A pass over the data and one over the test data; the third stage's quantizers are others.
    assert set(calls.values()) == {STEPS + 1}
    assert {int(t) for name, t in whole.weights["model"].items() if name.endswith("steps")} == {STEPS}
    two_stages = replace(recipe, stages=(Stage("a", same, 0.5), Stage("b", same, 0.5)))
    kept = go(digits, two_stages, epochs=2)
    assert int(kept.weights["model"]["1.fqt_activation.calls"]) == 2 * (STEPS + 1)
    store = Memory()

    def progress(epoch, epochs, step, steps, loss):
        if (epoch, step) == (3, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(digits, recipe, epochs=4, store=store, progress=progress)
    assert_same(whole, go(digits, recipe, epochs=4, store=store))


def test_joint_networks(digits):
    model, teacher = mlp(), mlp(seed=3)
    before = tensor_digest(teacher.state_dict())
    found = go(digits, JOINT, model, teacher=teacher)
    assert found.networks == ["model", "student-2", "teacher"]
    assert set(found.weights) == {"model", "student-2", "teacher"}
    assert tensor_digest(teacher.state_dict()) != before
    assert tensor_digest(model.state_dict()) == found.metadata["hashes"]["model"]
    ends = found.epochs[found.epochs["epoch"] == 3].set_index("network")["loss"]
    starts = found.epochs[found.epochs["epoch"] == 1].set_index("network")["loss"]
    assert (ends < starts).all()


def test_the_layers_that_every_student_skips_have_the_names_of_the_model(digits):
    left = {}
    for skip in (None, "1", iter(["1"]), lambda name, module: name == "1"):
        found = go(digits, JOINT, mlp(), skip=skip)
        left[skip] = [row["layer"] for row in found.metadata["unquantized"] if row["reason"] == "skipped on request"]
    assert list(left.values()) == [[], *([["students.0.1", "students.1.1"]] * 3)]


# --- divergence -------------------------------------------------------------------------------------------------------


class Planted(nn.Linear):
    """A layer that goes wrong, one way or the other, from a call on."""

    def __init__(self, how, after):
        super().__init__(16, 16)
        self.how, self.after, self.calls = how, after, 0

    def forward(self, x):
        self.calls += self.training
        y = super().forward(x)
        if self.calls <= self.after:
            return y
        if self.how == "weight":
            with torch.no_grad():
                self.weight[0, 0] = math.inf
            return super().forward(x)
        if self.how == "gradient":
            out = y * 1.0
            if out.requires_grad:
                out.register_hook(lambda g: g * math.nan)
            return out
        return y * math.inf


@pytest.mark.parametrize(
    ("how", "tensor"), [("activation", "activation"), ("gradient", "gradient"), ("weight", "weight")]
)
def test_divergence_is_diagnosed(digits, how, tensor):
    good = {}

    def model():
        made = mlp()
        made[3] = Planted(how, after=STEPS + 3)
        with torch.no_grad():
            for p in made[3].parameters():
                p.fill_(0.05)
        return made

    own = model()

    def report(table, row):
        good.update({name: t.clone() for name, t in own.state_dict().items()})

    with pytest.raises(TrainingDiverged) as caught:
        go(digits, one(bhq()), own, report=report)
    found = caught.value.diagnosis
    assert found["first"]["layer"] == "3"
    assert found["first"]["tensor"] == tensor
    assert found["first"]["nonfinite"] > 0
    assert found["step"] == STEPS + 3
    assert found["last_good_step"] == STEPS
    assert "step 4 of 6" in str(caught.value)
    assert "layer '3'" in str(caught.value)
    part = caught.value.partial_result
    assert part.diverged
    assert list(part.epochs["epoch"]) == [1]
    # The model has the weights of the last good checkpoint, and so has the result.
    assert tensor_digest(good) == tensor_digest(own.state_dict()) == part.metadata["hashes"]["model"]
    assert not any(hasattr(module, "fqt_state") for module in own.modules())
    # Without what was planted, nothing is found.
    assert not go(digits, one(bhq())).diverged


def test_finite_weights_that_no_step_can_be_made_from_are_not_good(digits):
    own, initial = mlp(), tensor_digest(mlp().state_dict())

    def report(table, row):
        with torch.no_grad():
            for p in own.parameters():
                p.mul_(1e30)

    with pytest.raises(TrainingDiverged) as caught:
        go(digits, one(Policy()), own, report=report)
    assert (caught.value.diagnosis["step"], caught.value.diagnosis["last_good_step"]) == (STEPS, 0)
    assert tensor_digest(own.state_dict()) == initial


def test_what_a_divergence_falls_back_to_depends_on_steps_alone(digits):
    def planted(after):
        model = mlp()
        model[3] = Planted("activation", after)
        with torch.no_grad():
            for p in model[3].parameters():
                p.fill_(0.05)
        return model

    def diverged(after, **options):
        model = planted(after)
        with pytest.raises(TrainingDiverged) as caught:
            go(digits, one(bhq()), model, **options)
        found = caught.value.diagnosis
        return found["step"], found["last_good_step"], tensor_digest(model.state_dict())

    whole = diverged(STEPS + 3)
    assert whole[:2] == (STEPS + 3, STEPS)
    assert diverged(STEPS + 3, store=Memory()) == whole  # it keeps every step
    for stop in (STEPS, STEPS + 2):
        store = Memory()

        def progress(epoch, epochs, step, steps, loss, stop=stop):
            if (epoch - 1) * STEPS + step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            go(digits, one(bhq()), planted(STEPS + 3), store=store, progress=progress)
        assert diverged(STEPS + 3 - stop, store=store) == whole


def test_a_loss_that_stays_far_off_is_a_divergence(digits, monkeypatch):
    monkeypatch.setattr(steps, "LONG", 4)
    go(digits, one(bhq()))
    monkeypatch.setattr(steps, "FAR", 0.01)
    with pytest.raises(TrainingDiverged, match="for 4 steps; the largest number is") as caught:
        go(digits, one(bhq()))
    assert caught.value.diagnosis["first"] is None
    assert caught.value.diagnosis["step"] == 3


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (one(bhq()), {"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        (one(bhq()), {"batch_size": 0}, "batch_size must be"),
        (one(bhq()), {"variance_draws": 1}, "variance_draws must be"),
        (one(qat()), {"variance_every": 5}, "recipe 'own' quantizes no gradient, so there is no variance"),
        (one(bhq()), {"seed": 1.5}, "seed must be an integer"),
        (one(bhq()), {"backend": "cuda"}, "unknown backend"),
        (one(bhq()), {"skip": "nothing"}, "matches no layer"),
        (one(bhq()), {"teacher": mlp()}, "has no teacher"),
        (STAGES, {"epochs": 2}, "has 3 stages"),
        (replace(one(bhq()), starts_from="full-precision"), {}, "full-precision checkpoint"),
        (one(replace(qat(), overrides={"9": bhq()})), {}, "matches no layer"),
    ],
)
def test_bad_input(digits, recipe, options, message):
    with pytest.raises(InputError, match=message):
        go(digits, recipe, **options)


def test_weights_and_test_data_that_are_not_finite(digits):
    model = mlp()
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    with pytest.raises(InputError, match=r"before the first step, '1\.weight' has NaN or Inf"):
        go(digits, one(Policy()), model)
    inputs = {"train": digits.inputs["train"], "test": digits.inputs["test"] * math.inf}
    with pytest.raises(TrainingDiverged, match="epoch 1, step 6 of 6: on the test data: layer '1', activation"):
        go(replace(digits, inputs=inputs), one(bhq()))
    with pytest.raises(TrainingDiverged, match="epoch 1, step 6 of 6: on the test data: the loss became nan"):
        go(replace(digits, inputs=inputs), one(Policy()))


def test_what_is_no_recipe_and_no_data(digits):
    with pytest.raises(InputError, match="expected a recipe, got 'exact'"):
        go(digits, "exact")
    with pytest.raises(InputError, match=r"expected a fqtstats\.data\.Data, got a list"):
        go([1], one(bhq()))


def test_data_without_classes():
    x = torch.zeros(8, 4)
    source = InMemory("mine", "features", 0, {"train": x}, {"train": x[:, 0]})
    with pytest.raises(InputError, match="needs classes"):
        go(source, one(bhq()))


def test_what_does_not_learn_is_said():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x):
            return self.layer(x.flatten(1)).detach()

    source = data("digits")
    with pytest.raises(InputError, match="does not depend on any trainable parameter"):
        go(source, one(Policy()), Detached())


def test_global_state_is_left_alone(digits):
    state, count = torch.get_rng_state(), torch.get_num_threads()
    model = cnn().eval()
    found = go(digits, recipes.get("exact"), model, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == count
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert np.isnan(found.epochs["variance"]).all()
