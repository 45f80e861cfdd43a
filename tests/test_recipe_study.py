"""The study of all recipes in analysis/recipes.py: its verdicts on made-up losses, runs that diverge, what is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from fqtstats.errors import InputError, TrainingDiverged


@pytest.fixture(scope="module")
def study(analysis) -> ModuleType:
    return analysis("recipes")


# --- verdicts ---------------------------------------------------------------------------------------------------------

RECIPES, SEEDS = 24, 3


def made_up(
    shift: dict[str, float] | None = None, *, backends: float = 0.03, common: float = 0.0, seed: int = 0
) -> pd.DataFrame:
    """Runs whose log losses have a standard deviation of 0.2 over the seeds and ``backends`` between the backends.

    ``common`` is that of a difference of the backends that all recipes of a seed have.
    """
    generator, rows = np.random.default_rng(seed), []
    together = common * generator.normal(size=SEEDS)
    for index in range(RECIPES):
        recipe = f"r{index}"
        for own in range(SEEDS):
            middle = math.log(0.02 * (1 + index)) + 0.2 * generator.normal()
            apart = backends * generator.normal() + together[own]
            for backend, sign in (("native", 0.5), ("simulated", -0.5)):
                loss = math.exp(middle + sign * (apart + (shift or {}).get(recipe, 0.0)))
                rows.append({"recipe": recipe, "backend": backend, "seed": own, "loss": loss, "diverged": ""})
    kept = {"test_loss": 0.1, "test_accuracy": 0.9, "kept_bytes": 1.0, "kept_float32_bytes": 4.0}
    about = {"data": "digits", "model": "small", "epochs": 1, "guessing": math.log(10), "accuracy": 0.9, "seconds": 1.0}
    return pd.DataFrame(rows).assign(**kept, **about)


def verdicts(study: ModuleType, rows: pd.DataFrame) -> pd.Series:
    return study.summary(rows).set_index("recipe")["verdict"]


def test_backends_that_differ_less_than_seeds_are_equal_and_others_differ(study: ModuleType) -> None:
    """Fixed seeds: nothing to fail by chance."""
    assert (verdicts(study, made_up()) == "equal").all()
    # A factor of 3 is far above the margin, exp(sqrt(2) 0.2) = 1.33.
    found = verdicts(study, made_up({"r3": math.log(3.0), "r5": -math.log(3.0)}))
    assert found[["r3", "r5"]].tolist() == ["differs", "differs"]
    assert (found.drop(["r3", "r5"]) == "equal").all()


def test_a_noisy_comparison_does_not_pass(study: ModuleType) -> None:
    """What the seeds do is 0.2; with backends that part by 1, three seeds cannot tell."""
    rows = made_up(backends=1.0)
    table = study.summary(rows)
    assert ((table["ratio_low"] < 1) & (table["ratio_high"] > 1)).mean() > 0.8  # "contains no difference" says nothing
    assert not (table["verdict"] == "equal").any()


def test_a_shift_that_seeds_seldom_make_is_not_equal(study: ModuleType) -> None:
    """1.5 standard deviations over the seeds, in 20 recipes, with backends that differ little or as two seeds do."""
    for backends in (0.03, 0.2 * math.sqrt(2)):
        found = verdicts(study, made_up({f"r{index}": 0.3 for index in range(20)}, backends=backends))
        assert not (found[[f"r{index}" for index in range(20)]] == "equal").any()


def test_verdicts_have_one_family(study: ModuleType) -> None:
    """Both p-values are those of the recipe alone times the number of recipes."""
    table = study.summary(made_up(backends=0.2))
    pooled = math.sqrt((table["sd_backends"] ** 2).mean() / SEEDS)  # as all variances are alike
    alone = 2 * scipy.stats.t.sf(np.log(table["ratio"]).abs() / pooled, RECIPES * (SEEDS - 1))
    assert np.allclose(table["p_differs"], np.minimum(1, RECIPES * alone))
    over = (np.log(table["margin"]) - np.log(table["ratio"]).abs()) / pooled
    assert np.allclose(table["p_equal"], np.minimum(1, RECIPES * scipy.stats.t.sf(over, RECIPES * (SEEDS - 1))))


def test_backends_without_spread_over_the_seeds_are_judged(study: ModuleType) -> None:
    """A difference that is the same for all seeds, in most of the recipes and in all of them."""
    rows = made_up()
    for count in (RECIPES // 2 + 1, RECIPES):
        chosen = rows["recipe"].isin([f"r{index}" for index in range(count)])
        rows.loc[chosen, "loss"] = np.where(rows["backend"] == "native", 8.0, 1.0)[chosen]
        table = study.summary(rows)
        assert (table["sd_backends"] == 0).sum() == count
        assert (table["verdict"][:count] == "differs").all()
        assert np.allclose(table["ratio"][:count], 8)


def overall(study: ModuleType, rows: pd.DataFrame) -> dict:
    return study.overall(rows, study.summary(rows))


def test_a_small_difference_of_all_recipes_shows_in_their_mean(study: ModuleType) -> None:
    shifted = made_up({f"r{index}": 0.15 for index in range(RECIPES)}, backends=0.1)
    found = overall(study, shifted)
    assert 1 < found["ratio_low"] < math.exp(0.15) < found["ratio_high"]
    assert (found["recipes"], found["seeds"], found["verdict"]) == (RECIPES, SEEDS, "equal")
    plain = overall(study, made_up(backends=0.1))
    assert plain["ratio_low"] < 1 < plain["ratio_high"]
    # Standard deviations of the difference of two backends, and of two seeds: a third.
    assert 0.1 / (0.2 * math.sqrt(2)) == pytest.approx(plain["share"], rel=0.3)
    assert overall(study, made_up({f"r{index}": 0.9 for index in range(RECIPES)}))["verdict"] == "differs"


def test_the_interval_of_all_recipes_has_the_seeds_for_units(study: ModuleType) -> None:
    """What all recipes of a seed have in common does not average out over the recipes."""
    rows = made_up(common=0.2)
    found = overall(study, rows)
    logs = np.log(rows.pivot(index=["recipe", "seed"], columns="backend", values="loss"))
    of_seed = (logs["native"] - logs["simulated"]).groupby("seed").mean()
    expected = scipy.stats.ttest_1samp(of_seed, 0.0)
    assert found["p_differs"] == pytest.approx(expected.pvalue)
    low, high = np.exp(expected.confidence_interval())
    assert (found["ratio_low"], found["ratio_high"]) == (pytest.approx(low), pytest.approx(high))
    # A recipe that lacks a seed is left out, one that all lack does not count.
    lost = (rows["recipe"] == "r1") & (rows["seed"] == 0)
    assert overall(study, rows[~lost])["recipes"] == RECIPES - 1
    without = (rows["seed"] == 2) & (rows["backend"] == "native")
    assert overall(study, rows[~without])["seeds"] == 2


def test_the_share_counts_seeds_that_ended(study: ModuleType) -> None:
    rows = made_up(backends=0.2)
    expected = overall(study, rows[rows["seed"] > 0])["share"]
    rows.loc[rows["seed"] == 0, ["loss", "diverged"]] = [math.nan, "epoch 1"]
    assert overall(study, rows)["share"] == pytest.approx(expected, rel=1e-12)


def test_identical_losses_need_no_test(study: ModuleType) -> None:
    rows = made_up()
    same = rows["recipe"] == "r0"
    rows.loc[same, "loss"] = rows.loc[same, "seed"] + 0.1
    table = study.summary(rows).set_index("recipe")
    assert table.loc["r0", "verdict"] == "identical"
    assert table.loc["r0", "ratio"] == 1
    assert (table["verdict"].drop("r0") == "equal").all()


def test_a_recipe_that_diverges_on_one_backend_is_open_and_does_not_train(study: ModuleType, analysis) -> None:
    rows = made_up()
    lost = (rows["recipe"] == "r1") & (rows["backend"] == "native") & (rows["seed"] == 0)
    rows.loc[lost, ["loss", "diverged"]] = [math.nan, "epoch 1"]
    lost = (rows["recipe"] == "r3") & (rows["backend"] == "native")
    rows.loc[lost, ["loss", "diverged"]] = [math.nan, "epoch 1"]
    every = rows["recipe"] == "r2"
    rows.loc[every, "loss"] = math.nan
    rows.loc[every, "diverged"] = "epoch 1"
    table = study.summary(rows).set_index("recipe")
    assert table.loc["r1", ["diverged_native", "diverged_simulated", "verdict", "trains"]].tolist() == [
        1,
        0,
        "open",
        False,
    ]
    assert table.loc["r2", ["diverged_native", "diverged_simulated", "trains"]].tolist() == [3, 3, False]
    assert table.loc[["r2", "r3"], "verdict"].tolist() == ["open", "open"]
    assert table.loc[["r1", "r2", "r3"], "pairs"].tolist() == [2, 0, 0]
    assert table.loc["r0", "trains"]
    tables = {"runs": rows.assign(guessing=10.0), "further": rows[:0]}
    assert list(study.draw(tables)) == ["digits"]
    assert "| r2 | (3 diverged) | (3 diverged) | no | open | 4.0x |" in analysis("study").markdown(study.STUDY, tables)
    trains, pooled, single = study.claims(tables)
    assert trains == analysis("study").Claim(
        f"digits: {RECIPES - 3} of {RECIPES} recipes train, with a final training loss below 2.5 nats (0.25 times "
        "that of guessing) in each of their runs; not: r1, r2, r3.",
        False,
        "not examined",
    )
    assert f"all {RECIPES - 3} recipes whose losses differ, over {SEEDS} seeds" in pooled.text
    assert pooled.holds
    assert f"{RECIPES - 3} equal, 0 identical, 3 open, 0 differs" in single.text
    assert single.holds


def test_one_recipe_or_one_backend_or_one_seed_is_enough_for_a_table(study: ModuleType) -> None:
    rows = made_up()
    alone = rows[rows["recipe"] == "r0"]
    assert study.summary(alone)["verdict"].notna().all()
    for part in (alone[alone["backend"] == "native"], alone[alone["seed"] == 0]):
        table = study.summary(part)
        assert table["verdict"].tolist() == ["open"]
        assert study.overall(part, table) == {}
        assert list(study.read({"runs": part})["recipe"]) == ["r0"]
        assert "not compared" in study.claims({"runs": part, "further": part[:0]})[1].text
        assert study.draw({"runs": part})


def test_a_run_that_is_not_there_yet_has_not_diverged(study: ModuleType) -> None:
    rows = made_up()
    missing = (rows["recipe"] == "r0") & (rows["backend"] == "native") & (rows["seed"] == 0)
    row = study.summary(rows[~missing]).iloc[0]
    assert (row["diverged_native"], row["verdict"]) == (0, "equal")
    # Nor does a seed differ that diverged on the other backend, and may do so on this one.
    diverged = (rows["recipe"] == "r0") & (rows["backend"] == "simulated") & (rows["seed"] == 0)
    rows.loc[diverged, ["loss", "diverged"]] = [math.nan, "epoch 1"]
    row = study.summary(rows[~missing]).iloc[0]
    assert (row["diverged_simulated"], row["verdict"]) == (1, "equal")


def test_the_table_is_for_reading(study: ModuleType) -> None:
    shown = study.readable(study.summary(made_up(backends=0.1)))
    assert list(shown.columns) == [
        "recipe",
        "loss, simulated",
        "loss, native",
        "trains",
        "native / simulated",
        "memory",
    ]
    assert study.with_deviation(0.31234, 0.0456) == "0.312 ± 0.046"
    assert study.with_deviation(12.3, 45.6) == "12 ± 46"
    assert study.with_deviation(0.31234, math.nan) == "0.312"
    assert study.with_deviation(math.nan, math.nan) == ""
    wide = shown.assign(recipe=max(study.RECIPES, key=len) + "@4")
    assert max(map(len, wide.to_string(index=False).splitlines())) <= 100


def test_only_recipes_of_as_many_epochs_are_compared(analysis) -> None:
    """Of four 4-bit recipes the best was trained longer, and keeps more memory than float32."""
    of_model, noise = analysis("recipe_of_model"), np.array([0.01, -0.02, 0.015])
    known = {"lsq@4": (20, 0.5, 0.8), "luq": (10, 2.0, 4.0), "luq-smp": (10, 2.01, 4.0), "int4-sr": (10, 6.0, 4.0)}
    rows = [
        {"data": "digits", "model": "preact_resnet20", "recipe": recipe, "forward": 4, "epochs": epochs, "seed": seed,
         "backend": "native", "relative": relative * np.exp(noise[(seed + index) % 3]), "memory": memory}
        for index, (recipe, (epochs, relative, memory)) in enumerate(known.items())
        for seed in range(3)
    ]  # fmt: skip
    tables = {"runs": pd.DataFrame(rows)}
    table = of_model.compared(tables["runs"]).set_index("recipe")
    assert table["of"].to_dict() == {"lsq@4": 1, "luq": 3, "luq-smp": 3, "int4-sr": 3}
    assert math.isnan(table.loc["lsq@4", "p"])
    assert table.loc["luq", "ratio"] == 1
    assert table.loc["int4-sr", "p"] < 0.01 < table.loc["luq-smp", "p"]
    shorter, longer = (claim.text for claim in of_model.claims(tables))
    assert "10 epochs in all: luq has 2 [" in shorter
    assert "the lowest of 3, not told from luq-smp (next: luq-smp, ratio 1" in shorter
    assert longer.endswith("keeps 1.25 times the memory of float32; no other recipe to compare it with.")
    assert list(of_model.draw(tables)) == ["recipe_of_model"]


def test_recipes_whose_interval_leaves_out_1_are_run_again(study: ModuleType) -> None:
    """Fixed seeds. What shifts does so again, what the first seeds made by chance does not."""
    table = study.summary(made_up({"r3": math.log(3.0)}, backends=0.3))
    outside = table[(table["ratio_low"] > 1) | (table["ratio_high"] < 1)]
    assert study.conspicuous(table) == list(outside["recipe"])
    assert "r3" in study.conspicuous(table)
    assert study.conspicuous(study.summary(made_up())) == []  # equal, whether 1 is in the interval or not
    fresh = pd.concat(
        made_up({"r3": math.log(3.0)}, backends=0.3, seed=1 + i).assign(seed=lambda rows, i=i: rows["seed"] + 10 * i)
        for i in range(4)
    )
    chosen = fresh[fresh["recipe"].isin(["r3", "r4"])]
    found = study.again(chosen).set_index("recipe")
    assert found["pairs"].tolist() == [12, 12]
    logs = np.log(chosen[chosen["recipe"] == "r4"].pivot(index="seed", columns="backend", values="loss"))
    of_scipy = scipy.stats.ttest_rel(logs["native"], logs["simulated"])
    assert found.loc["r4", "p_differs"] == pytest.approx(min(1, 2 * of_scipy.pvalue))
    assert np.log(found.loc["r4", ["ratio_low", "ratio_high"]].tolist()) == pytest.approx(
        of_scipy.confidence_interval(0.975)
    )
    shifted, other = map(study._again, study.again(chosen).to_dict("records"))
    assert "r3, whose interval above leaves out 1: with 12 further seeds" in shifted.text
    assert "shows again" in shifted.text
    assert shifted.holds is False
    assert "does not show again" in other.text
    assert other.holds


def test_one_further_seed_decides_nothing(study: ModuleType) -> None:
    rows = made_up({"r3": math.log(3.0)})
    (row,) = study.again(rows[(rows["recipe"] == "r3") & (rows["seed"] == 0)]).to_dict("records")
    assert (row["pairs"], row["p_differs"]) == (1, 1.0)
    assert math.isnan(row["ratio_low"])


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(study: ModuleType, analysis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The command line, with trainings that last no time; it returns the recipes that were trained and the table."""
    trained: list[tuple[str, str, int]] = []

    class Made:
        def __init__(self, loss: float) -> None:
            self.final = pd.Series(dict.fromkeys(study.MEASURED, loss))

    def train(model, records, recipe, *, backend, seed, **others):
        trained.append((recipe.name, backend, seed))
        if recipe.name == "luq" and backend == "native":
            first = {"layer": "conv1", "tensor": "gradient", "largest": 1.0, "nonfinite": 3, "numel": 4}
            found = {"epoch": 2, "reason": "the loss is nan", "first": first, "largest": [first]}
            raise TrainingDiverged("diverged", found, None)
        return Made(0.1 + 0.01 * seed)

    monkeypatch.setattr(study.loop, "train", train)
    monkeypatch.setattr(study.models, "build", lambda *args: torch.nn.Linear(1, 1))
    monkeypatch.chdir(tmp_path)
    written = itertools.count()

    def run(*arguments: str) -> tuple[list[tuple[str, str, int]], pd.DataFrame]:
        trained.clear()
        out = f"out{next(written)}"  # what was written is not measured again
        saved = analysis("study").command(study.STUDY, ["--data", "digits", "--out", out, *arguments])
        return list(trained), saved.tables["runs"]

    return run


def test_a_run_that_diverges_is_a_row_and_the_study_goes_on(command) -> None:
    trained, rows = command("--recipes", "luq", "lsq", "--seeds", "0", "1")
    assert len(trained) == 12  # luq, and lsq with its start
    own = rows[(rows["recipe"] == "luq") & (rows["backend"] == "native")]
    assert own["loss"].isna().all()
    assert own["diverged"].str.contains("gradient of layer 'conv1'").all()
    assert rows.loc[rows["recipe"] == "lsq@4", "loss"].notna().all()


def test_further_seeds_are_those_after_the_first(command, study, monkeypatch) -> None:
    monkeypatch.setattr(study, "conspicuous", lambda table: ["luq"])
    trained, rows = command("--recipes", "exact", "luq", "--seeds", "0", "1", "--further", "2")
    assert trained[8:] == [("luq", backend, seed) for seed in (2, 3) for backend in study.BACKENDS]
    assert set(rows["seed"]) == {0, 1}


def test_runs_are_not_repeated_and_processes_share_them(command) -> None:
    recipes = ("--recipes", "exact", "luq")
    first, _ = command(*recipes, "--seeds", "0", "1", "--backends", "native")
    second, rows = command(*recipes, "--seeds", "1", "--backends", "simulated")
    assert (len(first), len(second), len(rows)) == (4, 2, 2)
    # What was killed while it wrote a run left that run's temporary file, which is none.
    (parts,) = {file.parent for file in Path("runs").rglob("*.json")}
    assert len(list(parts.glob("*.json"))) == 6
    for file in parts.glob("*.json"):
        if json.loads(file.read_text())["rows"][0]["diverged"]:  # luq's
            file.rename(file.with_suffix(".json.tmp")).write_text("{")
    trained, rows = command(*recipes, "--seeds", "0", "1")
    assert trained == [("exact", "simulated", 0), ("luq", "simulated", 0), ("luq", "native", 0), ("luq", "native", 1)]
    assert len(rows) == 8
    assert command(*recipes, "--seeds", "0", "1")[0] == []
    # More seeds take what is there.
    assert {seed for *_, seed in command(*recipes, "--seeds", "0", "1", "2")[0]} == {2}
    # Unless it is wanted anew.
    assert len(command(*recipes, "--seeds", "0", "1", "--again")[0]) == 8


def test_runs_of_another_length_are_not_taken_for_these(command) -> None:
    for epochs in ("3", "4"):
        trained, rows = command("--recipes", "exact", "--seeds", "0", "1", "--epochs", epochs)
        assert (len(trained), set(rows["epochs"])) == (4, {int(epochs)})
    with pytest.raises(InputError, match=r"results with the settings .*'epochs': 3"):
        command("--recipes", "exact", "--seeds", "0", "1", "--epochs", "4", "--out", "out0")


def test_runs_of_another_recipe_or_data_are_not_taken_for_these(
    command, study: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--recipes", "lsq", "--seeds", "0", "1", "--backends", "simulated")
    assert len(command(*arguments)[0]) == 4
    assert command(*arguments)[0] == []
    records, run = study.records, study.runs.run

    def other(change):
        return lambda name, bits=None: change(run(name, bits))

    def faster(of):
        optimizer = dataclasses.replace(of.recipe.optimizer, lr=2 * of.recipe.optimizer.lr)
        return dataclasses.replace(of, recipe=dataclasses.replace(of.recipe, optimizer=optimizer))

    def shuffled(name):
        found = records(name)
        parts = {
            key: {split: part[:-1] for split, part in getattr(found, key).items()} for key in ("inputs", "targets")
        }
        return dataclasses.replace(found, **parts)

    changes = (
        (study.runs, "run", other(faster)),
        # The network that it starts from is the one of another recipe.
        (study.runs, "run", other(lambda of: faster(of) if of.recipe.name == study.START else of)),
        (study.runs, "run", other(lambda of: dataclasses.replace(of, batch_size=32))),
        (study, "records", shuffled),
    )
    for place, name, changed in changes:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, changed)
            assert len(command(*arguments)[0]) == 4
    assert command(*arguments)[0] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nothing"), "unknown data 'nothing'; known: "),
        (("--backends", "gpu"), "unknown backend 'gpu'; known: "),
    ],
)
def test_unknown_names_are_refused(command, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command(*arguments)


def test_the_committed_runs_are_of_the_recipes_as_they_are(study: ModuleType, analysis) -> None:
    """Of digits: the text takes long to be read."""
    rows = analysis("study").load(study.STUDY, analysis("study").RESULTS / "recipes").tables["runs"]
    own, trainer = rows[rows["data"] == "digits"], study.Trainer("", 0)
    wanted = [trainer.case("digits", *study.with_bits(recipe), "native", 0) for recipe in dict.fromkeys(own["recipe"])]
    stored = own[["recipe", "model", "epochs", "trained_sha256"]].drop_duplicates()
    assert stored.to_dict("records") == [{name: case[name] for name in stored} for case in wanted]
