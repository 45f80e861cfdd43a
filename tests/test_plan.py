"""``plan`` against brute force and against draws, and what it says where it cannot.

False alarms: a prediction may be off by 10 % and by SIGMAS standard errors of the two estimates. With 32 draws or more
that is at most 5e-9 (Student's t) for each of four comparisons.
"""

from __future__ import annotations

import glob
import itertools
import json
import math
import re
import shlex
from pathlib import Path

import layer_cases
import numpy as np
import pytest
import small
import torch
from commands import Run, run
from torch import nn

import fqtstats
from fqtstats import planning
from fqtstats.allocation import Allocation
from fqtstats.commands import experiments
from fqtstats.errors import InputError, RunDirectoryError
from fqtstats.models.preact_resnet import PreActBlock
from fqtstats.planning import _curve
from fqtstats.plans import Plan, assigned

__all__ = ["run"]  # the fixture

SIGMAS = 8.0
DRAWS = 32


def others(n=3, **options):
    return [small.batch(seed=10 + index, **options) for index in range(n)]


def rough(model=None, policy=None, **options):
    """A plan of few draws."""
    given = {"precision": 0.9, "draws": 0, **options}
    return fqtstats.plan(model or small.mlp(), small.batch(), small.loss, policy or small.psq(), **given)


# --- allocation -------------------------------------------------------------------------------------------------------


def curves(seed, convex):
    """Four quantizers of up to four widths each, their variances falling like those of real ones, or just anyhow."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(4):
        widths = sorted(rng.choice(np.arange(1, 9), rng.integers(1, 5), replace=False).tolist())
        scale = 10 ** rng.uniform(-3, 3)
        found.append({b: scale * (4.0**-b if convex else rng.random()) for b in widths})
    return found


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_allocation_against_brute_force(seed, convex):
    given = curves(seed, convex)
    choices = list(itertools.product(*given))
    variances = {c: math.fsum(curve[b] for curve, b in zip(given, c, strict=True)) for c in choices}
    allocation = Allocation(given)
    for total in range(34):
        known = [v for c, v in variances.items() if sum(c) <= total]
        chosen = allocation.within_bits(total)
        assert (chosen is None) == (not known)
        if chosen is not None:
            assert sum(chosen) <= total
            assert variances[chosen] == pytest.approx(min(known), rel=1e-12)
    for limit in np.geomspace(min(variances.values()) / 2, 2 * max(variances.values()), 20):
        known = [sum(c) for c, v in variances.items() if v <= limit]
        chosen = allocation.within_variance(limit)
        assert (chosen is None) == (not known)
        if chosen is not None:
            assert variances[chosen] <= limit * (1 + 1e-12)
            assert sum(chosen) == min(known)


def test_convex_curves_take_bit_after_bit_where_it_gains_most():
    scales = 10 ** np.random.default_rng(3).uniform(-3, 3, size=6)
    allocation = Allocation([{b: scale * 4.0**-b for b in range(1, 9)} for scale in scales])
    chosen = [1] * 6
    while sum(chosen) < 40:
        gains = [scale * 4.0**-b if b < 8 else 0 for scale, b in zip(scales, chosen, strict=True)]
        chosen[int(np.argmax(gains))] += 1
        assert list(allocation.within_bits(sum(chosen))) == chosen


def test_curves():
    assert _curve({2: 16.0, 3: 4.0, 4: 1.0}, 3, 8.0, (2, 4)) == {2: 32.0, 4: 2.0}
    # No noise with its own bits: only those are taken that have none, either.
    assert _curve({2: 16.0, 3: 0.0, 4: 0.0}, 4, 0.0, (2, 3, 4)) == {3: 0.0, 4: 0.0}
    assert _curve({2: 16.0, 3: 1.0, 4: 0.0}, 4, 0.0, (2, 3)) == {3: 0.0}
    assert _curve({1: 0.0, 2: 0.0}, 2, 0.0, (1, 2)) == {1: 0.0, 2: 0.0}


# --- predictions ------------------------------------------------------------------------------------------------------


def unequal():
    """Layers of very different widths, and of weights that let much or little noise through."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 24), nn.ReLU(), nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 10)
        )
        with torch.no_grad():
            model[2].weight.mul_(4)
            model[6].weight.mul_(4)
    return model, small.batch(48, 64)


def resnet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, bias=False), PreActBlock(6, 6, 1), PreActBlock(6, 10, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
        )  # fmt: skip
    return model, (layer_cases.gaussian(12, 2, 6, 6), torch.arange(12) % 4)


def policy(q):
    q = fqtstats.quantizer(q, bits=4)
    return fqtstats.Policy(**layer_cases.FORWARD, grad_input=q, grad_weight=q)


def misfit(row):
    """How far a prediction is off beyond 10 %, in standard errors."""
    error = math.hypot(row["predicted_error"], (row["measured_high"] - row["measured_low"]) / 2 / 1.96)
    return max(0.0, abs(row["predicted"] - row["measured"]) - 0.1 * row["measured"]) / error


@pytest.mark.parametrize(("case", "q"), [(unequal, "psq"), (resnet, "bhq")])
def test_predictions_hold(case, q):
    model, batch = case()
    found = fqtstats.plan(model, batch, small.loss, policy(q), mean_bits=4, precision=0.2, draws=DRAWS)
    assert found.comparison["policy"].tolist()[:2] == ["plan", "uniform"]
    for index in range(len(found.comparison)):
        row = found.comparison.iloc[index]
        assert misfit(row) < SIGMAS
        assert row["predicted_error"] < 0.05 * row["predicted"]
        assert row["mean_bits"] <= 4
        assert row["draws"] == DRAWS
    # Negative control: another policy's prediction is found out.
    assert misfit(found.total.to_dict() | {"predicted": 2 * found.total["predicted"]}) > SIGMAS
    assert found.table["variance"].sum() == pytest.approx(found.total["predicted"])
    assert found.table["share"].sum() == pytest.approx(1)
    assert found.mean_bits == found.table["bits"].mean() <= 4
    # The layers are unequal: dividing bits pays.
    assert found.table["bits"].nunique() > 1
    if case is unequal:
        assert found.other("uniform")["measured"] > 1.5 * found.total["measured"]


def test_a_budget_is_met_with_fewest_bits():
    found = rough(batches=others(), budget=1.05, precision=0.1)
    sampling = found.total["sampling_variance"]
    assert found.total["predicted"] <= 0.05 * sampling < found.other("uniform")["predicted"] * 16
    assert found.mean_bits <= found.other("uniform")["mean_bits"]
    assert found.other("uniform")["predicted"] <= 0.05 * sampling
    assert math.isnan(found.total["measured"])
    # A looser one takes fewer bits.
    assert rough(batches=others(), budget=1.5, precision=0.1).mean_bits < found.mean_bits


def test_a_budget_is_met_where_too_little_was_expected(monkeypatch):
    monkeypatch.setattr(planning, "_curve", lambda *given: {b: v * 0.8**b for b, v in _curve(*given).items()})
    found = rough(batches=others(1), budget=1.2)
    limit = 0.2 * found.total["sampling_variance"]
    assert found.total["predicted"] <= limit
    assert found.metadata["rounds"][0]["variance"] > limit
    # The last resort.
    monkeypatch.setattr(planning, "MOST_ROUNDS", 0)
    assert rough(batches=others(1), budget=1.2).table["bits"].eq(8).all()


def test_an_infeasible_budget_says_what_is_feasible():
    with pytest.raises(InputError, match="cannot be met") as error:
        rough(batches=others(), budget=1.000001, bits=(2, 3))
    assert "\n" not in str(error.value)
    reachable = float(re.search(r"smallest reachable budget is ([\d.]+)$", str(error.value))[1])
    found = rough(batches=others(), budget=reachable, bits=(2, 3))
    assert found.table["bits"].eq(3).all()
    with pytest.raises(InputError, match=r"mean_bits 1.5 cannot be reached with the bits allowed; at least 2.0 can"):
        rough(mean_bits=1.5, bits=(2, 3))


# --- policies ---------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(12, 12) for name in ("a*", "[ab]", "ab", "?b")})
        layer_cases.filled(self)

    def forward(self, x):
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x[:, :10]


def test_names_with_glob_characters():
    found = rough(Named(), mean_bits=3.5)
    for row in found.table.itertuples():
        assert getattr(found.policy.for_layer(row.layer), row.site).bits == row.bits
    assert set(found.policy.overrides) == {glob.escape(f"layers.{name}") for name in ("a*", "[ab]", "ab", "?b")}
    measured = fqtstats.profile(Named(), small.batch(), small.loss, found.policy, 0.9)
    assert measured.sources["bits"].tolist() == found.table["bits"].tolist()
    assert measured.total["variance"] == found.total["predicted"]


def test_overrides_stay():
    given = fqtstats.Policy(
        grad_input=fqtstats.quantizer("psq", bits=4),
        grad_weight=fqtstats.quantizer("psq", bits=4),
        overrides={"[02]": fqtstats.Policy(grad_weight=fqtstats.quantizer("ptq", bits=6, grid="affine"), name="own")},
    )
    planned = assigned(given, {("2", "grad_weight"): 3, ("4", "grad_input"): 5})
    assert list(planned.overrides) == ["2", "4", "[02]"]
    assert planned.for_layer("0") == given.for_layer("0")
    assert planned.for_layer("2").grad_weight == fqtstats.quantizer("ptq", bits=3, grid="affine")
    assert planned.for_layer("4").grad_input == fqtstats.quantizer("psq", bits=5)
    assert planned.for_layer("4").grad_weight == given.grad_weight
    found = rough(policy=given, mean_bits=5)
    names: dict[str, fqtstats.Policy] = {}
    exec(found.code, names)
    assert names["policy"] == found.policy
    assert found.table["quantizer"].tolist() == ["ptq", "ptq", "psq", "psq"]


_PSQ = fqtstats.quantizer("psq", bits=3)


def custom(x, stream):
    return _PSQ(x, stream)


def test_a_callable_stays_as_it_is(tmp_path):
    given = fqtstats.Policy(grad_weight=custom, grad_input=fqtstats.quantizer("psq", bits=4))
    found = rough(policy=given, mean_bits=3)
    assert found.table["fixed"].tolist() == [True, True, False, True, False]
    assert found.table["bits"].isna().tolist() == [True, True, False, True, False]
    assert found.mean_bits == 3
    assert found.policy.for_layer("2").grad_weight is custom
    found.save(tmp_path / "r")
    loaded = fqtstats.load_plan(tmp_path / "r")
    with pytest.raises(InputError, match=r"use plan.apply\(policy\)"):
        _ = loaded.policy
    assert loaded.apply(given) == found.policy
    names = {"custom": custom}
    exec((tmp_path / "r" / "policy.py").read_text(), names)
    assert names["policy"] == found.policy
    assert "# custom: a quantizer of your own" in found.code
    with pytest.raises(InputError, match="whose bits can be chosen") as error:
        rough(policy=fqtstats.Policy(grad_weight=custom), mean_bits=3)
    assert "\n" not in str(error.value)


def test_saved_and_loaded(tmp_path):
    calls = []
    found = rough(mean_bits=4, batches=others(1), progress=lambda *told: calls.append(told))
    assert {what for what, _, _ in calls} >= {"profiling policy 1", "profiling policy 2"}
    found.save(tmp_path / "r")
    loaded = fqtstats.load_plan(tmp_path / "r")
    assert loaded.files() == found.files()
    assert (loaded.metadata, loaded.policy) == (found.metadata, found.policy)
    assert (tmp_path / "r" / "figures" / "bits.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(RunDirectoryError, match=r"run there is a plan; read it with fqtstats.load_plan"):
        fqtstats.load_profile(tmp_path / "r")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "either budget or mean_bits, got neither"),
        ({"budget": 1.1, "mean_bits": 4}, "either budget or mean_bits, got both"),
        ({"budget": 1.1}, "needs further minibatches; give batches"),
        ({"budget": 1.0, "batches": [0]}, "above 1"),
        ({"mean_bits": math.nan}, "mean_bits must be a number"),
        ({"mean_bits": 4, "bits": (0, 4)}, "integers from 1 to 8"),
        ({"mean_bits": 4, "bits": 4}, "integers from 1 to 8"),
        ({"mean_bits": 4, "draws": 1}, "draws must be an integer of at least 2"),
        ({"mean_bits": 4, "skip": "*"}, "expected a model with"),
        ({"mean_bits": 4, "policy": fqtstats.policies.get("statquant-qat")}, "gradient quantizers"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(InputError, match=message) as error:
        rough(**change)
    assert "\n" not in str(error.value)


# --- the command ------------------------------------------------------------------------------------------------------

ROUGH = ("plan", "--model", "mine:slow", "--precision", "0.9", "--batch-size", "16", "--draws", "4")


@pytest.fixture
def undrawn(monkeypatch):
    """The figure takes longer than all the rest."""
    monkeypatch.setattr(Plan, "figures", lambda plan: {})


def test_the_command(run: Run) -> None:
    done = run(*ROUGH, "--batches", "2", "--mean-bits", "4")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].strip() == "plan for bhq, pcq: mean of 4 bits"
    assert [line.split()[0] for line in lines[3:5]] == ["1", "3"]
    assert any(line.startswith("4 bits everywhere") for line in lines)
    assert any(re.match(r"the plan has [\d.]+ times less variance than 4 bits everywhere", line) for line in lines)
    files = "policy.py, plan.parquet, comparison.parquet, the same as .csv, run.json, figures/bits.png"
    assert " ".join(done.out.rpartition("saved in")[2].split()) == f"runs/plan-bhq-4-bits: {files}"
    assert max(map(len, lines)) <= 80
    found = fqtstats.load_plan("runs/plan-bhq-4-bits")
    assert found.policy.for_layer("3").grad_input.name == "bhq"
    assert found.metadata["arguments"]["mean_bits"] == 4


def test_a_budget_as_json(run: Run, undrawn: None) -> None:
    done = run(*ROUGH, "--batches", "2", "--budget", "1.2", "--bits", "2,4,6,8", "--grad-weight", "psq", "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    assert {row["bits"] for row in told["table"]} <= {2, 4, 6, 8}
    assert told["comparison"][0]["predicted"] <= 0.2 * told["comparison"][0]["sampling_variance"]
    assert told["metadata"]["target"] == {"budget": 1.2}
    assert {row["quantizer"] for row in told["table"] if row["site"] == "grad_weight"} == {"psq"}


def test_interrupted_and_resumed(run: Run, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*ROUGH, "--batches", "0", "--mean-bits", "3")
    bar = experiments.MeasuringBar
    seen = []

    class Interrupted(bar):
        def __call__(self, done, total):
            seen.append(done)
            if len(seen) > 20:
                raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "MeasuringBar", Interrupted)
    done = run(*words)
    assert (done.status, done.out) == (130, "")
    assert "what was measured is in runs/plan-bhq-3-bits, continue with: " in done.err
    _, *again = shlex.split(done.err.strip().partition(", continue with: ")[2])
    monkeypatch.setattr(experiments, "MeasuringBar", bar)
    assert run(*words, "--out", "whole").status == 0
    assert run(*again).status == 0
    assert fqtstats.load_plan("whole").files() == fqtstats.load_plan("runs/plan-bhq-3-bits").files()
    monkeypatch.setattr(planning, "plan", None)  # a finished one is shown, not made again
    assert run(*again).status == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "either --budget or --mean-bits, got neither"),
        (["--budget", "1.1", "--mean-bits", "4"], "either --budget or --mean-bits, got both"),
        (["--budget", "0.9"], "--budget must be above 1"),
        (["--budget", "1.1", "--batches", "0"], "--batches 1 or more"),
        (["--mean-bits", "9"], "--mean-bits must be from 1 to 8, got 9"),
        (["--mean-bits", "4", "--bits", "9"], "integers from 1 to 8, got '9'"),
        (["--mean-bits", "4", "--quantizer", "nope"], "unknown gradient quantizer 'nope'"),
        (["--mean-bits", "4", "--grad-weight", "minmax"], "expected a gradient quantizer"),
        (["--mean-bits", "4", "--draws", "1"], "--draws must be at least 2, or 0"),
        (["--mean-bits", "4", "--skip", "*"], "expected a model with"),
        (["--mean-bits", "1.5", "--bits", "2,3"], "mean_bits 1.5 cannot be reached"),
        (["--budget", "1.0001", "--bits", "2"], "the smallest reachable budget is "),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_usage(run: Run, words: list[str], told: str) -> None:
    done = run(*ROUGH, "--batches", "2", *words) if "--batches" not in words else run(*ROUGH, *words)
    assert (done.status, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert told in done.err
    assert not Path("runs").exists()
